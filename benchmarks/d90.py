"""The intrinsic dimension of one small task, on a network that was trained on related data and on one that was not.

The task is to tell the handwritten digits 5 to 9 apart (8 × 8 pixels; scikit-learn has them). One network was trained
to tell all ten apart before, on other images, and gets a new last layer; the other one has random weights. Both are
tuned in random subspaces (DID) of all their weights, and evaluated by accuracy on images that neither has seen.

    python benchmarks/d90.py --plot d90.svg                  # about two minutes on one CPU core
    python benchmarks/d90.py --seeds 0,1,2,3,4 --folder runs    # goes on where it was
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_pet import IntrinsicDimensionCallback, apply
from lightning_pet.report.dimension import Dimension, Runs, plot_dimension, search, sentence, show_dimension

WIDTH = 200
FULL_RATE = 2e-3
LARGEST_RATE = 0.1


def digits(part: int, low: int = 0) -> tuple[Tensor, Tensor]:
    """One of three parts of the images, from a digit on, and their labels."""
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(values) for values in load_digits(return_X_y=True))
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[part::3]
    rows = rows[labels[rows] >= low]
    return images[rows].float() / 16, labels[rows] - low


def network(seed: int, classes: int = 5) -> nn.Sequential:
    """Three layers with random weights."""
    torch.manual_seed(seed)
    layers = [nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes)]
    return nn.Sequential(*layers)


def train(model: nn.Module, x: Tensor, y: Tensor, rate: float, steps: int, seed: int) -> None:
    """AdamW with one cycle of the learning rate."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=generator)
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


class Task:
    """Tunes one network in a subspace, and evaluates it."""

    def __init__(self, related: bool, steps: int) -> None:
        self.related, self.steps = related, steps
        self.data = (*digits(1, 5), *digits(2, 5))

    def base(self, seed: int) -> nn.Sequential:
        """The network before tuning."""
        model = network(seed)
        if self.related:
            trained = network(seed, classes=10)
            train(trained, *digits(0), FULL_RATE, self.steps, seed)
            model = nn.Sequential(*trained[:-1], model[-1])
        return model

    def __call__(self, d: int | None, seed: int) -> float:
        """Accuracy after tuning; of the network as it is for d = 0."""
        model, rate = self.base(seed), FULL_RATE
        if d:
            apply(model, [IntrinsicDimensionCallback(d=d, structure_aware=False, seed=seed)])
            # So that a step moves a weight of the middle layer as far as in full fine-tuning, within bounds.
            rate = min(FULL_RATE * math.sqrt(WIDTH * WIDTH / d), LARGEST_RATE)
        x, y, unseen, answers = self.data
        if d != 0:
            train(model, x, y, rate, self.steps, seed)
        with torch.no_grad():
            return float((model(unseen).argmax(-1) == answers).float().mean())


def main() -> None:
    """Search on both networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--smallest", type=int, default=4)
    parser.add_argument("--largest", type=int, default=50_000)
    parser.add_argument("--resolution", type=float, default=1.25)
    parser.add_argument("--folder", type=Path, default=Path(), help="for the records of finished runs")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Dimension] = {}
    for label in ("trained on ten digits", "random weights"):
        task = Task(label != "random weights", options.steps)
        found[label] = search(
            task,
            Runs(options.folder / f"d90_{label.replace(' ', '_')}.json", {"steps": options.steps}),
            seeds=options.seeds,
            smallest=options.smallest,
            largest=options.largest,
            resolution=options.resolution,
        )
        show_dimension(found[label], f"{label}: accuracy")
    for label, curve in found.items():
        print(f"{label}: {sentence(curve)}")
    if options.plot:
        plot_dimension(found, "accuracy on 5 to 9", options.plot)


if __name__ == "__main__":
    main()
