"""Compiled modules, and gradient checkpointing of both kinds."""

import warnings

import pytest
import torch
from hf_models import bert, gpt2, hf_fit, vit
from lightning.pytorch.callbacks import ModelCheckpoint
from models import Data, Module, Net, cosine, digest, fit, lora, names_in, trainer

from lightning_pet.operations.delta import load_delta, save_delta

KEPT = {*(f"net.fc{i}.pet.lora_default.{p}" for i in (1, 2) for p in "ab"), "net.head.weight", "net.head.bias"}


@pytest.mark.parametrize("what", ["module", "net"])
def test_compiled(what, tmp_path):
    class Quiet(Module):
        def training_step(self, batch, batch_idx):
            return self.loss(batch)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.losses.append(outputs["loss"].item())

    def build():
        torch._dynamo.reset()
        module = Quiet(Net(dropout=0), cosine)
        if what == "net":
            module.net = torch.compile(module.net, backend="eager")
            return module, module
        return module, torch.compile(module, backend="eager")

    module, compiled = build()
    fit(compiled, lora(), ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1))
    plain = Quiet(Net(dropout=0), cosine)
    fit(plain, lora())
    assert module.losses == pytest.approx(plain.losses, rel=1e-5)
    path = tmp_path / "step=4.ckpt"
    assert names_in(torch.load(path, weights_only=True)) == KEPT
    again, compiled = build()
    trainer(lora()).fit(compiled, datamodule=Data(), ckpt_path=path)
    assert again.losses == module.losses[4:]
    assert digest(again) == digest(module)
    uncompiled = Quiet(Net(dropout=0), cosine)
    trainer(lora()).fit(uncompiled, datamodule=Data(), ckpt_path=path)
    assert uncompiled.losses == pytest.approx(module.losses[4:], rel=1e-5)
    save_delta(module, tmp_path / "d.pet.safetensors")
    bare = Net(dropout=0)
    load_delta(bare, tmp_path / "d.pet.safetensors")
    x = torch.ones(3, 6)
    assert torch.allclose(bare.eval()(x), module.net.eval()(x), atol=1e-6)


@pytest.mark.parametrize("inference_mode", [True, False])
def test_validation_is_one_graph(inference_mode):
    class Validated(Module):
        def validation_step(self, batch, batch_idx):
            return self.loss(batch)

    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    module = Validated(Net(dropout=0), cosine)
    module.net = torch.compile(module.net, backend=backend, fullgraph=True)
    trainer(lora(), inference_mode=inference_mode, limit_val_batches=2).validate(
        module, datamodule=Data(), verbose=False
    )
    assert len(graphs) == 1


@pytest.mark.parametrize("build", [bert, gpt2, vit], ids=lambda f: f.__name__)
def test_gradient_checkpointing(build):
    plain = hf_fit(build())
    assert len(plain.losses) == 3
    for reentrant in (False, True):
        net = build()
        net.activation_checkpointing_enable({"use_reentrant": reentrant})
        hooks = len(net.get_input_embeddings()._forward_hooks)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = hf_fit(net)
        assert module.losses == pytest.approx(plain.losses, rel=1e-6), reentrant
        for name, value in plain.state_dict().items():
            assert torch.allclose(module.state_dict()[name], value, atol=1e-6), (reentrant, name)
        assert len(net.get_input_embeddings()._forward_hooks) == hooks
