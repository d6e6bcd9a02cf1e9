"""What README says of asking a server, done as it stands there: curl, httpx and OpenAI's own client."""

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

from qwen_vl_classifier import Classifier, Example
from tests.serving.client import data_uri, picture
from tests.serving.server_process import ROOT, ServerProcess, running
from tests.waiting import LIMIT

KEY = "k3y-of-the-server"
TEXT = "There is a red circle."
PHOTO = picture("red", "JPEG")


def blocks(readme: str, title: str) -> list[tuple[str, str]]:
    """Return the language and content of each block of code in a section."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    (section,) = re.findall(rf"^### {title}\n(.*?)^### ", text, re.DOTALL | re.MULTILINE)
    return re.findall(r"^```(\w+)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)


SHOWN = blocks("README.md", "Serving")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_classifier: Classifier) -> Iterator[ServerProcess]:
    """A server as a process of its own, that asks for a key."""
    folder = tmp_path_factory.mktemp("readme")
    tiny_classifier.save(folder / "my_classifier")
    (folder / "key").write_text(KEY)
    command = ("-m", "qwen_vl_classifier", "serve", str(folder / "my_classifier"), "--port", "0", "--device", "cpu")
    names = ("header-timeout", "body-timeout", "decode-timeout", "deadline")
    limits = [word for name in names for word in (f"--{name}", str(LIMIT))]
    with running(folder / "log", *command, *limits, "--api-key-file", str(folder / "key")) as server:
        server.until_ready()
        yield server


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "photo.jpg").write_bytes(PHOTO)
    return tmp_path


def do(command: list[str], place: Path) -> str:
    environment = os.environ | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not on this machine")
def test_curl(served: ServerProcess, place: Path, tiny_classifier: Classifier) -> None:
    script = (
        SHOWN[1][1].replace("http://127.0.0.1:8000", served.url).replace("curl ", f"curl -sS --oauth2-bearer {KEY} ")
    )
    output = do(["bash", "-e", "-c", script], place)
    form, moderation = re.findall(r'"(?:score|my_classifier)":([0-9.]+)', output)
    expected = tiny_classifier.predict_proba([Example(PHOTO, TEXT), Example(None, TEXT)])[:, 1]
    assert [float(form), float(moderation)] == pytest.approx(list(expected), abs=1e-6)


@pytest.mark.parametrize("block", [2, 3], ids=["httpx", "openai"])
def test_python(served: ServerProcess, place: Path, tiny_classifier: Classifier, block: int) -> None:
    program = SHOWN[block][1].replace("http://127.0.0.1:8000", served.url)
    program = program.replace("the key, if the server asks for one", KEY)
    program = program.replace("data=form", f'data=form, timeout={LIMIT}, auth=("", "{KEY}")')
    printed = do([sys.executable, "-c", program], place).split()
    (expected,) = tiny_classifier.predict_proba([Example(PHOTO, TEXT)])[:, 1]
    (score,) = [float(word) for word in printed if re.fullmatch(r"[0-9.]+", word)]
    assert score == pytest.approx(expected, abs=1e-6)


class TestOpenAI:
    @staticmethod
    def client(served: ServerProcess, key: str = KEY) -> openai.OpenAI:
        http_client = httpx.Client(trust_env=False)
        return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0, http_client=http_client)

    def test_texts(self, served: ServerProcess, tiny_classifier: Classifier) -> None:
        words = ["one", "two"]
        with self.client(served) as client:
            answer = client.moderations.create(input=words, model="omni-moderation-latest")
        expected = tiny_classifier.predict_proba([Example(None, word) for word in words])[:, 1]
        for result, score in zip(answer.results, expected, strict=True):
            assert result.category_scores.to_dict() == {"my_classifier": pytest.approx(score, abs=1e-6)}
            assert result.categories.to_dict() == {"my_classifier": bool(score >= tiny_classifier.threshold)}
            assert result.flagged == bool(score >= tiny_classifier.threshold)

    def test_models(self, served: ServerProcess) -> None:
        with self.client(served) as client:
            assert [model.id for model in client.models.list()] == ["my_classifier"]
            assert client.models.retrieve("my_classifier").owned_by == "qwen-vl-classifier"

    def test_errors_are_those_that_its_users_catch(self, served: ServerProcess) -> None:
        with self.client(served, "wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
            client.moderations.create(input="a")
        assert caught.value.code == "invalid_api_key"
        bad = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": data_uri(PHOTO[:-20])}}]
        wanted: list[tuple[type[openai.APIStatusError], dict[str, object], str, str | None]] = [
            (openai.BadRequestError, {"input": ["a", ""]}, "invalid_item", "input.1"),
            (openai.NotFoundError, {"input": "a", "model": "gpt"}, "model_not_found", "model"),
            (openai.UnprocessableEntityError, {"input": bad}, "image_damaged", "input"),
        ]
        for kind, request, code, param in wanted:
            with self.client(served) as client, pytest.raises(kind) as refused:
                client.moderations.create(**request)  # type: ignore[arg-type]
            assert (refused.value.code, refused.value.param) == (code, param)
