"""Rows of a shard: read where they lie, with a code for what is wrong; pictures fetched from where they may be."""

from __future__ import annotations

import dataclasses
import http.server
import io
import json
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from qwen_vl_classifier.data.table import Columns
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.images.fetching import Fetcher
from qwen_vl_classifier.images.limits import ImageLimits
from qwen_vl_classifier.images.opening import open_image
from qwen_vl_classifier.scoring.jobs import Pulse, Task
from qwen_vl_classifier.scoring.plan import Plan, make_plan
from qwen_vl_classifier.scoring.reading import ShardReader, SourceRow
from qwen_vl_classifier.scoring.sources import SourceSpec
from tests.waiting import LIMIT, until

COLUMNS = Columns("image", "text", "label", "id")


def picture(color: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(file, "PNG")
    return file.getvalue()


def plan_of(path: Path | str, *rows: dict | str, **options) -> Plan:
    """Write rows as JSONL, here or to a store, and plan them as one shard."""
    content = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    else:
        fsspec.filesystem("memory").pipe(path, content.encode())
    return make_plan(path, COLUMNS, **{"shard_size": 100, **options})


def row(image, text="a claim", **cells) -> dict:
    return {"image": image, "text": text, **cells}


def read_rows(plan: Plan) -> list[SourceRow]:
    """Read the rows of a plan of one shard, pictures fetched."""
    reader = ShardReader(plan.spec)
    return reader.fetch(reader.read(plan[0]))


def outcomes(plan: Plan, **options) -> list[str]:
    """Return the code of each row, or the colour of its picture."""
    reader = ShardReader(plan.spec, plan.given, **options)
    rows = [row for shard in plan for row in reader.fetch(reader.read(shard))]
    for one in rows:
        assert (one.example is None) == bool(one.code) == bool(one.error)
        assert "\n" not in one.error
    return [one.code or "#{:02x}{:02x}{:02x}".format(*pixel(one.example.images[0])) for one in rows]


def pixel(source) -> tuple[int, int, int]:
    return open_image(source).getpixel((0, 0))


RED, BLUE = "#ff0000", "#0000ff"


def test_every_bad_row_has_a_code_and_names_its_line(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(picture())
    (tmp_path / "data" / "link.png").symlink_to("../secret.png")
    plan = plan_of(
        tmp_path / "data" / "rows.jsonl",
        row("gone.png"),
        row("../secret.png"),
        row("link.png"),
        row("https://host/a.png?signature=abc"),
        row(None, " "),
        row(7),
        "{",
        row("gone.png", 7, id="both"),
        row(None, id="good", label="not looked at"),
    )
    rows = read_rows(plan)
    assert [(one.code, one.error) for one in rows] == [
        ("image_missing", "line 1: image 'gone.png' does not exist, expected a file"),
        (
            "image_refused",
            "line 2: image '../secret.png' is outside the folder of the data file; add allow_outside=True to permit it",
        ),
        (
            "image_refused",
            "line 3: image 'link.png' (through the link 'link.png') is outside the folder of the data file; add "
            "allow_outside=True to permit it",
        ),
        ("image_refused", "line 4: image 'https://host/a.png' is a URL, expected a file: URLs are not fetched here"),
        ("invalid_row", "line 5: text is blank, expected words"),
        ("invalid_row", "line 6: image is of type int, expected a path, the bytes of an image file or a PIL image"),
        (
            "invalid_row",
            "line 7: not JSON (Expecting property name enclosed in double quotes at column 2)",
        ),
        (
            "image_missing",
            "line 8: image 'gone.png' does not exist, expected a file; text is of type int, expected text",
        ),
        ("", ""),
    ]
    assert [one.id for one in rows] == ["0", "1", "2", "3", "4", "5", "6", "both", "good"]
    assert [one.row for one in rows] == list(range(9))
    assert (rows[8].example.text, rows[8].example.label) == ("a claim", None)
    assert rows[8].example.fields == {}  # what is not looked at is not held


def test_pictures_lie_beside_the_file_that_names_them(tmp_path):
    for folder, color in (("a", "red"), ("b", "blue")):
        plan_of(tmp_path / folder / "rows.jsonl", row("x.png"))
        (tmp_path / folder / "x.png").write_bytes(picture(color))
    assert outcomes(make_plan(tmp_path / "*" / "rows.jsonl", COLUMNS, shard_size=5)) == [RED, BLUE]


def test_nothing_but_the_shard_is_read(tmp_path, monkeypatch):
    plan = plan_of(tmp_path / "rows.jsonl", *(row(None, f"text {number}") for number in range(10)), shard_size=2)
    (span,) = plan[3].spans
    content = bytearray((tmp_path / "rows.jsonl").read_bytes())
    end = plan[4].spans[0].start
    content[: span.start - 1] = b"\xff" * (span.start - 1)
    content[end:] = b"\xff" * (len(content) - end)
    (tmp_path / "rows.jsonl").write_bytes(content)
    assert [one.example.text for one in ShardReader(plan.spec).read(plan[3])] == ["text 6", "text 7"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_file_that_has_changed_is_refused(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"

    def write(count: int, text: str) -> None:
        if suffix == "parquet":
            parquet.write_table(pyarrow.table({"image": [b"x"] * count, "text": [text] * count}), path)
        elif suffix == "csv":
            path.write_text("image,text\n" + f",{text}\n" * count)
        else:
            path.write_text((json.dumps(row(None, text)) + "\n") * count)

    write(10, "words")
    plan = make_plan(path, COLUMNS, shard_size=5)
    write(9, "words")
    with pytest.raises(DataError, match="has changed since its shards were planned"):
        ShardReader(plan.spec).read(plan[1])
    write(10, "other words")
    if suffix != "parquet":
        with pytest.raises(DataError, match="has changed since its shards were planned"):
            ShardReader(plan.spec).read(plan[1])
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        ShardReader(plan.spec).read(plan[1])


def test_parquet_in_order_is_read_once(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"image": [None] * 900, "text": [f"text {row}" for row in range(900)]}), path)
    opened = []
    start = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        parquet.ParquetFile,
        "iter_batches",
        lambda *arguments, **options: (opened.append(arguments), start(*arguments, **options))[1],
    )
    plan = make_plan(path, COLUMNS, shard_size=100)
    opened.clear()
    reader = ShardReader(plan.spec)
    for index in (0, 1, 4, 8):
        assert reader.read(plan[index])[99].example.text == f"text {index * 100 + 99}"
    assert len(opened) == 1
    assert reader.read(plan[2])[0].example.text == "text 200"
    assert len(opened) == 2


def test_ids_of_arrows_uuid_type_are_text(tmp_path):
    path = tmp_path / "rows.parquet"
    ids = pyarrow.array([b"0" * 16], pyarrow.binary(16)).cast(pyarrow.uuid())
    parquet.write_table(pyarrow.table({"image": [None], "text": ["words"], "id": ids}), path)
    plan = make_plan(path, COLUMNS, shard_size=1)
    assert [row.id for row in read_rows(plan)] == ["30303030-3030-3030-3030-303030303030"]


def test_a_row_that_python_cannot_hold_is_an_error_of_its_own(tmp_path):
    path = tmp_path / "rows.parquet"
    texts = pyarrow.array([b"good", b"\xff", b"good too"]).view("string")
    parquet.write_table(pyarrow.table({"image": [None] * 3, "text": texts}), path)
    plan = make_plan(path, COLUMNS, shard_size=3)
    found = read_rows(plan)
    assert [one.code for one in found] == ["", "invalid_row", ""]
    assert found[1].error == "row 2: holds text that is not UTF-8, or a date beyond Python's"


def test_pictures_in_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    cells = [
        {"bytes": picture(), "path": None},
        {"bytes": picture("blue"), "path": "gone.png"},
        {"bytes": b"", "path": "x"},
    ]
    parquet.write_table(pyarrow.Table.from_pylist([row(cell) for cell in cells]), path)
    assert outcomes(make_plan(path, COLUMNS, shard_size=2)) == [RED, BLUE, "image_missing"]


class TestFolders:
    """Folders of pictures with one text."""

    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        for name in ("b.png", "a-1/x.PNG", "a/z.png", "a/deep/y.png", ".hidden/n.png", "a/.n.png"):
            path = tmp_path / "pictures" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture("blue" if name == "b.png" else "red"))
        return tmp_path / "pictures"

    def test_pictures_are_in_order_of_name_and_named_by_it(self, folder):
        (folder / "a" / "notes.txt").write_text("no picture")
        (folder / "a" / "Thumbs.db").write_text("left by a file manager")
        plan = make_plan(folder, COLUMNS, shard_size=2, text="Is it red?")
        reader = ShardReader(SourceSpec.from_json(json.loads(json.dumps(dataclasses.asdict(plan.spec)))))
        rows = [row for shard in plan for row in reader.read(shard)]
        assert [one.id for one in rows] == ["a/deep/y.png", "1", "a/z.png", "a-1/x.PNG", "b.png"]
        assert rows[1].error.startswith("picture 2: 'a/notes.txt' in a folder of pictures: ")
        assert rows[1].code == "invalid_row"
        assert {one.example.text for one in rows if one.example} == {"Is it red?"}
        assert outcomes(plan) == [RED, "invalid_row", RED, RED, BLUE]

    def test_classes_are_folders_like_others(self, tmp_path):
        for name in ("0/a.png", "1/a.png"):
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).write_bytes(picture())
        plan = make_plan(tmp_path, COLUMNS, shard_size=5, text="Is it red?")
        assert [one.id for one in read_rows(plan)] == ["0/a.png", "1/a.png"]

    def test_a_text_is_needed(self, folder):
        with pytest.raises(DataError, match="expected the text that goes with all of them; give it, such as text="):
            make_plan(folder, COLUMNS, shard_size=2)

    def test_links_may_not_leave(self, folder):
        (folder.parent / "out.png").write_bytes(picture("blue"))
        (folder / "b.png").unlink()
        (folder / "b.png").symlink_to("../out.png")
        (folder / "c.png").symlink_to("a/z.png")
        (folder / "d.png").symlink_to("gone.png")
        plan = make_plan(folder, COLUMNS, shard_size=10, text="words")
        assert outcomes(plan)[3:] == ["image_refused", RED, "image_missing"]
        plan = make_plan(folder, COLUMNS, shard_size=10, text="words", allow_outside=True)
        assert outcomes(plan)[3:] == [BLUE, RED, "image_missing"]

    def test_a_linked_folder_is_refused_unless_it_is_allowed(self, folder):
        (folder.parent / "more").mkdir()
        (folder.parent / "more" / "x.png").write_bytes(picture("blue"))
        (folder / "more").symlink_to("../more")
        with pytest.raises(DataError, match=r"more is a link to a folder that leads out of .* add allow_outside=True"):
            make_plan(folder, COLUMNS, shard_size=10, text="words")
        assert outcomes(make_plan(folder, COLUMNS, shard_size=10, text="words", allow_outside=True))[-1] == BLUE
        (folder / "more").unlink()
        before = outcomes(make_plan(folder, COLUMNS, shard_size=10, text="words"))
        (folder / "a" / "again").symlink_to("..")  # leads back to where it is: nothing new
        assert outcomes(make_plan(folder, COLUMNS, shard_size=10, text="words")) == before

    def test_the_digest_is_of_names_and_sizes(self, folder):
        before = make_plan(folder, COLUMNS, shard_size=10, text="words").digest
        assert make_plan(folder, COLUMNS, shard_size=2, text="other").digest == before
        (folder / "b.png").write_bytes(picture() + b"more" * 10)
        larger = make_plan(folder, COLUMNS, shard_size=10, text="words").digest
        (folder / "b.png").rename(folder / "c.png")
        assert len({before, larger, make_plan(folder, COLUMNS, shard_size=10, text="words").digest}) == 3

    def test_names_that_are_not_utf8_are_read(self, folder):
        (folder / os.fsdecode(b"\xff.png")).write_bytes(picture("blue"))
        assert outcomes(make_plan(folder, COLUMNS, shard_size=10, text="words"))[-1] == BLUE

    def test_a_folder_in_a_store(self):
        place = f"/{uuid.uuid4().hex}"
        files = fsspec.filesystem("memory")
        for name in ("b.png", "a/z.png", ".hidden/x.png"):
            files.pipe(f"{place}/{name}", picture("blue" if name == "b.png" else "red"))
        assert outcomes(make_plan(f"memory:/{place}", COLUMNS, shard_size=10, text="words")) == [RED, BLUE]


class TestStores:
    """Pictures that lie in the store of their data file."""

    @pytest.fixture
    def folder(self) -> str:
        place = f"memory://{uuid.uuid4().hex}"
        files = fsspec.filesystem("memory")
        files.pipe(f"{place}/data/images/a.png", picture())
        files.pipe(f"{place}/secret.png", picture("blue"))
        return place

    def test_pictures_are_read_by_path(self, folder):
        whole = f"{folder}/data/images/a.png"
        plan = plan_of(
            f"{folder}/data/rows.jsonl", row("images/a.png"), row(whole), row("./images//a.png"), row("gone.png")
        )
        assert outcomes(plan) == [RED, RED, RED, "image_missing"]

    @pytest.mark.parametrize(
        "name",
        [
            "../secret.png",
            "images/../../secret.png",
            "/secret.png",
            "..\\secret.png",
            "{folder}/secret.png",
            "{folder}/data/../secret.png",
            "{folder}/database/x.png",
            "s3://bucket/secret.png",
            "file:///etc/passwd",
            "https://host/secret.png",
        ],
    )
    def test_paths_may_not_leave_the_folder(self, folder, name):
        plan = plan_of(f"{folder}/data/rows.jsonl", row(name.format(folder=folder)))
        assert outcomes(plan) == ["image_refused"]

    def test_paths_may_leave_the_folder_where_that_is_allowed_but_not_the_store(self, folder):
        names = ["../secret.png", f"{folder}/secret.png", "/secret.png", "../../../secret.png"]
        refused = ["file:///etc/passwd", "memory://me:password@host/a.png"]
        plan = plan_of(f"{folder}/data/rows.jsonl", *map(row, names + refused), allow_outside=True)
        assert outcomes(plan) == [BLUE, BLUE, BLUE, BLUE, "image_refused", "image_refused"]
        assert "password" not in read_rows(plan)[-1].error

    def test_a_picture_that_is_too_large_is_not_held(self, folder):
        plan = plan_of(f"{folder}/data/rows.jsonl", row("images/a.png"))
        plan.spec = dataclasses.replace(plan.spec, limits=ImageLimits(max_bytes=10))
        assert outcomes(plan) == ["image_too_large"]

    def test_a_store_that_fails_is_an_error_of_the_row(self, folder, monkeypatch):
        plan = plan_of(f"{folder}/data/rows.jsonl", row("images/a.png"))

        def failing(*_: object, **__: object) -> None:
            raise RuntimeError("secret")

        monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", failing)
        (found,) = read_rows(plan)
        assert found.code == "image_refused"
        assert found.error.startswith("line 1: 'memory://")
        assert found.error.endswith(
            "images/a.png' cannot be read (Input/output error, RuntimeError); expected a picture"
        )
        assert "secret" not in found.error

    def test_several_pictures_and_one_of_several_rows_are_fetched_once(self, folder, monkeypatch):
        memory = type(fsspec.filesystem("memory"))
        fetched, cat_file = [], memory.cat_file
        monkeypatch.setattr(
            memory,
            "cat_file",
            lambda self, path, **options: (fetched.append(path), cat_file(self, path, **options))[1],
        )
        names = ["images/a.png", ["images/a.png"], ["images/a.png", "gone.png"], None]
        plan = plan_of(f"{folder}/data/rows.jsonl", *map(row, names))
        found = read_rows(plan)
        assert sorted(path.rpartition("/")[2] for path in fetched) == ["a.png", "gone.png"]
        assert [one.code for one in found] == ["", "", "image_missing", ""]
        assert found[0].example.image == picture()
        assert found[1].example.image == (picture(),)

    def test_only_what_is_fetched_is_held(self, folder):
        plan = plan_of(f"{folder}/data/rows.jsonl", row("images/a.png"))
        reader = ShardReader(plan.spec)
        (found,) = reader.read(plan[0])
        assert found.example.image == f"{folder}/data/images/a.png"
        assert reader.fetch([]) == []


class TestUrls:
    """Pictures by http from hosts that are named."""

    @pytest.fixture
    def port(self) -> Iterator[int]:
        class Pictures(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = self.path.startswith("/a.png")
                self.send_response(200 if known else 404)
                self.end_headers()
                self.wfile.write(picture() if known else b"")

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()
        server.server_close()

    def fetcher(self, port: int) -> Fetcher:
        hosts = [f"pictures.test:{port}"]
        return Fetcher(hosts, timeout=LIMIT, resolve=lambda *_: ["127.0.0.1"], allow=lambda _: True)

    def test_pictures_are_fetched_from_named_hosts(self, tmp_path, port):
        urls = [
            f"http://pictures.test:{port}/a.png",
            f"http://pictures.test:{port}/gone.png?signature=abc",
            f"http://other.test:{port}/a.png",
            "ftp://pictures.test/a.png",
            "a.png",
        ]
        plan = plan_of(tmp_path / "rows.jsonl", *map(row, urls), url_hosts=(f"pictures.test:{port}",))
        (tmp_path / "a.png").write_bytes(picture("blue"))
        expected = [RED, "image_missing", "image_refused", "image_refused", BLUE]
        assert outcomes(plan, fetcher=self.fetcher(port)) == expected
        reader = ShardReader(plan.spec, fetcher=self.fetcher(port))
        errors = [one.error for one in reader.fetch(reader.read(plan[0]))]
        assert "signature" not in "".join(errors)
        assert errors[1].startswith("line 2: ")

    def test_rows_of_a_store_may_name_them_too(self, port):
        url = f"http://pictures.test:{port}/a.png"
        plan = plan_of(f"memory://{uuid.uuid4().hex}/rows.jsonl", row(url), url_hosts=(f"pictures.test:{port}",))
        assert outcomes(plan, fetcher=self.fetcher(port)) == [RED]

    def test_without_a_fetcher_one_is_made_that_knows_public_addresses_only(self, tmp_path, port):
        plan = plan_of(tmp_path / "rows.jsonl", row(f"http://localhost:{port}/a.png"), url_hosts=(f"localhost:{port}",))
        assert outcomes(plan) == ["image_refused"]


def test_secrets_of_a_store_are_not_shown():
    spec = SourceSpec("jsonl", "rows", "line", COLUMNS, storage_options={"secret": "abc"})
    assert "abc" not in repr(spec)
    assert SourceSpec.from_json(dataclasses.asdict(spec)) == spec


def test_files_are_closed_in_the_end(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([row(None)]), path)
    plan = make_plan(path, COLUMNS, shard_size=1)
    reader = ShardReader(plan.spec)
    reader.read(plan[0])
    file = reader._parquet[1]._raw
    assert not file.closed
    del reader
    assert file.closed


@pytest.fixture
def six_pictures(tmp_path) -> Plan:
    for number, color in enumerate(("red", "green", "blue", "white", "black", "gray")):
        (tmp_path / f"{number}.png").write_bytes(picture(color))
    return plan_of(tmp_path / "rows.jsonl", *(row(f"{number}.png") for number in range(6)))


def read_instead(monkeypatch, processor, before) -> None:
    """Call something before the pictures of an example are read, in the thread that reads them."""
    read = processor.read_pictures

    def reading(example, **how):
        before(Path(str(example.images[0])).name)
        return read(example, **how)

    monkeypatch.setattr(processor, "read_pictures", reading)


def test_the_pulse_names_the_row_that_hangs_though_others_are_read_meanwhile(six_pictures, tiny_backbone, monkeypatch):
    pulse, hangs, others = Pulse(), threading.Event(), threading.Semaphore(0)

    def before(name: str) -> None:
        if name == "2.png":
            assert hangs.wait(LIMIT)
        others.release()

    read_instead(monkeypatch, tiny_backbone.processor, before)
    reader = ShardReader(six_pictures.spec, pulse=pulse, threads=3)
    found: list = []
    thread = threading.Thread(
        target=lambda: found.extend(reader.windows(tiny_backbone.processor, [Task(six_pictures[0])]))
    )
    thread.start()
    for _ in range(5):
        assert others.acquire(timeout=LIMIT)
    until(lambda: pulse.row == 2, "the row that hangs")
    hangs.set()
    thread.join()
    assert [window.rows for window in found] == [[0, 1, 2, 3, 4, 5]]
    assert pulse.row is None


@pytest.mark.parametrize("careful", [True, False])
def test_pictures_are_opened_one_after_the_other_where_a_worker_has_died(
    six_pictures, tiny_backbone, monkeypatch, careful
):
    together = threading.Barrier(3, timeout=LIMIT)
    running: list[str] = []

    def before(name: str) -> None:
        running.append(threading.current_thread().name)
        if not careful:
            together.wait()

    read_instead(monkeypatch, tiny_backbone.processor, before)
    reader = ShardReader(six_pictures.spec, threads=3)
    (window,) = reader.windows(tiny_backbone.processor, [Task(six_pictures[0], careful=careful)])
    assert window.rows == [0, 1, 2, 3, 4, 5]
    assert len(set(running)) == (1 if careful else 3)
