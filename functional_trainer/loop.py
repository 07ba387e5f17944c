"""The loop around the step: batches, evaluation, metrics, checkpoints, resuming, stopping."""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from functional_trainer import backend, checkpoint, config, flops, tree
from functional_trainer.data.loader import Loader
from functional_trainer.errors import brief
from functional_trainer.losses import Loss
from functional_trainer.metrics import Metrics, log_in
from functional_trainer.profile import profiled
from functional_trainer.state import TrainState, kinds, trained, weight_norms
from functional_trainer.step import evaluate
from functional_trainer.types import ONE_DEVICE, Batch
from functional_trainer.watchdog import watched

MAY_DIFFER = {"out", "resume", "keep", "keep_best", "save_every", "saving", "eval_every", "device", "max_skipped"}
MAY_DIFFER |= {"answers", "samples", "mesh", "micro_batch", "compile", "remat", "offload", "profile", "wandb"}
MAY_DIFFER |= {"timeout", "rules", "data.workers", "data.cache", "rollout.slots", "rollout.compile"}
MAY_DIFFER |= {"rollout.log_completions", "rollout.log_every", "rollout.url", "rollout.sync", "rollout.timeout"}
MAY_DIFFER |= {"rollout.ray", "rollout.environment_ray", "reward.ray", "reward.workers", "reference", "rollout.wait"}
"""Options that do not change what a run computes, but for rounding: they may differ when it is resumed."""


def claim(options: Any, *, main: bool = True) -> Path | None:
    """Make the run folder, write its config.yaml and return the checkpoint to resume from, if any.

    ValueError if the folder holds another run, if `resume` names no checkpoint, `init_from` has no effect beside it, or
    Weights & Biases is asked for and lets nobody in.
    """
    folder, source = Path(options.out), None
    if options.resume not in ("auto", "never"):
        source = checkpoint.find(options.resume, "--resume")
    if (folder / "metrics.jsonl").exists():
        if options.resume == "never" or source and not source.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{folder} already holds a run; choose another --out, or --resume auto to continue it")
        odd = _differences(config.load(type(options), folder / "config.yaml"), options)
        if odd:
            raise ValueError(
                f"{folder} holds another run ({'; '.join(odd)}); choose another --out, or the same options"
            )
        source = source or checkpoint.latest(folder)
    elif source and options.init_from:
        raise ValueError(
            f"--init-from {options.init_from} has no effect: --resume {options.resume} brings its own weights; leave it"
            f" away, or say --init-from None where --config has it"
        )
    if main:
        if options.wandb:
            log_in(options.wandb)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            config.dump(options, folder / "config.yaml")
            checkpoint.clean(folder)
        except OSError as error:
            raise ValueError(f"--out {folder} cannot be written: {error.strerror}; choose another folder") from None
    return source


def agree(facts: Mapping[str, Any]) -> None:
    """Compare what all ranks must have alike, by name; ValueError, the same on each, says which has what instead."""
    given = backend.everyone(dict(facts))
    odd = []
    for name in dict.fromkeys(name for theirs in given for name in theirs):
        found: dict[str, list[str]] = {}
        for rank, theirs in enumerate(given):
            found.setdefault(brief(theirs.get(name, "absent"), 80), []).append(str(rank))
        if len(found) > 1:
            held = (f"{value} on rank {brief(', '.join(ranks), 60)}" for value, ranks in found.items())
            odd.append(f"\n  {name} is {', '.join(held)}")
    if odd:
        raise ValueError(f"ranks differ in {len(odd)} of what must be the same on all of a run:{''.join(odd[:20])}")


def _differences(old: Any, new: Any) -> list[str]:
    was, now = config.flags(old), config.flags(new)
    names = {flag: flag.removeprefix("--").replace("-", "_") for flag in now}
    return [
        f"{flag} was {_words(was[flag])}, is {_words(now[flag])}"
        for flag, name in names.items()
        if was[flag] != now[flag] and not {name.split(".")[0], name} & MAY_DIFFER
    ]


def _words(value: Any) -> str:
    """Write an option's value as on the command line."""
    return " ".join(map(str, value)) or "empty" if isinstance(value, tuple) else str(value)


def eval_losses(
    model: Any, loss: Loss, params: tree.Tree, loaders: Mapping[str, Loader], buffers: tree.Tree, shard, device
) -> tuple[float, dict[str, float]]:
    """Return the mean of the loss's first term over counted loaders, all together and each by its name.

    Uncompiled and without gradients.
    """
    found: dict[str, tuple[float, float]] = {}
    for name, loader in loaders.items():
        total: torch.Tensor | float = 0.0
        weight: torch.Tensor | float = 0.0
        loader.reset()
        for batch in loader:
            placed = shard.put_batch({k: v.to(device) for k, v in batch.items()})
            with torch.no_grad():
                sums, _ = evaluate(model, loss, params, placed, buffers, shard)
            term = next(iter(sums))
            total, weight = total + sums[term].double(), weight + shard.replicate(loss.weights(placed)[term])
        found[name] = float(total), float(weight)
    totals, weights = zip(*found.values(), strict=True)
    return sum(totals) / sum(weights), {name: total / weight for name, (total, weight) in found.items()}


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C or SIGTERM has come; a second one stops at once."""
    asked: list[int] = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    old = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def train(
    step: Callable[[TrainState, Batch], tuple[TrainState, dict]], state: TrainState, loader: Loader, *, model: Any,
    loss: Loss, options: Any, total_steps: int, resume: Path | None = None,
    held_out: Mapping[str, Loader] | None = None,
    sample: Callable[[tree.Tree], Sequence[Mapping[str, str]]] | None = None,
    measure: Callable[[tree.Tree], Mapping[str, Any]] | None = None, before: Mapping[str, Any] | None = None,
    shard=ONE_DEVICE, device: torch.device,
) -> tuple[TrainState, bool]:  # fmt: skip
    """Run `step` until `total_steps`; return the state and whether it got there.

    `options` are `RunOptions`; metrics and checkpoints go to its `out`. At every evaluation come the loss of each of
    the `held_out` loaders, what `measure(params)` returns, and what `sample(params)` returns to be shown; `before` is
    what was measured before the first step, in whose row it is. Ctrl-C finishes the step, saves and returns.
    """
    start, stopped = _restored(resume, state, loader, total_steps), False
    best = _best_so_far(options, held_out or measure)

    def due(done: int, every: int) -> bool:
        return done == total_steps or bool(every) and done % every == 0

    rows = Metrics(
        options.out, total_steps=total_steps, start_step=start, main=shard.rank == 0, wandb=options.wandb,
        config=asdict(options),
    )  # fmt: skip
    with (
        closing(loader), rows as metrics, stoppable() as asked, profiled(rows, options.profile, device) as tick,
        _saving(options.saving, device) as writes, watched(options.timeout / 2, options.out, shard.rank) as alive,
    ):  # fmt: skip
        if resume is not None:
            metrics.print(f"resumed from {resume} at step {start} of {total_steps}; {total_steps - start} are left")
        names, clock = list(kinds(trained(state))), time.perf_counter()
        for done in range(start + 1, total_steps + 1):
            alive()
            row, clock, stopped = _one(step, state, loader, model, asked, options, shard, device, names, clock)
            evaluated = due(done, options.eval_every)
            if evaluated:
                row |= _evaluated(model, loss, state, held_out, measure, shard, device)
            metrics.log(done, row | ({"before": before} if before and done == 1 else {}))
            if evaluated and sample:
                metrics.samples(done, sample(state.params))
            _check_finite(done, row["skipped"], options, metrics)
            save = stopped or due(done, options.save_every)
            best = _save(writes, options, done, state, loader, _held_out_loss(row), best, save)
            if save and not (stopped or done == total_steps):  # then the run is drawn as it closes
                metrics.draw(age=60)
            tick()
            if stopped:
                metrics.print(f"stopped after step {done} of {total_steps}; the same command continues from there")
                break
    return state, not stopped


def _restored(resume: Path | None, state: TrainState, loader: Loader, total_steps: int) -> int:
    """Take over the state and the place in the data of a checkpoint; return the step it is at."""
    if resume is not None:
        _, extra = checkpoint.load(resume, tree.flatten(state))
        loader.restore(extra.get("loader"))
    start = int(state.step)
    if start > total_steps:
        raise ValueError(f"{resume} is at step {start}, the run would end at {total_steps}: raise --steps or --epochs")
    return start


def _one(
    step: Callable, state: TrainState, loader: Loader, model: Any, asked: Callable[[], bool], options: Any, shard,
    device: torch.device, names: list[str], clock: float,
) -> tuple[dict[str, Any], float, bool]:  # fmt: skip
    """Take one step; return its row of metrics, the time it ended, and whether some rank was asked to stop.

    `names` are the kinds of trained parameters; `clock` is when the step before ended: what lies between is "other".
    """
    begun, batch = time.perf_counter(), next(loader)
    placed = shard.put_batch({k: v.to(device, non_blocking=True) for k, v in batch.items()})
    sums = _counts(model, batch, asked(), shard, device)
    fed = time.perf_counter()
    state, values = step(state, placed)
    row = {k: v.tolist() for k, v in values.items()}  # waits for the device
    if "grad_norms" in row:
        row["grad_norms"] = dict(zip(names, row["grad_norms"], strict=True))
    tokens, trained_tokens, cost, stop = sums.tolist()
    now = time.perf_counter()
    seconds, peak = now - clock, backend.peak_flops(device, getattr(torch, options.dtype), shard.world)
    row |= {"tokens": int(tokens), "trained_tokens": int(trained_tokens), "tokens_per_s": tokens / seconds}
    row |= {"padding": 1 - tokens / (batch["tokens"].numel() * shard.data[1]), "mfu": flops.mfu(cost, seconds, peak)}
    row |= {"memory_bytes": backend.peak_memory(device)} | loader.report()
    row |= {"time": {"data": fed - begun, "step": now - fed, "other": begun - clock}}
    return row, now, stop > 0


def _evaluated(
    model: Any, loss: Loss, state: TrainState, held_out: Mapping[str, Loader] | None,
    measure: Callable[[tree.Tree], Mapping[str, Any]] | None, shard, device,
) -> dict[str, Any]:  # fmt: skip
    """Return the entries of an evaluation: weight norms, held-out losses if anything is held out, what is measured."""
    row: dict[str, Any] = {"weight_norms": weight_norms(state.params, shard)}
    if held_out:
        row["eval_loss"], by_source = eval_losses(model, loss, state.params, held_out, state.buffers, shard, device)
        row |= {"eval_losses": by_source} if len(by_source) > 1 else {}
    return row | dict(measure(state.params)) if measure else row


def _best_so_far(options: Any, held_out: Any) -> float:
    """Return the held-out loss that a checkpoint has to fall below to be kept as the best."""
    if not options.keep_best:
        return -math.inf
    if not held_out:
        raise ValueError("--keep-best needs held-out rows: give --data.eval or --data.split")
    return checkpoint.best_loss(options.out)


def _held_out_loss(row: Mapping[str, Any]) -> float:
    """Return what is least of the best checkpoint: the held-out loss, or the held-out reward with its sign turned."""
    return row["eval_loss"] if "eval_loss" in row else -row.get("eval_reward", math.nan)


def _saving(how: str, device: torch.device) -> Any:
    """Return a context of what calls writers of checkpoints: behind the run's back, or at once."""
    behind = how == "async" or how == "auto" and backend.has_own_memory(device)
    return checkpoint.Behind() if behind else nullcontext(checkpoint.at_once)


def _save(
    writes: Callable, options: Any, done: int, state: TrainState, loader: Loader, value: float, best: float, due: bool
) -> float:
    """Save the state as the best, if its held-out loss `value` is below it, and then if it is due; return the best."""
    if not (due or value < best):
        return best
    extra = {"loader": loader.state(), "step": done}

    def write(flat: Mapping[str, torch.Tensor], group: Any) -> None:
        if value < best:
            checkpoint.save_best(options.out, flat, extra | {"eval_loss": value}, group=group)
        if due:
            checkpoint.save(options.out, done, flat, extra, options.keep, group=group)

    writes(write, tree.flatten(state))
    return value if value < best else best


def _counts(model: Any, batch: Batch, stop: bool, shard, device) -> torch.Tensor:
    """Sum over ranks: tokens, trained tokens, FLOPs of the step, and whether to stop."""
    lengths = flops.lengths(batch["segment_ids"])
    top_k, before = getattr(model.config, "top_k", 0), flops.continued(batch)
    cost = flops.train_flops(model.specs, lengths, top_k, model.config.windows, before=before)
    row = [float(lengths.sum()), float((batch["weights"] != 0).sum()), cost, float(stop)]
    return shard.total(torch.tensor(row, dtype=torch.float64, device=device))


def _check_finite(done: int, skipped: int, options: Any, metrics: Metrics) -> None:
    """Say that a step was skipped; RuntimeError when too many were."""
    if skipped > 0:
        metrics.print(f"step {done}: the gradient is not finite, nothing was changed ({skipped} in a row)")
    if skipped >= options.max_skipped:
        last = checkpoint.latest(options.out)
        raise RuntimeError(
            f"the gradients of {skipped} steps in a row, up to {done}, are not finite; the run stops. Lower --optim.lr "
            f"or look at the data there; {f'the last checkpoint is {last}' if last else 'there is no checkpoint yet'}"
        )
