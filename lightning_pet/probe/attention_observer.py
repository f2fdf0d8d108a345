"""Watch a forward, and note every softmax attention: which module runs it, by which route, with what shapes."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from lightning_pet.attention import einsum as attention_einsum
from lightning_pet.attention import functions
from lightning_pet.attention.interface import observed
from lightning_pet.model.structure import AttentionCore, Route
from lightning_pet.probe.graph import is_view_name
from lightning_pet.probe.trace import Call, Tracer, thinned

_HIDDEN = -1e3
"""A bias below this is a mask."""


@dataclass
class Seen:
    """One attention.

    Attributes:
        owner: path of the module that ran it.
        route: how a prefix can get there; ``""``: not at all.
        heads: key/value heads, 0 if the layout does not tell.
        windows: sizes of the two dimensions that are heads and windows, in some order.
        key_dim: features of a key.
        value_dim: features of a value.
        scale: factor of the scores, where they were formed by a product of their own.
        drifts: a bias shifts all scores with the number of keys (:func:`_drifts`).
        key: the keys, if they were to be kept; likewise ``value``.
    """

    owner: str
    route: Route
    heads: int
    key_dim: int
    value_dim: int
    windows: tuple[int, ...] = ()
    scale: float | None = None
    drifts: bool = False
    key: Tensor | None = field(default=None, repr=False)
    value: Tensor | None = field(default=None, repr=False)


@dataclass(eq=False)
class _Product:
    left: Tensor
    right: Tensor
    result: Tensor
    made: GradientEdge | None  # as the product made it: it may be written to in place
    stack: tuple[Call, ...]
    factor: float = 1.0

    def is_near(self, stack: Sequence[Call]) -> bool:
        """Whether the module around the one that made it is still running."""
        around = self.stack[:-1]
        return len(stack) >= len(around) and all(a is b for a, b in zip(around, stack, strict=False))


class Observer(TorchFunctionMode):
    """Fills :attr:`seen` while a recorded forward runs.

    Args:
        tracer: knows which modules are running.
        keep: also keep the keys and values.
        thin: only the graph is read: large products take part of their columns (:mod:`.thinned`).
    """

    def __init__(self, tracer: Tracer, keep: bool = False, thin: bool = False) -> None:
        super().__init__()
        self.tracer = tracer
        self.keep = keep
        self.thin = thin
        self.seen: list[Seen] = []
        self._inside = 0  # within a function that was noted already
        self._products: list[_Product] = []
        self._score: _Product | None = None
        self._shape: torch.Size | None = None
        self._scale: float | None = None
        self._drifting = False
        self._table = observed(self)

    def __enter__(self) -> "Observer":
        """Start to watch."""
        self._table.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *details: Any) -> None:
        """Stop."""
        super().__exit__(*details)  # type: ignore[no-untyped-call]
        self._table.__exit__(*details)

    def _note(self, stack: Sequence[Call], route: Route, heads: int, key: Tensor, value: Tensor) -> Seen:
        seen = Seen(stack[-1].path if stack else "", route, heads, key.shape[-1], value.shape[-1])
        if self.keep:
            seen.key, seen.value = key.detach(), value.detach()
        self.seen.append(seen)
        return seen

    def interface(
        self, attend: Callable[[], Any], module: nn.Module, key: Tensor, value: Tensor, biases: Sequence[Any] = ()
    ) -> Any:
        """One attention of transformers' table."""
        path = self.tracer.path_of(module)
        stack = [call for call in self.tracer.running() if call.path == path]
        route: Route = "interface" if key.dim() == 4 and stack else ""
        heads = key.shape[-3] if key.dim() > 2 else 0
        seen = self._note(stack or self.tracer.running(), route, heads, key, value)
        seen.drifts = any(_drifts(bias) for bias in biases)
        self._inside += 1
        try:
            return attend()
        finally:
            self._inside -= 1

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See :class:`torch.overrides.TorchFunctionMode`."""
        kwargs = kwargs or {}
        if self.thin and func is F.linear and (result := thinned(args, kwargs)) is not None:
            return result
        result = func(*args, **kwargs)
        kind = None if self._inside else functions.FUNCTIONS.get(func)
        if kind == functions.PRODUCT:
            self._saw_product(*functions.operands(args, kwargs), result)
        elif kind == functions.ADDED_PRODUCT:
            left, right, factor = functions.added_operands(args, kwargs)
            self._products.append(_Product(left, right, result, _edge(result), tuple(self.tracer.running()), factor))
        elif kind == functions.SUM:
            self._saw_sum(args, result)
        elif kind == functions.SOFTMAX:
            self._saw_softmax(args[0] if args else kwargs["input"], args[1:], kwargs, result)
        elif kind == functions.SDPA:
            key, value = (args[i] if len(args) > i else kwargs[name] for i, name in ((1, "key"), (2, "value")))
            heads = key.shape[-3] if key.dim() > 3 else 0
            seen = self._note(self.tracer.running(), "functional" if key.dim() in (3, 4) else "", heads, key, value)
            seen.drifts = _drifts(args[3] if len(args) > 3 else kwargs.get("attn_mask"))
        elif kind == functions.MULTI_HEAD:
            self._saw_multi_head(args, kwargs)
        return result

    def _saw_multi_head(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = functions.bind_multi_head(args, kwargs)
        with torch.no_grad():
            _, key, value = functions.project(bound)
        plain = functions.is_plain_multi_head(bound)
        seen = self._note(self.tracer.running(), "functional" if plain else "", key.shape[1], key, value)
        seen.drifts = _drifts(bound["attn_mask"])

    def _saw_product(self, left: Tensor, right: Tensor, result: Tensor) -> None:
        stack = tuple(self.tracer.running())
        self._products = [product for product in self._products if product.is_near(stack)]
        if self._score is not None and self._shape is not None and functions.same_shape(left, self._shape):
            self._saw_values(left, right, stack)
        else:
            self._products.append(_Product(left, right, result, _edge(result), stack))

    def _saw_sum(self, args: tuple[Any, ...], result: Tensor) -> None:
        stack = tuple(self.tracer.running())
        shares = None if self._score is None else functions.sum_operand_like(args, self._shape)
        if shares is not None:
            if (found := attention_einsum.values(args, shares)) is not None:
                self._saw_values(found.left, found.right.mT, stack)
        elif (score := attention_einsum.scores(args)) is not None:
            self._products.append(_Product(score.left, score.right.mT, result, _edge(result), stack))

    def _saw_values(self, left: Tensor, right: Tensor, stack: tuple[Call, ...]) -> None:
        score, self._score = self._score, None
        assert score is not None
        common = [a for a, b in zip(score.stack, stack, strict=False) if a is b]
        heads = score.right.shape[1] if score.right.dim() == 4 else 0  # of the keys: 1 where all queries share them
        known = self._scale is not None and left.dim() in (3, 4, 5)
        seen = self._note(common, "functional" if known else "", heads, score.right.mT, right)
        seen.scale, seen.windows = self._scale, tuple(left.shape[1:3]) if left.dim() == 5 else ()
        seen.drifts = self._drifting

    def _saw_softmax(self, scores: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], shares: Tensor) -> None:
        found = next((p for p in self._products if functions.same_scores(p.result, scores)), None)
        if found is None:
            return
        self._products.remove(found)
        last = kwargs.get("dim", args[0] if args else None) in (-1, scores.dim() - 1)
        self._score, self._shape = found, shares.shape
        scale = _scale(found.made, scores, shares) if last and found.left.dim() in (3, 4, 5) else None
        self._scale = None if scale is None else scale * found.factor
        self._drifting = self._scale is not None and _drifts_beside(found, self._scale, scores)


def _edge(tensor: Tensor) -> GradientEdge | None:
    """What a product made, behind its views: writing in place to a view makes the view's own node anew."""
    if tensor.grad_fn is None:
        return None
    edge = get_gradient_edge(tensor)
    while is_view_name(edge.node.name()):
        node, number = edge.node.next_functions[0]
        if node is None:
            break
        edge = GradientEdge(node, number)
    return edge


def _scale(product: GradientEdge | None, scores: Tensor, shares: Tensor) -> float | None:
    """The factor between a product and the scores that came of it, if it is one number wherever there is a share."""
    if product is None or not scores.requires_grad or scores.is_meta:
        return None
    found = torch.autograd.grad(scores, [product], torch.ones_like(scores), retain_graph=True, allow_unused=True)
    gradient = cast(Tensor | None, found[0])
    if gradient is None or gradient.numel() != shares.numel():
        return None
    factors = gradient[shares.detach().reshape(gradient.shape) > 0]
    if not factors.numel() or not factors[0] or (factors - factors[0]).abs().max() > 1e-6 * factors[0].abs():
        return None
    return float(factors[0])


@torch.no_grad()
def _drifts_beside(product: _Product, scale: float, scores: Tensor) -> bool:
    """Whether what was added to a product to make the scores drifts."""
    content = (product.left @ product.right).float() * scale
    noise = 16 * torch.finfo(scores.dtype).eps * float(content.abs().max())
    return _drifts(scores.float() - content.reshape(scores.shape), noise)


@torch.no_grad()
def _drifts(bias: Any, noise: float = 0.0) -> bool:
    """Whether a bias grows evenly from key to key, alike for all queries, and is not counted from the first key.

    Softmax forgives what all keys have in common, so such biases may be counted from the last key (MPT's ALiBi). A
    prefix does not take part: with every further token the real keys gain or lose against it, for all queries.

    Args:
        bias: … × queries × keys, added to the scores; what is far below zero hides a key.
        noise: differences up to this are none.
    """
    if not isinstance(bias, Tensor) or not bias.is_floating_point() or bias.is_meta or bias.dim() < 2:
        return False
    bias, noise = bias.float().reshape(-1, *bias.shape[-2:]), noise + 1e-5
    visible = bias > _HIDDEN
    last, seen = bias[:, -1], visible[:, -1]
    if bool(((bias - last[:, None]).abs() > noise)[visible & seen[:, None]].any()):
        return False
    steps, both = last.diff(dim=-1), seen[:, 1:] & seen[:, :-1]
    if not both.any():
        return False
    slope = _first(steps, both)
    if bool(((steps - slope).abs() > 2 * noise)[both].any()):
        return False
    return bool(((slope.abs() > 2 * noise) & (_first(last, seen).abs() > noise) & both.any(-1, keepdim=True)).any())


def _first(values: Tensor, where: Tensor) -> Tensor:
    """In every row the first value that a mask lets through, rows × 1."""
    return values.gather(-1, where.to(torch.uint8).argmax(-1, keepdim=True))


def with_routes(cores: Sequence[AttentionCore], seen: Sequence[Seen]) -> tuple[AttentionCore, ...]:
    """The cores that a graph shows (one per call), with what was seen of them while they ran; and those that only ran.

    Each module once per kind. A module of which the graph shows more than was seen has no route.
    """
    runs: dict[str, list[Seen]] = {}
    for one in seen:
        runs.setdefault(one.owner, []).append(one)
    shown = Counter(core.owner for core in cores)
    taken = set(shown)
    merged: list[AttentionCore] = []
    for core in {(core.owner, core.cross): core for core in reversed(cores)}.values():
        owner = core.owner if core.owner in runs else _nearest(core.owner, runs.keys() - taken)
        if owner is None or len(runs[owner]) < shown[core.owner]:
            merged.append(core)
        else:
            taken.add(owner)
            merged.append(_routed(replace(core, owner=owner), runs[owner]))
    merged.reverse()
    merged += [_routed(AttentionCore(owner), own) for owner, own in runs.items() if owner not in taken]
    return tuple(merged)


def _nearest(owner: str, others: Iterable[str]) -> str | None:
    """The one module inside or around a module."""
    inside = [other for other in others if other.startswith(f"{owner}.") or owner.startswith(f"{other}.")]
    return inside[0] if len(inside) == 1 else None


def _routed(core: AttentionCore, runs: Sequence[Seen]) -> AttentionCore:
    first = runs[0]
    heads = first.heads or core.kv_heads
    windows = {run.windows for run in runs if run.windows}
    axes = [axis for axis in (1, 2) if windows and all(sizes[axis - 1] == heads for sizes in windows)]
    sure = not windows or len(axes) == 1 or heads == 1
    alike = {(run.heads or heads, run.key_dim, run.value_dim, run.route) for run in runs}
    scales = {run.scale for run in runs if run.scale is not None}
    return replace(
        core,
        kv_heads=heads,
        key_dim=first.key_dim,
        value_dim=first.value_dim,
        route=first.route if heads and sure and len(alike) == 1 and len(scales) < 2 else "",
        scale=next(iter(scales), None),
        axis=axes[0] if axes else 1,
        drifts=any(run.drifts for run in runs),
    )
