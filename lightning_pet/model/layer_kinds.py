"""What a layer is to a delta: what kind, whether its call is the plain product, and which way its weight lies.

A class that torch knows is known by its class. What computes otherwise is asked: its forward runs once on a few
numbers. Nothing is guessed from a square weight; where an answer cannot be had, a delta acts on the weight itself,
which is right whatever the layer does with it.
"""

import re
from collections.abc import Callable
from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import conv as torch_conv
from torch.nn.utils.parametrize import is_parametrized

from lightning_pet.model.naming import has_module, module_at
from lightning_pet.model.quantised import is_quantised, shape_of
from lightning_pet.model.structure import Rows, Target
from lightning_pet.model.undisturbed import undisturbed

Kind = Literal["linear", "conv1d_hf", "embedding", "conv", "weight"]

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d
_SCALES = ("scalar_embed_scale", "embed_scale")
_PROBED: dict[tuple[Any, ...], "Kind | None"] = {}


def host_kind(module: nn.Module, parameter: str = "weight") -> Kind | None:
    """What a module is to a delta: the table of all that can host one.

    Returns:
        ``"linear"``, ``"conv1d_hf"`` (a linear layer whose weight is [in, out]), ``"embedding"``, ``"conv"``,
        ``"weight"`` (a parameter of two or three dimensions of which only the values are known: it is read
        without calling its module, or by a call that computes something else), or ``None`` if it cannot host
        a delta.
    """
    tensor = weight_of(module, parameter)
    if tensor is None or is_raw(module, parameter):
        return None
    cls = base_class(module)
    if parameter != "weight" or isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return "weight" if tensor.ndim in (2, 3) else None
    if is_conv1d(cls):
        return "conv1d_hf"
    if isinstance(module, nn.Linear):
        return "weight" if _is_dense_matrix(tensor) and not has_plain_forward(cls) else "linear"
    if isinstance(module, torch_conv._ConvNd):
        return "conv" if isinstance(module, _CONVOLUTIONS) else None  # transposed ones: no method knows their matrix
    if isinstance(module, nn.Embedding):
        return "embedding"
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        if is_quantised(tensor):
            return "linear"
        if _is_dense_matrix(tensor) and (product := _product(module)) is not None:
            return product
    return "weight" if tensor.ndim in (2, 3) else None


def weight_of(module: nn.Module, parameter: str = "weight") -> Tensor | None:
    """A parameter; or, of the weight that a known layer makes from others for each call, its form without values.

    Making it would be a part of the run: spectral norm changes its buffers then.
    """
    tensor = module._parameters.get(parameter)
    if tensor is not None or parameter != "weight" or not is_made(module):
        return tensor
    layer: Any = module
    if isinstance(module, nn.Linear):
        shape = _sizes(module)
    elif isinstance(module, nn.Embedding):
        shape = (module.num_embeddings, module.embedding_dim)
    else:
        shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    like = next(p for p in module.parameters() if p.is_floating_point())
    return like.detach().new_empty(()).expand(shape)


def is_made(module: nn.Module) -> bool:
    """Whether the weight of a known layer is no parameter, but made from some for each call (weight norm, pruning)."""
    if not isinstance(module, nn.Linear | nn.Embedding | _CONVOLUTIONS) or "weight" in module._parameters:
        return False
    by_hook = "weight" in vars(module) and any(name.startswith("weight_") for name in module._parameters)
    return is_parametrized(module, "weight") or by_hook


def is_raw(module: nn.Module, parameter: str) -> bool:
    """Whether a hook makes the weight of this parameter before each call (old weight and spectral norm, pruning).

    It is read before the call begins, where no delta is seen.
    """
    made = (name for name, value in vars(module).items() if isinstance(value, Tensor))
    return any(parameter.startswith(f"{name}_") for name in made)


def acts_by_call(module: nn.Module) -> bool:
    """Whether what a call of this layer returns is its plain product or look-up, so that a delta may add to it."""
    cls = base_class(module)
    match host_kind(module):
        case "linear" | "conv1d_hf":
            return True
        case "conv":
            own = (_owner(cls, "forward"), _owner(cls, "_conv_forward"))
            return all(owner.__module__ == torch_conv.__name__ for owner in own)
        case "embedding":
            return _looks_up(module)
        case _:
            return False


def matrix_of(module: nn.Module, parameter: str = "weight") -> tuple[int, int]:
    """(out, in) of the matrix, or of each of several, that a low-rank delta changes."""
    weight = weight_of(module, parameter)
    assert weight is not None
    shape = shape_of(weight)
    kind = host_kind(module, parameter)
    if kind == "conv":
        return shape[0], prod(shape[1:])
    if kind == "linear" and hasattr(module, "in_features"):
        return _sizes(module)
    rows, columns = shape[-2:]
    turned = kind in ("conv1d_hf", "embedding") or bool(transposed(module, parameter))
    return (columns, rows) if turned else (rows, columns)


def transposed(module: nn.Module, parameter: str = "weight") -> bool | None:
    """Whether a weight is stored as [..., in, out]; ``None`` if that cannot be told."""
    weight = weight_of(module, parameter)
    assert weight is not None
    kind = host_kind(module, parameter)
    if kind == "conv1d_hf" or isinstance(module, nn.EmbeddingBag):
        return True
    if weight.ndim == 3 and kind == "weight":
        if isinstance(module, nn.Bilinear):
            return None  # [out, in, in]: no stack of matrices
        return bool(getattr(module, "is_transposed", False))  # transformers marks experts that are
    if kind != "weight" or parameter != "weight" or isinstance(module, nn.Linear):
        return False
    if not (hasattr(module, "in_features") and hasattr(module, "out_features")):
        return False
    sizes = _sizes(module)
    if sizes[0] == sizes[1]:
        return None
    return tuple(weight.shape) != sizes


def embed_scale(module: nn.Module) -> float:
    """The factor by which an embedding multiplies what it looks up (Gemma, M2M100)."""
    found = next((getattr(module, name) for name in _SCALES if getattr(module, name, None) is not None), 1.0)
    return float(found)


def _sizes(layer: Any) -> tuple[int, int]:
    """(out, in), as a linear layer says itself: the weight of a quantised one may be packed."""
    return int(layer.out_features), int(layer.in_features)


def _is_dense_matrix(weight: Tensor) -> bool:
    return weight.ndim == 2 and weight.dtype in _FLOATS and not is_quantised(weight)


def _owner(cls: type, method: str) -> type:
    """The class that defines a method."""
    return next(c for c in cls.__mro__ if method in vars(c))


def _looks_up(module: nn.Module) -> bool:
    """Whether an embedding returns rows of its table, times :func:`embed_scale`."""
    if _owner(base_class(module), "forward") is nn.Embedding:
        return True
    weight = module._parameters.get("weight")
    if weight is None:  # made for each call
        return False
    if weight.is_meta or is_quantised(weight):  # no values to compare
        return any(hasattr(module, name) for name in _SCALES)
    if getattr(module, "max_norm", None) is not None:  # a call would change the table
        return False
    ids = torch.arange(min(7, weight.shape[0]), device=weight.device).unsqueeze(0)
    expected = weight.detach()[ids] * embed_scale(module)
    return _agree(lambda: base_class(module).forward(module, ids), expected, module, 1e-2)


def _product(module: nn.Module) -> "Kind | None":
    """Whether a layer of an unknown class computes ``x Wᵀ + b`` or ``x W + b``; ``None``: neither, or unknown.

    Asked with weights that leave no doubt, so that a layer that starts at zero, or has no values yet, is asked as well.
    """
    key = _fingerprint(module)
    if key is not None and key in _PROBED:
        return _PROBED[key]
    found = _multiplies(module)
    if key is not None:
        _PROBED[key] = found
    return found


def _fingerprint(module: nn.Module) -> tuple[Any, ...] | None:
    """Layers with equal ones compute alike; ``None`` for those that hold more than plain options."""
    ours = {"training", *vars(nn.Module())}
    own = {name: value for name, value in vars(module).items() if name not in ours and not name.startswith("_pet_")}
    children = [name for name in module._modules if name != "pet"]
    extra = module._parameters.keys() - {"weight", "bias"}
    if children or extra or module._buffers:
        return None
    if not all(isinstance(value, bool | int | float | str | None) for value in own.values()):
        return None
    shapes = tuple((name, None if p is None else tuple(p.shape)) for name, p in module._parameters.items())
    return base_class(module), shapes, tuple(sorted((name, repr(value)) for name, value in own.items()))


def _multiplies(module: nn.Module) -> "Kind | None":
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.promote_types(weight.dtype, torch.float32))
        return drawn if weight.is_meta else drawn.to(weight.device)

    outputs, inputs = _sizes(module)
    w, b = numbers(*weight.shape), None if bias is None else numbers(*bias.shape)
    values: dict[str, nn.Parameter | None] = {
        name: None if value is None else nn.Parameter(value) for name, value in (("weight", w), ("bias", b))
    }
    for size in ((2, 3, inputs), (3, inputs)):
        x = numbers(*size)
        for kind, matrix in (("linear", w), ("conv1d_hf", w.t())):
            if tuple(matrix.shape) != (outputs, inputs) or (b is not None and b.shape != (outputs,)):
                continue
            run = _with_parameters(module, values, x)
            if _agree(run, F.linear(x, matrix, b), module, 1e-4):
                return kind  # type: ignore[return-value]
    return None


def _with_parameters(module: nn.Module, values: dict[str, nn.Parameter | None], x: Tensor) -> Callable[[], Any]:
    def run() -> Any:
        # Whoever calls this puts the attributes of the module back.
        own = module.__dict__["_parameters"]
        module.__dict__["_parameters"] = {name: values.get(name, value) for name, value in own.items()}
        return base_class(module).forward(module, x)

    return run


def _agree(run: Callable[[], Any], expected: Tensor, module: nn.Module, tolerance: float) -> bool:
    """Whether a call returns this, whose outcome is unknown: it may raise anything."""
    try:
        with undisturbed(module), torch.no_grad():
            out = run()
    except Exception:
        return False
    if not isinstance(out, Tensor) or out.shape != expected.shape:
        return False
    error = torch.linalg.vector_norm(out.to(expected.dtype) - expected)
    return bool(error <= tolerance * torch.linalg.vector_norm(expected))


def has_plain_forward(cls: type[nn.Module]) -> bool:
    """Whether forward is exactly ``x W + b``, so that a delta may compute it (layers of bitsandbytes: no)."""
    owner = next(c for c in cls.__mro__ if "forward" in vars(c))
    return owner is nn.Linear or (is_conv1d(owner) and owner.__name__ == "Conv1D")


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has without deltas."""
    return getattr(type(module), "__pet_base__", type(module))


def is_conv1d(cls: type[nn.Module]) -> bool:
    """Whether this is transformers' ``Conv1D`` (a linear layer with a transposed weight)."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in cls.__mro__)


def reader_of(root: nn.Module, target: Target, called: frozenset[str] | None) -> str | None:
    """The module whose forward reads the target's weight, if it is not the host itself.

    ``nn.MultiheadAttention`` reads ``out_proj.weight`` and never calls ``out_proj``; some models do
    the same with ordinary linears, which only a forward can tell (``called``). The reader is then taken
    to be the nearest module around it that was called.
    """
    above = target.module.rpartition(".")[0]
    if has_module(root, above) and isinstance(module_at(root, above), nn.MultiheadAttention):
        return above
    if called is None or target.module in called:
        return None
    while above and above not in called:
        above = above.rpartition(".")[0]
    return above if above in called else None


_BIAS = re.compile(r"(?:^|_)bias(?:_|$)")


def is_bias(parameter: str) -> bool:
    """Whether the name of a parameter says that it is added to a product, whatever its shape.

    >>> is_bias("gate_up_proj_bias"), is_bias("bias_k"), is_bias("weight")
    (True, True, False)
    """
    return _BIAS.search(parameter) is not None


def bias_of(module: nn.Module, parameter: str = "weight", rows: Rows | None = None) -> tuple[str, Rows | None] | None:
    """Name of the bias that is added to a product with this weight, and the rows of it that are meant.

    Args:
        module: the host.
        parameter: the weight inside the host.
        rows: output features of a fused weight; the same ones of the bias are meant.

    Returns:
        ``None`` if the host has no such bias.

    >>> bias_of(nn.Linear(2, 2)), bias_of(nn.Linear(2, 2, bias=False))
    (('bias', None), None)
    >>> bias_of(nn.MultiheadAttention(4, 2, kdim=3), "k_proj_weight")
    ('in_proj_bias', ((4, 8),))
    """
    if isinstance(module, nn.MultiheadAttention) and parameter in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        first = "qkv".index(parameter[0]) * module.embed_dim
        parameter, rows = "in_proj_weight", ((first, first + module.embed_dim),)
    for name in (parameter.replace("weight", "bias"), f"{parameter}_bias"):
        if name != parameter and module._parameters.get(name) is not None:
            return name, rows
    return None
