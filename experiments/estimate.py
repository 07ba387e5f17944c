"""What `experiments/plan.py` prints: the costs of a step on a mesh, and the roofline of a device."""

import math
from dataclasses import replace
from typing import Any

import torch

from experiments.plan import Options, eight, pieces
from functional_trainer import backend, flops
from sharding_rules import roofline


def estimate(o: Options, model: Any = None) -> Any:
    """Return the `roofline.Estimate` of a step (of a model other than --model's, if given)."""
    from sharding_rules import plan  # with DTensors, whose import takes a second

    model, _, rules, sizes = pieces(o, model)
    peaks, fp8 = backend.PEAKS[o.gpu], eight(o, model)
    if o.rows % o.micro_batches:
        raise ValueError(f"--rows {o.rows} cannot be split into --micro-batches {o.micro_batches}")

    def costs(passes: int) -> dict:
        build = pieces(replace(o, micro_batches=passes), model)[1]
        rows = o.rows // o.micro_batches * passes
        return plan.plan(model, build, rules, sizes, rows, o.seq_len, o.document, o.dispatch, True, fp8, o.offload)

    few = min(o.micro_batches, 2)  # costs are linear in the passes after the second
    total = base = costs(few)
    if o.micro_batches > 2:
        total = plan.onward(base, base, costs(3), o.micro_batches - 2)
    rows = o.rows * math.prod(sizes.get(axis, 1) for axis in ("dp", "fsdp", "ep"))
    documents = torch.full((rows * (o.seq_len // (o.document or o.seq_len)),), o.document or o.seq_len)
    need = flops.train_flops(model.specs, documents, getattr(model.config, "top_k", 0), model.config.windows)
    peak = peaks[model.dtype], peaks.get(backend.E4M3, math.nan)
    return roofline.Estimate(total, sizes, roofline.DEVICES[o.gpu], peak[0], rows * o.seq_len, need, peak[1])
