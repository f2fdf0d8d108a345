"""Scores of evaluation data loaders, one set for each, logged under the loader's name."""

from abc import abstractmethod
from typing import Any, Protocol, cast

import lightning.pytorch as L
import torch
from torch import Tensor, nn


class Scores(Protocol):
    """Running scores of one data loader: a module of torchmetrics' metrics."""

    def compute(self) -> dict[str, Tensor]:
        """All scores since the last call, which are then reset."""
        ...


class EvaluatedModule(L.LightningModule):
    """Base of the ready modules that keep a set of scores per data loader.

    The first loader logs under ``val/<score>``, the others under ``val/<name>/<score>`` with the names that the data
    module's ``eval_names`` gives them.

    Attributes:
        scores: by stage and loader; how many there are is known only when they are seen.
        shown: scores that the progress bar shows.
    """

    shown: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.ModuleDict()

    @abstractmethod
    def new_scores(self) -> nn.Module:
        """An empty set of scores."""

    def stage_scores(self, stage: str, loader: int) -> Any:
        """The scores of a stage (``val``, ``test``) and loader."""
        key = f"{stage}_{loader}"
        if key not in self.scores:
            with torch.inference_mode(False):  # a later fit validates in another mode
                self.scores[key] = self.new_scores().to(self.device)
        return self.scores[key]

    def log_scores(self, stage: str) -> None:
        """Log and reset all scores of a stage."""
        names = getattr(getattr(self.trainer, "datamodule", None), "eval_names", ())
        for key in sorted(key for key in self.scores if key.startswith(stage)):
            loader = int(key.rpartition("_")[2])
            name = names[loader] if loader < len(names) else str(loader)
            prefix = stage if loader == 0 else f"{stage}/{name}"
            with torch.inference_mode(False):
                found = cast(Scores, self.scores[key]).compute()
            for score, value in found.items():
                self.log(f"{prefix}/{score}", value, prog_bar=score in self.shown)

    def on_validation_epoch_end(self) -> None:
        """Log the validation scores."""
        self.log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the test scores."""
        self.log_scores("test")
