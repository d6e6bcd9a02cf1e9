"""Make the flags of the command line from configuration classes, so that a flag and a keyword never disagree."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection
from typing import Any, TypeVar

Config = TypeVar("Config")


def add_flags(parser: argparse._ActionsContainer, config: type[Any], *, only: Collection[str] | None = None) -> None:
    """Add one flag for every option of a configuration class, or for some by name."""
    for item in dataclasses.fields(config):
        if not item.metadata.get("flag", True) or (only is not None and item.name not in only):
            continue
        names = ["--" + item.name.replace("_", "-")]
        if item.metadata["also"]:
            names.append(item.metadata["also"])
        text = item.metadata["help"] + ("" if item.metadata["kind"] else " (default: %(default)s)")
        if isinstance(item.default, bool):
            action = argparse.BooleanOptionalAction
            parser.add_argument(*names, action=action, default=item.default, help=text)
        else:
            parser.add_argument(
                *names,
                type=item.metadata["kind"] or (str if item.default is None else type(item.default)),
                default=item.default,
                choices=item.metadata["choices"],
                metavar=None if item.metadata["choices"] else item.name.rsplit("_", maxsplit=1)[-1].upper(),
                help=text,
            )


def from_flags(config: type[Config], flags: argparse.Namespace, **extra: Any) -> Config:
    """Build a configuration from parsed flags."""
    names = [
        item.name
        for item in dataclasses.fields(config)  # type: ignore[arg-type]  # always one of the classes above
        if item.metadata.get("flag", True)
    ]
    return config(**{name: getattr(flags, name) for name in names}, **extra)
