"""Every estimator side by side: train each for several seeds from the same base, evaluate all on the same problems.

    python experiments/compare.py            # the plan of experiments/README.md; goes on where it was stopped
    python experiments/compare.py --report   # only the table and the figures again, from results.json
    python experiments/compare.py --quick    # every method for 2 steps, to see that all of it works: under a minute

Runs of one seed see the same problems in the same order, and all are evaluated on the same held-out problems with the
same random numbers. A finished run is kept in results.json and not made again; an unfinished one goes on from its
checkpoint. One process works on each core, or eight on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import rs_grpo  # noqa: E402
from experiments.report import report  # noqa: E402
from rs_grpo import ADVANTAGES, BadInput, Config, countdown_value, risk_sensitive_advantage  # noqa: E402

# --- Variants that are tried here and not part of rs_grpo.py ----------------------------------------------------------

SCALE = 0.1  # mean |Â| of a batch once it is rescaled
MOST_BETA = 16.0


def rescaled(advantages: Tensor) -> Tensor:
    """Advantages (P, N) times one number, so that their mean size over the batch is SCALE; zeros stay zeros."""
    size = advantages.abs().mean()
    return advantages * (SCALE / size) if size > 0 else advantages


def beta_of_constant_kl(rewards: Tensor, kl: float = math.log(2)) -> Tensor:
    """For each group the β ≥ 0 with KL(softmax(β r) ‖ uniform) = `kl` nats: (P, N) to (P, 1) (arXiv 2601.16175).

    The divergence grows with β up to ln(N/c), c the number of samples with the best reward: where that isn't enough,
    β is MOST_BETA, and so it is for a group of equal rewards, which has no signal whatever β is.
    """
    r = rewards.double() - rewards.double().amax(1, keepdim=True)
    low, high = torch.zeros(len(r), 1, dtype=torch.float64), torch.full((len(r), 1), MOST_BETA, dtype=torch.float64)
    for _ in range(50):  # bisection
        beta = (low + high) / 2
        logp = (beta * r).log_softmax(1)
        too_small = (logp.exp() * logp).sum(1, keepdim=True) + math.log(r.shape[1]) < kl
        low, high = torch.where(too_small, beta, low), torch.where(too_small, high, beta)
    return high


def beta_of_accuracy(rewards: Tensor) -> Tensor:
    """For each group β = 8 (1 − p), from 8 where nothing is solved to 0 where everything is: (P, N) to (P, 1)."""
    return 8 * (1 - rewards.double().mean(1, keepdim=True))


def annealed_beta(config: Config) -> float:
    """β falling linearly from 8 to 0 over the run; the step is read from the run's metrics, so that it can be resumed."""
    with open(config.run_folder / rs_grpo.METRICS) as lines:
        done = sum(1 for _ in lines)
    return 8 * (1 - done / config.steps)


VARIANTS = {
    "rs_rescaled": lambda rewards, config: rescaled(ADVANTAGES["rs"](rewards, config)),
    "mean_rescaled": lambda rewards, config: rescaled(ADVANTAGES["mean"](rewards, config)),
    "grpo_rescaled": lambda rewards, config: rescaled(ADVANTAGES["grpo"](rewards, config)),
    "rs_kl": lambda rewards, config: risk_sensitive_advantage(rewards, beta_of_constant_kl(rewards)),
    "rs_accuracy": lambda rewards, config: risk_sensitive_advantage(rewards, beta_of_accuracy(rewards)),
    "rs_annealed": lambda rewards, config: risk_sensitive_advantage(rewards, annealed_beta(config)),
}


def partial_credit(completions: Sequence[str], answers: Sequence[tuple[Sequence[int], int]]) -> list[float]:
    """1 for a right answer, less for a near miss: 0.5 / (1 + distance) for an expression with another value, else 0."""

    def reward(completion: str, numbers: Sequence[int], target: int) -> float:
        value = countdown_value(completion, numbers)
        return 0.0 if value is None else 1.0 if value == target else float(0.5 / (1 + abs(value - target)))

    return [reward(completion, *answer) for completion, answer in zip(completions, answers)]


# --- The plan ---------------------------------------------------------------------------------------------------------


class Method(NamedTuple):
    """One column of the comparison."""

    label: str
    settings: dict[str, Any]  # what differs from the plan's settings
    part: str = "main"  # main, or the side question that it belongs to
    partial_credit: bool = False


METHODS = {
    "base": Method("base", {}),
    "grpo": Method("GRPO", {"advantage": "grpo"}),
    "mean": Method("mean baseline, β = 0", {"advantage": "mean"}),
    "rs2": Method("RS-GRPO, β = 2", {"advantage": "rs", "beta": 2.0}),
    "rs4": Method("RS-GRPO, β = 4", {"advantage": "rs", "beta": 4.0}),
    "rs8": Method("RS-GRPO, β = 8", {"advantage": "rs", "beta": 8.0}),
    "chen": Method("Chen et al., k = 4", {"advantage": "chen"}),
    "mahdavi": Method("Mahdavi et al., k = 4", {"advantage": "mahdavi"}),
    "pkpo": Method("PKPO, k = 4", {"advantage": "pkpo"}),
    "pkpo_loo": Method("PKPO leave-one-out, k = 4", {"advantage": "pkpo_loo"}),
    "maxrl": Method("MaxRL", {"advantage": "maxrl"}),
    "mean_partial": Method("mean baseline", {"advantage": "mean"}, "partial credit", True),
    "rs2_partial": Method("RS-GRPO, β = 2", {"advantage": "rs", "beta": 2.0}, "partial credit", True),
    "grpo_rescaled": Method("GRPO", {"advantage": "grpo_rescaled"}, "same mean |Â|"),
    "mean_rescaled": Method("mean baseline, β = 0", {"advantage": "mean_rescaled"}, "same mean |Â|"),
    "rs2_rescaled": Method("RS-GRPO, β = 2", {"advantage": "rs_rescaled", "beta": 2.0}, "same mean |Â|"),
    "rs8_rescaled": Method("RS-GRPO, β = 8", {"advantage": "rs_rescaled", "beta": 8.0}, "same mean |Â|"),
    "rs_kl": Method("β for KL = ln 2", {"advantage": "rs_kl"}, "schedules of β"),
    "rs_annealed": Method("β from 8 to 0 over the run", {"advantage": "rs_annealed"}, "schedules of β"),
    "rs_accuracy": Method("β = 8 (1 − p)", {"advantage": "rs_accuracy"}, "schedules of β"),
}


SEEDS, SEEDS_ASIDE = 5, 3  # of the main methods, and of the side questions


class Plan(NamedTuple):
    """What every run has in common; stored in results.json, and compared with it before going on."""

    steps: int = 800
    lr: float = 5e-5
    prompts: int = 32
    samples: int = 16
    eval_problems: int = 256
    eval_samples: int = 512  # at the end
    curve_samples: int = 64  # on the way
    curve_every: int = 100
    window: int = 20  # steps that are averaged for the curves of training
    folder: str = str(HERE.parent / "runs" / "compare")  # for runs under way; the only field that results.json doesn't hold

    def run_folder(self, name: str, seed: int) -> Path:
        return Path(self.folder) / f"{name}-seed{seed}-of-{self.steps}-steps-lr-{self.lr:g}"


QUICK = Plan(2, 5e-5, 4, 8, 16, 32, 32, 1, 1, str(HERE.parent / "runs" / "compare-quick"))


def run_one(plan: Plan, name: str, seed: int) -> dict[str, Any]:
    """Train one method with one seed and evaluate it: an entry of results.json. Goes on with an unfinished run."""
    method, folder, started = METHODS[name], plan.run_folder(name, seed), time.perf_counter()
    load_task = rs_grpo.load_task
    ADVANTAGES.update(VARIANTS)
    if method.partial_credit:
        rs_grpo.load_task = lambda config: load_task(config)._replace(rewards=partial_credit)
    common = {"seed": seed, "eval_problems": plan.eval_problems, "eval_rows": 1024, "micro_tokens": 2048}
    shared = {"lr": plan.lr, "prompts": plan.prompts, "samples": plan.samples, "eval_every": plan.curve_every}
    config = Config(out=str(folder), steps=plan.steps, eval_samples=plan.curve_samples, **shared, **common, **method.settings)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "evaluation", ignore_errors=True)
    entry: dict[str, Any] = {}
    with open(folder.with_suffix(".log"), "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            if name != "base":
                results = rs_grpo.train(config, resume=(folder / rs_grpo.SETTINGS).exists())
                curve = {"0": results["base"], **results["steps"], str(plan.steps): results["trained"]}
                entry["curve"] = {
                    "step": [int(step) for step in curve],
                    **{f"pass@{k}": [round(at["pass_at_k"][k], 3) for at in curve.values()] for k in ("1", "32")},
                }
                entry["training"] = training_curves([json.loads(line) for line in open(folder / rs_grpo.METRICS)], plan.window)
            model = {"model": str(folder / "model")} if name != "base" else {}
            once = Config(out=str(folder / "evaluation"), steps=0, eval_samples=plan.eval_samples, **model, **common)
            final = rs_grpo.train(once)["base"]
        finally:
            rs_grpo.load_task = load_task
    return {**entry, **{key: final[key] for key in ("n", "correct", "distinct")}, "seconds": round(time.perf_counter() - started)}


def training_curves(metrics: list[dict[str, Any]], window: int) -> dict[str, list[float]]:
    """Means of the metrics over windows of so many steps, each named by its last step."""
    windows = [metrics[i : i + window] for i in range(0, len(metrics), window)]
    names = ("reward", "solve_rate", "signal", "entropy", "grad_norm", "advantage_size")
    curves = {name: [round(sum(m[name] for m in part) / len(part), 4) for part in windows] for name in names}
    return {"step": [part[-1]["step"] for part in windows], **curves}


# --- Running it -------------------------------------------------------------------------------------------------------


def read_results(path: Path, plan: Plan) -> dict[str, Any]:
    """What is finished so far. Raises BadInput if `path` can't be read or belongs to other settings."""
    settings = {name: value for name, value in plan._asdict().items() if name != "folder"}
    if not path.exists():
        return {"settings": settings, "machine": machine(), "runs": {}}
    try:
        results = json.loads(path.read_text())
        stored, runs = results["settings"], results["runs"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} can't be read ({error}); mend it, or move it away to start anew") from error
    if stored != settings:
        raise BadInput(f"{path} was made with {stored}, not with {settings}; move it away to start anew")
    return {**results, "runs": runs}


def write_results(path: Path, results: dict[str, Any]) -> None:
    """One line per list, so that a person can look through it."""

    def lines(value: Any, indent: str = "") -> str:
        if not isinstance(value, dict):
            return json.dumps(value)
        inner = indent + " "
        return "{\n" + ",\n".join(f"{inner}{json.dumps(k)}: {lines(v, inner)}" for k, v in value.items()) + f"\n{indent}}}"

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(lines(results) + "\n")
    os.replace(aside, path)  # whole at any moment


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError, StopIteration):
        name = next(line for line in open("/proc/cpuinfo") if line.startswith("model name")).split(":")[1].strip()
        return f"{os.cpu_count()} cores of {name}"
    return f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}"


def start_worker(parent: int) -> None:
    """One thread, and no life beyond that of the process that gathers the results: two must never write one folder."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    torch.set_num_threads(1)
    threading.Thread(target=watch, daemon=True).start()


def run_all(plan: Plan, path: Path, runs: Sequence[tuple[str, int]], workers: int) -> None:
    """Make every run (method, seed) that `path` doesn't hold yet, and add each to it as soon as it is finished.

    A run that fails doesn't stop the others; in the end BadInput names it.
    """
    finished, failed = read_results(path, plan)["runs"], []
    todo = [(name, seed) for name, seed in runs if str(seed) not in finished.get(name, {})]
    if not todo:
        print(f"nothing to train: {path} holds every run that was asked for; --results another file to make them again\n")
        return
    context = multiprocessing.get_context("spawn")
    steps = {run: 1 if run[0] == "base" else plan.steps for run in todo}
    bar = tqdm(total=sum(steps.values()), unit="step", desc=f"{len(todo)} runs", dynamic_ncols=True, smoothing=0.05)
    with bar, ProcessPoolExecutor(workers, context, start_worker, (os.getpid(),)) as pool:
        waiting = {pool.submit(run_one, plan, *run): run for run in todo}
        try:
            while waiting:
                done, _ = wait(waiting, timeout=2, return_when=FIRST_COMPLETED)
                for future in done:
                    name, seed = waiting.pop(future)
                    try:
                        entry = future.result()
                    except Exception as error:
                        failed.append(f"{name} with seed {seed} ({rs_grpo.first_line(error)})")
                        continue
                    results = read_results(path, plan)  # again: another process may have added to it
                    results["runs"].setdefault(name, {})[str(seed)] = entry
                    write_results(path, results)
                    shutil.rmtree(plan.run_folder(name, seed))
                bar.n = sum(steps[run] for run in todo if run not in waiting.values())
                for run in waiting.values():
                    with contextlib.suppress(FileNotFoundError):
                        bar.n += len((plan.run_folder(*run) / rs_grpo.METRICS).read_bytes().splitlines())
                bar.set_postfix_str(f"{len(todo) - len(waiting)} finished", refresh=True)
        except BaseException:  # Ctrl-C: end the workers at once, their runs go on from their checkpoints
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
    if failed:
        raise BadInput(f"not finished: {', '.join(failed)}; the logs in {plan.folder} say more, and the same command tries again")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", default=",".join(METHODS), help=f"methods to train, separated by commas: {', '.join(METHODS)}")
    parser.add_argument("--seeds", default="", help="separated by commas (default: 0,1,2,3,4, of the side questions 0,1,2)")
    parser.add_argument("--steps", type=int, default=Plan().steps, help="training steps of each run (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=Plan().lr, help="learning rate of every run (default: %(default)s)")
    parser.add_argument("--curve-every", type=int, default=Plan().curve_every, help="steps between points of the curves (default: %(default)s)")
    cuda = torch.cuda.is_available()
    parser.add_argument("--workers", type=int, default=8 if cuda else os.cpu_count(), help="runs at a time (default: %(default)s)")
    parser.add_argument("--results", default="", help="file to keep results in (default: experiments/results.json)")
    parser.add_argument("--figures", default="", help="folder for the figures (default: figures/)")
    parser.add_argument("--report", action="store_true", help="train nothing, only draw and print what is there")
    parser.add_argument("--quick", action="store_true", help="2 steps each, into runs/compare-quick/: a smoke test, no evidence")
    args = parser.parse_args(arguments)
    names, seeds = list(dict.fromkeys(["base", *args.only.split(",")])), args.seeds.split(",") if args.seeds else range(SEEDS)
    if unknown := set(names) - set(METHODS):
        parser.error(f"--only {', '.join(sorted(unknown))}: unknown, expected some of {', '.join(METHODS)}")
    if not all(str(seed).isdecimal() for seed in seeds) or args.steps < 1 or args.workers < 1:
        parser.error("--seeds must be whole numbers separated by commas, --steps and --workers at least 1")
    plan = QUICK if args.quick else Plan(steps=args.steps, lr=args.lr, curve_every=args.curve_every)
    path = Path(args.results or (f"{plan.folder}/results.json" if args.quick else HERE / "results.json"))
    figures = Path(args.figures or (plan.folder if args.quick else HERE.parent / "figures"))
    if args.quick and not args.results and not args.report:
        shutil.rmtree(plan.folder, ignore_errors=True)
        seeds = seeds[:2]
    runs = [(name, int(seed)) for seed in dict.fromkeys(seeds) for name in names]
    if not args.seeds:
        runs = [(name, seed) for name, seed in runs if METHODS[name].part == "main" or seed < SEEDS_ASIDE]
    try:
        if not args.report:
            run_all(plan, path, runs, args.workers)
        print(report(read_results(path, plan), METHODS, figures, quick=args.quick))
    except BadInput as error:
        parser.exit(2, f"compare.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped; the same command goes on from here\n")


if __name__ == "__main__":
    main()
