"""Look-up tables and layers of two inputs: what a delta on their weight means, and where it can have no gradient."""

import pytest
import torch
from torch import nn

from lightning_pet import (
    DiffPruningCallback,
    IA3Callback,
    IntrinsicDimensionCallback,
    LoRACallback,
    PETCallback,
    TargetError,
    apply,
)

from .battery import perturb


@pytest.mark.parametrize("cls", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize(
    "callback",
    [
        LoRACallback(r=2, target_modules=["0"], use_dora=True),
        DiffPruningCallback(density=0.5),
        IntrinsicDimensionCallback(d=8),
    ],
    ids=["dora", "diff_pruning", "intrinsic_dimension"],
)
def test_sparse_gradients_reach_no_delta_on_the_weight(cls: type[nn.Module], callback: PETCallback) -> None:
    model = nn.Sequential(cls(9, 4, sparse=True), nn.Linear(4, 2))
    with pytest.raises(TargetError, match=r"0\.weight: .*sparse=True.*0\.sparse = False"):
        apply(model, [callback])
    assert type(model[0]) is cls
    model[0].sparse = False
    adapted = apply(model, [callback])
    model(torch.randint(9, (3, 4))).sum().backward()
    assert all(dict(model.named_parameters())[name].grad is not None for name in adapted.record.delta_names[:1])


def test_what_is_looked_up_needs_no_gradient_of_the_table() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2))
    apply(model, [LoRACallback(r=2, target_modules=["0"])])
    model(torch.randint(9, (3, 4))).sum().backward()
    assert not model[0].pet["lora_default"].b.grad.is_sparse


@pytest.mark.parametrize("mode", ["mean", "sum"])
def test_ia3_rescales_what_a_bag_returns(mode: str) -> None:
    model, ids = nn.Sequential(nn.EmbeddingBag(9, 4, mode=mode)).double(), torch.randint(9, (3, 5))
    base = model(ids)
    adapted = apply(model, [IA3Callback(target_modules=["0"], feedforward_modules=[], modules_to_save=[])])
    perturb(adapted)
    scale = model[0].pet["ia3_default"].scale
    assert scale.shape == (4,)
    assert torch.allclose(model(ids), base * scale, atol=1e-12)


@pytest.mark.parametrize(
    "callback",
    [LoRACallback(r=2, target_modules=["0"], use_dora=True), IA3Callback(target_modules=["0"], feedforward_modules=[])],
    ids=["dora", "ia3"],
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_of_two_inputs_is_no_stack_of_matrices(callback: PETCallback, bias: bool) -> None:
    class Twice(nn.Sequential):
        def forward(self, x):
            return self[0](x, x)

    model = Twice(nn.Bilinear(5, 5, 3, bias=bias))
    with pytest.raises(TargetError, match=r"3×5×5 in a Bilinear.*cannot be told"):
        apply(model, [callback], forward=lambda: model(torch.randn(2, 5)))
    assert type(model[0]) is nn.Bilinear
