"""Virtual tokens of HF PEFT, in terms of ours: prompt tuning, P-tuning, prefix tuning."""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from lightning_pet.attention.prefix import PrefixSite
from lightning_pet.exchange.folder import CONFIG, Base, Folder, unused
from lightning_pet.exchange.peft_hosts import Read, heads_of, record_of
from lightning_pet.insertion.method import METHODS
from lightning_pet.model.naming import CHILD, join, module_at
from lightning_pet.model.structure import Target
from lightning_pet.store.strict_json import fault

_EMBEDDINGS: Final = "prompt_embeddings"
_PREFIX: Final = "base_model."


def prompt(folder: Folder, base: Base | None) -> Read:
    """Prompt tuning, and P-tuning, of which a folder holds the rows that its network has made."""
    rows, heads, values = _parts(folder)
    base = _needed(folder, base, "where its model takes ids")
    stacks = int(folder.config.get("num_transformer_submodules") or 1)
    length, left = divmod(rows.shape[0], stacks)  # PEFT has rows for the decoder, too, and puts none there
    if left:
        raise fault(str(folder.path), f"found {rows.shape[0]} rows for {stacks} stacks. Copy it again.", "mismatch")
    options: dict[str, Any] = {"length": length}
    method = METHODS["prompt_tuning"](**options)
    targets: tuple[Target, ...] = method.resolve(base.root, base.structure())
    require_pooled_within(str(folder.path), base.root)
    table = next(target.module for target in targets if target.role == "prompt.rows")
    own = rows[:length] / scale_of(module_at(base.root, table))
    name = join(table, CHILD, "prompt_tuning_default_rows", "prompt")
    return Read((record_of("prompt_tuning", options, targets, heads),), {name: own.contiguous(), **values})


def require_pooled_within(where: str, root: nn.Module) -> None:
    """Refuse a prompt where a head takes one position of a text, or the mean of all.

    PEFT hands the virtual tokens to the head as well, this library the real ones alone: BERT pools before that.

    Raises:
        DeltaFileError: if it takes any other position than the last one.
    """
    inner = getattr(root, "base_model", root)
    if inner is root or getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        return
    states: list[Tensor] = []

    def watched(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(found := getattr(output, "last_hidden_state", None), Tensor):
            states.append(found.detach().requires_grad_())
            output.last_hidden_state = states[-1]
        return output

    hook = inner.register_forward_hook(watched)
    try:
        with torch.enable_grad():
            ids = torch.tensor([[3, 4, 5, 6]], device=next(root.parameters()).device)
            logits = getattr(root(input_ids=ids), "logits", None)
    except Exception:  # it takes something else: what a prompt needs is asked elsewhere
        return
    finally:
        hook.remove()
    if not states or not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.requires_grad:
        return
    (gradient,) = torch.autograd.grad(logits.sum(), states[:1], allow_unused=True)
    if gradient is not None and gradient[:, :-1].any():
        raise fault(
            where,
            f"{type(root).__name__} classifies by what is at the first position, or at all: with PEFT that is a "
            "virtual token, here the first real one. Use it with the library that trained it.",
            "mismatch",
        )


def scale_of(table: nn.Module) -> float:
    """PEFT's rows are what a layer gets; ours are multiplied as the table multiplies its own."""
    return float(getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", 1.0)))


def prefix(folder: Folder, base: Base | None) -> Read:
    """Prefix tuning: keys and values of all layers in one row per position.

    PEFT hands them over as a cache, so that the real tokens begin at position l; here they begin at 0. Under rotary
    positions only the distance counts, and keys are turned back by l. Under any other kind it has no equal here.
    """
    rows, heads, values = _parts(folder)
    base = _needed(folder, base, "the attentions of its model")
    length = rows.shape[0]
    back = turn(str(folder.path), base.root, -length)
    options: dict[str, Any] = {"length": length, "projection": False}
    method = METHODS["prefix_tuning"](**options)
    targets: tuple[Target, ...] = method.resolve(base.root, base.structure())
    sites = [PrefixSite.read(target.sizes) for target in targets]
    wanted = sum(site.heads * (site.key_dim + site.value_dim) for site in sites)
    if rows.shape[1] != wanted:
        raise fault(
            str(folder.path),
            f"found {rows.shape[1]} numbers per position, expected {wanted} for the {len(sites)} attentions of this "
            f"{type(base.root).__name__}. Load it into the base that it was trained on.",
            "mismatch",
        )
    tensors, start = {}, 0
    for target, site in zip(targets, sites, strict=True):
        for name, size in (("key", site.key_dim), ("value", site.value_dim)):
            end = start + site.heads * size
            own = rows[:, start:end].reshape(length, site.heads, size).transpose(0, 1)
            own = back(own) if name == "key" else own
            tensors[join(target.module, CHILD, "prefix_tuning_default", name)] = own.contiguous()
            start = end
    return Read((record_of("prefix_tuning", options, targets, heads),), tensors | values)


def turn(where: str, root: nn.Module, by: int) -> Callable[[Tensor], Tensor]:
    """What turns keys on by some positions.

    Raises:
        DeltaFileError: if the model's positions are not rotary ones.
    """
    rotary = next((m for m in root.modules() if type(m).__name__.endswith("RotaryEmbedding")), None)
    if rotary is None:
        raise fault(
            where,
            f"PEFT moves the real tokens of a prefix to the positions behind it, this library does not, and "
            f"{type(root).__name__} has no rotary positions, under which the two can be converted. Use it with the "
            "library that trained it.",
            "mismatch",
        )
    return lambda key: rotated(rotary, key, by)


def rotated(rotary: nn.Module, key: Tensor, by: int) -> Tensor:
    """Keys [heads, length, features], each at a position that is ``by`` further on."""
    position = torch.tensor([[abs(by)]])
    with torch.no_grad():
        cos, sin = rotary(torch.zeros(1, 1, 1), position)
    cos, sin = cos[0, 0].float(), (sin[0, 0] if by >= 0 else -sin[0, 0]).float()
    scaling = float(getattr(rotary, "attention_scaling", 1.0))
    cos, sin = cos / scaling, sin / scaling
    turning, rest = key[..., : cos.shape[0]].float(), key[..., cos.shape[0] :]
    half = turning.shape[-1] // 2
    crossed = torch.cat([-turning[..., half:], turning[..., :half]], -1)
    return torch.cat([(turning * cos + crossed * sin).to(key.dtype), rest], -1)


def _parts(folder: Folder) -> tuple[Tensor, list[Target], dict[str, Tensor]]:
    """The rows, and the heads with their values."""
    tensors = dict(folder.tensors)
    rows = tensors.pop(_EMBEDDINGS, None)
    if rows is None or rows.dim() != 2:
        raise fault(str(folder.path), f"found no matrix {_EMBEDDINGS!r}. Copy the whole folder again.", "mismatch")
    rest = {}
    for key, tensor in tensors.items():
        if not key.startswith(_PREFIX):
            raise unused(folder, [key], "found tensors that belong to no delta and to no module of the base")
        rest[key.removeprefix(_PREFIX)] = tensor
    heads, values = heads_of(folder, rest)
    return rows, heads, values


def _needed(folder: Folder, base: Base | None, what: str) -> Base:
    if base is None:
        raise fault(
            str(folder.path / CONFIG),
            f"a delta of type {folder.config.get('peft_type')} does not say {what}. Read the folder together with its "
            "base.",
            "mismatch",
        )
    return base
