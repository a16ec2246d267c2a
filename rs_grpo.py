"""Risk-Sensitive GRPO (arXiv 2509.24261) in one file, from prompt to pass@k.

Reinforcement learning with verifiable rewards makes a language model's first answer better and its
hundredth worse: a policy that starts out peaked gets stuck in a local optimum of the mean reward.
RS-GRPO maximises another objective. For a prompt x, completions y ~ π(·|x) and their rewards r(y),

    J_β = (1/β) log E[exp(βr)]      the mean reward for β → 0, the best of all samples for β → ∞

Its gradient takes two lines. The first is the chain rule, with ∇E[f(y)] = E[f(y) ∇log π(y|x)], the
identity behind every policy gradient. The second takes 1/β from the factor of every sample, which
changes nothing in expectation, since E[∇log π] = 0: a constant is a baseline.

    ∇J_β = (1/β) ∇E[exp(βr)] / E[exp(βr)] = E[ (1/β) exp(βr)/E[exp(βr)] · ∇log π ]
         = E[ A ∇log π ]   with the advantage   A = (1/β) (exp(βr)/E[exp(βr)] − 1)

The N samples of a prompt, its group, estimate A: that is `risk_sensitive_advantage`, and the one
function that changes. All else is GRPO at its plainest: sample N completions of each prompt, judge
them by a rule, take one on-policy gradient step. Left out, as the method needs none of them: a value
network, a reward model, a KL penalty, a reference model. What comes of it (percent of 256 held-out
problems, five seeds of 800 steps, experiments/compare.py; pass@k: one of k samples is right):

                                pass@1   pass@32   pass@256
    the model before training     19.0      47.3       66.1
    trained with GRPO             28.3      46.7       56.6
    trained with β = 2            27.3      59.1       66.0

    python rs_grpo.py                     # train the embedded model on Countdown, pass@k before, after
    python rs_grpo.py --advantage grpo    # the same with GRPO
    python rs_grpo.py --resume            # go on where a killed run stopped, to the same numbers
    python rs_grpo.py --model HuggingFaceTB/SmolLM2-360M-Instruct --task countdown-text --lr 1e-5

Legend: P prompts a step, N samples of each, B = P·N completions, some of them B'; R rows of a batch;
L tokens of a prompt, T of a completion; D width of the model, V size of its vocabulary.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import inspect
import json
import math
import operator
import os
import re
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm, trange

# --- Advantages: the one function that changes, and its rivals --------------------------------------


def risk_sensitive_advantage(rewards: Tensor, beta: float | Tensor) -> Tensor:
    """Prefer what lifts (1/β) log E[exp(βr)] over what lifts the mean (Theorem 1 of the paper).

        Â_i = (1/β) ( exp(βr_i) / mean_j exp(βr_j) − 1 )

    Of 16 samples, the advantage of a correct / of a wrong one, if c are correct:

                   c = 1          c = 4          c = 8         c = 15
        β = 0   .938/−.063     .750/−.250     .500/−.500     .063/−.938
        β = 2   2.140/−.143    .922/−.307     .381/−.381     .029/−.428
        β = 8   1.865/−.124    .374/−.125     .125/−.125     .008/−.125

    Read along the rows: the larger β, the more of the gradient goes to prompts that are hardly ever
    solved (c = 1), the less to those that often are. Down a column says little: 1.865 is less than
    2.140, but 15 times what β = 8 gives to a correct sample at c = 8, where β = 2 has 6 times.

    rewards: (P, N), a group a row, binary or continuous. beta: finite, one number or (P, 1); below 0
    it averts risk. Returns (P, N) in the dtype of `rewards`, float32 for integers. A row sums to
    zero, and is exactly 0 where its rewards are equal. Raises ValueError for any other input.
    """
    beta = torch.as_tensor(beta).to("cpu", torch.float64)
    if rewards.dim() != 2 or not beta.isfinite().all():
        raise ValueError(f"rewards must be (P, N) and beta finite; got {rewards.shape} and {beta}")
    r = rewards.to("cpu", torch.float64)  # not every device has float64
    r = r - r.amax(1, keepdim=True)  # a constant cancels, and equal rewards are exactly 0
    weight = (beta * r - (beta * r).amax(1, keepdim=True)).exp()  # exp(βr), up to what cancels
    advantages = (weight / weight.mean(1, keepdim=True) - 1) / beta  # (P, N)
    advantages = torch.where(beta.abs() < 1e-8, r - r.mean(1, keepdim=True), advantages)  # β → 0
    return advantages.to(rewards if rewards.is_floating_point() else rewards.float())


def mean_baseline_advantage(rewards: Tensor) -> Tensor:
    """Â_i = r_i − mean(r): what lifts the mean reward, the limit β → 0 (Dr. GRPO, arXiv 2503.20783)."""
    return risk_sensitive_advantage(rewards, 0.0)


def grpo_advantage(rewards: Tensor) -> Tensor:
    """Â_i = (r_i − mean(r)) / (std(r) + 1e-6), with the population's std (GRPO, arXiv 2402.03300).

    Dividing gives hard and easy prompts the same weight: 3.873/−.258 at c = 1, .258/−3.873 at c = 15.
    """
    advantages = mean_baseline_advantage(rewards)  # (P, N)
    return advantages / (advantages.std(1, keepdim=True, correction=0) + 1e-6)


ADVANTAGES = {  # add your own: rewards (P, N) to advantages (P, N)
    "rs": lambda rewards, config: risk_sensitive_advantage(rewards, config.beta),
    "mean": lambda rewards, config: mean_baseline_advantage(rewards),
    "grpo": lambda rewards, config: grpo_advantage(rewards),
}


# --- The task: Countdown, with a reward that a rule computes ----------------------------------------

EMBEDDED = Path(__file__).resolve().parent / "countdown-base"  # the model beside this file
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: Fraction,
}
EXAMPLES = """Numbers: 2, 3, 5. Target: 11. Answer: 2 * 3 + 5
Numbers: 4, 6, 12. Target: 8. Answer: 12 * 4 / 6
"""  # these show a pretrained model the format


class Task(NamedTuple):
    train: list[tuple[str, Any]]  # problems: the prompt, and what the rule needs to know
    held_out: list[tuple[str, Any]]
    reward: Callable[[str, Any], float]  # of a completion, given the latter; 1 is solved
    preamble: str = ""  # what the model reads before each prompt
    one_line: bool = False  # whether a line break ends a completion
    max_tokens: int = 20  # of a completion


def countdown(config, in_words=False):
    """The Task of making a target from numbers and + - * /, each number used once.

    Four numbers as the embedded model knows them, `4,7,9,12=48:`; or `in_words` three numbers, in a
    line after two worked examples, for any pretrained model. experiments/pretrain.py made the files.
    """

    def problem(line):
        *numbers, target = map(int, re.findall("[0-9]+", line))
        words = f"Numbers: {', '.join(map(str, numbers))}. Target: {target}. Answer:"
        return words if in_words else line, (numbers, target)

    names = ("train-3.txt", "held-out-3.txt") if in_words else ("train.txt", "held-out.txt")
    train, held_out = ((EMBEDDED / name).read_text().split() for name in names)
    train = [problem(line) for line in train[: config.train_problems]]
    held_out = [problem(line) for line in held_out[: config.eval_problems]]
    return Task(train, held_out, countdown_reward, *((EXAMPLES, True, 14) if in_words else ()))


TASKS = {"countdown": countdown, "countdown-text": functools.partial(countdown, in_words=True)}


def countdown_reward(completion, answer):
    """1.0 if its first line uses each number exactly once and equals the target, else 0.0.

    A completion is hostile input: Python's parser reads it, but nothing evaluates it. Its length is
    bounded, and with it nesting and the size of every number; arithmetic is exact; whatever isn't a
    number, a bracket or one of four operators (a sign, `**`, `//`, a second answer) is no answer.
    """
    numbers, target = answer
    line = completion.partition("\n")[0].strip()
    if len(line) > 100 or not re.fullmatch(r"[0-9+\-*/() ]+", line):
        return 0.0
    if sorted(re.findall("[0-9]+", line)) != sorted(map(str, numbers)):
        return 0.0

    def value(node):
        if isinstance(node, ast.Constant):
            return node.value
        return OPERATORS[type(node.op)](value(node.left), value(node.right))

    try:
        return float(value(ast.parse(line, mode="eval").body) == target)
    except (SyntaxError, AttributeError, KeyError, ZeroDivisionError):  # a call, a sign, x/0 …
        return 0.0


# --- Sampling ---------------------------------------------------------------------------------------


class Policy(NamedTuple):
    """A causal language model with what is needed to sample from it and to learn."""

    model: Any  # float32 weights
    tokenizer: Any
    eos_ids: list[int]  # tokens that say nothing but that the completion is over
    stop_ids: Tensor  # tokens that end a completion: these and, in a task of one line, line breaks
    dtype: torch.dtype  # of matrix products, in sampling and in learning alike


@torch.no_grad()
def sample(policy, prompts, samples, config, generator):
    """Draw completions of P prompts from softmax(logits / temperature), so many samples of each.

    Prompts and completions are tuples of token ids. Returns B completions, those of a prompt (its
    group) together, each with the token that ended it; and the policy's entropy in nats a token, as
    the mean of −log π over the drawn tokens, which is an unbiased estimate.

    The model computes R rows at a time. At first a row is a prompt, and all its samples share it;
    later it is what some samples have in common so far. (A first reader may skip `share_rows`: with
    a row for each sample everything would be the same, only slower.)
    """
    hidden, mask, cache = prefill(policy, prompts)  # (R, D), (R, tokens so far)
    completions = [()] * (len(prompts) * samples)
    going = torch.arange(len(completions), device=mask.device)  # (B',), samples not yet ended
    row = going // samples  # (B',), the row that each of them continues
    surprise = 0.0  # the sum of −log π over all drawn tokens
    for length in range(1, config.max_tokens + 1):
        probs = scaled_logits(policy, hidden, config.temperature).softmax(-1)  # (R, V)
        draws = probs.multinomial(samples, replacement=True, generator=generator)  # (R, N)
        token = draws[row, going % samples]  # (B',): sample i of a group takes draw i of its row
        for i, drawn in zip(going.tolist(), token.tolist()):
            completions[i] += (drawn,)
        surprise -= probs[row, token].log().sum()
        unfinished = ~torch.isin(token, policy.stop_ids)  # (B',)
        if length == config.max_tokens or not unfinished.any():
            break
        going, row, token = going[unfinished], row[unfinished], token[unfinished]
        parent, token, row = share_rows(row, token)  # (R,), (R,), (B',)
        if parent.tolist() != list(range(len(mask))):  # unless every row goes on, once
            cache.batch_select_indices(parent)
            mask = mask[parent]
        mask = F.pad(mask, (0, 1), value=1)
        hidden = hidden_states(policy, token[:, None], mask, cache)[:, 0]  # (R, D)
    return completions, float(surprise) / sum(map(len, completions))


def share_rows(row, token):
    """Samples that are equal so far go on as one row. Samples: (B',), new rows: (R,).

    Each sample adds `token` to what it has so far, its `row`. Three samples of two rows, two cases:

        row 0 0 1, token 7 7 5: two rows, 0 with 7 and 1 with 5; the samples' rows are 0 0 1
        row 0 0 1, token 7 9 5: three, 0 with 7, 0 with 9 and 1 with 5; the samples' rows are 0 1 2

    Returns the old row that each new one continues, its token, and the new row of each sample.
    """
    many = token.max() + 1
    text, row = (row * many + token).unique(return_inverse=True)  # a number for row and token
    return text // many, text % many, row


def prefill(policy, prompts):
    """Run prompts once: final hidden states of their last tokens (P, D), mask (P, L), and cache."""
    from transformers import DynamicCache  # not above: importing this file stays cheap

    cache = DynamicCache(config=policy.model.config)
    ids, mask = pad(policy, prompts, "left")
    return hidden_states(policy, ids, mask, cache)[:, -1], mask, cache


def hidden_states(policy, ids, mask, cache):
    """Final hidden states (B, T, D) of token ids (B, T), which follow the cache and are added to it.

    mask: (B, tokens in the cache + T), 0 on padding, which takes no position.
    """
    model = policy.model.base_model
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]  # (B, T)
    past = {cache_argument(type(model)): cache, "use_cache": True}
    return model(ids, attention_mask=mask, position_ids=positions, **past).last_hidden_state


def scaled_logits(policy, hidden, temperature):
    logits = policy.model.get_output_embeddings()(hidden).float()
    return logits if temperature == 1 else logits / temperature


def pad(policy, rows, side):
    """Tuples of token ids as a matrix, and a mask that is 1 on them and 0 on padding of that side."""
    rows = [torch.tensor(row) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(rows, True, -1, side).to(policy.model.device)
    return ids.clamp(min=0), (ids >= 0).long()  # any id will do for padding: the mask hides it


# --- The loss ---------------------------------------------------------------------------------------


def policy_gradient(policy, rollouts, advantages, config):
    """Put the gradient of the loss into the parameters' `.grad`. Advantages are (P, N).

        loss = − Σ_i Σ_t Â_i log π(y_it | x, y_i<t) / (number of completion tokens)

    Its value says nothing about progress; its gradient is the policy gradient. PPO's ratio π/π_old
    is missing because the policy that sampled is the one that learns: the ratio is 1, up to rounding
    (in float16 by some .004 a token), and ratio·Â and Â·log π then have the same gradient.

    Groups whose advantages are all 0 are never run. The divisor counts the tokens of all completions
    (DAPO, arXiv 2503.14476), so that the cut into micro-batches changes nothing; it comes last, in
    float32, because the gradient of a mean is too small for float16.
    """
    for prompts, completions, weights in micro_batches(rollouts, advantages, config.micro_tokens):
        logprobs = completion_logprobs(policy, prompts, completions, config.temperature)  # (B', T)
        weights = torch.tensor(weights, device=logprobs.device)  # (B',)
        loss = -(weights[:, None] * logprobs).sum()  # the same weight on every token
        loss.backward()
    for parameter in policy.model.parameters():
        if parameter.grad is not None:
            parameter.grad /= sum(map(len, rollouts.completions))


def completion_logprobs(policy, prompts, completions, temperature):
    """log π of every completion token at the sampling temperature, (B, T), and 0 on padding.

    `prompts` has one for each completion. As in sampling, equal ones are run once: their keys and
    values are handed to all their completions, and the gradients of those flow back into them.
    """
    different = list(dict.fromkeys(prompts))  # P of them
    last, prompt_mask, cache = prefill(policy, different)  # (P, D), (P, L)
    ids, mask = pad(policy, completions, "right")  # (B, T)
    owner = torch.tensor([different.index(prompt) for prompt in prompts], device=ids.device)  # (B,)
    hidden = last.index_select(0, owner)[:, None]  # (B, 1, D): predicts the first token
    if ids.shape[1] > 1:
        for layer in cache.layers:  # (P, …) to (B, …); [owner] would add up gradients in any order
            layer.keys = layer.keys.index_select(0, owner)
            layer.values = layer.values.index_select(0, owner)
        attended = torch.cat([prompt_mask[owner], mask[:, :-1]], 1)  # (B, L+T−1)
        later = hidden_states(policy, ids[:, :-1], attended, cache)  # token t predicts token t + 1
        hidden = torch.cat([hidden, later], 1)
    assert (
        hidden.shape[:2] == ids.shape
    )  # hidden[:, t] is what the model knew when it drew ids[:, t]
    mask = mask.bool()
    logprobs = token_logprobs(policy, hidden[mask], ids[mask], temperature)
    return torch.zeros(ids.shape, device=ids.device).masked_scatter(mask, logprobs)


# --- pass@k -----------------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, c of them correct, hold a correct one: 1 − C(n−c,k)/C(n,k).

    Unbiased (arXiv 2107.03374), and exact up to one rounding. Raises ValueError for other counts.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def evaluate(policy, task, config):
    """Sample `eval_samples` completions of each held-out problem; the same random numbers each time.

    Returns a dictionary: `n`; `correct` and `distinct`, how many of the n completions of a problem
    are right, and how many different ones; `pass_at_k`, in percent, by k as text.
    """
    n, correct, distinct = config.eval_samples, [], []
    generator = torch.Generator(policy.model.device).manual_seed(config.seed + EVALUATION_SEED)
    at_once = max(1, config.eval_rows // n)  # problems
    for start in trange(0, len(task.held_out), at_once, desc="evaluating", leave=False):
        rollouts = roll_out(policy, task, task.held_out[start:][:at_once], n, config, generator)
        for i, right in enumerate(rollouts.rewards >= 1):  # (n,)
            correct.append(int(right.sum()))
            distinct.append(len({rollouts.texts[i * n + j] for j in right.nonzero()}))
    ks = sorted({2**i for i in range(n.bit_length())} | {n})
    percent = {str(k): 100 * sum(pass_at_k(n, c, k) for c in correct) / len(correct) for k in ks}
    return {"n": n, "correct": correct, "distinct": distinct, "pass_at_k": percent}


# --- Training ---------------------------------------------------------------------------------------

WARMUP_STEPS = 10  # the learning rate rises linearly over these
MAX_GRAD_NORM = 1.0  # a longer gradient is shortened to it
EVALUATION_SEED = 1_000_003  # added to --seed: evaluation and training draw different numbers


@dataclass(frozen=True)
class Config:
    """The settings of a run. Each is a flag of the command line, and its comment is the flag's help."""

    # the method
    advantage: str = "rs"  # rs, mean or grpo
    beta: float = 2.0  # risk sensitivity of rs: 0 is the mean; the paper advises 2
    samples: int = 16  # completions of a prompt, its group; the paper has 16
    # a step
    model: str = EMBEDDED.name  # folder or hub id of a causal language model
    task: str = "countdown"  # countdown, or countdown-text for a pretrained model
    steps: int = 500  # training steps; 0 only evaluates
    lr: float = 1e-4  # AdamW's learning rate; a pretrained model wants 1e-5 to 1e-6
    prompts: int = 32  # prompts a step
    max_tokens: int = 0  # longest completion in tokens; 0 is the task's own limit
    temperature: float = 1.0  # of sampling and, so that the loss fits, of learning too
    train_problems: int = 10_000  # at most so many problems to train on, in epochs
    seed: int = 0  # of the order of the problems and of every sampled token
    # evaluation
    eval_problems: int = 128  # at most so many held-out problems to evaluate on
    eval_samples: int = 256  # completions of each, so the largest k
    eval_every: int = 0  # also evaluate every so many steps; 0 is only before and after
    # the machine
    out: str = ""  # run folder; if empty, runs/ADVANTAGE-seedN, with beta where it counts
    save_every: int = 50  # steps between checkpoints: the most that a kill can cost
    eval_rows: int = 256  # completions sampled at once in an evaluation: memory
    micro_tokens: int = 4096  # tokens learned from at once: memory, but not the gradient
    device: str = "auto"  # auto (CUDA, else MPS, else CPU), or a device such as cpu or cuda:1
    precision: str = "auto"  # float16, float32, auto, bfloat16 (1.3 to 1.6 x as fast on some CPUs)

    def __post_init__(self):
        check_config(self)

    @property
    def run_folder(self):
        beta = f"-{self.beta:g}" if self.advantage == "rs" else ""
        return Path(self.out or f"runs/{self.advantage}{beta}-seed{self.seed}")


@dataclass
class State:
    """What a run knows beside its weights."""

    solved: Tensor  # (training problems,) bool: solved at least once
    step: int = 0  # done so far
    failed: int = 0  # updates in a row that were not finite
    results: dict = field(default_factory=dict)  # what eval.json holds


class Rollouts(NamedTuple):
    """N completions of each of P problems, and what they earned."""

    prompts: list[tuple[int, ...]]  # P of them, as token ids
    completions: list[tuple[int, ...]]  # B of them, those of a prompt together
    entropy: float  # of the policy, estimated on them, in nats a token
    questions: list[str]  # P of them: the prompts as text, without the task's preamble
    texts: list[str]  # B of them: the completions as text
    rewards: Tensor  # (P, N)


def collect(policy, task, config, state, generator):
    """Steps 1 to 4 of the algorithm: rollouts and their advantages (P, N)."""
    # 1. Take P problems of the training set: each at most once an epoch, in an order set by the seed.
    epoch, turn = divmod(state.step, max(1, len(task.train) // config.prompts))
    order = np.random.default_rng([config.seed, epoch]).permutation(len(task.train))
    indices = order[turn * config.prompts :][: config.prompts]
    # 2. Sample N completions of each from the policy, and 3. judge each of them by the rule.
    problems = [task.train[i] for i in indices]
    rollouts = roll_out(policy, task, problems, config.samples, config, generator)
    state.solved[indices[rollouts.rewards.amax(1) >= 1]] = True
    # 4. Turn rewards into advantages, group by group.
    return rollouts, ADVANTAGES[config.advantage](rollouts.rewards, config)


def roll_out(policy, task, problems, n, config, generator):
    """Sample n completions of each problem, and judge them: Rollouts."""
    questions, answers = zip(*problems)
    prompts = policy.tokenizer([task.preamble + question for question in questions]).input_ids
    prompts = [tuple(prompt) for prompt in prompts]
    with autocast(policy):
        completions, entropy = sample(policy, prompts, n, config, generator)
    ids = [row[:-1] if row[-1] in policy.eos_ids else row for row in completions]
    texts = policy.tokenizer.batch_decode(ids)
    rewards = judge(task, texts, [answer for answer in answers for _ in range(n)]).view(-1, n)
    return Rollouts(prompts, completions, entropy, questions, texts, rewards)


def judge(task, texts, answers):
    return torch.tensor([task.reward(text, answer) for text, answer in zip(texts, answers)])


def update(policy, optimizer, rollouts, advantages, config, step):
    """Step 5: one step up the policy gradient, unless it isn't finite. Returns the gradient's norm."""
    with autocast(policy):
        policy_gradient(policy, rollouts, advantages, config)
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), MAX_GRAD_NORM).item()
    if math.isfinite(norm):
        optimizer.param_groups[0]["lr"] = config.lr * min(1.0, step / WARMUP_STEPS)
        optimizer.step()
    optimizer.zero_grad()
    return norm


def train(config, resume=False):
    """Train a policy, and measure its pass@k before and after; all goes into `config.run_folder`.

    With `resume`, goes on from the folder's checkpoint. Returns what eval.json holds: by step, as
    text, what `evaluate` returns. Raises BadInput; FloatingPointError if updates fail three times
    in a row; on Ctrl-C KeyboardInterrupt, after the step is done and saved.
    """
    task = TASKS[config.task](config)
    config = replace(config, max_tokens=config.max_tokens or task.max_tokens)
    policy = load_policy(config, task)
    optimizer = torch.optim.AdamW(policy.model.parameters(), weight_decay=0.0, fused=True)
    generator = torch.Generator(policy.model.device).manual_seed(config.seed)  # draws every token
    state = State(torch.zeros(len(task.train), dtype=torch.bool))
    run = (config.run_folder, policy.model, optimizer, generator, state)
    with open_run_folder(config, resume) as metrics_file:
        if resume:
            load_checkpoint(*run)
        bar = tqdm(desc="training", total=config.steps, initial=state.step, unit="step")
        while True:
            ended = state.step >= config.steps
            measured = str(state.step) in state.results  # before the run was stopped
            if (ended or due(state.step, config.eval_every)) and not measured:
                state.results[str(state.step)] = evaluate(policy, task, config)
                save_checkpoint(*run)
            if ended:
                break
            with finish_before_ctrl_c() as interrupted:
                started = time.perf_counter()
                rollouts, advantages = collect(policy, task, config, state, generator)
                norm = update(policy, optimizer, rollouts, advantages, config, state.step + 1)
                state.step += 1
                metrics = step_metrics(rollouts, advantages, norm, state, started)
                print(json.dumps(metrics), file=metrics_file, flush=True)
                bar.set_postfix_str(PROGRESS.format(**metrics), refresh=False)
                bar.update()
                if due(state.step, max(1, config.steps // 5)):
                    bar.write(showcase(rollouts))
                if interrupted or due(state.step, config.save_every, config.eval_every):
                    save_checkpoint(*run)
    draw_pass_at_k(state.results, config.run_folder / "passk.png")
    policy.model.save_pretrained(config.run_folder / "model")
    policy.tokenizer.save_pretrained(config.run_folder / "model")
    return state.results


# A first reader can stop here: the algorithm is complete. What follows surrounds it.


def micro_batches(rollouts, advantages, micro_tokens):
    """Cut a batch into prompts, completions and weights, of `micro_tokens` padded tokens at most.

    Equal completions of a prompt are frequent where a policy is peaked. Their gradients are equal,
    so one is run for all, with the sum of their advantages as its weight; a weight of 0 isn't run.
    """
    samples, weights, longest = advantages.shape[1], Counter(), Counter()
    for i, advantage in enumerate(advantages.flatten().tolist()):
        prompt, completion = rollouts.prompts[i // samples], rollouts.completions[i]
        weights[prompt, completion] += advantage
        longest[prompt] = max(longest[prompt], len(completion))
    rows = [(len(row[0]) + longest[row[0]], *row, weights[row]) for row in weights if weights[row]]
    part = []
    for width, *row in sorted(rows):  # groups of like length together, each in one piece
        if part and width * (len(part) + 1) > micro_tokens:
            yield zip(*part)
            part = []
        part.append(row)
    if part:
        yield zip(*part)


def token_logprobs(policy, hidden, ids, temperature):
    """log softmax(logits / temperature) at `ids`: (M, D) and (M,) to (M,).

    With a vocabulary of 150,000, logits are by far the largest tensor. So they are computed for a
    few tokens at a time, and again in the backward pass instead of being kept.
    """

    def some(hidden, ids):
        return -F.cross_entropy(scaled_logits(policy, hidden, temperature), ids, reduction="none")

    at_once = 2**28 if ids.is_cuda else 2**25  # logits: 1 GiB, or 128 MiB
    rows = max(1, at_once // policy.model.get_output_embeddings().weight.shape[0])
    if len(ids) <= rows:
        return some(hidden, ids)
    parts = zip(hidden.split(rows), ids.split(rows))
    return torch.cat([checkpoint(some, *part, use_reentrant=False) for part in parts])


@functools.cache
def cache_argument(model_class):
    """What a model calls its cache: `cache` from transformers 5.24 on, `past_key_values` before."""
    arguments = inspect.signature(model_class.forward).parameters
    return "cache" if "cache" in arguments else "past_key_values"


def autocast(policy):
    """The precision of sampling and of learning, opened anew for each: it keeps cast weights."""
    low = policy.dtype != torch.float32
    return torch.autocast(policy.model.device.type, policy.dtype if low else None, enabled=low)


PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@torch.no_grad()
def load_policy(config, task):
    """A model of the hub or of a folder, on its device. Raises BadInput if it can't be used.

    --precision auto is float32, but on CUDA float16, or bfloat16 if logits overflow in float16.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    # cuDNN's attention gave NaN gradients on H100s (pytorch issue 196678), and plans every new shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    name = EMBEDDED if config.model == EMBEDDED.name else os.path.expanduser(config.model)
    best = "mps" if torch.backends.mps.is_available() else "cpu"
    best = "cuda" if torch.cuda.is_available() else best
    try:
        assert name != EMBEDDED or not task.preamble, "it can't read words"
        device = torch.zeros(0, device=best if config.device == "auto" else config.device).device
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        model = model.to(device).eval()  # no dropout, ever
        eos = {
            tokenizer.eos_token_id,
            *np.atleast_1d(model.generation_config.eos_token_id).tolist(),
        }
        stops = eos_ids = [i for i in eos if i is not None]
        if task.one_line:
            texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
            stops = eos_ids + [i for i, text in enumerate(texts) if "\n" in text]
        stop_ids = torch.tensor(stops, dtype=torch.long, device=device)
        policy = Policy(model, tokenizer, eos_ids, stop_ids, torch.float32)
        prompt = [tokenizer(task.preamble + task.train[0][0]).input_ids]
        hidden, mask, cache = prefill(policy, prompt)
        cache.batch_select_indices(mask[:, 0] * 0)  # raises an error if a kind of layer can't
        logits = model(torch.tensor(prompt, device=device)).logits[:, -1]
        plain = torch.allclose(logits, scaled_logits(policy, hidden, 1), atol=1e-4)
        assert plain, "it changes its logits after the output layer"
    except Exception as error:  # whatever a hub, a damaged file or a missing driver may raise
        if "memory" in str(error):
            raise
        reason = (
            f"--model {config.model} can't be used with --device {config.device} ({error!r:.200})"
        )
        raise BadInput(f"{reason}; give a plain transformer's folder or hub id") from error
    policy = policy._replace(dtype=PRECISIONS.get(config.precision, torch.float32))
    if config.precision == "auto" and device.type == "cuda":
        policy = policy._replace(dtype=torch.float16)
        with autocast(policy):
            finite = scaled_logits(policy, prefill(policy, prompt)[0], 1).isfinite().all()
        policy = policy if finite else policy._replace(dtype=torch.bfloat16)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{device} ({card}), {policy.dtype}, {config.model} of {size:.1f} million parameters")
    return policy


@contextlib.contextmanager
def open_run_folder(config, resume):
    """The run's folder, new or empty unless it is resumed; yields its open metrics.jsonl.

    A lock on that file, which no kill leaves behind, keeps other processes out. Raises BadInput.
    """
    folder = config.run_folder
    folder.mkdir(parents=True, exist_ok=True)
    if not resume and any(path.suffix != ".tmp" for path in folder.iterdir()):
        raise BadInput(
            f"{folder} isn't empty; go on with its run by --resume, or choose another --out"
        )
    with open(folder / "metrics.jsonl", "a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows has no such lock, and does without
            pass
        except BlockingIOError as error:
            raise BadInput(f"another process is writing {folder}; choose another --out") from error
        write(folder / "config.json", asdict(config))
        yield file


def write(path, content):
    """Write JSON, or what torch.load reads, so that a kill leaves the old file or the new, whole."""
    aside = path.with_suffix(".tmp")
    if path.suffix == ".pt":
        torch.save(content, aside)
    else:
        aside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(aside, path)


def save_checkpoint(folder, model, optimizer, generator, state):
    """Everything that later steps depend on, in one file."""
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    parts |= {"generator": generator.get_state(), "state": vars(state)}
    write(folder / "checkpoint.pt", parts)
    write(folder / "eval.json", state.results)


def load_checkpoint(folder, model, optimizer, generator, state):
    """All as it was at `save_checkpoint`; as it is, if the run was killed before. Raises BadInput."""
    path, metrics = folder / "checkpoint.pt", folder / "metrics.jsonl"
    if path.exists():
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)  # data, no code
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            generator.set_state(saved["generator"])
            vars(state).update(vars(State(**saved["state"])))
        except Exception as error:  # zip, pickle, a missing key, a shape: it is no checkpoint
            remedy = "resume on the kind of device that wrote it, or delete it to start from step 0"
            raise BadInput(f"{path} can't be used here ({error!r:.200}); {remedy}") from error
    lines = metrics.read_text().splitlines(keepends=True)  # one a step
    os.truncate(metrics, len("".join(lines[: state.step])))  # later steps will be made again


PROGRESS = "reward {reward:.2f} solved {solved:.2f} signal {signal:.2f} entropy {entropy:.2f} "
PROGRESS += "length {length:.1f} grad {grad_norm:.2f} tok/s {tokens_per_second:.0f}"


def step_metrics(rollouts, advantages, norm, state, started):
    """A line of metrics.jsonl. Raises FloatingPointError if updates keep failing."""
    state.failed = 0 if math.isfinite(norm) else state.failed + 1
    if state.failed == 3:
        raise FloatingPointError(
            "three gradients in a row were not finite; start with a lower --lr"
        )
    tokens, seconds = sum(map(len, rollouts.completions)), time.perf_counter() - started
    return {
        "step": state.step,
        "reward": rollouts.rewards.mean().item(),
        "solved": (rollouts.rewards.amax(1) >= 1).float().mean().item(),  # by some sample
        "signal": advantages.any(1).float().mean().item(),  # share of the groups learned from
        "entropy": rollouts.entropy,
        "length": tokens / advantages.numel(),
        "grad_norm": norm,  # before clipping
        "solve_rate": state.solved.float().mean().item(),  # of all training problems, so far
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }


def showcase(rollouts):
    """Completions to read: the best and the worst of the three groups with the most mixed rewards."""
    lines = []
    for i in rollouts.rewards.std(1).argsort(descending=True, stable=True)[:3]:
        for j in rollouts.rewards[i].argmax(), rollouts.rewards[i].argmin():
            text = rollouts.texts[i * rollouts.rewards.shape[1] + j][:500]
            lines.append(f"  reward {rollouts.rewards[i, j]:.2f}  {rollouts.questions[i]} {text!r}")
    return "\n".join(lines)


def table(results):
    """pass@k of the first and the last evaluation, and the different correct answers of a problem."""
    base, *_, trained = [results[step] for step in sorted(results, key=int)] * 2
    lines = [f"{len(base['correct'])} held-out problems, {base['n']} samples each, percent"]
    lines.append(f"{'base':>20}{'trained':>10}")
    for k, percent in base["pass_at_k"].items():
        lines.append(f"{f'pass@{k}':>10}{percent:>10.1f}{trained['pass_at_k'][k]:>10.1f}")
    before, after = (np.mean(of["distinct"]) for of in (base, trained))
    return "\n".join(lines) + f"\n  distinct{before:>10.2f}{after:>10.2f}   right answers a problem"


def draw_pass_at_k(results, path):
    """Draw pass@k over k, a line for each evaluation."""
    from matplotlib.figure import Figure  # no pyplot: no display is needed

    axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    for step in sorted(results, key=int):
        axes.plot(*zip(*results[step]["pass_at_k"].items()), "o-", label=f"after {step} steps")
    axes.set(xlabel="k", ylabel="pass@k on held-out problems (%)", ylim=(0, None))
    axes.legend(frameon=False)
    axes.figure.savefig(path, dpi=150)


class BadInput(ValueError):
    """What the user can mend, in one sentence: what was wrong, what was expected, what to do."""


ELSEWHERE = {
    "advantage": "; experiments/estimators.py has others",
    "task": "; data sets and .jsonl files go with experiments/mathematics.py",
}


def check_config(config):
    """Raise BadInput for a setting that can't work."""
    choices = {"advantage": ADVANTAGES, "task": TASKS, "precision": ["auto", *PRECISIONS]}
    lowest = {"samples": 2, "steps": 0, "beta": -1e9}
    for f in fields(config):
        value, wanted = getattr(config, f.name), ""
        if f.name in choices and value not in choices[f.name]:
            wanted = f"one of {', '.join(choices[f.name])}{ELSEWHERE.get(f.name, '')}"
        if type(f.default) in (int, float):
            least = lowest.get(f.name, min(f.default, 1) if type(f.default) is int else 1e-9)
            wanted = "" if least <= value < 2**62 else f"at least {least} and below 2^62"
        if wanted:
            raise BadInput(f"--{f.name.replace('_', '-')} is {value}, but must be {wanted}")


def stored_settings(folder, given):
    """The settings of the run in that folder, to be resumed with the `given` ones. Raises BadInput."""
    try:
        stored = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise BadInput(
            f"no run in {folder} can be resumed ({error}); name one with --out"
        ) from error
    for name in given.keys() - {"out", "steps"}:
        if stored[name] != given[name]:
            reason = f"{given[name]}, but {folder} was started with {stored[name]}; leave it out"
            raise BadInput(f"--{name.replace('_', '-')} is {reason}")
    return {**stored, **given, "out": str(folder)}


def due(step, *every):
    return step == 0 or any(step % n == 0 for n in every if n)


@contextlib.contextmanager
def finish_before_ctrl_c():
    """Ctrl-C takes effect at the end of the block, and at once if it is pressed again."""
    pressed = []

    def note(number, frame):
        pressed.append(signal.signal(signal.SIGINT, before))
        os.write(2, b"\nsaving after this step; Ctrl-C again breaks off at once\n")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


PHASES = {  # function in which memory ran out: what it was doing, and what makes that smaller
    "load_policy": "loading the model; choose a smaller --model",
    "collect": "sampling; choose smaller --prompts, --samples or --max-tokens",
    "update": "learning; choose smaller --micro-tokens",
    "evaluate": "evaluating; choose smaller --eval-rows or --eval-samples",
}
PROMISE = (
    "go on with the run in --out, to the same numbers; on CUDA with the same problems and random "
)
PROMISE += "state, but not to the same bits"


def main(arguments=None, config_class=Config):
    """The command line: a flag for every field of `config_class`, and --resume."""
    script = sys.modules[config_class.__module__]
    name, source = Path(script.__file__).name, map(inspect.getsource, config_class.__mro__[:-1])
    helps = dict(re.findall(r"(\w+): \w+ = .*  # (.*)", "".join(source)))
    parser = argparse.ArgumentParser(name, description=script.__doc__.splitlines()[0])
    parser.error = lambda message: parser.exit(2, f"{name}: {message}; see --help\n")
    for f in fields(config_class):
        kind = {"action": "store_true"} if f.default is False else {"type": type(f.default)}
        kind |= {"default": argparse.SUPPRESS, "help": f"{helps[f.name]} (default: {f.default!r})"}
        parser.add_argument(f"--{f.name.replace('_', '-')}", **kind)
    parser.add_argument("--resume", action="store_true", help=PROMISE)
    given = vars(parser.parse_args(arguments))
    resume = given.pop("resume")
    try:
        config = config_class(**given)
        if resume:
            config = config_class(**stored_settings(config.run_folder, given))
        print(table(train(config, resume)))
    except KeyboardInterrupt:
        command = f"python {sys.argv[0]} --resume --out {config.run_folder}"
        parser.exit(130, f"\nstopped; go on with: {command}\n")
    except (BadInput, OSError) as error:
        parser.exit(2, f"{name}: {error}\n")
    except (ArithmeticError, RuntimeError, MemoryError) as error:
        functions = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        phase = next((PHASES[function] for function in functions if function in PHASES), "")
        if isinstance(error, FloatingPointError):
            parser.exit(1, f"{name}: {error}\n")
        if "memory" not in f"{error!r}".lower():
            raise
        parser.exit(1, f"{name}: out of memory while {phase}\n")
    print(f"everything is in {config.run_folder}/, the trained model in its folder model/")


if __name__ == "__main__":
    main()
