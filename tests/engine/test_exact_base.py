"""``base_check="exact"``: every byte of the base, on request."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_pet import BaseMismatchError, LoRACallback, apply, load_delta, save_delta


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))


def test_one_changed_weight_is_found_only_by_the_exact_check(tmp_path: Path) -> None:
    model = net()
    apply(model, [LoRACallback(r=2, target_modules="0")])
    for exact in (False, True):
        save_delta(model, tmp_path / f"{exact}.pet.safetensors", exact=exact)
    changed = net()
    with torch.no_grad():
        # Sampled values are few against 4,096: change one row's end until the sample misses it.
        changed[0].weight[0, 0] += 1e-3
    found = []
    for path, check in ((f"{e}.pet.safetensors", c) for e in (False, True) for c in ("error", "exact")):
        try:
            load_delta(changed, tmp_path / path, base_check=check).remove()
            found.append("loaded")
        except BaseMismatchError as error:
            found.append("no digest" if "cannot be answered" in str(error) else "different")
    assert found[1] in ("no digest", "different")
    assert found[3] == "different"
    assert not any("pet" in name for name, _ in changed.named_modules())
    load_delta(net(), tmp_path / "True.pet.safetensors", base_check="exact")


def test_a_run_can_ask_for_it(tmp_path: Path) -> None:
    def fit(path: Path | None, change: float) -> pl.Trainer:
        torch.manual_seed(0)
        module = BoringModel()
        with torch.no_grad():
            module.layer.weight.add_(change)
        callback = LoRACallback(r=1, target_modules="layer", base_check="exact", verbose=False)
        trainer = pl.Trainer(
            max_steps=1 if path is None else 2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback],
        )
        trainer.fit(module, ckpt_path=path)
        return trainer

    path = tmp_path / "run.ckpt"
    fit(None, 0.0).save_checkpoint(path)
    assert torch.load(path, weights_only=True)["lightning_pet"]["base"]["exact"]
    fit(path, 0.0)
    with pytest.raises(BaseMismatchError):
        fit(path, 1e-7)
