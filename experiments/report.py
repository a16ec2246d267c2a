"""The table and the four figures of experiments/results.json; `compare.py --report` prints and draws them."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rs_grpo import BadInput, pass_at_k  # noqa: E402

COLORS = {
    "base": "0.55", "grpo": "black", "mean": "tab:blue", "rs2": "#f59e42", "rs4": "#d7301f", "rs8": "#7f0000",
    "chen": "tab:green", "mahdavi": "tab:purple", "pkpo": "tab:brown", "pkpo_loo": "tab:olive", "maxrl": "tab:cyan",
}  # fmt: skip
DRAWS = 10_000  # of the bootstrap
BINS = ("0", "0–.2", ".2–.4", ".4–.6", ".6–.8", ".8–1")  # of a problem's accuracy: {0}, (0, .2] … (.8, 1]


class Runs:
    """results.json as arrays: for each method S seeds, M problems, and k = 1, 2, 4 … n."""

    def __init__(self, results: Mapping[str, Any], methods: Mapping[str, Any]):
        self.methods = methods
        self.entries = {name: results["runs"][name] for name in methods if results["runs"].get(name)}
        if "base" not in self.entries:
            raise BadInput("there is no finished run of the base yet; run compare.py first")
        n = results["settings"]["eval_samples"]
        self.ks = sorted({2**i for i in range(n.bit_length())} | {n})
        chances = np.array([[100 * pass_at_k(n, c, k) for k in self.ks] for c in range(n + 1)])  # (n + 1, K)
        self.pass_at_k = {
            name: np.array([chances[entry["correct"]] for entry in seeds.values()]) for name, seeds in self.entries.items()
        }  # (S, M, K), in percent

    def of_part(self, part: str) -> list[str]:
        return [name for name in self.entries if self.methods[name].part == part]

    def field(self, name: str, *path: str) -> np.ndarray:
        """One field of each seed's entry: (S, …)."""
        values = []
        for entry in self.entries[name].values():
            for key in path:
                entry = entry[key]
            values.append(entry)
        return np.array(values, dtype=float)

    def difference(self, name: str, other: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean of `name` − `other` at each k (K,), and the bounds of its 95 % interval (2, K).

        The bootstrap resamples problems and training seeds, both with replacement; a problem and a seed keep their pairs,
        since both methods saw the same. Few seeds make it rough: three of them resampled never leave their own range.
        """
        shared = [seed for seed in self.entries[name] if seed in self.entries[other]]
        a, b = (self.pass_at_k[m][[list(self.entries[m]).index(seed) for seed in shared]] for m in (name, other))
        d = a - b  # (S, M, K)
        rng = np.random.default_rng(0)
        problems = rng.multinomial(d.shape[1], np.full(d.shape[1], 1 / d.shape[1]), DRAWS) / d.shape[1]  # (DRAWS, M)
        seeds = rng.multinomial(d.shape[0], np.full(d.shape[0], 1 / d.shape[0]), DRAWS) / d.shape[0]  # (DRAWS, S)
        resampled = sum(seeds[:, [s]] * (problems @ d[s]) for s in range(d.shape[0]))  # (DRAWS, K)
        return d.mean((0, 1)), np.percentile(resampled, [2.5, 97.5], axis=0)


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error over the first axis, the seeds; the error of a single one is nan."""
    error = values.std(0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else np.full(values.shape[1:], math.nan)
    return values.mean(0), error


def cell(values: np.ndarray, digits: int = 1) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" if np.isnan(error) else f"{mean:.{digits}f} ± {error:.{digits}f}"


# --- Tables -----------------------------------------------------------------------------------------------------------


def method_table(runs: Runs, names: Sequence[str], ks: Sequence[int]) -> str:
    """A row a method, mean ± standard error over seeds, in Markdown."""
    base = runs.pass_at_k["base"].mean((0, 1))
    head = ["", *(f"pass@{k}" for k in ks), "distinct", "solved in training", "stays below the base from k ="]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in names:
        per_seed = runs.pass_at_k[name].mean(1)  # (S, K)
        row = [runs.methods[name].label, *(cell(per_seed[:, runs.ks.index(k)]) for k in ks)]
        row.append(cell(runs.field(name, "distinct").mean(1), 2))
        if name == "base":
            row += ["", ""]
        else:
            row.append(cell(100 * runs.field(name, "training", "solve_rate")[:, -1]))
            above = [k for k, mine, bases in zip(runs.ks, per_seed.mean(0), base) if mine >= bases]
            beyond = [k for k in runs.ks if not above or k > above[-1]]  # from there on it stays below
            row.append(str(beyond[0]) if beyond else f"not up to {runs.ks[-1]}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def difference_table(runs: Runs, pairs: Sequence[tuple[str, str]], ks: Sequence[int]) -> str:
    """A row a pair with a common seed: the difference of pass@k in points, and its 95 % interval, in Markdown."""
    pairs = [(name, other) for name, other in pairs if runs.entries[name].keys() & runs.entries[other].keys()]
    if not pairs:
        return ""
    lines = ["| | " + " | ".join(f"k = {k}" for k in ks) + " |", "|---" * (len(ks) + 1) + "|"]
    for name, other in pairs:
        mean, (low, high) = runs.difference(name, other)
        at = [runs.ks.index(k) for k in ks]
        cells = [f"{mean[i]:+.1f} ({low[i]:+.1f} to {high[i]:+.1f})" for i in at]
        lines.append(f"| {runs.methods[name].label} − {runs.methods[other].label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(results: Mapping[str, Any], methods: Mapping[str, Any], figures: Path, quick: bool = False) -> str:
    """Draw the figures into the folder `figures` and return the tables as text."""
    runs, settings = Runs(results, methods), results["settings"]
    ks = [k for k in (1, 4, 32, 256) if k in runs.ks] + ([runs.ks[-1]] if runs.ks[-1] not in (1, 4, 32, 256) else [])
    few = [k for k in (1, 32, 256) if k in runs.ks]
    mark = f"QUICK RUN, {settings['steps']} steps: no evidence" if quick else ""
    main = runs.of_part("main")
    text = [
        f"{mark}\n" * quick + f"{settings['eval_problems']} held-out problems, {settings['eval_samples']} samples each, after "
        f"{settings['steps']} steps of {settings['prompts']} prompts × {settings['samples']} samples, learning rate "
        f"{settings['lr']:g}; percent, mean ± standard error over seeds; {results['machine']}",
        method_table(runs, main, ks),
    ]
    rivals = {"grpo": main, "base": main, "rs2": [name for name in main if name not in ("grpo", "mean", "rs4", "rs8")]}
    pairs = [(name, other) for other in rivals if other in main for name in rivals[other] if name not in ("base", other)]
    if table := difference_table(runs, pairs, few):
        text += ["Differences in points, with 95 % intervals that resample problems and seeds:", table]
    for part in dict.fromkeys(method.part for method in methods.values()):
        if part == "main" or not (names := runs.of_part(part)):
            continue
        compared = [(name, names[0]) for name in names[1:]] if part != "schedules of β" else []
        compared += [(name, other) for name in names for other in ("rs2", "rs8") if part == "schedules of β" and other in main]
        text += [f"{part[0].upper()}{part[1:]}:", method_table(runs, names, ks)]
        text += filter(None, [difference_table(runs, compared, few)])
    figures.mkdir(parents=True, exist_ok=True)
    for name, draw in {"passk": draw_pass_at_k, "beta": draw_beta, "methods": draw_methods, "diversity": draw_diversity}.items():
        figure = draw(runs)
        if mark:
            figure.text(0.5, 0.5, mark, fontsize=24, color="red", alpha=0.4, ha="center", va="center", rotation=20)
        figure.savefig(figures / f"{name}.png", dpi=130)
    spent = [entry["seconds"] for seeds in runs.entries.values() for entry in seeds.values()]
    text.append(f"{len(spent)} runs, {sum(spent) / 60:.0f} minutes of computing")
    return "\n\n".join(text)


# --- Figures ----------------------------------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # no pyplot: no display is needed

    return Figure(figsize=(width, height), layout="constrained")


def line(axes: Any, runs: Runs, name: str, x: Sequence[float], values: np.ndarray, band: float = 0.15, **style: Any) -> None:
    """Mean over seeds (S, X), with the range of the seeds as a band of that opacity."""
    color = COLORS[name]
    axes.plot(x, values.mean(0), color=color, label=runs.methods[name].label, **{"lw": 1.8, **style})
    axes.fill_between(x, values.min(0), values.max(0), color=color, alpha=band, lw=0)


def finish(axes: Any, **settings: Any) -> None:
    axes.set(**settings)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_pass_at_k(runs: Runs) -> Any:
    """pass@k over k: the paper's Figure 4. On the left the mean, GRPO and RS-GRPO, on the right the pass@k methods."""
    figure = new_figure(11, 4.6)
    panels = figure.subplots(1, 2, sharey=True)
    sides = (("base", "grpo", "mean", "rs2", "rs4", "rs8"), ("base", "rs2", "chen", "mahdavi", "pkpo", "pkpo_loo", "maxrl"))
    for axes, names in zip(panels, sides):
        for name in (name for name in names if name in runs.entries):
            dashed = {"ls": "--"} if name == "base" else {}
            line(axes, runs, name, runs.ks, runs.pass_at_k[name].mean(1), **dashed)
        axes.set_xscale("log", base=2)
        axes.set_xticks(runs.ks, [str(k) for k in runs.ks])
        finish(axes, xlabel="k")
        axes.legend(frameon=False, loc="lower right", fontsize=9)
    panels[0].set(ylabel="pass@k on held-out problems (%)", title="RS-GRPO, GRPO and the mean")
    panels[1].set(title="RS-GRPO and the other estimators of pass@k")
    return figure


def draw_beta(runs: Runs) -> Any:
    """What β does, over the steps of training: the paper's Figure 5."""
    figure = new_figure(11, 6.4)
    panels = figure.subplots(2, 2).flatten()
    for name in (name for name in ("mean", "rs2", "rs4", "rs8") if name in runs.entries):
        training = runs.field(name, "training", "step")[0]
        line(panels[0], runs, name, training, 100 * runs.field(name, "training", "solve_rate"))
        line(panels[1], runs, name, training, runs.field(name, "training", "reward"))
        curve = runs.field(name, "curve", "step")[0]
        line(panels[2], runs, name, curve, runs.field(name, "curve", "pass@1"))
        line(panels[3], runs, name, curve, runs.field(name, "curve", "pass@32"))
    finish(panels[0], title="cumulative solve rate", ylabel="training problems solved (%)")
    finish(panels[1], title="training reward", ylabel="mean reward")
    finish(panels[2], title="held-out pass@1", ylabel="%", xlabel="step")
    finish(panels[3], title="held-out pass@32", ylabel="%", xlabel="step")
    panels[0].legend(frameon=False, loc="lower right")
    return figure


def draw_methods(runs: Runs) -> Any:
    """Every method over the steps, and where each ends: the paper's Figure 6 and Table 2."""
    figure = new_figure(11, 7.6)
    panels = figure.subplots(2, 2).flatten()
    names = [name for name in runs.of_part("main") if name in COLORS]
    for name in (name for name in names if name != "base"):
        curve = runs.field(name, "curve", "step")[0]
        for axes, k in ((panels[0], "1"), (panels[1], "32")):
            line(axes, runs, name, curve, runs.field(name, "curve", f"pass@{k}"), band=0.05)
        line(panels[2], runs, name, runs.field(name, "training", "step")[0], runs.field(name, "training", "entropy"), band=0.05)
    middle = runs.ks.index(32) if 32 in runs.ks else -1
    for name in names:
        (x, y), (dx, dy) = mean_and_error(runs.pass_at_k[name].mean(1)[:, [0, middle]])
        label = runs.methods[name].label
        panels[3].errorbar(x, y, xerr=dx, yerr=dy, fmt="s" if name == "base" else "o", color=COLORS[name], capsize=2, label=label)
    finish(panels[0], title="held-out pass@1", ylabel="%", xlabel="step")
    finish(panels[1], title="held-out pass@32", ylabel="%", xlabel="step")
    finish(panels[2], title="entropy of the policy", ylabel="nats a token", xlabel="step")
    finish(panels[3], title="where they end: mean ± standard error", xlabel="pass@1 (%)", ylabel="pass@32 (%)")
    figure.legend(*panels[3].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
    return figure


def draw_diversity(runs: Runs) -> Any:
    """How many different correct answers, and which problems gain accuracy: the paper's Figure 7."""
    figure = new_figure(11, 9)
    bars, *maps = figure.subplots(2, 2).flatten()
    names = [name for name in runs.of_part("main") if name in COLORS][::-1]
    mean, error = zip(*(mean_and_error(runs.field(name, "distinct").mean(1)) for name in names))
    bars.barh(range(len(names)), mean, xerr=np.nan_to_num(error), color=[COLORS[name] for name in names], capsize=2, alpha=0.85)
    bars.set_yticks(range(len(names)), [runs.methods[name].label for name in names])
    finish(bars, title="distinct correct answers", xlabel=f"a problem, in {runs.ks[-1]} samples")
    titles = {"grpo": "GRPO, another seed", "rs2": "RS-GRPO, β = 2", "rs8": "RS-GRPO, β = 8"}  # the first shows mere luck
    for axes, name in zip(maps, titles):
        axes.set_title(f"share of problems (%): {titles[name]}")
        if name not in runs.entries or "grpo" not in runs.entries:
            continue
        seeds = [seed for seed in runs.entries["grpo"] if seed in runs.entries[name]]
        partners = seeds[1:] + seeds[:1] if name == "grpo" else seeds
        mine = np.concatenate([runs.entries[name][seed]["correct"] for seed in partners])
        other = np.concatenate([runs.entries["grpo"][seed]["correct"] for seed in seeds])
        n = runs.ks[-1]
        square = np.zeros((len(BINS), len(BINS)))
        np.add.at(square, (np.ceil(mine * 5 / n).astype(int), np.ceil(other * 5 / n).astype(int)), 100 / len(mine))
        axes.imshow(square, origin="lower", cmap="Reds", vmax=25)
        for (i, j), value in np.ndenumerate(square):
            if value:
                axes.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=9, color="white" if value > 15 else "black")
        axes.plot([-0.5, len(BINS) - 0.5], [-0.5, len(BINS) - 0.5], color="0.4", lw=0.8, ls=":")
        axes.set_xticks(range(len(BINS)), BINS)
        axes.set_yticks(range(len(BINS)), BINS)
        axes.set(xlabel="accuracy under GRPO", ylabel=f"accuracy under {titles[name]}")
    return figure
