"""One of two processes whose module keeps an average of its net, or writes into the base; prints JSON.

``python kept_runs.py FOLDER ENGINE``, started by ``launch``.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from ddp_runs import Mean  # noqa: E402  # it silences warnings and logs, too
from engines import shard, strategy_of  # noqa: E402
from models import Data, Net, cosine, every_step, lora, trainer  # noqa: E402
from torch import nn  # noqa: E402

from lightning_pet.errors import PETError  # noqa: E402


class Averaged(Mean):
    """An average of the net beside it, which the loss reads; both are of the same form."""

    by = staticmethod(lambda slow, fast: slow.data.lerp_(fast.data, 0.3))

    def __init__(self, net, optimizers):
        super().__init__(net, optimizers)
        self.slow = Net(7, dropout=0.0).requires_grad_(False)

    def loss(self, batch):
        with torch.no_grad():
            goal = self.slow(batch[0]).float()
        return super().loss(batch) + nn.functional.mse_loss(self.net(batch[0]).float(), goal)

    @torch.no_grad()
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if hasattr(self.slow, "reshard"):
            self.slow.reshard()  # FSDP2 does after a backward pass, and here is none
        slow, fast = list(self.slow.parameters()), self.followed()
        with whole([*slow, *fast]):
            for average, value in zip(slow, fast, strict=True):
                self.by(average, value)

    def followed(self):
        return [p for name, p in self.net.named_parameters() if ".pet." not in name]


class Zipped(Averaged):
    """The average knows no base: a copy of the net, over ``zip(parameters())``, deltas and all."""

    by = staticmethod(lambda slow, fast: slow.mul_(0.7).add_(fast, alpha=0.3))

    def __init__(self, net, optimizers):
        super().__init__(net, optimizers)
        self.slow.load_state_dict(self.net.state_dict())

    def followed(self):
        return list(self.net.parameters())


class Meddling(Averaged):
    """After the third step one process (or both, where a write takes both) changes the base."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        weight = next(p for n, p in self.net.named_parameters() if n.startswith("fc1.") and n.endswith("weight"))
        if batch_idx != 2:
            return
        with torch.no_grad(), whole([weight]):
            alone = not (hasattr(weight, "full_tensor") or hasattr(weight, "ds_id"))
            if not alone or os.environ["RANK"] == "1":
                weight.data.mul_(1.5)


def sharding(base: type) -> type:
    """What FSDP2 asks of user code: the net and its average are split."""

    class Sharding(base):
        def configure_model(self):
            for net in (self.net, self.slow):
                if not hasattr(net.fc1.weight, "full_tensor"):
                    shard(net, self.device_mesh["data_parallel"])

    return Sharding


@contextlib.contextmanager
def whole(parameters):
    """What ZeRO-3 asks of user code that writes into parameters: to gather them, and to split them again."""
    parts = [p for p in parameters if hasattr(p, "ds_id")]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts, modifier_rank=0):
        yield


def run(folder: Path, engine: str, base: type, *, path=None, seed=5, **options):
    module = (sharding(base) if engine == "fsdp2" else base)(Net(dropout=0.3), cosine)
    torch.manual_seed(seed + int(os.environ["RANK"]))
    fitted = trainer(lora(**options), every_step(folder), strategy=strategy_of(engine), devices=2, max_epochs=1)
    fitted.fit(module, datamodule=Data(batch_size=2), ckpt_path=path)
    fitted.save_checkpoint(folder / "last.ckpt")
    return module.losses


def main(folder: Path, engine: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, base, options in (("beside", Averaged, {"module": "net"}), ("zipped", Zipped, {"modules_to_save": []})):
        whole_run = run(folder / name, engine, base, **options)
        half = run(folder / f"{name}-again", engine, base, path=folder / name / "step=3.ckpt", seed=99, **options)
        found[name] = [whole_run[3:], half]
    try:
        run(folder / "meddled", engine, Meddling, module="net")
    except PETError as error:
        found["meddled"] = str(error)
    return found


if __name__ == "__main__":
    print("FOUND " + json.dumps(main(Path(sys.argv[1]), sys.argv[2])), flush=True)
