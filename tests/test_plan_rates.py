"""The grid of rates around the rule's."""

import math

from ctsft.plan.rates import MOST, best_of, raced


def valley(best):
    """A loss that is lowest at the rate `best`, and what was asked of it."""
    asked = []
    return lambda lr: (asked.append(lr), abs(math.log(lr / best)))[1], asked


def test_three_races_are_enough_where_the_rule_is_right():
    loss, asked = valley(0.1)
    assert [lr for lr, _ in raced(0.1, loss)] == [0.033, 0.1, 0.3] == sorted(asked)


def test_the_grid_grows_to_both_sides_until_its_best_is_inside():
    for best, rates in ((0.9, [0.033, 0.1, 0.3, 0.9, 2.7]), (0.011, [0.0037, 0.011, 0.033, 0.1, 0.3])):
        loss, asked = valley(best)
        tried = raced(0.1, loss)
        assert [lr for lr, _ in tried] == rates and best_of(tried) == best
        assert len(asked) == len(set(asked)) == len(rates)


def test_it_does_not_grow_for_ever():
    assert len(raced(0.1, lambda lr: -lr)) == MOST == len(raced(0.1, lambda lr: lr))


def test_where_rates_diverge_smaller_ones_are_tried():
    tried = raced(0.1, lambda lr: 1 / lr if lr < 0.02 else math.inf)
    assert best_of(tried) == 0.011
    assert [math.isinf(loss) for lr, loss in tried if lr > 0.02] == [True] * 3
    assert best_of([(1.0, math.inf), (0.1, math.inf)]) == 0.1
