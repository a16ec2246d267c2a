"""Set finished runs side by side, from their folders alone: one table and one picture.

    python -m evidence.side_by_side runs/*
    python -m evidence.side_by_side runs/a runs/b --out a-and-b.png

The base is the model before training, as every run has evaluated it. The random numbers of an
evaluation come from the run's seed, so runs of several seeds have several bases: the table shows
their mean. Runs whose evaluations differ in anything else are refused.
"""

import argparse
import json
import sys
from itertools import zip_longest
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure  # no pyplot: no display is needed

from rs_grpo import BadInput

EVALUATION = ("model", "task", "eval_problems", "eval_samples", "temperature", "max_tokens")


class Result(NamedTuple):
    pass_at_k: dict[int, float]  # percent of the held-out problems
    distinct: float  # different correct answers, a mean over the problems


class Run(NamedTuple):
    folder: Path
    config: dict
    base: Result
    trained: Result
    curves: dict[str, list[float]]  # of every step: seconds, reward, entropy


def read_run(folder: Path) -> Run:
    """A finished run. Raises BadInput for a folder that holds none."""
    try:
        config = json.loads((folder / "config.json").read_text())
        results = json.loads((folder / "eval.json").read_text())
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        steps = config["steps"]
        if len(lines) < steps or str(steps) not in results:
            done = f"{len(lines)} of {steps} steps and {len(results)} evaluations are there"
            raise BadInput(f"{folder} isn't finished: {done}; go on with --resume --out {folder}")
        metrics = [json.loads(line) for line in lines]
        curves = {}
        for name in ("seconds", "reward", "entropy"):
            curves[name] = [line[name] for line in metrics]
        base, trained = result_of(results["0"]), result_of(results[str(steps)])
    except OSError as error:
        missing = f"its {Path(error.filename).name} can't be read ({error.strerror})"
        raise BadInput(f"{folder} isn't the folder of a run: {missing}") from error
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise BadInput(f"{folder} is damaged ({error!r:.200}); train it again") from error
    return Run(folder, config, base, trained, curves)


def result_of(evaluation):
    percent = {int(k): float(value) for k, value in evaluation["pass_at_k"].items()}
    return Result(percent, mean(evaluation["distinct"]))


def check_alike(runs: list[Run]) -> None:
    """Raise BadInput if two runs were evaluated in different ways."""
    first = runs[0]
    for run in runs[1:]:
        for name in EVALUATION:
            one, other = first.config.get(name), run.config.get(name)
            if one != other:
                flag = f"--{name.replace('_', '-')}"
                difference = f"{flag} is {one} in {first.folder} and {other} in {run.folder}"
                raise BadInput(f"{difference}; name runs whose evaluations are alike")


def mean_base(runs: list[Run]) -> Result:
    """The mean over seeds of the model before training."""
    by_seed = {run.config["seed"]: run.base for run in runs}
    bases = list(by_seed.values())
    percent = {k: mean(base.pass_at_k[k] for base in bases) for k in bases[0].pass_at_k}
    return Result(percent, mean(base.distinct for base in bases))


def what_of(run):
    """As rs_grpo.py names its folder: the advantage, with β where that counts."""
    advantage = run.config["advantage"]
    return f"rs-{run.config['beta']:g}" if advantage == "rs" else advantage


def names_of(runs: list[Run]) -> list[str]:
    """What each run was; where several were the same, also what differs: the seed, in most cases.

    Each difference stands on a line of its own.
    """
    names = []
    for run in runs:
        alike = [other.config for other in runs if what_of(other) == what_of(run)]
        name = what_of(run)
        for setting, value in run.config.items():
            same = all(config.get(setting) == value for config in alike)
            if setting != "out" and not same:
                name += f"\n{setting.replace('_', ' ')} {value}"
        if name in names or len(alike) > 1 and "\n" not in name:
            name += f"\n{run.folder.name}"
        names.append(name)
    return names


def table(columns: dict[str, Result]) -> str:
    """A row for each pass@k and one for distinct, a column for the base and for each run."""
    headings = [name.split("\n") for name in columns]
    results = columns.values()
    rows = [["", *parts] for parts in zip_longest(*headings, fillvalue="")]
    for k in next(iter(results)).pass_at_k:
        rows.append([f"pass@{k}", *(f"{result.pass_at_k[k]:.1f}" for result in results)])
    rows.append(["distinct", *(f"{result.distinct:.2f}" for result in results)])
    width = 2 + max(len(cell) for row in rows for cell in row[1:])
    width = max(width, 8)
    lines = []
    for name, *cells in rows:
        lines.append(f"{name:<10}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def smooth(values: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the means of `values` around them over a fortieth of the run."""
    window = max(1, len(values) // 40)
    means = np.convolve(values, np.ones(window) / window, mode="valid")
    return np.arange(len(means)) + (window + 1) / 2, means


def draw(columns: dict[str, Result], runs: list[Run], path: Path) -> None:
    """pass@k over k on the left, reward and entropy over the steps on the right."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = ["0.6", *(f"C{i}" for i in range(len(runs)))]
    for (name, result), colour in zip(columns.items(), colours):
        ks = list(result.pass_at_k)
        label = name.replace("\n", ", ")
        left.semilogx(ks, result.pass_at_k.values(), "o-", base=2, color=colour, label=label)
    left.set_xticks(ks, map(str, ks))
    left.set(xlabel="k", ylabel="pass@k on held-out problems (%)", ylim=(0, None))
    left.legend()
    entropy = right.twinx()
    for run, colour in zip(runs, colours[1:]):
        if run.curves["reward"]:
            right.plot(*smooth(run.curves["reward"]), "-", color=colour)
            entropy.plot(*smooth(run.curves["entropy"]), "--", color=colour)
    right.set(xlabel="step", ylabel="mean reward (solid)", ylim=(0, None))
    entropy.set(ylabel="entropy in nats a token (dashed)", ylim=(0, None))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def show(folders: list[Path], path: Path) -> None:
    """Print the table, and draw it. Raises BadInput if there is nothing to compare."""
    runs = []
    for folder in folders:
        if folder.is_file():
            continue  # runs/* names the picture of the last time, too
        try:
            runs.append(read_run(folder))
        except BadInput as error:
            print(f"left out: {error}", file=sys.stderr)
    if not runs:
        raise BadInput("none of these is the folder of a finished run; python rs_grpo.py makes one")
    check_alike(runs)
    columns = {"base": mean_base(runs)}
    columns |= zip(names_of(runs), [run.trained for run in runs])
    config = runs[0].config
    print(f"{table(columns)}\n")
    print(f"pass@k: percent of {config['eval_problems']} held-out problems that k samples solve,")
    print(f"of {config['eval_samples']} drawn; distinct: different correct answers a problem")
    seeds = sorted({run.config["seed"] for run in runs})
    if len(seeds) > 1:
        print(f"base: the mean over the evaluations of seeds {', '.join(map(str, seeds))}")
    draw(columns, runs, path)
    print(f"The picture is {path}.")


def main(arguments=None):
    parser = argparse.ArgumentParser("side_by_side", description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="run folders, such as runs/*")
    picture = Path("runs/side-by-side.png")
    parser.add_argument("--out", type=Path, default=picture, help="picture (default: %(default)s)")
    args = parser.parse_args(arguments)
    try:
        show(args.folders, args.out)
    except (BadInput, OSError) as error:
        parser.exit(2, f"side_by_side: {error}\n")


if __name__ == "__main__":
    main()
