"""The specification of rs_grpo.py and bandit.py, as sentences: `pytest -v` prints it. Two minutes on two CPU cores."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import operator
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
from contextlib import nullcontext
from decimal import Decimal, getcontext
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bandit
import rs_grpo
from experiments import compare, math_tasks, more_tasks, ppo, report, static_decoding
from experiments.math_tasks import equivalent, last_box, math_reward, math_rewards, plain_number
from experiments.more_tasks import is_held_out
from experiments.pretrain import PROBLEMS, example, problems, prompt_of, random_expression
from experiments.ppo import clipped_gradients
from experiments.static_decoding import sample_static
from rs_grpo import (
    ADVANTAGES,
    BadInput,
    Config,
    Rollouts,
    State,
    chen_advantage,
    completion_logprobs,
    countdown_problems,
    countdown_reward,
    decode,
    encode,
    grpo_advantage,
    load_policy,
    mahdavi_advantage,
    main,
    maxrl_advantage,
    mean_baseline_advantage,
    next_indices,
    pass_at_k,
    pkpo_advantage,
    policy_gradient,
    risk_sensitive_advantage,
    sample,
    train,
)

ROOT = Path(__file__).resolve().parent
torch.set_num_threads(1)  # models this small gain nothing from a second thread, and wait for it where a core is busy
ESTIMATORS = dict(ADVANTAGES)  # before a test adds its own


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, without one that isn't finished."""
    text = (folder / "metrics.jsonl").read_text() if (folder / "metrics.jsonl").exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


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
    for name, function in ESTIMATORS.items():
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


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_pkpo_of_a_hundred_samples_does_not_overflow(leave_one_out):
    advantages = pkpo_advantage(group(3, samples=100).double(), 50, leave_one_out)[0]
    without = math.comb(97, 49) / math.comb(99, 49)  # the other 49 all wrong
    assert advantages[0].item() == pytest.approx(0.5 * (without if leave_one_out else 1), rel=1e-12)


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


def test_a_group_in_which_no_sample_can_make_a_difference_has_an_advantage_of_exactly_zero():
    """Chen et al.: any 4 of 16 hold a success. Leave-one-out: any 3 do. A rounding error would have the group computed."""
    for correct in range(17):
        for order in range(5):
            rewards = group(correct)[:, torch.randperm(16, generator=torch.Generator().manual_seed(order))]
            assert chen_advantage(rewards, 4).any() == (1 <= correct <= 12)
            assert pkpo_advantage(rewards, 4, leave_one_out=True).any() == (1 <= correct <= 13)


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
    for name, function in ESTIMATORS.items():
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


def descent_oracle(text: str, numbers, target) -> float:
    """Judge by recursive descent over a grammar of its own: another route to the same answer than Python's parser.

    sum := product (('+' | '-') product)*    product := atom (('*' | '/') atom)*    atom := number | '(' sum ')'
    """
    if not text or len(text) > rs_grpo.MAX_EXPRESSION or any(ch not in "0123456789+-*/() " for ch in text):
        return 0.0
    tokens = deque(re.findall(r"[0-9]+|[^0-9 ]", text))
    used = [token for token in tokens if token.isdecimal()]

    def parse(level: int = 0) -> Fraction:
        if level == 2:
            token = tokens.popleft()
            if token != "(":
                return Fraction(int(token))
            value = parse()
            if tokens.popleft() != ")":
                raise ValueError
            return value
        value = parse(level + 1)
        while tokens and tokens[0] in ("+-", "*/")[level]:
            value = EXACT[tokens.popleft()](value, parse(level + 1))
        return value

    try:
        value = parse()
    except (IndexError, ValueError, ZeroDivisionError):
        return 0.0
    return float(not tokens and sorted(used) == sorted(map(str, numbers)) and value == target)


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


def test_ten_thousand_mutilated_answers_are_judged_as_an_independent_parser_would():
    rng = random.Random(0)
    right = 0
    for _ in range(10_000):
        numbers = [rng.randint(1, 13) for _ in range(4)]
        text, value = random_expression(numbers, rng)
        for _ in range(rng.choice((0, 0, 1, 1, 2, 5))):
            place = rng.randrange(len(text) + 1)
            text = text[:place] + rng.choice([*"0123456789+-*/() .,=e_", "**", "//", "٣", "((", "))"]) + text[place + rng.randint(0, 1) :]
        target = int(value) if value is not None else 7
        expected = descent_oracle(text, numbers, target)
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


@pytest.mark.parametrize("name, count, held_out", PROBLEMS)
def test_the_problem_files_hold_what_pretraining_writes_and_each_prompt_is_its_problem(name, count, held_out):
    prompts = (ROOT / "countdown-base" / name).read_text().splitlines()
    assert len(prompts) == count and prompts[:1000] == problems(1000, held_out)
    for prompt, (text, (numbers, target), _) in zip(prompts, countdown_problems(count, held_out)):
        assert prompt == text == prompt_of(numbers, target)
        assert len(numbers) == 4 and 1 <= min(numbers) <= max(numbers) <= 13 and 1 <= target <= 99


def test_held_out_problems_are_in_no_training_set_and_not_in_the_pretraining_corpus():
    training = {problem.prompt for problem in countdown_problems(20_000, held_out=False)}
    held_out = {problem.prompt for problem in countdown_problems(2_000, held_out=True)}
    rng = random.Random(0)
    corpus = {example(rng)[0] for _ in range(10_000)}
    assert len(training) == 20_000 and len(held_out) == 2_000  # each once
    assert not held_out & training and not held_out & corpus
    assert all(is_held_out(prompt) for prompt in held_out) and not any(map(is_held_out, training | corpus))
    shuffled = [prompt_of(numbers, 48) for numbers in itertools.permutations((4, 7, 9, 12))]
    assert set(shuffled) == {"4,7,9,12=48:"}  # the order of the numbers can't carry a problem across


def test_asking_for_more_problems_than_there_are_is_an_error():
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


# --- sampling -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """A folder with a random Llama of two layers and the embedded model's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "countdown-base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.15, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture()
def policy(tiny):
    return load_policy(Config(model=tiny, device="cpu"))


PROMPTS = ["1,2,3,4=5:", "10,11,12,13=48:", "1,10,11,12=9:"]  # three lengths


def draw(policy, samples=8, max_tokens=12, temperature=1.0, seed=0, prompts=PROMPTS):
    ids, mask = encode(policy, prompts)
    generator = torch.Generator().manual_seed(seed)
    return sample(policy, ids, mask, samples, Config(max_tokens=max_tokens, temperature=temperature), generator)


def unpadded(rollouts: Rollouts):
    """(prompt ids, completion ids) of every row, as lists without padding."""
    for owner, ids, mask in zip(rollouts.owner, rollouts.ids, rollouts.mask):
        yield rollouts.prompt_ids[owner][rollouts.prompt_mask[owner].bool()].tolist(), ids[mask].tolist()


def plain_logprobs(model, prompt: list[int], completion: list[int], temperature: float) -> torch.Tensor:
    """log π of each completion token from one plain forward pass over the whole row: no cache, no padding, no batch."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1)[range(len(completion)), completion]


def test_a_completion_ends_with_its_first_eos_which_belongs_to_it(policy):
    rollouts = draw(policy, samples=64)
    eos = policy.tokenizer.eos_token_id
    rows = [completion for _, completion in unpadded(rollouts)]
    ended = [row for row in rows if row[-1] == eos]
    assert all(eos not in row[:-1] for row in rows)
    assert 10 < len(ended) < len(rows) and all(len(row) == 12 for row in rows if row[-1] != eos)
    assert (rollouts.mask.long().diff(dim=1) <= 0).all()  # completion tokens first, then padding
    texts = decode(policy, rollouts)
    assert all("<eos>" not in text for text in texts)
    assert [len(policy.tokenizer(text).input_ids) for text in texts] == [len(row) - (row[-1] == eos) for row in rows]


def test_sampling_stops_when_every_row_has_ended(policy):
    head = policy.model.get_output_embeddings()
    calls = []
    head.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    rollouts = draw(policy, samples=4, max_tokens=500)
    assert rollouts.ids.shape[1] == rollouts.mask.sum(1).max() == len(calls) < 500
    running = [(rollouts.mask.sum(1) > t).sum().item() for t in range(len(calls))]
    assert calls[1:] == running[1:]  # a row that ended is computed no more


def test_samples_that_are_equal_so_far_share_a_row_and_are_drawn_as_if_each_had_its_own(policy):
    """The reference runs every sample whole, without a cache, and draws from the same random numbers."""
    rows_run, generator = [], torch.Generator().manual_seed(0)
    policy.model.base_model.register_forward_hook(lambda module, inputs, output: rows_run.append(len(output[0])))
    rollouts = draw(policy, samples=16, max_tokens=6)
    shared, eos = list(rows_run), policy.tokenizer.eos_token_id
    texts = [policy.tokenizer(prompt).input_ids for prompt in PROMPTS for _ in range(16)]
    starts = [len(text) for text in texts]
    for t in range(6):
        alive = [i for i, text in enumerate(texts) if len(text) == starts[i] + t and (t == 0 or text[-1] != eos)]
        assert shared[t] == len({(starts[i], *texts[i]) for i in alive})
        with torch.no_grad():
            probs = torch.cat([policy.model(torch.tensor([texts[i]])).logits[:, -1].softmax(-1) for i in alive])
        for i, token in zip(alive, torch.multinomial(probs, 1, generator=generator).flatten().tolist()):
            texts[i].append(token)
    assert [prompt + completion for prompt, completion in unpadded(rollouts)] == texts
    assert shared[0] == 3 < shared[1] < shared[2] and len(shared) == 6  # prompts first, then more and more texts


def test_greedy_sampling_in_a_padded_batch_equals_greedy_decoding_one_by_one(policy):
    """A temperature near 0 leaves no choice, so every row must equal the plain loop over its own prompt."""
    prompts = [problem.prompt for problem in countdown_problems(40, held_out=True)] + PROMPTS
    rollouts = draw(policy, samples=2, temperature=1e-6, prompts=prompts)
    lengths = set()
    for prompt, completion in unpadded(rollouts):
        row = list(prompt)
        with torch.no_grad():
            while len(row) < len(prompt) + 12 and (len(row) == len(prompt) or row[-1] != policy.tokenizer.eos_token_id):
                row.append(policy.model(torch.tensor([row])).logits[0, -1].argmax().item())
        assert completion == row[len(prompt) :]
        lengths.add(len(completion))
    assert len(lengths) > 2  # rows retired at different times


def assert_drawn_from_the_softmax(policy, rollouts: Rollouts, temperature: float):
    """Shares of the first two tokens against the model's probabilities, within five standard errors."""
    samples = len(rollouts.ids) // len(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        ids = policy.tokenizer(prompt).input_ids
        rows = rollouts.ids[i * samples : (i + 1) * samples]
        with torch.no_grad():
            first = torch.softmax(policy.model(torch.tensor([ids])).logits[0, -1] / temperature, -1)
            favourite = first.argmax().item()
            logits = policy.model(torch.tensor([ids + [favourite]])).logits[0, -1]
        second = torch.softmax(logits / temperature, -1)
        for drawn, probs in ((rows[:, 0], first), (rows[rows[:, 0] == favourite, 1], second)):
            share = torch.bincount(drawn, minlength=len(probs)) / len(drawn)
            error = (probs * (1 - probs) / len(drawn)).sqrt()
            assert ((share - probs).abs() < 5 * error + 1e-9).all()


def mean_entropy(policy, rollouts: Rollouts, temperature: float) -> float:
    entropies = []
    with torch.no_grad():
        for prompt, completion in unpadded(rollouts):
            logits = policy.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / temperature
            entropies += torch.distributions.Categorical(logits=logits).entropy().tolist()
    return sum(entropies) / len(entropies)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_are_distributed_as_the_models_softmax_at_the_temperature(policy, temperature):
    rollouts = draw(policy, samples=8000, max_tokens=2, temperature=temperature)
    assert_drawn_from_the_softmax(policy, rollouts, temperature)


def test_the_reported_entropy_is_the_mean_over_the_sampled_tokens(policy):
    rollouts = draw(policy, temperature=0.8)
    assert rollouts.entropy == pytest.approx(mean_entropy(policy, rollouts, 0.8), rel=1e-4)


# --- learning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_equal_those_of_one_plain_forward_pass(policy, temperature):
    rollouts = draw(policy, temperature=temperature)
    with torch.no_grad():
        ours = completion_logprobs(policy.model, rollouts, temperature)
        for row, mask, (prompt, completion) in zip(ours, rollouts.mask, unpadded(rollouts)):
            assert torch.allclose(row[mask], plain_logprobs(policy.model, prompt, completion, temperature), atol=1e-4)
            assert not row[~mask].any()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_padding_takes_no_position_in_a_model_with_absolute_ones(tiny, tmp_path, checkpointing):
    """Rotary positions are relative and forgive a shift; GPT-2's are looked up in a table."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = load_policy(Config(model=str(tmp_path), device="cpu", checkpointing=checkpointing))
    rollouts = draw(policy, temperature=1e-6)  # greedy
    logprobs = completion_logprobs(policy.model, rollouts, 1.0).detach()
    for row, mask, (prompt, completion) in zip(logprobs, rollouts.mask, unpadded(rollouts)):
        with torch.no_grad():
            logits = policy.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == completion
        assert torch.allclose(row[mask], plain_logprobs(policy.model, prompt, completion, 1.0), atol=1e-4)


def gradient(model) -> torch.Tensor:
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return flat


def mixed_rewards(rollouts: Rollouts) -> torch.Tensor:
    """Rewards (3, N): one group mixed, one all wrong, one mixed."""
    samples = len(rollouts.ids) // 3
    rewards = (torch.rand(3, samples, generator=torch.Generator().manual_seed(5)) < 0.4).float()
    rewards[1] = 0
    return rewards


@pytest.mark.parametrize("micro_tokens", [1, 300, 10**9])
def test_the_gradient_equals_that_of_a_plain_unshared_unskipped_loss_however_the_batch_is_cut(policy, micro_tokens):
    rollouts = draw(policy)
    advantages = risk_sensitive_advantage(mixed_rewards(rollouts), 2.0)
    loss = policy_gradient(policy.model, [(rollouts, advantages)], Config(micro_tokens=micro_tokens))
    ours = gradient(policy.model)

    rows = list(unpadded(rollouts))
    tokens = sum(len(completion) for _, completion in rows)  # of all groups, those without a signal included
    plain = sum(
        -a * plain_logprobs(policy.model, prompt, completion, 1.0).sum() / tokens
        for a, (prompt, completion) in zip(advantages.flatten(), rows)
    )
    plain.backward()
    reference = gradient(policy.model)
    assert loss == pytest.approx(plain.item(), abs=1e-6)
    assert (ours - reference).norm() < 1e-5 * reference.norm()


def test_the_gradient_is_the_same_bit_for_bit_on_several_threads():
    policy = load_policy(Config(device="cpu"))
    rollouts = draw(policy, samples=32, prompts=[problem.prompt for problem in countdown_problems(16, held_out=True)])
    advantages = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(2)
    gradients = []
    for _ in range(8):
        policy_gradient(policy.model, [(rollouts, advantages)], Config(micro_tokens=10**9))
        gradients.append(gradient(policy.model))
    torch.set_num_threads(1)
    assert all(torch.equal(gradients[0], other) for other in gradients)


def test_groups_without_a_signal_are_never_computed(policy, monkeypatch):
    rollouts = draw(policy)
    computed = []
    original = rs_grpo.completion_logprobs
    monkeypatch.setattr(
        rs_grpo, "completion_logprobs", lambda m, part, t: computed.append(part.prompt_ids.shape[0]) or original(m, part, t)
    )
    advantages = risk_sensitive_advantage(mixed_rewards(rollouts), 2.0)
    policy_gradient(policy.model, [(rollouts, advantages)], Config())
    assert computed == [2]
    policy_gradient(policy.model, [(rollouts, torch.zeros_like(advantages))], Config())
    assert computed == [2]


def test_each_prompt_is_computed_once_for_its_group(policy, monkeypatch):
    tokens = []
    policy.model.base_model.register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape))
    rollouts = draw(policy, samples=8)
    longest = rollouts.ids.shape[1]
    assert tokens[0] == (3, 15) and all(shape[1] == 1 for shape in tokens[1:])
    tokens.clear()
    policy_gradient(policy.model, [(rollouts, torch.ones(3, 8))], Config())
    assert tokens == [(3, 15), (24, longest - 1)]


def test_one_step_makes_the_rewarded_completion_likelier_and_the_others_less(policy):
    rollouts = draw(policy, samples=6, prompts=PROMPTS[:1])
    rewards = torch.zeros(1, 6)
    rewards[0, 2] = 1
    advantages = risk_sensitive_advantage(rewards, 2.0)
    before = completion_logprobs(policy.model, rollouts, 1.0).sum(1).detach()
    policy_gradient(policy.model, [(rollouts, advantages)], Config())
    torch.optim.SGD(policy.model.parameters(), lr=0.1).step()
    change = completion_logprobs(policy.model, rollouts, 1.0).sum(1).detach() - before
    assert change[2] > 0 and change[2] == change.max() and (advantages[0] * change).sum() > 0


# --- training -----------------------------------------------------------------------------------------------------


def small(tiny, folder, **changes) -> Config:
    settings = dict(
        model=tiny, out=str(folder), prompts=4, samples=4, steps=6, train_problems=10, max_tokens=6, lr=1e-2,
        eval_problems=3, eval_samples=4, save_every=2, device="cpu", advantage="graded",
    )  # fmt: skip
    return Config(**{**settings, **changes})


def graded(rewards: torch.Tensor, config: Config) -> torch.Tensor:
    """An estimator of one's own: a random model solves nothing, and this gives it something to learn all the same."""
    return torch.linspace(-1, 1, rewards.shape[1]).expand_as(rewards)


@pytest.fixture(scope="session", autouse=True)
def own_estimator():
    ADVANTAGES["graded"] = graded
    yield
    del ADVANTAGES["graded"]


def trajectory(folder) -> list[dict]:
    return [{k: v for k, v in line.items() if "second" not in k} for line in read_metrics(Path(folder))]


def weights(folder) -> dict:
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)["model"]


def same(folder, other) -> bool:
    ours, theirs = weights(folder), weights(other)
    results = [json.loads((Path(f) / "eval.json").read_text()) for f in (folder, other)]
    return (
        trajectory(folder) == trajectory(other)
        and all(torch.equal(ours[name], theirs[name]) for name in theirs)
        and results[0] == results[1]
    )


@pytest.fixture(scope="session")
def uninterrupted(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(small(tiny, folder, eval_every=3))
    return folder


def test_a_run_leaves_a_folder_that_holds_everything(uninterrupted):
    assert {p.name for p in uninterrupted.iterdir()} == {
        "config.json", "metrics.jsonl", "eval.json", "model", "checkpoint.pt", "passk.png"
    }  # fmt: skip
    results = json.loads((uninterrupted / "eval.json").read_text())
    assert set(results) == {"base", "trained", "steps"} and set(results["steps"]) == {"3"}
    for result in (results["base"], results["trained"], results["steps"]["3"]):
        assert result["n"] == 4 and len(result["correct"]) == 3 and list(result["pass_at_k"]) == ["1", "2", "4"]
    assert [line["step"] for line in trajectory(uninterrupted)] == [1, 2, 3, 4, 5, 6]
    expected = {"step", "reward", "solved", "signal", "entropy", "length", "grad_norm", "solve_rate"}
    assert expected <= set(trajectory(uninterrupted)[0])
    assert {"seconds", "tokens_per_second"} <= set(read_metrics(uninterrupted)[0])


def test_the_trained_folder_loads_in_plain_transformers_and_differs_from_the_base(uninterrupted, tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(uninterrupted / "model")
    tokenizer = AutoTokenizer.from_pretrained(uninterrupted / "model")
    out = model.generate(**tokenizer("4,7,9,12=48:", return_tensors="pt"), max_new_tokens=5, do_sample=True)
    assert tokenizer.decode(out[0]).startswith("4,7,9,12=48:")
    base = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    assert all(torch.equal(weights(uninterrupted)[k], v) for k, v in model.state_dict().items())
    assert any(not torch.equal(base[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("moment", ["evaluate 1", "policy_gradient 1", "policy_gradient 2", "policy_gradient 4", "save_checkpoint 2", "evaluate 2", "evaluate 3"])
def test_a_run_that_was_broken_off_anywhere_resumes_to_the_same_numbers(uninterrupted, tiny, tmp_path, monkeypatch, moment):
    """Broken off in the base's evaluation, before the first checkpoint, between two, between metrics and checkpoint,
    in an evaluation on the way, in the last one."""
    name, count = moment.split()
    calls, original = [], getattr(rs_grpo, name)

    def breaking(*args, **kwargs):
        calls.append(name)
        if len(calls) == int(count):
            raise RuntimeError("killed")
        return original(*args, **kwargs)

    config = small(tiny, tmp_path / "run", eval_every=3)
    monkeypatch.setattr(rs_grpo, name, breaking)
    with pytest.raises(RuntimeError, match="killed"):
        train(config)
    monkeypatch.setattr(rs_grpo, name, original)
    train(config, resume=True)
    assert same(tmp_path / "run", uninterrupted)


def test_a_run_killed_with_sigkill_at_any_moment_resumes_to_the_same_numbers(tiny, tmp_path):
    command = [
        sys.executable, "rs_grpo.py", "--model", str(ROOT / "countdown-base"), "--prompts", "4", "--samples", "4", "--steps", "40",
        "--eval-problems", "2", "--eval-samples", "4", "--save-every", "3", "--device", "cpu",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # a second thread gains nothing here, and waits where the machine is busy
    subprocess.run([*command, "--out", tmp_path / "whole"], cwd=ROOT, env=env, check=True, capture_output=True)
    run, rng, kills = tmp_path / "run", random.Random(0), 0
    extra: list[str] = []
    for lines in (1, 14):  # kill as soon as that many steps are done, and a moment later
        process = subprocess.Popen([*command, "--out", run, *extra], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(read_metrics(run)) < lines:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        kills += process.poll() is None
        process.kill()
        process.wait()
        extra = ["--resume"]
    subprocess.run([*command, "--out", run, "--resume"], cwd=ROOT, env=env, check=True, capture_output=True)
    assert kills
    assert same(run, tmp_path / "whole")


def test_resuming_with_more_steps_equals_a_longer_run(uninterrupted, tiny, tmp_path):
    train(small(tiny, tmp_path / "run", eval_every=3, steps=4))
    assert len(trajectory(tmp_path / "run")) == 4
    train(small(tiny, tmp_path / "run", eval_every=3, steps=6), resume=True)
    assert same(tmp_path / "run", uninterrupted)


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(uninterrupted, tiny, tmp_path, monkeypatch, capsys):
    original = rs_grpo.policy_gradient

    def pressing(*args):
        pressed.append(os.kill(os.getpid(), signal.SIGINT))
        return original(*args)

    pressed: list = []
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(rs_grpo, "policy_gradient", pressing)
    config = small(tiny, tmp_path / "run", eval_every=3)
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in vars(config).items() if v != "" and v is not False]
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    assert stopped.value.code == 130 and f"--resume --out {tmp_path / 'run'}" in capsys.readouterr().err
    assert len(pressed) == len(trajectory(tmp_path / "run")) == 1 and signal.getsignal(signal.SIGINT) is handler
    monkeypatch.setattr(rs_grpo, "policy_gradient", original)
    main(["--resume", "--out", str(tmp_path / "run")])
    assert same(tmp_path / "run", uninterrupted)


def test_ctrl_c_in_an_evaluation_on_the_way_keeps_every_step_before_it(uninterrupted, tiny, tmp_path, monkeypatch):
    asked, original = [], rs_grpo.evaluate

    def evaluating(*args):
        asked.append(len(asked) == 1)  # pressed in the second one, after step 3
        return original(*args)

    monkeypatch.setattr(rs_grpo, "evaluate", evaluating)
    config = small(tiny, tmp_path / "run", eval_every=3, save_every=50)
    with pytest.raises(KeyboardInterrupt):
        train(config, False, lambda: any(asked))
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["state"]["step"] == 3
    monkeypatch.setattr(rs_grpo, "evaluate", original)
    train(config, resume=True)
    assert same(tmp_path / "run", uninterrupted)


def test_updates_that_are_not_finite_are_skipped_counted_and_end_the_run(tiny, tmp_path, monkeypatch):
    original, bad_steps, step = rs_grpo.policy_gradient, {2, 3, 5}, []

    def failing(model, *args):
        step.append(1)
        loss = original(model, *args)
        if len(step) in bad_steps:
            next(model.parameters()).grad[0] = math.inf
        return loss

    monkeypatch.setattr(rs_grpo, "policy_gradient", failing)
    train(small(tiny, tmp_path / "run"))
    assert [line["failed_updates"] for line in trajectory(tmp_path / "run")] == [0, 1, 2, 2, 3, 3]
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "run").values())
    step.clear()
    bad_steps |= {2, 3, 4}
    with pytest.raises(FloatingPointError, match="lower --lr"):
        train(small(tiny, tmp_path / "other"))
    assert len(step) == 4


def test_training_problems_come_once_an_epoch_in_an_order_set_by_the_seed():
    def taken(count, times, seed):
        state = State(solved=torch.zeros(35, dtype=torch.bool))
        return [i for _ in range(times) for i in next_indices(state, count, seed)]

    two_epochs = taken(7, 10, seed=0)
    assert sorted(two_epochs[:35]) == sorted(two_epochs[35:]) == list(range(35)) and two_epochs[:35] != two_epochs[35:]
    assert two_epochs == taken(14, 5, seed=0) == taken(70, 1, seed=0) != taken(7, 10, seed=1)


def test_the_solve_rate_counts_every_training_problem_solved_so_far(tmp_path):
    train(Config(out=str(tmp_path / "run"), steps=6, prompts=4, train_problems=8, samples=4, eval_problems=1, eval_samples=2))
    lines = trajectory(tmp_path / "run")
    assert lines[0]["solve_rate"] == lines[0]["solved"] * 4 / 8
    assert all(a["solve_rate"] <= b["solve_rate"] for a, b in zip(lines, lines[1:])) and lines[-1]["solve_rate"] > 0


def test_a_problem_that_is_twice_in_a_batch_is_solved_if_either_is(tiny, tmp_path, monkeypatch):
    load_task = rs_grpo.load_task

    def first_half_right(completions, answers):
        return [float(i < len(completions) / 2) for i in range(len(completions))]

    monkeypatch.setattr(rs_grpo, "load_task", lambda config: load_task(config)._replace(rewards=first_half_right))
    train(small(tiny, tmp_path, steps=1, train_problems=1, prompts=2))
    assert read_metrics(tmp_path)[0]["solve_rate"] == 1


def test_zero_steps_only_evaluate_the_embedded_model(tmp_path):
    results = train(Config(out=str(tmp_path / "run"), steps=0, eval_problems=32, eval_samples=32))
    assert results["trained"] == results["base"] and not (tmp_path / "run" / "model").exists()
    base = results["base"]
    for k, percent in base["pass_at_k"].items():
        expected = sum(pass_at_k(32, c, int(k)) for c in base["correct"]) / 32
        assert percent == pytest.approx(100 * expected)
    assert 8 < base["pass_at_k"]["1"] < 30 < base["pass_at_k"]["32"] < 75  # peaked, and far from hopeless
    assert all((d == 0) == (c == 0) and d <= c for c, d in zip(base["correct"], base["distinct"]))
    assert rs_grpo.table(results).splitlines()[1].split() == ["base"]  # no second column that says the same


# --- the command line ---------------------------------------------------------------------------------------------


def complaint(capsys, *flags) -> str:
    """Run the command line, expect exit status 2 and one sentence; returns it."""
    with pytest.raises(SystemExit) as stopped:
        main([str(flag) for flag in flags])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.err.count("\n") == 1 and "Traceback" not in printed.err, printed.err
    return printed.err


@pytest.mark.parametrize(
    "flags",
    [
        "--samples 1", "--samples 0", "--prompts 0", "--prompts -3", "--steps -1", "--max-tokens 0", "--eval-samples -1",
        "--eval-problems 0", "--train-problems 0", "--train-problems 10000000", "--save-every 0", "--eval-every -1",
        "--beta nan", "--beta inf", "--beta x", "--lr nan", "--lr inf", "--lr 0", "--lr -1e-4", "--temperature 0",
        "--temperature -1", "--temperature nan", "--advantage best", "--task chess", "--steps 1.5", "--seed -1",
        "--device tpu9", "--model ./nowhere", "--advantage chen --k 17", "--advantage pkpo_loo --k 1", "--no-such-flag 1",
        "--resume", "--task=", "--task countdown-text", "--eval-task countdown-text", "--seed 18446744073709551615", "--clip-low 1",
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence_and_exit_status_2(capsys, tmp_path, flags):
    complaint(capsys, "--out", tmp_path / "run", *flags.split())
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_a_folder_that_is_no_model_is_refused(capsys, tmp_path, tiny):
    (tmp_path / "empty").mkdir()
    complaint(capsys, "--model", tmp_path / "empty", "--out", tmp_path / "run")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(tiny).iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[:100])
    complaint(capsys, "--model", broken, "--out", tmp_path / "run")


def test_a_model_without_a_cache_of_keys_and_values_is_refused(capsys, tmp_path, tiny):
    from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, state_size=4, num_hidden_layers=1, conv_kernel=2, expand=1)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    capsys.readouterr()
    assert "plain transformer" in complaint(capsys, "--model", tmp_path / "mamba", "--out", tmp_path / "run")


def test_an_output_folder_that_cannot_be_written_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    complaint(capsys, "--out", tmp_path / "file")
    complaint(capsys, "--out", tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_existing_run_is_never_overwritten(capsys, uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    message = complaint(capsys, "--out", uninterrupted)
    assert "--resume" in message and "--out" in message
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("flags", ["--beta 3", "--steps 5", "--lr 1e-5", "--seed 1", "--samples 8", "--model other"])
def test_resuming_with_contradictory_settings_is_refused(capsys, uninterrupted, flags):
    message = complaint(capsys, "--resume", "--out", uninterrupted, *flags.split())
    assert flags.split()[0] in message


def test_a_damaged_checkpoint_or_configuration_is_refused(capsys, tiny, tmp_path):
    folder = tmp_path / "run"
    train(small(tiny, folder, steps=2))
    whole = (folder / "checkpoint.pt").read_bytes()
    for damage in (b"", whole[: len(whole) // 2], b"x" * 1000):
        (folder / "checkpoint.pt").write_bytes(damage)
        capsys.readouterr()
        assert "damaged" in complaint(capsys, "--resume", "--out", folder)
    settings = (folder / "config.json").read_text()
    for damage in ("", "{", "[]", settings.replace('"steps"', '"stops"'), settings.replace('"samples": 4', '"samples": "4"')):
        (folder / "config.json").write_text(damage)
        complaint(capsys, "--resume", "--out", folder)


def test_importing_is_cheap():
    code = "import sys; from rs_grpo import risk_sensitive_advantage; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and all(f"--{name.replace('_', '-')}" in text for name in vars(Config()))


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_every_advantage_trains_from_the_command_line(name, tmp_path, capsys):
    main(
        f"--advantage {name} --k 4 --steps 2 --prompts 4 --eval-problems 2 --eval-samples 2 --out {tmp_path / 'run'}".split()
    )
    assert len(trajectory(tmp_path / "run")) == 2 and "pass@2" in capsys.readouterr().out


# --- mathematical reward ------------------------------------------------------------------------------------------


def boxed(text: str) -> str:
    return rf"So the answer is \boxed{{{text}}}."


@pytest.fixture
def verifiers(monkeypatch):
    """Every verifier process that the test starts, none of them left from another one, and none left behind."""
    pytest.importorskip("math_verify")
    started, start = [], math_tasks.start_verifier
    monkeypatch.setattr(math_tasks, "start_verifier", lambda: started.append(start()) or started[-1])
    monkeypatch.setattr(math_tasks, "idle_verifiers", [])
    monkeypatch.setattr(math_tasks, "killed", [])
    equivalent.cache_clear()
    yield started
    for process in started:
        process.communicate(timeout=10)


# (answer of the data set, content of the box)
EQUIVALENT = [
    (r"\frac{1}{2}", r"\frac12"),
    (r"\frac{1}{2}", "0.5"),
    ("0.5", r"\dfrac{1}{2}"),
    (r"\frac{3}{4}", "3/4"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"3\sqrt{2}", r"\sqrt{18}"),
    (r"\frac{\pi}{2}", r"\pi/2"),
    ("(1,2]", r"\left( 1, 2 \right]"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("1,2", r"2, 1"),
    ("(3,4)", r"(3,\,4)"),
    ("x^2-1", "(x-1)(x+1)"),
    ("5", "x=5"),
    ("5", r"5\text{ cm}"),
    ("90", r"90^\circ"),
    ("10", r"10\%"),
    (r"50\%", "0.5"),
    ("50%", "50"),
    ("50%", "0.5"),
    ("x<2", r"(-\infty,2)"),
    ("18", r"\$18.00"),
    ("1234", "1{,}234"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("6", r"\boxed{6}"),
]
DIFFERENT = [
    (r"\frac{1}{2}", r"\frac13"),
    (r"\frac{1}{3}", "0.33"),
    (r"\sqrt{2}", "1.41"),
    ("(1,2]", "[1,2]"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    ("(3,4)", "(4,3)"),
    ("x^2-1", "x^2+1"),
    ("5", r"\pm 5"),
    ("5", "5, 6"),
    ("5", r"5 \text{ or } 6"),
    ("50%", "5"),
    ("even", r"\text{odd}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
]


def test_a_box_earns_its_reward_in_every_equivalent_form_and_in_no_other(verifiers):
    assert [(a, b) for a, b in EQUIVALENT if math_reward(boxed(b), a) != 1] == []
    assert [(a, b) for a, b in DIFFERENT if math_reward(boxed(b), a) != 0] == []
    assert math_tasks.killed == [] and len(verifiers) == 1  # the same process judged them all


@pytest.mark.parametrize(
    "completion, box",
    [
        (r"\boxed{1} or \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} and 3 more words}", r"\frac{1}{2}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{ 7 }", "7"),
        (r"\boxed{}", ""),
        (r"\boxed{7", ""),
        (r"\boxed{1} then \boxed{\frac{1}{2}", ""),
        (r"\boxed{7\}", ""),
        (r"\boxed{" + "1" * 300 + "}", "1" * 300),
        (r"\boxed{" + "1" * 301 + "}", ""),
        (r"\boxed{" + "{" * 19 + "1" + "}" * 19 + "}", "{" * 19 + "1" + "}" * 19),
        (r"\boxed{" + "{" * 20 + "1" + "}" * 20 + "}", ""),
        ("boxed{7}", None),
        ("", None),
    ],
)
def test_the_last_box_is_read_with_its_braces_matched_and_counts_for_nothing_when_it_is_unclosed_long_or_deep(completion, box):
    assert last_box(completion) == box


# (completion, whether it is right), for the answer 1234
GSM8K = {
    "1234": 1,
    "The answer is 1,234.": 1,
    "The answer is $1,234.00.": 1,
    "#### 1234": 1,
    "**1234**": 1,
    "1 + 1233 = 1234 apples": 1,
    "1234%": 1,
    "It is 1234, not 1": 0,
    "-1234": 0,
    "1234.5": 0,
    "12345": 0,
    "1,2345": 0,
    "1,234,": 1,
    "1,234,5": 0,
    r"\boxed{1234}, which is 2 less": 1,
    r"\boxed{1,234.00}": 1,
    r"\boxed{7} 1234": 0,
    r"\boxed{} 1234": 0,
    r"1234 \boxed{123": 0,
    "no number": 0,
    "": 0,
}


@pytest.mark.parametrize("answer", ["1234", "1,234", "$1234", "1234.0", " 1234. "])
def test_plain_numbers_are_compared_exactly_and_without_a_box_the_last_number_counts(answer, monkeypatch):
    monkeypatch.setattr(math_tasks, "equivalent", None)  # none of this is a question for math-verify
    assert {text: math_reward(text, answer) for text in GSM8K} == GSM8K
    assert math_reward("so 1234", r"\frac{1234}{1}") == 0  # only where the answer is a plain number
    assert math_reward(boxed("x"), "x" * 301) == 0


def test_numbers_are_exact_and_their_digits_are_ascii():
    assert plain_number("-$1,234.50") == -1234.5 and plain_number(".5") == plain_number("50%") / 100
    assert math_reward("0.1", "0.1000000000000000055511151231257827") == 0  # equal as floats
    assert math_reward(f"1{'0' * 50}1", f"1{'0' * 51}") == 0
    assert all(plain_number(text) is None for text in ("1,23", "5 5", "1e5", "--5", "1.2.3", "٣", "５", "²", "½", "x", "", "-", "$", "%"))
    for look_alike in ("٥", "５", "𝟓"):
        assert math_reward(f"it is {look_alike}", "5") == 0


MEGABYTE = 10**6
HOSTILE_AND_CHEAP = {
    "boxes": r"\boxed{" * (MEGABYTE // 7),
    "nested fractions": r"\boxed{" + r"\frac{1}{" * (MEGABYTE // 9),
    "closed nested fractions": boxed(r"\frac{1}{" * (MEGABYTE // 10) + "}" * (MEGABYTE // 10)),
    "braces": r"\boxed{" + "{" * MEGABYTE,
    "closing braces": r"\boxed{1" + r"\}" * MEGABYTE + "}",
    "backslashes": r"\boxed{" + "\\" * MEGABYTE + "}",
    "digits": "1" * MEGABYTE,
    "digits in a box": boxed("1" * MEGABYTE),
    "numbers": "1 " * (MEGABYTE // 2),
    "thousands": "111," * (MEGABYTE // 4) + "1111",
    "points": "1." * (MEGABYTE // 2),
    "signs": "-$" * (MEGABYTE // 2),
    "other digits": "٣" * MEGABYTE,
    "zero bytes": "\0" * MEGABYTE,
    "empty box": r"\boxed{}",
    "blank box": r"\boxed{ }",
    "nothing": "",
}


@pytest.mark.parametrize("answer", ["18", r"\frac{1}{2}", "1" * MEGABYTE])
@pytest.mark.parametrize("name", HOSTILE_AND_CHEAP)
def test_a_megabyte_of_anything_earns_nothing_in_a_tenth_of_a_second_and_reaches_no_verifier(name, answer, monkeypatch):
    monkeypatch.setattr(math_tasks, "equivalent", None)
    started = time.perf_counter()
    assert math_reward(HOSTILE_AND_CHEAP[name], answer) == 0
    assert time.perf_counter() - started < 0.1


# What takes math-verify minutes, or gigabytes.
BOMBS = ["9^{9^{9^9}}", r"10^{10^8}", "(10^9)!", r"\sum_{n=1}^{10^9} n^n", "(x+y+z)^{1000}"]
MALFORMED = [
    "10^{10^{10}}",
    "0/0",
    r"\frac{1}{0}",
    r"\frac{",
    r"\frac{1}",
    "(" * 100 + "1" + ")" * 100,
    r"\sqrt{" * 19 + "2" + "}" * 19,
    r"\begin{pmatrix}1&2\\3\end{pmatrix}",
    r"\begin{pmatrix}",
    "１８",
    "١٨",
    "18²",
    "1e1000000",
    "\\",
    "$",
    "%",
    "\0",
    "\ud800",
    "\n1\n",
    "__import__('os').abort()",
    "+" * 300,
    "1,2" * 100,
    "∞",
    r"\text{" + "a " * 100 + "}",
]


def test_malformed_and_look_alike_boxes_earn_nothing_in_bounded_time(verifiers, monkeypatch):
    monkeypatch.setattr(math_tasks, "VERIFY_SECONDS", 1.0)
    for box in MALFORMED:
        started = time.perf_counter()
        assert math_reward(rf"\boxed{{{box}}}", "18") == 0, box
        assert time.perf_counter() - started < 1 + 3, box


def test_a_comparison_that_overruns_is_killed_counted_once_and_the_next_one_is_judged_as_ever(verifiers, monkeypatch):
    monkeypatch.setattr(math_tasks, "VERIFY_SECONDS", 0.5)
    for bomb in BOMBS:
        started = time.perf_counter()
        assert math_reward(boxed(bomb), "18") == 0, bomb
        assert time.perf_counter() - started < 0.5 + 3, bomb
    assert math_tasks.killed == [(bomb, "18") for bomb in BOMBS]
    assert all(process.returncode not in (None, 0) for process in verifiers)  # ended and waited for: no zombie
    started = time.perf_counter()
    assert math_reward(boxed(BOMBS[0]), "18") == 0  # remembered
    assert time.perf_counter() - started < 0.1 and len(math_tasks.killed) == len(BOMBS)
    monkeypatch.setattr(math_tasks, "VERIFY_SECONDS", 5.0)
    assert math_reward(boxed(r"\frac{36}{2}"), "18") == 1


def test_a_verifier_that_died_costs_one_comparison_and_is_replaced(verifiers):
    assert math_reward(boxed(r"\frac{36}{2}"), "18") == 1
    verifiers[0].kill()
    verifiers[0].wait()
    assert math_reward(boxed(r"\frac{54}{3}"), "18") == 0 and math_tasks.killed == [(r"\frac{54}{3}", "18")]
    assert math_reward(boxed(r"\frac{72}{4}"), "18") == 1 and len(verifiers) == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_verifier_has_bounded_memory_and_ctrl_c_does_not_reach_it(verifiers):
    process = math_tasks.start_verifier()
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    assert [int(line.split()[3]) for line in limits.splitlines() if "address space" in line] == [math_tasks.VERIFY_BYTES]
    assert os.getpgid(process.pid) != os.getpgid(0)


def test_answers_are_judged_from_any_thread_and_in_batches_alike(verifiers):
    pairs = (EQUIVALENT + DIFFERENT) * 3
    answers, completions = [a for a, _ in pairs], [boxed(b) for _, b in pairs]
    rewards: list[float] = []
    thread = threading.Thread(target=lambda: rewards.extend(math_rewards(completions, answers)))
    thread.start()
    thread.join()
    assert rewards == ([1.0] * len(EQUIVALENT) + [0.0] * len(DIFFERENT)) * 3
    assert len(math_tasks.idle_verifiers) == len(verifiers) <= math_tasks.VERIFIERS and math_rewards([], []) == []


@pytest.mark.parametrize("line", ["", r"math_tasks.VERIFY_SECONDS = 1; math_tasks.equivalent('9^{9^{9^9}}', '18')"])
def test_a_verifier_idle_or_busy_ends_when_its_run_is_killed(line):
    pytest.importorskip("math_verify")
    code = f"from experiments import math_tasks; p = math_tasks.start_verifier(); math_tasks.idle_verifiers.append(p); print(p.pid, flush=True); {line}; input()"
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pid = run.stdout.readline().strip()
    time.sleep(0.5)
    run.kill()
    run.communicate()

    def runs() -> bool:
        return subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True).stdout.strip()[:1] not in ("", "Z")

    deadline = time.monotonic() + 1 + 3
    while runs() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not runs()


def test_without_math_verify_one_sentence_names_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ValueError, match="pip install math-verify"):
        math_tasks.start_verifier()


def test_what_a_verifier_prints_or_raises_is_no_verdict(verifiers, tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text(
        "LatexExtractionConfig = object\n"
        "def parse(text, *a, **k):\n    print(1)\n    if 'deep' in text: raise RecursionError\n    return text\n"
        "def verify(answer, box, **k):\n    print(1)\n    return answer == box\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert [math_reward(boxed(text), "x") for text in ("x", "y", "deep", "x ", "z")] == [1, 0, 0, 1, 0]
    assert math_tasks.killed == [] and len(verifiers) == 1


# --- the bandit ---------------------------------------------------------------------------------------------------

POLICY, REWARDS = [0.01, 0.80, 0.19], [1.0, 0.6, 0.0]  # the worked example: settled on the second-best arm


def exact_gradient(probs, rewards, beta):
    """Theorem 1 for a softmax policy, π_j A_j, in plain Python and apart from the code under test."""
    if beta == 0:
        average = sum(p * r for p, r in zip(probs, rewards))
        return [p * (r - average) for p, r in zip(probs, rewards)]
    mean = sum(p * math.exp(beta * r) for p, r in zip(probs, rewards))
    return [p * (math.exp(beta * r) / mean - 1) / beta for p, r in zip(probs, rewards)]


def expected_update(probs, rewards, beta, n):
    """The estimator's expectation: every group of n pulls from three arms, weighted by its multinomial probability."""
    counts = torch.tensor([(i, j, n - i - j) for i in range(n + 1) for j in range(n + 1 - i)])
    log_chances = (counts * torch.tensor(probs, dtype=torch.float64).log() - torch.lgamma(counts.double() + 1)).sum(1)
    arms = torch.arange(3).repeat(len(counts)).repeat_interleave(counts.flatten()).view(-1, n)
    advantages = risk_sensitive_advantage(torch.tensor(rewards, dtype=torch.float64)[arms], beta)
    updates = torch.zeros(len(counts), 3, dtype=torch.float64).scatter_add_(1, arms, advantages / n)
    return (log_chances + math.lgamma(n + 1)).exp() @ updates


def command(*arguments):
    bandit.main([str(a) for a in arguments])


def test_the_landscape_has_its_optima_at_arms_40_and_75_and_the_policy_starts_at_the_lower_one():
    rewards, logits = bandit.landscape()
    assert rewards.shape == logits.shape == (100,) and rewards.argmax() == 40
    assert rewards[40] == pytest.approx(1.0, abs=1e-6) and rewards[75] == pytest.approx(0.6, abs=1e-5)
    weights = torch.tensor([math.exp(-((x - 75) ** 2) / 50) + 0.1 for x in range(100)], dtype=torch.float64)
    torch.testing.assert_close(logits.softmax(0), weights / weights.sum())
    assert logits.mean().abs() < 1e-12


@pytest.mark.parametrize("beta", [-3.0, 0.0, 2.0, 64.0])
def test_an_update_is_a_step_along_the_gradient_that_autograd_finds(beta):
    rewards, start = bandit.landscape()
    uniforms = torch.rand(1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    logits = start.repeat(1, 1)
    before = bandit.update(logits, rewards, beta, uniforms, lr=0.1)
    arms = (start.softmax(0).cumsum(0)[None] < uniforms.T).sum(1)  # the inverse of the distribution, by counting
    theta = start.clone().requires_grad_()
    advantages = risk_sensitive_advantage(rewards[arms][None], beta)[0]
    (advantages * theta.log_softmax(0)[arms]).mean().backward()
    torch.testing.assert_close(logits[0], start + 0.1 * theta.grad)
    assert before.item() == pytest.approx((start.softmax(0) * rewards).sum().item())


@pytest.mark.parametrize("beta", [0.0, 2.0, 8.0])
def test_the_sampled_update_agrees_with_its_exact_expectation_within_its_standard_error(beta):
    repeats = 200_000
    probs, rewards = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), torch.tensor(REWARDS, dtype=torch.float64)
    logits = probs.log().repeat(repeats, 1)
    uniforms = torch.rand(repeats, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bandit.update(logits, rewards, beta, uniforms, lr=1.0)
    change = logits - probs.log()
    error = (change.mean(0) - expected_update(probs.tolist(), REWARDS, beta, 4)).abs()
    assert (error < 4 * change.std(0) / math.sqrt(repeats)).all(), error


@pytest.mark.parametrize("n", [2, 3, 16, 64])
def test_the_expected_update_at_beta_zero_is_exactly_1_minus_1_over_n_of_the_gradient(n):
    expected = (1 - 1 / n) * torch.tensor(exact_gradient(POLICY, REWARDS, 0), dtype=torch.float64)
    torch.testing.assert_close(expected_update(POLICY, REWARDS, 0, n), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("beta", [2, 8])
def test_the_expected_update_tends_to_theorem_1_as_the_group_grows(beta):
    exact = torch.tensor(exact_gradient(POLICY, REWARDS, beta), dtype=torch.float64)
    errors = [(expected_update(POLICY, REWARDS, beta, n) - exact).abs().max().item() for n in (4, 16, 64, 128)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.2 * errors[0], errors


@pytest.mark.parametrize("beta, change", [(0, -4.77e-4), (4, -4.85e-5), (8, 3.58e-4), (16, 9.04e-4), (32, 5.17e-4)])
def test_the_worked_example_of_the_lemmas_holds_to_three_digits(beta, change):
    computed = bandit.one_step_change(*bandit.EXAMPLE, beta).item()
    assert f"{computed:.2e}" == f"{change:.2e}"
    gradient = exact_gradient(POLICY, REWARDS, beta)  # and to all digits, by the derivative of the softmax
    assert computed == pytest.approx(0.01 * (gradient[0] - sum(p * g for p, g in zip(POLICY, gradient))), rel=1e-9)


def test_the_one_step_change_is_what_a_small_exact_step_does_to_random_policies():
    arms, rewards = bandit.random_bandits(20, seed=5)
    for beta in (0, 3, 50):
        changes = bandit.one_step_change(arms, rewards, beta)
        for group, reward, change in zip(arms.tolist(), rewards.tolist(), changes.tolist()):
            probs = [group.count(arm) / 200 for arm in range(10)]
            step = 1e-6 * torch.tensor(exact_gradient(probs, reward, beta), dtype=torch.float64)
            after = (torch.tensor(probs, dtype=torch.float64).log() + step).softmax(0)
            best = reward.index(max(reward))
            assert change == pytest.approx((after[best].item() - probs[best]) / 1e-6, abs=1e-6)


def test_lemma_2_the_standard_gradient_lowers_the_best_arm_of_some_policies():
    falls = bandit.one_step_change(*bandit.random_bandits(1_000), 0) < 0
    assert 50 < falls.sum() < 500


def test_lemmas_3_and_4_beta_raises_the_best_arm_of_1000_random_policies_and_then_as_1_over_beta():
    arms, rewards = bandit.random_bandits(1_000)
    probs = torch.stack([(arms == arm).double().mean(1) for arm in range(10)], 1)
    assert probs.min() == 1 / 200 and probs.amax(1).min() < 0.3 and probs.max() > 0.9  # nearly even to nearly settled
    best = torch.nn.functional.one_hot(rewards.argmax(1), 10).double()
    p = (probs * best).sum(1)
    limit = p * ((1 - p) ** 2 + (probs * (1 - best)).square().sum(1))
    for beta in (1e4, 1e5, 1e6):
        assert (bandit.one_step_change(arms, rewards, beta) > 0).all()
    torch.testing.assert_close(1e6 * bandit.one_step_change(arms, rewards, 1e6), limit)


def test_the_risk_neutral_policy_stays_and_the_risk_seeking_one_leaves():
    curve = bandit.run([0, 8], seeds=5, steps=5_000, lr=0.1, batch=16)
    assert curve.shape == (5_001, 2, 5)
    neutral, seeking = curve[-1]
    assert ((neutral - 0.6).abs() < 0.01).all() and (seeking > 0.9).all(), curve[-1]
    updates = bandit.updates_until_escape(curve)
    assert updates[0].isinf().all() and (updates[1] < 4_000).all() and (updates[1] > 2_000).all()
    first = int(updates[1, 0])
    assert curve[first - 1, 1, 0] < 0.8 <= curve[first, 1, 0]


def test_the_same_seed_gives_the_same_numbers_whatever_else_runs_beside_it():
    run = partial(bandit.run, steps=300, lr=0.1, batch=16)
    both = run([0, 8], seeds=3, seed=4)
    assert torch.equal(both, run([0, 8], seeds=3, seed=4))
    torch.testing.assert_close(run([8], seeds=2, seed=5)[:, 0], both[:, 1, 1:], rtol=1e-12, atol=0)
    assert not torch.allclose(both[-1, 1, 0], both[-1, 1, 1], rtol=1e-6)  # and another seed other ones


BAD = [
    ["--steps", "0"], ["--steps", "2.5"], ["--steps", "10000000000"], ["--seeds", "0"], ["--seeds", "nan"],
    ["--batch", "1"], ["--lr", "0"], ["--lr", "nan"], ["--lr", "inf"], ["--seed", "-1"], ["--seed", "1" + 30 * "0"],
    ["--betas"], ["--betas", "nan"], ["--betas", "2", "inf"], ["--betas", "two"], ["--betas", "-1001"],
    ["--lemmas", "--advantages"], ["--bogus"], ["extra"], ["--out", bandit.__file__], ["--out", bandit.__file__ + "/x"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", BAD, ids=lambda arguments: " ".join(map(os.path.basename, arguments)))
def test_a_bad_option_of_the_bandit_ends_in_one_sentence_and_status_2(arguments, tmp_path, capsys):
    (tmp_path / "bandit.png").write_text("kept")
    with pytest.raises(SystemExit) as stop:
        command("--out", tmp_path, *arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("bandit.py: ") and err.count("\n") == 1 and len(err) > 30
    assert [f.name for f in tmp_path.iterdir()] == ["bandit.png"] and (tmp_path / "bandit.png").read_text() == "kept"


PEAKS = "β = 0 0.500 0.117 β = 2 0.269 0.054 β = 4 0.119 0.031 β = 8 0.018 0.016"  # 1/(1+e^(β/2)), mean |Â| at 15 of 16
COMMANDS = [
    ("bandit", ["--steps", 40, "--seeds", 2, "--betas", 8, 0, -1], ["8 0.37", "0/2 never"]),
    ("lemmas", ["--lemmas", "--betas", 0, 16], ["0 -4.8e-04", "16 9.0e-04", "for 1,000 of the 1,000"]),
    ("advantages", ["--advantages"], ["pass@4 0.250 0.000", PEAKS]),  # pass@4 is silent where β isn't
]


@pytest.mark.parametrize("name, arguments, said", COMMANDS, ids=[name for name, *_ in COMMANDS])
def test_each_command_prints_its_table_and_draws_its_picture(name, arguments, said, tmp_path, capsys):
    command(*arguments, "--out", tmp_path / "new" / "folder")
    printed = " ".join(capsys.readouterr().out.split())
    assert all(words in printed for words in said), printed
    assert (tmp_path / "new" / "folder" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_bandit_runs_without_a_display_and_without_transformers(tmp_path):
    code = "import sys; sys.modules['transformers'] = None; import bandit; bandit.main(sys.argv[1:])"
    arguments = ["--steps", "3", "--seeds", "1", "--out", str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=Path(bandit.__file__).parent, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "bandit.png").exists()


# --- the same advantage inside TRL and verl -----------------------------------------------------------------------


@pytest.fixture
def trl_rs_grpo(monkeypatch):
    """The module experiments/trl_rs_grpo.py, where TRL is installed."""
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    return importlib.import_module("trl_rs_grpo")


def trl_config(folder, **settings):
    """TRL's settings for a tiny run on the CPU."""
    from trl import GRPOConfig

    settings = dict(scale_rewards="none", bf16=False, use_cpu=True) | settings
    return GRPOConfig(output_dir=str(folder), save_strategy="no", report_to=[], disable_tqdm=True, **settings)


def test_trls_loss_sees_our_advantages_in_training_and_in_evaluation(trl_rs_grpo, tmp_path):
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    beta, rewards, seen = 2.0, {"train": {}, "eval": {}}, {"train": [], "eval": []}
    model = AutoModelForCausalLM.from_pretrained(ROOT / "countdown-base")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "countdown-base")

    def reward(prompts, completions, completion_ids, **rest):  # continuous, so that scaling or reordering would show
        batch = [sum(i * token for i, token in enumerate(ids, 1)) % 17 / 8 for ids in completion_ids]
        for prompt, ids, value in zip(prompts, completion_ids, batch):
            rewards["train" if trainer.model.training else "eval"].setdefault(prompt, []).append((tuple(ids), value))
        return batch

    class Watched(trl_rs_grpo.RSGRPOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            for row, advantage in enumerate(inputs["advantages"].tolist()):
                prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
                ids = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()]
                text = tokenizer.decode(prompt, skip_special_tokens=True)
                seen["train" if model.training else "eval"].append((text, tuple(ids.tolist()), advantage))
            return super().compute_loss(model, inputs, *args, **kwargs)

    problems = ["3,4,5,6=21:", "1,2,3,4=24:", "2,2,7,9=18:", "5,6,8,9=30:", "6,9,9,12=36:", "5,7,7,12=7:"]
    problems = [{"prompt": problem} for problem in problems]
    trainer = Watched(
        model=model,
        reward_funcs=reward,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(problems[:4]),
        eval_dataset=datasets.Dataset.from_list(problems[4:]),
        args=trl_config(
            tmp_path,
            max_steps=1,
            num_generations=4,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,  # so that TRL shuffles the 16 rows and splits them in two
            num_generations_eval=3,
            per_device_eval_batch_size=6,
            max_completion_length=12,
            temperature=3.0,  # so that the completions of a prompt differ
        ),
        beta_risk=beta,
    )
    trainer.train()
    logged = list(trainer._logs["advantages"])
    trainer.evaluate()

    for mode, samples, rows in (("train", 4, 16), ("eval", 3, 6)):
        expected = {}
        for prompt, group in rewards[mode].items():
            advantages = risk_sensitive_advantage(torch.tensor([[value for _, value in group]]), beta)[0]
            assert len(group) == samples
            expected |= {(prompt, ids): a.item() for (ids, _), a in zip(group, advantages)}
        assert len(seen[mode]) == rows and len({a for _, _, a in seen[mode]}) > 3  # there is a signal
        for prompt, ids, advantage in seen[mode]:
            assert advantage == pytest.approx(expected[prompt, ids], abs=1e-5)
        if mode == "train":  # what log_completions prints, in the order of generation
            in_order = [expected[prompt, ids] for prompt, group in rewards[mode].items() for ids, _ in group]
            assert logged == pytest.approx(in_order, abs=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_group_that_lies_across_two_trl_processes_is_one_group(trl_rs_grpo, monkeypatch, training):
    trainer_class = trl_rs_grpo.RSGRPOTrainer
    rewards = torch.tensor([[0.0, 1, 0, 0], [1, 1, 0, 1], [0, 0, 0.5, 0]])  # two processes hold six of these each
    shifted = (rewards - rewards.mean(1, keepdim=True)).flatten()

    def part(process: int) -> list[float]:
        trainer = trainer_class.__new__(trainer_class)  # one process, without a model
        trainer.beta_risk, trainer._scored = 3.0, torch.ones(12, dtype=torch.bool)
        trainer.num_generations, trainer.num_generations_eval = (4, 2) if training else (2, 4)
        trainer.model = SimpleNamespace(training=training)
        trainer.accelerator = SimpleNamespace(process_index=process, gather=lambda mine: shifted)
        trainer._logs = {"advantages": deque([7.0] + shifted.tolist(), maxlen=13)}
        mine = {"advantages": shifted[6 * process : 6 * process + 6], "other": 1}
        monkeypatch.setattr(trainer_class.__base__, "_generate_and_score_completions", lambda self, inputs: mine)
        output = trainer._generate_and_score_completions([])
        assert output["other"] == 1
        assert list(trainer._logs["advantages"]) == pytest.approx([7.0] + expected.tolist(), abs=1e-6)
        return output["advantages"].tolist()

    expected = risk_sensitive_advantage(rewards, 3.0).flatten()
    assert part(0) + part(1) == pytest.approx(expected.tolist(), abs=1e-6)


def test_a_completion_that_no_reward_function_judged_gets_zero_and_leaves_trls_group_alone(trl_rs_grpo, monkeypatch):
    trainer_class = trl_rs_grpo.RSGRPOTrainer
    nan = torch.nan
    by_function = torch.tensor([[1, nan], [nan, 0], [nan, nan], [0, 0], [nan, nan], [nan, nan], [nan, nan], [nan, nan]])
    monkeypatch.setattr(trainer_class.__base__, "_calculate_rewards", lambda self, *args: by_function)
    trainer = trainer_class.__new__(trainer_class)
    assert trainer._calculate_rewards([], [], [], []) is by_function
    shifted = torch.tensor([2 / 3, -1 / 3, 0, -1 / 3, 0, 0, 0, 0])  # TRL's: the mean of the judged, 0 for the others
    advantages = trl_rs_grpo.regrouped_advantage(shifted, trainer._scored, 4, 2.0)
    a = risk_sensitive_advantage(torch.tensor([[1.0, 0, 0]]), 2.0)[0].tolist()
    assert advantages.tolist() == pytest.approx([a[0], a[1], 0, a[2], 0, 0, 0, 0], abs=1e-6)
    assert (advantages[[2, 4, 5, 6, 7]] == 0).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"scale_rewards": "group"},
        {"scale_rewards": "batch"},
        {"scale_rewards": True},
        {"multi_objective_aggregation": "normalize_then_sum"},
    ],
)
def test_trls_other_scalings_are_refused_in_a_sentence(trl_rs_grpo, tmp_path, settings):
    message = f"^{next(iter(settings))} is '.*', but must be '.*': RS-GRPO needs unscaled rewards$"
    with pytest.raises(ValueError, match=message):
        trl_rs_grpo.RSGRPOTrainer("no-such-model", [], trl_config(tmp_path, **settings))


def test_the_trl_trainer_refuses_an_infinite_beta_and_missing_settings(trl_rs_grpo, tmp_path):
    with pytest.raises(ValueError, match="beta must be finite"):
        trl_rs_grpo.RSGRPOTrainer("no-such-model", [], trl_config(tmp_path), beta_risk=float("inf"))
    with pytest.raises(ValueError, match="scale_rewards is None"):
        trl_rs_grpo.RSGRPOTrainer("no-such-model", [], None)


def test_the_trl_script_trains_on_a_jsonl_of_problems_and_answers(trl_rs_grpo, monkeypatch, tmp_path, capsys):
    made = {}

    class Trainer:
        def __init__(self, *args, **settings):
            made.update(settings, model=args[0], reward=args[1], config=args[2])

        train = save_model = lambda self: None

    monkeypatch.setattr(trl_rs_grpo, "RSGRPOTrainer", Trainer)
    (tmp_path / "train.jsonl").write_text('{"problem": "What is 1 + 1?", "answer": "2"}\n')
    common = ["--model", "m", "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    trl_rs_grpo.main([*common, "--data", str(tmp_path / "train.jsonl"), "--beta_risk", "4", "--num_generations", "8"])
    assert made["beta_risk"] == 4 and made["model"] == "m"
    assert (made["config"].scale_rewards, made["config"].num_generations, made["config"].beta) == ("none", 8, 0)
    (row,) = made["train_dataset"]
    assert row["prompt"][0]["content"].startswith("What is 1 + 1?\n") and row["answer"] == "2"
    texts = [[{"role": "assistant", "content": text}] for text in ("so \\boxed{2}", "so \\boxed{3}", "\\boxed{42}")]
    assert made["reward"](completions=texts, answer=["2", "2", "42"], extra=1) == [1, 0, 1]

    (tmp_path / "other.jsonl").write_text('{"text": "?"}\n')
    with pytest.raises(SystemExit):
        trl_rs_grpo.main([*common, "--data", str(tmp_path / "other.jsonl")])
    assert "a row without a problem and its answer" in capsys.readouterr().err


@pytest.fixture
def verl_registry(monkeypatch):
    """What experiments/verl_rs_grpo.py registers, in place of an installed verl: {name: function}."""
    registry = {}
    names = ("verl", "verl.trainer", "verl.trainer.ppo", "verl.trainer.ppo.core_algos")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[names[-1]].register_adv_est = lambda name: lambda function: registry.setdefault(name, function)
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    monkeypatch.delitem(sys.modules, "verl_rs_grpo", raising=False)
    importlib.import_module("verl_rs_grpo")
    yield registry
    sys.modules.pop("verl_rs_grpo")


@pytest.mark.parametrize(("config", "beta"), [(None, 2.0), ({}, 2.0), ({"rs_beta": 4}, 4.0), ({"rs_beta": 0}, 0.0)])
def test_verl_gets_our_advantages_for_shuffled_groups_of_unequal_sizes(verl_registry, config, beta):
    groups = {"a": [1.0, 0, 0, 0], "b": [0.2, 0.9, 0.4], "c": [1.0], "d": [1.0, 1]}
    rows = [
        (name, reward, advantage)
        for name, rewards in groups.items()
        for reward, advantage in zip(rewards, risk_sensitive_advantage(torch.tensor([rewards]), beta)[0])
    ]
    rows = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    lengths = torch.arange(len(rows)) % 3 + 2
    mask = (torch.arange(6) < lengths[:, None]).long()  # (B, T), int64 as verl's
    token_rewards = torch.zeros(mask.shape)
    for row, (_, reward, _) in enumerate(rows):  # half on the first token, half on the last
        token_rewards[row, 0] += reward / 2
        token_rewards[row, lengths[row] - 1] += reward / 2
    before = token_rewards.clone()

    advantages, returns = verl_registry["rs_grpo"](
        token_level_rewards=token_rewards, response_mask=mask, index=[name for name, _, _ in rows], config=config
    )
    assert advantages.shape == returns.shape == mask.shape and advantages.dtype == torch.float32
    for row, (_, _, advantage) in enumerate(rows):
        n = lengths[row]
        assert advantages[row, :n].tolist() == pytest.approx([advantage.item()] * n, abs=1e-6)
        assert (advantages[row, n:] == 0).all()
    assert torch.equal(advantages, returns) and torch.equal(token_rewards, before)


def test_verls_group_ids_may_be_objects_numbers_or_a_tensor(verl_registry):
    import numpy as np

    rewards, mask = torch.tensor([[0.0], [1], [1], [1]]), torch.ones(4, 1)
    expected = risk_sensitive_advantage(torch.tensor([[0.0, 1]]), 2.0)[0].tolist()
    for index in (np.array(["x", "y", "x", "y"], dtype=object), np.array([5, 0, 5, 0]), torch.tensor([5, 0, 5, 0])):
        advantages, _ = verl_registry["rs_grpo"](rewards, mask, index)
        assert advantages[:, 0].tolist() == pytest.approx([expected[0], 0, expected[1], 0], abs=1e-6)


# --- the static cache of experiments/static_decoding.py ------------------------------------------------------------


def draw_static(policy, samples=8, max_tokens=12, temperature=1.0, seed=0, prompts=PROMPTS, **options):
    ids, mask = encode(policy, prompts)
    generator = torch.Generator().manual_seed(seed)
    config = Config(max_tokens=max_tokens, temperature=temperature)
    return sample_static(policy, ids, mask, samples, config, generator, **options)


def assert_same(rollouts: Rollouts, others: Rollouts):
    for name in ("prompt_ids", "prompt_mask", "owner", "ids", "mask"):
        ours, theirs = getattr(rollouts, name), getattr(others, name)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    assert rollouts.entropy == pytest.approx(others.entropy, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("max_tokens", [1, 2, 12, 40])
def test_greedy_completions_with_the_static_cache_equal_those_of_sample(policy, max_tokens):
    prompts = [problem.prompt for problem in countdown_problems(40, held_out=True)] + PROMPTS
    static = draw_static(policy, samples=2, max_tokens=max_tokens, temperature=1e-6, prompts=prompts)
    assert_same(static, draw(policy, samples=2, max_tokens=max_tokens, temperature=1e-6, prompts=prompts))
    assert max_tokens <= 2 or len(set(static.mask.sum(1).tolist())) > 1  # rows ended at different times


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_static_samples_are_distributed_as_the_models_softmax_at_the_temperature(policy, temperature):
    rollouts = draw_static(policy, samples=8000, max_tokens=2, temperature=temperature)
    assert_drawn_from_the_softmax(policy, rollouts, temperature)


def test_a_static_completion_ends_with_its_first_eos_and_its_entropy_is_that_of_the_sampled_tokens(policy):
    rollouts = draw_static(policy, samples=64, temperature=0.8)
    eos = policy.tokenizer.eos_token_id
    rows = [completion for _, completion in unpadded(rollouts)]
    assert all(eos not in row[:-1] for row in rows)
    assert 10 < sum(row[-1] == eos for row in rows) < len(rows) and all(len(row) == 12 for row in rows if row[-1] != eos)
    assert (rollouts.mask.long().diff(dim=1) <= 0).all() and not rollouts.ids[~rollouts.mask].any()
    assert rollouts.entropy == pytest.approx(mean_entropy(policy, rollouts, 0.8), rel=1e-4)


def test_static_sampling_stops_soon_after_every_row_has_ended(policy):
    calls = []
    policy.model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    rollouts = draw_static(policy, samples=4, max_tokens=500)
    longest = rollouts.mask.sum(1).max().item()
    assert rollouts.ids.shape[1] == longest < 400 and longest <= len(calls) < longest + static_decoding.CHECK_EVERY
    assert calls == [len(PROMPTS)] + [4 * len(PROMPTS)] * (len(calls) - 1)  # each prompt once, then shapes that never change


class Tape(TorchDispatchMode):
    """A CUDA graph's rules on a CPU: what is recorded isn't executed, a replay runs it on the very same tensors.

    Python doesn't run again, so a shape, number or branch that changes from step to step shows as a wrong result.
    """

    def __enter__(self):
        self.calls, self.undo = [], []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), "waits for the GPU"
        for argument, value in zip(func._schema.arguments, args):
            if argument.alias_info and argument.alias_info.is_write:
                self.undo.append((value, value.clone()))
        output = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, output))
        return output

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, before in reversed(self.undo):
            tensor.copy_(before)

    def replay(self):
        for func, args, kwargs, output in self.calls:
            for old, new in zip(tree_leaves(output), tree_leaves(func(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def graphs_on_cpu(monkeypatch):
    """`captured` as it stands, with a tape for the graph and no streams."""
    stream, tapes = SimpleNamespace(wait_stream=lambda other: None), []
    monkeypatch.setattr(static_decoding, "side_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: tapes.append(Tape()) or tapes[-1])
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)
    return tapes


def architectures(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    sizes = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.15, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    yield LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    yield Qwen2ForCausalLM(Qwen2Config(**sizes))
    yield Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16))


@pytest.mark.parametrize("temperature", [1e-6, 1.0])
def test_a_step_recorded_once_and_replayed_draws_the_same_tokens(policy, graphs_on_cpu, temperature):
    for model in architectures(policy.tokenizer):
        each = policy._replace(sampler=model.eval())
        plain = draw_static(each, max_tokens=40, temperature=temperature, graph=False)
        assert_same(draw_static(each, max_tokens=40, temperature=temperature, graph=True), plain)
        assert graphs_on_cpu and graphs_on_cpu[-1].calls
        if temperature < 1:
            assert_same(draw(each, max_tokens=40, temperature=temperature), plain)


def test_static_decoding_refuses_a_model_with_a_sliding_window(policy):
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=len(policy.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    with pytest.raises(BadInput, match="full attention"):
        draw_static(policy._replace(sampler=MistralForCausalLM(config).eval()))


def test_a_run_trains_with_static_decoding_in_the_place_of_sample(tiny, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(rs_grpo, "sample", lambda *args: calls.append(args) or sample_static(*args))
    train(small(tiny, tmp_path, steps=2))
    assert len(calls) >= 4 and len(read_metrics(tmp_path)) == 2  # two steps, and evaluations before and after


# --- real models, real mathematics --------------------------------------------------------------------------------

ARCHITECTURES = ["llama", "qwen2", "qwen3"]


@pytest.fixture(scope="session", params=ARCHITECTURES)
def architecture(request, tmp_path_factory) -> str:
    """A folder with a random model of the architecture, grouped-query attention, and the embedded model's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "countdown-base")
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        request.param, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.15, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("changes", [{}, {"checkpointing": True}, {"precision": "bfloat16", "updates": 2}], ids=str)
def test_each_architecture_of_the_paper_trains_for_two_steps(architecture, tmp_path, changes):
    before = load_policy(Config(model=architecture, device="cpu")).model.state_dict()
    train(small(architecture, tmp_path / "run", steps=2, **changes))
    assert [line["failed_updates"] for line in trajectory(tmp_path / "run")] == [0, 0]
    moved = [name for name, w in weights(tmp_path / "run").items() if not torch.equal(w, before[name])]
    assert set(moved) >= {name for name, _ in load_policy(Config(model=architecture)).model.named_parameters()} - {"lm_head.weight"}


def test_a_checkpointed_model_learns_the_same_and_still_samples_through_the_cache(architecture):
    """transformers' own checkpointed layers drop the cache, before 5.24 with only a warning while sampling too."""
    plain, policy = (load_policy(Config(model=architecture, device="cpu", checkpointing=on)) for on in (False, True))
    shapes, layers = [], []
    policy.model.base_model.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    policy.model.base_model.layers[0].self_attn.register_forward_hook(lambda *_: layers.append(1))
    rollouts = draw(plain, temperature=0.7)
    advantages = risk_sensitive_advantage(mixed_rewards(rollouts), 2.0)
    with torch.no_grad():
        whole = completion_logprobs(policy.model, rollouts, 0.7)
    assert torch.allclose(whole, completion_logprobs(plain.model, rollouts, 0.7), atol=1e-5)
    assert shapes == [(len(rollouts.ids), rollouts.prompt_ids.shape[1] + rollouts.ids.shape[1] - 1)] and len(layers) == 1

    for each in (plain, policy):
        policy_gradient(each.model, [(rollouts, advantages)], Config(temperature=0.7))
    assert len(layers) == 3  # forward, and again in the backward pass
    ours, reference = gradient(policy.model), gradient(plain.model)
    assert (ours - reference).norm() < 1e-5 * reference.norm()
    shapes.clear()
    again = draw(policy, temperature=0.7)
    assert torch.equal(again.ids, rollouts.ids) and {shape[1] for shape in shapes[1:]} == {1}


def test_equal_completions_of_a_prompt_are_computed_once_with_the_gradient_of_all(policy, monkeypatch):
    computed, original = [], rs_grpo.completion_logprobs
    monkeypatch.setattr(
        rs_grpo, "completion_logprobs", lambda m, part, t: computed.append(len(part.ids)) or original(m, part, t)
    )
    rollouts = draw(policy, samples=40, max_tokens=2, temperature=0.3, prompts=[*PROMPTS, PROMPTS[0]])
    rows = list(unpadded(rollouts))
    advantages = torch.randn(4, 40, generator=torch.Generator().manual_seed(2))
    loss = policy_gradient(policy.model, [(rollouts, advantages)], Config(temperature=0.3, micro_tokens=200))
    ours = gradient(policy.model)
    different = {(owner, *completion) for owner, (_, completion) in zip(rollouts.owner.tolist(), rows)}
    assert sum(computed) == len(different) < 100 and len(computed) > 1  # equal prompts are groups of their own
    tokens = rollouts.mask.sum()
    plain = sum(
        -a * plain_logprobs(policy.model, *row, 0.3).sum() / tokens for a, row in zip(advantages.flatten(), rows)
    )
    plain.backward()
    reference = gradient(policy.model)
    assert loss == pytest.approx(plain.item(), abs=1e-5) and (ours - reference).norm() < 1e-4 * reference.norm()


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 100])
def test_chunked_log_probabilities_and_their_gradient_equal_the_plain_ones(rows, monkeypatch):
    torch.manual_seed(3)
    head, hidden, ids = torch.nn.Linear(8, 50, bias=False), torch.randn(17, 8, requires_grad=True), torch.randint(50, (17,))
    plain = torch.log_softmax(head(hidden) / 0.7, -1)[range(17), ids]
    upstream = torch.randn(17)
    reference = torch.autograd.grad(plain, (hidden, head.weight), upstream)
    sizes: list[int] = []
    head.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    monkeypatch.setattr(rs_grpo, "MAX_LOGITS", rows * 50)
    chunked = rs_grpo.token_logprobs(head, hidden, ids, 0.7)
    torch.testing.assert_close(chunked, plain)
    torch.testing.assert_close(torch.autograd.grad(chunked, (hidden, head.weight), upstream), reference)
    assert max(sizes) <= rows and sum(sizes) == (17 if rows >= 17 else 34)  # computed again, not kept


STEP_OF_A_LARGE_VOCABULARY = """
import sys, torch, rs_grpo
from transformers import LlamaConfig, LlamaForCausalLM
P, N, T, V = 4, 5, 26, 150_000
shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
model = LlamaForCausalLM(LlamaConfig(vocab_size=V, tie_word_embeddings=True, **shape)).eval()
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
ids, mask = torch.randint(V, (P * N, T)), torch.ones(P * N, T, dtype=torch.bool)
prompt = torch.randint(V, (P, 8))
rollouts = rs_grpo.Rollouts(prompt, torch.ones_like(prompt), torch.arange(P).repeat_interleave(N), ids, mask, 0.0)
peak = lambda: 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # ru_maxrss has the parent's too
before = peak()
rs_grpo.policy_gradient(model, [(rollouts, torch.randn(P, N))], rs_grpo.Config())
optimizer.step()
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is there only")
def test_a_step_with_a_vocabulary_of_150_000_never_holds_all_logits():
    """All of them are 4·20·26·150,000 bytes = 312 MB, and three times that with their softmax and gradient."""
    done = subprocess.run([sys.executable, "-c", STEP_OF_A_LARGE_VOCABULARY], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 4 * rs_grpo.MAX_LOGITS < int(done.stdout) < 5 * 4 * rs_grpo.MAX_LOGITS < 2.5 * 4 * 20 * 26 * 150_000


# --- several updates a batch, dynamic sampling ---


def test_the_second_update_has_the_gradient_of_a_hand_written_ppo_loss(policy):
    """π_old is the policy before the first update; every prompt is in one minibatch, with all its samples."""
    import copy

    config = Config(updates=2, prompts=5, micro_tokens=150, clip_low=0.1, clip_high=0.3, temperature=0.8)
    prompts = [*PROMPTS, "2,2,3,3=7:", "1,5,5,12=20:"]
    rollouts = draw(policy, samples=6, max_tokens=5, temperature=0.8, prompts=prompts)
    advantages = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    advantages[2] = 0  # a group without a signal
    old, rows = copy.deepcopy(policy.model), list(unpadded(rollouts))

    first, second = clipped_gradients(policy, [(rollouts, advantages)], config)
    first(policy.model, [(rollouts, advantages)], config)
    for mine, step in (([0, 2, 4], 1.0), ([1, 3], None)):
        terms, ratios, tokens = [], [], 0
        for i in mine:
            for j in range(6):
                prompt, completion = rows[6 * i + j]
                with torch.no_grad():
                    before = plain_logprobs(old, prompt, completion, 0.8)
                ratio = (plain_logprobs(policy.model, prompt, completion, 0.8) - before).exp()
                a, tokens = advantages[i, j], tokens + len(completion)
                terms += [torch.min(r * a, r.clamp(0.9, 1.3) * a) for r in ratio]
                ratios += [(r.item(), a.item()) for r in ratio]
        ours = gradient(policy.model)
        (-sum(terms) / tokens).backward()
        reference = gradient(policy.model)
        assert (ours - reference).norm() < 1e-4 * reference.norm()
        if step:  # here the ratio is 1, and the gradient the plain one
            assert all(r == pytest.approx(1, abs=1e-4) for r, _ in ratios)
            with torch.no_grad():
                for p in policy.model.parameters():
                    p.add_(0.05 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
            second(policy.model, [(rollouts, advantages)], config)
        else:  # ratios below, above and between the bounds (and within 1 ± 0.1), for advantages of both signs
            places = {(sum(r > bound for bound in (0.9, 1.1, 1.3)), a > 0) for r, a in ratios if a}
            assert len(places) == 8


def test_one_update_a_step_is_on_policy_and_computes_no_ratio(tiny, tmp_path, monkeypatch):
    scored, learned, logprobs = [], [], rs_grpo.completion_logprobs
    for module, name in ((rs_grpo, "policy_gradient"), (ppo, "clipped_gradient")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, original=original, name=name, **k: learned.append(name) or original(*a, **k))
        monkeypatch.setattr(module, "completion_logprobs", lambda *a: scored.append(torch.is_grad_enabled()) or logprobs(*a))
    train(small(tiny, tmp_path / "one", steps=2))
    assert learned == ["policy_gradient"] * 2 and all(scored)
    learned.clear()
    train(small(tiny, tmp_path / "two", steps=2, updates=2))
    assert learned == ["clipped_gradient"] * 4 and not all(scored)


@pytest.mark.parametrize("changes", [{"updates": 3}, {"precision": "bfloat16"}, {"checkpointing": True}], ids=str)
def test_every_way_to_learn_resumes_to_the_same_numbers(tiny, tmp_path, changes):
    train(small(tiny, tmp_path / "whole", steps=4, **changes))
    train(small(tiny, tmp_path / "run", steps=2, **changes))
    train(small(tiny, tmp_path / "run", steps=4, **changes), resume=True)
    assert same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("with_signal, bound, draws", [(1, 10, 4), (3, 10, 2), (4, 10, 1), (0, 2, 3), (1, 1, 2), (0, 0, 1)])
def test_dynamic_sampling_draws_until_enough_groups_have_a_signal_and_not_for_ever(
    tiny, tmp_path, monkeypatch, with_signal, bound, draws
):
    seen, original = [], rs_grpo.policy_gradient
    monkeypatch.setitem(ADVANTAGES, "graded", lambda r, c: graded(r, c) * (torch.arange(len(r)) < with_signal)[:, None])
    monkeypatch.setattr(rs_grpo, "policy_gradient", lambda m, batches, config: seen.append(len(batches)) or original(m, batches, config))
    train(small(tiny, tmp_path / "run", steps=2, dynamic_sampling=bound))
    assert seen == [draws] * 2
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["state"]["drawn"] == 2 * draws * 4
    assert bool(saved["optimizer"]["state"]) == (with_signal > 0)


# --- precision ---


def test_updates_too_small_for_bfloat16_are_kept_by_the_master_weights_and_the_sampler_is_their_rounding(
    tiny, tmp_path, monkeypatch
):
    """The trap of small trainers: a weight of 0.1 kept in bfloat16 moves by 0.0005 or not at all."""
    policies, products, original = [], [], rs_grpo.sample

    def watching(policy, *args):
        for sampling, learning in zip(policy.sampler.parameters(), policy.model.parameters()):
            assert sampling.dtype == torch.bfloat16 and learning.dtype == torch.float32
            assert torch.equal(sampling, learning.bfloat16())
        if not policies:
            layer = policy.model.base_model.layers[0].mlp.down_proj
            layer.register_forward_hook(lambda module, inputs, output: products.append(output.dtype))
        policies.append(policy)
        return original(policy, *args)

    monkeypatch.setattr(rs_grpo, "sample", watching)
    train(small(tiny, tmp_path / "run", lr=1e-6, precision="bfloat16", steps=3))
    assert set(products) == {torch.bfloat16}
    base, kept, lost = load_policy(Config(model=tiny, device="cpu")).model.state_dict(), 0, 0
    for name, trained in weights(tmp_path / "run").items():
        assert trained.dtype == torch.float32 and (trained - base[name]).abs().max() < 1e-5
        kept += (trained != base[name]).sum().item()
        lost += (base[name].bfloat16() + (trained - base[name]).bfloat16() == base[name].bfloat16()).sum().item()
    total = sum(w.numel() for w in base.values())
    assert kept > 0.5 * total and lost > 0.98 * total


def test_the_bfloat16_sampler_keeps_the_rotation_of_far_positions(tiny):
    """Rotary frequencies rounded to 8 bits turn position 500 by a radian too much or too little."""
    policy = load_policy(Config(model=tiny, device="cpu", precision="bfloat16"))
    for (name, sampling), (_, learning) in zip(policy.sampler.named_buffers(), policy.model.named_buffers()):
        assert torch.equal(sampling, learning), name


# --- tasks ---

DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on its own line after \"Answer:\"."
)


def dapo(problem: str, answer: str) -> dict:
    return {"prompt": [{"role": "user", "content": DAPO.format(problem)}], "reward_model": {"ground_truth": answer}}


# What stands on the hub, by hub id, configuration and split, and the columns of each; three problems and their answers.
PAIRS = [("What is 1+1?", "2"), ("Halve 1.\n\nAs a fraction.", r"\frac{1}{2}"), ("Six by seven?", "42")]
ON_THE_HUB = {
    "math12k train": ("hiyouga/math12k None train", lambda q, a: {"problem": q, "answer": a}),
    "math12k test": ("hiyouga/math12k None test", lambda q, a: {"problem": q, "answer": a}),
    "dapo17k train": ("BytedTsinghua-SIA/DAPO-Math-17k None train", dapo),
    "deepmath103k train": ("zwhe99/DeepMath-103K None train", lambda q, a: {"question": q, "final_answer": a, "r1_solution_1": "#### 7"}),
    "gsm8k train": ("openai/gsm8k main train", lambda q, a: {"question": q, "answer": f"It is <<3-1=2>>2.\n#### {a}"}),
    "gsm8k test": ("openai/gsm8k main test", lambda q, a: {"question": q, "answer": f"So\n#### {a}"}),
    "math500 test": ("HuggingFaceH4/MATH-500 None test", lambda q, a: {"problem": q, "solution": "...", "answer": a}),
    "aime24 test": ("HuggingFaceH4/aime_2024 None train", lambda q, a: {"id": 60, "problem": q, "solution": "...", "answer": a}),
    "aime25 test": ("MathArena/aime_2025 None train", lambda q, a: {"problem_idx": 1, "answer": a, "problem": q}),
    "hmmt24 test": ("MathArena/hmmt_feb_2024 None train", lambda q, a: {"problem": q, "answer": a}),
    "hmmt25 test": ("MathArena/hmmt_feb_2025 None train", lambda q, a: {"problem": q, "answer": a}),
    "cmimc25 test": ("MathArena/cmimc_2025 None train", lambda q, a: {"problem": q, "answer": a}),
}  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the datasets library that reads a local file per data set; returns what was asked for."""
    asked: list[str] = []

    def load_dataset(path, name=None, *, split):
        asked.append(f"{path} {name} {split}")
        file = tmp_path / "hub" / f"{path} {name} {split}.jsonl"
        if not file.exists():
            raise ConnectionError(f"Couldn't reach '{path}' on the Hub\nfor a reason of three lines\nin all")
        return [json.loads(line) for line in file.read_text().splitlines()]

    for place, row in ON_THE_HUB.values():
        write_rows(tmp_path / "hub" / f"{place}.jsonl", [row(*pair) for pair in PAIRS])
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(math_tasks, "start_verifier", lambda: None)  # a random model writes no box
    monkeypatch.setattr(math_tasks, "idle_verifiers", [])
    return asked


def write_rows(path: Path, rows: list) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def asked_of(problems) -> list[str]:
    return [problem.prompt for problem in problems]


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_each_named_set_is_read_from_its_place_and_its_columns(hub, name):
    short, use = name.split()
    assert math_tasks.load_problems(short, evaluating=use == "test") == dict(PAIRS)
    assert hub == [ON_THE_HUB[name][0]]
    assert {name.split()[0] for name in ON_THE_HUB} == set(math_tasks.HUB)


@pytest.mark.parametrize("name", [name.split()[0] for name in ON_THE_HUB if name.endswith("train")])
def test_each_named_training_set_trains_and_is_evaluated_on_another(hub, tiny, tmp_path, monkeypatch, name):
    monkeypatch.setitem(math_tasks.HUB, "other", ("hiyouga/math12k", None, "test", "other"))
    write_rows(tmp_path / "hub" / "hiyouga/math12k None other.jsonl", [{"problem": "2+2?", "answer": 4}])
    train(small(tiny, tmp_path / "run", steps=1, task=name, eval_task="other", prompts=3))
    assert len(trajectory(tmp_path / "run")) == 1


def test_each_of_dapos_repeated_problems_is_kept_once_without_its_instruction(hub, tmp_path):
    rows = [dapo(*PAIRS[i % 3]) for i in range(30)]
    write_rows(tmp_path / "hub" / "BytedTsinghua-SIA/DAPO-Math-17k None train.jsonl", rows)
    assert list(math_tasks.load_problems("dapo17k", evaluating=False).items()) == PAIRS


def test_a_file_is_split_by_a_hash_into_disjoint_parts_and_nothing_is_lost(hub, tmp_path):
    rows = [{"problem": f"How much is {i} and 1?", "answer": i + 1, "more": [i]} for i in range(300)]
    config = partial(Config, eval_problems=1000)
    file = write_rows(tmp_path / "own.jsonl", rows + rows[:50])
    task = rs_grpo.load_task(config(task=file))
    assert sorted(asked_of(task.train + task.held_out)) == sorted(row["problem"] for row in rows)
    assert 10 < len(task.held_out) < 60 and all(p.answer == str(int(p.prompt.split()[3]) + 1) for p in task.train)
    fewer = rs_grpo.load_task(config(task=write_rows(tmp_path / "half.jsonl", rows[:150]), seed=1))
    assert set(fewer.train) < {p._replace(task="half") for p in task.train}  # neither order, size nor seed moves a problem

    bench = write_rows(tmp_path / "bench.jsonl", [{"question": row["problem"] + " ", "answer": "#### 7"} for row in rows[:100]])
    task = rs_grpo.load_task(config(task=file, eval_task=bench))
    assert asked_of(task.held_out) == [row["problem"] for row in rows[:100]]  # all of them, and none is trained on
    assert asked_of(task.train) == [row["problem"] for row in rows[100:]] and {p.answer for p in task.held_out} == {"7"}
    task = rs_grpo.load_task(Config(task=file, eval_task=bench, eval_problems=5, train_problems=7))
    assert len(task.held_out) == 5 and len(task.train) == 7


def test_a_line_is_what_ends_in_a_newline_whatever_characters_a_problem_holds(tmp_path):
    texts = ["1\u2028 2\x85 3\x0c", "é", "  4 "]
    lines = [json.dumps({"problem": text, "answer": "1"}, ensure_ascii=False) for text in texts]
    (tmp_path / "own.jsonl").write_bytes(("\r\n\n".join(lines) + "\n\n").encode())
    assert list(math_tasks.load_problems(str(tmp_path / "own.jsonl"), False)) == [text.strip() for text in texts]


def test_several_tasks_are_evaluated_with_pass_at_k_for_each(verifiers, hub, tiny, tmp_path, capsys):
    own = write_rows(tmp_path / "own.jsonl", [{"problem": f"{i}?", "answer": str(i)} for i in range(20)])
    flags = f"--model {tiny} --task {own} --eval-task gsm8k,aime24 --steps 1 --prompts 4 --samples 4 --eval-samples 64"
    main([*flags.split(), "--out", str(tmp_path / "run"), "--max-tokens", "3", "--device", "cpu"])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "eval.json").read_text())
    for result in results.values():
        if "tasks" not in result:
            continue
        assert set(result["tasks"]) == {"gsm8k", "aime24"} and len(result["correct"]) == 6
        for name, counts in (("gsm8k", result["correct"][:3]), ("aime24", result["correct"][3:])):
            expected = [100 * sum(pass_at_k(64, c, k) for c in counts) / 3 for k in (1, 2, 4, 8, 16, 32, 64)]
            assert list(result["tasks"][name].values()) == pytest.approx(expected)
        assert result["correct"][0] > 0  # the last number is 2 now and then
    assert all(f"{name}" in printed for name in ("gsm8k", "aime24")) and printed.count("pass@64") == 3
    assert "a prompt as the model sees it" in printed


MALFORMED_FILES = {
    "missing": None,
    "empty": b"",
    "one problem": b'{"problem": "1?", "answer": "1"}\n',
    "no JSON": b"problem,answer\n1?,1\n",
    "cut short": b'{"problem": "1?", "answer": "1"}\n{"problem": "2?", "ans',
    "no answer": b'{"problem": "1?"}\n',
    "other columns": b'{"text": "1?", "label": "1"}\n',
    "a number": b"5\n",
    "a list": b'["problem", "answer"]\n',
    "a text": b'"problem"\n',
    "null": b"null\n",
    "not UTF-8": b'{"problem": "\xff", "answer": "1"}\n',
    "half a character": b'{"problem": "\\ud800 1?", "answer": "1"}\n{"problem": "2?", "answer": "1"}\n',
    "deep": b"[" * 200_000 + b"\n",
}


@pytest.mark.parametrize("name", MALFORMED_FILES)
def test_a_malformed_file_gets_one_sentence_and_exit_status_2(hub, name, tmp_path, capsys, tiny):
    file = tmp_path / "own.jsonl"
    if MALFORMED_FILES[name] is not None:
        file.write_bytes(MALFORMED_FILES[name])
    assert "own.jsonl" in complaint(capsys, "--model", tiny, "--task", file, "--out", tmp_path / "run")
    good = write_rows(tmp_path / "good.jsonl", [{"problem": f"{i}?", "answer": "1"} for i in range(40)])
    if name != "one problem":  # enough to evaluate on
        message = complaint(capsys, "--model", tiny, "--task", good, "--eval-task", file, "--steps", 0, "--out", tmp_path / "other")
        assert "own.jsonl" in message


def test_without_the_hub_or_its_library_a_sentence_names_the_file_that_would_do(hub, capsys, tmp_path, monkeypatch):
    (tmp_path / "hub" / "openai/gsm8k main train.jsonl").unlink()
    message = complaint(capsys, "--task", "gsm8k", "--out", tmp_path / "run")
    assert "openai/gsm8k" in message and "Couldn't reach" in message and ".jsonl file with problem and answer" in message
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in complaint(capsys, "--task", "math12k", "--out", tmp_path / "run")


# --- prompts ---


@pytest.fixture
def talker(policy):
    """The tiny policy with a tokenizer of bytes that adds a BOS by itself, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["<s>", "</s>", *letters])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return policy._replace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"))


TEMPLATE = "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[model]{% endif %}"


@pytest.mark.parametrize(
    "template, instruction, expected",
    [
        (None, "", "<s>{}"),  # the compact Countdown
        (TEMPLATE, "", "<s>{}"),
        (None, "Box it.", "<s>{}\nBox it.\n\n"),
        (TEMPLATE, "Box it.", "<s>[user]{}\nBox it.[model]"),
        (TEMPLATE.removeprefix("<s>"), "Box it.", "[user]{}\nBox it.[model]"),  # a template without one means it
    ],
)
def test_a_prompt_goes_through_the_chat_template_if_there_is_one_and_has_one_bos(talker, template, instruction, expected):
    talker.tokenizer.chat_template = template
    problems = ["1+1?", "What is the half of é?"]
    ids, mask = encode(talker, problems, instruction)
    assert [talker.tokenizer.decode(row[m.bool()]) for row, m in zip(ids, mask)] == [expected.format(p) for p in problems]
    assert mask[0, 0] == 0 and mask[:, -1].all() and (ids == 0)[mask.bool()].sum() == 2 * expected.count("<s>")


def test_pretrained_models_are_told_what_the_reward_looks_for(hub, tmp_path):
    own = write_rows(tmp_path / "own.jsonl", [{"problem": f"{i}?", "answer": "1"} for i in range(40)])
    assert "step by step" in (told := rs_grpo.load_task(Config(task=own)).instruction) and r"\boxed{}" in told
    assert rs_grpo.load_task(Config(task=own, instruction="Be short.")).instruction == "Be short."
    assert rs_grpo.load_task(Config()).instruction == ""
    task = rs_grpo.load_task(Config(task="countdown-text", train_problems=50))
    assert "<answer>" in task.instruction and not {p.prompt for p in task.train} & {p.prompt for p in task.held_out}
    for problem in task.train:
        numbers, target = problem.answer
        assert ", ".join(map(str, numbers)) in problem.prompt and f"equals {target}." in problem.prompt


@pytest.mark.parametrize(
    "completion, reward",
    [
        ("<answer>4*(9-7)*(12-6)</answer>", 1),
        ("Let me see: 4+7 is <b>11</b>.\n<answer>\n 4 * (9-7) * (12-6) \n</answer> Done.", 1),
        ("4*(9-7)*(12-6)", 0),
        ("<answer>4*(9-7)*12</answer>", 0),
        ("<answer>4*(9-7)*(12-6)=48</answer>", 0),
        ("<answer>4*(9-7)*(12-6)", 0),
        ("4*(9-7)*(12-6)</answer>", 0),
        ("</answer>4*(9-7)*(12-6)<answer>", 0),
        ("<answer></answer>", 0),
        ("<answer>1</answer> no, <answer>4*(9-7)*(12-6)</answer>", 0),
        ("<answer>4*(9-7)*(12-6)</answer><answer>4*(9-7)*(12-6)</answer>", 0),
        ("<answer><answer>4*(9-7)*(12-6)</answer></answer>", 0),
        ("<answer>4*(9-7)*(12-6)<answer></answer>", 0),
        ("<answer>4*(9-7)*(12-6)</answer></answer>", 0),
        ("<ANSWER>4*(9-7)*(12-6)</ANSWER>", 0),
        ("<answer>" * 100_000, 0),
        ("<answer>" + "4" * 1_000_000 + "</answer>", 0),
        ("<answer>4" + "+0" * 99 + "</answer>", 0),
    ],
)  # fmt: skip
def test_countdown_in_words_is_judged_by_the_expression_between_the_only_answer_tags(completion, reward):
    started = time.perf_counter()
    assert more_tasks.tagged_rewards([completion, ""], [((4, 6, 7, 9, 12), 48)] * 2) == [reward, 0]
    assert time.perf_counter() - started < 0.1


def test_countdown_in_words_trains(tiny, tmp_path):
    train(small(tiny, tmp_path / "run", steps=1, task="countdown-text"))
    assert len(trajectory(tmp_path / "run")) == 1


# --- experiments/compare.py ---------------------------------------------------------------------------------------


def test_rescaled_advantages_have_one_mean_size_and_keep_their_proportions():
    advantages = grpo_advantage(torch.cat([group(1), group(8), group(16)]))
    scaled = compare.rescaled(advantages)
    assert scaled.abs().mean().item() == pytest.approx(0.1) and (scaled[2] == 0).all()
    assert torch.allclose(scaled / scaled[0, 0], advantages / advantages[0, 0])
    assert (compare.rescaled(torch.zeros(2, 4)) == 0).all()


def test_the_beta_of_constant_kl_weighs_each_group_by_ln_2_where_that_can_be_reached():
    """KL(softmax(βr) ‖ uniform) written out for c ones of 16; more than ln(16/c) no β can reach."""
    rewards = torch.cat([group(1), group(4), group(8), group(15), group(0), group(16)])
    beta = compare.beta_of_constant_kl(rewards)
    assert beta.shape == (6, 1)
    for b, c in zip(beta[:2, 0].tolist(), (1, 4)):
        right, wrong = (math.exp(b * r) / (c * math.exp(b) + 16 - c) for r in (1, 0))
        assert c * right * math.log(16 * right) + (16 - c) * wrong * math.log(16 * wrong) == pytest.approx(math.log(2))
    assert beta[2:, 0].tolist() == pytest.approx([compare.MOST_BETA] * 4)


def test_the_beta_of_accuracy_falls_from_8_to_0():
    assert compare.beta_of_accuracy(torch.cat([group(0), group(4), group(16)])).flatten().tolist() == [8, 6, 0]


def test_the_annealed_beta_falls_from_8_to_0_with_the_steps_that_the_runs_metrics_hold(tmp_path):
    config = Config(out=str(tmp_path), steps=4)
    for done, beta in enumerate((8, 6, 4, 2)):
        (tmp_path / "metrics.jsonl").write_text("{}\n" * done)
        assert compare.annealed_beta(config) == beta


def test_partial_credit_is_1_for_the_target_and_less_the_farther_from_it():
    answers = [((4, 7, 9, 12), 48)] * 6
    completions = ["9*7-12-4", "4*12+9-7", "4*12-9+7", "4*12", "4*12+9-7-7", "48"]  # 47, 50, 46, and three that don't count
    assert compare.partial_credit(completions, answers) == [0.5 / 2, 0.5 / 3, 0.5 / 3, 0, 0, 0]
    assert compare.partial_credit(["1+2+3+4", "1/2+3+4"], [((1, 2, 3, 4), 10), ((1, 2, 3, 4), 8)]) == [1, 1 / 3]


METHODS = {"base": compare.Method("base", {}), "rs2": compare.Method("ours", {}), "grpo": compare.Method("theirs", {})}


def some_results(correct: dict[str, list[list[int]]], n: int = 4) -> dict:
    """results.json with these counts, a list of problems for each seed."""
    runs = {name: {str(i): {"correct": c, "distinct": c} for i, c in enumerate(seeds)} for name, seeds in correct.items()}
    return {"settings": {"eval_samples": n}, "runs": runs}


def test_the_report_computes_pass_at_k_from_the_counts_of_every_problem():
    runs = report.Runs(some_results({"base": [[0, 1], [4, 2]]}), METHODS)
    assert runs.ks == [1, 2, 4]
    assert runs.pass_at_k["base"][0].tolist() == [[0, 0, 0], [25, 50, 100]]  # 1 − C(3,2)/C(4,2) = 1/2
    assert runs.pass_at_k["base"][1, 1].tolist() == pytest.approx([50, 100 * (1 - 1 / 6), 100])
    mean, error = report.mean_and_error(runs.pass_at_k["base"].mean(1))
    assert mean[0] == (12.5 + 75) / 2 and error[0] == pytest.approx((75 - 12.5) / 2)  # of two values: half their distance


def test_the_interval_of_a_difference_resamples_problems_and_seeds():
    rng = random.Random(0)
    theirs = [[rng.randint(0, 2) for _ in range(400)] for _ in range(3)]
    gain = [rng.randint(0, 2) for _ in range(400)]
    same_gain = [[a + g for a, g in zip(seed, gain)] for seed in theirs]
    mean, (low, high) = report.Runs(some_results({"base": theirs, "grpo": theirs, "rs2": same_gain}), METHODS).difference("rs2", "grpo")
    per_problem = torch.tensor(gain, dtype=torch.float64) * 25  # points of pass@1; the same for all seeds, so only problems vary
    spread = 1.96 * per_problem.std().item() / 400**0.5
    assert mean[0] == pytest.approx(per_problem.mean().item())
    assert low[0] == pytest.approx(mean[0] - spread, abs=0.15) and high[0] == pytest.approx(mean[0] + spread, abs=0.15)
    unequal = [[a + s for a in seed] for s, seed in enumerate(theirs)]  # seeds gain 0, 25 and 50 points, every problem alike
    mean, (low, high) = report.Runs(some_results({"base": theirs, "grpo": theirs, "rs2": unequal}), METHODS).difference("rs2", "grpo")
    assert (mean[0], low[0], high[0]) == pytest.approx((25, 0, 50))  # one in 27 draws takes the same extreme seed thrice
    mean, (low, high) = report.Runs(some_results({"base": theirs, "grpo": theirs, "rs2": theirs}), METHODS).difference("rs2", "grpo")
    assert (mean == 0).all() and (low == 0).all() and (high == 0).all()
    results = some_results({"base": theirs, "grpo": theirs, "rs2": theirs})
    results["runs"]["rs2"] = {seed: results["runs"]["grpo"][seed] for seed in ("2", "1")}  # finished in another order, one missing
    mean, bounds = report.Runs(results, METHODS).difference("rs2", "grpo")
    assert (mean == 0).all() and (bounds == 0).all()  # seed by seed, not place by place


def test_a_comparison_keeps_what_is_finished_and_draws_the_same_from_its_file_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "QUICK", compare.QUICK._replace(folder=str(tmp_path / "runs")))
    path, figures = tmp_path / "results.json", tmp_path / "figures"
    flags = ["--quick", "--results", str(path), "--figures", str(figures), "--workers", "2"]
    compare.main([*flags, "--only", "base,grpo,rs2", "--seeds", "0"])
    first = json.loads(path.read_text())["runs"]
    assert "QUICK RUN, 2 steps: no evidence" in capsys.readouterr().out
    compare.main([*flags, "--only", "base,grpo,mean_partial,rs_annealed,rs8_rescaled", "--seeds", "0"])
    printed, runs = capsys.readouterr().out, json.loads(path.read_text())["runs"]
    assert set(runs) == {"base", "grpo", "rs2", "mean_partial", "rs_annealed", "rs8_rescaled"}
    assert all(runs[name] == first[name] for name in first)  # the time they took included: none was made again
    assert len(runs["rs2"]["0"]["correct"]) == 16 and runs["rs2"]["0"]["curve"]["step"] == [0, 1, 2]
    assert "Partial credit:" in printed and "Schedules of β:" in printed and "RS-GRPO, β = 2 − GRPO" in printed
    drawn = {file.name: file.read_bytes() for file in figures.iterdir()}
    assert set(drawn) == {"passk.png", "beta.png", "methods.png", "diversity.png"}
    compare.main([*flags, "--report"])
    assert capsys.readouterr().out == printed and all((figures / name).read_bytes() == old for name, old in drawn.items())
    compare.main([*flags, "--only", "grpo", "--seeds", "0"])
    assert capsys.readouterr().out.startswith("nothing to train")
    with pytest.raises(SystemExit, match="2"):
        compare.main(["--report", "--results", str(path)])
    assert "was made with" in capsys.readouterr().err


def test_a_run_of_the_comparison_equals_the_same_run_of_rs_grpo(tmp_path):
    plan = compare.QUICK._replace(folder=str(tmp_path))
    entry = compare.run_one(plan, "grpo", 3)
    settings = dict(advantage="grpo", seed=3, steps=2, lr=plan.lr, prompts=plan.prompts, samples=plan.samples, eval_problems=16, eval_rows=1024)
    results = train(Config(out=str(tmp_path / "own"), eval_samples=32, **settings))
    assert entry["correct"] == results["trained"]["correct"]
    assert entry["training"]["reward"] == [round(line["reward"], 4) for line in read_metrics(tmp_path / "own")]


def test_a_comparison_goes_on_past_a_run_that_fails_and_names_it(tmp_path, monkeypatch, capsys):
    plan = compare.QUICK._replace(folder=str(tmp_path / "runs"))
    monkeypatch.setattr(compare, "QUICK", plan)
    plan.run_folder("grpo", 0).mkdir(parents=True)
    (plan.run_folder("grpo", 0) / "config.json").write_text("{")
    with pytest.raises(SystemExit, match="2"):
        compare.main(["--quick", "--results", str(tmp_path / "results.json"), "--only", "grpo", "--seeds", "0", "--workers", "1"])
    assert "not finished: grpo with seed 0" in capsys.readouterr().err
    assert set(json.loads((tmp_path / "results.json").read_text())["runs"]) == {"base"}  # which is always made


@pytest.mark.skipif(os.name != "posix", reason="signals differ")
def test_ctrl_c_ends_a_comparison_and_its_workers_and_the_next_one_goes_on(tmp_path):
    command = [sys.executable, "experiments/compare.py", "--quick", "--only", "grpo", "--seeds", "0", "--workers", "1"]
    command += ["--results", str(tmp_path / "results.json"), "--figures", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True)
    while process.poll() is None and not (tmp_path / "results.json").exists():  # the base is finished, GRPO not
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130 and "the same command goes on" in process.stderr.read()
    with pytest.raises(ProcessLookupError):  # nobody of its group is left
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(json.loads((tmp_path / "results.json").read_text())["runs"]) == {"base", "grpo"}


@pytest.mark.parametrize("name, steps", [("results.json", 800), ("results-2000-steps.json", 2000)])
def test_the_readmes_show_the_tables_that_the_results_give(tmp_path, name, steps):
    results = compare.read_results(ROOT / "experiments" / name, compare.Plan(steps=steps))
    printed = report.report(results, compare.METHODS, tmp_path)
    shown = {line for name in ("README.md", "experiments/README.md") for line in (ROOT / name).read_text().splitlines()}
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) > 10 and set(rows) <= shown
    assert printed.splitlines()[-1].split(",")[0] in (ROOT / "experiments" / "README.md").read_text()  # the number of runs
