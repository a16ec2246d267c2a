"""Make the runs that back the claims; each becomes a line of evidence/runs.jsonl.

    python -m evidence.compare                                   # every method, the embedded model
    python -m evidence.compare --lr 2.5e-5 5e-5 1e-4 2e-4        # four methods at each rate
    python -m evidence.compare --steps 2000 --only grpo rs2 rs8 --seeds 0 1 2
    python -m evidence.compare --testbed pretrained --gguf FILE  # SmolLM2 on countdown-text
    python -m evidence.compare --quick                           # 2 steps of every method

A run that the file holds isn't made again, and one that was broken off goes on from its checkpoint
when the same command is given again. Runs of one seed see the same problems in the same order, and
all of a testbed are evaluated on the same held-out problems, from the same seed. Every run is a
process with one thread. FILE becomes an ordinary model folder, runs/SmolLM2-135M-Instruct, once;
evidence/README.md says where it comes from.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import rs_grpo
from evidence.variants import METHODS
from rs_grpo import BadInput

STORE = Path(__file__).resolve().parent / "runs.jsonl"
SMOL = "runs/SmolLM2-135M-Instruct"
FEW = ["base", "grpo", "rs2", "rs8"]
CURVES = ("reward", "solve_rate", "signal", "entropy", "grad_norm")


# --- The plan -------------------------------------------------------------------------------------
class Testbed(NamedTuple):
    """What the runs on one model and task have in common; all else is the default of rs_grpo.py."""

    settings: dict  # eval_samples are those of a held-out problem on the way
    samples: int  # of each held-out problem at the end
    every: int  # steps between evaluations on the way
    window: int  # steps that are averaged for a point of the training curves
    methods: list  # that are compared unless --only or --lr is given
    seeds: int  # of the main methods; all else has three at most


SMALL = dict(eval_samples=64, precision="float32")
LARGE = dict(model=SMOL, task="countdown-text", steps=80, lr=2e-5, prompts=16, save_every=5)
LARGE |= dict(eval_samples=32, micro_tokens=8192, precision="bfloat16")
QUICK = dict(steps=2, prompts=4, samples=8, eval_problems=16, eval_samples=32)
TESTBEDS = {
    "countdown": Testbed(SMALL, samples=512, every=100, window=20, methods=list(METHODS), seeds=5),
    "pretrained": Testbed(LARGE, samples=64, every=40, window=5, methods=FEW, seeds=3),
    "quick": Testbed(QUICK, samples=32, every=1, window=1, methods=list(METHODS), seeds=1),
}


def begin(series, testbed, method, seed, changes):
    """The beginning of a run's line, before it is made: what it is called and its settings."""
    settings = TESTBEDS[testbed].settings | changes | METHODS[method].settings
    settings = asdict(METHODS[method].config_class(**settings))
    del settings["seed"], settings["out"]
    line = {"series": series, "testbed": testbed, "method": method, "seed": seed}
    return line | {"settings": settings}


def identity(line):
    """Lines that agree in this are the same run."""
    settings = line["settings"]
    plan = (line["series"], line["testbed"], line["method"])
    return (*plan, settings["steps"], settings["lr"], line["seed"])


def name_of(line):
    return "{}-{}-{}-{}steps-{:g}-seed{}".format(*identity(line))


# --- One run --------------------------------------------------------------------------------------
def make(line, folder):
    """Train and evaluate: `line` with the results. Goes on with what `folder` holds of the run.

    What it prints goes into a file beside the folder.
    """
    method, testbed = METHODS[line["method"]], TESTBEDS[line["testbed"]]
    config = method.config_class(**line["settings"], seed=line["seed"], out=str(folder))
    end = replace(config, steps=0, eval_samples=testbed.samples, out=str(folder / "end"))
    seconds = 0
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(f"{folder}.log", "a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        if config.steps:
            rs_grpo.train(config, goes_on(config), watched(method.collect, testbed.every))
            curves, seconds = read_curves(folder, testbed.window)
            line = line | curves
            end = replace(end, model=str(folder / "model"))
        shutil.rmtree(end.out, ignore_errors=True)
        started = time.perf_counter()
        (counts,) = rs_grpo.train(end).values()
    seconds += time.perf_counter() - started
    del counts["pass_at_k"]  # follows from the counts
    return line | counts | {"seconds": round(seconds)}


def watched(collect, every):
    """`collect` that also evaluates every so many steps, and counts the problems ever solved.

    What it notes lies in `state`, and so in every checkpoint.
    """

    def collect_and_note(policy, task, config, state, generator):
        if state.step % every == 0 and state.step not in state.results:
            state.results[state.step] = rs_grpo.evaluate(policy, task, config)
        rollouts, advantages = collect(policy, task, config, state, generator)
        solved = vars(state).setdefault("solved", {})  # a dictionary stands for a set
        for question, best in zip(rollouts.questions, rollouts.rewards.amax(1).tolist()):
            if best >= 1:
                solved[question] = True
        rates = vars(state).setdefault("solve_rates", [])  # one a step
        rates.append(len(solved) / len(task.train))
        return rollouts, advantages

    return collect_and_note


def goes_on(config):
    """Whether the run's folder has a checkpoint. Raises BadInput if it is of another run."""
    folder = config.run_folder
    if not (folder / "checkpoint.pt").exists():  # nothing worth keeping
        shutil.rmtree(folder, ignore_errors=True)
        return False
    if json.loads((folder / "config.json").read_text()) != asdict(config):
        raise BadInput(f"{folder} holds an unfinished run with other settings; remove it")
    return True


def read_curves(folder, window):
    """Curves of a finished run's folder, and the seconds that all its steps took."""
    evaluations = json.loads((folder / "eval.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    state = torch.load(folder / "checkpoint.pt", map_location="cpu")["state"]
    for line, rate in zip(metrics, state["solve_rates"]):
        line["solve_rate"] = rate
    curve = {"step": [int(step) for step in evaluations]}
    for k in ("1", "32"):
        curve[f"pass@{k}"] = [round(at["pass_at_k"][k], 3) for at in evaluations.values()]
    training = training_curves(metrics, window)
    return {"curve": curve, "training": training}, sum(line["seconds"] for line in metrics)


def training_curves(metrics, window):
    """Means over windows of so many steps, each named by its last step."""
    windows = [metrics[start : start + window] for start in range(0, len(metrics), window)]
    curves = {"step": [part[-1]["step"] for part in windows]}
    for name in CURVES:
        curves[name] = [round(sum(line[name] for line in part) / len(part), 4) for part in windows]
    return curves


# --- All runs -------------------------------------------------------------------------------------
def make_all(lines, args, made_by):
    """Make the runs and add their lines to the file. Raises BadInput that names those that failed.

    One that fails doesn't stop the others. Each has a process of its own, so that whatever ends
    that process ends no other run.
    """
    failed = []
    pool = ThreadPoolExecutor(args.workers)
    waiting = {pool.submit(in_a_process, line, args.runs / name_of(line)): line for line in lines}
    try:
        for future in as_completed(waiting):
            name = name_of(waiting[future])
            if future.exception() is not None:
                print(f"{name} failed: {future.exception()!r:.300}", flush=True)
                failed.append(name)
                continue
            line = future.result()
            add_line(args.store, line | made_by)
            clear(args.runs / name, args.keep_models)
            print(f"{name}: {line['seconds']} s", flush=True)
    except BaseException:  # Ctrl-C: what is under way goes on from its checkpoint another time
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown()
        raise
    if failed:
        logs = f"the .log files in {args.runs} say more, and the same command tries again"
        raise BadInput(f"not finished: {', '.join(failed)}; {logs}")


def in_a_process(line, folder):
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, start_process) as process:
        return process.submit(make, line, folder).result()


def start_process():
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its default is a semaphore, which a kill would leave behind
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """However the process that asked for the run ends, the run ends, too."""
    multiprocessing.parent_process().join()
    os._exit(1)


def add_line(path, line):
    """In one write, so that a kill can't leave half a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())


def clear(folder, keep_model):
    """Remove a finished run's folder, or what only going on and the last evaluation need."""
    shutil.rmtree(folder / "end" if keep_model else folder, ignore_errors=True)
    (folder / "checkpoint.pt").unlink(missing_ok=True)


def maker(arguments):
    """Who made a run, as its line says."""
    git = ["git", "-C", str(STORE.parent), "describe", "--always", "--dirty", "--exclude", "*"]
    commit = ""
    with contextlib.suppress(OSError):
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "command": shlex.join(["python", "-m", "evidence.compare", *arguments]),
        "commit": commit,
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def machine():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        names = (line for line in open("/proc/cpuinfo") if line.startswith("model name"))
        name = next(names).split(":")[1].strip()
    return f"{os.cpu_count()} cores of {name}"


def convert(gguf, folder):
    """Make an ordinary model folder of the weights, the tokenizer and its chat template in `gguf`.

    In bfloat16, as most models are published: what that rounds off is far less than what the
    quantisation has lost. Raises BadInput if it can't be converted, whatever the reason.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    aside = folder.with_name(f"{folder.name}.tmp")  # what a kill leaves isn't taken for a model
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    # By default weights stay packed, which can neither learn nor be saved.
    dense = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
    try:
        AutoTokenizer.from_pretrained(**source).save_pretrained(aside)
        AutoModelForCausalLM.from_pretrained(**source, **dense).save_pretrained(aside)
    except Exception as error:  # no such file, no package gguf, another architecture, a full disk
        raise BadInput(f"--gguf {gguf} can't be converted ({error!r:.200})") from error
    os.replace(aside, folder)


# --- The command line -----------------------------------------------------------------------------
def parse(arguments):
    parser = argparse.ArgumentParser("compare.py", description=__doc__.splitlines()[0])
    parser.error = lambda message: parser.exit(2, f"compare.py: {message}; see --help\n")
    flag = parser.add_argument
    flag("--testbed", default="countdown", choices=["countdown", "pretrained"])
    flag("--only", nargs="+", choices=METHODS, metavar="METHOD", help=" ".join(METHODS))
    flag("--seeds", nargs="+", type=int, help="(default: 0 to 4, or 0 to 2 of a side question)")
    flag("--lr", nargs="+", type=float, default=[], help="learning rates")
    flag("--steps", type=int, help="(default: 800, pretrained 80)")
    flag("--series", default="main", help="runs of another one are made anew (default: main)")
    flag("--gguf", type=Path, help="file to make the pretrained model's folder from, once")
    workers = 8 if torch.cuda.is_available() else os.cpu_count()
    flag("--workers", type=int, default=workers, help="runs at a time (default: %(default)s)")
    flag("--keep-models", action="store_true", help="keep each run's folder, with its model/")
    flag("--quick", action="store_true", help="2 steps each, all of it in runs/quick: no evidence")
    args = parser.parse_args(arguments)
    args.runs = Path("runs")
    args.store = STORE
    if args.quick:
        args.testbed = "quick"
        args.runs = Path("runs/quick")
        args.store = args.runs / "runs.jsonl"
        args.store.unlink(missing_ok=True)
    return args


def asked(args):
    """The beginnings of the lines of all runs that are asked for; the base once for each seed."""
    testbed = TESTBEDS[args.testbed]
    steps = {} if args.steps is None else {"steps": args.steps}
    changes = [steps | {"lr": lr} for lr in args.lr] or [steps]
    lines = []
    for name in args.only or ([*FEW, "maxrl"] if args.lr else testbed.methods):
        aside = args.lr or METHODS[name].part != "main"
        seeds = range(min(testbed.seeds, 3) if aside else testbed.seeds)
        for change in [{}] if name == "base" else changes:
            for seed in args.seeds or seeds:
                lines.append(begin(args.series, args.testbed, name, seed, change))
    return sorted(lines, key=lambda line: line["seed"])


def run(args, arguments):
    stored = set()
    if args.store.exists():
        stored = {identity(json.loads(line)) for line in args.store.open()}
    missing = [line for line in asked(args) if identity(line) not in stored]
    if not missing:
        print(f"nothing is missing: {args.store} holds every run that was asked for")
        return
    if args.testbed == "pretrained" and not Path(SMOL).exists():
        if not args.gguf:
            raise BadInput(f"{SMOL}/ isn't there; give --gguf FILE to make it")
        convert(args.gguf, Path(SMOL))
    print(f"runs to make: {len(missing)}; their folders and logs are in {args.runs}/", flush=True)
    make_all(missing, args, maker(arguments))
    print(f"finished: {args.store} has them all; python -m evidence.report makes the tables")


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        run(parse(arguments), arguments)
    except (BadInput, OSError, json.JSONDecodeError) as error:
        sys.exit(f"compare.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from here")


if __name__ == "__main__":
    main()
