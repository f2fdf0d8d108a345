"""LoRA on models that transformers loads quantised, against HF PEFT on the very same models."""

import logging

import pytest
import torch

from lightning_pet import LoRACallback, apply
from lightning_pet.model.quantised import format_of

from . import zoo

TARGETS = ["q_proj", "v_proj", "down_proj"]


def configs():
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from transformers import BitsAndBytesConfig, TorchAoConfig

    int4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    return {
        "torchao Int8Tensor": TorchAoConfig(Int8WeightOnlyConfig()),
        "torchao IntxUnpackedToInt8Tensor": TorchAoConfig(int4),
        "bitsandbytes int8": BitsAndBytesConfig(load_in_8bit=True),
        "bitsandbytes nf4": BitsAndBytesConfig(**four),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base on disk; 64 features, because 4-bit layers of bitsandbytes want a multiple of 32 in evaluation."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=2, **sizes)).save_pretrained(path)
    return path


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("name", configs())
def test_outputs_and_gradients_are_those_of_peft(name, options, folder):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    model, twin = (
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=configs()[name], dtype=torch.float32).train()
        for _ in range(2)
    )
    assert format_of(model.model.layers[0].mlp.down_proj.weight) == name
    ids = zoo._ids()
    before = model(input_ids=ids, use_cache=False).logits.detach()
    theirs = get_peft_model(twin, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, **options)).train()
    adapted = apply(model, [LoRACallback(r=4, alpha=8, target_modules=TARGETS, **options)])
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
    ours, pairs = dict(model.named_parameters()), []
    for parameter_name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            ending = {"lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "magnitude"}
            host, kind = next(
                (host.removeprefix("base_model.model."), kind)
                for kind in ending
                for host, found, _ in [parameter_name.partition(f".{kind}.")]
                if found
            )
            own = ours[f"{host}.pet.lora_default.{ending[kind]}"]
            with torch.no_grad():
                own.copy_(parameter if kind == "lora_magnitude_vector" else torch.randn_like(own) * 0.2)
                parameter.copy_(own)
            pairs.append((own, parameter))
    assert len(pairs) == len(adapted.record.trainable_names)
    outputs = [m(input_ids=ids, use_cache=False).logits for m in (model, theirs)]
    assert torch.allclose(*outputs, atol=1e-5)
    for output in outputs:
        output.sin().sum().backward()
    for own, parameter in pairs:
        assert torch.allclose(own.grad, parameter.grad, atol=1e-5 * (1 + parameter.grad.abs().max())), (
            "gradients differ"
        )
    adapted.remove()
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
