"""One process of a run: cases of engines, their options and sets of methods; prints a line of JSON per case.

``python feature_runs.py FOLDER CASE…``, started by ``launch``. A case is ``ENGINE[-OPTION]:METHODS``; the engine
``one`` is a single process.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from ddp_runs import trainer  # noqa: E402  # it silences warnings and logs, too
from engines import CPUDeepSpeed, strategy_of  # noqa: E402
from method_runs import Classifier, loader  # noqa: E402
from method_runs import build as network  # noqa: E402
from models import every_step  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import MixedPrecision  # noqa: E402

import lightning_pet as pet  # noqa: E402

RESUMED = 2
QUIET: dict[str, Any] = {"verbose": False}
METHODS: dict[str, Callable[[], list[pet.PETCallback]]] = {
    "LoRA": lambda: [pet.LoRACallback(r=2, **QUIET)],
    "Adapter": lambda: [pet.AdapterCallback(bottleneck_size=4, **QUIET)],
    "Prefix tuning, parallel adapter": lambda: [
        pet.PrefixTuningCallback(length=3, projection_size=4, **QUIET),
        pet.AdapterCallback(bottleneck_size=4, placement="parallel", **QUIET),
    ],
    "LoRA, BitFit": lambda: [pet.LoRACallback(r=2, **QUIET), pet.BitFitCallback(**QUIET)],
    "LoRA, LoRA": lambda: [
        pet.LoRACallback(r=2, **QUIET),
        pet.LoRACallback(r=3, name="second", target_modules=["attention.q", "ffn.up"], **QUIET),
    ],
}


class Late(Classifier):
    """Builds the model in ``configure_model``, where ZeRO-3 partitions it at once."""

    def __init__(self) -> None:
        super().__init__(None, False)
        del self.net
        self.source = [network()]  # in a list, so that it is no part of the module

    def configure_model(self) -> None:
        import deepspeed
        from transformers import BertForSequenceClassification
        from transformers.initialization import no_init_weights

        if hasattr(self, "net"):
            return
        (source,) = self.source
        source.config.hidden_dropout_prob = source.config.attention_probs_dropout_prob = 0.0
        source.config.pad_token_id = None  # transformers would zero the row of a table that is empty here
        with no_init_weights():
            self.net = BertForSequenceClassification(source.config)
        with torch.no_grad():
            for own, value in zip(self.net.parameters(), source.parameters(), strict=True):
                with deepspeed.zero.GatheredParameters([own], modifier_rank=0):
                    own.copy_(value)


class Sharding(Classifier):
    """FSDP2 with options of ``fully_shard``."""

    options: ClassVar[dict[str, Any]] = {}
    mesh: Any = None

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if not hasattr(self, "net"):
            self.net = network()
        if any(hasattr(p, "full_tensor") for p in self.net.parameters()):
            return
        mesh = self.mesh() if self.mesh else self.device_mesh["data_parallel"]
        for layer in self.net.bert.encoder.layer:
            fully_shard(layer, mesh=mesh, **self.options)
        fully_shard(self.net, mesh=mesh, **self.options)


def sharding(option: str) -> Classifier:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    module = Sharding(network(), False)
    if option == "early":  # sharded before the deltas come, with everything at once
        del module.net
    mixed = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
    module.options = {
        "keep": {"reshard_after_forward": False},
        "mixed": mixed,
        "early": {**mixed, "reshard_after_forward": False},
        "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    }.get(option, {})
    if option in ("hybrid", "early"):
        module.mesh = lambda: init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    return module


def fsdp_options(option: str) -> dict[str, Any]:
    from engines import Sent

    values = dict(network().named_parameters()) | dict(network().named_buffers())

    def fill(module: nn.Module) -> None:
        """What a user does who loads the base while it is wrapped: here all values come from a model at hand."""
        module.to_empty(device="cpu", recurse=False)
        with torch.no_grad():
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                tensor.copy_(values[f"{module.path}.{name}"])

    def hybrid(*shape: int) -> dict[str, Any]:
        return {"sharding_strategy": "HYBRID_SHARD", "device_mesh": shape}

    return {
        "hybrid21": lambda: hybrid(2, 1),
        "hybrid12": lambda: hybrid(1, 2),
        "grad": lambda: {"sharding_strategy": "SHARD_GRAD_OP"},
        "mixed": lambda: {"mixed_precision": MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
        "offload": lambda: {"cpu_offload": True},
        "meta": lambda: {"param_init_fn": fill},
        "sync": lambda: {
            "param_init_fn": lambda m: m.to_empty(device="cpu", recurse=False),
            "sync_module_states": Sent(),
        },
    }.get(option, dict)()


PRECISIONS = {"true": "bf16-true", "amp": "bf16-mixed"}


def build(engine: str, option: str) -> tuple[Classifier, Any, dict[str, Any]]:
    """Module, strategy and options of the Trainer; an option may end with a precision (``init+true``)."""
    option, _, precision = option.rpartition("+") if "+" in option else (option, "", "")
    if option in PRECISIONS:
        option, precision = "", option
    module, strategy, more = _build(engine, option)
    return module, strategy, {**more, **({"precision": PRECISIONS[precision]} if precision else {})}


def _build(engine: str, option: str) -> tuple[Classifier, Any, dict[str, Any]]:
    if engine == "fsdp2":
        return sharding(option), strategy_of(engine), {}
    if engine == "fsdp":
        on_meta = option == "meta" or (option == "sync" and int(os.environ["RANK"]))
        with torch.device("meta" if on_meta else "cpu"):
            module = Classifier(network(), False)
        for path, part in module.net.named_modules():
            part.path = path
        return module, strategy_of(engine, **fsdp_options(option)), {}
    strategy, more = strategy_of(engine) if engine != "one" else "auto", {}
    if option == "fp16":
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True  # slow on most CPUs, and therefore refused
        strategy = CPUDeepSpeed(stage=int(engine[4]), process_group_backend="gloo", initial_scale_power=16)
        more = {"precision": "16-true"}
    if option == "offload":
        strategy = CPUDeepSpeed(stage=int(engine[4]), process_group_backend="gloo", offload_optimizer=True)
        strategy.config["zero_force_ds_cpu_optimizer"] = False  # or the optimizer must be DeepSpeed's own
    return Late() if option == "init" else Classifier(network(), False), strategy, more


def run(folder: Path, case: str, path: Path | None = None, **start: Any) -> tuple[Classifier, Any]:
    engine, _, option = case.partition(":")[0].partition("-")
    size, rank = (1, 0) if engine == "one" else (int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
    module, strategy, more = build(engine, option)
    torch.manual_seed(5)
    methods = METHODS[case.partition(":")[2]]()
    for method in methods:
        method.start_from = start.get("start_from")
    fitted = trainer(
        *methods,
        every_step(folder),
        strategy=strategy,
        devices=size,
        use_distributed_sampler=False,
        max_epochs=1,
        **more,
    )
    fitted.fit(module, loader(size, rank), ckpt_path=path)
    return module, fitted


def main(folder: Path, cases: list[str]) -> None:
    for case in cases:
        here = folder / case
        found: dict[str, Any] = {"case": case}
        try:
            module, _ = run(here, case)
            found["losses"] = module.losses
            if not case.startswith("one"):
                found["size"] = pet.save_delta(module, here / "saved.pet.safetensors")
            found["resumed"] = run(here / "again", case, here / f"step={RESUMED}.ckpt")[0].losses
            found["started"] = run(here / "started", case, start_from=str(here / "step=4.ckpt"))[0].losses[0]
        except Exception as error:
            if "TRACE" in os.environ:
                import traceback

                traceback.print_exc()
            found["error"] = f"{type(error).__name__}: {error}"
        print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
