"""Triton's products in 8 bits, interpreted, against their emulation in float64; test_moe_triton.py compiles them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import fp8_triton, tuning
from tests.kernels import fp8_cases
from tests.kernels.fp8_cases import Case
from tests.kernels.interpreted import Interpreter

LIMIT = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # rounded, and once more with what is added
SIZES = {
    "counts": st.lists(st.sampled_from([0, 1, 2, 127, 128, 129, 200]), min_size=1, max_size=4).map(tuple),
    "none": st.integers(0, 4), "slots": st.integers(1, 3), "gather": st.booleans(), "seed": st.integers(0, 99),
    "inputs": st.integers(1, 270), "outputs": st.integers(1, 270), "dtype": st.sampled_from(list(LIMIT)),
}  # fmt: skip


@pytest.fixture(scope="module")
def there():
    with Interpreter() as interpreter:
        interpreter.run(fp8_cases.prepare)
        yield interpreter


@given(bad=st.sampled_from([None, None, float("nan"), float("inf"), -float("inf")]), spread=st.integers(0, 60), **SIZES)
@settings(max_examples=20, deadline=None)
def test_every_bit_is_as_emulated(there, bad, spread, **sizes):
    """Experts without rows and with one, all rows one expert's; padding is zero, NaN makes its block NaN."""
    case = Case(**sizes, spread=min(spread, 4) if sizes["dtype"] == torch.float16 else spread)
    assert there.run(fp8_cases.quantises, case, bad) == []


@given(config=st.integers(0, len(fp8_cases.CONFIGS) - 1), **SIZES)
@settings(max_examples=20, deadline=None)
def test_grouped_products_and_gradients_are_as_exact_as_their_dtype(there, **sizes):
    case = Case(**sizes)
    assert max(there.run(fp8_cases.grouped_errors, case)) <= LIMIT[case.dtype]  # NaN is not


@given(
    tokens=st.integers(1, 80), inputs=st.integers(1, 270), dtype=SIZES["dtype"], seed=st.integers(0, 99),
    sizes=st.sampled_from([(1,), (70,), (128, 256, 70), (50, 128, 70)]),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_dense_products_and_gradients_are_as_exact_as_their_dtype(there, tokens, inputs, dtype, seed, sizes):
    case = Case((tokens,), 0, inputs=inputs, dtype=dtype, seed=seed)
    assert max(there.run(fp8_cases.dense_errors, case, sizes)) <= LIMIT[dtype]


@pytest.mark.parametrize("dtype", LIMIT)
def test_experts_agree_with_their_emulation(there, dtype):
    case = Case((90, 0, 0), 0, slots=2, dtype=dtype, spread=1)
    assert max(there.run(fp8_cases.experts_off, case)) < 0.03


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", range(3), ids="xwg")
@pytest.mark.parametrize("gather", [True, False])
def test_what_is_not_finite_is_nan_where_it_was(there, place, bad, gather):
    case = Case((130, 5), 2, slots=1, inputs=150, outputs=140, gather=gather)
    assert there.run(fp8_cases.not_finite_where_it_is, case, (place, bad))


def test_two_runs_and_one_graph_give_the_same_bits(there):
    assert there.run(fp8_cases.repeats, Case())


def test_compilers_are_told_the_truth(there):
    there.run(fp8_cases.checked)


# what is refused -----------------------------------------------------------------------------------------------------


def test_what_it_does_not_serve_is_refused(there, monkeypatch):
    x, w = torch.randn(3, 5), torch.randn(4, 5)
    with pytest.raises(ValueError, match="no backend 'triton' for device 'cpu'; it has reference"):
        kernels.linear(x, w, recipe=kernels.RECIPES["tile"], backend="triton")
    triton = {
        op: next(b.fn for b in kernels.BACKENDS[op] if b.name == "triton") for op in ("fp8_linear", "fp8_experts")
    }
    with pytest.raises(ValueError, match="by the recipe tile, not row"):
        triton["fp8_linear"](x, (w,), kernels.RECIPES["row"])
    with pytest.raises(ValueError, match="not float64"):
        triton["fp8_linear"](x.double(), (w.double(),), kernels.RECIPES["tile"])
    monkeypatch.setattr(tuning, "generation", lambda x: "sm80")
    with pytest.raises(ValueError, match="need compute capability 9.0 or later"):
        fp8_triton.candidates(x)
