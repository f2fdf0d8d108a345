"""One of two processes whose model holds several deltas; trains one of them, chooses among all; prints JSON.

``python many_runs.py FOLDER ENGINE``, started by ``launch``. ``FOLDER/single`` holds delta files of one process.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from ddp_runs import Dealt, Mean  # noqa: E402  # it silences warnings and logs, too
from engines import make  # noqa: E402
from models import Data, every_step, lora, trainer  # noqa: E402

from lightning_pet.errors import PETError  # noqa: E402
from lightning_pet.operations.adapted import Adapted  # noqa: E402
from lightning_pet.operations.delta import load_delta, save_delta  # noqa: E402

ROWS = ("tone", None, None, "tone")
CHOICES: dict[str, tuple[str, ...]] = {"tone": ("tone",), "headed": ("headed",), "none": (), "again": ("tone",)}


class Choosing(Mean):
    """Looks at what it computes with every choice, one batch of validation each."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.found: dict[str, Any] = {}
        self.looks = False

    def on_validation_start(self) -> None:
        if not self.looks:  # in the middle of a fit
            self.noted("in a fit", lambda: Adapted(self).activate("headed"))

    def on_validation_end(self) -> None:
        if not self.looks:
            Adapted(self).activate("tone", "topic")

    def on_validation_batch_start(self, batch: Any, index: int, loader: int = 0) -> None:
        names = list(CHOICES)
        if self.looks and index < len(names):
            self.noted(f"activate {names[index]}", lambda: Adapted(self).activate(*CHOICES[names[index]]))

    def validation_step(self, batch: Any, index: int) -> None:
        if not self.looks:
            self.found.setdefault("validated", self.output(batch))
            return
        adapted, names = Adapted(self), list(CHOICES)
        if index < len(names):
            self.found[names[index]] = self.output(batch)
            return
        for name, chosen in CHOICES.items():
            self.found[f"using {name}"] = self.within(adapted.using(*chosen), batch)
        self.noted("rows", lambda: self.within(adapted.rows(ROWS), batch))
        self.noted("rows of heads", lambda: self.within(adapted.rows(["headed", None, "tone", "headed"]), batch))
        self.found["after"] = self.output(batch)

    def within(self, block: Any, batch: Any) -> list[float]:
        with block:
            return self.output(batch)

    def output(self, batch: Any) -> list[float]:
        return self.net(batch[0][:4]).float().sum(-1).tolist()

    def noted(self, name: str, act: Callable[[], Any]) -> None:
        try:
            self.found[name] = act()
        except PETError as error:
            self.found[name] = f"{type(error).__name__}: {error}"


def loaded(module: Any, folder: Path) -> Any:
    for name in ("tone", "headed"):
        load_delta(module, folder / "single" / f"{name}.pet.safetensors", name=name)
    return module


def run(folder: Path, engine: str, *, path: Path | None = None, seed: int = 5, dropout: float = 0.0) -> Any:
    module, strategy = make(engine, Choosing, dropout)
    loaded(module, folder.parent)
    torch.manual_seed(seed + (int(os.environ["RANK"]) if dropout else 0))
    callbacks = [lora(delta="topic", dropout=dropout, delta_files=True), every_step(folder)]
    fitted = trainer(*callbacks, strategy=strategy, devices=2, use_distributed_sampler=dropout > 0, limit_val_batches=5)
    fitted.fit(module, datamodule=Data(batch_size=2) if dropout else Dealt(batch_size=2), ckpt_path=path)
    return module


def main(folder: Path, engine: str) -> dict[str, object]:
    found: dict[str, object] = {}
    module = run(folder / "plain", engine)
    found |= {"losses": module.losses, "active": Adapted(module).active, "fit": module.found}
    save_delta(module, folder / "topic.pet.safetensors", name="topic")
    noisy = run(folder / "noisy", engine, dropout=0.3)
    again = run(folder / "again", engine, dropout=0.3, path=folder / "noisy" / "step=3.ckpt", seed=99)
    found["noisy"], found["again"] = noisy.losses, again.losses
    found["looks"] = looks(folder, engine)
    return found


def looks(folder: Path, engine: str) -> dict[str, Any]:
    """What every choice computes, in a validation."""
    module, strategy = make(engine, Choosing, 0.0)
    loaded(module, folder)
    load_delta(module, folder / "topic.pet.safetensors", name="topic")
    module.looks = True
    fitted = trainer(strategy=strategy, devices=2, use_distributed_sampler=False, limit_val_batches=5)
    fitted.validate(module, datamodule=Data(shuffle=False), verbose=False)
    return module.found


if __name__ == "__main__":
    print("FOUND " + json.dumps(main(Path(sys.argv[1]), sys.argv[2])), flush=True)
