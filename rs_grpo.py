"""Risk-Sensitive GRPO (arXiv 2509.24261) in one file, from prompt to pass@k.

Reinforcement learning with verifiable rewards makes a language model's first answer better and the
best of 100 worse: a policy that starts out peaked gets stuck in a local optimum of the mean reward.
RS-GRPO maximises another objective. For a prompt x, completions y ~ π(·|x) and their rewards r(y),

    J_β = (1/β) log E[exp(βr)]      the mean reward for β → 0, the best of all samples for β → ∞

Its gradient takes two lines. The first is the chain rule, with ∇E[f(y)] = E[f(y) ∇log π(y|x)], the
identity behind every policy gradient. The second subtracts 1/β from the factor of every sample: a
constant is a baseline, which changes nothing in expectation, since E[∇log π] = 0.

    ∇J_β = (1/β) ∇E[exp(βr)] / E[exp(βr)] = E[ (1/β) exp(βr)/E[exp(βr)] · ∇log π ]
         = E[ A ∇log π ]   with the advantage   A = (1/β) (exp(βr)/E[exp(βr)] − 1)

The N samples of a prompt, its group, estimate A, their mean standing for E: that is the one
function that changes, `risk_sensitive_advantage`. All else is GRPO at its plainest: 1. take P
prompts, 2. sample N completions of each, 3. judge them by a rule, 4. turn rewards into advantages,
5. take one on-policy gradient step. It needs no value network, reward model, KL penalty or
reference model. What comes of it, in percent of 256 held-out problems (800 steps, five seeds, from
experiments/compare.py; pass@k: the chance that one of k samples is right):

                                pass@1   pass@32   pass@256
    the model before training     19.0      47.3       66.1
    trained with GRPO             28.3      46.7       56.6
    trained with β = 2            27.3      59.1       66.0

    python rs_grpo.py                     # train the embedded model on Countdown, and test it
    python rs_grpo.py --advantage grpo    # the same with GRPO
    python rs_grpo.py --model HuggingFaceTB/SmolLM2-360M-Instruct --task countdown-text --lr 1e-5

Legend: P prompts a step, N samples of each, B = P·N completions, some of them B'; R rows of a
batch; L tokens of a prompt, T of a completion; D the model's width, V its vocabulary.
"""

import argparse
import ast
import inspect
import json
import math
import os
import re
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from operator import add, mul, sub
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm, trange


# --- Advantages: the one function that changes, and its rivals ------------------------------------
def risk_sensitive_advantage(rewards, beta):
    """Prefer what lifts (1/β) log E[exp(βr)] over what lifts the mean (Theorem 1 of the paper).

        Â_i = (1/β) ( exp(βr_i) / mean_j exp(βr_j) − 1 )

    Of 16 samples, the advantage of a correct / of a wrong one, if c are correct:
                   c = 1          c = 4          c = 8         c = 15
        β = 0   .938/−.063     .750/−.250     .500/−.500     .063/−.938
        β = 2   2.140/−.143    .922/−.307     .381/−.381     .029/−.428
        β = 8   1.865/−.124    .374/−.125     .125/−.125     .008/−.125

    A correct sample at c = 1 weighs 2 times as much as one at c = 8 with β = 0, 6 times with β = 2,
    and 15 times with β = 8: the larger β, the more of the gradient goes to prompts that are hardly
    ever solved, where pass@k has most to gain. Each β has its own scale: compare within a row.

    rewards: (P, N), binary or continuous. beta: a number or (P, 1), below 0 averse to risk. Returns
    (P, N) in the dtype of `rewards`, float32 for integers. A row sums to zero, and is exactly 0
    where its rewards are equal. Raises ValueError for another shape, infinity and nan.
    """
    beta = torch.as_tensor(beta, dtype=torch.float64, device="cpu")
    r = rewards.to("cpu", torch.float64)  # not every device has float64
    if r.dim() != 2 or beta.shape[-1:].numel() != 1 or not (beta * r).isfinite().all():
        raise ValueError(f"rewards must be (P, N), beta a number, all finite: {rewards}, {beta}")
    r = r - r.amax(1, keepdim=True)  # a constant cancels, and equal rewards are exactly 0
    weight = (beta * r - (beta * r).amax(1, keepdim=True)).exp()  # exp(βr), the largest scaled to 1
    advantages = (weight / weight.mean(1, keepdim=True) - 1) / beta  # (P, N); 0/0 where β = 0
    advantages = torch.where(beta.abs() < 1e-8, r - r.mean(1, keepdim=True), advantages)  # β → 0
    return advantages.to(rewards if rewards.is_floating_point() else rewards.float())


def mean_baseline_advantage(rewards):
    """Â_i = r_i − mean(r): for the mean reward, the limit β → 0 (Dr. GRPO, arXiv 2503.20783)."""
    return risk_sensitive_advantage(rewards, 0.0)


def grpo_advantage(rewards):
    """Â_i = (r_i − mean(r)) / (std(r) + 1e-6), with the population's std (GRPO, arXiv 2402.03300).
    It gives hard and easy prompts the same weight: 3.873/−.258 at c = 1, and .258/−3.873 at c = 15.
    """
    advantages = mean_baseline_advantage(rewards)  # (P, N)
    return advantages / (advantages.std(1, keepdim=True, correction=0) + 1e-6)


ADVANTAGES = {  # add your own: from rewards (P, N) and a Config to advantages (P, N)
    "rs": lambda rewards, config: risk_sensitive_advantage(rewards, config.beta),
    "mean": lambda rewards, config: mean_baseline_advantage(rewards),
    "grpo": lambda rewards, config: grpo_advantage(rewards),
}


# --- The task: Countdown, with a reward that a rule computes --------------------------------------
EMBEDDED = Path(__file__).resolve().parent / "countdown-base"  # the model beside this file
OPERATORS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: Fraction}
EXAMPLES = """Numbers: 2, 3, 5. Target: 11. Answer: 2 * 3 + 5
Numbers: 1, 4, 8. Target: 28. Answer: (8 - 1) * 4
"""  # these show a pretrained model the format


class Task(NamedTuple):
    train: list[tuple[str, Any]]  # problems: the prompt, and what the rule needs to know
    held_out: list[tuple[str, Any]]
    reward: Any  # the rule: (completion, what it needs to know) to a number; 1 is solved
    examples: str = ""  # put before each prompt; if there are any, a line break ends a completion
    max_tokens: int = 20  # of a completion


def countdown(config, in_words=False):
    """The Task of reaching a target with four numbers, `4,7,9,12=48:`, or `in_words` with three."""

    def read(name):
        problems = []
        for line in (EMBEDDED / name).read_text().split():
            *numbers, target = map(int, re.findall("[0-9]+", line))
            words = f"Numbers: {', '.join(map(str, numbers))}. Target: {target}. Answer:"
            problems.append((words if in_words else line, (numbers, target)))
        return problems

    if in_words:
        held_out = read("held-out-3.txt")[: config.eval_problems]
        return Task(read("train-3.txt"), held_out, countdown_reward, EXAMPLES, 14)
    return Task(read("train.txt"), read("held-out.txt")[: config.eval_problems], countdown_reward)


TASKS = {"countdown": countdown, "countdown-text": lambda config: countdown(config, True)}


def countdown_reward(completion, answer):
    """1.0 if its first line uses each number exactly once and equals the target, else 0.0.
    A completion is hostile input: parsed, bounded in length, and so in nesting and in the size of
    numbers, but never evaluated. A sign, `**`, `//` or a comma makes it wrong; arithmetic is exact.
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


# --- Sampling -------------------------------------------------------------------------------------
class Policy(NamedTuple):  # a causal language model, with what sampling and learning need
    model: Any  # float32 weights
    tokenizer: Any
    eos_ids: set[int]  # tokens that say nothing but that the completion is over
    stop_ids: torch.Tensor  # tokens that end a completion: these and, after examples, line breaks
    autocast: Any  # opens the context in which products have the precision that --precision names


@torch.no_grad()
def sample(policy, prompts, samples, config, generator):
    """Draw `samples` completions of each of P prompts from softmax(logits / temperature).
    All are tuples of token ids. Returns B completions, those of a prompt (its group) together, each
    with the token that ended it, if one did; and the policy's entropy in nats a token, estimated by
    the mean of −log π over the drawn tokens. The model computes one row for all samples that are
    equal so far, R in all. (Skip `share_rows` at first: a row for each would do.) Raises BadInput.
    """
    hidden, mask, cache = prefill(policy, prompts)  # (R, D), (R, tokens so far)
    completions = [()] * (len(prompts) * samples)
    going = torch.arange(len(completions), device=mask.device)  # (B',), samples not yet ended
    row = going // samples  # (B',), the row that each of them continues
    surprise = 0.0  # the sum of −log π over all drawn tokens
    for length in range(1, config.max_tokens + 1):
        probs = scaled_logits(policy, hidden, config.temperature).softmax(-1)  # (R, V)
        if not probs[:, 0].isfinite().all():  # one bad logit spoils its row
            raise BadInput("infinite logits; start again with a lower --lr or --precision bfloat16")
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
        select_rows(cache, parent)
        mask = F.pad(mask[parent], (0, 1), value=True)
        hidden = hidden_states(policy, token[:, None], mask, cache)[:, 0]  # (R, D)
    return completions, float(surprise) / sum(map(len, completions))


def share_rows(row, token):
    """Samples (B',) that are equal so far go on as one of R new rows.
    Each sample adds `token` to what it has so far, its `row`. Three samples of two rows, two cases:
        row 0 0 1, token 7 7 5: two rows, 0 with 7 and 1 with 5; the samples' rows are 0 0 1
        row 0 0 1, token 7 9 5: three, 0 with 7, 0 with 9 and 1 with 5; the samples' rows are 0 1 2
    Returns the old row that each new one continues, its token, and the new row of each sample.
    """
    many = token.max() + 1
    pair, row = (row * many + token).unique(return_inverse=True)  # one number for row and token
    return pair // many, pair % many, row


def prefill(policy, prompts):
    """Run prompts once: final hidden states of their last tokens (P, D), mask (P, L), and cache."""
    from transformers import DynamicCache  # not above: importing this file stays cheap

    cache = DynamicCache(config=policy.model.config)
    ids, mask = pad(policy, prompts, "left")
    return hidden_states(policy, ids, mask, cache)[:, -1], mask, cache


def hidden_states(policy, ids, mask, cache):
    """Final hidden states (R, S, D) of token ids (R, S), which follow the cache and join it.
    The mask, (R, tokens in the cache + S), is False on padding, which takes no position.
    """
    model = policy.model.base_model
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]  # (R, S)
    names = inspect.signature(model.forward).parameters  # transformers 5.24 renamed one
    past = {"cache" if "cache" in names else "past_key_values": cache}
    return model(ids, attention_mask=mask, position_ids=positions, **past)[0]


def select_rows(cache, rows):
    """Let the cache hold these of its rows, in this order, each as often as it is named."""
    for layer in cache.layers:  # not keys[rows], whose gradients add up in any order
        layer.keys = layer.keys.index_select(0, rows)
        layer.values = layer.values.index_select(0, rows)


def scaled_logits(policy, hidden, temperature):
    return policy.model.get_output_embeddings()(hidden).float().div_(temperature)


def pad(policy, rows, side):
    """Tuples of token ids as a matrix, padded on that side, and a mask that is True on them."""
    rows = list(map(torch.tensor, rows))
    ids = torch.nn.utils.rnn.pad_sequence(rows, True, -1, side).to(policy.model.device)
    return ids.clamp(min=0), ids >= 0  # any id will do for padding: the mask hides it


# --- The loss, and pass@k -------------------------------------------------------------------------
def policy_gradient(policy, rollouts, advantages, config):
    """Put the gradient of the loss into the parameters' `.grad`. Advantages are (P, N).

        loss = − Σ_i Σ_t Â_i log π(y_it | x, y_i<t) / (number of completion tokens)

    Its value means nothing, its gradient is minus the policy gradient. PPO's ratio π/π_old
    is missing because the policy that sampled is the one that learns: the ratio is 1, and ratio·Â
    and Â·log π then have the same gradient (up to rounding, of some .004 a token in float16). The
    divisor counts all completion tokens, also where Â = 0 (DAPO, arXiv 2503.14476), so that each
    weighs the same; it comes last, in float32, as the gradient of a mean underflows in float16.
    """
    for prompts, completions, weights in micro_batches(rollouts, advantages, config.micro_tokens):
        logprobs = completion_logprobs(policy, prompts, completions, config.temperature)  # (B', T)
        weights = torch.tensor(weights, device=logprobs.device)  # (B',), Â summed over equal ones
        loss = -(weights[:, None] * logprobs).sum()  # the same weight on every token
        loss.backward()
    tokens = sum(map(len, rollouts.completions))
    for parameter in policy.model.parameters():
        if parameter.grad is not None:
            parameter.grad /= tokens


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
        select_rows(cache, owner)  # (P, …) to (B, …)
        attended = torch.cat([prompt_mask[owner], mask[:, :-1]], 1)  # (B, L+T−1)
        later = hidden_states(policy, ids[:, :-1], attended, cache)  # token t predicts token t + 1
        hidden = torch.cat([hidden, later], 1)
    assert hidden.shape[:2] == ids.shape  # hidden[:, t] predicts ids[:, t]
    logprobs = token_logprobs(policy, hidden[mask], ids[mask], temperature)
    return torch.zeros(ids.shape, device=ids.device).masked_scatter(mask, logprobs)


def pass_at_k(n, c, k):
    """Chance that k of n samples, c of them correct, hold a correct one: 1 − C(n−c,k)/C(n,k).
    Unbiased (arXiv 2107.03374), and exact up to one rounding. Raises ValueError for other counts.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def evaluate(policy, task, config):
    """Sample n = `eval_samples` completions of each held-out problem, from the same seed each
    time. Returns n, correct and distinct correct ones by problem, and pass@k in percent by k.
    """
    n, correct, distinct = config.eval_samples, [], []
    generator = torch.Generator(policy.model.device).manual_seed(10**6 + config.seed)
    at_once = max(1, config.eval_rows // n)  # problems
    for start in trange(0, len(task.held_out), at_once, desc="evaluating", leave=False):
        rollouts = roll_out(policy, task, task.held_out[start:][:at_once], n, config, generator)
        if ctrl_c:  # was pressed: see note_ctrl_c
            raise KeyboardInterrupt
        right, texts = rollouts.rewards >= 1, np.reshape(rollouts.texts, (-1, n))  # (P', n)
        correct += right.sum(1).tolist()
        distinct += [len(set(map(str.strip, row[ok]))) for row, ok in zip(texts, right.numpy())]
    ks = [2**i for i in range(n.bit_length())]
    percent = {str(k): 100 * sum(pass_at_k(n, c, k) for c in correct) / len(correct) for k in ks}
    return {"n": n, "correct": correct, "distinct": distinct, "pass_at_k": percent}


# --- Training -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:  # each setting is a flag of the command line, and its comment is the flag's help
    advantage: str = "rs"  # rs, mean or grpo
    beta: float = 2.0  # risk sensitivity of rs: 0 is the mean; the paper advises 2
    samples: int = 16  # completions of a prompt, its group; the paper has 16
    model: str = EMBEDDED.name  # the embedded one, or folder or hub id of a causal language model
    task: str = "countdown"  # countdown, or countdown-text for a pretrained model
    steps: int = 500  # training steps; 0 only evaluates
    lr: float = 5e-5  # AdamW's learning rate; a pretrained model wants 2e-5 to 1e-6
    prompts: int = 32  # prompts a step
    max_tokens: int = 0  # longest completion in tokens; 0 is the task's own limit
    temperature: float = 1.0  # of sampling and, so that the loss fits, of learning too
    seed: int = 0  # of the order of the problems and of every sampled token
    eval_problems: int = 128  # at most so many held-out problems to evaluate on
    eval_samples: int = 256  # completions of each, and so the limit of k
    eval_every: int = 10**9  # evaluate every so many steps, and before and after
    out: str = ""  # run folder; if empty, runs/MODEL-ADVANTAGE-seedN, beta where it counts
    save_every: int = 50  # steps between checkpoints: the most that a kill can cost
    eval_rows: int = 256  # completions sampled at once in an evaluation, or all of one problem
    micro_tokens: int = 4096  # tokens learned from at once: memory, but not the gradient
    device: str = "auto"  # auto (CUDA, else MPS, else CPU), or a device such as cpu or cuda:1
    precision: str = "auto"  # or float32, float16 or bfloat16 (the last faster on some CPUs)

    @property
    def run_folder(self):
        name = f"rs-{self.beta:g}" if self.advantage == "rs" else self.advantage
        return Path(self.out or f"runs/{Path(self.model).name}-{name}-seed{self.seed}")


class Rollouts(NamedTuple):  # N completions of each of P problems, and what they earned
    prompts: list[tuple[int, ...]]  # P of them, as token ids
    completions: list[tuple[int, ...]]  # B of them, those of a prompt together
    entropy: float  # of the policy, estimated on them, in nats a token
    questions: list[str]  # P of them: the prompts as text, without the worked examples
    texts: list[str]  # B of them: the completions as text
    rewards: torch.Tensor  # (P, N)


def collect(policy, task, config, state, generator):
    """Steps 1 to 4: Rollouts and their advantages (P, N). state.step: steps done so far."""
    # 1. Take P problems, each at most once an epoch, in an order set by the seed.
    epoch, turn = divmod(state.step, max(1, len(task.train) // config.prompts))
    order = np.random.default_rng([config.seed, epoch]).permutation(len(task.train))
    indices = order[turn * config.prompts :][: config.prompts]
    # 2. Sample N completions of each from the policy, and 3. judge them by the rule.
    problems = [task.train[i] for i in indices]
    rollouts = roll_out(policy, task, problems, config.samples, config, generator)
    state.solved[indices] |= rollouts.rewards.amax(1) >= 1  # by one sample at least
    # 4. Turn rewards into advantages, group by group.
    return rollouts, ADVANTAGES[config.advantage](rollouts.rewards, config)


def roll_out(policy, task, problems, n, config, generator):
    """Sample n completions of each problem, and judge them: Rollouts."""
    questions, answers = zip(*problems)
    prompts = policy.tokenizer([task.examples + question for question in questions]).input_ids
    prompts = list(map(tuple, prompts))
    with policy.autocast():
        completions, entropy = sample(policy, prompts, n, config, generator)
    ids = [row[:-1] if row[-1] in policy.eos_ids else row for row in completions]
    texts = policy.tokenizer.batch_decode(ids)
    answers = [answer for answer in answers for _ in range(n)]
    rewards = torch.tensor(list(map(task.reward, texts, answers))).view(-1, n)
    return Rollouts(prompts, completions, entropy, questions, texts, rewards)


def update(policy, optimizer, rollouts, advantages, config, step):
    """Step 5: one step up the policy gradient, if it is finite. Returns the gradient's norm."""
    with policy.autocast():
        policy_gradient(policy, rollouts, advantages, config)
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0).item()  # clips to 1
    if math.isfinite(norm):
        optimizer.param_groups[0]["lr"] = config.lr * min(1.0, step / 10)  # a warmup
        optimizer.step()
    optimizer.zero_grad()
    return norm


def train(config, resume=False):
    """Train a policy and measure its pass@k; all goes into `config.run_folder`, or resumes from it.
    Returns what eval.json holds: from str(step) to what `evaluate` returned. Raises BadInput, also
    if updates keep failing; and KeyboardInterrupt on Ctrl-C, once the step is done and saved.
    """
    check_config(config)
    task = TASKS[config.task](config)
    config = replace(config, max_tokens=config.max_tokens or task.max_tokens)
    policy = load_policy(config, task)
    optimizer = torch.optim.AdamW(policy.model.parameters(), weight_decay=0.0, fused=True)
    generator = torch.Generator(policy.model.device).manual_seed(config.seed)  # draws every token
    solved = torch.zeros(len(task.train), dtype=torch.bool)
    state = SimpleNamespace(step=0, failed=0, solved=solved, results={})  # by str(step)
    run = (config.run_folder, policy.model, optimizer, generator, state)
    with open_run_folder(config, resume) as metrics_file:
        if resume:
            load_checkpoint(*run)
        bar = tqdm(desc="training", total=config.steps, initial=state.step, unit="step")
        while True:
            ended = state.step >= config.steps
            measured = str(state.step) in state.results  # before it was resumed
            if (ended or state.step % config.eval_every == 0) and not measured:
                save_checkpoint(*run)  # an evaluation takes long
                state.results[str(state.step)] = evaluate(policy, task, config)
                save_checkpoint(*run)
            if ended:
                break
            started = time.perf_counter()
            rollouts, advantages = collect(policy, task, config, state, generator)
            norm = update(policy, optimizer, rollouts, advantages, config, state.step + 1)
            state.step += 1
            report(metrics_file, bar, rollouts, advantages, norm, state, started)
            if ctrl_c or state.step % config.save_every == 0:
                save_checkpoint(*run)
            if ctrl_c:
                raise KeyboardInterrupt
    policy.model.save_pretrained(config.run_folder / "model")
    policy.tokenizer.save_pretrained(config.run_folder / "model")
    return state.results


# A first reader can stop here: the algorithm is complete. What follows surrounds it.
def micro_batches(rollouts, advantages, micro_tokens):
    """Cut a batch into prompts, completions and weights, of about `micro_tokens` padded tokens.
    Equal completions of a prompt, frequent where a policy is peaked, have equal gradients: one is
    run for all, with the sum of their advantages as its weight. A weight of 0 isn't run.
    """
    weights, longest = {}, {}
    for i, advantage in enumerate(advantages.flatten().tolist()):
        key = rollouts.prompts[i // advantages.shape[1]], rollouts.completions[i]
        weights[key] = weights.get(key, 0) + advantage
        longest[key[0]] = max(longest.get(key[0], 0), len(key[1]))
    rows = [(len(key[0]) + longest[key[0]], *key, weights[key]) for key in weights if weights[key]]
    parts = [[]]
    for width, *row in sorted(rows):  # group by group, those of like length together
        if parts[-1] and width * (len(parts[-1]) + 1) > micro_tokens:
            parts.append([])
        parts[-1].append(row)
    return [zip(*part) for part in parts if part]


def token_logprobs(policy, hidden, ids, temperature):
    """log softmax(logits / temperature) at `ids`, of M tokens: (M, D) and (M,) to (M,).
    Logits, the largest tensor by far, are there for a few tokens at a time, and computed twice.
    """

    def chunk(hidden, ids):
        return -F.cross_entropy(scaled_logits(policy, hidden, temperature), ids, reduction="none")

    at_once = 2**28 if ids.is_cuda else 2**25  # logits: 1 GiB, or 128 MiB
    tokens = max(1, at_once // policy.model.get_output_embeddings().weight.shape[0])
    parts = zip(hidden.split(tokens), ids.split(tokens))
    return torch.cat(
        [torch.utils.checkpoint.checkpoint(chunk, *part, use_reentrant=False) for part in parts]
    )


@torch.no_grad()
def load_policy(config, task):
    """A model of the hub or of a folder, on its device. Raises BadInput if it can't be used.
    --precision auto is float32, but on CUDA float16, or bfloat16 if logits overflow in float16.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, utils

    utils.logging.disable_progress_bar()
    # cuDNN's attention is slow on new shapes, and gave NaN gradients (pytorch issue 196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    name = EMBEDDED if config.model == EMBEDDED.name else config.model
    try:  # what is asserted here is reported as BadInput, too
        assert name != EMBEDDED or not task.examples, "it can't read words"
        best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        device = torch.device(best if config.device == "auto" else config.device)
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device).eval()
        eos_ids = {tokenizer.eos_token_id, *np.ravel(model.generation_config.eos_token_id)} - {None}
        vocabulary = enumerate(tokenizer.batch_decode([[i] for i in range(len(tokenizer))]))
        breaks = {i for i, text in vocabulary if task.examples and "\n" in text}
        stop_ids = torch.tensor([*eos_ids | breaks], dtype=torch.long, device=device)
        policy = Policy(model, tokenizer, eos_ids, stop_ids, None)
        prompt = tokenizer([task.examples + task.train[0][0]]).input_ids
        hidden, mask, cache = prefill(policy, prompt)
        select_rows(cache, mask[:, 0] * 0)  # row 0; an error if some layer has no keys
        logits = model(torch.tensor(prompt, device=device)).logits[:, -1]
        plain = torch.allclose(logits, scaled_logits(policy, hidden, 1), atol=1e-4)
        assert plain, "it changes its logits after the output layer"
    except Exception as error:  # whatever a hub, a damaged file or a missing driver may raise
        if "memory" in str(error):
            raise
        reason = f"--model {config.model} can't run on --device {config.device} ({error!r:.200})"
        raise BadInput(f"{reason}; give a plain transformer, and a device that is here") from error
    dtype = getattr(torch, config.precision, torch.float32)  # which auto is, too, to begin with
    if config.precision == "auto" and device.type == "cuda":
        with torch.autocast("cuda", torch.float16):
            finite = scaled_logits(policy, prefill(policy, prompt)[0], 1).isfinite().all()
        dtype = torch.float16 if finite else torch.bfloat16
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    print(f"{device} ({card}), {dtype}, {config.model} of {model.num_parameters():,} parameters")
    kind = device.type, dtype, dtype != torch.float32
    return policy._replace(autocast=lambda: torch.autocast(*kind))


def open_run_folder(config, resume):
    """Write config.json; open metrics.jsonl, locked until it is closed. Raises BadInput."""
    folder = config.run_folder
    folder.mkdir(parents=True, exist_ok=True)
    if not resume and any(path.suffix != ".tmp" for path in folder.iterdir()):
        raise BadInput(f"{folder} isn't empty; go on with --resume, or choose another --out")
    file = (folder / "metrics.jsonl").open("a")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows has no such lock, and does without
        pass
    except BlockingIOError as error:
        raise BadInput(f"another process is writing {folder}; choose another --out") from error
    (folder / "config.tmp").write_text(json.dumps(asdict(config), indent=1))
    os.replace(folder / "config.tmp", folder / "config.json")
    return file


def save_checkpoint(folder, model, optimizer, generator, state):
    """Everything that later steps depend on, in one file; a kill leaves the old one or the new."""
    (folder / "eval.json").write_text(json.dumps(state.results, indent=1))
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    parts |= {"generator": generator.get_state(), "state": vars(state)}
    torch.save(parts, folder / "checkpoint.tmp")
    os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")


def load_checkpoint(folder, model, optimizer, generator, state):
    """All as it was at `save_checkpoint`, and later metrics cut off. Raises BadInput."""
    try:
        saved = torch.load(folder / "checkpoint.pt", map_location="cpu")  # data, no code
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        vars(state).update(saved["state"])
    except Exception as error:  # zip, pickle, a missing key, a shape: it is no checkpoint
        raise BadInput(f"{folder} can't be resumed ({error!r:.200}); take another --out") from error
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)  # one a step
    os.truncate(folder / "metrics.jsonl", len(b"".join(lines[: state.step])))


def report(metrics_file, bar, rollouts, advantages, norm, state, started):
    """A line of metrics.jsonl, the bar, samples to read. Raises BadInput if updates keep failing.
    signal: share of groups learned from. solve_rate: share of training problems ever solved.
    """
    state.failed = 0 if math.isfinite(norm) else state.failed + 1
    if state.failed == 3:
        raise BadInput("three updates in a row were not finite; start again with a lower --lr")
    rewards, seconds = rollouts.rewards, time.perf_counter() - started  # (P, N)
    tokens = sum(map(len, rollouts.completions))
    metrics = {"step": state.step, "reward": rewards.mean().item(), "grad_norm": norm}
    metrics |= {"signal": advantages.any(1).float().mean().item(), "entropy": rollouts.entropy}
    metrics |= {"length": tokens / rewards.numel(), "tokens_per_second": tokens / seconds}
    metrics |= {"solve_rate": state.solved.float().mean().item(), "seconds": seconds}
    print(json.dumps(metrics), file=metrics_file, flush=True)
    shown = "reward {reward:.2f} signal {signal:.2f} entropy {entropy:.2f} length {length:.1f} "
    shown += "grad {grad_norm:.2f} tok/s {tokens_per_second:.0f}"
    bar.set_postfix_str(shown.format(**metrics), refresh=False)
    bar.update()
    if state.step % max(1, bar.total // 5) == 0:
        for i in rewards.std(1).argsort(descending=True)[:3]:  # the groups that are mixed most
            for j in rewards[i].argmax(), rewards[i].argmin():
                text = rollouts.texts[i * rewards.shape[1] + j][:500]
                bar.write(f"  reward {rewards[i, j]:.2f}  {rollouts.questions[i]} {text!r}")


def show(results, path):
    """Print and draw pass@k of base and trained; print how many different right answers."""
    from matplotlib.figure import Figure  # no pyplot: no display is needed

    base, *_, trained = [results[step] for step in sorted(results, key=int)] * 2  # one may be both
    print(f"{len(base['correct'])} held-out problems, {base['n']} samples each, percent")
    print(f"{'base':>20}{'trained':>10}")
    for k, percent in base["pass_at_k"].items():
        print(f"{f'pass@{k}':>10}{percent:>10.1f}{trained['pass_at_k'][k]:>10.1f}")
    before, after = np.mean(base["distinct"]), np.mean(trained["distinct"])
    print(f"  distinct{before:>10.2f}{after:>10.2f}   correct answers a problem")
    axes = Figure(layout="constrained").subplots()
    for name, of in {"base": base, "trained": trained}.items():
        axes.plot(*zip(*of["pass_at_k"].items()), "o-", label=name)
    axes.set(xlabel="k", ylabel="pass@k on held-out problems (%)", ylim=(0, None))
    axes.legend()
    axes.figure.savefig(path)


class BadInput(ValueError):
    """What the user can mend, in one sentence: what was wrong, what was expected, what to do."""


def check_config(config):
    """Raise BadInput for a setting that can't work."""
    if config.precision not in ("auto", "float32", "float16", "bfloat16"):
        raise BadInput(f"--precision is {config.precision}, not auto, float32, float16 or bfloat16")
    if config.advantage not in ADVANTAGES:
        known = f"{', '.join(ADVANTAGES)}; experiments/estimators.py has others"
        raise BadInput(f"--advantage is {config.advantage}, but must be one of {known}")
    if config.task not in TASKS:
        known = f"{', '.join(TASKS)}; experiments/mathematics.py has others"
        raise BadInput(f"--task is {config.task}, but must be one of {known}")
    for f in fields(config):
        value, least = getattr(config, f.name), 0 if f.default else -1
        least = {"samples": 1, "steps": -1, "beta": -1e9}.get(f.name, least)
        if type(f.default) in (int, float) and not least < value < 2**62:
            raise BadInput(f"--{f.name.replace('_', '-')} is {value}, not finite and above {least}")


PHASES = {  # of main, or of the outermost other one: what needs memory, and what needs less
    "main": "saving; end other programs",
    "load_policy": "loading the model; choose a smaller --model",
    "collect": "sampling; choose smaller --prompts, --samples or --max-tokens",
    "update": "learning; choose a smaller --micro-tokens",
    "evaluate": "evaluating; choose smaller --eval-rows and --eval-samples",
}
ctrl_c = []  # filled when it is pressed


def note_ctrl_c(number, frame):
    """Stop after this step; pressed again, at once."""
    signal.signal(number, signal.default_int_handler)
    ctrl_c.append(number)
    os.write(2, b"\nsaving after this step; Ctrl-C again breaks off at once\n")


def main(arguments=None, config_class=Config):
    """The command line: a flag for every field of `config_class`, its comment as help; --resume."""
    script = sys.modules[config_class.__module__]
    name = Path(script.__file__).name
    source = map(inspect.getsource, config_class.__mro__[-2::-1])
    helps = dict(re.findall(r"(\w+): \w+ = .*  # (.*)", "".join(source)))
    parser = argparse.ArgumentParser(name, description=script.__doc__.splitlines()[0])
    parser.error = lambda message: parser.exit(2, f"{name}: {message}; see --help\n")
    for f in fields(config_class):
        kind = {"action": "store_true"} if f.default is False else {"type": type(f.default)}
        kind |= {"default": argparse.SUPPRESS, "help": f"{helps[f.name]} (default: {f.default!r})"}
        parser.add_argument(f"--{f.name.replace('_', '-')}", **kind)
    numbers = "on a CPU to the same numbers, on CUDA from the same state but not to the same bits"
    parser.add_argument("--resume", action="store_true", help=f"go on with --out, {numbers}")
    given = vars(parser.parse_args(arguments))
    resume = given.pop("resume")
    try:
        folder = config_class(**given).run_folder
        if resume:
            stored = json.loads((folder / "config.json").read_text())
            if stored.keys() - helps.keys():
                raise BadInput(f"{folder} has settings of another script; resume it with that")
            for flag in given.keys() - {"out", "steps"}:
                if given[flag] != stored.get(flag):
                    raise BadInput(f"omit --{flag.replace('_', '-')}: it was {stored.get(flag)}")
            given = stored | given | {"out": str(folder)}
        ctrl_c.clear()
        signal.signal(signal.SIGINT, note_ctrl_c)
        show(train(config_class(**given), resume), folder / "passk.png")
    except KeyboardInterrupt:
        parser.exit(130, f"\nstopped; go on: python {sys.argv[0]} --resume --out {folder}\n")
    except (BadInput, OSError, json.JSONDecodeError) as error:
        parser.exit(2, f"{name}: {error}\n")
    except (RuntimeError, MemoryError) as error:
        if not re.search("(of|enough|ate) memory|MemoryError", repr(error)):
            raise
        names = [f.name for f in traceback.extract_tb(error.__traceback__) if f.name in PHASES]
        parser.exit(1, f"{name}: out of memory while {PHASES[names[:2][-1]]}\n")
    print(f"everything is in {folder}/, the trained model in its folder model/")


if __name__ == "__main__":
    main()
