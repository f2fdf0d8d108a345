"""Run campaigns: ``python -m benchmarks.crash [NAME …] [--short] [--results PATH] [--page PATH]``.

Without names, all of them run. Results are kept by campaign in a JSON file, so that they can be run one by one; from
that file the page ``docs/reliability.md`` is written.
"""

import argparse
import json
import logging
import os
import platform
import resource
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import transformers

from benchmarks.crash import (
    ROOT,
    chain,
    command,
    damage,
    full_disk,
    interruptions,
    kills,
    page,
    power_loss,
    ranks,
    syscalls,
    verdict,
)

Campaign = Callable[[Path, bool], Iterator[dict[str, Any]]]
CAMPAIGNS: dict[str, Campaign] = {
    "kills": kills.run,
    "chain": chain.run,
    "pairs": chain.run_pairs,
    "command": command.run,
    "syscalls": syscalls.run,
    "power_loss": power_loss.run,
    "full_disk": full_disk.run,
    "damage": damage.run,
    "interruptions": interruptions.run,
    "ranks": ranks.run,
}
RESULTS = Path(__file__).with_name("results.json")
PAGE = ROOT / "docs" / "reliability.md"


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crash", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"campaigns: {', '.join(CAMPAIGNS)}")
    parser.add_argument("--short", action="store_true", help="what the test suite runs")
    parser.add_argument("--results", type=Path, default=None, help=f"default: {RESULTS.relative_to(ROOT)} in full mode")
    parser.add_argument(
        "--page", type=Path, default=None, help=f"write the page; {PAGE.relative_to(ROOT)} in full mode"
    )
    options = parser.parse_args()
    if unknown := set(options.names) - CAMPAIGNS.keys():
        parser.error(f"there are no campaigns {', '.join(sorted(unknown))}; choose from {', '.join(CAMPAIGNS)}")
    if options.results is None:
        options.results = RESULTS if not options.short else Path(tempfile.mkdtemp()) / RESULTS.name
    _quiet()
    for name in options.names or CAMPAIGNS:
        with tempfile.TemporaryDirectory(prefix="crash-") as folder:
            start, rows = _cpu_s(), []
            for row in CAMPAIGNS[name](Path(folder), options.short):
                rows.append(row)
                print(name, *(f"{key}={value}" for key, value in row.items()), flush=True)
                _keep(options.results, name, {"rows": rows, "cpu_s": round(_cpu_s() - start), **_versions()})
    results = json.loads(options.results.read_text())
    if options.page or not options.short:
        (options.page or PAGE).write_text(page.text(results), encoding="utf-8")
    if found := verdict.faults(results):
        sys.exit("\n".join(found))


def _cpu_s() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _keep(path: Path, name: str, found: dict[str, Any]) -> None:
    """Replace the results of one campaign (several commands may run at a time)."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**kept, name: found}, indent=1, sort_keys=True) + "\n")


def _versions() -> dict[str, str]:
    import lightning

    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__.partition("+")[0],
        "lightning": lightning.__version__,
        "transformers": transformers.__version__,
    }


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    main()
