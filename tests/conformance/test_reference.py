"""The reference itself: transformers computes wholly in float64, and only because of `Float64`."""

import contextlib

import torch
from hypothesis import given

from tests.conformance.reference import Float64, SeesLowPrecision, configs, examples, hf_model, saved


def lowered(folder, mode):
    """Return the operators that make low-precision tensors in a pass forward and backward."""
    model = hf_model(folder, torch.float64)
    assert {x.dtype for x in (*model.parameters(), *model.buffers())} == {torch.float64}
    tokens = torch.arange(12).view(2, 6)
    with mode, SeesLowPrecision() as seen:
        model(tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss.backward()
    return seen.found


@given(configs())
@examples(6)
def test_transformers_runs_wholly_in_float64(raw):
    with saved(raw) as folder:
        assert lowered(folder, contextlib.nullcontext()), "nothing to widen: the next line is vacuous"
        assert not lowered(folder, Float64())


@given(configs().filter(lambda raw: not raw.get("rope_scaling") and "factor" not in raw.get("rope_parameters", ())))
@examples(3)
def test_rotary_frequencies_are_float64_from_the_start(raw):
    with saved(raw) as folder:
        found = hf_model(folder, torch.float64).model.rotary_emb.inv_freq
    theta = raw.get("rope_theta") or raw["rope_parameters"]["rope_theta"]
    exact = [theta ** (-2 * i / raw["head_dim"]) for i in range(raw["head_dim"] // 2)]
    torch.testing.assert_close(found, torch.tensor(exact, dtype=torch.float64), rtol=1e-15, atol=0)


def test_the_mode_ends():
    with Float64():
        assert torch.zeros(2).float().dtype == torch.float64
    assert torch.zeros(2).double().float().dtype == torch.float32
