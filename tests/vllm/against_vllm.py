"""A real vLLM server on the CPU: `make test-vllm`. It samples what our models say, before and after weights change.

vLLM has a virtual environment of its own, so these are not among the tests that `make test` collects.
"""

import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch

import models
from experiments.benchmarks import decode
from functional_trainer import tree
from functional_trainer.engines import Sampling, remote
from functional_trainer.engines.remote import RemoteEngine
from functional_trainer.rl_options import RolloutOptions
from tests.experiments import sft_runs

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
FLAGS = (
    *("--enable-scale-out", "--worker-extension-cls", "vllm_worker.Weights"),
    *("--logprobs-mode", "processed_logprobs", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"),
)
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
SIZES = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
KINDS = {  # experts of a width that vLLM pads, heads that are tied
    "dense": {"family": "qwen3", "tie_word_embeddings": True},
    "moe": {"family": "qwen3_moe", "tie_word_embeddings": False, "moe_intermediate_size": 24},
}
PROMPTS = [torch.randint(360, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 5, 8, 13, 40)] * 3
REWARD = """def copied(completions, answer, **columns):
    pairs = zip(completions, answer, strict=True)
    return [sum(a == b for a, b in zip(text, wanted)) / len(wanted) for text, wanted in pairs]
"""
COPYING = (
    *("--data.train", "copy.jsonl", "--reward.functions", "copied.py:copied", "--data.seq-len", 128, "--batch", 8),
    *("--rollout.num-generations", 16, "--rollout.max-completion-length", 6, "--micro-batch", 16, "--optim.lr", 6e-3),
    *("--steps", 120, "--answers", 0, "--samples", 0, "--eval-every", 0, "--compile", "off", "--out", "run"),
)


class Served:
    """A checkpoint and the server of it."""

    def __init__(self, folder: Path, kind: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.kind, self.folder, self.url = kind, folder / "model", f"http://127.0.0.1:{port}"
        sft_runs.folder(self.folder, **SIZES | KINDS[kind])
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", self.folder, "--port", str(port)]
        self.command, self.log = [*command, "--host", "127.0.0.1", *FLAGS], folder / "log"
        self.start()
        self.model, self.params = models.from_pretrained(self.folder)

    def start(self) -> None:
        env = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT / "experiments" / "serving"), "OMP_NUM_THREADS": "1"}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command, env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self) -> "Served":
        end = time.monotonic() + 600
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return self
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(f"vLLM did not start:\n{self.log.read_text(errors='replace')[-4000:]}")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    def kill(self) -> None:
        """End it and its engine at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)

    def engine(self, **options) -> RemoteEngine:
        return RemoteEngine("vllm", [self.url], self.model, **options)

    def changed(self, seed: int) -> tree.Tree:
        gen = torch.Generator().manual_seed(seed)
        return tree.map(lambda p: p + 0.1 * torch.randn(p.shape, generator=gen), self.params)


@pytest.fixture(scope="module", params=KINDS)
def served(request, tmp_path_factory):
    server = Served(tmp_path_factory.mktemp(request.param), request.param)
    try:
        yield server.wait()
    finally:
        server.stop()


def apart(served: Served, samples, params, temperature=1.0) -> tuple[float, float]:
    """Return the largest and the mean difference between what vLLM says and log_softmax of our logits."""
    found = []
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        logits = models.logits(served.model, params, torch.tensor([prompt + sample.tokens]))[0, len(prompt) - 1 : -1]
        own = (logits / temperature).log_softmax(-1)[range(len(sample.tokens)), sample.tokens]
        found.append((own - torch.tensor(sample.logprobs)).abs())
    return float(torch.cat(found).max()), float(torch.cat(found).mean())


def test_the_weights_it_was_started_with_are_ours(served):
    """Before anything is sent: this is the first test that a server sees."""
    sampling = Sampling(max_tokens=12, temperature=0.0)
    found = served.engine().generate(PROMPTS, sampling)
    own = models.generate(served.model, served.params, PROMPTS, 12)
    assert [s.tokens for s in found] == [s.tokens for s in own]
    off, _ = apart(served, found, served.params)
    print(f"\n{served.kind} as started: off by {off:.2g}")
    assert off < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("through", ["memory", "disk"])
def test_log_probabilities_are_ours_before_and_after_weights_change(
    served, tmp_path, temperature, through, monkeypatch
):
    monkeypatch.setattr(remote, "BUCKET", 50_000)  # bytes: several requests
    engine = served.engine(folder=tmp_path / "weights" if through == "disk" else None)
    sampling = Sampling(max_tokens=12, temperature=temperature, stop=(7, 8, 9), seed=5)
    engine.update(served.params, 1)
    found = engine.generate(PROMPTS, sampling)
    assert apart(served, found, served.params, temperature)[0] < 1e-5
    for version in (2, 3):
        new = served.changed(version)
        begin = time.perf_counter()
        engine.update(new, version)
        seconds, found = time.perf_counter() - begin, engine.generate(PROMPTS, sampling)
        now, before = (apart(served, found, params, temperature)[0] for params in (new, served.params))
        print(
            f"\n{served.kind} by {through}: {seconds * 1e3:.0f} ms, off by {now:.2g}, from the old weights {before:.2g}"
        )
        assert now < 1e-5 < 0.1 < before
        assert all(sample.versions == [version] * len(sample.tokens) for sample in found)
        for sample in found:
            assert len(sample.tokens) == 12 or sample.finish_reason == "stop" and sample.tokens[-1] in (7, 8, 9)
            assert not {*sample.tokens[:-1]} & {7, 8, 9}


def test_samples_are_repeatable_and_differ_within_a_group(served):
    engine = served.engine()
    engine.update(served.params, 1)
    sampling = Sampling(max_tokens=12, seed=1)
    found = engine.generate([PROMPTS[3]] * 4, sampling)
    assert found == engine.generate([PROMPTS[3]] * 4, sampling)
    assert len({tuple(sample.tokens) for sample in found}) == 4


def test_a_server_that_is_killed_in_a_rollout_and_started_again_gets_its_weights_again(served):
    engine, found = served.engine(patience=300.0), []
    engine.update(served.changed(2), 2)
    prompts, long = PROMPTS * 2, Sampling(max_tokens=150, seed=5)  # of more it preempts some, which kills it on a CPU
    asked = threading.Thread(target=lambda: found.extend(engine.generate(prompts, long)))
    asked.start()
    time.sleep(0.5)
    served.kill()
    served.start()
    begin = time.perf_counter()
    asked.join(300)
    print(f"\n{served.kind}: all samples are there {time.perf_counter() - begin:.0f} s after it was killed")
    assert len(found) == len(prompts) and {v for sample in found for v in sample.versions} == {2}
    for part in range(0, len(found), len(PROMPTS)):
        assert apart(served, found[part : part + len(PROMPTS)], served.changed(2))[0] < 1e-5


def test_a_paused_server_goes_on_with_new_weights_in_the_middle_of_a_sample(served):
    """Versions of tokens say where."""
    engine = served.engine()
    engine.update(served.params, 1)
    found = []
    asked = threading.Thread(target=lambda: found.extend(engine.generate([PROMPTS[2]], Sampling(max_tokens=200))))
    asked.start()
    time.sleep(0.15)
    engine.update(served.changed(2), 2)
    asked.join(60)
    (sample,) = found
    assert len(sample.tokens) == 200 and sample.versions == sorted(sample.versions) and {*sample.versions} == {1, 2}
    print(f"\n{sample.versions.count(1)} tokens of the old weights")


def test_a_run_learns_through_it(served, tmp_path):
    """Copying a letter, from random weights, by rewards: the recipe, with its check of the first rollout."""
    records = [{"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": c * 6}]} for c in "abcd"]
    (tmp_path / "copy.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records * 16))
    (tmp_path / "copied.py").write_text(REWARD)
    flags = "--rollout.engine", "vllm", "--rollout.url", served.url
    started = sft_runs.start(tmp_path, *COPYING, "--model.path", served.folder, *flags, recipe="qwen3_moe_grpo")
    assert started.wait(900) == 0, started.output
    rows = sft_runs.rows(tmp_path / "run")
    rewards = [row["reward"] for row in rows]
    first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    print(f"\n{served.kind}: reward {first:.3f} to {last:.3f} in {len(rows)} steps, "
          f"{sum(row['rollout_s'] for row in rows):.1f} s of rollouts, largest mean difference "
          f"{max(row['sampling_logp_difference/mean'] for row in rows):.2g}")  # fmt: skip
    assert "log-probabilities as sampled and as trained differ by" in started.output
    assert first < 0.2 and last > first + 0.3
    assert all(row["sampling_logp_difference/mean"] < 1e-5 for row in rows)


def test_the_decoding_benchmark_has_it_beside_ours(tmp_path):
    small = {"prompts": (8,), "samples": 2, "tokens": 6, "stops": 24, "slots": 4, "rounds": 2, "warmup": 1, "layers": 1}
    with pytest.raises(SystemExit) as ended:
        decode.main(decode.Options(**small, contestants=("ours-off", "vllm"), threads=1, json=tmp_path / "out.json"))
    rows = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())["results"]}
    assert not ended.value.code and rows["vllm"]["others"] == 0 and rows["vllm"]["tokens"] == rows["ours-off"]["tokens"]


def test_what_vllm_itself_reloads_on_a_cpu_would_be_found(served, tmp_path):
    """Its reload says that all is well, or fails; what it samples then is of no weights that there ever were."""
    engine = served.engine(folder=tmp_path / "weights", patience=1.0)
    engine.update(served.params, 1)
    stock = lambda folder, version: [  # noqa: E731
        ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}}),
        ("/update_weight_version", {"new_version": version}),
    ]
    engine.dialect, new = engine.dialect._replace(disk=stock), served.changed(2)
    try:
        engine.update(new, 2)
    except RuntimeError as error:
        assert "no vllm server is left" in str(error) and served.kind == "moe"
        return
    _, mean = apart(served, engine.generate(PROMPTS, Sampling(max_tokens=12)), new)
    print(f"\n{served.kind}: off by {mean:.2g} in the mean after a reload that reported no error")
    assert mean > 10 * RolloutOptions.max_disagreement
