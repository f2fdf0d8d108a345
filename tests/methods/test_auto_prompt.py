"""AutoPrompt: the battery where it applies, golden properties of the search, and runs of a Trainer."""

from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_pet import (
    Adapted,
    ArgumentError,
    AutoPromptCallback,
    LoRACallback,
    PromptTuningCallback,
    TargetError,
    apply,
    inspect_delta,
    load_delta,
    save_delta,
)
from lightning_pet.layers.prompt import TriggerRows, best_tokens, first_order_scores

from . import zoo
from .battery import Battery, Case, frozen_output, perturb

FREE = {"method": AutoPromptCallback, "exact_identity": False, "identity_tolerance": None, "mergeable": False}


class TestAutoPrompt(Battery):
    cases: ClassVar[list[Case]] = [
        Case("gpt2", parameters=0, **FREE),
        Case("embedding", options={"modules_to_save": []}, parameters=0, **FREE),
    ]

    def test_only_the_plan_trains_and_moves(self, case: Case, built: Any) -> None:
        model, run = built
        adapted = case.adapt(model, run)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert adapted.plan().trainable == 0
        assert set(adapted.state_dict()) == set(adapted.record.delta_names)
        assert [tuple(tensor.shape) for tensor in adapted.state_dict().values()] == [(3,)]


def rows_of(model: nn.Module) -> TriggerRows:
    return next(module for module in model.modules() if isinstance(module, TriggerRows))


# --- golden properties ---------------------------------------------------------------------------


def test_a_trigger_is_those_tokens_before_the_input() -> None:
    model, _ = zoo.llama()
    handle = apply(model, [AutoPromptCallback(length=2)])
    rows_of(model).ids.copy_(torch.tensor([7, 30]))
    ids = torch.tensor([[5, 6, 8]])
    ours = frozen_output(model, lambda m: m(ids).logits)
    with handle.disabled():
        reference = model(torch.tensor([[7, 30, 5, 6, 8]])).logits[:, 2:]
    assert (ours - reference).abs().max() < 1e-6


def test_the_score_is_the_directional_derivative() -> None:
    model, _ = zoo.gpt2()
    model.double()
    apply(model, [AutoPromptCallback(length=2)])
    rows, table = rows_of(model), model.transformer.wte.weight.detach()
    rows.watching = True
    ids = torch.tensor([[5, 6, 8, 9], [10, 11, 12, 13]])

    def loss() -> Tensor:  # the model's own computes in float32
        return nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    loss().backward()
    scores = first_order_scores(table, rows.take_gradient()[1])
    for token in (3, 17, 40):
        step, losses = 1e-4, []
        for sign in (1, -1):
            vectors = table[rows.ids].clone()
            vectors[1] += sign * step * table[token]
            with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(TriggerRows, "rows", lambda self, call, v=vectors: v)
                losses.append(loss())
        assert abs(-(losses[0] - losses[1]) / (2 * step) - scores[token]) < 1e-7


def test_best_tokens_leaves_out_what_is_excluded() -> None:
    scores = torch.tensor([5.0, 1.0, 4.0, 3.0])
    assert best_tokens(scores, 2, [0]) == [2, 3]
    assert best_tokens(scores, 9, [0]) == [2, 3, 1]


# --- runs of a Trainer ---------------------------------------------------------------------------


class LanguageModel(L.LightningModule):
    """A model that knows nothing of triggers; remembers its losses."""

    def __init__(self, kind: str = "gpt2", learns: bool = False) -> None:
        super().__init__()
        self.model = getattr(zoo, kind)()[0]
        self.learns = learns
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        extra = {"decoder_input_ids": batch} if self.model.config.is_encoder_decoder else {}
        logits = self.model(input_ids=batch, **extra).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        self.log("loss", loss)
        self.losses.append(float(loss))
        return loss

    def configure_optimizers(self) -> Any:
        # Raises on an empty list, as users' modules do.
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1)


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 50, (2, 6), generator=generator) for _ in range(count)]


def loader(count: int = 4) -> DataLoader[Any]:
    return DataLoader(batches(count), batch_size=None)


def fit(
    module: L.LightningModule, callbacks: list[Any], folder: Path, ckpt_path: Any = None, **options: Any
) -> L.Trainer:
    defaults = {"max_epochs": 4, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", default_root_dir=folder, callbacks=callbacks, **{**defaults, **options})
    trainer.fit(module, loader(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def loss_of(module: LanguageModel, data: list[Tensor]) -> float:
    with torch.no_grad():
        return sum(float(module.training_step(batch, 0)) for batch in data) / len(data)


@pytest.fixture(autouse=True)
def quiet_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LanguageModel, "log", lambda *args, **kwargs: None)


@pytest.mark.parametrize("kind", ["gpt2", "t5", "llama"])
def test_the_search_lowers_the_loss_and_nothing_else_changes(kind: str, tmp_path: Path) -> None:
    module = LanguageModel(kind)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    callback = AutoPromptCallback(length=2, candidates=5, accumulation=2, verbose=False)
    apply(module, [callback])
    start = loss_of(module, batches())
    fit(module, [callback, ModelCheckpoint(tmp_path, save_last=True)], tmp_path)
    assert loss_of(module, batches()) < start
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert [tuple(tensor.shape) for tensor in stored.values() if tensor.numel()] == [(2,)]


def test_an_accepted_trigger_never_worsens_the_batches_it_was_scored_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_pet.callbacks import auto_prompt

    decisions, decide = [], auto_prompt._Search.decide

    def spy(search: Any) -> Any:
        losses, triggers = search.losses.clone(), list(search.triggers())
        chosen, loss = decide(search)
        decisions.append((losses[triggers.index(chosen)] - losses[0], chosen, loss))
        return chosen, loss

    monkeypatch.setattr(auto_prompt._Search, "decide", spy)
    module = LanguageModel()
    fit(module, [AutoPromptCallback(length=2, candidates=4, accumulation=1, verbose=False)], tmp_path)
    assert len(decisions) == 8
    assert all(difference <= 0 for difference, _, _ in decisions)
    assert decisions[-1][1] == rows_of(module).ids.tolist()


def test_all_candidates_are_an_exhaustive_search_of_the_position(tmp_path: Path) -> None:
    module = LanguageModel()
    callback = AutoPromptCallback(length=2, candidates=50, accumulation=1, exclude=[], verbose=False)
    handle = apply(module, [callback])
    rows = rows_of(module)
    start = rows.ids.tolist()
    fit(module, [callback], tmp_path, max_steps=2)
    found = rows.ids.tolist()
    (position,) = [index for index in range(2) if found[index] != start[index]]
    losses = []
    for token in range(50):
        rows.ids.copy_(torch.tensor([*start[:position], token, *start[position + 1 :]]))
        losses.append(loss_of(module, batches()[1:2]))  # the batch after that of the gradient
    assert found[position] == min(range(50), key=losses.__getitem__)
    assert isinstance(handle, Adapted)


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_resuming_is_exact(stop: int, tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [AutoPromptCallback(length=2, candidates=4, accumulation=2, verbose=False)]

    whole, second = LanguageModel(), LanguageModel()
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(whole, [*callbacks(), keep], tmp_path)
    fit(second, callbacks(), tmp_path / "second", ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert torch.equal(rows_of(second).ids, rows_of(whole).ids)
    assert second.losses == whole.losses[len(whole.losses) - len(second.losses) :]
    assert len(second.losses) < len(whole.losses)


def test_gradients_are_those_of_evaluation_mode(tmp_path: Path) -> None:
    """As the losses by which candidates are compared; what else runs, runs as the user says."""

    class Looking(LanguageModel):
        modes: ClassVar[list[tuple[bool, bool]]] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.modes.append((torch.is_grad_enabled(), self.training))
            if len(self.modes) == 12:
                raise RuntimeError("in the middle of a step")
            return super().training_step(batch, batch_idx)

    module = Looking().train()
    with pytest.raises(RuntimeError, match="in the middle"):
        fit(module, [AutoPromptCallback(length=2, candidates=1, accumulation=2, verbose=False)], tmp_path)
    assert module.training
    window = [(True, False)] * 2 + [(True, True), (False, False), (False, False)] * 2
    assert Looking.modes == (window * 2)[:12]


def test_gradient_accumulation_clipping_and_mixed_precision(tmp_path: Path) -> None:
    module = LanguageModel()
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "precision": "bf16-mixed"}
    fit(module, [AutoPromptCallback(length=2, candidates=4, accumulation=2, verbose=False)], tmp_path, **options)
    assert rows_of(module).ids.dtype == torch.int64


def test_with_others_that_train(tmp_path: Path) -> None:
    module = LanguageModel()
    search = AutoPromptCallback(length=2, candidates=4, accumulation=1, verbose=False)
    prompt = PromptTuningCallback(length=2, verbose=False)
    trainer = fit(module, [search, prompt, LoRACallback(r=2, verbose=False)], tmp_path)
    assert len(trainer.optimizers[0].param_groups[0]["params"]) == 1 + 8
    out = module.model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape[1] <= 5


def test_the_trigger_is_shown_as_text_and_stored_as_ids(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch"), caplog.at_level("INFO"):
        module = LanguageModel()
        callback = AutoPromptCallback(length=3, candidates=4, init_text="It", tokenizer="bytes", accumulation=1)
        module.model.resize_token_embeddings(259)
        handle = apply(module, [callback])
        assert rows_of(module).ids.tolist() == [ord("I") + 3, ord("t") + 3, ord("I") + 3]
        fit(module, [callback], tmp_path, max_steps=2)
    assert "trigger default: '" in caplog.text
    found = rows_of(module).ids.clone()
    save_delta(module, tmp_path / "delta.pet.safetensors")
    assert inspect_delta(tmp_path / "delta.pet.safetensors").methods[0].method == "auto_prompt"
    fresh = LanguageModel()
    fresh.model.resize_token_embeddings(259)
    fresh.model.load_state_dict({k: v for k, v in module.model.state_dict().items() if ".pet." not in f".{k}"})
    load_delta(fresh, tmp_path / "delta.pet.safetensors")
    assert torch.equal(rows_of(fresh).ids, found)
    assert handle.plan().trainable == 0


def test_generation_starts_behind_the_trigger() -> None:
    model, _ = zoo.llama()
    handle = apply(model, [AutoPromptCallback(length=2)])
    ids = torch.tensor([[5, 6, 8]])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    ours = model.generate(ids, **options)
    with handle.disabled():
        reference = model.generate(torch.cat([rows_of(model).ids[None], ids], 1), **options)
    assert torch.equal(ours, reference[:, 2:])


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length=0"),
        ({"candidates": 0}, "candidates=0"),
        ({"accumulation": 0}, "accumulation=0"),
        ({"where": "both"}, "one trigger"),
        ({"init_text": "good"}, "needs a tokenizer"),
        ({"budget": 0.1}, "no width"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        AutoPromptCallback(**options)


def test_a_model_or_tokenizer_that_does_not_fit() -> None:
    with pytest.raises(TargetError, match="takes no token ids"):
        apply(zoo.vit()[0], [AutoPromptCallback()])
    with pytest.raises(ArgumentError, match="makes id"):
        apply(zoo.gpt2()[0], [AutoPromptCallback(init_text="zz", tokenizer="bytes")])


def test_perturbing_finds_nothing_to_move() -> None:
    model, run = zoo.gpt2()
    handle = apply(model, [AutoPromptCallback()])
    before = frozen_output(model, run)
    perturb(handle)
    assert torch.equal(frozen_output(model, run), before)
