"""Checks of what a constructor is given, said by the option's name: type, range, and what other libraries call it."""

import difflib
import inspect
import math
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from numbers import Real
from os import PathLike
from types import NoneType, UnionType
from typing import Any, Final, NoReturn, TypeGuard, get_args

from lightning_pet.errors import ArgumentError

_KINDS: Final = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
_LARGEST: Final = sys.float_info.max


def checked(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor of a callback, which refuses switches and numbers of another type.

    Python takes any text for true (``use_dora="no"``), and what it says of text beside a number names no option.

    Args:
        init: an ``__init__`` with annotated arguments.

    Returns:
        The same, with the same signature.
    """
    signature = inspect.signature(init)

    @wraps(init)
    def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind_partial(self, *args, **kwargs).arguments
        except TypeError:  # too many arguments: Python says so itself
            given = {}
        for option, value in given.items():
            kind = _plain(signature.parameters[option].annotation, value)
            if kind in _KINDS and not _fits(value, kind):
                raise ArgumentError(
                    f"{option}={value!r}: {type(self).__name__} takes {_KINDS[kind]} here, and this is of type "
                    f"{type(value).__name__}."
                )
        init(self, *args, **kwargs)

    return constructor


def _plain(annotation: Any, value: object) -> Any:
    """The one kind that an option takes besides ``None``."""
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    return kinds[0] if len(kinds) == 1 and value is not None and isinstance(annotation, UnionType) else annotation


def _fits(value: object, kind: type) -> bool:
    # What is a number, but none that the option takes, is told by the option's own check.
    if kind is str:
        return isinstance(value, str | PathLike)
    return isinstance(value, bool if kind is bool else Real)


def whole(
    option: str,
    value: object,
    least: int = 1,
    wanted: str = "must be a positive integer.",
    below: float = math.inf,
) -> None:
    """Refuse what is no whole number of at least so much.

    >>> whole("r", 0, wanted="the rank must be a positive integer, e.g. r=8.")
    Traceback (most recent call last):
        ...
    lightning_pet.errors.ArgumentError: r=0: the rank must be a positive integer, e.g. r=8.

    Args:
        option: its name.
        value: what was given.
        least: the smallest.
        wanted: the end of the message.
        below: what it must be less than.

    Raises:
        ArgumentError: saying option, value and what is wanted; as all checks of this module.
    """
    if not is_whole(value) or not least <= value < below:
        _refuse(option, value, wanted)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is an integer, and none of ``True`` and ``False``."""
    return isinstance(value, int) and not isinstance(value, bool)


def positive(option: str, value: Any, wanted: str = "must be a positive number.", kind: Any = Real) -> None:
    """Refuse what is not positive and finite, and another ``kind`` of number."""
    if not isinstance(value, kind) or not 0 < value <= _LARGEST:
        _refuse(option, value, wanted)


def at_least(option: str, value: Any, least: float, wanted: str) -> None:
    """Refuse what is less, or not finite."""
    if not least <= value <= _LARGEST:
        _refuse(option, value, wanted)


def finite(option: str, value: Any, wanted: str) -> None:
    """Refuse NaN and the infinite."""
    if not -_LARGEST <= value <= _LARGEST:
        _refuse(option, value, wanted)


def share(option: str, value: Any, wanted: str, ends: str = "(]", kind: Any = Real) -> None:
    """Refuse what is not between 0 and 1, and another ``kind`` of number.

    >>> share("dropout", 1, "a probability in [0, 1), e.g. 0.05.", ends="[)")
    Traceback (most recent call last):
        ...
    lightning_pet.errors.ArgumentError: dropout=1: a probability in [0, 1), e.g. 0.05.

    Args:
        option: its name.
        value: what was given.
        wanted: the end of the message.
        ends: whether 0 and 1 belong to it, as intervals are written.
        kind: of the number.
    """
    if (
        not isinstance(value, kind)
        or not 0 <= value <= 1
        or (value == 0 and ends[0] == "(")
        or (value == 1 and ends[1] == ")")
    ):
        _refuse(option, value, wanted)


def one_of(option: str, value: object, choices: Any, wanted: str | None = None) -> None:
    """Refuse what is none of the words of a ``Literal``.

    >>> from typing import Literal
    >>> one_of("bias", "some", Literal["none", "all"])
    Traceback (most recent call last):
        ...
    lightning_pet.errors.ArgumentError: bias='some': use one of 'none', 'all'.
    """
    words = get_args(choices)
    if value not in words:
        _refuse(option, value, wanted or f"use one of {', '.join(map(repr, words))}.")


def some(option: str, value: Any, wanted: str) -> None:
    """Refuse a list without an item; ``None`` is no list."""
    if value is not None and not value:
        raise ArgumentError(f"{option} is empty: {wanted}")


def _refuse(option: str, value: object, wanted: str) -> NoReturn:
    raise ArgumentError(f"{option}={value!r}: {wanted}")


OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "rank": ("r", "init_r", "phm_dim"),
    "lora_r": ("r", "init_r"),
    "r": ("init_r", "bottleneck_size"),
    "lora_alpha": ("alpha",),
    "scaling": ("alpha", "scale"),
    "lora_dropout": ("dropout",),
    "vera_dropout": ("dropout",),
    "lora_bias": ("bias",),
    "init_lora_weights": ("init",),
    "init_weights": ("init",),
    "loraplus_lr_ratio": ("lora_plus_ratio",),
    "targets": ("target_modules",),
    "target_parameters": ("target_modules",),
    "modules": ("target_modules", "module"),
    "layers": ("layers_to_transform", "train_layers"),
    "leave_out": ("drop_layers",),
    "adapter_name": ("name",),
    "modules_to_train": ("modules_to_save",),
    "deltaT": ("delta_t",),
    "num_virtual_tokens": ("length",),
    "prefix_length": ("length",),
    "prompt_length": ("length",),
    "num_tokens": ("length",),
    "prefix_projection": ("projection",),
    "flat": ("projection",),
    "encoder_hidden_size": ("projection_size", "encoder_size"),
    "bottleneck_dim": ("bottleneck_size",),
    "adapter_size": ("bottleneck_size",),
    "prompt_tuning_init": ("init",),
    "prompt_tuning_init_text": ("init_text",),
    "tokenizer_name_or_path": ("tokenizer",),
    "encoder_reparameterization_type": ("encoder",),
    "orthogonality": ("form",),
    "subtract_projection": ("form",),
    "phm_layer": ("phm_dim",),
    "phm_rank": ("rank",),
    "shared_phm_rule": ("shared_rule",),
    "factorized_phm_W": ("factorized",),
    "intrinsic_dim": ("d",),
    "intrinsic_dimension": ("d",),
    "amount": ("density",),
    "sparsity": ("density",),
    "unfreeze_backbone_at_epoch": ("unfreeze_every",),
    "unfreeze_at_epoch": ("unfreeze_every",),
}
"""Names of PEFT, the adapters library and Lightning, with ours for the same thing, the likeliest first."""

NOT_NEEDED: dict[str, str] = {
    "inference_mode": "there is no such mode: what is loaded trains in fit only, and load_delta suffices for use",
    "task_type": "the model says it by itself, and modules_to_save names what trains beside the delta",
    "peft_type": "the class of the callback is the type",
    "fan_in_fan_out": "how a layer stores its weight is read off the layer",
    "base_model_name_or_path": "a delta file holds the fingerprint of its base",
    "is_prompt_learning": "the class of the callback says it",
    "save_projection": "a file always holds the shared matrices",
    "is_feedforward": "feedforward_modules says it",
    "token_dim": "the model says it by itself",
    "num_layers": "the model says it by itself",
    "num_attention_heads": "the model says it by itself",
    "num_transformer_submodules": "where='both', 'encoder' or 'decoder' says it",
    "lr": "the learning rate belongs into configure_optimizers",
    "learning_rate": "the learning rate belongs into configure_optimizers",
    "lora_lr": "the learning rate belongs into configure_optimizers",
}
"""Options of others that have no counterpart here, and why none is needed."""


def our_name(option: str, own: Iterable[str]) -> str | None:
    """Our name for somebody else's option, if this callback has it.

    >>> our_name("lora_alpha", ["r", "alpha"]), our_name("rank", ["init_r"]), our_name("rank", ["length"])
    ('alpha', 'init_r', None)
    """
    known = set(own)
    return next((name for name in OTHER_NAMES.get(option, ()) if name in known), None)


def unknown_option(cls: str, option: str, own: Iterable[str]) -> str:
    """The message for an option that a callback does not have.

    >>> unknown_option("LoRACallback", "lora_alpha", ["r", "alpha"])
    "LoRACallback has no option 'lora_alpha'. Did you mean 'alpha'? Its options are: r, alpha."
    """
    names = list(own)
    if option in NOT_NEEDED:
        hint = f"Leave it out: {NOT_NEEDED[option]}."
    else:
        near = our_name(option, names) or next(iter(difflib.get_close_matches(option, names, n=1)), None)
        hint = f"Did you mean {near!r}?" if near else ""
    return " ".join(filter(None, (f"{cls} has no option {option!r}.", hint, f"Its options are: {', '.join(names)}.")))
