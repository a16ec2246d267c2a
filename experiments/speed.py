"""Time a training step side by side with TRL's GRPOTrainer: same model, prompts, N, lengths, temperature, no KL.

    pip install -r experiments/requirements.txt
    python experiments/speed.py                       # some two minutes on two CPU cores
    python experiments/speed.py --model runs/real-model --task countdown-text --prompts 32 --max-tokens 128 --device cuda

The two alternate, round by round, so that a noisy machine slows both, each timed in a process of its own: in one that
has run TRL before, our steps take a sixth longer. Ours is timed as it is, and once more with every group computed (TRL
computes those without a signal too, although their gradient is zero). TRL generates with transformers, as it does by
default. The last lines compare our arithmetic with what the machine's matrix product can do.
"""

from __future__ import annotations

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
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rs_grpo import ADVANTAGES, Config, encode, load_policy, load_task, train  # noqa: E402

# Every group computed: a zero advantage becomes one that is too small to matter and too large to be skipped.
ADVANTAGES["rs-unskipped"] = lambda rewards, config: ADVANTAGES["rs"](rewards, config) + (rewards.std(1, keepdim=True) == 0) * 1e-30


def alone(threads: int, function: Any, *args: Any) -> Any:
    """The function's result, computed in a fresh process with so many threads."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        return pool.submit(function, *args).result()


def time_ours(advantage: str, steps: int, settings: dict) -> list[dict]:
    """Metrics of `steps` training steps after one to warm up."""
    quiet = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
        train(Config(out=folder, advantage=advantage, steps=steps + 1, eval_problems=1, eval_samples=2, **settings))
        return [json.loads(line) for line in open(Path(folder) / "metrics.jsonl")][1:]


def time_trl(steps: int, settings: dict) -> list[float]:
    """Seconds of `steps` training steps of TRL after one to warm up."""
    import datasets
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    class Clock(transformers.TrainerCallback):
        ends: list[float] = []

        def on_step_end(self, *args, **kwargs):
            self.ends.append(time.perf_counter())

    config, clock = Config(**settings), Clock()
    task, policy = load_task(config), load_policy(config)
    texts = [policy.tokenizer.decode(encode(policy, [problem.prompt], task.instruction)[0][0]) for problem in task.train]
    answers = [problem.answer for problem in task.train]

    def reward(prompts, completions, place, **kwargs):
        return task.rewards(completions, [answers[i] for i in place])

    quiet = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
        trainer = GRPOTrainer(
            model=policy.model,
            reward_funcs=reward,
            processing_class=policy.tokenizer,
            train_dataset=datasets.Dataset.from_list([{"prompt": text, "place": i} for i, text in enumerate(texts)]),
            callbacks=[clock],
            args=GRPOConfig(
                output_dir=folder,
                max_steps=steps + 1,
                per_device_train_batch_size=config.prompts * config.samples,
                num_generations=config.samples,
                max_completion_length=config.max_tokens,
                temperature=config.temperature,
                learning_rate=config.lr,
                seed=config.seed,
                beta=0.0,
                scale_rewards="none",
                bf16=policy.device.type == "cuda",
                gradient_checkpointing=False,
                use_cpu=policy.device.type == "cpu",
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
        )
        trainer.train()
    return [after - before for before, after in zip(clock.ends, clock.ends[1:])]


def matmul_rate(rows: int, width: int, device: torch.device) -> float:
    """Floating-point operations a second of a (rows, width) by (width, width) product, in bfloat16 on CUDA, else float32."""
    kind = {"device": device, "dtype": torch.bfloat16 if device.type == "cuda" else torch.float32}
    a, b = torch.randn(rows, width, **kind), torch.randn(width, width, **kind)
    repeats, start = 0, 0.0
    while repeats < 10 or time.perf_counter() - start < 0.5:
        if repeats == 5:  # warm
            start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for it
        repeats += 1
    return 2 * rows * width * width * (repeats - 5) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="timed steps a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for both (default: %(default)s)")
    for name in ("model", "task", "device", "prompts", "samples", "max_tokens"):
        default = getattr(Config(device="cpu"), name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help="(default: %(default)s)")
    args = parser.parse_args()
    settings = {name: value for name, value in vars(args).items() if name not in ("steps", "rounds", "threads")}
    config = Config(**settings)
    ours, unskipped, trl = [], [], []
    for turn in range(args.rounds):
        ours += alone(args.threads, time_ours, "rs", args.steps, settings)
        trl += alone(args.threads, time_trl, args.steps, settings)
        unskipped += alone(args.threads, time_ours, "rs-unskipped", args.steps, settings)
        print(f"round {turn + 1} of {args.rounds} done", file=sys.stderr)

    seconds = mean(m["seconds"] for m in ours)
    sampling = mean(m["sampling_seconds"] for m in ours)
    all_seconds, trl_seconds = mean(m["seconds"] for m in unskipped), mean(trl)
    print(f"{config.prompts} prompts x {config.samples} samples, {config.device}, {args.threads} threads, {len(trl)} steps each")
    print(f"{'TRL':>24} {trl_seconds:.3f} s a step")
    print(f"{'rs_grpo.py':>24} {seconds:.3f} s a step: sampling {sampling:.3f}, learning {seconds - sampling:.3f}")
    print(f"{'without skipping groups':>24} {all_seconds:.3f} s a step")
    print(f"{'ratio':>24} {trl_seconds / seconds:.1f}, without skipping groups {trl_seconds / all_seconds:.1f}")

    policy = load_policy(config)
    parameters = sum(p.numel() for p in policy.model.parameters())
    tokens = mean(m["tokens_per_second"] * m["seconds"] for m in ours)
    signal = mean(m["signal"] for m in ours)
    for name, work, spent in (
        ("sampling", 2 * parameters * tokens, sampling),
        ("learning", 6 * parameters * tokens * signal, seconds - sampling),
    ):
        print(f"{name:>24} {work / 1e9:.1f} GFLOP if nothing were shared, in {spent:.3f} s: {work / spent / 1e9:.0f} GFLOP/s")
    for rows, width in ((2048, 2048), (512, policy.model.config.hidden_size)):
        rate = alone(args.threads, matmul_rate, rows, width, policy.device)
        print(f"{f'({rows}, {width}) product':>24} {rate / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
