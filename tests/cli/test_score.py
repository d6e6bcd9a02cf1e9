"""`score` on the command line: what it writes, what it says, and what it refuses."""

import json
import os
import re
import signal
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.data.loading import load_examples
from qwen_vl_classifier.scoring.reading import ShardReader
from qwen_vl_classifier.scoring.workers import ScoreWorker

pytestmark = pytest.mark.usefixtures("scores_here")


@pytest.fixture
def classifier(tmp_path, tiny_classifier) -> Path:
    return tiny_classifier.save(tmp_path / "spam")


@pytest.fixture
def data(tmp_path) -> Path:
    """Three good rows and two bad ones."""
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (60, 40), "red").save(folder / "a.png")
    (folder / "broken.png").write_text("no picture")
    rows = [
        {"image": "a.png", "text": "It is red.", "label": "good"},
        {"image": "broken.png", "text": "It is red."},
        {"image": None, "text": "No picture."},
        {"image": "gone.png", "text": "It is red."},
        {"image": "a.png", "text": "It is blue."},
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments: object) -> int:
    return main(["score", *map(str, arguments), "--device", "cpu"])


def test_scores_are_written_and_summed_up(tmp_path, data, classifier, tiny_classifier, capsys):
    out = tmp_path / "out"
    assert run(classifier, data, "--out", out) == 0
    told = capsys.readouterr().out
    rows = pq.read_table(out / "shards").to_pylist()
    good = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps(good[row] | {"label": None}) + "\n" for row in (0, 2, 4)))
    expected = tiny_classifier.predict_proba(load_examples(data))[:, 1].tolist()
    assert [row["probability"] for row in rows if row["error"] is None] == expected
    assert [row["row"] for row in rows if row["error"]] == [1, 3]
    yes = sum(row["decision"] == "yes" for row in rows)
    assert told == (
        f"{out}: wrote 1 shard\n5 rows, 2 of them with an error\n{yes} yes, {3 - yes} no\nparquet files: {out}/shards\n"
    )


def test_a_picture_that_takes_too_long_to_decode_costs_its_own_row(tmp_path, data, classifier):
    out = tmp_path / "out"
    assert run(classifier, data, "--out", out, "--decode-timeout", "1e-9") == 0
    rows = pq.read_table(out / "shards").to_pylist()
    assert [row["row"] for row in rows if row["error"] and "of processor time to decode" in row["error"]] == [0, 4]
    assert rows[2]["error"] is None
    (out / "shards" / "000000.parquet").unlink()
    assert run(classifier, data, "--out", out) == 0  # the limit is free to change on resume
    assert [row["row"] for row in pq.read_table(out / "shards").to_pylist() if row["error"]] == [1, 3]


def test_a_second_run_says_what_it_found(tmp_path, data, classifier, capsys):
    out = tmp_path / "out"
    run(classifier, data, "--out", out, "--shard-size", 2)
    assert capsys.readouterr().out.startswith(f"{out}: wrote 3 shards\n")
    run(classifier, data, "--out", out, "--shard-size", 2)
    told = f"{out}: nothing to do, all 3 shards are there\n5 rows, 2 of them with an error\n"
    assert capsys.readouterr().out.startswith(told)
    (out / "shards" / "000001.parquet").unlink()
    run(classifier, data, "--out", out, "--shard-size", 2)
    assert capsys.readouterr().out.startswith(f"{out}: wrote 1 of 3 shards, the others were there\n5 rows, 2 of")


def test_too_many_errors_have_a_status_of_their_own(tmp_path, data, classifier, capsys):
    out = tmp_path / "out"
    assert run(classifier, data, "--out", out, "--shard-size", 2, "--max-errors", "1") == 3
    told = capsys.readouterr()
    assert told.out == ""
    found = f"score: {out}: 2 of the 4 rows scored so far have errors, more than --max-errors 1 allows; 2 of 3"
    assert found in told.err
    assert run(classifier, data, "--out", out, "--shard-size", 2, "--max-errors", "40%", "--resume") == 0
    assert run(classifier, data, "--out", tmp_path / "new", "--max-errors", "many") == 2
    assert "--max-errors 'many': give a number of rows, or a percentage" in capsys.readouterr().err


def test_resume_wants_something_to_resume(tmp_path, data, classifier, capsys):
    assert run(classifier, data, "--out", tmp_path / "out", "--resume") == 2
    assert "nothing to resume; leave out --resume to begin" in capsys.readouterr().err


def test_a_dry_run_says_what_it_would_take(tmp_path, data, classifier, capsys):
    out = tmp_path / "out"
    assert run(classifier, data, "--out", out, "--dry-run", "--shard-size", 2, "--workers", 2) == 0
    first, second, third, fourth = capsys.readouterr().out.splitlines()
    assert first == f"{out}: 3 shards, 0 of them there; 5 rows"
    assert re.fullmatch(r"the rest would take about 0:0\d:\d\d with 2 workers", second)
    assert re.fullmatch(r"all shards would take about 0\.0 MB", third)
    assert fourth == "by 5 rows that were scored, 40% of them with an error; nothing was written"
    assert not out.exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_finishes_the_shard_in_work(tmp_path, data, classifier, capsys, monkeypatch, number, status):
    parts = ShardReader.parts

    def interrupted(self, shard):
        if shard.index == 0:
            os.kill(os.getpid(), number)
        return parts(self, shard)

    monkeypatch.setattr(ShardReader, "parts", interrupted)
    before = signal.getsignal(number)
    out = tmp_path / "out"
    assert run(classifier, data, "--out", out, "--shard-size", 2) == status
    assert signal.getsignal(number) is before
    told = capsys.readouterr().err
    assert "finishing shards that have begun, for 30 s at most; interrupt again to drop them\n" in told
    assert f"score: {out}: stopped; 1 of 3 shards are kept; run again to continue\n" in told
    assert run(classifier, data, "--out", out, "--shard-size", 2) == 0  # shard 0 is there and not read again


def test_a_second_signal_drops_the_shard_in_work(tmp_path, data, classifier, capsys, monkeypatch):
    def interrupted(self):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the run went on")

    monkeypatch.setattr(ScoreWorker, "load", interrupted)
    out = tmp_path / "out"
    assert run(classifier, data, "--out", out) == 143
    assert (
        f"score: {out}: stopped at once; complete shards are kept; run again to continue\n" in capsys.readouterr().err
    )
    assert not (out / "shards").exists()


def test_when_the_grace_is_over_the_shard_in_work_is_dropped(tmp_path, data, classifier, capsys, monkeypatch):
    def hang(self):
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait()

    monkeypatch.setattr(ScoreWorker, "load", hang)
    out = tmp_path / "out"
    assert run(classifier, data, "--out", out, "--grace", 0.1) == 143
    told = capsys.readouterr().err
    assert "for 0.1 s at most" in told
    assert f"score: {out}: stopped at once; complete shards are kept; run again to continue\n" in told


STUCK = """
import ctypes, os, signal, sys
from qwen_vl_classifier.cli import score
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.scoring import run

def stick(*arguments, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    mutex = ctypes.create_string_buffer(64)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)  # no signal ends this, as in a network mount that hangs

run.make_plan = stick
score._CLOSE_SECONDS = 0.1
sys.exit(main(["score", *sys.argv[1:]]))
"""


def test_a_run_ends_though_its_main_thread_hangs_where_no_signal_reaches_it(tmp_path, data, classifier, fresh):
    done = fresh.run(STUCK, classifier, data, "--out", tmp_path / "out", "--grace", 0.1)
    assert done.returncode == 143
    assert done.stderr.endswith("score: stopped at once; complete shards are kept; run again to continue\n")


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path, data, classifier, monkeypatch):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        load = ScoreWorker.load
        monkeypatch.setattr(ScoreWorker, "load", lambda self: (os.kill(os.getpid(), signal.SIGHUP), load(self)))
        assert run(classifier, data, "--out", tmp_path / "out") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_several_classifiers_come_before_the_data(tmp_path, data, classifier, tiny_classifier):
    deeper = Classifier(tiny_classifier.backbone, Tap(1, "text"), tiny_classifier.head, tiny_classifier.spec)
    eggs = deeper.save(tmp_path / "eggs")
    assert run(classifier, eggs, data, "--out", tmp_path / "out") == 0
    row = pq.read_table(tmp_path / "out" / "shards").to_pylist()[0]
    assert row["probability_spam"] != row["probability_eggs"]


def test_the_flags_of_data_reach_it(tmp_path, classifier):
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (60, 40), "red").save(tmp_path / "outside.png")
    (folder / "rows.csv").write_text("photo,claim,key\n../outside.png,It is red.,first\n,,second\n")
    flags = ("--image-column", "photo", "--text-column", "claim", "--id-column", "key", "--allow-outside")
    out = tmp_path / "out"
    assert run(classifier, folder / "rows.csv", "--out", out, *flags, "--limit", 1) == 0
    [row] = pq.read_table(out / "shards").to_pylist()
    assert (row["id"], row["error"]) == ("first", None)
    assert run(classifier, folder / "rows.csv", "--out", tmp_path / "other", *flags, "--text", "It is red.") == 0
    rows = pq.read_table(tmp_path / "other" / "shards").to_pylist()
    assert rows[0]["probability"] == pytest.approx(row["probability"], rel=1e-5)  # it has a neighbour now
    assert (rows[1]["id"], rows[1]["error"]) == ("second", None)


def test_another_run_in_the_same_folder_is_refused_in_one_line(tmp_path, data, classifier, capsys):
    out = tmp_path / "out"
    run(classifier, data, "--out", out)
    capsys.readouterr()
    assert run(classifier, data, "--out", out, "--shard-size", 2) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"qwen-vl-classifier score: {out}: holds scores of another run: shard_size was 1000, is now 2; "
        "give another folder, or delete this one to score again\n"
    )


@pytest.mark.parametrize(
    ("arguments", "missing"), [(("spam", "rows.jsonl"), "--out"), (("--out", "out"), "CLASSIFIER, DATA")]
)
def test_missing_arguments_are_named(arguments, missing, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert f"required: {missing} (see qwen-vl-classifier score --help)" in capsys.readouterr().err
