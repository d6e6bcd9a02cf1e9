"""The script behind docs/explanation/labelling.md labels by the loop and at random, and counts labels rightly."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from qwen_vl_classifier.scenes.statements import write_dataset

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    """Let the modules of the scripts be imported, as a script there does."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture
def efficiency():
    import label_efficiency

    return label_efficiency


@pytest.fixture
def runs():
    import label_efficiency_runs

    return label_efficiency_runs


def record_of(order: str, *points: float, name: str = "first", full=(0.9, 0.8, 1.0), start: float = 0.5, **more):
    """Return the record of a run that was measured every ten labels."""
    measured = [{"labels": 10 * number, "auroc": value} for number, value in enumerate((start, *points))]
    goal = {"start": start, "full": full}
    return {"set": name, "order": order, "seed": 0, "rows": 100, "goal": goal, "points": measured, **more}


def test_labels_count_from_where_the_goal_is_reached_twice(runs):
    assert runs.needed(record_of("loop", 0.7, 0.89, 0.8, 0.89, 0.88, 0.7)) == 40
    assert runs.needed(record_of("loop", 0.7, 0.8, 0.87)) is None  # 0.88 is to be reached
    assert runs.needed(record_of("loop", 0.9, 0.9, full=(0.52, 0.48, 0.56))) is None  # chance is as good


def test_measures_are_dense_at_first_and_end_with_the_pool(runs):
    counts = runs.counts_to_measure(1234)
    assert counts[:3] == [10, 20, 30]
    assert counts[-1] == 1234
    assert all(0 < later - earlier <= max(10, earlier / 5) for earlier, later in itertools.pairwise(counts))


def test_table_compares_medians_and_says_where_nothing_is_gained(efficiency):
    records = [
        record_of("random", 0.6, 0.7, 0.8, 0.9, 0.9),
        record_of("loop", 0.6, 0.9, 0.9),
        record_of("random", 0.5, name="second", full=(0.52, 0.48, 0.56)),
        record_of("random", 0.9, name="third", start=0.89),
    ]
    lines = [*efficiency.table(["first", "second", "third", "fourth"], records)][2:]
    assert lines == [
        "| first | 100 | 0.500 | 0.900 (0.800 to 1.000) | 0.880 | 40 (40 to 40) | 20 (20 to 20) | 0.50 | 1 |",
        "| second | 100 | 0.500 | 0.520 (0.480 to 0.560) | nothing to gain | | | | 1 |",
        "| third | 100 | 0.890 | 0.900 (0.800 to 1.000) | 0.880 | 0 | 0 | zero-shot is there already | 1 |",
    ]


def test_coverage_counts_intervals_that_hold_what_dev_says(efficiency):
    record = record_of("loop", 0.6, 0.7, seconds=[0.1, 0.3])
    for point, accuracy in zip(record["points"][1:], (0.6, 0.9), strict=True):
        point |= {"accuracy": accuracy, "estimate": {"accuracy": (0.7, 0.5, 0.8), "auroc": None}}
    assert [*efficiency.coverage_table(["first"], [record])][2:] == [
        f"| {name} | 2 | 50% | | 0.20 s | 0.29 s |" for name in ("first", "all")
    ]


def test_a_set_is_labelled_once_and_written_to_the_page(efficiency, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "WITHOUT_GOAL", 12)  # zero-shot of the built-in backbone knows these scenes
    for part, seed, scenes in (("train", 0, 12), ("dev", 1, 6)):
        write_dataset(tmp_path / "sets" / "first", split="test", name=part, seed=seed, scenes=scenes, per_scene=2)
    document = tmp_path / "labelling.md"
    document.write_text(f"before\n{efficiency.BEGIN}old\n{efficiency.END}after\n")
    monkeypatch.setattr(efficiency, "DOCUMENT", document)
    folders = ["--data", str(tmp_path / "sets"), "--work", str(tmp_path / "work"), "--sets", "first"]
    command = [*folders, "--seeds", "1", "--taps", "last:-1"]

    assert efficiency.main([*command, "--write"]) == 0
    tables, done = capsys.readouterr()
    assert "first loop 0" in done
    assert document.read_text() == f"before\n{efficiency.BEGIN}{tables[:-1]}{efficiency.END}after\n"

    assert efficiency.main(command) == 0
    assert capsys.readouterr() == (tables, "")
    assert efficiency.main([*command, "--random-share", "0.5", "--no-run"]) == 0
    assert "Nothing is measured" in capsys.readouterr().out
