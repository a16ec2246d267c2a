"""Write RESULTS.md and its figures from runs.jsonl: python -m evidence.report

The text is in RESULTS.template.md. A placeholder in it, {{SET: FUNCTION ARGUMENTS at …}}, becomes
what this function of `Runs` returns for a set of `sets_of`: {{main: mean grpo at 32}} is GRPO's
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
from rs_grpo import EMBEDDED, pass_at_k

HERE = Path(__file__).resolve().parent
NOTE = "<!-- Written by `python -m evidence.report`: edit RESULTS.template.md instead. -->\n\n"
DRAWS = 10_000  # of the bootstrap
RATE = {"countdown": 5e-5, "pretrained": 2e-5}  # unless a run's name says another
STEPS = {"countdown": 800, "pretrained": 80}  # unless a run's name says others
LABELS = {name: method.label for name, method in METHODS.items()}
MAIN = [name for name, method in METHODS.items() if method.part == "main"]
PALETTE = ["0.55", "black", "tab:blue", "#f59e42", "#d7301f", "#7f0000"]
PALETTE += ["tab:green", "tab:purple", "tab:brown", "tab:olive", "tab:cyan"]
COLORS = dict(zip(MAIN, PALETTE))
TITLES = {
    "reward": "training: mean reward",
    "solve_rate": "training: share of the problems solved at least once",
    "entropy": "training: entropy of the policy (nats per token)",
}


class Runs:
    """The lines of some runs and of the base, by name: S seeds, M problems, n samples of each.

    Lines of 0 steps are those of the base and of evaluations at other temperatures.
    """

    def __init__(self, lines, testbed="countdown", seeds=range(5), part=slice(256)):
        self.part = part  # of the held-out problems
        self.lines = {}  # from name to seed to line
        for line in sorted(lines, key=sort_key):
            seed = line["seed"]
            if seed in seeds and line["testbed"] == testbed:
                by_seed = self.lines.setdefault(name_of(line), {})
                by_seed[seed] = line
                self.n = line["n"]
        self.ks = [2**i for i in range(self.n.bit_length())]

    def family(self, name, sign):
        """The names of this run and of those that differ in λ (+), temperature (~) or rate (@)."""
        return [other for other in self.lines if other.split(sign)[0] == name]

    def field(self, name, field):
        """One field of each seed's line: (S, …)."""
        lines = self.lines[name].values()
        return np.array([line[field] for line in lines])

    def curve(self, name, field):
        """Steps (X,) and values (X, S): of training or, for pass@k, of held-out problems."""
        kind = "curve" if field.startswith("pass") else "training"
        curves = self.field(name, kind)  # (S,), of dicts
        steps = np.array(curves[0]["step"])
        values = np.array([curve[field] for curve in curves])
        return steps, values.T

    def pass_at_k(self, name, k):
        """In percent: (S, M)."""
        correct = self.field(name, "correct")[:, self.part]
        return chances(self.n, int(k))[correct]

    def per_seed(self, name, k):
        """Mean pass@k over problems, in percent: (S,)."""
        return self.pass_at_k(name, k).mean(1)

    def average(self, name, k):
        return self.per_seed(name, k).mean()

    def best(self, name, k):
        """pass@k at the temperature where its mean over seeds is highest: (S,)."""
        values = [self.per_seed(other, k) for other in self.family(name, "~")]
        return max(values, key=np.mean)

    def distinct(self, name):
        """Mean number of different correct answers to a problem: (S,)."""
        return self.field(name, "distinct")[:, self.part].mean(1)

    def difference(self, pair, k):
        """Of the pair "A - B", in points: the mean of A − B, and the bounds of its 95 % interval.

        The bootstrap resamples problems and training seeds, both with replacement. Both methods
        share each draw, since both saw the same problems and seeds.
        """
        a, b = pair.split(" - ")
        shared_a = [seed in self.lines[b] for seed in self.lines[a]]
        shared_b = [seed in self.lines[a] for seed in self.lines[b]]
        rates_a = self.pass_at_k(a, k)[shared_a]  # (S, M)
        rates_b = self.pass_at_k(b, k)[shared_b]
        d = rates_a - rates_b
        of_problems, of_seeds = draws(d.shape[1], d.shape[0])
        resampled = (of_problems @ d.T * of_seeds).sum(1)  # (DRAWS,)
        low, high = np.percentile(resampled, [2.5, 97.5])
        return d.mean(), low, high

    # The methods below return text, for placeholders. Several k are written with what joins them.
    def mean(self, name, ks):
        """pass@k, mean over seeds."""
        return "/".join(f"{self.average(name, k):.1f}" for k in ks.split("/"))

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
        cells.append(cell(self.distinct(name), 2))
        if name != "base":
            _, solved = self.curve(name, "solve_rate")
            cells.append(cell(100 * solved[-1]))
            cells.append(self.falls_below(name))
        return " | ".join(cells)

    def falls_below(self, name):
        """The k from which a method's mean stays below the base's, over the seeds of both."""
        for k in self.ks[::-1]:
            lead, _, _ = self.difference(f"{name} - base", k)
            if lead >= 0:
                return f"{2 * k}" if k < self.n else f"not up to {k}"
        return "1"


def name_of(line):
    """A run's method and what is unusual: /steps, +λ of a KL penalty, ~temperature, @rate."""
    settings = line["settings"]
    name = line["method"]
    if settings["steps"] not in (0, STEPS[line["testbed"]]):
        name += f"/{settings['steps']}"
    if settings.get("kl"):
        name += f"+{settings['kl']:g}"
    if settings["temperature"] != 1:
        name += f"~{settings['temperature']:g}"
    if settings["lr"] != RATE[line["testbed"]]:
        name += f"@{written(settings['lr'])}"
    return name


def sort_key(line):
    settings = line["settings"]
    return settings["lr"], settings.get("kl", 0), settings["temperature"], line["seed"]


@cache
def chances(n, k):
    """pass@k in percent for each number of correct samples: (n + 1,)."""
    values = [pass_at_k(n, c, k) for c in range(n + 1)]
    return 100 * np.array(values)


@cache
def draws(*counts):
    """For each count n, how often each of n is drawn, divided by n: (DRAWS, n)."""
    rng = np.random.default_rng(0)
    shares = []
    for n in counts:
        drawn = rng.multinomial(n, np.full(n, 1 / n), DRAWS)
        shares.append(drawn / n)
    return shares


def written(rate):
    """A learning rate as people write it: 2.5e-5."""
    return np.format_float_scientific(rate, trim="-", exp_digits=1)


def cell(values, digits=1):
    """Mean and standard error over seeds (S,)."""
    return f"{values.mean():.{digits}f} ± {standard_error(values):.{digits}f}"


def standard_error(values):
    return values.std(ddof=1) / math.sqrt(len(values))


def solved_by_sums():
    """Whether adding and subtracting can solve a held-out problem: (256,), of bool."""
    found = []
    for question in (EMBEDDED / "held-out.txt").open():
        *numbers, target = map(int, re.findall("[0-9]+", question))
        sums = {0}
        for number in numbers:
            sums = {total + sign * number for total in sums for sign in (1, -1)}
        found.append(target in sums)
    return np.array(found[:256])


def sets_of(lines):
    """The sets that placeholders and figures name."""
    by_sums = solved_by_sums()
    main = [line for line in lines if line["series"] == "main"]
    early = [line for line in lines if line["commit"] == "before 4d215b1"]
    return {
        "main": Runs(main),
        "three": Runs(main, seeds=range(3)),
        "chosen": Runs(main, seeds=range(3), part=slice(256, 512)),
        "last": Runs(main, seeds=(3, 4)),
        "sums": Runs(main, part=np.flatnonzero(by_sums)),
        "others": Runs(main, part=np.flatnonzero(~by_sums)),
        "before": Runs(early),
        "early": Runs(early, seeds=range(3)),
        "small": Runs(main, "pretrained"),
    }


def filled(template, sets):
    """The template with its placeholders filled in."""

    def replacement(found):
        which, method, text = found.groups()
        return getattr(sets[which], method)(*text.split(" at "))

    return re.sub(r"\{\{(\w+): (\w+) (.+?)\}\}", replacement, template)


def band(axes, name, x, values, style="-"):
    """The mean of values (X, S) over x, with the range of its seeds as a band."""
    color = COLORS[name.split("~")[0]]
    axes.plot(x, values.mean(1), style, color=color, label=LABELS.get(name))
    axes.fill_between(x, values.min(1), values.max(1), color=color, alpha=0.1)


def over_steps(axes, runs, names, field):
    for name in names:
        band(axes, name, *runs.curve(name, field))
    axes.set(title=TITLES.get(field, f"held-out {field} (%)"), xlabel="step")


def over_k(axes, runs, names, suffix="", value=Runs.per_seed):
    """pass@k against k: the paper's Figure 4."""
    for name in ["base", *names]:
        values = np.array([value(runs, name, k) for k in runs.ks])
        band(axes, name, runs.ks, values, "--" if name == "base" else "-")
        _, _, temperature = name.partition("~")
        end = 0 if temperature > "1" else -1  # where its curve is apart from the others
        side = "left" if end else "right"
        point = runs.ks[end], values[end].mean()
        axes.annotate(f" {temperature} ", point, ha=side, va="center", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(runs.ks, map(str, runs.ks))
    axes.set(title=f"held-out pass@k (%){suffix}", xlabel="k")


def paths(axes, runs, names):
    """Each method's path through the plane of pass@1 and pass@32, from the base to the end."""
    for name in names:
        _, x = runs.curve(name, "pass@1")
        _, y = runs.curve(name, "pass@32")
        x, y = x.mean(1), y.mean(1)
        axes.plot(x, y, ".-", color=COLORS[name])
        axes.plot(x[-1], y[-1], "o", color=COLORS[name], ms=9)
    axes.plot(x[0], y[0], "s", color=COLORS["base"], label="base")
    axes.set(title="mean over seeds", xlabel="pass@1 (%)", ylabel="pass@32 (%)")


def plane(axes, runs, methods, sign, k, title):
    """Each method's path through the plane of pass@1 and pass@k, over a rate or a weight."""
    for method in methods:
        names = runs.family(method, sign)
        x = [runs.average(name, 1) for name in names]
        y = [runs.average(name, k) for name in names]
        axes.plot(x, y, "o-", color=COLORS[method], label=LABELS[method])
        for name, *point in zip(names, x, y):
            word = name.partition(sign)[2]
            axes.annotate(word, point, (5, 4), textcoords="offset points", fontsize=8)
    base = runs.average("base", 1), runs.average("base", k)
    axes.plot(*base, "s", color=COLORS["base"], label="base")
    axes.set(title=title, xlabel="pass@1 (%)", ylabel=f"pass@{k} (%)")


def draw(*panels):
    """A figure of panels, two a row. A panel is a function of axes, with its other arguments."""
    rows = len(panels) // 2
    figure = Figure(figsize=(11, 1.4 + 3.2 * rows), layout="constrained")
    legend = {}  # from label to line
    all_axes = figure.subplots(rows, 2).flatten()
    for axes, (function, *arguments) in zip(all_axes, panels):
        function(axes, *arguments)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        lines, labels = axes.get_legend_handles_labels()
        legend |= dict(zip(labels, lines))
    figure.legend(legend.values(), legend, frameon=False, loc="outside lower center", ncols=5)
    return figure


def figures_of(sets):
    """The figures by name."""
    main = sets["main"]
    three = sets["three"]
    small = sets["small"]
    betas = MAIN[2:6]
    few = ["grpo", "rs2", "rs8"]
    at_each = three.family("grpo", "~")
    return {
        "passk": draw(
            (over_k, main, MAIN[1:6], ": RS-GRPO, GRPO and the mean"),
            (over_k, main, ["rs2", *MAIN[6:]], ": other advantages"),
        ),
        "beta": draw(
            (over_steps, main, betas, "solve_rate"),
            (over_steps, main, betas, "reward"),
            (over_steps, main, betas, "pass@1"),
            (over_steps, main, betas, "pass@32"),
        ),
        "methods": draw(
            (over_steps, main, MAIN[1:], "pass@1"),
            (over_steps, main, MAIN[1:], "pass@32"),
            (over_steps, main, MAIN[1:], "entropy"),
            (paths, main, MAIN[1:6]),
        ),
        "learning-rates": draw(
            (plane, three, [*few, "maxrl"], "@", 256, "embedded model (no label: 5e-5)"),
            (plane, small, few, "@", 64, "pretrained model (no label: 2e-5)"),
        ),
        "penalties": draw(
            (plane, three, few, "+", 32, "no label: without a penalty"),
            (plane, three, few, "+", 256, "the same at k = 256"),
        ),
        "temperatures": draw(
            (over_k, three, [*few, "rs4"], ", each k at its best temperature", Runs.best),
            (over_k, three, ["rs2", *at_each], ": GRPO at seven temperatures"),
        ),
        "pretrained": draw(
            (over_k, small, few),
            (paths, small, few),
            (over_steps, small, few, "reward"),
            (over_steps, small, few, "entropy"),
        ),
    }


def main():
    lines = [json.loads(line) for line in (HERE / "runs.jsonl").open()]
    sets = sets_of(lines)
    template = (HERE / "RESULTS.template.md").read_text()
    (HERE / "RESULTS.md").write_text(NOTE + filled(template, sets))
    for name, figure in figures_of(sets).items():
        figure.savefig(HERE.parent / f"figures/{name}.png", dpi=130)


if __name__ == "__main__":
    main()
