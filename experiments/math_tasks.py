"""Mathematical tasks for `rs_grpo.py`: data sets of the hub or of a file, and the reward, judged by math-verify.

`rs_grpo.py --task NAME` imports this where NAME isn't Countdown. It depends on nothing of that file.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

# --- data sets ----------------------------------------------------------------------------------------------------

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
COLUMNS = (  # where these sets, and files like them, keep problem and answer
    (("problem",), ("answer",)),
    (("question",), ("final_answer",)),
    (("question",), ("answer",)),
    (("prompt", 0, "content"), ("reward_model", "ground_truth")),
)


def load_problems(name: str, evaluating: bool) -> dict[str, str]:
    """Problems and answers of a named set of the hub or of a .jsonl file, each problem once.

    Raises ValueError, in a sentence, for what can't be read.
    """
    if name in HUB:
        hub_id, configuration, train_split, eval_split = HUB[name]
        try:
            from datasets import load_dataset

            rows = load_dataset(hub_id, configuration, split=eval_split if evaluating else train_split)
        except Exception as error:  # no library, no network, no such set: whichever it is, a file is the way out
            raise ValueError(
                f"{name} ({hub_id}) can't be loaded ({_first_line(error)}); pip install datasets and connect to the hub, "
                "or save it as a .jsonl file with problem and answer and give its path"
            ) from error
    else:
        try:
            rows = [json.loads(line) for line in Path(name).read_text(encoding="utf-8").split("\n") if line.strip()]
            json.dumps(rows, ensure_ascii=False).encode()  # half a character, \ud800, is JSON but no text
        except FileNotFoundError as error:
            raise ValueError(f"there is no task and no file {name}; give a .jsonl file or one of {', '.join(HUB)}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{name} can't be read as JSON lines ({_first_line(error)}); mend it or give another file") from error
    problems: dict[str, str] = {}
    for row in rows:
        for columns in COLUMNS:
            with contextlib.suppress(KeyError, IndexError, TypeError):
                text, answer = (functools.reduce(lambda value, key: value[key], path, row) for path in columns)
                break
        else:
            raise ValueError(f"{name} has a row without a problem and its answer; every row must hold problem and answer")
        if str(text).startswith("Solve the following math problem step by step."):  # DAPO's, before and after a problem
            text = "\n\n".join(str(text).split("\n\n")[1:-1])
        answer = str(answer).rpartition("####")[2].strip()  # GSM8K's answer follows its solution
        problems.setdefault(str(text).strip(), answer)
    if not problems:
        raise ValueError(f"{name} holds no problem; give a file with a problem and an answer in each line")
    return problems


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- reward -------------------------------------------------------------------------------------------------------

MAX_ANSWER, MAX_NESTING = 300, 20  # characters, and braces within braces, of an answer; one beyond is wrong
MAX_TAIL = 10_000  # characters at the end of a completion in which a last number is looked for
VERIFY_SECONDS = 3.0  # for one comparison, which takes milliseconds unless it is hostile; then its process is killed
VERIFY_BYTES = 2**30  # memory of one verifier process, which takes 0.1 GB
VERIFIERS = min(8, os.cpu_count() or 1)  # processes at once in `math_rewards`
NUMBER = r"-?\$?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)%?"  # -5  1,234  $18.00  .5  50%


def math_reward(completion: str, answer: str) -> float:
    r"""1.0 if the last \boxed{...} of `completion` is equivalent to `answer`, else 0.0.

    Where the answer is a plain number and the completion has no box, its last number counts (lm-eval's "flexible
    extraction"): small models hardly ever write a box. Two plain numbers are compared exactly, the rest is judged by
    math-verify. A completion is hostile input: what is compared is bounded, and so is the time that it may take.
    """
    box, wanted = last_box(completion), plain_number(answer)
    if box is None:
        numbers = re.findall(NUMBER, completion[-MAX_TAIL:])
        return float(wanted is not None and bool(numbers) and plain_number(numbers[-1]) == wanted)
    if not box or len(answer) > MAX_ANSWER:
        return 0.0
    given = plain_number(box)
    if given is not None and wanted is not None and (given == wanted or "%" not in box + answer):  # 50% is also 0.5
        return float(given == wanted)
    return float(equivalent(box, answer))


def math_rewards(completions: Iterable[str], answers: Iterable[str]) -> list[float]:
    """`math_reward` of each completion and its answer, on several processors."""
    with ThreadPoolExecutor(VERIFIERS) as pool:
        return list(pool.map(math_reward, completions, answers))


def last_box(completion: str) -> str | None:
    r"""What the last \boxed{...} holds; "" if it is unclosed, too long or too deep; None if there is no \boxed{."""
    _, found, text = completion.rpartition(r"\boxed{")
    if not found:
        return None
    depth = 1
    for token in re.finditer(r"\\.|[{}]", text[: MAX_ANSWER + 1], re.DOTALL):  # \{ and \} are no braces
        depth += (token[0] == "{") - (token[0] == "}")
        if depth == 0:
            return text[: token.start()].strip()
        if depth > MAX_NESTING:
            break
    return ""


def plain_number(text: str) -> Fraction | None:
    """The exact value of a text that is a number and nothing else, whatever its $ or % may mean; None for any other."""
    text = text.strip().removesuffix(".")
    if len(text) > MAX_ANSWER or not re.fullmatch(NUMBER, text):
        return None
    return Fraction(re.sub("[$,%]", "", text))


# A comparison can take forever (9^{9^{9^9}}) or crash, and nothing within Python ends a big-integer power. So it
# happens in small processes of its own, kept for the next one and replaced when they overrun.
idle_verifiers: list[subprocess.Popen[str]] = []
killed: list[tuple[str, str]] = []  # (box, answer) of every comparison that cost its process; their number is a metric


@functools.lru_cache(maxsize=100_000)
def equivalent(box: str, answer: str) -> bool:
    """Whether math-verify finds them equivalent; no, and noted in `killed`, if the process didn't live to say so."""
    try:
        verifier = idle_verifiers.pop()
    except IndexError:
        verifier = start_verifier()
    verdict = ""
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps([VERIFY_SECONDS, answer, box]), file=verifier.stdin, flush=True)
        verdict = verifier.stdout.readline()
    if verdict not in ("0\n", "1\n"):
        verifier.kill()
        verifier.communicate()  # closes the pipes and leaves no zombie
        killed.append((box, answer))
        return False
    idle_verifiers.append(verifier)
    return verdict == "1\n"


def start_verifier() -> subprocess.Popen[str]:
    """A process that has begun `_verify_lines`. Raises ValueError without math-verify: call it before the first step."""
    verifier = subprocess.Popen(
        [sys.executable, "-c", f"{VERIFIER_SOURCE}\n_verify_lines({VERIFY_BYTES})"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C reaches the training loop alone, which finishes its step
        env={**os.environ, "PYTHONHASHSEED": "0"},  # no verdict depends on the order of a set
    )
    if verifier.stdout.readline() != "ready\n":
        verifier.communicate()
        raise ValueError("mathematical answers are judged by math-verify, which can't be imported here: pip install math-verify")
    return verifier


def _verify_lines(max_bytes: int) -> None:
    """The life of a verifier: a verdict, 0 or 1, for each line of its input. It gets this source alone, so no torch."""
    import contextlib
    import faulthandler
    import json
    import sys

    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no verdict
    with contextlib.suppress(ImportError, OSError, ValueError):  # not every system can limit it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    from math_verify import LatexExtractionConfig, parse, verify

    latex = [LatexExtractionConfig()]
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        seconds, *texts = json.loads(line)
        # A thread outside of Python ends the process in time, even within a big-integer power, even when the run is
        # gone. math-verify's own limits, switched off, are signal handlers, which Python calls only after the power.
        faulthandler.dump_traceback_later(seconds, exit=True)
        try:
            answer, box = (parse(rf"\boxed{{{text}}}", latex, parsing_timeout=None) for text in texts)
            right = verify(answer, box, timeout_seconds=None)
        except Exception:  # anything can fail in an algebra system that model output drives: no verdict means no
            right = False
        faulthandler.cancel_dump_traceback_later()
        print(int(right), file=replies, flush=True)


VERIFIER_SOURCE = inspect.getsource(_verify_lines)
