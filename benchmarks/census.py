"""On how many architectures each method works: every transformers architecture that runs tiny, and plain torch.

For each architecture and method the census checks that the fresh delta leaves the output as it promises, that a moved
delta has an effect, that every delta parameter gets a gradient, that base names stay, and that removal gives the base
back bit for bit; for models that generate, that cached generation equals uncached. An architecture that a method does
not serve must be refused by a ``PETError`` before anything changes: that is written down as *refused* with its reason.
Everything else is a *failure*.

    python benchmarks/census.py --json census.json --markdown docs/census.md      # all, about an hour of one core
    python benchmarks/census.py --short                                           # about forty of all kinds
    python benchmarks/census.py --models bert,gpt2 --methods lora,prefix
"""

import argparse
import contextlib
import gc
import io
import json
import logging
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import plain_models
import torch
from census_checks import Method, Subject, idle_parameters, outcome, output
from torch import nn
from zoo import CHOICES, DEEP, SECONDS, deadline, running, working_forward

import lightning_pet
from lightning_pet.probe.probe import analyse

# One architecture per kind of thing that can go wrong; the short census runs these and the plain models.
# fmt: off
SHORT = (
    "albert", "bart", "beit", "bert", "bloom", "clip", "convnext", "deberta-v2", "deit", "distilbert", "electra",
    "falcon", "gemma2", "gemma3_text", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "hubert",
    "jamba", "llama", "longt5", "mamba", "mbart", "mistral", "mixtral", "modernbert", "mpt", "opt", "phi3", "qwen2",
    "qwen3", "resnet", "roberta", "swin", "t5", "vit", "wav2vec2", "whisper", "xlnet",
)
# fmt: on


METHODS = [
    Method("lora", "LoRACallback", {"r": 2, "target_modules": ["all-linear"]}, generates=True),
    Method("houlsby", "AdapterCallback", {"bottleneck_size": 4, "placement": "houlsby"}, None, needs="attention"),
    Method("pfeiffer", "AdapterCallback", {"bottleneck_size": 4, "placement": "pfeiffer"}, None, needs="attention"),
    Method("parallel", "AdapterCallback", {"bottleneck_size": 4, "placement": "parallel"}, None, needs="attention"),
    Method("compacter", "CompacterCallback", {"bottleneck_size": 4, "phm_dim": 2}, None, needs="attention"),
    Method("adapter_bias", "AdapterBiasCallback", {}, needs="attention"),
    Method("prefix", "PrefixTuningCallback", {"length": 3, "projection": False}, None, 0.0, "attention", True),
    Method("prompt", "PromptTuningCallback", {"length": 3}, None, needs="text", generates=True),
    Method("ia3", "IA3Callback", {}, needs="attention"),
    Method("bitfit", "BitFitCallback", {"add_missing": True}),
    Method("diff_pruning", "DiffPruningCallback", {}, None),
    Method("adalora", "AdaLoRACallback", {"init_r": 2, "target_r": 2, "target_modules": ["all-linear"]}),
    Method("intrinsic_dimension", "IntrinsicDimensionCallback", {"d": 2000}),
]


def main() -> None:
    """Run the census and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="comma-separated model types, or names of plain models")
    parser.add_argument("--methods", help="comma-separated names of columns")
    parser.add_argument("--short", action="store_true", help="about forty architectures of all kinds")
    parser.add_argument("--part", metavar="K/N", default="1/1", help="every N-th architecture from the K-th on")
    parser.add_argument("--json", type=Path, help="write every result here")
    parser.add_argument("--join", type=Path, nargs="+", help="do not run: read results that --json wrote")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    options = parser.parse_args()
    if options.join:
        rows = {row["model"]: row for path in options.join for row in json.loads(path.read_text())}  # the last counts
        results = [rows[name] for name in sorted(rows)]
    else:
        results = run(chosen_models(options), chosen_methods(options.methods), options.json)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(results))
    print(totals(results))


def chosen_models(options: argparse.Namespace) -> list[str]:
    """Names of architectures, in the order of the run."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    if options.models:
        return list(options.models.split(","))
    names = [*SHORT, *plain_models.ALL] if options.short else [*sorted(MODEL_MAPPING_NAMES), *plain_models.ALL]
    k, n = (int(part) for part in options.part.split("/"))
    return names[k - 1 :: n]


def chosen_methods(names: str | None) -> list[Method]:
    """The methods of these columns; all that this version has by default."""
    known = [method for method in METHODS if hasattr(lightning_pet, method.callback)]
    return known if names is None else [method for method in known if method.name in names.split(",")]


def run(models: list[str], methods: list[Method], path: Path | None = None) -> list[dict[str, Any]]:
    """Study every architecture that runs."""
    import transformers

    transformers.logging.set_verbosity(logging.CRITICAL)
    warnings.simplefilter("ignore")
    results = []
    for name in models:
        results.append(study(name, methods))
        print(line(results[-1]), flush=True)
        if path:
            path.write_text(json.dumps(results, indent=1) + "\n")
        gc.collect()
    return results


def study(name: str, methods: list[Method]) -> dict[str, Any]:
    """All methods on one architecture."""
    row: dict[str, Any] = {"model": name, "status": "ok", "methods": {}}
    try:
        with deadline(4 * SECONDS), contextlib.redirect_stderr(io.StringIO()):
            subject = subject_of(name, row)
            if not all(torch.isfinite(value).all() for value in output(subject)):
                row["status"] = "is not finite"
                raise ValueError("the output of the base with random weights of this size")
            row |= {"kind": subject.kind, "attention": bool(subject.structure.attention) or names_attention(subject)}
            for method in methods:
                row["methods"][method.name] = asdict(outcome(subject, method))
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {str(error)[:160]}"
    return row


def names_attention(subject: Subject) -> bool:
    """Attention that only names show (no softmax in the graph)."""
    return any(target.role and target.role.startswith("attention") for target in subject.structure.targets)


def subject_of(name: str, row: dict[str, Any]) -> Subject:
    """Build one architecture, its forward, and a model with a language-model head where there is one."""
    torch.manual_seed(0)
    if name in plain_models.ALL:
        model, forward = plain_models.ALL[name]()
        model.requires_grad_(False)  # torch chooses other kernels for weights that require grad, even without autograd
        structure = analyse(model, forward)
        return Subject(name, "plain torch", model, forward, structure, idle=idle_parameters(model, forward))
    model, forward = running(name, row, CHOICES)
    structure = analyse(model, forward)
    if not structure.attention:  # perhaps a hybrid with its attention further up
        with contextlib.suppress(Exception):
            deep, deep_forward = running(name, row, ({**DEEP}, {**DEEP, r"num_key_value_heads$": 4}))
            found = analyse(deep, deep_forward)
            if found.attention:
                model, forward, structure = deep, deep_forward, found
    row["status"] = "ok"
    model.requires_grad_(False)
    kind, generator = kind_of(name, model), None
    if kind in ("causal", "seq2seq"):
        with contextlib.suppress(Exception):
            generator = with_head(name, model, kind)
    return Subject(name, kind, model, forward, structure, generator, idle_parameters(model, forward))


def kind_of(name: str, model: nn.Module) -> str:
    """What a model takes: text kinds count for prompts."""
    from transformers.models.auto import modeling_auto as auto

    main = getattr(model, "main_input_name", "")
    if main != "input_ids":
        return {"pixel_values": "vision", "input_features": "audio", "input_values": "audio"}.get(main, "other")
    if hasattr(model.config, "vision_config") or hasattr(model.config, "audio_config"):
        return "multimodal"
    if name in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "seq2seq"
    if name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and name not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "causal"
    return "encoder" if name in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES else "other"


def with_head(name: str, model: nn.Module, kind: str) -> nn.Module:
    """The same configuration with its language-model head."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    cls = AutoModelForCausalLM if kind == "causal" else AutoModelForSeq2SeqLM
    generator: nn.Module = cls.from_config(model.config).eval()
    working_forward(generator)
    return generator


def counts(results: list[dict[str, Any]], method: Method) -> tuple[int, int, int, int]:
    """Architectures that count for a method, and how many of them are served, refused, failed."""
    relevant = [
        row["methods"][method.name]["status"]
        for row in results
        if method.name in row["methods"]
        and (method.needs != "attention" or row["attention"])
        and (method.needs != "text" or row["kind"] in ("causal", "encoder", "seq2seq"))
    ]
    tally = Counter(relevant)
    return len(relevant), tally["ok"], tally["refused"], tally["failed"]


def columns(results: list[dict[str, Any]]) -> list[Method]:
    """Methods with results."""
    return [method for method in METHODS if any(method.name in row["methods"] for row in results)]


def line(row: dict[str, Any]) -> str:
    """One architecture in one line."""
    if row["status"] != "ok" or "error" in row:
        return f"{row['model']:28} {row['status']}: {row.get('error', '')}"
    marks = " ".join(
        f"{name}:{result['status']}" for name, result in row["methods"].items() if result["status"] != "ok"
    )
    return f"{row['model']:28} {row['kind']:12} {marks or 'all ok'}"


def totals(results: list[dict[str, Any]]) -> str:
    """The rates, as a Markdown table."""
    ran = sum("kind" in row for row in results)
    lines = [
        f"{len(results)} architectures, {ran} run.",
        "",
        "| method | of | works | refused | failed |",
        "|---|--:|--:|--:|--:|",
    ]
    for method in columns(results):
        total, ok, refused, failed = counts(results, method)
        lines.append(f"| {method.name} | {total} | {ok} | {refused} | {failed} |")
    return "\n".join(lines)


def markdown(results: list[dict[str, Any]]) -> str:
    """The page of the documentation."""
    methods = columns(results)
    marks = {"ok": "✓", "refused": "–", "failed": "✗"}
    ran = [row for row in results if "kind" in row]
    lines = [
        "# Census of architectures",
        "",
        "Made by `benchmarks/census.py`: every architecture of transformers that builds and runs with a tiny",
        "configuration, and plain torch modules. ✓ all checks hold, – refused by an error that names the place,",
        "✗ failed.",
        "",
        totals(results),
        "",
        "| architecture | kind | " + " | ".join(method.name for method in methods) + " |",
        "|---|---|" + ":-:|" * len(methods),
    ]
    for row in ran:
        cells = [marks[row["methods"][m.name]["status"]] if m.name in row["methods"] else " " for m in methods]
        lines.append(f"| {row['model']} | {row['kind']} | " + " | ".join(cells) + " |")
    lines += ["", "## Refused and failed", ""]
    for row in ran:
        lines += [
            f"* {row['model']}, {name}: {result['status']}. {escaped(result['why'])}"
            for name, result in row["methods"].items()
            if result["status"] != "ok"
        ]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """One line that Markdown leaves as it is."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


if __name__ == "__main__":
    main()
