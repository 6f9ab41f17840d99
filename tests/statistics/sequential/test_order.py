"""An order of the norms that no batch contradicts; what cannot be ordered is named."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from batchnorm.statistics.sequential.order import order_of


def test_ways_are_put_into_one_order() -> None:
    assert order_of([]) == ([], set())
    assert order_of([[], ["a"], []]) == (["a"], set())
    assert order_of([["b", "c"], ["a", "b"]]) == (["a", "b", "c"], set())


def test_two_norms_that_are_met_in_both_orders_cannot_both_be_ordered() -> None:
    order, without = order_of([["a", "b", "z"], ["b", "a", "z"]])
    assert len(without) == 1
    assert sorted([*order, *without]) == ["a", "b", "z"]
    assert order[-1] == "z"


def test_a_norm_that_is_met_twice_has_no_place_and_those_between_have() -> None:
    assert order_of([["a", "b", "a", "c"], ["c", "d"]]) == (["b", "c", "d"], {"a"})
    assert order_of([["a", "a"]]) == ([], {"a"})


@given(st.lists(st.lists(st.sampled_from("abcdef"), max_size=6), max_size=5))
def test_nobody_contradicts_the_order_and_nobody_is_lost(ways: list[list[str]]) -> None:
    order, without = order_of(ways)
    place = {site: i for i, site in enumerate(order)}
    assert place.keys() | without == {site for way in ways for site in way}
    assert not place.keys() & without
    for way in ways:
        places = [place[site] for site in way if site in place]
        assert places == sorted(set(places))
