"""Options of `label`."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_vl_classifier.config.fields import check_not_negative, check_share, most_errors, option, split_list
from qwen_vl_classifier.config.spelling import named, spelled
from qwen_vl_classifier.errors import ConfigError

_MOST_PORT = 65_535


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelConfig:
    """Options of labelling rows in a browser.

    Raises:
        ConfigError: A value is out of its range, or two of them exclude each other.
    """

    labels: str = option("", "names of several labels, such as defect,scratch (default: one label)", metavar="NAMES")
    one_of: bool = option(False, "each row has exactly one of --labels, which are then classes")
    classifier: str = option("", "start from this saved classifier or panel", metavar="FOLDER")
    rows: str = option("", "ask only rows whose ids are in this file, such as one that a report saved", metavar="FILE")
    scores: str = option("", "ask first what this output of `score` is unsure of", metavar="FOLDER")
    annotator: str = option("me", "who answers; with several people, each gives a name", metavar="NAME")
    random_share: float = option(
        0.25, "fraction of rows drawn at random, on which the estimate is made", metavar="FRACTION", rare=True
    )
    max_errors: str = option(
        "100%",
        "stop where more rows than this cannot be used: a number, or a percentage (default: leave all of them out)",
        metavar="ROWS",
        rare=True,
    )
    port: int = option(0, "port of this machine to listen on; 0 lets the system choose one", metavar="PORT")
    open_browser: bool = option(False, "open the page in a browser")
    seed: int = option(0, "seed of what is drawn at random", metavar="SEED", rare=True)

    def __post_init__(self) -> None:
        most_errors(self.max_errors, 0)
        check_share(self, "random_share")
        check_not_negative(self, "seed")
        if not 0 <= self.port <= _MOST_PORT:
            raise ConfigError(f"{named('port')} {self.port}: give 0 to {_MOST_PORT}")
        if self.rows and self.scores:
            raise ConfigError(
                f"{spelled('rows', self.rows)} with {spelled('scores', self.scores)}: both say what to ask; give one"
            )
        if self.labels and self.classifier:
            raise ConfigError(
                f"{spelled('labels', self.labels)} with {spelled('classifier', self.classifier)}, which has labels of "
                "its own; give one of them"
            )
        if self.one_of and not (self.labels or self.classifier):
            raise ConfigError(
                f"{spelled('one_of', True)} without classes; name them, such as {spelled('labels', 'cat,dog,bird')}"
            )

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of several labels; empty where there is one."""
        return split_list(self.labels)
