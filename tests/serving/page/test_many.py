"""Many examples in a real browser: tables and folders that are scored, looked through, corrected and downloaded."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect

from qwen_vl_classifier import load_examples
from tests.serving.page.actions import BLUE, RED, transfer
from tests.serving.page.stub import model
from tests.waiting import until

TABLE = """Image;Text;note
shots/red.png;There is a tower.;=1+1
"blue.jpg";"Two ""lines""
and more";-2,5
red.png;bad item;@x
"""
CSV = "'/page/many/csv.js'"


def choose(page, name: str, content: str, *pictures: tuple[str, bytes]) -> None:
    """Choose a table, and pictures along with it."""
    files = [{"name": name, "buffer": content.encode(), "mimeType": "text/csv"}]
    files += [{"name": other, "buffer": data, "mimeType": "image/png"} for other, data in pictures]
    page.set_input_files("#table-files", files)
    page.locator("#many-source:not(:empty)").wait_for()


def start(page) -> None:
    page.locator("#many-start button").first.click()


def finish(page) -> None:
    expect(page.locator("#many-cancel")).to_be_hidden()


def column(page, number: int) -> list[str]:
    return page.locator(f"#rows tr > :nth-child({number})").all_inner_texts()


def download(page, button: str) -> str:
    with page.expect_download() as caught:
        page.click(button)
    return Path(caught.value.path()).read_text(encoding="utf-8")


def lines(count: int) -> str:
    return "text\n" + "".join(f"row {number}\n" for number in range(1, count + 1))


def test_tables_are_read_and_written_as_spreadsheets_do(open_page):
    page = open_page()
    read = f"""async ([text, name]) => {{
      const {{ readTable }} = await import({CSV});
      try {{
        const {{ columns, rows, delimiter }} = readTable(text, name);
        const cells = rows.map(({{ values }}) => columns.map((column) => values[column]));
        return [columns, cells, delimiter, rows.map((row) => row.problem)];
      }} catch (error) {{ return error.message; }}
    }}"""

    def table(text: str, name: str = "a.csv"):
        return page.evaluate(read, [text, name])

    assert table('\ufeffa,b\r\n"x, ""y""\r\nz", 1\r\n\r\n,\n2,') == [
        ["a", "b"],
        [['x, "y"\r\nz', " 1"], ["2", ""]],
        ",",
        ["", ""],
    ]
    assert table("a;b\n1,5;2,5") == [["a", "b"], [["1,5", "2,5"]], ";", [""]]
    assert table('"a;b"\tc\tc\t\n1\t2\t3\t4') == [["a;b", "c", "c (2)", "column 4"], [["1", "2", "3", "4"]], "\t", [""]]
    assert table("sep=|\na|b\n1|2")[:2] == [["a", "b"], [["1", "2"]]]
    assert table("a,b\n1\n1,2,3")[3] == [f"the row has {count} cells, but the header has 2" for count in (1, 3)]
    assert table('a\n"1') == "has a quote that is opened in record 2 and never closed"
    assert table("") == "is empty"
    assert table('{"a": [1], "b": "x"}\n[1]\n\n{"c": null}\n', "a.jsonl") == [
        ["a", "b", "c"],
        [[[1], "x", None], [None] * 3, [None, None, None]],
        ",",
        ["", "the line is not a JSON object", ""],
    ]
    decode = f"async (bytes) => (await import({CSV})).decode(new Uint8Array(bytes).buffer)"
    for encoding in ("utf-8", "utf-16", "cp1252"):
        assert page.evaluate(decode, list("Größe — ok".encode(encoding))) == "Größe — ok"

    # What is written can be read again, and runs nothing.
    cells = [
        "plain",
        'a "b", c',
        "two\nlines",
        " blank ",
        "-2.5",
        "+1,5e-3",
        "7",
        "",
        "=1+1",
        "+x",
        "-x",
        "@x",
        "\tx",
        "  =x",
    ]
    write = f"async ([columns, rows, delimiter]) => (await import({CSV})).writeCsv(columns, rows, delimiter)"
    for delimiter in ",;\t":
        written = page.evaluate(write, [["=a", "b"], [{"=a": cell, "b": None} for cell in cells], delimiter])
        assert written.startswith("\ufeff")
        header, *rows = csv.reader(io.StringIO(written[1:], newline=""), delimiter=delimiter)
        assert header == ["'=a", "b"]
        assert [row[0] for row in rows] == [*cells[:8], *(f"'{cell}" for cell in cells[8:])]


def test_a_table_with_pictures_is_scored_looked_through_and_downloaded(open_page, server, tmp_path):
    server.models = [model("claims", abstention=[0.4, 0.6], text="Is it so?"), model("other")]
    page = open_page()
    choose(page, "shots.csv", TABLE)
    assert page.inner_text("#many-source") == "shots.csv: 3 rows, cells separated by semicolons."
    assert page.inner_text("#many-classes") == "Answers: yes = approved, no = denied."
    assert page.inner_text("#many-missing").startswith("3 rows name pictures that are not here.")
    assert column(page, 5)[0] == "the picture shots/red.png is not here"
    held = [("red.png", "image/png", RED), ("blue.jpg", "image/jpeg", BLUE)]
    page.dispatch_event("main", "drop", {"dataTransfer": transfer(page, *held)})
    # Both "shots/red.png" and "red.png" might be the one that was dropped.
    expect(page.locator("#many-missing")).to_have_text("1 row cannot be scored; the table says why.")
    assert "several paths of the table end in" in column(page, 5)[0]
    page.select_option("#image-column", "")
    page.select_option("#many-model", "claims")
    assert page.inner_text("#many-start") == "Score 3 rows"
    start(page)
    finish(page)
    assert page.inner_text("#many-state") == "Done: 3 rows, 1 of them without an answer."
    assert page.inner_text("#many-counts") == "2 yes, 0 no, 1 without an answer"
    assert sorted(body["text"] for body in server.requests["classify"]) == [
        "There is a tower.",
        'Two "lines"\nand more',
        "bad item",
    ]
    assert column(page, 5) == ["Yes", "Yes", "cannot be read"]

    page.locator("#many-threshold input").fill("0.9")
    assert page.inner_text("#many-counts") == "0 yes, 2 no, 1 without an answer"
    assert column(page, 5)[:2] == ["No", "No"]
    page.select_option("#row-filter", "error")
    assert column(page, 1) == ["3"]
    page.select_option("#row-filter", "all")
    page.fill("#row-search", "TOWER")
    assert column(page, 1) == ["1"]

    page.locator("#rows .mark").click()
    assert page.inner_text("#rows .mark") == "Marked: it is denied"
    page.click("#rows button >> nth=0")
    assert page.input_value("#text") == "There is a tower."
    expect(page.locator(".answer .mark")).to_have_text("Marked: it is denied")
    (tmp_path / "corrections.jsonl").write_text(download(page, "#save-corrections"))
    (correction,) = load_examples(tmp_path / "corrections.jsonl", require_labels=True)
    assert (correction.text, correction.label, correction.id) == ("There is a tower.", 0, "shots.csv row 1")
    assert correction.fields["classifier"] == "claims"
    assert correction.fields["probability"] == pytest.approx(0.873)
    page.click(".answer .mark")
    assert not page.is_visible("#corrections")

    written = list(
        csv.DictReader(io.StringIO(download(page, "#many-download").removeprefix("\ufeff"), newline=""), delimiter=";")
    )
    first, _, third = written
    assert {**first, "probability": ""} == {
        "Image": "shots/red.png",
        "Text": "There is a tower.",
        "note": "'=1+1",
        "probability": "",
        "label": "1",
        "decision": "yes",
        "label_name": "approved",
        "classifier": "claims",
        "version": "0123456789ab",
        "error": "",
        "tried_threshold": "0.9",
        "decision_at_tried_threshold": "no",
    }
    assert float(first["probability"]) == pytest.approx(0.873)
    assert (third["error"], third["probability"], third["note"]) == ("cannot be read", "", "'@x")


def test_pictures_that_come_together_are_asked_about(open_page, server):
    server.models = [model("claims", text="Is it so?")]
    page = open_page()
    assert page.input_value("#text") == "Is it so?"
    assert "trained with" in page.inner_text("#text-origin")
    assert "yes = approved, no = denied" in page.inner_text("#about")
    both = transfer(page, ("2.png", "image/png", RED), ("10.jpg", "image/jpeg", BLUE))
    page.dispatch_event("main", "drop", {"dataTransfer": both})
    expect(page.locator("#question")).to_contain_text("2 pictures: one example that has all of them, or 2 examples?")
    page.get_by_role("button", name="2 examples", exact=True).click()
    assert page.evaluate("document.activeElement.id") == "many"
    assert page.input_value("#same-text") == "Is it so?"
    page.fill("#same-text", "")
    assert column(page, 5) == ["the text is blank"] * 2
    page.fill("#same-text", "Is it red?")
    start(page)
    finish(page)
    assert [(body["text"], len(body["images"])) for body in server.requests["classify"]] == [("Is it red?", 1)] * 2
    nine = [(f"{number}.png", RED, "image/png") for number in range(9)]
    page.set_input_files("#files", [{"name": name, "buffer": data, "mimeType": kind} for name, data, kind in nine])
    assert "one example may have at most 8" in page.inner_text("#question")
    assert page.locator("#question button").all_inner_texts() == ["9 examples", "Cancel"]


def test_few_requests_at_a_time_and_it_can_be_cancelled_and_continued(open_page, server):
    server.gate.clear()
    page = open_page()
    choose(page, "rows.csv", lines(60))
    start(page)
    until(lambda: server.at_a_time == 4, "four requests")
    assert page.locator("#rows tr").count() == 50
    page.click("#many-cancel")
    finish(page)
    assert page.inner_text("#many-state") == "60 rows can be scored."
    server.gate.set()
    until(lambda: server.at_a_time == 0, "the end of requests that were given up")
    start(page)
    finish(page)
    assert page.inner_text("#many-state") == "Done: 60 rows."
    assert server.most_at_a_time == 4
    page.click("#rows-on")
    assert column(page, 1) == [str(number) for number in range(51, 61)]
    assert page.inner_text("#rows-count") == "Rows 51 to 60 of 60"


def test_it_waits_where_the_server_asks_for_it_and_stops_where_a_key_is_needed(open_page, server):
    page = open_page(fails=[429, 401, 500], still=True)
    choose(page, "rows.csv", lines(6))
    server.refuse("/v1/classify", 429, "queue_full", "too much waits", Retry_After="7")
    start(page)
    expect(page.locator("#many-waiting")).to_have_text("The server is overloaded. Waiting 7 seconds, then going on.")
    page.clock.run_for(5000)
    assert page.is_visible("#many-waiting")
    until(lambda: page.clock.run_for(500) or not page.is_visible("#many-cancel"), "the end")
    assert page.inner_text("#many-state") == "Done: 6 rows."
    assert sorted(body["text"] for body in server.requests["classify"]) == [f"row {number}" for number in range(1, 7)]

    page.click("#many-again")
    server.refuse("/v1/classify", 500, "internal_error", "the server failed")
    start(page)
    until(lambda: page.clock.run_for(300) or not page.is_visible("#many-cancel"), "the end")
    assert "1 of them without an answer" in page.inner_text("#many-state")
    page.get_by_role("button", name="Try 1 row again").click()
    until(lambda: page.clock.run_for(300) or page.inner_text("#many-state") == "Done: 6 rows.", "the end")

    page.click("#many-again")
    server.refuse("/v1/classify", 401, "invalid_api_key", "no valid key")
    start(page)
    until(lambda: page.clock.run_for(300) or not page.is_visible("#many-cancel"), "the end")
    assert "asks for a key" in page.inner_text("#many-problem")
    assert page.inner_text("#state") == "Key needed"


def test_a_first_example_takes_one_click(open_page, server):
    server.models = [model("claims"), model("asked", text="Is it so?")]
    page = open_page()
    pictures = page.locator("#example-pictures button")
    expect(pictures).to_have_count(8)
    pictures.first.click()
    expect(page.locator(".answer")).to_have_count(1)
    (first,) = server.requests["classify"]
    assert len(first["images"]) == 1
    assert first["text"] == page.locator("#example-pictures button").first.get_attribute("title")
    page.select_option("#model", "asked")
    pictures.nth(1).click()
    until(lambda: len(server.requests["classify"]) == 2, "the second answer")
    assert server.requests["classify"][1]["text"] == "Is it so?"
    assert server.requests["classify"][1]["images"] != first["images"]


@pytest.mark.soak
def test_tables_that_cannot_be_used_are_explained(open_page):
    page = open_page()
    for name, content, words in (
        ("a.csv", '"x', "a.csv has a quote that is opened in record 1 and never closed."),
        ("b.csv", "text\n", "b.csv holds no rows."),
        ("c.csv", "text\n" + "x\n" * 50_001, "50,001 rows; this page takes at most 50,000"),
    ):
        page.set_input_files("#table-files", {"name": name, "buffer": content.encode(), "mimeType": "text/csv"})
        expect(page.locator("#many-problem")).to_contain_text(words)
    sheet = transfer(page, ("d.xlsx", "application/vnd.ms-excel", b"PK"))
    page.dispatch_event("main", "drop", {"dataTransfer": sheet})
    expect(page.locator("#picture-warnings")).to_contain_text("Save it there as CSV")


@pytest.mark.soak
def test_thousands_of_rows_do_not_freeze_the_page(open_page, server):
    page = open_page()
    choose(page, "rows.csv", lines(5000))
    start(page)
    longest = page.evaluate("""async () => {
      let [last, longest] = [performance.now(), 0];
      while (!document.getElementById("many-cancel").hidden) {
        await new Promise((resolve) => { setTimeout(resolve, 10); });
        longest = Math.max(longest, performance.now() - last);
        last = performance.now();
      }
      return longest;
    }""")
    print(f"longest pause of the page: {longest:.0f} ms")
    assert page.inner_text("#many-state") == "Done: 5,000 rows."
    assert page.locator("#rows tr").count() == 50
    assert longest < 5000, "this would be a frozen page"
