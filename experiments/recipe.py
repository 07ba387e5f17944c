"""What recipes share: where a run lives, its data, its weights to begin with, and what it hands back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import models
from experiments import auto, data, rules
from functional_trainer import backend, checkpoint, config, exact_match, losses, optimizers, precision, step, tree
from functional_trainer.data import Loader, Record, Tokenizer
from functional_trainer.loop import agree, claim
from functional_trainer.state import TrainState, ema
from functional_trainer.types import OneDevice
from sharding_rules import mesh


@dataclass(frozen=True)
class Run:
    """A run that has claimed its folder and read its data; `o` has the fields of `RunOptions` and its sections."""

    o: Any
    device: torch.device
    world: int
    shard: Any
    resume: Path | None
    tokenizer: Tokenizer
    hf: dict[str, Any]
    model: Any
    loss: losses.Loss
    loader: Loader
    held_out: dict[str, Loader]
    questions: Sequence[Any]
    """Held-out rows that ask something, for answers: records, or in reinforcement learning prompts."""
    samples: int
    """How many of them are answered at every evaluation."""

    @cached_property
    def steps(self) -> int:
        """Optimizer steps in all; ValueError if the data ends before."""
        if not self.o.steps or self.loader.stream.end < float("inf"):
            most = self.loader.total_steps()
            if self.o.steps > most:
                raise ValueError(f"--steps {self.o.steps}: the epochs of all datasets are over after {most}")
        return self.o.steps or most

    def say(self, text: str) -> None:
        """Print on one rank."""
        if self.shard.rank == 0:
            print(text)

    def begin(self, again: bool = False) -> tuple[Any, tree.Tree]:
        """Return the model and its weights: read or drawn; a new run, any with `again`, has --init-from's instead."""
        o, compute = self.o, getattr(torch, self.o.dtype)
        at = {"dtype": torch.promote_types(compute, torch.float32), "device": self.device, "shard": self.shard}
        if o.model.path:
            model, params = models.from_pretrained(o.model.path, **at)
        else:
            model, params = self.model, self.model.init(o.seed, **at)
        if o.init_from and (again or not self.resume):  # it may be gone by then
            source = checkpoint.find(o.init_from, "--init-from")
            checkpoint.load(source, tree.flatten({"params": params}), "params/")
        return replace(model, dtype=compute), params

    def answer(self, model: Any, params: tree.Tree, questions: Sequence[Record]) -> list[exact_match.Answer]:
        """Answer questions greedily, on one rank, with weights that all ranks gather."""
        whole = tree.map(self.shard.full, params) if questions else None
        if self.shard.rank != 0 or not questions:
            return []
        return exact_match.answer(model, whole, self.tokenizer, questions, self.o.data.answer_tokens)

    def hand_back(self, model: Any, state: TrainState) -> None:
        """Write hf/ (and hf-ema/) in the format that the model came in."""
        averaged = {"hf-ema": ema(state)} if self.o.optim.ema else {}
        for name, params in {"hf": state.params, **averaged}.items():
            models.save_pretrained(model, params, f"{self.o.out}/{name}", self.shard)
            if self.shard.rank == 0:
                self.tokenizer.save(f"{self.o.out}/{name}")


def start(o: Any, answers: int, objective: Callable[[dict[str, Any]], losses.Loss], read: Callable = data.load) -> Run:
    """Join the other processes, claim the folder, refuse what cannot be, read the data and `answers` questions."""
    device = backend.setup(o.device)
    if o.compile != "off":
        backend.probe_compiler(device)
    rank, world = backend.join(device, o.timeout, o.out)
    agree({flag: value for flag, value in config.flags(o).items() if flag not in ("--device", "--data.cache")})
    resume = claim(o, main=rank == 0)
    given = models.read_config(o.model.path) if o.model.path else {}
    tokenizer = Tokenizer(o.data.tokenizer or o.model.path or Path(__file__).with_name("first_light") / "tokenizer")
    hf = given or models.preset(o.model.preset, tokenizer)
    model = models.from_config(hf)
    grid = mesh.make(mesh.Mesh(**auto.sizes(o, model, device, rank, world)), device, world)
    axes = dict(zip(grid.mesh_dim_names or (), grid.shape, strict=True)) if grid else {}
    table = rules.chosen(o.rules, model, axes)
    fp8 = precision.fp8(o.fp8, model) if o.precision == "fp8" else {}
    shard: Any = OneDevice(fp8)
    if grid:
        from sharding_rules.sharder import Sharder  # with DTensors, whose import takes a second

        shard = Sharder.of(table, grid, model.specs, o.mesh.dispatch, fp8)
    loss, passes = objective(hf), o.micro_batches(shard.data[1])
    step.refuse(loss, optimizers.from_options(o.optim, 1000, model.specs), shard, passes, o.compile, o.remat, o.offload)
    samples = (0 if grid else 4) if o.samples is None else o.samples
    say = print if rank == 0 else lambda text: None
    loader, others, questions = read(o, tokenizer, model.config.vocab, shard, max(answers, samples), say)
    agree(_facts(hf, table.table, {"training data": loader, **others}))
    for flag, asked in (("--answers", o.answers), ("--samples", o.samples)):
        if asked and not questions:
            raise ValueError(f"{flag} {asked}: no held-out conversation to answer (--data.eval, --data.split)")
    return Run(o, device, world, shard, resume, tokenizer, hf, model, loss, loader, others, questions, samples)


def _facts(hf: dict[str, Any], table: Any, loaders: dict[str, Loader]) -> dict[str, Any]:
    """Return what ranks must have alike besides options: the model's config, the rules, what is in the data."""
    found = {f"config.json {key}": value for key, value in hf.items()} | {f"rule {k}": str(v) for k, v in table}
    return found | {f"{name}: {k}": v for name, loader in loaders.items() for k, v in loader.identity.items()}
