"""Make the runs that back the claims; each becomes a line of evidence/runs.jsonl.

    python -m evidence.compare                                   # every method, the embedded model
    python -m evidence.compare --lr 2.5e-5 5e-5 1e-4 2e-4        # four methods at each rate
    python -m evidence.compare --only rs2 --kl 0.01 0.02 0.05    # with a KL penalty
    python -m evidence.compare --only rs2 --temperature 0.6 2    # evaluates kept models again
    python -m evidence.compare --testbed pretrained --gguf FILE  # SmolLM2 on countdown-text
    python -m evidence.compare --quick                           # 2 steps of every method

The command makes the runs that the file doesn't hold, each in a process with one thread; given
again, it goes on with those that were interrupted. evidence/README.md says where to get FILE.
"""

import argparse
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
from dataclasses import asdict, replace
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from tqdm import tqdm

import rs_grpo
from evidence.variants import METHODS
from extensions import kl
from rs_grpo import BadInput

STORE = Path(__file__).resolve().parent / "runs.jsonl"
SMOL = "runs/SmolLM2-135M-Instruct"
FEW = ["base", "grpo", "rs2", "rs8"]


class Testbed(NamedTuple):  # what the runs on one model and task have in common
    settings: dict  # all else is the default of rs_grpo.py
    every: int  # steps between evaluations on the way
    samples: int  # of each held-out problem in an evaluation on the way
    window: int  # steps averaged for one point of the training curves
    methods: list  # compared by default
    seeds: int  # of the main methods; side questions have three at most


SMALL = dict(eval_samples=512, precision="float32")
LARGE = dict(model=SMOL, task="countdown-text", steps=80, lr=2e-5, prompts=16, save_every=5)
LARGE |= dict(eval_samples=64, micro_tokens=8192, precision="bfloat16")
QUICK = dict(steps=2, prompts=4, samples=8, eval_problems=16, eval_samples=64)
TESTBEDS = {
    "countdown": Testbed(SMALL, every=100, samples=64, window=20, methods=list(METHODS), seeds=5),
    "pretrained": Testbed(LARGE, every=40, samples=32, window=5, methods=FEW, seeds=3),
    "quick": Testbed(QUICK, every=1, samples=32, window=2, methods=list(METHODS), seeds=1),
}


def begin(series, testbed, method, seed, changes):
    """A run's line before the run is made: what identifies it, and its settings."""
    settings = {"kl": 0.0} | TESTBEDS[testbed].settings | METHODS[method].settings | changes
    if testbed == "countdown" and settings["kl"]:
        settings["eval_problems"] = 512  # the second half chooses λ
    settings = asdict(kl.Config(**settings))
    del settings["seed"], settings["out"]
    line = {"series": series, "testbed": testbed, "method": method, "seed": seed}
    return line | {"settings": settings}


def name_of(line):
    settings = line["settings"]
    name = "{series}-{testbed}-{method}-{settings[steps]}steps-{settings[lr]:g}".format(**line)
    if settings.get("kl"):
        name += f"-kl{settings['kl']:g}"
    if settings["temperature"] != 1:
        name += f"-temperature{settings['temperature']:g}"
    return f"{name}-seed{line['seed']}"


def make(line, folder):
    """Train and evaluate; return `line` with the results. Goes on with what `folder` holds."""
    started = time.perf_counter()
    testbed = TESTBEDS[line["testbed"]]
    config = kl.Config(**line["settings"], seed=line["seed"], out=str(folder))
    collect = watched(kl.with_penalty(rs_grpo.collect), testbed)
    results = rs_grpo.train(config, goes_on(config), collect)
    line = line | results[config.steps]
    del line["pass_at_k"]  # follows from the counts
    if config.steps:
        line |= curves(folder, results, testbed.window)
    return line | {"seconds": round(time.perf_counter() - started)}  # since it last went on


def goes_on(config):
    """Whether the folder has a checkpoint of these settings; if not, it is removed."""
    folder = config.run_folder
    stored = folder / "config.json"
    if (folder / "checkpoint.pt").exists() and json.loads(stored.read_text()) == asdict(config):
        return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


def watched(collect, testbed):
    """`collect` that also evaluates on the way and keeps track of the problems solved."""

    def collect_and_note(policy, task, config, state, generator):
        if state.step == 0:  # a checkpoint holds all of state
            state.solved = []  # questions
            state.solve_rates = []  # after each step
        if state.step % testbed.every == 0 and state.step not in state.results:
            fewer = replace(config, eval_samples=testbed.samples)
            state.results[state.step] = rs_grpo.evaluate(policy, task, fewer)
        rollouts, advantages = collect(policy, task, config, state, generator)
        best = rollouts.rewards.amax(1).tolist()
        solved = {question for question, reward in zip(rollouts.questions, best) if reward >= 1}
        state.solved = sorted(solved.union(state.solved))
        state.solve_rates.append(len(state.solved) / len(task.train))
        return rollouts, advantages

    return collect_and_note


def curves(folder, results, window):
    """pass@k on the way, and means over windows of training, named by their last steps."""
    curve = {"step": list(results)}
    for k in (1, 32):
        curve[f"pass@{k}"] = [round(result["pass_at_k"][k], 3) for result in results.values()]
    metrics = [json.loads(row) for row in (folder / "metrics.jsonl").open()]
    state = torch.load(folder / "checkpoint.pt", map_location="cpu")["state"]
    for row, rate in zip(metrics, state["solve_rates"]):
        row["solve_rate"] = rate
    windows = [metrics[start : start + window] for start in range(0, len(metrics), window)]
    training = {"step": [part[-1]["step"] for part in windows]}
    for name in ("reward", "solve_rate", "signal", "entropy", "grad_norm"):
        training[name] = [round(fmean(row[name] for row in part), 4) for part in windows]
    return {"curve": curve, "training": training}


def make_all(lines, args):
    """Make the runs, each in a process of its own; return the names of those that failed."""
    context = multiprocessing.get_context("spawn")
    waiting = list(lines)
    running = {}  # from sentinel to process
    failed = []
    while waiting or running:
        while waiting and len(running) < args.workers:
            line = waiting.pop(0)
            process = context.Process(target=work, args=(line, args), name=name_of(line))
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


def work(line, args):
    """Make one run and add its line to the file; the output goes to a .log beside its folder."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # the default is a semaphore, which outlives a killed process
    folder = args.runs / name_of(line)
    sys.stdout = sys.stderr = open(f"{folder}.log", "a")
    line = make(line, folder) | args.maker
    with open(args.store, "ab", buffering=0) as file:  # one write: a kill can't leave half a line
        file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
    if not args.keep_models:
        shutil.rmtree(folder, ignore_errors=True)


def end_with_parent():
    """End this process when its parent ends, however that happens."""
    multiprocessing.parent_process().join()
    os._exit(1)


def maker():
    """What makes the runs, for their lines."""
    status, commit = subprocess.getstatusoutput("git describe --always --dirty --exclude '*'")
    machine = f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    return {
        "command": shlex.join(["python", "-m", "evidence.compare", *sys.argv[1:]]),
        "commit": "unknown" if status else commit,
        "machine": machine,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def convert(gguf, folder):
    """Make a model folder in bfloat16 of a GGUF file's weights and tokenizer. Raises BadInput."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    aside = folder.with_name(f"{folder.name}.tmp")  # what a kill leaves isn't taken for a model
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    dense = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
    try:
        AutoTokenizer.from_pretrained(**source).save_pretrained(aside)
        AutoModelForCausalLM.from_pretrained(**source, **dense).save_pretrained(aside)
    except Exception as error:  # no such file, no package gguf, another architecture, a full disk
        raise BadInput(f"--gguf {gguf} can't be converted ({error!r:.200})") from error
    os.replace(aside, folder)


def parse(arguments):
    parser = argparse.ArgumentParser("compare.py", description=__doc__.splitlines()[0])
    parser.error = lambda message: parser.exit(2, f"compare.py: {message}; see --help\n")
    flag = parser.add_argument
    flag("--testbed", default="countdown", choices=["countdown", "pretrained"])
    flag("--only", nargs="+", choices=METHODS, metavar="METHOD", help=" ".join(METHODS))
    flag("--seeds", nargs="+", type=int, help="(default: 0 to 4, or 0 to 2 for a side question)")
    flag("--lr", nargs="+", type=float, default=[], help="learning rates")
    flag("--kl", nargs="+", type=float, default=[], help="weights of a KL penalty")
    flag("--temperature", nargs="+", type=float, default=[], help="evaluate kept models at these")
    flag("--steps", type=int, help="(default: 800, pretrained 80)")
    flag("--series", default="main", help="another name makes the same runs anew (default: main)")
    flag("--gguf", type=Path, help="file to make the pretrained model's folder from")
    flag("--workers", type=int, default=os.cpu_count(), help="runs at a time (%(default)s)")
    flag("--keep-models", action="store_true", help="keep each run's folder, with its model/")
    flag("--quick", action="store_true", help="2 steps each, all in runs/quick; no evidence")
    args = parser.parse_args(arguments)
    if args.temperature and (args.steps or 1 in args.temperature):
        parser.error("--temperature takes others than 1, and models of the default number of steps")
    args.runs = Path("runs/quick") if args.quick else Path("runs")
    args.store = args.runs / "runs.jsonl" if args.quick else STORE
    if args.quick:
        args.testbed = "quick"
    return args


def asked(args):
    """The lines of all runs that are asked for, before they are made; one base for each seed."""
    testbed = TESTBEDS[args.testbed]
    steps = {"steps": args.steps} if args.steps else {}
    changes = [steps | {"lr": lr} for lr in args.lr] or [steps]
    changes = [change | {"kl": weight} for weight in args.kl or [0.0] for change in changes]
    side = args.lr or args.kl or args.temperature
    lines = []
    for name in args.only or ([*FEW, "maxrl"] if side else testbed.methods):
        aside = side or METHODS[name].part != "main"
        seeds = range(min(testbed.seeds, 3) if aside else testbed.seeds)
        for change in [{}] if name == "base" else changes:
            for seed in args.seeds or seeds:
                lines.append(begin(args.series, args.testbed, name, seed, change))
    if args.temperature:
        lines = [again(line, args.runs, t) for line in lines for t in args.temperature]
    return sorted(lines, key=lambda line: line["seed"])


def again(line, runs, temperature):
    """The evaluation of a run's kept model at a temperature: its line before it is made."""
    settings = line["settings"] | {"temperature": temperature, "steps": 0}
    if line["method"] != "base":
        settings["model"] = str(runs / name_of(line) / "model")
    return line | {"settings": settings}


def missing(args):
    """The lines of those runs that the file doesn't hold."""
    stored = {name_of(json.loads(line)) for line in args.store.open()}
    return [line for line in asked(args) if name_of(line) not in stored]


def run(args):
    """Make the runs that are missing. Raises BadInput if some of them fail."""
    args.runs.mkdir(parents=True, exist_ok=True)
    if args.gguf and not Path(SMOL).exists():
        convert(args.gguf, Path(SMOL))
    if args.quick:
        args.store.write_text("")
    lines = missing(args)
    if not lines:
        print(f"nothing is missing: {args.store} holds every run that was asked for")
        return
    if args.testbed == "pretrained" and not Path(SMOL).exists():
        raise BadInput(f"{SMOL}/ isn't there; give --gguf FILE to make it")
    args.maker = maker()
    failed = make_all(lines, args)
    if failed:
        raise BadInput(f"not finished: {', '.join(failed)}; see the .log files in {args.runs}")
    print(f"finished: {args.store} has them all; python -m evidence.report makes the tables")


def main(arguments=None):
    try:
        run(parse(arguments))
    except (BadInput, OSError, json.JSONDecodeError) as error:
        sys.exit(f"compare.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from here")


if __name__ == "__main__":
    main()
