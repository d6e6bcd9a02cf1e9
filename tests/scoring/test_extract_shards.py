"""Features by shards: those that one process would keep, whatever rows are bad and however many workers there are."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.config.score import ScoreConfig
from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.table import Columns
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.features.extraction import extract_features
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.scoring import local
from qwen_vl_classifier.scoring.jobs import RowError, Task
from qwen_vl_classifier.scoring.plan import Plan, make_plan
from qwen_vl_classifier.scoring.run import extract_shards
from qwen_vl_classifier.scoring.workers import ExtractJob
from tests import crash_points

FAULTY = Path(__file__).with_name("faulty_worker.py")
COLUMNS = Columns("image", "text", "label", "id")
TINY = {"name": "builtin:tiny", "dtype": "float32"}
PICTURES = 5
GOOD = [0, 1, 2, 3, 6, 7, 8, 9]
"""Rows whose picture is neither damaged (the third) nor missing."""
BAD = [4, 5, 10]


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        Image.fromarray(rng.integers(0, 255, (56, 84, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    damaged = folder / "2.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    rows = [{"image": f"{row // 2}.png", "text": f"Text {row}.", "id": f"r{row}"} for row in range(2 * PICTURES)]
    rows.append({"image": "gone.png", "text": "No picture."})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def job(plan: Plan, store: Path, taps: str = "mean:-1,last:2", **options) -> ExtractJob:
    return ExtractJob(
        backbone=TINY, taps=taps, device="cpu", source=plan.spec, features=str(store), threads=1, **options
    )


def good_examples(data: Path) -> list[Example]:
    return [Example(data.parent / f"{row // 2}.png", f"Text {row}.") for row in GOOD]


def test_shards_give_the_features_of_one_process_and_count_bad_rows(tmp_path, data, tiny_backbone, one_thread):
    plan = make_plan(data, COLUMNS, shard_size=3)
    reports = list(job(plan, tmp_path / "store").worker().run_all(map(Task, plan)))
    assert [(report.index, report.rows, report.errors) for report in reports] == [
        (0, 3, 0),
        (1, 3, 2),
        (2, 3, 0),
        (3, 2, 1),
    ]
    store = FeatureStore(tmp_path / "store")
    assert len(store) == 2 * len(GOOD)
    taps = [Tap(-1, "mean"), Tap(2, "last")]
    kept = extract_features(good_examples(data), tiny_backbone, taps, store=store, progress=False)
    assert store.written == 0
    np.testing.assert_allclose(kept, tiny_backbone.encode(good_examples(data), taps), rtol=1e-4, atol=1e-5)


def test_excluded_rows_are_left_out_and_a_probe_keeps_nothing(tmp_path, data):
    plan = make_plan(data, COLUMNS, shard_size=4)
    worker = job(plan, tmp_path / "store").worker()
    worker.probe(Task(plan[0], probe=range(2)))
    assert len(FeatureStore(tmp_path / "store")) == 0
    (report,) = worker.run_all([Task(plan[0], {1: RowError("crashed", "")})])
    assert (report.rows, report.errors) == (4, 1)
    assert len(FeatureStore(tmp_path / "store")) == 2 * 3


def test_taps_are_checked_by_the_backbone(tmp_path, data):
    worker = job(make_plan(data, COLUMNS, shard_size=3), tmp_path / "store", taps="mean:99").worker()
    with pytest.raises(ConfigError, match=r"^tap mean:99: builtin:tiny has"):
        worker.load()


def run(capsys, *arguments: object, status: int = 0):
    flags = ["--device", "cpu", "--dtype", "float32", "--threads", "1"]
    assert main(["extract", *map(str, arguments), *flags]) == status
    return capsys.readouterr()


def fill(capsys, data: Path, store: Path, engine: str) -> None:
    """Fill a store with two workers, and look at what is there and what is said."""
    arguments = ("--workers", 2, "--shard-size", 2, "--engine", engine, "--features", store, "--max-errors", 3)
    told = run(capsys, data, *arguments)
    assert f"store: {2 * len(GOOD)} features of 11 rows added, " in told.out
    left_out = told.err[told.err.index("left out 3 of 11 rows:") :].splitlines()
    assert [line.split(":")[0].strip() for line in left_out[1:4]] == [f"row {row + 1}" for row in BAD]
    assert len(FeatureStore(store)) == 2 * len(GOOD)
    assert {path.suffix for path in store.iterdir()} == {".parquet"}


@pytest.mark.soak
@pytest.mark.parametrize(
    ("moment", "device", "workers"),
    [
        ("before the rename", "cpu,cpu", 0),
        *((one, "cpu", 2) for one in crash_points.MOMENTS),
    ],
)
def test_workers_fill_a_store_though_one_is_killed(tmp_path, data, monkeypatch, moment, device, workers):
    barrier = tmp_path / "barrier"
    monkeypatch.setattr(local, "WORKER", (sys.executable, "-P", str(FAULTY)))
    for name, value in crash_points.settings((moment, ".parquet", barrier)).items():
        monkeypatch.setenv(name, value)
    killer = threading.Thread(target=crash_points.kill_at, args=[barrier])
    killer.start()
    store, bad = FeatureStore(tmp_path / "store"), BadRows(max_errors=3)
    config = ScoreConfig(workers=workers, threads=1, shard_size=4)
    done = extract_shards(
        data, store, taps="mean:-1,last:-1", backbone=TINY, config=config, device=device, columns=COLUMNS, bad=bad
    )
    killer.join()
    assert done == {"rows": 11, "features": 2 * len(GOOD)}
    assert [row.position for row in bad] == BAD
    assert {path.suffix for path in (tmp_path / "store").iterdir()} == {".parquet"}


@pytest.mark.soak
def test_two_workers_fill_one_store(tmp_path, data, capsys):
    fill(capsys, data, tmp_path / "store", "local")


@pytest.mark.soak
def test_two_actors_fill_one_store(tmp_path, data, capsys):
    fill(capsys, data, tmp_path / "store", "ray")


@pytest.mark.soak
def test_a_second_run_adds_nothing(tmp_path, data, capsys):
    workers = ("--workers", 2, "--shard-size", 2, "--features", tmp_path / "store")
    told = run(capsys, data, *workers, status=2)
    assert "3 of 11 rows cannot be used:" in told.err
    assert "or leave them out with --max-errors" in told.err
    told = run(capsys, data, *workers, "--max-errors", "30%")
    assert "store: 0 features of 11 rows added, " in told.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--engine", "ray"],
            "--device cpu,cpu with --engine ray: Ray gives each worker its GPUs; give --device",
        ),
        (["--workers", "3"], "device 'cpu,cpu' with workers 3: 2 devices cannot have the same number of workers each"),
    ],
)
def test_devices_and_workers_that_contradict_each_other(tmp_path, data, capsys, flags, message):
    arguments = ["extract", str(data), "--features", str(tmp_path / "store"), "--device", "cpu,cpu", *flags]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
