"""How the work on a model grows: attach, plan, disable, save, load, merge and remove a LoRA on all linear layers.

Each verb on Llamas of 24, 48 and 96 narrow layers, in CPU time of one thread, beside HF PEFT in the same process; the
best of a few lives of a delta, which the libraries take in turns. Then the factor from one number of layers to twice
as many, in time and in calls of functions; a model of 294 million weights; the shapes of Llama 8B and 70B on the
meta device; and reading files.

    python benchmarks/growth.py [--short] [--only WORD] [--write]
"""

import cProfile
import os
import pstats
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from libraries import OURS, PEFT
from measuring import cpu_seconds
from page import Options, Row, Table, run
from torch import nn

COMMAND = "python benchmarks/growth.py --write"
SECONDS = Table("growth", "Llama of 96 layers, all linear: CPU seconds", COMMAND, digits=3)
FACTORS = Table("growth_factors", "CPU time for twice the layers, 24 to 96: times", COMMAND)
WEIGHTS = Table("growth_weights", "Llama of 294 million weights, all linear: CPU seconds", COMMAND, digits=2)
ONCE = Table("growth_once", "CPU seconds", COMMAND, digits=2)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VERBS = {"attach by name": 1.2, "plan": None, "disabled": None, "save": None, "load": 1.3, "merge": 1.0, "remove": None}
FACTOR = 2.3
Verb = tuple[str, Callable[[], Any]]


def llama(layers: int, width: int = 32, device: str = "cpu", **sizes: int) -> nn.Module:
    """A decoder with a head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    given = {"vocab_size": 64, "intermediate_size": 2 * width, "num_attention_heads": max(2, width // 64)} | sizes
    config = LlamaConfig(hidden_size=width, num_hidden_layers=layers, pad_token_id=0, **given)
    with torch.device(device):
        return LlamaForCausalLM(config).eval()


def ours(base: Callable[[], nn.Module], folder: Path, targets: list[str] | str = LINEAR) -> Any:
    """The life of a delta of this library: what is measured is between two yields."""
    from lightning_pet import LoRACallback, apply, load_delta, save_delta

    file = folder / "ours.pet.safetensors"
    callback = LoRACallback(r=8, target_modules=targets, modules_to_save=[], verbose=False)
    model, fresh, other = base(), base(), base()
    adapted = yield "attach by name", lambda: apply(model, [callback])
    yield "plan", adapted.plan
    yield "disabled", lambda: adapted.disabled().__enter__()
    yield "save", lambda: save_delta(model, file)
    loaded = yield "load", lambda: load_delta(fresh, file)
    yield "merge", loaded.merge_
    other_adapted = apply(other, [LoRACallback(r=8, target_modules=targets, modules_to_save=[], verbose=False)])
    yield "remove", other_adapted.remove


def peft(base: Callable[[], nn.Module], folder: Path) -> Any:
    """The same with HF PEFT."""
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR)
    model, fresh = base(), base()
    adapted = yield "attach by name", lambda: get_peft_model(model, config)
    yield "plan", adapted.get_nb_trainable_parameters
    yield "disabled", lambda: adapted.disable_adapter().__enter__()
    yield "save", lambda: adapted.save_pretrained(folder / "peft")
    loaded = yield "load", lambda: PeftModel.from_pretrained(fresh, folder / "peft")
    yield "merge", loaded.merge_and_unload
    yield "remove", adapted.unload


def lived(life: Any, measure: Callable[[Callable[[], Any]], tuple[float, Any]]) -> dict[str, float]:
    """Every verb of a life measured."""
    found, verb = {}, next(life)
    while True:
        found[verb[0]], result = measure(verb[1])
        try:
            verb = life.send(result)
        except StopIteration:
            return found


def seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds and the result."""
    results: list[Any] = []
    return cpu_seconds(lambda: results.append(action())), results[0]


def calls(action: Callable[[], Any]) -> tuple[float, Any]:
    """Calls of functions and the result."""
    profile = cProfile.Profile()
    result = profile.runcall(action)
    return float(pstats.Stats(profile).total_calls), result  # type: ignore[attr-defined]


@cache
def lives(layers: int, turns: int) -> dict[str, dict[str, float]]:
    """Best seconds of every verb by library, the libraries taking turns."""
    base = partial(llama, layers)
    found: dict[str, dict[str, float]] = {OURS: {}, PEFT: {}}
    for _ in range(turns):
        for library, life in ((OURS, ours), (PEFT, peft)):
            with tempfile.TemporaryDirectory() as folder:
                for verb, taken in lived(life(base, Path(folder)), seconds).items():
                    found[library][verb] = min(taken, found[library].get(verb, taken))
    return found


@cache
def counted(layers: int) -> dict[str, float]:
    """Calls of every verb of ours."""
    with tempfile.TemporaryDirectory() as folder:
        return lived(ours(partial(llama, layers), Path(folder)), calls)


def numbers(options: Options) -> tuple[int, int, int]:
    """Of layers."""
    return (2, 4, 8) if options.short else (24, 48, 96)


def lives_of(options: Options) -> list[dict[str, dict[str, float]]]:
    """At every number of layers, after one life that does what is done once."""
    turns = 1 if options.short else min(options.turns, 3)
    lives(1, 1)
    return [lives(layers, turns) for layers in numbers(options)]


def measure_seconds(verb: str, options: Options) -> Row:
    """One verb at 96 layers."""
    found = lives_of(options)[-1]
    share = VERBS[verb]
    return Row(verb, found[OURS][verb], {PEFT: found[PEFT][verb]}, share and share * found[PEFT][verb])


def measure_role(options: Options) -> Row:
    """Attach by role, which needs a look at the model."""
    lives_of(options)
    layers, turns = numbers(options)[-1], 1 if options.short else min(options.turns, 3)
    taken = []
    for _ in range(turns):
        with tempfile.TemporaryDirectory() as folder:
            _, action = next(ours(partial(llama, layers), Path(folder), ["attention", "ffn"]))
            taken.append(cpu_seconds(action))
    return Row("attach by role", min(taken))


def measure_factor(verb: str, options: Options) -> Row:
    """The factor of one verb: in calls the largest; in time, which a shared machine disturbs, the mean."""
    few, _, many = lives_of(options)
    times = {name: (many[name][verb] / few[name][verb]) ** 0.5 for name in (OURS, PEFT)}
    counted(1)
    found = [counted(layers)[verb] for layers in numbers(options)]
    factor = max(after / before for before, after in pairwise(found))
    return Row(verb, times[OURS], {PEFT: times[PEFT]}, FACTOR, {"lightning_pet, calls": factor})


@cache
def heavy(short: bool) -> dict[str, dict[str, float]]:
    """Lives of a delta on real weights, the best of two."""
    sizes = {"layers": 2, "width": 64} if short else {"layers": 22, "width": 1024, "intermediate_size": 2816}
    lives(1, 1)
    made = llama(**sizes).state_dict()

    def base() -> nn.Module:
        model = llama(**sizes, device="meta")
        model.load_state_dict({name: tensor.clone() for name, tensor in made.items()}, assign=True)
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        return model

    found: dict[str, dict[str, float]] = {OURS: {}, PEFT: {}}
    for _ in range(1 if short else 2):
        for library, life in ((OURS, ours), (PEFT, peft)):
            with tempfile.TemporaryDirectory() as folder:
                for verb, taken in lived(life(base, Path(folder)), seconds).items():
                    found[library][verb] = min(taken, found[library].get(verb, taken))
    return found


def measure_heavy(verb: str, options: Options) -> Row:
    """One verb on real weights."""
    found, share = heavy(options.short), VERBS[verb]
    return Row(verb, found[OURS][verb], {PEFT: found[PEFT][verb]}, share and share * found[PEFT][verb])


SHAPES = {
    "8B": {"layers": 32, "width": 4096, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128_256},
    "70B": {"layers": 80, "width": 8192, "intermediate_size": 28672, "num_key_value_heads": 8, "vocab_size": 128_256},
}


def measure_meta(shape: str, bound: float, options: Options) -> Row:
    """Attach by name to a model without storage."""
    from peft import LoraConfig, get_peft_model

    from lightning_pet import LoRACallback, apply

    lives(1, 1)
    base = partial(llama, **SHAPES[shape], device="meta")
    callback = partial(LoRACallback, r=8, target_modules=LINEAR, modules_to_save=[], verbose=False)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR)
    turns = 1 if options.short else 3
    ours = min(cpu_seconds(partial(apply, base(), [callback()])) for _ in range(turns))
    peft = min(cpu_seconds(partial(get_peft_model, base(), config, low_cpu_mem_usage=True)) for _ in range(turns))
    return Row(f"attach to {shape} on meta", ours, {PEFT: peft}, bound)


def measure_inspect(options: Options) -> Row:
    """A process that looks into a delta file."""
    from lightning_pet import LoRACallback, apply, save_delta

    with tempfile.TemporaryDirectory() as folder:
        model, file = llama(*numbers(options)[-1:]), Path(folder) / "a.pet.safetensors"
        apply(model, [LoRACallback(r=8, target_modules=LINEAR, modules_to_save=[], verbose=False)])
        save_delta(model, file)
        command = [str(Path(sys.executable).with_name("lightning-pet")), "inspect", str(file)]

        def once() -> float:
            before = os.times()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            after = os.times()
            return after.children_user + after.children_system - before.children_user - before.children_system

        return Row("`lightning-pet inspect` of a delta file, its process", min(once() for _ in range(3)), bound=0.5)


def opened(action: Callable[[], Any]) -> list[str]:
    """Paths of the files that are opened."""
    found: list[str] = []
    listens = True

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if listens and event == "open":
            found.append(str(args[0]))

    sys.addaudithook(hook)  # for good: there is no way to take one away
    action()
    listens = False
    return found


def measure_last_good(options: Options) -> Row:
    """The newest good one of fifty checkpoints, and how many files it opens."""
    import lightning.pytorch as pl

    from lightning_pet import LoRACallback, last_good

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(16)))

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.model(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])

    count = 3 if options.short else 50
    quiet: dict[str, Any] = dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary"], False)
    with tempfile.TemporaryDirectory() as folder:
        saves = pl.callbacks.ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)
        callback = LoRACallback(r=8, target_modules=["re:model.*"], modules_to_save=[], verbose=False)
        trainer = pl.Trainer(accelerator="cpu", max_steps=count, max_epochs=-1, callbacks=[callback, saves], **quiet)
        trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(count, 64), batch_size=1))
        taken = min(cpu_seconds(lambda: last_good(folder)) for _ in range(3))
        read = sum(path.endswith(".ckpt") for path in set(opened(lambda: last_good(folder))))
    return Row(f"`last_good` among {count} checkpoints", taken, context={"files read": str(read)})


TABLES = {
    SECONDS: {verb: partial(measure_seconds, verb) for verb in VERBS} | {"attach by role": measure_role},
    FACTORS: {verb: partial(measure_factor, verb) for verb in VERBS},
    WEIGHTS: {verb: partial(measure_heavy, verb) for verb in VERBS},
    ONCE: {
        "attach to 8B on meta": partial(measure_meta, "8B", 1.0),
        "attach to 70B on meta": partial(measure_meta, "70B", 3.0),
        "inspect": measure_inspect,
        "last_good": measure_last_good,
    },
}

if __name__ == "__main__":
    run(__doc__, TABLES)
