"""`label`: ask people about rows in a browser, and make a data set and a classifier of the answers."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vl_classifier.cli.flags import VerbParser, add_flags, from_flags
from qwen_vl_classifier.cli.options import (
    add_backbone_flags,
    add_class_names_flag,
    add_data_flags,
    add_features_flag,
    load_backbone,
    loading_options,
    open_store,
    read_examples,
    show_left_out,
)
from qwen_vl_classifier.cli.shared.endings import command_line, features_line, wrapped
from qwen_vl_classifier.config.label import LabelConfig
from qwen_vl_classifier.config.serve import ServeConfig
from qwen_vl_classifier.config.train import TrainConfig
from qwen_vl_classifier.errors import CheckpointError, ConfigError
from qwen_vl_classifier.extras import require

if TYPE_CHECKING:
    from qwen_vl_classifier.backbone.backbone import Backbone
    from qwen_vl_classifier.classifier.classifier import Classifier
    from qwen_vl_classifier.data.example import Example
    from qwen_vl_classifier.labelling.asking import LabelSpec
    from qwen_vl_classifier.labelling.finishing import Finishing
    from qwen_vl_classifier.labelling.pool import Pool
    from qwen_vl_classifier.labelling.session import Session

_HOST = "127.0.0.1"
_GRACE_SECONDS = 5.0  # for requests that are in progress at the end


def add_parser(verbs: argparse._SubParsersAction[VerbParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "label",
        help="label rows in a browser, and train a classifier on the answers",
        description="Show rows without labels in a web page on this machine, and keep the answers.",
        details="Rows are read once. Then the page asks about those from which a classifier learns most, and some at "
        "random, on which it is measured. Every answer is on disk at once: the same command goes on where it ended. "
        "The data set is what `train --sampled-column sampled` takes, and the page can train too.",
        usage="%(prog)s DATA --out FILE.jsonl [options]",
        example='qwen-vl-classifier label photos --text "It shows a dog." --out dogs.jsonl',
    )
    parser.add_argument(
        "data",
        metavar="DATA",
        help="rows to label: a folder of pictures, or a CSV, TSV, JSON, JSONL or Parquet file",
    )
    parser.add_flag(
        "--out", type=Path, required=True, metavar="FILE.jsonl", help="file for the labelled rows; answers go beside it"
    )
    add_class_names_flag(parser)
    add_backbone_flags(parser)
    add_features_flag(parser)
    add_data_flags(parser, columns=False, labels=False)
    add_flags(parser, LabelConfig)
    parser.set_defaults(run=run)


@dataclasses.dataclass(frozen=True, slots=True)
class _Task:
    """What is asked, and what reads the rows."""

    labels: tuple[LabelSpec, ...]
    one_of: bool
    backbone: Backbone
    classifiers: tuple[Classifier, ...]
    """Those to start from, one for each label, or none."""


def run(flags: argparse.Namespace) -> int:
    """Encode the rows, ask about them until told to stop, and say what was saved where."""
    config = from_flags(LabelConfig, flags)
    for module in ("fastapi", "uvicorn", "httptools"):
        require(module, extra="serve")
    from qwen_vl_classifier.data.example import shared_text
    from qwen_vl_classifier.labelling.answers.journal import Journal
    from qwen_vl_classifier.labelling.finishing import Finishing
    from qwen_vl_classifier.labelling.session import Session
    from qwen_vl_classifier.serving.http.listening import listening

    if flags.features is None:
        flags.features = flags.out.with_name(f"{flags.out.stem}-features")
    examples = _read(flags, config)
    task = _task(flags, config)
    question = shared_text(examples)
    journal = Journal.at(
        flags.out,
        labels=task.labels,
        one_of=task.one_of,
        question=question,
        seed=config.seed,
        backbone=task.backbone.name,
        data=str(flags.data),
    )
    store = open_store(flags)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listening(_HOST, config.port))  # before the rows are read, which takes long
        pool = _pool(examples, task, store, flags)
        stack.callback(pool.close)
        session = Session(
            pool,
            task.labels,
            journal,
            one_of=task.one_of,
            annotator=config.annotator,
            random_share=config.random_share,
            queue=_queue(config, pool),
            start=_starts(task, pool),
        )
        finishing = Finishing(
            task.backbone,
            task.labels,
            one_of=task.one_of,
            out=flags.out,
            store=store,
            config=TrainConfig(seed=config.seed),
            train_command=command_line(*_train_words(flags, task, session)).strip(),
        )
        try:
            _serve(flags, config, listener, session, finishing, question)
            _wait_for(finishing)
        finally:
            session.close()
        _conclude(flags, task, session, finishing)
    return 0


def _read(flags: argparse.Namespace, config: LabelConfig) -> list[Example]:
    """Read the rows, with the labels that they may have already."""
    told = flags.positive is not None or flags.class_names is not None
    several = bool(config.labels) or config.classifier != ""
    return read_examples(
        flags.data,
        flags,
        require_labels=False,
        # Folders in a folder of photos need not be classes.
        read_labels=not several and (told or not Path(flags.data).is_dir()),
        class_names=flags.class_names,
        trained=[config.classifier] if config.classifier else (),
    )


def _task(flags: argparse.Namespace, config: LabelConfig) -> _Task:
    """Load what reads the rows, and say what is asked about them.

    Raises:
        ConfigError: Options that the classifier to start from excludes.
    """
    from qwen_vl_classifier.labelling.asking import PLAIN_LABEL, LabelSpec

    if flags.class_names is not None and (config.labels or config.classifier):
        other = "--classifier" if config.classifier else "--labels"
        raise ConfigError(f"--class-names with {other}, whose answers have names of their own; give one of them")
    if not config.classifier:
        if config.labels:
            labels = [LabelSpec(name) for name in config.label_names]
        else:
            labels = [LabelSpec(PLAIN_LABEL, *(flags.class_names or ()))]
        return _Task(tuple(labels), config.one_of, load_backbone(flags), ())
    from qwen_vl_classifier.classifier.classifier import Classifier
    from qwen_vl_classifier.classifier.panel import Panel
    from qwen_vl_classifier.classifier.panel_folder import is_panel

    if is_panel(config.classifier):
        panel = Panel.load(config.classifier, **loading_options(flags))
        labels = [LabelSpec(name, *one.label_names) for name, one in zip(panel.names, panel.classifiers, strict=True)]
        return _Task(tuple(labels), panel.one_of, panel.backbone, panel.classifiers)
    classifier = Classifier.load(config.classifier, **loading_options(flags))
    labels = [LabelSpec(PLAIN_LABEL, *classifier.label_names)]
    return _Task(tuple(labels), False, classifier.backbone, (classifier,))


def _pool(examples: Sequence[Example], task: _Task, store: Any, flags: argparse.Namespace) -> Pool:
    """Read the features of all rows."""
    from qwen_vl_classifier.labelling.pool import Pool

    pool = Pool.encode(
        examples,
        task.backbone,
        store=store,
        keep_taps=[classifier.tap for classifier in task.classifiers],
        max_errors=flags.max_errors,
        progress=flags.progress,
    )
    show_left_out(pool.left_out)
    return pool


def _queue(config: LabelConfig, pool: Pool) -> Any:
    """Return the rows to ask first, or alone, if any are named."""
    if not (config.rows or config.scores):
        return None
    from qwen_vl_classifier.labelling.queues import queue_from_rows, queue_from_scores

    return queue_from_rows(config.rows, pool) if config.rows else queue_from_scores(config.scores, pool)


def _starts(task: _Task, pool: Pool) -> list[Any] | None:
    """Return what is known of the rows before any answer: by saved classifiers, or by the model's own answer."""
    from qwen_vl_classifier.classifier.classifier import Classifier

    if task.classifiers:
        return [pool.margins_by(classifier) for classifier in task.classifiers]
    if len(task.labels) > 1:
        return None
    try:
        return [pool.margins_by(Classifier.zero_shot(task.backbone))]
    except (CheckpointError, ConfigError):  # it has no language head, or no such words
        return None


def _serve(
    flags: argparse.Namespace,
    config: LabelConfig,
    listener: Any,
    session: Session,
    finishing: Finishing,
    question: str | None,
) -> None:
    """Ask until SIGTERM or an interrupt."""
    from qwen_vl_classifier.images.limits import current_limits
    from qwen_vl_classifier.labelling.web.browser_token import BrowserToken
    from qwen_vl_classifier.labelling.web.labelling_app import create_labelling_app
    from qwen_vl_classifier.labelling.web.labelling_routes import BODY_BYTES
    from qwen_vl_classifier.labelling.web.labelling_state import LabellingService
    from qwen_vl_classifier.labelling.web.screen_pictures import ScreenPictures
    from qwen_vl_classifier.serving.http.server import Server

    port = listener.getsockname()[1]
    token = BrowserToken(port)
    pool = session.pool
    labelling = LabellingService(
        session=session,
        rows=pool,
        pictures=ScreenPictures(pool.examples, current_limits()),
        finishing=finishing,
        setup={
            "title": question or Path(flags.data).name,
            "data": str(flags.data),
            "out": str(flags.out),
            "labels": [{"name": label.name, **_shown_names(label)} for label in session.labels],
            "one_of": session.one_of,
            "annotator": session.annotator,
            "rows": len(pool),
            "model": pool.backbone,
        },
        allowed=frozenset(session.journal.answers),
    )
    server = Server(
        ServeConfig(host=_HOST, port=port, grace=_GRACE_SECONDS, max_body_bytes=BODY_BYTES), listener, exits=False
    )

    def announce() -> None:
        with contextlib.suppress(OSError):  # nobody may read it any more
            print(f"label {len(pool):,} rows at {token.url}", flush=True)
            if sys.stdout.isatty():
                print("  every answer is saved at once\n  stop it: Ctrl+C", flush=True)
        if config.open_browser and not _open(token.url_for_once()):
            print("no browser could be opened here; open the address above", file=sys.stderr)

    with contextlib.suppress(KeyboardInterrupt):  # the usual end
        server.run(create_labelling_app(labelling, token), announce=announce)


def _shown_names(label: LabelSpec) -> dict[str, str]:
    """Return what the answers are called on the page, where numbers say little."""
    from qwen_vl_classifier.data.labels import PLAIN_NAMES

    return {"no": "No", "yes": "Yes"} if (label.no, label.yes) == PLAIN_NAMES else {"no": label.no, "yes": label.yes}


def _open(url: str) -> bool:
    """Open an address in a browser with a window of its own; tell whether there is one."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False  # a browser for terminals would take this one
    try:
        return webbrowser.open_new_tab(url)
    except webbrowser.Error:
        return False


def _wait_for(finishing: Finishing) -> None:
    """Wait for a training that goes on; an interrupt ends this process at once, since no thread can be stopped."""
    if not finishing.is_running:
        return
    print("Waiting for the training to end; Ctrl+C stops it", file=sys.stderr, flush=True)
    try:
        finishing.wait()
    except KeyboardInterrupt:
        print("The training was stopped; the same command goes on, and can train again", file=sys.stderr, flush=True)


def _train_words(flags: argparse.Namespace, task: _Task, session: Session) -> list[str]:
    """Return how to train on the data set."""
    from qwen_vl_classifier.data.labels import PLAIN_NAMES
    from qwen_vl_classifier.labelling.asking import PLAIN_LABEL

    words = ["train", str(flags.out), "--sampled-column", "sampled", "--features", str(flags.features)]
    label, *_ = task.labels
    if task.one_of:
        words.append("--one-of")
    elif [one.name for one in task.labels] != [PLAIN_LABEL]:
        words += ["--labels", ",".join(one.name for one in task.labels)]
    elif (label.no, label.yes) != PLAIN_NAMES:
        words += ["--class-names", f"{label.no},{label.yes}"]
    if flags.model and not task.classifiers:
        words += ["--model", flags.model]
    if session.outside:
        words.append("--allow-outside")
    return [*words, "--out", str(flags.out.with_name(f"{flags.out.stem}-classifier"))]


def _conclude(flags: argparse.Namespace, task: _Task, session: Session, finishing: Finishing) -> None:
    """Say what was labelled and saved, and what to type next."""
    progress = session.progress()
    rows = "row" if progress["answered"] == 1 else "rows"
    print(
        f"\nLabelled: {progress['answered']:,} {rows}; {progress['skipped']:,} skipped, {progress['unsure']:,} unsure, "
        f"{progress['left']:,} left"
    )
    for label in progress["labels"]:
        print(wrapped(_label_line(label, several=len(task.labels) > 1)))
    print(f"Saved: {flags.out}, and every answer in {session.journal.path}", features_line(flags.features), sep="\n")
    done = finishing.outcome
    if done is not None:
        print(f"\n{done.summary}\n\nSaved: {done.classifier}")
        print(wrapped(done.without) if done.report is None else f"Report: {done.report}")
        print("\nNext: try it on pictures in a web page", command_line("serve", done.classifier), sep="\n")
    elif progress["answered"]:
        print("\nNext: train a classifier", command_line(*_train_words(flags, task, session)), sep="\n")
    print("Go on labelling", command_line(*flags.words), sep="\n")


def _label_line(label: dict[str, Any], *, several: bool) -> str:
    """Say how often a label was given, and how good a classifier of it would be now."""
    name = f"{label['name']}: " if several else ""
    line = f"{name}{label['yes']:,} yes, {label['no']:,} no"
    estimate = label["estimate"]
    if estimate and estimate["accuracy"]:
        value, low, high = estimate["accuracy"]
        line += (
            f"; accuracy so far {value:.3f} ({low:.3f} to {high:.3f}), measured on {estimate['rows']:,} rows drawn at "
            "random"
        )
    return line
