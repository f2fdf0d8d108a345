"""A table under its title, for every report; without Lightning, which the verbs on files do not wait for."""

from rich.console import Console
from rich.table import Table


def show_table(title: str, table: Table, console: Console | None = None) -> None:
    """Print a table under its title. A title of the table's own would be broken to the table's width."""
    console = console or Console()
    console.print(title, style="italic", markup=False, highlight=False, soft_wrap=True)
    console.print(table)
