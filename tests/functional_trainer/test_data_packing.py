"""Documents, cutting, packing, loading: nothing is lost or doubled, and a resumed stream goes on bit for bit."""

import json
import math
import multiprocessing
import os
import signal
import time
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_trainer.data import STRATEGIES, Documents, Loader, Share
from functional_trainer.data.order import mixed
from functional_trainer.data.packing import Cursor, cut, fill, plan


@st.composite
def documents(draw, fewest=1, shortest=1):
    """Documents whose tokens are all different, so that a row says where each of its tokens comes from."""
    lengths = draw(st.lists(st.integers(shortest, 40), min_size=fewest, max_size=16))
    first = np.cumsum([1, *lengths])
    seed = draw(st.integers(0, 2**20))
    rng = np.random.default_rng(seed)
    return Documents.of(
        (range(start, start + n), rng.random(n) < 0.7) for start, n in zip(first[:-1].tolist(), lengths, strict=True)
    )


def whole(docs: Documents, overlong: str, seq_len: int) -> Counter:
    """Say, the slow way, which (inputs, targets, weights, positions) a pass over `docs` must give."""
    expected: Counter = Counter()
    for ids, mask in (docs[i] for i in range(len(docs))):
        ids, mask = ids.tolist(), mask.astype(float).tolist()
        rows = list(zip(ids[:-1], ids[1:], mask[1:], range(len(ids)), strict=False))
        chunks = [rows[i : i + seq_len] for i in range(0, len(rows), seq_len)]
        if len(chunks) > 1 and overlong != "split":
            chunks = chunks[:1] if overlong == "truncate" else []
        expected.update(tuple(chunk) for chunk in chunks if any(weight for _, _, weight, _ in chunk))
    return expected


def segments(batches) -> Counter:
    """Read the segments back out of batches."""
    found: Counter = Counter()
    for batch in batches:
        columns = [batch[name].tolist() for name in ("tokens", "targets", "weights", "positions", "segment_ids")]
        for row in zip(*columns, strict=True):
            cells = list(zip(*row, strict=True))
            ids = [cell[4] for cell in cells]
            used = [i for i in ids if i]
            assert used == sorted(used) and set(used) == set(range(1, max(used, default=0) + 1))
            assert ids == used + [0] * (len(ids) - len(used)), "padding comes last"
            assert all(cell[:4] == (0, 0, 0.0, 0) for cell in cells[len(used) :])
            found.update(tuple(c[:4] for c in cells if c[4] == segment) for segment in sorted(set(used)))
    return found


def same(a, b) -> bool:
    return set(a) == set(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@settings(max_examples=150)
@given(
    docs=documents(),
    rows=st.integers(1, 5),
    seq_len=st.integers(1, 45),
    packing=st.sampled_from(sorted(STRATEGIES)),
    overlong=st.sampled_from(["split", "truncate", "drop"]),
    epochs=st.integers(1, 3),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**70),
)
def test_rows_hold_exactly_the_documents(docs, rows, seq_len, packing, overlong, epochs, shuffle, seed):
    expected = whole(docs, overlong, seq_len)
    settings_ = dict(rows=rows, seq_len=seq_len, packing=packing, overlong=overlong, shuffle=shuffle, seed=seed)
    if not expected:
        with pytest.raises(ValueError, match="no document is left"):
            Loader(docs, epochs=epochs, **settings_)
        return
    loader = Loader(docs, epochs=epochs, **settings_)
    batches = list(loader)
    assert segments(batches) == Counter({piece: n * epochs for piece, n in expected.items()})
    for batch in batches:
        width = seq_len
        if packing == "none":  # one document a row, no wider than the longest needs
            assert batch["segment_ids"].max() == 1
            longest = (batch["segment_ids"] != 0).sum(1).max()
            width = next(w for w in (-(-seq_len // part) for part in (8, 4, 2, 1)) if w >= longest)
        assert {name: (x.dtype, tuple(x.shape)) for name, x in batch.items()} == {
            **{n: (torch.int64, (rows, width)) for n in ("tokens", "targets", "segment_ids", "positions")},
            "weights": (torch.float32, (rows, width)),
        }
    stats, per_epoch = loader.stats, sum(expected.values())
    assert (stats["pieces"], stats["seen_pieces"]) == (per_epoch, per_epoch * epochs)
    assert stats["tokens"] == sum(len(piece) * n for piece, n in expected.items())
    assert stats["seen_trained_tokens"] == sum(b["weights"].sum() for b in batches) == stats["trained_tokens"] * epochs
    places = sum(b["tokens"].numel() for b in batches)
    assert stats["padding"] == pytest.approx(sum((b["segment_ids"] == 0).sum().item() for b in batches) / places)
    long = sum(len(docs[i][0]) > seq_len + 1 for i in range(len(docs)))
    assert [stats[name] for name in ("split", "truncate", "drop")].count(0) >= 2 and stats[overlong] == long
    assert loader.total_steps() == len(batches) == stats["batches"]
    assert next(loader, None) is None


@settings(max_examples=100)
@given(
    docs=documents(fewest=8, shortest=10),
    rows=st.integers(1, 4),
    seq_len=st.integers(4, 25),
    packing=st.sampled_from(sorted(STRATEGIES)),
    epochs=st.sampled_from([None, 1, 3]),
    instants=st.lists(st.integers(0, 7), min_size=1, max_size=2),
)
def test_resumes_bit_for_bit(docs, rows, seq_len, packing, epochs, instants):
    def fresh():
        return Loader(docs, rows=rows, seq_len=seq_len, packing=packing, epochs=epochs, seed=5)

    if not whole(docs, "split", seq_len):
        return
    straight = fresh()
    expected = list(islice(straight, 8))
    for instant in instants:
        first = fresh()
        taken = list(islice(first, instant))
        second = fresh()
        list(islice(second, 3))  # whatever it did before is forgotten
        second.restore(json.loads(json.dumps(first.state())))
        assert second.stats == first.stats
        rest = list(islice(second, 8 - len(taken)))
        assert len(taken + rest) == len(expected)
        assert all(map(same, taken + rest, expected))
        assert second.state() == straight.state()


@settings(max_examples=60)
@given(
    docs=documents(fewest=8),
    world=st.integers(1, 4),
    each=st.integers(1, 3),
    packing=st.sampled_from(sorted(STRATEGIES)),
)
def test_ranks_share_one_stream(docs, world, each, packing):
    def run(rank, world):
        return list(Loader(docs, rows=rows, seq_len=40, packing=packing, epochs=2, rank=rank, world=world, seed=1))

    rows = world * each
    if not whole(docs, "split", 40):
        return
    ranks = [run(rank, world) for rank in range(world)]
    together = [{k: torch.cat([part[k] for part in parts]) for k in parts[0]} for parts in zip(*ranks, strict=True)]
    alone = run(0, 1)
    assert len(alone) == len(together) and all(map(same, alone, together))
    assert len(ranks[0][0]["tokens"]) == each


def documents_of(lengths):
    """Documents of the given lengths; token = document + 1, all trained."""
    return Documents.of(([i + 1] * n, [True] * n) for i, n in enumerate(lengths))


def test_endless_epochs_are_permutations_of_their_own():
    loader = Loader(documents_of([3] * 50), rows=1, seq_len=2, packing="none", seed=3)
    stream = [int(batch["tokens"][0, 0]) for batch in islice(loader, 200)]
    epochs = [stream[i : i + 50] for i in range(0, 200, 50)]
    assert all(sorted(epoch) == list(range(1, 51)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    again = Loader(documents_of([3] * 50), rows=1, seq_len=2, packing="none", seed=4)
    other = [int(batch["tokens"][0, 0]) for batch in islice(again, 200)]
    assert not {tuple(other[i : i + 50]) for i in range(0, 200, 50)} & set(map(tuple, epochs)), "seeds share no epoch"


def test_the_shuffle_is_pinned():
    """A checkpoint's stream must go on under any NumPy and Grain."""
    order = mixed([Share(7)], seed=3, shuffle=True)
    assert [order.piece(i) for i in range(14)] == [3, 6, 1, 4, 0, 2, 5, 2, 5, 4, 6, 3, 0, 1]
    many = mixed([Share(100_000)], seed=3, shuffle=True)
    assert [many.piece(i) for i in (0, 1, 99_999, 100_000)] == [73445, 85877, 27372, 23302]
    assert len({many.piece(i) for i in range(100_000)}) == 100_000


def test_unshuffled_keeps_the_files_order():
    loader = Loader(documents_of([3, 5, 4]), rows=2, seq_len=4, packing="first_fit", epochs=1, shuffle=False)
    assert [batch["tokens"][:, 0].tolist() for batch in loader] == [[1, 2], [3, 0]]
    assert next(loader, None) is None
    loader.reset()
    assert len(list(loader)) == 2 == loader.total_steps()


@pytest.mark.parametrize("shuffle", [True, False])
def test_without_packing_similar_lengths_come_together(shuffle):
    lengths = np.random.default_rng(0).integers(2, 130, 2000)
    loader = Loader(documents_of(lengths.tolist()), rows=8, seq_len=128, packing="none", epochs=1, shuffle=shuffle)
    batches = list(loader)
    spread = [np.ptp(batch["segment_ids"].sum(1).numpy()) for batch in batches]
    assert np.median(spread) < 12 and loader.stats["padding"] < 0.3  # drawn at random: 107, and 49 % padding
    assert {batch["tokens"].shape[1] for batch in batches} == {16, 32, 64, 128}
    assert len(batches) == 250 and sum(int((b["segment_ids"][:, 0] != 0).sum()) for b in batches) == 2000
    widths = [batch["tokens"].shape[1] for batch in batches[:32]]
    assert (widths != sorted(widths)) == shuffle  # the first window's batches


def test_first_fit_and_best_fit_choose_different_rows():
    lengths = [5, 6, 2]

    def table(name):
        return plan(Cursor(), 3, lengths.__getitem__, 2, 8, STRATEGIES[name])[0]

    assert table("first_fit") == [[0, 2], [1]]
    assert table("best_fit") == [[0], [1, 2]]
    assert table("none") == [[0], [1]]


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=60),
    rows=st.integers(1, 3),
    name=st.sampled_from(sorted(STRATEGIES)),
    lookahead=st.integers(1, 5),
)
def test_packing_is_lossless_fair_and_within_rows(lengths, rows, name, lookahead):
    cursor, seen, batches = Cursor(), [], 0
    while cursor.held or cursor.next < len(lengths):
        oldest = min([*cursor.held, cursor.next])
        table, cursor = plan(cursor, len(lengths), lengths.__getitem__, rows, 9, STRATEGIES[name], lookahead)
        assert table[0][0] == oldest, "none is passed over for ever"
        assert all(sum(lengths[i] for i in row) <= 9 for row in table)
        assert len(cursor.held) <= lookahead
        seen += [i for row in table for i in row]
        batches += 1
        assert batches <= len(lengths)
    assert sorted(seen) == list(range(len(lengths)))


def test_packing_wastes_little():
    rng = np.random.default_rng(0)
    docs = documents_of(rng.integers(6, 62, 3000).tolist())
    loaders = {name: Loader(docs, rows=8, seq_len=128, packing=name, epochs=None) for name in STRATEGIES}
    for loader in loaders.values():
        list(islice(loader, 60))
    padding = {name: loader.stats["padding"] for name, loader in loaders.items()}
    assert padding["first_fit"] < 0.02 and padding["best_fit"] < 0.02 < 0.25 < padding["none"]


def test_split_pieces_continue_positions_and_train_every_target_once():
    docs = Documents.of([(range(10, 21), [False] * 3 + [True] * 8)])
    pieces = cut(docs, 4, "split")
    batch = fill(docs, pieces, [[0], [1], [2]], 4)
    assert batch["tokens"].tolist() == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19, 0, 0]]
    assert batch["targets"].tolist() == [[11, 12, 13, 14], [15, 16, 17, 18], [19, 20, 0, 0]]
    assert batch["weights"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1] * 4, [1] * 4, [1, 1, 0, 0]]


def test_untrained_pieces_are_left_out_and_counted():
    docs = Documents.of([(range(9), [False] * 6 + [True] * 3), (range(5), [False] * 5), ([7], [True])])
    assert cut(docs, 4, "split").stats == {
        **{"documents": 3, "pieces": 1, "tokens": 4, "trained_tokens": 3, "split": 1, "truncate": 0, "drop": 0},
        "untrained": 3,
    }
    assert cut(docs, 4, "truncate").stats["untrained"] == 3
    assert cut(docs, 4, "drop").stats == {
        **{"documents": 3, "pieces": 0, "tokens": 0, "trained_tokens": 0, "split": 0, "truncate": 0, "drop": 1},
        "untrained": 2,
    }


def test_storage_is_flat_and_small():
    docs = documents_of([3, 2])
    assert (docs.tokens.dtype, docs.mask.dtype, docs.offsets.tolist()) == (np.int32, np.bool_, [0, 3, 5])
    with pytest.raises(ValueError, match="document 0 has 2 ids but 1"):
        Documents.of([([1, 2], [True])])


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(rows=3, world=2), r"rows \(3\) cannot be shared equally by 2 ranks"),
        (dict(rows=0), "rows is 0"),
        (dict(seq_len=0), "seq_len is 0"),
        (dict(epochs=0), "epochs is 0"),
        (dict(rank=1), "rank is 1; with world 1"),
        (dict(seed=-1), "seed is -1"),
        (dict(packing="tight"), "packing is 'tight'; it can be one of first_fit, best_fit, none"),
        (dict(overlong="wrap"), "overlong is 'wrap'"),
    ],
)
def test_wrong_settings_say_what_would_be_right(wrong, message):
    with pytest.raises(ValueError, match=message):
        Loader(documents_of([3, 3]), **(dict(rows=2, seq_len=4) | wrong))


def test_resume_refuses_another_stream():
    loader = Loader(documents_of([3, 3]), rows=2, seq_len=4)
    next(loader)
    state = loader.state()
    with pytest.raises(ValueError, match="seq_len was 4, is 5"):
        Loader(documents_of([3, 3]), rows=2, seq_len=5).restore(state)
    with pytest.raises(ValueError, match="content was '2 documents"):
        Loader(documents_of([3, 4]), rows=2, seq_len=4).restore(state)
    with pytest.raises(ValueError, match="endless"):
        loader.total_steps()


# several sources ------------------------------------------------------------------------------------------------------


SHARES = st.builds(
    Share, st.integers(1, 9), st.sampled_from([0.3, 0.5, 1.0, 1.5, 3.0]), st.sampled_from([math.inf, 1.0, 2.5, 0.5])
)


@given(st.lists(SHARES, min_size=1, max_size=4), st.integers(1, 5), st.booleans(), st.integers(0, 99))
@settings(max_examples=100)
def test_sources_are_seen_as_often_as_they_weigh(shares, epochs, shuffle, seed):
    """Each gives round(weight * size) pieces an epoch, the next of its permutations, until its passes are over."""
    order = mixed(shares, seed, shuffle)
    first = np.cumsum([0, *(share.size for share in shares)])
    drawn: list[list[int]] = [[] for _ in shares]
    for epoch in range(epochs):
        here = [order.piece(i) for i in range(order.begin(epoch), int(min(order.begin(epoch + 1), order.end)))]
        for i, share in enumerate(shares):
            own = [p - first[i] for p in here if first[i] <= p < first[i + 1]]
            take = max(1, round(share.weight * share.size))
            most = share.passes if math.isinf(share.passes) else max(1, round(share.passes * share.size))
            assert len(own) == max(0, min(take, most - epoch * take))
            drawn[i] += own
    assert order.end == (order.begin(50) if all(share.passes < 9 for share in shares) else math.inf)
    for share, own in zip(shares, drawn, strict=True):
        counts = Counter(own)
        often = set(counts.values()) | ({0} if len(counts) < share.size else set())
        assert max(often) - min(often) <= 1, "none is seen again before all others were"


def test_a_run_of_limited_passes_ends():
    loader = Loader(documents_of([3] * 8), rows=1, seq_len=2, sources=[Share(5, 1.0, 2), Share(3, 2.0, 1.0)])
    assert Counter(int(batch["tokens"][0, 0]) for batch in loader) == {1: 2, 2: 2, 3: 2, 4: 2, 5: 2, 6: 1, 7: 1, 8: 1}
    assert loader.total_steps() == 13


def load_for_ever(pids) -> None:
    """Say which worker processes there are, and wait."""
    loader = Loader(documents_of([3] * 50), rows=1, seq_len=2, workers=2)
    next(loader)
    pids.put([child.pid for child in multiprocessing.active_children()])
    time.sleep(60)


def test_workers_do_not_outlive_a_killed_process():
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=load_for_ever, args=(pids := context.Queue(),))
    process.start()
    workers = pids.get(timeout=60)
    process.kill()
    process.join()
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert len(workers) == 2 and not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def test_a_stop_of_the_whole_job_leaves_the_loader_working():
    """SIGTERM to every process of the job: the parent finishes its step and saves, and may still take a batch."""
    loader = Loader(documents_of([3] * 50), rows=1, seq_len=2, workers=2)
    next(loader)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGTERM)
        os.kill(child.pid, signal.SIGINT)
    time.sleep(0.2)
    assert sum(1 for _ in islice(loader, 20)) == 20
    loader.close()


def test_workers_change_nothing():
    docs = documents_of(np.random.default_rng(0).integers(2, 20, 60).tolist())
    make = partial(Loader, docs, rows=2, seq_len=16, packing="best_fit", epochs=2, sources=[Share(40), Share(20, 0.5)])
    alone = list(make())
    loader = make(workers=2)
    begun = [next(loader) for _ in range(5)]
    state = json.loads(json.dumps(loader.state()))
    for other in (loader, make(workers=3)):  # from the middle, with another number of them
        other.restore(state)
        assert all(map(same, begun + list(other), alone)) and other.stats["batches"] == len(alone)
        other.close()


def test_a_weighted_stream_resumes_and_changes_with_the_seed():
    docs = documents_of([3, 5, 4, 6, 2, 3, 7, 4])
    make = lambda **options: Loader(  # noqa: E731
        docs, **(dict(rows=2, seq_len=8, sources=[Share(5, 0.4), Share(3, 2.0)], seed=1) | options)
    )
    whole = [next(loader) for loader in [make()] for _ in range(9)]
    loader = make()
    for _ in range(4):
        next(loader)
    other = make()
    other.restore(json.loads(json.dumps(loader.state())))
    assert all(same(next(other), batch) for batch in whole[4:])
    assert not all(same(a, b) for a, b in zip(whole, make(seed=2), strict=False))
    once = make(epochs=1)
    assert sum(int((batch["positions"] == 0).sum() - (batch["segment_ids"] == 0).sum()) for batch in once) == 2 + 6
    for other in ([Share(5, 0.5), Share(3, 2.0)], [Share(5, 0.4), Share(3, 2.0, 9)], ()):
        with pytest.raises(ValueError, match="cannot resume the data stream: sources was"):
            make(sources=other).restore(loader.state())


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([Share(1)], "the sources have 1 documents, the data 2"),
        ([Share(1), Share(1, 0.0)], "source 2 of 2 has weight 0"),
        ([Share(1, math.nan), Share(1)], "source 1 of 2 has weight nan"),
        ([Share(1, 1.0, 0), Share(1)], "source 1 of 2 has weight 1.0 and 0 passes"),
        ([Share(2), Share(0)], "source 2 of 2 has no "),
    ],
)  # fmt: skip
def test_bad_sources_are_named(sources, message):
    with pytest.raises(ValueError, match=message):
        Loader(documents_of([3, 3]), rows=1, seq_len=4, sources=sources)
