"""`prunewise`: finds the verb, reads its options, turns errors into exit codes.

Exit codes: 0 done; 1 failed, and stderr says why (a budget that cannot be reached, say); 2 bad usage.
Nothing here imports torch: the verbs do, when they run.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Protocol

from prunewise.cli import allocate, cost, demo, list_, prune, report, score
from prunewise.cli.config import config_arguments
from prunewise.cli.options import UsageError, add_common_options, nearest
from prunewise.cli.output import plain_warnings, print_error, print_line


class Verb(Protocol):
    """What the module of a verb offers."""

    HELP: str

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Declare the verb's options."""

    def run(self, args: argparse.Namespace) -> None:
        """Do the work; raise `UsageError` or `PrunewiseError` where it cannot be done."""


VERBS: dict[str, Verb] = {
    "demo": demo,
    "cost": cost,
    "list": list_,
    "prune": prune,
    "allocate": allocate,
    "score": score,
    "report": report,
}


def build_parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the command line, and the parser of each verb by name."""
    parser = argparse.ArgumentParser(
        prog="prunewise",
        description="What a neural network needs, and a smaller network under a budget.",
        epilog="Results go to stdout, logs to stderr. Exit codes: 0 done, 1 failed, 2 bad usage.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    verb_parsers = {}
    for name, verb in VERBS.items():
        verb_parser = subparsers.add_parser(name, help=verb.HELP, description=verb.HELP, allow_abbrev=False)
        verb.add_options(verb_parser)
        add_common_options(verb_parser)
        verb_parsers[name] = verb_parser
    return parser, verb_parsers


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("prunewise").setLevel(logging.INFO)
    parser, verb_parsers = build_parsers()
    try:
        if arguments and arguments[0] in VERBS:
            _require_known_options(arguments[1:], verb_parsers[arguments[0]])
            # The file's settings come first, so what is typed on the command line wins.
            arguments[1:1] = config_arguments(arguments[1:], verb_parsers[arguments[0]], verb_parsers.values())
        args, unknown = parser.parse_known_args(arguments)
        if unknown:
            verb_parsers.get(args.verb, parser).error(f"unrecognized arguments: {' '.join(unknown)}")
        if args.version:
            print_line(version_line())
            return 0
        if args.verb is None:
            parser.print_help(sys.stderr)
            return 2
        with plain_warnings():
            VERBS[args.verb].run(args)
        sys.stdout.flush()
    except UsageError as error:
        print_error(str(error))
        return 2
    except SystemExit as stop:  # argparse has printed what is wrong
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        print_error("interrupted")
        return 130
    except BrokenPipeError:  # the reader of stdout has gone, as in `prunewise list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        from prunewise.core.errors import PrunewiseError

        if not isinstance(error, PrunewiseError):
            raise  # a defect, ours or of the user's factory: the traceback is what helps
        print_error(str(error))
        return 1
    return 0


def _require_known_options(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Stop at a misspelt option; argparse would complain of the missing one first, and under the usage of no verb."""
    known = parser._option_string_actions
    for argument in arguments:
        name = argument.partition("=")[0]
        if argument == "--":
            return
        if name.startswith("--") and " " not in name and not any(option.startswith(name) for option in known):
            options = [option for option in known if option.startswith("--")]
            parser.error(f"unknown option {name}; {nearest(name, options)}")


def version_line() -> str:
    """The version as one line."""
    import prunewise

    return f"prunewise {prunewise.__version__}"


if __name__ == "__main__":
    sys.exit(main())
