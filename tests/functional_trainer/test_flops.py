"""functional_trainer.flops: against published numbers, PyTorch's own counter and plain loops."""

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import models
from functional_trainer import flops
from functional_trainer.param import Param


def test_qwen3_30b_a3b_at_4096():
    model = models.from_config(models.PRESETS["30b-a3b"])
    active = flops.matmul_params(model.specs, top_k=8)
    layer = 2048 * 4096 * 2 + 2048 * 512 * 2 + 2048 * 128 + 8 * 3 * 2048 * 768
    assert active == 48 * layer + 151936 * 2048  # 3.04 B: "A3B" without the embedding
    assert active == pytest.approx(3.04e9, rel=2e-3)
    per_token = flops.train_flops(model.specs, torch.tensor([4096] * 3), top_k=8) / (3 * 4096)
    assert per_token == pytest.approx(6 * active + 12 * 4096 * 4097 / 2 * 48)
    assert per_token == pytest.approx(23.1e9, rel=2e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_equals_what_pytorch_counts_in_transformers(tied):
    """Its eager attention computes all S*S pairs: those beyond the causal half are put right."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=41, hidden_size=24, intermediate_size=36, moe_intermediate_size=20, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, head_dim=10, num_experts=5, num_experts_per_tok=2,
        mlp_only_layers=[1], tie_word_embeddings=tied, attn_implementation="eager", experts_implementation="eager",
    )  # fmt: skip
    hf, specs = transformers.Qwen3MoeForCausalLM(config), models.from_config(config.to_dict()).specs
    rows, length = 2, 17
    with FlopCounterMode(display=False) as counter:
        hf(torch.randint(41, (rows, length))).logits.sum().backward()
    future = 12 * 6 * 10 * 3 * rows * length * (length - 1) // 2
    ours = flops.train_flops(specs, torch.full((rows,), length), top_k=2)
    assert ours + future == counter.get_total_flops()


SPECS = {
    "embed": Param((50, 4), "V,D"),
    "layers": [{"o": Param((4, 3, 5), "NH->D"), "norm": Param((4,), "D")}, {"o": Param((4, 2, 7), "NH->D")}],
}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 30), st.booleans(), st.booleans())
def test_windows_and_documents_equal_a_loop_over_pairs(documents, window, causal, mla):
    dims = [8, 9] if mla else None
    got = flops.train_flops(SPECS, torch.tensor(documents), windows=[None, window], causal=causal, score_dims=dims)
    pairs = [
        sum(1 for n in documents for q in range(n) for k in range(q + 1 if causal else n) if abs(q - k) < w)
        for w in (10**9, window)
    ]
    params, (one, two) = 4 * 3 * 5 + 4 * 2 * 7 + 50 * 4, dims or (5, 7)
    assert got == 6 * params * sum(documents) + 6 * (3 * (5 + one) * pairs[0] + 2 * (7 + two) * pairs[1])


@given(st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=4), st.integers(0, 5))
def test_lengths_of_packed_rows(rows, padding):
    width = max(sum(r) for r in rows) + padding
    filled = [[i + 1 for i, n in enumerate(r) for _ in range(n)] for r in rows]
    segments = torch.tensor([r + [0] * (width - len(r)) for r in filled], dtype=torch.int64)
    if width:
        assert flops.lengths(segments).tolist() == [n for r in rows for n in r]


def test_documents_at_the_seam_of_two_rows_stay_apart():
    assert flops.lengths(torch.tensor([[1, 1, 2], [2, 2, 2], [0, 0, 0], [1, 0, 0]])).tolist() == [2, 1, 3, 1]


def test_bad_arguments():
    with pytest.raises(ValueError, match="1 windows for 2 attention layers"):
        flops.train_flops(SPECS, torch.tensor([3]), windows=[None])
    with pytest.raises(ValueError, match="3 score_dims for 2 attention layers"):
        flops.train_flops(SPECS, torch.tensor([3]), score_dims=[8, 8, 8])
    with pytest.raises(ValueError, match="layers/0/up is one matrix per expert: top_k must be at least 1, got 0"):
        flops.matmul_params({"layers": [{"up": Param((3, 5, 4), "E:D->F")}]})


def test_mfu():
    assert flops.mfu(6e12, 2.0, 12e12) == 0.25
    assert flops.mfu(6e12, 2.0, None) is None and flops.mfu(6e12, 0.0, 12e12) is None
