"""Options of the recipes that learn from rewards and from preferences. Imports no torch.

Flags have the names that TRL and verl use, where these have one.
"""

import importlib.util
import math
import re
from dataclasses import dataclass
from typing import Literal

from functional_trainer.options import RunOptions, Shape, within


@dataclass(frozen=True)
class PromptOptions:
    train: tuple[str, ...] = ()
    """Files, folders, globs, datasets of the hub with questions (none: the project's own tasks); docs/rl.md."""
    eval: tuple[str, ...] = ()
    """The same, held out; only with --data.train."""
    split: float = 0.0
    """Share of the questions to hold out instead of --data.eval, by a hash of their content."""
    type: Shape = "auto"
    """What rows look like (docs/rl.md); a last answer is the right one, the column `answer` of rewards."""
    columns: tuple[str, ...] = ()
    """Names of columns, OURS=THEIRS: prompt=question completion=answer."""
    tokenizer: str | None = None
    """Folder of the tokenizer and chat template (default: the model's)."""
    seq_len: int = 256
    """Tokens in a packed row; a question and its longest answer must fit."""
    overlong: Literal["error", "drop"] = "error"
    """What happens to questions that do not fit into a row with the longest answer; the log counts them."""
    answer_tokens: int | None = None
    """Most tokens of a greedy answer to a held-out question (default: --rollout.max-completion-length)."""

    def __post_init__(self):
        within("data.", self, seq_len=(1, ""), answer_tokens=(1, ""))
        if not 0 <= self.split < 1 or self.split and (self.eval or not self.train):
            raise ValueError(f"--data.split {self.split}: a share below 1 of --data.train, and not with --data.eval")
        if (self.type != "auto" or self.columns or self.eval) and not self.train:
            raise ValueError("--data.type, --data.columns and --data.eval go with --data.train, which is not given")
        if mix := next((path for path in (*self.train, *self.eval) if path.endswith((".yaml", ".yml"))), None):
            raise ValueError(f"{mix}: questions are not read from YAML mixes; list its files behind --data.train")


@dataclass(frozen=True)
class RolloutOptions:
    num_generations: int = 16
    """Answers to each prompt: a group; 1 only with --loss.advantage remax and reinforce_pp."""
    max_completion_length: int = 32
    """Most tokens of an answer."""
    temperature: float = 1.0
    """What logits are divided by, in sampling and in the loss."""
    top_k: int = 0
    """Sample among so many tokens, the likeliest (0: all)."""
    top_p: float = 1.0
    """Sample among the fewest tokens that are so likely together."""
    min_p: float = 0.0
    """Sample among tokens that have at least this share of the likeliest one's probability (0: all)."""
    slots: int = 256
    """Answers that are decoded together, by each process."""
    compile: Literal["off", "layer", "step"] = "off"
    """What is compiled of decoding a token."""
    steps_per_generation: int = 1
    """Optimizer steps that a rollout is split into."""
    num_iterations: int = 1
    """Times that a rollout is trained on."""
    filter_groups: bool = False
    """Draw others for prompts whose answers have all the same reward (DAPO's dynamic sampling)."""
    max_num_gen_batches: int = 10
    """At most so many draws to fill a rollout with --rollout.filter-groups; then groups without spread fill it."""
    mask_truncated_completions: bool = False
    """Train on no answer that was cut off."""
    overlong_buffer: int = 0
    """Tokens before the longest answer over which a penalty of the reward grows to 1 (DAPO; 0: none)."""
    share_prompts: bool = True
    """Compute a question once for all its answers in a row of the step, instead of once for each (docs/rl.md)."""
    routing_replay: Literal["none", "engine", "trainer"] = "none"
    """Train with the experts that the engine chose (R3), or --loss.old trainer (R2), with the router's own scores."""
    log_completions: int = 16
    """Answers of a rollout that are written to completions.jsonl, some to each of several prompts (0: none)."""
    log_every: int = 1
    """Rollouts between two of which answers are written."""
    max_disagreement: float = 0.01
    """Mean |log-probability, as sampled - as trained| of the first rollout above which the run is refused."""
    environment: str = ""
    """Talk to this environment in several turns: calculator, guess, or FILE.py:NAME (docs/environments.md)."""
    max_turns: int = 16
    """Most turns of the policy in an episode; --rollout.max-completion-length is then for all turns together."""
    max_turn_length: int = 0
    """Most tokens of a turn (0: only what the episode has left)."""
    tool_seconds: float = 10.0
    """Longest time for a call of a tool, and of an environment."""
    environment_ray: int = 0
    """Workers of Ray that environments and their tools run in, on this machine or a cluster (0: this process)."""
    engine: Literal["local", "vllm", "sglang", "lmdeploy"] = "local"
    """What answers: this process, or servers, at --rollout.url (docs/rl.md)."""
    url: tuple[str, ...] = ()
    """Servers, http://HOST:PORT; each process has up to --rollout.slots requests under way."""
    sync: Literal["memory", "disk"] = "memory"
    """How servers get new weights: from requests, or from rollout-weights/ in --out, which they must see."""
    timeout: float = 600.0
    """Longest time of a request to a server, seconds."""
    wait: float = 0.0
    """Seconds to wait at the start for servers that are not there yet."""
    server_seconds: float = 120.0
    """Seconds that a server may fail or be away, as one that restarts is, before it is left out."""
    max_async_level: int = 0
    """Rollouts that are drawn ahead, while the step trains (0: none, synchronous; 1: one-step-off)."""
    max_staleness: int = 4
    """Rollouts that the weights a token was sampled with may be behind; answers with older tokens are drawn anew."""
    in_flight_weight_updates: bool = False
    """Let answers under way go on with new weights at once, whenever there are some."""
    partial: int = 0
    """Tokens that an answer grows by in a rollout; what has not ended waits for the next one (0: no limit)."""
    ray: int = 0
    """Workers that draw rollouts as actors of Ray, on this machine or a cluster (0: none, this process does)."""

    def __post_init__(self):
        for name in ("max_turns", "max_turn_length", "tool_seconds", "environment_ray"):
            if getattr(self, name) != getattr(RolloutOptions, name) and not self.environment:
                raise ValueError(f"--rollout.{name.replace('_', '-')} has no effect without --rollout.environment")
        within("rollout.", self, max_turns=(1, ""), max_turn_length=(0, ""), environment_ray=(0, ""))
        if not 0 < self.tool_seconds < math.inf:
            raise ValueError(f"--rollout.tool-seconds is {self.tool_seconds}; it must be above 0")
        _has_ray("rollout.environment-ray", self.environment_ray)
        for given, flag in ((self.routing_replay == "engine", "routing-replay engine"), (self.partial, "partial")):
            if given and self.environment:
                raise ValueError(f"--rollout.{flag} is for answers of one turn, not for environments")
        ones = ("max_completion_length", "slots", "steps_per_generation", "num_iterations", "max_num_gen_batches")
        within("rollout.", self, num_generations=(1, ""), **dict.fromkeys((*ones, "log_every"), (1, "")))
        least = dict.fromkeys(("log_completions", "top_k", "overlong_buffer", "max_disagreement"), (0, ""))
        within("rollout.", self, **least, top_p=(0, "at most 1"), min_p=(0, "below 1"))
        if not 0 < self.temperature < math.inf or not self.top_p > 0:
            right = "must be above 0, and finite: answers of a group must differ, and be the model's"
            raise ValueError(f"--rollout.temperature {self.temperature} and --rollout.top-p {self.top_p} {right}")
        if self.log_every != RolloutOptions.log_every and not self.log_completions:
            raise ValueError("--rollout.log-every has no effect with --rollout.log-completions 0")
        if self.filter_groups and self.num_generations == 1:
            raise ValueError("--rollout.filter-groups compares answers: --rollout.num-generations must be at least 2")
        if self.max_num_gen_batches != RolloutOptions.max_num_gen_batches and not self.filter_groups:
            raise ValueError("--rollout.max-num-gen-batches has no effect without --rollout.filter-groups")
        if self.overlong_buffer > self.max_completion_length:
            raise ValueError(f"--rollout.overlong-buffer {self.overlong_buffer} is more than the longest answer")
        within("rollout.", self, timeout=(0, ""), wait=(0, ""), server_seconds=(0, ""))
        self._servers()
        self._ahead()

    def _servers(self) -> None:
        """Check what goes with servers, and what only without."""
        said = f"--rollout.engine {self.engine}"
        if (self.engine == "local") == bool(self.url):
            raise ValueError(f"{said} and {len(self.url)} of --rollout.url: servers and their addresses go together")
        if wrong := [url for url in self.url if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url)]:
            raise ValueError(f"--rollout.url {wrong[0]}: it must be http://HOST:PORT")
        alone: tuple[str, ...] = ("sync", "timeout", "wait", "server_seconds")
        if self.engine != "local":
            alone = ("compile", "ray")
        if odd := [name for name in alone if getattr(self, name) != getattr(RolloutOptions, name)]:
            raise ValueError(f"--rollout.{odd[0].replace('_', '-')} has no effect with {said}")
        if self.engine == "lmdeploy" and self.routing_replay == "engine":
            raise ValueError(f"--rollout.routing-replay engine: {said} records none that is read; say trainer")
        if self.engine == "lmdeploy" and self.in_flight_weight_updates:
            why = "does not say which weights a token is of, and takes others only when no answer is under way"
            raise ValueError(f"--rollout.in-flight-weight-updates: {said} {why}; leave it away")
        if self.engine == "lmdeploy" and (self.temperature != 1 or self.sync == "disk"):
            raise ValueError(f"{said} goes with --rollout.temperature 1 and --rollout.sync memory only (docs/rl.md)")
        if self.engine == "vllm" and self.temperature != 1 and (self.top_k or self.top_p < 1 or self.min_p):
            raise ValueError(f"{said}: with --rollout.temperature other than 1 there is no top-k, top-p and min-p")

    def _ahead(self) -> None:
        """Refuse what makes no sense together of rollouts that are drawn ahead, in parts or elsewhere."""
        within("rollout.", self, **dict.fromkeys(("max_async_level", "max_staleness", "partial", "ray"), (0, "")))
        level, said = self.max_async_level, f"--rollout.max-async-level {self.max_async_level}"
        if self.max_staleness != RolloutOptions.max_staleness and not (level or self.partial):
            raise ValueError("--rollout.max-staleness has no effect without --rollout.max-async-level or .partial")
        if (needed := level + bool(self.partial)) > self.max_staleness:
            said += f" and --rollout.partial {self.partial}" if self.partial else ""
            raise ValueError(f"{said}: --rollout.max-staleness must be at least {needed}, not {self.max_staleness}")
        if self.partial >= self.max_completion_length:
            raise ValueError(f"--rollout.partial {self.partial} has no effect: no answer is longer")
        if self.in_flight_weight_updates and (not level or self.ray):
            other = "with --rollout.ray, whose workers get weights with their prompts" if level else f"with {said}"
            raise ValueError(f"--rollout.in-flight-weight-updates has no effect {other}")
        if level and self.compile != "off" and not self.ray:
            raise ValueError(
                f"{said} with --rollout.compile {self.compile}: the compiler's settings are the process's, and the "
                "step's are others; leave one away, or draw in other processes, with --rollout.ray"
            )
        _has_ray("rollout.ray", self.ray)

    def packed_rows(self, prompts: int, seq_len: int, equal: int) -> int:
        """Return the rows of a step if all answers are as long as may be, raised to a multiple of `equal`."""
        tokens = prompts * self.num_generations * self.max_completion_length
        return -(-tokens // (self.steps_per_generation * seq_len * equal)) * equal


def _has_ray(flag: str, count: int) -> None:
    if count and importlib.util.find_spec("ray") is None:
        raise ValueError(f"--{flag} {count}: Ray is not installed; pip install '.[ray]'")


@dataclass(frozen=True)
class RewardOptions:
    functions: tuple[str, ...] = ()
    """FILE.py:NAME or one that ships, as maths, length:N (default: exact; with an environment, none)."""
    weights: tuple[float, ...] = ()
    """Weight of each (none: 1)."""
    messages: tuple[str, ...] = ()
    """Names of functions that get conversations as TRL gives them, lists of messages and no texts (docs/rewards.md)."""
    isolate: tuple[str, ...] = ()
    """Names of functions of your own to run in processes that are killed when they hang."""
    workers: int = 2
    """Processes for each isolated function, and for tools of an environment."""
    seconds: float = 10.0
    """Longest time for one answer in an isolated function."""
    ray: int = 0
    """Workers of Ray that isolated functions run in, on this machine or a cluster (0: --reward.workers here)."""

    def __post_init__(self):
        within("reward.", self, workers=(1, ""), ray=(0, ""))
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"--reward.seconds is {self.seconds}; it must be above 0")
        _has_ray("reward.ray", self.ray)
        if odd := [weight for weight in self.weights if not math.isfinite(weight)]:
            raise ValueError(f"--reward.weights has {odd[0]}; each must be a finite number")
        if self.weights and len(self.weights) != len(self.functions):
            raise ValueError(f"--reward.weights: {len(self.weights)} for {len(self.functions)} of --reward.functions")


LossType = Literal[
    "reinforce", "ppo", "grpo", "dr_grpo", "dapo", "bnpo", "gspo", "gspo_token", "cispo", "cispo_max", "sapo", "gmpo"
]
CLIPPED = ("ppo", "grpo", "dr_grpo", "dapo", "bnpo", "gspo", "gspo_token")
USED_BY = {
    "epsilon": (*CLIPPED, "cispo", "gmpo"), "epsilon_high": (*CLIPPED, "cispo", "cispo_max", "gmpo"), "delta": CLIPPED,
}  # fmt: skip
"""Options that only some objectives read."""


@dataclass(frozen=True)
class PolicyOptions:
    loss_type: LossType = "dapo"
    """Objective, with its paper's clipping and mean if none are given; dr_grpo wants --loss.scale-rewards none too."""
    advantage: Literal["grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "opo", "remax", "pass_at_k"] = "grpo"
    """What an answer is worth beside the others of its group."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Standard deviation that grpo's advantages are divided by."""
    loss_agg_mode: (
        Literal["token_mean", "token_sum", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]
        | None
    ) = None
    """How losses of tokens become one number (docs/rl.md; default: as the objective's paper says)."""
    epsilon: float | None = None
    """Ratios are clipped at 1 - this, of gmpo their logarithms at -this; not of reinforce, sapo and cispo_max."""
    epsilon_high: float | None = None
    """Ratios are clipped at 1 + this, of cispo_max at this, of gmpo their logarithms; not of reinforce and sapo."""
    delta: float | None = None
    """Dual clip: where the advantage is negative a ratio counts at most this much."""
    beta: float = 0.0
    """Coefficient of the KL divergence from the weights at the start, which then run beside every step."""
    kl: Literal["k1", "k2", "k3", "k3_unbiased"] = "k3"
    """How the divergence is estimated."""
    kl_in_reward: bool = False
    """Take --loss.beta times an answer's divergence from its reward, and add none to the loss."""
    entropy_coef: float = 0.0
    """Coefficient of the entropy, which is maximized."""
    correction: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"
    ] = "none"
    """Weights for what the engine says differently (TIS, MIS; docs/rl.md); for several steps say --loss.old trainer."""
    correction_range: tuple[float, float] | None = None
    """Lowest and highest ratio of --loss.correction (default: the usual ones)."""
    old: Literal["rollout", "trainer"] = "rollout"
    """Who says what ratios are to, with several steps per rollout: the engine, or the trainer before the first step."""
    off_policy_mask_threshold: float | None = None
    """Reject answers of negative advantage whose mean of log rollout / policy is above this (OPSM)."""
    balance: float = 0.0
    """Coefficient of the router's balance loss within each sequence."""

    def __post_init__(self):
        least = ("epsilon", "epsilon_high", "beta", "balance", "correction_range", "off_policy_mask_threshold")
        within("loss.", self, **dict.fromkeys(least, (0, "")), delta=(1, ""))
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"--loss.entropy-coef is {self.entropy_coef}; it must be a number")
        for option, users in USED_BY.items():
            if getattr(self, option) is not None and self.loss_type not in users:
                flag, said = f"--loss.{option.replace('_', '-')}", f"--loss.loss-type {self.loss_type}"
                raise ValueError(f"{flag} has no effect with {said}, only with {', '.join(users)}; leave it away")
        for flag, given in (("kl-in-reward", self.kl_in_reward), (f"kl {self.kl}", self.kl != "k3")):
            if given and not self.beta:
                raise ValueError(f"--loss.{flag} has no effect without --loss.beta")
        if self.kl_in_reward and self.kl == "k3_unbiased":
            raise ValueError("--loss.kl k3_unbiased is of a ratio: with --loss.kl-in-reward use k1, k2 or k3")
        if self.correction_range and self.correction == "none":
            raise ValueError("--loss.correction-range has no effect without --loss.correction")
        if self.scale_rewards != "group" and self.advantage != "grpo":
            raise ValueError(f"--loss.scale-rewards has no effect with --loss.advantage {self.advantage}")


MPO = {"dpo": 0.8, "bco": 0.2, "sft": 1.0}
"""InternVL's mixture of terms, arxiv 2411.10442."""
PreferenceLoss = Literal["sigmoid", "ipo", "bco_pair", "sft", "mpo", "kto"]
PREFERENCE_TERMS = {"sigmoid": "dpo", "ipo": "ipo", "bco_pair": "bco", "sft": "sft", "kto": "kto"}
"""Names of losses in TRL, and of the terms of `functional_trainer.preference`."""


@dataclass(frozen=True)
class PreferenceOptions(RunOptions):
    loss_type: tuple[PreferenceLoss, ...] = ("sigmoid",)
    """Losses, under TRL's names; sigmoid is DPO, mpo alone is sigmoid, bco_pair and sft with weights 0.8, 0.2 and 1."""
    loss_weights: tuple[float, ...] = ()
    """Weight of each of --loss-type (default: 1)."""
    beta: float = 0.1
    """How strongly the reference holds the policy; the tau of IPO."""
    label_smoothing: float = 0.0
    """Share of the labels that sigmoid takes to be wrong: cDPO."""
    desirable_weight: float = 1.0
    """Weight of wanted answers in kto."""
    undesirable_weight: float = 1.0
    """Weight of unwanted answers in kto."""
    reference: Literal["live", "precomputed"] = "live"
    """The start weights run beside every step, or once over all data before the first, kept in --data.cache."""
    balance_coefficient: float | None = None
    """Weight of the router balance loss within each answer (default: the model config's router_aux_loss_coef)."""

    def __post_init__(self):
        super().__post_init__()
        names = ("balance_coefficient", "loss_weights", "desirable_weight", "undesirable_weight")
        within("", self, **dict.fromkeys(names, (0, "")), label_smoothing=(0, "below 1"))
        if not 0 < self.beta < math.inf:
            raise ValueError(f"--beta is {self.beta}; it must be above 0")
        given, said = self.loss_type, f"--loss-type {' '.join(self.loss_type)}"
        if not given or len(given) > 1 and (len({*given}) < len(given) or {"mpo", "kto"} & {*given}):
            raise ValueError(f"{said}: name at least one, each once; mpo is a mixture already, and kto not of pairs")
        if self.loss_weights and (given == ("mpo",) or len(self.loss_weights) != len(given)):
            right = "has its own" if given == ("mpo",) else f"needs {len(given)}"
            raise ValueError(f"--loss-weights {' '.join(map(str, self.loss_weights))}: {said} {right}")
        used = {"label_smoothing": ({"dpo"}, "sigmoid or mpo")}
        used |= {"beta": ({"dpo", "ipo", "bco", "kto"}, "sigmoid, ipo, bco_pair, mpo or kto")}
        used |= dict.fromkeys(("desirable_weight", "undesirable_weight"), ({"kto"}, "kto"))
        for option, (readers, users) in used.items():
            if getattr(self, option) != getattr(PreferenceOptions, option) and not readers & self.terms.keys():
                flag = f"--{option.replace('_', '-')}"
                raise ValueError(f"{flag} has no effect with {said}, only with {users}; leave it away")

    @property
    def terms(self) -> dict[str, float]:
        """Coefficients of the terms of the loss."""
        weights = self.loss_weights or (1.0,) * len(self.loss_type)
        named = zip(self.loss_type, weights, strict=True)
        return MPO if self.loss_type == ("mpo",) else {PREFERENCE_TERMS[name]: weight for name, weight in named}
