"""Escape from a local optimum: the bandit of Risk-Sensitive GRPO (arXiv 2509.24261, Figure 3), with error bars.

A policy over 100 arms starts near a reward of 0.6 and has hardly any mass on the reward of 1.0. The gradient of the
mean reward (β = 0) settles on 0.6. The only change made here is β in `risk_sensitive_advantage`, the function that
`rs_grpo.py` trains language models with: from β = 4 on every seed reaches 1.0, at β = 8 soonest.

    python bandit.py                7 values of β, 10 seeds, 400,000 pulls each; draws figures/bandit.png
    python bandit.py --lemmas       one exact update of π(best arm) against β (Lemmas 2 to 4); figures/lemmas.png
    python bandit.py --advantages   which samples the advantage weighs up and down (Figure 2); figures/advantages.png

The first takes 6 seconds on two cores of an AMD EPYC, 0.2 µs a pull.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from rs_grpo import chen_advantage, risk_sensitive_advantage

# Legend: K arms · B values of β · S seeds · R = B·S runs side by side · N pulls in an update (the group) · T updates
# P random policies · `logits` θ, with the policy π = softmax(θ) · `rewards` r · `arms` the arms pulled · a* the best arm

K = 100
ESCAPED = 0.8  # an expected reward half way between the local optimum, 0.6, and the global one, 1.0
DEFAULTS = {"steps": 25_000, "seeds": 10, "lr": 0.1, "batch": 16}  # as in the authors' code, which has one seed


# ---------------------------------------------------------------------------
# The bandit (Figure 3)
# ---------------------------------------------------------------------------


def landscape() -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards of the arms (K,), 1.0 at arm 40 and 0.6 at arm 75, and the logits (K,) of a policy that favours arm 75."""
    x = torch.arange(K, dtype=torch.float64)
    high, low = torch.exp(-((x - 40) ** 2) / 50), torch.exp(-((x - 75) ** 2) / 50)
    logits = (low + 0.1).log()
    return 0.1 + 0.9 * high + 0.5 * low, logits - logits.mean()


def update(
    logits: torch.Tensor, rewards: torch.Tensor, beta: float | torch.Tensor, uniforms: torch.Tensor, lr: float
) -> torch.Tensor:
    """One policy-gradient step of every run, in place: θ ← θ + lr · (1/N) Σ_i Â_i ∇ log π(a_i).

    For a softmax, ∇ log π(a) = onehot(a) − π. The advantages of a group sum to zero, so π drops out of the sum and
    each pull moves the logit of its own arm only.

    logits: (R, K), changed. rewards: (K,). beta: a number, or (R, 1). uniforms: (R, N) in [0, 1), one for each pull.
    Returns the expected reward of each run before the update, (R,).
    """
    probs = logits.softmax(1)  # (R, K)
    cumulative = probs.cumsum(1)  # (R, K)
    arms = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:])  # (R, N), by the inverse of the distribution
    advantages = risk_sensitive_advantage(rewards[arms], beta)  # (R, N)
    logits.scatter_add_(1, arms, advantages * (lr / arms.shape[1]))
    return probs @ rewards


def run(betas: Sequence[float], seeds: int, steps: int, lr: float, batch: int, seed: int = 0) -> torch.Tensor:
    """Expected reward after 0, 1, … T updates, for every β and every seed at once: (T+1, B, S).

    Each seed has its own stream of random numbers, and every β sees the same ones. So β explains all of the difference
    between two of its values, and neither the other values of β nor the number of seeds changes a run.
    """
    rewards, start = landscape()
    streams = [torch.Generator().manual_seed(seed + s) for s in range(seeds)]
    uniforms = torch.stack([torch.rand(steps, batch, generator=g, dtype=torch.float64) for g in streams], 1)  # (T, S, N)
    beta = torch.tensor(betas, dtype=torch.float64).repeat_interleave(seeds)[:, None]  # (R, 1)
    logits = start.repeat(len(beta), 1)  # (R, K)
    curve = torch.empty(steps + 1, len(beta), dtype=torch.float64)  # (T+1, R)
    for t in tqdm(range(steps), unit=" updates", unit_scale=True):
        curve[t] = update(logits, rewards, beta, uniforms[t].repeat(len(betas), 1), lr)
    curve[steps] = logits.softmax(1) @ rewards
    return curve.view(steps + 1, len(betas), seeds)


def updates_until(curve: torch.Tensor, level: float = ESCAPED) -> torch.Tensor:
    """Updates until the expected reward first reaches `level`, infinite if it never does: (T+1, B, S) to (B, S)."""
    reached = curve >= level
    return torch.where(reached.any(0), reached.int().argmax(0).double(), math.inf)


def bandit(args: argparse.Namespace) -> None:
    """Run every β and seed, print the table, draw reward landscape and learning curves."""
    began = time.perf_counter()
    curve = run(args.betas, args.seeds, args.steps, args.lr, args.batch, args.seed)  # (T+1, B, S)
    wall = time.perf_counter() - began
    print(f"{'β':>6}   expected reward at the end   seeds escaped   updates until {ESCAPED}: median (range)")
    for beta, end, updates in zip(args.betas, curve[-1], updates_until(curve)):
        times = [updates.quantile(0.5, interpolation="higher"), updates.min(), updates.max()]
        median, first, last = ("never" if t.isinf() else f"{t:,.0f}" for t in times)
        when = "-" if first == "never" else f"{median} ({first} to {last})"
        escaped = f"{int(updates.isfinite().sum())}/{args.seeds}"
        print(f"{beta:>6g}   {f'{end.mean():.3f} ± {end.std(correction=0):.3f}':>26}   {escaped:>13}   {when:>35}")
    pulls = curve[1:].numel() * args.batch
    print(f"{pulls:,} pulls in {wall:.1f} s, {1e6 * wall / pulls:.2f} µs a pull")

    figure, (left, right) = canvas(1, 2, 15, 6)
    rewards, start = landscape()
    left.plot(rewards, color="#222222")
    left.set(title="100 arms: what they pay, where the policy starts", xlabel="arm", ylabel="reward", ylim=(0, 1.12))
    left.annotate("global optimum", (40, 1.0), (40, 1.03), ha="center")
    left.annotate("local optimum", (75, 0.6), (75, 0.63), ha="center")
    policy = left.twinx()
    policy.fill_between(range(K), start.softmax(0), color="#d55e00", alpha=0.3, linewidth=0)
    policy.plot(start.softmax(0), color="#d55e00", linestyle="--")
    policy.set(ylim=(0, 0.112))
    policy.set_ylabel("initial probability", color="#d55e00")
    policy.tick_params(axis="y", colors="#d55e00")
    shown = torch.linspace(0, args.steps, min(args.steps, 1000) + 1).long()
    for beta, colour, line in zip(args.betas, colours(args.betas), curve[shown].unbind(1)):
        pulls = shown * args.batch / 1000
        right.fill_between(pulls, line.amin(1), line.amax(1), color=colour, alpha=0.25, linewidth=0)
        right.plot(pulls, line.median(1).values, color=colour, label=f"β = {beta:g}")
    for level in (0.6, 1.0):
        right.axhline(level, color="#888888", linestyle=":", linewidth=1.5, zorder=0)
    right.set(title=f"Learning: median and range of {args.seeds} seeds", xlabel="thousand pulls")
    right.set(ylabel="expected reward", ylim=(0, 1.12))
    right.legend(loc="lower right", ncols=2)
    save(figure, args.out / "bandit.png")


# ---------------------------------------------------------------------------
# The lemmas: the exact change of π(a*) in one small update
# ---------------------------------------------------------------------------


def one_step_change(counts: torch.Tensor, rewards: torch.Tensor, beta: float | torch.Tensor) -> torch.Tensor:
    """δπ(a*)/α = π* [ π* A* − Σ_j π_j² A_j ]: what an exact gradient step of small size α does to the best arm.

    Theorem 1 has the expectation over the policy where `risk_sensitive_advantage` has the mean over a group. The two
    are equal for a group that holds every arm in proportion to its probability. So a policy is given by whole numbers,
    π = counts / N, and its group holds arm j counts_j times.

    counts: (P, K), at least 1 each, with the same sum N in every row. rewards: (P, K). beta: a number, or (P, 1).
    Returns (P,).
    """
    group = rewards.flatten().repeat_interleave(counts.flatten()).view(len(counts), -1)  # (P, N)
    first_copy = counts.cumsum(1) - counts  # (P, K), the place in the group where the copies of each arm begin
    advantages = risk_sensitive_advantage(group, beta).gather(1, first_copy)  # (P, K)
    probs = counts.double() / group.shape[1]  # (P, K)
    best = rewards.argmax(1, keepdim=True)  # (P, 1)
    p, a = probs.gather(1, best), advantages.gather(1, best)
    return (p * (p * a - (probs**2 * advantages).sum(1, keepdim=True))).squeeze(1)


def limit_of_change(counts: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """β δπ(a*)/α as β → ∞: π* [(1−π*)² + Σ_{j≠*} π_j²], which is positive. Shapes as in `one_step_change`."""
    probs = counts.double() / counts.sum(1, keepdim=True)  # (P, K)
    p = probs.gather(1, rewards.argmax(1, keepdim=True)).squeeze(1)
    return p * ((1 - p) ** 2 + (probs**2).sum(1) - p**2)


def worked_example() -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and rewards (1, 3) of π = (.01, .80, .19) and r = (1, .6, 0): settled on the second-best arm."""
    return torch.tensor([[1, 80, 19]]), torch.tensor([[1.0, 0.6, 0.0]], dtype=torch.float64)


def random_bandits(number: int, seed: int = 0, arms: int = 10, size: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts (P, arms) that sum to `size`, of policies from even to nearly settled, and rewards (P, arms) in [0, 1)."""
    rng = torch.Generator().manual_seed(seed)
    sharpness = 3 * torch.rand(number, 1, generator=rng, dtype=torch.float64)
    probs = (sharpness * torch.randn(number, arms, generator=rng, dtype=torch.float64)).softmax(1)
    drawn = probs.multinomial(size - arms, replacement=True, generator=rng)  # the rest is one copy of every arm
    counts = torch.ones(number, arms, dtype=torch.long).scatter_add_(1, drawn, torch.ones_like(drawn))
    return counts, torch.rand(number, arms, generator=rng, dtype=torch.float64)


def lemmas(args: argparse.Namespace) -> None:
    """Print and draw δπ(a*)/α against β, for the worked example and for 1,000 random policies."""
    example, policies = worked_example(), random_bandits(1_000, args.seed)
    limit = limit_of_change(*policies)  # (P,)
    print(f"{'β':>6}   worked example: δπ(a*)/α   random policies: π(a*) rises   median of δπ(a*) / its 1/β limit")
    for beta in args.betas:
        changes = one_step_change(*policies, beta)
        share = f"{int((changes > 0).sum()):,} of {len(changes):,}"
        ratio = f"{(changes * beta / limit).median():.3f}" if beta > 0 else "-"
        print(f"{beta:>6g}   {one_step_change(*example, beta).item():>24.1e}   {share:>28}   {ratio:>34}")
    grid = torch.logspace(0, 4, 101, dtype=torch.float64)
    changes = torch.stack([one_step_change(*policies, beta) for beta in grid])  # (len(grid), P)
    rises = (changes > 0).double()
    print(f"for {int(rises.amax(0).sum()):,} of {len(limit):,} random policies some β from 1 to 10,000 raises π(a*)")

    figure, (two, three, four) = canvas(1, 3, 19, 6)
    two.plot(grid, one_step_change(*(t.expand(len(grid), -1) for t in example), grid[:, None]), color="#0072b2")
    two.axhline(one_step_change(*example, 0).item(), color="#d55e00", linestyle="--", label="standard gradient, β = 0")
    two.plot(grid[30:], limit_of_change(*example) / grid[30:], "k:", label="limit, in proportion to 1/β")
    two.axhline(0, color="#888888", linewidth=1)
    two.set(title="One policy: (.01, .80, .19), rewards (1, .6, 0)", ylabel="δπ(a*)/α", ylim=(-6e-4, 12e-4))
    three.plot(grid, 100 * rises.mean(1), color="#0072b2")
    three.axhline(100 * (one_step_change(*policies, 0) > 0).double().mean(), color="#d55e00", linestyle="--")
    three.set(title="1,000 policies: how many raise π(a*)", ylabel="percent", ylim=(70, 102))
    low, middle, high = changes.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), 1)
    four.fill_between(grid, low, high, color="#0072b2", alpha=0.25, linewidth=0)
    four.plot(grid, middle, color="#0072b2")
    four.plot(grid, limit.median() / grid, "k:")
    four.set(title="1,000 policies: by how much", ylabel="δπ(a*)/α", yscale="log")
    for axis in (two, three, four):
        axis.set(xlabel="β", xscale="log")
    two.legend(loc="upper right")
    save(figure, args.out / "lemmas.png")


# ---------------------------------------------------------------------------
# The advantages (Figure 2)
# ---------------------------------------------------------------------------


def by_accuracy(estimator: Callable[[torch.Tensor], torch.Tensor], size: int) -> tuple[torch.Tensor, ...]:
    """For groups of `size` with c = 1 … size−1 correct: p = c/size, Â of a correct sample, of a wrong one, mean |Â|.

    estimator: maps binary rewards (P, size) to advantages (P, size). Returns four tensors (size−1,).
    """
    c = torch.arange(1, size, dtype=torch.float64)[:, None]
    advantages = estimator((torch.arange(size) < c).double())  # (size−1, size), the correct samples first
    return c[:, 0] / size, advantages[:, 0], advantages[:, -1], advantages.abs().mean(1)


def advantages(args: argparse.Namespace) -> None:
    """Print and draw the advantage over continuous rewards, and over the accuracy of a prompt.

    The risk-sensitive advantage depends on p alone, so groups of 1,000 give smooth curves. Pass@k depends on the group
    as well: once fewer than k samples of 16 are wrong, every k samples hold a correct one, and nothing is left to learn.
    """
    figure, (continuous, *panels) = canvas(2, 2, 15, 11)
    evenly = torch.linspace(0, 1, 101, dtype=torch.float64)  # (N,), one group of rewards
    print(f"{'':>8}   mean |Â| largest at p   1/(1+e^(β/2))   Â of a correct/wrong one of 16: c = 1, 8, 15")
    for beta, colour in zip(args.betas, colours(args.betas)):
        estimator = partial(risk_sensitive_advantage, beta=beta)
        continuous.plot(evenly, estimator(evenly[None])[0], color=colour, label=f"β = {beta:g}")
        p, *curves = by_accuracy(estimator, 1000)
        for panel, curve in zip(panels, curves):
            panel.plot(p, curve, color=colour, label=f"β = {beta:g}")
        peak = curves[2].argmax()
        panels[2].plot(p[peak], curves[2][peak], "o", color=colour, markersize=10)
        expected = torch.tensor(-beta / 2).sigmoid()
        print(f"β = {beta:<4g}   {p[peak]:>21.3f}   {expected:>13.3f}   {examples(estimator)}")
    pass_at_4 = partial(chen_advantage, k=4)
    print(f"{'pass@4':<8}   {'-':>21}   {'-':>13}   {examples(pass_at_4)}")
    p, *curves = by_accuracy(pass_at_4, 16)
    for panel, curve in zip(panels, curves):
        panel.plot(p, curve, "s--", color="black", label="pass@4, 16 samples")
    panels[2].annotate("pass@4: exactly 0", (14 / 16, 0), (14 / 16, 0.3), ha="center", arrowprops={"arrowstyle": "->"})
    continuous.set(title="Rewards spread evenly from 0 to 1", xlabel="reward of the sample", ylabel="advantage Â")
    for panel, of, ylim in zip(panels, ("a correct sample: Â", "a wrong sample: Â", "the group: mean |Â|"), ((0, 4), (-1, 0), (0, 0.55))):
        panel.set(title=of.capitalize(), xlabel="accuracy of the prompt, p", ylim=ylim)
    continuous.legend()
    panels[0].legend()
    save(figure, args.out / "advantages.png")


def examples(estimator: Callable[[torch.Tensor], torch.Tensor]) -> str:
    _, correct, wrong, _ = by_accuracy(estimator, 16)
    return "   ".join(f"{correct[c - 1]:.3f}/{wrong[c - 1]:.3f}" for c in (1, 8, 15))


# ---------------------------------------------------------------------------
# Pictures and the command line
# ---------------------------------------------------------------------------


def canvas(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Sequence[Axes]]:
    """A figure and its axes, drawn without a display; matplotlib is loaded only now."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"font.size": 16, "lines.linewidth": 3, "legend.frameon": False})
    figure = Figure((width, height), layout="constrained", dpi=100)
    return figure, figure.subplots(rows, columns).flatten()
