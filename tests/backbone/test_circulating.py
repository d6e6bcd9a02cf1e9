"""Settings of checkpoints that are in circulation: taken as they are meant, or refused in clear words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier import Backbone, Classifier, Example, Tap
from qwen_vl_classifier.backbone.prompts.thinking import DEFAULT_CHAT_TEMPLATE
from qwen_vl_classifier.classifier.head import HeadSpec
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [Example(Image.new("RGB", (84, 56), "red"), "a red picture"), Example(None, "no picture")]
OWN = DEFAULT_CHAT_TEMPLATE.replace("<|im_start|>", "<|im_start|>the ", 1)


@pytest.fixture
def folder(kind_checkpoint, tmp_path) -> Path:
    return shutil.copytree(kind_checkpoint[1], tmp_path / "nano")


@pytest.fixture
def plain(nano_folder, tmp_path) -> Path:
    return shutil.copytree(nano_folder("qwen2_5_vl"), tmp_path / "nano")


def load(place: Path, **options: Any) -> Backbone:
    return Backbone.load(place, device="cpu", dtype="float32", **options)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(place: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(place)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def classifier_on(backbone: Backbone) -> Classifier:
    spec = HeadSpec("linear", backbone.hidden_size)
    return Classifier(backbone, Tap(2, "mean"), spec.build(), spec)


@pytest.mark.parametrize("name", ["Qwen2_5_VLImageProcessor", "Qwen2_5_VLImageProcessorFast", "NoSuchProcessor", None])
def test_an_image_processor_of_any_name_is_that_of_the_family(folder, name):
    wanted = load(folder)
    edit(folder / "preprocessor_config.json", image_processor_type=name)
    seen = load(folder)
    assert seen.fingerprint == wanted.fingerprint
    np.testing.assert_array_equal(seen.encode(ROWS, [Tap(2, "mean")]), wanted.encode(ROWS, [Tap(2, "mean")]))


def test_pictures_that_are_not_resized_are_refused(folder):
    edit(folder / "preprocessor_config.json", do_resize=False)
    assert "do_resize is false in its preprocessor_config.json" in refusal(folder)


def test_settings_of_pictures_within_those_of_the_processor(folder, tmp_path):
    """transformers 5 saves a processor in one file, and no `preprocessor_config.json`."""
    wanted = load(folder)
    features = wanted.encode(ROWS, [Tap(2, "mean")])
    saved = classifier_on(wanted).save(tmp_path / "saved")
    own, shared = folder / "preprocessor_config.json", folder / "processor_config.json"
    settings = json.loads(own.read_text())
    shared.write_text(json.dumps({"image_processor": settings, "processor_class": "Qwen2_5_VLProcessor"}))
    own.write_text("{}")  # transformers passes it over
    seen = load(folder)
    assert (seen.fingerprint, seen.content) == (wanted.fingerprint, wanted.content)
    own.unlink()
    seen = load(folder)
    assert (seen.fingerprint, seen.content) == (wanted.fingerprint, wanted.content)
    np.testing.assert_array_equal(seen.encode(ROWS, [Tap(2, "mean")]), features)
    loaded = Classifier.load(saved, device="cpu")
    loaded.backbone.save(tmp_path / "backbone")
    assert load(tmp_path / "backbone").pixel_limits == wanted.pixel_limits
    shared.write_text(json.dumps({"image_processor": settings | {"do_resize": False}}))
    assert "do_resize is false in its processor_config.json" in refusal(folder)
    shared.write_text(json.dumps({"processor_class": "Qwen2_5_VLProcessor"}))
    assert "no preprocessor_config.json in it" in refusal(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_mean": [0.5]},
        {"image_mean": None, "image_std": None},
        {"image_mean": ["0.5", "0.5", "0.5"]},
        {"image_std": [0, 0.5, 0.5]},
        {"image_std": [0.5, 0.5, float("nan")]},
    ],
)
def test_colours_that_cannot_be_scaled_are_refused(plain, changes):
    edit(plain / "preprocessor_config.json", **changes)
    message = refusal(plain)
    assert f"{next(iter(changes))} is " in message
    assert "in its preprocessor_config.json, expected 3 numbers" in message


@pytest.mark.parametrize("sections", [[2, 3, 4], [8], [2, 2, 2, 2], None, "233", [4, 4, 0, 0]])
def test_parts_of_a_position_that_do_not_add_up_are_refused(folder, sections):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    text = config.get("text_config", config)
    rotation = text["rope_parameters" if "rope_parameters" in text else "rope_scaling"]
    half = sum(rotation["mrope_section"])
    rotation["mrope_section"] = sections
    path.write_text(json.dumps(config))
    message = refusal(folder)
    assert "mrope_section" in message
    assert f"add up to {half}" in message


class TestChatTemplates:
    """Where none is of use, a default is; it is recorded, and a saved classifier keeps it."""

    @pytest.mark.parametrize("template", [None, "", "{% if false %}x{% endif %}", "  \n"])
    def test_one_that_renders_nothing_is_replaced_by_a_default(self, plain, tmp_path, template):
        edit(plain / "tokenizer_config.json", chat_template=template)
        backbone = load(plain)
        assert backbone.processor.chat_template == DEFAULT_CHAT_TEMPLATE
        saved = classifier_on(backbone).save(tmp_path / "saved")
        content = json.loads((saved / "classifier.json").read_text())
        assert content["prompt"] == DEFAULT_CHAT_TEMPLATE
        assert content["backbone"]["keeps_prompt"] is True
        # Kept, even if the checkpoint gets a template of its own one day.
        edit(plain / "tokenizer_config.json", chat_template=OWN)
        assert Classifier.load(saved, device="cpu").backbone.processor.chat_template == DEFAULT_CHAT_TEMPLATE

    def test_one_that_is_given_is_used_and_kept(self, plain, tmp_path):
        backbone = load(plain, chat_template=OWN)
        assert backbone.processor.chat_template == OWN
        assert backbone.fingerprint != load(plain).fingerprint
        classifier = classifier_on(backbone)
        loaded = Classifier.load(classifier.save(tmp_path / "saved"), device="cpu")
        assert loaded.backbone.processor.chat_template == OWN
        np.testing.assert_array_equal(loaded.predict_proba(ROWS), classifier.predict_proba(ROWS))
        again = Classifier.load(loaded.save(tmp_path / "again"), device="cpu")
        assert again.backbone.fingerprint == backbone.fingerprint

    def test_the_checkpoints_own_is_not_kept_apart(self, plain, tmp_path):
        saved = classifier_on(load(plain)).save(tmp_path / "saved")
        assert json.loads((saved / "classifier.json").read_text())["backbone"]["keeps_prompt"] is False

    def test_by_a_flag(self, plain, tmp_path, capsys):
        data, template = tmp_path / "rows.jsonl", tmp_path / "template.jinja"
        rows = [{"image": None, "text": f"claim {number}", "label": number % 2} for number in range(12)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = ["train", str(data), "--out", str(tmp_path / "out"), "--model", str(plain), "--heads", "linear"]
        command += ["--taps", "mean:1", "--chat-template", str(template), "--device", "cpu"]
        assert main(command) == 2
        assert f"--chat-template {template}: cannot be read" in capsys.readouterr().err
        template.write_text(OWN + " " * 1_000_000)
        assert main(command) == 2
        assert "bytes, expected at most 1,000,000" in capsys.readouterr().err
        template.write_text("{{ 'no place for the text' }}")
        assert main(command) == 2
        assert "does not place" in capsys.readouterr().err
        template.write_text(OWN)
        assert main(command) == 0
        assert Classifier.load(tmp_path / "out", device="cpu").backbone.processor.chat_template == OWN


class TestLongTexts:
    """A text that is too long is an error of its row, soon."""

    @pytest.fixture
    def data(self, tmp_path) -> Path:
        path = tmp_path / "rows.jsonl"
        texts = [f"claim {number}" for number in range(12)]
        texts[4] = "far too long " * 70_000  # just below a million characters, which readers refuse
        rows = [{"image": None, "text": text, "label": number % 2} for number, text in enumerate(texts)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def test_train_names_the_row(self, data, tmp_path, capsys):
        flags = ["--taps", "mean:1", "--heads", "linear", "--device", "cpu"]
        assert main(["train", str(data), "--out", str(tmp_path / "out"), *flags]) == 2
        message = capsys.readouterr().err
        assert "line 5: the text has more than 32,768 tokens" in message
        assert "Traceback" not in message

    def test_predict_and_score_have_a_bound_of_their_own(self, tiny_classifier, data, tmp_path, capsys, scores_here):
        saved = tiny_classifier.save(tmp_path / "saved")
        flags = ["--max-text-tokens", "3", "--device", "cpu"]
        assert main(["predict", str(saved), "-", "one two three four five six", *flags]) == 2
        assert "expected at most 3" in capsys.readouterr().err
        assert main(["predict", str(saved), "-", "one", "--max-text-tokens", "30", "--device", "cpu"]) == 0
        assert main(["score", str(saved), str(data), "--out", str(tmp_path / "out"), "--format", "jsonl"]) == 0
        (shard,) = (tmp_path / "out" / "shards").iterdir()
        lines = shard.read_text().splitlines()
        assert [number for number, line in enumerate(lines) if "text_too_large" in line] == [4]
        assert "12 rows, 1 of them with an error" in capsys.readouterr().out
