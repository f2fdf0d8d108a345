"""What the machinery asks of a method, and the table of known methods."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import nn

from lightning_pet.layers.delta import Delta
from lightning_pet.model.naming import DEFAULT, delta_path, host_key
from lightning_pet.model.structure import Structure, Target


@dataclass(frozen=True)
class Insertion:
    """One delta and its place.

    Attributes:
        target: the host's parameter.
        delta: the module to insert.
        suffix: tells several deltas of one method on one host apart (``"q"`` and ``"v"`` of a fused projection).
        replaces: methods that leave when this delta comes (``"adapter_sst2"``: short name and user's name).
    """

    target: Target
    delta: Delta
    suffix: str = ""
    replaces: tuple[str, ...] = ()

    def key(self, method: "Method") -> str:
        """Name of the delta among those of its host."""
        own = "_".join(part for part in (method.method, method.name, self.suffix) if part)
        return host_key(own, delta_name(method))

    def path(self, method: "Method") -> str:
        """Path that the delta gets, from the root."""
        return delta_path(self.target.module, self.key(method))


def suffix_of(target: Target) -> str:
    """Tells the deltas of one method on one host apart: several parameters, several roles of one parameter."""
    role = target.role.rpartition(".")[2] if target.role and target.rows else ""
    parameter = "" if target.parameter == "weight" else target.parameter
    return "_".join(part for part in (parameter, role) if part)


@runtime_checkable
class Method(Protocol):
    """A parameter-efficient tuning method, as data and three questions. No Trainer is involved."""

    method: ClassVar[str]
    """Short name that is unique among methods: part of parameter names and files."""

    name: str
    """The user's name for this instance; tells two instances of one method apart."""

    module: str | None
    """Submodule that the method is confined to, relative to what it was applied to."""

    shards: bool
    """It trains under strategies that shard parameters over processes."""

    verbose: bool
    """Print the table of trained parameters once at the start of a fit."""

    delta_files: bool
    """Write a delta file beside each checkpoint."""

    @property
    def start_from(self) -> str | None:
        """Delta file or checkpoint whose values the method starts from."""
        ...

    @property
    def base_check(self) -> str:
        """What to do about another base model: ``"error"``, ``"exact"``, ``"warn"`` or ``"off"``."""
        ...

    def config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this instance; JSON types only."""
        ...

    def config_at(self, targets: Sequence[Target]) -> dict[str, Any]:
        """The same for these places, in a form that files can hold."""
        ...

    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        """Find the places in this model.

        Raises:
            TargetError: if a requested place does not exist.
        """
        ...

    def spend_budget(self, root: nn.Module, targets: Sequence[Target]) -> None:
        """Size the method for these places, if it was given a budget; asked once for newly found places."""
        ...

    def insertions(self, root: nn.Module, targets: Sequence[Target]) -> list[Insertion]:
        """Build the deltas for these places, without touching the model."""
        ...

    def trained(self, root: nn.Module, targets: Sequence[Target]) -> tuple[str, ...]:
        """Names of base parameters that train as they are (heads, biases)."""
        ...

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take over the width that an equal budget has picked before."""
        ...

    def lr_ratios(self, delta_names: Sequence[str]) -> dict[str, float]:
        """Learning-rate factor of those of its own parameters that do not train at their group's rate."""
        ...

    def group_options(self, delta_names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Optimizer options of those of its own parameters that do not train with their group's."""
        ...


def key_of(method: Method) -> str:
    """Name of a method's deltas among those of a host."""
    return host_key(f"{method.method}_{method.name}", delta_name(method))


def delta_name(method: Method) -> str:
    """The delta that a method is a part of, in the model that it is applied to."""
    name: str = getattr(method, "delta", DEFAULT)
    return name


METHODS: dict[str, type[Any]] = {}
"""Known methods by short name: a file names its method, and nothing in a file is ever imported."""
