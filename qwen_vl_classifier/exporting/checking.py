"""Check that a running vLLM server gives the probabilities that an exported folder records.

The server is reached through the proxies of the environment, but for one on this machine, and its certificate must be
trusted by the system or by `SSL_CERT_FILE`. Redirects are not followed, so that the key goes to no other host.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

from qwen_vl_classifier.config.export import SERVER_KEY_VARIABLE
from qwen_vl_classifier.config.fields import is_number
from qwen_vl_classifier.config.serve import is_loopback
from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.errors import ArtifactError, ConfigError, EngineError, one_line
from qwen_vl_classifier.exporting.export_manifest import ExportManifest, ReferenceExample, read_export
from qwen_vl_classifier.exporting.vllm import MODEL
from qwen_vl_classifier.files.api_keys import read_api_key
from qwen_vl_classifier.files.bounded import read_file

_MOST_ANSWER: Final = 1 << 20
_MOST_PICTURE: Final = 64 << 20
_SHOWN_TEXT: Final = 60  # characters of an example's text in a message


@dataclass(frozen=True, slots=True)
class Comparison:
    """The answer of a server to one reference example.

    Attributes:
        example: The example, and what is expected.
        probability: What the server answers for class 1.
        tokens: How many tokens of prompt the server counted; `None` where it does not say.
    """

    example: ReferenceExample
    probability: float
    tokens: int | None

    @property
    def difference(self) -> float:
        """How far the probability is from what is expected."""
        return abs(self.probability - self.example.probability)


def check_server(
    folder: str | os.PathLike[str],
    url: str,
    *,
    served_model_name: str = "",
    api_key_file: str = "",
    tolerance: float = 0.0,
    answer_timeout: float = 120.0,
) -> list[Comparison]:
    """Send the reference examples of an exported folder to a running server, and compare the probabilities.

    Args:
        folder: What `export` wrote for vLLM.
        url: Where the server is, such as http://127.0.0.1:8000.
        served_model_name: The model's name on the server; empty for the one in the exported command.
        api_key_file: File with the server's API key; empty for the variable VLLM_API_KEY, if it is set.
        tolerance: Largest difference of a probability that is let pass; 0 takes that of the folder, by its type.
        answer_timeout: Seconds that one answer may take.

    Returns:
        A comparison for each example, all within the tolerance.

    Raises:
        ArtifactError: The folder is no export for vLLM, or damaged.
        ConfigError: The URL is none, or the key cannot be read.
        EngineError: The server does not answer, answers something else, or gives other probabilities.
    """
    manifest = read_export(folder)
    if manifest.target != "vllm":
        raise ArtifactError(
            f"{folder}: exported for {manifest.target}, which has no server to check; give a folder that was exported "
            f"with {spelled('to', 'vllm')}"
        )
    key = read_api_key(api_key_file, SERVER_KEY_VARIABLE, option="api_key_file")
    server = _Server(url, key, answer_timeout)
    comparisons = list(_compare(server, manifest, Path(folder), served_model_name or MODEL))
    problems = [_problem(item, manifest, tolerance) for item in comparisons]
    wrong = [place for place, problem in enumerate(problems) if problem]
    if wrong:
        worst = max(wrong, key=lambda place: comparisons[place].difference)
        command = " ".join(manifest.serve).replace("FOLDER", str(folder))
        raise EngineError(
            f"{len(wrong)} of {len(comparisons)} reference examples differ; example {worst + 1} "
            f"({_described(comparisons[worst])}): {problems[worst]}; serve this folder with its own command: "
            f"{one_line(command)}"
        )
    return comparisons


def _compare(server: _Server, manifest: ExportManifest, folder: Path, model: str) -> Iterator[Comparison]:
    for example in manifest.examples:
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": _data_url(folder, name)}} for name in example.images
        ]
        content.append({"type": "text", "text": example.text})
        answer = server.classify({"model": model, "messages": [{"role": "user", "content": content}]})
        yield Comparison(example, *_numbers(answer, server.url))


def _problem(comparison: Comparison, manifest: ExportManifest, tolerance: float) -> str | None:
    """Say how an answer differs from what is expected; `None` where it agrees."""
    example = comparison.example
    if comparison.tokens is not None and comparison.tokens != example.tokens:
        return (
            f"the server's prompt has {comparison.tokens} tokens, expected {example.tokens}: it uses another chat "
            f"template, another tokeniser or other limits for pictures"
        )
    tolerance = tolerance or (manifest.resized_tolerance if example.resized else manifest.tolerance)
    if comparison.difference <= tolerance:
        return None
    return f"the server answers {comparison.probability:.6g}, expected {example.probability:.6g} within {tolerance:g}"


def _described(comparison: Comparison) -> str:
    """Name an example by its pictures and its text."""
    example = comparison.example
    return ", ".join([*example.images, repr(one_line(example.text, _SHOWN_TEXT))])


def _data_url(folder: Path, name: str) -> str:
    try:
        content = read_file(folder / name, most=_MOST_PICTURE, inside=folder)
    except OSError as error:
        raise ArtifactError(
            f"{folder}: {name}: cannot be read ({error.strerror or type(error).__name__}); export the classifier again"
        ) from None
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _numbers(answer: Any, url: str) -> tuple[float, int | None]:
    """Return the probability of class 1, and the number of tokens, of an answer.

    Raises:
        EngineError: It is not the answer of a classifier of two classes.
    """
    try:
        probabilities, usage = answer["data"][0]["probs"], answer.get("usage") or {}
        negative, positive = probabilities
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise EngineError(
            f"{url}: answered with JSON without two probabilities in data[0].probs; expected a classifier of two "
            f"classes: "
            "serve the exported folder"
        ) from None
    if not (is_number(negative, 0, 1) and is_number(positive, 0, 1) and abs(negative + positive - 1) < 1e-3):
        raise EngineError(
            f"{url}: answers {one_line(probabilities, 80)}, which are not probabilities that add up to 1; serve the "
            'exported folder without "use_activation": false'
        )
    tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return float(positive), tokens if isinstance(tokens, int) else None


class _Server:
    """A vLLM server.

    Args:
        url: Where it is.
        key: The key that it expects, if there is one.
        timeout: Seconds that one answer may take.

    Attributes:
        url: The address that is asked.
    """

    def __init__(self, url: str, key: bytes | None, timeout: float) -> None:
        self.url, host = _address(url)
        self._key = key
        self._timeout = timeout
        self._opener = _opener(through_proxies=not is_loopback(host))

    def classify(self, body: dict[str, Any]) -> Any:
        """Send a request, and return the JSON that is answered.

        Raises:
            EngineError: There is no answer in time, or another one.
        """
        outcome: Future[Any] = Future()

        def work() -> None:
            try:
                outcome.set_result(self._answer(json.dumps(body).encode()))
            except BaseException as error:
                outcome.set_exception(error)

        # A thread of its own, as a server that sends byte by byte keeps within every limit on a single read.
        threading.Thread(target=work, name="ask-server", daemon=True).start()
        try:
            return outcome.result(self._timeout)
        except TimeoutError:
            raise EngineError(
                f"{self.url}: no answer within {self._timeout:g} seconds; look at the server's log, or give it longer "
                f"({spelled('answer_timeout')})"
            ) from None

    def _answer(self, body: bytes) -> Any:
        request = Request(self.url, body, {"Content-Type": "application/json", "User-Agent": "qwen-vl-classifier"})  # noqa: S310 - http or https
        if self._key is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self._key.decode()}")
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                content = response.read(_MOST_ANSWER + 1)
                kind = response.headers.get_content_type()
        except HTTPError as error:
            with error:
                raise EngineError(self._refused(error)) from None
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(self._not_reached(error)) from None
        try:
            if len(content) > _MOST_ANSWER:
                raise ValueError
            return json.loads(content)
        except (ValueError, RecursionError):
            raise EngineError(
                f"{self.url}: answers {one_line(kind, 80)}, not with the JSON of a classifier; check that it is the "
                f"address "
                "of vLLM itself"
            ) from None

    def _refused(self, error: HTTPError) -> str:
        """Say what a status other than 200 means."""
        if error.code in (401, 403):
            advice = f"give the server's key ({spelled('api_key_file')}, or the variable {SERVER_KEY_VARIABLE})"
        elif error.code == 404:
            advice = (
                "expected vLLM with the exported folder; check the address, and the model's name "
                f"({spelled('served_model_name')})"
            )
        elif 300 <= error.code < 400:
            advice = "redirects are not followed; give the address that it leads to"
        elif error.code >= 500:
            advice = "look at the server's log"
        else:
            advice = "expected vLLM with the exported folder; look at the server's log"
        reason = _message(error)
        return f"{self.url}: answers with status {error.code}{f' ({reason})' if reason else ''}; {advice}"

    def _not_reached(self, error: Exception) -> str:
        """Say why there was no answer."""
        cause = error.reason if isinstance(error, URLError) else error
        if isinstance(cause, ssl.SSLCertVerificationError):
            return (
                f"{self.url}: its certificate is not trusted ({one_line(cause.verify_message, 200)}); name the file "
                "of its authority in SSL_CERT_FILE"
            )
        if isinstance(cause, TimeoutError):
            return f"{self.url}: no answer within {self._timeout:g} seconds; check that the server runs there"
        reason = getattr(cause, "strerror", None) or cause or type(cause).__name__
        return f"{self.url}: the request failed ({one_line(reason, 200)}); check the address, and that the server runs"


class _NoRedirects(HTTPRedirectHandler):
    """Leaves a redirect an error."""

    def redirect_request(self, *_: Any) -> None:
        """Follow none."""


def _opener(*, through_proxies: bool) -> OpenerDirector:
    return build_opener(_NoRedirects, *(() if through_proxies else (ProxyHandler({}),)))


def _address(url: str) -> tuple[str, str]:
    """Return the address of the endpoint of a server, and its host.

    Raises:
        ConfigError: The URL is not one of a server.
    """
    try:
        parts = urlsplit(url)
        plain = url.isprintable() and url.isascii() and " " not in url and parts.port != 0
    except ValueError:
        plain = False
    if not plain or parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(f"{spelled('check', one_line(url, 200))}: give an address such as http://127.0.0.1:8000")
    if "@" in parts.netloc:
        raise ConfigError(
            f"{spelled('check')}: the address holds a name or password; give the key by {spelled('api_key_file')}"
        )
    path = parts.path.rstrip("/").removesuffix("/classify").removesuffix("/v1")
    return urlunsplit((parts.scheme, parts.netloc, f"{path}/classify", "", "")), parts.hostname


def _message(error: HTTPError) -> str:
    """Return what a server says about an error, as one line; empty where it says nothing in JSON."""
    try:
        content = json.loads(error.read(_MOST_ANSWER))
    except (ValueError, RecursionError, OSError, http.client.HTTPException):
        return ""
    if not isinstance(content, dict):
        return ""
    inner = content.get("error")
    said = inner.get("message") if isinstance(inner, dict) else inner or content.get("detail")
    return one_line(said, 300) if isinstance(said, str) else ""
