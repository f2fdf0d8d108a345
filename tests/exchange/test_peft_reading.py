"""Folders that HF PEFT has written give the outputs here that they give there."""

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_pet import (
    ArgumentError,
    BaseMismatchError,
    DeltaFileError,
    LoRACallback,
    apply,
    export_delta,
    import_delta,
    inspect_delta,
    load_delta,
    save_delta,
)
from tests.exchange.peft_models import (
    Attention,
    Convolutions,
    bert,
    gpt2,
    inputs_of,
    llama,
    made,
    mixtral,
    output_of,
    t5,
    tied,
)

Build = Callable[[], nn.Module]
_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CASES: dict[str, tuple[Build, Any]] = {
    "bert": (bert, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["query", "value"], task_type="SEQ_CLS")),
    "patterns": (
        bert,
        peft.LoraConfig(
            r=3,
            lora_alpha=5,
            use_rslora=True,
            rank_pattern={"query": 2},
            alpha_pattern={"^bert.encoder.layer.1.attention.self.query": 7, "value": 2},
            target_modules=["query", "value", "dense"],
        ),
    ),
    "all biases": (bert, peft.LoraConfig(r=2, bias="all", target_modules=["query"])),
    "biases of targets": (bert, peft.LoraConfig(r=2, bias="lora_only", target_modules=["query"])),
    "bias of B": (bert, peft.LoraConfig(r=2, lora_bias=True, target_modules=["query"])),
    "dora": (bert, peft.LoraConfig(r=2, use_dora=True, target_modules=["query", "dense"])),
    "all-linear": (bert, peft.LoraConfig(r=2, target_modules="all-linear")),
    "fused": (gpt2, peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "fused dora": (gpt2, peft.LoraConfig(r=2, target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True)),
    "llama": (llama, peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "down_proj"], task_type="CAUSAL_LM")),
    "embedding": (llama, peft.LoraConfig(r=2, target_modules=["embed_tokens"])),
    "modules_to_save": (llama, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])),
    "t5": (t5, peft.LoraConfig(r=2, target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")),
    "convolutions": (Convolutions, peft.LoraConfig(r=2, target_modules=["first", "second", "linear"])),
    "convolutions dora": (Convolutions, peft.LoraConfig(r=2, target_modules=["first", "second"], use_dora=True)),
    "attention": (Attention, peft.LoraConfig(r=2, target_modules=["attention"])),
    "adalora": (
        bert,
        peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=10, target_modules=["query", "value"]),
    ),
    "ia3": (
        bert,
        peft.IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
    ),
    "ia3 fused": (
        gpt2,
        peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
        ),
    ),
    "ia3 llama": (llama, peft.IA3Config()),
    "ia3 convolutions": (
        Convolutions,
        peft.IA3Config(target_modules=["first", "second"], feedforward_modules=["second"]),
    ),
    "tokens": (llama, peft.TrainableTokensConfig(token_indices=[9, 3, 40])),
    "tokens of a tied table": (tied, peft.TrainableTokensConfig(token_indices=[9, 3, 40])),
    "tokens of two stacks": (t5, peft.TrainableTokensConfig(token_indices=[5, 60], target_modules=["shared"])),
    "lora and tokens": (gpt2, peft.LoraConfig(r=2, fan_in_fan_out=True, trainable_token_indices=[9, 3])),
    "lora and tokens of two": (
        llama,
        peft.LoraConfig(
            r=2, trainable_token_indices={"embed_tokens": [9, 3], "lm_head": [4]}, modules_to_save=["norm"]
        ),
    ),
    "kept tied": (tied, peft.LoraConfig(r=2, modules_to_save=["lm_head"], ensure_weight_tying=True)),
    "lora kept tied": (tied, peft.LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)),
    "norms": (llama, peft.LNTuningConfig(target_modules=["input_layernorm", "norm"], modules_to_save=["lm_head"])),
    "norms of bert": (bert, peft.LNTuningConfig(target_modules=["LayerNorm"], task_type="SEQ_CLS")),
    "hira": (llama, peft.HiraConfig(r=3, target_modules=["q_proj", "embed_tokens"], rank_pattern={"q_proj": 2})),
    "hira fused": (gpt2, peft.HiraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)),
    "hira convolutions": (Convolutions, peft.HiraConfig(r=2, target_modules=["first", "linear"])),
    "miss": (llama, peft.MissConfig(r=3, target_modules=["q_proj", "down_proj"])),
    "miss mini": (llama, peft.MissConfig(r=4, mini_r=4, init_weights="mini", target_modules=["v_proj"])),
    "shira": (llama, peft.ShiraConfig(r=2, target_modules=["q_proj", "down_proj"])),
    "prompt": (llama, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "prompt bert": (bert, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")),
    "prompt t5": (t5, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM")),
    "p-tuning": (
        llama,
        peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"),
    ),
    "vera": (bert, peft.VeraConfig(r=5, target_modules=["query", "intermediate.dense"], task_type="SEQ_CLS")),
    "vera fused": (gpt2, peft.VeraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "vera from its key": (
        llama,
        peft.VeraConfig(r=5, target_modules=["q_proj", "v_proj"], save_projection=False, projection_prng_key=7),
    ),
}
IN_FLOAT32: dict[str, tuple[Build, Any]] = {  # torch's grouped products and PEFT's decompositions know nothing wider
    "pissa": (llama, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")),
    "olora": (llama, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="olora")),
    "mixtral": (mixtral, peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])),
    "experts": (mixtral, peft.LoraConfig(r=2, target_modules=[], target_parameters=_EXPERTS)),
    "prefix": (llama, peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def theirs(model: nn.Module, config: Any, folder: Path) -> Tensor:
    """Train nothing, but give every tensor of a PEFT model random values; save it, and return its output."""
    wrapped = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config), autocast_adapter_dtype=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "ranknum" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.eval()
    wrapped.save_pretrained(folder)
    output = output_of(wrapped)
    virtual = getattr(config, "num_virtual_tokens", 0)
    shifts = virtual and output.dim() == 3 and config.task_type == "CAUSAL_LM"
    shifts = shifts and not isinstance(config, peft.PrefixTuningConfig)
    return output[:, virtual:] if shifts else output


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_peft(case: str, tmp_path: Path) -> None:
    build, config = CASES[case]
    model = made(build)
    before = output_of(model)
    expected = theirs(model, config, tmp_path)
    load_delta(model, tmp_path)
    torch.testing.assert_close(output_of(model.eval()), expected, rtol=0, atol=1e-12)
    assert (expected - before).abs().max() > 1e-4


@pytest.mark.parametrize("case", IN_FLOAT32)
def test_outputs_are_those_of_peft_in_float32(case: str, tmp_path: Path) -> None:
    build, config = IN_FLOAT32[case]
    model = made(build, torch.float32)
    expected = theirs(model, config, tmp_path)
    load_delta(model, tmp_path)
    torch.testing.assert_close(output_of(model.eval()), expected, rtol=0, atol=2e-6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    theirs(made(bert), CASES["bert"][1], tmp_path / "peft")
    return tmp_path / "peft"


# --- what can be done with it afterwards ---------------------------------------------------------------------


def test_it_has_a_name_beside_others_and_is_saved_as_ours(folder: Path, tmp_path: Path) -> None:
    model = made(bert)
    adapted = load_delta(model, folder, name="theirs")
    alone = output_of(model)
    other = LoRACallback(r=2, target_modules=["key"])
    ours = made(bert)
    apply(ours, other)
    save_delta(ours, tmp_path / "ours.pet.safetensors")
    adapted.load("ours", tmp_path / "ours.pet.safetensors")
    assert list(adapted) == ["theirs", "ours"]
    with adapted.using("ours"):
        assert not torch.equal(output_of(model), alone)
    assert torch.equal(output_of(model), alone)
    adapted["theirs"].save(tmp_path / "theirs.pet.safetensors")
    again = made(bert)
    load_delta(again, tmp_path / "theirs.pet.safetensors")
    assert torch.equal(output_of(again), alone)


def test_it_merges(folder: Path) -> None:
    model = made(bert)
    adapted = load_delta(model, folder)
    attached = output_of(model)
    adapted.merge_()
    torch.testing.assert_close(output_of(model), attached, rtol=0, atol=1e-12)


def test_training_goes_on_from_it(folder: Path, tmp_path: Path) -> None:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = made(bert, torch.float32)

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss: Tensor = self.model(input_ids=batch, labels=torch.zeros(len(batch), dtype=torch.long)).loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.full((2, 7), 5), batch_size=2)

    module = Module()
    callback = LoRACallback(r=3, alpha=5, target_modules=["query", "value"], start_from=str(folder))
    trainer = pl.Trainer(
        max_steps=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module)
    model = made(bert, torch.float32)
    load_delta(model, folder)
    torch.testing.assert_close(output_of(module.model.eval()), output_of(model), rtol=0, atol=1e-6)


def test_paths_that_begin_otherwise_are_said(folder: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = made(bert)

        def forward(self, **inputs: Tensor) -> Any:
            return self.net(**inputs)

    plain = made(bert)
    load_delta(plain, folder)
    model = Wrapped()
    with pytest.raises(ArgumentError, match=r"nothing in .* begins with 'encoder\.'"):
        load_delta(model.net.bert, folder, rename={"encoder.": ""})
    with pytest.raises(DeltaFileError, match=r"rename=\{'': 'net\.'\}"):
        load_delta(model, folder)
    load_delta(model, folder, rename={"": "net."})
    torch.testing.assert_close(model(**inputs_of(model.net)).logits, output_of(plain), rtol=0, atol=0)


# --- as files ------------------------------------------------------------------------------------------------


def test_import_and_inspect_by_the_command(folder: Path, tmp_path: Path) -> None:
    base = made(bert, torch.float32)
    base.save_pretrained(tmp_path / "base")
    command = str(Path(sys.executable).parent / "lightning-pet")
    for name, more in (("plain", []), ("checked", ["--base", str(tmp_path / "base")])):
        out = tmp_path / f"{name}.pet.safetensors"
        done = subprocess.run([command, "import", str(folder), str(out), *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        model = made(bert, torch.float32)
        load_delta(model, out)
        expected = made(bert, torch.float32)
        load_delta(expected, folder)
        torch.testing.assert_close(output_of(model), output_of(expected), rtol=0, atol=0)
    shown = subprocess.run([command, "inspect", str(folder)], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "lora" in shown.stdout


def test_with_its_base_the_file_knows_it(folder: Path, tmp_path: Path) -> None:
    base = made(bert)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    import_delta(folder, tmp_path / "x.pet.safetensors", base=base)
    assert {name: tensor for name, tensor in base.state_dict().items()}.keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    assert inspect_delta(tmp_path / "x.pet.safetensors").base is not None
    torch.manual_seed(3)
    other = made(bert)
    with torch.no_grad():
        other.bert.pooler.dense.weight.add_(1)
    with pytest.raises(BaseMismatchError):
        load_delta(other, tmp_path / "x.pet.safetensors")


# --- what is not read ----------------------------------------------------------------------------------------


def edit(folder: Path, **options: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


def retouch(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def surplus(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.bert.other.weight"] = torch.zeros(2)


def half(tensors: dict[str, Tensor]) -> None:
    del tensors[next(name for name in tensors if "lora_B" in name)]


def flattened(tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = tensors[name].flatten()


def diverged(tensors: dict[str, Tensor]) -> None:
    next(iter(tensors.values())).view(-1)[0] = float("nan")


def bare(tensors: dict[str, Tensor]) -> None:
    for name in [*tensors]:
        tensors[name.removeprefix("base_model.model.")] = tensors.pop(name)


def truncated(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": Path("x")}, folder / "adapter_model.bin")


BAD: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), "schema", "without adapter_config.json"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "schema", "without its tensors"),
    "both": (lambda f: (f / "pytorch_adapter.bin").write_bytes(b"x") and None, "schema", "expected those of one"),
    "neither": (lambda f: (f / "adapter_config.json").write_text("{}") and None, "schema", "neither"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{") and None, "corrupt", "adapter_config.json"),
    "unknown type": (lambda f: edit(f, peft_type="XLORA"), "version", "'XLORA'"),
    "unknown option": (lambda f: edit(f, use_new_thing=True), "mismatch", "use_new_thing"),
    "replicated layers": (lambda f: edit(f, layer_replication=[[0, 2]]), "mismatch", "layer_replication"),
    "start of the base": (lambda f: edit(f, init_lora_weights="corda"), "mismatch", "init_lora_weights"),
    "intricate pattern": (lambda f: edit(f, alpha_pattern={"(a+)+$": 3}), "unsafe", "too intricate"),
    "choices": (lambda f: edit(f, alpha_pattern={f"({'.?' * 40}x)": 3}), "unsafe", "too intricate"),
    "open repetition": (lambda f: edit(f, alpha_pattern={".{,99}.{,99}.{,99}x": 3}), "unsafe", "too intricate"),
    "a list as type": (lambda f: edit(f, peft_type=["LORA"]), "version", "LORA"),
    "a text as truth": (lambda f: edit(f, use_rslora="false"), "schema", "use_rslora='false'"),
    "a text as number": (lambda f: edit(f, lora_dropout="x"), "schema", "lora_dropout='x'"),
    "a list of alphas": (lambda f: edit(f, alpha_pattern=["q"]), "schema", "alpha_pattern"),
    "an alpha of text": (lambda f: edit(f, alpha_pattern={"query": "3"}), "schema", "alpha_pattern"),
    "a number as module": (lambda f: edit(f, modules_to_save=5), "schema", "modules_to_save=5"),
    "a module without name": (lambda f: edit(f, modules_to_save=[""]), "schema", "modules_to_save"),
    "a lost head": (lambda f: edit(f, modules_to_save=["pooler"]), "mismatch", "names 'pooler', which is bert.pooler"),
    "a vector as matrix": (lambda f: retouch(f, flattened), "mismatch", "lora_A"),
    "surplus": (lambda f: retouch(f, surplus), "mismatch", "bert.other.weight"),
    "half a delta": (lambda f: retouch(f, half), "mismatch", "has no B"),
    "NaN": (lambda f: retouch(f, diverged), "nonfinite", "NaN"),
    "without prefix": (lambda f: retouch(f, bare), "mismatch", "do not begin with"),
    "cut short": (truncated, "corrupt", "adapter_model.safetensors"),
    "objects": (pickled, "unsafe", "adapter_model.bin"),
    "another rank": (lambda f: edit(f, use_dora=True), "mismatch", "use_dora"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_named_and_change_nothing(case: str, folder: Path) -> None:
    spoil, code, words = BAD[case]
    spoil(folder)
    model = made(bert)
    before, keys = output_of(model), list(model.state_dict())
    with pytest.raises(DeltaFileError, match=words) as caught:
        load_delta(model, folder)
    assert caught.value.code == code
    assert list(model.state_dict()) == keys
    assert torch.equal(output_of(model), before)


def test_another_kind_of_model_is_named_with_what_is_near(folder: Path) -> None:
    model = made(llama)
    with pytest.raises(DeltaFileError, match=r"attention\.self\.query.*does not have; near it"):
        load_delta(model, folder)


def test_folders_below_are_listed(folder: Path) -> None:
    with pytest.raises(DeltaFileError, match=r"folders that have one: peft"):
        load_delta(made(bert), folder.parent)


def test_a_pickle_of_plain_tensors_is_read(folder: Path) -> None:
    expected = made(bert)
    load_delta(expected, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    model = made(bert)
    load_delta(model, folder)
    assert torch.equal(output_of(model), output_of(expected))


def test_an_old_pickle_is_refused(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(DeltaFileError, match=r"adapter_model\.bin"):
        load_delta(made(bert), folder)


def test_a_prefix_of_learned_positions_is_refused(tmp_path: Path) -> None:
    theirs(made(bert), peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"), tmp_path)
    with pytest.raises(DeltaFileError, match="no rotary positions"):
        load_delta(made(bert), tmp_path)


def test_a_convolution_in_groups_is_refused(tmp_path: Path) -> None:
    model = made(lambda: Convolutions(groups=2))
    theirs(model, peft.LoraConfig(r=2, target_modules=["second"]), tmp_path)
    with pytest.raises(DeltaFileError, match="2 groups"):
        load_delta(model, tmp_path)


def test_a_table_that_renormalises_is_refused_both_ways(tmp_path: Path) -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, 4, max_norm=0.5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.table(x)
            return out

    wrapped = peft.get_peft_model(Bag(), peft.LoraConfig(r=2, target_modules=["table"]))
    wrapped.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    with pytest.raises(DeltaFileError, match="max_norm"):
        load_delta(Bag(), tmp_path / "theirs")
    ours = Bag()
    apply(ours, LoRACallback(r=2, target_modules=["table"]))
    with pytest.raises(DeltaFileError, match="max_norm"):
        export_delta(ours, tmp_path / "ours")


def test_a_trained_table_is_refused(tmp_path: Path) -> None:
    model = made(llama)
    theirs(model, CASES["embedding"][1], tmp_path)
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1)
    with pytest.raises(DeltaFileError, match=r"is not the base's model\.embed_tokens"):
        load_delta(model, tmp_path)


def test_what_is_known_of_the_base_is_said(folder: Path) -> None:
    with pytest.warns(UserWarning, match="does not name its base"):
        load_delta(made(bert), folder)
    edit(folder, base_model_name_or_path="somebody/bert")
    model = made(bert)
    model.config._name_or_path = "somebody/other"
    with pytest.warns(UserWarning, match="somebody/bert"):
        load_delta(model, folder)
    with pytest.raises(BaseMismatchError, match="cannot be answered"):
        load_delta(made(bert), folder, base_check="exact")


def tied() -> nn.Module:
    model = llama()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_a_copy_of_a_tied_module_is_refused(saved: str, tmp_path: Path) -> None:
    model = made(tied)
    theirs(model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[saved]), tmp_path)
    before = output_of(model)
    with pytest.raises(DeltaFileError, match="shares a weight"):
        load_delta(model, tmp_path)
    assert torch.equal(output_of(model), before)


def test_patterns_fit_names_of_parameters(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=2,
        lora_alpha=5,
        target_modules=["q_proj"],
        target_parameters=["experts.down_proj"],
        rank_pattern={"experts.down_proj": 3},
        alpha_pattern={"experts.down_proj": 9},
    )
    model = made(mixtral, torch.float32)
    expected = theirs(model, config, tmp_path)
    load_delta(model, tmp_path)
    torch.testing.assert_close(output_of(model.eval()), expected, rtol=0, atol=1e-5)


def test_nothing_is_taken_out_of_a_table(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], init_lora_weights="pissa")
    model = made(llama, torch.float32)
    expected = theirs(model, config, tmp_path)
    load_delta(model, tmp_path)
    torch.testing.assert_close(output_of(model.eval()), expected, rtol=0, atol=1e-5)


def test_token_rows_that_have_no_counterpart(tmp_path: Path) -> None:
    model = made(tied)
    for name, indices, error in (
        ("head", {"lm_head": [3]}, r"rows of lm_head alone, which shares its weight with model.embed_tokens"),
        ("both", {"lm_head": [3], "embed_tokens": [4]}, r"share a weight.*different rows"),
    ):
        theirs(model, peft.LoraConfig(r=2, trainable_token_indices=indices), tmp_path / name)
        with pytest.raises(DeltaFileError, match=error):
            load_delta(model, tmp_path / name)
    theirs(model, peft.LoraConfig(r=2, trainable_token_indices=[3, 4]), tmp_path / "x")
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    wrong = {"a row for each": [3], "twice": [3, 3], "expected a list of rows": ["a", 1], "=NoneType": None}
    for error, indices in (wrong | {"has 64 rows": [3, 64]}).items():
        (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(config | {"trainable_token_indices": indices}))
        with pytest.raises(DeltaFileError, match=error):
            load_delta(model, tmp_path / "x")


def test_weights_that_are_kept_tied_need_a_tied_base(tmp_path: Path) -> None:
    kept = peft.LoraConfig(r=2, modules_to_save=["lm_head"], ensure_weight_tying=True)
    theirs(made(tied), kept, tmp_path / "kept")
    with pytest.raises(DeltaFileError, match=r"ensure_weight_tying.*does not tie"):
        load_delta(made(llama), tmp_path / "kept")
    with pytest.raises(DeltaFileError, match=r"ensure_weight_tying.*together with its base"):
        import_delta(tmp_path / "kept", tmp_path / "x.pet.safetensors")
    lora = peft.LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    theirs(made(tied), lora, tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.lora_A.weight"] += 1
    save_file(tensors, file)
    with pytest.raises(DeltaFileError, match=r"ensure_weight_tying.*transposes"):
        load_delta(made(tied), tmp_path / "lora")
