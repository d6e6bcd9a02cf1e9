"""Parse the flags of a verb: those that most runs set are shown by `--help`, all of them by `--help-all`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection
from typing import Any, TypeVar

Config = TypeVar("Config")


class VerbParser(argparse.ArgumentParser):
    """The parser of one verb, whose `--help` fits on about one screen."""

    shows_all = False

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._sections: dict[str, argparse._ArgumentGroup] = {}
        self.add_argument("--help-all", action="help", help="show all options and exit")

    def add_flag(self, *names: str, section: str = "", rare: bool = False, **settings: Any) -> None:
        """Add a flag.

        Args:
            names: As for `add_argument`.
            section: Heading in the help; empty for the options of the verb itself.
            rare: Whether `--help` leaves it out.
            settings: Further arguments of `add_argument`.
        """
        if rare and not self.shows_all:
            settings["help"] = argparse.SUPPRESS
        container: argparse._ActionsContainer = self
        if section:
            if section not in self._sections:
                self._sections[section] = self.add_argument_group(section)
            container = self._sections[section]
        container.add_argument(*names, **settings)


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
        shows_default = not isinstance(item.default, bool) and item.default not in ("", None)
        settings: dict[str, Any] = {
            "default": item.default,
            "help": item.metadata["help"] + (" (default: %(default)s)" if shows_default else ""),
        }
        if isinstance(item.default, bool):
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["type"] = item.metadata["kind"] or (str if item.default is None else type(item.default))
            settings["choices"] = item.metadata["choices"]
            settings["metavar"] = None if item.metadata["choices"] else item.name.rsplit("_", maxsplit=1)[-1].upper()
        parser.add_flag(*names, section=section, rare=rare or item.metadata["rare"], **settings)


def from_flags(config: type[Config], flags: argparse.Namespace, **extra: Any) -> Config:
    """Build a configuration from parsed flags."""
    names = [
        item.name
        for item in dataclasses.fields(config)  # type: ignore[arg-type]  # always one of the configuration classes
        if item.metadata.get("flag", True)
    ]
    return config(**{name: getattr(flags, name) for name in names}, **extra)
