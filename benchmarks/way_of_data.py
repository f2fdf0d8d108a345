"""How many of our files a run goes through: from the Trainer to the first batch, and in one checkpoint.

Counts calls of functions of this package, the files that they are in, and how often the next call is in another file
than the one before. A count, so it is the same on every machine: ``python -m benchmarks.way_of_data``; with ``-v``
file by file, and from which file the way goes to which.
"""

import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from lightning_pet import LoRACallback

_PACKAGE = str(Path(__file__).resolve().parents[1] / "lightning_pet")


class Way:
    """What was called, file by file."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.functions: Counter[tuple[str, str]] = Counter()
        self.changes: Counter[tuple[str, str]] = Counter()
        self._last = ""

    @contextmanager
    def traced(self) -> Iterator[None]:
        """Count within the block."""

        def note(frame: FrameType, event: str, _: Any) -> None:
            name = frame.f_code.co_filename
            if event == "call" and name.startswith(_PACKAGE):
                self.calls[name] += 1
                self.functions[name, frame.f_code.co_qualname] += 1
                if name != self._last:
                    self.changes[self._last, name] += 1
                self._last = name

        sys.setprofile(note)
        try:
            yield
        finally:
            sys.setprofile(None)

    def __str__(self) -> str:
        return f"{len(self.calls)} files, {self.changes.total():,} changes of file, {self.calls.total():,} calls"


class _Classifier(pl.LightningModule):
    def __init__(self, layers: int) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=64
        )
        self.model = BertForSequenceClassification(config)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        return self.model(input_ids=batch, labels=batch[:, 0] % 2).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3)


class _Until(pl.Callback):
    """Ends the count where the first batch begins, and writes one checkpoint after it."""

    def __init__(self, path: str) -> None:
        self.path, self.setup_way, self.checkpoint_way = path, Way(), Way()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        sys.setprofile(None)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        with self.checkpoint_way.traced():
            trainer.save_checkpoint(self.path)


def ways(folder: str, layers: int = 6) -> tuple[Way, Way]:
    """Of the set-up to the first batch, and of one checkpoint; LoRA on queries and values of a small BERT."""
    until = _Until(f"{folder}/one.ckpt")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    module = _Classifier(layers)
    data: DataLoader[Any] = DataLoader(torch.randint(1, 64, (4, 8)), batch_size=4)  # type: ignore[arg-type]
    with until.setup_way.traced():
        lora = LoRACallback(r=4, target_modules=["attention.q", "attention.v"], verbose=False)
        trainer = pl.Trainer(
            max_steps=1,
            accelerator="cpu",
            devices=1,
            logger=False,
            callbacks=[until, lora],
            **quiet,  # type: ignore[arg-type]
        )
        trainer.fit(module, data)
    return until.setup_way, until.checkpoint_way


def _show(way: Way) -> None:
    """File by file with its most called functions, and the most frequent changes of file."""

    def short(file: str) -> str:
        return str(Path(file).relative_to(_PACKAGE)) if file else "-"

    for file, calls in way.calls.most_common():
        functions = [(name, number) for (where, name), number in way.functions.most_common() if where == file]
        print(f"  {calls:6,} {short(file)}: {', '.join(f'{name} {number:,}' for name, number in functions[:6])}")
    for (before, after), number in way.changes.most_common(25):
        print(f"  {number:6,} {short(before)} → {short(after)}")


def main() -> None:
    """Print both."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for name, way in zip(("set-up to the first batch", "one checkpoint"), ways(folder), strict=True):
            print(f"{name}: {way}")
            if "-v" in sys.argv:
                _show(way)


if __name__ == "__main__":
    main()
