"""Options from a TOML file, `--config`: a table for each command, checked by the declarations of its flags."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qwen_vl_classifier.config.spelling import did_you_mean
from qwen_vl_classifier.errors import ConfigError, one_line
from qwen_vl_classifier.files.bounded import read_file

_MOST_BYTES = 1_000_000


def read_options(path: str, command: str, commands: Collection[str]) -> dict[str, Any]:
    """Return the options of a command from a TOML file, by their names as they are written there.

    Args:
        path: The file.
        command: The command, whose table must be there.
        commands: All commands; other tables are an error.

    Raises:
        ConfigError: It cannot be read, or holds something else than tables of commands.
    """
    try:
        tables = tomllib.loads(read_file(path, most=_MOST_BYTES).decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); expected a TOML file") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not TOML ({one_line(error)}); expected lines such as epochs = 3") from None
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(
                f"{path}: {name} stands outside of a table; expected the name of a command above it, such as "
                f"[{command}]"
            )
        if name not in commands:
            raise ConfigError(f"{path}: [{name}] is not a command{did_you_mean(name, commands)}")
    if command not in tables:
        raise ConfigError(f"{path}: has no table [{command}]; expected one with the options of this command")
    return dict(tables[command])


def values_of(given: Mapping[str, Any], flags: Mapping[str, argparse.Action], where: str) -> dict[str, Any]:
    """Return the values of options by their destination, converted and checked as the flags would be.

    Args:
        given: The options, with hyphens or underscores.
        flags: The action of each flag, such as `--epochs`.
        where: What to call the table in errors.

    Raises:
        ConfigError: There is no such option, or its value is of another type, or none of its choices.
    """
    found: dict[str, Any] = {}
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        action = flags.get(flag)
        if action is None or flag.startswith("--no-"):
            known = [other[2:] for other in flags if other.startswith("--") and not other.startswith("--no-")]
            raise ConfigError(f"{where} {name}: unknown option{did_you_mean(flag[2:], known)}")
        if name == "config" or isinstance(action, (argparse._HelpAction, argparse._AppendAction)):
            raise ConfigError(f"{where} {name}: give this option on the command line")
        try:
            converted = _converted(value, action)
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise ConfigError(f"{where} {name} = {one_line(_written(value))}: {error}") from None
        if converted is not None:
            found[action.dest] = converted
    return found


def _converted(value: Any, action: argparse.Action) -> Any:
    """Return what the flag with this value would give; `None` where it would not be given."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError("expected true or false")
        on: Any = True if action.const is None else action.const
        off = None if isinstance(action, argparse._StoreConstAction) else False
        return on if value else off
    kind: Any = action.type or str
    if kind is int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError("expected a whole number")
    elif kind is float:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError("expected a number")
        value = float(value)
    elif kind is Path or isinstance(value, bool) or not isinstance(value, (str, int, float)):
        if not isinstance(value, str):
            raise ValueError("expected text in quotes")
        value = kind(value)
    else:  # such as a number of rows that may be a percentage too, or a label
        value = kind(str(value))
    if action.choices is not None and value not in action.choices:
        known = [str(choice) for choice in action.choices]
        raise ValueError(f"expected one of {', '.join(known)}{did_you_mean(str(value), known)}")
    return value


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
