"""Reading a folder of HF PEFT: its kind of delta decides how, and every option that changes numbers is known."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from lightning_pet.errors import ArgumentError, DeltaFileError, TargetError
from lightning_pet.exchange import (
    peft_converted,
    peft_in_place,
    peft_layers,
    peft_on_weights,
    peft_products,
    peft_prompts,
    peft_rotations,
    peft_tokens,
    peft_vera,
)
from lightning_pet.exchange.folder import CONFIG, Base, Folder
from lightning_pet.exchange.peft_hosts import Read, shared_with, without_copies
from lightning_pet.exchange.peft_refused import way_out
from lightning_pet.exchange.peft_ties import OPTION, is_kept_tied, kept_tied
from lightning_pet.insertion.method import METHODS
from lightning_pet.model.naming import CHILD, is_below, named_modules, named_parameters
from lightning_pet.store.manifest import MethodRecord
from lightning_pet.store.reader import Stored
from lightning_pet.store.strict_json import fault, shown


def _options(names: str) -> frozenset[str]:
    return frozenset(names.split())


_COMMON: Final = _options(
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode modules_to_save "
    "target_modules exclude_modules layers_to_transform layers_pattern fan_in_fan_out init_weights runtime_config "
    "ensure_weight_tying"
)
_LOW_RANK: Final = _options(
    "r lora_alpha lora_dropout bias use_rslora use_dora rank_pattern alpha_pattern lora_bias init_lora_weights "
    "target_parameters loftq_config eva_config corda_config lora_ga_config megatron_core qalora_group_size "
    "trainable_token_indices"
)
_ADAPTIVE: Final = _options("init_r target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step")
_VIRTUAL: Final = _options(
    "num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers num_frozen_layers"
)
_PRODUCTS: Final = _options("r alpha rank_pattern alpha_pattern rank_dropout module_dropout use_effective_conv2d")
_KNOWN: Final[Mapping[str, frozenset[str]]] = {
    "LORA": _LOW_RANK,
    "ADALORA": _LOW_RANK | _ADAPTIVE,
    "IA3": _options("feedforward_modules init_ia3_weights"),
    "HIRA": _options("r hira_dropout rank_pattern"),
    "MISS": _options("r miss_dropout mini_r"),
    "SHIRA": _options("r mask_type random_seed"),
    "LOHA": _PRODUCTS,
    "LOKR": _PRODUCTS | _options("decompose_both decompose_factor rank_dropout_scale"),
    "OFT": _options("module_dropout r oft_block_size use_cayley_neumann num_cayley_neumann_terms block_share coft eps"),
    "HRA": _options("r apply_GS"),
    "BOFT": _options("boft_block_size boft_block_num boft_n_butterfly_factor boft_dropout"),
    "DELORA": _options("r delora_lambda module_dropout rank_pattern lambda_pattern"),
    "GRALORA": _options("r hybrid_r alpha gralora_dropout gralora_k"),
    "VBLORA": _options(
        "r num_vectors vector_length topk save_only_topk_weights vblora_dropout init_vector_bank_bound init_logits_std"
    ),
    "TINYLORA": _options("r u weight_tying projection_seed save_projection init_v_bound tinylora_dropout"),
    "PROMPT_TUNING": _VIRTUAL
    | _options("prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs"),
    "P_TUNING": _VIRTUAL
    | _options("encoder_reparameterization_type encoder_hidden_size encoder_num_layers encoder_dropout"),
    "PREFIX_TUNING": _VIRTUAL | _options("encoder_hidden_size prefix_projection"),
    "LN_TUNING": frozenset(),
    "TRAINABLE_TOKENS": _options("token_indices"),
    "VERA": _options("r projection_prng_key save_projection vera_dropout d_initial bias"),
}
_FROM: Final = "HF PEFT"
_HARMLESS: Final[Mapping[str, tuple[Any, ...]]] = {
    "bias": ("none",),
    "megatron_core": ("megatron.core",),
    "qalora_group_size": (16,),
}
"""Values of options that ask for nothing."""
_READERS: Final[Mapping[str, Callable[[Folder, Base | None], Read]]] = {
    "LORA": peft_layers.lora,
    "ADALORA": peft_layers.adalora,
    "IA3": peft_layers.ia3,
    "HIRA": peft_on_weights.read_hira,
    "MISS": peft_on_weights.read_miss,
    "SHIRA": peft_on_weights.read_shira,
    "LOHA": peft_products.loha,
    "LOKR": peft_products.lokr,
    "OFT": peft_rotations.oft,
    "HRA": peft_rotations.hra,
    "BOFT": peft_rotations.boft,
    "DELORA": peft_converted.delora,
    "GRALORA": peft_converted.gralora,
    "VBLORA": peft_converted.vblora,
    "TINYLORA": peft_converted.tinylora,
    "PROMPT_TUNING": peft_prompts.prompt,
    "P_TUNING": peft_prompts.prompt,
    "PREFIX_TUNING": peft_prompts.prefix,
    "LN_TUNING": peft_in_place.ln_tuning,
    "TRAINABLE_TOKENS": peft_tokens.tokens,
    "VERA": peft_vera.read_vera,
}


def read_peft(folder: Folder, base: Base | None) -> Stored:
    """A folder of HF PEFT as what one of our files would hold.

    Args:
        folder: as it was read.
        base: the model that it is for; ``None``: without one, where its names tell enough.

    Raises:
        DeltaFileError: if it is of a type that has no counterpart here, an option changes its numbers in a way that
            is not known, a tensor has no place, or a base is needed.
    """
    kind = folder.config["peft_type"]
    if not isinstance(kind, str) or kind not in _READERS:
        raise fault(
            str(folder.path / CONFIG),
            f"found the peft_type {shown(kind)}; those that have a counterpart here are {', '.join(sorted(_READERS))}. "
            + way_out(str(kind)),
            "version",
        )
    _check_options(folder, kind)
    _check_types(folder)
    if base is not None:
        _check_saved(folder, base.root)
    folder = kept_tied(folder, base)
    read = _READERS[kind](folder if base is None else without_copies(folder, base.root), base)
    stored = Stored(folder.path, read.methods, read.tensors, None, notes=_notes(folder))
    return stored if base is None else settled(stored, base.root)


_BOOLS: Final = _options(
    "use_rslora use_dora lora_bias fan_in_fan_out prefix_projection inference_mode use_effective_conv2d decompose_both "
    "rank_dropout_scale save_projection"
)
_WHOLE: Final = _options("r mini_r init_r target_r num_virtual_tokens num_transformer_submodules")
_NUMBERS: Final = _options(
    "lora_alpha alpha lora_dropout hira_dropout miss_dropout rank_dropout module_dropout beta1 beta2 orth_reg_weight "
    "vera_dropout d_initial"
)
_LISTS: Final = _options("modules_to_save target_parameters")
_MAPPINGS: Final = _options("rank_pattern alpha_pattern")


def _check_types(folder: Folder) -> None:
    """Every option that is read has the type that PEFT gives it.

    Raises:
        DeltaFileError: (``schema``) naming the first that has not.
    """
    least = 0 if folder.config["peft_type"] == "OFT" else 1  # where r = 0 says that blocks have a size instead
    for option, value in folder.config.items():
        wanted = ""
        if value is None:
            continue
        if option in _BOOLS and not isinstance(value, bool):
            wanted = "true or false"
        elif option in _WHOLE and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            wanted = "a positive whole number"
        elif option in _NUMBERS and not _is_number(value):
            wanted = "a number"
        elif option in _LISTS and not (isinstance(value, list) and all(isinstance(v, str) and v for v in value)):
            wanted = "a list of names"
        elif option in _MAPPINGS and not (isinstance(value, Mapping) and all(map(_is_plain, value.values()))):
            wanted = "a number for each name"
        elif option == "bias" and value not in ("none", "all", "lora_only", "vera_only"):
            wanted = "none, all or lora_only"
        if wanted:
            raise fault(str(folder.path / CONFIG), f"found {option}={shown(value)}, expected {wanted}.")


def _check_saved(folder: Folder, root: nn.Module) -> None:
    """What a folder says that it holds of the base's modules is in it: with the base's own instead, numbers are wrong.

    Raises:
        DeltaFileError: (``mismatch``) naming a module of ``modules_to_save`` without a tensor.
    """
    for name in () if folder.config.get(OPTION) else folder.config.get("modules_to_save") or ():
        if any(f"{name}." in key for key in folder.tensors):  # PEFT goes by the end of a path, too
            continue
        for path, module in named_modules(root).items():
            if f".{path}".endswith(f".{name}") and any(True for _ in module.parameters()):
                raise fault(
                    str(folder.path),
                    f"modules_to_save names {name!r}, which is {path} of this {type(root).__name__}, and found no "
                    f"tensor of it. Copy the whole folder again, or take the name out of {CONFIG} if the base's own is "
                    "meant.",
                    "mismatch",
                )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_plain(value: object) -> bool:
    """A number; of AdaLoRA, the triplets that are kept."""
    return _is_number(value) or (isinstance(value, list) and all(isinstance(kept, bool) for kept in value))


def _check_options(folder: Folder, kind: str) -> None:
    known = _COMMON | _KNOWN[kind]
    for option, value in folder.config.items():
        asked = bool(value) and value not in _HARMLESS.get(option, ())
        if asked and option not in known:
            raise _unknown(folder, option, value)


def _unknown(folder: Folder, option: str, value: object) -> DeltaFileError:
    return fault(
        str(folder.path / CONFIG),
        f"{option}={shown(value)} changes what the delta computes, and has no counterpart here. Merge it with PEFT, or "
        "train it without this option.",
        "mismatch",
    )


def settled(stored: Stored, root: nn.Module) -> Stored:
    """What was read of a folder of PEFT, with what only the base can tell: which of its parameters are one.

    Args:
        stored: of a folder, or of a file that :func:`~lightning_pet.import_delta` has made without a base, under the
            names of this model. Anything else is returned as it is.
        root: the adapted root.

    Raises:
        DeltaFileError: if a module was trained as a copy that is tied here.
    """
    if stored.base is not None or stored.notes.get("imported_from") != _FROM:
        return stored
    _check_ties(stored, root)
    for record in stored.methods:
        if record.method == peft_tokens.METHOD:
            peft_tokens.check_places(
                str(stored.path), [target.module for target in record.targets if target.role != "head"], root
            )
    tensors = _once(stored, root)
    methods = tuple(_with_biases(record, tensors, root) for record in stored.methods)
    return replace(stored, methods=methods, tensors=tensors)


def _once(stored: Stored, root: nn.Module) -> dict[str, Tensor]:
    """The tensors without further names of one parameter (PEFT writes a tied bias under each)."""
    first: dict[int, str] = {}
    tensors = dict(stored.tensors)
    for name, parameter in named_parameters(root, every_name=True):
        if name not in tensors:
            continue
        other = first.setdefault(id(parameter), name)
        if other != name:
            if not torch.equal(tensors[other], tensors[name]):
                raise fault(
                    str(stored.path),
                    f"found other values for {name} than for {other}, which are one parameter of this "
                    f"{type(root).__name__}. Untie them in the base, or train them again as one.",
                    "mismatch",
                )
            del tensors[name]
    return tensors


def _with_biases(record: MethodRecord, tensors: Mapping[str, Tensor], root: nn.Module) -> MethodRecord:
    """Biases by their names, where PEFT's option of that name means others than ours does (a bias of an attention)."""
    if record.config.get("bias", "none") == "none" or record.method != "lora":
        return record
    there = [name for name in tensors if CHILD not in name.split(".")]
    heads = [target.module for target in record.targets if target.role == "head"]
    plain = {"bias": "none"}
    try:
        ours = {*METHODS["lora"](**record.config).trained(root, record.targets)}
    except TargetError:  # there is none, which PEFT does not mind
        return replace(record, config={**record.config, **plain})
    except (ArgumentError, TypeError):  # of a file that is refused for it
        return record
    if ours == {*there}:
        return record
    own = [name for name in there if not any(is_below(name, path) for path in heads)]
    return replace(record, config={**record.config, **plain, "modules_to_save": [*heads, *own]})


def _check_ties(stored: Stored, root: nn.Module) -> None:
    """PEFT copies the modules that it saves: what was tied to one goes on with the base's values."""
    kept = OPTION in stored.notes
    for target in (target for record in stored.methods for target in record.targets if target.role == "head"):
        if (other := shared_with(root, target.module)) and not (kept and is_kept_tied(root, target.module)):
            raise fault(
                str(stored.path),
                f"modules_to_save has trained {target.module}, of which {other} shares a weight in this "
                f"{type(root).__name__}; PEFT has trained a copy and left {other} as it was. Untie them in the base "
                "(tie_word_embeddings=False, and a copy of the weight), or train it with a delta on the layer instead.",
                "mismatch",
            )


def _notes(folder: Folder) -> dict[str, str]:
    """Where it comes from, for people."""
    told = {"imported_from": _FROM} | ({OPTION: "true"} if folder.config.get(OPTION) else {})
    for name, option in (("base_model", "base_model_name_or_path"), ("revision", "revision")):
        if isinstance(value := folder.config.get(option), str) and value:
            told[name] = value[:512]
    return told
