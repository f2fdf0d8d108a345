"""Numbers that papers print for methods that select parameters, recounted on models without memory.

Each row says how the printed number reads: what is in it beside the method's own parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lightning_pet import (
    BitFitCallback,
    FullFineTuningCallback,
    IA3Callback,
    LayerFreezingCallback,
    PETCallback,
    apply,
)


@dataclass(frozen=True)
class Row:
    """One published number.

    Attributes:
        paper: where it is printed.
        printed: the number as printed.
        model: builds the model.
        callback: builds the method.
        count: the integer that the printed number stands for.
    """

    paper: str
    printed: str
    model: Callable[[], nn.Module]
    callback: Callable[[], PETCallback]
    count: int


def _on_meta(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def built() -> nn.Module:
        with torch.device("meta"):
            return build()

    return built


@_on_meta
def t5_base() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32100, d_model=768, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


@_on_meta
def t0() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24}
    config = T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **sizes)
    return T5ForConditionalGeneration(config)


@_on_meta
def roberta_base() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(
        RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2)
    )


def gpt2(**sizes: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        return GPT2LMHeadModel(GPT2Config(**sizes))

    return _on_meta(build)


GPT2_M = gpt2(n_embd=1024, n_layer=24, n_head=16)
GPT2_L = gpt2(n_embd=1280, n_layer=36, n_head=20)


@_on_meta
def bert_large() -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    return BertModel(BertConfig(vocab_size=28996, **sizes))


def bias_of_layers() -> PETCallback:
    return BitFitCallback("*.encoder.layer.*", modules_to_save=[])


def bias_everywhere() -> PETCallback:
    return BitFitCallback(["all", "lm_head"], exclude_modules=["*coder.final_layer_norm"], add_missing=True)


ROWS = [
    # The biases of the twelve layers; those of the embeddings' norm and of the head are not in it.
    Row("Hu et al. 2021, Table 2", "0.1M", roberta_base, bias_of_layers, 101_376),
    # One for each linear layer and each norm of the blocks, and one of the output layer's size.
    Row("Karimi Mahabadi et al. 2021, Table 1", "0.126 %", t5_base, bias_everywhere, 280_932),
    # The last two blocks without the final norm and the embeddings.
    Row("Hu et al. 2021, Table 3", "25.19M", GPT2_M, lambda: LayerFreezingCallback(2), 25_192_448),
    Row("Hu et al. 2021, Table 3", "774.03M", GPT2_L, FullFineTuningCallback, 774_030_080),
    # One block of 24; 3.8 % of the model.
    Row("Guo et al. 2021, Table 1", "3.8 %", bert_large, lambda: LayerFreezingCallback(1), 12_596_224),
    # l_k, l_v and l_ff, of cross-attentions, too: 0.01 % of 11.1 billion.
    Row("Liu et al. 2022, Section 3.3", "0.01 %", t0, IA3Callback, 24 * (2 * 4096 + 10240) + 24 * (4 * 4096 + 10240)),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.paper}: {row.printed}")
def test_recounted(row: Row) -> None:
    model = row.model()
    plan = apply(model, [row.callback()]).plan()
    assert plan.trainable == row.count
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == row.count
    if row.printed.endswith("M"):
        digits = len(row.printed.partition(".")[2]) - 1
        assert f"{plan.trainable / 1e6:.{digits}f}M" == row.printed
    else:
        digits = len(row.printed.removesuffix(" %").partition(".")[2])
        assert f"{100 * plan.share:.{digits}f} %" == row.printed
