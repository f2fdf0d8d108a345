"""Many deltas on one base, beside one delta alone: each row of a batch with its own.

CPU time of one thread as a ratio to this library with a single delta of the same method, which every row uses, on the
same batch in the same process; the variants take turns. HF PEFT's mixed batch (``adapter_names``, which it allows in
its evaluation mode only) is measured beside it where PEFT has one, as a ratio to the same figure.

    python benchmarks/many_deltas.py [--short] [--only WORD] [--table NAME] [--write]

A section of its own is a :class:`page.Table` in ``TABLES``, with its cases by their names.
"""

import copy
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import runs_together
import torch
from libraries import METHODS, OURS, PEFT, attach, libraries
from measuring import best
from page import Measure, Options, Row, Table, run
from torch import nn
from trained_models import Batch, linears, llama, loss_of, with_gradients

import lightning_pet

COMMAND = "python benchmarks/many_deltas.py --write"
LORA = Table("many_lora", "Llama 6×512, 128 tokens, LoRA: rows of many tasks / one task", COMMAND)
OTHERS = Table("many_methods", "Llama 6×512, 8×128 tokens, forward: rows of 8 tasks / one task", COMMAND)
TOKEN = Table("many_token", "Llama 6×512, 32×1 token, forward: rows of 32 tasks / one task", COMMAND)
SWITCHES = Table("many_switching", "ms of CPU to let another delta act, BERT 6×384; of a library, BERT 12×768", COMMAND)
HEAD, FULL = "LoRA, q and v, with a head", "whole weights"
Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        method: a name of ``libraries.METHODS``, ``HEAD`` or ``FULL``.
        targets: which linear layers, for methods that are told.
        tasks: deltas that are loaded, and as many of them as there are rows are used.
        rows: of the batch.
        train: a training step, else a forward without gradients.
        tokens: of each row.
        differ: ranks and widths of the tasks differ.
    """

    method: str
    targets: str = "q,v"
    tasks: int = 8
    rows: int = 8
    train: bool = False
    tokens: int = 128
    differ: bool = False

    @property
    def names(self) -> list[str]:
        """Of the rows' deltas, not in order."""
        return [f"d{(7 * row + 3) % self.tasks}" for row in range(self.rows)]


def base(case: Case, short: bool) -> tuple[nn.Module, Batch]:
    """The model and its batch; the same at every call."""
    torch.manual_seed(0)
    sizes = {"rows": case.rows, "tokens": min(8, case.tokens) if short else case.tokens}
    model, batch = llama(64, 2, **sizes) if short else llama(**sizes)
    return (_with_head(model) if case.method == HEAD else model), batch


def _with_head(model: nn.Module) -> nn.Module:
    from transformers import LlamaForSequenceClassification

    config: Any = copy.deepcopy(model.config)
    config.num_labels = 16
    headed = LlamaForSequenceClassification(config)
    headed.model = model
    return headed


def callbacks(case: Case, model: nn.Module, task: int) -> list[Any]:
    """The methods of one task's delta."""
    if case.method == FULL:
        return [lightning_pet.FullFineTuningCallback(verbose=False)]
    name, options = METHODS["LoRA" if case.method == HEAD else case.method].ours
    targeted = case.method == HEAD or METHODS[case.method].targeted
    options = {**options, **({"target_modules": linears(model, case.targets)} if targeted else {})}
    if targeted and case.method == HEAD:
        options["target_modules"] = [path for path in options["target_modules"] if path != "score"]
    if case.differ:
        more = 4 * (task % 4)
        key = next(key for key in ("r", "length", "bottleneck_size") if key in options)
        options[key] = options[key] - 4 + more
    heads = ["score"] if case.method == HEAD else []
    return [getattr(lightning_pet, name)(**options, modules_to_save=heads, verbose=False)]


def with_tasks(case: Case, model: nn.Module, batch: Batch, tasks: int) -> lightning_pet.Adapted:
    """The model with this many deltas, each trained apart (that is: other numbers)."""
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for task in range(min(tasks, 4 if case.differ else 1)):
            fresh, _ = copy.deepcopy((model, batch))
            adapted = lightning_pet.apply(fresh, callbacks(case, fresh, task), forward=lambda m=fresh: m(**batch))
            with torch.no_grad():
                for parameter in fresh.parameters():
                    if parameter.requires_grad and parameter.is_floating_point():
                        parameter.add_(0.01 * torch.randn_like(parameter))
            files.append(Path(folder) / f"{task}.pet.safetensors")
            adapted.save(files[-1])
        for task in range(tasks):
            lightning_pet.load_delta(model, files[task % len(files)], name=f"d{task}", base_check="off")
    return lightning_pet.Adapted(model)


def stepping(model: nn.Module, batch: Batch, train: bool, **more: Any) -> Step:
    """A training step with the parameters that are let train, or a forward."""
    model.train(train)

    def forward() -> None:
        with torch.no_grad():
            model(**batch, **more)

    if not train:
        model.eval()
        return forward
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        loss_of(model, {**batch, **more}).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(case: Case, model: nn.Module, batch: Batch) -> dict[str, Step]:
    """One delta for all rows, and each row with its own."""
    one = copy.deepcopy(model)
    for net in (one, model) if case.train else ():
        with_gradients(net)
    with_tasks(case, one, batch, 1)
    adapted = with_tasks(case, model, batch, case.tasks)
    if case.train:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".pet." in name)
    alone, together = stepping(one, batch, case.train), stepping(model, batch, case.train)

    def rows() -> None:
        with adapted.rows(case.names):
            together()

    return {"one": alone, OURS: rows}


def peft(case: Case, model: nn.Module, batch: Batch) -> Step:
    """HF PEFT's mixed batch, in its evaluation mode.

    Raises:
        ValueError: if it has none for this method.
    """
    import peft as library

    wrapped: Any = attach(with_gradients(model) if case.train else model, batch, PEFT, case.method, case.targets)
    if not isinstance(wrapped, library.PeftModel):
        raise ValueError("not a model of its own")
    for task in range(case.tasks):
        config = copy.deepcopy(wrapped.peft_config["default"])
        config.inference_mode = not case.train
        wrapped.add_adapter(f"d{task}", config)
    for key, parameter in wrapped.named_parameters():
        parameter.requires_grad_("lora_" in key and ".default." not in key and case.train)
    step = stepping(wrapped.eval(), batch, case.train, adapter_names=case.names)
    wrapped.eval()
    step()
    return step


def measure(name: str, case: Case, bound: float | None, options: Options) -> Row:
    """One case: rows of many tasks over one task for all."""
    model, batch = base(case, options.short)
    steps = ours(case, copy.deepcopy(model), batch)
    known = case.method in METHODS and METHODS[case.method].targeted and not case.differ
    if known and PEFT in libraries(case.method):
        try:
            steps[PEFT] = peft(case, copy.deepcopy(model), batch)
        except (ValueError, TypeError, NotImplementedError) as error:
            print(f"# {name}: PEFT has no mixed batch ({error})", file=sys.stderr)
    seconds = best(steps, options.turns)
    one = seconds.pop("one")
    ratios = {key: value / one for key, value in seconds.items()}
    context: dict[str, float | str] = {"one task, ms": f"{1e3 * one:,.1f}"}
    return Row(name, ratios.pop(OURS), ratios, bound, context)


def cases(found: Sequence[tuple[str, Case, float | None]]) -> dict[str, Measure]:
    """By their names."""
    return {name: partial(measure, name, case, bound) for name, case, bound in found}


def lora_cases() -> list[tuple[str, Case, float | None]]:
    """LoRA on queries and values, and on all linear layers."""
    found = []
    for targets, label, bounds in (("q,v", "q and v", (1.05, 1.10)), ("all", "all linear", (1.15, 1.20))):
        for rows in (32, 4):
            for train, bound in zip((False, True), bounds, strict=True):
                case = Case("LoRA", targets, 32, rows, train)
                found.append((f"{label}, {rows} tasks in {rows} rows: {'step' if train else 'forward'}", case, bound))
    return found


STACKED = [
    ("LoRA, ranks 4 to 16", Case("LoRA", differ=True)),
    ("PiSSA", Case("PiSSA")),
    ("OLoRA", Case("OLoRA")),
    ("AdaLoRA", Case("AdaLoRA")),
    *((name, Case(name)) for name in ("(IA)³", "Houlsby", "Pfeiffer", "parallel", "AdapterBias", "BitFit")),
    ("prefix 30", Case("prefix 30")),
    ("prefix 26 to 38", Case("prefix 30", differ=True)),
    ("prompt 20", Case("prompt 20")),
    (HEAD, Case(HEAD)),
]
SLOWER = [("DoRA", 1.5), ("Compacter", 1.5), ("Compacter++", 1.5), ("diff pruning", 3.0), ("SAID", 3.0), (FULL, 3.0)]
GENERATED = [("LoRA, q and v", Case("LoRA")), ("LoRA, all linear", Case("LoRA", "all")), *STACKED]
GENERATED += [(name, Case(name)) for name, bound in SLOWER if bound < 3.0]
TABLES: dict[Table, dict[str, Measure]] = {
    LORA: cases(lora_cases()),
    OTHERS: cases(
        [(name, case, 1.25) for name, case in STACKED]
        + [("last 2 layers", Case("last 2 layers"), 3.0)]
        + [(name, Case(name), bound) for name, bound in SLOWER]
    ),
    TOKEN: cases([(name, replace(case, tasks=32, rows=32, tokens=1), None) for name, case in GENERATED]),
    runs_together.TABLE: runs_together.MEASURES,
}

# --- switching, and deltas from a folder ----------------------------------------------------------


SWITCHED = {
    "LoRA": lambda heads: lightning_pet.LoRACallback(r=8, target_modules=["query", "value"], modules_to_save=heads),
    "(IA)³": lambda heads: lightning_pet.IA3Callback(modules_to_save=heads),
    "Houlsby": lambda heads: lightning_pet.AdapterCallback(modules_to_save=heads),
    "prefix 10": lambda heads: lightning_pet.PrefixTuningCallback(length=10, modules_to_save=heads),
}


def bert(short: bool, hidden: int = 384, layers: int = 6) -> nn.Module:
    """A BERT that classifies; a short vocabulary, as nobody reads it."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    hidden, layers = (64, 2) if short else (hidden, layers)
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": hidden // 32}
    return BertForSequenceClassification(BertConfig(vocab_size=1000, **sizes, intermediate_size=4 * hidden)).eval()


def written(model: nn.Module, method: Any, folder: str, count: int) -> None:
    """Files of deltas that differ; the model is as before."""
    adapted = lightning_pet.apply(model, method)
    for number in range(count):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01 * torch.randn_like(parameter))
        adapted.save(f"{folder}/d{number}.pet.safetensors")
    adapted.remove()


def each(turns: int, act: Callable[[int], object]) -> float:
    """Milliseconds of CPU of the best call."""
    found = []
    for turn in range(turns):
        begin = time.process_time()
        act(turn)
        found.append(time.process_time() - begin)
    return 1e3 * min(found)


def measure_switch(name: str, method: str, heads: list[str], block: bool, options: Options) -> Row:
    """One delta in the place of another: for everybody, or for a block."""
    model = bert(options.short)
    with tempfile.TemporaryDirectory() as folder:
        written(model, SWITCHED[method](heads), folder, 2)
        for number in range(2):
            lightning_pet.load_delta(model, f"{folder}/d{number}.pet.safetensors", name=f"d{number}")
    adapted = lightning_pet.Adapted(model)

    def use(turn: int) -> None:
        with adapted.using(f"d{1 - turn % 2}"):
            pass

    act = use if block else lambda turn: adapted.activate(f"d{1 - turn % 2}")
    return Row(name, each(20 * options.turns, act), {}, 1.0)


def measure_library(name: str, what: str, bound: float, options: Options) -> Row:
    """Deltas of a folder: read and verified, read once more, or in memory; LoRA r=8 on queries and values."""
    model, turns = bert(options.short, 768, 12), 10 * options.turns
    count = 2 if what == "memory" else turns + 1
    with tempfile.TemporaryDirectory() as folder:
        written(model, SWITCHED["LoRA"]([]), folder, count)
        library = lightning_pet.DeltaLibrary(model, folder, resident=2)

        def use(turn: int) -> None:
            with library.using(f"d{turn % count}"):
                pass

        use(count - 1)
        if what == "again":
            each(count, use)
        return Row(name, each(turns, use), {}, bound)


def switch_cases() -> dict[str, Measure]:
    """Switching in the model, with heads and without; then deltas of a folder."""
    found: dict[str, Measure] = {}
    for method in SWITCHED:
        for heads, more in (([], ""), (["classifier"], ", with a head")):
            for block, way in ((False, "activate"), (True, "using")):
                name = f"{way}: {method}{more}"
                found[name] = partial(measure_switch, name, method, heads, block)
    for what, words, bound in (
        ("verified", "library: a delta that was never read, verified", 20.0),
        ("again", "library: one that was read before", 20.0),
        ("memory", "library: one that is in memory", 2.0),
    ):
        found[words] = partial(measure_library, words, what, bound)
    return found


TABLES[SWITCHES] = switch_cases()

if __name__ == "__main__":
    run(__doc__, TABLES)
