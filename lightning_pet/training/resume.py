"""Exact resume: an interrupted run continues with the numbers of the uninterrupted one, bit for bit.

A checkpoint of Lightning holds weights, optimizers and counters. What is missing for an exact resume in
the middle of an epoch is the random state, three times over, and care with the restart:

* before the epoch's ``iter(loader)`` (samplers and workers draw their seeds there), after it, just before
  the first ``next`` (a lazy sampler draws its seed there), and at the save;
* the loader is rewound: iterator made under the first state, the batches already used taken under the
  second and dropped, then the third state is set;
* what Lightning leaves out on a restart is done: the validation that was due after the batch of the
  save, the step of a ``ReduceLROnPlateau`` at the end of the epoch, and the end-of-epoch hooks after a
  save at the last batch (leaving these out also miscounts the epochs of a second interruption).

A run that differs from the one that was saved (other number of processes, other number of batches) is
continued and announced as not exact, in one warning with all reasons: fewer devices, or a smaller batch
after an out-of-memory error, are legitimate reasons to resume.

Not restored, because no checkpoint of Lightning holds them: running averages of metrics over the epoch,
and what the module's own ``on_train_batch_end`` would have done after the batch of the save.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from torch.utils.data import IterableDataset

from lightning_pet.errors import DeltaFileError
from lightning_pet.strategies import private

RandomState = dict[str, Any]
"""Tensors, ints, floats and lists only, so that ``torch.load(weights_only=True)`` reads it."""


def random_state(devices: Sequence[torch.device]) -> RandomState:
    """Return the state of torch (CPU and the given CUDA devices), ``random`` and NumPy."""
    version, words, gauss = random.getstate()
    name, key, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device) for device in devices],
        "python": [version, list(words), gauss],
        "numpy": [str(name), np.asarray(key).tolist(), int(position), int(has_gauss), float(cached)],
    }


def _set_random_state(state: RandomState, devices: Sequence[torch.device]) -> None:
    """Set what :func:`random_state` returned; devices beyond those saved keep their state."""
    torch.set_rng_state(state["torch"].cpu())
    for saved, device in zip(state["cuda"], devices, strict=False):
        torch.cuda.set_rng_state(saved.cpu(), device)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, key, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(key, dtype=np.uint32), position, has_gauss, cached))


def _cuda_devices(trainer: Trainer) -> list[torch.device]:
    """Return the CUDA devices in use by this process, its own first."""
    root = trainer.strategy.root_device
    held = {parameter.device for parameter in trainer.lightning_module.parameters()} | {root}
    return sorted((device for device in held if device.type == "cuda"), key=lambda d: (d != root, d.index or 0))


Position = Literal["batch_end", "validation_end", "between_batches", "epoch_end", "between_epochs", "inside"]
"""Where in the loop a checkpoint was written; ``inside`` a batch or a validation there is no exact way back."""

_BETWEEN_EPOCHS = ("epoch_end", "between_epochs")
_FIELDS = frozenset({"position", "epoch", "batches", "offset", "world_size", "loader", "seeds", "inexact", "ranks"})


class ExactResume:
    """Keeps the random states of a run and rewinds a resumed one to the batch of its checkpoint.

    Methods that carry the name of a callback hook are to be called from that hook, in ``fit`` runs
    only. :meth:`load_state` may come at any time between :meth:`setup` and the first epoch, or before.
    Costs nothing per batch, and two copies of the random state per epoch.
    """

    def __init__(self) -> None:
        self._before_iter: RandomState | None = None
        self._after_iter: RandomState | None = None
        self._offset = 0  # batches counted by Lightning that this epoch's iterator never gave
        self._pending: dict[str, Any] | None = None
        self._undo: list[Callable[[], None]] = []

    # ---- hooks -------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer) -> None:
        """Attach to the loops of this run; call before the strategy is set up."""
        self._detach()
        self._undo = [
            private.replace_method(
                trainer.strategy, "process_dataloader", lambda original, loader: self._loader(trainer, original, loader)
            ),
            private.before_run(trainer.fit_loop, lambda original: self._before_run(trainer, original)),
            private.at_epoch_run(
                trainer.fit_loop, lambda original, fetcher: self._epoch_run(trainer, original, fetcher)
            ),
        ]

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Set the random state of a checkpoint written between two epochs; call before other draws."""
        if self._pending and self._pending["position"] in _BETWEEN_EPOCHS:
            self._set(trainer, self._own(trainer), "now")

    def teardown(self, trainer: Trainer) -> None:
        """Detach from the loops; call from the hooks ``teardown`` and ``on_exception``."""
        self._detach()
        self._pending = None

    # ---- checkpoint --------------------------------------------------------------------------------

    def state(self, trainer: Trainer) -> dict[str, Any]:
        """Return what an exact resume needs; call on every rank while a checkpoint is dumped.

        Returns:
            Plain data that ``torch.load(weights_only=True)`` reads. ``ranks`` has one entry per process.
        """
        position, inexact = _position(trainer)
        own = {
            "now": self._random(trainer),
            "before_iter": self._before_iter,
            "after_iter": self._after_iter,
            "metrics": {
                name: value.detach().cpu()
                for name, value in trainer.callback_metrics.items()
                if isinstance(value, torch.Tensor)
            },
        }
        ranks = [own]
        # Inside a batch an error handler saves, perhaps on this rank only: waiting for the others would hang.
        if trainer.world_size > 1 and position != "inside":
            ranks = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(ranks, own)
        return {
            "position": position,
            "epoch": trainer.current_epoch,
            "batches": private.batch_counts(trainer).ready,
            "offset": self._offset,
            "world_size": trainer.world_size,
            "loader": _layout(trainer),
            "seeds": [-1 if sampler is None else sampler.seed for sampler in _seeded_samplers(trainer)],
            "inexact": inexact,
            "ranks": ranks,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state` returned from a checkpoint that the coming ``fit`` continues.

        Raises:
            DeltaFileError: code ``schema``, if a field is missing.
        """
        missing = sorted(_FIELDS - set(state))
        if missing:
            raise DeltaFileError(
                f"The resume state of the checkpoint lacks {missing}; it was damaged or written by another release. "
                "Resume with the release that wrote it, or load the delta only and start a new run.",
                "schema",
            )
        self._pending = state

    # ---- the run -----------------------------------------------------------------------------------

    def _loader(self, trainer: Trainer, original: Callable[[object], object], loader: object) -> object:
        """Note the state before the first ``iter``; on resume set it (stateful loaders are not rewound)."""
        result = original(loader)
        if not trainer.training:
            return result
        if self._pending is None:
            self._before_iter = self._random(trainer)
        elif self._pending["position"] in _BETWEEN_EPOCHS:
            private.forget_restart(trainer)  # so that the states of stateful loaders wait for the epoch's start
        else:
            self._set(trainer, self._own(trainer), "before_iter")
        return result

    def _before_run(self, trainer: Trainer, original: Callable[[], None]) -> None:
        """Bring the loaded counters to a place from which Lightning restarts correctly."""
        if self._pending is not None:
            position, own = self._pending["position"], self._own(trainer)
            if own is not None:
                trainer.callback_metrics.update(own["metrics"])
            if position == "batch_end":
                private.complete_batch(trainer)
            elif position in _BETWEEN_EPOCHS:
                private.forget_restart(trainer)
            if position == "epoch_end" and _plateau_ready(trainer):
                trainer.fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        original()

    def _epoch_run(self, trainer: Trainer, original: Callable[[Any], None], fetcher: Any) -> None:
        """Make or rewind the iterator of the epoch that begins or goes on."""
        state, own = self._pending, self._own(trainer)
        self._pending = None
        if state is not None:
            _set_seeds(trainer, state["seeds"])
        if state is not None and state["position"] not in _BETWEEN_EPOCHS:
            self._continue_epoch(trainer, original, fetcher, state, own)
            return
        if state is not None:
            _warn(_differences(trainer, state, own))
            private.load_waiting_loader_states(trainer)
            self._before_iter = self._random(trainer)
            _new_iterator(fetcher)
        elif private.creates_iterator(trainer):
            self._before_iter = self._random(trainer)
        self._offset = private.batch_counts(trainer).ready
        original(fetcher)
        self._after_iter = self._random(trainer)

    def _continue_epoch(
        self,
        trainer: Trainer,
        original: Callable[[Any], None],
        fetcher: Any,
        state: dict[str, Any],
        own: RandomState | None,
    ) -> None:
        self._offset = state["offset"]
        self._before_iter, self._after_iter = (own["before_iter"], own["after_iter"]) if own else (None, None)
        reasons = _differences(trainer, state, own) + _layout_reasons(trainer, state)
        if not private.is_last_batch(trainer):
            reasons += _loader_reasons(trainer, fetcher)
        if _stateful(fetcher.combined_loader):
            if private.load_waiting_loader_states(trainer):
                iter(fetcher)
        elif not private.is_last_batch(trainer) and not private.gives_iterator(fetcher):
            reasons += self._rewind(trainer, fetcher, own)
        _warn(reasons)
        original(fetcher)
        self._set(trainer, own, "now")
        if state["position"] != "inside":
            _catch_up(trainer, fetcher, state["position"])

    def _rewind(self, trainer: Trainer, fetcher: Any, own: RandomState | None) -> list[str]:
        count = private.batch_counts(trainer).ready - self._offset
        self._set(trainer, own, "before_iter")
        self._before_iter = self._before_iter or self._random(trainer)
        _new_iterator(fetcher)
        self._set(trainer, own, "after_iter")
        self._after_iter = self._after_iter or self._random(trainer)
        dropped, drew = _drop(fetcher, count)
        fetcher.fetched = 0  # Lightning adds the batches of the checkpoint
        reasons = []
        if dropped < count:
            reasons.append(f"the loader gave {dropped} batches where the checkpoint had used {count}")
        if drew and any(_draws_ahead(loader) for loader in fetcher.combined_loader.flattened):
            reasons.append(
                "the loader draws from the global random generator while it iterates ahead of the training; "
                "give its sampler or IterableDataset a torch.Generator of its own"
            )
        return reasons

    # ---- details -----------------------------------------------------------------------------------

    def _own(self, trainer: Trainer) -> RandomState | None:
        """Return the saved entry of this rank; ``None`` if the ranks were others."""
        if self._pending is None or len(self._pending["ranks"]) != trainer.world_size:
            return None
        own: RandomState = self._pending["ranks"][trainer.global_rank]
        return own

    def _random(self, trainer: Trainer) -> RandomState:
        return random_state(_cuda_devices(trainer))

    def _set(self, trainer: Trainer, own: RandomState | None, which: str) -> None:
        if own is not None and own[which] is not None:
            _set_random_state(own[which], _cuda_devices(trainer))

    def _detach(self) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo = []


def _position(trainer: Trainer) -> tuple[Position, str]:
    """Return where the loops stand, and why that place cannot be returned to exactly (empty: it can)."""
    epoch, batch = private.epoch_counts(trainer), private.batch_counts(trainer)
    accumulate = trainer.accumulate_grad_batches
    last = private.is_last_batch(trainer)
    if epoch.ready == epoch.started == epoch.processed and (last or batch.ready == 0):
        return ("epoch_end" if epoch.completed < epoch.processed else "between_epochs"), ""
    if epoch.ready != epoch.started or batch.ready != batch.processed:
        return "inside", "the checkpoint was written inside a batch, not after it"
    if trainer.validating and not private.validation_is_over(trainer):
        return "inside", "the checkpoint was written inside a validation, not after it"
    partial = batch.ready % accumulate != 0 and not last
    reason = "the checkpoint was written between two optimizer steps; the gradients so far are lost" if partial else ""
    if trainer.validating:
        return "validation_end", reason
    return ("batch_end" if batch.completed < batch.processed else "between_batches"), reason


def _catch_up(trainer: Trainer, fetcher: Any, position: Position) -> None:
    """Do what the interrupted run would have done between its save and its next batch."""
    loop = trainer.fit_loop
    private.end_restart(loop.epoch_loop)
    private.end_restart(loop.epoch_loop.val_loop)
    if position != "between_batches":
        private.end_batch(trainer, fetcher, validate=position == "batch_end")
    if not private.is_last_batch(trainer) or _plateau_ready(trainer):
        private.end_restart(loop)


def _plateau_ready(trainer: Trainer) -> bool:
    """Whether each metric that a ``ReduceLROnPlateau`` waits for at the end of an epoch is known."""
    metrics = trainer.callback_metrics
    missing = [
        str(config.monitor)
        for config in trainer.lr_scheduler_configs
        if config.reduce_on_plateau and config.interval == "epoch" and config.monitor not in metrics
    ]
    if missing:
        _warn([f"ReduceLROnPlateau is not stepped for this epoch, as {missing} was not known at the save"])
    return not missing


def _differences(trainer: Trainer, state: dict[str, Any], own: RandomState | None) -> list[str]:
    """Return how this run differs from the saved one, for a resume at any place."""
    reasons = [state["inexact"]] if state["inexact"] else []
    if state["world_size"] != trainer.world_size:
        reasons.append(
            f"the checkpoint was written by {state['world_size']} processes and is resumed by {trainer.world_size}: "
            "random states are not restored and the data is split differently"
        )
    elif own is None and not state["inexact"]:
        reasons.append("the checkpoint does not hold the random state of every process")
    if own is not None and len(own["now"]["cuda"]) != len(_cuda_devices(trainer)):
        reasons.append(
            f"the checkpoint was written with {len(own['now']['cuda'])} CUDA devices per process and is resumed with "
            f"{len(_cuda_devices(trainer))}"
        )
    if trainer.current_epoch > 0 and any(map(_keeps_workers, private.training_loaders(trainer))):
        reasons.append(
            "persistent workers carry random states over from earlier epochs, which cannot be restored; this matters "
            "if the data set draws random numbers, and persistent_workers=False avoids it"
        )
    return reasons


def _layout_reasons(trainer: Trainer, state: dict[str, Any]) -> list[str]:
    layout = _layout(trainer)
    if layout == state["loader"]:
        return []
    return [
        f"the checkpoint was written with {state['loader'][0]} batches per epoch of sizes {state['loader'][1:]}, "
        f"now there are {layout[0]} of sizes {layout[1:]}: within this epoch some samples are seen twice or never"
    ]


def _loader_reasons(trainer: Trainer, fetcher: Any) -> list[str]:
    """Return what keeps the loader from being rewound to the middle of the epoch exactly."""
    loader: CombinedLoader = fetcher.combined_loader
    reasons = []
    if private.gives_iterator(fetcher):
        reasons.append("training_step(dataloader_iter) takes batches itself: the epoch starts again at its first")
    stateful = [_is_stateful(part) for part in loader.flattened]
    if any(stateful) and not all(stateful):
        reasons.append("only some of the loaders have state_dict and load_state_dict; give them to all or to none")
    lengths = [length for part in loader.flattened if (length := sized_len(part)) is not None]
    if private.restarts_short_loaders(loader) and lengths and private.batch_counts(trainer).ready > min(lengths):
        reasons.append(
            "a shorter loader had started again within the epoch (CombinedLoader mode 'max_size_cycle'), with a random "
            "order that is not stored; save before that, at the end of an epoch, or use mode 'max_size' or 'min_size'"
        )
    return reasons


def _new_iterator(fetcher: Any) -> None:
    # Also shuts persistent workers down: their seeds were drawn when they were started.
    fetcher.combined_loader.reset()
    iter(fetcher)


def _drop(fetcher: Any, count: int) -> tuple[int, bool]:
    """Take ``count`` batches; return how many there were, and whether all but the first drew random numbers."""
    after_first = torch.get_rng_state()
    for taken in range(count):
        try:
            next(fetcher)
        except StopIteration:
            return taken, False
        if taken == 0:
            after_first = torch.get_rng_state()
    return count, count > 1 and not torch.equal(after_first, torch.get_rng_state())


def _draws_ahead(loader: Any) -> bool:
    """Whether draws while iterating come before, and not in step with, the training on the batches."""
    return getattr(loader, "num_workers", 0) > 0 or isinstance(getattr(loader, "dataset", None), IterableDataset)


def _keeps_workers(loader: object) -> bool:
    return bool(getattr(loader, "persistent_workers", False)) and getattr(loader, "num_workers", 0) > 0


def _is_stateful(loader: object) -> bool:
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))


def _stateful(loader: CombinedLoader) -> bool:
    """Whether Lightning restores the position of (some of) the loaders itself."""
    return any(_is_stateful(part) for part in loader.flattened)


def _seeded_samplers(trainer: Trainer) -> list[Any]:
    """Return the sampler of each loader if it shuffles by a seed of its own (distributed ones do), else ``None``."""
    samplers = [getattr(loader, "sampler", None) for loader in private.training_loaders(trainer)]
    return [sampler if isinstance(getattr(sampler, "seed", None), int) else None for sampler in samplers]


def _set_seeds(trainer: Trainer, seeds: list[int]) -> None:
    for sampler, seed in zip(_seeded_samplers(trainer), seeds, strict=False):
        if sampler is not None and seed >= 0:
            sampler.seed = seed


def _layout(trainer: Trainer) -> list[int]:
    """Return batches per epoch, then the batch size of each loader; -1 where unknown."""
    batches = trainer.num_training_batches
    sizes = [getattr(loader, "batch_size", None) for loader in private.training_loaders(trainer)]
    return [int(batches) if batches != float("inf") else -1, *(s if isinstance(s, int) else -1 for s in sizes)]


def _warn(reasons: list[str]) -> None:
    if reasons:
        rank_zero_warn("This run continues, but not bit for bit as an uninterrupted one: " + "; ".join(reasons) + ".")
