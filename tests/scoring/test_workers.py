"""What workers do with shards: what is read ahead, what is written, what bad rows cost; jobs travel as JSON."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.classifier.panel import Panel
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.table import Columns
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.scoring.jobs import Pulse, RowError, Shard, ShardReport, Task, job_to_json
from qwen_vl_classifier.scoring.manifest import ScoreManifest
from qwen_vl_classifier.scoring.plan import make_plan
from qwen_vl_classifier.scoring.reading import ShardReader
from qwen_vl_classifier.scoring.shards import ShardFolder
from qwen_vl_classifier.scoring.workers import ExtractJob, ScoreJob, ScoreWorker, job_from_json
from tests.waiting import LIMIT, until

COLUMNS = Columns("image", "text", "label", "id")
MANIFEST = ScoreManifest((("spam", "a" * 64),), data="d" * 64, options={}, format="jsonl")


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"image": null, "text": "Text {row}."}}\n' for row in range(6)))
    return make_plan(path, COLUMNS, shard_size=2)


@pytest.fixture
def scorer(tmp_path, plan, tiny_classifier) -> Iterator[ScoreWorker]:
    folder = ShardFolder(tmp_path / "out", MANIFEST)
    folder.open()
    job = ScoreJob(
        classifiers=("spam",), device="cpu", source=plan.spec, out=str(tmp_path / "out"), manifest=MANIFEST.to_json()
    )
    yield ScoreWorker(job, panel=Panel([tiny_classifier]))
    folder.close()


def rows_of(tmp_path: Path, index: int) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out" / "shards" / f"{index:06d}.jsonl").read_text().splitlines()]


def run(worker: ScoreWorker, task: Task) -> ShardReport:
    (report,) = worker.run_all([task])
    return report


def test_a_shard_is_written_and_reported(tmp_path, plan, scorer):
    report = run(scorer, Task(plan[1]))
    assert (report.index, report.rows, report.errors) == (1, 2, 0)
    assert report.seconds > 0
    assert [row["row"] for row in rows_of(tmp_path, 1)] == [2, 3]


def test_excluded_rows_are_not_looked_at(tmp_path, plan, scorer, monkeypatch):
    looked: list[str] = []
    encode = scorer.panel.backbone.processor.encode
    monkeypatch.setattr(
        scorer.panel.backbone.processor,
        "encode",
        lambda example, more: looked.append(example.text) or encode(example, more),
    )
    report = run(scorer, Task(plan[0], {1: RowError("crashed", "it ends the process")}))
    assert report.errors == 1
    assert looked == ["Text 0."]
    assert [row["error_code"] for row in rows_of(tmp_path, 0)] == [None, "crashed"]
    excluded = {0: RowError("crashed", ""), 1: RowError("crashed", "")}
    assert run(scorer, Task(plan[0], excluded)).errors == 2


def test_the_pulse_names_the_row_that_is_being_prepared(plan, scorer, monkeypatch):
    """So that, where this never ends, the row is known."""
    named: list[int | None] = []
    encode = scorer.panel.backbone.processor.encode
    monkeypatch.setattr(
        scorer.panel.backbone.processor,
        "encode",
        lambda example, more: named.append(scorer.pulse.row) or encode(example, more),
    )
    run(scorer, Task(plan[1]))
    assert named == [2, 3]
    assert scorer.pulse.row is None


def test_the_pulse_names_the_row_whose_picture_is_being_fetched(tmp_path):
    """In order, though pictures are fetched side by side: it is the first that has not come."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"image": "http://a.example/{row}.png", "text": "A."}}\n' for row in range(3)))
    plan = make_plan(path, COLUMNS, shard_size=3, url_hosts=["a.example"])
    pulse, hangs = Pulse(), threading.Event()

    class Hanging:
        def fetch(self, url: str) -> bytes:
            if url.endswith("1.png"):
                assert hangs.wait(LIMIT)
            return b"picture"

    reader = ShardReader(plan.spec, fetcher=Hanging(), pulse=pulse)
    thread = threading.Thread(target=lambda: reader.fetch(reader.read(plan[0])))
    thread.start()
    until(lambda: pulse.row == 1, "the second row")
    hangs.set()
    thread.join()
    assert pulse.row is None


def test_the_pulse_counts_the_layers_of_a_pass(tmp_path, plan, tiny_classifier):
    """A pass may take long on a CPU, and is no reason to replace a worker."""
    ShardFolder(tmp_path / "out", MANIFEST).open()
    folder = tiny_classifier.save(tmp_path / "spam")
    job = ScoreJob(
        classifiers=(str(folder),),
        device="cpu",
        source=plan.spec,
        out=str(tmp_path / "out"),
        manifest=MANIFEST.to_json(),
    )
    worker = ScoreWorker(job)
    worker.load()
    before = worker.pulse.steps
    prepared = worker.panel.backbone.prepare([Example(None, "A claim.")])
    worker.panel.backbone.encode_prepared(prepared, [Tap(2, "mean")])
    assert worker.pulse.steps == before + 2


def test_the_next_shard_is_read_while_the_model_is_at_the_one_before(plan, scorer, monkeypatch):
    second = threading.Event()
    parts = ShardReader.parts

    def noting(self, shard):
        if shard.index == 1:
            second.set()
        return parts(self, shard)

    answer = Panel.own_probabilities_of
    waited = []

    def waiting(self, features):
        waited.append(second.wait(LIMIT))
        return answer(self, features)

    monkeypatch.setattr(ShardReader, "parts", noting)
    monkeypatch.setattr(Panel, "own_probabilities_of", waiting)
    assert [report.index for report in scorer.run_all(map(Task, plan))] == [0, 1, 2]
    assert waited
    assert all(waited)


def test_a_report_and_an_error_come_though_no_task_does(plan, scorer, monkeypatch):
    over, late = threading.Event(), []

    def tasks():
        yield Task(plan[0])
        yield Task(plan[1])
        late.append(not over.wait(LIMIT))

    reports = scorer.run_all(tasks(), endless=True)
    assert next(reports).index == 0
    monkeypatch.setattr(ShardFolder, "write", lambda *_: (_ for _ in ()).throw(ConfigError("the disk is full")))
    with pytest.raises(ConfigError, match="the disk is full"):
        next(reports)
    assert late == []
    over.set()


def test_a_probe_writes_nothing(tmp_path, plan, scorer):
    scored = scorer.probe(Task(plan[1], probe=range(1, 2)))
    assert [(row.row, len(row.predictions)) for row in scored] == [(3, 1)]
    assert not (tmp_path / "out" / "shards").exists()


def test_jobs_of_both_kinds_and_tasks_travel_as_json(plan, scorer):
    extraction = ExtractJob(
        backbone={"name": "x"}, taps="auto", device="cpu", source=plan.spec, features="kept", feature_dtype="float16"
    )
    for job in (scorer.job, extraction):
        assert job_from_json(json.loads(json.dumps(job_to_json(job)))) == job
    for task in (
        Task(plan[2]),
        Task(plan[1], {1: RowError("crashed", "gone")}, range(1, 2), careful=True),
        Task(Shard(7, 70, 0, ())),
    ):
        assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task


def test_secrets_of_a_store_are_not_shown(scorer):
    record = {**job_to_json(scorer.job), "storage_options": {"secret": "s3cr3t"}}
    assert "s3cr3t" not in repr(job_from_json(record))


def test_the_same_example_has_the_same_score_wherever_it_stands_in_a_shard(tmp_path, tiny_classifier):
    texts = [f"Text {row} {'word ' * (row % 37)}." for row in range(530)]
    texts[520] = texts[3]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"image": None, "text": text}) + "\n" for text in texts))
    plan = make_plan(path, COLUMNS, shard_size=1000)
    folder = ShardFolder(tmp_path / "out", MANIFEST)
    folder.open()
    job = ScoreJob(
        classifiers=("spam",), device="cpu", source=plan.spec, out=str(tmp_path / "out"), manifest=MANIFEST.to_json()
    )
    run(ScoreWorker(job, panel=Panel([tiny_classifier])), Task(plan[0]))
    folder.close()
    rows = rows_of(tmp_path, 0)
    assert len(rows) == 530
    assert rows[520]["probability"] == rows[3]["probability"] != rows[4]["probability"]
