"""Whole runs: what stops them, what they refuse, what they estimate, and what becomes of rows that do not fit."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qwen_vl_classifier.backbone import windows
from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.classifier.panel import Panel
from qwen_vl_classifier.config.score import ScoreConfig
from qwen_vl_classifier.data.loading import load_examples
from qwen_vl_classifier.errors import (
    ConfigError,
    DataError,
    ErrorLimitError,
    OutOfMemoryError,
    ScoringError,
    StoppedError,
)
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.scoring.reading import ShardReader
from qwen_vl_classifier.scoring.run import score
from qwen_vl_classifier.scoring.shards import ShardFolder

ROWS = 8


@pytest.fixture
def data(tmp_path) -> Path:
    """Eight rows about four pictures, twice over; rows 2 and 5 have none that can be read."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        pixels = rng.integers(0, 255, (40 + 20 * number, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    images = [f"{row % 4}.png" for row in range(ROWS)]
    images[2] = images[5] = "gone.png"
    path = folder / "rows.jsonl"
    rows = ({"id": f"row {row}", "image": image, "text": f"Text {row}."} for row, image in enumerate(images))
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def run(classifier, data, out, *, config=None, **options):
    return score(classifier, data, out, config=ScoreConfig(**(config or {"shard_size": 2})), progress=False, **options)


def written(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "shards").iterdir())


def rows_of(out: Path) -> list[dict]:
    return pq.read_table(out / "shards").to_pylist()


def test_rows_of_one_picture_share_its_pass_wherever_they_stand(tmp_path, data, tiny_classifier, monkeypatch):
    opened: list[str] = []
    read = windows.Processor.read_pictures
    monkeypatch.setattr(
        windows.Processor,
        "read_pictures",
        lambda self, example, **how: opened.append(example.image) or read(self, example, **how),
    )
    monkeypatch.setattr("qwen_vl_classifier.backbone.windows.WINDOW_EXAMPLES", 3)
    run(tiny_classifier, data, tmp_path / "out", config={"shard_size": ROWS})
    assert sorted(Path(name).name for name in opened) == [
        "0.png",
        "1.png",
        "2.png",
        "3.png",
    ]  # once each, of eight rows
    rows = rows_of(tmp_path / "out")
    assert [row["id"] for row in rows] == [f"row {row}" for row in range(ROWS)]
    good = [json.loads(line) for line in data.read_text().splitlines() if "gone" not in line]
    expected = tiny_classifier.predict_proba(
        load_examples([{**row, "image": data.parent / row["image"]} for row in good])
    )
    assert [row["probability"] for row in rows if not row["error"]] == pytest.approx(expected[:, 1].tolist(), rel=1e-4)


def test_too_many_errors_stop_the_run_and_keep_what_was_done(tmp_path, data, tiny_classifier):
    out = tmp_path / "out"
    with pytest.raises(ErrorLimitError) as caught:
        run(tiny_classifier, data, out, config={"shard_size": 2, "max_errors": "0"})
    assert str(caught.value) == (
        f"{out}: 1 of the 4 rows scored so far have errors, more than max_errors='0' allows; 2 of 4 shards are kept; "
        "correct the data or raise the limit, then run again"
    )
    assert written(out) == ["000000.parquet", "000001.parquet"]
    summary = run(tiny_classifier, data, out, config={"shard_size": 2, "max_errors": "25%"})
    assert summary == {"rows": ROWS, "errors": 2, "shards_written": 2, "shards_there": 2}


def test_a_finished_run_with_too_many_errors_says_so_again(tmp_path, data, tiny_classifier, monkeypatch):
    run(tiny_classifier, data, tmp_path / "out")
    with pytest.raises(ErrorLimitError, match=r"2 of the 8 rows scored so far have errors.*; 4 of 4 shards are kept"):
        run(tiny_classifier, data, tmp_path / "out", config={"shard_size": 2, "max_errors": "24%"})


def test_a_stop_keeps_what_was_done(tmp_path, data, tiny_classifier):
    out = tmp_path / "out"
    with pytest.raises(StoppedError, match=r"stopped; 3 of 4 shards are kept; run again to continue$"):
        run(tiny_classifier, data, out, should_stop=lambda: (out / "shards" / "000002.parquet").exists())
    assert len(written(out)) == 3
    assert run(tiny_classifier, data, out, resume=True)["shards_written"] == 1


def test_resume_wants_something_to_resume(tmp_path, data, tiny_classifier):
    with pytest.raises(ConfigError, match="nothing to resume"):
        run(tiny_classifier, data, tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [{"workers": 2}, {"engine": "ray"}])
def test_what_is_in_memory_stays_in_this_process(tmp_path, data, tiny_classifier, config):
    with pytest.raises(ConfigError, match="are scored in this process; write the rows to a file"):
        run(tiny_classifier, data, tmp_path / "out", config=config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["cpu,cpu", "all"])
def test_what_is_in_memory_has_one_device(tmp_path, data, tiny_classifier, device):
    with pytest.raises(ConfigError, match=r"classifiers in memory are scored in this process, on one device; "):
        score(tiny_classifier, data, tmp_path / "out", device=device)
    assert not (tmp_path / "out").exists()


def test_a_second_run_at_the_same_time_is_refused(tmp_path, data, tiny_classifier, monkeypatch):
    def score_again(self, shard):
        return run(tiny_classifier, data, tmp_path / "out")

    monkeypatch.setattr(ShardReader, "parts", score_again)
    with pytest.raises(ConfigError, match="another run is writing here"):
        run(tiny_classifier, data, tmp_path / "out")


def test_data_that_changes_under_way_ends_the_run(tmp_path, data, tiny_classifier):
    out = tmp_path / "out"

    def cut_off() -> bool:
        data.write_text(data.read_text()[:100])
        return False

    with pytest.raises(DataError, match="has changed since its shards were planned"):
        run(tiny_classifier, data, out, should_stop=cut_off)


def test_a_dry_run_estimates_and_writes_nothing(tmp_path, data, tiny_classifier):
    found = run(tiny_classifier, data, tmp_path / "out", config={"shard_size": 2, "dry_run": True})
    assert not (tmp_path / "out").exists()
    assert 0 < found.pop("seconds") < math.inf
    size = found.pop("bytes")
    expected = {"rows": ROWS, "shards": 4, "shards_there": 0, "workers": 1, "errors": 0.25, "rows_sampled": ROWS}
    assert found == expected
    run(tiny_classifier, data, tmp_path / "out")
    real = sum(path.stat().st_size for path in (tmp_path / "out" / "shards").iterdir())
    assert size == pytest.approx(real, rel=0.05)
    again = run(tiny_classifier, data, tmp_path / "out", config={"shard_size": 2, "dry_run": True})
    assert (again["shards_there"], again["seconds"]) == (4, 0)


def test_features_are_kept_and_used_again(tmp_path, data, tiny_classifier, monkeypatch):
    config = {"shard_size": ROWS, "features": str(tmp_path / "features")}
    run(tiny_classifier, data, tmp_path / "out", config=config)
    assert len(FeatureStore(tmp_path / "features")) == 6
    monkeypatch.setattr(Backbone, "encode_prepared", lambda *_, **__: pytest.fail("encoded again"))
    run(tiny_classifier, data, tmp_path / "again", config=config)
    assert rows_of(tmp_path / "again") == rows_of(tmp_path / "out")
    assert {row["probability"] for row in rows_of(tmp_path / "out")} > {None}


def test_a_row_that_does_not_fit_alone_is_an_error(tmp_path, data, tiny_classifier, monkeypatch):
    encode = Backbone.encode_prepared

    def little_memory(self, prepared, taps, **options):
        if any(item.pictures.grids and item.pictures.grids[0][1] > 8 for item in prepared):
            raise OutOfMemoryError("out of memory while encoding 1 examples: take a smaller checkpoint")
        return encode(self, prepared, taps, **options)

    monkeypatch.setattr(Backbone, "encode_prepared", little_memory)
    run(tiny_classifier, data, tmp_path / "out", config={"shard_size": ROWS})
    codes = [row["error_code"] for row in rows_of(tmp_path / "out")]
    assert codes.count("image_missing") == 2
    assert 0 < codes.count("out_of_memory") < 6
    assert codes.count(None) == 6 - codes.count("out_of_memory")
    assert rows_of(tmp_path / "out")[codes.index("out_of_memory")]["error"].startswith("out of memory while encoding")


def test_an_answer_that_is_no_number_is_an_error(tmp_path, data, tiny_classifier, monkeypatch):
    probabilities_of = Panel.own_probabilities_of

    def broken(self, features):
        probabilities = probabilities_of(self, features)
        probabilities[1] = math.nan
        return probabilities

    monkeypatch.setattr(Panel, "own_probabilities_of", broken)
    run(tiny_classifier, data, tmp_path / "out", config={"shard_size": ROWS})
    codes = [row["error_code"] for row in rows_of(tmp_path / "out")]
    assert sorted(filter(None, codes)) == ["image_missing", "image_missing", "not_finite"]


def test_other_formats_hold_the_same(tmp_path, data, tiny_classifier):
    run(tiny_classifier, data, tmp_path / "parquet")
    run(tiny_classifier, data, tmp_path / "jsonl", config={"shard_size": 2, "format": "jsonl"})
    lines = "".join(path.read_text() for path in sorted((tmp_path / "jsonl" / "shards").iterdir())).splitlines()
    assert [json.loads(line) for line in lines] == rows_of(tmp_path / "parquet")
    assert run(tiny_classifier, data, tmp_path / "csv", config={"shard_size": 3, "format": "csv"})["errors"] == 2
    assert run(tiny_classifier, data, tmp_path / "csv", config={"shard_size": 3, "format": "csv"})["errors"] == 2
    assert written(tmp_path / "csv") == ["000000.csv", "000001.csv", "000002.csv"]


def test_progress_counts_rows_and_errors(tmp_path, data, tiny_classifier, monkeypatch, capsys):
    monkeypatch.setattr("qwen_vl_classifier.scoring.progress._DELAY", 0)
    run_with_bar = {"config": ScoreConfig(shard_size=2), "progress": True}
    score(tiny_classifier, data, tmp_path / "out", **run_with_bar)
    shown = capsys.readouterr().err
    assert "8/8" in shown
    assert "errors=2" in shown
    assert "row/s" in shown


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv"])
def test_a_damaged_shard_is_named_set_aside_and_scored_again(tmp_path, data, tiny_classifier, form, caplog):
    out, config = tmp_path / "out", {"shard_size": 2, "format": form}
    run(tiny_classifier, data, out, config=config)
    place = out / "shards" / f"000001.{form}"
    before, status = place.read_bytes(), place.stat()
    damaged = before[:-40] + bytes([before[-40] ^ 1]) + before[-39:]  # of Parquet, the footer
    place.write_bytes(damaged)
    os.utime(place, ns=(status.st_atime_ns, status.st_mtime_ns))
    summary = run(tiny_classifier, data, out, config=config)
    assert summary == {"rows": ROWS, "errors": 2, "shards_written": 1, "shards_there": 3}
    assert caplog.messages == [f"{out}: damaged, set aside in damaged/ and scored again: shards/000001.{form}"]
    assert place.read_bytes() == before
    assert [path.read_bytes() for path in (out / "damaged").iterdir()] == [damaged]


@pytest.mark.parametrize("gone", ["", "shards", "shards/000000.parquet", "manifest.json", ".lock"])
def test_a_run_whose_scores_are_removed_does_not_end_well(tmp_path, data, tiny_classifier, monkeypatch, gone):
    out, write = tmp_path / "out", ShardFolder.write

    def removing(self, index, rows):
        if index == 2:
            path = out / gone
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write(self, index, rows)

    monkeypatch.setattr(ShardFolder, "write", removing)
    with pytest.raises(ScoringError) as caught:
        run(tiny_classifier, data, out)
    assert re.fullmatch(
        r"[^\n]*/out: (was removed|removed or changed by another program)[^\n]* run again [^\n]*", str(caught.value)
    )
    assert out.exists() == bool(gone)


def test_two_runs_never_write_to_one_folder_that_was_made_anew(tmp_path, data, tiny_classifier, monkeypatch):
    """The second one finds no lock, since its folder is another; the first one notices."""
    out, parts, second = tmp_path / "out", ShardReader.parts, []

    def made_anew(self, shard):
        if shard.index == 2 and not second:
            second.append(None)
            shutil.rmtree(out)
            second[0] = run(tiny_classifier, data, out, config={"shard_size": 4})
        return parts(self, shard)

    monkeypatch.setattr(ShardReader, "parts", made_anew)
    with pytest.raises(ScoringError, match="was removed or replaced by another run while this run wrote there"):
        run(tiny_classifier, data, out)
    assert second == [{"rows": ROWS, "errors": 2, "shards_written": 2, "shards_there": 0}]
    assert written(out) == ["000000.parquet", "000001.parquet"]
    assert run(tiny_classifier, data, out, config={"shard_size": 4})["shards_there"] == 2


def test_formulas_in_csv_are_escaped_unless_that_is_turned_off(tmp_path, data, tiny_classifier):
    data.write_text(data.read_text().replace("row 0", "=HYPERLINK(1)"))
    escaped, plain = tmp_path / "escaped", tmp_path / "plain"
    run(tiny_classifier, data, escaped, config={"format": "csv"})
    run(tiny_classifier, data, plain, config={"format": "csv", "escape_formulas": False})
    assert "\n'=HYPERLINK(1),0," in (escaped / "shards" / "000000.csv").read_text()
    assert "\n=HYPERLINK(1),0," in (plain / "shards" / "000000.csv").read_text()
    assert run(tiny_classifier, data, plain, config={"format": "csv", "escape_formulas": False})["shards_there"] == 1
    with pytest.raises(ConfigError, match="escape_formulas was False, is now absent"):
        run(tiny_classifier, data, plain, config={"format": "csv"})
