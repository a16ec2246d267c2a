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
from collections import deque
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

import rs_grpo
from extensions import estimators, kl, mathematics, problems, verifier
from extensions.mathematics import MathConfig, load_task
from extensions.verifier import math_reward
from rs_grpo import ADVANTAGES, TASKS, BadInput, risk_sensitive_advantage, train
from test_rs_grpo import ROOT, assert_same, draw, gradient, group, metrics, models, pairs
from test_rs_grpo import parametrize, plain_logprobs, policy, saved, seeded, settings_of, spy, tiny
from test_rs_grpo import tokenizer_of_letters

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def first_groups(rewards, config):
    """An estimator for a random model, which solves nothing: a signal for k groups all the same."""
    first = torch.arange(len(rewards)) < config.k
    return torch.linspace(-1, 1, rewards.shape[1]) * first[:, None]


ADVANTAGES["first"] = first_groups


@pytest.fixture(autouse=True)
def tasks_of_a_new_process():
    """Whatever a test adds to TASKS is gone after it."""
    before = dict(TASKS)
    yield
    TASKS.clear()
    TASKS.update(before)


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
    rewards = torch.rand(3, 7, dtype=torch.float64, generator=seeded())
    rewards[1, 2] = rewards[1, 5]  # a tie
    rewards[2] = rewards[2].round()
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
        for i, advantage in enumerate(estimate("chen", rewards, k)[0].tolist()):
            mine = [value for value, subset in zip(best, subsets) if i in subset]
            brute = (np.mean(mine) - np.mean(best)) / (np.std(best) + 1e-6)
            assert advantage == pytest.approx(brute, abs=1e-9)


def test_a_group_in_which_no_sample_can_make_a_difference_has_an_advantage_of_exactly_zero():
    """Chen et al.: any 4 of 16 hold a success; leave-one-out: any 3 do. Rounding would be run."""
    for correct in range(17):
        rewards = group(correct)[:, torch.randperm(16, generator=seeded())]
        assert estimate("chen", rewards).any() == (1 <= correct <= 12)
        assert estimate("pkpo_loo", rewards).any() == (1 <= correct <= 13)
        assert estimate("maxrl", rewards).any() == (1 <= correct <= 15)
    assert not estimate("pkpo_loo", torch.full((3, 7), 0.37)).any()


# --- The KL penalty -------------------------------------------------------------------------------
@parametrize("beta", [-4.0, 0.5, 2.0, 8.0])
def test_the_penalised_advantage_has_the_gradient_of_the_objective_less_the_divergence(beta):
    """A group holds each outcome as often as its probability says, so its mean is exact."""
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


def test_without_a_weight_no_base_is_loaded(monkeypatch):
    monkeypatch.setattr(rs_grpo, "load_policy", None)
    collect = kl.with_penalty(lambda *arguments: arguments)
    assert collect(1, 2, kl.Config(kl=0.0), 4, 5) == (1, 2, kl.Config(kl=0.0), 4, 5)


def test_a_resumed_run_is_kept_near_the_model_that_it_started_from(tiny, tmp_path):
    def run(folder, steps, resume=False):
        config = kl.Config(**asdict(settings_of(tiny, tmp_path / folder, steps=steps)), kl=0.5)
        train(config, resume, kl.with_penalty(rs_grpo.collect))

    run("whole", steps=6)
    run("broken", steps=4)
    run("broken", steps=6, resume=True)
    assert_same(tmp_path / "broken", tmp_path / "whole", results=False)


# --- The verifier ---------------------------------------------------------------------------------
EQUIVALENT = r"""\frac{1}{2} ~ \frac12 | 0.5 ~ \dfrac{1}{2} | \frac{\pi}{2} ~ \pi/2
\frac{\sqrt{3}}{3} ~ \frac{1}{\sqrt{3}} | 3\sqrt{2} ~ \sqrt{18} | (1,2] ~ \left( 1, 2 \right]
\{1,2\} ~ \{2,1\} | 1,2 ~ 2, 1 | (3,4) ~ (3,\,4) | x^2-1 ~ (x-1)(x+1) | 5 ~ x=5 | 5 ~ 5\text{ cm}
90 ~ 90^\circ | 10 ~ 10\% | 50\% ~ 0.5 | 50% ~ 50 | 50% ~ 0.5 | x<2 ~ (-\infty,2) | 18 ~ \$18.00
1234 ~ 1{,}234 | \frac{1}{2} ~ 0.5 | \frac{3}{4} ~ 3/4 | \text{Evelyn} ~ Evelyn | 6 ~ \boxed{6}
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
\boxed{} 1234 | 1234 \boxed{123 | no number | １２３４ | ١٢٣٤ | """
M = 10**6
REPEATED = r"\boxed{ | \frac{1}{ | { | } | \} | \ | 1 | 1  | 111, | 1. | -$ | ٣ | ½ | % | ."
# What takes math-verify minutes, or gigabytes; and what may make it stumble.
BOMBS = ["9^{9^{9^9}}", "10^{10^8}", "(10^9)!", r"\sum_{n=1}^{10^9} n^n", "(x+y+z)^{1000}"]
MALFORMED = r"""10^{10^{10}} | 0/0 | \frac{1}{0} | \frac{ | \frac{1} | 1e1000000 | 18² | １８ | ١٨
\begin{pmatrix} | \begin{pmatrix}1&2\\3\end{pmatrix} | \ | $ | % | __import__('os').abort() | ∞"""
LONG = ["(" * 100 + "1" + ")" * 100, r"\sqrt{" * 19 + "2" + "}" * 19]
LONG += ["+" * 300, "1,2" * 100, r"\text{" + "a " * 100 + "}", "\n1\n", "\0", "\ud800"]
FAKE = r"""LatexExtractionConfig = object
def parse(text, *a, **k):
    print(1)
    return text.removeprefix(r'\boxed{deep}') or 1 / 0
def verify(answer, box, **k):
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
        answers, boxes = zip(*answers_and(text))
        rewards = verifier.math_rewards(map(boxed, boxes), answers)
        assert [pair for *pair, reward in zip(answers, boxes, rewards) if reward != expected] == []
    assert len(verifier.idle_verifiers) == len(verifiers) <= verifier.VERIFIERS  # none is killed


def test_the_last_box_is_read_with_its_braces_matched_and_not_if_unclosed_long_or_deep():
    for read, text in answers_and(BOXES):
        assert verifier.last_box(text) == read, text
    nested = "{" * 19 + "1" + "}" * 19
    texts = [nested, "1" * 300, "{" + nested + "}", "1" * 301]
    assert [verifier.last_box(boxed(text)) for text in texts] == [*texts[:2], "", ""]
    assert verifier.last_box("boxed{7}") is verifier.last_box("") is None


@parametrize("answer", ["1234", "1,234", "$1234", "1234.0", " 1234. "])
def test_without_a_box_the_last_number_counts_if_the_answer_is_a_number(monkeypatch, answer):
    monkeypatch.setattr(verifier, "equivalent", None)  # no question for math-verify
    for expected, texts in ((1, RIGHT), (0, WRONG)):
        for text in items(texts):
            assert math_reward(text, answer) == expected, text
    assert math_reward("so 1234", r"\frac{1234}{1}") == 0
    assert math_reward("0.1", "0.1000000000000000055511151231257827") == 0  # equal as floats


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


@on_linux
def test_a_verifier_has_bounded_memory_and_ctrl_c_does_not_reach_it(verifiers):
    process = verifier.start_verifier()
    limits = Path(f"/proc/{process.pid}/limits").read_text().split()
    assert f"address space {verifier.VERIFY_BYTES} " in " ".join(limits)
    assert os.getpgid(process.pid) != os.getpgid(0)


@on_linux
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
DAPO = "Solve the following math problem step by step. Say it.\n\n%s\n\nRemember to say it."
FILES = b"""problem,answer | {"problem": "1?"} | ["problem", "answer"] | {"problem": "1?", "answ"""
MALFORMED_FILES = [None, b"", b"[" * 200_000, *FILES.split(b" | ")]
MALFORMED_FILES += [b'{"problem": "%s", "answer": "1"}' % odd for odd in (b"\xff", b"\\ud800")]
SUMS = [{"problem": f"How much is {i} and 1?", "answer": i + 1} for i in range(300)]
REFUSED = """: --task is missing
--task chess: chess can't be read
--task math500: a .jsonl file with problem and answer
--task countdown --eval-task gsm8k: --eval-task
--task gsm8k --instruction Why: read the prompts
--task gsm8k --updates 5 --prompts 4: --updates
--task gsm8k --advantage chen --k 17: --k
--task gsm8k --advantage pkpo_loo --k 1: --k
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
def test_a_tenth_is_held_out_by_a_hash_and_no_order_or_size_moves_a_problem(hub, tmp_path):
    file = write_rows(tmp_path / "own.jsonl", SUMS + SUMS[:50])
    task = load_task(MathConfig(task=file, eval_problems=1000))
    expected = [(row["problem"], str(row["answer"])) for row in SUMS]
    assert sorted(task.train + task.held_out) == sorted(expected)
    assert 10 < len(task.held_out) < 60
    half = load_task(MathConfig(task=write_rows(tmp_path / "half.jsonl", SUMS[149::-1]), seed=1))
    assert set(half.train) < set(task.train)
    assert set(half.held_out) < set(task.held_out)


def test_what_an_eval_task_asks_is_not_trained_on(hub, tmp_path):
    file = write_rows(tmp_path / "own.jsonl", SUMS)
    asked = [{"question": f"{row['problem']} ", "answer": "#### 7"} for row in SUMS[:100]]
    other = write_rows(tmp_path / "other.jsonl", asked)
    sizes = {"eval_problems": 5, "train_problems": 7}
    task = load_task(MathConfig(task=file, eval_task=f" {other} ,", **sizes))
    assert task.held_out == [(row["problem"], "7") for row in SUMS[:5]]
    assert [problem for problem, _ in task.train] == [row["problem"] for row in SUMS[100:107]]


@parametrize("line", REFUSED.split("\n"))
def test_a_setting_that_cannot_work_gets_one_sentence(hub, capsys, line):
    rows = [row("gsm8k", f"{i}?", "1") for i in range(30)]
    hub["openai/gsm8k", "main", "train"] = hub["hiyouga/math12k", None, "test"] = rows
    del hub["HuggingFaceH4/MATH-500", None, "test"]
    given, said = line.split(": ")
    assert said in complaint(capsys, *given.split())


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}={% endfor %}Answer:"
ASKED = [
    ("<s>" + TEMPLATE, "", "<s>{}"),
    (None, "Answer.", "<s>{}\nAnswer.\n\n"),
    ("<s>" + TEMPLATE, "Answer.", "<s>user: {}\nAnswer.=Answer:"),
    (TEMPLATE, "Answer.", "user: {}\nAnswer.=Answer:"),  # it means no BOS
]


@parametrize("template, instruction, asked", ASKED)
def test_a_prompt_has_the_chat_template_and_one_bos(template, instruction, asked):
    """Of a tokenizer that adds a BOS by itself, as Llama's does."""
    tokenizer = tokenizer_of_letters()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    begun = TemplateProcessing("<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begun
    tokenizer.chat_template = template
    questions = ["1+1=", "Target: 7."]
    prompts = mathematics.encode(tokenizer, questions, instruction)
    assert tokenizer.batch_decode(prompts) == [asked.format(question) for question in questions]


# --- The paper's recipe ---------------------------------------------------------------------------
RECIPE = {"updates": 2, "dynamic_sampling": 2, "checkpointing": True}
DRAWS = "1 10 4, 3 10 2, 4 10 1, 0 2 3, 1 1 2, 0 0 1"  # with a signal, --dynamic-sampling, draws


def recipe_of(model, folder, **changes):
    """The settings of a run of some seconds on Countdown, without the recipe unless it is given."""
    small = settings_of(model, folder, advantage="first", steps=4)
    return MathConfig(**asdict(small) | changes)


def shake(policy):
    for parameter in policy.model.parameters():
        noise = torch.randn(parameter.shape, generator=seeded())
        parameter.data += 0.05 * parameter.data.std() * noise.to(parameter.device)


def test_without_the_recipe_every_step_is_that_of_rs_grpo(tiny, tmp_path):
    config = recipe_of(tiny, tmp_path / "run")
    expected = train(replace(config, out=str(tmp_path / "plain")))
    assert train(config, False, mathematics.collect, mathematics.update) == expected
    assert metrics(tmp_path / "run") == metrics(tmp_path / "plain")


@parametrize("moment", ["report 1", "clipped_policy_gradient 6", "save_checkpoint 4"])
def test_a_run_of_the_recipe_resumes_to_the_same(models, hub, tmp_path, monkeypatch, spy, moment):
    """Broken off before the first checkpoint after a step, between updates, and before the next."""
    settings = {"task": write_rows(tmp_path / "own.jsonl", SUMS), "k": 1, **RECIPE}
    recipe = (mathematics.collect, mathematics.update)
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(recipe_of(models["wordy"], whole, **settings), False, *recipe)
    spy(moment, RuntimeError("killed"), mathematics if "clipped" in moment else rs_grpo)
    with pytest.raises(RuntimeError, match="killed"):
        train(recipe_of(models["wordy"], run, **settings), False, *recipe)
    monkeypatch.delitem(TASKS, settings["task"])  # as in a new process
    mathematics.main(["--resume", "--out", str(run)])
    assert_same(run, whole)
    assert saved(run)["state"]["drawn"] == 12


@parametrize("numbers", DRAWS.split(", "))
def test_dynamic_sampling_joins_draws_until_enough_groups_have_a_signal(policy, numbers):
    """As if they were drawn in several steps without learning."""
    with_signal, bound, draws = map(int, numbers.split())
    config = recipe_of("", "", k=with_signal, dynamic_sampling=bound)
    task = TASKS["countdown"](config)
    state = SimpleNamespace(step=5)
    device = policy.model.device
    ours, advantages = mathematics.collect(policy, task, config, state, seeded(device=device))
    assert (state.step, state.drawn) == (5, 5 + draws)
    assert len(set(ours.questions)) == 4 * draws
    collect = partial(rs_grpo.collect, policy, task, config, generator=seeded(device=device))
    steps = [collect(SimpleNamespace(step=step)) for step in range(5, 5 + draws)]
    parts, theirs = zip(*steps)
    *lists, rewards, _ = zip(*parts)
    assert list(ours[:4]) == [sum(each, []) for each in lists]
    assert torch.equal(ours.rewards, torch.cat(rewards))
    assert torch.equal(advantages, torch.cat(theirs))
    nats = sum(part.entropy * part.tokens for part in parts)
    assert ours.entropy == pytest.approx(nats / ours.tokens)


@parametrize("checkpointing", [False, True])
def test_every_update_has_the_gradient_of_a_hand_written_ppo_loss(policy, checkpointing):
    """π_old is the policy before the first update; whole groups are in one part each."""
    rollouts = draw(policy, samples=16, max_tokens=7, temperature=0.8)
    rows = pairs(rollouts)
    assert len(set(rows)) == 48  # none are equal, so none are run as one
    advantages = torch.randn(3, 16, generator=seeded())
    advantages[1] = 0  # a group without a signal
    settings = {"updates": 2, "clip_low": 0.1, "clip_high": 0.3, "checkpointing": checkpointing}
    config = MathConfig(task="countdown", micro_tokens=150, temperature=0.8, **settings)
    with torch.no_grad():
        old = [plain_logprobs(policy, *row, 0.8) for row in rows]
    seen = []

    def step():
        before = policy._replace(model=copy.deepcopy(policy.model))
        seen.append((before, gradient(policy)))
        shake(policy)

    optimizer = SimpleNamespace(param_groups=[{}], step=step, zero_grad=policy.model.zero_grad)
    norm = mathematics.update(policy, optimizer, rollouts, advantages, config, 3)

    norms, places = [], set()
    for part, (now, ours) in zip((range(32), range(32, 48)), seen, strict=True):
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


@parametrize("policy", ["tiny", "absolute"], indirect=True)
def test_a_checkpointed_model_learns_the_same_and_is_as_before(policy):
    rollouts = draw(policy, samples=4, max_tokens=9, temperature=0.7)
    calls, results = [], []
    layers = policy.model.base_model.named_modules()
    attention = next(module for name, module in layers if name.endswith("attn"))
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


# --- The same advantage inside TRL and verl -------------------------------------------------------
SCALED = [("scale_rewards", "group"), ("multi_objective_aggregation", "normalize_then_sum")]


@pytest.fixture
def trl_rs_grpo():
    pytest.importorskip("trl")
    return importlib.import_module("extensions.trl_rs_grpo")


def trl_config(folder, **settings):
    """TRL's settings for a tiny run on the CPU."""
    from trl import GRPOConfig

    plain = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": []}
    plain |= {"scale_rewards": "none", "max_steps": 1, "save_strategy": "no"}
    plain |= {"num_generations": 4, "num_generations_eval": 3}
    plain |= {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 6}
    plain |= {"gradient_accumulation_steps": 2}  # TRL shuffles 16 rows and splits them in two
    plain |= {"max_completion_length": 12, "temperature": 3.0}  # completions of a prompt differ
    return GRPOConfig(**plain | settings)


def test_trls_loss_sees_our_advantages_in_training_and_in_evaluation(trl_rs_grpo, tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    expected, seen = {}, {}  # by completion

    def reward(completion_ids, **rest):  # scaling or reordering would show
        rewards = [sum(i * token for i, token in enumerate(ids)) % 17 / 8 for ids in completion_ids]
        groups = torch.tensor(rewards).view(-1, 4 if trainer.model.training else 3)
        advantages = risk_sensitive_advantage(groups, 2.0).flatten().tolist()
        expected.update(zip(map(tuple, completion_ids), advantages))
        return rewards

    class Watched(trl_rs_grpo.RSGRPOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            masks = inputs["completion_mask"].bool()
            for row, mask, a in zip(inputs["completion_ids"], masks, inputs["advantages"]):
                seen[tuple(row[mask].tolist())] = a.item()
            return super().compute_loss(model, inputs, *args, **kwargs)

    task = TASKS["countdown"](rs_grpo.Config())
    rows = [{"prompt": question} for question, _ in task.train[:6]]
    trainer = Watched(
        model=AutoModelForCausalLM.from_pretrained(rs_grpo.EMBEDDED),
        reward_funcs=reward,
        processing_class=AutoTokenizer.from_pretrained(rs_grpo.EMBEDDED),
        train_dataset=Dataset.from_list(rows[:4]),
        eval_dataset=Dataset.from_list(rows[4:]),
        args=trl_config(tmp_path),
        beta_risk=2.0,
    )
    trainer.train()
    trainer.evaluate()
    assert len(seen) == 16 + 6  # all completions differ
    assert seen == pytest.approx(expected, abs=1e-5)
    assert len(set(expected.values())) > 6  # a signal


def test_a_group_that_lies_across_two_trl_processes_is_one(trl_rs_grpo, monkeypatch):
    trainer_class = trl_rs_grpo.RSGRPOTrainer
    rewards = torch.rand(3, 4, generator=seeded())  # six on each process
    shifted = (rewards - rewards.mean(1, keepdim=True)).flatten()
    expected = risk_sensitive_advantage(rewards, 3.0).flatten().tolist()
    trainer = trainer_class.__new__(trainer_class)  # without a model
    trainer.model = SimpleNamespace(training=True)
    trainer.beta_risk, trainer.num_generations = 3.0, 4
    trainer._scored = torch.ones(12, dtype=torch.bool)
    name = "_generate_and_score_completions"
    found = []
    for process, mine in enumerate(shifted.split(6)):
        trainer.accelerator = SimpleNamespace(process_index=process, gather=lambda _: shifted)
        trainer._logs = {"advantages": deque([7.0] + shifted.tolist(), maxlen=13)}
        monkeypatch.setattr(trainer_class.__base__, name, lambda *args: {"advantages": mine})
        found += trainer._generate_and_score_completions([])["advantages"].tolist()
        assert list(trainer._logs["advantages"]) == pytest.approx([7.0] + expected, abs=1e-6)
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_completion_that_nobody_judged_gets_zero_and_leaves_trls_group(trl_rs_grpo, monkeypatch):
    trainer_class, nan = trl_rs_grpo.RSGRPOTrainer, torch.nan
    by_function = torch.tensor([[1, nan], [nan, 0], [0, 0], *[[nan, nan]] * 5])
    monkeypatch.setattr(trainer_class.__base__, "_calculate_rewards", lambda *args: by_function)
    trainer = trainer_class.__new__(trainer_class)
    assert trainer._calculate_rewards([], [], [], []) is by_function
    shifted = torch.tensor([2 / 3, -1 / 3, -1 / 3, 0, 0, 0, 0, 0])  # TRL's: of those judged
    advantages = trl_rs_grpo.regrouped_advantage(shifted, trainer._scored, 4, 2.0)
    expected = risk_sensitive_advantage(torch.eye(3)[:1], 2.0)[0]
    assert torch.allclose(advantages[:3], expected, atol=1e-6) and not advantages[3:].any()


@parametrize("name, value", SCALED)
def test_trls_other_scalings_are_refused_in_a_sentence(trl_rs_grpo, tmp_path, name, value):
    with pytest.raises(ValueError, match=f"^{name} is '{value}', but must be '.*': RS-GRPO needs"):
        trl_rs_grpo.RSGRPOTrainer("no-such-model", [], trl_config(tmp_path, **{name: value}))


@parametrize("config, beta", [(None, 2), ({}, 2), ({"rs_beta": 4}, 4)])
def test_verl_gets_our_advantages_for_groups_of_unequal_sizes(monkeypatch, config, beta):
    """From what verl_rs_grpo.py registers, in place of an installed verl."""
    registry = {}
    verl = SimpleNamespace(register_adv_est=lambda name: partial(registry.setdefault, name))
    monkeypatch.setitem(sys.modules, "verl.trainer.ppo.core_algos", verl)
    monkeypatch.delitem(sys.modules, "extensions.verl_rs_grpo", raising=False)
    importlib.import_module("extensions.verl_rs_grpo")
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
    advantages, returns = registry["rs_grpo"](token_rewards, mask, index, config=config, extra=1)
    assert advantages.shape == mask.shape and advantages.dtype == torch.float32
    assert torch.allclose(advantages, expected[:, None] * mask, atol=1e-6)
    assert torch.equal(advantages, returns)
