"""Escape from a local optimum: the bandit of Risk-Sensitive GRPO (arXiv 2509.24261, Figure 3), with error bars.

A policy over 100 arms starts around an arm that pays 0.6 and gives the best one, which pays 1.0, a chance of 0.4 %. The
gradient of the mean reward (β = 0) settles for 0.6. The one thing changed here is β in `risk_sensitive_advantage`, the
function that `rs_grpo.py` trains language models with: from β = 4 on all 10 seeds climb to 1.0, at β = 8 soonest.

    python bandit.py                7 values of β, 10 seeds, 400,000 pulls each; draws figures/bandit.png
    python bandit.py --lemmas       one exact update of π(best arm), over β (Lemmas 2 to 4); figures/lemmas.png
    python bandit.py --advantages   which samples the advantage weighs up and down (Figure 2); figures/advantages.png

The first takes 9 seconds on one core of an AMD EPYC, 5 of them for 28 million pulls (0.2 µs each). The first half of
the file is the bandit and the lemmas; Figure 2, pictures and options follow.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from rs_grpo import chen_advantage, risk_sensitive_advantage

# Legend: K arms · B values of β · S seeds · R = B·S runs side by side · N pulls in an update (the group) · T updates
# `logits` θ, the policy is π = softmax(θ) · `rewards` r · `arms` the arms pulled · a* the best arm · P random policies

ARMS = 100
ESCAPED = 0.8  # an expected reward half way from the local optimum, 0.6, to the global one, 1.0


# ---------------------------------------------------------------------------
# The bandit (Figure 3)
# ---------------------------------------------------------------------------


def landscape() -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards of the arms (K,), 1.0 at arm 40 and 0.6 at arm 75, and logits (K,) of a policy that favours arm 75."""
    x = torch.arange(ARMS, dtype=torch.float64)
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
    arms = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:])  # (R, N), the first arm to reach the uniform
    advantages = risk_sensitive_advantage(rewards[arms], beta)  # (R, N)
    logits.scatter_add_(1, arms, advantages * (lr / arms.shape[1]))
    return probs @ rewards


def run(betas: Sequence[float], seeds: int, steps: int, lr: float, batch: int, seed: int = 0) -> torch.Tensor:
    """Expected reward after 0, 1, … T updates, for every β and every seed at once: (T+1, B, S).

    Each seed has its own stream of random numbers, and every β sees the same ones. So two values of β differ by β
    alone, and a run doesn't depend on which others run beside it.
    """
    rewards, start = landscape()
    beta = torch.tensor(betas, dtype=torch.float64).repeat_interleave(seeds)[:, None]  # (R, 1)
    streams = [torch.Generator().manual_seed(seed + s) for s in range(seeds)]
    uniforms = torch.stack([torch.rand(steps, batch, generator=g, dtype=beta.dtype) for g in streams], 1)  # (T, S, N)
    logits = start.repeat(len(beta), 1)  # (R, K)
    curve = torch.empty(steps + 1, len(beta), dtype=torch.float64)  # (T+1, R)
    for t in tqdm(range(steps), unit=" updates", unit_scale=True):
        curve[t] = update(logits, rewards, beta, uniforms[t].repeat(len(betas), 1), lr)
    curve[steps] = logits.softmax(1) @ rewards
    return curve.view(steps + 1, len(betas), seeds)


def updates_until_escape(curve: torch.Tensor) -> torch.Tensor:
    """Updates until the expected reward first reaches 0.8, infinite if it never does: (T+1, B, S) to (B, S)."""
    reached = curve >= ESCAPED
    return torch.where(reached.any(0), reached.int().argmax(0).double(), math.inf)


def show_bandit(args: argparse.Namespace) -> None:
    """Run every β and seed; print and draw what they learned."""
    began = time.perf_counter()
    curve = run(args.betas, args.seeds, args.steps, args.lr, args.batch, args.seed)  # (T+1, B, S)
    wall = time.perf_counter() - began
    print(f"{'β':>6}   expected reward at the end   seeds escaped   updates until {ESCAPED}: median (range)")
    for beta, end, updates in zip(args.betas, curve[-1], updates_until_escape(curve)):
        times = statistics.median(updates.tolist()), updates.min(), updates.max()
        median, first, last = (f"{t:,.0f}" if t < math.inf else "never" for t in times)
        when = "-" if first == "never" else f"{median} ({first} to {last})"
        escaped = f"{int(updates.isfinite().sum())}/{args.seeds}"
        print(f"{beta:>6g}   {f'{end.mean():.3f} ± {end.std(correction=0):.3f}':>26}   {escaped:>13}   {when:>35}")
    pulls = curve[1:].numel() * args.batch
    print(f"{pulls:,} pulls in {wall:.1f} s, {1e6 * wall / pulls:.2f} µs a pull")
    draw_bandit(args, curve)


# ---------------------------------------------------------------------------
# The lemmas: the exact change of π(a*) in one small update
# ---------------------------------------------------------------------------

EXAMPLE = torch.tensor([[1, 80, 19]]), torch.tensor([[1.0, 0.6, 0.0]], dtype=torch.float64)  # counts and rewards (1, 3)


def one_step_change(counts: torch.Tensor, rewards: torch.Tensor, beta: float | torch.Tensor) -> torch.Tensor:
    """δπ(a*)/α = π* [ π* A* − Σ_j π_j² A_j ]: what an exact gradient step of small size α does to the best arm.

    Theorem 1 has the expectation over the policy where `risk_sensitive_advantage` has the mean over a group. The two
    are equal for a group that holds every arm in proportion to its probability. So a policy is given by whole numbers,
    π = counts / N, and its group holds arm j counts_j times. EXAMPLE, π = (.01, .80, .19), has settled for the second
    best of r = (1, .6, 0): −4.8e-4 at β = 0, −4.8e-5 at 4, +3.6e-4 at 8, +9.0e-4 at 16, +5.2e-4 at 32.

    counts: (P, K), at least 1 each, with the same sum N in every row. rewards: (P, K). beta: a number, or (P, 1).
    Returns (P,).
    """
    group = rewards.flatten().repeat_interleave(counts.flatten()).view(len(counts), -1)  # (P, N)
    first_copy = counts.cumsum(1) - counts  # (P, K), where in the group each arm's copies begin
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


def random_bandits(number: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """10 arms: counts (P, 10) of 200 for policies from nearly even to nearly settled, rewards (P, 10) in [0, 1)."""
    rng = torch.Generator().manual_seed(seed)
    sharpness = 3 * torch.rand(number, 1, generator=rng)
    probs = (sharpness * torch.randn(number, 10, generator=rng)).softmax(1)
    drawn = probs.multinomial(190, replacement=True, generator=rng)  # (P, 190), beside one copy of every arm
    counts = torch.ones(number, 10, dtype=torch.long).scatter_add_(1, drawn, torch.ones_like(drawn))
    return counts, torch.rand(number, 10, dtype=torch.float64, generator=rng)


def show_lemmas(args: argparse.Namespace) -> None:
    """Print and draw δπ(a*)/α over β, for the worked example and for 1,000 random policies."""
    policies = random_bandits(1_000, args.seed)
    limit = limit_of_change(*policies)  # (P,)
    print(f"{'β':>6}   worked example: δπ(a*)/α   random policies that raise π(a*)   median of β·δπ(a*)/α to its limit")
    for beta in args.betas:
        changes = one_step_change(*policies, beta)  # (P,)
        raised = f"{int((changes > 0).sum()):,} of {len(changes):,}"
        ratio = f"{(changes * beta / limit).median():.3f}" if beta > 0 else "-"
        print(f"{beta:>6g}   {one_step_change(*EXAMPLE, beta).item():>24.1e}   {raised:>32}   {ratio:>35}")
    grid = torch.logspace(0, 6, 151, dtype=torch.float64)  # (G,), β from 1 to 1,000,000
    raised = torch.stack([one_step_change(*policies, beta) for beta in grid]) > 0  # (G, P)
    print(f"some β from 1 to 1,000,000 raises π(a*) for {int(raised.any(0).sum()):,} of {len(limit):,} random policies")
    draw_lemmas(args, policies, grid, raised)


# ---------------------------------------------------------------------------
# The advantages (Figure 2)
# ---------------------------------------------------------------------------


def by_accuracy(estimator: Callable[[torch.Tensor], torch.Tensor], size: int) -> tuple[torch.Tensor, ...]:
    """Over groups of `size` with c = 1 … size−1 correct: p = c/size, Â of a correct sample, Â of a wrong one, mean |Â|.

    estimator: maps rewards (P, size) to advantages (P, size). Returns four tensors (size−1,).
    """
    c = torch.arange(1, size, dtype=torch.float64)[:, None]
    advantages = estimator((torch.arange(size) < c).double())  # (size−1, size), the correct samples first
    return c[:, 0] / size, advantages[:, 0], advantages[:, -1], advantages.abs().mean(1)


def show_advantages(args: argparse.Namespace) -> None:
    """Print and draw the advantage over continuous rewards and over a prompt's accuracy, beside a pass@k estimator's.

    The risk-sensitive advantage depends on p alone, so groups of 1,000 give smooth curves. Pass@4 depends on N too:
    with fewer than 4 wrong samples of 16, any 4 of them hold a correct one, so no sample makes a difference.
    """
    figure, (continuous, *panels) = canvas(2, 2, 12, 9)
    evenly = torch.linspace(0, 1, 101, dtype=torch.float64)  # (N,), one group
    pass_at_4 = partial(chen_advantage, k=4)
    print(f"{'':>9}   mean |Â| largest at p   1/(1+e^(β/2))   Â right/wrong: 1 of 16         8 of 16         15 of 16")
    for beta, colour in zip(args.betas, colours(args.betas)):
        estimator = partial(risk_sensitive_advantage, beta=beta)
        continuous.plot(evenly, estimator(evenly[None])[0], color=colour, label=f"β = {beta:g}")
        p, *curves = by_accuracy(estimator, 1000)
        for panel, curve in zip(panels, curves):
            panel.plot(p, curve, color=colour)
        peak = p[curves[2].argmax()]
        panels[2].plot(peak, curves[2].max(), "o", color=colour, markersize=11)
        predicted = torch.tensor(-beta / 2).sigmoid()
        print(f"β = {beta:<5g}   {peak:>21.3f}   {predicted:>13.3f}   {three_groups(estimator)}")
    print(f"{'pass@4':<9}   {'-':>21}   {'-':>13}   {three_groups(pass_at_4)}")

    p, *curves = by_accuracy(pass_at_4, 16)
    for panel, curve in zip(panels, curves):
        panel.plot(p, curve, "s--", color="black", linewidth=1.5, label="pass@4 (Chen et al.), 16 samples")
        panel.set(xlabel="accuracy of the prompt, p", ylabel="advantage Â")
    continuous.set(title="Rewards spread evenly from 0 to 1", xlabel="reward of the sample", ylabel="advantage Â")
    continuous.legend()
    panels[0].set(title="A correct sample", ylim=(0, 4))
    panels[0].legend()
    panels[1].set(title="A wrong sample", ylim=(-1, 0.05))
    panels[2].set(title="The whole group, dots at 1/(1+exp(β/2))", ylabel="mean |Â|", ylim=(0, 0.55))
    arrow = {"arrowstyle": "->", "color": "grey"}
    panels[2].annotate("pass@4 is\nexactly 0", (14 / 16, 0), (1, 0.46), ha="right", arrowprops=arrow)
    save(figure, args.out / "advantages.png")


def three_groups(estimator: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """Â of a correct and of a wrong sample, in groups of 16 with 1, 8 and 15 correct."""
    _, correct, wrong, _ = by_accuracy(estimator, 16)
    pairs = [f"{correct[c - 1]:.3g}/{wrong[c - 1]:.3g}" for c in (1, 8, 15)]
    return f"{pairs[0]:>22} {pairs[1]:>15} {pairs[2]:>16}"


# ---------------------------------------------------------------------------
# Pictures and the command line
# ---------------------------------------------------------------------------

OPTIONS = {  # default as in the authors' code, which has one seed · least · most · meaning
    "steps": (25_000, 1, 10_000_000, "updates of the bandit"),
    "seeds": (10, 1, 100_000, "runs of the bandit for each β"),
    "lr": (0.1, 1e-6, 1_000, "learning rate of the bandit"),
    "batch": (16, 2, 100_000, "pulls of the bandit in each update"),  # one pull alone has no advantage
    "seed": (0, 0, 2**32, "first of the random seeds"),
}
BLUE, ORANGE = "#0072b2", "#d55e00"
LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}


def canvas(rows: int, columns: int, width: float, height: float) -> tuple:
    """A figure of `width` by `height` inches and its axes. matplotlib is loaded only here, and needs no display."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"font.size": 15, "lines.linewidth": 3, "legend.frameon": False})
    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(rows, columns).flatten()


def colours(betas: Sequence[float]) -> list:
    """A colour for each β, from dark to light, so that they differ in lightness as well as in hue."""
    import matplotlib

    return [matplotlib.colormaps["plasma"](0.9 * i / max(1, len(betas) - 1)) for i in range(len(betas))]


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})
    print(f"drew {path}")


def draw_bandit(args: argparse.Namespace, curve: torch.Tensor) -> None:
    figure, (left, right) = canvas(1, 2, 15, 6)
    rewards, start = landscape()
    left.plot(rewards, color="black")
    left.set(title="What the arms pay, and where the policy starts", xlabel="arm", ylabel="reward", ylim=(0, 1.12))
    left.text(40, 1.03, "global optimum", ha="center")
    left.text(75, 0.63, "local optimum", ha="center")
    policy = left.twinx()
    policy.fill_between(range(ARMS), start.softmax(0), color=ORANGE, alpha=0.4, linewidth=0)
    policy.set_ylabel("initial probability", color=ORANGE)
    policy.tick_params(axis="y", colors=ORANGE)
    policy.set_ylim(0, 0.112)
    shown = torch.linspace(0, args.steps, min(args.steps, 1000) + 1).long()  # about one point for each pixel
    pulls = shown * args.batch / 1000
    for beta, colour, line in zip(args.betas, colours(args.betas), curve[shown].unbind(1)):
        middle = line.quantile(0.5, dim=1)
        right.fill_between(pulls, line.amin(1), line.amax(1), color=colour, alpha=0.25, linewidth=0)
        right.plot(pulls, middle, color=colour, label=f"β = {beta:g}")
        if middle[-1] >= ESCAPED:
            at = pulls[(middle >= ESCAPED).int().argmax()].item()
            right.text(at, ESCAPED, f"{beta:g}", color=colour, weight="bold", ha="center", va="center", bbox=LABEL)
    last = args.steps * args.batch / 1000
    right.hlines([0.6, 1.0], 0, last, color="grey", linestyle=":", linewidth=1.5, zorder=0)
    right.set(title=f"Learning: median and range, {args.seeds} seeds", xlim=(last / 64, last), ylim=(0, 1.12))
    right.set(xlabel="thousand pulls", ylabel="expected reward")
    right.set_xscale("log", base=2)  # the distance between two doublings of β shows whether the time doubles too
    right.xaxis.set_major_formatter("{x:g}")
    right.legend(loc="lower left", ncols=2)
    save(figure, args.out / "bandit.png")


def draw_lemmas(
    args: argparse.Namespace, policies: tuple[torch.Tensor, torch.Tensor], grid: torch.Tensor, raised: torch.Tensor
) -> None:
    figure, (one, many) = canvas(1, 2, 15, 6)
    counts, rewards = (t.expand(len(grid), -1) for t in EXAMPLE)
    one.plot(grid, 1e4 * one_step_change(counts, rewards, grid[:, None]), color=BLUE, label="risk-sensitive")
    one.axhline(1e4 * one_step_change(*EXAMPLE, 0).item(), color=ORANGE, linestyle="--", label="standard, β = 0")
    one.plot(grid, 1e4 * limit_of_change(*EXAMPLE) / grid, "k:", label="limit, as 1/β")
    one.axhline(0, color="grey", linewidth=1)
    one.set(title="One policy, settled on the second-best arm", ylabel="10⁴ × change of π(a*)", ylim=(-6, 11))
    one.legend(loc="upper right")
    many.plot(grid, 100 * raised.double().mean(1), color=BLUE, label="risk-sensitive")
    standard = 100 * (one_step_change(*policies, 0) > 0).double().mean()
    many.axhline(standard, color=ORANGE, linestyle="--", label="standard, β = 0")
    many.legend(loc="center right")
    many.set(title="1,000 random policies", ylabel="percent that raise π(a*)", ylim=(75, 101))
    for axis in (one, many):
        axis.set(xlabel="β", xscale="log", xlim=(1, 10_000))
        axis.set_xticks([1, 10, 100, 1_000, 10_000], ["1", "10", "100", "1,000", "10,000"])
    save(figure, args.out / "lemmas.png")


def main(argv: Sequence[str] | None = None) -> None:
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread, and wait for it if a core is busy
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"bandit.py: {message}\n")  # one sentence, no usage
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--lemmas", dest="show", action="store_const", const=show_lemmas, help="show Lemmas 2 to 4")
    mode.add_argument("--advantages", dest="show", action="store_const", const=show_advantages, help="show Figure 2")
    parser.set_defaults(show=show_bandit)
    parser.add_argument("--betas", type=float, nargs="+", help="values of β, 12 at most")
    for name, (default, _, _, meaning) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), help=f"{meaning} ({default:,})")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder for the picture (figures)")
    args = parser.parse_args(argv)
    for name, (default, least, most, _) in OPTIONS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.show is not show_bandit and name != "seed":
            parser.error(f"--{name} is for the bandit; leave it out with --lemmas and --advantages")
        if not least <= getattr(args, name) <= most:  # nan fails too
            parser.error(f"--{name} must be from {least:,} to {most:,}, got {getattr(args, name)}")
    args.betas = sorted(set(args.betas or (0, 2, 4, 8) + (16, 32, 64) * (args.show is not show_advantages)))
    if len(args.betas) > 12 or not all(abs(beta) <= 1e6 for beta in args.betas):
        parser.error(f"--betas takes at most 12 numbers from -1,000,000 to 1,000,000, got {args.betas}")
    numbers = args.seeds * (2 * args.steps * args.batch + len(args.betas) * (args.steps + 10 * (ARMS + args.batch)))
    if numbers > 5e8:
        parser.error(f"this needs {8e-9 * numbers:,.0f} GB of memory; ask for fewer steps, seeds, pulls or values of β")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()  # a folder that can't be written to says so now, not after the run
        args.show(args)
    except (OSError, ModuleNotFoundError) as error:
        parser.error(f"can't draw into {args.out}: {error}")
    except KeyboardInterrupt:
        parser.exit(130, "\nbandit.py: interrupted, no picture was drawn\n")


if __name__ == "__main__":
    main()
