"""Write evidence/RESULTS.md and its figures from evidence/runs.jsonl: python -m evidence.report

The same runs give the same bytes. Numbers in sentences are computed; where a sentence says that one
method is ahead of another and the runs no longer say so, the report stops and names the two.
"""

import json
import math
import re
import sys
import textwrap
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # no pyplot: no display is needed

from evidence.variants import METHODS
from rs_grpo import BadInput, pass_at_k

HERE = Path(__file__).resolve().parent
FIGURES = HERE.parent / "figures"
DRAWS = 10_000  # of the bootstrap
BINS = ("0", "0–.2", ".2–.4", ".4–.6", ".6–.8", ".8–1")  # of a problem's accuracy: {0}, (0, .2] …
COLORS = "0.55 black tab:blue #f59e42 #d7301f #7f0000 "  # of base, GRPO and four β
COLORS += "tab:green tab:purple tab:brown tab:olive tab:cyan"  # and of other estimators
COLORS = dict(zip(METHODS, COLORS.split()))
TITLES = {
    "pass@1": "held-out pass@1 (%)",
    "pass@32": "held-out pass@32 (%)",
    "reward": "training: mean reward",
    "solve_rate": "training: share of the problems solved at least once",
    "entropy": "training: entropy of the policy (nats a token)",
}


# --- Runs and their statistics --------------------------------------------------------------------
def chosen(lines, testbed, steps, rates, series="main", methods=METHODS, seeds=range(100)):
    """The lines of these settings, and those of the base with the same seeds."""
    lines = [line for line in lines if (line["testbed"], line["series"]) == (testbed, series)]
    kept = []
    for line in lines:
        asked = line["method"] in methods and line["seed"] in seeds
        if asked and line["settings"]["steps"] == steps and line["settings"]["lr"] in rates:
            kept.append(line)
    used = {line["seed"] for line in kept}
    return kept + [line for line in lines if line["method"] == "base" and line["seed"] in used]


class Runs:
    """Lines by name and seed, and their statistics: S seeds, M problems, K values of k.

    A name is that of a method or, with `by_rate`, METHOD@RATE.
    """

    def __init__(self, lines, by_rate=False):
        self.lines, self.seeds = lines, {}  # the latter: from name to seed to line
        for line in sorted(lines, key=place):
            name = line["method"]
            if by_rate and name != "base":
                name += f"@{line['settings']['lr']:g}"
            self.seeds.setdefault(name, {})[line["seed"]] = line
        n = lines[0]["n"]
        self.ks = [2**i for i in range(n.bit_length())]
        self.few = sorted({1, 32, min(256, n)})
        chances = [[100 * pass_at_k(n, c, k) for k in self.ks] for c in range(n + 1)]
        self.chances = np.array(chances)  # (n + 1, K), in percent

    def part(self, part):
        return [name for name in self.seeds if METHODS[method_of(name)].part == part]

    def pass_at_k(self, name, seeds=None):
        """In percent, of these seeds or of all: (S, M, K)."""
        lines = self.seeds[name]
        return self.chances[[lines[seed]["correct"] for seed in seeds or lines]]

    def per_seed(self, name, k):
        """Mean over problems, in percent: (S,)."""
        return self.pass_at_k(name)[..., self.ks.index(k)].mean(1)

    def mean(self, name, k):
        return f"{self.per_seed(name, k).mean():.1f}"

    def field(self, name, *path):
        """One field of each seed's line: (S, …)."""
        values = []
        for line in self.seeds[name].values():
            for key in path:
                line = line[key]
            values.append(line)
        return np.array(values, dtype=float)

    @cache
    def difference(self, name, other):
        """Mean of `name` − `other` at each k (K,), and the bounds of its 95 % interval (2, K).

        The bootstrap resamples problems and training seeds, both with replacement; a problem and a
        seed keep their pairs, since both methods saw the same.
        """
        shared = [seed for seed in self.seeds[name] if seed in self.seeds[other]]
        d = self.pass_at_k(name, shared) - self.pass_at_k(other, shared)  # (S, M, K)
        of_problems, of_seeds = draws(d.shape[1], d.shape[0])
        resampled = np.zeros((DRAWS, len(self.ks)))
        for s, of_seed in enumerate(d):
            resampled += of_seeds[:, [s]] * (of_problems @ of_seed)
        return d.mean((0, 1)), np.percentile(resampled, [2.5, 97.5], axis=0)

    def interval(self, name, other, k):
        """The difference in points, with its interval."""
        mean, (low, high) = self.difference(name, other)
        i = self.ks.index(k)
        return f"{mean[i]:+.1f} ({low[i]:+.1f} to {high[i]:+.1f})"

    def ahead(self, name, other, k):
        """By how many points. Raises BadInput if `name` isn't ahead."""
        points = self.difference(name, other)[0][self.ks.index(k)]
        if points <= 0:
            claim = f"{label(name)} is ahead of {label(other)} at k = {k}"
            raise BadInput(f"it is no longer true that {claim}: mend the sentence in report.py")
        return f"{points:.1f}"

    def made(self, what=""):
        """How many runs, how long they took, and what made them."""
        minutes = sum(line["seconds"] for line in self.lines) / 60
        machines = ", ".join(sorted({line["machine"] for line in self.lines}))
        commits = ", ".join(sorted({line["commit"] for line in self.lines}))
        count = f"{len(self.lines)} runs, {minutes:.0f} minutes of computing on {machines}"
        return f"{what}{': ' if what else ''}{count}; commit {commits}."


def place(line):
    """In the order of the methods, then of the rates, then of the seeds."""
    return list(METHODS).index(line["method"]), line["settings"]["lr"], line["seed"]


@cache
def draws(*counts):
    """For each count, how often each of so many is drawn, as shares: (DRAWS, count)."""
    rng = np.random.default_rng(0)
    return [rng.multinomial(n, np.full(n, 1 / n), DRAWS) / n for n in counts]


def method_of(name):
    return name.partition("@")[0]


def rate_of(name):
    return float(name.partition("@")[2] or 0)


def written(rate):
    """A learning rate as people write it: 2.5e-5."""
    return np.format_float_scientific(rate, trim="-", exp_digits=1)


def label(name):
    rate = f" at {written(rate_of(name))}" if rate_of(name) else ""
    return METHODS[method_of(name)].label + rate


# --- Tables ---------------------------------------------------------------------------------------
def table(head, rows):
    """In Markdown; the first column has no head."""
    lines = ["| " + " | ".join(row) + " |" for row in [["", *head], *rows]]
    return "\n".join([lines[0], "|---" * (len(head) + 1) + "|", *lines[1:]])


def cell(values, digits=1):
    """Mean and standard error over seeds (S,)."""
    error = values.std(ddof=1) / math.sqrt(len(values))
    return f"{values.mean():.{digits}f} ± {error:.{digits}f}"


def method_table(runs, names):
    """A row a method."""
    n = runs.ks[-1]
    ks = [k for k in (1, 4, 32, 256) if k < n] + [n]
    rows = []
    for name in names:
        row = [label(name)]
        row += [cell(runs.per_seed(name, k)) for k in ks]
        row.append(cell(runs.field(name, "distinct").mean(1), 2))
        if name == "base":
            row += ["", ""]
        else:
            row.append(cell(100 * runs.field(name, "training", "solve_rate")[:, -1]))
            row.append(falls_below(runs, name))
        rows.append(row)
    last = ["distinct", "solved in training", "stays below the base from k ="]
    return table([f"pass@{k}" for k in ks] + last, rows)


def falls_below(runs, name):
    """The k from which a method's mean stays below the base's, as text."""
    ours = runs.pass_at_k(name).mean((0, 1))  # (K,)
    reached = np.flatnonzero(ours >= runs.pass_at_k("base").mean((0, 1)))
    below = runs.ks[reached[-1] + 1 :] if len(reached) else runs.ks
    return str(below[0]) if below else f"not up to {runs.ks[-1]}"


def difference_table(runs, pairs):
    """A row a pair: the difference of pass@k in points, with its interval."""
    rows = []
    for name, other in pairs:
        cells = [runs.interval(name, other, k) for k in runs.few]
        rows.append([f"{label(name)} − {label(other)}", *cells])
    return table([f"k = {k}" for k in runs.few], rows)


def beside(other, names):
    return [(name, other) for name in names]


def rate_table(runs):
    """A row a method, a column a learning rate: mean over seeds of pass@k at three k."""
    rates = sorted({rate_of(name) for name in runs.seeds} - {0})
    rows = []
    for method in dict.fromkeys(map(method_of, runs.seeds)):
        row = [label(method)]
        for rate in rates:
            name = method if method == "base" else f"{method}@{rate:g}"
            row.append("/".join(runs.mean(name, k) for k in runs.few if name in runs.seeds))
        rows.append(row)
    return table(list(map(written, rates)), rows)


def rate_pairs(runs):
    """Each method beside GRPO at the same rate."""
    names = [name for name in runs.seeds if method_of(name) not in ("base", "grpo")]
    return [(name, f"grpo@{rate_of(name):g}") for name in names]


# --- Figures --------------------------------------------------------------------------------------
def new_figure(width, height, rows, columns, **shared):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **shared).flatten()


def finish(axes, **settings):
    axes.set(**settings)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(figure, axes):
    lines = axes.get_legend_handles_labels()
    figure.legend(*lines, frameon=False, loc="outside lower center", ncols=5)


def line(axes, name, x, values, **style):
    """Mean over seeds (S, X), with the range of the seeds as a band."""
    axes.plot(x, values.mean(0), color=COLORS[name], label=label(name), **{"lw": 1.8} | style)
    band = {"color": COLORS[name], "alpha": 0.1, "lw": 0}
    axes.fill_between(x, values.min(0), values.max(0), **band)


def over_steps(axes, runs, names, field):
    """A curve of training, or of pass@k on held-out problems."""
    part = "curve" if field.startswith("pass") else "training"
    for name in names:
        line(axes, name, runs.field(name, part, "step")[0], runs.field(name, part, field))
    finish(axes, title=TITLES[field], xlabel="step")


def over_k(axes, runs, names):
    """pass@k over k: the paper's Figure 4."""
    for name in names:
        style = {"ls": "--"} if name == "base" else {}
        line(axes, name, runs.ks, runs.pass_at_k(name).mean(1), **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(runs.ks, map(str, runs.ks))
    finish(axes, title="held-out pass@k (%)", xlabel="k")


def paths(axes, runs, names):
    """Each method's path through the plane of pass@1 and pass@32; bold for GRPO and each β."""
    for name in names:
        x = runs.field(name, "curve", "pass@1").mean(0)
        y = runs.field(name, "curve", "pass@32").mean(0)
        bold = name.startswith(("grpo", "mean", "rs"))
        style = {"lw": 1.8, "marker": "."} if bold else {"lw": 0.8, "alpha": 0.6}
        axes.plot(x, y, color=COLORS[name], **style)
        if bold:
            axes.plot(x[-1], y[-1], "o", color=COLORS[name], ms=9, mec="white")
    axes.plot(x[0], y[0], "s", color=COLORS["base"], ms=8, zorder=3)  # where all start
    axes.annotate("base", (x[0], y[0]), (0, -16), textcoords="offset points", ha="center")
    axes.margins(0.12)  # the word needs room
    title = "from the base to the end, mean over seeds"
    finish(axes, title=title, xlabel="pass@1 (%)", ylabel="pass@32 (%)")


def draw_pass_at_k(runs):
    """On the left the mean, GRPO and RS-GRPO, on the right the other estimators of pass@k."""
    figure, panels = new_figure(11, 4.6, 1, 2, sharey=True)
    over_k(panels[0], runs, ("base", "grpo", "mean", "rs2", "rs4", "rs8"))
    over_k(panels[1], runs, ("base", "rs2", "chen", "mahdavi", "pkpo", "pkpo_loo", "maxrl"))
    for axes, whose in zip(panels, ("RS-GRPO, GRPO and the mean", "other estimators of pass@k")):
        axes.set_title(f"held-out pass@k (%): {whose}")
        axes.legend(frameon=False, loc="lower right", fontsize=9)
    return figure


def draw_panels(runs, names, kinds):
    """Four panels: pass@k over k, paths, or a field over the steps of training."""
    figure, panels = new_figure(11, 7.6, 2, 2)
    for axes, kind in zip(panels, kinds):
        if kind == "pass@k":
            over_k(axes, runs, ["base", *names])
        elif kind == "paths":
            paths(axes, runs, names)
        else:
            over_steps(axes, runs, names, kind)
    legend_below(figure, panels[0])
    return figure


def draw_rates(runs):
    """pass@1, and pass@k at a large k, over the learning rate."""
    figure, panels = new_figure(11, 4.6, 1, 2)
    methods = list(dict.fromkeys(map(method_of, runs.seeds)))
    for axes, k in zip(panels, (1, runs.few[-1])):
        axes.axhline(runs.per_seed("base", k).mean(), color=COLORS["base"], ls="--", label="base")
        for method in methods[1:]:
            names = [name for name in runs.seeds if method_of(name) == method]
            rates = list(map(rate_of, names))
            values = [runs.per_seed(name, k) for name in names]
            color = COLORS[method]
            axes.plot(rates, list(map(np.mean, values)), "o-", color=color, label=label(method))
            low, high = list(map(min, values)), list(map(max, values))
            axes.fill_between(rates, low, high, color=color, alpha=0.15, lw=0)
        axes.set_xscale("log")
        axes.set_xticks(rates, map(written, rates))
        axes.minorticks_off()
        finish(axes, title=f"held-out pass@{k}", xlabel="learning rate", ylabel="%")
    legend_below(figure, panels[0])
    return figure


def draw_diversity(runs):
    """How many different correct answers, and which problems gain: the paper's Figure 7."""
    figure, (bars, *maps) = new_figure(11, 9, 2, 2)
    for i, name in enumerate(runs.part("main")[::-1]):
        values = runs.field(name, "distinct").mean(1)  # (S,)
        error = values.std(ddof=1) / math.sqrt(len(values))
        bars.barh(i, values.mean(), xerr=error, color=COLORS[name], capsize=2, alpha=0.85)
    bars.set_yticks(range(i + 1), map(label, runs.part("main")[::-1]))
    finish(bars, title="distinct correct answers", xlabel=f"a problem, in {runs.ks[-1]} samples")
    titles = {"grpo": "GRPO, another seed", "rs2": "RS-GRPO, β = 2", "rs8": "RS-GRPO, β = 8"}
    for axes, (name, title) in zip(maps, titles.items()):  # the first shows mere luck
        draw_map(axes, runs, name)
        axes.set(title=f"share of problems (%): {title}", xlabel="accuracy under GRPO")
        axes.set_ylabel(f"accuracy under {title}")
    return figure


def draw_map(axes, runs, name):
    """Problems by their accuracy under GRPO and under another method, or another seed of GRPO."""
    other, mine = runs.field("grpo", "correct"), runs.field(name, "correct")  # (S, M)
    if name == "grpo":
        mine = np.roll(mine, -1, axis=0)
    square = np.zeros((len(BINS), len(BINS)))
    for accuracies in zip(mine.flatten() / runs.ks[-1], other.flatten() / runs.ks[-1]):
        square[tuple(math.ceil(5 * accuracy) for accuracy in accuracies)] += 100 / mine.size
    axes.imshow(square, origin="lower", cmap="Reds", vmax=25)
    for (i, j), value in np.ndenumerate(square):
        if value:
            color = "white" if value > 15 else "black"
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=9, color=color)
    axes.plot([-0.5, len(BINS) - 0.5], [-0.5, len(BINS) - 0.5], color="0.4", lw=0.8, ls=":")
    axes.set_xticks(range(len(BINS)), BINS)
    axes.set_yticks(range(len(BINS)), BINS)


# --- The page -------------------------------------------------------------------------------------
HEAD = """# Results

`python -m evidence.report` writes this page and its figures from [`runs.jsonl`](runs.jsonl): change
those, not the page. [README.md](README.md) says how the runs were made.

{contents}

Pass@k is the chance in percent that at least one of k sampled answers is right, averaged over the
same 256 held-out problems. Cells hold mean ± standard error over training seeds; the base isn't
trained, so its seeds are those of sampling. "Distinct" is the number of different correct answers
to a problem, "solved in training" the share of the training problems solved at least once. The last
column is the k from which the mean stays below the base's, by however little.

Differences are in points, with 95 % intervals that resample problems and seeds (10,000 draws) and
keep them in pairs, since runs of one seed saw the same problems. Three or five seeds, resampled,
never leave their own range, so the intervals are too narrow where seeds matter most. An interval
that holds 0 doesn't show that two methods are equal; of so many, a few leave out 0 by luck. The one
contrast fixed beforehand is β = 2 against GRPO."""


def main_page(runs, rates, small):
    """What the main runs show, as blocks of Markdown."""
    trained = runs.part("main")[1:]
    best = max(trained, key=lambda name: runs.per_seed(name, 512).mean())
    level = [name for name in trained if np.prod(runs.difference(name, "base")[1][:, -1]) <= 0]
    at_1 = listed(runs.per_seed(name, 1).mean() for name in ("rs2", "rs4", "rs8"))
    curve = runs.field("grpo", "curve", "pass@32").mean(0)
    return [
        "## Does RS-GRPO keep the pass@k that GRPO loses?",
        f"Yes: at k = 256 GRPO ends {runs.ahead('base', 'grpo', 256)} points below the base, and "
        f"β = 2 ends level with it, {runs.ahead('rs2', 'grpo', 256)} points ahead of GRPO. At k = "
        f"32 it is {runs.ahead('rs2', 'grpo', 32)} points ahead.",
        "This is the embedded model after 800 steps of 32 prompts × 16 samples at a learning rate "
        f"of 5e-5, with 512 samples of each problem. {runs.made('With the side questions below')}",
        "GRPO and the mean baseline fall below the base far sooner than any other method:",
        method_table(runs, ["base", *trained]),
        "Their curves cross the base's early, those of the three β late (left); the other "
        "estimators of pass@k lie where β = 2 lies or above (right):",
        picture("passk"),
        "Every β and every estimator of pass@k gains on GRPO at large k, and most lose at k = 1:",
        difference_table(runs, beside("grpo", trained[1:])),
        "All but PKPO gain on the base at k = 1; GRPO and the mean baseline lose at k = 256:",
        difference_table(runs, beside("base", trained)),
        "## What speaks against it?",
        "GRPO stays ahead at k = 1 and the base at the largest k, and other estimators do as well.",
        f"- At k = 1 GRPO is the best of all, with {runs.mean('grpo', 1)} %. Its lead over β = 2 "
        f"is within the error, {runs.interval('grpo', 'rs2', 1)}, but grows with β: pass@1 is "
        f"{at_1} % for β = 2, 4 and 8.",
        f"- At k = 512 the base leads the best method by {runs.ahead('base', best, 512)} points "
        f"(for {len(level)} of {len(trained)} the interval holds 0), and it finds the most "
        "different answers.",
        "- Four times the learning rate costs β = 2 nearly as much at k = 256 as it costs GRPO, "
        f"{rates.ahead('rs2@5e-05', 'rs2@0.0002', 256)} and "
        f"{rates.ahead('grpo@5e-05', 'grpo@0.0002', 256)} points.",
        "- On the pretrained model, too, GRPO has the best mean at k = 1, "
        f"{small.mean('grpo', 1)} % against {small.mean('rs2', 1)} % for β = 2, and on average it "
        "stays above its base.",
        "- All of this is two small models on one kind of task.",
        "## Is it this formula that helps?",
        "No: what helps is to weigh rare successes more. Chen et al., Mahdavi et al., PKPO "
        "leave-one-out and MaxRL do so by other formulas. From k = 32 on they match β = 2 or beat "
        f"it, and lose {runs.ahead('rs2', 'chen', 1)} to {runs.ahead('rs2', 'pkpo_loo', 1)} "
        "points to it at k = 1. PKPO, with no negative advantages, loses "
        f"{runs.ahead('rs2', 'pkpo', 1)}:",
        difference_table(runs, beside("rs2", trained[5:])),
        "## What does a larger β change?",
        "It solves more training problems at least once and gains more at k = 32, and its reward "
        "rises more slowly, as in the paper's Figure 5. From β = 4 to 8 little is left to gain. "
        "(The kink is the end of the first epoch; held-out curves are of 64 samples a problem.)",
        picture("beta"),
        "## When does GRPO lose?",
        f"After some 300 steps: pass@32 rises from {curve[0]:.1f} to {curve.max():.1f} % and "
        f"falls back to {curve[-1]:.1f} %, while pass@1 goes on rising. At every pass@1 that both "
        "reach, the paths of the three β lie above GRPO's (last panel, with a dot every 100 "
        "steps), so RS-GRPO isn't merely a slower GRPO:",
        picture("methods"),
        "## Which problems gain?",
        f"Those solved now and then: {share(runs, 'grpo', 0, 0)} % of the problems are never "
        f"solved after GRPO, {share(runs, 'rs2', 0, 0)} % after β = 2, {share(runs, 'rs8', 0, 0)} "
        f"% after β = 8 and {share(runs, 'base', 0, 0)} % by the base. In return fewer have an "
        f"accuracy above .8: {share(runs, 'grpo', 0.8, 1)}, {share(runs, 'rs2', 0.8, 1)} and "
        f"{share(runs, 'rs8', 0.8, 1)} %. In the maps each problem stands by its accuracy under "
        "two policies; the first map, GRPO with another seed, shows what luck alone does:",
        picture("diversity"),
    ]


def rates_page(runs):
    """The learning rate of the embedded model."""
    highest = [(f"{name}@0.0002", f"{name}@5e-05") for name in ("grpo", "rs2", "rs8", "maxrl")]
    lost = [runs.ahead(default, high, 256) for high, default in highest]
    return [
        "## Does the learning rate decide it?",
        "No: at each of four rates GRPO is last of four methods at k = 256, β = 2 is third, and β "
        "= 8 and MaxRL lead.",
        f"At half the default rate GRPO keeps {runs.mean('grpo@2.5e-05', 256)} % at k = 256, "
        f"still {runs.ahead('base', 'grpo@2.5e-05', 256)} points below the base (same seeds). At "
        f"four times the default rate GRPO loses {lost[0]} points there, β = 2 {lost[1]}, β = 8 "
        f"{lost[2]} and MaxRL {lost[3]}. A strong preference for rare successes seems to forgive "
        "a large rate; three seeds don't prove it.",
        "Pass@1/@32/@256, at 5e-5 of the five seeds above, at the other rates of seeds 0 to 2. "
        + runs.made(),
        rate_table(runs),
        "Each method beside GRPO at the same rate and, in the end, the largest rate beside the "
        "default one, with the seeds that two runs share:",
        difference_table(runs, rate_pairs(runs) + highest),
        "Pass@1 falls for all at 2e-4; pass@256 falls with the rate, most for GRPO and β = 2:",
        picture("learning-rates"),
    ]


def side_page(runs, three, long, rerun):
    """What was asked with fewer seeds."""
    scaled, partial, scheduled = map(runs.part, ("rescaled", "partial", "schedules"))
    fixed = [(name, beta) for name in scheduled for beta in ("rs2", "rs8")]
    trained = list(long.seeds)[1:]
    lost = (three.per_seed("rs2", 256) - long.per_seed("rs2", 256)).mean()
    return [
        "## Does it hold when training goes on?",
        "Yes: after 2,000 steps β = 2 has caught up with GRPO at k = 1 and is "
        f"{long.ahead('rs2', 'grpo', 32)} points ahead at k = 32, while GRPO ends "
        f"{long.ahead('base', 'grpo', 256)} points below its base at k = 256. There β = 2 has "
        f"lost {lost:.1f} points since step 800 (same seeds), and β = 8 has held. The base is "
        f"still the best at k = 512, by {long.interval('base', 'rs8', 512)} over β = 8.",
        f"GRPO stays below the base from k = 8 on. {long.made()}",
        method_table(long, list(long.seeds)),
        "At large k both β lead GRPO by far, and only GRPO is below the base beyond the error:",
        difference_table(long, beside("grpo", trained[1:]) + beside("base", trained)),
        "## Is it only the size of the advantages?",
        "No: with the advantages of every batch scaled to a mean size |Â| of 0.1, β = 2 leads "
        f"GRPO by {runs.ahead('rs2_rescaled', 'grpo_rescaled', 32)} points at k = 32 and "
        f"{runs.ahead('rs2_rescaled', 'grpo_rescaled', 256)} at k = 256, against "
        f"{three.ahead('rs2', 'grpo', 32)} and {three.ahead('rs2', 'grpo', 256)} unscaled (same "
        "seeds). Adam cancels a constant factor, but estimators differ in size from prompt to "
        "prompt, and the gradient is clipped. Scaling each batch isn't a constant factor either: "
        "it blows up batches with few signals.",
        method_table(runs, scaled),
        "Most of the lead over GRPO survives:",
        difference_table(runs, beside(scaled[0], scaled[1:])),
        "## Does it take rewards other than 0 and 1?",
        "Yes, unchanged, where most estimators of pass@k don't: with partial credit β = 2 leads "
        f"the mean baseline by {runs.ahead('rs2_partial', 'mean_partial', 32)} points at k = 32 "
        f"and {runs.ahead('rs2_partial', 'mean_partial', 256)} at k = 256, against "
        f"{three.ahead('rs2', 'mean', 32)} and {three.ahead('rs2', 'mean', 256)} with exact "
        "rewards (same seeds).",
        "An expression over the right numbers that misses the target by d earns 0.5 / (1 + d); "
        "only exact ones count as correct. Partial credit itself doesn't help: both end a little "
        "lower at large k. Near misses earn reward, and a sum that is off by one is a near miss.",
        method_table(runs, partial),
        difference_table(runs, beside(partial[0], partial[1:])),
        "## Does a β that sets itself do better?",
        "No, as in the paper: nothing tried here beats the best fixed β beyond the error.",
        "The first gives each group the β for which KL(softmax(β r) ‖ uniform) is ln 2 (from "
        "TTT-Discover, arXiv 2601.16175): 2.5 with one success of 16, 3.8 with seven, a cap of 16 "
        "from eight on. It ends where β = 8 ends. The other two (p is the group's accuracy) end "
        "near β = 2, below β = 8 at k = 32 and 256:",
        method_table(runs, scheduled),
        difference_table(runs, fixed),
        "## Does later code give the same?",
        "Yes, within the error. The first table was made before commit 4d215b1, since which other "
        "random numbers are drawn from the same distribution. "
        + rerun.made("Its main contrast again"),
        method_table(rerun, list(rerun.seeds)),
        difference_table(rerun, [("rs2", "grpo")]),
    ]


def small_page(runs, rates):
    """The pretrained model."""
    trained = list(runs.seeds)[1:]
    entropy = runs.field("grpo", "training", "entropy")  # (S, one for every 5 steps)
    one_seed = [runs.per_seed("grpo", k)[1] for k in (1, 64)]
    middle = "grpo@1e-05"
    return [
        "## Does a pretrained model show it, too?",
        "Yes, in a milder form: on SmolLM2-135M-Instruct β = 2 and 8 end "
        f"{runs.ahead('rs2', 'grpo', 32)} and {runs.ahead('rs8', 'grpo', 32)} points ahead of "
        "GRPO at k = 32, but GRPO stays above the base, which solves hardly anything at these k.",
        "The task is Countdown with three numbers, in words and few-shot: 80 steps of 16 prompts "
        f"× 16 samples at 2e-5, 64 samples of each problem. {runs.made()}",
        "Until step 25 all three find their first right answers. Then GRPO settles: at step 35 "
        f"the entropy of its seeds is {listed(entropy[:, 6], 2)} nats a token, in the end "
        f"{listed(entropy[:, -1], 2)}. Seed 1 gives a problem nearly always the same answer: "
        f"{listed(one_seed)} % at k = 1 and 64. Three seeds are few where so much hangs on the "
        f"kind of answer that is found first: GRPO's end at {listed(runs.per_seed('grpo', 1))} % "
        "at k = 1, the best of all runs among them.",
        'On average no method ends below the base (in seed 0, and in seed 1 of the base, "distinct"'
        " counts blanks at the end of an answer, too):",
        method_table(runs, list(runs.seeds)),
        "The two β can't be told from GRPO at k = 1, and are ahead of it at k = 32 and 64:",
        difference_table(runs, beside("grpo", trained[1:]) + beside("base", trained)),
        "GRPO's curve is nearly flat in k and its entropy falls to nothing, while in training "
        "reward the three are alike:",
        picture("pretrained"),
        "## Does the pretrained model's learning rate decide it?",
        "No: at each of three rates β = 2 and 8 are ahead of GRPO at k = 32 and 64. The rate "
        "above is GRPO's best at k = 1, chosen on these held-out problems, which favours GRPO; it "
        "is also the largest tried. At k = 64 GRPO does best at 5e-6, "
        f"{rates.mean('grpo@5e-06', 64)} %, where all are still learning. At 1e-5 its seeds end "
        f"at {listed(rates.per_seed(middle, 1))} % at k = 1 and "
        f"{listed(rates.per_seed(middle, 64))} % at k = 64.",
        "Pass@1/@32/@64, at 5e-6 of seeds 0 and 1, at 1e-5 of three seeds of GRPO and seed 0 of "
        f"the two β. {rates.made()}",
        rate_table(rates),
        "Beside GRPO at the same rate, with the seeds that two runs share:",
        difference_table(rates, rate_pairs(rates)),
        "Pass@1 rises with the rate up to 1e-5 at least; GRPO is last at k = 64 at every rate:",
        picture("pretrained-learning-rates"),
    ]


def picture(name):
    return f"![{name}](../figures/{name}.png)"


def share(runs, name, low, high):
    """Percent of problems with an accuracy in (low, high]; of 0 if both are 0."""
    accuracy = runs.field(name, "correct") / runs.ks[-1]
    inside = (accuracy > low) & (accuracy <= high) if high else accuracy == 0
    return f"{100 * inside.mean():.1f}"


def listed(values, digits=1):
    words = [f"{value:.{digits}f}" for value in values]
    return f"{', '.join(words[:-1])} and {words[-1]}"


def anchor(heading):
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def filled(block):
    """A paragraph in lines of 100 columns; a table, a heading or a picture as it is."""
    if block[0] in "#|!":
        return block
    indent = "  " if block[0] == "-" else ""
    return textwrap.fill(block, 100, subsequent_indent=indent, break_on_hyphens=False)


def results(lines):
    """The page, and its figures by name."""
    default, all_rates = [5e-5], [2.5e-5, 5e-5, 1e-4, 2e-4]
    four = ["grpo", "rs2", "rs8", "maxrl"]
    main = Runs(chosen(lines, "countdown", 800, default))
    three = Runs(chosen(lines, "countdown", 800, default, seeds=range(3)))
    rates = Runs(chosen(lines, "countdown", 800, all_rates, methods=four), by_rate=True)
    long = Runs(chosen(lines, "countdown", 2000, default))
    rerun = Runs(chosen(lines, "countdown", 800, default, series="rerun"))
    small = Runs(chosen(lines, "pretrained", 80, [2e-5]))
    small_rates = Runs(chosen(lines, "pretrained", 80, [5e-6, 1e-5, 2e-5]), by_rate=True)
    blocks = main_page(main, rates, small) + rates_page(rates)
    blocks += side_page(main, three, long, rerun) + small_page(small, small_rates)
    headings = [block.removeprefix("## ") for block in blocks if block.startswith("##")]
    contents = "\n".join(f"- [{heading}](#{anchor(heading)})" for heading in headings)
    page = "\n\n".join([HEAD.format(contents=contents), *map(filled, blocks)]) + "\n"
    betas, trained = ("mean", "rs2", "rs4", "rs8"), main.part("main")[1:]
    figures = {
        "passk": draw_pass_at_k(main),
        "beta": draw_panels(main, betas, ("solve_rate", "reward", "pass@1", "pass@32")),
        "methods": draw_panels(main, trained, ("pass@1", "pass@32", "entropy", "paths")),
        "diversity": draw_diversity(main),
        "learning-rates": draw_rates(rates),
        "pretrained": draw_panels(small, four[:3], ("pass@k", "paths", "reward", "entropy")),
        "pretrained-learning-rates": draw_rates(small_rates),
    }
    return page, figures


def main():
    lines = [json.loads(line) for line in (HERE / "runs.jsonl").open()]
    try:
        page, figures = results(lines)
    except BadInput as error:
        sys.exit(f"report.py: {error}")
    (HERE / "RESULTS.md").write_text(page)
    for name, figure in figures.items():
        figure.savefig(FIGURES / f"{name}.png", dpi=130)


if __name__ == "__main__":
    main()
