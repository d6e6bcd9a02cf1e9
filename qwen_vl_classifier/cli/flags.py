"""Parse the flags of a verb: those that most runs set are shown by `--help`, all of them by `--help-all`."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import shutil
import sys
import textwrap
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from qwen_vl_classifier.cli.shared.options_file import read_options, values_of
from qwen_vl_classifier.config.spelling import did_you_mean
from qwen_vl_classifier.errors import ConfigError, one_line

EXIT_EXPECTED_ERROR = 2

Config = TypeVar("Config")

_LONGEST_ERROR = 4000  # characters
_LONG = 10_000  # numbers from here on are easier to read with separators


class Switch(argparse.Action):
    """An option that is on or off: `--name` and `--no-name`."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        names = [*option_strings, *(f"--no-{name[2:]}" for name in option_strings)]
        super().__init__(names, dest, nargs=0, **settings)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Keep what was given."""
        setattr(namespace, self.dest, not (option_string or "").startswith("--no-"))


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Write an option once with its value, of a switch what changes the default, and part no name at a hyphen."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, Switch):
            name = action.option_strings[0]
            return f"--[no-]{name[2:]}" if action.default else name
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line, and suggest what a misspelled word was meant to be.

    Abbreviations of options are refused: what is unambiguous today may not be tomorrow.

    Args:
        example: A command that the help shows first.
        description: What the command does.
        epilog: Further paragraphs, after the options.
        settings: As for `ArgumentParser`.
    """

    def __init__(
        self, *, example: str = "", description: str | None = None, epilog: str | None = None, **settings: Any
    ) -> None:
        shown = f"example:\n  {example}" if example else ""
        super().__init__(
            description="\n\n".join(filter(None, (_wrapped(description), shown))),
            epilog=_wrapped(epilog),
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            **settings,
        )
        self.about, self.example = description or "", example
        self._positionals.title = "arguments"
        self.register("type", int, _whole_number)
        self.register("type", float, _number)

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        line = one_line(message.removeprefix("argument "), _LONGEST_ERROR)
        print(f"{self.prog}: {line} (see {self.prog} --help)", file=sys.stderr)
        self.exit(EXIT_EXPECTED_ERROR)

    def parse_known_args(  # type: ignore[override]  # it is overloaded for types of namespaces that nobody uses here
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse, after options that do not exist are refused: else one that is required would be missed first."""
        words = list(sys.argv[1:] if args is None else args)
        known = self._option_string_actions
        for word in self._own(words):
            name = word.partition("=")[0]
            if word.startswith("--") and " " not in word and name not in known:
                self.error(f"unknown option {name}{self._hint(name)}")
        found: tuple[Any, list[str]] = super().parse_known_args(words, namespace)
        return found

    def _own(self, words: Sequence[str]) -> Iterator[str]:
        """Yield the words that are for this parser: those before the command."""
        return itertools.takewhile(lambda word: word.startswith("-") and word != "--", words)

    def _hint(self, name: str) -> str:
        return did_you_mean(name, self._option_string_actions) or "; options of a command come after its name"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        hint = did_you_mean(str(value), known)
        if action.option_strings:
            message = f"{'/'.join(action.option_strings)} {value!r}: expected one of {', '.join(known)}{hint}"
        else:
            message = f"unknown command {value!r}" + (hint or f"; expected one of {', '.join(known)}")
        raise argparse.ArgumentError(None, message)


class VerbParser(CommandParser):
    """The parser of one verb, whose `--help` fits on one screen.

    Args:
        details: Paragraphs at the end of the help of all options.
        settings: As for `CommandParser`.
    """

    shows_all = False

    def __init__(self, *, details: str = "", **settings: Any) -> None:
        super().__init__(add_help=False, epilog=details if self.shows_all else None, **settings)
        self.details = details
        self._sections: dict[str, argparse._ArgumentGroup] = {}
        self.rare: set[str] = set()
        """Destinations of the flags that only `--help-all` shows."""
        self._commands: Collection[str] = ()
        self.gathers = ""
        """Destination of an argument of several words, which may stand before and behind flags."""

    def add_flag(self, *names: str, section: str = "", rare: bool = False, **settings: Any) -> None:
        """Add a flag.

        Args:
            names: As for `add_argument`.
            section: Heading in the help of all options; empty for the options of the verb itself.
            rare: Whether `--help` leaves it out.
            settings: Further arguments of `add_argument`.
        """
        if rare and not self.shows_all:
            settings["help"] = argparse.SUPPRESS
        container: argparse._ActionsContainer = self
        if section and self.shows_all:
            if section not in self._sections:
                self._sections[section] = self.add_argument_group(section)
            container = self._sections[section]
        action = container.add_argument(*names, **settings)
        if rare:
            self.rare.add(action.dest)

    def add_shared_flags(self, commands: Collection[str]) -> None:
        """Add the flags that every verb has.

        Args:
            commands: All verbs, for the file of options.
        """
        self._commands = commands
        section = "every command"
        self.add_flag("--config", section=section, metavar="FILE", help="TOML file with options; the command line wins")
        self.add_flag(
            "--quiet",
            section=section,
            action="store_true",
            help="no progress bars, no warnings: result and errors only",
        )
        self.add_flag(
            "--verbose",
            section=section,
            action="store_true",
            help="tell each step, with its device and its time",
        )
        self.add_flag("-h", "--help", section=section, action="help", help="show the common options and exit")
        self.add_flag("--help-all", section=section, action="help", help="show all options and exit")

    def parse_known_args(  # type: ignore[override]  # as above
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse, and refuse words that belong to no option or argument."""
        words = list(sys.argv[1:] if args is None else args)
        self._take_from_file(words)
        found, rest = super().parse_known_args(words, namespace)
        if self.gathers:
            getattr(found, self.gathers).extend(rest)
        elif rest:
            self.error(f"unexpected argument {rest[0]!r}; a text with spaces needs quotes around it")
        return found, []

    def _take_from_file(self, words: Sequence[str]) -> None:
        """Make the options of a file the defaults, where words name one."""
        own = list(self._own(words))
        named = [word.partition("=")[2] for word in own if word.startswith("--config=")]
        named += [value for word, value in itertools.pairwise(own) if word == "--config"]
        if not named:
            return
        path, command = named[-1], self.prog.rpartition(" ")[2]
        try:
            given = read_options(path, command, self._commands)
            values = values_of(given, self._option_string_actions, f"{path}: [{command}]")
        except ConfigError as error:
            self.error(str(error))
        on_command_line = {self._option_string_actions.get(word.partition("=")[0]) for word in own}
        for group in self._mutually_exclusive_groups:  # a flag wins over all that it excludes
            names = {action.dest for action in group._group_actions}
            if on_command_line & {*group._group_actions}:
                values = {name: value for name, value in values.items() if name not in names}
            group.required = group.required and not names & values.keys()
        for action in self._actions:
            action.required = action.required and action.dest not in values
        self.set_defaults(**values)

    def _own(self, words: Sequence[str]) -> Iterator[str]:
        return itertools.takewhile(lambda word: word != "--", words)

    def _hint(self, name: str) -> str:
        return did_you_mean(name, self._option_string_actions)


class FullVerbParser(VerbParser):
    """The same, with every option in its help."""

    shows_all = True


def add_flags(
    parser: VerbParser,
    config: type[Any],
    *,
    section: str = "",
    only: Collection[str] | None = None,
    rare: bool = False,
) -> None:
    """Add one flag for every option of a configuration class, so that a flag and a keyword never disagree.

    Args:
        parser: The parser of the verb.
        config: The configuration class.
        section: Heading in the help.
        only: Names of the options to add; `None` adds all.
        rare: Leave all of them out of `--help`, not only those that are declared as rare.
    """
    for item in dataclasses.fields(config):
        if not item.metadata.get("flag", True) or (only is not None and item.name not in only):
            continue
        names = ["--" + item.name.replace("_", "-")]
        if item.metadata["also"]:
            names.append(item.metadata["also"])
        settings: dict[str, Any] = {
            "default": item.default,
            "help": item.metadata["help"] + shown_default(item.default, item.metadata["help"]),
        }
        if isinstance(item.default, bool):
            settings["action"] = Switch
        else:
            settings["type"] = item.metadata["kind"] or (str if item.default is None else type(item.default))
            settings["choices"] = item.metadata["choices"]
            if not item.metadata["choices"]:
                settings["metavar"] = item.metadata["metavar"] or item.name.rsplit("_", maxsplit=1)[-1].upper()
        section_of_this = item.metadata["section"] or section
        parser.add_flag(*names, section=section_of_this, rare=rare or item.metadata["rare"], **settings)


def shown_default(default: object, help: str) -> str:
    """Return " (default: ...)" for the end of a help text, or nothing where there is nothing to say."""
    if default is None or default == "" or isinstance(default, bool) or "(default" in help:
        return ""
    if isinstance(default, float):
        return f" (default: {default:g})"
    return f" (default: {default:,})" if isinstance(default, int) and default >= _LONG else f" (default: {default})"


def from_flags(config: type[Config], flags: argparse.Namespace, **extra: Any) -> Config:
    """Build a configuration from parsed flags."""
    names = [
        item.name
        for item in dataclasses.fields(config)  # type: ignore[arg-type]  # always one of the configuration classes
        if item.metadata.get("flag", True)
    ]
    return config(**{name: getattr(flags, name) for name in names}, **extra)


def _wrapped(text: str | None) -> str:
    """Break lines of a text as argparse would, but keep its paragraphs."""
    width = shutil.get_terminal_size().columns - 2
    return "\n\n".join(
        textwrap.fill(part, width, break_on_hyphens=False) for part in (text or "").split("\n\n") if part
    )


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number") from None
