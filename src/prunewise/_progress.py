"""How far a run is, on stderr: a bar by rich on a terminal where rich is installed, else a line an epoch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


class Progress:
    """Says nothing; the silent one."""

    def step(self, done: int) -> None:
        """`done` steps of the whole run are done."""

    def line(self, text: str) -> None:
        """A line that stays."""


class _Lines(Progress):
    def line(self, text: str) -> None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


class _Bar(Progress):
    def __init__(self, advance: Callable[[int], None], line: Callable[[str], None]) -> None:
        self._advance, self._line = advance, line

    def step(self, done: int) -> None:
        self._advance(done)

    def line(self, text: str) -> None:
        self._line(text)


@contextlib.contextmanager
def progress(shown: bool, total: int | None, label: str = "compress") -> Iterator[Progress]:
    """The progress of a run of `total` steps; None where nobody knows how many."""
    if not shown:
        yield Progress()
        return
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress
        except ImportError:
            pass
        else:
            columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
                task = bar.add_task("", total=total)
                yield _Bar(
                    lambda done: bar.update(task, completed=done),
                    lambda text: bar.console.print(text, markup=False, highlight=False),
                )
            return
    yield _Lines()
