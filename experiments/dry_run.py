"""Take the real step as rank 0 of a mesh of any size, under PyTorch's fake process group, and compare it with its plan.

    python experiments/dry_run.py --model 235b-a22b --mesh fsdp=64,ep=8
    python experiments/dry_run.py --model 1t --mesh fsdp=128,ep=16

Device mesh, process groups, DTensors and all layers are real, tensors have shapes only. Exits with status 1 if bytes
at rest, at most or sent, calls, or FLOPs are not those of `experiments/plan.py`, whose depth is extrapolated.
"""

import sys
import time
from collections import Counter
from math import prod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the clone without installing

from experiments.plan import Options, eight, pieces
from functional_trainer import config


def differences(ran: dict, planned: dict) -> list[str]:
    """List what of the step is not as planned; of memory the most in each part of the step."""
    odd, (a, b) = [], (Counter[tuple](), Counter[tuple]())
    for counts, costs in ((a, ran), (b, planned)):
        for key, n in costs.items():
            counts[key[:2] if key[0] == "memory" else key] += n
    for key in {**a, **b}:
        if a[key] != b[key] and key != ("memory", "others"):
            odd.append(f"{' '.join(map(str, key))}: {a[key]:,} ran, {b[key]:,} planned")
    return odd


def main(o: Options) -> None:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import models
    from functional_trainer import backend
    from sharding_rules import mesh, plan
    from sharding_rules.sharder import Sharder
    from sharding_rules.watch import Watch

    model, build, rules, sizes = pieces(o)
    world, begin = prod(sizes.values()), time.perf_counter()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    grid = mesh.make(mesh.Mesh(**{"fsdp": 1} | sizes), backend.setup(), world)
    if grid is None:
        raise ValueError(f"--mesh {o.mesh!r} is one device: nothing is exchanged; give an axis more, as fsdp=64")
    fp8, watch = eight(o, model), Watch(o.document or o.seq_len)
    shard = Sharder.of(rules, grid, model.specs, o.dispatch, fp8)
    ran = plan.observed(shard, model, build, plan.columns(o.rows, o.seq_len), watch, o.offload)
    dist.destroy_process_group()
    seconds = time.perf_counter() - begin
    how = o.document, o.dispatch, False, fp8, o.offload
    planned = plan.plan(model, build, rules, sizes, o.rows, o.seq_len, *how)
    calls, nbytes = (sum(n for key, n in ran.items() if key[0] == what) for what in ("calls", "sent"))
    params, moments = (ran["rest", what] / 1e9 for what in ("params", "moments"))
    depth = len(model.specs["layers"])
    print(f"{o.model}, {models.count(model):,} parameters, all {depth} layers, as rank 0 of {world}: {seconds:.1f} s")
    print(f"{calls:,} collectives of {nbytes / 1e9:.2f} GB, parameters {params:.2f} GB, moments {moments:.2f} GB")
    odd = differences(ran, planned)
    print("\n".join(odd) or "bytes at rest, the peaks, collectives and products are as planned")
    if odd:
        raise SystemExit(1)


if __name__ == "__main__":
    config.run(main, Options, doc=__doc__ or "")
