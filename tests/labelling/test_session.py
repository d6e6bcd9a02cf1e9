"""A session: what was answered stands, whatever happens between, and nobody is asked twice."""

import json
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vl_classifier import Example
from qwen_vl_classifier.errors import ConfigError, DataError, JournalError, NotCurrentError
from qwen_vl_classifier.labelling.answers import journal as journal_file
from qwen_vl_classifier.labelling.asking import SILENT_SECONDS, LabelSpec
from qwen_vl_classifier.labelling.live_head import LiveHead
from qwen_vl_classifier.labelling.queues import Queue
from qwen_vl_classifier.labelling.refitting import Refitting
from tests.labelling.pools import answer_some, begin, make_pool, texts, truth
from tests.waiting import LIMIT, until

DEFECTS = (LabelSpec("defect"), LabelSpec("dirty"))
ANIMALS = (LabelSpec("cat"), LabelSpec("dog"), LabelSpec("bird"))


@pytest.fixture(autouse=True)
def _no_refits(request, monkeypatch):
    """Leave out heads where a test is not about them: they cost most of the time."""
    if "refits" not in request.fixturenames:
        monkeypatch.setattr(Refitting, "refit", lambda *_: None)


@pytest.fixture
def refits():
    """Fit heads in this test."""


@pytest.fixture
def opened(tmp_path):
    """Begin or continue sessions in a folder, which are closed at the end."""
    sessions = []

    def open_one(*arguments, **options):
        sessions.append(begin(tmp_path, *arguments, **options))
        return sessions[-1]

    yield open_one
    for session in sessions:
        session.close()


def answers_of(session):
    return {example.id: example.label for example in session.labelled()}


def data_set(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_answers_become_the_data_set(tmp_path, opened):
    session = opened()
    rows = answer_some(session, 8)
    assert len({*rows}) == 8
    expected = {f"row-{row}": int(truth(session.pool, row) == "yes") for row in rows}
    assert answers_of(session) == expected
    session.close()
    found = data_set(tmp_path)
    assert {row["id"]: row["label"] for row in found} == expected
    assert [row["id"] for row in found] == sorted(expected, key=lambda name: int(name.removeprefix("row-")))
    assert all(row["annotator"] == "ann" and row["text"] == f"text {row['id'][4:]}" for row in found)
    assert {row["sampled"] for row in found} == {"random", "diverse"}


def test_a_session_goes_on_where_it_was(opened):
    first = opened()
    rows = answer_some(first, 9)
    following = [question.row for question in first.questions("one")]
    before = first.progress()
    again = opened()  # as after a kill: the first was not closed
    assert again.progress() == before
    assert [question.row for question in again.questions("one")] == following
    assert not {*rows} & {*answer_some(again, 21)}
    assert again.questions("one") == []
    assert again.progress()["left"] == 0


def test_the_next_question_was_announced(opened):
    session = opened()
    for _ in range(15):
        current, following, *_ = session.questions("one")
        session.answer("one", current.key, current.label, "no")
        assert session.questions("one")[0] == following


def test_the_random_rows_are_the_share_and_the_beginning_of_one_order(opened):
    session = opened(make_pool(texts(60)))
    passed = {*answer_some(session, 40)}
    waiting = {question.row for question in session.questions("one")}
    order = session.pool.order(0).tolist()
    end = next(place for place, row in enumerate(order) if row not in passed | waiting)
    expected = {f"row-{row}" for row in order[:end] if row in passed}
    sampled = {example.id: example.fields["sampled"] for example in session.labelled()}
    assert {name for name, how in sampled.items() if how == "random"} == expected
    assert session.progress()["random"] == len(expected) >= 10


def test_two_browsers_are_never_asked_the_same(opened):
    session = opened(make_pool(texts(12)))
    seen = []
    for _ in range(6):
        for browser in ("one", "two"):
            question = session.questions(browser)[0]
            seen.append(question.key)
            assert session.questions(browser)[0] == question  # a reload shows the same
    for browser in ("one", "two"):
        answer_some(session, 1, browser)
    assert len({*seen}) == 2
    asked = set()
    while (one := session.questions("one")) or session.questions("two"):
        two = session.questions("two")
        assert not one or not two or one[0].key != two[0].key
        for browser, questions in (("one", one), ("two", two)):
            if questions:
                assert questions[0].key not in asked
                asked.add(questions[0].key)
                session.answer(browser, questions[0].key, "label", "yes")
    assert len(asked) == 10


def test_a_silent_browser_gives_its_question_back(opened):
    now = [0.0]
    session = opened(make_pool(texts(1)), clock=lambda: now[0])
    question, *_ = session.questions("one")
    assert session.questions("two") == []
    assert session.progress()["left"] == 1
    now[0] = SILENT_SECONDS - 1
    assert session.questions("two") == []
    now[0] = SILENT_SECONDS
    assert session.questions("two") == [question]
    assert session.questions("one") == []
    session.answer("one", question.key, "label", "yes")  # which comes back from lunch
    assert answers_of(session) == {"row-0": 1}
    assert session.questions("two") == []


def test_a_page_that_was_closed_does_not_end_the_random_sample(opened):
    now = [0.0]
    session = opened(make_pool(texts(60)), clock=lambda: now[0])
    session.questions("closed", ahead=6)
    waiting = session.pool.order(0)[0]
    answer_some(session, 20)
    assert waiting not in {int(example.id[4:]) for example in session.labelled()}
    assert session.progress()["random"] >= 4
    now[0] = SILENT_SECONDS
    assert waiting in answer_some(session, 8)  # the first that the random order has to ask
    assert session.progress()["random"] >= 6


def test_undo_asks_again(opened):
    session = opened()
    first, second, third, *_ = session.questions("one")
    assert session.undo("one") is None
    session.answer("one", first.key, "label", "yes")
    session.answer("one", second.key, "label", "no")
    for undone, said in ((second, "no"), (first, "yes")):
        question = session.undo("one")
        assert (question.key, question.answered_before) == (undone.key, said)
        assert session.questions("one")[0] == question
    assert session.undo("one") is None
    assert [question.key for question in session.questions("one")][:3] == [first.key, second.key, third.key]
    session.answer("one", first.key, "label", "no")
    assert answers_of(session) == {first_id(session, first): 0}


def first_id(session, question):
    return session.pool.examples[question.row].id


def test_undo_takes_back_what_the_browser_has_answered(opened):
    session = opened()
    one, two = session.questions("one")[0], session.questions("two")[0]
    session.answer("one", one.key, "label", "yes")
    session.answer("two", two.key, "label", "yes")
    assert session.undo("one").key == one.key
    assert session.undo("one") is None  # the other answer is that of a browser that is there
    again = opened()
    assert again.undo("three").key == two.key  # a day later


def test_the_same_answer_again_is_one_answer(tmp_path, opened):
    session = opened()
    question = session.questions("one")[0]
    for _ in range(2):
        session.answer("one", question.key, "label", "yes")
    again = opened()
    again.answer("one", question.key, "label", "yes")  # repeated to a process that never asked it
    other = next(key for key in session.pool.keys if key != question.key)
    again.answer("one", other, "label", "no")
    assert (tmp_path / "rows.answers.jsonl").read_text().count('"answer":') == 2
    assert again.progress()["answered"] == 2


@pytest.mark.parametrize(("key", "label"), [("0" * 16, "label"), ("../..", "label"), (None, "defect"), (None, None)])
def test_an_unknown_question_is_refused(opened, key, label):
    session = opened()
    with pytest.raises(NotCurrentError, match="there is no such question"):
        session.answer("one", key or session.pool.keys[0], label, "yes")


def test_what_is_no_answer_is_refused(opened):
    session = opened()
    with pytest.raises(DataError, match="answer 'perhaps'; expected one of yes, no, skip, unsure"):
        session.answer("one", session.pool.keys[0], "label", "perhaps")
    with pytest.raises(DataError, match="browser 'a b'; expected 1 to 64 letters"):
        session.questions("a b")
    with pytest.raises(ConfigError, match="annotator"):
        opened(annotator="a\nb")


def test_an_answer_that_cannot_be_saved_does_not_count(opened, monkeypatch):
    session = opened()
    before = session.questions("one")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal_file.os, "write", full)
        with pytest.raises(JournalError, match="not saved"):
            session.answer("one", before[0].key, "label", "yes")
        assert session.progress()["answered"] == 0
        assert session.questions("one") == before
    session.answer("one", before[0].key, "label", "yes")
    assert session.progress()["answered"] == 1


def test_the_whole_row_is_asked_before_the_next(tmp_path, opened):
    session = opened(labels=DEFECTS)
    asked = []
    for said in ("yes", "no", "unsure", "yes", "skip", "no"):
        question = session.questions("one")[0]
        asked.append((question.row, question.label))
        session.answer("one", question.key, question.label, said)
        if said == "unsure":
            session = opened(labels=DEFECTS)  # killed in the middle of a row
    rows = [row for row, _ in asked]
    assert asked[:5] == [
        (rows[0], "defect"),
        (rows[0], "dirty"),
        (rows[2], "defect"),
        (rows[2], "dirty"),
        (rows[4], "defect"),
    ]
    assert asked[5][0] not in (rows[0], rows[2], rows[4])  # a skip passes over the whole row
    progress = session.progress()
    assert [progress[name] for name in ("answered", "skipped", "unsure", "left")] == [3, 1, 0, 27]
    assert [(label["name"], label["yes"], label["no"]) for label in progress["labels"]] == [
        ("defect", 1, 1),
        ("dirty", 1, 1),
    ]
    session.close()
    found = {row["id"]: (row["defect"], row["dirty"]) for row in data_set(tmp_path)}
    assert found == {f"row-{rows[0]}": (1, 0), f"row-{rows[2]}": (None, 1), f"row-{asked[5][0]}": (0, None)}


def test_undo_of_a_skip_asks_the_whole_row(opened):
    session = opened(labels=DEFECTS)
    question = session.questions("one")[0]
    session.answer("one", question.key, "defect", "yes")
    session.answer("one", question.key, "dirty", "skip")
    assert session.questions("one")[0].row != question.row
    back = session.undo("one")
    assert (back.row, back.label, back.answered_before) == (question.row, "dirty", "skip")
    session.undo("one")
    assert [(one.row, one.label) for one in session.questions("one")][:2] == [
        (question.row, "defect"),
        (question.row, "dirty"),
    ]


def test_one_of_several_classes(tmp_path, opened):
    session = opened(labels=ANIMALS, one_of=True)
    rows = answer_some(session, 6, say=lambda _, row: ANIMALS[row % 3].name)
    assert {question.label for question in session.questions("one")} == {None}
    assert [(label["yes"], label["no"]) for label in session.progress()["labels"]] == [
        (count, 6 - count) for count in (sum(row % 3 == kind for row in rows) for kind in range(3))
    ]
    session.close()
    assert {row["id"]: row["label"] for row in data_set(tmp_path)} == {
        f"row-{row}": ANIMALS[row % 3].name for row in rows
    }


def test_rows_of_one_content_are_one_question(tmp_path, opened):
    rows = [*texts(3), Example(None, "text 1", id="again")]
    session = opened(make_pool(rows))
    assert session.progress()["rows"] == 3
    answer_some(session, 3)
    assert answers_of(session).keys() == {"row-0", "row-1", "row-2", "again"}
    assert answers_of(session)["row-1"] == answers_of(session)["again"]


def test_answers_outlast_other_data(opened):
    answered = answer_some(opened(), 5)
    grown = [*texts(30)[::-1], *[Example(None, f"new {number}") for number in range(5)]]
    session = opened(make_pool(grown))
    assert answers_of(session).keys() == {f"row-{row}" for row in answered}
    assert session.progress()["left"] == 30
    less = opened(make_pool(texts(answered[0] + 1)))
    missing = sum(row > answered[0] for row in answered)
    notes = [f"{missing} answered rows are not in this data; their answers are kept"] if missing else []
    assert less.progress()["notes"] == notes
    with pytest.raises(ConfigError, match="none of its 5 answered rows is in this data of 4 rows; it was begun with"):
        opened(make_pool([Example(None, f"other {number}") for number in range(4)]))


def test_labels_of_the_data_are_used_and_not_asked(tmp_path, opened):
    rows = [
        Example(None, f"text {number}", label=number % 2 if number < 10 else None, id=f"row-{number}")
        for number in range(20)
    ]
    session = opened(make_pool(rows))
    assert [session.progress()[name] for name in ("given", "answered", "left")] == [10, 0, 10]
    asked = answer_some(session, 10)
    assert session.questions("one") == []
    assert {*asked} == {*range(10, 20)}
    sampled = {example.id: example.fields["sampled"] for example in session.labelled()}
    assert {sampled[f"row-{number}"] for number in range(10)} == {"given"}
    assert {sampled[f"row-{number}"] for number in range(10, 20)} == {"random"}  # all of them
    assert session.progress()["random"] == 10


def test_a_queue_is_reviewed_with_the_labels_that_are_there(tmp_path, opened):
    rows = [Example(None, f"text {number}", label=1, id=f"row-{number}") for number in range(8)]
    queue = Queue((5, 2, 7), only=True, missing=4)
    session = opened(make_pool(rows), queue=queue)
    questions = session.questions("one")
    assert [(one.row, one.answered_before, one.source) for one in questions] == [
        (5, "yes", "queued"),
        (2, "yes", "queued"),
        (7, "yes", "queued"),
    ]
    assert (session.progress()["rows"], session.progress()["left"]) == (3, 3)
    session.answer("one", questions[0].key, "label", "no")
    session.answer("one", questions[1].key, "label", "yes")
    session.close()
    found = {row["id"]: row for row in data_set(tmp_path)}
    assert (found["row-5"]["label"], found["row-5"]["data_label"], found["row-5"]["sampled"]) == (0, 1, "queued")
    assert (found["row-2"]["label"], found["row-2"]["annotator"]) == (1, "ann")
    assert (found["row-0"]["sampled"], found["row-0"]["annotator"]) == ("given", None)
    again = opened(make_pool(rows), queue=queue)
    assert [one.row for one in again.questions("one")] == [7]
    assert again.progress()["notes"] == ["4 rows of the queue are not in this data"]


def test_a_queue_of_unsure_rows_comes_beside_the_random_share(opened):
    queue = Queue(tuple(range(29, 9, -1)), only=False)
    session = opened(queue=queue)
    asked = []
    while questions := session.questions("one"):
        asked.append((questions[0].source, questions[0].row))
        session.answer("one", questions[0].key, "label", "yes")
    first = Counter(source for source, _ in asked[:20])
    assert (first["random"], first["queued"]) == (5, 15)
    queued = [row for source, row in asked if source == "queued"]
    assert queued == [row for row in queue.rows if row in queued]
    assert {row for _, row in asked} == {*range(30)}


def test_two_annotators_share_the_work_and_are_compared(tmp_path, opened):
    ann, bob = opened(make_pool(texts(60))), opened(make_pool(texts(60)), annotator="bob")
    rows = {"ann": [], "bob": []}
    for _ in range(25):
        for name, session in (("ann", ann), ("bob", bob)):
            rows[name] += answer_some(session, 1, name)
    both = {*rows["ann"]} & {*rows["bob"]}
    compared = [row for name in rows for row in rows[name] if row in both]
    assert 3 <= len(both) <= 7  # every tenth question, and one or two before they knew of each other
    assert len(compared) == 2 * len(both)
    agreement = ann.progress()["agreement"]
    assert agreement == bob.progress()["agreement"]
    assert (agreement["rows"], agreement["ties"], agreement["annotators"]) == (len(both), 0, ["ann", "bob"])
    assert ann.progress()["annotators"] == {"ann": 25, "bob": 25}


def test_who_joins_late_is_compared_no_more_often(opened):
    answer_some(opened(make_pool(texts(60))), 30, "ann")
    bob = opened(make_pool(texts(60)), annotator="bob")
    sources = []
    for _ in range(20):
        sources.append(bob.questions("bob")[0].source)
        answer_some(bob, 1, "bob")
    assert sources.count("agreement") == 2


def test_the_majority_counts_and_a_tie_is_left_out(tmp_path, opened):
    sessions = {name: opened(annotator=name) for name in ("ann", "bob", "cy")}
    key = sessions["ann"].pool.keys[4]
    for name, said in (("ann", "yes"), ("bob", "no")):
        sessions[name].answer(name, key, "label", said)
    sessions["cy"].questions("cy")
    progress = sessions["cy"].progress()
    assert (progress["answered"], progress["agreement"]["ties"]) == (1, 1)
    assert answers_of(sessions["cy"]) == {}
    sessions["cy"].answer("cy", key, "label", "no")
    assert answers_of(sessions["cy"]) == {"row-4": 0}
    assert sessions["cy"].labelled()[0].fields["annotator"] == "bob, cy"


def contradicting(pool, task, wrong):
    """Return a head that is sure of all its labels but some."""
    signs = np.where(task.labels == 1, 5.0, -5.0) * np.where(np.isin(task.rows, wrong), -1, 1)
    return LiveHead(
        tap=pool.taps[0],
        kind="linear",
        l2=1.0,
        margins=pool.features[:, 0, 0].astype(np.float64),
        rows=task.rows,
        labels=task.labels,
        out_of_fold=signs,
        folds=5,
        searched=len(task.rows),
        weights=np.zeros(pool.features.shape[2]),
        bias=0.0,
        start_weight=0.0,
    )


def test_an_answer_that_the_head_contradicts_comes_back_once(opened, monkeypatch):
    session = opened(make_pool(texts(60)))
    wrong = answer_some(session, 12)[1:3]

    def refit(refitting, tasks, publish):
        refitting.heads = [contradicting(session.pool, tasks[0], wrong)]
        publish()

    monkeypatch.setattr(Refitting, "refit", refit)
    checks = []
    for _ in range(40):
        question = session.questions("one")[0]
        if question.source == "check":
            checks.append(question.row)
            assert question.answered_before == truth(session.pool, question.row)
            said = "no" if question.answered_before == "yes" else "yes"
        else:
            said = truth(session.pool, question.row)
        session.answer("one", question.key, "label", said)
        assert session.wait_until_fitted(LIMIT)
    assert sorted(checks) == sorted(wrong)
    for example in session.labelled():
        row = int(example.id.removeprefix("row-"))
        assert (example.label == (truth(session.pool, row) == "yes")) is (row not in wrong)


@pytest.mark.usefixtures("refits")
def test_heads_follow_the_answers(opened):
    session = opened(make_pool(texts(80), hidden=3))
    answer_some(session, 50)
    assert session.wait_until_fitted(LIMIT)
    until(lambda: session.progress()["labels"][0]["curve"], "a learning curve")
    progress = session.progress()
    assert json.loads(json.dumps(progress)) == progress
    assert "NaN" not in json.dumps(progress)
    labels = progress["answered"]
    assert progress["refit"] == {"labels": labels, "seconds": progress["refit"]["seconds"], "running": False}
    assert progress["labels"][0]["estimate"]["accuracy"][0] > 0.8
    assert "uncertain" in {question.source for question in session.questions("one", ahead=20)}


def test_the_data_set_is_written_while_answers_come(tmp_path, opened):
    session = opened()
    answer_some(session, 3)
    until(lambda: (tmp_path / "rows.jsonl").exists() and len(data_set(tmp_path)) == 3, "the data set")
    other = opened(annotator="bob")
    answer_some(other, 2, "two")
    other.close()
    until(lambda: len(data_set(tmp_path)) == 5, "the answers of another process")
    assert session.progress()["answered"] == 5


def test_a_data_set_that_cannot_be_written_is_an_error_at_the_end(tmp_path, opened, monkeypatch):
    session = begin(tmp_path)
    answer_some(session, 2)
    until(lambda: (tmp_path / "rows.jsonl").exists() and len(data_set(tmp_path)) == 2, "the data set")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qwen_vl_classifier.labelling.answers.labelled_rows.new_file", full)
    with pytest.raises(JournalError, match=r"rows.jsonl: cannot be written \(No space left on device\); answers are"):
        session.close()
    assert len(data_set(tmp_path)) == 2
    monkeypatch.undo()
    assert opened().progress()["answered"] == 2


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["yes", "no", "skip", "unsure", "undo", "restart"]),
        st.sampled_from([("ann", "one"), ("ann", "two"), ("bob", "three")]),
        st.integers(0, 5),
    ),
    max_size=40,
)


class Model:
    """What has been said, as a plain list."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str, int, str]] = []
        self.active: set[tuple[str, str]] = set()

    def say(self, annotator, browser, row, answer):
        self.active.add((annotator, browser))
        last = [one for one in self.said if (one[0], one[2]) == (annotator, row)]
        if not last or last[-1][3] != answer:
            self.said.append((annotator, browser, row, answer))

    def undo(self, annotator, browser):
        self.active.add((annotator, browser))
        mine = [place for place, one in enumerate(self.said) if one[0] == annotator]
        own = [place for place in mine if self.said[place][1] == browser]
        left = [place for place in mine if (annotator, self.said[place][1]) not in self.active]
        return self.said.pop((own or left)[-1])[2] if own or left else None

    def counts(self):
        labels, states = {}, Counter()
        for row in {one[2] for one in self.said}:
            last = {annotator: answer for annotator, _, place, answer in self.said if place == row}
            votes = Counter(answer for answer in last.values() if answer in ("yes", "no"))
            if votes["yes"] != votes["no"]:
                labels[f"row-{row}"] = int(votes["yes"] > votes["no"])
            state = "answered" if votes else "skipped" if "skip" in last.values() else "unsure"
            states[state] += 1
        return labels, states


@given(STEPS)
@settings(max_examples=25)
def test_any_course_of_answers_comes_to_what_was_said(tmp_path_factory, steps):
    folder, model = tmp_path_factory.mktemp("course"), Model()
    pool = make_pool(texts(6))
    sessions = {name: begin(folder, pool, annotator=name) for name in ("ann", "bob")}
    try:
        for step, (annotator, browser), row in steps:
            session = sessions[annotator]
            if step == "restart":
                session.close()
                sessions[annotator] = begin(folder, pool, annotator=annotator)
                model.active = {one for one in model.active if one[0] != annotator}
            elif step == "undo":
                expected, question = model.undo(annotator, browser), session.undo(browser)
                assert (None if question is None else question.row) == expected
            else:
                model.say(annotator, browser, row, step)
                session.answer(browser, pool.keys[row], "label", step)
            labels, states = model.counts()
            session.questions(browser)
            progress = session.progress()
            assert answers_of(session) == labels
            assert [progress[name] for name in ("answered", "skipped", "unsure")] == [
                states[name] for name in ("answered", "skipped", "unsure")
            ]
            assert progress["left"] == 6 - states.total()
    finally:
        for session in sessions.values():
            session.close()
    assert begin_and_read(folder, pool) == model.counts()[0]


def begin_and_read(folder, pool):
    session = begin(folder, pool)
    session.close()
    return answers_of(session)


def test_questions_come_while_heads_are_fitted(opened, monkeypatch):
    fitting, release = threading.Event(), threading.Event()

    def slow(*_):
        fitting.set()
        assert release.wait(LIMIT)

    monkeypatch.setattr(Refitting, "refit", slow)
    session = opened()
    assert fitting.wait(LIMIT)
    answer_some(session, 5)
    assert session.progress()["refit"]["running"]
    release.set()
    assert session.wait_until_fitted(LIMIT)
    assert not session.progress()["refit"]["running"]
