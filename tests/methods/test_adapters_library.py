"""The same outputs as the adapters library, with copied weights.

Another method joins by a test like :func:`test_bottleneck_adapters`: read the file, apply the callback, copy the
weights by an explicit mapping of names, compare.
"""

import re

import pytest
import torch
from torch import Tensor, nn

from lightning_pet import AdapterCallback, CompacterCallback, PrefixTuningCallback, apply
from lightning_pet.layers.prefix import Prefix
from lightning_pet.model.naming import named_modules

from .adapters_files import ARCHITECTURES, Reference, read

_PARTS = {
    "adapter_down.0.weight": "down",
    "adapter_down.0.bias": "down_bias",
    "adapter_up.weight": "up",
    "adapter_up.bias": "up_bias",
}
# Where the library hangs the adapters of one sub-layer -> where ours are, per architecture and placement.
_HOSTS: dict[str, dict[str, tuple[tuple[str, str], ...]]] = {
    "bert": {
        "houlsby": ((r"(.*)\.adapters", r"\1.dropout"),),
        "pfeiffer": ((r"(.*)\.adapters", r"\1.LayerNorm"),),
    },
    "gpt2": {
        "houlsby": (
            (r"(.*)\.attention_adapters\.adapters", r"\1.attn"),
            (r"(.*)\.output_adapters\.adapters", r"\1.mlp"),
        ),
        "pfeiffer": ((r"(.*)\.output_adapters\.adapters", r"\1"),),
    },
    "llama": {
        "houlsby": (
            (r"(.*)\.attention_adapters\.adapters", r"\1.self_attn"),
            (r"(.*)\.output_adapters\.adapters", r"\1.mlp"),
        ),
        "pfeiffer": ((r"(.*)\.output_adapters\.adapters", r"\1"),),
    },
    "t5": {
        "houlsby": ((r"(.*)\.adapters", r"\1.dropout"),),
        "pfeiffer": ((r"(.*)\.adapters", r"\1"),),
    },
    "bart": {
        "houlsby": (
            (r"(.*)\.attention_adapters\.adapters", r"\1.self_attn"),
            (r"(.*)\.output_adapters\.adapters", r"\1.fc2"),
        ),
        "pfeiffer": ((r"(.*)\.output_adapters\.adapters", r"\1.final_layer_norm"),),
    },
    "vit": {
        "houlsby": (
            (r"encoder\.layer\.(\d)\.attention_adapters\.adapters", r"layers.\1.attention"),
            (r"encoder\.layer\.(\d)\.output\.output_adapters\.adapters", r"layers.\1.mlp"),
        ),
        "pfeiffer": ((r"encoder\.layer\.(\d)\.output\.output_adapters\.adapters", r"layers.\1"),),
    },
}
_HOSTS["roberta"] = _HOSTS["bert"]
_HOSTS["whisper"] = {
    "houlsby": _HOSTS["bart"]["houlsby"],
    "pfeiffer": ((r"(.*)\.output_adapters\.adapters", r"\1"),),  # norms in front, unlike BART
}
# DoubleSeqBn: swish. SeqBn: relu. ParBn: relu, scaled by 4.
_OPTIONS = {
    "houlsby": {"placement": "houlsby", "non_linearity": "swish"},
    "pfeiffer": {"placement": "pfeiffer", "non_linearity": "relu"},
    "parallel": {"placement": "parallel", "non_linearity": "relu", "scale": 4.0},
}


def host_of(architecture: str, placement: str, theirs: str) -> str:
    """Path of our host for the library's ``….adapters``; a parallel adapter sits where Houlsby's does."""
    for pattern, ours in _HOSTS[architecture]["houlsby" if placement == "parallel" else placement]:
        if re.fullmatch(pattern, theirs):
            return re.sub(pattern, ours, theirs)
    raise AssertionError(f"no host is known for {theirs}")


def copy_adapters(model: nn.Module, architecture: str, placement: str, delta: dict[str, Tensor]) -> None:
    """Copy every weight of the library's adapters into ours, and make sure that ours has no others."""
    modules, copied = named_modules(model), set()
    for name, tensor in delta.items():
        theirs, part = name.split(".task.")
        adapter = modules[f"{host_of(architecture, placement, theirs)}.pet.adapter_default"]
        parameter = getattr(adapter, _PARTS[part])
        assert parameter.shape == tensor.shape
        parameter.data.copy_(tensor)
        copied.add(id(parameter))
    assert copied == {id(p) for p in model.parameters() if p.requires_grad}


_PHM_PARTS = {"adapter_down.0": "down", "adapter_up": "up", "W_left": "left", "W_right": "right", "b": "bias"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compacter(architecture: str) -> None:
    reference: Reference = read(architecture, "compacter")
    base = reference.run()
    assert (base - reference.output).abs().max() > 0.1  # the adapters do something
    factor = reference.options["reduction_factor"]
    apply(reference.model, [CompacterCallback(reduction_factor=factor, non_linearity="gelu")])
    modules, copied = named_modules(reference.model), set()
    for name, tensor in reference.delta.items():
        theirs, part = name.split(".task.")
        if part == "phm_rule":
            parameter = modules["pet.compacter_default_rule"].matrices
        else:
            layer, factor_name = part.rsplit(".", 1)
            adapter = modules[f"{host_of(architecture, 'houlsby', theirs)}.pet.compacter_default"]
            parameter = getattr(getattr(adapter, _PHM_PARTS[layer]), _PHM_PARTS[factor_name])
        assert parameter.shape == tensor.shape
        parameter.data.copy_(tensor)
        copied.add(id(parameter))
    assert copied == {id(p) for p in reference.model.parameters() if p.requires_grad}
    assert (reference.run() - reference.output).abs().max() <= 1e-5


@pytest.mark.parametrize("placement", sorted(_OPTIONS))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bottleneck_adapters(architecture: str, placement: str) -> None:
    reference: Reference = read(architecture, placement)
    base = reference.run()
    assert (base - reference.output).abs().max() > 0.1  # the adapters do something
    callback = AdapterCallback(reduction_factor=reference.options["reduction_factor"], **_OPTIONS[placement])
    apply(reference.model, [callback])
    copy_adapters(reference.model, architecture, placement, reference.delta)
    found = reference.run()
    assert torch.isfinite(found).all()
    assert (found - reference.output).abs().max() <= 1e-5


# --- prefix tuning -------------------------------------------------------------------------------


@torch.no_grad()
def copy_prefixes(model: nn.Module, delta: dict[str, Tensor]) -> None:
    """Copy the library's networks, one per kind of attention: its last layer makes keys and values of all layers."""
    names = {re.sub(r".*\.task\.", "", name): tensor for name, tensor in delta.items()}
    sites: dict[str, list[Prefix]] = {}
    for path, module in named_modules(model).items():
        if isinstance(module, Prefix):
            cross = re.search(r"EncDecAttention|encoder_attn", path)
            stack = "encoder" if path.startswith("encoder.") and any("encoder_prefix" in n for n in names) else "self"
            sites.setdefault("cross_prefix" if cross else f"{stack}_prefix", []).append(module)
    assert set(sites) == {name.split(".")[0] for name in names}
    for kind, prefixes in sites.items():
        network = prefixes[0].network
        assert network is not None
        assert all(prefix.network is network for prefix in prefixes)
        network.embedding.copy_(names[f"{kind}.wte.weight"])
        network.weight.copy_(names[f"{kind}.control_trans.0.weight"])
        network.bias.copy_(names[f"{kind}.control_trans.0.bias"])
        weights = names[f"{kind}.control_trans.2.weight"].chunk(len(prefixes))
        biases = names[f"{kind}.control_trans.2.bias"].chunk(len(prefixes))
        for prefix, weight, bias in zip(prefixes, weights, biases, strict=True):
            prefix.weight.copy_(weight)
            prefix.bias.copy_(bias)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prefix_tuning(architecture: str) -> None:
    reference: Reference = read(architecture, "prefix")
    assert (reference.run() - reference.output).abs().max() > 0.1
    length, size = reference.options["prefix_length"], reference.options["bottleneck_size"]
    apply(reference.model, [PrefixTuningCallback(length=length, projection_size=size)])
    copy_prefixes(reference.model, reference.delta)
    found = reference.run()
    assert torch.isfinite(found).all()
    assert (found - reference.output).abs().max() <= 1e-5
