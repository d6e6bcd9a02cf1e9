"""The GPU benchmark measures every row, here with tiny shapes on the CPU, and lays runs out beside the goals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """Let the modules of the benchmarks be imported, as a script there does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.long
@pytest.mark.soak
def test_a_dry_run_measures_every_row(tmp_path, monkeypatch, capsys):
    import gpu
    from gpu_table import ROWS, read_lines, table

    out = tmp_path / "run.jsonl"
    monkeypatch.setattr("sys.argv", ["gpu.py", "--device", "cpu", "--dry", "--out", str(out)])
    gpu.main()
    printed = capsys.readouterr().out
    lines = read_lines(out)
    assert [json.loads(line) for line in printed.splitlines() if line.startswith("{")] == lines
    assert not [line for line in lines if "skipped" in line]
    values = {line["row"]: line["value"] for line in lines if "row" in line}
    only_on_a_card = {"products-share", "training-memory"}
    assert {row.name for row in ROWS} - values.keys() == only_on_a_card
    assert all(values[name] < 1e-5 for name in ("exact-float32", "exact-shared", "exact-adapter"))
    cosines = [line["notes"]["least cosine"] for line in lines if "least cosine" in line.get("notes", {})]
    assert len(cosines) == 2
    assert min(cosines) > 0.999
    assert "\n".join(table(lines)) in printed


def test_a_run_that_was_cut_off_says_what_was_not_measured(tmp_path, monkeypatch, capsys):
    import gpu
    import tables

    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {part} begins -->\n<!-- {part} ends -->\n" for part in ("gpu", "gpu kernels")))
    monkeypatch.setattr(tables, "PERFORMANCE_PAGE", page)
    run = tmp_path / "run.jsonl"
    machine = {"card": "NVIDIA H100 80GB HBM3, 85 GB", "driver": "1.2", "cores": 16}
    lines = [
        {"machine": machine},
        {"row": "pass-large", "value": 41.25, "notes": {"rows": 200, "rounds": [1, 2]}},
        {"row": "share-large", "value": 0.5},
        {"part": "serve", "skipped": "skipped: fastapi is not installed"},
        {"part": "serve", "seconds": 0.1},
    ]
    run.write_text("\n".join(map(json.dumps, lines)) + '\n{"row": "files-lar')
    monkeypatch.setattr("sys.argv", ["gpu.py", "--from", str(run), "--write"])
    gpu.main()
    written = page.read_text()
    assert written.startswith("<!-- gpu begins -->\ncard NVIDIA H100 80GB HBM3, 85 GB, driver 1.2, cores 16.\n")
    cells = {line.split(" | ")[0]: line.split(" | ")[1:] for line in written.splitlines() if line.startswith("| ")}
    assert cells["| 1,024-token pictures: pass alone, a second"] == [
        "16.7",
        "≥ 40 on an H100",
        "41.2",
        "yes",
        "rows 200 |",
    ]
    assert cells["| 1,024-token pictures: share of the product rate"][2:4] == ["0.50", "no"]
    assert cells["| `serve` with 64 callers, against the same work offline"][2].startswith("skipped: fastapi")
    assert (
        "| 1,024-token pictures: from JPEG files, against the pass alone | 0.59 | ≥ 0.95 | not measured | | |"
        in written
    )
    assert "Kernels: not measured.\n<!-- gpu kernels ends -->\n" in written
    assert "pass alone, a second | 16.7" in capsys.readouterr().out


def test_goals_in_pictures_a_second_judge_only_the_cards_they_were_set_for():
    from gpu_table import ROWS

    row = next(row for row in ROWS if row.fast)
    assert row.met(41, "NVIDIA H200, 150 GB")
    assert row.met(39, "NVIDIA H100 PCIe, 85 GB") is False
    assert row.met(41, "NVIDIA A10G, 24 GB") is None


def test_parts_without_time_or_with_an_error_leave_the_others_be(monkeypatch, capsys):
    import gpu

    class Stand:
        dry = False

        def free_memory(self):
            pass

    def fail(bench, seconds):
        yield from ()
        raise RuntimeError("the card is gone\nat address 0")

    def absent(bench, seconds):
        yield from ()
        raise ModuleNotFoundError("peft", name="peft")

    import gpu_rows

    monkeypatch.setattr(gpu_rows, "fail", fail, raising=False)
    monkeypatch.setattr(gpu_rows, "absent", absent, raising=False)
    monkeypatch.setattr(
        gpu,
        "PARTS",
        {
            "long": gpu.Part("gpu_rows", "fail", 1, 1e9),
            "fails": gpu.Part("gpu_rows", "fail", 1, 0),
            "absent": gpu.Part("gpu_rows", "absent", 1, 0),
        },
    )
    lines = list(gpu.measure(Stand(), list(gpu.PARTS), gpu.time.monotonic() + 100))
    assert [line["part"] for line in lines] == ["long", "fails", "fails", "absent", "absent"]
    reasons = [line["skipped"] for line in lines if "skipped" in line]
    assert reasons[0].endswith("s left, and it needs 1000000000")
    assert reasons[1:] == ["failed: RuntimeError: the card is gone", "skipped: peft is not installed"]
    assert "the card is gone" in capsys.readouterr().err


def call(category: str, name: str, begin: float, length: float) -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": length}


TRACE = [
    call("user_annotation", "pass of one batch", 100, 1000),
    call("gpu_user_annotation", "pass of one batch", 105, 900),
    call("cuda_runtime", "cudaLaunchKernel", 90, 5),  # before the pass
    call("cuda_runtime", "cudaLaunchKernel", 1200, 5),  # after it
    call("cuda_runtime", "cudaMemcpyAsync", 110, 20),
    call("cuda_runtime", "cudaLaunchKernel", 140, 10),
    call("cuda_driver", "cuLaunchKernelEx", 160, 200),  # the device's queue is full
    call("cuda_runtime", "cudaLaunchKernel", 370, 10),
    call("cuda_runtime", "cudaStreamSynchronize", 390, 700),
    call("kernel", "sm90_xmma_gemm_bf16bf16", 200, 300),
    call("kernel", "pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>", 450, 100),  # beside the last one
    call("kernel", "void at::native::vectorized_elementwise_kernel<4>", 600, 100),
    call("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 130, 50),
]


def test_host_work_ends_with_the_last_launch_of_the_pass():
    from gpu_profile import host_share

    share = host_share(TRACE)
    assert share["share"] == pytest.approx((380 - 100 - 200) / 1000)
    assert (share["copies"], share["synchronising calls"], share["launches"]) == (1, 1, 3)
    assert share["device busy"] == pytest.approx((50 + 350 + 100) / 1000)


def test_kernels_are_told_apart_by_their_names():
    from gpu_profile import kernel_shares, kind_of_kernel

    reading = kernel_shares(TRACE)
    assert reading.value == pytest.approx(300 / 550)
    assert reading.notes["shares"]["attention"] == pytest.approx(100 / 550)
    assert reading.notes["kernels"][0][:2] == ("sm90_xmma_gemm_bf16bf16", 1)
    assert kind_of_kernel("cutlass_80_tensorop_bf16_s16816gemm_relu") == "matrix products"
    assert kind_of_kernel("nvjet_tst_256x128_64x4_2x1_v_bz_TNT") == "matrix products"
    assert kind_of_kernel("fmha_cutlassF_bf16_aligned_64x64_rf_sm80") == "attention"
    assert kind_of_kernel("Memcpy DtoD (Device -> Device)") == "element-wise and others"


def test_a_profile_is_laid_out_and_its_names_break_no_table():
    from gpu_profile import kernel_shares
    from gpu_table import kernel_table

    reading = kernel_shares([*TRACE, call("kernel", "a|b", 900, 1)])
    lines = kernel_table([{"row": reading.row, "value": reading.value, "notes": reading.notes}])
    assert lines[0].startswith("Share of kernel time: copies between host and device 9%, attention 18%")
    assert "| `a/b` | 1 | 0.2% |" in lines


def test_a_run_without_a_card_is_refused_unless_it_is_dry(monkeypatch, capsys):
    import gpu

    monkeypatch.setattr("sys.argv", ["gpu.py", "--device", "cpu"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--dry" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees no GPU here; expected one, or --device cpu --dry"):
        gpu.main()
