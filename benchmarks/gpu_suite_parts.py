"""The parts of `benchmarks.gpu_suite`, those of most value first.

Correctness, the rates of the card, the transformer, its parts, whole jobs, starts, and then what
takes the rest of the budget. A second run with `--parts` goes on where the first was cut off.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One command of the suite.

    name. seconds: the most it may take. command: words behind "python -m", with {work} for the
    folder of its results, {tests} for the test files with GPU tests. dry: the same, small and on
    a CPU; None: there is no such form, for the reason `why_not_dry`. needs: modules that must be
    there.
    """

    name: str
    seconds: float
    command: str
    dry: str | None = None
    why_not_dry: str = ""
    needs: tuple[str, ...] = ()


_PARITY = "tests.parity --networks --json {work}/parity_"
_DIT = "benchmarks.dit --device cuda --ceilings {work}/ceilings_cuda.json --out {work}"
_DIT_DRY = (
    "benchmarks.dit --tiny --turns 1 --rounds 1 --ceilings {work}/ceilings_cpu_tiny.json "
    "--out {work}"
)
_JOB = "benchmarks.job --device cuda --out {work}"
_MEDIA = ("av", "tokenizers", "PIL", "cv2")

PARTS = (
    Part(
        "parity_bf16",
        45,
        f"{_PARITY}bf16.json --device cuda --dtype bf16 tests/golden",
        f"{_PARITY}bf16.json --dtype bf16 tests/golden/scail",
        needs=("safetensors", "numpy"),
    ),
    Part(
        "parity_fp8",
        45,
        f"{_PARITY}fp8.json --device cuda --dtype fp8 tests/golden",
        f"{_PARITY}fp8.json --dtype fp8 tests/golden/scail",
        needs=("safetensors", "numpy"),
    ),
    Part(
        "tests",
        90,
        "pytest -m gpu -q -p no:cacheprovider --continue-on-collection-errors {tests}",
        "pytest -m gpu -q -p no:cacheprovider --collect-only tests/ops/test_fp8_matmul.py",
        needs=("pytest", "hypothesis"),
    ),
    Part(
        "ceilings",
        50,
        "benchmarks.ceilings --device cuda --out {work}",
        "benchmarks.ceilings --tiny --rounds 1 --out {work}",
    ),
    Part(
        "dit",
        130,
        f"{_DIT} --layers 8 --tokens 32760 --candidates B0 B1 O1 O3 O4 --turns 2 --budget 120",
        f"{_DIT_DRY} --tokens 48 --candidates B0 O1 O3r",
    ),
    Part(
        "attention",
        45,
        "benchmarks.attention --device cuda --out {work}",
        "benchmarks.attention --tiny --out {work}",
    ),
    Part(
        "vae",
        75,
        "benchmarks.vae --device cuda --dtype bfloat16 --sizes 832x480x81 --chunks 1 4 "
        "--rounds 2 --out {work}",
        "benchmarks.vae --height 16 --width 16 --frames 5 --chunks 1 --rounds 1 --out {work}",
        needs=("diffusers",),
    ),
    Part(
        "gemm",
        35,
        "benchmarks.gemm --device cuda --out {work}",
        "benchmarks.gemm --tiny --out {work}",
    ),
    Part(
        "fused",
        35,
        "benchmarks.fused --device cuda --out {work}",
        "benchmarks.fused --tiny --out {work}",
    ),
    Part(
        "job",
        130,
        f"{_JOB} --shape scail-81 scail-17",
        "benchmarks.job --tiny --rounds 1 --shape scail-81 scail-17 --out {work}",
        needs=_MEDIA,
    ),
    Part(
        "job_card",
        90,
        f"{_JOB} --card 18 --rounds 1",
        why_not_dry="a CPU has no card to stay within",
        needs=_MEDIA,
    ),
    Part(
        "cold_start",
        90,
        "benchmarks.cold_start --device cuda --layers 16 --worker --out {work}",
        "benchmarks.cold_start --tiny --cases kernels-kept --out {work}",
        needs=("tokenizers",),
    ),
    Part(
        "load",
        60,
        "benchmarks.load --device cuda --gigabytes 4 --rounds 2 --out {work}",
        why_not_dry="its smallest file is 1 GB",
    ),
    Part(
        "swap",
        60,
        "benchmarks.swap --device cuda --rounds 3 --out {work}",
        "benchmarks.swap --tiny --rounds 1 --out {work}",
    ),
    Part(
        "pose",
        80,
        "benchmarks.pose --folder {work}/pose --networks sized --device cuda --frames 96 "
        "--rounds 2 --out {work}",
        "benchmarks.pose --folder {work}/pose --networks contract --frames 2 --height 320 "
        "--width 192 --rounds 1 --out {work}",
        needs=("av", "onnx", "onnxruntime"),
    ),
    Part(
        "dit_switches",
        150,
        f"{_DIT} --layers 8 --tokens 29757 --candidates O1 O1@sdpa O1@cudnn O1@int8 O1f O1c O1t "
        "O2 O3r O3t O3 --turns 2 --no-profile --budget 140 --tag switches",
        f"{_DIT_DRY} --tokens 32 --candidates O1 O1f O3r --no-profile --tag switches",
    ),
    Part(
        "dit_whole",
        300,
        f"{_DIT} --tokens 32760 --candidates B0 B1 O1 O3 O4 --turns 2 --no-errors --no-profile "
        "--budget 290 --tag whole",
        f"{_DIT_DRY} --tokens 48 --candidates B0 O3r --no-errors --no-profile --tag whole",
    ),
    Part(
        "dit_lengths",
        110,
        f"{_DIT} --layers 8 --tokens 29757 24024 7917 --candidates B0 O1 O3 O4 --turns 2 "
        "--no-errors --no-profile --budget 100 --tag lengths",
        f"{_DIT_DRY} --tokens 32 --candidates B0 O1 O3r --no-errors --no-profile --tag lengths",
    ),
    Part(
        "job_dancer",
        120,
        f"{_JOB} --shape dancer-81 --rounds 1",
        "benchmarks.job --tiny --rounds 1 --shape dancer-81 --out {work}",
        needs=_MEDIA,
    ),
    Part(
        "fp8_linear",
        30,
        "benchmarks.fp8_linear --device cuda --tokens 29757 --out {work}",
        "benchmarks.fp8_linear --tokens 16 --divide 80 --rounds 1 --out {work}",
    ),
    Part(
        "memory",
        100,
        'benchmarks.memory --job "SCAIL 512x896" --memory resident --out {work}',
        why_not_dry="a peak of the CPU says nothing about a GPU",
    ),
    Part(
        "pose_render",
        25,
        "benchmarks.pose_render --device cuda --frames 64",
        why_not_dry="it writes its result into the repository",
    ),
)
"""The parts, in the order in which they are run."""
