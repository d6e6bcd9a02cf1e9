"""Read a request within limits, and do its work as long as its caller waits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from qwen_vl_classifier.errors import DeadlineError, first_of
from qwen_vl_classifier.serving.admission import AdmittedRequest
from qwen_vl_classifier.serving.http.forms import Part, parse_form
from qwen_vl_classifier.serving.http.json_bodies import JsonLimits, parse_json
from qwen_vl_classifier.serving.http.problems import RefusedError, explain_invalid
from qwen_vl_classifier.serving.items import ItemError, ItemResult
from qwen_vl_classifier.serving.media import longest_base64
from qwen_vl_classifier.serving.models.label_names import label_model
from qwen_vl_classifier.serving.models.model_set import ModelSet
from qwen_vl_classifier.serving.service import Service

T = TypeVar("T")
Content = TypeVar("Content", bound=BaseModel)

_NOT_READY = {
    "loading": "the server is loading its classifiers; try again later",
    "warming": "the server is warming up; try again later",
    "draining": "the server is shutting down; try another one",
    "failed": "the server has failed; see its log",
}

_HELD_AT_ONCE = 256 * 1024  # bytes that are counted for a body before they come

_PARSED_AT_ONCE = 64 * 1024  # bytes of a body that the event loop parses itself; more than that is left to a thread


class Incoming:
    """One admitted request. Use `admitted`.

    Args:
        request: The request.
        service: Who answers it.
        admitted: What it holds and until when it is to be answered.

    Attributes:
        service: Who answers it.
        served: The classifiers that were served when it was let in, and that alone answer it.
        admitted: What it holds and until when it is to be answered.
    """

    def __init__(self, request: Request, service: Service, admitted: AdmittedRequest) -> None:
        self.service = service
        self.served = service.served
        self.admitted = admitted
        self._request = request

    def is_form(self) -> bool:
        """Tell whether the body is a form, from its media type.

        Raises:
            RefusedError: 415, it is neither a form nor JSON, or it is compressed.
        """
        kind = self._request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if self._request.headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
            raise RefusedError(415, "unsupported_encoding", "the body is compressed; send it as it is")
        if kind in ("", "application/json"):
            return False
        if kind == "multipart/form-data":
            return True
        raise RefusedError(
            415, "unsupported_media_type", "the body is neither JSON nor a form with files; send application/json"
        )

    async def json(
        self, model: type[Content], convert: Callable[[Content], T], *, invalid: int = 400, fields: int = 16
    ) -> T:
        """Read the body as JSON that fits a schema.

        Args:
            model: The schema.
            convert: What to make of it; may run in another thread.
            invalid: The status if it does not fit.
            fields: Most fields of an object.

        Raises:
            RefusedError: 408, 413 or 415, for the body; 400, it is not JSON; `invalid`, it does not fit.
            QueueFullError: Too many bytes are held already.
            DeadlineError: It could not be parsed in time.
        """
        if self.is_form():
            raise RefusedError(415, "unsupported_media_type", "the body is a form; send application/json")
        return await self._parsed(lambda body: convert(self.fitting(body, model, invalid=invalid, fields=fields)))

    def fitting(
        self, body: bytes | bytearray, model: type[Content], *, invalid: int = 400, fields: int = 16
    ) -> Content:
        """Parse JSON that fits a schema: a body, or a part of a form. May run in another thread.

        Raises:
            RefusedError: As `json`.
        """
        config = self.service.config
        limits = JsonLimits(config.max_items, config.max_text_chars, longest_base64(config.max_image_bytes), fields)
        content = parse_json(body, limits)
        try:
            return model.model_validate(content)
        except ValidationError as error:
            raise RefusedError(invalid, "invalid_request", explain_invalid(error)) from None

    async def form(self, convert: Callable[[list[Part]], T]) -> T:
        """Read the body as a form.

        Args:
            convert: What to make of its parts; may run in another thread.

        Raises:
            RefusedError: 400, 408 or 413, for the body.
            QueueFullError: Too many bytes are held already.
            DeadlineError: It could not be parsed in time.
        """
        content_type = self._request.headers["content-type"]
        return await self._parsed(lambda body: convert(parse_form(body, content_type)))

    def names(self, model: str | Sequence[str] | None) -> list[str]:
        """Return the names of the requested classifiers and panels; where one is served, it need not be named.

        Raises:
            RefusedError: 400, there are several and none is named, or one is named twice; 404, it is not served; 503,
                none is.
        """
        served = self.served.names
        check_not_empty(self.served)
        if model is None or model == []:
            if len(served) > 1:
                detail = "model is missing; expected a name that /v1/models lists"
                raise RefusedError(400, "model_missing", detail, param="model")
            return list(served)
        most = len(served) + len(self.served.models)
        names = [model] if isinstance(model, str) else list(model[: most + 1])  # one of more is there twice
        for name in names:
            check_served(self.served, name)
        if len(set(names)) < len(names):
            raise RefusedError(400, "model_twice", "a model is named twice; name it once", param="model")
        return names

    def check_count(self, count: int, param: str) -> None:
        """Refuse a request with too many examples.

        Raises:
            RefusedError: 413, it has more than `max_items`.
        """
        most = self.service.config.max_items
        if count > most:
            detail = f"{param} has {count} items; expected at most {most}"
            raise RefusedError(413, "too_many_items", detail, param=param)

    async def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for work, and cancel it when the caller goes away. The body must have been read to its end."""
        task = asyncio.create_task(work)
        gone = asyncio.create_task(self._until_gone())
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientDisconnect
            return task.result()
        finally:
            task.cancel()
            gone.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    async def _until_gone(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass

    async def _parsed(self, parse: Callable[[bytearray], T]) -> T:
        """Read the body and parse it, in a thread if that may take long."""
        body = await self._body()
        if len(body) <= _PARSED_AT_ONCE:
            return parse(body)
        try:
            async with asyncio.timeout_at(self.admitted.deadline):
                return await self.service.parser_of(len(body)).run(parse, body)
        except TimeoutError:
            raise DeadlineError("the body could not be parsed before the deadline; try again") from None

    async def _body(self) -> bytearray:
        """Read the body within `max_body_bytes`, `body_timeout` and the deadline, counting its bytes as they come."""
        config = self.service.config
        limit = config.max_body_bytes
        refused = RefusedError(
            413, "body_too_large", f"the body has more than {limit:,} bytes; send fewer or smaller items"
        )
        declared = self._request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > limit:
            raise refused
        body = bytearray()
        held = 0
        try:
            async with self.admitted.upload(config.body_timeout):
                async for chunk in self._request.stream():
                    if len(body) + len(chunk) > limit:
                        raise refused
                    while len(body) + len(chunk) > held:
                        self.admitted.hold(_HELD_AT_ONCE)
                        held += _HELD_AT_ONCE
                    body += chunk
        except TimeoutError:
            raise RefusedError(408, "body_too_slow", "the body did not arrive in time; send it faster") from None
        return body


@contextlib.contextmanager
def admitted(request: Request) -> Iterator[Incoming]:
    """Admit a request before its body is read; its bytes are given back at the end of the context.

    Raises:
        RefusedError: 503, the classifiers are not ready.
        QueueFullError: Too much is in progress already.
    """
    service = ready_service(request)
    with service.admission.admit() as admitted_request:
        yield Incoming(request, service, admitted_request)


def service_of(request: Request) -> Service:
    """Return the service of the application that a request is for."""
    service: Service = request.app.state.service
    return service


def ready_service(request: Request) -> Service:
    """Return the service if its classifiers are ready.

    Raises:
        RefusedError: 503, they are not.
    """
    service = service_of(request)
    if service.state != "ready":
        raise RefusedError(503, service.state, _NOT_READY[service.state], retry_after=1)
    return service


def refused(error: ItemError, param: str | None = None) -> RefusedError:
    """Turn the error of one example into that of its whole request."""
    return RefusedError(error.status, error.code, error.message, param=param)


def only_scored(outcomes: Sequence[ItemResult | ItemError], param: str) -> list[ItemResult]:
    """Return the results of all examples.

    Raises:
        RefusedError: An example has an error, which is then the request's.
    """
    good = []
    for number, outcome in enumerate(outcomes):
        if isinstance(outcome, ItemError):
            raise refused(outcome, f"{param}.{number}" if len(outcomes) > 1 else param)
        good.append(outcome)
    return good


def check_not_empty(served: ModelSet) -> None:
    """Refuse a request while no classifier is served.

    Raises:
        RefusedError: 503.
    """
    if not served.models:
        raise RefusedError(503, "no_models", "no classifier is served yet; try again later", retry_after=1)


def check_served(served: ModelSet, name: str) -> None:
    """Refuse a name under which neither a classifier nor a panel is served.

    Raises:
        RefusedError: 404.
    """
    if name in served.versions or name in served.models:
        return
    panel, _, label = name.partition("/")
    if label and panel in served.saved_panels:
        labels = first_of([label_model(panel, one) for one in served.saved_panels[panel].names])
        detail = f"the panel has no such label; expected one of {labels}"
    else:
        detail = "the model is not served; expected a name that /v1/models lists"
    raise RefusedError(404, "model_not_found", detail, param="model")


def check_classifier(served: ModelSet, name: str) -> None:
    """Refuse the name of a panel where one classifier answers.

    Raises:
        RefusedError: 400.
    """
    if name in served.saved_panels:
        label = label_model(name, served.saved_panels[name].names[0])
        detail = f"the model is a panel of several labels; name one of them, such as {label}"
        raise RefusedError(400, "label_missing", detail, param="model")
