"""What every method must hold, checked in the same way for all of them.

A method's test file gives a list of :class:`Case` and, where a formula exists, a reference; the
checks are here.
"""

import copy
import pickle
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from launch import run as run_in_new_process
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from lightning_pet import Adapted, LoRACallback, PETCallback, PETError, apply, load_delta, save_delta
from lightning_pet.insertion.commit import commit
from lightning_pet.insertion.prepare import prepare
from lightning_pet.layers.delta import Delta
from lightning_pet.model.naming import canonical

from . import zoo

SAME_ROUTE = "a smaller model compiles with a prefix that takes the same route"
RECURRENT = "torch.compile takes no recurrent layers"
LIKE_SMALLER = "compiles in one graph as on the smaller models, which are enough for the time it takes"


@dataclass(frozen=True)
class Case:
    """One method with its options on one model.

    Attributes:
        model: name of a builder in :mod:`tests.methods.zoo`.
        method: builds the callback.
        options: its arguments.
        exact_identity: whether the fresh delta leaves the output bit-equal.
        identity_tolerance: else, how far it may be (``None``: the method does not start as the base).
        mergeable: whether it can be merged.
        merge_tolerance: largest difference between merged and attached in float64.
        parameters: closed form of the number of trained parameters of the delta, if given.
        needs_values: the method needs the values of the base, and refuses the meta device.
        not_compiled: why the adapted model is not compiled here; otherwise it must compile in one graph.
    """

    model: str
    method: Callable[..., PETCallback] = LoRACallback
    options: dict[str, Any] = field(default_factory=dict)
    exact_identity: bool = True
    identity_tolerance: float | None = 0.0
    mergeable: bool = True
    merge_tolerance: float = 1e-10
    parameters: int | None = None
    needs_values: bool = False
    not_compiled: str = ""

    @property
    def id(self) -> str:
        """For pytest."""
        parts = [f"{key}={value}" for key, value in self.options.items() if key not in ("r", "target_modules")]
        if self.options.get("target_modules"):
            parts.append(str(self.options["target_modules"]).strip("[]").replace("'", "").replace(", ", "+"))
        return "-".join([self.model, *parts])

    def build(self) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        """The base model and its forward."""
        return getattr(zoo, self.model)()

    def callback(self) -> PETCallback:
        """A new callback."""
        return self.method(**self.options)

    def adapt(self, model: nn.Module, run: Callable[[nn.Module], Tensor]) -> Adapted:
        """Apply it."""
        return apply(model, [self.callback()], forward=lambda: run(model))


def perturb(adapted: Adapted, scale: float = 0.3) -> None:
    """Move the delta away from its start, by a fixed random step."""
    generator = torch.Generator().manual_seed(5)
    tensors = adapted.state_dict()
    own = dict(adapted.root.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name in sorted(tensors):
            if name in adapted.record.trainable_names:
                own[name].add_(torch.randn(own[name].shape, generator=generator, dtype=torch.float32) * scale)


def base_digest(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors that are not a delta's."""
    return {n: t.detach().clone() for n, t in model.state_dict().items() if ".pet." not in f".{n}"}


def equal_states(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bitwise equality of two state dicts."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def frozen_output(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> Tensor:
    """The output without autograd: torch chooses other kernels for weights that require grad."""
    with torch.no_grad():
        return run(model)


def in_threads(work: Callable[[Any], Any], arguments: Sequence[Any]) -> list[Any]:
    """Results of threads that take turns as often as Python can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(arguments)) as pool:
            return list(pool.map(work, arguments))
    finally:
        sys.setswitchinterval(interval)


class Running(nn.Module):
    """A model and its forward as one module without arguments."""

    def __init__(self, model: nn.Module, run: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self) -> Tensor:
        return self.run(self.model)


class Battery:
    """Subclass it, name the class ``Test…``, and set ``cases``."""

    cases: ClassVar[list[Case]] = []

    @pytest.fixture
    def built(self, case: Case) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        return case.build()

    def test_identity_at_init(self, case: Case, built: Any) -> None:
        model, run = built
        before = frozen_output(model, run)
        case.adapt(model, run)
        after = frozen_output(model, run)
        if case.exact_identity:
            assert torch.equal(before, after)
        elif case.identity_tolerance is not None:
            assert (after - before).abs().max() <= case.identity_tolerance

    def test_has_an_effect_and_restores_bit_exactly(self, case: Case, built: Any) -> None:
        model, run = built
        state, before = base_digest(model), frozen_output(model, run)
        flags = [parameter.requires_grad for parameter in model.parameters()]
        kinds = [type(module) for module in model.modules()]
        adapted = case.adapt(model, run)
        perturb(adapted)
        changed = frozen_output(model, run)
        assert not torch.allclose(changed, before)
        with adapted.disabled():
            assert torch.equal(frozen_output(model, run), before)
        assert torch.equal(frozen_output(model, run), changed)
        adapted.remove()
        assert equal_states(dict(model.state_dict()), state)
        assert [type(module) for module in model.modules()] == kinds
        assert torch.equal(frozen_output(model, run), before)
        assert [parameter.requires_grad for parameter in model.parameters()] == flags

    def test_threads_do_not_notice_each_other(self, case: Case, built: Any) -> None:
        """Some use the deltas, and some switch them off meanwhile; all get what they would get alone."""
        model, run = built
        expected = {False: frozen_output(model, run)}
        adapted = case.adapt(model, run)
        perturb(adapted)
        expected[True] = frozen_output(model, run)

        def work(with_deltas: bool) -> list[bool]:
            right = []
            for _ in range(4):
                with nullcontext() if with_deltas else adapted.disabled():
                    right += [torch.equal(frozen_output(model, run), expected[with_deltas]) for _ in range(2)]
            return right

        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        kinds = [type(module) for module in model.modules()]
        assert in_threads(work, [True, False, True, False]) == [[True] * 8] * 4
        assert equal_states(dict(model.state_dict()), state)
        assert [type(module) for module in model.modules()] == kinds

    def test_names_and_ties_are_kept(self, case: Case, built: Any) -> None:
        model, run = built
        names = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
        case.adapt(model, run)
        after = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False) if ".pet." not in f".{n}"}
        assert after == names

    def test_only_the_plan_trains_and_moves(self, case: Case, built: Any) -> None:
        model, run = built
        before = base_digest(model)
        adapted = case.adapt(model, run)
        plan = adapted.plan()
        trainable = {canonical(n): p for n, p in model.named_parameters() if p.requires_grad}
        assert set(trainable) == set(adapted.record.trainable_names)
        assert plan.trainable == sum(p.numel() for p in trainable.values())
        if case.parameters is not None:
            delta = set(adapted.record.delta_names)
            assert sum(p.numel() for n, p in trainable.items() if n in delta) == case.parameters
        start = {name: p.detach().clone() for name, p in trainable.items()}
        optimizer = torch.optim.SGD(trainable.values(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            out = run(model)
            (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
            assert all(p.grad is not None for p in trainable.values())
            optimizer.step()
        trained = set(adapted.record.trained_names)
        after = base_digest(model)
        assert all(torch.equal(before[n], after[n]) for n in before if canonical(n) not in trained)
        assert all(not torch.equal(start[n], p.detach()) for n, p in trainable.items() if p.grad.abs().max() > 1e-4)

    def test_merged_equals_attached(self, case: Case, built: Any) -> None:
        model, run = built
        model.double()
        adapted = case.adapt(model, run)
        perturb(adapted)
        attached = run(model)
        if not case.mergeable:
            with pytest.raises(ValueError, match="merg"):
                adapted.merge_()
            assert torch.equal(run(model), attached)
            return
        names = set(base_digest(model))
        adapted.merge_()
        assert set(model.state_dict()) == names
        assert (run(model) - attached).abs().max() <= case.merge_tolerance

    def test_deepcopy_and_pickle(self, case: Case, built: Any) -> None:
        model, run = built
        adapted = case.adapt(model, run)
        perturb(adapted)
        expected = run(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(run(twin), expected)
            with torch.no_grad():  # a twin owns its tensors
                for _, parameter in twin.named_parameters():
                    parameter.zero_()
            assert torch.equal(run(model), expected)
        Adapted(copy.deepcopy(model)).remove()
        assert torch.equal(run(model), expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_dtypes(self, case: Case, built: Any, dtype: torch.dtype) -> None:
        model, run = built
        model.to(dtype)
        adapted = case.adapt(model, run)
        perturb(adapted, 0.05)
        out = run(model)
        assert out.dtype == dtype
        assert torch.isfinite(out).all()
        if adapted.record.trainable_names:
            out.float().square().mean().backward()
        wanted = torch.float64 if dtype == torch.float64 else torch.float32
        for name, parameter in model.named_parameters():
            if name in adapted.record.delta_names and parameter.requires_grad:
                assert parameter.dtype == wanted
                assert parameter.grad.dtype == wanted

    def test_autocast(self, case: Case, built: Any) -> None:
        model, run = built
        adapted = case.adapt(model, run)
        perturb(adapted, 0.05)
        full = run(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = run(model)
        if adapted.record.trainable_names:
            out.float().square().mean().backward()
        assert (out.float() - full).abs().max() <= 0.1 * full.abs().max() + 0.1

    def test_compiles_in_one_graph(self, case: Case, built: Any) -> None:
        if case.not_compiled:
            pytest.skip(case.not_compiled)
        model, run = built
        perturb(case.adapt(model, run))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def step(runner: nn.Module) -> list[Tensor]:
            out = run(runner)
            return [out.detach(), *(torch.autograd.grad(out.square().mean(), trained) if trained else ())]

        expected = step(model)
        torch._dynamo.reset()
        found = step(torch.compile(model, backend="eager", fullgraph=True))
        for value, reference in zip(found, expected, strict=True):
            assert torch.allclose(value, reference, atol=1e-6 * max(1.0, float(reference.abs().max())))
        # As Trainer.validate, which has the choice; every other case takes the other one.
        place = [other for other in self.cases if not other.not_compiled].index(case)
        torch._dynamo.reset()
        with (torch.no_grad, torch.inference_mode)[place % 2]():
            found_again = run(torch.compile(model, backend="eager", fullgraph=True))
        assert torch.allclose(found_again, expected[0], atol=1e-6 * max(1.0, float(expected[0].abs().max())))

    def test_checkpointing_changes_no_gradient(self, case: Case, built: Any) -> None:
        model, run = built
        perturb(case.adapt(model, run))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def gradients(**how: bool) -> list[Tensor | None]:
            start = torch.zeros(1, requires_grad=True)  # reentrant checkpointing passes gradients on to inputs only
            out = checkpoint(lambda x: run(model) + x, start, **how) if how else run(model) + start
            model.zero_grad()
            out.square().mean().backward()
            return [parameter.grad for parameter in trained]

        expected = gradients()
        for reentrant in (True, False):
            torch.testing.assert_close(gradients(use_reentrant=reentrant), expected)

    def test_forward_mode_is_right_or_refused(self, case: Case, built: Any) -> None:
        model, run = built
        model.double()
        perturb(case.adapt(model, run), 0.1)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            return
        at = {name: p.detach() for name, p in trained.items()}
        generator = torch.Generator().manual_seed(6)
        way = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in at.items()}

        def output(values: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(
                Running(model, run), {f"model.{name}": t for name, t in values.items()}, ()
            )

        def moved(step: float) -> Tensor:
            return frozen_output(model, lambda _: output({name: at[name] + step * way[name] for name in at}))

        with sdpa_kernel(SDPBackend.MATH):  # the others know no forward mode
            try:
                _, found = torch.func.jvp(output, (at,), (way,))
            except (PETError, NotImplementedError):  # of ours, or of the base
                return
            except RuntimeError:
                if case.model != "bloom":  # which has an activation function of an old style
                    raise
                return
            out, along = run(model), torch.randn(found.shape, generator=generator, dtype=found.dtype)
            expected = (moved(1e-3) - moved(-1e-3)) / 2e-3
        slopes = torch.autograd.grad((out * along).sum(), list(trained.values()))
        backward = sum((slope * step).sum() for slope, step in zip(slopes, way.values(), strict=True))
        # Reverse mode knows constants that are none (the norm of DoRA, the row of a padding token), and differences
        # know no float32 inside of a model: one of them is exact.
        differs = [
            ((found - expected).norm() / expected.norm()).item(),
            (((found * along).sum() / backward) - 1).item(),
        ]
        assert differs[0] <= 3e-3 or abs(differs[1]) <= 1e-4, differs

    def test_save_and_load_into_a_fresh_base(self, case: Case, built: Any, tmp_path: Path) -> None:
        model, run = built
        adapted = case.adapt(model, run)
        perturb(adapted)
        expected = run(model)
        path = tmp_path / "delta.pet.safetensors"
        written = save_delta(model, path)
        stored = sum(t.numel() * t.element_size() for t in adapted.state_dict().values())
        assert stored <= written == path.stat().st_size <= stored + 32 * 1024
        fresh, _ = case.build()
        load_delta(fresh, path)
        assert torch.equal(run(fresh), expected)
        again = tmp_path / "again.pet.safetensors"
        save_delta(fresh, again)
        assert again.read_bytes() == path.read_bytes()

    def test_several_in_one_model(self, case: Case, built: Any, tmp_path: Path) -> None:
        """Each acts as if it were alone, whenever it is chosen, for all or in a thread; none touches another."""
        expected, resting, files = {}, {}, {}
        for name, scale in (("a", 0.3), ("b", -0.2)):
            alone, run = case.build()
            perturb(case.adapt(alone, run), scale)
            files[name], expected[name] = tmp_path / f"{name}.pet.safetensors", frozen_output(alone, run)
            save_delta(alone, files[name])
            resting[name] = frozen_output(alone.requires_grad_(False), run)  # torch chooses kernels by that
        model, run = built
        expected[""] = resting[""] = frozen_output(model, run)
        state, kinds = base_digest(model), [type(module) for module in model.modules()]
        flags = [parameter.requires_grad for parameter in model.parameters()]
        adapted = load_delta(model, files["a"], name="a")
        load_delta(model, files["b"], name="b")
        for name in ("a", "b", "a", "", "b", "a"):
            adapted.activate(*filter(None, [name]))
            assert torch.equal(frozen_output(model, run), expected[name])
            other = "b" if name == "a" else "a"
            with adapted.using(other):
                assert torch.equal(frozen_output(model, run), resting[other])
        for name, path in files.items():
            adapted[name].save(tmp_path / "again.pet.safetensors")
            assert (tmp_path / "again.pet.safetensors").read_bytes() == path.read_bytes()

        def work(name: str) -> bool:
            with adapted.using(*filter(None, [name])):
                return all([torch.equal(frozen_output(model, run), resting[name]) for _ in range(3)])

        adapted.activate()
        assert in_threads(work, ["a", "b", "", "b"]) == [True] * 4
        adapted["a"].remove()
        adapted.activate("b")
        assert torch.equal(frozen_output(model, run), expected["b"])
        adapted["b"].remove()
        assert torch.equal(frozen_output(model, run), expected[""])
        assert equal_states(dict(model.state_dict()), state)
        assert [type(module) for module in model.modules()] == kinds
        assert [parameter.requires_grad for parameter in model.parameters()] == flags

    def test_meta_device(self, case: Case, built: Any) -> None:
        """Built without memory, materialised, the base loaded: as if it had been built in memory."""
        model, run = built
        values, before = base_digest(model), frozen_output(model, run)
        twin, _ = case.build()
        buffers = {name: buffer.clone() for name, buffer in twin.named_buffers()}
        twin.to("meta")
        places = [case.adapt(model, run).record.applied[0].targets]
        if case.needs_values:
            with pytest.raises(ValueError, match="meta"):
                prepare(twin, [case.callback()], None, resolved=places)
            return
        commit(twin, prepare(twin, [case.callback()], None, resolved=places))
        assert Adapted(twin).plan().trainable == Adapted(model).plan().trainable
        twin.to_empty(device="cpu")
        twin.load_state_dict(values, strict=True)
        for name, buffer in twin.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])
        for module in twin.modules():
            if isinstance(module, Delta):
                module.reset_parameters()
        after = frozen_output(twin, run)
        assert torch.isfinite(after).all()
        if case.exact_identity:
            assert torch.equal(after, before)


LOAD_IN_A_NEW_PROCESS = """
import sys, torch
from tests.methods import zoo
from lightning_pet import load_delta
model, run = getattr(zoo, sys.argv[1])()
load_delta(model, sys.argv[2])
torch.save(run(model).detach(), sys.argv[3])
"""


def output_in_a_new_process(model: str, delta: Path, out: Path) -> Tensor:
    """What a new process computes with the base and the delta file."""
    codes, outputs = run_in_new_process(["-c", LOAD_IN_A_NEW_PROCESS, model, str(delta), str(out)])
    assert codes == [0], outputs[0]
    return torch.load(out, weights_only=True)
