"""The reference itself: transformers computes wholly in float64, and only because of `Float64`."""

import pytest
import torch
from hypothesis import given

from tests.conformance.reference import Float64, SeesLowPrecision, configs, examples, hf_model, precision, saved


def run(folder, mode, dtype):
    """Return what a forward and a backward pass of transformers saw below float64."""
    model = hf_model(folder, dtype)
    tokens = torch.arange(12).view(2, 6)
    kwargs = {"output_router_logits": True} if "moe" in model.config.model_type else {}
    with mode, SeesLowPrecision() as seen:
        model(tokens, attention_mask=torch.ones_like(tokens), labels=tokens, **kwargs).loss.backward()
    return seen.found, {type(b.dtype) and b.dtype for b in (*model.buffers(), *model.parameters())}


@given(configs())
@examples(6)
def test_transformers_runs_wholly_in_float64(raw):
    with saved(raw) as folder:
        found, dtypes = run(folder, Float64(), torch.float64)
        assert not found and dtypes == {torch.float64}
        found, _ = run(folder, precision(torch.float32), torch.float64)
        assert found, "nothing to widen: the check above proves nothing"


def test_inv_freq_is_exact_to_float64():
    pass
