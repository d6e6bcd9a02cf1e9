"""Options of `export`."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_vl_classifier.config.fields import check_choices, check_not_negative, check_positive, option

TARGETS = {
    "vllm": "vllm",
    "transformers": "transformers_model",
    "sentence-transformers": "sentence_transformers",
}
"""The engines that a classifier can be exported to, and the module of `exporting/` that does it."""

SERVER_KEY_VARIABLE = "VLLM_API_KEY"  # the name of a variable, not a key
"""Where `export --check` looks for the server's key if no file is named; vLLM looks there for its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """For which engine a classifier is exported, and how.

    Raises:
        ConfigError: A value is out of its range.
    """

    to: str = option("vllm", "engine that will run the classifier", choices=tuple(TARGETS))
    leave_to_client: bool = option(
        False, "let the client apply isotonic calibration and abstention, which no engine does"
    )
    max_model_len: int = option(
        0,
        "longest request, pictures included, in the printed command that serves the folder; 0 means 8192, or more if "
        "the largest picture and a text need more",
        metavar="TOKENS",
        rare=True,
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_not_negative(self, "max_model_len")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckConfig:
    """Which running server is checked against an exported folder.

    Raises:
        ConfigError: A value is out of its range.
    """

    check: str = option(
        "",
        "instead of exporting, send the reference examples of an exported folder to the vLLM server at this URL, and "
        "compare its probabilities",
        metavar="URL",
    )
    served_model_name: str = option(
        "",
        "with --check: name of the model on the server (default: as in the exported command)",
        metavar="NAME",
        rare=True,
    )
    api_key_file: str = option(
        "", f"with --check: file with the server's API key (default: the variable {SERVER_KEY_VARIABLE})", rare=True
    )
    tolerance: float = option(
        0.0,
        "with --check: largest difference between probabilities that passes; 0 means what the data type allows",
        metavar="PROBABILITY",
        rare=True,
    )
    answer_timeout: float = option(
        120.0, "with --check: longest time that one answer may take", metavar="SECONDS", rare=True
    )

    def __post_init__(self) -> None:
        check_positive(self, "answer_timeout")
        check_not_negative(self, "tolerance")
