"""Measure a GPU with one command: its limits, and rs_grpo.py's speed, precision and memory on it.

    python -m evidence.card --out FOLDER --model runs/SmolLM2-135M-Instruct --minutes 6
    python -m evidence.card --out FOLDER --only 6,7     # these steps, added to FOLDER's figures
    python -m evidence.card --out FOLDER --quick        # everything cut small, also on a CPU

--model is a folder or a .gguf file, which is converted; without it the embedded model is measured.
Each of the eight steps (STEPS, at the end) runs in a process of its own, for its share of the time
that is left, and writes FOLDER/step-N.log. One that fails or runs over is noted, and the next one
goes on. FOLDER/card.md and FOLDER/card.json hold all figures so far at any moment.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers

import rs_grpo
from evidence.side_by_side import read_run, result_of, table
from evidence.speed import race, time_ours

GIB = 2**30


class Plan(NamedTuple):
    out: Path
    device: str  # cuda or cpu
    model: dict  # settings of a Config: device, and model and task if --model is given
    quick: bool

    def pick(self, full, quick):
        return quick if self.quick else full


# --- Running the steps ----------------------------------------------------------------------------
def run_all(steps: dict[str, tuple], plan: Plan, minutes: float) -> None:
    """Run the steps one after another; card.json and card.md hold what they have measured.

    A step is its name, its share of the time, and a function from a Plan to what it measures. It
    yields tables (a sentence, columns, rows) or texts (a sentence, text), which are written down at
    once. One with the sentence of an earlier one replaces it.
    """
    ends = time.monotonic() + 60 * minutes
    shares = sum(share for _, share, _ in steps.values())
    for number, (name, share, measure) in steps.items():
        seconds = max(1.0, ends - time.monotonic()) * share / shares
        shares -= share
        record(plan, number, name=name, note="under way", tables={})
        note = run_one(measure, number, plan, seconds)
        record(plan, number, note=note)
        print(f"{number}. {name}: {note}", flush=True)


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
        over = process.is_alive()
    finally:  # also after Ctrl-C
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # if it had no group yet
        process.join()
    spent = f"{time.monotonic() - started:.0f} s"
    if over:
        return f"stopped after {spent}, its share of the time"
    last = log.read_text().strip().rpartition("\n")[2]
    return f"failed after {spent}: {last[-300:]}" if process.exitcode else f"finished in {spent}"


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
    path.with_suffix(".md").write_text("\n".join([*lines, ""]))


def as_markdown(columns, rows=None):
    """Lines of a table, or of a text that stands as it is."""
    if rows is None:
        return ["```", columns, "```"]
    cells = [columns.split(" | "), ["---"] * (columns.count(" | ") + 1), *rows]
    return [f"| {' | '.join(map(shown, row))} |" for row in cells]


def shown(value):
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "–" if value is None else str(value).replace("|", "/").replace("\n", " ")


# --- What several steps need ----------------------------------------------------------------------
def load(plan, **settings):
    """A Config, its Task and Policy, and a generator on its device."""
    config = rs_grpo.Config(**plan.model | settings)
    task = rs_grpo.TASKS[config.task](config)
    policy = rs_grpo.load_policy(config, task)
    return config, task, policy, torch.Generator(policy.model.device).manual_seed(0)


def spread(rewards):
    """Advantages (P, N) from −1 to 1, which give every group a gradient."""
    return torch.linspace(-1, 1, rewards.shape[1]).expand_as(rewards)


def command_of(script, folder, settings):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    return [sys.executable, *script, f"--out={folder}", *flags]


def seconds_of(plan, compute, warm_up=None, repeats=1):
    """Mean seconds of compute(), after one call of it or of warm_up()."""
    (warm_up or compute)()
    wait_for(plan.device)
    started = time.perf_counter()
    for _ in range(repeats):
        compute()
    wait_for(plan.device)
    return (time.perf_counter() - started) / repeats


def wait_for(device):
    if device == "cuda":
        torch.cuda.synchronize()


# --- The steps ------------------------------------------------------------------------------------
def machine(plan):
    query = "nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader"
    card = subprocess.getoutput(query) if plan.device == "cuda" else "none"
    versions = [torch.__version__, torch.version.cuda or "none", transformers.__version__]
    columns = "card, memory, driver | CPU cores | torch | its CUDA | transformers"
    yield "What was measured.", columns, [[card, os.cpu_count(), *versions]]
    rows = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        size = plan.pick(8192, 256)
        a = torch.ones(size, size, dtype=dtype, device=plan.device)
        product = 2 * size**3 / seconds_of(plan, lambda: a @ a, repeats=10)
        rows.append([str(dtype), product / 1e12, copy_rate(plan, dtype) / 1e9])
        about = "A large matrix product bounds learning; a copy (read and write), sampling."
        yield about, "precision | product (TFLOP/s) | copy (GB/s)", rows


def copy_rate(plan, dtype=torch.float32):
    """Bytes read and written a second."""
    source = torch.ones(plan.pick(2**28, 2**22), dtype=dtype, device=plan.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(plan, lambda: target.copy_(source), repeats=10)


def tests(plan):
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "test_rs_grpo.py"]
    command += plan.pick([], ["-k", "by_hand"])
    environment = os.environ | {"DEVICE": plan.device}
    pytest = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    print(pytest.stdout)
    lines = pytest.stdout.splitlines() or ["pytest isn't installed"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    about = f"test_rs_grpo.py with DEVICE={plan.device}; step-2.log says why a test failed."
    yield about, "\n".join([*failed, lines[-1]])


def default_run(plan):
    steps, every, killed_at, size = plan.pick((200, 50, 60, 256), (6, 2, 3, 8))
    settings = {"device": plan.device}
    seconds, sampling = map(mean, zip(*time_ours("rs", every, settings)))
    about = f"The default run, 32 × 16 samples of the embedded model: mean of {every} steps."
    columns = "step (s) | of it sampling (s) | of it learning (s)"
    yield about, columns, [[seconds, sampling, seconds - sampling]]

    settings |= {"steps": steps, "save_every": every, "eval_problems": size, "eval_samples": size}
    with TemporaryDirectory() as folder:
        command = command_of(["rs_grpo.py"], folder, settings)
        process = subprocess.Popen(command)
        while len(metrics_of(folder)) < killed_at and process.poll() is None:
            time.sleep(0.02)
        process.kill()
        process.wait()
        before = metrics_of(folder)
        subprocess.run([*command, "--resume"], check=True)
        after = metrics_of(folder)
        run = read_run(Path(folder))
    about = f"Percent of {size} held-out problems that k samples solve; right answers a problem."
    yield about, table({"base": run.base, "trained": run.trained})
    first = len(before) // every * every  # steps done at the checkpoint
    rows = []
    for name in ("reward", "entropy", "length", "grad_norm"):
        differences = [abs(a[name] - b[name]) for a, b in zip(after, before)][first:]
        rows.append([name, differences[0], max(differences)])
    about = (
        "Steps that were computed before SIGKILL and again after --resume: differences of their "
    )
    about += "metrics. The first has none if problems, weights and random numbers are the same."
    yield about, f"metric | step {first + 1} | largest to step {len(before)}", rows


def metrics_of(folder):
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def precision(plan):
    rows = []
    for name in ("float32", "bfloat16", "float16"):
        config, task, policy, generator = load(plan, precision=name, lr=1e-9)
        optimizer = torch.optim.AdamW(policy.model.parameters(), fused=True)
        norms = []
        for turn in range(plan.pick(10, 2)):
            problems = task.train[8 * turn :][: plan.pick(8, 2)]
            rollouts = rs_grpo.roll_out(policy, task, problems, 16, config, generator)
            advantages = spread(rollouts.rewards)
            norms.append(rs_grpo.update(policy, optimizer, rollouts, advantages, config, 10))
        failed = sum(not math.isfinite(norm) for norm in norms)
        rows.append([name, *rounding(policy, rollouts), f"{failed} of {len(norms)}"])
        about = "How far log π differs between sampler and learner; updates that weren't finite."
        yield about, "precision | a token, mean size | a completion, std | not finite", rows

    config, task, policy, generator = load(plan, precision="float16", max_tokens=plan.pick(256, 8))
    endless = policy._replace(stop_ids=set())
    problems = task.train[: plan.pick(16, 4)]
    rollouts = rs_grpo.roll_out(endless, task, problems, 16, config, generator)
    rows, first = [], None
    for cudnn, tokens in ((False, 4096), (True, 4096), (False, 16 * 4096)):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        largest, gradient = gradient_of(policy, rollouts, tokens)
        first = gradient if first is None else first
        difference = ((gradient - first).norm() / first.norm()).item()
        rows.append([tokens, "on" if cudnn else "off", difference, largest])
        about = "A float16 gradient: its relative difference to that of the first row, and the "
        about += "largest entry before the division by tokens (beyond 65,504 it overflows)."
        yield about, "micro-tokens | cuDNN's attention | difference | largest entry", rows


@torch.no_grad()
def rounding(policy, rollouts):
    """Mean |Δ log π| of a token between sampler and learner, and the std of a completion's sum."""
    prompts, completions = rollouts.prompts, rollouts.completions
    with policy.autocast():
        learner = rs_grpo.completion_logprobs(policy, prompts, completions, 1.0)  # (B, T)
        ids, mask = rs_grpo.pad(policy, completions, "right")
        hidden, seen, cache = rs_grpo.prefill(policy, prompts)
        sampler = []
        for token in ids.split(1, dim=1):  # (B, 1)
            logprobs = rs_grpo.scaled_logits(policy, hidden, 1.0).log_softmax(-1)
            sampler.append(logprobs.gather(1, token))
            seen = F.pad(seen, (0, 1), value=True)
            hidden = rs_grpo.hidden_states(policy, token, seen, cache)[:, -1]
    difference = (learner - torch.cat(sampler, 1)) * mask
    return (difference.abs().sum() / mask.sum()).item(), difference.sum(1).std().item()


def gradient_of(policy, rollouts, micro_tokens):
    """The largest entry of any micro-batch's gradient, undivided, and the whole gradient."""
    entries = []

    def note(gradient):
        entries.append(gradient.abs().max().item())

    policy.model.zero_grad()
    hooks = [parameter.register_hook(note) for parameter in policy.model.parameters()]
    config = rs_grpo.Config(micro_tokens=micro_tokens)
    rs_grpo.policy_gradient(policy, rollouts, spread(rollouts.rewards), config)
    for hook in hooks:
        hook.remove()
    return max(entries), torch.cat([p.grad.flatten() for p in policy.model.parameters()])


def sampling(plan):
    length, counts = plan.pick((256, (64, 512, 2048)), (8, (32, 64)))
    config, task, policy, generator = load(plan, max_tokens=length)
    problems = task.train[: counts[-1] // 16]
    prompts = task.encode(policy.tokenizer, [question for question, _ in problems])
    with torch.no_grad(), policy.autocast():
        _, mask, cache = rs_grpo.prefill(policy, prompts)
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / mask.numel()
    parameters = policy.model.num_parameters()
    weights = parameters * (2 if plan.device == "cuda" else 4)
    bandwidth = copy_rate(plan)
    rows = {}
    for count in counts:
        read = weights + count * cached * (mask.shape[1] + length / 2)
        rows[count] = [count, count * bandwidth / read]
    about = f"Tokens a second, {length} a row; at the limit a token reads weights and cache once."
    columns = "rows | limit | sample | generate, dynamic cache | generate, static cache"
    for method in ("sample", "dynamic", "static"):
        for count in counts:
            work = partial(draw, policy, prompts[: count // 16], method)
            seconds = seconds_of(plan, partial(work, length), warm_up=partial(work, 8))
            rows[count].append(count * length / seconds)
            yield about, columns, [row + [None] * (5 - len(row)) for row in rows.values()]
        if method == "sample" and rows[count][1] > 4 * rows[count][2]:
            with torch.profiler.profile() as profiler:
                draw(policy, prompts, "sample", 4)
            text = profiler.key_averages().table(f"self_{plan.device}_time_total", row_limit=12)
            yield f"What takes the time of four tokens of {count} rows.", text

    optimizer = torch.optim.AdamW(policy.model.parameters(), fused=True)
    endless = policy._replace(stop_ids=set())
    rollouts = rs_grpo.roll_out(endless, task, problems[:4], 16, config, generator)
    step = (policy, optimizer, rollouts, spread(rollouts.rewards), config, 1)
    vocabulary = policy.model.config.vocab_size
    logits = min(2**28, config.micro_tokens * vocabulary)
    computed = computed_peak(parameters, gradients=parameters, logits=logits)
    rows = [["learning", *peak(plan, partial(rs_grpo.update, *step)), computed]]
    for count in counts:
        cache = count * cached * (mask.shape[1] + length)
        computed = computed_peak(parameters, cache=cache, logits=count * vocabulary)
        measured = peak(plan, partial(draw, policy, prompts[: count // 16], "sample", length))
        rows.append([f"sampling {count} rows", *measured, computed])
        about = "Peak memory in GiB; what is computed holds no activations."
        yield about, "while | allocated | reserved | computed", rows


@torch.no_grad()
def draw(policy, prompts, method, length):
    """16 completions of each prompt, all of this length; not compiled, as that takes minutes."""
    with policy.autocast():
        if method == "sample":
            endless = policy._replace(stop_ids=set())
            generator = torch.Generator(policy.model.device).manual_seed(0)
            return rs_grpo.sample(endless, prompts, 16, length, 1.0, generator)
        ids, mask = rs_grpo.pad(policy, prompts, "left")
        options = {"do_sample": True, "top_k": 0, "num_return_sequences": 16, "pad_token_id": 0}
        options |= {"max_new_tokens": length, "min_new_tokens": length, "eos_token_id": None}
        options |= {"attention_mask": mask.long(), "cache_implementation": method}
        options["disable_compile"] = True
        return policy.model.generate(ids, **options)


def computed_peak(parameters, cache=0, gradients=0, logits=0):
    """GiB of so many parameters (float32 4 bytes, AdamW 8, autocast's copy 2), of the bytes of the
    cache, of gradients (4 each) and logits: 2, in float32 4, scaled 4, softmax 4, multinomial 12.
    """
    return (14 * parameters + cache + 4 * gradients + 26 * logits) / GIB


def peak(plan, compute):
    """GiB allocated and reserved at the peak of compute(), on CUDA."""
    if plan.device != "cuda":
        return None, None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    compute()
    return torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB


def beside_trl(plan):
    if not find_spec("trl"):
        sys.exit("passed over, as trl isn't installed")
    rows = []
    for prompts in plan.pick((8, 32), (2,)):
        times = race(plan.model | {"prompts": prompts}, steps=plan.pick(8, 1))
        ours = [times.ours, times.sampling, times.unskipped]
        rows.append([prompts * 16, times.trl, *ours, times.trl / times.ours])
        about = "Seconds of a training step beside TRL's, which computes groups without a signal."
        columns = "completions | TRL | rs_grpo.py | of it sampling | every group | TRL / rs_grpo.py"
        yield about, columns, rows


def pretrained(plan):
    if "model" not in plan.model and not plan.quick:
        sys.exit("passed over, as no --model is given")
    steps, size = plan.pick((80, 256), (2, 4))
    settings = plan.model | {"steps": steps, "prompts": 16, "lr": 2e-5}
    settings |= {"eval_problems": 1, "eval_samples": 2}
    scripts = {
        "grpo": ["rs_grpo.py", "--advantage=grpo"],
        "rs-2": ["rs_grpo.py", "--beta=2"],
        "rs-8": ["rs_grpo.py", "--beta=8"],
        "rs-2\nKL 0.02": ["-m", "extensions.kl", "--kl=0.02"],
    }
    rows = []
    solved = {"base": solved_by(plan, size)}
    for name, script in [*scripts.items()][:: plan.pick(1, 3)]:
        with TemporaryDirectory() as folder:
            subprocess.run(command_of(script, folder, settings), check=True)
            curves = read_run(Path(folder)).curves
            solved[name] = solved_by(plan, size, model=f"{folder}/model")
        rows.append([name, *(mean(curves[of][-10:]) for of in ("seconds", "reward", "entropy"))])
        about = f"The last ten of {steps} steps, 16 × 16 samples: means."
        yield about, "run | step (s) | reward | entropy (nats a token)", rows
        about = (
            f"Percent of {size} held-out problems that k samples solve; right answers a problem."
        )
        yield about, table(solved)


def solved_by(plan, size, **settings):
    """pass@k on so many problems with as many samples, of which 8,192 are drawn at once."""
    many = {"prompts": 32, "samples": 256, "eval_problems": size, "eval_samples": size}
    config, task, policy, _ = load(plan, **many, **settings)
    solved = result_of(rs_grpo.evaluate(policy, task, config))
    del policy
    torch.cuda.empty_cache()  # for the processes that train
    return solved


def out_of_memory(plan):
    """Double the size until it doesn't fit; learning then goes on with less at once."""
    script = ["-c", "from evidence.card import limited; limited()"]
    sampling = {"steps": 0, "samples": 256, "eval_samples": 256}
    learning = {"steps": 1, "prompts": 64, "samples": 32, "eval_samples": 2, "eval_problems": 1}
    rows = []
    for what, settings in {"rows": sampling, "micro-tokens": learning}.items():
        for size in (2**power for power in range(plan.pick(14, 13), 18)):
            sizes = {"micro_tokens": size}
            if what == "rows":
                sizes = {"prompts": size // 256, "eval_problems": size // 256}
            with TemporaryDirectory() as folder:
                command = command_of(script, folder, plan.model | settings | sizes)
                ended = subprocess.run(command, stderr=subprocess.PIPE, text=True)
                print(ended.stderr)
                if ended.returncode == 0:
                    continue
                again = [*command, "--resume", f"--micro-tokens={size // 16}"]
                resumed = subprocess.run(again).returncode if what == "micro-tokens" else None
            sentence = re.search("rs_grpo.py: .*", ended.stderr)
            said = sentence.group() if sentence else ended.stderr[-200:]
            rows.append([f"{size:,} {what}", ended.returncode, said, resumed])
            break
        else:
            rows.append([f"nothing up to {size:,} {what}", 0, None, None])
        about = (
            "The least that didn't fit: rows of an evaluation, micro-tokens of a step. The last "
        )
        about += "column is the status of --resume with a sixteenth of the micro-tokens."
        yield about, "too large | status | said | status of --resume", rows


def limited():
    """rs_grpo.py's command line with a gradient in every group; a CPU has half a GiB to spare."""
    if not torch.cuda.is_available():
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + GIB // 2
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def collect(*args):
        rollouts, _ = rs_grpo.collect(*args)
        return rollouts, spread(rollouts.rewards)

    rs_grpo.main(collect=collect)


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
    parser.add_argument("--model", help="folder or .gguf file (default: the embedded model)")
    parser.add_argument("--minutes", type=float, default=6.0, help="for all (default: 6)")
    parser.add_argument("--only", default="1,2,3,4,5,6,7,8", help="steps, separated by commas")
    parser.add_argument("--quick", action="store_true", help="everything cut small")
    args = parser.parse_args(arguments)
    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = {"device": device}
    try:
        steps = {number: STEPS[number] for number in args.only.split(",")}
        if args.model:
            model |= {"model": folder_of(args.model, args.out), "task": "countdown-text"}
    except KeyError as error:
        parser.exit(2, f"card: --only names {error}; the steps are 1 to 8\n")
    except rs_grpo.BadInput as error:
        parser.exit(2, f"card: {error}\n")
    minutes = args.minutes - (time.monotonic() - started) / 60
    run_all(steps, Plan(args.out, device, model, args.quick), minutes)
    print(f"all figures: {args.out / 'card.md'}")


def folder_of(model, out):
    """The model's folder; a .gguf file is converted into one."""
    if not model.endswith(".gguf"):
        return model
    from evidence.compare import convert

    folder = out / "model"
    if not folder.exists():
        convert(Path(model), folder)
    return str(folder)


if __name__ == "__main__":
    main()
