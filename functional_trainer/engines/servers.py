"""Servers that are asked over HTTP: which of them may be, and who has which weights.

What fails is to be asked again, there or elsewhere; the server rests meanwhile, twice as long each time, and is left
out once it has failed for some time without success. One that has come back with other weights than it was sent, or
did not take them, is sent them again, by a thread that looks every few seconds, and is asked again then.

Whether a server has restarted is told by the version that it says its weights are of. LMDeploy says none. To such a
server a connection is kept open on which nothing is ever said: it ends when the process at its other end does.
"""

import http.client
import json
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from functional_trainer.engines.dialects import Dialect, Request
from functional_trainer.errors import brief

CONNECT = 10.0
"""Seconds that a server may take to accept a connection, and to say that it is well."""
REST = 5.0
"""Longest time that a server rests before it is asked again, seconds."""


class Failed(Exception):
    """A request that may succeed when it is sent again."""


class Refused(Exception):
    """A request that the server will not answer."""


@dataclass
class Server:
    """Where requests go: how many are under way; how often it failed in a row, since when, and when to go on; why it is
    left out; which weights it has for sure; and the connection that ends when it does."""

    url: str
    open: int = 0
    failures: int = 0
    since: float = 0.0
    until: float = 0.0
    out: str = ""
    has: int | None = None
    line: socket.socket | None = None


def dial(url: str) -> socket.socket | None:
    """Open a connection that ends when the process does; None if there is none."""
    at = urlsplit(url)
    try:
        line = socket.create_connection((at.hostname, at.port or (443 if at.scheme == "https" else 80)), CONNECT)
    except OSError:
        return None
    line.setblocking(False)
    return line


def ended(line: socket.socket | None) -> bool:
    """Say whether the process at the other end of a connection on which nothing is said has ended."""
    if line is None:
        return True
    try:
        line.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


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


class Servers:
    """Servers of a kind. A request takes at most `timeout` seconds.

    One that has failed rests for `backoff` seconds, then for longer, and is left out when it fails `patience` seconds
    after the first time. Whether one has to be sent weights is looked at every `every` seconds.
    """

    def __init__(
        self, name: str, dialect: Dialect, urls: Sequence[str], *, timeout: float, patience: float, backoff: float,
        every: float,
    ):  # fmt: skip
        self.name, self.dialect, self.all = name, dialect, [Server(url.rstrip("/")) for url in urls]
        self.timeout, self.patience, self.backoff, self.every = timeout, patience, backoff, every
        self.lock, self.sending = threading.Lock(), threading.Lock()
        self.given: tuple[int, Callable[[], Iterable[Request]]] | None = None

    def probe(self, server: Server, end: float) -> int:
        """Ask a server until `end` whether it is well and of the right kind; return the ranks that want weights."""
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

    # which may be asked ----------------------------------------------------------------------------------------------

    def take(self) -> Server:
        """Choose a server, waiting until one may be asked again; RuntimeError if none is left."""
        while True:
            with self.lock:
                alive, now = [server for server in self.all if not server.out], time.monotonic()
                if ready := [server for server in alive if server.until <= now]:
                    server = min(ready, key=lambda server: server.open)
                    server.open += 1
                    return server
                self._any_left(self.patience)
                until = min((server.until for server in alive), default=now + self.backoff)
            time.sleep(until - now)

    def _any_left(self, patience: float) -> None:
        """Raise RuntimeError if all servers are left out, and have been away for so many seconds."""
        now = time.monotonic()
        if all(server.out and now - server.since >= patience for server in self.all):
            why = "; ".join(f"{server.url}: {server.out}" for server in self.all)
            raise RuntimeError(f"no {self.name} server is left: {why}")

    def failed(self, server: Server, said: str) -> bool:
        """Let a server rest; requests that fail together count once. Say whether it had answered the one before."""
        with self.lock:
            now = time.monotonic()
            if now < server.until:
                return False
            if not server.failures:
                server.since = now
            elif now - server.since >= self.patience:
                server.out = said
            server.failures += 1
            server.until = now + min(REST, self.backoff * 2 ** min(server.failures - 1, 32))
            return server.failures == 1

    def post(self, servers: Sequence[Server], path: str, body: dict[str, Any]) -> list[Server]:
        """Post to servers at once; return those that took it, the others are left out until they are sent weights."""
        if not servers:
            return []
        data = json.dumps(body).encode()
        with ThreadPoolExecutor(len(servers)) as pool:
            said = list(pool.map(lambda server: self._refusal(server, path, data), servers))
        with self.lock:
            for server, why in zip(servers, said, strict=True):
                if why:
                    server.since = server.since if server.failures else time.monotonic()
                    server.out, server.has, server.failures = why, None, server.failures + 1
        return [server for server, why in zip(servers, said, strict=True) if not why]

    def _refusal(self, server: Server, path: str, data: bytes) -> str:
        try:
            call(server.url, path, data, self.timeout)
        except (Failed, Refused) as error:
            return str(error)
        return ""

    # which weights they have -----------------------------------------------------------------------------------------

    def give(self, version: int, requests: Callable[[], Iterable[Request]]) -> None:
        """Send weights of a version, by the requests that give them, to all servers that are there.

        Those that come back later get them too, until there are others. If none takes them it is waited for one, but
        for the first weights, which servers were well to take. RuntimeError if there is none in the end.
        """
        with self.sending:
            first, self.given = self.given is None, (version, requests)
            for server in self.all:
                server.failures = 0
            self._send([server for server, said in self._say() if not server.out or said is not None])
        if first:
            watch = threading.Thread(target=_watch, args=(weakref.ref(self), self.every), name="servers", daemon=True)
            watch.start()
        while all(server.out for server in self.all):
            self._any_left(0.0 if first else self.patience)
            time.sleep(self.every)
            self.look()

    def look(self) -> None:
        """Send the weights to servers that are there and have restarted, or did not take them.

        One that says another number was given weights by somebody else: two that send to a server would never end.
        """
        assert self.given is not None
        with self.sending:
            lost = [
                server
                for server, said in self._say()
                if said is not None and (server.has != self.given[0] or not said.isdecimal())
            ]
            self._send(lost)

    def _say(self) -> list[tuple[Server, str | None]]:
        """Return of each server the version of the weights that it says it has, None if it says nothing."""
        with ThreadPoolExecutor(len(self.all)) as pool:
            return list(zip(self.all, pool.map(self._says, self.all), strict=True))

    def _says(self, server: Server) -> str | None:
        path = self.dialect.version
        try:
            call(server.url, "/health", None, CONNECT)
            if path:
                return str(call(server.url, path, None, CONNECT)["weight_version"])
            return "" if ended(server.line) else str(server.has)
        except (Failed, Refused, KeyError, TypeError):
            return None

    def _send(self, servers: list[Server]) -> None:
        """Send the weights to servers, in step; those that fail are left out."""
        if not servers or self.given is None:
            return
        version, requests = self.given
        unsure = [server for server in servers if server.has is None]
        for server in servers:
            server.has = None
        lines = {server.url: None if self.dialect.version else dial(server.url) for server in servers}
        if self.dialect.clear:
            path, body = self.dialect.clear
            for server in unsure:  # one that has no such update refuses
                self._refusal(server, path, json.dumps(body).encode())
        for path, body in requests():
            if not (servers := self.post(servers, path, body)):
                return
        with self.lock:
            for server in servers:
                if server.out:  # else it counts on, or one that never has the right ones would never be left out
                    server.failures = 0
                server.has, server.out, server.until = version, "", 0.0
                server.line = lines[server.url]  # what was asked before is not of these weights


def _watch(ref: "weakref.ref[Servers]", every: float) -> None:
    """Look at servers for as long as somebody else has them."""
    while True:
        time.sleep(every)
        if (servers := ref()) is None:
            return
        servers.look()
        del servers
