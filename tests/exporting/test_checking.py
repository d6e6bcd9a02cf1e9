"""`export --check` against servers that answer as vLLM does, otherwise, or not at all."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme
from PIL import Image

from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.config.export import SERVER_KEY_VARIABLE
from qwen_vl_classifier.errors import ArtifactError, ConfigError, EngineError
from qwen_vl_classifier.exporting.checking import check_server
from qwen_vl_classifier.exporting.export_manifest import ExportManifest, ReferenceExample

PROBABILITIES = (0.25, 0.75, 0.5)
TOKENS = 20
SECRET = "token-of-a-test"


class Server:
    """A server on this machine that answers as it is told.

    Attributes:
        answer: From a request's body to status, content type and body; by default as vLLM with the exported folder.
        seen: Path, headers and body of each request.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, str], Any]] = []
        self.answer: Callable[[Any], tuple[int, str, bytes]] = right
        self.headers: dict[str, str] = {}
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.seen.append((self.path, dict(self.headers), body))
                status, kind, content = owner.answer(body)
                self.send_response(status)
                for name, value in ({"Content-Type": kind} | owner.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                """Say nothing of clients that break off."""

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}"

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


def right(body: Any, *, shift: float = 0.0, tokens: int = TOKENS) -> tuple[int, str, bytes]:
    """Answer as vLLM does; the text of an example is its number."""
    *_, text = body["messages"][0]["content"]
    return answered(PROBABILITIES[int(text["text"])] + shift, tokens)


def answered(probability: float, tokens: int = TOKENS) -> tuple[int, str, bytes]:
    data = [{"index": 0, "label": "yes", "probs": [1 - probability, probability], "num_classes": 2}]
    return json_answer(200, {"data": data, "usage": {"prompt_tokens": tokens}})


def json_answer(status: int, content: Any) -> tuple[int, str, bytes]:
    return status, "application/json", json.dumps(content).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A folder as `export` writes it, without the model."""
    folder = tmp_path / "exported"
    (folder / "examples").mkdir(parents=True)
    Image.new("RGB", (4, 4), "red").save(folder / "examples" / "1.png")
    write_manifest(folder)
    return folder


def write_manifest(folder: Path, **changes: Any) -> None:
    examples = tuple(
        ReferenceExample(str(number), images, TOKENS, number == 2, probability, "no")
        for number, (images, probability) in enumerate(
            zip(((), ("examples/1.png",), ("examples/1.png", "examples/1.png")), PROBABILITIES, strict=True)
        )
    )
    content: dict[str, Any] = {
        "target": "vllm",
        "classifier": {},
        "dtype": "float32",
        "tolerance": 1e-4,
        "resized_tolerance": 1e-2,
        "label_names": ("no", "yes"),
        "folded": (),
        "left_to_client": {},
        "differences": (),
        "serve": ("vllm serve FOLDER --dtype float32",),
        "ask": (),
        "examples": examples,
    }
    ExportManifest(**content | changes).write(folder)


def check(folder: Path, server: Server, **options: Any) -> str:
    """Return the message of a check that fails."""
    with pytest.raises(EngineError) as caught:
        check_server(folder, server.url, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_server_that_agrees(exported: Path, server: Server) -> None:
    server.answer = lambda body: right(body, shift=5e-5)
    comparisons = check_server(exported, server.url)
    assert [round(item.difference, 7) for item in comparisons] == [5e-5] * 3
    paths, headers, bodies = zip(*server.seen, strict=True)
    assert set(paths) == {"/classify"}
    assert all("Authorization" not in sent for sent in headers)
    assert [body["model"] for body in bodies] == ["classifier"] * 3
    (message,) = bodies[2]["messages"]
    assert [part["type"] for part in message["content"]] == ["image_url", "image_url", "text"]
    assert message["content"][0]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")


def test_the_command_prints_one_line(exported: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer = lambda body: right(body, shift=5e-5)
    assert main(["export", str(exported), "--check", server.url]) == 0
    expected = "3 of 3 reference examples agree; largest difference 5.0e-05, with a resized picture 5.0e-05\n"
    assert capsys.readouterr().out == expected


def test_the_command_fails_in_one_line(exported: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer = lambda body: right(body, shift=2e-4)
    assert main(["export", str(exported), "--check", server.url]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "2 of 3 reference examples differ" in err  # a resized picture may differ by more
    assert "expected 0.25 within 0.0001" in err or "expected 0.75 within 0.0001" in err
    assert f"vllm serve {exported} --dtype float32" in err


def test_the_tolerance_may_be_given(exported: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer = lambda body: right(body, shift=2e-2)
    words = ["export", str(exported), "--check", server.url, "--tolerance"]
    assert main([*words, "0.03"]) == 0
    assert main([*words, "0.01"]) == 2
    assert "3 of 3 reference examples differ" in capsys.readouterr().err  # the resized picture too
    assert main([*words, "-1"]) == 2
    assert "tolerance -1.0: give 0 or more" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--check", "http://127.0.0.1:1", "--out", "new"], []])
def test_either_export_or_check(exported: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(exported), *words]) == 2
    assert "either --out DIR" in capsys.readouterr().err


def test_the_worst_example_is_named(exported: Path, server: Server) -> None:
    server.answer = lambda body: answered(0.6) if len(body["messages"][0]["content"]) == 2 else right(body)
    message = check(exported, server)
    assert "1 of 3" in message
    assert "example 2 (examples/1.png, '1')" in message
    assert "answers 0.6, expected 0.75" in message


def test_another_prompt_is_named(exported: Path, server: Server) -> None:
    server.answer = lambda body: right(body, tokens=12)
    assert "prompt has 12 tokens, expected 20" in check(exported, server)


def test_a_server_that_counts_no_tokens(exported: Path, server: Server) -> None:
    server.answer = lambda body: json_answer(200, {"data": json.loads(right(body)[2])["data"]})
    assert [item.tokens for item in check_server(exported, server.url)] == [None] * 3


@pytest.mark.parametrize(
    ("status", "content", "expected"),
    [
        (401, {"error": "Unauthorized"}, "401 (Unauthorized); give the server's key (api_key_file="),
        (404, {"error": {"message": "The model `classifier` does not exist."}}, "does not exist.); expected vLLM"),
        (404, {"detail": "Not Found"}, "404 (Not Found); expected vLLM"),
        (422, {"detail": [{"msg": "x"}]}, "status 422; expected vLLM"),
        (500, ["broken"], "status 500; look at the server's log"),
        (503, {"error": {"message": "two\nlines"}}, "503 (two\\nlines); look at the server's log"),
    ],
)
def test_other_statuses(exported: Path, server: Server, status: int, content: Any, expected: str) -> None:
    server.answer = lambda _: json_answer(status, content)
    assert expected in check(exported, server)


@pytest.mark.parametrize(
    ("kind", "content", "expected"),
    [
        ("text/html", b"<html>Welcome</html>", "answers text/html, not with the JSON"),
        ("application/json", b"[" * 100_000, "not with the JSON"),
        ("application/json", b'"' + b" " * (1 << 20) + b'"', "not with the JSON"),
        ("application/json", b"[]", "without two probabilities"),
        ("application/json", b'{"data": [{"probs": [1.0]}]}', "without two probabilities"),
        ("application/json", b'{"data": [{"embedding": [0.5, 0.5]}]}', "without two probabilities"),
        ("application/json", b'{"data": [{"probs": [-1.5, 2.5]}]}', "not probabilities"),
        ("application/json", b'{"data": [{"probs": [0.2, NaN]}]}', "not probabilities"),
        ("application/json", b'{"data": [{"probs": ["a", "b"]}]}', "not probabilities"),
    ],
)
def test_other_answers(exported: Path, server: Server, kind: str, content: bytes, expected: str) -> None:
    server.answer = lambda _: (200, kind, content)
    assert expected in check(exported, server)


def test_a_redirect_is_not_followed(exported: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVER_KEY_VARIABLE, SECRET)
    other = Server()
    try:
        for status in (301, 302, 303, 307, 308):
            server.answer = lambda _, status=status: (status, "text/plain", b"")
            server.headers = {"Location": other.url}
            assert "redirects are not followed" in check(exported, server)
        assert other.seen == []
    finally:
        other.close()


def test_no_server(exported: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(EngineError, match=r"the request failed \(.*refused.*\); check the address"):
        check_server(exported, f"http://127.0.0.1:{port}")


def test_a_server_that_speaks_something_else(exported: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(EngineError, match="the request failed"):
            check_server(exported, f"http://127.0.0.1:{listening.getsockname()[1]}")
        thread.join()


def test_a_server_that_hangs(exported: Path, server: Server) -> None:
    released = threading.Event()

    def hang(_: Any) -> tuple[int, str, bytes]:
        released.wait()
        return answered(0.5)

    server.answer = hang
    try:
        assert "no answer within 0.1 seconds" in check(exported, server, answer_timeout=0.1)
    finally:
        released.set()


def test_a_server_that_sends_byte_by_byte(exported: Path) -> None:
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                while not done.wait(0.02):
                    connection.sendall(b" ")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            with pytest.raises(EngineError, match=r"no answer within 0\.3 seconds"):
                check_server(exported, f"http://127.0.0.1:{listening.getsockname()[1]}", answer_timeout=0.3)
        finally:
            done.set()
            thread.join()


@pytest.mark.parametrize("from_file", [True, False])
def test_the_key_is_sent(
    exported: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_file: bool
) -> None:
    path = tmp_path / "key"
    path.write_text(f"{SECRET}\n")
    monkeypatch.setenv(SERVER_KEY_VARIABLE, "another" if from_file else SECRET)
    check_server(exported, server.url, api_key_file=str(path) if from_file else "")
    assert {headers["Authorization"] for _, headers, _ in server.seen} == {f"Bearer {SECRET}"}


def test_a_refused_key_is_not_shown(exported: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVER_KEY_VARIABLE, SECRET)
    server.answer = lambda _: json_answer(401, {"error": "Unauthorized"})
    assert SECRET not in check(exported, server)


def test_another_name_and_a_path_of_a_proxy(exported: Path, server: Server) -> None:
    for ending in ("", "/", "/v1", "/v1/", "/classify"):
        check_server(exported, f"{server.url}/models/a{ending}", served_model_name="claims")
    assert {path for path, _, _ in server.seen} == {"/models/a/classify"}
    assert {body["model"] for _, _, body in server.seen} == {"claims"}


@pytest.mark.parametrize(
    "url",
    [
        *("", "localhost:8000", "ftp://localhost", "file:///etc/passwd", "http://", "http://a b", "http://a:port"),
        *("http://a:0", "http://a?x=1", "http://a#x", "http://a\n", "http://user:word@a"),
    ],
)
def test_urls_that_are_none(exported: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="check") as caught:
        check_server(exported, url)
    assert "word@" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_https_needs_an_authority_that_is_trusted(exported: Path, server: Server, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(certificate))
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    server.http.socket = context.wrap_socket(server.http.socket, server_side=True, do_handshake_on_connect=False)
    url = server.url.replace("http:", "https:")
    with pytest.raises(EngineError, match=r"certificate is not trusted .*SSL_CERT_FILE"):
        check_server(exported, url)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(certificate))
        assert len(check_server(exported, url)) == 3


def test_a_proxy_of_the_environment_is_used_but_not_for_this_machine(
    exported: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", server.url)
    check_server(exported, "http://vllm.example")
    assert {path for path, _, _ in server.seen} == {"http://vllm.example/classify"}
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert len(check_server(exported, server.url)) == 3


def test_a_folder_for_another_engine(exported: Path, server: Server) -> None:
    write_manifest(exported, target="transformers")
    with pytest.raises(ArtifactError, match="exported for transformers"):
        check_server(exported, server.url)
    assert server.seen == []


def test_pictures_that_are_gone_or_elsewhere(exported: Path, server: Server) -> None:
    picture = exported / "examples" / "1.png"
    elsewhere = exported.parent / "secret.png"
    picture.rename(elsewhere)
    with pytest.raises(ArtifactError, match=r"examples/1\.png: cannot be read"):
        check_server(exported, server.url)
    picture.symlink_to(elsewhere)
    with pytest.raises(ArtifactError, match="leads out of its folder"):
        check_server(exported, server.url)
