"""Rollout engines on the other side of HTTP: one or several servers of vLLM, SGLang or LMDeploy.

Every prompt is a request of its own, and goes to the server that has the fewest. One that fails is sent again, there
or elsewhere; the server rests meanwhile, twice as long each time, and if it goes on failing it is left out until the
weights change next. A prompt has one answer, that of its one request that succeeded. Answers must be of the weights
that were sent last: a server that has restarted meanwhile, with its old ones, is left out too.

An answer that has begun, in a call before or because a server aborted it, goes on by a request for what follows the
prompt and the tokens that it has, whose keys and values are computed again (as AReaL does, arxiv 2505.24298).
"""

import http.client
import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import numpy as np
import torch

from functional_trainer import backend, hf, tree
from functional_trainer.engines import Sample, Sampling, refuse_begun
from functional_trainer.engines.dialects import DIALECTS, Named, Request
from functional_trainer.errors import brief
from functional_trainer.types import ONE_DEVICE

CONNECT = 10.0
"""Seconds that a server may take to accept a connection, and to say that it is well."""
BUCKET = 1 << 27
"""Bytes of weights in one request, if no tensor alone has more."""
Reason = Literal["stop", "length", "abort"]


class Failed(Exception):
    """A request that may succeed when it is sent again."""


class Refused(Exception):
    """A request that the server will not answer."""


@dataclass
class Server:
    """Where requests go: how many are under way, how often in a row they failed, when to go on, why it is left out."""

    url: str
    open: int = 0
    failures: int = 0
    until: float = 0.0
    out: str = ""


def call(url: str, path: str, body: bytes | None, timeout: float) -> Any:
    """Post JSON (None: get) and return what comes back, None if it is empty or no JSON; `Failed` or `Refused`."""
    at = urlsplit(url)
    kind = http.client.HTTPSConnection if at.scheme == "https" else http.client.HTTPConnection
    connection = kind(at.hostname or "", at.port, timeout=CONNECT)
    try:
        connection.connect()
        connection.sock.settimeout(timeout)
        method = "GET" if body is None else "POST"
        connection.request(method, at.path + path, body, {"Content-Type": "application/json", "Connection": "close"})
        reply = connection.getresponse()
        data = reply.read()
    except (OSError, http.client.HTTPException) as error:
        raise Failed(f"{url}{path}: {type(error).__name__}: {brief(error)}") from error
    finally:
        connection.close()
    if reply.status != 200:
        kind_of = Failed if reply.status >= 500 or reply.status in (408, 429) else Refused
        raise kind_of(f"{url}{path}: status {reply.status}: {brief(data.decode(errors='replace'))}")
    try:
        return json.loads(data)
    except ValueError:
        return None


class RemoteEngine:
    """An `Engine` whose answers come from servers; see the top of this file.

    `urls` are those of the servers, all of the kind `dialect`. `model` and `shard` say how `params` of an update become
    the tensors of a checkpoint; they go in the model's dtype, through `folder`, which servers must see, or without one
    through memory. All ranks make an engine and call `update` together; rank 0 sends. `at_once` requests are under way
    at most, each for at most `timeout` seconds; `tries` is how often in a row a server may fail, `backoff` the seconds
    after the first time. ValueError if one does not answer within `wait` seconds.
    """

    def __init__(
        self, dialect: str, urls: Sequence[str], model: Any, *, shard=ONE_DEVICE, folder: str | Path | None = None,
        at_once: int = 256, timeout: float = 600.0, wait: float = 0.0, tries: int = 5, backoff: float = 0.5,
        group: Any = None,
    ):  # fmt: skip
        self.name, self.dialect, self.model, self.shard = dialect, DIALECTS[dialect], model, shard
        if folder and self.dialect.disk is None:
            raise ValueError(f"{dialect} servers load no weights from a folder; let them get them from memory")
        self.folder = str(Path(folder).resolve()) if folder else None
        self.group, self.at_once, self.timeout, self.tries, self.backoff = group, at_once, timeout, tries, backoff
        self.servers = [Server(url.rstrip("/")) for url in urls]
        self.version, self.versions, self.lock = 0, dict[str, int](), threading.Lock()
        end = time.monotonic() + wait
        self.ranks = max(self._probe(server, end) for server in self.servers)

    def _probe(self, server: Server, end: float = 0.0) -> int:
        """Ask a server whether it is well and of the right kind; return the ranks that want weights."""
        while True:
            try:
                call(server.url, "/health", None, CONNECT)
                return self.dialect.ranks(call(server.url, self.dialect.probe, None, CONNECT))
            except (Failed, Refused, KeyError, TypeError) as error:
                if time.monotonic() >= end:
                    raise ValueError(
                        f"no {self.name} server at {server.url} that can be trained with: {error}. It must run, with "
                        f"{self.dialect.started} (docs/rl.md)"
                    ) from error
            time.sleep(0.5)

    # answers ---------------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, begun: Sequence[Sample | None] = ()
    ) -> list[Sample]:  # fmt: skip
        """Continue every prompt, from its sample in `begun` if there is one; samples come in the prompts' order.

        RuntimeError if no server is left, if one refuses a prompt, or if its answer is not what was asked for.
        """
        refuse_begun(prompts, begun)
        first, numbers = [*begun] or [None] * len(prompts), sampling.numbered(len(prompts))
        pool = ThreadPoolExecutor(max(1, min(self.at_once, len(prompts))))
        try:
            return list(pool.map(self._answer, numbers, prompts, first, repeat(sampling)))
        finally:
            pool.shutdown(cancel_futures=True)

    def _answer(self, number: int, prompt: Sequence[int], begun: Sample | None, sampling: Sampling) -> Sample:
        """Continue a prompt until it has ended, or has as many tokens as the call may give it."""
        sample = begun or Sample([], [], "abort", [])
        end = min(sampling.max_tokens, len(sample.tokens) + (sampling.budget or sampling.max_tokens))
        while sample.finish_reason == "abort" and (had := len(sample.tokens)) < end:
            place = [sampling.seed, number, *([had] if had else [])]  # numbers of its own each time
            seed = int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> 1)
            more = self._ask([*prompt, *sample.tokens], replace(sampling, max_tokens=end - had), seed)
            tokens, reason = sample.tokens + more.tokens, more.finish_reason
            if reason != "stop" and len(tokens) == end:
                reason = "length" if end == sampling.max_tokens else "abort"
            sample = Sample(tokens, sample.logprobs + more.logprobs, reason, sample.versions + more.versions)
        return sample

    def _ask(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> Sample:
        """Return what a server says of a prompt, one token at least."""
        path, body = self.dialect.ask(prompt, sampling, seed)
        data, oldest, said = json.dumps(body).encode(), self.version, ""
        for _ in range(self.tries * len(self.servers) + 1):
            server = self._take()
            try:
                sample = self._read(server, path, call(server.url, path, data, self.timeout), sampling)
                if not sample.tokens:
                    raise Failed(f"{server.url}{path}: aborted before the first token")
            except Failed as error:
                said = str(error)
                self._failed(server, said)
                continue
            except Refused as error:
                raise RuntimeError(f"a {self.name} server refused a prompt: {error}") from error
            finally:
                with self.lock:
                    server.open -= 1
            if sample.versions and min(sample.versions) < oldest:
                server.out = f"it answers with other weights than version {oldest}, which it was sent"
                continue
            server.failures = 0
            return sample
        raise RuntimeError(f"a prompt failed again and again, while others were answered; the last time: {said}")

    def _take(self) -> Server:
        """Choose a server, waiting until one may be asked again."""
        while True:
            with self.lock:
                alive, now = [server for server in self.servers if not server.out], time.monotonic()
                if ready := [server for server in alive if server.until <= now]:
                    server = min(ready, key=lambda server: server.open)
                    server.open += 1
                    return server
                self._any_left()
                rest = min(server.until for server in alive) - now
            time.sleep(rest)

    def _any_left(self) -> None:
        if all(server.out for server in self.servers):
            why = "; ".join(f"{server.url}: {server.out}" for server in self.servers)
            raise RuntimeError(f"no {self.name} server is left: {why}")

    def _failed(self, server: Server, said: str) -> None:
        """Let a server rest; requests that fail together count once."""
        with self.lock:
            now = time.monotonic()
            if now < server.until:
                return
            server.failures += 1
            server.until = now + self.backoff * 2 ** (server.failures - 1)
            if server.failures >= self.tries:
                server.out = said

    def _read(self, server: Server, path: str, said: Any, sampling: Sampling) -> Sample:
        """Check an answer; versions below all that were asked for are -1."""
        try:
            tokens, logprobs, reason, versions = self.dialect.read(said)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            what = f"{type(error).__name__} {error} in {brief(said)}"
            raise RuntimeError(f"{server.url}{path}: no answer of a {self.name} server: {what}") from error
        wrong = ""
        if len(logprobs) != len(tokens) or None in logprobs:
            count = sum(x is not None for x in logprobs)
            wrong = f"{count} log-probabilities of {len(tokens)} tokens; it must run with {self.dialect.started}"
        elif len(tokens) > sampling.max_tokens or not tokens and reason != "abort":
            wrong = f"{len(tokens)} tokens, asked for 1 to {sampling.max_tokens}"
        elif reason not in get_args(Reason):
            wrong = f"ended with {reason!r}, which is not stop, length or abort"
        elif reason == "stop" and tokens[-1] not in sampling.stop:
            wrong = f"ended with token {tokens[-1]}, which is not among the stop ids {list(sampling.stop)}"
        elif versions is not None and len(versions) != len(tokens):
            wrong = f"{len(versions)} weight versions of {len(tokens)} tokens"
        if wrong:
            raise RuntimeError(f"{server.url}{path}: {wrong}")
        known = [self.version] * len(tokens) if versions is None or not self.versions else None
        numbers = known or [self.versions.get(version, -1) for version in versions or []]
        return Sample(tokens, logprobs, reason, numbers)  # type: ignore[arg-type]

    # weights ---------------------------------------------------------------------------------------------------------

    def update(self, params: tree.Tree, version: int) -> None:
        """Have all servers sample with these parameters from now on; RuntimeError if none takes them.

        `params` are as the train state has them. One that does not take them is left out until the next time.
        """
        dtype = self.model.dtype
        self.versions[str(version)] = version  # a sample under way may end with them before all servers have them
        for server in self.servers if self.shard.rank == 0 else []:
            if server.out:
                self._readmit(server)
        for path, body in self._requests(tree.map(lambda p: p.detach().to(dtype or p.dtype), params), str(version)):
            self._tell(path, body)
        outs = backend.everyone([server.out for server in self.servers], self.group)[0]
        for server, out in zip(self.servers, outs, strict=True):
            server.out = out
            server.failures, server.until = 0, 0.0
        self._any_left()
        self.version = version

    def pause(self) -> None:
        """Compute no token until `resume`; what is under way goes on then (LMDeploy: nothing may be)."""
        self._tell(*self.dialect.pause)

    def resume(self) -> None:
        """Go on."""
        self._tell(*self.dialect.resume)

    def _readmit(self, server: Server) -> None:
        try:
            self._probe(server)
            server.out = ""
        except ValueError:
            return

    def _requests(self, params: tree.Tree, version: str) -> Iterator[Request]:
        """Yield what a server is told, in order; ranks other than 0 only send their parts."""
        dialect, model = self.dialect, self.model
        if self.folder:
            hf.save(params, model.specs, model.names[0], self.folder, model.config.hf, shard=self.shard)
        if dialect.held:
            yield dialect.pause
        if self.folder and dialect.disk:
            yield from dialect.disk(self.folder, version)
        else:
            yield from dialect.begin
            for bucket in _buckets(self._named(params), BUCKET // self.ranks):
                yield dialect.load(bucket, self.ranks, version)
            yield from dialect.finish(version)
        if dialect.held:
            yield dialect.resume

    def _named(self, params: tree.Tree) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of a checkpoint by their names, on rank 0."""
        leaves, path, whole = tree.flatten(params), "", None
        for name, slot in hf.expand(self.model.specs, self.model.names[0]).items():
            if slot.path != path:
                path, leaf = slot.path, leaves[slot.path]
                whole = self.shard.full(leaf) if self.dialect.on_device else self.shard.collect(leaf)
            if self.shard.rank == 0 and whole is not None:
                yield name, whole[slot.index].view(slot.shape)

    def _tell(self, path: str, body: dict[str, Any]) -> None:
        """Post to all servers at once; those that fail are left out."""
        alive = [server for server in self.servers if not server.out] if self.shard.rank == 0 else []
        if alive:
            data = json.dumps(body).encode()
            with ThreadPoolExecutor(len(alive)) as pool:
                for server, out in zip(alive, pool.map(lambda one: self._told(one, path, data), alive), strict=True):
                    server.out = out

    def _told(self, server: Server, path: str, data: bytes) -> str:
        """Post, again where that may help; return why it failed."""
        said = ""
        for attempt in range(self.tries):
            time.sleep(self.backoff * 2 ** (attempt - 1) if attempt else 0)
            try:
                call(server.url, path, data, self.timeout)
                return ""
            except Failed as error:
                said = str(error)
            except Refused as error:
                return str(error)
        return said


def _buckets(named: Iterator[tuple[str, torch.Tensor]], size: int) -> Iterator[Named]:
    """Group tensors, in order, to at most `size` bytes, one tensor at least."""
    held: list[tuple[str, torch.Tensor]] = []
    total = 0
    for name, tensor in named:
        if held and total + tensor.nbytes > size:
            yield held
            held, total = [], 0
        held.append((name, tensor))
        total += tensor.nbytes
    if held:
        yield held
