"""The base of a model, compared with that of many files: its fingerprint is taken once, while it stays the same."""

from typing import Any
from weakref import ref

from torch import Tensor, nn

from lightning_pet.layers.sharding import holds_parts
from lightning_pet.model.adaptation import Adaptation, record_of
from lightning_pet.model.naming import walk
from lightning_pet.operations.library.folder import Volume
from lightning_pet.operations.library.forms import is_of_delta
from lightning_pet.operations.saved import base_parameters, check_base, check_beside
from lightning_pet.store.fingerprint import fingerprint
from lightning_pet.store.manifest import OPAQUE, Fingerprint

_Seen = tuple["ref[Tensor]", Any, int]


class Base:
    """The base of one model.

    Args:
        root: the model.
        policy: what to do about another base; see :func:`~lightning_pet.operations.saved.check_base`.
    """

    def __init__(self, root: nn.Module, policy: str) -> None:
        self.root, self.policy = root, policy
        self.taken = 0
        self._seen: list[_Seen] = []
        self._prints: dict[tuple[frozenset[str], str], Fingerprint] = {}
        self._sound: list[Fingerprint] = []

    def forget(self) -> None:
        """Take the fingerprint anew."""
        self._seen, self._prints, self._sound = [], {}, []

    def note(self) -> None:
        """The library itself has put a delta into the model, of whose heads the base's values lie elsewhere now."""
        if self._seen:
            self._seen = _stamps(self.root, record_of(self.root) or Adaptation())

    def is_known(self, volume: Volume) -> bool:
        """Whether a delta in memory was checked against the base as it was when it was last looked at."""
        base = volume.stored.base
        return self.policy == "off" or base is None or any(base is known for known in self._sound)

    def check(self, volume: Volume) -> None:
        """Compare the base of a file with that of the model.

        Raises:
            BaseMismatchError: as :func:`~lightning_pet.operations.saved.check_base`.
        """
        saved = volume.stored.base
        if saved is None or self.policy == "off":
            return
        record = record_of(self.root) or Adaptation()
        if not self._is_same(record):
            self.forget()
            self._seen = _stamps(self.root, record)
        trained = frozenset(name for name in volume.stored.tensors if not is_of_delta(name))
        key = trained, repr(saved.without)
        if key not in self._prints and not holds_parts(self.root):
            named = base_parameters(self.root, record, trained)
            self._prints[key] = fingerprint(named, exact=self.policy == "exact", without=saved.without)
            self.taken += 1
        own = self._prints.get(key)
        if own is None or not _agree(saved, own, exact=self.policy == "exact"):
            check_base(saved, self.root, record, volume.stored.path, self.policy, trained)
        check_beside(saved, self.root, record, volume.stored.path, self.policy)
        self._sound = [*self._sound[-63:], saved]

    def _is_same(self, record: Adaptation) -> bool:
        now = _tensors(self.root, record)
        return len(now) == len(self._seen) and all(
            own() is tensor and place == _place(tensor) and version == _version(tensor)
            for tensor, (own, place, version) in zip(now, self._seen, strict=True)
        )


def _agree(saved: Fingerprint, own: Fingerprint, exact: bool) -> bool:
    """Whether two fingerprints are of the same values, and all of these could be read."""
    if exact and (saved.exact is None or saved.exact != own.exact):
        return False
    readable = not any(kind.startswith(OPAQUE) for kind in own.dtypes)
    return readable and (saved.structure, saved.sample, dict(saved.dtypes)) == (
        own.structure,
        own.sample,
        dict(own.dtypes),
    )


def _tensors(root: nn.Module, record: Adaptation) -> list[Tensor]:
    """What the fingerprint is taken of: the base's parameters, or what they were before a delta trained them."""
    found: list[Tensor] = []
    for path, module in walk(root, of_base=True):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                full = f"{path}.{name}" if path else name
                found.append(record.originals.get(full, parameter))
    return found


def _stamps(root: nn.Module, record: Adaptation) -> list[_Seen]:
    return [(ref(tensor), _place(tensor), _version(tensor)) for tensor in _tensors(root, record)]


def _place(tensor: Tensor) -> Any:
    return tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta else id(tensor)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
