"""Small servers that speak the wire protocols of vLLM, SGLang and LMDeploy, as their sources have them.

Answers are sampled by the built-in engine from the weights that came over the wire, so a tensor that arrives wrong
shows in the log-probabilities. Fields that the real servers do not know are refused. Faults are given to be shown.
"""

import base64
import io
import json
import pickle
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.reduction import ForkingPickler
from typing import Any

import safetensors.torch
import torch

import models
from functional_trainer.engines import Sampling
from functional_trainer.engines.local import LocalEngine


class Refuse(Exception):
    """An answer with a status that is not 200."""


class Safe(pickle.Unpickler):
    """SGLang's `SafeUnpickler`, of whose list of globals a pickled tensor needs two."""

    def find_class(self, module, name):
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: torch.load(io.BytesIO(data), weights_only=True)
        if (module, name) in {("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict")}:
            return super().find_class(module, name)
        raise Refuse(400, f"Blocked unsafe global ({module}.{name}) during pickle deserialization")


def known(body: dict[str, Any], *names: str) -> None:
    if odd := body.keys() - {*names}:
        raise Refuse(400, f"unknown fields {odd}")


class Server:
    """A server with a model: `faults` are taken one a question, before it is answered; `edit` changes what it says."""

    ranks = 1

    def __init__(self, model, params, length=40):
        self.model, self.named, self.version = model, {}, "default"
        self.engine, self.busy = LocalEngine(model, params, slots=1, length=length), threading.Lock()
        self.faults: deque[Callable] = deque()
        self.edit: Callable = lambda said: said
        self.paths: list[str] = []
        self.answered, self.going, self.cut = 0, threading.Event(), None
        self.going.set()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"server_of": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def sample(self, ids, max_tokens, temperature, top_k, top_p, min_p, stop):
        """Return what the engine says, once it is no longer paused."""
        self.going.wait()
        with self.busy:
            fault = self.faults.popleft() if self.faults else None
        if fault:
            fault(self)
        with self.busy:
            (found,) = self.engine.generate([ids], Sampling(max_tokens, temperature, top_k, top_p, min_p, tuple(stop)))
            self.answered += 1
            if (cut := self.cut) is None:
                return found
            self.cut = None
            return found._replace(tokens=found.tokens[:cut], logprobs=found.logprobs[:cut], finish_reason="abort")

    def load(self):
        """Sample with the tensors that have come."""
        with tempfile.TemporaryDirectory() as folder, self.busy:
            safetensors.torch.save_file(self.named, f"{folder}/model.safetensors")
            with open(f"{folder}/config.json", "w") as file:
                json.dump(self.model.config.hf, file)
            self.engine.update(models.from_pretrained(folder)[1], 0)
            self.named = {}

    def load_folder(self, folder):
        with self.busy:
            self.engine.update(models.from_pretrained(folder)[1], 0)


class Handler(BaseHTTPRequestHandler):
    server_of: Server

    def handle(self):
        with suppress(BrokenPipeError, ConnectionResetError):  # who asked has gone
            super().handle()

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.reply({})

    def do_POST(self):
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, body):
        server = self.server_of
        server.paths.append(self.path)
        path, _, query = self.path.partition("?")
        try:
            route = server.routes.get(f"{self.command} {path}")
            if route is None:
                raise Refuse(404, "Not Found")
            status, said = 200, route(server, body | dict(pair.split("=") for pair in query.split("&") if pair))
        except Refuse as refused:
            status, said = refused.args
        except ConnectionAbortedError:  # a fault: nothing is said
            return
        data = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


# faults --------------------------------------------------------------------------------------------------------------


def fail(server):
    raise Refuse(500, "EngineCore encountered an issue")


def abort(tokens):
    """Let it end the answer after so many tokens."""

    def fault(server):
        server.cut = tokens

    return fault


def refuse(server):
    raise Refuse(400, "This model's maximum context length is 40 tokens")


def hang(server):
    time.sleep(1.2)


def die(server):
    threading.Thread(target=server.close, daemon=True).start()
    time.sleep(0.05)
    raise ConnectionAbortedError


def restart(server):
    server.version = "default"


# vLLM ----------------------------------------------------------------------------------------------------------------


class Vllm(Server):
    """vllm/entrypoints/scale_out/token_in_token_out, rl/online and serve/dev/rpc, and our worker extension."""

    def generate(self, body):
        known(body, "token_ids", "sampling_params")
        s = body["sampling_params"]
        known(s, "temperature", "top_k", "top_p", "min_p", "seed", "max_tokens", "stop_token_ids", "ignore_eos",
              "logprobs", "detokenize")  # fmt: skip
        assert s["ignore_eos"] and 0 <= s["seed"] < 2**63
        args = s["max_tokens"], s["temperature"], s["top_k"], s["top_p"], s["min_p"], s["stop_token_ids"]
        found = self.sample(body["token_ids"], *args)
        content = [{"token_id": t, "logprob": x, "top_logprobs": []}
                   for t, x in zip(found.tokens, found.logprobs, strict=True)]  # fmt: skip
        spans = [{"version": self.version, "start": 0, "end": len(found.tokens)}]
        choice = {"index": 0, "token_ids": found.tokens, "finish_reason": found.finish_reason, "weight_versions": spans}
        return self.edit({"choices": [choice | {"logprobs": {"content": content} if s["logprobs"] == 0 else None}]})

    def rpc(self, body):
        known(body, "method", "kwargs")
        return {"results": [getattr(self, body["method"])(**body["kwargs"])]}

    def begin_weights(self):
        assert not self.going.is_set() and not self.named

    def load_weights_bytes(self, data):
        self.named |= safetensors.torch.load(base64.b64decode(data))

    def load_weights_from(self, folder):
        self.load_folder(folder)

    def finish_weights(self):
        if self.named:
            self.load()

    def set_version(self, body):
        self.version = body["new_version"]

    def pause(self, body):
        assert body == {"mode": "keep"}
        self.going.clear()

    routes = {
        "GET /health": lambda self, body: None, "GET /weight_info": lambda self, body: {"weight_version": self.version},
        "POST /inference/v1/generate": generate, "POST /collective_rpc": rpc, "POST /pause": pause,
        "POST /resume": lambda self, body: self.going.set(), "POST /reset_prefix_cache": lambda self, body: None,
        "POST /update_weight_version": set_version,
    }  # fmt: skip

    @staticmethod
    def strip(said):
        said["choices"][0]["logprobs"] = None
        return said


# SGLang --------------------------------------------------------------------------------------------------------------


class Sglang(Server):
    """sglang/srt/entrypoints/http_server.py with the structs of managers/io_struct.py."""

    ranks = 2
    session = False

    def generate(self, body):
        known(body, "input_ids", "sampling_params", "return_logprob")
        s = body["sampling_params"]
        known(s, "temperature", "top_k", "top_p", "min_p", "max_new_tokens", "stop_token_ids", "ignore_eos",
              "sampling_seed")  # fmt: skip
        assert s["top_k"] == -1 or s["top_k"] >= 1
        if len(body["input_ids"]) + s["max_new_tokens"] >= self.engine.length:  # tokenizer_manager.py
            raise Refuse(400, "Requested token count exceeds the model's maximum context length")
        stop = [] if s["ignore_eos"] else s["stop_token_ids"]  # it ignores both or none
        args = s["max_new_tokens"], s["temperature"], max(0, s["top_k"]), s["top_p"], s["min_p"], stop
        found = self.sample(body["input_ids"], *args)
        ended = {"type": found.finish_reason} | ({"message": "Aborted"} if found.finish_reason == "abort" else {})
        ended |= {"matched": found.tokens[-1]} if found.finish_reason == "stop" else {}
        meta = {"finish_reason": ended, "weight_version": self.version, "completion_tokens": len(found.tokens)}
        if body["return_logprob"]:
            pairs = zip(found.logprobs, found.tokens, strict=True)
            meta["output_token_logprobs"] = [(logprob, token, None) for logprob, token in pairs]
        return self.edit({"text": "", "output_ids": found.tokens, "meta_info": meta})

    def pause(self, body):
        assert body == {"mode": "retract"}
        self.going.clear()

    def begin(self, body):
        known(body, "selector")
        if self.session:
            raise Refuse(400, {"success": False, "message": "a weight-update session is already open"})
        self.session = True

    def update_tensor(self, body):
        known(body, "serialized_named_tensors", "load_format", "flush_cache", "weight_version")
        if not self.session:
            raise Refuse(400, {"success": False, "message": "must run between begin_weight_update() and end"})
        mine = body["serialized_named_tensors"][self.ranks - 1]
        self.named |= Safe(io.BytesIO(base64.b64decode(mine, validate=True))).load()
        self.version = body["weight_version"]
        return {"success": True, "message": "Success"}

    def end(self, body):
        self.session = False
        self.load()
        return {"success": True, "message": "Success"}

    def update_disk(self, body):
        known(body, "model_path", "weight_version")
        self.load_folder(body["model_path"])
        self.version = body["weight_version"]
        return {"success": True, "message": "", "num_paused_requests": 0}

    routes = {
        "GET /health": lambda self, body: None, "GET /server_info": lambda self, body: {"tp_size": self.ranks},
        "POST /generate": generate, "POST /pause_generation": pause,
        "POST /continue_generation": lambda self, body: self.going.set(), "POST /begin_weight_update": begin,
        "POST /update_weights_from_tensor": update_tensor, "POST /end_weight_update": end,
        "POST /update_weights_from_disk": update_disk,
    }  # fmt: skip

    @staticmethod
    def strip(said):
        del said["meta_info"]["output_token_logprobs"]
        return said


# LMDeploy ------------------------------------------------------------------------------------------------------------


class Lmdeploy(Server):
    """lmdeploy/serve/openai/endpoints, and `update_params` of pytorch/engine/model_agent/agent.py.

    The real one opens handles of CUDA memory; these are of the host's, made by the same function.
    """

    def generate(self, body):
        known(body, "input_ids", "return_logprob", "max_tokens", "stop_token_ids", "temperature", "top_k", "top_p",
              "min_p", "ignore_eos", "include_stop_str_in_output")  # fmt: skip
        if not self.going.is_set():
            raise Refuse(503, "Engine is sleeping; call POST /wakeup before inference")
        stop = [] if body["ignore_eos"] else body["stop_token_ids"]
        args = body["max_tokens"], body["temperature"], body["top_k"], body["top_p"], body["min_p"], stop
        found = self.sample(body["input_ids"], *args)
        cut = -1 if found.finish_reason == "stop" and not body["include_stop_str_in_output"] else None
        tokens, logprobs = found.tokens[:cut], found.logprobs[:cut]
        pairs = list(zip(logprobs, tokens, strict=True)) if body["return_logprob"] else None
        meta = {"finish_reason": {"type": found.finish_reason}, "output_token_logprobs": pairs, "prompt_tokens": 1}
        return self.edit({"text": "", "output_ids": tokens, "meta_info": meta})

    def update(self, body):
        known(body, "serialized_named_tensors", "load_format", "finished")
        came = ForkingPickler.loads(base64.b64decode(body["serialized_named_tensors"]))
        self.named |= {name: make(*args).clone() for name, (make, args) in came}
        if body["finished"]:
            self.load()

    routes = {
        "GET /health": lambda self, body: {"status": "healthy"},
        "GET /is_sleeping": lambda self, body: {"is_sleeping": not self.going.is_set()},
        "POST /generate": generate, "POST /update_weights": update,
        "POST /sleep": lambda self, body: self.going.clear(), "POST /wakeup": lambda self, body: self.going.set(),
    }  # fmt: skip

    @staticmethod
    def strip(said):
        said["meta_info"]["output_token_logprobs"] = None
        return said


KINDS = {"vllm": Vllm, "sglang": Sglang, "lmdeploy": Lmdeploy}
