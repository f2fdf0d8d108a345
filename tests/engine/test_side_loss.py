"""A penalty beside the user's loss, in a fit: its gradient is that of the same penalty added by hand."""

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from models import Data, fit, lora
from penalised import WEIGHT, Adding, Gradients, PenalisedCallback, by_hand, train

from lightning_pet.layers import side_loss
from lightning_pet.operations.apply import apply


def fp16() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))


CELLS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "dict": {"kind": "dict"},
    "bf16": {"precision": "bf16-mixed"},
    "fp16 scaler": {"plugins": fp16},
    "accumulation": {"accumulate_grad_batches": 2},
    "fp16 scaler, accumulation": {"plugins": fp16, "accumulate_grad_batches": 2},
    "manual": {"kind": "manual"},
    "manual, fp16 scaler": {"kind": "manual", "plugins": fp16},
    "checkpointing": {"reentrant": False},
    "reentrant": {"reentrant": True},
    "reentrant, accumulation": {"reentrant": True, "accumulate_grad_batches": 2},
    "reentrant, manual": {"reentrant": True, "kind": "manual"},
}


@pytest.mark.parametrize("cell", CELLS)
def test_the_gradient_is_that_of_a_penalty_added_by_hand(cell: str) -> None:
    (module, ours), (truth, theirs) = (
        train(add, **{name: value() if callable(value) else value for name, value in CELLS[cell].items()})
        for add in (False, True)
    )
    assert len(ours.steps) == len(theirs.steps) >= 4
    torch.testing.assert_close(ours.steps, theirs.steps, rtol=1e-5, atol=1e-6)
    assert by_hand(module).item() == pytest.approx(by_hand(truth).item(), rel=1e-5)
    assert module.losses == pytest.approx(truth.losses, rel=1e-4)  # what the user reports stays the user's


def test_nothing_is_left_behind() -> None:
    module, _ = train(False)
    assert not {"training_step", "manual_backward"} & vars(module).keys()
    assert side_loss._loss.scale == 1.0


def test_without_a_penalty_nothing_is_wrapped() -> None:
    class Looking(Adding):
        def on_train_start(self) -> None:
            assert not {"training_step", "manual_backward"} & vars(self).keys()

    fit(Looking(False), lora())


@pytest.mark.parametrize("what", ["module", "net"])
def test_compiled(what: str) -> None:
    class Quiet(Adding):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch)

    def gradients(compiled: bool) -> Any:
        torch._dynamo.reset()
        module, seen = Quiet(False), Gradients()
        fitted: Any = module
        if compiled and what == "net":
            module.net = torch.compile(module.net, backend="aot_eager", fullgraph=True)
        elif compiled:
            fitted = torch.compile(module, backend="aot_eager")
        fit(fitted, PenalisedCallback(WEIGHT), seen, data=Data(shuffle=False))
        return seen.steps

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-5, atol=1e-6)


def test_without_a_trainer() -> None:
    found = []
    for add in (False, True):
        module = Adding(add)
        apply(module, [PenalisedCallback(0.0 if add else WEIGHT)])
        loss = module.loss(next(iter(Data(shuffle=False).train_dataloader())))
        (loss + by_hand(module) if add else loss).backward()
        found.append([p.grad for p in module.parameters() if p.requires_grad])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
