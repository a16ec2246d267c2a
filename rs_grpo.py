"""Risk-Sensitive GRPO (arXiv 2509.24261) in one file, from prompt to pass@k.

Reinforcement learning with verifiable rewards makes a language model's first answer better and its hundredth worse:
the mean reward is a local optimum for a policy that starts out peaked. RS-GRPO maximises instead

    J_β = E_x [ (1/β) log E_{y ~ π(·|x)} exp(β r(y)) ]          the mean for β → 0, the best of all samples for β → ∞

and only one function changes, the advantage of sample i among the N samples of a prompt:

    Â_i = (1/β) ( exp(β r_i) / mean_j exp(β r_j) − 1 )          `risk_sensitive_advantage`

β = 0 is the mean baseline r_i − mean(r). All else is GRPO at its plainest: sample N completions of each prompt, judge
them by a rule, take one on-policy gradient step. Left out, as the method needs none of them: a value network, a reward
model, a KL penalty, a reference model. A first reader can stop after `train`.

    python rs_grpo.py                         # train the embedded model on Countdown, pass@k before and after: 2 minutes
    python rs_grpo.py --advantage grpo        # the same with GRPO
    python rs_grpo.py --resume                # go on where a killed run stopped, to the same numbers
    python rs_grpo.py --model Qwen/Qwen2.5-Math-1.5B --task math12k --eval-task math500 --lr 1e-6 --max-tokens 3000

On 256 held-out problems, over five seeds of 800 steps (experiments/compare.py), pass@1/@32/@256 go from 19.0/47.3/66.1 %
to 27.3/59.1/66.0 % with β = 2, and to 28.3/46.7/56.6 % with GRPO: a better first answer, and fewer problems within reach.

Legend: P prompts a step, N samples a prompt, B = P·N rows, L prompt tokens, T completion tokens, V vocabulary.
A rollout is a prompt's tokens and one completion of it; a group is the N rollouts of one prompt.
"""

from __future__ import annotations

import argparse
import ast
import copy
import functools
import inspect
import json
import math
import operator
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm, trange

EMBEDDED = "countdown-base"  # the model that lies beside this file
HERE = Path(__file__).resolve().parent
SETTINGS, METRICS, RESULTS, CHECKPOINT = "config.json", "metrics.jsonl", "eval.json", "checkpoint.pt"
WARMUP_STEPS = 10  # the learning rate rises linearly over these
MAX_GRAD_NORM = 1.0
MAX_FAILURES = 3  # updates in a row that were not finite before a run gives up
MAX_LOGITS = 2**25  # logits in memory at once while learning: 128 MiB
EVALUATION_SEED = 1_000_003  # added to --seed, so that evaluation and training draw different numbers
SOLVED = 1.0  # a problem is solved by a completion with this reward
PROGRESS = "reward {reward:.2f} solved {solved:.2f} signal {signal:.2f} entropy {entropy:.2f} length {length:.1f}"
PROGRESS += " grad {grad_norm:.2f} tok/s {tokens_per_second:.0f}"


class BadInput(ValueError):
    """What the user can mend, in one sentence: what was wrong, what was expected, what to do."""


# --- Configuration: this dataclass is the one source, the command line is made from it. -------------------------------

def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """The settings of one run. Raises BadInput for a value that can't work."""

    model: str = option(EMBEDDED, "folder or hub id of a causal language model")
    task: str = option("countdown", "countdown, countdown-text, gsm8k or another named set, or a .jsonl file")
    eval_task: str = option("", "what to evaluate on, several separated by commas (default: problems held out of --task)")
    instruction: str = option("", "what a model is told after each problem; compact Countdown has none (default: the task's own)")
    out: str = option("", "run folder to write (default: runs/<advantage>-seed<seed>, with beta where it counts)")
    seed: int = option(0, "of the order of the problems and of every sampled token")
    advantage: str = option("rs", "estimator: rs, mean, grpo, chen, mahdavi, pkpo, pkpo_loo or maxrl")
    beta: float = option(2.0, "risk sensitivity of rs: 0 is the mean, larger seeks rarer successes; the paper advises 2")
    k: int = option(4, "the k of the pass@k estimators chen, mahdavi, pkpo and pkpo_loo; the paper compares at 4")
    lr: float = option(1e-4, "AdamW's learning rate; a pretrained model wants about 1e-6")
    temperature: float = option(1.0, "of sampling and, since the loss scores what was sampled, of learning too")
    prompts: int = option(32, "prompts a step")
    updates: int = option(1, "updates a step; more than 1 cuts the batch into as many minibatches, with the PPO clip")
    clip_low: float = option(0.2, "with --updates above 1: the ratio is clipped at 1 - this")
    clip_high: float = option(0.28, "and at 1 + this; wider, as in DAPO, so that rare tokens can rise")
    dynamic_sampling: int = option(0, "draw as many prompts again, up to this often, while too few have a signal")
    samples: int = option(16, "completions a prompt, the group over which advantages are taken; the paper has 16")
    steps: int = option(500, "training steps; 0 only evaluates")
    train_problems: int = option(10_000, "size of the training set, gone through in epochs; Countdown has 20,000")
    max_tokens: int = option(20, "longest completion in tokens; Countdown's longest sensible answer has 16")
    eval_problems: int = option(128, "held-out problems to evaluate on; Countdown has 2,000")
    eval_samples: int = option(0, "completions for each, so the largest k; 0 is 256 on Countdown, --samples elsewhere")
    eval_rows: int = option(256, "completions sampled at once in an evaluation, those of one problem at least: memory")
    eval_every: int = option(0, "also evaluate every so many steps; 0 is only before and after")
    save_every: int = option(50, "steps between checkpoints: the most training that a kill can cost")
    micro_tokens: int = option(4096, "tokens in one forward and backward pass: sets memory and speed, not the gradient")
    checkpointing: bool = option(False, "compute activations again in the backward pass: less memory, more time; no prompt is shared")
    precision: str = option("auto", "of sampling and of matrix products: float32, bfloat16, or auto (bfloat16 on CUDA)")
    device: str = option("auto", "auto (CUDA, else MPS, else CPU), or a torch device such as cpu or cuda:1")

    def __post_init__(self):
        def expect(condition: bool, name: str, wanted: str):
            if not condition:
                raise BadInput(f"--{name.replace('_', '-')} is {getattr(self, name)}, but must be {wanted}")

        for f in fields(self):
            value, kind = getattr(self, f.name), type(f.default)
            least = 0 if f.name in ("steps", "eval_samples", "eval_every", "seed", "dynamic_sampling") else 1
            expect(type(value) is kind or (kind is float and type(value) is int), f.name, f"of type {kind.__name__}")
            expect(kind is not int or least <= value < 2**62, f.name, f"at least {least} and below 2^62")
            expect(kind is not float or math.isfinite(value), f.name, "a finite number")
            expect(f.name not in ("lr", "temperature", "clip_low", "clip_high") or value > 0, f.name, "above 0")
        expect(self.clip_low < 1, "clip_low", "below 1")
        expect(self.updates <= self.prompts, "updates", f"at most --prompts, {self.prompts}")
        expect(self.task != "", "task", "the name of a task")
        expect(self.samples >= 2, "samples", "at least 2: an advantage compares the samples of a group")
        expect(self.precision in ("auto", "float32", "bfloat16"), "precision", "auto, float32 or bfloat16")
        expect(self.advantage in ADVANTAGES, "advantage", f"one of {', '.join(ADVANTAGES)}")
        if self.advantage in ("chen", "mahdavi", "pkpo", "pkpo_loo"):
            least = 2 if self.advantage == "pkpo_loo" else 1
            expect(least <= self.k <= self.samples, "k", f"from {least} to --samples, {self.samples}")

    @property
    def run_folder(self) -> Path:
        beta = f"-{self.beta:g}" if self.advantage == "rs" else ""
        return Path(self.out or f"runs/{self.advantage}{beta}-seed{self.seed}")


# --- Advantages: the one function that changes. All map rewards (P, N) to (P, N). -------------------------------------

def risk_sensitive_advantage(rewards: Tensor, beta: float | Tensor) -> Tensor:
    """Risk-sensitive advantage: prefer what lifts (1/β) log E[exp(β r)] over what lifts the mean.

        Â_i = (1/β) ( exp(β r_i) / mean_j exp(β r_j) − 1 )        Theorem 1 of arXiv 2509.24261, estimated on the group

    With 16 samples, the advantage of a correct / of a wrong one, by the number c of correct ones:

                   c = 1          c = 4          c = 8         c = 15
        β = 0   .938/−.063     .750/−.250     .500/−.500     .063/−.938
        β = 2   2.140/−.143    .922/−.307     .381/−.381     .029/−.428
        β = 8   1.865/−.124    .374/−.125     .125/−.125     .008/−.125

    A rare success weighs more and a rare failure less, so that the gradient is spent on problems not yet solved.

    rewards: (P, N), one row a prompt; binary or continuous. beta: any finite real number, or one per row as (P, 1).
    β → 0 is the mean baseline, β < 0 is risk-averse. Returns (P, N) in the dtype of `rewards` (float32 for integers).
    Each row sums to zero, is unchanged when a constant is added to the rewards, and is exactly 0 for equal rewards.
    Raises ValueError unless `rewards` has two dimensions and `beta` is finite.
    """
    rewards = torch.as_tensor(rewards)
    beta = torch.as_tensor(beta, dtype=torch.float64, device=rewards.device)
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be a (prompts, samples) matrix, got shape {tuple(rewards.shape)}")
    if not beta.isfinite().all():
        raise ValueError(f"beta must be finite, got {beta.tolist()}")
    r = rewards.double()
    # Shifting by the reward with the largest weight keeps exp() ≤ 1, and makes a group of equal rewards exactly 0.
    r = r - torch.where(beta < 0, r.amin(1, keepdim=True), r.amax(1, keepdim=True))  # (P, N)
    # With w = exp(βr) − 1, the fraction exp(βr)/mean − 1 is (w − mean(w)) / (1 + mean(w)): a tiny β loses no digits.
    weight = torch.expm1(beta * r)  # (P, N), in (−1, 0]
    mean = weight.mean(1, keepdim=True)  # (P, 1)
    advantages = torch.where(beta == 0, r - r.mean(1, keepdim=True), (weight - mean) / (1 + mean) / beta)
    return advantages.to(rewards.dtype if rewards.is_floating_point() else torch.float32)


def mean_baseline_advantage(rewards: Tensor) -> Tensor:
    """Â_i = r_i − mean(r): the gradient of the mean reward, the limit β → 0 ("Dr. GRPO", arXiv 2503.20783)."""
    return risk_sensitive_advantage(rewards, 0.0)


def grpo_advantage(rewards: Tensor) -> Tensor:
    """Â_i = (r_i − mean(r)) / (std(r) + 1e-6), with the population's std (GRPO, arXiv 2402.03300).

    The division makes hard and easy prompts weigh alike: 3.873/−.258 at c = 1 of 16 and .258/−3.873 at c = 15.
    Shapes, dtype and errors as in `risk_sensitive_advantage`; exactly 0 for equal rewards.
    """
    advantages = mean_baseline_advantage(rewards)  # (P, N)
    return advantages / (advantages.std(1, keepdim=True, correction=0) + 1e-6)


def chen_advantage(rewards: Tensor, k: int) -> Tensor:
    """Pass@k training (Chen et al., arXiv 2508.10751), binary rewards: standardise the reward "one of k succeeds".

        ρ = 1 − C(N−c,k)/C(N,k)        σ = √(ρ(1−ρ))
        Â⁺ = (1−ρ)/(σ+1e-6)            Â⁻ = (1−ρ − C(N−c−1,k−1)/C(N−1,k−1))/(σ+1e-6)

    At k = 4: 1.732/−.115 for c = 1 of 16, .200/−.200 for c = 8, and no signal at all once fewer than k samples fail.
    Raises ValueError for rewards other than 0 and 1, or k outside 1 … N.
    """
    rewards, c = _groups(rewards, k)
    n, correct = rewards.shape[1], [int(count) for count in c]
    miss = c.new_tensor([[math.comb(n - i, k) / math.comb(n, k)] for i in correct])  # (P, 1): 1 − ρ
    beside = c.new_tensor([[math.comb(max(n - i - 1, 0), k - 1) / math.comb(n - 1, k - 1)] for i in correct])  # (P, 1)
    advantages = torch.where(rewards == 1, miss, miss - beside) / ((miss * (1 - miss)).sqrt() + 1e-6)
    return advantages.to(rewards.dtype)


def mahdavi_advantage(rewards: Tensor, k: int) -> Tensor:
    """The policy gradient of pass@k = 1 − (1−p)^k (Mahdavi et al., Beyond Accuracy, ICML 2025 AI4Math), binary rewards.

        Â_i = k (1−p)^{k−1} (r_i − p),  p = c/N

    Whether the authors also divide by the group's standard deviation isn't known; here they don't.
    At k = 4: 3.090/−.206 for c = 1 of 16, .250/−.250 for c = 8, .0001/−.0009 for c = 15. Errors as in `chen_advantage`.
    """
    rewards, c = _groups(rewards, k)
    p = c / rewards.shape[1]  # (P, 1)
    return (k * (1 - p) ** (k - 1) * (rewards - p)).to(rewards.dtype)


def pkpo_advantage(rewards: Tensor, k: int, leave_one_out: bool = False) -> Tensor:
    """PKPO (Walder & Karkhanis, arXiv 2505.15201), binary or continuous rewards: the best reward among k samples.

        plain (equation 19):                    s_i = (1/C(N,k)) Σ_{I∋i} max_{j∈I} r_j
        leave-one-out minus one (equation 33):  s_i = (1/C(N,k)) Σ_{I∋i} (max_{j∈I} r_j − max_{j∈I∖i} r_j),  k ≥ 2

    over all subsets I of k samples. Sorted upwards, sample j is the best of C(j−1,k−1) of them (counting from 1).
    Plain is positive throughout, so a group without a success is the only one without a signal; leave-one-out is 0 for
    every wrong sample. At k = 4: .250/.050 and .250/0 for c = 1 of 16, .250/.231 and .031/0 for c = 8.
    Raises ValueError for k outside 1 … N (2 … N with leave_one_out).
    """
    rewards, _ = _groups(rewards, k, least_k=2 if leave_one_out else 1, binary=False)
    r, order = rewards.double().sort(dim=1)  # (P, N), upwards: below sample j lie j others
    r = r - r[:, :1] * leave_one_out  # there a constant cancels, and a group of equal rewards becomes exactly 0
    n = r.shape[1]

    def subsets(below: int, others: int) -> Tensor:  # (N,): C(j − below, others) for j = 0 … N−1, exact up to 2^53
        return r.new_tensor([float(math.comb(max(j - below, 0), others)) if others >= 0 else 0.0 for j in range(n)])

    # weight[i, j]: in how many subsets r_j counts for sample i. On the diagonal i is the best of its subset. Plain: some
    # j > i is. Leave-one-out: some j < i is the second best, and is subtracted. For N = 3, k = 2:
    # [[0, 1, 1], [0, 1, 1], [0, 0, 2]] and, with leave-one-out, [[0, 0, 0], [-1, 1, 0], [-1, -1, 2]].
    best, other = subsets(0, k - 1), subsets(0 if leave_one_out else 1, k - 2).expand(n, n)  # (N,), (N, N)
    weight = torch.diag(best) + (-other.tril(-1) if leave_one_out else other.triu(1))  # (N, N)
    return torch.empty_like(r).scatter_(1, order, r @ weight.T / float(math.comb(n, k))).to(rewards.dtype)


def maxrl_advantage(rewards: Tensor) -> Tensor:
    """MaxRL (arXiv 2602.02710), binary rewards: Â_i = (r_i − p)/p, 0 without a success; the limit of β·Â_rs as β → ∞.

    15/−1 for c = 1 of 16, 1/−1 for c = 8, .067/−1 for c = 15. Raises ValueError for rewards other than 0 and 1.
    """
    rewards, c = _groups(rewards)
    p = (c / rewards.shape[1]).clamp(min=1 / rewards.shape[1])  # no success: rewards − p is replaced by 0 below
    return torch.where(c > 0, (rewards - p) / p, 0.0).to(rewards.dtype)


def _groups(rewards: Tensor, k: int = 1, least_k: int = 1, binary: bool = True) -> tuple[Tensor, Tensor]:
    """`rewards` as a floating-point (P, N) matrix, and the number of ones in each group, (P, 1); ValueError if unfit."""
    rewards = torch.as_tensor(rewards)
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be a (prompts, samples) matrix, got shape {tuple(rewards.shape)}")
    if binary and not ((rewards == 0) | (rewards == 1)).all():
        raise ValueError("this advantage is defined for rewards 0 and 1 only; use rs, mean, grpo or pkpo for others")
    if not least_k <= k <= rewards.shape[1]:
        raise ValueError(f"k must be from {least_k} to the group's {rewards.shape[1]} samples, got {k}")
    return rewards if rewards.is_floating_point() else rewards.float(), rewards.double().sum(1, keepdim=True)


ADVANTAGES: dict[str, Callable[[Tensor, Config], Tensor]] = {
    "rs": lambda rewards, config: risk_sensitive_advantage(rewards, config.beta),
    "mean": lambda rewards, config: mean_baseline_advantage(rewards),
    "grpo": lambda rewards, config: grpo_advantage(rewards),
    "chen": lambda rewards, config: chen_advantage(rewards, config.k),
    "mahdavi": lambda rewards, config: mahdavi_advantage(rewards, config.k),
    "pkpo": lambda rewards, config: pkpo_advantage(rewards, config.k),
    "pkpo_loo": lambda rewards, config: pkpo_advantage(rewards, config.k, leave_one_out=True),
    "maxrl": lambda rewards, config: maxrl_advantage(rewards),
}


# --- A task with a verifiable reward: Countdown -----------------------------------------------------------------------

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: Fraction}  # all exact
MAX_EXPRESSION = 100  # characters of a Countdown answer; a longer one is wrong


class Problem(NamedTuple):
    """What the model reads, and what the reward rule needs to judge a completion."""
    prompt: str
    answer: Any  # Countdown: (numbers, target); mathematics: the answer's text
    task: str = "countdown"


class Task(NamedTuple):
    """Problems to learn from, problems to be judged on, and the rule."""
    train: list[Problem]
    held_out: list[Problem]
    rewards: Callable[[Sequence[str], Sequence[Any]], list[float]]  # completions and their answers → rewards
    instruction: str = ""  # what a pretrained model is told after the problem; none for the compact Countdown
    failures: Callable[[], int] = lambda: 0  # judgements given up so far: too slow, or a crash


def countdown_problems(count: int, held_out: bool) -> list[Problem]:
    """The first `count` problems of countdown-base/train.txt or held-out.txt. Raises BadInput if there are not that many.

    Four numbers from 1 to 13 and the value of a random expression tree over them, from 1 to 99 (experiments/pretrain.py).
    """
    path = HERE / EMBEDDED / ("held-out.txt" if held_out else "train.txt")
    prompts = path.read_text().split() if path.exists() else []
    if count > len(prompts):
        remedy = "ask for fewer" if prompts else "experiments/pretrain.py writes it"
        raise BadInput(f"{count} Countdown problems were asked for, but {path} has {len(prompts)}; {remedy}")
    parts = [tuple(map(int, re.findall("[0-9]+", prompt))) for prompt in prompts[:count]]  # of 4,7,9,12=48: five numbers
    return [Problem(prompt, (numbers, target)) for prompt, (*numbers, target) in zip(prompts, parts)]


def countdown_reward(completion: str, numbers: Sequence[int], target: int) -> float:
    """1.0 if `completion` is an expression that uses each number exactly once and equals `target`, else 0.0."""
    return float(countdown_value(completion, numbers) == target)


def countdown_value(completion: str, numbers: Sequence[int]) -> int | Fraction | None:
    """The value of `completion` if it is an expression that uses each number exactly once, else None.

    A completion is hostile input: Python's parser reads it, but nothing evaluates it. Length is bounded (and with it
    nesting and the size of every number), arithmetic is exact, and whatever isn't a number, a bracket or one of four
    operators (unary signs, `**`, `//`, other digits than 0-9, a second answer, the prompt again) is no answer.
    """
    if len(completion) > MAX_EXPRESSION or not re.fullmatch(r"[0-9+\-*/() ]+", completion):
        return None
    if sorted(re.findall("[0-9]+", completion)) != sorted(map(str, numbers)):
        return None

    def value(node: Any) -> int | Fraction:
        return node.value if isinstance(node, ast.Constant) else OPERATORS[type(node.op)](value(node.left), value(node.right))

    try:
        return value(ast.parse(completion.strip(), mode="eval").body)
    except (SyntaxError, AttributeError, KeyError, ZeroDivisionError):  # no expression, a call, another operator, x/0
        return None


# --- Sampling ---------------------------------------------------------------------------------------------------------

class Policy(NamedTuple):
    """A causal language model with what is needed to sample from it."""
    model: Any  # what learns: float32 weights
    sampler: Any  # what samples: the same model, or its copy in bfloat16
    tokenizer: Any
    stop_ids: Tensor  # (S,): a completion ends with any of these tokens
    device: torch.device


class Rollouts(NamedTuple):
    """B completions of P prompts: as sampled, N of each, those of one prompt lying together."""
    prompt_ids: Tensor  # (P, L), padded on the left
    prompt_mask: Tensor  # (P, L), 1 on real tokens
    owner: Tensor  # (B,): which of the prompts a row completes
    ids: Tensor  # (B, T), padded on the right
    mask: Tensor  # (B, T), True on completion tokens, the end-of-sequence token included
    entropy: float  # mean over the completion tokens of the policy's entropy, in nats


def encode(policy: Policy, prompts: Sequence[str], instruction: str = "") -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of the prompts, both (P, L), padded on the left.

    With an `instruction`, as a chat's first message where the tokenizer has a chat template, as plain text otherwise.
    """
    tokenizer, chat = policy.tokenizer, bool(instruction and policy.tokenizer.chat_template)
    if chat:
        turns = [[{"role": "user", "content": f"{prompt}\n{instruction}"}] for prompt in prompts]
        prompts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    elif instruction:
        prompts = [f"{prompt}\n{instruction}\n\n" for prompt in prompts]
    rows = [torch.tensor(tokenizer(prompt, add_special_tokens=not chat).input_ids) for prompt in prompts]  # a chat has its BOS
    ids = torch.nn.utils.rnn.pad_sequence(rows, True, -1, "left").to(policy.device)
    return ids.clamp(min=0), (ids >= 0).long()  # any id will do for padding: the mask hides it


def hidden_states(model: Any, ids: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
    """Final hidden states (B, T, D) of `ids` (B, T), which follow what is in `cache`; their keys and values are added there.

    mask: (B, tokens in the cache + T), 0 on padding, which takes no position.
    """
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]  # (B, T)
    past = {cache_argument(type(model.base_model)): cache, "use_cache": cache is not None}
    return model.base_model(ids, attention_mask=mask, position_ids=positions, **past).last_hidden_state


@functools.cache
def cache_argument(model_class: type) -> str:
    """What a model calls its cache: `cache` from transformers 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model_class.forward).parameters else "past_key_values"


def prefill(model: Any, prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Any]:
    """Run the prompts (P, L) once: the final hidden state of their last token (P, D), and the cache of their keys."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    return hidden_states(model, prompt_ids, prompt_mask, cache)[:, -1], cache


@torch.no_grad()
def sample(
    policy: Policy, prompt_ids: Tensor, prompt_mask: Tensor, samples: int, config: Config, generator: torch.Generator
) -> Rollouts:
    """Draw `samples` completions of each prompt (P, L) from softmax(logits / temperature), nothing cut off.

    Samples of a prompt that are equal so far are one row of the batch: at first all of them, so that each prompt is run
    once and its cache shared, then fewer and fewer. A sample that drew a stop token leaves the batch, so the last steps
    run on the few longest alone.
    """
    model, device = policy.sampler, prompt_ids.device
    hidden, cache = prefill(model, prompt_ids, prompt_mask)  # R = P rows
    mask = prompt_mask  # (R, L), growing by one column a token
    going = torch.arange(len(prompt_ids) * samples, device=device)  # (B',): which samples are still being written
    owner = row = going // samples  # (B',): the row that holds what each of them has so far
    ids = torch.zeros(len(going), config.max_tokens, dtype=torch.long, device=device)  # (B, T)
    lengths = torch.zeros_like(going)  # (B,)
    entropy = torch.zeros((), device=device)
    for t in range(config.max_tokens):
        logits = model.get_output_embeddings()(hidden[row]).float() / config.temperature
        probs = torch.softmax(logits, -1)  # (B', V)
        token = torch.multinomial(probs, 1, generator=generator).squeeze(1)  # (B',)
        ids[going, t] = token
        lengths[going] = t + 1
        entropy += torch.special.entr(probs).sum()
        unfinished = ~torch.isin(token, policy.stop_ids)
        if t + 1 == config.max_tokens or not unfinished.any():
            break
        going, row, token = going[unfinished], row[unfinished], token[unfinished]
        # A row and the next token make one number: as many different ones, (R',), as there are different texts.
        fork, row = (row * logits.shape[1] + token).unique(return_inverse=True)
        parent, token = fork // logits.shape[1], fork % logits.shape[1]
        if len(parent) != len(mask) or (parent.diff() != 1).any():  # unless every row goes on, once and in place
            cache.batch_select_indices(parent)
            mask = mask[parent]
        mask = F.pad(mask, (0, 1), value=1)
        hidden = hidden_states(model, token[:, None], mask, cache)[:, 0]  # (R', D)
    completion_mask = torch.arange(t + 1, device=device) < lengths[:, None]  # (B, T)
    return Rollouts(prompt_ids, prompt_mask, owner, ids[:, : t + 1], completion_mask, (entropy / lengths.sum()).item())


def decode(policy: Policy, rollouts: Rollouts) -> list[str]:
    """The text of each completion, B of them, without the token that ended it but with every other, special or not."""
    stop_ids = set(policy.stop_ids.tolist())
    rows = [row[:length] for row, length in zip(rollouts.ids.tolist(), rollouts.mask.sum(1).tolist())]
    return policy.tokenizer.batch_decode([row[:-1] if row[-1] in stop_ids else row for row in rows])


# --- Log-probabilities and the loss -----------------------------------------------------------------------------------

def completion_logprobs(model: Any, rollouts: Rollouts, temperature: float) -> Tensor:
    """log π(token) of every completion token at the sampling temperature, (B, T), and 0 on padding; differentiable.

    As in sampling, each prompt is run once, through the cache, and the gradient of all its samples flows back into it.
    Logits are computed for completion tokens alone: the prompt's last hidden state predicts the first of them, and the
    hidden state of token t predicts token t + 1. With gradient checkpointing, where running a layer again would add to the
    cache again, each row is run whole.
    """
    ids, mask, owner = rollouts.ids, rollouts.mask, rollouts.owner
    attended = F.pad(rollouts.prompt_mask[owner], (0, ids.shape[1] - 1), value=1)  # (B, L+T−1): nothing looks back at padding
    if getattr(model, "checkpointed", False):
        rows = torch.cat([rollouts.prompt_ids[owner], ids[:, :-1]], 1)  # (B, L+T−1)
        hidden = hidden_states(model, rows, attended)[:, -ids.shape[1] :]  # (B, T, D)
    else:
        first, cache = prefill(model, rollouts.prompt_ids, rollouts.prompt_mask)  # (P, D)
        hidden = first.index_select(0, owner)[:, None]  # (B, 1, D)
        if ids.shape[1] > 1:
            for layer in cache.layers:  # (P, …) to (B, …); the backward pass of [] wouldn't add up in a fixed order
                layer.keys, layer.values = layer.keys.index_select(0, owner), layer.values.index_select(0, owner)
            hidden = torch.cat([hidden, hidden_states(model, ids[:, :-1], attended, cache)], 1)  # (B, T, D)
    assert hidden.shape[:2] == ids.shape  # hidden[:, t] is what the model knew when it drew ids[:, t]
    logprobs = token_logprobs(model.get_output_embeddings(), hidden[mask], ids[mask], temperature)  # (tokens,)
    return torch.zeros(ids.shape, device=ids.device).masked_scatter(mask, logprobs)


def token_logprobs(head: Any, hidden: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """log softmax(head(hidden) / temperature) at `ids`: (M, D) and (M,) to (M,).

    With a vocabulary of 150,000, logits are by far the largest tensor. So they are computed for a few tokens at a time,
    and again in the backward pass instead of being kept.
    """
    part = lambda hidden, ids: -F.cross_entropy(head(hidden).float() / temperature, ids, reduction="none")  # noqa: E731
    rows = max(1, MAX_LOGITS // head.weight.shape[0])
    if len(ids) <= rows:
        return part(hidden, ids)
    return torch.cat([checkpoint(part, *some, use_reentrant=False) for some in zip(hidden.split(rows), ids.split(rows))])


def policy_gradient(model: Any, batches: Sequence[tuple[Rollouts, Tensor]], config: Config) -> float:
    """Add the gradient of the loss to the parameters' `.grad`, and return the loss. Advantages are (P, N).

        loss = − Σ_i Σ_t Â_i log π(y_it | x, y_i<t) / (number of completion tokens)

    Its value says nothing about progress: only its gradient means something, the policy gradient with Â. The policy
    that sampled is the policy that learns, with one update a batch, so PPO's ratio π/π_old is exactly 1, its clip
    never binds, and the gradient of ratio·Â is that of Â·log π: neither is needed. (--updates has them, in
    experiments/ppo.py.)

    Groups without a signal have a gradient of exactly zero and are never run; equal completions of a prompt, frequent
    where a policy is peaked, earn the same and are run once, with the sum of their advantages. The divisor counts the
    tokens of all completions (DAPO's mean over tokens, not GRPO's over completions first), so that none of this, nor the
    cut into micro-batches, changes the gradient.
    """
    tokens, total = sum(rollouts.mask.sum() for rollouts, _ in batches), 0.0
    for rollouts, advantages in batches:
        weights = merge_equal(rollouts, advantages)  # (B,)
        for rows in micro_batches(rollouts, weights, config.micro_tokens):
            logprobs = completion_logprobs(model, take(rollouts, rows), config.temperature)  # (B', T')
            loss = -(weights[rows, None] * logprobs).sum() / tokens  # (B', 1) and (B', T'): the same on every token
            loss.backward()
            total += loss.item()
    return total


def merge_equal(rollouts: Rollouts, advantages: Tensor) -> Tensor:
    """Advantages (P, N) as one weight per row (B,): their sum on the first of equal completions of a prompt, 0 on others."""
    assert advantages.numel() == len(rollouts.owner)  # (P, N) and (B,): row i·N + j is sample j of prompt i
    rows = zip(rollouts.owner.tolist(), rollouts.ids.tolist(), rollouts.mask.sum(1).tolist())
    texts, sums = [(owner, *ids[:length]) for owner, ids, length in rows], {}
    for text, advantage in zip(texts, advantages.flatten().tolist()):
        sums[text] = sums.get(text, 0.0) + advantage
    return torch.tensor([sums.pop(text, 0.0) for text in texts], device=rollouts.ids.device)  # the first takes it all


def take(rollouts: Rollouts, rows: Tensor) -> Rollouts:
    """The rollouts of `rows` (B',), without the prompts of others and without columns that hold only padding."""
    prompts, owner = rollouts.owner[rows].unique(return_inverse=True)  # (P',) and (B',)
    start = int(rollouts.prompt_mask[prompts].any(0).int().argmax())  # the first column that any of these prompts uses
    longest = int(rollouts.mask[rows].sum(1).max())
    prompt_ids, prompt_mask = rollouts.prompt_ids[prompts, start:], rollouts.prompt_mask[prompts, start:]
    ids, mask = rollouts.ids[rows, :longest], rollouts.mask[rows, :longest]
    return Rollouts(prompt_ids, prompt_mask, owner, ids, mask, rollouts.entropy)


def micro_batches(rollouts: Rollouts, weights: Tensor, micro_tokens: int) -> Iterator[Tensor]:
    """Cut the rows whose weight (B,) isn't 0 into index tensors (B',) of at most `micro_tokens` padded tokens.

    Whole groups of like length go together; only a group that is too large by itself is cut, down to single rows.
    """
    lengths, rows = rollouts.mask.sum(1), weights.nonzero().squeeze(1)
    groups = [rows[rollouts.owner[rows] == prompt] for prompt in rollouts.owner[rows].unique()]
    part = rows[:0]
    for group in sorted(groups, key=lambda group: int(lengths[group].max())):
        fit = max(1, micro_tokens // (rollouts.prompt_ids.shape[1] + int(lengths[group].max())))  # rows of that length
        if len(part) and len(part) + len(group) > fit:
            yield part
            part = rows[:0]
        if len(group) > fit:
            yield from group[lengths[group].argsort(stable=True)].split(fit)
        else:
            part = torch.cat([part, group])
    if len(part):
        yield part


# --- pass@k -----------------------------------------------------------------------------------------------------------

def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, c of them correct, hold a correct one: 1 − C(n−c,k)/C(n,k) (arXiv 2107.03374).

    Exact integers up to one correctly rounded division, so it holds for any n. Raises ValueError unless
    0 ≤ c ≤ n and 1 ≤ k ≤ n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    subsets = math.comb(n, k)
    return (subsets - math.comb(n - c, k)) / subsets


def evaluate(policy: Policy, task: Task, config: Config, interrupted: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Sample `eval_samples` completions of each held-out problem: counts, and unbiased pass@k in percent.

    The dictionary holds `n`, `correct` and `distinct` (how many of n are right, and how many different ones, a number
    per problem), `pass_at_k` (k as text → percent), and `tasks`, the same per task where the problems are of several.
    The random numbers are the same at every call.
    """
    n, problems = config.eval_samples or (256 if config.task == "countdown" else config.samples), task.held_out
    generator = torch.Generator(policy.device).manual_seed(config.seed + EVALUATION_SEED)
    correct, distinct, at_once = [], [], max(1, config.eval_rows // n)  # problems
    for start in trange(0, len(problems), at_once, desc="evaluating", unit="batch", leave=False, dynamic_ncols=True):
        part = problems[start : start + at_once]
        prompts = encode(policy, [problem.prompt for problem in part], task.instruction)
        completions = decode(policy, sample(policy, *prompts, n, config, generator))
        right = judge(completions, part, task.rewards) >= SOLVED  # (problems, n)
        correct += right.sum(1).tolist()
        distinct += [len({completions[i * n + j] for j in row.nonzero().flatten().tolist()}) for i, row in enumerate(right)]
        if interrupted():
            raise KeyboardInterrupt
    ks = sorted({2**i for i in range(n.bit_length())} | {n})

    def mean(name: str | None = None) -> dict[str, float]:  # over the problems of one task, or over all
        counts = [c for c, problem in zip(correct, problems) if name in (None, problem.task)]
        return {str(k): 100 * sum(pass_at_k(n, c, k) for c in counts) / len(counts) for k in ks}

    tasks = {name: mean(name) for name in sorted({problem.task for problem in problems})}
    return {"n": n, "correct": correct, "distinct": distinct, "pass_at_k": mean(), "tasks": tasks}


# --- Training ---------------------------------------------------------------------------------------------------------

@dataclass
class State:
    """What a run knows beside its weights."""
    solved: Tensor  # (training problems,) bool: solved at least once
    step: int = 0  # done so far
    drawn: int = 0  # training problems taken so far
    failed: int = 0  # updates that were not finite
    metrics_bytes: int = 0  # size of metrics.jsonl after this step
    results: dict[str, Any] = field(default_factory=lambda: {"steps": {}})  # what eval.json holds


def train(config: Config, resume: bool = False, interrupted: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Train a policy and measure its pass@k before and after. Everything is written to `config.run_folder`.

    Returns what `eval.json` holds: `base`, `trained` and those on the way by step, each as described at `evaluate`. With
    `resume`, goes on from the folder's checkpoint, or from the start if the run was killed before its first.
    Raises BadInput; FloatingPointError when updates keep failing; KeyboardInterrupt, after saving, once `interrupted()`.
    """
    folder = open_run_folder(config, resume)
    task, policy = load_task(config), load_policy(config)
    write_atomically(folder / SETTINGS, asdict(config))
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    generator = torch.Generator(policy.device).manual_seed(config.seed)  # the only source of randomness in training
    state = State(solved=torch.zeros(len(task.train), dtype=torch.bool))
    if resume:
        load_checkpoint(folder, policy, optimizer, generator, state)
    results, failed_in_a_row = state.results, 0

    def measure(into: dict[str, Any], name: str) -> None:
        if name not in into:  # otherwise it was measured before the run was stopped
            into[name] = evaluate(policy, task, config, interrupted)
            write_atomically(folder / RESULTS, results)
            save_checkpoint(folder, policy, optimizer, generator, state)

    with open(folder / METRICS, "a") as metrics_file:
        measure(results, "base")
        if config.steps > state.step:
            ids, _ = encode(policy, [task.train[0].prompt], task.instruction)
            tqdm.write(f"a prompt as the model sees it: {policy.tokenizer.decode(ids[0])!r}")
        steps = range(state.step + 1, config.steps + 1)
        bar = tqdm(steps, "training", config.steps, initial=state.step, unit="step", dynamic_ncols=True)
        for step in bar:
            if config.eval_every and step > 1 and (step - 1) % config.eval_every == 0:
                measure(results["steps"], str(step - 1))
            started, failures = time.perf_counter(), task.failures()
            batches: list[tuple[Rollouts, Tensor]] = []
            signal = 0  # groups whose advantages are not all zero
            while not batches or (signal < config.prompts and len(batches) <= config.dynamic_sampling):
                # 1. Take P problems of the training set, each once an epoch.
                indices = next_indices(state, config.prompts, config.seed)
                problems = [task.train[i] for i in indices]
                # 2. Sample N completions of each from the policy.
                prompts = encode(policy, [problem.prompt for problem in problems], task.instruction)
                rollouts = sample(policy, *prompts, config.samples, config, generator)
                completions = decode(policy, rollouts)
                # 3. Judge every completion by the rule.
                rewards = judge(completions, problems, task.rewards)  # (P, N)
                state.solved[torch.tensor(indices)[rewards.amax(1) >= SOLVED]] = True
                # 4. Turn rewards into advantages, group by group. (Too few have a signal? --dynamic-sampling draws again.)
                advantages = ADVANTAGES[config.advantage](rewards, config)  # (P, N)
                batches.append((rollouts, advantages))
                signal += int((advantages != 0).any(1).sum())
            sampling_seconds = time.perf_counter() - started
            # 5. Take one step up the policy gradient. (With --updates a few, each on a part of the batch.)
            gradients, grad_norms = [policy_gradient], []
            if config.updates > 1:
                from experiments.ppo import clipped_gradients

                gradients = clipped_gradients(policy, batches, config)
            for gradient in gradients:  # on CUDA with matrix products in bfloat16, like the policy that sampled
                with torch.autocast(policy.device.type, torch.bfloat16, enabled=policy.sampler is not policy.model):
                    loss = gradient(policy.model, batches, config)
                grad_norms.append(torch.nn.utils.clip_grad_norm_(policy.model.parameters(), MAX_GRAD_NORM).item())
                finite = math.isfinite(loss) and math.isfinite(grad_norms[-1])
                state.failed += not finite
                failed_in_a_row = 0 if finite else failed_in_a_row + 1
                if failed_in_a_row == MAX_FAILURES:
                    reason = f"loss or gradient was not finite {MAX_FAILURES} times in a row, up to step {step}"
                    raise FloatingPointError(f"{reason}; start again with a lower --lr")
                if finite:
                    optimizer.param_groups[0]["lr"] = config.lr * min(1.0, step / WARMUP_STEPS)
                    optimizer.step()
                optimizer.zero_grad()
            refresh_sampler(policy)

            seconds = time.perf_counter() - started
            metrics = {  # where --dynamic-sampling draws again, reward to advantage_size are of the last draw, signal of all
                "step": step,
                "reward": rewards.mean().item(),
                "solved": (rewards.amax(1) >= SOLVED).float().mean().item(),
                "signal": signal / (config.prompts * len(batches)),
                "entropy": rollouts.entropy,
                "length": rollouts.mask.sum(1).float().mean().item(),
                "grad_norm": sum(grad_norms) / len(grad_norms),
                "advantage_size": advantages.abs().mean().item(),
                "solve_rate": state.solved.float().mean().item(),
                "failed_updates": state.failed,
                "failed_verifications": task.failures() - failures,
                "seconds": seconds,
                "sampling_seconds": sampling_seconds,
                "tokens_per_second": sum(rollouts.mask.sum().item() for rollouts, _ in batches) / seconds,
            }
            print(json.dumps(metrics), file=metrics_file, flush=True)
            state.step, state.metrics_bytes = step, metrics_file.tell()
            bar.set_postfix_str(PROGRESS.format(**metrics), refresh=False)
            if step % max(1, config.steps // 5) == 0:
                tqdm.write(showcase(step, problems, completions, rewards))
            if interrupted() or any(n and step % n == 0 for n in (config.save_every, config.eval_every, config.steps)):
                save_checkpoint(folder, policy, optimizer, generator, state)
            if interrupted():
                raise KeyboardInterrupt

        results["trained"] = evaluate(policy, task, config, interrupted) if config.steps else results["base"]
        if config.steps:
            policy.model.save_pretrained(folder / "model")
            policy.tokenizer.save_pretrained(folder / "model")
    write_atomically(folder / RESULTS, results)
    draw_pass_at_k(results, folder / "passk.png")
    return results


def next_indices(state: State, count: int, seed: int) -> list[int]:
    """The next `count` training problems: each once an epoch, in an order set by seed and epoch alone."""
    problems, places = len(state.solved), range(state.drawn, state.drawn + count)
    state.drawn += count
    orders = {e: np.random.default_rng([seed, e]).permutation(problems) for e in {p // problems for p in places}}
    return [int(orders[p // problems][p % problems]) for p in places]


def judge(completions: Sequence[str], problems: Sequence[Problem], rewards: Callable[..., list[float]]) -> Tensor:
    """Rewards (P, N) of P·N completions, those of one problem lying together."""
    samples = len(completions) // len(problems)
    return torch.tensor(rewards(completions, [p.answer for p in problems for _ in range(samples)])).view(-1, samples)


def showcase(step: int, problems: Sequence[Problem], completions: Sequence[str], rewards: Tensor) -> str:
    """A few completions to read: of the three prompts with the most mixed rewards, the best and the worst one."""
    lines = [f"step {step}"]
    for i in rewards.std(1).argsort(descending=True, stable=True)[:3].tolist():
        for j in sorted({int(rewards[i].argmax()), int(rewards[i].argmin())}):
            text = completions[i * rewards.shape[1] + j][:500]
            lines.append(f"  reward {rewards[i, j]:.2f}  {problems[i].prompt} {text!r}")
    return "\n".join(lines)


# A first reader can stop here: the algorithm is complete. What follows surrounds it.

# --- Tasks and models -------------------------------------------------------------------------------------------------

def load_task(config: Config) -> Task:
    """The task that `config` names, its problems the same for every seed. Raises BadInput if it can't be had."""
    if config.task != "countdown" or config.eval_task not in ("", "countdown"):
        from experiments import more_tasks  # Countdown in words; mathematics, from the hub or a file

        return more_tasks.load_task(config)
    train = countdown_problems(config.train_problems, held_out=False)
    held_out = countdown_problems(config.eval_problems, held_out=True)
    return Task(train, held_out, lambda texts, answers: [countdown_reward(t, *a) for t, a in zip(texts, answers)])


def load_policy(config: Config) -> Policy:
    """Load a model of the hub or of a folder, in float32 and evaluation mode. Raises BadInput if it can't be used."""
    if config.model == EMBEDDED and config.task != "countdown":
        raise BadInput(f"--task {config.task} is in words, which {EMBEDDED} can't read; name another model with --model")
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.zeros(0, device=best if config.device == "auto" else config.device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(f"--device {config.device} can't be used here ({first_line(error)}); auto picks one that can") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache  # here: importing this file stays cheap
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.utils import logging

    logging.disable_progress_bar()
    name = HERE / EMBEDDED if config.model == EMBEDDED else os.path.expanduser(config.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device).eval()  # no dropout, ever
    except Exception as error:  # whatever a hub, a config or a damaged file may raise: it can't be loaded
        where = "can't be loaded" if os.path.exists(name) else "is no folder here and can't be had from the hub"
        reason = f"{where} ({first_line(error)}); give a folder with a causal language model, or a hub id"
        raise BadInput(f"--model {config.model} {reason}") from error
    with torch.no_grad():
        ids = torch.tensor([[0, 1]], device=device)
        head, hidden = model.get_output_embeddings(), model.base_model(ids).last_hidden_state
        plain = head is not None and torch.allclose(model(ids).logits, head(hidden), atol=1e-4)
    if not plain or not all(hasattr(layer, "batch_select_indices") for layer in DynamicCache(config=model.config).layers):
        reason = "changes its logits after the output layer, or has layers without a cache of keys and values"
        raise BadInput(f"--model {config.model} {reason}, which isn't supported here; choose a plain transformer")
    stops = [tokenizer.eos_token_id, getattr(model.generation_config, "eos_token_id", None)]
    stops = {i for stop in stops if stop is not None for i in (stop if isinstance(stop, list) else [stop])}
    # Adding an update of 1e-6 to a weight of 1e-2 is lost in bfloat16's 8 bits: a model kept in it hardly learns. So the
    # weights that learn are float32, with bfloat16 products (autocast); sampling, bound by memory traffic, reads a copy.
    low = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
    sampler = copy.deepcopy(model) if low else model
    for parameter in sampler.parameters() if low else ():
        parameter.data = parameter.data.to(torch.bfloat16)  # not .to() of the model: rotary frequencies stay float32
    model.checkpointed = config.checkpointing
    for layer in model.modules():
        if config.checkpointing and isinstance(layer, GradientCheckpointingLayer):
            layer.forward = functools.partial(run_checkpointed, layer.forward)
    return Policy(model, sampler, tokenizer, torch.tensor(sorted(stops), dtype=torch.long, device=device), device)


def run_checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A layer's `forward`; in learning, what it computes on the way is computed again in the backward pass, not kept."""
    again = {"use_reentrant": False, "preserve_rng_state": False}  # no dropout, so no randomness
    return checkpoint(forward, *args, **again, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)


@torch.no_grad()
def refresh_sampler(policy: Policy) -> None:
    """Copy the weights that learn into those that sample, where they are not the same."""
    if policy.sampler is not policy.model:
        for sampling, learning in zip(policy.sampler.parameters(), policy.model.parameters()):
            sampling.copy_(learning)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- The run folder: what a resumed run reads is never half written ---------------------------------------------------

def open_run_folder(config: Config, resume: bool) -> Path:
    """The run's folder: a new or empty one, or with `resume` one that holds the same settings. Raises BadInput."""
    folder = config.run_folder
    if resume:
        for name, stored in stored_settings(folder).items():
            value, flag = getattr(config, name), f"--{name.replace('_', '-')}"
            if name != "out" and value != stored and not (name == "steps" and value > stored):
                raise BadInput(f"{flag} is {value}, but {folder} was started with {stored}; leave it out")
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # a run can write here
    except OSError as error:
        raise BadInput(f"--out {folder} can't be written ({error.strerror}); choose another folder") from error
    if any(path.suffix != ".tmp" for path in folder.iterdir()):
        raise BadInput(f"{folder} isn't empty; go on with the run in it by --resume, or choose another folder with --out")
    return folder


def stored_settings(folder: Path) -> dict[str, Any]:
    """The settings in a run folder's config.json. Raises BadInput."""
    try:
        return asdict(Config(**json.loads((folder / SETTINGS).read_text())))
    except FileNotFoundError as error:
        reason = "start one without --resume, or name its folder with --out"
        raise BadInput(f"there is no run in {folder} to resume; {reason}") from error
    except (OSError, TypeError, ValueError) as error:
        raise BadInput(f"{folder / SETTINGS} can't be read ({error}); mend it, or start again in another folder") from error


def write_atomically(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, or what torch.load reads, beside `path` and move it into place: a kill leaves the old or the new, whole."""
    aside = path.with_suffix(".tmp")
    if path.suffix == ".pt":
        torch.save(content, aside)
    else:
        aside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(aside, path)


def save_checkpoint(folder: Path, policy: Policy, optimizer: Any, generator: torch.Generator, state: State) -> None:
    """Everything that later steps depend on, in one file."""
    parts = {"model": policy.model.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
    write_atomically(folder / CHECKPOINT, {**parts, "state": vars(state)})


def load_checkpoint(folder: Path, policy: Policy, optimizer: Any, generator: torch.Generator, state: State) -> None:
    """Put everything back as at `save_checkpoint`, and cut the metrics there. Raises BadInput for a damaged file."""
    path = folder / CHECKPOINT
    if path.exists():  # otherwise the run was killed before its first checkpoint, and starts again from step 0
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)  # weights_only: data, no code
            policy.model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            generator.set_state(saved["generator"])
            vars(state).update(asdict(State(**saved["state"])))
        except Exception as error:  # zip, pickle, missing key or shape: whichever it is, the file is no checkpoint
            remedy = "resume on the kind of device that wrote it, or delete it to start this run again from step 0"
            raise BadInput(f"{path} can't be used here or is damaged ({first_line(error)}); {remedy}") from error
        refresh_sampler(policy)
    with open(folder / METRICS, "ab") as metrics:
        metrics.truncate(min(metrics.tell(), state.metrics_bytes))


# --- What a person looks at -------------------------------------------------------------------------------------------

def table(results: dict[str, Any]) -> str:
    """pass@k of base and trained side by side, in percent, and the distinct correct answers per problem."""
    base, names = results["base"], ["base"] if results["trained"] is results["base"] else ["base", "trained"]
    columns = [results[name] for name in names]
    rows = [["", *names], *([f"pass@{k}", *(f"{of['pass_at_k'][k]:.1f}" for of in columns)] for k in base["pass_at_k"])]
    for task in base["tasks"] if len(base["tasks"]) > 1 else ():
        rows += [[task], *([f"pass@{k}", *(f"{of['tasks'][task][k]:.1f}" for of in columns)] for k in base["pass_at_k"])]
    rows.append(["distinct", *(f"{sum(of['distinct']) / len(of['distinct']):.2f}" for of in columns)])
    lines = [f"{len(base['correct'])} held-out problems, {base['n']} samples each, percent"]
    return "\n".join(lines + ["".join(f"{cell:>10}" for cell in row) for row in rows]) + "   correct answers a problem"


def draw_pass_at_k(results: dict[str, Any], path: Path) -> None:
    """Draw pass@k over k of base and trained."""
    try:
        from matplotlib.figure import Figure  # no pyplot: no display is needed
    except ImportError:
        return print(f"{path.name} was not drawn: pip install matplotlib")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, color in (("base", "0.55"), ("trained", "C3")):
        curve = results[name]["pass_at_k"]
        axes.plot([int(k) for k in curve], list(curve.values()), "o-", color=color, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks([int(k) for k in curve], list(curve))
    axes.set(xlabel="k", ylabel="pass@k on held-out problems (%)", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: a flag for every field of `Config`, and --resume."""
    files = "A run folder holds config.json, metrics.jsonl, eval.json, passk.png, checkpoint.pt and model/."
    settings = {"epilog": files, "argument_default": argparse.SUPPRESS, "allow_abbrev": False}
    parser = argparse.ArgumentParser("rs_grpo.py", description=__doc__.splitlines()[0], **settings)
    parser.error = lambda message: parser.exit(2, f"rs_grpo.py: {message}; see --help\n")
    for f in fields(Config):
        default = f" (default: {f.default})" if f.default != "" else ""
        kind = {"action": argparse.BooleanOptionalAction} if type(f.default) is bool else {"type": type(f.default)}
        parser.add_argument(f"--{f.name.replace('_', '-')}", help=f.metadata["help"] + default, **kind)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with the settings stored there")
    given = vars(parser.parse_args(arguments))
    resume = given.pop("resume", False)
    asked, handler = [], signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, handler)
        os.write(2, b"\nsaving after this step; Ctrl-C again breaks off at once\n")

    try:
        config = Config(**given)
        if resume:
            folder = config.run_folder
            config = Config(**{**stored_settings(folder), **given, "out": str(folder)})
        signal.signal(signal.SIGINT, ask)
        results = train(config, resume, lambda: bool(asked))
    except (BadInput, FloatingPointError) as error:
        parser.exit(2 if isinstance(error, BadInput) else 1, f"rs_grpo.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\nstopped; go on with: python rs_grpo.py --resume --out {config.run_folder}\n")
    finally:
        signal.signal(signal.SIGINT, handler)
    print(table(results))
    trained = f"; the trained model in {config.run_folder / 'model'}/" if config.steps else ""
    print(f"everything is in {config.run_folder}/{trained}")


if __name__ == "__main__":
    sys.modules["rs_grpo"] = sys.modules["__main__"]  # what experiments/ imports is this very file, not a second copy
    main()
