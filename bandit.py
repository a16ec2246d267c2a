"""Escaping a local optimum: the bandit of Risk-Sensitive GRPO (arXiv 2509.24261, Figure 3).

A bandit has arms, and pulling an arm pays a reward. Of these 100 arms, arm 40 pays most, 1.0. The
policy starts around arm 75, a local optimum that pays 0.6, much as a language model starts around
the answers that it knows: only one pull in 225 is of arm 40. Policy gradient on the mean reward
(β = 0) settles for 0.6, whereas from β = 4 on every seed finds the best arms. Only β changes from
row to row; the advantage is `risk_sensitive_advantage`, with which `rs_grpo.py` trains a model.

    python bandit.py              # prints this table and draws figures/bandit.png
    python bandit.py --animate    # shows policies moving, β = 0 beside β = 8: figures/bandit.gif

     β   reward at the end   seeds escaped   updates until 0.8: median (range)
     0       0.600 ± 0.000            0/10   never
     2       0.599 ± 0.000            0/10   never
     4       0.995 ± 0.007           10/10   3,386 (3,020 to 4,596)
     8       0.992 ± 0.008           10/10   2,726 (2,391 to 3,288)
    16       0.993 ± 0.005           10/10   4,338 (3,837 to 4,540)
    32       0.989 ± 0.000           10/10   7,816 (7,278 to 8,098)
    64       0.966 ± 0.001           10/10   14,456 (14,151 to 14,873)

The reward is the policy's expected reward, as mean ± standard deviation over ten seeds. Each run
makes 25,000 updates of 16 pulls. Either command takes some 15 seconds.

Legend: K arms, B values of β, S seeds, R = B·S runs side by side, T updates of N pulls each. The
policy is π = softmax(θ): `probs` are π, and `logits` are θ.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.animation import PillowWriter
from torch import Tensor
from tqdm import trange

from rs_grpo import risk_sensitive_advantage

ESCAPED = 0.8  # an expected reward halfway between the local optimum, 0.6, and the global one, 1.0
ANIMATED = {"betas": (0, 8), "seeds": 1, "steps": 5_000}  # the defaults of --animate


class Setup(NamedTuple):
    """What is run. The defaults are the paper's, except that it shows a single seed."""

    betas: tuple = (0, 2, 4, 8, 16, 32, 64)
    seeds: int = 10  # runs of each β
    steps: int = 25_000  # updates in each run
    batch: int = 16  # pulls in each update
    lr: float = 0.1
    seed: int = 0  # the first of the seeds


def landscape() -> tuple[Tensor, Tensor]:
    """Return the rewards (K,) of the arms, and the logits (K,) of a policy around arm 75."""
    arms = torch.arange(100, dtype=torch.float64)
    high = torch.exp(-((arms - 40) ** 2) / 50)
    low = torch.exp(-((arms - 75) ** 2) / 50)
    rewards = 0.1 + 0.9 * high + 0.5 * low
    logits = torch.log(low + 0.1)
    return rewards, logits - logits.mean()


def update(
    logits: Tensor, rewards: Tensor, beta: float | Tensor, uniforms: Tensor, lr: float
) -> Tensor:
    """Take one policy-gradient step in every run: θ ← θ + lr · (1/N) Σ_i Â_i ∇ log π(a_i).

    For a softmax, ∇ log π(a) = onehot(a) − π. The advantages of a group sum to zero, so π cancels
    in the sum, and each pull changes only the logit of its own arm.
    logits: (R, K), changed in place. rewards: (K,), those of the arms. beta: a number, or (R, 1).
    uniforms: (R, N), random numbers in [0, 1). Returns the policies before the step, (R, K).
    """
    probs = logits.softmax(1)  # (R, K)
    cumulative = probs.cumsum(1)  # (R, K); rounding may end it just below 1
    arms = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:])  # (R, N)
    advantages = risk_sensitive_advantage(rewards[arms], beta)  # (R, N)
    pulls = arms.shape[1]
    logits.scatter_add_(1, arms, advantages * (lr / pulls))
    return probs


def learn(setup: Setup) -> Iterator[Tensor]:
    """Yield the policies of all runs, (R, K), after 0, 1, … T updates; the first β comes first.

    Each seed has its own stream of random numbers, and every β sees the same ones. Two values of β
    therefore differ by β alone, and a run doesn't depend on which others run beside it.
    """
    rewards, start = landscape()
    streams = []
    for s in range(setup.seeds):
        generator = torch.Generator().manual_seed(setup.seed + s)
        size = (setup.steps, setup.batch)
        streams.append(torch.rand(size, generator=generator, dtype=torch.float64))
    uniforms = torch.stack(streams, 1)  # (T, S, N)
    betas = torch.tensor(setup.betas, dtype=torch.float64)
    beta = betas.repeat_interleave(setup.seeds)[:, None]  # (R, 1)
    logits = start.repeat(len(beta), 1)  # (R, K)
    for step in trange(setup.steps, unit=" updates"):
        of_runs = uniforms[step].repeat(len(betas), 1)  # (R, N)
        yield update(logits, rewards, beta, of_runs, setup.lr)
    yield logits.softmax(1)


def run(setup: Setup) -> Tensor:
    """Return the expected reward of every run after 0, 1, … T updates: (T+1, B, S)."""
    rewards, _ = landscape()
    curve = [probs @ rewards for probs in learn(setup)]
    return torch.stack(curve).unflatten(1, (-1, setup.seeds))


def updates_until_escape(curve: Tensor) -> Tensor:
    """Return the updates until each run of a curve, (T+1, S), reaches 0.8, or infinity: (S,)."""
    reached = curve >= ESCAPED
    first = reached.int().argmax(0)
    return torch.where(reached.any(0), first, math.inf)


# --- The table and the pictures -------------------------------------------------------------------
def print_table(setup: Setup, curve: Tensor) -> None:
    """Print how far and how fast the runs of each β came. curve: (T+1, B, S)."""
    print(f"{'β':>6}   reward at the end   seeds escaped   updates until {ESCAPED}: median (range)")
    for b, beta in enumerate(setup.betas):
        end = curve[-1, b]
        reward = f"{end.mean():.3f} ± {end.std(correction=0):.3f}"
        updates = updates_until_escape(curve[:, b])
        escaped = f"{updates.isfinite().sum()}/{setup.seeds}"
        when = f"{median(updates.tolist()):,.0f} ({updates.min():,.0f} to {updates.max():,.0f})"
        if updates.isinf().all():
            when = "never"
        print(f"{beta:>6g}   {reward:>17}   {escaped:>13}   {when}")


def draw_policy(panel: plt.Axes, probs: Tensor) -> None:
    """Draw a policy, (K,), as bars over the arms, and the rewards as a line."""
    rewards, _ = landscape()
    panel.plot(rewards, color="black")
    panel.fill_between(range(100), rewards, color="0.92")
    padded = torch.nn.functional.pad(probs, (2, 3))  # as if there were arms from −2 to 102
    heights = padded.view(21, 5).sum(1)  # of five arms around arm 0, 5, … 100
    panel.stairs(heights, torch.arange(-2.5, 103, 5), fill=True, color="C1")
    panel.set_xticks([40, 75], ["arm 40\npays 1.0", "arm 75\npays 0.6"])
    panel.set_ylabel("reward (line)\nprobability of 5 arms (bars)")
    panel.set_ylim(0, 1.05)


def draw(setup: Setup, curve: Tensor) -> plt.Figure:
    """Draw the bandit on the left, and how the runs learn on the right. curve: (T+1, B, S)."""
    figure = plt.figure(figsize=(15, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _, start = landscape()
    draw_policy(left, start.softmax(0))
    left.set_title("What the arms pay, and where the policy starts")
    every = math.ceil(setup.steps / 1000)
    shown = curve[::every]  # some 1,000 points are enough
    pulls = torch.arange(len(shown)).numpy() * every * setup.batch / 1000
    for b, beta in enumerate(setup.betas):
        seeds = shown[:, b]
        colour = plt.cm.plasma(b / len(setup.betas))
        middle = seeds.quantile(0.5, 1)
        right.plot(pulls, middle, color=colour, label=f"β = {beta:g}")
        right.fill_between(pulls, seeds.amin(1), seeds.amax(1), color=colour, alpha=0.25)
    right.set_xscale("log", base=2)  # shows whether the time doubles with β
    right.xaxis.set_major_formatter("{x:g}")
    right.set_title(f"Learning: median and range, {setup.seeds} seeds")
    right.set(xlabel="thousand pulls", ylabel="expected reward")
    right.set_xlim(pulls[-1] / 64, pulls[-1])
    right.set_ylim(0, 1.05)
    right.legend(loc="lower left", ncols=2)
    return figure


def animate(setup: Setup, policies: Iterator[Tensor], path: Path) -> None:
    """Write a GIF of some 50 policies that `learn` yields: two values of β, the first seed."""
    rewards, _ = landscape()
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.75), sharey=True, layout="none")
    figure.subplots_adjust(left=0.11, right=0.99, bottom=0.14, top=0.86, wspace=0.04)
    writer = PillowWriter(fps=8)
    every = math.ceil(setup.steps / 50)
    with writer.saving(figure, path, dpi=80):  # 800 pixels wide
        for updates, probs in islice(enumerate(policies), 0, None, every):
            for panel, beta, policy in zip(panels, setup.betas, probs[:: setup.seeds]):
                panel.clear()
                draw_policy(panel, policy)
                panel.label_outer()
                title = f"β = {beta:g} after {updates * setup.batch:,} pulls"
                panel.set_title(f"{title}\nexpected reward {policy @ rewards:.2f}")
            writer.grab_frame()
        for _ in range(15):  # hold the last frame for two seconds
            writer.grab_frame()


# --- The command line -----------------------------------------------------------------------------
def stop(sentence: str) -> None:
    """Say in one sentence what is wrong, and exit with status 2."""
    print(f"bandit.py: {sentence}", file=sys.stderr)
    sys.exit(2)


def check(setup: Setup) -> None:
    """Stop if a setting is out of its bounds. Every comparison is one that nan fails."""
    if not all(abs(beta) <= 1000 for beta in setup.betas):
        stop("--betas must be from -1000 to 1000")
    if setup.steps < 1 or setup.seeds < 1:
        stop("--steps and --seeds must be at least 1")
    if setup.batch < 2:
        stop("--batch must be at least 2, as one pull alone has no advantage")
    if setup.steps * setup.seeds * setup.batch > 10**8:
        stop("--steps x --seeds x --batch must be at most 100 million")
    if not 0 < setup.lr <= 1000:
        stop("--lr must be above 0 and at most 1000")
    if not 0 <= setup.seed < 2**32:
        stop("--seed must be at least 0 and less than 2**32")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.description = __doc__.splitlines()[0]
    parser.error = stop
    option = parser.add_argument
    option("--animate", action="store_true", help="draw bandit.gif instead")
    option("--betas", type=float, nargs="+", help="values of β (0 2 4 8 16 32 64; animated, 0 8)")
    option("--seeds", type=int, help="runs of each β (10; animated, 1)")
    option("--steps", type=int, help="updates in each run (25000; animated, 5000)")
    option("--batch", type=int, help="pulls in each update (16)")
    option("--lr", type=float, help="learning rate (0.1)")
    option("--seed", type=int, help="the first of the seeds (0)")
    option("--out", type=Path, default="figures", help="folder of the picture (figures)")
    given = vars(parser.parse_args(argv))
    out = given.pop("out")
    animated = given.pop("animate", False)
    setup = Setup(**(ANIMATED | given if animated else given))
    check(setup)
    if animated and len(setup.betas) != 2:
        stop("--animate needs two --betas to compare")
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    plt.switch_backend("agg")  # needs no display
    plt.rcParams.update({"font.size": 15, "lines.linewidth": 3})
    path = out / ("bandit.gif" if animated else "bandit.png")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if animated:
            animate(setup, learn(setup), path)
        else:
            curve = run(setup)
            print_table(setup, curve)
            draw(setup, curve).savefig(path)
    except OSError as error:
        stop(f"can't write: {error}")
    print(f"drew {path}")


if __name__ == "__main__":
    main()
