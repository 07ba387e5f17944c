"""Runs functions in a process where Triton interprets its kernels: that is decided when Triton is imported."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock


class Interpreter:
    """A process that has TRITON_INTERPRET=1, for as long as a `with` lasts."""

    def __enter__(self) -> "Interpreter":
        self.pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            self.run(os.getpid)
        return self

    def __exit__(self, *error: Any) -> None:
        self.pool.shutdown()

    def run(self, fn: Callable, *args: Any) -> Any:
        """Call a function of a module there; what it raises is raised here."""
        return self.pool.submit(fn, *args).result()
