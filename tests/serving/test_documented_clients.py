"""The clients that the documents show, run as they stand there: curl, httpx and OpenAI's own client."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from qwen_vl_classifier import Classifier, Example, ServeConfig
from tests.serving.client import data_uri, picture
from tests.serving.clock import PATIENT
from tests.serving.served import listening
from tests.waiting import LIMIT

ROOT = Path(__file__).resolve().parents[2]
KEY = "k3y-of-the-server"
TEXT = "There is a red circle."
PHOTO = picture("red", "JPEG")


def blocks(page: str, title: str) -> list[tuple[str, str]]:
    """Return the language and content of each block of code in a section."""
    text = (ROOT / page).read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## {title}\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)
    return re.findall(r"^```(\w+)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)


SHOWN = blocks("docs/reference/serving.md", "Clients")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, tiny_classifier: Classifier) -> Iterator[str]:
    """The address of a server that asks for a key."""
    folder = tmp_path_factory.mktemp("readme")
    tiny_classifier.save(folder / "my_classifier")
    (folder / "key").write_text(KEY)
    config = ServeConfig(
        classifiers=(str(folder / "my_classifier"),), device="cpu", api_key_file=str(folder / "key"), **PATIENT
    )
    with listening(config) as url:
        yield url


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photo.jpg").write_bytes(PHOTO)
    return tmp_path


def do(command: list[str], folder: Path) -> str:
    environment = os.environ | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not on this machine")
def test_curl(url: str, folder: Path, tiny_classifier: Classifier) -> None:
    script = SHOWN[0][1].replace("http://127.0.0.1:8000", url).replace("curl ", f"curl -sS --oauth2-bearer {KEY} ")
    output = do(["bash", "-e", "-c", script], folder)
    form, moderation = re.findall(r'"(?:score|my_classifier)":([0-9.]+)', output)
    expected = tiny_classifier.predict_proba([Example(PHOTO, TEXT), Example(None, TEXT)])[:, 1]
    assert [float(form), float(moderation)] == pytest.approx(list(expected), abs=1e-6)


@pytest.mark.parametrize("block", [1, 2], ids=["httpx", "openai"])
def test_python(url: str, folder: Path, tiny_classifier: Classifier, block: int) -> None:
    program = SHOWN[block][1].replace("http://127.0.0.1:8000", url)
    program = program.replace("the key, if the server requires one", KEY)
    program = program.replace("data=form", f'data=form, timeout={LIMIT}, auth=("", "{KEY}")')
    printed = do([sys.executable, "-c", program], folder).split()
    (expected,) = tiny_classifier.predict_proba([Example(PHOTO, TEXT)])[:, 1]
    (score,) = [float(word) for word in printed if re.fullmatch(r"[0-9.]+", word)]
    assert score == pytest.approx(expected, abs=1e-6)


class TestOpenAI:
    @staticmethod
    def client(url: str, key: str = KEY) -> openai.OpenAI:
        http_client = httpx.Client(trust_env=False)
        return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=http_client)

    def test_texts(self, url: str, tiny_classifier: Classifier) -> None:
        words = ["one", "two"]
        with self.client(url) as client:
            answer = client.moderations.create(input=words, model="omni-moderation-latest")
        expected = tiny_classifier.predict_proba([Example(None, word) for word in words])[:, 1]
        for result, score in zip(answer.results, expected, strict=True):
            assert result.category_scores.to_dict() == {"my_classifier": pytest.approx(score, abs=1e-6)}
            assert result.categories.to_dict() == {"my_classifier": bool(score >= tiny_classifier.threshold)}
            assert result.flagged == bool(score >= tiny_classifier.threshold)

    def test_models(self, url: str) -> None:
        with self.client(url) as client:
            assert [model.id for model in client.models.list()] == ["my_classifier"]
            assert client.models.retrieve("my_classifier").owned_by == "qwen-vl-classifier"

    def test_errors_are_those_that_its_users_catch(self, url: str) -> None:
        with self.client(url, "wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
            client.moderations.create(input="a")
        assert caught.value.code == "invalid_api_key"
        bad = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": data_uri(PHOTO[:-20])}}]
        wanted: list[tuple[type[openai.APIStatusError], dict[str, object], str, str | None]] = [
            (openai.BadRequestError, {"input": ["a", ""]}, "invalid_item", "input.1"),
            (openai.NotFoundError, {"input": "a", "model": "gpt"}, "model_not_found", "model"),
            (openai.UnprocessableEntityError, {"input": bad}, "image_damaged", "input"),
        ]
        for kind, request, code, param in wanted:
            with self.client(url) as client, pytest.raises(kind) as refused:
                client.moderations.create(**request)  # type: ignore[arg-type]
            assert (refused.value.code, refused.value.param) == (code, param)
