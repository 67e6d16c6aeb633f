"""What several GPUs make of a run, for its plan: tokens of each rank, bytes they exchange, the efficiency to expect.

One exchange a step, after backward and not beside it: a step takes as long as its slowest rank and then the exchange.
"""

import statistics
from dataclasses import dataclass

from fasttune.config import Config
from fasttune.core.autoconfig import Plan
from fasttune.data.batching import Batches
from fasttune.metrics import Forecast

SAMPLED_STEPS = 50
# GB/s that a GPU gets in an all-reduce. NVLink 4 after the protocol's overhead, as an author of NCCL has it:
# https://github.com/NVIDIA/nccl-tests/issues/212 (NVLink SHARP makes up to 480 of it).
NVLINK_GB_S = 370.0
NETWORK_GBIT_S = {"400 Gbit/s a GPU": 400.0, "100 Gbit/s a machine": 100.0}
NETWORK_SHARE = 0.8  # of the line rate: assumed, as NVLink's is
EXCHANGE_MS = 0.5  # before a byte is sent, and for what the ranks tell each other: a guess


@dataclass(frozen=True)
class Scaling:
    """Means over the first steps. efficiency: of `ranks` times one GPU's speed, by what connects them."""

    ranks: int
    nodes: int
    tokens_a_rank: float  # computed in a step
    most_tokens: float  # of its fullest rank
    exchanged_mb: float  # sent by each rank in a step
    exchange_ms: dict[str, float]
    efficiency: dict[str, float | None]  # None where no speed is known
    bound_by: str


def of_run(config: Config, chosen: Plan, data: Batches, nodes: int, expected: Forecast) -> Scaling:
    """Of a run whose `data` is dealt to its ranks, and `expected` with them."""
    ranks, gpus_a_node = data.ranks, data.ranks // nodes
    loads = [
        [sum(batch["input_ids"].size for batch in part) for part in data.laid_out(step)]
        for step in range(min(SAMPLED_STEPS, data.steps_per_epoch))
    ]
    mean = statistics.mean(statistics.mean(of_step) for of_step in loads)
    most = statistics.mean(max(of_step) for of_step in loads)
    full = config.train.method == "full"
    values = chosen.shape.trained_weights(config)
    size = values * (2 if full and chosen.dtype == "bfloat16" and not chosen.fp32_masters else 4)
    sent = 2 * (ranks - 1) / ranks * size  # a ring all-reduce
    links = {"NVLink": NVLINK_GB_S * 1e9}
    if nodes > 1:
        links = {
            name: NETWORK_SHARE * gbit / 8 * 1e9 / (gpus_a_node if name.endswith("machine") else 1)
            for name, gbit in NETWORK_GBIT_S.items()
        }
    exchange_ms = {name: 1e3 * sent / rate + EXCHANGE_MS for name, rate in links.items()}
    efficiency: dict[str, float | None] = dict.fromkeys(links)
    bound = "speed not known"
    if expected.tokens_per_s is not None:
        step_ms = 1e3 * expected.tokens / expected.steps / expected.tokens_per_s.expected
        efficiency = {name: mean / most * step_ms / (step_ms + ms) for name, ms in exchange_ms.items()}
        longest = max(exchange_ms.values())
        bound = "the exchange" if longest / (step_ms + longest) > 1 - mean / most else "ranks that wait for the fullest"
    return Scaling(ranks, nodes, mean, most, sent / 1e6, exchange_ms, efficiency, bound)


def lines(found: Scaling) -> list[tuple[str, str, str]]:
    """(name, value, note) for the page."""
    many = f" on {found.nodes} machines" if found.nodes > 1 else ""
    spread = f"{found.tokens_a_rank / found.most_tokens:.3f} of the fullest rank's {found.most_tokens:,.0f}"
    made = [("GPUs", f"{found.ranks}{many}", ""), ("tokens a rank", f"{found.tokens_a_rank:,.0f} a step", spread)]
    for name, ms in found.exchange_ms.items():
        share = found.efficiency[name]
        value = "not known" if share is None else f"{share:.1%} of {found.ranks} times one GPU"
        note = f"{found.exchanged_mb:,.0f} MB exchanged a step: {ms:,.1f} ms over {name}; bound by {found.bound_by}"
        made.append(("efficiency", value, note))
    return made
