"""The preference recipe as a user runs it: every loss learns, both references agree, resuming, ranks, bad input."""

import json
import os
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

from experiments.preference import Options
from functional_trainer import config
from tests.experiments import sft_runs
from tests.experiments.sft_runs import learned, rows, same_state, state
from tests.test_docs_facts import cells

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
run = partial(sft_runs.run, recipe="preference")
run_ranks = partial(sft_runs.run_ranks, recipe="preference")
DATA = ("--data.train", "train.jsonl", "--data.eval", "eval.jsonl", "--data.seq-len", 128, "--data.cache", "cache")
BASE = ("--model.path", "moe", *DATA, "--batch", 4, "--steps", 8, "--compile", "off", "--optim.lr", 5e-3)
BASE += ("--eval-every", 4, "--save-every", 4, "--keep", 9, "--samples", 0)
EXACT = (*BASE, "--dtype", "float64")


def preferences(path: Path, count: int, first: int = 0) -> Path:
    """Write pairs of which the chosen answer is of early letters, the rejected one of late ones."""
    lines = []
    for i in range(first, first + count):
        words = ["".join("abcdefgh"[(i * k + j) % 8] for j in range(2 + i % 4)) for k in (3, 5)]
        late = words[1].translate(str.maketrans("abcdefgh", "stuvwxyz"))
        lines.append(json.dumps({"prompt": f"Say {i}.", "chosen": words[0], "rejected": late}) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model and data, and runs `live` and `precomputed` of MPO."""
    place = tmp_path_factory.mktemp("preference")
    sft_runs.folder(place / "moe")
    preferences(place / "train.jsonl", 60)
    preferences(place / "eval.jsonl", 8, 1000)
    for reference in ("live", "precomputed"):
        run(place, *BASE, "--loss-type", "mpo", "--reference", reference, "--out", reference)
    return place


def losses(out: Path, name="loss") -> torch.Tensor:
    return torch.tensor([row[name] for row in rows(out)], dtype=torch.float64)


def margin(place: Path, folder: Path) -> float:
    """Return how much more likely chosen than rejected answers to held-out prompts are, by transformers alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    total = 0.0
    for line in (place / "eval.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, sign in (("chosen", 1), ("rejected", -1)):
            prompt = [{"role": "user", "content": row["prompt"]}]
            begin = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
            chat = [*prompt, {"role": "assistant", "content": row[name]}]
            ids = torch.tensor([tokenizer.apply_chat_template(chat)["input_ids"]])
            end = int((ids[0] == tokenizer.eos_token_id).nonzero()[-1]) + 1
            with torch.no_grad():
                logp = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
            total += sign * float(logp[begin - 1 : end - 1].sum())
    return total / 8


def test_it_learns_what_is_preferred_also_held_out(place):
    found = rows(place / "live")
    assert found[0]["rewards/margins"] == pytest.approx(0, abs=1e-6), "it begins as the reference"
    assert found[-1]["rewards/accuracies"] > 0.9 and found[-1]["rewards/margins"] > 0.05
    assert found[-1]["eval_loss"] < found[3]["eval_loss"] < 0.693
    before, after = (margin(place, place / name) for name in ("moe", "live/hf"))
    assert after > before + 1
    assert {"dpo", "bco", "sft", "balance", "pairs", "logps/chosen", "logps/rejected"} <= found[0].keys()


def test_both_references_give_the_same_run(place):
    assert len(list((place / "cache").glob("reference-*.npy"))) == 2
    for live, kept in zip(learned(place / "live"), learned(place / "precomputed"), strict=True):
        assert live.keys() == kept.keys()
        for name in live.keys() - {"load", "rewards/accuracies", "grad_norms", "weight_norms", "mfu"}:
            assert live[name] == pytest.approx(kept[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("reference", ["live", pytest.param("precomputed", marks=pytest.mark.slow)])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(place, reference):
    """BCO's running mean comes back with the checkpoint, the reference from the weights at the start."""
    flags = (*BASE, "--loss-type", "mpo", "--reference", reference)
    run(place, *flags, "--resume", f"{reference}/checkpoints/step-4", "--out", f"{reference}-on")
    assert learned(place / f"{reference}-on") == learned(place / reference)[4:]
    same_state(place / f"{reference}-on", place / reference)
    mean, count = state(place / reference)[0]["buffers/bco"].tolist()
    pairs = [row["pairs"] for row in rows(place / reference)]
    assert count == 2 * sum(pairs) and mean != 0


BROKEN = [
    ('{"prompt": "q", "chosen": "a", "rejected": "a"}\n', (), "bad.jsonl:1: 'chosen' and 'rejected' are the same"),
    ('{"prompt": "q", "completion": "a", "label": true}\n', (), "are for --loss-type kto"),
    ("", ("--data.overlong", "split"), "split: set overlong to 'truncate' or 'drop' (--data.overlong)"),
    ("", ("--loss-type", "kto", "--micro-batch", 2), "KTO): it needs micro_batches = 1 (--micro-batch 0)"),
    ("", ("--data.seq-len", 16), "raise seq_len (--data.seq-len) or change overlong (--data.overlong)"),
]


@pytest.mark.parametrize(("lines", "flags", "message"), BROKEN)
def test_what_is_wrong_is_said_once(place, lines, flags, message):
    (place / "bad.jsonl").write_text(lines)
    data = ("--data.train", "bad.jsonl") if lines else ()
    printed = run(place, *BASE, *data, *flags, "--out", "bad", status=1)
    assert printed.count("error: ") == 1 and "Traceback" not in printed and message in printed, printed


WRONG = {
    ("--beta", "0"): "--beta is 0.0; it must be above 0",
    ("--loss-type", "mpo", "sft"): "name at least one, each once; mpo is a mixture already",
    ("--loss-type", "kto", "sft"): "kto not of pairs",
    ("--loss-type", "sft", "sft"): "each once",
    ("--loss-type", "mpo", "--loss-weights", "1"): "--loss-type mpo has its own",
    ("--loss-weights", "1", "2"): "--loss-weights 1.0 2.0: --loss-type sigmoid needs 1",
    ("--loss-type", "ipo", "--label-smoothing", "0.1"): "--label-smoothing has no effect with --loss-type ipo, only",
    ("--desirable-weight", "2"): "--desirable-weight has no effect with --loss-type sigmoid, only with kto",
    ("--loss-type", "sft", "--beta", "0.2"): "--beta has no effect with --loss-type sft, only with sigmoid, ipo, bco",
    ("--label-smoothing", "1"): "--label-smoothing is 1.0; it must be at least 0 and below 1",
    ("--loss-type", "dpo"): "sigmoid",
}


@pytest.mark.parametrize("flags", WRONG, ids=str)
def test_options_that_do_not_fit_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        config.cli(Options, doc="", argv=list(flags))
    said = re.sub(r"[│╭╮╰╯─\s]+", " ", "".join(capsys.readouterr()))
    assert stopped.value.code == 2 and WRONG[flags] in said


def test_names_of_losses_are_trls():
    assert Options(loss_type=("mpo",)).terms == {"dpo": 0.8, "bco": 0.2, "sft": 1.0}
    mixed = ("sigmoid", "bco_pair", "sft")
    assert Options(loss_type=mixed, loss_weights=(0.8, 0.2, 1.0)).terms == Options(loss_type=("mpo",)).terms
    assert Options(loss_type=("ipo", "sft")).terms == {"ipo": 1.0, "sft": 1.0}


# the page ------------------------------------------------------------------------------------------------------------


def test_the_page_has_every_key_of_a_run_that_the_glossary_has_not(place):
    glossary = {key for row in cells("metrics.md") for key in re.findall(r"^`([^`/]+)[`/]", row[0])}
    entries = {key for row in cells("preference.md") if len(row) == 3 for key in re.findall(r"`([^`]+)`", row[0])}
    entries -= {"preference", "unpaired", "sigmoid", "bco_pair", "mpo"}
    assert {*rows(place / "live")[-1]} - glossary - {"time"} <= entries
    assert entries == {"dpo", "ipo", "bco", "sft", "kto", "pairs", "kl"} | {
        *(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")),
        *(f"logps/{name}" for name in ("chosen", "rejected")),
    }


# the others take longer ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--loss-type", "sigmoid"), ("--loss-type", "sigmoid", "--label-smoothing", 0.1), ("--loss-type", "ipo"),
        ("--loss-type", "bco_pair"), ("--loss-type", "kto"),
        ("--loss-type", "sigmoid", "sft", "--loss-weights", 1, 0.5),
    ],
    ids=str,
)  # fmt: skip
def test_every_loss_learns(place, flags):
    out = "-".join(map(str, flags)).replace("--", "")
    run(place, *BASE, *flags, "--steps", 16, "--out", out)
    found = rows(place / out)
    apart = [row["rewards/chosen"] - row["rewards/rejected"] for row in found]
    assert apart[0] == pytest.approx(0, abs=1e-6) and apart[-1] > 0.05
    assert found[-1].get("rewards/accuracies", 1) > 0.9 and ("kl" in found[-1]) == ("kto" in flags)
    assert found[-1]["eval_loss"] < found[3]["eval_loss"]
    assert margin(place, place / out / "hf") > margin(place, place / "moe") + 1


@pytest.mark.slow
def test_answers_by_themselves_train_kto(place):
    lines = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    both = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for name in ("chosen", "rejected")
        for row in lines
    ]
    (place / "unpaired.jsonl").write_text("".join(json.dumps(row) + "\n" for row in both[5:]))
    flags = ("--loss-type", "kto", "--desirable-weight", 1.2, "--data.train", "unpaired.jsonl", "--steps", 16)
    printed = run(place, *BASE, *flags, "--out", "unpaired")
    assert "unpaired.jsonl: 115 rows of shape unpaired" in printed
    assert margin(place, place / "unpaired" / "hf") > margin(place, place / "moe") + 1


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["live", "precomputed"])
@pytest.mark.parametrize("loss", ["mpo", "kto"])
def test_two_processes_learn_the_same(place, loss, reference):
    flags = (*EXACT, "--loss-type", loss, "--reference", reference)
    name = f"{loss}-{reference}"
    run(place, *flags, "--out", name)
    for mesh in ("fsdp=2", "ep=2", "cp=2", "tp=2"):
        for file in (place / "cache").glob("reference-*.npy"):
            file.unlink()
        run_ranks(place, 2, *flags, "--mesh", mesh, "--out", f"{name}-{mesh}")
        for column in ("loss", "rewards/chosen", "rewards/rejected"):
            ours, theirs = (losses(place / out, column) for out in (f"{name}-{mesh}", name))
            assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-10), (mesh, column)
        a, b = (state(place / out)[0] for out in (f"{name}-{mesh}", name))
        assert all(torch.allclose(a[k], b[k], rtol=1e-8, atol=1e-10) for k in b if k.startswith(("params", "buffers")))


@pytest.mark.slow
def test_weights_have_one_checksum_on_every_mesh(place):
    flags = (*EXACT, "--reference", "precomputed", "--data.cache", "shared", "--steps", 1)
    assert "kept in" in run(place, *flags, "--out", "one")
    assert "kept in" not in run_ranks(place, 2, *flags, "--mesh.fsdp", 2, "--out", "two")


@pytest.mark.slow
def test_no_result_depends_on_the_split(place):
    for reference in ("live", "precomputed"):
        for size in (0, 1, 2):
            flags = ("--reference", reference, "--loss-type", "mpo", "--micro-batch", size)
            run(place, *EXACT, *flags, "--out", f"split-{reference}-{size}")
    first = losses(place / "split-live-0")
    for out in place.glob("split-*"):
        assert torch.allclose(losses(out), first, rtol=1e-10, atol=0), out


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["live", "precomputed"])
def test_a_killed_run_goes_on_with_the_weights_of_init_from(place, reference):
    """The reference is what --init-from gave, also when the run is resumed."""
    flags = (*BASE, "--init-from", "live/checkpoints/step-4", "--reference", reference, "--save-every", 1)
    run(place, *flags, "--out", f"whole-{reference}")
    out = place / f"killed-{reference}"
    started = sft_runs.start(place, *flags, "--out", out.name, recipe="preference")
    while not (out / "checkpoints" / "step-2").exists() and started.process.exitcode is None:
        time.sleep(0.005)
    os.kill(started.process.pid, signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL, started.output
    assert "resumed from" in run(place, *flags, "--out", out.name)
    assert learned(out) == learned(place / f"whole-{reference}")
    same_state(out, place / f"whole-{reference}")
    assert rows(out)[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_the_shipped_tasks_are_the_default_and_compile(place):
    printed = run(place, "--steps", 2, "--batch", 2, "--answers", 3, "--out", "tasks")
    assert "20,000 rows of shape preference" in printed and "compile layer; reference live" in printed
    assert "of 3 answers are exact" in printed
    assert {"config.yaml", "metrics.jsonl", "samples.jsonl", "index.html", "hf", "data"} <= {
        *os.listdir(place / "tasks")
    }


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--remat", "layer"), ("--data.packing", "none"), ("--data.split", 0.2)], ids=str)
def test_it_has_what_supervised_fine_tuning_has(place, flags):
    data = BASE if "--data.split" not in flags else tuple(x for x in BASE if x not in ("--data.eval", "eval.jsonl"))
    run(place, *data, *flags, "--out", "has" + flags[0])
    assert rows(place / ("has" + flags[0]))[-1]["rewards/accuracies"] > 0.8
