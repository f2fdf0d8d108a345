"""Roles of projections: read from the autograd graph, and made one with what names and the tensor-parallel plan say."""

import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from lightning_pet.model.named_roles import (
    NamedRoles,
    declared_rows,
    is_cross,
    is_linear,
    multihead_targets,
    named_places,
    roles_by_name,
    tensor_parallel_plan,
    without_numbers,
)
from lightning_pet.model.structure import Role, Rows, Structure, Target
from lightning_pet.probe.graph import Edge, Graph, count, mixes_positions, ranges, rows_feeding, without
from lightning_pet.probe.sites import Addition, Softmax

# --- from the graph -------------------------------------------------------------------------------


_NONLINEAR = re.compile(
    r"^(?:_?Silu|Gelu|Relu|LeakyRelu|Rrelu|Sigmoid|Tanh|Softplus|Elu|Selu|Celu|Hard|Mish|Erf|Threshold|Prelu|Pow|Exp"
    r"|Glu|LogSigmoid|Softsign)",
    re.I,
)
_JOINS = re.compile(r"^(?:Cat|Stack)")
_CLAMP = re.compile(r"^Clamp|^Minimum|^Maximum")


@dataclass
class Use:
    """What one weight does.

    Attributes:
        roles: for every role the gemm and the tensor that it feeds.
        cross: the weight serves cross-attention.
        rows: features of the roles that were worked out without a tensor to look at (gated feed-forwards).
    """

    roles: dict[Role, tuple[int, Edge | None]] = field(default_factory=dict)
    cross: bool = False
    rows: dict[Role, Rows | None] = field(default_factory=dict)


Uses = dict[int | str, Use]


def attention_uses(graph: Graph, softmaxes: Sequence[Softmax], additions: Sequence[Addition]) -> Uses:
    """q, k, v: the nearest gemms above each operand of an attention; o: the first below it."""
    uses: Uses = defaultdict(Use)
    sums = frozenset(addition.add for addition in additions)
    stop = sums | frozenset(i for softmax in softmaxes for i in softmax.inner)
    inputs: set[int] = set()
    for softmax in softmaxes:
        operands: tuple[tuple[Role, Edge], ...] = (
            ("attention.q", softmax.q),
            ("attention.k", softmax.k),
            ("attention.v", softmax.v),
        )
        for role, edge in operands:
            for i in graph.gemms_above([edge.node], stop):
                inputs.add(i)
                _note(uses[graph.gemms[i].weight], role, i, edge, softmax.cross)
    for softmax in softmaxes:
        around = next((a.region for a in additions if softmax.node in a.region), None)
        for i in graph.gemms_below(softmax.last, sums):
            if i not in inputs and (around is None or i in around):
                _note(uses[graph.gemms[i].weight], "attention.o", i, None, softmax.cross)
    return dict(uses)


def _note(use: Use, role: Role, gemm: int, edge: Edge | None, cross: bool) -> None:
    use.roles.setdefault(role, (gemm, edge))
    use.cross = use.cross or cross


def ffn_uses(
    graph: Graph, softmaxes: Sequence[Softmax], additions: Sequence[Addition], taken: Iterable[int | str]
) -> tuple[Uses, list[int]]:
    """Up, gate and down projections, and the nodes of the latter.

    *down* is a gemm on a residual branch that other gemms reach through a non-linearity, position by
    position, and whose output is as wide as the stream (a router's is not).
    """
    uses: Uses = defaultdict(Use)
    downs: list[int] = []
    attention = frozenset(taken)
    stop = frozenset(a.add for a in additions) | frozenset(i for softmax in softmaxes for i in softmax.inner)
    for i, gemm in graph.gemms.items():
        around = next((a for a in additions if i in a.region), None)
        if gemm.weight in attention or around is None or not gemm.pointwise:
            continue
        if graph.features(i) not in graph.shape(Edge(around.add, 0)):
            continue
        pair = _gates(graph, i, around.region, stop)
        if pair is None:
            continue
        gates, ups = pair
        # Pointwise, so it mixes nothing itself: what it reads tells the same without its product.
        mixed = Edge(i, 0) if "Convolution" in graph.names[i] else _input_edge(graph, i)
        if any(not graph.gemms[j].pointwise or mixes_positions(graph, mixed, j) for j in (*gates, *ups)):
            continue
        _note(uses[gemm.weight], "ffn.down", i, None, False)
        downs.append(i)
        _note_ups(graph, uses, i, gates, ups)
    # A chain of gates (squeeze-and-excite) makes one weight both; that is no feed-forward.
    plain = {w: use for w, use in uses.items() if "ffn.down" not in use.roles or len(use.roles) == 1}
    return {weight: use for weight, use in plain.items() if weight not in attention}, downs


def _note_ups(graph: Graph, uses: Uses, down: int, gates: list[int], ups: list[int]) -> None:
    if ups:
        for i in gates:
            _note(uses[graph.gemms[i].weight], "ffn.gate", i, None, False)
        for i in ups:
            _note(uses[graph.gemms[i].weight], "ffn.up", i, None, False)
        return
    for i in gates:
        use = uses[graph.gemms[i].weight]
        _note(use, "ffn.up", i, None, False)
        if graph.features(i) > _input_features(graph, down) and "ffn.gate" not in use.roles:
            _note(use, "ffn.gate", i, None, False)
            use.rows.update(_gated_rows(graph, down, i))


def _input_edge(graph: Graph, i: int) -> Edge:
    """The data operand of a gemm (the operand of an opaque one lies further up)."""
    (before,) = graph.gemms[i].data
    return next((edge for edge in graph.operands[i] if edge.node == before), Edge(before, 0))


def _input_features(graph: Graph, i: int) -> int:
    return graph.shape(_input_edge(graph, i))[1 if "Convolution" in graph.names[i] else -1]


def _gates(graph: Graph, down: int, region: frozenset[int], stop: frozenset[int]) -> tuple[list[int], list[int]] | None:
    """Gemms that reach ``down`` through a non-linearity, and those that do not; ``None`` without the former."""
    for pattern in (_NONLINEAR, _CLAMP):
        reached = _reached(graph, down, region, stop, pattern)
        gates = [i for i, ways in reached.items() if True in ways]
        if gates:
            return sorted(gates), sorted(i for i, ways in reached.items() if True not in ways)
    return None


def _reached(
    graph: Graph, down: int, region: frozenset[int], stop: frozenset[int], pattern: re.Pattern[str]
) -> dict[int, set[bool]]:
    """The nearest gemms above ``down`` with the ways to them: through a match of ``pattern`` or not."""
    reached: dict[int, set[bool]] = defaultdict(set)
    seen: set[tuple[int, bool]] = set()
    todo = [(i, False) for i in graph.gemms[down].data]
    while todo:
        i, through = todo.pop()
        if (i, through) in seen or i in stop or i not in region:
            continue
        seen.add((i, through))
        if i in graph.gemms and not graph.depthwise(i):
            reached[i].add(through)
            continue
        through = through or _bends(graph, i, pattern)
        todo.extend((j, through) for j in graph.data[i])
    return reached


def weighing(graph: Graph) -> list[int]:
    """Gemms with one output that other features are multiplied by: routers, gates of shared experts."""
    found = []
    for i in graph.gemms:
        if "Convolution" not in graph.names[i] and graph.shape(Edge(i, 0))[-1:] == (1,) and _weighs(graph, i):
            found.append(i)
    return found


def _weighs(graph: Graph, gemm: int) -> bool:
    """Whether the number, through a non-linearity or as it is, multiplies more features than it has itself."""
    seen: set[tuple[int, bool]] = set()
    todo = [(gemm, False)]
    while todo:
        i, bent = todo.pop()
        for j in graph.successors[i]:
            bent_here = bent or bool(_NONLINEAR.match(graph.names[j]) or "Softmax" in graph.names[j])
            if (j, bent_here) in seen or j in graph.gemms:
                continue
            seen.add((j, bent_here))
            if len(graph.data[j]) == 1 or _JOINS.match(graph.names[j]):
                todo.append((j, bent_here))
            elif graph.names[j].startswith("Mul"):
                own = [graph.shape(edge)[-1:] for edge in graph.operands[j] if edge.node == i]
                if (1,) in own and graph.shape(Edge(j, 0))[-1:] != (1,):
                    return True
            elif bent and graph.is_product(j):
                return True  # a weighted sum over positions
    return False


def _bends(graph: Graph, i: int, pattern: re.Pattern[str]) -> bool:
    name = graph.names[i]
    if name.startswith("Pow"):  # the square inside a norm is not an activation
        return bool(pattern.match(name)) and not any(graph.names[j].startswith("Mean") for j in graph.successors[i])
    return bool(pattern.match(name))


def _gated_rows(graph: Graph, down: int, fused: int) -> dict[Role, Rows | None]:
    """Rows of the gate (what enters the non-linearity) and of the linear half of a fused up-projection.

    The input of the non-linearity is looked at, not its output: behind a ReLU some features may be silent
    for a whole batch. Both halves must be as wide as the input of ``down``, else the rows count as unknown.
    """
    between = graph.ancestors(graph.gemms[down].data, fused, stop=frozenset((fused,)))
    gate: set[int] = set()
    for i in between:
        for edge in graph.operands[i] if _bends(graph, i, _NONLINEAR) else ():
            rows = None if graph.constant[edge.node] else rows_feeding(graph, edge, fused)
            gate.update(j for start, stop in rows or () for j in range(start, stop))
    gate_rows = ranges([j in gate for j in range(graph.features(fused))])
    up_rows = without(((0, graph.features(fused)),), gate_rows)
    if not count(gate_rows) == count(up_rows) == _input_features(graph, down):
        return {"ffn.gate": None, "ffn.up": None}
    return {"ffn.gate": gate_rows, "ffn.up": up_rows}


# --- one structure out of three opinions: the probe, the names, and the tensor-parallel plan ------


Host = tuple[str, str]
_COLUMNWISE: frozenset[Role] = frozenset(("attention.q", "attention.k", "attention.v", "ffn.up", "ffn.gate"))


def merge(model: nn.Module, seen: Structure | None) -> Structure:
    """Complete what a probe saw by what the names say; ``None`` for names alone.

    A role comes from the probe where it found one, else from names. Places that did not run (an
    expert without tokens) take the roles of the same place in other layers.
    """
    base = seen if seen is not None else Structure()
    found = _by_host(target for target in base.targets if target.role != "embedding")
    unresolved = _by_host(base.unresolved)
    notes: list[str] = []
    _use_multihead(model, base, found, unresolved)
    _use_siblings(model, base, found)
    places = named_places(model)
    for named in roles_by_name(model):
        notes.extend(_use_name(places, base, named, found, unresolved))
    notes.extend(_check_plan(model, found))
    embeddings = [target for target in base.targets if target.role == "embedding"]
    return replace(
        base,
        targets=(*embeddings, *(target for targets in found.values() for target in targets)),
        unresolved=tuple(target for targets in unresolved.values() for target in targets),
        disagreements=(*base.disagreements, *notes),
    )


def _by_host(targets: Iterable[Target]) -> dict[Host, list[Target]]:
    hosts: dict[Host, list[Target]] = defaultdict(list)
    for target in targets:
        hosts[target.module, target.parameter].append(target)
    return hosts


def _use_multihead(
    model: nn.Module, base: Structure, found: dict[Host, list[Target]], unresolved: dict[Host, list[Target]]
) -> None:
    """The attention of torch itself is known by its class, whatever the graph says."""
    seen_cross = {core.owner: core.cross for core in base.attention}
    modules = named_places(model)
    for path, module in modules.items():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        for table in (found, unresolved):
            for host in [host for host in table if host[0] in (path, f"{path}.out_proj".lstrip("."))]:
                del table[host]
        for target in multihead_targets(path, module, seen_cross.get(path, is_cross(modules, path))):
            found[target.module, target.parameter].append(target)


def _use_siblings(model: nn.Module, base: Structure, found: dict[Host, list[Target]]) -> None:
    """Give a place that never ran the roles of the same place in the layers that did run."""
    if base.called is None:
        return
    patterns: dict[Host, set[tuple[Target, ...]]] = defaultdict(set)
    for (host, parameter), targets in found.items():
        anonymous = tuple(replace(target, module="") for target in targets)
        patterns[without_numbers(host), parameter].add(anonymous)
    for path, module in named_places(model).items():
        if path in base.called or not is_linear(module) or (path, "weight") in found:
            continue
        known = patterns.get((without_numbers(path), "weight"), set())
        if len(known) == 1:
            found[path, "weight"] = [replace(target, module=path) for target in next(iter(known))]


def _use_name(
    places: Mapping[str, nn.Module],
    base: Structure,
    named: NamedRoles,
    found: dict[Host, list[Target]],
    unresolved: dict[Host, list[Target]],
) -> list[str]:
    host = (named.module, named.parameter)
    known = [*found.get(host, ()), *unresolved.get(host, ())]
    if known:
        roles = {target.role for target in known}
        rows = declared_rows(places[named.module], named) if host in unresolved else None
        if rows is not None and roles == set(named.roles):
            found[host] = [replace(target, rows=rows[target.role]) for target in unresolved.pop(host) if target.role]
        if roles == set(named.roles):
            return []
        return [f"{named.module}: the forward shows {_list(roles)}, its name suggests {_list(named.roles)}"]
    rival = _rival(base, named)
    if rival is not None:
        return [f"{named.module}: its name suggests {_list(named.roles)}, but the forward shows that in {rival}"]
    if len(named.roles) == 1:
        found[host].append(Target(*host, role=named.roles[0], cross=named.cross))
        return []
    rows = declared_rows(places[named.module], named)
    table = unresolved if rows is None else found
    table[host] = [Target(*host, role=role, cross=named.cross, rows=(rows or {}).get(role)) for role in named.roles]
    return []


def _rival(base: Structure, named: NamedRoles) -> str | None:
    """Another module of the same block in which the forward showed one of these roles."""
    place = _block(named.module)
    for target in base.targets:
        if target.role in named.roles and target.cross == named.cross and place and _block(target.module) == place:
            return target.module
    return None


def _block(path: str) -> str:
    """The path up to the last index above the module itself, empty without one."""
    parts = path.split(".")[:-1]
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1])


def _check_plan(model: nn.Module, found: Mapping[Host, Sequence[Target]]) -> list[str]:
    """Projections whose role contradicts the direction in which the model's own plan shards them."""
    plan = tensor_parallel_plan(model)
    notes: list[str] = []
    for (module, parameter), targets in found.items():
        name = module if parameter == "weight" else f"{module}.{parameter}"
        style = next((style for pattern, style in plan.items() if fnmatch.fnmatchcase(name, pattern)), "")
        for target in targets:
            wide = target.role in _COLUMNWISE
            if (wide and style.startswith("rowwise")) or (not wide and style.startswith("colwise")):
                notes.append(f"{name}: found to be {target.role}, but the model's plan shards it {style}")
    return notes


def _list(roles: Iterable[Role | None]) -> str:
    return " and ".join(sorted(str(role) for role in roles))
