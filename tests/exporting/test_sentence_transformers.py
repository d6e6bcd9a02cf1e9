"""`export --to sentence-transformers`: the modules in the folder compute the classifier's probabilities."""

from __future__ import annotations

import json

import numpy as np
import pytest
from jinja2 import TemplateError

from qwen_vl_classifier import Backbone, export
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.exporting.decide import decide
from qwen_vl_classifier.exporting.export_manifest import read_export
from tests import nano
from tests.exporting.library import CrossEncoderByFiles, client_of, processor_of, reference
from tests.exporting.linear import linear_classifier

TOLERANCE = 1e-5
TAPS = {
    "qwen2_vl": "mean:-1",
    "qwen2_5_vl": "mean:3:normed",
    "qwen3_vl": "last:2:normed",
    "qwen3_vl_moe": "mean:-1",
    "qwen3_5": "last:-1",
    "qwen3_5_moe": "mean:-1",
}
ALWAYS = ("qwen2_5_vl", "qwen3_5")


@pytest.fixture(
    scope="module",
    params=[family if family in ALWAYS else pytest.param(family, marks=pytest.mark.soak) for family in nano.FAMILIES],
)
def exported(request, nano_folder, tmp_path_factory):
    """A classifier on a family's random checkpoint, and the folder that it was exported to."""
    backbone = Backbone.load(nano_folder(request.param), device="cpu", dtype="float32", max_pixels=50_000)
    classifier = linear_classifier(backbone, TAPS[request.param], threshold=0.4, abstention=(0.3, 0.45))
    place = tmp_path_factory.mktemp("exported") / request.param
    return classifier, export(classifier, place, "sentence-transformers", leave_to_client=True)


def test_rows_padded_in_a_batch_have_the_classifiers_probabilities(exported, monkeypatch):
    classifier, folder = exported
    client = client_of(folder, monkeypatch)
    rows, examples, probabilities = reference(folder)
    expected = classifier.predict_proba(examples)
    assert np.abs(expected[:, 1] - probabilities).max() < 1e-6
    assert np.ptp(expected) > 0.1  # probabilities that hardly differ would show no mistake
    answers = client.probabilities(rows)
    assert np.abs(np.array(answers) - expected[:, 1]).max() < TOLERANCE
    decisions = [decide(answer, read_export(folder).left_to_client)["decision"] for answer in answers]
    assert decisions == [row.decision for row in read_export(folder).examples]
    model, _ = client.loaded()
    both = model.predict([({"image": pictures}, {"text": text}) for pictures, text in rows[:2]])
    assert np.abs(both - expected[:2]).max() < TOLERANCE  # class 0 first
    # The same with a mistake: the other pooling, and another head.
    model.pooling["pooling_mode"] = {"mean": "lasttoken", "lasttoken": "mean"}[model.pooling["pooling_mode"]]
    assert np.abs(np.array(client.probabilities(rows)) - expected[:, 1]).max() > 100 * TOLERANCE
    model.pooling["pooling_mode"] = {"mean": "lasttoken", "lasttoken": "mean"}[model.pooling["pooling_mode"]]
    model.weights["linear.weight"] *= classifier.temperature
    assert np.abs(np.array(client.probabilities(rows)) - expected[:, 1]).max() > 100 * TOLERANCE


def test_layers_are_cut_where_the_tap_reads(exported):
    classifier, folder = exported
    model = CrossEncoderByFiles(str(folder)).model
    layers = classifier.tap.layer if classifier.tap.layer > 0 else nano.NUM_LAYERS
    assert len(model.language_model.layers) == layers


@pytest.fixture(scope="module")
def folder(tiny_backbone, tmp_path_factory):
    place = tmp_path_factory.mktemp("exported") / "tiny"
    return export(linear_classifier(tiny_backbone, "mean:-1"), place, "sentence-transformers")


def test_a_pair_is_rendered_as_one_message_of_the_user(folder, tiny_backbone):
    processor = processor_of(folder)
    picture, text = {"type": "image"}, {"type": "text", "text": "a text"}
    one = processor.apply_chat_template([{"role": "user", "content": [picture, text]}], tokenize=False)
    pair = [{"role": "query", "content": [picture]}, {"role": "document", "content": [text]}]
    assert processor.apply_chat_template(pair, tokenize=False) == one
    assert one.endswith("<|im_start|>assistant\n")  # without being asked for
    nothing = [{"role": "query", "content": [{"type": "text", "text": ""}]}, pair[1]]
    alone = processor.apply_chat_template([{"role": "user", "content": [text]}], tokenize=False)
    assert processor.apply_chat_template(nothing, tokenize=False) == alone
    # sentence-transformers takes a text that is the address of a picture for the picture.
    mistaken = [pair[0], {"role": "document", "content": [picture]}]
    with pytest.raises(TemplateError, match="the second of a pair is a picture"):
        processor.apply_chat_template(mistaken, tokenize=False)
    prompted = [{"role": "system", "content": [text]}, *pair]  # predict(..., prompt=...)
    with pytest.raises(TemplateError, match="knows no prompt"):
        processor.apply_chat_template(prompted, tokenize=False)


def test_nothing_is_cut_off_and_pictures_are_resized_by_pillow(folder):
    reading = json.loads((folder / "sentence_bert_config.json").read_text())
    assert reading["processing_kwargs"]["text"] == {"truncation": False}
    assert reading["processor_kwargs"] == {"use_fast": False}


def test_the_command_says_how_to_ask(tiny_backbone, tmp_path, capsys):
    saved = linear_classifier(tiny_backbone, "last:-1").save(tmp_path / "saved")
    out = tmp_path / "out"
    assert main(["export", str(saved), "--to", "sentence-transformers", "--out", str(out), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"python {out}/client.py TEXT PICTURE"


def test_bfloat16_is_kept(nano_folder, tmp_path, monkeypatch):
    backbone = Backbone.load(nano_folder("qwen2_5_vl"), device="cpu", dtype="bfloat16")
    folder = export(linear_classifier(backbone, "mean:-1"), tmp_path / "out", "sentence-transformers")
    client = client_of(folder, monkeypatch)
    rows, _, probabilities = reference(folder)
    assert np.abs(np.array(client.probabilities(rows)) - probabilities).max() < read_export(folder).tolerance
    assert "bfloat16" in str(client.loaded()[0].model.dtype)
