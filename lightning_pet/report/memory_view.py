"""Memory plans as tables."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightning_pet.report.memory import MemoryPlan

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


def gib(size: int) -> str:
    """Bytes in GiB, or in a smaller unit where that is too coarse.

    >>> gib(3 * 2**30), gib(5 * 2**20), gib(0)
    ('3.00 GiB', '5.00 MiB', '0 KiB')
    """
    if size < 2**20:
        return f"{size / 2**10:.0f} KiB"
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:,.2f} MiB"


def fits(plan: MemoryPlan, memory: int | None) -> str:
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
    table = Table(title=f"Memory of one process, {plan.engine}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, label in LABELS.items():
        missing = name == "activations" and plan.inventory.step is None
        if (size := getattr(plan.bytes, name)) or missing:
            table.add_row(label, "not known" if missing else gib(size))
    table.add_section()
    table.add_row("total", gib(plan.total), style="bold")
    console.print(table)
    console.print(f"trained: {plan.trained:,} numbers")
    if plan.host:
        console.print(f"in host memory besides: {gib(plan.host)} of base values, to put them back")
    console.print(_others(others, memory))
    for note in (*(f"Note: {note}" for note in plan.notes), UNCOUNTED):
        console.print(note, markup=False, highlight=False)


def _others(plans: Sequence[tuple[MemoryPlan, str]], memory: int | None) -> Table:
    table = Table(
        title="The same run under each strategy, GiB", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("strategy", no_wrap=True)
    for heading in ("base", "delta", "grads", "optim", "moved", "act", "total"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for plan, remark in plans:
        own = plan.bytes
        moved = own.communication + own.gathered
        sizes = (own.base + own.buffers, own.delta, own.gradients, own.optimizer, moved, own.activations, plan.total)
        figures = (f"{size / 2**30:,.3f}" for size in sizes)
        table.add_row(str(plan.engine), *figures, remark or fits(plan, memory))
    return table
