"""A CNN meets a new kind of images: LoRA on convolutions, then merged away.

A small network learns to tell four shapes drawn bright on dark. On dark shapes on a bright, noisy ground it fails. A
LoRA delta on its convolutions, trained on 256 such images, repairs that and is then merged: the result is the plain
network again, with other weights and no extra cost.

    python examples/vision.py                 # a few seconds after the imports, no download
"""

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pet import Adapted, LoRACallback

SIZE, SHAPES = 16, ("square", "disc", "cross", "bar")


def images(count: int, seed: int, shifted: bool) -> TensorDataset:
    """Images (count, 1, 16, 16) and the number of their shape."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(SHAPES), (count,), generator=random)
    centre = torch.randint(5, SIZE - 5, (count, 2, 1, 1), generator=random)
    radius = torch.randint(3, 6, (count, 1, 1), generator=random)
    grid = torch.arange(SIZE)
    down, right = (grid.view(1, -1, 1) - centre[:, 0]).abs(), (grid.view(1, 1, -1) - centre[:, 1]).abs()
    inside = (down <= radius) & (right <= radius)
    drawn = torch.stack(
        [inside, down**2 + right**2 <= radius**2, inside & ((down < 1) | (right < 1)), inside & (down <= 1)], dim=1
    )
    image = drawn[torch.arange(count), labels].float().unsqueeze(1)
    if shifted:
        image = 1 - 0.7 * image + 0.15 * torch.randn(image.shape, generator=random)
    return TensorDataset(image, labels)


class ShapeNet(nn.Module):
    """Images (batch, 1, 16, 16) to logits (batch, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.classifier = nn.Linear(64, len(SHAPES))

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.features(image).amax((2, 3)))


class Vision(L.LightningModule):
    """An ordinary LightningModule. Nothing in it knows of LoRA."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def fit(module: Vision, data: TensorDataset, epochs: int, callbacks: list[L.Callback]) -> None:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, callbacks=callbacks, **quiet)
    trainer.fit(module, DataLoader(data, batch_size=32, shuffle=True))


@torch.no_grad()
def accuracy(net: nn.Module, data: TensorDataset) -> float:
    return (net.eval()(data.tensors[0]).argmax(-1) == data.tensors[1]).float().mean().item()


def main() -> None:
    L.seed_everything(0)
    clean, shifted = (images(1000, seed=1, shifted=flag) for flag in (False, True))

    net = ShapeNet()
    fit(Vision(net, lr=3e-3), images(2048, seed=2, shifted=False), epochs=6, callbacks=[])
    print(f"base:      clean {accuracy(net, clean):.2f}  shifted {accuracy(net, shifted):.2f}")

    # Three convolutions by name. The classifier is found by itself: it trains as it is and is saved with the delta.
    lora = LoRACallback(r=8, alpha=16, target_modules=["re:features\\.\\d+"])
    fit(Vision(net, lr=1e-2), images(256, seed=3, shifted=True), epochs=25, callbacks=[lora])
    adapted = Adapted(net)
    print(f"with LoRA: clean {accuracy(net, clean):.2f}  shifted {accuracy(net, shifted):.2f}")
    print(f"           {adapted.plan().trainable:,} numbers trained, beside {adapted.plan().base:,} of the base")

    with torch.no_grad():
        attached = net(shifted.tensors[0])
        adapted.merge_()
        error = (net(shifted.tensors[0]) - attached).abs().max().item()
    print(f"merged:    clean {accuracy(net, clean):.2f}  shifted {accuracy(net, shifted):.2f}")
    print(f"           outputs differ by at most {error:.0e}")
    assert not any("pet" in name for name, _ in net.named_modules())


if __name__ == "__main__":
    main()
