"""What docs/ says about options, metrics, schedules and the container is what the code does."""

import ast
import copy
import fnmatch
import importlib.util
import math
import re
import shlex
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from experiments import compare, docs, plan, preference, qwen3_moe_grpo, rules
from experiments.benchmarks import gpu_suite, memory, sft_cpu
from experiments.qwen3_moe_sft import Options
from functional_trainer import config
from functional_trainer.engines import Episode, Sample
from functional_trainer.environments.episodes import report
from functional_trainer.loop import claim
from functional_trainer.options import ModelOptions
from tests.experiments import sft_runs
from tests.test_docs import PAGES, ROOT, pip

CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text("utf-8")


def flags(of: type) -> set[str]:
    """Return every flag of a recipe."""
    named = [name for at, cls in docs.sections(of).items() for name, *_ in docs.options(cls, at)]
    return {f"--{name}".replace("_", "-") for name in named}


FLAGS = flags(Options)
PREFERENCE = {f"--{field.name}".replace("_", "-") for field in fields(preference.Options)}
REINFORCED = flags(qwen3_moe_grpo.Options)
OTHERS = (
    REINFORCED
    | {"--config", "--help", "--build-arg", "--max-restarts"}
    | {
        f"--{field.name}".replace("_", "-")
        for module in (compare, plan, preference, rules, sft_cpu, gpu_suite, memory)
        for field in fields(module.Options)
    }
)
"""Options that pages name and that are not the recipe's."""


def cells(page: str) -> list[list[str]]:
    """Return the rows of a page's tables, heads left out."""
    lines = (ROOT / "docs" / page).read_text("utf-8").splitlines()
    rows = [
        line
        for line, below in zip(lines, [*lines[1:], ""], strict=True)
        if line.startswith("|") and not line.startswith("|---") and not below.startswith("|---")
    ]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


# options -------------------------------------------------------------------------------------------------------------


def test_the_page_of_options_is_current():
    assert docs.page(CONFIGURATION) == CONFIGURATION, "run `make docs`"


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("qwen3_moe_sft.py", Options()),
        ("qwen3_moe_grpo.py", qwen3_moe_grpo.Options(model=ModelOptions("m"))),
        ("preference.py", preference.Options()),
    ],
)
def test_the_page_of_options_has_the_defaults_of_each_recipe(script, options):
    """Those of the first tables, but for what a table of the recipe's own says."""
    parts = re.findall(r"^## (.*)\n\n((?:\|.*\n)+)", CONFIGURATION, re.M)
    told = "".join(part for title, part in parts if " of experiments/" not in title or title.endswith(script))
    found = dict(re.findall(r"^\| `(--.*?)` \| .*? \| (.*?) ?\| ", told, re.M))
    given = {flag: docs.show(value).replace("|", "\\|") for flag, value in config.flags(options).items()}
    for flag in given.keys() - {"--mesh.layout", "--model.path"}:  # is called --mesh; must be given
        assert found[flag] == given[flag], flag


@pytest.mark.parametrize("of", [Options, qwen3_moe_grpo.Options, preference.Options])
def test_the_page_of_options_says_what_help_says(of, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        config.cli(of, doc="", argv=["--help"])
    helped = re.sub(r"[│╭╮╰╯─\s]+", " ", capsys.readouterr().out)
    rows = [row for row in cells("configuration.md") if row[0].startswith("`--")]
    named = {*re.findall(r"(?<= )--[a-z][a-z0-9.-]*[a-z](?=,? )", helped)}
    assert {flag for flag in named if ".no-" not in flag and not flag.startswith("--no-")} - {"--help", "--config"} == {
        flag for flag in flags(of) if ".no-" not in flag
    }
    assert {row[0].strip("`") for row in rows} == FLAGS | flags(qwen3_moe_grpo.Options) | flags(preference.Options)
    assert all(text for _, _, _, text, _ in rows)
    if of is Options:  # longer helps stand side by side
        said = {name.strip("`") for name, _, _, text, _ in rows if text in helped}
        assert said >= FLAGS, FLAGS - said


@pytest.mark.parametrize("prefix", docs.sections())
def test_what_may_differ_when_a_run_is_resumed(prefix, tmp_path):
    """Changed one at a time: `claim` takes over the run for those that the page says may differ, for no others."""
    begun = Options(out=str(tmp_path))
    (tmp_path / "metrics.jsonl").touch()
    config.dump(begun, tmp_path / "config.yaml")
    free = {row[0].strip("`") for row in cells("configuration.md") if row[-1] == "yes"}
    for name, *_ in docs.options(docs.sections()[prefix], prefix):
        if name in ("out", "resume"):  # these say which run it is
            continue
        changed = copy.deepcopy(begun)
        section = getattr(changed, prefix.rstrip(".")) if prefix else changed
        object.__setattr__(section, name.removeprefix(prefix), "another")
        flag = f"--{name.replace('_', '-')}"
        if flag in free:
            assert claim(changed, main=False) is None
        else:
            with pytest.raises(ValueError, match=f"holds another run .*{re.escape(flag)} was"):
                claim(changed, main=False)


@pytest.mark.parametrize("recipe", [qwen3_moe_grpo, preference])
def test_help_has_a_line_for_each_example(recipe, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        config.cli(recipe.Options, doc=recipe.__doc__, argv=["--help"])
    examples = re.findall(r"^ *(?:make|python|torchrun) .*", recipe.__doc__, re.M)
    assert len(examples) == 3 and {*examples} <= {*capsys.readouterr().out.splitlines()}


def test_options_named_beside_those_of_others_exist():
    """Each of ours in the tables of docs/coming_from.md is taken by the command line, with its value if it has one."""
    seen = set()
    for theirs, ours, remark in cells("coming_from.md"):
        spans = re.findall(r"`([^`]*)`", ours)
        assert spans or ours in ("-", "always", "always on CPU"), (theirs, ours)
        for span in [*spans, *re.findall(r"`(--[^`]*)`", remark)]:
            if " " in span:
                data = [] if span.startswith("--data.train") else ["--data.train", "chats.jsonl"]
                known = ((FLAGS, Options), (PREFERENCE, preference.Options), (REINFORCED, qwen3_moe_grpo.Options))
                recipe = next(of for names, of in known if span.split()[0] in names)
                config.cli(recipe, doc="", argv=[*shlex.split(span), *data, "--model.path", "m"])
            assert span.split()[0] in FLAGS | PREFERENCE | REINFORCED, (theirs, span)
            seen.add(span.split()[0])
    assert len(seen) > 25


def test_the_table_of_trls_grpo_has_every_field_of_its_config():
    """And none that is not there; read from its source, as importing it takes seconds."""
    (folder,) = importlib.util.find_spec("trl").submodule_search_locations
    module = ast.parse((Path(folder) / "trainer" / "grpo_config.py").read_text("utf-8"))
    (cls,) = (node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "GRPOConfig")
    theirs = {node.target.id for node in cls.body if isinstance(node, ast.AnnAssign)}
    page = (ROOT / "docs" / "coming_from.md").read_text("utf-8")
    table = page.split("| `GRPOConfig`", 1)[1].split("\n\n", 1)[0]
    named = [re.findall(r"`([^`]*)`", row.split("|")[1]) for row in table.splitlines()[2:]]
    ours = [name for names in named for name in names]
    assert len(ours) == len({*ours}) + 1, "GRPOTrainer alone is named twice"
    assert {*ours} - theirs == {"reward_funcs", "tools", "environment_factory", "GRPOTrainer"} and theirs <= {*ours}


@pytest.mark.parametrize("page", PAGES)
def test_options_named_in_prose_exist(page):
    for span in re.findall(r"`(--[a-z][^`]*)`", (ROOT / page).read_text("utf-8")):
        flag = span.split()[0]
        known = FLAGS | OTHERS
        assert fnmatch.filter(known, flag) or flag.replace(".no-", ".") in known, span


# schedules -----------------------------------------------------------------------------------------------------------


def test_the_drawn_schedules_are_those_of_the_defaults():
    curves, n = docs.curves(), docs.STEPS
    assert set(curves) == {"cosine", "linear", "wsd", "constant"} and n == 1000
    for name, rates in curves.items():
        assert len(rates) == n and rates[:100] == pytest.approx([(i + 1) / 100 for i in range(100)])
        done = [max(0, (i - 100) / 900) for i in range(100, n)]
        wanted = {
            "cosine": [0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2 for x in done],
            "linear": [1 - 0.9 * x for x in done],
            "wsd": [1 - 0.9 * max(0, (i - 800) / 200) for i in range(100, n)],
            "constant": [1.0] * 900,
        }
        assert rates[100:] == pytest.approx(wanted[name])
    picture = (ROOT / "docs" / "schedules.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 60_000


# metrics -------------------------------------------------------------------------------------------------------------


def keys(row: dict) -> set[str]:
    """Return the names of a row's values, those in dicts joined as in TensorBoard."""
    parts = {k: v if isinstance(v, dict) and k != "nonfinite" else [""] for k, v in row.items()}
    return {f"{k}/{i}".rstrip("/") for k, part in parts.items() for i in part}


def test_the_glossary_has_every_key_of_a_run_and_no_other(tmp_path):
    sft_runs.folder(tmp_path / "moe")
    sft_runs.chats(tmp_path / "train.jsonl", 40)
    sft_runs.chats(tmp_path / "other.jsonl", 5)
    data = ("--data.train", "train.jsonl", "--data.eval", "train.jsonl", "other.jsonl", "--data.seq-len", 64)
    wild = ("--optim.lr", 1e30, "--optim.max-grad-norm", 0, "--max-skipped", 9)  # so that some values are not finite
    sft_runs.run(
        tmp_path, "--model.path", "moe", *data, *wild, "--batch", 2, "--steps", 5, "--compile", "off", "--out", "run"
    )
    text = "def odd(completion_ids, **columns):\n    return [1 / (ids[0] % 2) for ids in completion_ids]\n"
    (tmp_path / "mine.py").write_text(text)  # raises for every second answer or so
    flags = ("--data.train", "train.jsonl", "--data.split", 0.5, "--data.seq-len", 64, "--batch", 4, "--answers", 9)
    flags += ("--rollout.num-generations", 4, "--rollout.max-completion-length", 5, "--reward.functions", "mine.py:odd")
    flags += ("--rollout.filter-groups", "--rollout.steps-per-generation", 2, "--loss.old", "trainer")
    flags += ("--loss.loss-type", "ppo", "--loss.beta", 0.1, "--micro-batch", 2, "--steps", 2, "--compile", "off")
    forms = {"rl": ("--loss.kl-in-reward",), "ahead": ("--rollout.max-async-level", 1, "--rollout.partial", 3)}
    for out, more in forms.items():
        sft_runs.run(tmp_path, "--model.path", "moe", *flags, *more, "--out", out, recipe="qwen3_moe_grpo")
    written = set().union(*(keys(row) for out in ("run", *forms) for row in sft_runs.rows(tmp_path / out)))
    episode = Sample([1], [0.0], "stop", [0], reward=1.0, episode=Episode([], 1, 0, 0))
    written |= {*report([episode]), "eval_reward", "eval_raised"}  # a run has them in tests/experiments
    entries = {key for row in cells("metrics.md") for key in re.findall(r"^`([^`]+)`$", row[0])}
    matches = {entry: fnmatch.filter(written, re.sub("[A-Z]+", "*", entry)) for entry in entries}
    assert written == set().union(*matches.values())
    assert not [entry for entry, found in matches.items() if not found]


# the container -------------------------------------------------------------------------------------------------------

INSTRUCTIONS = [
    line.split(maxsplit=1)
    for line in (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    if line and not line.startswith("#")
]


def test_the_container_copies_what_is_there_and_what_the_package_needs():
    copied = {source for verb, rest in INSTRUCTIONS if verb == "COPY" for source in rest.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert not [source for source in copied if any(fnmatch.fnmatch(source, pattern) for pattern in ignored)]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    assert {
        *wheel,
        "experiments",
        "constraints.txt",
        "pyproject.toml",
        project["project"]["readme"],
        "LICENSE",
    } == copied


def test_the_container_has_a_python_that_fits_and_installs_the_pins():
    arguments = dict(rest.split("=") for verb, rest in INSTRUCTIONS if verb == "ARG")
    version = tuple(map(int, re.fullmatch(r"python:(\d+)\.(\d+)", arguments["BASE"]).groups()))
    least = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert least == ">=3.11" and (3, 11) <= version <= (3, 12)
    (command,) = (rest for verb, rest in INSTRUCTIONS if verb == "RUN" and "pip install" in rest)
    assert command.startswith("--mount=type=cache,target=/root/.cache/pip ")
    words = shlex.split(command[command.index("pip install") :])
    pip(words, ROOT)
    assert words[2:4] == ["-c", "constraints.txt"]


def test_the_container_runs_the_recipe_and_not_as_root():
    verbs = [verb for verb, _ in INSTRUCTIONS]
    (entry,) = (rest for verb, rest in INSTRUCTIONS if verb == "ENTRYPOINT")
    where = next(rest for verb, rest in INSTRUCTIONS if verb == "WORKDIR")
    program, script = re.findall(r'"([^"]+)"', entry)
    assert program == "python" and (ROOT / Path(script).relative_to(where)).is_file()
    (user,) = (rest for verb, rest in INSTRUCTIONS if verb == "USER")
    assert f"useradd --create-home --uid 1000 {user}" in [rest for verb, rest in INSTRUCTIONS if verb == "RUN"]
    assert verbs.index("USER") > max(i for i, verb in enumerate(verbs) if verb in ("COPY", "RUN"))
