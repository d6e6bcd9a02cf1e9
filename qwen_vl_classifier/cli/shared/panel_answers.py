"""How `predict` prints the answers of a panel."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwen_vl_classifier.cli.options import loading_options
from qwen_vl_classifier.errors import one_line

if TYPE_CHECKING:
    from qwen_vl_classifier.classifier.panel import Panel
    from qwen_vl_classifier.data.example import Example, PanelPrediction, Prediction
    from qwen_vl_classifier.scoring.tables.own_table import Answer
    from qwen_vl_classifier.scoring.tables.panel_columns import PanelColumns

HEADINGS = {False: ("answered yes",), True: ("probability", "class")}
"""Of the columns of a printed table: of labels for themselves, and of classes."""

_MOST_CLASSES = 10  # of one example
_MOST_NAMED = 6  # labels that are answered yes, in one row
_MOST_COUNTED = 12  # labels or classes in the last line
_WIDEST = 30  # characters of a name


def load_panel(flags: argparse.Namespace) -> Panel:
    """Load the panel that the flags name."""
    from qwen_vl_classifier.classifier.panel import Panel

    return Panel.load(flags.classifier, **loading_options(flags))


def show_one(flags: argparse.Namespace, example: Example) -> None:
    """Classify one example by the panel that the flags name, and print the answer."""
    from qwen_vl_classifier.scoring.tables.panel_columns import PanelColumns

    panel = load_panel(flags)
    (made,) = panel.decide([example])
    if flags.json:
        columns = PanelColumns.of_folder(flags.classifier)
        print(json.dumps(dict(zip(columns.added, columns.of(made), strict=True)), ensure_ascii=False))
        return
    width = max(5, *(len(one_line(name, _WIDEST)) for name in made.labels))
    if made.label_name is not None:
        likely = sorted(made.labels.items(), key=lambda item: -item[1].probability)
        print(f"{'class':<{width}}  probability")
        for name, one in likely[:_MOST_CLASSES]:
            print(f"{one_line(name, _WIDEST):<{width}}  {one.probability:.4f}")
        if len(likely) > _MOST_CLASSES:
            rest = sum(one.probability for _, one in likely[_MOST_CLASSES:])
            print(f"{len(likely) - _MOST_CLASSES} more{'':<{max(0, width - 7)}}  {rest:.4f}")
        return
    print(f"{'label':<{width}}  probability  decision")
    for name, one in made.labels.items():
        print(f"{one_line(name, _WIDEST):<{width}}  {one.probability:<11.4f}  {one.decision}")


def brief_answer(made: PanelPrediction) -> list[str]:
    """Return what a printed table shows of an answer, below `HEADINGS`."""
    if made.label_name is not None:
        return [f"{made.probability:.4f}", one_line(made.label_name, _WIDEST)]
    yes = [f"{one_line(name, _WIDEST)} {one.probability:.2f}" for name, one in made.labels.items() if _is_yes(one)]
    unsure = sum(one.decision == "abstain" for one in made.labels.values())
    more = f" and {len(yes) - _MOST_NAMED} more" if len(yes) > _MOST_NAMED else ""
    abstains = f" (abstains: {unsure})" if unsure else ""
    return [(", ".join(yes[:_MOST_NAMED]) or "-") + more + abstains]


def counted(answers: Sequence[Answer[PanelPrediction]], columns: PanelColumns) -> str:
    """Say how many rows got which class, or a yes for which label."""
    counts: Counter[str] = Counter()
    for answer in answers:
        made = answer.prediction
        if made is None:
            continue
        chosen = [made.label_name] if made.label_name else [name for name, one in made.labels.items() if _is_yes(one)]
        counts.update(chosen)
    word = "" if columns.one_of else " yes"
    named = [name for name in columns.names if counts[name] or not columns.one_of]
    parts = [f"{counts[name]:,}{word} {one_line(name, _WIDEST)}" for name in named[:_MOST_COUNTED]]
    if len(named) > _MOST_COUNTED:
        parts.append(f"and {len(named) - _MOST_COUNTED:,} more {'classes' if columns.one_of else 'labels'}")
    errors = sum(answer.prediction is None for answer in answers)
    parts += [f"{errors:,} error"] if errors else []
    return f"{len(answers):,} rows: {', '.join(parts)}"


def _is_yes(one: Prediction) -> bool:
    return one.decision == "yes"
