"""The drift meter: closed forms, which predictions count, the penalty equal to one by hand, and refusals."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_pet as pet
from lightning_pet.callbacks.drift import _divergence

VOCABULARY = 11


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.fc = nn.Embedding(VOCABULARY, 6), nn.Linear(6, 6)
        self.drop, self.out = nn.Dropout(0.0), nn.Linear(6, VOCABULARY)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.out(self.drop(self.fc(self.table(ids)).tanh()))}


class Module(L.LightningModule):
    def __init__(self, by_hand: float = 0.0, lr: float = 0.5, model: nn.Module | None = None) -> None:
        super().__init__()
        self.net, self.by_hand, self.lr = model or Model(), by_hand, lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        ids, mask, labels = batch
        logits = self.net(ids, attention_mask=mask)["logits"]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        if self.by_hand:
            with torch.no_grad(), pet.Adapted(self).disabled():
                base = self.net(ids, attention_mask=mask)["logits"].log_softmax(-1)
            each = (base.exp() * (base - logits.log_softmax(-1))).sum(-1)
            loss = loss + self.by_hand * each[mask.bool()].mean()
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.net(batch[0], attention_mask=batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def loader(rows: int = 12) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(VOCABULARY, (rows, 5), generator=generator) for _ in range(2))
    mask = (torch.arange(5) < torch.randint(2, 6, (rows, 1), generator=generator)).long()
    return DataLoader(TensorDataset(ids, mask, labels), batch_size=2)


def fit(module: L.LightningModule, *callbacks: Any, **options: Any) -> L.Trainer:
    given: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "precision": "64-true",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    torch.manual_seed(3)  # of what the deltas start from
    trainer = L.Trainer(callbacks=list(callbacks), **{**given, **options})
    trainer.fit(module, loader(), loader(7))
    return trainer


def lora() -> Any:
    return pet.LoRACallback(r=2, target_modules=["net.fc", "fc"], dropout=0.0)


def test_divergence_and_its_gradient_in_closed_form() -> None:
    base = torch.tensor([[0.2, 0.8], [0.5, 0.5]], dtype=torch.float64).log()
    tuned = torch.tensor([[0.6, 0.4], [0.5, 0.5]], dtype=torch.float64).log().requires_grad_()
    found = _divergence(tuned, base)
    assert found.item() == pytest.approx(0.3347952867143343, abs=1e-15)  # 0.2 ln(1/3) + 0.8 ln 2
    found.backward()
    assert torch.allclose(tuned.grad, torch.tensor([[0.4, -0.4], [0.0, 0.0]], dtype=torch.float64), atol=1e-15)
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: _divergence(t, base.new_ones(3, 5)), (logits,))
    half = torch.randn(3, 5).half().requires_grad_()
    (_divergence(half, base.new_zeros(3, 5)) * 2.0**20 / 2.0**18).backward()  # what a scaler does
    wide = half.detach().double()
    assert torch.allclose(half.grad.double(), 4 * (wide.softmax(-1) - 0.2), rtol=1e-3, atol=1e-6)
    masked = torch.tensor([[0.0, -torch.inf]])
    assert _divergence(masked, masked).item() == 0


@pytest.mark.parametrize("method", [lora, pet.BitFitCallback], ids=["lora", "bitfit"])
def test_drift_is_that_of_a_separate_base(method: Any) -> None:
    module, meter = Module(), pet.DriftCallback(batches=None)
    trainer = fit(module, method(), meter)
    base, total, count = Model().double(), 0.0, 0
    for ids, mask, _ in loader(7):
        with torch.no_grad():
            theirs, ours = (m(ids)["logits"].log_softmax(-1)[mask.bool()] for m in (base, module.net.eval()))
        total += (theirs.exp() * (theirs - ours)).sum().item()
        count += len(ours)
    assert meter.drift == pytest.approx(total / count, abs=1e-14)
    assert total > 0
    assert trainer.callback_metrics["val/drift"].item() == pytest.approx(meter.drift, rel=1e-6)
    assert "validation_step" not in vars(module)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"precision": "32-true"}], ids=str)
def test_the_penalty_is_that_by_hand(options: dict[str, Any]) -> None:
    ours, hand, free = Module(), Module(by_hand=0.7), Module()
    fit(ours, lora(), pet.DriftCallback(weight=0.7), **options)
    fit(hand, lora(), **options)
    fit(free, lora(), **options)
    states = [pet.Adapted(module).state_dict() for module in (ours, hand, free)]
    error = 1e-6 if options.get("precision") else 1e-14
    assert all(torch.allclose(states[0][name], states[1][name], atol=error, rtol=0) for name in states[0])
    assert any(not torch.allclose(states[0][name], states[2][name], atol=1e-4) for name in states[0])
    assert "training_step" not in vars(ours)


def test_dropout_does_not_count() -> None:
    module = Module(lr=0.0)
    module.net.drop.p = 0.5
    trainer = fit(module, lora(), pet.DriftCallback(weight=1.0))
    assert trainer.callback_metrics["train/drift"] == 0
    assert trainer.callback_metrics["val/drift"] == 0


def test_too_much_drift_stops_the_run() -> None:
    with pytest.warns(UserWarning, match="above max_drift=0.0001: the run stops"):
        trainer = fit(Module(), lora(), pet.DriftCallback(max_drift=1e-4), max_epochs=9)
    assert trainer.current_epoch == 1


@pytest.mark.parametrize("method", [pet.PrefixTuningCallback, pet.PromptTuningCallback], ids=["prefix", "prompt"])
def test_labels_of_causal_models_are_those_of_the_next_token(method: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    class Causal(Module):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.net(input_ids=batch[0], labels=batch[2]).loss

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.net(input_ids=batch[0], labels=batch[2].masked_fill(batch[1] == 0, -100))

    config = GPT2Config(vocab_size=VOCABULARY, n_embd=8, n_layer=1, n_head=2, n_positions=32)
    torch.manual_seed(0)
    module, meter = Causal(model=GPT2LMHeadModel(config)), pet.DriftCallback(batches=None)
    fit(module, method(), meter, max_epochs=1)
    total, count = 0.0, 0
    for ids, mask, _ in loader(7):
        with torch.no_grad():
            ours = module.net.eval()(input_ids=ids).logits.log_softmax(-1)
            with pet.Adapted(module).disabled():
                theirs = module.net(input_ids=ids).logits.log_softmax(-1)
        kept = mask[:, 1:].bool()
        total += (theirs.exp() * (theirs - ours)).sum(-1)[:, :-1][kept].sum().item()
        count += int(kept.sum())
    assert meter.drift == pytest.approx(total / count, abs=1e-12)
    assert total > 0


class Parts(Module):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.net.fc(self.net.table(batch[0]))


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("module", "callbacks", "said"),
    [
        (Module, [pet.DriftCallback()], "nothing in this Module can be switched off"),
        (Parts, [lora(), pet.DriftCallback()], "has not called the adapted Model itself"),
        (Manual, [lora(), pet.DriftCallback(weight=0.1)], "optimizes manually"),
    ],
)
def test_refusals(module: Any, callbacks: list[Any], said: str) -> None:
    with pytest.raises(pet.PETError, match=said):
        fit(module(), *callbacks)


@pytest.mark.parametrize("options", [{"batches": 0}, {"weight": -1.0}, {"max_drift": 0.0}], ids=str)
def test_numbers_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(pet.ArgumentError, match=next(iter(options))):
        pet.DriftCallback(**options)
