"""Intervals and tests of shares of right answers: the figures that were published, and what must hold of any."""

import pytest
from hypothesis import given, strategies as st

from fasttune.tools import proportions

COUNTS = st.tuples(*[st.integers(0, 300)] * 4).filter(any)


@pytest.mark.parametrize(
    ("right", "problems", "low", "high"),
    [  # the examples of Newcombe, Statistics in Medicine 17 (1998) 857–872, method 3; and its mirror
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_interval_of_a_share_as_published(right: int, problems: int, low: float, high: float) -> None:
    share, *ends = proportions.share(right, problems)
    assert share == right / problems and ends == pytest.approx([low, high], abs=5e-5)


def test_interval_at_none_and_all_ends_there_exactly() -> None:
    for problems in range(1, 200):
        assert proportions.share(0, problems)[1] == 0 < proportions.share(0, problems)[2]
        assert proportions.share(problems, problems)[1] < 1 == proportions.share(problems, problems)[2]


@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [
        # complete response (Cavo et al. 2012), as the tests of R's contingencytables have it
        ((59, 6, 16, 80), -0.1186, -0.0046),
        # airways (Bentur et al. 2009), by hand: the correction takes all of the correlation away
        ((1, 1, 7, 12), -0.5069, -0.0256),
        # by hand: the correlation is −1 and not corrected, so that the ends of Wilson's intervals are added
        ((0, 5, 5, 0), -0.5268, 0.5268),
        # by hand, with nothing alike or nothing unlike: the ends of Wilson's intervals, squared and added
        ((0, 0, 0, 10), -0.2775, 0.2775),
        ((20, 0, 0, 22), -0.0448, 0.0448),
    ],
)
def test_interval_of_a_difference_as_published(cells: tuple[int, int, int, int], low: float, high: float) -> None:
    value, *ends = proportions.difference(*cells)
    assert value == pytest.approx((cells[1] - cells[2]) / sum(cells))
    assert ends == pytest.approx([low, high], abs=5e-5)


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [
        (1, 7, 0.0703125),  # Fagerland et al. 2013, https://doi.org/10.1186/1471-2288-13-91
        (12, 2, 0.012939453125),  # Armitage and Berry 1994, p. 127: 0.0129
        (6, 16, 0.052478790283203125),  # these and below: statsmodels 0.15.0, mcnemar(exact=True)
        (150, 86, 3.7159361395713866e-05),
        (6000, 5000, 1.5489950994864605e-21),  # scipy 1.17.1, binomtest
        (5, 5, 1.0),
        (5, 0, 0.0625),  # the least that five can give
        (0, 0, 1.0),
    ],
)
def test_mcnemar_as_published(only_first: int, only_second: int, p: float) -> None:
    assert proportions.mcnemar(only_first, only_second) == pytest.approx(p, rel=1e-10)
    assert proportions.mcnemar(only_second, only_first) == proportions.mcnemar(only_first, only_second)


def test_holm_as_statsmodels_has_it() -> None:
    """statsmodels 0.15.0: multipletests([...], method="holm")."""
    assert proportions.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert proportions.holm([0.0, 1.0, 0.5]) == [0.0, 1.0, 1.0]
    assert proportions.holm([0.04]) == [0.04]


def test_interval_of_a_mean_as_published() -> None:
    """56 of 70 less 48 of 80, which is twice a mean: Newcombe, Statistics in Medicine 17 (1998) 873–890, method 10."""
    first, (second, low, high) = proportions.share(56, 70), proportions.share(48, 80)
    found = proportions.mean([first, (-second, -high, -low)])
    assert [2 * each for each in found] == pytest.approx([0.2, 0.0524, 0.3339], abs=5e-5)


@given(COUNTS)
def test_a_difference_has_its_sign_and_lies_in_its_interval(cells: tuple[int, int, int, int]) -> None:
    both, first, second, neither = cells
    value, low, high = proportions.difference(*cells)
    assert -1 <= low <= value <= high <= 1
    mirrored = proportions.difference(both, second, first, neither)
    assert mirrored == pytest.approx((-value, -high, -low), abs=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_never_lowers_a_p_and_keeps_their_order(ps: list[float]) -> None:
    found = proportions.holm(ps)
    assert all(q >= p for p, q in zip(ps, found, strict=True))
    order = sorted(range(len(ps)), key=lambda at: ps[at])
    assert [found[at] for at in order] == sorted(found) and min(found) <= min(1, min(ps) * len(ps))
