"""What is compared: the methods, each a row of the tables, and variants that are tried only here.

A new method is an entry of METHODS: its label, the settings that differ from those of its testbed
and, where they don't say it all, a `collect` and a Config of its own (as in extensions/kl.py).
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

import rs_grpo
from extensions import estimators
from rs_grpo import ADVANTAGES, TASKS

SCALE = 0.1  # mean |Â| of a batch once it is rescaled
MOST_BETA = 16.0


# --- Advantages of one size -----------------------------------------------------------------------
def rescaled(advantages):
    """Advantages (P, N) times one number, so that their mean size is SCALE; zeros stay zeros."""
    size = advantages.abs().mean()
    return advantages * (SCALE / size) if size > 0 else advantages


def rescaled_advantage(name):
    """The advantage of that name, rescaled."""
    return lambda rewards, config: rescaled(ADVANTAGES[name](rewards, config))


# --- A β that sets itself -------------------------------------------------------------------------
def beta_of_constant_kl(rewards, kl=math.log(2)):
    """For each group the β ≥ 0 with KL(softmax(β r) ‖ uniform) = `kl` nats: (P, N) to (P, 1).

    From arXiv 2601.16175. The divergence grows with β up to ln(N/c), c the number of samples with
    the best reward. Where that isn't enough, β is MOST_BETA; so it is for a group of equal rewards,
    which has no signal whatever β is.
    """
    r = rewards.double() - rewards.double().amax(1, keepdim=True)  # (P, N)
    low = torch.zeros(len(r), 1, dtype=torch.float64)
    high = torch.full_like(low, MOST_BETA)
    for _ in range(50):  # bisection
        beta = (low + high) / 2
        logp = (beta * r).log_softmax(1)  # (P, N)
        divergence = (logp.exp() * logp).sum(1, keepdim=True) + math.log(r.shape[1])  # (P, 1)
        low = torch.where(divergence < kl, beta, low)
        high = torch.where(divergence < kl, high, beta)
    return high


def beta_of_accuracy(rewards):
    """For each group β = 8 (1 − p): 8 where nothing is solved, 0 where all is. (P, N) to (P, 1)."""
    return 8 * (1 - rewards.double().mean(1, keepdim=True))


def collect_annealed(policy, task, config, state, generator):
    """Steps 1 to 4 with a β that falls linearly from 8 to 0 over the run."""
    beta = 8 * (1 - state.step / config.steps)
    return rs_grpo.collect(policy, task, replace(config, beta=beta), state, generator)


ADVANTAGES.update(
    rs_rescaled=rescaled_advantage("rs"),
    grpo_rescaled=rescaled_advantage("grpo"),
    rs_kl=lambda r, config: rs_grpo.risk_sensitive_advantage(r, beta_of_constant_kl(r)),
    rs_accuracy=lambda r, config: rs_grpo.risk_sensitive_advantage(r, beta_of_accuracy(r)),
)


# --- Partial credit -------------------------------------------------------------------------------
def partial_credit(completion, answer):
    """1 for the target, 0.5 / (1 + distance) for an expression with another value, else 0."""
    numbers, target = answer
    value = rs_grpo.countdown_value(completion, numbers)
    if value is None:
        return 0.0
    if value == target:
        return 1.0
    return 0.5 / (1 + abs(float(value - target)))


def judge_partially(completions, answers):
    return [partial_credit(*pair) for pair in zip(completions, answers)]


def countdown_partial(config):
    return TASKS["countdown"](config)._replace(judge=judge_partially)


PARTIAL = "countdown-partial"
TASKS[PARTIAL] = countdown_partial


# --- The methods ----------------------------------------------------------------------------------
class Method(NamedTuple):
    label: str  # in tables and figures
    settings: dict  # what differs from its testbed's
    part: str = "main"  # main, or the side question that it belongs to
    collect: Callable = rs_grpo.collect
    config_class: type = estimators.Config


METHODS = {  # in the order of the tables
    "base": Method("base", dict(steps=0)),
    "grpo": Method("GRPO", dict(advantage="grpo")),
    "mean": Method("mean baseline, β = 0", dict(beta=0.0)),
    "rs2": Method("RS-GRPO, β = 2", dict(beta=2.0)),
    "rs4": Method("RS-GRPO, β = 4", dict(beta=4.0)),
    "rs8": Method("RS-GRPO, β = 8", dict(beta=8.0)),
    "chen": Method("Chen et al., k = 4", dict(advantage="chen")),
    "mahdavi": Method("Mahdavi et al., k = 4", dict(advantage="mahdavi")),
    "pkpo": Method("PKPO, k = 4", dict(advantage="pkpo")),
    "pkpo_loo": Method("PKPO leave-one-out, k = 4", dict(advantage="pkpo_loo")),
    "maxrl": Method("MaxRL", dict(advantage="maxrl")),
    "grpo_rescaled": Method("GRPO", dict(advantage="grpo_rescaled"), "rescaled"),
    "mean_rescaled": Method(
        "mean baseline, β = 0", dict(advantage="rs_rescaled", beta=0.0), "rescaled"
    ),
    "rs2_rescaled": Method("RS-GRPO, β = 2", dict(advantage="rs_rescaled", beta=2.0), "rescaled"),
    "rs8_rescaled": Method("RS-GRPO, β = 8", dict(advantage="rs_rescaled", beta=8.0), "rescaled"),
    "mean_partial": Method("mean baseline", dict(beta=0.0, task=PARTIAL), "partial"),
    "rs2_partial": Method("RS-GRPO, β = 2", dict(beta=2.0, task=PARTIAL), "partial"),
    "rs_kl": Method("β for KL = ln 2", dict(advantage="rs_kl"), "schedules"),
    "rs_annealed": Method("β from 8 to 0 over the run", {}, "schedules", collect_annealed),
    "rs_accuracy": Method("β = 8 (1 − p)", dict(advantage="rs_accuracy"), "schedules"),
}
