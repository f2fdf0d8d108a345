"""AdapterFusion (Pfeiffer et al. 2021)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_pet.arguments import at_least, finite, some
from lightning_pet.callbacks.base import PETCallback
from lightning_pet.errors import ArgumentError, DeltaFileError, TargetError
from lightning_pet.insertion.method import Insertion, Method
from lightning_pet.insertion.prepare import is_shared
from lightning_pet.layers.delta import Delta, without_memory
from lightning_pet.layers.fusion import Fusable, Mixture, MixtureAround
from lightning_pet.model.adaptation import Adaptation, deltas_in, record_of
from lightning_pet.model.naming import CHILD, by_delta, join, named_modules
from lightning_pet.model.structure import Structure, Target
from lightning_pet.operations.file_terms import method_of
from lightning_pet.operations.saved import check_base
from lightning_pet.store.files import expanded
from lightning_pet.store.manifest import Fingerprint, MethodRecord
from lightning_pet.store.reader import read
from lightning_pet.targets.heads import HEAD, find_heads, parameters_below
from lightning_pet.training.controller import Controller


class UnknownAdapterError(ArgumentError, TargetError):
    """An adapter that this part of the model does not have; another part, or the whole, may have it."""


@dataclass(frozen=True)
class _Trained:
    """An adapter that was trained before.

    Attributes:
        source: the path or name that the user gave.
        method: short name of its method.
        config: its options.
        targets: its places, by paths from the root that it was trained in.
        tensors: its values as delta files hold them, by name from that root, and what trained of the base.
        base: fingerprint of its base, if it came from a file.
        key: its key among the applied methods, if it is one of them.
        within: path of the root that it was trained in from the present one.
    """

    source: str
    method: str
    config: Mapping[str, Any]
    targets: tuple[Target, ...]
    tensors: Mapping[str, Tensor]
    base: Fingerprint | None = None
    key: str | None = None
    within: str = ""

    @property
    def description(self) -> dict[str, Any]:
        """What rebuilds it without its source."""
        return {"method": self.method, **self.config}


class AdapterFusionCallback(PETCallback):
    r"""Adapters of several tasks, frozen, and attention that weighs them at every place and token.

    :math:`h + V \sum_n s_n z_n` with :math:`s = softmax_n((Q h) \cdot (K z_n) / T)`, where z_n is what adapter n adds
    to h. Q, K and V train; V starts as the identity. The adapters' values become a part of this delta, so its file
    needs no other. Adapters that were applied to the model by then leave: they go on inside the fusion.
    Source: Pfeiffer et al. 2021.

    Args:
        adapters: for every task a delta file or checkpoint, or the name of an adapter that is applied to the model
            (``"sst2"``, or ``"compacter:sst2"``). A file brings all adapters in it.
        members: short name and options of every adapter, filled in when they are found: this is how a file
            rebuilds them. Not for the user.
        regularization: factor of :math:`\|I - V\|_F^2`, summed over all places.
        off_diagonal: value of V beside its diagonal at the start.
        temperature: T at the start; goes down to 1 in equal parts over 1000 steps. It acts at inference, too.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.base.PETCallback`.

    Raises:
        ArgumentError: if no adapter is given, or a number is out of range.

    Example:
        >>> from lightning_pet import AdapterFusionCallback
        >>> AdapterFusionCallback(adapters=[])
        Traceback (most recent call last):
        lightning_pet.errors.ArgumentError: adapters is empty: name at least one delta file or applied adapter to fuse.
    """

    method: ClassVar[str] = "adapter_fusion"
    mirrors = False
    shards = True
    may_change: ClassVar[frozenset[str]] = PETCallback.may_change | {"regularization"}
    of_the_run: ClassVar[frozenset[str]] = PETCallback.of_the_run | {"adapters"}

    def __init__(
        self,
        adapters: list[str] | None = None,
        members: list[dict[str, Any]] | None = None,
        regularization: float = 0.01,
        off_diagonal: float = 1e-6,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.adapters = [adapters] if isinstance(adapters, str) else adapters
        self.members = members
        self.regularization = regularization
        self.off_diagonal = off_diagonal
        self.temperature = temperature
        self._found: list[_Trained] = []
        some("adapters", adapters, "name at least one delta file or applied adapter to fuse.")
        at_least("regularization", regularization, 0, "must be 0 or more; the paper's is 0.01.")
        finite("off_diagonal", off_diagonal, "must be a finite number, e.g. 0 or 1e-6.")
        at_least("temperature", temperature, 1, "must be 1 (none) or more; 50 is usual.")

    def config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this instance from a file: the adapters' options for their sources."""
        members = self.members
        if members is None:
            files = [source for source in self.adapters or () if Path(expanded(source)).is_file()]
            members = [found.description for source in files for found in _in_file(source)]
        return {**super().config(), "adapters": None, "members": members}

    # --- where ------------------------------------------------------------------------------------

    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        """Find the adapters; their places are the places.

        Raises:
            ArgumentError: if a source is no file and no name, holds no adapter, or adapters sit at different places.
            DeltaFileError: if a file is damaged.
            TargetError: if a place does not exist in this model.
        """
        self._gather(root)
        first = self._found[0]
        modules = named_modules(root)
        return tuple(_within(target, modules, structure.prefix, first.source) for target in first.targets)

    def _gather(self, root: nn.Module) -> None:
        if not self.adapters:
            raise ArgumentError("adapters was not given: name at least one delta file or applied adapter to fuse.")
        found = [adapter for source in self.adapters for adapter in _find(root, source)]
        first = found[0]
        for other in found[1:]:
            if set(other.targets) != set(first.targets):
                raise ArgumentError(
                    f"adapters: {first.source} sits at {_places(first.targets)}, {other.source} at "
                    f"{_places(other.targets)}. Fusion weighs adapters at one place: train them with one placement."
                )
        self._found = found
        self.members = [adapter.description for adapter in found]

    # --- what -------------------------------------------------------------------------------------

    def insertions(self, root: nn.Module, targets: Sequence[Target]) -> list[Insertion]:
        """Build the adapters again, with their values if they were found, and a fusion per place.

        Raises:
            ArgumentError: if a method cannot be fused, an adapter trained other parts of the base, or the model is
                on the meta device.
            BaseMismatchError: if an adapter was trained on another base.
            DeltaFileError: if a file's tensors do not fit.
        """
        if self.members is None:
            self._gather(root)
        members = self.members or []
        found: list[_Trained | None] = [_respelled(one, targets) for one in self._found] or [None] * len(members)
        if self._found and any(parameter.is_meta for parameter in root.parameters()):
            raise ArgumentError(
                "the model is on the meta device, which cannot keep the adapters' values. Load its weights first."
            )
        shared: list[Insertion] = []
        fused: dict[Target, list[Delta]] = {target: [] for target in targets}
        for index, (description, source) in enumerate(zip(members, found, strict=True)):
            method = _method_of(description, "members" if source is None else source.source)
            if source is not None:
                with without_memory():
                    _require_fit(method, method.insertions(root, targets), source)
            built = method.insertions(root, targets)
            _require_fusable(description, built)
            if source is not None:
                self._check(root, targets, source)
                _fill(method, built, source)
            for insertion in built:
                insertion.delta.requires_grad_(False)
                if is_shared(insertion.target):
                    shared.append(replace(insertion, suffix=f"{index}_{insertion.suffix}"))
                else:
                    fused[insertion.target].append(insertion.delta)
        self._found = []  # their values are in the deltas now
        leaving = tuple(source.key for source in found if source is not None and source.key is not None)
        mixtures = [Insertion(t, self._mixture(t, deltas), replaces=leaving) for t, deltas in fused.items()]
        return [*shared, *mixtures]

    def build(self, root: nn.Module, target: Target) -> Delta:
        """Build the fusion for one place."""
        return self.insertions(root, [target])[-1].delta

    def _mixture(self, target: Target, members: list[Delta]) -> Mixture:
        parameter = next(members[0].parameters())
        cls = MixtureAround if members[0].path == "around" else Mixture
        return cls(
            target.sizes[0],
            members,
            off_diagonal=self.off_diagonal,
            temperature=self.temperature,
            regularization=self.regularization,
            device=parameter.device,
            dtype=parameter.dtype,
        )

    def _check(self, root: nn.Module, targets: Sequence[Target], found: _Trained) -> None:
        modules = named_modules(root)
        heads = set(
            parameters_below(root, [*find_heads(root, targets), *(self.modules_to_save or ())], "modules_to_save")
        )
        own = {name for path, module in modules.items() for name in (join(path, n) for n in module._parameters)}
        rest = [name for name in found.tensors if CHILD not in name.split(".")]
        other = sorted(set(rest) & own - heads)
        if other:
            raise ArgumentError(
                f"{found.source} trained {len(other)} tensors of the base besides its adapters ({other[0]}), which "
                "differ between tasks and cannot be fused. Train it with layer_norms=False and no modules_to_save."
            )
        if found.base is not None:
            record = record_of(root) or Adaptation()
            check_base(found.base, root, record, found.source, self.base_check, rest, within=found.within)

    # --- when -------------------------------------------------------------------------------------

    @property
    def not_for_tasks(self) -> str | None:
        """It takes the adapters of several tasks into one delta."""
        return "it joins adapters that were trained before, for one target task. Train these with AdapterCallback."

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out whose steps count."""
        super().on_train_start(trainer, pl_module)
        self._begin_steps(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Lower the temperature; it depends on the step alone, so that a resumed run goes on exactly."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.temperature > 1:
            now = max(1.0, self.temperature * (1 - self._steps.made(trainer) / 1000))
            for _, delta in self.deltas(Controller.get(trainer).adapted.root):
                if isinstance(delta, Mixture) and delta.temperature is not None:
                    delta.temperature.fill_(now)

    def state_dict(self) -> dict[str, Any]:
        """Steps of the own optimizer, where a module steps several."""
        return self._steps.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over."""
        self._steps.load(state_dict)


# --- finding adapters --------------------------------------------------------------------------------


def _find(root: nn.Module, source: str) -> list[_Trained]:
    """The adapters in a file, or the applied one of that name."""
    if Path(expanded(source)).is_file():
        return _in_file(source)
    record = record_of(root)
    applied = record.applied if record else []
    named = [a for a in applied if source in (a.name, f"{a.method}:{a.name}")]
    if len(named) != 1:
        known = ", ".join(f"{a.method}:{a.name}" for a in applied) or "none"
        raise UnknownAdapterError(
            f"adapters: {source!r} is no file, and the name of {len(named) or 'no'} applied adapters; applied are "
            f"{known}. Give the path of a delta file or checkpoint, or one name with its method."
        )
    one = named[0]
    tensors = dict(root.named_parameters(remove_duplicate=False))
    values: dict[str, Tensor] = {name: tensors[name] for name in one.trained}
    for inserted in deltas_in(root):
        if inserted.method is one:
            values |= {join(inserted.path, name): tensor for name, tensor in inserted.delta.packed().items()}
    return [_Trained(source, one.method, one.config, _own(one.targets), values, key=one.key)]


def _in_file(path: str) -> list[_Trained]:
    stored = read(path)
    return [
        _Trained(
            path if len(stored.methods) == 1 else f"{path} ({record.method}:{record.name})",
            record.method,
            record.config,
            _own(record.targets),
            stored.tensors,
            stored.base,
        )
        for record in stored.methods
    ]


def _own(targets: Sequence[Target]) -> tuple[Target, ...]:
    return tuple(target for target in targets if not is_shared(target) and target.role != HEAD)


def _within(target: Target, modules: Mapping[str, nn.Module], prefix: str, source: str) -> Target:
    """The place by its path from the module that fusion is confined to."""
    parts = prefix.split(".")
    for start in ("", *(".".join(parts[i:]) + "." for i in range(len(parts)))):
        host, reads = target.module.removeprefix(start), target.reads and target.reads.removeprefix(start)
        if host in modules and (reads is None or reads in modules):
            return replace(target, module=host, reads=reads)
    raise TargetError(
        f"{source} sits at {target.path}, which this model does not have. Fuse adapters in the kind of model that they "
        "were trained in."
    )


def _respelled(found: _Trained, targets: Sequence[Target]) -> _Trained:
    """With names from the present root, where that holds the model that the adapter was trained in."""
    places = {target.module for target in targets if not is_shared(target)}
    start = next(iter(found.targets)).module
    for place in sorted(places, key=len):
        within = place.removesuffix(start).rstrip(".")
        if place == join(within, start) and within and {join(within, t.module) for t in found.targets} == places:
            tensors = {  # what places share is at the root of either
                name if name.startswith(f"{CHILD}.") else join(within, name): tensor
                for name, tensor in found.tensors.items()
            }
            return replace(found, tensors=tensors, within=within)
    return found


def _places(targets: Sequence[Target]) -> str:
    roles = sorted({target.role or target.path for target in targets})
    return f"{len(targets)} places ({', '.join(roles)})"


# --- rebuilding them ---------------------------------------------------------------------------------


def _method_of(description: Mapping[str, Any], source: str) -> Method:
    options = {name: value for name, value in description.items() if name != "method"}
    return method_of(MethodRecord(str(description.get("method")), str(options.get("name", "default")), options), source)


def _below(method: Method, insertion: Insertion, found: _Trained) -> dict[str, Tensor]:
    return by_delta(found.tensors).get(insertion.path(method), {})


def _require_fit(method: Method, built: Sequence[Insertion], found: _Trained) -> None:
    for insertion in built:
        if problems := insertion.delta.misfits(_below(method, insertion, found)):
            raise DeltaFileError(f"{found.source}: {insertion.path(method)}.{problems[0]}.", "mismatch")


def _fill(method: Method, built: Sequence[Insertion], found: _Trained) -> None:
    """Copy the values of a trained adapter into its new deltas."""
    for insertion in built:
        insertion.delta.unpack(_below(method, insertion, found))


def _require_fusable(description: Mapping[str, Any], built: Sequence[Insertion]) -> None:
    own = [i for i in built if not is_shared(i.target)]
    odd = next((i for i in own if isinstance(i.delta, Mixture) or not isinstance(i.delta, Fusable)), None)
    if odd is not None:
        raise ArgumentError(
            f"adapters: a delta of {description['method']!r} at {odd.target.path} is no bottleneck adapter. Only those "
            "of AdapterCallback and CompacterCallback can be fused."
        )
