"""The shipped configurations: where they are, how they are called, and how a complete one is put together."""

import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from lightning_pet.errors import ArgumentError

GROUPS = {"": "tasks", "method": "methods, on top of a task", "trainer": "engines and devices, on top of a task"}
"""Folders of the configurations, with what they hold."""

_WORDS = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")  # which YAML does not read as texts


def config_folder() -> Path:
    """Where the shipped configurations lie: in the installed package, or beside it in a checkout."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "configs"


def names(group: str) -> list[str]:
    """Names of the configurations of a group, such as ``method/lora``."""
    return sorted((Path(group) / path.stem).as_posix() for path in (config_folder() / group).glob("*.yaml"))


def find(name: str) -> Path | None:
    """The file of a shipped configuration; ``name`` may be written as its path in the repository, too."""
    plain = name.removeprefix("configs/").removesuffix(".yaml")
    known = {known for group in GROUPS for known in names(group)}
    return config_folder() / f"{plain}.yaml" if plain in known else None


def summary(name: str) -> str:
    """What a configuration is for: its first comment, up to the first stop."""
    head = (config_folder() / f"{name}.yaml").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    comment = [line.removeprefix("# ") for line in head if line.startswith("# ")]
    return re.split(r"[.:;,](?: |$)", " ".join(comment), maxsplit=1)[0]


def with_shipped(arguments: Sequence[str]) -> list[str]:
    """Arguments of a verb, with the file in place of the name of a shipped configuration after ``-c``.

    A file of the user's that has the name comes first.

    Raises:
        ArgumentError: if there is neither.
    """
    found: list[str] = []
    for argument in arguments:
        after = bool(found) and found[-1] in ("-c", "--config")
        option, equals, value = argument.partition("=")
        if after:
            found.append(_file(argument))
        elif equals and option == "--config":
            found.append(f"{option}={_file(value)}")
        else:
            found.append(argument)
    return found


def _file(name: str) -> str:
    if Path(name).is_file() or not re.fullmatch(r"[\w./~-]+", name):
        return name
    if (shipped := find(name)) is not None:
        return str(shipped)
    known = [known for group in GROUPS for known in names(group)]
    plain = name.removesuffix(".yaml").rpartition("/")[2]
    same = [k for k in known if k.rpartition("/")[2] == plain]
    near = same or get_close_matches(name.removeprefix("configs/").removesuffix(".yaml"), known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ArgumentError(
        f"-c {name}: there is no such file here, and no shipped configuration of this name. "
        f"'lightning-pet list' shows those.{hint}"
    )


def compose(task: str, method: str | None, data: str | None, columns: Mapping[str, str]) -> str:
    """Put a complete configuration together, with the comments of its parts.

    Args:
        task: name of a task.
        method: name of a method (``lora``); ``None`` keeps the task's own.
        data: file, folder or hub data set to train on, for the tasks that take one.
        columns: what the columns of the data are called, by what they are for.

    Raises:
        ArgumentError: if there is no such task or method, or the task's data is not the user's to choose.
    """
    sections = _sections(_text("", task))
    if method is not None:
        text = _text("method", method)
        sections["pet"] = _sections(text)["pet"]
        if rate := re.search(r"^#.*--model\.optimizer\.lr=([\d.e-]+)", text, flags=re.M):  # what its own command says
            sections["model"] = re.sub(
                r"(?m)^(        lr: ).*$", rf"\g<1>{float(rate[1])}  # of this method's size", sections["model"]
            )
    sections["data"] = _with_data(task, sections["data"], data, columns)
    usual: tuple[str, ...] = ("seed_everything", "trainer", "pet", "model", "data")
    order = [key for key in usual if key in sections]
    return "".join(sections[key] for key in [*order, *(key for key in sections if key not in order)])


def _text(group: str, name: str) -> str:
    known = names(group)
    full = name if name in known else (Path(group) / name).as_posix()
    if full not in known:
        near = get_close_matches(full, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        what = "method" if group else "task"
        raise ArgumentError(f"there is no {what} {name!r}; there are {', '.join(known)}.{hint}")
    return (config_folder() / f"{full}.yaml").read_text(encoding="utf-8")


def _sections(text: str) -> dict[str, str]:
    """The blocks of a configuration by their keys, without the comments at its head."""
    parts = re.split(r"(?m)^(?=\w+:)", text)[1:]
    return {part.partition(":")[0]: part.rstrip("\n") + "\n" for part in parts}


def takes_data(task: str) -> bool:
    """Whether a task trains on data that the user names."""
    return re.search(r"(?m)^    train:", _sections(_text("", task))["data"]) is not None


def mapped_columns(task: str) -> dict[str, str]:
    """What a task's configuration calls the columns of its data, by what they are for."""
    line = re.search(r"(?m)^    columns: \{(.*)\}", _sections(_text("", task))["data"])
    return dict(re.findall(r"(\w+): *(\w+)", line.group(1))) if line else {}


def _with_data(task: str, section: str, data: str | None, columns: Mapping[str, str]) -> str:
    takes = [name for name in names("") if takes_data(name)]
    if task not in takes:
        if data is not None or columns:
            raise ArgumentError(f"{task} brings its own data; a file of yours goes with {', '.join(takes)}.")
        return section
    if data is None:
        raise ArgumentError(f"{task} trains on data of yours: give --data, a file such as reviews.csv or a folder.")
    section = re.sub(r"(?m)^    train:.*$", lambda _: f"    train: {_scalar(data)}", section)
    known = mapped_columns(task)
    if unknown := sorted(set(columns) - set(known)):
        raise ArgumentError(f"columns: {task} has no {', '.join(unknown)}; it reads {', '.join(known) or 'text'}.")
    values = ", ".join(f"{key}: {_scalar(value)}" for key, value in {**known, **columns}.items())
    return re.sub(r"(?m)^    columns: \{.*\}", lambda _: f"    columns: {{{values}}}", section)


def _scalar(text: str) -> str:
    """A text as YAML."""
    plain = re.fullmatch(r"[A-Za-z_][\w./-]*", text) and text.lower() not in _WORDS
    return text if plain else json.dumps(text, ensure_ascii=False)
