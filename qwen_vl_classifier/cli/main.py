"""The command `qwen-vl-classifier`: parse, run one verb, turn an expected error into one line and status 2."""

from __future__ import annotations

import argparse
import importlib
import logging
import platform
import sys
from collections.abc import Sequence
from typing import Any

from qwen_vl_classifier import __version__
from qwen_vl_classifier.cli.flags import EXIT_EXPECTED_ERROR, CommandParser, FullVerbParser, VerbParser
from qwen_vl_classifier.cli.shared.messages import telling
from qwen_vl_classifier.cli.shared.output import lasting_output
from qwen_vl_classifier.config.spelling import naming_flags
from qwen_vl_classifier.errors import ConfigError, DataError, QwenVLClassifierError, one_line

GROUPS = {
    "start here": ("demo",),
    "make a classifier": ("label", "train", "finetune", "threshold"),
    "measure and understand it": ("evaluate", "explain"),
    "use it": ("predict", "score", "serve", "export"),
    "look inside, and prepare": ("info", "extract"),
}
"""The verbs in the order of use, as the help lists them."""

VERBS = tuple(verb for group in GROUPS.values() for verb in group)

EXIT_INTERRUPTED = 130

_log = logging.getLogger(__name__)

_LONGEST_ERROR = 4000  # characters


class _PrintCompletion(argparse.Action):
    """Print the script for a shell, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, flag: str | None = None) -> None:
        from qwen_vl_classifier.cli.shared.completion import completion

        print(completion(build_parser(full_help=True), values))
        parser.exit()


def build_parser(*, full_help: bool = False) -> argparse.ArgumentParser:
    """Build the parser of all verbs; imports neither torch nor transformers.

    Args:
        full_help: Show options that few runs set, as `--help-all` does.
    """
    parser = CommandParser(
        prog="qwen-vl-classifier",
        usage="%(prog)s COMMAND ...",
        description="Turn a Qwen vision-language model into a trustworthy binary classifier of image + text.",
        example="qwen-vl-classifier demo",
        epilog="Help and an example for one command: qwen-vl-classifier train --help",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}", help="show the version")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh", "tcsh"),
        help="print a script with which this shell completes commands and options",
    )
    kind = FullVerbParser if full_help else VerbParser
    verbs = parser.add_subparsers(
        dest="verb",
        required=True,
        metavar="COMMAND",
        help=argparse.SUPPRESS,
        prog=parser.prog,
        parser_class=kind,
    )
    for verb in VERBS:
        importlib.import_module(f"qwen_vl_classifier.cli.{verb}").add_parser(verbs)
        verbs.choices[verb].add_shared_flags(VERBS)
    about = {action.dest: action.help for action in verbs._get_subactions()}
    lines = [
        line
        for title, group in GROUPS.items()
        for line in (f"\n{title}:", *(f"  {verb:<10} {about[verb]}" for verb in group))
    ]
    parser.description = f"{parser.description}\n" + "\n".join(lines)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; `None` takes those of the process.

    Returns:
        The exit status: 0, 2 after an expected error, 130 when interrupted. That nobody reads the output is no error.
    """
    words = sys.argv[1:] if arguments is None else arguments
    parser = build_parser(full_help="--help-all" in words)
    if not words:
        parser.print_help(sys.stderr)
        return EXIT_EXPECTED_ERROR
    flags = parser.parse_args(words)
    flags.progress = not flags.quiet
    flags.words = tuple(words)
    with lasting_output() as failures, telling(quiet=flags.quiet, verbose=flags.verbose):
        status = _run(flags)
    if failures and not status:
        reason = failures[0].strerror or type(failures[0]).__name__
        print(
            f"qwen-vl-classifier {flags.verb}: the work is done, but what it printed could not be written ({reason}); "
            "make room, or print to another place",
            file=sys.stderr,
        )
        return EXIT_EXPECTED_ERROR
    return status


def _run(flags: argparse.Namespace) -> int:
    try:
        if flags.quiet and flags.verbose:
            raise ConfigError("--quiet with --verbose; give one of them")
        _log.debug("qwen-vl-classifier %s on Python %s", __version__, platform.python_version())
        with naming_flags():
            status = _run_with_limits(flags)
    except QwenVLClassifierError as error:
        # Only errors about data may have several lines, one for each row.
        message = error if isinstance(error, DataError) else one_line(error, _LONGEST_ERROR)
        print(f"qwen-vl-classifier {flags.verb}: {message}", file=sys.stderr)
        return EXIT_EXPECTED_ERROR
    except KeyboardInterrupt:
        print(f"qwen-vl-classifier {flags.verb}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return status


def _run_with_limits(flags: argparse.Namespace) -> int:
    if not hasattr(flags, "limits_of"):  # a verb that reads no pictures, or has limits of its own
        return int(flags.run(flags))
    from qwen_vl_classifier.images.limits import image_limits

    with image_limits(**flags.limits_of(flags)):
        return int(flags.run(flags))
