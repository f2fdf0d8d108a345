"""The table of trained parameters that a run shows at its start."""

from collections import Counter

from lightning.pytorch.utilities import rank_zero_only
from rich.table import Table

from lightning_pet.operations.plan import Plan, how_to_train
from lightning_pet.training.titled import show_table


@rank_zero_only
def show_plan(plan: Plan) -> None:
    """Print one line per method and role: places, shapes and trained numbers."""
    table = Table()
    for heading, justify in (
        ("method", "left"),
        ("where", "left"),
        ("places", "right"),
        ("shapes", "left"),
        ("parameters", "right"),
    ):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    places: Counter[tuple[str, str, str]] = Counter()
    numbers: Counter[tuple[str, str, str]] = Counter()
    for row in plan.rows:
        where = row.role or ".".join(part for part in row.place.split(".") if not part.isdigit())
        key = (row.method, where, row.detail)
        places[key] += 1
        numbers[key] += row.parameters
    for key, count in places.items():
        table.add_row(key[0], key[1], str(count), key[2], f"{numbers[key]:,}")
    for path in plan.frozen_heads:
        table.add_row("frozen", path, "1", how_to_train(path), "0")
    table.add_section()
    table.add_row("total", "", "", f"{plan.share:.2%} of {plan.base:,}", f"{plan.trainable:,}")
    show_table("Trained parameters", table)
