"""The Triton kernel of symmetric products, interpreted, against float64; test_moe_triton.py compiles it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from tests.kernels import symmetric_cases
from tests.kernels.interpreted import Interpreter

LIMIT = {torch.float32: 2e-6, torch.float16: 2e-3}


@pytest.fixture(scope="module")
def there():
    with Interpreter() as interpreter:
        yield interpreter


@given(
    batch=st.integers(1, 3), rows=st.integers(1, 150), columns=st.integers(1, 140), dtype=st.sampled_from(list(LIMIT)),
    added=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25)
def test_it_is_as_exact_as_its_dtype(there, batch, rows, columns, dtype, added, seed):
    """Odd sizes, several tiles and parts of them; nothing is left unwritten."""
    assert there.run(symmetric_cases.error, batch, rows, columns, dtype, added, seed) < LIMIT[dtype]


def test_many_tiles(there):
    for dtype, limit in LIMIT.items():
        assert there.run(symmetric_cases.error, 2, 300, 129, dtype, True, 0) < limit


@pytest.mark.parametrize("shape", [(70, 40), (40, 70), (3, 2, 33, 65)])
def test_newton_schulz_by_the_kernel_is_newton_schulz(there, shape):
    ours, wanted = there.run(symmetric_cases.orthogonal, shape)
    torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=1e-5)


def test_compilers_are_told_the_truth(there):
    there.run(symmetric_cases.checked)


def test_nothing_and_the_default():
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    assert torch.equal(kernels.symmetric_product(x), x @ x.mT)
    with pytest.raises(ValueError, match="no backend 'triton' for device 'cpu'; it has torch"):
        kernels.symmetric_product(x, backend="triton")
