from __future__ import annotations

import math
import operator
import random
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
MAX_EXPRESSION = 100  # characters of an answer that are read at all


class BadInput(ValueError):
    """What the user can mend, in one sentence: what was wrong, what was expected, what to do."""


# ---------------------------------------------------------------------------
# Advantages: the one function that changes. All map rewards (P, N) to (P, N).
# ---------------------------------------------------------------------------


def risk_sensitive_advantage(rewards: torch.Tensor, beta: float | torch.Tensor) -> torch.Tensor:
    """Risk-sensitive advantage: prefer what lifts (1/β) log E[exp(β r)] over what lifts the mean.

        Â_i = (1/β) ( exp(β r_i) / mean_j exp(β r_j) − 1 )        Theorem 1 of arXiv 2509.24261, estimated on the group

    With 16 samples, the advantage of a correct / of a wrong one, by the number c of correct ones:

                   c = 1          c = 4          c = 8         c = 15
        β = 0   .938/−.063     .750/−.250     .500/−.500     .063/−.938
        β = 2   2.140/−.143    .922/−.307     .381/−.381     .029/−.429
        β = 8   1.865/−.124    .374/−.125     .125/−.125     .008/−.125

    A rare success weighs more and a rare failure less, so that the gradient is spent on problems not yet solved.

    rewards: (P, N), one row a prompt; binary or continuous. beta: any finite real number, or one per row as (P, 1).
    β → 0 is the mean baseline, β < 0 is risk-averse. Returns (P, N) in the dtype of `rewards` (float32 for integers).
    Each row sums to zero, is unchanged when a constant is added to the rewards, and is exactly 0 for equal rewards.
    Raises ValueError unless `rewards` has two dimensions and `beta` is finite.
    """
    rewards = _as_group_matrix(rewards)
    beta = torch.as_tensor(beta, dtype=torch.float64, device=rewards.device)
    if not beta.isfinite().all():
        raise ValueError(f"beta must be finite, got {beta.tolist()}")
    r = rewards.double()
    # Shifting by the reward with the largest weight keeps exp() ≤ 1, and makes a group of equal rewards exactly 0.
    r = r - torch.where(beta < 0, r.amin(1, keepdim=True), r.amax(1, keepdim=True))  # (P, N)
    # expm1 = exp − 1 cancels in both terms of the fraction, so a tiny β loses no digits.
    weight = torch.expm1(beta * r)  # (P, N), in (−1, 0]
    mean = weight.mean(1, keepdim=True)  # (P, 1)
    advantages = torch.where(beta == 0, r - r.mean(1, keepdim=True), (weight - mean) / (1 + mean) / beta)
    return advantages.to(rewards.dtype)


def mean_baseline_advantage(rewards: torch.Tensor) -> torch.Tensor:
    """Â_i = r_i − mean(r): the gradient of the mean reward, the limit β → 0 ("Dr. GRPO", arXiv 2503.20783)."""
    return risk_sensitive_advantage(rewards, 0.0)


def grpo_advantage(rewards: torch.Tensor, epsilon: float = 1e-6) -> torch.Tensor:
    """Â_i = (r_i − mean(r)) / (std(r) + ε), with the population's std (GRPO, arXiv 2402.03300).

    The division makes hard and easy prompts weigh alike: 3.873/−.258 at c = 1 of 16 and .258/−3.873 at c = 15.
    Shapes, dtype and errors as in `risk_sensitive_advantage`; exactly 0 for equal rewards.
    """
    advantages = mean_baseline_advantage(rewards)  # (P, N)
    return advantages / (advantages.std(1, keepdim=True, correction=0) + epsilon)


def chen_advantage(rewards: torch.Tensor, k: int) -> torch.Tensor:
    """Pass@k training (Chen et al., arXiv 2508.10751), binary rewards: standardise the reward "one of k succeeds".

        ρ = 1 − C(N−c,k)/C(N,k)        σ = √(ρ(1−ρ))
        Â⁺ = (1−ρ)/(σ+1e-6)            Â⁻ = (1−ρ − C(N−c−1,k−1)/C(N−1,k−1))/(σ+1e-6)

    At k = 4: 1.732/−.115 for c = 1 of 16, .200/−.200 for c = 8, and no signal at all once fewer than k samples fail.
    Raises ValueError for rewards other than 0 and 1, or k outside 1 … N.
    """
    rewards, c = _as_group_matrix(rewards), _count_correct(rewards, "chen")
    n = rewards.shape[1]
    fail = _share_without_success(n, k, c)  # (P, 1): 1 − ρ
    fail_beside_wrong = _share_without_success(n - 1, k - 1, c.clamp(max=n - 1))
    advantages = torch.where(rewards == 1, fail, fail - fail_beside_wrong) / ((fail * (1 - fail)).sqrt() + 1e-6)
    return advantages.to(rewards.dtype)


def mahdavi_advantage(rewards: torch.Tensor, k: int) -> torch.Tensor:
    """The policy gradient of pass@k = 1 − (1−p)^k (Mahdavi et al., Beyond Accuracy, ICML 2025 AI4Math), binary rewards.

        Â_i = k (1−p)^{k−1} (r_i − p),  p = c/N

    Whether the authors also divide by the group's standard deviation isn't known; here they don't.
    At k = 4: 3.090/−.206 for c = 1 of 16, .250/−.250 for c = 8, .0001/−.0009 for c = 15. Errors as in `chen_advantage`.
    """
    rewards, c = _as_group_matrix(rewards), _count_correct(rewards, "mahdavi")
    n = rewards.shape[1]
    _check_k(k, n)
    p = c / n  # (P, 1)
    return (k * (1 - p) ** (k - 1) * (rewards - p)).to(rewards.dtype)


def pkpo_advantage(rewards: torch.Tensor, k: int, leave_one_out: bool = False) -> torch.Tensor:
    """PKPO (Walder & Karkhanis, arXiv 2505.15201), binary or continuous rewards: the best reward among k samples.

        plain (equation 19):                    s_i = (1/C(N,k)) Σ_{I∋i} max_{j∈I} r_j
        leave-one-out minus one (equation 33):  s_i = (1/C(N,k)) Σ_{I∋i} (max_{j∈I} r_j − max_{j∈I∖i} r_j),  k ≥ 2

    over all subsets I of k samples. Sorted upwards, sample j is the best of C(j−1,k−1) of them (counting from 1).
    Plain is positive throughout, so a group without a success is the only one without a signal; leave-one-out is 0 for
    every wrong sample. At k = 4: .250/.050 and .250/0 for c = 1 of 16, .250/.231 and .031/0 for c = 8.
    Raises ValueError for k outside 1 … N (2 … N with leave_one_out).
    """
    rewards = _as_group_matrix(rewards)
    n = rewards.shape[1]
    _check_k(k, n, least=2 if leave_one_out else 1)
    r, order = rewards.double().sort(dim=1)  # (P, N), upwards

    def subsets(size: int, offset: int) -> torch.Tensor:  # (N,): C(j−offset, size) / C(N, k) for j = 1 … N
        counts = [math.comb(j - offset, size) if j >= offset and size >= 0 else 0 for j in range(1, n + 1)]
        return torch.tensor([count / math.comb(n, k) for count in counts], dtype=torch.float64, device=r.device)

    if leave_one_out:  # i matters only where it is the best; the second best is some j below it
        r = r - r[:, :1]  # a constant cancels; a group of equal rewards becomes exactly 0
        second_best = (subsets(k - 2, 1) * r).cumsum(1)
        score = subsets(k - 1, 1) * r - (second_best - subsets(k - 2, 1) * r)
    else:  # i is the best, or some j above it is
        above = (subsets(k - 2, 2) * r).flip(1).cumsum(1).flip(1)
        score = subsets(k - 1, 1) * r + (above - subsets(k - 2, 2) * r)
    return torch.empty_like(score).scatter_(1, order, score).to(rewards.dtype)


def maxrl_advantage(rewards: torch.Tensor) -> torch.Tensor:
    """MaxRL (arXiv 2602.02710), binary rewards: Â_i = (r_i − p)/p, 0 without a success; the limit of β·Â_rs as β → ∞.

    15/−1 for c = 1 of 16, 1/−1 for c = 8, .067/−1 for c = 15. Raises ValueError for rewards other than 0 and 1.
    """
    rewards, c = _as_group_matrix(rewards), _count_correct(rewards, "maxrl")
    p = (c / rewards.shape[1]).clamp(min=1 / rewards.shape[1])  # no success: rewards − p is replaced by 0 below
    return torch.where(c > 0, (rewards - p) / p, 0.0).to(rewards.dtype)


def _as_group_matrix(rewards: torch.Tensor) -> torch.Tensor:
    """`rewards` as a floating-point (P, N) matrix, or a ValueError."""
    rewards = torch.as_tensor(rewards)
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be a (prompts, samples) matrix, got shape {tuple(rewards.shape)}")
    return rewards if rewards.is_floating_point() else rewards.float()


def _count_correct(rewards: torch.Tensor, method: str) -> torch.Tensor:
    """The number of rewards equal to 1 in each group, (P, 1), or a ValueError if some are neither 0 nor 1."""
    rewards = _as_group_matrix(rewards)
    if not ((rewards == 0) | (rewards == 1)).all():
        raise ValueError(f"the {method} advantage is defined for rewards 0 and 1 only; use rs, mean, grpo or pkpo for others")
    return rewards.double().sum(1, keepdim=True)


def _check_k(k: int, n: int, least: int = 1) -> None:
    if not least <= k <= n:
        raise ValueError(f"k must be from {least} to the group's {n} samples, got {k}")


def _share_without_success(n: int, k: int, c: torch.Tensor) -> torch.Tensor:
    """C(n−c, k) / C(n, k): the share of size-k subsets of n samples that miss all c correct ones. Shape of `c`."""
    _check_k(k, n, least=0)
    shares = [math.comb(n - count, k) / math.comb(n, k) for count in range(n + 1)]
    return torch.tensor(shares, dtype=torch.float64, device=c.device)[c.long()]


ADVANTAGES: dict[str, Callable[[torch.Tensor, "Config"], torch.Tensor]] = {
    "rs": lambda rewards, config: risk_sensitive_advantage(rewards, config.beta),
    "mean": lambda rewards, config: mean_baseline_advantage(rewards),
    "grpo": lambda rewards, config: grpo_advantage(rewards),
    "chen": lambda rewards, config: chen_advantage(rewards, config.k),
    "mahdavi": lambda rewards, config: mahdavi_advantage(rewards, config.k),
    "pkpo": lambda rewards, config: pkpo_advantage(rewards, config.k),
    "pkpo_loo": lambda rewards, config: pkpo_advantage(rewards, config.k, leave_one_out=True),
    "maxrl": lambda rewards, config: maxrl_advantage(rewards),
}


# ---------------------------------------------------------------------------
# Task and reward
# ---------------------------------------------------------------------------


class Problem(NamedTuple):
    """One problem of a task: what the model reads, and what the reward rule needs to judge a completion."""

    prompt: str
    numbers: tuple[int, ...]
    target: int


def is_held_out(text: str) -> bool:
    """Whether a problem belongs to the held-out tenth: decided by a hash of what it asks, so never by luck."""
    return zlib.crc32(text.encode()) % 10 == 0


def random_expression(numbers: Iterable[int], rng: random.Random) -> tuple[str, Fraction | None]:
    """A random binary tree over `numbers` and + - * /: its text with the fewest brackets, and its exact value.

    The value is None where the tree divides by zero.
    """
    trees = [(str(n), Fraction(n), 3) for n in numbers]  # (text, value, how tightly its outermost operator binds)
    while len(trees) > 1:
        left, left_value, left_binds = trees.pop(rng.randrange(len(trees)))
        right, right_value, right_binds = trees.pop(rng.randrange(len(trees)))
        symbol = rng.choice("+-*/")
        binds = 1 if symbol in "+-" else 2
        if symbol == "/" and right_value == 0:
            return "", None
        value = OPERATORS[symbol](left_value, right_value)
        if left_binds < binds:
            left = f"({left})"
        if right_binds < binds or (right_binds == binds and symbol in "-/"):
            right = f"({right})"
        trees.append((left + symbol + right, value, binds))
    return trees[0][0], trees[0][1]


def countdown_problem(numbers: Iterable[int], target: int) -> Problem:
    """The problem of reaching `target` with `numbers`; its prompt is `4,7,9,12=48:`, numbers sorted."""
    numbers = tuple(sorted(numbers))
    return Problem(f"{','.join(map(str, numbers))}={target}:", numbers, target)


def countdown_problems(count: int, held_out: bool, seed: int = 0) -> list[Problem]:
    """`count` different problems, each with at least one solution, from the training side or the held-out one.

    Four numbers from 1 to 13 and the value of a random expression tree over them, kept if it is a whole number from
    1 to 99. Raises BadInput if there are not that many.
    """
    rng = random.Random(f"countdown {'held out' if held_out else 'training'} {seed}")
    problems: dict[str, Problem] = {}
    for _ in range(100 * count + 10_000):
        if len(problems) == count:
            return list(problems.values())
        numbers = [rng.randint(1, 13) for _ in range(4)]
        value = random_expression(numbers, rng)[1]
        if value is not None and value.denominator == 1 and 1 <= value <= 99:
            problem = countdown_problem(numbers, int(value))
            if is_held_out(problem.prompt) == held_out:
                problems[problem.prompt] = problem
    raise BadInput(f"{count} different Countdown problems were asked for, but only {len(problems)} were found; ask for fewer")


def countdown_reward(completion: str, numbers: Sequence[int], target: int) -> float:
    """1.0 if `completion` is an expression that uses each number exactly once and equals `target`, else 0.0.

    A completion is hostile input: it is matched against the grammar below and never evaluated by Python. Length is
    bounded (and with it nesting and the size of every number), arithmetic is exact, and whatever the grammar doesn't
    know (unary signs, `**`, `//`, other digits than 0-9, a second answer, the prompt again) earns 0.

        sum := product (('+' | '-') product)*    product := atom (('*' | '/') atom)*    atom := number | '(' sum ')'
    """
    if len(completion) > MAX_EXPRESSION or not re.fullmatch(r"[0-9+\-*/() ]+", completion):
        return 0.0
    tokens = re.findall(r"[0-9]+|[^0-9 ]", completion)
    if sorted(t for t in tokens if t[0] in "0123456789") != sorted(map(str, numbers)):
        return 0.0
    tokens.reverse()  # so that pop() takes the next one
    try:
        value = _parse(tokens)
    except (IndexError, ValueError, ZeroDivisionError):  # ends too early, something else where a number belongs, x/0
        return 0.0
    return float(not tokens and value == target)


def _parse(tokens: list[str], level: int = 0) -> Fraction:
    """Value of the sum (level 0), product (1) or atom (2) in front of reversed `tokens`, which it removes."""
    if level == 2:
        token = tokens.pop()
        if token != "(":
            return Fraction(int(token))
        value = _parse(tokens)
        if tokens.pop() != ")":
            raise ValueError("unbalanced brackets")
        return value
    value = _parse(tokens, level + 1)
    while tokens and tokens[-1] in ("+-", "*/")[level]:
        symbol = tokens.pop()
        value = OPERATORS[symbol](value, _parse(tokens, level + 1))
    return value
