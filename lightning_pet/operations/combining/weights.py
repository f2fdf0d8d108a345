"""Deltas of any methods that merge become one, by what they change of each weight of the base.

What the result is made of: a low-rank delta where a rank is asked for, else the change itself at the entries that are
not zero; and the values of what one of the deltas trains in place (heads, biases, whole weights).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pet.errors import ArgumentError
from lightning_pet.insertion.low_rank_places import Options as Form
from lightning_pet.insertion.low_rank_places import fitted, largest_rank
from lightning_pet.insertion.method import suffix_of
from lightning_pet.insertion.tasks.own_values import is_own
from lightning_pet.layers.delta import delta_dtype
from lightning_pet.model.adaptation import Adaptation
from lightning_pet.model.layer_kinds import host_kind
from lightning_pet.model.naming import delta_of, delta_path, join, named_tensors, tensors_at
from lightning_pet.model.quantised import dense_values, format_of, is_quantised
from lightning_pet.model.structure import Target
from lightning_pet.operations.combining.files import values_over
from lightning_pet.operations.combining.rules import Combination, Options, Originals, combined_change
from lightning_pet.operations.merging import Step, steps_of
from lightning_pet.store.manifest import MethodRecord
from lightning_pet.store.reader import Stored
from lightning_pet.targets.heads import HEAD
from lightning_pet.targets.patterns import exactly

_NAME = "default"
_RANKED = ("lora", "adalora")


@dataclass(frozen=True)
class Source:
    """One delta that is combined.

    Attributes:
        name: in the model.
        view: of the record, as if it were the only one.
        values: what it has of its own in place of the base's, by name.
        steps: what it does to parameters, by ``id``.
    """

    name: str
    view: Adaptation
    values: Mapping[str, Tensor]
    steps: Mapping[int, Step]


def through_weights(
    root: nn.Module,
    record: Adaptation,
    values: Mapping[str, Mapping[str, Tensor]],
    originals: Originals,
    options: Options,
) -> tuple[Stored, Combination]:
    """Combine deltas by the change that each makes to the base's weights.

    Args:
        root: the adapted root.
        record: of it.
        values: of each delta, what it has in place of the base's own.
        originals: the base's own.
        options: what to do.

    Raises:
        NotMergeableError: if one of the deltas is no change of weights.
        ArgumentError: if what is asked for is none of changes.
    """
    if options.how.startswith("peft"):
        raise ArgumentError(
            f"{options.asked} adds A and B apart, which only LoRAs of equal ranks have. Use "
            f"{options.word}='linear', or 'svd' with a rank."
        )
    sources = [Source(name, _of_users(record.of(name)), own, steps_of(root, name)) for name, own in values.items()]
    return _Through(root, sources, originals, options).combined()


def _of_users(view: Adaptation) -> Adaptation:
    """Without the values of its own that a delta has while it trains with others: they are among its values."""
    return replace(view, applied=[applied for applied in view.applied if not is_own(applied)])


class _Through:
    def __init__(self, root: nn.Module, sources: Sequence[Source], originals: Originals, options: Options) -> None:
        self.root, self.sources, self.originals, self.options = root, sources, originals, options
        self.names: dict[int, str] = {}
        for name, tensor in named_tensors(root):
            if delta_of(name) is None:
                self.names.setdefault(id(tensor), name)
        self.targets: dict[int, dict[tuple[str, str], Target]] = {}
        for source in sources:
            for inserted in source.view.deltas(root):
                self._note(inserted.host, inserted.target)
        self.rank = self._rank()
        self.tensors: dict[str, Tensor] = {}
        self.low_rank: dict[Target, int] = {}
        self.dense: list[Target] = []
        self.whole = self.lost = 0.0

    def _note(self, host: nn.Module, target: Target) -> None:
        for parameter in (target.parameter, "bias"):  # a delta of the weight may change the bias beside it
            tensor = host._parameters.get(parameter)
            if tensor is not None:
                reads = target.reads if parameter == target.parameter else None
                plain = Target(target.module, parameter, reads=reads)
                self.targets.setdefault(id(tensor), {}).setdefault((plain.module, parameter), plain)

    def _rank(self) -> int | None:
        if self.options.how != "svd":
            return self.options.rank
        if self.options.rank is not None:
            return self.options.rank
        ranks = [tensor.shape[-1] for source in self.sources for tensor in self._bs(source)]
        if not ranks:
            raise ArgumentError(f"{self.options.asked} of deltas that have no rank: say which, rank=8.")
        return max(ranks)

    def _bs(self, source: Source) -> list[Tensor]:
        found = []
        for inserted in source.view.deltas(self.root):
            b = inserted.delta._parameters.get("b")
            if inserted.method.method in _RANKED and b is not None and b.dim() > 1:
                found.append(b.flatten(1) if b.dim() != 3 else b)
        return found

    @torch.no_grad()
    def combined(self) -> tuple[Stored, Combination]:
        """The result, and its error."""
        values = self._in_place()
        there = {id(tensor) for tensor in tensors_at(self.root, values).values()}
        steps: dict[int, Step] = {}
        for source in self.sources:
            for key, step in source.steps.items():
                steps.setdefault(key, step)
        for key, step in steps.items():
            if key not in there:
                self._add(key, step)
        records = [record for record in (self._of_low_rank(), self._of_dense(), self._of_values(values)) if record]
        stored = Stored(Path(), tuple(records), self.tensors | values, None)
        ranks = {delta_path(t.module, _key("lora", t)): rank for t, rank in self.low_rank.items()}
        error = (self.lost / self.whole) ** 0.5 if self.whole > 0 else 0.0
        return stored, Combination(error=error, ranks=ranks)

    def _in_place(self) -> dict[str, Tensor]:
        """What one of them trains in place, with the change that others make to it there."""
        own: list[dict[str, Tensor]] = [dict(source.values) for source in self.sources]
        names = {name for values in own for name in values}
        parameters = tensors_at(self.root, names)
        for values, source in zip(own, self.sources, strict=True):
            for name in names:
                step = source.steps.get(id(parameters.get(name)))
                if step is not None:
                    start = values.get(name, self.originals.values.get(name))
                    assert start is not None  # what trains in place has its original in memory
                    values[name] = step.of(start.to(parameters[name].device).double())
        combined = values_over(self.originals, own, self.options)
        return {name: value.to(parameters[name].dtype) for name, value in combined.items()}

    def _add(self, key: int, step: Step) -> None:
        start = self._original(step)
        changes, weights = [], []
        for source, weight in zip(self.sources, self.options.weights, strict=True):
            own = source.steps.get(key)
            if own is not None:
                changes.append(own.of(start) - start)
                weights.append(weight)
        change = combined_change(self.options, self.names[key], changes, weights)
        targets = list(self.targets[key].values())
        kind = host_kind(step.host, step.name) if change.dim() > 1 else None
        if self.rank is not None and kind is not None and len(targets) == 1:
            self._approximate(targets[0], step, change)
            return
        if is_quantised(step.parameter):
            raise ArgumentError(
                f"{targets[0].path} is stored as {format_of(step.parameter)}, beside which only a change of some rank "
                f"has a place. Ask for one: {self.options.word}='svd', rank=8."
            )
        places = change.reshape(-1).nonzero().squeeze(-1)
        path = delta_path(targets[0].module, _key("diff_pruning", targets[0]))
        index = torch.int32 if change.numel() < 2**31 else torch.int64
        numbers = change.reshape(-1)[places].to(delta_dtype(step.parameter))
        self.tensors |= {join(path, "indices"): places.to(index), join(path, "values"): numbers}
        self.dense += targets

    def _original(self, step: Step) -> Tensor:
        name = self.names.get(id(step.parameter))
        original = self.originals.values.get(name) if name is not None else None
        values = dense_values(step.host, step.name) if original is None else original
        return values.to(step.parameter.device).double()

    def _approximate(self, target: Target, step: Step, change: Tensor) -> None:
        assert self.rank is not None
        rank = min(self.rank, largest_rank(step.host, step.name))
        delta = fitted(self.root, target, Form(rank, 1.0))
        factors, lost = delta.approximation(change)
        self.whole += float(change.square().sum())
        self.lost += float(lost)
        path = delta_path(target.module, _key("lora", target))
        self.tensors |= {join(path, name): tensor for name, tensor in factors.items()}
        self.low_rank[target] = rank

    def _of_low_rank(self) -> MethodRecord | None:
        if not self.low_rank:
            return None
        assert self.rank is not None
        other = {exactly(target): rank for target, rank in self.low_rank.items() if rank != self.rank}
        if len(other) == len(self.low_rank):  # a pattern or a number that decides nowhere is refused
            return self._record_of_low_rank(max(other.values()))
        return self._record_of_low_rank(self.rank)

    def _record_of_low_rank(self, rank: int) -> MethodRecord:
        other = {exactly(target): own for target, own in self.low_rank.items() if own != rank}
        config: dict[str, Any] = {
            "r": rank,
            "alpha": float(rank),  # a scale of one
            "rank_pattern": other or None,
            "alpha_pattern": {place: float(own) for place, own in other.items()} or None,
            "target_modules": sorted({target.module for target in self.low_rank}),
            "modules_to_save": [],
        }
        return MethodRecord("lora", _NAME, config, tuple(self.low_rank))

    def _of_dense(self) -> MethodRecord | None:
        config = {"density": 1.0, "modules_to_save": []}
        return MethodRecord("diff_pruning", _NAME, config, tuple(self.dense)) if self.dense else None

    def _of_values(self, values: Mapping[str, Tensor]) -> MethodRecord | None:
        parameters = {n for n, t in tensors_at(self.root, values).items() if isinstance(t, nn.Parameter)}
        if not parameters:
            return None
        found = [target for source in self.sources for a in source.view.applied for target in a.targets]
        heads = dict.fromkeys(replace(target, reads=None) for target in found if target.role == HEAD)
        below = tuple(f"{target.module}." for target in heads)
        modules = dict.fromkeys(n.rpartition(".")[0] for n in sorted(parameters) if not n.startswith(below))
        return MethodRecord("full_fine_tuning", _NAME, {}, (*(Target(path, "") for path in modules), *heads))


def _key(method: str, target: Target) -> str:
    return "_".join(part for part in (method, _NAME, suffix_of(target)) if part)
