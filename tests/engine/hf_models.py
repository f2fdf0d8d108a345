"""Tiny transformers models and their data, without a hub."""

import torch
from models import Module, lora, trainer
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)


def bert():
    config = BertConfig(
        vocab_size=17, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return BertForSequenceClassification(config)


def gpt2():
    config = GPT2Config(
        vocab_size=17, n_embd=8, n_layer=2, n_head=2, n_positions=12, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return GPT2LMHeadModel(config)


def vit():
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=4,
        patch_size=2, num_channels=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return ViTForImageClassification(config)


class HF(Module):
    def loss(self, batch):
        return self.net(**batch).loss


def batches(net):

    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(6):
        ids = torch.randint(1, 17, (5,), generator=generator)
        if net.main_input_name == "pixel_values":
            rows.append({"pixel_values": torch.randn(1, 4, 4, generator=generator), "labels": ids[0] % 2})
        else:
            causal = "GPT2" in type(net).__name__
            rows.append({"input_ids": ids, "labels": ids if causal else ids[0] % 2})
    return DataLoader(rows, batch_size=2)


def hf_fit(net, *callbacks, **options):
    module = HF(net)
    torch.manual_seed(5)
    trainer(*(callbacks or [lora(target_modules=["attention.q", "attention.v"])]), max_epochs=1, **options).fit(
        module, batches(net)
    )
    return module
