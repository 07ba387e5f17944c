"""Run Python that nobody has looked at, in a fork of this process that can do little but compute. Imports no torch.

What holds it, in the kernel, so that no Python gets around it:

    no network, no other process, no signals to one   a filter of system calls (seccomp)
    no change of a file: bytes, names, owner, mode    the same
    processor time, memory                            resource limits
    wall time                                         SIGKILL
    no other file than Python's own and the system's  Landlock; kernels without it let others be read
    no privileges                                     capabilities are dropped, if this is root

What `stat` says of a path, and where a link leads, can be seen of any. The number of threads has no limit but memory's:
the kernel counts them for each user, or for cgroups, which only root makes.

The environment is the worker's: for `rewards.code` none of the user's. Linux on x86-64 or AArch64.
"""

import ctypes
import errno
import os
import platform
import resource
import selectors
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

OUTPUT = 1 << 20
"""Bytes of output after which a program is ended."""
_libc = ctypes.CDLL(None, use_errno=True)


class Ran(NamedTuple):
    """What a program wrote to its standard output and to the descriptor that it was given; whether it ended well."""

    output: bytes
    report: bytes
    ended: bool


def run(program: Callable[[int], object], given: bytes, seconds: float, memory: int) -> Ran:
    """Call `program(descriptor)` confined, with `given` on its standard input, for `seconds` at most.

    Only for a process with one thread. OSError if this kernel cannot confine it.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as stdin:
        stdin.write(given)
        stdin.seek(0)
        (output, its_output), (report, its_report), (refused, its_refused) = os.pipe(), os.pipe(), os.pipe()
        theirs = (its_output, its_report, its_refused)
        sys.stdout.flush(), sys.stderr.flush()  # or the fork writes it too
        if not (child := os.fork()):
            _be(program, folder, (stdin.fileno(), *theirs), seconds, memory)
        for fd in theirs:
            os.close(fd)
        try:
            written = _read((output, report), time.monotonic() + seconds)
        finally:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            said = os.read(refused, 1000).decode()
            for fd in (output, report, refused):
                os.close(fd)
    if said:
        raise OSError(f"code cannot be confined here: {said}")
    return Ran(*written, status == 0)


def _read(pipes: tuple[int, int], until: float) -> tuple[bytes, bytes]:
    """Read two pipes until both are closed, a time, or too much output."""
    found = {fd: b"" for fd in pipes}
    with selectors.DefaultSelector() as open_:
        for fd in pipes:
            open_.register(fd, selectors.EVENT_READ)
        while open_.get_map() and (left := until - time.monotonic()) > 0:
            for key, _ in open_.select(left):
                found[key.fd] += (some := os.read(key.fd, 1 << 16))
                if not some:
                    open_.unregister(key.fd)
            if max(map(len, found.values())) > OUTPUT:
                break
    return found[pipes[0]], found[pipes[1]]


def _be(
    program: Callable[[int], object], folder: str, fds: tuple[int, int, int, int], seconds: float, memory: int
) -> NoReturn:
    """Be the child: standard streams, then 3 for the report; 4, which says what was refused, is closed in time."""
    try:
        for number, fd in zip((0, 1, 3, 4), [os.dup(fd) for fd in fds], strict=True):  # copies ascend: none is lost
            os.dup2(fd, number)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.closerange(5, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        try:
            os.chdir(folder)
            sys.path[:] = [path for path in sys.path if _readable(path)]
            _confine(seconds, memory)
        except Exception as error:
            os.write(4, str(error).encode())
            os._exit(1)
        os.close(4)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
        program(3)
        sys.stdout.flush()
        os._exit(0)
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(0 if end.code in (None, 0) else 1)
    finally:
        os._exit(1)


def _confine(seconds: float, memory: int) -> None:
    parent = os.getppid()
    _call("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    whole = int(seconds) + 1
    limits = {"CPU": (whole, whole), "AS": (memory, memory), "FSIZE": (0, 0), "CORE": (0, 0), "NOFILE": (64, 64)}
    for name, pair in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), pair)
    _call("capset", struct.pack("II", 0x20080522, 0), bytes(24))  # _LINUX_CAPABILITY_VERSION_3: none
    _call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if landlock():
        _close_files()
    _refuse_calls()


def _call(name: str, *arguments: int | bytes) -> int:
    """Call the C library; OSError names the function."""
    found = getattr(_libc, name)(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if found < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return found


# files ---------------------------------------------------------------------------------------------------------------

SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
EXECUTE, READ_FILE, READ_DIR = 1 << 0, 1 << 2, 1 << 3
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""How many rights over files a version of Landlock knows."""


def landlock() -> int:
    """Return the version of Landlock that the kernel has, 0 if none."""
    return max(0, _libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def _roots() -> list[str]:
    return [path for path in (sys.base_prefix, sys.prefix, *SYSTEM) if os.path.exists(path)]


def _readable(path: str) -> bool:
    return any(Path(path).resolve().is_relative_to(Path(root).resolve()) for root in _roots())


def _close_files() -> None:
    """Leave nothing to open but what lies below `_roots`, to read; Documentation/userspace-api/landlock.rst."""
    handled = (1 << RIGHTS[min(landlock(), max(RIGHTS))]) - 1
    ruleset = _call("syscall", CREATE_RULESET, struct.pack("Q", handled), 8, 0)
    for path in _roots():
        rights = EXECUTE | READ_FILE | (READ_DIR if os.path.isdir(path) else 0)
        _call("syscall", ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, os.open(path, os.O_PATH)), 0)
    _call("syscall", RESTRICT_SELF, ruleset, 0)
    os.closerange(5, 64)


# system calls --------------------------------------------------------------------------------------------------------

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of `REFUSED`, and AUDIT_ARCH."""
REFUSED: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198), "io_uring_setup": (425, 425),
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "setsid": (112, 157), "setpgid": (109, 154),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274), "setns": (308, 268), "unshare": (272, 97), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190), "semctl": (66, 191),
    "semop": (65, 193), "semtimedop": (220, 192), "msgget": (68, 186), "msgctl": (71, 187), "msgsnd": (69, 189),
    "msgrcv": (70, 188), "mq_open": (240, 180), "mq_unlink": (241, 181),
    "openat2": (437, 437), "creat": (85, None), "truncate": (76, 45), "ftruncate": (77, 46),
    "mknod": (133, None), "mknodat": (259, 33), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None),
    "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "removexattrat": (466, 466),
    "file_setattr": (469, 469), "inotify_init": (253, None), "inotify_init1": (294, 26), "fanotify_init": (300, 262),
}  # fmt: skip
"""By name, its numbers on the machines: asm/unistd_64.h and asm-generic/unistd.h."""
CLONE, CLONE3, PRLIMIT, FCNTL, PRCTL, IOCTL = (56, 220), (435, 435), (302, 261), (72, 25), (157, 167), (16, 29)
OPEN, OPENAT = (2, None), (257, 56)
WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
LOAD, EQUAL, AT_LEAST, HAS, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF_LD | BPF_W | BPF_ABS, BPF_JMP | ..., BPF_RET
KILL, ALLOW = 0x80000000, 0x7FFF0000
NUMBER, ARCH, ARGUMENTS = 0, 4, 16  # places in struct seccomp_data


def _refuse(number: int) -> int:
    return 0x00050000 | number


Line = tuple[int, int, int, int]
"""Operation, lines to jump if true and if false, operand."""


def _filter() -> list[Line]:
    """Return the filter's program; OSError on a machine whose numbers are not known."""
    if platform.machine() not in MACHINES or sys.byteorder != "little":
        raise OSError(errno.ENOSYS, f"system calls of {platform.machine()} are not known here, only {[*MACHINES]}")
    column, arch = MACHINES[platform.machine()]
    no: Line = (RETURN, 0, 0, _refuse(errno.EPERM))
    lines: list[Line] = [(LOAD, 0, 0, ARCH), (EQUAL, 1, 0, arch), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    lines += [(AT_LEAST, 0, 1, 0x40000000), no]  # x32
    for numbers in REFUSED.values():
        if (number := numbers[column]) is not None:
            lines += [(EQUAL, 0, 1, number), no]
    lines += [(EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, _refuse(errno.ENOSYS))]  # then clone is called
    for numbers, argument, test, value, wanted in (
        (CLONE, 0, HAS, 0x10000, True),  # CLONE_THREAD
        (PRLIMIT, 0, EQUAL, 0, True),  # of oneself
        (FCNTL, 1, EQUAL, 8, False),  # F_SETOWN: signals to another process
        (FCNTL, 1, EQUAL, 15, False),  # F_SETOWN_EX
        (PRCTL, 0, EQUAL, 15, True),  # PR_SET_NAME; with PR_SET_PDEATHSIG it could outlive the worker
        (IOCTL, 1, HAS, 0xFFFF0000, False),  # but for those of terminals and pipes; others change files' flags
        (OPEN, 1, HAS, WRITE, False),
        (OPENAT, 2, HAS, WRITE, False),
    ):
        if (number := numbers[column]) is None:
            continue
        lines += [(EQUAL, 0, 3, number), (LOAD, 0, 0, ARGUMENTS + 8 * argument)]
        lines += [(test, int(wanted), int(not wanted), value), no, (LOAD, 0, 0, NUMBER)]
    return [*lines, (RETURN, 0, 0, ALLOW)]


def _refuse_calls() -> None:
    """Install the filter; Documentation/userspace-api/seccomp_filter.rst."""
    lines = _filter()
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(code))  # struct sock_fprog
    _call("prctl", 22, 2, program, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
