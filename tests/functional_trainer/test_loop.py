"""functional_trainer.loop: claiming a run folder, stopping, the held-out loss, and what the loop does around a step."""

import json
import os
import signal
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_trainer import checkpoint, losses, optimizers, param, tree
from functional_trainer.data import Loader
from functional_trainer.data.packing import Documents
from functional_trainer.loop import claim, eval_losses, stoppable, train
from functional_trainer.options import DataOptions, RunOptions
from functional_trainer.state import TrainState, init_state
from functional_trainer.types import ONE_DEVICE, Output, Unembed

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Options(RunOptions):
    data: DataOptions = field(default_factory=DataOptions)


@dataclass(frozen=True)
class Model:
    """Hidden states are rows of the embedding, which is the unembedding too."""

    specs = {"embed": param.Param((7, 4), "V,D")}

    class config:
        windows = ()

    def apply(self, params, batch, shard=ONE_DEVICE, buffers=None):
        return Output(params["embed"][batch["tokens"]], {})

    def unembed(self, params, shard=ONE_DEVICE):
        return Unembed(params["embed"])


MODEL = Model()


def loader(count: int = 6, **options) -> Loader:
    generator = np.random.default_rng(0)
    pairs = []
    for _ in range(count):
        length = int(generator.integers(3, 9))
        trained = generator.random(length) < 0.6
        pairs.append((generator.integers(0, 7, length).tolist(), [*trained[:-1].tolist(), True]))
    documents = Documents.of(pairs)
    return Loader(documents, **{"rows": 2, "seq_len": 10, **options})


def fresh() -> TrainState:
    embed = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    return init_state({"embed": embed}, optimizers.adamw(optimizers.schedule("constant", 1e-2, 10)))


def counting(bad: tuple[int, ...] = (), at: dict | None = None):
    """Make a step that adds one to the parameters, but in the steps of `bad`; `at` calls functions before steps."""

    def step(state, batch):
        number = int(state.step) + 1
        (at or {}).get(number, lambda: None)()
        state.step.add_(1)
        state.skipped.copy_(state.skipped + 1 if number in bad else torch.zeros_like(state.skipped))
        if number not in bad:
            state.params["embed"].add_(1)
        return state, {"loss": torch.tensor(1.0 / number), "skipped": state.skipped.clone()}

    return step


def go(options: Options, step, steps: int = 6, **more) -> tuple[TrainState, bool]:
    resume = claim(options)
    return train(
        step, fresh(), loader(), model=MODEL, loss=losses.sft("none"), options=options, total_steps=steps, device=CPU,
        resume=resume, **more,
    )  # fmt: skip


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def saved(out: Path) -> list[str]:
    return sorted(os.listdir(out / "checkpoints"), key=lambda name: int(name.removeprefix("step-")))


# Claiming.


def test_a_new_folder_is_claimed_with_its_config(tmp_path):
    options = Options(out=str(tmp_path / "new" / "run"))
    assert claim(options) is None
    assert "seq_len: 256" in (tmp_path / "new" / "run" / "config.yaml").read_text()
    assert claim(replace(options, batch=7)) is None  # no step was made: it may still change


def test_a_folder_is_not_claimed_for_a_run_that_weights_and_biases_refuses(tmp_path, monkeypatch):
    """Its own client, which has no key here."""
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    options = Options(out=str(tmp_path / "run"), wandb="project")
    with pytest.raises(ValueError, match="--wandb project: .*[Ll]og ?in"):
        claim(options)
    assert not (tmp_path / "run").exists() and claim(options, main=False) is None
    wandb.teardown()  # it reads its variables once
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(ValueError, match="--wandb a/b%: .*Invalid project name"):
        claim(replace(options, wandb="a/b%"))
    assert claim(options) is None
    wandb.teardown()


def test_other_ranks_write_nothing(tmp_path):
    assert claim(Options(out=str(tmp_path / "run")), main=False) is None
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_continued_by_the_same_options_only(tmp_path):
    options = Options(out=str(tmp_path), save_every=2, steps=6)
    go(options, counting(), steps=4)
    assert claim(options) == tmp_path / "checkpoints" / "step-4"
    same = replace(options, keep=9, save_every=1, device="cpu", micro_batch=2, remat="layer", compile="off")
    assert claim(same) == tmp_path / "checkpoints" / "step-4"
    other = replace(options, seed=3, data=DataOptions(seq_len=99, train=("a.jsonl", "b.jsonl")))
    with pytest.raises(ValueError, match=r"holds another run \(.*seed was 0, is 3.*--data.seq-len was 256, is 99"):
        claim(other)
    with pytest.raises(ValueError, match="--data.train was empty, is a.jsonl b.jsonl;"):
        claim(other)
    with pytest.raises(ValueError, match="already holds a run; choose another --out, or --resume auto"):
        claim(replace(options, resume="never"))
    assert "keep: 9" in (tmp_path / "config.yaml").read_text() and "seed: 0" in (tmp_path / "config.yaml").read_text()


def test_a_named_checkpoint_or_run_is_resumed(tmp_path):
    first = Options(out=str(tmp_path / "first"), save_every=2)
    go(first, counting(), steps=4)
    second = replace(first, out=str(tmp_path / "second"), seed=5)
    named = replace(second, resume=str(tmp_path / "first" / "checkpoints" / "step-2"))
    assert claim(named) == tmp_path / "first" / "checkpoints" / "step-2"
    assert claim(replace(named, resume=first.out)) == tmp_path / "first" / "checkpoints" / "step-4"
    for nothing in ("first/checkpoints/step-3", "first/checkpoints", "nowhere"):
        with pytest.raises(ValueError, match=f"--resume .*{nothing}: no checkpoint there; wanted"):
            claim(replace(named, resume=str(tmp_path / nothing)))
    go(second, counting(), steps=2)
    with pytest.raises(ValueError, match="second already holds a run"):
        claim(named)
    with pytest.raises(ValueError, match="--init-from other has no effect: --resume .* brings its own weights"):
        claim(replace(named, out=str(tmp_path / "third"), init_from="other"))
    back = replace(first, resume=str(tmp_path / "first" / "checkpoints" / "step-2"))
    assert claim(back) == tmp_path / "first" / "checkpoints" / "step-2"


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--out .*file/run cannot be written: Not a directory; choose another folder"):
        claim(Options(out=str(tmp_path / "file" / "run")))


# Stopping.


def test_the_first_signal_asks_and_the_second_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with stoppable() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_ends_the_step_saves_and_says_so(tmp_path, capsys):
    options = Options(out=str(tmp_path), save_every=0)
    state, finished = go(options, counting(at={3: lambda: os.kill(os.getpid(), signal.SIGINT)}))
    assert not finished and 3 <= int(state.step) <= 4  # the signal counts from the next step's beginning
    assert saved(tmp_path) == [f"step-{int(state.step)}"]
    assert f"stopped after step {int(state.step)} of 6; the same command continues" in capsys.readouterr().out
    state, finished = go(options, counting())
    assert finished and torch.allclose(state.params["embed"], fresh().params["embed"] + 6)


# The loop.


def test_checkpoints_come_as_often_as_asked_and_at_the_end(tmp_path):
    for every, keep, wanted in ((2, 9, [2, 4, 5]), (1, 2, [4, 5]), (0, 2, [5]), (5, 1, [5])):
        out = tmp_path / f"{every}-{keep}"
        go(Options(out=str(out), save_every=every, keep=keep), counting(), steps=5)
        assert saved(out) == [f"step-{n}" for n in wanted]
        assert [row["step"] for row in rows(out)] == [1, 2, 3, 4, 5]


def test_checkpoints_written_behind_are_those_that_were_waited_for(tmp_path):
    for saving in ("async", "wait"):
        go(Options(out=str(tmp_path / saving), save_every=1, keep=9, saving=saving), counting(), steps=5)
    assert saved(tmp_path / "async") == saved(tmp_path / "wait") == [f"step-{n}" for n in range(1, 6)]
    for name in saved(tmp_path / "wait"):
        both = [tmp_path / saving / "checkpoints" / name for saving in ("async", "wait")]
        ours, theirs = (checkpoint.load(path, tree.flatten(fresh())) for path in both)
        assert ours[1] == theirs[1] and all(torch.equal(t, theirs[0][p]) for p, t in ours[0].items())


def test_the_data_goes_on_where_it_was(tmp_path):
    def tokens(name: str, *ends: int) -> list[list]:
        seen: list[list] = []

        def step(state, batch):
            seen.append(batch["tokens"].tolist())
            return counting()(state, batch)

        for end in ends:
            go(Options(out=str(tmp_path / name)), step, steps=end)
        return seen

    assert tokens("parts", 2, 5, 9) == tokens("whole", 9)


def test_skipped_steps_change_nothing_and_too_many_in_a_row_stop(tmp_path, capsys):
    go(Options(out=str(tmp_path / "few"), max_skipped=3), counting(bad=(2, 3, 5)))
    assert [row["skipped"] for row in rows(tmp_path / "few")] == [0, 1, 2, 0, 1, 0]
    assert "step 3: the gradient is not finite, nothing was changed (2 in a row)" in capsys.readouterr().out
    options = Options(out=str(tmp_path / "many"), max_skipped=3, save_every=2)
    with pytest.raises(RuntimeError, match=r"gradients of 3 steps in a row, up to 5, .* is .*many/checkpoints/step-4"):
        go(options, counting(bad=(3, 4, 5)))
    with pytest.raises(RuntimeError, match="look at the data there; there is no checkpoint yet"):
        go(replace(options, out=str(tmp_path / "none"), save_every=0), counting(bad=(1, 2, 3)))


def test_a_checkpoint_past_the_end_is_refused(tmp_path):
    go(Options(out=str(tmp_path)), counting(), steps=4)
    with pytest.raises(ValueError, match="step-4 is at step 4, the run would end at 3: raise --steps or --epochs"):
        go(Options(out=str(tmp_path)), counting(), steps=3)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-4" and len(rows(tmp_path)) == 4


def test_the_held_out_loss_is_the_mean_over_all_trained_tokens(tmp_path):
    held_out, params = loader(9, epochs=1, shuffle=False), fresh().params
    total = weight = 0.0
    for batch in loader(9, epochs=1, shuffle=False):
        logp = (params["embed"][batch["tokens"]] @ params["embed"].T).log_softmax(-1)
        total -= (logp.gather(-1, batch["targets"][..., None])[..., 0] * batch["weights"]).sum().item()
        weight += batch["weights"].sum().item()
    given = (MODEL, losses.sft("none"), params, {"all": held_out}, {}, ONE_DEVICE, CPU)
    for _ in range(2):
        found, by_source = eval_losses(*given)
        assert found == by_source["all"] == pytest.approx(total / weight, rel=1e-6)
    go(Options(out=str(tmp_path), eval_every=2), counting(), steps=5, held_out={"all": held_out})
    assert [row["step"] for row in rows(tmp_path) if "eval_loss" in row] == [2, 4, 5]
    assert not any("eval_losses" in row for row in rows(tmp_path))


def test_held_out_losses_by_source_weigh_by_trained_tokens(tmp_path):
    parts = {"few": loader(3, epochs=1, shuffle=False), "many": loader(9, epochs=1, shuffle=False, seq_len=5)}
    go(Options(out=str(tmp_path), eval_every=3), counting(), steps=3, held_out=parts)
    (row,) = [row for row in rows(tmp_path) if "eval_losses" in row]
    weights = {name: part.pieces.stats["trained_tokens"] for name, part in parts.items()}
    mean = sum(row["eval_losses"][name] * n for name, n in weights.items()) / sum(weights.values())
    assert row["eval_losses"].keys() == weights.keys() and row["eval_loss"] == pytest.approx(mean, rel=1e-6)
    params = {"embed": fresh().params["embed"] + 3}
    alone, _ = eval_losses(MODEL, losses.sft("none"), params, {"few": parts["few"]}, {}, ONE_DEVICE, CPU)
    assert row["eval_losses"]["few"] == pytest.approx(alone, rel=1e-6)
    assert row["weight_norms"] == {"embed": pytest.approx(float(params["embed"].norm()), rel=1e-6)}


def test_samples_are_kept_once_a_step(tmp_path):
    def sample(params):
        return [{"question": "q", "given": f"{params['embed'].sum():.3f}"}]

    options = Options(out=str(tmp_path), eval_every=2, save_every=3)
    go(options, counting(), steps=5, sample=sample)
    (tmp_path / "checkpoints" / "step-5").rename(tmp_path / "step-5")  # as if killed before it was saved
    go(options, counting(), steps=6, sample=sample)
    written = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == [2, 4, 6]
    assert written[2]["samples"][0]["given"] == f"{fresh().params['embed'].sum() + 6 * 28:.3f}"


def test_padding_is_the_share_of_places_without_a_token(tmp_path):
    go(Options(out=str(tmp_path)), counting(), steps=3)
    for row, batch in zip(rows(tmp_path), loader(), strict=False):
        assert row["padding"] == pytest.approx(float((batch["segment_ids"] == 0).float().mean()))


# The best checkpoint.


def scaled(factors: list[float], fail: int = 0):
    """Make a step that multiplies the first embedding by its own factor, and raises at step `fail`."""

    def step(state, batch):
        number = int(state.step) + 1
        if number == fail:
            raise InterruptedError
        state.step.add_(1)
        state.params["embed"].copy_(fresh().params["embed"] * factors[number - 1])
        return state, {"loss": torch.tensor(1.0), "skipped": state.skipped.clone()}

    return step


FACTORS = st.lists(st.sampled_from([-2.0, 0.0, 0.25, 0.5, 1.0, float("nan")]), min_size=1, max_size=7)


@settings(max_examples=15)
@given(FACTORS, st.integers(1, 7), st.integers(0, 3), st.integers(1, 2))
def test_the_best_checkpoint_is_that_of_the_lowest_held_out_loss_so_far(factors, fail, save_every, eval_every):
    """Also of a run that fails somewhere and is resumed; nan never wins, and the first of equals stays."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        options = Options(out=folder, keep_best=True, save_every=save_every, eval_every=eval_every, keep=1)
        for step in (scaled(factors, fail), scaled(factors)):
            with suppress(InterruptedError):
                go(options, step, steps=len(factors), held_out={"all": loader(9, epochs=1, shuffle=False)})
            seen = [(r["eval_loss"], r["step"]) for r in rows(out) if r.get("eval_loss") is not None]
            assert checkpoint.best_loss(out) == min(seen, default=(float("inf"),))[0]
            if seen:
                state = {path: torch.zeros_like(t) for path, t in tree.flatten(fresh()).items()}
                tensors, extra = checkpoint.load(out / "checkpoints" / "best", state)
                assert extra["step"] == int(tensors["step"]) == min(seen)[1]
                assert torch.equal(tensors["params/embed"], fresh().params["embed"] * factors[extra["step"] - 1])
        assert set(os.listdir(out / "checkpoints")) == {f"step-{len(factors)}"} | ({"best"} if seen else set())


def test_a_worse_run_does_not_replace_the_best_and_it_can_be_resumed(tmp_path):
    options = Options(out=str(tmp_path / "run"), keep_best=True, eval_every=1)
    held_out = {"all": loader(9, epochs=1, shuffle=False)}
    go(options, scaled([1.0, 0.25, 0.5]), steps=3, held_out=held_out)
    best = tmp_path / "run" / "checkpoints" / "best"
    back = replace(options, resume=str(best))
    assert claim(back) == best
    state, _ = go(back, scaled([1.0, 0.25, 1.0, 1.0]), steps=4, held_out=held_out)
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4] and int(state.step) == 4
    assert json.loads((best / "extra.json").read_text())["step"] == 2
    other = replace(back, out=str(tmp_path / "other"))
    go(other, scaled([1.0, 0.25, 0.5]), steps=3, held_out=held_out)
    assert [row["step"] for row in rows(tmp_path / "other")] == [3]
    with pytest.raises(ValueError, match="--keep-best needs held-out rows: give --data.eval or --data.split"):
        go(replace(other, out=str(tmp_path / "none"), resume="auto"), scaled([1.0]), steps=1)
