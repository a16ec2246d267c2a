"""Make the runs that back the claims; each becomes a line of evidence/runs.jsonl.

    python -m evidence.compare                                   # every method, the embedded model
    python -m evidence.compare --lr 2.5e-5 5e-5 1e-4 2e-4        # five methods at each rate
    python -m evidence.compare --steps 2000 --only grpo rs2 rs8 --seeds 0 1 2
    python -m evidence.compare --testbed pretrained --gguf FILE  # SmolLM2 on countdown-text
    python -m evidence.compare --quick                           # 2 steps of every method

A run that the file holds isn't made again. A run that was interrupted goes on from its checkpoint
when the same command is given again. Runs with the same seed see the same problems in the same
order. Each run is a process of its own with one thread. The first use of FILE turns it into an
ordinary model folder, runs/SmolLM2-135M-Instruct; evidence/README.md says where to get it.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import rs_grpo
from evidence.variants import METHODS
from extensions.estimators import Config
from rs_grpo import TASKS, BadInput

STORE = Path(__file__).resolve().parent / "runs.jsonl"
SMOL = "runs/SmolLM2-135M-Instruct"
FEW = ["base", "grpo", "rs2", "rs8"]
CURVES = ("reward", "solve_rate", "signal", "entropy", "grad_norm")


# --- The plan -------------------------------------------------------------------------------------
class Testbed(NamedTuple):
    """What the runs on one model and task have in common; all else is the default of rs_grpo.py."""

    settings: dict  # eval_samples are for evaluations during training
    samples: int  # of each held-out problem after training
    every: int  # steps between evaluations during training
    window: int  # steps averaged for one point of the training curves
    methods: list  # compared unless --only or --lr is given
    seeds: int  # of the main methods; side questions have three at most


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
    """A run's line before the run is made: what identifies it, and its settings."""
    settings = asdict(Config(**TESTBEDS[testbed].settings | changes | METHODS[method].settings))
    del settings["seed"], settings["out"]
    line = {"series": series, "testbed": testbed, "method": method, "seed": seed}
    return line | {"settings": settings}


def identity(line):
    """Lines with the same identity are the same run."""
    settings = line["settings"]
    plan = (line["series"], line["testbed"], line["method"])
    return (*plan, settings["steps"], settings["lr"], line["seed"])


def name_of(line):
    return "{}-{}-{}-{}steps-{:g}-seed{}".format(*identity(line))


# --- One run --------------------------------------------------------------------------------------
def make(line, folder):
    """Train and evaluate; return `line` with the results. An interrupted run in `folder` goes on."""
    method = METHODS[line["method"]]
    testbed = TESTBEDS[line["testbed"]]
    config = Config(**line["settings"], seed=line["seed"], out=str(folder))
    seconds = 0
    if config.steps:
        results = rs_grpo.train(config, goes_on(config), watched(method.collect, testbed.every))
        metrics = [json.loads(row) for row in (folder / "metrics.jsonl").open()]
        state = torch.load(folder / "checkpoint.pt", map_location="cpu")["state"]
        metrics = [row | {"solve_rate": rate} for row, rate in zip(metrics, state["solve_rates"])]
        training = training_curves(metrics, testbed.window)
        line = line | {"curve": evaluation_curve(results), "training": training}
        seconds = sum(row["seconds"] for row in metrics)
        config = replace(config, model=str(folder / "model"))
    started = time.perf_counter()
    config = replace(config, eval_samples=testbed.samples)
    task = TASKS[config.task](config)
    counts = rs_grpo.evaluate(rs_grpo.load_policy(config, task), task, config)
    seconds += time.perf_counter() - started
    del counts["pass_at_k"]  # follows from the counts
    return line | counts | {"seconds": round(seconds)}


def goes_on(config):
    """Whether the folder has a checkpoint of these settings; anything else there is removed."""
    folder = config.run_folder
    if (folder / "checkpoint.pt").exists():
        if json.loads((folder / "config.json").read_text()) == asdict(config):
            return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


def watched(collect, every):
    """`collect` that also evaluates every so many steps and keeps track of the problems solved.

    Its notes are part of `state`, and so of every checkpoint.
    """

    def collect_and_note(policy, task, config, state, generator):
        if state.step == 0:
            state.solved = []  # questions
            state.solve_rates = []  # after each step
        if state.step % every == 0 and state.step not in state.results:
            state.results[state.step] = rs_grpo.evaluate(policy, task, config)
        rollouts, advantages = collect(policy, task, config, state, generator)
        best = rollouts.rewards.amax(1).tolist()
        solved = {question for question, reward in zip(rollouts.questions, best) if reward >= 1}
        state.solved = sorted(solved.union(state.solved))
        state.solve_rates.append(len(state.solved) / len(task.train))
        return rollouts, advantages

    return collect_and_note


def evaluation_curve(results):
    curve = {"step": list(results)}
    for k in (1, 32):
        curve[f"pass@{k}"] = [round(result["pass_at_k"][k], 3) for result in results.values()]
    return curve


def training_curves(metrics, window):
    """Means over windows of so many steps, each named by its last step."""
    windows = [metrics[start : start + window] for start in range(0, len(metrics), window)]
    curves = {"step": [part[-1]["step"] for part in windows]}
    for name in CURVES:
        curves[name] = [round(sum(row[name] for row in part) / len(part), 4) for part in windows]
    return curves


# --- All runs -------------------------------------------------------------------------------------
def make_all(lines, args, made_by):
    """Make the runs, each in a process of its own; return the names of those that failed."""
    context = multiprocessing.get_context("spawn")
    waiting = list(lines)
    running = {}  # from sentinel to process
    failed = []
    while waiting or running:
        while waiting and len(running) < args.workers:
            line = waiting.pop(0)
            process = context.Process(target=work, args=(line, args, made_by), name=name_of(line))
            process.daemon = True  # Ctrl-C here ends it, too
            process.start()
            running[process.sentinel] = process
        for sentinel in wait(running):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode:
                failed.append(process.name)
            print(process.name, "failed" if process.exitcode else "finished", flush=True)
    return failed


def work(line, args, made_by):
    """Make one run and add its line to the file; the output goes to a .log beside its folder."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # the default is a semaphore, which outlives a killed process
    folder = args.runs / name_of(line)
    sys.stdout = sys.stderr = open(f"{folder}.log", "a")
    line = make(line, folder) | made_by
    with open(args.store, "ab", buffering=0) as file:  # one write: a kill can't leave half a line
        file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
    clear(folder, args.keep_models)


def end_with_parent():
    """End this process when its parent ends, however that happens."""
    multiprocessing.parent_process().join()
    os._exit(1)


def clear(folder, keep_model):
    """Remove a finished run's folder, or only its checkpoint."""
    if keep_model:
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def maker(arguments):
    """What made a run, for its line."""
    status, commit = subprocess.getstatusoutput("git describe --always --dirty --exclude '*'")
    return {
        "command": shlex.join(["python", "-m", "evidence.compare", *arguments]),
        "commit": "unknown" if status else commit,
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def machine():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    file = Path("/proc/cpuinfo")  # on Linux
    named = re.search(r"model name\s*: (.*)", file.read_text() if file.exists() else "")
    return f"{os.cpu_count()} cores of {named[1] if named else platform.machine()}"


def convert(gguf, folder):
    """Make an ordinary model folder of a GGUF file's weights, tokenizer and chat template.

    The weights become bfloat16, as most models are published; that rounds off far less than the
    quantisation has lost. Raises BadInput if the file can't be converted, whatever the reason.
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
    flag("--seeds", nargs="+", type=int, help="(default: 0 to 4, or 0 to 2 for a side question)")
    flag("--lr", nargs="+", type=float, default=[], help="learning rates")
    flag("--steps", type=int, help="(default: 800, pretrained 80)")
    flag("--series", default="main", help="another name makes the same runs anew (default: main)")
    flag("--gguf", type=Path, help="file to make the pretrained model's folder from")
    flag("--workers", type=int, default=os.cpu_count(), help="runs at a time (%(default)s)")
    flag("--keep-models", action="store_true", help="keep each run's folder, with its model/")
    flag("--quick", action="store_true", help="2 steps each, all in runs/quick; no evidence")
    args = parser.parse_args(arguments)
    args.runs, args.store = Path("runs"), STORE
    if args.quick:
        args.testbed = "quick"
        args.runs = Path("runs/quick")
        args.store = args.runs / "runs.jsonl"
        args.store.unlink(missing_ok=True)
    return args


def asked(args):
    """The lines of all runs that are asked for, before they are made; one base for each seed."""
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


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(arguments)
    try:
        if args.gguf and not Path(SMOL).exists():
            convert(args.gguf, Path(SMOL))
        stored = [json.loads(line) for line in args.store.open()] if args.store.exists() else []
        stored = set(map(identity, stored))
        missing = [line for line in asked(args) if identity(line) not in stored]
        if not missing:
            sys.exit(print(f"nothing is missing: {args.store} holds every run that was asked for"))
        if args.testbed == "pretrained" and not Path(SMOL).exists():
            raise BadInput(f"{SMOL}/ isn't there; give --gguf FILE to make it")
        print(f"runs to make: {len(missing)}; folders and logs are in {args.runs}/", flush=True)
        failed = make_all(missing, args, maker(arguments))
        if failed:
            raise BadInput(f"not finished: {', '.join(failed)}; see the .log files in {args.runs}")
    except (BadInput, OSError, json.JSONDecodeError) as error:
        sys.exit(f"compare.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from here")
    print(f"finished: {args.store} has them all; python -m evidence.report makes the tables")


if __name__ == "__main__":
    main()
