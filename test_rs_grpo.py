"""The specification of rs_grpo.py and bandit.py, as sentences: `pytest -v` prints it. Some two minutes on two CPU cores."""

from __future__ import annotations

import ast
import itertools
import json
import math
import operator
import os
import random
import signal
import subprocess
import sys
import time
from decimal import Decimal, getcontext
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import rs_grpo
from rs_grpo import (
    ADVANTAGES,
    BadInput,
    Config,
    Rollouts,
    batch_indices,
    chen_advantage,
    completion_logprobs,
    countdown_problem,
    countdown_problems,
    countdown_reward,
    decode,
    encode,
    grpo_advantage,
    is_held_out,
    load_policy,
    mahdavi_advantage,
    main,
    maxrl_advantage,
    mean_baseline_advantage,
    pass_at_k,
    pkpo_advantage,
    policy_gradient,
    random_expression,
    read_metrics,
    risk_sensitive_advantage,
    sample,
    train,
)

ROOT = Path(__file__).resolve().parent


def group(correct: int, samples: int = 16) -> torch.Tensor:
    """Binary rewards (1, N) of which the first `correct` are 1."""
    return (torch.arange(samples) < correct).double()[None]


# --- advantages ---------------------------------------------------------------------------------------------------

# Advantage of a correct and of a wrong sample, N = 16, k = 4, for 1, 4, 8 and 15 correct ones. Worked out by hand.
WORKED = {
    "mean": (mean_baseline_advantage, ".938/-.063 .750/-.250 .500/-.500 .063/-.938"),
    "grpo": (grpo_advantage, "3.873/-.258 1.732/-.577 1/-1 .258/-3.873"),
    "rs 2": (lambda r: risk_sensitive_advantage(r, 2), "2.140/-.143 .922/-.307 .381/-.381 .029/-.429"),
    "rs 4": (lambda r: risk_sensitive_advantage(r, 4), "2.888/-.193 .698/-.233 .241/-.241 .016/-.245"),
    "rs 8": (lambda r: risk_sensitive_advantage(r, 8), "1.865/-.124 .374/-.125 .125/-.125 .008/-.125"),
    "chen": (lambda r: chen_advantage(r, 4), "1.732/-.115 .611/-.204 .200/-.200 0/0"),
    "mahdavi": (lambda r: mahdavi_advantage(r, 4), "3.090/-.206 1.266/-.422 .250/-.250 .0001/-.0009"),
    "pkpo": (lambda r: pkpo_advantage(r, 4), ".250/.050 .250/.159 .250/.231 .250/.250"),
    "pkpo_loo": (lambda r: pkpo_advantage(r, 4, True), ".250/0 .121/0 .031/0 0/0"),
    "maxrl": (maxrl_advantage, "15/-1 3/-1 1/-1 .067/-1"),
}
RISK_AVERSE_TO_SEEKING = [-1e3, -8, -0.5, -1e-8, 0.0, 1e-8, 1e-3, 2, 8, 64, 1e3]


@pytest.mark.parametrize("name", WORKED)
def test_an_advantage_has_the_values_worked_out_by_hand(name):
    function, cells = WORKED[name]
    for correct, cell in zip((1, 4, 8, 15), cells.split()):
        advantages = function(group(correct))
        right, wrong = map(float, cell.split("/"))
        tolerance = 6e-5 if abs(right) < 0.001 else 6e-4
        assert advantages[0, 0].item() == pytest.approx(right, abs=tolerance)
        assert advantages[0, -1].item() == pytest.approx(wrong, abs=tolerance)


@pytest.mark.parametrize("beta", RISK_AVERSE_TO_SEEKING)
def test_the_risk_sensitive_advantage_equals_its_definition_in_60_digits(beta):
    getcontext().prec, getcontext().Emin, getcontext().Emax = 60, -(10**9), 10**9
    rewards = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.37, -2.5, 0.1, 3.0], [1e-3, 0.0, 2e-3, 5.0]], dtype=torch.float64)
    b = Decimal(beta) or Decimal("1e-25")  # β = 0 is the limit
    for row, ours in zip(rewards.tolist(), risk_sensitive_advantage(rewards, beta).tolist()):
        weights = [(b * Decimal(r)).exp() for r in row]
        mean = sum(weights) / len(row)
        assert ours == pytest.approx([float((w / mean - 1) / b) for w in weights], rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("beta", RISK_AVERSE_TO_SEEKING)
def test_a_group_of_equal_rewards_has_an_advantage_of_exactly_zero(beta):
    for samples in range(1, 65):
        for reward in (0.0, 1.0, 0.37, 1 / 3, -7.1):
            for dtype in (torch.float32, torch.float64):
                rewards = torch.full((2, samples), reward, dtype=dtype)
                assert not risk_sensitive_advantage(rewards, beta).any()
    for name in ("mean", "grpo", "pkpo_loo"):
        assert not ADVANTAGES[name](torch.full((3, 7), 0.37), Config()).any()


def test_every_row_is_a_group_of_its_own():
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0]])
    for name, function in ADVANTAGES.items():
        together = function(rewards, Config())
        alone = torch.cat([function(row[None], Config()) for row in rewards])
        assert torch.equal(together, alone), name
        if name not in ("pkpo", "pkpo_loo"):
            assert together.sum(1).abs().max() < 1e-5, name  # each group's advantages sum to zero


def test_one_beta_per_row_equals_one_call_per_beta():
    rewards = torch.rand(len(RISK_AVERSE_TO_SEEKING), 9)
    together = risk_sensitive_advantage(rewards, torch.tensor(RISK_AVERSE_TO_SEEKING, dtype=torch.float64)[:, None])
    for i, beta in enumerate(RISK_AVERSE_TO_SEEKING):
        assert torch.equal(together[i : i + 1], risk_sensitive_advantage(rewards[i : i + 1], beta))


def test_a_constant_added_to_the_rewards_changes_nothing_and_risk_aversion_mirrors_risk_seeking():
    rewards = torch.rand(5, 8, dtype=torch.float64)
    for beta in (-3.0, 0.0, 2.0, 8.0):
        advantages = risk_sensitive_advantage(rewards, beta)
        assert torch.allclose(risk_sensitive_advantage(rewards + 11, beta), advantages)
        assert torch.allclose(risk_sensitive_advantage(-rewards, -beta), -advantages)


def test_limits_tie_the_estimators_together():
    rewards = (torch.rand(40, 16, generator=torch.Generator().manual_seed(0)) < 0.4).double()
    assert torch.allclose(risk_sensitive_advantage(rewards, 1e-7), mean_baseline_advantage(rewards), atol=1e-6)
    assert torch.allclose(1e3 * risk_sensitive_advantage(rewards, 1e3), maxrl_advantage(rewards), atol=1e-6)
    assert torch.allclose(mahdavi_advantage(rewards, 1), mean_baseline_advantage(rewards))
    assert torch.allclose(pkpo_advantage(rewards, 1), rewards / 16)
    assert torch.allclose(chen_advantage(rewards, 1), grpo_advantage(rewards), atol=1e-4)


def test_theorem_1_is_the_gradient_of_the_objective():
    """E[A_β ∇log π] against finite differences of J_β. A group that holds each outcome as often as its probability
    says makes the group mean an exact expectation."""
    counts = torch.tensor([1, 80, 19, 40, 60])  # of 200
    rewards = torch.tensor([1.0, 0.6, 0.0, 0.3, -0.5], dtype=torch.float64)
    probs = counts / counts.sum()
    theta = probs.double().log()
    for beta in (-4.0, 0.5, 2.0, 8.0):

        def objective(theta, beta=beta):
            return (torch.softmax(theta, 0) * (beta * rewards).exp()).sum().log() / beta

        h = 1e-6
        steps = torch.eye(5, dtype=torch.float64) * h
        differences = torch.stack([(objective(theta + s) - objective(theta - s)) / (2 * h) for s in steps])
        outcomes = torch.repeat_interleave(torch.arange(5), counts)
        advantages = risk_sensitive_advantage(rewards[outcomes][None], beta)[0]  # (200,)
        grad_log_pi = torch.eye(5, dtype=torch.float64)[outcomes] - probs  # (200, 5)
        assert torch.allclose((advantages[:, None] * grad_log_pi).mean(0), differences, atol=1e-8)


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_pkpo_equals_the_sum_over_all_subsets(leave_one_out):
    rewards = torch.rand(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rewards[1, 2] = rewards[1, 5]  # a tie
    rewards[2] = (rewards[2] < 0.5).double()
    for k in range(2 if leave_one_out else 1, 8):
        brute = torch.zeros(3, 7, dtype=torch.float64)
        for subset in itertools.combinations(range(7), k):
            for i in subset:
                others = [j for j in subset if j != i]
                gain = rewards[:, list(subset)].amax(1) - (rewards[:, others].amax(1) if leave_one_out else 0)
                brute[:, i] += gain / math.comb(7, k)
        assert torch.allclose(pkpo_advantage(rewards, k, leave_one_out), brute)


def test_chen_equals_the_standardised_best_of_every_subset():
    """The reward of a subset is 1 if one of its k samples succeeds; a sample's advantage averages over its subsets."""
    for k, correct in itertools.product((1, 2, 3, 4), range(8)):
        rewards = group(correct, 7)
        best = {subset: rewards[0, list(subset)].max().item() for subset in itertools.combinations(range(7), k)}
        mean = sum(best.values()) / len(best)
        spread = math.sqrt(mean * (1 - mean)) + 1e-6
        brute = []
        for i in range(7):
            mine = [value for subset, value in best.items() if i in subset]
            brute.append((sum(mine) / len(mine) - mean) / spread)
        assert torch.allclose(chen_advantage(rewards, k)[0], torch.tensor(brute, dtype=torch.float64), atol=1e-9)


def test_mahdavi_is_the_gradient_of_pass_at_k():
    """With p = Σ_i π_i r_i, ∇(1 − (1−p)^k) = k(1−p)^{k−1} ∇p, by automatic differentiation over a uniform policy."""
    theta = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    rewards = group(3, 8)
    p = (torch.softmax(theta, 0) * rewards[0]).sum()
    (1 - (1 - p) ** 4).backward()
    advantages = mahdavi_advantage(rewards, 4)[0]
    assert torch.allclose((advantages - advantages.mean()) / 8, theta.grad)


def test_an_advantage_refuses_what_it_is_not_defined_for():
    for call in (
        lambda: risk_sensitive_advantage(torch.zeros(4), 2),
        lambda: risk_sensitive_advantage(torch.zeros(2, 4), math.nan),
        lambda: chen_advantage(torch.full((1, 8), 0.5), 4),
        lambda: mahdavi_advantage(torch.full((1, 8), 0.5), 4),
        lambda: maxrl_advantage(torch.full((1, 8), 0.5)),
        lambda: chen_advantage(torch.zeros(1, 8), 9),
        lambda: pkpo_advantage(torch.zeros(1, 8), 0),
        lambda: pkpo_advantage(torch.zeros(1, 8), 1, leave_one_out=True),
    ):
        with pytest.raises(ValueError):
            call()


def test_advantages_keep_the_dtype_and_take_integers():
    for name, function in ADVANTAGES.items():
        assert function(group(3).float(), Config()).dtype == torch.float32, name
        assert function(group(3), Config()).dtype == torch.float64, name
        assert torch.allclose(function(group(3).long(), Config()), function(group(3).float(), Config())), name


# --- reward -------------------------------------------------------------------------------------------------------

EXACT = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def every_expression(items):
    """All (text, value) that combine the (text, value) pairs `items`, fully bracketed; value None after x/0."""
    if len(items) == 1:
        yield items[0]
        return
    for i, j in itertools.permutations(range(len(items)), 2):
        rest = [items[m] for m in range(len(items)) if m not in (i, j)]
        (left, x), (right, y) = items[i], items[j]
        for symbol, function in EXACT.items():
            bad = x is None or y is None or (symbol == "/" and y == 0)
            yield from every_expression(rest + [(f"({left}{symbol}{right})", None if bad else function(x, y))])


@pytest.mark.parametrize("numbers, target", [((4, 7, 9, 12), 48), ((3, 3, 8, 8), 24), ((1, 1, 13, 13), 1)])
def test_the_reward_agrees_with_the_enumeration_of_all_expressions(numbers, target):
    expressions = list(every_expression([(str(n), Fraction(n)) for n in numbers]))
    assert len(expressions) > 9000
    hits = 0
    for text, value in expressions:
        assert countdown_reward(text, numbers, target) == float(value == target), text
        assert countdown_reward(text[1:-1], numbers, target) == float(value == target), text
        hits += value == target
    assert hits > 0


def test_exact_fractions_are_not_lost():
    assert countdown_reward("8/(3-8/3)", (3, 3, 8, 8), 24) == 1.0
    assert countdown_reward("1/3*9+1", (1, 1, 3, 9), 4) == 1.0
    assert countdown_reward(" ( 4 + 12 ) * ( 9 - 6 ) ", (4, 6, 9, 12), 48) == 1.0


def python_oracle(text: str, numbers, target) -> float:
    """Judge by Python's own grammar, walking its syntax tree: another route to the same answer."""
    if not text.isascii() or len(text) > rs_grpo.MAX_EXPRESSION or any(ch not in "0123456789+-*/() " for ch in text):
        return 0.0
    used = []

    def value(node):
        if isinstance(node, ast.BinOp) and type(node.op) in (ast.Add, ast.Sub, ast.Mult, ast.Div):
            function = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}[type(node.op)]
            return EXACT[function](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return Fraction(node.value)
        raise ValueError

    try:
        result = value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return 0.0
    zeros = any(t.startswith("0") and t != "0" for t in "".join(c if c.isdigit() else " " for c in text).split())
    return float(not zeros and sorted(used) == sorted(numbers) and result == target)


HOSTILE = [
    "", " ", "()", "(", ")", "4", "+", "4+7+9+12", "4,7,9,12=48:", "4,7,9,12=48:(9-7)*(12+12)", "(12-4)*(9-7)*3",
    "(9-7)*12*(4-2)", "7**9", "4//7", "12*4*(9-7)/2", "-4+7+9+12", "+(4)", "--4", "4-+7", "4- -7", "~4", "4%7",
    "(" * 50 + "4" + ")" * 50, "(" * 100_000, "9" * 100_000, "9**9**9**9", "1e9", "0x4", "4.0+7", "4_0", "04+7",
    "٤+٧", "４+７", "４*１２*(９-７)/2", "²", "4×12", "4+7\n", "4*12\t", "4*(9-7)+12=20", "48", "=48", "12*4 = 48",
    "1/0", "(7-7)/(9-9)", "12/(4-4)", "4 7 9 12", "4+7 9+12", "4+7;9+12", "4+7 or 9", "__import__('os')", "eval('48')",
    "print(48)", "\x00", "4\x0012", "a" * 1_000_000, "4+" * 1_000_000, "<eos>4", "<pad>12*4", "None", "nan", "inf",
    "(4)(12)", "4(12)", "()4*12", "4*12)", "(4*12", "12*4+0*(9-7)", "9-7*(", "\ud800", "🙂",
]


def test_a_hostile_completion_earns_nothing_and_raises_nothing():
    for text in HOSTILE:
        assert countdown_reward(text, (4, 7, 9, 12), 48) == 0.0, text[:50]


def test_ten_thousand_mutilated_answers_are_judged_as_python_would():
    rng = random.Random(0)
    right = 0
    for _ in range(10_000):
        numbers = [rng.randint(1, 13) for _ in range(4)]
        text, value = random_expression(numbers, rng)
        for _ in range(rng.choice((0, 0, 1, 1, 2, 5))):
            place = rng.randrange(len(text) + 1)
            text = text[:place] + rng.choice([*"0123456789+-*/() .,=e_", "**", "//", "٣", "((", "))"]) + text[place + rng.randint(0, 1) :]
        target = int(value) if value is not None else 7
        expected = python_oracle(text, numbers, target)
        assert countdown_reward(text, numbers, target) == expected, (text, numbers, target)
        right += expected
    assert right > 500  # the oracle saw both sides


def test_a_hostile_completion_costs_less_than_a_millisecond():
    worst = ["(" * 49 + "4" + ")" * 49, "(" * 1_000_000, "9" * 100, "4+" * 49 + "4", "1/" * 49 + "1", "a" * 10_000_000]
    for text in worst:
        start = time.perf_counter()
        for _ in range(20):
            countdown_reward(text, (4, 7, 9, 12), 48)
        assert (time.perf_counter() - start) / 20 < 1e-3, text[:20]


def test_a_random_expression_earns_its_reward():
    rng = random.Random(3)
    for _ in range(2000):
        numbers = [rng.randint(1, 13) for _ in range(4)]
        text, value = random_expression(numbers, rng)
        if value is not None:
            assert countdown_reward(text, numbers, value) == 1.0, text


def test_held_out_problems_are_in_no_training_set_and_not_in_the_pretraining_corpus():
    sys.path.insert(0, str(ROOT / "experiments"))
    from pretrain import example

    training = {problem.prompt for problem in countdown_problems(10_000, held_out=False)}
    held_out = {problem.prompt for problem in countdown_problems(1_000, held_out=True)}
    rng = random.Random(0)
    corpus = {example(rng)[0] for _ in range(10_000)}
    assert len(training) == 10_000 and len(held_out) == 1_000
    assert not held_out & training and not held_out & corpus
    assert all(is_held_out(prompt) for prompt in held_out) and not any(map(is_held_out, training | corpus))
    shuffled = [countdown_problem(numbers, 48).prompt for numbers in itertools.permutations((4, 7, 9, 12))]
    assert set(shuffled) == {"4,7,9,12=48:"}  # the order of the numbers can't carry a problem across


def test_asking_for_more_problems_than_there_are_is_an_error_and_not_a_hang():
    with pytest.raises(BadInput, match="ask for fewer"):
        countdown_problems(10**6, held_out=True)


# --- pass@k -------------------------------------------------------------------------------------------------------


def test_pass_at_k_equals_the_share_of_subsets_with_a_success():
    for n in range(1, 9):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(max, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_is_exact_for_a_thousand_samples():
    for c, k in itertools.product((0, 1, 2, 500, 1023, 1024), (1, 2, 512, 1024)):
        exact = 1.0 - math.prod((Fraction(1024 - c - i, 1024 - i) for i in range(k)), start=Fraction(1))
        assert pass_at_k(1024, c, k) == pytest.approx(float(exact), rel=1e-14)
    assert pass_at_k(1024, 1, 1) == 1 / 1024


def test_pass_at_k_refuses_impossible_counts():
    for n, c, k in ((4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)):
        with pytest.raises(ValueError):
            pass_at_k(n, c, k)
