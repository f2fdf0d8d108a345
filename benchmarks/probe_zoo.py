"""How often the structure probe finds the roles: every transformers architecture that builds and runs tiny.

Each architecture is built on the CPU from its default configuration shrunk to two layers of width 32, with random
weights, and analysed once by the probe and once by names alone.

    python benchmarks/probe_zoo.py                      # all architectures
    python benchmarks/probe_zoo.py --limit 50
    python benchmarks/probe_zoo.py --models bert,gpt2,t5 --json zoo.json
"""

import argparse
import contextlib
import gc
import io
import json
import logging
import re
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from zoo import CHOICES, DEEP, SECONDS, deadline, running

from lightning_pet.model.structure import Structure
from lightning_pet.probe.probe import analyse, probe
from lightning_pet.probe.roles import merge

ROLES = ("attention.q", "attention.k", "attention.v", "attention.o", "ffn.up", "ffn.down")
ATTENTION = ROLES[:4]


def main() -> None:
    """Run the zoo and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, help="only the first N architectures")
    parser.add_argument("--models", help="comma-separated model types")
    parser.add_argument("--json", type=Path, help="write every result here")
    options = parser.parse_args()
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    transformers.logging.set_verbosity(logging.CRITICAL)
    warnings.simplefilter("ignore")
    types = options.models.split(",") if options.models else sorted(MODEL_MAPPING_NAMES)[: options.limit]
    results = []
    for name in types:
        result = study(name)
        gc.collect()
        results.append(result)
        print(line(result), flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    print(summary(results))


def study(name: str) -> dict[str, Any]:
    """Build one architecture and compare both sources."""
    torch.manual_seed(0)
    result: dict[str, Any] = {"model": name, "status": "ok"}
    start = time.perf_counter()
    try:
        with deadline(SECONDS), contextlib.redirect_stderr(io.StringIO()):
            model, forward = running(name, result, CHOICES)
            seen = probe(model, forward)
            if not seen.attention:  # perhaps a hybrid with its attention further up
                with contextlib.suppress(Exception):
                    model, forward = running(name, result, ({**DEEP}, {**DEEP, r"num_key_value_heads$": 4}))
                    seen = probe(model, forward)
            result["attention"] = has_attention(model)
            result["seconds"] = round(time.perf_counter() - start, 2)
            result |= describe(seen, merge(model, None), analyse(model, forward))
            result["status"] = "ok"
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {str(error)[:200]}"
    return result


def describe(seen: Structure, named: Structure, both: Structure) -> dict[str, Any]:
    """What each source found."""
    return {
        "probe": roles(seen),
        "names": roles(named),
        "either": roles(both),
        "sites": dict(Counter(site.kind for site in seen.sites)),
        "cores": len(seen.attention),
        "fused": {f"{target.module}.{target.role}": target.rows for target in seen.targets if target.rows is not None},
        "unresolved": [f"{target.path} {target.role}" for target in both.unresolved],
        "disagreements": list(both.disagreements),
        "missed": sorted(missed(seen, named)),
    }


def missed(seen: Structure, named: Structure) -> set[str]:
    """Places where names see a role and the probe sees nothing."""
    known = {target.path for target in (*seen.targets, *seen.unresolved)}
    return {f"{target.path} {target.role}" for target in named.targets if target.path not in known}


def roles(structure: Structure) -> list[str]:
    """Roles found; a fused projection counts although its rows are unknown."""
    return sorted({str(target.role) for target in (*structure.targets, *structure.unresolved)})


def has_attention(model: nn.Module) -> bool:
    """A class of the model calls itself attention."""
    return any(re.search("attention|attn", type(module).__name__, re.I) for module in model.modules())


def line(result: dict[str, Any]) -> str:
    """One line per architecture."""
    if result["status"] != "ok":
        return f"{result['model']:32} {result['status']}: {result.get('error', '')[:150]}"
    marks = "".join(
        {(True, True): "B", (True, False): "p", (False, True): "n", (False, False): "-"}[
            role in result["probe"], role in result["names"]
        ]
        for role in ROLES
    )
    return (
        f"{result['model']:32} qkvoud {marks}  sites {result['sites']}  cores {result['cores']}"
        f"  unresolved {len(result['unresolved'])}  disagree {len(result['disagreements'])}"
    )


def summary(results: list[dict[str, Any]]) -> str:
    """The rates."""
    ran = [r for r in results if r["status"] in ("ok", "probe failed")]
    good = [r for r in results if r["status"] == "ok"]
    attention = [r for r in good if set(ATTENTION) & set(r["either"])]
    rows = [
        f"architectures {len(results)}, build {sum(r['status'] != 'does not build' for r in results)}, run {len(ran)}, "
        f"probed {len(good)}, with attention roles {len(attention)}"
    ]
    for source in ("probe", "names", "either"):
        counts = {role: sum(role in r[source] for r in attention) for role in ROLES}
        counts["all of q,k,v,o"] = sum(set(ATTENTION) <= set(r[source]) for r in attention)
        rows.append(f"{source:8} " + "  ".join(f"{role} {n}" for role, n in counts.items()))
    blind = [r["model"] for r in good if r["attention"] and r not in attention]
    lacking = [r["model"] for r in attention if not set(ATTENTION) <= set(r["either"])]
    rows += [
        f"incomplete by either: {', '.join(lacking) or 'none'}",
        f"an attention class, but no role: {', '.join(blind) or 'none'}",
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    main()
