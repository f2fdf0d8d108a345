"""One of two processes that train beside a penalty; prints its gradients as one line of JSON.

``python penalised_ddp.py``, started by the launcher.
"""

import json
import logging
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

import torch  # noqa: E402
from penalised import train  # noqa: E402

CELLS = [
    {},
    {"reentrant": True},
    {"reentrant": False, "accumulate_grad_batches": 2},
    {"strategy": "ddp_find_unused_parameters_true"},
]


def main() -> list[list[list[float]]]:
    """For every cell: the gradients of the side loss, and those of the penalty added by hand."""
    found = []
    for cell in CELLS:
        options = {"strategy": "ddp", "devices": 2, **cell}
        pair = [train(add, **options)[1].steps for add in (False, True) if not (add and cell.get("reentrant"))]
        found.append([[value for step in steps for p in step for value in p.flatten().tolist()] for steps in pair])
    return found


if __name__ == "__main__":
    print("FOUND " + json.dumps(main()), flush=True)
    torch.distributed.destroy_process_group()
