"""What lives for one call belongs to the thread that calls: scopes, hand-overs, and the choice of deltas."""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_pet import (
    AdapterCallback,
    BitFitCallback,
    FullFineTuningCallback,
    IntrinsicDimensionCallback,
    LoRACallback,
    PETCallback,
    PETError,
    PrefixTuningCallback,
    PromptTuningCallback,
    apply,
)
from tests.methods.battery import in_threads, perturb
from tests.methods.zoo import bert, gpt2, llama, lstm, mlp, transformer_encoder

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


class Normed(nn.Module):
    """Running statistics, a head that is tied to the input, and a frozen rest."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 6)
        self.head.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.inner(x))))


def test_switched_off_in_one_thread_and_trained_in_another() -> None:
    """Values of trained parameters and buffers stay as they are: only what the one thread reads is another."""
    model = Normed()
    base = model.eval()(X).detach()
    adapted = apply(model, [FullFineTuningCallback()], forward=lambda: model(X))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    alone = []
    for _ in range(5):
        model.train()
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
        alone.append(model.state_dict()["norm.running_mean"].clone())
    expected = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    begun, end = threading.Event(), threading.Event()

    def off() -> list[bool]:
        right = []
        with adapted.disabled():
            begun.set()
            while not end.is_set():
                with torch.no_grad():
                    # `train` is a flag of the modules and not of a call, so look at what does not depend on it.
                    right.append(torch.equal(model.inner(X), base_inner))
        return right

    with adapted.disabled():
        base_inner = model.inner(X).detach()

    def on() -> None:
        begun.wait()
        for _ in range(5):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
        end.set()

    right, _ = in_threads(lambda f: f(), [off, on])
    assert right
    assert all(right)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert [type(module) for module in model.modules()] == kinds
    with adapted.disabled():
        assert torch.equal(model.eval()(X), base)
    assert not torch.equal(model(X), base)


@pytest.mark.parametrize(
    ("build", "callback"),
    [
        (mlp, BitFitCallback()),
        (lstm, FullFineTuningCallback()),
        (transformer_encoder, LoRACallback(r=2, target_modules=["attention.q"], bias="all")),
        (bert, LoRACallback(r=2, modules_to_save=["pooler"])),
    ],
    ids=["biases", "recurrent", "fast path", "head"],
)
def test_blocks_nest_and_copies_are_in_none(build: Callable[[], Any], callback: PETCallback) -> None:
    model, run = build()
    with torch.no_grad():
        base = run(model)
        adapted = apply(model, [callback], forward=lambda: run(model))
        perturb(adapted)
        changed = run(model)
        values = {name: value.clone() for name, value in adapted.state_dict().items()}
        kinds = [type(module) for module in model.modules()]
        with adapted.disabled():
            with adapted.disabled():
                assert torch.equal(run(model), base)
            assert torch.equal(run(model), base)
            # What is written from within is the delta, and not the base's values.
            assert all(torch.equal(value, values[name]) for name, value in adapted.state_dict().items())
            twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for twin in twins:
            assert torch.equal(run(twin), changed)
            assert [type(module) for module in twin.modules()] == kinds
        assert [type(module) for module in model.modules()] == kinds
        assert torch.equal(run(model), changed)
        adapted.remove()
        assert torch.equal(run(model), base)


def test_blocks_that_are_left_out_of_order_are_an_error() -> None:
    model, run = mlp()
    adapted = apply(model, [LoRACallback(r=2, target_modules=["0"])])
    first, second = adapted.disabled(), adapted.disabled()
    first.__enter__()
    second.__enter__()
    with pytest.raises(PETError, match="await"):
        first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    perturb(adapted)
    with torch.no_grad():
        changed = run(model)
        with adapted.disabled():
            assert not torch.equal(run(model), changed)


# --- gradient checkpointing ------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Runs its only child, or what it does with its own weight, under gradient checkpointing."""

    def __init__(self, child: nn.Module | None, kind: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.child, self.kind = child, kind
        self.weight = nn.Parameter(torch.randn(6, 6))

    def _inner(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight) if self.child is None else self.child(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind is None:
            return self._inner(x)
        return checkpoint(self._inner, x, use_reentrant=self.kind)


KINDS = [None, False, True]


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]
    model.zero_grad()
    assert found
    return found


def test_a_part_that_is_run_again_reads_the_same_weights() -> None:
    """The scope of a weight delta ends with its reader's forward; a part of that may run again in the backward."""
    found = []
    for kind in KINDS:
        model = Checkpointed(None, kind)
        perturb(apply(model, [IntrinsicDimensionCallback(d=20, modules_to_save=[])]))
        model(X.clone().requires_grad_()).square().sum().backward()
        found.append(gradients(model))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def two_losses(kind: bool | None, *, within: bool) -> tuple[nn.Module, Any, Tensor]:
    """Losses with and without one of two deltas; what is repeated must repeat the same."""
    net, _ = mlp()
    net = net.train()
    model = Checkpointed(net, kind)
    adapted = apply(model, [LoRACallback(r=2, target_modules=["child.0", "child.2"], modules_to_save=[])])
    perturb(adapted)
    x = X.clone().requires_grad_()
    before = model(x).square().sum()
    with adapted.disabled():
        off = model(x).square().sum()
        if within:
            off.backward()
    return model, x, before + model(x).pow(4).sum() + (0 if within else off)


@pytest.mark.parametrize("within", [True, False], ids=["backward within the block", "backward after it"])
def test_what_is_repeated_uses_the_deltas_of_its_forward(within: bool) -> None:
    found = []
    for kind in KINDS:
        model, x, loss = two_losses(kind, within=within)
        loss.backward()
        found.append([x.grad, *gradients(model)])
    assert all(torch.allclose(a, b, atol=1e-6) for other in found[1:] for a, b in zip(found[0], other, strict=True))


class Nested(torch.autograd.Function):
    """A backward pass inside of a backward pass; at a depth of 60 the engine goes on in another thread."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int, last: Callable[[], None]) -> Tensor:
        ctx.depth, ctx.last = depth, last
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if ctx.depth == 0:
            ctx.last()
            return gradient, None, None
        with torch.enable_grad():
            inner = Nested.apply(torch.ones(1, requires_grad=True), ctx.depth - 1, ctx.last)
        torch.autograd.backward(inner)
        return gradient, None, None


@pytest.mark.parametrize("kind", [False, True], ids=["non-reentrant", "reentrant"])
def test_what_is_repeated_in_a_thread_of_the_engine(kind: bool) -> None:
    """On a GPU every backward is in such a thread."""
    model, x, loss = two_losses(None, within=False)
    loss.backward()
    expected = [x.grad, *gradients(model)]
    threads = set()
    for depth in (57, 58, 59, 60):
        model, x, loss = two_losses(kind, within=False)
        model.child[1].register_forward_hook(lambda *_: threads.add(threading.current_thread().name))
        Nested.apply(torch.ones(1, requires_grad=True), depth, loss.backward).backward()
        found = [x.grad, *gradients(model)]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, found, strict=True)), depth
    assert any(name.startswith("Dummy") for name in threads)


def test_original_values_that_were_let_go_are_an_error() -> None:
    net, _ = mlp()
    model = Checkpointed(net, False)
    adapted = apply(model, [BitFitCallback(modules_to_save=[])])
    with adapted.disabled():
        loss = model(X.clone().requires_grad_()).sum()
        model(X.clone().requires_grad_()).sum().backward()
    with pytest.raises(PETError, match="inside of the block"):
        loss.backward()
    adapted.remove()
    assert type(net[0]) is nn.Linear


# --- copies of nn.DataParallel ----------------------------------------------------------------------


def test_a_replica_uses_what_was_chosen_where_it_was_made() -> None:
    """`nn.DataParallel` runs replicas in threads of their own."""
    model, run = mlp()
    base = run(model)
    adapted = apply(model, [LoRACallback(r=2, target_modules=["0"], modules_to_save=["2"])])
    perturb(adapted)
    changed = run(model)

    def replica() -> nn.Module:
        copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
        for module, twin in copies.items():
            for name, parameter in module._parameters.items():
                setattr(twin, name, None if parameter is None else parameter.detach().clone())
            for name, child in module._modules.items():
                twin._modules[name] = copies[child]
        return copies[model]

    assert torch.equal(in_threads(lambda m: m(X), [replica()])[0], changed)
    with adapted.disabled():
        assert torch.equal(in_threads(lambda m: m(X), [replica()])[0], base)


# --- many threads ------------------------------------------------------------------------------------

METHODS: dict[str, PETCallback] = {
    "prefix": PrefixTuningCallback(length=3),
    "parallel adapter": AdapterCallback(placement="parallel", bottleneck_size=4),
    "subspace": IntrinsicDimensionCallback(d=50),
    "prompt": PromptTuningCallback(length=3),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("build", [llama, bert], ids=["llama", "bert"])
def test_many_threads(build: Callable[[], Any], name: str) -> None:
    model, run = build()
    perturb(apply(model, [METHODS[name]], forward=lambda: run(model)))
    with torch.inference_mode():
        expected = run(model)

    def work(_: int) -> int:
        with torch.inference_mode():
            return sum(torch.equal(run(model), expected) for _ in range(10))

    assert in_threads(work, range(8)) == [10] * 8


@pytest.mark.parametrize("build", [llama, gpt2], ids=["llama", "gpt2"])
def test_threads_generate_behind_a_prompt(build: Callable[[], Any]) -> None:
    model, _ = build()
    apply(model, [PromptTuningCallback(length=3)])
    ids = [torch.randint(3, 50, (2, n), generator=torch.Generator().manual_seed(n)) for n in (3, 5, 7, 4)]

    def generated(i: int) -> Tensor:
        return model.generate(ids[i], max_new_tokens=4, do_sample=False, pad_token_id=0)

    expected = [generated(i) for i in range(4)]
    for found in in_threads(generated, range(4)), in_threads(generated, range(4)):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_compiled_model_serves_threads_with_and_without_deltas() -> None:
    """Guards look at the thread that calls; four graphs are enough for any number of threads."""
    model, run = mlp()
    adapted = apply(model, [LoRACallback(r=2, target_modules=["0"], modules_to_save=["2"])])
    perturb(adapted)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        changed = run(model)
        with adapted.disabled():
            base = run(model)
        assert torch.equal(compiled(X), changed)
        with adapted.disabled():
            assert torch.equal(compiled(X), base)
    made = len(graphs)
    assert made == 2

    def work(on: bool) -> bool:
        right = True
        for _ in range(5):
            with torch.no_grad():
                if on:
                    right &= torch.equal(compiled(X), changed)
                else:
                    with adapted.disabled():
                        right &= torch.equal(compiled(X), base)
        return right

    assert all(in_threads(work, [True, False, True, False]))
    # Two more: with the deltas and without, while another thread has switched them off or on, and the head is read
    # through its class.
    assert len(graphs) <= made + 2
