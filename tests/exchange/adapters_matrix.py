"""The exchange with the adapters library: its folders with random values, and what its models returned for them."""

import tempfile
from pathlib import Path

from lightning_pet import load_delta
from tests.exchange.test_adapters_reading import CONFIGS, config_of, written
from tests.methods.adapters_files import ARCHITECTURES, read

BOUND = 1e-5


def difference(architecture: str, method: str) -> float:
    """Between what its model returned and what a folder of it gives here."""
    reference = read(architecture, method)
    with tempfile.TemporaryDirectory() as parent:
        folder = written(Path(parent) / "folder", config_of(architecture, method), reference.delta)
        load_delta(reference.model, folder, base_check="off")
    return float((reference.run() - reference.output).abs().max())


def adapters_rows(bad: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The heads and rows of its table; cells that are not equal are added to ``bad``."""
    rows: dict[str, list[str]] = {}
    for method in CONFIGS:
        found = {architecture: difference(architecture, method) for architecture in ARCHITECTURES}
        bad += [f"{method} of adapters on {name}" for name, value in found.items() if value > BOUND]
        rows[method] = [f"{value:.0e}".replace("e-0", "e-") if value else "0" for value in found.values()]
    return ["method", *ARCHITECTURES], rows
