"""What the pass of one batch consists of: host work before it is on its way, synchronisations, and kernels by kind."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from gpu_bench import LAST, Bench
from gpu_rows import Reading
from racing import synchronise

_MARK = "pass of one batch"
_PICTURES = 16
_MOST_KERNELS = 15
_NAME_LENGTH = 100
_FULL_QUEUE = 50.0  # microseconds; a launch that takes longer waits until the device has taken earlier ones
_KINDS = (  # in this order: some kernels of attention are built from CUTLASS, too
    ("copies between host and device", re.compile(r"^Memcpy (HtoD|DtoH)")),
    ("attention", re.compile(r"flash|fmha|attention|sdpa|softmax", re.IGNORECASE)),
    ("matrix products", re.compile(r"gemm|gemv|cutlass|nvjet|xmma|cublas|wgmma|matmul|_mm_|conv|mma_", re.IGNORECASE)),
)
_OTHERS = "element-wise and others"


def host(bench: Bench, seconds: float) -> Iterator[Reading]:
    """Run one batch with synchronisations reported, and again under the profiler."""
    backbone = bench.backbone
    prepared = backbone.prepare(bench.rows(bench.sizes.large, min(_PICTURES, bench.sizes.most)))
    budget = 2 * sum(len(row.ids) for row in prepared)  # one batch, whatever its padding

    def run() -> None:
        backbone.encode_prepared(prepared, [LAST], token_budget=budget)

    for _ in range(2):  # the first one draws memory, and compiles what is compiled when first used
        run()
    yield Reading("synchronisations", _synchronisations(bench, run))
    events = _trace(bench, run)
    reading = host_share(events)
    yield Reading("host", reading.pop("share"), {"pictures": len(prepared), **reading})
    if bench.device.type == "cuda":
        yield kernel_shares(events)


def _trace(bench: Bench, run: Any) -> list[dict[str, Any]]:
    """Return the events of torch's profiler, as a browser's trace viewer takes them."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    path = bench.folder / "trace.json"
    synchronise()
    with torch.profiler.profile(activities=activities) as profiler:
        with torch.profiler.record_function(_MARK):
            run()
        synchronise()
    profiler.export_chrome_trace(str(path))
    events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def host_share(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Tell how long the host works before everything is given to the device, as a share of the pass.

    The work ends with the last launch of a kernel: what follows is waiting for the features. Launches that wait for
    room in the device's queue are no work.

    Args:
        events: Of a trace of one pass; no other thread uses the device meanwhile.

    Returns:
        `share` of the pass; the pass itself, and the time of copies and synchronisations on the host's side, with how
        many there were; and the share of the pass in which the device was busy.
    """
    events = list(events)
    whole = next(event for event in events if event["name"] == _MARK and event.get("cat") == "user_annotation")
    begin, length = float(whole["ts"]), float(whole["dur"])
    calls = [
        event
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and begin <= event["ts"] < begin + length
    ]
    launches = [event for event in calls if "Launch" in event["name"]]
    end = max((event["ts"] + event["dur"] for event in launches), default=begin + length)
    waited = sum(event["dur"] for event in launches if event["dur"] > _FULL_QUEUE)
    copies = [event["dur"] for event in calls if "Memcpy" in event["name"]]
    syncs = [event["dur"] for event in calls if "Synchronize" in event["name"]]
    return {
        "share": (end - begin - waited) / length,
        "pass, ms": length / 1000,
        "copies": len(copies),
        "copies, ms": sum(copies) / 1000,
        "synchronising calls": len(syncs),
        "synchronising, ms": sum(syncs) / 1000,
        "launches": len(launches),
        "device busy": _covered(_on_device(events)) / length,
    }


def _on_device(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]


def _covered(events: Sequence[dict[str, Any]]) -> float:
    """Return how long at least one of some events was going on, in microseconds."""
    total, until = 0.0, 0.0
    for event in sorted(events, key=lambda event: float(event["ts"])):
        begin, end = float(event["ts"]), float(event["ts"]) + float(event["dur"])
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def kernel_shares(events: Iterable[dict[str, Any]]) -> Reading:
    """Divide the time of kernels by kind, and name those that took most of it.

    Args:
        events: Of a trace of one pass.
    """
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in _on_device(events):
        seconds[event["name"]] += float(event["dur"])
        calls[event["name"]] += 1
    whole = sum(seconds.values()) or 1.0
    shares = {kind: 0.0 for kind, _ in _KINDS} | {_OTHERS: 0.0}
    for name, taken in seconds.items():
        shares[kind_of_kernel(name)] += taken / whole
    top = [(name[:_NAME_LENGTH], calls[name], taken / whole) for name, taken in seconds.most_common(_MOST_KERNELS)]
    return Reading("products-share", shares["matrix products"], {"shares": shares, "kernels": top})


def kind_of_kernel(name: str) -> str:
    """Tell by its name what a kernel does."""
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), _OTHERS)


def _synchronisations(bench: Bench, run: Any) -> int:
    """Count how often the host waits for the device in some work; torch reports each as a warning."""
    if bench.device.type != "cuda":
        run()
        return 0
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing" in str(warning.message) for warning in caught)
