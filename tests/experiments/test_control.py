"""The control of rewards: a group keeps its numbers, and answers get others."""

from experiments.first_light.control import shuffled
from functional_trainer.rewards import exact


def test_each_group_keeps_its_rewards_in_another_order():
    prompts = ["a"] * 8 + ["b"] * 8 + ["c"] * 4
    answer = ["1"] * 20
    completions = ["1", "2"] * 8 + ["1"] * 4
    given, true = shuffled(prompts, completions, answer), exact(completions, answer)
    for group in (slice(0, 8), slice(8, 16), slice(16, 20)):
        assert sorted(given[group]) == sorted(true[group])
    assert given != true and given == shuffled(prompts, completions, answer)
