"""Power loss at every point of a save, by the model of ``benchmarks/crash/power_loss.py``."""

import pytest

from benchmarks.crash.power_loss import (
    NEW,
    OLD,
    SCENARIOS,
    InPlace,
    LateFileSync,
    NoFileSync,
    NoFolderSync,
    RecordingDisk,
    faults,
    folder,
    save,
    states,
)

LEAST = {"file over an older one": 42, "second name": 24, "folder": 54, "save, then prune": 48}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_power_loss_anywhere_tears_and_loses_nothing(scenario):
    found = faults(scenario, RecordingDisk())
    assert found["states"] >= LEAST[scenario]
    assert (found["torn"], found["lost"]) == (0, 0)


@pytest.mark.parametrize(
    ("disk", "tears", "loses"),
    [(NoFileSync, True, True), (NoFolderSync, False, True), (LateFileSync, True, False), (InPlace, True, False)],
)
def test_the_model_finds_writers_that_are_not_durable(disk, tears, loses):
    found = faults("file over an older one", disk())
    assert bool(found["torn"]) is tears
    assert bool(found["lost"]) is loses


@pytest.mark.parametrize(("disk", "tears"), [(NoFileSync, True), (NoFolderSync, False), (LateFileSync, True)])
def test_the_model_finds_folders_that_are_not_durable(disk, tears):
    found = faults("folder", disk())
    assert bool(found["torn"]) is tears
    assert bool(found["lost"]) is (disk is not LateFileSync)


@pytest.mark.parametrize("failing", ["sync", "replace", "sync_folder"])
def test_a_failing_call_leaves_the_old_or_the_new_file(failing):
    disk = failing_disk(failing)
    with pytest.raises(ValueError, match="errno 5"):
        save(disk)
    assert set(states(disk.log, SCENARIOS["file over an older one"][1])) <= {OLD, NEW}
    assert failing == "sync_folder" or disk.log[-1][0] == "unlink"


@pytest.mark.parametrize("failing", ["make_new_folder", "sync_tree", "replace"])
def test_a_failing_call_leaves_no_folder(failing):
    disk = failing_disk(failing)
    with pytest.raises(ValueError, match="folder: writing failed with errno 5"):
        folder(disk)
    assert set(map(bool, states(disk.log, SCENARIOS["folder"][1]))) == {False}
    assert disk.log[-1][0] == "unlink"


def failing_disk(name):
    disk = RecordingDisk()

    def refuse(*_):
        raise OSError(5, "Input/output error")

    setattr(disk, name, refuse)
    return disk
