"""A delta of ours in the terms of HF PEFT: exactly, or not at all."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from lightning_pet.exchange.folder import PREFIX
from lightning_pet.exchange.peft_hosts import WRAPPED, Export, shared_with, usual_heads
from lightning_pet.exchange.peft_in_place import write_ln_tuning
from lightning_pet.exchange.peft_low_rank import (
    PROJECTIONS,
    Layer,
    adalora,
    kind_at,
    lora,
    taken,
    targets_of,
    write_biases,
    write_low_rank,
)
from lightning_pet.exchange.peft_on_weights import write_hira, write_miss, write_shira
from lightning_pet.exchange.peft_products import write_loha, write_lokr
from lightning_pet.exchange.peft_prompts import require_pooled_within, scale_of, turn
from lightning_pet.exchange.peft_rotations import write_hra, write_oft
from lightning_pet.exchange.peft_tokens import METHOD as TOKENS
from lightning_pet.exchange.peft_tokens import taken_beside, write_beside, write_tokens
from lightning_pet.exchange.peft_vera import write_vera
from lightning_pet.layers.rows import spread
from lightning_pet.model.layer_kinds import matrix_of
from lightning_pet.model.naming import CHILD, join, module_at, named_modules
from lightning_pet.model.structure import Target
from lightning_pet.store.reader import Stored
from lightning_pet.store.strict_json import fault

_TASKS: Final[Mapping[str, str]] = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def to_peft(stored: Stored, root: nn.Module | None) -> Export:
    """The same delta as a folder of HF PEFT would hold it.

    Args:
        stored: a delta of one method, with or without heads.
        root: the base that it is for; without it only plain layers can be told.

    Raises:
        DeltaFileError: (``mismatch``) if PEFT has no counterpart, or the base is needed.
    """
    tokens = [record for record in stored.methods if record.method == TOKENS]
    others = [record for record in stored.methods if record.method != TOKENS]
    beside = tokens if len(tokens) == len(others) == 1 else []
    if beside:
        stored = replace(stored, methods=(*others, *tokens))
    if len(stored.methods) != 1 and not beside:
        names = ", ".join(record.method for record in stored.methods)
        raise fault(
            str(stored.path),
            f"found the methods {names}; a folder of PEFT holds one, or LoRA and trained tokens. Merge them, or export "
            "them one by one.",
            "mismatch",
        )
    export = Export(stored, root)
    method = export.record.method
    if method not in _WRITERS:
        raise export.fault(f"PEFT has no counterpart of {method}. {_WAY_OUT}")
    if export.record.config.get("use_gating"):
        raise export.fault(f"PEFT has no gates, and {method} has them (use_gating=True). Keep it in a file of its own.")
    left = dict(stored.tensors)
    rows = taken_beside(export, beside[0], left) if beside else {}
    _WRITERS[method](export, left)
    if rows:
        write_beside(export, rows)
    _heads(export, left)
    if left:
        raise export.fault(f"nothing in PEFT holds {', '.join(sorted(left)[:4])}. Merge it (to='transformers').")
    export.config |= _said_of_the_base(export)
    if method == TOKENS and not export.config["modules_to_save"]:
        del export.config["modules_to_save"]  # PEFT's own class has no such option, and warns
    return export


def _ia3(export: Export, left: dict[str, Tensor]) -> None:
    inner, every = [], []
    vectors: dict[str, Tensor] = {}
    for target, parts in taken(export, left):
        if parts.keys() != {"scale"} or target.parameter != "weight":
            raise export.fault(f"{target.path} is read without a call of its layer, which PEFT cannot rescale.")
        scale, path = parts["scale"], target.module
        reads = target.role == "ffn.down"
        if target.rows is not None:
            host = export.needed(path, "has several roles in one weight")
            scale = spread(scale, target.rows, matrix_of(host, target.parameter)[0], 1.0, -1)
        if path in vectors:
            scale = scale * vectors[path]
        vectors[path] = scale
        if path not in every:
            every.append(path)
            inner += [path] if reads else []
    for path, scale in vectors.items():
        module = export.needed(path, "may be a convolution") if _unsure(export, path) else export.module(path)
        if isinstance(module, nn.Conv1d):
            raise export.fault(f"{path}: PEFT has no (IA)³ on a Conv1d. Merge it (to='transformers').")
        shape: tuple[int, ...] = (1, -1) if path in inner else (-1, 1)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            shape = (1, -1, *(1,) * len(module.kernel_size))
        export.tensors[f"{PREFIX}{path}.ia3_l"] = scale.reshape(shape).contiguous()
    layers = [target for target in export.record.targets if target.module in vectors]
    targets = targets_of(export, sorted(every))
    # PEFT refuses one that is no target by the same words
    targets["target_modules"] = sorted({*targets["target_modules"], *inner})
    export.config |= {
        "peft_type": "IA3",
        "feedforward_modules": sorted(inner),
        "init_ia3_weights": True,
        "fan_in_fan_out": all(kind_at(export, target) == "conv1d_hf" for target in layers),
        **targets,
    }


def _unsure(export: Export, path: str) -> bool:
    return all(t.role not in PROJECTIONS for t in export.record.targets if t.module == path)


def _bitfit(export: Export, left: dict[str, Tensor]) -> None:
    """Biases in place, carried by a LoRA that does nothing."""
    if any(".pet." in name for name in left):
        raise export.fault("biases that the base does not have (add_missing) have no place in PEFT. Merge it.")
    places = [target for target in export.record.targets if target.role != "head"]
    # Not one that trains as a whole, and rather none inside of an attention, which PEFT wraps as one.
    linear = [
        target.module
        for target in places
        if isinstance(export.module(target.module), nn.Linear) and join(target.module, "weight") not in left
    ]
    inside = [isinstance(export.module(path.rpartition(".")[0]), nn.MultiheadAttention) for path in linear]
    host = min(zip(inside, range(len(linear)), linear, strict=True), default=(False, 0, None))[2]
    if host is None:
        raise export.fault("a linear layer of the base has to carry the biases: give the base, base=….")
    layer = export.needed(host, "carries the biases")
    outputs, inputs = matrix_of(layer)
    like = next(iter(left.values()))
    zero = Layer(Target(host), [like.new_zeros(1, inputs)], [like.new_zeros(outputs, 1)])
    write_low_rank(export, [zero], False, bias="all")
    write_biases(export, left, [target.path for target in places])


def _prompt(export: Export, left: dict[str, Tensor]) -> None:
    names = [name for name in left if ".pet." in f".{name}"]
    rows = [name for name in names if name.endswith(".prompt")]
    if len(rows) != 1 or len(names) != 1 or export.record.config.get("where", "encoder") == "both":
        raise export.fault("PEFT has one prompt, in the encoder or only stack. Merge is not possible; train it so.")
    table = rows[0].partition(".pet.")[0]
    if export.root is not None:
        require_pooled_within(str(export.stored.path), export.root)
    own = left.pop(rows[0]) * scale_of(export.needed(table, "may multiply its rows"))
    export.tensors["prompt_embeddings"] = own.contiguous()
    export.config |= {"peft_type": "PROMPT_TUNING", **_virtual(export, own.shape[0], own.shape[1], 1)}


def _prefix(export: Export, left: dict[str, Tensor]) -> None:
    places = [target for target in export.record.targets if target.role == "attention.core"]
    if any(target.cross for target in places) or export.root is None:
        raise export.fault("a prefix needs its base to be written, base=…, and PEFT has none in cross-attention.")
    columns = []
    for target in places:
        base = export.path(target)
        key, value = left.pop(join(base, "key")), left.pop(join(base, "value"))
        length, heads = key.shape[1], key.shape[0]
        key = turn(str(export.stored.path), export.root, length)(key)
        columns += [own.transpose(0, 1).reshape(length, -1) for own in (key, value)]
    for name in [name for name in left if ".pet." in f".{name}"]:  # of the network that made them
        del left[name]
    own = torch.cat(columns, 1)
    export.tensors["prompt_embeddings"] = own.contiguous()
    width = own.shape[1] // (2 * len(places))
    export.config |= {
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        **_virtual(export, length, width, heads),
        "num_layers": len(places),
    }


def _virtual(export: Export, length: int, width: int, heads: int) -> dict[str, Any]:
    layers = getattr(getattr(export.root, "config", None), "num_hidden_layers", 1)
    return {
        "num_virtual_tokens": length,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": heads,
        "num_layers": int(layers),
    }


def _heads(export: Export, left: dict[str, Tensor]) -> None:
    """Modules that trained as they are, under the names by which PEFT finds them and nothing else."""
    virtual = "prompt_embeddings" in export.tensors
    named: dict[str, None] = {}
    for name in [name for name in left if CHILD not in name.split(".")]:
        if path := _head_around(export, name):
            named[path] = None
            export.tensors[f"{'base_model.' if virtual else PREFIX}{name}"] = left.pop(name)
    paths = [] if export.root is None else [path for path in named_modules(export.root) if path]
    for path in named:
        if others := [other for other in paths if other.endswith(path) and other not in named and CHILD not in other]:
            raise export.fault(f"PEFT would take {others[0]} for the trained {path}, too. Merge it.")
        if export.root is not None and (other := shared_with(export.root, path)):
            raise export.fault(
                f"{other} shares a weight with the trained {path}; PEFT would train a copy and leave {other} as it is "
                "in the base. Merge it (to='transformers')."
            )
    for path in named if export.root is not None else ():
        _complete(export, path, "base_model." if virtual else PREFIX)
    export.config["modules_to_save"] = [*named] or None


def _complete(export: Export, path: str, prefix: str) -> None:
    """PEFT takes a module as a whole: what of it has not trained has the base's values."""
    for name, value in module_at(export.needed("", "has it"), path).state_dict().items():
        if CHILD in name.split("."):
            raise export.fault(f"{join(path, name)} is in the trained {path}, where PEFT has no delta. Merge it.")
        export.tensors.setdefault(f"{prefix}{path}.{name}", value.detach().cpu().clone().contiguous())


def _head_around(export: Export, name: str) -> str:
    """The module that a tensor trained with: a head, one that the user named, or the one that it is in."""
    owners = [name.rsplit(".", cut)[0] for cut in range(name.count("."), 0, -1)]
    heads = {target.module for target in export.record.targets if target.role == "head"}
    saved = export.record.config.get("modules_to_save") or ()
    named = [path for path in owners if path in heads or any(f".{path}".endswith(f".{own}") for own in saved)]
    return (named or owners[-1:] or [""])[0]


def _said_of_the_base(export: Export) -> dict[str, Any]:
    root, config = export.root, {}
    name = getattr(getattr(root, "config", None), "_name_or_path", "") if root is not None else ""
    hub = isinstance(name, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None  # no path of somebody's disk
    config["base_model_name_or_path"] = name if hub else ""
    kind = "" if root is None else type(root).__name__
    task = next((task for ending, task in _TASKS.items() if kind.endswith(ending)), None)
    if getattr(root, "main_input_name", "input_ids") != "input_ids":
        task = None  # what PEFT makes for a task hands over ids, which speech and images have none of
    task = task if _has_its_heads(export, task) else None
    config["task_type"] = task
    if task is None and root is not None:
        config["auto_mapping"] = {"base_model_class": kind, "parent_library": type(root).__module__}
    return {**config, "inference_mode": True}


def _has_its_heads(export: Export, task: str | None) -> bool:
    """Whether a folder holds the heads that PEFT looks for when it is told the task.

    A folder of virtual tokens cannot do without the task: it gets the base's values.
    """
    paths = [path for path in named_modules(export.root) if path] if export.root is not None else []
    heads = [path for path in paths if path.endswith(usual_heads(task) or ("\0",)) and CHILD not in path.split(".")]
    heads = [path for path in heads if not any(path.startswith(f"{other}.") for other in heads)]
    absent = [path for path in heads if path not in (export.config["modules_to_save"] or ())]
    if not absent or "prompt_embeddings" not in export.tensors:
        return not absent
    for path in absent:
        _complete(export, path, "base_model.")
    export.config["modules_to_save"] = [*(export.config["modules_to_save"] or ()), *absent]
    return True


_WRITERS: Final[Mapping[str, Callable[[Export, dict[str, Tensor]], None]]] = {
    "lora": lora,
    "adalora": adalora,
    "ia3": _ia3,
    "hira": write_hira,
    "miss": write_miss,
    "shira": write_shira,
    "oft": write_oft,
    "hra": write_hra,
    "bitfit": _bitfit,
    "loha": write_loha,
    "lokr": write_lokr,
    "prompt_tuning": _prompt,
    "prefix_tuning": _prefix,
    "ln_tuning": write_ln_tuning,
    TOKENS: write_tokens,
    "vera": write_vera,
}


# --- for servers ---------------------------------------------------------------------------------------------

_SERVED_HEADS: Final = ("classifier", "score")


def for_server(export: Export, server: str) -> None:
    """Check that a server reads all of a folder, which would be silent about some of what it does not.

    Raises:
        DeltaFileError: (``mismatch``) naming what it does not read, and the way out.
    """
    config = export.config
    if config["peft_type"] != "LORA":
        raise export.fault(f"{server} reads LoRA only, not {config['peft_type']}. {_WAY_OUT}")
    for option in ("use_dora", "lora_bias"):
        if config[option]:
            raise export.fault(f"{server} does not read {option}. {_WAY_OUT}")
    if config["bias"] != "none":
        raise export.fault(f"{server} does not read biases. {_WAY_OUT}")
    if config.get("trainable_token_indices"):
        raise export.fault(f"{server} does not read trained tokens. {_WAY_OUT}")
    if config.get("target_parameters"):
        raise export.fault(f"{server} is not known to read deltas on stacks of experts. {_WAY_OUT}")
    heads = [path for path in config.get("modules_to_save") or () if server != "vllm" or path not in _SERVED_HEADS]
    if heads:
        raise export.fault(f"{server} does not read the trained {heads[0]}. {_WAY_OUT}")
    odd = [name for name in export.tensors if WRAPPED in name]
    if odd:
        raise export.fault(f"{server} does not read {odd[0]}. {_WAY_OUT}")
    tied = bool(getattr(getattr(export.root, "config", None), "tie_word_embeddings", False))
    if server == "llama.cpp" and tied and any(".lm_head." in name for name in export.tensors):
        raise export.fault(f"llama.cpp does not read a delta on an output layer that is tied. {_WAY_OUT}")


_WAY_OUT: Final = "If only weights change, merge it (to='transformers') or make it a LoRA (to='lora'); or keep it."
