"""Deltas that wrap a call, read another module's input, are shared, or sit on a tied weight."""

import copy
import pickle
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightning_pet import Adapted, LoRACallback, NotMergeableError, apply
from lightning_pet.errors import DeadSiteError
from lightning_pet.insertion.commit import commit
from lightning_pet.insertion.host import attach
from lightning_pet.insertion.method import Insertion
from lightning_pet.insertion.prepare import prepare
from lightning_pet.layers.delta import Delta, Tied
from lightning_pet.model.call import HERE
from lightning_pet.model.structure import Structure, Target

X = torch.linspace(-1, 2, 8).view(2, 4)


def adapt(root: nn.Module, methods: Sequence[Any], structure: Structure | None = None) -> Adapted:
    """Apply methods to a root whose structure is known."""
    commit(root, prepare(root, methods, structure))
    return Adapted(root)


class Block(nn.Module):
    """A residual block whose two projections share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 4)
        self.down = nn.Linear(4, 4)
        self.down.weight = self.up.weight

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x + self.down(self.up(self.norm(x)).tanh()), "rest"


class Gate(Delta):
    """A number that several others multiply by."""

    path = "shared"

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.value)


class Around(Delta):
    """Twice the host, weighted by the shared number."""

    path = "around"

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.__dict__["gate"] = gate

    def forward(self, call: Any, x: Tensor) -> Tensor:
        out: Tensor = call(x)
        return out + self.__dict__["gate"].value * call(out)


class Parallel(Delta):
    """The input of another module, weighted."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        return output + self.weight * x


class Shift(Delta):
    """A weight moved by one number."""

    path = "weight"

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.zeros(1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.by

    def merged(self, weight: Tensor) -> Tensor:
        return weight + self.by


class Method:
    """Inserts what a test asks for."""

    method: ClassVar[str] = "sample"
    name = "default"
    module = None

    def __init__(self, insertions: list[Insertion]) -> None:
        self._insertions = insertions

    def config(self) -> dict[str, Any]:
        return {}

    def config_at(self, targets: Any) -> dict[str, Any]:
        return {}

    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        return ()

    def spend_budget(self, root: nn.Module, targets: Any) -> None:
        pass

    def insertions(self, root: nn.Module, targets: Any) -> list[Insertion]:
        return self._insertions

    def trained(self, root: nn.Module, targets: Any) -> tuple[str, ...]:
        return ()


def build(*insertions: Insertion) -> tuple[Block, Adapted, Tensor]:
    torch.manual_seed(0)
    block = Block()
    base = block(X)[0]
    return block, adapt(block, [Method(list(insertions))]), base


def around() -> list[Insertion]:
    gate = Gate()
    place = Target("norm", "", "ffn.norm")
    return [
        Insertion(Target("", ""), gate, "gate"),
        Insertion(place, Around(gate)),
        Insertion(place, Around(gate), "b"),
    ]


def parallel() -> list[Insertion]:
    return [Insertion(Target("down", "", "ffn.output", reads=""), Parallel())]


def tied() -> list[Insertion]:
    shift = Shift()
    return [Insertion(Target("up", "weight"), shift), Insertion(Target("down", "weight"), Tied(shift))]


@pytest.mark.parametrize("kind", [around, parallel, tied])
def test_every_path_starts_as_the_base_acts_mutes_copies_and_leaves(kind: Any) -> None:
    block, adapted, base = build(*kind())
    x = X
    assert torch.equal(block(x)[0], base)
    names = list(adapted.state_dict())
    assert len(names) == 1
    assert names[0].startswith(("pet.", "down.pet.", "up.pet."))
    with torch.no_grad():
        dict(block.named_parameters())[names[0]].add_(0.5)
    changed, rest = block(x)
    assert rest == "rest"
    assert not torch.allclose(changed, base)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(twin(x)[0], changed)
        with torch.no_grad():
            dict(twin.named_parameters())[names[0]].zero_()
        assert torch.equal(twin(x)[0], base)
    with adapted.disabled():
        assert torch.equal(block(x)[0], base)
    assert torch.equal(torch.compile(block, backend="eager", fullgraph=True)(x)[0], changed)
    block(x)[0].sum().backward()
    assert adapted.plan().trainable == sum(p.numel() for p in block.parameters() if p.grad is not None)
    adapted.remove()
    assert torch.equal(block(x)[0], base)
    assert all(type(module).__mro__[0] in (Block, nn.LayerNorm, nn.Linear) for module in block.modules())
    assert all("_pet" not in name for module in block.modules() for name in vars(module))


def test_the_wrapped_call_is_the_formula() -> None:
    block, adapted, _ = build(*around())
    with torch.no_grad():
        dict(block.named_parameters())["pet.sample_default_gate.value"].fill_(0.5)
    x = torch.randn(3, 4)

    def once(f: Any) -> Any:
        return lambda v: f(v) + 0.5 * f(f(v))

    with adapted.disabled():
        expected = once(once(block.norm))(x)
        base_norm = block.norm(x)
    assert torch.allclose(block.norm(x), expected, atol=1e-6)
    assert not torch.allclose(base_norm, expected)


def test_a_slot_keeps_no_activation_and_tells_when_it_is_empty() -> None:
    block, adapted, _ = build(*parallel())
    block(torch.ones(2, 4))
    (slot,) = vars(block)["_pet_taps"]
    assert slot not in HERE.call.handed
    with adapted.disabled():
        block(torch.ones(2, 4))
    assert slot not in HERE.call.handed
    with pytest.raises(DeadSiteError, match="sample_default"):
        block.down(torch.ones(2, 4))


def test_tied_weights_move_together_and_merge_once() -> None:
    block, adapted, _ = build(*tied())
    with torch.no_grad():
        dict(block.named_parameters())["up.pet.sample_default.by"].fill_(0.25)
    x = torch.randn(3, 4)
    attached, weight = block(x)[0], block.up.weight.detach().clone()
    adapted.merge_()
    assert block.up.weight is block.down.weight
    assert torch.equal(block.up.weight, weight + 0.25)
    assert torch.allclose(block(x)[0], attached, atol=1e-6)


def test_half_of_a_tied_weight_does_not_merge() -> None:
    _, adapted, _ = build(Insertion(Target("up", "weight"), Shift()))
    with pytest.raises(NotMergeableError, match="tied"):
        adapted.merge_()


def test_a_place_without_a_weight_does_not_merge() -> None:
    _, adapted, _ = build(*parallel())
    with pytest.raises(NotMergeableError, match="Parallel"):
        adapted.merge_()


@pytest.mark.parametrize("container", [nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).eval()])
def test_the_deltas_of_a_container_are_none_of_its_children(container: nn.Sequential) -> None:
    children, before = list(container), container(X)
    adapted = adapt(container, [Method([Insertion(Target("", ""), Gate(), "gate")])], Structure())
    assert torch.equal(container(X), before)
    assert list(container) == children
    assert len(container) == 3
    assert container[-1] is children[-1]
    assert type(container[:2]) is nn.Sequential
    assert list(container[1:]) == children[1:]
    adapted.remove()
    assert list(container.children()) == children


def test_a_weight_delta_and_a_fusing_delta_on_one_host() -> None:
    """A delta that computes the host's product itself must not pass over one on the weight."""
    host = nn.Linear(4, 4).double()
    model = nn.ModuleDict({"host": host})
    apply(model, [LoRACallback(r=2, target_modules="host", modules_to_save=[])])
    with torch.no_grad():
        host.pet["lora_default"].b.normal_()
    x = X.double()
    expected = host(x) + 0.5 * x.sum(1, keepdim=True)
    shift = Shift()
    adapt(model, [Method([Insertion(Target("host"), shift)])], Structure())
    with torch.no_grad():
        shift.by.fill_(0.5)
    assert (host(x) - expected).abs().max() < 1e-12


class Outer(nn.Module):
    """Reads its child's weight before and after it calls it, inside a module that reads it as well."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner.weight + self.inner(x) + x @ self.inner.weight


def test_a_weight_that_is_read_again_after_its_module_was_called() -> None:
    model = Outer()
    before = model(X)
    shift = Shift()
    adapt(model, [Method([Insertion(Target("inner", reads=""), shift)])], Structure())
    with torch.no_grad():
        shift.by.fill_(0.5)
    assert torch.allclose(model(X), before + 3 * 0.5 * X.sum(1, keepdim=True))


class Doubling(Delta):
    """Twice the weight."""

    path = "weight"

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_an_engine_may_put_a_tensor_in_the_place_of_a_weight() -> None:
    """As FSDP1 does while it computes: it deletes the parameter and sets a view of its own."""
    host = nn.Linear(4, 4, bias=False)
    root, weight = nn.Sequential(host), host.weight
    attach(root, Target("0"), "doubling", Doubling())
    view = weight.detach() + 1
    del host.weight
    assert not hasattr(host, "weight")
    host.weight = view
    assert host.weight is view
    assert torch.equal(root(X), nn.functional.linear(X, 2 * view))
    del host.weight
    host.weight = weight
    assert host.weight is weight
    assert list(dict(root.named_parameters())) == ["0.weight"]
    assert torch.equal(root(X), nn.functional.linear(X, 2 * weight))
    del host.weight
    with pytest.raises(AttributeError):
        del host.weight
