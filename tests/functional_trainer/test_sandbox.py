"""What code in the sandbox tries is refused by the kernel, not by Python; it ends in time; what it may do works."""

import os
import time

import pytest

from functional_trainer import sandbox
from functional_trainer.workers import Pool

MEMORY = 1 << 27
SECRET = "sandbox-test-secret"


def inside():
    """Return a function that runs Python in the sandbox of a worker, on request as on a kernel without Landlock."""

    def run(source, given="", seconds=20.0, memory=1 << 29, landlock=True):
        from functional_trainer import sandbox

        def program(report):
            exec(compile(source, "<source>", "exec"), {"report": report})

        there = sandbox.landlock
        sandbox.landlock = there if landlock else lambda: 0
        try:
            return tuple(sandbox.run(program, given.encode(), seconds, memory))
        finally:
            sandbox.landlock = there

    return run


@pytest.fixture(scope="module")
def pool():
    os.environ["SECRET"] = SECRET
    with Pool(inside(), 1, 60, environment={}) as pool:
        del os.environ["SECRET"]
        yield pool


@pytest.fixture
def run(pool):
    def run(source: str, **arguments) -> sandbox.Ran:
        (outcome,) = pool.map([{"source": source, **arguments}])
        assert not outcome.failed, outcome
        return sandbox.Ran(*outcome.value)

    return run


ATTEMPTS = {
    "internet": "import socket; socket.socket(socket.AF_INET)",
    "internet 6": "import socket; socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)",
    "local socket": "import socket; socket.socket(socket.AF_UNIX)",
    "netlink": "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "fork": "import os; os.fork()",
    "vfork": "import subprocess; subprocess.run(['true'])",
    "spawn": "import os; os.posix_spawn('/bin/true', ['true'], {})",
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "kill the worker": "import os; os.kill(os.getppid(), 9)",
    "kill all": "import os; os.kill(-1, 9)",
    "signal by descriptor": "import os, signal; signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)",
    "signal by pipe": "import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
    "another's limits": "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "own limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "priority": "import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "session": "import os; os.setsid()",
    "process group": "import os; os.setpgid(0, 0)",
    "outlive the worker": "import ctypes; c = ctypes.CDLL(None, use_errno=True)\n"
    "if c.prctl(1, 0) < 0: raise PermissionError(ctypes.get_errno())",
    "shared memory": "import ctypes; c = ctypes.CDLL(None, use_errno=True)\n"
    "if c.shmat(0, None, 0) < 0 and ctypes.get_errno() == 1: raise PermissionError",
    "privileges": "import os; os.setgroups([1]); os.setuid(1); os.chroot('/usr')",
    "system call": "import ctypes, os; c = ctypes.CDLL(None, use_errno=True)\n"
    "if c.syscall({socket}, 2, 1, 0) < 0: raise PermissionError(ctypes.get_errno())",
    "namespace": "import ctypes; c = ctypes.CDLL(None, use_errno=True)\n"
    "if c.unshare(0x10000000) < 0: raise PermissionError(ctypes.get_errno())",
    "ring": "import ctypes; c = ctypes.CDLL(None, use_errno=True)\n"
    "if c.syscall(425, 1, None) < 0: raise PermissionError(ctypes.get_errno())",
}  # fmt: skip


@pytest.mark.parametrize("what", ATTEMPTS)
def test_the_kernel_refuses(what, run):
    socket = sandbox.REFUSED["socket"][sandbox.MACHINES[os.uname().machine][0]]
    attempt = ATTEMPTS[what].replace("{socket}", str(socket)).replace("\n", "\n    ")
    ran = run(f"try:\n    {attempt}\nexcept (PermissionError, ValueError) as error:\n    print('refused')")
    assert ran == (b"refused\n", b"", True)


def test_a_fork_bomb_does_not_go_off(run):
    bomb = "import os\nn = 0\nwhile n < 1000:\n    try: os.fork()\n    except OSError: n += 1\nprint(n, os.getpid())"
    count, pid = run(bomb).output.split()
    assert count == b"1000" and not os.path.exists(f"/proc/{pid.decode()}")


ENDLESS = ["while True: pass", "time.sleep(1e6)", "print('x' * (1 << 30))", "while True: print('x' * 9999)"]


@pytest.mark.parametrize("ending", ENDLESS)
def test_what_does_not_end_is_ended(ending, run):
    start = time.monotonic()
    ran = run(f"import os, time\nos.write(report, b'there')\n{ending}", seconds=0.5)
    assert not ran.ended and ran.report == b"there" and len(ran.output) < 2 * sandbox.OUTPUT
    assert time.monotonic() - start < 10


def test_processor_time_is_limited_too(run):
    threads = "import resource; print(resource.getrlimit(resource.RLIMIT_CPU))"
    assert run(threads, seconds=2.5).output == b"(3, 3)\n"


@pytest.mark.parametrize("take", ["bytearray(1 << 24)", "__import__('mmap').mmap(-1, 1 << 24)"])
def test_memory_is_limited(take, run):
    ran = run(f"some = []\ntry:\n    while True: some.append({take})\nexcept (MemoryError, OSError): print(len(some))",
              memory=MEMORY)  # fmt: skip
    assert ran.ended and 1 <= int(ran.output) <= MEMORY >> 24


CHANGES = [
    "open({0}, 'w')", "open({0}, 'ab')", "open({0}, 'r+')", "os.open({0}, os.O_TRUNC)", "os.open({0}, os.O_APPEND | 1)",
    "open({1}, 'x')", "open('here', 'w')", "open('/dev/shm/new', 'w')", "os.open('/tmp', os.O_TMPFILE | os.O_RDWR)",
    "os.truncate({0}, 0)", "os.remove({0})", "os.rename({0}, {1})", "os.link({0}, {1})", "os.symlink({0}, {1})",
    "os.mkdir({1})", "os.rmdir({2})", "os.mkfifo({1})", "os.chmod({0}, 0o777)", "os.chmod({2}, 0o700)",
    "os.chown({0}, os.getuid(), os.getgid())", "os.lchown({0}, os.getuid(), os.getgid())", "os.utime({0}, (1, 1))",
    "os.utime({0}, (1, 1), follow_symlinks=False)", "os.setxattr({0}, 'user.a', b'x')", "os.removexattr({0}, 'user.b')",
    "fcntl.ioctl(os.open({0}, 0), 0x40086602, bytes(8))",
]  # fmt: skip


@pytest.mark.parametrize("landlock", [True, False])
def test_no_file_is_changed(run, tmp_path, landlock):
    """Neither what is in it nor what is known of it; without Landlock in the kernel too."""
    mine, folder = tmp_path / "mine", tmp_path / "folder"
    mine.write_text("text"), folder.mkdir()
    os.chmod(tmp_path, 0o777), os.chmod(mine, 0o666)
    before = mine.stat(), folder.stat(), tmp_path.stat()
    names = [repr(str(path)) for path in (mine, tmp_path / "new", folder)]
    attempts = [change.format(*names) for change in CHANGES]
    ran = run(
        f"import fcntl, os\nfor attempt in {attempts}:\n    try: exec(attempt), print('did', attempt)\n"
        "    except PermissionError: pass",
        landlock=landlock,
    )
    assert ran == (b"", b"", True)
    assert (mine.stat(), folder.stat(), tmp_path.stat()) == before and mine.read_text() == "text"


def test_what_belongs_to_the_user_is_not_read_but_seen_to_be_there(run, tmp_path):
    (tmp_path / "key").write_text("secret")
    paths = [str(tmp_path / "key"), __file__, "/etc/passwd", f"/proc/{os.getpid()}/environ"]
    for path in paths:
        ran = run(f"try:\n    open({path!r}).read(), print('read')\nexcept OSError: print('refused')")
        assert ran.output == (b"refused\n" if sandbox.landlock() else b"read\n"), path
    assert run(f"import os; print(os.stat({paths[0]!r}).st_size)").output == b"6\n"  # as docs/rewards.md says
    assert run("import os; print(dict(os.environ))").output.strip() in (b"{}", b"{'LC_CTYPE': 'C.UTF-8'}")


def test_descriptors_of_the_worker_are_closed(run):
    probe = "import os\nfor fd in range(3, 64):\n    try: os.fstat(fd), print(fd)\n    except OSError: pass\n"
    assert run(probe).output == b"3\n"  # the report


def test_what_code_needs_works(run):
    ran = run(
        """
import asyncio, json, random, threading, sys, fractions, numpy
lines = sys.stdin.read().split()
found = []
thread = threading.Thread(target=found.extend, args=(lines,))
thread.start(), thread.join()
async def later():
    await asyncio.sleep(0)
    return numpy.arange(3).sum()
print(found, asyncio.run(later()), fractions.Fraction(1, 3), "\\u00e9")
sys.exit()
""",
        given="a \u00e9\n" * 2,
    )
    assert ran.ended and ran.output.decode() == "['a', 'é', 'a', 'é'] 3 1/3 é\n"


@pytest.mark.parametrize("end", ["import sys; sys.exit(1)", "import os; os._exit(1)", "1 / 0", "sys.exit('no')",
                                 "import ctypes; ctypes.string_at(0)", "import os; os.abort()"])  # fmt: skip
def test_how_a_program_ends_is_told(end, run):
    assert run(f"print('said', flush=True)\n{end}") == (b"said\n", b"", False)


def test_a_machine_that_is_not_known_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "pdp11")
    with pytest.raises(OSError, match="system calls of pdp11 are not known here, only .*x86_64"):
        sandbox._filter()


def test_all_numbers_are_those_of_this_machine(run):
    """Every refused call that exists here gives EPERM from the filter, which comes before any argument is looked at."""
    column = sandbox.MACHINES[os.uname().machine][0]
    numbers = [pair[column] for pair in sandbox.REFUSED.values() if pair[column] is not None]
    probe = f"import ctypes\nc = ctypes.CDLL(None, use_errno=True)\nfor number in {numbers}:\n"
    probe += "    print(c.syscall(number, -1, -1, -1, -1, -1), ctypes.get_errno())\n"
    assert run(probe).output == b"-1 1\n" * len(numbers)
