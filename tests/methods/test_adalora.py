"""AdaLoRA: the battery, equality with HF PEFT, the allocation of ranks inside a run, and its own errors."""

import copy
import warnings
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import peft
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_pet import AdaLoRACallback, ArgumentError, PETError, TargetError, apply, load_delta, save_delta
from lightning_pet.layers.svd_low_rank import (
    Importance,
    SvdLowRank,
    allocate,
    orthogonality,
    orthogonality_gradient,
    rank_budget,
    triplet_scores,
)

from . import zoo
from .battery import LIKE_SMALLER, Battery, Case, perturb

METHOD = AdaLoRACallback
SMALL = {"init_r": 3, "target_r": 2}


class TestAdaLoRA(Battery):
    cases: ClassVar[list[Case]] = [
        Case("mlp", METHOD, {**SMALL, "target_modules": ["0"]}, parameters=3 * (6 + 8 + 1)),
        Case("transformer_encoder", METHOD, SMALL),
        Case("conv1d", METHOD, {**SMALL, "target_modules": ["0"]}, parameters=3 * (12 + 6 + 1)),
        Case("conv3d", METHOD, {**SMALL, "target_modules": ["0"]}, parameters=3 * (12 + 6 + 1)),
        Case("own", METHOD, {**SMALL, "target_modules": ["turned", "gated", "conv"], "modules_to_save": []}),
        Case("reading", METHOD, {**SMALL, "target_modules": ["conv", "down"]}),
        Case(
            "bert", METHOD, SMALL, parameters=2 * 3 * (4 * (16 + 16 + 1) + 2 * (16 + 24 + 1)), not_compiled=LIKE_SMALLER
        ),
        Case("gpt2", METHOD, {**SMALL, "target_modules": ["attention.v"]}, parameters=2 * 3 * (16 + 16 + 1)),
        Case("mixtral", METHOD, {**SMALL, "target_modules": ["attention.q", "ffn"]}),
    ]


def triplets(root: nn.Module) -> list[SvdLowRank]:
    return [delta for _, delta in METHOD().deltas(root)]


# --- against HF PEFT -----------------------------------------------------------------------------

HOSTS = {
    "bert": (["query", "value", "intermediate.dense"], {}),
    "gpt2": (["c_attn", "c_fc"], {"fan_in_fan_out": True}),
    "llama": (["q_proj", "v_proj", "down_proj"], {}),
}


def peft_twin(model: nn.Module, targets: list[str], **options: Any) -> nn.Module:
    config = peft.AdaLoraConfig(
        init_r=3, target_r=2, lora_alpha=6, target_modules=targets, **{"total_step": 10, **options}
    )
    return peft.get_peft_model(copy.deepcopy(model), config).eval()


def copy_weights(wrapped: nn.Module, model: nn.Module) -> None:
    """Random triplets for PEFT, and the same for us."""
    theirs = dict(wrapped.base_model.model.named_modules())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, host in model.named_modules():
            if hasattr(host, "pet"):
                (ours,) = host.pet.values()
                for mine, name in ((ours.a, "lora_A"), (ours.b, "lora_B"), (ours.e, "lora_E")):
                    other = getattr(theirs[path], name)["default"]
                    other.copy_(torch.randn(other.shape, generator=generator) * 0.4)
                    mine.copy_(other.view_as(mine))


@pytest.mark.parametrize("name", HOSTS)
def test_equal_outputs_merged_and_unmerged(name: str) -> None:
    targets, options = HOSTS[name]
    base, run = getattr(zoo, name)()
    wrapped = peft_twin(base, targets, **options)
    before = run(base)
    adapted = apply(base, [METHOD(**SMALL, alpha=6, target_modules=targets, modules_to_save=[])])
    copy_weights(wrapped, base)
    expected = run(wrapped)
    assert (run(base) - expected).abs().max() <= 1e-5
    assert (expected - before).abs().max() > 1e-2
    adapted.merge_()
    assert (run(base) - expected).abs().max() <= 1e-5


def test_allocation_equals_pefts() -> None:
    """The same gradients for twelve steps: the same importance, the same budgets, the same triplets."""
    base, _ = zoo.bert()
    targets = ["query", "value", "intermediate.dense"]
    wrapped = peft_twin(base, targets, total_step=12, tinit=2, tfinal=3, deltaT=2)
    apply(base, [METHOD(**SMALL, alpha=6, target_modules=targets, modules_to_save=[])])
    copy_weights(wrapped, base)
    allocator = RankAllocator(wrapped.base_model.model, wrapped.peft_config["default"], "default")
    theirs = {n.removesuffix(".default"): p for n, p in wrapped.base_model.model.named_parameters() if ".lora_" in n}
    hosts = [path for path, module in base.named_modules() if hasattr(module, "pet")]
    importance = {name: Importance(torch.zeros_like(p), torch.zeros_like(p)) for name, p in theirs.items()}
    generator = torch.Generator().manual_seed(0)
    allocations = 0
    for step in range(1, 10):
        for name, parameter in theirs.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if step == 9:
                continue  # the last allocation looks at the past only
            importance[name] = importance[name].updated(parameter.detach(), parameter.grad, 0.85, 0.85)
        budget, pattern = allocator.update_and_allocate(wrapped.base_model.model, step, force_mask=step == 9)
        assert budget == rank_budget(step, 2, 9, 3 * len(hosts), 2 * len(hosts))
        if pattern is None:
            continue
        scores = [
            triplet_scores(*(importance[f"{host}.lora_{key}"].score().squeeze(-1) for key in "ABE")) for host in hosts
        ]
        for host, kept in zip(hosts, allocate(scores, budget), strict=True):
            assert kept.tolist() == pattern[f"{host}.lora_E.default"], (step, host)
        allocations += 1
    assert allocations == 4  # steps 4, 6, 8 and 9


def test_penalty_equals_pefts() -> None:
    """The mean over all factors of ‖A Aᵀ − 1‖ and ‖Bᵀ B − 1‖, as a gradient beside that of the loss."""
    base, _ = zoo.bert()
    targets = ["query", "value"]
    wrapped = peft_twin(base, targets, orth_reg_weight=0.3)
    apply(base, [METHOD(**SMALL, alpha=6, target_modules=targets, modules_to_save=[], orth_reg_weight=0.3)])
    copy_weights(wrapped, base)
    ids, labels = torch.randint(3, 50, (2, 6)), torch.tensor([0, 2])
    wrapped.base_model(input_ids=ids, labels=labels).loss.backward()
    base(input_ids=ids, labels=labels).loss.backward()
    theirs = dict(wrapped.base_model.model.named_modules())
    for path, host in base.named_modules():
        if hasattr(host, "pet"):
            (ours,) = host.pet.values()
            for mine, name in ((ours.a, "lora_A"), (ours.b, "lora_B"), (ours.e, "lora_E")):
                expected = getattr(theirs[path], name)["default"].grad
                assert (mine.grad - expected.view_as(mine)).abs().max() < 1e-5


# --- mathematics ---------------------------------------------------------------------------------


def test_formula() -> None:
    model, _ = zoo.mlp()
    model.double()
    perturb(apply(model, [METHOD(**SMALL, alpha=6, target_modules="0")]))
    (delta,) = triplets(model)
    x = torch.randn(7, 6, dtype=torch.float64)
    expected = x @ model[0].weight.T + model[0].bias + 2.0 * (x @ delta.a.T) @ torch.diag(delta.e) @ delta.b.T
    assert (model[0](x) - expected).abs().max() < 1e-14


def test_gradient_of_the_penalty() -> None:
    a, b = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 7, 3, dtype=torch.float64)
    expected = torch.func.grad(orthogonality, argnums=(0, 1))(a, b)
    assert all(torch.allclose(x, y) for x, y in zip(orthogonality_gradient(a, b), expected, strict=True))
    q = torch.eye(5, dtype=torch.float64)[:3]
    assert orthogonality(q, q.T) == 0
    assert not any(g.any() for g in orthogonality_gradient(q, q.T))


def test_allocation_spends_the_budget_exactly() -> None:
    scores = [torch.tensor([1.0, 0.0, 0.0]), torch.tensor([[0.0, 0.0], [5.0, 0.0]])]
    for budget in range(8):
        assert sum(int(kept.sum()) for kept in allocate(scores, budget)) == budget
    assert [kept.tolist() for kept in allocate(scores, 2)] == [[True, False, False], [[False, False], [True, False]]]


def test_the_file_holds_the_triplets_that_are_left(tmp_path: Path) -> None:
    model, run = zoo.bert()
    adapted = apply(model, [METHOD(**SMALL)])
    perturb(adapted)
    full, small = tmp_path / "full.pet.safetensors", tmp_path / "small.pet.safetensors"
    save_delta(model, full)
    for index, delta in enumerate(triplets(model)):
        delta.kept.copy_(torch.tensor([True, index % 2 == 0, False]))
        delta.e.data.mul_(delta.kept)
    expected = run(model)
    save_delta(model, small)
    assert small.stat().st_size < full.stat().st_size - 2 * sum(d.a[0].numel() * 4 for d in triplets(model))
    fresh, _ = zoo.bert()
    loaded = load_delta(fresh, small)
    assert (run(fresh) - expected).abs().max() < 1e-6
    assert [delta.rank for delta in triplets(fresh)] == [2 if i % 2 == 0 else 1 for i in range(12)]
    assert "rank 1 of 3" in str(loaded.plan())
    loaded.merge_()
    assert (run(fresh) - expected).abs().max() < 1e-5


def test_a_budget_sets_both_ranks(tmp_path: Path) -> None:
    model, run = zoo.bert()
    callback = METHOD(budget=0.1, target_r=8)
    adapted = apply(model, [callback])
    assert 1 <= callback.init_r < 8
    assert callback.target_r == callback.init_r
    assert adapted.plan().trainable <= 0.1 * adapted.plan().base + sum(p.numel() for p in model.classifier.parameters())
    perturb(adapted)
    save_delta(model, tmp_path / "d.pet.safetensors")
    fresh, _ = zoo.bert()
    load_delta(fresh, tmp_path / "d.pet.safetensors")
    assert torch.equal(run(fresh), run(model))
    apply(model, [METHOD(budget=0.1, target_r=8)])  # the same method again: nothing to do


# --- in a Trainer --------------------------------------------------------------------------------


class Branches(nn.Module):
    """Two layers, one of which hardly counts."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(8, 16)
        self.spare = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + 0.01 * self.spare(x)


class Regression(pl.LightningModule):
    """The layer that counts has to change by a matrix of rank three."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Branches()
        self.wanted = copy.deepcopy(self.net).requires_grad_(False)
        with torch.no_grad():
            self.wanted.used.weight.add_(torch.randn(16, 3) @ torch.randn(3, 8) * 0.5)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return (self.net(batch) - self.wanted(batch)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.02)


def fit(module: pl.LightningModule, *, steps: int, ckpt: str | None = None, every: int = 1, **options: Any) -> Any:
    callback = METHOD(
        verbose=False, module="net", **{"init_r": 4, "target_r": 2, "target_modules": ["used", "spare"], **options}
    )
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accumulate_grad_batches=every,
        callbacks=[callback],
    )
    data = DataLoader(torch.randn(64, 8, generator=torch.Generator().manual_seed(2)), batch_size=16)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(num_workers|log_every_n|max_epochs|isinstance).*")
        trainer.fit(module, data, ckpt_path=ckpt)
    return trainer


@pytest.mark.parametrize("every", [1, 2])
def test_ranks_go_where_they_are_needed(every: int) -> None:
    module = Regression()
    fit(module, steps=60, every=every)
    first, second = triplets(module)
    assert first.rank + second.rank == 4
    assert first.rank >= 3
    assert not first.e[first.kept == 0].any()
    assert not second.e[second.kept == 0].any()


def test_budgets_during_the_run() -> None:
    module = Regression()
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.append(sum(int((delta.e != 0).sum()) for delta in triplets(module)))

    original = pl.Trainer.__init__

    def with_watch(self: pl.Trainer, *args: Any, callbacks: list[Any], **kwargs: Any) -> None:
        original(self, *args, callbacks=[*callbacks, Watch()], **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl.Trainer, "__init__", with_watch)
        fit(module, steps=20, tinit=3, tfinal=5, delta_t=2)
    expected = [rank_budget(step, 3, 15, 8, 4) for step in range(1, 21)]
    for step, found in enumerate(seen, start=1):
        between = 3 < step < 15 and step % 2
        assert found == (8 if between else expected[step - 1]), step


def test_resume_is_exact(tmp_path: Path) -> None:
    whole = Regression()
    fit(whole, steps=24, total_step=24)
    half = Regression()
    with pytest.warns(UserWarning, match="before the ranks were to reach target_r=2"):
        fit(half, steps=12, total_step=24).save_checkpoint(tmp_path / "half.ckpt")
    resumed = Regression()
    fit(resumed, steps=24, total_step=24, ckpt=str(tmp_path / "half.ckpt"))
    for mine, other in zip(triplets(resumed.net), triplets(whole.net), strict=True):
        assert torch.equal(mine.kept, other.kept)
        assert torch.equal(mine.e, other.e)
        assert torch.equal(mine.a, other.a)
    loaded = Regression()
    load_delta(loaded, tmp_path / "half.ckpt")
    x = torch.randn(3, 8)
    assert torch.equal(loaded.net(x), half.net(x))


def test_a_run_without_an_end_is_refused() -> None:
    with pytest.raises(ArgumentError, match="no last step"):
        fit(Regression(), steps=-1)
    with pytest.raises(ArgumentError, match="no step of a run of 10"):
        fit(Regression(), steps=10, tinit=6, tfinal=4)


class Manual(Regression):
    """Resets the gradients right after the step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, index: int) -> None:
        self.manual_backward(super().training_step(batch, index))
        self.optimizers().step()
        self.optimizers().zero_grad()


def test_gradients_that_are_gone_are_no_silent_zero() -> None:
    with pytest.raises(PETError, match="zero_grad before backward"):
        fit(Manual(), steps=10)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target_r": 0}, "target_r=0"),
        ({"target_r": 9, "init_r": 8}, "init_r=14"),
        ({"init_r": 1.5}, r"init_r=1\.5"),
        ({"delta_t": 0}, "delta_t=0"),
        ({"tinit": -1}, "tinit=-1"),
        ({"total_step": 0}, "total_step=0"),
        ({"beta1": 1.0}, r"beta1=1\.0"),
        ({"beta2": 0}, "beta2=0"),
        ({"orth_reg_weight": -0.1}, r"orth_reg_weight=-0\.1"),
        ({"alpha": 0}, "alpha=0"),
        ({"dropout": 1}, "dropout=1"),
        ({"target_modules": []}, "target_modules is empty"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        METHOD(**options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"init_r": 17}, "at most 16"),
        ({"target_modules": ["word_embeddings"]}, "cannot adapt|can adapt"),
        ({"target_modules": ["qeury"]}, "query"),
    ],
)
def test_bad_places_leave_the_model_untouched(options: dict[str, Any], text: str) -> None:
    model, run = zoo.bert()
    before = run(model)
    with pytest.raises(TargetError, match=text):
        apply(model, [METHOD(**{**SMALL, **options})])
    assert torch.equal(run(model), before)
    assert not any("pet" in name.split(".") for name, _ in model.named_modules())
