r"""Pretrained models on mathematics: rs_grpo.py with data sets, a verifier and the paper's recipe.

    pip install -r experiments/requirements.txt    # math-verify, and datasets for sets of the hub
    python experiments/mathematics.py --model Qwen/Qwen2.5-Math-1.5B --task gsm8k
    python experiments/mathematics.py --model FOLDER --task problems.jsonl --instruction 'Be short.'

Tasks are sets of the hub by name, .jsonl files with `problem` (or `question`) and `answer` in each
line, and those of rs_grpo.py. An instruction follows each problem, as a chat where the tokenizer
has a template; math-verify judges what is in \boxed{}. The paper's recipe is dynamic sampling and
several clipped updates a step; without them every step is that of rs_grpo.py. The paper's smallest
experiment, for a card of 80 GB (as computed; it wasn't run):

    python experiments/mathematics.py --model Qwen/Qwen2.5-Math-1.5B --task deepmath103k \
        --eval-task math500,aime24,aime25 --eval-problems 500 --eval-samples 32 --max-tokens 3000 \
        --dynamic-sampling 10 --updates 4 --checkpointing --micro-tokens 16384
"""

import contextlib
import functools
import inspect
import json
import os
import re
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rs_grpo  # noqa: E402
from experiments import estimators  # noqa: E402
from rs_grpo import BadInput, Rollouts, Task  # noqa: E402

plain = SimpleNamespace(**vars(rs_grpo))  # its functions, before `main` puts others in their place
BOXED = r"Please reason step by step, and put your final answer within \boxed{}."


@dataclass(frozen=True)
class MathConfig(estimators.Config):
    task: str = ""  # a set of the hub such as gsm8k, a .jsonl file, or a task of rs_grpo.py
    eval_task: str = ""  # sets to evaluate on, with commas between; if empty, a tenth of --task
    train_problems: int = 10**9  # train on at most so many problems, the first of --task
    instruction: str = BOXED  # what a model is told after each problem
    lr: float = 1e-6  # AdamW's learning rate
    eval_samples: int = 16  # completions of each, so the largest k
    dynamic_sampling: int = 0  # draw so often again, at most, while too few groups have a signal
    updates: int = 1  # updates a step; above 1, as many minibatches with PPO's clipped ratio
    clip_low: float = 0.2  # then the ratio counts from 1 - this
    clip_high: float = 0.28  # to 1 + this; wider, as in DAPO, so that rare tokens can rise
    checkpointing: bool = False  # compute activations again in the backward pass: less memory


def check_config(config):
    """Raise BadInput for what can't work. A --task that rs_grpo.py doesn't know is registered."""
    if not config.task:
        raise BadInput(f"--task is missing; give a .jsonl file or one of {', '.join(HUB)}")
    rs_grpo.TASKS.setdefault(config.task, load_task)
    plain.check_config(config)
    if config.eval_task and rs_grpo.TASKS[config.task] is not load_task:
        raise BadInput(f"--task {config.task} has its own held-out problems; leave --eval-task out")
    if config.updates > config.prompts:
        raise BadInput(f"--updates is {config.updates}, but must be at most --prompts")


# --- Data sets ------------------------------------------------------------------------------------
HUB = {  # name: hub id, configuration, split to train on, split to evaluate on
    "math12k": ("hiyouga/math12k", None, "train", "test"),
    "dapo17k": ("BytedTsinghua-SIA/DAPO-Math-17k", None, "train", "train"),
    "deepmath103k": ("zwhe99/DeepMath-103K", None, "train", "train"),
    "gsm8k": ("openai/gsm8k", "main", "train", "test"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", "test"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train", "train"),
    "aime25": ("MathArena/aime_2025", None, "train", "train"),
    "hmmt24": ("MathArena/hmmt_feb_2024", None, "train", "train"),
    "hmmt25": ("MathArena/hmmt_feb_2025", None, "train", "train"),
    "cmimc25": ("MathArena/cmimc_2025", None, "train", "train"),
}
COLUMNS = (  # where these sets, and files like them, keep a problem and its answer
    (("problem",), ("answer",)),
    (("question",), ("final_answer",)),
    (("question",), ("answer",)),
    (("prompt", 0, "content"), ("reward_model", "ground_truth")),
)


def load_task(config):
    """The Task of mathematics that `config` names. Raises BadInput. Held out is --eval-task, or a
    tenth by a hash of the text: no order, size or seed moves a problem to the other part.
    """
    if config.model == rs_grpo.EMBEDDED.name:
        reason = f"--task {config.task} is in words, which {config.model} can't read"
        raise BadInput(f"{reason}; name a pretrained --model")
    idle_verifiers.append(start_verifier())  # what is missing shows now, not in the middle of a run
    train = load_problems(config.task, evaluating=False)
    names = filter(None, map(str.strip, config.eval_task.split(",")))
    parts = [load_problems(name, evaluating=True) for name in names]
    parts = parts or [[p for p in train if zlib.crc32(p[0].encode()) % 10 == 0]]
    held_out = [*chain(*(part[: config.eval_problems] for part in parts))]
    asked = {problem[0] for problem in chain(*parts)}
    train = [p for p in train if p[0] not in asked][: config.train_problems]
    if not train or not held_out:
        reason = f"--task {config.task} is too small to train and to evaluate on"
        raise BadInput(f"{reason}; give a larger set, or an --eval-task")
    return Task(train, held_out, math_reward, max_tokens=1024)


def load_problems(name, evaluating):
    """(text, answer, name) of the problems in a set of the hub or .jsonl file. Raises BadInput."""
    problems = {}
    for row in load_rows(name, evaluating):
        for columns in COLUMNS:
            with contextlib.suppress(LookupError, TypeError):  # it has others, or no columns at all
                text, answer = (functools.reduce(lambda v, key: v[key], c, row) for c in columns)
                break
        else:
            raise BadInput(f"{name} has a row without a problem and its answer; give it both")
        if str(text).startswith("Solve the following math problem step by step."):  # DAPO's frame
            text = "\n\n".join(str(text).split("\n\n")[1:-1])
        answer = str(answer).rpartition("####")[2].strip()  # GSM8K's answer follows its solution
        problems.setdefault(str(text).strip(), answer)
    if not problems:
        raise BadInput(f"{name} holds no problem; give a file with a problem and an answer a line")
    return [(*problem, Path(name).stem) for problem in problems.items()]


def load_rows(name, evaluating):
    try:
        if name in HUB:
            from datasets import load_dataset

            hub_id, configuration, *splits = HUB[name]
            return load_dataset(hub_id, configuration, split=splits[evaluating])
        lines = Path(name).read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
        json.dumps(rows, ensure_ascii=False).encode()  # half a character is JSON, but no text
        return rows
    except Exception as error:  # no file, no JSON, no library, no network, no such set
        reason = f"{HUB.get(name, [name])[0]} can't be read ({error!r:.200})"
        remedy = "give a .jsonl file with problem and answer in each line, or pip install datasets"
        raise BadInput(f"{reason}; {remedy} and name one of {', '.join(HUB)}") from error


# --- Asking and evaluating: what differs from rs_grpo.roll_out, evaluate and show -----------------
def encode(tokenizer, problems, instruction):
    """Prompts as token ids: each problem and the instruction, as a chat if there is a template."""
    texts = [problem[0] for problem in problems]
    chat = bool(instruction and tokenizer.chat_template)
    if chat:
        turns = [[{"role": "user", "content": f"{text}\n{instruction}"}] for text in texts]
        texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    elif instruction:
        texts = [f"{text}\n{instruction}\n\n" for text in texts]
    ids = tokenizer(texts, add_special_tokens=not chat).input_ids  # a chat has its BOS
    return list(map(tuple, ids))


def roll_out(policy, task, problems, n, config, generator):
    """`rs_grpo.roll_out`, with prompts from `encode` and several completions judged at a time."""
    if task.reward is not math_reward:
        return plain.roll_out(policy, task, problems, n, config, generator)
    questions, answers, _ = zip(*problems)
    prompts = encode(policy.tokenizer, problems, config.instruction)
    with policy.autocast():
        completions, entropy = rs_grpo.sample(policy, prompts, n, config, generator)
    ids = [row[:-1] if row[-1] in policy.eos_ids else row for row in completions]
    texts = policy.tokenizer.batch_decode(ids)
    rewards = math_rewards(texts, [answer for answer in answers for _ in range(n)])
    rewards = torch.tensor(rewards).view(-1, n)
    return Rollouts(prompts, completions, entropy, questions, texts, rewards)


def evaluate(policy, task, config):
    """`rs_grpo.evaluate`, and under "tasks" pass@k of each set by name, if there are several."""
    if task.reward is math_reward:
        (prompt,) = encode(policy.tokenizer, task.held_out[:1], config.instruction)
        tqdm.write(f"a prompt as the model sees it: {policy.tokenizer.decode(prompt)!r}")
    result, tasks = plain.evaluate(policy, task, config), {}
    names = [problem[-1] for problem in task.held_out if task.reward is math_reward]
    for name in dict.fromkeys(names):
        counts = [c for c, other in zip(result["correct"], names) if other == name]
        for k in result["pass_at_k"]:
            chances = [rs_grpo.pass_at_k(result["n"], c, int(k)) for c in counts]
            tasks.setdefault(name, {})[k] = 100 * sum(chances) / len(chances)
    return result | {"tasks": tasks} if len(tasks) > 1 else result


def show(results, path):
    """`rs_grpo.show`, and lines for each set by itself."""
    plain.show(results, path)
    base, *_, trained = [results[step].get("tasks", {}) for step in sorted(results, key=int)] * 2
    for name in base:
        for k, percent in base[name].items():
            print(f"{f'pass@{k}':>10}{percent:>10.1f}{trained[name][k]:>10.1f}   {name}")


# --- The paper's recipe: what differs from rs_grpo.collect and rs_grpo.update ---------------------
def collect(policy, task, config, state, generator):
    """`rs_grpo.collect`, and again while fewer than P groups have a signal, D times at most.
    Each draw takes the next problems of the epoch; the step learns from all of them (dynamic
    sampling, DAPO, arXiv 2503.14476).
    """
    vars(state).setdefault("drawn", state.step)  # within `state`, so that a checkpoint holds it
    draws, signal = [], 0
    while not draws or (signal < config.prompts and len(draws) <= config.dynamic_sampling):
        turn = SimpleNamespace(step=state.drawn, solved=state.solved)
        draws.append(plain.collect(policy, task, config, turn, generator))
        state.drawn += 1
        signal += int(draws[-1][1].any(1).sum())
    rollouts, advantages = zip(*draws)
    return draws[0] if len(draws) == 1 else (joined(rollouts), torch.cat(advantages))


def joined(draws):
    """The Rollouts of several draws as one."""
    prompts, completions, entropy, questions, texts, rewards = zip(*draws)
    tokens = [sum(map(len, some)) for some in completions]
    entropy = float(np.average(entropy, weights=tokens))
    prompts, completions = [*chain(*prompts)], [*chain(*completions)]
    questions, texts = [*chain(*questions)], [*chain(*texts)]
    return Rollouts(prompts, completions, entropy, questions, texts, torch.cat(rewards))


def update(policy, optimizer, rollouts, advantages, config, step):
    """`rs_grpo.update`; if U > 1, one for each of U parts of the groups, with PPO's clipped ratio.
    Returns the mean of the gradients' norms.
    """
    logprobs = checkpointed_logprobs if config.checkpointing else rs_grpo.completion_logprobs
    with replaced(completion_logprobs=logprobs):
        if config.updates == 1:  # the policy that sampled is the one that learns: the ratio is 1
            return plain.update(policy, optimizer, rollouts, advantages, config, step)
        n, parts, norms = advantages.shape[1], [], []
        for u in range(config.updates):
            a, b = (len(advantages) * i // config.updates for i in (u, u + 1))  # groups a to b − 1
            completions = rollouts.completions[a * n : b * n]
            part = rollouts._replace(prompts=rollouts.prompts[a:b], completions=completions)
            batches = rs_grpo.micro_batches(part, advantages[a:b], config.micro_tokens)
            with torch.no_grad(), policy.autocast():  # as in learning: sampling rounds otherwise
                old = [logprobs(policy, *rows, config.temperature) for *rows, _ in batches]
            parts.append((part, advantages[a:b], old))
        for *part, old in parts:
            with replaced(policy_gradient=functools.partial(clipped_policy_gradient, old=old)):
                norms.append(plain.update(policy, optimizer, *part, config, step))
    return sum(norms) / len(norms)


def clipped_policy_gradient(policy, rollouts, advantages, config, old):
    """`rs_grpo.policy_gradient` where the policy may no longer be the one that sampled.

        loss = − Σ_i Σ_t min(ratio·Â_i, clip(ratio, 1 − low, 1 + high)·Â_i) / (completion tokens)

    with ratio = π/π_old, which keeps an update from going far where the samples no longer tell
    (PPO, arXiv 1707.06347). `old` holds log π_old of every micro-batch, (B', T) each.
    """
    batches = rs_grpo.micro_batches(rollouts, advantages, config.micro_tokens)
    for (prompts, completions, weights), before in zip(batches, old):
        logprobs = rs_grpo.completion_logprobs(policy, prompts, completions, config.temperature)
        weights = torch.tensor(weights, device=logprobs.device)[:, None]  # (B', 1)
        ratio = (logprobs - before).exp()  # (B', T), and a constant 1 on padding
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        loss = -torch.minimum(ratio * weights, clipped * weights).sum()
        loss.backward()
    tokens = sum(map(len, rollouts.completions))
    for parameter in policy.model.parameters():
        if parameter.grad is not None:
            parameter.grad /= tokens


def checkpointed_logprobs(policy, prompts, completions, temperature):
    """`rs_grpo.completion_logprobs`, but what a layer computes is computed again, not kept.
    To run a layer again would add to a cache again, so each row is run whole: no prompt is shared.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer as Layer

    rows = [prompt + completion for prompt, completion in zip(prompts, completions)]
    ids, mask = rs_grpo.pad(policy, rows, "right")  # (B, L+T)
    layers = [layer for layer in policy.model.base_model.modules() if isinstance(layer, Layer)]
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    hidden = policy.model.base_model(ids, attention_mask=mask, use_cache=False)[0]  # (B, L+T, D)
    for layer in layers:
        del layer.forward  # the class has one
    ids, mask = rs_grpo.pad(policy, completions, "right")  # (B, T)
    row, t = mask.nonzero(as_tuple=True)
    starts = torch.tensor([len(prompt) for prompt in prompts], device=ids.device)  # (B,)
    known = hidden[row, starts[row] + t - 1]  # what the model knew at ids[row, t]
    logprobs = rs_grpo.token_logprobs(policy, known, ids[mask], temperature)
    return torch.zeros(ids.shape, device=ids.device).masked_scatter(mask, logprobs)


# --- The reward: a completion is hostile input ----------------------------------------------------
MAX_ANSWER, MAX_NESTING = 300, 20  # characters, and braces within braces; an answer beyond is wrong
MAX_TAIL = 10_000  # characters at the end of a completion in which a last number is looked for
VERIFY_SECONDS = 3.0  # for one comparison, which takes milliseconds unless it is hostile
VERIFY_BYTES = 2**30  # memory of one verifier process, which takes 0.1 GB
VERIFIERS = min(8, os.cpu_count() or 1)  # processes at once
NUMBER = r"-?\$?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)%?"  # -5  $1,234.0  .5


def math_reward(completion, answer):
    r"""1.0 if the last \boxed{...} of `completion` is equivalent to `answer`, else 0.0.
    Small models hardly ever write a box: without one, the last number counts if the answer is one.
    Plain numbers are compared exactly, all else by math-verify, within bounds of size and time.
    """
    box, wanted = last_box(completion), plain_number(answer)
    if box is None:
        numbers = re.findall(NUMBER, completion[-MAX_TAIL:])
        return float(wanted is not None and bool(numbers) and plain_number(numbers[-1]) == wanted)
    if not box or len(answer) > MAX_ANSWER:
        return 0.0
    given = plain_number(box)
    if None not in (given, wanted) and (given == wanted or "%" not in box + answer):  # 50% is 0.5
        return float(given == wanted)
    return float(equivalent(box, answer))


def math_rewards(completions, answers):
    """`math_reward` of each completion and its answer, several at a time."""
    with ThreadPoolExecutor(VERIFIERS) as pool:
        return list(pool.map(math_reward, completions, answers))


def last_box(completion):
    r"""What the last \boxed{...} holds; "" if unclosed, too long or too deep; None without one."""
    _, found, text = completion.rpartition(r"\boxed{")
    if not found:
        return None
    depth, text = 1, text[: MAX_ANSWER + 1]
    for token in re.finditer(r"\\.|[{}]", text, re.DOTALL):  # \{ and \} are no braces
        depth += (token[0] == "{") - (token[0] == "}")
        if depth == 0:
            return text[: token.start()].strip()
        if depth > MAX_NESTING:
            break
    return ""


def plain_number(text):
    """The exact value of a text that is a number, whatever its $ or % may mean; else None."""
    text = text.strip().removesuffix(".")
    if len(text) > MAX_ANSWER or not re.fullmatch(NUMBER, text):
        return None
    return Fraction(re.sub("[$,%]", "", text))


# A comparison can take forever (9^{9^{9^9}}) or crash, and nothing within Python ends a big-integer
# power. So it happens in small processes, kept for the next one and replaced when they overrun.
idle_verifiers = []
killed = []  # (box, answer) of every comparison that cost its process


@functools.lru_cache(maxsize=100_000)
def equivalent(box, answer):
    """What math-verify says; False, and noted in `killed`, if its process didn't live to say it."""
    try:
        verifier = idle_verifiers.pop()
    except IndexError:
        verifier = start_verifier()
    verdict = ""
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps([VERIFY_SECONDS, answer, box]), file=verifier.stdin, flush=True)
        verdict = verifier.stdout.readline()
    if verdict not in ("0\n", "1\n"):
        verifier.kill()
        verifier.communicate()  # closes the pipes and leaves no zombie
        killed.append((box, answer))
        tqdm.write(f"{box!r} ended its verifier and counts as wrong; so did {len(killed)} in all")
        return False
    idle_verifiers.append(verifier)
    return verdict == "1\n"


def start_verifier():
    """A process that has begun `verify_lines`. Raises BadInput without math-verify."""
    command = [sys.executable, "-c", f"{VERIFIER_SOURCE}\nverify_lines({VERIFY_BYTES})"]
    options = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE) | {"stderr": subprocess.DEVNULL}
    options |= {"start_new_session": True}  # Ctrl-C reaches the training alone, which ends its step
    options |= {"env": {**os.environ, "PYTHONHASHSEED": "0"}}  # no verdict depends on a set's order
    verifier = subprocess.Popen(command, text=True, **options)
    if verifier.stdout.readline() != "ready\n":
        verifier.communicate()
        reason = "answers are judged by math-verify, which can't be imported here"
        raise BadInput(f"{reason}: pip install math-verify")
    return verifier


def verify_lines(max_bytes):
    """The life of a verifier: 0 or 1 for each line of input. It has this source alone, no torch."""
    import contextlib
    import faulthandler
    import json
    import sys

    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no verdict
    with contextlib.suppress(ImportError, OSError, ValueError):  # not every system can limit it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    from math_verify import LatexExtractionConfig, parse, verify

    latex = [LatexExtractionConfig()]
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        seconds, *texts = json.loads(line)
        # A thread outside of Python ends the process in time, even within a big-integer power, even
        # when the run is gone; math-verify's own limits, switched off, are handled after the power.
        faulthandler.dump_traceback_later(seconds, exit=True)
        try:
            boxes = [rf"\boxed{{{text}}}" for text in texts]
            answer, box = (parse(text, latex, parsing_timeout=None) for text in boxes)
            right = verify(answer, box, timeout_seconds=None)
        except Exception:  # anything can fail in an algebra system that model output drives
            right = False
        faulthandler.cancel_dump_traceback_later()
        print(int(right), file=replies, flush=True)


VERIFIER_SOURCE = inspect.getsource(verify_lines)


# --- The command line -----------------------------------------------------------------------------
@contextlib.contextmanager
def replaced(**functions):
    """For a while, put these in the place of rs_grpo's of the same names."""
    before = {name: getattr(rs_grpo, name) for name in functions}
    vars(rs_grpo).update(functions)
    try:
        yield
    finally:
        vars(rs_grpo).update(before)


def main(arguments=None):
    """The command line of rs_grpo.py, with the functions and flags of this file."""
    mine = check_config, roll_out, evaluate, show, collect, update
    with replaced(TASKS=dict(rs_grpo.TASKS), **{each.__name__: each for each in mine}):
        rs_grpo.main(arguments, MathConfig)


if __name__ == "__main__":
    main()
