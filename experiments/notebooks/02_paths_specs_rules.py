# %% [markdown]
# # 2. Paths, specs and rules
#
# Every parameter has a path, as `layers/3/attn/q`. Every table of this project matches such paths: sharding, weight
# decay, frozen parameters, names at Hugging Face. This page lays out Qwen3-235B and Qwen3-30B on a laptop: a spec
# needs no memory, and a rule needs no GPU.

# %%
import math
import re

import torch

import models
from experiments.rules import RULES
from functional_trainer import flops, param, tree
from functional_trainer.param import Param
from sharding_rules import P, Rules, zero


def refused(call, words):
    """Call what must fail, show its message, and check that it says `words`."""
    try:
        call()
    except ValueError as error:
        print(error)
        assert words in str(error)
    else:
        raise AssertionError(f"this should have been refused: {words}")


# %% [markdown]
# ## A model of 235 billion parameters
# Its specs are a tree of `Param`. Layers are a list, so paths carry the index; here they are put together again.

# %%
big = models.from_config(models.PRESETS["235b-a22b"])
kinds: dict[str, list[Param]] = {}
for path, p in tree.flatten(big.specs).items():
    kinds.setdefault(re.sub(r"/\d+/", "/*/", path), []).append(p)
for kind, same in kinds.items():
    print(f"{kind:22} {len(same):3} x {str(same[0].shape):22} {same[0].io:8} {param.count(same):>15,}")

# %% [markdown]
# `io` says how a tensor acts as a matrix, one letter a dim, in memory order `[out, in]`. Muon reads its matrices off
# it, the FLOP count its products, import from Hugging Face its shapes. It must fit the shape.

# %%
gate_up = kinds["layers/*/moe/gate_up"][0]
print(gate_up.io, "batch:", gate_up.batch, "out, in:", gate_up.out_in, "a matrix:", gate_up.is_matrix)
assert gate_up.dims == "E2FD" and gate_up.shape == (128, 2, 1536, 4096)
refused(lambda: Param((64, 4096), "D->NH"), "names 3 dims")

# %% [markdown]
# ## Counting
# A token meets 8 of 128 experts. So of 235 billion parameters it is multiplied with 22 billion. Training costs 6
# FLOPs for each of these, and attention on top.

# %%
total, context = models.count(big), 4096
active = flops.matmul_params(big.specs, top_k=big.config.top_k)
per_token = flops.train_flops(big.specs, torch.tensor([context]), top_k=big.config.top_k) / context
print(f"{total / 1e9:.1f} B parameters, {active / 1e9:.1f} B multiplied by a token")
print(f"{per_token / 1e9:.0f} GFLOP a token at context {context}, {1 - 6 * active / per_token:.0%} of it attention")
print(f"{16 * total / 1e12:.2f} TB for float32 weights, gradients and two moments")
assert round(total / 1e9) == 235
pairs = context * (context + 1) / 2
assert per_token == 6 * active + 12 * 94 * 64 * 128 * pairs / context

# %% [markdown]
# ## The sharding table
# A row is a regex and one entry for each dim of the tensor: a mesh axis splits it always, `zero(...)` axes split what
# is stored and are gathered before use. The first row that matches the whole path wins.

# %%
rules = RULES["qwen3_moe"]
for pattern, spec in rules.table:
    print(f"{pattern:42} {spec}")

# %%
model = models.from_config(models.PRESETS["30b-a3b"])
paths = {f"params/{path}": p.shape for path, p in tree.flatten(model.specs).items()}
for path in ("params/embed", "params/layers/7/attn/q", "params/layers/7/moe/down", "act/residual"):
    row = next(pattern for pattern, _ in rules.table if re.fullmatch(pattern, path))
    print(f"{path:26} -> {row:42} {rules.spec(path)}")
assert all(len(rules.spec(path)) == len(shape) for path, shape in paths.items())

# %% [markdown]
# ## Where a model of 30 billion would live
# 32 devices, 4 that store shards times 8 that share the experts. A layout needs no devices, only the sizes of the mesh.
# At rest everything is split 32 ways; in use experts are split by `ep`, and the rest is whole.


# %%
def share(rules, sizes, path, *, use):
    """Return how many elements of a parameter one device holds."""
    axes = [axis for dim in rules.where(path, sizes, use=use, shape=paths[path]) for axis in dim]
    return math.prod(paths[path]) // math.prod(sizes[axis] for axis in axes)


sizes = {"fsdp": 4, "ep": 8}
print(f"{'MB in bfloat16':30} {'all':>8} {'at rest':>8} {'in use':>8}")
for path in [path for path in paths if "/layers/" not in path or "/layers/0/" in path]:
    elements = math.prod(paths[path]), share(rules, sizes, path, use=False), share(rules, sizes, path, use=True)
    print(f"{path:30}", *(f"{2 * count / 1e6:8.2f}" for count in elements))

at_rest = sum(share(rules, sizes, path, use=False) for path in paths)
print(
    f"one device holds {16 * at_rest / 1e9:.1f} of {16 * models.count(model) / 1e9:.0f} GB: weights, gradients, moments"
)
assert at_rest < 1.001 * models.count(model) / 32
assert share(rules, sizes, "params/layers/0/moe/down", use=True) == 128 // 8 * 2048 * 768

# %% [markdown]
# ## A layout of one's own
# It is one more row, before the others. This one keeps the routers whole everywhere, and takes nothing else along.

# %%
mine = Rules(((r"params/layers/\w+/moe/router", P(None, None)), *rules.table))
changed = [path for path in paths if share(mine, sizes, path, use=False) != share(rules, sizes, path, use=False)]
print(f"{len(changed)} tensors moved, the first is {changed[0]}")
assert changed == [path for path in paths if path.endswith("router")]

# %% [markdown]
# ## What errors look like
# There is no row for everything: a parameter that nobody placed is an error, so is what a mesh cannot split evenly. A
# silent copy on every device would cost memory, a silent rounding would cost the result.

# %%
refused(lambda: rules.spec("params/layers/0/moe/bias"), "no sharding rule matches")
refused(lambda: share(rules, {"fsdp": 4, "ep": 3}, "params/layers/0/moe/down", use=False), "does not divide into 3")
refused(lambda: P("expert", None), "is not a mesh axis")
refused(lambda: P("ep", zero("ep")), "is used twice")
print("rows that this model does not need:", Rules((*rules.table, (r"params/vision/.*", P(None)))).unused(
    [*paths, "batch/columns", "act/residual", "act/rope", "act/heads", "act/attn_rows", "act/tokens", "act/token_rows"]
))  # fmt: skip
