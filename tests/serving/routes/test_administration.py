"""`POST /v1/models` and `DELETE /v1/models/{model}`: who may, from where, and what goes on when it fails."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from qwen_vl_classifier import Classifier, Example, ServeConfig, Tap, create_app
from qwen_vl_classifier.config.serve import ADMIN_KEY_VARIABLE
from qwen_vl_classifier.errors import ConfigError, OutOfMemoryError
from qwen_vl_classifier.serving.app import Shared
from qwen_vl_classifier.serving.http.access import Keys
from qwen_vl_classifier.serving.models import registry
from qwen_vl_classifier.serving.observability.prometheus import Metrics
from tests.serving.client import check_problem
from tests.serving.clock import PATIENT
from tests.serving.served import ready_client

KEY, ADMIN = "key-of-clients", "key-of-admins"
BASIC = "Basic OmtleS1vZi1hZG1pbnM="  # the admin key, as a browser would send it by itself
AUTHORISED = {"Authorization": f"Bearer {ADMIN}"}


class Administered:
    """An application with an empty watched folder, whose classifiers come by request."""

    def __init__(self, client: TestClient, folder: Path) -> None:
        self.client = client
        self.folder = folder

    def put(self, body: Any, **headers: str) -> httpx.Response:
        response: httpx.Response = self.client.post("/v1/models", json=body, headers={**AUTHORISED, **headers})
        return response

    def score(self, name: str) -> tuple[float, str]:
        response = self.client.post("/v1/classify", json={"model": name, "input": [{"text": "a"}]})
        assert response.status_code == 200, response.text
        return response.json()["data"][0]["score"], response.json()["version"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("administered")
    (folder / "api").write_text(KEY)
    (folder / "admin").write_text(ADMIN)
    (folder / "root").mkdir()
    (folder / "elsewhere").mkdir()
    return folder


@pytest.fixture(scope="module")
def administered(files: Path) -> Iterator[Administered]:
    config = ServeConfig(models_root=str(files / "root"), admin_key_file=str(files / "admin"), device="cpu", **PATIENT)
    with ready_client(config) as client:
        yield Administered(client, files / "root")


@functools.cache
def client_of(config: ServeConfig) -> TestClient:
    """Return a client of an application that is not begun."""
    return TestClient(create_app(config), base_url="http://localhost")


def variant(classifier: Classifier, threshold: float, layer: int = 2) -> Classifier:
    other = copy.copy(classifier)
    other.tap, other.threshold = Tap(layer, "mean"), threshold
    other.temperature = 1 + threshold
    return other


def test_a_classifier_comes_changes_and_goes(administered: Administered, tiny_classifier: Classifier) -> None:
    client, folder = administered.client, administered.folder / "claims"
    first, second = variant(tiny_classifier, 0.3), variant(tiny_classifier, 0.6, layer=-1)
    check_problem(client.get("/readyz"), 503, "no_models")
    check_problem(client.post("/v1/classify", json={"input": [{"text": "a"}]}), 503, "no_models")
    check_problem(client.post("/v1/moderations", json={"input": "a"}), 503, "no_models")
    first.save(folder)
    made = administered.put({"folder": "claims"})
    assert made.status_code == 201, made.text
    assert made.json() == client.get("/v1/models/claims").json() == client.get("/v1/models").json()["data"][0]
    assert made.json()["threshold"] == 0.3
    assert client.get("/readyz").status_code == 200
    expected = [one.predict_proba([Example(None, "a")])[0, 1] for one in (first, second)]
    assert administered.score("claims") == (pytest.approx(expected[0], abs=1e-6), made.json()["version"])
    second.save(folder)
    assert administered.score("claims")[1] == made.json()["version"], "nobody asked for the new one yet"
    replaced = administered.put({"folder": str(folder)})
    assert replaced.status_code == 200
    assert replaced.json()["version"] != made.json()["version"]
    assert administered.score("claims") == (pytest.approx(expected[1], abs=1e-6), replaced.json()["version"])
    beside = administered.put({"folder": "claims", "name": "another name"})
    assert (beside.status_code, beside.json()["version"]) == (201, replaced.json()["version"])
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["another name", "claims"]
    for name in ("claims", "another name"):
        gone = client.delete(f"/v1/models/{name}", headers=AUTHORISED)
        assert (gone.status_code, gone.json()) == (200, {"id": name, "object": "model", "deleted": True})
        check_problem(client.delete(f"/v1/models/{name}", headers=AUTHORISED), 404, "model_not_found")
    assert folder.is_dir()
    assert client.get("/v1/models").json() == {"object": "list", "data": [], "models": [], "pending": []}


def test_what_cannot_be_served_leaves_the_old_version(
    administered: Administered, tiny_classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = variant(tiny_classifier, 0.3).save(administered.folder / "sound")
    assert administered.put({"folder": "sound"}).status_code == 201
    before = administered.score("sound")
    head = (folder / "head.safetensors").read_bytes()
    (folder / "head.safetensors").write_bytes(head[:-1])
    check_problem(administered.put({"folder": "sound"}), 422, "invalid_classifier")
    (folder / "head.safetensors").write_bytes(head)
    manifest = json.loads((folder / "classifier.json").read_text())
    for change in ({"folder": "/nowhere/secret"}, {"name": "/nowhere/secret", "folder": "/nowhere/secret"}):
        other = {**manifest, "backbone": {**manifest["backbone"], "fingerprint": "0" * 64, **change}}
        (folder / "classifier.json").write_text(json.dumps(other))
        response = administered.put({"folder": "sound"})
        check_problem(response, 422, "invalid_backbone")
        assert "secret" not in response.text
    (folder / "classifier.json").write_text(json.dumps(manifest))
    error = OutOfMemoryError("out of memory while loading /home/secret")
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_load", lambda served, folders, _: (served, dict.fromkeys(folders, error)))
        assert "secret" not in check_problem(administered.put({"folder": "sound"}), 507, "out_of_memory")
        patch.setattr(registry, "_load", lambda *_: 1 / 0)
        check_problem(administered.put({"folder": "sound"}), 500, "internal_error")
    nan = variant(tiny_classifier, 0.3)
    nan.head = copy.deepcopy(nan.head)
    for weight in nan.head.parameters():
        weight.data.fill_(float("nan"))
    nan.save(administered.folder / "sound")
    check_problem(administered.put({"folder": "sound"}), 422, "invalid_classifier")
    assert administered.score("sound") == before
    assert administered.client.get("/v1/models").json()["pending"] == []
    assert administered.client.delete("/v1/models/sound", headers=AUTHORISED).status_code == 200


def test_nothing_is_learned_of_files_elsewhere(
    administered: Administered, files: Path, tiny_classifier: Classifier
) -> None:
    outside = tiny_classifier.save(files / "elsewhere" / "claims")
    (administered.folder / "link").symlink_to(outside)
    answers = {
        administered.put({"folder": given}).text
        for given in (str(outside), "../elsewhere/claims", "link", "nothing", "/etc", "/root", "\0", "x" * 4096, ".")
    }
    assert len(answers) == 1
    check_problem(administered.put({"folder": "link"}), 404, "folder_not_found")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 400, "invalid_request"),
        ({"folder": ""}, 400, "invalid_request"),
        ({"folder": "x" * 4097}, 400, "invalid_request"),
        ({"folder": "claims", "secret": 1}, 400, "invalid_request"),
        ({"folder": ["claims"]}, 400, "invalid_request"),
        ([], 400, "invalid_request"),
    ],
)
def test_bodies_that_are_none(administered: Administered, body: Any, status: int, code: str) -> None:
    response = administered.put(body)
    check_problem(response, status, code)
    assert "secret" not in response.text


@pytest.mark.parametrize("name", ["", "a/b", "a\nb", ".a", "x" * 129])
def test_names_that_cannot_be_served(administered: Administered, tiny_classifier: Classifier, name: str) -> None:
    if not (administered.folder / "named").exists():
        tiny_classifier.save(administered.folder / "named")
    check_problem(administered.put({"folder": "named", "name": name}), 409, "name_taken")


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/models"), ("DELETE", "/v1/models/claims")])
class TestKeys:
    """The application is not begun: what is let in is answered 503."""

    def request(self, config: ServeConfig, method: str, path: str, **headers: str) -> httpx.Response:
        response: httpx.Response = client_of(config).request(method, path, headers=headers)
        return response

    @pytest.mark.parametrize(
        "given",
        [
            *("", f"Bearer {KEY}", "Bearer ", "Bearer wrong", f"Bearer {ADMIN} ", f"Bearer  {ADMIN}", f"{ADMIN}"),
            BASIC,
        ],
    )
    def test_the_admin_key_opens_and_no_other(self, files: Path, method: str, path: str, given: str) -> None:
        config = ServeConfig(classifiers=("a",), api_key_file=str(files / "api"), admin_key_file=str(files / "admin"))
        check_problem(self.request(config, method, path, Authorization=f"bearer {ADMIN}"), 503, "loading")
        response = self.request(config, method, path, **({"Authorization": given} if given else {}))
        if given.split() == ["Bearer", ADMIN]:
            check_problem(response, 503, "loading")
        elif given in (f"Bearer {KEY}", BASIC):  # of clients
            check_problem(response, 401, "invalid_admin_key")
            assert response.headers.get_list("www-authenticate") == ["Bearer"]
        else:
            check_problem(response, 401, "invalid_api_key")

    @pytest.mark.parametrize("given", ["", "Bearer wrong", BASIC])
    def test_where_clients_need_no_key(self, files: Path, method: str, path: str, given: str) -> None:
        config = ServeConfig(classifiers=("a",), admin_key_file=str(files / "admin"))
        response = self.request(config, method, path, **({"Authorization": given} if given else {}))
        check_problem(response, 401, "invalid_admin_key")

    def test_it_opens_the_rest_too(self, files: Path, method: str, path: str) -> None:
        config = ServeConfig(classifiers=("a",), api_key_file=str(files / "api"), admin_key_file=str(files / "admin"))
        for key in (KEY, ADMIN):
            check_problem(self.request(config, "GET", "/v1/models", Authorization=f"Bearer {key}"), 503, "loading")
        check_problem(self.request(config, "GET", "/v1/models"), 401, "invalid_api_key")

    @pytest.mark.parametrize("locked", [False, True])
    def test_without_one_nobody_may(self, files: Path, method: str, path: str, locked: bool) -> None:
        """On loopback neither, and whatever key is sent."""
        config = ServeConfig(classifiers=("a",), api_key_file=str(files / "api") if locked else "")
        check_problem(self.request(config, method, path, Authorization=f"Bearer {KEY}"), 403, "no_admin_key")
        for given in ({}, {"Authorization": "Bearer "}):
            refused = (401, "invalid_api_key") if locked else (403, "no_admin_key")
            check_problem(self.request(config, method, path, **given), *refused)

    def test_pages_of_other_sites_and_other_names(self, files: Path, method: str, path: str) -> None:
        config = ServeConfig(classifiers=("a",), admin_key_file=str(files / "admin"))
        cross = self.request(config, method, path, **AUTHORISED, Origin="https://example.org")
        check_problem(cross, 403, "cross_site")
        check_problem(self.request(config, method, path, **AUTHORISED, Host="example.org"), 421, "unknown_host")

    def test_several_processes_refuse(self, method: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        async def nobody() -> None:
            pass

        shared = Shared(Keys(admin=ADMIN.encode()), Metrics(), nobody)
        for config, given in (
            (ServeConfig(classifiers=("a",)), shared),
            (ServeConfig(classifiers=("a",), engine="ray"), None),
        ):
            monkeypatch.setenv(ADMIN_KEY_VARIABLE, ADMIN)
            app = create_app(config, shared=given)
            monkeypatch.setattr(type(app.state.service), "state", "ready")
            client = TestClient(app, base_url="http://localhost")
            response = client.request(method, path, headers=AUTHORISED)
            check_problem(response, 409, "several_processes")
            assert "--watch" in response.text


def test_keys_that_cannot_be(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = ServeConfig(classifiers=("a",), api_key_file=str(files / "api"), admin_key_file=str(files / "api"))
    with pytest.raises(ConfigError, match="the admin key is the same as the API key"):
        create_app(same)
    with pytest.raises(ConfigError, match=r"^admin_key_file .*none: it cannot be read"):
        create_app(ServeConfig(classifiers=("a",), admin_key_file=str(files / "none")))
    with pytest.raises(ConfigError, match="models_root x: given without an admin key"):
        ServeConfig(models_root="x")
    monkeypatch.setenv(ADMIN_KEY_VARIABLE, ADMIN)
    assert ServeConfig(models_root="x").models_root == "x"
