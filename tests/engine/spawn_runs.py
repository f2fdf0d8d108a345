"""Trains with a strategy that starts new processes, and looks at what this process has afterwards.

``python spawn_runs.py FOLDER STRATEGY``; prints what it found as one line of JSON.
"""

import json
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from models import Data, Module, Net, adamw, every_step, lora, trainer  # noqa: E402

import lightning_pet as pet  # noqa: E402


def train(folder: Path, strategy: str, method: pet.PETCallback, eager: bool):
    module = Module(Net(dropout=0), adamw)
    torch.manual_seed(5)
    if eager:
        pet.apply(module, [method])
    run = trainer(method, every_step(folder), strategy=strategy, devices=2, max_epochs=1, limit_val_batches=1.0)
    run.fit(module, datamodule=Data(batch_size=2, shuffle=False))
    return module, run


def same(module: Module, path: Path) -> bool:
    other = Module(Net(dropout=0))
    pet.load_delta(other, path)
    there = other.state_dict()
    return all(torch.equal(value, there[name]) for name, value in module.state_dict().items())


def main(folder: Path, strategy: str) -> dict[str, object]:
    found: dict[str, object] = {}
    module, run = train(folder / "eager", strategy, lora(), eager=True)
    best = Path(run.checkpoint_callback.best_model_path)
    found["returned"] = same(module, best)
    found["trained"] = bool(module.net.fc1.pet["lora_default"].b.abs().max() > 0)
    found["bytes"] = pet.save_delta(module, folder / "eager.pet.safetensors")
    found["loss"] = run.validate(module, datamodule=Data(), verbose=False)[0]["val_loss"]
    module, run = train(folder / "late", strategy, lora(), eager=False)
    best = Path(run.checkpoint_callback.best_model_path)
    try:
        pet.save_delta(module, folder / "late.pet.safetensors")
    except pet.PETError as error:
        found["missing"] = str(error)
    found["from_checkpoint"] = run.validate(module, datamodule=Data(), ckpt_path=best, verbose=False)[0]["val_loss"]
    run.validate(module, datamodule=Data(), verbose=False)
    pet.load_delta(module, best)
    found["loaded"] = same(module, best)
    return found


if __name__ == "__main__":
    warnings.simplefilter("always")
    torch.set_num_threads(1)
    print("FOUND " + json.dumps(main(Path(sys.argv[1]), sys.argv[2])), flush=True)
