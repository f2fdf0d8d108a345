"""Which modules are fresh task heads, to be trained as they are."""

from collections.abc import Sequence

from torch import nn

from lightning_pet.core.insertion import CHILD
from lightning_pet.core.naming import canonical, join, named_modules
from lightning_pet.core.structure import Target
from lightning_pet.core.targets import suggest
from lightning_pet.errors import TargetError

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
_HEAD_NAMES = frozenset(
    {"classifier", "classification_head", "score", "head", "heads", "fc", "qa_outputs", "logits_proj"}
)


def find_heads(root: nn.Module, targets: Sequence[Target]) -> tuple[str, ...]:
    """Find task heads that only training can make useful.

    In a transformers model for classification: its children without any target. Elsewhere: direct
    children without any target, called as heads are called (``head``, ``classifier``, …). A language
    model's output layer is pretrained, and is never taken for a head.

    Returns:
        Paths from the root; empty if there is none.
    """
    hosts = {target.module for target in targets}
    found: list[str] = []
    for path, module in _children_of_models(root):
        if any(f"{host}.".startswith(f"{path}.") for host in hosts) or not any(True for _ in module.parameters()):
            continue
        owner = named_modules(root)[path.rpartition(".")[0]] if "." in path else root
        name = path.rpartition(".")[2]
        if type(owner).__name__.endswith(_FRESH_HEAD_CLASSES):
            if name != getattr(owner, "base_model_prefix", None):
                found.append(path)
        elif name in _HEAD_NAMES and not hasattr(owner, "get_output_embeddings"):
            found.append(path)
    return tuple(found)


def _children_of_models(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Children of the root, and of any classification model below it."""
    pairs = [(canonical(name), child) for name, child in root.named_children()]
    for path, module in named_modules(root).items():
        if path and type(module).__name__.endswith(_FRESH_HEAD_CLASSES):
            pairs += [(join(path, canonical(name)), child) for name, child in module.named_children()]
    return [(path, child) for path, child in pairs if path.rpartition(".")[2] != CHILD]


def parameters_below(root: nn.Module, paths: Sequence[str], option: str) -> tuple[str, ...]:
    """Names of all base parameters inside the given modules (full paths, or unique suffixes).

    Args:
        root: the adapted root.
        paths: module paths; a suffix such as ``"classifier"`` stands for every module that ends with it.
        option: name of the option that the paths came from, for the error.

    Raises:
        TargetError: if a path names no module with parameters.
    """
    modules = named_modules(root)
    names: dict[str, None] = {}
    for wanted in paths:
        hits = [p for p in modules if p == wanted or p.endswith(f".{wanted}")]
        below = [join(p, canonical(n)) for p in hits for n, _ in modules[p].named_parameters()]
        found = [name for name in below if CHILD not in name.split(".")]
        if not found:
            raise TargetError(f"{option}: no module with parameters is called {wanted!r}.{suggest(wanted, modules)}")
        names |= dict.fromkeys(found)
    return tuple(names)
