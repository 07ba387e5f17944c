"""Environments of other libraries, if they are installed: `verifiers` and OpenEnv.

    Wordle = from_verifiers("wordle")                               # --rollout.environment mine.py:Wordle
    Echo = from_openenv("http://localhost:8000", action=lambda text: {"message": text})

Both are makers: what a trainer asks for is called for each episode. `verifiers` (0.3, classes derived from its
`Environment`) drives a rollout itself and asks a client for the policy's turns: here that client waits until the policy
has spoken. OpenEnv's environments are servers; every episode is a session of a client.
"""

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from functional_trainer.environments import Environment, Message, Row, Step


class Verifiers:
    """Makes episodes of an environment of the `verifiers` library, on the rows of its data set."""

    def __init__(self, environment: Any):
        self.environment = environment

    def __call__(self) -> "VerifiersEpisode":
        return VerifiersEpisode(self.environment)

    def rows(self) -> tuple[list[Row], list[Row]]:
        """Return its data set, and the one for evaluation."""
        return self.environment.get_dataset().to_list(), self.environment.get_eval_dataset().to_list()


def from_verifiers(environment: Any, **options: Any) -> Verifiers:
    """Return what makes episodes of a `verifiers` environment: one that there is, or a name and options, by which
    `verifiers.load_environment` makes it. ValueError if the library is of another version.
    """
    try:
        found = f"{version('verifiers')} is installed"
    except PackageNotFoundError:
        found = "it is not installed"
    if not found.startswith("0.3."):
        right = "use an environment of your own (docs/environments.md), or pip install 'verifiers==0.3.1'"
        raise ValueError(f"from_verifiers plays environments of verifiers 0.3, but {found}: {right}")
    if isinstance(environment, str):
        from verifiers import load_environment

        environment = load_environment(environment, **options)
    return Verifiers(environment)


class VerifiersEpisode(Environment):
    """A rollout that `verifiers` drives; its reward is that of the environment's rubric, at the end."""

    def __init__(self, environment: Any):
        self.environment = environment
        described = [tool.model_dump(include={"name", "description", "parameters"}) for tool in _defined(environment)]
        self.tools = [{"type": "function", "function": tool} for tool in described]
        self.known: list[Message] = []
        self.rollout: asyncio.Future | None = None

    async def reset(self, row: Row) -> list[Message]:
        self.asked: asyncio.Queue[list[Message]] = asyncio.Queue()
        self.said: asyncio.Queue[Message] = asyncio.Queue()
        self.rollout = asyncio.ensure_future(self._run(row))
        self.known = await self._next() or []
        if not self.known:
            raise ValueError("the rollout ended before the policy was asked")
        return self.known

    async def step(self, messages: list[Message]) -> Step:
        self.said.put_nowait(messages[-1])
        now = await self._next()
        if now is None:
            return Step(reward=self.rollout.result(), done=True)  # type: ignore[union-attr]
        before, self.known = self.known, now
        if now[: len(before)] != before or now[len(before)].get("role") != "assistant":
            raise ValueError("the environment changes what was said before; only what goes on can be trained on")
        return Step(now[len(before) + 1 :])

    async def close(self) -> None:
        if self.rollout:
            self.rollout.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await self.rollout

    async def _next(self) -> list[Message] | None:
        """Return the conversation that the policy is asked to continue, or None when the rollout has ended."""
        assert self.rollout is not None
        asked = asyncio.ensure_future(self.asked.get())
        await asyncio.wait({asked, self.rollout}, return_when=asyncio.FIRST_COMPLETED)
        if asked.done():
            return asked.result()
        asked.cancel()
        self.rollout.result()  # what it raised
        return None

    async def _run(self, row: Row) -> float:
        state = await self.environment.rollout(dict(row), _client(self.asked, self.said), "policy", {})
        if state.get("error"):
            raise RuntimeError(f"the environment's rollout failed: {state['error']!r}")
        await self.environment.rubric.score_rollout(state)
        return float(state["reward"])


def _defined(environment: Any) -> list[Any]:
    return list(environment.tool_defs or [])


def _client(asked: asyncio.Queue, said: asyncio.Queue) -> Any:
    """Return a client of `verifiers` that hands on what it is asked, and waits for what the policy says."""
    from verifiers.clients import Client
    from verifiers.types import Response, ResponseMessage, ToolCall

    class Policy(Client):
        def setup_client(self, config: Any) -> None:
            return None

        async def to_native_tool(self, tool: Any) -> Any:
            return tool

        async def to_native_prompt(self, messages: Any) -> tuple[Any, dict]:
            return [_plain(message) for message in messages], {}

        async def get_native_response(self, prompt: Any, model: str, sampling_args: Any, *_: Any, **__: Any) -> Any:
            asked.put_nowait(prompt)
            message = await said.get()
            functions = [(call["id"], call["function"]) for call in message.get("tool_calls", [])]
            calls = [ToolCall(id=i, name=f["name"], arguments=json.dumps(f["arguments"])) for i, f in functions]
            reason: Any = "tool_calls" if calls else "stop"
            told = {"content": message["content"], "reasoning_content": message.get("reasoning_content")}
            answer = ResponseMessage(**told, tool_calls=calls or None, finish_reason=reason, is_truncated=False)
            return Response(id="", created=0, model=model, message=answer)

        async def raise_from_native_response(self, response: Any) -> None:
            return None

        async def from_native_response(self, response: Any) -> Any:
            return response

        async def close(self) -> None:
            return None

    return Policy(None)


def _plain(message: Any) -> Message:
    """Return a message of `verifiers` as chat templates read it."""
    found = message.model_dump(include={"role", "content", "tool_calls", "tool_call_id"}, exclude_none=True)
    calls = found.pop("tool_calls", [])
    named = [(c["id"], {"name": c["name"], "arguments": json.loads(c["arguments"] or "{}")}) for c in calls]
    return found | ({"tool_calls": [{"type": "function", "id": i, "function": f} for i, f in named]} if named else {})


class OpenEnv:
    """Makes episodes of an OpenEnv server; a row is a seed for `reset`, and whatever else it takes."""

    def __init__(
        self, url: str, action: Callable[[str], Any], observation: Callable[[Any], str], client: Callable | None,
        episodes: int,
    ):  # fmt: skip
        self.url, self.action, self.observation, self.client, self.episodes = url, action, observation, client, episodes

    def __call__(self) -> "OpenEnvEpisode":
        return OpenEnvEpisode(self)

    def rows(self) -> tuple[list[Row], list[Row]]:
        """Return seeds, a tenth of them held out."""
        every: list[Row] = [{"seed": i} for i in range(self.episodes)]
        return every[self.episodes // 10 :], every[: self.episodes // 10]


def from_openenv(
    url: str, action: Callable[[str], Any], observation: Callable[[Any], str] = json.dumps,
    client: Callable | None = None, episodes: int = 1000,
) -> OpenEnv:  # fmt: skip
    """Return what makes episodes of the OpenEnv environment at a URL.

    `action` makes an action of what the policy says, `observation` a text of what it is shown. `client` is the
    environment's own class (none: openenv's GenericEnvClient, for which both are dictionaries). A server must give the
    same first observation for the same seed, and have as many sessions as there are episodes at once.
    """
    return OpenEnv(url, action, observation, client, episodes)


class OpenEnvEpisode(Environment):
    """A session with an OpenEnv server; rewards of its steps add up."""

    def __init__(self, made: OpenEnv):
        self.made, self.client = made, None

    async def reset(self, row: Row) -> list[Message]:
        from openenv.core import GenericEnvClient

        self.client = (self.made.client or GenericEnvClient)(base_url=self.made.url)
        result = await self.client.reset(**row)  # type: ignore[attr-defined]
        return [{"role": "user", "content": self.made.observation(result.observation)}]

    async def step(self, messages: list[Message]) -> Step:
        result = await self.client.step(self.made.action(messages[-1]["content"]))  # type: ignore[attr-defined]
        said: list[Message] = [{"role": "user", "content": self.made.observation(result.observation)}]
        return Step(said, float(result.reward or 0), bool(result.done))

    async def close(self) -> None:
        if self.client is not None:
            await self.client.close()
