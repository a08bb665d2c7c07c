from __future__ import annotations

from collections.abc import Callable, Sequence

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
