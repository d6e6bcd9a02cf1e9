"""What Ray Serve is told of the application, without Ray."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from qwen_vl_classifier import ServeConfig
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.serving.cluster import application as module
from qwen_vl_classifier.serving.cluster.application import CLOSE_SECONDS, Classifiers, application, build


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options of the deployment, as they come to a Ray with 8 CPUs and the GPUs that a test puts here."""
    told: dict[str, Any] = {"GPU": 0}

    def deployment(_kind: type, **options: Any) -> Any:
        told.update(options)
        return SimpleNamespace(bind=lambda *arguments: told.update(arguments=arguments) or "bound")

    modules = {
        "fastapi": None,
        "ray": SimpleNamespace(cluster_resources=lambda: {"CPU": 8.0, "GPU": told["GPU"]}),
        "ray.serve": SimpleNamespace(ingress=lambda: lambda kind: kind, deployment=deployment),
    }
    monkeypatch.setattr(module, "require", lambda name, extra: modules[name])
    return told


def test_the_bounds_of_admission_are_those_of_ray(told: dict[str, Any]) -> None:
    config = ServeConfig(engine="ray", queue_size=10, max_batch=3, grace=7.0)
    assert application(config) == "bound"
    assert told["max_ongoing_requests"] == 13
    assert told["max_queued_requests"] == 10
    assert told["backpressure_config"] == {"status_code": 429, "retry_after_s": 1}
    assert told["graceful_shutdown_timeout_s"] == 7.0 + CLOSE_SECONDS
    assert told["num_replicas"] == 1
    assert told["max_surge_percent"] == 100


def test_replicas_follow_the_load_between_bounds(told: dict[str, Any]) -> None:
    application(ServeConfig(engine="ray", replicas="1:4", max_batch=3))
    scaling = {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 3}
    assert told["autoscaling_config"] == scaling
    assert "num_replicas" not in told


@pytest.mark.parametrize(
    ("gpus", "device", "resources", "seen"),
    [
        (0, "auto", {"num_cpus": 4, "num_gpus": 0}, "cpu"),
        (2, "auto", {"num_cpus": 1, "num_gpus": 1}, "auto"),
        (2, "cpu", {"num_cpus": 4, "num_gpus": 0}, "cpu"),
        (0, "cuda", {"num_cpus": 1, "num_gpus": 1}, "auto"),  # a GPU that the cluster is yet to bring up
    ],
)
def test_each_replica_has_a_gpu_where_there_are_any(
    told: dict[str, Any], gpus: int, device: str, resources: dict[str, int], seen: str
) -> None:
    told["GPU"] = gpus
    application(ServeConfig(engine="ray", replicas="2", device=device))
    assert told["ray_actor_options"] == resources
    fields, _ = told["arguments"]
    assert fields["device"] == seen


def test_a_configuration_of_serve_names_the_options(told: dict[str, Any]) -> None:
    assert build({"classifiers": ["models/claims"], "replicas": "2", "deadline": 9}) == "bound"
    fields, locked = told["arguments"]
    config = ServeConfig(engine="ray", classifiers=("models/claims",), replicas="2", deadline=9, device="cpu")
    assert fields == dataclasses.asdict(config)
    assert not locked


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"classifier": ["a"]}, "classifier: not an option of serve"),
        ({"classifiers": "a"}, "classifiers 'a': give a list of folders"),
        ({"classifiers": [1]}, r"classifiers \[1\]: give a list of folders"),
        ({"classifiers": ["a"], "host": "0.0.0.0"}, "there is no API key"),
        ({"classifiers": ["a"], "replicas": "none"}, "replicas 'none'"),
    ],
)
def test_options_that_are_wrong_are_named(
    options: dict[str, Any], why: str, told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QWEN_VL_CLASSIFIER_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=why):
        build(options)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ray awaits __del__
def test_a_replica_checks_its_options_on_its_own_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_VL_CLASSIFIER_API_KEY", "here")
    fields = dataclasses.asdict(ServeConfig(engine="ray", classifiers=("a",), host="0.0.0.0"))
    monkeypatch.delenv("QWEN_VL_CLASSIFIER_API_KEY")
    with pytest.raises(ConfigError, match="there is no API key"):
        Classifiers(fields, locked=False)
