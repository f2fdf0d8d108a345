"""The verb ``data``: validate a training file as it would be read, count its tokens, and show what is trained."""

import sys

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text as Coloured

from lightning_pet.data.chat.data import count
from lightning_pet.data.chat.encoding import Tokens
from lightning_pet.data.chat.messages import Format
from lightning_pet.data.tables import Table
from lightning_pet.errors import ArgumentError
from lightning_pet.modules.pretrained import load_tokenizer

LEAST = 10
"""Examples below which OpenAI's service refuses a file."""


def show_data(path: str, model: str, format: Format, max_length: int, example: int) -> None:
    """Print the checks and counts of a file, and one example.

    Args:
        path: file with conversations, texts, or prompts and completions.
        model: whose tokenizer and chat template count.
        format: of the lines.
        max_length: longest example in tokens.
        example: which one to show, counted from 1.
    """
    try:
        tokenizer = load_tokenizer(model)
        table, examples = count(path, tokenizer, format, max_length)
    except (ArgumentError, OSError) as error:
        sys.exit(f"lightning-pet data: {error}")
    console = Console()
    console.print(_counts(path, table, examples, max_length))
    if len(table) < LEAST:
        console.print(
            f"{len(table)} examples; OpenAI's service wants at least {LEAST}, and fewer teach little here, too."
        )
    if not 1 <= example <= len(examples):
        sys.exit(f"lightning-pet data: --example={example}: there are 1 to {len(examples)}")
    console.print(f"\nexample {example}, what is trained in [bold green]green[/bold green]:")
    console.print(coloured(examples[example - 1], tokenizer))


def _counts(path: str, table: Table, examples: list[Tokens], max_length: int) -> Grid:
    lengths = sorted(len(tokens.ids) for tokens in examples)
    trained = sum(sum(tokens.trained) for tokens in examples)
    grid = Grid("what", "number", title=path)
    rows = {
        "lines": len(table),
        "training examples": len(examples),
        "tokens": sum(lengths),
        "of which trained": trained,
        "tokens of the shortest, middle, longest": (lengths[0], lengths[len(lengths) // 2], lengths[-1]),
        "max_length": max_length,
    }
    for name, value in rows.items():
        numbers = value if isinstance(value, tuple) else (value,)
        grid.add_row(name, ", ".join(f"{number:,}" for number in numbers))
    return grid


def coloured(tokens: Tokens, tokenizer: object) -> Coloured:
    """The text of an example, with the trained part in green."""
    text = Coloured()
    begin = 0
    for place in range(1, len(tokens.ids) + 1):
        if place == len(tokens.ids) or tokens.trained[place] != tokens.trained[begin]:
            piece = tokenizer.decode(tokens.ids[begin:place])  # type: ignore[attr-defined]
            text.append(piece, style="bold green" if tokens.trained[begin] else "dim")
            begin = place
    return text
