"""The kernels of GPUs: what they compute, by Triton's interpreter, and that they compile for GPUs.

The interpreter knows no bfloat16. A GPU compares in bfloat16 too.
"""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch

from qwen_vl_classifier import Backbone, Tap
from qwen_vl_classifier.backbone.layers.chosen_operators import VARIABLE, operators_for
from qwen_vl_classifier.backbone.layers.joined import joined_layers
from tests.backbone.layers.kernel_checks import Comparison
from tests.fresh import FreshProcesses

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which is for Linux")

MOST_ERROR = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}

IN_THE_INTERPRETER = """
import json, sys
import torch
for name in [name for name in sys.modules if name.startswith("triton") and "._C" not in name]:
    del sys.modules[name]  # what was imported without the interpreter does not run in it
from qwen_vl_classifier.backbone.layers.triton_kernels import TritonOperators
from tests.backbone.layers.kernel_checks import Comparison

class Untouched(TritonOperators):
    def rotate(self, query, key, rotary):
        return query, key

errors = {
    "float32": Comparison(TritonOperators(), "cpu", torch.float32).compare(),
    "float16": Comparison(TritonOperators(), "cpu", torch.float16).compare(layers=False),
    "control": Comparison(Untouched(), "cpu", torch.float32).compare(layers=False),
}
print(json.dumps(errors))
"""

COMPILED = """
from types import SimpleNamespace
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from qwen_vl_classifier.backbone.layers import chosen_operators
from qwen_vl_classifier.backbone.layers.triton_kernels import TritonOperators

def compile_only(self, *arguments, warmup, **options):
    compiled = run(self, *arguments, warmup=True, **options)
    assert compiled.asm["cubin"]
    names.add(self.__name__)

run, JITFunction.run, names = JITFunction.run, compile_only, set()
driver.set_active(SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda _: 0,
))
with torch.inference_mode():
    chosen_operators._sample(TritonOperators(), torch.device("cpu"), torch.bfloat16)
print(*sorted(names))
"""


@pytest.fixture(scope="module")
def errors(fresh: FreshProcesses) -> dict[str, dict[str, float]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        result = fresh.run(IN_THE_INTERPRETER)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@needs_triton
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_kernels_give_what_transformers_gives(errors, dtype):
    assert max(errors[dtype].values()) <= MOST_ERROR[dtype], errors[dtype]


@needs_triton
def test_the_comparison_sees_an_operator_that_does_nothing(errors):
    wrong = {name for name, error in errors["control"].items() if error > 0.1}
    assert wrong == {name for name in errors["control"] if "rotary" in name} != set()


@needs_triton
def test_kernels_compile_for_a_gpu_that_is_not_here(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    result = fresh.run(COMPILED)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["_layer_norm", "_quick_gelu", "_rms_norm", "_rotate", "_silu_and_multiply"]


@pytest.mark.skipif(not torch.cuda.is_available() or find_spec("triton") is None, reason="needs a GPU, and Triton")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_gpus_kernels_give_what_transformers_gives(monkeypatch, dtype):
    from qwen_vl_classifier.backbone.layers import fused
    from qwen_vl_classifier.backbone.layers.triton_kernels import TritonOperators

    monkeypatch.setattr(fused, "operators_for", fused.operators_for)  # the comparison changes it
    seen = Comparison(TritonOperators(), "cuda", getattr(torch, dtype)).compare()
    assert max(seen.values()) <= MOST_ERROR[dtype], seen


@pytest.mark.skipif(not torch.cuda.is_available() or find_spec("triton") is None, reason="needs a GPU, and Triton")
def test_on_gpus_features_are_the_same_without_kernels(nano_checkpoint, mixed_examples, monkeypatch):
    taps = [Tap(1, "mean"), Tap(-1, "last")]
    backbone = Backbone.load(nano_checkpoint[1], device="cuda", dtype="float32")
    assert type(operators_for(backbone.device, torch.float32)).__name__ == "TritonOperators"
    assert any(joined_layers(module) is not None for module in backbone.model.modules())
    seen = backbone.encode(mixed_examples, taps)
    monkeypatch.setenv(VARIABLE, "torch")
    wanted = backbone.encode(mixed_examples, taps)
    assert abs(seen - wanted).max() <= 2e-5 * abs(wanted).max()
