"""AdapterFusion: the battery, golden properties, training through the Trainer, and its own errors."""

import atexit
import functools
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pet import (
    AdapterCallback,
    AdapterFusionCallback,
    ArgumentError,
    BaseMismatchError,
    CompacterCallback,
    LoRACallback,
    PETCallback,
    apply,
    inspect_delta,
    load_delta,
    save_delta,
)
from lightning_pet.layers.fusion import Mixture
from lightning_pet.layers.phm import PHMBottleneck
from lightning_pet.store.reader import read

from . import zoo
from .battery import LIKE_SMALLER, Battery, Case, output_in_a_new_process, perturb

D, D64 = 16, torch.float64
FILES = Path(tempfile.mkdtemp())
atexit.register(shutil.rmtree, FILES, True)
SIZE = {"bottleneck_size": 8}


def stage_one(model: str, name: str, method: type[PETCallback] = CompacterCallback, **options: Any) -> str:
    """The file of an adapter that was moved away from its start; one file for the same arguments."""
    return _stage_one(model, name, method, json.dumps(SIZE | options, sort_keys=True))


@functools.cache
def _stage_one(model: str, name: str, method: type[PETCallback], options: str) -> str:
    path = FILES / f"{model}-{name}-{len(list(FILES.iterdir()))}.pet.safetensors"
    base, run = getattr(zoo, model)()
    adapted = apply(base, [method(name=name, **json.loads(options))], forward=lambda: run(base))
    perturb(adapted, 0.3 if name == "a" else -0.2)
    save_delta(base, path)
    return str(path)


@dataclass(frozen=True)
class Fusion(Case):
    """A fusion of two adapters, the second of which may be of another method."""

    stage: tuple[tuple[type[PETCallback], dict[str, Any]], ...] = ()

    @property
    def id(self) -> str:
        methods = (f"{m.method}={'+'.join(map(str, options.values()))}" for m, options in self.stage)
        return "-".join([super().id, *methods])

    def callback(self) -> PETCallback:
        files = [
            stage_one(self.model, name, method, **options)
            for name, (method, options) in zip("ab", self.stage, strict=True)
        ]
        return AdapterFusionCallback(adapters=files, **self.options)


def case(model: str, sites: int, *stage: tuple[type[PETCallback], dict[str, Any]], **options: Any) -> Fusion:
    not_compiled = options.pop("not_compiled", "")
    return Fusion(
        model,
        AdapterFusionCallback,
        options,
        exact_identity=False,
        identity_tolerance=None,
        mergeable=False,
        parameters=sites * (3 * D * D + 2 * D),
        needs_values=True,
        not_compiled=not_compiled,
        stage=(stage[0], stage[-1]),
    )


PFEIFFER: dict[str, Any] = {"placement": "pfeiffer", "sublayers": ["ffn"]}
PARALLEL = {"placement": "parallel", "scale": 4.0}


class TestAdapterFusion(Battery):
    cases: ClassVar[list[Case]] = [
        case("bert", 2, (AdapterCallback, PFEIFFER), temperature=50.0),
        case("gpt2", 4, (CompacterCallback, {}), (AdapterCallback, {"bottleneck_size": 4})),
        case("t5", 4, (AdapterCallback, PARALLEL), not_compiled=LIKE_SMALLER),
        case("transformer_encoder", 2, (CompacterCallback, {"placement": "ffn", "phm_dim": 1})),
    ]


# --- golden properties ---------------------------------------------------------------------------


def mixtures(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Mixture)]


def test_formula_in_float64() -> None:
    torch.manual_seed(0)
    members = [PHMBottleneck(6, 4, 2, dtype=D64) for _ in range(3)]
    fusion = Mixture(6, members, temperature=2.0, dtype=D64)
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    h = torch.randn(2, 5, 6, dtype=D64)
    z = torch.stack([member.update(h) for member in members], dim=-2)
    query = h @ fusion.query.T + fusion.query_bias
    keys = z @ fusion.key.T + fusion.key_bias
    weights = ((keys * query.unsqueeze(-2)).sum(-1) / 2).softmax(-1)
    expected = h + (weights.unsqueeze(-1) * (z @ fusion.value.T)).sum(-2)
    assert (fusion(torch.empty(0), h) - expected).abs().max() < 1e-13
    assert (fusion.scores(h, z) - weights).abs().max() < 1e-13
    assert (weights.sum(-1) - 1).abs().max() < 1e-15


@pytest.mark.parametrize("model", ["bert", "gpt2"])
@pytest.mark.parametrize(
    ("method", "options"),
    [(CompacterCallback, {}), (AdapterCallback, {}), (AdapterCallback, PFEIFFER), (AdapterCallback, PARALLEL)],
)
def test_one_adapter_is_that_adapter(model: str, method: type[PETCallback], options: dict[str, Any]) -> None:
    file = stage_one(model, "a", method, **options)
    alone, run = getattr(zoo, model)()
    load_delta(alone, file)
    fused, _ = getattr(zoo, model)()
    for off_diagonal, tolerance in ((0.0, 1e-12), (1e-6, 1e-3)):
        callback = AdapterFusionCallback(adapters=[file], off_diagonal=off_diagonal)
        adapted = apply(fused, [callback])
        base = {name: value for name, value in alone.state_dict().items() if "pet" not in name.split(".")}
        fused.load_state_dict(base)  # the head of the task
        expected = run(alone.double())
        assert (run(fused.double()) - expected).abs().max() <= tolerance * expected.abs().max()
        adapted.remove()
        fused.float()


def test_regulariser_is_added_to_the_gradient_once() -> None:
    model, run = zoo.bert()
    files = [stage_one("bert", name) for name in ("a", "b")]
    gradients = []
    for factor in (0.0, 0.01):
        model, run = zoo.bert()
        apply(model, [AdapterFusionCallback(adapters=files, regularization=factor, off_diagonal=0.1)])
        torch.manual_seed(0)
        for fusion in mixtures(model):
            torch.nn.init.normal_(fusion.query, std=0.1)
        run(model).square().sum().backward()
        gradients.append([fusion.value.grad for fusion in mixtures(model)])
    identity = torch.eye(D)
    for fusion, without, with_it in zip(mixtures(model), *gradients, strict=True):
        expected = 0.01 * 2 * (fusion.value.detach() - identity)
        assert torch.allclose(with_it - without, expected, atol=1e-6)
        assert torch.allclose(fusion.penalty(fusion.value), 0.01 * (fusion.value - identity).square().sum())


def test_the_file_needs_no_other(tmp_path: Path) -> None:
    model, run = zoo.bert()
    sources = []
    for name in ("a", "b"):
        sources.append(shutil.copy(stage_one("bert", name), tmp_path / f"{name}.pet.safetensors"))
    adapted = apply(model, [AdapterFusionCallback(adapters=sources)])
    perturb(adapted)
    expected = run(model).detach()
    path = tmp_path / "fusion.pet.safetensors"
    save_delta(model, path)
    for source in sources:
        Path(source).unlink()
    assert torch.equal(output_in_a_new_process("bert", path, tmp_path / "out.pt"), expected)
    record = inspect_delta(path).methods[0]
    assert [member["name"] for member in record.config["members"]] == ["a", "b"]
    assert all(member["method"] == "compacter" for member in record.config["members"])
    assert record.config["adapters"] is None


def test_the_plan_shows_what_is_frozen() -> None:
    model, _ = zoo.bert()
    plan = apply(model, [AdapterFusionCallback(adapters=[stage_one("bert", name) for name in ("a", "b")])]).plan()
    one = 3 * (D + 8)
    assert [row.frozen for row in plan.rows if row.method == "adapter_fusion"] == [64, 64, *[2 * one] * 4]
    assert plan.frozen == 2 * 64 + 8 * one
    assert "64 frozen" in plan.rows[0].detail
    assert f"frozen in the delta {plan.frozen:,}" in str(plan)


def test_applied_adapters_are_fused_by_name_and_leave() -> None:
    by_name, run = zoo.bert()
    before = run(by_name)
    for name in ("a", "b"):
        load_delta(by_name, stage_one("bert", name))
    adapted = apply(by_name, [AdapterFusionCallback(adapters=["a", "compacter:b"])])
    by_file, _ = zoo.bert()
    apply(by_file, [AdapterFusionCallback(adapters=[stage_one("bert", name) for name in ("a", "b")])])
    assert [applied.method for applied in adapted.record.applied] == ["adapter_fusion"]
    for one, other in zip(mixtures(by_name), mixtures(by_file), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.members.parameters(), other.members.parameters(), strict=True))
    adapted.remove()
    assert not [name for name, _ in by_name.named_parameters() if ".pet." in name]
    assert torch.equal(run(by_name), before)


# --- through the Trainer -------------------------------------------------------------------------


class Task(L.LightningModule):
    """Tells token sequences apart by a rule of its task."""

    def __init__(self) -> None:
        super().__init__()
        self.net = zoo.bert()[0]
        self.net.config.hidden_dropout_prob = 0.0

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(input_ids=ids).logits

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        ids, labels = batch
        return torch.nn.functional.cross_entropy(self(ids), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def loader(task: str) -> DataLoader[Any]:
    ids = torch.randint(3, 50, (24, 6), generator=torch.Generator().manual_seed(3))
    labels = {"first": ids[:, 0] % 3, "last": ids[:, -1] % 3, "both": (ids[:, 0] + ids[:, -1]) % 3}[task]
    return DataLoader(TensorDataset(ids, labels), batch_size=8)


def fit(task: str, callback: PETCallback, steps: int, ckpt_path: Path | None = None) -> tuple[L.Trainer, Task]:
    L.seed_everything(1, verbose=False)
    module = Task()
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.fit(module, loader(task), ckpt_path=ckpt_path)
    return trainer, module


@pytest.fixture(scope="module")
def trained_tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A delta file of one task and a checkpoint of another."""
    folder = tmp_path_factory.mktemp("stage-one")
    _, first = fit("first", CompacterCallback(name="first", bottleneck_size=8, verbose=False), 3)
    save_delta(first, folder / "first.pet.safetensors")
    trainer, _ = fit("last", CompacterCallback(name="last", bottleneck_size=4, verbose=False), 3)
    trainer.save_checkpoint(folder / "last.ckpt")
    return [folder / "first.pet.safetensors", folder / "last.ckpt"]


def test_two_stages(trained_tasks: list[Path], tmp_path: Path) -> None:
    def callback() -> AdapterFusionCallback:
        return AdapterFusionCallback(adapters=[str(path) for path in trained_tasks], temperature=50.0, verbose=False)

    trainer, module = fit("both", callback(), 4)
    own = {name: tensor for name, tensor in module.state_dict().items() if ".pet." in name or "net.pet." in name}
    for index, path in enumerate(trained_tasks):
        stored = {n: t for n, t in read(path).tensors.items() if "pet" in n.split(".")}
        task = path.name.partition(".")[0]
        for name, tensor in stored.items():
            here = name.replace(f"compacter_{task}_rule", f"adapter_fusion_default_{index}_rule")
            here = here.replace(f"compacter_{task}", f"adapter_fusion_default.members.{index}")
            assert torch.equal(own[f"net.{here}"], tensor), name
    start = Mixture(D, [])
    assert all(not torch.equal(fusion.value.detach(), start.value) for fusion in mixtures(module))
    assert [float(f.temperature) for f in mixtures(module)] == [pytest.approx(50 * (1 - 3 / 1000))] * 4

    ids = next(iter(loader("both")))[0]
    expected = module.eval()(ids)
    save_delta(module, tmp_path / "fusion.pet.safetensors")
    trainer.save_checkpoint(tmp_path / "fusion.ckpt")
    for path in ("fusion.pet.safetensors", "fusion.ckpt"):
        fresh = Task().eval()
        load_delta(fresh, tmp_path / path)
        assert torch.equal(fresh(ids), expected)

    half, _ = fit("both", callback(), 3)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = fit("both", callback(), 4, tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), module.parameters(), strict=True))
    L.Trainer(accelerator="cpu", logger=False, callbacks=[callback()], enable_progress_bar=False)  # the same again


# --- bad input -----------------------------------------------------------------------------------


def test_errors_leave_the_model_alone(tmp_path: Path) -> None:
    model, _run = zoo.bert()
    a = stage_one("bert", "a")
    narrow = stage_one("bert", "b", placement="ffn")
    with pytest.raises(ArgumentError, match=r"4 places \(attention.output, ffn.output\), .* 2 places \(ffn.output\)"):
        apply(model, [AdapterFusionCallback(adapters=[a, narrow])])
    with pytest.raises(ArgumentError, match=r"'sst2' is no file, .* of no applied adapters; applied are none"):
        apply(model, [AdapterFusionCallback(adapters=["sst2"])])
    with pytest.raises(ArgumentError, match="adapters was not given"):
        apply(model, [AdapterFusionCallback()])
    lora = tmp_path / "lora.pet.safetensors"
    other, _ = zoo.bert()
    apply(other, [LoRACallback(r=2)])
    save_delta(other, lora)
    with pytest.raises(ArgumentError, match=r"'lora' at .* is no bottleneck adapter"):
        apply(model, [AdapterFusionCallback(adapters=[str(lora)])])
    norms = stage_one("bert", "b", layer_norms=True)
    with pytest.raises(ArgumentError, match=r"trained 10 tensors of the base .*layer_norms=False"):
        apply(model, [AdapterFusionCallback(adapters=[a, norms])])
    with pytest.raises(ArgumentError, match="no file"):
        apply(model, [AdapterFusionCallback(adapters=[a, str(tmp_path / "missing")])])
    assert not [name for name, _ in model.named_parameters() if "pet" in name.split(".")]
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.add_(1)
    with pytest.raises(BaseMismatchError, match="trained on another base"):
        apply(model, [AdapterFusionCallback(adapters=[a])])
    apply(model, [AdapterFusionCallback(adapters=[a], base_check="off")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": []}, "adapters is empty"),
        ({"regularization": -1.0}, "regularization=-1.0"),
        ({"temperature": 0.5}, "temperature=0.5"),
        ({"off_diagonal": float("nan")}, "off_diagonal=nan"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        AdapterFusionCallback(**options)


def test_confined_to_a_submodule(tmp_path: Path) -> None:
    first = Task()
    perturb(apply(first, [CompacterCallback(**SIZE, module="net.bert")]))
    save_delta(first, tmp_path / "first.pet.safetensors")
    second = Task()
    source = str(tmp_path / "first.pet.safetensors")
    adapted = apply(second, [AdapterFusionCallback(adapters=[source], module="net.bert")])
    assert adapted.record.scopes == ("bert",)
    assert len(mixtures(second.net.bert)) == 4


def test_an_equal_callback_finds_its_fusion_again() -> None:
    model, run = zoo.bert()
    files = [stage_one("bert", name) for name in ("a", "b")]
    apply(model, [AdapterFusionCallback(adapters=files)])
    expected = run(model)
    apply(model, [AdapterFusionCallback(adapters=files)])
    assert torch.equal(run(model), expected)
    assert len(mixtures(model)) == 4
