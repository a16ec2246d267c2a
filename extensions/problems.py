"""Problems of mathematics and their answers: data sets of the hub by name, and .jsonl files.

load_problems("gsm8k", evaluating=False)            # needs: pip install datasets
load_problems("problems.jsonl", evaluating=False)   # a JSON object with both in each line
"""

import json
from pathlib import Path

from rs_grpo import BadInput

BOXED = r"Please reason step by step, and put your final answer within \boxed{}."  # the instruction
HUB = {  # name: hub id, configuration, split to train on, split to evaluate on
    "math12k": ("hiyouga/math12k", None, "train", "test"),
    "dapo17k": ("BytedTsinghua-SIA/DAPO-Math-17k", None, "train", "train"),
    "deepmath103k": ("zwhe99/DeepMath-103K", None, "train", "train"),
    "gsm8k": ("openai/gsm8k", "main", "train", "test"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", "test"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train", "train"),
    "aime25": ("MathArena/aime_2025", None, "train", "train"),
    "hmmt24": ("MathArena/hmmt_feb_2024", None, "train", "train"),
    "hmmt25": ("MathArena/hmmt_feb_2025", None, "train", "train"),
    "cmimc25": ("MathArena/cmimc_2025", None, "train", "train"),
}
# Where these sets, and files like them, keep a problem and its answer. DAPO's has another form.
COLUMNS = [("problem", "answer"), ("question", "final_answer"), ("question", "answer")]
DAPO_FRAME = "Solve the following math problem step by step."


def load_problems(name, evaluating):
    """(problem, answer) pairs, as text, of a set of the hub or a .jsonl file, each problem once.

    `evaluating` chooses the split of a hub set. Raises BadInput if there is nothing to be read.
    """
    problems = {}
    for row in load_rows(name, evaluating):
        problem, answer = problem_and_answer(row, name)
        problem = str(problem)
        if problem.startswith(DAPO_FRAME):  # the problem stands between two paragraphs of orders
            problem = "\n\n".join(problem.split("\n\n")[1:-1])
        answer = str(answer).rpartition("####")[2]  # GSM8K's answer follows its solution
        problems.setdefault(problem.strip(), answer.strip())
    if not problems:
        raise BadInput(f"{name} holds no problem; give a file with a problem and an answer a line")
    return list(problems.items())


def problem_and_answer(row, name):
    """What a row of the set `name` holds. Raises BadInput."""
    columns = list(row) if isinstance(row, dict) else []
    for problem, answer in COLUMNS:
        if problem in columns and answer in columns:
            return row[problem], row[answer]
    try:
        return row["prompt"][0]["content"], row["reward_model"]["ground_truth"]  # DAPO's
    except (LookupError, TypeError) as error:
        found = f"the columns {', '.join(columns)}" if columns else f"no columns, {row!r:.50}"
        known = [f"{problem} and {answer}" for problem, answer in COLUMNS]
        known = ", ".join([*known, "or prompt and reward_model as in DAPO"])
        raise BadInput(f"{name} has a row with {found}; give it {known}") from error


def load_rows(name, evaluating):
    """The rows of a set: dictionaries, or whatever else a file holds. Raises BadInput."""
    hub_id, configuration, training, evaluation = HUB.get(name, (name, None, None, None))
    try:
        if name in HUB:
            from datasets import load_dataset  # not above: files don't need it

            split = evaluation if evaluating else training
            return load_dataset(hub_id, configuration, split=split)
        lines = Path(name).read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
        json.dumps(rows, ensure_ascii=False).encode()  # half a character is JSON, but not text
        return rows
    except Exception as error:  # no file, no JSON, no library, no network, no such set
        reason = f"{hub_id} can't be read ({error!r:.200})"
        remedy = "give a .jsonl file with problem and answer in each line, or pip install datasets"
        raise BadInput(f"{reason}; {remedy} and name one of {', '.join(HUB)}") from error
