"""Time a training step side by side with TRL's GRPOTrainer: same model, prompts, lengths, no KL.

    pip install -r extensions/requirements.txt
    python -m evidence.speed                          # some two minutes on two CPU cores
    python -m evidence.speed --model FOLDER --task countdown-text --prompts 32 --device cuda

The two alternate, round by round, so that a noisy machine slows both, each timed in a process of
its own: in one that has run TRL before, our steps take a sixth longer. Ours is timed as it is, and
once more with every group computed (TRL computes those without a signal too, although their
gradient is zero). TRL generates with transformers, as it does by default, and ends a completion at
the same tokens.
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
from typing import NamedTuple

import torch

from rs_grpo import ADVANTAGES, TASKS, BadInput, Config, collect, load_policy, train


def every_group(rewards, config):
    """A zero advantage becomes one that is too small to matter and too large to be skipped."""
    silent = rewards.std(1, keepdim=True) == 0
    return ADVANTAGES["rs"](rewards, config) + 1e-30 * silent


ADVANTAGES["rs-unskipped"] = every_group


class Times(NamedTuple):  # mean seconds of a step
    ours: float
    sampling: float  # a part of ours
    unskipped: float  # ours with every group computed
    trl: float


def race(settings: dict, steps: int, rounds: int = 1, threads: int = 2) -> Times:
    """Time `steps` steps of each a round, by turns. The settings are some of Config's."""
    ours, unskipped, trl = [], [], []
    for turn in range(rounds):
        ours += alone(threads, time_ours, "rs", steps, settings)
        trl += alone(threads, time_trl, steps, settings)
        unskipped += alone(threads, time_ours, "rs-unskipped", steps, settings)
        print(f"round {turn + 1} of {rounds} done", file=sys.stderr)
    steps, sampling = zip(*ours)
    every, _ = zip(*unskipped)
    return Times(mean(steps), mean(sampling), mean(every), mean(trl))


def alone(threads, function, *args):
    """The function's result, computed in a fresh process with so many threads."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (threads,)) as pool:
        return pool.submit(function, *args).result()


def with_stopwatch(collect, seconds):
    """`collect`, which appends the seconds that each call takes to a list."""

    def timed(*args):
        started = time.perf_counter()
        collected = collect(*args)
        seconds.append(time.perf_counter() - started)
        return collected

    return timed


def time_ours(advantage, steps, settings):
    """Seconds of `steps` training steps after one to warm up, and those of sampling in each."""
    sampling = []
    few = {"eval_problems": 1, "eval_samples": 2, "steps": steps + 1}
    with quiet() as folder:
        config = Config(out=folder, advantage=advantage, **few, **settings)
        train(config, collect=with_stopwatch(collect, sampling))
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    return list(zip(seconds, sampling))[1:]


@contextlib.contextmanager
def quiet():
    """A temporary folder, while nothing is printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        with tempfile.TemporaryDirectory() as folder:
            yield folder


def prompts_of(task, tokenizer):
    """The training prompts as text, as TRL wants them. Raises BadInput if tokens would differ."""
    ids = task.encode(tokenizer, [question for question, _ in task.train])
    plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    texts = tokenizer.batch_decode(ids, **plain)
    if tokenizer(texts).input_ids != ids:
        raise BadInput("TRL would see other tokens than rs_grpo.py; choose another --task")
    return texts


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

    def reward(prompts, completions, place, **kwargs):
        return task.judge(completions, [task.train[i][1] for i in place])

    with quiet() as folder:
        policy = load_policy(config, task)
        policy.model.generation_config.eos_token_id = sorted(policy.stop_ids)
        prompts = prompts_of(task, policy.tokenizer)
        rows = [{"prompt": prompt, "place": i} for i, prompt in enumerate(prompts)]
        cuda = policy.model.device.type == "cuda"
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
                fp16=cuda,
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=not cuda,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
        )
        trainer.train()
    return [after - before for before, after in zip(clock.ends, clock.ends[1:])]


def main(arguments=None):
    parser = argparse.ArgumentParser("speed", description=__doc__.splitlines()[0])
    own = {"steps": 10, "rounds": 3, "threads": 2}  # timed steps a round; CPU threads for both
    shared = ("model", "task", "device", "prompts", "samples", "max_tokens")
    defaults = own | {name: getattr(Config(device="cpu"), name) for name in shared}
    for name, default in defaults.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, help="(%(default)s)")
    args = parser.parse_args(arguments)
    settings = {name: value for name, value in vars(args).items() if name not in own}
    times = race(settings, args.steps, args.rounds, args.threads)
    learning = times.ours - times.sampling
    print(
        f"{args.prompts} prompts x {args.samples} samples, {args.device}, {args.threads} threads,"
    )
    print(f"{args.steps * args.rounds} steps each, seconds a step")
    print(f"{'TRL':>24} {times.trl:.3f}")
    print(f"{'rs_grpo.py':>24} {times.ours:.3f}", end=": ")
    print(f"sampling {times.sampling:.3f}, learning {learning:.3f}")
    print(f"{'without skipping groups':>24} {times.unskipped:.3f}")
    every = times.trl / times.unskipped
    print(f"{'ratio':>24} {times.trl / times.ours:.1f}, without skipping {every:.1f}")


if __name__ == "__main__":
    main()
