"""Rollout engines on the other side of HTTP: one or several servers of vLLM, SGLang or LMDeploy.

Every prompt is a request of its own, and goes to the server that has the fewest. One that fails is sent again, there
or elsewhere (`servers`). A prompt has one answer, that of its one request that succeeded. Answers must be of the
weights that were sent last: those of a server that has restarted meanwhile, with its old ones, are asked for again.

An answer that has begun, in a call before or because a server aborted it, goes on by a request for what follows the
prompt and the tokens that it has, whose keys and values are computed again (as AReaL does, arxiv 2505.24298).
"""

import json
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from functional_trainer import backend, hf, routing, tree
from functional_trainer.engines import Sample, Sampling, refuse_begun
from functional_trainer.engines.dialects import DIALECTS, Dialect, Named, Request
from functional_trainer.engines.servers import Failed, Refused, Server, Servers, call, dial, ended
from functional_trainer.errors import brief
from functional_trainer.types import ONE_DEVICE

BUCKET = 1 << 27
"""Bytes of weights in one request, if no tensor alone has more."""
TRIES = 5
"""Times that a prompt may fail, for each server, where others are answered."""
Reason = Literal["stop", "length", "abort"]


class RemoteEngine:
    """An `Engine` whose answers come from servers; see the top of this file.

    `urls` are those of the servers, all of the kind `dialect`. `model` and `shard` say how `params` of an update become
    the tensors of a checkpoint; they go in the model's dtype, through `folder`, which servers must see, or without one
    through memory, where rank 0 keeps them, for a server that restarts. All ranks make an engine and call `update`
    together, from threads that may use `group`; rank 0 sends. `at_once` requests are under way at most, each for at
    most `timeout` seconds. A server may be away for `patience` seconds; it rests for `backoff` seconds after it fails,
    and is looked at every `every` seconds. With `record_routing` samples say which experts were chosen. ValueError if a
    server does not answer within `wait` seconds, or for what servers or the model do not have.
    """

    def __init__(
        self, dialect: str, urls: Sequence[str], model: Any, *, shard=ONE_DEVICE, folder: str | Path | None = None,
        at_once: int = 256, timeout: float = 600.0, wait: float = 0.0, patience: float = 120.0, backoff: float = 0.5,
        every: float = 5.0, group: Any = None, record_routing: bool = False,
    ):  # fmt: skip
        self.name, self.dialect, self.model, self.shard = dialect, DIALECTS[dialect], model, shard
        if folder and self.dialect.disk is None:
            raise ValueError(f"{dialect} servers load no weights from a folder; let them get them from memory")
        self.folder = str(Path(folder).resolve()) if folder else None
        self.record = routing.id_type(model) if record_routing else None
        self.group, self.at_once, self.timeout = group, at_once, timeout
        self.version = -1  # nothing was sent
        how = {"timeout": timeout, "patience": patience, "backoff": backoff, "every": every}
        self.servers = Servers(dialect, self.dialect, urls, **how)
        end = time.monotonic() + wait
        self.ranks = max(self.servers.probe(server, end) for server in self.servers.all)

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
            routed, before = more.routed_experts, sample.routed_experts
            if routed is not None and before is not None:  # what was recorded before is as it was
                routed = np.concatenate([before, routed[len(before) :]])
            versions = sample.versions + more.versions
            sample = Sample(tokens, sample.logprobs + more.logprobs, reason, versions, routed_experts=routed)
        return sample

    def _ask(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> Sample:
        """Return what a server says of a prompt, one token at least."""
        path, body = self.dialect.ask(prompt, sampling, seed, self.record is not None)
        data, oldest, said, failures = json.dumps(body).encode(), self.version, "", 0
        while failures < TRIES * len(self.servers.all):
            server = self.servers.take()
            line = server.line
            try:
                answer = call(server.url, path, data, self.timeout)
                sample = self._read(server, path, answer, sampling, len(prompt))
                if not sample.tokens:
                    raise Failed(f"{server.url}{path}: aborted before the first token")
                if min(sample.versions) < oldest or self._unsure(line):
                    raise Failed(f"it answers with other weights than version {oldest}, which it was sent")
            except Failed as error:
                said = str(error)
                failures += self.servers.failed(server, said)
                continue
            except Refused as error:
                raise RuntimeError(f"a {self.name} server refused a prompt: {error}") from error
            finally:
                with self.servers.lock:
                    server.open -= 1
            server.failures = 0
            return sample
        raise RuntimeError(f"a prompt failed again and again, while others were answered; the last time: {said}")

    def _unsure(self, line: socket.socket | None) -> bool:
        """Whether a server that does not say which weights it has may have others than it was sent."""
        return not self.dialect.version and self.version >= 0 and ended(line)

    def _read(self, server: Server, path: str, said: Any, sampling: Sampling, before: int) -> Sample:
        """Check an answer to a prompt of `before` tokens; a version that is no number is -1."""
        try:
            tokens, logprobs, reason, versions, routed = self.dialect.read(said)
            routed = self._routed(routed, before + len(tokens) - 1) if self.record and tokens else None
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
        numbers = [self.version] * len(tokens)
        if versions is not None:
            numbers = [int(version) if str(version).isdecimal() else -1 for version in versions]
        return Sample(tokens, logprobs, reason, numbers, routed_experts=routed)  # type: ignore[arg-type]

    def _routed(self, ids: np.ndarray | None, tokens: int) -> np.ndarray:
        """Return the experts of so many tokens, (tokens, L, K), from those of all layers, of which some have none."""
        layers = ["moe" in layer for layer in self.model.specs["layers"]]
        if ids is None:
            raise ValueError(f"no routed_experts; it must run with {self.dialect.routes}")
        whole = ids.reshape(tokens, len(layers), self.model.config.top_k)[:, layers]
        if whole.size and not 0 <= whole.min() <= whole.max() < self.model.config.experts:
            raise ValueError(f"experts {whole.min()} to {whole.max()} of {self.model.config.experts}")
        return whole.astype(str(self.record).removeprefix("torch."))

    # weights ---------------------------------------------------------------------------------------------------------

    def update(self, params: tree.Tree, version: int) -> None:
        """Have all servers sample with these parameters from now on; RuntimeError if none takes them in time.

        `params` are as the train state has them. A server that does not take them is left out until it does.
        """
        dtype, model = self.model.dtype, self.model
        cast = tree.map(lambda p: p.detach().to(dtype or p.dtype), params)
        if self.folder:
            hf.save(cast, model.specs, model.names[0], self.folder, model.config.hf, shard=self.shard)
        named = [] if self.folder else list(self._named(cast))
        if not self.dialect.version:  # every rank must notice a server that restarts after rank 0 has sent
            for server in self.servers.all if self.shard.rank else []:
                server.line = dial(server.url)
            backend.everyone(None, self.group)

        def give() -> list[str]:
            if self.shard.rank == 0:
                how = self.dialect, self.folder, self.ranks
                self.servers.give(version, partial(_requests, *how, named, str(version)))  # holds no engine
            return [server.out for server in self.servers.all]

        outs = backend.together(give, self.group)[0]
        for server, out in zip(self.servers.all, outs, strict=True):
            if self.shard.rank:
                server.out, server.failures, server.until = out, 0, 0.0
        self.version = version

    def pause(self) -> None:
        """Compute no token until `resume`; what is under way goes on then (LMDeploy: nothing may be)."""
        self._tell(self.dialect.pause)

    def resume(self) -> None:
        """Go on."""
        self._tell(self.dialect.resume)

    def _tell(self, request: Request) -> None:
        alive = [server for server in self.servers.all if not server.out]
        self.servers.post(alive if self.shard.rank == 0 else [], *request)

    def _named(self, params: tree.Tree) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of a checkpoint by their names, on rank 0."""
        leaves, path, whole = tree.flatten(params), "", None
        for name, slot in hf.expand(self.model.specs, self.model.names[0]).items():
            if slot.path != path:
                path, leaf = slot.path, leaves[slot.path]
                whole = self.shard.full(leaf) if self.dialect.on_device else self.shard.collect(leaf)
            if self.shard.rank == 0 and whole is not None:
                yield name, whole[slot.index].view(slot.shape)


def _requests(dialect: Dialect, folder: str | None, ranks: int, named: Named, version: str) -> Iterator[Request]:
    """Yield what a server is told to take weights, in order."""
    if dialect.held:
        yield dialect.pause
    if folder and dialect.disk:
        yield from dialect.disk(folder, version)
    else:
        yield from dialect.begin
        for bucket in _buckets(named, BUCKET // ranks):
            yield dialect.load(bucket, ranks, version)
        yield from dialect.finish(version)
    if dialect.held:
        yield dialect.resume


def _buckets(named: Named, size: int) -> Iterator[Named]:
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
