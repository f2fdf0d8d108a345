"""One of two processes that train beside a penalty, then with diff pruning; prints one line of JSON.

``python penalised_ddp.py FOLDER``, started by the launcher.
"""

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

import torch  # noqa: E402
from diff_runs import diff, flat  # noqa: E402
from models import Data, Module, Net, cosine, digest, every_step, trainer  # noqa: E402
from penalised import train  # noqa: E402

CELLS: list[dict[str, Any]] = [
    {},
    {"reentrant": True},
    {"reentrant": False, "accumulate_grad_batches": 2},
    {"strategy": "ddp_find_unused_parameters_true"},
]


def penalised() -> list[list[list[float]]]:
    """For every cell: the gradients of the side loss, and those of the penalty added by hand.

    By hand, a reentrant recomputation does not work under DDP.
    """
    found = []
    for cell in CELLS:
        options = {"strategy": "ddp", "devices": 2, **cell}
        pair = [train(add, **options)[1].steps for add in (False, True) if not (add and cell.get("reentrant"))]
        found.append([[value for step in steps for p in step for value in p.flatten().tolist()] for steps in pair])
    return found


def pruned(folder: Path, path: Path | None = None, seed: int = 5) -> dict[str, Any]:
    """A run of diff pruning."""
    module = Module(Net(dropout=0.0), cosine)
    torch.manual_seed(seed)
    fitted = trainer(diff(), every_step(folder), strategy="ddp", devices=2)
    fitted.fit(module, datamodule=Data(batch_size=2), ckpt_path=path)
    return {"digest": digest(module), "losses": module.losses, "kept": int(flat(module).count_nonzero())}


def main(folder: Path) -> dict[str, Any]:
    """Everything."""
    whole = pruned(folder / "whole")
    again = [pruned(folder / f"from{n}", folder / "whole" / f"step={n}.ckpt", seed=99) for n in (3, 6, 8)]
    return {"penalised": penalised(), "pruned": whole, "again": again}


if __name__ == "__main__":
    print("FOUND " + json.dumps(main(Path(sys.argv[1]))), flush=True)
