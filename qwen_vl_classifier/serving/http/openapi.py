"""The description of the interface (OpenAPI 3.1): what routes declare of their bodies and of every status they give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from qwen_vl_classifier.serving.http.access import HEALTH, changes_models
from qwen_vl_classifier.serving.http.problems import MEDIA_TYPE, Problem

DESCRIPTION = """\
Picture and text in, a calibrated probability of class 1 out.

Errors are problem details (RFC 9457) that carry OpenAI's `error` object. An answer with `Retry-After` says when to try
again. Every answer carries `X-Request-ID`, under which the server's log has the request.
"""

CLASSIFYING = (400, 404, 408, 413, 415, 422, 429, 503, 504)
"""The problems that a route which classifies may answer, beside those that every route may."""

_MEANINGS = {
    400: "Malformed request",
    401: "No valid key",
    403: "A request from a page of another site, or a change of what is served that is not allowed",
    404: "No such model",
    409: "It cannot be changed by this request",
    408: "The body arrived too slowly",
    413: "Too many bytes, pixels, characters or examples",
    415: "Unsupported format",
    421: "A host name that is not this server's",
    422: "A picture that cannot be opened, or a request that does not fit the schema",
    429: "The server is overloaded",
    500: "The server failed",
    503: "Loading, or shutting down",
    504: "No result before the deadline",
    507: "Not enough memory for another version",
}

_RETRY = {"Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Declare the problems that a route may answer, among them those that any route may."""
    return {
        status: {
            "description": _MEANINGS[status],
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
            **({"headers": _RETRY} if status in (429, 503) else {}),
        }
        for status in sorted({401, 403, 421, 500, *statuses})
    }


def takes(
    model: type[BaseModel], examples: Mapping[str, Any], *, form: type[BaseModel] | None = None
) -> dict[str, Any]:
    """Declare the body of a route, which reads it by hand so that its limits hold while it comes in."""
    content: dict[str, Any] = {"application/json": {"schema": _schema(model), "examples": examples}}
    if form is not None:
        content["multipart/form-data"] = {"schema": _schema(form)}
    return {"requestBody": {"required": True, "content": content}}


class Application(FastAPI):
    """An application that describes itself completely."""

    def openapi(self) -> dict[str, Any]:
        """Return the description; it is made once."""
        if self.openapi_schema is None:
            self.openapi_schema = self._describe()
        return self.openapi_schema

    def _describe(self) -> dict[str, Any]:
        page = get_openapi(title=self.title, version=self.version, description=DESCRIPTION, routes=self.routes)
        schemas = page.setdefault("components", {}).setdefault("schemas", {})
        # What the framework declares for parameters in URLs: here these are answered with problems.
        schemas.pop("HTTPValidationError", None)
        schemas.pop("ValidationError", None)
        _move(_schema(Problem), schemas)
        locked = self.state.locked
        page["components"]["securitySchemes"] = {
            "admin": {"type": "http", "scheme": "bearer", "description": "the admin key"}
        }
        if locked:
            page["components"]["securitySchemes"] |= {
                "bearer": {"type": "http", "scheme": "bearer"},
                "basic": {"type": "http", "scheme": "basic", "description": "any name, and the key as password"},
            }
        for path, operations in page["paths"].items():
            for method, operation in operations.items():
                for content in operation.get("requestBody", {}).get("content", {}).values():
                    content["schema"] = _move(content["schema"], schemas)
                responses = operation["responses"]
                if "application/json" in responses.get("422", {}).get("content", {}):
                    del responses["422"]
                if changes_models(method.upper(), path):
                    operation["security"] = [{"admin": []}]
                elif locked and path not in HEALTH:
                    operation["security"] = [{"bearer": []}, {"basic": []}]
                else:
                    responses.pop("401")
        return page


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema(ref_template="#/components/schemas/{model}")


def _move(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """Put a schema and those that it defines among those of the document, and return a reference to it."""
    schemas.update(schema.get("$defs", {}))
    schemas[schema["title"]] = {key: value for key, value in schema.items() if key != "$defs"}
    return {"$ref": f"#/components/schemas/{schema['title']}"}
