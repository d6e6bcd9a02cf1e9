"""Bodies of errors, many and of every kind: none tells a path, an address, a key, a module or what was sent."""

from __future__ import annotations

import base64
import json
import random
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from qwen_vl_classifier import Classifier, ServeConfig
from tests.serving.client import picture
from tests.serving.clock import PATIENT
from tests.serving.served import ready_client

ROOT = Path(__file__).resolve().parents[2]
KEY = "k3y-of-the-server"
CANARY = "cAnAry"
"""Stands in every request wherever a caller may put something."""

LEAKS = re.compile(
    r"Traceback|File \"|line \d+|\b0x[0-9a-f]{4,}|object at|<class|<function|\.py\b|\.so\b|site-packages|"
    r"qwen_vl_classifier|pydantic|starlette|fastapi|uvicorn|torch|transformers|PIL|libjpeg|libpng|zlib|numpy|httpcore|"
    r"asyncio|Error\(|Exception|errno|Errno|/tmp|/home|/root|/usr|/srv|/etc|/proc|\.json\b(?<!openapi\.json)|"
    r"safetensors|127\.0\.0\.1|localhost:|passwd|" + "|".join(map(re.escape, (CANARY, KEY, str(ROOT)))),
)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, tiny_classifier: Classifier) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("leaks")
    tiny_classifier.save(folder / "claims")
    tiny_classifier.save(folder / "others")
    (folder / "key").write_text(KEY)
    (folder / "pictures").mkdir()
    config = ServeConfig(
        classifiers=(str(folder / "claims"), str(folder / "others")),
        api_key_file=str(folder / "key"),
        image_root=str(folder / "pictures"),
        url_hosts="pictures.invalid",  # a name that can have no address (RFC 6761)
        max_items=4,
        max_body_bytes=200_000,
        max_image_bytes=20_000,
        max_text_chars=200,
        device="cpu",
        **PATIENT,
    )
    with ready_client(config) as client:
        yield client


def hostile_pictures(chance: random.Random) -> Any:
    good = picture(chance.choice(["red", "blue"]), chance.choice(["PNG", "JPEG", "WEBP"]))
    cut = good[: chance.randrange(len(good))]
    flipped = bytearray(good)
    for _ in range(8):
        flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
    return chance.choice(
        [
            base64.b64encode(cut).decode(),
            "data:image/png;base64," + base64.b64encode(bytes(flipped)).decode(),
            base64.b64encode(picture("red", chance.choice(["GIF", "TIFF", "BMP", "ICO"]))).decode(),
            base64.b64encode(picture("red", size=(401, 1))).decode(),
            base64.b64encode(chance.randbytes(chance.randrange(1, 200))).decode(),
            base64.b64encode(b"<svg>" + CANARY.encode()).decode(),
            "A" * 40_000,
            f"/etc/{CANARY}",
            f"../{CANARY}.png",
            f"file:///{CANARY}/etc/passwd",
            f"{CANARY}.png",
            "/etc/passwd",
            ".",
            "a/../..",
            f"http://pictures.invalid/{CANARY}.png",
            f"http://{CANARY}.example/x.png",
            "http://127.0.0.1:1/x.png",
            "http://[::1]/x.png",
            f"http://user:{CANARY}@pictures.invalid/",
            f"gopher://{CANARY}/",
            f"data:text/html,{CANARY}",
            "data:;base64,*",
            "",
            "\x00",
            "\ud800",
            None,
            5,
            [],
            {CANARY: 1},
            [CANARY] * 9,
        ]
    )


def hostile_texts(chance: random.Random) -> Any:
    return chance.choice(["", " ", "\ud800" + CANARY, CANARY * 100, None, 5, [CANARY], {CANARY: CANARY}])


def hostile_values(chance: random.Random, depth: int = 0) -> Any:
    if depth < 3 and chance.random() < 0.4:
        keys = ("input", "inputs", "messages", "content", "type", "image", "text", "url", "model", "shape", CANARY)
        if chance.random() < 0.5:
            return {chance.choice(keys): hostile_values(chance, depth + 1) for _ in range(3)}
        return [hostile_values(chance, depth + 1) for _ in range(2)]
    return chance.choice([CANARY, 5, -1, 1e308, None, True, hostile_texts(chance), hostile_pictures(chance)])


def hostile_decision(chance: random.Random, text: Any, image: Any) -> dict[str, Any]:
    """Make a request for decisions whose names, options and pictures say what no answer may repeat."""
    question = chance.choice(
        [
            {"type": "noul", "instructions": text},
            {"type": "choice", "criteria": {CANARY: text, "b": None}},
            {"type": "choice", "criteria": {CANARY: 5}},
            {"type": "score", "criteria": [text] * chance.randint(0, 30)},
            {"type": CANARY},
            {"type": "noul", "criteria": {CANARY: text}},
            text,
        ]
    )
    asset = chance.choice([{"data_base64": image}, {"data_base64": image, CANARY: 1}, {"part": CANARY}, image])
    state = chance.choice([text, {"photo": CANARY, "text": text}, [text, CANARY]])
    return {"state": state, "questions": {CANARY: question}, "assets": {CANARY: asset}}


def hostile_bodies(chance: random.Random, path: str) -> Any:
    """Make a body that is nearly right, so that it gets as far as possible before it is refused."""
    text = hostile_texts(chance) if chance.random() < 0.4 else "It is red."
    image = hostile_pictures(chance)
    item = {"text": text, "image": image}
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": image}}]
    body: dict[str, Any] = {
        "/v1/classify": chance.choice(
            [{"input": [item] * chance.randint(1, 6)}, {"messages": [{"role": "user", "content": parts}]}]
        ),
        "/v1/moderations": {"input": chance.choice([parts, text, [text] * 2, [text] * 9])},
        "/v1/explain": {**item, "method": chance.choice(["tokens", "gradients", CANARY])},
        "/v1/systemone": hostile_decision(chance, text, image),
    }[path]
    body["model"] = chance.choice(["claims"] * 8 + [CANARY, None, 5, f"../{CANARY}"])
    if chance.random() < 0.15:
        body[chance.choice([*body, CANARY])] = hostile_values(chance)
    return body


PATHS = ("/v1/classify", "/v1/moderations", "/v1/explain", "/v1/systemone")


def hostile_request(chance: random.Random) -> dict[str, Any]:
    """Make a request that will nearly always be refused."""
    headers = {"Authorization": f"Bearer {KEY}", "X-Request-ID": CANARY, "User-Agent": CANARY}
    kind = chance.random()
    path = chance.choice(PATHS)
    if kind < 0.6:
        content = json.dumps(hostile_bodies(chance, path)).encode()
        if chance.random() < 0.1:
            content = content[: chance.randrange(len(content))]
        return {"method": "POST", "url": path, "content": content, "headers": headers}
    if kind < 0.7:
        image = hostile_pictures(chance)
        data = image.encode(errors="surrogatepass") if isinstance(image, str) else CANARY.encode()
        fields = [
            ("image", (CANARY, data)),
            ("text", (None, "a")),
            ("model", (None, chance.choice(["claims", CANARY]))),
        ]
        chance.shuffle(fields)
        request = httpx.Request("POST", "http://localhost", files=fields[: chance.randint(1, 3)])
        content = bytearray(request.read())
        content[chance.randrange(len(content))] = chance.randrange(256)
        return {
            "method": "POST",
            "url": "/v1/classify",
            "content": bytes(content),
            "headers": headers | {"Content-Type": request.headers["Content-Type"]},
        }
    if kind < 0.8:
        url = chance.choice(
            [f"/{CANARY}", f"/v1/models/{CANARY}", f"/page/{CANARY}.js", "/v1/%00",
             "/docs/..", f"/v1/models/{CANARY}%0d%0aX:%20{CANARY}", "/page/../../etc/passwd", "/openapi.json/"]
        )  # fmt: skip
        return {"method": chance.choice(["GET", "POST", "PUT", CANARY]), "url": url, "headers": headers}
    if kind < 0.9:
        wrong = chance.choice([f"Bearer {CANARY}", "", f"Basic {CANARY}", f"Bearer {KEY}{CANARY}", f"Digest {KEY}"])
        return {"method": "POST", "url": path, "headers": headers | {"Authorization": wrong}}
    more = chance.choice(
        [
            {"Host": f"{CANARY}.example"},
            {"Origin": f"https://{CANARY}.example"},
            {"Sec-Fetch-Site": CANARY},
            {"Content-Type": CANARY},
            {"Content-Type": f"multipart/form-data; boundary={CANARY}"},
            {"Content-Encoding": CANARY},
            {"Content-Length": "9" * 20},
        ]
    )
    return {"method": "POST", "url": path, "content": f'{{"{CANARY}": 1}}'.encode(), "headers": headers | more}


def scan(client: TestClient, count: int) -> Counter[int]:
    """Send requests until so many errors were read; return how often each status was given."""
    chance = random.Random(11)
    found: Counter[int] = Counter()
    secrets = [str(Path(tempfile.gettempdir())), str(Path.cwd()), str(Path.home())]
    for _ in range(3 * count):
        request = hostile_request(chance)
        response = client.request(**request)
        text = response.text
        if response.status_code == 200 and '"error"' not in text:
            continue
        found[response.status_code] += 1
        leak = LEAKS.search(text)
        assert leak is None, (leak, text, request)
        assert not [secret for secret in secrets if len(secret) > 1 and secret in text], (text, request)
        assert len(text) < 12_000, request
        names = {name for name, value in response.headers.multi_items() if CANARY in value or KEY in value}
        assert names <= {"x-request-id"}, "it alone is given back"
        if found.total() == count:
            return found
    raise AssertionError(f"only {found.total()} errors among {3 * count} requests")


@pytest.mark.parametrize(
    "text",
    [
        "Traceback (most recent call last)",
        'File "app.py"',
        "<PIL.PngImagePlugin.PngImageFile image mode=RGB>",
        "cannot identify image file <_io.BytesIO object at 0x7f23942e0610>",
        "/srv/models/claims/head",
        "ValueError('no')",
        "[Errno 2] No such file or directory",
        "Max retries exceeded with 127.0.0.1",
        f"the key {KEY} is wrong",
        f"no model {CANARY}",
    ],
)
def test_the_scan_finds_what_must_not_be_told(text: str) -> None:
    assert LEAKS.search(text)


def test_some_errors(client: TestClient) -> None:
    found = scan(client, 300)
    assert {200, 400, 401, 404, 413, 415, 421, 422} - found.keys() == set()
    assert 500 not in found


@pytest.mark.soak
def test_5000_errors(client: TestClient) -> None:
    found = scan(client, 5_000)
    assert {200, 400, 401, 403, 404, 405, 413, 415, 421, 422} - found.keys() == set()
    assert 500 not in found
