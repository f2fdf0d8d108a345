"""The rows of HF PEFT's own matrix of toy models: what it asks of a method, an option and a kind of layer.

A row is the name of a method, of a toy model, and the options in PEFT's words. Those of methods that have no
counterpart here are counted with the reason.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple


class Row(NamedTuple):
    """One row.

    Attributes:
        method: ``peft_type``.
        model: of :data:`~tests.exchange.toy_models.TOYS`.
        options: of PEFT's configuration.
    """

    method: str
    model: str
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """For people."""
        told = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.method} {self.model}({told})"


def _rows(method: str, model: str, targets: str, *options: Mapping[str, Any], **common: Any) -> list[Row]:
    """Rows that differ in ``options``; of a list of targets, one for each word, ``a+b`` being two layers."""
    named = [{"target_modules": word.split("+")} for word in targets.split()]
    return [Row(method, model, {**target, **common, **more}) for target in named for more in (options or ({},))]


def _mlp(method: str, saved: str = "lin1", both: bool = True, second: bool = True, **common: Any) -> list[Row]:
    """The rows that every method has: a name, a list of one, another, both, and one beside a trained module."""
    rows = [Row(method, "MLP", {"target_modules": "lin0", **common}), *_rows(method, "MLP", "lin0", **common)]
    rows += _rows(method, "MLP", "lin1", **common) if second else []
    rows += _rows(method, "MLP", "lin0+lin1", **common) if both else []
    return rows + (_rows(method, "MLP", "lin0", modules_to_save=[saved], **common) if saved else [])


def _ia3(model: str, targets: str, inner: str = "", **more: Any) -> list[Row]:
    return _rows("IA3", model, targets, feedforward_modules=inner.split("+") if inner else [], **more)


_DORA: Final = ({}, {"use_dora": True})
_OFT: Final[dict[str, Any]] = {"r": 2, "oft_block_size": 0}
_EXACT: Final[dict[str, Any]] = {"use_cayley_neumann": False}
_COFT: Final[dict[str, Any]] = {"coft": True, "eps": 1e-2}
_SMALL: Final[dict[str, Any]] = {"r": 0, "oft_block_size": 2}
_SHARED: Final[dict[str, Any]] = {"coft": True, "eps": 1e-2, "block_share": True}
_ADALORA: Final[dict[str, Any]] = {"init_lora_weights": False, "total_step": 1}
_EFFECTIVE: Final[dict[str, Any]] = {"use_effective_conv2d": True}

LORA: Final = [
    *_mlp("LORA"),
    *_rows("LORA", "MLP", "lin0", lora_alpha=4, lora_dropout=0.1),
    *_rows("LORA", "MLP", "lin0 lin0+lin1", use_dora=True),
    *_rows("LORA", "MLP", "lin0", init_lora_weights="mica", r=4),
    Row("LORA", "MLP", {"target_modules": "lin1", "use_dora": True, "lora_alpha": 32}),
    *_rows("LORA", "EmbConv1D", "conv1d emb emb+conv1d", *_DORA),
    *_rows("LORA", "EmbConv1D", "conv1d", trainable_token_indices={"emb": [0, 10]}),
    *_rows("LORA", "Conv1d", "conv1d", *_DORA),
    *_rows("LORA", "Conv2d", "conv2d conv2d+lin0", *_DORA),
    *_rows("LORA", "Conv2dGroups", "conv2d", *_DORA),
    *_rows("LORA", "Conv2dGroups2", "conv2d", *_DORA),
    *_rows("LORA", "Conv3d", "conv3d conv3d+lin0", *_DORA),
    *_rows("LORA", "MLP", "lin0+lin1", lora_bias=True, lora_alpha=32),
    *_rows("LORA", "Conv2d", "conv2d", lora_bias=True, lora_alpha=32),
    *_rows("LORA", "Conv3d", "conv3d", lora_bias=True, lora_alpha=32),
    *_rows("LORA", "MHA", "mha mha+lin0"),
    Row("LORA", "MlpUsingParameters", {"target_parameters": ["lin0.weight"]}),
    *_rows("LORA", "MLP", "lin0", target_parameters=["lin1.weight"]),
]
IA3: Final = [
    Row("IA3", "MLP", {"target_modules": "lin0", "feedforward_modules": []}),
    Row("IA3", "MLP", {"target_modules": "lin0", "feedforward_modules": "lin0"}),
    *(row for names in ("lin0", "lin1", "lin0+lin1") for inner in ("", names) for row in _ia3("MLP", names, inner)),
    *_ia3("MLP", "lin0", "lin0", modules_to_save=["lin1"]),
    *_ia3("EmbConv1D", "conv1d", "conv1d"),
    *_ia3("EmbConv1D", "conv1d+lin0", "conv1d+lin0"),
    *_ia3("EmbConv1D", "conv1d", "conv1d", modules_to_save=["lin0"]),
    *(
        row
        for kind in ("conv2d", "conv3d")
        for names, inner in (
            (kind, ""),
            (kind, kind),
            (f"{kind}+lin0", ""),
            (f"{kind}+lin0", kind),
            (f"{kind}+lin0", f"{kind}+lin0"),
        )
        for row in _ia3(kind.capitalize(), names, inner)
    ),
]
LOHA: Final = [
    *_mlp("LOHA"),
    *_rows("LOHA", "MLP", "lin0", alpha=4, module_dropout=0.1),
    Row("LOHA", "MLP", {"target_modules": "lin0", "rank_dropout": 0.5}),
    *_rows("LOHA", "Conv2d", "conv2d conv2d+lin0", {}, _EFFECTIVE),
    *_rows("LOHA", "Conv1d", "conv1d", {}, {}, {"r": 2}),
    *_rows("LOHA", "Conv1dGroups", "conv1d", r=4),
    *_rows("LOHA", "Conv1dBigger", "conv1d", _EFFECTIVE, {"use_effective_conv2d": False}, r=2),
    *_rows("LOHA", "Conv2d1x1", "conv2d"),
    *_rows("LOHA", "Conv2dGroups", "conv2d"),
    *_rows("LOHA", "Conv2dGroups2", "conv2d"),
]
LOKR: Final = [
    *_mlp("LOKR"),
    *_rows("LOKR", "MLP", "lin0", alpha=4, module_dropout=0.1),
    Row("LOKR", "MLP", {"target_modules": "lin0", "rank_dropout": 0.5}),
    Row("LOKR", "MLP", {"target_modules": "lin0", "decompose_both": True, "r": 1, "alpha": 1}),
    *_rows("LOKR", "Conv1d", "conv1d", {}, {"r": 2}),
    *_rows("LOKR", "Conv1dGroups", "conv1d", r=4),
    *_rows("LOKR", "Conv1dBigger", "conv1d", _EFFECTIVE, {"use_effective_conv2d": False}, r=2),
    *_rows("LOKR", "Conv2d", "conv2d conv2d+lin0", {}, _EFFECTIVE),
    *_rows("LOKR", "Conv2d1x1", "conv2d"),
    *_rows(
        "LOKR",
        "Conv2d",
        "conv2d+lin0",
        {"decompose_both": True},
        {"decompose_factor": 4},
        {"decompose_both": True, "decompose_factor": 4},
        **_EFFECTIVE,
    ),
    *_rows("LOKR", "Conv2dGroups", "conv2d"),
    *_rows("LOKR", "Conv2dGroups2", "conv2d"),
]
OFT: Final = [
    *_mlp("OFT", both=False, second=False, **_OFT, **_EXACT),
    *_rows("OFT", "MLP", "lin0", module_dropout=0.1, **_OFT, **_EXACT),
    *_rows("OFT", "MLP", "lin0", _COFT, {"block_share": True, **_EXACT}, _SHARED, **_OFT),
    *_rows("OFT", "MLP", "lin0", {"use_cayley_neumann": True}, _EXACT, **_SMALL),
    *_rows("OFT", "MLP", "lin0", {"use_cayley_neumann": True}, _EXACT, **_SMALL, **_SHARED),
    *_rows("OFT", "EmbConv1D", "emb", {}, {"block_share": True}, r=1, oft_block_size=0),
    *_rows(
        "OFT",
        "Conv2d",
        "conv2d",
        {},
        {"coft": True},
        {"block_share": True},
        {"coft": True, "block_share": True},
        r=5,
        oft_block_size=0,
    ),
]
OTHERS: Final = [
    *_mlp("HRA", second=False),
    *_rows("HRA", "Conv2d", "conv2d"),
    *_mlp("MISS", second=False, r=2),
    *_mlp("MISS", second=False, r=2, init_weights="bat"),
    Row("LN_TUNING", "MLP_LayerNorm", {"target_modules": "layernorm0"}),
    *_rows("LN_TUNING", "MLP_LayerNorm", "layernorm0", {}, {"modules_to_save": ["layernorm1"]}),
    Row("LN_TUNING", "MLP_LayerNorm", {"target_modules": "lin0"}),
    *_rows("LN_TUNING", "MLP_LayerNorm", "lin0"),
    *_mlp("SHIRA", saved="", both=False, r=1),
    *_rows("SHIRA", "MLP", "lin0+lin1", r=1, random_seed=56),
    *_rows("SHIRA", "MLP", "lin0", r=1),
    *_mlp("VERA"),
    *_rows("VERA", "EmbConv1D", "conv1d"),
    *_rows("TRAINABLE_TOKENS", "EmbConv1D", "emb", token_indices=[0, 1, 3], init_weights=False),
    *_mlp("HIRA"),
    *_rows("HIRA", "MLP", "lin0", hira_dropout=0.1),
    *_rows("HIRA", "EmbConv1D", "conv1d emb emb+conv1d"),
    *_rows("HIRA", "Conv1d", "conv1d"),
    *_rows("HIRA", "Conv2d", "conv2d conv2d+lin0"),
    *_rows("HIRA", "Conv3d", "conv3d conv3d+lin0"),
    *_rows("ADALORA", "MLP", "lin0", orth_reg_weight=0, **_ADALORA),
    *_rows("ADALORA", "MLP", "lin0+lin1", **_ADALORA),
    *_rows("ADALORA", "Conv2d", "conv2d conv2d+lin0", **_ADALORA),
]
ROWS: Final[Sequence[Row]] = [*LORA, *IA3, *LOHA, *LOKR, *OFT, *OTHERS]

_POOR: Final = "below LoRA in what is published of it"
_FULL: Final = "a change of full rank, of which no LoRA is exact"
ELSEWHERE: Final[Mapping[str, tuple[int, str]]] = {
    "WaveFT": (20, _POOR),
    "BOFT": (12, "seven times the time of OFT, which it is with one factor"),
    "PSOFT": (10, "an orthogonal change inside of principal directions of the base"),
    "DEFT": (9, "takes directions out of the base"),
    "GraLoRA": (8, "read where it is a LoRA of all its blocks"),
    "TinyLoRA": (8, _POOR),
    "Adamss": (7, "subspaces of the base, found by clustering"),
    "RandLoRA": (7, _FULL),
    "C3A": (6, _FULL),
    "FourierFT": (6, _POOR),
    "GLoRA": (6, "changes weights, inputs and biases at once"),
    "PVeRA": (6, "draws at random in use, too"),
    "RoAd": (6, "rotates outputs"),
    "UniLoRA": (6, _POOR),
    "VB-LoRA": (6, _POOR),
    "BEFT": (5, "a bias of outputs beside the base's own: BitFit"),
    "DeLoRA": (5, "read where it is a LoRA with the norms of the base"),
    "FRoD": (5, _FULL),
    "Lily": (5, "routes each input between matrices"),
    "Peanut": (5, "a network instead of a change of weights"),
    "Supertuning": (5, "a sparse change, placed by the weights"),
    "BD-LoRA": (3, "LoRA whose factors are blocks"),
    "VeLoRA": (3, "LoRA whose backward is approximated"),
    "OSF": (2, "trains the singular values of the base in place"),
    "KaSA": (1, "takes small singular values out of the base"),
    "MonteCLoRA": (1, "draws at random in training"),
}
"""Rows of methods without a counterpart here: how many, and why."""
