"""``lightning-pet plan``: the parts of a run are built as ``fit`` builds them, and planned instead of trained."""

import json
from argparse import Namespace
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_pet.callbacks.base import PETCallback
from lightning_pet.cli.lightning_cli import PetCLI, as_list, command, or_default
from lightning_pet.report.memory.engines import ENGINES, Engine
from lightning_pet.report.memory.planner import plan_memory
from lightning_pet.report.memory.setup import (
    bytes_of,
    engine_of,
    precision_of,
    resized,
    token_batch,
    without_weights,
)
from lightning_pet.report.memory.view import show_memory


class _PlanTrainer(pl.Trainer):
    """A Trainer that never trains: the length of its run does not matter."""

    estimated_stepping_batches = 1000


class PlannedRun(PetCLI):
    """Builds the parts of a run, on this machine whatever the run will be on."""

    def __init__(self, arguments: list[str]) -> None:
        self.methods: list[PETCallback] = []
        self.asked: dict[str, Any] = {}
        super().__init__(
            args=arguments,
            run=False,
            save_config_callback=None,
            trainer_class=_PlanTrainer,
            parser_kwargs={"default_env": False},
        )

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Note what is asked for, and build a Trainer for one CPU."""
        settings = self._get(self.config_init, "trainer")
        self.asked = {name: settings.get(name) for name in ("strategy", "devices", "num_nodes", "accelerator")}
        self.asked["precision"] = settings.get("precision")
        given = [*(self._get(self.config_init, "pet") or []), *as_list(settings.get("callbacks"))]
        self.methods = [callback for callback in given if isinstance(callback, PETCallback)]
        here = {"strategy": "auto", "devices": 1, "num_nodes": 1, "accelerator": "cpu", "precision": None}
        quiet = {"enable_checkpointing": False, "enable_model_summary": False, "logger": False, "plugins": None}
        return LightningCLI.instantiate_trainer(self, **kwargs, **here, **quiet, callbacks=[])

    def assembled(self, engine: Engine) -> None:
        """Run the hooks that complete data and model, in the order of ``fit``."""
        module, data, trainer = self.model, self.datamodule, self.trainer
        module.trainer = trainer
        trainer.strategy.connect(module)
        if data is not None:
            data.trainer = trainer
            vars(trainer)["datamodule"] = data
            data.prepare_data()
            data.setup("fit")
        module.setup("fit")
        try:
            module.configure_model()
        except Exception:
            # It may shard, which needs the processes of the run. What it builds, it builds before.
            if engine.name != "fsdp2" or not any(True for _ in module.parameters()):
                raise

    def batch(self, rows: int | None, tokens: int | None) -> Any:
        """The first batch of the data; without data, token ids."""
        source = self.datamodule or self.model
        if not is_overridden("train_dataloader", source):
            return token_batch(rows or 1, tokens or 512)
        batch = next(iter(source.train_dataloader()))
        return batch if rows is None and tokens is None else resized(batch, rows, tokens)


def plan_run(options: Namespace, arguments: list[str]) -> None:
    """Print the memory plan of a run; see ``lightning-pet plan --help``.

    Args:
        options: those of the plan.
        arguments: those of ``fit``.
    """
    with command("plan"):
        memory = None if options.device_memory is None else bytes_of(options.device_memory)
        with without_weights() if options.meta else nullcontext():
            run = PlannedRun(or_default(arguments))
            engine = engine_of(run.asked["strategy"], run.asked["devices"], run.asked["num_nodes"] or 1)
            run.assembled(engine)
        batch = run.batch(options.batch_size, options.tokens)
        gpu = run.asked["accelerator"] != "cpu"
        precision = precision_of(run.asked["precision"])
        plan = plan_memory(run.model, run.methods, batch, strategy=engine, precision=precision, gpu=gpu)
        n = engine.processes if engine.processes > 1 else 8
        others = [plan if engine.name == name else plan.under(name, 1 if name == "single" else n) for name in ENGINES]
        unfit = [type(method).__name__ for method in run.methods if not method.shards]
        remarks = [f"not with {unfit[0]}" if unfit and o.engine.name not in ("single", "ddp") else "" for o in others]
        if options.json_output:
            print(json.dumps(plan.as_dict() | {"others": [other.as_dict() for other in others]}, indent=2))
        else:
            show_memory(plan, list(zip(others, remarks, strict=True)), memory)
