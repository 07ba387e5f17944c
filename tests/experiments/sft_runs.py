"""Runs of recipes as a user's command, quickly: each in a process forked from one that has imported torch."""

import importlib
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import transformers

from experiments.first_light import tasks
from functional_trainer import checkpoint

RECIPE = Path(__file__).parents[2] / "experiments" / "qwen3_moe_sft.py"
TOKENIZER = RECIPE.parent / "first_light" / "tokenizer"
SIZES: dict[str, Any] = {
    "vocab_size": 360, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 256, "eos_token_id": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["tests.experiments.sft_runs", "experiments.qwen3_moe_sft", "experiments.rules", "functional_trainer.loop"]
    + ["functional_trainer.reference", "torch._dynamo", "torch.utils.tensorboard", "matplotlib.figure"]
    + ["matplotlib.backends.backend_agg"]
)


def folder(path: Path, family: str = "qwen3_moe", **changes: Any) -> Path:
    """Let transformers save a tiny random model and the shipped tokenizer into `path`."""
    sizes = SIZES | (EXPERTS if family == "qwen3_moe" else {}) | changes
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **sizes)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(path)
    return path


def chats(path: Path, count: int, seed: int = 0) -> Path:
    """Write `count` of the shipped tasks, some made longer, to a JSONL file."""
    records, _ = tasks.make(count, 0, seed)
    for record in records[::3]:
        record["messages"] = record["messages"] * 2
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@dataclass
class Run:
    """A command that was started: `wait` for it, or kill it."""

    process: Any
    log: Path

    def wait(self, seconds: float = 120) -> int:
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"still running after {seconds} s:\n{self.output}")
        return self.process.exitcode

    @property
    def output(self) -> str:
        return self.log.read_text()


def start(
    cwd: Path, *flags: Any, env: dict[str, str] | None = None, setup: Any = None, recipe: str = RECIPE.stem
) -> Run:
    """Start a recipe with `flags` in the folder `cwd`; `setup` is a picklable function called in it first."""
    number = len(list(cwd.glob("log-*")))
    log = cwd / f"log-{number}"
    log.touch()
    process = FORKS.Process(target=_child, args=(cwd, [str(f) for f in flags], log, env or {}, setup, recipe))
    process.start()
    return Run(process, log)


def run(cwd: Path, *flags: Any, status: int = 0, **options: Any) -> str:
    """Run the recipe to its end, check its exit status and return what it printed."""
    started = start(cwd, *flags, **options)
    code = started.wait()
    assert code == status, f"exit status {code}, not {status}:\n{started.output}"
    return started.output


def announced(world: int) -> dict[str, str]:
    """Return what torchrun would tell each of `world` processes of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(world)}


def start_ranks(cwd: Path, world: int, *flags: Any, setups: Sequence[Any] = (), recipe: str = RECIPE.stem) -> list[Run]:
    """Start a recipe in `world` processes, as torchrun would; `setups` are each one's `setup`."""
    shared = announced(world)
    envs = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    each = zip_longest(envs, setups)
    return [start(cwd, *flags, env=env, setup=setup, recipe=recipe) for env, setup in each]


def run_ranks(cwd: Path, world: int, *flags: Any, setups: Sequence[Any] = (), recipe: str = RECIPE.stem) -> str:
    """Run a recipe in `world` processes to its end; return what rank 0 printed."""
    ranks = start_ranks(cwd, world, *flags, setups=setups, recipe=recipe)
    codes = [rank.wait() for rank in ranks]
    assert not any(codes), "\n".join(rank.output for rank in ranks)
    return ranks[0].output


def rows(out: Path) -> list[dict]:
    """Read metrics.jsonl strictly."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (out / "metrics.jsonl").read_text().splitlines()]


def learned(out: Path) -> list[dict]:
    """Read metrics.jsonl without what differs between equal runs: times and memory."""
    vary = ("time", "timing_s", "generated_tokens_per_s", "rollout_s", "wait_s", "tokens_per_s", "memory_bytes")
    return [{k: v for k, v in row.items() if k not in vary} for row in rows(out)]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a checkpoint without the trainer's code: tensors by path."""
    reader = dcp.FileSystemReader(path)
    meta = reader.read_metadata().state_dict_metadata
    found = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in meta.items()}
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def state(out: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Read the newest checkpoint of a run: its tensors, and extra.json."""
    path = checkpoint.latest(out)
    assert path is not None, f"no checkpoint in {out}"
    return tensors(path), json.loads((path / "extra.json").read_text())


def same_state(a: Path, b: Path) -> None:
    """Assert that the newest checkpoints of two runs are equal, bit for bit, the place in the data included."""
    newest = checkpoint.latest(a), checkpoint.latest(b)
    assert newest[0] is not None and newest[1] is not None, f"no checkpoint in {a} or {b}"
    same_checkpoint(newest[0], newest[1])


def same_checkpoint(a: Path, b: Path) -> None:
    """Assert that two checkpoints are equal, bit for bit."""
    assert json.loads((a / "extra.json").read_text()) == json.loads((b / "extra.json").read_text())
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    bits, others = ({k: v.reshape(-1).view(torch.uint8) for k, v in side.items()} for side in (ours, theirs))
    assert not [k for k in bits if not torch.equal(bits[k], others[k])]


def _child(cwd: Path, flags: list[str], log: Path, env: dict[str, str], setup: Any, recipe: str) -> None:
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(cwd)
    os.environ.update(env)
    torch.set_num_threads(1)
    if setup is not None:
        setup()
    from functional_trainer import config

    module = importlib.import_module(f"experiments.{recipe}")
    sys.argv = [str(RECIPE.with_stem(recipe)), *flags]
    try:
        config.run(module.main, module.Options, doc=module.__doc__ or "")
    finally:
        sys.stdout.flush()
