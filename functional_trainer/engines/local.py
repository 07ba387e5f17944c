"""The built-in rollout engine: rows that decode together against a KV cache, on the parameters that are trained.

Continuous batching (Orca, Yu et al., 2022): a row whose sample has ended is given to a prompt that waits. Prompts are
run ahead of the rows that become free, all but their last tokens, many at once and equal ones once; what they leave in
a cache of their own is copied to their rows. The last token is fed as every later one is, so there is one place where
tokens are chosen. When no prompt waits and half of the rows are free, the others are moved together and half as many
go on, down to a quarter of the slots.

Every row of the cache has its own place to write. Place and position are one number, so what an earlier sample left
beyond a row's place lies in the future, where no query looks, until it is written over. A row that has ended goes on as
padding, which reaches no expert, until the host looks, every few tokens: nothing is read back in between.

An answer can be interrupted at such a look, by new parameters or by `pause`, and goes on from its prompt and the tokens
that it has, whose keys and values are computed again by the parameters of then, as in AReaL (arxiv 2505.24298, 4.1).
So every log-probability is the one that parameters of its version give after all that stands before it, which is what
the trainer computes; with keys and values of older parameters kept, as PipelineRL does, it would be no policy's.

B rows (slots), E tokens between two looks, V vocabulary.
"""

import threading
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

import kernels
from functional_trainer import routing, tree
from functional_trainer.engines import Sample, Sampling, refuse_begun
from functional_trainer.engines.sampling import sample, uniforms
from functional_trainer.remat import wrap_layer
from functional_trainer.step import Compile, settings
from functional_trainer.types import Batch

TOGETHER = 4096
"""Tokens of prompts, padding included, that are run at once."""
FEWEST = 8
"""Rows below which it is not worth while to go on with fewer."""
Prompt = Sequence[int]


class Rows(NamedTuple):
    """Where each row is: the token to feed, its place, the place behind the last one that may be fed, all int64 (B,),
    and whether the row goes on, bool (B,)."""

    token: torch.Tensor
    place: torch.Tensor
    end: torch.Tensor
    live: torch.Tensor


class Request(NamedTuple):
    """A prompt: its number, its random numbers, after how many tokens the call ends at most, and what it gave until
    now."""

    number: int
    prompt: Prompt
    uniforms: np.ndarray
    end: int
    tokens: list[int]
    logprobs: list[float]
    versions: list[int]
    routed: list[np.ndarray]
    """Experts of the tokens that were run, if they are recorded."""

    @property
    def prefix(self) -> list[int]:
        """What the next token follows."""
        return [*self.prompt, *self.tokens]


class Ready(NamedTuple):
    """A request whose beginning has been run, and which row of a cache has what that left."""

    request: Request
    cache: tree.Tree
    row: int


def decode(
    model: Any, params: tree.Tree, cache: tree.Tree, rows: Rows, u_B: torch.Tensor, stop_V: torch.Tensor,
    sampling: Sampling, record: torch.dtype | None = None,
) -> tuple[Rows, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Feed each row's token and choose its next; return the rows, the chosen tokens' log-probabilities (B,), and if
    they are recorded, in the type `record`, the experts of the tokens that were fed, (B, L, K)."""
    batch = {
        "tokens": rows.token[:, None],
        "segment_ids": rows.live[:, None].to(torch.int64),
        "positions": rows.place[:, None],
    }
    output = model.apply(params, batch, cache=cache | {"length": rows.place})
    z_BV = model.unembed(params).logits(output.hidden[:, 0])
    logp_BV = (z_BV / sampling.temperature if sampling.temperature else z_BV).log_softmax(-1)
    token = sample(logp_BV, u_B, sampling)
    place = rows.place + rows.live
    live = rows.live & (place < rows.end) & ~stop_V[token]
    routed_BLK = None if record is None else routing.recorded(output.aux, record)[:, 0]
    return Rows(token, place, rows.end, live), logp_BV.gather(-1, token[:, None])[:, 0], routed_BLK


class LocalEngine:
    """An `Engine` in this process, on one device.

    `slots` rows decode together, each of at most `length` tokens, its prompt included. `compile` says what is compiled
    of the decoding of a token; prompts come in many shapes and are run as they are. The host looks every `look_every`
    tokens which rows have ended.

    With `record_routing` samples say which experts were chosen; ValueError if the model has none.

    Parameters are used where they are, so a train step, which writes into them, changes the engine's too. Where the
    model computes in another dtype `update` makes a copy instead.

    One thread calls `generate`; `update`, `pause` and `resume` may come from another meanwhile.
    """

    def __init__(
        self, model: Any, params: tree.Tree, *, slots: int = 64, length: int = 1024, compile: Compile = "off",
        look_every: int = 4, version: int = 0, backend: str = "inductor", record_routing: bool = False,
    ):  # fmt: skip
        if min(slots, length, look_every) < 1:
            raise ValueError(f"slots {slots}, length {length}, look_every {look_every}: each must be at least 1")
        self.model, self.slots, self.length, self.look_every = model, slots, length, look_every
        layered = wrap_layer(model, compile=True, remat="none", backend=backend) if compile == "layer" else model
        self.record = routing.id_type(model) if record_routing else None
        step = partial(decode, layered, record=self.record)
        whole = compile == "step"
        self._decode = torch.compile(step, fullgraph=True, dynamic=False, backend=backend) if whole else step
        self._compiles = compile != "off"
        self._lock, self._busy, self._paused = threading.Lock(), False, False
        self._next: tuple[tree.Tree, int] | None = None
        self.update(params, version)
        self._cache = self._new_cache(slots, length)

    def update(self, params: tree.Tree, version: int) -> None:
        """Sample with these parameters from now on; answers under way, from the next look on."""
        dtype = self.model.dtype
        new = tree.map(lambda p: p.detach().to(dtype or p.dtype), params), version
        with self._lock:
            if self._busy:
                self._next = new
            else:
                self.params, self.version = new

    def pause(self) -> None:
        """Return from `generate` at the next look, and at once when it is called, until `resume`.

        What has not ended has finish_reason "abort"; `generate` goes on with it if it is `begun`.
        """
        self._paused = True

    def resume(self) -> None:
        """Let `generate` work again."""
        self._paused = False

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, begun: Sequence[Sample | None] = ()
    ) -> list[Sample]:
        """Continue every prompt; samples come in the prompts' order. ValueError for a prompt that does not fit.

        `begun` has for each prompt the sample that it goes on from, all of whose tokens are kept, or None.
        """
        self._check(prompts, sampling, begun)
        numbers = sampling.numbered(len(prompts))
        requests = [_request(*one, sampling) for one in zip_longest(numbers, prompts, begun)]
        self._take(busy=True)
        try:
            self._run(requests, sampling)
        finally:
            self._take(busy=False)
        return [_sample(request, sampling) for request in requests]

    def _run(self, requests: list[Request], sampling: Sampling) -> None:
        """Add tokens to requests until all have ended or the engine is paused."""
        stop_V, zero_B = self._stops(sampling.stop), self._ids([0] * self._fewer(self.slots, len(requests)))
        rows = Rows(zero_B.clone(), zero_B.clone(), zero_B.clone(), zero_B != 0)
        waiting, ready, running = _queue(requests), deque[Ready](), dict[int, Request]()
        with ExitStack() as stack:
            if self._compiles:
                for context in (settings(False), kernels.kept_on_disk()):
                    stack.enter_context(context)
            while (waiting or ready or running) and not self._paused:
                if self._take(busy=True):  # what was computed by the old ones is computed again
                    waiting = _queue([*waiting, *(one.request for one in ready), *running.values()])
                    rows, ready, running = rows._replace(live=torch.zeros_like(rows.live)), deque(), {}
                while (waiting or ready) and len(running) < len(rows.live):
                    ready = ready or self._prefill(waiting)
                    self._admit(rows, ready, running)
                rows = self._advance(rows, stop_V, running, sampling)
                if running and not (waiting or ready):
                    rows, running = self._gather(rows, running)

    def _take(self, busy: bool) -> bool:
        """Use the parameters that came last, and say whether any came; `busy`: those to come wait for a look."""
        with self._lock:
            self._busy, new, self._next = busy, self._next, None
            if new is not None:
                self.params, self.version = new
        return new is not None

    def _check(self, prompts: Sequence[Prompt], sampling: Sampling, begun: Sequence[Sample | None]) -> None:
        refuse_begun(prompts, begun)
        for i, prompt in enumerate(prompts):
            if len(prompt) + sampling.max_tokens > self.length:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens, with max_tokens {sampling.max_tokens} more than the "
                    f"{self.length} that a row holds: raise length, or lower max_tokens"
                )

    def _ids(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.params["embed"].device)

    def _stops(self, ids: tuple[int, ...]) -> torch.Tensor:
        """Return whether a token ends a sample, bool (V,)."""
        vocabulary = len(self.model.unembed(self.params).weight)
        if wrong := [i for i in ids if not 0 <= i < vocabulary]:
            raise ValueError(f"stop has {wrong[0]}, which is not among the {vocabulary} tokens of the model")
        stop_V = self._ids([0] * vocabulary) != 0
        stop_V[self._ids(ids)] = True
        return stop_V

    def _new_cache(self, rows: int, length: int) -> tree.Tree:
        cache = self.model.init_cache(rows, length, self.params)
        return {name: columns for name, columns in cache.items() if name != "length"}

    def _prefill(self, waiting: deque[Request]) -> deque[Ready]:
        """Take requests that wait, run all their tokens but the last ones at once, those that are equal only once."""
        numbers: dict[tuple[int, ...], int] = {}
        taken: list[tuple[Request, int]] = []
        while waiting:
            beginning = tuple(waiting[0].prefix[:-1])
            if taken and beginning not in numbers and (len(numbers) + 1) * len(beginning) > TOGETHER:
                break
            taken.append((waiting.popleft(), numbers.setdefault(beginning, len(numbers))))
        batch = _padded(list(numbers), self.params["embed"].device)
        cache = self._new_cache(*batch["tokens"].shape)
        aux = self.model.apply(self.params, batch, cache=cache | {"length": 0}).aux
        routed = None if self.record is None else routing.recorded(aux, self.record).numpy(force=True)
        if routed is not None:
            for request, row in taken:  # what was recorded before is as it was
                request.routed.append(routed[row, sum(map(len, request.routed)) : len(request.prefix) - 1])
        return deque(Ready(request, cache, row) for request, row in taken)

    def _admit(self, rows: Rows, ready: deque[Ready], running: dict[int, Request]) -> None:
        """Give free rows to requests that are ready, in place."""
        free = [slot for slot in range(len(rows.live)) if slot not in running][: len(ready)]
        entering = [ready.popleft() for _ in free]
        at, source = self._ids(free), self._ids([one.row for one in entering])
        for held, new in zip(tree.leaves(self._cache), tree.leaves(entering[0].cache), strict=True):
            held[at, : new.shape[1]] = new[source]
        mine = [one.request for one in entering]
        place = self._ids([len(request.prefix) - 1 for request in mine])
        rows.token[at], rows.place[at] = self._ids([request.prefix[-1] for request in mine]), place
        rows.end[at] = place + self._ids([request.end - len(request.tokens) for request in mine])
        rows.live[at] = True
        running.update(zip(free, mine, strict=True))

    def _advance(self, rows: Rows, stop_V: torch.Tensor, running: dict[int, Request], sampling: Sampling) -> Rows:
        """Decode `look_every` tokens and hand them to their requests; return the rows, those that have ended free."""
        u_EB = np.ones((self.look_every, len(rows.live)))
        for slot, request in running.items():
            u = request.uniforms[len(request.tokens) :][: self.look_every]
            u_EB[: len(u), slot] = u
        furthest = max(len(request.prompt) + len(request.tokens) for request in running.values())
        reach = self._reach(furthest + self.look_every)
        rows = rows._replace(place=rows.place * rows.live)  # what has ended writes where it is in nobody's way
        cache, found, routed = tree.map(lambda held: held[: len(rows.live), :reach], self._cache), [], []
        for u_B in torch.from_numpy(u_EB).to(stop_V.device):
            fed = rows.live
            rows, logp_B, routed_BLK = self._decode(self.params, cache, rows, u_B, stop_V, sampling)
            found.append((rows.token, logp_B, fed, rows.live))
            routed += [] if routed_BLK is None else [routed_BLK]
        token_BE, logp_BE, fed_BE, live_BE = (torch.stack(x, 1).tolist() for x in zip(*found, strict=True))
        routed_BELK = torch.stack(routed, 1).numpy(force=True) if routed else None
        for slot, request in list(running.items()):
            count = sum(fed_BE[slot])
            request.tokens.extend(token_BE[slot][:count])
            request.logprobs.extend(logp_BE[slot][:count])
            request.versions.extend([self.version] * count)
            request.routed.extend([] if routed_BELK is None else [routed_BELK[slot, :count]])
            if not live_BE[slot][-1]:
                del running[slot]
        return rows

    def _reach(self, wanted: int) -> int:
        """Return how much of the cache's length is looked at: what is needed or, compiled, one of three lengths."""
        sizes = (self.length // 4, self.length // 2, self.length) if self._compiles else (min(wanted, self.length),)
        return min((n for n in sizes if n >= wanted), default=self.length)

    def _fewer(self, rows: int, wanted: int) -> int:
        """Return how many rows go on for so many requests: all, half or a quarter of the slots, at most `rows`."""
        sizes = [n for n in (self.slots // 2, self.slots // 4) if max(wanted, FEWEST) <= n <= rows]
        return min(sizes, default=rows)

    def _gather(self, rows: Rows, running: dict[int, Request]) -> tuple[Rows, dict[int, Request]]:
        """Move requests to the first rows, and return as many rows as go on."""
        fewer = self._fewer(len(rows.live), len(running))
        if fewer == len(rows.live):
            return rows, running
        from_ = self._ids([*running, *(slot for slot in range(len(rows.live)) if slot not in running)][:fewer])
        for held in tree.leaves(self._cache):
            held[:fewer] = held[from_]
        return Rows(*(x[from_] for x in rows)), dict(enumerate(running.values()))


def _request(number: int, prompt: Prompt, begun: Sample | None, sampling: Sampling) -> Request:
    tokens, logprobs, versions = (begun.tokens, begun.logprobs, begun.versions) if begun else ([], [], [])
    end = min(sampling.max_tokens, len(tokens) + (sampling.budget or sampling.max_tokens))
    numbers = uniforms(sampling.seed, number, sampling.max_tokens)
    routed = [] if begun is None or begun.routed_experts is None else [begun.routed_experts]
    return Request(number, prompt, numbers, end, [*tokens], [*logprobs], [*versions], routed)


def _queue(requests: Sequence[Request]) -> deque[Request]:
    """Return requests in the order in which they are run: short ones first, equal ones together."""
    return deque(sorted(requests, key=lambda request: (len(request.prefix), request.prefix, request.number)))


def _sample(request: Request, sampling: Sampling) -> Sample:
    tokens, routed = request.tokens, np.concatenate(request.routed) if request.routed else None
    stopped, full = bool(tokens) and tokens[-1] in sampling.stop, len(tokens) == sampling.max_tokens
    reason: Literal["stop", "length", "abort"] = "stop" if stopped else "length" if full else "abort"
    return Sample(tokens, request.logprobs, reason, request.versions, routed_experts=routed)


def _padded(prompts: Sequence[Prompt], device: torch.device) -> Batch:
    """Return columns of one prompt a row, padded on the right to at least one token."""
    width = max(1, *map(len, prompts))
    tokens = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
    positions = torch.arange(width).expand_as(tokens)
    real = positions < torch.tensor([[len(prompt)] for prompt in prompts])
    columns = {"tokens": tokens, "segment_ids": real.to(torch.int64), "positions": positions}
    return {name: column.to(device) for name, column in columns.items()}


def generate(
    model: Any, params: tree.Tree, prompts: Sequence[Prompt], max_new_tokens: int = 64, temperature: float = 0.0,
    top_k: int = 0, top_p: float = 1.0, eos_ids: Collection[int] = (), seed: int = 0, slots: int = 256,
) -> list[Sample]:  # fmt: skip
    """Continue prompts, at most `slots` at a time, with an engine made for them; see `Sampling` and `Sample`."""
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, stop=tuple(eos_ids), seed=seed)
    length = max(map(len, prompts), default=0) + max_new_tokens
    engine = LocalEngine(model, params, slots=max(1, min(slots, len(prompts))), length=length)
    return engine.generate(prompts, sampling)
