"""Options of `export`."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_vl_classifier.config.fields import check_choices, check_positive, option

TARGETS = {"vllm": "vllm"}
"""The engines that a classifier can be exported to, and the module of `exporting/` that does it."""


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
        8192, "most tokens of a request, pictures included, in the command that serves it", rare=True
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(self, "max_model_len")
