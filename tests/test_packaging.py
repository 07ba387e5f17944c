"""Our packages are the ones imported, from the clone and installed, beside the unrelated package `kernels` of PyPI."""

import hashlib
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INSTALLED = ("functional_trainer", "kernels", "models", "sharding_rules")
CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
WHERE = "import importlib as i; print(*(i.import_module(m).__file__ for m in {}), sep='\\n')"
THEIRS = "kernels-0.17.2"


def run(*command, cwd) -> str:
    """Run a command without PYTHONPATH and return what it printed, failing with it when the command fails."""
    done = subprocess.run([*map(str, command)], cwd=cwd, env=CLEAN, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Env:
    """A virtual environment that sees the libraries of this one, but none of our packages."""

    def __init__(self, folder: Path):
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        self.python = folder / "bin" / "python"
        self.site = Path(run(self.python, "-c", "import sysconfig as s; print(s.get_path('purelib'))", cwd="/").strip())
        self.libraries = self.site / "zz_libraries.pth"  # what this file names comes after site-packages
        self.outside = folder.parent

    def pip(self, *args):
        self.libraries.unlink(missing_ok=True)  # or pip takes what is installed here for installed there
        run(sys.executable, "-m", "pip", "--python", self.python, *args, cwd=self.outside)
        self.libraries.write_text(sysconfig.get_path("purelib") + "\n")

    def kernels(self, cwd: Path) -> Path:
        """Return the file that `import kernels` would run, without running it."""
        code = "import importlib.util as u; print(u.find_spec('kernels').origin)"
        return Path(run(self.python, "-c", code, cwd=cwd).strip())

    def where(self, *modules: str) -> list[Path]:
        """Import the modules from a folder outside the clone and return their files."""
        return [Path(line) for line in run(self.python, "-c", WHERE.format(modules), cwd=self.outside).split()]


@pytest.fixture
def env(tmp_path):
    return Env(tmp_path / "env")


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    """The wheel that `pip install .` builds and installs."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(params=["stand-in", pytest.param("PyPI", marks=pytest.mark.slow)])
def theirs(request, tmp_path) -> Path:
    """A wheel of the other `kernels`: the real one, or one that has file names of ours and refuses to be imported."""
    if request.param == "PyPI":
        name = THEIRS.replace("-", "==")
        run(sys.executable, "-m", "pip", "download", "--no-deps", "-d", tmp_path, name, cwd=tmp_path)
        return next(tmp_path.glob("*.whl"))
    wheel, info = tmp_path / f"{THEIRS}-py3-none-any.whl", f"{THEIRS}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("kernels/__init__.py", "kernels/attention/__init__.py"):
            archive.writestr(name, "raise SystemExit('imported the other kernels')\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def digests(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        names = (name for name in archive.namelist() if name.startswith("kernels/"))
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in names}


def is_whole(site: Path, wheel: Path) -> bool:
    """Tell whether the other package's files, and no others, are in its folder as its wheel has them."""
    files = [f for f in (site / "kernels").rglob("*") if f.is_file() and f.suffix != ".pyc"]
    found = {f.relative_to(site).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    return found == digests(wheel)


def test_kernels_is_ours_here():
    import kernels

    assert Path(kernels.__file__).parent == ROOT / "kernels"


@pytest.mark.parametrize("how", ["script", "pytest", "console"])
def test_the_clone_comes_before_an_installed_kernels(how, env, theirs):
    env.pip("install", "--no-index", "--no-deps", theirs)
    assert env.kernels(env.outside) == env.site / "kernels/__init__.py"
    if how == "script":
        assert "--model.path" in run(env.python, ROOT / "experiments/qwen3_moe_sft.py", "--help", cwd=env.outside)
    elif how == "console":
        assert env.kernels(ROOT) == ROOT / "kernels/__init__.py"
    else:  # -P: as the `pytest` command does, leave the current folder out of sys.path
        command = ("-P", "-m", "pytest", "-p", "no:cacheprovider", f"{__file__}::test_kernels_is_ours_here")
        assert "1 passed" in run(env.python, *command, cwd=ROOT)


@pytest.mark.parametrize("order", ["theirs first", "ours first"])
def test_installed_beside_the_other_kernels(order, env, ours, theirs):
    for wheel in (theirs, ours) if order == "theirs first" else (ours, theirs):
        env.pip("install", "--no-index", "--no-deps", wheel)
    rooms = env.site / "functional_trainer_rooms"
    assert env.where(*INSTALLED) == [rooms / name / "__init__.py" for name in INSTALLED]
    assert is_whole(env.site, theirs)

    env.pip("uninstall", "--yes", "functional-trainer")
    assert is_whole(env.site, theirs)
    assert not list(rooms.rglob("*.py")) and not (env.site / "functional_trainer.pth").exists()
    assert env.kernels(env.outside) == env.site / "kernels/__init__.py"  # only our wheel had put ours in front


@pytest.mark.slow
def test_pip_install_from_the_clone(env):
    """The documented command, build environment included."""
    env.pip("install", "--no-deps", ROOT)
    assert env.where("models")[0] == env.site / "functional_trainer_rooms/models/__init__.py"


def test_the_wheel_has_every_source_file(ours):
    with zipfile.ZipFile(ours) as archive:
        names = set(archive.namelist())
    sources = {f.relative_to(ROOT).as_posix() for room in INSTALLED for f in (ROOT / room).rglob("*.py")}
    assert {f"functional_trainer_rooms/{source}" for source in sources} <= names
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"functional_trainer.pth", "functional_trainer_rooms"}


def normal(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


def test_every_direct_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert len({normal(line) for line in lines}) == len(lines)
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert not {normal(name) for name in wanted} - {normal(line) for line in lines}


def test_make_installs_only_when_something_changed(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
        os.utime(tmp_path / name, (1e9, 1e9))
    assert "venv .venv" in (fresh := run("make", "-n", "sft", "ARGS=--steps 5", cwd=tmp_path))
    assert fresh.index("-m venv") < fresh.index("pip install") < fresh.index("qwen3_moe_sft.py --steps 5")

    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in ("bin/python", ".sft", ".dev"):
        (tmp_path / ".venv" / name).touch()
    assert "pip" not in run("make", "-n", "sft", "test", cwd=tmp_path)

    (tmp_path / "constraints.txt").touch()
    os.utime(tmp_path / ".venv/.sft", (2e9, 2e9))
    os.utime(tmp_path / ".venv/.dev", (1.5e9, 1.5e9))
    assert "pip" not in run("make", "-n", "sft", cwd=tmp_path)
    assert "'.[dev]'" in run("make", "-n", "test", cwd=tmp_path)
