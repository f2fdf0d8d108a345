"""Conversations: lines as OpenAI checks them, what each kind of template trains, batches, and what does not fit."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_pet.data.chat.batches import Collator, Packs, StepSampler, packed, trained_tokens
from lightning_pet.data.chat.data import ChatData
from lightning_pet.data.chat.encoding import ChatEncoder, Tokens
from lightning_pet.data.chat.messages import Conversation, LineError, Preference, Text, chat, form_of, read_line
from lightning_pet.errors import ArgumentError
from lightning_pet.modules.date_chat import TEMPLATE, character_tokenizer

from . import templates

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Capital of France?"}
PARIS = {"role": "assistant", "content": "Paris"}
MORE = {"role": "user", "content": "Of Italy?"}
ROME = {"role": "assistant", "content": "Rome"}


@pytest.fixture(scope="module")
def bytes_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def encoder(tokenizer: Any, template: str, max_length: int = 10_000) -> ChatEncoder:
    tokenizer.chat_template = template
    return ChatEncoder(tokenizer, max_length)


def trained(tokenizer: Any, examples: list[Tokens]) -> list[str]:
    """What each example trains."""
    learnt = [[i for i, keep in zip(e.ids, e.trained, strict=True) if keep] for e in examples]
    return [tokenizer.decode(ids) for ids in learnt]


def conversation(*messages: dict[str, Any], **more: Any) -> Conversation:
    return chat({"messages": list(messages), **more})


# --- what is trained, by template ------------------------------------------------------------------

TWO = (USER, PARIS, MORE, ROME)
EXPECTED = {
    "CHATML": (["Paris<|im_end|>\nRome<|im_end|>\n"], ["Paris<|im_end|>\nRome<|im_end|>\n"]),
    "TAGGED": (["Paris<|im_end|>Rome<|im_end|>"], ["Paris<|im_end|>Rome<|im_end|>"]),
    "LLAMA3": (["Paris<|eot_id|>Rome<|eot_id|>"], ["Paris<|eot_id|>Rome<|eot_id|>"]),
    "GEMMA": (["Paris<end_of_turn>\nRome<end_of_turn>\n"], "System role not supported"),
    "MISTRAL_LAST": ([" Paris</s> Rome</s>"], "cannot be split exactly"),
    "MISTRAL_FIRST": ([" Paris</s> Rome</s>"], [" Paris</s> Rome</s>"]),
    "PHI3": (["Paris<|end|>\n<|endoftext|>", "Rome<|end|>\n<|endoftext|>"],) * 2,
    "QWEN3": (
        ["<think>\n\n</think>\n\nParis<|im_end|>\n", "<think>\n\n</think>\n\nRome<|im_end|>\n"],
        ["<think>\n\n</think>\n\nParis<|im_end|>\n", "<think>\n\n</think>\n\nRome<|im_end|>\n"],
    ),
}


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("name", EXPECTED)
def test_each_kind_of_template_trains_what_the_assistant_says(name: str, system: bool, bytes_tokenizer: Any) -> None:
    made = encoder(bytes_tokenizer, getattr(templates, name))
    example = conversation(*((SYSTEM, *TWO) if system else TWO))
    wanted = EXPECTED[name][system]
    if isinstance(wanted, str):
        with pytest.raises(LineError, match=wanted):
            made.conversation(example)
    else:
        assert trained(bytes_tokenizer, made.conversation(example)) == wanted


@pytest.mark.parametrize("name", ["CHATML", "LLAMA3", "MISTRAL_FIRST", "TAGGED"])
def test_one_rendering_says_what_one_per_turn_does(name: str, bytes_tokenizer: Any) -> None:
    made, example = encoder(bytes_tokenizer, getattr(templates, name)), conversation(*TWO)
    (whole,) = made.conversation(example)
    turns = [made._turn(example, turn) for turn in (1, 3)]
    assert whole.ids[: len(turns[0].ids)] == turns[0].ids
    assert [tokens.prompt for tokens in turns] == [len(made.prompt(TWO[:turn])) for turn in (1, 3)]
    if name != "TAGGED":  # whose marks end before the newline
        assert trained(bytes_tokenizer, [whole]) == ["".join(trained(bytes_tokenizer, turns))]


def test_context_is_seen_and_not_trained(bytes_tokenizer: Any) -> None:
    example = conversation(USER, {**PARIS, "weight": 0}, MORE, {**ROME, "weight": 1})
    for template in (templates.CHATML, templates.TAGGED, TEMPLATE):
        (found,) = encoder(bytes_tokenizer, template).conversation(example)
        assert trained(bytes_tokenizer, [found])[0].startswith("Rome<|")
        assert "Paris" in bytes_tokenizer.decode(found.ids)


def test_calls_reach_the_template_as_objects(bytes_tokenizer: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    answered = {"role": "tool", "content": "2", "tool_call_id": "1"}
    example = conversation(
        USER, {"role": "assistant", "content": None, "tool_calls": [call]}, answered, ROME, tools=tools
    )
    first, last = encoder(bytes_tokenizer, templates.QWEN3).conversation(example)
    assert '"arguments": {"x": 1}' in trained(bytes_tokenizer, [first])[0]
    assert "Rome" in trained(bytes_tokenizer, [last])[0]


@pytest.mark.parametrize(
    ("template", "messages", "lost"),
    [
        ("PHI3", (USER, {"role": "tool", "content": "42", "tool_call_id": "1"}, ROME), "role 'tool'"),
        ("MISTRAL_LAST", (USER, {"role": "tool", "content": "42", "tool_call_id": "1"}, ROME), "role 'tool'"),
        ("CHATML", (USER,), "tool_calls"),
    ],
)
def test_a_template_that_drops_a_turn_is_refused(template: str, messages: Any, lost: str, bytes_tokenizer: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
    asked = {"role": "assistant", "content": "" if lost == "tool_calls" else "wait", "tool_calls": [call]}
    made = encoder(bytes_tokenizer, getattr(templates, template).replace("{{ m['content'] }}", "{{ m['content'] }}", 1))
    example = Conversation(
        tuple({k: v for k, v in m.items()} for m in (messages[0], asked, *messages[1:])),
        (False, True, *(m["role"] == "assistant" for m in messages[1:])),
    )
    with pytest.raises(LineError, match="leaves out") as error:
        made.conversation(example)
    assert lost in str(error.value) or "tool_calls" in str(error.value)


def test_developer_and_functions_are_read_in_their_new_form() -> None:
    called = {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}
    result = {"role": "function", "name": "f", "content": "1"}
    found = conversation(
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        USER, called, result, ROME, functions=[{"name": "f"}],
    )  # fmt: skip
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert found.messages[0]["content"] == "ab"
    assert found.messages[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    assert found.tools == ({"type": "function", "function": {"name": "f"}},)


# --- what does not fit -----------------------------------------------------------------------------


def test_whole_turns_are_cut_from_the_front(bytes_tokenizer: Any) -> None:
    example = conversation(SYSTEM, *TWO)
    made = encoder(bytes_tokenizer, templates.CHATML, max_length=130)
    found = made.conversation(example)
    texts = [bytes_tokenizer.decode(tokens.ids) for tokens in found]
    assert texts == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nCapital of France?<|im_end|>\n"
        "<|im_start|>assistant\nParis<|im_end|>\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOf Italy?<|im_end|>\n"
        "<|im_start|>assistant\nRome<|im_end|>\n",
    ]
    assert (made.cut, made.dropped) == (1, 0)


def test_an_answer_that_does_not_fit_is_left_out_whole(bytes_tokenizer: Any) -> None:
    made = encoder(bytes_tokenizer, templates.CHATML, max_length=40)
    assert made.conversation(conversation(USER, PARIS)) == []
    assert made.dropped == 1


def test_texts_become_pieces_and_prompts_lose_their_beginning(bytes_tokenizer: Any) -> None:
    made = encoder(bytes_tokenizer, "", max_length=8)
    pieces = made.text(Text("", "0123456789"))
    assert [bytes_tokenizer.decode(piece.ids) for piece in pieces] == ["01234567", "89</s>"]
    (cut,) = made.text(Text("abcdefgh", "xyz"))
    assert (bytes_tokenizer.decode(cut.ids), trained(bytes_tokenizer, [cut])) == ("efghxyz</s>", ["xyz</s>"])
    assert made.text(Text("a", "too long to fit")) == []
    assert (made.cut, made.dropped) == (1, 1)


# --- lines -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"messages": []}, "at least one message"),
        ({"messages": [PARIS], "weight": 1}, 'extra "weight" .weight belongs'),
        ({"messages": [{"content": "x"}]}, "message 1 Discriminator 'role' is missing"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "role 'bot'"),
        ({"messages": [{"role": "user"}, PARIS]}, "message 1 has no 'content'"),
        ({"messages": [USER]}, "no message of the assistant"),
        ({"messages": [{**PARIS, "weight": 0}]}, "weight 0"),
        ({"messages": [{**PARIS, "weight": 0.5}]}, "expected 0 .context. or 1"),
        ({"messages": [{**USER, "weight": 1}, PARIS]}, "extra \"weight\""),
        ({"messages": [{"role": "assistant", "content": None}]}, "neither content nor tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, PARIS]}, "images and audio are not read"),
        ({"messages": [USER, {"role": "tool", "content": "x", "tool_call_id": "9"}, PARIS]}, "answers the call '9'"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {
            "name": "f", "arguments": "{"}}]}]}, "expected JSON"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"conversations": [{"from": "cat", "value": "x"}]}, "expected 'from'"),
        ({"instruction": "x"}, "there is no 'output'"),
        ({"input": {"messages": [USER]}, "preferred_output": [PARIS], "non_preferred_output": [PARIS]}, "equal"),
        ({"input": {"messages": [USER]}, "preferred_output": [PARIS], "non_preferred_output": [USER]}, "'assistant'"),
        ({"question": "x"}, "Unexpected file format"),
    ],
)  # fmt: skip
def test_a_wrong_line_says_what_is_wrong(line: dict[str, Any], said: str) -> None:
    with pytest.raises(LineError, match=said):
        read_line(line, form_of(line))


def test_other_forms_say_the_same() -> None:
    wanted = conversation(SYSTEM, USER, PARIS)
    alpaca = {"instruction": "Capital of", "input": "France?", "output": "Paris", "system": "Be brief."}
    turns = [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": "Paris"}]
    assert read_line({"conversations": turns, "system": "Be brief."}, "sharegpt") == wanted
    found = read_line(alpaca, form_of(alpaca))
    assert isinstance(found, Conversation)
    assert found.messages[1]["content"] == "Capital of\n\nFrance?"
    pair = {"input": {"messages": [USER]}, "preferred_completion": [PARIS], "non_preferred_completion": [ROME]}
    assert isinstance(read_line(pair, form_of(pair)), Preference)


def write(path: Path, *lines: Any) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return str(path)


def test_a_file_names_every_wrong_line_up_to_twenty(tmp_path: Path) -> None:
    bad = ["[1]", '{"a": 1, "a": 2}', '{"messages": NaN}', "{", "[" * 10_000, *[{"messages": []}] * 20]
    path = write(tmp_path / "a.jsonl", {"messages": [USER, PARIS]}, *bad)
    with pytest.raises(ArgumentError, match="25 of its lines") as error:
        ChatData(path).read()
    assert [f"line {n}:" in str(error.value) for n in range(1, 24)] == [False, *[True] * 20, False, False]
    assert "and 5 more" in str(error.value)


@pytest.mark.parametrize("raw", [b"\xff\xfe{}", b'{"messages": [\x00]}', b'{"messages": "\xc3\x28"}'])
def test_bytes_that_are_no_text_are_named(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" + raw)
    with pytest.raises(ArgumentError, match="line 2"):
        ChatData(str(path)).read()


def test_windows_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"messages": [USER, PARIS]})] * 3
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    assert sum(len(table) for table in ChatData(str(path)).read().values()) == 3


def test_preferences_and_conversations_are_not_mixed_up(tmp_path: Path) -> None:
    pair = {"input": {"messages": [USER]}, "preferred_output": [PARIS], "non_preferred_output": [ROME]}
    with pytest.raises(ArgumentError, match="PreferenceData"):
        ChatData(write(tmp_path / "a.jsonl", pair)).read()


# --- batches ---------------------------------------------------------------------------------------


def rows_of(sizes: list[int]) -> list[list[Tokens]]:
    return [[Tokens(tuple(range(1, n + 1)), (False, *(True,) * (n - 1)))] for n in sizes]


def test_no_example_is_cut_by_packing_and_no_row_overflows() -> None:
    sizes = [int(n) for n in torch.randint(1, 50, (200,), generator=torch.Generator().manual_seed(0))]
    examples = [row[0] for row in rows_of(sizes)]
    rows = packed(examples, 50)
    assert sorted(len(t.ids) for row in rows for t in row) == sorted(sizes)
    assert all(sum(len(t.ids) for t in row) <= 50 for row in rows)
    assert len(rows) <= 1.1 * sum(sizes) / 50 + 1


def test_packed_rows_begin_again_and_their_first_tokens_are_not_predicted() -> None:
    row = [Tokens((5, 6, 7), (False, True, True)), Tokens((8, 9), (True, True))]
    batch = Collator(pad=0, packing=True)([(row, 2.0), (row[:1], 2.0)])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9], [-100, 6, 7, -100, -100]]
    assert "attention_mask" not in batch
    assert trained_tokens(row) == 3


@pytest.mark.parametrize(("world", "window"), [(1, 1), (1, 4), (2, 1), (2, 3)])
def test_every_batch_knows_the_tokens_of_its_step(world: int, window: int) -> None:
    rows = rows_of([int(n) for n in torch.randint(2, 9, (23,), generator=torch.Generator().manual_seed(0))])
    seen: list[list[Any]] = []
    for rank in range(world):
        trainer = SimpleNamespace(world_size=world, global_rank=rank, accumulate_grad_batches=window)
        sampler = StepSampler(rows, 4, trainer, seed=3)
        assert len(sampler) == len(list(sampler))
        sampler.set_epoch(2)
        seen.append(list(sampler))
    batches = [[mine[at : at + 4] for at in range(0, len(mine), 4)] for mine in seen]
    for begin in range(0, len(batches[0]), window):
        step = [batch for mine in batches for batch in mine[begin : begin + window]]
        total = sum(trained_tokens(rows[row]) for batch in step for row, _ in batch)
        assert [per * window * world for batch in step for _, per in batch] == pytest.approx(
            [total] * sum(map(len, step))
        )
    used = [row for mine in seen for row, _ in mine]
    assert set(used) == set(range(23))
    assert len(used) == -(-23 // world) * world


def test_the_tokens_of_a_step_are_known_before_the_trainer_has_begun() -> None:
    """Processes that form batches read ahead of the schedule of accumulation, and of the number of batches."""
    rows = rows_of([int(n) for n in torch.randint(2, 9, (20,), generator=torch.Generator().manual_seed(0))])
    trainer = SimpleNamespace(
        world_size=1,
        global_rank=0,
        accumulate_grad_batches=1,
        num_training_batches=float("inf"),
        limit_train_batches=3,
        callbacks=[GradientAccumulationScheduler({0: 2, 1: 4})],
    )
    for epoch, windows in ((0, [2, 1]), (1, [3])):
        sampler = StepSampler(rows, 4, trainer, seed=3)
        sampler.set_epoch(epoch)
        found, begin = list(sampler), 0
        for batches in windows:
            step = found[begin * 4 : (begin + batches) * 4]
            total = sum(trained_tokens(rows[row]) for row, _ in step)
            assert step[0][1] * (2, 4)[epoch] == pytest.approx(total)
            begin += batches


def test_the_order_is_that_of_the_epoch() -> None:
    sampler = StepSampler(rows_of([2, 3, 4, 5, 6, 7, 8, 9]), 2, None, seed=0)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert len(Packs(rows_of([2]))) == 1


def test_prompts_are_padded_on_the_left(bytes_tokenizer: Any) -> None:
    made = encoder(bytes_tokenizer, templates.CHATML)
    rows = [(made.conversation(conversation(*messages)), 0.0) for messages in ((USER, PARIS), (MORE, ROME))]
    batch = Collator(0, prompts=True)(rows)
    texts = [
        bytes_tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    ]
    assert [text.endswith("<|im_start|>assistant\n") for text in texts] == [True, True]
    assert bool(batch["prompt_mask"][:, -1].all())
    assert "tokens_per_batch" not in batch


def test_the_date_chat_writes_characters() -> None:
    tokenizer = character_tokenizer()
    ids = tokenizer("<|user|>4 March<|end|>")["input_ids"]
    assert (len(tokenizer), len(ids), tokenizer.decode(ids)) == (101, 9, "<|user|>4 March<|end|>")


def test_conversations_that_end_with_a_question_are_answered(bytes_tokenizer: Any, tmp_path: Path) -> None:
    bytes_tokenizer.chat_template = TEMPLATE
    lines = [{"messages": [USER, PARIS, MORE]}, {"messages": [USER, PARIS, MORE, ROME]}, {"messages": [SYSTEM, USER]}]
    others = [
        ({"prompt": "a"}, "a"),
        ({"text": "b c"}, "b c"),
        ({"instruction": "d"}, None),
        ({"conversations": [{"from": "human", "value": "e"}]}, None),
    ]
    train = write(tmp_path / "train.jsonl", *[{"messages": [USER, PARIS]}] * 3)
    module = SimpleNamespace(tokenizer=bytes_tokenizer)
    data = ChatData(train, predict=write(tmp_path / "ask.jsonl", *lines))
    data.encode_splits(module, ["predict"])
    (found,) = data.loader("predict")
    asked = [row[mask.bool()] for row, mask in zip(found["prompt_ids"], found["prompt_mask"], strict=True)]
    assert torch.equal(asked[0], asked[1])  # what stands there as an answer is not shown
    for row, line in zip(asked, [lines[0], lines[0], lines[2]], strict=True):
        assert row.tolist() == ChatEncoder(bytes_tokenizer, 99).prompt(line["messages"])
    for line, text in others:
        data = ChatData(train, predict=write(tmp_path / "one.jsonl", line))
        data.encode_splits(module, ["predict"])
        (found,) = data.loader("predict")
        if text is not None:
            assert bytes_tokenizer.decode(found["prompt_ids"][0]) == text
    short = ChatData(train, predict=write(tmp_path / "ask.jsonl", *lines), max_length=8)
    with pytest.raises(ArgumentError, match="line 1: the last question alone is longer than max_length=8"):
        short.encode_splits(module, ["predict"])
