"""DDP: every process holds everything; a reducer, made once, waits in each backward pass for all gradients it knows."""

import gc
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_pet.errors import UnsupportedStrategyError
from lightning_pet.layers.sharding import ordinary_parts
from lightning_pet.model.naming import join
from lightning_pet.model.quantised import is_quantised, scales_beside
from lightning_pet.strategies import private
from lightning_pet.strategies.strategy import CheckpointRules, StrategyAdapter


class DDPAdapter(StrategyAdapter[DDPStrategy]):
    """Makes the reducer when it is needed, and again when other parameters train."""

    replaced = (*StrategyAdapter.replaced, "configure_ddp")

    def after_insertion(self, root: nn.Module, *, complete: bool) -> None:
        """Send the weights that torch cannot."""
        module = self.strategy.lightning_module
        if complete and module is not None:
            _share_quantised(module)

    def configure_ddp(self, rules: CheckpointRules, original: Callable[..., Any]) -> None:
        """Wrap the model, unless nothing trains: torch refuses to, and there is no gradient to exchange."""
        model = self.strategy.model
        assert model is not None
        if any(parameter.requires_grad for parameter in model.parameters()):
            original()
        else:
            private.share_from_first(model)

    def expect_gaps(self, trainer: pl.Trainer, what: str) -> None:
        """Let the reducer look in each step for parameters without gradient, instead of waiting for them."""
        super().expect_gaps(trainer, what)
        if private.expects_one_graph(self.strategy):
            raise UnsupportedStrategyError(
                f"{what}: DDPStrategy(static_graph=True) expects equal gradients in each step. Leave static_graph out."
            )
        if private.look_for_unused_parameters(self.strategy):
            rank_zero_info(f"{what}: DDP looks for parameters without gradient in every step.")

    def wrap_again(self) -> None:
        """Make a new reducer for the parameters that train now."""
        # The old reducer's hooks go with it: nothing else may hold it when the new one is made.
        self.strategy.model = self.strategy.lightning_module
        gc.collect()
        self.strategy.configure_ddp()


def _share_quantised(module: nn.Module) -> None:
    """Give every process of a DDP run the quantised weights of the first one, as DDP does with all others.

    DDP sends tensors. A tensor subclass cannot be sent as a whole, but the tensors can that it is made of; and what
    bitsandbytes keeps beside its numbers is no parameter.
    """
    unsent: list[str] = []
    for path, part in module.named_modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and is_quantised(parameter):
                whole = type(parameter.data) is Tensor
                for tensor in [*([] if whole else ordinary_parts(parameter)), *scales_beside(part, parameter)]:
                    _share(tensor.detach())
                unsent += [] if whole else [join(path, name)]
    if unsent:
        private.keep_from_ddp(module, unsent)


def _share(tensor: Tensor) -> None:
    sent = tensor.contiguous().reshape(-1).view(torch.uint8)
    torch.distributed.broadcast(sent, src=0)
    tensor.copy_(sent.view(tensor.dtype).view(tensor.shape))
