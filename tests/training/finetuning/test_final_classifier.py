"""What fine-tuning hands back: better than the start by its own answers, and with the answers that were asked for."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import log_loss

from qwen_vl_classifier import Backbone, Classifier, Example, FinetuneConfig, Tap, TrainConfig, finetune, train
from qwen_vl_classifier.classifier.calibration import Calibration
from qwen_vl_classifier.classifier.score_distribution import ScoreDistribution, recorded_distribution
from qwen_vl_classifier.classifier.thresholds import choose_threshold
from qwen_vl_classifier.errors import ConfigError, DataError, TrainingError
from qwen_vl_classifier.training.finetuning import final_classifier
from qwen_vl_classifier.training.finetuning.final_classifier import Answers, Measure
from qwen_vl_classifier.training.finetuning.training_batches import LabelledRows
from tests.coloured_pictures import pictures
from tests.tuning import FULL, LABELS, LORA, NOTHING, ROWS, VALIDATION, start_at

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def backbone(checkpoint) -> Backbone:
    return Backbone.load(checkpoint, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def plain(backbone) -> Classifier:
    """A start without a record."""
    return start_at(backbone, Tap(3, "mean"))


def loss_of(classifier: Classifier, rows: list[Example] = VALIDATION) -> float:
    return log_loss([row.label for row in rows], classifier.predict_proba(rows))


def flipped(rows: list[Example]) -> list[Example]:
    return [replace(row, label=1 - row.label) for row in rows]


def test_the_threshold_is_that_of_the_objective_though_calibration_does_not_help(plain, monkeypatch):
    fit = final_classifier.fit_calibration

    def harmful(logits, *arguments, **options):
        found = fit(logits, *arguments, **options)
        loss = found.record["log_loss_before"]
        return replace(
            found, calibration=Calibration(), record=found.record | {"method": "none", "log_loss_after": loss}
        )

    monkeypatch.setattr(final_classifier, "fit_calibration", harmful)
    result = finetune(plain, ROWS, VALIDATION, config=replace(FULL, objective="cost=50:1"), progress=False)
    classifier = result.classifier
    assert result.improved
    assert (classifier.temperature, classifier.isotonic) == (1.0, None)
    assert classifier.training["calibration"]["method"] == "none"
    wanted = choose_threshold(classifier.predict_proba(VALIDATION)[:, 1], np.array(LABELS), "cost=50:1")
    assert classifier.threshold == wanted != 0.5
    assert classifier.training["threshold"] == {"objective": "cost=50:1", "threshold": wanted}
    assert any("no calibration" in note for note in result.notes)


def test_the_record_has_the_scores_of_the_validation_rows(plain):
    made = copy.copy(plain)
    made.training = {}
    examples = pictures(60, seed=3)
    targets = np.array([row.label for row in examples], dtype=np.float32)
    rows = LabelledRows(examples, targets, np.where(targets == 1, 9, 1).astype(np.float32))
    start = Measure(np.full((60, 2), 0.5), np.inf, 0.5)
    final_classifier.finish(made, rows, start, Answers("accuracy", 0.0, ("no", "yes")), [], FULL)
    recorded = recorded_distribution(made.training, name="made")
    assert recorded == ScoreDistribution.of(made.predict_proba(examples)[:, 1])
    assert sum(recorded.counts) == pytest.approx(60), "weights of classes say nothing of rows to come"


@pytest.mark.parametrize("objective", ["cost=50:1", "cost=1:50", "recall>=0.9"])
def test_every_rung_is_given_the_threshold_that_was_asked_for(plain, objective):
    for config in (FULL, NOTHING):  # better than the start, and the start itself
        result = finetune(plain, ROWS, VALIDATION, config=replace(config, objective=objective), progress=False)
        assert result.improved is (config is FULL)
        classifier = result.classifier
        wanted = choose_threshold(classifier.predict_proba(VALIDATION)[:, 1], np.array(LABELS), objective)
        assert classifier.threshold == pytest.approx(wanted)
        assert classifier.training["threshold"]["objective"] == objective
    assert plain.training == {}
    assert plain.threshold == 0.5


def test_an_objective_out_of_reach_does_not_lose_what_was_trained(backbone):
    """Every picture comes with both labels, so that no threshold is more precise than a half."""
    start = start_at(backbone, Tap(3, "mean"), temperature=0.02)
    rows, validation = [*ROWS, *flipped(ROWS)], [*VALIDATION, *flipped(VALIDATION)]
    config = replace(FULL, objective="precision>=0.99")
    for number, given in enumerate((config, replace(NOTHING, objective="precision>=0.99"))):
        result = finetune(start, rows, validation, config=given, progress=False)
        assert result.improved is (number == 0)
        (note,) = [note for note in result.notes if "precision" in note]
        assert note.startswith("objective precision>=0.99: the highest precision that can be reached is 0.5")
        assert note.endswith("the threshold is that for accuracy")
        record = result.classifier.training
        assert record["threshold"]["objective"] == "accuracy"
        assert record["threshold"]["asked"] == "precision>=0.99"
        assert note in record["notes"]


def test_the_objective_of_the_start_is_that_of_the_result(backbone):
    start = start_at(backbone, Tap(3, "mean"), training={"threshold": {"objective": "cost=9:1", "threshold": 0.1}})
    record = finetune(start, ROWS, VALIDATION, config=FULL, progress=False).classifier.training
    assert record["threshold"]["objective"] == "cost=9:1"
    assert finetune(start, ROWS, VALIDATION, config=NOTHING, progress=False).classifier is start
    asked = replace(FULL, objective="accuracy")
    record = finetune(start, ROWS, VALIDATION, config=asked, progress=False).classifier.training
    assert record["threshold"]["objective"] == "accuracy"


def test_weights_of_rows_count_in_calibration_and_threshold(plain):
    config = replace(FULL, class_weight={0: 1.0, 1: 50.0})
    classifier = finetune(plain, ROWS, VALIDATION, config=config, progress=False).classifier
    probability, labels = classifier.predict_proba(VALIDATION)[:, 1], np.array(LABELS)
    weights = np.where(labels == 1, 50.0, 1.0)
    assert classifier.threshold == choose_threshold(probability, labels, "accuracy", weights=weights)
    own = log_loss(labels, probability, sample_weight=weights)
    assert classifier.training["validation_log_loss"] == pytest.approx(own, abs=1e-9)


def test_the_figures_are_those_of_the_start_and_of_the_result(plain):
    """By their own answers, whatever the copy that trains would have said."""
    warm = copy.copy(plain)
    warm.isotonic = ((0.0, 1.0), (0.3, 0.7))
    for start in (plain, warm):
        result = finetune(start, ROWS, VALIDATION, config=FULL, progress=False)
        assert result.history[0]["validation_log_loss"] == pytest.approx(loss_of(start), abs=1e-9)
        record = result.classifier.training
        assert record["start_log_loss"] == pytest.approx(loss_of(start), abs=1e-9)
        assert record["validation_log_loss"] == pytest.approx(loss_of(result.classifier), abs=1e-9)
        right = result.classifier.predict_proba(VALIDATION).argmax(axis=1) == LABELS
        assert record["validation_accuracy"] == pytest.approx(right.mean())
    assert any("the copy that trains had" in note for note in result.notes)


def test_a_state_that_is_better_than_its_copy_but_not_than_the_start_is_not_an_improvement(plain):
    """An isotonic curve that answers every row rightly cannot be beaten by training without it."""
    probe = train(
        pictures(40, seed=7), backbone=plain.backbone, config=TrainConfig(taps="mean:3", heads="linear"), progress=False
    ).classifier
    probe.temperature *= 40  # so unsure that training makes it better, and the curve alone tells the classes apart
    low, high = np.sort(probe.predict_proba(VALIDATION)[:, 1])[[0, -1]]
    middle = (probe.predict_proba([row for row in VALIDATION if not row.label])[:, 1].max() + 1e-6).item()
    probe.isotonic = ((low.item(), middle, middle + 1e-6, high.item()), (0.0001, 0.0001, 0.9999, 0.9999))
    before = loss_of(probe)
    assert before < 0.001
    result = finetune(probe, ROWS, VALIDATION, config=replace(FULL, epochs=1, learning_rate=1e-5), progress=False)
    assert result.history[1]["validation_log_loss"] > before
    assert not result.improved
    assert result.classifier is probe
    assert result.history[0]["validation_log_loss"] == pytest.approx(before, abs=1e-9)
    assert any("the best state has log loss" in note for note in result.notes)


def test_a_copy_in_four_bits_is_measured_against_the_start_in_full(plain):
    """What qlora starts from is not what was given; what it returns has to beat what was given."""
    config = replace(LORA, method="qlora")
    result = finetune(plain, ROWS, VALIDATION, config=config, progress=False)
    assert result.history[0]["validation_log_loss"] == pytest.approx(loss_of(plain), abs=1e-9)
    assert result.improved is (loss_of(result.classifier) < loss_of(plain))
    barely = replace(config, learning_rate=1e-30, head_learning_rate=1e-30, epochs=1)
    assert finetune(plain, ROWS, VALIDATION, config=barely, progress=False).classifier is plain


class TestAbstention:
    """A target error rate needs rows of its own."""

    rows = pictures(80, seed=11)
    config = replace(LORA, epochs=1)

    def test_a_band_is_set_on_rows_that_were_used_for_nothing_else(self, plain):
        result = finetune(
            plain, self.rows, VALIDATION, config=replace(self.config, target_error_rate=0.1), progress=False
        )
        record = result.classifier.training
        assert result.improved
        assert record["abstention"]["target_error_rate"] == 0.1
        assert record["training_rows"] + record["abstention"]["rows"] == 80
        assert record["abstention"]["rows"] == 16
        assert list(result.classifier.abstention) == record["abstention"]["band"]

    def test_the_start_is_given_one_where_it_is_kept(self, plain):
        result = finetune(
            plain,
            self.rows,
            VALIDATION,
            config=replace(NOTHING, target_error_rate=0.1, objective="cost=5:1"),
            progress=False,
        )
        assert not result.improved
        record = result.classifier.training
        assert (record["abstention"]["target_error_rate"], record["abstention"]["rows"]) == (0.1, 16)
        assert record["threshold"]["objective"] == "cost=5:1"
        assert result.classifier.abstention[0] <= result.classifier.threshold <= result.classifier.abstention[1]
        assert plain.abstention is None

    def test_that_of_the_start_goes_on(self, backbone):
        start = train(
            pictures(120, seed=12),
            backbone=backbone,
            config=TrainConfig(taps="mean:3", heads="linear", target_error_rate=0.08, objective="cost=2:1"),
            label_names=("no", "yes"),
            progress=False,
        ).classifier
        worse = copy.copy(start)
        worse.temperature = start.temperature * 9  # so that fine-tuning makes it better
        result = finetune(worse, self.rows, VALIDATION, config=self.config, progress=False)
        assert result.improved
        record = result.classifier.training
        assert (record["abstention"]["target_error_rate"], record["threshold"]["objective"]) == (0.08, "cost=2:1")
        assert result.classifier.label_names == ("no", "yes")
        assert any("as the start does" in note for note in result.notes)
        earlier = copy.copy(start)  # of before the rate had this name
        earlier.training = start.training | {"abstention": {"max_error": 0.08, "rows": 16}}
        assert Answers.of(earlier, self.config, None).target_error_rate == 0.08
        never = finetune(worse, self.rows, VALIDATION, config=replace(self.config, target_error_rate=0), progress=False)
        assert never.classifier.abstention is None
        assert "abstention" not in never.classifier.training
        few = finetune(worse, ROWS, VALIDATION, config=FULL, progress=False)
        assert few.improved
        assert few.classifier.abstention is None
        assert any("no abstention, though the start abstains" in note for note in few.notes)
        assert finetune(start, self.rows, VALIDATION, config=NOTHING, progress=False).classifier is start

    def test_rows_that_the_start_has_seen_do_not_set_its_band(self, backbone):
        """Neither with the head trained again without them, since it is the start that is kept."""
        start = train(
            self.rows, backbone=backbone, config=TrainConfig(taps="mean:3", heads="linear"), progress=False
        ).classifier
        result = finetune(start, self.rows, config=replace(NOTHING, target_error_rate=0.1), progress=False)
        assert not result.improved
        assert result.classifier.abstention is None
        (note,) = [note for note in result.notes if "no abstention" in note]
        assert note in result.classifier.training["notes"]

    def test_too_few_rows_are_an_error_before_any_training(self, plain):
        with pytest.raises(TrainingError, match="hold out at least 999 rows"):
            finetune(plain, self.rows, VALIDATION, config=replace(FULL, target_error_rate=0.001), progress=False)
        with pytest.raises(DataError, match="too few"):
            finetune(plain, self.rows[:2], VALIDATION, config=replace(FULL, target_error_rate=0.5), progress=False)

    def test_a_band_of_unknown_origin_is_spoken_of(self, plain):
        start = copy.copy(plain)
        start.abstention = (0.4, 0.6)
        result = finetune(start, ROWS, VALIDATION, config=FULL, progress=False)
        assert result.classifier.abstention is None
        assert any("give target_error_rate=" in note for note in result.notes)


class TestNames:
    """What the classes are called."""

    def test_those_of_the_start_stay_unless_others_are_given(self, backbone):
        start = start_at(backbone, Tap(3, "mean"), label_names=("blue", "red"))
        for config in (FULL, NOTHING):
            for given, names in ((None, ("blue", "red")), (("not red", "red"), ("not red", "red"))):
                result = finetune(start, ROWS, VALIDATION, config=config, label_names=given, progress=False)
                assert result.classifier.label_names == names
        assert start.label_names == ("blue", "red")

    def test_a_start_of_the_opposite_classes_is_refused(self, backbone):
        start = start_at(backbone, Tap(3, "mean"), label_names=("blue", "red"))
        with pytest.raises(ConfigError, match="the same names for the same classes"):
            finetune(start, ROWS, VALIDATION, label_names=("not blue", "blue"), progress=False)

    @pytest.mark.parametrize("validation", [VALIDATION, None], ids=["given", "held out"])
    def test_a_checkpoint_takes_names_and_threshold_too(self, backbone, validation):
        for config in (replace(LORA, epochs=1), NOTHING):
            result = finetune(
                backbone,
                pictures(40, seed=4),
                validation,
                config=replace(config, objective="cost=20:1"),
                probing=TrainConfig(taps="mean:3", heads="linear"),
                label_names=("not red", "red"),
                progress=False,
            )
            assert result.classifier.label_names == ("not red", "red")
            assert result.classifier.training["threshold"]["objective"] == "cost=20:1"
            assert result.classifier.threshold != 0.5


def test_a_calibrated_zero_shot_start_stays_one_where_its_head_is_fitted_again(backbone):
    rows = pictures(30, seed=6)
    options = TrainConfig(heads="calibrated", yes="a", no="b")
    start = train(rows, backbone=backbone, config=options, progress=False).classifier
    result = finetune(start, rows, config=replace(FULL, learning_rate=1e-3), progress=False)
    assert any("trained again without them" in note for note in result.notes)
    held_out = result.history[0]["validation_log_loss"]
    assert held_out == pytest.approx(loss_of(start, rows), abs=0.1)  # two numbers learn no rows by heart


def test_options_without_effect_are_named(plain):
    config = FinetuneConfig(method="full", rank=4, flips=True, epochs=1)
    assert config.unused() == [
        "rank=4 has no effect with method='full'",
        "flips=True has no effect with augment='none'",
    ]
    result = finetune(plain, ROWS, VALIDATION, config=replace(NOTHING, rank=4), progress=False)
    assert result.notes[0] == "rank=4 has no effect with method='full'"
    quantised = copy.copy(plain)
    quantised.backbone = copy.copy(plain.backbone)
    quantised.backbone.quantization = "8bit"
    result = finetune(quantised, ROWS, VALIDATION, config=NOTHING, progress=False)
    assert "trains and saves whole weights" in result.notes[0]


def test_qlora_from_what_was_fine_tuned_is_refused_before_training(plain):
    tuned = finetune(plain, ROWS, VALIDATION, config=replace(LORA, epochs=1), progress=False).classifier
    with pytest.raises(ConfigError, match="4 bits cannot hold what it has learned"):
        finetune(tuned, ROWS, VALIDATION, config=replace(LORA, method="qlora"), progress=False)


def test_validation_rows_among_the_training_rows_are_named(plain):
    result = finetune(plain, ROWS, [*ROWS[:4], *VALIDATION], config=NOTHING, progress=False)
    assert any("some validation rows are also training rows" in note for note in result.notes)


def test_a_constant_rate_rises_first(plain):
    """In its warm-up, as the others do."""
    config = replace(FULL, schedule="constant", warmup=0.9, epochs=1)
    slow = finetune(plain, ROWS, VALIDATION, config=config, progress=False)
    fast = finetune(plain, ROWS, VALIDATION, config=replace(config, warmup=0), progress=False)
    assert slow.history[1]["validation_log_loss"] != fast.history[1]["validation_log_loss"]
