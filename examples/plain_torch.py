"""One base model, two behaviours: LoRA on a LightningModule around plain torch layers.

A small transformer learns to name the largest of twelve digits. A LoRA delta then teaches the same, frozen model to
name the smallest. With the delta switched off it still names the largest, bit for bit as before.

    python examples/plain_torch.py            # a few seconds after the imports, no download
"""

import tempfile
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pet import LoRACallback, load_delta, save_delta

DIGITS, LENGTH, WIDTH = 10, 12, 64


class Net(nn.Module):
    """Digits (batch, 12) to logits (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(DIGITS, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, nhead=4, dim_feedforward=128, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, DIGITS)

    def forward(self, digits: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(digits)).mean(1))


class Classifier(L.LightningModule):
    """An ordinary LightningModule. Nothing in it knows of LoRA."""

    def __init__(self, lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Net()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def dataset(size: int, seed: int, largest: bool) -> TensorDataset:
    digits = torch.randint(DIGITS, (size, LENGTH), generator=torch.Generator().manual_seed(seed))
    # A random subset of the digits, else the largest of twelve would nearly always be 9.
    low, high = torch.randint(DIGITS, (2, size, 1), generator=torch.Generator().manual_seed(seed + 1)).sort(0).values
    digits = low + digits % (high - low + 1)
    return TensorDataset(digits, digits.max(1).values if largest else digits.min(1).values)


@torch.no_grad()
def accuracy(module: Classifier, data: TensorDataset) -> float:
    digits, labels = data.tensors
    return (module.eval().net(digits).argmax(-1) == labels).float().mean().item()


def fit(module: Classifier, data: TensorDataset, epochs: int, **trainer: object) -> None:
    loader = DataLoader(data, batch_size=64, shuffle=True)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, **quiet, **trainer).fit(module, loader)


def main() -> None:
    L.seed_everything(0)
    largest, smallest = (dataset(1000, seed=100, largest=flag) for flag in (True, False))

    # 1. The base model. In real life it is pretrained and large.
    module = Classifier()
    fit(module, dataset(6400, seed=0, largest=True), epochs=3, enable_checkpointing=False)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    print(f"base:      largest {accuracy(module, largest):.2f}  smallest {accuracy(module, smallest):.2f}")

    # 2. The delta. The layers of nn.MultiheadAttention are named like any others; the head trains as it is.
    lora = LoRACallback(
        r=8, alpha=16, target_modules=["in_proj_weight", "out_proj", "linear1", "linear2"], modules_to_save=["head"]
    )
    with tempfile.TemporaryDirectory() as folder:
        module.hparams.lr = 5e-3
        fit(module, dataset(3200, seed=50, largest=False), epochs=3, callbacks=[lora], default_root_dir=folder)
        (checkpoint,) = Path(folder).rglob("*.ckpt")
        file = Path(folder) / "smallest.pet.safetensors"
        size = save_delta(module, file)
        print(f"files:     checkpoint {checkpoint.stat().st_size / 1024:.0f} KiB, delta {size / 1024:.0f} KiB")
        print(f"with LoRA: largest {accuracy(module, largest):.2f}  smallest {accuracy(module, smallest):.2f}")

        # 3. Later, elsewhere: the base and the file. A damaged file or another base would be an error.
        other = Classifier()
        other.load_state_dict(before)
        adapted = load_delta(other, file)
    print(f"loaded:    largest {accuracy(other, largest):.2f}  smallest {accuracy(other, smallest):.2f}")
    with adapted.disabled():
        print(f"disabled:  largest {accuracy(other, largest):.2f}  smallest {accuracy(other, smallest):.2f}")
    adapted.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    print("removed:   every tensor is bit for bit that of the base")


if __name__ == "__main__":
    main()
