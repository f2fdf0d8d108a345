"""Delta files and checkpoints outside of a run: from any model into any other, exactly or not at all."""

import copy
import os
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from hf_models import batches, bert, gpt2, hf_fit
from models import Data, Module, Net, classes, digest, fit, is_pristine, lora, trainer
from torch import nn

from lightning_pet.callbacks.lora import LoRACallback
from lightning_pet.callbacks.shira import SHiRACallback
from lightning_pet.errors import ArgumentError, BaseMismatchError, DeltaFileError, PETError
from lightning_pet.operations.adapted import Adapted
from lightning_pet.operations.apply import apply
from lightning_pet.operations.delta import inspect_delta, load_delta, load_from_checkpoint, read, save_delta
from lightning_pet.report.summary import print_summary, summarize
from lightning_pet.store.delta_file import read_delta, write_delta
from lightning_pet.store.reader import extract_delta, last_good

ROOT = Path(__file__).parents[2]
HEAD = {"head.weight", "head.bias"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A fitted module, its delta file and its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    module = Module(Net(norm=True))
    run = fit(module, lora())
    size = save_delta(module, folder / "d.pet.safetensors", notes={"task": "none"})
    assert size == (folder / "d.pet.safetensors").stat().st_size
    run.save_checkpoint(folder / "c.ckpt")
    return module, folder


def test_a_method_in_one_submodule_leaves_the_rest_to_the_user(tmp_path):
    """What trains beside the submodule is part of the file, and comes back with it."""

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), nn.Linear(4, 2))

    net = build()
    adapted = apply(net, [lora(module="0", target_modules=["0.0"], modules_to_save=[])])
    assert set(adapted.record.trained_names) == {"1.weight", "1.bias"}
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    save_delta(net, tmp_path / "d.pet.safetensors")
    fresh, x = build(), torch.ones(3, 4)
    loaded = load_delta(fresh, tmp_path / "d.pet.safetensors")
    assert torch.equal(fresh(x), net(x))
    assert loaded.record.scopes == ("0",)
    assert fresh[1].weight.requires_grad
    loaded.remove()
    assert torch.equal(fresh(x), build()(x))
    with pytest.raises(DeltaFileError, match="does not have"):
        load_delta(nn.ModuleDict({"only": build()})["only"][1], tmp_path / "d.pet.safetensors")


@pytest.mark.parametrize("name", ["d.pet.safetensors", "c.ckpt"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_delta_loads_into_the_bare_model_and_into_a_module(trained, name, wrapped):
    module, folder = trained
    target = Module(Net(norm=True)) if wrapped else Net(norm=True)
    adapted = load_delta(target, folder / name)
    net = target.net if wrapped else target
    assert adapted.root is net
    assert digest(net) == digest(module.net)
    assert sorted(n for n, p in net.named_parameters() if p.requires_grad) == sorted(
        HEAD | {n for n in adapted.record.delta_names}
    )
    adapted.remove()
    assert digest(net) == digest(Net(norm=True))
    assert is_pristine(target)


def test_from_the_bare_model_into_a_module(tmp_path):
    net = Net()
    adapted = apply(net, [lora()])
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(0.5)
    save_delta(net, tmp_path / "d.pet.safetensors")
    module = Module(Net())
    load_delta(module, tmp_path / "d.pet.safetensors")
    assert digest(module.net) == digest(net)
    adapted.merge_()
    merged = Net()
    load_delta(merged, tmp_path / "d.pet.safetensors").merge_()
    assert digest(merged) == digest(net)


@pytest.mark.parametrize("build", [bert, gpt2], ids=lambda f: f.__name__)
def test_transformers_models(build, tmp_path):
    module = hf_fit(build())
    save_delta(module, tmp_path / "d.pet.safetensors")
    bare = build()
    load_delta(bare, tmp_path / "d.pet.safetensors")
    assert digest(bare) == digest(module.net)
    batch = next(iter(batches(bare)))
    assert torch.equal(bare.eval()(**batch).logits, module.net.eval()(**batch).logits)
    with pytest.raises(DeltaFileError):
        load_delta(gpt2() if build is bert else bert(), tmp_path / "d.pet.safetensors")


FRESH = """
import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
from models import Module, Net, digest
from lightning_pet import load_delta, load_from_checkpoint
module = Module(Net(norm=True))
load_delta(module, {path!r})
print("DIGEST", digest(module))
"""


def test_a_fresh_process_loads_it_bit_for_bit(trained):
    module, folder = trained
    code = FRESH.format(root=str(ROOT), tests=str(Path(__file__).parent), path=str(folder / "d.pet.safetensors"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert f"DIGEST {digest(module)}" in done.stdout, done.stderr[-2000:]


def test_size_of_a_file(trained):
    module, folder = trained
    payload = sum(t.numel() * t.element_size() for t in Adapted(module.net).state_dict().values())
    assert payload < (folder / "d.pet.safetensors").stat().st_size <= payload + 32 * 1024


def test_inspecting(trained, capsys):
    _, folder = trained
    manifest = inspect_delta(folder / "d.pet.safetensors")
    assert [(m.method, m.name) for m in manifest.methods] == [("lora", "default")]
    assert manifest.notes == {"task": "none"}
    for name in ("d.pet.safetensors", "c.ckpt"):
        summary = summarize(folder / name)
        assert summary["methods"][0]["places"] == ["fc1.weight", "fc2.weight"]
        assert summary["methods"][0]["parameters"] == 2 * (6 + 8) + 2 * (8 + 8)
        print_summary(summary)
    assert "head.weight" in capsys.readouterr().out
    saved, other = inspect_delta(folder / "c.ckpt"), inspect_delta(folder / "d.pet.safetensors")
    assert (saved.methods, saved.tensors, saved.base) == (other.methods, other.tensors, other.base)
    assert saved.step == 10


def test_places_of_numbers_are_no_numbers(tmp_path, capsys):
    net = Net()
    apply(net, SHiRACallback(r=2, target_modules=["fc1"], modules_to_save=[]))
    save_delta(net, tmp_path / "d.pet.safetensors")
    summary = summarize(tmp_path / "d.pet.safetensors")
    assert summary["parameters"] == summary["methods"][0]["parameters"] == Adapted(net).plan().trainable
    print_summary(summary)
    assert ".indices" not in capsys.readouterr().out


def test_numbers_of_methods_with_similar_names(tmp_path):
    net = Net()
    apply(net, [lora(name="a", r=1), lora(name="ab", r=2), lora(name="b", r=3, target_modules=["fc1"])])
    save_delta(net, tmp_path / "d.pet.safetensors")
    numbers = [m["parameters"] for m in summarize(tmp_path / "d.pet.safetensors")["methods"]]
    assert numbers == [1 * 30, 2 * 30, 3 * 14]
    other = Net()
    apply(other, [lora(name="a", r=1, start_from=str(tmp_path / "d.pet.safetensors"))])
    assert torch.equal(other.fc1.pet["lora_a"].a, net.fc1.pet["lora_a"].a)


# --- load_from_checkpoint --------------------------------------------------------------------------------------


class Saved(Module):
    def __init__(self, dropout: float = 0.3, norm: bool = True) -> None:
        super().__init__(Net(norm=norm, dropout=dropout))
        self.save_hyperparameters()


class SavedLate(Module):
    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.save_hyperparameters()

    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = Net(dropout=self.hparams.dropout)


class SavedInSetup(SavedLate):
    def setup(self, stage):
        SavedLate.configure_model(self)

    def configure_model(self):
        pass


@pytest.mark.parametrize("kind", [Saved, SavedLate, SavedInSetup])
def test_load_from_checkpoint(kind, tmp_path):
    module = kind(dropout=0.25)
    run = fit(module, lora())
    run.save_checkpoint(tmp_path / "c.ckpt")
    by_class = load_from_checkpoint(kind, tmp_path / "c.ckpt")
    assert type(by_class) is kind
    assert by_class.net.drop.p == 0.25
    assert digest(by_class) == digest(module)
    by_instance = kind()
    assert load_from_checkpoint(by_instance, tmp_path / "c.ckpt") is by_instance
    assert digest(by_instance) == digest(module)
    overridden = load_from_checkpoint(kind, tmp_path / "c.ckpt", dropout=0.5)
    assert overridden.net.drop.p == 0.5
    save_delta(module, tmp_path / "d.pet.safetensors")
    assert digest(load_from_checkpoint(kind, tmp_path / "d.pet.safetensors")) == digest(module)


def test_further_training_of_a_loaded_delta(trained):
    _, folder = trained
    again = Module(Net(norm=True))
    load_delta(again, folder / "d.pet.safetensors")
    fit(again, lora(), max_epochs=1)
    continued = Module(Net(norm=True))
    fit(continued, lora(start_from=str(folder / "d.pet.safetensors")), max_epochs=1)
    for name, p in again.named_parameters():
        assert p.requires_grad == continued.get_parameter(name).requires_grad
    assert len(again.losses) == 5
    assert again.losses[0] < 1.5


def test_a_start_with_another_scale_is_said(tmp_path, recwarn):
    net = Net()
    apply(net, [lora(r=2, alpha=4)])
    save_delta(net, tmp_path / "d.pet.safetensors")
    start = str(tmp_path / "d.pet.safetensors")
    apply(Net(), [lora(r=2, alpha=4, dropout=0.1, start_from=start)])
    assert not [w for w in recwarn if "other outputs" in str(w.message)]
    with pytest.warns(UserWarning, match=r"alpha=4(\.0)? there and 8(\.0)? here, use_rslora=False there and True here"):
        apply(Net(), [lora(r=2, alpha=8, use_rslora=True, start_from=start)])


def test_two_deltas_from_two_files(trained, tmp_path):
    _, folder = trained
    other = Net(norm=True)
    apply(other, [lora(name="second", target_modules=["fc2"])])
    with torch.no_grad():
        other.fc2.pet["lora_second"].b.fill_(0.1)
    save_delta(other, tmp_path / "two.pet.safetensors")
    net = Net(norm=True)
    load_delta(net, folder / "d.pet.safetensors")
    load_delta(net, tmp_path / "two.pet.safetensors")
    assert list(net.fc2.pet) == ["lora_default", "lora_second"]
    save_delta(net, tmp_path / "both.pet.safetensors")
    both = Net(norm=True)
    load_delta(both, tmp_path / "both.pet.safetensors")
    assert digest(both) == digest(net)


def test_a_second_delta_whose_base_had_another_head(trained, tmp_path):
    """The head that the first delta trained is not the one that the second was trained with; the base's own is."""
    _, folder = trained
    other = Net(norm=True)
    apply(other, [lora(name="second", modules_to_save=[])])
    save_delta(other, tmp_path / "two.pet.safetensors")
    net = Net(norm=True)
    load_delta(net, folder / "d.pet.safetensors")
    load_delta(net, tmp_path / "two.pet.safetensors")
    assert list(net.fc2.pet) == ["lora_default", "lora_second"]
    changed = Net(norm=True)
    load_delta(changed, folder / "d.pet.safetensors")
    changed.fc1.weight.data[0, 0] += 1
    with pytest.raises(BaseMismatchError):
        load_delta(changed, tmp_path / "two.pet.safetensors")


def test_values_in_memory(trained):
    """``Adapted`` reads and writes the same tensors as a file; buffers that are left out are those of the base."""
    module, _ = trained
    values = {name: value.clone() for name, value in Adapted(module.net).state_dict().items()}
    net = Net(norm=True)
    adapted = apply(net, [lora()])
    start = {name: value.clone() for name, value in adapted.state_dict().items()}
    adapted.load_state_dict(values)
    assert digest(net) == digest(module.net)
    adapted.load_state_dict(start)
    assert torch.equal(net.norm.running_mean, Net(norm=True).norm.running_mean)
    before = digest(net)
    for wrong in (values | {"fc1.weight": torch.zeros(8, 6)}, {"head.bias": torch.zeros(3)}):
        with pytest.raises(DeltaFileError):
            adapted.load_state_dict(wrong)
    assert digest(net) == before


# --- refusals ----------------------------------------------------------------------------------------------------


def refuse(path, net=None, error=DeltaFileError, **options):
    """The error, and the model exactly as it was."""
    for target in (net or Net(norm=True), Module(net or Net(norm=True))):
        before, kinds = digest(target), classes(target)
        with pytest.raises(error) as caught:
            load_delta(target, path, **options)
        assert isinstance(caught.value, PETError)
        assert (digest(target), classes(target)) == (before, kinds)
        assert is_pristine(target)
        assert all(p.requires_grad for p in target.parameters())
    return caught.value


def rewritten(trained, tmp_path, change):
    """The delta file with other tensors, signed as if nothing had happened."""
    found = read_delta(trained[1] / "d.pet.safetensors")
    tensors = dict(found.tensors)
    manifest = change(tensors, found.manifest) or found.manifest
    write_delta(tmp_path / "x.pet.safetensors", tensors, manifest)
    return tmp_path / "x.pet.safetensors"


A = "fc1.pet.lora_default.a"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, m: t.update({"fc1.weight": torch.zeros(8, 6)}), "fc1.weight is unexpected"),
        (lambda t, m: t.update({"fc1.pet.lora_default.c": torch.zeros(1)}), "lora_default.c is unexpected"),
        (lambda t, m: t.update({"stranger": torch.zeros(1)}), "stranger is unexpected"),
        (lambda t, m: t.update({A: torch.zeros(3, 6)}), "has shape (3, 6), expected (2, 6)"),
        (lambda t, m: t.update({"norm.running_mean": torch.zeros(3)}), "norm.running_mean has shape (3,)"),
        (lambda t, m: t.pop(A) is None, f"{A} is missing"),
        (lambda t, m: t.pop("head.weight") is None, "head.weight is missing"),
    ],
)
def test_files_that_do_not_fit(trained, tmp_path, change, words):
    error = refuse(rewritten(trained, tmp_path, lambda t, m: change(t, m) and None))
    assert error.code == "mismatch"
    assert words in str(error)


def test_bad_options_in_a_file(trained, tmp_path):
    from dataclasses import replace

    def with_config(**options):
        def change(tensors, manifest):
            method = manifest.methods[0]
            return replace(manifest, methods=(replace(method, config={**method.config, **options}),))

        return change

    for options, code in (
        ({"r": 0}, "schema"),
        ({"r": "x"}, "schema"),
        ({"unknown": 1}, "schema"),
        ({"r": 1000}, "mismatch"),
        ({"r": 3}, "mismatch"),
        ({"name": "other"}, "mismatch"),
    ):
        assert refuse(rewritten(trained, tmp_path, with_config(**options))).code == code, options


def test_an_unknown_method(trained, tmp_path):
    from dataclasses import replace

    path = rewritten(trained, tmp_path, lambda t, m: replace(m, methods=(replace(m.methods[0], method="os"),)))
    error = refuse(path)
    assert error.code == "version"
    assert "this release knows" in str(error)


def test_another_base_or_architecture(trained):
    _, folder = trained
    for name in ("d.pet.safetensors", "c.ckpt"):
        assert refuse(folder / name, Net(seed=2, norm=True), BaseMismatchError).code == "base"
        net = Net(norm=True)
        net.fc1 = torch.nn.Identity()
        assert "fc1.weight" in str(refuse(folder / name, net))
        wider = Net(norm=True)
        wider.fc2 = torch.nn.Linear(8, 9)
        assert refuse(folder / name, wider).code == "mismatch"
    with pytest.warns(UserWarning, match="another base model"):
        load_delta(Net(seed=2, norm=True), folder / "d.pet.safetensors", base_check="warn")


def test_nonfinite_values(trained, tmp_path):
    module = Module(Net())
    apply(module, [lora()])
    module.net.fc1.pet["lora_default"].a.data[0, 0] = float("inf")
    with pytest.raises(DeltaFileError) as caught:
        save_delta(module, tmp_path / "n.pet.safetensors")
    assert caught.value.code == "nonfinite"
    assert os.listdir(tmp_path) == []


def test_a_second_time(trained):
    module = Net(norm=True)
    load_delta(module, trained[1] / "d.pet.safetensors")
    before = digest(module)
    with pytest.raises(ArgumentError, match="default"):
        load_delta(module, trained[1] / "d.pet.safetensors")
    assert digest(module) == before


def test_nothing_to_save():
    with pytest.raises(PETError, match="nothing was applied"):
        save_delta(Net(), "x")


def test_paths(tmp_path):
    assert refuse(tmp_path / "absent").code == "io"
    assert refuse(tmp_path).code in ("io", "unsafe")
    os.mkfifo(tmp_path / "pipe")
    seen = []
    thread = threading.Thread(target=lambda: seen.append(refuse(tmp_path / "pipe")), daemon=True)
    thread.start()
    thread.join(20)
    assert seen, "a pipe was waited for"
    assert seen[0].code == "unsafe"


def test_damaged_files(trained, tmp_path):
    _, folder = trained
    for name in ("d.pet.safetensors", "c.ckpt"):
        data = (folder / name).read_bytes()
        for number, content in enumerate((data[: len(data) // 2], data[:10], b"", data[:-1])):
            path = tmp_path / f"{number}-{name}"
            path.write_bytes(content)
            assert refuse(path).code in ("corrupt", "schema", "limit"), (name, number)
        flipped = bytearray(data)
        flipped[-100] ^= 1
        (tmp_path / name).write_bytes(flipped)
        assert refuse(tmp_path / name).code == "corrupt"


def test_a_base_checkpoint_is_no_delta(tmp_path):
    run = fit(Module(Net(norm=True)), max_epochs=1)
    run.save_checkpoint(tmp_path / "base.ckpt")
    assert "is not a delta checkpoint" in str(refuse(tmp_path / "base.ckpt"))


def test_reading_needs_no_model(trained):
    _, folder = trained
    stored = {name: read(folder / name) for name in ("d.pet.safetensors", "c.ckpt")}
    assert stored["c.ckpt"].methods == stored["d.pet.safetensors"].methods
    for one, other in zip(sorted(stored["c.ckpt"].tensors), sorted(stored["d.pet.safetensors"].tensors), strict=True):
        assert one == other
        assert torch.equal(stored["c.ckpt"].tensors[one], stored["d.pet.safetensors"].tensors[one])


def test_validation_after_loading_gives_the_same_score(trained):
    module, folder = trained
    loaded = load_from_checkpoint(Module(Net(norm=True)), folder / "c.ckpt")
    scores = [trainer(limit_val_batches=1.0).validate(m, datamodule=Data(), verbose=False) for m in (module, loaded)]
    assert scores[0] == scores[1]


def test_the_home_folder(trained, tmp_path, monkeypatch):
    """``~`` as people write it, in every place that takes a path."""
    monkeypatch.setenv("HOME", str(tmp_path))
    module, folder = trained
    save_delta(module, "~/d.pet.safetensors")
    (tmp_path / "c.ckpt").write_bytes((folder / "c.ckpt").read_bytes())
    extract_delta("~/c.ckpt", "~/e.pet.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["c.ckpt", "d.pet.safetensors", "e.pet.safetensors"]
    for name in ("c.ckpt", "d.pet.safetensors", "e.pet.safetensors"):
        assert inspect_delta(f"~/{name}").methods
        net = Net(norm=True)
        load_delta(net, f"~/{name}")
        assert digest(net) == digest(module.net)
        apply(Net(norm=True), [lora(start_from=f"~/{name}")])
    assert last_good("~") == tmp_path / "c.ckpt"


def test_a_folder_of_transformers_says_what_it_does_not_hold(tmp_path):
    model = bert()
    adapted = apply(model, [LoRACallback(r=2, target_modules=["query"])])
    with pytest.warns(UserWarning, match=r"without the delta.*save_delta.*merge_"):
        model.save_pretrained(tmp_path / "adapted")
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for whole in (model, twin):
        assert vars(whole)["save_pretrained"].module is whole
    with pytest.warns(UserWarning, match="without the delta"):
        twin.save_pretrained(tmp_path / "twin")
    adapted.merge_()
    assert "save_pretrained" not in vars(model)
    Adapted(twin).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "merged")
        twin.save_pretrained(tmp_path / "removed")
    again = type(model).from_pretrained(tmp_path / "adapted")
    assert torch.equal(again.classifier.weight, twin.classifier.weight)
