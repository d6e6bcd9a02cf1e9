"""The journal: nothing that was saved is lost, half a line is nothing, and what is damaged is named."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_vl_classifier.errors import ConfigError, JournalError
from qwen_vl_classifier.labelling.answers import journal as journal_file
from qwen_vl_classifier.labelling.answers.journal import MOST_LINE, Journal
from qwen_vl_classifier.labelling.answers.records import Record
from qwen_vl_classifier.labelling.asking import LabelSpec
from tests.crash_points import kill_at
from tests.waiting import until

KEY = "0123456789abcdef"


def open_journal(folder, **options):
    options = {"labels": [LabelSpec()], "question": "It is red.", "data": "photos"} | options
    return Journal.at(folder / "rows.jsonl", **options)


def answered(key=KEY, **values):
    given = {"label": "label", "annotator": "ann", "browser": "one", "answer": "yes", "source": "random"}
    return Record.new("answer", key=key, **given | values)


def test_records_come_back_in_order(tmp_path):
    journal = open_journal(tmp_path, seed=7)
    records = [answered(seconds=1.25), answered(answer="skip"), answered(annotator="Bjørn")]
    for record in records:
        journal.append(record)
    undo = Record.new("undo", key=KEY, label="label", annotator="ann", browser="one", undoes=records[0].id)
    journal.append(undo)
    assert journal.read_all() == [*records, undo]
    assert journal.read_new() == []
    again = open_journal(tmp_path, seed=3)
    assert (again.read_all(), again.seed) == ([*records, undo], 7)
    first, *lines = (tmp_path / "rows.answers.jsonl").read_text().splitlines()
    assert json.loads(first)["question"] == "It is red."
    assert len(lines) == 4


def test_a_record_is_on_disk_when_it_was_appended(tmp_path, monkeypatch):
    journal = open_journal(tmp_path)
    synced = []
    monkeypatch.setattr(journal_file.os, "fsync", lambda _: synced.append(journal.path.read_bytes().count(b"\n")))
    journal.append(answered())
    assert synced == [2]
    journal.append(Record.new("show", key=KEY, label="label", annotator="ann", browser="-"), durable=False)
    assert synced == [2]


HALF_A_WRITE = """
import os, sys
from pathlib import Path
from tests.crash_points import stop_at
from tests.labelling.answers.test_journal import answered, open_journal
journal = open_journal(Path(sys.argv[1]))
write = os.write
def half(descriptor, line):
    write(descriptor, line[: len(line) // 2])
    stop_at(Path(sys.argv[2]))
journal.append(answered("a" * 16))
os.write = half
journal.append(answered("b" * 16))
"""


def test_half_a_line_of_a_killed_process_is_nothing(tmp_path):
    reader = open_journal(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", HALF_A_WRITE, tmp_path, tmp_path / "barrier"])
    try:
        until((tmp_path / "barrier").exists, "a process in the middle of a write")
        assert [record.key for record in reader.read_new()] == ["a" * 16]
        assert not (tmp_path / "rows.answers.jsonl").read_bytes().endswith(b"\n")
        kill_at(tmp_path / "barrier")
    finally:
        process.kill()
        process.wait()
    assert reader.read_new() == []
    writer = open_journal(tmp_path)
    writer.append(answered("c" * 16))
    assert [record.key for record in reader.read_new()] == ["c" * 16]
    assert [record.key for record in open_journal(tmp_path).read_all()] == ["a" * 16, "c" * 16]


APPENDING = """
import sys
from pathlib import Path
from tests.labelling.answers.test_journal import answered, open_journal
journal = open_journal(Path(sys.argv[1]))
for number in range(40):
    journal.append(answered(f"{number:016x}", annotator=sys.argv[2]))
"""


def test_processes_append_at_once(tmp_path):
    processes = [subprocess.Popen([sys.executable, "-c", APPENDING, tmp_path, name]) for name in ("ann", "bob")]
    assert [process.wait() for process in processes] == [0, 0]
    records = open_journal(tmp_path).read_all()
    for name in ("ann", "bob"):
        own = [record.key for record in records if record.annotator == name]
        assert own == [f"{number:016x}" for number in range(40)]


@pytest.mark.parametrize("written", [0, 20])
def test_a_full_disk_refuses_the_answer_and_changes_nothing(tmp_path, monkeypatch, written):
    journal = open_journal(tmp_path)
    journal.append(answered())
    before = journal.path.read_bytes()
    write = os.write

    def full(descriptor, line):
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, line[:written])

    with monkeypatch.context() as patch:
        patch.setattr(journal_file.os, "write", full)
        with pytest.raises(JournalError, match=r"was not saved \(No space left on device\); free some space"):
            journal.append(answered())
    assert journal.path.read_bytes() == before
    journal.append(answered(answer="no"))
    assert [record.answer for record in journal.read_all()] == ["yes", "no"]


def test_an_answer_that_did_not_reach_the_disk_is_taken_back(tmp_path, monkeypatch):
    journal = open_journal(tmp_path)

    def fail(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(journal_file.os, "fsync", fail)
        with pytest.raises(JournalError, match="not saved"):
            journal.append(answered())
    assert journal.read_all() == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{not JSON", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[1]", "not an object"),
        (b'{"event": "delete"}', "event 'delete'"),
        (b"[" * 100_000, "not JSON"),
        (b"x" * (MOST_LINE + 10), "more than 1,048,576 bytes"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, problem):
    journal = open_journal(tmp_path)
    journal.append(answered())
    with journal.path.open("ab") as file:
        file.write(line + b"\n")
    journal.append(answered(answer="no"))
    with pytest.raises(JournalError, match=rf"rows.answers.jsonl: line 3 \({problem}\); expected one answer a line"):
        open_journal(tmp_path).read_all()
    assert [record.answer for record in journal.read_new()] == ["yes", "no"]  # whoever is at work goes on
    assert journal.damaged == [3]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("id", "../../etc"),
        ("at", "yesterday"),
        ("at", "2026-99-02T03:04:05Z"),
        ("key", "KEY"),
        ("key", 7),
        ("label", "other"),
        ("label", None),
        ("annotator", "a\x1b[2J"),
        ("annotator", "a" * 201),
        ("browser", "a b"),
        ("answer", "perhaps"),
        ("answer", None),
        ("source", "magic"),
        ("seconds", -1),
        ("seconds", True),
        ("seconds", 1e300),
    ],
)
def test_each_field_of_a_record_is_checked(tmp_path, name, value):
    journal = open_journal(tmp_path)
    values = json.loads(answered().line()) | {name: value}
    with journal.path.open("a") as file:
        file.write(json.dumps(values) + "\n")
    with pytest.raises(JournalError, match=rf"line 2 \({name} "):
        open_journal(tmp_path).read_all()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"question": "It is blue."}, "about the question 'It is red.', and now it is 'It is blue.'"),
        ({"labels": [LabelSpec(yes="red")]}, r"about labels label \(0/1\), and now it is label \(0/red\)"),
        ({"labels": [LabelSpec("a"), LabelSpec("b")]}, r"and now it is a \(0/1\), b \(0/1\)"),
        ({"labels": [LabelSpec("a"), LabelSpec("b")], "one_of": True}, "and now it is"),
    ],
)
def test_another_question_is_refused_by_both_names(tmp_path, other, message):
    open_journal(tmp_path)
    with pytest.raises(ConfigError, match=message):
        open_journal(tmp_path, **other)


def test_long_questions_are_told_apart(tmp_path):
    open_journal(tmp_path, question="red " * 100_000)
    open_journal(tmp_path, question="red " * 100_000)
    with pytest.raises(ConfigError, match="about the question"):
        open_journal(tmp_path, question="red " * 100_000 + "or blue")
    assert (tmp_path / "rows.answers.jsonl").stat().st_size < 10_000


@pytest.mark.parametrize(
    "content", ["", "{}\n", "hello\n", '{"format": "other"}\n', "[" * 5000 + "\n", '{"a": 1' + " " * MOST_LINE + "}\n"]
)
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "rows.answers.jsonl").write_text(content)
    if not content:  # of a process that was killed before its first line: begun again
        assert open_journal(tmp_path).read_all() == []
        return
    with pytest.raises(ConfigError, match="its first line is not that of answers of label"):
        open_journal(tmp_path)
    assert (tmp_path / "rows.answers.jsonl").read_text() == content


def test_a_first_line_that_was_cut_short_is_written_again(tmp_path):
    (tmp_path / "rows.answers.jsonl").write_text('{"format": "qwen-vl-cl')
    journal = open_journal(tmp_path)
    journal.append(answered())
    assert len(open_journal(tmp_path).read_all()) == 1


def test_a_data_set_that_label_did_not_write_is_not_replaced(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"rows.jsonl is there without rows.answers.jsonl, so label did not write it"):
        open_journal(tmp_path)
    assert not (tmp_path / "rows.answers.jsonl").exists()


@pytest.mark.parametrize("name", ["rows.csv", "rows", "rows.answers.jsonl"])
def test_the_name_of_the_data_set_ends_in_jsonl(tmp_path, name):
    with pytest.raises(ConfigError, match=r"expected a file whose name ends in \.jsonl"):
        Journal.at(tmp_path / name, labels=[LabelSpec()])


def remove(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    content = path.read_bytes()
    path.rename(path.with_name("moved"))
    path.write_bytes(content)


def cut(path: Path) -> None:
    with path.open("rb+") as file:
        file.truncate(10)


@pytest.mark.parametrize("change", [remove, replace, cut])
def test_answers_are_not_written_where_nobody_finds_them(tmp_path, change):
    journal = open_journal(tmp_path)
    journal.append(answered())
    journal.read_all()
    change(journal.path)
    with pytest.raises(JournalError, match="not saved"):
        journal.append(answered())
    with pytest.raises(JournalError, match="cannot be read"):
        journal.read_new()
    assert not (tmp_path / "rows.answers.jsonl").exists() or change is not remove


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_only_a_regular_file_is_written(tmp_path, kind):
    path = tmp_path / "rows.answers.jsonl"
    if kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(JournalError, match=r"answers cannot be opened \(.+\); give another file"):
        open_journal(tmp_path)
    assert not (tmp_path / "elsewhere").exists()
    assert kind != "pipe" or stat.S_ISFIFO(path.stat().st_mode)


@pytest.mark.parametrize(
    ("labels", "one_of", "message"),
    [
        ([], False, "no labels"),
        ([LabelSpec("a")], True, "one class"),
        ([LabelSpec("a"), LabelSpec("a")], False, "two labels are called 'a'"),
        ([LabelSpec("text")], False, "'text' has another meaning"),
        ([LabelSpec("skip"), LabelSpec("cat")], True, "'skip' has another meaning"),
    ],
)
def test_labels_are_checked(tmp_path, labels, one_of, message):
    with pytest.raises(ConfigError, match=message):
        open_journal(tmp_path, labels=labels, one_of=one_of)
