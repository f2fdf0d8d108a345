"""One of two processes, in one of which something goes wrong; prints what each raised, and after how long, as JSON.

``python one_rank_runs.py FOLDER ENGINE``, started by ``launch``.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from ddp_runs import Dealt, Mean  # noqa: E402  # it silences warnings and logs, too
from engines import make  # noqa: E402
from models import Data, Module, Net, every_step, is_pristine, lora, trainer  # noqa: E402

RANK = int(os.environ["RANK"])


def fit(engine: str, *callbacks: Any, path: Any = None, change: Callable[[Any], None] | None = None) -> Any:
    module, strategy = make(engine, Mean, 0.0)
    if change is not None:
        change(module)
    run = trainer(*callbacks, strategy=strategy, devices=2, use_distributed_sampler=False, max_epochs=1)
    try:
        run.fit(module, datamodule=Dealt(batch_size=2), ckpt_path=path)
    except BaseException:
        if engine == "ddp" and path is None and change is None:
            assert is_pristine(module)
        raise


def fails(engine: str, folder: Path) -> dict[str, Callable[[], Any]]:
    def breaks(*args: Any) -> Any:
        raise RuntimeError("this process is out of memory")

    broken = lora()
    if RANK == 1:
        broken.build = breaks
    good, bad = folder / "step=2.ckpt", folder / "bad.ckpt"
    if RANK == 0:
        bad.write_bytes(good.read_bytes()[:-100])
    return {
        "options": lambda: fit(engine, lora(r=4 if RANK == 0 else 2)),
        "places": lambda: fit(engine, lora(target_modules=["fc1", "fc2"] if RANK == 0 else ["fc1"])),
        "insertion": lambda: fit(engine, broken),
        "start_from": lambda: fit(engine, lora(start_from=str(good if RANK == 0 else folder / "absent.ckpt"))),
        "ckpt_path": lambda: fit(engine, lora(), path=bad if RANK == 0 else good),
    }


def dies(engine: str) -> None:
    """The module's own ``setup`` fails in one process, which ends."""

    def change(module: Any) -> None:
        def setup(stage: str) -> None:
            raise MemoryError("too large")

        if RANK == 1:
            module.setup = setup

    fit(engine, lora(), change=change)


def main(folder: Path, engine: str) -> None:
    fit(engine, lora(), every_step(folder))
    if RANK == 0:  # a Trainer of its own in one process, as users test after training: it waits for nobody
        alone = Module(Net(dropout=0))
        run = trainer(lora(), every_step(folder / "alone"), max_epochs=1)
        run.fit(alone, datamodule=Data(), ckpt_path=folder / "step=2.ckpt")
        run.validate(alone, datamodule=Data(), verbose=False)
    cases = fails(engine, folder) | {"death": lambda: dies(engine)}
    for name, case in cases.items():
        began, text = time.monotonic(), ""
        try:
            case()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        found = {"case": name, "error": text, "seconds": time.monotonic() - began}
        print("FOUND " + json.dumps(found), flush=True)
    os._exit(0)  # without a word to the other process


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
