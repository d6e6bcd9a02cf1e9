"""The routes of `label`: the page, questions and answers, pictures, and the end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qwen_vl_classifier.errors import ImageError, JournalError, NotCurrentError
from qwen_vl_classifier.files.pages import page_templates
from qwen_vl_classifier.labelling.web.labelling_state import LabellingService
from qwen_vl_classifier.serving.http.json_bodies import JsonLimits, parse_json
from qwen_vl_classifier.serving.http.page_files import add_files, list_files, page_answer
from qwen_vl_classifier.serving.http.problems import RefusedError, explain_invalid

T = TypeVar("T")
Content = TypeVar("Content", bound=BaseModel)

BODY_BYTES = 65_536
"""The largest body: an answer takes a few hundred bytes."""

_BODY_SECONDS = 8.0
_PAGE = "labelling/page"
_SHARED_PAGE = "serving/page"
_SHARED_FILES = ("base.css", "dom.js", "icon.svg", "numbers.js")
_LIMITS = JsonLimits(items=1, text_chars=4_096, picture_chars=0)
_A_DAY = 86_400.0  # in seconds; nobody thinks longer about one answer

# A report is a page with scripts of its own. In a sandbox these have no origin, so they can neither read nor send
# anything here.
_REPORT_POLICY = (
    "sandbox allow-scripts allow-downloads allow-popups; default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_KEEP = "private, max-age=86400, immutable"  # the key of a row is that of its content

_Name = Annotated[str, Field(pattern=r"\A[A-Za-z0-9_-]{1,64}\z")]
_Word = Annotated[str, Field(min_length=1, max_length=1_024)]

router = APIRouter(include_in_schema=False)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Nothing(_Body):
    pass


class _Browser(_Body):
    browser: _Name


class _Ask(_Browser):
    ahead: int = Field(default=4, ge=0, le=16)


class _Answer(_Browser):
    key: _Name
    label: _Word | None = None
    answer: _Word
    seconds: float = Field(ge=0, le=_A_DAY, allow_inf_nan=False)


@router.get("/")
async def page(request: Request) -> Response:
    """Show the page."""
    title = _labelling(request).setup["title"]
    content = page_templates(_PAGE).get_template("index.html").render(title=title)
    return page_answer(request, content.encode("utf-8", "replace"), "text/html; charset=utf-8")


@router.get("/api/setup")
async def setup(request: Request) -> Response:
    """Return what does not change."""
    return JSONResponse({**_labelling(request).setup})


@router.get("/api/progress")
async def progress(request: Request) -> Response:
    """Return how far labelling is."""
    labelling = _labelling(request)
    return JSONResponse(await labelling.call(lambda: _progress(labelling)))


@router.post("/api/questions")
async def questions(request: Request) -> Response:
    """Return the current question of a browser, those to follow, and how far labelling is."""
    labelling, body = _labelling(request), await _body(request, _Ask)
    return JSONResponse(await labelling.call(lambda: _asked(labelling, body.browser, body.ahead)))


@router.post("/api/answers")
async def answers(request: Request) -> Response:
    """Keep an answer; return what `questions` returns. The answer is on disk by then."""
    labelling, body = _labelling(request), await _body(request, _Answer)
    if body.answer not in labelling.allowed:
        raise RefusedError(400, "invalid_request", "answer is none of the words that /api/setup lists", param="answer")
    if labelling.rows.row_of(body.key) is None:
        raise _not_current()

    def work() -> dict[str, Any]:
        labelling.session.answer(body.browser, body.key, body.label, body.answer, body.seconds)
        return _asked(labelling, body.browser)

    return JSONResponse(await _saving(labelling, work))


@router.post("/api/undo")
async def undo(request: Request) -> Response:
    """Take back the last answer of a browser, which is asked again; return what `questions` returns."""
    labelling, body = _labelling(request), await _body(request, _Browser)

    def work() -> dict[str, Any]:
        labelling.session.undo(body.browser)
        return _asked(labelling, body.browser)

    return JSONResponse(await _saving(labelling, work))


@router.get("/api/rows/{key}/images/{number}")
async def image(request: Request, key: str, number: Annotated[int, Path(ge=0, le=9_999)]) -> Response:
    """Show one picture of a row."""
    labelling = _labelling(request)
    row = labelling.rows.row_of(key)
    try:
        content = None if row is None else await labelling.pictures.jpeg(row, number)
    except ImageError as error:
        raise RefusedError(422, error.code, str(error)) from None
    if content is None:
        raise RefusedError(404, "not_found", "there is no such picture")
    return Response(content, media_type="image/jpeg", headers={"Cache-Control": _KEEP})


@router.post("/api/finish", status_code=202)
async def finish(request: Request) -> Response:
    """Begin to train on the answers; `progress` says how far that is."""
    labelling, _ = _labelling(request), await _body(request, _Nothing)

    def work() -> dict[str, Any]:
        labelling.finishing.start(labelling.session.labelled())
        return _progress(labelling)

    return JSONResponse(await _saving(labelling, work), status_code=202)


@router.get("/report/")
async def report(request: Request) -> Response:
    """Show the report of the last training."""
    content = await asyncio.to_thread(_labelling(request).finishing.report)
    if content is None:
        raise RefusedError(404, "not_found", "there is no report yet")
    return Response(
        content.encode("utf-8", "replace"),
        media_type="text/html; charset=utf-8",
        headers={"Content-Security-Policy": _REPORT_POLICY},
    )


add_files(router, _PAGE, list_files(_PAGE))
add_files(
    router, _SHARED_PAGE, {name: kind for name, kind in list_files(_SHARED_PAGE).items() if name in _SHARED_FILES}
)


def _labelling(request: Request) -> LabellingService:
    found: LabellingService = request.app.state.service
    return found


def _asked(labelling: LabellingService, browser: str, ahead: int = 4) -> dict[str, Any]:
    examples = labelling.rows.examples
    found = labelling.session.questions(browser, ahead)
    return {
        "questions": [question.to_json(examples[question.row]) for question in found],
        "progress": _progress(labelling),
    }


def _progress(labelling: LabellingService) -> dict[str, Any]:
    return {**labelling.session.progress(), "finish": labelling.finishing.state()}


async def _saving(labelling: LabellingService, work: Callable[[], T]) -> T:
    """Run what writes an answer.

    Raises:
        RefusedError: 409, there is no such question; 507, it could not be written.
    """
    try:
        return await labelling.call(work)
    except NotCurrentError:
        raise _not_current() from None
    except JournalError as error:
        raise RefusedError(507, "not_saved", str(error)) from None


def _not_current() -> RefusedError:
    return RefusedError(409, "not_current", "this question is no longer there; ask for the current one")


async def _body(request: Request, model: type[Content]) -> Content:
    """Read a body as JSON that fits a schema.

    Raises:
        RefusedError: 400, it does not; 408, it comes too slowly; 413, it is too long; 415, it is not JSON: forms, which
            a page of any site can send, among them.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" or request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RefusedError(415, "unsupported_media_type", "the body is not JSON; send application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > BODY_BYTES:
                    detail = f"the body has more than {BODY_BYTES:,} bytes; expected one answer"
                    raise RefusedError(413, "body_too_large", detail)
    except TimeoutError:
        raise RefusedError(408, "body_too_slow", "the body did not arrive in time; send it faster") from None
    content = parse_json(body, _LIMITS)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise RefusedError(400, "invalid_request", explain_invalid(error)) from None
