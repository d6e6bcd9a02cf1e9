"""The saved folder: every field and shape is checked, nothing is pickled, and nobody's files are overwritten."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_vl_classifier import Classifier, Tap
from qwen_vl_classifier.classifier import artifact
from qwen_vl_classifier.classifier.artifact import (
    Manifest,
    check_replaceable,
    read_head_weights,
    read_manifest,
    replacing,
    write_manifest,
)
from qwen_vl_classifier.classifier.head import HeadSpec
from qwen_vl_classifier.errors import ArtifactError
from qwen_vl_classifier.files import whole
from tests import crash_points

ROOT = Path(__file__).resolve().parents[2]

SAVE = """
import errno, os, sys
from pathlib import Path
from qwen_vl_classifier import Backbone, Classifier
from qwen_vl_classifier.files import whole
from tests import crash_points

folder, moment, barrier, in_one_step = sys.argv[1:]
if in_one_step == "0":
    def refused(one, other):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    whole.exchange = refused
classifier = Classifier.zero_shot(Backbone.load("builtin:tiny", device="cpu", dtype="float32"))
classifier.threshold = 0.9
crash_points.halt(moment, "saved", Path(barrier))
classifier.save(folder)
"""

MANIFEST = Manifest(
    backbone={
        "name": "some/backbone",
        "revision": None,
        "family": "qwen2_5_vl",
        "fingerprint": "0f" * 32,
        "dtype": "bfloat16",
        "quantization": None,
        "finetuned": False,
        "adapter": False,
    },
    tap=Tap(3, "last"),
    pixel_limits=(3136, 200704),
    prompt="{{ messages }}",
    head=HeadSpec("mlp", 8, units=4, dropout=0.1),
    label_names=("no", "yes"),
    temperature=1.5,
    isotonic=((0.1, 0.6, 0.7), (0.2, 0.2, 0.9)),
    threshold=0.4,
    abstention=(0.3, 0.5),
    training={"method": "probe", "rows": 12, "options": {"seed": 0}},
    versions={"torch": "2.13"},
)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved classifier, without its backbone."""
    place = tmp_path / "saved"
    place.mkdir()
    write_manifest(place, MANIFEST, MANIFEST.head.build().state_dict())
    return place


@pytest.fixture
def saved(tiny_classifier, tmp_path) -> Path:
    """A saved classifier on the built-in backbone."""
    return tiny_classifier.save(tmp_path / "saved")


def edit(folder: Path, path: str, value: Any = None, *, delete: bool = False) -> None:
    """Change one field of `classifier.json`, given as in "head.units"."""
    content = json.loads((folder / "classifier.json").read_text())
    *outer, last = path.split(".")
    place = content
    for name in outer:
        place = place[name]
    if delete:
        del place[last]
    else:
        place[last] = value
    (folder / "classifier.json").write_text(json.dumps(content))


def refusal(folder: Path) -> str:
    """Return what is said of a folder, which must be one line that names it and what to do."""
    with pytest.raises(ArtifactError) as caught:
        read_manifest(folder)
    text = str(caught.value)
    assert text.startswith(str(folder))
    assert "\n" not in text
    assert re.search(r"(save|train) the classifier again|give|expected|write it as|choose", text)
    return text


def test_the_manifest_round_trips(folder):
    assert read_manifest(folder) == MANIFEST
    assert read_manifest(str(folder)) == MANIFEST
    assert json.loads((folder / "classifier.json").read_text())["format_version"] == 1


def test_the_weights_round_trip(folder):
    head = MANIFEST.head.build()
    write_manifest(folder, MANIFEST, head.state_dict())
    torch.testing.assert_close(read_head_weights(folder), dict(head.state_dict()), rtol=0, atol=0)


def test_nothing_is_pickled(saved):
    files = {path.relative_to(saved).as_posix() for path in saved.rglob("*")}
    assert files == {"classifier.json", "head.safetensors", "README.md"}


FIELDS = list(MANIFEST.to_json())
INNER = [f"backbone.{name}" for name in MANIFEST.backbone] + [f"head.{name}" for name in MANIFEST.to_json()["head"]]


@pytest.mark.parametrize("field", FIELDS + INNER)
def test_a_missing_field_is_named(folder, field):
    edit(folder, field, delete=True)
    text = refusal(folder)
    assert field.rpartition(".")[0] in text
    assert field.rpartition(".")[2] in text


@pytest.mark.parametrize("field", ["extra", "head.extra", "backbone.trust_remote_code"])
def test_an_unknown_field_is_named(folder, field):
    edit(folder, field, True)
    assert field.partition(".")[0] in refusal(folder)


NO_UNITS = {"kind": "mlp", "hidden_size": 8, "units": 0, "dropout": 0}
TOO_LARGE = {"kind": "mlp", "hidden_size": 2**20, "units": 2**20, "dropout": 0}  # a small file that asks for 4 TiB

WRONG: dict[str, list[Any]] = {
    "backbone": [None, [], "some/backbone", {}],
    "backbone.name": [None, 3, ["x"]],
    "backbone.revision": [3, {}],
    "backbone.family": [None, "llava", ["qwen2_vl"], {}],
    "backbone.fingerprint": [None, "", "0f", "0F" * 32, "0f" * 32 + "\n", 7],
    "backbone.dtype": [None, "float16", "int8", 16, ["float32"]],
    "backbone.quantization": [4, "", "4", "nf4", True, ["4bit"]],
    "backbone.finetuned": [None, 0, 1, "false"],
    "backbone.adapter": [None, 0, 1, "true", "adapter"],
    "tap": [None, 3, "", "mean", "mean:0", "max:-1", ["mean", -1]],
    "pixel_limits": [None, 5, [1], [1, 2, 3], [0, 5], [-1, 5], [1.5, 5], ["1", "5"], [True, 5], [9, 5], [1, 10**30]],
    "prompt": [None, 3, []],
    "head": [None, [], "mlp", {}, NO_UNITS, TOO_LARGE],
    "head.kind": [None, "forest", ["mlp"], {}],
    "head.hidden_size": [None, 0, -1, 8.0, "8", True, 10**12],
    "head.units": [None, -1, 4.0, "4", True, 10**12],
    "head.dropout": [None, 1, -0.1, "0.1", True],
    "label_names": [None, "ab", ["a"], ["a", "b", "c"], ["a", 1], {"0": "a", "1": "b"}],
    "temperature": [None, 0, -1, "1", True, 1e9, float("nan"), float("inf")],
    "isotonic": [
        [],
        {},
        [[0.1], [0.2]],
        {"in": [], "out": []},
        {"in": [0.1, 0.2], "out": [0.3]},
        {"in": [0.2, 0.1], "out": [0.3, 0.4]},
        {"in": [0.1, 0.1], "out": [0.3, 0.4]},
        {"in": [0.1, 0.2], "out": [0.4, 0.3]},
        {"in": [0.1, 1.1], "out": [0.3, 0.4]},
        {"in": [0.1, 0.2], "out": [-0.1, 0.4]},
        {"in": [0.1, "0.2"], "out": [0.3, 0.4]},
        {"in": [0.1, float("nan")], "out": [0.3, 0.4]},
        {"in": 0.1, "out": 0.3},
        {"in": [0.1], "out": [0.2], "more": []},
        {"in": [n / 2000 for n in range(1001)], "out": [0.5] * 1001},
    ],
    "threshold": [None, -0.1, 1.1, "0.5", True, float("nan")],
    "abstention": [0.5, [0.5], [0.6, 0.4], [-0.1, 0.5], [0.5, 1.1], ["0.4", "0.6"], [float("nan"), 0.5], {}],
    "training": [None, [], "probe"],
    "versions": [None, [], {"torch": 2}],
    "format_version": [None, 0, 2, "1", 1.0, True, [1], {"a\nb": "c" * 10_000}],
}


def test_every_field_is_tried_with_wrong_values():
    assert set(WRONG) == {*FIELDS, *INNER}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_a_wrong_value_is_named(folder, field, value):
    edit(folder, field, value)
    text = refusal(folder)
    assert field in text
    assert len(text) < 1000


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format_version": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut", "list", "null", "no UTF-8", "deep", "long number"],
)
def test_a_malformed_manifest_is_refused(folder, content):
    (folder / "classifier.json").write_bytes(content)
    refusal(folder)


def test_a_folder_without_a_classifier_is_named(tmp_path):
    assert "no classifier.json in it" in refusal(tmp_path)
    assert "no classifier.json in it" in refusal(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    refusal(tmp_path / "file")
    (tmp_path / "folder" / "classifier.json").mkdir(parents=True)
    refusal(tmp_path / "folder")


def load(folder: Path, backbone) -> str:
    with pytest.raises(ArtifactError) as caught:
        Classifier.load(folder, backbone=backbone)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_damaged_weights_are_refused(saved, tiny_backbone):
    path = saved / "head.safetensors"
    weights, content = load_file(path), path.read_bytes()
    for left in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:left])
        assert "missing or damaged" in load(saved, tiny_backbone)
    path.unlink()
    assert "missing or damaged" in load(saved, tiny_backbone)
    save_file({**weights, "0.weight": torch.zeros(512, 64)}, path)
    assert "0.weight has shape (512, 64), this classifier needs (512, 128)" in load(saved, tiny_backbone)
    save_file({**weights, "3.bias": torch.tensor([0.0, torch.nan])}, path)
    assert "3.bias holds NaN" in load(saved, tiny_backbone)
    save_file({**weights, "more": torch.zeros(1)}, path)
    assert "'more'" in load(saved, tiny_backbone)
    del weights["0.bias"]
    save_file(weights, path)
    assert "0.bias" in load(saved, tiny_backbone)


def test_a_pickle_in_place_of_the_weights_is_not_opened(saved, tiny_backbone, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"0.weight": Trap()}, saved / "head.safetensors")
    assert "missing or damaged" in load(saved, tiny_backbone)
    assert not (tmp_path / "ran").exists()


class TestReplacing:
    """Saving over what is there."""

    def test_a_new_folder_with_its_parents(self, tiny_classifier, tmp_path):
        assert tiny_classifier.save(tmp_path / "a" / "b") == tmp_path / "a" / "b"
        assert read_manifest(tmp_path / "a" / "b").tap == tiny_classifier.tap

    def test_an_empty_folder(self, tiny_classifier, tmp_path):
        (tmp_path / "empty").mkdir()
        read_manifest(tiny_classifier.save(tmp_path / "empty"))

    def test_an_older_classifier_and_all_that_belongs_to_it(self, tiny_classifier, folder):
        for name in ("evaluation.json", "report.html"):
            (folder / name).write_text("of the older one")
        (folder / "backbone").mkdir()
        tiny_classifier.save(folder)
        assert read_manifest(folder).backbone["name"] == "builtin:tiny"
        assert {path.name for path in folder.iterdir()} == {"classifier.json", "head.safetensors", "README.md"}
        assert list(folder.parent.iterdir()) == [folder]

    @pytest.mark.parametrize("kind", ["folder", "file", "files beside a classifier"])
    def test_something_else_is_not_overwritten(self, tiny_classifier, folder, kind):
        place = folder if kind == "files beside a classifier" else folder.parent / "mine"
        if kind == "file":
            place.write_text("mine")
        else:
            place.mkdir(exist_ok=True)
            (place / "thesis.txt").write_text("mine")
        with pytest.raises(ArtifactError, match=r"give a new") as caught:
            tiny_classifier.save(place)
        assert "\n" not in str(caught.value)
        assert (place if kind == "file" else place / "thesis.txt").read_text() == "mine"
        assert read_manifest(folder) == MANIFEST

    def test_what_a_link_points_to_is_replaced(self, tiny_classifier, folder):
        link = folder.parent / "link"
        link.symlink_to(folder)
        tiny_classifier.save(link)
        assert link.is_symlink()
        assert read_manifest(folder).backbone["name"] == "builtin:tiny"
        assert sorted(folder.parent.iterdir()) == [link, folder]

    @pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError, OSError(errno.ENOSPC, "No space left on device")])
    def test_an_interrupted_save_leaves_the_old_one(self, tiny_classifier, folder, monkeypatch, stop):
        def interrupted(*_args, **_options):
            raise stop

        monkeypatch.setattr(artifact, "save_file", interrupted)
        with pytest.raises(ArtifactError if isinstance(stop, OSError) else stop):
            tiny_classifier.save(folder)
        assert read_manifest(folder) == MANIFEST
        assert list(folder.parent.iterdir()) == [folder]

    def test_a_failure_in_the_last_step_leaves_the_old_one(self, tiny_classifier, folder, monkeypatch):
        def failing(_one, _other):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(whole, "exchange", failing)
        with pytest.raises(ArtifactError, match="cannot be written"):
            tiny_classifier.save(folder)
        assert read_manifest(folder) == MANIFEST
        assert list(folder.parent.iterdir()) == [folder]

    @pytest.mark.parametrize(
        ("moment", "in_one_step"),
        [*((moment, True) for moment in crash_points.MOMENTS[1:]), ("before the rename", False)],
    )
    def test_a_kill_at_any_moment_leaves_one_complete_version(
        self, tiny_classifier, tmp_path, fresh, moment, in_one_step
    ):
        folder, barrier = tiny_classifier.save(tmp_path / "saved"), tmp_path / "barrier"
        fresh.start(SAVE, folder, moment, barrier, int(in_one_step))
        crash_points.kill_at(barrier)
        assert fresh.wait().returncode == -signal.SIGKILL
        is_new = moment == "after the rename"
        assert Classifier.load(folder, backbone=tiny_classifier.backbone).threshold == (0.9 if is_new else 0.5)
        tiny_classifier.save(folder)
        assert Classifier.load(folder, backbone=tiny_classifier.backbone).threshold == 0.5
        assert sorted(path.name for path in tmp_path.iterdir()) == ["barrier", "saved"]  # nothing is left of the kill

    def test_a_kill_between_two_renames_is_no_free_place_either(self, folder, tmp_path):
        folder.rename(tmp_path / f".saved.{'0' * 32}.old")  # as a system that cannot exchange names may leave it
        (folder.parent / f".saved.{'1' * 32}.partial").mkdir()
        check_replaceable(folder)
        assert read_manifest(folder) == MANIFEST

    def test_a_roundabout_path_is_no_free_place_either(self, folder):
        roundabout = folder.parent / "not there yet" / ".." / folder.name
        with pytest.raises(ArtifactError, match="holds a saved classifier"):
            check_replaceable(roundabout, overwrite=False)
        (folder / "notes.txt").write_text("mine")
        with pytest.raises(ArtifactError, match=r"holds 'notes\.txt' beside"):
            check_replaceable(roundabout)

    def test_a_link_to_itself_is_no_place(self, tmp_path):
        (tmp_path / "loop").symlink_to("loop")
        with pytest.raises(ArtifactError, match="leads back to itself"):
            check_replaceable(tmp_path / "loop")

    def test_a_place_that_cannot_be_written_is_named(self, tiny_classifier, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ArtifactError, match=r"cannot be written .* give a folder") as caught:
            tiny_classifier.save(tmp_path / "file" / "below")
        assert "\n" not in str(caught.value)

    def test_the_folder_is_whole_or_not_there(self, tmp_path):
        with replacing(tmp_path / "new") as partial:
            (partial / "classifier.json").write_text("{}")
            assert not (tmp_path / "new").exists()
            assert partial.parent == tmp_path
        assert (tmp_path / "new" / "classifier.json").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("threshold", 2.0), ("temperature", 0.0), ("abstention", (0.7, 0.3)), ("label_names", ("a",))]
)
def test_what_could_not_be_read_back_is_not_saved(tiny_classifier, folder, name, value):
    classifier = copy.copy(tiny_classifier)
    setattr(classifier, name, value)
    with pytest.raises(ArtifactError, match=f"not saved: .* has {name} = "):
        classifier.save(folder)
    assert read_manifest(folder) == MANIFEST


def test_a_lone_surrogate_survives(tiny_classifier, tmp_path):
    classifier = copy.copy(tiny_classifier)
    classifier.label_names = ("no\ud800", "是")
    classifier.save(tmp_path / "saved")
    assert read_manifest(tmp_path / "saved").label_names == ("no\ud800", "是")


class TestModelCard:
    """`README.md` of the folder."""

    def card(self, folder: Path, **changes: Any) -> str:
        manifest = Manifest(**{name: getattr(MANIFEST, name) for name in MANIFEST.__slots__} | changes)
        write_manifest(folder, manifest, {})
        return (folder / "README.md").read_text(encoding="utf-8")

    def test_it_says_what_it_is(self, folder):
        card = self.card(folder)
        assert 'Class 1 is "yes", class 0 is "no".' in card
        for line in ("| tap | last:3 |", "| threshold | 0.4 |", "| temperature | 1.5 |", "| rows | 12 |"):
            assert line in card.splitlines()
        assert "Made with torch 2.13." in card
        assert "options" not in card  # objects stay in classifier.json

    def test_it_says_what_is_known_of_the_decisions(self, folder):
        record = {
            "calibration": {
                "rows": 40,
                "method": "platt",
                "ece_before": 0.25,
                "ece_after": 0.05,
                "log_loss_before": 1.5,
                "log_loss_after": 0.625,
            },
            "threshold": {"objective": "cost=5:1", "threshold": 0.2},
            "abstention": {
                "decided": 0.75,
                "rows": 80,
                "error_of_all": 0.03,
                "error_of_decided": 0.04,
                "guarantee": "in plain words",
            },
        }
        lines = self.card(folder, training=record).splitlines()
        assert "| objective | cost=5:1 |" in lines
        told = (
            "platt on 40 rows, measured where it was not fitted: log loss 1.5000 before, 0.6250 after; "
            "ECE 0.2500 before, 0.0500 after"
        )
        assert f"| calibration | {told} |" in lines
        assert "| decided | 75.0% of 80 held-out rows; wrong: 3.0% of all, 4.0% of decided |" in lines
        assert "| guarantee | in plain words |" in lines

    @pytest.mark.parametrize("entry", [{}, {"decided": "all", "rows": 2}, {"decided": None}, {"decided": [1]}, []])
    def test_a_strange_record_is_left_out(self, folder, entry):
        card = self.card(folder, training={"abstention": entry, "threshold": entry, "calibration": entry})
        assert not re.search("decided|guarantee|objective|calibration", card)

    def test_its_code_runs(self, saved, tiny_classifier, scene_rows, monkeypatch):
        (code,) = re.findall(r"```python\n(.*?)```", (saved / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        scene_rows[0].image.save(saved / "photo.png")
        code = code.replace("path/to/this/folder", str(saved)).replace("photo.jpg", str(saved / "photo.png"))
        assert code.count(str(saved)) == 2
        monkeypatch.setattr(Classifier, "load", lambda _folder: tiny_classifier)
        exec(compile(code, "README.md", "exec"), {})

    HOSTILE = (
        "<script>alert(1)</script>",
        "a | b | c",
        "two\nlines",
        "\n\n# A heading\n\n",
        "`code` ```\nfence",
        "**bold** _slanted_ ~~gone~~",
        "[link](http://example.org) ![picture](x)",
        "&lt;b&gt; \\| \\",
        "</td></table>\u2028\r\x00\x1b[31m",
        "$x$ <!-- comment -->",
    )

    @pytest.mark.parametrize("name", HOSTILE)
    def test_names_stay_text(self, folder, name):
        card = self.card(
            folder,
            label_names=(name, name),
            backbone={**MANIFEST.backbone, "name": name},
            training={name: name},
            versions={name: name},
        )
        plain = self.card(folder)
        assert len(card.splitlines()) == len(plain.splitlines()) - 1  # one line of training instead of two
        unescaped = re.sub(r"\\[\\`*_\[\]<>&|~$]", "", card).replace("```", "")
        assert not re.search(r"[<>`*_\[\]~$]", unescaped.split("Use it:")[0])
        for line in unescaped.splitlines():
            assert line.count("|") == (3 if line.startswith("|") else 0)
        assert all(letter.isprintable() or letter == "\n" for letter in card)

    @pytest.mark.parametrize("name", HOSTILE)
    def test_a_reader_of_markdown_shows_them_as_they_are(self, folder, name):
        markdown_it = pytest.importorskip("markdown_it")
        card = self.card(folder, label_names=("no", name), training={"note": name})
        tokens = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(card)
        assert sum(token.type == "heading_open" for token in tokens) == 1
        shown = " ".join("".join(letter if letter.isprintable() else " " for letter in name).split())
        texts = [
            "".join(part.content for part in token.children if part.type in ("text", "text_special"))
            for token in tokens
            if token.type == "inline"
        ]
        assert any(f'Class 1 is "{shown}"' in text for text in texts)
        for token in tokens:
            assert token.type not in ("html_block",)
            for part in token.children or []:
                assert part.type in ("text", "text_special", "softbreak"), part
