"""One of two processes that train on quantised bases, and print what they found as one line of JSON.

``python quantised_runs.py FOLDER``, started by the launcher.
"""

import json
import logging
import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).resolve().parent)]
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

import torch  # noqa: E402
from ddp_runs import Dealt, Mean  # noqa: E402
from lightning.pytorch.strategies import ModelParallelStrategy  # noqa: E402
from models import Net, adamw, lora, trainer  # noqa: E402
from quantised_models import FORMATS  # noqa: E402

from lightning_pet.errors import UnsupportedStrategyError  # noqa: E402


class Sharded(Mean):
    def configure_model(self):
        raise AssertionError("it was to be refused before anything is sharded")


def main(folder: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    other = int(os.environ["RANK"])  # processes start from the base of the first
    for name in ("torchao int8", "bitsandbytes nf4"):
        module = Mean(FORMATS[name](Net(seed=1 + other, dropout=0)), adamw)
        torch.manual_seed(5)
        run = trainer(lora(), strategy="ddp", devices=2, use_distributed_sampler=False)
        run.fit(module, datamodule=Dealt(batch_size=2))
        run.validate(module, datamodule=Dealt(batch_size=2), verbose=False)
        run.save_checkpoint(folder / f"{name}.ckpt")
        found[name] = module.losses
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    try:
        module = Sharded(FORMATS["torchao int8"](Net(dropout=0)), adamw)
        trainer(lora(), strategy=strategy, devices=2).fit(module, datamodule=Dealt(batch_size=2))
    except UnsupportedStrategyError as error:
        found["sharded"] = str(error)
    return found


if __name__ == "__main__":
    print("FOUND " + json.dumps(main(Path(sys.argv[1]))), flush=True)
