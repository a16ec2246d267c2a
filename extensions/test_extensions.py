"""The specification of extensions/, as sentences: `python -m pytest extensions -v` prints it."""
# ruff: noqa: F401, F811, I001 (pytest's fixtures are imported by name)

import copy
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
import time
import types
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import rs_grpo
from extensions import estimators, kl, mathematics, problems, verifier
from extensions.mathematics import MathConfig
from extensions.verifier import math_reward
from rs_grpo import ADVANTAGES, BadInput, risk_sensitive_advantage, train
from test_rs_grpo import draw, gradient, group, load, metrics, models, pairs, plain_logprobs
from test_rs_grpo import policy, python, save_model, seeded, settings_of, tiny

ROOT = Path(rs_grpo.__file__).resolve().parent
parametrize = pytest.mark.parametrize


def first_groups(rewards, config):
    """An estimator for a random model, which solves nothing: a signal for k groups all the same."""
    first = torch.arange(len(rewards)) < config.k
    return torch.linspace(-1, 1, rewards.shape[1]) * first[:, None]


ADVANTAGES["first"] = first_groups


def complaint(capsys, *flags):
    """Run mathematics.py, expect exit status 2 and one sentence; returns it."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^2$"):
        mathematics.main([str(flag) for flag in flags])
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1, printed
    return printed


# --- Estimators -----------------------------------------------------------------------------------
WORKED = {  # by hand, correct/wrong, for 1, 4, 8 and 15 correct ones of 16, at k = 4
    "chen": "1.732/-.115 .611/-.204 .200/-.200 0/0",
    "mahdavi": "3.090/-.206 1.266/-.422 .250/-.250 .0001/-.0009",
    "pkpo": ".250/.050 .250/.159 .250/.231 .250/.250",
    "pkpo_loo": ".250/0 .121/0 .031/0 0/0",
    "maxrl": "15/-1 3/-1 1/-1 .067/-1",
}


def estimate(name, rewards, k=4):
    return ADVANTAGES[name](rewards, estimators.Config(k=k))


@parametrize("name", WORKED)
def test_an_estimator_has_the_values_worked_out_by_hand(name):
    for correct, cell in zip((1, 4, 8, 15), WORKED[name].split()):
        advantages = estimate(name, group(correct))[0, [0, -1]]
        expected = [float(number) for number in cell.split("/")]
        tolerance = 6e-5 if abs(expected[0]) < 0.001 else 6e-4
        assert advantages.tolist() == pytest.approx(expected, abs=tolerance)


@parametrize("name", ["pkpo", "pkpo_loo"])
def test_pkpo_equals_the_sum_over_all_subsets(name):
    rewards = torch.rand(3, 7, dtype=torch.float64, generator=seeded(1))
    rewards[1, 2] = rewards[1, 5]  # a tie
    rewards[2] = (rewards[2] < 0.5).double()
    for k in range(2, 8):
        brute = torch.zeros(3, 7, dtype=torch.float64)
        for subset in itertools.combinations(range(7), k):
            best = rewards[:, subset].amax(1)
            for i in subset:
                others = [j for j in subset if j != i]
                without = rewards[:, others].amax(1) if name == "pkpo_loo" else 0
                brute[:, i] += (best - without) / math.comb(7, k)
        assert torch.allclose(estimate(name, rewards, k), brute)


@parametrize("k", [1, 2, 3, 4])
def test_chen_equals_the_standardised_best_of_every_subset(k):
    """A subset earns 1 if a sample of it succeeds; a sample's advantage is over its subsets."""
    for correct in range(8):
        rewards = group(correct, 7)
        subsets = list(itertools.combinations(range(7), k))
        best = [rewards[0, list(subset)].max().item() for subset in subsets]
        spread = np.std(best) + 1e-6
        for i, advantage in enumerate(estimate("chen", rewards, k)[0].tolist()):
            mine = [value for value, subset in zip(best, subsets) if i in subset]
            brute = (np.mean(mine) - np.mean(best)) / spread
            assert advantage == pytest.approx(brute, abs=1e-9)


def test_a_group_in_which_no_sample_can_make_a_difference_has_an_advantage_of_exactly_zero():
    """Chen et al.: any 4 of 16 hold a success; leave-one-out: any 3 do. Rounding would be run."""
    for correct, order in itertools.product(range(17), range(5)):
        shuffle = torch.randperm(16, generator=seeded(order))
        rewards = group(correct)[:, shuffle]
        assert estimate("chen", rewards).any() == (1 <= correct <= 12)
        assert estimate("pkpo_loo", rewards).any() == (1 <= correct <= 13)
        assert estimate("maxrl", rewards).any() == (1 <= correct <= 15)
    assert not estimate("pkpo_loo", torch.full((3, 7), 0.37)).any()


def test_mahdavi_is_the_gradient_of_pass_at_k():
    """With p = Σ_i π_i r_i, ∇(1 − (1−p)^k) by automatic differentiation over a uniform policy."""
    theta = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    p = (theta.softmax(0) * group(3, 8)[0]).sum()
    (1 - (1 - p) ** 4).backward()
    advantages = estimate("mahdavi", group(3, 8))[0]
    assert torch.allclose((advantages - advantages.mean()) / 8, theta.grad)


@parametrize("name", ["chen", "mahdavi", "maxrl"])
def test_an_estimator_of_successes_refuses_other_rewards(name):
    with pytest.raises(ValueError, match="other than 0 and 1"):
        estimate(name, torch.full((1, 8), 0.5))


# --- The KL penalty -------------------------------------------------------------------------------
@parametrize("beta", [-4.0, 0.5, 2.0, 8.0])
def test_the_penalised_advantage_has_the_gradient_of_the_objective_less_the_divergence(beta):
    """A group that holds each outcome as often as its probability says makes the group's mean an
    exact expectation."""
    counts = torch.tensor([1, 80, 19, 40, 60])  # of 200
    rewards = torch.tensor([1.0, 0.6, 0.0, 0.3, -0.5], dtype=torch.float64)
    base = torch.tensor([0.3, 0.1, 0.2, 0.15, 0.25], dtype=torch.float64)
    theta = (counts / 200).double().log().requires_grad_()
    pi = theta.softmax(0)
    objective = (pi * (beta * rewards).exp()).sum().log() / beta
    divergence = (pi * (pi / base).log()).sum()
    (objective - 0.3 * divergence).backward()

    outcomes = torch.repeat_interleave(torch.arange(5), counts)
    advantages = risk_sensitive_advantage(rewards[outcomes][None], beta)
    ratios = (pi.detach() / base).log()[outcomes][None]
    penalised = kl.penalised_advantage(advantages, ratios, 0.3)[0]  # (200,)
    grad_log_pi = torch.eye(5, dtype=torch.float64)[outcomes] - counts / 200  # (200, 5)
    assert torch.allclose((penalised[:, None] * grad_log_pi).mean(0), theta.grad, atol=1e-8)


def test_log_ratios_are_those_of_plain_forward_passes_at_the_sampling_temperature(policy):
    rollouts = draw(policy, samples=32, max_tokens=2, temperature=0.7)
    assert len(set(pairs(rollouts))) < 96  # equal ones are computed once
    config = rs_grpo.Config(temperature=0.7, micro_tokens=100)
    base = policy._replace(model=copy.deepcopy(policy.model))
    assert not kl.log_ratios(policy, base, rollouts, config).any()  # exactly
    shake(policy)
    ratios = kl.log_ratios(policy, base, rollouts, config).flatten().tolist()
    for row, ratio in zip(pairs(rollouts), ratios):
        ours = plain_logprobs(policy, *row, 0.7).sum()
        theirs = plain_logprobs(base, *row, 0.7).sum()
        assert ratio == pytest.approx((ours - theirs).item(), abs=1e-4)


def test_a_resumed_run_is_kept_near_the_model_that_it_started_from(tiny, tmp_path):
    def run(folder, steps, resume=False):
        config = kl.Config(**asdict(settings_of(tiny, tmp_path / folder, steps=steps)), kl=0.5)
        train(config, resume, kl.with_penalty(rs_grpo.collect))

    run("whole", steps=6)
    run("broken", steps=4)
    run("broken", steps=6, resume=True)
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")


# --- The verifier ---------------------------------------------------------------------------------
EQUIVALENT = r"""\frac{1}{2} ~ \frac12 | \frac{1}{2} ~ 0.5 | 0.5 ~ \dfrac{1}{2} | \frac{3}{4} ~ 3/4
\frac{\sqrt{3}}{3} ~ \frac{1}{\sqrt{3}} | 3\sqrt{2} ~ \sqrt{18} | \frac{\pi}{2} ~ \pi/2
(1,2] ~ \left( 1, 2 \right] | (-\infty,2)\cup(3,\infty) ~ (3,\infty)\cup(-\infty,2)
\{1,2\} ~ \{2,1\} | 1,2 ~ 2, 1 | (3,4) ~ (3,\,4) | x^2-1 ~ (x-1)(x+1) | 5 ~ x=5 | 5 ~ 5\text{ cm}
90 ~ 90^\circ | 10 ~ 10\% | 50\% ~ 0.5 | 50% ~ 50 | 50% ~ 0.5 | x<2 ~ (-\infty,2) | 18 ~ \$18.00
1234 ~ 1{,}234 | \text{Evelyn} ~ Evelyn | 6 ~ \boxed{6}
\begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix} 1 \\ 2 \end{pmatrix}"""  # answer ~ box
DIFFERENT = r"""\frac{1}{2} ~ \frac13 | \frac{1}{3} ~ 0.33 | \sqrt{2} ~ 1.41 | (1,2] ~ [1,2]
\{1,2\} ~ \{1,2,3\} | (3,4) ~ (4,3) | x^2-1 ~ x^2+1 | 5 ~ \pm 5 | 5 ~ 5, 6 | 5 ~ 5 \text{ or } 6
50% ~ 5 | even ~ \text{odd} | \begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}2\\1\end{pmatrix}"""
BOXES = r"""2 ~ \boxed{1} or \boxed{2} | \frac{1}{2} ~ \boxed{\frac{1}{2}} and 3 more words}
\left\{ x \right. ~ \boxed{\left\{ x \right.} | 7 ~ \boxed{\boxed{ 7 }} |  ~ \boxed{} |  ~ \boxed{7
 ~ \boxed{1} then \boxed{\frac{1}{2} |  ~ \boxed{7\}"""  # what is read ~ text
RIGHT = r"""1234 | The answer is 1,234. | The answer is $1,234.00. | #### 1234 | **1234** | 1234%
1 + 1233 = 1234 apples | 1,234, | \boxed{1234}, which is 2 less | \boxed{1,234.00}"""
WRONG = r"""It is 1234, not 1 | -1234 | 1234.5 | 12345 | 1,2345 | 1,234,5 | \boxed{7} 1234
\boxed{} 1234 | 1234 \boxed{123 | no number | """
M = 10**6
REPEATED = r"\boxed{ | \frac{1}{ | { | } | \} | \ | 1 | 1  | 111, | 1. | -$ | ٣ | ½ | % | ."
# What takes math-verify minutes, or gigabytes; and what may make it stumble.
BOMBS = ["9^{9^{9^9}}", "10^{10^8}", "(10^9)!", r"\sum_{n=1}^{10^9} n^n", "(x+y+z)^{1000}"]
MALFORMED = r"""10^{10^{10}} | 0/0 | \frac{1}{0} | \frac{ | \frac{1} | 1e1000000 | 18² | １８ | ١٨
\begin{pmatrix} | \begin{pmatrix}1&2\\3\end{pmatrix} | \ | $ | % | __import__('os').abort() | ∞"""
LONG = ["(" * 100 + "1" + ")" * 100, r"\sqrt{" * 19 + "2" + "}" * 19]
LONG += ["+" * 300, "1,2" * 100, r"\text{" + "a " * 100 + "}"]
LONG += ["\n1\n", "\0", "\ud800"]
FAKE = """LatexExtractionConfig = object
def parse(text, *a, **k):
    print(1)
    if 'deep' in text: raise RecursionError
    return text
def verify(answer, box, **k):
    print(1)
    return answer == box
"""


def items(text):
    return text.replace("\n", " | ").split(" | ")


def answers_and(text):
    return [tuple(pair.split(" ~ ")) for pair in items(text)]


def boxed(text):
    return rf"So the answer is \boxed{{{text}}}."


def judged(text, answer, seconds):
    """The reward of a text, which must be there within this time."""
    started = time.perf_counter()
    reward = math_reward(text, answer)
    assert time.perf_counter() - started < seconds, text[:50]
    return reward


@pytest.fixture
def verifiers(monkeypatch):
    """Every verifier process that the test starts. None is left from another test, or after it."""
    pytest.importorskip("math_verify")
    started = []
    start = verifier.start_verifier
    monkeypatch.setattr(verifier, "start_verifier", lambda: started.append(start()) or started[-1])
    monkeypatch.setattr(verifier, "idle_verifiers", [])
    monkeypatch.setattr(verifier, "killed", [])
    verifier.equivalent.cache_clear()
    yield started
    for process in started:
        process.communicate(timeout=10)


def test_a_box_earns_its_reward_in_every_equivalent_form_and_in_no_other(verifiers):
    for expected, text in ((1, EQUIVALENT), (0, DIFFERENT)):
        for answer, box in answers_and(text):
            assert math_reward(boxed(box), answer) == expected, (answer, box)
    assert verifier.killed == [] and len(verifiers) == 1  # the same process judged them all


def test_the_last_box_is_read_with_its_braces_matched_and_not_if_unclosed_long_or_deep():
    for read, text in answers_and(BOXES):
        assert verifier.last_box(text) == read, text
    nested = "{" * 19 + "1" + "}" * 19
    for longest in (nested, "1" * 300):
        assert verifier.last_box(boxed(longest)) == longest
    for over in ("{" + nested + "}", "1" * 301):
        assert verifier.last_box(boxed(over)) == ""
    assert verifier.last_box("boxed{7}") is verifier.last_box("") is None


@parametrize("answer", ["1234", "1,234", "$1234", "1234.0", " 1234. "])
def test_without_a_box_the_last_number_counts_if_the_answer_is_a_number(monkeypatch, answer):
    monkeypatch.setattr(verifier, "equivalent", None)  # no question for math-verify
    for expected, texts in ((1, RIGHT), (0, WRONG)):
        for text in items(texts):
            assert math_reward(text, answer) == expected, text
    assert math_reward("so 1234", r"\frac{1234}{1}") == 0


def test_plain_numbers_are_exact_and_look_alikes_are_none():
    assert verifier.plain_number("-$1,234.50") == -1234.5
    assert verifier.plain_number(".5") == verifier.plain_number("50%") / 100
    assert math_reward("0.1", "0.1000000000000000055511151231257827") == 0  # equal as floats
    assert math_reward(f"1{'0' * 50}1", f"1{'0' * 51}") == 0
    for text in ["1,23", "5 5", "1e5", "--5", "1.2.3", *"٣５²½x-$%", ""]:
        assert verifier.plain_number(text) is None
    assert not any(math_reward(f"it is {look_alike}", "5") for look_alike in "٥５𝟓")


@parametrize("answer", ["18", r"\frac{1}{2}", "1" * M], ids=["number", "fraction", "long"])
def test_a_megabyte_of_anything_earns_nothing_at_once_and_reaches_no_verifier(monkeypatch, answer):
    monkeypatch.setattr(verifier, "equivalent", None)
    for unit, start, end in itertools.product(items(REPEATED), ("", r"\boxed{"), ("", "}")):
        assert judged(start + unit * (M // len(unit)) + end, answer, seconds=0.2) == 0, unit


def test_malformed_and_look_alike_boxes_earn_nothing_in_bounded_time(verifiers, monkeypatch):
    monkeypatch.setattr(verifier, "VERIFY_SECONDS", 1.0)
    for box in [*items(MALFORMED), *LONG]:
        assert judged(rf"\boxed{{{box}}}", "18", seconds=1 + 3) == 0, box


def test_a_comparison_that_overruns_is_killed_and_said_once(verifiers, monkeypatch, capsys):
    monkeypatch.setattr(verifier, "VERIFY_SECONDS", 0.5)
    for bomb in [*BOMBS, BOMBS[0]]:  # the last is remembered
        assert judged(boxed(bomb), "18", seconds=0.5 + 3) == 0, bomb
    assert verifier.killed == [(bomb, "18") for bomb in BOMBS]
    said = capsys.readouterr().out.splitlines()
    assert [line.count("counts as wrong") for line in said] == [1] * 5
    assert all(process.returncode not in (None, 0) for process in verifiers)  # no zombie


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_verifier_has_bounded_memory_and_ctrl_c_does_not_reach_it(verifiers):
    process = verifier.start_verifier()
    limits = Path(f"/proc/{process.pid}/limits").read_text().splitlines()
    (memory,) = [line.split()[3] for line in limits if "address space" in line]
    assert int(memory) == verifier.VERIFY_BYTES
    assert os.getpgid(process.pid) != os.getpgid(0)


def test_answers_are_judged_in_batches_and_in_any_thread_alike(verifiers):
    answers, boxes = zip(*answers_and(EQUIVALENT))
    with ThreadPoolExecutor(1) as pool:
        rewards = pool.submit(verifier.math_rewards, map(boxed, boxes), answers).result()
    assert rewards == [1.0] * len(boxes)
    assert len(verifier.idle_verifiers) == len(verifiers) <= verifier.VERIFIERS


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@parametrize("line", ["", "v.VERIFY_SECONDS = 1; v.equivalent('9^{9^{9^9}}', '18')"])
def test_a_verifier_idle_or_busy_ends_when_its_run_is_killed(line):
    pytest.importorskip("math_verify")
    code = "from extensions import verifier as v; p = v.start_verifier()\n"
    code += f"v.idle_verifiers.append(p); print(p.pid, flush=True)\n{line}\ninput()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    status = Path(f"/proc/{run.stdout.readline().strip()}/status")
    time.sleep(0.5)
    run.kill()
    run.communicate()
    deadline = time.monotonic() + 1 + 3
    while status.exists() and "zombie" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert time.monotonic() < deadline


def test_what_math_verify_prints_or_raises_is_no_verdict(verifiers, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "math_verify.py").write_text(FAKE)
    assert math_reward(boxed("x"), "x") == 1
    assert math_reward(boxed("y"), "x") == math_reward(boxed("deep"), "x") == 0
    assert len(verifiers) == 1
    (tmp_path / "math_verify.py").write_text("raise ImportError")
    with pytest.raises(BadInput, match="pip install math-verify"):
        verifier.start_verifier()


# --- Problems -------------------------------------------------------------------------------------
PAIRS = [("What is 1+1?", "2"), ("Halve 1.\n\nAs one.", r"\frac{1}{2}"), ("Six by seven?", "42")]
DAPO = "Solve the following math problem step by step. The last line of your response should be of "
DAPO += (
    "the form Answer: $Answer (without quotes).\n\n%s\n\nRemember to put your answer on its own."
)
ONE = b'{"problem": "1?", "answer": "1"}\n'
FILES = b"""problem,answer | {"problem": "1?"} | {"text": "1?", "label": "1"} | 5 | null | \
"problem" | ["problem", "answer"] | {"problem": "1?", "answ"""
MALFORMED_FILES = [None, b"", b"[" * 200_000, *FILES.split(b" | ")]
MALFORMED_FILES += [ONE.replace(b"?", b"\xff"), ONE.replace(b"?", b"\\ud800")]
SUMS = [{"problem": f"How much is {i} and 1?", "answer": i + 1} for i in range(300)]
REFUSED = """: --task is missing
--task chess: chess can't be read
--task math500: a .jsonl file with problem and answer
--task countdown --eval-task gsm8k: --eval-task
--task gsm8k: read the prompts
--task gsm8k --updates 5 --prompts 4: --updates
--task gsm8k --updates 0: --updates
--task gsm8k --advantage chen --k 17: --k
--task gsm8k --advantage pkpo_loo --k 1: --k
--task gsm8k --clip-low nan: --clip-low
--task gsm8k --dynamic-sampling -1: --dynamic-sampling
--task gsm8k --eval-task math12k: too small"""


def row(name, problem, answer):
    """A problem and its answer in the columns of a named set."""
    if name == "dapo17k":
        prompt = {"role": "user", "content": DAPO % problem}
        return {"prompt": [prompt], "reward_model": {"ground_truth": answer}}
    if name == "deepmath103k":
        return {"question": problem, "final_answer": answer, "r1_solution_1": "#### 7"}
    if name == "gsm8k":
        return {"question": problem, "answer": f"It is <<3-1=2>>2.\n#### {answer}"}
    return {"id": 60, "problem": problem, "solution": "...", "answer": answer}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the datasets library: the rows of each set, by what it is asked for."""
    sets = {}
    for name, (hub_id, configuration, *splits) in problems.HUB.items():
        for split in splits:
            rows = [row(name, *pair) for pair in PAIRS]
            sets[hub_id, configuration, split] = rows * 9  # DAPO's are repeated
    fake = SimpleNamespace(load_dataset=lambda path, name, *, split: sets[path, name, split])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(verifier, "start_verifier", lambda: None)  # no model here writes a box
    monkeypatch.setattr(verifier, "idle_verifiers", [])
    return sets


@parametrize("name", problems.HUB)
def test_each_named_set_is_read_from_its_columns_each_problem_once(hub, name):
    assert problems.load_problems(name, evaluating=False) == PAIRS
    assert problems.load_problems(name, evaluating=True) == PAIRS


def test_a_line_is_what_ends_in_a_newline_whatever_characters_a_problem_holds(tmp_path):
    texts = ["1\u2028 2\x85 3\x0c", "é", "  4 "]
    lines = [json.dumps({"problem": text, "answer": 1}, ensure_ascii=False) for text in texts]
    (tmp_path / "own.jsonl").write_bytes(("\r\n\n".join(lines) + "\n\n").encode())
    loaded = problems.load_problems(str(tmp_path / "own.jsonl"), evaluating=False)
    assert loaded == [(text.strip(), "1") for text in texts]


@parametrize("content", MALFORMED_FILES)
def test_a_malformed_file_gets_one_sentence_and_exit_status_2(hub, tmp_path, capsys, content):
    file = tmp_path / "own.jsonl"
    if content is not None:
        file.write_bytes(content)
    good = write_rows(tmp_path / "good.jsonl", SUMS)
    assert "own.jsonl" in complaint(capsys, "--out", tmp_path / "run", "--task", file)
    assert "own.jsonl" in complaint(capsys, "--task", good, "--eval-task", file)
    assert not (tmp_path / "run").exists()


def test_a_file_of_other_columns_is_told_which_it_has_and_which_are_understood(tmp_path):
    file = write_rows(tmp_path / "own.jsonl", [{"text": "1?", "label": "1"}])
    with pytest.raises(BadInput, match="text, label; .* problem and answer, question and final"):
        problems.load_problems(file, evaluating=False)


# --- The task of mathematics ----------------------------------------------------------------------
def load_task(**settings):
    return mathematics.load_task(MathConfig(**settings))


def test_a_tenth_is_held_out_by_a_hash_and_no_order_or_size_moves_a_problem(hub, tmp_path):
    file = write_rows(tmp_path / "own.jsonl", SUMS + SUMS[:50])
    task = load_task(task=file, eval_problems=1000)
    expected = [(row["problem"], str(row["answer"])) for row in SUMS]
    assert sorted(task.train + task.held_out) == sorted(expected)
    assert 10 < len(task.held_out) < 60
    half = load_task(task=write_rows(tmp_path / "half.jsonl", SUMS[149::-1]), seed=1)
    assert set(half.train) < set(task.train)
    assert set(half.held_out) < set(task.held_out)


def test_what_an_eval_task_asks_is_not_trained_on(hub, tmp_path):
    file = write_rows(tmp_path / "own.jsonl", SUMS)
    asked = [{"question": f"{row['problem']} ", "answer": "#### 7"} for row in SUMS[:100]]
    other = write_rows(tmp_path / "other.jsonl", asked)
    task = load_task(task=file, eval_task=f" {other} ,", eval_problems=5, train_problems=7)
    assert task.held_out == [(row["problem"], "7") for row in SUMS[:5]]
    assert [problem for problem, _ in task.train] == [row["problem"] for row in SUMS[100:107]]


@parametrize("line", REFUSED.split("\n"))
def test_a_setting_that_cannot_work_gets_one_sentence(hub, capsys, line):
    rows = [row("gsm8k", f"{i}?", "1") for i in range(30)]
    hub["openai/gsm8k", "main", "train"] = hub["hiyouga/math12k", None, "test"] = rows
    del hub["HuggingFaceH4/MATH-500", None, "test"]
    given, said = line.split(": ")
    assert said in complaint(capsys, *given.split())


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


TEMPLATE = "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[model]"
ASKED = [
    (None, "", "<s>{}"),
    (TEMPLATE, "", "<s>{}"),
    (None, "Box it.", "<s>{}\nBox it.\n\n"),
    (TEMPLATE, "Box it.", "<s>[user]{}\nBox it.[model]"),
    (TEMPLATE.removeprefix("<s>"), "Box it.", "[user]{}\nBox it.[model]"),  # it means no BOS
]


@parametrize("template, instruction, asked", ASKED)
def test_a_prompt_has_the_chat_template_and_one_bos(talker, template, instruction, asked):
    talker.chat_template = template
    questions = ["1+1?", "What is the half of é?"]
    prompts = mathematics.encode(talker, questions, instruction)
    for ids, question in zip(prompts, questions, strict=True):
        assert talker.decode(ids) == asked.format(question)
        assert ids.count(0) == asked.count("<s>")


def test_several_sets_have_a_table_each_of_their_own_problems(hub, capsys):
    config = MathConfig(task="dapo17k", eval_task="gsm8k,aime24", eval_problems=2)
    base = {"n": 4, "correct": [1, 3, 0, 2], "pass_at_k": {"1": 37.5, "4": 75.0}}
    trained = {**base, "correct": [4, 4, 0, 1]}
    mathematics.show_sets(config, {"0": base, "2": {}, "10": trained})
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == ["pass@1 50.0 100.0 gsm8k", "pass@4 100.0 100.0 gsm8k"]
    assert lines[2:] == ["pass@1 25.0 12.5 aime24", "pass@4 50.0 50.0 aime24"]


# --- The paper's recipe ---------------------------------------------------------------------------
RECIPE = {"updates": 2, "dynamic_sampling": 2, "checkpointing": True}
DRAWS = "1 10 4, 3 10 2, 4 10 1, 0 2 3, 1 1 2, 0 0 1"  # with a signal, --dynamic-sampling, draws
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}


def recipe_of(model, folder, **changes):
    """The settings of a run of some seconds on Countdown, without the recipe unless it is given."""
    small = asdict(settings_of(model, folder))
    return MathConfig(**{**small, "advantage": "first", "steps": 4, **changes})


def shake(policy):
    for parameter in policy.model.parameters():
        noise = torch.randn(parameter.shape, generator=seeded(1, device="cpu"))
        parameter.data += 0.05 * parameter.data.std() * noise.to(parameter.device)


def test_without_the_recipe_every_step_is_that_of_rs_grpo(tiny, tmp_path):
    config = recipe_of(tiny, tmp_path / "run")
    expected = train(replace(config, out=str(tmp_path / "plain")))
    assert train(config, False, mathematics.collect, mathematics.update) == expected
    assert metrics(tmp_path / "run") == metrics(tmp_path / "plain")


@parametrize("moment", ["report 1", "clipped_policy_gradient 6", "save_checkpoint 4"])
def test_a_run_of_the_recipe_resumes_to_the_same(talker, hub, tmp_path, monkeypatch, moment):
    """Broken off before the first checkpoint after a step, between updates, and before the next."""
    settings = {"task": write_rows(tmp_path / "own.jsonl", SUMS), "k": 1, **RECIPE}
    model = save_model(tmp_path / "model", talker)
    recipe = (mathematics.collect, mathematics.update)
    train(recipe_of(model, tmp_path / "whole", **settings), False, *recipe)
    name, count = moment.split()
    module = mathematics if name in vars(mathematics) else rs_grpo
    calls = itertools.count(1)
    original = getattr(module, name)

    def breaking(*args):
        if next(calls) == int(count):
            raise RuntimeError("killed")
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(module, name, breaking)
        train(recipe_of(model, tmp_path / "run", **settings), False, *recipe)
    monkeypatch.delitem(rs_grpo.TASKS, settings["task"])  # as in a new process
    mathematics.main(["--resume", "--out", str(tmp_path / "run")])
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    whole = (tmp_path / "whole" / "eval.json").read_text()
    assert (tmp_path / "run" / "eval.json").read_text() == whole
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["state"]
    assert (state["step"], state["drawn"]) == (4, 12)


def sixth_step(module, policy, config, generator, step=5):
    """What `collect` returns, and the state afterwards."""
    task = rs_grpo.TASKS[config.task](config)
    state = SimpleNamespace(step=step, solved=torch.zeros(len(task.train), dtype=torch.bool))
    return *module.collect(policy, task, config, state, generator), state


@parametrize("numbers", DRAWS.split(", "))
def test_dynamic_sampling_draws_until_enough_groups_have_a_signal(policy, numbers):
    with_signal, bound, draws = map(int, numbers.split())
    config = recipe_of("", "", k=with_signal, dynamic_sampling=bound)
    rollouts, advantages, state = sixth_step(mathematics, policy, config, seeded())
    assert (state.step, state.drawn) == (5, 5 + draws)
    assert len(set(rollouts.questions)) == len(advantages) == 4 * draws
    assert advantages.any(1).float().mean().item() == with_signal / 4


def test_draws_of_one_step_are_joined_as_if_drawn_in_several_steps_without_learning(policy):
    config = recipe_of("", "", advantage="rs", dynamic_sampling=1)
    generator = seeded()
    ours, advantages, _ = sixth_step(mathematics, policy, config, generator)
    generator.manual_seed(0)
    first, a, _ = sixth_step(rs_grpo, policy, config, generator)
    second, b, _ = sixth_step(rs_grpo, policy, config, generator, step=6)
    for name in ("questions", "prompts", "completions", "texts"):
        assert getattr(ours, name) == getattr(first, name) + getattr(second, name)
    assert torch.equal(ours.rewards, torch.cat([first.rewards, second.rewards]))
    assert torch.equal(advantages, torch.cat([a, b]))
    nats = first.entropy * first.tokens + second.entropy * second.tokens
    assert ours.entropy == pytest.approx(nats / ours.tokens) and first.tokens != second.tokens


class Noting:
    """An optimizer that notes each gradient and its policy, and shakes the weights for a step."""

    def __init__(self, policy):
        self.policy = policy
        self.param_groups = [{}]
        self.seen = []

    def step(self):
        before = self.policy._replace(model=copy.deepcopy(self.policy.model))
        self.seen.append((before, gradient(self.policy)))
        shake(self.policy)

    def zero_grad(self):
        self.policy.model.zero_grad()


@parametrize("checkpointing", [False, True])
def test_every_update_has_the_gradient_of_a_hand_written_ppo_loss(policy, checkpointing):
    """π_old is the policy before the first update; whole groups are in one part each."""
    rollouts = draw(policy, samples=16, max_tokens=7, temperature=0.8)
    rows = pairs(rollouts)
    assert len(set(rows)) == 48  # none are equal, so none are run as one
    advantages = torch.randn(3, 16, generator=seeded(device="cpu"))
    advantages[1] = 0  # a group without a signal
    settings = {"updates": 2, "clip_low": 0.1, "clip_high": 0.3, "checkpointing": checkpointing}
    config = MathConfig(task="countdown", micro_tokens=150, temperature=0.8, **settings)
    with torch.no_grad():
        old = [plain_logprobs(policy, *row, 0.8) for row in rows]
    optimizer = Noting(policy)
    norm = mathematics.update(policy, optimizer, rollouts, advantages, config, 3)

    norms = []
    places = set()
    for part, (now, ours) in zip((range(32), range(32, 48)), optimizer.seen, strict=True):
        loss = 0
        for i in part:
            a = advantages.flatten()[i].item()
            ratio = (plain_logprobs(now, *rows[i], 0.8) - old[i]).exp()
            loss -= torch.min(ratio * a, ratio.clamp(0.9, 1.3) * a).sum()
            where = torch.bucketize(ratio.cpu(), torch.tensor([0.9, 1.3])).tolist()
            places |= {(place, a > 0) for place in where}
        (loss / sum(len(rollouts.completions[i]) for i in part)).backward()
        reference = gradient(now)
        norms.append(reference.norm().item())
        reference *= min(1, 1 / norms[-1])  # clipped
        assert (ours - reference).norm() < 1e-4 * reference.norm()
    assert norm == pytest.approx(sum(norms) / 2, rel=1e-4)
    assert len(places) == 6  # below, above and between the bounds, for both signs


@parametrize("kind, sizes", [("llama", {}), ("qwen2", {}), ("qwen3", {}), ("gpt2", GPT2)])
def test_a_checkpointed_model_learns_the_same_and_is_as_before(policy, tmp_path, kind, sizes):
    """Rotary positions are relative and forgive a shift; GPT-2's are looked up in a table."""
    policy, _, _ = load(save_model(tmp_path, policy.tokenizer, kind, **sizes))
    rollouts = draw(policy, samples=4, max_tokens=9, temperature=0.7)
    calls = []
    results = []
    layer = (policy.model.base_model.h if sizes else policy.model.base_model.layers)[0]
    attention = layer.attn if sizes else layer.self_attn
    attention.register_forward_hook(lambda *_: calls.append(1))
    for function in (mathematics.checkpointed_logprobs, rs_grpo.completion_logprobs):
        logprobs = function(policy, rollouts.prompts, rollouts.completions, 0.7)
        weights = torch.linspace(-1, 1, len(logprobs), device=logprobs.device)
        (logprobs.sum(1) * weights).sum().backward()
        results.append((gradient(policy), logprobs.detach()))
    assert len(calls) == 2 + 2  # once more in the backward pass; then prompts and completions
    (ours, whole), (reference, shared) = results
    assert torch.allclose(whole, shared, atol=1e-5)
    assert (ours - reference).norm() < 1e-5 * reference.norm()


def test_the_script_runs_as_a_module_and_its_help_names_its_flags():
    done = python("-m", "extensions.mathematics", "--help")
    assert done.returncode == 0 and "--k K" in done.stdout and "--updates" in done.stdout


# --- The same advantage inside TRL and verl -------------------------------------------------------
SIZES = {"max_steps": 1, "num_generations": 4, "per_device_train_batch_size": 8}
SIZES |= {"gradient_accumulation_steps": 2}  # so that TRL shuffles 16 rows and splits them in two
SIZES |= {"num_generations_eval": 3, "per_device_eval_batch_size": 6}
SIZES |= {"max_completion_length": 12, "temperature": 3.0}  # completions of a prompt differ
SCALED = [{"scale_rewards": value} for value in ("group", "batch", True)]
SCALED += [{"multi_objective_aggregation": "normalize_then_sum"}]


@pytest.fixture
def trl_rs_grpo():
    pytest.importorskip("trl")
    return importlib.import_module("extensions.trl_rs_grpo")


def trl_config(folder, **settings):
    """TRL's settings for a tiny run on the CPU."""
    from trl import GRPOConfig

    plain = {"scale_rewards": "none", "bf16": False, "use_cpu": True, "save_strategy": "no"}
    plain |= {"output_dir": str(folder), "report_to": [], "disable_tqdm": True}
    return GRPOConfig(**plain | settings)


def test_trls_loss_sees_our_advantages_in_training_and_in_evaluation(trl_rs_grpo, tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    judged = {True: [], False: []}  # by whether it is training
    seen = {True: [], False: []}
    tokenizer = AutoTokenizer.from_pretrained(rs_grpo.EMBEDDED)

    def reward(completion_ids, **rest):  # scaling or reordering would show
        values = [sum(i * token for i, token in enumerate(ids)) % 17 / 8 for ids in completion_ids]
        judged[trainer.model.training] += zip(map(tuple, completion_ids), values)
        return values

    class Watched(trl_rs_grpo.RSGRPOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            masks = inputs["completion_mask"].bool()
            for row, mask, a in zip(inputs["completion_ids"], masks, inputs["advantages"]):
                seen[model.training].append((tuple(row[mask].tolist()), a.item()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    task = rs_grpo.TASKS["countdown"](rs_grpo.Config())
    rows = [{"prompt": question} for question, _ in task.train[:6]]
    trainer = Watched(
        model=AutoModelForCausalLM.from_pretrained(rs_grpo.EMBEDDED),
        reward_funcs=reward,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows[:4]),
        eval_dataset=Dataset.from_list(rows[4:]),
        args=trl_config(tmp_path, **SIZES),
        beta_risk=2.0,
    )
    trainer.train()
    trainer.evaluate()
    for training, samples, count in ((True, 4, 16), (False, 3, 6)):
        completions, values = zip(*judged[training])
        expected = risk_sensitive_advantage(torch.tensor(values).view(-1, samples), 2.0)
        expected = dict(zip(completions, expected.flatten().tolist()))
        assert len(seen[training]) == len(expected) == count  # all completions differ
        assert len(set(expected.values())) > 3  # a signal
        for completion, advantage in seen[training]:
            assert advantage == pytest.approx(expected[completion], abs=1e-5)


@parametrize("training", [True, False])
def test_a_group_that_lies_across_two_trl_processes_is_one(trl_rs_grpo, monkeypatch, training):
    trainer_class = trl_rs_grpo.RSGRPOTrainer
    rewards = torch.rand(3, 4, generator=seeded())  # six on each process
    shifted = (rewards - rewards.mean(1, keepdim=True)).flatten()
    expected = risk_sensitive_advantage(rewards, 3.0).flatten().tolist()

    def part(process):
        trainer = trainer_class.__new__(trainer_class)  # one process, without a model
        trainer.beta_risk = 3.0
        trainer._scored = torch.ones(12, dtype=torch.bool)
        trainer.num_generations, trainer.num_generations_eval = (4, 2) if training else (2, 4)
        trainer.model = SimpleNamespace(training=training)
        trainer.accelerator = SimpleNamespace(process_index=process, gather=lambda mine: shifted)
        trainer._logs = {"advantages": deque([7.0] + shifted.tolist(), maxlen=13)}
        mine = {"advantages": shifted[6 * process : 6 * process + 6]}
        name = "_generate_and_score_completions"
        monkeypatch.setattr(trainer_class.__base__, name, lambda self, inputs: mine)
        output = trainer._generate_and_score_completions([])
        assert list(trainer._logs["advantages"]) == pytest.approx([7.0] + expected, abs=1e-6)
        return output["advantages"].tolist()

    assert part(0) + part(1) == pytest.approx(expected, abs=1e-6)


def test_a_completion_that_nobody_judged_gets_zero_and_leaves_trls_group(trl_rs_grpo, monkeypatch):
    trainer_class, nan = trl_rs_grpo.RSGRPOTrainer, torch.nan
    by_function = torch.tensor([[1, nan], [nan, 0], [0, 0], [nan, nan]])
    monkeypatch.setattr(trainer_class.__base__, "_calculate_rewards", lambda *args: by_function)
    trainer = trainer_class.__new__(trainer_class)
    assert trainer._calculate_rewards([], [], [], []) is by_function
    shifted = torch.tensor([2 / 3, -1 / 3, -1 / 3, 0])  # TRL's: by the mean of those judged
    advantages = trl_rs_grpo.regrouped_advantage(shifted, trainer._scored, 4, 2.0)
    expected = risk_sensitive_advantage(torch.eye(3)[:1], 2.0)[0]
    assert torch.allclose(advantages[:3], expected, atol=1e-6) and advantages[3] == 0
    nobody = torch.zeros(4, dtype=torch.bool)
    assert not trl_rs_grpo.regrouped_advantage(shifted, nobody, 4, 2.0).any()


@parametrize("settings", SCALED)
def test_trls_other_scalings_are_refused_in_a_sentence(trl_rs_grpo, tmp_path, settings):
    message = f"^{next(iter(settings))} is '.*', but must be '.*': RS-GRPO needs unscaled rewards$"
    with pytest.raises(ValueError, match=message):
        trl_rs_grpo.RSGRPOTrainer("no-such-model", [], trl_config(tmp_path, **settings))


def test_the_trl_script_trains_on_problems_and_answers(trl_rs_grpo, monkeypatch, tmp_path):
    trainer = Mock()
    monkeypatch.setattr(trl_rs_grpo, "RSGRPOTrainer", trainer)
    file = write_rows(tmp_path / "train.jsonl", [{"problem": "What is 1 + 1?", "answer": "2"}])
    flags = f"--model m --output_dir {tmp_path} --use_cpu true --bf16 false --data {file}"
    trl_rs_grpo.main([*flags.split(), "--beta_risk", "4", "--num_generations", "8"])
    (model, reward, config), settings = trainer.call_args
    assert (model, settings["beta_risk"]) == ("m", 4)
    assert (config.scale_rewards, config.num_generations, config.beta) == ("none", 8, 0)
    (row,) = settings["train_dataset"]
    assert row["prompt"][0]["content"].startswith("What is 1 + 1?\n") and row["answer"] == "2"
    texts = [[{"role": "assistant", "content": f"so \\boxed{{{i}}}"}] for i in (2, 3)]
    assert reward(completions=texts, answer=["2", "2"], extra=1) == [1, 0]


@pytest.fixture
def verl_estimator(monkeypatch):
    """What verl_rs_grpo.py registers, imported in verl's way, in place of an installed verl."""
    registry = {}
    names = ("verl", "verl.trainer", "verl.trainer.ppo", "verl.trainer.ppo.core_algos")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    register = lambda name: lambda function: registry.setdefault(name, function)  # noqa: E731
    sys.modules[names[-1]].register_adv_est = register
    importlib.import_module("extensions.verl_rs_grpo")
    yield registry["rs_grpo"]
    del sys.modules["extensions.verl_rs_grpo"]


@parametrize("config, beta", [(None, 2), ({}, 2), ({"rs_beta": 4}, 4)])
def test_verl_gets_our_advantages_for_groups_of_unequal_sizes(verl_estimator, config, beta):
    index = np.array(list("abacabba"), dtype=object)
    rewards = torch.rand(8, generator=seeded())
    expected = torch.zeros(8)
    for name in "abc":
        mine = index == name
        expected[mine] = risk_sensitive_advantage(rewards[mine][None], beta)[0]
    lengths = torch.arange(8) % 3 + 2
    mask = (torch.arange(6) < lengths[:, None]).long()  # (B, T), int64 as verl's
    token_rewards = torch.zeros(8, 6)
    token_rewards[:, 0] = rewards / 2
    token_rewards[range(8), lengths - 1] += rewards / 2
    advantages, returns = verl_estimator(token_rewards, mask, index, config=config, extra=1)
    assert advantages.shape == mask.shape and advantages.dtype == torch.float32
    assert torch.allclose(advantages, expected[:, None] * mask, atol=1e-6)
    assert torch.equal(advantages, returns)
