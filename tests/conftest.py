"""What holds for every test: no network, one thread, the same random state, and nothing left behind."""

import os

# Before torch and transformers are imported: both read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import logging
import random
from collections.abc import Iterator

import numpy
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """Seed every generator, and fail a test that leaves global state behind for the next one."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    logging.disable(logging.NOTSET)  # the scripts of other processes are quiet, also where a test imports from them
    yield
    # Lightning's seed_everything leaves these behind, and processes that a later test starts would seed by them.
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)
    assert torch.is_grad_enabled(), "the test left gradients switched off"
    assert torch.get_default_dtype() == torch.float32, "the test left another default dtype"
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    assert not group, "the test left a process group open"
