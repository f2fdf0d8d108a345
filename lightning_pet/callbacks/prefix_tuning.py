"""Prefix tuning (Li and Liang 2021)."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_pet.arguments import one_of, whole
from lightning_pet.attention.prefix import AttentionPrefix, GatedPrefix, PrefixSite, site_target
from lightning_pet.callbacks.base import PETCallback
from lightning_pet.errors import ArgumentError, TargetError
from lightning_pet.insertion.method import Insertion
from lightning_pet.layers.delta import Delta, options_beside
from lightning_pet.layers.prefix import PrefixNetwork
from lightning_pet.model.named_roles import layer_index
from lightning_pet.model.naming import module_at, named_modules
from lightning_pet.model.structure import AttentionCore, Structure, Target
from lightning_pet.model.tokens import common_ids, load_tokenizer, text_ids, unknown_rows
from lightning_pet.probe.word_activations import word_activations
from lightning_pet.targets.patterns import listed_if_given, listed_layers, name_matcher, names_from_above

Init = Literal["random", "vocabulary", "text"]
Attention = Literal["self", "cross", "both"]
Where = Literal["encoder", "decoder", "both"]


class PrefixTuningCallback(PETCallback):
    r"""Prefix tuning: every attention gets l trained keys and values in front of its own.

    .. math:: \mathrm{head}(x) = \mathrm{softmax}(x W_q [P_k; C W_k]^\top)\,[P_v; C W_v]

    The prefix is seen by every position, under every mask; it enters no cache and moves no position. While it
    trains, it is the output of a small network, :math:`P = B \tanh(A P' + a) + b`, one per stack of layers and kind
    of attention; in inference it is folded to keys and values. A fresh prefix changes the output of the model.
    Sources: Li and Liang 2021; He et al. 2022 for the view as a gated addition.

    Args:
        length: positions of the prefix, l.
        projection: train it through the network; otherwise the keys and values themselves.
        projection_size: hidden features of the network, m.
        init: ``"random"``; or the keys and values that words have in this model: ``"vocabulary"`` (a random sample
            of its common tokens) or ``"text"``. The paper advises words when data is scarce.
        init_text: the words of ``init="text"``; repeated or cut to ``length`` tokens.
        tokenizer: name or folder of the tokenizer for them; with ``"vocabulary"`` it leaves out tokens that are no
            text. ``None`` there: the one beside the model's weights.
        attention: which attentions: ``"self"``, ``"cross"`` or ``"both"``.
        where: in an encoder-decoder model: ``"encoder"``, ``"decoder"`` or ``"both"``.
        layers_to_transform: only these layer indices.
        use_gating: multiply each prefix by a trained gate, one number per example (UniPELT); for attentions of
            transformers.
        exclude_modules: attentions to leave out, by their name or that of a module around them: suffixes, globs, or
            ``re:…``.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.base.PETCallback`.

    Raises:
        ArgumentError: if a number is out of range, or an option misses another that it needs.

    Example:
        >>> from lightning_pet import PrefixTuningCallback
        >>> PrefixTuningCallback(init="text", init_text="summarize")
        Traceback (most recent call last):
        lightning_pet.errors.ArgumentError: init='text' needs a tokenizer: pass tokenizer='<name or folder>'.
    """

    method: ClassVar[str] = "prefix_tuning"
    shards = True
    width: ClassVar[str | None] = "length"
    may_change: ClassVar[frozenset[str]] = PETCallback.may_change | {
        "init",
        "init_text",
        "tokenizer",
        "layers_to_transform",
        "exclude_modules",
    }

    def __init__(
        self,
        length: int = 30,
        projection: bool = True,
        projection_size: int = 512,
        init: Init = "random",
        init_text: str | None = None,
        tokenizer: str | None = None,
        attention: Attention = "both",
        where: Where = "both",
        use_gating: bool = False,
        layers_to_transform: list[int] | int | None = None,
        exclude_modules: list[str] | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.length = length
        self.projection = projection
        self.projection_size = projection_size
        self.init = init
        self.init_text = init_text
        self.tokenizer = tokenizer
        self.attention = attention
        self.where = where
        self.use_gating = use_gating
        self.layers_to_transform = listed_layers(layers_to_transform)
        self.exclude_modules = listed_if_given(exclude_modules)
        self._words: list[tuple[Tensor, Tensor]] | None = None
        self._validate()

    def _validate(self) -> None:
        whole("length", self.length)
        whole("projection_size", self.projection_size)
        one_of("init", self.init, Init)
        one_of("attention", self.attention, Attention)
        one_of("where", self.where, Where)
        if self.init == "text" and not self.init_text:
            raise ArgumentError("init='text' needs the words: pass init_text='...'.")
        if self.init == "text" and not self.tokenizer:
            raise ArgumentError("init='text' needs a tokenizer: pass tokenizer='<name or folder>'.")
        if self.init != "text" and self.init_text is not None:
            raise ArgumentError(f"init_text is given, but init={self.init!r} does not use it: set init='text'.")
        if self.init != "random" and self.budget is not None:
            raise ArgumentError(f"budget={self.budget} with init={self.init!r}: words need a length; give it instead.")
        if self.init != "random" and self.projection and self.projection_size < self.length:
            raise ArgumentError(
                f"projection_size={self.projection_size} with init={self.init!r}: the network can give the words' keys "
                f"and values only if it has at least length={self.length} hidden features. Raise it, or set "
                "projection=False."
            )

    # --- where -----------------------------------------------------------------------------------

    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        """Find the attentions, and what words would be in them if the prefix starts from words.

        Raises:
            TargetError: if there is none, or a prefix cannot get into one of them.
        """
        cores = self._chosen(root, structure)
        for core in cores:
            if not core.route:
                raise TargetError(
                    f"prefix tuning: {core.owner!r} ({type(module_at(root, core.owner)).__name__}) computes its "
                    "attention in a way that a prefix cannot join. Leave it out by "
                    f"exclude_modules=[{core.owner.rpartition('.')[2]!r}], or choose adapters or LoRA."
                )
            if core.drifts:
                kind = type(named_modules(root)[core.owner]).__name__
                raise TargetError(
                    f"prefix tuning: {core.owner!r} ({kind}) adds biases that are counted from the last key, so that "
                    "the weight of a prefix would change with every further token, for earlier positions too. Use "
                    "prompt tuning, adapters or LoRA on this model."
                )
        widths = {group: _width(structure, cores, group) for group in map(_group, cores)}
        if self.init != "random":
            self._words = self._activations(root, structure, cores)
        return tuple(site_target(core, widths[_group(core)]) for core in cores)

    def _chosen(self, root: nn.Module, structure: Structure) -> list[AttentionCore]:
        name = type(root).__name__
        if not structure.attention:
            how = "" if structure.source == "probe" else " No forward could be run; pass forward= or a batch."
            raise TargetError(
                f"prefix tuning: no softmax attention was found in {name}, so there is nothing that could see a "
                f"prefix.{how} Recurrent, convolutional and state-space models have none; use adapters or LoRA."
            )
        decoders = {_stack(core.owner) for core in structure.attention if core.cross}
        if self.where != "both" and not decoders:
            raise TargetError(f"where={self.where!r}: {name} has no cross-attention; leave where='both'.")
        chosen = [
            core
            for core in structure.attention
            if (self.attention == "both" or core.cross is (self.attention == "cross"))
            and (self.where == "both" or (_stack(core.owner) in decoders) is (self.where == "decoder"))
        ]
        chosen = self._in_layers(self._not_excluded(chosen, structure.prefix))
        if not chosen:
            raise TargetError(
                f"prefix tuning: no attention of {name} is left with attention={self.attention!r}, "
                f"where={self.where!r}, layers_to_transform={self.layers_to_transform} and "
                f"exclude_modules={self.exclude_modules}. Relax one of them."
            )
        owners = Counter(core.owner for core in chosen)
        if twice := [owner for owner, count in owners.items() if count > 1]:
            raise TargetError(f"prefix tuning: {twice[0]!r} is self- and cross-attention in one; exclude it.")
        return chosen

    def _not_excluded(self, cores: list[AttentionCore], prefix: str) -> list[AttentionCore]:
        around = {core.owner: names_from_above(core.owner, prefix) for core in cores}
        dropped: set[str] = set()
        for pattern in self.exclude_modules or ():
            hits = {owner for owner, names in around.items() if any(map(name_matcher(pattern), names))}
            dropped |= hits
            if not hits:
                raise TargetError(
                    f"exclude_modules: {pattern!r} hits none of the attentions {_some(core.owner for core in cores)}."
                )
        return [core for core in cores if core.owner not in dropped]

    def _in_layers(self, cores: list[AttentionCore]) -> list[AttentionCore]:
        if self.layers_to_transform is None:
            return cores
        present = {index for core in cores if (index := layer_index(core.owner)) is not None}
        if unknown := sorted(set(self.layers_to_transform) - present):
            raise TargetError(
                f"layers_to_transform={self.layers_to_transform}: there is no attention in layer {unknown[0]}; "
                f"there is in {sorted(present)}."
            )
        return [core for core in cores if layer_index(core.owner) in self.layers_to_transform]

    # --- what ------------------------------------------------------------------------------------

    def insertions(self, root: nn.Module, targets: Sequence[Target]) -> list[Insertion]:
        """Build a prefix per attention, and a network per stack of layers and kind of attention."""
        networks: dict[tuple[str, bool], Insertion] = {}
        sites: list[Insertion] = []
        for target in targets:
            group = (_stack(target.module), target.cross)
            if self.projection and group not in networks:
                made = self._network(root, target)
                networks[group] = Insertion(Target("", ""), made, f"network{len(networks)}")
            network = networks[group].delta if self.projection else None
            sites.append(Insertion(target, self._prefix(root, target, network)))
        words, self._words = self._words, None
        for insertion, (key, value) in zip(sites, words or (), strict=words is not None):
            assert isinstance(insertion.delta, AttentionPrefix)
            insertion.delta.set_key_value(key, value)
        return [*networks.values(), *sites]

    def build(self, root: nn.Module, target: Target) -> Delta:
        """Build the prefix of one attention, without a network."""
        return self._prefix(root, target, None)

    def _prefix(self, root: nn.Module, target: Target, network: Delta | None) -> AttentionPrefix:
        site = PrefixSite.read(target.sizes)
        if self.use_gating and site.route != "interface":
            raise TargetError(
                f"prefix tuning: use_gating=True gives every example a prefix of its own, which {target.module!r} "
                f"({type(module_at(root, target.module)).__name__}) cannot take: it calls torch's functions itself. "
                "Exclude it with exclude_modules, or set use_gating=False."
            )
        kind = GatedPrefix if self.use_gating else AttentionPrefix
        return kind(site, self.length, network=network, **_factory(root, target))

    def _network(self, root: nn.Module, target: Target) -> PrefixNetwork:
        width = PrefixSite.read(target.sizes).width
        return PrefixNetwork(self.length, width, self.projection_size, **_factory(root, target))

    # --- words -----------------------------------------------------------------------------------

    def _activations(
        self, root: nn.Module, structure: Structure, cores: Sequence[AttentionCore]
    ) -> list[tuple[Tensor, Tensor]]:
        found = word_activations(root, structure.consumer, self._ids(root, structure))
        words = []
        for core in cores:
            key, value = found.get(core.owner, (torch.empty(0), torch.empty(0)))
            shapes = [(core.kv_heads, self.length, dim) for dim in (core.key_dim, core.value_dim)]
            if [tuple(key.shape), tuple(value.shape)] != shapes:
                raise TargetError(
                    f"init={self.init!r}: {core.owner!r} has no keys and values of {self.length} words "
                    f"({tuple(key.shape)} instead of {shapes[0]}). Use init='random', or leave it out."
                )
            words.append((key, value))
        return words

    def _ids(self, root: nn.Module, structure: Structure) -> Tensor:
        if self.init == "vocabulary":
            table = named_modules(root).get(structure.embedding or "") if structure.embedding is not None else None
            if not isinstance(table, nn.Embedding) or table.num_embeddings < self.length:
                raise TargetError(
                    f"init='vocabulary': {type(root).__name__} has no table of at least {self.length} tokens. "
                    "Use init='random'."
                )
            words = None if self.tokenizer is None else load_tokenizer(self.tokenizer, "init='vocabulary'")
            sample, known = common_ids(self.length, table.num_embeddings, getattr(root, "config", None), words)
            if not known:
                rank_zero_warn(unknown_rows(table.num_embeddings))
            return torch.tensor(sample)
        ids = text_ids(load_tokenizer(self.tokenizer, "init='text'"), self.init_text or "")
        return torch.tensor((ids * (self.length // len(ids) + 1))[: self.length])


def _stack(owner: str) -> str:
    """The stack of layers of a module: its path before the first number."""
    parts = owner.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[:first])


def _group(core: AttentionCore) -> tuple[str, bool]:
    return _stack(core.owner), core.cross


def _width(structure: Structure, cores: Sequence[AttentionCore], group: tuple[str, bool]) -> int:
    """Features of the residual stream around a group; where no residual sum was seen, those of its keys."""
    stack = group[0]
    widths = Counter(
        site.width for site in structure.sites if site.width and any(_stack(path) == stack for path in site.branch)
    )
    if widths:
        return widths.most_common(1)[0][0]
    return max(core.kv_heads * core.key_dim for core in cores if _group(core) == group)


def _factory(root: nn.Module, target: Target) -> dict[str, Any]:
    """Where, and in which type, to make parameters."""
    host = module_at(root, target.module)
    parameter = next((p for p in (*host.parameters(), *root.parameters()) if p.is_floating_point()), torch.empty(0))
    return options_beside(parameter)


def _some(names: Any) -> str:
    listed = list(names)
    return ", ".join(map(repr, listed[:4])) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")
