"""The page at `/`, what it consists of, and the page of the interface at `/docs`.

Nothing is read from a path that a request names: the files are a fixed table, and anything else is not found. The
pictures to try first are drawn here, so that they are nobody's. All of it stands under a policy that lets the pages
load only what this server gives, and run only its own script files.
"""

from __future__ import annotations

import functools
import io
import json
import shlex
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response

from qwen_vl_classifier.config.serve import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, ServeConfig
from qwen_vl_classifier.files.pages import page_templates
from qwen_vl_classifier.scenes.statements import scene_examples
from qwen_vl_classifier.serving.http.page_files import add_files, list_files, page_answer
from qwen_vl_classifier.serving.items import MAX_IMAGES

_PAGE = "serving/page"

EXAMPLES = tuple(f"example-{number}.png" for number in range(1, 9))
"""Names of the pictures to try first."""

ASSETS = list_files(_PAGE)
"""Files of the page by their path below its folder, each with its media type."""

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page(request: Request) -> Response:
    """Show the page on which a picture and a text can be tried."""
    config: ServeConfig = request.app.state.service.config
    content = (
        page_templates(_PAGE)
        .get_template("index.html")
        .render(
            config=config,
            max_images=MAX_IMAGES,
            key_variable=API_KEY_VARIABLE if request.app.state.locked else "",
        )
    )
    return page_answer(request, content.encode(), "text/html; charset=utf-8")


@router.get("/docs")
def docs(request: Request) -> Response:  # in a thread: the first time takes as long as many requests
    """Show the interface in words: every route with what it takes and what it answers."""
    content = _render_docs(request.app, str(request.base_url).rstrip("/"))
    return page_answer(request, content, "text/html; charset=utf-8")


@functools.lru_cache(maxsize=8)
def _render_docs(app: FastAPI, address: str) -> bytes:
    templates = page_templates(_PAGE)
    templates.filters["json"] = functools.partial(json.dumps, ensure_ascii=False, indent=2)
    templates.filters["quoted"] = shlex.quote
    page = templates.get_template("docs/docs.html")
    variables = {
        "key_variable": API_KEY_VARIABLE,
        "admin_key_variable": ADMIN_KEY_VARIABLE,
        "locked": app.state.locked,
    }
    return page.render(app.openapi(), address=address, **variables).encode()


@router.get("/page/examples.json")
def examples(request: Request) -> Response:  # in a thread, as the pictures: they are drawn the first time
    """List pictures to try first, each with a text that is true of it or false."""
    listed = [{"name": name, "text": text} for name, (_, text) in _examples().items()]
    return page_answer(request, json.dumps(listed).encode(), "application/json")


@functools.cache
def _examples() -> dict[str, tuple[bytes, str]]:
    """Draw the pictures as PNG, each with a text; as far as scenes allow, texts are true and false in turn."""
    drawn: dict[str, tuple[bytes, str]] = {}
    scenes = scene_examples("evaluation", scenes=len(EXAMPLES), per_scene=2, kinds=("existence",))
    for name, (picture, _, made) in zip(EXAMPLES, scenes, strict=True):
        content = io.BytesIO()
        picture.save(content, "PNG")
        fitting = [statement for statement in made if statement.label == len(drawn) % 2] or made
        drawn[name] = (content.getvalue(), fitting[0].text)
    return drawn


def _example(name: str) -> Any:
    def example(request: Request) -> Response:
        return page_answer(request, _examples()[name][0], "image/png")

    return example


add_files(router, _PAGE, ASSETS)
for _name in EXAMPLES:
    router.add_api_route(f"/page/examples/{_name}", _example(_name))
