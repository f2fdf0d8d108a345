"""Prompt tuning: the battery, golden properties, initialisations, positions, and its own errors."""

import pickle
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pet import (
    Adapted,
    AdapterCallback,
    ArgumentError,
    BitFitCallback,
    DeltaFileError,
    PrefixTuningCallback,
    PromptTuningCallback,
    TargetError,
    apply,
    load_delta,
    save_delta,
)

from . import zoo
from .battery import LIKE_SMALLER, Battery, Case, frozen_output, output_in_a_new_process, perturb

FREE = {"method": PromptTuningCallback, "exact_identity": False, "identity_tolerance": None, "mergeable": False}
TWO_LAYERS = (16 * 8 + 8) + (8 * 16 + 16)


class TestPromptTuning(Battery):
    cases: ClassVar[list[Case]] = [
        Case("embedding", options={"length": 3, "modules_to_save": []}, parameters=3 * 6, **FREE),
        Case("bert", options={"length": 3}, parameters=3 * 16, **FREE),
        Case("gpt2", options={"length": 3, "init": "vocabulary"}, parameters=3 * 16, needs_values=True, **FREE),
        Case(
            "llama", options={"length": 3, "encoder": "mlp", "encoder_size": 8}, parameters=3 * 16 + TWO_LAYERS, **FREE
        ),
        Case("t5", options={"length": 3, "where": "both"}, parameters=2 * 3 * 16, **FREE),
        Case(
            "whisper", options={"length": 3, "where": "decoder"}, parameters=3 * 16, not_compiled=LIKE_SMALLER, **FREE
        ),
    ]


def adapted(name: str, **options: Any) -> tuple[nn.Module, Any, Adapted]:
    model, run = getattr(zoo, name)()
    handle = apply(model, [PromptTuningCallback(**{"length": 3, **options})], forward=lambda: run(model))
    perturb(handle)
    return model, run, handle


def rows_of(model: nn.Module) -> list[Any]:
    return [m for n, m in model.named_modules() if n.endswith(("_rows", "_rows_decoder"))]


# --- golden properties ---------------------------------------------------------------------------


def test_the_prompt_is_put_before_the_embedded_input() -> None:
    """Against the base called with the concatenated embeddings."""
    model, _, handle = adapted("llama")
    model.double()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    (rows,) = rows_of(model)
    ours = model(input_ids=ids).logits
    with handle.disabled():
        table = model.get_input_embeddings()
        embeds = torch.cat([rows.prompt.double().expand(2, -1, -1), table(ids)], 1)
        reference = model(inputs_embeds=embeds).logits[:, 3:]
    assert (ours - reference).abs().max() < 1e-12


def test_the_mlp_folds_away() -> None:
    model, run, _ = adapted("gpt2", encoder="mlp", encoder_size=8)
    (rows,) = rows_of(model)
    twin, _, _ = adapted("gpt2")
    with torch.no_grad():
        rows_of(twin)[0].prompt.copy_(rows.packed()["folded"])
    assert torch.equal(frozen_output(twin, run), frozen_output(model, run))
    by_hand = torch.relu(rows.prompt @ rows.hidden.T + rows.hidden_bias) @ rows.out.T + rows.out_bias
    assert (rows.vectors() - by_hand).abs().max() < 1e-6


def test_a_file_holds_the_folded_prompt_next_to_the_mlp(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, run, _ = adapted("gpt2", encoder="mlp")
    expected = frozen_output(model, run)
    save_delta(model, tmp_path / "delta.pet.safetensors")
    stored = load_file(tmp_path / "delta.pet.safetensors")
    (folded,) = [tensor for name, tensor in stored.items() if name.endswith("folded")]
    assert torch.equal(folded, rows_of(model)[0].vectors())
    fresh, _ = zoo.gpt2()
    load_delta(fresh, tmp_path / "delta.pet.safetensors")
    assert torch.equal(frozen_output(fresh, run), expected)


def test_loads_in_a_new_process(tmp_path: Path) -> None:
    model, run, _ = adapted("t5", where="both")
    save_delta(model, tmp_path / "delta.pet.safetensors")
    found = output_in_a_new_process("t5", tmp_path / "delta.pet.safetensors", tmp_path / "out.pt")
    assert torch.equal(found, frozen_output(model, run))


def test_two_prompts_stand_one_after_the_other() -> None:
    model, run = zoo.llama()
    both = apply(model, [PromptTuningCallback(length=2), PromptTuningCallback(length=3, name="second")])
    perturb(both)
    first, second = rows_of(model)
    assert (first.first, second.first) == (50, 52)
    together = frozen_output(model, run)
    one, _ = zoo.llama()
    apply(one, [PromptTuningCallback(length=5)])
    with torch.no_grad():
        rows_of(one)[0].prompt.copy_(torch.cat([first.prompt, second.prompt]))
    assert (frozen_output(one, run) - together).abs().max() < 1e-6
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(
        model.generate(ids, max_new_tokens=6, do_sample=False), one.generate(ids, max_new_tokens=6, do_sample=False)
    )


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("step", [1, -1], ids=["first", "last"])
def test_together_with_prefix_adapter_and_biases(name: str, step: int, tmp_path: Path) -> None:
    model, run = getattr(zoo, name)()
    before = frozen_output(model, run)
    methods = [PromptTuningCallback(length=3), PrefixTuningCallback(length=2), AdapterCallback(), BitFitCallback()]
    handle = apply(model, methods[::step], forward=lambda: run(model))
    perturb(handle, 0.1)
    together = frozen_output(model, run)
    assert together.shape == before.shape
    save_delta(model, tmp_path / "delta.pet.safetensors")
    fresh, _ = getattr(zoo, name)()
    load_delta(fresh, tmp_path / "delta.pet.safetensors")
    assert torch.equal(frozen_output(fresh, run), together)
    with handle.disabled():
        assert torch.equal(frozen_output(model, run), before)
    handle.remove()
    assert torch.equal(frozen_output(model, run), before)


# --- what the consumer is called with ------------------------------------------------------------


def test_a_padded_row_is_the_unpadded_one() -> None:
    for name in ("bert", "gpt2", "llama", "t5"):
        model, _, _ = adapted(name)
        ids = torch.tensor([[5, 6, 7, 8, 0, 0]])
        mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
        extra = {"decoder_input_ids": torch.tensor([[0, 4, 5]])} if name == "t5" else {}
        padded = zoo.first_tensor(model(input_ids=ids, attention_mask=mask, **extra))
        plain = zoo.first_tensor(model(input_ids=ids[:, :4], **extra))
        assert (padded[:, : plain.shape[1]] - plain).abs().max() < 1e-5, name


def windowed(**options: Any) -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MistralConfig(vocab_size=50, num_hidden_layers=2, sliding_window=5, **sizes, **options)
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("build", [windowed, lambda: zoo.llama()[0]], ids=["windows", "rotary"])
def test_padding_on_the_left_changes_nothing(build: Any) -> None:
    model = build()
    perturb(apply(model, [PromptTuningCallback(length=3)]), 1.0)
    short, long = torch.tensor([[9, 10, 11]]), torch.tensor([[5, 6, 7, 8, 12, 13, 14]])
    ids, mask = torch.cat([F.pad(short, (4, 0)), long]), torch.tensor([[0] * 4 + [1] * 3, [1] * 7])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    vectors = model.get_input_embeddings()(ids).detach()
    for given in (
        {"input_ids": ids},
        {"input_ids": ids, "position_ids": positions},
        {"inputs_embeds": vectors},
    ):
        out = model(attention_mask=mask, output_hidden_states=True, use_cache=False, **given)
        for row, alone in ((out.logits[:1, 4:], model(short).logits), (out.logits[1:], model(long).logits)):
            assert (row - alone).abs().max() < 1e-5
        assert out.hidden_states[-1].shape == (2, 7, 16)
        assert not torch.equal(out.logits[0, 4:], out.logits[0, :3])
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 4] = -100  # it would be predicted from the padding
    loss = model(ids, attention_mask=mask, labels=labels).loss
    each = [model(part, labels=part).loss * (part.shape[1] - 1) for part in (short, long)]
    assert torch.allclose(loss, sum(each) / 8, atol=1e-5)


@pytest.mark.parametrize("own", [False, True], ids=["positions of the model", "own positions"])
def test_padding_on_the_left_in_a_decoding_loop_of_ones_own(own: bool) -> None:
    model = windowed()
    perturb(apply(model, [PromptTuningCallback(length=3)]), 1.0)
    ids, mask = torch.tensor([[0, 0, 7, 8, 9, 11], [5, 6, 7, 8, 9, 10]]), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected, cache = model(ids, attention_mask=mask, use_cache=False).logits, None
    for start, end in ((0, 3), (3, 4), (4, 6)):
        given = {"position_ids": positions[:, start:end]} if own else {}
        out = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True, **given)
        cache = out.past_key_values
        assert (out.logits[1] - expected[1, start:end]).abs().max() < 1e-5
        assert (out.logits[0] - expected[0, start:end])[max(0, 2 - start) :].abs().max() < 1e-5


def test_attentions_behind_padding_are_those_of_real_positions() -> None:
    model = windowed(attn_implementation="eager")
    perturb(apply(model, [PromptTuningCallback(length=3)]), 1.0)
    short = torch.tensor([[9, 10, 11]])
    padded = model(
        F.pad(short, (2, 0)), attention_mask=torch.tensor([[0, 0, 1, 1, 1]]), output_attentions=True
    ).attentions
    for one, other in zip(padded, model(short, output_attentions=True).attentions, strict=True):
        assert (one[..., 2:, 2:] - other).abs().max() < 1e-6


def test_embedded_inputs_token_types_positions_and_all_outputs() -> None:
    model, _, _ = adapted("bert")
    model.set_attn_implementation("eager")
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = model(input_ids=ids, output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in plain.hidden_states] == [(1, 4, 16)] * 3
    assert [tuple(a.shape) for a in plain.attentions] == [(1, 2, 4, 4)] * 2
    positions = torch.arange(4)[None]
    given = model(input_ids=ids, token_type_ids=torch.zeros_like(ids), position_ids=positions)
    embedded = model(inputs_embeds=model.bert.embeddings.word_embeddings(ids))
    for other in (given, embedded):
        assert (other.logits - plain.logits).abs().max() < 1e-6
    pair = model(input_ids=ids, token_type_ids=torch.tensor([[0, 0, 1, 1]]))
    assert (pair.logits - plain.logits).abs().max() > 1e-4
    assert isinstance(model(input_ids=ids, return_dict=False), tuple)


def test_labels_see_the_positions_they_expect() -> None:
    model, _, _ = adapted("gpt2")
    ids = torch.tensor([[5, 6, 7, 8]])
    out = model(input_ids=ids, labels=ids)
    reference = nn.functional.cross_entropy(out.logits[0, :-1], ids[0, 1:])
    assert out.logits.shape == (1, 4, 50)
    assert torch.equal(out.loss, reference)


def test_router_logits_of_flattened_tokens_are_cut() -> None:
    model, _, _ = adapted("mixtral")
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_router_logits=True, labels=ids)
    assert out.router_logits[0].shape == (8, 3)
    assert torch.isfinite(out.loss)


def test_a_decoding_loop_of_ones_own() -> None:
    for name in ("gpt2", "llama"):
        model, _, _ = adapted(name)
        ids = torch.tensor([[5, 6, 7, 8, 9]])
        full = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :3], attention_mask=torch.ones(1, 3), use_cache=True)
        mask, positions = torch.ones(1, 5), torch.tensor([[3, 4]])
        for extra in ({}, {"attention_mask": mask}, {"attention_mask": mask, "position_ids": positions}):
            cache = pickle.loads(pickle.dumps(first.past_key_values))
            rest = model(input_ids=ids[:, 3:], past_key_values=cache, **extra).logits
            assert (rest - full[:, 3:]).abs().max() < 1e-5, (name, extra)


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    model, run, _ = adapted("llama")
    (rows,) = rows_of(model)
    model.train()
    run(model).square().sum().backward()
    plain, rows.prompt.grad = rows.prompt.grad, None
    model.gradient_checkpointing_enable()
    run(model).square().sum().backward()
    assert (rows.prompt.grad - plain).abs().max() < 1e-5


def test_real_positions_do_not_look_at_later_ones() -> None:
    model, _, _ = adapted("llama")
    a, b = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 9, 10]])
    assert torch.equal(frozen_output(model, lambda m: m(a).logits)[:, :2], model(b).logits[:, :2])


# --- where ---------------------------------------------------------------------------------------


def test_encoder_decoder_and_both_have_their_own_rows() -> None:
    places = {}
    for where in ("encoder", "decoder", "both"):
        _, _, handle = adapted("t5", where=where)
        places[where] = [row.place for row in handle.plan().rows if row.parameters]
        assert sum(row.parameters for row in handle.plan().rows) == 48 * len(places[where])
    assert places["encoder"] == ["encoder.embed_tokens.weight"]
    assert places["decoder"] == ["decoder.embed_tokens.weight"]
    assert places["both"] == places["encoder"] + places["decoder"]


def test_no_place_is_an_error_that_names_the_model() -> None:
    for name, where, message in [
        ("vit", "encoder", "ViTForImageClassification takes no token ids"),
        ("conv2d", "encoder", "Sequential takes no token ids"),
        ("whisper", "encoder", "where='decoder'"),
        ("gpt2", "both", "GPT2LMHeadModel has one stack"),
    ]:
        model, run = getattr(zoo, name)()
        state = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(TargetError, match=message):
            apply(model, [PromptTuningCallback(where=where)], forward=lambda m=model, r=run: r(m))
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


class Tagger(nn.Module):
    """Plain torch: no mask, no configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 6)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.out = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.lstm(self.table(tokens))[0])


class Scored(Tagger):
    """Takes its labels where it takes its ids."""

    def forward(self, input_ids: Tensor, kinds: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(input_ids) + kinds.unsqueeze(-1)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


class Odd(Tagger):
    def forward(self, sentence: Tensor) -> Tensor:
        return super().forward(sentence)


def test_labels_inside_the_consumer_leave_the_prompt_out() -> None:
    model, ids = Scored(), torch.tensor([[5, 6, 7], [8, 9, 10]])
    kinds, labels = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0, 1, 2], [2, 1, 0]])
    apply(model, [PromptTuningCallback(length=4)], forward=lambda: model(ids, kinds, labels))
    loss, logits = model(ids, kinds, labels=labels)
    assert logits.shape == (2, 3, 3)
    assert torch.allclose(loss, nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def test_a_plain_recurrent_model() -> None:
    model, ids = Tagger(), torch.tensor([[5, 6, 7], [8, 9, 10]])
    handle = apply(model, [PromptTuningCallback(length=4)], forward=lambda: model(ids))
    ours = model(ids)
    with handle.disabled():
        embedded = torch.cat([rows_of(model)[0].prompt.expand(2, -1, -1), model.table(ids)], 1)
        reference = model.out(model.lstm(embedded)[0])[:, 4:]
    assert (ours - reference).abs().max() < 1e-6
    odd = Odd()
    with pytest.raises(TargetError, match="Odd: no module around the token table 'table'"):
        apply(odd, [PromptTuningCallback()], forward=lambda: odd(ids))


def test_more_than_the_positions_is_an_error() -> None:
    model, _ = zoo.gpt2()
    with pytest.raises(ArgumentError, match="has 32 positions, so a prompt can have at most 31"):
        apply(model, [PromptTuningCallback(length=32)])
    apply(model, [PromptTuningCallback(length=28)])
    assert model(torch.full((1, 4), 5)).logits.shape == (1, 4, 50)
    with pytest.raises(ArgumentError, match="5 tokens and a prompt of 28 are more than the 32 positions"):
        model(torch.full((1, 5), 5))
    relative, _ = zoo.t5()
    apply(relative, [PromptTuningCallback(length=600)])


def test_a_mask_of_another_form_is_an_error() -> None:
    model, _, _ = adapted("llama")
    with pytest.raises(ArgumentError, match=r"attention_mask of shape \(1, 1, 4, 4\)"):
        model(torch.full((1, 4), 5), attention_mask=torch.zeros(1, 1, 4, 4))


# --- initialisation ------------------------------------------------------------------------------


def test_random_is_the_papers() -> None:
    torch.manual_seed(0)
    model, _ = zoo.gpt2()
    apply(model, [PromptTuningCallback(length=30)])
    values = rows_of(model)[0].prompt
    assert values.min() < -0.4
    assert values.max() > 0.4
    assert values.abs().max() <= 0.5


def row_numbers(model: nn.Module, prompt: Tensor) -> list[int]:
    table = model.get_input_embeddings().weight
    return [int((table == row).all(1).nonzero()) for row in prompt]


def test_vocabulary_takes_different_rows_that_are_no_special_tokens() -> None:
    model, _ = zoo.gpt2()
    apply(model, [PromptTuningCallback(length=20, init="vocabulary")])
    found = row_numbers(model, rows_of(model)[0].prompt)
    assert len(set(found)) == 20
    assert not {1, 2} & set(found)  # bos and eos


@pytest.fixture
def words(tmp_path: Path) -> str:
    """A word-level tokenizer on disk."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "bad": 3, "very": 4, "good": 5, "film": 6, "rare": 70}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path / "words")
    return str(tmp_path / "words")


def test_class_labels_start_from_the_mean_of_their_tokens(words: str) -> None:
    model, _ = zoo.gpt2()
    callback = PromptTuningCallback(length=5, init="class_labels", class_labels=["very good", "bad"], tokenizer=words)
    apply(model, [callback])
    table, prompt = model.get_input_embeddings().weight, rows_of(model)[0].prompt
    assert torch.allclose(prompt[0], (table[4] + table[5]) / 2)
    assert torch.equal(prompt[1], table[3])
    assert len(set(row_numbers(model, prompt[2:]))) == 3


def test_a_tokenizer_keeps_tokens_that_are_no_text_out_of_the_sample(tmp_path: Path) -> None:
    from transformers import BertTokenizer

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"[unused{i}]" for i in range(35)), *"abcdefghij"]
    BertTokenizer(vocab={name: index for index, name in enumerate(names)}).save_pretrained(tmp_path / "bert")
    model, _ = zoo.bert()
    apply(model, [PromptTuningCallback(length=10, init="vocabulary", tokenizer=str(tmp_path / "bert"))])
    assert sorted(row_numbers(model, rows_of(model)[0].prompt)) == list(range(40, 50))


def test_text_is_repeated_or_cut(words: str) -> None:
    for text, expected in (("good film", [5, 6, 5, 6, 5]), ("very very good film bad bad", [4, 4, 5, 6, 3])):
        model, _ = zoo.llama()
        apply(model, [PromptTuningCallback(length=5, init="text", init_text=text, tokenizer=words)])
        assert row_numbers(model, rows_of(model)[0].prompt) == expected


def test_real_words_as_prompt_are_those_words() -> None:
    """Golden property: rows of the vocabulary as a prompt equal their ids before the input."""
    model, _ = zoo.llama()
    handle = apply(model, [PromptTuningCallback(length=4, init="vocabulary")])
    ids = torch.tensor([[5, 6, 7]])
    numbers = row_numbers(model, rows_of(model)[0].prompt)
    ours = model(ids).logits
    with handle.disabled():
        reference = model(torch.cat([torch.tensor([numbers]), ids], 1)).logits[:, 4:]
    assert (ours - reference).abs().max() < 1e-6


def test_a_file_needs_no_tokenizer(words: str, tmp_path: Path) -> None:
    model, run = zoo.gpt2()
    apply(model, [PromptTuningCallback(length=2, init="text", init_text="good", tokenizer=words)])
    save_delta(model, tmp_path / "delta.pet.safetensors")
    for file in Path(words).iterdir():
        file.unlink()
    fresh, _ = zoo.gpt2()
    load_delta(fresh, tmp_path / "delta.pet.safetensors")
    assert torch.equal(frozen_output(fresh, run), frozen_output(model, run))


def test_a_budget_picks_the_length(words: str) -> None:
    options = {"init": "class_labels", "class_labels": ["bad"], "tokenizer": words}
    model, _ = zoo.gpt2()
    base = sum(parameter.numel() for parameter in model.parameters())
    callback = PromptTuningCallback(budget=(7 * 16 + 5) / base, **options)
    apply(model, [callback])
    assert callback.length == 7
    assert len(set(row_numbers(model, rows_of(model)[0].prompt))) == 7


def test_errors_of_initialisation(words: str) -> None:
    model, _ = zoo.gpt2()
    with pytest.raises(ArgumentError, match="makes id 70, but the model has 50 rows"):
        apply(model, [PromptTuningCallback(init="text", init_text="rare film", tokenizer=words)])
    with pytest.raises(ArgumentError, match="the vocabulary has only 48 rows"):
        apply(zoo.llama()[0], [PromptTuningCallback(length=49, init="vocabulary")])
    with pytest.raises(ArgumentError, match="cannot be loaded"):
        apply(model, [PromptTuningCallback(init="text", init_text="good", tokenizer=f"{words}/none")])
    with pytest.raises(ArgumentError, match="meta device"):
        apply(model.to("meta"), [PromptTuningCallback(init="vocabulary")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "at least 1"),
        ({"init": "words"}, "use one of"),
        ({"where": "top"}, "use one of"),
        ({"encoder": "lstm"}, "use one of"),
        ({"init": "text", "init_text": "good"}, "needs a tokenizer"),
        ({"init": "text", "tokenizer": "bytes"}, "needs init_text"),
        ({"init": "class_labels", "tokenizer": "bytes"}, "needs class_labels"),
        ({"length": 1, "init": "class_labels", "class_labels": ["a", "b"], "tokenizer": "bytes"}, "each takes a row"),
        ({"encoder": "mlp", "init": "vocabulary"}, "the MLP changes every row"),
        ({"encoder": "mlp", "encoder_size": 0}, "at least 1"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        PromptTuningCallback(**options)


def test_a_prompt_of_another_length_does_not_load(tmp_path: Path) -> None:
    model, _, _ = adapted("gpt2", encoder="mlp", encoder_size=8)
    save_delta(model, tmp_path / "delta.pet.safetensors")
    fresh, _ = zoo.gpt2()
    with pytest.raises(DeltaFileError, match="has shape"):
        apply(
            fresh, [PromptTuningCallback(length=4, start_from=str(tmp_path / "delta.pet.safetensors"), encoder="mlp")]
        )
