"""Every delta that is in the model should get a gradient: which did not, at the first step and over the first epoch."""

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_pet.errors import DeadSiteError
from lightning_pet.insertion.commit import required_gradients
from lightning_pet.model.naming import CHILD, canonical, is_inside, join
from lightning_pet.strategies.parameter_groups import shown, trainable_of
from lightning_pet.targets.heads import HEAD
from lightning_pet.training.run import Run

_REASONS = (
    "Their hosts did not run, or the graph is cut above them (torch.no_grad, or reentrant gradient checkpointing "
    "without an input that requires grad: use use_reentrant=False)"
)


class Firing:
    """Looks for deltas without a gradient during one fit.

    A part of the model may rest for a while (an expert, a tower, a layer that is dropped), so a silent delta is an
    error only if no other fires. Where all have fired, nothing is looked at any more.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.new_run()

    def new_run(self) -> None:
        """Forget the last fit."""
        self._seen: set[int] = set()
        self._idle: dict[str, nn.Parameter] = {}
        self._fired = False

    def look(self, optimizer: Any) -> None:
        """Before a step of an optimizer.

        Raises:
            DeadSiteError: if no delta has a gradient, and no optimizer that holds others has yet to make a step.
        """
        if id(optimizer) not in self._seen:
            self._first(optimizer)
        elif self._idle:
            silent = self._run.adapter.still_silent(self._idle)
            self._idle = {name: p for name, p in self._idle.items() if name in silent}

    def _first(self, optimizer: Any) -> None:
        self._seen.add(id(optimizer))
        adapter, wanted = self._run.adapter, self._deltas()
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        own = {name: p for name, p in wanted.items() if id(p) in held} or (wanted if adapter.repacks else {})
        self._warn_unused_heads(optimizer)
        silent = set(adapter.without_gradient(own, optimizer)) if own else set()
        self._fired |= len(silent) < len(own)
        self._idle |= {name: own[name] for name in sorted(silent)}
        if not self._idle or self._others_wait(wanted):
            return
        if not self._fired:
            raise DeadSiteError(
                f"no delta received a gradient in the first step: {shown(self._places())}. {_REASONS}. Exclude these "
                "hosts with exclude_modules, or apply the delta where the model runs."
            )
        rank_zero_warn(
            f"{len(self._places())} deltas received no gradient in the first step: {shown(self._places())}. "
            f"{_REASONS}. A part that is used now and then trains when it is; the end of the epoch tells which never "
            "were. Under DDP such parts need strategy='ddp_find_unused_parameters_true'."
        )

    def _warn_unused_heads(self, optimizer: Any) -> None:
        """A head that was found by itself may be none of those that the loss is computed with."""
        root, adapter = self._run.adapted.root, self._run.adapter
        places = {
            target.module for a in self._run.adapted.record.applied for target in a.targets if target.role == HEAD
        }
        for path in sorted(join(self._run.root_path, place) for place in places):
            own = {name: p for name, p in trainable_of(self._run.module).items() if is_inside(name, path)}
            if own and len(adapter.without_gradient(own, optimizer)) == len(own):
                rank_zero_warn(
                    f"{path} of {type(root).__name__} was taken for a head, but the loss does not reach it. If the "
                    "model ends otherwise, leave it out with modules_to_save=[]."
                )

    def _deltas(self) -> dict[str, nn.Parameter]:
        # By name, not by requires_grad: toggle_optimizer takes that from what another optimizer holds.
        record, path = self._run.adapted.record, self._run.root_path
        required = required_gradients(self._run.adapted.root) & set(record.trainable_names)
        names = {join(path, name) for name in required}
        return {n: p for name, p in self._run.module.named_parameters() if (n := canonical(name)) in names}

    def _others_wait(self, wanted: dict[str, nn.Parameter]) -> bool:
        own = {id(p) for p in wanted.values()}
        for optimizer in self._run.adapter.optimizers():
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if id(optimizer) not in self._seen and held & own:
                return True
        return False

    def _places(self) -> list[str]:
        return list(dict.fromkeys(name.partition(f".{CHILD}.")[0] for name in self._idle))

    def report(self, when: str) -> None:
        """Say which never fired, and look no more.

        Args:
            when: e.g. ``"in epoch 0"``.
        """
        if not self._idle:
            return
        silent = self._run.adapter.everywhere(set(self._idle))
        self._idle = {name: p for name, p in self._idle.items() if name in silent}
        if self._idle:
            rank_zero_warn(
                f"{len(self._places())} deltas never received a gradient {when}: {shown(self._places())}. They are as "
                f"they were at the start. {_REASONS}. If the model does not use these hosts, exclude_modules leaves "
                "them out."
            )
        self._idle = {}
