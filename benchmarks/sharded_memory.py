"""Peak memory of one of two processes that train a method on every weight, by engine.

A BERT of 6 layers and width 384 (11.2 million weights) and a batch so small that weights decide, AdamW, float32. The
peak is that of the process that has more, in the second and third step, above what it held before the model was built.

    python benchmarks/sharded_memory.py [--json PATH]
"""

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "engine"), str(ROOT / "benchmarks")]

ENGINES = ("ddp", "fsdp", "fsdp2", "zero2", "zero3")
METHODS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: _pet().LoRACallback(verbose=False),
    "intrinsic dimension": lambda: _pet().IntrinsicDimensionCallback(d=5000, modules_to_save=[], verbose=False),
    "diff pruning": lambda: _pet().DiffPruningCallback(modules_to_save=[], stages=(1, 0), plot=False, verbose=False),
    "diff pruning, after the cut": lambda: _pet().DiffPruningCallback(
        modules_to_save=[], stages=(0.25, 0.75), plot=False, verbose=False
    ),
    "full fine-tuning": lambda: _pet().FullFineTuningCallback(verbose=False),
}
STEPS, ROWS, LENGTH = 4, 2, 8


def _pet() -> Any:
    import lightning_pet

    return lightning_pet


def member(engine: str, method: str) -> float:
    """MiB of this process."""
    import lightning as L
    import torch
    from ddp_runs import trainer
    from engines import strategy_of
    from measuring import resident
    from torch import nn
    from torch.utils.data import DataLoader
    from transformers import BertConfig, BertForSequenceClassification
    from transformers.models.bert.modeling_bert import BertLayer

    class Classifier(L.LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(input_ids=batch, labels=batch[:, 0] % 2).loss

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                gc.collect()
                Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.peak = resident("VmHWM")

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-4, foreach=False)

    class Sharding(Classifier):
        def configure_model(self) -> None:
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            for layer in self.net.bert.encoder.layer:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    nn.Linear(64, 64)(torch.randn(64, 64)).sum().backward()
    options = {"auto_wrap_policy": {BertLayer}} if engine == "fsdp" else {}
    strategy = strategy_of(engine, **options)
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536)
    config.vocab_size = 1000
    gc.collect()
    before = resident("VmRSS")
    module = (Sharding if engine == "fsdp2" else Classifier)(BertForSequenceClassification(config))
    data = DataLoader(torch.randint(1, 1000, (2 * STEPS * ROWS, LENGTH)), batch_size=ROWS)
    fitted = trainer(METHODS[method](), strategy=strategy, devices=2, max_epochs=1, max_steps=STEPS)
    fitted.fit(module, data)
    return module.peak - before


def main() -> None:
    """Measure every cell in two processes, and print a table."""
    from launch import launch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--engines", nargs="*", default=ENGINES)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    options = parser.parse_args()
    env = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found: dict[str, dict[str, float]] = {}
    for method in options.methods:
        for engine in options.engines:
            codes, outputs = launch([__file__, "--member", engine, method], timeout=900, env=env)
            assert codes == [0, 0], outputs[0][-2000:]
            peaks = [float(output.split("PEAK ")[1].split()[0]) for output in outputs]
            found.setdefault(method, {})[engine] = max(peaks)
            print(f"{method}, {engine}: {max(peaks):.0f} MiB", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--member"]:
        print(f"PEAK {member(*sys.argv[2:4]):.1f}", flush=True)
    else:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        main()
