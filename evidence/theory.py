"""What the lemmas and Figure 2 of Risk-Sensitive GRPO (arXiv 2509.24261) say, in numbers.

Nothing is learned here. The lemmas ask what a single exact update does to the probability of the
best arm, π(a*). Figure 2 asks which samples an advantage weighs up and which it weighs down.

    python -m evidence.theory                 # both: prints a table and draws a picture of each
    python -m evidence.theory --lemmas        # only Lemmas 2 to 4: figures/lemmas.png
    python -m evidence.theory --advantages    # only Figure 2: figures/advantages.png

The lemmas are shown for a worked example and for 1,000 random policies. Lemma 2: with β = 0, an
update can lower π(a*). Lemma 3: for every policy, a large enough β raises it. Lemma 4: beyond some
β, the rise shrinks as β grows; in the limit it is proportional to 1/β. Figure 2 shows that a larger
β spends more of the gradient on hard prompts; an estimator of pass@4 spends none on easy ones.

Legend: P policies or prompts, N members of a group, K arms; a* is the best arm, α the size of the
update, δπ(a*) the change of π(a*), p the accuracy of a prompt, Â the advantage.
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


# --- Lemmas 2 to 4 --------------------------------------------------------------------------------
class Bandits(NamedTuple):
    """Policies, each as a group of pulls in exact proportion to its probabilities, and rewards."""

    arms: Tensor  # (P, N), from 0 to K−1
    rewards: Tensor  # (P, K)


EXAMPLE = Bandits(  # π = (.01, .80, .19), settled for the second-best arm
    arms=torch.tensor([[0] * 1 + [1] * 80 + [2] * 19]),
    rewards=torch.tensor([[1.0, 0.6, 0.0]], dtype=torch.float64),
)


def one_step_change(bandits: Bandits, beta: float) -> Tensor:
    """Return how fast one small, exact update changes π(a*), for each bandit: (P,).

        δπ(a*)/α = π(a*) · mean_i Â_i (1[a_i = a*] − π(a_i))

    Nothing is sampled: the mean over such a group is the expectation in Theorem 1. For EXAMPLE, the
    result is −4.8e-4 at β = 0, −4.8e-5 at 4, +3.6e-4 at 8, +9.0e-4 at 16 and +5.2e-4 at 32. For
    large β it approaches π(a*) [(1−π(a*))² + Σ_{j≠a*} π_j²] / β, which is positive (Lemma 3) and
    shrinks as β grows (Lemma 4).
    """
    arms, rewards = bandits
    best = rewards.argmax(1, keepdim=True)  # (P, 1)
    pulled = rewards.gather(1, arms)  # (P, N)
    advantages = risk_sensitive_advantage(pulled, beta)  # (P, N)
    share = torch.full_like(pulled, 1 / arms.shape[1])  # (P, N)
    probs = torch.zeros_like(rewards).scatter_add_(1, arms, share)  # (P, K)
    score = (arms == best).double() - probs.gather(1, arms)  # (P, N)
    return probs.gather(1, best)[:, 0] * (advantages * score).mean(1)


def changes(bandits: Bandits, betas: list[float]) -> Tensor:
    """Return `one_step_change` for each β: (B, P)."""
    return torch.stack([one_step_change(bandits, beta) for beta in betas])


def random_bandits(number: int, seed: int = 0) -> Bandits:
    """Return random bandits with 10 arms and groups of 200, each arm at least once in each group.

    The policies range from nearly even to nearly settled, and rewards from 0 to 1.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = 3 * torch.rand(number, 1, generator=generator)
    logits = scale * torch.randn(number, 10, generator=generator)
    probs = logits.softmax(1)
    drawn = probs.multinomial(190, replacement=True, generator=generator)
    every = torch.arange(10).repeat(number, 1)
    rewards = torch.rand(number, 10, dtype=torch.float64, generator=generator)
    arms = torch.cat([every, drawn], 1)
    return Bandits(arms, rewards)


def print_lemmas(betas, policies):
    """Print what each β does to EXAMPLE, and how many of the policies it raises."""
    print(f"{'β':>6}   worked example: δπ(a*)/α   times β   random policies that raise π(a*)")
    for beta in betas:
        change = one_step_change(EXAMPLE, beta).item()
        scaled = beta * change if beta else 0
        raised = (one_step_change(policies, beta) > 0).sum()
        print(f"{beta:>6g}   {change:>24.1e}   {scaled:>7.4f}   {raised:>32,}")


def draw_example(panel, grid):
    """Draw the change of π(a*) in EXAMPLE over a grid of β."""
    exact = 1e4 * changes(EXAMPLE, grid)
    standard = 1e4 * one_step_change(EXAMPLE, 0).item()
    product = 0.01 * (0.99**2 + 0.80**2 + 0.19**2)  # the limit of β times the change
    limit = [1e4 * product / beta for beta in grid]
    panel.plot(grid, exact, label="risk-sensitive")
    panel.plot(grid, limit, "k:", label="limit, as 1/β")
    panel.axhline(standard, color="C1", linestyle="--", label="standard, β = 0")
    panel.axhline(0, color="grey", linewidth=1)
    panel.set_title("One policy, settled on the second-best arm")
    panel.set(ylabel="10⁴ × change of π(a*)", ylim=(-6, 11))
    panel.legend()


def draw_policies(panel, grid, raised, standard):
    """Draw the percentage of policies that each β of the grid raises: (B, P)."""
    panel.plot(grid, 100 * raised.double().mean(1))
    panel.axhline(standard, color="C1", linestyle="--")
    panel.set_title(f"{raised.shape[1]:,} random policies")
    panel.set(ylabel="percent that raise π(a*)", ylim=(75, 101))


def show_lemmas(betas, seed):
    """Print the table of the lemmas, and return their picture."""
    policies = random_bandits(1_000, seed)
    print_lemmas(betas, policies)
    grid = torch.logspace(0, 6, 121, dtype=torch.float64).tolist()
    raised = changes(policies, grid) > 0  # (B, P)
    always = raised.any(0).sum()
    print(f"some β from 1 to 1,000,000 raises π(a*) for {always:,} of the 1,000 random policies")
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 6))
    standard = one_step_change(policies, 0) > 0  # (P,)
    draw_example(left, grid)
    draw_policies(right, grid, raised, 100 * standard.double().mean())
    for panel in (left, right):
        panel.set(xlabel="β", xscale="log", xlim=(1, 10_000))
        panel.xaxis.set_major_formatter("{x:,.0f}")
    return figure


# --- Figure 2 -------------------------------------------------------------------------------------
class Curve(NamedTuple):
    """The advantages of prompts from the hardest to the easiest."""

    label: str
    style: dict
    accuracy: Tensor  # (P,)
    advantages: Tensor  # (P, N), of the correct samples first

    @property
    def size(self):
        """The mean of |Â| over each group, (P,)."""
        return self.advantages.abs().mean(1)


def binary_groups(samples):
    """Return the groups with 1, 2, … N−1 correct samples, the correct ones first: (N−1, N)."""
    return torch.ones(samples - 1, samples, dtype=torch.float64).tril()


def advantage_curves(betas):
    """Return the curve of pass@4 and that of each β.

    The risk-sensitive advantage depends on p alone, so large groups give smooth curves. An
    estimator of pass@4 depends on N, too: of 16 samples of which fewer than 4 are wrong, any 4
    include a correct one, so that no sample makes a difference.
    """
    sixteen = binary_groups(16)
    style = {"color": "black", "linewidth": 1, "marker": "s"}
    pass_at_4 = chen_advantage(sixteen, k=4)
    curves = [Curve("pass@4", style, sixteen.mean(1), pass_at_4)]
    many = binary_groups(1600)
    for beta, colour in zip(betas, dark_to_light(betas)):
        advantages = risk_sensitive_advantage(many, beta)
        style = {"color": colour}
        curves.append(Curve(f"β = {beta:g}", style, many.mean(1), advantages))
    return curves


def dark_to_light(betas):
    """Return a colour for each β."""
    return plt.cm.plasma(torch.linspace(0, 0.9, len(betas)).tolist())


def print_advantages(curves):
    """Print where each curve has its peak, and how large it is for an easy prompt."""
    print(f"{'':>8}   mean |Â| peaks at p   mean |Â| at p = 15/16")
    for curve in curves:
        peak = curve.accuracy[curve.size.argmax()]
        easy = curve.size[curve.accuracy == 15 / 16].item()
        print(f"{curve.label:>8}   {peak:>19.3f}   {easy:>21.3f}")


def draw_advantages(betas, curves):
    """Draw the advantage over continuous rewards, and each curve over the accuracy of a prompt."""
    figure, panels = plt.subplots(2, 2, figsize=(12, 9))
    continuous, correct, wrong, whole = panels.flat
    rewards = torch.linspace(0, 1, 101, dtype=torch.float64)
    for beta, colour in zip(betas, dark_to_light(betas)):
        advantages = risk_sensitive_advantage(rewards[None], beta)
        continuous.plot(rewards, advantages[0], color=colour)
        peak = 1 / (1 + math.exp(beta / 2))
        whole.axvline(peak, color=colour, linestyle=":", linewidth=1.5)
    for curve in curves:
        p = curve.accuracy
        correct.plot(p, curve.advantages[:, 0], label=curve.label, **curve.style)
        wrong.plot(p, curve.advantages[:, -1], **curve.style)
        whole.plot(p, curve.size, **curve.style)
    for panel in (correct, wrong, whole):
        panel.set(xlabel="accuracy of the prompt, p", ylabel="advantage Â")
    continuous.set_title("Rewards spread evenly from 0 to 1")
    continuous.set(xlabel="reward of the sample", ylabel="advantage Â")
    correct.set(title="A correct sample", ylim=(0, 4))
    correct.legend()
    wrong.set(title="A wrong sample", ylim=(-1, 0.05))
    whole.set_title("The whole group, dotted: 1/(1+exp(β/2))")
    whole.set(ylabel="mean |Â|", ylim=(-0.02, 0.55))
    return figure


def show_advantages(betas):
    """Print the table of Figure 2, and return its picture."""
    curves = advantage_curves(betas)
    print_advantages(curves)
    return draw_advantages(betas, curves)


# --- The command line -----------------------------------------------------------------------------
def main(argv=None):
    parser = argparse.ArgumentParser(usage="python -m evidence.theory [options]")
    parser.description = __doc__.splitlines()[0]
    option = parser.add_argument
    option("--lemmas", action="store_true", help="show only Lemmas 2 to 4")
    option("--advantages", action="store_true", help="show only Figure 2")
    option("--betas", type=float, nargs="+", help="values of β (0 2 4 8, for the lemmas up to 64)")
    option("--seed", type=int, default=0, help="seed of the random policies (0)")
    option("--out", type=Path, default="figures", help="folder of the pictures (figures)")
    args = parser.parse_args(argv)
    betas = args.betas or []
    if not all(abs(beta) <= 1000 for beta in betas):  # nan isn't, either
        parser.error("--betas must be from -1000 to 1000")
    if not 0 <= args.seed < 2**32:
        parser.error("--seed must be at least 0 and less than 2**32")
    plt.switch_backend("agg")  # needs no display
    plt.rcParams.update({"font.size": 15, "lines.linewidth": 3})
    plt.rcParams.update({"figure.constrained_layout.use": True})
    figures = {}
    if args.lemmas or not args.advantages:
        figures["lemmas"] = show_lemmas(betas or [0, 2, 4, 8, 16, 32, 64], args.seed)
    if args.advantages or not args.lemmas:
        figures["advantages"] = show_advantages(betas or [0, 2, 4, 8])
    args.out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        path = args.out / f"{name}.png"
        figure.savefig(path)
        print(f"drew {path}")


if __name__ == "__main__":
    main()
