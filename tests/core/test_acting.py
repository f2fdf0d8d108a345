"""What acts in a call is looked up once, and again when something changes; values without gradients."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_pet import IA3Callback, LoRACallback, apply
from lightning_pet.insertion.host import deltas_of
from lightning_pet.insertion.slot import Deltas
from lightning_pet.layers import low_rank_product
from lightning_pet.layers.low_rank import LowRankLinear
from lightning_pet.layers.low_rank_product import low_rank_directly, low_rank_linear
from lightning_pet.layers.prompt import VirtualRows


def two_on_one_host() -> tuple[nn.Module, list[object]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6))
    handles: list[object] = [
        apply(model, [LoRACallback(r=2, target_modules=["0"], modules_to_save=[], name=name)])
        for name in ("one", "two")
    ]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model, handles


def plain(model: nn.Module, x: Tensor) -> Tensor:
    host = model[0]  # type: ignore[index]
    y = nn.functional.linear(x, host.weight, host.bias)
    for delta in deltas_of(host).values():
        y = y + delta.scale * (x @ delta.a.t() @ delta.b.t())
    return y


def looks(pet: Deltas, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    found: list[object] = []
    look = Deltas._look
    monkeypatch.setattr(Deltas, "_look", lambda self, chosen: (found.append(chosen), look(self, chosen))[1])
    return found


def test_a_host_looks_once_for_every_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    model, handles = two_on_one_host()
    found = looks(deltas_of(model[0]), monkeypatch)  # type: ignore[index]
    x = torch.randn(3, 6)
    for _ in range(3):
        assert torch.allclose(model(x), plain(model, x), atol=1e-5)
        with handles[0].disabled():  # type: ignore[attr-defined]
            off = model(x)
    assert torch.equal(off, nn.functional.linear(x, model[0].weight, model[0].bias))  # type: ignore[index]
    assert len(found) == 2


def test_what_is_known_is_forgotten_when_a_delta_comes_or_goes() -> None:
    model, _ = two_on_one_host()
    x = torch.randn(3, 6)
    model(x)
    third = apply(model, [LoRACallback(r=1, target_modules=["0"], modules_to_save=[], name="three")])
    with torch.no_grad():
        deltas_of(model[0])["lora_three"].b.fill_(1)  # type: ignore[index]
    assert torch.allclose(model(x), plain(model, x), atol=1e-5)
    third.remove()
    assert type(model[0]) is nn.Linear  # type: ignore[index]
    assert torch.equal(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))  # type: ignore[index]


def test_copies_know_for_themselves() -> None:
    model, _ = two_on_one_host()
    x = torch.randn(3, 6)
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        pet = deltas_of(other[0])
        assert not pet._known  # another process may have given its numbers to other roots
        assert torch.equal(other(x), y)
        del pet["lora_two"]
        assert torch.allclose(other(x), plain(other, x), atol=1e-5)
        assert torch.equal(model(x), y)


def test_a_delta_that_an_engine_wraps_runs_wrapped() -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.calls = inner, 0

        def __getattr__(self, name: str) -> object:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

        def forward(self, *args: object) -> object:
            self.calls += 1
            return self.inner(*args)

    model = nn.Sequential(nn.Linear(6, 6))
    apply(model, [LoRACallback(r=2, target_modules=["0"], modules_to_save=[])])
    x = torch.randn(3, 6)
    y = model(x)
    pet = deltas_of(model[0])
    wrapped = Wrapped(pet["lora_default"])
    setattr(pet, "lora_default", wrapped)  # noqa: B010 - as engines do
    assert torch.equal(model(x), y)
    assert wrapped.calls == 1


def test_another_kind_on_the_host_ends_the_fused_product() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    apply(model, [LoRACallback(r=2, target_modules=["0"], modules_to_save=[])])
    pet = deltas_of(model[0])
    assert pet.acting().fusing == "lora_default"
    handle = apply(model, [IA3Callback(target_modules=["0"], feedforward_modules=[], modules_to_save=[])])
    assert pet.acting().fusing is None
    handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6,), (1, 1, 6), (3, 6), (2, 5, 6), (40, 6)], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "Conv1D"])
def test_values_without_gradients_are_those_with_them(
    dtype: torch.dtype, shape: tuple[int, ...], transposed: bool
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(8, 6, dtype=dtype), torch.randn(8, dtype=dtype)
    delta = LowRankLinear(6, 8, 2, scale=2.0, transposed=transposed, dtype=dtype)
    nn.init.normal_(delta.b)
    x = torch.randn(shape, dtype=dtype)
    own = weight.t().contiguous() if transposed else weight
    with torch.no_grad():
        without = delta(x, None, own, bias)
    assert torch.equal(without, delta(x, None, own, bias))
    if dtype == torch.float64:
        assert torch.allclose(without, x @ weight.t() + bias + 2 * (x @ delta.a.t() @ delta.b.t()), atol=1e-12)


class Kept:
    """Bytes that a forward keeps for its backward, each memory once, parameters apart."""

    def __init__(self, model: nn.Module) -> None:
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.sizes: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def of(self, forward: Callable[[], Tensor]) -> tuple[Tensor, int]:
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor):
            out = forward()
        return out, sum(self.sizes.values())


def values(model: nn.Module, x: Tensor) -> Tensor:
    """Of the same call without gradients."""
    torch.manual_seed(1)
    with torch.no_grad():
        out: Tensor = model(x)
        return out


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_small_layer_trains_as_with_a_node_of_its_own(
    bias: bool, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal values, gradients and second derivatives, and no more memory, on both sides of the limit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=bias)).double()
    apply(model, [LoRACallback(r=2, dropout=dropout, target_modules=["0"], modules_to_save=[])])
    delta = deltas_of(model[0])["lora_default"].double()
    nn.init.normal_(delta.b)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for limit in (2**15, 0):
        monkeypatch.setattr(low_rank_product, "_SMALL", limit)
        torch.manual_seed(1)
        out, kept = Kept(model).of(lambda: model(x))
        assert torch.equal(out.detach(), values(model, x))
        first = torch.autograd.grad(out.pow(3).sum(), (x, delta.a, delta.b), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, delta.a, delta.b))
        found.append(([out, *first, *second], kept))
    (small, kept_small), (large, kept_large) = found
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(small, large, strict=True))
    assert dropout or kept_small <= kept_large
    assert small[0].grad_fn.name() != large[0].grad_fn.name()  # type: ignore[union-attr]


def test_what_is_not_as_simple_takes_the_other_way() -> None:
    x, weight = torch.randn(3, 6), torch.randn(8, 6)
    a, b = torch.randn(2, 6), torch.randn(8, 2)
    with torch.no_grad():
        assert low_rank_directly(x, weight, None, a, b, 1.0) is not None
        assert low_rank_directly(x, weight, None, a.double(), b, 1.0) is None
        assert low_rank_directly(x, weight, torch.randn(8).double(), a, b, 1.0) is None
        assert low_rank_directly(x, weight, None, None, b, 1.0) is None
        wide, narrow = torch.randn(64, 64), torch.randn(64, 2)
        assert (
            low_rank_directly(torch.randn(2000, 64), wide, None, narrow.t(), narrow, 1.0) is None
        )  # merged is cheaper
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert low_rank_directly(x, weight, None, a, b, 1.0) is None
        rows = torch.func.vmap(lambda row: low_rank_linear(row, weight, None, a, b, 1.0, merged=False))(x)
        assert torch.allclose(rows, low_rank_linear(x, weight, None, a, b, 1.0, merged=False), atol=1e-5)
        assert torch.func.vmap(lambda row: torch.ones(()) * (low_rank_directly(row, weight, None, a, b, 1.0) is None))(
            x
        ).all()


def test_a_lookup_of_real_tokens_alone_asks_the_table_alone() -> None:
    """Without gradients, where the values of ids can be seen; with them all rows stay in the graph."""
    table = nn.Embedding(9, 4)
    rows = VirtualRows(2, 4, 9)
    asked: list[Tensor] = []

    def call(ids: Tensor) -> Tensor:
        asked.append(ids)
        return table(ids)

    ids = torch.tensor([[3, 0, 8]])
    with torch.no_grad():
        assert torch.equal(rows(call, ids), table(ids))
        assert asked[-1] is ids
        both = rows(call, torch.tensor([[9, 3, 10]]))
    assert asked[-1] is not ids
    assert torch.equal(both[0, 1], table.weight[3])
    assert not torch.equal(both[0, 0], both[0, 2])
    out = rows(call, ids)
    assert torch.equal(out, table(ids))
    assert asked[-1] is not ids
