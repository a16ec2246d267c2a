"""The methods that are compared, among them variants that are tried only here."""

import math
from typing import NamedTuple

from rs_grpo import TASKS, countdown_value


def partial_credits(completions, answers):
    """1 for the target, 0.5 / (1 + distance) for an expression with another value, else 0."""
    rewards = []
    for completion, (numbers, target) in zip(completions, answers):
        value = countdown_value(completion, numbers)
        distance = math.inf if value is None else abs(float(value - target))
        rewards.append(1.0 if distance == 0 else 0.5 / (1 + distance))
    return rewards


TASKS["countdown-partial"] = lambda config: TASKS["countdown"](config)._replace(
    judge=partial_credits
)


class Method(NamedTuple):
    label: str  # in tables and figures
    settings: dict  # that differ from its testbed's
    part: str = "main"  # or the side question that it belongs to


PARTIAL = {"task": "countdown-partial"}
METHODS = {  # in the order of the tables
    "base": Method("base", {"steps": 0}),
    "grpo": Method("GRPO", {"advantage": "grpo"}),
    "mean": Method("mean baseline, β = 0", {"beta": 0.0}),
    "rs2": Method("RS-GRPO, β = 2", {"beta": 2.0}),
    "rs4": Method("RS-GRPO, β = 4", {"beta": 4.0}),
    "rs8": Method("RS-GRPO, β = 8", {"beta": 8.0}),
    "chen": Method("Chen et al., k = 4", {"advantage": "chen"}),
    "mahdavi": Method("Mahdavi et al., k = 4", {"advantage": "mahdavi"}),
    "pkpo": Method("PKPO, k = 4", {"advantage": "pkpo"}),
    "pkpo_loo": Method("PKPO leave-one-out, k = 4", {"advantage": "pkpo_loo"}),
    "maxrl": Method("MaxRL", {"advantage": "maxrl"}),
    "mean_partial": Method("mean baseline", PARTIAL | {"beta": 0.0}, "partial"),
    "rs2_partial": Method("RS-GRPO, β = 2", PARTIAL | {"beta": 2.0}, "partial"),
}
