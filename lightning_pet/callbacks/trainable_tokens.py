"""Trained tokens: rows of the vocabulary that train, and nothing else of it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_pet.arguments import whole
from lightning_pet.callbacks.base import PETCallback
from lightning_pet.errors import ArgumentError, TargetError
from lightning_pet.insertion.low_rank_places import is_called
from lightning_pet.insertion.method import Insertion, suffix_of
from lightning_pet.layers.delta import is_filled_later, options_beside
from lightning_pet.layers.token_rows import Form, TiedRows, TokenRows
from lightning_pet.model.layer_kinds import host_kind, matrix_of, weight_of
from lightning_pet.model.named_roles import named_places
from lightning_pet.model.naming import module_at
from lightning_pet.model.quantised import initialize
from lightning_pet.model.structure import Structure, Target
from lightning_pet.store.strict_json import MAX_ITEMS
from lightning_pet.targets.patterns import settled, value_at
from lightning_pet.targets.targets import resolve_targets, with_readers


class TrainableTokensCallback(PETCallback):
    r"""Train rows of the vocabulary: :math:`E'_t = \delta_t` for tokens t in T, :math:`E'_t = E_t` else.

    For tokens that were added to a model, and for old ones that get a new meaning. All other rows stay as they are,
    exactly. The rows start as they are in the table, so that the model starts as the base. Where an output layer, or
    the table of a second stack, shares the weight, it has the same rows. None of them decays: a decay would pull words
    to zero. The way of HF PEFT's ``trainable_token_indices``; it goes together with every other method.

    Args:
        token_indices: T: rows of the token embedding; or ``{"embed_tokens": [...], "lm_head": [...]}``: rows of the
            tables and output layers that these roles, suffixes, globs or ``"re:…"`` name. An output layer that shares
            no weight is only trained if it is named.
        added_from: in place of these, all rows from this one on: the size of the vocabulary before
            ``resize_token_embeddings``. Of the token embedding, and of an output layer that has a weight of its own.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.base.PETCallback`.

    Raises:
        ArgumentError: if both are given, or an index is negative, no number, or there twice.

    Example:
        >>> import torch
        >>> from lightning_pet import TrainableTokensCallback, apply
        >>> net = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 2))
        >>> apply(net, TrainableTokensCallback({"0": [7, 8]}, modules_to_save=[])).plan().trainable
        8
    """

    method: ClassVar[str] = "trainable_tokens"
    shards = True
    may_change: ClassVar[frozenset[str]] = PETCallback.may_change

    def __init__(
        self,
        token_indices: list[int] | dict[str, list[int]] | None = None,
        added_from: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.token_indices: Any = token_indices
        self.added_from = added_from
        if token_indices is not None and added_from is not None:
            raise ArgumentError("token_indices and added_from both say which rows train: give one of the two.")
        if added_from is not None:
            whole("added_from", added_from, 1, "the number of rows before the resize, e.g. 32000.")
        elif isinstance(token_indices, Mapping):
            self.token_indices = {name: _checked(name, own) for name, own in token_indices.items()}
        elif token_indices is not None:
            self.token_indices = _checked("", token_indices)
        if self.token_indices == {}:
            raise ArgumentError("token_indices names no table, for example {'embed_tokens': [32000]}.")

    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        """Find the tables, and output layers with rows of their own.

        Raises:
            ArgumentError: if nothing says which rows train.
            TargetError: if there is no such table.
        """
        self._check_given()
        patterns = list(self.token_indices) if isinstance(self.token_indices, dict) else ["embedding"]
        found = list(resolve_targets(root, patterns, structure, hosts=_has_rows))
        if self.added_from is not None and (head := _own_head(root, found)) is not None:
            found.append(head)
        places = with_readers(root, found, structure)
        return tuple(p if p.reads is not None else replace(p, reads=_reader(root, p, structure)) for p in places)

    def _check_given(self) -> None:
        if self.token_indices is None and self.added_from is None:
            raise ArgumentError(
                "give token_indices, for example [32000, 32001], or added_from, the size of the vocabulary before it "
                "was resized."
            )

    def insertions(self, root: nn.Module, targets: Sequence[Target]) -> list[Insertion]:
        """Build the rows of each table once; the other modules that hold it get the same ones."""
        self._check_given()
        made: dict[int, TokenRows] = {}
        found: list[Insertion] = []
        for target in (*targets, *_others(root, targets)):
            weight = weight_of(module_at(root, target.module), target.parameter)
            assert weight is not None  # resolve chose it
            if (own := made.get(id(weight))) is None:
                made[id(weight)] = delta = self.build(root, target)
                found.append(Insertion(target, delta, suffix_of(target)))
                continue
            if (asked := self._ids(target, weight)) and tuple(sorted(asked)) != own.ids:
                raise TargetError(
                    f"{target.path} shares its weight with {found[0].target.path}, so that both have the same rows, "
                    "and other token_indices are asked for. Give the same, or name one of the two."
                )
            tied = TiedRows(own, _form(root, target))
            tied.__dict__["host"] = _with_bias(root, target)
            found.append(Insertion(target, tied, suffix_of(target)))
        return found

    def build(self, root: nn.Module, target: Target) -> TokenRows:
        """Build the rows of one table.

        Raises:
            TargetError: if the table does not have them, or they would get no gradient.
        """
        host = module_at(root, target.module)
        weight = weight_of(host, target.parameter)
        assert weight is not None  # resolve chose it
        form, ids = _form(root, target), self._ids(target, weight)
        rows, width = _sizes(host, target.parameter)
        _check_rows(target, ids, rows, self.added_from)
        if weight.is_meta and not is_filled_later():
            raise ArgumentError(
                f"{target.path} is on the meta device, and rows start as they are in it. Load the weights first."
            )
        padding = getattr(host, "padding_idx", None)
        if padding in ids and form == "table" and not _others(root, [target]) and not is_filled_later():
            raise TargetError(
                f"token_indices has {padding}, the padding_idx of {target.path}, for which torch computes no gradient. "
                "Leave it out."
            )
        if getattr(host, "max_norm", None) is not None:
            raise TargetError(f"{target.path}: a table with max_norm changes while it is looked up. Set it to None.")
        delta = TokenRows(ids, width, form=form, scale=_scale(host), padding_idx=padding, **options_beside(weight))
        delta.__dict__["host"] = _with_bias(root, target)
        initialize(delta, host, target.parameter)
        return delta

    def _ids(self, target: Target, weight: Tensor) -> list[int]:
        """Rows that are asked for at a place."""
        if self.added_from is not None:
            return list(range(self.added_from, weight.shape[0]))
        if isinstance(self.token_indices, dict):
            return list(value_at(self.token_indices, target, []))
        return list(self.token_indices)

    def config_at(self, targets: Sequence[Target]) -> dict[str, Any]:
        """Rows by place, where their patterns depend on order or are regular expressions."""
        config = self.config()
        if isinstance(self.token_indices, dict):
            places = [target for target in targets if target.parameter]
            config["token_indices"] = settled(self.token_indices, places)
        return config

    def group_options(self, delta_names: Sequence[str]) -> dict[str, dict[str, float]]:
        """No row decays."""
        return {name: {"weight_decay": 0.0} for name in delta_names}


def _checked(name: str, ids: Any) -> list[int]:
    label = f"token_indices[{name!r}]" if name else "token_indices"
    if isinstance(ids, str) or not hasattr(ids, "__iter__"):
        raise ArgumentError(f"{label}={ids!r}: a list of rows is wanted, for example [32000, 32001].")
    found = list(ids)
    if not found or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in found):
        raise ArgumentError(f"{label}={found[:8]}: at least one row is wanted, each a whole number from 0 on.")
    if len({*found}) != len(found):
        twice = next(i for i in found if found.count(i) > 1)
        raise ArgumentError(f"{label} has {twice} twice; each row can train once.")
    if len(found) > MAX_ITEMS:
        raise ArgumentError(
            f"{label} has {len(found):,} rows, and files list at most {MAX_ITEMS:,}. added_from=… names all from one "
            "on; modules_to_save=['embed_tokens'] trains a whole table."
        )
    return sorted(found)


def _check_rows(target: Target, ids: Sequence[int], rows: int, added_from: int | None) -> None:
    if added_from is not None and not ids:
        raise TargetError(
            f"added_from={added_from}: {target.path} has {rows} rows, so that none was added. Resize the vocabulary "
            "first, model.resize_token_embeddings(len(tokenizer)), before the deltas come in."
        )
    if not ids or max(ids) >= rows:
        raise TargetError(
            f"token_indices has {max(ids, default='no row')}, and {target.path} has {rows} rows. Resize the vocabulary "
            f"first, model.resize_token_embeddings({max(ids, default=rows) + 1}), before the deltas come in."
        )


def _has_rows(module: nn.Module, parameter: str) -> bool:
    """Whether a module has a row per token: a table, or an output layer."""
    return parameter == "weight" and host_kind(module) in ("embedding", "linear", "weight")


def _sizes(host: nn.Module, parameter: str) -> tuple[int, int]:
    """(rows, numbers in each)."""
    outputs, inputs = matrix_of(host, parameter)
    return (inputs, outputs) if host_kind(host, parameter) == "embedding" else (outputs, inputs)


def _form(root: nn.Module, target: Target) -> Form:
    kind = host_kind(module_at(root, target.module), target.parameter)
    if not is_called(root, target) or kind not in ("embedding", "linear"):
        return "weight"
    return "table" if kind == "embedding" else "head"


def _with_bias(root: nn.Module, target: Target) -> nn.Module | None:
    host = module_at(root, target.module)
    return host if getattr(host, "bias", None) is not None else None


def _scale(host: nn.Module) -> Any:
    """What a table multiplies its rows by, in the form that it holds it."""
    return getattr(host, "embed_scale", getattr(host, "scalar_embed_scale", 1.0))


def _others(root: nn.Module, targets: Sequence[Target]) -> list[Target]:
    """All other modules that hold the weights of these places."""
    modules = named_places(root)
    weights = {id(module_at(root, target.module)._parameters.get(target.parameter)) for target in targets}
    given = {target.path for target in targets}
    found = [
        Target(path, name)
        for path, module in modules.items()
        for name, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in weights
    ]
    return [target for target in found if target.path not in given]


def _reader(root: nn.Module, target: Target, structure: Structure) -> str | None:
    """Who reads a table that several modules hold, and is none of them."""
    holders = {target.module, *(other.module for other in _others(root, [target]))}
    read_by = tuple(
        (target.module, target.parameter, reader)
        for path, name, reader in structure.read_by
        if path in holders and name == target.parameter and reader not in holders
    )
    return replace(structure, read_by=read_by).reader(target.module, target.parameter)


def _own_head(root: nn.Module, tables: Sequence[Target]) -> Target | None:
    """The output layer of a model, if it has as many rows as the table and shares no weight with it."""
    getter: Any = getattr(root, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    hosts = [module_at(root, target.module) for target in tables]
    rows = {_sizes(host, "weight")[0] for host in hosts}
    if not isinstance(head, nn.Module) or not _has_rows(head, "weight") or _sizes(head, "weight")[0] not in rows:
        return None
    if any(head._parameters.get("weight") is host._parameters.get("weight") for host in hosts):
        return None
    return next((Target(path, "weight") for path, module in named_places(root).items() if module is head), None)
