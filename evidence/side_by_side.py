"""Set finished runs side by side, from their folders alone: one table and one picture.

    python -m evidence.side_by_side    # all in runs/
    python -m evidence.side_by_side runs/a runs/b --out a-and-b.png

The base is the model before training. It is a mean over seeds, as each seed draws other samples.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure  # no pyplot: no display is needed

from rs_grpo import BadInput

EVALUATION = ("model", "task", "eval_problems", "eval_samples", "temperature", "max_tokens")


class Run(NamedTuple):
    folder: Path
    config: dict
    base: dict  # what `evaluate` returned before training
    trained: dict  # and after it
    metrics: list[dict]  # one for each step


def read_run(folder: Path) -> Run:
    """The run in a folder. Raises BadInput if there is none, or if it isn't finished."""
    try:
        config = json.loads((folder / "config.json").read_text())
        results = json.loads((folder / "eval.json").read_text())
        metrics = metrics_of(folder)
        run = Run(folder, config, results["0"], results.get(str(config["steps"])), metrics)
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise BadInput(f"{folder} isn't the folder of a run ({error!r:.200})") from error
    if run.trained is None:
        raise BadInput(f"{folder} isn't finished; go on with --resume --out {folder}")
    return run


def metrics_of(folder):
    path = Path(folder) / "metrics.jsonl"
    return [json.loads(line) for line in path.open()] if path.exists() else []


def mean_base(runs: list[Run]) -> dict:
    """The evaluation of the model before training: means over the seeds."""
    by_seed = {run.config["seed"]: run.base for run in runs}
    bases = by_seed.values()
    percent = {k: mean(base["pass_at_k"][k] for base in bases) for k in runs[0].base["pass_at_k"]}
    return {"pass_at_k": percent, "distinct": [mean(base["distinct"]) for base in bases]}


def columns_of(runs: list[Run]) -> dict[str, dict]:
    """All evaluations, named by what differs. Raises BadInput if they weren't made alike."""
    columns = {}
    for run in runs:
        name = run.config["advantage"]
        if name == "rs":
            name = f"rs-{run.config['beta']:g}"
        for setting, value in run.config.items():
            found = {other.config.get(setting): other.folder for other in runs}
            if len(found) > 1 and setting in EVALUATION:
                difference = " and ".join(f"{value} in {where}" for value, where in found.items())
                raise BadInput(f"{setting} is {difference}; name runs that were evaluated alike")
            if len(found) > 1 and setting not in ("advantage", "beta", "out"):
                name += f" {setting} {value}"
        columns[f"{name} {run.folder}" if name in columns else name] = run.trained
    return {"base": mean_base(runs)} | columns


def table(columns: dict[str, dict]) -> str:
    """A row for each pass@k and one for distinct, a column for each evaluation, by its name."""
    rows = [["", *columns]]
    results = columns.values()
    for k in next(iter(results))["pass_at_k"]:
        rows.append([f"pass@{k}", *(f"{result['pass_at_k'][k]:.1f}" for result in results)])
    rows.append(["distinct", *(f"{mean(result['distinct']):.2f}" for result in results)])
    width = max(8, 2 + max(map(len, columns)))
    lines = []
    for name, *cells in rows:
        lines.append(f"{name:<10}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def draw(columns: dict[str, dict], runs: list[Run], path: Path) -> None:
    """pass@k over k on the left; reward and entropy over the steps, smoothed, on the right."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    entropy = right.twinx()
    for name, result in columns.items():
        ks = [int(k) for k in result["pass_at_k"]]
        left.semilogx(ks, result["pass_at_k"].values(), "o-", base=2, label=name)
    for i, run in enumerate(runs, 1):  # C0 is the base's colour
        window = 1 + len(run.metrics) // 20
        for panel, name, style in ((right, "reward", "-"), (entropy, "entropy", "--")):
            sums = np.cumsum([0, *(line[name] for line in run.metrics)])
            means = (sums[window:] - sums[:-window]) / window
            steps = np.arange(len(means)) + (window + 1) / 2
            panel.plot(steps, means, style, color=f"C{i}")
    left.set(xlabel="k", ylabel="pass@k on held-out problems (%)", ylim=(0, None))
    left.legend()
    right.set(xlabel="step", ylabel="mean reward (solid)", ylim=(0, None))
    entropy.set(ylabel="entropy in nats a token (dashed)", ylim=(0, None))
    figure.savefig(path)


def main(arguments=None):
    parser = argparse.ArgumentParser("side_by_side", description=__doc__.splitlines()[0])
    found = sorted(Path("runs").glob("*"))
    parser.add_argument("folders", type=Path, nargs="*", default=found, help="(default: runs/*)")
    parser.add_argument("--out", type=Path, default="runs/side-by-side.png", help="the picture")
    args = parser.parse_args(arguments)
    runs = []
    for folder in args.folders:
        try:
            if not folder.is_file():  # such as the last picture
                runs.append(read_run(folder))
        except BadInput as error:
            print(f"left out: {error}", file=sys.stderr)
    if not runs:
        parser.exit(2, "side_by_side: none of these is a finished run; rs_grpo.py makes one\n")
    try:
        columns = columns_of(runs)
        print(f"{table(columns)}\n")
        count = len(runs[0].base["distinct"])
        print(f"percent of {count} held-out problems; base: mean over seeds")
        draw(columns, runs, args.out)
    except (BadInput, OSError) as error:
        parser.exit(2, f"side_by_side: {error}\n")
    print(f"The picture is {args.out}.")


if __name__ == "__main__":
    main()
