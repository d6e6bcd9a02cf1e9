"""Every command with every option, for pages that list them, read from the parsers: nothing is declared twice."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from qwen_vl_classifier.cli.flags import VerbParser
from qwen_vl_classifier.cli.main import GROUPS, build_parser


@dataclass(frozen=True, slots=True)
class Option:
    """An argument or option of a command.

    Attributes:
        names: Its flags, such as `("-h", "--help")`; empty for an argument.
        value: What stands for its value, such as `SECONDS` or `{lora,qlora,full}`; empty for a switch.
        help: What it does, with its default.
        section: Heading in the help of all options.
        common: Whether `--help` shows it.
        required: Whether the command needs it.
    """

    names: tuple[str, ...]
    value: str
    help: str
    section: str
    common: bool
    required: bool


@dataclass(frozen=True, slots=True)
class Command:
    """A command.

    Attributes:
        name: Its name.
        group: What it is for, as in the help of the program.
        summary: What it does, in one line.
        description: The same in one or several paragraphs, with what only the help of all options tells.
        usage: How it is called, a line for each way.
        example: A command line.
        options: Its arguments and options, in the order of the help.
    """

    name: str
    group: str
    summary: str
    description: str
    usage: tuple[str, ...]
    example: str
    options: tuple[Option, ...]


def commands() -> list[Command]:
    """Return every command in the order of the help."""
    found = {action.dest: action for action in build_parser(full_help=True)._actions}["verb"]
    assert isinstance(found, argparse._SubParsersAction)
    summaries = {action.dest: action.help or "" for action in found._get_subactions()}
    return [
        _command(found.choices[name], name, group, summaries[name]) for group, names in GROUPS.items() for name in names
    ]


def _command(parser: VerbParser, name: str, group: str, summary: str) -> Command:
    usage = parser.format_usage().removeprefix("usage: ")
    return Command(
        name=name,
        group=group,
        summary=summary,
        description="\n\n".join(filter(None, (parser.about, parser.details))),
        usage=tuple(" ".join(line.split()) for line in usage.splitlines()),
        example=parser.example,
        options=tuple(
            _option(action, section.title or "", action.dest not in parser.rare)
            for section in parser._action_groups
            for action in section._group_actions
        ),
    )


def _option(action: argparse.Action, section: str, common: bool) -> Option:
    value = "" if action.nargs == 0 else action.metavar or ""
    if action.choices is not None:
        value = f"{{{','.join(map(str, action.choices))}}}"
    return Option(
        names=tuple(action.option_strings),
        value=value if isinstance(value, str) else " ".join(value),
        help=(action.help or "") % vars(action),
        section=section,
        common=common,
        required=action.required,
    )
