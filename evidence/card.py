"""Measure a GPU with one command: its limits, and rs_grpo.py's speed, precision and memory on it.

    python -m evidence.card --out FOLDER --model runs/SmolLM2-135M-Instruct --minutes 6
    python -m evidence.card --out FOLDER --only 6,7     # these steps, added to FOLDER's figures
    python -m evidence.card --out FOLDER --quick        # everything cut small, also on a CPU

--model is a folder, or a .gguf file or its parts in order; without it the embedded model is taken.
Each step (STEPS, at the end) runs in a process group of its own, for its share of the time that is
left. FOLDER has a log of each, and card.md and card.json with all figures so far.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch.utils.benchmark import Timer

import rs_grpo
from evidence.compare import convert
from evidence.side_by_side import metrics_of, table
from evidence.speed import race, time_ours
from extensions import kl

GIB = 2**30


class Plan(NamedTuple):
    out: Path
    device: str  # cuda or cpu
    model: dict  # settings of a Config: device, and model and task if --model is given
    quick: bool

    def pick(self, full, quick):
        return quick if self.quick else full


def run_all(steps: dict[str, tuple], plan: Plan, minutes: float) -> None:
    """Run the steps one after another; card.json and card.md hold what they have measured.

    A step is its name, its share of the time, and a function from a Plan that yields tables (a
    sentence, columns, rows) and texts (a sentence, text). The last with a given sentence is kept.
    """
    ends = time.monotonic() + 60 * minutes
    shares = sum(share for _, share, _ in steps.values())
    for number, (name, share, measure) in steps.items():
        record(plan, number, name=name, note="under way", tables={})
        seconds = max(1.0, ends - time.monotonic()) * share / shares
        note = run_one(measure, number, plan, seconds)
        record(plan, number, note=note)
        print(f"{number}. {name}: {note}", flush=True)
        shares -= share


def run_one(measure, number, plan, seconds):
    """Run a step in a process group of its own and end what is left of it. Returns how it ended."""
    started = time.monotonic()
    log = plan.out / f"step-{number}.log"
    log.write_text("")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["evidence.speed", "transformers"])  # imported once for all
    process = context.Process(target=work, args=(measure, number, plan, log))
    process.start()
    try:
        process.join(seconds)
        status = process.exitcode  # None: it still runs
    finally:  # also after Ctrl-C
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # if it had no group yet
        process.join()
    spent = f"{time.monotonic() - started:.0f} s"
    if status is None:
        return f"stopped after {spent}, its share of the time"
    last = log.read_text().strip().rpartition("\n")[2]
    return f"failed after {spent}: {last[-300:]}" if status else f"finished in {spent}"


def work(measure, number, plan, log):
    """In the step's process: its output goes to its log, and what it measures into the figures."""
    os.setsid()
    file = log.open("w")
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    tables = {}
    for about, *content in measure(plan):
        tables[about] = content
        record(plan, number, tables=tables)


def record(plan, number, **news):
    """Put what is new of a step into card.json, and write card.md from it."""
    path = plan.out / "card.json"
    figures = json.loads(path.read_text()) if path.exists() else {}
    figures.setdefault(number, {}).update(news)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(figures, indent=1, ensure_ascii=False))
    os.replace(aside, path)  # whole at any moment
    lines = ["# Figures of one machine"]
    for number, step in sorted(figures.items()):
        lines += ["", f"## {number}. {step['name']}", "", f"({step['note']})"]
        for about, content in step["tables"].items():
            lines += ["", about, "", *as_markdown(*content)]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def as_markdown(columns, rows=None):
    """Lines of a table, or of a text that stands as it is."""
    if rows is None:
        return ["```", columns, "```"]
    lines = [columns, re.sub("[^|]+", " --- ", columns).strip()]
    lines += [" | ".join(map(shown, row)) for row in rows]
    return [f"| {line} |" for line in lines]


def shown(value):
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "–" if value is None else str(value).replace("|", "/")


def machine(plan):
    query = "nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader"
    card = subprocess.getoutput(query) if plan.device == "cuda" else "none"
    columns = "card, memory, driver | CPU cores | torch | CUDA | transformers"
    row = [card, os.cpu_count(), version("torch"), torch.version.cuda, version("transformers")]
    yield "What was measured.", columns, [row]
    rows = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        size = plan.pick(8192, 256)
        a = torch.ones(size, size, dtype=dtype, device=plan.device)
        seconds = Timer("a @ a", globals={"a": a}).timeit(10).mean
        rows.append([str(dtype), 2 * size**3 / seconds / 1e12, bandwidth(plan, dtype) / 1e9])
    yield "A large matrix product, and a copy.", "precision | TFLOP/s | GB/s", rows


def bandwidth(plan, dtype):
    """Bytes a second that a copy on the device reads and writes."""
    source = torch.ones(plan.pick(2**28, 2**22), dtype=dtype, device=plan.device)
    copy = Timer("source.clone()", globals={"source": source}).timeit(10)
    return 2 * source.nbytes / copy.mean


def tests(plan):
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "test_rs_grpo.py"]
    command += plan.pick([], ["-k", "by_hand"])
    environment = os.environ | {"DEVICE": plan.device}
    pytest = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    print(pytest.stdout)
    lines = re.findall("^FAILED.*|^ERROR.*|^.* in [0-9.]+s.*", pytest.stdout, re.MULTILINE)
    yield f"test_rs_grpo.py with DEVICE={plan.device}; step-2.log says more.", "\n".join(lines)


def default_run(plan):
    steps, every, killed_at, size = plan.pick((200, 50, 60, 256), (4, 2, 3, 8))
    settings = {"device": plan.device, "prompts": plan.pick(32, 4)}
    sizes = {"steps": steps, "save_every": every, "eval_problems": size, "eval_samples": size}
    with TemporaryDirectory() as folder:
        config = rs_grpo.Config(out=folder, **settings, **sizes)
        process = apart(rs_grpo.train, config)
        while process.is_alive() and len(metrics_of(folder)) < killed_at:
            time.sleep(0.02)
        process.kill()
        process.join()
        before = metrics_of(folder)
        results = rs_grpo.train(config, resume=True)
        after = metrics_of(folder)
    yield f"pass@k on {size} problems.", table({"base": results[0], "trained": results[steps]})
    rows = []
    saved = len(before) // every * every
    for old, new in list(zip(before, after))[saved:]:
        rows.append([old["step"], *(old[name] - new[name] for name in ("reward", "grad_norm"))])
    about = "Steps that SIGKILL lost, before and after --resume: 0 if the checkpoint held all."
    yield about, "step | difference in reward | in gradient norm", rows
    seconds, sampling = map(mean, zip(*time_ours("rs", every, settings)))
    yield f"Mean seconds of {every} steps.", "step | of it sampling", [[seconds, sampling]]


def apart(function, *args, **options):
    """A process that runs the function, forked: this one mustn't have used the card before."""
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=function, args=args, kwargs=options)
    process.start()
    return process


def load(plan, **settings):
    """A Config, its Task and Policy, and a generator on its device."""
    config = rs_grpo.Config(**plan.model | settings)
    task = rs_grpo.TASKS[config.task](config)
    policy = rs_grpo.load_policy(config, task)
    return config, task, policy, torch.Generator(policy.model.device).manual_seed(0)


def peak():  # GiB that CUDA had allocated at the most since the last call
    most = torch.cuda.max_memory_allocated()
    if most:
        torch.cuda.reset_peak_memory_stats()
    return most / GIB


def precision(plan):
    rows = []
    turns, prompts = plan.pick((10, 8), (1, 1))
    for name in ("float32", "bfloat16", "float16", "float16 with cuDNN's attention"):
        settings = {"precision": name.split()[0], "micro_tokens": 2**16, "lr": 1e-9}
        config, task, policy, generator = load(plan, **settings)
        torch.backends.cuda.enable_cudnn_sdp("cuDNN" in name)
        optimizer = torch.optim.AdamW(policy.model.parameters(), fused=True)
        norms, entries = [], []
        for weight in policy.model.parameters():
            weight.register_hook(lambda gradient: entries.append(gradient.abs().max().item()))
        peak()
        for turn in range(turns):
            problems = task.train[turn * prompts :][:prompts]
            rollouts = rs_grpo.roll_out(policy, task, problems, 16, config, generator)
            advantages = torch.ones_like(rollouts.rewards)  # every group has a gradient
            norms.append(rs_grpo.update(policy, optimizer, rollouts, advantages, config, 10))
        norms = torch.tensor(norms)
        norms = norms[norms.isfinite()]
        # Bytes: 4 a weight, 2 its copy in autocast, 4 its gradient, 8 in AdamW, 26 a logit.
        computed = (18 * policy.model.num_parameters() + 26 * 2**25) / GIB
        gradient = [len(norms), norms.mean().item(), max(entries)]
        rows.append([name, *gradient, peak(), computed, rounding(policy, rollouts)])
        columns = "updates | finite | norm | largest entry | peak (GiB) | computed | mean Δ log π"
        yield f"Updates: {turns} in each precision; log π in sampling and learning.", columns, rows


@torch.no_grad()
def rounding(policy, rollouts):
    """Mean |Δ log π| between tokens one by one, as they are sampled, and all at once."""
    prompts, completions = rollouts.prompts, rollouts.completions
    with policy.autocast():
        learner = rs_grpo.completion_logprobs(policy, prompts, completions, 1.0)  # (B, T)
        ids, mask = rs_grpo.pad(policy, completions, "right")
        hidden, seen, cache = rs_grpo.prefill(policy, prompts)
        sampler = []
        for token in ids.split(1, dim=1):  # (B, 1)
            sampler.append(rs_grpo.token_logprobs(policy, hidden, token[:, 0], 1.0))
            seen = torch.nn.functional.pad(seen, (0, 1), value=True)
            hidden = rs_grpo.hidden_states(policy, token, seen, cache)[:, -1]
    difference = learner - torch.stack(sampler, 1)
    return difference[mask].abs().mean().item()


def sampling(plan):
    length, counts = plan.pick((256, (64, 512, 2048)), (8, (32,)))
    config, task, policy, _ = load(plan)
    prompts = task.encode(policy.tokenizer, [question for question, _ in task.train[:128]])
    with torch.no_grad(), policy.autocast():
        _, mask, cache = rs_grpo.prefill(policy, prompts[:8])
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / mask.numel()
    parameters = policy.model.num_parameters()
    speed_limit = bandwidth(plan, torch.float32)
    width = 2 if plan.device == "cuda" else 4  # bytes of a weight as it is read
    rows = []
    for count in counts:
        read = width * parameters + count * cached * (mask.shape[1] + length / 2)
        limit = count * speed_limit / read
        # Bytes: 4 a weight, 2 its copy in autocast, 26 a logit on its way to a token.
        computed = 6 * parameters + count * cached * (mask.shape[1] + length)
        computed += 26 * count * policy.model.config.vocab_size
        for method in ("sample", "dynamic", "static"):
            generate = partial(draw, policy, prompts[: count // 16], method)
            generate(8)  # warms up
            peak()
            started = time.perf_counter()
            generate(length)
            speed = count * length / (time.perf_counter() - started)
            rows.append([count, method, speed, limit, peak(), computed / GIB])
            about = f"The limit is to read weights and cache at {speed_limit / 1e9:.0f} GB/s."
            yield about, "rows | method | tokens/s | limit | peak (GiB) | computed", rows
            if method == "sample" and speed < limit / 4:
                with torch.profiler.profile() as profiler:
                    generate(4)
                text = profiler.key_averages().table(f"self_{plan.device}_time_total", row_limit=12)
                yield f"What takes the time of four tokens of {count} rows.", text


@torch.no_grad()
def draw(policy, prompts, method, length):
    """16 completions of each prompt, all of this length, by `sample` or by generate."""
    with policy.autocast():
        if method == "sample":
            endless = policy._replace(stop_ids=set())
            generator = torch.Generator(policy.model.device).manual_seed(0)
            return rs_grpo.sample(endless, prompts, 16, length, 1.0, generator)
        ids, mask = rs_grpo.pad(policy, prompts, "left")
        options = {"do_sample": True, "top_k": 0, "num_return_sequences": 16}
        options |= {"min_new_tokens": length, "max_new_tokens": length}
        options |= {"cache_implementation": method, "disable_compile": True}  # it takes minutes
        return policy.model.generate(ids, attention_mask=mask.long(), **options).tolist()


def beside_trl(plan):
    rows = []
    for prompts in plan.pick((8, 32), (2,)):
        settings = plan.model | {"prompts": prompts}
        times = race(settings, plan.pick(8, 1), threads=plan.pick(2, 1))
        rows.append([prompts * 16, *times.values()])
        yield "Seconds of a training step.", f"completions | {' | '.join(times)}", rows


def pretrained(plan):
    if "model" not in plan.model and not plan.quick:
        sys.exit("passed over, as no --model is given")
    steps, prompts, size = plan.pick((80, 16, 256), (1, 2, 4))
    few = {"prompts": prompts, "eval_problems": 1, "eval_samples": 2}
    settings = plan.model | few | {"steps": steps, "lr": 2e-5}
    methods = {"grpo": {"advantage": "grpo"}, "rs-2": {}, "rs-8": {"beta": 8.0}}
    methods["rs-2 KL 0.02"] = {"kl": 0.02}
    rows = []
    solved = {"base": solved_by(plan, size)}
    for name, changes in methods.items():
        with TemporaryDirectory() as folder:
            config = kl.Config(out=folder, **settings, **changes)
            collect = kl.with_penalty(rs_grpo.collect) if "kl" in changes else rs_grpo.collect
            rs_grpo.train(config, collect=collect)
            solved[name] = solved_by(plan, size, model=f"{folder}/model")
            last = metrics_of(folder)[-10:]
        measured = ("seconds", "reward", "entropy")
        rows.append([name, *(mean(line[what] for line in last) for what in measured)])
        yield f"The last ten of {steps} steps.", f"run | {' | '.join(measured)}", rows
        yield f"pass@k on {size} problems.", table(solved)


def solved_by(plan, size, **settings):
    """What `evaluate` returns for so many problems and samples, 8,192 of which it draws at once."""
    many = {"prompts": 32, "samples": 256, "eval_problems": size, "eval_samples": size}
    config, task, policy, _ = load(plan, **many, **settings)
    return rs_grpo.evaluate(policy, task, config)


def out_of_memory(plan):
    settings = plan.model | {"steps": 1, "eval_problems": 1, "eval_samples": 2}
    rows = []
    for name, first in (("micro_tokens", plan.pick(12, 13)), ("samples", 4)):
        little = partial(with_little_memory, name == "samples")
        for size in (2**power for power in range(first, first + 6)):
            with TemporaryDirectory() as folder:
                given = settings | {"out": folder, name: size}
                flags = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
                first_status = status_of(flags, little)
                flags += ["--resume", "--micro-tokens=256"]
                then = status_of(flags, little if name == "micro_tokens" else rs_grpo.collect)
            rows.append([name, size, first_status, then])
            yield "Exit statuses.", "flag | value | status | of --resume", rows
            if first_status:
                break
    said = re.findall("rs_grpo.py: .*", (plan.out / "step-8.log").read_text())
    yield "What rs_grpo.py said.", "\n".join(said)


def status_of(flags, collect):
    process = apart(rs_grpo.main, flags, collect=collect)
    process.join()
    return process.exitcode


def with_little_memory(sampling, policy, *others):
    """Steps 1 to 4, with little memory for `sampling` or, if not, for the learning after it."""
    if sampling:
        take_memory(policy)
    rollouts, _ = rs_grpo.collect(policy, *others)
    if not sampling:
        take_memory(policy)
    return rollouts, torch.ones_like(rollouts.rewards)  # every group has a gradient


def take_memory(policy):
    """Leave as much as a small step needs."""
    spare = GIB // 8 + 24 * policy.model.num_parameters()
    if policy.model.device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        torch.cuda.caching_allocator_alloc(free - spare)
    else:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + spare
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


STEPS = {
    "1": ("The machine", 5, machine),
    "2": ("The tests", 8, tests),
    "3": ("The default run, killed and resumed", 10, default_run),
    "4": ("Precision", 6, precision),
    "5": ("Sampling and memory", 10, sampling),
    "6": ("A step beside TRL's", 8, beside_trl),
    "7": ("A pretrained model", 20, pretrained),
    "8": ("Out of memory", 8, out_of_memory),
}


def main(arguments=None):
    parser = argparse.ArgumentParser("card", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for figures and logs")
    parser.add_argument("--model", nargs="+", help="folder, or .gguf file or its parts")
    parser.add_argument("--minutes", type=float, default=6.0, help="for all steps (default: 6)")
    parser.add_argument("--only", default="1,2,3,4,5,6,7,8", help="steps (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="everything cut small")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = {"device": device}
    try:
        if args.model:
            model |= {"model": folder_of(args.model, args.out), "task": "countdown-text"}
    except (OSError, rs_grpo.BadInput) as error:
        parser.exit(2, f"card: {error}\n")
    steps = {number: step for number, step in STEPS.items() if number in args.only}
    run_all(steps, Plan(args.out, device, model, args.quick), args.minutes)


def folder_of(files, out):
    """The model's folder, which is made of a .gguf file or its parts."""
    if ".gguf" not in files[0]:
        return files[0]
    folder = out / "model"
    if not folder.exists():
        gguf = out / "model.gguf"
        gguf.write_bytes(b"".join(Path(part).read_bytes() for part in files))
        convert(gguf, folder)
    return str(folder)


if __name__ == "__main__":
    main()
