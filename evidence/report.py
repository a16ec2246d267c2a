"""Write RESULTS.md and its figures from runs.jsonl: python -m evidence.report

The text is in RESULTS.template.md. A placeholder in it, {{SET: METHOD ARGUMENTS at …}}, is replaced
by what this method of `Runs` returns for a set of `sets_of`: {{main: mean grpo at 32}} is GRPO's
pass@32. The same runs give the same bytes.
"""

import json
import math
import re
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # no pyplot: no display is needed

from evidence.variants import METHODS
from rs_grpo import pass_at_k

HERE = Path(__file__).resolve().parent
NOTE = "<!-- Written by `python -m evidence.report`: edit RESULTS.template.md instead. -->\n\n"
DRAWS = 10_000  # of the bootstrap
RATE = {"countdown": 5e-5, "pretrained": 2e-5}  # unless a run's name says another
LABELS = {name: method.label for name, method in METHODS.items()}
COLORS = {
    "base": "0.55",
    "grpo": "black",
    "mean": "tab:blue",
    "rs2": "#f59e42",
    "rs4": "#d7301f",
    "rs8": "#7f0000",
    "chen": "tab:green",
    "mahdavi": "tab:purple",
    "pkpo": "tab:brown",
    "pkpo_loo": "tab:olive",
    "maxrl": "tab:cyan",
}
MAIN = list(COLORS)
FOUR = ["grpo", "rs2", "rs8", "maxrl"]  # compared at several learning rates
TITLES = {
    "pass@1": "held-out pass@1 (%)",
    "pass@32": "held-out pass@32 (%)",
    "reward": "training: mean reward",
    "solve_rate": "training: share of the problems solved at least once",
    "entropy": "training: entropy of the policy (nats a token)",
}


class Runs:
    """The lines of some runs and of the base, by name: S seeds, M problems, n samples of each.

    A name is METHOD@RATE, as in rs2@5e-5; METHOD alone is short for its testbed's own rate.
    """

    def __init__(self, lines, testbed="countdown", steps=800, seeds=range(5), series="main"):
        self.lines = {}  # from name to seed to line
        for line in sorted(lines, key=lambda line: line["seed"]):
            settings = line["settings"]
            fits = settings["steps"] in (steps, 0) and line["seed"] in seeds
            if not fits or (line["testbed"], line["series"]) != (testbed, series):
                continue
            rate = settings["lr"]
            name = line["method"]
            self.lines.setdefault(f"{name}@{written(rate)}", {})[line["seed"]] = line
            if rate == RATE[testbed]:
                self.lines.setdefault(name, {})[line["seed"]] = line
            self.n = line["n"]
        self.ks = [2**i for i in range(self.n.bit_length())]

    def field(self, name, *path):
        """One field of each seed's line: (S, …)."""
        values = []
        for line in self.lines[name].values():
            for key in path:
                line = line[key]
            values.append(line)
        return np.array(values, dtype=float)

    def curve(self, name, field):
        """Steps (X,) and values (X, S): of training or, for pass@k, of held-out problems."""
        part = "curve" if field.startswith("pass") else "training"
        steps = self.field(name, part, "step")[0]
        return steps, self.field(name, part, field).T

    def pass_at_k(self, name, k):
        """In percent: (S, M)."""
        correct = self.field(name, "correct").astype(int)
        return chances(self.n, int(k))[correct]

    def per_seed(self, name, k):
        """Mean over problems: (S,)."""
        return self.pass_at_k(name, k).mean(1)

    def difference(self, pair, k):
        """Of the pair "A - B", in points: the mean of A − B, and the bounds of its 95 % interval.

        The bootstrap resamples problems and training seeds, both with replacement. Both methods
        share each draw, since both saw the same problems and seeds.
        """
        a, b = pair.split(" - ")
        shared_a = [seed in self.lines[b] for seed in self.lines[a]]
        shared_b = [seed in self.lines[a] for seed in self.lines[b]]
        d = self.pass_at_k(a, k)[shared_a] - self.pass_at_k(b, k)[shared_b]  # (S, M)
        of_problems, of_seeds = draws(d.shape[1], d.shape[0])
        resampled = (of_problems @ d.T * of_seeds).sum(1)  # (DRAWS,)
        low, high = np.percentile(resampled, [2.5, 97.5])
        return d.mean(), low, high

    # The methods below return text, for placeholders. Several k are written with what joins them.
    def mean(self, name, ks):
        """pass@k, mean over seeds."""
        return "/".join(f"{self.per_seed(name, k).mean():.1f}" for k in ks.split("/"))

    def each(self, name, k):
        """pass@k of each seed."""
        return ", ".join(f"{value:.1f}" for value in self.per_seed(name, k))

    def points(self, pair, k):
        """By how many points one method is ahead of the other."""
        mean, _, _ = self.difference(pair, k)
        return f"{mean:.1f}"

    def interval(self, pair, ks):
        """The difference in points, with its interval."""
        differences = [self.difference(pair, k) for k in ks.split(" | ")]
        cell = "{:+.1f} ({:+.1f} to {:+.1f})"
        return " | ".join(cell.format(*difference) for difference in differences)

    def step(self, name, field, step):
        """A field at one step, mean over seeds."""
        steps, values = self.curve(name, field)
        return f"{values[steps == int(step)].mean():#.3g}"

    def row(self, name, ks):
        """Cells: pass@k, different correct answers and, unless it's the base, two more."""
        cells = [cell(self.per_seed(name, k)) for k in ks.split(" | ")]
        cells.append(cell(self.field(name, "distinct").mean(1), 2))
        if name != "base":
            _, solved = self.curve(name, "solve_rate")
            cells.append(cell(100 * solved[-1]))
            cells.append(self.falls_below(name))
        return " | ".join(cells)

    def falls_below(self, name):
        """The k from which a method's mean stays below the base's."""
        for k in self.ks[::-1]:
            lead = self.pass_at_k(name, k).mean() - self.pass_at_k("base", k).mean()
            if lead >= 0:
                return f"{2 * k}" if k < self.n else f"not up to {k}"
        return "1"


@cache
def chances(n, k):
    """pass@k in percent for each number of correct samples: (n + 1,)."""
    return np.array([100 * pass_at_k(n, c, k) for c in range(n + 1)])


@cache
def draws(*counts):
    """For each count, how often each of so many is drawn, as shares: (DRAWS, count)."""
    rng = np.random.default_rng(0)
    return [rng.multinomial(n, np.full(n, 1 / n), DRAWS) / n for n in counts]


def written(rate):
    """A learning rate as people write it: 2.5e-5."""
    return np.format_float_scientific(rate, trim="-", exp_digits=1)


def cell(values, digits=1):
    """Mean and standard error over seeds (S,)."""
    return f"{values.mean():.{digits}f} ± {standard_error(values):.{digits}f}"


def standard_error(values):
    return values.std(ddof=1) / math.sqrt(len(values))


def sets_of(lines):
    return {
        "main": Runs(lines),
        "three": Runs(lines, seeds=range(3)),
        "long": Runs(lines, steps=2000, seeds=range(3)),
        "rerun": Runs(lines, series="rerun"),
        "small": Runs(lines, "pretrained", 80),
    }


def filled(template, sets):
    """The template with its placeholders filled in."""

    def replacement(found):
        which, method, text = found.groups()
        return getattr(sets[which], method)(*text.split(" at "))

    return re.sub(r"\{\{(\w+): (\w+) (.+?)\}\}", replacement, template)


def line(axes, name, x, columns, style="-"):
    """The mean of each column over x, with the range of its seeds as a band."""
    color = COLORS[name]
    means = [column.mean() for column in columns]
    low = [column.min() for column in columns]
    high = [column.max() for column in columns]
    axes.plot(x, means, style, color=color, label=LABELS[name], lw=1.8)
    axes.fill_between(x, low, high, color=color, alpha=0.1, lw=0)


def over_steps(axes, runs, names, field):
    for name in names:
        line(axes, name, *runs.curve(name, field))
    axes.set(title=TITLES[field], xlabel="step")


def over_k(axes, runs, names, about=""):
    """pass@k over k: the paper's Figure 4."""
    for name in ["base", *names]:
        values = [runs.per_seed(name, k) for k in runs.ks]
        line(axes, name, runs.ks, values, "--" if name == "base" else "-")
    axes.set_xscale("log", base=2)
    axes.set_xticks(runs.ks, map(str, runs.ks))
    axes.set(title=f"held-out pass@k (%){about}", xlabel="k")


def paths(axes, runs, names):
    """Each method's path through the plane of pass@1 and pass@32; bold for GRPO and each β."""
    for name in names:
        _, x = runs.curve(name, "pass@1")
        _, y = runs.curve(name, "pass@32")
        x, y = x.mean(1), y.mean(1)
        color = COLORS[name]
        if name.startswith(("grpo", "mean", "rs")):
            axes.plot(x, y, ".-", color=color, lw=1.8)
            axes.plot(x[-1], y[-1], "o", color=color, ms=9, mec="white")
        else:
            axes.plot(x, y, color=color, lw=0.8, alpha=0.6)
    start = (x[0], y[0])
    axes.plot(*start, "s", color=COLORS["base"], ms=8)
    axes.annotate("base", start, (0, -16), textcoords="offset points", ha="center")
    axes.margins(0.12)  # the word needs room
    axes.set(title="from the base to the end, mean over seeds")
    axes.set(xlabel="pass@1 (%)", ylabel="pass@32 (%)")


def new_figure(height, rows, **shared):
    figure = Figure(figsize=(11, height), layout="constrained")
    return figure, figure.subplots(rows, 2, **shared).flatten()


def finish(axes):
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(figure, axes):
    lines = axes.get_legend_handles_labels()
    figure.legend(*lines, frameon=False, loc="outside lower center", ncols=5)


def draw_panels(runs, names, fields):
    """Four panels: pass@k over k, paths, or a field over the steps of training."""
    figure, panels = new_figure(7.6, 2)
    for axes, field in zip(panels, fields):
        if field == "pass@k":
            over_k(axes, runs, names)
        elif field == "paths":
            paths(axes, runs, names)
        else:
            over_steps(axes, runs, names, field)
        finish(axes)
    legend_below(figure, panels[0])
    return figure


def draw_pass_at_k(runs):
    figure, (left, right) = new_figure(4.6, 1, sharey=True)
    over_k(left, runs, MAIN[1:6], ": RS-GRPO, GRPO and the mean")
    over_k(right, runs, ["rs2", *MAIN[6:]], ": other estimators of pass@k")
    for axes in (left, right):
        axes.legend(frameon=False, loc="lower right", fontsize=9)
        finish(axes)
    return figure


def draw_rates(runs, methods, rates, large):
    """pass@1, and pass@k at a large k, over the learning rate."""
    figure, panels = new_figure(4.6, 1)
    for axes, k in zip(panels, (1, large)):
        base = runs.per_seed("base", k).mean()
        axes.axhline(base, color=COLORS["base"], ls="--", label="base")
        x = [float(rate) for rate in rates]
        for method in methods:
            values = [runs.per_seed(f"{method}@{rate}", k) for rate in rates]
            line(axes, method, x, values, "o-")
        axes.set_xscale("log")
        axes.set_xticks(x, rates)
        axes.minorticks_off()
        axes.set(title=f"held-out pass@{k}", xlabel="learning rate", ylabel="%")
        finish(axes)
    legend_below(figure, panels[0])
    return figure


def draw_diversity(runs):
    """How many different correct answers, and how many problems are solved how often."""
    figure, (bars, accuracies) = new_figure(4.2, 1)
    for name in MAIN[::-1]:
        values = runs.field(name, "distinct").mean(1)  # (S,)
        bars.barh(LABELS[name], values.mean(), xerr=standard_error(values), color=COLORS[name])
    bars.set(title="distinct correct answers", xlabel=f"a problem, in {runs.n} samples")
    for name in ("base", "grpo", "rs2", "rs8"):
        accuracy = np.sort(runs.pass_at_k(name, 1), axis=None)[::-1]  # all seeds
        share = np.linspace(0, 100, len(accuracy))
        accuracies.plot(accuracy, share, color=COLORS[name], label=LABELS[name])
    accuracies.set(title="problems solved at least so often (%)", xlabel="accuracy (%)")
    accuracies.legend(frameon=False)
    for axes in (bars, accuracies):
        finish(axes)
    return figure


def figures_of(main, small):
    """The figures by name."""
    rates = ["2.5e-5", "5e-5", "1e-4", "2e-4"]
    small_rates = ["5e-6", "1e-5", "2e-5"]
    three = FOUR[:3]
    return {
        "passk": draw_pass_at_k(main),
        "beta": draw_panels(main, MAIN[2:6], ["solve_rate", "reward", "pass@1", "pass@32"]),
        "methods": draw_panels(main, MAIN[1:], ["pass@1", "pass@32", "entropy", "paths"]),
        "diversity": draw_diversity(main),
        "learning-rates": draw_rates(main, FOUR, rates, 256),
        "pretrained": draw_panels(small, three, ["pass@k", "paths", "reward", "entropy"]),
        "pretrained-learning-rates": draw_rates(small, three, small_rates, 64),
    }


def main():
    lines = [json.loads(line) for line in (HERE / "runs.jsonl").open()]
    sets = sets_of(lines)
    template = (HERE / "RESULTS.template.md").read_text()
    (HERE / "RESULTS.md").write_text(NOTE + filled(template, sets))
    for name, figure in figures_of(sets["main"], sets["small"]).items():
        figure.savefig(HERE.parent / f"figures/{name}.png", dpi=130)


if __name__ == "__main__":
    main()
