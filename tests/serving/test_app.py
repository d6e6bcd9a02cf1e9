"""The application without a socket: answers, refusals, keys and configuration."""

from __future__ import annotations

import asyncio
import copy
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from qwen_vl_classifier import Classifier, Example, ServeConfig, Tap, create_app
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.serving.service import Service
from tests.serving.client import (
    base64_of,
    check_problem,
    data_uri,
    picture,
    post,
    serve,
    texts,
)


class TestAnswers:
    def test_saved_classifiers_answer_as_they_do_offline(self, tmp_path: Path, tiny_classifier: Classifier) -> None:
        other = copy.copy(tiny_classifier)
        other.tap, other.temperature, other.threshold = Tap(2, "last"), 0.3, 0.4
        folders = (str(tiny_classifier.save(tmp_path / "first")), str(other.save(tmp_path / "second")))
        red, blue = picture("red"), picture("blue", "JPEG", (140, 60))
        rows: list[tuple[Any, Example]] = [
            ({"image": data_uri(red), "text": "It is red."}, Example(red, "It is red.")),
            ({"image": base64_of(blue), "text": "It is red."}, Example(blue, "It is red.")),
            ({"image": [base64_of(red), data_uri(blue)], "text": "a pair"}, Example((red, blue), "a pair")),
            ({"image": None, "text": "<|image_pad|> no picture"}, Example(None, "<|image_pad|> no picture")),
            ({"image": [], "text": "words"}, Example(None, "words")),
            ({"text": "\u4f60\u597d \U0001f600"}, Example(None, "\u4f60\u597d \U0001f600")),
            ({"image": base64_of(picture("green", "WEBP")), "text": "x"}, Example(picture("green", "WEBP"), "x")),
        ]
        examples = [example for _, example in rows]

        async def work(client: httpx.AsyncClient, _: Service) -> list[httpx.Response]:
            return list(
                await asyncio.gather(
                    *(
                        client.post(path, json={"model": model, "input": [item for item, _ in rows]})
                        for model in ("first", "second")
                        for path in ("/v1/classify", "/classify")
                    )
                )
            )

        responses = serve(ServeConfig(classifiers=folders, device="cpu"), work)
        for number, response in enumerate(responses):
            classifier = (tiny_classifier, other)[number // 2]
            assert response.status_code == 200, response.text
            content = response.json()
            assert content.keys() == {"id", "object", "created", "model", "data", "usage"}
            assert (content["object"], content["model"]) == ("list", ("first", "second")[number // 2])
            assert [result["index"] for result in content["data"]] == list(range(len(rows)))
            expected = classifier.predict_proba(examples)
            np.testing.assert_allclose([result["probs"] for result in content["data"]], expected, atol=1e-5)
            for result in content["data"]:
                assert result.keys() == {"index", "label", "probs", "score", "threshold", "decision"}
                assert result["score"] == result["probs"][1]
                assert result["threshold"] == classifier.threshold
                assert result["label"] == int(result["score"] >= classifier.threshold)
                assert result["decision"] == ("yes" if result["label"] else "no")
            tokens = sum(len(item.ids) for item in classifier.backbone.prepare(examples))
            assert content["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
        assert len({response.json()["id"] for response in responses}) == len(responses)

    def test_requests_at_one_time_share_passes_and_keep_their_own_results(
        self, loaded: ServeConfig, tiny_classifier: Classifier
    ) -> None:
        words = [f"claim number {number}" for number in range(24)]

        async def work(client: httpx.AsyncClient, _: Service) -> list[float]:
            responses = await asyncio.gather(*(client.post("/v1/classify", **texts(word)) for word in words))
            return [response.json()["data"][0]["score"] for response in responses]

        expected = tiny_classifier.predict_proba([Example(None, word) for word in words])[:, 1]
        np.testing.assert_allclose(serve(loaded, work), expected, atol=1e-5)
        assert len(set(expected)) > 1

    def test_the_abstention_band_is_kept(
        self, loaded: ServeConfig, monkeypatch: pytest.MonkeyPatch, tiny_classifier: Classifier
    ) -> None:
        monkeypatch.setattr(tiny_classifier, "abstention", (0.0, 1.0))
        assert post(loaded, **texts("a")).json()["data"][0]["decision"] == "abstain"

    def test_a_bad_item_has_its_own_error_and_spoils_no_other(
        self, loaded: ServeConfig, tiny_classifier: Classifier
    ) -> None:
        good = {"image": data_uri(picture("red")), "text": "It is red."}
        bad: list[tuple[Any, str]] = [
            ({"image": "https://example.org/secret.png", "text": "x"}, "invalid_image"),
            ({"image": "/etc/secret", "text": "x"}, "invalid_image"),
            ({"image": base64_of(b"secret" * 20), "text": "x"}, "invalid_image"),
            ({"image": [good["image"], data_uri(picture("red", "GIF"))], "text": "x"}, "invalid_image"),
            ({"image": base64_of(picture("red")[:-20]), "text": "x"}, "invalid_image"),
            ({"image": base64_of(picture("red", size=(201, 1))), "text": "x"}, "invalid_image"),
            ({"image": 5, "text": "x"}, "invalid_item"),
            ({"image": [good["image"]] * 9, "text": "x"}, "invalid_item"),
            ({"image": good["image"]}, "invalid_item"),
            ({"text": " "}, "invalid_item"),
            ({"text": "x", "secret": "secret"}, "invalid_item"),
            ({"text": ["secret"]}, "invalid_item"),
            ("secret", "invalid_item"),
            (None, "invalid_item"),
            ({"text": "x" * 8001}, "too_large"),
        ]
        items = [part for item, _ in bad for part in (item, good)]
        body = json.dumps({"input": [{"text": "\ud800"}, *items]})  # half of a surrogate pair, as JSON spells it
        response = post(loaded, content=body)
        assert response.status_code == 200, response.text
        assert "secret" not in response.text
        surrogate, *results = response.json()["data"]
        assert surrogate["error"]["code"] == "invalid_item"
        (expected,) = tiny_classifier.predict_proba([Example(picture("red"), "It is red.")])[:, 1]
        for number, (_, code) in enumerate(bad):
            failed, neighbour = results[2 * number : 2 * number + 2]
            assert failed.keys() == {"index", "error"}
            assert failed["error"]["code"] == code, failed
            assert neighbour["score"] == pytest.approx(expected, abs=1e-5)

    def test_a_request_of_nothing_but_bad_items_is_answered_too(self, loaded: ServeConfig) -> None:
        response = post(loaded, **texts("", " "))
        assert response.status_code == 200
        assert [result["error"]["code"] for result in response.json()["data"]] == ["invalid_item"] * 2
        assert response.json()["usage"] == {"prompt_tokens": 0, "total_tokens": 0}

    def test_models_are_listed_by_the_names_of_their_folders(self, loaded: ServeConfig, tmp_path: Path) -> None:
        config = ServeConfig(classifiers=(str(tmp_path / "a"), f"{tmp_path}/b/"))

        async def work(client: httpx.AsyncClient, _: Service) -> httpx.Response:
            return await client.get("/v1/models")

        response = serve(config, work)
        assert [model["id"] for model in response.json()["data"]] == ["a", "b"]
        assert response.json()["data"][0]["label_names"] == ["0", "1"]
        assert str(tmp_path) not in response.text

    def test_the_page_for_programs_describes_the_request(self, loaded: ServeConfig) -> None:
        async def work(client: httpx.AsyncClient, _: Service) -> Any:
            return (await client.get("/openapi.json")).json()

        page = serve(loaded, work)
        assert page["paths"].keys() == {"/v1/classify", "/v1/models", "/livez", "/readyz"}
        assert "image" in json.dumps(page["paths"]["/v1/classify"]["post"]["requestBody"])


class TestRefusals:
    @pytest.mark.parametrize(
        ("content", "status", "code"),
        [
            (b"", 400, "invalid_json"),
            (b"{", 400, "invalid_json"),
            (b"\xff\xfe\xfd", 400, "invalid_json"),
            (b'{"input": "\xe9"}', 400, "invalid_json"),
            (b"[" * 100_000, 400, "invalid_json"),
            (b"1" * 10_000, 400, "invalid_json"),
            (b"[]", 422, "invalid_request"),
            (b"{}", 422, "invalid_request"),
            (b'{"input": []}', 422, "invalid_request"),
            (b'{"input": {"text": "secret"}}', 422, "invalid_request"),
            (b'{"input": [{"text": "a"}], "secret": 1}', 422, "invalid_request"),
            (b'{"input": [{"text": "a"}], "model": 1}', 422, "invalid_request"),
            (b'{"input": [{"text": "a"}], "model": "secret"}', 404, "model_not_found"),
            (b'{"input": [{"text": "a"}], "model": "\\ud800"}', 404, "model_not_found"),
            (b'{"input": [1, 2, 3]}', 422, "too_many_items"),
        ],
    )
    def test_requests_that_make_no_sense(self, loaded: ServeConfig, content: bytes, status: int, code: str) -> None:
        response = post(ServeConfig(classifiers=loaded.classifiers, queue_size=2), content=content)
        assert check_problem(response, status, code)
        assert "secret" not in response.text

    def test_a_name_is_needed_where_there_are_several(self, loaded: ServeConfig) -> None:
        config = ServeConfig(classifiers=("a", "b"))
        assert "/v1/models" in check_problem(post(config, **texts("x")), 422, "model_missing")
        assert post(config, json={"model": "b", "input": [{"text": "x"}]}).json()["model"] == "b"

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [("GET", "/v1/classify", 405), ("GET", "/docs", 404), ("POST", "/v1/classify/", 404)],
    )
    def test_other_paths_and_methods(self, loaded: ServeConfig, method: str, path: str, status: int) -> None:
        async def work(client: httpx.AsyncClient, _: Service) -> httpx.Response:
            return await client.request(method, path)

        response = serve(loaded, work)
        check_problem(response, status, "not_found" if status == 404 else "method_not_allowed")
        assert ("allow" in response.headers) == (status == 405)

    def test_a_body_is_counted_while_it_is_read(self, loaded: ServeConfig) -> None:
        config = ServeConfig(classifiers=loaded.classifiers, max_body_bytes=1000)
        chunks = 0

        async def stream() -> AsyncIterator[bytes]:
            nonlocal chunks
            for _ in range(100):
                chunks += 1
                yield b" " * 100

        check_problem(post(config, content=stream()), 413, "body_too_large")
        assert chunks == 11, "it went on reading"
        chunks = 0
        check_problem(post(config, content=stream(), headers={"Content-Length": "10"}), 413, "body_too_large")
        assert chunks == 11
        chunks = 0
        check_problem(post(config, content=stream(), headers={"Content-Length": "9" * 30}), 413, "body_too_large")
        assert chunks == 0, "it read although the header said enough"
        fitting = json.dumps({"input": [{"text": "a"}]}).encode().ljust(1000)
        assert post(config, content=fitting).status_code == 200
        check_problem(post(config, content=fitting + b" "), 413, "body_too_large")

    def test_a_body_that_does_not_arrive_is_not_waited_for(self, loaded: ServeConfig) -> None:
        async def stream() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.Event().wait()

        config = ServeConfig(classifiers=loaded.classifiers, deadline=0.05)
        check_problem(post(config, content=stream()), 408, "body_too_slow")


class TestKeys:
    KEY = "k3y-of-the-house"

    @pytest.fixture
    def locked(self, loaded: ServeConfig, tmp_path: Path) -> ServeConfig:
        path = tmp_path / "key"
        path.write_text(f"{self.KEY}\n")
        return ServeConfig(classifiers=loaded.classifiers, api_key_file=str(path), host="0.0.0.0")

    def test_every_path_but_health_asks_for_it(self, locked: ServeConfig) -> None:
        async def work(client: httpx.AsyncClient, _: Service) -> None:
            for path in ("/livez", "/readyz"):
                assert (await client.get(path)).status_code == 200
            for method, path in (
                ("POST", "/v1/classify"),
                ("POST", "/classify"),
                ("GET", "/v1/models"),
                ("GET", "/openapi.json"),
                ("GET", "/nothing/here"),
                ("GET", "/livez/"),
                ("GET", "//livez"),
                ("GET", "/LIVEZ"),
                ("GET", "/v1/models?/livez"),
                ("GET", "/livez/../v1/models"),
                ("OPTIONS", "/v1/classify"),
            ):
                response = await client.request(
                    method, path, headers={"Host": "test/livez", "X-Forwarded-Path": "/livez"}
                )
                check_problem(response, 401, "invalid_api_key")
                assert response.headers["WWW-Authenticate"] == "Bearer"

        serve(locked, work)

    @pytest.mark.parametrize(
        "given",
        [
            "",
            "Bearer",
            "Bearer ",
            "Bearer wrong",
            "Basic k3y-of-the-house",
            "k3y-of-the-house",
            "Bearer k3y-of-the-housE",
            "Bearer k3y-of-the-house2",
            "Bearer k\u00e9y",
        ],
    )
    def test_a_wrong_key_is_refused_and_never_repeated(self, locked: ServeConfig, given: str) -> None:
        response = post(locked, **texts("a"), headers={"Authorization": given.encode()})
        check_problem(response, 401, "invalid_api_key")
        assert self.KEY not in response.text
        assert "wrong" not in response.text

    @pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
    def test_the_key_opens(self, locked: ServeConfig, scheme: str) -> None:
        response = post(locked, **texts("a"), headers={"Authorization": f"{scheme} {self.KEY}"})
        assert response.status_code == 200
        assert self.KEY not in response.text

    @pytest.mark.parametrize("keys", [("wrong", KEY), (KEY, "wrong")])
    def test_two_keys_are_none(self, locked: ServeConfig, keys: tuple[str, str]) -> None:
        headers = [("Authorization", f"Bearer {key}") for key in keys]
        check_problem(post(locked, **texts("a"), headers=headers), 401, "invalid_api_key")

    @pytest.mark.parametrize("content", [None, b"", b" \n", b"two words\n", b"two\nlines\n"])
    def test_a_file_without_a_key_is_an_error_at_once(self, tmp_path: Path, content: bytes | None) -> None:
        path = tmp_path / "key"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match="api_key_file") as caught:
            create_app(ServeConfig(classifiers=("a",), api_key_file=str(path)))
        assert "two" not in str(caught.value)


class TestConfiguration:
    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.7", "example.org", "localhost.example.org"])
    def test_an_open_door_must_be_asked_for(self, host: str) -> None:
        with pytest.raises(ConfigError, match="--api-key-file"):
            ServeConfig(host=host)
        assert ServeConfig(host=host, insecure=True).host == host
        assert ServeConfig(host=host, api_key_file="key").host == host

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
    def test_loopback_needs_no_key(self, host: str) -> None:
        assert ServeConfig(host=host).host == host

    @pytest.mark.parametrize(
        "option",
        [
            {"port": -1},
            {"port": 65536},
            {"max_batch": 0},
            {"queue_size": 0},
            {"deadline": 0.0},
            {"deadline": float("nan")},
            {"deadline": float("inf")},
            {"max_body_bytes": 0},
            {"max_text_chars": 0},
        ],
    )
    def test_options_out_of_range(self, option: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=next(iter(option))):
            ServeConfig(**option)

    def test_names_must_differ_and_exist(self) -> None:
        with pytest.raises(ConfigError, match="no classifiers"):
            create_app(ServeConfig())
        with pytest.raises(ConfigError, match="'best'; rename"):
            create_app(ServeConfig(classifiers=("a/best", "b/best")))

    def test_building_imports_no_model_and_a_missing_extra_is_named(self) -> None:
        program = """
import sys
from qwen_vl_classifier import ServeConfig, create_app
create_app(ServeConfig(classifiers=("a",)))
print(sorted({"torch", "transformers"} & sys.modules.keys()))
for name in [name for name in sys.modules if name.startswith(("fastapi", "qwen_vl_classifier"))]:
    del sys.modules[name]
sys.modules["fastapi"] = None  # as if it were not installed
try:
    from qwen_vl_classifier import create_app
except ImportError as error:
    print(type(error).__name__, error)
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert done.stderr == ""
        assert done.stdout.splitlines() == [
            "[]",
            "MissingExtraError fastapi is not installed; run: pip install 'qwen-vl-classifier[serve]'",
        ]
