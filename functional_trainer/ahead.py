"""Rollouts that are drawn while the step trains: one-step-off, bounded staleness, partial rollouts.

A version of the weights is the number of rollouts that were trained before. Rollout n is trained by version n, and
begun when the trainer is at rollout n - level at the earliest: what AReaL admits, capacity = (level + version + 1) -
begun, in rollouts (arxiv 2505.24298, `staleness_manager.py`). It is drawn from the newest weights at its beginning,
version n - level or a later one. With level 1 it is always n - 1, so that a run can be repeated bit for bit: the order
of verl's one-step-off.

The step writes parameters in place. So a rollout is drawn from a copy, made between two steps in the thread that
trains, where on a mesh all ranks gather. Everything else of a rollout, rewards too, happens in a thread of its own,
whose exchanges between ranks need a process group of their own.

With a budget (partial rollouts: Kimi k1.5, arxiv 2501.12599, 2.6; slime) an answer grows by so many tokens in a call. A
rollout is whole when enough groups have ended; what has not waits for the next rollout, and goes on there first. What
could not wait any longer is ended at once instead, and no more is begun than can be trained in time: dropping answers
that are too old would starve the long ones.
"""

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from functional_trainer.engines import Sample
from functional_trainer.experience import Drawn, Experience, _bytes, _columns
from functional_trainer.rollouts import Prompt

PATIENCE = 10.0
"""Seconds that the thread gets to end when the run does."""
TRIES = 3
"""Times that answers of a group may come from weights that are too old, in one rollout."""


class Closed(Exception):
    """The run ends: nobody waits for this rollout."""


class Group(NamedTuple):
    """A prompt, by its number, and its answers until now."""

    prompt: int
    answers: list[Sample | None]

    @property
    def ended(self) -> bool:
        return all(map(_ended, self.answers))

    @property
    def oldest(self) -> float:
        """The oldest version that a token is of; infinite if there is none."""
        return min((v for answer in self.answers if answer for v in answer.versions), default=float("inf"))


class Ahead(Experience):
    """An `Experience` of which up to `level` rollouts are drawn ahead (0: none, but answers may wait).

    `generate` takes, besides prompts and a seed, what each answer goes on from, and the `budget` (0: no limit).
    `weights` makes a copy. Tokens are at most `staleness` versions older than the weights that train on them: groups
    with older ones are dropped, and their prompts asked again. `last` is how many rollouts there are in all. With
    `in_flight` answers under way go on with every new version of the weights at once: `update` is then called by the
    thread that trains, else by the one that draws, never by both, so that each may exchange with its like on other
    ranks. `stop` makes `generate` return. `everyone` exchanges what the ranks' threads that draw give. RuntimeError if
    what generates lags behind for good.
    """

    generate: Callable[[list[Prompt], int, list[Sample | None], int], list[Sample]]  # type: ignore[assignment]

    def __init__(
        self, *args: Any, level: int, staleness: int, budget: int = 0, last: float = float("inf"),
        in_flight: bool = False, everyone: Callable[[Any], list[Any]] = lambda value: [value],
        stop: Callable[[], Any] = lambda: None, **options: Any,
    ):  # fmt: skip
        super().__init__(*args, **options)
        self.level, self.staleness, self.budget, self.total = level, staleness, budget, last
        self.in_flight, self.everyone, self.stop = in_flight, everyone, stop
        self.changed = threading.Condition()
        self.snapshots: dict[int, Any] = {}
        self.version, self.made, self.calls, self.dropped = -1, 0, 0, 0
        self.ready, self.groups = deque[Drawn](), list[Group]()
        self.thread: threading.Thread | None = None
        self.failed: BaseException | None = None
        self.closed = False

    # the thread that trains -------------------------------------------------------------------------------------------

    def _roll(self) -> None:
        """Hand out the weights, and take the next rollout."""
        copied = time.perf_counter()
        weights = self.weights()
        if self.in_flight:
            self.update(weights, self.count)
        with self.changed:
            self.version = self.count
            self.snapshots[self.version] = weights
            self.changed.notify_all()
        if self.thread is None:
            self.thread = threading.Thread(target=self._work, name="rollouts", daemon=True)
            atexit.register(self.close)  # a thread that computes must not outlive the interpreter
            self.thread.start()
        begun = time.perf_counter()
        self._wait(lambda: bool(self.ready))
        self._hold(self.ready.popleft(), begun - copied)
        self.said["wait_s"] = self.said["wait_s"] | {"trainer": time.perf_counter() - begun}

    def _wait(self, there: Callable[[], bool]) -> None:
        with self.changed:
            self.changed.wait_for(lambda: there() or self.failed is not None)
            if not there() and self.failed is not None:
                raise self.failed

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, with all rollouts that were begun: it waits until they are drawn."""
        if self.thread is not None:
            self._wait(lambda: not self._admitted)
        ahead = [{"parts": [_bytes(part) for part in one.parts], "said": one.said} for one in self.ready]
        begun = [[g.prompt, [answer and _kept(answer) for answer in g.answers]] for g in self.groups]
        return super().state() | {"ahead": ahead, "begun": begun}

    def restore(self, state: Any) -> None:
        """Go on after the batch at which `state` was taken; ValueError if the prompts are not the same."""
        super().restore(state)
        self.check = None  # the next answers are by older weights
        self.ready = deque(Drawn([_columns(x) for x in one["parts"]], one["said"], None) for one in state["ahead"])
        self.groups = [Group(i, [a and _restored(a) for a in answers]) for i, answers in state["begun"]]
        self.made = self.count + len(self.ready)

    def close(self) -> None:
        """End the thread, whatever it is at."""
        atexit.unregister(self.close)
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.stop()
        if self.thread is not None:
            self.thread.join(PATIENCE)

    # the thread that draws --------------------------------------------------------------------------------------------

    @property
    def _admitted(self) -> bool:
        """Whether there is a rollout to begin."""
        return self.made < min(self.version + self.level + 1, self.total)

    def _work(self) -> None:
        try:
            while True:
                idle, updated = self._begin()
                drawn = self._drawn()
                drawn.said["wait_s"] = {"engine": idle}
                drawn.said["timing_s"]["update_weights"] = updated
                with self.changed:
                    self.made += 1
                    self.ready.append(drawn)
                    self.changed.notify_all()
        except BaseException as error:
            with self.changed:
                self.failed = error
                self.changed.notify_all()

    def _begin(self) -> tuple[float, float]:
        """Wait until a rollout is admitted and take the newest weights; return the seconds of waiting and of taking."""
        begun = time.perf_counter()
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self._admitted)
        newest = max(self._agreed(self.version))
        version = newest if self.level > 1 else max(self.made - self.level, 0)
        with self.changed:
            self.changed.wait_for(lambda: self.closed or version in self.snapshots)  # other ranks may be a step behind
            if version not in self.snapshots:
                raise Closed
            for old in [v for v in self.snapshots if v < version]:
                del self.snapshots[old]
            weights = self.snapshots[version]
            there = time.perf_counter()
        if not self.in_flight:
            self.update(weights, version)
        return there - begun, time.perf_counter() - there

    def _agreed(self, value: Any) -> list[Any]:
        """Return what each rank gives; if the run of one ends raise Closed there, RuntimeError elsewhere."""
        given = self.everyone((self.closed, value))
        if any(closed for closed, _ in given):
            raise Closed if self.closed else RuntimeError("another rank has ended its rollouts; see what it says")
        return [one for _, one in given]

    def _drawn(self) -> Drawn:
        self.calls = self.dropped = 0
        drawn = super()._drawn()
        ages = [self.made - v for answer in drawn.rollout.answers for v in answer.versions] if drawn.rollout else []
        said = {"mean": float(np.mean(ages)), "max": max(ages), "dropped": self.dropped} if ages else {}
        if self.budget:
            said["waiting"] = sum(len(group.answers) for group in self.groups)
        return drawn._replace(said=drawn.said | {"off_policy": said})

    def _answers(self) -> tuple[list[Prompt], list[Sample]]:
        """Ask and go on until there are enough groups that have ended; return the oldest ones."""
        how = self.how
        room = how.prompts * (self.staleness - self.level + 1)  # what is begun can be trained before it is too old
        self._drop()
        while (missing := how.prompts - sum(group.ended for group in self.groups)) > 0:
            asked, seed = self._next(min(missing, room - len(self.groups)))
            self.groups += [Group(i, [None] * how.group) for i in asked]
            if self.calls or not asked:
                seed = int(np.random.SeedSequence([self.seed, self.drawn, self.made, self.calls]).generate_state(1)[0])
            self.groups.sort(key=lambda group: group.oldest)
            now = self._due()
            self._go_on(self.groups[:now], seed, 0)
            self._go_on(self.groups[now:], seed, self.budget)
            self._drop()
        ended = sorted((group for group in self.groups if group.ended), key=lambda group: group.oldest)[: how.prompts]
        self.groups = [group for group in self.groups if not any(group is one for one in ended)]
        prompts = [self.prompts[group.prompt] for group in ended for _ in group.answers]
        return prompts, [answer for group in ended for answer in group.answers if answer is not None]

    def _due(self) -> int:
        """Return how many groups, of those sorted by age, cannot wait: later rollouts have no room before their time.

        Of k + 1 groups that must be trained in rollout d or before, P in each of the d - n after this one can be.
        """
        until = [group.oldest + self.staleness - self.made for group in self.groups]
        return max([0, *(k + 1 - self.how.prompts * int(d) for k, d in enumerate(until) if d < float("inf"))])

    def _go_on(self, groups: list[Group], seed: int, budget: int) -> None:
        """Let the answers of groups that have not ended grow."""
        places = [(g, i) for g in groups for i in range(len(g.answers)) if not _ended(g.answers[i])]
        if not places:
            return
        begun = [group.answers[i] for group, i in places]
        found = self.generate([self.prompts[group.prompt] for group, _ in places], seed, begun, budget)
        self._agreed(None)
        self.calls += 1
        for (group, i), sample in zip(places, found, strict=True):
            group.answers[i] = sample

    def _drop(self) -> None:
        """Let prompts be asked again whose answers have tokens that are too old."""
        late = [g for g in self.groups if g.oldest < self.made - self.staleness]
        for group in late:
            group.answers[:] = [None] * len(group.answers)
        self.dropped += sum(len(group.answers) for group in late)
        if self.dropped > TRIES * self.how.prompts * self.how.group:
            raise RuntimeError(
                f"rollout {self.made} gets answers by weights of {self.staleness + 1} or more versions before, however "
                f"often it asks: what generates does not take the weights that it is given"
            )


def _ended(answer: Sample | None) -> bool:
    """Say whether an answer is whole; an episode always is, one that was lost too."""
    return answer is not None and (answer.episode is not None or answer.finish_reason != "abort")


def _kept(answer: Sample) -> list[Any]:
    """Return what a checkpoint can hold of an answer."""
    *kept, routed = answer
    return [*kept, None if routed is None else _bytes({"ids": routed})]


def _restored(kept: list[Any]) -> Sample:
    answer, routed = Sample(*kept[:-1]), kept[-1]
    return answer if routed is None else answer._replace(routed_experts=_columns(routed)["ids"])
