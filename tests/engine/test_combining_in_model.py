"""Deltas in a model become one more: of any methods that merge, through what they change of the weights."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_pet as lp
from lightning_pet.store.reader import read
from tests.engine.test_combining import X, elected, lora, net, saved
from tests.methods.battery import perturb

METHODS: dict[str, Any] = {
    "lora": lambda: lora(target_modules=["fc1", "fc2"]),
    "lora3": lambda: lora(r=3, target_modules=["fc1", "conv"], name="third"),
    "dora": lambda: lora(target_modules=["fc1"], use_dora=True),
    "adalora": lambda: lp.AdaLoRACallback(init_r=2, target_r=1, target_modules=["fc1"], modules_to_save=[]),
    "ia3": lambda: lp.IA3Callback(target_modules=["fc1"], feedforward_modules=["fc2"], modules_to_save=[]),
    "said": lambda: lp.IntrinsicDimensionCallback(d=20, modules_to_save=[]),
    "diff": lambda: lp.DiffPruningCallback(density=0.5, modules_to_save=[]),
    "bitfit": lambda: lp.BitFitCallback(),
    "full": lambda: lp.FullFineTuningCallback(),
    "head": lambda: lora(target_modules=["fc1"], modules_to_save=["fc2"]),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: Any) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("sources")
    found = {}
    for move, (name, method) in enumerate(METHODS.items()):
        path = folder / f"{name}.pet.safetensors"
        found[name] = path, saved(path, method(), move=move + 1)
    return found


def model_with(files: Any, *names: str) -> tuple[nn.Module, lp.Adapted]:
    model = net()
    for name in names:
        lp.load_delta(model, files[name][0], name=name)
    return model, lp.Adapted(model)


def change_of(adapted: lp.Adapted, name: str) -> dict[str, Tensor]:
    """Taken from the model that holds it alone, saved and loaded."""
    path = Path(str(adapted.root.folder)) / f"{name}.pet.safetensors"
    adapted[name].save(path)
    model = net()
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    lp.load_delta(model, path, name="again").merge_()
    return {key: tensor - base[key] for key, tensor in model.state_dict().items()}


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)


PAIRS = [
    ("lora", "lora3"),
    ("lora", "ia3"),
    ("dora", "lora"),
    ("dora", "adalora"),
    ("said", "diff"),
    ("lora", "bitfit"),
    ("full", "lora"),
    ("head", "lora"),
    ("head", "bitfit"),
    ("full", "said"),
]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("method", ["linear", "ties", "magnitude_prune"])
def test_what_is_combined_is_the_change_of_the_weights(files: Any, pair: Any, method: Any, tmp_path: Path) -> None:
    model, adapted = model_with(files, *pair)
    model.folder = str(tmp_path)
    with adapted.using(pair[0]):
        before = output(model)
    weights = dict(zip(pair, (0.75, -0.5) if method == "linear" else (0.75, 0.5), strict=True))
    options: dict[str, Any] = {"density": 0.5} if method != "linear" else {}
    if method != "linear" and pair == ("lora", "lora3"):  # else of the rank that their sum has
        options["rank"] = 18
    made = adapted.combine("both", weights, method=method, **options)
    assert list(adapted) == [*pair, "both"]
    assert adapted.active == (pair[0],)
    assert torch.allclose(output(model), before, atol=1e-12)
    found = change_of(adapted, "both")
    (first, one), (second, two) = ((files[name][1], weights[name]) for name in pair)
    moved = 0
    for key, change in found.items():
        parts = [first[key], second[key]]
        if method != "linear":
            parts = [torch.where(t.abs() >= smallest(t, 0.5), t, 0.0) for t in parts]
        wanted = elected(parts, (one, two)) if method == "ties" else one * parts[0] + two * parts[1]
        assert torch.allclose(change, wanted, atol=1e-9), key
        moved += int(wanted.abs().max() > 0.01)
    assert moved
    assert made.error < 1e-12
    with adapted.using("both"):
        inside = output(model)
    adapted.activate("both")
    assert torch.equal(output(model), inside)
    adapted["both"].remove()
    adapted.activate(pair[0])
    assert torch.allclose(output(model), before, atol=1e-12)


def smallest(tensor: Tensor, density: float) -> float:
    kept = int(density * tensor.numel())
    return float(tensor.abs().flatten().sort(descending=True).values[kept - 1]) if kept else float("inf")


@pytest.mark.parametrize("pair", [("dora", "lora"), ("diff", "lora3"), ("full", "said")], ids="-".join)
def test_a_rank_is_had_with_its_error(files: Any, pair: Any, tmp_path: Path) -> None:
    model, adapted = model_with(files, *pair)
    model.folder = str(tmp_path)
    made = adapted.combine("small", dict(zip(pair, (0.7, 0.3), strict=True)), method="svd", rank=2)
    found, lost, whole = change_of(adapted, "small"), 0.0, 0.0
    in_place = set(adapted.record.trained_by("small"))
    for key, change in found.items():
        wanted = 0.7 * files[pair[0]][1][key] + 0.3 * files[pair[1]][1][key]
        if change.dim() < 2 or key in in_place:
            assert torch.allclose(change, wanted, atol=1e-9), key  # as it is
            continue
        s = torch.linalg.svdvals(wanted.flatten(1))
        assert (change - wanted).square().sum() == pytest.approx(float(s[2:].square().sum()), abs=1e-9)
        lost, whole = lost + float(s[2:].square().sum()), whole + float(s.square().sum())
    assert made.error == pytest.approx((lost / whole) ** 0.5 if whole else 0.0, abs=1e-9)
    assert set(made.ranks.values()) <= {2}
    if "lora" in "".join(pair):
        assert adapted.combine("largest", list(pair), method="svd").ranks
    else:
        with pytest.raises(lp.ArgumentError, match="method='svd' of deltas that have no rank"):
            adapted.combine("largest", list(pair), method="svd")


def test_it_is_a_delta_like_any_other(files: Any, tmp_path: Path) -> None:
    model, adapted = model_with(files, "lora", "lora3", "head")
    made = adapted.combine("sum", {"lora": 1, "head": -0.5})
    assert made.error == 0
    assert {applied.method for applied in adapted["sum"].record.applied} == {"lora"}  # without a change of any weight
    again = adapted.combine("twice", {"sum": 2.0}, method="svd", rank=1)
    assert 0 < again.error < 1
    with adapted.using("lora", "lora3"):
        both = output(model)
    adapted.combine("both", {"lora": 1, "lora3": 1})
    with adapted.using("both"):
        assert torch.allclose(output(model), both, atol=1e-9)
    path, second = tmp_path / "both.pet.safetensors", tmp_path / "again.pet.safetensors"
    adapted["both"].save(path)
    assert read(path).notes["combined"].startswith("linear: 1 x lora (")
    other = net()
    lp.load_delta(other, path, name="mine")
    assert torch.allclose(output(other), both, atol=1e-9)
    lp.Adapted(other)["mine"].save(second)
    assert path.read_bytes() == second.read_bytes()
    adapted["both"].remove()
    assert "both" not in adapted.record.combined
    assert list(adapted) == ["lora", "lora3", "head", "sum", "twice"]


def test_what_is_known_of_the_base_is_used(files: Any) -> None:
    _, adapted = model_with(files, "bitfit", "full")
    base = {name: tensor.clone() for name, tensor in adapted.record.originals.items()}
    adapted.combine("away", {"bitfit": -1})
    own = adapted["away"].state_dict()
    for name, tensor in adapted["bitfit"].state_dict().items():
        assert torch.allclose(own[name] - base[name], base[name] - tensor, atol=1e-12)
    adapted.combine("random", ["full"], method="dare_linear", density=0.5, seed=1)
    adapted.combine("same", ["full"], method="dare_linear", density=0.5, seed=1)
    adapted.combine("other", ["full"], method="dare_linear", density=0.5, seed=2)
    tensors = [adapted[name].state_dict()["fc1.weight"] for name in ("random", "same", "other", "full")]
    assert torch.equal(tensors[0], tensors[1])
    assert not torch.equal(tensors[0], tensors[2])
    change = tensors[0] - base["fc1.weight"]
    assert ((change.abs() < 1e-12) | torch.isclose(change, 2 * (tensors[3] - base["fc1.weight"]))).all()


def test_what_is_named_after_peft_takes_the_factors(files: Any) -> None:
    _, adapted = model_with(files, "lora", "dora", "head", "ia3")
    made = adapted.combine("theirs", {"lora": 0.5, "head": 0.5}, method="peft_linear")
    assert made.error == 0
    with pytest.raises(lp.DeltaFileError, match="use_dora"):
        adapted.combine("no", ["lora", "dora"], method="peft_ties")
    with pytest.raises(lp.ArgumentError, match="method='peft_ties' adds A and B apart"):
        adapted.combine("no", ["lora", "ia3"], method="peft_ties")


def test_what_cannot_be_combined_is_refused_and_the_model_stays(files: Any, tmp_path: Path) -> None:
    model, adapted = model_with(files, "lora", "bitfit", "dora")
    before, keys = output(model), list(model.state_dict())
    for weights, options, message in (
        ({"lora": 1, "bitfitt": 1}, {}, "there is no delta 'bitfitt'.*Did you mean 'bitfit'"),
        (["lora", "lora"], {}, "named twice"),
        ("lora", {}, "give a weight for each delta"),
        (0.5, {}, "give a weight for each delta"),
        ({}, {}, "nothing to combine"),
        ({"lora": float("nan")}, {}, "finite number"),
        ({"lora": "much"}, {}, "one number for each"),
        ({"lora": -1, "dora": 1}, {"method": "ties"}, "at least zero.*method='linear' to subtract"),
        ({"lora": 1}, {"method": "mean"}, "method='mean': use one of linear"),
        ({"lora": 1}, {"rank": 2}, "rank=2 with method='linear'"),
        ({"lora": 1}, {"method": "svd", "rank": 0}, "positive integer"),
        ({"lora": 1}, {"density": 0.5}, "density=0.5 with method='linear'"),
    ):
        with pytest.raises(lp.ArgumentError, match=message):
            adapted.combine("both", weights, **options)
    with pytest.raises(lp.ArgumentError, match="there is a delta of this name"):
        adapted.combine("lora", ["dora"])
    with pytest.raises(lp.ArgumentError, match="letters, digits"):
        adapted.combine("a b", ["dora"])
    assert torch.equal(output(model), before)
    assert list(model.state_dict()) == keys
    assert list(adapted) == ["lora", "bitfit", "dora"]


def test_heads_of_different_sizes_are_no_sum(tmp_path: Path) -> None:
    for outputs in (2, 3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, outputs))
        adapted = lp.apply(model, [lora(target_modules=["0"], modules_to_save=["1"])])
        adapted.save(tmp_path / f"{outputs}.pet.safetensors")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    for outputs in (2, 3):
        lp.load_delta(model, tmp_path / f"{outputs}.pet.safetensors", name=f"of{outputs}", base_check="off")
    adapted = lp.Adapted(model)
    with pytest.raises(lp.DeltaFileError, match=r"1\.bias.*heads of different tasks are no sum"):
        adapted.combine("both", ["of2", "of3"])
    adapted.combine("again", {"of3": 1.0})
    adapted.activate("again")
    assert model(torch.ones(1, 4)).shape == (1, 3)


def test_methods_that_change_no_weight_are_combined_as_their_files_are(tmp_path: Path) -> None:
    from tests.engine.test_combining import bert

    paths = {name: tmp_path / f"{name}.pet.safetensors" for name in ("one", "two", "prefix")}
    for name, path in paths.items():
        model, ids = bert()
        options = {"modules_to_save": [], "verbose": False}
        method = (
            lp.PrefixTuningCallback(length=2, projection=False, **options)
            if name == "prefix"
            else lp.AdapterCallback(bottleneck_size=2, **options)
        )
        perturb(lp.apply(model, [method], forward=lambda model=model, ids=ids: model(ids)), scale=0.1 * len(name))
        lp.save_delta(model, path)
    model, _ = bert()
    for name, path in paths.items():
        lp.load_delta(model, path, name=name)
    adapted = lp.Adapted(model)
    adapted.combine("mean", ["one", "two"])
    tensors = {name: adapted[name].state_dict() for name in ("one", "two", "mean")}
    for name, tensor in tensors["mean"].items():
        first, second = (tensors[own][name.replace("@mean", f"@{own}")] for own in ("one", "two"))
        assert torch.allclose(tensor, (first + second) / 2)
    adapted.combine("long", ["prefix"], method="cat")
    with pytest.raises(lp.ArgumentError, match="not linear in its parameters"):
        adapted.combine("no", {"one": 1, "two": 1})
    with pytest.raises(lp.ArgumentError, match="means nothing for adapter:default"):
        adapted.combine("no", ["one", "two"], method="ties")
    with pytest.raises(lp.ArgumentError, match="'one' is adapter:default and 'prefix' is prefix_tuning:default"):
        adapted.combine("no", ["one", "prefix"])
    with pytest.raises(lp.ArgumentError, match="weights mean nothing for prefix_tuning"):
        adapted.combine("no", {"prefix": 0.5}, method="cat")


# --- weights by a metric -------------------------------------------------------------------------------


class Regression:
    """Two deltas of a linear model, and data of which a known sum of them is the truth."""

    def __init__(self, folder: Path, methods: dict[str, Any], truth: dict[str, float]) -> None:
        self.base = self.model()
        changes = {}
        for seed, (name, method) in enumerate(methods.items()):
            model = self.model()
            adapted = lp.apply(model, [method()])
            with torch.no_grad():
                for parameter in (p for p in model.parameters() if p.requires_grad):
                    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                    parameter += noise
            adapted.save(folder / f"{name}.pet.safetensors")
            adapted.merge_()
            changes[name] = {key: t - self.base.state_dict()[key] for key, t in model.state_dict().items()}
        for name in methods:
            lp.load_delta(self.base, folder / f"{name}.pet.safetensors", name=name)
        self.adapted = lp.Adapted(self.base)
        self.x = torch.randn(50, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        target = self.model()
        with torch.no_grad():
            for key, tensor in target.state_dict().items():
                tensor += sum(weight * changes[name][key] for name, weight in truth.items())
            self.y = target(self.x)
        self.calls, self.seen = 0, set()

    @staticmethod
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).double().eval()

    def validate(self, root: nn.Module) -> Tensor:
        self.calls += 1
        self.seen |= {id(d.delta) for d in self.adapted.record.deltas(root) if d.method.delta == "best"}
        with torch.no_grad():
            return (root(self.x) - self.y).square().mean()


TASKS = {
    "low rank": {
        "one": lambda: lora(r=2, target_modules=["1"]),
        "two": lambda: lora(r=3, target_modules=["1"], use_rslora=True),
    },
    "through weights": {
        "one": lambda: lora(r=2, target_modules=["1"], use_dora=True),
        "two": lambda: lora(r=1, target_modules=["1"], modules_to_save=["1.bias"]),
    },
}


@pytest.mark.parametrize("case", TASKS)
def test_weights_are_found_by_a_metric(case: str, tmp_path: Path) -> None:
    wanted = {"one": 0.7, "two": -0.3}
    task = Regression(tmp_path, TASKS[case], wanted)
    adapted, before = task.adapted, task.base(task.x)
    found = lp.choose_weights(adapted, list(wanted), task.validate, mode="min", name="best", rounds=5, grid=[0.3, 0.6])
    assert found.weights == pytest.approx(wanted, abs=0.03)
    assert found.value == min(value for _, value in found.trials)
    assert found.value < found.even / 50
    assert found.trials[0] == (dict.fromkeys(wanted, 0.5), found.even)
    assert len(found.trials) == task.calls
    assert len(task.seen) == 1  # one delta, into which numbers were written
    with adapted.using("best"):
        assert float(task.validate(task.base)) == pytest.approx(found.value)
    assert adapted.active == ("one",)
    assert torch.allclose(task.base(task.x), before, atol=1e-12)
    largest = lp.choose_weights(adapted, list(wanted), lambda root: -task.validate(root), mode="max", rounds=0)
    assert largest.value == max(value for _, value in largest.trials)
    assert list(adapted) == ["one", "two", "best"]


def test_entries_are_cut_with_weights_that_are_not_negative(files: Any) -> None:
    _, adapted = model_with(files, "lora", "full")
    found = lp.choose_weights(
        adapted, ["lora", "full"], lambda root: output(root).square().sum(), mode="min", method="ties", rounds=2
    )
    assert all(min(weights.values()) >= 0 and any(weights.values()) for weights, _ in found.trials)


def test_what_only_an_average_has_stays_one(tmp_path: Path) -> None:
    from tests.engine.test_combining import bert

    for index, name in enumerate(("one", "two")):
        model, ids = bert()
        method = lp.AdapterCallback(bottleneck_size=2, modules_to_save=[], verbose=False)
        perturb(lp.apply(model, [method], forward=lambda model=model, ids=ids: model(ids)), scale=0.1 - 0.3 * index)
        lp.save_delta(model, tmp_path / f"{name}.pet.safetensors")
    model, ids = bert()
    for name in ("one", "two"):
        lp.load_delta(model, tmp_path / f"{name}.pet.safetensors", name=name)
    adapted = lp.Adapted(model)
    with torch.no_grad(), adapted.using("two"):
        target = model(ids).logits

    def validate(root: nn.Module) -> float:
        with torch.no_grad():
            return float((root(ids).logits - target).square().mean())

    found = lp.choose_weights(adapted, ["one", "two"], validate, mode="min")
    assert found.weights == pytest.approx({"one": 0.0, "two": 1.0}, abs=1e-6)
    assert all(sum(weights.values()) == pytest.approx(1) for weights, _ in found.trials)


def test_a_trainer_may_validate(files: Any) -> None:
    import lightning as L

    class Task(L.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("loss", self.model(X).square().mean())

    model, adapted = model_with(files, "lora", "head")
    task, data = Task(model), torch.utils.data.DataLoader([0])
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(**quiet)

    def validate(_: nn.Module) -> float:
        return trainer.validate(task, data, verbose=False)[0]["loss"]

    found = lp.choose_weights(adapted, ["lora", "head"], validate, mode="min", rounds=1, grid=[0.0, 1.0], name="best")
    with adapted.using("best"):
        assert float(output(model).square().mean()) == pytest.approx(found.value)
    assert found.value < found.even


def test_a_search_that_fails_leaves_the_model_as_it_was(files: Any) -> None:
    model, adapted = model_with(files, "lora", "head")
    before, keys = output(model), list(model.state_dict())

    def fails(root: nn.Module) -> float:
        raise RuntimeError("no data")

    for options, message in (
        ({"names": ["lora", "heads"]}, "Did you mean 'head'"),
        ({"validate": 3}, "expected a function"),
        ({"mode": "least"}, "mode='least'"),
        ({"grid": [float("nan")]}, "finite numbers"),
        ({"step": 0}, "step=0"),
        ({"rounds": -1}, "rounds=-1"),
        ({"name": "lora"}, "there is a delta of this name"),
        ({"validate": lambda root: "good"}, "validate returned 'good'"),
        ({"validate": lambda root: float("nan"), "rounds": 0}, "no finite number"),
    ):
        given = {"names": ["lora", "head"], "validate": lambda root: 0.0, "mode": "min", **options}
        with pytest.raises(lp.ArgumentError, match=message):
            lp.choose_weights(adapted, given.pop("names"), given.pop("validate"), **given)
    with pytest.raises(RuntimeError, match="no data"):
        lp.choose_weights(adapted, ["lora", "head"], fails, mode="min")
    assert list(model.state_dict()) == keys
    assert torch.equal(output(model), before)


def test_the_verb_takes_the_base_where_it_is_needed(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    from lightning_pet.cli.main import main
    from tests.engine.test_combining import bert

    base, folder = bert(), tmp_path / "base"
    base[0].save_pretrained(folder)
    paths = []
    for index, use_dora in enumerate((True, False)):
        model, ids = bert()
        model.load_state_dict(base[0].state_dict())
        options = {"r": 2 + index, "use_dora": use_dora, "modules_to_save": [], "verbose": False}
        perturb(lp.apply(model, [lp.LoRACallback(**options)], forward=lambda model=model, ids=ids: model(ids)))
        paths.append(tmp_path / f"{index}.pet.safetensors")
        lp.save_delta(model, paths[-1])
    verb = ["lightning-pet", "combine", *map(str, paths), f"--output={tmp_path / 'c.pet.safetensors'}", "--how=svd"]
    monkeypatch.setattr("sys.argv", [*verb, "--rank=3"])
    with pytest.raises(SystemExit, match=r"use_dora=True.*"):
        main()
    monkeypatch.setattr("sys.argv", [*verb, "--rank=3", f"--base={tmp_path}"])
    with pytest.raises(SystemExit, match="not a folder of a transformers model"):
        main()
    monkeypatch.setattr("sys.argv", [*verb, "--rank=3", f"--base={folder}", "--weights=0.5,0.25"])
    main()
    assert "relative error of the change" in capsys.readouterr().out
    model, _ = bert()
    model.load_state_dict(base[0].state_dict())
    adapted = lp.load_delta(model, tmp_path / "c.pet.safetensors")
    assert [applied.method for applied in adapted.record.applied] == ["lora"]
    assert read(tmp_path / "c.pet.safetensors").notes["combined"].startswith("svd: 0.5 x 1-0 (")


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_positions_one_behind_the_other_are_what_both_are_together(method: str, tmp_path: Path) -> None:
    from tests.engine.test_combining import bert

    paths = []
    for index in range(2):
        model, ids = bert()
        options = {"modules_to_save": [], "verbose": False, "length": 2 + index}
        chosen = (
            lp.PrefixTuningCallback(projection=False, **options)
            if method == "prefix"
            else lp.PromptTuningCallback(**options)
        )
        perturb(lp.apply(model, [chosen], forward=lambda model=model, ids=ids: model(ids)), scale=0.2 + index)
        paths.append(tmp_path / f"{index}.pet.safetensors")
        lp.save_delta(model, paths[-1])
    model, ids = bert()
    for name, path in zip(("one", "two"), paths, strict=True):
        lp.load_delta(model, path, name=name)
    adapted = lp.Adapted(model)
    adapted.combine("both", ["one", "two"], method="cat")
    adapted.activate("one", "two")
    together = model(ids).logits
    adapted.activate("both")
    assert torch.allclose(model(ids).logits, together, atol=1e-5)


def test_weights_beyond_what_a_tensor_holds_and_a_removal_in_a_forward(files: Any) -> None:
    model, adapted = model_with(files, "lora", "lora3")
    before = output(model)
    for weights in ({"lora": 1e308}, {"lora": 1e308, "lora3": 1e308}):
        with pytest.raises(lp.ArgumentError, match="numbers that are not finite"):
            adapted.combine("both", weights)
    with pytest.raises(lp.ArgumentError, match="there is no delta"):
        adapted.activate(["lora"])
    assert list(adapted) == ["lora", "lora3"]
    adapted["lora3"].remove()
    inside, go, found = threading.Event(), threading.Event(), []

    def waits(*_: Any) -> None:
        inside.set()
        go.wait(10)

    model.fc1.register_forward_hook(waits)
    thread = threading.Thread(target=lambda: found.append(output(model)))
    thread.start()
    inside.wait()
    threading.Timer(0.2, go.set).start()
    adapted["lora"].remove()  # waits for the forward, which needs the delta of the next layer
    thread.join()
    assert torch.equal(found[0], before)


def test_other_names_of_the_methods_do_not_matter(files: Any) -> None:
    _, adapted = model_with(files, "lora", "lora3")  # the second is called "third"
    adapted.combine("both", ["lora3", "lora"])
    (applied,) = adapted["both"].record.applied
    assert (applied.method, applied.name) == ("lora", "third")


def test_beside_a_quantised_weight_a_change_has_a_rank(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).eval()
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model

    model, x = build(), torch.randn(2, 32)
    for name, use_dora in (("one", False), ("two", True)):
        adapted = lp.apply(build(), [lora(target_modules=["0"], use_dora=use_dora)])
        perturb(adapted, scale=0.1)
        adapted.save(tmp_path / f"{name}.pet.safetensors")
        lp.load_delta(model, tmp_path / f"{name}.pet.safetensors", name=name)
    adapted = lp.Adapted(model)
    with pytest.raises(lp.ArgumentError, match=r"0\.weight is stored as .* method='svd', rank=8"):
        adapted.combine("both", ["one", "two"])
    adapted.combine("both", {"two": 1.0}, method="svd", rank=32)
    outputs = []
    for name in ("two", "both"):
        with torch.no_grad(), adapted.using(name):
            outputs.append(model(x))
    assert torch.allclose(*outputs, atol=1e-4)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_deltas_that_were_trained_together(method: Any, tmp_path: Path) -> None:
    from tests.engine import test_tasks as tasks

    module = tasks.Module(tasks.Net())
    together = [lora(target_modules=["fc1", "fc2"], modules_to_save=None, verbose=False)]
    run = tasks.trainer(*together, lp.TasksCallback(tasks=list(tasks.TASKS), key="task"), max_epochs=1)
    run.fit(module, tasks.loader())
    adapted, x = lp.Adapted(module), torch.randn(3, tasks.WIDTH)
    paths = []
    for name in tasks.TASKS:
        paths.append(tmp_path / f"{name}.pet.safetensors")
        adapted[name].save(paths[-1])
    other = tasks.Module(tasks.Net())
    for name, path in zip(tasks.TASKS, paths, strict=True):
        lp.load_delta(other, path, name=name)
    outputs = []
    for each in (module, other):
        handle = lp.Adapted(each.eval())
        handle.combine("both", dict(zip(tasks.TASKS, (0.75, 0.25), strict=True)), method=method)
        with torch.no_grad(), handle.using("both"):
            outputs.append(each(x))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-6)
    if method == "linear":
        lp.combine_deltas(paths, tmp_path / "c.pet.safetensors", weights=[0.75, 0.25])
        last = tasks.Module(tasks.Net()).eval()
        lp.load_delta(last, tmp_path / "c.pet.safetensors")
        assert torch.allclose(last(x), outputs[0], atol=1e-6)
