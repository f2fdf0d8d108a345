"""What loggers learn of a run: its methods with their options and sizes at the start, a few figures on the way."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl

from lightning_pet.insertion.method import Method, key_of
from lightning_pet.layers.sharding import whole
from lightning_pet.model.adaptation import Applied
from lightning_pet.model.naming import delta_prefix, named_parameters
from lightning_pet.operations.adapted import Adapted
from lightning_pet.operations.plan import Plan
from lightning_pet.strategies import private
from lightning_pet.strategies.strategy import StrategyAdapter


def log_options(trainer: pl.Trainer, adapted: Adapted, plan: Plan, methods: Sequence[Method]) -> None:
    """Tell every logger what the run trains: options, numbers and shares, as hyper-parameters.

    The module's own hyper-parameters go with them: TensorBoard shows only what came first.

    Args:
        trainer: whose loggers are told; none is fine.
        adapted: the adapted model.
        plan: what trains in it.
        methods: those of the run.
    """
    if trainer.loggers:
        facts = private.logged_hyperparameters(trainer) | _facts_of(adapted, plan, methods)
        for logger in trainer.loggers:
            logger.log_hyperparams(facts)


def _facts_of(adapted: Adapted, plan: Plan, methods: Sequence[Method]) -> dict[str, Any]:
    """Options, numbers and shares of the base by a name with slashes, such as ``pet/lora_default/r``."""
    start = {key_of(method): method.start_from for method in methods}
    facts: dict[str, Any] = {"pet/methods": ", ".join(applied.key for applied in adapted.record.applied)}
    for applied in adapted.record.applied:
        own = _parameters(applied, plan)
        facts |= {f"pet/{applied.key}/{option}": value for option, value in applied.config.items()}
        facts |= {
            f"pet/{applied.key}/start_from": start.get(applied.key),
            f"pet/{applied.key}/parameters": own,
            f"pet/{applied.key}/share": own / plan.base if plan.base else 0.0,
        }
    return facts | {"pet/parameters": plan.trainable, "pet/base": plan.base, "pet/share": plan.share}


def _parameters(applied: Applied, plan: Plan) -> int:
    """Numbers that a method trains: in what it inserted, and in what trains as it is."""
    return sum(row.parameters for row in plan.rows if row.method == applied.label or row.place in applied.trained)


def norm_of(adapted: Adapted, method: Method, adapter: StrategyAdapter[Any]) -> float:
    """Euclidean norm of everything that a method trains; of tensors of the base, the norm of their change.

    Every process calls this.
    """
    record = adapted.record
    applied = [a for a in record.applied if a.key == key_of(method)]
    places = {path for a in applied for path in a.paths}
    heads = {name for a in applied for name in a.trained}
    own = {n: p for n, p in named_parameters(adapted.root) if n in set(record.trainable_names)}
    named = [(n, p) for n, p in own.items() if n in heads or delta_prefix(n) in places]
    squares = 0.0
    for name, tensor in adapter.whole(named):
        value = tensor.detach().float()
        if name in heads and not record.originals[name].is_meta:
            value = value - whole(record.originals[name].to(value.device, value.dtype))
        squares += float(value.square().sum())
    return math.sqrt(squares)


def log_figures(module: pl.LightningModule, method: Method, figures: Mapping[str, float]) -> None:
    """Log figures of a method in a training step, under ``pet/METHOD_NAME/FIGURE``."""
    for label, value in figures.items():
        module.log(f"pet/{key_of(method)}/{label}", value, on_step=True, on_epoch=False)
