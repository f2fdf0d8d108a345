"""Campaigns that interrupt the library wherever it writes, and count what is torn, lost or different afterwards.

``python -m benchmarks.crash`` runs them in full and writes ``docs/reliability.md``; ``--short`` runs what the
test suite runs. They share their tiny models with ``tests/engine``.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "engine")]
