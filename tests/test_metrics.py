"""The formulas behind the printed numbers, against numbers worked out by hand."""

import pytest

from fasttune import metrics
from fasttune.metrics import StepMetrics


def step(number: int, seconds: float, tokens: int = 100) -> StepMetrics:
    return StepMetrics(number, 1.0, 1e-4, 1.0, tokens, tokens, tokens // 2, 7, seconds, tokens / seconds, 1.0)


def test_the_median_leaves_warm_up_out() -> None:
    steps = [step(1, 100.0), step(2, 50.0), step(3, 20.0), *(step(n, 2.0) for n in range(4, 9))]
    assert metrics.median_rate(steps) == 50.0
    assert metrics.median_rate(steps, "loss_tokens") == 25.0
    assert len(metrics.steady(steps)) == 5


def test_a_very_short_run_leaves_the_first_step_out_and_one_step_says_nothing() -> None:
    assert metrics.median_rate([step(1, 100.0), step(2, 2.0)]) == 50.0
    assert metrics.median_rate([step(1, 1.0)]) is None
    assert metrics.median_rate([]) is None


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),  # table I of https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_of_a_share_is_wilsons(right: int, count: int, low: float, high: float) -> None:
    assert metrics.wilson(right, count) == pytest.approx((low, high), abs=5e-5)
    assert metrics.wilson(count - right, count) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_full_fine_tuning_is_six_n_and_lora_about_four() -> None:
    # 10 weights of which all / 2 are trained; no attention, no head
    full = metrics.count_flops(10, 10, 0, True, layers=0, attention_width=0)
    lora = metrics.count_flops(10, 2, 0, False, layers=0, attention_width=0)
    assert (full.body, lora.body) == (60, 44)


def test_the_head_counts_only_where_there_is_a_label() -> None:
    flops = metrics.count_flops(10, 0, head_weights=5, head_trained=False, layers=0, attention_width=0)
    assert flops.of_step(computed_tokens=100, loss_tokens=0, mean_length=100) == 100 * 40
    assert flops.of_step(computed_tokens=100, loss_tokens=30, mean_length=100) == 100 * 40 + 30 * 5 * 2 * 2


def test_causal_attention_of_one_row() -> None:
    # forward: QK^T and PV, 2·T²·width each, halved by the causal mask; backward twice that; per layer
    flops = metrics.count_flops(0, 0, 0, False, layers=3, attention_width=8)
    length = 64
    assert (
        flops.of_step(computed_tokens=length, loss_tokens=0, mean_length=length) == 3 * (2 * 2 * length**2 * 8 / 2) * 3
    )
    assert flops.of_step(computed_tokens=4 * length, loss_tokens=0, mean_length=length) == pytest.approx(
        4 * flops.of_step(computed_tokens=length, loss_tokens=0, mean_length=length)
    )
