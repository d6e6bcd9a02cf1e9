"""New processes without the seconds that importing torch and transformers takes.

One process, started once in a session, imports what programs of tests use, and loads or computes nothing. Each program
is a fork of it: it shares no object with the test that started it, and has run nothing but imports before.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

MODULES = (
    "torch",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "qwen_vl_classifier.backbone.backbone",
    "qwen_vl_classifier.classifier.classifier",
    "qwen_vl_classifier.cli.main",
    "qwen_vl_classifier.features.extraction",
    "qwen_vl_classifier.data.loading",
    "qwen_vl_classifier.training.probe.probe",
)
"""What is imported before programs start."""


class FreshProcesses:
    """Starts programs in processes of their own."""

    def __init__(self, errors: Path) -> None:
        """Start the process that has everything imported.

        Args:
            errors: Receives what it writes to standard error.
        """
        self._errors = errors
        with errors.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fresh"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                cwd=ROOT,
            )

    def run(self, program: str | Path, *arguments: Any, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """Run Python source, or a script, to its end; warnings are errors.

        Args:
            program: Source, or the path of a script.
            arguments: What it finds in `sys.argv`.
            cwd: The folder in which it runs.

        Returns:
            Its exit status, negative for a signal, and what it wrote.
        """
        self.start(program, *arguments, cwd=cwd)
        return self.wait()

    def start(self, program: str | Path, *arguments: Any, cwd: Path = ROOT) -> None:
        """Start a program, as `run` does; `wait` has to be called before the next one."""
        request = {
            "script": str(program) if isinstance(program, Path) else None,
            "source": None if isinstance(program, Path) else program,
            "arguments": [str(argument) for argument in arguments],
            "environment": dict(os.environ),
            "cwd": str(cwd),
            "stdout": str(self._errors.with_name("stdout")),
            "stderr": str(self._errors.with_name("stderr")),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Wait for the end of the program that was started last."""
        assert self._process.stdout is not None
        status = self._process.stdout.readline()
        assert status, self._errors.read_text()
        out, errors = (self._errors.with_name(name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess("program", int(status), out, errors)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def in_child(work: Callable[[], None]) -> int:
    """Do work in a fork of this process, and return how that ended: its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            work()
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
            if isinstance(ended.code, str):
                print(ended.code, file=sys.stderr)
        except BaseException:
            status = 1
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def execute(request: dict[str, Any]) -> None:
    """Run the program of a request, as an interpreter of its own would."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        handle = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(handle, number)
        os.close(handle)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    warnings.simplefilter("error")
    faulthandler.enable()
    script, arguments = request["script"], request["arguments"]
    sys.argv = [script or "-c", *arguments]
    sys.path[0] = str(Path(script).parent) if script else ""
    if script:
        runpy.run_path(script, run_name="__main__")
    else:
        exec(compile(request["source"], "<program>", "exec"), {"__name__": "__main__"})


def main() -> None:
    """Import, then fork for each line of standard input and answer with the status."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    requests = os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name in MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a program would look at all of this again, and copy it from this process
    for line in requests:
        request = json.loads(line)
        print(in_child(lambda request=request: execute(request)), file=answers, flush=True)


if __name__ == "__main__":
    main()
