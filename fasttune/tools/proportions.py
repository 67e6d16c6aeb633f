"""Shares of right answers: an interval for one, for the difference of two on the same problems, and a test of it.

No library of the stacks has them; tests/test_proportions.py holds them against the figures of scipy and statsmodels.
"""

import math
from collections.abc import Sequence

from fasttune import metrics

Estimate = tuple[float, float, float]  # value, and the ends of its 95 % interval


def share(right: int, problems: int) -> Estimate:
    """A share with Wilson's interval; for at least one problem."""
    return right / problems, *metrics.wilson(right, problems)


def difference(both: int, only_first: int, only_second: int, neither: int) -> Estimate:
    """The first share less the second, of the same problems, with Newcombe's square-and-add interval (method 10).

    The counts are problems that both answered right, only one of the two, or neither; at least one in all.
    Source: R. G. Newcombe, Improved confidence intervals for the difference between binomial proportions based on
    paired data, Statistics in Medicine 17 (1998) 2635–2650.
    """
    problems = both + only_first + only_second + neither
    first, low_1, high_1 = share(both + only_first, problems)
    second, low_2, high_2 = share(both + only_second, problems)
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    agreement = float(both * neither - only_first * only_second)
    if agreement > 0:  # the correction for continuity, on this side only
        agreement = max(0.0, agreement - problems / 2)
    correlation = agreement / math.sqrt(margins) if margins else 0.0
    value = (only_first - only_second) / problems
    below, above = (first - low_1, high_2 - second), (high_1 - first, second - low_2)
    return value, value - _added(*below, correlation), value + _added(*above, correlation)


def _added(a: float, b: float, correlation: float) -> float:
    return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact test, two-sided: p of a split as uneven as this, were each of these problems a fair coin.

    Source: Q. McNemar, Note on the sampling error of the difference between correlated proportions or percentages,
    Psychometrika 12 (1947). Exact is cautious: Fagerland et al., https://doi.org/10.1186/1471-2288-13-91
    """
    unlike = only_first + only_second
    term = tail = 1
    for k in range(min(only_first, only_second)):
        term = term * (unlike - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**unlike)  # whole numbers of any length, so that none is rounded before


def holm(ps: Sequence[float]) -> list[float]:
    """Each p as it stands after so many tests, in the order given: below 0.05 in error at most once in 20 families.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statistics 6 (1979).
    """
    adjusted, largest = [1.0] * len(ps), 0.0
    for tried, at in enumerate(sorted(range(len(ps)), key=lambda at: ps[at])):
        largest = max(largest, min(1.0, (len(ps) - tried) * ps[at]))
        adjusted[at] = largest
    return adjusted


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates, each of the same weight; its interval from theirs (MOVER).

    Source: G. Y. Zou and A. Donner, Construction of confidence limits about effect measures: a general approach,
    Statistics in Medicine 27 (2008) 1693–1702.
    """
    count = len(estimates)
    value = sum(each for each, _, _ in estimates) / count
    below = math.sqrt(sum((each - low) ** 2 for each, low, _ in estimates)) / count
    above = math.sqrt(sum((high - each) ** 2 for each, _, high in estimates)) / count
    return value, value - below, value + above
