"""What a delta file or checkpoint holds, for people and for programs."""

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_pet.insertion.prepare import is_shared
from lightning_pet.model.naming import CHILD
from lightning_pet.store.reader import Stored, read
from lightning_pet.training.titled import show_table


def summarize(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file completely (every digest is verified) and describe it in plain types.

    Returns:
        ``methods`` (name, options, places, parameters), ``tensors`` (shape and norm by name), ``bytes``,
        ``base`` (fingerprint digests).

    Raises:
        DeltaFileError: if the file is damaged or not ours.
    """
    stored = read(path)
    return {
        "path": str(path),
        "bytes": Path(path).stat().st_size,
        "parameters": sum(tensor.numel() for tensor in stored.tensors.values()),
        "methods": [_method(stored, index) for index in range(len(stored.methods))],
        "tensors": {
            name: {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "norm": _norm(tensor),
            }
            for name, tensor in sorted(stored.tensors.items())
        },
        "base": None if stored.base is None else {"structure": stored.base.structure, "sample": stored.base.sample},
    }


def _norm(tensor: Any) -> float:
    return float(tensor.double().norm())


def _method(stored: Stored, index: int) -> dict[str, Any]:
    record = stored.methods[index]
    own = [tensor for name, tensor in stored.tensors.items() if _owner(stored, name) == index]
    return {
        "method": record.method,
        "name": record.name,
        "config": dict(record.config),
        "places": [target.path for target in record.targets if not is_shared(target) and target.role != "head"],
        "parameters": sum(tensor.numel() for tensor in own),
    }


def _owner(stored: Stored, name: str) -> int | None:
    """Index of the method that a tensor belongs to; ``None`` for trained base tensors."""
    host, _, rest = f".{name}".rpartition(f".{CHILD}.")
    key = rest.partition(".")[0]
    fits = {
        len(f"{record.method}_{record.name}"): index
        for index, record in enumerate(stored.methods)
        if f"{key}_".startswith(f"{record.method}_{record.name}_")  # a suffix tells parts of one projection apart
        and host.removeprefix(".") in {target.module for target in record.targets}
    }
    return fits[max(fits)] if fits else None


def print_summary(summary: dict[str, Any]) -> None:
    """Print a summary as tables."""
    console = Console()
    console.print(f"{summary['path']}: {summary['bytes']:,} bytes, {summary['parameters']:,} numbers", soft_wrap=True)
    for method in summary["methods"]:
        table = Table(show_header=False)
        table.add_column("key")
        table.add_column("value")
        table.add_row(
            "places", f"{len(method['places'])}, the first {method['places'][0] if method['places'] else '-'}"
        )
        table.add_row("parameters", f"{method['parameters']:,}")
        for option, value in method["config"].items():
            if value is not None:
                table.add_row(option, str(value))
        show_table(f"{method['method']}:{method['name']}", table, console)
    heads = [name for name in summary["tensors"] if ".pet." not in f".{name}"]
    if heads:
        console.print(f"trained as they are: {', '.join(heads)}", soft_wrap=True)
    largest = sorted(summary["tensors"].items(), key=lambda item: -item[1]["norm"])[:5]
    console.print("largest norms: " + ", ".join(f"{name} {info['norm']:.3g}" for name, info in largest), soft_wrap=True)
    if summary["base"]:
        console.print(f"base: structure {summary['base']['structure'][:12]}, sample {summary['base']['sample'][:12]}")
