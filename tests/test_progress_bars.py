"""Progress bars in a notebook: without ipywidgets they are text, and nothing warns."""

from __future__ import annotations

import subprocess
import sys

NOTEBOOK = """
import sys, types
shell = types.SimpleNamespace(config={"IPKernelApp": {}})
sys.modules["IPython"] = types.SimpleNamespace(get_ipython=lambda: shell)
sys.modules["ipykernel.zmqshell"] = types.SimpleNamespace()
sys.modules["tqdm.notebook"] = types.SimpleNamespace(IProgress=None, WARN_NOIPYW="no ipywidgets")
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", NOTEBOOK + code], capture_output=True, text=True, check=False)


def test_a_notebook_without_widgets_gets_bars_of_text_and_no_warning():
    done = run("from qwen_vl_classifier import TrainConfig; from tqdm.auto import tqdm; print(len([*tqdm([1, 2])]))")
    assert done.returncode == 0
    assert done.stdout == "2\n"
    assert "2/2" in done.stderr
    assert "Warning" not in done.stderr


def test_tqdm_alone_would_warn():
    assert "TqdmWarning" in run("import tqdm.auto").stderr
