"""Tables and figures of a file of results; `compare.py --report` prints and draws them."""

import math
import sys
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # no pyplot: no display is needed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rs_grpo import BadInput, pass_at_k  # noqa: E402

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
DRAWS = 10_000  # of the bootstrap
DIFFERENCES = "Differences in points, with 95 % intervals that resample problems and seeds:"
BINS = ("0", "0–.2", ".2–.4", ".4–.6", ".6–.8", ".8–1")  # of a problem's accuracy: {0}, (0, .2] …


class Runs:
    """Results as arrays: for each run of S seeds M problems, and k = 1, 2, 4 … n.

    A run is named by its method, or `METHOD@RATE` where a learning rate is given.
    """

    def __init__(self, results, methods):
        self.methods = methods
        names = [name for name in results["runs"] if method_of(name) in methods]
        if "base" not in names:
            raise BadInput("there is no finished run of the base yet; run compare.py first")
        names.sort(key=lambda name: list(methods).index(method_of(name)))
        self.entries = {name: results["runs"][name] for name in names}
        self.rates = sorted(set(map(rate_of, names)) - {0})  # that were compared
        n = results["settings"]["eval_samples"]
        self.ks = sorted({2**i for i in range(n.bit_length())} | {n})
        chances = [[100 * pass_at_k(n, c, k) for k in self.ks] for c in range(n + 1)]
        self.pass_at_k = {}  # (S, M, K), in percent
        for name, seeds in self.entries.items():
            correct = [entry["correct"] for entry in seeds.values()]
            self.pass_at_k[name] = np.array(chances)[correct]

    def label(self, name):
        rate = f" at {written(rate_of(name))}" if rate_of(name) else ""
        return self.methods[method_of(name)].label + rate

    def of_part(self, part):
        return [name for name in self.entries if self.methods[method_of(name)].part == part]

    def field(self, name, *path):
        """One field of each seed's entry: (S, …)."""
        values = []
        for entry in self.entries[name].values():
            for key in path:
                entry = entry[key]
            values.append(entry)
        return np.array(values, dtype=float)

    def difference(self, name, other):
        """Mean of `name` − `other` at each k (K,), and the bounds of its 95 % interval (2, K).

        The bootstrap resamples problems and training seeds, both with replacement; a problem and a
        seed keep their pairs, since both methods saw the same. Few seeds make it rough: three of
        them resampled never leave their own range.
        """
        shared = [seed for seed in self.entries[name] if seed in self.entries[other]]
        a, b = (
            self.pass_at_k[run][[list(self.entries[run]).index(seed) for seed in shared]]
            for run in (name, other)
        )
        d = a - b  # (S, M, K)
        of_problems, of_seeds = draws(d.shape[1], d.shape[0])
        resampled = sum(
            of_seeds[:, [s]] * (of_problems @ d[s]) for s in range(len(d))
        )  # (DRAWS, K)
        return d.mean((0, 1)), np.percentile(resampled, [2.5, 97.5], axis=0)


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


def mean_and_error(values):
    """Mean and standard error over the first axis, the seeds; the error of a single one is nan."""
    if len(values) == 1:
        return values[0], np.full(values.shape[1:], math.nan)
    return values.mean(0), values.std(0, ddof=1) / math.sqrt(len(values))


def color_of(name):
    return COLORS.get(method_of(name), "tab:pink")


def cell(values, digits=1):
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" + ("" if np.isnan(error) else f" ± {error:.{digits}f}")


# --- Tables ---------------------------------------------------------------------------------------
def table(head, rows):
    """In Markdown; the first column has no head."""
    lines = ["| " + " | ".join(row) + " |" for row in [["", *head], *rows]]
    return "\n".join([lines[0], "|---" * (len(head) + 1) + "|", *lines[1:]])


def method_table(runs, names, ks):
    """A row a method, mean ± standard error over seeds."""
    base = runs.pass_at_k["base"].mean((0, 1))
    rows = []
    for name in names:
        per_seed = runs.pass_at_k[name].mean(1)  # (S, K)
        row = [runs.label(name), *(cell(per_seed[:, runs.ks.index(k)]) for k in ks)]
        row.append(cell(runs.field(name, "distinct").mean(1), 2))
        if name == "base":
            row += ["", ""]
        else:
            row.append(cell(100 * runs.field(name, "training", "solve_rate")[:, -1]))
            reached = np.flatnonzero(per_seed.mean(0) >= base)  # from the next k on it stays below
            below = runs.ks[reached[-1] + 1 :] if len(reached) else runs.ks
            row.append(str(below[0]) if below else f"not up to {runs.ks[-1]}")
        rows.append(row)
    measured = [f"pass@{k}" for k in ks]
    last = ["distinct", "solved in training", "stays below the base from k ="]
    return table([*measured, *last], rows)


def difference_table(runs, pairs, ks):
    """A row a pair with a common seed: the difference of pass@k in points, with its interval."""
    rows = []
    for name, other in pairs:
        if not runs.entries[name].keys() & runs.entries[other].keys():
            continue
        mean, (low, high) = runs.difference(name, other)
        row = [f"{runs.label(name)} − {runs.label(other)}"]
        for i in map(runs.ks.index, ks):
            row.append(f"{mean[i]:+.1f} ({low[i]:+.1f} to {high[i]:+.1f})")
        rows.append(row)
    return table([f"k = {k}" for k in ks], rows) if rows else ""


def rate_table(runs, ks):
    """A row a method, a column a learning rate: mean over seeds of pass@k, for each of ks."""
    rows = []
    for method in dict.fromkeys(map(method_of, runs.entries)):
        row = [runs.label(method)]
        for rate in runs.rates:
            name = method if method == "base" else f"{method}@{rate:g}"
            means = runs.pass_at_k[name].mean((0, 1)) if name in runs.entries else []
            row.append("/".join(f"{means[runs.ks.index(k)]:.1f}" for k in ks if len(means)))
        rows.append(row)
    return table(list(map(written, runs.rates)), rows)


def rate_pairs(runs, lr):
    """Each method beside GRPO at the same rate, and its highest rate beside the rate `lr`."""
    names = [name for name in runs.entries if name != "base"]
    pairs = [(name, f"grpo@{rate_of(name):g}") for name in names if method_of(name) != "grpo"]
    for method in dict.fromkeys(map(method_of, names)):
        pairs.append((f"{method}@{runs.rates[-1]:g}", f"{method}@{lr:g}"))
    return [(a, b) for a, b in pairs if a != b and {a, b} <= set(names)]


def report(results, methods, figures, name="results"):
    """Draw the figures into the folder `figures`, and return the tables as text.

    What there is to draw is seen from the results: runs named by their learning rate, a pretrained
    model, or the comparison of all methods. Of the first two, the one figure is called `name`.
    """
    runs, settings = Runs(results, methods), results["settings"]
    few = sorted({1, *(min(k, runs.ks[-1]) for k in (32, 256))})
    name = name.removeprefix("results-")
    lr, over = written(settings["lr"]), "mean ± standard error over seeds"
    if runs.rates:
        of_run = [len(seeds) for seeds in runs.entries.values()]
        lr = "by column"
        over = f"pass@{'/@'.join(map(str, few))}, mean over {min(of_run)} to {max(of_run)} seeds"
        tables = [rate_table(runs, few)]
        if differences := difference_table(runs, rate_pairs(runs, settings["lr"]), few):
            tables += [DIFFERENCES, differences]
        drawn = {name: draw_rates(runs, few)}
    elif settings.get("task", "countdown") != "countdown":
        tables, drawn = comparison(runs, few), {name: draw_pretrained(runs)}
    else:
        tables, drawn = comparison(runs, few), {"passk": draw_pass_at_k(runs)}
        drawn |= {"beta": draw_beta(runs), "methods": draw_methods(runs)}
        drawn |= {"diversity": draw_diversity(runs)}
    caption = "{eval_problems} held-out problems, {eval_samples} samples each, after {steps} steps "
    caption += (
        f"of {{prompts}} prompts × {{samples}} samples, learning rate {lr}; percent, {over}; "
    )
    caption = caption.format(**settings) + results["machine"]
    if "model" in settings:
        caption = f"{Path(settings['model']).name} on {settings['task']}: {caption}"
    mark = f"QUICK RUN, {settings['steps']} steps: no evidence" if settings["steps"] < 10 else ""
    figures.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        style = {"fontsize": 24, "color": "red", "alpha": 0.4, "rotation": 20}
        figure.text(0.5, 0.5, mark, ha="center", va="center", **style)
        figure.savefig(figures / f"{name}.png", dpi=130)
    spent = [entry["seconds"] for seeds in runs.entries.values() for entry in seeds.values()]
    minutes = f"{len(spent)} runs, {sum(spent) / 60:.0f} minutes of computing"
    return "\n\n".join([*filter(None, [mark]), caption, *tables, minutes])


def comparison(runs, few):
    """The tables of the main methods, and of each side question that has runs."""
    main, last = runs.of_part("main"), runs.ks[-1]
    ks = [k for k in (1, 4, 32, 256) if k in runs.ks and k < last] + [last]
    text = [method_table(runs, main, ks)]
    ours = ("base", "grpo", "mean", "rs2", "rs4", "rs8")
    pairs = [(name, "grpo") for name in main if name not in ("base", "grpo")]
    pairs += [(name, "base") for name in main if name != "base"]
    pairs += [(name, "rs2") for name in main if name not in ours]
    pairs = [pair for pair in pairs if pair[1] in main]
    if differences := difference_table(runs, pairs, few):
        text += [DIFFERENCES, differences]
    for part in dict.fromkeys(method.part for method in runs.methods.values()):
        names = runs.of_part(part)
        if part == "main" or not names:
            continue
        text += [f"{part[0].upper()}{part[1:]}:", method_table(runs, names, ks)]
        pairs = [(name, names[0]) for name in names[1:]]
        if part == "schedules of β":
            fixed = [name for name in ("rs2", "rs8") if name in main]
            pairs = [(name, other) for name in names for other in fixed]
        text += filter(None, [difference_table(runs, pairs, few)])
    return text


# --- Figures --------------------------------------------------------------------------------------
def new_figure(width, height, rows, columns, **shared):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **shared).flatten()


def line(axes, runs, name, x, values, band=0.15, **style):
    """Mean over seeds (S, X), with the range of the seeds as a band of that opacity."""
    color = color_of(name)
    axes.plot(x, values.mean(0), color=color, label=runs.label(name), **{"lw": 1.8, **style})
    axes.fill_between(x, values.min(0), values.max(0), color=color, alpha=band, lw=0)


def over_steps(axes, runs, name, part, field, scale=1, **style):
    """A line of the curves of `part`: training, or curve (held-out)."""
    steps = runs.field(name, part, "step")[0]
    line(axes, runs, name, steps, scale * runs.field(name, part, field), **style)


def over_k(axes, runs, names):
    """pass@k over k: the paper's Figure 4."""
    for name in (name for name in names if name in runs.entries):
        dashed = {"ls": "--"} if name == "base" else {}
        line(axes, runs, name, runs.ks, runs.pass_at_k[name].mean(1), **dashed)
    axes.set_xscale("log", base=2)
    axes.set_xticks(runs.ks, [str(k) for k in runs.ks])
    finish(axes, xlabel="k")


def paths(axes, runs, names, bold):
    """Each method's way through the plane of pass@1 and pass@32, mean over seeds."""
    for name in names:
        x, y = (runs.field(name, "curve", f"pass@{k}").mean(0) for k in (1, 32))
        style = {"lw": 1.8, "marker": "."} if name in bold else {"lw": 0.8, "alpha": 0.6}
        axes.plot(x, y, color=color_of(name), **style)
        if name in bold:
            axes.plot(x[-1], y[-1], "o", color=color_of(name), ms=9, mec="white")
    if names:  # all start at the same place
        axes.plot(x[0], y[0], "s", color=color_of("base"), ms=8, zorder=3)
        axes.annotate("base", (x[0], y[0]), (0, -16), textcoords="offset points", ha="center")
        axes.margins(0.12)  # the word needs room
    finish(axes, xlabel="pass@1 (%)", ylabel="pass@32 (%)")


def finish(axes, **settings):
    axes.set(**settings)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_pass_at_k(runs):
    """On the left the mean, GRPO and RS-GRPO, on the right the other estimators of pass@k."""
    figure, panels = new_figure(11, 4.6, 1, 2, sharey=True)
    over_k(panels[0], runs, ("base", "grpo", "mean", "rs2", "rs4", "rs8"))
    over_k(panels[1], runs, ("base", "rs2", "chen", "mahdavi", "pkpo", "pkpo_loo", "maxrl"))
    titles = ("RS-GRPO, GRPO and the mean", "RS-GRPO and the other estimators of pass@k")
    for axes, title in zip(panels, titles):
        axes.set_title(title)
        axes.legend(frameon=False, loc="lower right", fontsize=9)
    panels[0].set_ylabel("pass@k on held-out problems (%)")
    return figure


def draw_beta(runs):
    """What β does, over the steps of training: the paper's Figure 5."""
    figure, panels = new_figure(11, 6.4, 2, 2)
    for name in (name for name in ("mean", "rs2", "rs4", "rs8") if name in runs.entries):
        over_steps(panels[0], runs, name, "training", "solve_rate", 100)
        over_steps(panels[1], runs, name, "training", "reward")
        over_steps(panels[2], runs, name, "curve", "pass@1")
        over_steps(panels[3], runs, name, "curve", "pass@32")
    finish(panels[0], title="cumulative solve rate", ylabel="training problems solved (%)")
    finish(panels[1], title="training reward", ylabel="mean reward")
    finish(panels[2], title="held-out pass@1", ylabel="%", xlabel="step")
    finish(panels[3], title="held-out pass@32", ylabel="%", xlabel="step")
    panels[0].legend(frameon=False, loc="lower right")
    return figure


def draw_methods(runs):
    """Every method over the steps: the paper's Figure 6; and its way through the plane."""
    figure, panels = new_figure(11, 7.6, 2, 2)
    names = [name for name in runs.of_part("main") if name != "base"]
    for name in names:
        over_steps(panels[0], runs, name, "curve", "pass@1", band=0.05)
        over_steps(panels[1], runs, name, "curve", "pass@32", band=0.05)
        over_steps(panels[2], runs, name, "training", "entropy", band=0.05)
    paths(panels[3], runs, names, ("grpo", "mean", "rs2", "rs4", "rs8"))
    finish(panels[0], title="held-out pass@1", ylabel="%", xlabel="step")
    finish(panels[1], title="held-out pass@32", ylabel="%", xlabel="step")
    finish(panels[2], title="entropy of the policy", ylabel="nats a token", xlabel="step")
    panels[3].set_title("the way from the base to the end, mean over seeds")
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, frameon=False, loc="outside lower center", ncols=4)
    return figure


def draw_pretrained(runs):
    """A pretrained model: pass@k, the way there, and two curves of training."""
    figure, panels = new_figure(11, 7.6, 2, 2)
    names = [name for name in runs.of_part("main") if name != "base"]
    over_k(panels[0], runs, runs.of_part("main"))
    paths(panels[1], runs, names, names)
    for name in names:
        over_steps(panels[2], runs, name, "training", "reward")
        over_steps(panels[3], runs, name, "training", "entropy")
    panels[0].set(title="pass@k at the end", ylabel="pass@k on held-out problems (%)")
    panels[0].legend(frameon=False)
    panels[1].set_title("the way from the base to the end, mean over seeds")
    finish(panels[2], title="training reward", ylabel="mean reward", xlabel="step")
    finish(panels[3], title="entropy of the policy", ylabel="nats a token", xlabel="step")
    return figure


def draw_rates(runs, ks):
    """pass@1, and pass@k at the largest k, over the learning rate."""
    figure, panels = new_figure(11, 4.6, 1, 2)
    for axes, k in zip(panels, (ks[0], ks[-1])):
        at = {name: of.mean(1)[:, runs.ks.index(k)] for name, of in runs.pass_at_k.items()}  # (S,)
        axes.axhline(at["base"].mean(), color=color_of("base"), ls="--", label="base")
        for method in dict.fromkeys(method_of(name) for name in at if name != "base"):
            x = [rate for rate in runs.rates if f"{method}@{rate:g}" in at]
            values = [at[f"{method}@{rate:g}"] for rate in x]
            color = color_of(method)
            axes.plot(x, list(map(np.mean, values)), "o-", color=color, label=runs.label(method))
            low, high = list(map(np.min, values)), list(map(np.max, values))
            axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
        axes.set_xscale("log")
        axes.set_xticks(runs.rates, map(written, runs.rates))
        axes.minorticks_off()
        finish(axes, title=f"held-out pass@{k}", xlabel="learning rate", ylabel="%")
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, frameon=False, loc="outside lower center", ncols=5)
    return figure


def draw_diversity(runs):
    """How many different correct answers, and which problems gain: the paper's Figure 7."""
    figure, (bars, *maps) = new_figure(11, 9, 2, 2)
    names = runs.of_part("main")[::-1]
    values = [mean_and_error(runs.field(name, "distinct").mean(1)) for name in names]
    mean, error = np.nan_to_num(values).T
    colors = [color_of(name) for name in names]
    bars.barh(range(len(names)), mean, xerr=error, color=colors, capsize=2, alpha=0.85)
    bars.set_yticks(range(len(names)), map(runs.label, names))
    finish(bars, title="distinct correct answers", xlabel=f"a problem, in {runs.ks[-1]} samples")
    titles = {"grpo": "GRPO, another seed", "rs2": "RS-GRPO, β = 2", "rs8": "RS-GRPO, β = 8"}
    for axes, (name, title) in zip(maps, titles.items()):  # the first shows mere luck
        axes.set_title(f"share of problems (%): {title}")
        if name in runs.entries and "grpo" in runs.entries:
            draw_map(axes, runs, name)
            axes.set(xlabel="accuracy under GRPO", ylabel=f"accuracy under {title}")
    return figure


def draw_map(axes, runs, name):
    """Problems by their accuracy under GRPO and under another method, or another seed of GRPO."""
    seeds = [seed for seed in runs.entries["grpo"] if seed in runs.entries[name]]
    partners = seeds[1:] + seeds[:1] if name == "grpo" else seeds
    mine = np.concatenate([runs.entries[name][seed]["correct"] for seed in partners])
    other = np.concatenate([runs.entries["grpo"][seed]["correct"] for seed in seeds])
    bins = [np.ceil(counts * 5 / runs.ks[-1]).astype(int) for counts in (mine, other)]
    square = np.zeros((len(BINS), len(BINS)))
    np.add.at(square, tuple(bins), 100 / len(mine))
    axes.imshow(square, origin="lower", cmap="Reds", vmax=25)
    for (i, j), value in np.ndenumerate(square):
        if value:
            color = "white" if value > 15 else "black"
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=9, color=color)
    axes.plot([-0.5, len(BINS) - 0.5], [-0.5, len(BINS) - 0.5], color="0.4", lw=0.8, ls=":")
    axes.set_xticks(range(len(BINS)), BINS)
    axes.set_yticks(range(len(BINS)), BINS)
