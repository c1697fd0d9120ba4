"""The TOML file of `--config`: the same settings as the command line, under the same names."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

from prunewise.cli.options import UsageError, nearest


def config_arguments(
    arguments: Sequence[str], parser: argparse.ArgumentParser, all_parsers: Iterable[argparse.ArgumentParser]
) -> list[str]:
    """The settings of the file that `arguments` name with `--config`, as command line arguments.

    One file serves all verbs: a key that is an option of another verb only is passed over. A key that is an option
    of none raises `UsageError` and names the nearest one, as does a file that cannot be read.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", type=Path)
    try:
        path = finder.parse_known_args(arguments)[0].config
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from None
    if path is None:
        return []
    options = _options_by_key(parser)
    known = {key for each in all_parsers for key in _options_by_key(each)}
    found: list[str] = []
    for key, value in _read(path).items():
        if key not in known:
            raise UsageError(f"{path}: unknown key {key!r}; {nearest(key, known)}")
        if key in options:
            found += _as_arguments(options[key], value, f"{path}: {key}")
    return found


def _options_by_key(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    return {key: action for key, action in actions.items() if key not in ("help", "config")}


def _read(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not a TOML file: {error}") from None


def _as_arguments(action: argparse.Action, value: object, where: str) -> list[str]:
    option = action.option_strings[-1]
    if action.nargs == 0:  # a flag
        if not isinstance(value, bool):
            raise UsageError(f"{where}: expected true or false, not {value!r}")
        return [option] if value else []
    repeatable = isinstance(action, argparse._AppendAction)
    values = value if repeatable and isinstance(value, list) else [value]
    for each in values:
        if isinstance(each, bool) or not isinstance(each, str | int | float):
            raise UsageError(f"{where}: expected a string or a number, not {each!r}")
    return [f"{option}={each}" for each in values]
