"""Numbers of trained parameters as papers print them: a table for ``test_published_counts.py``.

Every row is configuration alone: an architecture of :data:`ARCHITECTURES`, callbacks with their options, and the number
that they must train. A row is added at the end of its paper's block; an architecture once.

* ``source``: paper and table.
* ``architecture``: key of :data:`ARCHITECTURES`.
* ``methods``: (public name of a callback, its options), in the order in which they are applied.
* ``expected``: all numbers that train, to the unit.
* ``published``: what is printed: a share of the whole model, or a number.
* ``counted``: what ``expected`` holds beside the deltas (norms, biases), or what the printed value leaves open.

Task heads are never counted: the architectures have none. Rows whose printed value no reading reproduces are left out.
"""

from dataclasses import dataclass
from typing import Any

Methods = tuple[tuple[str, dict[str, Any]], ...]


@dataclass(frozen=True)
class Row:
    """One line of a published table."""

    source: str
    architecture: str
    methods: Methods
    expected: int
    published: str
    counted: str


def _bert(width: int, layers: int, **sizes: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
        **sizes,
    }


def _gpt2(width: int, layers: int) -> dict[str, Any]:
    return {"n_embd": width, "n_layer": layers, "n_head": width // 64}


_ROBERTA: dict[str, Any] = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}

_DEBERTA_XXL: dict[str, Any] = {
    "vocab_size": 128100,
    "type_vocab_size": 0,
    "relative_attention": True,
    "max_relative_positions": -1,
    "position_buckets": 256,
    "position_biased_input": False,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "conv_kernel_size": 3,
    "conv_act": "gelu",
    **_bert(1536, 48),
}

# name: (class in transformers, class of its configuration, arguments of that, numbers in the model)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "t5-base": (
        "T5ForConditionalGeneration",
        "T5Config",
        # The vocabulary of the tokenizer; the published checkpoint pads it to 32,128.
        {"vocab_size": 32100, "d_model": 768, "d_ff": 3072, "d_kv": 64, "num_layers": 12, "num_heads": 12},
        222_882_048,
    ),
    "bert-base": ("BertModel", "BertConfig", _bert(768, 12), 109_482_240),
    "bert-large": ("BertModel", "BertConfig", _bert(1024, 24), 335_141_888),
    "roberta-base": ("RobertaModel", "RobertaConfig", _bert(768, 12, **_ROBERTA), 124_645_632),
    "roberta-large": ("RobertaModel", "RobertaConfig", _bert(1024, 24, **_ROBERTA), 355_359_744),
    "deberta-v2-xxlarge": ("DebertaV2Model", "DebertaV2Config", _DEBERTA_XXL, 1_564_549_632),
    "gpt2-medium": ("GPT2LMHeadModel", "GPT2Config", _gpt2(1024, 24), 354_823_168),
    "gpt2-large": ("GPT2LMHeadModel", "GPT2Config", _gpt2(1280, 36), 774_030_080),
    "bart-large": ("BartModel", "BartConfig", {}, 406_291_456),
    "t0-11b": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": 4096,
            "d_ff": 10240,
            "d_kv": 64,
            "num_layers": 24,
            "num_heads": 64,
            "feed_forward_proj": "gated-gelu",
        },
        # With the output layer tied, as transformers builds it; untied, as published, it is 11,135,332,352.
        11_003_736_064,
    ),
}

ADAPTER_BIAS = "Fu et al. 2022 (AdapterBias)"
COMPACTER = "Karimi Mahabadi et al. 2021 (Compacter), Table 1"
GUO = "Guo et al. 2021 (diff pruning), Table 1"
HE = "He et al. 2022, XSum"
HE_GLUE = "He et al. 2022, GLUE"
HOULSBY = "Houlsby et al. 2019"
LORA_2 = "Hu et al. 2021 (LoRA), Table 2"
LORA_3 = "Hu et al. 2021 (LoRA), Table 3"
T_FEW = "Liu et al. 2022 (T-Few), Section 3.3"


def _one(name: str, **options: Any) -> Methods:
    return ((f"{name}Callback", options),)


def _adapter(**options: Any) -> Methods:
    return (("AdapterCallback", options),)


def _compacter(**options: Any) -> Methods:
    return (("CompacterCallback", {"layer_norms": True, **options}),)


_BIAS: Methods = (("AdapterBiasCallback", {"layer_norms": True}),)


def _lora(r: int, *roles: str) -> Methods:
    return (("LoRACallback", {"r": r, "target_modules": list(roles or ("attention.q", "attention.v"))}),)


def _prefix(length: int) -> Methods:
    return (("PrefixTuningCallback", {"length": length, "projection": False}),)


_PLAIN = {"placement": "parallel", "bias": False}  # He et al. count no biases
_LIN = {"sublayers": ["ffn"], "inner_norm": True}  # the adapter of Lin et al. 2020

ROWS: tuple[Row, ...] = (
    Row(
        COMPACTER,
        "t5-base",
        _adapter(bottleneck_size=24, layer_norms=True),
        1_855_104,
        "0.832%",
        "48 adapters, none after cross-attention; biases; all 62 norms",
    ),
    Row(
        COMPACTER,
        "t5-base",
        _adapter(bottleneck_size=24, sublayers=["attention"], layer_norms=True),
        951_360,
        "0.427%",
        "Pfeiffer as in that paper's code: after self-attention only; biases; all 62 norms",
    ),
    Row(
        COMPACTER,
        "t5-base",
        _adapter(bottleneck_size=24, drop_layers=5, layer_norms=True),
        1_101_984,
        "0.494%",
        "28 adapters; biases; all 62 norms, those of the dropped layers too",
    ),
    Row(COMPACTER, "t5-base", _compacter(phm_dim=1), 161_664, "0.073%", "low-rank adapter; biases; all 62 norms"),
    Row(
        COMPACTER,
        "t5-base",
        _compacter(phm_dim=12, factorized=False),
        398_976,
        "0.179%",
        "PHM adapter: n³ for each of two rules in every adapter; biases; all 62 norms",
    ),
    Row(COMPACTER, "t5-base", _compacter(), 161_728, "0.073%", "Compacter: one rule; biases; all 62 norms"),
    Row(COMPACTER, "t5-base", _compacter(placement="ffn"), 104_704, "0.047%", "Compacter++; biases; all 62 norms"),
    Row(COMPACTER, "t5-base", _one("PromptTuning", length=100), 76_800, "0.034%", "at the encoder's input; no norms"),
    Row(COMPACTER, "t5-base", _one("IntrinsicDimension", d=20_000), 20_000, "0.009%", "θ and λ together"),
    Row(
        COMPACTER,
        "t5-base",
        _one("BitFit", biases=["all", "lm_head"], add_missing=True, exclude_modules=["final_layer_norm"]),
        280_932,
        "0.126%",
        "biases are added to all linear layers, the norms of the layers, and the output layer",
    ),
    Row(ADAPTER_BIAS, "bert-base", _BIAS, 66_060, "0.06M", "norms of the feed-forwards and the embedding; truncated"),
    Row(ADAPTER_BIAS, "bert-large", _BIAS, 174_104, "0.17M", "norms of the feed-forwards and the embedding"),
    Row(LORA_2, "roberta-base", _lora(8), 294_912, "0.3M", "q and v"),
    Row(
        LORA_2,
        "roberta-base",
        _one("BitFit", exclude_modules=["embeddings.LayerNorm", "pooler.dense"]),
        101_376,
        "0.1M",
        "biases of the layers",
    ),
    Row(LORA_2, "roberta-large", _lora(8), 786_432, "0.8M", "q and v"),
    Row(LORA_2, "roberta-large", _adapter(placement="pfeiffer", bottleneck_size=16), 811_392, "0.8M", "biases"),
    Row(LORA_2, "roberta-large", _adapter(bottleneck_size=8), 835_968, "0.8M", "biases"),
    Row(LORA_2, "deberta-v2-xxlarge", _lora(16), 4_718_592, "4.7M", "q and v; the rank of the release script"),
    Row(LORA_3, "gpt2-medium", _adapter(**_LIN, bottleneck_size=6), 368_784, "0.37M", "biases, inner norms"),
    Row(LORA_3, "gpt2-medium", _adapter(**_LIN, bottleneck_size=224), 11_089_152, "11.09M", "biases, inner norms"),
    Row(LORA_3, "gpt2-large", _adapter(**_LIN, bottleneck_size=8), 875_808, "0.88M", "biases, inner norms"),
    Row(LORA_3, "gpt2-large", _adapter(**_LIN, bottleneck_size=248), 23_002_848, "23.00M", "biases, inner norms"),
    Row(LORA_3, "gpt2-medium", _one("LayerFreezing", train_last=2), 25_192_448, "25.19M", "without the last norm"),
    Row(HE, "bart-large", _adapter(**_PLAIN, bottleneck_size=200), 9_830_400, "2.4%", "no biases"),
    Row(HE, "bart-large", _adapter(**_PLAIN, bottleneck_size=512), 25_165_824, "6.1%", "no biases; truncated"),
    Row(HE, "bart-large", _adapter(**_PLAIN, bottleneck_size=1024), 50_331_648, "12.3%", "no biases; truncated"),
    Row(
        HE,
        "bart-large",
        _adapter(**_PLAIN, bottleneck_size=200, sublayers=["attention"], cross_attention=True),
        14_745_600,
        "3.6%",
        "36 attentions; no biases",
    ),
    Row(
        HE,
        "bart-large",
        _adapter(placement="pfeiffer", bottleneck_size=600, bias=False),
        29_491_200,
        "7.2%",
        "no biases; truncated",
    ),
    Row(HE, "bart-large", _prefix(200), 14_745_600, "3.6%", "36 attentions, without the network"),
    Row(HE, "bart-large", _lora(200), 29_491_200, "7.2%", "q and v of 36 attentions; truncated"),
    Row(HE, "bart-large", _lora(102, "ffn.up", "ffn.down"), 25_067_520, "6.1%", "truncated"),
    Row(HE, "bart-large", _prefix(512), 37_748_736, "9.2%", "36 attentions, without the network; truncated"),
    Row(
        HE,
        "bart-large",
        (*_prefix(30), *_adapter(**_PLAIN, bottleneck_size=512)),
        27_377_664,
        "6.7%",
        "MAM: 36 attentions and 24 feed-forward layers, no biases",
    ),
    Row(
        HE_GLUE,
        "roberta-base",
        (*_prefix(16), *_adapter(**_PLAIN, bottleneck_size=16)),
        589_824,
        "0.5%",
        "MAM, no biases",
    ),
    Row(
        HOULSBY,
        "bert-large",
        _adapter(bottleneck_size=64, layer_norms=True),
        6_444_032,
        "2.1%",
        "biases and all 49 norms; the share is of the encoder without embeddings (of the whole model: 1.92%)",
    ),
    Row(HOULSBY, "bert-base", _adapter(bottleneck_size=2, layer_norms=True), 130_608, "0.1%", "biases, all 25 norms"),
    Row(
        LORA_2,
        "roberta-base",
        (("BitFitCallback", {"biases": "encoder.layer.*"}),),
        101_376,
        "0.1M",
        "the layers; not the norm of the embeddings and the pooler",
    ),
    Row(
        COMPACTER,
        "t5-base",
        (
            (
                "BitFitCallback",
                {"biases": ["all", "lm_head"], "exclude_modules": ["*coder.final_layer_norm"], "add_missing": True},
            ),
        ),
        280_932,
        "0.126%",
        "biases added to all linear layers, to the 60 norms of the blocks and to the output layer",
    ),
    Row(
        LORA_3,
        "gpt2-medium",
        (("LayerFreezingCallback", {"train_last": 2}),),
        25_192_448,
        "25.19M",
        "the last two blocks; not the final norm and the embeddings",
    ),
    Row(LORA_3, "gpt2-large", (("FullFineTuningCallback", {}),), 774_030_080, "774.03M", "everything"),
    Row(GUO, "bert-large", (("LayerFreezingCallback", {"train_last": 1}),), 12_596_224, "3.8%", "the last block"),
    Row(
        T_FEW,
        "t0-11b",
        (("IA3Callback", {}),),
        1_081_344,
        "0.01%",
        "24 (d_k + d_v + d_ff) in the encoder, 24 (2 d_k + 2 d_v + d_ff) in the decoder",
    ),
)
