"""The documentation page of the results."""

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.crash.ranks import JOIN_LIMIT_S

Row = dict[str, Any]
Results = dict[str, Any]

HEAD = """\
# Reliability

What a crash may cost, and how that was tried. Each campaign interrupts the library where it writes or trains, looks
at what is left, and goes on from there. Any figure that must be 0 and is not makes the command fail.

```bash
python -m benchmarks.crash            # all campaigns; writes this page
python -m benchmarks.crash kills      # one of them
python -m benchmarks.crash --short    # what the test suite runs
```
"""
KILLS = """\
## Killed while saving

A process saves without pause and is killed (SIGKILL) at a random moment. *Torn* is a final name that holds neither
the old nor the new content, *lost* a save that had returned and is not there. *Temporary files* were found after that
many kills, so the kill had come within a save; the next start removes them when they are an hour old.
"""
SYSCALLS = """\
A save is also killed at each of its system calls in turn (by strace), those that only read included: afterwards the
name holds the old content or the new one, and the new one always if the save had returned. The order of the calls is:
new file in the destination folder, write, fsync, rename, fsync of the folder.
"""
POWER = """\
## Power loss

The operations of a save are recorded and replayed on a model of a file system: after every prefix of them, none, half
or all of the data that was not flushed is there, and the changes of folders that were not flushed are kept or undone.
The last rows are writers with a mistake each, which the model must find.
"""
DISK = """\
## Full disk

The operating system refuses to let a file grow over a limit, from nothing to more than a save needs. A refused save
raises `DeltaFileError` with code `io`, the path and the number of the error; the old file stays, and nothing
temporary is left.
"""
CHAIN = """\
## Killed again and again

A run with dropout, shuffling, AdamW and a schedule saves after every step. It is killed at random moments (one in
eight while it starts) and started again as a script would, from `last_good(folder)` or with `ckpt_path="last"`, under
another seed. It must end with the weights of a run that nobody touched, every loss on the way must be the same to the
last bit, and no restart may begin at step 0. Lightning's temporary folder was on another file system.
"""
COMMAND = """\
The same by the command line, each start a process of its own: `lightning-pet fit --ckpt_path=last-good …`.
"""
PAIRS = """\
Two processes write one checkpoint that resumes under every strategy. Killed was the first, the second, or both.
"""
INTERRUPT = """\
## Resumed at every step

Every method on a tiny BERT with dropout and shuffling, saved after each step and resumed from each; then each resumed
run again, from each of its own steps (*pairs*). *Points* counts dropout and shuffling, the same with a worker, with
accumulation over two batches, with validation within the epoch, and all of these together. Same means: every later
loss, validation and weight is equal to the last bit.
"""
RANKS = """\
## One process of two dies

The process kills itself at the given moment; nobody ends the other one. It must end by itself, with an error, within
30 seconds; the last good checkpoint must be the one saved last, and two new processes must bring the run to its end.
"""
JOINING = """\
Before all processes have joined the group, none can know that another one died: whoever waits goes on until the
strategy's `timeout` (30 minutes unless you set it, and once more as long if it is the first process that is missing).
A launcher that watches its processes ends them at once; `torchrun` does. Lightning's own launcher watches the
processes that it started, but nobody watches the one that started them. So either start with `torchrun`, or set the
time:

```python
from datetime import timedelta

trainer = Trainer(strategy=DDPStrategy(timeout=timedelta(minutes=5)))  # above your longest pause between steps
```

The rows *joining* were measured with a timeout of {limit} seconds, those of `torchrun` without one.
"""
DAMAGE = """\
## Damaged checkpoints

The newest of three checkpoints is damaged. `last_good` takes the second one and logs what is wrong with the first.
*Harmless* are bits that nobody reads (dates within the archive): the file gives what it gave before. If none
verifies, it raises.
"""
LIMITS = """\
## What this does not show

SIGKILL does not lose what the operating system holds in memory; power loss is a model. One disk, no network file
system, CPU only. Kernels that are not deterministic make a resumed run differ on a GPU as they make two runs differ.
"""


def text(results: Results) -> str:
    """Markdown of all campaigns that were run."""
    parts = [
        HEAD,
        _section(results, KILLS, "kills", KILL_COLUMNS),
        _section(results, SYSCALLS, "syscalls", CALL_COLUMNS),
        _section(results, POWER, "power_loss", POWER_COLUMNS),
        _section(results, DISK, "full_disk", DISK_COLUMNS),
        _section(results, CHAIN, "chain", CHAIN_COLUMNS),
        _section(results, COMMAND, "command", COMMAND_COLUMNS),
        _section(results, PAIRS, "pairs", PAIR_COLUMNS),
        _section(results, INTERRUPT, "interruptions", INTERRUPT_COLUMNS),
        _section(results, RANKS, "ranks", RANK_COLUMNS),
        JOINING.format(limit=JOIN_LIMIT_S) if "ranks" in results else "",
        _section(results, DAMAGE, "damage", DAMAGE_COLUMNS),
        LIMITS,
        _versions(results),
    ]
    return "\n".join(part for part in parts if part)


Column = tuple[str, Callable[[Row], object]]


def _key(key: str) -> Callable[[Row], object]:
    return lambda row: row.get(key, "")


def _yes(key: str) -> Callable[[Row], object]:
    return lambda row: "yes" if row.get(key) else "no" if key in row else ""


def _callback(row: Row) -> str:
    saved = '"link"' if row["save_last"] == "link" else row["save_last"]
    resumed = 'ckpt_path="last"' if row["resume"] == "last" else "last_good"
    return f"`save_last={saved}`, `{resumed}`"


ENGINES = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2"}
COUNTED: list[Column] = [("kills", _key("kills")), ("torn", _key("torn")), ("lost", _key("lost"))]
KILL_COLUMNS: list[Column] = [
    ("writer", _key("writer")),
    *COUNTED,
    ("with temporary files", _key("hits")),
    ("left", _key("left")),
]
CALL_COLUMNS: list[Column] = [
    ("writer", _key("writer")),
    ("killed at", _key("killed")),
    ("old", _key("old")),
    ("new", _key("new")),
    ("torn", _key("torn")),
    ("lost", _key("lost")),
    ("order", lambda row: "as above" if row.get("order") else "other"),
]
POWER_COLUMNS: list[Column] = [
    ("saved", _key("saved")),
    ("writer", lambda row: row["writer"] if row["writer"] == "ours" else f"`{row['writer']}`"),
    ("states", _key("states")),
    ("torn", _key("torn")),
    ("lost", _key("lost")),
]
DISK_COLUMNS: list[Column] = [
    ("writer", _key("writer")),
    ("limits", _key("limits")),
    ("refused", _key("refused")),
    ("complete", _key("complete")),
    ("other errors", _key("unclear")),
    ("old file lost", _key("torn")),
    ("temporary files", _key("temporary")),
]
CHAIN_COLUMNS: list[Column] = [
    ("method", _key("subject")),
    ("saved and resumed with", _callback),
    ("steps", _key("run")),
    *COUNTED,
    ("restarts at 0", _key("from_zero")),
    ("losses that differ", _key("losses_differ")),
    ("same weights", _yes("identical")),
]
COMMAND_COLUMNS: list[Column] = [
    ("steps", _key("steps")),
    ("kills", _key("kills")),
    ("resumed", _key("went_on")),
    ("lost", _key("lost")),
    ("same weights", _yes("identical")),
]
PAIR_COLUMNS: list[Column] = [
    ("engine", lambda row: ENGINES[row["engine"]]),
    ("steps", _key("run")),
    *COUNTED,
    ("restarts at 0", _key("from_zero")),
    ("hung", _key("hung")),
    ("longest survival", lambda row: f"{row.get('longest_s', 0)} s"),
    ("losses that differ", _key("losses_differ")),
    ("same weights", _yes("identical")),
]
INTERRUPT_COLUMNS: list[Column] = [
    ("method", _key("method")),
    ("points", _key("points")),
    ("same", _key("same")),
    ("pairs", _key("pairs")),
    ("same", _key("pairs_same")),
]
RANK_COLUMNS: list[Column] = [
    ("engine", lambda row: ENGINES[row["engine"]]),
    ("started by", lambda row: {"lightning": "Lightning"}.get(row["launcher"], row["launcher"])),
    ("dies", _key("phase")),
    ("rank", _key("victim")),
    ("the other ended after", lambda row: f"{row['survivor_s']} s" + (" (killed)" if row["hung"] else "")),
    ("last good step", lambda row: row["step"] or "none yet"),
    ("went on", _yes("resumed")),
]
DAMAGE_COLUMNS: list[Column] = [
    ("damage", _key("damage")),
    ("files", _key("files")),
    ("passed over", lambda row: row.get("passed_over", "raised" if row.get("raised") else "")),
    ("harmless", _key("harmless")),
    ("taken though different", _key("wrong")),
]


def _section(results: Results, head: str, name: str, columns: list[Column]) -> str:
    rows = [row for row in results.get(name, {"rows": []})["rows"] if "unavailable" not in row]
    return f"{head}\n{_table(columns, rows)}\n" if rows else ""


def _table(columns: list[Column], rows: Iterable[Row]) -> str:
    lines = [[title for title, _ in columns], ["---"] * len(columns)]
    lines += [[str(value(row)) for _, value in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _versions(results: Results) -> str:
    keys = ("torch", "lightning", "transformers", "python")
    found = {key: sorted({campaign[key] for campaign in results.values()}) for key in keys}
    dates = sorted({campaign["date"] for campaign in results.values()})
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    versions = ", ".join(f"{key} {' and '.join(found[key])}" for key in keys)
    return f"Measured {days} with {versions}, on CPUs, Linux.\n"
