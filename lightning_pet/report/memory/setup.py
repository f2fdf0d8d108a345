"""What a memory plan needs to know of a run, read off the settings of its Trainer, its data and its model."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_pet.errors import ArgumentError
from lightning_pet.modules import pretrained
from lightning_pet.report.memory.engines import Engine
from lightning_pet.strategies import private

_PRECISIONS = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed", "None": "32-true"}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def precision_of(given: Any) -> str:
    """A Trainer's ``precision`` by its full name.

    >>> precision_of("bf16"), precision_of(None)
    ('bf16-mixed', '32-true')
    """
    return _PRECISIONS.get(str(given), str(given))


def bytes_of(text: str) -> int:
    """Read a size such as ``24GiB``, ``80G`` or a plain number of bytes; all units are binary.

    Raises:
        ArgumentError: if it is no size.

    >>> bytes_of("24GiB") == 24 * 2**30
    True
    """
    found = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if found is None or number <= 0:
        raise ArgumentError(f"{text!r} is no size of memory: write for example 24GiB.")
    return int(number * _UNITS[found[2].upper()])


# --- the engine -----------------------------------------------------------------------------------


def engine_of(strategy: Any, devices: Any = "auto", nodes: int = 1) -> Engine:
    """The engine of a Trainer's settings.

    Args:
        strategy: a Trainer's ``strategy``, by name or as an object.
        devices: a Trainer's ``devices``; ``"auto"`` and ``-1`` count the GPUs of this machine.
        nodes: number of machines.

    Raises:
        ArgumentError: if memory cannot be planned for it.
    """
    local = _count(devices)
    n = local * nodes
    if strategy in (None, "auto", "single_device") or (isinstance(strategy, str) and strategy.startswith("ddp")):
        return Engine("single") if n == 1 else Engine("ddp", n)
    if isinstance(strategy, str):
        return _named(strategy, n)
    if isinstance(strategy, DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy):
        return Engine("ddp", n, gradient_as_bucket_view=private.buckets_hold_gradients(strategy))
    if isinstance(strategy, DeepSpeedStrategy):
        return _deepspeed(strategy, n)
    if isinstance(strategy, FSDPStrategy):
        kind = str(getattr(strategy.sharding_strategy, "name", strategy.sharding_strategy))
        if kind not in ("FULL_SHARD", "HYBRID_SHARD"):
            raise ArgumentError(f"sharding_strategy={kind!r}: memory is planned for FULL_SHARD and HYBRID_SHARD.")
        layers = strategy.kwargs.get("auto_wrap_policy") is not None
        return Engine("fsdp", local if kind == "HYBRID_SHARD" else n, layers_are_units=layers)
    if isinstance(strategy, ModelParallelStrategy):
        return Engine("fsdp2", n)
    name = type(strategy).__name__ if isinstance(strategy, Strategy) else repr(strategy)
    raise ArgumentError(f"strategy {name}: memory is planned for one device, DDP, FSDP1, FSDP2 and DeepSpeed ZeRO.")


def _count(devices: Any) -> int:
    if isinstance(devices, list | tuple):
        return len(devices)
    if str(devices) in ("auto", "-1", "None"):
        return max(torch.cuda.device_count(), 1)
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    return int(devices)


def _named(name: str, n: int) -> Engine:
    if name.startswith("fsdp") and "offload" not in name:
        return Engine("fsdp", n, layers_are_units=False)
    zero = re.fullmatch(r"deepspeed(?:_stage_([123]))?", name)
    if zero is None:
        raise ArgumentError(f"strategy={name!r}: memory is planned for ddp, fsdp and deepspeed, without offloading.")
    return Engine(f"zero{zero[1] or 2}", n)  # type: ignore[arg-type]


def _deepspeed(strategy: DeepSpeedStrategy, n: int) -> Engine:
    config: Any = strategy.config if isinstance(strategy.config, dict) else {}
    zero = config.get("zero_optimization", {})
    if any(zero.get(key) for key in ("offload_optimizer", "offload_param")):
        raise ArgumentError("DeepSpeed with offloading: memory is planned for what stays on the device; leave it out.")
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        raise ArgumentError(f"DeepSpeed stage {stage}: memory is planned for the stages 1, 2 and 3.")
    given = {
        "reduce_bucket_size": zero.get("reduce_bucket_size"),
        "overlap_comm": zero.get("overlap_comm"),
        "max_live_parameters": zero.get("stage3_max_live_parameters", zero.get("max_live_parameters")),
        "prefetch_bucket_size": zero.get("stage3_prefetch_bucket_size", zero.get("prefetch_bucket_size")),
    }
    return Engine(f"zero{stage}", n, **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]


# --- the batch ------------------------------------------------------------------------------------


def resized(batch: Any, rows: int | None, tokens: int | None) -> Any:
    """A batch with another number of rows or tokens, and without values.

    Args:
        batch: a batch; its rows are the first side of its first tensor, its tokens the second side of the first
            tensor that has two.
        rows: rows of the new one; ``None`` as many.
        tokens: tokens of the new one; ``None`` as many.

    Raises:
        ArgumentError: if it holds no tensors.
    """
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    tensors = [tensor for tensor in found if tensor.dim()]
    if not tensors:
        raise ArgumentError("the first batch holds no tensors: --batch_size and --tokens cannot be applied to it.")
    before = tensors[0].shape[0], next((t.shape[1] for t in tensors if t.dim() > 1), None)

    def shape(tensor: Tensor) -> Tensor:
        sides = list(tensor.shape)
        if sides and sides[0] == before[0] and rows is not None:
            sides[0] = rows
        if len(sides) > 1 and sides[1] == before[1] and tokens is not None:
            sides[1] = tokens
        return torch.empty(sides, dtype=tensor.dtype, device="meta")

    return apply_to_collection(batch, Tensor, shape)


def token_batch(rows: int, tokens: int) -> dict[str, Tensor]:
    """A batch of token ids with labels and a mask, for models that predict tokens."""
    ids = torch.empty((rows, tokens), dtype=torch.long, device="meta")
    return {"input_ids": ids, "attention_mask": ids, "labels": ids}


# --- the model ------------------------------------------------------------------------------------


@contextmanager
def without_weights() -> Iterator[None]:
    """Within the block ``from_pretrained`` of transformers reads a model's configuration only, onto the meta device."""
    import transformers

    automatic = next(cls for cls in transformers.AutoModel.__mro__ if "from_pretrained" in vars(cls))
    with ExitStack() as stack:
        stack.enter_context(torch.device("meta"))
        for cls, auto in ((automatic, True), (transformers.PreTrainedModel, False)):
            stack.enter_context(patch.object(cls, "from_pretrained", classmethod(_from_config(auto))))
        stack.enter_context(patch.object(pretrained, "check_digest", lambda source, sha256: None))
        yield


_LOADING = (
    "use_safetensors",
    "low_cpu_mem_usage",
    "device_map",
    "ignore_mismatched_sizes",
    "weights_only",
    "max_memory",
)


def _from_config(automatic: bool) -> Callable[..., Any]:
    def from_pretrained(cls: Any, name: Any, *_: Any, **options: Any) -> Any:
        from transformers import AutoConfig

        if options.get("quantization_config") is not None:
            raise ArgumentError("a model that is quantised while it is loaded has no meta form: leave --meta out.")
        for key in _LOADING:
            options.pop(key, None)
        told = options.pop("output_loading_info", False)
        dtype = options.pop("dtype", None) or options.pop("torch_dtype", None)
        config = options.pop("config", None) or AutoConfig.from_pretrained(name, **options)
        dtype = getattr(config, "dtype", None) if dtype == "auto" else dtype
        model: nn.Module = cls.from_config(config) if automatic else cls(config)
        model = model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype) if dtype is not None else model
        info: Mapping[str, list[str]] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
        return (model.eval(), info) if told else model.eval()

    return from_pretrained
