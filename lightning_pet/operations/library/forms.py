"""What deltas have in common that can lie in one place of a model, one after the other."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pet.layers.low_rank import LowRankLinear, LowRankParameter
from lightning_pet.layers.low_rank_base import LowRank
from lightning_pet.model.naming import CHILD
from lightning_pet.operations.file_terms import for_model
from lightning_pet.operations.loading import fitted, methods_of
from lightning_pet.store.container import Entry
from lightning_pet.store.manifest import Fingerprint, MethodRecord
from lightning_pet.store.reader import Stored


class Place(NamedTuple):
    """A low-rank delta that is A and B alone, so that zeros can be put behind its rank.

    Attributes:
        kind: what has to be the same in the slot.
        rank: of A and B.
        scale: factor of their product.
    """

    kind: tuple[Any, ...]
    rank: int
    scale: float


@dataclass(eq=False)
class Form:
    """Methods, options, places, and the names, types and shapes of tensors: files alike in these are of one form.

    Attributes:
        methods: of the files.
        root: path of the adapted root where they were trained.
        layout: name, dtype and shape of each tensor.
        entries: where these lie in a file.
        places: of low-rank deltas, by path; worked out when it is first asked for.
        bases: fingerprints that were met, so that each is in memory once.
    """

    methods: tuple[MethodRecord, ...]
    root: str
    layout: tuple[tuple[str, Any, tuple[int, ...]], ...]
    entries: tuple[Entry, ...]
    places: Mapping[str, Place] | None = None
    bases: list[Fingerprint] = field(default_factory=list)

    def same_base(self, base: Fingerprint | None) -> Fingerprint | None:
        """A fingerprint that is equal, and in memory already if there is one."""
        if base is None:
            return None
        for known in self.bases:
            if known == base:
                return known
        self.bases = [*self.bases[-3:], base]
        return base

    def places_in(self, root: nn.Module, stored: Stored) -> Mapping[str, Place]:
        """The low-rank deltas whose rank may be smaller than that of the place they get; the file must fit."""
        if self.places is None:
            own = for_model(stored, _PROBE)
            fit = fitted(root, own, methods_of(own, _PROBE), acts=False, other_sizes=True)
            found: dict[str, Place] = {}
            for prepared in fit.build():
                for insertion in prepared.insertions:
                    place = _place(insertion.delta)
                    if place is not None:
                        found[insertion.path(prepared.method).replace(f"@{_PROBE}", "")] = place
            self.places = found
        return self.places

    def fits_into(self, other: "Form", own: Mapping[str, Place], theirs: Mapping[str, Place]) -> bool:
        """Whether a delta of this form is, with zeros behind its ranks, one of another form."""
        if own.keys() != theirs.keys() or not own:
            return False
        if any(own[path].kind != place.kind or own[path].rank > place.rank for path, place in theirs.items()):
            return False
        if any(not place.scale for place in theirs.values()):
            return False
        return self._rest(own) == other._rest(own) and [(m.method, m.name) for m in self.methods] == [
            (m.method, m.name) for m in other.methods
        ]

    def _rest(self, places: Mapping[str, Place]) -> list[Any]:
        return [item for item in self.layout if item[0].rpartition(".")[0] not in places]


_PROBE = "form-of-a-file"


class Forms:
    """The forms of the files that were read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[Any, list[Form]] = {}

    def of(self, stored: Stored, entries: tuple[Entry, ...]) -> Form:
        """The form of a file."""
        layout = tuple((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.tensors.items())
        half = None if stored.base is None else tuple(sorted(stored.base.dtypes.items()))
        with self._lock:
            alike = self._known.setdefault((layout, stored.root, half, entries), [])
            for form in alike:
                if form.methods == stored.methods:
                    return form
            alike.append(Form(stored.methods, stored.root, layout, entries))
            return alike[-1]


def padded(tensors: Mapping[str, Tensor], own: Mapping[str, Place], theirs: Mapping[str, Place]) -> dict[str, Tensor]:
    """The tensors of a delta with zeros behind its ranks, and its scales in B, in terms of another form."""
    found = dict(tensors)
    for path, place in own.items():
        a, b, more = found[f"{path}.a"], found[f"{path}.b"], theirs[path].rank - place.rank
        found[f"{path}.a"] = F.pad(a, (0, 0, 0, more))
        found[f"{path}.b"] = F.pad(b * (place.scale / theirs[path].scale), (0, more))
    return found


def _place(delta: Any) -> Place | None:
    if type(delta) not in (LowRankLinear, LowRankParameter):
        return None
    more = delta.a0 is not None or delta.magnitude is not None or getattr(delta, "bias", None) is not None
    if more or {name for name, _ in delta.named_parameters()} != {"a", "b"}:
        return None
    own: LowRank = delta
    sizes = (*own.a.shape[:-2], own.a.shape[-1]), tuple(own.b.shape[:-1])
    kind = (type(own), sizes, own.a.dtype, own.b.dtype, own.rows, own.dropout, own.out_features, delta.transposed)
    return Place(kind, own.r, own.scale)


def is_of_delta(name: str) -> bool:
    """Whether a tensor of a file is a delta's, and not one of the base that was trained as it is."""
    return f".{CHILD}." in f".{name}."
