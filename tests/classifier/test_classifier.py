"""Classifier: saved is loaded, zero-shot is the language head."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from qwen_vl_classifier import Backbone, Classifier, Example, FeatureStore, Prediction, Tap
from qwen_vl_classifier.classifier import artifact
from qwen_vl_classifier.classifier.head import HeadSpec
from qwen_vl_classifier.errors import ArtifactError, CheckpointError, ConfigError
from tests import each_family, nano

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]

PLAIN = (
    ((84, 56), "red", "a red picture"),
    ((56, 112), "navy", "a red picture"),
    ((56, 112), "navy", "a long text that says that it is blue"),
)
EXAMPLES = [Example(Image.new("RGB", size, colour), text) for size, colour, text in PLAIN] + [
    Example(None, "no picture")
]

FRESH = """
import json, sys, numpy, torch
torch.set_num_threads(1)  # as here: the order of sums depends on it
from PIL import Image
from qwen_vl_classifier import Classifier, Example

loaded = Classifier.load(sys.argv[1], device="cpu")
assert loaded.backbone.num_layers == 2
examples = [Example(Image.new("RGB", size, colour), text) for size, colour, text in json.loads(sys.argv[2])]
numpy.save(sys.argv[3], loaded.predict_proba(examples))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return nano.make_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("nano") / "checkpoint", tied=True)


@pytest.fixture(scope="module")
def backbone(checkpoint) -> Backbone:
    return Backbone.load(checkpoint, device="cpu", dtype="float32")


def classifier_at(backbone: Backbone, tap: Tap, seed: int = 0, **options) -> Classifier:
    """A classifier with random weights, large enough that its probabilities differ."""
    torch.manual_seed(seed)
    spec = HeadSpec("mlp", backbone.hidden_size, units=16, dropout=0.1)
    head = spec.build()
    torch.nn.init.normal_(head[3].weight, std=2)
    return Classifier(backbone, tap, head, spec, **options)


@pytest.fixture
def classifier(backbone) -> Classifier:
    return classifier_at(
        backbone,
        Tap(2, "mean"),
        temperature=1.7,
        isotonic=((0.0, 1.0), (0.0, 1.0)),
        threshold=0.4,
        abstention=(0.35, 0.45),
        label_names=("blue", "red"),
        training={"method": "none", "table": [{"tap": "mean:2"}]},
    )


class TestSaving:
    """What is loaded is what was saved."""

    def test_everything_comes_back(self, classifier, tmp_path):
        loaded = Classifier.load(classifier.save(tmp_path / "saved"), device="cpu")
        np.testing.assert_array_equal(loaded.predict_proba(EXAMPLES), classifier.predict_proba(EXAMPLES))
        assert loaded.backbone is not classifier.backbone
        for name in ("tap", "spec", "temperature", "isotonic", "threshold", "abstention"):
            assert getattr(loaded, name) == getattr(classifier, name), name
        for name in ("label_names", "training", "finetuned"):
            assert getattr(loaded, name) == getattr(classifier, name), name
        assert loaded.backbone.fingerprint == classifier.backbone.fingerprint
        assert not loaded.head.training

    def test_a_fresh_process_gives_the_same_probabilities(self, classifier, tmp_path, fresh):
        classifier.save(tmp_path / "saved")
        fresh.run(FRESH, tmp_path / "saved", json.dumps(PLAIN), tmp_path / "seen.npy").check_returncode()
        np.testing.assert_array_equal(np.load(tmp_path / "seen.npy"), classifier.predict_proba(EXAMPLES[: len(PLAIN)]))

    def test_only_the_layers_up_to_the_tap_are_loaded(self, backbone, tmp_path):
        for layer, loaded in ((1, 1), (3, 3), (-1, 4)):
            saved = classifier_at(backbone, Tap(layer, "last")).save(tmp_path / str(layer))
            assert Classifier.load(saved, device="cpu").backbone.num_layers == loaded

    def test_a_backbone_may_be_shared(self, classifier, backbone, tmp_path):
        loaded = Classifier.load(classifier.save(tmp_path / "saved"), backbone=backbone)
        assert loaded.backbone is backbone
        np.testing.assert_array_equal(loaded.predict_proba(EXAMPLES), classifier.predict_proba(EXAMPLES))

    def test_a_shared_backbone_must_reach_the_tap(self, classifier, checkpoint, tmp_path):
        shallow = Backbone.load(checkpoint, device="cpu", dtype="float32", num_layers=1)
        with pytest.raises(ConfigError, match="1 layers loaded"):
            Classifier.load(classifier.save(tmp_path / "saved"), backbone=shallow)

    def test_pixel_limits_are_those_of_the_training(self, checkpoint, tmp_path):
        small = Backbone.load(checkpoint, device="cpu", dtype="float32", max_pixels=56 * 56)
        saved = classifier_at(small, Tap(1, "mean")).save(tmp_path / "saved")
        loaded = Classifier.load(saved, device="cpu")
        assert loaded.backbone.pixel_limits == (3136, 3136)
        assert loaded.backbone.fingerprint == small.fingerprint

    def test_saving_over_itself(self, classifier, tmp_path):
        folder = classifier.save(tmp_path / "saved")
        loaded = Classifier.load(folder, device="cpu")
        loaded.threshold = 0.9
        loaded.save(folder)
        assert Classifier.load(folder, device="cpu").threshold == 0.9


class TestOtherBackbones:
    """A backbone that is not the one is an error, never a silent score."""

    @pytest.fixture
    def saved(self, checkpoint, tmp_path) -> tuple[Path, Path]:
        """A saved classifier, and the checkpoint that it will look for."""
        place = shutil.copytree(checkpoint, tmp_path / "checkpoint")
        own = Backbone.load(place, device="cpu", dtype="float32")
        return classifier_at(own, Tap(2, "mean")).save(tmp_path / "saved"), place

    def refusal(self, saved: Path) -> str:
        with pytest.raises(ArtifactError) as caught:
            Classifier.load(saved, device="cpu")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_other_weights_name_both_sides(self, saved):
        folder, place = saved
        weights = load_file(place / "model.safetensors")
        weights["visual.patch_embed.proj.weight"][0] += 1e-3
        save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
        made = json.loads((folder / "classifier.json").read_text())["backbone"]["fingerprint"]
        here = Backbone.load(place, device="cpu", dtype="float32").fingerprint
        text = self.refusal(folder)
        assert made[:12] != here[:12]
        for part in (str(folder), str(place), made[:12], here[:12], "train the classifier again"):
            assert part in text

    @pytest.mark.parametrize("change", ["prompt", "tokenizer", "pictures"])
    def test_other_settings_are_noticed(self, saved, change):
        folder, place = saved
        file = {
            "prompt": "tokenizer_config.json",
            "tokenizer": "tokenizer.json",
            "pictures": "preprocessor_config.json",
        }
        path = place / file[change]
        content = json.loads(path.read_text())
        if change == "prompt":
            content["chat_template"] = "{% if false %}{% endif %}" + content["chat_template"]
        elif change == "tokenizer":
            merges = content["model"]["merges"]
            merges[-1], merges[-2] = merges[-2], merges[-1]
        else:
            content["rescale_factor"] = 1 / 256
        path.write_text(json.dumps(content))
        assert "fingerprint" in self.refusal(folder)

    def test_pixel_limits_of_the_checkpoint_do_not_matter(self, saved):
        folder, place = saved
        content = json.loads((place / "preprocessor_config.json").read_text())
        (place / "preprocessor_config.json").write_text(json.dumps(content | {"max_pixels": 100_000}))
        assert Classifier.load(folder, device="cpu").backbone.pixel_limits == (3136, 200704)

    def test_another_dtype_is_another_backbone(self, saved):
        folder, place = saved
        other = Backbone.load(place, device="cpu", dtype="bfloat16")
        with pytest.raises(ArtifactError, match="dtype"):
            Classifier.load(folder, backbone=other)

    def test_a_head_of_another_width(self, saved, tmp_path):
        folder, _ = saved
        content = json.loads((folder / "classifier.json").read_text())
        content["head"] |= {"hidden_size": 32}
        (folder / "classifier.json").write_text(json.dumps(content))
        save_file(HeadSpec(**content["head"]).build().state_dict(), folder / "head.safetensors")
        assert "width 32" in self.refusal(folder)

    def test_a_backbone_that_is_gone(self, saved):
        folder, place = saved
        shutil.rmtree(place)
        with pytest.raises(CheckpointError, match="no longer exists"):
            Classifier.load(folder, device="cpu")

    def test_a_tap_beyond_the_backbone(self, saved):
        folder, _ = saved
        content = json.loads((folder / "classifier.json").read_text())
        (folder / "classifier.json").write_text(json.dumps(content | {"tap": "mean:9"}))
        with pytest.raises(ConfigError, match="has 4; expected 1 to 4"):
            Classifier.load(folder, device="cpu")


class TestDecisions:
    """From probability to label and decision."""

    def test_probabilities_are_the_heads_softmax_at_the_temperature(self, classifier, backbone):
        features = torch.from_numpy(backbone.encode(EXAMPLES, [classifier.tap])[:, 0])
        with torch.no_grad():
            wanted = (classifier.head(features).double() / 1.7).softmax(dim=-1).numpy()
        seen = classifier.predict_proba(EXAMPLES)
        assert seen.dtype == np.float64
        np.testing.assert_allclose(seen, wanted, rtol=1e-6)
        assert np.ptp(np.log(seen[:, 1] / seen[:, 0])) > 0.5  # they differ from example to example
        assert list(classifier.classes_) == [0, 1]

    def test_no_examples(self, classifier):
        assert classifier.predict_proba([]).shape == (0, 2)
        assert classifier.predict([]).shape == (0,)
        assert classifier.decide([]) == []

    def test_a_stream_of_examples(self, classifier):
        seen = classifier.predict_proba(example for example in EXAMPLES)
        np.testing.assert_array_equal(seen, classifier.predict_proba(EXAMPLES))

    def test_the_threshold_itself_is_class_1(self, classifier):
        probability = classifier.predict_proba(EXAMPLES)[:, 1]
        for row in range(len(EXAMPLES)):
            classifier.threshold = float(probability[row])
            labels = classifier.predict(EXAMPLES)
            assert labels.dtype == np.int64
            assert labels[row] == 1
            np.testing.assert_array_equal(labels, probability >= probability[row])
            classifier.threshold = float(np.nextafter(probability[row], 1))
            assert classifier.predict(EXAMPLES)[row] == 0

    def test_both_ends_of_the_band_abstain(self, classifier):
        below, above = np.nextafter(0.35, 0), np.nextafter(0.45, 1)
        wanted = {below: "no", 0.35: "abstain", 0.4: "abstain", 0.45: "abstain", above: "yes", 0.0: "no", 1.0: "yes"}
        assert {p: classifier.decision_of(p).decision for p in wanted} == wanted
        assert classifier.decision_of(0.4) == Prediction(1, 0.4, "abstain", "red")
        assert classifier.decision_of(0.38).label == 0

    def test_a_band_away_from_the_threshold(self, classifier):
        classifier.abstention = (0.6, 0.7)
        assert [classifier.decision_of(p).decision for p in (0.3, 0.5, 0.65, 0.8)] == ["no", "yes", "abstain", "yes"]

    def test_without_a_band_nothing_abstains(self, classifier):
        classifier.abstention = None
        assert classifier.decision_of(0.4).decision == "yes"
        assert classifier.decision_of(0.39999).decision == "no"

    def test_decide_says_what_predict_says(self, classifier):
        predictions = classifier.decide(EXAMPLES)
        assert [prediction.label for prediction in predictions] == classifier.predict(EXAMPLES).tolist()
        np.testing.assert_array_equal(
            [prediction.probability for prediction in predictions], classifier.predict_proba(EXAMPLES)[:, 1]
        )

    def test_kept_features_are_used(self, classifier, backbone, tmp_path, monkeypatch):
        store = FeatureStore(tmp_path)
        first = classifier.predict_proba(EXAMPLES, store=store)
        monkeypatch.setattr(backbone, "encode_prepared", lambda *_, **__: pytest.fail("encoded again"))
        np.testing.assert_array_equal(classifier.predict_proba(EXAMPLES, store=store), first)


class TestZeroShot:
    """Zero-shot is a head: the softmax over two logits of the language head."""

    @pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
    @pytest.mark.parametrize("family", each_family.FAMILIES)
    def test_it_equals_transformers_own_language_head(self, family, tied, tmp_path):
        folder = nano.make_checkpoint(family, tmp_path / "checkpoint", tied=tied)
        backbone = Backbone.load(folder, device="cpu", dtype="float32")
        reference = nano.reference_class(family).from_pretrained(folder, dtype=torch.float32).eval()
        yes, no = (backbone.processor.tokenizer(word)["input_ids"] for word in ("Yes", "No"))
        assert len(yes) == len(no) == 1
        wanted = []
        for example in EXAMPLES:
            with torch.no_grad():
                logits = reference(**backbone.processor([example])).logits[0, -1]
            wanted.append(logits[[no[0], yes[0]]].double().softmax(dim=0).numpy())
        classifier = Classifier.zero_shot(backbone)
        np.testing.assert_allclose(classifier.predict_proba(EXAMPLES), wanted, rtol=1e-4, atol=1e-6)
        assert np.ptp(np.array(wanted)[:, 1]) > 1e-3
        assert classifier.label_names == ("No", "Yes")
        loaded = Classifier.load(classifier.save(tmp_path / "saved"), device="cpu")
        np.testing.assert_array_equal(loaded.predict_proba(EXAMPLES), classifier.predict_proba(EXAMPLES))

    def test_other_words(self, backbone):
        there, back = (
            Classifier.zero_shot(backbone, yes=yes, no=no).predict_proba(EXAMPLES)
            for yes, no in (("red", "blue"), ("blue", "red"))
        )
        np.testing.assert_allclose(there, back[:, ::-1], rtol=1e-6)

    @pytest.mark.parametrize("word", ["unprecedented", "Yes No", "", "\u2603"])
    def test_a_word_must_be_one_token(self, backbone, word):
        for words in ({"yes": word}, {"no": word}):
            with pytest.raises(ConfigError, match=r"is \d+ tokens of .* give a word that is one token") as caught:
                Classifier.zero_shot(backbone, **words)
            assert repr(word) in str(caught.value)

    def test_a_checkpoint_without_a_language_head(self, tmp_path):
        folder = nano.make_checkpoint("qwen2_5_vl", tmp_path / "checkpoint", tied=False)
        weights = load_file(folder / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        backbone = Backbone.load(folder, device="cpu", dtype="float32")
        with pytest.raises(CheckpointError, match=r"no lm_head.weight .* train a classifier"):
            Classifier.zero_shot(backbone)

    def test_it_needs_all_layers(self, checkpoint):
        part = Backbone.load(checkpoint, device="cpu", dtype="float32", num_layers=2)
        with pytest.raises(ConfigError, match="without num_layers"):
            Classifier.zero_shot(part).predict_proba(EXAMPLES)


class TestChangedBackbone:
    """A classifier whose backbone was trained brings it along."""

    @pytest.fixture
    def changed(self, checkpoint) -> Classifier:
        backbone = Backbone.load(checkpoint, device="cpu", dtype="float32", num_layers=2)
        with torch.no_grad():
            backbone.model.language_model.layers[0].mlp.down_proj.weight += 0.1
        backbone.mark_changed()
        return classifier_at(backbone, Tap(2, "mean"))

    def test_it_is_saved_with_its_backbone(self, changed, checkpoint, tmp_path):
        before, fingerprint = changed.predict_proba(EXAMPLES), changed.backbone.fingerprint
        assert fingerprint != Backbone.load(checkpoint, device="cpu", dtype="float32").fingerprint
        folder = changed.save(tmp_path / "saved")
        assert not list(folder.rglob("*.bin")) + list(folder.rglob("*.pt*")) + list(folder.rglob("*.pkl"))
        loaded = Classifier.load(folder, device="cpu")
        np.testing.assert_array_equal(loaded.predict_proba(EXAMPLES), before)
        assert loaded.finetuned
        assert changed.finetuned
        assert loaded.backbone.fingerprint == changed.backbone.fingerprint
        assert not loaded.backbone.changed
        again = Classifier.load(loaded.save(folder), device="cpu")
        np.testing.assert_array_equal(again.predict_proba(EXAMPLES), before)

    def test_a_failed_save_changes_nothing(self, changed, tmp_path, monkeypatch):
        before, fingerprint = changed.predict_proba(EXAMPLES), changed.backbone.fingerprint
        state = copy.copy(vars(changed.backbone))

        def full(*_args, **_options):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(artifact, "save_file", full)
            with pytest.raises(ArtifactError, match="No space left"):
                changed.save(tmp_path / "saved")
        assert vars(changed.backbone) == state
        assert changed.backbone.fingerprint == fingerprint
        loaded = Classifier.load(changed.save(tmp_path / "saved"), device="cpu")
        np.testing.assert_array_equal(loaded.predict_proba(EXAMPLES), before)

    def test_an_untied_one_has_no_zero_shot_answer_left(self, tmp_path):
        folder = nano.make_checkpoint("qwen2_5_vl", tmp_path / "checkpoint", tied=False)
        backbone = Backbone.load(folder, device="cpu", dtype="float32")
        backbone.mark_changed()
        saved = classifier_at(backbone, Tap(-1, "mean")).save(tmp_path / "saved")
        loaded = Classifier.load(saved, device="cpu")
        with pytest.raises(CheckpointError, match=r"no lm_head.weight"):  # its embeddings are not its language head
            Classifier.zero_shot(loaded.backbone)

    def test_a_tied_one_answers_with_the_embeddings_that_it_has_now(self, checkpoint):
        backbone = Backbone.load(checkpoint, device="cpu", dtype="float32")
        embeddings = backbone.model.get_input_embeddings().weight
        with torch.no_grad():
            embeddings.mul_(1.5)
        backbone.mark_changed()
        (token,) = backbone.processor.tokenizer("Yes")["input_ids"]
        torch.testing.assert_close(backbone.token_rows(["Yes"])[0], embeddings[token])
