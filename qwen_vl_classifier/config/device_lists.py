"""Several devices of one machine: a list with commas, one process for each."""

from __future__ import annotations

from qwen_vl_classifier.config.spelling import named
from qwen_vl_classifier.errors import ConfigError

ALL_DEVICES = "all"
"""The name of all GPUs of this machine, one process for each."""

ONE_PROCESS_EACH = "several, such as cuda:0,cuda:1 or all, with one process for each"
"""The help of `--device` where several processes share the work."""

_SPREAD = "spread"  # one model over several devices, whose own list has commas too
_NOT_IN_LISTS = ("", "auto", "cuda", "xpu", ALL_DEVICES)


def listed_devices(device: str) -> tuple[str, ...]:
    """Return the devices of a list with commas, in order and as often as they are named; one device is a list of one.

    Raises:
        ConfigError: A part of the list does not say which device it is.

    Example:
        >>> listed_devices("cuda:0,cuda:1"), listed_devices("auto")
        (('cuda:0', 'cuda:1'), ('auto',))
    """
    if "," not in device or device.startswith(_SPREAD):
        return (device,)
    parts = tuple(part.strip() for part in device.split(","))
    for part in parts:
        if part in _NOT_IN_LISTS or part.startswith(_SPREAD):
            raise ConfigError(
                f"{named('device')} {device!r}: {part!r} does not say which device; list single ones, such as "
                "cuda:0,cuda:1 or cpu,cpu"
            )
    return parts


def names_several(device: str) -> bool:
    """Tell whether a device is a list, or stands for all GPUs: then each has a process."""
    return device == ALL_DEVICES or len(listed_devices(device)) > 1
