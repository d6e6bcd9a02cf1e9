"""The rules of `deploy/alerts.yaml` are about metrics that the server has, and fire when they should."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from qwen_vl_classifier.serving.observability.prometheus import Metrics

ROOT = Path(__file__).resolve().parents[2]
ALERTS = ROOT / "deploy" / "alerts.yaml"


def test_metrics_of_all_rules_exist():
    """Those that the server has, or that a rule before records."""
    known = {line.split()[2] for line in Metrics().exposition()[0].decode().splitlines() if line.startswith("# TYPE ")}
    alerts = set()
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            used = re.findall(r"\bclassifier[_:][a-z0-9_:]+", rule["expr"])
            assert used
            assert set(used) <= known, rule
            known |= {rule.get("record")}
            alerts |= {rule.get("alert")}
    assert {"ClassifierScoresDrift", "ClassifierDecisionsChanged"} <= alerts


@pytest.mark.parametrize("command", [("check", ALERTS), ("test", ROOT / "tests" / "contracts" / "alert_rules.yaml")])
def test_prometheus_runs_them(command):
    """By its own tool, where that is installed."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    action, file = command
    done = subprocess.run([promtool, action, "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
