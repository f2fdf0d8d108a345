"""T-Few's losses and ranking: formulas, golden properties, and the module in a Trainer."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import nn

from lightning_pet.callbacks.ia3 import IA3Callback
from lightning_pet.data.seq2seq import Seq2SeqData
from lightning_pet.errors import ArgumentError
from lightning_pet.modules import t_few
from lightning_pet.modules.seq2seq import Seq2SeqModule
from tests.modules.test_seq2seq import NEW, QUIET
from tests.modules.tiny import write_csv, write_jsonl

LABELS = torch.tensor([[[1, 2, -100], [3, -100, -100]], [[4, 4, 4], [-100, -100, -100]]])
RIGHT = torch.tensor([0, 0])


def logits(requires_grad: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, 3, 6, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)


def losses(values: torch.Tensor, labels: torch.Tensor = LABELS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    log_probs = t_few.token_log_probs(values, labels)
    scores = t_few.choice_scores(log_probs, labels)
    return (
        t_few.likelihood_loss(log_probs, labels, RIGHT),
        t_few.unlikelihood_loss(log_probs, labels, RIGHT),
        t_few.length_normalised_loss(scores, RIGHT),
    )


def test_formulas() -> None:
    values = logits()
    p = values.float().softmax(-1)
    likelihood, unlikelihood, choice = losses(values)
    mine = torch.stack([p[0, 0, 0, 1], p[0, 0, 1, 2], *(p[1, 0, i, 4] for i in range(3))]).log()
    assert likelihood.item() == pytest.approx(-mine.mean().item(), rel=1e-5)
    assert unlikelihood.item() == pytest.approx(-torch.log(1 - p[0, 1, 0, 3] + 1e-2).item(), rel=1e-5)
    scores = torch.stack([mine[:2].mean(), p[0, 1, 0, 3].log()])
    assert choice.item() == pytest.approx(
        -scores.log_softmax(0)[0].item() / 2, rel=1e-5
    )  # the second row has one choice


def test_one_choice_leaves_only_the_likelihood() -> None:
    values = logits(requires_grad=True)
    labels = LABELS.clone()
    labels[0, 1] = -100
    _, unlikelihood, choice = losses(values, labels)
    assert unlikelihood == 0
    assert choice == 0
    (unlikelihood + choice).backward()
    assert (values.grad == 0).all()


@pytest.mark.parametrize("length", [1, 2, 3])
def test_equal_tokens_have_an_equal_score_at_any_length(length: int) -> None:
    labels = torch.full((1, 1, 3), -100)
    labels[..., :length] = 2
    values = torch.zeros(1, 1, 3, 6)
    log_probs = t_few.token_log_probs(values, labels)
    assert t_few.choice_scores(log_probs, labels).item() == pytest.approx(-torch.tensor(6.0).log().item())
    assert t_few.choice_scores(log_probs, labels, 0.0).item() == pytest.approx(-length * torch.tensor(6.0).log().item())


def test_no_gradient_reaches_padding_and_none_is_undefined() -> None:
    values = logits(requires_grad=True)
    with torch.no_grad():
        values[0, 1, 0, 3] = 80.0  # a wrong token of probability one
    torch.stack(losses(values)).sum().backward()
    assert (values.grad[LABELS == -100] == 0).all()
    assert torch.isfinite(values.grad).all()
    assert (values.grad[LABELS != -100].abs().sum(-1) > 0).all()


# --- in a module ---------------------------------------------------------------------------------

ROWS = [
    {"source": "good", "target": "yes", "choices": ["yes", "no"]},
    {"source": "bad", "target": "no", "choices": ["yes", "no", "perhaps"]},
]


def module(**options: Any) -> Seq2SeqModule:
    torch.manual_seed(0)
    optimizer = partial(torch.optim.AdamW, lr=2e-2)
    return Seq2SeqModule(NEW, tokenizer="bytes", max_new_tokens=4, optimizer=optimizer, **options)


def batch_of(folder: Path, model: Seq2SeqModule) -> dict[str, torch.Tensor]:
    data = Seq2SeqData(
        str(write_jsonl(folder / "train.jsonl", ROWS)), str(folder / "train.jsonl"), similar_lengths=False
    )
    data.encode_splits(model, ["val"])
    return next(iter(data.val_dataloader()))


def test_scores_do_not_depend_on_the_batch_they_are_in(tmp_path: Path) -> None:
    model = module().eval()
    batch = batch_of(tmp_path, model)
    assert batch["choices"].shape == (2, 3, 8)
    assert batch["choice"].tolist() == [0, 1]
    found = t_few.choice_scores(model.choice_log_probs(batch), batch["choices"])
    assert found[0, 2] == -torch.inf
    for row, options in enumerate(ROWS):
        for column, text in enumerate(options["choices"]):
            ids = torch.tensor([model.tokenizer(text)["input_ids"]])
            source = torch.tensor([model.tokenizer(options["source"])["input_ids"]])
            alone = model.model(input_ids=source, labels=ids).loss
            torch.testing.assert_close(found[row, column], -alone)


def test_the_likelihood_part_is_the_plain_loss(tmp_path: Path) -> None:
    plain, ranked = module().eval(), module(unlikely_loss=1.0, choice_loss=1.0).eval()
    logged: dict[str, Any] = {}
    for model in (plain, ranked):
        model.log = lambda *args, **kwargs: None
        model.log_dict = lambda values, **kwargs: logged.update(values)
    batch = batch_of(tmp_path, plain)
    wanted, total = plain.training_step(batch, 0), ranked.training_step(batch, 0)
    torch.testing.assert_close(logged["train/likelihood_loss"], wanted)
    torch.testing.assert_close(sum(logged.values()), total)
    assert logged["train/unlikelihood_loss"] != 0
    assert logged["train/choice_loss"] > 0


def test_every_source_is_encoded_once(tmp_path: Path) -> None:
    model = module().eval()
    batch = batch_of(tmp_path, model)
    rows: list[int] = []
    model.model.get_encoder().register_forward_hook(lambda _host, _args, out: rows.append(len(out[0])))
    found = model.choice_log_probs(batch)
    count = batch["choices"].shape[1]
    assert count > 1
    assert rows == [len(batch["choices"])]
    repeated = model.model(
        input_ids=batch["input_ids"].repeat_interleave(count, 0),
        attention_mask=batch["attention_mask"].repeat_interleave(count, 0),
        labels=batch["choices"].flatten(0, 1),
    ).logits
    expected = t_few.token_log_probs(repeated.unflatten(0, batch["choices"].shape[:2]), batch["choices"])
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("column", [True, False])
def test_fit_ranks_and_predicts(column: bool, tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if column or k != "choices"} for row in ROWS]
    write_jsonl(tmp_path / "train.jsonl", rows * 8)
    write_jsonl(tmp_path / "val.jsonl", rows)
    data = Seq2SeqData(str(tmp_path), batch_size=8, choices=None if column else ["yes", "no", "maybe"])
    model = module(unlikely_loss=1.0, choice_loss=1.0)
    nn.init.normal_(model.model.shared.weight)
    trainer = L.Trainer(max_epochs=12, check_val_every_n_epoch=12, **QUIET)
    trainer.fit(model, data)
    assert trainer.callback_metrics["val/choice_accuracy"] == 1.0
    assert {"train/likelihood_loss", "train/unlikelihood_loss", "train/choice_loss"} <= trainer.callback_metrics.keys()
    assert trainer.predict(model, data) == [["yes", "no"]]


def test_with_ia3(tmp_path: Path) -> None:
    data = Seq2SeqData(str(write_jsonl(tmp_path / "train.jsonl", ROWS * 8)), batch_size=8)
    model = module(unlikely_loss=1.0, choice_loss=1.0)
    trainer = L.Trainer(max_epochs=1, callbacks=[IA3Callback(verbose=False)], **QUIET)
    trainer.fit(model, data)
    moved = [p for n, p in model.named_parameters() if p.requires_grad and not torch.equal(p, torch.ones_like(p))]
    assert len(moved) == sum(p.requires_grad for p in model.parameters()) == 3 + 5


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"unlikely_loss": -1.0},
        {"choice_loss": -0.1},
        {"length_norm": -1.0},
        {"choice_loss": 1.0, "label_smoothing": 0.1},
    ],
)
def test_arguments_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match="loss"):
        module(**options)


def test_the_losses_need_choices(tmp_path: Path) -> None:
    rows = [{"source": "good", "target": "yes"}] * 4
    data = Seq2SeqData(str(write_jsonl(tmp_path / "train.jsonl", rows)))
    with pytest.raises(ArgumentError, match="a column 'choices'"):
        L.Trainer(max_epochs=1, num_sanity_val_steps=0, **QUIET).fit(module(choice_loss=1.0), data)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("yes", "at least two"),
        ('["yes"]', "at least two"),
        ('["yes", "yes"]', "distinct"),
        ('["no", "oh"]', "none of its choices"),
    ],
)
def test_bad_choices_in_a_file(value: str, text: str, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", ["source", "target", "choices"], [["good", "yes", value]] * 2)
    with pytest.raises(ArgumentError, match=text):
        Seq2SeqData(str(path)).encode_splits(module(), ["train"])
    good = write_csv(tmp_path / "g.csv", ["source", "target", "options"], [["good", "yes", '["no", "yes"]']] * 2)
    data = Seq2SeqData(str(good), columns={"choices": "options"})
    data.encode_splits(module(), ["train"])
    assert data._examples["train"][0]["choice"] == 1
    with pytest.raises(ArgumentError, match="distinct answers"):
        Seq2SeqData(str(good), choices=["a", "a"])
