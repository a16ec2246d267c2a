"""Escape from a local optimum: the bandit of Risk-Sensitive GRPO (arXiv 2509.24261), many seeds.

A policy over 100 arms starts around an arm that pays 0.6 and gives the best one, which pays 1.0, a
chance of 0.4 %. The gradient of the mean reward (β = 0) settles for 0.6. The one thing changed here
is β in `risk_sensitive_advantage`, the function that `rs_grpo.py` trains language models with: from
β = 4 on all 10 seeds climb to 1.0, at β = 8 soonest (the paper's Figure 3).

    python bandit.py                7 values of β, 10 seeds, 400,000 pulls each, in 9 seconds
    python bandit.py --lemmas       one exact update of π(best arm), over β (Lemmas 2 to 4)
    python bandit.py --advantages   which samples the advantage weighs up and down (Figure 2)

Each prints a table and draws a picture into figures/: bandit.png, lemmas.png or advantages.png.

Legend: K arms, B values of β, S seeds, R = B·S runs side by side, N pulls in an update (the group),
T updates; `logits` θ and the policy π = softmax(θ); `rewards` r; `arms` those pulled; a* the best;
P random policies.
"""

import argparse
import math
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm import tqdm

from rs_grpo import risk_sensitive_advantage

ESCAPED = 0.8  # an expected reward half way from the local optimum, 0.6, to the global one, 1.0


def landscape() -> tuple[Tensor, Tensor]:
    """Rewards (K,), 1.0 at arm 40 and 0.6 at arm 75, and logits (K,) of a policy around arm 75."""
    x = torch.arange(100, dtype=torch.float64)
    high, low = torch.exp(-((x - 40) ** 2) / 50), torch.exp(-((x - 75) ** 2) / 50)
    logits = (low + 0.1).log()
    return 0.1 + 0.9 * high + 0.5 * low, logits - logits.mean()


def update(
    logits: Tensor, rewards: Tensor, beta: float | Tensor, uniforms: Tensor, lr: float
) -> Tensor:
    """One policy-gradient step of every run, in place: θ ← θ + lr · (1/N) Σ_i Â_i ∇ log π(a_i).

    For a softmax, ∇ log π(a) = onehot(a) − π. The advantages of a group sum to zero, so π drops out
    of the sum and each pull moves the logit of its own arm only.
    logits: (R, K). rewards: (K,). beta: a number, or (R, 1). uniforms: (R, N) in [0, 1), one for
    each pull. Returns the expected reward of each run before the step, (R,).
    """
    probs = logits.softmax(1)  # (R, K)
    cumulative = probs.cumsum(1)  # (R, K)
    arms = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:])  # (R, N)
    advantages = risk_sensitive_advantage(rewards[arms], beta)  # (R, N)
    logits.scatter_add_(1, arms, advantages * (lr / arms.shape[1]))
    return probs @ rewards


def run(betas: list[float], seeds: int, steps: int, lr: float, batch: int, seed: int = 0) -> Tensor:
    """Expected reward after 0, 1, … T updates, for every β and every seed at once: (T+1, B, S).

    Each seed has its own stream of random numbers, and every β sees the same ones. So two values of
    β differ by β alone, and a run doesn't depend on which others run beside it.
    """
    rewards, start = landscape()
    streams = [torch.Generator().manual_seed(seed + s) for s in range(seeds)]
    drawn = [torch.rand(steps, batch, generator=g, dtype=torch.float64) for g in streams]
    uniforms = torch.stack(drawn, 1)  # (T, S, N)
    beta = torch.tensor(betas, dtype=torch.float64).repeat_interleave(seeds)[:, None]  # (R, 1)
    logits = start.repeat(len(beta), 1)  # (R, K)
    curve = torch.empty(steps + 1, len(beta), dtype=torch.float64)  # (T+1, R)
    for t in tqdm(range(steps), unit=" updates", unit_scale=True):
        curve[t] = update(logits, rewards, beta, uniforms[t].repeat(len(betas), 1), lr)
    curve[steps] = logits.softmax(1) @ rewards
    return curve.view(steps + 1, len(betas), seeds)


def updates_until_escape(curve: Tensor) -> Tensor:
    """Updates until the expected reward reaches 0.8, else infinite: (T+1, S) to (S,)."""
    reached = curve >= ESCAPED
    return torch.where(reached.any(0), reached.int().argmax(0).double(), math.inf)


def show_bandit(args: argparse.Namespace) -> plt.Figure:
    """Figure 3: every β and seed learns; a table and a picture of how far and how fast."""
    curve = run(args.betas, args.seeds, args.steps, args.lr, args.batch, args.seed)  # (T+1, B, S)
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 6))
    rewards, start = landscape()
    left.plot(rewards, color="black")
    left.set(title="What the arms pay, and where the policy starts")
    left.set(ylabel="reward", ylim=(0, 1.12))
    left.set_xticks([40, 75], ["arm 40,\nglobal optimum", "arm 75,\nlocal optimum"])
    policy = left.twinx()
    policy.fill_between(range(100), start.softmax(0), color="C1", alpha=0.4, linewidth=0)
    policy.set(ylabel="initial probability (shaded)", ylim=(0, 0.112))

    print(f"{'β':>6}   reward at the end   seeds escaped   updates until {ESCAPED}: median (range)")
    shown = torch.linspace(0, args.steps, min(args.steps, 1000) + 1, dtype=torch.float64).long()
    pulls = shown.numpy() * args.batch / 1000  # in thousands
    colours = dark_to_light(args.betas)
    label = {"weight": "bold", "ha": "center", "va": "center", "clip_on": True}
    for beta, colour, line in zip(args.betas, colours, curve.unbind(1)):  # line: (T+1, S)
        updates = updates_until_escape(line)  # (S,)
        middle, escaped = median(updates.tolist()), f"{updates.isfinite().sum()}/{args.seeds}"
        when = f"{middle:,.0f} ({updates.min():,.0f} to {updates.max():,.0f})"
        when = when if updates.min() < math.inf else "never"
        end = f"{line[-1].mean():.3f} ± {line[-1].std(correction=0):.3f}"
        print(f"{beta:>6g}   {end:>17}   {escaped:>13}   {when}")
        band = line[shown]
        right.fill_between(pulls, band.amin(1), band.amax(1), color=colour, alpha=0.25, linewidth=0)
        right.plot(pulls, band.quantile(0.5, dim=1), color=colour, label=f"β = {beta:g}")
        if middle < math.inf:
            text = right.text(middle * args.batch / 1000, ESCAPED, f"{beta:g}", **label)
            text.set(color=colour, bbox={"color": "white", "pad": 1})
    right.set_xscale("log", base=2)  # shows whether the time doubles with β
    right.xaxis.set_major_formatter("{x:g}")
    right.set(title=f"Learning: median and range, {args.seeds} seeds", xlabel="thousand pulls")
    right.set(ylabel="expected reward", xlim=(pulls[-1] / 64, pulls[-1]), ylim=(0, 1.12))
    right.legend(loc="lower left", ncols=2)
    return figure


# π = (.01, .80, .19) on r = (1, .6, 0), settled for the second-best arm: as a group, and rewards
ARMS = torch.tensor([[0] * 1 + [1] * 80 + [2] * 19])
EXAMPLE = ARMS, torch.tensor([[1.0, 0.6, 0.0]], dtype=torch.float64)


def one_step_change(arms: Tensor, rewards: Tensor, beta: float | Tensor) -> Tensor:
    """δπ(a*)/α = π(a*) · mean_i Â_i (1[a_i = a*] − π(a_i)): an exact step of small size α.

    Nothing is sampled: the group holds every arm in exact proportion to its probability, so that
    its mean is the expectation of Theorem 1. EXAMPLE: −4.8e-4 at β = 0, −4.8e-5 at 4, +3.6e-4 at 8,
    +9.0e-4 at 16, +5.2e-4 at 32. As β → ∞, β δπ(a*)/α → π(a*) [(1−π(a*))² + Σ_{j≠a*} π_j²], which
    is positive (Lemma 3) and fixed (Lemma 4).
    arms: (P, N), the groups. rewards: (P, K). beta: a number, or (P, 1). Returns (P,).
    """
    share = torch.full(arms.shape, 1 / arms.shape[1], dtype=rewards.dtype)  # (P, N), of each member
    probs = torch.zeros_like(rewards).scatter_add_(1, arms, share)  # (P, K)
    advantages = risk_sensitive_advantage(rewards.gather(1, arms), beta)  # (P, N)
    best = rewards.argmax(1, keepdim=True)  # (P, 1)
    score = (arms == best).double() - probs.gather(1, arms)  # (P, N)
    return (probs.gather(1, best) * advantages * score).mean(1)


def random_bandits(number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """10 arms: groups (P, 200) of policies from nearly even to nearly settled, rewards (P, 10)."""
    rng = torch.Generator().manual_seed(seed)
    scale = 3 * torch.rand(number, 1, generator=rng)
    probs = (scale * torch.randn(number, 10, generator=rng)).softmax(1)
    drawn = probs.multinomial(190, replacement=True, generator=rng)
    every = torch.arange(10).repeat(number, 1)  # each arm at least once, so that none has π = 0
    rewards = torch.rand(number, 10, dtype=torch.float64, generator=rng)
    return torch.cat([every, drawn], 1), rewards


def show_lemmas(args: argparse.Namespace) -> plt.Figure:
    """Lemmas 2 to 4: δπ(a*)/α over β, for the worked example and for 1,000 random policies."""
    policies = random_bandits(1_000, args.seed)
    print(f"{'β':>6}   worked example: δπ(a*)/α   times β   random policies that raise π(a*)")
    for beta in args.betas:
        change = one_step_change(*EXAMPLE, beta).item()
        raised = (one_step_change(*policies, beta) > 0).sum().item()
        scaled = beta * change if beta else 0
        print(f"{beta:>6g}   {change:>24.1e}   {scaled:>7.4f}   {raised:>32,}")
    grid = torch.logspace(0, 6, 121, dtype=torch.float64)  # (G,), β from 1 to 1,000,000
    raised = torch.stack([one_step_change(*policies, beta) for beta in grid]) > 0  # (G, P)
    always = raised.any(0).sum()
    print(f"some β from 1 to 1,000,000 raises π(a*) for {always:,} of the 1,000 random policies")

    figure, (one, many) = plt.subplots(1, 2, figsize=(15, 6))
    exact = 1e4 * one_step_change(*EXAMPLE, grid[:, None])
    limit = 1e4 * 0.01 * (0.99**2 + 0.80**2 + 0.19**2) / grid
    standard = 1e4 * one_step_change(*EXAMPLE, 0).item()
    one.plot(grid, exact, color="C0", label="risk-sensitive")
    one.plot(grid, limit, "k:", label="limit, as 1/β")
    one.axhline(standard, color="C1", linestyle="--", label="standard, β = 0")
    one.axhline(0, color="grey", linewidth=1)
    one.set(title="One policy, settled on the second-best arm", ylim=(-6, 11))
    one.set(ylabel="10⁴ × change of π(a*)")
    one.legend()
    standard = 100 * (one_step_change(*policies, 0) > 0).double().mean()
    many.plot(grid, 100 * raised.double().mean(1), color="C0")
    many.axhline(standard, color="C1", linestyle="--")
    many.set(title="1,000 random policies", ylabel="percent that raise π(a*)", ylim=(75, 101))
    for panel in (one, many):
        panel.set(xlabel="β", xscale="log", xlim=(1, 10_000))
        panel.xaxis.set_major_formatter("{x:,.0f}")
    return figure


def pass_at_4_advantage(groups: Tensor) -> Tensor:
    """Pass@k training (Chen et al., arXiv 2508.10751) at k = 4: binary rewards (P, N) to (P, N)."""
    n, rows = groups.shape[1], []
    for group in groups:
        wrong = n - int(group.sum())
        miss = math.comb(wrong, 4) / math.comb(n, 4)  # no success among 4 samples
        beside = math.comb(max(wrong - 1, 0), 3) / math.comb(n - 1, 3)  # … 3 beside a wrong one
        std = math.sqrt(miss * (1 - miss)) + 1e-6
        rows.append(torch.where(group == 1, miss / std, (miss - beside) / std))
    return torch.stack(rows)


def show_advantages(args: argparse.Namespace) -> plt.Figure:
    """Figure 2: the advantage over continuous rewards, and over a prompt's accuracy p.

    The risk-sensitive advantage depends on p alone, so large groups give smooth curves. An
    estimator of pass@4 depends on N too: with fewer than 4 wrong samples of 16, any 4 of them hold
    a correct one, so no sample makes a difference.
    """
    figure, ((continuous, correct), (wrong, whole)) = plt.subplots(2, 2, figsize=(12, 9))
    evenly = torch.linspace(0, 1, 101, dtype=torch.float64)
    many, sixteen = (torch.ones(n - 1, n, dtype=torch.float64).tril() for n in (1600, 16))
    style = {"color": "black", "linewidth": 1, "marker": "s"}
    curves = [("pass@4", sixteen, pass_at_4_advantage(sixteen), style)]  # 1 to N−1 correct, first
    for beta, colour in zip(args.betas, dark_to_light(args.betas)):
        continuous.plot(evenly, risk_sensitive_advantage(evenly[None], beta)[0], color=colour)
        advantages = risk_sensitive_advantage(many, beta)
        curves.append((f"β = {beta:g}", many, advantages, {"color": colour}))
        whole.axvline(1 / (1 + math.exp(beta / 2)), color=colour, linestyle=":", linewidth=1.5)
    print(f"{'':>8}   mean |Â| peaks at p   mean |Â| at p = 15/16")
    for label, groups, advantages, style in curves:
        p, total = groups.mean(1), advantages.abs().mean(1)
        print(f"{label:>8}   {p[total.argmax()]:>19.3f}   {total[p == 15 / 16].item():>21.3f}")
        panels = {correct: advantages[:, 0], wrong: advantages[:, -1], whole: total}
        for panel, curve in panels.items():
            panel.plot(p, curve, label=label, **style)
            panel.set(xlabel="accuracy of the prompt, p", ylabel="advantage Â")
    continuous.set(title="Rewards spread evenly from 0 to 1")
    continuous.set(xlabel="reward of the sample", ylabel="advantage Â")
    correct.set(title="A correct sample", ylim=(0, 4))
    correct.legend()
    wrong.set(title="A wrong sample", ylim=(-1, 0.05))
    whole.set(title="The whole group, dotted: 1/(1+exp(β/2))")
    whole.set(ylabel="mean |Â|", ylim=(-0.02, 0.55))
    return figure


def dark_to_light(betas: list[float]):
    return plt.cm.plasma(torch.linspace(0, 0.9, len(betas)).tolist())


OPTIONS = (
    ("steps", 25_000, "updates of the bandit"),
    ("seeds", 10, "runs of the bandit for each β"),
    ("lr", 0.1, "learning rate of the bandit"),
    ("batch", 16, "pulls of the bandit in each update"),
    ("seed", 0, "first of the random seeds"),
    ("out", Path("figures"), "folder for the picture"),
)


def main(argv: list[str] | None = None) -> None:
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    plt.switch_backend("agg")  # needs no display
    plt.rcParams.update({"font.size": 15, "lines.linewidth": 3})
    plt.rcParams.update({"figure.constrained_layout.use": True})
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.error = lambda message: parser.exit(2, f"bandit.py: {message}\n")  # no usage
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--lemmas", action="store_true", help="show Lemmas 2 to 4 instead")
    mode.add_argument("--advantages", action="store_true", help="show Figure 2 instead")
    which = "values of β (0 2 4 8 16 32 64; with --advantages 0 2 4 8)"
    parser.add_argument("--betas", type=float, nargs="+", help=which)
    for name, default, text in OPTIONS:
        kind = {"type": type(default), "default": default}
        parser.add_argument(f"--{name}", help=f"{text} (%(default)s)", **kind)
    args = parser.parse_args(argv)
    args.betas = args.betas or ([0, 2, 4, 8] if args.advantages else [0, 2, 4, 8, 16, 32, 64])
    finite = all(abs(beta) <= 1000 for beta in args.betas)  # nan isn't
    pulls = args.steps * args.seeds * args.batch
    for holds, rule in [
        (finite, "--betas must be from -1000 to 1000"),
        (min(args.steps, args.seeds) >= 1, "--steps and --seeds must be at least 1"),
        (args.batch >= 2, "--batch must be at least 2, as one pull alone has no advantage"),
        (pulls <= 10**8, "--steps x --seeds x --batch must be at most 100 million"),
        (0 < args.lr <= 1000, "--lr must be above 0 and at most 1000"),
        (0 <= args.seed < 2**32, "--seed must be at least 0 and less than 2**32"),
    ]:
        if not holds:
            parser.error(rule)
    name = "lemmas" if args.lemmas else "advantages" if args.advantages else "bandit"
    show = {"lemmas": show_lemmas, "advantages": show_advantages, "bandit": show_bandit}[name]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        show(args).savefig(args.out / f"{name}.png")
    except OSError as error:
        parser.error(f"can't write: {error}")
    print(f"drew {args.out / name}.png")


if __name__ == "__main__":
    main()
