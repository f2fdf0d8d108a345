"""Checks of correctness on one GPU, in a minute: the exit code is the number of checks that failed.

python benchmarks/gpu_checks.py
python benchmarks/gpu_checks.py --device cpu      # try the script itself
"""

import argparse
import copy
import logging
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pet import (
    Adapted,
    DiffPruningCallback,
    LoRACallback,
    NotMergeableError,
    PETCallback,
    apply,
    load_delta,
    save_delta,
)
from lightning_pet.layers.delta import Delta
from lightning_pet.layers.hard_concrete import HardConcrete
from lightning_pet.layers.sparse_difference import SparseDifference
from lightning_pet.model.quantised import is_quantised

DEVICE = "cuda"


class Net(nn.Module):
    """Two layers with dropout between them: random numbers of the device decide every step."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 256)
        self.drop = nn.Dropout(0.2)
        self.down = nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        """Batch × 64 in and out."""
        return self.down(self.drop(self.up(x).relu()))


class Module(pl.LightningModule):
    """Regression on random data; remembers every loss."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Mean squared error."""
        loss = nn.functional.mse_loss(self.net(batch[0]).float(), batch[1].float())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW over everything: the callback leaves the delta in it."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def base() -> Net:
    """The same base every time."""
    torch.manual_seed(0)
    return Net()


def loader() -> DataLoader[Any]:
    """Six batches in an order that the random state decides."""
    generator = torch.Generator().manual_seed(1)
    rows = TensorDataset(torch.randn(48, 64, generator=generator), torch.randn(48, 64, generator=generator))
    return DataLoader(rows, batch_size=8, shuffle=True)


def lora(**options: Any) -> LoRACallback:
    """LoRA with dropout on both layers."""
    return LoRACallback(**{"r": 4, "dropout": 0.1, "target_modules": ["up", "down"], "verbose": False} | options)


def diff(**options: Any) -> DiffPruningCallback:
    """Diff pruning whose cut is after seven of the twelve steps."""
    return DiffPruningCallback(**{"density": 0.1, "l0_weight": 1e-6, "verbose": False, "plot": False} | options)


def fit(
    module: Module, folder: Path, seed: int = 2, method: Callable[[], PETCallback] = lora, **options: Any
) -> pl.Trainer:
    """Two epochs, a checkpoint after every step."""
    path = options.pop("ckpt_path", None)
    trainer = pl.Trainer(
        accelerator="gpu" if DEVICE == "cuda" else "cpu",
        devices=1,
        max_epochs=2,
        callbacks=[method(), ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    torch.manual_seed(seed)
    trainer.fit(module, loader(), ckpt_path=path)
    return trainer


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """State on the CPU."""
    return {name: value.detach().cpu() for name, value in module.state_dict().items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules are equal bit for bit."""
    left, right = tensors(a), tensors(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def trained_net(folder: Path) -> nn.Module:
    """A trained model in eval mode on the device."""
    module = Module(base())
    fit(module, folder)
    return module.net.to(DEVICE).eval()


def resumes_bit_for_bit(folder: Path, precision: str = "32-true") -> None:
    """From the middle of an epoch, with another seed: losses and delta are those of the uninterrupted run."""
    whole, resumed = Module(base()), Module(base())
    fit(whole, folder / "whole", precision=precision)
    path = folder / "whole" / "step=4.ckpt"
    fit(resumed, folder / "again", seed=99, precision=precision, ckpt_path=path)
    assert resumed.losses == whole.losses[4:], (resumed.losses, whole.losses[4:])
    assert same(whole, resumed)


def resumes_in_mixed_precision(folder: Path) -> None:
    """The same under bf16-mixed; the delta stays float32."""
    resumes_bit_for_bit(folder, "bf16-mixed")


def trains_on_a_bf16_base(folder: Path) -> None:
    """bf16-true casts the base only, and the resume is exact."""
    resumes_bit_for_bit(folder, "bf16-true")
    module = Module(base())
    fit(module, folder / "dtype", precision="bf16-true")
    assert {p.dtype for d in module.modules() if isinstance(d, Delta) for p in d.parameters()} == {torch.float32}
    assert module.net.up.weight.dtype == torch.bfloat16


def merges(folder: Path) -> None:
    """The merged model computes what the adapted one does."""
    net = trained_net(folder)
    merged = copy.deepcopy(net)
    Adapted(merged).merge_()
    x = torch.randn(32, 64, device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(merged(x), net(x), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(base().to(DEVICE).eval()(x), net(x), atol=1e-2)


def loads_a_delta_file(folder: Path) -> None:
    """A file written from the device gives the same outputs on a base that is on the device, or moves there."""
    net = trained_net(folder / "run")
    save_delta(net, folder / "delta.pet.safetensors")
    here, moved = base().to(DEVICE), base()
    for model in (here, moved):
        load_delta(model, folder / "delta.pet.safetensors")
    x = torch.randn(32, 64, device=DEVICE)
    with torch.no_grad():
        assert torch.equal(here.eval()(x), net(x))
        assert torch.equal(moved.to(DEVICE).eval()(x), net(x))


def compiles(folder: Path) -> None:
    """Compiled and not, the gradients agree."""
    nets = [base().to(DEVICE).eval() for _ in range(2)]
    for net in nets:
        torch.manual_seed(3)
        apply(net, [lora(dropout=0.0)])
        for delta in (m for m in net.modules() if isinstance(m, Delta)):
            nn.init.normal_(delta.b, generator=torch.Generator(DEVICE).manual_seed(4))
    nets[1].compile()
    x = torch.randn(32, 64, device=DEVICE)
    for net in nets:
        net(x).square().mean().backward()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3)


METHODS: dict[str, dict[str, Any]] = {
    "LoRACallback": {"target_modules": ["all-linear"], "use_dora": True},
    "AdaLoRACallback": {"target_r": 2, "init_r": 4, "tinit": 1, "tfinal": 1},
    "IA3Callback": {},
    "IntrinsicDimensionCallback": {"d": 500},
    "AdapterCallback": {"robust_drop": True},
    "CompacterCallback": {"bottleneck_size": 4},
    "AdapterBiasCallback": {},
    "PrefixTuningCallback": {"length": 4, "projection_size": 8},
    "PromptTuningCallback": {"length": 4},
    "BitFitCallback": {},
    "LayerFreezingCallback": {"train_last": 1, "unfreeze_every": 1},
    "DiffPruningCallback": {"density": 0.05},
    "FullFineTuningCallback": {},
}


class Classifier(Module):
    """A small BERT with dropout."""

    def __init__(self) -> None:
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
        torch.manual_seed(0)
        super().__init__(BertForSequenceClassification(config))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The model's own loss."""
        loss: Tensor = self.net(**batch).loss
        self.losses.append(loss.item())
        return loss


def every_method_trains_and_resumes(folder: Path) -> None:
    """Two epochs, and again from the middle: the same losses (embeddings sum gradients in no fixed order)."""
    import lightning_pet

    ids = torch.randint(3, 50, (48, 7), generator=torch.Generator().manual_seed(1))
    loader = DataLoader([{"input_ids": row, "labels": row[0] % 2} for row in ids], batch_size=8, shuffle=True)
    for name, options in METHODS.items():
        runs = []
        for path in (None, folder / name / "step=4.ckpt"):
            module = Classifier()
            method = getattr(lightning_pet, name)(**options, verbose=False)
            saving = ModelCheckpoint(folder / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
            trainer = pl.Trainer(
                accelerator="gpu" if DEVICE == "cuda" else "cpu",
                devices=1,
                max_epochs=2,
                callbacks=[method, saving] if path is None else [method],
                logger=False,
                enable_checkpointing=path is None,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            torch.manual_seed(2 if path is None else 99)
            trainer.fit(module, loader, ckpt_path=path)
            runs.append(module.losses)
        assert len(runs[0]) == 12, (name, runs)
        torch.testing.assert_close(torch.tensor(runs[1]), torch.tensor(runs[0][4:]), atol=1e-4, rtol=1e-4, msg=name)
        print(f"        {name}: {runs[0][0]:.4f} to {runs[0][-1]:.4f}", flush=True)


def diff_pruning_resumes_in_both_stages(folder: Path) -> None:
    """With gates and at fixed places, in float32 and under a gradient scaler; the file is the model."""
    for precision in ("32-true", "16-mixed" if DEVICE == "cuda" else "bf16-mixed"):
        whole = Module(base())
        fit(whole, folder / precision, method=diff, precision=precision)
        for step in (3, 7, 9):
            resumed, path = Module(base()), folder / precision / f"step={step}.ckpt"
            fit(resumed, folder / f"{precision}{step}", seed=99, method=diff, precision=precision, ckpt_path=path)
            assert resumed.losses == whole.losses[step:], (precision, step)
            assert same(whole, resumed), (precision, step)
    save_delta(whole, folder / "delta.pet.safetensors")
    loaded, net = base().to(DEVICE), whole.net.to(DEVICE).eval()
    load_delta(loaded, folder / "delta.pet.safetensors")
    x = torch.randn(32, 64, device=DEVICE)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), net(x))
    kept = sum(int(d.count_nonzero()) for d in net.modules() if hasattr(d, "count_nonzero"))
    assert kept == int(0.1 * sum(p.numel() for p in base().parameters()))


def drawn(law: HardConcrete, alpha: Tensor, generator: torch.Generator) -> Tensor:
    """Gates by their definition."""
    u = law.uniform(alpha.detach(), generator)
    return (torch.sigmoid(torch.logit(u) + alpha) * law.width + law.low).clamp(0, 1)


def gates_have_the_gradients_of_their_definition(folder: Path) -> None:
    """The fused operator on the device against plain autograd on the same gates."""
    net = base().to(DEVICE)
    apply(net, [diff(l0_weight=0.01)])
    for delta in (m for m in net.modules() if isinstance(m, SparseDifference)):
        w, alpha, group = delta.w, delta.alpha, delta.alpha_group
        nn.init.normal_(w, generator=torch.Generator(DEVICE).manual_seed(4))
        delta.gates.begin(1)
        weight = torch.zeros_like(w)
        out = delta.train()(weight)
        found = torch.autograd.grad(out.square().sum(), [w, alpha, group])
        generator, law = delta.gates.generator(w.device), delta.law
        z_g = drawn(law, group.reshape(()), generator)
        pieces = alpha.flatten().split(1 << 15 if DEVICE == "cpu" else 1 << 24)
        z = torch.cat([drawn(law, piece, generator) for piece in pieces])
        expected = z.view_as(w) * z_g * w
        torch.testing.assert_close(out, expected)
        penalty = 0.01 * law.open(alpha).sum() * law.open(group).sum()
        truth = torch.autograd.grad(expected.square().sum() + penalty, [w, alpha, group])
        torch.testing.assert_close(list(found), list(truth), atol=1e-4, rtol=1e-3)


def trains_on_a_torchao_base(folder: Path) -> None:
    """Weight-only int8: the resume is exact, gradient reaches the first layer, and merging is refused."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def quantised() -> Net:
        net = base().to(DEVICE)
        quantize_(net, Int8WeightOnlyConfig())
        return net

    resumes_on_a_quantised_base(folder, lambda: Module(quantised()), {})


def trains_on_a_bitsandbytes_base(folder: Path) -> None:
    """Lightning's plug-in replaces the layers; everything else as above, also for DoRA, which reads the weight."""
    from lightning.pytorch.plugins import BitsandbytesPrecision

    for mode, dtype in (("nf4", torch.bfloat16), ("nf4-dq", torch.bfloat16), ("int8", torch.float16)):
        for dora in (False, True):
            method = partial(lora, use_dora=dora)
            make = partial(BitsandbytesPrecision, mode, dtype=dtype)
            resumes_on_a_quantised_base(folder / f"{mode}-{dora}", lambda: Module(base()), {"plugins": make}, method)


def resumes_on_a_quantised_base(
    folder: Path, build: Callable[[], Module], options: dict[str, Any], method: Callable[[], PETCallback] = lora
) -> None:
    """Fit, resume in the middle, and look at what was trained."""
    made = [{name: make() for name, make in options.items()} for _ in range(2)]
    whole, resumed = build(), build()
    fit(whole, folder / "whole", method=method, **made[0])
    fit(resumed, folder / "again", 99, method, ckpt_path=folder / "whole" / "step=4.ckpt", **made[1])
    assert resumed.losses == whole.losses[4:], (resumed.losses, whole.losses[4:])
    own = [{n: p for n, p in module.named_parameters() if ".pet." in n} for module in (whole, resumed)]
    assert all(torch.equal(p, own[1][name]) for name, p in own[0].items())
    assert {p.dtype for p in own[0].values()} == {torch.float32}
    assert own[0]["net.up.pet.lora_default.b"].abs().max() > 0
    assert is_quantised(whole.net.up.weight)
    adapted = Adapted(whole.net)
    try:
        adapted.merge_()
    except NotMergeableError:
        pass
    else:
        raise AssertionError("a quantised weight was merged into")


CHECKS: list[Callable[[Path], None]] = [
    resumes_bit_for_bit,
    resumes_in_mixed_precision,
    trains_on_a_bf16_base,
    merges,
    loads_a_delta_file,
    compiles,
    every_method_trains_and_resumes,
    diff_pruning_resumes_in_both_stages,
    gates_have_the_gradients_of_their_definition,
    trains_on_a_torchao_base,
]
ON_CUDA_ONLY: list[Callable[[Path], None]] = [trains_on_a_bitsandbytes_base]  # Lightning's plug-in runs nowhere else


def main() -> int:
    """Run all checks; return how many failed."""
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    DEVICE = parser.parse_args().device
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    failed = 0
    for check in [*CHECKS, *(ON_CUDA_ONLY if DEVICE == "cuda" else [])]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                check(Path(folder))
                print(f"ok      {check.__name__}", flush=True)
            except Exception:
                failed += 1
                print(f"FAILED  {check.__name__}\n{traceback.format_exc()}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
