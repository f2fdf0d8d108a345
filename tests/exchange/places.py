"""Where the exchange is measured: kinds of layers in the architectures that have them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from tests.exchange import peft_models as models

PROJECTION: Final = "projection"


@dataclass(frozen=True)
class Place:
    """Layers of one kind in one architecture.

    Attributes:
        architecture: its name in the tables.
        kind: of the layers; :data:`PROJECTION`: what its deltas usually sit on.
        build: makes the model.
        names: ends of the paths of the layers, which both libraries take as ``target_modules``.
        head: the end of the path of a module that trains as it is.
        down: the ends of paths of the layers that read what a feed-forward layer has made.
        task: PEFT's word for what the model is for.
        norms: ends of the paths of norms.
        table: the end of the path of the table of tokens.
        parameters: ends of the paths of parameters that are no layer's weight (PEFT's ``target_parameters``).
    """

    architecture: str
    kind: str
    build: Callable[[], nn.Module]
    names: tuple[str, ...]
    head: str = ""
    down: tuple[str, ...] = ()
    task: str | None = None
    norms: tuple[str, ...] = ()
    table: str = ""
    parameters: tuple[str, ...] = ()

    @property
    def there(self) -> dict[str, Any]:
        """What PEFT is told of the place."""
        named = {"target_parameters": [*self.parameters]} if self.parameters else {}
        return {"target_modules": [*self.names], **named}

    @property
    def here(self) -> dict[str, Any]:
        """What a callback is told of the place."""
        return {"target_modules": [*self.names, *self.parameters]}


_BERT: dict[str, Any] = {
    "norms": ("LayerNorm",),
    "table": "word_embeddings",
    "build": models.bert,
    "head": "classifier",
    "task": "SEQ_CLS",
}
_ROBERTA: dict[str, Any] = {
    "norms": ("LayerNorm",),
    "table": "word_embeddings",
    "build": models.roberta,
    "head": "classifier",
    "task": "SEQ_CLS",
}
_LLAMA: dict[str, Any] = {
    "norms": ("input_layernorm", "post_attention_layernorm"),
    "table": "embed_tokens",
    "build": models.llama,
    "head": "lm_head",
    "task": "CAUSAL_LM",
}
_MIXTRAL: dict[str, Any] = {
    "norms": ("input_layernorm",),
    "table": "embed_tokens",
    "build": models.mixtral,
    "head": "lm_head",
    "task": "CAUSAL_LM",
}
_GPT2: dict[str, Any] = {
    "norms": ("ln_1", "ln_2"),
    "table": "wte",
    "build": models.gpt2,
    "head": "ln_f",
    "task": "CAUSAL_LM",
}
_T5: dict[str, Any] = {
    "norms": ("layer_norm",),
    "table": "shared",
    "build": models.t5,
    "head": "decoder.final_layer_norm",
    "task": "SEQ_2_SEQ_LM",
}
_BART: dict[str, Any] = {
    "norms": ("self_attn_layer_norm",),
    "table": "shared",
    "build": models.bart,
    "head": "decoder.layernorm_embedding",
    "task": "SEQ_2_SEQ_LM",
}
_VIT: dict[str, Any] = {"norms": ("layernorm_before",), "table": "", "build": models.vit, "head": "classifier"}
_WHISPER: dict[str, Any] = {
    "norms": ("self_attn_layer_norm",),
    "table": "decoder.embed_tokens",
    "build": models.whisper,
    "head": "decoder.layer_norm",
}
_PLAIN: dict[str, Any] = {"norms": ("norm",), "table": "table", "build": models.Plain, "head": "head"}

PLACES: Final = (
    Place("BERT", PROJECTION, names=("query", "value"), down=("output.dense",), **_BERT),
    Place("RoBERTa", PROJECTION, names=("query", "value"), down=("output.dense",), **_ROBERTA),
    Place("GPT-2", PROJECTION, names=("c_attn",), down=("mlp.c_proj",), **_GPT2),
    Place("Llama", PROJECTION, names=("q_proj", "v_proj"), down=("down_proj",), **_LLAMA),
    Place("Mixtral", PROJECTION, names=("q_proj", "v_proj"), down=("o_proj",), **_MIXTRAL),
    Place("T5", PROJECTION, names=("q", "v"), down=("wo",), **_T5),
    Place("BART", PROJECTION, names=("q_proj", "v_proj"), down=("fc2",), **_BART),
    Place("ViT", PROJECTION, names=("q_proj", "v_proj"), down=("mlp.fc2",), **_VIT),
    Place("Whisper", PROJECTION, names=("q_proj", "v_proj"), down=("fc2",), **_WHISPER),
    Place("plain torch", PROJECTION, names=("linear",), down=("linear",), **_PLAIN),
    Place("plain torch", "Conv1D of transformers", names=("turned",), down=("turned",), **_PLAIN),
    Place("BERT", "embedding", names=("word_embeddings",), **_BERT),
    Place("Llama", "embedding", names=("embed_tokens",), **_LLAMA),
    Place("plain torch", "embedding", names=("table",), **_PLAIN),
    Place("Whisper", "Conv1d", names=("conv1", "conv2"), down=("conv2",), **_WHISPER),
    Place("plain torch", "Conv1d", names=("line",), down=("line",), **_PLAIN),
    Place("ViT", "Conv2d", names=("projection",), down=("projection",), **_VIT),
    Place("plain torch", "Conv2d", names=("image",), down=("image",), **_PLAIN),
    Place("plain torch", "Conv2d in groups", names=("grouped",), down=("grouped",), **_PLAIN),
    Place("plain torch", "Conv3d", names=("volume",), down=("volume",), **_PLAIN),
    Place("plain torch", "MultiheadAttention", names=("attention",), **_PLAIN),
    Place(
        "Mixtral", "stack of matrices", names=(), parameters=("experts.gate_up_proj", "experts.down_proj"), **_MIXTRAL
    ),
    Place("plain torch", "stack of matrices", names=(), parameters=("stack.both",), **_PLAIN),
    Place("plain torch", "free matrix", names=(), parameters=("free.matrix",), **_PLAIN),
    Place("BERT", "norm", names=("LayerNorm",), **_BERT),
    Place("Llama", "norm", names=("input_layernorm", "post_attention_layernorm"), **_LLAMA),
    Place("plain torch", "norm", names=("norm",), **_PLAIN),
)


def in_architectures() -> tuple[Place, ...]:
    """The usual places, one for each architecture."""
    return tuple(place for place in PLACES if place.kind == PROJECTION)


def of_kinds() -> dict[str, tuple[Place, ...]]:
    """All other places, by the kind of their layers."""
    found: dict[str, tuple[Place, ...]] = {}
    for place in PLACES:
        if place.kind != PROJECTION:
            found[place.kind] = (*found.get(place.kind, ()), place)
    return found
