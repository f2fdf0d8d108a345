"""Small models whose linear layers are quantised for real, on the CPU, and their twins in floating point."""

import copy
import logging
from collections.abc import Callable, Collection

import torch
from torch import nn

from lightning_pet.model.quantised import dense_values, is_quantised, replace_by_dense

HEADS = ("classifier", "score", "head", "lm_head")


def torchao(config: Callable[[], object]) -> Callable[[nn.Module, Collection[str]], nn.Module]:
    """Quantise by torchao: weights become tensor subclasses in place."""

    def quantise(model: nn.Module, skip: Collection[str] = HEADS) -> nn.Module:
        from torchao.quantization import quantize_

        quantize_(model, config(), lambda module, name: isinstance(module, nn.Linear) and name not in skip)
        return model

    return quantise


def bitsandbytes(kind: str) -> Callable[[nn.Module, Collection[str]], nn.Module]:
    """Quantise by bitsandbytes: layers are replaced, and quantised when they move to their device."""

    def layer(linear: nn.Linear) -> nn.Module:
        import bitsandbytes as bnb

        sizes, bias, values = (linear.in_features, linear.out_features), linear.bias is not None, linear.weight.data
        if kind == "int8":
            made = bnb.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False)
            made.weight = bnb.nn.Int8Params(values.clone(), requires_grad=False, has_fp16_weights=False)
        else:
            made = bnb.nn.Linear4bit(*sizes, bias=bias, quant_type=kind)
            made.weight = bnb.nn.Params4bit(values.clone(), requires_grad=False, quant_type=kind)
        made.bias = linear.bias
        return made.train(linear.training)

    def quantise(model: nn.Module, skip: Collection[str] = HEADS) -> nn.Module:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and name not in skip:
                model.set_submodule(name, layer(module))
        return model.to("cpu")

    return quantise


def _int8() -> object:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _int8_activations() -> object:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def _int4() -> object:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(8))


def _float8() -> object:
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig()


FORMATS: dict[str, Callable[..., nn.Module]] = {
    "torchao int8": torchao(_int8),
    "torchao int4": torchao(_int4),
    "torchao float8": torchao(_float8),
    "bitsandbytes int8": bitsandbytes("int8"),
    "bitsandbytes nf4": bitsandbytes("nf4"),
}
int8_activations = torchao(_int8_activations)


def dense_twin(model: nn.Module) -> nn.Module:
    """A copy with ordinary linear layers that hold the dequantised values."""
    twin = copy.deepcopy(model)
    for module in list(twin.modules()):
        weight = module._parameters.get("weight")
        if weight is not None and is_quantised(weight):
            replace_by_dense(twin, [(weight, dense_values(module, "weight").clone())])
    return twin
