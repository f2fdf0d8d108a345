"""Reads what ``benchmarks/adapters_reference.py`` wrote: models of the adapters library with their outputs."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

FOLDER = Path(__file__).parents[1] / "reference" / "adapters"
ARCHITECTURES = ("bert", "roberta", "gpt2", "llama", "t5", "bart", "vit", "whisper")

# Parts that transformers has renamed since the files were written, per architecture.
_RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "vit": (
        (r"^encoder\.layer\.", "layers."),
        (r"attention\.attention\.query", "attention.q_proj"),
        (r"attention\.attention\.key", "attention.k_proj"),
        (r"attention\.attention\.value", "attention.v_proj"),
        (r"attention\.output\.dense", "attention.o_proj"),
        (r"intermediate\.dense", "mlp.fc1"),
        (r"(layers\.\d+)\.output\.dense", r"\1.mlp.fc2"),
    ),
}


@dataclass(frozen=True)
class Reference:
    """One file.

    Attributes:
        model: the same model in the present transformers, with the weights of the file, in evaluation mode.
        delta: weights that the library added, by its names.
        inputs: arguments of the model's forward.
        output: what the library's model returned for them, with its delta.
        options: arguments of the library's configuration.
    """

    model: nn.Module
    delta: dict[str, Tensor]
    inputs: dict[str, Tensor]
    output: Tensor
    options: dict[str, Any]

    def run(self, model: nn.Module | None = None) -> Tensor:
        """The last hidden state."""
        with torch.no_grad():
            return (model or self.model)(**self.inputs).last_hidden_state


def read(architecture: str, method: str) -> Reference:
    """Read one file and build its model."""
    import transformers

    tensors: dict[str, dict[str, Tensor]] = {"base": {}, "delta": {}, "input": {}, "output": {}}
    with safe_open(FOLDER / f"{architecture}-{method}.safetensors", "pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
        for name in file.keys():  # noqa: SIM118  # not a dictionary
            kind, _, rest = name.partition(".")
            tensors[kind][rest] = file.get_tensor(name)
    described = metadata["model"]
    config = getattr(transformers, described["config_class"])(**described["config"])
    config._attn_implementation = "eager"
    model = getattr(transformers, described["class"])(config).eval()
    missing, unexpected = model.load_state_dict(renamed(architecture, tensors["base"]), strict=False)
    assert not unexpected, unexpected
    assert not missing, missing
    return Reference(model, tensors["delta"], tensors["input"], tensors["output"][""], metadata["method"]["config"])


def renamed(architecture: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names of the present transformers."""
    result = {}
    for name, tensor in tensors.items():
        for old, new in _RENAMED.get(architecture, ()):
            name = re.sub(old, new, name)
        result[name] = tensor
    return result
