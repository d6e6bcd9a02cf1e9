"""The application of `label`: it answers the page, and refuses everybody else before anything is written."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from PIL import Image

from qwen_vl_classifier import Example
from tests.labelling.web.fake_session import JSON, PORT, Served, picture, served


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("pictures")
    turned = Image.Exif()
    turned[0x0112], turned[0x010E] = 6, "where I live"
    (folder / "turned.jpg").write_bytes(picture((4000, 3000), exif=turned))
    (folder / "damaged.jpg").write_bytes(picture()[:200])
    (folder / "secret.txt").write_text("a secret")
    examples = [
        Example(str(folder / "turned.jpg"), "It is red.", id="first"),
        Example(str(folder / "damaged.jpg"), "It is red."),
        Example((picture(), Image.new("RGB", (8, 8), "blue")), "Two pictures."),
        Example(None, "No picture."),
        Example(str(folder / "gone.jpg"), "It is red."),
    ]
    with served(examples) as found:
        yield found


@pytest.fixture(autouse=True)
def fresh(app: Served) -> Iterator[None]:
    yield
    app.session.answered.clear()
    app.session.full = False
    app.finishing.trained.clear()
    app.finishing.page = None


def test_the_page_has_a_policy_and_what_it_needs(app):
    with app.client() as client:
        page = client.get("/")
        assert page.status_code == 200
        assert "script-src 'self'" in page.headers["content-security-policy"]
        assert client.get("/page/base.css").status_code == 200
        assert client.get("/api/setup").json()["title"] == "Is it red?"
        assert client.get("/page/examples.json").status_code == 404
        assert client.get("/openapi.json").status_code == 404


def test_questions_answers_and_undo(app):
    with app.client() as client:
        first = client.post("/api/questions", json={"browser": "one", "ahead": 1}).json()
        assert [question["key"] for question in first["questions"]] == ["row-0", "row-1"]
        assert first["questions"][0]["images"] == ["/api/rows/row-0/images/0"]
        assert first["questions"][0]["name"] == "first"
        assert first["progress"] == {"answered": 0, "rows": 5, "finish": {"state": "no"}}
        second = app.answer(client).json()
        assert second["questions"][0]["key"] == "row-1"
        assert second["progress"]["answered"] == 1
        assert client.get("/api/progress").json() == second["progress"]
        again = client.post("/api/undo", json={"browser": "one"}).json()
        assert again["questions"][0]["key"] == "row-0"
    assert app.session.answered == []


def test_a_picture_is_upright_small_and_without_metadata(app):
    with app.client() as client:
        answer = client.get("/api/rows/row-0/images/0")
        shown = Image.open(io.BytesIO(answer.content))
        assert (shown.format, shown.size) == ("JPEG", (1200, 1600))
        assert not shown.getexif()
        assert b"where I live" not in answer.content
        assert "immutable" in answer.headers["cache-control"]
        assert client.get("/api/rows/row-0/images/0").content == answer.content
        assert client.get("/api/rows/row-2/images/0").status_code == 200
        assert client.get("/api/rows/row-2/images/1").status_code == 200


def test_a_picture_that_cannot_be_read_is_an_error_and_the_row_can_be_answered(app):
    with app.client() as client:
        damaged, gone = (client.get(f"/api/rows/row-{row}/images/0") for row in (1, 4))
        assert (damaged.status_code, damaged.json()["error"]["code"]) == (422, "image_damaged")
        assert (gone.status_code, gone.json()["error"]["code"]) == (422, "image_missing")
        assert "/" not in gone.json()["detail"]
        assert app.answer(client, key="row-1").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/api/rows/row-0/images/1",
        "/api/rows/row-3/images/0",
        "/api/rows/row-9/images/0",
        "/api/rows/..%2F..%2Fsecret.txt/images/0",
        "/api/rows/%2Fetc%2Fpasswd/images/0",
        "/api/rows/row-0/images/../../../secret.txt",
        "/page/../routes/page.py",
        "/page/..%2Fweb%2F__init__.py",
        "/report/",
        "/report/evaluation.json",
    ],
)
def test_what_is_not_there_is_not_found(app, path):
    with app.client() as client:
        assert client.get(path).status_code == 404


@pytest.mark.parametrize("number", ["-1", "x", "1e3", "99999999999999999999"])
def test_a_number_that_is_none_is_refused(app, number):
    with app.client() as client:
        assert client.get(f"/api/rows/row-0/images/{number}").status_code == 400


def test_only_the_printed_address_gives_the_cookie(app):
    with app.client(cookie=False) as client:
        refused = client.get("/")
        assert refused.status_code == 401
        assert "Open the address that it printed" in refused.text
        assert "set-cookie" not in refused.headers
        for query in ("?token=", "?token=wrong", "?token=%F0%9F", "?token=a&token=b", "?" + "a&" * 20):
            assert client.get(f"/{query}").status_code == 401
        token = app.token.url.rpartition("=")[2]
        assert client.get(f"/api/setup?token={token}").status_code == 401
        entered = client.get(f"/?token={token}")
        assert 'url=/"' in entered.text
        cookie = entered.headers["set-cookie"]
        assert cookie.startswith(f"qwen-vl-classifier-label-{PORT}=")
        assert "HttpOnly; SameSite=Strict; Path=/" in cookie
        assert client.get("/").status_code == 200
        assert client.get("/api/setup").status_code == 200


STRANGERS = {
    "no cookie": ({"cookie": ""}, 401, "invalid_token"),
    "another cookie": ({"cookie": f"qwen-vl-classifier-label-{PORT}=guess"}, 401, "invalid_token"),
    "a broken cookie": ({"cookie": '=;"\\'}, 401, "invalid_token"),
    "another host": ({"host": "evil.example"}, 421, "unknown_host"),
    "another site": ({"origin": "https://evil.example"}, 403, "cross_site"),
    "another port": ({"sec-fetch-site": "same-site", "origin": "http://127.0.0.1:1"}, 403, "cross_site"),
    "an unknown origin": ({"origin": "null"}, 403, "cross_site"),
    "a form": ({"content-type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"),
    "plain text": ({"content-type": "text/plain"}, 415, "unsupported_media_type"),
    "no type": ({"content-type": ""}, 415, "unsupported_media_type"),
    "compressed": ({"content-encoding": "gzip"}, 415, "unsupported_media_type"),
}

BODY = b'{"browser": "one", "key": "row-0", "label": "label", "answer": "yes", "seconds": 1}'


@pytest.mark.parametrize("path", ["/api/answers", "/api/undo", "/api/finish", "/api/questions"])
@pytest.mark.parametrize("stranger", STRANGERS)
def test_strangers_change_nothing(app, path, stranger):
    app.session.answered.append(("row-1", "no"))
    headers, status, code = STRANGERS[stranger]
    with app.client() as client:
        answer = client.post(path, content=BODY, headers=JSON | headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert app.session.answered == [("row-1", "no")]
    assert app.finishing.trained == []


@pytest.mark.parametrize("path", ["/", "/api/setup", "/api/progress", "/api/rows/row-0/images/0", "/page/base.css"])
def test_strangers_read_nothing(app, path):
    with app.client(cookie=False) as client:
        assert client.get(path).status_code == 401
    with app.client() as client:
        assert client.get(path, headers={"host": "evil.example"}).status_code == 421
        scripted = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"}
        assert client.get(path, headers=scripted).status_code == 403


WRONG = {
    "no JSON": b"yes",
    "a list": b"[]",
    "a key twice": BODY[:-1] + b', "key": "row-1"}',
    "another field": BODY[:-1] + b', "path": "/etc/passwd"}',
    "no browser": BODY.replace(b'"browser": "one", ', b""),
    "a path for a key": BODY.replace(b"row-0", b"../row-0"),
    "a line for a key": BODY.replace(b"row-0", b"row-0\\n"),
    "a number for a key": BODY.replace(b'"row-0"', b"0"),
    "another answer": BODY.replace(b"yes", b"perhaps"),
    "no number": BODY.replace(b": 1}", b": NaN}"),
    "before it was asked": BODY.replace(b": 1}", b": -1}"),
    "for years": BODY.replace(b": 1}", b": 1e300}"),
}


@pytest.mark.parametrize("body", WRONG)
def test_what_is_no_answer_is_refused(app, body):
    with app.client() as client:
        answer = client.post("/api/answers", content=WRONG[body], headers=JSON)
    assert (answer.status_code, answer.json()["status"]) == (400, 400)
    assert app.session.answered == []


def test_a_huge_body_is_refused(app):
    with app.client() as client:
        answer = client.post("/api/answers", content=b" " * 70_000 + BODY, headers=JSON)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"


def test_a_question_that_is_gone_and_a_full_disk_have_codes_of_their_own(app):
    with app.client() as client:
        for changes in ({"key": "row-9"}, {"label": "another"}):
            answer = app.answer(client, **changes)
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "not_current")
        app.session.full = True
        answer = app.answer(client)
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, "not_saved")
        assert "disk is full" in answer.json()["detail"]


def test_finish_trains_on_what_is_labelled_and_the_report_has_no_origin(app):
    with app.client() as client:
        app.answer(client)
        answer = client.post("/api/finish", json={})
        assert (answer.status_code, answer.json()["finish"]["state"]) == (202, "running")
        assert [example.id for example in app.finishing.trained[0]] == ["first"]
        app.finishing.page = "<p>a report</p>"
        report = client.get("/report/")
        assert report.text == "<p>a report</p>"
        assert report.headers["content-security-policy"].startswith("sandbox allow-scripts")
