"""What `--mesh auto` picks: every sensible way to arrange the devices is planned, the fastest that fits is taken."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import torch

from experiments import plan
from experiments.estimate import estimate
from functional_trainer import backend
from sharding_rules import roofline
from sharding_rules.mesh import parse

ALIKE = 1.02
"""Times that differ by less than this factor are taken as equal: the plan is no finer."""


class Arrangement(NamedTuple):
    """A way to arrange the devices, with what a step would take."""

    sizes: dict[str, int]
    held: int
    """Bytes that a device holds at most."""
    seconds: float
    """Of a step, if nothing is overlapped."""
    fits: bool

    @property
    def text(self) -> str:
        return ",".join(f"{axis}={n}" for axis, n in self.sizes.items() if n > 1)


def sizes(o: Any, model: Any, device: torch.device, rank: int, world: int) -> dict[str, int]:
    """Return the sizes of the axes of a mesh that a recipe's options ask for, found and said by rank 0 if by "auto"."""
    if not o.mesh.layout:
        return {axis: getattr(o.mesh, axis) for axis in ("dp", "fsdp", "ep", "cp", "tp")}
    if o.mesh.layout != "auto" or world == 1:
        return parse(o.mesh.layout) if o.mesh.layout != "auto" else {}
    name, node = backend.describe(device), int(os.environ.get("LOCAL_WORLD_SIZE", 8))
    known: Any = next((gpu for gpu in roofline.DEVICES if gpu in name), "H100")
    same = {k: getattr(o, k) for k in ("remat", "offload", "dtype", "precision", "fp8", "rules", "optim")}
    same |= {} if backend.E4M3 in backend.PEAKS[known] else {"precision": "dtype"}  # its operands are rounded only
    how = plan.Options(seq_len=o.data.seq_len, dispatch=o.mesh.dispatch, reduce=o.mesh.reduce, gpu=known, **same)
    like = roofline.DEVICES[known]._replace(memory=backend.memory(device), node=node)
    rows = o.packed_rows(world), o.micro_batch
    found, reason = backend.everyone(choose(how, model, world, like, *rows) if rank == 0 else None)[0]
    if not found:
        raise ValueError(reason)
    if rank == 0:
        print(reason if known in name else f"{reason}\n    (times are an H100's: {name} is not known)")
    return found


def divisors(n: int, most: int) -> list[int]:
    return [d for d in range(1, min(n, most) + 1) if n % d == 0]


def candidates(world: int, node: int, experts: int, rows: int) -> Iterator[list[dict[str, int]]]:
    """Yield ways to arrange `world` devices, `node` on each machine: first those that split no row, then ever more.

    Experts are spread over part of the data-parallel ranks; dp is one rank a machine, or none; `rows` of a batch are
    shared by all data-parallel ranks.
    """
    for parts in divisors(world, node):
        found = []
        for tp, dp in itertools.product(divisors(parts, node), {1, world // node}):
            others = dp * parts
            for ep in divisors(world // others, experts or 1) if world % others == 0 else []:
                sizes = {"dp": dp, "fsdp": world // others // ep, "ep": ep, "cp": parts // tp, "tp": tp}
                if rows % (world // parts) == 0 and experts % ep == 0:
                    found.append(sizes)
        yield found


def tried(o: plan.Options, model: Any, sizes: dict[str, int], device: roofline.Device, batch: int, micro: int):
    """Return the arrangement with what it takes; ValueError if the model or the passes do not divide so."""
    rows, text = batch // prod(sizes[a] for a in ("dp", "fsdp", "ep")), ",".join(f"{a}={n}" for a, n in sizes.items())
    if rows % (micro or 1):
        raise ValueError(f"{rows} rows are not passes of {micro}")
    o = replace(o, mesh=text, rows=rows, micro_batches=rows // (micro or rows))
    e = replace(estimate(o, model), device=device)
    return Arrangement(sizes, e.held, e.longest, e.fits)


def choose(
    o: plan.Options, model: Any, world: int, device: roofline.Device, batch: int, micro: int
) -> tuple[dict[str, int], str]:
    """Return sizes for `world` devices and the reason, no sizes if the batch and the model cannot be shared out; a step
    has `batch` rows, a pass of a device `micro` (0: all)."""
    found, wrong = list[Arrangement](), list[ValueError]()
    for some in candidates(world, min(device.node, world), getattr(model.config, "experts", 0), batch):
        for sizes in some:
            try:
                found.append(tried(o, model, sizes, device, batch, micro))
            except ValueError as error:  # the model does not divide so, or nothing would do
                wrong.append(error)
        if any(a.fits for a in found):
            break
    if not found:
        few = f"--mesh auto: no arrangement of {world} devices shares --batch {batch} and the model equally"
        few += f"; use a --batch that is a multiple of {world} and of --micro-batch, or say the sizes yourself"
        return {}, "\nthe first one: ".join([few, *map(str, wrong[:1])])
    able = [a for a in found if a.fits] or [min(found, key=lambda a: a.held)]
    best = min(a.seconds for a in able)
    taken = min((a for a in able if a.seconds <= best * ALIKE), key=lambda a: (a.text.count("="), a.seconds))
    return taken.sizes, _reason(taken, found, device)


def _reason(taken: Arrangement, found: list[Arrangement], device: roofline.Device) -> str:
    room = device.memory * (1 - roofline.SPARE) / 2**30
    fit = sorted((a for a in found if a.fits), key=lambda a: a.seconds)
    why = "is the fastest" if taken.fits else "needs the least; experiments/plan.py says what would fit"
    first = f"--mesh auto: {taken.text} {why}; of {len(found)} arrangements {len(fit)} fit into {room:.1f} GiB a device"
    shown = [taken, *(a for a in fit if a != taken)][:4]
    line = "    {:<28} {:8.2f} GiB, {:10.2f} ms a step by its roofline"
    return "\n".join([first, *(line.format(a.text, a.held / 2**30, a.seconds * 1e3) for a in shown)])
