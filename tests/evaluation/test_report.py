"""The report: what it says, that nobody's words can run in it, and that files are there whole or not at all."""

import base64
import hashlib
import io
import json
import re
import shutil
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier import Example, evaluate
from qwen_vl_classifier.config.evaluate import EvaluateConfig
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.evaluation.report import render_report, write_report
from qwen_vl_classifier.evaluation.report.cards import MOST_CARDS
from qwen_vl_classifier.evaluation.report.findings import data_findings, look_sentences
from qwen_vl_classifier.evaluation.report.markdown import markdown
from qwen_vl_classifier.evaluation.report.pictures import SIDE, Thumbnails
from qwen_vl_classifier.evaluation.report.plots import draw_plots
from qwen_vl_classifier.evaluation.report.summary import summarise
from qwen_vl_classifier.evaluation.report.words import date_of, file_name, printable
from tests.evaluation.pages import Page, check_inert
from tests.evaluation.sample import HOSTILE, full_evaluation, make_evaluation, pictures, random_evaluation


def page_of(evaluation, **options) -> Page:
    return Page(render_report(evaluation, **options))


def summary_of(evaluation):
    return summarise(evaluation, Thumbnails(None))


def test_the_verdict_comes_first_and_numbers_stand_beside_their_baselines():
    evaluation = make_evaluation([1, 0, 1, 0, 0, 1, 0, 0], [0.9, 0.1, 0.8, 0.2, 0.3, 0.7, 0.1, 0.6])
    evaluation["metrics"]["accuracy"] |= {"low": 0.625, "high": 1.0}
    page = page_of(evaluation)
    assert page.texts["p.lead"] == ["Right on 0.875 of 8 examples."]
    cells = [page.texts[key] for key in ("td.number value", "td.number")]
    assert cells[0][:2] == ["87.5 %", "90.0 %"]
    assert cells[1][:3] == ["62.5 % to 100.0 %", "62.5 %", "62.5 %"]
    assert [page.texts[f"td.{kind}"] for kind in ("right", "wrong")] == [
        ["4correct", "3correct"],
        ["1false alarm", "0missed"],
    ]


def test_what_evaluate_returns_has_this_shape_and_can_be_shown(tiny_classifier, scene_rows):
    examples = scene_rows[:40]
    evaluation = evaluate(tiny_classifier, examples, config=EvaluateConfig(resamples=20, slice_by="kind"))
    sample = full_evaluation(40)
    assert set(evaluation) - {"measured"} == set(sample) - {"measured"}
    for part in ("rows", "metrics", "baselines", "classifier", "curves", "checks", "data", "examples"):
        assert set(evaluation[part]) == set(sample[part]), part
    assert set(evaluation["predictions"][0]) == set(sample["predictions"][0])
    page = page_of(evaluation, examples=examples)
    assert page.texts["p.lead"] == [evaluation["sentence"]]
    assert page.tags.count("img") > 10


def test_the_page_says_how_to_label_its_rows_again():
    evaluation = random_evaluation()
    evaluation["measured"] |= {"data": "my rows.csv", "classifier": "runs/probe"}
    expected = "label 'my rows.csv' --rows rows.jsonl --out checked.jsonl --classifier runs/probe"
    assert page_of(evaluation).texts["code"] == [f"qwen-vl-classifier {expected}"]
    evaluation["measured"] = {"classifier": None, "data": None, "date": None}
    (command,) = page_of(evaluation).texts["code"]
    assert command.endswith("label DATA --rows rows.jsonl --out checked.jsonl")


def test_every_metric_is_in_the_page_once():
    summary = summary_of(random_evaluation())
    keys = [row["key"] for row in summary["headlines"] + summary["metrics"]]
    assert sorted(keys) == sorted(random_evaluation()["metrics"])


def test_evaluation_json_is_the_evaluation(tmp_path, blank_plots):
    evaluation = full_evaluation()
    assert write_report(evaluation, tmp_path) == tmp_path / "report.html"
    assert json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8")) == evaluation
    assert "мир" in (tmp_path / "evaluation.json").read_text(encoding="utf-8")  # people read it too


@pytest.mark.parametrize("hostile", HOSTILE)
def test_nobodys_words_run(hostile):
    page = page_of(full_evaluation(20, texts=[hostile], ids=[hostile], images=[hostile]), examples=pictures(20))
    check_inert(page, hostile)
    assert set(page.texts["p.text"]) == {printable(hostile)}
    (title, *_) = page.texts["title"]
    assert title.strip() == f"{file_name(HOSTILE[0])} on {file_name(HOSTILE[2])} · evaluation report"


def test_the_data_block_cannot_be_ended_from_inside():
    evaluation = random_evaluation()
    evaluation["thresholds"][0]["note"] = HOSTILE[0]
    evaluation["predictions"][0]["id"] = HOSTILE[0]
    data, rows, *scripts = page_of(evaluation).texts["script"]
    assert json.loads(data)["table"] == evaluation["thresholds"]
    assert "<" not in data + rows
    assert not any("eval(" in script or "innerHTML" in script for script in scripts)


def test_the_policy_lets_nothing_through_but_own_style_script_and_pictures():
    page = page_of(full_evaluation())
    policies = [value for tag, name, value in page.attributes if name == "content" and "default-src" in value]
    (sheet,), (_, _, *scripts) = page.texts["style"], page.texts["script"]
    style, *hashes = (
        f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
        for content in (sheet, *scripts)
    )
    assert policies == [
        f"default-src 'none'; img-src data:; style-src {style}; script-src {' '.join(hashes)}; "
        "base-uri 'none'; form-action 'none'"
    ]
    assert page.tags.index("style") > page.tags.index("meta") + 1
    assert "prefers-color-scheme: dark" in sheet
    assert "@media print" in sheet
    assert not re.search(r"url\(|@import", sheet)


def test_pictures_have_words_and_controls_have_labels():
    page = page_of(full_evaluation(), examples=pictures(200))
    named = {value for tag, name, value in page.attributes if (tag, name) == ("label", "for")}
    controls = [attributes for tag, attributes in page.elements if tag in ("input", "select")]
    assert all(control["id"] in named or control.get("aria-label") for control in controls)
    assert named <= {control["id"] for control in controls}
    assert all(attributes["alt"] for tag, attributes in page.elements if tag == "img")
    plots = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert all(plot.get("aria-label") or plot.get("aria-hidden") for plot in plots)
    assert all(attributes["scope"] in ("row", "col") for tag, attributes in page.elements if tag == "th")


def test_cards_are_the_mistakes_and_the_rows_that_the_evaluation_names():
    evaluation = random_evaluation(texts=[f"text {row}" for row in range(200)])
    mistakes = summary_of(evaluation)["cards"]["rows"]
    right = [row for row in range(200) if row not in evaluation["examples"]["wrong"]]
    evaluation["examples"] |= {"uncertain": [mistakes[2]["row"], right[0]], "mislabelled": [right[1]]}
    evaluation["data"]["label_issues"]["shown"] = [{"row": right[1], "label": 1, "probability": 0.1}]
    cards = summary_of(evaluation)["cards"]
    wrong = evaluation["confusion"]["false_positive"] + evaluation["confusion"]["false_negative"]
    assert cards["totals"] == {
        "mistake": wrong,
        "missed": evaluation["confusion"]["false_negative"],
        "false-alarm": evaluation["confusion"]["false_positive"],
        "uncertain": 2,
        "suspect": 1,
    }
    rows = [row["row"] for row in cards["rows"]]
    assert sorted(rows[:wrong]) == sorted(evaluation["examples"]["wrong"])
    sure = [row["sure"] for row in cards["rows"]]
    assert sure[:wrong] == sorted(sure[:wrong], reverse=True)
    assert rows[wrong:] == [right[0], right[1]]
    assert [card["text"] for card in cards["shown"]] == [f"text {row}" for row in rows]
    assert "uncertain" in cards["rows"][2]["tags"]
    assert "mistake" not in cards["rows"][-1]["tags"]
    assert json.loads(json.dumps(cards, allow_nan=False)) == json.loads(json.dumps(cards))


def test_many_mistakes_stay_within_bounds():
    labels = np.arange(3000) % 2
    evaluation = make_evaluation(labels, 0.5 + (0.5 - labels) * np.linspace(0.1, 0.9, 3000), texts=["x" * 5000])
    cards = summary_of(evaluation)["cards"]
    assert len(cards["rows"]) == len(cards["shown"]) + len(cards["more"]) == MOST_CARDS
    assert cards["left_out"] == 3000 - cards["totals"]["mistake"]
    assert cards["rows"][0]["row"] == 2999  # the surest first
    assert {len(card["text"]) for card in cards["more"]} == {202}
    content = render_report(evaluation)
    assert "surest of 3,000 mistakes" in content
    assert len(content) < 600_000


def test_rows_are_exported_by_id_or_by_their_place_in_the_data():
    evaluation = make_evaluation([1, 1, 1], [0.1, 0.2, 0.3], ids=["a", None])
    rows = summary_of(evaluation)["cards"]["rows"]
    assert [row["export"] for row in rows] == [{"id": "a"}, {"row": 1}, {"id": "a"}]
    evaluation["left_out"] = {"total": 2, "positions": [0, 2]}  # so that row 1 of three is the fourth of five
    assert summary_of(evaluation)["cards"]["rows"][1]["export"] == {"row": 3}


def test_cards_know_their_slices():
    evaluation = make_evaluation([1, 1], [0.1, 0.2])
    evaluation["predictions"][1]["slices"] = [0, 2]
    rows = summary_of(evaluation)["cards"]["rows"]
    assert [[tag for tag in row["tags"] if tag.startswith("slice")] for row in rows] == [[], ["slice-0", "slice-2"]]


def test_without_cards_there_is_no_gallery():
    evaluation = make_evaluation([0, 1], [0.2, 0.7])
    evaluation["examples"]["uncertain"] = []
    page = page_of(evaluation)
    assert "There are none." in page.texts["p"]
    assert "dialog" not in page.tags


@pytest.mark.parametrize(
    ("change", "badges"),
    [
        ({}, ["Better than guessing"]),
        ({"metrics": {"accuracy": {"low": 0.5}}}, ["Ranks better than chance; answers not shown to be better"]),
        (
            {"metrics": {"accuracy": {"low": 0.5}, "auroc": {"low": 0.4}}},
            ["Not shown to be better than guessing"],
        ),
        ({"checks": {"images_permuted": {"free": True}}}, ["Not shown to use the pictures", "Better than guessing"]),
        (
            {"data": {"trained_on": {"total": 2}}},
            ["At least 2 rows from its own training data", "Better than guessing"],
        ),
        ({"rows": {"positives": 0}}, ["Only one class in the data"]),
    ],
)
def test_badges_claim_what_was_measured(change, badges):
    evaluation = random_evaluation()
    for part, entries in change.items():
        for key, value in entries.items():
            if isinstance(value, dict):
                evaluation[part][key] |= value
            else:
                evaluation[part][key] = value
    assert [badge["text"] for badge in summary_of(evaluation)["badges"]] == badges


def test_title_and_head_say_what_was_measured():
    measured = {
        "classifier": "/home/me/secret/leaves/",
        "data": r"C:\data\dev.jsonl",
        "date": "2026-11-08T09:05:59+01:00",
    }
    evaluation = random_evaluation() | {"measured": measured}
    page = page_of(evaluation)
    assert page.texts["title"][0].strip() == "leaves on dev.jsonl · evaluation report"
    assert page.texts["h1"] == ["Evaluation of leaves on dev.jsonl"]
    assert "Measured on 8 November 2026, 09:05 (UTC+01:00). 200 rows: " in page.texts["p.note"][0]
    assert render_report(evaluation) == render_report(evaluation)
    assert "secret" not in render_report(evaluation)


@pytest.mark.parametrize(
    ("measured", "heading"),
    [
        (None, "Evaluation report"),
        ({"classifier": "a", "data": None, "date": None}, "Evaluation of a"),
        ({"classifier": None, "data": "b", "date": "some time"}, "Evaluation on b"),
    ],
)
def test_what_is_not_known_is_left_out(measured, heading):
    assert page_of(random_evaluation() | {"measured": measured}).texts["h1"] == [heading]


@pytest.mark.parametrize(
    ("moment", "date"),
    [
        ("2026-01-02T03:04:05+00:00", "2 January 2026, 03:04 (UTC)"),
        ("2026-12-31T23:59", "31 December 2026, 23:59"),
        ("<b>", "<b>"),
    ],
)
def test_dates_are_written_out(moment, date):
    assert date_of(moment) == date


@pytest.mark.parametrize(
    ("labels", "probabilities"), [([0, 0, 0], [0.0, 1.0, 0.5]), ([1, 1], [0.1, 0.9]), ([1], [0.5])]
)
def test_one_class_alone_still_makes_a_report(tmp_path, blank_plots, labels, probabilities):
    evaluation = make_evaluation(labels, probabilities)
    page = page_of(evaluation)
    assert any("all rows are of one class" in text for text in page.texts["p.note"])
    assert plots_of(page) == 4
    write_report(evaluation, tmp_path)
    assert (tmp_path / "plots" / "confusion.svg").exists()
    assert not (tmp_path / "plots" / "roc.svg").exists()


def test_a_classifier_that_never_says_yes_has_no_precision():
    page = page_of(make_evaluation([0, 1, 0], [0.1, 0.2, 0.3]))
    assert page.texts["td.number value"][-5:] == ["66.7 %", "—", "0.0 %", "0.000", "1"]


def plots_of(page: Page) -> int:
    return sum(attributes.get("role") == "img" for tag, attributes in page.elements if tag == "svg")


def test_names_of_classes_are_shown_where_there_are_some():
    page = page_of(random_evaluation(label_names=["absent", "1"]))
    headings = [text for text in page.texts["th"] if "answer " in text]
    assert headings == ["answer “absent”", "answer class 1"]
    assert any(text.startswith("Precision of “absent”") for text in page.texts["th"])


def test_long_texts_are_cut_in_the_page_alone(tmp_path, blank_plots):
    evaluation = random_evaluation(20, texts=["x" * 5000])
    page = Page(write_report(evaluation, tmp_path).read_text(encoding="utf-8"))
    assert set(page.texts["p.text"]) == {"x" * 600 + " …"}
    assert json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8")) == evaluation


@pytest.mark.parametrize("path", ["/home/someone/secret/a.png", r"C:\Users\someone\secret\a.png", "a.png"])
def test_of_a_path_the_page_shows_the_name_alone(path):
    page = render_report(random_evaluation(20, images=[path]))
    assert "<bdi>a.png</bdi>" in page
    assert "secret" not in page


@pytest.mark.parametrize("rows", [1, 2, 7, 3000])
def test_plots_stay_inside_their_frames(rows):
    content = render_report(random_evaluation(rows, abstention=[0.3, 0.6]))
    assert len(content) < 500_000
    for tag, name, value in Page(content).attributes:
        if value.startswith("translate(") and "rotate" not in value:
            assert 0 <= float(value.removeprefix("translate(").split()[0]) <= 284
        elif name in ("x", "cx"):
            assert 0 <= float(value) <= 360
        elif name in ("y", "cy"):
            assert 0 <= float(value) <= 274
        elif name in ("width", "height", "r") and tag in ("rect", "circle"):
            assert 0 < float(value) <= 284
        elif name == "points":
            points = [tuple(map(float, point.split(","))) for point in value.split()]
            assert all(62 <= x <= 346 and y <= 230 for x, y in points)


def test_bars_are_as_long_as_their_counts():
    page = page_of(make_evaluation([1, 1, 1, 1, 0, 0], [0.9] * 4 + [0.1] * 2))
    bars = [attributes for tag, attributes in page.elements if tag == "rect" and attributes["y"] != "0"]
    heights = [float(bar["height"]) for bar in bars if bar.get("class") in ("one", "zero")]
    assert heights == [pytest.approx(0.48 * 220, abs=0.06), pytest.approx(0.24 * 220, abs=0.06)]


def test_slices_say_which_are_worse():
    summary = summary_of(full_evaluation())
    assert summary["slices"][0] | {"name": "", "value": ""} == {
        "name": "",
        "value": "",
        "rows": "20",
        "accuracy": "50.0 %",
        "interval": "25.0 % to 75.0 %",
        "rest": "80.0 %",
        "worse": True,
        "verdict": "worse",
        "p_value": "0.01",
    }


@pytest.mark.parametrize(
    ("p_value", "rest", "verdict"),
    [(4e-74, 0.2, "better"), (4e-74, 0.8, "worse"), (0.05, 0.2, "within chance")],
)
def test_a_slice_is_within_chance_only_where_its_p_value_says_so(p_value, rest, verdict):
    evaluation = full_evaluation()
    entry = evaluation["slices"][0] | {"p_value": p_value, "rest": rest, "worse": verdict == "worse"}
    evaluation["slices"] = [entry]
    assert summary_of(evaluation)["slices"][0]["verdict"] == verdict
    assert f"| {verdict} |" in markdown(evaluation)
    assert f"{verdict} (p = {p_value:.2g})" in render_report(evaluation)


def test_checks_are_words():
    permuted, grey, _ = look_sentences(full_evaluation()["checks"])
    assert permuted == (
        "With the picture of another row, it gets worse: accuracy goes from 90.0 % to 60.0 % (loss of 30.0 points, "
        "95 % interval 20.0 to 40.0); AUROC goes from 0.900 to 0.600 (loss of 0.300, 95 % interval 0.200 to 0.400). "
        "Measured on 200 rows."
    )
    assert grey.startswith("With plain grey pictures, it is not shown to get worse: accuracy goes from 90.0 %")
    assert look_sentences(random_evaluation()["checks"])[2].startswith(
        "With the text of another row: not measured (switched off)."
    )


def test_findings_name_rows():
    found = {finding["title"]: finding for finding in data_findings(full_evaluation()["data"])}
    assert found["Repeated rows"]["rows"].startswith("7 (like 3), 7 (like 3)")
    assert found["Repeated rows"]["rows"].endswith(", and 170 more")
    assert found["Pictures seen in training"]["rows"].startswith("7 (training row 3), ")
    assert found["Rows trained on"]["count"] == "not known"
    assert found["Labels to check"]["rows"] == "5"
    nothing = {finding["title"]: finding["count"] for finding in data_findings(random_evaluation()["data"])}
    assert nothing["Repeated rows"] == "none"
    assert nothing["Repeated rows, training data"] == "not checked"


def decoded(page: Page) -> list[Image.Image]:
    sources = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    return [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in sources]


def test_thumbnails_are_small_pictures_of_their_rows():
    evaluation = random_evaluation()
    page = page_of(evaluation, examples=pictures(200, (800, 400)))
    (first, *_), wrong = decoded(page), [row["row"] for row in summary_of(evaluation)["cards"]["rows"]]
    assert first.format == "JPEG"
    assert first.size == (SIDE, SIDE // 2)
    assert first.getpixel((5, 5))[0] == pytest.approx(wrong[0] % 256, abs=4)
    assert f"Picture of row {wrong[0]}" in [value for tag, name, value in page.attributes if name == "alt"]


def test_a_page_holds_so_many_pictures_and_no_more():
    made = Thumbnails(pictures(9), most_pictures=2)
    assert [len(made.of(row)[0]) for row in range(3)] == [1, 1, 0]
    assert made.of(4) == ([], "Picture left out: the page is full.")
    size = len(Thumbnails(pictures(1)).of(0)[0][0]["content"])
    made = Thumbnails(pictures(9), most_bytes=2 * size + 1)
    assert [len(made.of(row)[0]) for row in range(3)] == [1, 1, 0]


def test_pictures_that_cannot_be_opened_are_said_to_be_absent(tmp_path):
    examples = [Example([Image.new("RGB", (9, 9)), tmp_path / "gone.png"], "two"), Example(None, "none")]
    page = page_of(make_evaluation([1, 0], [0.1, 0.9]), examples=examples)
    assert set(page.texts["p.absent"]) == {"The picture cannot be opened."}
    assert page.tags.count("img") == 1


def test_examples_of_a_report_may_be_rows_of_any_kind():
    rows = [{"image": Image.new("RGB", (9, 9)), "text": "one", "label": "x"}, {"image": None, "text": "none"}]
    page = page_of(make_evaluation([1, 0], [0.1, 0.9]), examples=iter(rows))
    assert page.tags.count("img") == 1


def test_other_examples_than_those_evaluated_are_refused():
    with pytest.raises(ConfigError, match=r"^3 examples for an evaluation of 20 rows; "):
        render_report(random_evaluation(20), examples=pictures(3))


def test_plots_are_files_in_both_kinds(tmp_path):
    write_report(full_evaluation(), tmp_path)
    names = ("confusion", "cost", "histogram", "pr", "reliability", "risk_coverage", "roc")
    files = {path.name: path for path in (tmp_path / "plots").iterdir()}
    assert sorted(files) == sorted(f"{name}.{kind}" for name in names for kind in ("png", "svg"))
    for name in names:
        picture = Image.open(files[f"{name}.png"]).convert("L")
        assert picture.size == (1000, 800)
        assert picture.getextrema()[0] < 100  # something is drawn
        assert "<svg" in files[f"{name}.svg"].read_text()
    again = full_evaluation()
    again["curves"] = dict.fromkeys(again["curves"]) | {"roc": again["curves"]["roc"]}  # drawing takes long
    for name, content in draw_plots(again).items():
        assert files[name].read_bytes() == content


@pytest.mark.parametrize("name", ["$x^$ \\frac{", "图片 мир 🙂", "\u202e turned", "a & <b>", "very long " * 20])
def test_plots_show_any_name(name):
    evaluation = random_evaluation(30, label_names=["0", name])
    evaluation["curves"] = dict.fromkeys(evaluation["curves"])
    files = draw_plots(evaluation)
    assert set(files) == {"confusion.svg", "confusion.png"}
    drawing = ElementTree.fromstring(files["confusion.svg"])
    texts = "".join(drawing.itertext())
    assert "class 0" in texts
    assert name.strip("\u202e ")[:8] in texts
    assert "\u202e" not in texts


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_report(random_evaluation(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "report.html", "summary.md"]
    (line,) = [line for line in (tmp_path / "summary.md").read_text().splitlines() if "not written" in line]
    assert "matplotlib is not installed; run: pip install" in line
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert plots_of(page) == 6
    assert any("matplotlib is not installed" in text for text in page.texts["footer"])


def test_control_characters_are_shown_as_signs():
    assert printable("a\x00b\x1bc\nd") == "a\ufffdb\ufffdc\nd"


def test_a_report_is_replaced(tmp_path, blank_plots):
    write_report(random_evaluation(30), tmp_path / "new" / "folder")
    write_report(random_evaluation(40), tmp_path / "new" / "folder")
    assert "40 rows" in (tmp_path / "new" / "folder" / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def small_files_only():
    """Let the system refuse any file of more than 1,000 bytes, as a full disk does."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_write_leaves_the_old_report(tmp_path, blank_plots, request):
    before = write_report(random_evaluation(30), tmp_path).read_bytes()
    request.getfixturevalue("small_files_only")
    with pytest.raises(ConfigError, match=r"cannot be written \(File too large") as caught:
        write_report(random_evaluation(40), tmp_path)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "report.html").read_bytes() == before
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".partial"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path, blank_plots):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report(random_evaluation(10), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_report_is_written_over_links_and_not_through_them(tmp_path, blank_plots):
    victim, folder = tmp_path / "victim", tmp_path / "report"
    victim.write_text("precious")
    folder.mkdir()
    for name in ("report.html", "evaluation.json", "summary.md"):
        (folder / name).symlink_to(victim)
    write_report(random_evaluation(10), folder)
    assert victim.read_text() == "precious"
    shutil.rmtree(folder / "plots", ignore_errors=True)
    (folder / "plots").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="plots: is a link or a file, expected a folder; remove it"):
        write_report(random_evaluation(10), folder)
