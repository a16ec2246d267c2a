"""One problem through one run: what the policy answers at steps 0, 100, 400 and 800.

    python -m evidence.one_problem            # two runs and the table, in some 14 minutes
    python -m evidence.one_problem --table    # the table again, from evidence/one-problem.json

GRPO and β = 2 train with the default settings and seed 0. Each run stops at the steps above, where
its policy gives 16 answers to one held-out problem, and goes on. The problem isn't picked by hand:
it is the first one of the file that the base solves in 2 to 5 of 64 samples. At step 800 the runs,
in runs/one-problem/, are those of `python rs_grpo.py` and `python rs_grpo.py --advantage grpo`.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch

from rs_grpo import TASKS, Config, load_policy, roll_out, train

STORE = Path(__file__).resolve().parent / "one-problem.json"
METHODS = {"GRPO": "grpo", "β = 2": "rs"}
STEPS = (100, 400, 800)
SHOWN = 4  # distinct answers in a cell


def sample_answers(policy, task, problem, samples):
    """Pairs of reward and text."""
    generator = torch.Generator(policy.model.device).manual_seed(0)
    rollouts = roll_out(policy, task, [problem], samples, Config(), generator)
    rewards = rollouts.rewards.flatten().tolist()
    return list(zip(rewards, rollouts.texts))


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
        folder = Path("runs/one-problem") / advantage
        found[label] = {0: sample_answers(base, task, problem, 16)}
        for steps in STEPS:
            config = Config(advantage=advantage, steps=steps, out=str(folder))
            train(config, resume=steps > STEPS[0])
            policy = load_policy(Config(model=str(folder / "model")), task)
            found[label][steps] = sample_answers(policy, task, problem, 16)
    STORE.write_text(json.dumps(found, indent=1) + "\n")


def cell(answers):
    """Equal answers counted, the most frequent first, right ones marked."""
    right = {text for reward, text in answers if reward >= 1}
    counts = Counter(text for _, text in answers)
    lines = []
    for text, count in counts.most_common(SHOWN):
        mark = " ✓" if text in right else ""
        lines.append(f"{count} × `{text}`{mark}")
    others = dict(counts.most_common()[SHOWN:])
    if others:
        solved = sum(others[text] for text in others.keys() & right)
        lines.append(f"{sum(others.values())} others, {solved} right")
    return "<br>".join(lines)


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
