"""A table of one's own trains as the shipped one does, and a wrong one is refused before anything begins."""

import pytest

from tests.experiments import sft_runs

HEAD = "from sharding_rules import P, qwen3_moe, zero\n\n"
WHOLE = "RULES = qwen3_moe.RULES.change({r'params/layers/\\w+/moe/router': P(None, None)})\n"
WRONG = """\
MINE = qwen3_moe.RULES.change({
    r'params/layers/\\w+/attn/q': P(None, None, zero('fsdp')),
})
MINE = type(MINE)((*MINE.table, ('params/none', P(None))))
"""


@pytest.fixture
def run(tmp_path):
    sft_runs.folder(tmp_path / "model")
    sft_runs.chats(tmp_path / "chats.jsonl", 20)
    (tmp_path / "mine.py").write_text(HEAD + WHOLE)
    (tmp_path / "wrong.py").write_text(HEAD + WRONG)
    sizes = ("--steps", 3, "--batch", 4, "--data.seq-len", 64, "--compile", "off", "--dtype", "float64")
    return ("--model.path", "model", "--data.train", "chats.jsonl", *sizes)


def test_a_table_of_ones_own_trains(run, tmp_path):
    mesh = ("--mesh.fsdp", 1, "--mesh.tp", 2)
    sft_runs.run_ranks(tmp_path, 2, *run, *mesh, "--out", "shipped")
    sft_runs.run_ranks(tmp_path, 2, *run, *mesh, "--out", "mine", "--rules", "mine.py")
    ours, theirs = ([row["loss"] for row in sft_runs.rows(tmp_path / out)] for out in ("mine", "shipped"))
    assert ours == pytest.approx(theirs, rel=1e-9) and len(ours) == 3


def test_a_wrong_one_is_refused_with_all_that_is_wrong(run, tmp_path):
    ranks = sft_runs.start_ranks(tmp_path, 2, *run, "--mesh.fsdp", 1, "--mesh.tp", 2, "--rules", "wrong.py:MINE")
    assert [rank.wait() for rank in ranks] == [1, 1]
    said = ranks[0].output
    assert "error: --rules wrong.py:MINE: " in said and "Traceback" not in said
    for kind in ("dead: the table", "maths: act/heads"):
        assert kind in said, said
    output = sft_runs.run(tmp_path, *run, "--rules", "wrong.py:MINE", status=1)  # what is wrong on any mesh
    assert "dead: the table" in output and "1 problem(s)" in output
