from __future__ import annotations

from collections.abc import Callable, Sequence

import numba
import numpy as np
import pytest

from disaggserve import dispatch


@pytest.mark.parametrize("choose", [dispatch.choose_prefill, dispatch.choose_decode])
@pytest.mark.parametrize(
    ("loads", "chosen"), [([7], 0), ([3, 2, 1], 2), ([1, 2, 3], 0), ([5, 4, 9, 4], 1), ([0, 0, 0], 0)]
)
def test_the_least_loaded_is_chosen_and_ties_go_to_the_lowest_index(
    choose: Callable[[Sequence[int]], int], loads: list[int], chosen: int
) -> None:
    assert choose(loads) == chosen
    assert choose(tuple(loads)) == chosen
    assert choose(np.array(loads)) == chosen  # type: ignore[arg-type]


def test_tokens_weigh_what_they_take() -> None:
    assert dispatch.choose_prefill([10, 15], [2, 1]) == 1
    assert dispatch.choose_prefill([10, 20], [2, 1]) == 0
    assert dispatch.choose_prefill([0, 0], [2, 1]) == 0


def test_a_cached_beginning_is_worth_its_length_and_no_more() -> None:
    def choose(queued: list[int], uncached: list[int]) -> int:
        return dispatch.choose_prefill(dispatch.until_first_token(queued, uncached))

    assert choose([50, 0], [10, 59]) == 1
    assert choose([50, 0], [10, 60]) == 0  # a tie
    assert choose([50, 0], [10, 61]) == 0
    assert choose([7, 3], [5, 5]) == dispatch.choose_prefill([7, 3])


def test_the_kernel_can_compile_it() -> None:
    compiled = numba.njit(dispatch.until_first_token)
    assert compiled(np.array([50, 0]), np.array([10, 59])) == [60, 59]
