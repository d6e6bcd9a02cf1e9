"""The folder for vLLM: what it holds, and that an engine which reads it alone gives the same probabilities."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open

from qwen_vl_classifier import Backbone, Classifier, Example, Tap, export
from qwen_vl_classifier.backbone.adapters import add_adapter
from qwen_vl_classifier.exporting import checkpoint
from qwen_vl_classifier.exporting.export_manifest import read_export
from tests.backbone.adapted import train
from tests.exporting.engine_by_files import EngineByFiles
from tests.exporting.linear import linear_classifier
from tests.nano import HYBRID, make_checkpoint

TAPS = {
    "qwen2_vl": "mean:-1",
    "qwen2_5_vl": "last:2:normed",
    "qwen3_vl": "mean:3:normed",
    "qwen3_5": "last:-1",
    "qwen3_vl_moe": "last:3:normed",
    "qwen3_5_moe": "mean:-1",
}
ARCHITECTURES = {
    "qwen2_vl": "Qwen2VLForSequenceClassification",
    "qwen2_5_vl": "Qwen2_5_VLForSequenceClassification",
    "qwen3_vl": "Qwen3VLForSequenceClassification",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForSequenceClassification",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
}
HEADS = {
    "qwen2_vl": "language_model.score.",
    "qwen2_5_vl": "language_model.score.",
    "qwen3_vl": "score.",
    "qwen3_5": "score.",
    "qwen3_vl_moe": "score.",
    "qwen3_5_moe": "score.",
}
DECODERS = {
    "qwen2_vl": "model.layers.",
    "qwen2_5_vl": "model.layers.",
    "qwen3_vl": "model.language_model.layers.",
    "qwen3_5": "model.language_model.layers.",
    "qwen3_vl_moe": "model.language_model.layers.",
    "qwen3_5_moe": "model.language_model.layers.",
}
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=TAPS)
def exported(request, nano_folder, tmp_path_factory):
    """A family, a classifier on its random checkpoint, and the folder that it was exported to."""
    family = request.param
    backbone = Backbone.load(nano_folder(family), device="cpu", dtype="float32", max_pixels=50_000)
    classifier = linear_classifier(backbone, TAPS[family], label_names=("no", "yes"))
    return family, classifier, export(classifier, tmp_path_factory.mktemp("exported") / family)


def pooling_of(folder):
    (command,) = read_export(folder).serve
    return "MEAN" if '"MEAN"' in command else "LAST"


def weights_of(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    return found


def test_the_files_alone_give_the_same_probabilities(exported):
    _, classifier, folder = exported
    rows = read_export(folder).examples
    examples = [Example([folder / name for name in row.images] or None, row.text) for row in rows]
    expected = classifier.predict_proba(examples)[:, 1]
    assert np.abs(expected - [row.probability for row in rows]).max() < 1e-6
    engine = EngineByFiles(folder, pooling_of(folder))
    assert np.abs(engine.answers(rows, folder) - expected).max() < TOLERANCE
    assert [engine.inputs([{"type": "text", "text": rows[5].text}])["input_ids"].shape[1]] == [rows[5].tokens]
    assert np.ptp(expected) > 0.1  # probabilities that hardly differ would show no mistake
    # The same with a mistake: the other pooling, and no temperature.
    other = EngineByFiles(folder, {"MEAN": "LAST", "LAST": "MEAN"}[pooling_of(folder)])
    assert np.abs(other.answers(rows, folder) - expected).max() > 100 * TOLERANCE
    engine.weight, engine.bias = engine.weight * classifier.temperature, engine.bias * classifier.temperature
    assert np.abs(engine.answers(rows, folder) - expected).max() > 100 * TOLERANCE


def test_configuration_and_weights_are_as_vllm_knows_the_family(exported):
    family, classifier, folder = exported
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [ARCHITECTURES[family]]
    assert config["id2label"] == {"0": "no", "1": "yes"}
    assert config["label2id"] == {"no": 0, "yes": 1}
    text = config.get("text_config", config)
    depth = 4 if classifier.tap.layer == -1 else classifier.tap.layer
    assert text["num_hidden_layers"] == depth
    assert len(text.get("layer_types") or range(depth)) == depth
    weights = weights_of(folder)
    assert weights[f"{HEADS[family]}weight"].shape == (2, 64)
    assert weights[f"{HEADS[family]}bias"].shape == (2,)
    layers = {int(name.removeprefix(DECODERS[family]).split(".")[0]) for name in weights if DECODERS[family] in name}
    assert layers == set(range(depth))
    assert not [name for name in weights if "lm_head" in name or "mtp" in name]


def test_prompt_and_picture_settings_are_the_classifiers(exported):
    family, classifier, folder = exported
    least, most = classifier.backbone.pixel_limits
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert settings["size"] == {"shortest_edge": least, "longest_edge": most}
    assert (settings["min_pixels"], settings["max_pixels"]) == (least, most)
    assert most == 50_000
    tokeniser = json.loads((folder / "tokenizer_config.json").read_text())
    assert "chat_template" not in tokeniser
    assert tokeniser["tokenizer_class"] == ("Qwen3_5Tokenizer" if family in HYBRID else "Qwen2Tokenizer")
    assert not (folder / "chat_template.json").exists()
    assert (folder / "chat_template.jinja").read_text().endswith(classifier.backbone.processor.chat_template)


def test_the_serving_command_names_what_must_not_be_left_to_chance(exported):
    family, classifier, folder = exported
    (command,) = read_export(folder).serve
    for words in ("--runner pooling", "--convert classify", "--dtype float32", f'"{classifier.tap.pooling.upper()}"'):
        assert words in command
    # Needed by hybrid models with the mean alone.
    assert ("--no-enable-chunked-prefill" in command) is (family in HYBRID and classifier.tap.pooling == "mean")


def test_hybrid_models_read_the_mean_of_whole_prompts(tmp_path):
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    source = make_checkpoint("qwen3_5", tmp_path / "source", text_config={"num_hidden_layers": 3, "layer_types": kinds})
    backbone = Backbone.load(source, device="cpu", dtype="float32")
    folder = export(linear_classifier(backbone, "mean:2:normed"), tmp_path / "out", max_model_len=4096)
    manifest = read_export(folder)
    assert "--no-enable-chunked-prefill" in manifest.serve[0]
    assert "--max-model-len 4096" in manifest.serve[0]
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["layer_types"] == kinds[:2]
    rows = manifest.examples[-3:]
    answers = EngineByFiles(folder, "MEAN").answers(rows, folder)
    assert np.abs(answers - [row.probability for row in rows]).max() < TOLERANCE


def test_zero_shot_is_two_rows_of_the_language_head(tiny_backbone, tmp_path):
    classifier = Classifier.zero_shot(tiny_backbone)
    folder = export(classifier, tmp_path / "out")
    assert torch.equal(weights_of(folder)["language_model.score.weight"], classifier.head.weight)
    rows = read_export(folder).examples[-3:]
    answers = EngineByFiles(folder, "LAST").answers(rows, folder)
    assert np.abs(answers - [row.probability for row in rows]).max() < TOLERANCE


def test_adapters_are_merged_and_trained_weights_are_used(nano_folder, tmp_path):
    backbone = Backbone.load(nano_folder("qwen2_5_vl"), device="cpu", dtype="float32")
    plain = export(linear_classifier(backbone, "mean:-1"), tmp_path / "plain")
    add_adapter(backbone, towers="llm+vision", tap=Tap(-1, "mean"), rank=4, alpha=8.0)
    backbone.model.language_model.norm.weight.data.mul_(1.5)
    backbone.mark_changed()
    train(backbone)
    classifier = linear_classifier(backbone, "mean:-1")
    folder = export(classifier, tmp_path / "out")
    rows = read_export(folder).examples[-3:]
    expected = np.array([row.probability for row in rows])
    assert np.abs(EngineByFiles(folder, "MEAN").answers(rows, folder) - expected).max() < TOLERANCE
    assert np.abs(EngineByFiles(plain, "MEAN").answers(rows, plain) - expected).max() > 100 * TOLERANCE
    assert weights_of(folder).keys() == weights_of(plain).keys()
    assert backbone.adapter is not None  # the classifier stays as it is


@pytest.mark.soak
@pytest.mark.parametrize("family", TAPS)
@pytest.mark.parametrize("adapted", [True, False])
def test_fine_tuned_classifiers_are_exported_from_what_they_saved(nano_folder, tmp_path, family, adapted):
    backbone = Backbone.load(nano_folder(family), device="cpu", dtype="float32")
    tap = Tap.parse(TAPS[family])
    if adapted:
        add_adapter(backbone, towers="llm+vision", tap=tap, rank=4, alpha=8.0)
        train(backbone)
    else:
        for number, weight in enumerate(backbone.model.parameters()):
            weight.data.mul_(1 + 0.1 * (number % 3))
        backbone.mark_changed()
    saved = linear_classifier(backbone, TAPS[family]).save(tmp_path / "saved")
    plain = linear_classifier(Backbone.load(nano_folder(family), device="cpu", dtype="float32"), TAPS[family])
    classifier = Classifier.load(saved, device="cpu")
    folder = export(classifier, tmp_path / "out")
    rows = read_export(folder).examples
    examples = [Example([folder / name for name in row.images] or None, row.text) for row in rows]
    answers = EngineByFiles(folder, pooling_of(folder)).answers(rows, folder)
    assert np.abs(answers - classifier.predict_proba(examples)[:, 1]).max() < TOLERANCE
    assert np.abs(answers - plain.predict_proba(examples)[:, 1]).max() > 100 * TOLERANCE


def test_large_models_are_written_in_shards(nano_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_SHARD_BYTES", 300_000)
    backbone = Backbone.load(nano_folder("qwen2_5_vl"), device="cpu", dtype="float32")
    folder = export(linear_classifier(backbone, "mean:-1"), tmp_path / "out")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {path.name for path in folder.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files
    assert len(files) > 3
    assert index["weight_map"].keys() == weights_of(folder).keys()
    rows = read_export(folder).examples[-3:]
    answers = EngineByFiles(folder, "MEAN").answers(rows, folder)
    assert np.abs(answers - [row.probability for row in rows]).max() < TOLERANCE


def test_settings_of_another_head_do_not_come_along(nano_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(nano_folder("qwen3_vl"), source)
    config = json.loads((source / "config.json").read_text())
    foreign = {"num_labels": 1, "classifier_from_token": ["no", "yes"], "method": "from_2_way_softmax"}
    config["text_config"] |= foreign
    (source / "config.json").write_text(json.dumps(config | foreign))
    (source / "modules.json").write_text("[]")  # vLLM would take a pooling and no softmax from it
    pictures = json.loads((source / "preprocessor_config.json").read_text())
    (source / "processor_config.json").write_text(json.dumps({"image_processor": pictures, "chat_template": "foreign"}))
    backbone = Backbone.load(source, device="cpu", dtype="float32", max_pixels=10_000_000)
    folder = export(linear_classifier(backbone, "mean:-1"), tmp_path / "out")
    written = json.loads((folder / "config.json").read_text())
    assert not foreign.keys() & written["text_config"].keys()
    assert not {"classifier_from_token", "method"} & written.keys()
    assert written["num_labels"] == 2
    assert not (folder / "modules.json").exists()
    processor = json.loads((folder / "processor_config.json").read_text())
    assert processor.keys() == {"image_processor"}
    assert processor["image_processor"]["size"]["longest_edge"] == 10_000_000
    # 10 million pixels are 9765 squares of 32 pixels, one token each, and there is room for a text beside them.
    assert "--max-model-len 11813" in read_export(folder).serve[0]


def test_what_is_written_in_bfloat16_stays_bfloat16(nano_folder, tmp_path):
    backbone = Backbone.load(nano_folder("qwen2_5_vl"), device="cpu", dtype="bfloat16")
    folder = export(linear_classifier(backbone, "mean:-1"), tmp_path / "out")
    weights = weights_of(folder)
    head = {weights.pop(name).dtype for name in list(weights) if "score" in name}
    assert head == {torch.float32}
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert "--dtype bfloat16" in read_export(folder).serve[0]


def test_transformers_takes_nothing_from_our_decision_file(exported):
    config = pytest.importorskip("transformers.decision").DecisionConfig
    _, _, folder = exported
    assert config.from_pretrained(folder) == config()
