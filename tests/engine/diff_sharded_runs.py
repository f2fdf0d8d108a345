"""One of two processes of diff pruning on an engine that shards; prints what it found as one line of JSON.

``python diff_sharded_runs.py FOLDER ENGINE``, started by ``launch``. ``FOLDER/single`` has checkpoints of one process.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from ddp_runs import Dealt, Mean  # noqa: E402  # it silences warnings and logs, too
from diff_runs import CLIPPED, diff  # noqa: E402
from engines import make  # noqa: E402
from models import every_step, trainer  # noqa: E402

from lightning_pet.errors import PETError  # noqa: E402
from lightning_pet.operations.delta import save_delta  # noqa: E402


def run(folder: Path, engine: str, *, path: Path | None = None, seed: int = 5, method: str = "fit", **options: Any):
    """One fit (or validate)."""
    module, strategy = make(engine, Mean, 0.0)
    torch.manual_seed(seed)
    callback = diff(**CLIPPED, **options)
    callbacks = [callback, *([every_step(folder)] if method == "fit" else [])]
    fitted = trainer(*callbacks, strategy=strategy, devices=2, use_distributed_sampler=False, log_every_n_steps=1)
    getattr(fitted, method)(module, datamodule=Dealt(batch_size=2), ckpt_path=path)
    return module.losses, fitted, callback


def main(folder: Path, engine: str) -> dict[str, Any]:
    """Train, resume before, at and after the cut, and start from files."""
    found: dict[str, Any] = {}
    found["losses"], fitted, callback = run(folder / "plain", engine)
    found["history"] = callback._curve.history
    fitted.save_checkpoint(folder / "after.ckpt")
    if "-" not in engine:
        save_delta(fitted.lightning_module, folder / "delta.pet.safetensors")
    found["again"] = {
        n: run(folder / f"from{n}", engine, path=folder / "plain" / f"step={n}.ckpt", seed=99)[0] for n in (3, 6, 8)
    }
    if "-" in engine:
        return found
    found["single"] = {
        n: run(folder / f"single{n}", engine, path=folder / "single" / f"step={n}.ckpt", seed=98)[0] for n in (3, 8)
    }
    for n in (3, 8):
        _, checked, _ = run(folder, engine, path=folder / "plain" / f"step={n}.ckpt", method="validate")
        checked.save_checkpoint(folder / f"validated{n}.ckpt", weights_only=True)
    found["started"] = run(folder / "started", engine, start_from=str(folder / "after.ckpt"))[0]
    started = folder / "started" / "step=4.ckpt"
    found["restarted"] = run(folder / "restarted", engine, path=started, start_from=str(folder / "after.ckpt"))[0]
    try:
        run(folder / "refused", engine, state="bf16")
    except PETError as error:
        found["refused"] = str(error)
    return found


if __name__ == "__main__":
    print("FOUND " + json.dumps(main(Path(sys.argv[1]), sys.argv[2])), flush=True)
