"""Memory plans as tables."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightning_pet.operations.plan import show_table
from lightning_pet.report.memory.planner import MemoryPlan

LABELS = {
    "base": "base",
    "buffers": "buffers",
    "delta": "delta",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "communication": "communication buffers",
    "gathered": "gathered from others",
    "activations": "activations and temporaries",
}
UNCOUNTED = (
    "Not counted: the CUDA context, workspaces of kernels, buffers of the communication library and the allocator's "
    "fragmentation (about 1 GiB on a GPU), and what loading the weights needs."
)


def sized(size: int) -> str:
    """Bytes in the unit that fits.

    >>> sized(3 * 2**30), sized(100 * 2**20), sized(1536), sized(0)
    ('3.00 GiB', '100.00 MiB', '1.50 KiB', '0 B')
    """
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size} B"


def short(size: int) -> str:
    """The same in at most six characters: K, M and G stand for KiB, MiB and GiB.

    >>> short(3 * 2**30), short(100 * 2**20), short(1536), short(0)
    ('3.00G', '100M', '1.50K', '0')
    """
    number, _, unit = sized(size).partition(" ")
    value = float(number.replace(",", ""))
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}{unit[0]}" if unit != "B" else str(size)


def _fits(plan: MemoryPlan, memory: int | None) -> str:
    """Whether a plan fits into a device's memory; nothing if that is not known."""
    if memory is None:
        return ""
    if plan.total > memory:
        return "does not fit"
    return "fits" if plan.inventory.step is not None else "fits?"


def show_memory(plan: MemoryPlan, others: Sequence[tuple[MemoryPlan, str]], memory: int | None) -> None:
    """Print the plan by component, then the others by engine.

    Args:
        plan: of the run as it is configured.
        others: of the same run under other engines, each with a remark.
        memory: bytes of a device.
    """
    console = Console()
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, label in LABELS.items():
        missing = name == "activations" and plan.inventory.step is None
        if (size := getattr(plan.bytes, name)) or missing:
            table.add_row(label, "not known" if missing else sized(size))
    table.add_section()
    table.add_row("total", sized(plan.total), style="bold")
    show_table(f"Memory of one process, {plan.engine}", table, console)
    console.print(f"trained: {plan.trained:,} numbers")
    if plan.host:
        console.print(f"in host memory besides: {sized(plan.host)} of base values, to put them back")
    show_table("The same run under each strategy (K, M, G: KiB, MiB, GiB)", _others(others, memory), console)
    for note in (*(f"Note: {note}" for note in plan.notes), UNCOUNTED):
        console.print(note, markup=False, highlight=False)


def _others(plans: Sequence[tuple[MemoryPlan, str]], memory: int | None) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("strategy", no_wrap=True)
    for heading in ("base", "delta", "grads", "optim", "moved", "act", "total"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for plan, remark in plans:
        own = plan.bytes
        moved = own.communication + own.gathered
        sizes = (own.base + own.buffers, own.delta, own.gradients, own.optimizer, moved, own.activations, plan.total)
        figures = map(short, sizes)
        table.add_row(str(plan.engine), *figures, remark or _fits(plan, memory))
    return table
