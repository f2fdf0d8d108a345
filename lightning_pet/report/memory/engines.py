"""What one process holds under each engine, from what a model consists of: sums of bytes, nothing is run.

Sources are the engines themselves: fully_shard and FullyShardedDataParallel of torch, ZeRO of DeepSpeed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Literal, get_args

from lightning_pet.errors import ArgumentError
from lightning_pet.report.memory.rehearsal import Step

EngineName = Literal["single", "ddp", "fsdp", "fsdp2", "zero1", "zero2", "zero3"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)


@dataclass(frozen=True)
class Engine:
    """An engine and the options of it that memory depends on; the defaults are Lightning's.

    Attributes:
        name: ``"single"``, ``"ddp"``, ``"fsdp"`` (FSDP1), ``"fsdp2"``, ``"zero1"``, ``"zero2"`` or ``"zero3"``.
        processes: number of processes (devices) that the model or its state is dealt out to.
        gradient_as_bucket_view: of DDP: gradients live in the buckets that are sent.
        layers_are_units: of FSDP: a wrap policy, or calls of ``fully_shard``, make each layer a unit.
        reduce_bucket_size: of ZeRO: numbers that are reduced at once.
        overlap_comm: of ZeRO-1 and ZeRO-2: two such buckets instead of one.
        max_live_parameters: of ZeRO-3: numbers that stay gathered at most.
        prefetch_bucket_size: of ZeRO-3: numbers that are gathered ahead.
    """

    name: EngineName
    processes: int = 1
    gradient_as_bucket_view: bool = False
    layers_are_units: bool = True
    reduce_bucket_size: int = 200_000_000
    overlap_comm: bool = True
    max_live_parameters: int = 1_000_000_000
    prefetch_bucket_size: int = 50_000_000

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise ArgumentError(f"strategy={self.name!r}: memory is planned for {', '.join(ENGINES)}.")
        if self.processes < 1 or (self.name == "single" and self.processes > 1):
            raise ArgumentError(f"{self.processes} processes with {self.name!r}: one is 'single', more are an engine.")

    def __str__(self) -> str:
        return self.name if self.name == "single" else f"{self.name} × {self.processes}"


@dataclass(frozen=True)
class Part:
    """One parameter, as it is stored.

    Attributes:
        shape: its shape.
        size: its bytes; of a quantised one those of all that it consists of.
        delta: whether it belongs to a delta; otherwise to the base.
        trains: whether it has a gradient.
        state: bytes that the optimizer keeps for it.
        unit: which group of parameters it is gathered with; 0 is what is in none of its own.
    """

    shape: tuple[int, ...]
    size: int
    delta: bool = False
    trains: bool = False
    state: int = 0
    unit: int = 0

    @property
    def numel(self) -> int:
        """Its numbers."""
        count = 1
        for side in self.shape:
            count *= side
        return count


@dataclass(frozen=True)
class Inventory:
    """All that the engines need to know of a model that is about to train.

    Attributes:
        parts: every parameter once.
        buffers: bytes of all buffers.
        step: what a training step needs besides; ``None`` if it could not be rehearsed.
        optimizer_step: bytes that the optimizer needs while it steps.
        half: whether a DeepSpeed run computes in 16 bits.
        originals: bytes in host memory that hold base values to put back.
    """

    parts: tuple[Part, ...]
    buffers: int = 0
    step: Step | None = None
    optimizer_step: int = 0
    half: bool = False
    originals: int = 0

    @property
    def trained(self) -> tuple[Part, ...]:
        """What has gradients."""
        return tuple(part for part in self.parts if part.trains)


@dataclass(frozen=True)
class Bytes:
    """Bytes of one process, by what they are for.

    Attributes:
        base: parameters of the base, whole or its part of them.
        buffers: buffers, always whole.
        delta: parameters of the deltas, whole or its part of them.
        gradients: gradients of what trains, as long as all of them are there.
        optimizer: state of the optimizer, with the float32 copies that DeepSpeed trains.
        communication: buffers in which gradients are sent.
        gathered: parameters of other processes at the worst moment.
        activations: what forward and backward (or the optimizer) need besides at the worst moment.
    """

    base: int = 0
    buffers: int = 0
    delta: int = 0
    gradients: int = 0
    optimizer: int = 0
    communication: int = 0
    gathered: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


def bytes_under(engine: Engine, inventory: Inventory) -> Bytes:
    """Bytes that one process of an engine holds at the worst moment of a training step."""
    return _RULES[engine.name](engine, inventory)


# --- whole models ---------------------------------------------------------------------------------


def _whole(engine: Engine, inventory: Inventory) -> Bytes:
    gradients = _sum(inventory.trained)
    buckets = gradients if engine.name == "ddp" and engine.processes > 1 else 0
    step = inventory.step.beside(gradients) if inventory.step else 0
    return Bytes(
        base=_sum(_base(inventory)),
        buffers=inventory.buffers,
        delta=_sum(_delta(inventory)),
        gradients=0 if buckets and engine.gradient_as_bucket_view else gradients,
        optimizer=sum(part.state for part in inventory.trained),
        communication=buckets,
        activations=max(step, inventory.optimizer_step),
    )


# --- FSDP -----------------------------------------------------------------------------------------


def _fsdp(engine: Engine, inventory: Inventory) -> Bytes:
    """FSDP1 cuts the flat tensor of a unit into equal parts, FSDP2 each tensor along its first dimension."""
    n = engine.processes
    rows = ceil if engine.name == "fsdp2" else float
    shares = {id(part): rows(_rows(part) / n) / _rows(part) for part in inventory.parts}
    return Bytes(
        base=_sum(_base(inventory), shares),
        buffers=inventory.buffers,
        delta=_sum(_delta(inventory), shares),
        gradients=_sum(inventory.trained, shares),
        optimizer=ceil(sum(part.state * shares[id(part)] for part in inventory.trained)),
        gathered=_gathered(engine, inventory) if n > 1 else 0,
        activations=max(_working(inventory), ceil(inventory.optimizer_step / n)),
    )


def _gathered(engine: Engine, inventory: Inventory) -> int:
    """The outermost unit stays whole until its backward; of the others one computes while the next one comes."""
    units: dict[int, list[Part]] = {}
    for part in inventory.parts:
        units.setdefault(part.unit if engine.layers_are_units else 0, []).append(part)
    return _sum(units.pop(0, ())) + 2 * max((_sum(parts) for parts in units.values()), default=0)


# --- DeepSpeed ------------------------------------------------------------------------------------


def _zero_whole(engine: Engine, inventory: Inventory) -> Bytes:
    """ZeRO-1 and ZeRO-2: values whole; master copies and states in parts, gradients too from ZeRO-2 on."""
    half, width = inventory.half, 2 if inventory.half else 4
    numbers = sum(part.numel for part in inventory.trained)
    own = ceil(numbers / engine.processes)
    buckets = width * engine.reduce_bucket_size * (2 if engine.overlap_comm else 1)
    return Bytes(
        base=_sum(_base(inventory), half=half),
        buffers=inventory.buffers,
        delta=_sum(_delta(inventory), half=half),
        gradients=width * (numbers if engine.name == "zero1" else own),
        optimizer=4 * own + ceil(_states(inventory) / engine.processes),
        communication=buckets,
        activations=max(_working(inventory), 4 * own - buckets),  # the step's float32 gradients; the buckets are gone
    )


def _zero_parts(engine: Engine, inventory: Inventory) -> Bytes:
    """ZeRO-3: every tensor in equal parts; what was gathered stays while there is room for live parameters."""
    n, half, width = engine.processes, inventory.half, 2 if inventory.half else 4
    shares = {id(part): ceil(part.numel / n) / max(part.numel, 1) for part in inventory.parts}
    own = sum(ceil(part.numel / n) for part in inventory.trained)
    return Bytes(
        base=_sum(_base(inventory), shares, half),
        buffers=inventory.buffers,
        delta=_sum(_delta(inventory), shares, half),
        gradients=width * own,
        optimizer=(4 * own if half else 0) + ceil(_states(inventory) / n),
        communication=width * engine.reduce_bucket_size,
        gathered=_live(engine, inventory) if n > 1 else 0,
        activations=max(_working(inventory), 4 * own - width * engine.reduce_bucket_size),
    )


def _live(engine: Engine, inventory: Inventory) -> int:
    """What is gathered and not released yet, and the buffer in which the next ones come: they are copied out of it."""
    numbers = [part.numel for part in inventory.parts]
    live = min(sum(numbers), max(engine.max_live_parameters, *numbers, 0))
    coming = min(sum(numbers), engine.prefetch_bucket_size)
    return ceil((live + coming) / max(sum(numbers), 1) * _sum(inventory.parts, half=inventory.half))


_RULES: dict[EngineName, Callable[[Engine, Inventory], Bytes]] = {
    "single": _whole,
    "ddp": _whole,
    "fsdp": _fsdp,
    "fsdp2": _fsdp,
    "zero1": _zero_whole,
    "zero2": _zero_whole,
    "zero3": _zero_parts,
}


# --- sums -----------------------------------------------------------------------------------------


def _base(inventory: Inventory) -> Iterator[Part]:
    return (part for part in inventory.parts if not part.delta)


def _delta(inventory: Inventory) -> Iterator[Part]:
    return (part for part in inventory.parts if part.delta)


def _sum(parts: Iterable[Part], shares: Mapping[int, float] | None = None, half: bool = False) -> int:
    """Bytes of parts, of each its share; with ``half`` as DeepSpeed has cast them."""
    sizes = ((part, min(part.size, 2 * part.numel) if half else part.size) for part in parts)
    return ceil(sum(size * (1 if shares is None else shares[id(part)]) for part, size in sizes))


def _rows(part: Part) -> int:
    return max(part.shape[0] if part.shape else 1, 1)


def _states(inventory: Inventory) -> int:
    """Bytes of the states of float32 copies."""
    return ceil(sum(part.state * max(4 * part.numel / part.size, 1) for part in inventory.trained if part.size))


def _working(inventory: Inventory) -> int:
    return inventory.step.working if inventory.step else 0
