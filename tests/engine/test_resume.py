"""An interrupted run, resumed, does what the uninterrupted one did: every loss, hook, validation and weight."""

import os
import signal
import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

sys.path.append(str(Path(__file__).parents[1]))
from launch import launch
from resume_runs import KEY, Module, Resume, Run, double_interruptions, quiet, same, single_interruptions

from lightning_pet.errors import DeltaFileError
from lightning_pet.strategies import private
from lightning_pet.training.resume import ExactResume

BATCHES = 15  # 3 epochs of 5
EVERY_2 = {"val_check_interval": 2}
STEPS = {"max_epochs": -1, "max_steps": BATCHES}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        quiet()
        yield


SINGLE = {
    "dropout and shuffle": (Run(), 15),
    "no shuffle": (Run(shuffle=False), 15),
    "one worker": (Run(workers=1, epochs=2, batches=4), 8),
    "validation": (Run(val=True), 15),
    "validation within the epoch": (Run(val=True, trainer=EVERY_2), 15),
    "validation across epochs": (Run(val=True, trainer={"val_check_interval": 3, "check_val_every_n_epoch": None}), 15),
    "validation every second epoch": (Run(val=True, trainer={"check_val_every_n_epoch": 2}), 15),
    "saved in validation": (Run(val=True, at="validation"), 3),
    "saved in validation within the epoch": (Run(val=True, at="validation", trainer=EVERY_2), 6),
    "saved at epoch end": (Run(at="epoch"), 3),
    "saved at epoch end, validation": (Run(at="epoch", val=True), 3),
    "accumulation": (Run(trainer={"accumulate_grad_batches": 2}), 6),
    "accumulation, worker, validation": (Run(workers=1, val=True, trainer={"accumulate_grad_batches": 2}), 6),
    "plateau": (Run(val=True, plateau=True), 15),
    "plateau, saved in validation": (Run(val=True, plateau=True, at="validation"), 3),
    "plateau, saved at epoch end": (Run(val=True, plateau=True, at="epoch"), 3),
    "loader made before the checkpoint is read": (Run(estimate=True), 15),
    "reloaded every epoch": (Run(trainer={"reload_dataloaders_every_n_epochs": 1}), 15),
    "limited batches": (Run(trainer={"limit_train_batches": 3}), 9),
    "stream": (Run(loader="stream"), 15),
    "stream, limited": (Run(loader="stream", trainer={"limit_train_batches": 3}), 9),
    "stateful": (Run(loader="stateful"), 15),
    "stateful, made before the checkpoint is read": (Run(loader="stateful", estimate=True), 15),
    "stateful, saved at epoch end": (Run(loader="stateful", at="epoch"), 3),
    "several loaders, shortest": (Run(loader="min_size"), 9),
    "several loaders, longest": (Run(loader="max_size"), 15),
    "persistent worker, one epoch": (Run(workers=1, loader="persistent", epochs=1), 5),
}


@pytest.mark.parametrize("name", SINGLE)
def test_every_interruption_continues_bit_for_bit(name, tmp_path):
    run, count = SINGLE[name]
    assert single_interruptions(run, tmp_path) == (count, count)


def test_the_plateau_is_reached(tmp_path):
    """Else the runs with a plateau would test nothing: the rate must fall, and by the metric's value."""
    rates = [event[2] for event in Run(val=True, plateau=True).fit(tmp_path).events if event[0] == "end"]
    assert rates == [0.05, 0.05, 0.025]


BY_STEPS = {
    "batch": (Run(trainer=STEPS), 14),
    "epoch": (Run(at="epoch", trainer=STEPS), 2),
    "validation": (Run(val=True, at="validation", trainer=STEPS | EVERY_2), 5),
    "stateful": (Run(loader="stateful", at="epoch", trainer=STEPS), 2),
    "epoch, loader made before the checkpoint is read": (
        Run(at="epoch", estimate=True, trainer={"max_steps": BATCHES}),
        2,
    ),
}


@pytest.mark.parametrize("name", BY_STEPS)
def test_runs_limited_by_steps(name, tmp_path):
    run, count = BY_STEPS[name]
    # The last checkpoint is that of a finished run: Lightning stops at once, without the hooks at the epoch's end.
    assert single_interruptions(run, tmp_path, last=False) == (count, count)


def test_without_the_object_a_resume_differs(tmp_path, monkeypatch):
    """The measure can fail: stock Lightning passes at none of the places within an epoch."""
    monkeypatch.setattr(Resume, "on_load_checkpoint", lambda *_: None)
    assert single_interruptions(Run(), tmp_path)[0] <= 1


PAIRS = {
    "dropout and shuffle": Run(),
    "validation within the epoch": Run(val=True, trainer=EVERY_2),
    "plateau": Run(val=True, plateau=True),
    "steps": Run(trainer=STEPS),
    "stream": Run(loader="stream"),
    "stateful": Run(loader="stateful"),
    "one worker": Run(workers=1, val=True),
}


@pytest.mark.parametrize("name", PAIRS)
def test_some_pairs_of_interruptions(name, tmp_path):
    only = 12 if name == "validation within the epoch" else 4
    good, count = double_interruptions(PAIRS[name], tmp_path, only, last=False)
    assert good == count >= only


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_all_pairs_of_interruptions(name, tmp_path):
    assert double_interruptions(PAIRS[name], tmp_path, last=False) == (91, 91)


def test_two_processes(tmp_path):
    codes, outputs = launch([str(Path(__file__).with_name("resume_runs.py")), str(tmp_path), "4", "2"])
    assert codes == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    for output in outputs:
        good, count, good_pairs, pairs = map(int, output.split("IDENTICAL")[1].split()[:4])
        assert good == count >= 4
        assert good_pairs == pairs >= 2


@pytest.mark.slow
def test_two_processes_every_interruption(tmp_path):
    codes, outputs = launch([str(Path(__file__).with_name("resume_runs.py")), str(tmp_path), "15", "91"], timeout=900)
    assert codes == [0, 0]
    assert all("IDENTICAL 15 15 91 91" in output for output in outputs)


@pytest.mark.parametrize(
    "options",
    [
        {"every_n_train_steps": 4, "save_top_k": -1},
        {"every_n_train_steps": 4, "save_last": True},
        {"monitor": "val_loss", "save_top_k": -1},
        {"save_top_k": -1, "save_on_train_epoch_end": True},
    ],
)
def test_checkpoints_of_model_checkpoint(options, tmp_path):
    """The files of Lightning's own callback: at step 12, at the end of an epoch, or the last of them."""
    run = Run(val=True, trainer={"val_check_interval": 1.0})
    saver = ModelCheckpoint(tmp_path / "own", filename="{epoch}-{step}", **options)
    reference = run.fit(tmp_path / "reference", extra=[saver])
    files = sorted((tmp_path / "own").glob("*.ckpt"))
    assert files
    for number, path in enumerate(files):
        resumed = run.fit(tmp_path / f"{number}", path)
        assert resumed.events == reference.events[len(reference.events) - len(resumed.events) :]
        assert (resumed.digest, resumed.steps) == (reference.digest, reference.steps)


class Terminate(L.Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("batch", [2, 3, 5, 10])
def test_terminated_by_a_signal(batch, tmp_path):
    """Lightning stops between two batches, or after the epoch, and its handler saves."""
    run = Run(at="none")
    reference = run.fit(tmp_path / "reference")
    with pytest.raises(SIGTERMException):
        run.fit(tmp_path / "a", extra=[Terminate(batch), OnExceptionCheckpoint(tmp_path)])
    resumed = run.fit(tmp_path / "b", tmp_path / "on_exception.ckpt")
    assert same(resumed, reference, len(reference.events) - len(resumed.events))
    assert [event[3] for event in resumed.events if event[0] == "train"] == list(range(batch, BATCHES))


def test_terminated_in_a_validation_is_announced(tmp_path):
    run = Run(val=True, at="none", trainer=EVERY_2)
    with pytest.raises(SIGTERMException):
        run.fit(tmp_path / "a", extra=[Terminate(2), OnExceptionCheckpoint(tmp_path)])
    with pytest.warns(UserWarning, match="written inside a validation"):
        assert run.fit(tmp_path / "b", tmp_path / "on_exception.ckpt").steps == BATCHES


def test_the_state_is_plain_data(tmp_path):
    path = next(iter(Run(val=True).fit(tmp_path).saved))
    state = torch.load(path, weights_only=True)[KEY]
    assert (state["position"], state["epoch"], state["batches"], state["world_size"]) == ("batch_end", 0, 1, 1)
    assert state["loader"] == [5, 2]
    assert len(state["ranks"]) == 1
    assert len(path.read_bytes()) < 100_000


def changed(saved_by: Run, resumed_by: Run, tmp_path: Path, place: int) -> str:
    path = list(saved_by.fit(tmp_path / "a").saved)[place]
    with pytest.warns(UserWarning, match="not bit for bit") as record:
        resumed_by.fit(tmp_path / "b", path)
    return "".join(str(w.message) for w in record if "bit for bit" in str(w.message))


def test_other_number_of_batches_is_announced(tmp_path):
    assert "5 batches per epoch of sizes [2], now there are 7 of" in changed(Run(), Run(batches=7), tmp_path, 7)


def test_fewer_batches_than_were_used_ends_the_epoch(tmp_path):
    assert "5 batches per epoch of sizes [2], now there are 2 of" in changed(Run(), Run(batches=2), tmp_path, 3)
    stream = changed(Run(loader="stream"), Run(loader="stream", batches=2), tmp_path, 3)
    assert "the loader gave 2 batches where the checkpoint had used 4" in stream


def test_other_number_of_batches_between_epochs_is_fine(tmp_path):
    path = list(Run(at="epoch").fit(tmp_path / "a").saved)[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*bit for bit.*")
        assert Run(batches=7).fit(tmp_path / "b", path).steps == 10 + 7


def test_other_number_of_processes_is_announced(tmp_path):
    path = list(Run().fit(tmp_path / "a").saved)[2]
    checkpoint = torch.load(path)
    checkpoint[KEY]["world_size"], checkpoint[KEY]["ranks"] = 2, checkpoint[KEY]["ranks"] * 2
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match="written by 2 processes and is resumed by 1"):
        assert Run().fit(tmp_path / "b", path).steps == BATCHES


def test_a_short_loader_that_starts_again_is_announced(tmp_path):
    run = Run(loader="max_size_cycle")
    assert "a shorter loader had started again" in changed(run, run, tmp_path, 3)


def test_persistent_workers_are_announced(tmp_path):
    run = Run(workers=1, loader="persistent", epochs=2)
    assert "persistent workers carry random states" in changed(run, run, tmp_path, 6)


def test_a_save_within_an_accumulation_is_announced(tmp_path):
    run = Run(trainer={"accumulate_grad_batches": 2})
    reference = Run(trainer={"accumulate_grad_batches": 2}, at="none")

    class Early(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, 2):
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    reference.fit(tmp_path / "a", extra=[Early()])
    with pytest.warns(UserWarning, match="between two optimizer steps"):
        run.fit(tmp_path / "b", tmp_path / "early.ckpt")


def test_a_save_inside_a_batch_is_announced(tmp_path):
    class Inside(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, 2):
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    Run(at="none").fit(tmp_path / "a", extra=[Inside()])
    with pytest.warns(UserWarning, match="inside a batch"):
        assert Run(at="none").fit(tmp_path / "b", tmp_path / "inside.ckpt").steps == BATCHES


def test_a_damaged_state_is_refused():
    with pytest.raises(DeltaFileError, match=r"lacks .*ranks") as caught:
        ExactResume().load_state({"position": "batch_end"})
    assert caught.value.code == "schema"


def test_a_fresh_run_is_not_changed(tmp_path, monkeypatch):
    observed = Run(val=True).fit(tmp_path / "a")
    monkeypatch.setattr(Resume, "setup", lambda *_, **__: None)
    monkeypatch.setattr(Resume, "on_save_checkpoint", lambda *_: None)
    assert same(Run(val=True).fit(tmp_path / "b"), observed, 0)


def test_a_second_fit_and_a_failed_fit_leave_nothing_behind(tmp_path):
    class Fail(L.Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("stop")

    def trainer(*callbacks):
        return L.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, callbacks=list(callbacks), limit_val_batches=0,
        )  # fmt: skip

    failing, run = trainer(Resume(), Fail()), Run()
    with pytest.raises(RuntimeError, match="stop"):
        failing.fit(Module(run), run.train_loader())
    working = trainer(Resume())
    for _ in range(2):
        working.fit(Module(run), run.train_loader())
        working.fit_loop.epoch_progress.current.processed = 0
    for used in (failing, working):
        assert "process_dataloader" not in vars(used.strategy)
        assert "reset" not in vars(used.fit_loop)
        assert "on_run_start" not in vars(used.fit_loop.epoch_loop)


def test_nothing_runs_per_batch(tmp_path, monkeypatch):
    """The object is entered a fixed number of times per epoch, whatever the number of batches."""

    def calls(batches: int) -> int:
        count = 0

        def count_states(devices, original=private_state):
            nonlocal count
            count += 1
            return original(devices)

        monkeypatch.setattr("lightning_pet.training.resume.random_state", count_states)
        Run(batches=batches, at="none").fit(tmp_path / f"{batches}")
        return count

    from lightning_pet.training.resume import random_state as private_state

    assert calls(3) == calls(12) == 6


def test_private_names_exist(tmp_path):
    """What an upgrade of Lightning may rename, named one by one."""
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    loop = trainer.fit_loop
    for owner, names in {
        loop: ("reset", "on_iteration_done", "_restarting", "is_resuming", "epoch_progress",
               "_load_combined_loader_states", "_combined_loader_states_to_load", "_combined_loader"),
        loop.epoch_loop: ("on_run_start", "on_advance_end", "on_iteration_done", "_skip_next_val", "batch_progress",
                          "val_loop", "update_lr_schedulers"),
        trainer.strategy: ("process_dataloader",),
        L.pytorch.utilities.CombinedLoader([]): ("_mode", "flattened", "reset"),
    }.items():  # fmt: skip
        assert [name for name in names if not hasattr(owner, name)] == []
    assert not private.gives_iterator(object())
