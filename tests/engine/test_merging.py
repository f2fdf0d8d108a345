"""A merge checks everything first, then changes one weight after the other: all or nothing, without a second copy."""

import signal
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_pet import (
    AdaLoRACallback,
    Adapted,
    BitFitCallback,
    DiffPruningCallback,
    IA3Callback,
    IntrinsicDimensionCallback,
    LoRACallback,
    NotMergeableError,
    apply,
)
from lightning_pet.layers.delta import Delta
from lightning_pet.layers.low_rank import LowRankLinear
from tests.methods.battery import equal_states

WIDTH = 48


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)]
    return nn.Sequential(nn.Embedding(11, WIDTH), *layers).to(dtype).eval()


X = torch.arange(11)


def lora(**options: Any) -> LoRACallback:
    return LoRACallback(**{"r": 3, "target_modules": ["1", "3", "5"], "modules_to_save": [], **options})


def moved(adapted: Adapted, scale: float = 0.1) -> Adapted:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in adapted.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor) * scale)
    return adapted


def deltas(adapted: Adapted) -> list[tuple[nn.Module, Delta]]:
    return [(found.host, found.delta) for found in adapted.record.deltas(adapted.root)]


METHODS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "embedding": lambda: lora(target_modules=["0", "1"]),
    "pissa": lambda: lora(init="pissa"),
    "dora": lambda: lora(use_dora=True),
    "dora embedding": lambda: lora(target_modules=["0"], use_dora=True),
    "lora bias": lambda: lora(bias="lora_only"),
    "adalora": lambda: AdaLoRACallback(target_modules=["1", "3"], modules_to_save=[]),
    "ia3": lambda: IA3Callback(target_modules=["1", "3"], feedforward_modules=["5"], modules_to_save=[]),
    "diff pruning": lambda: DiffPruningCallback(modules_to_save=[]),
    "said": lambda: IntrinsicDimensionCallback(d=20, modules_to_save=[]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_in_place_is_the_value_of_the_formula_and_within_the_bound(method: str, dtype: torch.dtype) -> None:
    model = net(dtype)
    adapted = moved(apply(model, [METHODS[method]()]))
    for host, delta in deltas(adapted):
        if delta.path == "shared":
            continue
        weight = host._parameters[delta.parameter].detach()
        if isinstance(delta, LowRankLinear):  # the formula in float64
            matrix, change = weight.double(), delta._change(torch.float64)
            wanted = matrix + change
            if delta.magnitude is not None:
                wanted = wanted * (delta.magnitude.double() / torch.linalg.vector_norm(wanted, dim=-1)).unsqueeze(-1)
        else:
            wanted = delta.merged(weight.double())
        found, copied = delta.merged(weight), weight.clone()
        delta.merge_(copied)
        assert torch.equal(found, copied)
        assert found.data_ptr() != weight.data_ptr()
        tolerance = 4 * torch.finfo(dtype).eps * float(wanted.detach().abs().max())
        assert (found.double() - wanted).abs().max() <= max(tolerance, 1e-12)
        bound = delta.reach(float(weight.abs().max()))
        assert bound >= float(found.abs().max())
        assert bound < 1e4 or getattr(delta, "use_dora", False)


@pytest.mark.parametrize("layout", ["rows", "columns", "experts", "turned experts"])
@pytest.mark.parametrize("start", ["kaiming", "pissa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_weights_of_every_layout(layout: str, start: Any, dtype: torch.dtype) -> None:
    from lightning_pet.layers.low_rank import LowRankParameter

    torch.manual_seed(0)
    shape = {"rows": (96, 40), "columns": (40, 96), "experts": (3, 96, 40), "turned experts": (3, 40, 96)}[layout]
    turned = layout in ("columns", "turned experts")
    rows = [[0, 8], [50, 96]]
    delta = LowRankParameter(shape, 2, scale=0.5, init=start, transposed=turned, rows=rows)
    weight = torch.randn(shape, dtype=dtype)
    delta.initialize_from(weight)
    if start == "pissa":
        assert torch.equal(delta.merged(weight), weight)  # exactly the base while nothing has moved
    with torch.no_grad():
        delta.b.add_(torch.randn_like(delta.b))
    matrix = (weight.mT if turned else weight).double().clone()
    for start_, stop in rows:
        used = slice(0, 8) if start_ == 0 else slice(8, 54)
        matrix[..., start_:stop, :] += delta._change(torch.float64)[..., used, :].detach()
    wanted = matrix.mT if turned else matrix
    assert torch.allclose(delta.merged(weight).double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_what_refuses_does_so_before_anything_changes() -> None:
    model = net()
    adapted = moved(apply(model, [lora()]))
    with torch.no_grad():
        deltas(adapted)[-1][1].b[0, 0] = torch.nan
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NotMergeableError, match=r"5\.weight: 48 of 2304 values would be NaN or infinite"):
        adapted.merge_()
    assert model.state_dict().keys() == before.keys()
    assert all(
        torch.equal(a, b) or a.isnan().any() for a, b in zip(model.state_dict().values(), before.values(), strict=True)
    )


@pytest.mark.parametrize(("b", "fits"), [(0.25, True), (20.0, False)])
def test_where_a_bound_does_not_decide_the_sum_does(b: float, fits: bool) -> None:
    model = net(torch.float16)
    adapted = apply(model, [lora(target_modules=["3"])])
    host, delta = deltas(adapted)[0]
    with torch.no_grad():
        host.weight[0, 0] = 64000.0  # more than half of what float16 holds
        delta.a.fill_(100.0)
        delta.b.fill_(b)
    assert delta.reach(64000.0) > 65504 / 2
    if fits:
        adapted.merge_()
        assert float(host.weight[0, 0].detach()) > 64000.0
    else:
        with pytest.raises(NotMergeableError, match="too large for this dtype"):
            adapted.merge_()
        assert host.weight[0, 0] == 64000.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bad", ["row of zeros", "not a number", "too large", "none"])
def test_dora_is_looked_at_by_rows(bad: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(dtype)
    adapted = moved(apply(model, [lora(use_dora=True, target_modules=["3"])]))
    host, delta = deltas(adapted)[0]
    with torch.no_grad():
        if bad == "row of zeros":  # its norm is no divisor
            host.weight[5] = 0
            delta.b[5] = 0
        elif bad == "not a number":
            delta.b[5, 0] = torch.nan
        elif bad == "too large":
            delta.magnitude[5] = 1e6 if dtype == torch.float16 else torch.inf
    before, copies = host.weight.detach().clone(), []
    merged = type(delta).merged
    monkeypatch.setattr(type(delta), "merged", lambda self, weight: copies.append(1) or merged(self, weight))
    assert delta.merges_finite(before) == bool(merged(delta, before).isfinite().all()) == (bad == "none")
    assert torch.equal(host.weight, before)
    if bad == "none":
        adapted.merge_()
        assert not copies
        assert torch.equal(host.weight, merged(delta, before))
    else:
        with pytest.raises(NotMergeableError, match=r"3\.weight: \d+ of 2304 values would be NaN or infinite"):
            adapted.merge_()
        assert torch.equal(host.weight, before)


class Allocations(TorchDispatchMode):
    """Bytes of the tensors that live at a time, of those that were made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        own = {t.untyped_storage().data_ptr() for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in own:
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        size = tensor.untyped_storage().nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["lora", "pissa", "dora", "ia3", "adalora"])
def test_no_second_copy_is_made(method: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(6))).to(dtype)
    make = {
        "lora": lambda: LoRACallback(target_modules=["[0-5]"]),
        "pissa": lambda: LoRACallback(target_modules=["[0-5]"], init="olora"),
        "dora": lambda: LoRACallback(target_modules=["[0-5]"], use_dora=True),
        "ia3": lambda: IA3Callback(target_modules=["[0-2]"], feedforward_modules=["[3-5]"]),
        "adalora": lambda: AdaLoRACallback(target_modules=["[0-5]"]),
    }
    adapted = moved(apply(model, [make[method]()]), 0.01)
    layer = 1024 * 1024 * 4
    with Allocations() as found:
        adapted.merge_()
    # A bound needs no memory of a layer's size, and where the sum itself is looked at (DoRA) that is done by rows.
    assert found.peak <= 0.6 * layer, found.peak / layer


def test_an_interrupt_waits_until_the_merge_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    adapted = moved(apply(model, [lora()]))
    attached = model(X)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background was started without
    merge, handler = LowRankLinear.merge_, signal.getsignal(signal.SIGINT)

    def interrupted(self: LowRankLinear, weight: Tensor) -> None:
        signal.raise_signal(signal.SIGINT)
        merge(self, weight)

    monkeypatch.setattr(LowRankLinear, "merge_", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            adapted.merge_()
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert not any(".pet." in name for name in model.state_dict())
    assert torch.allclose(model(X), attached, atol=1e-5)


def test_it_merges_in_any_thread() -> None:
    model = net()
    adapted = moved(apply(model, [lora()]))
    attached = model(X).detach()
    thread = threading.Thread(target=adapted.merge_)
    thread.start()
    thread.join()
    assert not any(".pet." in name for name in model.state_dict())
    assert torch.allclose(model(X), attached, atol=1e-5)


@pytest.mark.parametrize("method", [lora, lambda: lora(bias="lora_only"), METHODS["ia3"], BitFitCallback])
def test_a_merge_that_fails_half_way_adds_nothing_twice(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    second = lora(name="second", target_modules=["1", "3"])
    adapted = moved(apply(model, [second, method()]))
    attached = model(X)
    merge, last = LowRankLinear.merge_, model[3].pet["lora_second"]

    def fails(self: LowRankLinear, weight: Tensor) -> None:
        if self is last:
            raise MemoryError("no more")
        merge(self, weight)

    with monkeypatch.context() as patch:
        patch.setattr(LowRankLinear, "merge_", fails)
        with pytest.raises(MemoryError) as error:
            adapted.merge_()
    assert "merge_() failed after 1 of" in error.value.__notes__[0]
    assert torch.allclose(model(X), attached, atol=1e-5)
    present = {name for name in model.state_dict() if ".pet." in name}
    assert present == {name for name in adapted.state_dict() if ".pet." in name}
    assert "lora_second" in "".join(present)
    adapted.merge_()
    assert torch.allclose(model(X), attached, atol=1e-5)
    assert not any(".pet." in name for name in model.state_dict())
    twin = net()
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert not equal_states(twin.state_dict(), model.state_dict())


def test_a_model_without_values_is_refused_by_name() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    adapted = apply(model, [LoRACallback(r=2, target_modules=["0"])])
    with pytest.raises(NotMergeableError, match=r"0\.weight.* on the meta device"):
        adapted.merge_()
    assert list(adapted) == ["default"]
