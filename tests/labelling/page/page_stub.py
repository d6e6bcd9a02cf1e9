"""A server for tests of the labelling page: the real page beside a stub of the interface, which does as it is told."""

from __future__ import annotations

import asyncio
import io
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image

from qwen_vl_classifier.files.pages import page_templates
from qwen_vl_classifier.serving.http.page_files import add_files, list_files, page_answer

FOLDER = "labelling/page"
SHARED = ("base.css", "dom.js", "icon.svg", "numbers.js")
ESTIMATE = {
    "rows": 24,
    "accuracy": [0.83, 0.66, 0.93],
    "auroc": [0.91, 0.78, 0.98],
    "ece": [0.06, 0.02, 0.14],
    "majority": 0.58,
}
CURVE = {
    "metric": "accuracy",
    "points": [[10, 0.62, 0.5, 0.74], [20, 0.74, 0.63, 0.84], [40, 0.83, 0.74, 0.9], [80, 0.87, 0.8, 0.92]],
    "fit": [[10 + 5 * step, 0.9 - 0.28 * (10 / (10 + 5 * step)) ** 0.9] for step in range(20)],
    "level": [0.9, 0.86, 0.94],
    "next_50": [0.012, 0.003, 0.029],
    "stop": False,
    "sentence": "Accuracy still rises: it may level off near 90 %.",
}


def label(name: str = "label", no: str = "no", yes: str = "yes") -> dict[str, str]:
    return {"name": name, "no": no, "yes": yes}


def picture(size: tuple[int, int] = (320, 240), hue: int = 0) -> bytes:
    """Draw a picture with a circle, as JPEG."""
    content = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").rotate(hue).save(content, "JPEG", quality=85)
    return content.getvalue()


@dataclass
class StubSession:
    """What the stub asks and how it behaves.

    Attributes:
        rows: How many there are; row 3 has the key `r3`.
        labels: Of each row.
        one_of: Whether labels are classes, of which a row has one.
        images: Pictures of each row.
        text: Of each row; `{row}` becomes its number.
        sources: How rows were chosen, in turn.
        before: Earlier answers by key, shown with the question.
        estimate: Of every label, if any.
        curve: Of every label, if any.
        more: Merged into the progress.
        refusals: By route a list of (status, code, detail) that come first, one for each request.
        gate: `/api/answers` waits for it.
        answers: What was answered: (browser, key, label, answer), undone ones taken away.
        bodies: All bodies that came, by route.
    """

    rows: int = 60
    labels: list[dict[str, str]] = field(default_factory=lambda: [label()])
    one_of: bool = False
    images: int = 1
    content: bytes = b""
    text: str = "Is the cup number {row} broken?"
    sources: tuple[str, ...] = ("random", "uncertain", "diverse")
    before: dict[str, str] = field(default_factory=dict)
    estimate: dict[str, Any] | None = None
    curve: dict[str, Any] | None = None
    more: dict[str, Any] = field(default_factory=dict)
    data: str = "photos"
    refusals: dict[str, list[tuple[int, str, str]]] = field(default_factory=dict)
    gate: threading.Event = field(default_factory=threading.Event)
    answers: list[tuple[str, str, str | None, str]] = field(default_factory=list)
    bodies: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gate.set()

    def setup(self) -> dict[str, Any]:
        return {
            "title": self.data,
            "data": self.data,
            "out": "labels.jsonl",
            "labels": self.labels,
            "one_of": self.one_of,
            "annotator": "ann",
            "rows": self.rows,
            "model": "builtin:tiny",
        }

    def questions(self, browser: str, ahead: int = 4) -> list[dict[str, Any]]:
        done = {(key, name) for _, key, name, _ in self.answers}
        names = [None] if self.one_of else [entry["name"] for entry in self.labels]
        asked = []
        for row in range(self.rows):
            for name in names:
                if (f"r{row}", name) not in done:
                    asked.append(self.question(row, name))
        return asked[: 1 + ahead]

    def question(self, row: int, name: str | None) -> dict[str, Any]:
        key = f"r{row}"
        return {
            "key": key,
            "label": name,
            "name": f"cup-{row:03}.jpg",
            "text": self.text.format(row=row),
            "images": [f"/api/rows/{key}/images/{number}" for number in range(self.images)],
            "source": "check" if key in self.before else self.sources[row % len(self.sources)],
            "before": self.before.get(key),
        }

    def progress(self) -> dict[str, Any]:
        by = Counter((name, answer) for _, _, name, answer in self.answers)
        given = {key for _, key, _, answer in self.answers if answer not in ("skip", "unsure")}
        words = Counter(answer for *_, answer in self.answers)
        passed = {key for _, key, _, _ in self.answers}
        labels = []
        for entry in self.labels:
            name = entry["name"]
            yes = words[name] if self.one_of else by[name, "yes"]
            no = len(given) - words[name] if self.one_of else by[name, "no"]
            labels.append({"name": name, "yes": yes, "no": no, "estimate": self.estimate, "curve": self.curve})
        finish = {"state": "no", "message": "", "classifier": None, "report": False, "command": None}
        return {
            "answered": len(given),
            "skipped": words["skip"],
            "unsure": words["unsure"],
            "rows": self.rows,
            "random": len(given) // 3,
            "left": self.rows - len(passed),
            "refit": {"labels": len(given), "seconds": 0.04, "running": False},
            "labels": labels,
            "agreement": None,
            "annotators": {"ann": len(given)},
            "finish": finish,
            **self.more,
        }

    def state(self, browser: str, ahead: int = 4) -> dict[str, Any]:
        return {"questions": self.questions(browser, ahead), "progress": self.progress()}


def problem(status: int, code: str, detail: str) -> Response:
    """Answer with an error as the server does."""
    content = {"status": status, "detail": detail, "error": {"message": detail, "code": code}}
    return JSONResponse(content, status, media_type="application/problem+json")


def make_page_app(stub: StubSession) -> FastAPI:
    """Make the application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    router = APIRouter()
    add_files(router, FOLDER, list_files(FOLDER))
    shared = list_files("serving/page")
    add_files(router, "serving/page", {name: shared[name] for name in SHARED})

    @router.get("/")
    async def page(request: Request) -> Response:
        content = page_templates(FOLDER).get_template("index.html").render(title=stub.data)
        return page_answer(request, content.encode(), "text/html; charset=utf-8")

    @app.middleware("http")
    async def refuse(request: Request, proceed: Any) -> Response:
        waiting = stub.refusals.get(request.url.path)
        if waiting:
            status, code, detail = waiting.pop(0)
            return problem(status, code, detail)
        answer: Response = await proceed(request)
        return answer

    @router.get("/api/setup")
    async def setup() -> dict[str, Any]:
        return stub.setup()

    @router.get("/api/progress")
    async def progress() -> dict[str, Any]:
        return stub.progress()

    @router.post("/api/questions")
    async def questions(body: dict[str, Any]) -> dict[str, Any]:
        return stub.state(**body)

    @router.post("/api/answers")
    async def answer(body: dict[str, Any]) -> dict[str, Any]:
        stub.bodies.setdefault("answers", []).append(body)
        while not stub.gate.is_set():
            await asyncio.sleep(0.005)
        stub.answers.append((body["browser"], body["key"], body["label"], body["answer"]))
        stub.before.pop(body["key"], None)
        return stub.state(body["browser"])

    @router.post("/api/undo")
    async def undo(body: dict[str, Any]) -> dict[str, Any]:
        state = stub.state(body["browser"])
        if stub.answers:
            _, key, name, word = stub.answers.pop()
            first = {**stub.question(int(key[1:]), name), "before": word}
            rest = [
                asked for asked in stub.questions(body["browser"], 5) if (asked["key"], asked["label"]) != (key, name)
            ]
            state = {"questions": [first, *rest][:5], "progress": stub.progress()}
        return state

    @router.get("/api/rows/{key}/images/{number}")
    async def image(key: str, number: int) -> Response:
        if stub.content == b"broken":
            return problem(422, "image_damaged", "the picture is damaged")
        content = stub.content or picture(hue=17 * int(key[1:]) + 90 * number)
        return Response(content, media_type="image/jpeg", headers={"cache-control": "private, immutable, max-age=3600"})

    @router.post("/api/finish", status_code=202)
    async def finish() -> dict[str, Any]:
        stub.bodies.setdefault("finish", []).append({})
        running = {"state": "running", "message": "Comparing heads: fold 2 of 5", "classifier": None, "report": False}
        stub.more["finish"] = {**running, "command": None}
        return stub.progress()

    app.include_router(router)
    return app
