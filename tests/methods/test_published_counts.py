"""Published numbers of parameters, by configuration alone; nothing is allocated."""

import copy
import functools

import pytest
import torch
from torch import nn

import lightning_pet

from .published_counts import ARCHITECTURES, ROWS, Row


@functools.cache
def model_of(architecture: str) -> nn.Module:
    """The model on the meta device."""
    import transformers

    model_class, config_class, sizes, _ = ARCHITECTURES[architecture]
    with torch.device("meta"):
        return getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes)).eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_models_have_their_published_size(architecture: str) -> None:
    numbers = sum(parameter.numel() for parameter in model_of(architecture).parameters())
    assert numbers == ARCHITECTURES[architecture][3]


def name_of(row: Row) -> str:
    methods = "+".join(name.removesuffix("Callback") for name, _ in row.methods)
    return f"{row.source.partition(' ')[0]}-{row.architecture}-{methods}-{row.expected}"


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_a_row(row: Row) -> None:
    callbacks = [getattr(lightning_pet, name)(**options) for name, options in row.methods]
    adapted = lightning_pet.apply(copy.deepcopy(model_of(row.architecture)), callbacks)
    assert adapted.plan().trainable == row.expected


def test_groups_of_structured_diff_pruning() -> None:
    """Guo et al. 2021: 393 groups in BERT-large with its head of two tensors: one per matrix and bias vector."""
    callback = lightning_pet.DiffPruningCallback(density=0.005)
    adapted = lightning_pet.apply(copy.deepcopy(model_of("bert-large")), [callback])
    groups = [name for name in adapted.record.delta_names if name.endswith(".alpha_group")]
    assert len(groups) == 391
