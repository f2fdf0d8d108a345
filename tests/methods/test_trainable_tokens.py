"""Trained tokens: the battery, the golden numbers, tied tables, resized vocabularies, and their own errors."""

import copy
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_pet import (
    Adapted,
    ArgumentError,
    BaseMismatchError,
    DeltaFileError,
    LoRACallback,
    TargetError,
    TrainableTokensCallback,
    apply,
    load_delta,
    save_delta,
)
from lightning_pet.layers.token_rows import TiedRows, TokenRows

from .battery import Battery, Case, perturb

NO_VALUES: dict[str, Any] = {"needs_values": True, "merge_tolerance": 1e-13}


class TestTrainableTokens(Battery):
    cases: ClassVar[list[Case]] = [
        Case("embedding", TrainableTokensCallback, {"token_indices": {"table": [1, 4]}}, parameters=12, **NO_VALUES),
        Case(
            "gpt2",  # its output layer shares the table
            TrainableTokensCallback,
            {"added_from": 45},
            exact_identity=False,
            identity_tolerance=1e-6,
            **NO_VALUES,
        ),
    ]


# --- the formula ----------------------------------------------------------------------------------


def test_golden_numbers() -> None:
    table = nn.Embedding(5, 4, dtype=torch.float64)
    table.weight.data = torch.arange(20, dtype=torch.float64).reshape(5, 4) / 10
    rows = TokenRows([3, 1], 4, dtype=torch.float64)
    rows.initialize_from(table.weight)
    ids = torch.tensor([3, 0, 1])
    assert torch.equal(rows(table, ids), table(ids))
    with torch.no_grad():
        rows.rows.copy_(torch.tensor([[-0.2, 0.5, 0.1, -0.3], [0.4, 0, -0.4, 0.3]]))
    wanted = torch.tensor([[0.4, 0, -0.4, 0.3], [0, 0.1, 0.2, 0.3], [-0.2, 0.5, 0.1, -0.3]], dtype=torch.float64)
    torch.testing.assert_close(rows(table, ids), wanted, rtol=0, atol=1e-7)
    head = nn.Linear(4, 5, bias=False)
    head.weight = table.weight
    scores = TiedRows(rows, "head")(head, torch.tensor([1, 2, -1, 0.5], dtype=torch.float64))
    wanted = torch.tensor([0.15, 0.55, 2.15, 0.95, 4.15], dtype=torch.float64)
    torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-7)


class Words(nn.Module):
    """A language model of the smallest kind; with a bias, a factor, and a weight of its own where asked."""

    def __init__(self, tied: bool = True, table: nn.Module | None = None, read: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = table or nn.Embedding(9, 4, padding_idx=0)
        self.out = nn.Linear(4, 9)
        if tied:
            self.out.weight = self.table.weight  # type: ignore[assignment]
        self.read = read

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids).cumsum(1)
        scores: Tensor = x @ self.table.weight.t() if self.read else self.out(x)  # type: ignore[operator]
        return scores


class Scaled(nn.Embedding):
    def __init__(self, as_tensor: bool) -> None:
        super().__init__(9, 4)
        self.as_tensor = as_tensor
        if as_tensor:
            self.register_buffer("embed_scale", torch.tensor(1.7), persistent=False)
        else:
            self.embed_scale = 1.7

    def forward(self, input: Tensor) -> Tensor:
        factor = self.embed_scale.to(self.weight.dtype) if self.as_tensor else self.embed_scale  # type: ignore[union-attr]
        return super().forward(input) * factor


class Odd(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).tanh()


IDS = torch.tensor([[1, 7, 8, 3], [8, 8, 2, 5]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "build",
    [
        Words,
        lambda: Words(tied=False),
        lambda: Words(table=Scaled(True)),
        lambda: Words(table=Scaled(False)),
        lambda: Words(table=Odd(9, 4)),
        lambda: Words(read=True),
    ],
    ids=["tied", "untied", "factor", "number", "odd", "read"],
)
def test_attached_is_merged_is_the_table_with_its_rows(build: Any, dtype: torch.dtype) -> None:
    model = build().to(dtype)
    by_hand = copy.deepcopy(model)
    adapted = apply(model, TrainableTokensCallback({"table": [8, 1]}, modules_to_save=[]), forward=lambda: model(IDS))
    perturb(adapted)
    rows = next(delta for delta in model.modules() if isinstance(delta, TokenRows)).rows
    with torch.no_grad():
        by_hand.table.weight[[1, 8]] = rows.to(dtype)
    tolerance = {"rtol": 0, "atol": 1e-14 if dtype == torch.float64 else 0.05}
    torch.testing.assert_close(model(IDS), by_hand(IDS), **tolerance)
    assert torch.equal(model.table(IDS), by_hand.table(IDS))
    adapted.merge_()
    assert torch.equal(model.table.weight, by_hand.table.weight)
    assert torch.equal(model(IDS), by_hand(IDS))


def test_gradients_are_those_of_the_rows_of_the_table() -> None:
    model, whole = Words().double(), Words().double()
    apply(model, TrainableTokensCallback({"table": [0, 1, 8]}, modules_to_save=[]))
    ids = torch.cat([IDS, torch.zeros_like(IDS)])
    for net in (model, whole):
        net(ids).square().sum().backward()
    rows = next(delta for delta in model.modules() if isinstance(delta, TokenRows)).rows
    torch.testing.assert_close(rows.grad, whole.table.weight.grad[[0, 1, 8]], rtol=0, atol=1e-12)


class Small(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Words()

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.5)


def test_rows_do_not_decay_beside_lora() -> None:
    module = Small()
    tokens = TrainableTokensCallback({"table": [4, 8]}, modules_to_save=[], verbose=False)
    lora = LoRACallback(r=2, target_modules="out", modules_to_save=[], verbose=False)
    before = module.net.table.weight.detach().clone()
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=1, callbacks=[lora, tokens], enable_model_summary=False, **options)
    trainer.fit(module, DataLoader(IDS % 4, batch_size=1))
    assert torch.equal(module.net.table.weight, before)
    groups = {id(p): group["weight_decay"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
    names = dict(module.named_parameters())
    decays = {name: groups[id(names[f"net.{name}"])] for name in Adapted(module).record.trainable_names}
    assert {name: decay == 0 for name, decay in decays.items()} == {name: "tokens" in name for name in decays}


# --- resized vocabularies -------------------------------------------------------------------------

OLD, NEW = 20, 23


def grown(seed: int, tied: bool = True, size: int = NEW) -> nn.Module:
    """The same base each time, with other random rows behind its end."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=OLD, tie_word_embeddings=tied, **sizes)).eval()
    torch.manual_seed(seed)
    if size != OLD:
        model.resize_token_embeddings(size, mean_resizing=False)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_may_be_any_where_all_of_them_train(tied: bool, tmp_path: Path) -> None:
    file, ids = tmp_path / "x.pet.safetensors", torch.tensor([[1, 21, 22, 5]])
    model, other = grown(1, tied), grown(2, tied)
    assert not torch.equal(model.get_input_embeddings().weight, other.get_input_embeddings().weight)
    adapted = apply(model, TrainableTokensCallback(added_from=OLD))
    assert adapted.plan().trainable == 3 * 8 * (1 if tied else 2)
    perturb(adapted)
    save_delta(model, file)
    load_delta(other, file)
    torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    another = grown(3, tied)
    with torch.no_grad():
        another.get_input_embeddings().weight[2] += 1
    with pytest.raises(BaseMismatchError, match=r"embed_tokens.weight"):
        load_delta(another, file)
    with pytest.raises(DeltaFileError, match=rf"has {OLD} rows.*resize_token_embeddings"):
        load_delta(grown(0, tied, size=OLD), file)


def test_new_rows_that_do_not_train_are_a_part_of_the_base(tmp_path: Path) -> None:
    model = grown(1)
    perturb(apply(model, TrainableTokensCallback([OLD, 3])))
    save_delta(model, tmp_path / "x.pet.safetensors")
    load_delta(grown(1), tmp_path / "x.pet.safetensors")
    with pytest.raises(BaseMismatchError, match=r"embed_tokens.weight"):
        load_delta(grown(2), tmp_path / "x.pet.safetensors")


# --- bad input ------------------------------------------------------------------------------------


def test_deltas_with_the_same_rows_do_not_act_together(tmp_path: Path) -> None:
    model = Words()
    options: dict[str, Any] = {"modules_to_save": []}
    both = [TrainableTokensCallback({"table": own}, name=f"n{own[0]}", **options) for own in ([1, 2], [3, 2])]
    with pytest.raises(TargetError, match=r"row 2 of table.weight"):
        apply(model, both)
    adapted = apply(model, [TrainableTokensCallback({"table": own}, **options) for own in ([1, 2],)])
    save_delta(model, tmp_path / "x.pet.safetensors")
    load_delta(model, tmp_path / "x.pet.safetensors", name="second")
    with pytest.raises(TargetError, match=r"row 1 of table.weight"):
        adapted.activate("default", "second")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"token_indices": [1], "added_from": 3}, "give one of the two"),
        ({"token_indices": []}, "at least one row"),
        ({"token_indices": [-1]}, "from 0 on"),
        ({"token_indices": [1, 2, 1]}, "has 1 twice"),
        ({"token_indices": {}}, "names no table"),
        ({"token_indices": {"table": [2, 2]}}, r"token_indices\['table'\] has 2 twice"),
        ({"added_from": 0}, "before the resize"),
        ({"token_indices": list(range(20_001))}, "added_from"),
    ],
)
def test_bad_options(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ArgumentError, match=error):
        TrainableTokensCallback(**options)


def test_bad_places() -> None:
    with pytest.raises(ArgumentError, match=r"give token_indices, for example"):
        apply(Words(), TrainableTokensCallback())
    with pytest.raises(TargetError, match=r"has 9, and table.weight has 9 rows"):
        apply(Words(), TrainableTokensCallback({"table": [9]}))
    with pytest.raises(TargetError, match=r"none was added"):
        apply(grown(0, size=OLD), TrainableTokensCallback(added_from=OLD))
    with pytest.raises(TargetError, match=r"padding_idx"):
        apply(Words(tied=False), TrainableTokensCallback({"table": [0, 1]}))
    with pytest.raises(TargetError, match=r"both have the same rows"):
        apply(Words(), TrainableTokensCallback({"table": [1], "out": [2]}))
    with pytest.raises(TargetError, match=r"max_norm"):
        apply(Words(table=nn.Embedding(9, 4, max_norm=1.0)), TrainableTokensCallback({"table": [1]}))
    with pytest.raises(TargetError, match=r"Did you mean|table"):
        apply(Words(), TrainableTokensCallback({"tabel": [1]}))
