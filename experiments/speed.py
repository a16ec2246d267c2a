"""Time a training step side by side with TRL's GRPOTrainer: same model, prompts, lengths, no KL.

    pip install -r experiments/requirements.txt
    python experiments/speed.py                       # some two minutes on two CPU cores
    python experiments/speed.py --model FOLDER --task countdown-text --prompts 32 --device cuda

The two alternate, round by round, so that a noisy machine slows both, each timed in a process of
its own: in one that has run TRL before, our steps take a sixth longer. Ours is timed as it is, and
once more with every group computed (TRL computes those without a signal too, although their
gradient is zero). TRL generates with transformers, as it does by default. The last lines compare
our arithmetic with what the machine's matrix product can do.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rs_grpo  # noqa: E402
from rs_grpo import ADVANTAGES, TASKS, Config, load_policy, train  # noqa: E402


def every_group(rewards, config):
    """A zero advantage becomes one that is too small to matter and too large to be skipped."""
    return ADVANTAGES["rs"](rewards, config) + 1e-30 * (rewards.std(1, keepdim=True) == 0)


ADVANTAGES["rs-unskipped"] = every_group


def alone(threads, function, *args):
    """The function's result, computed in a fresh process with so many threads."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (threads,)) as pool:
        return pool.submit(function, *args).result()


def time_ours(advantage, steps, settings):
    """Metrics of `steps` training steps after one to warm up, with the seconds of sampling."""
    collect, sampling = rs_grpo.collect, []

    def timed_collect(*args):
        started = time.perf_counter()
        collected = collect(*args)
        sampling.append(time.perf_counter() - started)
        return collected

    rs_grpo.collect = timed_collect
    few = {"eval_problems": 1, "eval_samples": 2, "steps": steps + 1}
    with quiet() as folder:
        train(Config(out=folder, advantage=advantage, **few, **settings))
        lines = [json.loads(line) for line in open(Path(folder) / "metrics.jsonl")]
    return [{**line, "sampling": spent} for line, spent in zip(lines, sampling)][1:]


@contextlib.contextmanager
def quiet():
    """A temporary folder, while nothing is printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        with tempfile.TemporaryDirectory() as folder:
            yield folder


def time_trl(steps, settings):
    """Seconds of `steps` training steps of TRL after one to warm up."""
    import datasets
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    class Clock(transformers.TrainerCallback):
        ends = []

        def on_step_end(self, *args, **kwargs):
            self.ends.append(time.perf_counter())

    config, clock = Config(**settings), Clock()
    task = TASKS[config.task](config)
    rows = [{"prompt": task.examples + text, "place": i} for i, (text, _) in enumerate(task.train)]

    def reward(prompts, completions, place, **kwargs):
        return [task.reward(text, task.train[i][1]) for text, i in zip(completions, place)]

    with quiet() as folder:
        policy = load_policy(config, task)
        trainer = GRPOTrainer(
            model=policy.model,
            reward_funcs=reward,
            processing_class=policy.tokenizer,
            train_dataset=datasets.Dataset.from_list(rows),
            callbacks=[clock],
            args=GRPOConfig(
                output_dir=folder,
                max_steps=steps + 1,
                per_device_train_batch_size=config.prompts * config.samples,
                num_generations=config.samples,
                max_completion_length=config.max_tokens or task.max_tokens,
                temperature=config.temperature,
                learning_rate=config.lr,
                seed=config.seed,
                beta=0.0,
                scale_rewards="none",
                fp16=policy.model.device.type == "cuda",
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=policy.model.device.type == "cpu",
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
        )
        trainer.train()
    return [after - before for before, after in zip(clock.ends, clock.ends[1:])]


def matmul_rate(rows, width, device):
    """Operations a second of a (rows, width) by (width, width) product, in float16 on CUDA."""
    kind = {"device": device, "dtype": torch.float16 if device == "cuda" else torch.float32}
    a, b = torch.randn(rows, width, **kind), torch.randn(width, width, **kind)
    repeats, start = 0, 0.0
    while repeats < 10 or time.perf_counter() - start < 0.5:
        if repeats == 5:  # warm
            start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for it
        repeats += 1
    return 2 * rows * width * width * (repeats - 5) / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    own = {"steps": 10, "rounds": 3, "threads": 2}  # timed steps a round; CPU threads for both
    shared = ("model", "task", "device", "prompts", "samples", "max_tokens")
    defaults = own | {name: getattr(Config(device="cpu"), name) for name in shared}
    for name, default in defaults.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, help="(%(default)s)")
    args = parser.parse_args()
    settings = {name: value for name, value in vars(args).items() if name not in own}
    ours, unskipped, trl = [], [], []
    for turn in range(args.rounds):
        ours += alone(args.threads, time_ours, "rs", args.steps, settings)
        trl += alone(args.threads, time_trl, args.steps, settings)
        unskipped += alone(args.threads, time_ours, "rs-unskipped", args.steps, settings)
        print(f"round {turn + 1} of {args.rounds} done", file=sys.stderr)

    seconds, sampling = mean(m["seconds"] for m in ours), mean(m["sampling"] for m in ours)
    every, theirs = mean(m["seconds"] for m in unskipped), mean(trl)
    print(f"{args.prompts} prompts x {args.samples} samples, {args.device}", end=", ")
    print(f"{args.threads} threads, {len(trl)} steps each, seconds a step")
    print(f"{'TRL':>24} {theirs:.3f}")
    print(f"{'rs_grpo.py':>24} {seconds:.3f}: sampling {sampling:.3f}", end=", ")
    print(f"learning {seconds - sampling:.3f}")
    print(f"{'without skipping groups':>24} {every:.3f}")
    print(f"{'ratio':>24} {theirs / seconds:.1f}, without skipping {theirs / every:.1f}")

    config = Config(**settings)
    with quiet():
        policy = load_policy(config, TASKS[config.task](config))
    parameters = policy.model.num_parameters()
    tokens = mean(m["tokens_per_second"] * m["seconds"] for m in ours)
    learned = tokens * mean(m["signal"] for m in ours)
    learning = seconds - sampling
    for name, work, spent in (
        ("sampling", 2 * parameters * tokens, sampling),
        ("learning", 6 * parameters * learned, learning),
    ):
        rate = f"{work / spent / 1e9:.0f} GFLOP/s"
        print(f"{name:>24} {work / 1e9:.1f} GFLOP if nothing were shared: {rate}")
    for rows, width in ((2048, 2048), (512, policy.model.config.hidden_size)):
        rate = alone(args.threads, matmul_rate, rows, width, args.device)
        print(f"{f'({rows}, {width}) product':>24} {rate / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
