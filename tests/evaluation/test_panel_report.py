"""The report of a panel: what it says of labels and classes, that no words can run in it, and that it stays small."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qwen_vl_classifier import evaluate_panel
from qwen_vl_classifier.config.evaluate import EvaluateConfig
from qwen_vl_classifier.evaluation.report import render_report, write_report
from qwen_vl_classifier.evaluation.report.panel_markdown import panel_markdown
from tests.evaluation.pages import Page, check_inert
from tests.evaluation.sample import HOSTILE, pictures
from tests.evaluation.sample_panel import labelled_rows, make_panel, make_panel_evaluation
from tests.waiting import LIMIT

CHROMIUM = Path("/usr/bin/chromium")
TREES = ("ash", "birch", "cedar", "elm")


def page_of(evaluation, **options) -> Page:
    return Page(render_report(evaluation, **options))


def test_each_label_stands_with_its_figures_and_the_mean_below():
    evaluation = make_panel_evaluation()
    page = page_of(evaluation, examples=pictures(120))
    assert page.texts["p.lead"] == [evaluation["sentence"]]
    values = [text.replace("\n", "") for text in page.texts["td.number value"] if "to" in text][:12]
    for place, label in enumerate([*evaluation["labels"], {"metrics": evaluation["macro"]["metrics"]}]):
        accuracy, f1, auroc = (label["metrics"][name] for name in ("accuracy", "f1_1", "auroc"))
        assert values[3 * place].startswith(f"{100 * accuracy['value']:.1f} %"[:3])
        assert values[3 * place + 1] == f"{f1['value']:.3f}{f1['low']:.3f} to {f1['high']:.3f}"
        assert values[3 * place + 2] == f"{auroc['value']:.3f}{auroc['low']:.3f} to {auroc['high']:.3f}"
    rows = [
        json.loads(dict(attributes)["data-values"] or "")
        for tag, attributes in page.elements
        if tag == "tr" and "data-values" in attributes
    ]
    assert [row["auroc"] for row in rows] == [label["metrics"]["auroc"]["value"] for label in evaluation["labels"]]
    assert page.tags.count("img") == sum(min(8, len(label["examples"]["wrong"])) for label in evaluation["labels"])


def test_classes_stand_with_their_confusion():
    evaluation = make_panel_evaluation(TREES, one_of=True)
    page = page_of(evaluation, examples=pictures(120))
    shown = [text for key, found in page.texts.items() if re.fullmatch(r"td\.[rw]\d", key) for text in found]
    table = evaluation["one_of"]["confusion"]
    counted = [f"{count}{100 * count / sum(line):.1f} %" if count else "0" for line in table for count in line]
    assert sorted(shown) == sorted(counted)
    pair = evaluation["one_of"]["confused"][0]
    assert f"{pair['label']} answered {pair['answer']}" in page.texts["p.text"]
    assert "threshold" not in " ".join(page.texts["div"])
    summary = panel_markdown(evaluation)
    assert f"| {pair['label']} | {pair['answer']} | {pair['count']} |" in summary
    assert evaluation["sentence"] in summary.replace("\\", "")


@pytest.mark.parametrize("one_of", [False, True])
def test_words_of_strangers_are_inert(one_of):
    names = [f"{number} {name}" for number, name in enumerate(HOSTILE[:6])]
    evaluation = make_panel_evaluation(names, 60, one_of=one_of, texts=HOSTILE, ids=HOSTILE, images=HOSTILE)
    evaluation |= {"sentence": HOSTILE[0], "notes": list(HOSTILE)}
    evaluation["measured"] = {"panel": HOSTILE[0], "data": HOSTILE[2], "date": HOSTILE[1]}
    page = page_of(evaluation, examples=pictures(60))
    check_inert(page, HOSTILE[0])
    assert page.texts["p.lead"] == [HOSTILE[0]]
    assert "<img" not in panel_markdown(evaluation).replace("\\<", "")


@pytest.mark.soak
@pytest.mark.parametrize("one_of", [False, True])
def test_a_hundred_labels_stay_small_and_all_have_a_picture(one_of):
    names = [f"label {number}" for number in range(100)]
    evaluation = make_panel_evaluation(names, 60, one_of=one_of, resamples=1)
    content = render_report(evaluation, examples=pictures(60, (8, 8)))
    assert len(content) < 2_000_000
    page = Page(content)
    wrong = sum(bool(label["examples"]["wrong"]) for label in evaluation["labels"])
    assert page.tags.count("img") >= wrong
    assert "Picture left out" not in content
    if one_of:
        assert "71 other classes" in content
        assert (
            len([text for key, found in page.texts.items() if re.fullmatch(r"td\.[rw]\d", key) for text in found])
            == 900
        )


def test_what_evaluate_panel_returns_has_this_shape_and_is_written(tiny_backbone, scene_rows, tmp_path):
    names = ("defect", "scratch", "dirty")
    rows = labelled_rows(scene_rows[:24], names)
    evaluation = evaluate_panel(make_panel(tiny_backbone), rows, config=EvaluateConfig(resamples=20, checks=False))
    sample = make_panel_evaluation()
    assert set(evaluation) == set(sample)
    for part in ("measured", "rows", "checks", "panel", "macro", "exact_match"):
        assert set(evaluation[part]) == set(sample[part]), part
    assert set(evaluation["labels"][0]) == set(sample["labels"][0])
    assert set(evaluation["predictions"][0]) == set(sample["predictions"][0])
    path = write_report(evaluation, tmp_path / "report", examples=rows)
    assert json.loads((path.parent / "evaluation.json").read_text()) == evaluation
    assert "data:image/jpeg;base64," in path.read_text()
    assert "| defect |" in (path.parent / "summary.md").read_text()
    assert path.read_text() == render_report(evaluation), "the pictures were kept from the pass"
    assert "<iframe" in evaluation._repr_html_()


@pytest.mark.soak
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("one_of", [False, True])
def test_in_a_browser(tmp_path, width, scheme, one_of):
    """It is sorted and searched, does not scroll sideways, and has enough contrast at every shade."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.is_file():
        pytest.skip(f"there is no browser: {CHROMIUM} is missing (Debian's package chromium)")
    evaluation = make_panel_evaluation((*TREES, HOSTILE[0], HOSTILE[-1]), 200, one_of=one_of)
    (tmp_path / "page.html").write_text(render_report(evaluation, examples=pictures(200)), "utf-8")
    told: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=LIMIT * 1000)
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.goto((tmp_path / "page.html").as_uri())
        page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.select_option("#sort-labels", "auroc")
        first = page.text_content("#labels-table tbody tr th")
        assert first == min(evaluation["labels"], key=lambda label: label["metrics"]["auroc"]["value"])["name"]
        page.fill("#search-labels", "birch")
        assert page.locator("#labels-table tbody tr").count() == 1
        assert page.locator("details.part:visible").count() == 1
        page.fill("#search-labels", "")
        for selector in (".skill", ".why", ".heat .r1", ".heat .r5", ".heat .w1", ".heat .w2", ".heat .r0, .heat .w0"):
            if page.locator(selector).count():
                assert page.evaluate(CONTRAST, selector) >= 4.5, selector
        browser.close()
    assert told == []


# Contrast of an element and what is behind it (Web Content Accessibility Guidelines 2.2, 1.4.3).
CONTRAST = """(selector) => {
  const luminance = (colour) => {
    const light = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = colour.match(/[\\d.]+/g).map((v) => light(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const element = document.querySelector(selector);
  let behind = element;
  while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
  const [a, b] = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor].map(luminance);
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""
