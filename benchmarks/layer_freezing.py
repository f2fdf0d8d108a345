"""Time of a training step by the number of trained layers: below the lowest of them there is no backward work.

    python benchmarks/layer_freezing.py [--layers 12] [--width 256]

Prints one row per choice: the fastest step in milliseconds, its share of full fine-tuning's, and what remains
for the backward pass (the step without forward and optimizer), as a share of full fine-tuning's. With m of L
layers trained that share should be near m / L: a forward of L layers, and a backward of m.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from lightning_pet import FullFineTuningCallback, LayerFreezingCallback, PETCallback, apply


def build(layers: int, width: int) -> nn.Module:
    """A BERT of the given depth and width."""
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=4, intermediate_size=4 * width, vocab_size=1000
    )
    return BertForSequenceClassification(config)


def least_ms(run: Callable[[], object], repeat: int) -> float:
    """CPU time of the fastest of some calls: the one that others disturbed least."""
    times = []
    for _ in range(repeat):
        start = time.process_time()
        run()
        times.append(1e3 * (time.process_time() - start))
    return min(times)


def measure(callback: PETCallback, args: argparse.Namespace) -> tuple[float, float]:
    """Time of forward and of forward with backward."""
    model = build(args.layers, args.width).train()
    apply(model, [callback])
    ids = torch.randint(0, 1000, (args.batch, args.tokens), generator=torch.Generator().manual_seed(1))
    labels = torch.zeros(args.batch, dtype=torch.long)

    def forward() -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=ids, labels=labels).loss
        return loss

    def step() -> None:
        model.zero_grad(set_to_none=True)
        forward().backward()

    return least_ms(forward, args.repeat), least_ms(step, args.repeat)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("layers", 12), ("width", 256), ("batch", 8), ("tokens", 64), ("repeat", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    full_forward, full_step = measure(FullFineTuningCallback(), args)
    print(f"{'trained layers':<16}{'step ms':>9}{'of full':>9}{'backward of full':>18}{'m / L':>7}")
    print(f"{'all, full':<16}{full_step:>9.1f}{1:>9.2f}{1:>18.2f}{1:>7.2f}")
    for last in sorted({args.layers, args.layers // 2, 2, 1, 0}, reverse=True):
        forward, step = measure(LayerFreezingCallback(last), args)
        backward = (step - forward) / (full_step - full_forward)
        print(f"{last:<16}{step:>9.1f}{step / full_step:>9.2f}{backward:>18.2f}{last / args.layers:>7.2f}")


if __name__ == "__main__":
    main()
