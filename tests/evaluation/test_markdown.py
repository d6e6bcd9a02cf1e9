"""The summary in Markdown: the same numbers, and nobody's words do anything in it."""

import re

import pytest

from qwen_vl_classifier.evaluation.report import write_report
from qwen_vl_classifier.evaluation.report.markdown import escaped, markdown
from tests.evaluation.sample import HOSTILE, full_evaluation, random_evaluation


def test_the_markdown_summary_says_the_same(tmp_path):
    write_report(random_evaluation(), tmp_path)
    lines = (tmp_path / "summary.md").read_text(encoding="utf-8").splitlines()
    assert lines[:3] == ["# Evaluation", "", "**Right on 0.885 of 200 examples.**"]
    assert "| Accuracy | 88.5 % | 88.5 % to 88.5 % | 65.0 % | 65.0 % |" in lines
    assert "![roc](plots/roc.png)" in lines


@pytest.mark.parametrize("hostile", HOSTILE)
def test_markdown_shows_words_as_they_are(hostile):
    line = escaped(hostile)
    assert "\n" not in line
    assert not re.search(r"(?<!\\)[<>|`*\[\]#&]", line)
    assert not set(line) & set("\u202e\x00\x1b")
    cells = [line for line in markdown(full_evaluation()).splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in cells} == {6}
