"""Completion of commands, options and paths by the shell, from the parsers themselves."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import shtab

_FILES = ("CLASSIFIER", "DATA", "FILE", "IMAGE", "INPUT", "PATH", "PNG", "WHAT")
_FOLDERS = ("FOLDER",)


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script that a shell sources to complete the command line of a parser.

    Args:
        parser: The parser, with every option.
        shell: bash, zsh or tcsh.
    """
    for action in _actions(parser):
        if isinstance(action, argparse._SubParsersAction):
            action.help = "command"  # what is without help is not completed
        elif action.metavar in (*_FILES, *_FOLDERS):
            action.complete = shtab.DIRECTORY if action.metavar in _FOLDERS else shtab.FILE  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell=shell))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)
