"""One measurement of the exchange with HF PEFT: a folder of theirs read here, one of ours loaded there."""

import copy
import functools
import math
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from lightning_pet import PETCallback, PETError, apply, export_delta, load_delta
from tests.exchange.matrix_cases import Case
from tests.exchange.peft_models import made, output_of
from tests.exchange.places import Place

HERE, THERE = "here", "PEFT"


@dataclass(frozen=True)
class Outcome:
    """What became of one direction.

    Attributes:
        difference: the largest one between outputs; ``None``: there are none.
        by: who refused it; empty: nobody.
        said: what was said then.
    """

    difference: float | None = None
    by: str = ""
    said: str = ""


NOTHING = Outcome()
"""The direction does not exist: PEFT has no name for the method, or it is only read."""


@functools.cache
def _base(place: Place, dtype: torch.dtype) -> nn.Module:
    model = made(place.build, dtype)
    if hasattr(model, "config"):
        model.config._experts_implementation = "eager"  # the others know no float64
    return model


def base_of(case: Case, place: Place) -> nn.Module:
    """The base that a case is measured on."""
    return _base(place, torch.float32 if case.float32 else torch.float64)


def moved(model: nn.Module) -> nn.Module:
    """The model as if its delta had trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "ranknum" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1)
    return model.eval()


def read(case: Case, place: Place) -> Outcome:
    """A folder that PEFT writes, loaded here."""
    if case.theirs is None:
        return NOTHING
    base = base_of(case, place)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = there(base, case.theirs(place), Path(folder))
        except Exception as error:  # whatever it is that PEFT says
            return Outcome(by=THERE, said=f"{type(error).__name__}: {error}")
        if not _has_effect(expected, base):
            return Outcome(by=THERE, said="its delta changes nothing here")
        try:
            model = copy.deepcopy(base)
            load_delta(model, folder)
        except PETError as error:
            return Outcome(by=HERE, said=str(error))
    return Outcome(apart(output_of(model.eval()), expected))


def there(base: nn.Module, config: Any, folder: Path) -> Tensor:
    """Give every tensor of a PEFT model random values, save it, and return its output."""
    wrapped = moved(peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False))
    output = output_of(wrapped)
    wrapped.save_pretrained(folder)
    return output


def written(case: Case, place: Place) -> tuple[Outcome, Outcome]:
    """A folder that is written here, loaded by PEFT and by transformers."""
    if case.ours is None:
        return NOTHING, NOTHING
    base = base_of(case, place)
    with tempfile.TemporaryDirectory() as parent, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(parent) / "folder"
        try:
            model = here(base, case.ours(place))
            ours = output_of(model)
            export_delta(model, folder)
        except PETError as error:
            return Outcome(by=HERE, said=str(error)), NOTHING
        assert _has_effect(ours, base), "the delta changes nothing"
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, autocast_adapter_dtype=False)
        found = Outcome(apart(output_of(wrapped.eval()), ours))
        return found, _in_transformers(case, base, folder, ours)


def here(base: nn.Module, callback: PETCallback) -> nn.Module:
    """A copy with the method, as if it had trained."""
    model = copy.deepcopy(base)
    apply(model, callback)
    return moved(model)


def _in_transformers(case: Case, base: nn.Module, folder: Path, ours: Tensor) -> Outcome:
    if not isinstance(base, transformers.PreTrainedModel):
        return NOTHING
    if case.unread:
        return Outcome(by="transformers", said=case.unread)
    model: Any = copy.deepcopy(base)
    try:
        model.load_adapter(str(folder))
    except Exception as error:  # whatever it is that transformers says
        return Outcome(by="transformers", said=f"{type(error).__name__}: {error}")
    return Outcome(apart(output_of(model.eval()), ours))


def _has_effect(output: Tensor, base: nn.Module) -> bool:
    return apart(output, output_of(base)) > 1e-6


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference; PEFT has outputs for the virtual tokens, too."""
    rows = min(one.shape[1], other.shape[1])
    found = float((one[:, -rows:].double() - other[:, -rows:].double()).abs().max())
    return math.inf if math.isnan(found) else found


Measure = Callable[[Case, Place], Any]
