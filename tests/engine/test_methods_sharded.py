"""Every method on DDP and on every engine that shards: the losses of one process and an exact resume, or a refusal."""

import json
import re
import sys
from pathlib import Path

import pytest
from launch import launch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(Path(__file__).with_name("method_runs.py"))
SHORT = ["Adapter", "Compacter", "Prefix tuning"]  # a unit of its own, state that is shared, a place without weight
ENGINES = ["ddp", "fsdp2", "fsdp", "zero2", "zero3"]
RESUMED = 2


def campaign(folder, engine, methods):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (pip install lightning-pet[deepspeed])")
    found = []
    for name, processes in (("one", 1), (engine, 2)):
        codes, outputs = launch([SCRIPT, str(folder), name, *methods], n=processes, timeout=500)
        assert codes == [0] * processes, "\n".join(output[-3000:] for output in outputs)
        lines = [json.loads(line[6:]) for line in outputs[0].splitlines() if line.startswith("FOUND ")]
        found.append({line["method"]: line for line in lines})
    return found


def rows():
    """The table of methods in the documentation: name → whether it trains under engines that shard."""
    text = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8").split("## Methods")[1]
    return {m[1]: m[2] == "✓" for m in re.finditer(r"^\| ([\w ,-]+?) \| ✓ \| (✓|–) \|$", text, re.M)}


def check(engine, one, two):
    assert one.keys() == two.keys()
    for name, result in two.items():
        if engine != "ddp" and not rows()[name]:
            assert "not tested with parameters that are sharded" in result["error"]
            continue
        assert result["losses"] == pytest.approx(one[name]["losses"], rel=1e-5), name
        assert result["resumed"] == result["losses"][RESUMED:], name


def test_methods_of_every_kind(tmp_path):
    check("fsdp", *campaign(tmp_path, "fsdp", SHORT))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_all_methods(engine, tmp_path):
    check(engine, *campaign(tmp_path, engine, []))


def test_the_documented_table():
    """What the page says is what the classes say, and the campaign runs all of them."""
    sys.path.append(str(ROOT))
    from tests.engine.method_runs import METHODS

    assert {name: build().shards for name, build in METHODS.items()} == rows()
