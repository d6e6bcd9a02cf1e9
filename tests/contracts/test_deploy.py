"""The files of deploy/ agree with the package, with each other and with what `docs/how-to/deploy.md` promises."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import qwen_vl_classifier
from qwen_vl_classifier.cli.flags import from_flags
from qwen_vl_classifier.cli.main import build_parser
from qwen_vl_classifier.config.serve import ServeConfig
from qwen_vl_classifier.serving.cluster import proxy_layers
from qwen_vl_classifier.serving.cluster.application import APPLICATION
from qwen_vl_classifier.serving.routes import operations

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
OBJECTS = {
    path.name: list(yaml.safe_load_all(path.read_text()))
    for path in sorted(DEPLOY.glob("*.yaml"))
    if path.name != "alerts.yaml"  # rules of Prometheus, no objects
}
PORT = ServeConfig().port
USER = 10001
WRITABLE = ["/tmp", "/cache"]
ROUTES = {route.path for route in operations.router.routes}
RAY_PROXY = "/-/healthz"
BUILT_IN = {"v1", "apps/v1", "policy/v1", "networking.k8s.io/v1"}  # the rest is defined by operators


def only(file: str, kind: str) -> Any:
    """The one object of a kind in a file."""
    (found,) = (item for item in OBJECTS[file] if item["kind"] == kind)
    return found


def inside(value: Any, key: str) -> Iterator[Any]:
    """Every value under a key, however deep."""
    if isinstance(value, dict):
        if key in value:
            yield value[key]
        for item in value.values():
            yield from inside(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from inside(item, key)


def pods() -> list[Any]:
    return [
        pytest.param(template["spec"], id=f"{file}-{template['spec']['containers'][0]['name']}")
        for file, objects in OBJECTS.items()
        for template in inside(objects, "template")
    ]


def instructions(name: str) -> list[str]:
    """The arguments of all instructions of a name in the Dockerfile."""
    joined = re.sub(r"\\\n", "", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    return re.findall(rf"^{name} +(.*)$", joined, re.MULTILINE)


def served(words: list[str]) -> ServeConfig:
    """What `serve` makes of a command line."""
    flags = build_parser().parse_args(words)
    return from_flags(ServeConfig, flags, classifiers=tuple(flags.classifiers))


class TestImage:
    """`deploy/Dockerfile`."""

    def test_hadolint_has_nothing_to_say(self):
        hadolint = shutil.which("hadolint", path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}")
        if hadolint is None:
            pytest.skip("hadolint is not installed")
        done = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "")

    def test_each_base_is_pinned_or_a_stage(self):
        stages = {words.split()[-1] for words in instructions("FROM")}
        assert {"cpu", "cuda"} <= stages
        bases = {words.split()[0] for words in instructions("FROM")} - stages
        assert bases == {"python:3.11-slim-bookworm"}

    def test_the_context_holds_what_is_copied(self):
        admitted = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
        copied = {
            source for words in instructions("COPY") if "--from" not in words for source in shlex.split(words)[:-1]
        }
        assert copied == set(admitted)
        assert all((ROOT / name).exists() for name in copied)

    def test_what_the_wheel_is_made_of_is_copied(self):
        pyproject = (ROOT / "pyproject.toml").read_text()
        copied = " ".join(instructions("COPY"))
        for name in ("LICENSE", "README.md", "setup.py"):
            assert name in copied
        for module in re.findall(r"py-modules = \[\"(.*)\"\]", pyproject):
            assert f"{module}.py" in copied

    def test_the_user_is_not_root(self):
        assert instructions("USER") == [f"{USER}:{USER}"] * 2  # one for each target

    def test_what_is_written_lies_under_mounts(self):
        variables = dict(pair.split("=", 1) for pair in shlex.split(" ".join(instructions("ENV"))))
        paths = {name: value for name, value in variables.items() if value.startswith("/")}
        assert {"HOME", "XDG_CACHE_HOME", "HF_HOME"} <= paths.keys()
        assert all(value.startswith(tuple(WRITABLE)) for value in paths.values())
        assert variables["PYTHONDONTWRITEBYTECODE"] == "1"

    def test_it_serves_without_a_shell_and_only_with_a_key(self, monkeypatch):
        (entry,) = instructions("ENTRYPOINT")
        words = yaml.safe_load(entry)  # a JSON list; anything else would be run by a shell, which keeps SIGTERM
        assert words[:2] == ["qwen-vl-classifier", "serve"]
        assert served([*words[1:], "/models/claims", "--api-key-file", "key"]).port == PORT
        with pytest.raises(qwen_vl_classifier.QwenVLClassifierError, match="no API key"):
            served([*words[1:], "/models/claims"])

    def test_the_health_check_is_a_python_program_that_reads_livez(self):
        (check,) = instructions("HEALTHCHECK")
        program = yaml.safe_load(check.split("CMD ")[1])
        assert program[:2] == ["python", "-c"]
        compile(program[2], "HEALTHCHECK", "exec")
        assert f"'127.0.0.1', {PORT}" in program[2]
        assert re.search(r"'GET', '(.*?)'", program[2])[1] in ROUTES
        assert instructions("EXPOSE") == [str(PORT)]


@pytest.mark.parametrize("pod", pods())
class TestPods:
    """Every pod in deploy/."""

    def test_it_has_no_rights(self, pod):
        rights = pod["securityContext"]
        assert rights["runAsNonRoot"] is True
        assert rights["runAsUser"] == rights["runAsGroup"] == rights["fsGroup"] == USER
        assert rights["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }

    def test_it_writes_to_bounded_folders_of_its_own(self, pod):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert not [volume for volume in volumes.values() if "hostPath" in volume]
        for container in pod["containers"]:
            mounts = container["volumeMounts"]
            writable = {mount["mountPath"]: mount["name"] for mount in mounts if not mount.get("readOnly")}
            assert list(writable) == WRITABLE
            assert all(volumes[name]["emptyDir"]["sizeLimit"] for name in writable.values())
            assert {"/models", "/run/secrets/classifier"} == {mount["mountPath"] for mount in mounts} - set(WRITABLE)

    def test_its_image_is_of_this_version_and_its_memory_bounded(self, pod):
        for container in pod["containers"]:
            assert container["image"].rpartition(":")[2].startswith(f"{qwen_vl_classifier.__version__}-")
            resources = container["resources"]
            assert resources["limits"]["memory"] == resources["requests"]["memory"]

    def test_no_secret_is_in_the_file(self, pod):
        for variable in inside(pod, "env"):
            assert not [item["name"] for item in variable if "KEY" in item["name"] or "TOKEN" in item["name"]]
        secrets = list(inside(pod, "secret"))
        assert [secret["secretName"] for secret in secrets] == ["classifier-api-key"]


class TestKubernetes:
    """`deploy/kubernetes.yaml`."""

    POD = only("kubernetes.yaml", "Deployment")["spec"]["template"]["spec"]
    CONTAINER = POD["containers"][0]

    def test_its_options_are_those_of_serve(self):
        (entry,) = instructions("ENTRYPOINT")
        config = served([*yaml.safe_load(entry)[1:], *self.CONTAINER["args"]])
        assert config.api_key_file.startswith("/run/secrets/classifier/")
        assert config.classifiers[0].startswith("/models/")
        assert config.model.startswith("/models/")
        assert not config.insecure

    def test_ports_agree(self):
        config = served(["serve", *self.CONTAINER["args"]])
        (port,) = self.CONTAINER["ports"]
        (service,) = only("kubernetes.yaml", "Service")["spec"]["ports"]
        (allowed,) = only("kubernetes.yaml", "NetworkPolicy")["spec"]["ingress"][0]["ports"]
        assert port == {"name": "http", "containerPort": config.port}
        assert (service["port"], service["targetPort"], allowed["port"]) == (PORT, "http", "http")

    def test_probes_name_routes(self):
        probes = {name: probe for name, probe in self.CONTAINER.items() if name.endswith("Probe")}
        paths = {name: probe["httpGet"]["path"] for name, probe in probes.items()}
        assert paths == {"startupProbe": "/readyz", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
        assert set(paths.values()) <= ROUTES
        assert {probe["httpGet"]["port"] for probe in probes.values()} == {"http"}
        startup = probes["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 600

    def test_requests_have_time_to_end(self):
        config = served(["serve", *self.CONTAINER["args"]])
        before = self.CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert self.POD["terminationGracePeriodSeconds"] >= before + config.grace + 10
        assert config.grace >= config.deadline

    def test_selectors_find_the_pods(self):
        deployment = only("kubernetes.yaml", "Deployment")["spec"]
        labels = deployment["template"]["metadata"]["labels"]
        assert deployment["selector"]["matchLabels"] == labels
        assert only("kubernetes.yaml", "Service")["spec"]["selector"] == labels
        assert only("kubernetes.yaml", "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
        policy = only("kubernetes.yaml", "NetworkPolicy")["spec"]
        assert policy["podSelector"]["matchLabels"] == labels
        assert policy["egress"] == []
        assert all(source["namespaceSelector"]["matchLabels"] for source in policy["ingress"][0]["from"])

    def test_nobody_talks_to_the_cluster(self):
        assert self.POD["automountServiceAccountToken"] is False


class TestRay:
    """`deploy/rayservice.yaml`."""

    SPEC = only("rayservice.yaml", "RayService")["spec"]
    SERVE = yaml.safe_load(SPEC["serveConfigV2"])

    def test_its_options_are_those_of_serve(self):
        (application,) = self.SERVE["applications"]
        fields = {**application["args"], "classifiers": tuple(application["args"]["classifiers"]), "engine": "ray"}
        config = ServeConfig(**fields)
        assert config.replica_bounds[1] == self.SPEC["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplicas"]
        http = self.SERVE["http_options"]
        assert (http["host"], http["port"], http["request_timeout_s"]) == (config.host, PORT, config.deadline)
        assert (application["name"], application["route_prefix"]) == (APPLICATION, "/")

    def test_its_names_can_be_imported(self):
        module, _, name = self.SERVE["applications"][0]["import_path"].partition(":")
        assert callable(getattr(importlib.import_module(module), name))
        for group in ("headGroupSpec", "workerGroupSpecs"):
            (variables,) = inside(self.SPEC["rayClusterConfig"][group], "env")
            values = {variable["name"]: variable["value"] for variable in variables}
            assert values[proxy_layers.CALLBACK_VARIABLE] == proxy_layers.CALLBACK

    def test_ray_is_the_one_that_was_tested(self):
        pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
        assert self.SPEC["rayClusterConfig"]["rayVersion"] == pinned[1]

    def test_only_those_with_a_token_may_submit_work(self):
        cluster = self.SPEC["rayClusterConfig"]
        assert cluster["authOptions"] == {"mode": "token"}

    def test_the_autoscaler_has_no_rights_either(self):
        options = self.SPEC["rayClusterConfig"]["autoscalerOptions"]
        (head,) = self.SPEC["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
        assert options["securityContext"] == head["securityContext"]
        assert [mount["mountPath"] for mount in options["volumeMounts"]] == WRITABLE

    def test_probes_need_no_program_that_the_image_lacks(self):
        """Those that KubeRay would put there may run wget."""
        head, worker = (
            next(inside(self.SPEC["rayClusterConfig"][group], "containers"))[0]
            for group in ("headGroupSpec", "workerGroupSpecs")
        )
        for container in (head, worker):
            assert "httpGet" in container["livenessProbe"]
            assert "httpGet" in container["readinessProbe"]
        assert worker["readinessProbe"]["httpGet"] == {"path": RAY_PROXY, "port": PORT}

    def test_only_the_port_of_serve_is_open_to_clients(self):
        rules = only("rayservice.yaml", "NetworkPolicy")["spec"]["ingress"]
        (clients,) = (rule for rule in rules if "classifier-access" in str(rule))
        assert clients["ports"] == [{"port": PORT}]


class TestMonitoring:
    """`deploy/servicemonitor.yaml` and `deploy/alerts.yaml`."""

    def test_prometheus_finds_the_service_and_sends_the_key(self):
        monitor = only("servicemonitor.yaml", "ServiceMonitor")["spec"]
        service = only("kubernetes.yaml", "Service")
        assert monitor["selector"]["matchLabels"] == service["metadata"]["labels"]
        (endpoint,) = monitor["endpoints"]
        assert endpoint["path"] in ROUTES
        assert endpoint["port"] == service["spec"]["ports"][0]["name"]
        assert endpoint["authorization"]["credentials"] == {"name": "classifier-api-key", "key": "api-key"}

    def test_each_alert_is_explained(self):
        names = re.findall(r"- alert: (\w+)", (DEPLOY / "alerts.yaml").read_text())
        page = (ROOT / "docs" / "how-to" / "deploy.md").read_text()
        assert names
        assert [name for name in names if f"`{name}`" not in page] == []


def test_everything_is_in_one_namespace():
    name = only("namespace.yaml", "Namespace")["metadata"]["name"]
    for file, objects in OBJECTS.items():
        for item in objects:
            assert item["kind"] == "Namespace" or item["metadata"]["namespace"] == name, file


def test_kubernetes_knows_every_field():
    """By the schemas of Kubernetes itself, where kubernetes-validate is installed."""
    validator = pytest.importorskip("kubernetes_validate")
    known = [item for objects in OBJECTS.values() for item in objects if item["apiVersion"] in BUILT_IN]
    assert len(known) >= 7
    for item in known:
        validator.validate(item, "1.32", strict=True)
