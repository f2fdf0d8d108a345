"""What must hold of deltas and their hosts: before anything is inserted, and as long as they are in the model."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_pet.errors import DeadSiteError, PETError, TargetError
from lightning_pet.insertion.method import Insertion
from lightning_pet.layers.delta import Delta
from lightning_pet.model.adaptation import Adaptation, deltas_in, record_of
from lightning_pet.model.layer_kinds import base_class
from lightning_pet.model.named_roles import named_places
from lightning_pet.model.naming import (
    delta_path,
    delta_prefix,
    has_module,
    host_at,
    module_at,
    named_modules,
    tensors_at,
)
from lightning_pet.model.quantised import format_of, is_quantised, is_repacked
from lightning_pet.model.structure import Structure, Target, overlap

# --- before: what was planned can act, side by side on one layer, and at all ----------------------


def check_together(root: nn.Module, insertions: Sequence[Insertion], beside: Collection[str] = ()) -> None:
    """Refuse a delta that rescales the base product of a layer beside others that change what it returns.

    Args:
        root: the adapted root.
        insertions: what is to come beside what is there.
        beside: names of the deltas that it is to act with.

    Raises:
        TargetError: naming the layer.
    """
    coming = [(insertion.target, insertion.delta) for insertion in insertions]
    leaving = {key for insertion in insertions for key in insertion.replaces}
    _check([*_present(root, leaving, beside), *coming])


def check_acting(root: nn.Module, deltas: Collection[str]) -> None:
    """Refuse to let deltas act together that cannot.

    Raises:
        TargetError: naming the layer.
    """
    _check(_present(root, (), deltas))


def _check(places: Sequence[tuple[Target, Delta]]) -> None:
    taken: dict[tuple[str, int], int] = Counter(
        (target.path, row) for target, delta in places for row in delta.replaced
    )
    if twice := next((place for place, count in taken.items() if count > 1), None):
        raise TargetError(
            f"two deltas that are to act together replace row {twice[1]} of {twice[0]}. Let one of them act, or give "
            "them other token_indices."
        )
    if not any(delta.reads_weight for _, delta in places):
        return
    by_host: dict[str, list[tuple[Target, Delta]]] = {}
    for target, delta in places:
        if delta.path in ("activation", "weight"):
            by_host.setdefault(target.module, []).append((target, delta))
    for path, present in by_host.items():
        for index, (target, delta) in enumerate(present):
            others = [other for at, (other, _) in enumerate(present) if at != index]
            if delta.reads_weight and any(_meet(target, other) for other in others):
                raise TargetError(
                    f"{path!r} would have DoRA and another delta on the same outputs, but DoRA rescales the base's own "
                    "product by its weight's own norm. Set use_dora=False, or take the other delta off this layer "
                    "(exclude_modules)."
                )


def check_fires(insertions: Sequence[Insertion], structure: Structure) -> None:
    """Refuse deltas none of which would act in the forward that was looked at; single ones may be for other batches.

    Args:
        insertions: all that is to come.
        structure: as the forward showed it.

    Raises:
        DeadSiteError: naming the places.
    """
    if structure.called is None or not insertions:
        return
    for insertion in insertions:
        target, path = insertion.target, insertion.delta.path
        if path not in ("activation", "weight") or target.module in structure.called:
            return
        if path == "weight" and structure.reader(target.module, target.parameter) is not None:
            return
    shown = ", ".join(dict.fromkeys(insertion.target.path for insertion in insertions[:4]))
    raise DeadSiteError(
        f"none of the {len(insertions)} deltas would act: in the forward that was given, nobody called or read "
        f"{shown}{' …' if len(insertions) > 4 else ''}. Give a forward that runs them, or name other targets."
    )


def _meet(target: Target, other: Target) -> bool:
    return target.rows is None or other.rows is None or overlap(target.rows, other.rows)


def _present(root: nn.Module, leaving: Collection[str], deltas: Collection[str]) -> list[tuple[Target, Delta]]:
    return [
        (target, delta)
        for applied, target, _, delta, _ in deltas_in(root)
        if applied.key not in leaving and applied.delta in deltas
    ]


def lack_of_gradient(root: nn.Module) -> str | None:
    """Why what is before a quantised layer could not train, and what to do; ``None`` if all of them pass a gradient.

    Formats that also quantise activations have no derivative in some libraries: their output does not depend on
    their input as far as autograd can see, and training would go wrong without a word.
    """
    seen: set[tuple[type, str]] = set()
    for path, module in named_places(root).items():
        weight: Any = module._parameters.get("weight")
        if weight is not None and is_repacked(weight):
            return (
                f"{path} is stored as {format_of(weight)}: in that form its product has no gradient, so nothing before "
                "it would train. Load the base again, and evaluate it only with the delta in it."
            )
        flatten = getattr(weight, "__tensor_flatten__", None)
        if flatten is None or not is_quantised(weight) or base_class(module) is not nn.Linear:
            continue
        key = type(weight), str(flatten()[1])
        if key not in seen and not _passes_gradient(module, weight):
            return (
                f"{path} is stored as {format_of(weight)} in a form whose product has no gradient with respect to its "
                "input (activations are quantised too), so nothing before it would train. Use a weight-only format, "
                "such as Int8WeightOnlyConfig or IntxWeightOnlyConfig."
            )
        seen.add(key)
    return None


def _passes_gradient(module: Any, weight: Any) -> bool:
    x = torch.ones(1, module.in_features, dtype=weight.dtype, device=weight.device, requires_grad=True)
    with torch.enable_grad():
        return bool(nn.Linear.forward(module, x).requires_grad)


# --- while they are in: their hosts are those that were planned for -------------------------------

# Vocabularies grow: transformers' ``resize_token_embeddings`` resizes the input embedding in place and puts a new
# output layer in, and users replace embeddings by hand. A delta on them would be lost, or of another size than its
# host.


_RESIZE = "resize_token_embeddings"
# Not shapes of parameters: a sharding engine changes those.
_SIZES = ("num_embeddings", "embedding_dim", "in_features", "out_features", "in_channels", "out_channels")
_ADVICE = "Resize or replace layers before the deltas are inserted (call remove() first, or start from the base again)"


def _sizes_now(root: nn.Module, record: Adaptation) -> dict[str, tuple[Any, ...]]:
    """Declared sizes of the modules that host a delta or train as they are, by path."""
    return sizes_of(root, record.host_paths() | {name.rpartition(".")[0] for name in record.trained_names})


def sizes_of(root: nn.Module, paths: Iterable[str]) -> dict[str, tuple[Any, ...]]:
    """Declared sizes of these modules, as far as they have any."""
    modules = {path: module_at(root, path) for path in paths if has_module(root, path)}
    found = {path: tuple(_size(module, size) for size in _SIZES) for path, module in modules.items()}
    return {path: sizes for path, sizes in found.items() if any(isinstance(size, int) for size in sizes)}


def _size(module: nn.Module, name: str) -> Any:
    # Not getattr at once: a module looks for what it does not have among its parameters, buffers and children.
    own = module.__dict__
    return own[name] if name in own else getattr(module, name, None) if hasattr(type(module), name) else None


def resized(root: nn.Module, record: Adaptation) -> list[str]:
    """Paths of modules whose sizes are no longer those for which the deltas were made."""
    now = _sizes_now(root, record)
    return sorted(path for path, sizes in record.sizes.items() if path in now and now[path] != sizes)


def check_intact(root: nn.Module, record: Adaptation) -> None:
    """Refuse to go on with deltas whose hosts are gone or have other sizes.

    Raises:
        PETError: naming them.
    """
    # A delta may hold other tensors than when it was noted: what it may not be is gone.
    gone: set[str] = set()
    for path, keys in record.keys().items():
        found = host_at(root, path)
        there = found[1]._modules.keys() if found is not None else ()
        gone |= {delta_path(path, key) for key in keys if key not in there}
    lost = sorted(name for name in (record.delta_names if gone else ()) if delta_prefix(name) in gone)
    lost += sorted({*record.trained_names} - tensors_at(root, record.trained_names).keys())
    if lost:
        raise PETError(
            f"modules of {type(root).__name__} that carry a delta, or train, were replaced: {', '.join(lost[:4])} "
            f"{'are' if len(lost) > 1 else 'is'} gone. {_ADVICE}."
        )
    if other := resized(root, record):
        raise PETError(
            f"{', '.join(other[:4])} of {type(root).__name__} had another size when the deltas were inserted, so that "
            f"they do not fit any more. {_ADVICE}."
        )


def refuse_lost(record: Adaptation, verb: str) -> None:
    """Refuse what needs the original values of tensors that never had any in memory.

    Raises:
        PETError: naming one.
    """
    lost = [name for name in record.trained_names if record.originals[name].is_meta]
    if lost:
        raise PETError(
            f"the delta cannot be {verb}: the original values of {lost[0]} were never in memory, because the "
            "model was on the meta device when the delta was inserted. Load the base model again."
        )


def check_restorable(root: nn.Module, record: Adaptation) -> None:
    """Refuse to put original values back into modules that have another size now.

    Raises:
        PETError: naming them.
    """
    trained = {name.rpartition(".")[0] for name in record.trained_names}
    if other := sorted(trained.intersection(resized(root, record))):
        raise PETError(
            f"the original values of {', '.join(other[:4])} do not fit any more: it was resized after the deltas were "
            "inserted. Load the base model again."
        )


def guard(root: nn.Module, record: Adaptation) -> None:
    """Note the sizes, and let models of transformers refuse a new vocabulary that a delta would not fit."""
    record.sizes = _sizes_now(root, record) | record.sizes
    for module in root.modules():
        if callable(getattr(type(module), _RESIZE, None)):
            module.__dict__[_RESIZE] = partial(_resize, root, module)


def unguard(root: nn.Module) -> None:
    """Give the models their own method back."""
    for module in root.modules():
        module.__dict__.pop(_RESIZE, None)


@contextmanager
def resizable(root: nn.Module, allowed: bool) -> Iterator[None]:
    """Within the block a resize goes through: whoever enters it inserts new deltas afterwards."""
    record = record_of(root)
    if record is None or not allowed:
        yield
        return
    record.resizable = True
    try:
        yield
    finally:
        record.resizable = False


def _resize(root: nn.Module, module: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
    record = record_of(root)
    if record is not None and not record.resizable and _changes(module, new_num_tokens, *args, **kwargs):
        tables = [_table(module, name) for name in ("get_input_embeddings", "get_output_embeddings")]
        weights = {id(p) for table in tables if table is not None for p in table.parameters(recurse=False)}
        modules = named_modules(root)
        used = record.host_paths() | {name.rpartition(".")[0] for name in record.trained_names}
        touched = sorted(
            path
            for path in used & modules.keys()
            if any(id(p) in weights for p in modules[path].parameters(recurse=False))
        )
        if touched:
            raise TargetError(
                f"{_RESIZE}({new_num_tokens}): {', '.join(touched[:4])} carries a delta, or trains, and would get "
                f"another size. {_ADVICE}."
            )
    return getattr(type(module), _RESIZE)(module, new_num_tokens, *args, **kwargs)


def _changes(module: Any, size: int | None, pad_to_multiple_of: int | None = None, *_: Any, **__: Any) -> bool:
    """Whether the embedding would get another size."""
    now = getattr(_table(module, "get_input_embeddings"), "num_embeddings", None)
    if now is None or (size is None and pad_to_multiple_of is None):
        return False  # transformers has its own words for this, or nothing to do
    size = now if size is None else size
    if isinstance(pad_to_multiple_of, int) and pad_to_multiple_of > 0:
        size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
    return bool(size != now)


def _table(module: Any, getter: str) -> nn.Module | None:
    try:
        found = getattr(module, getter)()
    except Exception:  # models without one raise all kinds of errors here
        return None
    return found if isinstance(found, nn.Module) else None
