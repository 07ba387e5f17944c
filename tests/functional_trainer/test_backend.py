"""functional_trainer.backend: which device a process gets, what it is called, what it can do at best."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from functional_trainer import backend

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restored():
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before, warn_only=True)


def test_the_cpu_is_deterministic_unless_told_otherwise():
    assert backend.setup("cpu") == CPU
    assert torch.are_deterministic_algorithms_enabled()
    backend.setup("cpu", deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_auto_takes_the_accelerator_if_there_is_one():
    assert backend.setup("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "CPU", "", "cpu:x", "mps"])
def test_unknown_devices_are_refused_with_those_there_are(name):
    with pytest.raises(ValueError, match=f"--device {name}: not on this machine; it has .*cpu"):
        backend.setup(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_refused(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"--device {name}: not on this machine; it has cpu$"):
        backend.setup(name)


@pytest.mark.parametrize(("name", "package"), [("npu", "torch_npu"), ("xla:0", "torch_xla")])
def test_a_plugin_that_is_not_installed_is_named_with_its_extra(name, package, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == package else find(module))
    with pytest.raises(ValueError, match=rf"--device {name}: {package} is not installed; pip install '\.\[...\]'"):
        backend.setup(name)


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H200", torch.bfloat16, 989e12),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5e12),
        ("NVIDIA B200", torch.float64, None),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("NVIDIA H20", torch.bfloat16, None),
        ("Tesla T4", torch.float16, None),
    ],
)
def test_peaks_are_known_by_name_or_not_at_all(monkeypatch, name, dtype, peak):
    monkeypatch.setattr(backend, "describe", lambda device: name)
    assert backend.peak_flops(CPU, dtype) == peak


def test_a_cpu_has_a_name_and_no_known_peak():
    assert backend.describe(CPU).startswith("cpu (") and f"{torch.get_num_threads()} threads" in backend.describe(CPU)
    assert backend.peak_flops(CPU, torch.float32) is None


def test_memory_grows_with_what_is_held():
    before = backend.peak_memory(CPU)
    held = torch.ones(60_000_000)
    after = backend.peak_memory(CPU)
    assert after >= held.nbytes and after >= before > 1e7
    backend.synchronize(CPU)


@pytest.mark.parametrize("world", [None, "1"])
def test_one_process_needs_no_group(monkeypatch, world):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if world:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", world)
    assert backend.join(CPU) == (0, 1)
    assert not torch.distributed.is_initialized()
    backend.barrier()
    backend.leave()


RANK = """
import torch.distributed as dist
from pathlib import Path
from functional_trainer import backend
device = backend.setup("cpu")
backend.join(device, 60)
options = [group._get_backend(device).options for group in (dist.group.WORLD, backend.host_group(7))]
found = [o._threads for o in options], [o._timeout.total_seconds() for o in options]
Path(__file__).with_name(f"options-{dist.get_rank()}").write_text(str(found))
dist.destroy_process_group()
"""


def test_a_group_of_gloo_completes_its_exchanges_on_one_thread(tmp_path):
    """With PyTorch's two they race, and a run of some thousand steps ends in malloc."""
    tmp_path.joinpath("rank.py").write_text(RANK)
    command = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", tmp_path / "rank.py"
    said = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said
    found = [tmp_path.joinpath(f"options-{rank}").read_text() for rank in (0, 1)]
    assert found == ["([1, 1], [60.0, 7.0])"] * 2  # and each gives up when it was told to
