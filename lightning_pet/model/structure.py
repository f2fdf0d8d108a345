"""What is known about a model: which projection plays which role, and where the residual stream is.

Plain frozen data, JSON-able through :func:`dataclasses.asdict`. :mod:`lightning_pet.probe.probe`
and :mod:`lightning_pet.model.named_roles` produce it; target resolution and the methods read it.
Paths are dotted module names from the adapted root; the root itself is ``""``.
"""

from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Literal

from lightning_pet.model.naming import canonical, delta_prefix, join, module_at

if TYPE_CHECKING:  # to read what a file says of places takes no torch
    from torch import nn

Rows = tuple[tuple[int, int], ...]
"""Ranges of features of a fused projection, each from its first to behind its last."""

Role = Literal[
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.o",
    "attention.core",
    "attention.output",
    "attention.norm",
    "ffn.up",
    "ffn.gate",
    "ffn.down",
    "ffn.output",
    "ffn.norm",
    "mixer.output",
    "mixer.norm",
    "embedding",
    "head",
    "prompt.call",
    "prompt.rows",
    "prompt.guard",
    "prompt.memory",
    "prompt.generate",
    "edit.call",
    "edit.generate",
]
"""What a place does. ``output`` is f(x) of a residual sum (or the sum, where the module returns that), ``norm`` the
norm that reads the sum, ``core`` the softmax attention itself, and ``head`` an output layer that trains as it is;
``prompt`` places are those of virtual tokens (see :mod:`lightning_pet.insertion.prompt_places`), ``edit`` places those
around edits of single positions (:mod:`lightning_pet.insertion.edits`); the others are projections, and the token
embedding."""
SiteKind = Literal["attention", "cross", "ffn", "mixer"]
Route = Literal["", "interface", "functional"]
"""How a prefix gets into an attention: transformers' table of attention functions, torch's own, or not at all."""


@dataclass(frozen=True, order=True)
class Target:
    """A place for a delta: one parameter of one module, some of its output rows, or a module as a whole.

    Attributes:
        module: path of the host module.
        parameter: name of the parameter inside the host; ``""`` for the module itself (its call).
        role: what the place does; ``None`` where unknown or irrelevant.
        cross: the place belongs to cross-attention.
        rows: half-open ranges of *output features* in a fused projection (``((0, 768),)`` for q in
            GPT-2's ``c_attn``); ``None`` means all of them.
        reads: path of the module whose input the delta reads; for a delta on a weight, of the module that
            reads that weight; ``None``: the host's own.
        sizes: sizes at the place that no weight of the host tells, such as the width of the stream.
    """

    module: str
    parameter: str = "weight"
    role: Role | None = None
    cross: bool = False
    rows: tuple[tuple[int, int], ...] | None = None
    reads: str | None = None
    sizes: tuple[int, ...] = ()

    @property
    def path(self) -> str:
        """Full dotted name of the parameter, or of the module where the place is the module itself."""
        return ".".join(part for part in (self.module, self.parameter) if part)


@dataclass(frozen=True)
class Site:
    """One residual addition ``s = x + f(x)``.

    Attributes:
        kind: which sub-layer ``f`` is; ``mixer`` mixes positions without softmax (Mamba, convolution).
        branch: modules whose output is f(x), innermost first; the last is nearest the addition.
        inputs: modules whose input is x (in a pre-norm model: the norm).
        after_norm: norms that read s (post-norm models).
        after_out: modules whose output is s (pre-norm models: the block).
        width: features of the residual stream at this site.
        channels_first: no branch module returns the features as its last dimension (convolutional blocks).
    """

    kind: SiteKind
    branch: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    after_norm: tuple[str, ...] = ()
    after_out: tuple[str, ...] = ()
    width: int = 0
    channels_first: bool = False


@dataclass(frozen=True)
class AttentionCore:
    """One softmax attention: its owner module and the shapes of its keys and values.

    Attributes:
        owner: the module whose forward computes softmax(q kᵀ) v.
        cross: keys and values come from another sequence than the queries.
        kv_heads: key/value heads (may be fewer than query heads).
        key_dim: features of one key head.
        value_dim: features of one value head.
        route: how a prefix gets there.
        scale: factor of the scores, where the owner forms them by a product of its own.
        axis: which dimension of those scores are the heads, where there is one of windows, too.
        drifts: a bias shifts all scores with the number of keys, which softmax forgives and a prefix does not.
    """

    owner: str
    cross: bool = False
    kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    route: Route = ""
    scale: float | None = None
    axis: int = 1
    drifts: bool = False


@dataclass(frozen=True)
class Output:
    """A layer behind which a forward applied no other weight.

    Attributes:
        module: path of the layer.
        fed_by: paths of the modules that its input was computed by.
    """

    module: str
    fed_by: frozenset[str]


@dataclass(frozen=True)
class Structure:
    """All that was found out about one model.

    Attributes:
        targets: every projection with a role, in module order; fused projections appear once per
            role with their ``rows``.
        sites: residual additions, in execution order.
        attention: attention cores, in execution order.
        embedding: path of the token embedding, if any.
        consumer: innermost module above the embedding that takes ids and an attention mask.
        called: modules that ran in the probing forward; ``None`` if no forward was run.
        read_by: (module, parameter, reader): parameters that were read outside of any call of their module, and the
            innermost call in which they were.
        source: ``"probe"`` if a forward was read, ``"names"`` if only module names were.
        disagreements: human-readable differences between probe and names.
        unresolved: fused projections of which it is known that they hold a role, but not in which rows.
        weighing: layers with one output that weighs other features (the gate of a shared expert).
        prefix: path of this model in what the user handed over; names in target patterns may start with it.
        failure: why the forward that was given could not be read; ``""`` if it was, or none was given.
        outputs: output layers, where a forward was read of a model that does not describe itself.
        of_loss: that forward went on to the loss, so that layers of the loss may be among them.
    """

    targets: tuple[Target, ...] = ()
    sites: tuple[Site, ...] = ()
    attention: tuple[AttentionCore, ...] = ()
    embedding: str | None = None
    consumer: str | None = None
    called: frozenset[str] | None = None
    read_by: tuple[tuple[str, str, str], ...] = ()
    source: Literal["probe", "names"] = "names"
    disagreements: tuple[str, ...] = field(default=())
    unresolved: tuple[Target, ...] = ()
    weighing: frozenset[str] = frozenset()
    prefix: str = ""
    failure: str = ""
    outputs: tuple[Output, ...] = ()
    of_loss: bool = False

    def reader(self, module: str, parameter: str) -> str | None:
        """The innermost call around all that read a parameter without calling its module; ``None``: nobody did."""
        readers = [reader for path, name, reader in self.read_by if (path, name) == (module, parameter)]
        if not readers:
            return None
        levels = zip(*(reader.split(".") for reader in readers), strict=False)
        common = ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels))
        while common and common not in (self.called or ()):
            common = common.rpartition(".")[0]
        return common

    def within(self, scope: str) -> "Structure":
        """The part of the model below one submodule, with paths from that submodule."""
        if not scope:
            return self
        prefix = f"{scope}."

        def strip(path: str) -> str:
            return path.removeprefix(prefix)

        def strips(paths: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(strip(p) for p in paths if p.startswith(prefix))

        return replace(
            self,
            prefix=f"{self.prefix}.{scope}".lstrip("."),
            targets=tuple(replace(t, module=strip(t.module)) for t in self.targets if t.module.startswith(prefix)),
            unresolved=tuple(
                replace(t, module=strip(t.module)) for t in self.unresolved if t.module.startswith(prefix)
            ),
            sites=tuple(
                replace(
                    site,
                    branch=strips(site.branch),
                    inputs=strips(site.inputs),
                    after_norm=strips(site.after_norm),
                    after_out=strips(site.after_out),
                )
                for site in self.sites
                if any(p.startswith(prefix) for p in site.branch)
            ),
            attention=tuple(replace(a, owner=strip(a.owner)) for a in self.attention if a.owner.startswith(prefix)),
            embedding=strip(self.embedding) if self.embedding and self.embedding.startswith(prefix) else None,
            consumer=strip(self.consumer) if self.consumer and self.consumer.startswith(prefix) else None,
            weighing=frozenset(strips(tuple(self.weighing))),
            called=frozenset(strips(tuple(self.called))) if self.called is not None else None,
            read_by=tuple(
                (strip(path), name, strip(reader) if reader != scope else "")
                for path, name, reader in self.read_by
                if path.startswith(prefix) and f"{reader}.".startswith(prefix)
            ),
            outputs=tuple(
                Output(strip(output.module), frozenset(strips(tuple(output.fed_by))))
                for output in self.outputs
                if output.module.startswith(prefix)
            ),
        )


def overlap(rows: Rows, other: Rows) -> bool:
    """The two sets of features have one in common."""
    return any(a < d and c < b for a, b in rows for c, d in other)


def is_shared(target: Target) -> bool:
    """The place of a shared delta: the root, without a role of its own."""
    return not target.path and target.role is None


def host_parameter(root: "nn.Module", target: Target) -> str:
    """Name of the base parameter that stands for a place: its own, else the nearest one around its module."""
    if target.parameter:
        return target.path
    path = target.module if target.reads is None else target.reads
    while True:
        names = (join(path, canonical(name)) for name, _ in module_at(root, path).named_parameters())
        name = next((name for name in names if not delta_prefix(name)), "")
        if name or not path:
            return name
        path = path.rpartition(".")[0]
