# %% [markdown]
# # 8. Your own loss, reward and environment
#
# Reinforcement is the same step with another loss, on rows that the policy has written itself. This page writes all
# three parts, a loss in ten lines, a reward and an environment that talks in turns, and watches a model learn.

# %%
import random

import matplotlib.pyplot as plt
import torch

import models
from experiments.first_light.make_tokenizer import FOLDER
from functional_trainer import advantages, init_state, losses, make_train_step, optimizers
from functional_trainer.data import Documents, Loader, Tokenizer
from functional_trainer.engines import Sampling
from functional_trainer.engines.local import LocalEngine
from functional_trainer.environments import Environment, Step
from functional_trainer.environments.episodes import Episodes, rewarded
from functional_trainer.experience import Experience, Plan
from functional_trainer.losses import Loss
from functional_trainer.rollouts import Prompt, Prompts, Scores

model = models.from_config(models.PRESETS["tiny"] | {"moe_intermediate_size": 96})
tokenizer = Tokenizer(FOLDER)
LETTERS = "ABCD"

# %% [markdown]
# ## An environment
# It says a letter and wants the next one of the alphabet, behind D again A, twice. `reset` opens an episode from
# its row, `step` gets the conversation until now and answers the policy's turn: what it says, what the turn was worth,
# whether the episode is over.


# %%
class Next(Environment):
    def reset(self, row):
        self.left = list(row["letters"])
        return [{"role": "user", "content": self.left[0]}]

    def step(self, messages):
        wanted = LETTERS[(LETTERS.index(self.left.pop(0)) + 1) % len(LETTERS)]
        right = messages[-1]["content"] == wanted
        return Step([{"role": "user", "content": "".join(self.left[:1])}], float(right) / 2, done=not self.left)


# %% [markdown]
# ## A start
# A policy that never does the right thing by chance has nothing to learn from. So the model first learns what a
# dialogue looks like, from a script that answers with any letter at all.

# %%
rng = random.Random(0)


def scripted() -> list[dict]:
    turns = [("user" if i % 2 == 0 else "assistant", rng.choice(LETTERS)) for i in range(4)]
    return [{"role": role, "content": letter} for role, letter in turns]


documents = Documents.of(tokenizer.encode_chat(scripted()) for _ in range(600))
optimizer = optimizers.adamw(lambda step: torch.tensor(3e-3))
step, state = make_train_step(model, losses.sft(), optimizer, compile="off"), init_state(model.init(seed=0), optimizer)
for batch, _ in zip(Loader(documents, rows=4, seq_len=64), range(40), strict=False):
    state, metrics = step(state, batch)
print(f"supervised loss {float(metrics['loss']):.2f}; any of four letters, then the end of the turn, is {1.39 / 2:.2f}")

# %% [markdown]
# ## Episodes
# All environments go on turn by turn together, each turn is one call of the engine. A sample is everything behind the
# opening. What the environment said is in it, as ids, but is not trained.

# %%
episodes = Episodes(Next, tokenizer, turns=2, turn_tokens=4)
rows = [{"letters": rng.choices(LETTERS, k=2)} for _ in range(64)]
openings = episodes.openings(rows)
prompts = Prompts(
    Prompt(episodes.turns.prompt(opening), opening[-1]["content"], row)
    for opening, row in zip(openings, rows, strict=True)
)
engine = LocalEngine(model, state.params, slots=64, length=32)
sampling = Sampling(max_tokens=16, stop=tuple(tokenizer.eos_ids))
sample = episodes(engine, [prompts[0].ids], [rows[0]], sampling)[0]
mask = sample.sampled or []
for id_, mine in zip(sample.tokens, mask, strict=True):
    print(f"{tokenizer.decode([id_], skip_special=False):15} {'trained' if mine else ''}")
assert not all(mask) and mask[-1]

# %% [markdown]
# ## A reward
# The environment gives one, and functions may add to it. This one charges a little for every token of the policy, so
# that its turns stay short.


# %%
def charge(sample) -> float:
    return -0.01 * sum(sample.sampled)


def reward(prompts, samples):
    return Scores(rewarded(samples, [charge(sample) for sample in samples]))


# %% [markdown]
# ## A loss in ten lines
# REINFORCE with an entropy bonus would be in the box; here is the plain one, with a leash: the square of how far the
# policy has moved from the one that sampled, which the rollouts' column tells. `terms` returns sums over tokens,
# `weights` what they are divided by.


# %%
def leashed(leash: float = 0.05) -> Loss:
    def terms(output, unembed, batch, shard):
        logp_BS, _ = losses.logprobs(output, unembed, batch, shard)
        moved_BS = logp_BS - batch["rollout_logprobs"]
        each_BS = leash * moved_BS.square() - batch["advantages"] * logp_BS
        return {"policy": (each_BS * batch["weights"]).sum()}, {"moved": (moved_BS.detach() * batch["weights"]).sum()}

    return Loss(terms, lambda batch: {"policy": batch["weights"].sum()})


# %% [markdown]
# ## Watch it learn
# `Experience` is a loader: it asks the policy, scores what comes back, compares each answer with the others of its
# group, and packs them into rows, here for two steps. The engine uses the parameters that the step changes.

# %%
rollouts = Experience(
    prompts,
    lambda asked, seed: episodes(engine, [p.ids for p in asked], [p.columns for p in asked], Sampling(
        max_tokens=16, stop=tuple(tokenizer.eos_ids), seed=seed)),
    reward, lambda rewards, sizes: advantages.grpo(rewards), Plan(8, 8, iterations=2), seq_len=64, longest=16, rows=8,
)  # fmt: skip
optimizer = optimizers.adamw(lambda step: torch.tensor(1e-3))
step, state = make_train_step(model, leashed(), optimizer, rows=8, compile="off"), init_state(state.params, optimizer)
seen = []
for i, batch in zip(range(80), rollouts, strict=False):
    seen += [rollouts.report()] if i % 2 == 0 else []
    state, metrics = step(state, batch)

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
axes[0].plot([row["reward"] for row in seen])
axes[0].set(title="reward, at most 1 - 4 tokens x 0.01", xlabel="rollout")
axes[1].plot([row["completions"]["mean_length"] for row in seen])
axes[1].set(title="tokens of an episode", xlabel="rollout")

# %% [markdown]
# ## What happened
# At first every fourth letter was right, at the end nearly all are.

# %%
first, last = (sum(row["reward"] for row in some) / len(some) for some in (seen[:3], seen[-3:]))
print(f"reward {first:.2f} -> {last:.2f}")
assert first < 0.4 and last > 0.6
