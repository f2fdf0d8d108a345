"""Deltas of ours, written as folders of HF PEFT, give the outputs there that they give here."""

import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from lightning_pet import (
    AdaLoRACallback,
    AdapterCallback,
    ArgumentError,
    BitFitCallback,
    DeltaFileError,
    DiffPruningCallback,
    HiRACallback,
    IA3Callback,
    LNTuningCallback,
    LoRACallback,
    MiSSCallback,
    PETCallback,
    PrefixTuningCallback,
    PromptTuningCallback,
    SHiRACallback,
    TrainableTokensCallback,
    VeRACallback,
    apply,
    export_delta,
    load_delta,
    save_delta,
)
from tests.exchange.peft_models import Attention, Convolutions, bert, gpt2, llama, made, mixtral, output_of, t5, tied

Case = tuple[Callable[[], nn.Module], Callable[[], PETCallback]]
CASES: dict[str, Case] = {
    "bert": (bert, lambda: LoRACallback(r=3)),
    "roles": (gpt2, lambda: LoRACallback(r=3)),
    "patterns": (
        gpt2,
        lambda: LoRACallback(
            r=2,
            target_modules=["attention.q", "attention.k", "attention.o", "ffn.up"],
            rank_pattern={"ffn.up": 5},
            alpha_pattern={"attention.k": 3},
        ),
    ),
    "roles dora": (gpt2, lambda: LoRACallback(r=2, use_dora=True)),
    "rslora": (
        llama,
        lambda: LoRACallback(r=4, use_rslora=True, target_modules=["all-linear"], rank_pattern={"ffn.up": 2}),
    ),
    "dora": (llama, lambda: LoRACallback(r=2, use_dora=True, target_modules=["q_proj", "down_proj"])),
    "all biases": (bert, lambda: LoRACallback(r=2, bias="all")),
    "biases of targets": (bert, lambda: LoRACallback(r=2, bias="lora_only")),
    "bias of B": (bert, lambda: LoRACallback(r=2, lora_bias=True)),
    "embedding": (llama, lambda: LoRACallback(r=2, target_modules=["embed_tokens", "q_proj"])),
    "convolutions": (Convolutions, lambda: LoRACallback(r=2, target_modules=["first", "second", "linear"])),
    "groups": (lambda: Convolutions(2), lambda: LoRACallback(r=2, target_modules=["second"])),
    "convolutions dora": (Convolutions, lambda: LoRACallback(r=2, use_dora=True, target_modules=["first"])),
    "attention": (Attention, lambda: LoRACallback(r=2)),
    "output of attention": (
        Attention,
        lambda: LoRACallback(r=2, target_modules=["in_proj_weight", "out_proj"]),
    ),
    "t5": (t5, lambda: LoRACallback(r=2)),
    "head": (llama, lambda: LoRACallback(r=2, modules_to_save=["lm_head"])),
    "adalora": (bert, lambda: AdaLoRACallback(init_r=4, target_r=2, total_step=10)),
    "ia3": (bert, lambda: IA3Callback()),
    "ia3 by ends of names": (llama, lambda: IA3Callback()),
    "ia3 roles": (gpt2, lambda: IA3Callback()),
    "ia3 convolutions": (Convolutions, lambda: IA3Callback(target_modules=["first"], feedforward_modules=["second"])),
    "hira": (llama, lambda: HiRACallback(r=3, target_modules=["q_proj", "embed_tokens"], rank_pattern={"q_proj": 2})),
    "hira roles": (gpt2, lambda: HiRACallback(r=2)),
    "hira convolutions": (Convolutions, lambda: HiRACallback(r=2, target_modules=["first", "linear"])),
    "miss": (llama, lambda: MiSSCallback(r=3)),
    "miss mini": (bert, lambda: MiSSCallback(r=3, mini_r=4, target_modules=["attention.q"])),
    "shira": (llama, lambda: SHiRACallback(r=1)),
    "bitfit": (bert, lambda: BitFitCallback()),
    "tokens": (llama, lambda: TrainableTokensCallback([9, 3], modules_to_save=["norm"])),
    "tokens of a tied table": (tied, lambda: TrainableTokensCallback([9, 3])),
    "tokens of two stacks": (t5, lambda: TrainableTokensCallback([5, 60])),
    "norms": (bert, lambda: LNTuningCallback()),
    "weights of norms": (gpt2, lambda: LNTuningCallback(target_modules=["ln_1.weight", "ln_f"])),
    "vera": (llama, lambda: VeRACallback(r=20, target_modules=["attention.q", "attention.v", "ffn.down"])),
    "vera on one role": (gpt2, lambda: VeRACallback(r=3, target_modules=["attention.v"])),
}
IN_FLOAT32: dict[str, Case] = {
    "pissa": (llama, lambda: LoRACallback(r=2, init="pissa")),
    "olora": (gpt2, lambda: LoRACallback(r=2, init="olora")),
    "prompt": (llama, lambda: PromptTuningCallback(length=3)),
    "prompt bert": (bert, lambda: PromptTuningCallback(length=3)),
    "prefix": (llama, lambda: PrefixTuningCallback(length=3, projection_size=8)),
    "experts": (mixtral, lambda: LoRACallback(r=2, target_modules=["experts.gate_up_proj", "experts.down_proj"])),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def trained(base: nn.Module, callback: PETCallback) -> nn.Module:
    """A copy with the method, as if it had trained."""
    model = copy.deepcopy(base)
    apply(model, callback)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def in_peft(base: nn.Module, folder: Path, like: Tensor) -> Tensor:
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, autocast_adapter_dtype=False).eval()
    output = output_of(wrapped)
    return output if output.shape == like.shape else output[:, -like.shape[1] :]


@pytest.mark.parametrize("case", [*CASES, *IN_FLOAT32])
def test_outputs_in_peft_are_ours(case: str, tmp_path: Path) -> None:
    build, method = (CASES | IN_FLOAT32)[case]
    exact = case in CASES
    base = made(build, torch.float64 if exact else torch.float32)
    model = trained(base, method())
    ours = output_of(model)
    assert (ours - output_of(base)).abs().max() > 1e-3
    done = export_delta(model, tmp_path / "folder")
    tolerance = {"rtol": 0, "atol": 1e-12 if exact else 2e-6}
    torch.testing.assert_close(in_peft(base, tmp_path / "folder", ours), ours, **tolerance)
    if done.difference is not None:
        assert done.difference <= 1e-6
    back = copy.deepcopy(base)
    load_delta(back, tmp_path / "folder", base_check="off")
    torch.testing.assert_close(output_of(back.eval()), ours, **tolerance)
    assert torch.equal(output_of(model), ours)


def test_by_the_command_with_and_without_a_base(tmp_path: Path) -> None:
    base = made(llama, torch.float32)
    base.save_pretrained(tmp_path / "base")
    save_delta(trained(base, LoRACallback(r=2)), tmp_path / "x.pet.safetensors")
    command = [str(Path(sys.executable).parent / "lightning-pet"), "export", str(tmp_path / "x.pet.safetensors")]
    for name, more in (("plain", []), ("compared", ["--base", str(tmp_path / "base")])):
        done = subprocess.run([*command, str(tmp_path / name), *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "largest difference of outputs between here and PEFT" in done.stdout
    expected = copy.deepcopy(base)
    load_delta(expected, tmp_path / "x.pet.safetensors")
    for name in ("plain", "compared"):
        torch.testing.assert_close(
            in_peft(base, tmp_path / name, output_of(base)), output_of(expected), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("build", [gpt2, llama])
def test_lora_and_tokens_in_one_folder(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    base = made(build)
    model, heads = copy.deepcopy(base), {"modules_to_save": []}
    both = {"embedding": [9, 3], "lm_head": [9, 5]} if build is llama else [9, 3]
    apply(model, [TrainableTokensCallback(both, **heads), LoRACallback(r=2, **heads)])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = output_of(model.eval())
    assert export_delta(model, tmp_path / "folder").difference <= 1e-6
    torch.testing.assert_close(in_peft(base, tmp_path / "folder", ours), ours, rtol=0, atol=1e-12)
    back = copy.deepcopy(base)
    load_delta(back, tmp_path / "folder", base_check="off")
    torch.testing.assert_close(output_of(back.eval()), ours, rtol=0, atol=1e-12)
    with pytest.raises(DeltaFileError, match="does not read trained tokens"):
        export_delta(model, tmp_path / "served", to="vllm")


def test_tokens_beside_what_peft_has_no_tokens_with(tmp_path: Path) -> None:
    for other, error in (
        (IA3Callback(), "beside LoRA only, not beside IA3"),
        (LoRACallback(r=2, target_modules="embed_tokens"), "no other delta on model.embed_tokens"),
    ):
        model = made(llama)
        apply(model, [TrainableTokensCallback([9, 3]), other])
        with pytest.raises(DeltaFileError, match=error):
            export_delta(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_transformers_loads_it(tmp_path: Path) -> None:
    base = made(llama, torch.float32)
    model = trained(base, LoRACallback(r=2))
    export_delta(model, tmp_path / "folder")
    other = copy.deepcopy(base)
    other.load_adapter(str(tmp_path / "folder"))
    torch.testing.assert_close(output_of(other.eval()), output_of(model), rtol=0, atol=1e-6)


def test_peft_targets_exactly_these_modules(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.sub = nn.Module()
            self.sub.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.sub.lin(self.lin(x))
            return out

    base = Nested()
    model = copy.deepcopy(base)
    apply(model, LoRACallback(r=2, target_modules=["re:lin"], modules_to_save=[]))
    export_delta(model, tmp_path / "folder")
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "folder")
    assert [name for name, _ in wrapped.named_parameters() if "lora_A" in name] == [
        "base_model.model.lin.lora_A.default.weight"
    ]


# --- other forms ---------------------------------------------------------------------------------------------


def test_any_change_of_weights_as_lora(tmp_path: Path) -> None:
    base = made(llama, torch.float32)
    model = trained(base, IA3Callback())
    with pytest.raises(DeltaFileError, match=r"the best LoRA of rank 2 leaves out"):
        export_delta(model, tmp_path / "folder", to="lora", rank=2)
    assert not (tmp_path / "folder").exists()
    done = export_delta(model, tmp_path / "folder", to="lora", rank=8, max_error=0.9)
    assert 0 < done.error < 0.9
    whole = export_delta(model, tmp_path / "whole", to="lora", rank=16)
    assert whole.error < 1e-3
    torch.testing.assert_close(in_peft(base, tmp_path / "whole", output_of(model)), output_of(model), rtol=0, atol=1e-5)
    assert list(model.state_dict()) == list(trained(base, IA3Callback()).state_dict())


def test_a_change_that_is_of_low_rank_is_written_without_asking_for_one(tmp_path: Path) -> None:
    export_delta(model := trained(made(bert), LoRACallback(r=2)), tmp_path / "itself", to="lora")
    torch.testing.assert_close(in_peft(made(bert), tmp_path / "itself", output_of(model)), output_of(model))
    for build, targets in ((bert, ["attention.q", "attention.v"]), (Convolutions, ["first", "linear"])):
        base, folder = made(build), tmp_path / build.__name__
        model = trained(base, AdaLoRACallback(init_r=4, target_r=2, total_step=10, target_modules=targets))
        done = export_delta(model, folder, to="lora")
        assert (done.error, done.rank) == (0.0, 4)
        torch.testing.assert_close(in_peft(base, folder, output_of(model)), output_of(model), rtol=0, atol=1e-12)
    for method in (MiSSCallback(r=3, target_modules=["c_attn", "ffn.up"]), MiSSCallback(r=5, modules_to_save=["ln_f"])):
        fused, folder = made(gpt2), tmp_path / f"miss{method.r}"
        model = trained(fused, method)
        done = export_delta(model, folder, to="lora")
        assert done.error == 0.0
        torch.testing.assert_close(in_peft(fused, folder, output_of(model)), output_of(model), rtol=0, atol=1e-12)
    with pytest.raises(ArgumentError, match="would have to be exact"):
        export_delta(trained(base, IA3Callback(["linear"], [])), tmp_path / "none", to="lora")


def test_what_servers_read(tmp_path: Path) -> None:
    base = made(llama, torch.float32)
    export_delta(trained(base, LoRACallback(r=3, use_rslora=True)), tmp_path / "served", to="vllm")
    config = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 3
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["init_lora_weights"] is True
    assert config["modules_to_save"] is None


@pytest.mark.parametrize("to", ["vllm", "llama.cpp"])
@pytest.mark.parametrize(
    ("method", "words"),
    [
        (lambda: LoRACallback(r=2, use_dora=True), "use_dora"),
        (lambda: LoRACallback(r=2, lora_bias=True), "lora_bias"),
        (lambda: LoRACallback(r=2, modules_to_save=["lm_head"]), "lm_head"),
        (lambda: IA3Callback(), "IA3"),
    ],
)
def test_what_servers_do_not_read_is_refused(
    to: str, method: Callable[[], PETCallback], words: str, tmp_path: Path
) -> None:
    model = trained(made(llama, torch.float32), method())
    with pytest.raises(DeltaFileError, match=words):
        export_delta(model, tmp_path / "folder", to=to)  # type: ignore[arg-type]
    assert not (tmp_path / "folder").exists()


# --- what is not written -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "method", "words"),
    [
        (bert, lambda: AdapterCallback(bottleneck_size=4), "no counterpart of adapter"),
        (bert, lambda: DiffPruningCallback(), "no counterpart of diff_pruning"),
        (bert, lambda: PrefixTuningCallback(length=3), "no rotary positions"),
        (gpt2, lambda: SHiRACallback(r=2), "no shira on such a weight"),
        (gpt2, lambda: MiSSCallback(r=2), "no miss on such a weight"),
        (lambda: Convolutions(2), lambda: HiRACallback(r=2, target_modules=["second"]), "has groups"),
        (mixtral, lambda: LoRACallback(r=2, dropout=0.1, target_modules=["experts.down_proj"]), "dropout"),
    ],
)
def test_what_peft_cannot_say_is_refused(
    build: Callable[[], nn.Module], method: Callable[[], PETCallback], words: str, tmp_path: Path
) -> None:
    model = trained(made(build, torch.float32), method())
    with pytest.raises(DeltaFileError, match=words) as caught:
        export_delta(model, tmp_path / "folder")
    assert caught.value.code == "mismatch"
    assert not (tmp_path / "folder").exists()


def test_heads_of_which_one_ends_with_the_name_of_another(tmp_path: Path) -> None:
    config = transformers.DistilBertConfig(
        vocab_size=100, dim=8, hidden_dim=16, n_layers=1, n_heads=2, max_position_embeddings=16, num_labels=3
    )
    torch.manual_seed(0)
    base = transformers.DistilBertForSequenceClassification(config).double().eval()
    both = trained(base, LoRACallback(r=2, modules_to_save=["pre_classifier", "classifier"]))
    ours = output_of(both)
    export_delta(both, tmp_path / "both")
    torch.testing.assert_close(in_peft(base, tmp_path / "both", ours), ours, rtol=0, atol=1e-12)
    one = trained(base, LoRACallback(r=2, modules_to_save=["classifier"]))
    with pytest.raises(DeltaFileError, match="PEFT would take pre_classifier"):
        export_delta(one, tmp_path / "one")


def test_two_methods_are_refused(tmp_path: Path) -> None:
    model = made(bert)
    apply(model, [LoRACallback(r=2), BitFitCallback()])
    with pytest.raises(DeltaFileError, match="holds one"):
        export_delta(model, tmp_path / "folder")


@pytest.mark.parametrize("method", [SHiRACallback(r=2, target_modules=["query"]), TrainableTokensCallback([5, 6])])
def test_configurations_have_no_option_that_peft_does_not_know(method: PETCallback, tmp_path: Path) -> None:
    export_delta(trained(made(llama if method.method == "trainable_tokens" else bert), method), tmp_path / "folder")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*nexpected keyword")
        assert peft.PeftConfig.from_pretrained(str(tmp_path / "folder")).target_modules


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    model = trained(made(bert), LoRACallback(r=2))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(ArgumentError, match="exists already"):
        export_delta(model, tmp_path / "there")
    with pytest.raises(ArgumentError, match="to='onnx'"):
        export_delta(model, tmp_path / "x", to="onnx")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="needs a rank"):
        export_delta(trained(made(bert), IA3Callback()), tmp_path / "x", to="lora")
    with pytest.raises(ArgumentError, match="needs a rank"):
        export_delta(trained(made(bert), LNTuningCallback()), tmp_path / "x", to="lora")
    with pytest.raises(ArgumentError, match="give both paths"):
        export_delta(model, tmp_path / "x", to="transformers")


def test_a_fused_weight_needs_its_base(tmp_path: Path) -> None:
    save_delta(trained(made(gpt2), LoRACallback(r=2)), tmp_path / "x.pet.safetensors")
    with pytest.raises(DeltaFileError, match="only the base can tell"):
        export_delta(tmp_path / "x.pet.safetensors", tmp_path / "folder")


@pytest.mark.parametrize(
    "callback",
    [
        LoRACallback(r=2, modules_to_save=[]),
        IA3Callback(modules_to_save=[]),
        BitFitCallback(modules_to_save=[]),
        PromptTuningCallback(length=3, modules_to_save=[]),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_a_head_that_has_not_trained_is_not_missed(callback: PETCallback, tmp_path: Path) -> None:
    model = trained(made(bert), callback)
    exported = export_delta(model, tmp_path / "peft", base=made(bert))
    assert exported.reader.startswith("PEFT")
    assert exported.difference is not None
    assert exported.difference < 1e-6  # prompts of PEFT are of float32
    again = load_delta(base := made(bert), tmp_path / "peft")
    torch.testing.assert_close(output_of(base.eval()), output_of(model.eval()), rtol=0, atol=1e-6)
    assert list(again) == ["default"]


def test_a_tied_head_is_refused(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = llama()
        model.lm_head.weight = model.model.embed_tokens.weight
        return model

    model = trained(made(tied), LoRACallback(r=2, modules_to_save=["lm_head"]))
    with pytest.raises(DeltaFileError, match="shares a weight with the trained lm_head"):
        export_delta(model, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_an_output_projection_alone(tmp_path: Path) -> None:
    model = trained(made(Attention), LoRACallback(r=2, target_modules=["out_proj"]))
    export_delta(model, tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(made(Attention), tmp_path / "peft").eval()
    torch.testing.assert_close(output_of(theirs), output_of(model.eval()), rtol=0, atol=1e-12)
