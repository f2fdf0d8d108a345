"""Conversations as token ids by the model's own template, and which of the tokens are trained.

The template decides what the model sees; three means say which of it the assistant has said, tried in this order:
the template's own marks (``{% generation %}``), spans of one rendering, and one rendering per trained turn. The last is
right wherever what precedes an answer is what the model will be given when it has to write it.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from lightning_pet.data.chat.messages import Conversation, LineError, Message, Text
from lightning_pet.errors import ArgumentError
from lightning_pet.model.tokens import IGNORED

_SENTINEL: Final = "zqx7 sentinel"
_GENERATION: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Tokens:
    """One example of a causal language model.

    Attributes:
        ids: tokens.
        trained: of each token, whether it is learnt.
    """

    ids: tuple[int, ...]
    trained: tuple[bool, ...]

    @property
    def labels(self) -> list[int]:
        """Token ids where they are learnt, else -100."""
        return [token if learnt else IGNORED for token, learnt in zip(self.ids, self.trained, strict=True)]

    @property
    def prompt(self) -> int:
        """Number of tokens before the last trained run; all of them where nothing is trained."""
        if not any(self.trained):
            return len(self.ids)
        end = len(self.trained) - self.trained[::-1].index(True)
        begin = end
        while begin and self.trained[begin - 1]:
            begin -= 1
        return begin


class ChatEncoder:
    """Renders conversations with a tokenizer's chat template.

    Args:
        tokenizer: of Hugging Face.
        max_length: longest example in tokens. Longer conversations lose whole turns from the front, never the
            system's message nor the last question.

    Attributes:
        cut: number of examples that have lost turns.
        dropped: number of answers that do not fit and were left out.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.cut = self.dropped = 0
        template = getattr(tokenizer, "chat_template", None)
        self._template = template if isinstance(template, str) else ""
        # Tokenizers in Python cannot tell which token a character became.
        self._marks = bool(_GENERATION.search(self._template)) and bool(getattr(tokenizer, "is_fast", False))
        self._seen: set[tuple[str, bool]] = set()

    # --- texts ---------------------------------------------------------------------------------------

    def text(self, example: Text) -> list[Tokens]:
        """A prompt and its completion, or pieces of a long text."""
        end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        prompt, completion = self._ids(example.prompt), [*self._ids(example.completion), *end]
        begin = self._begin()
        if not example.prompt:
            room = max(self.max_length - len(begin), 1)
            pieces = [completion[at : at + room] for at in range(0, len(completion), room)]
            return [Tokens((*begin, *ids), (*(False for _ in begin), *(True for _ in ids))) for ids in pieces]
        room = self.max_length - len(begin) - len(completion)
        if room < 1:
            self.dropped += 1
            return []
        self.cut += room < len(prompt)
        ids = (*begin, *prompt[-room:], *completion)
        return [Tokens(ids, tuple(place >= len(ids) - len(completion) for place in range(len(ids))))]

    def _begin(self) -> list[int]:
        token = self.tokenizer.bos_token_id
        return [token] if token is not None and self.tokenizer("a")["input_ids"][:1] == [token] else []

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return ids

    # --- conversations -------------------------------------------------------------------------------

    def conversation(self, example: Conversation) -> list[Tokens]:
        """A conversation as one example, or as one per trained turn where the template rewrites earlier turns.

        Raises:
            LineError: the template refuses or drops a turn, or cannot be split into what is given and what is said.
        """
        self._check_seen(example)
        whole = self._whole(example)
        parts = [whole] if whole is not None else [self._turn(example, turn) for turn in _trained(example)]
        fitting = [part for part in parts if len(part.ids) <= self.max_length]
        if len(fitting) == len(parts):
            return fitting
        return [found for found in (self._shortened(example, turn) for turn in _trained(example)) if found is not None]

    def asked(self, example: Conversation | Text) -> Tokens:
        """What the model is given to write the last answer of a conversation, or the next; nothing is trained.

        Raises:
            LineError: the last question does not fit, or the template refuses or drops a turn.
        """
        if isinstance(example, Text):
            begin, given = self._begin(), self._ids(example.prompt or example.completion)
            room = max(self.max_length - len(begin), 1)
            self.cut += len(given) > room
            ids = [*begin, *given[-room:]]
            return Tokens(tuple(ids), (False,) * len(ids))
        self._check_seen(example)
        messages = example.messages[: -1 if example.messages[-1]["role"] == "assistant" else None]
        for tried, kept in enumerate(_later(messages, len(messages))):
            ids = self.prompt(kept, example.tools)
            if len(ids) <= self.max_length:
                self.cut += tried > 0
                return Tokens(tuple(ids), (False,) * len(ids))
        raise LineError(f"the last question alone is longer than max_length={self.max_length} tokens")

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[int]:
        """What the model is given to write the next answer."""
        return self._ids(self._render(messages, tools, ask=True))

    def _shortened(self, example: Conversation, turn: int) -> Tokens | None:
        """The answer of a turn after as many earlier turns as fit."""
        for tried, kept in enumerate(_later(example.messages, turn)):
            trained = (*(False for _ in kept[:-1]), True)
            found = self._turn(replace(example, messages=kept, trained=trained), len(kept) - 1)
            if len(found.ids) <= self.max_length:
                self.cut += tried > 0
                return found
        self.dropped += 1
        return None

    def _whole(self, example: Conversation) -> Tokens | None:
        return (self._marked(example) if self._marks else None) or self._spans(example)

    def _marked(self, example: Conversation) -> Tokens | None:
        """By the marks of the template, if it has one run of them for each of the assistant's turns."""
        done = self.tokenizer.apply_chat_template(
            list(example.messages), tools=_listed(example), return_dict=True, return_assistant_tokens_mask=True
        )
        mask = [bool(value) for value in done["assistant_masks"]]
        runs = [place for place in range(len(mask)) if mask[place] and not (place and mask[place - 1])]
        answers = [turn for turn, message in enumerate(example.messages) if message["role"] == "assistant"]
        if len(runs) != len(answers):
            return None
        learnt = dict(zip(runs, (example.trained[turn] for turn in answers), strict=True))
        trained, current = [], False
        for place, inside in enumerate(mask):
            current = learnt.get(place, current)
            trained.append(inside and current)
        return Tokens(tuple(done["input_ids"]), tuple(trained)) if any(trained) else None

    def _spans(self, example: Conversation) -> Tokens | None:
        """By the places of the turns in one rendering, if every turn stands there as it does when it is the last."""
        full = self._render(example.messages, example.tools)
        ids: list[int] = []
        trained: list[bool] = []
        done = 0
        for turn in _trained(example):
            begin = self._render(example.messages[:turn], example.tools, ask=True)
            end = self._render(example.messages[: turn + 1], example.tools)
            if not (full.startswith(begin) and full.startswith(end) and end.startswith(begin)) or len(begin) < done:
                return None
            # Apart, as when the model writes: a tokenizer may merge across the border.
            for text, learnt in ((full[done : len(begin)], False), (full[len(begin) : len(end)], True)):
                ids += (piece := self._ids(text))
                trained += [learnt] * len(piece)
            done = len(end)
        ids += (rest := self._ids(full[done:]))
        trained += [False] * len(rest)
        return Tokens(tuple(ids), tuple(trained))

    def _turn(self, example: Conversation, turn: int) -> Tokens:
        begin = self._render(example.messages[:turn], example.tools, ask=True)
        end = self._render(example.messages[: turn + 1], example.tools)
        if not end.startswith(begin):
            raise LineError(
                f"the chat template writes message {turn + 1} otherwise than behind what the model is given to answer "
                "it, so the template cannot be split exactly. Put the system's message into the first question, or "
                "mark the answers in the template ({% generation %})"
            )
        prompt, answer = self._ids(begin), self._ids(end[len(begin) :])
        return Tokens((*prompt, *answer), (*(False for _ in prompt), *(True for _ in answer)))

    def _render(self, messages: Sequence[Message], tools: Sequence[Any] | None, ask: bool = False) -> str:
        if not self._template:
            raise ArgumentError(
                f"the tokenizer {self.tokenizer.name_or_path!r} has no chat template, so it does not say how a "
                "conversation is written. Use an instruction-tuned model, set tokenizer.chat_template, or give texts "
                "or prompt/completion pairs."
            )
        try:
            rendered: str = self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) if tools else None, tokenize=False, add_generation_prompt=ask
            )
        except Exception as error:  # whatever a template raises
            roles = ", ".join(message["role"] for message in messages)
            raise LineError(f"the chat template refuses the roles {roles}: {error}") from error
        return rendered

    def _check_seen(self, example: Conversation) -> None:
        """Every kind of turn comes back from the template: some drop what they do not know."""
        for turn, message in enumerate(example.messages):
            kind = (message["role"], "tool_calls" in message)
            if kind in self._seen:
                continue
            content = _SENTINEL if message["content"] else ""
            shown = [*example.messages[:turn], {**message, "content": content}, *example.messages[turn + 1 :]]
            rendered = self._render(shown, example.tools)
            for answer in [answer for answer in _trained(example) if answer > turn][:1]:
                rendered += self._render(shown[:answer], example.tools, ask=True)
            wanted = [content, *(call["function"]["name"] for call in message.get("tool_calls", ()))]
            lost = [text for text in wanted if text not in rendered]
            if lost:
                what = f"content of the role {kind[0]!r}" if lost == [_SENTINEL] else "tool_calls"
                raise LineError(
                    f"the chat template leaves out the {what} (message {turn + 1}), so the model would never see it. "
                    "Use a model whose template knows it, or write it into the text of another message"
                )
            self._seen.add(kind)


def _later(messages: Sequence[Message], turn: int) -> Iterator[tuple[Message, ...]]:
    """The messages up to a turn: all of them, then those from each later question on, behind the system's message."""
    system = [message for message in messages[:1] if message["role"] == "system"]
    starts = [n for n, message in enumerate(messages[:turn]) if message["role"] == "user"]
    for tried, start in enumerate(starts or [0]):
        begin = start if tried else 0
        yield (*(system if begin else ()), *messages[begin : turn + 1])


def _trained(example: Conversation) -> list[int]:
    return [turn for turn, learnt in enumerate(example.trained) if learnt]


def _listed(example: Conversation) -> list[Any] | None:
    return list(example.tools) if example.tools else None
