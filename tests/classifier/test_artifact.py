"""The saved folder: every field and shape is checked, and nothing is pickled."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_vl_classifier import Classifier
from qwen_vl_classifier.classifier.artifact import (
    Manifest,
    read_head_weights,
    read_manifest,
    write_manifest,
)
from qwen_vl_classifier.errors import ArtifactError
from tests.classifier.saved_folder import MANIFEST


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
    torch.testing.assert_close(read_head_weights(folder, MANIFEST.head), dict(head.state_dict()), rtol=0, atol=0)


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
