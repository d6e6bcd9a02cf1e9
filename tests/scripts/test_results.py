"""The script behind docs/figures/results.md runs what is missing, once, and its intervals are right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from qwen_vl_classifier.scenes.statements import write_dataset

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
CHEAP = ("majority", "zero-shot", "recipe", "logistic", "probe")


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    """Let the modules of the scripts be imported, as a script there does."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture
def results():
    import results

    return results


@pytest.fixture
def intervals():
    import results_intervals

    return results_intervals


@pytest.fixture
def runs():
    import results_runs

    return results_runs


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two sets of synthetic scenes."""
    folder = tmp_path_factory.mktemp("sets")
    for number, name in enumerate(("first", "second")):
        for part, seed in (("train", number), ("dev", number + 2)):
            write_dataset(folder / name, split="test", name=part, seed=seed, scenes=12, per_scene=2)
    return folder


def weights_of(*rows: int) -> np.ndarray:
    return np.array([rows], dtype=np.float64)


# Intervals, by hand


def test_accuracy_counts_rows_as_often_as_they_are_drawn(intervals):
    labels, probabilities = np.array([1, 0, 1]), np.array([0.5, 0.7, 0.2])
    assert intervals.accuracy(labels, probabilities, 0.5, weights_of(1, 1, 1)) == pytest.approx([1 / 3])
    assert intervals.accuracy(labels, probabilities, 0.5, weights_of(2, 1, 0)) == pytest.approx([2 / 3])
    assert intervals.accuracy(labels, probabilities, 0.2, weights_of(1, 1, 1)) == pytest.approx([2 / 3])


def test_auroc_counts_ties_as_half(intervals):
    labels, probabilities = np.array([1, 0, 1, 0]), np.array([0.9, 0.5, 0.5, 0.1])
    # pairs: 0.9 > 0.5, 0.9 > 0.1, 0.5 = 0.5, 0.5 > 0.1
    assert intervals.auroc(labels, probabilities, 0.5, weights_of(1, 1, 1, 1)) == pytest.approx([3.5 / 4])
    # the second row twice: (1 x 2 + 1 + 0.5 x 2 + 1) of 6 pairs
    assert intervals.auroc(labels, probabilities, 0.5, weights_of(1, 2, 1, 1)) == pytest.approx([5 / 6])


def test_auroc_agrees_with_scikit_learn_on_repeated_rows(intervals):
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(0, 2, 50), rng.integers(0, 10, 50) / 10
    weights = rng.integers(0, 4, (3, 50))
    expected = [roc_auc_score(labels.repeat(times), probabilities.repeat(times)) for times in weights]
    assert intervals.auroc(labels, probabilities, 0.5, weights.astype(float)) == pytest.approx(expected)


def test_calibration_error_weighs_bins_by_their_rows(intervals):
    # Fifteen bins of two rows: (0.5 and 0.52, one of each class), (0.6, 0.6), (0.7, 0.7), ... all of class 1
    probabilities = np.array([0.50, 0.52, *np.repeat(np.linspace(0.6, 0.99, 14), 2)])
    labels = np.array([0, 1, *[1] * 28])
    gaps = [0.02 / 2, *(1 - np.linspace(0.6, 0.99, 14))]
    found = intervals.expected_calibration_error(labels, probabilities, 0.5, np.ones((1, 30)))
    assert found == pytest.approx([np.mean(gaps)])
    drawn = weights_of(3, 0, *[0] * 26, 1, 0)  # three times off by 0.5, once by 0.01
    found = intervals.expected_calibration_error(labels, probabilities, 0.5, drawn)
    assert found == pytest.approx([(3 * 0.5 + 0.01) / 4])


def test_calibration_error_of_one_probability_is_that_of_the_share(intervals):
    labels = np.array([0, 1, 1, 1] * 10)
    found = intervals.expected_calibration_error(labels, np.full(40, 0.5), 0.5, np.ones((1, 40)))
    assert found == pytest.approx([0.25])


def scored(intervals, *seeds, threshold=0.5):
    return intervals.Scored(np.array(seeds, dtype=np.float64), np.full(len(seeds), threshold))


def test_value_is_the_mean_over_seeds(intervals):
    labels = np.array([0, 1] * 10)
    bootstrap = intervals.Bootstrap(labels, np.arange(20))
    right, wrong = labels * 0.8 + 0.1, 0.9 - labels * 0.8
    estimate = bootstrap.estimate(scored(intervals, right, right, wrong, right))
    assert estimate["accuracy"].value == pytest.approx(0.75)
    assert estimate["auroc"].value == pytest.approx(0.75)
    assert estimate["ece"].value == pytest.approx((3 * 0.1 + 0.9) / 4)


def test_interval_of_independent_rows_is_the_binomial_one(intervals):
    labels = np.array([0, 1] * 200)
    said = np.where(np.arange(400) % 4 < 3, labels, 1 - labels) * 0.8 + 0.1  # three of four are right
    accuracy = intervals.Bootstrap(labels, np.arange(400)).estimate(scored(intervals, said))["accuracy"]
    error = np.sqrt(0.75 * 0.25 / 400)
    assert accuracy.error == pytest.approx(error, rel=0.05)
    assert (accuracy.low, accuracy.high) == pytest.approx((0.75 - 1.96 * error, 0.75 + 1.96 * error), abs=0.005)


def test_rows_of_a_group_count_as_one(intervals):
    groups = np.arange(100).repeat(4)
    labels = np.array([0, 1, 0, 1] * 100)
    said = np.where(groups % 4 < 3, labels, 1 - labels) * 0.8 + 0.1  # groups are right or wrong as a whole
    together, apart = (
        intervals.Bootstrap(labels, numbers).estimate(scored(intervals, said))["accuracy"].error
        for numbers in (groups, np.arange(400))
    )
    assert together == pytest.approx(2 * apart, rel=0.05)  # a quarter of the independent pieces


def test_unlike_seeds_widen_the_interval(intervals):
    labels = np.array([0, 1] * 200)
    said = np.where(np.arange(400) % 4 < 3, labels, 1 - labels) * 0.8 + 0.1
    better = labels * 0.8 + 0.1
    bootstrap = intervals.Bootstrap(labels, np.arange(400))
    alike = bootstrap.estimate(scored(intervals, said, said))["accuracy"]
    unlike = bootstrap.estimate(scored(intervals, said, better))["accuracy"]
    assert unlike.value == pytest.approx(0.875)
    assert unlike.error > 3 * alike.error


def test_difference_is_paired(intervals):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    said = np.clip(labels * 0.2 + rng.random(300) * 0.8, 0, 1)
    bootstrap = intervals.Bootstrap(labels, np.arange(300))
    same = bootstrap.difference(scored(intervals, said), scored(intervals, said))
    assert all((one.value, one.low, one.high, one.error) == (0, 0, 0, 0) for one in same.values())
    off = said.copy()
    off[:30] = 1 - labels[:30]
    worse = bootstrap.difference(scored(intervals, off), scored(intervals, said))["accuracy"]
    right = ((said >= 0.5) == labels)[:30]
    assert worse.value == pytest.approx(-right.sum() / 300)
    assert worse.error < bootstrap.estimate(scored(intervals, said))["accuracy"].error


def test_calibration_error_lies_in_its_interval(intervals):
    rng = np.random.default_rng(0)
    said = rng.random(300)
    labels = (rng.random(300) < said).astype(np.int64)
    ece = intervals.Bootstrap(labels, np.arange(300)).estimate(scored(intervals, said))["ece"]
    assert ece.low < ece.value < ece.high


def test_draws_of_one_class_are_left_out(intervals):
    labels = np.array([0, 0, 1])
    estimate = intervals.Bootstrap(labels, np.arange(3)).estimate(scored(intervals, [0.1, 0.6, 0.5]))
    assert all(np.isfinite([one.value, one.low, one.high, one.error]).all() for one in estimate.values())


# What is run, and in which order


def test_plan_runs_what_is_cheap_first_and_what_is_needed(runs):
    planned = runs.plan(["a", "b"], ["lora"], [0, 1], model="m", dtype="float32", limit=0)
    assert [str(run) for run in planned] == [
        "a features",
        "a probe seed 0",
        "a probe seed 1",
        "b features",
        "b probe seed 0",
        "b probe seed 1",
        "a lora seed 0",
        "a lora seed 1",
        "b lora seed 0",
        "b lora seed 1",
    ]


def test_other_options_are_another_run(runs):
    one = runs.Run("a", "lora", 0, "m", "float32", options={"epochs": 1})
    other = runs.Run("a", "lora", 0, "m", "float32", options={"epochs": 2})
    assert one.key != other.key


def test_run_file_survives_a_kill_while_it_writes(runs, tmp_path):
    path = tmp_path / "runs.jsonl"
    first, second = (runs.Run("a", "probe", seed, "m", "float32") for seed in (0, 1))
    runs.RunFile(path).add(first, {"seconds": 1.0})
    with path.open("a") as file:
        file.write('{"run": {"set": "a", "meth')
    file = runs.RunFile(path)
    assert file.get(second) is None
    file.add(second, {"seconds": 2.0})
    assert [runs.RunFile(path).get(run)["seconds"] for run in (first, second)] == [1.0, 2.0]


def test_run_file_refuses_other_lines(runs, tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"something": "else"}\n')
    with pytest.raises(ValueError, match="line 1 is not a run"):
        runs.RunFile(path)


# The whole way


@pytest.mark.soak
def test_cheap_methods_run_once_and_go_on(results, data, tmp_path, capsys):
    work = tmp_path / "work"
    command = ["--data", str(data), "--work", str(work), "--sets", "first", "second", "--limit", "16"]
    assert results.main([*command, "--methods", *CHEAP, "--seeds", "0"]) == 0
    assert "0 of 12 runs are done" in capsys.readouterr().out
    before = (work / "runs.jsonl").read_text()
    records = [json.loads(line) for line in before.splitlines()]
    assert [(record["run"]["set"], record["run"]["method"]) for record in records] == [
        (name, method) for name in ("first", "second") for method in ("majority", "zero-shot", "features", *CHEAP[2:])
    ]
    assert {len(record["probabilities"]) for record in records if "probabilities" in record} == {16}
    assert all(record["seconds"] >= 0 and record["threads"] > 0 for record in records)

    assert results.main([*command, "--methods", *CHEAP, "--seeds", "0"]) == 0
    assert "12 of 12 runs are done" in capsys.readouterr().out
    assert (work / "runs.jsonl").read_text() == before

    assert results.main([*command, "--methods", "recipe", "--seeds", "0", "1"]) == 0
    assert "4 of 6 runs are done" in capsys.readouterr().out
    after = (work / "runs.jsonl").read_text()
    assert after.startswith(before)
    assert after.count("\n") == before.count("\n") + 2


@pytest.mark.soak
def test_fine_tuning_starts_from_the_probe_of_its_seed(results, data, tmp_path, capsys):
    work = tmp_path / "work"
    command = ["--data", str(data), "--work", str(work), "--sets", "first", "--limit", "16"]
    assert results.main([*command, "--methods", "full", "--seeds", "3"]) == 0
    assert "full fine-tuning |" in capsys.readouterr().out
    records = [json.loads(line) for line in (work / "runs.jsonl").read_text().splitlines()]
    probe, full = records[-2:]
    assert [(record["run"]["method"], record["run"]["seed"]) for record in (probe, full)] == [("probe", 3), ("full", 3)]
    assert probe["tap"] == full["tap"]
    assert len(list((work / "probes").glob("first-3-*/classifier.json"))) == 1


def test_a_trial_keeps_a_probe_of_its_own(runs, tmp_path):
    data = runs.DataSet(tmp_path, tmp_path, tmp_path)
    whole, trial = (runs.Run("a", "lora", 0, "m", "float32", limit) for limit in (0, 16))
    probe = runs.Run("a", "probe", 0, "m", "float32", options=runs.PROBES["probe"])
    assert data.start_of(whole) == data.start_of(probe) != data.start_of(trial)


def test_rows_of_one_class_fail_and_the_rest_goes_on(results, data, tmp_path, capsys):
    sets = tmp_path / "sets"
    shutil.copytree(data, sets)
    for part in ("train", "dev"):
        rows = [json.loads(line) | {"label": 1} for line in (sets / "first" / f"{part}.jsonl").read_text().splitlines()]
        (sets / "first" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--data", str(sets), "--work", str(tmp_path / "work"), "--sets", "first", "second"]
    assert results.main([*command, "--methods", "majority"]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("first majority: all 24 train examples have label 1")
    assert "### second, 24 dev rows" in captured.out


def line_of(runs, method, seed, probabilities, seconds, **more):
    number = 0 if method in runs.UNSEEDED else seed
    options = runs.PROBES.get(method) or runs.FINETUNES.get(method) or {}
    run = runs.Run("first", method, number, "m", "float32", options=options)
    said = {"labels": [0, 1] * 4, "groups": [*range(8)], "probabilities": probabilities, "threshold": 0.5}
    made = {"seconds": seconds, "threads": 2, "versions": {"torch": "2.13"}, "machine": "x86_64", **more}
    return run, {**made, **(said if probabilities else {})}


def test_tables_gather_what_a_method_needs(results, runs, tmp_path, capsys):
    right, half = [0.1, 0.9] * 4, [0.9, 0.9] * 4
    place = {"tap": "mean:4", "head": "mlp"}
    file = runs.RunFile(tmp_path / "runs.jsonl")
    for line in (
        line_of(runs, "majority", 0, [0.5] * 8, 0),
        line_of(runs, "features", 0, [], 60),
        line_of(runs, "recipe", 0, half, 30, **place),
        line_of(runs, "recipe", 1, half, 90, **place),
        line_of(runs, "probe", 0, right, 120, **place),
        line_of(runs, "probe", 1, half, 120, **place),
        line_of(runs, "lora", 0, right, 600, **place, improved=False),
    ):
        file.add(*line)
    done = ["--data", "nowhere", "--work", str(tmp_path), "--sets", "first", "--model", "m", "--no-run"]
    assert results.main([*done, "--seeds", "0", "1"]) == 0
    printed = capsys.readouterr().out
    rows = {line.split(" | ")[0].strip("| "): line for line in printed.splitlines() if line.count("|") == 8}
    assert rows["majority"].startswith("| majority | 0.500 (")
    assert rows["original recipe"].endswith("| 2.00 | 2 | `mean:4` mlp |")  # 1 for features, 1 on average
    assert rows["auto probe"].startswith("| auto probe | 0.750 (")
    assert rows["auto probe"].endswith("| 3.00 | 2 | `mean:4` mlp |")
    assert rows["LoRA"].endswith("| 13.00 | 1 | `mean:4` mlp; 1 of 1 kept the probe |")
    assert "### Auto probe against original recipe" in printed
    assert "| first | +0.250 ± " in printed
    assert "| first | +0.000 ± 0.000 |" in printed  # LoRA against the probe of the one seed that both have
    assert "Threads: 2, on x86_64. Made with torch 2.13." in printed


def test_write_replaces_what_is_between_the_marks(results, tmp_path, monkeypatch, capsys):
    document = tmp_path / "results.md"
    document.write_text(f"before\n{results.BEGIN}old\n{results.END}after\n")
    monkeypatch.setattr(results, "DOCUMENT", document)
    assert results.main(["--data", "nowhere", "--work", str(tmp_path), "--no-run", "--write"]) == 0
    assert document.read_text() == f"before\n{results.BEGIN}Nothing is measured yet.\n{results.END}after\n"
    assert capsys.readouterr().out.startswith("Nothing is measured yet.")


def test_document_has_the_marks(results):
    text = results.DOCUMENT.read_text(encoding="utf-8")
    assert text.count(results.BEGIN) == text.count(results.END) == 1


def test_missing_set_is_one_line(results, data, tmp_path, capsys):
    assert results.main(["--data", str(data), "--work", str(tmp_path / "work"), "--sets", "first", "third"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert f"{data / 'third'} has no train.jsonl and no dev.jsonl; expected" in captured.err
    assert not (tmp_path / "work").exists()
