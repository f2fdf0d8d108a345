"""Time of a training step for every method, beside its peer in HF PEFT or in the adapters library.

The ratio of a step to the frozen base with the gradient flowing to the embeddings, in CPU time of one thread, each
variant's best turn; the variants take turns. The libraries need different releases of transformers, so the adapters
library is measured by an interpreter of its own, which is told here, against the floor of that run:

    python benchmarks/method_step.py [--short] [--only WORD] [--write]
    python -m venv env && env/bin/pip install torch==2.13.0 adapters==1.3.0 transformers==4.57.6
    ADAPTERS_PYTHON=env/bin/python python benchmarks/method_step.py --write
"""

import copy
import os
from functools import cache, partial

from libraries import ADAPTERS, METHODS, OURS, libraries, training_step
from measuring import answered, best, in_new_process
from page import Options, Row, Table, run
from trained_models import build

COMMAND = "python benchmarks/method_step.py --write"
BERT = Table("method_step", "BERT 6×384, 32×48 tokens: step / floor", COMMAND)
SMALL = Table("method_step_small", "Llama 4×64, 4×16 tokens: step / floor", COMMAND)
MODELS = {BERT: "BERT 6×384", SMALL: "width 64"}
BOUNDS = {("diff pruning", SMALL.name): 4.0, ("SAID", SMALL.name): 4.0}


def ratios(model: str, method: str, targets: str, options: Options, names: list[str]) -> dict[str, float]:
    """Steps over the floor of the same run, by library, and the floor in milliseconds."""
    base, batch = build(model, options.short)
    steps = {name: training_step(copy.deepcopy(base), batch, name, method, targets) for name in ["floor", *names]}
    seconds = best(steps, options.turns)
    return {"floor": 1e3 * seconds["floor"]} | {name: seconds[name] / seconds["floor"] for name in names}


def elsewhere(model: str, targets: str, short: str, turns: str) -> dict[str, float]:
    """What the interpreter of the adapters library finds, by method; a model that it does not serve has no figure."""
    found = {}
    for method in (name for name in METHODS if ADAPTERS in libraries(name)):
        try:
            found[method] = ratios(model, method, targets, Options(bool(short), int(turns)), [ADAPTERS])[ADAPTERS]
        except ValueError as error:
            if "not supported by this model" not in str(error):
                raise
    return found


@cache
def of_adapters(model: str, targets: str, options: Options) -> dict[str, float]:
    """:func:`elsewhere`, in one process for all methods."""
    python = os.environ.get("ADAPTERS_PYTHON")
    words = [model, targets, "short" * options.short, str(options.turns)]
    return in_new_process(__file__, *words, python=python) if python else {}


def measure(table: Table, method: str, options: Options) -> Row:
    """One method."""
    model, targets = MODELS[table], "all" if table is SMALL else "q,v"
    here = [name for name in libraries(method) if name != ADAPTERS]
    found = ratios(model, method, targets, options, here)
    peers = {name: found[name] for name in here if name != OURS}
    other = of_adapters(model, targets, options)
    peers |= {ADAPTERS: other[method]} if method in other else {}
    context = {"floor, ms": f"{found['floor']:,.1f}"}
    return Row(method, found[OURS], peers, BOUNDS.get((method, table.name)), context)


TABLES = {
    BERT: {method: partial(measure, BERT, method) for method in METHODS},
    SMALL: {name: partial(measure, SMALL, name) for name, method in METHODS.items() if not method.targeted},
}

if __name__ == "__main__" and not answered(elsewhere):
    run(__doc__, TABLES)
