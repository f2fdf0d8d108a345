"""What the exchange with HF PEFT is measured on: methods with their options, in PEFT's terms and in ours.

A method that is added here is measured on every kind of layer and every architecture, in both directions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import peft

from lightning_pet import (
    AdaLoRACallback,
    BitFitCallback,
    HiRACallback,
    HRACallback,
    IA3Callback,
    LNTuningCallback,
    LoHaCallback,
    LoKrCallback,
    LoRACallback,
    MiSSCallback,
    OFTCallback,
    PETCallback,
    PrefixTuningCallback,
    PromptTuningCallback,
    SHiRACallback,
    TrainableTokensCallback,
    VeRACallback,
)
from tests.exchange.places import Place


@dataclass(frozen=True)
class Case:
    """A method with one choice of its options.

    Attributes:
        name: its row in the tables.
        theirs: makes PEFT's configuration for a place; ``None``: PEFT has no name for it.
        ours: makes the callback for a place; ``None``: it is only read.
        layers: it sits on the layers of a place; ``False``: on a whole model, whatever its layers are.
        float32: PEFT computes it in float32 whatever the model's type is, or refuses another.
        within: what outputs may differ by; ``None``: what its type of numbers gives.
        unread: what transformers' ``load_adapter`` does otherwise than PEFT.
    """

    name: str
    theirs: Callable[[Place], Any] | None
    ours: Callable[[Place], PETCallback] | None
    layers: bool = True
    float32: bool = False
    within: float | None = None
    unread: str = ""

    @property
    def bound(self) -> float:
        """The largest difference that passes."""
        return self.within or (1e-5 if self.float32 else 1e-9)


def _lora(name: str, both: dict[str, Any] | None = None, here: dict[str, Any] | None = None, **kwargs: Any) -> Case:
    """LoRA with options that are called alike, and those that are called otherwise here and there."""
    there = kwargs.pop("there", {})
    return Case(
        name,
        lambda at: peft.LoraConfig(**{"r": 2, "lora_alpha": 5, **(both or {}), **there, **at.there}),
        lambda at: LoRACallback(**{"r": 2, "alpha": 5, **(both or {}), **(here or {}), **at.here}),
        **kwargs,
    )


def _oft(name: str, within: float | None = None, **options: Any) -> Case:
    return Case(
        name,
        lambda at: peft.OFTConfig(oft_block_size=4, **options, **at.there),
        lambda at: OFTCallback(oft_block_size=4, **options, **at.here),
        within=within,
    )


def _ia3(at: Place) -> peft.IA3Config:
    return peft.IA3Config(**at.there, feedforward_modules=[])


def _ia3_inputs(at: Place) -> peft.IA3Config:
    return peft.IA3Config(target_modules=[*(at.down or at.names)], feedforward_modules=[*(at.down or at.names)])


_ADAPTIVE: Final[dict[str, Any]] = {"init_r": 4, "target_r": 2, "total_step": 10}
_VIRTUAL: Final[dict[str, Any]] = {"num_virtual_tokens": 3}

CASES: Final = (
    _lora("LoRA"),
    Case(
        "LoRA, by role, heads as usual",
        None,
        lambda at: LoRACallback(r=2),
        layers=False,
    ),
    _lora("LoRA, rsLoRA", {"use_rslora": True}),
    Case(
        "LoRA, patterns of rank and alpha",
        lambda at: peft.LoraConfig(
            r=2, rank_pattern={_first(at): 4}, alpha_pattern={_first(at): 3}, use_rslora=True, **at.there
        ),
        lambda at: LoRACallback(
            r=2, rank_pattern={_first(at): 4}, alpha_pattern={_first(at): 3}, use_rslora=True, **at.here
        ),
    ),
    _lora("LoRA, dropout", there={"lora_dropout": 0.1}, here={"dropout": 0.1}),
    _lora("LoRA, DoRA", {"use_dora": True}),
    _lora("LoRA, bias of B", {"lora_bias": True}),
    _lora("LoRA, all biases", {"bias": "all"}),
    _lora("LoRA, biases of targets", {"bias": "lora_only"}),
    Case(
        "LoRA, a trained module beside it",
        lambda at: peft.LoraConfig(r=2, modules_to_save=[at.head], task_type=at.task, **at.there),
        lambda at: LoRACallback(r=2, modules_to_save=[at.head], **at.here),
    ),
    _lora("LoRA, PiSSA", there={"init_lora_weights": "pissa"}, here={"init": "pissa"}, float32=True),
    _lora("LoRA, OLoRA", there={"init_lora_weights": "olora"}, here={"init": "olora"}, float32=True),
    Case(
        "AdaLoRA",
        lambda at: peft.AdaLoraConfig(**_ADAPTIVE, lora_alpha=6, **at.there),
        lambda at: AdaLoRACallback(**_ADAPTIVE, alpha=6, **at.here),
    ),
    Case("(IA)³, outputs", _ia3, lambda at: IA3Callback(**at.here, feedforward_modules=[])),
    Case(
        "(IA)³, inputs",
        _ia3_inputs,
        lambda at: IA3Callback(target_modules=[], feedforward_modules=[*(at.down or at.names)]),
    ),
    Case("HiRA", lambda at: peft.HiraConfig(r=2, **at.there), lambda at: HiRACallback(r=2, **at.here)),
    Case(
        "LoHa", lambda at: peft.LoHaConfig(r=2, alpha=5, **at.there), lambda at: LoHaCallback(r=2, alpha=5, **at.here)
    ),
    Case(
        "LoHa, effective kernels",
        lambda at: peft.LoHaConfig(r=2, alpha=5, use_effective_conv2d=True, **at.there),
        lambda at: LoHaCallback(r=2, alpha=5, use_effective_conv2d=True, **at.here),
    ),
    Case(
        "LoKr", lambda at: peft.LoKrConfig(r=2, alpha=5, **at.there), lambda at: LoKrCallback(r=2, alpha=5, **at.here)
    ),
    Case(
        "LoKr, both factors decomposed",
        lambda at: peft.LoKrConfig(r=1, alpha=5, decompose_both=True, decompose_factor=4, **at.there),
        lambda at: LoKrCallback(r=1, alpha=5, decompose_both=True, decompose_factor=4, **at.here),
    ),
    Case("HRA", lambda at: peft.HRAConfig(r=2, **at.there), lambda at: HRACallback(r=2, **at.here)),
    _oft("OFT", use_cayley_neumann=False),
    _oft("OFT, Cayley–Neumann"),
    _oft("OFT, one block for all", block_share=True),
    _oft("OFT, constrained", 1e-6, coft=True, eps=1e-2),
    Case("MiSS", lambda at: peft.MissConfig(r=2, **at.there), lambda at: MiSSCallback(r=2, **at.here)),
    Case(
        "MiSS, mini",
        lambda at: peft.MissConfig(r=2, init_weights="mini", mini_r=4, **at.there),
        lambda at: MiSSCallback(r=2, mini_r=4, **at.here),
    ),
    Case(
        "SHiRA",
        lambda at: peft.ShiraConfig(r=1, **at.there),
        lambda at: SHiRACallback(r=1, **at.here),
        unread="draws the indices by the seed again, in place of those of the file",
    ),
    Case("VeRA", lambda at: peft.VeraConfig(r=3, **at.there), lambda at: VeRACallback(r=3, **at.here)),
    Case("VeRA, its key alone", lambda at: peft.VeraConfig(r=3, save_projection=False, **at.there), None),
    Case(
        "LN tuning",
        lambda at: peft.LNTuningConfig(target_modules=[*at.norms]),
        lambda at: LNTuningCallback(target_modules=[*at.norms]),
        layers=False,
    ),
    Case(
        "trained tokens",
        lambda at: peft.TrainableTokensConfig(token_indices=[3, 5, 9], target_modules=[at.table]),
        lambda at: TrainableTokensCallback(token_indices={at.table: [3, 5, 9]}),
        layers=False,
    ),
    Case("BitFit", None, lambda at: BitFitCallback(), layers=False),
    Case(
        "prompt tuning",
        lambda at: peft.PromptTuningConfig(**_VIRTUAL, task_type=at.task),
        lambda at: PromptTuningCallback(length=3),
        layers=False,
        float32=True,
    ),
    Case(
        "P-tuning",
        lambda at: peft.PromptEncoderConfig(**_VIRTUAL, encoder_hidden_size=8, task_type=at.task),
        None,
        layers=False,
        float32=True,
    ),
    Case(
        "prefix tuning",
        lambda at: peft.PrefixTuningConfig(**_VIRTUAL, task_type=at.task),
        lambda at: PrefixTuningCallback(length=3, projection_size=8),
        layers=False,
        float32=True,
    ),
)


def _first(at: Place) -> str:
    return (*at.names, *at.parameters)[0]
