"""Environments of OpenEnv, with the library itself: `make test-adapters` has a virtual environment for it.

The name is none that pytest collects by itself: the library is not among the project's own.
"""

import asyncio
import socket
import threading
import time

import pytest
import uvicorn
from openenv.core.env_server import create_app
from openenv.core.env_server.interfaces import Environment as Server
from openenv.core.env_server.types import Action, Observation, State

from functional_trainer.environments.adapters import from_openenv
from tests.adapters.scripted import Script, play


class Said(Action):
    text: str


class Seen(Observation):
    text: str


class Counter(Server):
    """It counts down from its seed to zero."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        super().__init__()
        self.left = 0

    def reset(self, seed=None, episode_id=None, **kwargs) -> Seen:
        self.left = seed or 0
        return Seen(text=f"{self.left} left", done=False, reward=0.0)

    def step(self, action: Said, timeout_s=None, **kwargs) -> Seen:
        self.left -= int(action.text)
        return Seen(text=f"{self.left} left", done=self.left <= 0, reward=0.5)

    @property
    def state(self) -> State:
        return State(episode_id="", step_count=0)


@pytest.fixture(scope="module")
def url():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = create_app(Counter, Said, Seen, env_name="counter", max_concurrent_envs=8)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not server.started and time.monotonic() < until:
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(30)


def test_an_openenv_server(url):
    maker = from_openenv(url, lambda text: {"text": text}, lambda seen: seen["text"], episodes=20)
    train, held_out = maker.rows()
    assert len(train) == 18 and held_out == [{"seed": 0}, {"seed": 1}]
    script = Script(["2", "1", "no"], ["1"])
    samples = play(maker, script, [{"seed": 2}, {"seed": 2}, {"seed": 5}])
    assert [s.reward for s in samples] == [0.5, 1.0, None] and "invalid literal" in samples[2].episode.error
    assert script.prompts[0][2] == "<|user|>5 left<|assistant|>"
    assert script.prompts[1] == ["<|user|>2 left<|assistant|>1<|end|><|user|>1 left<|assistant|>"]
