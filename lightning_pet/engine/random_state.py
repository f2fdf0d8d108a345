"""The state of all random generators of one process, as plain data."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer

RandomState = dict[str, Any]
"""Tensors, ints, floats and lists only, so that ``torch.load(weights_only=True)`` reads it."""


def random_state(devices: Sequence[torch.device]) -> RandomState:
    """Return the state of torch (CPU and the given CUDA devices), ``random`` and NumPy."""
    version, words, gauss = random.getstate()
    name, key, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device) for device in devices],
        "python": [version, list(words), gauss],
        "numpy": [str(name), np.asarray(key).tolist(), int(position), int(has_gauss), float(cached)],
    }


def set_random_state(state: RandomState, devices: Sequence[torch.device]) -> None:
    """Set what :func:`random_state` returned; devices beyond those saved keep their state."""
    torch.set_rng_state(state["torch"].cpu())
    for saved, device in zip(state["cuda"], devices, strict=False):
        torch.cuda.set_rng_state(saved.cpu(), device)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, key, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(key, dtype=np.uint32), position, has_gauss, cached))


def cuda_devices(trainer: Trainer) -> list[torch.device]:
    """Return the CUDA devices in use by this process, its own first."""
    root = trainer.strategy.root_device
    held = {parameter.device for parameter in trainer.lightning_module.parameters()} | {root}
    return sorted((device for device in held if device.type == "cuda"), key=lambda d: (d != root, d.index or 0))
