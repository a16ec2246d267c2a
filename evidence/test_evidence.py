"""The specification of experiments/: estimators, mathematics, TRL and verl, and the comparison."""

import copy
import importlib
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import types
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from operator import mul
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rs_grpo
from experiments import compare, estimators, mathematics, pretrain, report
from experiments.estimators import (
    Config,
    chen_advantage,
    mahdavi_advantage,
    maxrl_advantage,
    pkpo_advantage,
    pkpo_loo_advantage,
)
from experiments.mathematics import MathConfig, equivalent, last_box, math_reward, plain_number
from rs_grpo import (
    ADVANTAGES,
    TASKS,
    BadInput,
    Rollouts,
    grpo_advantage,
    pass_at_k,
    risk_sensitive_advantage,
    train,
)

ROOT = Path(rs_grpo.__file__).resolve().parent
PROMPTS = ["1,2,3,4=5:", "10,11,12,13=48:", "1,10,11,12=9:", "2,2,3,3=7:", "1,5,5,12=20:"]
os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # a warning would go to a stream that is closed
torch.set_num_threads(1)  # models this small gain nothing from a second thread


# --- The embedded model ---------------------------------------------------------------------------
def test_the_base_is_as_peaked_as_its_readme_says_and_chains_solve_a_third():
    def chains(texts):
        return sum(not set(text) & set("*/") for text in texts) / len(texts)

    rng = random.Random(1)
    learned = [pretrain.example(rng)[1] for _ in range(4000)]
    assert 0.94 < chains(learned) < 0.97  # "nineteen in twenty"
    config = Config(eval_problems=256, max_tokens=20)
    task = TASKS["countdown"](config)
    policy, generator = rs_grpo.load_policy(config, task), torch.Generator().manual_seed(0)
    texts = rs_grpo.roll_out(policy, task, task.held_out, 16, config, generator).texts
    assert 0.72 < chains(texts) < 0.82  # "three in four"

    signs = list(itertools.product((1, -1), repeat=4))
    solved = sum(
        any(sum(map(mul, sign, numbers)) == target for sign in signs)
        for numbers, target in (answer for _, answer in task.train + task.held_out)
    )
    assert 0.28 < solved / len(task.train + task.held_out) < 0.38  # "can't solve two thirds"


# --- Estimators -----------------------------------------------------------------------------------
def group(correct, samples=16):
    """Binary rewards (1, N) of which the first `correct` are 1."""
    return (torch.arange(samples) < correct).double()[None]


# Advantage of a correct and of a wrong sample of 16, at k = 4, for 1, 4, 8 and 15 correct ones.
WORKED = {  # by hand
    "chen": "1.732/-.115 .611/-.204 .200/-.200 0/0",
    "mahdavi": "3.090/-.206 1.266/-.422 .250/-.250 .0001/-.0009",
    "pkpo": ".250/.050 .250/.159 .250/.231 .250/.250",
    "pkpo_loo": ".250/0 .121/0 .031/0 0/0",
    "maxrl": "15/-1 3/-1 1/-1 .067/-1",
}


def estimate(name, rewards, k=4):
    return ADVANTAGES[name](rewards, estimators.Config(k=k))


@pytest.mark.parametrize("name", WORKED)
def test_an_estimator_has_the_values_worked_out_by_hand_for_every_group_by_itself(name):
    for correct, cell in zip((1, 4, 8, 15), WORKED[name].split()):
        advantages = estimate(name, group(correct))
        right, wrong = map(float, cell.split("/"))
        tolerance = 6e-5 if abs(right) < 0.001 else 6e-4
        assert advantages[0, 0].item() == pytest.approx(right, abs=tolerance)
        assert advantages[0, -1].item() == pytest.approx(wrong, abs=tolerance)
    rewards = torch.tensor([[0.0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [1, 1, 1, 0, 1]])
    together = estimate(name, rewards)
    assert torch.equal(together, torch.cat([estimate(name, row[None]) for row in rewards]))
    assert together.dtype == torch.float32 and estimate(name, group(3)).dtype == torch.float64
    assert torch.equal(estimate(name, rewards.long()), together)
    if not name.startswith("pkpo"):
        assert together.sum(1).abs().max() < 1e-5


def test_limits_tie_the_estimators_together():
    rewards = (torch.rand(40, 16, generator=torch.Generator().manual_seed(0)) < 0.4).double()
    far = 1e3 * risk_sensitive_advantage(rewards, 1e3)
    assert torch.allclose(far, maxrl_advantage(rewards), atol=1e-6)
    mean = rs_grpo.mean_baseline_advantage(rewards)
    assert torch.allclose(mahdavi_advantage(rewards, 1), mean)
    assert torch.allclose(pkpo_advantage(rewards, 1), rewards / 16)
    assert torch.allclose(chen_advantage(rewards, 1), rs_grpo.grpo_advantage(rewards), atol=1e-4)


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_pkpo_equals_the_sum_over_all_subsets_and_does_not_overflow(leave_one_out):
    function = pkpo_loo_advantage if leave_one_out else pkpo_advantage
    rewards = torch.rand(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rewards[1, 2] = rewards[1, 5]  # a tie
    rewards[2] = (rewards[2] < 0.5).double()
    for k in range(2 if leave_one_out else 1, 8):
        brute = torch.zeros(3, 7, dtype=torch.float64)
        for subset in itertools.combinations(range(7), k):
            best = rewards[:, list(subset)].amax(1)
            for i in subset:
                others = [j for j in subset if j != i]
                without = rewards[:, others].amax(1) if leave_one_out else 0
                brute[:, i] += (best - without) / math.comb(7, k)
        assert torch.allclose(function(rewards, k), brute)
    # C(100, 50) is 1e29. Of the 49 others in a subset none is right, or they don't matter.
    wrong = math.comb(97, 49) / math.comb(99, 49) if leave_one_out else 1
    advantage = function(group(3, samples=100), 50)[0, 0].item()
    assert advantage == pytest.approx(0.5 * wrong, rel=1e-12)


def test_chen_equals_the_standardised_best_of_every_subset():
    """A subset earns 1 if a sample of it succeeds; a sample's advantage is over its subsets."""
    for k, correct in itertools.product((1, 2, 3, 4), range(8)):
        rewards, best = group(correct, 7), {}
        for subset in itertools.combinations(range(7), k):
            best[subset] = rewards[0, list(subset)].max().item()
        mean = sum(best.values()) / len(best)
        spread = math.sqrt(mean * (1 - mean)) + 1e-6
        mine = [[value for subset, value in best.items() if i in subset] for i in range(7)]
        brute = torch.tensor([(np.mean(values) - mean) / spread for values in mine])
        assert torch.allclose(chen_advantage(rewards, k)[0], brute, atol=1e-9)


def test_a_group_in_which_no_sample_can_make_a_difference_has_an_advantage_of_exactly_zero():
    """Chen et al.: any 4 of 16 hold a success; leave-one-out: any 3 do. Rounding would be run."""
    for correct, order in itertools.product(range(17), range(5)):
        shuffle = torch.randperm(16, generator=torch.Generator().manual_seed(order))
        rewards = group(correct)[:, shuffle]
        assert chen_advantage(rewards, 4).any() == (1 <= correct <= 12)
        assert pkpo_loo_advantage(rewards, 4).any() == (1 <= correct <= 13)
    assert not pkpo_loo_advantage(torch.full((3, 7), 0.37), 4).any()
    assert not maxrl_advantage(group(0)).any() and not maxrl_advantage(group(16)).any()


def test_mahdavi_is_the_gradient_of_pass_at_k():
    """With p = Σ_i π_i r_i, ∇(1 − (1−p)^k) by automatic differentiation over a uniform policy."""
    theta = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    p = (torch.softmax(theta, 0) * group(3, 8)[0]).sum()
    (1 - (1 - p) ** 4).backward()
    advantages = mahdavi_advantage(group(3, 8), 4)[0]
    assert torch.allclose((advantages - advantages.mean()) / 8, theta.grad)


def test_an_estimator_refuses_what_it_is_not_defined_for():
    half = torch.full((1, 8), 0.5)
    refused = [(name, half, 4) for name in ("chen", "mahdavi", "maxrl")]
    refused += [(name, torch.zeros(1, 8), k) for name in WORKED if name != "maxrl" for k in (0, 9)]
    refused += [(name, torch.zeros(8), 4) for name in WORKED]
    for name, rewards, k in [*refused, ("pkpo_loo", torch.zeros(1, 8), 1)]:
        with pytest.raises(ValueError):
            estimate(name, rewards, k)


def complaint(capsys, main, *flags):
    """Run a command line, expect exit status 2 and one sentence; returns it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, flags)))
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and printed.count("\n") == 1, printed
    return printed


def estimators_main(flags):
    rs_grpo.main(flags, estimators.Config)


@pytest.mark.parametrize("name", WORKED)
def test_every_estimator_trains_from_the_command_line(name, tmp_path, capsys):
    flags = f"--advantage {name} --k 3 --steps 2 --prompts 4 --eval-problems 2 --eval-samples 2"
    estimators_main([*flags.split(), "--out", str(tmp_path / "run")])
    assert len(metrics(tmp_path / "run")) == 2 and "pass@2" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["k"] == 3


def test_a_k_that_cannot_work_is_refused_in_a_sentence(tmp_path, capsys):
    for flags in ("chen --k 17", "mahdavi --k 0", "pkpo --k 17", "pkpo_loo --k 1", "chen --k x"):
        flags = f"--advantage {flags} --out {tmp_path / 'run'}".split()
        assert "--k" in complaint(capsys, estimators_main, *flags)
    assert not (tmp_path / "run").exists()
    script = [sys.executable, "experiments/estimators.py"]
    done = subprocess.run([*script, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("estimators.py: ")
    done = subprocess.run([*script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert "the k of chen" in done.stdout and "--resume" in done.stdout


# --- The reward of mathematics --------------------------------------------------------------------
def boxed(text):
    return rf"So the answer is \boxed{{{text}}}."


@pytest.fixture
def verifiers(monkeypatch):
    """Every verifier process that the test starts, none left from another one, and none left."""
    pytest.importorskip("math_verify")
    started, start = [], mathematics.start_verifier

    def noted():
        started.append(start())
        return started[-1]

    monkeypatch.setattr(mathematics, "start_verifier", noted)
    monkeypatch.setattr(mathematics, "idle_verifiers", [])
    monkeypatch.setattr(mathematics, "killed", [])
    equivalent.cache_clear()
    yield started
    for process in started:
        process.communicate(timeout=10)


# answer ~ box | answer ~ box
EQUIVALENT = r"""\frac{1}{2} ~ \frac12 | \frac{1}{2} ~ 0.5 | 0.5 ~ \dfrac{1}{2} | \frac{3}{4} ~ 3/4
\frac{\sqrt{3}}{3} ~ \frac{1}{\sqrt{3}} | 3\sqrt{2} ~ \sqrt{18} | \frac{\pi}{2} ~ \pi/2
(1,2] ~ \left( 1, 2 \right] | (-\infty,2)\cup(3,\infty) ~ (3,\infty)\cup(-\infty,2)
\{1,2\} ~ \{2,1\} | 1,2 ~ 2, 1 | (3,4) ~ (3,\,4) | x^2-1 ~ (x-1)(x+1) | 5 ~ x=5 | 5 ~ 5\text{ cm}
90 ~ 90^\circ | 10 ~ 10\% | 50\% ~ 0.5 | 50% ~ 50 | 50% ~ 0.5 | x<2 ~ (-\infty,2) | 18 ~ \$18.00
1234 ~ 1{,}234 | \text{Evelyn} ~ Evelyn | 6 ~ \boxed{6}
\begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix} 1 \\ 2 \end{pmatrix}"""
DIFFERENT = r"""\frac{1}{2} ~ \frac13 | \frac{1}{3} ~ 0.33 | \sqrt{2} ~ 1.41 | (1,2] ~ [1,2]
\{1,2\} ~ \{1,2,3\} | (3,4) ~ (4,3) | x^2-1 ~ x^2+1 | 5 ~ \pm 5 | 5 ~ 5, 6 | 5 ~ 5 \text{ or } 6
50% ~ 5 | even ~ \text{odd} | \begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}2\\1\end{pmatrix}"""


def pairs(text):
    return [tuple(pair.split(" ~ ")) for pair in text.replace("\n", " | ").split(" | ")]


def test_a_box_earns_its_reward_in_every_equivalent_form_and_in_no_other(verifiers):
    assert [(a, b) for a, b in pairs(EQUIVALENT) if math_reward(boxed(b), a) != 1] == []
    assert [(a, b) for a, b in pairs(DIFFERENT) if math_reward(boxed(b), a) != 0] == []
    assert mathematics.killed == [] and len(verifiers) == 1  # the same process judged them all


BOXES = {
    "2": r"\boxed{1} or \boxed{2}",
    r"\frac{1}{2}": r"\boxed{\frac{1}{2}} and 3 more words}",
    r"\left\{ x \right.": r"\boxed{\left\{ x \right.}",
    "7": r"\boxed{\boxed{ 7 }}",
    "1" * 300: boxed("1" * 300),
    "{" * 19 + "1" + "}" * 19: boxed("{" * 19 + "1" + "}" * 19),
}
NO_BOX = [r"\boxed{}", r"\boxed{7", r"\boxed{1} then \boxed{\frac{1}{2}", r"\boxed{7\}"]
NO_BOX += [boxed("1" * 301), boxed("{" * 20 + "1" + "}" * 20)]


def test_the_last_box_is_read_with_its_braces_matched_and_not_if_unclosed_long_or_deep():
    assert {last_box(text): text for text in BOXES.values()} == BOXES
    assert [text for text in NO_BOX if last_box(text) != ""] == []
    assert last_box("boxed{7}") is last_box("") is None


RIGHT = ["1234", "The answer is 1,234.", "The answer is $1,234.00.", "#### 1234", "**1234**"]
RIGHT += ["1 + 1233 = 1234 apples", "1234%", "1,234,", r"\boxed{1234}, which is 2 less"]
RIGHT += [r"\boxed{1,234.00}"]
WRONG = ["It is 1234, not 1", "-1234", "1234.5", "12345", "1,2345", "1,234,5", r"\boxed{7} 1234"]
WRONG += [r"\boxed{} 1234", r"1234 \boxed{123", "no number", ""]


def test_plain_numbers_are_compared_exactly_and_without_a_box_the_last_one_counts(monkeypatch):
    monkeypatch.setattr(mathematics, "equivalent", None)  # no question for math-verify
    for answer in ("1234", "1,234", "$1234", "1234.0", " 1234. "):
        assert [text for text in RIGHT if math_reward(text, answer) != 1] == []
        assert [text for text in WRONG if math_reward(text, answer) != 0] == []
    assert math_reward("so 1234", r"\frac{1234}{1}") == 0  # only if the answer is a plain number
    assert math_reward(boxed("x"), "x" * 301) == 0
    assert plain_number("-$1,234.50") == -1234.5 and plain_number(".5") == plain_number("50%") / 100
    assert math_reward("0.1", "0.1000000000000000055511151231257827") == 0  # equal as floats
    assert math_reward(f"1{'0' * 50}1", f"1{'0' * 51}") == 0
    for text in ["1,23", "5 5", "1e5", "--5", "1.2.3", "٣", "５", "²", "½", "x", "", "-", "$", "%"]:
        assert plain_number(text) is None
    assert not any(math_reward(f"it is {look_alike}", "5") for look_alike in "٥５𝟓")


M = 10**6
CHEAP = [r"\boxed{" * (M // 7), r"\boxed{" + r"\frac{1}{" * (M // 9), r"\boxed{" + "{" * M, "1" * M]
CHEAP += [boxed(r"\frac{1}{" * (M // 10) + "}" * (M // 10)), r"\boxed{1" + r"\}" * M + "}"]
CHEAP += [r"\boxed{" + "\\" * M + "}", boxed("1" * M), "1 " * (M // 2), "111," * (M // 4) + "1111"]
CHEAP += ["1." * (M // 2), "-$" * (M // 2), "٣" * M, "\0" * M, r"\boxed{}", r"\boxed{ }", ""]


def test_a_megabyte_of_anything_earns_nothing_at_once_and_reaches_no_verifier(monkeypatch):
    monkeypatch.setattr(mathematics, "equivalent", None)
    for text, answer in itertools.product(CHEAP, ["18", r"\frac{1}{2}", "1" * M]):
        started = time.perf_counter()
        assert math_reward(text, answer) == 0
        assert time.perf_counter() - started < 0.2, text[:20]


# What takes math-verify minutes, or gigabytes; and what may make it stumble.
BOMBS = ["9^{9^{9^9}}", "10^{10^8}", "(10^9)!", r"\sum_{n=1}^{10^9} n^n", "(x+y+z)^{1000}"]
MALFORMED = ["10^{10^{10}}", "0/0", r"\frac{1}{0}", r"\frac{", r"\frac{1}", "1e1000000", "18²"]
MALFORMED += ["(" * 100 + "1" + ")" * 100, r"\sqrt{" * 19 + "2" + "}" * 19, r"\begin{pmatrix}"]
MALFORMED += [r"\begin{pmatrix}1&2\\3\end{pmatrix}", "１８", "١٨", "\\", "$", "%", "\0", "\ud800"]
MALFORMED += ["\n1\n", "__import__('os').abort()", "+" * 300, "1,2" * 100, "∞"]
MALFORMED += [r"\text{" + "a " * 100 + "}"]


def test_malformed_and_look_alike_boxes_earn_nothing_in_bounded_time(verifiers, monkeypatch):
    monkeypatch.setattr(mathematics, "VERIFY_SECONDS", 1.0)
    for box in MALFORMED:
        started = time.perf_counter()
        assert math_reward(rf"\boxed{{{box}}}", "18") == 0, box
        assert time.perf_counter() - started < 1 + 3, box


def test_a_comparison_that_overruns_is_killed_said_counted_once_and_the_next_one_is_judged(
    verifiers, monkeypatch, capsys
):
    monkeypatch.setattr(mathematics, "VERIFY_SECONDS", 0.5)
    for bomb in BOMBS:
        started = time.perf_counter()
        assert math_reward(boxed(bomb), "18") == 0, bomb
        assert time.perf_counter() - started < 0.5 + 3, bomb
    assert mathematics.killed == [(bomb, "18") for bomb in BOMBS]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 5 and repr(BOMBS[4]) in said[4] and "counts as wrong" in said[4]
    assert all(process.returncode not in (None, 0) for process in verifiers)  # no zombie
    started = time.perf_counter()
    assert math_reward(boxed(BOMBS[0]), "18") == 0  # remembered
    assert time.perf_counter() - started < 0.1 and len(mathematics.killed) == len(BOMBS)
    monkeypatch.setattr(mathematics, "VERIFY_SECONDS", 5.0)
    assert math_reward(boxed(r"\frac{36}{2}"), "18") == 1
    verifiers[-1].kill()  # for whatever other reason
    verifiers[-1].wait()
    assert math_reward(boxed(r"\frac{54}{3}"), "18") == 0 and len(mathematics.killed) == 6
    assert math_reward(boxed(r"\frac{72}{4}"), "18") == 1 and len(verifiers) == 7


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_verifier_has_bounded_memory_and_ctrl_c_does_not_reach_it(verifiers):
    process = mathematics.start_verifier()
    limits = Path(f"/proc/{process.pid}/limits").read_text().splitlines()
    (memory,) = [line.split()[3] for line in limits if "address space" in line]
    assert int(memory) == mathematics.VERIFY_BYTES
    assert os.getpgid(process.pid) != os.getpgid(0)


def test_answers_are_judged_from_any_thread_and_in_batches_alike(verifiers):
    right, wrong = pairs(EQUIVALENT), pairs(DIFFERENT)
    answers, boxes = zip(*(right + wrong) * 3)
    batch, rewards = (list(map(boxed, boxes)), answers), []
    thread = threading.Thread(target=lambda: rewards.extend(mathematics.math_rewards(*batch)))
    thread.start()
    thread.join()
    assert rewards == ([1.0] * len(right) + [0.0] * len(wrong)) * 3
    assert len(mathematics.idle_verifiers) == len(verifiers) <= mathematics.VERIFIERS
    assert mathematics.math_rewards([], []) == []


@pytest.mark.parametrize("line", ["", "m.VERIFY_SECONDS = 1; m.equivalent('9^{9^{9^9}}', '18')"])
def test_a_verifier_idle_or_busy_ends_when_its_run_is_killed(line):
    pytest.importorskip("math_verify")
    code = "from experiments import mathematics as m; p = m.start_verifier()\n"
    code += f"m.idle_verifiers.append(p); print(p.pid, flush=True)\n{line}\ninput()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    pid = run.stdout.readline().strip()
    time.sleep(0.5)
    run.kill()
    run.communicate()

    def runs():
        listed = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True)
        return listed.stdout.strip()[:1] not in ("", "Z")

    deadline = time.monotonic() + 1 + 3
    while runs() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not runs()


FAKE = """LatexExtractionConfig = object
def parse(text, *a, **k):
    print(1)
    if 'deep' in text: raise RecursionError
    return text
def verify(answer, box, **k):
    print(1)
    return answer == box
"""


def test_what_a_verifier_prints_or_raises_is_no_verdict(verifiers, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "math_verify.py").write_text(FAKE)
    rewards = [math_reward(boxed(text), "x") for text in ("x", "y", "deep", "x ", "z")]
    assert rewards == [1, 0, 0, 1, 0]
    assert mathematics.killed == [] and len(verifiers) == 1
    (tmp_path / "math_verify.py").write_text("raise ImportError")
    with pytest.raises(BadInput, match="pip install math-verify"):
        mathematics.start_verifier()


# --- Data sets ------------------------------------------------------------------------------------
DAPO = "Solve the following math problem step by step. The last line of your response should be of "
DAPO += (
    "the form Answer: $Answer (without quotes).\n\n{}\n\nRemember to put your answer on its own."
)


def row(name, problem, answer):
    """A problem and its answer in the columns of a named set."""
    if name == "dapo17k":
        prompt = {"role": "user", "content": DAPO.format(problem)}
        return {"prompt": [prompt], "reward_model": {"ground_truth": answer}}
    if name == "deepmath103k":
        return {"question": problem, "final_answer": answer, "r1_solution_1": "#### 7"}
    if name == "gsm8k":
        return {"question": problem, "answer": f"It is <<3-1=2>>2.\n#### {answer}"}
    return {"id": 60, "problem": problem, "solution": "...", "answer": answer}


PAIRS = [("What is 1+1?", "2"), ("Halve 1.\n\nAs one.", r"\frac{1}{2}"), ("Six by seven?", "42")]
ON_THE_HUB = """math12k train hiyouga/math12k None train
math12k test hiyouga/math12k None test
dapo17k train BytedTsinghua-SIA/DAPO-Math-17k None train
deepmath103k train zwhe99/DeepMath-103K None train
gsm8k train openai/gsm8k main train
gsm8k test openai/gsm8k main test
math500 test HuggingFaceH4/MATH-500 None test
aime24 test HuggingFaceH4/aime_2024 None train
aime25 test MathArena/aime_2025 None train
hmmt24 test MathArena/hmmt_feb_2024 None train
hmmt25 test MathArena/hmmt_feb_2025 None train
cmimc25 test MathArena/cmimc_2025 None train"""  # name, use; id, configuration, split


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the datasets library, with a file for each set; returns what it's asked."""
    asked = []

    def load_dataset(path, name=None, *, split):
        asked.append(f"{path} {name} {split}")
        file = tmp_path / "hub" / f"{path} {name} {split}.jsonl"
        if not file.exists():
            raise ConnectionError(
                f"Couldn't reach '{path}' on the Hub\nfor a reason\nof three lines"
            )
        return [json.loads(line) for line in file.read_text().splitlines()]

    for line in ON_THE_HUB.splitlines():
        name, _, place = line.split(" ", 2)
        rows = [row(name, *pair) for pair in PAIRS] * 9  # DAPO's are repeated
        write_rows(tmp_path / "hub" / f"{place}.jsonl", rows)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(mathematics, "start_verifier", lambda: None)  # no model here writes a box
    monkeypatch.setattr(mathematics, "idle_verifiers", [])
    return asked


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load_task(**settings):
    return mathematics.load_task(MathConfig(model="one that can read", **settings))


def test_each_named_set_is_read_from_its_place_and_its_columns_each_problem_once(hub):
    for line in ON_THE_HUB.splitlines():
        name, use, place = line.split(" ", 2)
        problems = mathematics.load_problems(name, evaluating=use == "test")
        assert problems == [(*pair, name) for pair in PAIRS] and hub[-1] == place
    assert {line.split()[0] for line in ON_THE_HUB.splitlines()} == set(mathematics.HUB)


def test_a_file_is_split_by_a_hash_into_disjoint_parts_and_nothing_is_lost(hub, tmp_path):
    rows = [{"problem": f"How much is {i} and 1?", "answer": i + 1, "x": [i]} for i in range(300)]
    texts = [row["problem"] for row in rows]
    file = write_rows(tmp_path / "own.jsonl", rows + rows[:50])
    task = load_task(task=file, eval_problems=1000)
    assert sorted(p[0] for p in task.train + task.held_out) == sorted(texts)
    assert 10 < len(task.held_out) < 60
    assert all(answer == str(int(text.split()[3]) + 1) for text, answer, _ in task.train)
    half = load_task(task=write_rows(tmp_path / "half.jsonl", rows[149::-1]), seed=1)
    assert {p[0] for p in half.train} < {p[0] for p in task.train}  # no problem has moved

    other = [{"question": f"{text} ", "answer": "#### 7"} for text in texts[:100]]
    other = write_rows(tmp_path / "other.jsonl", other)
    task = load_task(task=file, eval_task=f" {other} ,", eval_problems=1000)
    assert task.held_out == [(text, "7", "other") for text in texts[:100]]
    assert [p[0] for p in task.train] == texts[100:]  # none of what is asked is trained on
    task = load_task(task=file, eval_task=other, eval_problems=5, train_problems=7)
    assert [len(task.held_out), [p[0] for p in task.train]] == [5, texts[100:107]]


def test_a_line_is_what_ends_in_a_newline_whatever_characters_a_problem_holds(tmp_path):
    texts = ["1\u2028 2\x85 3\x0c", "é", "  4 "]
    lines = [json.dumps({"problem": text, "answer": "1"}, ensure_ascii=False) for text in texts]
    (tmp_path / "own.jsonl").write_bytes(("\r\n\n".join(lines) + "\n\n").encode())
    problems = mathematics.load_problems(str(tmp_path / "own.jsonl"), False)
    assert [problem[0] for problem in problems] == [text.strip() for text in texts]


ONE = b'{"problem": "1?", "answer": "1"}\n'
MALFORMED_FILES = [ONE, None, b"", b"problem,answer\n1?,1\n", ONE + b'{"problem": "2?", "ans']
MALFORMED_FILES += [b'{"problem": "1?"}\n', b'{"text": "1?", "label": "1"}\n', b"5\n", b"null\n"]
MALFORMED_FILES += [b'["problem", "answer"]\n', b'"problem"\n', b"[" * 200_000 + b"\n"]
MALFORMED_FILES += [ONE.replace(b"?", b"\xff"), ONE.replace(b"?", b"\\ud800")]


def test_a_malformed_file_gets_one_sentence_and_exit_status_2(hub, tmp_path, capsys):
    rows = [{"problem": f"{i}?", "answer": "1"} for i in range(40)]
    good, file = write_rows(tmp_path / "good.jsonl", rows), tmp_path / "own.jsonl"
    flags = ["--model", "m", "--out", tmp_path / "run", "--task"]
    for content in MALFORMED_FILES:
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        assert "own.jsonl" in complaint(capsys, mathematics.main, *flags, file), content
        if content != ONE:  # which is enough to evaluate on
            message = complaint(capsys, mathematics.main, *flags, good, "--eval-task", file)
            assert "own.jsonl" in message, content
    assert not (tmp_path / "run").exists()


def test_a_setting_that_cannot_work_gets_one_sentence_and_leaves_rs_grpo_as_it_was(
    hub, tmp_path, capsys, monkeypatch
):
    before = {name: value for name, value in vars(rs_grpo).items() if callable(value)}
    tasks = list(rs_grpo.TASKS)
    flags = ["--out", str(tmp_path / "run")]
    refused = {
        "": "--task is missing",
        "--task gsm8k": "--model",
        "--task chess --model m": "chess",
        "--task countdown --eval-task gsm8k": "--eval-task",
        "--task gsm8k --model m --updates 5 --prompts 4": "--updates",
        "--task gsm8k --model m --updates 0": "--updates",
        "--task gsm8k --model m --clip-low nan": "--clip-low",
        "--task gsm8k --model m --dynamic-sampling -1": "--dynamic-sampling",
        "--task gsm8k --model m --advantage chen --k 17": "--k",
        "--task gsm8k --model m --eval-task math12k": "too small",  # all of it is asked
    }
    for given, said in refused.items():
        assert said in complaint(capsys, mathematics.main, *flags, *given.split()), given
    (tmp_path / "hub" / "openai/gsm8k main train.jsonl").unlink()
    message = complaint(capsys, mathematics.main, *flags, *"--task gsm8k --model m".split())
    for said in ("openai/gsm8k", "Couldn't reach", "a .jsonl file with problem and answer"):
        assert said in message
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = complaint(capsys, mathematics.main, *flags, *"--task math12k --model m".split())
    assert "pip install datasets" in message
    assert before == {name: vars(rs_grpo)[name] for name in before} and tasks == list(rs_grpo.TASKS)


# --- Asking and evaluating ------------------------------------------------------------------------
@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a random Llama of two layers and the embedded model's tokenizer."""
    return random_model("llama", tmp_path_factory.mktemp("tiny"))


def random_model(architecture, folder, **settings):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "countdown-base")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes |= {"vocab_size": len(tokenizer), "bos_token_id": None, "tie_word_embeddings": False}
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**sizes, **ids, **settings})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def load_policy(model):
    config = MathConfig(model=model, device="cpu")
    return rs_grpo.load_policy(config, rs_grpo.countdown(config))


@pytest.fixture
def policy(tiny):
    return load_policy(tiny)


@pytest.fixture
def talker():
    """A tokenizer of bytes that adds a BOS by itself, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.post_processor = bos
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)


TEMPLATE = "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}[model]{% endif %}"
ASKED = [
    (None, "", "<s>{}"),
    (TEMPLATE, "", "<s>{}"),
    (None, "Box it.", "<s>{}\nBox it.\n\n"),
    (TEMPLATE, "Box it.", "<s>[user]{}\nBox it.[model]"),
    (TEMPLATE.removeprefix("<s>"), "Box it.", "[user]{}\nBox it.[model]"),  # it means no BOS
]


@pytest.mark.parametrize("template, instruction, expected", ASKED)
def test_a_prompt_goes_through_the_chat_template_if_there_is_one_and_has_one_bos(
    talker, template, instruction, expected
):
    talker.chat_template = template
    problems = [("1+1?", "2", "own"), ("What is the half of é?", "", "own")]
    prompts = mathematics.encode(talker, problems, instruction)
    assert [talker.decode(ids) for ids in prompts] == [expected.format(p[0]) for p in problems]
    assert [ids.count(0) for ids in prompts] == [expected.count("<s>")] * 2
    assert all(type(ids) is tuple for ids in prompts)


def test_several_tasks_are_evaluated_with_pass_at_k_for_each(hub, tiny, tmp_path, capsys):
    rows = [{"problem": f"{i}?", "answer": str(i)} for i in range(20)]
    own = write_rows(tmp_path / "own.jsonl", rows)
    flags = f"--model {tiny} --task {own} --eval-task gsm8k,aime24 --steps 1 --prompts 4"
    flags += " --samples 4 --eval-samples 64 --max-tokens 3 --device cpu --out"
    mathematics.main([*flags.split(), str(tmp_path / "run")])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert list(results) == ["0", "1"]
    for result in results.values():
        assert list(result["tasks"]) == ["gsm8k", "aime24"] and len(result["correct"]) == 6
        for name, counts in zip(result["tasks"], (result["correct"][:3], result["correct"][3:])):
            ks = (1, 2, 4, 8, 16, 32, 64)
            expected = [100 * sum(pass_at_k(64, c, k) for c in counts) / 3 for k in ks]
            assert list(result["tasks"][name].values()) == pytest.approx(expected)
        assert result["correct"][0] > 0  # the last number is 2 now and then
    assert printed.count("pass@64") == 3 and "a prompt as the model sees it" in printed
    line = next(line for line in printed.splitlines() if "pass@64" in line and "gsm8k" in line)
    shown = [f"{result['tasks']['gsm8k']['64']:.1f}" for result in results.values()]
    assert line.split() == ["pass@64", *shown, "gsm8k"]


# --- The paper's recipe ---------------------------------------------------------------------------
def graded(rewards, config):
    """An estimator for a random model, which solves nothing: it learns something all the same."""
    return torch.linspace(-1, 1, rewards.shape[1]).expand_as(rewards)


@pytest.fixture(autouse=True)
def own_estimator(monkeypatch):
    monkeypatch.setitem(ADVANTAGES, "graded", graded)


def small(model, folder, **changes):
    """Flags of a small run on Countdown."""
    settings = {"model": model, "out": folder, "task": "countdown", "advantage": "graded"}
    settings |= {"prompts": 4, "samples": 4, "steps": 4, "max_tokens": 6, "lr": 1e-2}
    settings |= {"eval_problems": 3, "eval_samples": 4, "save_every": 2, "device": "cpu"} | changes
    words = []
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}"] + [str(value)] * (value is not True)
    return words


def metrics(folder):
    """The lines of a run's metrics.jsonl, but what a clock measured."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def same(folder, other):
    states = [torch.load(f / "checkpoint.pt", weights_only=True) for f in (folder, other)]
    ours, theirs = (state["model"] for state in states)
    evaluations = [(f / "eval.json").read_text() for f in (folder, other)]
    equal = metrics(folder) == metrics(other) and evaluations[0] == evaluations[1]
    return equal and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_without_the_recipe_every_step_is_that_of_rs_grpo(tiny, tmp_path, monkeypatch):
    scored, original = [], rs_grpo.completion_logprobs

    def noting(*args):
        scored.append(torch.is_grad_enabled())
        return original(*args)

    monkeypatch.setattr(rs_grpo, "completion_logprobs", noting)
    rs_grpo.main(small(tiny, tmp_path / "plain"))
    mathematics.main(small(tiny, tmp_path / "run"))
    assert same(tmp_path / "run", tmp_path / "plain")
    assert scored == [True] * 8  # four steps each, and no ratio


RECIPE = {"updates": 2, "dynamic_sampling": 2, "checkpointing": True}


@pytest.mark.parametrize("moment", ["report 1", "clipped_policy_gradient 6", "save_checkpoint 4"])
def test_a_run_of_the_recipe_resumes_to_the_same_numbers(tiny, tmp_path, monkeypatch, moment):
    """Broken off before the first checkpoint after a step, between updates, and before the next."""

    def half(rewards, config):  # a signal for the first group of each draw
        return graded(rewards, config) * (torch.arange(len(rewards)) < 1)[:, None]

    monkeypatch.setitem(ADVANTAGES, "graded", half)
    mathematics.main(small(tiny, tmp_path / "whole", **RECIPE))
    name, count = moment.split()
    module = mathematics if name in vars(mathematics) else rs_grpo
    calls, original = [], getattr(module, name)

    def breaking(*args, **kwargs):
        calls.append(name)
        if len(calls) == int(count):
            raise RuntimeError("killed")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(module, name, breaking)
        mathematics.main(small(tiny, tmp_path / "run", **RECIPE))
    mathematics.main(["--resume", "--out", str(tmp_path / "run")])
    assert same(tmp_path / "run", tmp_path / "whole")
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["state"]
    assert (state["step"], state["drawn"]) == (4, 12)


DRAWS = [(1, 10, 4), (3, 10, 2), (4, 10, 1), (0, 2, 3), (1, 1, 2), (0, 0, 1)]


@pytest.mark.parametrize("with_signal, bound, draws", DRAWS)
def test_dynamic_sampling_draws_until_enough_groups_have_a_signal_and_not_for_ever(
    tiny, tmp_path, monkeypatch, with_signal, bound, draws
):
    seen, original = [], rs_grpo.policy_gradient

    def some(rewards, config):
        return graded(rewards, config) * (torch.arange(len(rewards)) < with_signal)[:, None]

    def noting(policy, rollouts, advantages, config):
        seen.append(rollouts.questions)
        assert len(rollouts.prompts) == len(advantages) == len(rollouts.completions) / 4
        original(policy, rollouts, advantages, config)

    monkeypatch.setitem(ADVANTAGES, "graded", some)
    monkeypatch.setattr(rs_grpo, "policy_gradient", noting)
    mathematics.main(small(tiny, tmp_path / "run", steps=2, dynamic_sampling=bound))
    assert [len(questions) for questions in seen] == [4 * draws] * 2
    assert len({*seen[0], *seen[1]}) == 8 * draws  # each problem once an epoch
    assert [line["signal"] for line in metrics(tmp_path / "run")] == [with_signal / 4] * 2


def test_draws_of_one_step_are_joined_as_if_drawn_in_several_steps_without_learning(policy):
    config = MathConfig(prompts=3, samples=4, max_tokens=6, dynamic_sampling=1)
    task = rs_grpo.countdown(config)

    def fresh():
        solved = torch.zeros(len(task.train), dtype=torch.bool)
        return SimpleNamespace(step=5, solved=solved), torch.Generator().manual_seed(0)

    state, generator = fresh()
    ours, advantages = mathematics.collect(policy, task, config, state, generator)
    assert (state.step, state.drawn) == (5, 7)
    state, generator = fresh()
    first, a = rs_grpo.collect(policy, task, config, state, generator)
    state.step += 1
    second, b = rs_grpo.collect(policy, task, config, state, generator)
    for name in ("prompts", "completions", "questions", "texts"):
        assert getattr(ours, name) == [*getattr(first, name), *getattr(second, name)]
    assert torch.equal(ours.rewards, torch.cat([first.rewards, second.rewards]))
    assert torch.equal(advantages, torch.cat([a, b]))
    tokens = [sum(map(len, some.completions)) for some in (first, second)]
    nats = first.entropy * tokens[0] + second.entropy * tokens[1]
    assert ours.entropy == pytest.approx(nats / sum(tokens)) and tokens[0] != tokens[1]


def draw(policy, samples, **settings):
    """Completions of PROMPTS, and an advantage for each."""
    config = MathConfig(prompts=5, device="cpu", **settings)
    prompts = list(map(tuple, policy.tokenizer(PROMPTS).input_ids))
    generator = torch.Generator().manual_seed(0)
    completions, entropy = rs_grpo.sample(policy, prompts, samples, config, generator)
    advantages = torch.randn(5, samples, generator=torch.Generator().manual_seed(0))
    advantages[2] = 0  # a group without a signal
    return Rollouts(prompts, completions, entropy, PROMPTS, None, None), advantages, config


def plain_logprobs(model, prompt, completion, temperature):
    """log π of each completion token from one plain forward pass: no cache, padding or batch."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1)[range(len(completion)), completion]


def gradient(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


class Noting:
    """An optimizer that notes each gradient, and shakes the weights in place of a step."""

    param_groups, seen = [{}], []

    def __init__(self, model):
        self.model, self.seen, self.copies = model, [], []

    def step(self):
        self.seen.append(gradient(self.model))
        self.copies.append(copy.deepcopy(self.model))  # the policy that this gradient is of
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.model.parameters():
                shake = torch.randn(parameter.shape, generator=noise)
                parameter += 0.05 * parameter.std() * shake

    def zero_grad(self):
        self.model.zero_grad()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_update_has_the_gradient_of_a_hand_written_ppo_loss(policy, checkpointing):
    """π_old is the policy before the first update; whole groups are in one part each."""
    settings = {"updates": 2, "micro_tokens": 150, "clip_low": 0.1, "clip_high": 0.3}
    settings |= {"temperature": 0.8, "max_tokens": 7, "checkpointing": checkpointing}
    rollouts, advantages, config = draw(policy, samples=8, **settings)
    assert len(set(rollouts.completions)) == 40  # none are equal, so none are run as one
    optimizer, old = Noting(policy.model), copy.deepcopy(policy.model)
    norm = mathematics.update(policy, optimizer, rollouts, advantages, config, 3)
    assert len(optimizer.seen) == 2 and optimizer.param_groups[0]["lr"] == config.lr * 0.3
    norms, places = [], set()
    for mine, ours, now in zip(([0, 1], [2, 3, 4]), optimizer.seen, optimizer.copies):
        terms, tokens = [], 0
        for i, j in itertools.product(mine, range(8)):
            row = rollouts.prompts[i], rollouts.completions[8 * i + j]
            with torch.no_grad():
                before = plain_logprobs(old, *row, 0.8)
            ratio = (plain_logprobs(now, *row, 0.8) - before).exp()
            a, tokens = advantages[i, j], tokens + len(row[1])
            terms += [torch.min(r * a, r.clamp(0.9, 1.3) * a) for r in ratio]
            if mine == [0, 1]:
                assert torch.allclose(ratio, torch.ones_like(ratio), atol=1e-4)
            elif a:  # below, above, between the bounds, and within 1 ± 0.1
                bounds = torch.tensor([0.9, 1.1, 1.3])
                places |= {
                    (place, a.item() > 0) for place in torch.bucketize(ratio, bounds).tolist()
                }
        now.zero_grad()
        (-sum(terms) / tokens).backward()
        reference = gradient(now)
        norms.append(reference.norm().item())
        reference *= min(1, 1 / norms[-1])  # clipped
        assert (ours - reference).norm() < 1e-4 * reference.norm()
    assert norm == pytest.approx(sum(norms) / 2, rel=1e-4)
    assert len(places) == 8


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2"])
def test_a_checkpointed_model_learns_the_same_and_is_as_it_was_afterwards(architecture, tmp_path):
    """Rotary positions are relative and forgive a shift; GPT-2's are looked up in a table."""
    policy = load_policy(random_model(architecture, tmp_path))
    rollouts, _, _ = draw(policy, samples=4, max_tokens=9, temperature=0.7)
    owners = [prompt for prompt in rollouts.prompts for _ in range(4)]
    shapes, layers, base, gradients = [], [], policy.model.base_model, []
    base.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    first = (base.h if architecture == "gpt2" else base.layers)[0]
    attention = first.attn if architecture == "gpt2" else first.self_attn
    attention.register_forward_hook(lambda *_: layers.append(1))
    for function in (mathematics.checkpointed_logprobs, rs_grpo.completion_logprobs):
        logprobs = function(policy, owners, rollouts.completions, 0.7)
        (logprobs.sum(1) * torch.linspace(-1, 1, 20)).sum().backward()
        gradients.append((gradient(policy.model), logprobs.detach()))
        policy.model.zero_grad()
    longest = max(len(p + c) for p, c in zip(owners, rollouts.completions))
    assert shapes[0] == (20, longest) and len(shapes) == 1 + 2  # rows; then prompts, completions
    assert len(layers) == 2 + 2  # once more in the backward pass, and then as ever
    (ours, whole), (reference, shared) = gradients
    assert torch.allclose(whole, shared, atol=1e-5)
    assert (ours - reference).norm() < 1e-5 * reference.norm()


# --- The same advantage inside TRL and verl -------------------------------------------------------
@pytest.fixture
def trl_rs_grpo(monkeypatch):
    """The module experiments/trl_rs_grpo.py, where TRL is installed."""
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    return importlib.import_module("trl_rs_grpo")


def trl_config(folder, **settings):
    """TRL's settings for a tiny run on the CPU."""
    from trl import GRPOConfig

    plain = {"scale_rewards": "none", "bf16": False, "use_cpu": True, "save_strategy": "no"}
    plain |= {"output_dir": str(folder), "report_to": [], "disable_tqdm": True}
    return GRPOConfig(**plain | settings)


def test_trls_loss_sees_our_advantages_in_training_and_in_evaluation(trl_rs_grpo, tmp_path):
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    beta, rewards, seen = 2.0, {"train": {}, "eval": {}}, {"train": [], "eval": []}
    model = AutoModelForCausalLM.from_pretrained(ROOT / "countdown-base")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "countdown-base")

    def reward(prompts, completions, completion_ids, **rest):  # scaling or reordering would show
        batch = [
            sum(i * token for i, token in enumerate(ids, 1)) % 17 / 8 for ids in completion_ids
        ]
        mode = "train" if trainer.model.training else "eval"
        for prompt, ids, value in zip(prompts, completion_ids, batch):
            rewards[mode].setdefault(prompt, []).append((tuple(ids), value))
        return batch

    class Watched(trl_rs_grpo.RSGRPOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            for row, advantage in enumerate(inputs["advantages"].tolist()):
                prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
                ids = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()]
                text = tokenizer.decode(prompt, skip_special_tokens=True)
                mode = "train" if model.training else "eval"
                seen[mode].append((text, tuple(ids.tolist()), advantage))
            return super().compute_loss(model, inputs, *args, **kwargs)

    problems = ["3,4,5,6=21:", "1,2,3,4=24:", "2,2,7,9=18:", "5,6,8,9=30:", "6,9,9,12=36:"]
    problems = [{"prompt": problem} for problem in [*problems, "5,7,7,12=7:"]]
    sizes = {"max_steps": 1, "num_generations": 4, "per_device_train_batch_size": 8}
    sizes |= {
        "gradient_accumulation_steps": 2
    }  # so that TRL shuffles 16 rows and splits them in two
    sizes |= {"num_generations_eval": 3, "per_device_eval_batch_size": 6}
    sizes |= {"max_completion_length": 12, "temperature": 3.0}  # completions of a prompt differ
    trainer = Watched(
        model=model,
        reward_funcs=reward,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(problems[:4]),
        eval_dataset=datasets.Dataset.from_list(problems[4:]),
        args=trl_config(tmp_path, **sizes),
        beta_risk=beta,
    )
    trainer.train()
    logged = list(trainer._logs["advantages"])
    trainer.evaluate()

    for mode, samples, rows in (("train", 4, 16), ("eval", 3, 6)):
        expected, in_order = {}, []
        for prompt, group in rewards[mode].items():
            values = torch.tensor([[value for _, value in group]])
            assert len(group) == samples
            for (ids, _), a in zip(group, risk_sensitive_advantage(values, beta)[0].tolist()):
                expected[prompt, ids] = a
            in_order += [expected[prompt, ids] for ids, _ in group]
        assert len(seen[mode]) == rows and len({a for *_, a in seen[mode]}) > 3  # a signal
        for prompt, ids, advantage in seen[mode]:
            assert advantage == pytest.approx(expected[prompt, ids], abs=1e-5)
        if mode == "train":  # what log_completions prints, in the order of generation
            assert logged == pytest.approx(in_order, abs=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_group_that_lies_across_two_trl_processes_is_one(trl_rs_grpo, monkeypatch, training):
    trainer_class = trl_rs_grpo.RSGRPOTrainer
    rewards = torch.tensor([[0.0, 1, 0, 0], [1, 1, 0, 1], [0, 0, 0.5, 0]])  # six on each process
    shifted = (rewards - rewards.mean(1, keepdim=True)).flatten()
    expected = risk_sensitive_advantage(rewards, 3.0).flatten().tolist()

    def part(process):
        trainer = trainer_class.__new__(trainer_class)  # one process, without a model
        trainer.beta_risk, trainer._scored = 3.0, torch.ones(12, dtype=torch.bool)
        trainer.num_generations, trainer.num_generations_eval = (4, 2) if training else (2, 4)
        trainer.model = SimpleNamespace(training=training)
        trainer.accelerator = SimpleNamespace(process_index=process, gather=lambda mine: shifted)
        trainer._logs = {"advantages": deque([7.0] + shifted.tolist(), maxlen=13)}
        mine = {"advantages": shifted[6 * process : 6 * process + 6], "other": 1}
        name = "_generate_and_score_completions"
        monkeypatch.setattr(trainer_class.__base__, name, lambda self, inputs: mine)
        output = trainer._generate_and_score_completions([])
        assert output["other"] == 1
        assert list(trainer._logs["advantages"]) == pytest.approx([7.0] + expected, abs=1e-6)
        return output["advantages"].tolist()

    assert part(0) + part(1) == pytest.approx(expected, abs=1e-6)


def test_a_completion_that_no_reward_function_judged_gets_zero_and_leaves_trls_group_alone(
    trl_rs_grpo, monkeypatch
):
    trainer_class, nan = trl_rs_grpo.RSGRPOTrainer, torch.nan
    rows = [[1, nan], [nan, 0], [nan, nan], [0, 0], *[[nan, nan]] * 4]
    by_function = torch.tensor(rows)
    monkeypatch.setattr(trainer_class.__base__, "_calculate_rewards", lambda *args: by_function)
    trainer = trainer_class.__new__(trainer_class)
    assert trainer._calculate_rewards([], [], [], []) is by_function
    shifted = torch.tensor([2 / 3, -1 / 3, 0, -1 / 3, 0, 0, 0, 0])  # TRL's: the mean of the judged
    advantages = trl_rs_grpo.regrouped_advantage(shifted, trainer._scored, 4, 2.0)
    a = risk_sensitive_advantage(torch.tensor([[1.0, 0, 0]]), 2.0)[0].tolist()
    assert advantages.tolist() == pytest.approx([a[0], a[1], 0, a[2], 0, 0, 0, 0], abs=1e-6)
    assert not advantages[[2, 4, 5, 6, 7]].any()


def test_trls_other_scalings_missing_settings_and_an_infinite_beta_are_refused_in_a_sentence(
    trl_rs_grpo, tmp_path
):
    scalings = [{"scale_rewards": value} for value in ("group", "batch", True)]
    for settings in [*scalings, {"multi_objective_aggregation": "normalize_then_sum"}]:
        message = (
            f"^{next(iter(settings))} is '.*', but must be '.*': RS-GRPO needs unscaled rewards$"
        )
        with pytest.raises(ValueError, match=message):
            trl_rs_grpo.RSGRPOTrainer("no-such-model", [], trl_config(tmp_path, **settings))
    with pytest.raises(ValueError, match="beta"):
        trl_rs_grpo.RSGRPOTrainer("no-such-model", [], trl_config(tmp_path), beta_risk=math.inf)
    with pytest.raises(ValueError, match="scale_rewards is None"):
        trl_rs_grpo.RSGRPOTrainer("no-such-model", [], None)


def test_the_trl_script_trains_on_a_jsonl_of_problems_and_answers(
    trl_rs_grpo, monkeypatch, tmp_path, capsys
):
    made = {}

    class Trainer:
        def __init__(self, *args, **settings):
            made.update(settings, model=args[0], reward=args[1], config=args[2])

        train = save_model = lambda self: None

    monkeypatch.setattr(trl_rs_grpo, "RSGRPOTrainer", Trainer)
    file = write_rows(tmp_path / "train.jsonl", [{"problem": "What is 1 + 1?", "answer": "2"}])
    common = f"--model m --output_dir {tmp_path} --use_cpu true --bf16 false --data".split()
    trl_rs_grpo.main([*common, file, "--beta_risk", "4", "--num_generations", "8"])
    assert made["beta_risk"] == 4 and made["model"] == "m"
    config = made["config"]
    assert (config.scale_rewards, config.num_generations, config.beta) == ("none", 8, 0)
    (row,) = made["train_dataset"]
    assert row["prompt"][0]["content"].startswith("What is 1 + 1?\n") and row["answer"] == "2"
    texts = ("so \\boxed{2}", "so \\boxed{3}", "\\boxed{42}")
    texts = [[{"role": "assistant", "content": text}] for text in texts]
    assert made["reward"](completions=texts, answer=["2", "2", "42"], extra=1) == [1, 0, 1]

    other = write_rows(tmp_path / "other.jsonl", [{"text": "?"}])
    with pytest.raises(SystemExit):
        trl_rs_grpo.main([*common, other])
    assert "a row without a problem and its answer" in capsys.readouterr().err


@pytest.fixture
def verl_estimator(monkeypatch):
    """What experiments/verl_rs_grpo.py registers, in place of an installed verl."""
    registry = {}
    names = ("verl", "verl.trainer", "verl.trainer.ppo", "verl.trainer.ppo.core_algos")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    def register_adv_est(name):
        return lambda function: registry.setdefault(name, function)

    sys.modules[names[-1]].register_adv_est = register_adv_est
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    monkeypatch.delitem(sys.modules, "verl_rs_grpo", raising=False)
    importlib.import_module("verl_rs_grpo")
    yield registry["rs_grpo"]
    sys.modules.pop("verl_rs_grpo")


CONFIGS = [(None, 2.0), ({}, 2.0), ({"rs_beta": 4}, 4.0), ({"rs_beta": 0}, 0.0)]


@pytest.mark.parametrize("config, beta", CONFIGS)
def test_verl_gets_our_advantages_for_shuffled_groups_of_unequal_sizes(
    verl_estimator, config, beta
):
    groups = {"a": [1.0, 0, 0, 0], "b": [0.2, 0.9, 0.4], "c": [1.0], "d": [1.0, 1]}
    rows = []
    for name, rewards in groups.items():
        advantages = risk_sensitive_advantage(torch.tensor([rewards]), beta)[0].tolist()
        rows += zip([name] * len(rewards), rewards, advantages)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    rows = [rows[i] for i in order]
    lengths = torch.arange(len(rows)) % 3 + 2
    mask = (torch.arange(6) < lengths[:, None]).long()  # (B, T), int64 as verl's
    token_rewards = torch.zeros(mask.shape)
    for row, (_, reward, _) in enumerate(rows):  # half on the first token, half on the last
        token_rewards[row, 0] += reward / 2
        token_rewards[row, lengths[row] - 1] += reward / 2
    before = token_rewards.clone()

    given = {"token_level_rewards": token_rewards, "response_mask": mask, "config": config}
    advantages, returns = verl_estimator(index=[name for name, *_ in rows], **given)
    assert advantages.shape == mask.shape and advantages.dtype == torch.float32
    expected = torch.tensor([a for *_, a in rows])[:, None] * mask
    assert torch.allclose(advantages, expected, atol=1e-6)
    assert torch.equal(advantages, returns) and torch.equal(token_rewards, before)


def test_verls_group_ids_may_be_objects_numbers_or_a_tensor(verl_estimator):
    rewards, mask, numbers = torch.tensor([[0.0], [1], [1], [1]]), torch.ones(4, 1), [5, 0, 5, 0]
    expected = risk_sensitive_advantage(torch.tensor([[0.0, 1]]), 2.0)[0].tolist()
    for index in (np.array(list("xyxy"), dtype=object), np.array(numbers), torch.tensor(numbers)):
        advantages = verl_estimator(rewards, mask, index)[0][:, 0].tolist()
        assert advantages == pytest.approx([expected[0], 0, expected[1], 0], abs=1e-6)


# --- Variants -------------------------------------------------------------------------------------
def test_rescaled_advantages_have_one_mean_size_and_keep_their_proportions():
    advantages = grpo_advantage(torch.cat([group(1), group(8), group(16)]))
    scaled = compare.rescaled(advantages)
    assert scaled.abs().mean().item() == pytest.approx(0.1) and (scaled[2] == 0).all()
    assert torch.allclose(scaled / scaled[0, 0], advantages / advantages[0, 0])
    assert (compare.rescaled(torch.zeros(2, 4)) == 0).all()


def test_the_beta_of_constant_kl_weighs_each_group_by_ln_2_where_that_can_be_reached():
    """KL(softmax(βr) ‖ uniform) written out for c ones of 16; more than ln(16/c) no β reaches."""
    rewards = torch.cat([group(c) for c in (1, 4, 8, 15, 0, 16)])
    beta = compare.beta_of_constant_kl(rewards).squeeze(1).tolist()
    for b, c in zip(beta, (1, 4)):
        right, wrong = (math.exp(b * r) / (c * math.exp(b) + 16 - c) for r in (1, 0))
        kl = c * right * math.log(16 * right) + (16 - c) * wrong * math.log(16 * wrong)
        assert kl == pytest.approx(math.log(2))
    assert beta[2:] == pytest.approx([compare.MOST_BETA] * 4)


def test_beta_falls_from_8_to_0_with_accuracy_or_with_the_steps_that_the_metrics_hold(tmp_path):
    rewards = torch.cat([group(0), group(4), group(16)])
    assert compare.beta_of_accuracy(rewards).flatten().tolist() == [8, 6, 0]
    config = Config(out=str(tmp_path), steps=4)
    for done, beta in enumerate((8, 6, 4, 2)):
        (tmp_path / "metrics.jsonl").write_text("{}\n" * done)
        assert compare.annealed_beta(config) == beta


def test_partial_credit_is_1_for_the_target_and_less_the_farther_from_it():
    for text, value in {"9*7-12-4": 47, "4*12+9-7": 50, "4*(7+9)/12": 16 / 3}.items():
        credit = compare.partial_credit(text, ((4, 7, 9, 12), 48))
        assert credit == pytest.approx(0.5 / (1 + abs(value - 48)))
    assert compare.partial_credit("1+2+3+4", ((1, 2, 3, 4), 10)) == 1
    for text in "4*12", "4*12+9-7-7", "48", "9**7-12-4", "4/(12-9-7)-":  # no expressions over them
        assert compare.partial_credit(text, ((4, 7, 9, 12), 48)) == 0


# --- The report -----------------------------------------------------------------------------------
METHODS = {name: compare.Method(name, {}) for name in ("base", "rs2", "grpo")}
SETTINGS = {"steps": 800, "lr": 5e-5, "prompts": 2, "samples": 2, "eval_problems": 2}


def some_results(correct, n=4):
    """Results with these counts: for each run a list of problems for each seed."""
    runs = {}
    for name, seeds in correct.items():
        runs[name] = {str(i): {"correct": c, "seconds": 60} for i, c in enumerate(seeds)}
    return {"settings": {**SETTINGS, "eval_samples": n}, "machine": "a machine", "runs": runs}


def test_the_report_computes_pass_at_k_from_the_counts_of_every_problem():
    runs = report.Runs(some_results({"base": [[0, 1], [4, 2]]}), METHODS)
    for i, k in enumerate((1, 2, 4)):
        chances = []  # brute force: the share of k of 4 samples that hold a right one
        for c in (0, 1, 4, 2):
            subsets = list(itertools.combinations(range(4), k))
            chances.append(100 * sum(min(subset) < c for subset in subsets) / len(subsets))
        assert runs.pass_at_k["base"][..., i].flatten().tolist() == pytest.approx(chances)
    mean, error = report.mean_and_error(runs.pass_at_k["base"].mean(1)[:, 0])  # of 12.5 and 75
    assert (mean, error) == pytest.approx((43.75, 31.25))  # the error: half their distance


def test_the_interval_of_a_difference_resamples_problems_and_seeds():
    rng = random.Random(0)
    theirs = [[rng.randint(0, 2) for _ in range(400)] for _ in range(3)]
    gain = [rng.randint(0, 2) for _ in range(400)]

    def difference(ours):
        results = some_results({"base": theirs, "grpo": theirs, "rs2": ours})
        mean, (low, high) = report.Runs(results, METHODS).difference("rs2", "grpo")
        return mean[0], low[0], high[0]

    per_problem = torch.tensor(gain, dtype=torch.float64) * 25  # points of pass@1, in every seed
    spread = 1.96 * per_problem.std().item() / 400**0.5  # so only problems vary
    mean, low, high = difference([[a + g for a, g in zip(seed, gain)] for seed in theirs])
    assert mean == pytest.approx(per_problem.mean().item())
    assert (mean - low, high - mean) == pytest.approx((spread, spread), abs=0.15)
    # Seeds that gain 0, 25 and 50 points: one in 27 draws takes the same extreme seed thrice.
    unequal = [[a + s for a in seed] for s, seed in enumerate(theirs)]
    assert difference(unequal) == pytest.approx((25, 0, 50))
    results = some_results({"base": theirs, "grpo": theirs})
    seeds = results["runs"]["grpo"]
    results["runs"]["rs2"] = {"2": seeds["2"], "1": seeds["1"]}  # another order, and one missing
    mean, bounds = report.Runs(results, METHODS).difference("rs2", "grpo")
    assert (mean == 0).all() and (bounds == 0).all()  # seed by seed, not place by place


def test_learning_rates_are_read_from_the_names_of_the_runs_and_seeds_may_be_missing(tmp_path):
    counts = {"grpo@0.0001": [[1, 3]], "base": [[0, 1]], "rs2@5e-05": [[0, 2], [2, 4]]}
    counts |= {"grpo@5e-05": [[4, 4]], "rs2@2.5e-05": [[0, 0]]}
    text = report.report(some_results(counts), METHODS, tmp_path, "results-learning-rates")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == "|  | 2.5e-5 | 5e-5 | 1e-4 |"
    assert rows[2:5] == [  # means
        "| base | 12.5/50.0 | 12.5/50.0 | 12.5/50.0 |",
        "| rs2 | 0.0/0.0 | 50.0/75.0 |  |",
        "| grpo |  | 100.0/100.0 | 50.0/100.0 |",
    ]
    # Beside GRPO at the same rate, and the highest rate beside the plan's, where both are there.
    differences = [row[2:].split(" |")[0] for row in rows[7:]]
    assert differences == ["rs2 at 5e-5 − grpo at 5e-5", "grpo at 1e-4 − grpo at 5e-5"]
    assert " | -75.0 (-100.0 to -50.0) |" in rows[7]  # of the seed that they share: -100, -50
    assert "mean over 1 to 2 seeds" in text
    assert [file.name for file in tmp_path.iterdir()] == ["learning-rates.png"]


def test_without_a_file_the_report_says_how_it_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "HERE", tmp_path)
    results = some_results({"base": [[0, 1]], "rs2@5e-05": [[0, 2]]})
    compare.write_results(tmp_path / "results-learning-rates.json", results)
    compare.main(["--report", "--figures", str(tmp_path / "figures")])
    printed = capsys.readouterr().out
    assert "results.json isn't there; python experiments/compare.py makes it" in printed
    assert "pretrained.json isn't there" in printed and "| RS-GRPO, β = 2 | 25.0/50.0 |" in printed


FILES = ("", "-2000-steps", "-learning-rates", "-pretrained", "-pretrained-learning-rates")


@pytest.mark.parametrize("name", FILES)
def test_the_readmes_show_the_tables_that_the_results_give(tmp_path, name):
    results = compare.read_results(ROOT / "experiments" / f"results{name}.json")
    printed = report.report(results, compare.METHODS, tmp_path)
    text = (ROOT / "README.md").read_text() + (ROOT / "experiments/README.md").read_text()
    shown = {" ".join(line.split()) for line in text.splitlines()}
    rows = [" ".join(line.split()) for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) > 5 and set(rows) <= shown
    assert printed.splitlines()[-1].split(",")[0] in text  # the number of runs


def test_the_first_page_and_the_docstring_repeat_these_tables():
    def rows(text):
        lines = [line for line in text.splitlines() if line.startswith("|") and " ± " in line]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    tables = rows((ROOT / "experiments/README.md").read_text())
    first_page = rows((ROOT / "README.md").read_text())
    assert len(first_page) >= 4
    for label, *cells in first_page:
        assert any(label == row[0] and set(cells) <= set(row) for row in tables), label
    means = re.findall(r"(\d\d\.\d) +(\d\d\.\d) +(\d\d\.\d)$", rs_grpo.__doc__, re.M)
    assert len(means) == 3
    for numbers in means:
        assert any(set(numbers) <= {cell.split(" ")[0] for cell in row} for row in tables)


# --- The runs -------------------------------------------------------------------------------------
@pytest.fixture
def quick(tmp_path, monkeypatch):
    """A comparison of 2 steps, all of which is in `tmp_path`, in this process."""
    pool = lambda workers, *process: ThreadPoolExecutor(1)  # noqa: E731
    monkeypatch.setattr(compare, "ProcessPoolExecutor", pool)
    monkeypatch.chdir(tmp_path)
    flags = "--quick --results results.json --figures figures --runs runs --seeds 0".split()
    return lambda *more: compare.main([*flags, *more])


def runs_in(folder):
    return json.loads((folder / "results.json").read_text())["runs"]


def test_what_is_finished_is_kept_and_drawn_again_from_its_file(tmp_path, quick, capsys):
    quick("--only", "base,grpo,rs2")
    first = runs_in(tmp_path)
    assert "QUICK RUN, 2 steps: no evidence" in capsys.readouterr().out
    quick("--only", "base,grpo,maxrl,mean_partial,rs_annealed")
    printed, runs = capsys.readouterr().out, runs_in(tmp_path)
    assert set(runs) == {"base", "grpo", "rs2", "maxrl", "mean_partial", "rs_annealed"}
    assert all(runs[name] == first[name] for name in first)  # seconds too: none was made again
    entry = runs["rs2"]["0"]
    assert len(entry["correct"]) == 16 and entry["curve"]["step"] == [0, 1, 2]
    assert entry["made"].keys() == {"command", "machine", "commit", "torch", "transformers"}
    assert "Partial credit:" in printed and "RS-GRPO, β = 2 − GRPO" in printed
    drawn = {file: file.read_bytes() for file in (tmp_path / "figures").iterdir()}
    assert {file.stem for file in drawn} == {"passk", "beta", "methods", "diversity"}
    quick("--report")
    assert capsys.readouterr().out == printed
    assert all(file.read_bytes() == old for file, old in drawn.items())
    with pytest.raises(SystemExit, match="2"):
        quick("--steps", "3")
    assert "was made with steps 2, not 3" in capsys.readouterr().err


def test_learning_rates_join_one_file_one_after_another(tmp_path, quick):
    quick("--only", "grpo", "--lr", "1e-3")
    first = runs_in(tmp_path)
    quick("--only", "grpo", "--lr", "2.5e-5,0.001")
    runs = runs_in(tmp_path)
    assert set(runs) == {"base", "grpo@0.001", "grpo@2.5e-05"}
    assert all(runs[name] == first[name] for name in first)
    assert runs["grpo@0.001"]["0"]["curve"]["step"] == [0, 2]  # none on the way
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {"results.png"}


def test_a_run_of_the_comparison_equals_the_same_run_of_rs_grpo(tmp_path, capsys):
    plan = compare.Plan(**compare.QUICK | {"eval_samples": 64})
    entry = compare.run_one(plan, "grpo@0.001", 3, tmp_path / "theirs")
    settings = {"advantage": "grpo", "lr": 1e-3, "seed": 3, "steps": 2, "prompts": 4, "samples": 8}
    settings |= {"eval_problems": 16, "eval_samples": 64, "eval_rows": 1024}
    results = train(Config(out=str(tmp_path / "own"), **settings))
    for counts in "correct", "distinct":
        assert entry[counts] == results["2"][counts]
    metrics = map(json.loads, (tmp_path / "own" / "metrics.jsonl").open())
    assert entry["training"]["reward"] == [round(line["reward"], 4) for line in metrics]


def test_an_unfinished_run_goes_on_and_one_of_other_settings_is_refused(tmp_path, monkeypatch):
    plan = compare.Plan(**compare.QUICK)
    whole = compare.run_one(plan, "rs2", 0, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(compare, "training_curves", lambda metrics, window: 1 / 0)
        compare.run_one(plan, "rs2", 0, tmp_path / "broken")
    with pytest.raises(BadInput, match="other settings"):
        compare.run_one(plan._replace(curve_every=2), "rs2", 0, tmp_path / "broken")
    monkeypatch.setitem(ADVANTAGES, "rs", lambda rewards, config: 1 / 0)  # no step is made again
    entry = compare.run_one(plan, "rs2", 0, tmp_path / "broken")
    assert {**entry, "seconds": 0} == {**whole, "seconds": 0}


def test_a_comparison_goes_on_past_a_run_that_fails_and_names_it(tmp_path, quick, capsys):
    broken = tmp_path / "runs" / "results" / "grpo-seed0"
    broken.mkdir(parents=True)
    (broken / "checkpoint.pt").write_text("no checkpoint")
    (broken / "config.json").write_text("{")
    with pytest.raises(SystemExit, match="2"):
        quick("--only", "grpo")
    assert "not finished: grpo with seed 0 (JSONDecodeError" in capsys.readouterr().err
    assert set(runs_in(tmp_path)) == {"base"}  # which is always made


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--only grpo,ppo", "--only ppo: must be some of base, grpo, mean"),
        ("--seeds 0,x", "argument --seeds: invalid"),
        ("--lr 1e-4,0", "argument --lr: invalid"),
        ("--curve-samples 16", "--curve-samples and --eval-samples at least 32"),
        ("--eval-samples 16", "--curve-samples and --eval-samples at least 32"),
        ("--model runs/none --gguf none.gguf", "none.gguf can't be converted"),
        ("--report", "results.json can't be read"),
        ("--testbed pretrained", "give --gguf FILE to make it"),
    ],
)
def test_a_wrong_option_gets_one_sentence(tmp_path, quick, capsys, flags, said):
    with pytest.raises(SystemExit, match="2"):
        quick(*flags.split())
    assert said in capsys.readouterr().err and not (tmp_path / "results.json").exists()


@pytest.mark.skipif(os.name != "posix", reason="signals differ")
def test_ctrl_c_ends_a_comparison_and_its_workers_and_the_next_one_goes_on(tmp_path):
    where = f"--results {tmp_path}/results.json --figures {tmp_path} --runs {tmp_path}/runs"
    flags = f"--quick --only grpo --seeds 0 --workers 1 {where}".split()
    command = [sys.executable, "experiments/compare.py", *flags]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    while process.poll() is None and not (tmp_path / "results.json").exists():
        time.sleep(0.01)  # then the base is finished, GRPO not
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130 and "goes on from here" in process.stderr.read()
    with pytest.raises(ProcessLookupError):  # nobody of its group is left
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(runs_in(tmp_path)) == {"base", "grpo"}


@pytest.fixture(scope="session")
def reader(tmp_path_factory):
    """A folder with a random Llama and a tokenizer that knows a word problem's characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    characters = sorted({*TASKS["countdown-text"](Config()).examples, *"0123456789+-/"})
    vocabulary = {text: i for i, text in enumerate(["<eos>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 4, "vocab_size": len(tokenizer), "eos_token_id": 0}
    folder = str(tmp_path_factory.mktemp("reader"))
    LlamaForCausalLM(LlamaConfig(**size, bos_token_id=None)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_answers_that_differ_in_the_blanks_around_them_are_one(monkeypatch):
    texts = [" 1 + 2", " 1 + 2\n", "1 + 2 \n\n", "2 + 1", "3", "3\n"]
    rollouts = SimpleNamespace(rewards=torch.tensor([[1.0, 1, 1, 1, 0, 0]]), texts=texts)
    monkeypatch.setattr(rs_grpo, "roll_out", lambda *arguments: rollouts)
    policy, task = SimpleNamespace(model=torch.ones(1)), SimpleNamespace(held_out=[None])
    result = rs_grpo.evaluate(policy, task, rs_grpo.Config(eval_samples=6))
    assert result["correct"] == [4] and result["distinct"] == [2]


def test_the_pretrained_testbed_trains_on_problems_in_words(tmp_path, reader, quick, capsys):
    quick("--testbed", "pretrained", "--model", reader, "--only", "grpo", "--eval-samples", "64")
    printed, entry = capsys.readouterr().out, runs_in(tmp_path)["grpo"]["0"]
    assert "on countdown-text: 16 held-out problems" in printed and "| GRPO | 0.0 |" in printed
    assert (entry["n"], len(entry["correct"])) == (64, 16)  # and 32 on the way
    assert entry["curve"]["pass@32"] == [0, 0, 0] and len(entry["training"]["signal"]) == 2
    assert (tmp_path / "figures" / "results.png").exists()
