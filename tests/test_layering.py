"""Hold the tree to docs and house style by reading its syntax: imports point down, devices are named in one place,
files stay small. Every check is shown to fail on a planted violation."""

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("kernels", "functional_trainer", "models", "sharding_rules", "experiments")
PLAIN = ("tree", "param", "flops", "types", "errors")  # modules of functional_trainer that tables may use
BELOW = {  # our modules that each room may import
    "kernels": ("kernels",),
    "functional_trainer": ("kernels", "functional_trainer"),
    "models": ("kernels", "functional_trainer", "models"),
    "sharding_rules": ("sharding_rules", *(f"functional_trainer.{m}" for m in PLAIN)),
    "experiments": ROOMS,
}
KERNEL_LIBRARIES = {"torch", "triton", "numpy", "einops", "flash_attn", "flash_attn_interface"}
OPTIONAL = {"flash_attn", "flash_attn_interface", "torch_npu", "torch_xla", "orbax", "wandb"}  # imported where used
OPTIONAL |= {"math_verify", "openenv", "ray", "verifiers", "vllm"}
COMPARED = {
    "transformers",
    "liger_kernel",
    "trl",
    "datasets",
    "torchtitan",
}  # what benchmarks and notebooks compare with
COMPARE = ("experiments/benchmarks/", "experiments/notebooks/")
# Where the name on PyPI is another:
DISTRIBUTION = {"absl": "absl-py", "PIL": "pillow", "yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
DEVICES = {"cuda", "cpu", "npu", "xla"}
NAMES_DEVICES = {"functional_trainer/backend.py", "kernels/__init__.py", "kernels/tuning.py"}
NAMES_DEVICES |= {"experiments/benchmarks/compiled_kernels.py"}  # a compiler's target
FUNCTION_LINES = 50
MARK = re.compile("|".join((r"\bTO" + "DO", r"\bFIX" + "ME", r"\bX" + "XX")))


def sources(root: Path, *rooms: str) -> Iterator[tuple[str, ast.Module]]:
    """Yield (path from `root`, syntax tree) of every Python file in these rooms."""
    for room in rooms:
        for file in sorted((root / room).rglob("*.py")):
            yield file.relative_to(root).as_posix(), ast.parse(file.read_text("utf-8"))


def imports(path: str, module: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import at any depth, made absolute; `from a import b` is `a.b`."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = Path(path).parts[: -node.level] if node.level else ()
            base = ".".join([*package, *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def within(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == a or name.startswith(a + ".") for a in allowed)


def upward_imports(root: Path) -> Iterator[str]:
    for room in ROOMS:
        for path, module in sources(root, room):
            for line, name in imports(path, module):
                if name.split(".")[0] in ROOMS and not within(name, BELOW[room]):
                    yield f"{path}:{line}: {room}/ may not import {name}"


def foreign_imports(root: Path) -> Iterator[str]:
    """Imports of libraries that the room may not have, that pyproject.toml does not declare, or that are optional."""
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    core = {re.split(r"[^\w.-]", name)[0].lower() for name in declared}
    for path, module in sources(root, *ROOMS):
        top_level = {id(n) for n in module.body}
        for node in ast.walk(module):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            for line, name in imports(path, ast.Module([node], [])):
                library = name.split(".")[0]
                if library in ROOMS or library in sys.stdlib_module_names:
                    continue
                if path.startswith("kernels/") and library not in KERNEL_LIBRARIES:
                    yield f"{path}:{line}: kernels/ may not import {name}"
                elif library in OPTIONAL:
                    if id(node) in top_level:
                        yield f"{path}:{line}: {name} is optional: import it inside the function that uses it"
                elif library in COMPARED and path.startswith(COMPARE):
                    continue
                elif DISTRIBUTION.get(library, library) not in core:
                    yield f"{path}:{line}: {name} is not a dependency in pyproject.toml"


def models_know_distribution(root: Path) -> Iterator[str]:
    for path, module in sources(root, "models"):
        for line, name in imports(path, module):
            if within(name, ("torch.distributed",)):
                yield f"{path}:{line}: models/ receives `shard` and may not import {name}"
        for node in ast.walk(module):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
                yield f"{path}:{node.lineno}: models/ receives `shard` and may not use torch.distributed"


def families_meet(root: Path) -> Iterator[str]:
    """A family is a file of models/ with a `Config`: only the list of architectures, models/__init__.py, imports it."""
    files = list(sources(root, "models"))
    is_config = lambda node: isinstance(node, ast.ClassDef) and node.name == "Config"  # noqa: E731
    families = {path[: -len(".py")].replace("/", ".") for path, module in files if any(map(is_config, module.body))}
    for path, module in files:
        for line, name in imports(path, module):
            if path != "models/__init__.py" and within(name, tuple(families)):
                yield f"{path}:{line}: only models/__init__.py may import the family {name}"


def named_devices(root: Path) -> Iterator[str]:
    for path, module in sources(root, *ROOMS):
        if path in NAMES_DEVICES:
            continue
        for node in ast.walk(module):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.split(":")[0] in DEVICES:
                yield f"{path}:{node.lineno}: names a device, {node.value!r}: ask functional_trainer/backend.py"
            if isinstance(node, ast.Attribute) and ast.unparse(node) in {f"torch.{device}" for device in DEVICES}:
                yield f"{path}:{node.lineno}: uses {ast.unparse(node)}: ask functional_trainer/backend.py"


def is_table(module: ast.Module) -> bool:
    """A rules table is data: imports, a docstring and assignments."""
    return not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.walk(module))


def too_long(root: Path) -> Iterator[str]:
    for path, module in sources(root, *ROOMS):
        lines, budget = (root / path).read_text("utf-8").count("\n"), sys.maxsize
        if path.startswith("models/"):
            budget = 350
        elif path.startswith("sharding_rules/") and not path.endswith("__init__.py") and is_table(module):
            budget = 60
        elif re.fullmatch(r"experiments/\w+\.py", path):
            budget = 120
        elif path.startswith("experiments/notebooks/"):
            budget = 160
        elif path == "functional_trainer/step.py":
            budget = 150
        if lines > budget:
            yield f"{path}:1: has {lines} lines, the budget is {budget}"
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                if (size := node.end_lineno - node.lineno + 1) > FUNCTION_LINES:
                    yield f"{path}:{node.lineno}: {node.name} has {size} lines, the budget is {FUNCTION_LINES}"


def marks(root: Path) -> Iterator[str]:
    for file in (file for room in (*ROOMS, "tests", "docs", "install") for file in sorted((root / room).rglob("*"))):
        if file.suffix in {".py", ".md", ".pth", ".yaml"}:
            for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
                if mark := MARK.search(line):
                    yield f"{file.relative_to(root).as_posix()}:{number}: {mark[0]}: do it or open an issue"


def bare_floats(root: Path) -> Iterator[str]:
    for path, module in sources(root, "kernels", "functional_trainer", "models"):
        for node in ast.walk(module):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "float":
                if not node.args:
                    yield f"{path}:{node.lineno}: .float() turns float64 into float32: promote"


LONG_FUNCTION = "def f():\n" + "    x = 1\n" * FUNCTION_LINES
AS_LONG_AS_MAY_BE = "def f():\n" + "    x = 1\n" * (FUNCTION_LINES - 1)
PLANTED: list[tuple[Callable[[Path], Iterator[str]], str, str, str]] = [  # check, file, its text, what is reported
    (upward_imports, "kernels/a.py", "import functional_trainer\n", "kernels/a.py:1: "),
    (upward_imports, "functional_trainer/data/a.py", "def f():\n    from models import x\n", "data/a.py:2: "),
    (upward_imports, "models/a.py", "import os\nfrom sharding_rules.rules import Rules\n", "models/a.py:2: "),
    (upward_imports, "models/a.py", "from experiments import rules\n", "models/a.py:1: "),
    (upward_imports, "sharding_rules/a.py", "from models import layers\n", "sharding_rules/a.py:1: "),
    (upward_imports, "sharding_rules/a.py", "from functional_trainer import step\n", "import functional_trainer.step"),
    (foreign_imports, "kernels/a.py", "import torch\nimport yaml\n", "kernels/a.py:2: kernels/ may not import yaml"),
    (foreign_imports, "models/a.py", "import transformers\n", "transformers is not a dependency"),
    (foreign_imports, "experiments/a.py", "import transformers\n", "transformers is not a dependency"),
    (foreign_imports, "functional_trainer/a.py", "import flash_attn\n", "flash_attn is optional"),
    (foreign_imports, "functional_trainer/a.py", "def f():\n    import pandas\n", "pandas is not a dependency"),
    (models_know_distribution, "models/a.py", "import torch.distributed as dist\n", "models/a.py:1: "),
    (models_know_distribution, "models/a.py", "import torch\nx = torch.distributed.get_rank()\n", "models/a.py:2: "),
    (families_meet, "models/a.py", "from models.family import Config\n", "models/a.py:1: "),
    (families_meet, "models/a.py", "from . import family\n", "models/a.py:1: "),
    (named_devices, "functional_trainer/a.py", "x = 'cuda:0'\n", "a.py:1: names a device, 'cuda:0'"),
    (named_devices, "experiments/a.py", "def f(device='cpu'):\n    pass\n", "a.py:1: names a device, 'cpu'"),
    (named_devices, "kernels/a.py", "import torch\ntorch.cuda.synchronize()\n", "kernels/a.py:2: uses torch.cuda"),
    (too_long, "models/a.py", "x = 1\n" * 351, "models/a.py:1: has 351 lines, the budget is 350"),
    (too_long, "sharding_rules/a.py", "x = 1\n" * 61, "has 61 lines, the budget is 60"),
    (too_long, "experiments/a.py", "x = 1\n" * 121, "has 121 lines, the budget is 120"),
    (too_long, "experiments/notebooks/a.py", "x = 1\n" * 161, "has 161 lines, the budget is 160"),
    (too_long, "functional_trainer/step.py", "x = 1\n" * 151, "has 151 lines, the budget is 150"),
    (too_long, "kernels/a.py", "\n" + LONG_FUNCTION, "kernels/a.py:2: f has 51 lines, the budget is 50"),
    (marks, "docs/a.md", "text\nTO" + "DO more\n", "docs/a.md:2: "),
    (marks, "functional_trainer/a.py", "x = 1  # FIX" + "ME\n", "functional_trainer/a.py:1: "),
    (bare_floats, "kernels/a.py", "y = x.sum().float()\n", "kernels/a.py:1: "),
]
CHECKS = list(dict.fromkeys(check for check, *_ in PLANTED))


def a_tree_that_passes(root: Path) -> None:
    """Write a small tree in which everything that comes near a rule is allowed."""
    files = {
        "pyproject.toml": "[project]\ndependencies = ['torch>=2', \"triton; platform_system == 'Linux'\", 'pyyaml']\n",
        "kernels/__init__.py": "import torch\nimport math\nfrom kernels import op\nBACKENDS = {'cuda': torch.cuda}\n",
        "kernels/op.py": "def f(x):\n    '''Not for cpu: x.float().'''\n    import flash_attn\n    float(x)\n",
        "functional_trainer/backend.py": "import torch\nDEVICES = ('cuda', 'cpu')\n",
        "functional_trainer/tree.py": "import yaml\nimport kernels\nfrom .backend import DEVICES\n",
        "functional_trainer/step.py": "x = 1\n" * 150,
        "models/__init__.py": "from models import family\n",
        "models/family.py": "from models import layers\nclass Config:\n    pass\n" + "x = 1\n" * 347,
        "models/layers.py": "import functional_trainer.step\n",
        "sharding_rules/rules.py": "from functional_trainer import tree\n" + "x = 1\n" * 60 + "def f(): pass\n",
        "sharding_rules/table.py": "from sharding_rules.rules import P\n" + "x = 1\n" * 59,
        "experiments/sft.py": "import models, sharding_rules, functional_trainer.step, torch.distributed\n",
        "experiments/benchmarks/b.py": "import transformers\n" + "x = 1\n" * 200 + AS_LONG_AS_MAY_BE,
        "experiments/notebooks/01_n.py": "import transformers\n" + "x = 1\n" * 159,
        "docs/a.md": "to do: nothing\n",
    }
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_this_tree_keeps_the_rule(check):
    violations = list(check(ROOT))
    assert not violations, "\n" + "\n".join(violations)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_no_false_alarm(check, tmp_path):
    a_tree_that_passes(tmp_path)
    assert not list(check(tmp_path))


@pytest.mark.parametrize("check, path, text, report", PLANTED, ids=lambda x: getattr(x, "__name__", ""))
def test_a_planted_violation_is_found(check, path, text, report, tmp_path):
    a_tree_that_passes(tmp_path)
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(text)
    found = list(check(tmp_path))
    assert len(found) == 1 and report in found[0], found


def test_the_rooms_are_there():
    """An empty or renamed room would let every check above pass."""
    assert {room: sum(1 for _ in sources(ROOT, room)) >= 3 for room in ROOMS} == dict.fromkeys(ROOMS, True)
