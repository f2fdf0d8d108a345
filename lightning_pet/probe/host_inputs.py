"""What layers read while a model runs on data, and in which directions that varies most."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pet.errors import DeadSiteError, PETError, TargetError
from lightning_pet.layers.input_directions import Directions, share_ranks
from lightning_pet.model.tokens import IGNORED


@dataclass(frozen=True)
class Batches:
    """The training data of a run before its first step.

    Attributes:
        passes: begins a pass over the data, and gives functions that each run the model on one batch.
        resumed: the checkpoint that the run goes on from: it has seen its data already.
        around: within this context batches are run; it leaves no trace in the model.
        everywhere: results of a function in all processes, in their order; an error in one is an error in all.
    """

    passes: Callable[[], Iterator[Callable[[], Any]]]
    resumed: str | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    everywhere: Callable[[Callable[[], Any]], list[Any]] = lambda action: [action()]


@dataclass(frozen=True)
class Place:
    """A layer whose inputs are looked at.

    Attributes:
        host: the layer.
        path: its name.
        rank: directions that it would have if all had as many.
        limit: directions that it can have.
    """

    host: nn.Module
    path: str
    rank: int
    limit: int


@dataclass
class Study:
    """Directions of the inputs of layers, and how many of them each layer gets.

    Ranks are shared out by variance: those of all places together stay as many, and a place gets at most ``rho``
    times its own. Batches are read until directions stay where they are. Source: Paischer et al. 2024.

    Attributes:
        root: the model; what it is called with says which positions are padding.
        places: the layers.
        rho: see above; 1: no redistribution.
        tau: cosine between directions before and after a batch from which they count as settled.
        limit: most batches that are read.
        read: batches that were.
    """

    root: nn.Module
    places: Mapping[str, Place]
    rho: float
    tau: float
    limit: int
    read: int = 0
    _leaders: dict[str, str] = field(default_factory=dict)  # of places that read the same, the first
    _found: dict[str, Directions] = field(default_factory=dict)  # by leader
    _ranks: dict[str, int] = field(default_factory=dict)

    def run(self, batches: Batches, *, whiten: bool = False) -> dict[str, Tensor]:
        """Read batches until all directions are settled.

        Args:
            batches: the data.
            whiten: divide directions by the roots of their singular values.

        Returns:
            By place, its directions [rank, in], orthonormal rows without ``whiten``; a rank may be 0.

        Raises:
            DeadSiteError: if a layer does not run.
            PETError: if there are no data, or too few for so many directions.
        """
        with batches.around(), torch.no_grad():
            for run in _again_and_again(batches.passes):
                unsettled: list[str] = batches.everywhere(self._unsettled)[0]  # one decides for all
                if self.read == self.limit or (self._found and not unsettled):
                    break
                self._add(batches.everywhere(partial(self._inputs, run, unsettled)))
                self.read += 1
        short = [place.path for name, place in self.places.items() if self._of(name).components is None]
        if short:
            raise PETError(
                f"{self.read} batches held fewer positions than {short[0]} has directions to find "
                f"({self._of(next(iter(self.places))).count}). Lower the rank, or let more batches be read."
            )
        chosen: dict[str, Tensor] = batches.everywhere(lambda: self._chosen(whiten))[0]
        return chosen

    @property
    def settled(self) -> bool:
        """Whether all directions were settled when reading ended."""
        return not self._unsettled()

    def _of(self, name: str) -> Directions:
        return self._found[self._leaders[name]]

    def _chosen(self, whiten: bool) -> dict[str, Tensor]:
        chosen = {}
        for name in self.places:
            found, rank = self._of(name), self._ranks[name]
            assert found.components is not None
            assert found.singular is not None
            rows = found.components[:rank]
            chosen[name] = (rows / found.singular[:rank, None].sqrt() if whiten else rows).cpu()
        return chosen

    def _unsettled(self) -> list[str]:
        """Leaders of whose directions those that count still move."""
        return [
            name
            for name, found in self._found.items()
            if bool((found.similarity[: self._ranks[name]] < self.tau).any())
        ]

    def _inputs(self, run: Callable[[], Any], names: list[str]) -> dict[str, Tensor]:
        """What layers read in one batch: rows without padding."""
        wanted = names if self._found else list(self.places)
        seen: dict[str, list[Tensor]] = {name: [] for name in wanted}
        masks: list[Tensor] = []
        with ExitStack() as hooks:
            hook = self.root.register_forward_pre_hook(
                lambda _, args, kwargs: masks.extend(_masks(self.root, kwargs)), with_kwargs=True
            )
            hooks.callback(hook.remove)
            for name in wanted:
                hook = self.places[name].host.register_forward_pre_hook(_noting(seen[name]), with_kwargs=True)
                hooks.callback(hook.remove)
            run()
        if dead := [self.places[name].path for name, inputs in seen.items() if not inputs]:
            raise DeadSiteError(
                f"{dead[0]} did not run on a batch of the training data, so there is nothing that A could start from. "
                "Leave it out with exclude_modules."
            )
        if not self._found:
            self._group(seen)
        return {
            name: torch.cat([_rows(x, masks) for x in inputs])
            for name, inputs in seen.items()
            if self._leaders[name] == name
        }

    def _group(self, seen: Mapping[str, list[Tensor]]) -> None:
        """Places that read the very same tensors have the same directions."""
        first: dict[tuple[int, ...], str] = {}
        for name, inputs in seen.items():
            self._leaders[name] = first.setdefault(tuple(id(x) for x in inputs), name)
        for leader in first.values():
            width = seen[leader][0].shape[-1]
            members = [self.places[name] for name in self.places if self._leaders[name] == leader]
            self._found[leader] = Directions(min(width, max(self._most(place) for place in members)))
        self._ranks = {name: min(self._of(name).count, self._most(place)) for name, place in self.places.items()}

    def _most(self, place: Place) -> int:
        return max(1, min(place.limit, round(place.rank * self.rho)))

    def _add(self, parts: list[dict[str, Tensor]]) -> None:
        for name in parts[0]:
            device = next(self.places[name].host.parameters()).device  # others send theirs over the CPU
            self._found[name].add(torch.cat([part[name].to(device) for part in parts]))
        if any(found.components is None for found in self._found.values()):
            return
        shares = [self._of(name).shares[: self._most(place)] for name, place in self.places.items()]
        ranks = share_ranks(shares, sum(place.rank for place in self.places.values()))
        self._ranks = dict(zip(self.places, ranks, strict=True))


def _again_and_again(passes: Callable[[], Iterator[Callable[[], Any]]]) -> Iterator[Callable[[], Any]]:
    while True:
        empty = True
        for run in passes():
            empty = False
            yield run
        if empty:
            raise PETError("the training data have no batch, so there is nothing that A could start from.")


def _noting(inputs: list[Tensor]) -> Callable[..., None]:
    """A hook that keeps what a layer is called with."""

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if found is None or not found.is_floating_point():
            raise TargetError(f"a {type(module).__name__} is called with no numbers that directions could be found in.")
        inputs.append(found)

    return note


def _masks(root: nn.Module, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Which positions count: no padding, and none whose label is ignored; one mask per sequence of a batch."""
    padding, labels = kwargs.get("attention_mask"), kwargs.get("labels")
    masks = [padding.bool()] if isinstance(padding, Tensor) and padding.dim() == 2 else []
    if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        counted = labels != IGNORED
        together = masks and masks[0].shape == counted.shape
        if getattr(getattr(root, "config", None), "is_encoder_decoder", False):
            return [] if together else [*masks, counted]  # whose sequence it is cannot be told by its length
        return [masks[0] & counted] if together else [*masks, counted]
    return masks


def _rows(x: Tensor, masks: list[Tensor]) -> Tensor:
    """The input of a layer as rows, without the positions that do not count."""
    mask = next((mask for mask in masks if mask.shape == x.shape[:-1]), None)
    return x.reshape(-1, x.shape[-1]) if mask is None else x[mask]
