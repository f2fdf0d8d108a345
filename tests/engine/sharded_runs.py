"""One of two processes of a run on an engine that shards: trains, saves, resumes, prints what it found as JSON.

``python sharded_runs.py FOLDER ENGINE``, started by ``launch``. ``FOLDER/single`` holds checkpoints of one process.
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import lightning as L  # noqa: E402
import torch  # noqa: E402
from ddp_runs import Dealt, Mean, on_a_full_disk  # noqa: E402  # it silences warnings and logs, too
from engines import PLUS, make, trained_parameters  # noqa: E402
from models import Data, backwards, cosine, every_step, lora, trainer  # noqa: E402

from lightning_pet.errors import PETError  # noqa: E402
from lightning_pet.operations.delta import save_delta  # noqa: E402
from lightning_pet.strategies import agreement  # noqa: E402


class Gradients(L.Callback):
    """Notes how many numbers the gradients of this process have room for."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        stores = [getattr(grad, "_local_tensor", grad).untyped_storage() for grad in grads]
        self.room = sum(size for size in {store.data_ptr(): store.nbytes() // 4 for store in stores}.values())


def run(folder: Path, engine: str, *, dropout=0.0, path=None, seed=5, method="fit", optimizers=cosine, **options):
    """One fit (or validate); with dropout every rank draws its own numbers."""
    module, strategy = make(engine, Mean, dropout)
    module.optimizers_of = optimizers
    torch.manual_seed(seed + (int(os.environ["RANK"]) if dropout else 0))
    pet = lora(**PLUS, delta_files=True, scalars=["norm"], **options)
    callbacks = [pet, Gradients(), InAHook(folder / "hook.pet.safetensors")]
    callbacks += [every_step(folder)] if method == "fit" else []
    precision = "32-true"
    if engine.endswith("bf16"):  # DeepSpeed casts the delta, too, and keeps float32 copies of its own
        precision = "bf16-mixed" if engine.startswith("zero") else "bf16-true"
    both = {"use_distributed_sampler": dropout > 0, "precision": precision, "log_every_n_steps": 2}
    fitted = trainer(*callbacks, strategy=strategy, devices=2, **both)
    data = Data(batch_size=2) if dropout else Dealt(batch_size=2)
    getattr(fitted, method)(module, datamodule=data, ckpt_path=path)
    return module, fitted


class InAHook(L.Callback):
    """Saves the delta after the fourth step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == 4:
            save_delta(pl_module, self.path)


def error_of(module, path: Path) -> str:
    try:
        save_delta(module, path)
    except PETError as error:
        return str(error)
    return ""


def deltas(folder: Path, module, found: dict[str, object]) -> None:
    """Delta files straight from the parts: whole, with a digest of every byte, and what goes wrong."""
    found["bytes"] = save_delta(module, folder / f"rank{os.environ['RANK']}.pet.safetensors", exact=True)
    found["inner"] = error_of(module.net, folder / "inner.pet.safetensors")
    found["blocked"] = error_of(module, folder / "after.ckpt" / "blocked.pet.safetensors")
    patience, agreement.PATIENCE = agreement.PATIENCE, 0.5
    found["alone"] = error_of(module, folder / "alone.pet.safetensors") if os.environ["RANK"] == "0" else ""
    agreement.PATIENCE = patience
    torch.distributed.barrier()
    save_delta(module, folder / "together.pet.safetensors", notes={"task": "none"})


def main(folder: Path, engine: str) -> dict[str, object]:
    found: dict[str, object] = {}
    module, fitted = run(folder / "plain", engine)
    found["norm"] = float(fitted.callback_metrics["pet/lora_default/norm"])
    found["losses"], found["held"] = module.losses, trained_parameters(fitted, engine)
    found["gradients"] = next(c.room for c in fitted.callbacks if isinstance(c, Gradients))
    fitted.save_checkpoint(folder / "after.ckpt")
    noisy, _ = run(folder / "noisy", engine, dropout=0.3)
    again, _ = run(folder / "again", engine, dropout=0.3, path=folder / "noisy" / "step=3.ckpt", seed=99)
    found["noisy"], found["again"] = noisy.losses, again.losses
    if "-" not in engine:
        others(folder, engine, fitted, found)
    return found


def others(folder: Path, engine: str, fitted, found: dict[str, object]) -> None:
    fitted.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    other, _ = run(folder / "other", engine, path=folder / "single" / "step=4.ckpt", seed=99, optimizers=backwards)
    found["from_single"] = other.losses
    _, checked = run(folder, engine, path=folder / "after.ckpt", seed=98, method="validate")
    checked.save_checkpoint(folder / "validated.ckpt", weights_only=True)
    started, _ = run(folder / "started", engine, start_from=str(folder / "after.ckpt"), seed=97)
    found["started"] = started.losses[0]
    deltas(folder, fitted.lightning_module, found)
    found["full"] = on_a_full_disk(fitted, folder / "full.ckpt")
    try:
        run(folder / "refused", engine, path=folder / "after.ckpt", r=1)
    except PETError as error:
        found["refused"] = getattr(error, "code", "")


if __name__ == "__main__":
    print("FOUND " + json.dumps(main(Path(sys.argv[1]), sys.argv[2])), flush=True)
