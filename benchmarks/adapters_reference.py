"""Write what the adapters library computes, for tests that compare ours with it.

Run it in an environment of its own, as that library needs an older transformers:

    python -m venv /tmp/adapters && /tmp/adapters/bin/pip install torch==2.13.0 adapters==1.3.0 transformers==4.57.6
    /tmp/adapters/bin/python benchmarks/adapters_reference.py tests/reference/adapters

One safetensors file per architecture and method, ``bert-houlsby.safetensors`` for example. Its tensors are

* ``base.<name>``: weights of the model without adapters, under the names of that transformers version;
* ``delta.<name>``: weights that the adapters library added, under its names, moved away from their start;
* ``input.<name>``: arguments of the model's forward;
* ``output``: last hidden state (of the decoder, if there is one) in evaluation mode.

Its metadata holds, as JSON: ``model`` (class, and arguments of its configuration), ``method`` (class of the library's
configuration, and its arguments) and ``versions``.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, HEADS, INNER, VOCABULARY = 16, 2, 24, 60
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
}
_STACKS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
}
_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

# name: (model class, configuration class, arguments of the configuration)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", {**_SIZES, "max_position_embeddings": 16}),
    "roberta": ("RobertaModel", "RobertaConfig", {**_SIZES, "max_position_embeddings": 18, "type_vocab_size": 1}),
    "gpt2": (
        "GPT2Model",
        "GPT2Config",
        {
            **{"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_positions": 16},
            **{"n_inner": INNER, "bos_token_id": 1, "eos_token_id": 2},
        },
    ),
    "llama": ("LlamaModel", "LlamaConfig", {**_SIZES, "num_key_value_heads": 1, "max_position_embeddings": 16}),
    "t5": (
        "T5Model",
        "T5Config",
        {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": INNER, "num_layers": 2, "num_heads": HEADS},
    ),
    "bart": ("BartModel", "BartConfig", {**_STACKS, **_TOKENS, "max_position_embeddings": 16}),
    "vit": (
        "ViTModel",
        "ViTConfig",
        {**{k: v for k, v in _SIZES.items() if k != "vocab_size"}, "image_size": 8, "patch_size": 4},
    ),
    "whisper": (
        "WhisperModel",
        "WhisperConfig",
        {**_STACKS, **_TOKENS, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16},
    ),
}
# name: (configuration class of the library, its arguments)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "houlsby": ("DoubleSeqBnConfig", {"reduction_factor": 4}),
    "pfeiffer": ("SeqBnConfig", {"reduction_factor": 4}),
    "parallel": ("ParBnConfig", {"reduction_factor": 4}),
    "compacter": ("CompacterConfig", {"reduction_factor": 4, "phm_dim": 4}),
    "prefix": ("PrefixTuningConfig", {"prefix_length": 3, "bottleneck_size": 8}),
    "loreft": ("LoReftConfig", {"r": 2, "prefix_positions": 3, "suffix_positions": 2}),
    "noreft": ("NoReftConfig", {"r": 2, "suffix_positions": 2}),
    "direft": ("DiReftConfig", {"r": 2, "suffix_positions": 1, "tied_weights": True, "non_linearity": "relu"}),
    "unipelt": (
        "UniPELTConfig",
        {
            "prefix_tuning": {"prefix_length": 3, "bottleneck_size": 8},
            "adapter": {"reduction_factor": 4},
            "lora": {"r": 2, "alpha": 6},
        },
    ),
}
_STACKED = ("t5", "bart", "whisper")  # in their decoders the library counts last positions by the encoder's mask
_SOME = {"noreft": ("bert",), "direft": ("gpt2",)}  # forms of one method, which differ in a formula alone
PARTS = {"prefix_tuning": "PrefixTuningConfig", "adapter": "SeqBnConfig", "lora": "LoRAConfig"}


def main(folder: Path) -> None:
    """Write all files and print how large each is."""
    folder.mkdir(parents=True, exist_ok=True)
    for architecture in ARCHITECTURES:
        for method in (name for name in METHODS if architecture in _SOME.get(name, ARCHITECTURES)):
            path = folder / f"{architecture}-{method}.safetensors"
            write(path, architecture, method)
            print(f"{path.name:32} {path.stat().st_size:8,}", flush=True)


def write(path: Path, architecture: str, method: str) -> None:
    """One architecture with one method."""
    import adapters
    import transformers
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model_class, config_class, sizes = ARCHITECTURES[architecture]
    config = getattr(transformers, config_class)(**sizes)
    config._attn_implementation = "eager"
    model = getattr(transformers, model_class)(config).eval()
    scatter(dict(model.named_parameters()), 0.2)
    if method in ("prefix", "unipelt"):
        flatten_distances(model)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    delta_class, arguments = METHODS[method]
    if architecture in _STACKED and "suffix_positions" in arguments:
        arguments = {**arguments, "suffix_positions": 0}
    adapters.init(model)
    given = {key: getattr(adapters, PARTS[key])(**value) if key in PARTS else value for key, value in arguments.items()}
    model.add_adapter("task", config=getattr(adapters, delta_class)(**given))
    model.set_active_adapters("task")
    model.eval()
    added: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if name not in base}
    scatter(added, 0.3)
    # What torch makes an orthogonal matrix of, beside the parameter.
    added |= {name: buffer for name, buffer in model.named_buffers() if name.endswith(".0.base")}
    inputs = inputs_of(architecture)
    with torch.no_grad():
        output = model(**inputs).last_hidden_state

    tensors: dict[str, Tensor] = {"output": output}
    tensors |= {f"base.{name}": tensor for name, tensor in base.items()}
    tensors |= {f"delta.{name}": tensor.detach() for name, tensor in added.items()}
    tensors |= {f"input.{name}": tensor for name, tensor in inputs.items()}
    versions = {"adapters": adapters.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    metadata = {
        "model": {"class": model_class, "config_class": config_class, "config": sizes},
        "method": {"class": delta_class, "config": arguments},
        "versions": versions,
    }
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()},
        path,
        {key: json.dumps(value, sort_keys=True) for key, value in metadata.items()},
    )


def scatter(parameters: dict[str, nn.Parameter], scale: float) -> None:
    """Add a fixed random step to every parameter, so that none is zero or one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in sorted(parameters):
            step = torch.randn(parameters[name].shape, generator=generator) * scale
            if name.endswith(".weight.original"):  # torch reads signs off its diagonal, as whole numbers
                step.fill_diagonal_(0)
            parameters[name].add_(step)


def flatten_distances(model: nn.Module) -> None:
    """Take T5's table of distances out: the library counts distances from the first prefix position, we do not."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_attention_bias" in name:
                parameter.zero_()


def inputs_of(architecture: str) -> dict[str, Tensor]:
    """Two rows; the second of a text is padded."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    if architecture == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    if architecture == "whisper":
        return {"input_features": torch.randn(2, 8, 16, generator=generator), "decoder_input_ids": ids[:, :4]}
    if architecture in ("t5", "bart"):
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :4].flip(0)}
    return {"input_ids": ids, "attention_mask": mask}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
