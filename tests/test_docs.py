"""What README.md and docs/ tell a reader to type is typed here: commands, YAML and Python run, links and flags exist.

Commands of the recipe really run, page after page in one folder that holds what they name, with options appended that
only make them small. A command that no rule covers fails.
"""

import contextlib
import importlib
import io
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
import transformers

import models
from experiments import compare, plan, questions, qwen3_moe_grpo, rules
from experiments.first_light import tasks
from experiments.qwen3_moe_sft import Options
from experiments.serving.vllm_worker import Weights
from functional_trainer import config
from functional_trainer.data import Tokenizer
from functional_trainer.options import Mix
from functional_trainer.types import ONE_DEVICE
from sharding_rules import files, qwen3_moe
from sharding_rules.lint import lint
from sharding_rules.mesh import parse
from tests.experiments import sft_runs
from tests.experiments.sft_runs import RECIPE, rows
from tests.functional_trainer import servers
from tests.sharding_rules import golden
from tests.vllm import against_vllm

ROOT = Path(__file__).parents[1]
FIRST = ["README.md", "docs/quickstart.md"]
PAGES = [*FIRST, *sorted({f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} - {*FIRST})]
GAME = """
from functional_trainer.environments import Environment, Step

class Game(Environment):
    def reset(self, row):
        return [{"role": "user", "content": row["word"]}]

    def step(self, messages):
        return Step(reward=1.0, done=True)
"""
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
PYTHON, RUN = r"(\.venv/bin/)?python ", r"experiments/qwen3_moe_sft\.py"


def blocks(page: str, *languages: str) -> list[tuple[str, str]]:
    """Return (language, text) of a page's fenced blocks, in order; all of them without `languages`."""
    found = BLOCK.findall((ROOT / page).read_text("utf-8"))
    return [block for block in found if block[0] in languages or not languages]


def commands() -> list[str]:
    """Return every distinct command of all pages, continuation lines joined and comments gone, in reading order."""
    text = "\n".join(text for page in PAGES for _, text in blocks(page, "bash")).replace("\\\n", " ")
    lines = [shlex.join(shlex.split(line, comments=True)) for line in text.splitlines()]
    return list(dict.fromkeys(filter(None, lines)))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The folder that commands run in, with the models and the data that the pages name."""
    place = tmp_path_factory.mktemp("docs")
    for name in ("my_qwen3_folder", "Qwen3-30B-A3B"):
        sft_runs.folder(place / name)
    sft_runs.folder(place / "Qwen3-0.6B", "qwen3")
    (place / "chats").mkdir()
    for i, name in enumerate(("held_out.jsonl", "chats/one.jsonl", "quiz.jsonl", "chats.jsonl")):
        sft_runs.chats(place / name, 40, seed=i)
    with open(place / "chats.jsonl", "a") as file:
        file.writelines(text for page in PAGES for _, text in blocks(page, "json"))
    (place / "quiz.csv").write_text("question,answer\n" + "".join(f"Add {i} to 2.,{i + 2}\n" for i in range(30)))
    (mix,) = (text for _, text in blocks("docs/data.md", "yaml"))
    (place / "mix.yaml").write_text(mix)
    (place / "my.py").write_text(blocks("docs/rewards.md", "python")[0][1])
    (table,) = (text for _, text in blocks("docs/sharding.md", "python"))
    (place / "my_rules.py").write_text(table)
    (place / "my_game.py").write_text(GAME)
    (place / "episodes.jsonl").write_text('{"word": "Sort"}\n' * 9)
    return place


# commands ------------------------------------------------------------------------------------------------------------


def few_tasks() -> None:
    """Let the shipped tasks be few."""
    write = tasks.write
    tasks.write = lambda folder, seed: write(folder, n_train=200, n_eval=20, seed=seed)


def small(flags: list[str]) -> list[str]:
    """Return the flags of a command and further ones that only make it small; a --config is of such a run already."""
    steps = ["--steps", str(max(1, int(flags[flags.index("--steps") + 1]) // 50))] if "--steps" in flags else []
    if "--config" in flags:
        return flags + steps
    few = [*(steps or ["--steps", "2"]), "--batch", "2", "--data.seq-len", "64", "--compile", "off"]
    return [*flags, *few, *([] if "--data.train" in flags else ["--answers", "2"])]


def ensure(place: Path, text: str) -> None:
    """Make the runs that a command or a block names, if no command has made them."""
    for name in re.findall(r"\bruns/\w+", text):
        if not (place / name).exists():
            data = ["--model.path", "Qwen3-0.6B", "--data.train", "chats.jsonl", "--steps", "200"]
            sft_runs.run(place, *small([*data, "--out", name]))


def recipe(words: list[str], place: Path) -> None:
    flags = words[words.index("experiments/qwen3_moe_sft.py") + 1 :]
    if "--help" in flags:
        assert "--optim.lr" in sft_runs.run(place, *flags)
        return
    out = flags[flags.index("--out") + 1] if "--out" in flags else Options.out
    given = [word for word in flags if word != out]
    ensure(place, " ".join(given))
    world = 2 if words[0] == "torchrun" else 1
    if world == 1:
        sft_runs.run(place, *small(flags), setup=few_tasks)
    else:
        sft_runs.run_ranks(place, world, *small(flags), *axes(flags))
    steps = config.load(Options, place / out / "config.yaml").steps
    assert rows(place / out)[-1]["step"] == steps and (place / out / "hf" / "config.json").exists()


def preferred(words: list[str], place: Path) -> None:
    """The recipe for preferences, on a few pairs."""
    flags = words[words.index("experiments/preference.py") + 1 :]
    world, out = 2 if words[0] == "torchrun" else 1, place / "preferred" / str(len(flags))
    pairs, _ = tasks.write_preferences(place / "pairs", n_train=40, n_eval=10)
    shutil.copy(pairs, place / "pairs.jsonl")
    data = [] if "--data.train" in flags else ["--data.train", "pairs.jsonl"]
    few = ["--steps", "2", "--batch", "2", "--data.seq-len", "160", "--compile", "off", "--out", str(out)]
    if world == 1:
        sft_runs.run(place, *flags, *data, *few, recipe="preference")
    else:
        sft_runs.run_ranks(place, world, *flags, *data, *few, *axes(flags), recipe="preference")
    assert rows(out)[-1]["step"] == 2 and (out / "hf" / "config.json").exists()


def reinforced(words: list[str], place: Path) -> None:
    """The recipe for rewards: what it asks is read as typed, and asked in two steps of few and short answers; with
    functions that are isolated it is read alone."""
    flags = words[words.index("experiments/qwen3_moe_grpo.py") + 1 :]
    o = config.cli(qwen3_moe_grpo.Options, doc="", argv=flags)
    tokenizer = Tokenizer(o.model.path if Path(o.model.path).exists() else "my_qwen3_folder")
    questions.read(o, tokenizer, tokenizer.vocab_size, ONE_DEVICE, 512)
    if not o.data.train:  # environments that ship: tests/experiments learn from them
        return
    if "--reward.isolate" in flags:
        return
    world, out = 2 if words[0] == "torchrun" else 1, place / "reinforced" / Path(o.out).name
    few = ["--steps", "2", "--batch", "2", "--micro-batch", "2", "--data.seq-len", "64", "--compile", "off"]
    few += ["--rollout.num-generations", "2", "--rollout.max-completion-length", "4"]
    few += ["--rollout.max-turn-length", "4"] if "--rollout.environment" in flags else []
    options = {"recipe": "qwen3_moe_grpo"}
    if "--rollout.url" in flags:
        at = flags.index("--rollout.url") + 1
        model = models.from_pretrained(place / flags[flags.index("--model.path") + 1])
        with closing(servers.KINDS[flags[flags.index("--rollout.engine") + 1]](*model, length=90)) as server:
            sft_runs.run(place, *flags[:at], server.url, *flags[at + 1 :], *few, "--out", out, **options)
    elif world == 1:
        sft_runs.run(place, *flags, *few, "--out", out, **options)
    else:
        sft_runs.run_ranks(place, world, *flags, *few, "--out", out, *axes(flags), **options)
    assert rows(out)[-1]["step"] == 2 and (out / "hf" / "config.json").exists()


def scripted(words: list[str], place: Path) -> None:
    done = subprocess.run([sys.executable, ROOT / words[1], *words[2:], "--n-train", "40", "--n-eval", "10"], cwd=place)
    assert done.returncode == 0 and (place / words[3] / "tokenizer" / "tokenizer.json").exists()


def served(words: list[str], place: Path) -> None:
    """Flags are those with which a real vLLM is tested."""
    given = {words[i] for i in range(3, len(words)) if words[i].startswith("--")} - {"--model", "--port"}
    assert words[2] == "vllm.entrypoints.openai.api_server" and given <= {*against_vllm.FLAGS}
    assert (place / words[words.index("--model") + 1] / "config.json").exists()
    assert words[words.index("--worker-extension-cls") + 1] == f"vllm_worker.{Weights.__name__}"


def axes(flags: list[str]) -> list[str]:
    """Let two ranks stand for all that the command has."""
    if "--mesh" in flags:
        return []
    return ["--mesh.ep", "2", "--mesh.fsdp", "1"] if "--mesh.ep" in flags else ["--mesh.fsdp", "2"]


def make(words: list[str], place: Path) -> None:
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), words
    if words[1] == "sft":
        given = [word.removeprefix("ARGS=") for word in words[2:]]
        recipe(["experiments/qwen3_moe_sft.py", *(flag for text in given for flag in shlex.split(text))], place)


def below() -> dict[str, str]:
    """Return the text block that stands below a command, by the command."""
    found = [block for page in PAGES for block in blocks(page)]
    pairs = ((shlex.join(shlex.split(a)), b) for (kind, a), (other, b) in itertools.pairwise(found)
             if (kind, other) == ("bash", "text"))  # fmt: skip
    return dict(pairs)


def printed(program: types.ModuleType, words: list[str]) -> None:
    """What it prints stands below it on the page."""
    with contextlib.redirect_stdout(io.StringIO()) as found, contextlib.suppress(SystemExit):
        program.main(config.cli(program.Options, doc="", argv=words[2:]))
    lines = iter(line.rstrip() for line in found.getvalue().splitlines())
    said = [line.rstrip() for line in below()[shlex.join(words)].splitlines()]
    assert all(line in lines for line in said if line != "..."), found.getvalue()


def ruled(words: list[str], place: Path) -> None:
    printed(rules, words)


def compared(words: list[str], place: Path) -> None:
    ensure(place, " ".join(words))
    o = config.cli(compare.Options, doc="", argv=words[2:])
    compare.main(o)
    assert (place / o.picture).read_bytes().startswith(b"\x89PNG")


def benchmark(words: list[str], place: Path) -> None:
    """Its flags are accepted; tests/experiments run it, plans are run below."""
    module = importlib.import_module(words[1].removesuffix(".py").replace("/", "."))
    config.cli(module.Options, doc="", argv=words[2:])


def pip(words: list[str], place: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    known = {"-e", "--dry-run", "--ignore-installed", "--no-build-isolation"}
    args = iter(words[2:])
    for word in args:
        if word in ("-c", "--extra-index-url"):
            value = next(args)
            assert word != "-c" or (ROOT / value).is_file(), value
        elif extra := re.fullmatch(r"\.\[([\w,-]+)\]", word):
            assert {*extra[1].split(",")} <= extras.keys(), word
        else:
            assert word == "." or word in known or re.fullmatch(r"[a-z][\w-]*", word), word


def docker(words: list[str], place: Path) -> None:
    """The image is one that a command builds, with arguments the Dockerfile has, and the recipe takes the flags."""
    built = [shlex.split(command) for command in commands() if command.startswith("docker build ")]
    tags = {command[command.index("-t") + 1] for command in built}
    if words[1] == "build":
        given = [words[i + 1].split("=")[0] for i, word in enumerate(words) if word == "--build-arg"]
        assert {*given} <= {*re.findall(r"^ARG (\w+)=", (ROOT / "Dockerfile").read_text(), re.M)} and words[-1] == "."
    else:
        (at,) = (i for i, word in enumerate(words) if word in tags)
        config.cli(Options, doc="", argv=words[at + 1 :])


def copy(words: list[str], place: Path) -> None:
    """What is copied is what the first run leaves behind."""
    if not Path(words[1]).exists():
        recipe(["experiments/qwen3_moe_sft.py"], place)
    shutil.copy(*words[1:])


def activate(words: list[str], place: Path) -> None:
    assert words[1:] == [f"{re.search(r'^VENV := (.*)$', (ROOT / 'Makefile').read_text(), re.M)[1]}/bin/activate"]


def download(words: list[str], place: Path) -> None:
    """There is no hub here: the program takes the flags, and the folder is one that later commands use."""
    helped = subprocess.run([Path(sys.executable).parent / "hf", *words[1:2], "--help"], capture_output=True, text=True)
    assert helped.returncode == 0 and all(word in helped.stdout for word in words if word.startswith("--"))
    assert (place / words[words.index("--local-dir") + 1] / "config.json").exists()


def tensorboard(words: list[str], place: Path) -> None:
    from tensorboard import default, program

    board = program.TensorBoard(default.get_static_plugins())
    board.configure(words)
    ensure(place, "runs/mine")
    assert list((place / board.flags.logdir).glob("*/tensorboard/events*"))


def accelerated(words: list[str], place: Path) -> None:
    at = words.index("experiments/qwen3_moe_sft.py")
    command = [Path(sys.executable).parent / words[0], *words[1:at], RECIPE, *small(words[at + 1 :])]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "on 2 x cpu" in done.stdout, done.stdout + done.stderr
    assert rows(place / words[-1])


RULES: dict[str, Callable[[list[str], Path], None]] = {
    rf"{PYTHON}{RUN}( .*)?": recipe,
    rf"torchrun (--nnodes .* )?--nproc-per-node \d+ .*{RUN} .*": recipe,
    rf"({PYTHON}|torchrun --nproc-per-node \d+ )experiments/preference\.py( .*)?": preferred,
    rf"({PYTHON}|torchrun --nproc-per-node \d+ )experiments/qwen3_moe_grpo\.py( .*)?": reinforced,
    rf"{PYTHON}experiments/first_light/dialogues\.py .*": scripted,
    rf"{PYTHON}-m vllm\.entrypoints\.\S+ .*": served,
    rf"accelerate launch .*{RUN} .*": accelerated,
    rf"{PYTHON}experiments/rules\.py .*": ruled,
    rf"{PYTHON}experiments/compare\.py .*": compared,
    rf"{PYTHON}experiments/(benchmarks/\w+|plan|dry_run)\.py( .*)?": benchmark,
    r"make [a-z-]+( .*)?": make,
    r"pip install .*": pip,
    r"docker (build|run) .*": docker,
    r"cp runs/\S+ \w+\.jsonl": copy,
    r"source .*": activate,
    r"hf download .*": download,
    r"tensorboard .*": tensorboard,
}


@pytest.mark.parametrize("command", commands())
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_command_of_the_docs_works(command, place, monkeypatch):
    monkeypatch.chdir(place)
    bare = re.sub(r"^(time )?([A-Z_]+=\S+ )*", "", command)
    (rule,) = [rule for pattern, rule in RULES.items() if re.fullmatch(pattern, bare)] or [None]
    assert rule, f"no rule of this test covers: {command}"
    rule(shlex.split(bare), place)


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in below() if "experiments/plan.py" in command])
def test_a_plan_is_what_the_page_says(command):
    printed(plan, shlex.split(command))


@pytest.mark.slow
def test_torchrun_itself_starts_the_first_such_command(place):
    words = shlex.split(next(command for command in commands() if command.startswith("torchrun ")))
    flags = [*small(words[4:]), *axes(words), "--out", "runs/torchrun"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", words[1], "2", RECIPE, *flags]
    done = subprocess.run(torchrun, cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(place / "runs" / "torchrun")


# code ----------------------------------------------------------------------------------------------------------------


def module_of(text: str, path: str, monkeypatch) -> types.ModuleType:
    """Run a block that begins with the path of a file as that module, in its package."""
    name = path.removesuffix(".py").replace("/", ".")
    package, _, last = name.rpartition(".")
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(text, path, "exec"), module.__dict__)
    if package in sys.modules:
        monkeypatch.setattr(sys.modules[package], last, module, raising=False)
    return module


def run_python(page: str, place: Path, monkeypatch) -> dict:
    """Run a page's Python, plain blocks in one scope, those of files as modules; apply its diffs to the lists."""
    monkeypatch.chdir(place)
    scope: dict = {}
    for language, text in blocks(page, "python", "diff"):
        ensure(place, text)
        path = re.match(r"# (\w+(?:/\w+)*\.py)\n", text)
        if language == "diff":
            apply(text, path[1], monkeypatch)
        elif path is None:
            exec(compile(text, page, "exec"), scope)
        else:
            module = module_of(text, path[1], monkeypatch)
            for name in [name for name in vars(module) if name.startswith("test_")]:
                getattr(module, name)()
    return scope


def apply(diff: str, path: str, monkeypatch) -> None:
    """Apply a diff to the text of a file, run that, and take over what its list then holds."""
    text = (ROOT / path).read_text("utf-8")
    removed, added = (re.findall(rf"^[{sign}](.*\n)", diff, re.M) for sign in "-+")
    for old, new in zip(removed, added, strict=True):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    scope: dict = {"__name__": path, "__file__": str(ROOT / path)}
    exec(compile(text, path, "exec"), scope)
    module = importlib.import_module(path.removesuffix("/__init__.py").removesuffix(".py").replace("/", "."))
    name = re.findall(r"^(\w+).* = \{", added[-1])[0]
    for key, value in scope[name].items():
        monkeypatch.setitem(getattr(module, name), key, value)


@pytest.mark.parametrize(
    "page", ["docs/quickstart.md", "docs/metrics.md", "docs/sharding.md", "docs/rewards.md", "docs/environments.md"]
)
def test_python_of_the_docs_runs(page, place, monkeypatch):
    run_python(page, place, monkeypatch)


def test_the_loss_of_the_readme_trains(place, monkeypatch):
    scope = run_python("README.md", place, monkeypatch)
    tokens = torch.randint(0, 384, (2, 17), generator=torch.Generator().manual_seed(0))
    columns = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": torch.ones(2, 16, dtype=torch.long)}
    batch = columns | {"positions": torch.arange(16).expand(2, -1), "weights": torch.ones(2, 16)}
    losses = [float(scope["step"](scope["state"], batch)[1]["loss"]) for _ in range(15)]
    assert losses[-1] < losses[0] / 2


def test_every_page_with_python_is_run():
    assert {page for page in PAGES if blocks(page, "python")} == {
        *FIRST, "docs/metrics.md", "docs/extending.md", "docs/sharding.md", "docs/rewards.md",
        "docs/environments.md",
    }  # fmt: skip


def test_the_family_of_extending_has_a_rule_for_every_path_and_goes_back(place, monkeypatch):
    """Its parity test and the loss beside it run with the page's blocks."""
    run_python("docs/extending.md", place, monkeypatch)
    raw = sft_runs.SIZES | {"model_type": "exaone4", "sliding_window": None, "layer_types": ["full_attention"] * 2}
    paths = [*golden.parameters(raw), *golden.boundaries(raw)]
    table = rules.RULES["exaone4"]
    assert [table.spec(path) for path in paths] and not table.unused(paths)
    source, target = place / "exaone", place / "exaone-again"
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**raw))
    theirs.save_pretrained(source)
    model, params = models.from_pretrained(source)
    models.save_pretrained(model, params, target)
    again = transformers.AutoModelForCausalLM.from_pretrained(target)
    assert all(torch.equal(p, dict(theirs.named_parameters())[name]) for name, p in again.named_parameters())
    with pytest.raises(ValueError, match="sliding_window must be null"):
        models.from_config(raw | {"sliding_window": 7})


def test_half_a_change_is_found_as_the_page_says(place, monkeypatch):
    scope = run_python("docs/sharding.md", place, monkeypatch)
    (said,) = (text for _, text in blocks("docs/sharding.md", "text") if text.startswith("maths: "))
    row = r"params/layers/\w+/moe/gate_up"
    table = qwen3_moe.RULES.change({row: sys.modules["my_rules"].RULES.spec("params/layers/0/moe/gate_up")})
    model = models.from_config(models.PRESETS["30b-a3b"])
    (problem,) = lint(table, rules.shapes(model), rules.hear(model), parse("fsdp=4,ep=4,cp=2"))
    assert said.startswith(f"{problem}\n\n1 problem(s): ") and not scope


def test_yaml_and_json_of_the_docs_are_read(tmp_path):
    found = [(page, *block) for page in PAGES for block in blocks(page, "yaml", "json")]
    assert len(found) >= 3
    for page, language, text in found:
        (tmp_path / "file.yaml").write_text(text)
        if language == "json":
            assert [json.loads(line)["messages"] for line in text.splitlines()], page
        elif text.startswith("- ["):
            assert files.load(str(tmp_path / "file.yaml")).table
        else:
            config.load(Mix if text.startswith("datasets:") else Options, tmp_path / "file.yaml")


# pages ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_no_block_that_nothing_runs(page):
    text = (ROOT / page).read_text("utf-8")
    assert {language for language, _ in blocks(page)} <= {"bash", "python", "yaml", "json", "diff", "text"}
    assert text.count("```") == 2 * len(blocks(page))
    assert not re.search(r"^ {4,}\S", BLOCK.sub("", text), re.M), "an indented block escapes these tests: fence it"


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_links_to_exists(page):
    text = (ROOT / page).read_text("utf-8")
    for link, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text):
        if not link.startswith("http"):
            target = ((ROOT / page).parent / link) if link else ROOT / page
            assert target.exists(), link
            titles = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.M) if anchor else []
            assert not anchor or anchor in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}, anchor


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page):
    """Files of the tree, make targets, and options: the recipe's, or of another program in a command of the page."""
    text = (ROOT / page).read_text("utf-8")
    for path in re.findall(
        r"`((?:docs|experiments|functional_trainer|kernels|models|sharding_rules|tests)/[^` *]*)`", text
    ):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
