"""Trainers run as a user runs them, each a process of its own, and seen from outside: what `sft_end_to_end.py`,
`grpo.py` and `startup.py` share.

A trainer appends a line to `metrics.jsonl` in its run folder as each step ends, and this file's clock is the moment
that the line appears. Imports no torch: what a process has used at most includes its parent's memory at the start.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from experiments.first_light import tasks

ROOT = Path(__file__).parents[2]
PEER = ROOT / ".venv-trl" / "bin" / "python"
TURNS = range(1, 13)  # questions in a conversation


@contextmanager
def apart() -> Iterator[Callable]:
    """Yield a function that calls another in a process of its own, so that this one stays small."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield lambda fn, *args: pool.submit(fn, *args).result()


def chosen(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the contestants that --contestants asks for, with wildcards; ValueError says which there are."""
    names = list(names)
    wanted = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
    if not wanted:
        raise ValueError(f"--contestants {' '.join(patterns)}: none; there are {', '.join(names)}")
    return wanted


def conversations(records: list[tasks.Record], count: int, seed: int) -> list[tasks.Record]:
    """Join questions and answers to `count` conversations of 1 to 12 of them, all numbers equally often."""
    rng, source = random.Random(seed), iter(records)
    return [{"messages": [m for _ in range(rng.choice(TURNS)) for m in next(source)["messages"]]} for _ in range(count)]


def write(folder: Path, name: str, records: list[tasks.Record]) -> None:
    """Write NAME.jsonl."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records), encoding="utf-8")


def make_model(folder: Path, layers: int, seed: int) -> None:
    """Write model/: a random Qwen3-MoE as transformers saves it, with our tokenizer."""
    import torch
    import transformers

    from experiments.benchmarks.sft_cpu import hf_config

    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(**hf_config(layers))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder / "model")
    shutil.copytree(ROOT / "experiments" / "first_light" / "tokenizer", folder / "model", dirs_exist_ok=True)


def prepare(folder: Path, layers: int, rows: int, held_out: int, seed: int) -> None:
    """Write train.jsonl and eval.jsonl, conversations, and model/."""
    train, questions = tasks.make(rows * TURNS[-1], held_out * TURNS[-1], seed)
    for name, records, count in (("train", train, rows), ("eval", questions, held_out)):
        write(folder, name, conversations(records, count, seed))
    make_model(folder, layers, seed)


def ours(place: Path, out: Path, flags: list[str], recipe: str = "qwen3_moe_sft") -> list[str]:
    """Return the command of a recipe of ours on the data and the model of `place`."""
    script = ROOT / "experiments" / f"{recipe}.py"
    given = ["--model.path", place / "model", "--data.train", place / "train.jsonl", "--out", out, "--samples", 0]
    return [sys.executable, str(script), *map(str, given), *flags]


def trl(place: Path, out: Path, python: Path, config: dict[str, Any], script: str = "trl_sft") -> list[str]:
    """Return the command of a trainer of TRL's on the data and the model of `place`; ValueError without its Python."""
    if not python.exists():
        raise ValueError(f"--peer-python {python}: no such file; `make bench-trl` makes it, or leave trl-* out")
    job = {"model": str(place / "model"), "train": str(place / "train.jsonl"), "eval": str(place / "eval.jsonl")}
    file = out.with_suffix(".json")
    file.write_text(json.dumps(job | {"config": config | {"output_dir": str(out)}}), encoding="utf-8")
    return [str(python), str(Path(__file__).with_name(f"{script}.py")), str(file)]


def caches(folder: Path, gpu: bool = False) -> dict[str, str]:
    """Return the environment of a process that keeps what it compiles, tokenizes and converts in `folder`."""
    there = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TMPDIR": "tmp", "XDG_CACHE_HOME": "cache", "HF_HOME": "hub"}
    (folder / "tmp").mkdir(parents=True, exist_ok=True)  # Inductor's precompiled headers are always there
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    offline |= {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    return os.environ | offline | {key: str(folder / name) for key, name in there.items()}


def busy() -> float:
    """Return the CPU seconds that all processes of this machine, and other machines on its cores, have used."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def watch(command: list[str], out: Path, env: dict[str, str]) -> dict[str, Any]:
    """Run a trainer and return what was seen of it: its rows, seconds from its start (`s` in a row: its end), memory.

    `imports_s` is when the run folder held a config (torch is imported, nothing read), `loaded_s` when there was a
    metrics.jsonl (data and model are ready). `others_s` is the CPU time of other processes meanwhile. RuntimeError
    with the end of its output if the trainer fails.
    """
    shutil.rmtree(out, ignore_errors=True)
    log = out.with_suffix(".log")
    seen: dict[str, Any] = {"rows": []}
    marks = {"imports_s": [out / "config.yaml", out / "config.json"], "loaded_s": [out / "metrics.jsonl"]}
    before, start = busy(), time.time()
    with open(log, "wb") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
    done, status = 0, 0
    usage: Any = None
    while not done:
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        now = time.time() - start
        seen |= {k: now for k, files in marks.items() if k not in seen and any(f.exists() for f in files)}
        if "loaded_s" in seen:
            lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)[len(seen["rows"]) :]
            seen["rows"] += [json.loads(line) | {"s": now} for line in lines if line.endswith(b"\n")]
        time.sleep(0.01)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with status {process.returncode}: {log.read_text(errors='replace')[-2000:]}"
        )
    own = usage.ru_utime + usage.ru_stime
    seen |= {"start": start, "wall_s": now, "others_s": max(0.0, busy() - before - own)}
    return seen | {"peak_mib": usage.ru_maxrss / 1024}
