"""`export --to transformers`: transformers' own class gives the classifier's probabilities, from the folder alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from qwen_vl_classifier import Backbone, Classifier, export
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.exporting.export_manifest import read_export
from tests.exporting.library import client_of, reference
from tests.exporting.linear import linear_classifier

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def backbone(nano_folder):
    return Backbone.load(nano_folder("qwen3_5"), device="cpu", dtype="float32", max_pixels=50_000)


@pytest.fixture(scope="module")
def unbiased(backbone):
    """A classifier whose head has no bias, as that of zero-shot."""
    classifier = linear_classifier(backbone, "last:-1", label_names=("no", "yes"))
    classifier.head.bias.data.zero_()
    return classifier


@pytest.fixture(scope="module")
def exported(unbiased, tmp_path_factory):
    return export(unbiased, tmp_path_factory.mktemp("exported") / "out", "transformers")


def test_rows_padded_in_a_batch_have_the_classifiers_probabilities(exported, unbiased, monkeypatch):
    client = client_of(exported, monkeypatch)
    rows, examples, probabilities = reference(exported)
    expected = unbiased.predict_proba(examples)[:, 1]
    assert np.abs(expected - probabilities).max() < 1e-6
    assert np.ptp(expected) > 0.1  # probabilities that hardly differ would show no mistake
    assert np.abs(np.array(client.probabilities(rows)) - expected).max() < TOLERANCE
    assert np.abs(np.array(client.probabilities(rows[4:6])) - expected[4:6]).max() < TOLERANCE
    model, processor, _ = client.loaded()
    assert len({len(processor.tokenizer(text)["input_ids"]) for _, text in rows}) > 3  # so the batch was padded
    processor.tokenizer.padding_side = "left"
    assert np.abs(np.array(client.probabilities(rows)) - expected).max() < TOLERANCE
    # The same with a mistake: without the temperature, and where padding is not told from tokens.
    model.score.weight.data.mul_(unbiased.temperature)
    assert np.abs(np.array(client.probabilities(rows)) - expected).max() > 100 * TOLERANCE
    model.score.weight.data.div_(unbiased.temperature)
    processor.tokenizer.padding_side = "right"
    model.config.text_config.pad_token_id += 1
    assert np.abs(np.array(client.probabilities(rows)) - expected).max() > 100 * TOLERANCE


def test_the_class_loads_every_weight_and_names_the_classes(exported):
    model, report = AutoModelForSequenceClassification.from_pretrained(exported, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(model).__name__ == "Qwen3_5ForSequenceClassification"
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert model.config.get_text_config().pad_token_id == AutoTokenizer.from_pretrained(exported).pad_token_id


def test_a_bias_is_refused_or_left_to_the_client(backbone, tmp_path, monkeypatch):
    classifier = linear_classifier(backbone, "last:-1")
    with pytest.raises(ConfigError, match=r"has a bias.*leave_to_client=True.*margin_offset.*sentence-transformers"):
        export(classifier, tmp_path / "out", "transformers")
    folder = export(classifier, tmp_path / "out", "transformers", leave_to_client=True)
    rules = read_export(folder).left_to_client
    assert rules["margin_offset"] == pytest.approx(-0.5 / 0.37)
    assert json.loads((folder / "decision.json").read_text()) == rules
    client = client_of(folder, monkeypatch)
    rows, examples, probabilities = reference(folder)
    expected = classifier.predict_proba(examples)[:, 1]
    assert np.abs(expected - probabilities).max() < 1e-6
    assert np.abs(np.array(client.probabilities(rows)) - expected).max() < TOLERANCE
    client.loaded()[2]["margin_offset"] = 0.0
    assert np.abs(np.array(client.probabilities(rows)) - expected).max() > 100 * TOLERANCE


def test_a_bias_that_outweighs_the_rest_keeps_its_digits(backbone, mixed_examples, tmp_path, monkeypatch):
    classifier = linear_classifier(backbone, "last:-1")
    features = backbone.encode(mixed_examples, [classifier.tap])[:, 0]
    with torch.no_grad():  # as folding a standardisation leaves a head
        classifier.head.weight[1] += torch.from_numpy(features[0])
        classifier.head.bias[1] -= float(np.median(features @ features[0]))
    folder = export(classifier, tmp_path / "out", "transformers", leave_to_client=True)
    assert read_export(folder).left_to_client["margin_offset"] < -40  # a probability without it would round to 1
    rows, _, expected = reference(folder)
    assert ((expected > 1e-3) & (expected < 1 - 1e-3)).any()
    answers = client_of(folder, monkeypatch).probabilities(rows)
    assert np.abs(np.array(answers) - expected).max() < read_export(folder).tolerance


def test_zero_shot_needs_nothing_of_the_client(backbone, tmp_path):
    folder = export(Classifier.zero_shot(backbone), tmp_path / "out", "transformers")
    assert read_export(folder).left_to_client["margin_offset"] == 0


def test_what_the_class_cannot_compute_is_refused(backbone, nano_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"the tap is mean:-1.*reads the last token.*to='sentence-transformers'"):
        export(linear_classifier(backbone, "mean:-1"), tmp_path / "out", "transformers")
    other = Backbone.load(nano_folder("qwen2_5_vl"), device="cpu", dtype="float32")
    with pytest.raises(ConfigError, match=r"Qwen2\.5-VL.*no class"):
        export(linear_classifier(other, "last:-1"), tmp_path / "out", "transformers")
    template = backbone.processor.chat_template.rstrip() + "<|endoftext|>"
    padded = Backbone.load(nano_folder("qwen3_5"), device="cpu", dtype="float32", chat_template=template)
    with pytest.raises(ConfigError, match="ends in the token that pads"):
        export(linear_classifier(padded, "last:-1"), tmp_path / "out", "transformers")
    assert not (tmp_path / "out").exists()


def test_the_client_refuses_texts_that_would_be_read_in_another_way(exported, monkeypatch):
    client = client_of(exported, monkeypatch)
    for text in ("a <|image_pad|> in the text", "\ra text without picture that begins with a line"):
        with pytest.raises(ValueError, match="would not read this text"):
            client.probabilities([([], text)])
