"""Runs that are killed again and again, and must end with the weights of a run that nobody touched."""

import hashlib
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from engines import make
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from models import Data, Module, Net, cosine, lora, trainer

import lightning_pet as pet
from benchmarks.crash.children import Child, Pair, Say
from benchmarks.crash.writers import other_file_system
from lightning_pet.store.reader import load_checkpoint, read

JOIN_LIMIT_S = 10


@dataclass(frozen=True)
class Chain:
    """One run, and how it is killed and resumed.

    Attributes:
        subject: what the row is about.
        steps: of the whole run.
        kills: after so many it is left alone.
        method: makes the callback.
        save_last: of ``ModelCheckpoint``.
        resume: ``"last"`` is Lightning's word, ``"last_good"`` our function.
        engine: ``"one"`` process, or two of ``"ddp"``, ``"fsdp2"`` or ``"zero2"``.
    """

    subject: str
    steps: int
    kills: int
    method: Callable[[], pet.PETCallback] = lambda: lora(dropout=0.2)
    save_last: bool | Literal["link"] = True
    resume: Literal["last", "last_good"] = "last_good"
    engine: str = "one"


def _on_layers(cls: type[pet.PETCallback], **options: Any) -> Callable[[], pet.PETCallback]:
    return lambda: cls(verbose=False, **options)


ADALORA = _on_layers(pet.AdaLoRACallback, target_r=1, init_r=3, dropout=0.2, target_modules=["fc1", "fc2"])
DIFF_PRUNING = _on_layers(pet.DiffPruningCallback, density=0.2, plot=False)
SHORT = [
    Chain("LoRA", 40, 5),
    Chain("LoRA", 40, 5, save_last="link", resume="last"),
    Chain("diff pruning", 20, 2, DIFF_PRUNING),
    Chain("AdaLoRA", 20, 2, ADALORA),
]
FULL = [
    Chain("LoRA", 1200, 200),
    Chain("LoRA", 600, 200, resume="last"),
    Chain("LoRA", 600, 200, save_last="link", resume="last"),
    Chain("diff pruning", 120, 30, DIFF_PRUNING),
    Chain("AdaLoRA", 120, 30, ADALORA),
]
SHORT_PAIRS = [Chain("LoRA", 12, 3, engine="fsdp2")]
FULL_PAIRS = [
    *(Chain("LoRA", 100, 50, engine="fsdp2") for _ in range(4)),
    Chain("LoRA", 60, 20, engine="ddp"),
    Chain("LoRA", 40, 10, engine="zero2"),
]


def run(folder: Path, short: bool) -> Iterator[dict[str, Any]]:
    """One row for each chain of one process."""
    return _rows(SHORT if short else FULL, folder)


def run_pairs(folder: Path, short: bool) -> Iterator[dict[str, Any]]:
    """One row for each chain of two processes."""
    return _rows(SHORT_PAIRS if short else FULL_PAIRS, folder)


def _rows(chains: list[Chain], folder: Path) -> Iterator[dict[str, Any]]:
    live(Chain("", 1, 0), None, lambda _: None)  # what it imports, no child imports again
    for number, chain in enumerate(chains):
        yield run_chain(chain, folder / str(number), seed=number)


class Report(Checkpoint):
    """Says each step after the checkpoint callbacks before it have saved; ``Checkpoint``, so that it stays behind."""

    def __init__(self, say: Say) -> None:
        self.say = say

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Say where the run begins."""
        self.say(f"start {trainer.global_step}")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Say the step and its loss."""
        self.say(f"step {trainer.global_step} {pl_module.losses[-1].hex()}")


def live(chain: Chain, folder: Path | None, say: Say) -> None:
    """One life of the run, as the script of a user would be; without a folder it saves nothing."""
    torch.manual_seed(5)  # a first start always draws the same numbers …
    module, options = _module(chain.engine)
    savers, path = [], None
    if folder is not None:
        # Temporary files of Lightning's own writer would go to another file system.
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder.with_name(f"{folder.name}-tmp").resolve())
        savers = [ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_last=chain.save_last)]
        path = pet.last_good(folder) if chain.resume == "last_good" else "last"
        if any(folder.glob("*.ckpt")):
            torch.manual_seed(os.getpid())  # … and a restart others, so that only the checkpoint can bring them back
    callbacks = [chain.method(), *savers, Report(say)]
    fitted = trainer(*callbacks, max_steps=chain.steps, max_epochs=-1, enable_checkpointing=True, **options)
    fitted.fit(module, datamodule=Data(batch_size=4 // fitted.world_size), ckpt_path=path)
    say(f"end {_digest(fitted.strategy.lightning_module_state_dict())}")


def _module(engine: str) -> tuple[Module, dict[str, Any]]:
    """The module, and options of its Trainer."""
    if engine == "one":
        return Module(Net(norm=True), cosine), {}
    module, strategy = make(engine, Module, 0.3)
    if isinstance(strategy, str):
        strategy = DDPStrategy(process_group_backend="gloo")
    # What `timeout=` sets: how long a process waits for one that never joined.
    strategy._timeout = timedelta(seconds=JOIN_LIMIT_S)
    return module, {"strategy": strategy, "devices": 2}


def _digest(state: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(name.encode())
        if not tensor.is_meta:  # only the process that writes has the values
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def start(chain: Chain, folder: Path | None) -> Child | Pair:
    """Begin a life in one process or two."""
    return (Child if chain.engine == "one" else Pair)(lambda say: live(chain, folder, say))


def run_chain(chain: Chain, folder: Path, seed: int) -> dict[str, Any]:
    """Kill and restart a run until it has ended, and compare it with one that was left alone."""
    folder.mkdir(parents=True)
    elsewhere = folder.with_name(f"{folder.name}-tmp")
    memory = other_file_system()
    if memory is None:
        elsewhere.mkdir()
    else:
        elsewhere.symlink_to(tempfile.mkdtemp(dir=memory))
    watch = Watch(chain, folder)
    draw = random.Random(seed)
    while not watch.ended:
        child = start(chain, folder)
        if watch.seen["kills"] < chain.kills:
            _kill_somewhere(child, draw, watch)
        watch.look(child)
    left = os.listdir(elsewhere)
    for path in left:
        os.unlink(elsewhere / path)
    if memory is not None:
        os.rmdir(elsewhere.resolve())
    said = {"subject": chain.subject, "engine": chain.engine, "save_last": str(chain.save_last), "resume": chain.resume}
    return {**said, **watch.row(), "elsewhere": len(left), "other_fs": memory is not None}


def _kill_somewhere(child: Child | Pair, draw: random.Random, watch: "Watch") -> None:
    """At a random moment: one time in eight while it starts, else in or between two steps."""
    mean = max(1, watch.chain.steps // watch.chain.kills)
    if draw.random() < 0.125:
        time.sleep(draw.uniform(0, watch.start_s))
    else:
        child.wait_for(1 + draw.randint(1, mean))
        time.sleep(draw.uniform(0, 2 * watch.step_s))
    if isinstance(child, Child):
        child.kill()
        return
    child.kill(draw.choice([(0,), (1,), (0, 1)]))
    watch.seen["hung"] += child.hung
    if child.survived_s is not None:
        watch.seen["longest_s"] = max(watch.seen.get("longest_s", 0.0), round(child.survived_s, 1))


class Watch:
    """Looks after every life at what it left, and counts."""

    def __init__(self, chain: Chain, folder: Path) -> None:
        alone = start(chain, None)
        assert alone.finish() == 0
        self.step_s, self.start_s = (0.02, 0.15) if chain.engine == "one" else (0.06, 1.5)
        self.chain, self.folder, self.ended = chain, folder, False
        self.losses = {int(line.split()[1]): line.split()[2] for line in alone.lines if line.startswith("step")}
        self.digest = alone.lines[-1]
        assert len(self.losses) == chain.steps, alone.lines[-3:]
        self.acknowledged = 0
        self.seen = dict.fromkeys(
            ("kills", "steps", "hits", "torn", "lost", "from_zero", "restarts_wrong", "losses_differ", "failed"), 0
        )
        self.seen |= {} if chain.engine == "one" else {"hung": 0}

    def look(self, child: Child | Pair) -> None:
        """A life has ended: what did it say, and what is on the disk?"""
        code, seen, before = child.finish(), self.seen, self.acknowledged
        for line in child.lines:
            word, *rest = line.split()
            if word == "start":
                seen["from_zero"] += int(rest[0]) == 0 and before > 0
                seen["restarts_wrong"] += int(rest[0]) not in (before, before + 1)
            elif word == "step":
                self.acknowledged = max(self.acknowledged, int(rest[0]))
                seen["steps"] += 1
                seen["losses_differ"] += self.losses.get(int(rest[0])) != rest[1]
        if code == 0:
            self.ended = True
            self.same = child.lines[-1] == self.digest
        else:
            seen["kills"] += code == -9
            seen["failed"] += code != -9
            assert seen["failed"] < 5, child.lines
        self._files()

    def _files(self) -> None:
        found = {}
        for path in self.folder.glob("*.ckpt"):
            try:
                read(path)
                found[path.name] = load_checkpoint(path)["global_step"]
            except Exception:
                self.seen["torn"] += 1
        newest = max(found.values(), default=0)
        # A run that was killed between its first save and the link to it goes on as last-v1.
        lasts = [step for name, step in found.items() if name.startswith("last")]
        last = max(lasts, default=0) if self.chain.resume == "last" else newest
        self.seen["lost"] += min(newest, last) < self.acknowledged
        self.hidden = [path for path in self.folder.iterdir() if path.name.startswith(".")]
        self.seen["hits"] += bool(self.hidden)
        for path in self.hidden:  # what is an hour old goes at the next start
            os.utime(path, (0, 0))

    def row(self) -> dict[str, Any]:
        """The counts, and whether the run ended with the weights of the one that was left alone."""
        return {**self.seen, "left": len(self.hidden), "run": self.chain.steps, "identical": self.same}
