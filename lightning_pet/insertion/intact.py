"""Whether the modules that deltas sit on, and those that train, are still those that were planned for.

Vocabularies grow: transformers' ``resize_token_embeddings`` resizes the input embedding in place and puts a new output
layer in, and users replace embeddings by hand. A delta on them would be lost, or of another size than its host.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from lightning_pet.errors import PETError, TargetError
from lightning_pet.model.adaptation import Adaptation, record_of
from lightning_pet.model.naming import delta_prefix, has_module, module_at, named_modules, tensors_at

_RESIZE = "resize_token_embeddings"
# Not shapes of parameters: a sharding engine changes those.
_SIZES = ("num_embeddings", "embedding_dim", "in_features", "out_features", "in_channels", "out_channels")
_ADVICE = "Resize or replace layers before the deltas are inserted (call remove() first, or start from the base again)"


def sizes_now(root: nn.Module, record: Adaptation) -> dict[str, tuple[Any, ...]]:
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
    now = sizes_now(root, record)
    return sorted(path for path, sizes in record.sizes.items() if path in now and now[path] != sizes)


def check_intact(root: nn.Module, record: Adaptation) -> None:
    """Refuse to go on with deltas whose hosts are gone or have other sizes.

    Raises:
        PETError: naming them.
    """
    # A delta may hold other tensors than when it was noted: what it may not be is gone.
    there = {inserted.path for inserted in record.deltas(root, pass_over_gone=True)}
    gone = {path for applied in record.applied for path in applied.paths} - there
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
    record.sizes = sizes_now(root, record) | record.sizes
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
