"""ReFT: the battery, golden numbers, which positions are edited, equality with adapters, and its own errors."""

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightning_pet import ArgumentError, ReFTCallback, TargetError, apply, load_delta, save_delta
from lightning_pet.layers.reft import Edit, Unit, first_and_last

from . import zoo
from .battery import LIKE_SMALLER, Battery, Case, perturb


def case(model: str, not_compiled: str = "", parameters: int | None = None, **options: Any) -> Case:
    return Case(
        model,
        method=ReFTCallback,
        options={"dropout": 0.0, **options},
        exact_identity=False,
        identity_tolerance=None,
        mergeable=False,
        parameters=parameters,
        not_compiled=not_compiled,
    )


class TestReFT(Battery):
    cases: ClassVar[list[Case]] = [
        case("bert", r=2, suffix_positions=2, parameters=2 * 2 * (2 * 2 * 16 + 2)),
        case("llama", LIKE_SMALLER, form="noreft", suffix_positions=1, tied_weights=True),
        case("t5", LIKE_SMALLER, form="direft", non_linearity="relu"),
        case("transformer_encoder", LIKE_SMALLER, r=3),
    ]


# --- golden properties ---------------------------------------------------------------------------


H = torch.tensor([1, 2, -1, 0.5], dtype=torch.float64)


def unit(form: str) -> Unit:
    made = Unit(4, 2, form, "linear", 0.0, dtype=torch.float64)
    with torch.no_grad():
        made.projection.copy_(torch.tensor([[0.6, 0.8, 0, 0], [0, 0, 1, 0]]))
        made.weight.copy_(torch.tensor([[-0.2, 0.5, 0.1, -0.3], [0.4, 0, -0.4, 0.3]], dtype=torch.float64))
        made.bias.copy_(torch.tensor([0.1, -0.2], dtype=torch.float64))
        if form != "loreft":
            made.projection.copy_(torch.tensor([[0.6, 0.8, 0, 0], [0, 0, 1, 0]], dtype=torch.float64))
    return made


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("loreft", [0.07, 0.76, 0.75, 0.5]),
        ("noreft", [0.07, 0.76, 0.75, 0.5]),
        ("direft", [1.39, 2.52, -0.25, 0.5]),
    ],
)
def test_golden_numbers(form: str, expected: list[float]) -> None:
    assert unit(form)(H).tolist() == pytest.approx(expected, abs=1e-7)


def test_what_loreft_edits_is_what_h_is_in_the_span_of_its_rows() -> None:
    torch.manual_seed(0)
    made = Unit(8, 3, "loreft", "relu", 0.0, dtype=torch.float64)
    nn.init.normal_(made.projection)  # far from orthonormal, as no step would leave it
    h, r = torch.randn(5, 8, dtype=torch.float64), made.rotation()
    after = made(h)
    torch.testing.assert_close(r @ r.mT, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(after @ r.mT, (h @ made.weight.mT + made.bias).relu(), rtol=0, atol=1e-14)
    torch.testing.assert_close((after - h) @ (torch.eye(8) - r.mT @ r), torch.zeros(5, 8).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(made.rotation(), _orthonormalised(made.projection), rtol=0, atol=1e-13)


def _orthonormalised(raw: Tensor) -> Tensor:
    rows: list[Tensor] = []
    for row in raw:
        for other in rows:
            row = row - (row @ other) * other
        rows.append(row / row.norm())
    return torch.stack(rows)


# --- positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "first", "last", "expected"),
    [
        ("11111", 2, 1, {0, 1, 4}),
        ("00111", 2, 0, {2, 3}),
        ("11100", 0, 2, {1, 2}),
        ("01010", 1, 1, {1, 3}),
        ("00010", 3, 0, {3}),
        ("00010", 3, 3, {3}),
        ("00000", 3, 3, set()),
        ("111", 9, 9, {0, 1, 2}),
    ],
)
def test_first_and_last(mask: str, first: int, last: int, expected: set[int]) -> None:
    real = torch.tensor([[letter == "1" for letter in mask]])
    places = first_and_last(real, first, last)
    found = places.where[places.edited].tolist()
    assert set(found) == expected
    assert len(found) == len(expected)  # no position twice


def edited(model: nn.Module, call: Callable[[], Any]) -> list[set[tuple[int, int]]]:
    """Where each layer's edit has changed what it got, as (row, position)."""
    found: list[set[tuple[int, int]]] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        found.append({(int(r), int(c)) for r, c in (args[1] != output).any(-1).nonzero()})

    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, Edit)]
    with torch.no_grad():
        call()
    for hook in hooks:
        hook.remove()
    return found


def test_padding_on_either_side_does_not_count() -> None:
    model, run = zoo.llama()
    apply(model, [ReFTCallback(prefix_positions=2, suffix_positions=1)], forward=lambda: run(model))
    ids = torch.arange(5).repeat(3, 1) + 3
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0]])
    expected = {(0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (1, 3), (2, 0)}
    found = edited(model, lambda: model(input_ids=ids, attention_mask=mask))
    assert found == [expected] * len(found) != []
    padded = model(input_ids=ids[:1], attention_mask=mask[:1]).logits[0, 2:]
    positions = torch.arange(3)[None]
    alone = model(input_ids=ids[:1, 2:], position_ids=positions).logits[0]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cached", [True, False])
def test_generation_edits_the_prompt_alone(cached: bool) -> None:
    model, run = zoo.llama()
    perturb(apply(model, [ReFTCallback(prefix_positions=1, suffix_positions=1)], forward=lambda: run(model)))
    ids = torch.tensor([[0, 5, 6], [7, 8, 9]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    made: list[Tensor] = []

    def generate() -> None:
        made.append(
            model.generate(
                ids, attention_mask=mask, max_new_tokens=3, do_sample=False, use_cache=cached, pad_token_id=0
            )
        )

    found = edited(model, generate)
    prompt = {(0, 1), (0, 2), (1, 0), (1, 2)}
    calls = [found[i : i + 2] for i in range(0, len(found), 2)]
    assert calls[0] == [prompt] * 2
    assert calls[1:] == [[set() if cached else prompt] * 2] * 2
    after = edited(model, lambda: model(input_ids=ids, attention_mask=mask))
    assert after == [prompt] * 2


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_with_and_without_a_cache_agrees(beams: int) -> None:
    model, run = zoo.llama()
    perturb(apply(model, [ReFTCallback(suffix_positions=1)], forward=lambda: run(model)))
    ids = torch.tensor([[0, 5, 6], [7, 8, 9]])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    options["attention_mask"] = (ids != 0).long()
    outputs = [model.generate(ids, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*outputs)


def test_an_encoder_and_its_decoder_have_positions_of_their_own() -> None:
    model, run = zoo.t5()
    apply(model, [ReFTCallback(prefix_positions=1)], forward=lambda: run(model))
    ids = torch.arange(4).repeat(2, 1) + 3
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    found = edited(model, lambda: model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :2]))
    assert found == [{(0, 1), (1, 0)}] * 2 + [{(0, 0), (1, 0)}] * 2


def test_checkpointing_of_layers_repeats_with_the_same_positions() -> None:
    model, run = zoo.llama()
    apply(model, [ReFTCallback(suffix_positions=1, dropout=0.0)], forward=lambda: run(model))
    ids = torch.arange(5).repeat(2, 1) + 3
    masks = [torch.tensor([[0, 0, 1, 1, 1], [1] * 5]), torch.ones(2, 5, dtype=torch.long)]

    def gradients() -> list[Tensor]:
        model.zero_grad()
        losses = [model(input_ids=ids, attention_mask=mask).logits.square().mean() for mask in masks]
        sum(losses).backward()  # both are repeated after both forwards
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model.train()
    expected = gradients()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        torch.testing.assert_close(gradients(), expected)


def test_rows_of_one_batch_use_different_edits(tmp_path: Any) -> None:
    model, run = zoo.bert()
    base = copy.deepcopy(model)
    for name, options in (("a", {"form": "noreft"}), ("b", {"prefix_positions": 1, "suffix_positions": 2})):
        alone = copy.deepcopy(base)
        perturb(apply(alone, [ReFTCallback(modules_to_save=[], **options)], forward=lambda alone=alone: run(alone)))
        save_delta(alone, tmp_path / name)
    adapted = load_delta(model, tmp_path / "a", name="a")
    load_delta(model, tmp_path / "b", name="b")
    ids = torch.arange(6).repeat(4, 1) + 3
    mask = torch.ones_like(ids)
    mask[1:3, 4:] = 0
    call: dict[str, Tensor] = {"input_ids": ids, "attention_mask": mask}
    expected = []
    with torch.no_grad():
        for row, name in enumerate(["a", "b", None, "b"]):
            with adapted.using(*filter(None, [name])):
                expected.append(model(**{key: value[row : row + 1] for key, value in call.items()}).logits)
        with adapted.rows(["a", "b", None, "b"]):
            found = model(**call).logits
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-6)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0: the rank must be"),
        ({"form": "reft"}, "form='reft': use one of 'loreft', 'noreft', 'direft'"),
        ({"prefix_positions": -1}, "prefix_positions=-1"),
        ({"prefix_positions": 0}, "edit at least one position"),
        ({"non_linearity": "softplus"}, "non_linearity='softplus'"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ReFTCallback(**options)


def test_places_that_it_cannot_count_in_are_refused() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24)
    turned = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    with pytest.raises(TargetError, match="batch_first=True"):
        apply(turned, [ReFTCallback()], forward=lambda: turned(torch.randn(5, 3, 16)))
    model, run = zoo.bert()
    with pytest.raises(TargetError, match="at most 16"):
        apply(model, [ReFTCallback(r=17)], forward=lambda: run(model))
