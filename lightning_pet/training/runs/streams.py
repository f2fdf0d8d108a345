"""Each run has random numbers of its own: those that it would draw alone, whatever others run beside it.

All rows of all runs go through one forward. What is drawn at random there, one number per entry of a tensor that has
all rows (dropout), is drawn block by block, each from the stream of its run; what deltas draw for the rows of one run
comes from that run's stream. The stream of a run begins with its seed, or where torch's own generator stood when its
deltas were built, and its first numbers make their random start. So it goes on as in a run alone; numbers that others
draw between the steps (the loader its seeds) are drawn from every stream, too. And torch's own generator moves on as if
one run were alone, so that the loader's next order is what it would have been.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_pet.errors import ArgumentError, PETError
from lightning_pet.model.call import HERE

_ROW_BY_ROW: Final = frozenset(
    (
        *("bernoulli", "rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "native_dropout"),
        *("normal", "normal_functional", "poisson", "binomial", "multinomial", "_standard_gamma"),
    )
)
"""Operations whose first dimension is that of what they get, and each entry of which has draws of its own."""
_PROBABILITY: Final = ("dropout_p", "dropout")
_BLOCK: Final = 624  # numbers that torch's generator of the CPU makes at a time
_BLOCKS: Final = 256  # of them that are looked through for what others have drawn
_CPU: Final = torch.device("cpu")


class Stream:
    """The random numbers of one run.

    Args:
        seed: that it begins with; ``None``: where torch's own generator stands when it is first drawn from.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self.states: dict[str, Tensor] = {}

    @classmethod
    def here(cls) -> "Stream":
        """The one that goes on where torch's own generator stands now."""
        stream = cls()
        stream.at(_CPU)
        return stream

    def at(self, device: torch.device) -> Tensor:
        """Its state on a device."""
        key = str(device)
        if key not in self.states:
            own = _generator(device)
            if self.seed is not None:
                own = torch.Generator(device=device)
                own.manual_seed(self.seed)
            self.states[key] = own.get_state()
        return self.states[key]

    @contextmanager
    def drawing(self, devices: Iterable[torch.device]) -> Iterator[None]:
        """Within the block all that is drawn from torch's own generators of these devices is drawn from this stream."""
        before = [(device, generator := _generator(device), generator.get_state()) for device in devices]
        for device, generator, _ in before:
            generator.set_state(self.at(device))
        try:
            yield
        finally:
            for device, generator, state in before:
                self.states[str(device)] = generator.get_state()
                generator.set_state(state)

    def draw(self, device: torch.device, function: Callable[[], Any]) -> Any:
        """The same for a function that draws on one device: what it returns."""
        generator = _generator(device)
        before = generator.get_state()
        generator.set_state(self.at(device))
        try:
            return function()
        finally:
            self.states[str(device)] = generator.get_state()
            generator.set_state(before)


class Streams:
    """The streams of all runs of a Trainer.

    Args:
        seeds: of each run; see :class:`Stream`.
        leader: the run after whose deltas' draws torch's own generator moves on; ``None``: after none.

    Attributes:
        own: by the names of the runs.
        drew: whether rows of several runs have drawn anything.
    """

    def __init__(self, seeds: Mapping[str, int | None], leader: str | None = None) -> None:
        self.own = {name: Stream(seed) for name, seed in seeds.items()}
        self.leader = leader
        self.drew = False
        self._repeatable = _Repeatable(torch.get_rng_state())
        self._common = torch.get_rng_state()  # of torch's own generator, at the last look

    def capture(self) -> None:
        """Streams without a seed begin where torch's own generator stands now, if they have not begun."""
        for stream in self.own.values():
            stream.at(_CPU)

    @contextmanager
    def by_rows(self, names: Sequence[str], rows: int) -> Iterator[None]:
        """Within the block a batch has a block of so many rows of each of these runs.

        What gradient checkpointing will repeat is remembered for :meth:`backward`.
        """
        self._repeatable, common = _Repeatable(torch.get_rng_state()), Stream.here()
        try:
            with _Drawing(self, tuple(names), rows, self._repeatable, common):
                yield
        finally:
            torch.set_rng_state(common.at(_CPU))

    @contextmanager
    def alone(self, name: str, devices: Iterable[torch.device]) -> Iterator[None]:
        """Within the block all that is drawn on these devices is one run's."""
        common = Stream.here()
        try:
            with ExitStack() as stack:
                if name == self.leader:
                    stack.enter_context(_Shadow(common))
                stack.enter_context(self.own[name].drawing(devices))
                yield
        finally:
            torch.set_rng_state(common.at(_CPU))

    @contextmanager
    def backward(self, names: Sequence[str], rows: int) -> Iterator[None]:
        """Within the block forwards are repeated with their numbers in the last block of :meth:`by_rows`."""
        if not self._repeatable.states:
            yield
            return
        before, states = torch.get_rng_state(), self.state()
        try:
            with _Drawing(self, tuple(names), rows, self._repeatable, Stream.here()):
                yield
        finally:
            torch.set_rng_state(before)
            self.load_state(states)

    # --- what others draw ---------------------------------------------------------------------------

    def look(self) -> None:
        """Others may draw from torch's own generator from here on."""
        self._common = torch.get_rng_state()

    def follow(self) -> None:
        """Draw from every stream as many numbers as others have drawn from torch's own generator since :meth:`look`."""
        drawn = numbers_between(self._common, torch.get_rng_state())
        for stream in self.own.values() if drawn else ():
            stream.draw(_CPU, lambda: torch.empty(drawn, dtype=torch.int32).random_())
        self.look()

    # --- kept ---------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Where they stand, by run and device."""
        self.capture()
        return {name: dict(stream.states) for name, stream in self.own.items()}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on where :meth:`state` was taken."""
        for name, stream in self.own.items():
            stream.states = {device: kept.cpu() for device, kept in state[name].items()}

    def saved(self) -> dict[str, Any]:
        """What a checkpoint holds: tensors by name."""
        return {"streams": self.state(), "common": self._common}

    def load_saved(self, saved: Mapping[str, Any]) -> None:
        """Go on where :meth:`saved` was taken, in another process.

        Raises:
            ArgumentError: if these are those of other runs.
        """
        if saved["streams"].keys() != self.own.keys():
            raise ArgumentError(
                f"the checkpoint is of the runs {', '.join(saved['streams'])}, and these are {', '.join(self.own)}. "
                "Resume with the runs that wrote it; load_delta(…) starts others from its deltas."
            )
        self.load_state(saved["streams"])
        self._common = saved["common"].cpu()


class _Repeatable:
    """What was drawn inside of gradient checkpointing, to be drawn again.

    Checkpointing puts torch's own generator back to where it stood. So that one is moved on by one number with every
    drawing, and tells in the backward pass which of them it is that is repeated.

    Attributes:
        begin: the state of torch's own generator at the start.
        states: those of the streams before each drawing.
    """

    def __init__(self, begin: Tensor) -> None:
        self.begin = begin
        self.states: list[dict[str, Any]] = []

    def note(self, streams: Streams) -> None:
        """The streams are about to be drawn from; in a backward pass they are put back first."""
        if torch._C._current_graph_task_id() == -1:
            hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
            if torch.is_grad_enabled() and not hooks:
                return
            self.states.append(streams.state())
        else:
            place = numbers_between(self.begin, torch.get_rng_state())
            if place < len(self.states):
                streams.load_state(self.states[place])
        torch.empty((), dtype=torch.int32).random_()


def numbers_between(before: Tensor, after: Tensor) -> int:
    """How many numbers of 32 bits the generator of the CPU gave between two states; 0 if that cannot be told."""
    if torch.equal(before, after):
        return 0
    generator = torch.Generator()
    first = (_left(before) - _left(after)) % _BLOCK
    generator.set_state(before)
    drawn = 0
    for more in [first, *[_BLOCK] * _BLOCKS]:
        if more:
            torch.empty(more, dtype=torch.int32).random_(generator=generator)
            drawn += more
        if torch.equal(generator.get_state(), after):
            return drawn
    return 0


def _left(state: Tensor) -> int:
    """How many numbers of a block are left: a field of the state, behind the seed."""
    return int(state[8:12].view(torch.int32)[0])


class _Drawing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation of this thread below autograd; those that draw are given to the streams."""

    def __init__(
        self, streams: Streams, names: tuple[str, ...], rows: int, repeatable: _Repeatable, common: Stream
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.streams, self.names, self.rows = streams, names, rows
        self.repeatable, self.common = repeatable, common

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _draws(func) or kwargs.get("generator") is not None or _drops_nothing(func, args, kwargs):
            return func(*args, **kwargs)
        self.streams.drew = True
        self.repeatable.note(self.streams)
        owner = self._owner()
        if owner is not None:
            if owner == self.streams.leader:
                _draw_besides(self.common, func, args, kwargs)
            return self.streams.own[owner].draw(_device(args, kwargs), lambda: func(*args, **kwargs))
        return self._by_rows(func, args, kwargs)

    def _owner(self) -> str | None:
        """Whose rows run at the moment; ``None``: those of all."""
        for selection in (HERE.call.part or {}).values():
            for name in selection.deltas:
                if name in self.streams.own:
                    return name
        return None

    def _by_rows(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, in_place = func._schema.name.partition("::")[2], _is_in_place(func, args)
        size = _rows(args)
        if size == 0 or size % (len(self.names) * self.rows) or not (in_place or name in _ROW_BY_ROW):
            what = f"a tensor whose first dimension is {size}" if size else "something that has no rows"
            raise PETError(
                f"{name} draws random numbers for {what}, in a forward of {len(self.names)} runs: they cannot be told "
                "apart by runs, which would not be what they are alone. Switch this randomness off (a layer drop; the "
                "dropout inside of a fused attention: attn_implementation='eager'), or train these runs one by one."
            )
        each, device, parts = size // len(self.names), _device(args, kwargs), []
        _draw_besides(self.common, func, tuple(_block(value, size, 0, each) for value in args), kwargs)
        for block, owner in enumerate(self.names):
            own = [_block(value, size, block, each) for value in args]
            parts.append(self.streams.own[owner].draw(device, lambda own=own: func(*own, **kwargs)))  # type: ignore[misc]
        if in_place:
            return args[0]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))


class _Shadow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Draws once more, from another stream, whatever is drawn."""

    def __init__(self, common: Stream) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.common = common

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _draws(func) and kwargs.get("generator") is None:
            _draw_besides(self.common, func, args, kwargs)
        return func(*args, **kwargs)


def _draw_besides(common: Stream, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Draw as many numbers from another stream; those of the CPU are what loaders depend on."""
    if (device := _device(args, kwargs)).type == "cpu":
        if _is_in_place(func, args):
            args = (torch.empty_like(args[0]), *args[1:])
        common.draw(device, lambda: func(*args, **kwargs))


def _is_in_place(func: Any, args: tuple[Any, ...]) -> bool:
    return func._schema.name.endswith("_") and bool(args) and isinstance(args[0], Tensor)


@cache
def _draws(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


@cache
def _probability_at(func: Any) -> int | None:
    names = [argument.name for argument in func._schema.arguments]
    return next((names.index(name) for name in _PROBABILITY if name in names), None)


def _drops_nothing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """An operation that could drop something, but does not."""
    place = _probability_at(func)
    if place is None:
        return False
    argument = func._schema.arguments[place]
    value = args[place] if place < len(args) else kwargs.get(argument.name, argument.default_value)
    return isinstance(value, int | float) and value == 0


def _rows(args: tuple[Any, ...]) -> int:
    """First dimension of what is drawn: that of the first tensor, or of the size that is asked for."""
    for value in args:
        if isinstance(value, Tensor):
            return value.shape[0] if value.dim() else 0
        if isinstance(value, list | tuple) and value and all(isinstance(item, int) for item in value):
            return int(value[0])
    return 0


def _block(value: Any, size: int, block: int, each: int) -> Any:
    if isinstance(value, Tensor):
        return value.narrow(0, block * each, each) if value.dim() and value.shape[0] == size else value
    if isinstance(value, list | tuple) and value and value[0] == size:
        return [each, *value[1:]]
    return value


def _device(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device:
    for value in args:
        if isinstance(value, Tensor):
            return value.device
    return torch.device(kwargs.get("device") or "cpu")


def state_of(device: torch.device) -> Tensor:
    """Where torch's own generator of a device stands."""
    return _generator(device).get_state()


def _generator(device: torch.device) -> torch.Generator:
    """Torch's own of a device."""
    if device.type == "cpu":
        return torch.default_generator
    module = getattr(torch, device.type, None)
    generators = getattr(module, "default_generators", None)
    if generators is None:
        raise PETError(f"the random numbers of {device.type} cannot be told apart by runs: train them one by one.")
    number = device.index if device.index is not None else module.current_device()
    generator: torch.Generator = generators[number]
    return generator
