"""Several runs in one Trainer: each is what it would be alone, with its rates, ranks, seeds and dropout."""

from typing import Any

import lightning as L
import pytest
import torch
from models import Data, Module, Net, ckpt, every_step, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from lightning_pet import (
    AdaLoRACallback,
    Adapted,
    AdapterBiasCallback,
    AdapterCallback,
    ArgumentError,
    BitFitCallback,
    CompacterCallback,
    DiffPruningCallback,
    FullFineTuningCallback,
    IA3Callback,
    IntrinsicDimensionCallback,
    LoRACallback,
    PETError,
    PrefixTuningCallback,
    PromptTuningCallback,
    TargetError,
    TasksCallback,
    load_delta,
)
from lightning_pet.model.naming import as_base_names, in_file

QUIET: dict[str, Any] = {"verbose": False}
STEPS = 50
Runs = dict[str, dict[str, Any]]
SEEDED: Runs = {
    "a": {"lr": 0.03, "seed": 0},
    "b": {"lr": 0.01, "r": 4, "seed": 1, "weight_decay": 0.1},
    "c": {"r": 3, "alpha": 9},
}
RATES: Runs = {"slow": {"lr": 0.003}, "fast": {"lr": 0.03}, "decays": {"weight_decay": 0.3}}


class Doubled(Data):
    """The same in another precision."""

    def __init__(self, dtype: torch.dtype, **options: Any) -> None:
        super().__init__(**options)
        self.dtype = dtype

    def rows_of(self, seed: int) -> TensorDataset:
        x, y = super().rows_of(seed).tensors  # type: ignore[attr-defined]
        return TensorDataset(x.to(self.dtype), y)


def optimizer_of(kind: str, options: dict[str, Any]) -> Any:
    rates = {"lr": options.get("lr", 0.02), "weight_decay": options.get("weight_decay", 0.01)}

    def build(module: nn.Module) -> Any:
        if kind == "sgd":
            made: Any = torch.optim.SGD(module.parameters(), momentum=0.9, **rates)
        else:
            made = torch.optim.AdamW(module.parameters(), **rates)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(made, T_max=60)
        return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return build


def method(options: dict[str, Any], dropout: float = 0.2) -> LoRACallback:
    own = {name: options[name] for name in ("r", "alpha") if name in options}
    shape = {"r": 2, "alpha": 4, "dropout": dropout, "target_modules": ["fc1", "fc2"], "modules_to_save": ["head"]}
    return LoRACallback(**{**shape, **own}, verbose=False)


def fitted(
    runs: Runs,
    dtype: torch.dtype,
    kind: str = "adamw",
    split: bool = False,
    callbacks: Any = (),
    ckpt: Any = None,
    **options: Any,
) -> L.LightningModule:
    """All of them in one Trainer."""
    torch.manual_seed(3)
    data = Doubled(dtype, shuffle=options.pop("shuffle", True), rows=40)
    module = Module(Net(dropout=0.3).to(dtype), optimizer_of(kind, {}))
    tasks = TasksCallback(tasks=runs, every_row=True, split=split)
    run = trainer(method({}), tasks, *callbacks, **{"max_epochs": STEPS // 10, **options})
    torch.manual_seed(3)
    run.fit(module, data, ckpt_path=ckpt)
    return module


def alone(own: dict[str, Any], dtype: torch.dtype, kind: str = "adamw", **options: Any) -> dict[str, Tensor]:
    """One of them without anything of this: a plain callback, a plain optimizer, a plain seed."""
    torch.manual_seed(3)
    data = Doubled(dtype, shuffle=options.pop("shuffle", True), rows=40)
    module = Module(Net(dropout=0.3).to(dtype), optimizer_of(kind, own))
    run = trainer(method(own), **{"max_epochs": STEPS // 10, **options})
    torch.manual_seed(own.get("seed", 3))
    run.fit(module, data)
    return tensors(module, "default")


def tensors(module: L.LightningModule, name: str) -> dict[str, Tensor]:
    """As a file has them."""
    return {key: tensor.clone() for key, tensor in in_file(as_base_names(Adapted(module)[name].state_dict())).items()}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    both = [(found[key].double(), expected[key].double()) for key in expected]
    return max(float((one - other).norm() / other.norm().clamp(min=1e-30)) for one, other in both)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 2}], ids=str)
def test_seeds_ranks_and_rates_are_as_alone(kind: str, options: dict[str, Any]) -> None:
    """The order of the data is no run's own, so it is drawn from no seed here."""
    options = {**options, "shuffle": False, "max_epochs": 2}
    module = fitted(SEEDED, torch.float64, kind, **options)
    for name, own in SEEDED.items():
        assert distance(tensors(module, name), alone(own, torch.float64, kind, **options)) < 1e-12


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("split", [False, True])
def test_rates_are_as_alone_in_the_order_of_the_data_that_a_run_alone_has(kind: str, split: bool) -> None:
    module = fitted(RATES, torch.float32, kind, split)
    for name, own in RATES.items():
        assert distance(tensors(module, name), alone(own, torch.float32, kind)) < (0 if split else 1e-6) + 1e-12


def test_a_run_more_or_less_changes_no_other() -> None:
    runs = {**SEEDED, "d": {"r": 5, "lr": 0.05, "seed": 7}}
    every = fitted(runs, torch.float64, max_epochs=2)
    for left in ("a", "d"):
        fewer = fitted({name: own for name, own in runs.items() if name != left}, torch.float64, max_epochs=2)
        for name in runs:
            if name != left:
                assert distance(tensors(fewer, name), tensors(every, name)) < 1e-12
    one = fitted({"c": runs["c"]}, torch.float64, max_epochs=2)
    assert distance(tensors(one, "c"), tensors(every, "c")) < 1e-12


def test_resumed_it_goes_on_with_the_same_numbers(tmp_path: Any) -> None:
    whole = fitted(SEEDED, torch.float64, callbacks=[every_step(tmp_path)], max_epochs=2)
    again = fitted(SEEDED, torch.float64, ckpt=ckpt(tmp_path, 7), max_epochs=2)
    for name in SEEDED:
        assert all(
            torch.equal(one, other)
            for one, other in zip(tensors(whole, name).values(), tensors(again, name).values(), strict=True)
        )
    with pytest.raises(PETError):
        fitted({"a": {}, "x": {}}, torch.float64, ckpt=ckpt(tmp_path, 7), max_epochs=2)


# --- other methods ----------------------------------------------------------------------------------------

METHODS: dict[str, Any] = {
    "dora": lambda **own: LoRACallback(r=2, use_dora=True, dropout=0.1, **own, **QUIET),
    "pissa": lambda **own: LoRACallback(r=2, init="pissa", **own, **QUIET),
    "plus": lambda **own: LoRACallback(r=2, lora_plus_ratio=4, **own, **QUIET),
    "adalora": lambda **own: AdaLoRACallback(**own, **QUIET),
    "adapter": lambda **own: AdapterCallback(bottleneck_size=4, **own, **QUIET),
    "parallel": lambda **own: AdapterCallback(bottleneck_size=4, placement="parallel", **own, **QUIET),
    "compacter": lambda **own: CompacterCallback(bottleneck_size=4, phm_dim=2, **own, **QUIET),
    "bias": lambda **own: AdapterBiasCallback(**own, **QUIET),
    "ia3": lambda **own: IA3Callback(**own, **QUIET),
    "prefix": lambda **own: PrefixTuningCallback(length=3, **own, **QUIET),
    "prompt": lambda **own: PromptTuningCallback(length=3, **own, **QUIET),
    "bitfit": lambda **own: BitFitCallback(**own, **QUIET),
    "pruning": lambda **own: DiffPruningCallback(density=0.1, **own, **QUIET),
    "subspace": lambda **own: IntrinsicDimensionCallback(d=50, **own, **QUIET),
    "full": lambda **own: FullFineTuningCallback(**own, **QUIET),
}


class Classifier(L.LightningModule):
    """BERT with all its dropout."""

    def __init__(self, lr: float, checkpointing: bool = False) -> None:
        super().__init__()
        torch.manual_seed(7)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        config = BertConfig(vocab_size=20, attn_implementation="eager", max_position_embeddings=16, **sizes)
        self.net, self.lr = BertForSequenceClassification(config).double(), lr
        if checkpointing:
            self.net.gradient_checkpointing_enable()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.net(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.net(**batch).loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def texts() -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 20, (12, 5), generator=draw)
    mask = torch.ones(12, 5, dtype=torch.long)
    mask[::3, 3:] = 0
    rows = [
        {"input_ids": i, "attention_mask": m, "labels": n % 2} for n, (i, m) in enumerate(zip(ids, mask, strict=True))
    ]
    return DataLoader(rows, batch_size=4)


def classified(lr: float, seed: int, *callbacks: L.Callback, checkpointing: bool = False, **options: Any) -> Any:
    module = Classifier(lr, checkpointing)
    run = trainer(*callbacks, max_epochs=1, gradient_clip_val=0.5, limit_val_batches=2, **options)
    torch.manual_seed(seed)
    run.fit(module, texts(), texts())
    return module, run


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_as_alone(name: str) -> None:
    runs: Runs = {"a": {"lr": 0.01, "seed": 0}, "b": {"lr": 0.003, "seed": 1}}
    module, run = classified(0.002, 5, METHODS[name](), TasksCallback(tasks=runs, every_row=True))
    for task, own in runs.items():
        seed = {"seed": own["seed"]} if "seed" in METHODS[name]().options() else {}  # random numbers that it has itself
        other, solo = classified(own["lr"], own["seed"], METHODS[name](**seed))
        assert distance(tensors(module, task), tensors(other, "default")) < 1e-9
        logged = float(run.callback_metrics[f"val_loss/{task}"])
        assert logged == pytest.approx(float(solo.callback_metrics["val_loss"]), rel=1e-6)


def test_gradient_checkpointing_repeats_the_dropout_of_each() -> None:
    runs: Runs = {"a": {"lr": 0.01, "seed": 0}, "b": {"lr": 0.003, "seed": 1}}
    method = {"r": 2, "modules_to_save": [], **QUIET}
    module, _ = classified(
        0.002, 5, LoRACallback(**method), TasksCallback(tasks=runs, every_row=True), checkpointing=True
    )
    for task, own in runs.items():
        other, _ = classified(own["lr"], own["seed"], LoRACallback(**method))
        assert distance(tensors(module, task), tensors(other, "default")) < 1e-9


# --- what is refused --------------------------------------------------------------------------------------


class Odd(Module):
    """Does in its step what several runs cannot share."""

    def __init__(self, what: str) -> None:
        super().__init__(Net(norm=what == "norm", dropout=0.0), optimizer_of("adamw", {}))
        self.what = what
        self.automatic_optimization = what != "manual"
        if what == "beside":
            self.own = nn.Linear(3, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        out = self.net(x)
        if self.what == "beside":
            out = self.own(out)
        loss = nn.functional.cross_entropy(out, y)
        if self.what == "negatives":  # each row against all others
            return nn.functional.cross_entropy(out @ out.T, torch.arange(len(out)))
        if self.what == "penalty":
            return loss + sum(p.square().sum() for p in self.parameters() if p.requires_grad)
        if self.what == "layers":
            return loss * (torch.rand(()) > 0.1)
        return {"none": None, "list": [loss]}.get(self.what, loss)

    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        if self.what == "plateau":
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(made["optimizer"])
            made["lr_scheduler"] = {"scheduler": schedule, "monitor": "train_loss"}
        return torch.optim.LBFGS(self.parameters()) if self.what == "lbfgs" else made


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("norm", TargetError, r"net\.norm \(BatchNorm1d\) is in training mode: it mixes the rows"),
        ("negatives", PETError, "neither their mean nor their sum"),
        ("penalty", PETError, "when what the other runs train has other values"),
        ("layers", PETError, r"rand draws random numbers for something that has no rows"),
        ("list", PETError, "training_step returned list"),
        ("manual", ArgumentError, "optimizes by itself"),
        ("plateau", ArgumentError, "ReduceLROnPlateau lowers the learning rates of all runs"),
        ("lbfgs", ArgumentError, "LBFGS takes one step for all parameters together"),
        ("beside", ArgumentError, r"own\.weight, own\.bias trains beside the deltas, and the runs would share it"),
    ],
)
def test_what_runs_cannot_share_is_refused(what: str, error: type[Exception], message: str) -> None:
    module = Odd(what)
    own = {"module": "net"} if what == "beside" else {}
    method = LoRACallback(r=2, target_modules=["fc1", "fc2"], modules_to_save=["head"], **own, **QUIET)
    runs = TasksCallback(tasks={"a": {}, "b": {"seed": 1}}, every_row=True)
    with pytest.raises(error, match=message):
        trainer(method, runs).fit(module, Data())


def test_split_trains_by_any_loss() -> None:
    module = Odd("negatives")
    method = LoRACallback(r=2, target_modules=["fc1", "fc2"], **QUIET)
    runs = TasksCallback(tasks={"a": {"seed": 0}, "b": {"seed": 1}}, every_row=True, split=True)
    trainer(method, runs).fit(module, Data(shuffle=False))
    solo = Odd("negatives")
    torch.manual_seed(1)
    trainer(LoRACallback(r=2, target_modules=["fc1", "fc2"], **QUIET)).fit(solo, Data(shuffle=False))
    assert distance(tensors(module, "b"), tensors(solo, "default")) == 0


def test_each_has_a_file_of_its_own(tmp_path: Any) -> None:
    runs = TasksCallback(
        tasks={"a": {"seed": 0}, "b": {"seed": 1, "r": 4}}, every_row=True, monitor="val_loss", dirpath=str(tmp_path)
    )
    module = Module(Net(dropout=0.0))
    trainer(method({}), runs, limit_val_batches=2).fit(module, Data())
    assert set(runs.best) == {"a", "b"}
    fresh = Module(Net(dropout=0.0))
    for name, path in runs.files.items():
        load_delta(fresh, path, name=name)
    assert list(Adapted(fresh)) == ["a", "b"]
