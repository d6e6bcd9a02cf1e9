"""An OpenAPI document (version 3.1) as plain values from which a template makes a page for people.

Everything shown is read from the document, so the page cannot disagree with it. Types are lists of pieces, each with
its words and, where they name a shape, the shape's name, from which the template makes a link.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any, TypeAlias

Schema: TypeAlias = Mapping[str, Any]
Piece: TypeAlias = tuple[str, str | None]  # words, and the shape that they name

_METHODS = ("get", "put", "post", "delete", "patch", "head", "options", "trace")
_WORDS = {"string": "text", "boolean": "true or false", "null": "null", "array": "list"}
_DEEPEST = 8  # levels of an example that is made up: shapes may hold themselves
_LONGEST_LINE = 100  # characters of an example that stands on one line


def describe_interface(document: Mapping[str, Any], *, address: str, key_variable: str) -> dict[str, Any]:
    """Describe every route of a document.

    Args:
        document: As `FastAPI.openapi` returns it.
        address: Where the server is, as the commands for curl name it, without a slash at the end.
        key_variable: The environment variable from which these commands take the key.

    Returns:
        `title`, `version`, `groups` (each `name`, `routes`) and `shapes` (each `name`, `description`, `fields`).
    """
    shapes = dict(document.get("components", {}).get("schemas", {}))
    groups: dict[str, list[dict[str, Any]]] = {}
    for path, item in document.get("paths", {}).items():
        for method in _METHODS:
            if method in item:
                shared, own = item.get("parameters", ()), item[method].get("parameters", ())
                operation = {**item[method], "parameters": [*shared, *own]}
                route = _Route(method.upper(), path, operation, shapes)
                group = (operation.get("tags") or ["routes"])[0]
                groups.setdefault(group, []).append(route.describe(address, key_variable))
    return {
        "title": document["info"]["title"],
        "version": document["info"]["version"],
        "description": document["info"].get("description", ""),
        "groups": [{"name": name, "routes": routes} for name, routes in groups.items()],
        "shapes": [
            {
                "name": name,
                "description": shape.get("description", ""),
                "fields": _fields(shape),
                "type": None if "properties" in shape else list(_type(shape)),
            }
            for name, shape in sorted(shapes.items())
        ],
    }


def example_of(schema: Schema, shapes: Mapping[str, Schema], *, deepest: int = _DEEPEST) -> Any:
    """Return a value of a schema: one that it gives itself, or else one made up from types and required fields."""
    for known in ("example", "const", "default"):
        if schema.get(known) is not None:
            return schema[known]
    for listed in ("examples", "enum"):
        if schema.get(listed):
            return schema[listed][0]
    if "$ref" in schema:
        shape = shapes.get(_name_of(schema["$ref"]))
        return example_of(shape, shapes, deepest=deepest - 1) if shape is not None and deepest else None
    for choice in ("anyOf", "oneOf", "allOf"):
        if choice in schema:
            wanted = [part for part in schema[choice] if part.get("type") != "null"]
            return example_of(wanted[0], shapes, deepest=deepest) if wanted else None
    kind = _kinds(schema)[0]
    if kind == "object":
        required = schema.get("required") or list(schema.get("properties", {}))
        fields = {name: schema["properties"][name] for name in required if name in schema.get("properties", {})}
        return {name: example_of(field, shapes, deepest=deepest - 1) for name, field in fields.items() if deepest}
    if kind == "array":
        parts = schema.get("prefixItems") or [schema.get("items", {})]
        return [example_of(part, shapes, deepest=deepest - 1) for part in parts] if deepest else []
    return {"string": "text", "integer": 1, "number": 0.5, "boolean": True}.get(kind)


class _Route:
    """One operation of a document.

    Args:
        method: Its method, in capitals.
        path: Its path, with the names of parameters in braces.
        operation: The operation object.
        shapes: All schemas of the document by name; those defined within the operation are added.
    """

    def __init__(self, method: str, path: str, operation: Mapping[str, Any], shapes: dict[str, Any]) -> None:
        self.method = method
        self.path = path
        self._operation = operation
        self._shapes = shapes

    def describe(self, address: str, key_variable: str) -> dict[str, Any]:
        """Describe the route for the template."""
        bodies = list(self._contents(self._operation.get("requestBody", {})))
        answers = [
            {
                "status": status,
                "phrase": _phrase(status),
                "description": _said(answer.get("description", ""), status),
                "contents": list(self._contents(answer)),
                "headers": sorted(answer.get("headers", {})),
            }
            for status, answer in self._operation.get("responses", {}).items()
        ]
        needs_key = "401" in self._operation.get("responses", {})
        return {
            "id": re.sub(r"\W+", "-", f"{self.method}{self.path}").strip("-").lower(),
            "method": self.method,
            "path": self.path,
            "summary": self._operation.get("summary", ""),
            "description": self._operation.get("description", ""),
            "parameters": [
                {
                    "name": parameter["name"],
                    "where": parameter["in"],
                    "required": parameter.get("required", False),
                    "type": list(_type(parameter.get("schema", {}))),
                    "description": parameter.get("description", ""),
                }
                for parameter in self._operation["parameters"]
            ],
            "bodies": bodies,
            "answers": answers,
            "commands": list(self._commands(bodies, address, key_variable if needs_key else "")),
        }

    def _contents(self, holder: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Describe each media type of a body or an answer."""
        for media_type, content in holder.get("content", {}).items():
            schema = content.get("schema", {})
            self._shapes.update(schema.get("$defs", {}))
            as_json = media_type.endswith("json")
            examples = {item.get("summary", name): item["value"] for name, item in content.get("examples", {}).items()}
            if "example" in content:
                examples = {"Example": content["example"], **examples}
            if not examples and as_json:
                examples = {"Example": example_of(schema, self._shapes)}
            yield {
                "media_type": media_type,
                "type": list(_type(schema)) if schema else [],
                "fields": _fields(schema),
                "examples": [
                    {"name": name, "value": _written(value) if as_json else str(value)}
                    for name, value in examples.items()
                ],
            }

    def _commands(self, bodies: list[dict[str, Any]], address: str, key_variable: str) -> Iterator[str]:
        """Write a command for curl for each kind of body, or the one of a route that takes none."""
        start = [f"curl {_shell(address + self.path)}"]
        if self.method not in ("GET", "POST"):
            start.append(f"-X {self.method}")
        if key_variable:
            start.append(f'-H "Authorization: Bearer ${key_variable}"')
        for body in bodies:
            if body["media_type"].endswith("json"):
                sent = ["-H 'Content-Type: application/json'", f"-d {_shell(body['examples'][0]['value'])}"]
            elif body["media_type"] == "multipart/form-data":
                sent = [f"-F {_shell(part)}" for part in self._form()]
            else:
                continue
            yield " \\\n  ".join(start + sent)
        if not bodies:
            yield " \\\n  ".join(start)

    def _form(self) -> Iterator[str]:
        """Give a value for every file and every required field of a form."""
        schema = self._operation["requestBody"]["content"]["multipart/form-data"].get("schema", {})
        shape = self._shapes.get(_name_of(schema["$ref"]), {}) if "$ref" in schema else schema
        for name, field in shape.get("properties", {}).items():
            if field.get("items", field).get("format") == "binary":
                yield f"{name}=@{name}.png"
            elif name in shape.get("required", ()):
                yield f"{name}={example_of(field, self._shapes)}"


def _fields(schema: Schema) -> list[dict[str, Any]]:
    """List the fields of an object, those that must be there first."""
    required = schema.get("required", ())
    fields = [
        {
            "name": name,
            "type": list(_type(field)),
            "required": name in required,
            "description": field.get("description", ""),
            "default": json.dumps(field["default"]) if field.get("default") is not None else "",
        }
        for name, field in schema.get("properties", {}).items()
    ]
    return sorted(fields, key=lambda field: not field["required"])


def _type(schema: Schema) -> Iterator[Piece]:
    """Say in words what a schema allows."""
    choices = schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf")
    if "$ref" in schema:
        name = _name_of(schema["$ref"])
        yield name, name
    elif "const" in schema:
        yield json.dumps(schema["const"]), None
    elif "enum" in schema:
        yield " or ".join(json.dumps(value) for value in schema["enum"]), None
    elif choices:
        for number, choice in enumerate(choices):
            if number:
                yield " or ", None
            yield from _type(choice)
    elif "prefixItems" in schema:
        yield "list: ", None
        for number, part in enumerate(schema["prefixItems"]):
            if number:
                yield ", ", None
            yield from _type(part)
    elif _kinds(schema)[0] == "array" and schema.get("items"):
        yield "list of ", None
        yield from _type(schema["items"])
    elif isinstance(schema.get("additionalProperties"), Mapping):
        yield "object by name of ", None
        yield from _type(schema["additionalProperties"])
    elif schema.get("format") == "binary" or "contentMediaType" in schema:
        yield "file", None
    else:
        yield " or ".join(_WORDS.get(kind, kind) for kind in _kinds(schema)), None


def _kinds(schema: Schema) -> list[str]:
    kind = schema.get("type", "object" if "properties" in schema else "anything")
    return [kind] if isinstance(kind, str) else list(kind)


def _name_of(reference: str) -> str:
    return reference.rsplit("/", maxsplit=1)[-1]


def _phrase(status: str) -> str:
    return HTTPStatus(int(status)).phrase if status.isdecimal() and int(status) in set(HTTPStatus) else ""


def _said(description: str, status: str) -> str:
    """Return a description, if it says more than the status does."""
    return "" if description in ("Successful Response", _phrase(status)) else description


def _written(value: Any) -> str:
    line = json.dumps(value, ensure_ascii=False)
    return line if len(line) <= _LONGEST_LINE else json.dumps(value, ensure_ascii=False, indent=2)


def _shell(value: str) -> str:
    return "'" + value.replace("'", "'\\''") + "'"
