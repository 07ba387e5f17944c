"""Check every kernel and both models on a device against references, then measure speed and memory there.

    python experiments/benchmarks/gpu_suite.py                            # everything
    python experiments/benchmarks/gpu_suite.py --what check --only 'attention *'
    python experiments/benchmarks/gpu_suite.py --what check --only 'decode *' 'policy *'     # reinforcement learning
    python experiments/benchmarks/gpu_suite.py --device cpu               # every case at small sizes: it still runs

Checks are `gpu_checks.py` and `rl_checks.py`; they run in a process of their own, after a fault of the device in a new
one. Speed is `train_gpu.py`; its contestants are processes that hold no device memory while another runs, and a round
builds, warms up and times each of them. Kernels are raced by `kernels.py`, generation by `decode.py` and steps of
reinforcement learning by `grpo.py`, each a process that prints its own tables. Memory is the table of `memory.py`, in
one process.

What to expect on one GPU of the H100's class, guessed from what is compiled, in minutes: check 12, of which
reinforcement learning 4; kernels 4; speed 8; memory 2; decode 6, and 2 more for vLLM; grpo 3, and 2 for each of TRL's.
Where that is too long, --what and --only choose, and --rounds 1 is enough to see the order of magnitude.

Exit status 1 if a check failed or a contestant broke.
"""

import contextlib
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from the clone without installing

from rich.console import Console
from rich.table import Table

from experiments.benchmarks import decode, gpu_checks, memory, rl_checks, runs, sft_cpu, train_gpu
from functional_trainer import config

CASE_SECONDS = 400
CASES = gpu_checks.CASES | rl_checks.CASES
GENERATION = ("hf-generate-grouped_mm", "hf-batch-grouped_mm", "vllm")
"""Contestants of decode.py that run by default beside ours."""
POLICY = "trl-generate-grouped_mm"
"""That of grpo.py."""


@dataclass(frozen=True)
class Options:
    device: str = "auto"
    """Device to check: a GPU at real sizes, the CPU at small ones."""
    what: Literal["all", "check", "kernels", "speed", "memory", "decode", "grpo"] = "all"
    """What to do."""
    model: train_gpu.Name = "30b-a3b"
    """Preset whose widths are timed."""
    only: tuple[str, ...] = ()
    """Cases, contestants and settings by name, with wildcards ("attention *"); none means all, of decode and grpo the
    fastest. With all of --what these two, and kernels, are left out."""
    layers: int = 0
    """Depth of the model that is timed (0: as many layers as fit in training, 4 in decode, 2 in grpo)."""
    rows: int = 2
    """Rows of 4096 tokens a timed step."""
    rounds: int = 3
    """Times each contestant and each setting is built and timed; those of grpo are once."""
    steps: int = 5
    """Timed steps a round, after two untimed ones."""
    vllm_python: Path = decode.Options.vllm_python
    """Python that has vLLM, for decode."""
    peer_python: Path = runs.PEER
    """Python that has TRL, for grpo."""
    json: Path | None = None
    """Also write the results here."""


# processes -----------------------------------------------------------------------------------------------------------


def serve(pipe: Any, device_name: str) -> None:
    """Answer requests (name of a function below, its arguments) until None."""
    import torch

    from functional_trainer import backend

    try:
        device = backend.setup(device_name)
    except ValueError as why:
        pipe.recv()
        pipe.send(("failed", str(why)))
        return
    small = not hasattr(torch.get_device_module(device), "mem_get_info")
    with contextlib.suppress(ImportError):
        import transformers

        transformers.logging.set_verbosity_error()
    kept: dict[str, Any] = {}

    def about() -> dict[str, str]:
        return {"device": backend.describe(device), "torch": torch.__version__, "small": "yes" if small else ""}

    def check(name: str, dtype: str) -> list[gpu_checks.Check]:
        torch.manual_seed(0)
        return CASES[name](gpu_checks.At(device, dtype, small))

    def fit(model: str, rows: int) -> int:
        return 2 if small else train_gpu.layers_that_fit(model, device, rows * 4096)

    def measure(model: str, name: str, layers: int, rows: int, steps: int) -> dict[str, float]:
        if "timer" not in kept:
            kept["timer"] = train_gpu.Timer(gpu_checks.At(device, "bfloat16", small), model, name, layers, rows)
        return kept["timer"].round(steps)

    def useful(seconds: float) -> tuple[float, float | None]:
        return kept["timer"].useful(seconds)

    def hold(name: str, steps: int) -> dict[str, Any]:
        return memory.measure(memory_options(small, steps), device, name)

    offered = {f.__name__: f for f in (about, check, fit, measure, useful, hold)}
    while (request := pipe.recv()) is not None:
        try:
            answer: Any = ("ok", offered[request[0]](*request[1:]))
        except gpu_checks.Skip as why:
            answer = ("skip", str(why))
        except Exception as problem:  # one case's failure hides no other
            said = [line for line in str(problem).splitlines() if line.strip()] or [""]
            answer = ("failed", f"{type(problem).__name__}: {said[0][:160]}")
        pipe.send(answer)


class Worker:
    """A process on the device, started when first asked, and anew after a fault."""

    def __init__(self, device: str):
        self.device = device
        self.process: Any = None

    def ask(self, *request: Any) -> tuple[str, Any]:
        """Return ("ok", result), ("skip", reason) or ("failed", reason)."""
        if self.process is None:
            spawn = multiprocessing.get_context("spawn")
            self.pipe, theirs = spawn.Pipe()
            self.process = spawn.Process(target=serve, args=(theirs, self.device))
            self.process.start()
            theirs.close()
        try:
            self.pipe.send(request)
            answer = self.pipe.recv() if self.pipe.poll(CASE_SECONDS) else ("failed", f"no answer in {CASE_SECONDS} s")
        except (EOFError, ConnectionError):
            self.process.join()
            answer = ("failed", f"the process ended with status {self.process.exitcode}")
        if answer[0] == "failed" and any(s in answer[1] for s in ("CUDA", "AcceleratorError", "no answer", "ended")):
            self.stop(kill=True)  # the device may refuse everything from this process now
        return answer

    def stop(self, kill: bool = False) -> None:
        if self.process is None:
            return
        if kill:
            self.process.kill()
        else:
            self.pipe.send(None)
        self.process.join()
        self.pipe.close()
        self.process = None


def wanted(o: Options, names: Any) -> list[str]:
    """Return the names that --only leaves."""
    return [name for name in names if any(fnmatch(name, pattern) for pattern in o.only or ("*",))]


def run_checks(o: Options, worker: Worker, console: Console) -> list[dict[str, Any]]:
    """Run every case in both dtypes, print a line for each comparison, and return them."""
    results = []
    for name in wanted(o, CASES):
        for dtype in gpu_checks.TOLERANCE:
            status, answer = worker.ask("check", name, dtype)
            if status != "ok":
                console.print(f"{status.upper():6} {name:42} {dtype:9} {answer}", markup=False, soft_wrap=True)
                results.append({"case": name, "dtype": dtype, "status": status, "note": answer})
                continue
            for check in answer:
                verdict = "pass" if check.error <= check.tolerance else "failed"  # NaN fails
                shown = f"{check.what:18} error {check.error:.1e} of {check.tolerance:.0e} {check.note}"
                console.print(f"{verdict.upper():6} {name:42} {dtype:9} {shown}", markup=False, soft_wrap=True)
                results.append({"case": name, "dtype": dtype, "status": verdict, **check._asdict()})
    return results


def run_speed(o: Options, about: dict[str, str], console: Console) -> list[dict[str, Any]]:
    """Time the contestants in turn, print the table, and return its rows."""
    small = bool(about["small"])
    offered = train_gpu.contestants(small)
    names = wanted(o, offered)
    if o.what == "speed" and (odd := [p for p in o.only if not any(fnmatch(name, p) for name in offered)]):
        absent = ", ".join(v for k, v in train_gpu.PEERS.items() if k not in train_gpu.installed())
        raise ValueError(f"{odd[0]}: no such contestant here; there are {', '.join(offered)}; not installed: {absent}")
    first = Worker(o.device)
    layers, rows = o.layers or first.ask("fit", o.model, o.rows)[1], 1 if small else o.rows
    first.stop()
    workers = {name: Worker(o.device) for name in names}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    table: dict[str, dict[str, Any]] = {name: {"name": name, "layers": layers} for name in names}
    for round in range(o.rounds):
        for name in names:
            if "error" in table[name]:
                continue
            status, answer = workers[name].ask("measure", o.model, name, layers, rows, o.steps)
            console.print(f"round {round + 1}: {name} {answer}", markup=False, soft_wrap=True)
            if status == "ok":
                taken[name].append(answer)
            else:
                table[name]["error"] = answer
                workers[name].stop(kill=True)  # with the device memory that it still holds
    for name in names:
        if taken[name]:
            seconds = [t["step_s"] for t in taken[name]]
            median = statistics.median(seconds)
            rate, mfu = workers[name].ask("useful", median)[1] if workers[name].process else (None, None)
            table[name] |= {"median_s": median, "min_s": min(seconds), "max_s": max(seconds)}
            table[name] |= {"tokens_s": rate, "mfu": mfu}
            table[name] |= {"first_s": taken[name][0]["first_s"], "peak_gib": max(t["peak_gib"] for t in taken[name])}
            table[name]["losses"] = [t["loss"] for t in taken[name]]
        workers[name].stop()
    sft_cpu.judge(list(table.values()), 5e-3)
    model = "tiny" if small else o.model
    title = f"{model}, {layers} layers, {rows} rows, bfloat16 compute; {about['device']}, torch {about['torch']}"
    show(table.values(), title, console)
    return list(table.values())


def beside(script: str, o: Options, *flags: Any) -> dict[str, Any]:
    """Run a benchmark as a process that prints its tables; return what it wrote, with an error if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        given = ["--device", o.device, *flags, "--json", out]
        status = subprocess.run([sys.executable, Path(__file__).with_name(script), *map(str, given)]).returncode
        found = json.loads(out.read_text("utf-8")) if out.exists() else {}
    return found | ({"error": f"{script} ended with status {status}"} if status else {})


def run_kernels(o: Options, small: bool) -> dict[str, Any]:
    """Race kernels beside their peers."""
    few = "--shapes tiny --routing mild --dtypes float32 --rounds 1 --compile off --memory-gib 1"
    return beside("kernels.py", o, *(few.split() if small else []))


def run_decode(o: Options, small: bool) -> dict[str, Any]:
    """Race generation beside others, of few and of many prompts, short and long."""
    sizes = f"--model {o.model} --layers {o.layers or 4} --prompts 16 128 --prompt-tokens 128 1024 --tokens 128"
    usual = ("ours-off",) if small else ("ours-layer", "ours-step")
    chosen = o.only if o.what == "decode" and o.only else (*usual, *GENERATION)
    few = "--layers 1 --prompts 3 6 --prompt-tokens 9 --tokens 5 --slots 4"
    same = ("--dtype", "bfloat16", "--rounds", o.rounds, "--warmup", 1, "--vllm-python", o.vllm_python)
    return beside("decode.py", o, *(few if small else sizes).split(), *same, "--contestants", *chosen)


def run_grpo(o: Options, small: bool) -> dict[str, Any]:
    """Race steps of reinforcement learning beside TRL's, where it is."""
    sizes = f"--preset {o.model} --layers {o.layers or 2} --steps {2 + o.steps} --tokens 128"
    usual = ("ours-off-bf16",) if small else ("ours-layer-bf16", "ours-steps-bf16")
    theirs = (POLICY,) if o.peer_python.exists() else ()
    chosen = o.only if o.what == "grpo" and o.only else (*usual, *theirs)
    few = "--preset tiny --layers 1 --steps 3 --tokens 3"
    with tempfile.TemporaryDirectory() as folder:
        same = ("--rounds", 1, "--folder", folder, "--peer-python", o.peer_python)
        return beside("grpo.py", o, *(few if small else sizes).split(), *same, "--contestants", *chosen)


def memory_options(small: bool, steps: int) -> memory.Options:
    """Return what `memory.py` measures here: its own sizes in bfloat16, or small ones."""
    sizes = {"layers": 1, "vocab": 64, "rows": 4, "seq_len": 32} if small else {}
    return memory.Options(dtype="bfloat16", steps=steps, **sizes)  # type: ignore[arg-type]


def run_memory(o: Options, about: dict[str, str], worker: Worker, console: Console) -> list[dict[str, Any]]:
    """Measure settings in turn, print the table, and return its rows."""

    def ask(name: str) -> dict[str, Any]:
        status, answer = worker.ask("hold", name, o.steps)
        return answer if status == "ok" else {"error": answer}

    rows = memory.collect(wanted(o, memory.settings("off")), o.rounds, ask, 5e-3)
    memory.show(rows, f"bfloat16 compute, uncompiled; {about['device']}, torch {about['torch']}", console)
    return rows


def show(rows: Any, title: str, console: Console) -> None:
    """Print the table of contestants."""
    table = Table(title=title)
    for head in ("contestant", "tokens/s", "MFU", "median s", "min..max s", "peak GiB", "first step s", ""):
        table.add_column(head, justify="left" if head in ("contestant", "") else "right")
    for row in rows:
        cells = [""] * 6
        if "median_s" in row:
            rate = "" if row["tokens_s"] is None else f"{row['tokens_s']:,.0f}"
            mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
            cells = [rate, mfu, f"{row['median_s']:.3f}", f"{row['min_s']:.3f}..{row['max_s']:.3f}"]
            cells += [f"{row['peak_gib']:.1f}", f"{row['first_s']:.1f}"]
        table.add_row(row["name"], *cells, row.get("error", ""))
    console.print(table)


def main(o: Options) -> None:
    """Check, measure, print, write, and fail if anything did."""
    if min(o.rows, o.rounds, o.steps) < 1 or o.layers < 0:
        raise ValueError("--rows, --rounds and --steps are at least 1, --layers at least 0")
    console, worker = Console(width=150), Worker(o.device)
    status, about = worker.ask("about")
    if status != "ok":
        raise ValueError(about)
    console.print(f"{about['device']}, torch {about['torch']}{', small sizes' * bool(about['small'])}")
    races = o.what == "all" and not o.only
    checks = run_checks(o, worker, console) if o.what in ("all", "check") else []
    worker.stop()
    raced = run_kernels(o, bool(about["small"])) if races or o.what == "kernels" else {}
    speed = run_speed(o, about, console) if o.what in ("all", "speed") else []
    held = run_memory(o, about, worker, console) if o.what in ("all", "memory") else []
    worker.stop()
    generated = run_decode(o, bool(about["small"])) if races or o.what == "decode" else {}
    reinforced = run_grpo(o, bool(about["small"])) if races or o.what == "grpo" else {}
    count = {s: sum(c["status"] == s for c in checks) for s in ("pass", "failed", "skip")}
    console.print(f"{count['pass']} passed, {count['failed']} failed, {count['skip']} skipped")
    if o.json:
        results = {"about": about, "checks": checks, "kernels": raced, "speed": speed, "memory": held}
        results |= {"decode": generated, "grpo": reinforced}
        o.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    sys.exit(count["failed"] > 0 or any("error" in row for row in [*speed, *held, raced, generated, reinforced]))


if __name__ == "__main__":
    config.run(main, Options, doc=__doc__)
