"""The public surface is a promise: a change to it shows here."""

import inspect

import lightning.pytorch as pl

import lightning_pet
from lightning_pet import PETCallback
from lightning_pet.errors import PETError

NAMES = [
    "AdaLoRACallback",
    "Adapted",
    "AdapterBiasCallback",
    "AdapterCallback",
    "AdapterFusionCallback",
    "ArgumentError",
    "AutoPromptCallback",
    "BaseMismatchError",
    "BitFitCallback",
    "CompacterCallback",
    "DeadSiteError",
    "DeltaFileError",
    "DeltaLibrary",
    "DiffPruningCallback",
    "DriftCallback",
    "FullFineTuningCallback",
    "HRACallback",
    "HiRACallback",
    "IA3Callback",
    "IntrinsicDimensionCallback",
    "LNTuningCallback",
    "LayerFreezingCallback",
    "LoHaCallback",
    "LoKrCallback",
    "LoRACallback",
    "MiSSCallback",
    "NotMergeableError",
    "OFTCallback",
    "OptimizerMismatchError",
    "PETCallback",
    "PETError",
    "PrefixTuningCallback",
    "PromptTuningCallback",
    "ReFTCallback",
    "SHiRACallback",
    "TargetError",
    "TasksCallback",
    "TrainableTokensCallback",
    "UnsupportedStrategyError",
    "VeRACallback",
    "apply",
    "choose_weights",
    "combine_deltas",
    "export_delta",
    "extract_delta",
    "import_delta",
    "inspect_delta",
    "last_good",
    "load_delta",
    "load_from_checkpoint",
    "plan_memory",
    "push_to_hub",
    "save_delta",
]


def test_public_names() -> None:
    assert sorted(lightning_pet.__all__) == NAMES


def test_every_name_is_defined_in_this_package() -> None:
    for name in NAMES:
        assert getattr(lightning_pet, name).__module__.startswith("lightning_pet."), name


def test_callbacks_are_lightning_callbacks_with_defaults_for_everything() -> None:
    for name in NAMES:
        cls = getattr(lightning_pet, name)
        if name.endswith("Callback"):
            assert issubclass(cls, pl.Callback)
        if name.endswith("Callback") and issubclass(cls, PETCallback) and not inspect.isabstract(cls):
            assert cls().config()["name"] == "default"


def test_every_error_is_caught_by_the_root() -> None:
    for name in NAMES:
        if name.endswith("Error"):
            assert issubclass(getattr(lightning_pet, name), PETError)
    assert issubclass(PETError, ValueError)


def test_the_command_is_installed_as_documented() -> None:
    from importlib.metadata import entry_points

    found = [entry.value for entry in entry_points(group="console_scripts") if entry.name == "lightning-pet"]
    assert found in ([], ["lightning_pet.cli.main:main"])  # empty in a checkout that is only on the path
