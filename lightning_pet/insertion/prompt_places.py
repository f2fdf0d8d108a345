"""Where virtual tokens go: the stacks of a model that take token ids, and the places around each.

======================  =====================================================================
``prompt.call``         the consumer: innermost module that takes ids and a mask
``prompt.rows``         the token table that it looks ids up in
``prompt.guard``        another table that is indexed by token ids
``prompt.memory``       the decoder that reads the output of an encoder with a prompt
``prompt.generate``     the module whose ``generate`` calls the consumer
======================  =====================================================================
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

from torch import nn

from lightning_pet.errors import ArgumentError, TargetError
from lightning_pet.insertion.method import Insertion
from lightning_pet.insertion.prompt import IDS, PromptCall, PromptGenerate, PromptMemory
from lightning_pet.layers.delta import Delta
from lightning_pet.layers.prompt import IdGuard, VirtualTokens
from lightning_pet.model.layer_kinds import base_class
from lightning_pet.model.naming import is_inside, join, named_modules, named_tensors
from lightning_pet.model.structure import Structure, Target
from lightning_pet.probe.trace import accepts_mask

Where = Literal["encoder", "decoder", "both"]
D = TypeVar("D", bound=Delta)


@dataclass(frozen=True)
class Stack:
    """A part of a model that takes token ids.

    Attributes:
        consumer: path of the innermost module that takes ids.
        table: path of its token table.
        decoder: it is the decoder of an encoder-decoder.
    """

    consumer: str
    table: str
    decoder: bool = False


def prompt_targets(root: nn.Module, structure: Structure, where: Where) -> tuple[Target, ...]:
    """The places of a prompt, stack by stack; each stack starts with its ``prompt.call``.

    Raises:
        TargetError: if the model, or the asked part of it, takes no token ids.
    """
    stacks = _find_stacks(root, structure)
    chosen = _chosen(root, stacks, where)
    modules = named_modules(root)
    targets: list[Target] = []
    for stack in chosen:
        _check_indexed(modules, stack)
        targets.append(Target(stack.consumer, "", "prompt.call", cross=stack.decoder))
        targets.append(Target(stack.table, "weight", "prompt.rows"))
        targets += [Target(path, "weight", "prompt.guard") for path in _other_tables(modules, stack)]
        if not stack.decoder:
            targets += [Target(other.consumer, "", "prompt.memory", cross=True) for other in stacks if other.decoder]
        if (generator := _generator(modules, stack)) is not None and (stack.decoder or not _has_decoder(root)):
            targets.append(Target(generator, "", "prompt.generate", cross=stack.decoder))
    return tuple(targets)


def _find_stacks(root: nn.Module, structure: Structure) -> list[Stack]:
    """The stacks that take token ids, the encoder first.

    Raises:
        TargetError: if there is none.
    """
    modules = named_modules(root)
    table = structure.embedding
    if table is None or not isinstance(modules.get(table), nn.Embedding):
        kind = "" if table is None else f"; its token table is a {type(modules[table]).__name__}, not an nn.Embedding"
        raise TargetError(
            f"{type(root).__name__} takes no token ids that could be prepended{kind}. A prompt is for text; use prefix "
            "tuning, an adapter or LoRA here."
        )
    vocabulary = modules[table].num_embeddings
    found: dict[str, str] = {}
    for path, module in modules.items():
        if isinstance(module, nn.Embedding) and module.num_embeddings == vocabulary:
            consumer = _consumer(modules, path)
            if consumer is not None and (consumer not in found or module.weight is modules[table].weight):
                found.setdefault(consumer, path)
    if structure.consumer is not None and structure.consumer not in found:
        found[structure.consumer] = table
    innermost = {c: t for c, t in found.items() if not any(is_inside(o, c) for o in found if o != c)}
    if _has_decoder(root):
        stacks = [Stack(c, t, _is_decoder(modules[c], c)) for c, t in innermost.items()]
        return sorted(stacks, key=lambda stack: stack.decoder)
    consumer = structure.consumer if structure.consumer is not None else next(iter(innermost), None)
    if consumer is None:
        raise TargetError(
            f"{type(root).__name__}: no module around the token table {table!r} has an argument named "
            f"{' or '.join(map(repr, IDS))}, so there is no place to prepend ids."
        )
    return [Stack(consumer, found.get(consumer, table))]


def _chosen(root: nn.Module, stacks: Sequence[Stack], where: Where) -> list[Stack]:
    kind = type(root).__name__
    if not _has_decoder(root):
        if where == "both":
            raise TargetError(f"where='both': {kind} has one stack, not an encoder and a decoder; use where='encoder'.")
        return list(stacks)
    chosen = [stack for stack in stacks if where == "both" or stack.decoder == (where == "decoder")]
    wanted = {"encoder": 1, "decoder": 1, "both": 2}[where]
    if len(chosen) != wanted:
        other = "decoder" if where == "encoder" else "encoder"
        raise TargetError(
            f"where={where!r}: {kind} has {len(chosen)} such parts that take token ids, expected {wanted}. "
            f"Use where={other!r}, or name the part with module=."
        )
    return chosen


def _has_decoder(root: nn.Module) -> bool:
    return bool(getattr(getattr(root, "config", None), "is_encoder_decoder", False))


def _is_decoder(module: nn.Module, path: str) -> bool:
    return bool(getattr(module, "is_decoder", False)) or "decoder" in path.lower().split(".")


def _consumer(modules: dict[str, nn.Module], table: str) -> str | None:
    """Innermost module around a table that takes ids, with a mask if any module there does."""
    above = [table.rsplit(".", i)[0] for i in range(1, table.count(".") + 1)] + [""]
    taking = [path for path in above if path in modules and set(_argument_names(modules[path])) & set(IDS)]
    taking = [path for path in taking if not isinstance(modules[path], nn.Sequential)]
    named = [path for path in taking if "input_ids" in _argument_names(modules[path])]
    masked = [path for path in named if accepts_mask(modules[path])]
    # An embedding layer takes ids as well. It knows of no mask; where nothing does, the outermost is the model.
    return next(iter([*masked, *reversed(named), *reversed(taking)]), None)


def _other_tables(modules: dict[str, nn.Module], stack: Stack) -> list[str]:
    table = modules[stack.table]
    others: dict[nn.Module, str] = {}
    for path, module in modules.items():
        inside = isinstance(module, nn.Embedding) and module is not table and is_inside(path, stack.consumer)
        if inside and module.num_embeddings == table.num_embeddings:
            others.setdefault(module, path)
    return list(others.values())


def _check_indexed(modules: dict[str, nn.Module], stack: Stack) -> None:
    """Refuse a table of integers with a row per token: it is indexed by ids, and nobody is called for it."""
    vocabulary = cast(nn.Embedding, modules[stack.table]).num_embeddings
    for name, tensor in named_tensors(modules[stack.consumer]):
        if tensor.ndim == 2 and tensor.shape[0] == vocabulary and not tensor.is_floating_point():
            raise TargetError(
                f"{join(stack.consumer, name)} is a table with a row for each of the {vocabulary} token ids, which has "
                "none for virtual tokens. Use prefix tuning, an adapter or LoRA here."
            )


def _generator(modules: dict[str, nn.Module], stack: Stack) -> str | None:
    """Innermost module around the consumer that generates as transformers do."""
    parts = stack.consumer.split(".") if stack.consumer else []
    for length in range(len(parts), -1, -1):
        path = join(*parts[:length])
        module = modules.get(path)
        if hasattr(module, "prepare_inputs_for_generation") and hasattr(module, "generate"):
            return path
    return None


# --- positions ------------------------------------------------------------------------------------


def _position_limit(consumer: nn.Module, config: Any) -> int:
    """Positions of a learned table in the consumer, 0 if it has none."""
    sizes = [
        module.num_embeddings
        - getattr(module, "offset", 0)
        - (0 if module.padding_idx is None else module.padding_idx + 1)
        for path, module in consumer.named_modules()
        if isinstance(module, nn.Embedding) and _is_position_table(path)
    ]
    if not sizes:
        return 0
    declared = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    return min([*sizes, *(value for value in declared if isinstance(value, int) and value > 0)])


def _is_position_table(path: str) -> bool:
    name = path.rpartition(".")[2].lower()
    return ("position" in name or name == "wpe") and "relative" not in path.lower()


def _check_positions(root: nn.Module, consumer: nn.Module, length: int) -> None:
    config = getattr(consumer, "config", getattr(root, "config", None))
    declared = getattr(config, "max_position_embeddings", None)
    limit = _position_limit(consumer, config) or (declared if isinstance(declared, int) and declared > 0 else 0)
    if limit and length >= limit:
        raise ArgumentError(
            f"length={length}: {type(root).__name__} has {limit} positions, so a prompt can have at most {limit - 1}. "
            "Lower length; prefix tuning uses no positions."
        )


def _argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, in order."""
    try:
        return tuple(inspect.signature(base_class(module).forward).parameters)[1:]
    except (TypeError, ValueError):
        return ()


# --- insertions -----------------------------------------------------------------------------------


def prompt_insertions(
    root: nn.Module, targets: Sequence[Target], rows_at: Callable[[Target], VirtualTokens]
) -> list[Insertion]:
    """Build the deltas for these places, stack by stack.

    Args:
        root: the adapted root.
        targets: of :func:`prompt_targets`.
        rows_at: builds the rows for the place of a token table.

    Raises:
        ArgumentError: if the prompt is longer than the model's positions.
    """
    modules = named_modules(root)
    starts = [i for i, target in enumerate(targets) if target.role == "prompt.call"]
    insertions: list[Insertion] = []
    for begin, end in zip(starts, [*starts[1:], len(targets)], strict=True):
        group = targets[begin:end]
        call, table_at = group[0], group[1]
        table: Any = modules[table_at.module]
        consumer = modules[call.module]
        rows = _bound(rows_at(table_at), table)
        _check_positions(root, consumer, rows.length)
        read_on = any(target.role == "prompt.memory" for target in group)
        limit = _position_limit(consumer, getattr(consumer, "config", None))
        wrapped = PromptCall(rows, table, _argument_names(consumer), cuts=not read_on, limit=limit)
        suffix = "decoder" if begin else ""
        for target in group:
            module = modules[target.module]
            delta: Delta
            match target.role:
                case "prompt.call":
                    delta = _bound(wrapped, module)
                case "prompt.rows":
                    delta = rows
                case "prompt.memory":
                    delta = PromptMemory(rows.length, _argument_names(module))
                case "prompt.generate":
                    own = cast(Any, base_class(module)).generate.__qualname__
                    known = not target.cross or own.startswith("GenerationMixin.")
                    delta = _bound(PromptGenerate(wrapped, target.cross, known), module)
                case _:
                    delta = IdGuard(table.num_embeddings)
            part = str(target.role).rpartition(".")[2]
            insertions.append(Insertion(target, delta, f"{part}_{suffix}".strip("_")))
    return insertions


def _bound(delta: D, host: nn.Module) -> D:
    """Let a delta know its host, outside of module registration."""
    delta.__dict__["host"] = host
    return delta
