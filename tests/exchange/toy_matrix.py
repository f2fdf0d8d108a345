"""What HF PEFT asks of its methods on toy models, asked of ours: one check for a row of its matrix."""

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import peft
import torch
from torch import Tensor, nn

import lightning_pet
from lightning_pet import Adapted, PETCallback, apply, export_delta, load_delta, save_delta
from tests.exchange.matrix import apart, moved
from tests.exchange.toy_models import toy
from tests.exchange.toy_rows import Row

_SAME: Final[Mapping[str, str]] = {}
_CALLBACKS: Final[Mapping[str, tuple[str, Mapping[str, str]]]] = {
    "LORA": ("LoRACallback", {"lora_alpha": "alpha", "lora_dropout": "dropout"}),
    "IA3": ("IA3Callback", _SAME),
    "ADALORA": ("AdaLoRACallback", {"init_lora_weights": ""}),
    "HIRA": ("HiRACallback", {"hira_dropout": "dropout"}),
    "LOHA": ("LoHaCallback", _SAME),
    "LOKR": ("LoKrCallback", _SAME),
    "OFT": ("OFTCallback", {"module_dropout": ""}),
    "HRA": ("HRACallback", _SAME),
    "MISS": ("MiSSCallback", _SAME),
    "SHIRA": ("SHiRACallback", _SAME),
    "VERA": ("VeRACallback", _SAME),
    "LN_TUNING": ("LNTuningCallback", _SAME),
    "TRAINABLE_TOKENS": ("TrainableTokensCallback", {"target_modules": "", "init_weights": ""}),
}
"""Our callback of each ``peft_type``, and its options that are called otherwise here (empty: they have no meaning)."""
_DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "LORA": {"alpha": 8, "clamp_rank": True},
    "HIRA": {"clamp_rank": True},
}
"""What PEFT takes where nothing is said, and we do not."""


def config_of(row: Row) -> Any:
    """PEFT's configuration of a row."""
    made: Any = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[row.method]]
    return made(**copy.deepcopy(dict(row.options)))


def callback_of(row: Row) -> PETCallback:
    """Our callback for a row."""
    name, renamed = _CALLBACKS[row.method]
    options = dict(_DEFAULTS.get(row.method, {}))
    for key, value in row.options.items():
        if own := renamed.get(key, key):
            options[own] = value
    targets = options.pop("target_modules", [])
    options["target_modules"] = [targets] if isinstance(targets, str) else [*targets]
    options["target_modules"] += options.pop("target_parameters", [])
    options = _TURNED.get(row.method, lambda given: given)(options)
    made: PETCallback = getattr(lightning_pet, name)(**{"modules_to_save": [], **options})
    return made


def _lora(options: dict[str, Any]) -> dict[str, Any]:
    start = options.pop("init_lora_weights", None)
    return options | ({} if start in (None, True, "mica") else {"init": start})  # MiCA chooses A's start only


def _ia3(options: dict[str, Any]) -> dict[str, Any]:
    inner = options["feedforward_modules"]
    inner = [inner] if isinstance(inner, str) else inner
    outer = [name for name in options["target_modules"] if name not in inner]
    return options | {"target_modules": outer, "feedforward_modules": inner}


def _adalora(options: dict[str, Any]) -> dict[str, Any]:
    return options | {"init_r": 2, "target_r": 1, "total_step": 10}


def _tokens(options: dict[str, Any]) -> dict[str, Any]:
    options.pop("target_modules")
    return options


_TURNED: Final[Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "LORA": _lora,
    "IA3": _ia3,
    "ADALORA": _adalora,
    "TRAINABLE_TOKENS": _tokens,
}


WHY: Final[Mapping[str, Callable[[Row], bool]]] = {
    "the A of PEFT reads the inputs of all groups: no change of the weight does that": lambda row: (
        row.method == "LORA" and "Groups" in row.model
    ),
    "two methods in one folder: LoRA, and trained rows of a table": lambda row: (
        "trainable_token_indices" in row.options
    ),
    "OFT of PEFT turns patches one way and merges another; on embeddings it is not here": lambda row: (
        row.method == "OFT" and row.model in ("Conv2d", "EmbConv1D")
    ),
    "norms alone are meant here; a linear layer trains by modules_to_save": lambda row: (
        row.method == "LN_TUNING" and "lin0" in row.options["target_modules"]
    ),
    "this form of MiSS (bat) is not here": lambda row: row.options.get("init_weights") == "bat",
}
"""Why rows of a method that is here do not pass."""


def reason(row: Row) -> str:
    """Why a row is not expected to pass; empty: it is."""
    if not hasattr(lightning_pet, _CALLBACKS[row.method][0]):
        return "not here"
    return next((why for why, fits in WHY.items() if fits(row)), "")


def check(row: Row) -> None:
    """Check a row in both directions.

    Raises:
        PETError: if something in it has no counterpart here.
        AssertionError: if something is not equal that should be.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs(row)
        ours(row, callback_of(row))


def dtype_of(row: Row) -> torch.dtype:
    """MiCA of PEFT decomposes in no wider type."""
    return torch.float32 if row.options.get("init_lora_weights") == "mica" else torch.float64


def within(row: Row) -> float:
    """What outputs may differ by."""
    return 1e-5 if dtype_of(row) == torch.float32 else 1e-9


def theirs(row: Row) -> None:
    """What PEFT has trained and saved has the same outputs here, attached and merged."""
    base, batch = toy(row.model, dtype_of(row))
    wrapped = moved(peft.get_peft_model(copy.deepcopy(base), config_of(row), autocast_adapter_dtype=False))
    expected = _out(wrapped, batch)
    with tempfile.TemporaryDirectory() as folder:
        wrapped.save_pretrained(folder)
        model = copy.deepcopy(base)
        adapted = load_delta(model, folder)
    assert apart(expected, _out(base, batch)) > 1e-4
    assert apart(_out(model, batch), expected) < within(row), "read otherwise"
    adapted.merge_()
    assert apart(_out(model, batch), expected) < within(row), "merged otherwise"


def ours(row: Row, callback: PETCallback) -> None:
    """What trains here trains, is saved and loaded, and has the same outputs in PEFT and merged."""
    base, batch = toy(row.model, dtype_of(row))
    before = copy.deepcopy(base.state_dict())
    model = copy.deepcopy(base)
    apply(model, callback)
    _train(model, batch)
    free = {name for name, own in model.named_parameters() if own.requires_grad}
    frozen = {name: own for name, own in model.state_dict().items() if name not in free}
    assert all(torch.equal(own, before[name]) for name, own in frozen.items() if name in before), "the base has changed"
    expected = _out(moved(model), batch)
    with tempfile.TemporaryDirectory() as parent:
        file, folder = Path(parent) / "x.pet.safetensors", Path(parent) / "folder"
        save_delta(model, file)
        again = copy.deepcopy(base)
        load_delta(again, file)
        assert torch.equal(_out(again, batch), expected), "loaded otherwise"
        export_delta(model, folder)
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, autocast_adapter_dtype=False)
    assert apart(_out(wrapped, batch), expected) < within(row), "written otherwise"
    Adapted(model).merge_()
    assert apart(_out(model, batch), expected) < within(row), "merged otherwise"


def _train(model: nn.Module, batch: Tensor) -> None:
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(chosen, lr=0.1)
    start = [parameter.detach().clone() for parameter in chosen]
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(batch)[:, 0].mean().backward()
        optimizer.step()
    model.eval()
    assert any(not torch.equal(*pair) for pair in zip(chosen, start, strict=True)), "nothing has trained"


def _out(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(batch)
    return out
