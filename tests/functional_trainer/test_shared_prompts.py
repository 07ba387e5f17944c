"""Answers that share their prompt in a row give the losses and gradients of answers that each have their own."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_trainer import flops, tree
from functional_trainer.data.answers import Answer, rows
from functional_trainer.data.columns import check_whole
from functional_trainer.engines import Sample
from functional_trainer.experience import Experience, Plan
from functional_trainer.objectives import OBJECTIVES
from functional_trainer.policy import policy
from functional_trainer.rollouts import Prompt, Prompts, Scores
from functional_trainer.step import objective, total_weights
from functional_trainer.types import ONE_DEVICE
from tests.functional_trainer.test_routing import step_on_ranks
from tests.models import small
from tests.multi_rank.launch import run as on_ranks

F64 = torch.float64
WINDOW = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}


def batch_of(share: bool, seq_len: int, seed: int) -> dict[str, torch.Tensor]:
    """Roll out answers of 1 to 6 tokens to prompts of 1 to 7, some of them cut off or only partly sampled."""
    rng = np.random.default_rng(seed)
    ids = lambda n: rng.integers(0, 23, n).tolist()  # noqa: E731
    prompts = Prompts(Prompt(ids(n), str(n), {}) for n in (1, 4, 7))

    def draw(asked, _):
        found = []
        for _ in asked:
            tokens = ids(rng.integers(1, 7))
            sampled = [bool(x) for x in rng.integers(0, 4, len(tokens))]
            reason = "length" if rng.integers(0, 5) == 0 else "stop"
            found.append(Sample(tokens, rng.normal(-3, 0.3, len(tokens)).tolist(), reason, [], sampled=sampled))
        return found

    def reward(asked, answers):
        return Scores(rng.normal(0, 1, len(answers)).tolist(), {})

    how = Plan(3, 4, mask_truncated=True, share_prompts=share)
    sizes: dict[str, Any] = {"seq_len": seq_len, "longest": 6, "rows": 2}
    return next(Experience(prompts, draw, reward, lambda r, n: r - r.mean(1, keepdims=True), how, **sizes))


def tokens(batch: dict[str, torch.Tensor]) -> int:
    return int((batch["segment_ids"] != 0).sum())


def saved(batch: dict[str, torch.Tensor]) -> int:
    """Count the tokens of prompts that answers have from others: each of r that share P has it r - 1 times less."""
    found = 0
    for ids, parents in zip(batch["segment_ids"].tolist(), batch["parent_ids"].tolist(), strict=True):
        of = dict(zip(ids, parents, strict=True))
        found += sum((list(of.values()).count(p) - 1) * ids.count(p) for p in {*of.values()} - {0})
    return found


def learned(model, params, name: str, batch) -> dict[str, torch.Tensor]:
    """Return a loss, its gradient and what it reports."""
    loss = policy(replace(OBJECTIVES[name], old="rollout_logprobs", max_length=6))
    params = tree.map(lambda p: p.detach().requires_grad_(), params)
    value, _, said = objective(model, loss, ONE_DEVICE, params, batch, total_weights(loss, batch), {})
    flat = tree.flatten(params)
    grads = dict(zip(flat, torch.autograd.grad(value, list(flat.values())), strict=True))
    return grads | {"loss": value.detach()} | {k: v for k, v in said.items() if k != "load"}


@pytest.mark.parametrize("raw", [small.MOE, small.DENSE, small.DENSE | WINDOW], ids=["moe", "dense", "window"])
@given(st.sampled_from(["dapo", "gspo", "dr_grpo", "gmpo"]), st.integers(13, 40), st.integers(0, 999))
@settings(max_examples=6)
def test_sharing_prompts_changes_no_loss_and_no_gradient(raw, name, seq_len, seed):
    model = small.model(raw)
    params = model.init(0, dtype=F64)
    alone, shared = (batch_of(share, seq_len, seed) for share in (False, True))
    check_whole(shared)
    assert "parent_ids" not in alone and tokens(alone) - tokens(shared) == saved(shared)
    got, want = learned(model, params, name, shared), learned(model, params, name, alone)
    for key, x in want.items():
        torch.testing.assert_close(got[key], x, rtol=1e-8, atol=1e-9, msg=lambda m, k=key: f"{k} {m}")


SIZES = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=30)


@given(SIZES, st.integers(15, 60))
@settings(max_examples=60)
def test_rows_hold_every_answer_once_and_a_prompt_once_a_row(sizes, seq_len):
    """Prompts 0 to 3 have 1, 3, 5 and 7 tokens. Nothing is longer than a row, no row could be the one before it."""
    prompts = [tuple(range(2 * which + 1)) for which, _ in sizes]
    totals = [len(prompt) + n for prompt, (_, n) in zip(prompts, sizes, strict=True)]
    for share in (False, True):
        given = [Answer(i, p, len(p), n) for i, (p, n) in enumerate(zip(prompts, totals, strict=True))]
        table = rows(given, seq_len, share)
        answers = [s.document for row in table for s in row if s.stop == totals[s.document]]
        assert sorted(answers) == list(range(len(sizes)))
        used = [sum(s.stop - s.first - 1 for s in row) for row in table]
        assert max(used) <= seq_len and all(a + b > seq_len - 8 for a, b in zip(used, used[1:], strict=False))
        for row in table:
            brought = [prompts[s.document] for s in row if s.stop < totals[s.document]]
            assert len(set(brought)) == len(brought) and (share or not brought)
            for s in row:
                parent = row[s.parent - 1] if s.parent else None
                assert s.first == (parent.stop - 1 if parent else 0)
                assert parent is None or prompts[parent.document] == prompts[s.document]


def test_an_answer_that_fits_into_no_row_is_refused():
    with pytest.raises(ValueError, match="have 9 tokens, a row of 7 holds 8: raise --data.seq-len or lower"):
        rows([Answer(0, 0, 2, 8), Answer(1, 0, 2, 9)], 7, True)


def test_pairs_of_queries_and_keys_are_those_of_whole_sequences():
    """Attention costs what it costs alone, less the prompt with itself for all answers but one in a row."""
    batch = batch_of(True, 40, 3)
    lengths, before = flops.lengths(batch["segment_ids"]), flops.continued(batch)
    specs = {"layers": [{"o": small.model(small.DENSE).specs["layers"][0]["attn"]["o"]}]}
    for window in (None, 3):
        got = flops.train_flops(specs, lengths, windows=[window], before=before)
        ids, at, parents = (batch[k] for k in ("segment_ids", "positions", "parent_ids"))
        same = (ids[:, :, None] == ids[:, None]) | (parents[:, :, None] == ids[:, None]) & (parents != 0)[:, :, None]
        far = at[:, :, None] - at[:, None]
        pairs = int((same & (far >= 0) & (far < (window or 99)) & (ids != 0)[:, :, None]).sum())
        heads = 6 * 10 * 6 * 4 * int(lengths.sum()) + 6 * 6 * (4 + 4) * pairs
        assert got == heads


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 1, "cp": 2}, pytest.param({"fsdp": 1, "tp": 2}, marks=pytest.mark.slow),
              pytest.param({"fsdp": 1, "ep": 2}, marks=pytest.mark.slow)], ids=str,
)  # fmt: skip
def test_a_mesh_does_not_matter(sizes):
    """Loss, gradients and so parameters, where the documents of a row continue its first."""
    batch = small.batch([[5, 4], [9, 2], [3, 3, 4], [6, 7]], width=14)
    batch["parent_ids"] = (batch["segment_ids"] > 1).long()
    batch["positions"] += batch["parent_ids"] * (batch["segment_ids"] == 1).sum(1, keepdim=True)
    alone = step_on_ranks(batch, {})
    torch.testing.assert_close(on_ranks(2, step_on_ranks, batch, sizes), alone, rtol=1e-9, atol=1e-9)
    del batch["parent_ids"]
    assert abs(step_on_ranks(batch, {})[1]["nll"] - alone[1]["nll"]) > 1e-3
