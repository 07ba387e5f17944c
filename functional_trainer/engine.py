"""The built-in rollout engine: rows that decode together against a KV cache, on the parameters that are trained.

Continuous batching (Orca, Yu et al., 2022): a row whose sample has ended is given to a prompt that waits. Prompts are
run ahead of the rows that become free, all but their last tokens, many at once and equal ones once; what they leave in
a cache of their own is copied to their rows. The last token is fed as every later one is, so there is one place where
tokens are chosen. When no prompt waits and half of the rows are free, the others are moved together and half as many
go on, down to a quarter of the slots.

Every row of the cache has its own place to write. Place and position are one number, so what an earlier sample left
beyond a row's place lies in the future, where no query looks, until it is written over. A row that has ended goes on as
padding, which reaches no expert, until the host looks, every few tokens: nothing is read back in between.

B rows (slots), E tokens between two looks, V vocabulary.
"""

from collections import deque
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

import kernels
from functional_trainer import routing, tree
from functional_trainer.remat import wrap_layer
from functional_trainer.rollout import Sample, Sampling
from functional_trainer.sampling import sample, uniforms
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


class Ready(NamedTuple):
    """A prompt whose beginning has been run: its number in the call, which row of a cache has what that left, and the
    experts that were chosen, if they are recorded."""

    number: int
    cache: tree.Tree
    row: int
    routed: list[np.ndarray]


class Request(NamedTuple):
    """A prompt that has a row: its number in the call, its random numbers, and what it gave until now."""

    number: int
    uniforms: np.ndarray
    tokens: list[int]
    logprobs: list[float]
    routed: list[np.ndarray]


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
        self.update(params, version)
        self._cache = self._new_cache(slots, length)

    def update(self, params: tree.Tree, version: int) -> None:
        """Sample with these parameters from now on."""
        dtype = self.model.dtype
        self.params, self.version = tree.map(lambda p: p.detach().to(dtype or p.dtype), params), version

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Sample]:
        """Continue every prompt; samples come in the prompts' order. ValueError for a prompt that does not fit."""
        self._check(prompts, sampling)
        stop_V, zero_B = self._stops(sampling.stop), self._ids([0] * self._fewer(self.slots, len(prompts)))
        rows = Rows(zero_B.clone(), zero_B.clone(), zero_B.clone(), zero_B != 0)
        waiting = deque(sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), list(prompts[i]))))
        ready: deque[Ready] = deque()
        running: dict[int, Request] = {}
        samples: dict[int, Sample] = {}
        with ExitStack() as stack:
            if self._compiles:
                for context in (settings(False), kernels.kept_on_disk()):
                    stack.enter_context(context)
            while waiting or ready or running:
                while (waiting or ready) and len(running) < len(rows.live):
                    ready = ready or self._prefill(waiting, prompts)
                    self._admit(rows, ready, running, prompts, sampling)
                rows, ended = self._advance(rows, stop_V, running, sampling)
                samples |= {done.number: self._sample(done, sampling) for done in ended}
                if running and not (waiting or ready):
                    rows, running = self._gather(rows, running)
        return [samples[i] for i in range(len(prompts))]

    def _check(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {i} is empty: every prompt needs at least one token")
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

    def _prefill(self, waiting: deque[int], prompts: Sequence[Prompt]) -> deque[Ready]:
        """Take prompts that wait, run all their tokens but the last ones at once, those that are equal only once."""
        numbers: dict[tuple[int, ...], int] = {}
        taken: list[tuple[int, int]] = []
        while waiting:
            beginning = tuple(prompts[waiting[0]][:-1])
            if taken and beginning not in numbers and (len(numbers) + 1) * len(beginning) > TOGETHER:
                break
            taken.append((waiting.popleft(), numbers.setdefault(beginning, len(numbers))))
        batch = _padded(list(numbers), self.params["embed"].device)
        cache = self._new_cache(*batch["tokens"].shape)
        aux = self.model.apply(self.params, batch, cache=cache | {"length": 0}).aux
        routed = None if self.record is None else routing.recorded(aux, self.record).numpy(force=True)
        own = {i: [] if routed is None else [routed[row, : len(prompts[i]) - 1]] for i, row in taken}
        return deque(Ready(number, cache, row, own[number]) for number, row in taken)

    def _admit(self, rows: Rows, ready: deque[Ready], running: dict[int, Request], prompts, sampling: Sampling) -> None:
        """Give free rows to prompts that are ready, in place."""
        free = [slot for slot in range(len(rows.live)) if slot not in running][: len(ready)]
        entering = [ready.popleft() for _ in free]
        at, source = self._ids(free), self._ids([one.row for one in entering])
        for held, new in zip(tree.leaves(self._cache), tree.leaves(entering[0].cache), strict=True):
            held[at, : new.shape[1]] = new[source]
        mine = [prompts[one.number] for one in entering]
        place = self._ids([len(prompt) - 1 for prompt in mine])
        rows.token[at], rows.place[at] = self._ids([prompt[-1] for prompt in mine]), place
        rows.end[at], rows.live[at] = place + sampling.max_tokens, True
        for slot, one in zip(free, entering, strict=True):
            numbers = uniforms(sampling.seed, one.number, sampling.max_tokens)
            running[slot] = Request(one.number, numbers, [], [], one.routed)

    def _advance(
        self, rows: Rows, stop_V: torch.Tensor, running: dict[int, Request], sampling: Sampling
    ) -> tuple[Rows, list[Request]]:
        """Decode `look_every` tokens and hand them to their requests; return the rows, and requests that have ended."""
        u_EB = np.ones((self.look_every, len(rows.live)))
        for slot, request in running.items():
            u = request.uniforms[len(request.tokens) :][: self.look_every]
            u_EB[: len(u), slot] = u
        cache, found, routed = tree.map(lambda held: held[: len(rows.live)], self._cache), [], []
        for u_B in torch.from_numpy(u_EB).to(stop_V.device):
            fed = rows.live
            rows, logp_B, routed_BLK = self._decode(self.params, cache, rows, u_B, stop_V, sampling)
            found.append((rows.token, logp_B, fed, rows.live))
            routed += [] if routed_BLK is None else [routed_BLK]
        token_BE, logp_BE, fed_BE, live_BE = (torch.stack(x, 1).tolist() for x in zip(*found, strict=True))
        routed_BELK = torch.stack(routed, 1).numpy(force=True) if routed else None
        for slot, request in running.items():
            count = sum(fed_BE[slot])
            request.tokens.extend(token_BE[slot][:count])
            request.logprobs.extend(logp_BE[slot][:count])
            request.routed.extend([] if routed_BELK is None else [routed_BELK[slot, :count]])
        return rows, [running.pop(slot) for slot in list(running) if not live_BE[slot][-1]]

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

    def _sample(self, done: Request, sampling: Sampling) -> Sample:
        reason: Literal["stop", "length"] = "stop" if done.tokens[-1] in sampling.stop else "length"
        routed = np.concatenate(done.routed) if done.routed else None
        versions = [self.version] * len(done.tokens)
        return Sample(done.tokens, done.logprobs, reason, versions, routed_experts=routed)


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
