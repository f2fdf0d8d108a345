"""One of two processes of a distributed run: trains, saves, resumes, and prints what it found as one line of JSON.

``python ddp_runs.py FOLDER STRATEGY``, started by the launcher.
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
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint  # noqa: E402
from models import Data, Module, Net, cosine, digest, lora, trainer  # noqa: E402
from torch.utils.data import DataLoader, DistributedSampler  # noqa: E402

from lightning_pet.errors import DeltaFileError, PETError  # noqa: E402
from lightning_pet.operations.delta import save_delta  # noqa: E402


class Mean(Module):
    """Notes the mean loss over all processes, so that it can be compared with the global batch's."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses[-1] = self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean").item()
        return loss


class Dealt(Data):
    """Rows 0, 2, 4 … for one process and 1, 3, 5 … for the other: every global batch is that of one process."""

    def train_dataloader(self):
        rows = self.rows_of(0)
        sampler = DistributedSampler(rows, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(rows, batch_size=self.batch_size, sampler=sampler)


def run(folder: Path, strategy: str, *callbacks, dropout: float, path=None, seed: int = 5):
    module = Mean(Net(dropout=dropout), cosine)
    torch.manual_seed(seed + (int(os.environ["RANK"]) if dropout else 0))
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fitted = trainer(lora(), *callbacks, saver, strategy=strategy, devices=2, use_distributed_sampler=dropout > 0)
    data = Data(batch_size=2) if dropout else Dealt(batch_size=2)
    fitted.fit(module, datamodule=data, ckpt_path=path)
    return module, fitted


def on_a_full_disk(fitted, path: Path) -> str:
    """The error of a save that fails in the process that writes."""

    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    fitted.strategy.checkpoint_io.save_checkpoint = refuse
    try:
        fitted.save_checkpoint(path)
    except (OSError, PETError) as error:
        return str(error)
    finally:
        del fitted.strategy.checkpoint_io.save_checkpoint
    return ""


def main(folder: Path, strategy: str) -> dict[str, object]:
    found: dict[str, object] = {}
    module, fitted = run(folder / "plain", strategy, dropout=0.0)
    found["losses"], found["digest"] = module.losses, digest(module)
    if fitted.is_global_zero:
        save_delta(module, folder / "delta.pet.safetensors")
    if strategy != "ddp":
        return found
    found["full"] = on_a_full_disk(fitted, folder / "full.ckpt")
    noisy, _ = run(folder / "noisy", strategy, dropout=0.3)
    again, fitted = run(folder / "again", strategy, dropout=0.3, path=folder / "noisy" / "step=3.ckpt", seed=99)
    found["noisy"], found["again"] = noisy.losses, again.losses
    found["noisy_digest"], found["again_digest"] = digest(noisy), digest(again)
    path = folder / "noisy" / "step=3.ckpt"
    fitted.validate(again, datamodule=Data(batch_size=2), ckpt_path=path, verbose=False)
    found["validated"] = digest(again)
    try:
        trainer(lora(r=1), strategy=strategy, devices=2).fit(Mean(Net(), cosine), datamodule=Data(), ckpt_path=path)
    except DeltaFileError as error:
        found["refused"] = error.code
    averaged, _ = run(folder / "ema", strategy, EMAWeightAveraging(decay=0.8), dropout=0.0)
    found["averaged"] = digest(averaged)
    return found


if __name__ == "__main__":
    print("FOUND " + json.dumps(main(Path(sys.argv[1]), sys.argv[2])), flush=True)
