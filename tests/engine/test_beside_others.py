"""A Trainer trains a delta in a model that has others: they stay what they are, and act or not as before."""

import pytest
import torch
from models import Module, Net, fit, lora
from torch import Tensor

from lightning_pet import (
    AdaLoRACallback,
    Adapted,
    ArgumentError,
    BaseMismatchError,
    BitFitCallback,
    DiffPruningCallback,
    IA3Callback,
    inspect_delta,
    load_delta,
    save_delta,
)
from lightning_pet.model.naming import delta_of

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def tone(tmp_path_factory):
    """A trained delta without a head, one with a head, and one with drawn gates."""
    folder = tmp_path_factory.mktemp("tone")
    kinds = {
        "plain": lora(modules_to_save=[], dropout=0.5),
        "headed": lora(),
        "drawn": DiffPruningCallback(density=0.3, modules_to_save=[], verbose=False),
    }
    for name, method in kinds.items():
        module = Module(Net(norm=name == "headed"))
        fit(module, method, max_epochs=1)
        save_delta(module, folder / f"{name}.pet.safetensors")
    return folder


def output(module) -> Tensor:
    module.eval()
    with torch.no_grad():
        return module(X)


def tensors(module, name: str) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in Adapted(module)[name].state_dict().items()}


@pytest.mark.parametrize("acts", [True, False])
@pytest.mark.parametrize("kind", ["plain", "drawn"])
@pytest.mark.parametrize("build", [lora, lambda **o: IA3Callback(target_modules=["fc2"], feedforward_modules=[], **o)])
def test_the_others_stay_as_they_are(tone, tmp_path, acts, kind, build):
    module = Module(Net())
    adapted = load_delta(module, tone / f"{kind}.pet.safetensors", name="tone")
    before, alone = tensors(module, "tone"), output(module)
    if not acts:
        adapted.activate()
    run = fit(module, build(delta="topic", verbose=False) if build is not lora else build(delta="topic"))
    assert adapted.active == (("tone", "topic") if acts else ("topic",))
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    names = {name.removeprefix("net.") for name, p in module.named_parameters() if id(p) in held}
    assert {delta_of(name) for name in names} == {"topic", None}
    after = tensors(module, "tone")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    run.save_checkpoint(tmp_path / "x.ckpt")
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert {delta_of(name) for name in stored["state_dict"] if ".pet." in name} == {"topic"}
    save_delta(module, tmp_path / "topic.pet.safetensors")
    base = inspect_delta(tmp_path / "topic.pet.safetensors").base
    assert list(base.beside) == (["tone"] if acts else [])
    assert adapted["topic"].beside == (("tone",) if acts else ())
    together = output(module)

    for source in ("topic.pet.safetensors", "x.ckpt"):
        fresh = Module(Net())
        if acts:
            with pytest.raises(BaseMismatchError, match="was trained while the delta 'tone' acted"):
                load_delta(fresh, tmp_path / source, name="topic")
        load_delta(fresh, tone / f"{kind}.pet.safetensors", name="tone")
        load_delta(fresh, tmp_path / source, name="again")
        Adapted(fresh).activate(*(["tone"] if acts else []), "again")
        assert torch.equal(output(fresh), together)
        Adapted(fresh).activate("tone")
        assert torch.equal(output(fresh), alone)
    Adapted(fresh)["again"].save(tmp_path / "again.pet.safetensors")
    assert list(inspect_delta(tmp_path / "again.pet.safetensors").base.beside) == (["tone"] if acts else [])


def test_it_trains_as_if_it_were_alone_where_no_other_acts(tone):
    solo, module = Module(Net(norm=True)), Module(Net(norm=True))
    adapted = load_delta(module, tone / "headed.pet.safetensors", name="tone")
    adapted.activate()
    fit(solo, lora())
    fit(module, lora(delta="topic"))
    assert solo.losses == module.losses
    assert torch.equal(output(solo), output(module))


def test_a_frozen_delta_draws_nothing(tone):
    losses = []
    for _ in range(2):
        module = Module(Net(dropout=0.0))
        load_delta(module, tone / "plain.pet.safetensors", name="tone")  # with a dropout of 0.5
        fit(module, BitFitCallback(delta="topic", verbose=False), max_epochs=1)
        losses.append(module.losses)
        torch.rand(3)
    assert losses[0] == losses[1]


def test_a_head_that_acts_cannot_be_trained_by_another(tone):
    module = Module(Net(norm=True))
    adapted = load_delta(module, tone / "headed.pet.safetensors", name="tone")
    before = output(module)
    with pytest.raises(ArgumentError, match=r"'tone' and 'topic' have each its own values for head\."):
        fit(module, lora(delta="topic"))
    assert list(adapted) == ["tone"]
    assert torch.equal(output(module), before)
    adapted.activate()
    fit(module, lora(delta="topic"))
    assert adapted.active == ("topic",)
    adapted.activate("tone")
    assert torch.equal(output(module), before)


def test_resume_among_others(tone, tmp_path):
    def begun() -> Module:
        module = Module(Net())
        load_delta(module, tone / "plain.pet.safetensors", name="tone")
        return module

    whole = begun()
    fit(whole, lora(delta="topic"), max_epochs=3)
    half = begun()
    fit(half, lora(delta="topic"), max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    again = begun()
    fit(again, lora(delta="topic"), max_epochs=3, ckpt=tmp_path / "half.ckpt")
    assert half.losses + again.losses == whole.losses
    assert torch.equal(output(again), output(whole))


def test_a_loaded_delta_trains_on_under_its_name(tone):
    module = Module(Net())
    adapted = load_delta(module, tone / "plain.pet.safetensors", name="tone")
    adapted.load("other", tone / "plain.pet.safetensors")
    before = tensors(module, "other")
    fit(module, lora(delta="tone", modules_to_save=[], dropout=0.5), max_epochs=1)
    assert list(adapted) == ["tone", "other"]
    assert adapted.active == ("tone",)
    assert all(torch.equal(t, before[n]) for n, t in tensors(module, "other").items())
    assert not torch.equal(
        adapted["tone"].state_dict()["fc1.pet.lora_default@tone.b"], before["fc1.pet.lora_default@other.b"]
    )


def test_a_run_without_callbacks_trains_what_acts(tone):
    module = Module(Net())
    adapted = load_delta(module, tone / "plain.pet.safetensors", name="tone")
    adapted.load("other", tone / "plain.pet.safetensors")
    adapted.activate("other")
    before = tensors(module, "tone")
    with pytest.warns(UserWarning, match="was given no callback for it"):
        fit(module, max_epochs=1)
    assert all(torch.equal(t, before[n]) for n, t in tensors(module, "tone").items())


def test_the_callback_has_the_handle(tone):
    sizes = {"target_r": 1, "init_r": 2, "total_step": 5, "tinit": 1, "tfinal": 1}
    module, method = Module(Net()), AdaLoRACallback(target_modules=["fc1"], delta="topic", verbose=False, **sizes)
    load_delta(module, tone / "plain.pet.safetensors", name="tone")
    fit(module, method, max_epochs=1)
    assert list(method.adapted) == ["tone", "topic"]
    with pytest.raises(ArgumentError, match=r"delta='a\.b'"):
        lora(delta="a.b")
