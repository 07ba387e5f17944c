"""The SFT recipe as a user runs it: the run folder, killing and resuming, stopping, several processes, bad input."""

import html
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import models
from experiments.qwen3_moe_sft import Options
from functional_trainer import hf, tree
from tests.experiments import sft_runs
from tests.experiments.sft_runs import RECIPE, TOKENIZER, learned, rows, run, run_ranks, same_state, start, state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
DATA = ("--data.train", "train.jsonl", "--data.eval", "eval.jsonl", "--data.seq-len", 64)
SHORT = ("--batch", 4, "--steps", 6, "--compile", "off", "--optim.lr", 1e-2, "--eval-every", 3, *DATA)
BASE = ("--model.path", "moe", *SHORT)
LONG = (*BASE, "--steps", 12, "--save-every", 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with two models, data, and a whole run `first` made by the script itself."""
    place = tmp_path_factory.mktemp("sft")
    sft_runs.folder(place / "moe")
    sft_runs.folder(place / "dense", "qwen3")
    sft_runs.chats(place / "train.jsonl", 60)
    sft_runs.chats(place / "eval.jsonl", 8, seed=1)
    command = [sys.executable, RECIPE, *BASE, "--save-every", 2, "--out", "first"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # as the forked runs: bits depend on the number of threads
    done = subprocess.run(list(map(str, command)), cwd=place, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return place


@pytest.fixture(scope="module")
def uninterrupted(place) -> Callable[..., Path]:
    """Give the folder of a `LONG` run that nothing disturbs, made once for each set of further flags."""

    def at(*flags) -> Path:
        name = "-".join(["whole", *(str(flag).strip("-") for flag in flags)])
        if not (place / name).exists():
            run(place, *LONG, *flags, "--out", name)
        return place / name

    return at


def until(ready: Callable[[], bool], process) -> None:
    """Poll until `ready`, or until the run is over."""
    while not ready() and process.exitcode is None:
        time.sleep(0.002)


def steps_done(out: Path) -> int:
    """Count the whole lines of metrics.jsonl, also of a run that was killed."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def losses(out: Path) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in rows(out)], dtype=torch.float64)


# What a run leaves behind.


def test_a_profile_says_where_the_time_goes_and_changes_nothing(place):
    printed = run(place, *BASE, "--profile", 2, "--out", "profiled")
    lines = re.findall(r"^ +([\d.]+)% +([\d.]+) ms a step +(\d+) calls  (.+)$", printed, re.M)
    shares, times = ([float(line[i]) for line in lines] for i in (0, 1))
    assert len(lines) == 10 and times == sorted(times, reverse=True) and 30 < sum(shares) <= 100.5
    assert "profiled 2 steps: trace.json in profiled" in printed and "USDT" not in printed
    events = json.loads((place / "profiled" / "trace.json").read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"aten::mm", "functional_trainer::attention_documents", "[memory]"} <= names
    assert {name for name in names if str(name).startswith("ProfilerStep")} == {"ProfilerStep#3", "ProfilerStep#4"}
    assert learned(place / "profiled") == learned(place / "first")
    short = run(place, *BASE, "--steps", 5, "--profile", 9, "--out", "profiled-short")
    assert "profiled 2 steps: trace.json in profiled-short" in short
    for steps in (2, 3):
        none = run(place, *BASE, "--steps", steps, "--profile", 9, "--out", f"profiled-none-{steps}")
        assert f"nothing is profiled: this took {steps} steps, and the first 3 are left out" in none


def test_the_run_folder_holds_what_the_help_says(place):
    out = place / "first"
    files = {"config.yaml", "metrics.jsonl", "samples.jsonl", "checkpoints", "tensorboard", "index.html", "hf"}
    assert files | {"loss.png", "experts.png", "norms.png"} == set(os.listdir(out))
    page = (out / "index.html").read_text()
    asked = json.loads((place / "eval.jsonl").read_text().partition("\n")[0])["messages"][-2]["content"]
    assert html.escape(asked) in page and "optim.lr" in page
    assert sorted(os.listdir(out / "checkpoints")) == ["step-4", "step-6"]  # --keep 2
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_have_one_whole_row_a_step(place):
    found = rows(place / "first")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in found if "eval_loss" in row] == [3, 6]
    for row in found:
        assert {"loss", "nll", "balance", "lr", "grad_norm", "skipped", "tokens", "trained_tokens"} <= row.keys()
        assert row["mfu"] is None and row["tokens_per_s"] > 0 and row["memory_bytes"] > 1e8
        assert row["time"].keys() == {"data", "step", "other"} and min(row["time"].values()) >= 0
        assert [sum(layer) for layer in row["load"]] == [2 * row["tokens"]] * 2  # top 2 in 2 layers
        assert row["loss"] == pytest.approx(row["nll"] + 1e-3 * row["balance"], rel=1e-6)
        assert 0 < row["trained_tokens"] < row["tokens"] <= 4 * 64
        assert row["padding"] == pytest.approx(1 - row["tokens"] / (4 * 64))
        assert sum(x**2 for x in row["grad_norms"].values()) == pytest.approx(row["grad_norm"] ** 2, rel=1e-5)
        assert {"embed", "layers/attn/q", "layers/moe/router"} <= row["grad_norms"].keys()
        assert ("weight_norms" in row) == ("eval_loss" in row)
    assert found[-1]["weight_norms"].keys() == found[-1]["grad_norms"].keys()
    assert found[-1]["eval_loss"] < found[2]["eval_loss"]
    assert found[-1]["lr"] < max(row["lr"] for row in found) <= 1e-2


def test_tensorboard_has_the_same_numbers(place):
    events = EventAccumulator(str(place / "first" / "tensorboard")).Reload()
    assert {"loss", "eval_loss", "lr", "grad_norm", "tokens_per_s", "time/step"} <= set(events.Tags()["scalars"])
    wanted = [(row["step"], row["loss"]) for row in rows(place / "first")]
    assert [e.step for e in events.Scalars("loss")] == [step for step, _ in wanted]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([loss for _, loss in wanted], rel=1e-6)


def test_the_written_config_gives_the_same_run(place):
    run(place, "--config", "first/config.yaml", "--out", "again")
    assert learned(place / "again") == learned(place / "first")
    same_state(place / "again", place / "first")
    mine, theirs = ((place / name / "config.yaml").read_text() for name in ("again", "first"))
    assert mine.replace("out: again", "out: first") == theirs


@pytest.mark.parametrize("family", ["moe", "dense"])
def test_transformers_loads_the_result_and_says_the_same(place, family):
    out = place / "first"
    if family == "dense":
        out = place / "dense-run"
        run(place, "--model.path", "dense", *SHORT, "--out", out.name)
        assert losses(out)[-1] < losses(out)[0] - 0.05
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "hf")
    assert theirs.dtype == torch.float32 and theirs.config.model_type == {"moe": "qwen3_moe", "dense": "qwen3"}[family]

    model = models.from_config(out / "hf")
    saved = {k.removeprefix("params/"): v for k, v in state(out)[0].items() if k.startswith("params/")}
    params = tree.unflatten(saved, like=model.specs)
    written = load_file(out / "hf" / "model.safetensors")
    slots = next(s for s in (hf.expand(model.specs, names) for names in model.names) if s.keys() == written.keys())
    for name, slot in slots.items():
        assert torch.equal(written[name], saved[slot.path][slot.index].reshape(slot.shape)), name

    chat = [{"role": "user", "content": "What is 12 plus 34?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.allclose(models.logits(model, params, ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)
    written_by_them = theirs.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    eos = model.config.hf["eos_token_id"]
    (ours,) = models.generate(model, params, ids.tolist(), max_new_tokens=12, eos_ids=[eos])
    assert tokenizer.decode(ours.tokens) == tokenizer.decode(written_by_them)


def test_the_shipped_tasks_are_the_default_and_answers_are_shown(place):
    printed = run(place, "--steps", 2, "--batch", 2, "--compile", "off", "--answers", 6, "--out", "tasks")
    assert "before training 0.0% of 6 held-out answers are exact" in printed
    assert "% of 6 answers are exact" in printed and "wanted" in printed
    held_out = [json.loads(line) for line in (place / "tasks" / "data" / "eval.jsonl").read_text().splitlines()]
    assert any(record["messages"][0]["content"] in printed for record in held_out[:6])
    assert (place / "tasks" / "hf" / "tokenizer.json").read_bytes() == (TOKENIZER / "tokenizer.json").read_bytes()


# Stopping and going on.


@pytest.mark.parametrize(
    ("flags", "kills"),
    [((), 3), (("--micro-batch", 1), 1), pytest.param(("--compile", "layer"), 2, marks=pytest.mark.slow)],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(place, uninterrupted, flags, kills):
    whole = uninterrupted(*flags)
    out = place / "-".join(["killed", *whole.name.split("-")])
    rng, done = random.Random(len(flags)), 0
    for kill in range(kills):
        started = start(place, *LONG, *flags, "--out", out.name)
        if kill == 0:  # while a checkpoint is written
            until(lambda: any(out.glob("checkpoints/step-[3-9].tmp")), started.process)
        else:
            goal = done + rng.randint(1, 3)
            until(lambda goal=goal: steps_done(out) > goal, started.process)
            time.sleep(rng.random() * 0.05)
        os.kill(started.process.pid, signal.SIGKILL)
        assert started.wait() == -signal.SIGKILL, f"the run was over before it was killed:\n{started.output}"
        done = steps_done(out)
        assert 1 <= done < 12
    assert "resumed from" in run(place, *LONG, *flags, "--out", out.name)
    assert learned(out) == learned(whole)
    same_state(out, whole)
    assert not list(out.glob("checkpoints/*.tmp"))


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (True, True)])
def test_moments_in_host_memory_change_neither_a_run_nor_its_checkpoints(place, uninterrupted, before, after):
    """A run is killed and goes on, with moments there or here."""
    out, flags = place / f"away-{before}-{after}", ("--offload", "optimizer", "activations")
    started = start(place, *LONG, *flags * before, "--out", out.name)
    until(lambda: steps_done(out) > 2, started.process)
    os.kill(started.process.pid, signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL, f"the run was over before it was killed:\n{started.output}"
    assert "resumed from" in run(place, *LONG, *flags * after, "--out", out.name)
    assert learned(out) == learned(uninterrupted())
    same_state(out, uninterrupted())


def test_a_torn_config_or_metrics_line_does_not_stop_a_run_from_going_on(place):
    run(place, *BASE, "--save-every", 2, "--out", "torn")
    whole = learned(place / "torn")
    for path in (place / "torn" / "checkpoints" / "step-6", place / "torn" / "hf"):
        subprocess.run(["rm", "-r", path], check=True)
    (place / "torn" / "checkpoints" / "step-6.tmp").mkdir()
    (place / "torn" / "config.yaml.tmp").write_text("out: to")
    with open(place / "torn" / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    assert "resumed from torn/checkpoints/step-4 at step 4 of 6; 2 are left" in run(place, *BASE, "--out", "torn")
    assert learned(place / "torn") == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_the_same_command_goes_on(place, uninterrupted, number):
    whole, out = uninterrupted(), place / f"stopped-{number}"
    started = start(place, *LONG, "--save-every", 0, "--out", out.name)
    until(lambda: steps_done(out) >= 2, started.process)
    os.kill(started.process.pid, number)
    assert started.wait() == 0, started.output
    last = len(rows(out))
    assert 2 <= last < 12
    assert f"stopped after step {last} of 12; the same command continues from there" in started.output
    assert os.listdir(out / "checkpoints") == [f"step-{last}"] and not (out / "hf").exists()
    run(place, *LONG, "--save-every", 0, "--out", out.name)
    assert learned(out) == learned(whole)
    same_state(out, whole)


def slow_reader() -> None:
    """Take a minute before the first row."""
    from functional_trainer.data import sources

    rows_of_file = sources.rows

    def slowly(file):
        time.sleep(60)
        yield from rows_of_file(file)

    sources.rows = slowly


def test_ctrl_c_before_the_first_step_is_no_traceback(place):
    started = start(place, *BASE, "--out", "early", setup=slow_reader)
    until(lambda: (place / "early" / "config.yaml").exists(), started.process)
    os.kill(started.process.pid, signal.SIGINT)
    assert started.wait() == 130
    assert "interrupted" in started.output and "Traceback" not in started.output


def test_a_finished_run_is_not_trained_again(place):
    run(place, *BASE, "--out", "finished")
    before = (place / "finished" / "metrics.jsonl").read_bytes()
    printed = run(place, *BASE, "--out", "finished")
    assert "resumed from finished/checkpoints/step-6 at step 6 of 6; 0 are left" in printed
    assert "hf/ are in finished" in printed
    assert (place / "finished" / "metrics.jsonl").read_bytes() == before
    same_state(place / "finished", place / "first")


def test_resume_names_a_checkpoint_or_a_run(place):
    run(place, *BASE, "--resume", "first/checkpoints/step-4", "--out", "branch")
    assert learned(place / "branch") == learned(place / "first")[4:]
    same_state(place / "branch", place / "first")
    printed = run(place, *BASE, "--steps", 8, "--resume", "first", "--out", "longer")
    assert "resumed from first/checkpoints/step-6 at step 6 of 8; 2 are left" in printed
    assert [row["step"] for row in rows(place / "longer")] == [7, 8]
    assert "is at step 6" in refused(place, "--steps", 4, "--resume", "first", "--out", "shorter")


def test_another_run_in_the_folder_is_refused(place):
    message = refused(place, "--resume", "never", "--out", "first")
    assert message == "error: first already holds a run; choose another --out, or --resume auto to continue it"
    message = refused(place, "--optim.lr", 0.5, "--data.packing", "none", "--out", "first")
    assert "first holds another run (" in message
    assert "optim.lr was 0.01, is 0.5" in message and "data.packing was first_fit, is none" in message
    run(place, *BASE, "--steps", 1, "--out", "other")
    assert "other already holds a run" in refused(place, "--resume", "first", "--out", "other")
    assert len(rows(place / "first")) == 6


def test_data_that_changed_under_a_run_is_refused(place):
    sft_runs.chats(place / "changing.jsonl", 60)
    flags = ("--data.train", "changing.jsonl", "--save-every", 1, "--out", "changing")
    run(place, *BASE, *flags)
    sft_runs.chats(place / "changing.jsonl", 59)
    assert "cannot resume the data stream: content was '60 documents" in refused(place, *flags)


# Nothing but rounding depends on how the work is split.


def test_no_result_depends_on_the_split(place):
    splits: dict[str, tuple] = {
        "whole": (), "all": ("--micro-batch", 4), "half": ("--micro-batch", 2), "one": ("--micro-batch", 1),
        "remat": ("--micro-batch", 2, "--remat", "selective"),
    }  # fmt: skip
    for name, flags in splits.items():
        run(place, *BASE, "--dtype", "float64", *flags, "--out", f"split-{name}")
    first = losses(place / "split-whole")
    assert first[-1] < first[0] - 0.05
    for name in splits:
        assert torch.allclose(losses(place / f"split-{name}"), first, rtol=1e-12, atol=0), name
    tensors, _ = state(place / "split-one")
    assert all(t.dtype == torch.float64 for path, t in tensors.items() if path.startswith(("params", "moments")))


def test_two_processes_learn_the_same_and_may_take_over_a_run(place):
    exact = (*BASE, "--dtype", "float64", "--save-every", 3)
    run(place, *exact, "--out", "single")
    meshes: dict[str, tuple] = {"fsdp": ("--mesh.fsdp", 2), "ep": ("--mesh", "ep=2")}
    meshes["auto"] = ("--mesh", "auto", "--mesh.reduce", "master")
    for name, flags in meshes.items():
        assert ("--mesh auto: " in run_ranks(place, 2, *exact, *flags, "--out", name)) == (name == "auto")
        assert torch.allclose(losses(place / name), losses(place / "single"), rtol=1e-12, atol=0), name
        assert [r["load"] for r in rows(place / name)] == [r["load"] for r in rows(place / "single")]
    for checkpoint in ("ep", "single"):
        subprocess.run(["rm", "-r", place / checkpoint / "checkpoints" / "step-6"], check=True)
    assert "3 are left" in run_ranks(place, 2, *exact, "--mesh.ep", 2, "--micro-batch", 1, "--out", "single")
    assert "3 are left" in run(place, *exact, "--out", "ep")
    for name in ("single", "ep"):
        assert torch.allclose(losses(place / name), losses(place / "fsdp"), rtol=1e-12, atol=0)
        ours, theirs = (load_file(place / out / "hf" / "model.safetensors") for out in (name, "fsdp"))
        assert all(torch.allclose(ours[k], theirs[k], rtol=1e-9, atol=1e-12) for k in theirs | ours)


@pytest.mark.slow
def test_torchrun_starts_it(place):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    command = [*torchrun, RECIPE, *BASE, "--mesh.ep", 2, "--out", "torchrun"]
    done = subprocess.run(list(map(str, command)), cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert torch.allclose(losses(place / "torchrun"), losses(place / "first"), rtol=1e-4)


def test_bfloat16_computes_lower_and_keeps_float32_masters(place):
    run(place, *BASE, "--dtype", "bfloat16", "--out", "bfloat16")
    low, full = losses(place / "bfloat16"), losses(place / "first")
    assert torch.allclose(low, full, rtol=0.02) and not torch.allclose(low, full, rtol=1e-6)
    tensors, _ = state(place / "bfloat16")
    assert all(t.dtype == torch.float32 for path, t in tensors.items() if path.startswith(("params", "moments")))


def test_epochs_take_every_document_that_often(place):
    printed = run(place, *BASE, "--steps", 0, "--epochs", 2, "--save-every", 0, "--out", "epochs")
    steps = len(rows(place / "epochs"))
    assert f"{steps} steps of 4 rows" in printed
    _, extra = state(place / "epochs")
    assert extra["loader"]["seen"]["seen_pieces"] == 2 * 60 and extra["step"] == steps


def test_long_documents_are_counted(place):
    printed = run(place, *BASE, "--steps", 1, "--data.seq-len", 16, "--data.overlong", "truncate", "--out", "long")
    lines = (place / "train.jsonl").read_text().splitlines()
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    chats = [tokenizer.apply_chat_template(json.loads(line)["messages"])["input_ids"] for line in lines]
    assert f"'truncate': {sum(len(ids) > 17 for ids in chats)}" in printed


# What goes wrong is said once, and clearly.


def refused(place: Path, *flags, status: int = 1, **options) -> str:
    """Run with bad flags; return the one message, which must be no traceback."""
    printed = run(place, *BASE, *flags, status=status, **options)
    assert "Traceback" not in printed, printed
    assert status == 2 or printed.count("error: ") == 1, printed
    return printed[printed.find("error: ") :].strip() if status == 1 else printed


def test_gradients_that_are_not_finite_stop_the_run(place):
    wild = ("--optim.lr", 1e30, "--optim.max-grad-norm", 0, "--max-skipped", 3, "--save-every", 1, "--keep", 9)
    message = refused(place, *wild, "--out", "wild")
    last = len(rows(place / "wild"))
    assert f"the gradients of 3 steps in a row, up to {last}, are not finite; the run stops" in message
    assert f"the last checkpoint is wild/checkpoints/step-{last - 1}" in message
    assert [row["skipped"] for row in rows(place / "wild")][-4:] == [0, 1, 2, 3]
    kept, good = (sft_runs.tensors(place / "wild" / "checkpoints" / f"step-{last - n}") for n in (1, 3))
    assert not [k for k in good if k not in ("step", "skipped") and not torch.equal(good[k], kept[k])]


GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
LINES = {
    GOOD + '{"messages": [\n': "bad.jsonl:2: not valid JSON",
    GOOD.replace("user", "robot"): "bad.jsonl:1: message 0: unknown role 'robot'; it can be 'system', 'user'",
    GOOD.replace("assistant", "user"): "bad.jsonl:1: message 1: role 'user' cannot follow 'user'; here it can be",
    GOOD + "\n" + GOOD.replace('"b"', '" "'): "bad.jsonl:3: message 1: the assistant's turn is empty",
    "": "bad.jsonl: the file is empty",
}


@pytest.mark.parametrize(("lines", "message"), LINES.items(), ids=["json", "role", "order", "empty turn", "empty file"])
def test_bad_data_is_named_by_file_and_line(place, lines, message):
    (place / "bad.jsonl").write_text(lines)
    assert message in refused(place, "--data.train", "bad.jsonl", "--out", "bad")


FLAGS = [
    (("--data.train", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
    (("--model.path", "None", "--model.preset", "tinny"), "--model.preset 'tinny' is not one of"),
    (("--model.path", "nowhere"), "error: nowhere does not exist; wanted a local Hugging Face folder"),
    (("--device", "gpu"), "--device gpu: not on this machine; it has"),
    (("--device", "xla:0"), "--device xla:0: torch_xla is not installed; pip install '.[xla]'"),
    (("--batch", 6, "--micro-batch", 4), "--batch 6 rows cannot be shared equally by 1 device(s)"),
    (("--mesh.ep", 2), "--mesh.ep 2"),
    (("--balance", "hf", "--micro-batch", 2, "--data.cache", "moe/config.json"), "balance 'hf'"),
    (("--optim.name", "adafactor", "--optim.moments", "8bit", "--data.cache", "moe/config.json"), "adafactor keeps"),
    (("--model.path", "dense", "--balance-coefficient", 0.1), "--balance-coefficient 0.1 has no effect: the model"),
    (("--data.eval", "--samples", 3), "--samples 3: no held-out conversation to answer (--data.eval, --data.split)"),
    (("--data.seq-len", 8, "--data.overlong", "drop"), "no document is left to train on"),
    (("--resume", "nowhere"), "--resume nowhere: no checkpoint there"),
    (("--resume", "moe"), "--resume moe: no checkpoint there"),
    (("--out", "moe/config.json/run"), "--out moe/config.json/run cannot be written: Not a directory"),
]


@pytest.mark.parametrize(("flags", "message"), FLAGS, ids=[" ".join(map(str, flags)) for flags, _ in FLAGS])
def test_bad_options_are_named(place, flags, message):
    assert message in refused(place, "--out", "refused", *flags)


def test_rows_that_devices_cannot_share_equally_are_refused(place):
    def of(seq_len: int, *flags) -> list[sft_runs.Run]:
        return sft_runs.start_ranks(place, 2, *BASE, "--data.seq-len", seq_len, *flags, "--out", "narrow")

    shared = "2 devices (cp x tp) share the tokens of a row, with --data.packing"
    cases = {
        (63, "--mesh.cp", 2): f"error: --data.seq-len 63: {shared} first_fit; use a multiple of 2, as 64",
        (52, "--mesh.tp", 2, "--data.packing", "none"):
            f"error: --data.seq-len 52: {shared} none; use a multiple of 16, as 64",
    }  # fmt: skip
    for case, message in cases.items():
        for rank in of(*case):
            assert rank.wait() == 1 and message in rank.output, rank.output
    (place / "short.jsonl").write_text("".join((place / "train.jsonl").open().readlines()[1:3]))  # narrow batches
    for rank in of(64, "--mesh.cp", 2, "--data.packing", "none", "--data.train", "short.jsonl"):
        assert rank.wait() == 0, rank.output


def test_unknown_and_impossible_options_are_named(place):
    assert "--optim.lr" in refused(place, "--optim.l", 1, status=2)
    assert "--batch is 0; it must be at least 1" in refused(place, "--batch", 0, status=2)
    away = refused(place, "--offload", "activations", "--compile", "step", status=2).replace("│", "").split()
    assert "--offload activations is not for one graph: use --compile layer or off" in " ".join(away)
    assert "is a compiler's work" in refused(place, "--remat", "budget:0.5", "--compile", "off", status=2)
    assert "--data.eval is given without --data.train" in run(place, "--data.eval", "eval.jsonl", status=2)
    (place / "typo.yaml").write_text("optim:\n  warm_up: 0.1\nkeep: 0\n")
    assert "optim.warm_up: did you mean optim.warmup?" in refused(place, "--config", "typo.yaml", status=2)


def test_options_without_effect_are_named():
    with pytest.raises(ValueError, match="--epochs 3 has no effect with --steps 500; say --steps 0, or leave --epochs"):
        Options(epochs=3)
    with pytest.raises(ValueError, match="--balance-coefficient has no effect with --balance none; leave one of them"):
        Options(balance="none", balance_coefficient=0.1)


def test_bad_models_are_named(place):
    sft_runs.folder(place / "small", vocab_size=100)
    assert "the model's vocabulary has 100 rows" in refused(place, "--model.path", "small", "--out", "refused")
    config = place / "small" / "config.json"
    config.write_text(config.read_text().replace("100", "360").replace('"hidden_size": 32', '"hidden_size": 48'))
    message = refused(place, "--model.path", "small", "--out", "refused")
    assert "small does not fit the model" in message and "model.embed_tokens.weight" in message
    assert "model.layers.0.self_attn.q_proj.weight" in message and message.endswith("  ... and 21 more")
    config.write_text(config.read_text().replace("qwen3_moe", "gpt9"))
    assert "model_type 'gpt9' is not implemented" in refused(place, "--model.path", "small", "--out", "refused")


def small_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))


def test_a_full_disk_is_said_and_the_run_can_go_on(place):
    message = refused(place, "--save-every", 4, "--out", "full", setup=small_disk)
    assert message.startswith("error: cannot write checkpoint full/checkpoints/step-4: File too large")
    assert "MB free" in message and not list((place / "full").glob("checkpoints/*"))
    run(place, *BASE, "--out", "full")
    assert learned(place / "full") == learned(place / "first")
    same_state(place / "full", place / "first")


def test_data_of_other_kinds_and_shapes(place):
    """A table with columns of its own, and plain text; the run says what it recognised."""
    rows_of = [f"Add {i} to 2.,{i + 2}" for i in range(30)]
    (place / "quiz.csv").write_text("question,answer\n" + "\n".join(rows_of))
    (place / "notes.txt").write_text("Add 1 to 2. " * 40)
    quiz = ("--data.train", "quiz.csv", "--data.eval", "quiz.csv", "--answers", 2)
    quiz += ("--data.columns", "prompt=question", "completion=answer")
    printed = run(place, *BASE, "--steps", 3, *quiz, "--out", "quiz")
    assert (
        "training data: quiz.csv: 30 rows of shape prompt_completion" in printed and "of 2 answers are exact" in printed
    )
    assert rows(place / "quiz")[-1]["trained_tokens"] > 0
    notes = ("--data.train", "notes.txt", "--data.eval", "notes.txt", "--batch", 1)
    printed = run(place, *BASE, "--steps", 3, *notes, "--out", "notes")
    assert "training data: notes.txt: 1 rows of shape text" in printed
    last = rows(place / "notes")[-1]
    assert last["trained_tokens"] == last["tokens"] and "eval_loss" in last
    printed = run(place, "--model.path", "moe", *SHORT[:-6], "--data.train", "train.jsonl", "--data.split", 0.2,
                  "--answers", 3, "--out", "split")  # fmt: skip
    kept = int(re.search(r"train.jsonl: (\d+) rows of shape messages", printed)[1])
    assert 40 <= kept < 60 and "of 3 answers are exact" in printed and "eval_loss" in rows(place / "split")[-1]
    flags = ("--data.train", "train.jsonl", "--data.eval", "--data.split", 0.999999, "--out", "never")
    message = "--data.split 0.999999 holds out all of so few rows; use a smaller share"
    assert message in refused(place, *flags)
    assert "--data.split 0.2: a share" in refused(place, "--data.split", 0.2, "--out", "never", status=2)
    mix = "datasets:\n- {path: quiz.csv, columns: [prompt=question, completion=answer], weight: 0.5, limit: 10}\n"
    (place / "mix.yaml").write_text(mix + "- {path: train.jsonl, type: messages}\n")
    flags = ("--data.train", "mix.yaml", "notes.txt", "--data.weights", 2, 0.25, "--out", "mixed")
    printed = run(place, *BASE, "--steps", 0, "--epochs", 1, *flags)
    assert "mix.yaml" not in printed and "quiz.csv: 10 rows of shape prompt_completion\n" in printed
    assert "train.jsonl: 60 rows of shape messages, weight 2" in printed
    assert "notes.txt: 1 rows of shape text, weight 0.25" in printed
    (place / "mix.yaml").write_text("datasets: [{path: quiz.csv, wieght: 2}]")
    assert "did you mean datasets[0].weight" in refused(place, *flags[:2], "--out", "never")
    assert "3 for 2 of --data.train" in refused(place, *flags[:6], 1, "--out", "never", status=2)
    assert "--answers 2: no held-out conversation to answer" in refused(place, *notes, "--answers", 2, "--out", "never")


def test_weights_alone_are_taken_from_another_run(place):
    """With a step that is too small to change them; the optimizer and the step number are new."""
    still = ("--optim.name", "lion", "--optim.lr", 1e-30, "--optim.weight-decay", 0, "--steps", 1)
    before, _ = state(place / "first")
    for number, source in enumerate(("first", "first/checkpoints/step-4")):
        run(place, *BASE, *still, "--init-from", source, "--out", f"again-{number}")
        after, extra = state(place / f"again-{number}")
        assert extra["step"] == 1 and int(after["updates"]) == 1
        params = {path for path in after if path.startswith("params/")}
        wanted = before if number == 0 else sft_runs.tensors(place / source)
        assert params and all(torch.equal(after[path], wanted[path]) for path in params)
    assert "--init-from nothing: no checkpoint there" in refused(place, "--init-from", "nothing", "--out", "never")
    shutil.copytree(place / "first", place / "source")
    begun = (*BASE, "--init-from", "source", "--save-every", 2, "--out", "begun")
    run(place, *begun)
    whole = learned(place / "begun")
    for gone in ("begun/checkpoints/step-6", "source"):
        shutil.rmtree(place / gone)
    for more in ((), ("--resume", "begun/checkpoints/step-4")):
        assert "resumed from begun/checkpoints/step-4" in run(place, *begun, *more)
        assert learned(place / "begun") == whole
    other = ("--model.path", "dense", "--init-from", "first", "--out", "never")
    assert "does not fit the model" in run(place, *BASE, *other, status=1)


@pytest.mark.parametrize("moments", ["bfloat16", "8bit"])
def test_several_optimizers_frozen_parameters_and_an_average(place, moments):
    """A run that is stopped and resumed ends as the whole one; hf/ and hf-ema/ are what transformers loads."""
    groups = ("--optim.groups", "embed -> frozen", "layers/.*/router -> lion lr=1e-3")
    flags = (*LONG, "--optim.name", "muon", *groups, "--optim.moments", moments, "--optim.ema", "0.5")
    run(place, *flags, "--out", f"mixed-{moments}")
    started = start(place, *flags, "--out", f"part-{moments}")
    until(lambda: steps_done(place / f"part-{moments}") >= 2, started.process)
    os.kill(started.process.pid, signal.SIGINT)
    assert started.wait() == 0 and "the same command continues from there" in started.output
    run(place, *flags, "--out", f"part-{moments}")
    same_state(place / f"part-{moments}", place / f"mixed-{moments}")
    tensors, _ = state(place / f"mixed-{moments}")
    exported, average, first = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
        for path in (*(place / f"mixed-{moments}" / name for name in ("hf", "hf-ema")), place / "moe")
    )
    same = {k for k in first if torch.equal(exported[k], first[k])}
    assert same == {"model.embed_tokens.weight"} == {k for k in first if torch.equal(average[k], exported[k])}
    gate = "model.layers.0.mlp.gate.weight"
    assert torch.equal(average[gate], tensors["moments/layers/0/moe/router/ema"])
    kept = {path.split("/")[-1] for path in tensors if path.startswith("moments/layers/0/attn/q/")}
    assert kept == ({"mu", "ema"} if moments == "bfloat16" else {"mu_code", "mu_most", "ema"})
    assert not [path for path in tensors if path.startswith("moments/embed")]


def test_wrong_optimizer_groups_are_said(place):
    assert "no parameter has such a path" in refused(place, "--optim.groups", "embd -> frozen", "--out", "never")
    assert "not 'adamm'" in refused(place, "--optim.groups", "embed -> adamm", "--out", "never", status=2)
    assert not (place / "never" / "metrics.jsonl").exists()


def nobody() -> None:
    import torch._inductor  # noqa: F401 (this user may not read the interpreter's folder)

    if os.geteuid() == 0:
        os.seteuid(65534)


def test_a_read_only_folder_is_said(place):
    (place / "locked").mkdir(mode=0o555)
    message = refused(place, "--out", "locked/run", setup=nobody)
    assert "locked/run" in message and "Permission denied" in message


def test_sources_with_epochs_end_and_are_held_out_by_name(place):
    few = "datasets:\n- {path: train.jsonl, epochs: 1, limit: 20}\n- {path: eval.jsonl, epochs: 2, weight: 2}\n"
    (place / "few.yaml").write_text(few)
    flags = ("--model.path", "moe", *SHORT[:-6], "--data.train", "few.yaml", "--data.split", 0.3, "--samples", 1)
    message = run(place, *flags, "--steps", 99, "--out", "ends", status=1)
    most = int(re.search(r"--steps 99: the epochs of all datasets are over after (\d+)", message)[1])
    printed = run(place, *flags, "--steps", most, "--out", "ended")
    assert "train.jsonl: " in printed and ", epochs 1\n" in printed and ", weight 2, epochs 2\n" in printed
    last = rows(place / "ended")[-1]
    assert last["step"] == most and last["eval_losses"].keys() == {"train", "eval"}


def test_workers_and_a_warm_cache_change_nothing(place):
    run(place, *BASE, "--data.workers", 2, "--data.cache", "cache", "--out", "worked")
    assert learned(place / "worked") == learned(place / "first")
    whole = {path: path.stat().st_mtime_ns for path in (place / "cache").rglob("*.bin")}
    run(place, *BASE, "--data.cache", "cache", "--out", "warm")
    assert learned(place / "warm") == learned(place / "first") and len(whole) == 6
    assert {path: path.stat().st_mtime_ns for path in (place / "cache").rglob("*.bin")} == whole


def test_without_packing_every_width_trains(place):
    """Documents of similar length share a batch; its width is one of four, and the loss is that of packed rows."""
    run(place, *BASE, "--data.packing", "none", "--data.seq-len", 256, "--out", "unpacked")
    padding = [row["padding"] for row in rows(place / "unpacked")]
    assert max(padding) < 0.8 and len(set(row["tokens"] for row in rows(place / "unpacked"))) > 1


def test_one_file_held_out_in_two_ways_counts_twice(place):
    """Each has a loss of its own, and the questions come from the one that asks."""
    both = "datasets:\n- {path: both.jsonl, type: text}\n- {path: both.jsonl, type: prompt_completion}\n"
    rows_of = [{"text": f"Add {i} to 2.", "prompt": f"Add {i} to 2.", "completion": str(i + 2)} for i in range(40)]
    (place / "both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of))
    (place / "both.yaml").write_text(both)
    flags = ("--model.path", "moe", *SHORT[:-6], "--steps", 3, "--data.train", "both.yaml", "--data.split", 0.3)
    printed = run(place, *flags, "--answers", 3, "--out", "both")
    names = rows(place / "both")[-1]["eval_losses"].keys()
    assert [name.endswith(f"both.jsonl ({i})") for i, name in enumerate(names, 1)] == [True, True]
    assert "of 3 answers are exact" in printed
    assert "--data.type and --data.columns say how" in run(place, "--data.type", "text", "--out", "no", status=2)
