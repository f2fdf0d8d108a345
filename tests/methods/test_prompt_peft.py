"""Prompt tuning against an independent implementation: HF PEFT with the same prompt vectors."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lightning_pet import PromptTuningCallback, apply

from . import zoo

TOLERANCE = 1e-5
LENGTH = 4
TASKS = {
    "gpt2": "CAUSAL_LM",
    "llama": "CAUSAL_LM",
    "gemma2": "CAUSAL_LM",
    "bert": "SEQ_CLS",
    "t5": "SEQ_2_SEQ_LM",
    "bart": "SEQ_2_SEQ_LM",
}


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """The model with our prompt and with PEFT's, of equal vectors."""
    model, _ = getattr(zoo, name)()
    # One submodule: PEFT's default of two for encoder-decoders doubles the published count and trains only half.
    config = peft.PromptTuningConfig(
        task_type=TASKS[name], num_virtual_tokens=LENGTH, num_transformer_submodules=1, tokenizer_name_or_path=None
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    apply(model, [PromptTuningCallback(length=LENGTH, modules_to_save=[])])
    vectors = torch.randn(LENGTH, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for ours in (m for n, m in model.named_modules() if n.endswith("_rows")):
            ours.prompt.copy_(vectors)
        theirs.prompt_encoder["default"].embedding.weight.copy_(vectors)
    return model, theirs


def inputs(name: str, padded: bool) -> dict[str, Any]:
    ids = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
    mask = torch.ones_like(ids)
    if padded:  # GPT-2 knows padding by the mask only
        mask[1, 3:] = 0
    extra = {"decoder_input_ids": torch.tensor([[0, 4, 5], [0, 6, 7]])} if TASKS[name] == "SEQ_2_SEQ_LM" else {}
    return {"input_ids": ids, "attention_mask": mask, **extra}


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", TASKS)
def test_same_output(name: str, padded: bool) -> None:
    model, theirs = pair(name)
    given = inputs(name, padded)
    ours, reference = model(**given).logits, theirs(**given).logits
    if TASKS[name] == "CAUSAL_LM":  # PEFT returns the prompt's positions as well
        assert reference.shape[1] == ours.shape[1] + LENGTH
        reference = reference[:, LENGTH:]
    real = given["attention_mask"].bool() if TASKS[name] == "CAUSAL_LM" else ...
    assert (ours[real] - reference[real]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task != "SEQ_CLS"])
def test_same_generated_tokens(name: str) -> None:
    model, theirs = pair(name)
    given = {key: value for key, value in inputs(name, False).items() if "decoder" not in key}
    options = {"max_new_tokens": 8, "do_sample": False}
    ours, reference = model.generate(**given, **options), theirs.generate(**given, **options)
    assert torch.equal(ours, reference)


def test_the_loss_leaves_out_the_step_from_the_prompt_to_the_first_token() -> None:
    """PEFT predicts the first token from the last virtual one as well; here no label sees the prompt."""
    model, theirs = pair("gpt2")
    given = inputs("gpt2", False)
    labels = given["input_ids"]
    ours, reference = model(**given, labels=labels), theirs(**given, labels=labels)
    extra = nn.functional.cross_entropy(reference.logits[:, LENGTH - 1], labels[:, 0], reduction="sum")
    count = labels[:, 1:].numel()
    assert torch.allclose((ours.loss * count + extra) / (count + labels.shape[0]), reference.loss, atol=1e-5)
