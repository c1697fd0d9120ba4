"""Options that several verbs share."""

from __future__ import annotations

import argparse
import difflib
import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


class UsageError(Exception):
    """What the user typed cannot be used; the message names it and the remedy. Exit code 2."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence that names the known word nearest to `word`, or all known words.

    >>> nearest("epohcs", ["macs", "epochs"])
    "did you mean 'epochs'?"
    >>> nearest("zzz", ["macs", "epochs"])
    'known: epochs, macs'
    """
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Options of every verb."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="TOML file with the long options as keys, `_` for `-`; the command line wins",
    )


def add_checkpoint_option(parser: argparse.ArgumentParser, limits: str = "") -> None:
    """The option of the verbs that train."""
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        type=Path,
        help=f"{limits}save the run's state here after every epoch, and go on from it if the run was stopped",
    )


def add_suspects_option(parser: argparse.ArgumentParser) -> None:
    """The option of the verbs that show suspects."""
    parser.add_argument(
        "--suspects", metavar="N", type=count(0), default=10, help="show so many suspects, worst first (%(default)s)"
    )


def add_targets_option(parser: argparse.ArgumentParser) -> None:
    """The option of the verbs that show labels."""
    parser.add_argument(
        "--targets",
        metavar="MODULE:FACTORY",
        help="a callable without arguments that returns the labels by sample number, or a .npy file (default: none shown)",
    )


def add_model_options(parser: argparse.ArgumentParser, *, traced: bool = True) -> None:
    """Options of the verbs that take a model; `traced` where they need an example input."""
    parser.add_argument(
        "--model",
        metavar="MODULE:FACTORY",
        required=True,
        help="a callable without arguments that returns the torch.nn.Module, weights loaded",
    )
    parser.add_argument(
        "--data",
        metavar="MODULE:FACTORY",
        help="a callable without arguments that returns a data loader, or a pair: training, validation",
    )
    if traced:
        parser.add_argument(
            "--input",
            metavar="SHAPE[:DTYPE]",
            action="append",
            help="example input, as 1,3,224,224 or 1,128:int64; once for each positional input (default: from --data)",
        )


def add_choice_options(parser: argparse.ArgumentParser) -> None:
    """Options that say which channels may be removed; `choice` reads them."""
    groups = "channel groups by name or pattern; repeatable"
    parser.add_argument("--include", metavar="PATTERN", action="append", help=f"prune only these {groups}")
    parser.add_argument("--exclude", metavar="PATTERN", action="append", help=f"leave alone these {groups}")
    parser.add_argument("--min-keep", metavar="N", type=count(1), help="keep at least N channels of a group")
    parser.add_argument("--round-to", metavar="N", type=count(1), help="keep multiples of N channels; 8 suits hardware")


def choice(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_choice_options` that were given, as keyword arguments."""
    names = ("include", "exclude", "min_keep", "round_to")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def make_folder(out: Path) -> None:
    """Make the folder of an output file before the work begins, so that nothing is computed in vain."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}") from None
    if out.is_dir():
        raise UsageError(f"--out {out}: a folder, expected a file")


def require_folder(out: Path) -> None:
    """Find out before the work begins whether a folder can be written there; it is made when there is something to save."""
    there = next(path for path in (out, *out.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UsageError(f"--out {out}: {there} is a file, expected a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"--out {out}: {there} cannot be written to")


# Types of values: argparse asks them as it reads the command line, so what cannot be used is told before any work.


def amount(text: str) -> int | float:
    """A share of the original (0.5) or a count (60_000_000), told apart by the decimal point.

    >>> amount("0.5"), amount("60_000_000")
    (0.5, 60000000)
    """
    value = _number(text)
    if value < 1 if isinstance(value, int) else not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is neither a share in (0, 1], as 0.5, nor a count, as 60_000_000")
    return value


def share(*, zero: bool = True, one: bool = True) -> Callable[[str], float]:
    """The type of shares in [0, 1], with or without its ends."""
    return functools.partial(_share, zero=zero, one=one)


def _share(text: str, zero: bool, one: bool) -> float:
    value = _number(text)
    if not 0 <= value <= 1 or (value == 0 and not zero) or (value == 1 and not one):
        raise argparse.ArgumentTypeError(
            f"{text} is no share in {'[' if zero else '('}0, 1{']' if one else ')'}, as 0.5"
        )
    return float(value)


def count(least: int) -> Callable[[str], int]:
    """The type of whole numbers of at least `least`."""
    return functools.partial(_count, least=least)


def _count(text: str, least: int) -> int:
    value = _number(text)
    if not isinstance(value, int) or value < least:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least {least}")
    return value


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
