"""Preferences as data: shapes, loss masks, groups that stay together in packed rows, KTO's mismatched answers."""

import json
import re
from collections import Counter
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.data_utils import extract_prompt

from experiments.first_light import tasks
from functional_trainer.data import Loader, Rows, Share, Tokenizer, Within, encoded, records, tokenized
from functional_trainer.data.columns import check_pairs, check_whole, lengths
from functional_trainer.data.groups import couples, pairs
from functional_trainer.data.records import Record
from functional_trainer.options import Source
from functional_trainer.preference import MPO, preference
from tests.experiments.sft_runs import TOKENIZER as FOLDER
from tests.functional_trainer.test_data_sources import WRITERS

TOKENIZER = Tokenizer(FOLDER)
USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
EARLIER = [{"role": "system", "content": "s"}, USER, {"role": "assistant", "content": "yes"}, USER]
PAIRS = {
    "texts": {"prompt": "q", "chosen": "a", "rejected": "b", "score": 0.5},
    "messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "conversations": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "conversations beside a text": {"prompt": "not read", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
}
LONG = {
    "messages": {"prompt": EARLIER, "chosen": [GOOD, USER, BAD], "rejected": [BAD]},
    "conversations": {"chosen": [*EARLIER, GOOD, USER, BAD], "rejected": [*EARLIER, BAD]},
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def said(messages):
    return [(m["role"], m["content"]) for m in messages]


# shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["a.jsonl", "i.parquet"])
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_recognised(tmp_path, name, kind):
    WRITERS[kind](tmp_path / kind, [PAIRS[name]])
    (record,) = records(tmp_path / kind, form="pairs")
    assert (said(record.messages), said(record.rejected)) == (said([USER, GOOD]), said([USER, BAD]))
    assert (record.shape, record.prompt) == ("preference", 1)


@pytest.mark.parametrize("name", LONG)
def test_the_prompt_is_what_trl_takes_for_it(tmp_path, name):
    (record,) = records(write(tmp_path / "a.jsonl", [LONG[name]]), form="pairs")
    theirs = extract_prompt(LONG["conversations"])
    assert said(record.messages[: record.prompt]) == said(theirs["prompt"]) == said(EARLIER)
    assert said(record.messages[record.prompt :]) == said(theirs["chosen"])
    assert said(record.rejected[record.prompt :]) == said(theirs["rejected"])


def test_answers_by_themselves(tmp_path):
    rows = [{"prompt": "q", "completion": "a", "label": True}, {"prompt": [USER], "completion": [BAD], "label": False}]
    found = list(records(write(tmp_path / "a.jsonl", rows), form="answers"))
    assert [(said(r.messages), r.label, r.prompt, r.shape) for r in found] == [
        (said([USER, GOOD]), True, 1, "unpaired"),
        (said([USER, BAD]), False, 1, "unpaired"),
    ]
    WRITERS["g.csv"](tmp_path / "b.csv", [row | {"prompt": "q", "completion": "a"} for row in rows])
    assert [record.label for record in records(tmp_path / "b.csv", form="answers")] == [True, False]
    (pair,) = records(write(tmp_path / "c.jsonl", [PAIRS["texts"]]), form="answers")
    assert pair.rejected is not None


BROKEN = [
    ("pairs", {"prompt": "q", "completion": "a", "label": True}, "are for --loss-type kto, or name them with --data.c"),
    ("pairs", {"text": "q"}, "expected an object with 'chosen' and 'rejected'; this has the columns text"),
    ("pairs", [1], "expected an object with 'chosen' and 'rejected', got [1]"),
    ("pairs", {"chosen": "a", "rejected": "b"}, "'prompt' must be a text or a list of messages that is not empty, got"),
    ("pairs", {"prompt": "", "chosen": "a", "rejected": "b"}, "'prompt' must be a text or a list"),
    ("pairs", {"prompt": "q", "chosen": "a", "rejected": None}, "must be two texts or two lists of messages, got"),
    ("pairs", {"prompt": "q", "chosen": "a", "rejected": [BAD]}, "must be two texts or two lists of messages, got"),
    ("pairs", {"prompt": "q", "chosen": "a", "rejected": "a"}, "are the same, which prefers nothing"),
    ("pairs", {"prompt": "q", "chosen": "a", "rejected": " "}, "rejected: message 1: the assistant's turn is empty"),
    ("pairs", {"prompt": [GOOD], "chosen": [GOOD], "rejected": [BAD]}, "chosen: message 0: role 'assistant' cannot"),
    ("pairs", {"prompt": [USER], "chosen": [GOOD], "rejected": [USER]}, "rejected: message 1: role 'user' cannot"),
    ("pairs", {"chosen": [USER, GOOD], "rejected": [GOOD]}, "have no first message in common; expected one prompt"),
    ("pairs", {"chosen": EARLIER[:3], "rejected": [*EARLIER, BAD]}, "differ in nothing but that one goes on; expected"),
    (
        "pairs",
        {"chosen": [EARLIER[0], USER, GOOD], "rejected": [EARLIER[0], USER | {"content": "p"}, BAD]},
        "chosen: it begins with role 'user' behind the prompt; an answer begins with 'assistant'",
    ),
    ("answers", {"prompt": "q", "completion": "a", "label": "good"}, "'label' must be true (a wanted completion) or"),
    ("answers", {"prompt": "q", "completion": "", "label": True}, "'prompt' and 'completion' must not be empty"),
    ("answers", {"prompt": "q", "completion": "a"}, "with 'chosen' and 'rejected', or 'prompt', 'completion' and 'lab"),
]


@pytest.mark.parametrize(("form", "row", "message"), BROKEN)
def test_a_bad_row_is_one_clear_error(tmp_path, form, row, message):
    good = [PAIRS["texts"], PAIRS["texts"]] if "chosen" in row else []
    with pytest.raises(ValueError, match=f"^{tmp_path}/a.jsonl:{len(good) + 1}: .*{re.escape(message)}"):
        list(records(write(tmp_path / "a.jsonl", [*good, row]), form=form))


def test_a_shape_that_is_not_of_this_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--data.type unpaired: this recipe and loss read preference"):
        list(records(write(tmp_path / "a.jsonl", [PAIRS["texts"]]), "unpaired", form="pairs"))
    with pytest.raises(ValueError, match="--data.type preference: this recipe and loss read messages, sharegpt"):
        list(records(write(tmp_path / "a.jsonl", [PAIRS["texts"]]), "preference"))


def test_all_answers_to_a_prompt_are_held_out_together(tmp_path):
    rows = [{"prompt": f"q{i % 40}", "completion": f"a{i}", "label": i % 3 > 0} for i in range(200)]
    found = list(records(write(tmp_path / "a.jsonl", rows), form="answers"))
    sides = [{r.messages[0]["content"] for r in found if Within(*part)(r)} for part in ((0, 0.4), (0.4, 1))]
    assert sides[0].isdisjoint(sides[1]) and len(sides[0] | sides[1]) == 40 and all(sides)


# masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["messages", "rejected"])
@pytest.mark.parametrize("row", [*PAIRS.values(), *LONG.values()], ids=str)
def test_only_tokens_of_the_answer_are_trained(tmp_path, row, which):
    """Those that transformers renders behind the prompt, of the assistant and up to the end of its turn."""
    (record,) = records(write(tmp_path / "a.jsonl", [row]), form="pairs")
    messages = getattr(record, which)
    ids, mask = TOKENIZER.encode_chat(messages, None, record.prompt)
    theirs = transformers.AutoTokenizer.from_pretrained(FOLDER)
    assert ids == theirs.apply_chat_template(messages)["input_ids"]
    prompt = theirs.apply_chat_template(messages[: record.prompt], add_generation_prompt=True)["input_ids"]
    assert ids[: len(prompt)] == prompt and mask.index(True) == len(prompt)
    trained = theirs.decode([i for i, m in zip(ids, mask, strict=True) if m])
    turns = [m["content"] for m in messages[record.prompt :] if m["role"] == "assistant"]
    assert trained == "".join(f"{text}{TOKENIZER.turn_ends[0]}" for text in turns)


# groups ----------------------------------------------------------------------------------------------------------


def record(answers, at, label=True) -> Record:
    """Make a record of which the ids say what they are: 100 at + 1, ..., the answer's from 100 at + 50 on."""
    given = [{"at": at, "prompt": p, "answer": n, "side": i} for i, (p, n) in enumerate(answers)]
    return Record(str(at), given[:1], None, None, "preference", 1, given[1:] or None, label)


def encode(r: Record):
    (one,) = r.messages
    prompt = [100 * one["at"] + i for i in range(one["prompt"])]
    answer = [100 * one["at"] + 50 + 20 * one["side"] + i for i in range(one["answer"])]
    return prompt + answer, [False] * len(prompt) + [True] * len(answer)


SIZE = st.integers(1, 12)
ANSWER = st.integers(1, 15)


@st.composite
def paired(draw):
    sizes = draw(st.lists(st.tuples(SIZE, ANSWER, ANSWER), min_size=1, max_size=14))
    return pairs([record([(p, a), (p, b)], at) for at, (p, a, b) in enumerate(sizes, 1)], encode)


@st.composite
def unpaired(draw):
    sizes = draw(st.lists(st.tuples(SIZE, ANSWER, st.booleans()), min_size=1, max_size=14))
    return couples([record([(p, a)], at, label) for at, (p, a, label) in enumerate(sizes, 1)], encode)


def found_in(batches):
    """Return (row of which batch, side, prompt, answer) of each sequence, in order; weights mark the answer."""
    found = []
    for number, batch in enumerate(batches):
        for row in range(len(batch["tokens"])):
            columns = {k: v[row].numpy() for k, v in batch.items()}
            ids = columns["segment_ids"]
            for segment in range(1, int(ids.max()) + 1):
                (here,) = np.nonzero(ids == segment)
                assert (np.diff(here) == 1).all() and (columns["positions"][here] == range(len(here))).all()
                whole = [int(columns["tokens"][here[0]]), *columns["targets"][here].tolist()]
                trained = [False, *(columns["weights"][here] != 0).tolist()]
                (side,) = set(columns["preferred"][here].tolist())
                prompt = tuple(x for x, m in zip(whole, trained, strict=True) if not m)
                answer = tuple(x for x, m in zip(whole, trained, strict=True) if m)
                found.append(((number, row), side, prompt, answer))
    return found


@settings(max_examples=60)
@given(
    docs=paired(), rows=st.integers(1, 3), seq_len=st.integers(8, 60), overlong=st.sampled_from(["truncate", "drop"]),
    packing=st.sampled_from(["first_fit", "best_fit", "none"]), seed=st.integers(0, 9),
)  # fmt: skip
def test_both_answers_of_a_pair_are_neighbours_in_a_row(docs, rows, seq_len, overlong, packing, seed):
    expected = Counter()
    for g in range(len(docs.groups) - 1):
        both = [docs[2 * g + i] for i in (0, 1)]
        inputs = [len(ids) - 1 for ids, _ in both]
        room = seq_len if sum(inputs) <= seq_len else seq_len // 2 if overlong == "truncate" else 0
        cut = [(ids[: room + 1].tolist(), mask[: room + 1]) for ids, mask in both]
        if room and all(mask[1:].any() for _, mask in cut):
            expected[tuple(tuple(ids) for ids, _ in cut)] += 1
    make = partial(Loader, docs, rows=rows, seq_len=seq_len, overlong=overlong, packing=packing, seed=seed, epochs=2)
    if not expected:
        with pytest.raises(ValueError, match="no document is left"):
            make()
        return
    loader = make()
    batches = list(loader)
    seen = found_in(batches)
    given_ = Counter()
    for chosen, rejected in zip(seen[::2], seen[1::2], strict=True):
        assert (chosen[0], chosen[1], rejected[1]) == (rejected[0], 1, -1) and chosen[2] == rejected[2]
        given_[chosen[2] + chosen[3], rejected[2] + rejected[3]] += 1
    assert given_ == Counter({k: 2 * n for k, n in expected.items()})
    for batch in batches:
        check_whole(batch)
        check_pairs(batch)
        assert batch["tokens"].shape[0] == rows and batch["segment_ids"].shape[1] <= seq_len
    stats = loader.stats
    assert (stats["pieces"], stats["seen_pieces"]) == (sum(expected.values()), 2 * sum(expected.values()))
    assert stats["seen_trained_tokens"] == sum(b["weights"].sum() for b in batches)
    assert loader.total_steps() == len(batches)


@settings(max_examples=40)
@given(docs=unpaired(), rows=st.integers(1, 3), seed=st.integers(0, 9))
def test_mismatched_answers_of_a_batch_are_its_own_to_other_prompts(docs, rows, seed):
    batches = list(Loader(docs, rows=rows, seq_len=120, overlong="drop", seed=seed, epochs=1))
    seen = found_in(batches)
    own = [x for x in seen if x[1] != 0]
    at = lambda ids: ids[0] // 100  # noqa: E731
    assert all(at(prompt) == at(answer) for _, _, prompt, answer in own)
    assert all(at(prompt) != at(answer) for _, side, prompt, answer in seen if side == 0)
    assert "pairs" not in batches[0] and len({(p, a) for _, _, p, a in own}) == len(own)
    for number in range(len(batches)):
        mine = [x for x in own if x[0][0] == number]
        others = [x for x in seen if x[0][0] == number and x[1] == 0]
        assert len(others) in (len(mine), len(mine) - 1)  # an odd one out
        assert {x[3] for x in others} <= {x[3] for x in mine} and {x[2] for x in others} <= {x[2] for x in mine}
        assert len({x[3] for x in others}) == len({x[2] for x in others}) == len(others)


def test_pairs_give_kto_each_answer_once_and_never_one_to_the_same_prompt():
    rows = [record([(2, 3), (2, 4)], at) for at in (1, 2, 3)]
    docs = couples(rows, encode)
    seen = found_in(Loader(docs, rows=2, seq_len=60, overlong="drop", epochs=1))
    assert Counter(side for _, side, *_ in seen) == {1: 3, -1: 3, 0: 6}
    assert all(prompt[0] // 100 != answer[0] // 100 for _, side, prompt, answer in seen if side == 0)
    alone = couples(rows[:1], encode)
    assert alone.preferred.tolist() == [1, -1] and np.diff(alone.groups).tolist() == [1, 1]


@settings(max_examples=30)
@given(docs=st.one_of(paired(), unpaired()), world=st.integers(1, 3), instant=st.integers(0, 4), seed=st.integers(0, 9))
def test_a_resumed_stream_of_groups_goes_on_bit_for_bit_on_every_number_of_ranks(docs, world, instant, seed):
    make = partial(Loader, docs, rows=2 * world, seq_len=110, overlong="drop", seed=seed)
    straight = list(islice(make(), 5))
    first = make()
    taken = list(islice(first, instant))
    ranks = [make(rank=rank, world=world) for rank in range(world)]
    for rank in ranks:
        rank.restore(json.loads(json.dumps(first.state())))
    parts = [list(islice(rank, 5 - instant)) for rank in ranks]
    rest = [{k: torch.cat([part[k] for part in found]) for k in found[0]} for found in zip(*parts, strict=True)]
    for a, b in zip(straight, taken + rest, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_groups_are_never_split():
    docs = pairs([record([(2, 3), (2, 4)], 1)], encode)
    with pytest.raises(ValueError, match="overlong is 'split'; for documents that stay together it is 'truncate' or"):
        Loader(docs, rows=1, seq_len=20)
    assert preference(MPO).whole_sequences


def test_lengths_are_those_of_the_rows():
    docs = pairs([record([(2, 3), (2, 4)], 1)], encode)
    (batch,) = Loader(docs, rows=1, seq_len=20, overlong="drop", epochs=1)
    assert batch["lengths"].tolist()[0][:9] == [3.0] * 4 + [4.0] * 5
    assert np.array_equal(lengths(batch["weights"].numpy(), batch["segment_ids"].numpy()), batch["lengths"].numpy())
    assert batch["pairs"].tolist()[0][:11] == [1] * 9 + [0] * 2


# cache -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pairs", "answers"])
def test_groups_come_back_from_the_cache_for_each_source(tmp_path, form):
    tasks.write_preferences(tmp_path, n_train=70, n_eval=5)
    of = [Source(str(tmp_path / f"{name}.jsonl")) for name in ("train", "eval")]
    rows = Rows(of, TOKENIZER, None, None, form)
    documents, counts = tokenized(rows, tmp_path / "cache")
    assert [count["preference"] for count in counts] == [70, 5]
    assert documents.units == [70, 5]  # of 2 n answers of n pairs come n groups of two own and two mismatched ones
    store = pairs if form == "pairs" else couples
    for i, (source, count) in enumerate(zip(of, documents.units, strict=True)):
        alone = list(records(source.path, form=form))
        runs = [store(alone[n : n + 64], lambda r: encoded(r, TOKENIZER, None)) for n in range(0, len(alone), 64)]
        part = documents.between(sum(documents.units[:i]), sum(documents.units[: i + 1]))
        assert len(part.groups) - 1 == count == sum(len(run.groups) - 1 for run in runs)
        assert np.array_equal(part.preferred, np.concatenate([run.preferred for run in runs]))
        found = [part[n] for n in range(len(part))]
        wanted = [run[n] for run in runs for n in range(len(run))]
        for (ids, mask), (its, theirs) in zip(found, wanted, strict=True):
            assert np.array_equal(ids, its) and np.array_equal(mask, theirs)
    again, _ = tokenized(rows, tmp_path / "cache", workers=2)
    assert again.folder == documents.folder and again.units == documents.units
    shares = [Share(n, 1.0 + i) for i, n in enumerate(documents.units)]
    loader = Loader(documents, rows=2, seq_len=256, overlong="drop", sources=shares, epochs=1)
    assert sum(1 for _ in loader) and loader.stats["seen_pieces"] == documents.units[0] + 2 * documents.units[1]


def test_wrong_answers_of_the_shipped_tasks_are_wrong_and_near(tmp_path):
    for path in tasks.write_preferences(tmp_path, n_train=300, n_eval=30):
        for row in map(json.loads, path.read_text().splitlines()):
            task, _ = tasks.parse({"messages": row["prompt"]})
            right, wrong = (row[name][0]["content"] for name in ("chosen", "rejected"))
            assert right == tasks.answer_of({"messages": row["prompt"]}) != wrong
            assert abs(int(right) - int(wrong)) in (1, 10) if task == "add" else sorted(wrong) == sorted(right)
