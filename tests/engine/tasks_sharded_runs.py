"""One of two processes that train several tasks on an engine that shards; in some steps one has no row of a task.

``python tasks_sharded_runs.py FOLDER ENGINE METHOD [refused]``, started by the launcher.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from ddp_runs import Mean  # noqa: E402  # it silences warnings and logs, too
from engines import make  # noqa: E402
from models import WIDTH, Module, Net, cosine, every_step, lora, trainer  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from lightning_pet import Adapted, TasksCallback  # noqa: E402
from lightning_pet.errors import PETError  # noqa: E402

TASKS = {"odd": {"seed": 1}, "even": {"seed": 2}}
TRAINED = ("001011", "000111", "111000", "010101")
GAP = (*TRAINED, "000000", "011010")  # in one step no process has a row of a task
SEEN = ("001011", "000000", "111111", "010101")
METHODS = {
    "lora": lambda dropout: lora(dropout=dropout, modules_to_save=[]),
    "heads": lambda dropout: lora(dropout=dropout),
}


def data(rank: int | None, orders: tuple[str, ...]) -> DataLoader:
    """Six rows a step; the first process has the first three. Some have no row of one task."""
    draw, found = torch.Generator().manual_seed(4), []
    for order in orders:
        x, y = torch.randn(6, WIDTH, generator=draw), torch.randint(0, 3, (6,), generator=draw)
        own = slice(None) if rank is None else slice(3 * rank, 3 * rank + 3)
        found.append((x[own], y[own], [list(TASKS)[int(i)] for i in order][own]))
    return DataLoader(found, batch_size=1, collate_fn=lambda rows: rows[0])  # DeepSpeed asks for a batch size


def run(
    folder: Path,
    engine: str | None,
    method: str,
    *,
    path: Path | None = None,
    dropout: float = 0.0,
    seed: int = 5,
    trained: tuple[str, ...] = TRAINED,
    seen: tuple[str, ...] = SEEN,
    **options: Any,
) -> Any:
    rank = None if engine is None else int(os.environ["RANK"])
    if engine is None:
        module: Any = Module(Net(dropout=dropout), cosine)
    else:
        module, strategy = make(engine, Mean, dropout)
        options |= {"strategy": strategy, "devices": 2}
    torch.manual_seed(seed)
    tasks = TasksCallback(tasks=TASKS, key=2, dirpath=str(folder / "tasks"))
    callbacks = [METHODS[method](dropout), tasks, every_step(folder)]
    fitted = trainer(*callbacks, limit_val_batches=1.0, use_distributed_sampler=False, **options)
    fitted.fit(module, data(rank, trained), data(rank, seen), ckpt_path=path)
    module.files = sorted(file.name for file in tasks.files.values())
    return module


def tried(*args: Any, **options: Any) -> Any:
    """The losses, or the error."""
    try:
        return run(*args, **options).losses
    except PETError as error:
        return f"{type(error).__name__}: {error}"


def main(folder: Path, engine: str, method: str, *words: str) -> dict[str, Any]:
    if words:
        return {words[0]: tried(folder, engine, method)}
    module = run(folder / "plain", engine, method)
    found = {"losses": module.losses, "files": module.files, "deltas": list(Adapted(module))}
    noisy = run(folder / "noisy", engine, method, dropout=0.3)
    resumed = folder / "noisy" / "step=3.ckpt"
    again = run(folder / "again", engine, method, dropout=0.3, path=resumed, seed=99)
    found |= {"noisy": noisy.losses, "again": again.losses}
    found["gap"] = tried(folder / "gap", engine, method, trained=GAP)
    found["seen"] = tried(folder / "seen", engine, method, seen=TRAINED)
    return found


if __name__ == "__main__":
    print("FOUND " + json.dumps(main(Path(sys.argv[1]), *sys.argv[2:])), flush=True)
