"""One optimizer step of a causal language model as one of several processes: ``python causal_lm_runs.py FOLDER``."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

from tests.modules.test_causal_lm import first_step  # noqa: E402

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found, _ = first_step(str(folder / "a.jsonl"), 4, strategy="ddp", devices=2, window=3)
    torch.save(found, folder / f"{torch.distributed.get_rank()}.pt")
