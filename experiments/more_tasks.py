"""The tasks of `rs_grpo.py --task` beside the compact Countdown: Countdown in words, and mathematics."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import math_tasks
from rs_grpo import BadInput, Config, Problem, Task, countdown_problems, countdown_reward

COUNTDOWN_TEXT = (
    "Using the numbers {numbers}, write an expression that equals {target}. "
    "Use + - * / and brackets, and each number exactly once."
)
IN_ANSWER_TAGS = "Think step by step, then write the expression between <answer> and </answer>."
IN_A_BOX = "Please reason step by step, and put your final answer within \\boxed{}."


def load_task(config: Config) -> Task:
    """`countdown-text`, a named set of math_tasks.py or a .jsonl file, with --eval-task or a held-out tenth to judge by.

    Raises BadInput if it can't be had.
    """
    names = [config.task, *filter(None, map(str.strip, config.eval_task.split(",")))]
    if set(names) == {"countdown-text"}:
        train = [countdown_in_words(problem) for problem in countdown_problems(config.train_problems, held_out=False)]
        held_out = [countdown_in_words(problem) for problem in countdown_problems(config.eval_problems, held_out=True)]
        return Task(train, held_out, tagged_rewards, config.instruction or IN_ANSWER_TAGS)

    if any(name.startswith("countdown") for name in names):
        raise BadInput(f"{' and '.join(names)} don't go together; Countdown is evaluated on its own held-out problems alone")

    def load(name: str, evaluating: bool) -> list[Problem]:
        return [Problem(*pair, Path(name).stem) for pair in math_tasks.load_problems(name, evaluating).items()]

    try:
        math_tasks.idle_verifiers.append(math_tasks.start_verifier())  # what is missing shows now, not in the middle of a run
        train = load(config.task, evaluating=False)
        held_out = [p for name in names[1:] for p in load(name, evaluating=True)[: config.eval_problems]]
    except ValueError as error:
        raise BadInput(str(error)) from error
    if not held_out:
        held_out = [problem for problem in train if is_held_out(problem.prompt)][: config.eval_problems]
        train = [problem for problem in train if not is_held_out(problem.prompt)]
    asked = {problem.prompt for problem in held_out}
    train = [problem for problem in train if problem.prompt not in asked][: config.train_problems]
    if not train or not held_out:
        raise BadInput(f"--task {config.task} is too small to train and to evaluate on; give a larger set, or an --eval-task")
    return Task(train, held_out, math_tasks.math_rewards, config.instruction or IN_A_BOX, lambda: len(math_tasks.killed))


def is_held_out(text: str) -> bool:
    """Whether a problem belongs to the held-out tenth: decided by a hash of what it asks, so never by luck."""
    return zlib.crc32(text.encode()) % 10 == 0


def countdown_in_words(problem: Problem) -> Problem:
    numbers, target = problem.answer
    text = COUNTDOWN_TEXT.format(numbers=", ".join(map(str, numbers)), target=target)
    return Problem(text, problem.answer, "countdown-text")


def tagged_rewards(completions: Sequence[str], answers: Sequence[Any]) -> list[float]:
    """`countdown_reward` of what stands between the only <answer> and the only </answer> of each completion."""

    def reward(text: str, answer: Any) -> float:
        found = re.findall(r"<answer>([^<>]{1,200})</answer>", text)
        once = len(found) == text.count("<answer>") == text.count("</answer>") == 1
        return countdown_reward(found[0].strip(), *answer) if once else 0.0

    return [reward(text, answer) for text, answer in zip(completions, answers)]
