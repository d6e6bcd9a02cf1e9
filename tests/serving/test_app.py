"""The application without a socket: what it is made of, and what it is made from."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import httpx
import numpy as np
import pytest

from qwen_vl_classifier import Classifier, Example, ServeConfig, create_app
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.extras import install_command
from qwen_vl_classifier.serving.service import Service
from tests.serving.client import check_problem, post, serve, texts
from tests.waiting import LIMIT


class TestAnswers:
    def test_requests_at_one_time_share_passes_and_keep_their_own_results(
        self, loaded: ServeConfig, tiny_classifier: Classifier
    ) -> None:
        words = [f"claim number {number}" for number in range(24)]

        async def work(client: httpx.AsyncClient, _: Service) -> list[float]:
            responses = await asyncio.gather(*(client.post("/v1/classify", **texts(word)) for word in words))
            return [response.json()["data"][0]["score"] for response in responses]

        expected = tiny_classifier.predict_proba([Example(None, word) for word in words])[:, 1]
        np.testing.assert_allclose(serve(loaded, work), expected, atol=1e-6)
        assert len(set(expected)) > 1

    def test_one_classifier_need_not_be_named(self, loaded: ServeConfig) -> None:
        async def work(client: httpx.AsyncClient, _: Service) -> list[httpx.Response]:
            return [
                await client.post("/v1/classify", **texts("a")),
                await client.post("/v1/classify", files={"text": (None, "a")}),
                await client.post("/v1/moderations", json={"input": "a"}),
                await client.post("/v1/explain", json={"text": "a"}),
            ]

        responses = serve(loaded, work)
        assert [response.status_code for response in responses] == [200] * 4
        assert responses[0].json()["model"] == "claims"

    def test_the_abstention_band_is_kept(
        self, loaded: ServeConfig, monkeypatch: pytest.MonkeyPatch, tiny_classifier: Classifier
    ) -> None:
        monkeypatch.setattr(tiny_classifier, "abstention", (0.0, 1.0))

        async def work(client: httpx.AsyncClient, _: Service) -> tuple[Any, Any]:
            return (await client.post("/v1/classify", **texts("a"))).json(), (await client.get("/v1/models")).json()

        answer, models = serve(loaded, work)
        assert answer["data"][0]["decision"] == "abstain"
        assert models["data"][0]["abstention"] == [0.0, 1.0]

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", "/v1/classify", 405),
            ("DELETE", "/v1/models", 405),
            ("POST", "/v1/classify/", 404),
            ("GET", "/nothing", 404),
            ("GET", "/redoc", 404),
        ],
    )
    def test_other_paths_and_methods(self, loaded: ServeConfig, method: str, path: str, status: int) -> None:
        async def work(client: httpx.AsyncClient, _: Service) -> httpx.Response:
            return await client.request(method, path)

        response = serve(loaded, work)
        check_problem(response, status, "not_found" if status == 404 else "method_not_allowed")
        assert ("allow" in response.headers) == (status == 405)

    def test_a_request_id_is_given_back(self, loaded: ServeConfig) -> None:
        response = post(loaded, **texts("a"), headers={"X-Request-ID": "my-id.1"})
        assert response.headers["X-Request-ID"] == "my-id.1"
        for given in ("x" * 100, "a b", "a/b", "\u00e9", ""):
            response = post(loaded, **texts("a"), headers={"X-Request-ID": given.encode()})
            assert response.headers["X-Request-ID"] not in ("", given)


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
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT)
        assert done.stderr == ""
        assert done.stdout.splitlines() == [
            "[]",
            f"MissingExtraError fastapi is not installed; run: {install_command('serve')}",
        ]
