"""One problem through one run: what the policy answers at steps 0, 100, 400 and 800.

    python -m evidence.one_problem            # two runs and the table
    python -m evidence.one_problem --table    # the table again, from evidence/one-problem.json

GRPO and β = 2 train with the default settings, in runs/one-problem/. At these steps there are
16 answers to the first held-out problem that the base solves in 2 to 5 of 64 samples.
"""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import torch

from rs_grpo import TASKS, Config, load_policy, roll_out, train

STORE = Path(__file__).resolve().parent / "one-problem.json"
METHODS = {"GRPO": "grpo", "β = 2": "rs"}
STEPS = (100, 400, 800)


def sample_answers(policy, task, problem, samples):
    generator = torch.Generator(policy.model.device).manual_seed(0)
    rollouts = roll_out(policy, task, [problem], samples, Config(), generator)
    return list(zip(rollouts.rewards.flatten().tolist(), rollouts.texts))  # pairs


def make():
    """Train both methods, with 16 answers at each step, and write the store."""
    task = TASKS["countdown"](Config())
    base = load_policy(Config(), task)
    for problem in task.held_out:
        right = sum(reward for reward, _ in sample_answers(base, task, problem, 64))
        if 2 <= right <= 5:
            break
    found = {"problem": problem[0]}
    for label, advantage in METHODS.items():
        folder = f"runs/one-problem/{advantage}"
        shutil.rmtree(folder, ignore_errors=True)
        found[label] = {0: sample_answers(base, task, problem, 16)}
        for steps in STEPS:
            config = Config(advantage=advantage, steps=steps, out=folder, eval_problems=1)
            train(config, resume=steps > STEPS[0])
            policy = load_policy(Config(model=f"{folder}/model"), task)
            found[label][steps] = sample_answers(policy, task, problem, 16)
    STORE.write_text(json.dumps(found, indent=1) + "\n")


def cell(answers):
    """The answers that are right or given more than once, counted; the number of others."""
    counts = Counter(map(tuple, answers)).most_common()
    parts = []
    for (reward, text), count in counts:
        mark = " ✓" if reward >= 1 else ""
        if mark or count > 1:
            parts.append(f"`{text}`{mark} ({count})")
    others = len(counts) - len(parts)
    parts.append(f"{others} others" if parts else f"{others} different")
    return ", ".join(parts)


def main():
    if "--table" not in sys.argv:
        make()
    found = json.loads(STORE.read_text())
    print(f"| `{found['problem']}` | {' | '.join(METHODS)} |\n|---|---|---|")
    for step in ("0", *map(str, STEPS)):
        cells = [cell(found[label][step]) for label in METHODS]
        print(f"| step {step} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
