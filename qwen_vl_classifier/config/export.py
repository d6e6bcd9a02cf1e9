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

    to: str = option("vllm", "engine that will run it", choices=tuple(TARGETS))
    leave_to_client: bool = option(
        False, "leave isotonic calibration and abstention, which no engine applies, to whoever asks the server"
    )
    max_model_len: int = option(
        0,
        "most tokens of a request, pictures included, in the command that serves it; 0 means 8192, or as many as the "
        "largest picture and a text need",
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
        "export nothing: ask the vLLM server at this URL for the reference examples of the exported folder CLASSIFIER, "
        "and compare",
    )
    served_model_name: str = option(
        "", "with --check: name of the model on the server (default: as in the exported command)", rare=True
    )
    api_key_file: str = option(
        "", f"with --check: file with the server's API key (default: the variable {SERVER_KEY_VARIABLE}, if set)"
    )
    tolerance: float = option(
        0.0,
        "with --check: largest difference of a probability that is let pass; 0 takes that of the folder, by its type",
        rare=True,
    )
    answer_timeout: float = option(120.0, "with --check: seconds that one answer may take", rare=True)

    def __post_init__(self) -> None:
        check_positive(self, "answer_timeout")
        check_not_negative(self, "tolerance")
