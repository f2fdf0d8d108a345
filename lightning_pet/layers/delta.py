"""The base of everything that a method inserts: a child module of the layer that it changes."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_pet.errors import ArgumentError, NotMergeableError, PETError
from lightning_pet.layers.combining import Factors
from lightning_pet.layers.sharding import is_partition, placed
from lightning_pet.layers.transforms import is_ordinary

MAX_SCALE: Final = 1024.0
"""Largest factor of a delta: beyond it numbers overflow sooner than a model learns anything."""

REMADE: Final = 1 << 16
"""Effective weights of as many numbers may be made again in backward: 256 KiB; smaller ones are kept until then."""

Remaker = Callable[[], Tensor]
"""Makes an effective weight once more."""

Path = Literal["activation", "around", "weight", "generate", "shared"]

Host = Callable[[], tuple[Tensor, Tensor | None]]
"""Gives weight and bias of a host."""


class Part(nn.Module):
    """A module inside a delta, or a delta: a base checkpoint, which holds none of its keys, loads strictly."""

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, own, unexpected_keys, error_msgs)
        # A checkpoint that holds some of the keys of the whole delta is a damaged delta.
        parts = prefix.split(".")
        depth = len(parts) - parts[::-1].index("pet") + 1 if "pet" in parts else 0
        delta = ".".join(parts[:depth]) + "." if depth else prefix
        if any(name.startswith(delta) for name in state_dict):
            missing_keys.extend(own)


def check_scale(scale: float, what: str) -> None:
    """Raise unless a factor is a finite number of moderate size.

    Args:
        scale: the factor.
        what: what it is, for the message.

    Raises:
        ArgumentError: naming the limit.
    """
    if not abs(scale) <= MAX_SCALE:  # also what is no number
        raise ArgumentError(f"{what} is {scale:g}; its size may be at most {MAX_SCALE:g}. Lower it.")


def kind_of(tensor: Tensor) -> str:
    """What kind of numbers a tensor holds; a cast within a kind only rounds."""
    if tensor.is_complex():
        return "complex numbers"
    return "fractions" if tensor.is_floating_point() else "integers"


def delta_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of a delta's parameters beside tensors of the base: at least single precision.

    Updates are far smaller than the values: what a base in half precision can hold of them is nothing.
    """
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def options_beside(tensor: Tensor) -> dict[str, Any]:
    """Device and dtype of a delta's parameters beside a tensor of the base."""
    return {"device": tensor.device, "dtype": delta_dtype(tensor)}


def apart(expected: Set[str], found: Set[str]) -> tuple[list[str], list[str]]:
    """What is missing, and what is too much."""
    return sorted(expected - found), sorted(found - expected)


def wrong_names(expected: Set[str], found: Set[str]) -> list[str]:
    """The same as one phrase each."""
    missing, extra = apart(expected, found)
    return [*(f"{name} is missing" for name in missing), *(f"{name} is unexpected" for name in extra)]


def wrong_shapes(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Which tensors have another shape than those of the same name, one phrase each."""
    return [
        f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
        for name, tensor in found.items()
        if name in expected and expected[name].shape != tensor.shape
    ]


def wrong_kinds(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Which tensors hold numbers of another kind than those of the same name, one phrase each."""
    return [
        f"{name} holds {kind_of(tensor)}, expected {kind_of(expected[name])}"
        for name, tensor in found.items()
        if name in expected and kind_of(expected[name]) != kind_of(tensor)
    ]


def unchanged_since(*tensors: Tensor) -> Callable[[], None] | None:
    """A function that fails if one of these tensors has been changed in place since now.

    Returns:
        The function; ``None`` where that cannot be told, as an engine may take the values away meanwhile: of anything
        but parameters and plain tensors that hold their values.
    """
    if not all(type(t) in (Tensor, nn.Parameter) and is_ordinary(t) and not is_partition(t) for t in tensors):
        return None
    if any(t.is_floating_point() and type(t) is not nn.Parameter for t in tensors):
        return None  # a view of what FSDP1 has gathered, or the copy of a parameter for another thread
    before = [tensor._version for tensor in tensors]

    def check() -> None:
        if [tensor._version for tensor in tensors] != before:
            raise PETError(
                "a weight, or the delta that moves it, was changed between forward and backward, which needs both as "
                "they were. Change parameters after backward, as an optimizer does."
            )

    return check


class Excerpt(NamedTuple):
    """What files hold of a parameter: a few of its entries, under a name of their own.

    Attributes:
        name: of the excerpt.
        places: flat indices of the entries.
    """

    name: str
    places: Tensor


class Delta(Part):
    """What one method adds to one host module.

    A delta is registered as a child of its host, holds raw :class:`torch.nn.Parameter` objects
    (never ``nn.Linear``, which quantising precision plug-ins replace), and is always run through
    ``__call__``, so that sharding engines can treat it as a unit of its own.

    The calling convention is chosen by ``path``:

    * ``"activation"``: ``delta(x, output)`` gets the host's input and output and returns the new
      output. It may write into ``output``. A delta with ``fuses_linear = True`` may also be called
      as ``delta(x, None, weight, bias)`` and then computes the host's product itself.
      Where the place ``reads`` another module, x is that module's input.
    * ``"around"``: ``delta(call, *args, **kwargs)`` returns what the host's call returns;
      ``call(*args, **kwargs)`` runs the host with its activation and weight deltas, any number of times.
    * ``"weight"``: ``delta(weight)`` returns the effective value of one parameter, for hosts whose weight
      is read without the host being called, and for methods on parameters of every kind.
    * ``"generate"``: ``delta(call, *args, **kwargs)`` runs in place of the host's ``generate``.
    * ``"shared"``: never called by its host, the adapted root. It holds what several deltas of one method
      use together; they keep it outside of module registration (``self.__dict__["rule"] = shared``), so
      that it has one name, is counted once and stored once.
    """

    path: ClassVar[Path] = "activation"
    fuses_linear: ClassVar[bool] = False
    changes_bias: ClassVar[bool] = False
    """On a host with a bias, merging changes that too: see :meth:`merged_bias`."""
    needs_bias: bool = False
    """Merging changes the host's bias, and is impossible where there is none."""
    optional_gradient: bool = False
    """The delta may stay without gradient in a step (an adapter that is dropped at random)."""
    starts_from_weight: bool = False
    """:meth:`initialize_from` needs the values of the base weight: it gets dequantised ones."""
    reads_weight: bool = False
    """``forward`` needs the host's weight: a quantised host calls ``delta(x, output, weight, bias)``."""

    remakes: bool = False
    """An effective weight is large and quickly made: ask :meth:`remaker` how, instead of keeping it for backward."""

    replaced: Sequence[int] = ()
    """Rows of the parameter of which the delta leaves nothing, so that the base's may be any."""

    row_form: ClassVar[Any] = None
    """``row_form(deltas, ids, x, output, host)``: what :meth:`forward` does, at once for rows of different deltas.

    ``deltas``: one that has this form or ``None`` (nothing acts) per group, at least one; ``ids``: of each row of the
    batch, the number of its group; groups are numbered in the order of their first rows. x and output are batch-major,
    with as many numbers per row of the batch; ``host()`` gives weight and bias of the host. ``None``, or a result of
    ``None``: not at once, but group by group. For deltas around a call ``row_form(deltas, ids, owner)`` gives what runs
    ``(call, args, kwargs)``; what it holds meanwhile is the owner's, the host's ``pet``.
    :mod:`lightning_pet.layers.row_forms` has the products.
    """

    parameter: str = "weight"
    """Which parameter of the host this delta belongs to (``""``: none); set when it is inserted."""

    slot: Any = None
    """Where x comes from if not from the host's call; set when it is inserted."""

    @property
    def note(self) -> str:
        """What the plan says of this delta beside the shapes of its parameters."""
        return ""

    def reset_parameters(self) -> None:
        """Initialise the parameters in place; also called after materialisation from the meta device."""
        raise NotImplementedError

    def initialize_from(self, weight: Tensor) -> None:
        """Initialise from the base weight, for initialisations that need it. The default ignores it."""

    def merged(self, weight: Tensor) -> Tensor:
        """Return the weight that gives the same outputs without the delta.

        Args:
            weight: the base parameter, of any floating dtype.

        Returns:
            A new tensor of the same shape and dtype; computed in at least float32.

        Raises:
            NotMergeableError: if no weight does.
        """
        raise NotMergeableError(
            f"no weight gives the outputs of this delta ({type(self).__name__}): keep it attached instead of merging."
        )

    def merge_(self, weight: Tensor) -> None:
        """Make a weight, in place, what :meth:`merged` returns. The default needs memory for a second one.

        Args:
            weight: values of the base parameter, of any floating dtype; not differentiated.
        """
        with torch.no_grad():
            weight.copy_(self.merged(weight))

    def remaker(self, weight: Tensor) -> Remaker | None:
        """What makes the effective weight of a weight once more in a backward pass, without gradients.

        Args:
            weight: as the forward has read it.

        Returns:
            A function that gives the very values that :meth:`forward` gave, or fails if what it needs has changed
            since; ``None`` if nothing does, and the effective weight is kept.
        """
        return None

    def reach(self, largest: float) -> float:
        """A number that no value of the merged weight exceeds in size, as far as that can be told without computing it.

        Args:
            largest: the largest size of a value in the weight.

        Returns:
            The number; infinity, or no number, if it cannot be told. A delta that no weight expresses does not tell.
        """
        return math.inf

    def merges_finite(self, weight: Tensor) -> bool:
        """Whether :meth:`merge_` would leave finite numbers, if that can be told in less memory than a second weight.

        The default does not tell: it is ``False``, and whoever asks looks at what :meth:`merged` returns.
        """
        return False

    def low_rank_factors_on(self, weight: Callable[[], Tensor]) -> Factors | None:
        """The same for a change that depends on the weight; see :meth:`low_rank_factors`, which is the default.

        Args:
            weight: gives the values of the base parameter.
        """
        return self.low_rank_factors()

    def low_rank_factors(self) -> Factors | None:
        """A and B whose product is the whole change of the weight, in the shapes that LoRA on this host has.

        Returns:
            A and B with every factor of the delta in them; ``None`` if no low rank says all of the change.
        """
        return None

    def merged_bias(self, bias: Tensor) -> Tensor:
        """Return the host's bias that goes with :meth:`merged`; only asked for where ``changes_bias``."""
        return bias

    def packed(self) -> dict[str, Tensor]:
        """What a delta file holds, by name from this module. The default: parameters and persistent buffers."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    def misfits(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Why these tensors of a file do not fit, one phrase each; nothing is changed."""
        own = self.state_dict()
        found = dict(sorted(tensors.items()))
        return [*wrong_names(own.keys(), found.keys()), *wrong_shapes(own, found), *wrong_kinds(own, found)]

    def unheld(self, tensors: Mapping[str, Tensor]) -> int:
        """Bytes of own tensors whose size neither these tensors of a file nor the base's decide."""
        return 0

    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors of a file over; they fit (:meth:`misfits`)."""
        own = self.state_dict()
        with torch.no_grad():
            for name, tensor in tensors.items():
                if not own[name].is_meta:
                    own[name].copy_(placed(tensor, own[name]))

    def take_form(self, tensors: Mapping[str, Tensor], *, held: bool = False) -> bool:
        """Get ready for these tensors of a checkpoint, if the delta's own change in number or shape while it trains.

        Args:
            tensors: by name from this module.
            held: an engine holds the parameters: none may come, go or change its shape.

        Returns:
            Whether it has other tensors, or other :attr:`excerpts`, now. The default has one form and does nothing.
        """
        return False

    @property
    def excerpts(self) -> Mapping[str, Excerpt | None]:
        """Parameters of which files hold an excerpt, or nothing, by name: those that an engine would not let go."""
        return {}

    def spread(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The own tensors that have these in their files; the opposite of taking excerpts."""
        return tensors


def the_first_for_all(deltas: Sequence[Delta | None], ids: Tensor, owner: Any) -> Callable[..., Any]:
    """A form for rows with deltas around a call that are alike; a row without any loses nothing by them."""
    first: Callable[..., Any] = next(delta for delta in deltas if delta is not None)
    return lambda call, args, kwargs: first(call, *args, **kwargs)


class Tied(Delta):
    """The delta of a weight that several modules share, on every module but the first.

    It holds the first one's delta outside of module registration: tied weights move together.

    Args:
        source: the delta on the first module; its path is ``"weight"``.
    """

    path = "weight"

    def __init__(self, source: Delta) -> None:
        super().__init__()
        self.__dict__["source"] = source

    def reset_parameters(self) -> None:
        """Nothing of its own."""

    def forward(self, weight: Tensor) -> Tensor:
        """Effective weight, as the first module sees it."""
        effective: Tensor = self.__dict__["source"](weight)
        return effective

    @property
    def remakes(self) -> bool:  # type: ignore[override]
        """As the first one's."""
        source: Delta = self.__dict__["source"]
        return source.remakes

    def remaker(self, weight: Tensor) -> Remaker | None:
        """As the first one's."""
        source: Delta = self.__dict__["source"]
        return source.remaker(weight)


# --- building deltas without memory, and without the values that a file brings anyway -------------


_FACTORIES: Final = frozenset(
    {
        torch.empty,
        torch.zeros,
        torch.ones,
        torch.full,
        torch.eye,
        torch.tensor,
        torch.arange,
        torch.linspace,
        torch.rand,
        torch.randn,
        torch.randint,
        torch.randperm,
    }
)
_filled_later: ContextVar[bool] = ContextVar("lightning_pet_filled_later", default=False)


class _OnMeta(TorchFunctionMode):
    """Every new tensor has a shape and no memory, whatever device it is asked for."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        own = {**(kwargs or {}), "device": "meta"} if func in _FACTORIES else kwargs or {}
        return func(*args, **own)


@contextmanager
def without_memory() -> Iterator[None]:
    """Within the block new tensors are on the meta device: numbers of a file choose no allocation."""
    with filled_later(), _OnMeta():
        yield


@contextmanager
def filled_later() -> Iterator[None]:
    """Within the block deltas do not start from the weights of the base: a file brings their values."""
    token = _filled_later.set(True)
    try:
        yield
    finally:
        _filled_later.reset(token)


def is_filled_later() -> bool:
    """Whether the values of the deltas that are being built come from a file."""
    return _filled_later.get()
