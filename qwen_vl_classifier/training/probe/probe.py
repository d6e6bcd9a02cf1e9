"""Train a head on features that were read once: the frozen-base stage of the original API, in seconds."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from qwen_vl_classifier.backbone.backbone import Backbone, as_backbone
from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.config.train import TrainConfig
from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.labels import class_names_of
from qwen_vl_classifier.data.loading import Source, as_examples
from qwen_vl_classifier.data.targets import targets_of
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.training.probe.label_training import LabelRows, Setup, learn_label
from qwen_vl_classifier.training.probe.read_rows import RowReader, bad_rows, weights_of
from qwen_vl_classifier.training.probe.result import TrainResult
from qwen_vl_classifier.training.splitting import check_grouping


def train(
    train_examples: Source,
    validation: Source | None = None,
    *,
    backbone: Backbone | str | os.PathLike[str],
    config: TrainConfig | None = None,
    store: FeatureStore | None = None,
    label_names: tuple[str, str] | None = None,
    keep_taps: Sequence[Tap] = (),
    progress: bool = True,
) -> TrainResult:
    """Train heads on frozen features, and return the best as a calibrated classifier with its estimates.

    Features of all taps come from one pass. Tap and head are chosen by cross-validation, whole in pictures and groups
    (`search`); calibration and threshold are fitted on the out-of-fold answers of the chosen one, which is then trained
    on all rows. What it reaches on new rows is estimated with a correction for the choice (`search_estimate`).

    Args:
        train_examples: Labelled examples of both classes, anything that `load_examples` takes; labels may be soft, from
            0 to 1.
        validation: Labelled examples of both classes that do not influence the choice: they give the estimate, and the
            band in which to abstain. `None` estimates from the training rows, and holds out a share of them for the
            band where there is to be one.
        backbone: What reads the features, or its name, as `Backbone.load` takes it; it is not changed.
        config: Options.
        store: Where features are kept, if anywhere.
        label_names: What class 0 and class 1 are called; `None` calls them by the words that the data has for them.
        keep_taps: Further taps that the same pass reads for the store, so that a later run that tries them needs none.
        progress: Show progress bars on what takes more than two seconds.

    Raises:
        DataError: Missing labels, one class only, too few examples, or an invalid weight.
        ConfigError: A tap that the backbone does not have.
        TrainingError: A head reached no finite loss, or an objective or error rate is out of reach.
    """
    config = config or TrainConfig()
    most = config.max_errors
    train_examples = as_examples(train_examples, class_names=label_names, soft_labels=True, max_errors=most)
    label_names = label_names or class_names_of(train_examples)
    if validation is not None:
        validation = as_examples(validation, class_names=label_names, max_errors=most)
    check_grouping(train_examples, config.group_by)
    backbone = as_backbone(backbone)
    setup = Setup.of(backbone, config, keep_taps=keep_taps, progress=progress)
    reader = RowReader(backbone, setup.read, config, store, progress)
    soft = any(example.label not in (0, 1, None) for example in train_examples)
    bad = _checked(reader, train_examples, "training", soft=soft)
    bad_apart = None if validation is None else _checked(reader, validation, "validation", soft=False)
    rows = _read(reader, train_examples, bad, "training", soft=soft)
    held_out = None
    if validation is not None and bad_apart is not None:
        held_out = _read(reader, validation, bad_apart, "validation", soft=False)
    return learn_label(rows, held_out, setup, label_names=label_names).result


def _checked(reader: RowReader, examples: Sequence[Example], what: str, *, soft: bool) -> BadRows:
    """Check labels, weights and the headers of pictures; return the rows to leave out."""
    bad = bad_rows(reader.config, examples, what)
    weights_of(examples, targets_of(examples, what=what, soft=soft), reader.config)
    reader.check(examples, bad)
    return bad


def _read(reader: RowReader, examples: Sequence[Example], bad: BadRows, what: str, *, soft: bool) -> LabelRows:
    """Read the features of the rows that can be used."""
    rows = reader.read(examples, bad)
    targets = targets_of(rows.examples, what=what, soft=soft)
    return LabelRows(rows, np.arange(len(targets)), targets, soft)
