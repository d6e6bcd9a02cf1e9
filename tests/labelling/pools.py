"""Pools of rows without a backbone: one number of the features says what the label of a row is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_vl_classifier import Example, Tap
from qwen_vl_classifier.labelling.answers.journal import Journal
from qwen_vl_classifier.labelling.asking import LabelSpec
from qwen_vl_classifier.labelling.pool import Pool
from qwen_vl_classifier.labelling.session import Session

PLAIN = (LabelSpec(),)


def make_pool(examples: Sequence[Example], *, hidden: int = 6) -> Pool:
    """Make a pool of examples without pictures: rows of one text are the same."""
    keys = [hashlib.sha256(example.text.encode()).hexdigest()[:16] for example in examples]
    first: dict[str, int] = {}
    numbers = np.array([first.setdefault(key, len(first)) for key in keys])
    chosen = [examples[keys.index(key)] for key in first]
    features = np.stack([np.random.default_rng(int(key, 16)).normal(size=(1, hidden)) for key in first])
    rows = np.arange(len(examples))
    return Pool(
        examples=chosen,
        keys=list(first),
        groups=np.arange(len(first)),
        features=features.astype(np.float32),
        taps=(Tap(-1, "mean"),),
        everything=list(examples),
        numbers=numbers,
        indices=rows,
        positions=rows,
        left_out={},
        backbone="none",
    )


def texts(count: int, **values: Any) -> list[Example]:
    """Return rows of different texts."""
    return [Example(None, f"text {number}", id=f"row-{number}", **values) for number in range(count)]


def truth(pool: Pool, row: int) -> str:
    """Return what a person would answer."""
    return "yes" if pool.features[row, 0, 0] > 0 else "no"


def begin(
    folder: Path, pool: Pool | None = None, labels: Sequence[LabelSpec] = PLAIN, annotator: str = "ann", **options: Any
) -> Session:
    """Begin or continue a session whose data set is `rows.jsonl` in a folder."""
    one_of = options.get("one_of", False)
    journal = Journal.at(folder / "rows.jsonl", labels=labels, one_of=one_of, seed=options.pop("seed", 0))
    return Session(pool or make_pool(texts(30)), labels, journal, annotator=annotator, **options)


def answer_some(
    session: Session, count: int, browser: str = "one", say: Callable[[Pool, int], str] = truth
) -> list[int]:
    """Answer questions, and return their rows."""
    rows = []
    for _ in range(count):
        question, *_ = session.questions(browser)
        session.answer(browser, question.key, question.label, say(session.pool, question.row), 1.5)
        rows.append(question.row)
    return rows
