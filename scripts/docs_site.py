"""Fill in the parts of the documentation site that follow from the code: options, flags and HTTP routes.

`mkdocs.yml` names this file as a hook. A page takes such a part by a line of its own, `<!-- generated: NAME -->`, so it
cannot drift from the code. In the repository itself, such a page shows the text around it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import qwen_vl_classifier
from qwen_vl_classifier.cli.shared import reference

EVERY_COMMAND = "every command"
"""The heading of options that all commands have, in `cli/flags.py`."""

_MARK = re.compile(r"^<!-- generated: (\w+)(?: (\w+))? -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks of a page; MkDocs calls this for every page."""
    return _MARK.sub(lambda mark: "\n".join(_PARTS[mark[1]](*filter(None, [mark[2]]))), markdown)


def commands() -> Iterator[str]:
    """Describe every command with all of its options."""
    for command in reference.commands():
        yield f"## {command.name} {{: #{command.name} }}\n"
        yield f"{_escaped(command.description)}\n"
        yield "```text"
        yield from command.usage
        yield "```\n"
        yield f"Example:\n\n```bash\n{command.example}\n```\n"
        for section, group in itertools.groupby(command.options, key=lambda option: option.section):
            if section == EVERY_COMMAND:
                continue
            if section not in ("arguments", "options"):
                yield f"**{section[0].upper()}{section[1:]}**\n"
            yield from _table("argument" if section == "arguments" else "option", group)


def shared() -> Iterator[str]:
    """Describe the options that every command has."""
    options = next(iter(reference.commands())).options
    return _table("option", (option for option in options if option.section == EVERY_COMMAND))


def _table(kind: str, group: Iterable[reference.Option]) -> Iterator[str]:
    yield f"| {kind} | meaning |"
    yield "|---|---|"
    for option in group:
        yield f"| {_names(option)} | {_escaped(option.help)} |"
    yield ""


def _names(option: reference.Option) -> str:
    value = option.value[1:-1].replace(",", "|") if option.value.startswith("{") else option.value
    if not option.names:
        return f"`{value}`"
    return "<br>".join(f"`{name} {value}".strip().replace("|", "\\|") + "`" for name in option.names)


def options(name: str) -> Iterator[str]:
    """Describe every option of a configuration class."""
    yield "| option | default | meaning |"
    yield "|---|---|---|"
    for item in dataclasses.fields(getattr(qwen_vl_classifier, name)):
        if "help" in item.metadata:
            help_ = item.metadata["help"].replace("%%", "%")
            yield f"| `{item.name}` | `{item.default!r}` | {_escaped(help_)} |"


def routes() -> Iterator[str]:
    """Describe every route and every shape of the server, from its own OpenAPI document."""
    document = qwen_vl_classifier.create_app(qwen_vl_classifier.ServeConfig(classifiers=("claims",))).openapi()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield from _route(f"{method.upper()} {path}", operation)
    yield "## Shapes\n"
    for name, shape in sorted(document["components"]["schemas"].items()):
        yield f"### {name} {{: #shape-{name.lower()} }}\n"
        yield f"{_escaped(shape.get('description', ''))}\n"
        yield "| field | type | meaning |"
        yield "|---|---|---|"
        for field, schema in shape.get("properties", {}).items():
            needed = " (required)" if field in shape.get("required", ()) else ""
            default = f" Default: `{json.dumps(schema['default'])}`." if schema.get("default") is not None else ""
            yield f"| `{field}`{needed} | {_type(schema)} | {_escaped(schema.get('description', ''))}{default} |"
        yield ""


def _route(title: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"## {title} {{: #{operation['operationId'].replace('_', '-')} }}\n"
    yield f"{_escaped(operation['description'])}\n"
    content = operation.get("requestBody", {}).get("content", {})
    if content:
        yield f"Body: {_contents(content)}\n"
    yield "| status | meaning | body |"
    yield "|---|---|---|"
    for status, answer in operation["responses"].items():
        meaning = "OK" if status == "200" else _escaped(answer["description"])
        yield f"| {status} | {meaning} | {_contents(answer.get('content', {}))} |"
    yield ""


def _contents(content: dict[str, Any]) -> str:
    return ", ".join(f"`{media_type}`: {_type(part['schema'])}" for media_type, part in content.items())


def _type(schema: dict[str, Any]) -> str:
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices:
        return " or ".join(_type(choice) for choice in choices)
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#shape-{name.lower()})"
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema.get("enum", [schema.get("const")]))
    if "items" in schema:
        return f"list of {_type(schema['items'])}"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties'])} by name"
    if schema.get("format") == "binary":
        return "file"
    return {"string": "text", "boolean": "true or false"}.get(schema.get("type", ""), schema.get("type", "anything"))


def _escaped(text: str) -> str:
    """Keep what Markdown would take for markup as it is, outside of `code`."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(
        part.replace("|", "\\|") if part.startswith("`") else re.sub(r"([|*_<>\[\]])", r"\\\1", part) for part in parts
    )


_PARTS: dict[str, Any] = {"commands": commands, "shared": shared, "options": options, "routes": routes}
