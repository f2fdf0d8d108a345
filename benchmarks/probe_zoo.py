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
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_pet.core.inputs import candidate_forwards
from lightning_pet.core.opinions import merge
from lightning_pet.core.probe import analyse, probe
from lightning_pet.core.structure import Structure
from lightning_pet.errors import TargetError

ROLES = ("attention.q", "attention.k", "attention.v", "attention.o", "ffn.up", "ffn.down")
ATTENTION = ROLES[:4]
SECONDS = 90

# (pattern of a configuration attribute, value). The first match wins.
SHRINK: tuple[tuple[str, int], ...] = (
    (r"(vocab_size|vocabulary_size)$", 120),
    (r"(num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_k_experts)$", 2),
    (r"(n_routed_experts|num_local_experts|num_experts|moe_num_experts|n_experts)$", 4),
    (r"(n_group|topk_group|n_groups|num_groups)$", 1),
    (r"(q_lora_rank|kv_lora_rank)$", 16),
    (r"(qk_rope_head_dim|qk_nope_head_dim|v_head_dim|head_dim|d_kv|attention_head_dim|kv_channels|qk_head_dim)$", 8),
    (r"(rotary_dim|d_head)$", 8),
    (r"(num_key_value_heads|num_kv_heads|multi_query_group_num|n_head_kv)$", 2),
    (r"(head|heads|n_head|num_attention_heads|num_heads)$", 4),
    (r"(num_(hidden_)?layers|n_layers?|num_(en|de)coder_layers|(en|de)coder_layers|depth|num_blocks)$", 2),
    (r"(num_.*_layers|.*_depth|n_.*layers)$", 2),
    (r"(intermediate_size|ffn_dim|d_ff|n_inner|(en|de)coder_ffn_dim|ffn_hidden_size|mlp_dim)$", 48),
    (r"(.*_intermediate_size|.*feedforward_dim|dim_feedforward|hidden_dim|d_inner|hidden_mlp_dim)$", 48),
    (r"(hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|emb_dim|d_embed|projection_dim)$", 32),
    (r"(word_embed_proj_dim|.*_hidden_size|.*_hidden_dim|encoder_width|hidden_channels|width)$", 32),
    (r"(image_size|img_size|input_size)$", 32),
    (r"patch_size$", 8),
    (r"(max_position_embeddings|max_source_positions|max_target_positions|n_positions|n_ctx|max_seq_len)$", 64),
)
LAYERS = r"(num_(hidden_)?layers|n_layers?|num_(en|de)coder_layers|(en|de)coder_layers)$"
# Configurations whose sizes depend on each other need another choice: tried in this order until a forward runs.
CHOICES: tuple[dict[str, int | None], ...] = (
    {},
    {r"num_key_value_heads$": 4},
    {r"(head_dim|num_key_value_heads|num_kv_heads)$": None, r"(hidden_size|d_model|n_embd)$": 64},
    {r"(hidden_size|d_model|embed_dim|.*_hidden_size|dim|projection_dim)$": None, r"(image_size|patch_size)$": None},
    {LAYERS: None},
    {"layers only": 0},
)
DEEP: dict[str, int | None] = {LAYERS: 8}
LARGEST = 60_000_000


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


def running(
    name: str, result: dict[str, Any], choices: Sequence[dict[str, int | None]]
) -> tuple[nn.Module, Callable[[], Any]]:
    """The first choice of sizes whose model builds and runs, and its forward."""
    result["status"], first = "does not build", None
    for choice in choices:
        try:
            model = build(name, choice)
            if result["status"] == "does not build":
                result["status"], first = "does not run", None
            forward = working_forward(model)
        except TimeoutError:
            raise
        except Exception as error:
            first = first or error
        else:
            result["status"] = "probe failed"
            return model, forward
    raise first or RuntimeError("no choice of sizes")


def build(name: str, choice: dict[str, int | None]) -> nn.Module:
    """The architecture with a shrunk default configuration and random weights."""
    from transformers import AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = shrink(CONFIG_MAPPING[name], choice)
    with contextlib.suppress(Exception):
        config._attn_implementation = "eager"
    with torch.device("meta"), contextlib.suppress(NotImplementedError, RuntimeError):
        size = sum(p.numel() for p in AutoModel.from_config(config).parameters())
        if size > LARGEST:
            raise ValueError(f"{size:,} parameters are too many for this benchmark")
    model = AutoModel.from_config(config)
    model.eval()
    return model


def shrink(config_class: type, choice: dict[str, int | None]) -> Any:
    """An instance of the configuration with small sizes, also in nested configurations."""
    default = config_class()
    values: dict[str, Any] = {}
    nested_names = getattr(config_class, "sub_configs", {})
    for key, value in default.to_dict().items():
        if key not in nested_names and not key.startswith("_") and type(value) is int:
            small = smaller(key, value, choice)
            if small is not None:
                values[key] = small
    for key in nested_names:
        nested = getattr(default, key, None)
        if nested is not None and hasattr(nested, "to_dict"):
            values[key] = shrink(type(nested), choice)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        value = getattr(default, key, None)
        if isinstance(value, int) and value >= 120:
            values[key] = 1
    return config_class(**values)


def smaller(key: str, value: int, choice: dict[str, int | None]) -> int | None:
    """The small value of one attribute, ``None`` to keep the default."""
    if "layers only" in choice:
        return min(value, 2) if re.search(LAYERS, key) else None
    for pattern, size in (*choice.items(), *SHRINK):
        if re.match(pattern, key) or re.search(rf"_{pattern}", key):
            return None if size is None else size if pattern in choice else min(value, size)
    return None


def working_forward(model: nn.Module) -> Any:
    """The first forward that runs."""
    errors = []
    for forward in candidate_forwards(model):
        try:
            with torch.no_grad():
                forward()
        except Exception as error:
            errors.append(f"{type(error).__name__}: {str(error)[:150]}")
        else:
            return forward
    raise TargetError(errors[0] if errors else "no inputs are known for it")


@contextlib.contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Raise ``TimeoutError`` in the block after so many seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


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
