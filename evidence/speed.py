"""Time a training step side by side with TRL's GRPOTrainer: same model, prompts, lengths, no KL.

    python -m evidence.speed                          # some two minutes on two CPU cores
    python -m evidence.speed --model FOLDER --task countdown-text --prompts 32 --device cuda

The two alternate, each in a process of its own. TRL generates with transformers, its default, and
also computes groups without a signal, whose gradient is zero. rs_grpo.py is timed both ways.
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import mean
from tempfile import TemporaryDirectory

import torch

from evidence.side_by_side import metrics_of
from rs_grpo import ADVANTAGES, TASKS, BadInput, Config, collect, load_policy, train


def every_group(rewards, config):
    """A zero advantage becomes one that is too small to matter and too large to be skipped."""
    silent = rewards.std(1, keepdim=True) == 0
    return ADVANTAGES["rs"](rewards, config) + 1e-30 * silent


ADVANTAGES["rs-unskipped"] = every_group


def race(settings: dict, steps: int, rounds: int = 1, threads: int = 2) -> dict[str, float]:
    """Mean seconds of a step, `steps` of each a round. The settings are some of Config's."""
    ours, every, trl = [], [], []
    for _ in range(rounds):
        ours += alone(threads, time_ours, "rs", steps, settings)
        trl += alone(threads, time_trl, steps, settings)
        every += alone(threads, time_ours, "rs-unskipped", steps, settings)
    return {
        "TRL": mean(trl),
        "rs_grpo.py": mean(seconds for seconds, _ in ours),
        "of it sampling": mean(sampling for _, sampling in ours),
        "every group": mean(seconds for seconds, _ in every),
    }


def alone(threads, function, *args):
    """The function's result, computed in a fresh process with so many threads."""
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        return pool.submit(function, *args).result()


def time_ours(advantage, steps, settings):
    """Seconds of `steps` training steps after one to warm up, and of sampling in each: pairs."""
    sampling = []

    def timed(*args):
        started = time.perf_counter()
        collected = collect(*args)
        sampling.append(time.perf_counter() - started)
        return collected

    few = {"eval_problems": 1, "eval_samples": 2, "steps": steps + 1}
    with TemporaryDirectory() as folder:
        train(Config(out=folder, advantage=advantage, **few, **settings), collect=timed)
        seconds = [line["seconds"] for line in metrics_of(folder)]
    return list(zip(seconds, sampling))[1:]


def time_trl(steps, settings):
    """Seconds of `steps` training steps of TRL after one to warm up."""
    import datasets
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    config = Config(**settings)
    task = TASKS[config.task](config)

    def reward(completions, place, **kwargs):
        return task.judge(completions, [task.train[i][1] for i in place])

    policy = load_policy(config, task)
    policy.model.generation_config.eos_token_id = sorted(policy.stop_ids)  # it ends where ours ends
    ids = task.encode(policy.tokenizer, [question for question, _ in task.train])
    prompts = policy.tokenizer.batch_decode(ids, skip_special_tokens=True)  # TRL wants text
    if policy.tokenizer(prompts).input_ids != ids:
        raise BadInput("TRL would see other tokens than rs_grpo.py; choose another --task")
    cuda = policy.model.device.type == "cuda"
    with TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            max_steps=steps + 1,
            per_device_train_batch_size=config.prompts * config.samples,
            num_generations=config.samples,
            max_completion_length=config.max_tokens or task.max_tokens,
            fp16=cuda,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=not cuda,
            save_strategy="no",
        )
        GRPOTrainer(
            policy.model,
            reward,
            arguments,
            datasets.Dataset.from_dict({"prompt": prompts, "place": range(len(prompts))}),
            processing_class=policy.tokenizer,
            callbacks=[Clock()],
        ).train()
    return [after - before for before, after in zip(ends, ends[1:])]


def main(arguments=None):
    parser = argparse.ArgumentParser("speed", description=__doc__.splitlines()[0])
    own = {"steps": 10, "rounds": 3, "threads": 2}  # timed steps a round; CPU threads for both
    shared = ("model", "task", "device", "prompts", "samples", "max_tokens")
    defaults = own | {name: getattr(Config(device="cpu"), name) for name in shared}
    for name, default in defaults.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, help="(%(default)s)")
    settings = vars(parser.parse_args(arguments))
    steps, rounds, threads = (settings.pop(name) for name in own)
    times = race(settings, steps, rounds, threads)
    print(f"seconds a step, of {steps * rounds} each, with {settings} and {threads} threads:")
    for name, seconds in times.items():
        print(f"{name:>20} {seconds:.3f}")
    for name in ("rs_grpo.py", "every group"):
        print(f"{f'TRL / {name}':>20} {times['TRL'] / times[name]:.1f}")


if __name__ == "__main__":
    main()
