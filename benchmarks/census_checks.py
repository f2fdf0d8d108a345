"""What the census checks of one method on one model."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lightning_pet
from lightning_pet import Adapted, PETCallback, PETError
from lightning_pet.insertion.commit import commit
from lightning_pet.insertion.prepare import prepare
from lightning_pet.model.named_roles import is_linear
from lightning_pet.model.naming import canonical
from lightning_pet.model.structure import Structure, host_parameter
from lightning_pet.probe.probe import analyse


def adapt(root: nn.Module, methods: Sequence[PETCallback], structure: Structure | None = None) -> Adapted:
    """Apply methods to a root whose structure is known."""
    commit(root, prepare(root, methods, structure))
    return Adapted(root)


@dataclass(frozen=True)
class Method:
    """A method as the census applies it.

    Attributes:
        name: column of the table.
        callback: class in :mod:`lightning_pet`.
        options: its arguments.
        identity: a fresh delta leaves the output bit-equal (``None``: it promises no such thing).
        tolerance: how far a fresh delta may move the output, relative to its size.
        needs: what an architecture must have to count: ``"any"``, ``"attention"``, ``"text"``.
        generates: also compare cached with uncached generation.
    """

    name: str
    callback: str
    options: dict[str, Any]
    identity: bool | None = True
    tolerance: float = 0.0
    needs: str = "any"
    generates: bool = False

    def build(self, model: nn.Module) -> PETCallback:
        """A new callback; in a model without linear layers, one for all linear layers takes the convolutions."""
        cls: type[PETCallback] = getattr(lightning_pet, self.callback)
        options = dict(self.options)
        if options.get("target_modules") == ["all-linear"] and not any(map(is_linear, model.modules())):
            options["target_modules"] = [
                canonical(name)
                for name, module in model.named_modules()
                if isinstance(module, nn.Conv1d | nn.Conv2d)
                and min(module.weight.shape[0], module.weight[0].numel()) > 1
            ]
        return cls(**options, modules_to_save=[])


@dataclass
class Outcome:
    """What one method did on one architecture: ``ok``, ``refused`` or ``failed``, and why."""

    status: str
    why: str = ""
    sites: int = 0


@dataclass
class Subject:
    """One architecture, ready to be adapted."""

    name: str
    kind: str
    model: nn.Module
    forward: Callable[[], Any]
    structure: Structure
    generator: nn.Module | None = None
    idle: frozenset[str] = frozenset()
    """Base parameters on which no output depends differentiably: the image tower of a model that is given text."""


def outcome(subject: Subject, method: Method) -> Outcome:
    """Apply, check, and take out again."""
    before = snapshot(subject.model)
    found = attempt(subject, method)
    difference = changed(before, snapshot(subject.model))
    if difference:
        return Outcome("failed", f"after removal {difference}", found.sites)
    return found


def attempt(subject: Subject, method: Method) -> Outcome:
    """The checks; the model is left as it was."""
    adapted: Adapted | None = None
    try:
        base = output(subject)
        if not same(base, output(subject)):
            return Outcome("failed", "the base is not repeatable")
        try:
            adapted = adapt(subject.model, [method.build(subject.model)], subject.structure)
        except PETError as error:
            return Outcome("refused", f"{type(error).__name__}: {shortened(error)}")
        sites = len(adapted.record.delta_names)
        why = check(subject, method, adapted, base)
        adapted.remove()
        adapted = None
        if not why and not same(base, output(subject)):
            why = "removal does not give the base's output back"
        if not why and method.generates and subject.generator is not None:
            why = check_generation(subject.generator, method)
        return Outcome("failed" if why else "ok", why, sites)
    except TimeoutError:
        raise
    except PETError as error:
        return Outcome("refused", f"in the first forward, {type(error).__name__}: {shortened(error)}")
    except Exception as error:
        return Outcome("failed", f"{type(error).__name__}: {str(error)[:200]}")
    finally:
        if adapted is not None:
            adapted.remove()


def shortened(error: Exception) -> str:
    """The beginning of a message, in whole words."""
    return textwrap.shorten(str(error), 300, placeholder=" …")


def check(subject: Subject, method: Method, adapted: Adapted, base: list[Tensor]) -> str:
    """The first property that does not hold; empty if all do."""
    fresh = output(subject)
    if method.identity and not close(fresh, base, 1e-5):
        return "a fresh delta moves the output"
    perturb(adapted)
    moved = output(subject)
    if same(moved, base):
        return "a moved delta has no effect"
    if not all(torch.isfinite(value).all() for value in moved):
        return "the output is not finite"
    silent = [name for name in without_gradient(subject, adapted) if not excused(subject, adapted, name)]
    if silent:
        return f"no gradient at {silent[0]} ({len(silent)} in all)"
    with adapted.disabled():
        if not same(output(subject), base):
            return "the output of the switched-off delta is not the base's"
    return ""


def perturb(adapted: Adapted, scale: float = 0.05) -> None:
    """Move the delta by a fixed random step."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.root.named_parameters():
            if canonical(name) in adapted.record.trainable_names:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def output(subject: Subject) -> list[Tensor]:
    """All float tensors of a forward, with fixed random numbers."""
    torch.manual_seed(1)
    with torch.no_grad():
        return floats(subject.forward())


def floats(value: Any) -> list[Tensor]:
    """Float tensors in a nest, without caches."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        return [x for key, item in value.items() if "past_key_values" not in key for x in floats(item)]
    return [x for item in value for x in floats(item)] if isinstance(value, list | tuple) else []


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bitwise, with NaN equal to NaN."""
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True)
    )


def close(a: list[Tensor], b: list[Tensor], tolerance: float) -> bool:
    """Up to rounding."""
    return len(a) == len(b) and all(
        torch.allclose(x, y, atol=tolerance * (1 + float(y.abs().max()) if y.numel() else 1), equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )


def excused(subject: Subject, adapted: Adapted, name: str) -> bool:
    """No output depends on the host of this delta parameter, not even without the delta."""
    places = {path: target for _, target, path in adapted.record.places()}
    target = next(target for path, target in places.items() if name.startswith(f"{path}."))
    return host_parameter(adapted.root, target) in subject.idle


def idle_parameters(model: nn.Module, forward: Callable[[], Any]) -> frozenset[str]:
    """Parameters that get no gradient from any output of a forward."""
    floating = [p for p in model.parameters() if p.is_floating_point()]
    for parameter in floating:
        parameter.requires_grad_(True)
    silent = no_gradient(model, forward)
    model.requires_grad_(False)
    return frozenset(silent)


def without_gradient(subject: Subject, adapted: Adapted) -> list[str]:
    """Delta parameters that no output depends on."""
    own = set(adapted.record.delta_names)
    return [name for name in no_gradient(adapted.root, subject.forward) if name in own]


def no_gradient(model: nn.Module, forward: Callable[[], Any]) -> list[str]:
    """Parameters that train and get no gradient."""
    torch.manual_seed(1)
    loss = sum(
        (value * torch.linspace(0.5, 1.5, value.numel()).view(value.shape)).sum()
        for value in floats(forward())
        if value.requires_grad
    )
    if isinstance(loss, Tensor):
        loss.backward()
    silent = [canonical(n) for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    for parameter in model.parameters():
        parameter.grad = None
    return silent


def check_generation(model: nn.Module, method: Method) -> str:
    """Greedy generation with and without a cache gives the same tokens, if the base does so."""
    ids = torch.arange(5, 11).remainder(int(model.config.get_text_config().vocab_size)).view(1, -1).repeat(2, 1)

    def tokens(cache: bool) -> Tensor:
        torch.manual_seed(1)
        result: Tensor = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False,
            use_cache=cache,
        )  # fmt: skip
        return result

    try:
        if not torch.equal(tokens(True), tokens(False)):
            return ""
    except Exception:
        return ""  # the base does not generate from so little
    adapted = adapt(model, [method.build(model)], analyse(model))
    try:
        perturb(adapted, 1.0)
        return "" if torch.equal(tokens(True), tokens(False)) else "cached generation differs from uncached"
    finally:
        adapted.remove()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What removal must restore: names, identities, values, classes."""
    state = {f"tensor {name}": value.detach().clone() for name, value in model.state_dict().items()}
    names = {f"id {n}": id(p) for n, p in model.named_parameters(remove_duplicate=False)}
    kinds = {f"class {n}": type(m) for n, m in model.named_modules()}
    return {**state, **names, **kinds}


def changed(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The first difference."""
    for key in before.keys() | after.keys():
        a, b = before.get(key), after.get(key)
        equal = (
            torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        )
        if not equal:
            return f"{key} differs"
    return ""
