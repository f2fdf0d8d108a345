"""Trained rows of a vocabulary: alone (``TRAINABLE_TOKENS``), or beside a LoRA (``trainable_token_indices``)."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from lightning_pet.exchange.folder import CONFIG, PREFIX, Base, Folder, unused
from lightning_pet.exchange.peft_hosts import Export, Read, heads_of, no_such, path_of, record_of
from lightning_pet.exchange.peft_low_rank import names_of
from lightning_pet.exchange.peft_ties import holders_of, says_tied, table_of
from lightning_pet.model.naming import by_delta, join, named_modules
from lightning_pet.model.structure import Target
from lightning_pet.store.manifest import MethodRecord
from lightning_pet.store.strict_json import fault, shown
from lightning_pet.targets.patterns import exactly

METHOD: Final = "trainable_tokens"
_ROWS: Final = ".trainable_tokens_delta"
_BESIDE: Final = ".token_adapter"
_Rows = dict[str, tuple[Tensor, Tensor]]
"""Ids, and their rows in the same order, by the path of a module."""


def tokens(folder: Folder, base: Base | None) -> Read:
    """A folder of nothing but token rows."""
    named = {}
    for key, tensor in folder.tensors.items():
        if not key.startswith(PREFIX):
            raise unused(folder, [key], f"found tensors whose names do not begin with {PREFIX!r}, as PEFT's do")
        named[key.removeprefix(PREFIX)] = tensor
    rest, found = token_rows(folder, named, base, "token_indices")
    if found is None:
        raise fault(str(folder.path), "found no rows of any token in it. Ask for the whole folder.", "mismatch")
    heads, values = heads_of(folder, rest)
    options = {name: value for name, value in found.methods[0].config.items() if name != "modules_to_save"}
    record = record_of(METHOD, options, found.methods[0].targets, heads)
    return Read((record,), found.tensors | values)


def token_rows(
    folder: Folder, named: Mapping[str, Tensor], base: Base | None, option: str = "trainable_token_indices"
) -> tuple[dict[str, Tensor], Read | None]:
    """Take the token rows out of tensors by their name from the root; ``None``: there are none.

    Raises:
        DeltaFileError: if they contradict the configuration, or tables that are tied have different rows.
    """
    rest = {name: tensor for name, tensor in named.items() if not name.endswith(_ROWS)}
    values = {name.removesuffix(_ROWS).removesuffix(_BESIDE): t for name, t in named.items() if name.endswith(_ROWS)}
    asked = folder.config.get(option)
    if not values and not asked:
        return rest, None
    if not values:
        raise fault(
            str(folder.path), f"{option} is set, and no rows are in it. Copy the whole folder again.", "mismatch"
        )
    rows: _Rows = {path: _sorted(folder, option, path, asked, own) for path, own in values.items()}
    if base is not None:
        rows = _of_base(folder, rows, base.root)
    elif len(rows) > 1:
        raise fault(
            str(folder.path),
            f"found rows of {', '.join(sorted(rows))}, of which only the base can tell whether they are one table. "
            "Read the folder together with its base.",
            "mismatch",
        )
    targets = [Target(path, "weight") for path in rows]
    ids = {exactly(target): rows[target.module][0].tolist() for target in targets}
    options = {"token_indices": next(iter(ids.values())) if len(ids) == 1 else ids}
    tensors: dict[str, Tensor] = {}
    for target in targets:
        place = path_of(METHOD, target)
        tensors |= {join(place, "indices"): rows[target.module][0], join(place, "rows"): rows[target.module][1]}
    return rest, Read((record_of(METHOD, options, targets, ()),), tensors)


def _sorted(folder: Folder, option: str, path: str, asked: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The ids of a module, in ascending order, with their rows."""
    where = str(folder.path / CONFIG)
    if isinstance(asked, Mapping):  # by the ends of names
        own = next((ids for name, ids in asked.items() if f".{path}".endswith(f".{name}")), None)
    else:
        own = asked
    if not isinstance(own, list) or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in own):
        raise fault(where, f"found {option}={shown(asked)}, expected a list of rows for {path}.")
    if len({*own}) != len(own):
        raise fault(
            where, f"{option} names a row of {path} twice: which of its values counts cannot be told.", "mismatch"
        )
    if rows.dim() != 2 or rows.shape[0] != len(own):
        raise fault(
            str(folder.path),
            f"found {tuple(rows.shape)} numbers for {len(own)} tokens of {path}, expected a row for each.",
            "mismatch",
        )
    ids = torch.tensor(own, dtype=torch.long)
    order = ids.argsort()
    return ids[order], rows[order].contiguous()


def _of_base(folder: Folder, rows: _Rows, root: nn.Module) -> _Rows:
    """One entry for each table of a base: PEFT writes what is tied to it, too, or not."""
    modules = named_modules(root)
    kept: _Rows = {}
    for path, own in rows.items():
        if path not in modules:
            raise no_such(folder, path, modules)
        table = table_of(root, modules, holders_of(modules, path))
        if any(not torch.equal(a, b) for a, b in zip(own, rows.get(table, own), strict=True)):
            raise fault(
                str(folder.path),
                f"{path} and {table} share a weight in this {type(root).__name__} and have different rows in it. Untie "
                "them in the base first (tie_word_embeddings=False, and a copy of the weight).",
                "mismatch",
            )
        kept |= {table: own} if table in rows else {path: own}
    return kept


def check_places(where: str, paths: Sequence[str], root: nn.Module) -> None:
    """Refuse rows that PEFT applies to other modules, or otherwise, than a base here.

    Raises:
        DeltaFileError: (``mismatch``) naming the module.
    """
    modules, kind = named_modules(root), type(root).__name__
    for path in (path for path in paths if path in modules):
        holders = holders_of(modules, path)
        table = table_of(root, modules, holders)
        if table not in paths:
            raise fault(
                where,
                f"it has rows of {path} alone, which shares its weight with {table} in this {kind}: here both have the "
                "same. Untie them in the base first (tie_word_embeddings=False, and a copy of the weight).",
                "mismatch",
            )
        _check_heads(where, [modules[holder] for holder in holders], path)
        if len(holders) > 1 and not says_tied(root):
            raise fault(
                where,
                f"{path} shares its weight with others, and the configuration of this {kind} does not say so "
                "(tie_word_embeddings), so that PEFT changes one of them. Untie them in the base first.",
                "mismatch",
            )


def _check_heads(where: str, modules: Sequence[nn.Module], path: str) -> None:
    if any(isinstance(module, nn.Linear) and module.bias is not None for module in modules):
        raise fault(
            where,
            f"an output layer that has the rows of {path} has a bias, which PEFT leaves out of all scores. No delta "
            "here does that. Merge it with the library that trained it.",
            "mismatch",
        )


# --- writing -----------------------------------------------------------------------------------------------------


def write_tokens(export: Export, left: dict[str, Tensor]) -> None:
    """Token rows alone: PEFT has one list of tokens for all tables then."""
    found = _taken(export, export.record, left)
    lists = {tuple(ids) for ids, _ in found.values()}
    if len(lists) > 1:
        raise export.fault("PEFT has one list of tokens for all tables, unless a LoRA is beside them. Merge it.")
    for path, (_, rows) in found.items():
        names = [path] if export.root is None else holders_of(named_modules(export.root), path)
        export.tensors |= {f"{PREFIX}{name}{_ROWS}": rows.clone() for name in names}
    export.config |= {
        "peft_type": "TRAINABLE_TOKENS",
        "token_indices": list(lists.pop()),
        "init_weights": True,
        "target_modules": names_of(export, sorted(found)),
    }


def taken_beside(export: Export, record: MethodRecord, left: dict[str, Tensor]) -> dict[str, tuple[list[int], Tensor]]:
    """Token rows beside another method, taken out of the tensors that are left."""
    return _taken(export, record, left)


def write_beside(export: Export, found: Mapping[str, tuple[list[int], Tensor]]) -> None:
    """Token rows beside a LoRA, which is the one kind that PEFT has them with.

    Raises:
        DeltaFileError: if the other is none, or is on the same table.
    """
    if export.config["peft_type"] != "LORA":
        raise export.fault(
            f"PEFT has trained tokens beside LoRA only, not beside {export.config['peft_type']}. Merge it "
            "(to='transformers')."
        )
    for path, (_, rows) in found.items():
        if any(name.startswith(f"{PREFIX}{path}.") for name in export.tensors):
            raise export.fault(f"PEFT has no other delta on {path} beside trained tokens of it. Merge it.")
        export.tensors[f"{PREFIX}{path}{_BESIDE}{_ROWS}"] = rows
    export.config["trainable_token_indices"] = {path: ids for path, (ids, _) in found.items()}


def _taken(export: Export, record: MethodRecord, left: dict[str, Tensor]) -> dict[str, tuple[list[int], Tensor]]:
    """Ids and rows by the path of the module that PEFT takes for the table."""
    groups, found = by_delta(left), {}
    modules = {} if export.root is None else named_modules(export.root)
    for target in record.targets:
        place = path_of(record.method, target, record.name)
        if place not in groups:
            continue
        ids, rows = left.pop(join(place, "indices")), left.pop(join(place, "rows"))
        path = target.module
        if export.root is not None:
            path = table_of(export.root, modules, holders_of(modules, path))
            check_places(str(export.stored.path), [path], export.root)
        found[path] = ids.tolist(), rows.contiguous()
    return found
