"""Layers whose weight is made from other parameters for each call: weight norm, spectral norm, pruning masks."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_pet import (
    AdaLoRACallback,
    DiffPruningCallback,
    IA3Callback,
    LoRACallback,
    NotMergeableError,
    PETCallback,
    TargetError,
    apply,
    load_delta,
    save_delta,
)

from .battery import base_digest, equal_states, perturb

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm")

FIRST = {"target_modules": ["0"], "modules_to_save": []}
METHODS: dict[str, Callable[[], PETCallback]] = {
    "lora": lambda: LoRACallback(r=2, **FIRST),
    "lora_bias": lambda: LoRACallback(r=2, lora_bias=True, **FIRST),
    "adalora": lambda: AdaLoRACallback(init_r=2, target_r=1, **FIRST),
    "ia3": lambda: IA3Callback(feedforward_modules=[], **FIRST),
    "ia3_input": lambda: IA3Callback(feedforward_modules=["0"], **FIRST),
}


def linear() -> tuple[nn.Module, torch.Tensor]:
    return nn.Linear(4, 6), torch.randn(3, 4)


def conv1d() -> tuple[nn.Module, torch.Tensor]:
    return nn.Conv1d(4, 6, 3, padding=1, groups=2), torch.randn(2, 4, 9)


def conv2d() -> tuple[nn.Module, torch.Tensor]:
    return nn.Conv2d(4, 6, (3, 1), stride=2), torch.randn(2, 4, 9, 9)


def adapted_layer(layer, norm, callback):
    torch.manual_seed(0)
    host, x = layer()
    model = nn.Sequential(norm(host)).double().eval()
    base = model(x.double()).detach()
    return model, x.double(), base, apply(model, [callback], forward=lambda: model(x.double()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", [linear, conv1d, conv2d])
def test_weight_norm(layer, method: str) -> None:
    """The delta adds to what the layer returns, and merges into norm and direction."""
    model, x, base, adapted = adapted_layer(layer, parametrizations.weight_norm, METHODS[method]())
    assert torch.equal(model(x), base)
    perturb(adapted)
    attached = model(x).detach()
    assert not torch.allclose(attached, base)
    model(x).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".pet." in name)
    with adapted.disabled():
        assert torch.equal(model(x), base)
    adapted.merge_()
    assert parametrize.is_parametrized(model[0], "weight")
    assert (model(x) - attached).abs().max() < 1e-12


@pytest.mark.parametrize("method", ["lora", "ia3"])
@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (nn.utils.weight_norm, "made by a hook"),
        (nn.utils.spectral_norm, "made by a hook"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "made by a hook"),
        (parametrizations.spectral_norm, "SpectralNorm, which cannot"),
    ],
)
def test_what_no_parameters_make_stays_attached(norm, message: str, method: str) -> None:
    model, x, base, adapted = adapted_layer(conv1d, norm, METHODS[method]())
    perturb(adapted)
    attached, state = model(x).detach(), base_digest(model)
    with pytest.raises(NotMergeableError, match=message):
        adapted.merge_()
    assert torch.equal(model(x), attached)
    adapted.remove()
    assert equal_states(base_digest(model), state)
    assert torch.equal(model(x), base)


def test_files(tmp_path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(parametrizations.weight_norm(nn.Conv1d(4, 6, 3)), nn.Conv1d(6, 2, 1)), torch.randn(2, 4, 9)
    fresh = copy.deepcopy(model)
    adapted = apply(model, [LoRACallback(r=2, target_modules="all-conv", modules_to_save=[])])
    assert [target.path for target in adapted.record.applied[0].targets] == ["0.weight", "1.weight"]
    perturb(adapted)
    save_delta(model, tmp_path / "delta.pet.safetensors")
    load_delta(fresh, tmp_path / "delta.pet.safetensors")
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init": "pissa"}, {"init": "olora"}])
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_what_needs_the_weight_itself_is_refused(norm, options: dict[str, object]) -> None:
    model = nn.Sequential(norm(nn.Linear(4, 6)))
    state = base_digest(model)
    with pytest.raises(TargetError, match=r"0\.weight is made from other parameters"):
        apply(model, [LoRACallback(r=2, **FIRST, **options)])
    assert equal_states(base_digest(model), state)


def test_a_delta_on_the_layer_and_one_on_what_makes_its_weight() -> None:
    model, x = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 6))), torch.randn(3, 4)
    adapted = apply(model, [METHODS["lora"](), DiffPruningCallback(density=0.5, modules_to_save=[])])
    perturb(adapted)
    attached = model.eval()(x)
    with pytest.raises(NotMergeableError, match="and so has what it is made from"):
        adapted.merge_()
    assert torch.equal(model(x), attached)
