"""Rollouts on several ranks: the answers of one, drawn ahead by all of them; an error of one ends all at once."""

from contextlib import closing

import pytest

from tests.functional_trainer import servers
from tests.multi_rank import launch, rollouts

FUNCTIONS = """
def forgetful(prompts, answer, **columns):
    return [1.0 for _ in answer]
"""


def test_what_rank_0_cannot_reward_ends_the_others_too(tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    (ours, ours_s), (theirs, theirs_s) = launch.run(2, rollouts.rewarded, str(tmp_path), "forgetful")
    assert ours.startswith("ValueError: reward function forgetful cannot be called with")
    assert theirs.startswith("ValueError: rank 0: ValueError: reward function forgetful cannot be called with")
    assert max(ours_s, theirs_s) < 10


@pytest.mark.parametrize(("level", "budget"), [(1, 0), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_ranks_draw_ahead_what_one_draws(level, budget):
    many, versions, said = launch.run(2, rollouts.drawn, level, budget, 5, -1)
    assert versions[0] == versions[1] and not said.strip(" |")
    if level == 1:
        alone, *_ = launch.run(1, rollouts.drawn, level, budget, 5, -1)
        assert many == alone
    else:
        assert len({v for _, of in many for v in of}) > 2


@pytest.mark.slow
def test_an_engine_that_fails_on_one_rank_ends_all():
    answers, _, said = launch.run(2, rollouts.drawn, 1, 0, 9, 2)
    ours, theirs = said.split(" | ")
    assert len(answers) == 2 * 6  # rollouts 0 and 1 are trained on
    assert ours == f"RuntimeError: rank 1: {theirs}" and theirs.startswith("TypeError: 'NoneType'")


@pytest.mark.slow
def test_ranks_send_weights_while_servers_answer_all_of_them():
    """The thread that trains sends, and the one that draws exchanges answers, on every rank at its own pace."""
    model = rollouts.MODEL
    with closing(servers.Vllm(model, model.init(0))) as one, closing(servers.Vllm(model, model.init(0))) as other:
        ours, theirs = launch.run(2, rollouts.in_flight, [one.url, other.url], 12)
        assert ours == theirs and set(ours) <= {0, 1, 2, 3}
        assert min(server.paths.count("/update_weight_version") for server in (one, other)) == 12
