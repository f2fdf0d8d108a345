"""Each row of a batch with its own delta: as if the rows had been computed one by one."""

from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding

from lightning_pet import (
    AdaLoRACallback,
    Adapted,
    AdapterBiasCallback,
    AdapterCallback,
    ArgumentError,
    AutoPromptCallback,
    BitFitCallback,
    CompacterCallback,
    DiffPruningCallback,
    FullFineTuningCallback,
    IA3Callback,
    IntrinsicDimensionCallback,
    LayerFreezingCallback,
    LoRACallback,
    PETCallback,
    PETError,
    PrefixTuningCallback,
    PromptTuningCallback,
    TargetError,
    apply,
    load_delta,
)
from lightning_pet.layers.prompt import TriggerRows
from tests.methods import zoo
from tests.methods.battery import in_threads, perturb

NONE = {"modules_to_save": []}
Build = Callable[[int], list[PETCallback]]

METHODS: dict[str, Build] = {
    "lora": lambda i: [LoRACallback(r=2 + i, **NONE)],
    "pissa": lambda i: [LoRACallback(r=2, init="pissa", **NONE)],
    "olora": lambda i: [LoRACallback(r=2 + i, init="olora", use_rslora=True, **NONE)],
    "adalora": lambda i: [AdaLoRACallback(init_r=3 + i, target_r=2, **NONE)],
    "biased": lambda i: [LoRACallback(r=2, lora_bias=i > 0, **NONE)],
    "dora": lambda i: [LoRACallback(r=2, use_dora=True, **NONE)],
    "ia3": lambda i: [IA3Callback(**NONE)],
    "houlsby": lambda i: [AdapterCallback(bottleneck_size=4 + i, **NONE)],
    "pfeiffer": lambda i: [AdapterCallback(placement="pfeiffer", bottleneck_size=4, **NONE)],
    "parallel": lambda i: [AdapterCallback(placement="parallel", bottleneck_size=4, **NONE)],
    "compacter": lambda i: [CompacterCallback(bottleneck_size=4, phm_dim=2, **NONE)],
    "adapter_bias": lambda i: [AdapterBiasCallback(**NONE)],
    "bitfit": lambda i: [BitFitCallback(add_missing=True, **NONE)],
    "prefix": lambda i: [PrefixTuningCallback(length=2 + i, projection=False, **NONE)],
    "network": lambda i: [PrefixTuningCallback(length=3, projection_size=4, **NONE)],
    "pruning": lambda i: [DiffPruningCallback(density=0.1, **NONE)],
    "subspace": lambda i: [IntrinsicDimensionCallback(d=60, **NONE)],
    "full": lambda i: [FullFineTuningCallback()],
    "freezing": lambda i: [LayerFreezingCallback(train_last=1)],
    "head": lambda i: [LoRACallback(r=2)],
}
MIXED = ["lora", "prefix", "houlsby", "dora", "bitfit", "head"]


def several(model: str, builds: list[list[PETCallback]], folder: Path) -> tuple[nn.Module, Adapted]:
    """A model in float64 with deltas d0, d1, …, trained apart."""
    for number, methods in enumerate(builds):
        base, _ = getattr(zoo, model)()
        adapted = apply(base.double(), methods)
        perturb(adapted, 0.1 * (number + 1))
        adapted.save(folder / f"{number}.pet.safetensors")
    net, _ = getattr(zoo, model)()
    net.double().eval()
    for number in range(len(builds)):
        load_delta(net, folder / f"{number}.pet.safetensors", name=f"d{number}")
    return net, Adapted(net)


def inputs(model: str, rows: int = 5) -> dict[str, Tensor]:
    ids = torch.randint(4, 20, (rows, 6), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :4]} if model == "t5" else {})}


def check(net: nn.Module, adapted: Adapted, given: dict[str, Tensor], names: list[str | None]) -> Tensor:
    """Outputs and gradients by rows are those of each delta on its own rows."""
    own = [p for n, p in net.named_parameters() if ".pet." in n and p.is_floating_point()]
    for parameter in own:
        parameter.requires_grad_(True)

    def run(rows: list[int]) -> Tensor:
        return zoo.first_tensor(net(**{name: value[rows] for name, value in given.items()}))

    def gradients(total: Tensor) -> list[Tensor | None]:
        if not own or not total.requires_grad:
            return [None] * len(own)
        return list(torch.autograd.grad(total, own, allow_unused=True))

    with adapted.rows(names):
        out = run(list(range(len(names))))
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        found = [0.0 if g is None else g for g in gradients((out * weights).sum())]
    expected: list = [0.0] * len(own)
    scale = max(1.0, float(out.detach().abs().max()))
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        with adapted.using(*filter(None, [name])):
            alone = run(rows)
            assert (alone - out[rows]).abs().max() <= 1e-12 * scale
            part = gradients((alone * weights[rows]).sum())
        expected = [e if g is None else e + g for e, g in zip(expected, part, strict=True)]
    for one, other in zip(found, expected, strict=True):
        difference = torch.as_tensor(one - other).abs().max()
        assert difference <= 1e-12 * max(1.0, float(torch.as_tensor(other).abs().max()))
    return out.detach()


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_as_one_by_one(method: str, tmp_path: Path) -> None:
    net, adapted = several("bert", [METHODS[method](i) for i in range(3)], tmp_path)
    given = inputs("bert")
    with adapted.disabled(), torch.no_grad():
        base = zoo.first_tensor(net(**given))
    out = check(net, adapted, given, ["d2", None, "d0", "d1", "d2"])
    assert torch.allclose(out[1], base[1], rtol=0, atol=1e-13)
    with adapted.rows(["d2", None, "d0", "d1", "d2"]), torch.no_grad():  # with stacks that are kept
        again = [zoo.first_tensor(net(**given)) for _ in range(2)]
    assert torch.equal(again[0], again[1])
    assert torch.allclose(again[0], out, rtol=0, atol=1e-12)
    assert all((out[row] - base[row]).abs().max() > 1e-4 for row in (0, 2, 3, 4))
    check(net, adapted, given, ["d1"] * 5)  # one delta for all
    check(net, adapted, {name: value[:3] for name, value in given.items()}, ["d2", "d0", "d1"])  # one for each
    check(net, adapted, given, [None, "d1", None, None, None])  # one of many


AT_ONCE = ["lora", "pissa", "olora", "adalora", "biased", "dora", "ia3", "houlsby", "pfeiffer", "parallel", "compacter"]
AT_ONCE += ["adapter_bias", "prefix", "network"]


@pytest.mark.parametrize("method", AT_ONCE)
def test_all_rows_at_once(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = [METHODS[method](i) for i in range(3)]
    net, adapted = several("bert", builds, tmp_path)
    given = inputs("bert")
    with adapted.disabled(), torch.no_grad():
        base = zoo.first_tensor(net(**given))
    for name in ("apart", "_one_by_one"):
        monkeypatch.setattr(f"lightning_pet.insertion.rows.{name}", None)
    for names in (["d2", None, "d0", "d1", "d2"], [None, None, "d1", None, None]):
        with adapted.rows(names):
            out = zoo.first_tensor(net(**given))
        for row, name in enumerate(names):
            same = torch.allclose(out[row], base[row], rtol=0, atol=1e-13 * ("prefix" in method or "network" in method))
            assert same == (name is None)


@pytest.mark.parametrize("model", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("method", ["lora", "ia3", "parallel", "adapter_bias", "prefix", "head"])
def test_on_other_models(model: str, method: str, tmp_path: Path) -> None:
    net, adapted = several(model, [METHODS[method](i) for i in range(2)], tmp_path)
    check(net, adapted, inputs(model), ["d1", "d0", None, "d1", "d0"])


def test_methods_are_mixed_in_one_batch(tmp_path: Path) -> None:
    net, adapted = several("bert", [METHODS[name](0) for name in MIXED], tmp_path)
    given = inputs("bert", 8)
    names = ["d3", "d0", None, "d5", "d2", "d1", "d4", "d0"]
    out = check(net, adapted, given, names)
    order = [3, 7, 1, 0, 2, 6, 5, 4]
    with adapted.rows([names[row] for row in order]), torch.no_grad():
        again = zoo.first_tensor(net(**{name: value[order] for name, value in given.items()}))
    assert torch.allclose(again, out[order], rtol=0, atol=1e-12)


def test_padded_rows_keep_their_masks(tmp_path: Path) -> None:
    net, adapted = several("llama", [METHODS["prefix"](i) for i in range(2)], tmp_path)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1], [1] * 6])
    given = {**inputs("llama"), "attention_mask": mask}
    with adapted.rows(["d1", None, "d0", "d1", "d0"]), torch.no_grad():
        out = net(**given).logits
    for row, name in enumerate(["d1", None, "d0", "d1", "d0"]):
        with adapted.using(*filter(None, [name])), torch.no_grad():
            alone = net(**{key: value[row : row + 1] for key, value in given.items()}).logits
        real = mask[row].bool()
        assert torch.allclose(out[row][real], alone[0][real], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=["greedy", "beams", "static"]
)
def test_generate(how: dict, tmp_path: Path) -> None:
    names = ["d1", None, "d0", "d2"]
    net, adapted = several(
        "llama", [METHODS[name](i) for i, name in enumerate(["lora", "prefix", "parallel"])], tmp_path
    )
    ids = inputs("llama", 4)["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **how}
    with adapted.rows(names):
        found = net.generate(ids, attention_mask=torch.ones_like(ids), **options)
    for row, name in enumerate(names):
        with adapted.using(*filter(None, [name])):
            alone = net.generate(ids[row : row + 1], attention_mask=torch.ones(1, 6, dtype=torch.long), **options)
        assert torch.equal(found[row, : alone.shape[1]], alone[0])


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_whole_weights_generate_with_beams_as_long_as_the_batch(model: str, tmp_path: Path) -> None:
    net, adapted = several(model, [METHODS["full"](i) for i in range(2)], tmp_path)
    ids, names = inputs(model, 6)["input_ids"], ["d1", "d0", None, "d1", "d0", "d0"]
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    with adapted.rows(names):
        found = net.generate(ids, attention_mask=mask, **options)
    for row, name in enumerate(names):
        with adapted.using(*filter(None, [name])):
            alone = net.generate(ids[row : row + 1], attention_mask=mask[row : row + 1], **options)
        assert torch.equal(found[row, : alone.shape[1]], alone[0])


def test_sampling_is_the_rows_own(tmp_path: Path) -> None:
    net, adapted = several("llama", [METHODS["lora"](i) for i in range(2)], tmp_path)
    ids = inputs("llama", 3)["input_ids"]
    options = {"max_new_tokens": 3, "do_sample": True, "pad_token_id": 0, "output_logits": True}
    with adapted.rows(["d0", None, "d1"]):
        torch.manual_seed(0)
        found = net.generate(ids, return_dict_in_generate=True, **options)
    with adapted.rows(["d0", None, "d1"]), torch.no_grad():
        logits = net(found.sequences[:, :-1]).logits[:, 5:]
    assert torch.allclose(torch.stack(found.logits, 1).double(), logits, rtol=0, atol=1e-5)


class Net(nn.Module):
    """Has a head, and buffers that change with the delta."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.a(x))))


def trained(folder: Path, name: str, outputs: int = 3) -> Path:
    net = Net(outputs)
    adapted = apply(net, [LoRACallback(r=2, target_modules=["a"], modules_to_save=["head"])])
    perturb(adapted, 0.2 + 0.1 * len(name))
    net.train()(torch.randn(7, 6))
    adapted.save(folder / f"{name}.pet.safetensors")
    return folder / f"{name}.pet.safetensors"


def test_heads_and_buffers_of_a_model_that_describes_nothing(tmp_path: Path) -> None:
    net = Net().eval()
    adapted = load_delta(net, trained(tmp_path, "a"), name="a")
    adapted.load("bb", trained(tmp_path, "bb"))
    kinds = [type(module) for module in net.modules()]
    x = torch.randn(6, 6)

    def rows(names: list[str | None]) -> bool:
        with adapted.rows(names), torch.no_grad():
            out = net(x)
        right = []
        for row, name in enumerate(names):
            with adapted.using(*filter(None, [name])), torch.no_grad():
                right.append(torch.allclose(net(x)[row], out[row], atol=1e-6))
        return all(right)

    assert rows(["a", "bb", None, "a", "bb", None])
    assert rows(["bb", None, "bb", "a", "a", "a"])
    assert [type(module) for module in net.modules()] == kinds
    choices = [["a", None] * 3, ["bb", "a"] * 3, [None, "bb", "a"] * 2]
    assert in_threads(lambda names: all(rows(names) for _ in range(3)), choices) == [True] * 3
    assert [type(module) for module in net.modules()] == kinds


@pytest.mark.parametrize("kind", [dict, UserDict, BatchEncoding])
def test_a_model_that_takes_its_batch_as_one_mapping(kind: type[Any], tmp_path: Path) -> None:
    class OfBatches(Net):
        def forward(self, batch: dict[str, Any]) -> Tensor:  # type: ignore[override]
            return super().forward(batch["inputs"]["x"])

    net = OfBatches().eval()
    for name in ("a", "bb"):
        adapted = load_delta(net, trained(tmp_path, name), name=name)
    x = torch.randn(4, 6)
    with torch.no_grad():
        with adapted.rows(["a", "bb", None, "a"]):
            out = net(kind({"kind": "any", "inputs": {"x": x}}))
        for row, name in enumerate(["a", "bb", None, "a"]):
            with adapted.using(*filter(None, [name])):
                torch.testing.assert_close(net(kind({"inputs": {"x": x}}))[row], out[row])
        with adapted.rows(["a", "bb"]), pytest.raises(TargetError, match="2 names for 5 rows"):
            net(kind({"inputs": {"x": torch.randn(5, 6)}}))


def test_two_heads_of_different_widths_are_refused(tmp_path: Path) -> None:
    net = Net().eval()
    adapted = load_delta(net, trained(tmp_path, "a"), name="a")
    load_delta(net, trained(tmp_path, "five", 5), name="five", base_check="off")
    with adapted.rows(["a", "five"]), pytest.raises(TargetError, match=r"'head' .*\(3,\) for 'a', \(5,\) for 'five'"):
        net(torch.randn(2, 6))
    with adapted.rows(["five", "five"]):
        assert net(torch.randn(2, 6)).shape == (2, 5)


def test_bad_rows_are_refused(tmp_path: Path) -> None:
    net = Net().eval()
    adapted = load_delta(net, trained(tmp_path, "tone"), name="tone")
    for names, message in (
        (["tone", "ton"], "Did you mean 'tone'"),
        ("tone", "expected a list"),
        ([], "expected a list"),
    ):
        with pytest.raises(ArgumentError, match=message), adapted.rows(names):
            pass
    for names in (["tone", None, "tone"], ["tone", None] * 4, ["tone"] * 3):
        with adapted.rows(names), pytest.raises(TargetError, match="ne name per row"):
            net(torch.randn(4, 6))
    with adapted.rows(["tone", None]), pytest.raises(TargetError, match="rows: 2 names for 4 rows"):
        net(torch.randn(4, 6))


class Windows(nn.Module):
    """Makes two entries of each row."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.reshape(-1, 6))


def test_a_model_around_the_root_may_make_more_of_the_rows(tmp_path: Path) -> None:
    net = Net().eval()
    adapted = load_delta(net, trained(tmp_path, "tone"), name="tone")
    x = torch.randn(2, 2, 6)
    with adapted.rows(["tone", None]), torch.no_grad():
        out = Windows(net)(x)
    with adapted.using("tone"), torch.no_grad():
        assert torch.allclose(out[:2], net(x[0]), atol=1e-6)
    with adapted.disabled(), torch.no_grad():
        assert torch.allclose(out[2:], net(x[1]), atol=1e-6)


@pytest.mark.parametrize("model", ["bert", "gpt2", "llama", "t5"])
def test_prompts_of_one_length(model: str, tmp_path: Path) -> None:
    builds = [[PromptTuningCallback(length=2, **NONE)], [PromptTuningCallback(length=2, **NONE), LoRACallback(**NONE)]]
    net, adapted = several(model, builds, tmp_path)
    check(net, adapted, inputs(model), ["d1", "d0", "d0", "d1", "d0"])


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("model", ["llama", "t5"])
def test_prompts_generate(how: dict, model: str, tmp_path: Path) -> None:
    net, adapted = several(model, [[PromptTuningCallback(length=2, **NONE)] for _ in range(2)], tmp_path)
    ids, names = inputs("llama", 3)["input_ids"], ["d1", "d0", "d1"]
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6, [0, 0, 1, 1, 1, 1]])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **how}
    with adapted.rows(names):
        found = net.generate(ids, attention_mask=mask, **options)
    for row, name in enumerate(names):
        with adapted.using(name):
            alone = net.generate(ids[row : row + 1], attention_mask=mask[row : row + 1], **options)
        assert torch.equal(found[row, : alone.shape[1]], alone[0])


def test_prompts_of_different_lengths_are_refused_where_a_model_looks_at_its_first_column(tmp_path: Path) -> None:
    _, adapted = several("bert", [[PromptTuningCallback(length=n, **NONE)] for n in (2, 3)], tmp_path)
    for names in (["d0", None], ["d0", "d1"]):
        with pytest.raises(TargetError, match=r"prompts of different lengths .*'bert'"), adapted.rows(names):
            pass


@pytest.mark.parametrize("model", ["gpt2", "llama", "t5"])
def test_prompts_of_different_lengths(model: str, tmp_path: Path) -> None:
    builds = [[PromptTuningCallback(length=n, **NONE)] for n in (2, 3)] + [METHODS["lora"](0)]
    net, adapted = several(model, builds, tmp_path)
    check(net, adapted, inputs(model), ["d1", "d0", None, "d2", "d0"])
    given = inputs(model)
    given["attention_mask"] = torch.tensor([[1] * 6, [0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1] * 6, [1] * 5 + [0]])
    names = ["d1", "d0", None, "d2", "d0"]
    with adapted.rows(names), torch.no_grad():
        out = zoo.first_tensor(net(**given))
    for row, name in enumerate(names):
        with adapted.using(*filter(None, [name])), torch.no_grad():
            alone = zoo.first_tensor(net(**{key: value[row : row + 1] for key, value in given.items()}))
        real = given["attention_mask"][row].bool() if model != "t5" else slice(None)
        assert torch.allclose(out[row][real], alone[0][real], rtol=0, atol=1e-12)


def test_triggers_and_prompts_in_one_batch(tmp_path: Path) -> None:
    for number, trigger in enumerate([[5, 6], [9, 7, 11]]):
        base, _ = zoo.llama()
        adapted = apply(base.double(), [AutoPromptCallback(length=len(trigger))])
        rows = next(module for module in base.modules() if isinstance(module, TriggerRows))
        rows.ids.copy_(torch.tensor(trigger))
        adapted.save(tmp_path / f"t{number}.pet.safetensors")
    net, adapted = several("llama", [[PromptTuningCallback(length=4, **NONE)]], tmp_path)
    for number in range(2):
        load_delta(net, tmp_path / f"t{number}.pet.safetensors", name=f"t{number}")
    check(net, adapted, inputs("llama"), ["t1", "d0", None, "t0", "t1"])


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("model", ["gpt2", "llama", "t5"])
def test_prompts_of_different_lengths_generate(how: dict, model: str, tmp_path: Path) -> None:
    if model == "gpt2" and "cache_implementation" in how:
        pytest.skip("gpt2 has no static cache")
    net, adapted = several(model, [[PromptTuningCallback(length=n, **NONE)] for n in (2, 4)], tmp_path)
    ids, names = inputs("llama", 3)["input_ids"], ["d1", None, "d0"]
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6, [0, 0, 1, 1, 1, 1]])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **how}
    with adapted.rows(names):
        found = net.generate(ids, attention_mask=mask, **options)
    for row, name in enumerate(names):
        with adapted.using(*filter(None, [name])):
            alone = net.generate(ids[row : row + 1], attention_mask=mask[row : row + 1], **options)
        assert torch.equal(found[row, : alone.shape[1]], alone[0])


class SequenceFirst(nn.Module):
    """Swaps the first two dimensions in front of a linear layer, and mixes nothing itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x.transpose(0, 1)).transpose(0, 1))


@pytest.mark.parametrize("length", [6, 7])
def test_a_layer_that_is_sequence_first_is_refused_by_name(length: int) -> None:
    net = SequenceFirst().eval()
    adapted = apply(net, [LoRACallback(r=2, target_modules=["layer"])])
    with adapted.rows(["default", None, None]), pytest.raises(TargetError, match="layer gets"):
        net(torch.randn(3, length, 4))


def test_torchs_sequence_first_layers_are_refused_by_name() -> None:
    net = nn.TransformerEncoderLayer(8, 2, 16).eval()
    adapted = apply(net, [LoRACallback(r=2, target_modules=["linear1"])], forward=lambda: net(torch.randn(6, 3, 8)))
    with adapted.rows(["default", None, None]), pytest.raises(TargetError, match="batch_first=False"):
        net(torch.randn(6, 3, 8))


class Sorted(nn.Module):
    """Two experts, who get the tokens that are for them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 4)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            mine = (flat[:, 0] > 0) == bool(number)
            out[mine] = expert(flat[mine])
        return out.view_as(x)


def test_experts_who_get_sorted_tokens_are_refused_by_name() -> None:
    net = Sorted().eval()
    adapted = apply(net, [LoRACallback(r=2, target_modules=["0", "1"])], forward=lambda: net(torch.randn(2, 5, 4)))
    x = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    x[..., 0] = torch.tensor([[1, 1, 1, -1], [1, -1, -1, -1], [1, 1, -1, -1]])  # six tokens for each
    with adapted.rows(["default", None, None]), pytest.raises(TargetError, match=r"experts\.0"):
        net(x)


def test_the_look_leaves_no_trace(tmp_path: Path) -> None:
    net, adapted = several("bert", [METHODS["lora"](0)], tmp_path)
    net.train()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    torch.manual_seed(3)
    with adapted.rows(["d0", None]):
        pass
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in state.items())
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()] == hooks


def test_the_stack_is_made_once_while_nobody_trains(tmp_path: Path) -> None:
    from lightning_pet.layers import row_forms

    net, adapted = several("bert", [METHODS["lora"](i) for i in range(2)], tmp_path)
    given, made = inputs("bert", 3), []
    original = row_forms._stack
    row_forms._stack = lambda *args: made.append(1) or original(*args)
    try:
        with adapted.rows(["d0", "d1", None]), torch.no_grad():
            net(**given)
            first = len(made)
            net(**given)
            assert len(made) == first > 0
            next(p for n, p in net.named_parameters() if n.endswith("lora_default@d0.b")).add_(1.0)
            net(**given)
            assert len(made) == first + 4  # A, B and two vectors that there are not
    finally:
        row_forms._stack = original


class Attention(nn.Module):
    """Gets a mask and positions that all rows share, and gives the mask back."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(6) + 0.1)

    def forward(
        self, x: Tensor, shared: tuple[Tensor, dict[str, Tensor]], bias: Tensor | None = None, scaled: bool = False
    ) -> tuple[Tensor, Tensor]:
        mask, more = shared
        h = x @ self.weight
        h = h if bias is None else h + bias
        mask = mask * self.weight.mean() if scaled else mask
        return (h @ h.transpose(1, 2) + mask).softmax(-1) @ h + more["positions"], mask


class Masked(nn.Module):
    """Makes a mask of T x T and positions of T x D."""

    def __init__(self, scaled: bool = False, batch: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.attention, self.scaled, self.batch = nn.Embedding(20, 6), Attention(), scaled, batch

    def forward(self, input_ids: Tensor, bias: Tensor | None = None, **options: object) -> Tensor:
        length = input_ids.shape[1]
        assert self.batch in (0, len(input_ids))
        mask = torch.zeros(length, length) if self.batch else torch.full((length, length), -1e9).triu(1)
        positions = {"positions": torch.arange(length).float()[:, None] * torch.ones(6)}
        out, again = self.attention(self.embedding(input_ids), (mask, positions), bias=bias, scaled=self.scaled)
        assert again.shape == (length, length)
        return out


class Described(Masked):
    """The same, of which a batch can be made up."""

    main_input_name, dummy_inputs = "input_ids", None
    config = SimpleNamespace(vocab_size=20)


def two_whole(net: nn.Module, folder: Path) -> Adapted:
    """Two deltas with values of their own for all parameters."""
    for number, name in enumerate("ab"):
        base = type(net)()
        adapted = apply(base, [FullFineTuningCallback()])
        perturb(adapted, 0.2 + 0.1 * number)
        adapted.save(folder / f"{name}.pet.safetensors")
        load_delta(net, folder / f"{name}.pet.safetensors", name=name)
    return Adapted(net)


def agree(net: nn.Module, adapted: Adapted, *given: Tensor) -> bool:
    with torch.no_grad():
        with adapted.rows(["a", "b"]):
            out = net(*given)
        for row, name in enumerate("ab"):
            with adapted.using(name):
                if not torch.allclose(net(*given)[row], out[row], rtol=0, atol=1e-6):
                    return False
    return True


@pytest.mark.parametrize("lengths", [(2, 3), (3, 2)])
@pytest.mark.parametrize("kind", [Masked, Described])
def test_what_all_rows_share_is_not_divided(kind: type[Masked], lengths: tuple[int, ...], tmp_path: Path) -> None:
    net = kind().eval()
    adapted = two_whole(net, tmp_path)
    for length in (*lengths, 1):
        assert agree(net, adapted, torch.randint(0, 20, (2, length)))
    with adapted.rows(["a"] * 2), torch.no_grad():
        assert net(torch.randint(0, 20, (2, 2))).shape == (2, 2, 6)


@pytest.mark.parametrize("kind", [Masked, Described])
def test_what_may_be_shared_or_not_is_refused_by_name(kind: type[Masked], tmp_path: Path) -> None:
    net = kind().eval()
    adapted = two_whole(net, tmp_path)
    ids = torch.randint(0, 20, (2, 2))
    assert agree(net, adapted, ids)
    with (
        adapted.rows(["a", "b"]),
        pytest.raises(TargetError, match=r"'attention' .* argument 'bias' of shape \(2, 2, 6"),
    ):
        net(ids, torch.randn(2, 2, 6))
    assert agree(net, adapted, ids, torch.randn(1, 1, 6))


def test_an_argument_of_the_first_batch_has_rows(tmp_path: Path) -> None:
    net = Masked().eval()
    adapted = two_whole(net, tmp_path)
    assert agree(net, adapted, torch.randint(0, 20, (2, 2)), torch.randn(2, 2, 6))


def test_a_model_of_one_batch_size_does_not_show_what_is_alike_for_all_rows(tmp_path: Path) -> None:
    net = Masked().eval()
    adapted = two_whole(net, tmp_path)
    net.batch = 2
    with adapted.rows(["a", "b"]), pytest.raises(TargetError, match=r"'attention' .* argument 1 of shape \(2, 2\)"):
        net(torch.tensor([[1, 2], [3, 4]]))


def test_what_all_rows_share_and_deltas_change_is_refused(tmp_path: Path) -> None:
    net = Masked().eval()
    adapted = two_whole(net, tmp_path)
    net.scaled = True
    with adapted.rows(["a", "b"]), pytest.raises(TargetError, match="not the same with these deltas"):
        net(torch.randint(0, 20, (2, 3)))


class Torchs(nn.Module):
    """A recurrent layer with a state, and attention with masks of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(6, 4, 2, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor, state: Tensor) -> Tensor:
        out, (hidden, _) = self.lstm(x, (state.transpose(0, 1).contiguous(), state.transpose(0, 1).contiguous()))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        got, weights = self.attention(out, out, out, key_padding_mask=padding, attn_mask=mask)
        return torch.cat([got.flatten(1), weights.flatten(1), hidden.transpose(0, 1).flatten(1)], 1)


@pytest.mark.parametrize("length", [2, 3])
def test_torchs_recurrent_and_attention_layers(length: int, tmp_path: Path) -> None:
    net = Torchs().eval()
    adapted = two_whole(net, tmp_path)
    padding = torch.tensor([[False] * length, [False] * (length - 1) + [True]])
    assert agree(net, adapted, torch.randn(2, length, 6), padding, torch.randn(2, 4, 4))


def test_a_delta_of_open_rows_is_not_removed_and_blocks_are_counted_once(tmp_path: Path) -> None:
    net = Net().eval()
    adapted = load_delta(net, trained(tmp_path, "a"), name="a")
    adapted.load("bb", trained(tmp_path, "bb"))
    with adapted.rows(["a", "bb"]), pytest.raises(PETError, match=r"now: 1 block of .*rows"):
        adapted["bb"].remove()
    with adapted.using("bb"), adapted.rows(["a", "bb"]), pytest.raises(PETError, match="now: 2 blocks"):
        adapted["bb"].remove()
