"""How fast a run trains, and the memory that it takes, as the run says them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from qwen_vl_classifier import finetune
from qwen_vl_classifier.training.finetuning import throughput
from qwen_vl_classifier.training.finetuning.throughput import StepClock, Throughput, peak_memory
from qwen_vl_classifier.training.finetuning.trainer import FinetuneTrainer
from tests.tuning import LORA, ROWS, VALIDATION


def test_a_clock_runs_during_steps_alone(monkeypatch):
    now = iter([0.0, 2.0, 10.0, 13.0, 20.0, 21.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(now))
    clock = StepClock()
    assert clock.rate == clock.lap() == 0
    clock.begin()
    clock.end(100)
    assert (clock.rate, clock.lap()) == (50, 50)
    clock.begin()
    clock.end(100)
    clock.begin()
    clock.end(20)
    clock.end(999)  # nothing has begun
    assert (clock.tokens, clock.seconds) == (220, 6)
    assert clock.rate == pytest.approx(220 / 6)
    assert (clock.lap(), clock.lap()) == (30, 0)


def test_the_peak_of_a_process_is_in_bytes():
    peak, device = peak_memory(torch.device("cpu"))
    assert device == "cpu"
    assert 50e6 < peak < 1e12


def test_a_run_says_how_fast_it_was(start, monkeypatch):
    """In its result, its record, its log (and so in TensorBoard) and its progress line."""
    logged, lines = [], []
    run, progress = FinetuneTrainer.run, FinetuneTrainer._progress

    def logging_run(self, *arguments, **options):
        looks = run(self, *arguments, **options)
        logged.extend(entry for entry in self.state.log_history if "loss" in entry)
        return looks

    monkeypatch.setattr(FinetuneTrainer, "run", logging_run)
    monkeypatch.setattr(FinetuneTrainer, "_progress", lambda self: lines.append(progress(self)) or lines[-1])
    result = finetune(start, ROWS, VALIDATION, config=replace(LORA, report_to="none"), progress=True)
    found = result.throughput
    assert isinstance(found, Throughput)
    assert found.tokens_per_second > 0
    assert found.peak_memory > 50e6
    assert f"{found.tokens_per_second:,.0f} tokens a second; peak memory of the process: " in str(found)
    assert {"tokens/s", "GB"} <= lines[-1].keys()
    assert logged
    assert all(entry["tokens_per_second"] > 0 and entry["peak_memory_gb"] > 0.05 for entry in logged)
    assert json.loads(json.dumps(result.classifier.training))["throughput"]["peak_memory"] == found.peak_memory
