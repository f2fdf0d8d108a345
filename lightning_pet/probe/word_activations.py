"""Keys and values that words have in a model: the start of a prefix that is made of them."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pet.errors import TargetError
from lightning_pet.model.named_roles import named_places
from lightning_pet.model.undisturbed import undisturbed
from lightning_pet.probe.attention_observer import Observer, Seen
from lightning_pet.probe.trace import Tracer, is_self_describing


def word_activations(model: nn.Module, consumer: str | None, ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Run words through a model and keep the keys and values of every attention.

    Where positions enter by rotation, the words stand at positions −l to −1, so that they are to the real text what
    words in front of it would be. Elsewhere they stand at the model's first positions.

    Args:
        model: the model; paths in the result are relative to it.
        consumer: its part that takes token ids, where the model does not describe its inputs.
        ids: l token ids.

    Returns:
        Owner of an attention → keys (H × l × key_dim) and values (H × l × value_dim).

    Raises:
        TargetError: if the model takes no token ids, has no values yet, or cannot run on these.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise TargetError("a prefix of words needs the weights of the model, and these are on the meta device.")
    runner = next((m for m in model.modules() if is_self_describing(m)), None)
    if runner is None and consumer is not None:
        runner = named_places(model)[consumer]
    row = ids.to(next(model.parameters()).device)[None]
    failure = "it takes none"
    if runner is not None:
        for arguments in _arguments(runner, row):
            try:
                return _first(_observe(model, runner, arguments))
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                failure = f"{type(error).__name__}: {error}"
    raise TargetError(
        f"a prefix of words: {type(model).__name__} could not be run on token ids ({failure}). Use init='random'."
    )


def _arguments(runner: nn.Module, row: Tensor) -> list[dict[str, Any]]:
    known = inspect.signature(runner.forward).parameters
    plain: dict[str, Any] = {"input_ids": row}
    if "use_cache" in known:
        plain["use_cache"] = False
    if "decoder_input_ids" in known:
        plain["decoder_input_ids"] = row
    rotary = any(name.endswith("inv_freq") for name, _ in runner.named_buffers())
    if not rotary or "position_ids" not in known:
        return [plain]
    before = torch.arange(-row.shape[1], 0, device=row.device)[None]
    return [{**plain, "position_ids": before}, plain]


def _observe(model: nn.Module, runner: nn.Module, arguments: dict[str, Any]) -> list[Seen]:
    with undisturbed(model):
        tracer = Tracer(model)
        observer = Observer(tracer, keep=True)
        with tracer.attached(), observer, torch.no_grad():
            runner(**arguments)
    return observer.seen


def _first(seen: list[Seen]) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for one in seen:
        if one.key is not None and one.value is not None:
            found.setdefault(one.owner, (one.key.flatten(0, -3), one.value.flatten(0, -3)))
    return found
