"""What a run needs is planned as it turns out: sums by hand for every engine, and a step counted by hand."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from collections import UserDict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from deepspeed_operator import require_deepspeed
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from lightning_pet.callbacks.adapter import AdapterCallback
from lightning_pet.callbacks.bitfit import BitFitCallback
from lightning_pet.callbacks.diff_pruning.callback import DiffPruningCallback
from lightning_pet.callbacks.full_fine_tuning import FullFineTuningCallback
from lightning_pet.callbacks.lora import LoRACallback
from lightning_pet.errors import ArgumentError, TargetError
from lightning_pet.operations.apply import apply
from lightning_pet.report.memory.engines import ENGINES, Engine, Inventory, Part, bytes_under
from lightning_pet.report.memory.planner import activations_of_decoder, plan_memory
from lightning_pet.report.memory.rehearsal import Step
from lightning_pet.report.memory.setup import bytes_of, engine_of, precision_of, resized, without_weights

ROOT = Path(__file__).resolve().parents[2]

# Two layers with a bfloat16 weight and a float32 delta each, an embedding around them, AdamW's two numbers.
PARTS = (
    Part((100, 8), 1600),
    *(
        part
        for layer in (1, 2)
        for part in (
            Part((10, 8), 160, unit=layer),
            Part((2, 8), 64, delta=True, trains=True, state=128, unit=layer),
        )
    ),
)
MODEL = Inventory(PARTS, buffers=12, step=Step(forward=1000, backward=900, working=1000), optimizer_step=64, half=True)


def under(name: str, n: int = 4, model: Inventory = MODEL, **options: Any) -> dict[str, int]:
    return vars(bytes_under(Engine(name, n, **options), model))  # type: ignore[arg-type]


def test_whole_models_by_hand() -> None:
    expected = {
        "base": 1600 + 2 * 160,
        "buffers": 12,
        "delta": 128,
        "gradients": 128,
        "optimizer": 256,
        "communication": 0,
        "gathered": 0,
        "activations": 1000,
    }
    assert under("single", 1) == expected
    assert under("ddp") == expected | {"communication": 128}
    assert under("ddp", gradient_as_bucket_view=True) == expected | {"communication": 128, "gradients": 0}


def test_fsdp_by_hand() -> None:
    # FSDP2 cuts rows: of 10 rows a process of four has three, of 2 one.
    assert under("fsdp2") == {
        "base": 1600 // 4 + 2 * 160 * 3 // 10,
        "buffers": 12,
        "delta": 64,
        "gradients": 64,
        "optimizer": 128,
        "communication": 0,
        "gathered": 1600 + 2 * (160 + 64),
        "activations": 1000,
    }
    flat = under("fsdp")
    assert (flat["base"], flat["delta"], flat["optimizer"]) == (1920 // 4, 128 // 4, 256 // 4)
    assert under("fsdp", layers_are_units=False)["gathered"] == 1920 + 128


def test_zero_by_hand() -> None:
    common = {"base": 1920, "buffers": 12, "delta": 64, "gathered": 0, "activations": 1000}
    # 32 numbers train: in 16 bits, with a quarter of their float32 copies and of the states.
    zero1 = under("zero1", reduce_bucket_size=50)
    assert zero1 == common | {"gradients": 64, "optimizer": 4 * 8 + 64, "communication": 2 * 2 * 50}
    zero2 = under("zero2", reduce_bucket_size=50, overlap_comm=False)
    assert zero2 == common | {"gradients": 16, "optimizer": 4 * 8 + 64, "communication": 2 * 50}
    zero3 = under("zero3", reduce_bucket_size=50)
    assert (zero3["base"], zero3["delta"]) == (1920 // 4, 64 // 4)
    assert zero3["gathered"] == 2 * (1920 + 64)  # all of it, and all of it on its way
    # 800 of the 992 numbers stay, because the largest tensor has as many, and 100 are on their way.
    small = under("zero3", max_live_parameters=400, prefetch_bucket_size=100)
    assert small["gathered"] == 2 * (800 + 100)
    assert under("zero3", 1)["gathered"] == 0


def test_float32_states_of_a_model_that_trains_in_half_precision() -> None:
    whole = Inventory((Part((8, 8), 128, trains=True, state=256),), half=True)
    assert under("single", 1, whole)["optimizer"] == 256
    assert under("zero2", 2, whole)["optimizer"] == 4 * 32 + 256  # copies, and states of float32


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "single"])
def test_more_devices_never_need_more(name: str) -> None:
    totals = [sum(under(name, n).values()) for n in (2, 4, 8, 64)]
    assert totals == sorted(totals, reverse=True)


def test_sharding_order() -> None:
    big = Inventory(tuple(Part((1000, 1000), 4_000_000, trains=True, state=8_000_000, unit=i) for i in range(50)))
    small = {"reduce_bucket_size": 1000, "max_live_parameters": 1000, "prefetch_bucket_size": 0}
    zero1, zero2, zero3 = (sum(under(f"zero{stage}", 8, big, **small).values()) for stage in (1, 2, 3))
    assert zero1 > zero2 > zero3
    assert sum(under("ddp", 8, big).values()) > sum(under("fsdp2", 8, big).values())


# --- a module ---------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, width: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.last = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        for layer in self.layers:
            x = layer(x).relu()
        return self.last(x)


class Module(pl.LightningModule):
    def __init__(self, net: nn.Module, make: Any = torch.optim.AdamW) -> None:
        super().__init__()
        self.net, self.make = net, make

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x)[y >= 0], y[y >= 0])
        self.log("loss", loss.item())  # a value, a mask and a logger: what user code does
        return loss

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters(), lr=0.1)


BATCH = (torch.ones(32, 8), torch.zeros(32, dtype=torch.long))


def lora(*targets: str, **options: Any) -> LoRACallback:
    return LoRACallback(r=2, target_modules=list(targets), modules_to_save=[], verbose=False, **options)


def test_counts_of_a_module_and_that_it_stays_as_it_is() -> None:
    net = Net()
    before = copy.deepcopy(net.state_dict())
    plan = plan_memory(net, [lora("layers.0", "layers.1")], (BATCH[0],))
    numbers = 8 * 16 + 16 + 2 * (16 * 16 + 16) + 16 * 4 + 4
    assert plan.trained == 2 * 2 * (16 + 16)
    assert (plan.bytes.base, plan.bytes.delta, plan.bytes.gradients) == (4 * numbers, 512, 512)
    assert plan.bytes.optimizer == 2 * 512 + 4 * 4  # two moments, and a counter for each of four tensors
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert all(p.requires_grad for p in net.parameters())
    half = plan_memory(net, [lora("layers.0", "layers.1")], precision="bf16-true")
    assert (half.bytes.base, half.bytes.delta, half.bytes.activations) == (2 * numbers, 512, 512)
    apply(net, [lora("layers.0", "layers.1")])
    assert plan_memory(net, [], (BATCH[0],)).bytes == plan.bytes


def test_roles_are_found_with_the_batch() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.up(x).relu())

    callback = LoRACallback(r=2, target_modules=["ffn.up"], verbose=False)
    with pytest.raises(TargetError):
        plan_memory(nn.Sequential(Block(), Block()), [callback])
    assert plan_memory(nn.Sequential(Block(), Block()), [callback], (torch.ones(4, 8),)).trained == 2 * 2 * (8 + 32)


def test_activations_by_hand() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.tanh(self.a(x)))

    net = Two()
    plan = plan_memory(net, [], (torch.ones(10, 8),), gpu=False)
    hidden, out = 10 * 16 * 4, 10 * 4 * 4
    assert plan.inventory.step is not None
    # At the worst moment of the forward: a's output, tanh of it (a's output goes after), then b's output and a loss.
    assert plan.inventory.step.forward == max(2 * hidden, hidden + out + 4)
    frozen = copy.deepcopy(net)
    frozen.a.requires_grad_(False)
    # tanh and what is before it keep nothing: the worst moment is the same, the backward's is less.
    less = plan_memory(frozen, [], (torch.ones(10, 8),), gpu=False)
    assert less.inventory.step is not None
    assert less.inventory.step.working <= plan.inventory.step.working
    assert less.inventory.step.backward < plan.inventory.step.backward


def test_a_delta_high_up_keeps_less_than_one_at_the_bottom() -> None:
    net, batch = Net(layers=8), (torch.ones(64, 8),)
    low, high = (plan_memory(net, [lora(place)], batch).bytes.activations for place in ("layers.0", "layers.7"))
    assert low > 1.5 * high


def test_more_rows_more_activations_and_nothing_else() -> None:
    plans = [plan_memory(Net(), [lora("layers.0")], (torch.ones(rows, 8),)) for rows in (8, 64)]
    assert plans[0].bytes.activations < plans[1].bytes.activations
    assert vars(plans[0].bytes) | {"activations": 0} == vars(plans[1].bytes) | {"activations": 0}


@pytest.mark.parametrize(
    ("make", "state"),
    [
        (torch.optim.SGD, 0),
        (lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), 4 * 64),
        (lambda p, lr: torch.optim.AdamW(p, lr, amsgrad=True), 3 * 4 * 64 + 2 * 4),
        (lambda p, lr: torch.optim.Adafactor(p, lr), None),
    ],
)
def test_states_of_the_runs_own_optimizer(make: Any, state: int | None) -> None:
    plan = plan_memory(Module(Net(), make), [lora("layers.0")], BATCH)
    assert not plan.notes
    assert plan.bytes.activations
    if state is None:  # factored: a row and a column of each, and no second moment per number
        assert 0 < plan.bytes.optimizer < 4 * 64
    else:
        assert plan.bytes.optimizer == state


def test_what_fails_is_said_and_not_taken_for_nothing() -> None:
    class Stubborn(Module):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return torch.from_numpy(batch[0].numpy()).sum()

        def configure_optimizers(self) -> Any:
            raise RuntimeError("no optimizer today")

    plan = plan_memory(Stubborn(Net()), [lora("layers.0")], BATCH)
    assert plan.inventory.step is None
    assert [("training step" in note, "no optimizer today" in note) for note in plan.notes] == [
        (True, False),
        (False, True),
    ]
    assert plan.bytes.optimizer == 2 * 4 * 64 + 2 * 4
    with pytest.raises(ArgumentError, match="zero9"):
        plan.under("zero9")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="single"):
        plan.under("single", 2)


def test_quantised_weights_count_what_they_are_stored_in() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    net = nn.Sequential(nn.Linear(128, 128), bitsandbytes.nn.Linear4bit(128, 128, bias=False, quant_type="nf4"))
    net[1].to("cpu")
    assert net[1].weight.dtype == torch.uint8
    plan = plan_memory(net, [lora("0")], (torch.ones(4, 128),))
    weight = 128 * 128 // 2
    scales = plan.bytes.base - 4 * (128 * 128 + 128) - weight
    assert 128 * 128 // 64 * 4 <= scales <= 128 * 128 // 64 * 4 + 1024  # one float per block of 64, and the code book
    assert not plan.notes


# --- transformers -----------------------------------------------------------------------------------


def tiny(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3} | options
    return LlamaForCausalLM(
        LlamaConfig(**config, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    ).train()


def test_methods_differ_as_they_should() -> None:
    ids = torch.ones(2, 64, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}
    with torch.device("meta"):
        model = tiny()
    callbacks = [
        BitFitCallback(add_missing=True),
        LoRACallback(),
        AdapterCallback(),
        FullFineTuningCallback(),
        DiffPruningCallback(),
    ]
    plans = {type(callback).__name__: plan_memory(model, [callback], batch) for callback in callbacks}
    assert not any(plan.notes for plan in plans.values())
    full, diff = plans["FullFineTuningCallback"], plans["DiffPruningCallback"]
    for name in ("BitFitCallback", "LoRACallback", "AdapterCallback"):
        assert plans[name].trained < full.trained / 20
        assert plans[name].total < full.total
    assert full.bytes.delta == 0
    assert diff.bytes.delta > 0.9 * full.bytes.base
    assert diff.total > full.total
    assert plans["LoRACallback"].trained == apply(tiny(), [LoRACallback()]).plan().trainable


def test_checkpointing_and_the_formula() -> None:
    # Wide inner layers and few classes: the layers decide. Then many classes: the logits do.
    for options, tokens in (({"intermediate_size": 512}, 256), ({"vocab_size": 20_000}, 128)):
        model = tiny(hidden_size=128, num_hidden_layers=4, **options).bfloat16()
        ids = torch.ones(1, tokens, dtype=torch.long)
        batch = {"input_ids": ids, "labels": ids}
        whole = plan_memory(model, [LoRACallback(target_modules="all-linear")], batch)
        model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        less = plan_memory(model, [LoRACallback(target_modules="all-linear")], batch)
        assert less.bytes.activations < whole.bytes.activations
        shape = (tokens, 4, 128, options.get("intermediate_size", 160), options.get("vocab_size", 500))
        for plan, checkpointing in ((whole, False), (less, True)):
            estimated = activations_of_decoder(*shape, checkpointing=checkpointing)
            assert 0.6 < estimated / plan.bytes.activations < 1.5


def test_a_step_that_needs_values_falls_back_to_the_formula() -> None:
    class Stubborn(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            batch["input_ids"].numpy()
            return self.model(**batch).loss

    ids = torch.ones(2, 64, dtype=torch.long)
    plan = plan_memory(Stubborn(), [LoRACallback()], {"input_ids": ids, "labels": ids})
    assert "estimated by a formula" in plan.notes[0]
    assert plan.bytes.activations == activations_of_decoder(128, 3, 64, 160, 500, itemsize=4)


def test_a_model_without_its_weights(tmp_path: Path) -> None:
    import transformers

    tiny().config.save_pretrained(tmp_path)  # and no weights beside it
    with without_weights():
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16", local_files_only=True)
        direct, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert all(p.is_meta for p in (*found.parameters(), *direct.parameters()))
    assert (found.dtype, info["missing_keys"], torch.empty(1).device.type) == (torch.bfloat16, [], "cpu")
    with pytest.raises(OSError, match="no file named"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


# --- settings ---------------------------------------------------------------------------------------


def test_engines_of_a_trainers_settings() -> None:
    assert engine_of("auto", 1) == engine_of(None, "auto") == Engine("single")
    assert engine_of("auto", 2) == engine_of("ddp_find_unused_parameters_true", "0,1") == Engine("ddp", 2)
    assert engine_of("deepspeed", 4) == Engine("zero2", 4)
    assert engine_of("deepspeed_stage_3", [0, 1], 2) == Engine("zero3", 4)
    assert engine_of("fsdp", 8) == Engine("fsdp", 8, layers_are_units=False)
    assert engine_of(DDPStrategy(gradient_as_bucket_view=True), 2) == Engine("ddp", 2, gradient_as_bucket_view=True)
    assert engine_of(FSDPStrategy(auto_wrap_policy={nn.Linear}), 8, 2) == Engine("fsdp", 16)
    assert engine_of(FSDPStrategy(auto_wrap_policy={nn.Linear}, sharding_strategy="HYBRID_SHARD"), 8, 2).processes == 8
    assert engine_of(ModelParallelStrategy(), 8) == Engine("fsdp2", 8)
    for wrong in ("deepspeed_stage_2_offload", "fsdp_cpu_offload", FSDPStrategy(sharding_strategy="SHARD_GRAD_OP")):
        with pytest.raises(ArgumentError, match="planned for"):
            engine_of(wrong, 2)


def test_engine_of_a_deepspeed_object() -> None:
    require_deepspeed()
    from lightning.pytorch.strategies import DeepSpeedStrategy

    found = engine_of(DeepSpeedStrategy(stage=2, reduce_bucket_size=1000, overlap_comm=False), 4)
    assert found == Engine("zero2", 4, reduce_bucket_size=1000, overlap_comm=False)
    config = {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 7, "stage3_prefetch_bucket_size": 5}}
    assert engine_of(DeepSpeedStrategy(config=config), 4) == Engine(
        "zero3", 4, max_live_parameters=7, prefetch_bucket_size=5
    )
    with pytest.raises(ArgumentError, match="offloading"):
        engine_of(DeepSpeedStrategy(stage=3, offload_parameters=True), 4)


def test_sizes_and_precisions() -> None:
    assert [bytes_of(text) for text in ("24GiB", "1.5 G", "80gb", "512")] == [24 << 30, 3 << 29, 80 << 30, 512]
    for wrong in ("much", "1.2.3G", "0"):
        with pytest.raises(ArgumentError, match="size of memory"):
            bytes_of(wrong)
    assert [precision_of(p) for p in (None, 32, "bf16", "bf16-true")] == [
        "32-true",
        "32-true",
        "bf16-mixed",
        "bf16-true",
    ]


def test_a_resized_batch() -> None:
    batch = UserDict({"ids": torch.ones(4, 10), "label": torch.ones(4), "weight": torch.ones(3)})
    found = resized(batch, 2, 99)
    assert [tuple(found[key].shape) for key in batch] == [(2, 99), (2,), (3,)]
    with pytest.raises(ArgumentError, match="no tensors"):
        resized(["text"], 2, None)


# --- the verb and the page --------------------------------------------------------------------------


def test_the_verb(tmp_path: Path) -> None:
    tiny().config.save_pretrained(tmp_path / "base")
    (tmp_path / "mine.py").write_text(
        "import lightning, torch, transformers\n"
        "class Mine(lightning.LightningModule):\n"
        "    def __init__(self, base: str):\n"
        "        super().__init__()\n"
        "        self.model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype='bfloat16')\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        return self.model(**batch).loss\n"
        "    def configure_optimizers(self):\n"
        "        steps = self.trainer.estimated_stepping_batches\n"
        "        return torch.optim.SGD(self.parameters(), lr=1 / steps, momentum=0.9)\n"
    )
    argv = ["--model=mine.Mine", "--model.base=base", "--pet+=LoRACallback", "--pet.r=4", "--meta", "--json_output"]
    argv += ["--batch_size=2", "--tokens=32", "--trainer.strategy=fsdp", "--trainer.devices=4"]
    done = subprocess.run(
        [str(Path(sysconfig.get_path("scripts")) / "lightning-pet"), "plan", *argv],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with torch.device("meta"):
        model = tiny().bfloat16()
    ids = torch.empty(2, 32, dtype=torch.long, device="meta")
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}
    own = plan_memory(
        model,
        [LoRACallback(r=4)],
        batch,
        strategy=Engine("fsdp", 4, layers_are_units=False),
        optimizer=lambda p: torch.optim.SGD(p, lr=1, momentum=0.9),
    )
    assert {key: value for key, value in found.items() if key != "others"} == own.as_dict()
    assert [(other["strategy"], other["processes"]) for other in found["others"]] == [
        (name, 1 if name == "single" else 4) for name in ENGINES
    ]
    assert not list(tmp_path.glob("lightning_logs"))


def test_the_page_says_what_the_function_computes() -> None:
    spec = importlib.util.spec_from_file_location("memory_plan", ROOT / "benchmarks" / "memory_plan.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules["memory_plan"] = benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    section = page.partition("**8B on 8 devices**")[2].partition("**70B")[0]
    for method in ("full fine-tuning", "LoRA q, v"):
        plan = benchmark.paper("8B", method)
        assert benchmark.row(method, f"{plan.trained:,}", *benchmark.totals(plan, 8)) in section
