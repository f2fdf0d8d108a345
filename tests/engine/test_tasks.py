"""Several deltas trained in one run: each is what it would be alone on its rows, in one file of its own."""

import pickle
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from models import CLASSES, WIDTH, Net, lora, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassRecall
from transformers import BertConfig, BertForSequenceClassification

from lightning_pet import (
    AdaLoRACallback,
    Adapted,
    AdapterCallback,
    ArgumentError,
    BitFitCallback,
    CompacterCallback,
    DeltaFileError,
    DiffPruningCallback,
    FullFineTuningCallback,
    IA3Callback,
    LayerFreezingCallback,
    LoRACallback,
    PETError,
    PrefixTuningCallback,
    PromptTuningCallback,
    TargetError,
    TasksCallback,
    UnsupportedStrategyError,
    extract_delta,
    inspect_delta,
    load_delta,
    load_from_checkpoint,
)

TASKS = ("odd", "even")
QUIET: dict[str, Any] = {"verbose": False}


class Rows(Dataset):
    """Rows of two tasks, in an irregular order; or those of one of them."""

    def __init__(self, only: str | None = None, rows: int = 24, seed: int = 0, words: bool = False) -> None:
        draw = torch.Generator().manual_seed(seed)
        x = torch.randint(1, 20, (rows, 5), generator=draw) if words else torch.randn(rows, WIDTH, generator=draw)
        y = torch.randint(0, 2 if words else CLASSES, (rows,), generator=draw)
        tasks = [TASKS[int(i % 5 in (1, 2))] for i in range(rows)]
        self.batches = [
            {"x": x[own], "y": y[own]} | ({} if only else {"task": [tasks[i] for i in own]})
            for start in range(0, rows, 6)
            if (own := [i for i in range(start, start + 6) if only in (None, tasks[i])])
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]


def loader(*args: Any, **options: Any) -> DataLoader:
    return DataLoader(Rows(*args, **options), batch_size=None)


class Module(L.LightningModule):
    """Knows nothing of tasks: a batch is its arguments."""

    def __init__(
        self, net: nn.Module, optimizer: Any = torch.optim.AdamW, reduction: str = "sum", lr: float = 0.02
    ) -> None:
        super().__init__()
        self.net, self.optimizer, self.reduction, self.lr = net, optimizer, reduction, lr
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        return out if isinstance(out, Tensor) else out.logits

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(x), y, reduction=self.reduction)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self._loss(**batch)
        self.losses.append(float(loss))
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self._loss(**batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self._loss(**batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch["x"])

    def configure_optimizers(self) -> Any:
        return self.optimizer([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def bert() -> nn.Module:
    torch.manual_seed(7)
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, **options
    )
    return BertForSequenceClassification(config)


class Starts(L.Callback):
    """Keeps the deltas as they are before the first step."""

    def __init__(self, folder: Any) -> None:
        self.folder = folder

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, delta in Adapted(pl_module).items():
            delta.save(self.folder / f"{name}-start.pet.safetensors")


@pytest.fixture
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def fitted(net: nn.Module, *callbacks: L.Callback, data: Any = None, **options: Any) -> tuple[Module, L.Trainer]:
    torch.manual_seed(3)
    module = Module(net, **{k: options.pop(k) for k in ("optimizer", "reduction", "lr") if k in options})
    ckpt = options.pop("ckpt", None)
    run = trainer(*callbacks, **{"max_epochs": 2, **options})
    run.fit(module, loader() if data is None else data, ckpt_path=ckpt)
    return module, run


METHODS = {
    "lora": lambda: LoRACallback(r=2, target_modules=["fc1", "fc2"], **QUIET),
    "adapter": lambda: AdapterCallback(bottleneck_size=4, **QUIET),
    "prefix": lambda: PrefixTuningCallback(length=3, projection=False, **QUIET),
    "ia3": lambda: IA3Callback(**QUIET),
    "bitfit": lambda: BitFitCallback(**QUIET),
    "layers": lambda: LayerFreezingCallback(train_last=1, **QUIET),
    "full": lambda: FullFineTuningCallback(**QUIET),
    "prompt": lambda: PromptTuningCallback(length=3, **QUIET),
    "compacter": lambda: CompacterCallback(phm_dim=2, reduction_factor=4, **QUIET),
    "adalora": lambda: AdaLoRACallback(target_r=1, init_r=2, total_step=8, tinit=1, tfinal=2, **QUIET),
    "diff": lambda: DiffPruningCallback(density=0.2, **QUIET),
    "dora": lambda: LoRACallback(r=2, use_dora=True, target_modules=["fc1", "fc2"], **QUIET),
}


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("method", METHODS)
def test_each_task_is_as_if_it_were_alone(method, tmp_path):
    words = method not in ("lora", "full", "dora")
    net = bert if words else lambda: Net(dropout=0.0)
    torch.manual_seed(0)
    module, _ = fitted(
        net(), METHODS[method](), TasksCallback(tasks=list(TASKS)), Starts(tmp_path), data=loader(words=words)
    )
    for task in TASKS:
        one = METHODS[method]()
        one.start_from = tmp_path / f"{task}-start.pet.safetensors"
        solo, _ = fitted(net(), one, data=loader(task, words=words))
        Adapted(module)[task].save(tmp_path / "here.pet.safetensors")
        Adapted(solo)["default"].save(tmp_path / "solo.pet.safetensors")
        here, there = (load(tmp_path / f"{name}.pet.safetensors") for name in ("here", "solo"))
        assert here.keys() == there.keys()
        start = load(tmp_path / f"{task}-start.pet.safetensors")
        assert any(not torch.equal(start[name], here[name]) for name in here if name in start)
        for name in here:
            assert torch.allclose(here[name], there[name], rtol=1e-12, atol=1e-12), name


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Any:
    """Two tasks, trained together, and the files of the end."""
    folder = tmp_path_factory.mktemp("tasks")
    callback = TasksCallback(tasks=list(TASKS), dirpath=str(folder))
    module, run = fitted(Net(dropout=0.0), METHODS["lora"](), callback, limit_val_batches=1.0)
    return module, run, callback


def test_one_file_for_each_task(run):
    module, _, callback = run
    adapted, x = Adapted(module), torch.randn(4, WIDTH)
    assert list(adapted) == list(TASKS)
    assert list(callback.files) == list(TASKS)
    fresh = Net(dropout=0.0)
    for task, path in callback.files.items():
        assert path.name == f"{task}.pet.safetensors"
        assert [method.method for method in inspect_delta(path).methods] == ["lora"]
        load_delta(fresh, path)  # called by the name of the task
        with adapted.using(task), Adapted(fresh).using(task):
            assert torch.equal(module(x), fresh(x))
    adapted.activate("even")
    with Adapted(fresh).using("even"):
        assert torch.equal(module(x), fresh(x))


def test_rows_in_all_steps(run):
    module, run, _ = run
    adapted = Adapted(module)
    (seen,) = run.validate(module, loader(), verbose=False)
    (tested,) = run.test(module, loader(), verbose=False)
    predicted = run.predict(module, loader())
    losses = {task: 0.0 for task in TASKS}
    rows = dict(losses)
    for batch, out in zip(Rows().batches, predicted, strict=True):
        with torch.no_grad(), adapted.rows(batch["task"]):
            logits = module(batch["x"])
        assert torch.allclose(out, logits, atol=1e-6)
        for task in TASKS:
            own = [i for i, name in enumerate(batch["task"]) if name == task]
            losses[task] += len(own) * float(nn.functional.cross_entropy(logits[own], batch["y"][own], reduction="sum"))
            rows[task] += len(own)
    for found, name in ((seen, "val_loss"), (tested, "test_loss")):
        for task in TASKS:
            assert found[f"{name}/{task}"] == pytest.approx(losses[task] / rows[task], rel=1e-5)
        assert found[name] == pytest.approx(sum(losses.values()) / sum(rows.values()), rel=1e-5)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("task", lambda b: b),
        ("task", lambda b: {**b, "task": torch.tensor([TASKS.index(t) for t in b["task"]])}),
        ("which", lambda b: {"x": b["x"], "y": b["y"], "which": tuple(b["task"])}),
        (lambda b: ["odd"] * len(b["x"]), lambda b: {"x": b["x"], "y": b["y"]}),
        (1, lambda b: (b["x"], b["task"], b["y"])),
        ("task", lambda b: {**b, "task": "even"}),
        ("task", lambda b: {**b, "task": 1}),
    ],
)
def test_where_a_batch_says_it(key, change):
    class Pairs(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self._loss(*batch) if isinstance(batch, list) else super().training_step(batch, batch_idx)

    data = DataLoader([change(batch) for batch in Rows().batches], batch_size=None)
    module = Pairs(Net(dropout=0.0))
    torch.manual_seed(3)
    trainer(METHODS["lora"](), TasksCallback(tasks=list(TASKS), key=key), max_epochs=1).fit(module, data)
    moved = {
        name: bool(any(t.any() for n, t in delta.state_dict().items() if n.endswith(".b")))
        for name, delta in Adapted(module).items()
    }
    names = [key(b) if callable(key) else b[key] for b in map(change, Rows().batches)]
    used = {"odd", "even"} if isinstance(names[0], list | tuple | Tensor) else {"even"}
    assert moved == {name: name in ({"odd"} if callable(key) else used) for name in TASKS}


BATCH = Rows().batches[0]


@pytest.mark.parametrize(
    ("tasks", "batch", "message"),
    [
        (["odd", "even"], {**BATCH, "task": ["odd"] * 5 + ["evn"]}, "the task 'evn'.*Did you mean 'even'"),
        (["odd", "even"], {**BATCH, "task": torch.full((6,), 2)}, "the task 2; there are 2, numbered from 0"),
        (["odd", "even"], {**BATCH, "task": ["odd"] * 5}, "tasks of 5 rows, and its tensors have 6"),
        (["odd", "even"], {"x": BATCH["x"], "y": BATCH["y"]}, "key='task': the batch has no such entry.*'x', 'y'"),
        (["odd", "even"], (BATCH["x"], BATCH["y"]), "key='task': the batch is a list of 2 entries"),
        (["odd", "even"], {**BATCH, "task": None}, "the tasks of a batch are None"),
        (["odd", "odd"], BATCH, "'odd' is named twice"),
        ([], BATCH, r"tasks=\[\]"),
        (["a b"], BATCH, "tasks: name='a b'"),
        ({"odd": {"labels": 0}}, BATCH, "labels=0: of the task 'odd'"),
        ({"odd": {"rr": 1}}, BATCH, "'odd' has the option 'rr'.*LoRACallback.*Did you mean 'r'"),
    ],
)
def test_what_cannot_be_is_named(tasks, batch, message):
    net = Net(dropout=0.0)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ArgumentError, match=message):
        fitted(net, METHODS["lora"](), TasksCallback(tasks=tasks), data=DataLoader([batch], batch_size=None))
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_labels_need_a_head_of_the_tasks_own():
    method = LoRACallback(r=2, target_modules=["fc1"], modules_to_save=[], **QUIET)
    with pytest.raises(TargetError, match="no head trains in this run that is a task's own"):
        fitted(Net(), method, TasksCallback(tasks={"odd": {"labels": 3}}))


def test_tasks_need_a_method():
    with pytest.raises(PETError, match="this Trainer has none"):
        fitted(Net(), TasksCallback(tasks=["odd"]))
    with pytest.raises(ArgumentError, match="each task is a delta under its own name"):
        fitted(Net(), LoRACallback(delta="x", **QUIET), TasksCallback(tasks=["odd"]))
    with pytest.raises(ArgumentError, match="unfreeze_every"):
        fitted(Net(), LayerFreezingCallback(unfreeze_every=1, **QUIET), TasksCallback(tasks=["odd"]))
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `TasksCallback`"):
        fitted(Net(), METHODS["lora"](), TasksCallback(tasks=["odd"]), TasksCallback(tasks=["even"]))


def test_a_task_without_rows_is_named():
    with pytest.warns(UserWarning, match="no row in epoch 0 belonged to 'third'") as caught:
        module, _ = fitted(Net(), METHODS["lora"](), TasksCallback(tasks=[*TASKS, "third"]), max_epochs=1)
    assert not [str(one.message) for one in caught if "received" in str(one.message)]
    assert not any(t.any() for n, t in Adapted(module)["third"].state_dict().items() if n.endswith(".b"))


def test_options_of_a_task():
    tasks = {"odd": {"r": 4, "seed": 1, "lr": 0.5}, "even": {"seed": 2, "weight_decay": 0.3}, "third": {"seed": 1}}
    module, run = fitted(Net(), METHODS["lora"](), TasksCallback(tasks=tasks), max_epochs=1)
    groups = {id(p): group for group in run.optimizers[0].param_groups for p in group["params"]}
    names = {name: groups[id(p)] for name, p in module.named_parameters() if id(p) in groups}
    for name, group in names.items():
        assert group["lr"] == (0.5 if "@odd" in name else 0.02)
        assert group["weight_decay"] == (0.3 if "@even" in name else 0.01)
    assert module.net.fc1.pet["lora_default@odd"].a.shape == (4, WIDTH)


def test_starts_differ_and_can_be_repeated(tmp_path):
    starts = []
    for turn in range(2):
        (folder := tmp_path / str(turn)).mkdir()
        tasks = {"odd": {}, "even": {}, "one": {"seed": 5}, "two": {"seed": 5}}
        fitted(Net(), METHODS["lora"](), TasksCallback(tasks=tasks), Starts(folder), max_epochs=1)
        starts.append(
            {task: load(folder / f"{task}-start.pet.safetensors")["fc1.pet.lora_default.a"] for task in tasks}
        )
    assert all(torch.equal(starts[0][task], starts[1][task]) for task in starts[0])
    assert not torch.equal(starts[0]["odd"], starts[0]["even"])
    assert torch.equal(starts[0]["one"], starts[0]["two"])


def load(path: Any) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


class Dropping(Module):
    """A schedule, and dropout in the net: what a resume has to get right."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)]


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, epochs):
    def go(**options: Any) -> tuple[Module, L.Trainer]:
        torch.manual_seed(3)
        module = Dropping(Net(dropout=0.3, norm=True))
        saves = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        callbacks = (lora(dropout=0.2, delta_files=True), TasksCallback(tasks=list(TASKS)))
        ckpt = options.pop("ckpt", None)
        run = trainer(*callbacks, saves, **{"max_epochs": 3, **options})
        run.fit(module, loader(), ckpt_path=ckpt)
        return module, run

    whole, _ = go()
    (tmp_path / "whole").mkdir()
    for file in tmp_path.glob("*.ckpt"):
        file.rename(tmp_path / "whole" / file.name)
    half, _ = go(max_epochs=epochs)
    torch.rand(5)
    again, run = go(ckpt=tmp_path / f"epoch={epochs - 1}.ckpt")
    assert half.losses + again.losses == whole.losses
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), whole.state_dict().values(), strict=True))

    source = tmp_path / "epoch=2.ckpt"
    assert sorted(path.name for path in tmp_path.glob("epoch=2.*")) == [
        "epoch=2.ckpt",
        "epoch=2.even.pet.safetensors",
        "epoch=2.odd.pet.safetensors",
    ]
    with pytest.raises(DeltaFileError, match="holds the deltas of 2 tasks: 'odd', 'even'"):
        load_delta(Module(Net(norm=True)), source)
    everything = load_from_checkpoint(Module(Net(norm=True)), source)
    assert list(Adapted(everything)) == list(TASKS)
    x = torch.randn(4, WIDTH)
    for task in TASKS:
        fresh = Module(Net(norm=True))
        load_delta(fresh, source, name=task)
        beside = Module(Net(norm=True))
        load_delta(beside, tmp_path / f"epoch=2.{task}.pet.safetensors")
        at_end = Module(Net(norm=True))
        load_delta(at_end, tmp_path / f"{task}.pet.safetensors")
        extract_delta(source, tmp_path / "x.pet.safetensors", delta=task)
        assert load(tmp_path / "x.pet.safetensors").keys() == load(tmp_path / f"{task}.pet.safetensors").keys()
        with Adapted(again).using(task), Adapted(everything).using(task), torch.no_grad():
            found = [module.eval()(x) for module in (again, fresh, beside, at_end, everything)]
        assert all(torch.equal(found[0], other) for other in found)
    del run


def test_a_run_with_other_tasks_is_refused(tmp_path):
    saves = ModelCheckpoint(tmp_path, filename="x")
    fitted(Net(), METHODS["lora"](), TasksCallback(tasks=list(TASKS)), saves, max_epochs=1)
    with pytest.raises(DeltaFileError, match=r"lora:default of odd.*lora:default of even.*lora:default of third"):
        fitted(Net(), METHODS["lora"](), TasksCallback(tasks=["odd", "third"]), ckpt=tmp_path / "x.ckpt")


# --- heads of different sizes, figures --------------------------------------------------------------------


def labelled(task_of: Any = None, rows: int = 12) -> DataLoader:
    """Two labels of one task, five of the other; each a function of the input."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(rows, WIDTH, generator=draw)
    tasks = [TASKS[int(i % 3 == 0)] for i in range(rows)]
    y = torch.tensor([int(x[i, 0] > 0) if tasks[i] == "odd" else int(x[i, 1:].abs().argmax()) for i in range(rows)])
    batch = {"x": x, "y": y, "task": tasks}
    if task_of is not None:
        own = [i for i in range(rows) if tasks[i] == task_of]
        batch = {"x": x[own], "y": y[own]}
    return DataLoader([batch], batch_size=None)


LABELS = {"odd": {"labels": 2, "seed": 1}, "even": {"labels": 5, "seed": 2}}


@pytest.mark.usefixtures("_double")
def test_heads_of_different_sizes(tmp_path):
    callback = TasksCallback(tasks=LABELS, dirpath=str(tmp_path))
    module, run = fitted(
        Net(dropout=0.0), METHODS["lora"](), callback, data=labelled(), reduction="mean", max_epochs=4, lr=0.05
    )
    for task, own in LABELS.items():
        assert inspect_delta(tmp_path / f"{task}.pet.safetensors").tensors[-1].shape == (own["labels"], 8)
        fresh = Net(dropout=0.0)
        load_delta(fresh, tmp_path / f"{task}.pet.safetensors", name=task)
        with Adapted(module).using(task):
            x = torch.randn(3, WIDTH)
            assert module(x).shape == (3, own["labels"])
            assert torch.equal(module(x), fresh(x))
    (predicted,) = run.predict(module, labelled())
    batch = next(iter(labelled()))
    assert [len(row) for row in predicted] == [LABELS[task]["labels"] for task in batch["task"]]
    for row, x, task in zip(predicted, batch["x"], batch["task"], strict=True):
        with Adapted(module).using(task), torch.no_grad():
            assert torch.allclose(row, module(x[None])[0])


def test_losses_of_parts_are_weighted_by_rows(tmp_path):
    """One call for all rows, and one for each task, give the same losses and weights."""
    runs = [
        fitted(
            Net(dropout=0.0),
            METHODS["lora"](),
            TasksCallback(tasks={"odd": {"seed": 1}, "even": {"seed": 2}}, split=split, dirpath=str(tmp_path)),
            reduction="mean",
            optimizer=torch.optim.SGD,
        )[0]
        for split in (False, True)
    ]
    assert len(runs[1].losses) > len(runs[0].losses)
    for one, other in zip(*(run.state_dict().values() for run in runs), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


class Counting(Module):
    """Logs numbers and metrics in all ways."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.accuracy = MulticlassAccuracy(num_classes=5, average="micro")
        self.several = MetricCollection(
            {"macro": MulticlassF1Score(num_classes=5), "recall": MulticlassRecall(num_classes=5)}
        )
        self.seen: list[Any] = []

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch["x"])
        logits = nn.functional.pad(logits, (0, 5 - logits.shape[1]), value=-1e9)
        loss = nn.functional.cross_entropy(logits, batch["y"])
        self.log("val_loss", loss)
        self.log("rows", float(len(logits)), reduce_fx="sum")
        self.accuracy(logits, batch["y"])
        self.log("val_acc", self.accuracy)
        self.several.update(logits, batch["y"])
        self.log_dict(self.several)
        self.log("now", self.accuracy.compute())
        return {"loss": loss, "logits": list(logits)}

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((outputs, batch))


def test_figures_of_each_task(tmp_path):
    module = Counting(Net(dropout=0.0))
    torch.manual_seed(3)
    callback = TasksCallback(tasks=LABELS, dirpath=str(tmp_path))
    run = trainer(METHODS["lora"](), callback, max_epochs=1, limit_val_batches=1.0)
    run.fit(module, labelled())
    (found,) = run.validate(module, labelled(rows=20), verbose=False)
    assert "forward" not in vars(module.accuracy)
    counts, values = {}, {}
    for task in TASKS:
        (batch,) = labelled(task, rows=20)
        fresh = Counting(Net(dropout=0.0))
        load_delta(fresh, tmp_path / f"{task}.pet.safetensors", name=task)
        (values[task],) = trainer(limit_val_batches=1.0).validate(fresh, labelled(task, rows=20), verbose=False)
        counts[task] = len(batch["x"])
        for name, value in values[task].items():
            assert found[f"{name}/{task}"] == pytest.approx(value, abs=1e-6), name
    mean = sum(counts[task] * values[task]["val_loss"] for task in TASKS) / 20
    assert found["val_loss"] == pytest.approx(mean)
    assert found["rows"] == 20
    assert found["val_acc"] == pytest.approx(sum(counts[t] * values[t]["val_acc"] for t in TASKS) / 20)
    outputs, batch = module.seen[-1]
    assert len(outputs["logits"]) == 20
    assert outputs["loss"] == pytest.approx(mean)
    for row, x, task in zip(outputs["logits"], batch["x"], batch["task"], strict=True):
        with Adapted(module).using(task), torch.no_grad():
            assert torch.allclose(row[: LABELS[task]["labels"]], module(x[None])[0], atol=1e-6)


def test_the_best_of_each_task(tmp_path):
    """Each task has its own best epoch; the file is of that one, also after a resume."""

    class Up(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            best = {2: 1, 5: 2}[self(batch["x"]).shape[1]]
            self.log("score", -abs(float(self.current_epoch - best)))

    def go(folder: Any, epochs: int, ckpt: Any = None) -> tuple[TasksCallback, L.LightningModule]:
        torch.manual_seed(3)
        callback = TasksCallback(tasks=LABELS, dirpath=str(folder), monitor="score", mode="max")
        saves = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        module = Up(Net(dropout=0.0))
        run = trainer(METHODS["lora"](), callback, saves, max_epochs=epochs, limit_val_batches=1.0)
        run.fit(module, labelled(), labelled(), ckpt_path=ckpt)
        return callback, module

    callback, _ = go(tmp_path / "whole", 4)
    assert callback.best == {"odd": 0.0, "even": 0.0}
    go(tmp_path / "half", 2)
    again, _ = go(tmp_path / "half", 4, tmp_path / "half" / "epoch=1.ckpt")
    assert again.best == callback.best
    for task, epoch in (("odd", 1), ("even", 2)):
        best, kept = load(tmp_path / "whole" / f"{task}.pet.safetensors"), tmp_path / "x.pet.safetensors"
        extract_delta(tmp_path / "whole" / f"epoch={epoch}.ckpt", kept, delta=task)
        at_best = load(kept)
        assert best.keys() == at_best.keys()
        assert all(torch.equal(best[name], at_best[name]) for name in best)
        resumed = load(tmp_path / "half" / f"{task}.pet.safetensors")
        assert all(torch.equal(best[name], resumed[name]) for name in best)


def test_a_figure_that_no_task_has():
    callback = TasksCallback(tasks=list(TASKS), monitor="val_acc")
    run = trainer(METHODS["lora"](), callback, max_epochs=1, limit_val_batches=1.0)
    with pytest.raises(ArgumentError, match=r"monitor='val_acc'.*There are 'val_loss'"):
        run.fit(Module(Net()), loader(), loader())


def test_a_transformers_model_computes_its_own_loss():
    class Own(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = bert()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 20, (6, 5), generator=draw)
    tasks = ["odd", "even"] * 3
    labels = torch.tensor([1, 4, 0, 3, 1, 2])
    module = Own()
    run = trainer(LoRACallback(r=2, **QUIET), TasksCallback(tasks=LABELS), max_epochs=1)
    run.fit(module, DataLoader([{"input_ids": ids, "labels": labels, "task": tasks}], batch_size=None))
    assert module.model.num_labels == 2
    with Adapted(module).using("even"):
        assert module.model(ids).logits.shape == (6, 5)


# --- deltas that are there already ------------------------------------------------------------------------


def test_files_of_tasks_are_validated_in_one_model(run):
    """Deltas that were loaded, each with a head of its own: rows go to them, and nothing is trained."""
    module, first, callback = run
    loaded = Module(Net(dropout=0.0))
    for task in TASKS:
        load_delta(loaded, callback.files[task], name=task)
    Adapted(loaded).activate()
    again = trainer(METHODS["lora"](), TasksCallback(tasks=list(TASKS)), limit_val_batches=1.0)
    (there,) = first.validate(module, loader(), verbose=False)
    (here,) = again.validate(loaded, loader(), verbose=False)
    assert here == pytest.approx(there)
    assert Adapted(loaded).active == ()
    for one, other in zip(again.predict(loaded, loader()), first.predict(module, loader()), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    with pytest.raises(ArgumentError, match=r"'odd' of this model has values of its own for head.*start_from"):
        again.fit(loaded, loader())


def test_tasks_start_from_files(run):
    module, _, callback = run
    tasks = {task: {"start_from": str(path)} for task, path in callback.files.items()}
    again, _ = fitted(Net(dropout=0.0), METHODS["lora"](), TasksCallback(tasks=tasks), max_epochs=0)
    for task in TASKS:
        one, other = (Adapted(m)[task].state_dict() for m in (again, module))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_second_fit_goes_on(tmp_path):
    callbacks = (METHODS["lora"](), TasksCallback(tasks=list(TASKS), dirpath=str(tmp_path)))
    module, run = fitted(Net(dropout=0.0), *callbacks, max_epochs=1)
    before = {task: load(tmp_path / f"{task}.pet.safetensors") for task in TASKS}
    run.fit_loop.max_epochs = 2
    run.fit(module, loader())
    after = {task: load(tmp_path / f"{task}.pet.safetensors") for task in TASKS}
    assert all(not torch.equal(before[t]["head.weight"], after[t]["head.weight"]) for t in TASKS)
    other = trainer(METHODS["lora"](), TasksCallback(tasks=list(TASKS), dirpath=str(tmp_path)), max_epochs=1)
    other.fit(module, loader())
    assert list(Adapted(module)) == list(TASKS)
    Adapted(module)["odd"].remove()
    assert list(Adapted(module)) == ["even"]
    Adapted(module).remove()
    assert sorted(module.net.state_dict()) == sorted(Net().state_dict())


def test_what_is_shared_goes_with_each(tmp_path):
    """A layer of the user's own beside the base trains with all tasks, and is in the file of each."""

    class Wide(Module):
        def __init__(self) -> None:
            super().__init__(Net(dropout=0.0, head=False, norm=True))
            self.top = nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.top(self.net(x))

    torch.manual_seed(3)
    module = Wide()
    top = module.top.weight.detach().clone()
    method = LoRACallback(r=2, target_modules=["fc1", "fc2"], module="net", modules_to_save=[], **QUIET)
    run = trainer(method, TasksCallback(tasks=list(TASKS), dirpath=str(tmp_path)), max_epochs=1)
    run.fit(module, loader())
    assert not torch.equal(top, module.top.weight)
    module.eval()
    x, outputs = torch.randn(4, WIDTH), {}
    adapted = Adapted(module)
    for task in TASKS:
        with adapted.using(task), torch.no_grad():
            outputs[task] = module(x)
    for task in (*TASKS, *TASKS):
        adapted.activate(task)
        assert torch.equal(module(x), outputs[task])
        fresh = Wide().eval()
        load_delta(fresh, tmp_path / f"{task}.pet.safetensors")
        assert torch.equal(fresh.net(x), module.net(x))


def test_accumulation_clipping_and_checkpointing(tmp_path):
    """Rows of several tasks with what Trainers do to gradients, and activations that are computed again."""
    results = []
    for again in (False, True):
        net = bert()
        if again:
            net.gradient_checkpointing_enable({"use_reentrant": False})
        module, _ = fitted(
            net,
            LoRACallback(r=2, **QUIET),
            TasksCallback(tasks=list(TASKS), dirpath=str(tmp_path)),
            data=loader(words=True),
            accumulate_grad_batches=2,
            gradient_clip_val=0.1,
            max_epochs=1,
        )
        results.append({t: Adapted(module)[t].state_dict() for t in TASKS})
    for task in TASKS:
        for name, value in results[0][task].items():
            assert torch.allclose(value, results[1][task][name], atol=1e-6), name


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (lambda: AdapterCallback(**QUIET), {}, "AdapterCallback beside TasksCallback: not tested with ModelParallel"),
        (lambda: LoRACallback(use_dora=True, **QUIET), {}, "LoRACallback beside TasksCallback.*not DoRA"),
        (lambda: LoRACallback(**QUIET), {"split": True}, r"split=True\): ModelParallelStrategy shares parameters"),
        (lambda: LoRACallback(**QUIET), {"tasks": {"odd": {"labels": 2}}}, "'odd' has a number of labels of its own"),
    ],
)
def test_what_engines_that_shard_cannot_is_refused_by_name(method, options, message):
    shards = SimpleNamespace(strategy=ModelParallelStrategy(), callbacks=[method()])
    with pytest.raises(UnsupportedStrategyError, match=message):
        TasksCallback(**{"tasks": list(TASKS), **options}).setup(shards, None, "fit")


class ByHand(Module):
    """Optimizes by itself."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self._loss(**batch))
        optimizer.step()


def test_manual_optimization(tmp_path):
    weights = []
    for kind in (Module, ByHand):
        torch.manual_seed(3)
        module = kind(Net(dropout=0.0))
        tasks = TasksCallback(tasks={"odd": {"seed": 1}, "even": {"seed": 2}}, dirpath=str(tmp_path))
        trainer(METHODS["lora"](), tasks, max_epochs=1).fit(module, loader())
        weights.append(module.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    callbacks = (METHODS["lora"](), TasksCallback(tasks=LABELS))
    with pytest.raises(ArgumentError, match="ByHand optimizes by itself"):
        trainer(*callbacks, max_epochs=1).fit(ByHand(Net()), labelled())


def test_what_one_does_with_deltas_afterwards(tmp_path):
    def trained() -> tuple[Module, Adapted]:
        module, _ = fitted(Net(dropout=0.0), METHODS["lora"](), TasksCallback(tasks=list(TASKS), dirpath=str(tmp_path)))
        return module, Adapted(module)

    x = torch.randn(3, WIDTH)
    module, adapted = trained()
    with adapted.using("odd"):
        odd = module(x)
    adapted.replace("odd", tmp_path / "odd.pet.safetensors")
    adapted.load("third", tmp_path / "odd.pet.safetensors")
    for copied in (deepcopy(module.net), pickle.loads(pickle.dumps(module.net))):
        with Adapted(copied).using("third"):
            assert torch.allclose(copied(x), odd)
    with adapted.rows(["third", "odd", None]):
        assert torch.allclose(module(x)[:2], odd[:2], atol=1e-6)
    with pytest.raises(PETError, match="carries the deltas of the tasks 'odd', 'even', none of which acts by itself"):
        trainer(max_epochs=1).fit(module, loader("odd"))
    adapted.activate("even")
    with pytest.warns(UserWarning, match="was given no callback for it"):
        trainer(max_epochs=1).fit(module, loader("even"))
    module, adapted = trained()
    with pytest.warns(UserWarning, match="is a part of the base now"):
        adapted["odd"].merge_()
    assert (list(adapted), adapted.active) == (["even"], ())
    assert torch.allclose(module(x), odd, atol=1e-6)
