"""From a recipe's options to what is asked: questions of files, or episodes of an environment, and held-out ones."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from experiments import episodes, scores
from experiments.data import check_width, shipped
from functional_trainer import backend, cluster
from functional_trainer.data import Record, Tokenizer, Within, rows_of, sources
from functional_trainer.options import Source
from functional_trainer.rewards import GIVEN, load_all, refuse_columns
from functional_trainer.rollouts import Prompt, Prompts


def read(
    o: Any, tokenizer: Tokenizer, vocab: int, shard: Any, count: int, say: Callable = print
) -> tuple[Prompts, dict, Prompts]:
    """Return what is asked, nothing, and `count` held-out ones, all of which fit into a row with their longest answer.

    ValueError for functions that can give no rewards, whatever the columns are before anything is read, for answers
    that cannot end, and for what does not fit. Join Ray's cluster if the run wants workers there, for all of them.
    """
    if not tokenizer.eos_ids:
        right = "set eos_token in tokenizer_config.json, or eos_token_id in generation_config.json"
        raise ValueError(f"{tokenizer.folder}: there is no token that ends an answer, so that none would end: {right}")
    load_all.cache_clear()  # files may have changed since the last run of this process
    _alone(shard, lambda: scores.refuse_options(o, scores.functions(o)))
    first = o.rollout.ray + o.reward.ray if shard.rank == 0 else 0
    if workers := first + o.rollout.environment_ray:
        sources.files((*o.data.train, *o.data.eval))  # one that is missing is told of before a cluster is begun
        cluster.connect(workers)
    reader = episodes.read if o.rollout.environment else prompts
    found, held_out = reader(o, tokenizer, vocab, shard, count, say)
    taken = [name for name in GIVEN if any(name in prompt.columns for prompt in found)]
    if taken and (o.reward.functions or not o.rollout.environment):
        raise ValueError(f"the data have a column {taken[0]!r}, which reward functions get of the rollout: rename it")
    _alone(shard, lambda: refuse_columns(scores.functions(o), [*GIVEN, *scores.columns(found)]))
    fitting, some = _fitting(o, found, "prompts", say), _fitting(o, held_out, "held-out prompts", say)
    if not fitting:
        raise ValueError("there are no prompts to answer (--data.train, --data.split, --data.overlong)")
    if o.keep_best and (not some or o.answers == 0):
        right = "give --data.eval or --data.split, and no --answers 0"
        raise ValueError(f"--keep-best is of the highest reward of held-out questions: {right}")
    return fitting, {}, some


def prompts(
    o: Any, tokenizer: Tokenizer, vocab: int, shard: Any, count: int, say: Callable = print
) -> tuple[Prompts, Prompts]:
    """Return the questions of the training rows, and of `count` held-out ones.

    `o` has the fields of `RunOptions` and `data` those of `PromptOptions`.
    """
    check_width(o.data.seq_len, "first_fit", shard.part("batch/columns", 1)[1])
    train, held_out = shipped(o, shard) if not o.data.train else (o.data.train, o.data.eval)
    kept, held = (Within(o.data.split, 1), Within(0, o.data.split)) if o.data.split else (None, None)

    def asked(paths: tuple[str, ...], keep: Within | None) -> Iterator[Prompt]:
        some = (Source(path, o.data.type, o.data.columns) for path in paths)
        rows = (row for source in some for row in rows_of(source, keep, "questions"))
        return (_prompt(row, tokenizer, vocab) for row in rows)

    found = Prompts(asked(train, kept))
    if o.data.split and not found:
        raise ValueError(f"--data.split {o.data.split} holds out all of so few rows; use a smaller share")
    say(f"training data: {', '.join(train)}: {len(found):,} questions")
    return found, Prompts(islice(asked(train if o.data.split else held_out, held), count))


def _prompt(row: Record, tokenizer: Tokenizer, vocab: int) -> Prompt:
    answered = row.messages[-1]["role"] == "assistant"
    before, wanted = (row.messages[:-1], row.messages[-1]["content"]) if answered else (row.messages, None)
    ids = tokenizer.prompt(before, row.tools)
    if max(ids) >= vocab:
        raise ValueError(f"{row.where}: token {max(ids)} is none of the model's {vocab}; use the model's tokenizer")
    known = {"answer": wanted} if answered else {}
    return Prompt(ids, str(before[-1]["content"]), known | dict(row.row), row.where, wanted)


def _alone(shard: Any, make: Callable[[], object]) -> None:
    """Do it on rank 0 alone, whose functions are called: they may load models. Its errors end all ranks."""
    backend.together(lambda: make() if shard.rank == 0 else None)


def _fitting(o: Any, prompts: Prompts, called: str, say: Callable) -> Prompts:
    """Leave out prompts that do not fit, and say so, with --data.overlong drop; ValueError if some do not without."""
    longest, room = o.rollout.max_completion_length, o.data.seq_len + 1 - o.rollout.max_completion_length
    over = [prompt for prompt in prompts if len(prompt.ids) > room]
    if not over:
        return prompts
    rows = f"rows of {o.data.seq_len} with an answer of {longest}"
    said = f"{len(over)} of {len(prompts)} {called} do not fit into {rows}"
    if o.data.overlong == "drop":
        say(f"{said}: they are dropped")
        return Prompts(prompt for prompt in prompts if len(prompt.ids) <= room)
    most, first = max(len(prompt.ids) for prompt in over), over[0]
    right = f"Raise --data.seq-len to {most + longest - 1}, lower --rollout.max-completion-length"
    has = f"first {first.where}, which has {len(first.ids)} tokens; the longest has {most}"
    raise ValueError(f"{said}: {has}. {right}, or leave them out with --data.overlong drop")
