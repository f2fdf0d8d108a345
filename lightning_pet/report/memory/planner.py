"""How much memory a process needs to train a model, before anything of it is allocated.

Parameters and their gradients are counted, the optimizer's state and the activations are found by a
rehearsal (:mod:`lightning_pet.report.memory.rehearsal`), and what an engine makes of them follows from its rules
(:mod:`lightning_pet.report.memory.engines`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils._pytree import tree_iter

from lightning_pet.errors import TargetError
from lightning_pet.insertion.method import Method
from lightning_pet.model.adaptation import record_of
from lightning_pet.model.naming import CHILD, canonical, named_parameters
from lightning_pet.operations.apply import apply
from lightning_pet.operations.roots import root_of, silenced
from lightning_pet.report.memory.engines import Bytes, Engine, EngineName, Inventory, Part, bytes_under
from lightning_pet.report.memory.rehearsal import Stage, Step, is_packed, rehearse, rehearse_optimizer
from lightning_pet.strategies import optimizers as optim
from lightning_pet.training.step import let_inputs_require_grad

# --- activations of a decoder by a formula: for a quick estimate, and where a step cannot be rehearsed ---


_LOGIT = 12  # bytes: float32 logits, their log-softmax and their gradient


def activations_of_decoder(
    tokens: int,
    layers: int,
    width: int,
    inner: int,
    vocabulary: int = 0,
    *,
    itemsize: int = 2,
    checkpointing: bool = False,
) -> int:
    """Bytes that forward and backward of a decoder keep at the worst moment, with fused attention.

    A layer keeps for each token about eight numbers per unit of width (inputs and outputs of its norms, queries,
    attention's output) and three per unit of the feed-forward's inner width; with checkpointing only its input. The
    loss takes 12 bytes per logit.

    Args:
        tokens: of all sequences of a process's batch.
        layers: number of layers.
        width: hidden size.
        inner: width of the feed-forward block.
        vocabulary: number of classes of the output; 0 without one.
        itemsize: bytes of a number: 2 in 16 bits, 4 in float32.
        checkpointing: whether layers are computed again in the backward.

    >>> activations_of_decoder(4096, 32, 4096, 14336, 128256, checkpointing=True) / 2**30  # Llama 8B
    6.87109375
    """
    layer = itemsize * tokens * (8 * width + 3 * inner)
    logits = _LOGIT * tokens * vocabulary
    if checkpointing:
        return itemsize * tokens * width * layers + max(layer, logits)
    return layer * layers + logits


def _estimate(root: nn.Module, tokens: int) -> int | None:
    """The formula for a transformers model, by its configuration; ``None`` if that does not tell what is needed."""
    config: Any = getattr(root, "config", None)
    config = getattr(config, "text_config", None) or config
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    layers, width, inner, vocabulary = (getattr(config, name, None) for name in names)
    if not (isinstance(layers, int) and isinstance(width, int) and isinstance(inner, int)):
        return None
    getter = getattr(root, "get_output_embeddings", None)
    predicts = getter is not None and getter() is not None
    itemsize = next((p.itemsize for p in root.parameters() if p.is_floating_point()), 4)
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in root.modules())
    return activations_of_decoder(
        tokens,
        layers,
        width,
        inner,
        vocabulary if predicts and isinstance(vocabulary, int) else 0,
        itemsize=itemsize,
        checkpointing=checkpointing,
    )


# --- the plan -------------------------------------------------------------------------------------


_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that one process needs at the worst moment of a training step.

    Attributes:
        engine: under which strategy, and with how many processes.
        bytes: by what they are for; ``bytes.total`` is their sum.
        trained: numbers that train.
        inventory: what the model consists of, from which :meth:`under` makes plans for other engines.
        notes: what could not be found out, and what was assumed instead.
    """

    engine: Engine
    bytes: Bytes
    trained: int
    inventory: Inventory
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.bytes.total

    @property
    def host(self) -> int:
        """Bytes in host memory: base values that are put back when a delta is taken out.

        Under FSDP2 the base is in parts when they are noted.
        """
        parts = self.engine.processes if self.engine.name == "fsdp2" else 1
        return ceil(self.inventory.originals / parts)

    def under(self, strategy: EngineName | Engine, processes: int = 1) -> "MemoryPlan":
        """The plan of the same run under another strategy.

        Args:
            strategy: name of an engine, or one with its options.
            processes: number of devices, if a name was given.
        """
        engine = strategy if isinstance(strategy, Engine) else Engine(strategy, processes)
        return replace(self, engine=engine, bytes=bytes_under(engine, self.inventory))

    def as_dict(self) -> dict[str, Any]:
        """Everything in plain types."""
        return {
            "strategy": self.engine.name,
            "processes": self.engine.processes,
            "trained": self.trained,
            "bytes": vars(self.bytes) | {"total": self.total},
            "host_bytes": self.host,
            "notes": list(self.notes),
        }


def plan_memory(
    model: nn.Module,
    callbacks: Method | Sequence[Method] = (),
    batch: Any = None,
    *,
    strategy: EngineName | Engine = "single",
    processes: int = 1,
    precision: str = "32-true",
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    gpu: bool = True,
) -> MemoryPlan:
    """Plan the memory of a training run; the model stays as it is, and nothing of its size is allocated.

    One training step and one step of the optimizer run on tensors that have shapes and no values. What is
    not counted: the CUDA context, workspaces of kernels, buffers of the communication library, the
    fragmentation of the allocator (together about 1 GiB on a GPU), and what loading the weights needs.

    Args:
        model: a LightningModule, or any other module; on any device, also on the meta device.
        callbacks: the method or methods to apply first; none for a model that is adapted already, or trains in full.
        batch: for a LightningModule what ``training_step`` gets; for others a mapping of keyword arguments
            or a tuple of arguments. Of the model's output ``loss`` is taken, else the sum of the first tensor.
            ``None`` leaves the activations out.
        strategy: ``"single"``, ``"ddp"``, ``"fsdp"``, ``"fsdp2"``, ``"zero1"``, ``"zero2"``, ``"zero3"``, or an
            ``Engine`` with its options.
        processes: number of devices.
        precision: as of the Trainer.
        optimizer: makes the optimizer from parameters. Default: that of ``configure_optimizers``, else AdamW.
        gpu: plan for a GPU, where torch's optimizers step all parameters at once and base values to be put back
            are kept elsewhere.

    Raises:
        ArgumentError: for an unknown strategy.
        TargetError: if a method finds no place in the model.

    >>> import torch
    >>> from lightning_pet import LoRACallback, plan_memory
    >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    >>> plan = plan_memory(net, [LoRACallback(r=4, target_modules=["0"])], (torch.ones(16, 64),))
    >>> plan.trained, plan.bytes.base, plan.bytes.delta, plan.bytes.gradients
    (512, 18720, 2048, 2048)
    >>> plan.under("zero3", 8).bytes.base
    2340
    """
    engine = strategy if isinstance(strategy, Engine) else Engine(strategy, processes)
    stage, notes = Stage(gpu), list[str]()
    trainer = getattr(model, "_trainer", None)
    twin = stage.twin(model, [] if trainer is None else [trainer], _true_dtype(precision))
    if trainer is not None:
        twin.trainer = trainer  # which a copy of a LightningModule leaves behind
    shapes = stage.batch(batch)
    if callbacks:
        _insert(stage, twin, callbacks, shapes)
    let_inputs_require_grad(root_of(twin)[1])
    step = None if batch is None else _step(stage, twin, shapes, precision, notes)
    states, momentary = _optimizer(stage, twin, optimizer, gpu, notes)
    record = record_of(root_of(twin)[1])
    originals = sum(_plain(tensor) for tensor in record.originals.values()) if record else 0
    inventory = Inventory(
        parts=_parts(twin, {n: _stored_bytes(p) for n, p in named_parameters(model) if is_packed(p)}, states),
        buffers=sum(_plain(buffer) for buffer in twin.buffers()),
        step=step,
        optimizer_step=momentary,
        half=precision.startswith(("16", "bf16")),
        originals=originals,
    )
    trained = sum(part.numel for part in inventory.trained)
    return MemoryPlan(engine, bytes_under(engine, inventory), trained, inventory, tuple(notes))


def _insert(stage: Stage, twin: nn.Module, callbacks: Method | Sequence[Method], batch: Any) -> None:
    """Apply the methods as a Trainer does: a model that does not describe its inputs is looked at with the batch."""
    with stage.entered(kernels=False):
        try:
            apply(twin, callbacks)
        except TargetError:
            if batch is None:
                raise
            apply(twin, callbacks, forward=lambda: _loss(twin, batch))


def _true_dtype(precision: str) -> torch.dtype | None:
    """What the base is cast to by precisions that cast it."""
    return _DTYPES.get(precision.removesuffix("-true")) if precision.endswith("-true") else None


def _parts(twin: nn.Module, packed: Mapping[str, int], states: Mapping[int, int]) -> tuple[Part, ...]:
    units = _layers_of(twin)
    return tuple(
        Part(
            tuple(parameter.shape),
            packed.get(canonical(name), _plain(parameter)),
            delta=CHILD in canonical(name).split("."),
            trains=parameter.requires_grad,
            state=states.get(id(parameter), 0),
            unit=units.get(id(parameter), 0),
        )
        for name, parameter in twin.named_parameters()
    )


def _layers_of(model: nn.Module) -> dict[int, int]:
    """Number of the layer, from 1, of every parameter that is in one, by ``id``.

    Layers are what is numbered and not within anything numbered, as wrap policies and ``fully_shard`` take them.
    """
    found: dict[int, int] = {}
    layers = [
        module
        for path, module in model.named_modules()
        if path.rpartition(".")[2].isdigit() and not any(part.isdigit() for part in path.split(".")[:-1])
    ]
    for number, layer in enumerate(layers, 1):
        for parameter in layer.parameters():
            found.setdefault(id(parameter), number)
    return found


# --- rehearsals -----------------------------------------------------------------------------------


def _step(stage: Stage, twin: nn.Module, batch: Any, precision: str, notes: list[str]) -> Step | None:
    narrow = _DTYPES.get(precision.removesuffix("-mixed")) if precision.endswith("-mixed") else None

    def loss() -> Tensor:
        with torch.autocast("cpu", narrow) if narrow is not None else nullcontext():
            return _loss(twin, batch)

    if not any(parameter.requires_grad for parameter in twin.parameters()):
        notes.append("nothing trains by a gradient: activations are not counted.")
        return None
    try:
        return rehearse(stage, twin, loss, _layers_of(twin))
    except Exception as error:  # user code, of any kind
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:160]}"
    root = root_of(twin)[1]
    tokens = _tokens(batch)
    estimated = None if tokens is None else _estimate(root, tokens)
    known = "not counted" if estimated is None else "estimated by a formula"
    notes.append(f"activations are {known}: the training step does not run without values ({reason}).")
    return None if estimated is None else Step(estimated, estimated, estimated)


def _tokens(batch: Any) -> int | None:
    """Numbers in the first two-dimensional tensor of integers, which are token ids."""
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    return next((t.numel() for t in found if t.dim() == 2 and not t.is_floating_point()), None)


def _loss(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(model, pl.LightningModule):
        with silenced(model):
            step: Any = model.training_step(batch, 0)
        loss: Tensor = step["loss"] if isinstance(step, Mapping) else step
        return loss
    out = model(**batch) if isinstance(batch, Mapping) else model(*batch)
    found = getattr(out, "loss", None)
    return found if found is not None else _first_tensor(out).float().sum()


def _first_tensor(out: Any) -> Tensor:
    """The first tensor of an output that has a gradient."""
    return next(tensor for tensor in tree_iter(out) if isinstance(tensor, Tensor) and tensor.requires_grad)


def _optimizer(
    stage: Stage, twin: nn.Module, make: Callable[[list[nn.Parameter]], Optimizer] | None, gpu: bool, notes: list[str]
) -> tuple[dict[int, int], int]:
    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    if not trained:
        return {}, 0
    states: dict[int, int] = {}
    momentary = 0
    for optimizer in _optimizers(stage, twin, make, trained, notes):
        for group in optimizer.param_groups if gpu else ():
            if group.get("foreach", False) is None and not group.get("fused"):
                group["foreach"] = True
        try:
            state, needed = rehearse_optimizer(stage, optimizer)
        except Exception as error:
            notes.append(
                f"{type(optimizer).__name__} cannot step without values ({type(error).__name__}): assumed two "
                "numbers per trained number, as AdamW keeps."
            )
            state, needed = rehearse_optimizer(stage, AdamW([p for g in optimizer.param_groups for p in g["params"]]))
        states |= state
        momentary = max(momentary, needed)
    return states, momentary


def _optimizers(
    stage: Stage,
    twin: nn.Module,
    make: Callable[[list[nn.Parameter]], Optimizer] | None,
    trained: list[nn.Parameter],
    notes: list[str],
) -> list[Optimizer]:
    """The optimizers of the run, which hold what trains and nothing else."""
    if make is not None or not isinstance(twin, pl.LightningModule):
        return [(make or AdamW)(trained)]
    try:
        with stage.entered():
            found: list[Any] = optim.collect(twin.configure_optimizers(), "param_groups")
    except Exception as error:  # user code, of any kind
        notes.append(f"configure_optimizers failed ({type(error).__name__}: {error}): AdamW is assumed.")
        found = []
    if not found:
        return [AdamW(trained)]
    held = {id(p) for optimizer in found for group in optimizer.param_groups for p in group["params"]}
    for optimizer in found:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]
    found[0].param_groups[0]["params"] += [p for p in trained if id(p) not in held]
    return [optimizer for optimizer in found if any(group["params"] for group in optimizer.param_groups)]


# --- sizes ----------------------------------------------------------------------------------------


def _plain(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _stored_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor with all that it consists of: scales, zero points and codes of a quantised one."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_stored_bytes(getattr(tensor, name)) for name in names)
    return _plain(tensor) + sum(_plain(part) for part in _quantisation(getattr(tensor, "quant_state", None)))


def _quantisation(state: Any) -> Iterator[Tensor]:
    for value in vars(state).values() if state is not None else ():
        if isinstance(value, Tensor):
            yield value
        elif hasattr(value, "absmax"):
            yield from _quantisation(value)
