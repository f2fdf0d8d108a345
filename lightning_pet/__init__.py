"""Parameter-efficient tuning for PyTorch Lightning: every method a Callback, every checkpoint a delta.

Importing this package makes every callback known to LightningCLI by its short name. That needs
Lightning, which takes seconds to import; the verbs of the command line that only read files do
without it, so for them the names below are imported on first use.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_pet.callbacks.adalora import AdaLoRACallback as AdaLoRACallback
    from lightning_pet.callbacks.adapter import AdapterCallback as AdapterCallback
    from lightning_pet.callbacks.adapter_bias import AdapterBiasCallback as AdapterBiasCallback
    from lightning_pet.callbacks.adapter_fusion import AdapterFusionCallback as AdapterFusionCallback
    from lightning_pet.callbacks.auto_prompt import AutoPromptCallback as AutoPromptCallback
    from lightning_pet.callbacks.base import PETCallback as PETCallback
    from lightning_pet.callbacks.bitfit import BitFitCallback as BitFitCallback
    from lightning_pet.callbacks.compacter import CompacterCallback as CompacterCallback
    from lightning_pet.callbacks.diff_pruning.callback import DiffPruningCallback as DiffPruningCallback
    from lightning_pet.callbacks.drift import DriftCallback as DriftCallback
    from lightning_pet.callbacks.full_fine_tuning import FullFineTuningCallback as FullFineTuningCallback
    from lightning_pet.callbacks.hira import HiRACallback as HiRACallback
    from lightning_pet.callbacks.hra import HRACallback as HRACallback
    from lightning_pet.callbacks.ia3 import IA3Callback as IA3Callback
    from lightning_pet.callbacks.intrinsic_dimension import IntrinsicDimensionCallback as IntrinsicDimensionCallback
    from lightning_pet.callbacks.layer_freezing import LayerFreezingCallback as LayerFreezingCallback
    from lightning_pet.callbacks.ln_tuning import LNTuningCallback as LNTuningCallback
    from lightning_pet.callbacks.loha import LoHaCallback as LoHaCallback
    from lightning_pet.callbacks.lokr import LoKrCallback as LoKrCallback
    from lightning_pet.callbacks.lora import LoRACallback as LoRACallback
    from lightning_pet.callbacks.miss import MiSSCallback as MiSSCallback
    from lightning_pet.callbacks.oft import OFTCallback as OFTCallback
    from lightning_pet.callbacks.prefix_tuning import PrefixTuningCallback as PrefixTuningCallback
    from lightning_pet.callbacks.prompt_tuning import PromptTuningCallback as PromptTuningCallback
    from lightning_pet.callbacks.reft import ReFTCallback as ReFTCallback
    from lightning_pet.callbacks.shira import SHiRACallback as SHiRACallback
    from lightning_pet.callbacks.tasks import TasksCallback as TasksCallback
    from lightning_pet.callbacks.trainable_tokens import TrainableTokensCallback as TrainableTokensCallback
    from lightning_pet.callbacks.vera import VeRACallback as VeRACallback
    from lightning_pet.errors import ArgumentError as ArgumentError
    from lightning_pet.errors import BaseMismatchError as BaseMismatchError
    from lightning_pet.errors import DeadSiteError as DeadSiteError
    from lightning_pet.errors import DeltaFileError as DeltaFileError
    from lightning_pet.errors import NotMergeableError as NotMergeableError
    from lightning_pet.errors import OptimizerMismatchError as OptimizerMismatchError
    from lightning_pet.errors import PETError as PETError
    from lightning_pet.errors import TargetError as TargetError
    from lightning_pet.errors import UnsupportedStrategyError as UnsupportedStrategyError
    from lightning_pet.operations.adapted import Adapted as Adapted
    from lightning_pet.operations.apply import apply as apply
    from lightning_pet.operations.combining.choosing import choose_weights as choose_weights
    from lightning_pet.operations.combining.files import combine_deltas as combine_deltas
    from lightning_pet.operations.delta import inspect_delta as inspect_delta
    from lightning_pet.operations.delta import load_delta as load_delta
    from lightning_pet.operations.delta import load_from_checkpoint as load_from_checkpoint
    from lightning_pet.operations.delta import save_delta as save_delta
    from lightning_pet.operations.exchanging import export_delta as export_delta
    from lightning_pet.operations.exchanging import import_delta as import_delta
    from lightning_pet.operations.library.library import DeltaLibrary as DeltaLibrary
    from lightning_pet.operations.publishing import push_to_hub as push_to_hub
    from lightning_pet.report.memory.planner import plan_memory as plan_memory
    from lightning_pet.store.reader import extract_delta as extract_delta
    from lightning_pet.store.reader import last_good as last_good

_WHERE = {
    "AdaLoRACallback": "callbacks.adalora",
    "AdapterCallback": "callbacks.adapter",
    "AdapterBiasCallback": "callbacks.adapter_bias",
    "AdapterFusionCallback": "callbacks.adapter_fusion",
    "AutoPromptCallback": "callbacks.auto_prompt",
    "PETCallback": "callbacks.base",
    "BitFitCallback": "callbacks.bitfit",
    "CompacterCallback": "callbacks.compacter",
    "DiffPruningCallback": "callbacks.diff_pruning.callback",
    "DriftCallback": "callbacks.drift",
    "FullFineTuningCallback": "callbacks.full_fine_tuning",
    "HiRACallback": "callbacks.hira",
    "HRACallback": "callbacks.hra",
    "IA3Callback": "callbacks.ia3",
    "IntrinsicDimensionCallback": "callbacks.intrinsic_dimension",
    "LayerFreezingCallback": "callbacks.layer_freezing",
    "LNTuningCallback": "callbacks.ln_tuning",
    "LoHaCallback": "callbacks.loha",
    "LoKrCallback": "callbacks.lokr",
    "LoRACallback": "callbacks.lora",
    "MiSSCallback": "callbacks.miss",
    "OFTCallback": "callbacks.oft",
    "PrefixTuningCallback": "callbacks.prefix_tuning",
    "PromptTuningCallback": "callbacks.prompt_tuning",
    "ReFTCallback": "callbacks.reft",
    "SHiRACallback": "callbacks.shira",
    "TasksCallback": "callbacks.tasks",
    "TrainableTokensCallback": "callbacks.trainable_tokens",
    "VeRACallback": "callbacks.vera",
    "Adapted": "operations.adapted",
    "apply": "operations.apply",
    "choose_weights": "operations.combining.choosing",
    "combine_deltas": "operations.combining.files",
    "export_delta": "operations.exchanging",
    "import_delta": "operations.exchanging",
    "DeltaLibrary": "operations.library.library",
    "inspect_delta": "operations.delta",
    "load_delta": "operations.delta",
    "load_from_checkpoint": "operations.delta",
    "push_to_hub": "operations.publishing",
    "save_delta": "operations.delta",
    "ArgumentError": "errors",
    "BaseMismatchError": "errors",
    "DeadSiteError": "errors",
    "DeltaFileError": "errors",
    "NotMergeableError": "errors",
    "OptimizerMismatchError": "errors",
    "PETError": "errors",
    "TargetError": "errors",
    "UnsupportedStrategyError": "errors",
    "extract_delta": "store.reader",
    "last_good": "store.reader",
    "plan_memory": "report.memory.planner",
}
__all__ = sorted(_WHERE)  # pyright: ignore[reportUnsupportedDunderAll]
_FILE_VERBS = ("inspect", "extract", "combine", "list", "init")  # merge builds methods, which have to be known
_HELPED_VERBS = ("merge", "import", "export", "plan", "intrinsic-dimension")


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def _runs_file_verb(argv: list[str]) -> bool:
    """Whether this process is our own command line, called for a verb that builds no method, or for help."""
    if not argv or Path(argv[0]).stem != "lightning-pet":
        return False
    if not argv[1:] or argv[1] in (*_FILE_VERBS, "-h", "--help"):
        return argv[1:2] != ["combine"] or not any(word.partition("=")[0] == "--base" for word in argv[2:])
    return argv[1] in _HELPED_VERBS and bool({"-h", "--help"} & set(argv))


if not _runs_file_verb(sys.argv):
    for _name in __all__:
        if not _WHERE[_name].startswith("report."):  # no LightningCLI asks for these, and they cost time
            __getattr__(_name)
