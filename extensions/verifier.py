r"""Judging mathematics: is what a completion has in its last \boxed{} equal to the answer?

    math_reward(r"So it is \boxed{\frac{1}{2}}.", "0.5")    # 1.0; needs: pip install math-verify

A completion is hostile input: a comparison can take forever (9^{9^{9^9}}) or crash, and nothing
within Python ends a power of big integers. So texts are bounded in size, and what isn't a plain
number is compared in small processes with limits of time and memory. A process is kept for the next
comparison, and replaced when it overruns.
"""

import contextlib
import faulthandler
import functools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

from tqdm import tqdm

MAX_ANSWER = 300  # characters; a longer answer is wrong
MAX_NESTING = 20  # braces within braces; a deeper answer is wrong
MAX_TAIL = 10_000  # characters at the end of a completion in which a last number is looked for
VERIFY_SECONDS = 3.0  # for one comparison, which takes milliseconds unless it is hostile
VERIFY_BYTES = 2**30  # memory of one process, which takes 0.1 GB
VERIFIERS = min(8, os.cpu_count() or 1)  # processes at once
NUMBER = r"-?\$?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)%?"  # -5  $1,234.0  .5


def math_reward(completion, answer):
    r"""1.0 if the last \boxed{} of `completion` is equivalent to `answer`, else 0.0.

    Small models rarely write a box. Without one, the last number counts if the answer is a number.
    Plain numbers are compared exactly, all else by math-verify, within bounds of size and time.
    Raises BadInput if math-verify is needed and missing.
    """
    box = last_box(completion)
    wanted = plain_number(answer)
    if box is None:
        numbers = re.findall(NUMBER, completion[-MAX_TAIL:])
        last = plain_number(numbers[-1]) if numbers else None
        return float(last is not None and last == wanted)
    if not box or len(answer) > MAX_ANSWER:
        return 0.0
    given = plain_number(box)
    percent = "%" in box + answer  # 50% is 50 and 0.5: math-verify knows
    if given is not None and wanted is not None and (given == wanted or not percent):
        return float(given == wanted)
    return float(equivalent(box, answer))


def math_rewards(completions, answers):
    """`math_reward` of each completion and its answer, several at a time: a list of numbers."""
    with ThreadPoolExecutor(VERIFIERS) as pool:
        return list(pool.map(math_reward, completions, answers))


def last_box(completion):
    r"""What the last \boxed{} holds; "" if unclosed, too long or too deep; None without one."""
    _, found, text = completion.rpartition(r"\boxed{")
    if not found:
        return None
    text = text[: MAX_ANSWER + 1]
    depth = 1
    for token in re.finditer(r"\\.|[{}]", text, re.DOTALL):  # \{ and \} are no braces
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return text[: token.start()].strip()
        if depth > MAX_NESTING:
            break
    return ""


def plain_number(text):
    """The exact value of a text that is a number, whatever its $ or % may mean; else None."""
    text = text.strip().removesuffix(".")
    if len(text) > MAX_ANSWER or not re.fullmatch(NUMBER, text):
        return None
    return Fraction(re.sub("[$,%]", "", text))


idle_verifiers = []  # processes that wait for a comparison
killed = []  # (box, answer) of every comparison that cost its process


@functools.lru_cache(maxsize=100_000)
def equivalent(box, answer):
    """What math-verify says; False, and noted in `killed`, if its process didn't live to say it."""
    try:
        verifier = idle_verifiers.pop()
    except IndexError:
        verifier = start_verifier()
    verdict = ""
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps([VERIFY_SECONDS, answer, box]), file=verifier.stdin, flush=True)
        verdict = verifier.stdout.readline()
    if verdict in ("0\n", "1\n"):
        idle_verifiers.append(verifier)
        return verdict == "1\n"
    verifier.kill()
    verifier.communicate()  # closes the pipes and leaves no zombie
    killed.append((box, answer))
    tqdm.write(f"{box!r} ended its verifier and counts as wrong; {len(killed)} such in all")
    return False


def start_verifier():
    """A process that has begun `serve`. Raises BadInput without math-verify."""
    verifier = subprocess.Popen(
        [sys.executable, __file__, str(VERIFY_BYTES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C reaches the run alone, and ends its verifiers' input
        env={**os.environ, "PYTHONHASHSEED": "0"},  # no verdict depends on the order of a set
    )
    if verifier.stdout.readline() != "ready\n":
        from rs_grpo import BadInput  # not above: a verifier does without torch

        verifier.communicate()
        reason = "answers are judged by math-verify, which can't be imported here"
        raise BadInput(f"{reason}: pip install math-verify")
    return verifier


def serve(max_bytes):
    """The life of a verifier: for each line of input, [seconds, answer, box], it prints 0 or 1."""
    replies = sys.stdout
    sys.stdout = sys.stderr  # what a library prints is no verdict
    with contextlib.suppress(ImportError, OSError, ValueError):  # not every system can limit it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    from math_verify import LatexExtractionConfig, parse, verify

    latex = [LatexExtractionConfig()]
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        seconds, *texts = json.loads(line)
        # A thread outside of Python ends the process in time, even within a power of big integers,
        # even when the run is gone. math-verify's own limits wait for the power, so they are off.
        faulthandler.dump_traceback_later(seconds, exit=True)
        try:
            boxes = [rf"\boxed{{{text}}}" for text in texts]
            answer, box = [parse(text, latex, parsing_timeout=None) for text in boxes]
            right = verify(answer, box, timeout_seconds=None)
        except Exception:  # anything can fail in an algebra system that model output drives
            right = False
        faulthandler.cancel_dump_traceback_later()
        print(int(right), file=replies, flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
