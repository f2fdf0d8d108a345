"""Delta files of every method with another option, place or tensor, signed as if nothing had happened.

Each is refused by ``DeltaFileError`` soon, with little memory and the model untouched; or it loads, and then the model
computes finite numbers and the delta can be taken out.
"""

import resource
import time
from dataclasses import replace

import pytest
import torch
from method_runs import METHODS

import lightning_pet as pet
from lightning_pet.layers.delta import without_memory
from lightning_pet.layers.prefix import Prefix
from lightning_pet.operations.adapted import Adapted
from lightning_pet.operations.loading import insert
from lightning_pet.store.reader import read
from tests.methods import zoo
from tests.methods.battery import perturb

SECONDS, MEGABYTES = 2.0, 256
VALUES = [None, True, -1, 10**9, 2**62, 1e308, 1e-308, "x", "../x", [], [10**9], [1e308, -1e308], {"x": 1}]
NEVER = ["start_from", "base_check", "adapters", "self", "kwargs", "of_the_run"]
PLACES = {
    "module": ["", "bert", "bert.pooler", "nope"],
    "parameter": ["", "weight", "nope"],
    "role": [None, "ffn.down", "attention.core"],
    "rows": [((0, 10**9),), ((5, 7), (0, 2))],
    "sizes": [(), (0,), (10**9,), (10**9,) * 8, (2, 8, 8, 16, 0, 2**62, 1, 1), (2**62,) * 16],
}
CHOSEN = [
    label
    for label in METHODS
    if label not in ("LoRA+", "LoRA, EVA", "Gradual unfreezing", "Adapter, robust drop", "LoRA with BitFit")
]


class Target:
    """A fresh base, and what it was."""

    def __init__(self):
        self.renew()

    def renew(self):
        self.model, self.run = zoo.bert()
        self.clean = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def untouched(self):
        now = self.model.state_dict()
        same = now.keys() == self.clean.keys() and all(torch.equal(now[n], t) for n, t in self.clean.items())
        return same and not any("_pet" in vars(module) for module in self.model.modules())

    def attempt(self, stored, what):
        """Load a forged file; returns the error, if it is refused."""
        start, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        error = None
        try:
            adapted = Adapted(insert(self.model, stored))
        except pet.DeltaFileError as caught:
            error = caught
        assert time.process_time() - start < SECONDS, what
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MEGABYTES * 1024, what
        if error is None:
            assert torch.isfinite(self.run(self.model)).all(), what
            adapted.remove()
        else:
            assert str(stored.path) in str(error), what
            assert len(str(error)) < 1500, what
        assert self.untouched(), what
        return error


@pytest.fixture(scope="module")
def target():
    return Target()


@pytest.fixture(scope="module", params=CHOSEN)
def stored(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("forged")
    base, run = zoo.bert()
    perturb(pet.apply(base, METHODS[request.param](folder), forward=lambda: run(base)), 0.05)
    pet.save_delta(base, folder / "d.pet.safetensors")
    return read(folder / "d.pet.safetensors")


def with_method(stored, index, **fields):
    methods = list(stored.methods)
    methods[index] = replace(methods[index], **fields)
    return replace(stored, methods=tuple(methods))


def test_options(stored, target):
    for index, method in enumerate(stored.methods):
        for option in method.config:
            for value in VALUES:
                target.attempt(with_method(stored, index, config={**method.config, option: value}), (option, value))
        for option in NEVER:
            forged = with_method(stored, index, config={**method.config, option: "x"})
            assert target.attempt(forged, option) is not None, option


def test_places(stored, target):
    assert target.attempt(stored, "the file itself") is None
    for index, method in enumerate(stored.methods):
        for number, place in enumerate(method.targets[:2]):
            for field, values in PLACES.items():
                for value in values:
                    targets = list(method.targets)
                    targets[number] = replace(place, **{field: value})
                    forged = with_method(stored, index, targets=tuple(targets))
                    try:
                        target.attempt(forged, (field, value))
                    except (
                        RuntimeError,
                        pet.DeadSiteError,
                    ):  # an adapter of a fitting size at a place where it cannot run
                        target.renew()
        if any(place.path for place in method.targets):
            again = target.attempt(with_method(stored, index, targets=method.targets * 300), "every place 300 times")
            assert again is not None


def test_tensors(stored, target):
    for name, tensor in list(stored.tensors.items())[:4]:
        other = torch.int32 if tensor.is_floating_point() else torch.float32
        for forged in (tensor.to(other), tensor.to(torch.complex64), tensor[None], tensor.reshape(-1)[:0], None):
            tensors = {**stored.tensors, name: forged}
            if forged is None:
                del tensors[name]
            error = target.attempt(replace(stored, tensors=tensors), (name, forged))
            assert error is not None or (forged is None and ".pet." in name), (name, forged)
        extra = {**stored.tensors, f"{name}x": tensor}
        assert target.attempt(replace(stored, tensors=extra), "one more") is not None


def test_a_folded_prefix_asks_for_no_memory_of_its_own(target, tmp_path):
    """The network behind a prefix may be absent, and then its size is a mere number of the file."""
    base, run = zoo.bert()
    pet.apply(base, [pet.PrefixTuningCallback(length=3, projection_size=4)], forward=lambda: run(base))
    pet.save_delta(base, tmp_path / "d.pet.safetensors")
    found = read(tmp_path / "d.pet.safetensors")
    folded = {n: t for n, t in found.tensors.items() if n.endswith((".key", ".value")) or ".pet." not in f".{n}"}
    config = found.methods[0].config
    assert target.attempt(with_method(replace(found, tensors=folded), 0, config=config), "folded") is None
    for size in (10**7, 10**9, 2**62):
        forged = with_method(replace(found, tensors=folded), 0, config={**config, "projection_size": size})
        assert target.attempt(forged, size).code in ("limit", "schema")


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"])
def test_no_regular_expression_of_a_file_is_looked_up(option, target, tmp_path):
    """One that backtracks takes years; what a run has chosen by one is in its file by place."""
    base, _ = zoo.bert()
    pet.apply(base, [pet.LoRACallback(r=2)])
    pet.save_delta(base, tmp_path / "d.pet.safetensors")
    found = read(tmp_path / "d.pet.safetensors")
    evil = r"re:(\w+\.?)+X"
    value = {evil: 2} if option.endswith("pattern") else [evil]
    error = target.attempt(with_method(found, 0, config={**found.methods[0].config, option: value}), option)
    assert error is None if isinstance(value, list) else error.code == "unsafe"


def test_building_without_memory_makes_shapes_only():
    with without_memory():
        prefix = Prefix(10**9, 8, 64, 64, device="cpu")
    assert prefix.key.is_meta
    assert prefix.key.shape == (8, 10**9, 64)
    assert torch.empty(2).device.type == "cpu"


def test_what_the_trainer_accepts_a_file_may_hold():
    """A scale that no reader takes is refused where it is chosen."""
    model, _ = zoo.bert()
    for method in (pet.LoRACallback(r=1, alpha=2000), pet.AdapterCallback(bottleneck_size=4, scale=2000)):
        with pytest.raises(pet.ArgumentError, match="at most 1024"):
            pet.apply(model, [method])
