"""Prefixes in models of every kind of attention: implementations, windows, sinks, caches, generation."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_pet import PrefixTuningCallback, TargetError, apply
from lightning_pet.attention.prefix import AttentionPrefix

P = 4
SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "initializer_range": 0.2,
}
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "bart": {
        "d_model": 32,
        **{
            f"{part}_{name}": n
            for part in ("encoder", "decoder")
            for name, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
        },
    },
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4, "num_hidden_layers": 1},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
    "gpt_oss": {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "falcon": {"multi_query": True, "new_decoder_architecture": False},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
}
GENERATIVE = sorted(OWN)


@functools.cache
def _base(name: str, attention: str | None) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = AutoConfig.for_model(name, **{**SMALL, **OWN.get(name, {})})
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    chosen = {} if attention is None else {"attn_implementation": attention}
    return auto.from_config(config, **chosen).eval()


def base(name: str, attention: str | None = None) -> nn.Module:
    return copy.deepcopy(_base(name, attention))


def with_prefix(name: str, attention: str | None = None) -> nn.Module:
    model = base(name, attention)
    torch.manual_seed(7)
    apply(model, [PrefixTuningCallback(length=P, projection=False)])
    return model


def ids(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(3))


def logits(model: nn.Module, tokens: Tensor, **kwargs: Any) -> Tensor:
    if model.config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = ids(tokens.shape[0], 5)
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False, **kwargs).logits


@pytest.mark.parametrize("name", ["gpt2", "t5", "bart", "llama", "mistral", "gpt_bigcode", "falcon", "deepseek_v3"])
def test_eager_equals_sdpa(name: str) -> None:
    tokens, padding = ids(), torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    for kwargs in ({}, {"attention_mask": padding}):
        eager, sdpa = (logits(with_prefix(name, a), tokens, **kwargs) for a in ("eager", "sdpa"))
        visible = padding.bool() if kwargs and sdpa.shape[1] == 7 else torch.ones(sdpa.shape[:2]).bool()
        assert (eager - sdpa)[visible].abs().max() < 1e-5
        assert (sdpa - logits(base(name, "sdpa"), tokens, **kwargs)).abs().max() > 1e-2


@pytest.mark.parametrize("name", GENERATIVE)
def test_every_key_and_value_gets_a_gradient_and_causality_holds(name: str) -> None:
    model, tokens = with_prefix(name), ids()
    decoder = {"decoder_input_ids": ids(2, 5)} if model.config.is_encoder_decoder else {}
    out = model(input_ids=tokens, use_cache=False, **decoder).logits
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    sites = [module for module in model.modules() if isinstance(module, AttentionPrefix)]
    assert sites
    assert all(p.grad.abs().amax(-1).min() > 0 for site in sites for p in (site.key, site.value))
    other = tokens.clone()
    other[:, -1] = 5
    if decoder:
        decoder["decoder_input_ids"] = torch.cat([ids(2, 5)[:, :-1], torch.full((2, 1), 5)], 1)
        other = tokens
    with torch.no_grad():
        changed = model(input_ids=other, use_cache=False, **decoder).logits
    assert (changed - out)[:, :-1].abs().max() < 1e-5
    assert (changed - out)[:, -1].abs().max() > 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss", "gptj"])
def test_padding_on_either_side_changes_nothing(name: str) -> None:
    model, tokens = with_prefix(name), ids(1, 5)
    expected = logits(model, tokens)
    pad = torch.zeros(1, 3, dtype=torch.long)
    right = logits(model, torch.cat([tokens, pad], 1), attention_mask=torch.tensor([[1] * 5 + [0] * 3]))
    assert (right[:, :5] - expected).abs().max() < 1e-5
    positions = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4]])
    left = logits(
        model, torch.cat([pad, tokens], 1), attention_mask=torch.tensor([[0] * 3 + [1] * 5]), position_ids=positions
    )
    assert (left[:, 3:] - expected).abs().max() < 1e-5


def test_a_sliding_window_does_not_lose_the_prefix() -> None:
    model = with_prefix("mistral")
    effect = (logits(model, ids(1, 12)) - logits(base("mistral"), ids(1, 12))).abs().amax((0, 2))
    assert effect[-1] > 0.1 * effect[0]
    assert model.config.sliding_window == 4


def generate(model: nn.Module, **options: Any) -> Tensor:
    mask = torch.tensor([[0] * 2 + [1] * 5, [1] * 7])
    torch.manual_seed(11)
    return model.generate(
        ids().masked_fill(mask == 0, 0), attention_mask=mask, max_new_tokens=6, min_new_tokens=6, **options
    )


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
@pytest.mark.parametrize("name", GENERATIVE)
def test_generation_with_a_cache_equals_without(name: str, options: dict[str, Any]) -> None:
    options = {"do_sample": False, **options}
    model = with_prefix(name)
    cached = generate(model, **options)
    assert torch.equal(cached, generate(model, use_cache=False, **options))
    if not options["do_sample"] and "num_beams" not in options:
        assert not torch.equal(cached, generate(base(name), **options))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_a_static_cache_equals_a_dynamic_one(name: str) -> None:
    model = with_prefix(name)
    from transformers import StaticCache

    with torch.no_grad():
        tokens, steps = ids(2, 6), []
        cache = StaticCache(config=model.config, max_cache_len=16)
        for start, stop in ((0, 4), (4, 5), (5, 6)):
            position = torch.arange(start, stop)
            out = model(tokens[:, start:stop], past_key_values=cache, cache_position=position, use_cache=True)
            steps.append(out.logits)
    assert (torch.cat(steps, 1) - logits(model, tokens)).abs().max() < 1e-5


def test_no_prefix_is_in_a_cache() -> None:
    with torch.no_grad():
        cache = with_prefix("llama")(ids(2, 5), use_cache=True).past_key_values
    assert cache.get_seq_length() == 5
    assert cache.layers[1].keys.shape == (2, 2, 5, 8)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "bloom", "t5"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, tokens = with_prefix(name), ids()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        decoder = {"decoder_input_ids": ids(2, 5)} if model.config.is_encoder_decoder else {}
        model(input_ids=tokens, use_cache=False, **decoder).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, checked in zip(*gradients, strict=True):
        assert (plain - checked).abs().max() <= 1e-6 * (1 + plain.abs().max())


def test_attention_weights_keep_their_shape() -> None:
    model, tokens = with_prefix("llama", "eager"), ids()
    with torch.no_grad():
        shares = model(tokens, output_attentions=True).attentions
    assert [tuple(share.shape) for share in shares] == [(2, 4, 7, 7)] * 2
    assert (shares[0].sum(-1) < 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_flex_attention_equals_sdpa(name: str) -> None:
    tokens, padding = ids(), torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    for kwargs in ({}, {"attention_mask": padding}):
        model = with_prefix(name, "sdpa")
        expected = logits(model, tokens, **kwargs)
        model.config._attn_implementation = "flex_attention"
        visible = padding.bool() if kwargs else torch.ones(2, 7).bool()
        assert (logits(model, tokens, **kwargs) - expected)[visible].abs().max() < 1e-5


def test_flash_attention_by_its_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """No such kernel runs here: a function of the same contract (2-D masks, aligned at the end) stands in."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def flash(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        visible = torch.ones(q.shape[2], k.shape[2]).tril(k.shape[2] - q.shape[2]).bool()
        if mask is not None:
            assert mask.shape == (k.shape[0], k.shape[2])
            visible = visible & mask.bool()[:, None, None]
        return nn.functional.scaled_dot_product_attention(q, k, v, visible, scale=scaling).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    model, tokens, padding = with_prefix("llama"), ids(), torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    expected = [logits(model, tokens), logits(model, tokens, attention_mask=padding)]
    model.config._attn_implementation = "flash_attention_2"
    assert (logits(model, tokens) - expected[0]).abs().max() < 1e-5
    got = logits(model, tokens, attention_mask=padding)
    assert (got - expected[1])[padding.bool()].abs().max() < 1e-5
    windowed = with_prefix("mistral")
    windowed.config._attn_implementation = "flash_attention_2"
    with pytest.raises(TargetError, match="sliding window of 4"):
        logits(windowed, tokens)
