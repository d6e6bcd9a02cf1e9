"""What the command that deploys makes of what Ray tells, without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from qwen_vl_classifier.errors import ConfigError, StoppedError
from qwen_vl_classifier.serving.cluster import deploying
from qwen_vl_classifier.serving.cluster.application import APPLICATION
from qwen_vl_classifier.serving.cluster.deploying import deploy

FAILED = """The deployment failed to start 2 times in a row. Error:
ray::ServeReplica:qwen-vl-classifier:classifiers.initialize_and_get_metadata() (pid=1, ip=127.0.0.1)
  File "application.py", line 150, in __serve_build_asgi_app__
    raise failures[0]
qwen_vl_classifier.errors.ArtifactError: /models/claims: no classifier.json in it; give the folder of a classifier
"""


def told(status: str, message: str = "") -> Any:
    deployment = SimpleNamespace(message=message, replica_states={"STARTING": 1, "RUNNING": 2})
    application = SimpleNamespace(status=status, message="", deployments={"classifiers": deployment})
    return SimpleNamespace(applications={APPLICATION: application})


def serve_that_tells(*answers: Any) -> Any:
    """Ray Serve that gives one answer after the other."""
    rest: Iterator[Any] = iter(answers)
    api = SimpleNamespace(RunTarget=lambda *_arguments, **_options: "target")
    return SimpleNamespace(api=api, run_many=lambda *_arguments, **_options: None, status=lambda: next(rest))


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploying, "_TICK", 0.0)


def test_it_returns_once_the_new_version_alone_answers() -> None:
    deploy(serve_that_tells(told("DEPLOYING"), told("DEPLOYING"), told("RUNNING")), None, lambda: None)


def test_the_line_of_a_replica_that_cannot_load_is_repeated() -> None:
    with pytest.raises(ConfigError, match=r"^/models/claims: no classifier.json in it; give the folder of a class"):
        deploy(serve_that_tells(told("DEPLOYING"), told("DEPLOY_FAILED", FAILED)), None, lambda: None)


def test_any_other_failure_is_no_error_of_the_user() -> None:
    with pytest.raises(RuntimeError, match=r"^replicas do not start: LookupError: a defect"):
        deploy(serve_that_tells(told("DEPLOY_FAILED", "Error:\nLookupError: a defect")), None, lambda: None)


def test_what_is_waited_for_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(deploying, "_PATIENCE", -1.0)
    deploy(serve_that_tells(*[told("DEPLOYING")] * 3, told("RUNNING")), None, lambda: None)
    (record,) = caplog.records
    assert "(1 starting, 2 running); waiting: each needs a free GPU" in record.message


def test_whatever_ends_this_process_ends_the_wait() -> None:
    looks: list[None] = []

    def check() -> None:
        looks.append(None)
        if len(looks) == 3:
            raise StoppedError("a signal came")

    with pytest.raises(StoppedError):
        deploy(serve_that_tells(*[told("DEPLOYING")] * 3), None, check)
