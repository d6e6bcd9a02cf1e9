"""`Classifier.calibrate`: the same reading, better decisions, and a record of what they are worth."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from qwen_vl_classifier import Classifier, Example, FeatureStore, Panel, Tap
from qwen_vl_classifier.classifier.abstention import abstention_band
from qwen_vl_classifier.classifier.calibration import Calibration, fit_platt, fit_temperature
from qwen_vl_classifier.classifier.head import HeadSpec
from qwen_vl_classifier.classifier.probabilities import log_loss, margins_of
from qwen_vl_classifier.classifier.score_distribution import ScoreDistribution, recorded_distribution
from qwen_vl_classifier.classifier.thresholds import choose_threshold
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.errors import ConfigError, DataError, TrainingError
from qwen_vl_classifier.features.extraction import extract_features

pytestmark = pytest.mark.usefixtures("one_thread")

RECORD = {"rows", "method", "ece_before", "ece_after", "log_loss_before", "log_loss_after", "tried"}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FeatureStore:
    return FeatureStore(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def zero_shot(tiny_backbone) -> Classifier:
    return Classifier.zero_shot(tiny_backbone)


@pytest.fixture(scope="module")
def probe(tiny_backbone) -> Classifier:
    """A linear head as training would leave it, far too sure of itself."""
    torch.manual_seed(0)
    spec = HeadSpec("linear", tiny_backbone.hidden_size)
    head = spec.build()
    with torch.no_grad():
        head.weight.mul_(5)
    training = {"method": "probe", "abstention": {"band": "of old"}, "training_rows": 12}
    return Classifier(tiny_backbone, Tap(-1, "mean"), head, spec, abstention=(0.1, 0.9), training=training)


@pytest.fixture(scope="module")
def rows(scene_rows) -> tuple[list[Example], list[Example]]:
    """Rows to calibrate on, and rows for the band: they share no picture. One label in five is turned round."""
    labels = labels_of(scene_rows) ^ (np.random.default_rng(0).random(len(scene_rows)) < 0.2)
    labelled = relabelled(scene_rows, labels)
    return labelled[:40], labelled[40:]


def labels_of(examples: list[Example]) -> np.ndarray:
    return np.array([example.label for example in examples])


def relabelled(examples: list[Example], labels: np.ndarray) -> list[Example]:
    return [dataclasses.replace(example, label=int(label)) for example, label in zip(examples, labels, strict=True)]


class TestCalibration:
    """Platt's line for zero-shot, a temperature or a curve for what was trained."""

    def test_zero_shot_gets_platts_line_in_its_head(self, zero_shot, rows, store, tmp_path):
        examples, others = rows
        weights = {name: tensor.clone() for name, tensor in zero_shot.head.state_dict().items()}
        made = zero_shot.calibrate(examples, store=store)
        features = zero_shot.backbone.encode(others, [zero_shot.tap])[:, 0]
        before = margins_of(zero_shot.logits_of(zero_shot.backbone.encode(examples, [zero_shot.tap])[:, 0]))
        scale, bias = fit_platt(before, labels_of(examples))
        wanted = scale * margins_of(zero_shot.logits_of(features)) + bias
        np.testing.assert_allclose(margins_of(made.logits_of(features)), wanted, atol=1e-4)
        assert (made.temperature, made.isotonic, made.abstention) == (1.0, None, None)
        assert made.training["method"] == "calibrated zero-shot"
        torch.testing.assert_close(dict(zero_shot.head.state_dict()), weights, rtol=0, atol=0)
        assert zero_shot.training == {"method": "zero-shot"}
        loaded = Classifier.load(made.save(tmp_path / "saved"), device="cpu")
        np.testing.assert_array_equal(loaded.predict_proba(others), made.predict_proba(others))
        assert loaded.training == made.training

    def test_zero_shot_is_nearer_to_the_truth_and_in_the_same_order(self, zero_shot, rows, store):
        examples, _ = rows
        before = zero_shot.predict_proba(examples, store=store)[:, 1]
        made = zero_shot.calibrate(examples, store=store)
        after = made.predict_proba(examples, store=store)[:, 1]
        labels = labels_of(examples)
        assert log_loss(after, labels) < log_loss(before, labels)
        order = np.argsort(before)
        assert (np.diff(after[order]) >= 0).all()
        record = made.training["calibration"]
        assert set(record) == RECORD
        assert (record["rows"], record["method"]) == (40, "platt")
        assert record["log_loss_before"] == pytest.approx(log_loss(before, labels))
        assert record["log_loss_after"] > log_loss(after, labels)  # of rows that it was not fitted on

    def test_progress_is_shown_where_it_is_asked_for(self, probe, rows, monkeypatch):
        asked = []

        def watched(*args, progress, **options):
            asked.append(progress)
            return extract_features(*args, progress=False, **options)

        monkeypatch.setattr("qwen_vl_classifier.classifier.classifier.extract_features", watched)
        for progress in (False, True):
            probe.calibrate(rows[0], target_error_rate=0.5, abstention_examples=rows[1], progress=progress)
        probe.calibrate(rows[0])
        assert asked == [False, False, True, True, False]

    def test_it_may_be_done_again(self, zero_shot, rows, store):
        examples, others = rows
        twice = zero_shot.calibrate(others, store=store).calibrate(examples, store=store)
        once = zero_shot.calibrate(examples, store=store)
        assert twice.training["method"] == "calibrated zero-shot"
        np.testing.assert_allclose(
            twice.predict_proba(examples, store=store), once.predict_proba(examples, store=store), atol=1e-3
        )

    def test_a_trained_head_gets_a_temperature(self, probe, rows, store):
        examples, _ = rows
        made = probe.calibrate(examples, store=store)
        logits = probe.logits_of(probe.backbone.encode(examples, [probe.tap])[:, 0])
        assert made.temperature == pytest.approx(fit_temperature(logits, labels_of(examples)), rel=1e-3)
        assert made.temperature > 1
        assert made.isotonic is None
        assert made.head is probe.head
        assert made.training["calibration"]["method"] == "temperature"
        assert made.training["method"] == "probe"
        assert made.training["training_rows"] == 12
        assert "abstention" not in made.training
        assert probe.temperature == 1.0

    def test_the_record_has_the_scores_of_its_rows_or_none(self, probe, rows, store):
        examples = rows[0] + rows[1]
        made = probe.calibrate(examples, store=store)
        recorded = recorded_distribution(made.training, name="made")
        assert recorded == ScoreDistribution.of(made.predict_proba(examples, store=store)[:, 1])
        assert sum(recorded.counts) == len(examples)
        few = made.calibrate(examples[:40], store=store)
        assert recorded_distribution(few.training, name="few") is None, "scores of another calibration are not kept"

    def test_very_many_rows_may_get_a_curve(self, probe, rows, store, tmp_path):
        examples = rows[0] * 26
        margins = margins_of(probe.logits_of(probe.backbone.encode(rows[0], [probe.tap])[:, 0]))
        share = np.where(margins > np.median(margins), 0.7, 0.4)
        labels = (np.random.default_rng(0).random(len(examples)) < np.tile(share, 26)).astype(int)
        labelled = relabelled(examples, labels)
        made = probe.calibrate(labelled, objective="balanced", store=store)
        assert made.training["calibration"]["method"] == "isotonic"
        assert made.training["calibration"]["ece_after"] < 0.1 < made.training["calibration"]["ece_before"]
        seen = made.predict_proba(rows[0], store=store)
        recorded = recorded_distribution(made.training, name="made")
        assert recorded.counts_of(np.tile(seen[:, 1], 26)) == list(recorded.counts), "whatever the rounding"
        np.testing.assert_allclose(seen[:, 1], share, atol=0.1)
        np.testing.assert_allclose(seen.sum(axis=1), 1)
        wanted = Calibration(made.temperature, made.isotonic).apply(
            made.logits_of(made.backbone.encode(rows[0], [made.tap])[:, 0])
        )
        np.testing.assert_allclose(seen, wanted, atol=1e-6)
        np.testing.assert_array_equal(Panel([made]).predict_proba(rows[0], store=store)[:, 0], seen[:, 1])
        loaded = Classifier.load(made.save(tmp_path / "saved"), device="cpu")
        assert loaded.isotonic == made.isotonic
        np.testing.assert_array_equal(loaded.predict_proba(rows[1]), made.predict_proba(rows[1]))
        # One group proves nothing, and leaves the temperature.
        grouped = probe.calibrate(labelled, groups=np.zeros(len(labelled), dtype=int), store=store)
        assert grouped.isotonic is None

    def test_a_calibration_that_does_not_help_is_not_kept(self, probe, rows, store):
        """Labels that are the answers of the head itself: it cannot be too sure of them."""
        examples, _ = rows
        margins = margins_of(probe.logits_of(probe.backbone.encode(examples, [probe.tap])[:, 0]))
        labelled = relabelled(examples, margins > np.median(margins))
        head = HeadSpec("linear", probe.backbone.hidden_size).build()
        with torch.no_grad():
            head.weight.copy_(probe.head.weight * 20)
            head.bias.copy_((probe.head.bias - torch.tensor([0.0, float(np.median(margins))])) * 20)
        sure = Classifier(probe.backbone, probe.tap, head, probe.spec, training={"method": "probe"})
        made = sure.calibrate(labelled, store=store)
        assert made.temperature == 1
        assert made.training["calibration"]["method"] == "none"
        np.testing.assert_array_equal(made.predict_proba(examples), sure.predict_proba(examples))


class TestThresholdAndBand:
    """The objective and the band are what `predict` and `decide` go by."""

    @pytest.mark.parametrize("objective", ["accuracy", "f1", "balanced", "recall>=0.9", "cost=9:1"])
    def test_the_threshold_serves_the_objective(self, zero_shot, rows, store, objective):
        examples, _ = rows
        made = zero_shot.calibrate(examples, objective=objective, store=store)
        probability = made.predict_proba(examples, store=store)[:, 1]
        assert made.threshold == pytest.approx(choose_threshold(probability, labels_of(examples), objective))
        assert made.training["threshold"] == {"objective": objective, "threshold": made.threshold}
        if objective == "recall>=0.9":
            assert (probability >= made.threshold)[labels_of(examples) == 1].mean() >= 0.9

    def test_the_band_comes_from_rows_of_its_own(self, zero_shot, rows, store):
        examples, others = rows
        made = zero_shot.calibrate(examples, target_error_rate=0.15, abstention_examples=others, store=store)
        probability = made.predict_proba(others, store=store)[:, 1]
        wanted = abstention_band(probability, labels_of(others), made.threshold, 0.15)
        assert made.abstention == wanted.band
        assert made.training["abstention"] == wanted.to_json()
        assert 0 < wanted.decided < 1
        assert wanted.error_of_all > 0
        decisions = [made.decision_of(float(p)).decision for p in probability]
        assert decisions.count("abstain") == round((1 - wanted.decided) * len(others))
        wrong = [d != "abstain" and (d == "yes") != bool(e.label) for d, e in zip(decisions, others, strict=True)]
        assert np.mean(wrong) == wanted.error_of_all <= 0.15

    def test_info_tells(self, zero_shot, rows, store, tmp_path, capsys):
        examples, others = rows
        made = zero_shot.calibrate(
            examples, objective="cost=2:1", target_error_rate=0.15, abstention_examples=others, store=store
        )
        assert main(["info", str(made.save(tmp_path / "saved"))]) == 0
        lines = capsys.readouterr().out.splitlines()
        told = {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in lines}
        assert told["method"] == "calibrated zero-shot"
        assert told["objective"] == "cost=2:1"
        assert told["isotonic"] == "none"
        assert told["calibration"].startswith("platt on 40 rows, measured where it was not fitted: log loss ")
        assert told["decided"].startswith(f"{made.training['abstention']['decided']:.1%} of 40 held-out rows; wrong: ")
        assert told["guarantee"] == made.training["abstention"]["guarantee"]


class TestRefusals:
    """What cannot be done is said before any time is spent, where that can be known."""

    @pytest.fixture(autouse=True)
    def _nothing_is_encoded(self, request, monkeypatch):
        if "encodes" not in request.node.name:
            monkeypatch.setattr(
                "qwen_vl_classifier.classifier.classifier.extract_features", lambda *_, **__: pytest.fail("encoded")
            )

    def test_a_malformed_objective(self, probe, rows):
        with pytest.raises(ConfigError, match="objective 'best'"):
            probe.calibrate(rows[0], objective="best")

    def test_a_band_needs_rows_and_a_share(self, probe, rows):
        with pytest.raises(ConfigError, match=r"rate 0.1 with 0 abstention_examples; give both or neither"):
            probe.calibrate(rows[0], target_error_rate=0.1)
        with pytest.raises(ConfigError, match="rate None with 40 abstention_examples; give both or neither"):
            probe.calibrate(rows[0], abstention_examples=rows[1])

    def test_the_same_rows_twice(self, probe, rows):
        with pytest.raises(ConfigError, match="3 of the abstention_examples are among the examples"):
            probe.calibrate(rows[0], target_error_rate=0.1, abstention_examples=[*rows[1], *rows[0][:3]])

    @pytest.mark.parametrize("label", [None, 2, 0.5])
    def test_a_label_that_is_none(self, probe, rows, label):
        broken = [*rows[0][:5], dataclasses.replace(rows[0][5], label=label)]
        with pytest.raises(DataError, match=r"calibration examples.* row 5; give 0 or 1"):
            probe.calibrate(broken)
        with pytest.raises(DataError, match=r"abstention examples.* row 5; give 0 or 1"):
            probe.calibrate(rows[1], target_error_rate=0.1, abstention_examples=broken)

    def test_one_class(self, probe, rows):
        with pytest.raises(DataError, match=r"all 40 calibration examples have label 1; give examples of both classes"):
            probe.calibrate(relabelled(rows[0], np.ones(40)))
        with pytest.raises(DataError, match="no calibration examples"):
            probe.calibrate([])

    def test_too_few_rows_for_the_band_encodes(self, probe, rows, store):
        with pytest.raises(TrainingError, match="hold out at least 99 rows"):
            probe.calibrate(rows[0], target_error_rate=0.01, abstention_examples=rows[1], store=store)
