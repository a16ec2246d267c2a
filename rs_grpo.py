"""Risk-Sensitive GRPO (arXiv 2509.24261) in one file, from prompt to pass@k.

Reinforcement learning with verifiable rewards improves a language model's first answer, but the
best of many answers can get worse. Answers of a common kind are sampled most, so they dominate the
gradient of the mean reward. As prompts share the model's weights, common kinds become likelier even
on prompts where they fail. Prompts that only a rare kind of answer solves suffer: training ends in
a local optimum. RS-GRPO maximises an objective that gives these prompts more weight. For a
prompt x, completions y ~ π(·|x) and their rewards r(y), it is

    J_β = (1/β) log E[exp(βr)]      the mean reward for β → 0, the largest reward for β → ∞

    ∇J_β = (1/β) ∇E[exp(βr)] / E[exp(βr)] = E[ (1/β) exp(βr)/E[exp(βr)] · ∇log π ]
         = E[ A ∇log π ]   with the advantage   A = (1/β) (exp(βr)/E[exp(βr)] − 1)

by the chain rule and ∇E[f(y)] = E[f(y) ∇log π(y|x)], as in every policy gradient. The last line
subtracts 1/β, a baseline: it changes no expectation, since E[∇log π] = 0.

We estimate A from a prompt's N samples, its group, with the mean of their exp(βr) in place of the
expectation; the bias vanishes as N grows. For GRPO only A differs here: (r − mean(r)) / std(r). A
training step: 1. take P prompts; 2. sample N completions of each; 3. judge them by a rule; 4. turn
rewards into advantages; 5. take one step along the policy gradient, with its norm clipped and the
learning rate warmed up. There is no value network, no reward model and, unlike in the GRPO paper,
no KL penalty. pass@k, the chance that at least one of k samples is right, on held-out problems:

    percent, mean of five seeds              k = 1    k = 32    k = 256
    the model before training                 19.1      47.2       65.3
    trained with GRPO                         28.1      47.2       57.4
    trained with β = 2                        26.8      57.8       64.4

    python rs_grpo.py                     # train the embedded model on Countdown, and test it
    python rs_grpo.py --advantage grpo    # the same with GRPO

Legend: P prompts per step, N samples of each, B = P·N completions; R rows of a batch; L tokens of a
prompt, T of a completion, S of one forward pass; D the model's width, V its vocabulary.
"""

import argparse
import ast
import inspect
import json
import math
import os
import re
import shlex
import sys
import time
from ast import Add, Div, Mult, Sub
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from functools import partial
from operator import add, mul, sub
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm, trange


class BadInput(ValueError):
    """An error that the user can fix: one sentence that says what was wrong and what to do."""


# --- Advantages: the one function that changes ----------------------------------------------------
def risk_sensitive_advantage(rewards: Tensor, beta: float | Tensor) -> Tensor:
    """The advantage whose policy gradient is that of (1/β) log E[exp(βr)] (Theorem 1).

        Â_i = (1/β) ( exp(βr_i) / mean_j exp(βr_j) − 1 )        r_i − mean_j r_j for β → 0

    Advantages of correct / wrong samples when c of 16 are correct; ratio: a correct one's at c = 1
    divided by that at c = 8. It grows with β: hard prompts get relatively more weight.
                   c = 1          c = 4          c = 8         c = 15       ratio
        β = 0   .938/−.063     .750/−.250     .500/−.500     .063/−.938      1.9
        β = 2   2.140/−.143    .922/−.307     .381/−.381     .029/−.428      5.6
        β = 8   1.865/−.124    .374/−.125     .125/−.125     .008/−.125     14.9
        GRPO    3.873/−.258    1.732/−.577       1/−1        .258/−3.873     3.9
    rewards: (P, N), binary or continuous. beta: a number or (P, 1); below 0 it is averse to risk.
    Returns (P, N) in the dtype of `rewards`, float32 for integers. A row sums to zero, and is
    exactly 0 where its rewards are equal. Raises ValueError for other shapes, infinity and nan.
    """
    r = rewards.to("cpu", torch.float64)  # (P, N); not every device has float64
    beta = torch.as_tensor(beta, dtype=torch.float64, device="cpu")  # () or (P, 1)
    if r.dim() != 2:
        raise ValueError(f"rewards must be (P, N), a group in each row, not {tuple(r.shape)}")
    if beta.dim() and beta.shape != (len(r), 1):
        raise ValueError(f"beta must be a number or (P, 1), not {tuple(beta.shape)}")
    if not (beta * r).isfinite().all():
        raise ValueError(f"rewards and beta must be finite: {rewards}, {beta}")
    neutral = beta.abs() < 1e-8
    beta = torch.where(neutral, 1.0, beta)  # no division by 0
    r = r - r.amax(1, keepdim=True)  # cancels below; equal rewards become exactly 0
    mean_baseline = r - r.mean(1, keepdim=True)
    exponent = beta * r
    weight = (exponent - exponent.amax(1, keepdim=True)).exp()  # no overflow, even for β < 0
    risk_sensitive = (weight / weight.mean(1, keepdim=True) - 1) / beta
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    advantages = torch.where(neutral, mean_baseline, risk_sensitive)
    return advantages.to(rewards.device, dtype)


def grpo_advantage(rewards: Tensor) -> Tensor:
    """Â_i = (r_i − mean(r)) / (std(r) + 1e-6), with the population's std (GRPO, arXiv 2402.03300).
    As with the mean baseline, nearly solved prompts (c = 15) weigh as much as hard ones (c = 1).
    """
    advantages = risk_sensitive_advantage(rewards, 0.0)  # the mean baseline (P, N)
    std = advantages.std(1, keepdim=True, correction=0)  # (P, 1), that of the rewards
    return advantages / (std + 1e-6)


ADVANTAGES = {  # add your own: (rewards (P, N), Config) -> advantages (P, N)
    "rs": lambda rewards, config: risk_sensitive_advantage(rewards, config.beta),
    "grpo": lambda rewards, config: grpo_advantage(rewards),
}


# --- The task: Countdown, with a reward that a rule computes --------------------------------------
EMBEDDED = Path(__file__).resolve().parent / "countdown-base"  # the model and its problems
OPERATORS = {Add: add, Sub: sub, Mult: mul, Div: Fraction}  # division is exact
EXAMPLES = """Numbers: 2, 3, 5. Target: 11. Answer: 2 * 3 + 5
Numbers: 1, 4, 8. Target: 28. Answer: (8 - 1) * 4
"""  # these show a pretrained model the format of the problems in train-3.txt


class Task(NamedTuple):
    train: list  # problems: (question, answer), the answer being whatever the judge needs
    held_out: list
    encode: Any  # (tokenizer, questions) -> token ids of each prompt
    judge: Any  # (completions as text, answer of each) -> rewards, 1 if solved
    max_tokens: int = 20  # of a completion
    stop: str = ""  # text that ends a completion, as EOS does; "" is none


def countdown(config, suffix="", examples="", max_tokens=20, stop=""):
    """The Task of reaching a target with some numbers: `4,7,9,12=48:` asks for `12*7-9*4`."""
    return Task(
        train=read_problems(f"train{suffix}.txt"),
        held_out=read_problems(f"held-out{suffix}.txt")[: config.eval_problems],
        encode=lambda tokenizer, questions: tokenizer([examples + q for q in questions]).input_ids,
        judge=countdown_rewards,
        max_tokens=max_tokens,
        stop=stop,
    )


TASKS = {  # add your own: Config -> Task
    "countdown": countdown,
    "countdown-text": partial(countdown, suffix="-3", examples=EXAMPLES, max_tokens=14, stop="\n"),
}


def read_problems(name):
    """The problems in a file of the embedded model's folder: (question, (numbers, target))."""
    problems = []
    for question in (EMBEDDED / name).read_text().splitlines():
        *numbers, target = map(int, re.findall("[0-9]+", question))
        problems.append((question, (numbers, target)))
    return problems


def countdown_rewards(completions, answers):
    """For each completion 1.0 if its expression equals the target, else 0.0."""
    return [
        float(countdown_value(completion, numbers) == target)
        for completion, (numbers, target) in zip(completions, answers)
    ]


def countdown_value(completion, numbers):
    """The exact value of a completion's first line, or None unless it uses each number just once.
    A completion is hostile input: at most 100 characters are parsed, and nothing is executed.
    """
    line = completion.partition("\n")[0].strip()
    if not re.fullmatch(r"[0-9+\-*/() ]{1,100}", line):
        return None
    used = re.findall("[0-9]+", line)
    if sorted(used) != sorted(map(str, numbers)):
        return None

    def value(node):
        if isinstance(node, ast.Constant):
            return node.value
        if not isinstance(node, ast.BinOp) or type(node.op) not in OPERATORS:
            raise ValueError  # a sign, a call, `**`, `//`
        calculate = OPERATORS[type(node.op)]
        return calculate(value(node.left), value(node.right))

    try:
        return value(ast.parse(line, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


# --- Sampling -------------------------------------------------------------------------------------
class Policy(NamedTuple):  # a causal language model, and what sampling and learning need to know
    model: Any  # its weights are float32
    tokenizer: Any
    stop_ids: set  # the tokens that end a completion: EOS, and those that contain the task's `stop`
    cache_name: str  # the name of the forward pass's KV cache argument
    autocast: Any  # opens the torch.autocast context for forward passes


@torch.no_grad()
def sample(policy, prompts, samples, max_tokens, temperature, generator):
    """Draw N = `samples` completions of each of P prompts from softmax(logits / temperature).
    Samples of a prompt that have the same tokens so far share a row, so that a common beginning is
    computed once. A row of `count` samples draws `count` tokens. Each distinct token makes a row of
    the next round, for the samples that drew it. Returns B completions, tuples of token ids, group
    by group; and the entropy in nats per token, estimated by the mean of −log π.
    """
    hidden, mask, cache = prefill(policy, prompts)  # (R, D), (R, L), with R = P
    rows = [(i, (), samples) for i in range(len(prompts))]  # prompt's index, tokens so far, count
    groups = [[] for _ in prompts]
    surprise = 0.0  # the sum of −log π over all drawn tokens
    for length in range(1, max_tokens + 1):
        probs = scaled_logits(policy, hidden, temperature).softmax(-1)  # (R, V)
        if probs[:, 0].isnan().any():  # one infinite logit makes its whole row nan
            raise BadInput("infinite logits; start again with a lower --lr or --precision bfloat16")
        most = max(count for _, _, count in rows)
        draws = probs.multinomial(most, True, generator=generator)  # a row uses its first `count`
        logprobs = probs.gather(1, draws).log().tolist()
        draws = draws.tolist()
        next_rows, newest, parents = [], [], []  # in parallel: row, its last token, parent row
        for row, (i, tokens, count) in enumerate(rows):
            surprise -= sum(logprobs[row][:count])
            drawn = Counter(draws[row][:count])
            for token, times in drawn.items():
                longer = (*tokens, token)
                if token in policy.stop_ids or length == max_tokens:
                    groups[i] += [longer] * times
                else:
                    next_rows.append((i, longer, times))
                    newest.append([token])
                    parents.append(row)
        if not next_rows:
            break
        rows = next_rows
        parents = torch.tensor(parents, device=mask.device)  # (R,), with a new R
        newest = torch.tensor(newest, device=mask.device)  # (R, 1)
        select_rows(cache, parents)
        mask = mask[parents]
        mask = F.pad(mask, (0, 1), value=True)  # the newest token
        hidden = hidden_states(policy, newest, mask, cache)[:, -1]  # (R, D)
    completions = sum(groups, [])
    return completions, surprise / sum(map(len, completions))


def prefill(policy, prompts):
    """Run prompts once: final hidden states of their last tokens (P, D), mask (P, L), and cache."""
    from transformers import DynamicCache  # here, since importing transformers is slow

    cache = DynamicCache(config=policy.model.config)
    ids, mask = pad(policy, prompts, "left")
    hidden = hidden_states(policy, ids, mask, cache)  # (P, L, D)
    return hidden[:, -1], mask, cache


def hidden_states(policy, ids, mask, cache):
    """Final hidden states (R, S, D) of new tokens (R, S); mask (R, cached + S). The cache grows."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # the mask is False on padding: it isn't counted
    positions = positions[:, -ids.shape[1] :]  # (R, S)
    inputs = {"attention_mask": mask, "position_ids": positions, policy.cache_name: cache}
    return policy.model.base_model(ids, **inputs)[0]


def select_rows(cache, rows):
    """Keep these rows of the cache, in this order; a row may repeat."""
    for layer in cache.layers:  # on a CPU index_select has a deterministic gradient, unlike [rows]
        layer.keys = layer.keys.index_select(0, rows)
        layer.values = layer.values.index_select(0, rows)


def scaled_logits(policy, hidden, temperature):
    return policy.model.get_output_embeddings()(hidden).float() / temperature


def pad(policy, rows, side):
    """Tuples of token ids as a matrix, padded on `side`, and a mask that is True on tokens."""
    rows = [torch.tensor(row) for row in rows]
    ids = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side=side)
    ids = ids.to(policy.model.device)
    return ids.clamp(min=0), ids >= 0  # any id will do for padding: the mask hides it


class Rollouts(NamedTuple):  # B completions, those of a prompt (its group of N) together
    questions: list  # P of them
    prompts: list  # B tuples of token ids: the prompt of each completion
    completions: list  # B tuples of token ids
    texts: list  # B completions, as text
    rewards: Tensor  # (P, N)
    entropy: float  # of the policy, estimated on them, in nats per token

    @property
    def tokens(self):
        return sum(map(len, self.completions))


def roll_out(policy, task, problems, n, config, generator):
    """Sample n completions of each problem, and judge them: Rollouts."""
    questions = [question for question, _ in problems]
    encoded = [tuple(ids) for ids in task.encode(policy.tokenizer, questions)]
    longest = config.max_tokens or task.max_tokens
    with policy.autocast():
        completions, entropy = sample(policy, encoded, n, longest, config.temperature, generator)
    texts = policy.tokenizer.batch_decode(completions, skip_special_tokens=True)
    prompts = [prompt for prompt in encoded for _ in range(n)]
    answers = [answer for _, answer in problems for _ in range(n)]
    rewards = torch.tensor(task.judge(texts, answers), dtype=torch.float32)  # (B,)
    rewards = rewards.view(-1, n)  # (P, N)
    return Rollouts(questions, prompts, completions, texts, rewards, entropy)


# --- The loss, and pass@k -------------------------------------------------------------------------
def completion_logprobs(policy, prompts, completions, temperature):
    """log π of every completion token of R rows at the sampling temperature, (R, T); 0 on padding.
    The keys and values of a prompt are computed once and handed to all its completions.
    """
    different = list(dict.fromkeys(prompts))  # at most R
    last, prompt_mask, cache = prefill(policy, different)  # of each prompt: (…, D), (…, L)
    ids, mask = pad(policy, completions, "right")  # (R, T)
    owner = [different.index(prompt) for prompt in prompts]
    owner = torch.tensor(owner, device=ids.device)  # (R,): the place of its prompt
    hidden = last.index_select(0, owner)[:, None]  # (R, 1, D): it predicts the first token
    if ids.shape[1] > 1:
        select_rows(cache, owner)  # a row for each completion
        attended = torch.cat([prompt_mask[owner], mask[:, :-1]], 1)  # (R, L+T−1)
        later = hidden_states(policy, ids[:, :-1], attended, cache)
        hidden = torch.cat([hidden, later], 1)  # (R, T, D): hidden[:, t] predicts ids[:, t]
    logprobs = token_logprobs(policy, hidden[mask], ids[mask], temperature)
    padded = torch.zeros(ids.shape, device=ids.device)
    return padded.masked_scatter(mask, logprobs)


def token_logprobs(policy, hidden, ids, temperature):
    """log softmax(logits / temperature) of M tokens `ids` (M,), predicted from `hidden` (M, D).
    Logits are by far the largest tensor: only a part exists at a time, and backward recomputes it.
    """

    def some_logprobs(hidden, ids):
        logits = scaled_logits(policy, hidden, temperature)
        return -F.cross_entropy(logits, ids, reduction="none")

    vocabulary = policy.model.get_output_embeddings().weight.shape[0]
    size = max(1, 2**25 // vocabulary)  # tokens at a time: 128 MiB of logits
    logprobs = []
    for part in zip(hidden.split(size), ids.split(size)):
        logprobs.append(checkpoint(some_logprobs, *part, use_reentrant=False))
    return torch.cat(logprobs)


def micro_batches(rollouts, advantages, micro_tokens):
    """Cut a batch into (prompts, completions, weights) of at most `micro_tokens` tokens or one row.
    Equal completions of a prompt have equal gradients: one stands for all, with their summed Â.
    """
    weights = Counter()
    rows = zip(rollouts.prompts, rollouts.completions)
    for row, advantage in zip(rows, advantages.flatten().tolist()):
        weights[row] += advantage
    rows = [row for row in weights if weights[row] != 0]  # the others have no gradient
    rows.sort(key=lambda row: (row[0], len(row[1])))  # group by group, like lengths together
    width = sum(max(map(len, side)) for side in zip(*rows))  # longest prompt + longest completion
    size = max(1, micro_tokens // max(1, width))
    batches = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        prompts, completions = zip(*part)
        part_weights = [weights[row] for row in part]
        batches.append((prompts, completions, part_weights))
    return batches


def policy_gradient(policy, rollouts, advantages, config, logprobs=completion_logprobs):
    """Put the gradient of the loss into the parameters' `.grad`. Advantages are (P, N).
        loss = − Σ_i Σ_t Â_i log π(y_it | x, y_i<t) / (number of completion tokens)
    Its value means nothing. PPO's ratio π/π_old is missing: the policy that sampled is the one that
    learns, so the ratio is 1, and ratio·Â and Â·log π have the same gradient. One divisor for the
    whole batch gives every token the same weight (DAPO, arXiv 2503.14476). We divide last, in the
    float32 `.grad`: to divide the loss would let float16 gradients underflow.
    """
    for prompts, completions, weights in micro_batches(rollouts, advantages, config.micro_tokens):
        with policy.autocast():
            logps = logprobs(policy, prompts, completions, config.temperature)  # (R, T)
        weights = torch.tensor(weights, device=logps.device)  # (R,)
        total = -(weights[:, None] * logps).sum()  # each token has its completion's weight
        total.backward()
    for parameter in policy.model.parameters():
        if parameter.grad is not None:
            parameter.grad /= rollouts.tokens


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k random ones of n samples, c of them correct, include a correct one.
    An unbiased estimate of pass@k (arXiv 2107.03374). Raises ValueError for other counts."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    all_wrong = math.comb(n - c, k) / math.comb(n, k)
    return 1 - all_wrong


def evaluate(policy, task, config):
    """For each problem, how many completions are correct and how many of these differ; pass@k."""
    n = config.eval_samples
    correct, distinct = [], []
    generator = torch.Generator(policy.model.device).manual_seed(10**6 + config.seed)
    at_once = max(1, config.prompts * config.samples // n)  # problems, for B samples at once
    for start in trange(0, len(task.held_out), at_once, desc="evaluating"):
        problems = task.held_out[start : start + at_once]
        rollouts = roll_out(policy, task, problems, n, config, generator)
        for i, rewards in enumerate(rollouts.rewards.tolist()):
            texts = rollouts.texts[i * n : (i + 1) * n]
            right = [text.strip() for text, reward in zip(texts, rewards) if reward >= 1]
            correct.append(len(right))
            distinct.append(len(set(right)))
    percent = {}
    for power in range(n.bit_length()):
        k = 2**power
        solved = sum(pass_at_k(n, c, k) for c in correct)
        percent[k] = 100 * solved / len(correct)
    return {"n": n, "correct": correct, "distinct": distinct, "pass_at_k": percent}


# --- Training -------------------------------------------------------------------------------------
def flag(default, help, least=None, above=None):
    """A setting: default, help and, for a number, its `least` value or what it must be `above`."""
    if type(default) in (int, float) and least is None and above is None:
        raise TypeError(f"the number {default} ({help}) needs a bound, least or above")
    metadata = {"help": help, "least": least, "above": above}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:  # each setting is a flag of the command line
    advantage: str = flag("rs", "rs or grpo; extensions/estimators.py has others")
    beta: float = flag(2.0, "risk sensitivity of rs; 0 is the mean baseline", above=-math.inf)
    samples: int = flag(16, "completions of a prompt, its group", least=2)
    model: str = flag(EMBEDDED.name, "the embedded one, or a causal language model's folder or id")
    task: str = flag("countdown", "or countdown-text, for pretrained models; see extensions/")
    steps: int = flag(800, "training steps; 0 only evaluates", least=0)
    lr: float = flag(5e-5, "AdamW's learning rate; 1e-6 to 2e-5 for pretrained models", above=0)
    prompts: int = flag(32, "prompts per step", least=1)
    max_tokens: int = flag(0, "longest completion in tokens; 0 is the task's own limit", least=0)
    temperature: float = flag(1.0, "of sampling; the loss uses the same", above=0)
    seed: int = flag(0, "of the order of problems and of every sampled token", least=0)
    eval_problems: int = flag(256, "at most this many held-out problems to evaluate on", least=1)
    eval_samples: int = flag(256, "samples per held-out problem; k = 1, 2, 4 … up to it", least=1)
    out: str = flag("", "run folder; by default runs/MODEL-ADVANTAGE-seedN")
    save_every: int = flag(50, "steps between checkpoints; a kill loses at most this many", least=1)
    micro_tokens: int = flag(4096, "tokens per micro-batch; changes memory and rounding", least=1)
    device: str = flag("auto", "auto (CUDA, else MPS, else CPU), or one such as cpu or cuda:1")
    precision: str = flag("auto", "float32, float16, bfloat16; auto: 16 bits on CUDA, else float32")

    @property
    def run_folder(self):
        name = f"rs-{self.beta:g}" if self.advantage == "rs" else self.advantage
        return Path(self.out or f"runs/{Path(self.model).name}-{name}-seed{self.seed}")


def collect(policy, task, config, state, generator):
    """Steps 1 to 4: Rollouts and their advantages (P, N). state.step: steps done so far."""
    # 1. Take P problems in an order set by the seed; an epoch leaves out the last few.
    steps_per_epoch = max(1, len(task.train) // config.prompts)
    epoch, turn = divmod(state.step, steps_per_epoch)
    rng = np.random.default_rng([config.seed, epoch])
    order = rng.permutation(len(task.train))
    start = turn * config.prompts
    indices = order[start : start + config.prompts]
    # 2. Sample N completions of each from the policy, and 3. judge them by the rule.
    problems = [task.train[i] for i in indices]
    rollouts = roll_out(policy, task, problems, config.samples, config, generator)
    # 4. Turn rewards into advantages, group by group.
    return rollouts, ADVANTAGES[config.advantage](rollouts.rewards, config)


def update(policy, optimizer, rollouts, advantages, config, step):
    """Step 5: one step along the policy gradient. Returns the gradient's norm."""
    policy_gradient(policy, rollouts, advantages, config)
    return apply_gradient(policy, optimizer, config, step)


def apply_gradient(policy, optimizer, config, step):
    """Step if the gradient is finite; clear it in any case. Returns its norm."""
    norm = clip_grad_norm_(policy.model.parameters(), 1.0).item()
    if math.isfinite(norm):
        warmup = min(1.0, step / 10)  # the first step is 1
        optimizer.param_groups[0]["lr"] = config.lr * warmup
        optimizer.step()
    optimizer.zero_grad()
    return norm


def train(config, resume=False, collect=collect, update=update):  # extensions replace these two
    """Train a policy and measure its pass@k; everything goes into `config.run_folder`.
    Returns {step: what `evaluate` returned}, as in eval.json. Raises BadInput. A checkpoint holds
    all that later steps depend on: weights, optimizer, the generator's state and `state`. It is
    written every `save_every` steps and around evaluations, and replaces the last one atomically,
    so a kill or Ctrl-C loses at most the steps since then. With `resume` the lost steps are run
    again, on a CPU with identical results, on CUDA with the same random numbers but other rounding.
    """
    check_config(config)
    task = TASKS[config.task](config)
    policy = load_policy(config, task)
    model = policy.model
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    generator = torch.Generator(model.device).manual_seed(config.seed)  # draws training's tokens
    state = SimpleNamespace(step=0, failed=0, results={})  # failed: how many updates in a row
    checkpointed = (config.run_folder, model, optimizer, generator, state)
    save = partial(save_checkpoint, *checkpointed)
    with open_run_folder(config, resume) as metrics_file:
        if resume:
            load_checkpoint(*checkpointed)
        if state.step == 0:
            evaluate_once(policy, task, config, state, save)
        bar = tqdm(total=config.steps, initial=state.step)
        while state.step < config.steps:
            started = time.perf_counter()
            rollouts, advantages = collect(policy, task, config, state, generator)
            norm = update(policy, optimizer, rollouts, advantages, config, state.step + 1)
            state.step += 1
            state.failed = 0 if math.isfinite(norm) else state.failed + 1
            if state.failed == 3:
                raise BadInput("three updates in a row weren't finite; start with a lower --lr")
            report(metrics_file, bar, rollouts, advantages, norm, state, started)
            if state.step % config.save_every == 0:
                save()
        evaluate_once(policy, task, config, state, save)
    model.save_pretrained(config.run_folder / "model")
    policy.tokenizer.save_pretrained(config.run_folder / "model")
    return state.results


def evaluate_once(policy, task, config, state, save):
    """Save; then evaluate at this step, unless that is done, and save again."""
    save()
    if state.step not in state.results:
        state.results[state.step] = evaluate(policy, task, config)
        save()


# A first reader can stop here: the algorithm is complete. What follows checks, loads, saves, shows.
def check_config(config):
    """Raise BadInput for a setting that can't work."""
    precisions = ("auto", "float32", "float16", "bfloat16")
    choices = {"advantage": ADVANTAGES, "task": TASKS, "precision": precisions}
    for name, known in choices.items():
        value = getattr(config, name)
        if value not in known:
            wanted = f"one of {', '.join(known)}"
            raise BadInput(f"--{name} is {value}, but must be {wanted}; see --help")
    for setting in fields(config):
        value = getattr(config, setting.name)
        least = setting.metadata["least"]
        above = setting.metadata["above"]
        wrong = f"--{setting.name.replace('_', '-')} is {value}, but must be"
        if least is not None and not least <= value < 2**62:
            raise BadInput(f"{wrong} at least {least} and below 2**62")
        if above is not None and not above < value < 2**62:
            raise BadInput(f"{wrong} above {above} and below 2**62")


@torch.no_grad()
def load_policy(config, task):
    """The Policy of the model that `config` names. Raises BadInput if it can't be used."""
    model, tokenizer = load_model(config)
    eos_ids = np.atleast_1d(model.generation_config.eos_token_id)  # None, one or several
    stop_ids = {tokenizer.eos_token_id, *eos_ids}
    if task.stop:
        vocabulary = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        stop_ids |= {i for i, text in enumerate(vocabulary) if task.stop in text}
    arguments = inspect.signature(model.base_model.forward).parameters
    policy = Policy(
        model=model,
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        cache_name="cache" if "cache" in arguments else "past_key_values",  # was renamed
        autocast=nullcontext,  # float32, also in the checks below
    )
    question = task.train[0][0]
    prompt = tuple(task.encode(tokenizer, [question])[0])
    refusal = f"--model {config.model} can't be used; give a plain transformer"
    if tokenizer.unk_token_id in prompt:
        raise BadInput(f"{refusal} that can read the prompts of --task {config.task}")
    hidden, _, cache = prefill(policy, [prompt])
    if not all(hasattr(layer, "keys") for layer in cache.layers):
        raise BadInput(f"{refusal}, whose layers all keep keys and values")
    ids = torch.tensor([prompt], device=model.device)
    logits = model(ids).logits[:, -1]
    if not torch.allclose(logits, scaled_logits(policy, hidden, 1), 0.01, 0.01):
        raise BadInput(f"{refusal}, which doesn't scale or cap its logits after the output layer")
    precision = config.precision
    if precision == "auto" and model.device.type != "cuda":
        precision = "float32"
    elif precision == "auto":
        precision = half_precision(model, ids)
    dtype = getattr(torch, precision)
    print(f"{model.device}, {dtype}, {config.model} of {model.num_parameters():,} parameters")
    if dtype == torch.float32:
        return policy
    return policy._replace(autocast=partial(torch.autocast, model.device.type, dtype))


def half_precision(model, ids):
    """float16, which rounds less than bfloat16 but overflows in some models, or bfloat16."""
    with torch.autocast(model.device.type, torch.float16):
        finite = model(ids).logits.isfinite().all()
    return "float16" if finite else "bfloat16"


def load_model(config):
    """The model, with float32 weights on its device, and its tokenizer. Raises BadInput."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, utils

    utils.logging.disable_progress_bar()
    torch.backends.cuda.enable_cudnn_sdp(False)  # gave NaN gradients, pytorch issue 196678
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # overflows in sums
    name = EMBEDDED if config.model == EMBEDDED.name else config.model
    device = config.device
    try:
        if device == "auto":
            device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        return model.to(device).eval(), tokenizer
    except OUT_OF_MEMORY:
        raise
    except Exception as error:  # whatever a hub, a damaged file or a missing driver may raise
        reason = f"--model {config.model} can't be loaded on --device {config.device}"
        remedy = "give a causal language model's folder or hub id, and an available device"
        raise BadInput(f"{reason} ({error!r:.200}); {remedy}") from error


def open_run_folder(config, resume):
    """Write config.json, open metrics.jsonl. Raises BadInput if a new run's folder isn't empty."""
    folder = config.run_folder
    folder.mkdir(parents=True, exist_ok=True)
    if not resume and any(folder.iterdir()):
        raise BadInput(f"{folder} isn't empty; go on with --resume, or choose another --out")
    (folder / "config.tmp").write_text(json.dumps(asdict(config), indent=1))
    os.replace(folder / "config.tmp", folder / "config.json")
    return (folder / "metrics.jsonl").open("a")


def save_checkpoint(folder, model, optimizer, generator, state):
    (folder / "eval.json").write_text(json.dumps(state.results))
    parts = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
        "state": vars(state),
    }
    torch.save(parts, folder / "checkpoint.tmp")
    os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")  # atomic


def load_checkpoint(folder, model, optimizer, generator, state):
    """Restore the last checkpoint, and drop the metrics of later steps. Raises BadInput."""
    try:
        saved = torch.load(folder / "checkpoint.pt", map_location="cpu")  # data only, runs no code
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        vars(state).update(saved["state"])
    except OUT_OF_MEMORY:
        raise
    except Exception as error:  # a missing or damaged file, or another model's
        raise BadInput(f"{folder} can't be resumed ({error!r:.200}); take another --out") from error
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(True)
    os.truncate(folder / "metrics.jsonl", sum(map(len, lines[: state.step])))


def report(metrics_file, bar, rollouts, advantages, norm, state, started):
    """Write a line of metrics.jsonl and show it as the progress bar; now and then show a sample."""
    metrics = {
        "step": state.step,
        "reward": rollouts.rewards.mean().item(),
        "grad_norm": norm,
        "signal": advantages.any(1).float().mean().item(),  # groups with an Â that isn't 0
        "entropy": rollouts.entropy,
        "length": rollouts.tokens / len(rollouts.completions),
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(metrics), file=metrics_file, flush=True)
    shown = "reward {reward:.2f} signal {signal:.2f} entropy {entropy:.2f} grad {grad_norm:.2f}"
    bar.set_postfix_str(shown.format(**metrics))
    bar.update()
    if state.step % max(1, bar.total // 20) == 0:
        reward = rollouts.rewards[0, 0]
        bar.write(f"  reward {reward:.2f}  {rollouts.questions[0]} {rollouts.texts[0][:500]!r}")


def show(results, path):
    """Print and draw pass@k before and after training."""
    from matplotlib.figure import Figure  # no pyplot: no display is needed

    base = results[min(results)]
    trained = results[max(results)]
    print(f"{len(base['correct'])} held-out problems, {base['n']} samples each, percent")
    print(f"{'base':>20}{'trained':>10}")
    for k, percent in base["pass_at_k"].items():
        print(f"{f'pass@{k}':>10}{percent:>10.1f}{trained['pass_at_k'][k]:>10.1f}")
    axes = Figure().subplots()
    for name, result in (("base", base), ("trained", trained)):
        percent = result["pass_at_k"]
        ks = list(percent)
        axes.semilogx(ks, percent.values(), "o-", base=2, label=name)
    axes.set(xlabel="k", ylabel="pass@k on held-out problems (%)")
    axes.legend()
    axes.figure.savefig(path)


# --- The command line -----------------------------------------------------------------------------
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
MAY_CHANGE = {"out", "steps", "save_every", "micro_tokens"}  # with --resume; folders may move
MEMORY = """out of memory; --resume goes on with a smaller --micro-tokens, or start again with \
smaller --prompts, --samples, --max-tokens, --eval-samples or --model"""


def resumed(config, given):
    """The Config stored in `config`'s run folder, changed by the `given` flags. Raises BadInput."""
    folder = config.run_folder
    stored = json.loads((folder / "config.json").read_text())
    if stored.keys() != vars(config).keys():
        raise BadInput(f"{folder} was made by a script with other settings; resume it with that")
    for name in given.keys() - MAY_CHANGE:
        if given[name] != stored[name]:
            raise BadInput(f"--{name.replace('_', '-')} was {stored[name]}, and has to stay so")
    settings = stored | given | {"out": str(folder)}
    return type(config)(**settings)


def make_parser(config_class):
    """A flag for every setting of the class, and --resume."""
    script = sys.modules[config_class.__module__]  # this file, or an extension
    name = Path(script.__file__).name
    about = (script.__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(name, usage="%(prog)s [flags]", description=about)
    parser.error = lambda message: parser.exit(2, f"{name}: {message}; see --help\n")  # one line
    for setting in fields(config_class):
        kind = {"type": type(setting.default)}
        if setting.default is False:  # a switch; only extensions have some
            kind = {"action": "store_true"}
        kind["help"] = f"{setting.metadata['help']} (default: {setting.default!r})"
        option = "--" + setting.name.replace("_", "-")
        parser.add_argument(option, default=argparse.SUPPRESS, **kind)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    return parser


def main(arguments=None, config_class=Config, collect=collect, update=update):
    """The command line. Returns the Config and what `train` returned."""
    parser = make_parser(config_class)
    given = vars(parser.parse_args(arguments))
    resume = given.pop("resume")
    try:
        config = config_class(**given)
        if resume:
            config = resumed(config, given)
        results = train(config, resume, collect, update)
        show(results, config.run_folder / "passk.png")
    except KeyboardInterrupt:
        parser.exit(130, f"\nstopped; to go on: {shlex.join(sys.orig_argv)} --resume\n")
    except (BadInput, OSError, json.JSONDecodeError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except (RuntimeError, MemoryError) as error:
        said = re.search("(?i)out of memory|alloc", str(error))  # by a CPU, MPS or cuBLAS
        if not said and not isinstance(error, OUT_OF_MEMORY):
            raise
        parser.exit(1, f"{parser.prog}: {MEMORY}\n")
    print(f"everything is in {config.run_folder}/, the trained model in its model/")
    return config, results


if __name__ == "__main__":
    main()
