from __future__ import annotations

import pytest

from loraplus.bench.timing import ratio, spread, take_turns


def test_arms_take_turns_and_each_round_begins_with_the_next():
    order = []
    arms = {name: (lambda name=name: float(order.append(name) or 1)) for name in "abc"}
    take_turns(arms, seconds=0, least=3)
    assert "".join(order) == "abcbcacab"


def test_no_round_begins_after_the_time_unless_too_few_were_done():
    assert len(take_turns({"a": lambda: 1.0}, seconds=0, least=2)["a"]) == 2
    assert len(take_turns({"a": lambda: 1.0}, seconds=60, rounds=7)["a"]) == 7


def test_a_ratio_within_rounds_is_not_moved_by_a_machine_that_slows_down():
    drift = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    found = ratio([2 * seconds for seconds in drift], drift)
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)


def test_the_interval_holds_the_ratio_and_widens_with_the_noise():
    noisy = ratio([2.0, 1.0, 3.0, 2.5, 1.5], [1.0, 1.2, 0.8, 1.1, 0.9])
    assert noisy.low < noisy.value < noisy.high


def test_one_value_is_its_own_spread():
    assert spread([3.0]).to_dict() == {"median": 3.0, "quartile_1": 3.0, "quartile_3": 3.0, "values": 1}


def test_arms_of_unequal_rounds_have_no_ratio():
    with pytest.raises(ValueError):
        ratio([1.0], [1.0, 2.0])
