"""Several deltas in one model on every engine, two processes: trained beside others, chosen, switched, saved."""

from pathlib import Path

import pytest
import torch
from many_runs import CHOICES, ROWS
from models import Data, Module, Net, cosine, fit, lora, trainer
from two_processes import on_engine

from lightning_pet import Adapted, inspect_delta, load_delta, save_delta
from lightning_pet.model.naming import delta_of

SCRIPT = str(Path(__file__).with_name("many_runs.py"))
ENGINES = ["fsdp2", "zero3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "fsdp", "zero2"))]
PIECES = ("fsdp", "zero3")  # no process can write into a whole parameter of its own


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process trains and computes."""
    folder = tmp_path_factory.mktemp("many")
    for name, options in (("tone", {"modules_to_save": []}), ("headed", {})):
        module = Module(Net(dropout=0))
        fit(module, lora(**options), max_epochs=1)
        save_delta(module, folder / f"{name}.pet.safetensors")
    module = begun(folder)
    fit(module, lora(delta="topic"), data=Data(shuffle=False))
    save_delta(module, folder / "topic.pet.safetensors", name="topic")
    return folder, module


def begun(folder: Path) -> Module:
    module = Module(Net(dropout=0), cosine)
    for name in ("tone", "headed"):
        load_delta(module, folder / f"{name}.pet.safetensors", name=name)
    return module


@pytest.fixture(scope="module", params=ENGINES)
def two(request, one, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, *on_engine(SCRIPT, request.param, one[0], folder, timeout=200)


def test_a_delta_trains_beside_others(one, two):
    engine, folder, ranks = two
    for rank in ranks:
        assert rank["losses"] == pytest.approx(one[1].losses, rel=1e-5), "also where a validation acted with another"
        assert rank["active"] == ["tone", "topic"]
        assert rank["again"] == rank["noisy"][3:]
        assert ("cannot get the values" in str(rank["fit"]["in a fit"])) == (engine in PIECES)
    state = torch.load(folder / "plain" / "step=10.ckpt", weights_only=True)["state_dict"]
    assert {delta_of(name) for name in state if ".pet." in name} == {"topic"}
    assert list(inspect_delta(folder / "topic.pet.safetensors").base.beside) == ["tone"]
    module, x = begun(one[0]), torch.randn(7, 6)
    for name, path in (("file", folder / "topic.pet.safetensors"), ("checkpoint", folder / "plain" / "step=10.ckpt")):
        load_delta(module, path, name=name)
        Adapted(module).activate("tone", name)
        with torch.no_grad():
            torch.testing.assert_close(module.eval()(x), one[1].eval()(x), atol=1e-4, rtol=1e-4)


def test_every_choice_computes_what_it_does_in_one_process(one, two):
    engine, folder, ranks = two
    module = begun(one[0])
    load_delta(module, folder / "topic.pet.safetensors", name="topic")
    adapted, batches = Adapted(module.eval()), list(Data(shuffle=False).val_dataloader())

    def output(batch) -> list[float]:
        with torch.no_grad():
            return module.net(batch[0]).sum(-1).tolist()

    for rank in ranks:
        found = rank["looks"]
        for batch, (name, chosen) in zip(batches, CHOICES.items(), strict=False):
            with adapted.using(*chosen):
                expected, last = output(batch), output(batches[4])
            assert found[f"using {name}"] == pytest.approx(last, abs=1e-5)
            if "headed" in chosen and engine in PIECES:
                assert "with adapted.using(name)" in found[f"activate {name}"]
            else:
                assert found[name] == pytest.approx(expected, abs=1e-5)
        with adapted.rows(ROWS):
            assert found["rows"] == pytest.approx(output(batches[4]), abs=1e-5)
        if engine == "fsdp2":
            assert "an engine holds parts of head" in found["rows of heads"]
        else:
            with adapted.rows(["headed", None, "tone", "headed"]):
                assert found["rows of heads"] == pytest.approx(output(batches[4]), abs=1e-5)
        assert found["after"] == found["using again"]


def test_values_that_a_run_trains_are_still_its_own_after_another_acted(one):
    """In one process: memory that an optimizer holds is given back as it was."""
    from many_runs import Choosing

    module = Choosing(Net(dropout=0), cosine)
    for name in ("tone", "headed"):
        load_delta(module, one[0] / f"{name}.pet.safetensors", name=name)
    torch.manual_seed(5)
    trainer(lora(delta="topic"), limit_val_batches=5).fit(module, datamodule=Data(shuffle=False))
    assert module.losses == pytest.approx(one[1].losses, rel=1e-6)
    assert module.found["in a fit"] is None
