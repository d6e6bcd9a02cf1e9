"""The program of a process that renders one chat template: JSON in, JSON out, nothing imported but Jinja.

A template is a program that came with a checkpoint. Jinja's sandbox keeps it from files and code, but not from running
on or from taking all memory; limits of the system do. It is started by `thinking.py`.
"""

from __future__ import annotations

import json
import resource
import sys
from contextlib import suppress
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(jinja2.ext.Extension):
    """The tag of transformers around what an assistant says; it changes nothing here."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """Return the environment in which transformers renders chat templates."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
    return made


def render(request: dict[str, Any]) -> dict[str, str]:
    """Render a template.

    Args:
        request: `template`; `variables`, by name; and `most`, the most characters of the result.

    Returns:
        Either `rendered`, or `error`: the name of what went wrong.
    """
    try:
        rendered = environment().from_string(request["template"]).render(**request["variables"])
    except Exception as error:  # a template may raise anything
        return {"error": type(error).__name__}
    if len(rendered) > request["most"]:
        return {"error": f"{len(rendered):,} characters, expected at most {request['most']:,}"}
    return {"rendered": rendered}


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _limit(seconds: int, memory: int) -> None:
    for kind, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        with suppress(OSError, ValueError):  # systems other than Linux do not know all of them
            resource.setrlimit(kind, (value, value))


if __name__ == "__main__":
    _limit(*map(int, sys.argv[1:]))
    sys.stdout.write(json.dumps(render(json.load(sys.stdin))))
