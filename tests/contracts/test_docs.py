"""Every code block of the documents runs, on the built-in backbone where they name a published one."""

from __future__ import annotations

import functools
import itertools
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_vl_classifier import Classifier, TrainConfig, load_examples, train
from qwen_vl_classifier.cli.main import build_parser, main
from qwen_vl_classifier.scenes.colour_match import CLASSES, write_task
from qwen_vl_classifier.scenes.statements import write_dataset

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PUBLISHED = re.compile(r"Qwen/Qwen[\w.-]+")
TEXT = "The parcel is damaged."
SERVED = "http://127.0.0.1:8000"  # where the documents say that a server is
QUICK = {
    "train": {"--taps": "mean:-1,last:-1", "--heads": "linear", "--epochs": "5"},
    "finetune": {"--epochs": "1"},
}
"""Options added to commands that do not choose them, as documents train often."""
FIRST = ("README.md", "CONTRIBUTING.md", "docs/index.md")
"""Where blocks run in every `make test`; the others run with the long variants."""

CODE_LANGUAGES = {"bash", "python", "json", "toml"}
READERS = {"json": json.loads, "toml": tomllib.loads}
OWN_FOLDERS = {"tests", "benchmarks", "scripts", "docs", "tools"} | {
    path.name for path in (ROOT / "qwen_vl_classifier").iterdir() if path.is_dir()
}
TRACING_PACKAGES = [
    "opentelemetry-distro",
    "opentelemetry-exporter-otlp-proto-http",
    "opentelemetry-instrumentation-fastapi",
]


def blocks(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line number, language and content of each fenced block."""
    text = path.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, match.start()) + 1, match[1], match[2]


ALL_BLOCKS = [
    (f"{path.relative_to(ROOT)}:{line}", language, content)
    for path in DOCUMENTS
    if path.name != "README.ru.md"  # its blocks are those of README.md
    for line, language, content in blocks(path)
    if language in CODE_LANGUAGES
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_backbone) -> Path:
    """A folder with the files that the documents speak of: a small demo, and what readers have of their own."""
    folder = tmp_path_factory.mktemp("reader")
    task = write_task(folder / "demo" / "data", train=60, test=20, new=6)
    rows = load_examples(task.train, positive=CLASSES[1])
    config = TrainConfig(taps="mean:-1,last:-1", heads="linear")
    classifier = train(rows, backbone=tiny_backbone, config=config).classifier
    for name in ("demo/classifier", "my_classifier", "other_classifier", "labels-classifier"):
        classifier.save(folder / name)
    untrained = Classifier.zero_shot(tiny_backbone)
    untrained.label_names = CLASSES
    untrained.save(folder / "demo" / "zero-shot")
    for seed, name in enumerate(("train", "dev")):
        write_dataset(folder / "data", split="test", name=name, seed=seed, scenes=10, per_scene=2)
    shutil.copy(folder / "demo" / "data" / "new" / "01.png", folder / "photo.jpg")
    shutil.copytree(folder / "demo" / "data" / "new", folder / "new-photos")
    for name, source in {"photos": "train", "test-photos": "test"}.items():
        for label, picture in {"damaged": "matching", "intact": "mixed"}.items():
            shutil.copytree(folder / "demo" / "data" / source / picture, folder / name / label)
    table = [(path.relative_to(folder), path.parent.name) for path in sorted((folder / "photos").rglob("*.png"))]
    labels, outcomes = {"damaged": 1, "intact": 0}, {"damaged": "refunded", "intact": "kept"}
    write_table(folder / "parcels.csv", "image,text,label", [(path, TEXT, labels[name]) for path, name in table])
    write_table(folder / "orders.csv", "Photo;Claim;Outcome", [(path, TEXT, outcomes[name]) for path, name in table])
    states = {"good": (1, 0, 0, "no"), "scratch": (0, 1, 0, ""), "dirt": (0, 0, 1, "yes")}
    parts = [(path, "A metal part.", state, *states[state]) for (path, _), state in zip(table, itertools.cycle(states))]
    for name in ("parts.csv", "test.csv", "new.csv"):
        write_table(folder / name, "image,text,state,good,scratch,dirt,dirty", parts)
    return folder


def write_table(path: Path, header: str, rows: list[tuple[object, ...]]) -> None:
    """Write what a spreadsheet saves; the header tells what stands between the cells."""
    between = ";" if ";" in header else ","
    lines = [header, *(between.join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def reader(workplace, scores_here, blank_plots, monkeypatch):
    """Somebody who types what the documents show."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.long
@pytest.mark.usefixtures("reader")
def test_first_blocks_run(request, subtests):
    """Those that a stranger meets first."""
    run_blocks([block for block in ALL_BLOCKS if block[0].startswith(FIRST)], request, subtests)


@pytest.mark.soak
@pytest.mark.usefixtures("reader")
def test_all_blocks_run(request, subtests):
    run_blocks(ALL_BLOCKS, request, subtests)


def run_blocks(chosen: list[tuple[str, str, str]], request: pytest.FixtureRequest, subtests: pytest.Subtests) -> None:
    """Run blocks in their order, since they build upon each other."""
    for name, language, content in chosen:
        with subtests.test(name):
            content = PUBLISHED.sub("builtin:tiny", content)
            if SERVED in content:
                content = content.replace(SERVED, request.getfixturevalue("server_url"))
            run_block(language, content)


def run_block(language: str, content: str) -> None:
    if language in READERS:
        READERS[language](content)
    elif language == "python":
        exec(compile(content, "block", "exec"), {"__name__": "__main__"})
    elif content.startswith("curl "):
        run_curl(content)
    else:
        for words in commands_of(content):
            run_command(words)


@pytest.mark.parametrize(("name", "language", "content"), ALL_BLOCKS, ids=[block[0] for block in ALL_BLOCKS])
def test_blocks_are_well_formed(name, language, content):
    """What runs with the long variants is at least what Python and the command line can read."""
    if language in READERS:
        READERS[language](content)
    elif language == "python":
        compile(content, name, "exec")
    elif not content.startswith("curl "):
        for words in commands_of(content):
            if "qwen-vl-classifier" in words:
                parser().parse_args(words[words.index("qwen-vl-classifier") + 1 :])


parser = functools.cache(build_parser)  # it takes longer to build than to use


def commands_of(script: str) -> Iterator[list[str]]:
    """Yield the words of each command."""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def run_command(words: list[str]) -> None:
    """Run one line of shell; what would install or recurse is checked instead."""
    words = [words[0].removeprefix(".venv/bin/"), *words[1:]]
    if words[:2] == ["qwen-vl-classifier", "serve"]:
        flags = parser().parse_args(words[1:])
        assert flags.classifiers or flags.watch  # it would run for ever
    elif words[:2] == ["qwen-vl-classifier", "label"]:
        parser().parse_args(words[1:])  # it waits for a person: `tests/cli/test_label.py` answers it
    elif words == ["qwen-vl-classifier", "demo"]:
        pass  # a minute: `tests/cli/test_demo.py` runs it, and the workplace holds a small one
    elif words[0] == "qwen-vl-classifier":
        if "--out" in words and words[1] != "score":  # each document is read on its own
            made = Path(words[words.index("--out") + 1])
            made.unlink() if made.is_file() else shutil.rmtree(made, ignore_errors=True)
        quick = [pair for pair in QUICK.get(words[1], {}).items() if pair[0] not in words]
        assert main([*words[1:], *itertools.chain(*quick)]) == 0
    elif words[0] == "python" and words[1].endswith(".py"):
        assert words[1:] in (["test_classifier.py"], ["example_usage.py"])  # `tests/test_scripts.py` runs them
    elif words[0] == "make":
        targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    elif words[:2] == ["pip", "install"]:
        assert words[2:] in (["--constraint", "constraints.txt", "."], TRACING_PACKAGES)
        assert (ROOT / "constraints.txt").is_file()
    elif words[0] == "opentelemetry-instrument":
        run_command(words[words.index("qwen-vl-classifier") :])
    else:
        pytest.fail(f"the documents hold a command that no test runs: {shlex.join(words)}")


def run_curl(script: str) -> None:
    """Run a block that asks a server; any status but 200 is an error."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not on this machine")
    script = re.sub(r"^curl ", "curl --silent --show-error --fail-with-body ", script, flags=re.MULTILINE)
    done = subprocess.run(["bash", "-e", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_blocks():
    assert len(ALL_BLOCKS) > 10


def test_both_languages_hold_the_same_blocks():
    english, russian = ([block[1:] for block in blocks(ROOT / name)] for name in ("README.md", "README.ru.md"))
    assert english == russian


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("https://"):
            assert (path.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(path):
    """Tests, modules and scripts, by their path from the root or from the package."""
    for name in re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", path.read_text(encoding="utf-8")):
        if name.split("/")[0] in OWN_FOLDERS:
            assert any((root / name).exists() for root in (ROOT, ROOT / "qwen_vl_classifier")), name


def test_only_known_languages_of_blocks():
    assert {language for path in DOCUMENTS for _, language, _ in blocks(path)} <= CODE_LANGUAGES | {"text"}
