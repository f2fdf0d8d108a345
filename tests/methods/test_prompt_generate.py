"""``generate`` of a model with a prompt: every cache, padding, beams and penalties, against one forward per token."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_pet import PromptTuningCallback, TargetError, apply

from . import zoo
from .battery import perturb

CAUSAL = ["gpt2", "llama", "gemma2"]
NEW = 6


def prompted(name: str, **options: Any) -> nn.Module:
    model, run = getattr(zoo, name)()
    with torch.no_grad():  # so that greedy choices depend on what came before
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) / 5)
    perturb(apply(model, [PromptTuningCallback(length=3, **options)], forward=lambda: run(model)), 1.0)
    return model


IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def greedy(model: nn.Module, ids: Tensor, steps: int = NEW, **fixed: Any) -> Tensor:
    """One whole forward per token, without a cache; the end token is never taken."""
    name = "decoder_input_ids" if fixed else "input_ids"
    with torch.no_grad():
        for _ in range(steps):
            logits = model(**fixed, **{name: ids}, use_cache=False).logits[:, -1].clone()
            logits[:, model.generation_config.eos_token_id] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


def generate(model: nn.Module, ids: Tensor = IDS, **options: Any) -> Tensor:
    defaults = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, **{**defaults, **options})


@pytest.mark.parametrize("name", CAUSAL)
def test_every_cache_gives_what_one_forward_per_token_gives(name: str) -> None:
    model = prompted(name)
    expected = greedy(model, IDS)
    assert not torch.equal(expected[0, 4:], expected[1, 4:])
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 1}):
        assert torch.equal(generate(model, **options), expected), options
    mask = torch.ones_like(IDS)
    assert torch.equal(generate(model, attention_mask=mask), expected)
    assert torch.equal(model.generate(input_ids=IDS, max_length=4 + NEW, min_length=4 + NEW, pad_token_id=0), expected)
    config = copy.deepcopy(model.generation_config)
    config.max_length, config.min_length, config.pad_token_id = 4 + NEW, 4 + NEW, 0
    assert torch.equal(model.generate(IDS, config), expected)
    assert config.max_length == 4 + NEW


@pytest.mark.parametrize("name", CAUSAL)
def test_left_padding_beams_and_penalties(name: str) -> None:
    model = prompted(name)
    padded = torch.tensor([[0, 0, 7, 8], [9, 10, 11, 12]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    for options in ({}, {"num_beams": 3}, {"repetition_penalty": 1.4}, {"num_beams": 2, "repetition_penalty": 1.4}):
        both = generate(model, padded, attention_mask=mask, **options)
        alone = generate(model, padded[:1, 2:], **options)
        assert torch.equal(both[0, 2:], alone[0]), options
        assert torch.equal(both, generate(model, padded, attention_mask=mask, use_cache=False, **options)), options


def test_padding_is_inferred_as_without_a_prompt() -> None:
    model = prompted("llama")
    padded = torch.tensor([[0, 0, 7, 8], [9, 10, 11, 12]])
    model.generation_config.pad_token_id = 0
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert torch.equal(generate(model, padded), generate(model, padded, attention_mask=mask))


@pytest.mark.parametrize(("name", "where"), [(n, w) for n in ("t5", "bart") for w in ("encoder", "decoder", "both")])
def test_encoder_decoders(name: str, where: str) -> None:
    model = prompted(name, where=where)
    start = torch.full((2, 1), model.generation_config.decoder_start_token_id)
    expected = greedy(model, start, input_ids=IDS)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"decoder_input_ids": start}):
        assert torch.equal(generate(model, **options), expected), options
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    both = generate(model, attention_mask=mask, num_beams=2)
    assert torch.equal(both[:1], generate(model, IDS[:1, :2], num_beams=2))


def test_what_users_hand_in_sees_their_ids_only() -> None:
    from transformers import LogitsProcessorList, StoppingCriteriaList

    model, seen = prompted("llama"), []

    def record(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(input_ids)
        return scores

    def stop(input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        seen.append(input_ids)
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 6)

    def allowed(row: int, input_ids: Tensor) -> list[int]:
        assert torch.equal(input_ids[:4], IDS[row])
        return list(range(3, 50))

    out = generate(
        model,
        logits_processor=LogitsProcessorList([record]),
        stopping_criteria=StoppingCriteriaList([stop]),
        prefix_allowed_tokens_fn=allowed,
    )
    assert out.shape == (2, 6)
    assert torch.equal(out[:, :4], IDS)
    assert {ids.shape[1] for ids in seen} == {4, 5, 6}
    assert all(torch.equal(ids[row], out[row, : ids.shape[1]]) for ids in seen for row in range(len(ids)))


def test_embedded_inputs_and_full_results() -> None:
    model = prompted("llama")
    expected = generate(model)
    embeds = model.get_input_embeddings()(IDS)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), expected[:, 4:])
    result = generate(model, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(result.sequences, expected)
    assert len(result.scores) == NEW


def test_generation_from_nothing_starts_with_bos() -> None:
    model = prompted("gpt2")
    found = model.generate(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(found, greedy(model, torch.tensor([[1]]), 4))


def test_a_conversation_goes_on_from_its_cache() -> None:
    model = prompted("llama")
    first = generate(model, IDS[:1], return_dict_in_generate=True)
    longer = torch.cat([first.sequences, torch.tensor([[20, 21]])], 1)
    continued = generate(model, longer, past_key_values=first.past_key_values)
    assert torch.equal(continued, generate(model, longer))


def test_the_wrapper_survives_pickle_and_goes_when_removed() -> None:
    model, run = zoo.gpt2()
    plain = generate(model)
    handle = apply(model, [PromptTuningCallback(length=3)], forward=lambda: run(model))
    perturb(handle, 1.0)
    tuned = generate(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(generate(twin), tuned)
    with handle.disabled():
        assert torch.equal(generate(model), plain)
    handle.remove()
    assert torch.equal(generate(model), plain)
    assert not torch.equal(tuned, plain)


def test_a_generate_of_its_own_is_refused() -> None:
    model = prompted("whisper", where="decoder")
    with pytest.raises(TargetError, match="WhisperForConditionalGeneration has a generate of its own"):
        model.generate(torch.randn(1, 8, 16))
