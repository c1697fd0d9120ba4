"""What goes to stdout: tables for people, JSON for machines. The only file of the package that prints."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

_PACKAGE = Path(__file__).parents[1]


def print_line(text: str = "") -> None:
    """One line of the result."""
    print(text)


def print_error(text: str) -> None:
    """One line on stderr."""
    print(f"prunewise: error: {text}", file=sys.stderr)


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """While the block runs, a warning of prunewise is one line on stderr, and comes once; others are as they were."""
    seen: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        # What prunewise warns of names the line that called it: here, one of a verb.
        if not issubclass(category, UserWarning) or _PACKAGE not in Path(filename).parents:
            as_before(message, category, filename, lineno, file, line)
        elif str(message) not in seen:
            seen.add(str(message))
            print(f"prunewise: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        as_before = warnings.showwarning
        warnings.showwarning = show
        yield


def print_json(result: object) -> None:
    """The result as JSON."""
    json.dump(result, sys.stdout, indent=2)
    print()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table: by rich on a terminal where rich is installed, else plain text. Columns of numbers are right-aligned."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table(title=title, title_justify="left")
            for column, numeric in zip(columns, _numeric_columns(columns, rows), strict=True):
                table.add_column(column, justify="right" if numeric else "left")
            for row in rows:
                table.add_row(*row)
            Console(markup=False, highlight=False).print(table)
            return
    print(plain_table(title, columns, rows))


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table as text, columns aligned.

    >>> print(plain_table("cost", ["layer", "MACs"], [["conv1", "1,024"], ["fc", "64"]]))
    cost
    layer   MACs
    conv1  1,024
    fc        64
    """
    lines = [columns, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    numeric = _numeric_columns(columns, rows)
    text = [title]
    for line in lines:
        cells = zip(line, widths, numeric, strict=True)
        text.append("  ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in cells).rstrip())
    return "\n".join(text)


def _numeric_columns(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[bool]:
    return [all(row[i][:1].isdigit() or row[i] == "-" for row in rows) for i in range(len(columns))]


def as_share(part: float, whole: float) -> str:
    """`part` of `whole` in percent.

    >>> as_share(1, 8)
    '12.5 %'
    """
    return f"{100 * part / whole:.1f} %" if whole else "-"
