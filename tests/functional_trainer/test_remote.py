"""engines.remote: samples and weights over the wire protocols of three servers, and what goes wrong there.

The servers are those of servers.py; a real vLLM is in tests/vllm.
"""

import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

import models
from functional_trainer import routing, tree
from functional_trainer.engines import Sampling, remote
from functional_trainer.engines.local import LocalEngine
from functional_trainer.engines.remote import RemoteEngine
from tests.functional_trainer import servers
from tests.models import small

MODEL = small.model(small.MOE, initializer_range=0.5)
OLD, NEW = MODEL.init(0), MODEL.init(1)
PROMPTS = [[3, 1, 4, 1, 5, 9], [2], [7, 7, 1], [11, 0, 6, 8, 1, 2, 2, 20, 5], [4, 4], [9, 9, 9]]
SAMPLING = Sampling(max_tokens=9, stop=(3, 5, 12), seed=3)
SLOW = pytest.mark.slow


@pytest.fixture
def make():
    """Start servers, with the old weights."""
    started = []

    def start(kind="vllm", count=1, **how):
        new = [servers.KINDS[kind](MODEL, OLD, **how) for _ in range(count)]
        started.extend(new)
        return new

    start.started = started
    yield start
    for server in started:
        server.going.set()
        server.close()


def engine(*made, **options):
    (kind,) = {type(server).__name__.lower() for server in made}
    options = {"patience": 0.1, "backoff": 0.01, "every": 0.1, "at_once": 4} | options
    return RemoteEngine(kind, [server.url for server in made], MODEL, **options)


def apart(samples, params, temperature=1.0):
    """Return the largest difference between what samples say and log_softmax of whole sequences."""
    worst = 0.0
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        assert 1 <= len(sample.tokens) <= 9 and (sample.tokens[-1] in SAMPLING.stop) == (sample.finish_reason == "stop")
        logits = models.logits(MODEL, params, torch.tensor([prompt + sample.tokens]))[0, len(prompt) - 1 : -1]
        own = (logits / temperature).log_softmax(-1)[range(len(sample.tokens)), sample.tokens]
        worst = max(worst, float((own - torch.tensor(sample.logprobs)).abs().max()))
    return worst


@pytest.mark.parametrize("kind", servers.KINDS)
def test_samples_are_of_the_weights_that_were_sent(kind, make, monkeypatch):
    monkeypatch.setattr(remote, "BUCKET", 2000)  # bytes: several requests
    (server,) = make(kind)
    found = engine(server).generate(PROMPTS, SAMPLING)
    assert apart(found, OLD) < 1e-5 < 0.1 < apart(found, NEW)
    assert {sample.finish_reason for sample in found} == {"stop", "length"}
    sampler = engine(server)
    for version, params in ((5, NEW), (6, OLD)):
        sampler.update(params, version)
        found = sampler.generate(PROMPTS, SAMPLING)
        assert apart(found, params) < 1e-5
        assert all(sample.versions == [version] * len(sample.tokens) for sample in found)
    loads = [
        path for path in server.paths if path in ("/update_weights", "/update_weights_from_tensor", "/collective_rpc")
    ]
    assert len(loads) > 2 * 5


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_weights_go_through_a_folder(kind, make, tmp_path):
    (server,) = make(kind)
    sampler = engine(server, folder=tmp_path / "weights")
    sampler.update(NEW, 1)
    assert apart(sampler.generate(PROMPTS, SAMPLING), NEW) < 1e-5
    assert (tmp_path / "weights" / "model.safetensors").exists()


def test_lmdeploy_has_no_way_through_a_folder(make, tmp_path):
    with pytest.raises(ValueError, match="lmdeploy servers load no weights from a folder"):
        engine(*make("lmdeploy"), folder=tmp_path)


def test_weights_go_in_the_dtype_of_the_model(make):
    (server,) = make()
    sampler = RemoteEngine("vllm", [server.url], replace(MODEL, dtype=torch.bfloat16))
    sampler.update(NEW, 1)
    assert {p.dtype for p in tree.leaves(server.engine.params)} == {torch.bfloat16}


@pytest.mark.parametrize("kind", servers.KINDS)
def test_sampling_is_what_was_asked_for(kind, make):
    sampler = engine(*make(kind))
    greedy = sampler.generate(PROMPTS, replace(SAMPLING, temperature=0.0))
    assert [sample.tokens for sample in greedy] == [
        sample.tokens for sample in models.generate(MODEL, OLD, PROMPTS, 9, eos_ids=SAMPLING.stop)
    ]
    assert sampler.generate(PROMPTS, replace(SAMPLING, temperature=0.7, top_k=1))[0].tokens == greedy[0].tokens
    endless = sampler.generate(PROMPTS, replace(SAMPLING, stop=()))
    assert {(len(sample.tokens), sample.finish_reason) for sample in endless} == {(9, "length")}


def test_many_prompts_are_shared_and_keep_their_order(make):
    made = make(count=3)
    prompts = [[i % 23, i // 23] for i in range(60)]
    greedy = Sampling(max_tokens=3, temperature=0.0)
    found = engine(*made, at_once=6).generate(prompts, greedy)
    assert [s.tokens for s in found] == [s.tokens for s in models.generate(MODEL, OLD, prompts, 3)]
    assert sum(server.answered for server in made) == 60 and min(server.answered for server in made) > 5


def test_a_paused_server_says_nothing_until_it_goes_on(make):
    (server,) = make()
    sampler = engine(server)
    sampler.pause()
    asked = threading.Thread(target=sampler.generate, args=(PROMPTS, SAMPLING))
    asked.start()
    asked.join(0.1)
    assert asked.is_alive() and not server.answered
    sampler.resume()
    asked.join(5)
    assert server.answered == len(PROMPTS)


# answers in parts -----------------------------------------------------------------------------------------------------


def said_by(params, prompt, tokens):
    """Return the log-probability of each token, by log_softmax of the whole sequence."""
    logits = models.logits(MODEL, params, torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(tokens)), tokens]


@pytest.mark.parametrize("kind", servers.KINDS)
def test_an_answer_grows_from_call_to_call_with_the_weights_of_each(kind, make):
    """All of its tokens are kept, and each is of the weights of its version, given what was said before."""
    sampler, weights = engine(*make(kind)), [NEW, OLD, MODEL.init(2), MODEL.init(3)]
    parts = [None] * len(PROMPTS)
    for version, params in enumerate(weights):
        sampler.update(params, version)
        open_ = [i for i, part in enumerate(parts) if part is None or part.finish_reason == "abort"]
        begun, how = [parts[i] for i in open_], replace(SAMPLING, budget=3, seed=version)
        for i, part in zip(open_, sampler.generate([PROMPTS[i] for i in open_], how, begun), strict=True):
            had = parts[i].tokens if parts[i] else []
            assert part.tokens[: len(had)] == had and 1 <= len(part.tokens) - len(had) <= 3
            assert part.versions[len(had) :] == [version] * (len(part.tokens) - len(had))
            parts[i] = part
    assert {part.finish_reason for part in parts} == {"stop", "length"}
    assert {len({*part.versions}) for part in parts} >= {1, 3}
    for prompt, part in zip(PROMPTS, parts, strict=True):
        assert len(part.tokens) == 9 or part.finish_reason == "stop"
        each = [said_by(params, prompt, part.tokens) for params in weights]
        wanted = [float(each[version][i]) for i, version in enumerate(part.versions)]
        assert part.logprobs == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(ValueError, match="begun 0 has ended, by '(stop|length)': there is nothing to go on with"):
        sampler.generate(PROMPTS, SAMPLING, parts)


@pytest.mark.parametrize("kind", servers.KINDS)
@pytest.mark.parametrize("budget", [0, 4])
def test_an_answer_that_a_server_aborts_goes_on(kind, budget, make):
    """Greedily it is the one without; it asks for no more than is missing."""
    (server,) = make(kind)
    sampler, greedy = engine(server, at_once=1), replace(SAMPLING, temperature=0.0, stop=())
    whole = [sample.tokens for sample in models.generate(MODEL, OLD, PROMPTS, 9)]
    server.faults.extend([servers.abort(2), servers.abort(1), servers.abort(0), servers.abort(9)])
    found = sampler.generate(PROMPTS, replace(greedy, budget=budget))
    assert server.answered == len(PROMPTS) + 3 and not server.faults and not sampler.servers.all[0].out
    if budget:
        assert {(len(sample.tokens), sample.finish_reason) for sample in found} == {(4, "abort")}
        found = sampler.generate(PROMPTS, greedy, found)
    assert [sample.tokens for sample in found] == whole and {sample.finish_reason for sample in found} == {"length"}
    server.faults.extend([servers.abort(0)] * 99)
    with pytest.raises(RuntimeError, match=f"no {kind} server is left: .*aborted before the first token"):
        sampler.generate(PROMPTS, greedy)


def test_each_part_has_random_numbers_of_its_own(make):
    """Or what follows would be chosen by the numbers that chose what is there."""
    (server,) = make()
    seeds, generate = [], server.routes["POST /inference/v1/generate"]

    def watched(self, body):
        seeds.append((tuple(body["token_ids"]), body["sampling_params"]["seed"]))
        return generate(self, body)

    server.routes = server.routes | {"POST /inference/v1/generate": watched}
    sampler, how = engine(server), replace(SAMPLING, budget=3, stop=())
    sampler.generate(PROMPTS, how, sampler.generate(PROMPTS, how))
    assert len({seed for _, seed in seeds}) == 2 * len(PROMPTS)
    assert {len(ids) for ids, _ in seeds} >= {len(PROMPTS[0]), len(PROMPTS[0]) + 3}


# what goes wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [servers.fail, servers.hang], ids=["error", "no answer in time"])
def test_a_request_that_fails_is_sent_again(fault, make):
    (server,) = make()
    server.faults.append(fault)
    found = engine(server, timeout=1.0, at_once=1).generate(PROMPTS, replace(SAMPLING, temperature=0.0))
    assert [s.tokens for s in found] == [
        s.tokens for s in models.generate(MODEL, OLD, PROMPTS, 9, eos_ids=SAMPLING.stop)
    ]
    assert len([path for path in server.paths if path.endswith("generate")]) == len(PROMPTS) + 1


def test_a_server_that_dies_is_left_out_and_comes_back_with_new_weights(make):
    made = make(count=2)
    made[0].faults.extend([lambda server: None, servers.die])
    sampler = engine(*made)
    found = sampler.generate(PROMPTS * 3, SAMPLING)
    assert apart(found[:6], OLD) < 1e-5 and len(found) == 18
    first, second = sampler.servers.all
    assert first.out and not second.out
    (again,) = make()
    first.url = again.url
    sampler.update(NEW, 1)
    assert not first.out
    assert apart(sampler.generate(PROMPTS, SAMPLING), NEW) < 1e-5 and again.answered


def test_no_server_is_left(make):
    (server,) = make()
    server.faults.extend([servers.fail] * 99)
    with pytest.raises(RuntimeError, match=f"no vllm server is left: {server.url}: .*status 500: .*EngineCore"):
        engine(server).generate(PROMPTS, SAMPLING)


def test_a_prompt_that_always_fails_ends_the_call(make):
    (server,) = make()
    generate = server.routes["POST /inference/v1/generate"]

    def poisoned(self, body):
        if body["token_ids"] == PROMPTS[0]:
            raise servers.Refuse(500, "poison")
        return generate(self, body)

    server.routes = server.routes | {"POST /inference/v1/generate": poisoned}
    with pytest.raises(RuntimeError, match="(failed again and again|no vllm server is left).*poison"):
        engine(server, at_once=2).generate([PROMPTS[0], *PROMPTS[1:] * 20], SAMPLING)


def right(found, sampler, params, version):
    """Check samples of parameters, and that all servers answer with them."""
    assert apart(found, params) < 1e-5 and all({*sample.versions} == {version} for sample in found)
    assert not any(server.out for server in sampler.servers.all)


@pytest.mark.parametrize("kind", ["vllm", pytest.param("sglang", marks=SLOW), "lmdeploy"])
def test_a_server_that_restarts_in_a_rollout_is_waited_for_and_gets_its_weights_again(kind, make):
    """One alone: each prompt has one answer, all of the weights that were sent."""
    (server,) = make(kind)
    sampler = engine(server, patience=20.0, every=0.05)
    sampler.update(NEW, 1)
    greedy = replace(SAMPLING, temperature=0.0)
    server.faults.extend([lambda server: None, servers.die_and_come_back(0.2, OLD, make.started)])
    found = sampler.generate(PROMPTS, greedy)
    right(found, sampler, NEW, 1)
    assert [s.tokens for s in found] == [s.tokens for s in models.generate(MODEL, NEW, PROMPTS, 9, eos_ids=(3, 5, 12))]
    assert server.answered and make.started[1].answered


@pytest.mark.parametrize("kind", [pytest.param("vllm", marks=SLOW), pytest.param("sglang", marks=SLOW), "lmdeploy"])
def test_a_server_that_restarted_when_nothing_was_asked_is_noticed(kind, make):
    (server,) = make(kind)
    sampler = engine(server, patience=20.0, every=0.05)
    sampler.update(NEW, 1)
    server.close()
    make.started.append(type(server)(MODEL, OLD, port=server.http.server_port))
    right(sampler.generate(PROMPTS, SAMPLING), sampler, NEW, 1)


def test_what_somebody_else_sent_is_left_as_it_is(make):
    """Another engine of this process that nobody has let go of yet, for one: neither would ever end."""
    (server,) = make("vllm")
    first, second = engine(server, every=0.02), engine(server, every=0.02)
    first.update(OLD, 3)
    second.update(NEW, 1)
    time.sleep(0.15)  # both look several times
    assert server.version == "1"
    right(second.generate(PROMPTS, SAMPLING), second, NEW, 1)
    held = weakref.ref(first.servers)
    del first
    time.sleep(0.1)
    assert held() is None, "an engine that nobody has is gone at once, with what looks at servers"


@SLOW
def test_others_go_on_while_a_server_restarts(make):
    made = make(count=2)
    sampler = engine(*made, patience=20.0, every=0.05)
    sampler.update(NEW, 1)
    made[0].faults.append(servers.die)
    right(sampler.generate(PROMPTS, SAMPLING), sampler, NEW, 1)
    assert made[1].answered >= 3
    (again,) = make(port=made[0].http.server_port)
    end = time.monotonic() + 10
    while "/resume" not in again.paths:
        assert time.monotonic() < end
        time.sleep(0.02)
    right(sampler.generate(PROMPTS * 2, SAMPLING)[:6], sampler, NEW, 1)
    assert again.answered


def test_a_server_with_other_weights_than_it_was_given_gets_them_again(make):
    made = make(count=2)
    sampler = engine(*made, patience=20.0, every=0.05)
    sampler.update(NEW, 1)
    made[0].faults.append(servers.restart)
    right(sampler.generate(PROMPTS, SAMPLING), sampler, NEW, 1)
    assert made[0].paths.count("/resume") <= 2


def test_a_server_that_stays_with_other_weights_is_left_out(make):
    (server,) = make()
    sampler = engine(server)
    sampler.update(NEW, 1)
    server.routes = server.routes | {"POST /update_weight_version": lambda self, body: None}
    server.faults.append(servers.restart)
    with pytest.raises(RuntimeError, match="no vllm server is left: .*other weights than version 1, which it was sent"):
        sampler.generate(PROMPTS, SAMPLING)


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=SLOW)])
@pytest.mark.parametrize("kind", [pytest.param("vllm", marks=SLOW), "sglang", pytest.param("lmdeploy", marks=SLOW)])
def test_an_update_that_fails_in_the_middle_is_sent_again(kind, count, make, monkeypatch):
    """To the one server, and to one of two, while the other has it already."""
    monkeypatch.setattr(remote, "BUCKET", 2000)  # bytes: several requests
    made = make(kind, count=count)
    sampler = engine(*made, patience=20.0, every=0.05)
    sampler.update(OLD, 0)
    path = {"vllm": "/collective_rpc", "sglang": "/update_weights_from_tensor", "lmdeploy": "/update_weights"}[kind]
    load, left = made[0].routes[f"POST {path}"], [3]

    def failing(self, body):
        left[0] -= 1
        if left[0] == 0:
            raise servers.Refuse(500, "out of memory")
        return load(self, body)

    made[0].routes = made[0].routes | {f"POST {path}": failing}
    sampler.update(NEW, 1)
    end = time.monotonic() + 10
    while any(server.out for server in sampler.servers.all):
        assert time.monotonic() < end and count == 2
        time.sleep(0.02)
    right(sampler.generate(PROMPTS, SAMPLING), sampler, NEW, 1)


@pytest.mark.parametrize("kind", [pytest.param("vllm", marks=SLOW), "sglang"])
def test_an_update_of_a_run_that_was_killed_is_no_obstacle(kind, make, monkeypatch):
    monkeypatch.setattr(remote, "BUCKET", 2000)
    (server,) = make(kind)
    killed = engine(server)
    for i, request in enumerate(remote._requests(killed.dialect, None, killed.ranks, list(killed._named(OLD)), "7")):
        if i < 4:
            assert killed.servers.post(killed.servers.all, *request)
    sampler = engine(server)
    sampler.update(NEW, 1)
    right(sampler.generate(PROMPTS, SAMPLING), sampler, NEW, 1)


def test_a_server_that_does_not_take_weights_is_left_out(make):
    made = make("sglang", count=2)

    def never(self, body):
        raise servers.Refuse(400, {"success": False, "message": "weights are on a CUDA IPC cache"})

    made[0].routes = made[0].routes | {"POST /begin_weight_update": never}
    sampler = engine(*made)
    sampler.update(NEW, 1)
    assert "CUDA IPC cache" in sampler.servers.all[0].out
    assert apart(sampler.generate(PROMPTS, SAMPLING), NEW) < 1e-5 and not made[0].answered
    made[1].routes = made[0].routes
    with pytest.raises(RuntimeError, match="no sglang server is left"):
        sampler.update(OLD, 2)


# which experts were chosen -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "budget"),
    [("vllm", 2), ("sglang", 0), pytest.param("vllm", 0, marks=SLOW), pytest.param("sglang", 2, marks=SLOW)],
)
def test_servers_say_which_experts_were_chosen(kind, budget, make):
    """Those of the built-in engine for the same tokens, of layers that have experts, when answers grow in parts too."""
    (server,) = make(kind, routes=True)
    sampler, how = engine(server, record_routing=True), replace(SAMPLING, budget=budget, max_tokens=6)
    sampler.update(NEW, 1)
    server.faults.append(servers.abort(2))
    found = sampler.generate(PROMPTS, how)
    while any(sample.finish_reason == "abort" for sample in found):
        open_ = [i for i, sample in enumerate(found) if sample.finish_reason == "abort"]
        for i, one in zip(open_, sampler.generate([PROMPTS[i] for i in open_], how, [found[i] for i in open_]),
                          strict=True):  # fmt: skip
            found[i] = one
    local = LocalEngine(MODEL, NEW, length=40, record_routing=True)
    for prompt, sample in zip(PROMPTS, found, strict=True):
        (own,) = local.generate([[*prompt, *sample.tokens]], Sampling(1))
        wanted = own.routed_experts[: len(prompt) + len(sample.tokens) - 1]
        assert sample.routed_experts.dtype == wanted.dtype and np.array_equal(sample.routed_experts, wanted)
        assert routing.column([(prompt, sample)]).shape == (len(prompt) + len(sample.tokens), 2, 2)


@pytest.mark.parametrize("kind", ["vllm", pytest.param("sglang", marks=SLOW)])
def test_a_server_that_does_not_say_which_experts_were_chosen_is_refused(kind, make):
    with pytest.raises(RuntimeError, match="no routed_experts; it must run with --enable-return-routed-experts"):
        engine(*make(kind), record_routing=True).generate(PROMPTS, SAMPLING)
    (server,) = make(kind, routes=True)
    server.all_layers = lambda found, ids: np.full((len(ids) + len(found.tokens) - 1, 3, 2), 7)
    with pytest.raises(RuntimeError, match="experts 7 to 7 of"):
        engine(server, record_routing=True).generate(PROMPTS, SAMPLING)
    server.all_layers = lambda found, ids: np.zeros((len(ids) + len(found.tokens), 3, 2))
    with pytest.raises(RuntimeError, match="cannot reshape array"):
        engine(server, record_routing=True).generate(PROMPTS, SAMPLING)


def longer(said):
    said["choices"][0]["token_ids"] += [1]
    return said


def too_long(said):
    choice = said["choices"][0]
    choice["token_ids"], choice["logprobs"]["content"] = [1] * 10, [{"logprob": 0.0}] * 10
    return said


def elsewhere(said):
    said["choices"][0].update(finish_reason="stop", token_ids=[1] * len(said["choices"][0]["token_ids"]))
    return said


@pytest.mark.parametrize("edit, message", [
    (longer, r"\d log-probabilities of \d+ tokens"), (too_long, "10 tokens, asked for 1 to 9"),
    (elsewhere, r"ended with token 1, which is not among the stop ids \[3, 5, 12\]"),
    (lambda said: {"text": "hello"}, "no answer of a vllm server: KeyError 'choices' in {'text': 'hello'}"),
])  # fmt: skip
def test_an_answer_that_was_not_asked_for_is_refused(edit, message, make):
    (server,) = make()
    server.edit = edit
    with pytest.raises(RuntimeError, match=f"{server.url}/inference/v1/generate: {message}"):
        engine(server).generate(PROMPTS, SAMPLING)


@pytest.mark.parametrize("kind", servers.KINDS)
def test_an_answer_without_log_probabilities_is_refused(kind, make):
    (server,) = make(kind)
    server.edit = server.strip
    with pytest.raises(RuntimeError, match=r"generate: 0 log-probabilities of \d tokens; it must run with"):
        engine(server).generate(PROMPTS, SAMPLING)


def test_a_prompt_that_the_server_refuses_is_not_sent_again(make):
    (server,) = make()
    server.faults.append(servers.refuse)
    with pytest.raises(RuntimeError, match="a vllm server refused a prompt: .*maximum context length is 40"):
        engine(server, at_once=1).generate(PROMPTS, SAMPLING)
    assert server.answered < len(PROMPTS)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        engine(server).generate([[]], SAMPLING)


@pytest.mark.parametrize("kind", servers.KINDS)
def test_a_server_of_another_kind_or_none_is_refused_at_the_start(kind, make):
    (other,) = make({"vllm": "sglang", "sglang": "lmdeploy", "lmdeploy": "vllm"}[kind])
    for url, why in ((other.url, "status 404"), ("http://127.0.0.1:9", "ConnectionRefusedError")):
        with pytest.raises(ValueError, match=f"no {kind} server at {url} that can be trained with: .*{why}.*must run"):
            RemoteEngine(kind, [url], MODEL)


def test_a_server_that_still_starts_is_waited_for(make):
    (server,) = make()
    route = server.routes["GET /health"]
    states = [503]

    def health(self, body):
        if states:
            raise servers.Refuse(states.pop(), "starting")
        return route(self, body)

    server.routes = server.routes | {"GET /health": health}
    with pytest.raises(ValueError, match="status 503: .*starting"):
        engine(server)
    states.append(503)
    engine(server, wait=5.0)
