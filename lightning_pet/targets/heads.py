"""Which modules are fresh task heads, to be trained as they are."""

import re
from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import nn

from lightning_pet.errors import TargetError
from lightning_pet.model.layer_kinds import base_class
from lightning_pet.model.naming import (
    CHILD,
    canonical,
    is_below,
    join,
    module_at,
    named_modules,
    named_parameters,
    names_below,
)
from lightning_pet.model.quantised import can_train, is_quantised
from lightning_pet.model.structure import Output, Role, Structure, Target
from lightning_pet.targets.bases import able_to_train, base_parameters_of, frozen_by_user, is_pretrained
from lightning_pet.targets.targets import suggest

# transformers builds these heads from scratch for every task, so a frozen one would stay random.
_FRESH_HEAD_CLASSES = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForImageClassification",
    "ForAudioClassification",
    "ForVideoClassification",
    "ForAudioFrameClassification",
    "ForSemanticSegmentation",
)
HEAD: Role = "head"
_LOADED = "_is_hf_initialized"  # transformers leaves it on each parameter that it found in the file
_HEAD_NAME = re.compile(r"(?:.+_)?(?:classifier|head|heads)|score|fc|qa_outputs|logits_proj")
_MATRICES = 4


def heads_of(
    root: nn.Module, base: str, targets: Sequence[Target], structure: Structure | None = None, in_place: bool = False
) -> tuple[str, ...]:
    """The output layers of a base that train with a method: one of its targets feeds them, and the user froze none.

    Args:
        root: the adapted root.
        base: path of the base.
        targets: the method's places.
        structure: what is known about the model; the outputs of a forward, where one was read.
        in_place: the method trains parameters as they are, so that a target in a head is the head's own.

    Returns:
        Paths from the root. Empty for a base without any target.
    """
    hosts = [target for target in targets if is_below(target.module, base)]
    if not hosts and not in_place:
        return ()
    within = [replace(target, module=_from(base, target.module)) for target in hosts]
    found = [join(base, path) for path in find_heads(module_at(root, base), () if in_place else within)]
    frozen = frozen_by_user(root)
    found = [path for path in found if not _kept_frozen(root, base, path, frozen)]
    if structure is not None and not structure.of_loss:
        more = [path for path in last_layers(root, base, targets, structure, in_place) if path not in found]
        found = [head for head in found if not any(is_below(head, path) for path in more)] + more
    return tuple(found)


def last_layers(
    root: nn.Module, base: str, targets: Sequence[Target], structure: Structure, in_place: bool = False
) -> tuple[str, ...]:
    """The output layers that a forward of a base showed; see :func:`heads_of`.

    Libraries' models are asked instead of read: much of what they end with is pretrained.
    """
    if is_pretrained(module_at(root, base)):
        return ()
    hosts = [target for target in targets if is_below(target.module, base)]
    frozen, found = frozen_by_user(root), dict[str, None]()
    # What ends the last block of an encoder is a part of that block.
    blocks = {target.module for target in structure.targets if target.role != "embedding"}
    blocks |= {path for site in structure.sites for path in site.branch}
    for output in structure.outputs:
        if any(is_below(output.module, path) for path in blocks):
            continue
        if is_below(output.module, base) and (in_place or any(_feeds(target.module, output) for target in hosts)):
            path = _whole(root, base, output.module, () if in_place else hosts)
            # What is quantised came out of a file: it is not new.
            if path is None or any(is_quantised(p) for p in module_at(root, path).parameters()):
                continue
            if not _kept_frozen(root, base, path, frozen):
                found[path] = None
    return tuple(found)


def left_output(root: nn.Module, bases: Sequence[str], targets: Sequence[Target], in_place: bool = False) -> str | None:
    """The layer that ends a model of which no forward could be read, as far as the order of its parts tells.

    That is a guess: such a layer is left as the user trains it, and no optimizer is given it.

    Returns:
        Its path; ``None`` if the model has numbered parts, ends with a target or a larger part, or is no model of the
        user's own.
    """
    children = [(canonical(n), c) for n, c in root.named_children() if n != CHILD and any(True for _ in c.parameters())]
    if tuple(bases) != ("",) or is_pretrained(root) or len(children) < 2 or any(name.isdigit() for name, _ in children):
        return None
    name, last = children[-1]
    before = [child for child, _ in children[:-1]]
    fed = in_place or any(is_below(target.module, child) for target in targets for child in before)
    hosts = () if in_place else targets
    frozen = frozen_by_user(root)
    own = [join(name, n) for n, _ in named_parameters(last)]
    if not fed or not is_small(last) or _is_vocabulary(root, last) or frozen.issuperset(own):
        return None
    return None if any(is_below(target.module, name) for target in hosts) else name


def frozen_outputs(root: nn.Module, bases: Sequence[str], trained: Collection[str]) -> tuple[str, ...]:
    """Modules of the base that look new and stay frozen: output layers that no rule took, and what no file held.

    Args:
        root: the adapted root.
        bases: what is adapted.
        trained: names of the base parameters that train.

    Returns:
        Paths from the root.
    """
    modules = named_modules(root)
    found: list[str] = []
    for base in bases:
        scope = modules[base]
        found += [join(base, path) for path in find_heads(scope, ())]
        if not is_pretrained(scope) and (last := _last_layer(base, scope)) is not None:
            found += [last] if not _is_vocabulary(root, modules[last]) else []
        marked = [hasattr(p, _LOADED) for p in scope.parameters()]
        if any(marked):
            new = [n for n, p in scope.named_parameters() if can_train(p) and not hasattr(p, _LOADED)]
            found += [join(base, canonical(name).rpartition(".")[0]) for name in new]
    names = [name for name, _ in base_parameters_of(root)]
    hosts = {path for host in modules if host.rpartition(".")[2] == CHILD for path in _above(host)}
    moving = hosts | {path for name in trained for path in (name, *_above(name))}
    found += [path for base in bases for path in _beyond_targets(root, base, hosts)]
    asleep = [p for p in dict.fromkeys(found) if p not in moving and any(is_below(name, p) for name in names)]
    return tuple(p for p in asleep if not any(p != other and is_below(p, other) for other in asleep))


def _beyond_targets(root: nn.Module, base: str, hosts: Collection[str]) -> list[str]:
    """Parts of a model of the user's own that come after the last one with a delta: a decoder, an embedding layer.

    And what its LightningModule holds as single parameters (a temperature).
    """
    scope = named_modules(root)[base]
    children = [(join(base, canonical(n)), c) for n, c in scope.named_children() if n != CHILD]
    adapted = [index for index, (path, _) in enumerate(children) if path in hosts]
    if is_pretrained(scope) or not adapted or any(path.rpartition(".")[2].isdigit() for path, _ in children):
        return []
    later = children[adapted[-1] + 1 :]
    for index in adapted:
        path, child = children[index]
        inner = [] if is_pretrained(child) else child.named_children()
        later += [(join(path, n), c) for n, c in inner if _HEAD_NAME.fullmatch(n)]
    found = [path for path, c in later if any(p.dim() > 1 for p in c.parameters()) and not _is_vocabulary(root, c)]
    single = scope.named_parameters(recurse=False) if hasattr(scope, "training_step") else ()
    return [*found, *(join(base, canonical(name)) for name, _ in single)]


def _above(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _last_layer(path: str, module: nn.Module) -> str | None:
    """The projection that was registered last in a model."""
    children = [
        (canonical(n), c) for n, c in module.named_children() if n != CHILD and any(True for _ in c.parameters())
    ]
    if children:
        name, last = children[-1]
        return _last_layer(join(path, name), last)
    return path if path and any(p.dim() > 1 for p in module.parameters()) and is_small(module) else None


def _whole(root: nn.Module, base: str, path: str, hosts: Sequence[Target]) -> str | None:
    """The largest small part around an output layer that holds no target; ``None`` where that is no head."""
    modules = named_modules(root)
    if any(is_below(target.module, path) for target in hosts) or _is_vocabulary(root, modules[path]):
        return None
    while "." in path and (around := path.rpartition(".")[0]) != base:
        if any(is_below(target.module, around) for target in hosts) or not is_small(modules[around]):
            break
        path = around
    return path


def is_small(module: nn.Module) -> bool:
    """No more than a few projections: what people put on top of a model."""
    matrices = [p for p in module.parameters() if p.dim() > 1]
    parts = (nn.Embedding, nn.MultiheadAttention, nn.RNNBase)
    return 0 < len(matrices) <= _MATRICES and not any(isinstance(part, parts) for part in module.modules())


def _is_vocabulary(root: nn.Module, module: nn.Module) -> bool:
    """Whether a layer predicts what an embedding of the model looks up: a language model's own output layer."""
    tables = [part for part in root.modules() if isinstance(part, nn.Embedding)]
    shared = {id(table.weight) for table in tables}
    widths = {table.num_embeddings for table in tables}
    matrices = [p for p in module.parameters() if p.dim() > 1]
    return any(id(p) in shared for p in matrices) or any(matrix.shape[0] in widths for matrix in matrices[-1:])


def _feeds(module: str, output: Output) -> bool:
    return any(is_below(path, module) for path in output.fed_by)


def _from(base: str, path: str) -> str:
    return path.removeprefix(base).removeprefix(".") if base else path


def _kept_frozen(root: nn.Module, base: str, path: str, frozen: frozenset[str]) -> bool:
    """The user froze this head and not the whole base, which many freeze to make it ready for us."""
    names = names_below(able_to_train(root), [base])
    own = names_below(names, [path])
    return own <= frozen and not names - own <= frozen


def find_heads(root: nn.Module, targets: Sequence[Target]) -> tuple[str, ...]:
    """Find task heads that only training can make useful, by what the model says of itself.

    In a transformers model for classification, or one of the user's own class around a pretrained one: its
    children beside the pretrained one without any target. In a model that carries the marks of what was loaded:
    children beside it that were not. Elsewhere: direct children without any target, called as heads are
    called (``head``, ``classifier``, …). A language model's output layer is pretrained, and is never taken for a
    head.

    Returns:
        Paths from the root; empty if there is none.
    """
    hosts = {target.module for target in targets}
    modules = named_modules(root)
    pretrained_outputs = _output_embeddings(root)
    found: list[str] = []
    for path, module in _children_of_models(root):
        if any(is_below(host, path) for host in hosts) or not any(True for _ in module.parameters()):
            continue
        owner = modules[path.rpartition(".")[0]] if "." in path else root
        name = path.rpartition(".")[2]
        if any(id(part) in pretrained_outputs for part in module.modules()):
            continue
        if _HEAD_NAME.fullmatch(name) and not hasattr(owner, "get_output_embeddings"):
            if not _is_vocabulary(root, module):
                found.append(path)
        elif name != getattr(owner, "base_model_prefix", None) and _is_fresh(owner, module):
            found.append(path)
    return tuple(found)


def _is_fresh(owner: nn.Module, child: nn.Module) -> bool:
    """Whether a child beside the pretrained part of a model is new to it."""
    cls = base_class(owner)
    if cls.__name__.endswith(_FRESH_HEAD_CLASSES):
        return True
    if not _knows_its_base(owner):
        return False
    if any(hasattr(p, _LOADED) for p in owner.parameters()):  # those that the file had are marked
        return all(can_train(p) and not hasattr(p, _LOADED) for p in child.parameters())
    return cls.__module__.partition(".")[0] != "transformers"


def _knows_its_base(module: nn.Module) -> bool:
    prefix = getattr(module, "base_model_prefix", "")
    return isinstance(prefix, str) and bool(prefix) and isinstance(getattr(module, prefix, None), nn.Module)


def _output_embeddings(root: nn.Module) -> set[int]:
    found = set()
    for module in root.modules():
        getter = getattr(module, "get_output_embeddings", None)
        try:
            output = getter() if callable(getter) else None
        except Exception:  # models without one raise all kinds of errors here
            output = None
        if isinstance(output, nn.Module):
            found.add(id(output))
    return found


def _children_of_models(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Children of the root, and of any model below it that knows its base or is for classification."""
    pairs = [(canonical(name), child) for name, child in root.named_children()]
    modules = named_modules(root)
    classes = [base_class(module).__name__ for module in modules.values()]
    for (path, module), name in zip(modules.items(), classes, strict=True):
        if path and (name.endswith(_FRESH_HEAD_CLASSES) or _knows_its_base(module)):
            pairs += [(join(path, canonical(name)), child) for name, child in module.named_children()]
    return [(path, child) for path, child in dict(pairs).items() if path.rpartition(".")[2] != CHILD]


def parameters_below(root: nn.Module, paths: Sequence[str], option: str) -> tuple[str, ...]:
    """Names of all base parameters inside the given modules, or of these names (full paths, or unique suffixes).

    Args:
        root: the adapted root.
        paths: of modules, or of single parameters; a suffix such as ``"classifier"`` or ``"logit_scale"`` stands for
            all that end with it.
        option: name of the option that the paths came from, for the error.

    Raises:
        TargetError: if a path names no module with parameters.
    """
    modules = named_modules(root)
    bare = [name for name, _ in named_parameters(root, every_name=True)]
    names: dict[str, None] = {}
    for wanted in paths:
        hits = [p for p in modules if p == wanted or p.endswith(f".{wanted}")]
        below = [join(p, canonical(n)) for p in hits for n, _ in modules[p].named_parameters()]
        below += [name for name in bare if f".{name}".endswith(f".{wanted}")]
        found = [name for name in below if CHILD not in name.split(".")]
        if not found:
            near = suggest(wanted, (*modules, *bare))
            raise TargetError(f"{option}: no module with parameters and no parameter is called {wanted!r}.{near}")
        names |= dict.fromkeys(found)
    return tuple(names)
