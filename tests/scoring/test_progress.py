"""Progress: what an earlier run did counts as done, and loading a model does not spoil the estimate."""

from __future__ import annotations

import pytest

from qwen_vl_classifier.scoring.jobs import ShardReport
from qwen_vl_classifier.scoring.progress import Progress


def test_rows_and_errors_add_up():
    with Progress(100, rows_there=40, errors_there=2, show=False) as done:
        done.add(ShardReport(4, 10, 1))
        done.add(ShardReport(5, 10, 0))
    assert (done.shards, done.rows, done.errors) == (2, 60, 3)


def test_the_time_to_go_does_not_count_the_time_to_load(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with Progress(1000, rows_there=100, errors_there=0, show=True) as done:
        now[0] += 3600  # as long as a model loads
        done.add(ShardReport(1, 100, 0, seconds=10))
        now[0] += 10
        done.add(ShardReport(2, 100, 0, seconds=10))
    shown = capsys.readouterr().err.split("\r")[-1]
    assert "300/1000" in shown
    assert "[00:20<01:10" in shown  # 200 rows took 20 s, 700 are left


def test_rows_of_shards_in_work_are_shown_and_counted_once(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with Progress(1000, rows_there=100, errors_there=0, show=True) as done:
        now[0] += 3600
        done.show_rows(100)
        now[0] += 10
        done.show_rows(200)
        assert done.rows == 100
        assert "300/1000 [00:10<01:10" in capsys.readouterr().err.split("\r")[-1]
        done.add(ShardReport(1, 250, 0, seconds=10))
        done.show_rows(0)
        now[0] += 5
        done.show_rows(50)
    assert done.rows == 350
    assert "400/1000" in capsys.readouterr().err.split("\r")[-1]


@pytest.mark.parametrize("show", [True, False])
def test_nothing_is_shown_where_it_takes_no_time(show, capsys):
    with Progress(10, rows_there=0, errors_there=0, show=show) as done:
        done.add(ShardReport(0, 10, 0, seconds=0.0))
    assert capsys.readouterr().err == ""
