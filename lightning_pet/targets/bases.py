"""What of a module is the base: the pretrained models inside it, else all of it; and what the user froze.

Whatever lies outside of the base is the user's own, and trains as it would without us.
"""

import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from lightning_pet.model.adaptation import record_of
from lightning_pet.model.layer_kinds import base_class
from lightning_pet.model.naming import CHILD, canonical, is_below, join, named_modules, named_parameters, names_below
from lightning_pet.model.quantised import can_train
from lightning_pet.model.structure import Target

_HUB_MIXIN = "huggingface_hub"  # gives any class of the user's a from_pretrained
_BUILDER_OPTIONS = ("weights", "pretrained")


def is_pretrained(module: nn.Module) -> bool:
    """Whether a module is a model that a library offers with trained weights.

    Libraries say so themselves: a class that loads with ``from_pretrained`` or writes with ``save_pretrained``
    (transformers, diffusers, sentence-transformers), an instance with the configuration of its weights (timm), a
    builder beside the class that takes ``weights`` or ``pretrained`` and returns one (torchvision), or code that
    ``torch.hub`` fetched. Weights are not looked at. A LightningModule holds models, and is none.
    """
    if hasattr(module, "training_step") or not any(True for _ in module.parameters()):
        return False
    if any(getattr(module, name, None) for name in ("pretrained_cfg", "default_cfg")):
        return True
    classes = [c for c in base_class(module).__mro__ if issubclass(c, nn.Module) and c is not nn.Module]
    return _loads(module) is not None or any(_offered(c) for c in classes if not c.__module__.startswith("torch."))


def _loads(module: nn.Module) -> type | None:
    """The class from which a module has its way to load or write trained weights.

    ``nn.Embedding.from_pretrained`` makes a layer of any tensor, and says nothing of where it came from.
    """
    for name in ("from_pretrained", "save_pretrained"):
        owner = next((c for c in base_class(module).__mro__ if name in c.__dict__), None)
        if owner is not None and owner.__module__.partition(".")[0] not in (_HUB_MIXIN, "torch"):
            return owner
    return None


def _offered(cls: type) -> bool:
    source = sys.modules.get(cls.__module__)
    if source is None:
        return False
    if str(getattr(source, "__file__", None) or "").startswith(torch.hub.get_dir()):
        return True
    for builder in vars(source).values():
        if inspect.isfunction(builder) and builder.__annotations__.get("return") in (cls, cls.__name__):
            arguments = inspect.signature(builder).parameters
            if any(option in arguments for option in _BUILDER_OPTIONS):
                return True
    return False


def _pretrained_below(module: nn.Module, path: str) -> list[str]:
    """Paths of the outermost pretrained models at or below a module."""
    if path.rpartition(".")[2] == CHILD:
        return []
    own = is_pretrained(module)
    loads = _loads(module)
    written_here = loads is not None and "-packages" not in str(
        getattr(sys.modules.get(loads.__module__), "__file__", "")
    )
    if own and not written_here:
        return [path]
    # The user's own class may load itself, and still be a shell around a library's model.
    inner = [p for n, child in module.named_children() for p in _pretrained_below(child, join(path, canonical(n)))]
    return inner or [path] * own


def bases_of(root: nn.Module) -> tuple[str, ...]:
    """Paths of the models that are adapted where the user names none; ``("",)`` is all of the root.

    These are the outermost pretrained models. One that the user froze as a whole, beside others that are not
    frozen (a teacher), is no base.
    """
    found = _pretrained_below(root, "")
    frozen = frozen_by_user(root)
    able = able_to_train(root) if frozen else ()
    below = {path: names_below(able, [path]) for path in found}
    awake = [path for path in found if not below[path] or below[path] - frozen]
    return tuple(awake or found) or ("",)


def frozen_by_user(root: nn.Module) -> frozenset[str]:
    """Base parameters that could train, but did not before anything was applied."""
    record = record_of(root)
    flags = record.flags if record is not None else {}
    return frozenset(
        [
            name
            for name, parameter in base_parameters_of(root)
            if not flags.get(name, parameter.requires_grad) and can_train(parameter)
        ]
    )


def base_parameters_of(root: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters without those of deltas, each under each of its canonical names."""
    named = named_parameters(root, every_name=True)
    return [(name, p) for name, p in named if CHILD not in name or CHILD not in name.split(".")]


def able_to_train(root: nn.Module) -> list[str]:
    """Names of the base parameters that could train."""
    return [name for name, parameter in base_parameters_of(root) if can_train(parameter)]


# --- copies that the user keeps --------------------------------------------------------------------


@dataclass(frozen=True)
class Twins:
    """Networks that the user froze beside one of the same form that is not frozen.

    Attributes:
        copies: path of one that also holds the same values (a momentum encoder, a mean teacher, a target network, a
            reference model) -> path of what it was copied from.
        others: paths of those that hold other values (a teacher, an average that started elsewhere).
    """

    copies: Mapping[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.copies, *self.others)

    def hold(self, place: str) -> bool:
        """Whether a module lies in one of them."""
        return any(is_below(place, path) for path in self.paths)


def twins_of(root: nn.Module) -> Twins:
    """Find the outermost twins in a model; see :class:`Twins`."""
    frozen = frozen_by_user(root)
    parameters = dict(base_parameters_of(root))
    if not frozen or frozen >= {name for name, p in parameters.items() if can_train(p)}:
        return Twins()
    below = _parameters_below(parameters)
    asleep = {path for path, names in below.items() if path and frozen.issuperset(names)}
    forms = {path: tuple((n[len(path) + 1 :], parameters[n].shape) for n in names) for path, names in below.items()}
    awake: dict[tuple[tuple[str, torch.Size], ...], list[str]] = {}
    for path, form in forms.items():
        if path and path not in asleep and any(len(shape) > 1 for _, shape in form):
            awake.setdefault(form, []).append(path)
    modules = named_modules(root)
    copies, others = {}, []
    for path in sorted(path for path in asleep if path.rpartition(".")[0] not in asleep):
        alike = awake.get(forms[path], ())
        original = next((o for o in alike if _copied(parameters, below[path], below[o])), None)
        if original is not None:
            copies[path] = original
        elif (
            "." not in path
            and len({name.rpartition(".")[0] for name in below[path]}) > 1
            and any("." not in other and type(modules[other]) is type(modules[path]) for other in alike)
        ):  # single layers of one shape, and the layers of a stack, are alike without any such purpose
            others.append(path)
    return Twins(copies, tuple(others))


def _parameters_below(parameters: dict[str, nn.Parameter]) -> dict[str, list[str]]:
    below: dict[str, list[str]] = {}
    for name in parameters:
        parts = name.split(".")
        for end in range(len(parts)):
            below.setdefault(".".join(parts[:end]), []).append(name)
    return below


def _copied(parameters: Mapping[str, nn.Parameter], names: Sequence[str], others: Sequence[str]) -> bool:
    return all(_same(parameters[a], parameters[b]) for a, b in zip(names, others, strict=True))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one is other:
        return False  # a layer that is shared, not copied
    if one.is_meta or other.is_meta:
        return one.is_meta and other.is_meta
    return one.dtype == other.dtype and torch.equal(one, other.to(one.device))


def bases_around(root: nn.Module, bases: Sequence[str], targets: Iterable[Target]) -> tuple[str, ...]:
    """The bases, and around every target in none of them the child of the root that holds it."""
    if tuple(bases) == ("",):
        return ("",)
    places = [target.module for target in targets if target.path or target.role is not None]
    if not any(is_below(place, base) for place in places for base in bases) and places:
        return ("",)
    strays = [place for place in places if not any(is_below(place, base) for base in bases)]
    modules = named_modules(root)
    around = dict.fromkeys(place.partition(".")[0] for place in strays if place in modules)
    return (*bases, *around)
