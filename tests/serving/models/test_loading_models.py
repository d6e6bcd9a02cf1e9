"""Which backbones are loaded when classifiers come and change, and that nothing of what serves is touched."""

from __future__ import annotations

import copy
import gc
import io
import re
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vl_classifier import Backbone, Classifier, Example, ServeConfig, Tap
from qwen_vl_classifier.classifier import own_backbone
from qwen_vl_classifier.errors import ArtifactError, OutOfMemoryError
from qwen_vl_classifier.serving.models import loading_models
from qwen_vl_classifier.serving.models.loading_models import load_models, version_of
from qwen_vl_classifier.serving.models.model_set import ModelSet
from tests import nano

EXAMPLE = Example(None, "words")
CONFIG = ServeConfig(device="cpu")


def with_tap(classifier: Classifier, layer: int) -> Classifier:
    other = copy.copy(classifier)
    other.tap = Tap(layer, "mean")
    return other


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """How many layers each backbone that was loaded has."""
    seen: list[int | None] = []
    load = Backbone.load.__func__  # type: ignore[attr-defined]

    def watched(cls: type[Backbone], *arguments: object, **settings: object) -> Backbone:
        backbone: Backbone = load(cls, *arguments, **settings)
        seen.append(backbone.num_layers)
        return backbone

    monkeypatch.setattr(Backbone, "load", classmethod(watched))
    return seen


def test_classifiers_are_grouped_by_backbone_and_equal_processors_are_one(
    tmp_path: Path, tiny_classifier: Classifier
) -> None:
    backbone = Backbone.load("builtin:tiny", device="cpu", dtype="float32")
    with torch.no_grad():
        backbone.model.get_parameter("language_model.norm.weight").mul_(1.5)
    backbone.mark_changed()
    tuned = Classifier(backbone, tiny_classifier.tap, tiny_classifier.head, tiny_classifier.spec)
    smaller = Backbone.load("builtin:tiny", device="cpu", dtype="float32", max_pixels=100_352)
    other = Classifier(smaller, tiny_classifier.tap, tiny_classifier.head, tiny_classifier.spec)
    saved = {"tuned": tuned, "shallow": with_tap(tiny_classifier, 1), "deep": tiny_classifier, "smaller": other}
    folders = {name: classifier.save(tmp_path / name) for name, classifier in saved.items()}
    served, failures = load_models(ModelSet(), folders, CONFIG)
    assert not failures
    groups = {frozenset(panel.classifiers): panel for panel in served.panels}
    assert groups.keys() == {frozenset({"deep", "shallow"}), frozenset({"tuned"}), frozenset({"smaller"})}
    first, second, third = (groups[frozenset(names)] for names in ({"deep", "shallow"}, {"tuned"}, {"smaller"}))
    assert first.processor is second.processor
    assert third.processor is not first.processor
    for group in (first, second, third):
        for name, pair in group.score_example(EXAMPLE, list(group.classifiers)).items():
            np.testing.assert_allclose(pair, saved[name].predict_proba([EXAMPLE])[0], rtol=0, atol=1e-6)


def test_a_backbone_is_loaded_again_only_for_deeper_layers(
    tmp_path: Path, tiny_classifier: Classifier, loads: list[int | None]
) -> None:
    tiny = {layer: with_tap(tiny_classifier, layer) for layer in (1, 2, -1)}
    two = tiny[2].save(tmp_path / "two")
    first, _ = load_models(ModelSet(), {"two": two}, CONFIG)
    assert loads == [2]
    second, _ = load_models(first, {"one": tiny[1].save(tmp_path / "one")}, CONFIG)
    new_head = tiny[2]
    new_head.temperature = 3.0
    third, _ = load_models(second, {"two": new_head.save(two)}, CONFIG)
    assert loads == [2], "a new head on a backbone that is loaded"
    fourth, _ = load_models(third, {"all": tiny[-1].save(tmp_path / "all")}, CONFIG)
    assert len(loads) == 2
    assert len(fourth.panels) == 1, "all of a backbone go over to the deeper one"
    assert len({id(model.backbone) for model in fourth.models.values()}) == 1
    assert fourth.models["one"].backbone is not third.models["one"].backbone
    assert [served.names for served in (first, second, third, fourth)] == [
        ["two"],
        ["two", "one"],
        ["two", "one"],
        ["two", "one", "all"],
    ]
    assert first.versions["two"] == second.versions["two"] != third.versions["two"] == fourth.versions["two"]
    (panel,) = fourth.panels
    for name, classifier in (("one", tiny[1]), ("two", new_head), ("all", tiny[-1])):
        pair = panel.score_example(EXAMPLE, [name])[name]
        np.testing.assert_allclose(pair, classifier.predict_proba([EXAMPLE])[0], rtol=0, atol=1e-6)


def test_a_panel_that_does_not_change_stays(tmp_path: Path, tiny_classifier: Classifier) -> None:
    other = Backbone.load("builtin:tiny", device="cpu", dtype="float32", max_pixels=100_352)
    beside = Classifier(other, tiny_classifier.tap, tiny_classifier.head, tiny_classifier.spec)
    first, _ = load_models(ModelSet(), {"a": tiny_classifier.save(tmp_path / "a")}, CONFIG)
    second, _ = load_models(first, {"b": beside.save(tmp_path / "b")}, CONFIG)
    assert second.panel_of("a") is first.panel_of("a")
    assert second.without("b").panel_of("a") is first.panel_of("a")
    assert second.without("a").names == ["b"]
    assert second.without("a").without("b").panels == ()


def test_a_backbone_that_serves_no_more_is_freed(tmp_path: Path, tiny_classifier: Classifier) -> None:
    shallow, deep = with_tap(tiny_classifier, 1).save(tmp_path / "one"), tiny_classifier.save(tmp_path / "all")
    served, _ = load_models(ModelSet(), {"a": shallow}, CONFIG)
    old = weakref.ref(served.models["a"].backbone.model.get_submodule("visual.blocks.0"))
    served.panels[0].score_example(EXAMPLE, ["a"])
    served, _ = load_models(served, {"a": deep}, CONFIG)
    gc.collect()
    assert old() is None


def test_what_cannot_be_loaded_leaves_the_others(tmp_path: Path, tiny_classifier: Classifier) -> None:
    good = tiny_classifier.save(tmp_path / "good")
    first, _ = load_models(ModelSet(), {"good": good, "old": tiny_classifier.save(tmp_path / "old")}, CONFIG)
    (tmp_path / "old" / "head.safetensors").write_bytes(b"half")
    (tmp_path / "none").mkdir()
    folders = {"old": tmp_path / "old", "none": tmp_path / "none"}
    second, failures = load_models(first, folders, CONFIG)
    assert failures.keys() == {"old", "none"}
    assert all(isinstance(error, ArtifactError) for error in failures.values())
    assert (second.versions, second.panels) == (first.versions, first.panels)


@pytest.mark.parametrize("layer", [1, -1])
def test_a_backbone_that_does_not_fit_beside_those_that_serve(
    tmp_path: Path, tiny_classifier: Classifier, monkeypatch: pytest.MonkeyPatch, loads: list[int | None], layer: int
) -> None:
    other = Backbone.load("builtin:tiny", device="cpu", dtype="float32", max_pixels=100_352)
    second = with_tap(Classifier(other, tiny_classifier.tap, tiny_classifier.head, tiny_classifier.spec), layer)
    folders = {"first": tiny_classifier.save(tmp_path / "first"), "second": second.save(tmp_path / "second")}
    served, _ = load_models(ModelSet(), {"first": folders["first"]}, CONFIG)
    loads.clear()
    whole = load_models(ModelSet(), {"second": folders["second"]}, CONFIG)[0].models["second"].backbone.model
    needed = sum(weight.nbytes for weight in whole.parameters())
    monkeypatch.setattr(own_backbone, "free_memory", lambda _: needed - 1)
    before = len(loads)
    same, failures = load_models(served, folders, CONFIG)
    assert isinstance(failures["second"], OutOfMemoryError)
    assert re.search(
        r"its backbone takes \d.* GB beside what is loaded, and .* are free on cpu", str(failures["second"])
    )
    assert (same.names, len(loads)) == (["first"], before), "and none of it was loaded"
    monkeypatch.setattr(own_backbone, "free_memory", lambda _: needed)
    assert load_models(served, folders, CONFIG)[0].names == ["first", "second"]


def test_a_folder_that_is_replaced_while_it_is_read(
    tmp_path: Path, tiny_classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head of one version never serves with the threshold of another."""
    folder = tiny_classifier.save(tmp_path / "claims")
    other = copy.copy(tiny_classifier)
    other.threshold = 0.9
    load = Classifier.load

    def replace(*arguments: object, **settings: object) -> Classifier:
        other.save(folder)
        return load(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(loading_models.Classifier, "load", replace)
    served, failures = load_models(ModelSet(), {"claims": folder}, CONFIG)
    assert not served.models
    assert "it was replaced while it was read" in str(failures["claims"])


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda folder: (folder / "classifier.json").touch(), True),
        (lambda folder: (folder / "README.md").write_text("other words"), True),
        (lambda folder: (folder / "head.safetensors").write_bytes(b"x" * 100), False),
        (lambda folder: (folder / "classifier.json").write_text("{}"), False),
    ],
)
def test_versions_differ_by_content(
    tmp_path: Path, tiny_classifier: Classifier, change: Callable[[Path], None], same: bool
) -> None:
    folder = tiny_classifier.save(tmp_path / "claims")
    before = version_of(folder)
    assert version_of(tiny_classifier.save(tmp_path / "copy")).digest == before.digest
    assert before.saved > 1_700_000_000
    change(folder)
    assert (version_of(folder).digest == before.digest) == same


@pytest.mark.parametrize(
    "family", ["qwen2_5_vl", *(pytest.param(name, marks=pytest.mark.soak) for name in sorted(nano.FAMILIES))]
)
def test_passes_do_not_depend_on_the_default_type(tmp_path: Path, family: str) -> None:
    """transformers changes it in the whole process for a moment, while it builds a model beside those that serve."""
    picture = np.random.default_rng(0).integers(0, 255, (90, 130, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    examples = [Example((stream.getvalue(),), "It is red."), Example(None, "no picture"), Example(None, "words " * 30)]
    folder = nano.make_checkpoint(family, tmp_path / family)
    before = torch.get_default_dtype()
    for dtype in ("float32", "bfloat16"):
        backbone = Backbone.load(folder, device="cpu", dtype=dtype)
        prepared, taps = backbone.prepare(examples), [Tap(1, "mean"), Tap(2, "image"), Tap(-1, "last")]
        expected = backbone.encode_prepared(prepared, taps)
        for default in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(default)
            try:
                found = backbone.encode_prepared(prepared, taps)
            finally:
                torch.set_default_dtype(before)
            np.testing.assert_array_equal(found, expected)
