r"""Pretrained models on mathematics: rs_grpo.py with data sets, a verifier and the paper's recipe.

    pip install -r extensions/requirements.txt    # math-verify, and datasets for sets of the hub
    python -m extensions.mathematics --model Qwen/Qwen2.5-Math-1.5B --task gsm8k
    python -m extensions.mathematics --model FOLDER --task FILE.jsonl --instruction 'Be short.'

A task is a set of the hub by name, a .jsonl file with `problem` (or `question`) and `answer` in
each line, or a task of rs_grpo.py. An instruction follows each problem, as a chat where the
tokenizer has a template; math-verify judges what is in \boxed{}. The paper's recipe is dynamic
sampling and several clipped updates a step; without them every step is that of rs_grpo.py. This is
the paper's smallest experiment, for a card of 80 GB (by computation; it hasn't been run):

    python -m extensions.mathematics --model Qwen/Qwen2.5-Math-1.5B --task deepmath103k \
        --eval-task math500,aime24,aime25 --eval-problems 500 --eval-samples 32 --max-tokens 3000 \
        --dynamic-sampling 10 --updates 4 --checkpointing --micro-tokens 16384
"""

import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import rs_grpo
from extensions import estimators, verifier
from extensions.problems import BOXED, HUB, load_problems
from rs_grpo import TASKS, BadInput, Rollouts, Task, flag


@dataclass(frozen=True)
class MathConfig(estimators.Config):
    task: str = flag("", "a set of the hub such as gsm8k, a .jsonl file, or a task of rs_grpo.py")
    eval_task: str = flag("", "sets to evaluate on, with commas between; else a tenth of --task")
    train_problems: int = flag(10**9, "train on the first so many problems of --task", least=1)
    instruction: str = flag(BOXED, "what a model is told after each problem")
    lr: float = flag(1e-6, "AdamW's learning rate", above=0)
    eval_samples: int = flag(16, "samples per held-out problem, and so the largest k", least=1)
    dynamic_sampling: int = flag(0, "further draws a step, while groups lack a signal", least=0)
    updates: int = flag(1, "updates a step; above 1, of minibatches with PPO's ratio", least=1)
    clip_low: float = flag(0.2, "lower clip of that ratio: 1 - this", least=0)
    clip_high: float = flag(0.28, "upper clip: 1 + this; wider, so rare tokens can rise", least=0)
    checkpointing: bool = flag(False, "compute activations again in the backward pass")

    def __post_init__(self):
        super().__post_init__()
        TASKS.setdefault(self.task, load_task)  # which refuses what it can't read
        if self.eval_task and TASKS[self.task] is not load_task:
            reason = f"--task {self.task} has held-out problems of its own"
            raise BadInput(f"{reason}; leave --eval-task out")
        if self.updates > self.prompts:
            raise BadInput(f"--updates is {self.updates}, but must be at most --prompts")


# --- The task -------------------------------------------------------------------------------------
def load_task(config):
    """The Task of mathematics that `config` names. Raises BadInput.

    --eval-task is held out, or a tenth chosen by a hash of the text: no order, size or seed moves
    a problem to the other part.
    """
    if not config.task:
        raise BadInput(f"--task is missing; give a .jsonl file or one of {', '.join(HUB)}")
    problems = load_problems(config.task, evaluating=False)
    parts = [part for _, part in evaluation_sets(config)]
    if not parts:
        parts = [[pair for pair in problems if zlib.crc32(pair[0].encode()) % 10 == 0]]
    held_out = [pair for part in parts for pair in part[: config.eval_problems]]
    asked = {problem for part in parts for problem, _ in part}
    train = [pair for pair in problems if pair[0] not in asked]
    if not train or not held_out:
        reason = f"--task {config.task} is too small to train and to evaluate on"
        raise BadInput(f"{reason}; give a larger set, or an --eval-task")
    verifier.idle_verifiers.append(verifier.start_verifier())  # what is missing shows before a run
    return Task(
        train=train[: config.train_problems],
        held_out=held_out,
        encode=partial(encode, instruction=config.instruction),
        judge=verifier.math_rewards,
        max_tokens=1024,
    )


def evaluation_sets(config):
    """(name, problems) of each set of --eval-task. Raises BadInput."""
    names = [name.strip() for name in config.eval_task.split(",")]
    return [(name, load_problems(name, evaluating=True)) for name in names if name]


def encode(tokenizer, questions, instruction):
    """Prompts as token ids: each question and the instruction, as a chat if there is a template."""
    texts = list(questions)
    chat = bool(instruction and tokenizer.chat_template)
    if chat:
        turns = [[{"role": "user", "content": f"{text}\n{instruction}"}] for text in texts]
        texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    elif instruction:
        texts = [f"{text}\n{instruction}\n\n" for text in texts]
    return tokenizer(texts, add_special_tokens=not chat).input_ids  # a chat has its BOS


# --- The paper's recipe: what differs from rs_grpo.collect and rs_grpo.update ---------------------
def collect(policy, task, config, state, generator):
    """`rs_grpo.collect`, then up to --dynamic-sampling more draws until P groups have a signal.

    Each draw takes the next problems of the epoch; the step learns from all of them (dynamic
    sampling, DAPO, arXiv 2503.14476). `state.drawn` counts the draws of all steps.
    """
    state.drawn = getattr(state, "drawn", state.step)
    draws, advantages = [], []
    signal = 0  # groups that have one
    while not draws or (signal < config.prompts and len(draws) <= config.dynamic_sampling):
        turn = SimpleNamespace(**{**vars(state), "step": state.drawn})
        rollouts, some = rs_grpo.collect(policy, task, config, turn, generator)
        draws.append(rollouts)
        advantages.append(some)
        state.drawn += 1
        signal += some.any(1).sum().item()
    if state.step == 0:
        prompt = policy.tokenizer.decode(draws[0].prompts[0])
        tqdm.write(f"a prompt as the model sees it: {prompt!r}")
    return joined(draws), torch.cat(advantages)


def joined(draws):
    """The Rollouts of several draws as one."""
    if len(draws) == 1:
        return draws[0]
    *lists, rewards, _ = zip(*draws)  # the fields of Rollouts, each of all draws
    tokens = sum(draw.tokens for draw in draws)
    nats = sum(draw.entropy * draw.tokens for draw in draws)
    return Rollouts(*[sum(each, []) for each in lists], torch.cat(rewards), nats / tokens)


def update(policy, optimizer, rollouts, advantages, config, step):
    """`rs_grpo.update`, or --updates of them with PPO's clipped ratio, each on part of the groups.

    Returns the mean of the gradients' norms.
    """
    logprobs = checkpointed_logprobs if config.checkpointing else rs_grpo.completion_logprobs
    if config.updates == 1:  # the policy that sampled is the one that learns: the ratio is 1
        rs_grpo.policy_gradient(policy, rollouts, advantages, config, logprobs)
        return rs_grpo.apply_gradient(policy, optimizer, config, step)
    parts = split(rollouts, advantages, config.updates)
    old = [logprobs_by_batch(policy, *part, config, logprobs) for part in parts]
    norms = []
    for part, before in zip(parts, old):
        clipped_policy_gradient(policy, *part, before, config, logprobs)
        norms.append(rs_grpo.apply_gradient(policy, optimizer, config, step))
    return sum(norms) / len(norms)


def split(rollouts, advantages, updates):
    """(what learning reads of Rollouts, advantages) of each of `updates` parts of the groups."""
    samples = advantages.shape[1]
    parts = []
    start = 0
    for some in advantages.tensor_split(updates):
        end = start + samples * len(some)
        prompts = rollouts.prompts[start:end]
        completions = rollouts.completions[start:end]
        parts.append((rollouts._replace(prompts=prompts, completions=completions), some))
        start = end
    return parts


@torch.no_grad()
def logprobs_by_batch(policy, rollouts, advantages, config, logprobs):
    """log π_old of the tokens of every micro-batch, (R, T) each.

    They are computed as in learning, since sampling rounds otherwise.
    """
    batches = rs_grpo.micro_batches(rollouts, advantages, config.micro_tokens)
    with policy.autocast():
        return [logprobs(policy, *rows, config.temperature) for *rows, _ in batches]


def clipped_policy_gradient(policy, rollouts, advantages, old, config, logprobs):
    """`rs_grpo.policy_gradient` where the policy may no longer be the one that sampled.

        loss = − Σ_i Σ_t min(ratio·Â_i, clip(ratio, 1 − low, 1 + high)·Â_i) / (completion tokens)

    with ratio = π/π_old. The clip keeps an update from moving π far from the policy that sampled
    (PPO, arXiv 1707.06347). `old` holds log π_old of every micro-batch, (R, T) each.
    """
    batches = rs_grpo.micro_batches(rollouts, advantages, config.micro_tokens)
    for (prompts, completions, weights), before in zip(batches, old):
        with policy.autocast():
            now = logprobs(policy, prompts, completions, config.temperature)  # (R, T)
        weights = torch.tensor(weights, device=now.device)[:, None]  # (R, 1)
        ratio = (now - before).exp()  # (R, T), and a constant 1 on padding
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        loss = -torch.minimum(ratio * weights, clipped * weights).sum()
        loss.backward()
    for parameter in policy.model.parameters():
        if parameter.grad is not None:
            parameter.grad /= rollouts.tokens


def checkpointed_logprobs(policy, prompts, completions, temperature):
    """`rs_grpo.completion_logprobs`, but the activations in a layer are recomputed, not kept.

    Rerunning a layer would add to a cache twice, so each row is run whole: no prompt is shared.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    rows = [prompt + completion for prompt, completion in zip(prompts, completions)]
    ids, mask = rs_grpo.pad(policy, rows, "right")  # (B, L+T)
    base = policy.model.base_model
    layers = [layer for layer in base.modules() if isinstance(layer, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    hidden = base(ids, attention_mask=mask, use_cache=False)[0]  # (B, L+T, D)
    for layer in layers:
        del layer.forward  # the class has one
    ids, mask = rs_grpo.pad(policy, completions, "right")  # (B, T)
    row, t = mask.nonzero(as_tuple=True)
    starts = torch.tensor([len(prompt) for prompt in prompts], device=ids.device)  # (B,)
    known = hidden[row, starts[row] + t - 1]  # what the model knew at ids[row, t]
    logprobs = rs_grpo.token_logprobs(policy, known, ids[mask], temperature)
    return torch.zeros(ids.shape, device=ids.device).masked_scatter(mask, logprobs)


def show_sets(config, results):
    """Print pass@k of base and trained on each set by itself, if --eval-task names several."""
    sets = evaluation_sets(config)
    steps = sorted(results, key=int)
    start = 0
    for name, problems in sets if len(sets) > 1 else []:
        end = start + len(problems[: config.eval_problems])
        for k in results[steps[0]]["pass_at_k"]:
            base = mean_pass_at_k(results[steps[0]], start, end, k)
            trained = mean_pass_at_k(results[steps[-1]], start, end, k)
            print(f"{f'pass@{k}':>10}{base:>10.1f}{trained:>10.1f}   {Path(name).stem}")
        start = end


def mean_pass_at_k(result, start, end, k):
    """In percent, of the held-out problems from `start` to before `end`."""
    counts = result["correct"][start:end]
    chances = [rs_grpo.pass_at_k(result["n"], c, int(k)) for c in counts]
    return 100 * sum(chances) / len(chances)


def main(arguments=None):
    config, results = rs_grpo.main(arguments, MathConfig, collect, update)
    show_sets(config, results)


if __name__ == "__main__":
    main()
