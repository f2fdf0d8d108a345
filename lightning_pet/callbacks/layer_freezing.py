"""Layer freezing and gradual unfreezing (Howard & Ruder 2018)."""

import math
import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_pet.arguments import is_whole, one_of, share, some, whole
from lightning_pet.callbacks.base import PETCallback
from lightning_pet.errors import ArgumentError, TargetError
from lightning_pet.insertion.commit import freeze
from lightning_pet.insertion.method import Insertion, key_of
from lightning_pet.model.adaptation import record_of
from lightning_pet.model.named_roles import Stack, is_norm, layer_stacks, names_of_base, norms_inside, outside
from lightning_pet.model.naming import canonical, named_modules, named_parameters
from lightning_pet.model.structure import Structure, Target
from lightning_pet.strategies.strategy import adapter_for
from lightning_pet.targets.heads import HEAD
from lightning_pet.targets.patterns import listed_if_given
from lightning_pet.targets.targets import suggest
from lightning_pet.training.controller import Controller

Norms = Literal["none", "final", "all"]
Interval = Literal["epoch", "step"]


class LayerFreezingCallback(PETCallback):
    """Train some layers as they are and freeze the rest.

    Below the lowest trained layer there is no backward work. Layers are found by themselves, in each
    stack (encoder, decoder) on its own; the head of a classification model trains as with every method.

    With ``unfreeze_every`` they start to train one after the other from the top (gradual unfreezing): at
    first the head and final norms (if there are any, else the top layer), and then one more layer of each
    stack after every so many epochs or steps; the embeddings come last. The optimizer holds all of them
    from the start and passes over those that are frozen, so a resumed run goes on exactly. Source: Howard &
    Ruder 2018 (ULMFiT).

    Args:
        train_last: how many layers at the top of each stack train; 0: none (only heads, norms, embeddings).
        train_layers: instead, which layers: indices (from the end if negative) and ranges such as
            ``"8-11"``, which includes both ends.
        stacks: only these stacks, by path or a part of it (``["decoder"]``); the others are frozen.
        embeddings: train all that is before the layers, too: embeddings with their norms.
        norms: norms that train, too: ``"final"`` (those outside of layers and embeddings: after them, in most
            models) or ``"all"``.
        unfreeze_every: epochs or optimizer steps after which one more layer of each stack trains;
            ``None``: all from the start. Not under ZeRO.
        unfreeze_interval: whether ``unfreeze_every`` counts epochs or optimizer steps.
        lr_decay: learning rate of each layer as a share of that above it (ULMFiT: 1 / 2.6); what trains first, heads
            and norms, has the optimizer's, and embeddings a share of the lowest layer's. 1: the same for all.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.base.PETCallback`.

    Raises:
        ArgumentError: if a number is out of range.

    Example:
        >>> import torch
        >>> from lightning_pet import LayerFreezingCallback, apply
        >>> net = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
        >>> apply(net, [LayerFreezingCallback(train_last=1)]).record.trained_names
        ('2.weight', '2.bias')
    """

    method: ClassVar[str] = "layer_freezing"
    in_place = True
    shards = True

    def __init__(
        self,
        train_last: int = 2,
        train_layers: list[int | str] | int | str | None = None,
        stacks: list[str] | str | None = None,
        embeddings: bool = False,
        norms: Norms = "none",
        unfreeze_every: int | None = None,
        unfreeze_interval: Interval = "epoch",
        lr_decay: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.train_last = train_last
        self.train_layers = [train_layers] if isinstance(train_layers, int | str) else train_layers
        self.stacks = listed_if_given(stacks)
        self.embeddings = embeddings
        self.norms = norms
        self.unfreeze_every = unfreeze_every
        self.unfreeze_interval = unfreeze_interval
        self.lr_decay = lr_decay
        self._unfrozen: int | None = None  # groups that train at the moment
        self._validate()

    def _validate(self) -> None:
        whole("train_last", self.train_last, 0, "a number of layers, 0 or more, e.g. 2.")
        for item in self.train_layers or ():
            if not is_whole(item) and not (isinstance(item, str) and re.fullmatch(r"\d+-\d+", item)):
                raise ArgumentError(f"train_layers: {item!r} is neither an index nor a range such as '8-11'.")
        some("train_layers", self.train_layers, "name at least one layer, or use train_last=0.")
        one_of("norms", self.norms, Norms)
        one_of("unfreeze_interval", self.unfreeze_interval, Interval)
        if self.unfreeze_every is not None:
            whole("unfreeze_every", self.unfreeze_every, wanted="a number of epochs or steps, 1 or more.")
        share("lr_decay", self.lr_decay, "a share above 0 and at most 1, e.g. 0.4.", kind=int | float)

    # --- what trains ------------------------------------------------------------------------------

    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        """Find the layers to train, then the norms and embeddings.

        Raises:
            TargetError: if the model has no numbered layers, or not the wanted ones.
        """
        stacks = layer_stacks(root, structure)
        if not stacks:
            raise TargetError(
                f"{type(root).__name__} has no numbered layers (no ModuleList or Sequential). Name the parts to train "
                "with modules_to_save and set train_last=0, or put its layers in a ModuleList."
            )
        layers = [layer for stack in self._chosen(stacks) for layer in self._wanted(stack)]
        targets = [Target(layer, "") for layer in layers]
        beside = outside(root, stacks, self.heads_within(root))
        norms = beside.norms if self.norms != "none" else ()
        if self.norms == "all":
            frozen = [layer for stack in stacks for layer in stack.layers if layer not in layers]
            modules = named_modules(root)
            before = (name for name in beside.embeddings if is_norm(modules[name.rpartition(".")[0]]))
            norms = (*norms, *norms_inside(root, frozen), *before)
        targets += [_parameter(name, "ffn.norm") for name in norms]
        targets += [
            _parameter(name, "embedding") for name in beside.embeddings if self.embeddings and name not in norms
        ]
        self._warn_large_share(root, targets, stacks)
        return tuple(targets)

    def _warn_large_share(self, root: nn.Module, targets: Sequence[Target], stacks: Sequence[Stack]) -> None:
        """The default suits deep models; a short stack would train nearly as a whole."""
        names = {name for target in targets for name in names_of_base(root, target.path)}
        numbers = {name: p.numel() for name, p in named_parameters(root)}
        share = sum(numbers[name] for name in names) / max(1, sum(numbers.values()))
        if self.train_layers is None and share > 0.5 and any(self.train_last >= len(s.layers) for s in stacks):
            rank_zero_warn(
                f"LayerFreezingCallback(train_last={self.train_last}) trains {share:.0%} of {type(root).__name__}, "
                f"whose stacks have {', '.join(str(len(s.layers)) for s in stacks)} layers. Lower train_last, or name "
                "layers with train_layers."
            )

    def _chosen(self, stacks: Sequence[Stack]) -> list[Stack]:
        if self.stacks is None:
            return list(stacks)
        for name in self.stacks:
            if not any(_names(name, stack) for stack in stacks):
                found = [stack.path for stack in stacks]
                shown = ", ".join(map(repr, found))
                raise TargetError(f"stacks: {name!r} is none of {shown}.{suggest(name, found)}")
        return [stack for stack in stacks if any(_names(name, stack) for name in self.stacks)]

    def _wanted(self, stack: Stack) -> list[str]:
        count = len(stack.layers)
        if self.train_layers is None:
            if self.train_last > count:
                raise TargetError(f"train_last={self.train_last}: {stack.path!r} has only {count} layers. Lower it.")
            return list(stack.layers[count - self.train_last :])
        wanted: set[int] = set()
        for item in self.train_layers:
            first, last = map(int, item.split("-")) if isinstance(item, str) else (item, item)
            found = range(first, last + 1) if first >= 0 else range(count + first, count + first + 1)
            if not found or found[0] < 0 or found[-1] >= count:
                raise TargetError(
                    f"train_layers: {item!r} is not in {stack.path!r}, which has the layers 0 to {count - 1}. "
                    "Change it, or choose other stacks."
                )
            wanted.update(found)
        return [stack.layers[index] for index in sorted(wanted)]

    def insertions(self, root: nn.Module, targets: Sequence[Target]) -> list[Insertion]:
        """Build nothing."""
        return []

    def trained(self, root: nn.Module, targets: Sequence[Target]) -> tuple[str, ...]:
        """Names of all parameters that train in the course of the run.

        Raises:
            TargetError: if there is none.
        """
        names = [name for group in self._groups(root, targets) for name in group]
        if not names:
            raise TargetError("train_last=0 and no head, norm or embedding trains: there is nothing left to train.")
        return tuple(dict.fromkeys(names))

    def _groups(self, root: nn.Module, targets: Sequence[Target]) -> list[tuple[str, ...]]:
        """Parameters in the order in which they start to train."""
        first = [
            *self.head_parameters(root, targets),
            *(target.path for target in targets if target.role == "ffn.norm"),
        ]
        stacks: dict[str, list[Target]] = {}
        for target in targets:
            if not target.parameter and target.role != HEAD:
                stacks.setdefault(target.module.rpartition(".")[0], []).insert(0, target)
        depth = max((len(stack) for stack in stacks.values()), default=0)
        layers = []
        for i in range(depth):
            level = [stack[i].module for stack in stacks.values() if i < len(stack)]
            layers.append(tuple(name for path in level for name in names_of_base(root, path)))
        last = tuple(target.path for target in targets if target.role == "embedding")
        return [group for group in (tuple(first), *layers, last) if group]

    def lr_ratios(self, delta_names: Sequence[str]) -> dict[str, float]:
        """``lr_decay`` for every group that a parameter is below the first."""
        if self.lr_decay == 1:
            return {}
        ratios: dict[str, float] = {}
        for turn, group in enumerate(self._groups(*self._applied(self.adapted.root))):
            for name in group:
                ratios.setdefault(name, self.lr_decay**turn)
        return ratios

    @property
    def not_for_tasks(self) -> str | None:
        """Layers that begin later, or train slower, are those of one run."""
        if self.unfreeze_every is None and self.lr_decay == 1:
            return None
        return "unfreeze_every and lr_decay are told from layer to layer of one delta. Leave them out."

    # --- gradual unfreezing -----------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse engines that move parameters which do not train yet."""
        if self.unfreeze_every is not None and stage == "fit":
            adapter_for(trainer).require_passing_over(f"{type(self).__name__}(unfreeze_every={self.unfreeze_every})")
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a run that ends before the last layer starts to train."""
        super().on_train_start(trainer, pl_module)
        self._unfrozen = None
        if self.unfreeze_every is not None:
            groups = self._groups(*self._applied(Controller.get(trainer).adapted.root))
            self._begin_steps(trainer)
            steps = self._steps.total(trainer)
            check_long_enough(trainer, self.unfreeze_every, self.unfreeze_interval, len(groups), steps)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the next layer train, if it is time."""
        super().on_train_epoch_start(trainer, pl_module)
        self._unfreeze(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the next layer train, if it is time."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._unfreeze(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the model as the plan says: all trained layers require a gradient."""
        super().on_train_end(trainer, pl_module)
        if self.unfreeze_every is not None:
            freeze(Controller.get(trainer).adapted.root)

    def _applied(self, root: nn.Module) -> tuple[nn.Module, tuple[Target, ...]]:
        record = record_of(root)
        applied = record.applied if record else ()
        return root, next(item.targets for item in applied if item.key == key_of(self))

    def _unfreeze(self, trainer: pl.Trainer) -> None:
        if self.unfreeze_every is None:
            return
        # From the counters alone, which a checkpoint restores.
        elapsed = trainer.current_epoch if self.unfreeze_interval == "epoch" else self._steps.made(trainer)
        unfrozen = 1 + elapsed // self.unfreeze_every
        if unfrozen == self._unfrozen:
            return
        self._unfrozen = unfrozen
        root, targets = self._applied(Controller.get(trainer).adapted.root)
        groups = self._groups(root, targets)
        planned = set(Controller.get(trainer).adapted.record.planned_names)  # what the user froze is not among them
        waiting = {name: turn >= unfrozen for turn, group in enumerate(groups) for name in group if name in planned}
        for applied in Controller.get(trainer).adapted.record.applied:
            if applied.key != key_of(self):  # what another method trains, trains from the start
                waiting |= dict.fromkeys(waiting.keys() & applied.trained, False)
        for name, parameter in root.named_parameters(remove_duplicate=False):
            if canonical(name) in waiting:
                parameter.requires_grad_(not waiting[canonical(name)])
        Controller.get(trainer).adapter.wrap_again()

    def state_dict(self) -> dict[str, Any]:
        """Steps of the own optimizer, where a module steps several."""
        return self._steps.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over."""
        self._steps.load(state_dict)


def _names(name: str, stack: Stack) -> bool:
    return f".{name}." in f".{stack.path}." or name == stack.path


def _parameter(name: str, role: Any) -> Target:
    module, _, parameter = name.rpartition(".")
    return Target(module, parameter, role)


def check_long_enough(trainer: pl.Trainer, every: int, interval: str, groups: int, steps: float) -> None:
    """The last group must get to train, if the length of the run is known.

    Raises:
        ArgumentError: if the run ends before.
    """
    needed = every * (groups - 1)
    length = _length(trainer, interval, steps)
    if length <= needed:
        raise ArgumentError(
            f"unfreeze_every={every}: the last of {groups} groups of layers would start to train after {needed} "
            f"{interval}s, but the run ends after {length:g}. Train longer, unfreeze more often, or train fewer layers."
        )


def _length(trainer: pl.Trainer, interval: str, steps: float) -> float:
    """Length of the run as far as it is known beforehand; a stop for another reason is not."""
    steps = math.inf if steps < 0 else steps  # a stream of unknown length, without max_steps
    if interval == "step":
        return steps
    epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
    per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
    known = math.isfinite(steps) and math.isfinite(per_epoch) and per_epoch > 0
    return min(epochs, math.ceil(steps / per_epoch)) if known else epochs
