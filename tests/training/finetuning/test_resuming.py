"""The folder of a run: what may begin in it, what may go on, and where."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwen_vl_classifier import Example
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.files.whole import partial_name
from qwen_vl_classifier.training.finetuning import resuming
from qwen_vl_classifier.training.finetuning.resuming import (
    COMPLETE,
    bytes_of_run,
    check_run,
    close_checkpoint,
    close_run,
    digest_of,
    open_run,
    saves_to,
)

RECORD = {"config": {"seed": 0}, "rows": "abc"}


def checkpoint(folder: Path, step: int, *, complete: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "weights.safetensors").write_bytes(b"")
    if complete:
        (path / COMPLETE).touch()
    return path


def test_a_run_begins_in_a_new_or_empty_folder(tmp_path):
    assert open_run(tmp_path, RECORD, resume=False) is None
    assert open_run(tmp_path / "a" / "b", RECORD, resume=True) is None


def test_somebody_elses_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not the folder of a run; give a new or empty folder"):
        open_run(tmp_path, RECORD, resume=True)


def test_a_run_goes_on_where_asked_from_its_last_whole_checkpoint(tmp_path):
    open_run(tmp_path, RECORD, resume=False)
    with pytest.raises(ConfigError, match="holds a run that has just begun; continue with resume=True"):
        open_run(tmp_path, RECORD, resume=False)
    assert open_run(tmp_path, RECORD, resume=True) is None
    checkpoint(tmp_path, 9)
    last = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 11, complete=False)  # killed while writing
    assert open_run(tmp_path, RECORD, resume=True) == last
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "checkpoint-9", "checkpoint-10"}
    with pytest.raises(ConfigError, match="stopped after step 10"):
        open_run(tmp_path, RECORD, resume=False)


def test_another_run_does_not_go_on(tmp_path):
    open_run(tmp_path, RECORD, resume=False)
    with pytest.raises(ConfigError, match="its run was started with another config, rows; give the same"):
        open_run(tmp_path, {"config": {"seed": 1}, "rows": "abd"}, resume=True)
    for damaged in ("{", "[]"):
        (tmp_path / "run.json").write_text(damaged)
        with pytest.raises(ConfigError, match="not valid JSON"):
            open_run(tmp_path, RECORD, resume=True)


def test_the_course_stays_when_a_run_ends(tmp_path):
    open_run(tmp_path, RECORD, resume=False)
    checkpoint(tmp_path, 5)
    (tmp_path / "best").mkdir()
    (tmp_path / "runs").mkdir()
    close_run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "runs"}
    assert open_run(tmp_path, {"another": "run"}, resume=False) is None  # it may begin here
    with pytest.raises(ConfigError, match="that has just begun"):
        open_run(tmp_path, {"another": "run"}, resume=False)


def test_a_run_that_has_ended_is_not_begun_again_by_going_on(tmp_path):
    for saved, words in ((None, "its run has ended"), (tmp_path / "out", "was saved in .*out")):
        open_run(tmp_path / "run", RECORD, resume=False)
        close_run(tmp_path / "run", saved)
        for look in (
            lambda: check_run(tmp_path / "run", resume=True),
            lambda: open_run(tmp_path / "run", {}, resume=True),
        ):
            with pytest.raises(ConfigError, match=f"{words}; nothing is left to resume: leave out resume=True"):
                look()
        assert check_run(tmp_path / "run", resume=False)["ended"]


def test_a_run_may_go_on_to_save_elsewhere(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    open_run(tmp_path / "run", {**RECORD, "out": str(one)}, resume=False)
    assert (saves_to(tmp_path / "run", one), saves_to(tmp_path / "run", other)) == (True, False)
    assert not saves_to(tmp_path / "no run", one)
    open_run(tmp_path / "run", {**RECORD, "out": str(other)}, resume=True)
    assert (saves_to(tmp_path / "run", one), saves_to(tmp_path / "run", other)) == (False, True)


def test_what_is_no_folder_of_a_run_is_seen_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    for name in ("file", "other"):
        with pytest.raises(ConfigError, match="exists and is not the folder of a run"):
            check_run(tmp_path / name, resume=False)
    assert check_run(tmp_path / "new", resume=True) is None
    assert not (tmp_path / "new").exists()


def test_a_run_takes_what_its_checkpoints_take():
    assert bytes_of_run(100, steps=10, save_steps=100) == 3 * 100 + 2 * 100
    assert bytes_of_run(100, steps=1000, save_steps=100) == 3 * 3 * 100 + 2 * 100


def test_a_run_begins_where_one_was_killed_as_it_began(tmp_path):
    (tmp_path / partial_name("run.json")).write_text('{"config')
    assert open_run(tmp_path, RECORD, resume=True) is None
    assert {path.name for path in tmp_path.iterdir()} == {"run.json"}


def test_what_is_left_of_a_run_that_was_killed_as_it_ended_is_not_gone_on_with(tmp_path, monkeypatch):
    open_run(tmp_path, RECORD, resume=False)
    checkpoint(tmp_path, 5)
    (tmp_path / "best").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(resuming.shutil, "rmtree", lambda *_, **__: None)
        close_run(tmp_path)
    with pytest.raises(ConfigError, match="its run has ended"):
        open_run(tmp_path, RECORD, resume=True)
    assert open_run(tmp_path, RECORD, resume=False) is None
    assert {path.name for path in tmp_path.iterdir()} == {"run.json"}


def test_the_last_two_checkpoints_stay_whatever_the_clock_says(tmp_path):
    for step, time in ((8, 300), (9, 400), (10, 100), (11, 200)):
        os.utime(checkpoint(tmp_path, step, complete=step < 10), (time, time))
    close_checkpoint(tmp_path, 10)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-9", "checkpoint-10", "checkpoint-11"}
    assert (tmp_path / "checkpoint-10" / COMPLETE).is_file()


def test_rows_are_told_apart_by_text_label_and_picture():
    rows = [Example("a.png", "x", 1), Example("a.png", "x", 0), Example("a.png", "y", 1), Example(b"a", "x", 1)]
    digests = {digest_of([row]) for row in rows}
    assert len(digests) == len(rows)
    assert digest_of(rows) == digest_of([*rows])
