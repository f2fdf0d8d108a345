"""One line of a training file, checked as OpenAI checks it, in the one form that everything after it reads.

Facts of the format: https://platform.openai.com/docs/api-reference/fine-tuning (chat, preference, legacy completion).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

Format = Literal["auto", "chat", "completion", "sharegpt", "alpaca", "text", "preference"]
Message = dict[str, Any]
"""``role``, ``content`` (a text), and where they are set ``name``, ``tool_calls`` and ``tool_call_id``."""


class LineError(ValueError):
    """What is wrong with one line; the reader adds which line it is."""


@dataclass(frozen=True)
class Conversation:
    """Turns of a chat.

    Attributes:
        messages: normalised turns.
        trained: of each turn, whether the model is to learn it.
        tools: what the model may call, as the template takes them.
    """

    messages: tuple[Message, ...]
    trained: tuple[bool, ...]
    tools: tuple[dict[str, Any], ...] | None = None

    def only(self, turn: int) -> "Conversation":
        """The conversation up to ``turn``, of which that turn alone is trained."""
        kept = self.messages[: turn + 1]
        return replace(self, messages=kept, trained=(*(False for _ in kept[:-1]), True))


@dataclass(frozen=True)
class Text:
    """Plain text without a template.

    Attributes:
        prompt: context, not trained.
        completion: what the model is to learn.
    """

    prompt: str
    completion: str


@dataclass(frozen=True)
class Preference:
    """A conversation with two possible answers.

    Attributes:
        chosen: the conversation with the answer that is preferred.
        rejected: the same with the other.
    """

    chosen: Conversation
    rejected: Conversation


Example = Conversation | Text | Preference

# --- fields ----------------------------------------------------------------------------------------

_TOP: Final = ("messages", "tools", "parallel_tool_calls", "functions")
_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "system": ("role", "content", "name"),
    "developer": ("role", "content", "name"),
    "user": ("role", "content", "name"),
    "assistant": ("role", "content", "name", "weight", "refusal", "tool_calls", "function_call", "audio"),
    "tool": ("role", "content", "name", "tool_call_id"),
    "function": ("role", "content", "name"),
}


def _fields(value: Any, where: str, known: Sequence[str], needed: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise LineError(f"{where} is {_shown(value)}, expected an object")
    for key in needed:
        if key not in value:
            raise LineError(f"{where} has no {key!r}; it has {list(value)}")
    extra = [key for key in value if key not in known]
    if extra:
        hint = " (weight belongs into the assistant's message)" if "weight" in extra else ""
        raise LineError(f'{where} contains an extra "{extra[0]}"{hint}; expected some of {list(known)}')
    return value


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise LineError(f"{where} has the content {_shown(content)}, expected a text or a list of text parts")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
            raise LineError(f"{where} has a part of type {_shown(kind)}, expected text (images and audio are not read)")
        parts.append(part[kind])
    return "".join(parts)


# --- chat ------------------------------------------------------------------------------------------


def chat(line: Mapping[str, Any], answered: bool = True) -> Conversation:
    """``{"messages": [...]}`` with every role, tools, several turns, and weights of 0 or 1."""
    found = _fields(dict(line), "the line", _TOP, ["messages"])
    return _conversation(found, answered)


def _conversation(found: Mapping[str, Any], ends_with_answer: bool = True) -> Conversation:
    raw = found["messages"]
    if not isinstance(raw, list) or not raw:
        raise LineError(f"messages is {_shown(raw)}, expected a list with at least one message")
    messages, trained = [], []
    for index, value in enumerate(raw):
        message, learned = _message(value, f"message {index + 1}")
        messages.append(message)
        trained.append(learned)
    _check_calls(messages)
    if ends_with_answer and not any(message["role"] == "assistant" for message in messages):
        raise LineError("there is no message of the assistant, so nothing to learn")
    if ends_with_answer and not any(trained):
        raise LineError("every message of the assistant has weight 0, so nothing is trained; remove the line")
    return Conversation(tuple(messages), tuple(trained), _tools(found))


def _message(value: Any, where: str) -> tuple[Message, bool]:
    if not isinstance(value, dict):
        raise LineError(f"{where} is {_shown(value)}, expected an object with role and content")
    role = value.get("role")
    if "role" not in value:
        raise LineError(f"{where} Discriminator 'role' is missing in value; it has {list(value)}")
    if not isinstance(role, str) or role not in _KEYS:
        raise LineError(f"{where} has the role {_shown(role)}, expected one of {list(_KEYS)}")
    needed = {"assistant": (), "tool": ("content", "tool_call_id"), "function": ("content", "name")}
    _fields(value, where, _KEYS[role], needed.get(role, ("content",)))
    if role != "assistant" and value.get("content") is None:
        raise LineError(f"{where} has no content, expected a text")
    message: Message = {"role": _ROLES.get(role, role), "content": _text(value.get("content"), where)}
    for key in ("name", "tool_call_id"):
        if value.get(key) is not None:
            message[key] = _string(value[key], f"{key} of {where}")
    if role != "assistant":
        return message, False
    _add_answer(message, value, where)
    weight = value.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise LineError(f"{where} has the weight {_shown(weight)}, expected 0 (context) or 1 (trained)")
    return message, weight == 1


_ROLES: Final = {"developer": "system", "function": "tool"}


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise LineError(f"{where} is {_shown(value)}, expected a text")
    return value


def _add_answer(message: Message, value: Mapping[str, Any], where: str) -> None:
    if value.get("audio") is not None:
        raise LineError(f"{where} has audio, which is not read")
    if isinstance(value.get("refusal"), str) and not message["content"]:
        message["content"] = value["refusal"]
    calls = value.get("tool_calls")
    if value.get("function_call") is not None:  # the deprecated form of one call
        calls = [{"id": "call_0", "type": "function", "function": value["function_call"]}]
    if calls is not None:
        if not isinstance(calls, list) or not calls:
            raise LineError(f"{where} has the tool_calls {_shown(calls)}, expected a list of calls")
        message["tool_calls"] = [_call(call, f"call {n + 1} of {where}") for n, call in enumerate(calls)]
    if not message["content"] and calls is None:
        raise LineError(f"{where} has neither content nor tool_calls")


def _call(value: Any, where: str) -> dict[str, Any]:
    call = _fields(value, where, ("id", "type", "function"), ("id", "function"))
    if call.get("type", "function") != "function":
        raise LineError(f"{where} has the type {_shown(call['type'])}, expected 'function'")
    function = _fields(call["function"], f"the function of {where}", ("name", "arguments"), ("name", "arguments"))
    return {
        "id": _string(call["id"], f"id of {where}"),
        "type": "function",
        "function": {
            "name": _string(function["name"], f"name of {where}"),
            # Templates render an object as JSON, and a text as a text in quotes.
            "arguments": _arguments(function["arguments"], where),
        },
    }


def _arguments(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value or "{}")
        except (ValueError, RecursionError):
            raise LineError(f"{where} has the arguments {_shown(value)}, expected JSON") from None
    if not isinstance(value, dict):
        raise LineError(f"{where} has the arguments {_shown(value)}, expected a JSON object")
    return value


def _check_calls(messages: Sequence[Message]) -> None:
    known = {"call_0"}
    for index, message in enumerate(messages):
        known |= {call["id"] for call in message.get("tool_calls", ())}
        answered = message.get("tool_call_id")
        if answered is not None and answered not in known:
            raise LineError(f"message {index + 1} answers the call {answered!r}, which nobody has made before")


def _tools(found: Mapping[str, Any]) -> tuple[dict[str, Any], ...] | None:
    tools = found.get("tools")
    if found.get("functions") is not None:  # the deprecated form
        functions = found["functions"]
        if not isinstance(functions, list):
            raise LineError(f"functions is {_shown(functions)}, expected a list")
        tools = [{"type": "function", "function": function} for function in functions]
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise LineError(f"tools is {_shown(tools)}, expected a list")
    for number, tool in enumerate(tools, 1):
        _fields(tool, f"tool {number}", ("type", "function"), ("type", "function"))
        function = tool["function"]
        _fields(function, f"the function of tool {number}", ("name", "description", "parameters", "strict"), ("name",))
    return tuple(tools) or None


# --- preferences -----------------------------------------------------------------------------------


def preference(line: Mapping[str, Any], answered: bool = True) -> Preference:
    """``{"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}``."""
    found = {_OLD.get(key, key): value for key, value in line.items()}
    names = ("input", "preferred_output", "non_preferred_output")
    _fields(found, "the line", names, names)
    given = _fields(found["input"], "input", ("messages", "tools", "parallel_tool_calls"), ["messages"])
    context = _conversation(given, ends_with_answer=False)
    chosen, rejected = (_answer(found[name], name, context) for name in names[1:])
    if chosen == rejected:
        raise LineError("preferred_output and non_preferred_output are equal, so nothing is preferred; remove the line")
    return Preference(chosen, rejected)


_OLD: Final = {"preferred_completion": "preferred_output", "non_preferred_completion": "non_preferred_output"}


def _answer(value: Any, name: str, context: Conversation) -> Conversation:
    if not isinstance(value, list) or len(value) != 1:
        raise LineError(f"{name} is {_shown(value)}, expected a list with one message of the assistant")
    message, _ = _message(value[0], f"the message of {name}")
    if message["role"] != "assistant":
        raise LineError(f"{name} has the role {message['role']!r}, expected 'assistant'")
    untrained = tuple(False for _ in context.messages)
    return replace(context, messages=(*context.messages, message), trained=(*untrained, True))


# --- other people's forms --------------------------------------------------------------------------


def completion(line: Mapping[str, Any], answered: bool = True) -> Text:
    """``{"prompt": "...", "completion": "..."}``, without a template."""
    names = ("prompt", "completion")
    found = _fields(dict(line), "the line", names, names if answered else names[:1])
    if not answered:
        return Text(_string(found["prompt"], "prompt"), "")
    if not _string(found["completion"], "completion"):
        raise LineError("completion is empty, so nothing is trained")
    return Text(_string(found["prompt"], "prompt"), found["completion"])


def text(line: Mapping[str, Any], answered: bool = True) -> Text:
    """``{"text": "..."}`` (or ``content``, ``document``): every word is trained."""
    name = next((name for name in ("text", "content", "document") if name in line), None)
    if name is None:
        raise LineError(f"there is no 'text', only {list(line)}")
    if not _string(line[name], name):
        raise LineError(f"{name} is empty, so nothing is trained")
    return Text("", line[name]) if answered else Text(line[name], "")


def alpaca(line: Mapping[str, Any], answered: bool = True) -> Conversation:
    """``{"instruction": "...", "input": "...", "output": "..."}``, with ``system`` where there is one."""
    for name in ("instruction", "output") if answered else ("instruction",):
        if name not in line:
            raise LineError(f"there is no {name!r}, only {list(line)}")
    asked = [_string(line["instruction"], "instruction"), _string(line.get("input") or "", "input")]
    given = [("system", _string(line.get("system") or "", "system"))] if line.get("system") else []
    turns = [*given, ("user", "\n\n".join(filter(None, asked)))]
    if answered:
        turns.append(("assistant", _string(line["output"], "output")))
    return _conversation({"messages": [{"role": role, "content": content} for role, content in turns]}, answered)


_SHAREGPT: Final = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "system": "system",
}


def sharegpt(line: Mapping[str, Any], answered: bool = True) -> Conversation:
    """``{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}``."""
    turns = line.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise LineError(f"conversations is {_shown(turns)}, expected a list of turns")
    messages = [{"role": "system", "content": line["system"]}] if line.get("system") else []
    for number, turn in enumerate(turns, 1):
        sender = turn.get("from") if isinstance(turn, dict) else None
        if sender not in _SHAREGPT or not isinstance(turn.get("value"), str):
            known = ", ".join(_SHAREGPT)
            raise LineError(f"turn {number} is {_shown(turn)}, expected 'from' (one of {known}) and 'value' (a text)")
        messages.append({"role": _SHAREGPT[sender], "content": turn["value"]})
    return _conversation({"messages": messages}, answered)


_MAKERS: Final[Mapping[str, Callable[[Mapping[str, Any], bool], Example]]] = {
    "chat": chat,
    "completion": completion,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "text": text,
    "preference": preference,
}
_MARKS: Final[tuple[tuple[str, str], ...]] = (
    ("messages", "chat"),
    ("preferred_output", "preference"),
    ("preferred_completion", "preference"),
    ("conversations", "sharegpt"),
    ("instruction", "alpaca"),
    ("completion", "completion"),
    ("text", "text"),
    ("content", "text"),
    ("document", "text"),
    ("prompt", "completion"),
)
"""Keys by which a form is known, in this order."""


def form_of(line: Mapping[str, Any]) -> str:
    """The form that a line has, by its keys.

    Raises:
        LineError: none that is known.
    """
    for key, form in _MARKS:
        if key in line:
            return form
    raise LineError(
        f"the line has the keys {list(line)}. Unexpected file format, expected either prompt/completion pairs or chat "
        "messages (or ShareGPT, Alpaca, preferences, texts)"
    )


def read_line(line: Mapping[str, Any], form: str, answered: bool = True) -> Example:
    """One line in the common form.

    Args:
        line: the object.
        form: one of ``Format`` but ``auto``.
        answered: whether it has to hold an answer to learn; without one, it is there to be answered.

    Raises:
        LineError: what is wrong with it.
    """
    return _MAKERS[form](line, answered)
