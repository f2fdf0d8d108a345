"""Tasks on engines that share parameters among processes: each process calls every task, with rows or without.

A process that passed a task over would leave the others waiting for its part, or exchange other gradients than they do.
So every process calls the deltas of all tasks in one order, if need be on no rows, which gives gradients of zero; and
all of them know which tasks had rows anywhere, because one that had none has to stay as it is.
"""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch.distributed
from torch import nn

from lightning_pet.errors import ArgumentError, UnsupportedStrategyError
from lightning_pet.layers.sharding import is_flattened, is_partition
from lightning_pet.model.adaptation import deltas_in
from lightning_pet.model.naming import delta_of
from lightning_pet.strategies.parameter_groups import trainable_of
from lightning_pet.strategies.strategy import StrategyAdapter
from lightning_pet.training.tasks.tasks import Tasks


def refuse_for_shards(trainer: pl.Trainer, tasks: Tasks) -> None:
    """Refuse what these engines cannot do with several tasks, before anything is changed.

    Raises:
        UnsupportedStrategyError: naming the option and the alternative.
    """
    name = type(trainer.strategy).__name__
    others = [c for c in trainer.callbacks if hasattr(c, "for_task") and not getattr(c, "shares_tasks", False)]  # type: ignore[attr-defined]
    if tasks.every_row:
        raise UnsupportedStrategyError(
            f"TasksCallback(every_row=True): not tested with {name}, which shares parameters among processes. Use one "
            "process or strategy='ddp'."
        )
    if others:
        raise UnsupportedStrategyError(
            f"{type(others[0]).__name__} beside TasksCallback: not tested with {name}, which shares parameters among "
            "processes: each has to call the deltas of all tasks, on no rows where it has none. There it is LoRA (not "
            "DoRA) that can. Use it, or strategy='ddp', or train the tasks one by one."
        )
    if tasks.split:
        raise UnsupportedStrategyError(
            f"TasksCallback(split=True): {name} shares parameters among processes, which would each call other tasks. "
            "Leave split out, or use strategy='ddp'."
        )
    if sized := [task for task in tasks.names if "labels" in tasks.options[task]]:
        raise UnsupportedStrategyError(
            f"TasksCallback: {sized[0]!r} has a number of labels of its own, so that batches are run task by task; but "
            f"{name} shares parameters among processes, which would each call other tasks. Leave labels out, or use "
            "strategy='ddp'."
        )


def refuse_weights(trainer: pl.Trainer, root: nn.Module) -> None:
    """Refuse weights of each task's own where the engine takes the memory of a delta away before the backward pass.

    Raises:
        UnsupportedStrategyError: naming the first.
    """
    if not any(is_flattened(parameter) or is_partition(parameter) for parameter in root.parameters()):
        return
    for inserted in deltas_in(root):
        delta: Any = inserted.delta
        if delta.path == "weight":
            raise UnsupportedStrategyError(
                f"TasksCallback: each task has its own {inserted.target.path} (a head, or a weight that is read and "
                f"not called), and {type(trainer.strategy).__name__} (FSDP1 or ZeRO-3) takes a weight away before its "
                "backward pass. Leave it out (modules_to_save=[]), or use ModelParallelStrategy (FSDP2), ZeRO-2 or "
                "strategy='ddp'."
            )


class Shared:
    """What the processes of such a run agree on in each step.

    Args:
        trainer: of the run.
        tasks: of the run.
    """

    def __init__(self, trainer: pl.Trainer, tasks: Tasks) -> None:
        self._trainer, self._tasks = trainer, tasks

    def note(self, step: str, names: Sequence[str] | str) -> None:
        """These tasks have rows in a batch of this process.

        Raises:
            ArgumentError: in every process, if they call other tasks than another one in a step that needs all of them.
        """
        if step == "predict_step":
            return
        own = {names} if isinstance(names, str) else set(names)
        each: list[set[str]] = [own] * self._trainer.world_size
        if len(each) > 1:
            torch.distributed.all_gather_object(each, own)
        if step == "training_step":
            if self._tasks.stepped or self._tasks.anywhere is None:
                self._tasks.anywhere, self._tasks.stepped = set(), False
            self._tasks.anywhere.update(*each)
        elif any(other != each[0] for other in each):
            found = "; ".join(f"process {number}: {', '.join(sorted(one))}" for number, one in enumerate(each))
            raise ArgumentError(
                f"{step}: the batches of the processes have rows of different tasks ({found}), and "
                f"{type(self._trainer.strategy).__name__} shares parameters among processes, which must call the same. "
                "Let each batch have rows of one task, the same in all processes, or rows of every task; or use "
                "strategy='ddp'."
            )

    def refuse_apart(self) -> None:
        """Raise: a training batch has to be run task by task.

        Raises:
            UnsupportedStrategyError: always.
        """
        raise UnsupportedStrategyError(
            "TasksCallback: heads of tasks have different sizes, so that batches are run task by task; but "
            f"{type(self._trainer.strategy).__name__} shares parameters among processes, which would each call other "
            "tasks. Use strategy='ddp'."
        )


def pass_over(trainer: pl.Trainer, module: pl.LightningModule, tasks: Tasks, adapter: StrategyAdapter[Any]) -> None:
    """Before an optimizer steps: tasks that had rows in no process have no gradient.

    Raises:
        UnsupportedStrategyError: if the engine's optimizer would move them nevertheless.
    """
    if tasks.anywhere is None or not adapter.at_boundary():
        return
    tasks.stepped = True
    absent = [task for task in tasks.names if task not in tasks.anywhere]
    if not absent:
        return
    if not adapter.passes_over:
        raise UnsupportedStrategyError(
            f"TasksCallback: no process has a row of {', '.join(map(repr, absent))} in step {trainer.global_step}, so "
            f"that it must stay as it is; but the optimizer of {type(trainer.strategy).__name__} steps flat "
            "partitions, in which weight decay and momentum move it as well. Let every step have rows of every task "
            "(a sampler, accumulate_grad_batches), or use strategy='ddp' or ModelParallelStrategy (FSDP2)."
        )
    for name, parameter in trainable_of(module).items():
        if delta_of(name) in absent:
            parameter.grad = None
