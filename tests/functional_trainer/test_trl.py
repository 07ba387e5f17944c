"""Policy and preference losses against TRL's own lines on the same log-probabilities: values, gradients, metrics.

TRL's losses are methods of trainers. They run unchanged on trainers that were never initialised and have only the
attributes which the methods read; the model is a function that returns given log-probabilities.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import DPOTrainer, GRPOTrainer, KTOTrainer
from trl.experimental.gmpo import GMPOTrainer

from functional_trainer.policy import policy
from functional_trainer.preference import MPO, preference, running_mean
from tests.functional_trainer.packed import F64, assert_same, draw, logp, of, pack, parts, value

SIZES = st.lists(st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**20)
LENGTH, ACCELERATOR = 7, Accelerator(cpu=True)


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def answers(sequences, name) -> torch.Tensor:
    return padded([of(s, name) for s in sequences])


def scores(logps: torch.Tensor) -> SimpleNamespace:
    """Return what a model of TRL returns, as far as its losses look at it."""
    zeros = torch.zeros_like(logps.detach())
    return SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


class Model:
    """Scores whose key is the largest id of the input."""

    training = True

    def __init__(self, given):
        self.given = given

    def __call__(self, input_ids, **_):
        return scores(self.given[int(input_ids.max())])


def trainer(cls, **attributes):
    made = cls.__new__(cls)
    made.__dict__ |= {"accelerator": ACCELERATOR, "model": SimpleNamespace(training=True)}
    made.__dict__ |= {"state": SimpleNamespace(global_step=0), "aux_loss_enabled": False, "_tp_size": 1}
    made.__dict__ |= {"_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0, **attributes}
    return made


def grpo(sequences, cls=GRPOTrainer, **changes):
    """Return TRL's loss and what it logs."""
    args = {"delta": None, "use_bias_correction_kl": False, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
    args |= {"report_to": [], "steps_per_generation": 1}
    given = {
        "args": SimpleNamespace(**args | {k: changes.pop(k) for k in args if k in changes}), "loss_type": "grpo",
        "importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0, "use_vllm": False,
        "max_completion_length": LENGTH, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None,
        "current_gradient_accumulation_steps": 1, "_entropy_bonus_enabled": False, **changes,
    }  # fmt: skip
    mask = padded([torch.ones_like(logp(s)) for s in sequences])
    ids, one = mask.long(), torch.zeros(len(sequences), 1, dtype=torch.int64)
    inputs = {
        "prompt_ids": one, "prompt_mask": one + 1, "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": torch.stack([of(s, "advantages")[0] for s in sequences]),
        "old_per_token_logps": answers(sequences, "old_logprobs"),
        "ref_per_token_logps": answers(sequences, "ref_logprobs"),
        "sampling_per_token_logps": answers(sequences, "rollout_logprobs"),
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    made = trainer(cls, **given)
    loss = made._compute_loss(Model({1: padded([logp(s) for s in sequences])}), inputs)
    return loss, {k: v[-1] for k, v in made._metrics["train"].items()}


CLIP = {"clip_ratio/low": "clip_ratio/low_mean", "clip_ratio/high": "clip_ratio/high_mean"}
CLIP |= {"clip_ratio/region": "clip_ratio/region_mean"}
SEQUENCE = {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4}
CASES = {
    "grpo": (("grpo", {}), {}),
    "grpo, two-sided": (("grpo", {"delta": 1.4}), {"delta": 1.4}),
    "grpo, kl": (("grpo", {"beta": 0.3}), {"beta": 0.3}),
    "grpo, unbiased kl": (
        ("grpo", {"beta": 0.3, "kl": "k3_unbiased"}),
        {"beta": 0.3, "use_bias_correction_kl": True},
    ),
    "grpo, off-policy sequences": (("grpo", {"opsm": 0.05}), {"off_policy_mask_threshold": 0.05}),
    "dapo": (("dapo", {}), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dapo, kl": (("dapo", {"beta": 0.3}), {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.3}),
    "dr_grpo": (("dr_grpo", {"max_length": LENGTH}), {"loss_type": "dr_grpo"}),
    "bnpo": (("bnpo", {}), {"loss_type": "bnpo"}),
    "gspo": (("gspo", {}), SEQUENCE),
    "gspo_token": (("gspo_token", {}), SEQUENCE),
    "cispo_max": (("cispo_max", {"epsilon_high": 1.3}), {"loss_type": "cispo", "epsilon_high": 1.3}),
    "sapo": (("sapo", {}), {"loss_type": "sapo"}),
    "gmpo": (("gmpo", {}), {"cls": GMPOTrainer, "epsilon_low": 0.4, "epsilon_high": 0.4}),
}


@pytest.mark.parametrize("case", CASES)
@given(sizes=SIZES, seed=SEEDS)
@settings(max_examples=8, deadline=None)
def test_policy_losses(case, sizes, seed):
    (name, changes), theirs = CASES[case]
    sequences = draw(sizes, seed, spread=1e-3 if "gspo" in case else 0.5)
    half = len(sizes) // 2
    batch, loss = pack(sequences, [[*range(half)], [*range(half, len(sizes))]]), policy(name, **changes)
    wanted, logged = grpo(sequences, **theirs)
    tolerance = 1e-6 if name == "sapo" else 1e-9  # its temperatures are in float32 there
    assert_same(value(loss, batch), wanted, sequences, tolerance)
    terms, reported = parts(loss, batch)
    pairs = {} if name in ("sapo", "cispo_max") or "gspo" in name else CLIP  # sequences, not tokens, in TRL's GSPO
    for ours, its in pairs.items():
        assert float(reported[ours]) == pytest.approx(logged[its], abs=1e-6)
    if name == "dapo" and "kl" in terms:
        assert terms["kl"].item() == pytest.approx(logged["kl"], rel=1e-6)


# preferences ---------------------------------------------------------------------------------------------------------


def whole(sequences) -> dict[str, torch.Tensor]:
    """Return input_ids, attention_mask and completion_mask, of one token of prompt and the answers."""
    mask = padded([torch.ones_like(logp(s)).long() for s in sequences])
    first = torch.zeros(len(sequences), 1, dtype=torch.int64)
    mask = torch.cat([first, mask], 1)
    return {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}


def reference(sequences) -> torch.Tensor:
    return torch.stack([of(s, "ref_logprobs").sum() for s in sequences])


@pytest.mark.parametrize(
    "terms", [{"dpo": ["sigmoid", 1.0]}, {"ipo": ["ipo", 1.0]}, {"bco": ["bco_pair", 1.0]}, MPO], ids=str
)
@given(sizes=SIZES, seed=SEEDS)
@settings(max_examples=8, deadline=None)
def test_preference_losses(terms, sizes, seed):
    sequences = draw([*sizes, *reversed(sizes)], seed)
    n = len(sizes)
    for i, s in enumerate(sequences):
        s["preferred"] = torch.full_like(s["targets"], 1 if i < n else -1)
        s["pairs"] = torch.full_like(s["targets"], 1 + i % n)
    theirs = {"dpo": ["sigmoid", 0.8], "bco": ["bco_pair", 0.2], "sft": ["sft", 1.0]} if terms is MPO else terms
    names, weights = zip(*theirs.values(), strict=True)
    made = trainer(
        DPOTrainer, loss_types=names, loss_weights=weights, beta=0.3, label_smoothing=0.0, ld_alpha=None,
        f_divergence_type="reverse_kl", precompute_ref_logps=True, use_weighting=False, ref_model=None,
    )  # fmt: skip
    chosen, rejected = reference(sequences).chunk(2)
    inputs = whole(sequences) | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    wanted = made._compute_loss(Model({1: padded([logp(s) for s in sequences])}), inputs, False)
    loss = preference(terms if terms is MPO else dict.fromkeys(terms, 1.0), beta=0.3)
    batch = pack(sequences, [[i, i + n] for i in range(n)])
    assert_same(value(loss, batch, running_mean()), wanted, sequences)
    reported, logged = parts(loss, batch, running_mean())[1], {k: v[-1] for k, v in made._metrics["train"].items()}
    for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"):
        assert float(reported[name]) == pytest.approx(logged[name], rel=1e-6, abs=1e-6)


@given(sizes=SIZES, seed=SEEDS)
@settings(max_examples=12, deadline=None)
def test_kto(sizes, seed):
    """Each answer, and another prompt's in its place, of which KTO's z is the mean."""
    n, gen = len(sizes), torch.Generator().manual_seed(seed)
    sequences, labels = draw([*sizes, *reversed(sizes)], seed), torch.randint(2, (n,), generator=gen)
    for i, s in enumerate(sequences):
        s["preferred"] = torch.full_like(s["targets"], 0 if i >= n else 2 * int(labels[i]) - 1)
    own, other = sequences[:n], sequences[n:]
    made = trainer(
        KTOTrainer, calculate_KL=True, precompute_ref_logps=True, loss_type="kto", beta=0.3, desirable_weight=1.5,
        undesirable_weight=0.7,
    )  # fmt: skip
    mismatched = {f"KL_{k}": v for k, v in whole(other).items()}
    mismatched["KL_input_ids"] = mismatched["KL_input_ids"] + 1
    inputs = whole(own) | mismatched | {"label": labels.bool(), "ref_logps": reference(own)}
    model = Model({1: padded([logp(s) for s in own]), 2: padded([logp(s).detach() for s in other])})
    wanted = made._compute_loss(model, inputs | {"ref_KL_logps": reference(other)}, False)
    batch = pack(sequences, [[*range(n)], [*range(n, 2 * n)]])
    assert wanted.dtype == F64
    assert_same(
        value(preference({"kto": 1.0}, beta=0.3, chosen_weight=1.5, rejected_weight=0.7), batch), wanted, sequences
    )
