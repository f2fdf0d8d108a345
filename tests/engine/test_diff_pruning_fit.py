"""Diff pruning in a fit: its stages, its optimizer groups, exact resume, precision, several processes."""

import copy
import math
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from diff_runs import DENSITY, STEPS, diff, differences, flat, run
from lightning.pytorch.callbacks import Callback, EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from models import Data, Module, Net, adamw, ckpt, digest, fit, sgd, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_pet.callbacks.diff_pruning import density as figures
from lightning_pet.callbacks.diff_pruning.callback import DiffPruningCallback
from lightning_pet.errors import ArgumentError, DeadSiteError, UnsupportedStrategyError
from lightning_pet.layers.gated_weight import expected_open
from lightning_pet.operations.adapted import Adapted
from lightning_pet.operations.delta import load_delta, save_delta

SIZE = 6 * 8 + 8 + 8 + 8 + 8 * 8 + 8  # two linears and a batch norm; the head is dense


class Steps(Callback):
    """What the model looked like at the start of every batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, bool, int]] = []
        self.rates: list[list[float]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        gated = not differences(pl_module)[0].is_fixed
        self.seen.append((trainer.global_step, gated, int(flat(pl_module).count_nonzero())))
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def test_both_stages_in_one_fit(tmp_path: Path) -> None:
    steps = Steps()
    base = Net(norm=True)
    module, fitted = run(None, more=[steps])
    assert [gated for _, gated, _ in steps.seen] == [True] * 6 + [False] * 4
    kept = math.floor(DENSITY * SIZE)
    assert {count for _, gated, count in steps.seen if not gated} == {kept}
    assert int(flat(module).count_nonzero()) <= kept
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {
        *(f"net.{name}" for name in Adapted(module.net).record.trainable_names)
    }
    # α at its own constant rate, w and head under the user's schedule; then no α any more.
    assert all(rates[1] == 0.1 or rates[2] == 0.1 for rates in steps.rates[:6])
    assert [len(rates) for rates in steps.rates] == [3] * 6 + [2] * 4
    groups = fitted.optimizers[0].param_groups
    assert [len(group["params"]) > 0 for group in groups] == [True, True]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert len(fitted.lr_scheduler_configs[0].scheduler.base_lrs) == 2
    assert steps.rates[9][0] == steps.rates[9][1] < 0.02
    mask = [d.difference() != 0 for d in differences(module)]
    x = torch.randn(4, 6)
    before = module.net.eval()(x)
    Adapted(module.net).merge_()
    torch.testing.assert_close(module.net(x), before)
    own = dict(base.named_parameters())
    for name, kept_here in zip(("fc1.weight", "fc1.bias"), mask, strict=False):
        assert torch.equal(dict(module.net.named_parameters())[name][~kept_here], own[name][~kept_here])


def test_the_optimizer_goes_on_with_the_entries_that_stay() -> None:
    class Moments(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            state = trainer.optimizers[0].state
            if trainer.global_step == 5:
                # The last step with gates is the sixth: its moments are not seen from here, but their places are.
                self.before = [state[d.w]["step"].item() for d in differences(pl_module)]
            if trainer.global_step == 6:
                self.cut = [
                    (d.indices, copy.deepcopy(state[d.values])) for d in differences(pl_module) if d.values.numel()
                ]
                self.size = len(state)

    seen = Moments()
    run(None, more=[seen])
    assert set(seen.before) == {5.0}
    for indices, state in seen.cut:
        assert state["step"].item() == 6.0
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == indices.shape
        assert state["exp_avg"].count_nonzero() > 0
    assert seen.size == len(seen.cut) + 2  # and the head's two


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "max_epochs": 4}], ids=str)
def test_resumed_in_any_stage_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    module, fitted = run(tmp_path, **options)
    assert fitted.global_step >= STEPS
    for step in (2, 5, 6, 7, 9):
        again, _ = run(None, path=ckpt(tmp_path, step), seed=99, **options)
        assert again.losses == module.losses[len(module.losses) - len(again.losses) :], step
        assert digest(again) == digest(module), step
    saved = {step: torch.load(ckpt(tmp_path, step), weights_only=True)["state_dict"] for step in (5, 6, 9)}
    numbers = {step: sum(t.numel() for n, t in state.items() if ".pet." in n) for step, state in saved.items()}
    assert numbers[5] > 2 * SIZE
    sparse = 2 * math.floor(DENSITY * SIZE)
    assert numbers[9] == sparse
    assert (numbers[6] == sparse) == (round(0.6 * fitted.global_step) == 6)


def test_a_checkpoint_of_either_stage_loads_into_either_model(tmp_path: Path) -> None:
    module, fitted = run(tmp_path)
    after = digest(module)
    fitted.validate(module, datamodule=Data(), ckpt_path=ckpt(tmp_path, 3), verbose=False)
    assert not differences(module)[0].is_fixed
    fitted.validate(module, datamodule=Data(), ckpt_path=ckpt(tmp_path, 10), verbose=False)
    assert digest(module) == after
    bare = Net(norm=True)
    load_delta(bare, ckpt(tmp_path, 10))
    save_delta(module, tmp_path / "d.pet.safetensors")
    other = Net(norm=True)
    load_delta(other, tmp_path / "d.pet.safetensors")
    x = torch.randn(4, 6)
    assert torch.equal(bare.eval()(x), other.eval()(x))
    assert torch.equal(bare(x), module.net.eval()(x))


def test_the_best_checkpoint_is_a_sparse_one(tmp_path: Path) -> None:
    class Rising(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", float(self.trainer.global_step))  # the later, the worse

    saver = ModelCheckpoint(tmp_path, filename="{step}", monitor="val_loss", save_top_k=2)
    stopper = EarlyStopping("val_loss", patience=2)
    module = Rising(Net(), adamw)
    run = fit(module, diff(), saver, stopper, limit_val_batches=1, max_epochs=5, val_check_interval=5)
    assert run.global_step == 25  # five epochs, the cut after 15 steps; without a fresh start it ends after 15
    assert sorted(Path(path).name for path in saver.best_k_models) == ["step=15.ckpt", "step=20.ckpt"]
    best = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
    assert Path(saver.best_model_path).name == "step=15.ckpt"
    assert any(name.endswith("values") for name in best)


def test_a_second_fit_keeps_the_places() -> None:
    module, _ = run(None)
    support = flat(module) != 0
    fit(module, diff())
    assert not ((flat(module) != 0) & ~support).any()


# --- the penalty and the gates' optimizer ----------------------------------------------------------


class Idle(Module):
    """A loss without gradient: what remains is the penalty's."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.losses.append(0.0)
        return self.loss(batch) * 0


class Alphas(Callback):
    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, Tensor]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        for delta in differences(pl_module):
            if not delta.is_fixed:
                values = [p.detach().clone().requires_grad_() for p in delta.gate_parameters]
                truth = torch.autograd.grad(0.01 * expected_open(*values, law=delta.law, form=self.form), values)
                self.steps += [(p.grad.clone(), t) for p, t in zip(delta.gate_parameters, truth, strict=True)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16-mixed"},
        {"plugins": lambda: MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))},
        {"accumulate_grad_batches": 2},
    ],
    ids=["fp32", "bf16", "fp16", "accumulation"],
)
@pytest.mark.parametrize("form", ["product", "sum"])
def test_the_gates_get_the_exact_gradient_of_the_penalty(options: dict[str, Any], form: str) -> None:
    seen = Alphas()
    seen.form = form
    torch.manual_seed(5)
    given = {name: value() if callable(value) else value for name, value in options.items()}
    module = Idle(Net(dropout=0.0), sgd)
    callbacks = (diff(l0_weight=0.01, penalty=form, stages=(1.0, 0.0), density=1.0, alpha_clip=1e9), seen)
    with torch.no_grad(), pytest.raises(Exception, match="every difference is zero"):
        trainer(*callbacks, **given).fit(module, datamodule=Data(rows=24))
    assert len(seen.steps) >= 16
    for found, truth in seen.steps:
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-9)


def test_gates_are_clipped_apart_from_the_rest() -> None:
    class Norms(Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
            gates = [p.grad for d in differences(pl_module) for p in d.gate_parameters]
            self.gates = torch.cat([g.flatten() for g in gates]).norm() if gates else self.gates
            self.head = pl_module.net.head.weight.grad.norm()

    norms = Norms()
    fit(Module(Net(), sgd), diff(l0_weight=100.0, alpha_clip=1e-3), norms)
    assert norms.gates <= 1.0001e-3
    assert norms.head > 1e-2


def test_gates_are_drawn_in_a_model_that_is_in_evaluation_mode() -> None:
    class Modes(Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            assert all(d.training for d in differences(pl_module))
            assert not pl_module.net.fc1.training

    fit(Module(Net().eval(), adamw), diff(), Modes())


# --- a task with a known answer --------------------------------------------------------------------


def known_support(changed: int = 50) -> tuple[nn.Module, TensorDataset, Tensor]:
    """A network, data of another one that differs from it in ``changed`` weights, and the difference."""
    net, teacher = (nn.Sequential(nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 30)) for _ in range(2))
    teacher.load_state_dict(net.state_dict())
    size = sum(p.numel() for p in net.parameters())
    truth = torch.zeros(size)
    truth[torch.randperm(size)[:changed]] = (torch.rand(changed) * 0.2 + 0.2) * torch.randn(changed).sign()
    with torch.no_grad():
        for parameter, part in zip(
            teacher.parameters(), truth.split([p.numel() for p in net.parameters()]), strict=True
        ):
            parameter += part.view_as(parameter)
        x = torch.randn(2048, 30)
        return net, TensorDataset(x, teacher(x)), truth


class Regression(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("options", [{}, {"state": "bf16"}], ids=str)
def test_it_finds_the_weights_that_differ(options: dict[str, Any]) -> None:
    net, data, truth = known_support()
    callback = DiffPruningCallback(
        density=50.01 / len(truth), heads=True, modules_to_save=[], verbose=False, plot=False, **options
    )
    trainer(callback, max_epochs=-1, max_steps=250).fit(Regression(net), DataLoader(data, 256, shuffle=True))
    found = flat(net)
    assert int((found != 0).sum()) == 50
    assert int(((found != 0) & (truth != 0)).sum()) >= 45  # of 50; chance would find one or two
    assert nn.functional.mse_loss(net(data.tensors[0]), data.tensors[1]) < 1e-4


def test_a_compiled_model_goes_through_the_cut() -> None:
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        module = Module(Net(dropout=0.0), adamw)
        if compiled:
            module.net = torch.compile(module.net, backend="aot_eager", fullgraph=True)
        fit(module, diff(), data=Data(shuffle=False))
        found.append(module)
    assert found[0].losses == pytest.approx(found[1].losses, rel=1e-4)
    torch.testing.assert_close(flat(found[1]), flat(found[0]), rtol=1e-3, atol=1e-5)


def test_after_an_error_gates_change_by_themselves_again() -> None:
    class Broken(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 2:
                raise RuntimeError("broken")

    module, callback = Module(Net(), sgd), diff()
    with pytest.raises(RuntimeError, match="broken"):
        fit(module, callback, Broken())
    x = torch.randn(4, 6)
    seen = [module.net(x).detach()]
    module.net(x).sum().backward()
    assert not torch.equal(module.net(x), seen[0])
    assert not callback._live


# --- reports ---------------------------------------------------------------------------------------


def test_densities_are_logged_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[str, list[float]] = {}

    class Log(L.pytorch.loggers.Logger):
        name, version, save_dir = "log", 0, str(tmp_path)

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            for name, value in metrics.items():
                logged.setdefault(name, []).append(value)

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

    run(None, diff={"plot": True}, logger=Log(), log_every_n_steps=1)
    prefix = "pet/diff_pruning_default"
    density, expected = logged[f"{prefix}/density"], logged[f"{prefix}/expected_density"]
    assert len(density) == len(expected) == STEPS
    assert density[-1] == expected[-1] == pytest.approx(math.floor(DENSITY * SIZE) / SIZE)
    assert 0.5 < expected[0] < 1
    assert len(logged[f"{prefix}/penalty"]) == 5
    shares = [logged[f"{prefix}/density/{layer}"][-1] for layer in ("fc1", "norm", "fc2")]
    assert sum(s * n for s, n in zip(shares, (56, 16, 72), strict=True)) == pytest.approx(math.floor(DENSITY * SIZE))
    drawn = list(tmp_path.rglob("diff_pruning_default.png"))
    assert len(drawn) == 1
    assert drawn[0].stat().st_size > 5000


def test_without_matplotlib_a_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    lines: list[str] = []
    monkeypatch.setattr(figures, "rank_zero_info", lines.append)
    run(None, diff={"plot": True}, default_root_dir=tmp_path, log_every_n_steps=1)
    assert ["matplotlib is not installed" in line for line in lines] == [True]
    assert not list(tmp_path.rglob("*.png"))


# --- bad runs --------------------------------------------------------------------------------------


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        while True:
            yield torch.randn(6), torch.tensor(1)


def test_a_run_of_unknown_length() -> None:
    with pytest.raises(ArgumentError, match="set max_steps"):
        trainer(diff(), max_epochs=-1).fit(Module(Net(), sgd), DataLoader(Endless(), 4))
    module = Module(Net(), sgd)
    trainer(diff(), max_epochs=-1, max_steps=5).fit(module, DataLoader(Endless(), 4))
    assert differences(module)[0].is_fixed


@pytest.mark.parametrize("stages", [(0.02, 0.9), (0.98, 0.02)])
def test_stages_without_a_step(stages: tuple[float, float]) -> None:
    with pytest.raises(ArgumentError, match="one of them has no step"):
        fit(Module(Net(), sgd), diff(stages=stages))


def test_the_fit_ends_with_its_stages() -> None:
    module = Module(Net(), sgd)
    assert fit(module, diff(stages=(0.3, 0.2))).global_step == 5
    assert len(module.losses) == 5


def test_a_fit_that_is_stopped_early_is_cut_all_the_same() -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    module = Module(Net(), sgd)
    with pytest.warns(UserWarning, match="ended after 3 of 6 steps"):
        fit(module, diff(), Stop())
    assert int(flat(module).count_nonzero()) == math.floor(DENSITY * (SIZE - 16))


def test_fast_dev_run() -> None:
    module = Module(Net(), sgd)
    fit(module, diff(), fast_dev_run=True)
    assert differences(module)[0].is_fixed


def test_averages_do_not_go_with_exchanged_parameters() -> None:
    with pytest.raises(UnsupportedStrategyError, match="EMAWeightAveraging"):
        fit(Module(Net(), sgd), diff(), EMAWeightAveraging())


def test_weights_that_the_model_does_not_use_are_named() -> None:
    net = Net()
    net.unused = nn.Linear(6, 6)
    with pytest.warns(UserWarning, match=r"unused\.weight"):
        fit(Module(net, sgd), diff())


def test_no_gradient_at_all() -> None:
    class Cut(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.fc2(self.fc1(x))
            return self.head(x)

    with pytest.raises(DeadSiteError, match="no weight received a gradient"):
        fit(Module(Cut(), sgd), diff())


def test_lightning_module_that_is_resumed_with_other_options(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match="density"):
        run(None, path=ckpt(tmp_path, 8), diff={"density": 0.2})
