"""Time and memory of one random projection and of its backward pass, by size: n log n, with nothing stored.

python benchmarks/fastfood.py                        # up to 1e8 numbers on one CPU thread, about a minute
python benchmarks/fastfood.py --device cuda --largest 8
python benchmarks/fastfood.py --json fastfood.json
"""

import argparse
import json
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lightning_pet.layers.fastfood import fastfood, fastfood_transposed, padded_length


def seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Least time of several runs, after one that warms up."""
    best = math.inf
    for turn in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start) if turn else best
    return best


def peak_mib(device: str) -> float:
    """Largest memory so far, in MiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(numel: int, d: int, device: str, repeats: int) -> dict[str, float]:
    """One row of the table."""
    vector = torch.randn(d, device=device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak_mib(device)
    forward = seconds(lambda: fastfood(vector, numel, 1), device, repeats)
    extra = peak_mib(device) - before
    gradient = torch.randn(numel, device=device)
    backward = seconds(lambda: fastfood_transposed(gradient, d, 1), device, repeats)
    length = padded_length(d, numel)
    return {
        "numel": numel,
        "padded": length,
        "forward_s": forward,
        "backward_s": backward,
        "ns_per_n_log_n": forward * 1e9 / (length * math.log2(length)),
        "peak_mib": extra,
        "padded_mib": length * 4 / 2**20,
    }


def main() -> None:
    """Measure every size, smallest first, as the memory of a process never falls."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=20_000, help="trained numbers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smallest", type=int, default=4, help="power of ten")
    parser.add_argument("--largest", type=int, default=8, help="power of ten")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    heads = ("forward", "backward", "ns/(n log n)", "peak MiB", "of padded")
    print(f"{'numbers':>12}{'padded':>12}" + "".join(f"{head:>14}" for head in heads))
    for power in range(options.smallest, options.largest + 1):
        row = measure(10**power, options.d, options.device, options.repeats)
        rows.append(row)
        print(
            f"{row['numel']:>12,}{row['padded']:>12,}{row['forward_s']:>12.4f} s{row['backward_s']:>12.4f} s"
            f"{row['ns_per_n_log_n']:>14.3f}{row['peak_mib']:>14.0f}{row['peak_mib'] / row['padded_mib']:>14.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
