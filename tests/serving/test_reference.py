"""The interface in words: everything a document says, in types that people read, with examples and commands."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import BaseModel, Field

from qwen_vl_classifier.serving.reference import describe_interface, example_of

DOCUMENT: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {"title": "Interface", "version": "1", "description": "What it does."},
    "paths": {
        "/things/{name}": {
            "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}],
            "post": {
                "tags": ["things"],
                "summary": "Change it",
                "parameters": [{"name": "how", "in": "query", "schema": {"enum": ["fast", "well"]}}],
                "requestBody": {
                    "content": {
                        "application/json": {"schema": {"$ref": "#/components/schemas/Thing"}},
                        "multipart/form-data": {
                            "schema": {
                                "required": ["name"],
                                "properties": {
                                    "file": {"type": "string", "format": "binary"},
                                    "name": {"type": "string"},
                                    "more": {"type": "integer"},
                                },
                            }
                        },
                    }
                },
                "responses": {
                    "200": {
                        "description": "Successful Response",
                        "content": {
                            "application/json": {
                                "example": {"it's": 1},
                                "examples": {"other": {"summary": "Another", "value": 2}},
                            },
                            "image/png": {},
                        },
                    },
                    "401": {"description": "No valid key"},
                    "429": {"description": "Full", "headers": {"Retry-After": {"schema": {"type": "integer"}}}},
                },
            },
        },
        "/health": {"get": {"responses": {"200": {"description": "OK"}}}},
    },
    "components": {
        "schemas": {
            "Thing": {
                "description": "A thing.",
                "type": "object",
                "required": ["kind"],
                "properties": {
                    "parts": {"type": "array", "items": {"$ref": "#/components/schemas/Thing"}},
                    "kind": {"anyOf": [{"const": "a"}, {"type": "null"}], "description": "which"},
                    "pair": {"prefixItems": [{"type": "number"}, {"type": "integer"}], "type": "array"},
                    "counts": {"additionalProperties": {"type": "number"}, "type": "object"},
                    "size": {"type": ["integer", "null"], "default": 3},
                    "anything": {},
                },
            },
            "Mode": {"enum": ["x", "y"]},
        }
    },
}


def described(document: dict[str, Any] = DOCUMENT) -> dict[str, Any]:
    return describe_interface(document, address="http://here", key_variable="THE_KEY")


def words(pieces: list[tuple[str, str | None]]) -> str:
    return "".join(text for text, _ in pieces)


def test_routes_are_grouped_with_their_parameters_and_answers() -> None:
    interface = described()
    assert [(group["name"], len(group["routes"])) for group in interface["groups"]] == [("things", 1), ("routes", 1)]
    (route,) = interface["groups"][0]["routes"]
    assert (route["method"], route["path"], route["id"]) == ("POST", "/things/{name}", "post-things-name")
    parameters = [(p["name"], p["where"], p["required"], words(p["type"])) for p in route["parameters"]]
    assert parameters == [("name", "path", True, "text"), ("how", "query", False, '"fast" or "well"')]
    assert [(body["media_type"], words(body["type"])) for body in route["bodies"]] == [
        ("application/json", "Thing"),
        ("multipart/form-data", "object"),
    ]
    assert [words(field["type"]) for field in route["bodies"][1]["fields"]] == ["text", "file", "integer"]
    answers = [(a["status"], a["phrase"], a["description"], a["headers"]) for a in route["answers"]]
    assert answers == [
        ("200", "OK", "", []),
        ("401", "Unauthorized", "No valid key", []),
        ("429", "Too Many Requests", "Full", ["Retry-After"]),
    ]
    examples = [part["examples"] for part in route["answers"][0]["contents"]]
    assert examples == [[{"name": "Example", "value": '{"it\'s": 1}'}, {"name": "Another", "value": "2"}], []]


def test_shapes_are_said_in_words_and_linked() -> None:
    mode, thing = described()["shapes"]
    assert (mode["name"], words(mode["type"]), mode["fields"]) == ("Mode", '"x" or "y"', [])
    assert thing["type"] is None
    fields = [(f["name"], f["required"], words(f["type"]), f["default"]) for f in thing["fields"]]
    assert fields == [
        ("kind", True, '"a" or null', ""),
        ("parts", False, "list of Thing", ""),
        ("pair", False, "list: number, integer", ""),
        ("counts", False, "object by name of number", ""),
        ("size", False, "integer or null", "3"),
        ("anything", False, "anything", ""),
    ]
    assert thing["fields"][1]["type"][-1] == ("Thing", "Thing")


def test_commands_ask_with_the_key_where_one_is_wanted() -> None:
    interface = described()
    (post,), (get,) = (group["routes"] for group in interface["groups"])
    assert get["commands"] == ["curl 'http://here/health'"]
    as_json, as_form = post["commands"]
    assert as_json.splitlines() == [
        "curl 'http://here/things/{name}' \\",
        '  -H "Authorization: Bearer $THE_KEY" \\',
        "  -H 'Content-Type: application/json' \\",
        '  -d \'{"kind": "a"}\'',
    ]
    assert as_form.splitlines()[2:] == ["  -F 'file=@file.png' \\", "  -F 'name=text'"]


def test_an_apostrophe_does_not_end_the_command() -> None:
    body = {"content": {"application/json": {"example": "it's"}}}
    document = {"info": DOCUMENT["info"], "paths": {"/x": {"put": {"requestBody": body, "responses": {}}}}}
    (curl,) = described(document)["groups"][0]["routes"][0]["commands"]
    assert curl.endswith("-d '\"it'\\''s\"'")
    assert "-X PUT" in curl


def test_shapes_that_hold_themselves_come_to_an_end() -> None:
    schema = {"$ref": "#/components/schemas/Knot"}
    shapes = {"Knot": {"required": ["next"], "properties": {"next": schema}}}
    assert len(json.dumps(example_of(schema, shapes))) < 200
    assert example_of({"$ref": "#/components/schemas/Missing"}, {}) is None


class Inner(BaseModel):
    pair: tuple[float, float]
    word: str = Field(examples=["tower"])


class Outer(BaseModel):
    inner: list[Inner]
    flag: bool
    kind: int | str


@pytest.mark.parametrize("shape", [Inner, Outer])
def test_examples_that_are_made_up_fit_their_shape(shape: type[BaseModel]) -> None:
    app = FastAPI()
    app.post("/x", response_model=shape)(lambda: None)
    document = app.openapi()
    (route,) = describe_interface(document, address="", key_variable="K")["groups"][0]["routes"]
    example = json.loads(route["answers"][0]["contents"][0]["examples"][0]["value"])
    shape.model_validate(example)
    assert "tower" in json.dumps(example)
