"""LoRA that starts from data: EVA, as HF PEFT computes it, before the first step, once, in every process alike."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_pet import (
    Adapted,
    AdapterCallback,
    ArgumentError,
    LoRACallback,
    PETError,
    TargetError,
    apply,
    inspect_delta,
    load_delta,
    save_delta,
)
from lightning_pet.layers.input_directions import Directions, share_ranks

from . import zoo

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def data(rows: int = 24) -> DataLoader:
    """Sentences with padding at the end, and labels that are ignored at the beginning."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(rows):
        ids = torch.randint(1, 40, (8,), generator=generator)
        mask = (torch.arange(8) < 8 - torch.randint(0, 4, (1,), generator=generator)).long()
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(torch.arange(8) < 2, -100)})
    return DataLoader(found, batch_size=6)


class Model(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.steps = net, 0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.steps += 1
        self.log("steps", float(self.steps))
        return self.net(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.net(**batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def eva(**options: Any) -> LoRACallback:
    return LoRACallback(**{"r": 4, "alpha": 8, "init": "eva", "target_modules": TARGETS, "verbose": False} | options)


def trainer(folder: Path, *callbacks: Any, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "max_steps": 3, "default_root_dir": folder, "callbacks": [*callbacks]} | options)


def started(folder: Path, net: nn.Module, *callbacks: Any) -> Model:
    """After no step at all."""
    model = Model(net)
    run = trainer(folder, *callbacks, max_steps=0, enable_checkpointing=False)
    run.fit(model, data())
    return model


def test_the_start_is_that_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    net = zoo.llama()[0]
    callback = eva(eva_rho=2.0)
    base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    ids = next(iter(data()))["input_ids"]
    with torch.no_grad():
        before = net(ids).logits
    started(tmp_path, net, callback)
    with torch.no_grad():
        assert torch.equal(net(ids).logits, before)  # the identity
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in base.items())
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="eva", target_modules=TARGETS)
    theirs = peft.get_peft_model(zoo.llama()[0], config)
    peft.initialize_lora_eva_weights(theirs, data(), show_progress_bar=False)
    ours = {target.module: delta for target, delta in callback.deltas(net)}
    ranks = {}
    for path, module in theirs.named_modules():
        if "default" in getattr(module, "lora_A", ()):
            name, a = path.removeprefix("base_model.model."), module.lora_A["default"].weight
            ranks[name] = len(a)
            own = ours[name]
            assert own.scale == pytest.approx(module.scaling["default"])
            assert own.a.shape == a.shape
            assert ((a * own.a).sum(1).abs() - 1).abs().max() < 1e-5  # up to sign
            assert (own.a @ own.a.T - torch.eye(len(a))).abs().max() < 1e-5
    assert ranks.keys() == ours.keys()
    assert len(set(ranks.values())) > 1  # shared out
    assert sum(ranks.values()) == 4 * 8


def test_what_was_learned_is_in_files_and_is_not_repeated(tmp_path: Path) -> None:
    model = Model(zoo.llama()[0])
    trainer(tmp_path, eva(eva_rho=4.0)).fit(model, data())
    assert model.steps == 3  # looking leaves no trace
    adapted = Adapted(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in adapted.state_dict().items()}
    assert len({shape[0] for name, shape in shapes.items() if name.endswith(".a")}) > 1
    ids = next(iter(data()))["input_ids"]
    with torch.no_grad():
        expected = model.net(ids).logits
    path = tmp_path / "x.pet.safetensors"
    save_delta(model, path)
    assert inspect_delta(path).methods[0].config["init"] == "eva"
    other = zoo.llama()[0]
    load_delta(other, path)
    with torch.no_grad():
        assert torch.equal(other(ids).logits, expected)
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    resumed, empty = Model(zoo.llama()[0]), trainer(tmp_path / "b", eva(eva_rho=4.0), max_steps=4)
    resumed.train_dataloader = data  # type: ignore[method-assign]
    steps: list[int] = []
    resumed.net.register_forward_pre_hook(lambda *_: steps.append(1))
    empty.fit(resumed, ckpt_path=str(checkpoint))
    assert {name: tuple(t.shape) for name, t in Adapted(resumed).state_dict().items()} == shapes
    assert len(steps) <= 3  # looks at the structure and the step: no pass over the data
    begun = Model(zoo.llama()[0])
    trainer(tmp_path / "c", eva(eva_rho=4.0, start_from=str(path)), max_steps=0).fit(begun, data())
    with torch.no_grad():
        assert torch.equal(begun.net.eval()(ids).logits, expected)
    again = Adapted(model)  # the same model goes on with a new callback: what it has learned stays
    trainer(tmp_path / "d", eva(eva_rho=4.0), max_steps=1).fit(model, data())
    assert {name: tuple(t.shape) for name, t in again.state_dict().items()} == shapes


def test_a_target_may_get_nothing_and_whitening_divides(tmp_path: Path) -> None:
    net = zoo.llama()[0]
    some = eva(eva_rho=8.0, r=1)
    started(tmp_path, net, some)
    ranks = [len(delta.a) for _, delta in some.deltas(net)]
    assert sum(ranks) == 8 > len(ranks)
    with pytest.raises(ArgumentError, match="eva_rho"):
        eva(eva_rho=0.5)
    plain, white = zoo.llama()[0], zoo.llama()[0]
    first, second = eva(eva_rho=1), eva(eva_rho=1, eva_whiten=True)
    started(tmp_path, plain, AdapterCallback(bottleneck_size=2), first)  # not the callback that drives
    started(tmp_path, white, second)
    for (_, a), (_, b) in zip(first.deltas(plain), second.deltas(white), strict=True):
        ratio = b.a / a.a
        assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-2)
        assert (ratio[:, 0].diff() > 0).all()  # smaller directions get larger


def test_a_fused_projection_has_one_study_for_all_its_roles(tmp_path: Path) -> None:
    net = zoo.gpt2()[0]
    callback = eva(target_modules=["attention.q", "attention.v"], eva_rho=1)
    model = Model(net)
    trainer(tmp_path, callback, max_steps=0, enable_checkpointing=False).fit(model, data())
    deltas = [delta for _, delta in callback.deltas(net)]
    assert torch.equal(deltas[0].a, deltas[1].a)
    assert deltas[0].rows != deltas[1].rows


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, TargetError, "no called linear layer"),
        ({"r": 400}, TargetError, "rank can be at most"),
    ],
)
def test_what_has_no_inputs_to_look_at_is_named(
    options: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    net = zoo.llama()[0]
    with pytest.raises(error, match=words):
        started(tmp_path, net, eva(**options))
    assert not any(".pet." in name for name in net.state_dict())


def test_without_data_it_is_refused(tmp_path: Path) -> None:
    net = zoo.llama()[0]
    with pytest.raises(PETError, match="apply\\(\\) has not"):
        apply(net, [eva()])
    with pytest.raises(PETError, match="this run has none"):
        trainer(tmp_path, eva()).validate(Model(net), data(), verbose=False)
    with pytest.raises(PETError, match="an iterator"):
        trainer(tmp_path, eva()).fit(Model(net), iter(data()))
    assert not any(".pet." in name for name in net.state_dict())


def test_directions_are_those_of_all_rows() -> None:
    torch.manual_seed(0)
    rows = torch.randn(200, 12) * torch.logspace(1, -2, 12) + 5
    found = Directions(4)
    for part in rows.split(10):
        found.add(part[:3])  # too few: they wait
        found.add(part[3:])
    centred = (rows - rows.mean(0)).double()
    _, singular, vectors = torch.linalg.svd(centred, full_matrices=False)
    assert found.components is not None
    assert ((found.components @ vectors[:4].T).diagonal().abs() > 0.97).all()
    assert torch.allclose(found.shares, singular[:4].square() / singular.square().sum(), rtol=0.05)
    assert share_ranks([torch.tensor([0.5, 0.1]), torch.tensor([0.5, 0.1])], 3) == [2, 1]
