"""A script under one engine, in two processes."""

import json
from pathlib import Path
from typing import Any

from deepspeed_operator import require_deepspeed
from launch import launch


def on_engine(
    script: str, engine: str, single: Path, folder: Path, timeout: float, words: tuple[str, ...] = ()
) -> tuple[Path, list[dict[str, Any]]]:
    """Run ``script FOLDER ENGINE`` in two processes; return the folder, and what each printed as ``FOUND`` and JSON.

    Args:
        script: a Python file.
        engine: a name that ``engines.py`` knows.
        single: folder of the runs of one process, which the script finds as ``FOLDER/single``.
        folder: where it writes.
        timeout: seconds.
        words: further arguments.
    """
    if engine.startswith("zero"):
        require_deepspeed()
    (folder / "single").symlink_to(single)
    codes, outputs = launch([script, str(folder), engine, *words], timeout=timeout)
    assert codes == [0, 0], "\n".join(output[-3000:] for output in outputs)
    return folder, [json.loads(output.split("FOUND ")[1].splitlines()[0]) for output in outputs]
