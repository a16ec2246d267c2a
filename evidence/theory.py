"""What the lemmas and Figure 2 of Risk-Sensitive GRPO (arXiv 2509.24261) say, in numbers.

    python -m evidence.theory    # prints two tables, draws figures/lemmas.png and advantages.png

Lemma 2: with β = 0, an update can lower π(a*), the probability of the best arm. Lemma 3: for every
policy, a large enough β raises it. Lemma 4: beyond some β, the rise shrinks, in the limit as 1/β.
Figure 2: a larger β spends more of the gradient on hard prompts. P policies, N members, K arms.
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from extensions.estimators import chen_advantage
from rs_grpo import risk_sensitive_advantage


class Bandits(NamedTuple):  # policies, as groups of pulls in exact proportion, and rewards
    arms: Tensor  # (P, N), from 0 to K−1
    rewards: Tensor  # (P, K)


EXAMPLE = Bandits(  # π = (.01, .80, .19), settled on the second-best arm
    arms=torch.tensor([[0] + [1] * 80 + [2] * 19]),
    rewards=torch.tensor([[1.0, 0.6, 0.0]], dtype=torch.float64),
)


def one_step_change(bandits: Bandits, beta: float) -> Tensor:
    """Return how fast an exact update of size α → 0 changes π(a*), for each bandit: (P,).

        δπ(a*)/α = π(a*) · mean_i Â_i (1[a_i = a*] − π(a_i))

    The mean over such a group is the expectation in Theorem 1. For large β the result approaches
    π(a*) [(1−π(a*))² + Σ_{j≠a*} π_j²] / β, which is positive.
    """
    arms, rewards = bandits
    best = rewards.argmax(1, keepdim=True)  # (P, 1)
    pulled = rewards.gather(1, arms)  # (P, N)
    advantages = risk_sensitive_advantage(pulled, beta)  # (P, N)
    share = torch.full_like(pulled, 1 / arms.shape[1])  # (P, N)
    probs = torch.zeros_like(rewards).scatter_add_(1, arms, share)  # (P, K)
    score = (arms == best).double() - probs.gather(1, arms)  # (P, N)
    gradient = (advantages * score).mean(1)  # (P,)
    return probs.gather(1, best)[:, 0] * gradient


def random_bandits(number: int) -> Bandits:
    """Return bandits with 10 arms, nearly even to nearly settled, and groups of 200 pulls."""
    generator = torch.Generator().manual_seed(0)
    scale = 3 * torch.rand(number, 1, generator=generator)
    probs = (scale * torch.randn(number, 10, generator=generator)).softmax(1)
    drawn = probs.multinomial(190, replacement=True, generator=generator)
    every = torch.arange(10).repeat(number, 1)  # no arm is left out
    rewards = torch.rand(number, 10, dtype=torch.float64, generator=generator)
    arms = torch.cat([every, drawn], 1)  # (P, 200)
    return Bandits(arms, rewards)


def show_lemmas():
    """Print what each β does to EXAMPLE and to 1,000 random policies, and draw it."""
    policies = random_bandits(1_000)
    print(f"{'β':>6}   worked example: δπ(a*)/α   times β   random policies that raise π(a*)")
    for beta in (0, 2, 4, 8, 16, 32, 64):
        change = one_step_change(EXAMPLE, beta).item()
        raised = (one_step_change(policies, beta) > 0).sum()
        print(f"{beta:>6g}   {change:>24.1e}   {beta * change + 0:>7.4f}   {raised:>32,}")
    grid = torch.logspace(0, 6, 121, dtype=torch.float64)
    example = torch.cat([one_step_change(EXAMPLE, beta) for beta in grid])  # (B,)
    raised = torch.stack([one_step_change(policies, beta) > 0 for beta in grid])  # (B, P)
    print(f"some β up to 1e6 raises π(a*) for {raised.any(0).sum():,} of the 1,000 random policies")
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 6))
    dashed = {"color": "C1", "linestyle": "--", "label": "standard, β = 0"}
    product = 0.01 * (0.99**2 + 0.80**2 + 0.19**2)  # the limit of β times the change
    left.plot(grid, 1e4 * example, label="risk-sensitive")
    left.plot(grid, 1e4 * product / grid, "k:", label="limit, as 1/β")
    left.axhline(1e4 * one_step_change(EXAMPLE, 0).item(), **dashed)
    left.axhline(0, color="grey", linewidth=1)
    left.legend()
    left.set(
        title="One policy, settled on the second-best arm",
        ylabel="10⁴ × change of π(a*)",
        ylim=(-6, 11),
    )
    standard = one_step_change(policies, 0) > 0  # (P,)
    right.plot(grid, 100 * raised.double().mean(1))
    right.axhline(100 * standard.double().mean(), **dashed)
    right.set(title="1,000 random policies", ylabel="percent that raise π(a*)", ylim=(75, 101))
    for panel in (left, right):
        panel.set(xlabel="β", xscale="log", xlim=(1, 10_000))
        panel.xaxis.set_major_formatter("{x:,.0f}")
    return figure


def binary_groups(samples):
    """Return the groups with 1, 2, … N−1 correct samples, the correct ones first: (N−1, N)."""
    return torch.ones(samples - 1, samples, dtype=torch.float64).tril()


def show_advantages():
    """Print where a group's mean |Â| is largest, and draw Â over the reward and over p."""
    figure, panels = plt.subplots(2, 2, figsize=(12, 9))
    continuous, correct, wrong, whole = panels.flat
    groups = binary_groups(16)
    style = {"color": "black", "linewidth": 1, "marker": "s", "label": "pass@4"}
    curves = [(groups, chen_advantage(groups, k=4), style)]
    groups = binary_groups(1600)  # for smooth curves; N matters only to pass@4
    rewards = torch.linspace(0, 1, 101, dtype=torch.float64)
    betas = (0, 2, 4, 8)
    colors = plt.cm.plasma(torch.linspace(0, 0.9, len(betas)).tolist())
    for beta, color in zip(betas, colors):
        style = {"color": color, "label": f"β = {beta:g}"}
        curves.append((groups, risk_sensitive_advantage(groups, beta), style))
        advantages = risk_sensitive_advantage(rewards[None], beta)
        continuous.plot(rewards, advantages[0], color=color)
        peak = 1 / (1 + math.exp(beta / 2))
        whole.axvline(peak, color=color, linestyle=":", linewidth=1.5)
    print(f"{'':>8}   mean |Â| peaks at p   mean |Â| at p = 15/16")
    for groups, advantages, style in curves:
        p = groups.mean(1)  # (P,)
        size = advantages.abs().mean(1)  # (P,)
        easy = size[p == 15 / 16].item()
        print(f"{style['label']:>8}   {p[size.argmax()]:>19.3f}   {easy:>21.3f}")
        correct.plot(p, advantages[:, 0], **style)
        wrong.plot(p, advantages[:, -1], **style)
        whole.plot(p, size, **style)
    for panel in panels.flat:
        panel.set(xlabel="accuracy of the prompt, p", ylabel="advantage Â")
    continuous.set(title="Rewards spread evenly from 0 to 1", xlabel="reward of the sample")
    correct.set(title="A correct sample", ylim=(0, 4))
    correct.legend()
    wrong.set(title="A wrong sample", ylim=(-1, 0.05))
    whole.set(
        title="The whole group, dotted: 1/(1+exp(β/2))",
        ylabel="mean |Â|",
        ylim=(-0.02, 0.55),
    )
    return figure


def main(arguments=None):
    parser = argparse.ArgumentParser("theory.py")
    parser.add_argument("--out", type=Path, default="figures", help="folder of pictures (figures)")
    args = parser.parse_args(arguments)
    plt.switch_backend("agg")  # needs no display
    plt.rcParams["figure.constrained_layout.use"] = True
    plt.rcParams["font.size"] = 15
    plt.rcParams["lines.linewidth"] = 3
    args.out.mkdir(parents=True, exist_ok=True)
    show_lemmas().savefig(args.out / "lemmas.png")
    show_advantages().savefig(args.out / "advantages.png")
    print(f"the pictures are in {args.out}/")


if __name__ == "__main__":
    main()
