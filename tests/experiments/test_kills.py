"""Killed with SIGKILL at any instant and resumed, a run ends as one that nothing disturbed: weights, moments, the place
in the data, every row of metrics.jsonl, the best checkpoint and hf/, bit for bit.

    make test-kills    52 kills of one process and 52 of two (fsdp2, gloo): 21 minutes on 2 cores; prints what each hit
                       and 26 of reinforcement learning, synchronous and one-step-off

The run accumulates over micro-batches, mixes two weighed sources, has loader processes and writes its checkpoints while
it goes on. Some two fifths of the
instants are uniform in the wall time of a whole run. The others are uniform in one phase of it, so that every phase
is hit: there the run kills itself a random while after it has entered a function of that phase for the n-th time. The
functions themselves are the real ones. A case's name is its seed: `pytest -m slow -k "uniform and fsdp2-17"` repeats
it, as nearly as time can be repeated.
"""

import importlib
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.experiments import sft_runs
from tests.experiments.sft_runs import learned, run_ranks, same_checkpoint, same_state, start_ranks

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

FLAGS: tuple[Any, ...] = (
    *("--model.path", "moe", "--compile", "off", "--optim.lr", 1e-2, "--steps", 6, "--batch", 4, "--micro-batch", 1),
    *("--data.train", "a.jsonl", "b.jsonl", "--data.weights", 2, 0.5, "--data.eval", "eval.jsonl"),
    *("--data.seq-len", 64, "--eval-every", 2, "--save-every", 1, "--keep", 2, "--keep-best"),
)
RL_FLAGS: tuple[Any, ...] = (
    *("--model.path", "moe", "--compile", "off", "--optim.lr", 1e-2, "--steps", 6, "--batch", 4, "--micro-batch", 2),
    *("--data.seq-len", 128, "--eval-every", 2, "--save-every", 1, "--keep", 2, "--answers", 2),
    *(
        "--saving",
        "async",
        "--rollout.num-generations",
        4,
        "--rollout.max-completion-length",
        6,
        "--rollout.steps-per-generation",
        2,
    ),
    *("--reward.functions", "length:4"),
)
QUESTIONS = ("--data.train", "a.jsonl", "--data.eval", "eval.jsonl", "--data.answer-tokens", 5)
LAYOUTS: dict[str, tuple[int, tuple[Any, ...]]] = {  # processes, and their flags
    "one": (1, ("--saving", "async", "--data.workers", 2)),
    "fsdp2": (2, ("--saving", "async", "--mesh.fsdp", 2, "--data.workers", 1)),
    "without workers": (1, ()),
    "grpo": (1, QUESTIONS),
    "grpo ahead": (1, (*QUESTIONS, "--rollout.max-async-level", 1, "--rollout.partial", 4)),
    "episodes ahead": (1, ("--rollout.environment", "guess", "--rollout.max-async-level", 1)),
}
SFT, RL = ("one", "fsdp2"), ("grpo", "grpo ahead", "episodes ahead")
PHASES = {
    "tokenize": ("functional_trainer.data.cache:_write",),
    "read": ("functional_trainer.data.loader:Loader.__next__", "functional_trainer.experience:Experience.__next__"),
    "rollout": ("functional_trainer.engines.local:LocalEngine.generate",),
    "reward": ("functional_trainer.rewards:Rewards.__call__",),
    "step": ("functional_trainer.step:gradient", "functional_trainer.step:apply_gradient"),
    "evaluate": ("functional_trainer.loop:evaluate",),
    "log": ("functional_trainer.metrics:Metrics.log",),
    "write": ("functional_trainer.dcp:_Writer.write_data",),
    "publish": ("functional_trainer.checkpoint:_publish",),
    "prune": ("functional_trainer.checkpoint:_prune",),
    "export": ("functional_trainer.hf:_write", "functional_trainer.hf:_publish"),
    "tokenizer": ("functional_trainer.data.chat:Tokenizer.save",),
    "sync": ("os:fsync",),
    "rename": ("pathlib:Path.rename",),
    "replace": ("pathlib:Path.replace", "os:replace"),
    "delete": ("os:unlink", "os:rmdir"),
}
BETWEEN = ("sync", "rename", "replace", "delete")
"""What all of these do to files: runs are killed before each of several calls in a row."""
EACH = dict.fromkeys(BETWEEN, 5)
OF_RL = ("read", "rollout", "reward", "step", "log", "write", "publish", "prune")
"""Phases in which reinforcement learning is killed; the others are those of any recipe."""
EVERY_RANK = {"read", "step", "evaluate", "write"}
"""Phases that each rank goes through; the others are one rank's."""


def command(out: Path, layout: str) -> tuple[Any, ...]:
    """Return the flags of a run; its token cache is its own, so that it is written anew."""
    if layout in RL:
        return (*RL_FLAGS, *LAYOUTS[layout][1], "--out", out.name)
    return (*FLAGS, *LAYOUTS[layout][1], "--data.cache", f"{out.name}/cache", "--out", out.name)


def recipe(layout: str) -> str:
    return "qwen3_moe_grpo" if layout in RL else sft_runs.RECIPE.stem


@dataclass(frozen=True)
class Watch:
    """Called in a run before it starts: note in `file` when phases begin and end, and kill the run in one of them."""

    file: Path
    phase: str = ""
    nth: int = 0
    """Which call of the phase's functions, from 1; 0 never kills."""
    delay: float = 0.0
    """Seconds after that call's beginning; 0 is before it does anything."""

    def __call__(self) -> None:
        sys.setswitchinterval(1e-4)  # so that the killing thread gets its turn
        self.file.unlink(missing_ok=True)
        log, calls = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), dict.fromkeys(PHASES, 0)

        def noted(phase: str, function: Callable) -> Callable:
            def wrapper(*args, **options):
                calls[phase] += 1
                os.write(log, f"{time.monotonic()} + {phase}\n".encode())
                if (phase, calls[phase]) == (self.phase, self.nth):
                    kill = threading.Timer(self.delay, os.kill, (os.getpid(), signal.SIGKILL))
                    kill.start() if self.delay else kill.function(*kill.args)
                try:
                    return function(*args, **options)
                finally:
                    os.write(log, f"{time.monotonic()} - {phase}\n".encode())

            return wrapper

        for phase, places in PHASES.items():
            for place in places:
                module, _, path = place.partition(":")
                owner: Any = importlib.import_module(module)
                *outer, name = path.split(".")
                for part in outer:
                    owner = getattr(owner, part)
                setattr(owner, name, noted(phase, getattr(owner, name)))


def spans(file: Path) -> list[tuple[str, float]]:
    """Read what a `Watch` noted: each call's phase and seconds, -1 for those that did not end, the innermost last.

    Calls of several threads may overlap.
    """
    ended: list[tuple[str, float]] = []
    running: list[tuple[str, float]] = []
    for line in file.read_text().splitlines() if file.exists() else ():
        at, sign, phase = line.split()
        if sign == "+":
            running.append((phase, float(at)))
        else:
            last = max(i for i, (name, _) in enumerate(running) if name == phase)
            ended.append((phase, float(at) - running.pop(last)[1]))
    return ended + [(phase, -1.0) for phase, _ in running]


def hit(file: Path) -> set[str]:
    """Name the phases that a killed run was in, the whole stack of them."""
    return {phase for phase, seconds in spans(file) if seconds < 0}


@dataclass
class Whole:
    """A run that nothing disturbed."""

    out: Path
    seconds: float
    calls: list[list[tuple[str, float]]]
    """The spans of each rank."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("kills")
    sft_runs.folder(place / "moe")
    for seed, (name, count) in enumerate({"a": 40, "b": 20, "eval": 6}.items()):
        sft_runs.chats(place / f"{name}.jsonl", count, seed)
    return place


@pytest.fixture(scope="module")
def wholes(place) -> Callable[[str], Whole]:
    """Give the whole run of a layout, made once."""
    found: dict[str, Whole] = {}

    def at(layout: str) -> Whole:
        if not found:  # the process that others fork from is slow at first
            run_ranks(place, 1, *command(place / "first", "one"))
        if layout not in found:
            out = place / f"whole-{layout}"
            watches = [Watch(place / f"{out.name}-{rank}.phases") for rank in range(LAYOUTS[layout][0])]
            begun = time.monotonic()
            run_ranks(place, len(watches), *command(out, layout), setups=watches, recipe=recipe(layout))
            found[layout] = Whole(out, time.monotonic() - begun, [spans(watch.file) for watch in watches])
        return found[layout]

    return at


def killed(
    place: Path, layout: str, watches: list[Watch], out: Path, rng: random.Random, after: float | None
) -> bool:  # fmt: skip
    """Start a run and kill it; return whether it was killed, not over before.

    The first victim is chosen by `after` seconds, or by the watches. Then torchrun's way: SIGTERM for the others, and
    SIGKILL some time later; or, one time in two, SIGKILL at once.
    """
    ranks = start_ranks(place, len(watches), *command(out, layout), setups=watches, recipe=recipe(layout))
    processes = [rank.process for rank in ranks]
    end = time.monotonic() + (60 if after is None else after)
    while time.monotonic() < end and all(process.exitcode is None for process in processes):
        time.sleep(0.001)
    gentle, patience = rng.random() < 0.5, rng.uniform(0, 0.3)
    if after is not None:
        rng.choice(processes).kill()
    if gentle and any(process.exitcode is None for process in processes):
        for process in processes:
            process.terminate()
        time.sleep(patience)
    for process in processes:
        process.kill()
        process.join()
    assert after is not None or time.monotonic() < end, ranks[0].output
    return -signal.SIGKILL in [process.exitcode for process in processes]


def sound(out: Path, whole: Path) -> None:
    """Assert that what a killed run has left under its final names is whole."""
    for folder in out.glob("checkpoints/*"):
        if folder.suffix != ".tmp":
            assert sft_runs.tensors(folder).keys() == sft_runs.tensors(whole / "checkpoints" / "step-6").keys()
    if (out / "hf" / "config.json").exists():
        written = (out / "hf" / "model.safetensors").read_bytes()
        assert written == (whole / "hf" / "model.safetensors").read_bytes()


def files(out: Path) -> set[str]:
    """List a run folder, but for the names that TensorBoard makes up."""
    found = {str(path.relative_to(out)) for path in out.rglob("*")}
    return {path for path in found if not path.startswith("tensorboard/")}


def same_run(out: Path, whole: Path) -> None:
    """Assert that two runs ended equal, bit for bit, and that nothing else is in their folders.

    But for step-4: if the kill came before the last save had cleared it away, no later save does.
    """
    assert {path for path in files(out) if not path.startswith("checkpoints/step-4")} == files(whole)
    assert learned(out) == learned(whole)
    same_state(out, whole)
    if (whole / "checkpoints" / "best").exists():
        same_checkpoint(out / "checkpoints" / "best", whole / "checkpoints" / "best")
    for file in (whole / "hf").iterdir():
        assert (out / "hf" / file.name).read_bytes() == file.read_bytes(), file.name
    config = (out / "config.yaml").read_text().replace(out.name, whole.name)
    assert config == (whole / "config.yaml").read_text()


def resumed(place: Path, layout: str, out: Path, whole: Path, what: str) -> None:
    """Resume a killed run and compare it with the whole one."""
    sound(out, whole)
    printed = run_ranks(place, LAYOUTS[layout][0], *command(out, layout), recipe=recipe(layout))
    went_on = next((line for line in printed.splitlines() if "resumed from" in line), "began anew")
    print(f"{what}; {went_on}")
    same_run(out, whole)
    shutil.rmtree(out)


@pytest.mark.parametrize(
    ("layout", "seed"), [(x, seed) for x in SFT for seed in range(22)] + [(x, seed) for x in RL for seed in range(5)]
)
def test_uniform_in_the_run(place, wholes, layout, seed):
    whole, rng, out = wholes(layout), random.Random(seed), place / f"uniform-{layout}-{seed}"
    watches = [Watch(place / f"{out.name}-{rank}.phases") for rank in range(LAYOUTS[layout][0])]
    after = rng.uniform(0, whole.seconds)
    while not killed(place, layout, watches, out, rng, after):
        shutil.rmtree(out)  # it was faster than the whole one
        after = rng.uniform(0, whole.seconds)
    where = [", ".join(sorted(hit(watch.file))) or "between phases" for watch in watches]
    resumed(place, layout, out, whole.out, f"seed {seed}, killed {after:.3f} s after the start: {' | '.join(where)}")


@pytest.mark.parametrize(
    ("layout", "phase", "seed"),
    [
        *(
            (x, p, seed)
            for x in SFT
            for p in PHASES
            if p not in ("rollout", "reward")
            for seed in range(EACH.get(p, 1))
        ),
        *((x, p, 0) for x in RL for p in OF_RL),
    ],
)
def test_in_every_phase(place, wholes, layout, phase, seed):
    whole, out, world = wholes(layout), place / f"in-{phase}-{layout}-{seed}", LAYOUTS[layout][0]
    rng, first = random.Random(f"{phase}-{seed}"), random.Random(phase).random()
    victims = [rng.randrange(world)] if phase in EVERY_RANK else list(range(world))
    lengths = [seconds for rank in victims for name, seconds in whole.calls[rank] if name == phase]
    for shorter in range(12):
        nth, typical = rng.randint(1, len(lengths)), sorted(lengths)[len(lengths) // 2]
        if phase in BETWEEN and not shorter:
            nth = 1 + seed + int(first * max(1, len(lengths) // world - 5))
        delay = rng.uniform(0, typical) / 2**shorter if typical > 2e-3 else 0.0  # a thread needs time to start
        notes = [place / f"{out.name}-{rank}.phases" for rank in range(world)]
        watches = [Watch(note, phase, nth, delay) if r in victims else Watch(note) for r, note in enumerate(notes)]
        if killed(place, layout, watches, out, rng, None) and any(phase in hit(notes[rank]) for rank in victims):
            break
        shutil.rmtree(out)  # the call was over before its end
    else:
        pytest.fail(f"seed {seed}: 12 kills, none in {phase}")
    what = f"seed {seed}, killed in call {nth} of {len(lengths)} of {phase}, {delay * 1e3:.2f} ms into it"
    resumed(place, layout, out, whole.out, what)


def test_workers_change_nothing(wholes):
    plain, workers = wholes("without workers").out, wholes("one").out
    assert learned(workers) == learned(plain)
    same_state(workers, plain)
