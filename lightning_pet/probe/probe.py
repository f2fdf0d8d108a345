"""What a model is made of: :func:`probe` reads one forward, :func:`analyse` adds what names tell.

The probe needs no table of architectures. It runs a forward in evaluation mode, reads the autograd
graph, finds softmax attention and residual sums in it, and maps both back to modules.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_pet.errors import TargetError
from lightning_pet.model.named_roles import named_places
from lightning_pet.model.structure import AttentionCore, Output, Role, Rows, Site, Structure, Target
from lightning_pet.model.undisturbed import undisturbed
from lightning_pet.probe.attention_observer import Observer, Seen, with_routes
from lightning_pet.probe.graph import Edge, Graph, count, rows_feeding
from lightning_pet.probe.roles import Use, Uses, attention_uses, ffn_uses, merge, weighing
from lightning_pet.probe.sites import Addition, Softmax, Taps, build_sites, find_additions, find_softmaxes
from lightning_pet.probe.trace import Trace, Tracer, accepts_mask, candidate_forwards, is_self_describing, tensors

_ORDER: tuple[Role, ...] = (
    "attention.q", "attention.k", "attention.v", "attention.o", "ffn.gate", "ffn.up", "ffn.down", "embedding"
)  # fmt: skip


class UnreadableGraphError(TargetError):
    """The forward ran, but its graph has a form that is not understood: no fault of who gave it."""


def probe(model: nn.Module, forward: Callable[[], Any], *, thin: bool = False) -> Structure:
    """Find out the structure of ``model`` by running ``forward`` once.

    The model is left exactly as it was (parameters, gradients, buffers, modes, hooks, random states),
    also when ``forward`` raises.

    Args:
        model: the model; paths in the result are relative to it.
        forward: runs ``model`` on a small batch and returns any nest of tensors (outputs or a loss).
        thin: nobody looks at the numbers of this forward, so large products need not be computed whole.

    Returns:
        The structure as this one forward shows it.

    Raises:
        TargetError: the forward raised, or returned nothing that depends on the model's parameters, or its graph
            has a form that cannot be read.
    """
    with undisturbed(model):
        tracer = Tracer(model)
        observer = Observer(tracer, thin=thin)
        with tracer.attached() as trace:
            try:
                with observer:
                    result = forward()
            except Exception as error:
                raise TargetError(
                    f"the probing forward of {type(model).__name__} failed: {type(error).__name__}: {error}. It runs "
                    "in evaluation mode with gradients enabled; pass a batch that the model accepts in that mode."
                ) from error
        trace.outputs = [x.grad_fn for x in tensors(result) if x.grad_fn is not None]
        del result
        if not trace.outputs:
            raise TargetError(
                f"the probing forward of {type(model).__name__} returned no tensor that depends on its parameters. "
                "Return the outputs or the loss, and do not run the model under torch.no_grad()."
            )
        try:
            return _Reading(model, trace, observer.seen).structure()
        except Exception as error:
            raise UnreadableGraphError(
                f"the autograd graph of {type(model).__name__} could not be read: {type(error).__name__}: {error}. "
                "Name the target modules instead of their roles, and please report this model."
            ) from error


def analyse(model: nn.Module, forward: Callable[[], Any] | None = None, *, strict: bool = False) -> Structure:
    """Structure of ``model`` from a forward, its names and its tensor-parallel plan, whichever are available.

    Args:
        model: the model; paths in the result are relative to it.
        forward: as in :func:`probe`. Without one, a model that describes its inputs (Hugging Face) is
            run on eight tokens, one image or a short sound, also on the meta device.
        strict: the forward is the user's word: do not go on without it.

    Returns:
        The merged structure. ``source`` is ``"names"`` if no forward could be run; the reason is then
        the first of ``disagreements``.

    Raises:
        TargetError: with ``strict``, if the forward raised, or returned nothing that depends on the parameters.
    """
    seen, failure, own = _first_success(model, forward, strict)
    structure = replace(merge(model, seen), failure=failure or "")
    if reason := failure or own:
        structure = replace(structure, disagreements=(reason, *structure.disagreements))
    if seen is None:
        embedding = _input_embedding(model) or _only_embedding(model)
        targets = structure.targets if embedding is None else (Target(embedding, role="embedding"), *structure.targets)
        structure = replace(
            structure,
            targets=targets,
            embedding=embedding,
            consumer=_static_consumer(model, embedding),
        )
    return replace(
        structure,
        targets=_in_module_order(model, structure.targets),
        unresolved=_in_module_order(model, structure.unresolved),
    )


def _first_success(
    model: nn.Module, forward: Callable[[], Any] | None, strict: bool
) -> tuple[Structure | None, str | None, str | None]:
    """Probe by the given forward, else by the model's own inputs; and what went wrong with the one and the others."""
    failure = own = None
    if forward is not None:
        try:
            return probe(model, forward), None, None
        except TargetError as error:
            if strict and not isinstance(error, UnreadableGraphError):
                raise
            failure = str(error)
    for candidate in candidate_forwards(model):
        try:
            return probe(model, candidate, thin=True), failure, None
        except TargetError as error:
            own = own or str(error)
    return None, failure, own


class _Reading:
    """The graph of one recorded forward, and what follows from it."""

    def __init__(self, model: nn.Module, trace: Trace, seen: Sequence[Seen]) -> None:
        self.model = model
        self.trace = trace
        self.seen = seen
        self.owners = _owners(model)
        parameters = {id(p): p.dim() for p in model.parameters()}
        self.graph = Graph(trace.outputs, parameters)
        self._add_opaque()
        self.taps = Taps(model, self.graph, trace)
        self.additions: list[Addition] = find_additions(self.graph, frozenset(self.taps.outputs))
        self.softmaxes: list[Softmax] = find_softmaxes(self.graph)
        self.uses: Uses = attention_uses(self.graph, self.softmaxes, self.additions)
        ffn, self.downs = ffn_uses(self.graph, self.softmaxes, self.additions, self.uses)
        self.uses.update(ffn)

    def structure(self) -> Structure:
        targets, unresolved = self._targets()
        embedding = _input_embedding(self.model) or self.trace.embedding
        if embedding is not None:
            targets.append(Target(embedding, role="embedding"))
        consumer = self.trace.consumer  # the root is "", which is false
        return Structure(
            targets=_in_module_order(self.model, targets),
            sites=self._sites(),
            attention=self._attention(),
            embedding=embedding,
            consumer=consumer if consumer is not None else _static_consumer(self.model, embedding),
            called=frozenset(call.path for call in self.trace.calls),
            read_by=self._read_by(),
            source="probe",
            unresolved=_in_module_order(self.model, unresolved),
            weighing=frozenset(host[0] for gemm in weighing(self.graph) if (host := self.host(gemm)) is not None),
            outputs=() if is_self_describing(self.model) else self._outputs(),
        )

    def _outputs(self) -> tuple[Output, ...]:
        """Layers of which every use is behind all other weights, with what feeds them."""
        graph = self.graph
        followed = [False] * len(graph.nodes)
        for i in range(len(graph.nodes) - 1, -1, -1):  # successors come later
            followed[i] = any(followed[j] or j in graph.gemms for j in graph.successors[i])
        uses: dict[str, list[int]] = {}
        for i in graph.gemms:
            if (host := self.host(i)) is not None:
                uses.setdefault(host[0], []).append(i)
        found = []
        for module, gemms in uses.items():
            if not any(followed[i] for i in gemms):
                above = graph.ancestors(j for i in gemms for j in graph.data[i])
                feeding = {host[0] for j in above if j in graph.gemms and (host := self.host(j)) is not None}
                feeding |= {tap.call.path for j in above for tap in self.taps.outputs.get(j, ())}
                found.append(Output(module, frozenset(feeding - {module})))
        return tuple(found)

    def _add_opaque(self) -> None:
        """Quantised linears hide their weight: take their outputs from the trace instead."""
        seen = {path for gemm in self.graph.gemms.values() for path, _ in self.owners.get(gemm.weight, ())}
        modules = named_places(self.model)
        for call in self.trace.calls:
            module = modules[call.path]
            if call.path in seen or not hasattr(module, "in_features") or any(True for _ in module.children()):
                continue
            node, data = self.graph.of(call.output), self.graph.of(call.input)
            if node is not None and data is not None and node != data:
                self.graph.add_opaque(node, call.path, data)

    def _read_by(self) -> tuple[tuple[str, str, str], ...]:
        """Parameters that entered the graph outside of any call of the modules that hold them."""
        spans: dict[str, list[tuple[int, int]]] = {}
        for call in self.trace.calls:
            spans.setdefault(call.path, []).append((call.start, call.end))
        found: dict[tuple[str, str, str], None] = {}
        for number, weight in self.graph.reads():
            owners = self.owners.get(weight, ())
            own = [span for path, _ in owners for span in spans.get(path, ())]
            if not any(start <= number < end for start, end in own):
                reader = self.taps.owner(number, number)
                found |= dict.fromkeys((path, name, reader) for path, name in owners)
        return tuple(found)

    # -- targets ----------------------------------------------------------------------------------

    def host(self, gemm: int) -> tuple[str, str] | None:
        """Module and parameter of a gemm; of tied ones the module that ran it."""
        weight = self.graph.gemms[gemm].weight
        if isinstance(weight, str):
            return weight, "weight"
        owners = self.owners.get(weight, [])
        if len(owners) > 1:
            number = self.graph.sequence[gemm]
            running = {call.path for call in self.trace.calls if call.start <= number < call.end}
            owners = [owner for owner in owners if owner[0] in running] or owners
        return owners[0] if owners else None

    def _targets(self) -> tuple[list[Target], list[Target]]:
        targets: list[Target] = []
        unresolved: list[Target] = []
        for use in self.uses.values():
            host = self.host(next(iter(use.roles.values()))[0])
            if host is None:
                continue
            rows = self._rows(use)
            for role in use.roles:
                target = Target(*host, role=role, cross=use.cross, rows=None if rows is None else rows[role])
                (unresolved if rows is None else targets).append(target)
        return targets, unresolved

    def _rows(self, use: Use) -> dict[Role, Rows | None] | None:
        """Rows of every role; ``None`` for all of them, and for the whole dictionary if they are unknown."""
        if len(use.roles) == 1:
            return dict.fromkeys(use.roles)
        found: dict[Role, Rows | None] = {}
        for role, (gemm, edge) in use.roles.items():
            rows = rows_feeding(self.graph, edge, gemm) if edge is not None else use.rows.get(role)
            if not rows:
                return None
            found[role] = rows
        features = max(stop for rows in found.values() for _, stop in rows or ())
        whole = all(rows == ((0, features),) for rows in found.values())
        return dict.fromkeys(found) if whole else found

    # -- sites and attention ----------------------------------------------------------------------

    def _sites(self) -> tuple[Site, ...]:
        pairs = build_sites(self.graph, self.taps, self.additions, self.softmaxes, self.downs)
        return tuple(dict.fromkeys(site for _, site in pairs))

    def _attention(self) -> tuple[AttentionCore, ...]:
        found: list[AttentionCore] = []
        sequence = self.graph.sequence
        for softmax in self.softmaxes:
            owner = self.taps.owner(sequence[softmax.first], sequence[softmax.last])
            found.append(self._core(owner, softmax))
        return with_routes(found, self.seen)

    def _core(self, owner: str, softmax: Softmax) -> AttentionCore:
        key_dim = self.graph.shape(softmax.q)[-1]
        value_dim = self.graph.shape(softmax.v)[-1]
        fed, shape = self._fed(softmax.k), self.graph.shape(softmax.k)
        heads = fed // max(key_dim, 1)
        if not heads or heads * key_dim != fed:
            heads = shape[1] if len(shape) == 4 else 0
        return AttentionCore(owner, softmax.cross, heads, key_dim, value_dim)

    def _fed(self, edge: Edge) -> int:
        """Number of features that feed an operand, 0 if several projections do or it cannot be told."""
        stop = frozenset(addition.add for addition in self.additions)
        gemms = self.graph.gemms_above([edge.node], stop)
        if len(gemms) != 1:
            return 0
        rows = rows_feeding(self.graph, edge, gemms[0])
        if rows is not None:
            return count(rows)
        use = self.uses.get(self.graph.gemms[gemms[0]].weight)
        alone = use is not None and len(use.roles) == 1
        return self.graph.features(gemms[0]) if alone else 0


def _owners(model: nn.Module) -> dict[int | str, list[tuple[str, str]]]:
    """``id(parameter)`` -> the modules (first names) and the names under which they hold it."""
    owners: dict[int | str, list[tuple[str, str]]] = {}
    for path, module in named_places(model).items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((path, name))
    return owners


def _in_module_order(model: nn.Module, targets: Sequence[Target]) -> tuple[Target, ...]:
    """Targets without repetition, ordered by module, parameter and role."""
    place: dict[tuple[str, str], int] = {}
    for path, module in named_places(model).items():
        for name in (*module._parameters, *module._buffers, "weight"):
            place.setdefault((path, name), len(place))
    last = len(place)

    def key(target: Target) -> tuple[int, int]:
        role = _ORDER.index(target.role) if target.role is not None else -1
        return place.get((target.module, target.parameter), last), role

    return tuple(sorted(dict.fromkeys(targets), key=key))


def _input_embedding(model: nn.Module) -> str | None:
    """Path of the module that ``get_input_embeddings`` of the model or of its first part that has it returns."""
    paths = {module: path for path, module in named_places(model).items()}
    for module in model.modules():
        getter = getattr(module, "get_input_embeddings", None)
        if callable(getter):
            try:
                found = paths.get(getter())
            except Exception:  # models without ids raise all kinds of errors here
                found = None
            if found is not None and isinstance(named_places(model)[found], nn.Embedding):
                return found
    return None


def _only_embedding(model: nn.Module) -> str | None:
    """Path of the ``nn.Embedding`` of a model that has exactly one."""
    paths = [path for path, module in named_places(model).items() if isinstance(module, nn.Embedding)]
    return paths[0] if len(paths) == 1 else None


def _static_consumer(model: nn.Module, embedding: str | None) -> str | None:
    """Innermost module around ``embedding`` whose forward has ``input_ids`` and ``attention_mask``."""
    if embedding is None:
        return None
    parts, modules = embedding.split("."), named_places(model)
    for length in range(len(parts) - 1, -1, -1):
        path = ".".join(parts[:length])
        if path in modules and accepts_mask(modules[path]):
            return path
    return None
