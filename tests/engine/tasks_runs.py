"""One of two processes that train several tasks: in some steps a process has no row of a task.

``python tasks_runs.py FOLDER STRATEGY``, started by the launcher.
"""

import json
import logging
import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

import torch  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from models import WIDTH, Net, digest, trainer  # noqa: E402
from test_tasks import METHODS, TASKS, Module  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from lightning_pet import Adapted, TasksCallback  # noqa: E402
from lightning_pet.errors import PETError  # noqa: E402


class Mean(Module):
    """The loss of both batches is half their sum: the mean of what two processes compute."""

    def training_step(self, batch, batch_idx):
        return self._loss(**batch)

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(x), y, reduction="sum") * self.share

    def validation_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch["x"]), batch["y"])
        self.log("val_loss", loss, sync_dist=True)


def batches(rank: int | None) -> list[dict]:
    """Six rows a step; the first process has the first three. Some have no row of one task."""
    draw = torch.Generator().manual_seed(4)
    orders = ["001011", "000111", "111000", "010101", "000000"]
    found = []
    for order in orders:
        x, y = torch.randn(6, WIDTH, generator=draw), torch.randint(0, 3, (6,), generator=draw)
        own = slice(None) if rank is None else slice(3 * rank, 3 * rank + 3)
        found.append({"x": x[own], "y": y[own], "task": [TASKS[int(i)] for i in order][own]})
    return found


def run(folder: Path, rank: int | None, *, epochs: int = 2, ckpt=None, **options):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(5)
    module = Mean(Net(dropout=0.0))
    module.share = 0.5 if rank is None else 1.0
    data = DataLoader(batches(rank), batch_size=None)
    tasks = TasksCallback(
        tasks={"odd": {"seed": 1}, "even": {"seed": 2}}, dirpath=str(folder / "tasks"), monitor="val_loss"
    )
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    fitted = trainer(
        METHODS["lora"](),
        tasks,
        saver,
        max_epochs=epochs,
        limit_val_batches=1.0,
        use_distributed_sampler=False,
        **options,
    )
    fitted.fit(module, data, data, ckpt_path=ckpt)
    return module, fitted, tasks


def main(folder: Path, strategy: str) -> None:
    rank = int(os.environ["RANK"])
    found: dict = {}
    try:
        module, fitted, tasks = run(folder, rank, strategy=strategy, devices=2)
        found["digest"] = digest(module.net)
        found["figures"] = {name: float(value) for name, value in fitted.callback_metrics.items() if "/" in name}
        found["files"] = sorted(path.name for path in tasks.files.values())
        found["deltas"] = list(Adapted(module))
        half, _, _ = run(folder / "half", rank, epochs=1, strategy=strategy, devices=2)
        again, _, _ = run(folder / "half", rank, ckpt=folder / "half" / "epoch=0.ckpt", strategy=strategy, devices=2)
        found["again"] = digest(again.net)
        del half
    except PETError as error:
        found["error"] = f"{type(error).__name__}: {error}"
    print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
