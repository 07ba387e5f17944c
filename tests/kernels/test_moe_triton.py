"""The Triton expert layer and sort: interpreted against float64, and compiled for the chips that they are for."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.benchmarks import compiled_kernels
from kernels import Activation, fp8_triton, moe_triton, symmetric_triton
from tests.kernels import moe_cases
from tests.kernels.interpreted import Interpreter
from tests.kernels.moe_cases import Case

ROOT = Path(__file__).parents[2]
LIMIT = {torch.float32: 2e-6, torch.float16: 4e-3}
TILES = {
    target: moe_triton.CONFIGS[target] | symmetric_triton.CONFIGS[target] | fp8_triton.CONFIGS[target]
    for target in moe_triton.CONFIGS
}
ACTIVATIONS = Activation(), Activation("geglu"), Activation("clamped_swiglu"), Activation("clamped_swiglu", 0.6, 1.1)


@pytest.fixture(scope="module")
def there():
    with Interpreter() as interpreter:
        yield interpreter


@given(
    tokens=st.integers(1, 80), slots=st.integers(1, 4), experts=st.integers(1, 9), width=st.integers(1, 80),
    hidden=st.integers(1, 70), dtype=st.sampled_from([torch.float32, torch.float16]),
    favour=st.sampled_from([0.0, 0.7, 1.0]), padding=st.booleans(), scaled=st.booleans(), biased=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25)
def test_it_is_as_exact_as_its_dtype(there, **drawn):
    """Odd sizes, experts without rows, all rows one expert's, padding; nothing reads what nobody wrote."""
    case = Case(**drawn)
    assert max(there.run(moe_cases.errors, case)) < LIMIT[case.dtype]  # NaN is not below


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("activation", (ACTIVATIONS[0], ACTIVATIONS[-1]))
def test_tiles_that_are_full_and_several(there, dtype, activation):
    case = Case(tokens=200, slots=2, experts=3, width=144, hidden=130, dtype=dtype, activation=activation, biased=True)
    assert max(there.run(moe_cases.errors, case)) < LIMIT[dtype]


def test_two_runs_give_the_same_bits(there):
    assert there.run(moe_cases.repeats, Case(dtype=torch.float16, favour=0.3, biased=True))


def test_it_is_one_graph(there):
    assert there.run(moe_cases.compiled, Case(biased=True, activation=ACTIVATIONS[-1]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_clamping_hides_no_nan(there, activation):
    assert there.run(moe_cases.nan_stays, Case(activation=activation))


@given(
    tokens=st.integers(1, 150), slots=st.integers(1, 16), experts=st.sampled_from([1, 2, 7, 31, 32, 63, 128, 512]),
    favour=st.sampled_from([0.0, 0.8, 1.0]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40)
def test_the_counting_sort_is_stable(there, **drawn):
    """Many blocks and parts of one, experts without slots, all slots one expert's or padding."""
    assert there.run(partial(moe_cases.sorts, **drawn))


def test_compilers_are_told_the_truth(there):
    there.run(moe_cases.checked)


@pytest.mark.parametrize("generation", compiled_kernels.TARGETS)
def test_every_config_compiles_without_spills_onto_tensor_cores(generation):
    program = [sys.executable, ROOT / "experiments" / "benchmarks" / "compiled_kernels.py", "--generations", generation]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    tiles = TILES[generation]
    of = [k for k in compiled_kernels.KERNELS.values() if tiles["product"] or k.module != "fp8_triton"]
    # bf16 and fp16 with every config, fp32 with one; in 8 bits, whose results those are, all with every config
    matmuls = sum(3 * len(tiles[k.fn]) if k.types else 2 * len(tiles[k.fn]) + 1 for k in of if not k.tile)
    others = sum(1 if k.dtype else 3 for k in of if k.tile)
    assert f"{matmuls + others} compiled: no spills" in done.stdout


def test_what_must_not_be_is_told():
    good = compiled_kernels.Compiled("up", "sm90", "bf16", "", 200, 0, 1000, "wgmma")
    assert not good.wrong and not good._replace(dtype="fp32", instruction="fma").wrong
    assert good._replace(instruction="mma").wrong == "uses mma, not wgmma"
    assert good._replace(spilled=8).wrong == "spills 8 bytes"
    assert "232448 are there" in good._replace(shared=240_000).wrong
    eight = good._replace(kernel="product, over rows", instruction="wgmma, 8 bit")
    assert not eight.wrong and not eight._replace(dtype="fp32").wrong
    assert eight._replace(dtype="fp32", instruction="wgmma").wrong == "uses wgmma, not wgmma, 8 bit"


def test_the_page_lists_every_config():
    text = (ROOT / "docs" / "kernels.md").read_text("utf-8")
    for generation, by_kernel in TILES.items():
        for name, kernel in compiled_kernels.KERNELS.items():
            for c in by_kernel.get(kernel.fn, ()):
                size = f"{c.BM} x {c.BN} x {c.BK}, {c.warps} warps, {c.stages} stages"
                assert f"| {name} | {generation} | bf16 | {size} |" in text
