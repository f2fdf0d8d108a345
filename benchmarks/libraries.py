"""The same method in this library, in HF PEFT and in the adapters library, on one model, and a training step of it."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from trained_models import Batch, linears, loss_of, with_gradients

Call = tuple[str, dict[str, Any]]
OURS, PEFT, ADAPTERS = "lightning_pet", "PEFT", "adapters"


@dataclass(frozen=True)
class Method:
    """A method in each library that has it: a class and its arguments; ``targeted`` ones are told the layers."""

    ours: Call
    peft: Call | None = None
    adapters: Call | None = None
    targeted: bool = False


def _lora(ours: dict[str, Any] | None = None, peft: dict[str, Any] | None = None) -> Method:
    return Method(
        ("LoRACallback", {"r": 8, "alpha": 16, **(ours or {})}),
        ("LoraConfig", {"r": 8, "lora_alpha": 16, **(peft or {})}),
        None if ours else ("LoRAConfig", {"r": 8, "alpha": 16}),
        targeted=True,
    )


METHODS: dict[str, Method] = {
    "LoRA": _lora(),
    "LoRA, dropout 0.1": _lora({"dropout": 0.1}, {"lora_dropout": 0.1}),
    "DoRA": _lora({"use_dora": True}, {"use_dora": True}),
    "PiSSA": _lora({"init": "pissa"}, {"init_lora_weights": "pissa"}),
    "OLoRA": _lora({"init": "olora"}, {"init_lora_weights": "olora"}),
    "AdaLoRA": Method(
        ("AdaLoRACallback", {"init_r": 12, "target_r": 8}),
        ("AdaLoraConfig", {"init_r": 12, "target_r": 8, "lora_alpha": 16, "total_step": 1000, "tinit": 100}),
        targeted=True,
    ),
    "(IA)³": Method(
        ("IA3Callback", {}),
        (
            "IA3Config",
            {
                "target_modules": ["key", "value", "k_proj", "v_proj", "down_proj", "output.dense"],
                "feedforward_modules": ["down_proj", "output.dense"],
            },
        ),
        ("IA3Config", {}),
    ),
    "Houlsby": Method(("AdapterCallback", {"placement": "houlsby"}), None, ("DoubleSeqBnConfig", {})),
    "Pfeiffer": Method(("AdapterCallback", {"placement": "pfeiffer"}), None, ("SeqBnConfig", {})),
    "parallel": Method(
        ("AdapterCallback", {"placement": "parallel", "reduction_factor": 2, "scale": 4.0}), None, ("ParBnConfig", {})
    ),
    "Compacter": Method(
        ("CompacterCallback", {"reduction_factor": 16}), None, ("CompacterConfig", {"reduction_factor": 16})
    ),
    "Compacter++": Method(
        ("CompacterCallback", {"placement": "ffn", "reduction_factor": 16}),
        None,
        ("CompacterPlusPlusConfig", {"reduction_factor": 16}),
    ),
    "AdapterBias": Method(("AdapterBiasCallback", {})),
    "prefix 30": Method(
        ("PrefixTuningCallback", {"length": 30, "projection": False}),
        None,
        ("PrefixTuningConfig", {"flat": True, "prefix_length": 30}),
    ),
    "prefix 30, network": Method(
        ("PrefixTuningCallback", {"length": 30}), None, ("PrefixTuningConfig", {"prefix_length": 30})
    ),
    "prompt 20": Method(
        ("PromptTuningCallback", {"length": 20}),
        ("PromptTuningConfig", {"num_virtual_tokens": 20, "task_type": "FEATURE_EXTRACTION"}),
        ("PromptTuningConfig", {"prompt_length": 20}),
    ),
    "BitFit": Method(("BitFitCallback", {"add_missing": True})),
    "diff pruning": Method(("DiffPruningCallback", {})),
    "SAID": Method(("IntrinsicDimensionCallback", {"d": 1000})),
    "last 2 layers": Method(("LayerFreezingCallback", {"train_last": 2})),
}


def libraries(method: str) -> list[str]:
    """Those that are installed here and have the method."""
    calls = {OURS: METHODS[method].ours, PEFT: METHODS[method].peft, ADAPTERS: METHODS[method].adapters}
    here = {name for name in calls if name.lower() in sys.modules or importlib.util.find_spec(name.lower())}
    return [name for name, call in calls.items() if call and name in here]


class WithLoss(nn.Module):
    """A model whose output has a loss, to which HF PEFT's AdaLoRA adds its penalty; ours adds it in the backward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(self, **batch: Tensor) -> Any:
        """The model's output with its loss."""
        output = self.model(**batch)
        output.loss = output.last_hidden_state.float().square().mean()
        return output


def attach(model: nn.Module, batch: Batch, library: str, method: str, targets: str = "all") -> nn.Module:
    """The model with a method of a library on it."""
    if library == "floor":
        return model.requires_grad_(False)
    if library == "full":
        return model
    return {OURS: _ours, PEFT: _peft, ADAPTERS: _adapters}[library](model, batch, METHODS[method], targets)


def _ours(model: nn.Module, batch: Batch, method: Method, targets: str) -> nn.Module:
    import lightning_pet

    name, options = method.ours
    if method.targeted:
        options = {**options, "target_modules": linears(model, targets)}
    callback = getattr(lightning_pet, name)(**options, modules_to_save=[], verbose=False)
    lightning_pet.apply(model, [callback], forward=lambda: model(**batch))
    return model


def _peft(model: nn.Module, batch: Batch, method: Method, targets: str) -> nn.Module:
    import peft

    assert method.peft is not None
    name, options = method.peft
    if method.targeted:
        options = {**options, "target_modules": linears(model, targets)}
    if name == "AdaLoraConfig":
        model = WithLoss(model)
        options["target_modules"] = [f"model.{path}" for path in options["target_modules"]]
    return peft.get_peft_model(model, getattr(peft, name)(**options))


def _adapters(model: nn.Module, batch: Batch, method: Method, targets: str) -> nn.Module:
    import adapters

    assert method.adapters is not None
    name, options = method.adapters
    adapters.init(model)
    model.add_adapter("task", config=getattr(adapters, name)(**options))
    model.train_adapter("task")
    return model


def training_step(
    model: nn.Module, batch: Batch, library: str, method: str, targets: str = "all", compiler: str | None = None
) -> Callable[[], None]:
    """One training step; ``floor`` is the frozen base and ``full`` trains all of it."""
    if library != "full":
        with_gradients(model)
    model = attach(model, batch, library, method, targets).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None

    def loss() -> Tensor:
        if library == PEFT and METHODS[method].peft[0] == "AdaLoraConfig":
            penalised: Tensor = model(**batch).loss
            return penalised
        return loss_of(model, batch)

    if compiler:
        model.compile(dynamic=False, backend=compiler)

    def step() -> None:
        loss().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step
