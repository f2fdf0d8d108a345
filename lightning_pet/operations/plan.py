"""What a method does to a model, as a table that people read before they train."""

from collections import Counter
from dataclasses import dataclass

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_pet.insertion.prepare import is_shared
from lightning_pet.model.adaptation import Adaptation
from lightning_pet.model.naming import by_delta, join, named_parameters
from lightning_pet.model.quantised import numbers_in
from lightning_pet.targets.heads import frozen_outputs


@dataclass(frozen=True)
class PlanRow:
    """One delta, or one base tensor that trains as it is.

    Attributes:
        method: short name of the method, with the user's name if it is not ``default``.
        place: path of the host parameter.
        role: what the host does in the model, if known.
        detail: shape of what was inserted.
        parameters: trained numbers.
        frozen: numbers that belong to the delta and stay as they are (fused adapters).
    """

    method: str
    place: str
    role: str
    detail: str
    parameters: int
    frozen: int = 0


@dataclass(frozen=True)
class Plan:
    """All rows of an adapted model.

    Attributes:
        rows: in the order of insertion.
        base: numbers in the base model (tied tensors once).
        frozen_heads: modules of the base that look new (an output layer), and stay as they are.
    """

    rows: tuple[PlanRow, ...]
    base: int
    frozen_heads: tuple[str, ...] = ()

    @property
    def trainable(self) -> int:
        """Trained numbers in total."""
        return sum(row.parameters for row in self.rows)

    @property
    def frozen(self) -> int:
        """Numbers in the delta that stay as they are."""
        return sum(row.frozen for row in self.rows)

    @property
    def share(self) -> float:
        """Trained numbers as a share of the base."""
        return self.trainable / self.base if self.base else 0.0

    def __str__(self) -> str:
        cells = [(row.method, row.place, row.role, row.detail) for row in self.rows]
        cells += [("frozen", path, "head?", _how_to_train(path)) for path in self.frozen_heads]
        cells.insert(0, ("method", "place", "role", "shape"))
        widths = [max(map(len, column)) + 2 for column in zip(*cells, strict=True)]
        numbers = ["parameters", *(f"{row.parameters:,}" for row in self.rows), *("0" for _ in self.frozen_heads)]
        lines = [
            "".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) + f"{number:>10}"
            for line, number in zip(cells, numbers, strict=True)
        ]
        lines.append(f"trainable {self.trainable:,} of {self.base:,} ({self.share:.3%})")
        if self.frozen:
            lines.append(f"frozen in the delta {self.frozen:,}")
        return "\n".join(lines)


def plan_of(root: nn.Module, record: Adaptation) -> Plan:
    """Read the plan off an adapted model."""
    parameters = dict(named_parameters(root, every_name=True))
    rows, users, trainable = [], _users(record), set(record.trainable_names)
    found = by_delta(parameters)
    for applied, target, _, delta, prefix in record.deltas(root):
        own = found.get(prefix, {})
        if not own and applied.key in users:
            continue  # it has nothing but what is shared
        trained = [p for n, p in own.items() if join(prefix, n) in trainable]
        place = f"shared by {users[applied.key]} places" if is_shared(target) else target.path
        note = getattr(delta, "note", "")
        numbers = sum(p.numel() for p in trained)
        frozen = sum(p.numel() for p in own.values()) - numbers
        notes = [note] * bool(note) + [f"{frozen:,} frozen"] * bool(frozen)
        detail = " ".join(["×".join(map(str, p.shape)) for p in trained] + notes)
        rows.append(PlanRow(applied.label, place, target.role or "", detail, numbers, frozen))
    for name in record.trained_names:
        parameter = parameters[name]
        rows.append(PlanRow("trained", name, "", "×".join(map(str, parameter.shape)), parameter.numel()))
    inserted = set(record.delta_names)
    base = sum([numbers_in(p) for n, p in {id(p): (n, p) for n, p in parameters.items()}.values() if n not in inserted])
    # Twins that the user keeps are not new.
    asleep = [path for path in frozen_outputs(root, record.scopes, record.trained_names) if record.in_base(path)]
    return Plan(tuple(rows), base, tuple(asleep))


def _how_to_train(path: str) -> str:
    """The option that trains a module that looks new."""
    return f"looks new; modules_to_save=[{path!r}] trains it"


def _users(record: Adaptation) -> dict[str, int]:
    """Methods that share something, with the number of places that use it."""
    return {
        applied.key: sum(not is_shared(target) for target in applied.targets)
        for applied in record.applied
        if any(is_shared(target) for target in applied.targets)
    }


# --- the table ------------------------------------------------------------------------------------


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
        table.add_row("frozen", path, "1", _how_to_train(path), "0")
    table.add_section()
    table.add_row("total", "", "", f"{plan.share:.2%} of {plan.base:,}", f"{plan.trainable:,}")
    show_table("Trained parameters", table)


def show_table(title: str, table: Table, console: Console | None = None) -> None:
    """Print a table under its title. A title of the table's own would be broken to the table's width."""
    console = console or Console()
    console.print(title, style="italic", markup=False, highlight=False, soft_wrap=True)
    console.print(table)
