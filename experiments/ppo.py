"""Several updates from one batch, with PPO's clip: what `rs_grpo.py --updates U` does for U above 1, as the paper does.

The batch is cut into U minibatches of whole groups. From the second update on the policy is no longer the one that
sampled, and Â·log π becomes min(ratio·Â, clip(ratio, 1 − low, 1 + high)·Â) with ratio = π/π_old, which keeps an update
from going far where the samples no longer tell (PPO, arXiv 1707.06347; the wider upper bound is DAPO's, arXiv 2503.14476).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rs_grpo import Config, Policy, Rollouts, completion_logprobs, merge_equal, micro_batches, take


def clipped_gradients(
    policy: Policy, batches: Sequence[tuple[Rollouts, Tensor]], config: Config
) -> list[Callable[..., float]]:
    """U functions to be called like `rs_grpo.policy_gradient`, each for the gradient on every U-th prompt.

    Called before the first update, since π_old is the policy as it is now.
    """
    old = [score(policy, *batch, config) for batch in batches]  # (B, T) each
    return [functools.partial(clipped_gradient, old=old, update=update) for update in range(config.updates)]


@torch.no_grad()
def score(policy: Policy, rollouts: Rollouts, advantages: Tensor, config: Config) -> Tensor:
    """log π_old (B, T) of the completions: computed as in learning, or the sampler's rounding would pass for a change."""
    old = torch.zeros(rollouts.mask.shape, device=policy.device)
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=policy.sampler is not policy.model):
        for rows in micro_batches(rollouts, merge_equal(rollouts, advantages), config.micro_tokens):
            logprobs = completion_logprobs(policy.model, take(rollouts, rows), config.temperature)
            old[rows, : logprobs.shape[1]] = logprobs
    return old


def clipped_gradient(
    model: Any, batches: Sequence[tuple[Rollouts, Tensor]], config: Config, old: Sequence[Tensor], update: int
) -> float:
    """`rs_grpo.policy_gradient` with the clipped ratio; `old` holds log π_old (B, T) of each batch."""
    mine = [rollouts.owner % config.updates == update for rollouts, _ in batches]  # (B,) each
    tokens = sum(rollouts.mask[rows].sum() for (rollouts, _), rows in zip(batches, mine))
    total = 0.0
    for (rollouts, advantages), before, part in zip(batches, old, mine):
        weights = merge_equal(rollouts, advantages) * part  # (B,)
        for rows in micro_batches(rollouts, weights, config.micro_tokens):
            some = take(rollouts, rows)
            logprobs = completion_logprobs(model, some, config.temperature)  # (B', T')
            ratio = (logprobs - before[rows, : logprobs.shape[1]]).exp()
            clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
            weight = weights[rows, None]  # (B', 1): the same on every token
            loss = -(torch.minimum(ratio * weight, clipped * weight) * some.mask).sum() / tokens
            loss.backward()
            total += loss.item()
    return total
