"""Several deltas trained in one run: each is what it would be alone on its rows, in one file of its own."""

from typing import Any

import lightning as L
import pytest
import torch
from models import CLASSES, WIDTH, Net, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertForSequenceClassification

from lightning_pet import (
    Adapted,
    AdapterCallback,
    ArgumentError,
    BitFitCallback,
    FullFineTuningCallback,
    IA3Callback,
    LayerFreezingCallback,
    LoRACallback,
    PETError,
    PrefixTuningCallback,
    TasksCallback,
    inspect_delta,
    load_delta,
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

    def __init__(self, net: nn.Module, optimizer: Any = torch.optim.AdamW, reduction: str = "sum") -> None:
        super().__init__()
        self.net, self.optimizer, self.reduction = net, optimizer, reduction
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
        return self.optimizer([p for p in self.parameters() if p.requires_grad], lr=0.02)


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
    module = Module(net, **{k: options.pop(k) for k in ("optimizer", "reduction") if k in options})
    run = trainer(*callbacks, **{"max_epochs": 2, **options})
    run.fit(module, loader() if data is None else data, ckpt_path=options.get("ckpt"))
    return module, run


METHODS = {
    "lora": lambda: LoRACallback(r=2, target_modules=["fc1", "fc2"], **QUIET),
    "adapter": lambda: AdapterCallback(bottleneck_size=4, **QUIET),
    "prefix": lambda: PrefixTuningCallback(length=3, projection=False, **QUIET),
    "ia3": lambda: IA3Callback(**QUIET),
    "bitfit": lambda: BitFitCallback(**QUIET),
    "layers": lambda: LayerFreezingCallback(train_last=1, **QUIET),
    "full": lambda: FullFineTuningCallback(**QUIET),
    "dora": lambda: LoRACallback(r=2, use_dora=True, target_modules=["fc1", "fc2"], **QUIET),
}


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("method", METHODS)
def test_each_task_is_as_if_it_were_alone(method, tmp_path):
    words = method in ("adapter", "prefix", "ia3", "bitfit", "layers")
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
        assert any(not torch.equal(start[name], here[name]) for name in here)
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
    losses, rows = 0.0, 0
    for batch, out in zip(Rows().batches, predicted, strict=True):
        with torch.no_grad(), adapted.rows(batch["task"]):
            logits = module(batch["x"])
        assert torch.allclose(out, logits, atol=1e-6)
        loss = nn.functional.cross_entropy(logits, batch["y"], reduction="none")
        losses, rows = losses + float(loss.sum()), rows + len(loss)
    assert len({len(batch["x"]) for batch in Rows().batches}) == 1
    del losses, rows, seen, tested


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


def test_tasks_need_a_method():
    with pytest.raises(PETError, match="this Trainer has none"):
        fitted(Net(), TasksCallback(tasks=["odd"]))
    with pytest.raises(ArgumentError, match="each task is a delta under its own name"):
        fitted(Net(), LoRACallback(delta="x", **QUIET), TasksCallback(tasks=["odd"]))
    with pytest.raises(ArgumentError, match="unfreeze_every"):
        fitted(Net(), LayerFreezingCallback(unfreeze_every=1, **QUIET), TasksCallback(tasks=["odd"]))
    with pytest.raises(ArgumentError, match="has 2 TasksCallback"):
        fitted(Net(), METHODS["lora"](), TasksCallback(tasks=["odd"]), TasksCallback(tasks=["even"]))


def test_a_task_without_rows_is_named():
    with pytest.warns(UserWarning, match="no row in epoch 0 belonged to 'third'"):
        module, _ = fitted(Net(), METHODS["lora"](), TasksCallback(tasks=[*TASKS, "third"]), max_epochs=1)
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
