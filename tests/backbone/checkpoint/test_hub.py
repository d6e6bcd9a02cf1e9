"""From a name to a folder, and what is said where there is none."""

from __future__ import annotations

import errno
import fnmatch
import json
import os
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from qwen_vl_classifier.backbone.checkpoint.hub import BUILTIN, locate
from qwen_vl_classifier.errors import CheckpointError
from tests import nano


def refusal(name: str, revision: str | None = None) -> str:
    """Return what is said of a name: one line that begins with it."""
    with pytest.raises(CheckpointError) as caught:
        locate(name, revision)
    text = str(caught.value)
    assert text.startswith(f"{name}: ")
    assert "\n" not in text
    return text


def test_the_builtin_backbone_is_in_the_package():
    assert locate("builtin:tiny") == BUILTIN["builtin:tiny"]
    assert (locate("builtin:tiny") / "config.json").is_file()


@pytest.mark.parametrize("name", ["builtin:large", "builtin:", "builtin:tiny/../tiny"])
def test_an_unknown_builtin_names_those_there_are(name):
    assert "expected builtin:tiny" in refusal(name)


def test_a_folder_is_itself(tmp_path, monkeypatch):
    assert locate(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert locate("owner/name") == Path("owner/name")  # a folder of that name comes before the hub
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/owner") == tmp_path / "owner"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "give the folder" in refusal(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    "name",
    ["missing", "/missing/folder", "./a/b", "../b", "a/b/c", "a/", "~/missing", "~no-such-user/x", "x" * 5000, "a/b\0"],
)
def test_what_is_neither_folder_nor_name_says_so(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert any(part in refusal(name) for part in ("give an existing folder", "check the spelling"))


def test_a_hub_that_cannot_be_reached_says_what_works_without_it():
    text = refusal("no-such-owner-anywhere/no-such-model")
    for part in ("HF_HUB_OFFLINE", "local folder", "builtin:tiny"):
        assert part in text


def response(status: int) -> object:
    library = sys.modules[errors.HTTPError.__module__]  # which HTTP library it is differs between versions
    return library.Response(status, request=library.Request("GET", "https://hub.example.org"))


FAILURES = {
    "gated": (lambda: errors.GatedRepoError("x", response=response(403)), "request access on its page"),
    "no model": (lambda: errors.RepositoryNotFoundError("x", response=response(404)), "check the spelling"),
    "no revision": (lambda: errors.RevisionNotFoundError("x", response=response(404)), "no revision 'v9'"),
    "impossible name": (lambda: errors.HFValidationError("x"), "check the spelling"),
    "not kept": (lambda: errors.LocalEntryNotFoundError("x"), "cannot be reached"),
    "server error": (lambda: errors.HfHubHTTPError("x", response=response(500)), "cannot be reached"),
    "connection": (lambda: ConnectionResetError(errno.ECONNRESET, "x"), "cannot be reached"),
    "any HTTP library": (lambda: errors.HTTPError("a\nproxy"), "cannot be reached"),
    "disk full": (lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device); free space"),
    "no permission": (lambda: PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "set HF_HOME"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_every_failure_of_the_hub_is_one_line_of_advice(monkeypatch, name):
    make, advice = FAILURES[name]

    error = make()

    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert advice in refusal("owner/model", "v9")


def test_stopping_a_download_is_no_failure_of_the_hub(monkeypatch):
    def stop(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", stop)
    with pytest.raises(KeyboardInterrupt):
        locate("owner/model")


class Hub:
    """Stands in for the hub: keeps what is asked of it, and gives out files by the patterns."""

    def __init__(self, source: Path, cache: Path) -> None:
        self.source, self.snapshot = source, cache / "snapshots" / ("0" * 40)
        self.fetched: list[str] = []
        self.revisions: list[str | None] = []

    def download(self, name, *, revision, allow_patterns, ignore_patterns) -> str:
        assert name == "owner/model"
        self.revisions.append(revision)
        for path in sorted(self.source.rglob("*")):
            file = path.relative_to(self.source).as_posix()
            wanted = any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)
            ignored = ignore_patterns is not None and fnmatch.fnmatch(file, ignore_patterns)
            if path.is_file() and wanted and not ignored and file not in self.fetched:
                self.fetched.append(file)
                (self.snapshot / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.snapshot / file)
        return str(self.snapshot)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    hub = Hub(tmp_path / "source", tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    return hub


@pytest.mark.parametrize("shards", [1, 2])
def test_what_is_needed_is_fetched_and_no_code(hub, shards):
    nano.make_checkpoint("qwen3_vl", hub.source, shards=shards)
    needed = sorted(path.name for path in hub.source.iterdir())
    for file in ("merges.txt", "chat_template.jinja"):
        (hub.source / file).touch()
    strays = ["modeling.py", "pytorch_model.bin", "model.pth", "weights.pkl", "setup.sh", "consolidated.safetensors"]
    (hub.source / "checkpoint-500").mkdir()
    for file in [*strays, "checkpoint-500/model.safetensors", "checkpoint-500/config.json"]:
        (hub.source / file).touch()
    assert locate("owner/model", "v1") == hub.snapshot
    assert sorted(hub.fetched) == sorted([*needed, "merges.txt", "chat_template.jinja"])
    assert hub.revisions[0] == "v1"
    assert set(hub.revisions[1:]) == {"0" * 40}  # a branch may move while it is fetched


def test_one_file_of_another_name_is_fetched(hub):
    nano.make_checkpoint("qwen2_vl", hub.source)
    (hub.source / "model.safetensors").rename(hub.source / "merged.safetensors")
    assert (locate("owner/model") / "merged.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "llava"}, "has model_type 'llava'"),
        ({"quantization_config": {"quant_method": "awq"}}, "is already quantised (awq)"),
    ],
)
def test_no_weights_are_fetched_of_what_cannot_be_loaded(hub, change, said):
    nano.make_checkpoint("qwen2_vl", hub.source)
    config = json.loads((hub.source / "config.json").read_text()) | change
    (hub.source / "config.json").write_text(json.dumps(config))
    assert said in refusal("owner/model")
    assert not any(file.endswith(".safetensors") for file in hub.fetched)


def test_a_repository_that_holds_only_an_adapter_names_its_base(hub):
    hub.source.mkdir()
    (hub.source / "adapter_model.safetensors").touch()
    (hub.source / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct"}')
    assert "only a PEFT adapter for Qwen/Qwen2-VL-2B-Instruct" in refusal("owner/model")


def test_files_that_an_index_names_elsewhere_are_not_fetched(hub):
    nano.make_checkpoint("qwen2_vl", hub.source, shards=2)
    (hub.source / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../../x.safetensors"}}')
    assert "names '../../x.safetensors'" in refusal("owner/model")
