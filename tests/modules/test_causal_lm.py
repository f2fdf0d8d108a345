"""Causal language models: losses of trained tokens, their mean over a step, packing, evaluation, and every method."""

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_pet as pet
from lightning_pet.data.chat.data import ChatData
from lightning_pet.errors import ArgumentError
from lightning_pet.modules import token_loss as token_loss_file
from lightning_pet.modules.causal_lm import CausalLMModule
from lightning_pet.modules.date_chat import character_tokenizer
from lightning_pet.modules.token_loss import token_loss
from tests.launch import launch

SMALL = {
    "vocab_size": 101,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 5,
    "pad_token_id": 0,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL},
    "tied": {"model_type": "llama", **SMALL, "tie_word_embeddings": True},
    "soft cap": {"model_type": "gemma2", **SMALL, "head_dim": 8, "final_logit_softcapping": 0.5, "sliding_window": 8},
    "scaled": {"model_type": "cohere", **SMALL, "logit_scale": 0.3},
    "gpt2": {"model_type": "gpt2", "vocab_size": 101, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128},
}


def network(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**KINDS[kind])).double().eval()


def batch(rows: int = 3, tokens: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(101, (rows, tokens), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.6, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


# --- the loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", ["whole", "chunked", "chunked, frozen"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_whole_logits(
    kind: str, chunked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = network(kind), batch()
    pet.apply(model, [pet.LoRACallback(r=2, target_modules=["attention.q", "ffn.up"])])
    for parameter in model.parameters():
        parameter.requires_grad_()
        if parameter.shape[0] == 2:
            nn.init.normal_(parameter)
    head = model.get_output_embeddings()
    head.weight.requires_grad_(chunked != "chunked, frozen")
    monkeypatch.setattr(token_loss_file, "CHUNK_LOGITS", 101 * 4)
    found = token_loss(model, given, max_logits=1 << 28 if chunked == "whole" else 1)
    logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    counted = given["labels"][:, 1:] != -100
    # as transformers and here: the cross-entropy itself is taken in float32
    expected = F.cross_entropy(logits[:, :-1][counted].float(), given["labels"][:, 1:][counted], reduction="sum")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wanted, got = (torch.autograd.grad(loss, trained, allow_unused=True) for loss in (expected, found.total))
    assert found.tokens == int(counted.sum())
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(wanted, got, strict=True):
        assert (a is None) is (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-5, rtol=1e-5)


def test_a_delta_on_the_output_layer_counts() -> None:
    model, given = network("llama"), batch()
    pet.apply(model, [pet.LoRACallback(r=2, target_modules=["lm_head"])])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        nn.init.normal_(parameter)
    assert token_loss(model, given).mean.item() == pytest.approx(model(**given).loss.item(), rel=1e-6)
    token_loss(model, given, max_logits=1).total.backward()
    whole = [parameter.grad.clone() for parameter in trained]
    for parameter in trained:
        parameter.grad = None
    token_loss(model, given).total.backward()
    for a, b in zip(whole, trained, strict=True):
        assert torch.allclose(a, b.grad, atol=1e-6)


def test_a_head_that_does_something_unknown_to_large_logits_is_refused() -> None:
    model, given = network("llama"), batch()
    model.lm_head.register_forward_hook(lambda module, args, out: out)
    original = model.forward

    def forward(**inputs: Any) -> Any:
        out = original(**inputs)
        out.logits = out.logits.sin()
        return out

    model.forward = forward
    with pytest.raises(ValueError, match="unknown way"):
        token_loss(model, given, max_logits=1)
    assert math.isfinite(token_loss(model, given).mean.item())


def test_the_output_layer_sees_trained_positions_only() -> None:
    model, given = network("llama"), batch()
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.numel() // 101))
    found = token_loss(model, given)
    assert seen == [found.tokens]
    assert found.tokens < given["labels"].numel() / 2


def test_a_batch_without_trained_tokens_has_a_loss_of_zero() -> None:
    model, given = network("llama"), batch()
    given["labels"].fill_(-100)
    found = token_loss(model, given)
    assert (found.tokens, found.mean.item()) == (0, 0.0)
    found.mean.backward()


@pytest.mark.parametrize(
    "method", [pet.PromptTuningCallback(length=3), pet.PrefixTuningCallback(length=3, projection=False)]
)
def test_virtual_tokens_change_no_label(method: Any) -> None:
    model, given = network("llama").float(), batch()
    pet.apply(model, [method], forward=lambda: model(**given))
    assert token_loss(model, given).mean.item() == pytest.approx(model(**given).loss.item(), rel=1e-5)


# --- packing ---------------------------------------------------------------------------------------


class Random(CausalLMModule):
    """With the tokenizer of characters, and a small model of random weights."""

    def __init__(self, kind: str = "llama", **options: Any) -> None:
        torch.manual_seed(0)
        super().__init__(model=KINDS.get(kind, {"model_type": kind}), tokenizer="bytes", **options)
        self.tokenizer = character_tokenizer()


OTHERS: dict[str, dict[str, Any]] = {
    "opt": {"model_type": "opt", "vocab_size": 101, "hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 16,
            "num_attention_heads": 2, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "bloom": {"model_type": "bloom", "vocab_size": 101, "hidden_size": 16, "n_layer": 1, "n_head": 2},
    "mamba": {"model_type": "mamba", "vocab_size": 101, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
}  # fmt: skip


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_only_models_that_keep_examples_apart_are_packed(kind: str) -> None:
    torch.manual_seed(0)
    module = CausalLMModule(model=KINDS.get(kind) or OTHERS[kind], tokenizer="bytes")
    gap = module.packing_gap()
    assert bool(gap) is (kind in OTHERS), gap
    assert module.training


def conversations(path: Path, count: int = 24) -> str:
    generator = torch.Generator().manual_seed(0)
    lines = []
    for n in range(count):
        size = int(torch.randint(1, 20, (), generator=generator))
        asked, answer = {"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "ab" * size}
        lines.append(json.dumps({"messages": [asked, answer]}))
    path.write_text("\n".join(lines))
    return str(path)


def gradients(data: ChatData, module: Random, **options: Any) -> tuple[list[Tensor], float]:
    """Of the first optimizer step, and its loss per trained token."""
    found: list[list[Tensor]] = []

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            if not found:
                found.append([p.grad.clone() for p in module.parameters() if p.grad is not None])

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, callbacks=[Watch()], **quiet, **options)
    trainer.fit(module, data)
    return found[0], float(trainer.callback_metrics["train/loss"])


def first_step(path: str, size: int, window: int | None = None, **options: Any) -> tuple[list[Tensor], float]:
    """Of 24 conversations in batches of ``size``, ``window`` of which make the step."""
    data = ChatData(path, val=path, batch_size=size, generate=0)
    module = Random(lr_scheduler="constant", warmup=0.0)
    return gradients(data, module, accumulate_grad_batches=window or 24 // size, **options)


@pytest.mark.parametrize("size", [8, 4, 1])
def test_accumulated_batches_are_one(size: int, tmp_path: Path) -> None:
    path = conversations(tmp_path / "a.jsonl")
    for a, b in zip(first_step(path, 24)[0], first_step(path, size)[0], strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_two_processes_are_one(tmp_path: Path) -> None:
    path = conversations(tmp_path / "a.jsonl")
    codes, outputs = launch([str(Path(__file__).with_name("causal_lm_runs.py")), str(tmp_path)])
    assert codes == [0, 0], "\n".join(output[-3000:] for output in outputs)
    for rank in range(2):
        for a, b in zip(first_step(path, 24)[0], torch.load(tmp_path / f"{rank}.pt"), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_packed_rows_train_as_rows_of_their_own(tmp_path: Path) -> None:
    path = conversations(tmp_path / "a.jsonl")
    found = []
    for packing, size in ((False, 24), (True, 24)):
        data = ChatData(path, val=path, batch_size=size, packing=packing, max_length=64, generate=0)
        module = Random(lr_scheduler="constant", warmup=0.0)
        found.append(gradients(data, module, limit_train_batches=1))
        rows = len(data.train_dataloader().dataset)  # type: ignore[arg-type]
    assert rows < 20
    for a, b in zip(found[0][0], found[1][0], strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


def test_packing_with_virtual_tokens_is_refused(tmp_path: Path) -> None:
    data = ChatData(conversations(tmp_path / "a.jsonl"), packing=True, max_length=64, generate=0)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, callbacks=[pet.PromptTuningCallback(length=2)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, num_sanity_val_steps=0, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(ArgumentError, match="packing=False"):
        trainer.fit(Random(), data)


def test_a_model_that_cannot_be_packed_says_why_and_trains(tmp_path: Path) -> None:
    data = ChatData(conversations(tmp_path / "a.jsonl"), packing=True, max_length=64, generate=0)
    module = CausalLMModule(model=OTHERS["bloom"], tokenizer="bytes")
    module.tokenizer = character_tokenizer()
    with pytest.warns(UserWarning, match="see each other"):
        data.encode_splits(module, ["train"])
    assert "attention_mask" in next(iter(data.train_dataloader()))


# --- in a Trainer ----------------------------------------------------------------------------------


def test_scores_are_weighted_by_tokens(tmp_path: Path) -> None:
    path = conversations(tmp_path / "a.jsonl")
    data = ChatData(path, val=path, batch_size=5, generate=3)
    module = Random(max_new_tokens=4)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (scores,) = trainer.validate(module, data, verbose=False)
    total, tokens, right = 0.0, 0, 0
    with torch.no_grad():
        for given in data.val_dataloader():
            logits = module.eval()(given).logits[:, :-1]
            labels = given["labels"][:, 1:]
            counted = labels != -100
            total += F.cross_entropy(logits[counted], labels[counted], reduction="sum").item()
            tokens += int(counted.sum())
            right += int((logits.argmax(-1) == labels)[counted].sum())
    assert scores["val/loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert scores["val/perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert scores["val/token_accuracy"] == pytest.approx(right / tokens)
    assert scores["val/exact_match"] == 0.0


def test_nothing_that_fits_is_an_error(tmp_path: Path) -> None:
    data = ChatData(conversations(tmp_path / "a.jsonl"), max_length=8)
    with pytest.raises(ArgumentError, match="Raise max_length"):
        data.encode_splits(Random(), ["train"])


def test_a_model_without_a_template_is_an_error(tmp_path: Path) -> None:
    module = CausalLMModule(model=KINDS["gpt2"], tokenizer="bytes")
    with pytest.raises(ArgumentError, match="has no chat template"):
        ChatData(conversations(tmp_path / "a.jsonl")).encode_splits(module, ["train"])
