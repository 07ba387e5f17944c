"""What servers of vLLM, SGLang and LMDeploy are asked, and how their answers are read. Imports none of them.

Token ids go out and come back; no server tokenizes anything. Read in the sources of vLLM 0.32
(`/inference/v1/generate`, `/pause`, `/collective_rpc`), SGLang 0.5.23 (`http_server.py`, `io_struct.py`,
`SafeUnpickler`) and LMDeploy 0.18 (`serve/openai/endpoints`, `model_agent/agent.py`); which experts were chosen, in
vLLM's `scale_out/token_in_token_out/protocol.py` and SGLang's `extract_routed_experts_from_meta_info`.
"""

import base64
import io
import pickle
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch.multiprocessing.reductions import reduce_tensor

from functional_trainer.engines import Sampling

Request = tuple[str, dict[str, Any]]
"""A path, and the JSON that is posted to it."""
Named = Sequence[tuple[str, torch.Tensor]]
"""Some tensors of a checkpoint, by their names there."""


class Answer(NamedTuple):
    """What a server says: ids, log-probabilities, why it ended, and, if it tells, each token's version of the weights
    and the experts that each layer chose for each token but the last, the prompt's too, (n - 1, layers, K) in order."""

    tokens: list[int]
    logprobs: list[float | None]
    reason: str
    versions: list[str] | None
    routed: np.ndarray | None = None


class Dialect(NamedTuple):
    """What a kind of server is asked."""

    probe: str
    """What only such a server, started so, answers to GET."""
    started: str
    """How it must have been started."""
    ask: Callable[[Sequence[int], Sampling, int, bool], Request]
    """From a prompt, how to sample, a seed of its own, and whether the answer is to say which experts were chosen."""
    read: Callable[[Any], Answer]
    pause: Request
    """No token is computed from then on; what is under way stays."""
    resume: Request
    load: Callable[[Named, int, str], Request]
    """From tensors, the ranks of the server and a version: load them from the request."""
    disk: Callable[[str, str], Sequence[Request]] | None
    """From a folder and a version: load the checkpoint in it."""
    begin: Sequence[Request] = ()
    """Before the first `load`."""
    finish: Callable[[str], Sequence[Request]] = lambda version: ()
    """After the last."""
    held: bool = True
    """Whether it is paused meanwhile."""
    on_device: bool = False
    """Whether tensors stay where they are, and the server on the same machine opens their memory."""
    ranks: Callable[[Any], int] = lambda probed: 1
    """From the answer to the probe, the copies of a request's tensors that it wants."""
    version: str = ""
    """What it answers the version of its weights to, by GET; empty: it knows none."""
    clear: Request | None = None
    """Ends an update that was cut off, without which there is no other; refused where there is none."""
    routes: str = ""
    """How it must have been started to say which experts were chosen; empty: it does not."""


def _spans(spans: Iterable[Any] | None) -> list[str] | None:
    return None if spans is None else [s["version"] for s in spans for _ in range(s["start"], s["end"])]


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _rpc(method: str, **arguments: str) -> Request:
    """Call a method of `experiments/serving/vllm_worker.py` in every worker."""
    return "/collective_rpc", {"method": method, "kwargs": arguments}


def _vllm_ask(prompt: Sequence[int], s: Sampling, seed: int, record: bool) -> Request:
    """Which experts were chosen it says unasked, if it does."""
    chosen = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p, "min_p": s.min_p, "seed": seed}
    ends = {"max_tokens": s.max_tokens, "stop_token_ids": list(s.stop), "ignore_eos": True}
    sampling = chosen | ends | {"logprobs": 0, "detokenize": False}
    return "/inference/v1/generate", {"token_ids": list(prompt), "sampling_params": sampling}


def _vllm_read(said: Any) -> Answer:
    (choice,) = said["choices"]
    logprobs = [one["logprob"] for one in (choice["logprobs"] or {}).get("content") or []]
    given = choice.get("routed_experts")
    routed = None if given is None else np.load(io.BytesIO(base64.b64decode(given)), allow_pickle=False)
    return Answer(choice["token_ids"], logprobs, choice["finish_reason"], _spans(choice["weight_versions"]), routed)


def _vllm_finish(version: str) -> list[Request]:
    now = ("/update_weight_version", {"new_version": version})
    return [_rpc("finish_weights"), ("/reset_prefix_cache", {}), now]


def _sglang_ask(prompt: Sequence[int], s: Sampling, seed: int, record: bool) -> Request:
    chosen = {"temperature": s.temperature, "top_k": s.top_k or -1, "top_p": s.top_p, "min_p": s.min_p}
    ends = {"max_new_tokens": s.max_tokens, "stop_token_ids": list(s.stop), "ignore_eos": not s.stop}
    sampling = chosen | ends | {"sampling_seed": seed}
    body = {"input_ids": list(prompt), "sampling_params": sampling, "return_logprob": True}
    return "/generate", body | ({"return_routed_experts": True} if record else {})


def _sglang_read(said: Any) -> Answer:
    meta = said["meta_info"]
    versions = _spans(meta.get("weight_versions")) or [meta["weight_version"]] * len(said["output_ids"])
    logprobs = [one[0] for one in meta.get("output_token_logprobs") or []]
    given = meta.get("routed_experts")
    dtype = np.dtype(meta.get("routed_experts_dtype") or "int32")
    routed = None if given is None else np.frombuffer(base64.b64decode(given), dtype)
    return Answer(said["output_ids"], logprobs, meta["finish_reason"]["type"], versions, routed)


def _sglang_load(named: Named, ranks: int, version: str) -> Request:
    """Tensors by value: plain pickles are among what its `SafeUnpickler` takes."""
    own = [(name, tensor.clone()) for name, tensor in named]  # a view would take all of its storage along
    data = _text(pickle.dumps(own))
    return "/update_weights_from_tensor", {"serialized_named_tensors": [data] * ranks, "weight_version": version}


def _lmdeploy_ask(prompt: Sequence[int], s: Sampling, seed: int, record: bool) -> Request:
    """There is no seed."""
    chosen = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p, "min_p": s.min_p}
    ends = {"max_tokens": s.max_tokens, "stop_token_ids": list(s.stop), "include_stop_str_in_output": True}
    ends |= {"ignore_eos": not s.stop}
    return "/generate", {"input_ids": list(prompt), "return_logprob": True} | chosen | ends


def _lmdeploy_read(said: Any) -> Answer:
    meta = said["meta_info"]
    logprobs = [one[0] for one in meta["output_token_logprobs"] or []]
    return Answer(said["output_ids"], logprobs, meta["finish_reason"]["type"], None)


def _lmdeploy_load(named: Named, ranks: int, version: str, finished: bool = False) -> Request:
    """Handles of device memory."""
    data = _text(bytes(ForkingPickler.dumps([(name, reduce_tensor(tensor)) for name, tensor in named])))
    return "/update_weights", {"serialized_named_tensors": data, "finished": finished}


DIALECTS = {
    "vllm": Dialect(
        probe="/weight_info",
        started="VLLM_SERVER_DEV_MODE=1, --enable-scale-out, --worker-extension-cls vllm_worker.Weights",
        routes="--enable-return-routed-experts", version="/weight_info",
        ask=_vllm_ask, read=_vllm_read, pause=("/pause?mode=keep", {}), resume=("/resume", {}),
        begin=(_rpc("begin_weights"),), finish=_vllm_finish,
        load=lambda named, ranks, version: _rpc(
            "load_weights_bytes", data=_text(safetensors.torch.save({n: t.contiguous() for n, t in named}))
        ),
        disk=lambda folder, version: [
            _rpc("begin_weights"), _rpc("load_weights_from", folder=folder), *_vllm_finish(version)
        ],
    ),
    "sglang": Dialect(
        probe="/server_info", started="sglang 0.5.23 or newer, without data-parallel replicas",
        routes="--enable-return-routed-experts", version="/model_info", clear=("/end_weight_update", {}),
        ask=_sglang_ask, read=_sglang_read,
        pause=("/pause_generation", {"mode": "retract"}), resume=("/continue_generation", {}),
        begin=(("/begin_weight_update", {}),), finish=lambda version: [("/end_weight_update", {})],
        load=_sglang_load, ranks=lambda probed: probed["tp_size"],
        disk=lambda folder, version: [
            ("/update_weights_from_disk", {"model_path": folder, "weight_version": version})
        ],
    ),
    "lmdeploy": Dialect(
        probe="/is_sleeping", started="the PyTorch backend, --logprobs-mode raw_logprobs",
        ask=_lmdeploy_ask, read=_lmdeploy_read, pause=("/sleep?level=1", {}), resume=("/wakeup", {}),
        load=_lmdeploy_load, finish=lambda version: [_lmdeploy_load([], 1, version, True)],
        disk=None, held=False, on_device=True,
    ),
}  # fmt: skip
"""By the names that --rollout.engine has for them."""
