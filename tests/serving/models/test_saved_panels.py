"""Saved panels among classifiers that are served: they share passes, change as a whole, and go as a whole."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np

from qwen_vl_classifier import Backbone, Classifier, Example, Panel, ServeConfig, Tap
from qwen_vl_classifier.errors import ArtifactError
from qwen_vl_classifier.serving.models.loading_models import load_models, version_of
from qwen_vl_classifier.serving.models.model_set import MOST_COUNTED, ModelSet, Version
from qwen_vl_classifier.serving.models.panels import ServedPanel, answer_of
from tests.panels import CLASSES, LABELS, make_panel

CONFIG = ServeConfig(device="cpu")
EXAMPLE = Example(None, "words")


def answers(served: ModelSet, name: str) -> list[float]:
    found = served.panel_of(name).score_example(EXAMPLE, [name])
    answer = answer_of(name, served.saved_panels[name], found)
    return [one.probability for one in answer.labels.values()]


def test_a_panel_comes_changes_and_goes_as_a_whole(
    tmp_path: Path, tiny_backbone: Backbone, tiny_classifier: Classifier
) -> None:
    shallow = copy.copy(tiny_classifier)
    shallow.tap = Tap(1, "mean")
    parts, animals = make_panel(tiny_backbone), make_panel(tiny_backbone, CLASSES, one_of=True, temperature=1.7)
    first, _ = load_models(ModelSet(), {"one": shallow.save(tmp_path / "one")}, CONFIG)
    folders = {"parts": parts.save(tmp_path / "parts"), "animals": animals.save(tmp_path / "animals")}
    second, failures = load_models(first, folders, CONFIG)
    assert not failures
    assert second.names == ["one", "parts", "animals"]
    labels = [f"parts/{name}" for name in LABELS]
    assert list(second.models) == ["one", *labels, *(f"animals/{name}" for name in CLASSES)]
    assert len(second.panels) == len({id(model.backbone) for model in second.models.values()}) == 1
    np.testing.assert_allclose(answers(second, "parts"), parts.predict_proba([EXAMPLE])[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(answers(second, "animals"), animals.predict_proba([EXAMPLE])[0], rtol=0, atol=1e-6)
    assert second.version_of("parts/dirty") == second.versions["parts"]

    smaller = make_panel(tiny_backbone, LABELS[:2], seed=5)
    third, _ = load_models(second, {"parts": smaller.save(tmp_path / "parts")}, CONFIG)
    assert [name for name in third.models if name.startswith("parts/")] == ["parts/defect", "parts/scratch"]
    np.testing.assert_allclose(answers(third, "parts"), smaller.predict_proba([EXAMPLE])[0], rtol=0, atol=1e-6)
    assert third.saved_panels["animals"] is second.saved_panels["animals"]
    assert third.versions["animals"] == second.versions["animals"]
    assert answers(second, "parts") != answers(third, "parts"), "who came before keeps the panel before"

    assert list(third.without("parts").models) == ["one", *(f"animals/{name}" for name in CLASSES)]
    assert third.without("one").without("animals").names == ["parts"]
    last, _ = load_models(third, {"parts": tiny_classifier.save(tmp_path / "as_one")}, CONFIG)
    assert list(last.models) == ["one", "parts", *(f"animals/{name}" for name in CLASSES)]
    assert "parts" not in last.saved_panels


def test_a_version_is_that_of_the_panel_and_of_every_label(tmp_path: Path, tiny_backbone: Backbone) -> None:
    folder = make_panel(tiny_backbone).save(tmp_path / "parts")
    before = version_of(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert version_of(tmp_path / "copy").digest == before.digest
    (folder / "README.md").write_text("other words")
    assert version_of(folder).digest == before.digest
    label = folder / "dirty" / "classifier.json"
    content = json.loads(label.read_text())
    label.write_text(json.dumps(content | {"threshold": 0.7}))
    assert version_of(folder).digest != before.digest
    (folder / "panel.json").write_text("{}")
    (failure,) = load_models(ModelSet(), {"parts": folder}, CONFIG)[1].values()
    assert isinstance(failure, ArtifactError)
    assert version_of(folder).digest != before.digest, "what is broken has a version, so that it is said once"


def test_a_panel_of_very_many_labels_has_a_bounded_number_of_counters(tiny_classifier: Classifier) -> None:
    names = [f"label {number}" for number in range(MOST_COUNTED + 5)]
    panel = Panel([tiny_classifier] * len(names), names=names)
    models = dict.fromkeys([f"many/{name}" for name in names], tiny_classifier)
    served = ModelSet([ServedPanel(models, {"many": panel})], {"many": Version("0", 0)})
    counted = {served.counted_as(name) for name in served.models}
    assert len(counted) == MOST_COUNTED + 1
    assert served.counted_as(f"many/{names[-1]}") == "many"
