"""Damaged checkpoints: ``last_good`` takes the newest one that verifies, and says what is wrong with the others."""

import logging
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from models import Data, Module, Net, cosine, lora, trainer

from lightning_pet import last_good
from lightning_pet.errors import DeltaFileError


class Heard(logging.Handler):
    """Collects what ``last_good`` logs."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text."""
        self.texts.append(record.getMessage())


def train(folder: Path, seed: int = 1) -> Module:
    """Three steps, with a checkpoint of each."""
    module = Module(Net(seed, norm=True), cosine)
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(lora(), saver, max_steps=3).fit(module, datamodule=Data())
    return module


def run(folder: Path, short: bool) -> Iterator[dict[str, Any]]:
    """One row for each kind of damage to the newest of three checkpoints."""
    train(folder / "runs")
    train(folder / "others", seed=2)
    base = Module(Net(norm=True), cosine)
    newest = folder / "runs" / "step=3.ckpt"
    whole, other = newest.read_bytes(), (folder / "others" / "step=3.ckpt").read_bytes()
    draw = random.Random(1)
    count = 8 if short else 300
    kinds: dict[str, list[bytes]] = {
        "truncated": [whole[: draw.randrange(1, len(whole))] for _ in range(count)],
        "one bit flipped": [_flipped(whole, draw.randrange(8 * len(whole))) for _ in range(count)],
        "empty": [b""],
        "weights only": [_weights_only(newest)],
        "another base": [other],
    }
    for kind, contents in kinds.items():
        yield {"damage": kind, **_tried(newest, contents, base, whole)}
    yield {"damage": "all three damaged", **_none_left(newest.parent)}


def _tried(newest: Path, contents: list[bytes], base: Module, whole: bytes) -> dict[str, int]:
    """Files, those passed over for the next one with a reason, those harmless, and those taken though they differ."""
    log, heard = logging.getLogger("lightning_pet.store.reader"), Heard()
    disabled = logging.root.manager.disable
    logging.disable(logging.NOTSET)
    log.addHandler(heard)
    log.propagate = False
    seen = {"files": 0, "passed_over": 0, "harmless": 0, "wrong": 0}
    for content in contents:
        heard.texts.clear()
        newest.write_bytes(content)
        for step in (1, 2, 3):
            os.utime(newest.with_name(f"step={step}.ckpt"), (step, step))
        taken = last_good(newest.parent, base)
        said = any("passed over" in text and newest.name in text for text in heard.texts)
        seen["files"] += 1
        if taken == newest.with_name("step=2.ckpt") and said:
            seen["passed_over"] += 1
        elif taken == newest and _holds(newest, whole):  # a bit that nobody reads, as the time of a file in an archive
            seen["harmless"] += 1
        else:
            seen["wrong"] += 1
    log.removeHandler(heard)
    log.propagate = True
    logging.disable(disabled)
    newest.write_bytes(whole)
    return seen


def _holds(path: Path, whole: bytes) -> bool:
    """Whether a file gives what the undamaged one gives."""
    copy = path.with_suffix(".whole")
    copy.write_bytes(whole)
    try:
        found, wanted = (torch.load(p, weights_only=True) for p in (path, copy))
    finally:
        copy.unlink()
    return _same(found, wanted)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _none_left(folder: Path) -> dict[str, int]:
    for path in folder.glob("*.ckpt"):
        shutil.copy(path, path.with_suffix(".kept"))
        path.write_bytes(path.read_bytes()[:-100])
    try:
        last_good(folder)
    except DeltaFileError as error:
        named = all(f"step={step}.ckpt" in str(error) for step in (1, 2, 3))
        return {"files": 1, "raised": int(error.code == "corrupt" and named)}
    return {"files": 1, "raised": 0}


def _flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _weights_only(path: Path) -> bytes:
    checkpoint = torch.load(path, weights_only=True)
    for key in ("loops", "optimizer_states", "lr_schedulers"):
        del checkpoint[key]
    smaller = path.with_suffix(".smaller")
    torch.save(checkpoint, smaller)
    data = smaller.read_bytes()
    smaller.unlink()
    return data
