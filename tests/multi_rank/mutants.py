"""Deliberate mistakes, one at a time: in an exchange that was derived, in a row of a table.

A run with a mistake takes one step and is compared with one process. Exchanges that are wrong must be seen: numbers
differ or something raises. A row that says something else must raise or compute the same: no table is silently wrong.
"""

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

import models
from sharding_rules import P, Rules
from sharding_rules.exchange import Step
from sharding_rules.mesh import make
from sharding_rules.rules import axes_of, repeat, zero
from sharding_rules.sharder import Sharder
from tests.multi_rank.parity import CPU, FULL, MESHES, MOE, RULES, Case, own_rows, start

CASE = Case(MOE | FULL | {"num_hidden_layers": 2}, uneven=True)
Site = tuple[str, int, int]
"""An operand's or a parameter's name, 0 for its own steps or 1 for its gradient's, and which of them."""


def one_step(shard) -> dict[str, torch.Tensor]:
    """Return the metrics and the gradients of a step, whole."""
    _, step, state = start(CASE, shard)
    state, metrics = step(state, shard.put_batch(own_rows(CASE, shard)))
    grads = {f"grads/{path}": shard.full(m["grad"]).clone() for path, m in state.moments.items()}
    return {k: v.clone() for k, v in metrics.items()} | grads


def verdict(make_shard: Callable[[], Any], expected: dict[str, torch.Tensor]) -> str:
    """Return "same", "differs" or the error of a step; ranks agree on it."""
    try:
        got = one_step(make_shard())
        off = [(got[k] - v).abs().max() / v.abs().max().clamp_min(1e-30) for k, v in expected.items()]
        said = "same" if all(x <= 1e-9 for x in off) else "differs"
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
    answers: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(answers, said)
    return next((answer for answer in answers if answer != "same"), "same")


def wrong(step: Step) -> tuple[Step, ...]:
    """Return what a mistake would do in the place of a step, with a result of the same shape."""
    if step.kind == "swap":  # this rank's part of its own tokens, for everybody
        return step._replace(kind="part"), step._replace(kind="gather", dim=step.to)
    twin = {"scatter": "part", "part": "scatter", "gather": "place", "place": "gather"}
    if step.kind in twin and step.group:
        return (step._replace(kind=twin[step.kind]),)
    if step.kind == "place":  # another rank's place
        return (step._replace(rank=(step.rank + 1) % step.ways),)
    if step.kind == "part":
        return (step._replace(rank=(step.rank + 1) % step.ways),)
    if step.kind in ("copy", "fold"):
        return step, step._replace(kind="scale")
    return ()  # a sum or a share forgotten


def exchanges(mesh: str, expected: dict[str, torch.Tensor]) -> dict[str, str]:
    """Make each step of each exchange wrong and return what became of it."""
    sizes = make(MESHES[mesh], CPU, torch.distributed.get_world_size())
    build = lambda: Sharder.of(RULES["qwen3_moe"], sizes, models.from_config(CASE.config).specs)  # noqa: E731
    plain = {"_repeated": Sharder._repeated, "_gather": Sharder._gather}
    sites: dict[Site, Step] = {}

    def watching(change: Callable) -> Any:
        def repeated(self, shape, name, moves):
            return change(name, plain["_repeated"](self, shape, name, moves))

        def gather(self, path):
            return change(path + " at rest", plain["_gather"](self, path))

        return mock.patch.multiple(Sharder, _repeated=repeated, _gather=gather)

    def note(name, moves):
        sites.update({(name, i, j): step for i in (0, 1) for j, step in enumerate(moves[i])})
        return moves

    axes = {group: axes for axes, (group, *_) in build().groups.items()}
    with watching(note):
        said = {"nothing": verdict(build, expected)}
    for site, step in sites.items():

        def change(name, moves, site=site, step=step):
            both = [list(steps) for steps in moves]
            if name == site[0]:
                both[site[1]][site[2] : site[2] + 1] = wrong(step)
            return tuple(map(tuple, both))

        with watching(change):
            what = f"{step.kind} dim {step.dim} over {' '.join(axes.get(step.group, ('heads',)))}"
            said[f"{site[0]}{', its gradient' * site[1]}: {what}"] = verdict(build, expected)
    return said


def other_rows(axes: list[str]) -> Iterator[tuple[int, P]]:
    """Yield rows of the table that say something else about one dim: an axis less, or one more."""
    for i, (_, spec) in enumerate(RULES["qwen3_moe"].table):
        named = {axis for entry in spec for axis in axes_of(entry)}
        for dim, entry in enumerate(spec):
            kind = type(entry) if isinstance(entry, (zero, repeat)) else lambda *axes: axes or None
            changed = [kind(*[a for a in axes_of(entry) if a != axis]) for axis in axes_of(entry) if axis in axes]
            changed += [kind(*axes_of(entry), axis) for axis in axes if axis not in named]
            for other in changed:
                yield i, P(*spec[:dim], other or None, *spec[dim + 1 :])


def rows(mesh: str, expected: dict[str, torch.Tensor]) -> dict[str, str]:
    """Change each row of the table in every way of `other_rows` and return what became of it."""
    sizes = make(MESHES[mesh], CPU, torch.distributed.get_world_size())
    said = {}
    for i, spec in other_rows(list(sizes.mesh_dim_names or ())):
        pattern, was = RULES["qwen3_moe"].table[i]
        table = [*RULES["qwen3_moe"].table]
        table[i] = pattern, spec
        build = lambda table=table: Sharder.of(Rules(tuple(table)), sizes, models.from_config(CASE.config).specs)  # noqa: E731
        said[f"{pattern}: {spec} for {was}"] = verdict(build, expected)
    return said
