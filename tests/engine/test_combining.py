"""Arithmetic on delta files is arithmetic on changes of weights."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_pet as lp
from lightning_pet.layers import combining as arithmetic
from lightning_pet.store.reader import read
from tests.methods.battery import perturb

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.fc1 = nn.Linear(6, 10)
        self.fc2 = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.emb.weight[:5] + self.conv(x.t()[None])[0].t()
        return h + self.fc2(torch.tanh(self.fc1(h)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double().eval()


def saved(path: Path, *callbacks: Any, move: int | None = 0) -> dict[str, Tensor]:
    """Writes a delta; returns the change of every weight that it merges to."""
    model = net()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = lp.apply(model, list(callbacks), forward=lambda: model(X))
    if move is not None:
        for _ in range(move + 1):
            perturb(adapted)
        with torch.no_grad():  # every file moves to another place
            for name, tensor in adapted.state_dict().items():
                if tensor.is_floating_point() and not name.endswith(("0", "kept")):
                    tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(move)) * 0.3)
    lp.save_delta(model, path)
    return _changes(adapted, base)


def _changes(adapted: Any, base: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        adapted.merge_()
    except lp.NotMergeableError:
        return {}
    return {name: tensor - base[name] for name, tensor in adapted.root.state_dict().items()}


def loaded(path: Path) -> dict[str, Tensor]:
    model = net()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return _changes(lp.load_delta(model, path), base)


def lora(**options: Any) -> Any:
    names = {"target_modules": ["fc1", "fc2", "conv", "emb"], "modules_to_save": []}
    return lp.LoRACallback(**{"r": 2, **names, **options})


LORAS: dict[str, tuple[Any, Any]] = {
    "equal": (lambda: lora(), lambda: lora()),
    "other ranks and alphas": (
        lambda: lora(r=1, alpha=4, use_rslora=True),
        lambda: lora(rank_pattern={"fc1": 3}, alpha_pattern={"fc1": 2.0}),
    ),
    "other places": (lambda: lora(target_modules=["fc1", "conv"]), lambda: lora(target_modules=["fc1", "fc2"])),
    "pissa": (
        lambda: lora(init="pissa", target_modules=["fc1", "emb"]),
        lambda: lora(target_modules=["fc1"], init="olora"),
    ),
    "more than the place has": (lambda: lora(r=5), lambda: lora(r=6)),
    "biases": (
        lambda: lora(target_modules=["fc1", "conv"], lora_bias=True),
        lambda: lora(target_modules=["fc1", "conv"], lora_bias=True),
    ),
}


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.5, -1.0)])
@pytest.mark.parametrize("case", LORAS)
def test_the_sum_of_low_rank_deltas_is_the_sum_of_their_changes(case: str, weights: Any, tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{name}.pet.safetensors" for name in "abc")
    first, second = LORAS[case]
    one, two = saved(a, first(), move=1), saved(b, second(), move=2)
    made = lp.combine_deltas([a, b], c, weights=weights)
    assert made.error == 0
    found = loaded(c)
    assert found.keys() == one.keys()
    assert any(change.abs().max() > 0.1 for change in found.values())
    for name in found:
        assert torch.allclose(found[name], weights[0] * one[name] + weights[1] * two[name], atol=1e-10), name


def test_negation_takes_away_and_one_file_is_enough(tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{name}.pet.safetensors" for name in "abc")
    one = saved(a, lora(), move=1)
    lp.combine_deltas([a], b, weights=[-1])
    assert all(torch.allclose(change, -one[name], atol=1e-12) for name, change in loaded(b).items())
    lp.combine_deltas([a, b], c, weights=[1, 1])
    assert all(change.abs().max() < 1e-12 for change in loaded(c).values())


def test_the_best_approximation_of_a_rank_and_its_error(tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{name}.pet.safetensors" for name in "abc")
    plain = {"target_modules": ["fc1", "fc2"]}
    one, two = saved(a, lora(r=3, **plain), move=1), saved(b, lora(r=3, **plain), move=2)
    made = lp.combine_deltas([a, b], c, weights=[1, 2], how="svd", rank=2)
    found, lost, whole = loaded(c), 0.0, 0.0
    for name in ("fc1.weight", "fc2.weight"):
        wanted = one[name] + 2 * two[name]
        u, s, vh = torch.linalg.svd(wanted, full_matrices=False)
        assert torch.allclose(found[name], u[:, :2] * s[:2] @ vh[:2], atol=1e-10)
        lost, whole = lost + float(s[2:].square().sum()), whole + float(s.square().sum())
    assert made.error == pytest.approx((lost / whole) ** 0.5)
    assert set(made.ranks.values()) == {2}
    with pytest.raises(lp.ArgumentError, match="rank=2 with how='linear'"):
        lp.combine_deltas([a, b], c, rank=2)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.5, -1.0)])
def test_triplets_are_factors_too(weights: Any, tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{name}.pet.safetensors" for name in "abc")

    def adalora(rank: int) -> Any:
        names = {"target_modules": ["fc1", "fc2", "conv"], "modules_to_save": []}
        return lp.AdaLoRACallback(init_r=rank, target_r=1, alpha=5, **names)

    one, two = saved(a, adalora(2), move=1), saved(b, adalora(3), move=2)
    lp.combine_deltas([a, b], c, weights=weights)
    found = loaded(c)
    assert any(change.abs().max() > 0.05 for change in found.values())
    assert all(torch.allclose(t, weights[0] * one[n] + weights[1] * two[n], atol=1e-10) for n, t in found.items())
    model = net()
    adapted = lp.load_delta(model, b)  # one triplet of one place was switched off in a run
    delta = next(found.delta for found in adapted.record.deltas(model) if found.target.module == "fc1")
    with torch.no_grad():
        delta.kept[0], delta.e[0] = 0, 0.0
    lp.save_delta(model, b)
    two = loaded(b)
    lp.combine_deltas([b, a], c, weights=weights)
    assert all(torch.allclose(t, weights[0] * two[n] + weights[1] * one[n], atol=1e-10) for n, t in loaded(c).items())
    assert lp.inspect_delta(c).methods[0].config["init_r"] == 5
    lp.combine_deltas([a, b, b], c, how="svd", rank=2)
    lp.load_delta(net(), c)
    with pytest.raises(lp.ArgumentError, match="means nothing for adalora:default"):
        lp.combine_deltas([a, b], c, how="peft_linear")


def test_all_places_of_an_adalora_start_with_one_rank(tmp_path: Path) -> None:
    files = []
    for name in "ab":
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 6))
        adapted = lp.apply(model, [lp.AdaLoRACallback(init_r=2, target_r=1, target_modules=["0", "1"])])
        perturb(adapted)
        files.append(tmp_path / f"{name}.pet.safetensors")
        lp.save_delta(model, files[-1])
    with pytest.raises(lp.ArgumentError, match=r"0\.pet\.adalora_default can have 3 at most.*Use how='svd'"):
        lp.combine_deltas(files, tmp_path / "c.pet.safetensors")
    lp.combine_deltas(files, tmp_path / "c.pet.safetensors", how="svd", rank=3)


def elected(changes: list[Tensor], weights: Any) -> Tensor:
    """TIES, entry by entry."""
    out = torch.zeros_like(changes[0])
    for index in range(out.numel()):
        entries = [(float(change.flatten()[index]), w) for change, w in zip(changes, weights, strict=True)]
        sign = sum(v * w for v, w in entries)
        agree = [(v, w) for v, w in entries if v * sign > 0]
        if agree:
            out.view(-1)[index] = sum(weights) * sum(v * w for v, w in agree) / sum(w for _, w in agree)
    return out


@pytest.mark.parametrize("how", ["ties", "magnitude_prune", "dare_linear", "dare_ties"])
def test_what_looks_at_entries_looks_at_those_of_the_change(how: Any, tmp_path: Path) -> None:
    a, b, c, d = (tmp_path / f"{name}.pet.safetensors" for name in "abcd")
    plain = {"target_modules": ["fc1"]}
    one, two = saved(a, lora(**plain), move=1), saved(b, lora(**plain), move=2)
    changes, weights = [one["fc1.weight"], two["fc1.weight"]], (0.7, 0.3)
    made = lp.combine_deltas([a, b], c, weights=weights, how=how, density=0.5, rank=6, seed=3)
    assert made.error < 1e-12  # as many as the place has
    found = loaded(c)["fc1.weight"]
    lp.combine_deltas([a, b], d, weights=weights, how=how, density=0.5, rank=6, seed=3)
    assert torch.equal(loaded(d)["fc1.weight"], found)
    if how.startswith("dare"):
        lp.combine_deltas([a, b], d, weights=weights, how=how, density=0.5, rank=6, seed=4)
        assert not torch.allclose(loaded(d)["fc1.weight"], found)
        return
    kept = [torch.where(t.abs() >= t.abs().flatten().sort().values[t.numel() // 2], t, 0.0) for t in changes]
    wanted = elected(kept, weights) if how == "ties" else 0.7 * kept[0] + 0.3 * kept[1]
    assert torch.allclose(found, wanted, atol=1e-10)
    assert lp.combine_deltas([a, b], d, weights=weights, how=how, density=0.5, rank=1).error > 0.1


def test_dropping_at_random_is_right_on_average() -> None:
    change = torch.randn(20, 20, dtype=torch.float64)
    draws = [arithmetic.dropped(change, 0.5, torch.Generator().manual_seed(seed)) for seed in range(400)]
    assert all(((draw == 0) | torch.isclose(draw, 2 * change)).all() for draw in draws)
    assert (torch.stack(draws).mean(0) - change).norm() / change.norm() < 0.08


@pytest.mark.parametrize(("how", "theirs"), [("peft_linear", "linear"), ("peft_ties", "ties")])
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -0.5)])
def test_what_is_named_after_peft_is_what_peft_does(how: Any, theirs: str, weights: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    a, b, c = (tmp_path / f"{name}.pet.safetensors" for name in "abc")
    plain = {"target_modules": ["fc1", "fc2"]}
    saved(a, lora(alpha=3, **plain), move=1)
    saved(b, lora(alpha=8, **plain), move=2)
    density = {"density": 0.5} if theirs == "ties" else {}
    lp.combine_deltas([a, b], c, weights=weights, how=how, **density)
    wrapped: Any = None
    for name, path, alpha in (("one", a, 3), ("two", b, 8)):
        config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["fc1", "fc2"])
        wrapped = peft.get_peft_model(net(), config, name) if wrapped is None else wrapped
        if name == "two":
            wrapped.add_adapter(name, config)
        for key, tensor in read(path).tensors.items():
            layer = getattr(wrapped.base_model.model, key.partition(".")[0])
            getattr(layer, "lora_A" if key.endswith(".a") else "lora_B")[name].weight.data = tensor.clone()
    wrapped.add_weighted_adapter(["one", "two"], list(weights), "both", combination_type=theirs, **density)
    found = loaded(c)
    for layer in ("fc1", "fc2"):
        change = getattr(wrapped.base_model.model, layer).get_delta_weight("both")
        assert torch.allclose(found[f"{layer}.weight"], change, atol=1e-6)
    if theirs == "linear":  # it is not the sum of the changes
        lp.combine_deltas([a, b], c, weights=weights)
        assert (loaded(c)["fc1.weight"] - found["fc1.weight"]).abs().max() > 0.1


def test_ia3_is_linear_in_its_factors_and_adapters_are_averaged(tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{name}.pet.safetensors" for name in "abc")

    def ia3() -> Any:
        return lp.IA3Callback(target_modules=["fc1"], feedforward_modules=["fc2"], modules_to_save=[])

    one, two = saved(a, ia3(), move=1), saved(b, ia3(), move=2)
    lp.combine_deltas([a, b], c, weights=[0.5, -0.25])
    assert all(torch.allclose(t, 0.5 * one[n] - 0.25 * two[n], atol=1e-10) for n, t in loaded(c).items())
    with pytest.raises(lp.ArgumentError, match="how='ties' means nothing for ia3:default; use linear"):
        lp.combine_deltas([a, b], c, how="ties")


def test_adapters_are_averaged(tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{name}.pet.safetensors" for name in "abc")
    for path in (a, b):
        model, ids = bert()
        options = {"bottleneck_size": 2, "modules_to_save": [], "verbose": False}
        adapted = lp.apply(model, [lp.AdapterCallback(**options)], forward=lambda model=model, ids=ids: model(ids))
        perturb(adapted, scale=0.1 if path == a else -0.2)
        lp.save_delta(model, path)
    lp.combine_deltas([a, b], c)
    first, second = read(a).tensors, read(b).tensors
    assert all(torch.allclose(t, (first[n] + second[n]) / 2) for n, t in read(c).tensors.items())
    lp.load_delta(bert()[0], c)
    with pytest.raises(lp.ArgumentError, match="not linear in its parameters"):
        lp.combine_deltas([a, b], c, weights=[1, 1])


def test_fixed_differences_add_up(tmp_path: Path) -> None:
    from lightning_pet.store.delta_file import write_delta
    from lightning_pet.store.manifest import Manifest, MethodRecord

    files = [tmp_path / "a.pet.safetensors", tmp_path / "b.pet.safetensors"]
    places = [[1, 4, 7], [4, 8]]
    for path, own in zip(files, places, strict=True):
        tensors = {
            "fc1.pet.diff_pruning_default.indices": torch.tensor(own, dtype=torch.int32),
            "fc1.pet.diff_pruning_default.values": torch.ones(len(own)),
        }
        write_delta(path, tensors, Manifest((MethodRecord("diff_pruning", "default"),)))
    out = tmp_path / "c.pet.safetensors"
    lp.combine_deltas(files, out, weights=[2, -0.5])
    found = read(out).tensors
    assert found["fc1.pet.diff_pruning_default.indices"].tolist() == [1, 4, 7, 8]
    assert found["fc1.pet.diff_pruning_default.values"].tolist() == [2, 1.5, 2, -0.5]


def bert() -> tuple[nn.Module, Tensor]:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(vocab_size=40, **sizes)).eval(), torch.arange(6)[None]


@pytest.mark.parametrize("method", ["prefix", "folded prefix", "prompt"])
def test_positions_are_put_one_behind_the_other(method: str, tmp_path: Path) -> None:
    def make(length: int, name: str) -> Any:
        options = {"length": length, "name": name, "modules_to_save": [], "verbose": False}
        if method == "prompt":
            return lp.PromptTuningCallback(init="random", **options)
        return lp.PrefixTuningCallback(projection=method == "folded prefix", projection_size=8, **options)

    both, ids = bert()
    first, second = make(2, "one"), make(3, "two")
    adapted = lp.apply(both, [first, second], forward=lambda: both(ids))
    perturb(adapted)
    wanted = both(ids).logits
    values = adapted.state_dict()
    files = []
    for length, name in ((2, "one"), (3, "two")):
        alone, _ = bert()
        other = lp.apply(alone, [make(length, "default")], forward=lambda alone=alone: alone(ids))
        state = {key: values[key.replace("_default", f"_{name}")] for key in other.state_dict()}
        other.load_state_dict(state)
        files.append(tmp_path / f"{name}.pet.safetensors")
        lp.save_delta(alone, files[-1])
    out = tmp_path / "both.pet.safetensors"
    lp.combine_deltas(files, out, how="cat")
    fresh, _ = bert()
    lp.load_delta(fresh, out)
    assert torch.allclose(fresh(ids).logits, wanted, atol=1e-5)
    assert lp.inspect_delta(out).methods[0].config["length"] == 5
    with pytest.raises(lp.ArgumentError, match="means nothing for"):
        lp.combine_deltas(files, out)
    with pytest.raises(lp.ArgumentError, match="weights mean nothing"):
        lp.combine_deltas(files, out, how="cat", weights=[1, 1])


def test_heads_and_biases_are_averaged(tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{name}.pet.safetensors" for name in "abc")
    options = {"target_modules": ["fc1"], "modules_to_save": ["fc2"]}
    one, two = saved(a, lora(**options), move=1), saved(b, lora(**options), move=2)
    lp.combine_deltas([a, b], c, weights=[0.75, 0.25])
    assert all(torch.allclose(t, 0.75 * one[n] + 0.25 * two[n], atol=1e-10) for n, t in loaded(c).items())
    with pytest.raises(lp.ArgumentError, match=r"fc2\.bias trains as a part of the base"):
        lp.combine_deltas([a, b], c, weights=[1, 1])
    saved(b, lora(target_modules=["fc1"]), move=2)
    with pytest.raises(lp.DeltaFileError, match="modules_to_save"):
        lp.combine_deltas([a, b], c)
    one, two = saved(a, lp.BitFitCallback(), move=1), saved(b, lp.BitFitCallback(), move=2)
    lp.combine_deltas([a, b], c)
    assert all(torch.allclose(t, (one[n] + two[n]) / 2, atol=1e-10) for n, t in loaded(c).items())


def test_what_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{name}.pet.safetensors" for name in "abc")
    saved(a, lora(target_modules=["fc1"]), move=1)
    saved(b, lora(target_modules=["fc1"]), move=2)
    for options, message in (
        ({"weights": [1]}, "1 weights for 2 files"),
        ({"weights": [1, float("nan")]}, "finite number"),
        ({"weights": [1, -1], "how": "ties"}, "at least zero"),
        ({"weights": [0, 0], "how": "dare_ties"}, "not all zero"),
        ({"how": "mean"}, "use one of linear"),
        ({"density": 0.5}, "density=0.5 with how='linear'"),
        ({"how": "ties", "density": 0.0}, r"in \(0, 1\]"),
        ({"how": "svd", "rank": 0}, "positive integer"),
        ({"weights": 0.5}, "expected a list with one number for each file"),
        ({"weights": "0.5"}, "expected a list with one number for each file"),
        ({"weights": ["much", 1]}, "expected a list with one number for each file"),
        ({"how": "ties", "density": "0.5"}, "expected a number"),
        ({"how": "dare_linear", "seed": "one"}, "expected an integer"),
    ):
        with pytest.raises(lp.ArgumentError, match=message):
            lp.combine_deltas([a, b], c, **options)
    with pytest.raises(lp.ArgumentError, match="expected a list of paths"):
        lp.combine_deltas(a, c)  # type: ignore[arg-type]
    with pytest.raises(lp.ArgumentError, match="nothing to combine"):
        lp.combine_deltas([], c)
    with pytest.raises(lp.ArgumentError, match="is one of the files"):
        lp.combine_deltas([a, b], a)
    saved(b, lora(target_modules=["fc1"], r=3), move=2)
    with pytest.raises(lp.DeltaFileError, match="all ranks have to be equal"):
        lp.combine_deltas([a, b], c, how="peft_linear")
    saved(b, lora(target_modules=["fc1"], use_dora=True), move=2)
    with pytest.raises(lp.DeltaFileError, match="use_dora"):
        lp.combine_deltas([a, b], c)
    with pytest.raises(lp.DeltaFileError, match="a DoRA rescales the whole weight"):
        lp.combine_deltas([b], c)
    saved(b, lp.BitFitCallback(), move=2)
    with pytest.raises(lp.DeltaFileError, match=r"holds lora:default, .* holds bitfit:default"):
        lp.combine_deltas([a, b], c)
    saved(b, lp.IntrinsicDimensionCallback(d=20), move=2)
    with pytest.raises(lp.DeltaFileError, match="no arithmetic on files"):
        lp.combine_deltas([b], c)
    other = net()
    with torch.no_grad():
        other.fc2.weight.add_(1)
    lp.apply(other, [lora(target_modules=["fc1"])])
    lp.save_delta(other, b)
    with pytest.raises(lp.BaseMismatchError, match="bases that differ in their values"):
        lp.combine_deltas([a, b], c)
    assert not c.exists()


def test_the_verb_needs_no_lightning_and_notes_where_the_file_comes_from(tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{name}.pet.safetensors" for name in "abc")
    one, two = saved(a, lora(), move=1), saved(b, lora(), move=2)
    code = (
        f"import sys\nsys.argv = ['lightning-pet', 'combine', {str(a)!r}, {str(b)!r}, '--weights=0.7,0.3',"
        f" '--how=ties', '--density=1', '--rank=6', '--output={c}']\n"
        "from lightning_pet.cli.main import main\nmain()\n"
        "assert not any(name.startswith('lightning.pytorch') for name in sys.modules), 'Lightning'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "delta file:" in done.stdout
    found = loaded(c)
    wanted = elected([one["fc1.weight"], two["fc1.weight"]], (0.7, 0.3))
    assert torch.allclose(found["fc1.weight"], wanted, atol=1e-10)
    noted = lp.inspect_delta(c).notes["combined"]
    assert noted.startswith("ties, density 1: 0.7 x a.pet.safetensors (")
