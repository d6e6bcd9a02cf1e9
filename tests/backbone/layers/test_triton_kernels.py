"""The kernels of GPUs: what they compute, by Triton's interpreter, and that they compile for GPUs.

The interpreter knows no bfloat16. A GPU compares in bfloat16 too.
"""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch

from tests.backbone.layers.kernel_checks import NAMES, Comparison
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

kinds = {"float32": torch.float32, "float16": torch.float16}
errors = {name: Comparison(TritonOperators(), "cpu", dtype).compare() for name, dtype in kinds.items()}
errors["control"] = Comparison(Untouched(), "cpu", torch.float32).compare()
print(json.dumps(errors))
"""

COMPILED = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qwen_vl_classifier.backbone.layers import triton_kernels

POINTERS = {"states", "residual", "gate", "up", "weight", "bias", "total", "result", "query", "key", "cosine", "sine",
            "query_result", "key_result"}
FLAGS = {"adds": True, "gated": True, "centred": False, "together": 1, "block": 2048, "half": 16, "width": 72,
         "query_block": 16, "key_block": 2, "half_block": 16, "rest_block": 64}
for name, fixed in (("_rms_norm", 5), ("_layer_norm", 2), ("_silu_and_multiply", 1), ("_rotate", 6)):
    kernel = getattr(triton_kernels, name)
    constants = {parameter.name: FLAGS[parameter.name] for parameter in kernel.params if parameter.is_constexpr}
    assert len(constants) == fixed
    kinds = {each: "*bf16" if each in POINTERS else "i32" for each in kernel.arg_names}
    kinds |= {"epsilon": "fp32"} if "epsilon" in kinds else {}
    kinds |= dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(each),): value for each, value in constants.items()}
    compiled = triton.compile(
        ASTSource(kernel, kinds, constexprs=places), GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}
    )
    assert compiled.asm["cubin"]
    print(name)
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
    wrong = {name for name, error in errors["control"].items() if error > 1e-3}
    assert wrong == {name for name in NAMES if "rotary" in name or "joined" in name}


@needs_triton
def test_kernels_compile_for_a_gpu_that_is_not_here(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    result = fresh.run(COMPILED)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == 4


@pytest.mark.skipif(not torch.cuda.is_available() or find_spec("triton") is None, reason="needs a GPU, and Triton")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_gpus_kernels_give_what_transformers_gives(monkeypatch, dtype):
    from qwen_vl_classifier.backbone.layers import fused
    from qwen_vl_classifier.backbone.layers.triton_kernels import TritonOperators

    monkeypatch.setattr(fused, "operators_for", fused.operators_for)  # the comparison changes it
    seen = Comparison(TritonOperators(), "cuda", getattr(torch, dtype)).compare()
    assert max(seen.values()) <= MOST_ERROR[dtype], seen
