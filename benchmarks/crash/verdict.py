"""What the figures of each campaign must be."""

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
SURVIVOR_S = 30.0


def _zero(row: Row, *keys: str) -> list[str]:
    return [f"{key}={row[key]}, expected 0" for key in keys if row.get(key, 0)]


def _some(row: Row, *keys: str) -> list[str]:
    return [f"{key}={row[key]}: nothing was tried" for key in keys if not row[key]]


def _kills(row: Row) -> list[str]:
    if row["writer"].startswith("Lightning"):  # so that the campaign is known to find what it looks for
        return [] if row["torn"] + row["lost"] else ["a writer that is not durable passed"]
    few = row["kills"] < 100  # a save may be too quick to be hit
    return _zero(row, "torn", "lost", "left") + _some(row, "kills", *(() if few else ("hits",)))


def _chain(row: Row) -> list[str]:
    counts = ("torn", "lost", "from_zero", "restarts_wrong", "losses_differ", "failed", "left", "elsewhere", "hung")
    return _zero(row, *counts) + _some(row, "kills", "identical")


def _command(row: Row) -> list[str]:
    return _zero(row, "lost", "code") + _some(row, "kills", "went_on", "identical")


def _syscalls(row: Row) -> list[str]:
    return [] if "unavailable" in row else _zero(row, "torn", "lost") + _some(row, "old", "new", "killed", "order")


def _power_loss(row: Row) -> list[str]:
    if row["writer"] == "ours":
        return _zero(row, "torn", "lost") + _some(row, "states")
    return [] if row["torn"] + row["lost"] else ["the model found nothing in a writer that is not durable"]


def _full_disk(row: Row) -> list[str]:
    return _zero(row, "unclear", "torn", "temporary") + _some(row, "refused", "complete")


def _damage(row: Row) -> list[str]:
    return _some(row, "raised") if "raised" in row else _zero(row, "wrong") + _some(row, "passed_over")


def _interruptions(row: Row) -> list[str]:
    wrong = [f"{row[same]} of {row[count]}" for same, count in (("same", "points"), ("pairs_same", "pairs"))]
    return [text for text in wrong if len(set(text.split(" of "))) > 1] + _some(row, "points", "pairs")


def _ranks(row: Row) -> list[str]:
    late = [] if row["survivor_s"] <= SURVIVOR_S else [f"the survivor went on for {row['survivor_s']} s"]
    return (
        late + _zero(row, "hung") + [f"not {key}" for key in ("noticed", "kept", "resumed") if not row.get(key, True)]
    )


RULES: dict[str, Callable[[Row], list[str]]] = {
    "kills": _kills,
    "chain": _chain,
    "pairs": _chain,
    "command": _command,
    "syscalls": _syscalls,
    "power_loss": _power_loss,
    "full_disk": _full_disk,
    "damage": _damage,
    "interruptions": _interruptions,
    "ranks": _ranks,
}


def faults(results: dict[str, Any]) -> list[str]:
    """Everything that is not as it must be; empty if all is well."""
    found = []
    for name, campaign in results.items():
        for row in campaign["rows"]:
            first = next(iter(row.values()))
            found += [f"{name}, {first}: {text}" for text in RULES[name](row)]
    return found
