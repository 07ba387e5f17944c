"""The recipe of reinforcement learning with answers from servers: those of tests/functional_trainer/servers.py."""

from contextlib import ExitStack, closing

import pytest

import models
from experiments.qwen3_moe_grpo import Options
from functional_trainer import config
from tests.experiments import sft_runs
from tests.experiments.test_grpo import FLAGS
from tests.functional_trainer import servers


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("servers")
    sft_runs.folder(place / "model")
    return place


@pytest.fixture
def make(place):
    """Start servers of the model, with room for its prompts."""
    with ExitStack() as stack:

        def start(kind, **how):
            server = servers.KINDS[kind](*models.from_pretrained(place / "model"), length=90, **how)
            return stack.enter_context(closing(server))

        yield start


def asked(made):
    """Return the flags of a short run with these servers."""
    few = *FLAGS, "--answers", 0, "--samples", 0, "--rollout.slots", 4, "--steps", 2, "--batch", 2
    kind = type(made[0]).__name__.lower()
    return "--model.path", "model", *few, "--rollout.engine", kind, "--rollout.url", *(server.url for server in made)


def run(place, made, *flags, status=0):
    return sft_runs.run(place, *asked(made), *flags, recipe="qwen3_moe_grpo", status=status)


def test_two_servers_answer_with_the_weights_of_each_step(place, make):
    made = make("sglang"), make("sglang")
    run(place, made, "--out", "two", "--optim.lr", 1e-2, "--reward.functions", "length:3")
    rows = sft_runs.rows(place / "two")
    assert [row["sampling_logp_difference/mean"] < 1e-5 for row in rows] == [True] * 2
    assert min(server.answered for server in made) > 1 and sum(server.answered for server in made) == 2 * 8
    assert [server.version for server in made] == ["1", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--rollout.max-async-level", 2, "--rollout.in-flight-weight-updates")], ids=str)
def test_a_server_that_restarts_ends_no_run(place, make, flags):
    """It is away for a second in the middle of the third rollout, and comes back with the weights of the start."""
    server, started = make("vllm"), []
    model, params = models.from_pretrained(place / "model")
    server.faults.extend([lambda server: None] * 18 + [servers.die_and_come_back(1.0, params, started)])
    out = f"restarts-{len(flags)}"
    run(place, [server], "--steps", 4, "--optim.lr", 1e-2, "--reward.functions", "length:3", "--out", out, *flags)
    rows = sft_runs.rows(place / out)
    assert len(rows) == 4 and server.answered >= 16 and started[0].answered >= 8
    if not flags:
        assert [row["sampling_logp_difference/mean"] < 1e-5 for row in rows] == [True] * 4
    started[0].close()


@pytest.mark.slow
def test_servers_record_the_experts_that_are_replayed(place, make):
    replayed = "--rollout.routing-replay", "engine", "--steps", 3, "--optim.lr", 1e-2, "--reward.functions", "length:3"
    for kind in ("vllm", "sglang"):
        run(place, [make(kind, routes=True)], *replayed, "--out", f"replayed-{kind}")
        rows = sft_runs.rows(place / f"replayed-{kind}")
        assert [row["sampling_logp_difference/mean"] < 1e-5 for row in rows] == [True] * 3
    said = run(place, [make("vllm")], *replayed, "--out", "unrecorded", status=1)
    assert "no routed_experts; it must run with --enable-return-routed-experts" in said


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["memory", "disk"])
def test_two_processes_ask_and_one_sends_the_weights(place, make, sync):
    made, out = [make("vllm"), make("vllm")], f"mesh-{sync}"
    flags = "--rollout.sync", sync, "--mesh.fsdp", 2, "--optim.lr", 1e-2, "--reward.functions", "length:3"
    sft_runs.run_ranks(place, 2, *asked(made), *flags, "--out", out, recipe="qwen3_moe_grpo")
    assert [row["sampling_logp_difference/mean"] < 1e-5 for row in sft_runs.rows(place / out)] == [True] * 2
    assert sum(server.answered for server in made) == 2 * 8
    assert all(server.paths.count("/update_weight_version") == 2 for server in made)


@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 1])
def test_answers_of_servers_grow_from_rollout_to_rollout(place, make, level):
    made, out = [make("vllm"), make("sglang")][level:][:1], f"partial-{level}"
    flags = "--rollout.partial", 2, "--rollout.max-async-level", level, "--steps", 4, "--optim.lr", 1e-2
    run(place, made, *flags, "--reward.functions", "length:3", "--out", out)
    ages = [row["off_policy"] for row in sft_runs.rows(place / out)]
    assert any(age["waiting"] for age in ages) and not any(age["dropped"] for age in ages)
    assert ages[0]["max"] <= level + 1 and max(age["max"] for age in ages) > level
    assert made[0].answered > 4 * 8, "answers took more than one request"


def test_weights_that_arrive_wrong_are_found_before_the_first_step(place, make):
    server = make("vllm")
    server.load_folder = lambda folder: None  # it says that it has loaded them, and has others
    server.engine.update(server.model.init(7), 0)
    said = run(place, [server], "--rollout.sync", "disk", "--out", "wrong", status=1)
    assert "the rollout engine and the trainer disagree: their log-probabilities differ by" in said
    assert (place / "wrong" / "rollout-weights" / "model.safetensors").exists() and "Traceback" not in said


def test_no_server_is_one_message(place, make):
    server = make("vllm")
    server.close()
    said = run(place, [server], "--out", "none", status=1)
    assert f"no vllm server at {server.url} that can be trained with" in said and "Traceback" not in said
    assert "lmdeploy opens the memory of a GPU" in run(place, [make("lmdeploy")], "--out", "lmdeploy", status=1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("engine", "vllm"), "vllm and 0 of --rollout.url: servers and their addresses go together"),
        (("url", "http://a:1"), "local and 1 of --rollout.url"),
        (("engine", "vllm", "url", "a:1"), "--rollout.url a:1: it must be http://HOST:PORT"),
        (("sync", "disk"), "--rollout.sync has no effect with --rollout.engine local"),
        (("wait", "3"), "--rollout.wait has no effect with --rollout.engine local"),
        (("engine", "sglang", "url", "http://a:1", "compile", "step"), "--rollout.compile has no effect"),
        (("engine", "lmdeploy", "url", "http://a:1", "temperature", "0.5"), "goes with --rollout.temperature 1"),
        (("engine", "lmdeploy", "url", "http://a:1", "sync", "disk"), "--rollout.sync memory only"),
        (("engine", "vllm", "url", "http://a:1", "temperature", "0.5", "top-k", "3"), "other than 1 there is no top-k"),
        (("engine", "lmdeploy", "url", "http://a:1", "in-flight-weight-updates"), "does not say which weights a token"),
        (("engine", "lmdeploy", "url", "http://a:1", "routing-replay", "engine"), "lmdeploy records none that is read"),
        (("server-seconds", "3"), "--rollout.server-seconds has no effect with --rollout.engine local"),
        (("timeout", "-1"), "--rollout.timeout is -1.0; it must be at least 0"),
    ],
)
def test_what_does_not_go_together_is_refused(flags, message, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    words = [f"--rollout.{word}" if i % 2 == 0 else word for i, word in enumerate(flags)]
    with pytest.raises(SystemExit) as ended:
        config.cli(Options, doc="", argv=["--model.path", "model", *words])
    assert ended.value.code == 2 and message in "".join(capsys.readouterr())
