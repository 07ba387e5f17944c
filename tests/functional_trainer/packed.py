"""Sequences one by one, their log-probabilities differentiable, and the same packed into rows; columns for a model."""

import torch
import torch.nn.functional as F

from functional_trainer.data.columns import lengths
from functional_trainer.policy import policy
from functional_trainer.preference import MPO, preference
from functional_trainer.step import total_weights
from functional_trainer.types import ONE_DEVICE, Output, Unembed

V, F64 = 3, torch.float64


def sequence(gen, tokens: int, sampled: int, spread: float = 0.5) -> dict[str, torch.Tensor]:
    """Draw one of which the last `sampled` targets are the policy's, columns (T,) and logits (T, V), a leaf."""
    normal = lambda *shape: torch.randn(*shape, generator=gen, dtype=F64)  # noqa: E731
    logits, targets = normal(tokens, V), torch.randint(V, (tokens,), generator=gen)
    logp = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    weights = (torch.arange(tokens) >= tokens - sampled).to(F64)
    others = {name: logp + spread * normal(tokens) for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs")}
    advantages = torch.where(weights != 0, normal(1), torch.nan)
    return {
        "logits": logits.requires_grad_(), "targets": targets, "weights": weights, "advantages": advantages, **others
    }  # fmt: skip


def draw(sizes, seed=0, spread=0.5) -> list[dict[str, torch.Tensor]]:
    """Draw a sequence of each (tokens, sampled)."""
    gen = torch.Generator().manual_seed(seed)
    return [sequence(gen, *size, spread) for size in sizes]


def logp(s) -> torch.Tensor:
    """Return log-probabilities of a sequence's policy tokens."""
    return s["logits"].log_softmax(-1)[range(len(s["targets"])), s["targets"]][s["weights"] != 0]


def of(s, name) -> torch.Tensor:
    return s[name][s["weights"] != 0]


def pack(sequences, layout, width=None) -> dict[str, torch.Tensor]:
    """Put sequences into rows, as `layout` numbers them; columns (B, S), and the logits."""
    width = width or max(1, *(sum(len(sequences[i]["targets"]) for i in row) for row in layout))
    batch = {}
    for name, example in sequences[0].items():
        empty = example[:0]
        rows = [torch.cat([empty, *(sequences[i][name] for i in row)]) for row in layout]
        batch[name] = torch.stack([F.pad(x, (0, 0) * (x.ndim - 1) + (0, width - len(x))) for x in rows])
    numbers = [[torch.full_like(sequences[i]["targets"], n + 1) for n, i in enumerate(row)] for row in layout]
    places = [[torch.arange(len(sequences[i]["targets"])) for i in row] for row in layout]
    for name, parts in (("segment_ids", numbers), ("positions", places)):
        rows = [torch.cat([torch.zeros(0, dtype=torch.int64), *row]) for row in parts]
        batch[name] = torch.stack([F.pad(x, (0, width - len(x))) for x in rows])
    batch["lengths"] = torch.from_numpy(lengths(batch["weights"].numpy(), batch["segment_ids"].numpy()))
    return batch


def parts(loss, batch, buffers=None, shard=ONE_DEVICE):
    """Return each term divided by its weight, and what is reported, as the step makes them."""
    columns = {k: v for k, v in batch.items() if k != "logits"}
    output, unembed = Output(batch["logits"], {}, buffers=buffers), Unembed(torch.eye(V, dtype=F64))
    sums, reported = loss.terms(output, unembed, columns, shard)
    weights = total_weights(loss, columns, shard)
    terms, said = ({k: v / weights.get(k, 1) for k, v in found.items()} for found in (sums, reported))
    return terms, loss.derive(said)


def value(loss, batch, buffers=None) -> torch.Tensor:
    terms, _ = parts(loss, batch, buffers)
    return sum(loss.coefficients.get(k, 1.0) * v for k, v in terms.items())


def gradients(x: torch.Tensor, sequences) -> list[torch.Tensor]:
    """Return the gradient with respect to each sequence's logits."""
    leaves = [s["logits"] for s in sequences]
    if not x.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(x, leaves, materialize_grads=True, retain_graph=True))


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, sequences, tolerance=1e-9) -> None:
    """Compare values and gradients."""
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance)
    for a, b in zip(gradients(ours, sequences), gradients(theirs, sequences), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def with_columns(batch, seed=0) -> dict[str, torch.Tensor]:
    """Add columns of reinforcement learning and of preferences: sequences 1 and 2 of a row are a pair, 3 mismatched."""
    gen, ids = torch.Generator().manual_seed(seed), batch["segment_ids"]
    normal = lambda: torch.randn(ids.shape, generator=gen, dtype=F64)  # noqa: E731
    of_segment = lambda x_BN: x_BN.gather(1, ids)  # noqa: E731
    columns = {name: -3 + normal() / 3 for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs")}
    columns["rollout_logprobs"] = columns["old_logprobs"] + normal() / 10
    columns |= {
        "advantages": of_segment(normal()),
        "sft_weights": 1.0 * (ids == 2),
        "distill_weights": 1.0 * (ids == 1),
    }
    columns["lengths"] = torch.from_numpy(lengths(batch["weights"].numpy(), ids.numpy()))
    columns["preferred"] = (ids == 1).long() - (ids == 2).long()
    return batch | columns | {"pairs": torch.where(ids == 3, 2, (ids != 0).long())}


LOSSES = {
    "policy of sequences": lambda: policy(
        "gspo", beta=0.1, kl="k3_unbiased", entropy=0.01, correction="sequence_mask", opsm=0.1, sft=0.5, distill=0.2,
        balance=0.1,
    ),
    "policy of tokens": lambda: policy("dapo", delta=1.5, correction="token_mask", balance=0.1),
    "policy by sequence": lambda: policy("gmpo", correction="geometric_mask", correction_range=(0.9, 1.1)),
    "mpo": lambda: preference(MPO, balance=0.1),
    "ipo": lambda: preference({"ipo": 1.0}),
    "kto": lambda: preference({"kto": 1.0}, balance=0.1),
}  # fmt: skip
"""What a model is trained with."""
