"""The specification of rs_grpo.py and bandit.py, as sentences: `python -m pytest -v` prints it.

DEVICE=cuda python -m pytest -q    # the models of test_rs_grpo.py on a GPU
"""

import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter, deque
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from decimal import Decimal, getcontext
from fractions import Fraction
from functools import partial
from operator import add, mul, sub, truediv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

import bandit
import rs_grpo
from rs_grpo import (
    ADVANTAGES,
    TASKS,
    BadInput,
    Config,
    Rollouts,
    Task,
    countdown_rewards,
    countdown_value,
    flag,
    grpo_advantage,
    main,
    risk_sensitive_advantage,
    train,
)

ROOT = Path(__file__).resolve().parent
DEVICE = os.environ.get("DEVICE", "cpu")
PROMPTS = ["1,2,3,4=5:", "10,11,12,13=48:", "1,10,11,12=9:"]  # of three lengths
parametrize = pytest.mark.parametrize
on_a_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="it is a claim about CPUs")
torch.set_num_threads(1)  # models this small gain nothing from a second thread
os.environ["OMP_NUM_THREADS"] = "1"  # nor do those of the processes started here


def seeded(seed=0, device=DEVICE):
    return torch.Generator(device).manual_seed(seed)


# --- Advantages -----------------------------------------------------------------------------------
BETAS = [-1e3, -8, -0.5, -1e-8, -3e-9, 0.0, 1e-9, 1e-8, 1e-7, 1e-5, 1e-3, 2, 8, 64, 1e3]
REWARDS = torch.rand(5, 8, dtype=torch.float64, generator=seeded(device="cpu"))
WORKED = [  # of a correct and of a wrong sample of 16, for 1, 4, 8 and 15 correct; by hand
    ("rs", 0, ".938/-.063 .750/-.250 .500/-.500 .063/-.938"),
    ("grpo", 9, "3.873/-.258 1.732/-.577 1/-1 .258/-3.873"),
    ("rs", 2, "2.140/-.143 .922/-.307 .381/-.381 .029/-.428"),
    ("rs", 4, "2.888/-.193 .698/-.233 .241/-.241 .016/-.245"),
    ("rs", 8, "1.865/-.124 .374/-.125 .125/-.125 .008/-.125"),
]
each_advantage = parametrize("name", ["rs", "grpo"])


def group(correct, samples=16):
    """Binary rewards (1, N) of which the first `correct` are 1."""
    rewards = torch.zeros(1, samples, dtype=torch.float64)
    rewards[0, :correct] = 1
    return rewards


def estimate(name, rewards):
    return ADVANTAGES[name](rewards, Config())


@parametrize("name, beta, cells", WORKED)
def test_an_advantage_has_the_values_worked_out_by_hand(name, beta, cells):
    for correct, cell in zip((1, 4, 8, 15), cells.split()):
        advantages = ADVANTAGES[name](group(correct), Config(beta=beta))
        expected = [float(number) for number in cell.split("/")]
        assert advantages[0, [0, -1]].tolist() == pytest.approx(expected, abs=6e-4)


@parametrize("beta", BETAS)
def test_the_risk_sensitive_advantage_equals_its_definition_in_60_digits(beta):
    """Up to what float64 keeps: exp(βr) has 16 digits, and dividing by β makes their end larger."""
    getcontext().prec = 60
    getcontext().Emin, getcontext().Emax = -(10**9), 10**9
    rewards = [[0.0, 0.0, 1.0, 1.0], [0.37, -2.5, 0.1, 3.0], [1e-3, 0.0, 2e-3, 5.0]]
    b = Decimal(beta) or Decimal("1e-25")  # β = 0 is the limit
    tolerance = 1e-7  # where |β| is below 1e-8, the limit is returned
    if abs(beta) >= 1e-8:
        tolerance = max(1e-15, 1e-15 / abs(beta))
    computed = risk_sensitive_advantage(torch.tensor(rewards, dtype=torch.float64), beta)
    for row, advantages in zip(rewards, computed.tolist()):
        weights = [(b * Decimal(r)).exp() for r in row]
        mean = sum(weights) / len(row)
        exact = [float((weight / mean - 1) / b) for weight in weights]
        assert advantages == pytest.approx(exact, rel=1e-12, abs=tolerance)


EQUAL = [(n, reward) for n in range(1, 65) for reward in (0.0, 1.0, 0.37, 1 / 3, -7.1)]


@parametrize("dtype", [torch.float32, torch.float64])
@parametrize("beta", BETAS)
def test_a_group_of_equal_rewards_has_an_advantage_of_exactly_zero(beta, dtype):
    for samples, reward in EQUAL:
        rewards = torch.full((2, samples), reward, dtype=dtype)
        assert not risk_sensitive_advantage(rewards, beta).any()


@parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_of_equal_rewards_has_an_advantage_of_exactly_zero_in_grpo(dtype):
    for samples, reward in EQUAL:
        assert not grpo_advantage(torch.full((2, samples), reward, dtype=dtype)).any()


@each_advantage
def test_every_row_is_a_group_of_its_own(name):
    alone = [estimate(name, row[None]) for row in REWARDS]
    torch.testing.assert_close(estimate(name, REWARDS), torch.cat(alone))


@each_advantage
def test_the_advantages_of_a_group_sum_to_zero(name):
    assert estimate(name, REWARDS).sum(1).abs().max() < 1e-12


def test_every_row_may_have_a_beta_of_its_own():
    betas = [-3.0, 0.0, 1e-3, 2.0, 64.0]
    together = risk_sensitive_advantage(REWARDS, torch.tensor(betas, dtype=torch.float64)[:, None])
    alone = [risk_sensitive_advantage(row[None], beta) for row, beta in zip(REWARDS, betas)]
    torch.testing.assert_close(together, torch.cat(alone))


@parametrize("beta", [-3.0, 0.0, 2.0, 8.0])
def test_a_constant_added_to_the_rewards_changes_nothing(beta):
    shifted = risk_sensitive_advantage(REWARDS + 11, beta)
    torch.testing.assert_close(shifted, risk_sensitive_advantage(REWARDS, beta))


@parametrize("beta", [0.0, 2.0, 8.0])
def test_risk_aversion_mirrors_risk_seeking(beta):
    mirrored = -risk_sensitive_advantage(-REWARDS, -beta)
    torch.testing.assert_close(mirrored, risk_sensitive_advantage(REWARDS, beta))


def test_for_beta_to_0_the_advantage_is_the_mean_baseline():
    expected = REWARDS - REWARDS.mean(1, keepdim=True)
    computed = risk_sensitive_advantage(REWARDS, 1e-7)
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-6)


def test_for_beta_to_infinity_beta_times_the_advantage_is_that_of_maxrl():
    rewards = torch.cat([group(correct) for correct in range(1, 17)])
    mean = rewards.mean(1, keepdim=True)
    computed = 1e3 * risk_sensitive_advantage(rewards, 1e3)
    torch.testing.assert_close(computed, (rewards - mean) / mean)


@parametrize("beta", [-4.0, 0.5, 2.0, 8.0])
def test_theorem_1_is_the_gradient_of_the_objective(beta):
    """E[A ∇log π] against the derivative of J. A group that holds each outcome as often as its
    probability says makes the group's mean an exact expectation.
    """
    counts = torch.tensor([1, 80, 19, 40, 60])  # of 200
    outcomes = torch.arange(5).repeat_interleave(counts)
    rewards = torch.tensor([1.0, 0.6, 0.0, 0.3, -0.5], dtype=torch.float64)
    probs = counts.double() / 200
    theta = probs.log().requires_grad_()
    objective = (theta.softmax(0) * (beta * rewards).exp()).sum().log() / beta
    objective.backward()
    advantages = risk_sensitive_advantage(rewards[outcomes][None], beta)[0]  # (200,)
    grad_log_pi = torch.eye(5, dtype=torch.float64)[outcomes] - probs  # (200, 5)
    expectation = (advantages[:, None] * grad_log_pi).mean(0)
    torch.testing.assert_close(expectation, theta.grad)


@each_advantage
@parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_advantages_keep_dtype_and_device(name, dtype):
    rewards = group(3).to(DEVICE, dtype)
    advantages = estimate(name, rewards)
    assert (advantages.dtype, advantages.device) == (dtype, rewards.device)


@each_advantage
def test_integer_rewards_have_advantages_in_float32(name):
    assert torch.equal(estimate(name, group(3).long()), estimate(name, group(3).float()))


UNDEFINED = {
    "rewards of one dimension": (torch.zeros(4), 2),
    "a beta for each sample": (torch.zeros(2, 4), torch.ones(4)),
    "an infinite beta": (group(1), math.inf),
    "a beta that is nan": (group(1), math.nan),
    "an infinite reward": (group(1) / 0, 2),
    "a reward that is nan": (group(0) / 0, 0),
}


@parametrize("case", UNDEFINED)
def test_what_has_no_advantage_is_refused(case):
    with pytest.raises(ValueError, match="must be"):
        risk_sensitive_advantage(*UNDEFINED[case])


# --- The task -------------------------------------------------------------------------------------
EXACT = {"+": add, "-": sub, "*": mul, "/": truediv}
BINDS = {"+": 1, "-": 1, "*": 2, "/": 2}
ANSWER = (4, 7, 9, 12), 48


def reward_of(completion, numbers, target):
    (reward,) = countdown_rewards([completion], [(numbers, target)])
    return reward


def expressions(numbers):
    """All (text, value) over numbers, or over such pairs, fully bracketed; value None after x/0."""
    items = [x if isinstance(x, tuple) else (str(x), Fraction(x)) for x in numbers]
    if len(items) == 1:
        yield items[0]
    for i, j in itertools.permutations(range(len(items)), 2):
        rest = [item for place, item in enumerate(items) if place not in (i, j)]
        left, x = items[i]
        right, y = items[j]
        for symbol, function in EXACT.items():
            value = None
            if x is not None and y is not None and (symbol, y) != ("/", 0):
                value = function(x, y)
            yield from expressions([*rest, (f"({left}{symbol}{right})", value)])


@parametrize("numbers, target", [ANSWER, ((3, 3, 8, 8), 24), ((1, 1, 13, 13), 1)])
def test_the_reward_agrees_with_the_enumeration_of_all_expressions(numbers, target):
    judged = list(expressions(numbers))
    assert len(judged) == 9216
    assert target in [value for _, value in judged]
    for text, value in judged:
        for shown in (text, text[1:-1], f"  {text}\nNumbers: 1"):
            assert reward_of(shown, numbers, target) == float(value == target), shown


def judged_by_descent(text, numbers, target):
    """Recursive descent by how tightly operators bind, another route than Python's parser."""
    line = text.split("\n")[0].strip()
    tokens = deque(re.findall(r"[0-9]+|[^0-9 ]", line))
    used = [token for token in tokens if token.isdecimal()]

    def parse(least=1):
        token = tokens.popleft()
        if token == "(":
            value = parse()
            if tokens.popleft() != ")":
                raise ValueError
        else:
            value = Fraction(int(token))
        while tokens and BINDS.get(tokens[0], 0) >= least:
            symbol = tokens.popleft()
            value = EXACT[symbol](value, parse(BINDS[symbol] + 1))
        return value

    try:
        value = parse()
    except (IndexError, ValueError, ZeroDivisionError):
        return 0.0
    if tokens or len(line) > 100 or set(line) - set("0123456789+-*/() "):
        return 0.0
    return float(sorted(used) == sorted(map(str, numbers)) and value == target)


def test_ten_thousand_mutilated_answers_are_judged_as_an_independent_parser_would():
    rng = random.Random(0)
    dirt = [*"0123456789+-*/() .,=e_\n", "**", "//", "٣", "((", "))"]
    right = 0
    for i in range(10_000):
        if i % 100 == 0:
            numbers = [rng.randint(1, 13) for _ in range(3)]
            correct = list(expressions(numbers))
        text, target = rng.choice(correct)
        for _ in range(rng.choice((0, 0, 1, 1, 2, 5))):
            place = rng.randrange(len(text) + 1)
            rest = text[place + rng.randint(0, 1) :]
            text = text[:place] + rng.choice(dirt) + rest
        expected = judged_by_descent(text, numbers, target)
        assert reward_of(text, numbers, target) == expected, (text, numbers)
        right += expected
    assert 3000 < right < 7000  # the oracle saw both sides


VALUES = [
    ("12*7-9*4", [4, 7, 9, 12], 48),
    ("8/(3-8/3)", [3, 3, 8, 8], 24),
    ("1/3", [1, 3], Fraction(1, 3)),
    ("2-5", [2, 5], -3),
    (" ( 2 ) + 5 \n6", [5, 2], 7),
    ("2+5", [2, 5, 5], None),  # one number is missing
    ("2+5+5", [2, 5], None),  # one is used twice
    ("25", [2, 5], None),
    ("5/(2-2)", [2, 2, 5], None),
    ("2**5", [2, 5], None),
    ("5//2", [2, 5], None),
    ("-2+5", [2, 5], None),
    ("2+5)", [2, 5], None),
    ("\n2+5", [2, 5], None),  # its first line is empty
    ("4" + "+0" * 49, [4] + [0] * 49, 4),  # 99 characters
    ("4" + "+0" * 50, [4] + [0] * 50, None),  # 101 characters
]


@parametrize("completion, numbers, value", VALUES)
def test_the_value_of_a_completion_is_exact_and_none_where_it_breaks_a_rule(
    completion, numbers, value
):
    assert countdown_value(completion, numbers) == value


HOSTILE = """() ( ) 4 + 4+7+9+12 4,7,9,12=48: 4,7,9,12=48:(9-7)*(12+12) (12-4)*(9-7)*3 7**9 4//7
12*4*(9-7)/2 -4+7+9+12 +(4) --4 4-+7 ~4 4%7 9**9**9**9 1e9 0x4 4.0+7 4_0 04+7 ٤+٧ 4+７ ² 4×12
４*１２*(９-７)/2 4*(9-7)+12=20 48 =48 1/0 (7-7)/(9-9) 12/(4-4)+7+9 4+7;9+12 __import__('os') \x00
4\x0012 <eos>4 <pad>12*4 None nan inf (4)(12) 4(12) ()4*12 4*12) (4*12 9-7*( 12*4+0*(9-7) \ud800 🙂
(4+7-7)*12*9/9 4*12**(9-7) 4*12//(9-7) 7-9+12*4+2 eval('48')""".split()
HOSTILE += ["", " ", "4- -7", "4 7 9 12", "4+7 9+12", "4+7 or 9", "12*4 = 48", "4+7\n9+12"]
HOSTILE += ["(" * 10**6, "9" * 10**6, "a" * 10**6, "4+" * 10**6, "\n" * 10**6, " " * 10**6 + "4"]
HOSTILE += ["(" * 49 + "4" + ")" * 49, "4+" * 49 + "4", "1/" * 49 + "1", "9" * 100, "٤" * 10**6]
HOSTILE += ["(" * 50 + "4", "-" * 98 + "4", "4" + "**9" * 33, "9" * 49 + "*" + "9" * 50]


def test_a_hostile_completion_earns_nothing():
    for text in HOSTILE:
        assert reward_of(text, *ANSWER) == 0.0, text[:50]


def test_a_hostile_completion_raises_nothing_and_costs_nothing_even_if_its_numbers_are_right():
    for text in HOSTILE:
        numbers = re.findall("[0-9]+", text)
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            countdown_value(text, numbers)
            seconds.append(time.perf_counter() - started)
        assert min(seconds) < 5e-3, text[:50]


each_task = parametrize("name", ["countdown", "countdown-text"])


def all_problems(name):
    task = TASKS[name](Config(eval_problems=10**6))
    return task.train + task.held_out


@parametrize("name, counts", [("countdown", (10_000, 2_000)), ("countdown-text", (4_000, 500))])
def test_held_out_problems_are_never_trained_on(name, counts):
    task = TASKS[name](Config(eval_problems=10**6))
    assert (len(task.train), len(task.held_out)) == counts
    questions = {question for question, _ in all_problems(name)}
    assert len(questions) == sum(counts)  # each is there once
    numbers = {(tuple(numbers), target) for _, (numbers, target) in all_problems(name)}
    assert len(numbers) == sum(counts)


@each_task
def test_a_question_names_its_numbers_in_order_and_its_target(name):
    form = {
        "countdown": "{},{},{},{}={}:",
        "countdown-text": "Numbers: {}, {}, {}. Target: {}. Answer:",
    }
    for question, (numbers, target) in all_problems(name):
        assert question == form[name].format(*numbers, target)
        assert numbers == sorted(numbers)  # so that no order is another problem
        assert 1 <= numbers[0] <= numbers[-1] <= 13
        assert 1 <= target <= 99


@parametrize("name, every", [("countdown", 600), ("countdown-text", 1)])
def test_problems_can_be_solved(name, every):
    values = {}
    for _, (numbers, target) in all_problems(name)[::every]:
        key = tuple(numbers)
        if key not in values:
            values[key] = {value for _, value in expressions(numbers)}
        assert target in values[key]


@each_task
def test_only_the_first_held_out_problems_are_evaluated_on(name):
    task = TASKS[name](Config(eval_problems=7))
    assert task.held_out == TASKS[name](Config()).held_out[:7]


def test_the_worked_examples_are_right_and_not_among_the_problems():
    questions = {question for question, _ in all_problems("countdown-text")}
    lines = rs_grpo.EXAMPLES.splitlines()
    assert len(lines) == 2
    for line in lines:
        question, answer = line.split("Answer:")
        *numbers, target = map(int, re.findall("[0-9]+", question))
        assert reward_of(answer, numbers, target) == 1
        assert question + "Answer:" not in questions


# --- Models of a few thousand weights -------------------------------------------------------------
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.15,
    "bos_token_id": None,
}


def save_model(folder, tokenizer, kind="llama", **changes):
    """A random model of an architecture, and a tokenizer, in a folder; returns its name."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": len(tokenizer), **changes}
    config = AutoConfig.for_model(kind, eos_token_id=tokenizer.eos_token_id, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tokenizer_of_letters():
    """It reads the questions in words; two of its tokens hold a line break, written Ċ."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set(rs_grpo.EXAMPLES + "0123456789+-*/()=") - {" ", "\n"})
    tokens = ["<eos>", "Ċ", ")Ċ", "Ġ", *letters]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    words = Tokenizer(models.BPE(vocabulary, [(")", "Ċ")]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of random models: tiny; absolute, which looks positions up in a table, where rotary
    ones forgive a shift; wordy, which reads letters."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("models")
    digits = AutoTokenizer.from_pretrained(rs_grpo.EMBEDDED)
    table = dict(n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
    return {
        "tiny": save_model(folder / "tiny", digits, tie_word_embeddings=False),
        "absolute": save_model(folder / "absolute", digits, "gpt2", **table),
        "wordy": save_model(folder / "wordy", tokenizer_of_letters()),
    }


@pytest.fixture(scope="session")
def tiny(models):
    return models["tiny"]


def load(model, task="countdown", **changes):
    """(policy, task, config) of a run that would start with these settings."""
    settings = {"device": DEVICE, "precision": "float32", "max_tokens": 12, **changes}
    config = Config(model=model, task=task, **settings)
    task = TASKS[task](config)
    return rs_grpo.load_policy(config, task), task, config


@pytest.fixture
def policy(request, models):
    """The policy of the folder tiny, or of each that `each_kind` names."""
    kind = getattr(request, "param", "tiny")
    task = "countdown-text" if kind == "wordy" else "countdown"
    policy, _, _ = load(models[kind], task)
    return policy


each_kind = parametrize("policy", ["tiny", "absolute", "wordy"], indirect=True)


@pytest.fixture
def spy(monkeypatch):
    """At each call of a function, or at one as in "sample 2", note its arguments or raise."""

    def watch(moment, note, module=rs_grpo):
        name, _, call = moment.partition(" ")
        original = getattr(module, name)
        count = itertools.count(1)

        def watched(*args, **kwargs):
            if not call or next(count) == int(call):
                if isinstance(note, BaseException):
                    raise note
                note(*args)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    return watch


def draw(policy, samples=8, max_tokens=12, temperature=1.0, prompts=PROMPTS):
    """Rollouts without texts and rewards."""
    rows = [tuple(ids) for ids in policy.tokenizer(prompts).input_ids]
    generator = seeded(device=policy.model.device)
    completions, entropy = rs_grpo.sample(policy, rows, samples, max_tokens, temperature, generator)
    owners = [row for row in rows for _ in range(samples)]
    rewards = torch.zeros(len(rows), samples)
    return Rollouts(prompts, owners, completions, [], rewards, entropy)


def pairs(rollouts):
    """(prompt, completion) of every sample."""
    return list(zip(rollouts.prompts, rollouts.completions))


def plain_logits(policy, tokens):
    """The logits after each token, (T, V), from one forward pass: no cache, padding or batch."""
    ids = torch.tensor([tokens], device=policy.model.device)
    return policy.model(ids).logits[0]


def plain_logprobs(policy, prompt, completion, temperature):
    """log π of each completion token, (T,)."""
    logits = plain_logits(policy, prompt + completion)[len(prompt) - 1 : -1]
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs[range(len(completion)), completion]


# --- Sampling -------------------------------------------------------------------------------------
@each_kind
def test_a_completion_ends_with_its_first_eos_or_in_words_with_its_first_line_break(policy):
    completions = draw(policy, samples=64).completions
    eos = policy.tokenizer.eos_token_id
    stops = {0, 1, 2} if eos == 0 else {eos}
    assert policy.stop_ids == stops
    for completion in completions:
        assert not stops & set(completion[:-1])
        assert len(completion) == 12 or completion[-1] in stops
    assert stops == {completion[-1] for completion in completions if len(completion) < 12}


def plain_samples(policy, prompts, n, max_tokens, temperature, generator):
    """As `sample`, with samples listed one by one, and every row run whole and without a cache.
    Returns (index of the prompt, completion) of every sample, and the number of rows each round.
    """
    going = [(prompt, ()) for prompt in range(len(prompts)) for _ in range(n)]
    ended, sizes = [], []
    while going:
        counts = Counter(going)  # samples of a prompt that are equal so far share a row
        rows = [prompts[prompt] + tokens for prompt, tokens in counts]
        sizes.append(len(rows))
        logits = torch.stack([plain_logits(policy, row)[-1] for row in rows])
        probs = (logits / temperature).softmax(-1)
        draws = probs.multinomial(max(counts.values()), True, generator=generator).tolist()
        going = []
        for (prompt, tokens), drawn in zip(counts, draws):
            for token in drawn[: counts[prompt, tokens]]:
                longer = (*tokens, token)
                ends = token in policy.stop_ids or len(longer) == max_tokens
                (ended if ends else going).append((prompt, longer))
    return ended, sizes


@each_kind
@parametrize("max_tokens, every", [(6, 20), (500, 4)])  # until some are cut, until all have ended
@torch.no_grad()
def test_samples_are_those_that_plain_forward_passes_draw_from_the_same_random_numbers(
    policy, max_tokens, every
):
    policy = policy._replace(stop_ids=set(range(0, len(policy.tokenizer), every)))
    sizes = []
    base = policy.model.base_model
    hook = base.register_forward_hook(lambda model, args, output: sizes.append(len(output[0])))
    prompts = [*PROMPTS, PROMPTS[0]]  # equal prompts are groups of their own
    rollouts = draw(policy, 16, max_tokens, temperature=0.9, prompts=prompts)
    hook.remove()
    rows = rollouts.prompts[::16]
    expected, rounds = plain_samples(policy, rows, 16, max_tokens, 0.9, seeded())
    for prompt in range(4):
        ours = rollouts.completions[16 * prompt : 16 * (prompt + 1)]
        theirs = [completion for owner, completion in expected if owner == prompt]
        assert sorted(ours) == sorted(theirs)
    assert sizes == rounds  # equal samples share a row, and none that has ended is run
    assert sizes[0] == 4 < sizes[1] < 64


@parametrize("temperature", [1.0, 0.6])
def test_samples_are_distributed_as_the_models_softmax_at_the_temperature(policy, temperature):
    """Shares of the first token against the probabilities, within five standard errors."""
    rollouts = draw(policy, 8000, 1, temperature)
    firsts = torch.tensor(rollouts.completions).view(3, 8000)
    for prompt, drawn in zip(rollouts.prompts[::8000], firsts):
        logits = plain_logits(policy, prompt)[-1].detach().cpu()
        probs = (logits / temperature).softmax(-1)
        shares = drawn.bincount(minlength=len(probs)) / 8000
        errors = (probs / 8000).sqrt()
        assert ((shares - probs).abs() < 5 * errors).all()


def test_the_entropy_is_estimated_by_the_mean_surprise_of_the_drawn_tokens(policy):
    rollouts = draw(policy, temperature=0.8)
    logprobs = [plain_logprobs(policy, *pair, 0.8) for pair in pairs(rollouts)]
    surprise = -torch.cat(logprobs).mean().item()
    assert rollouts.entropy == pytest.approx(surprise, rel=1e-4)


@each_kind
def test_sampling_runs_each_prompt_once_and_then_one_token_at_a_time(policy):
    shapes = []
    policy.model.base_model.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    rollouts = draw(policy)
    assert shapes[0] == (3, max(map(len, rollouts.prompts)))
    assert {shape[1] for shape in shapes[1:]} == {1}


def test_infinite_logits_are_refused_with_advice(policy):
    policy.model.lm_head.weight.data[7].fill_(math.inf)
    with pytest.raises(BadInput, match="infinite logits; .* lower --lr"):
        draw(policy)


def test_a_rollout_holds_a_text_an_answer_and_a_reward_for_each_completion(tiny):
    policy, task, config = load(tiny)
    judged = []

    def judge(texts, answers):
        judged.extend(zip(texts, answers))
        return [float(i) for i in range(len(texts))]

    problems = task.train[:3]
    rollouts = rs_grpo.roll_out(policy, task._replace(judge=judge), problems, 4, config, seeded())
    decoded = policy.tokenizer.batch_decode(rollouts.completions, skip_special_tokens=True)
    answers = [answer for _, answer in problems for _ in range(4)]
    assert judged == list(zip(decoded, answers))
    assert rollouts.texts == decoded
    assert rollouts.rewards.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert rollouts.questions == [question for question, _ in problems]
    prompts = policy.tokenizer(rollouts.questions).input_ids
    assert rollouts.prompts == [tuple(ids) for ids in prompts for _ in range(4)]
    assert rollouts.tokens == sum(map(len, rollouts.completions))


def test_an_eos_ends_a_right_answer_and_says_nothing(models, monkeypatch):
    policy, task, config = load(models["tiny"])
    (right, wrong) = policy.tokenizer(["12*7-9*4", "12*7-9+4"]).input_ids
    eos = policy.tokenizer.eos_token_id
    rows = [(*right, eos), (*wrong, eos), tuple(right)]
    monkeypatch.setattr(rs_grpo, "sample", lambda *args: (rows, 0.0))
    problem = ("4,7,9,12=48:", ([4, 7, 9, 12], 48))
    rollouts = rs_grpo.roll_out(policy, task, [problem], 3, config, None)
    assert rollouts.rewards.tolist() == [[1, 0, 1]]
    assert rollouts.completions == rows


def test_the_reward_reads_the_first_line_with_the_text_of_its_last_token(models, monkeypatch):
    policy, task, config = load(models["wordy"], "countdown-text")
    texts = [" 2 * (3 + 5)\n", "2*(3+5)", "2*(3+5", " 2 * 3 + 5\n"]
    rows = [tuple(row) for row in policy.tokenizer(texts).input_ids]
    assert policy.tokenizer.convert_ids_to_tokens(rows[0][-1]) == ")Ċ"
    monkeypatch.setattr(rs_grpo, "sample", lambda *args: (rows, 0.0))
    problem = ("Numbers: 2, 3, 5. Target: 16. Answer:", ([2, 3, 5], 16))
    rollouts = rs_grpo.roll_out(policy, task, [problem], 4, config, None)
    assert rollouts.texts == texts
    assert rollouts.rewards.tolist() == [[1, 1, 0, 0]]


@parametrize("max_tokens, longest", [(0, 14), (5, 5)])
def test_0_as_max_tokens_is_the_limit_of_the_task(models, spy, max_tokens, longest):
    policy, task, config = load(models["wordy"], "countdown-text", max_tokens=max_tokens)
    rollouts = rs_grpo.roll_out(policy, task, task.train[:4], 16, config, seeded())
    assert max(map(len, rollouts.completions)) == longest


# --- Learning -------------------------------------------------------------------------------------
MIXED = torch.tensor([[1.0, 0, 0, 1, 0, 0, 0, 0], [0] * 8, [0, 0, 0, 0, 0, 1, 0, 0]])


def gradient(policy):
    """The gradient of all parameters, flat, which is then forgotten."""
    flat = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    policy.model.zero_grad()
    return flat.cpu().double()


def weights(policy):
    """All parameters, flat."""
    return torch.cat([p.detach().flatten() for p in policy.model.parameters()]).cpu()


def assert_plain_gradient(policy, rollouts, advantages, temperature=1.0):
    """The gradient is that of the loss as it is defined, row by row: no prompt is shared, no group
    skipped, every token counted, an EOS and a line break too."""
    ours = gradient(policy)
    tokens = sum(map(len, rollouts.completions))
    for advantage, pair in zip(advantages.flatten().tolist(), pairs(rollouts)):
        logprobs = plain_logprobs(policy, *pair, temperature)
        loss = -advantage * logprobs.sum() / tokens
        loss.backward()
    reference = gradient(policy)
    assert (ours - reference).norm() < 1e-4 * reference.norm()


@each_kind
@parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_log_probabilities_equal_those_of_one_plain_forward_pass(policy, temperature):
    rollouts = draw(policy, temperature=temperature)
    rows = pairs(rollouts)
    ours = rs_grpo.completion_logprobs(policy, *zip(*rows), temperature)  # (B, T)
    assert ours.shape == (24, max(map(len, rollouts.completions)))
    for line, (prompt, completion) in zip(ours, rows):
        plain = plain_logprobs(policy, prompt, completion, temperature)
        torch.testing.assert_close(line[: len(completion)], plain, rtol=0, atol=1e-4)
        assert not line[len(completion) :].any()


@each_kind
@parametrize("micro_tokens", [1, 300, 10**9])
def test_the_gradient_is_that_of_a_plain_loss_however_the_batch_is_cut(policy, micro_tokens):
    rollouts = draw(policy, temperature=0.7)
    assert any(row[-1] in policy.stop_ids for row in rollouts.completions)
    advantages = risk_sensitive_advantage(MIXED, 2.0)
    config = Config(micro_tokens=micro_tokens, temperature=0.7)
    rs_grpo.policy_gradient(policy, rollouts, advantages, config)
    assert_plain_gradient(policy, rollouts, advantages, 0.7)


def test_the_gradient_of_equal_completions_is_that_of_a_plain_loss(policy):
    rollouts = draw(policy, 40, max_tokens=2, temperature=0.3)
    assert len(set(pairs(rollouts))) < 60
    advantages = torch.randn(3, 40, generator=seeded(device="cpu"))
    rs_grpo.policy_gradient(policy, rollouts, advantages, Config(temperature=0.3))
    assert_plain_gradient(policy, rollouts, advantages, 0.3)


@on_a_cpu
def test_the_gradient_is_the_same_bit_for_bit_on_several_threads(policy):
    rollouts = draw(policy, 1000, max_tokens=3, temperature=3.0, prompts=PROMPTS[:1])
    advantages = torch.randn(1, 1000, generator=seeded())
    gradients = []
    torch.set_num_threads(2)
    for _ in range(5):
        rs_grpo.policy_gradient(policy, rollouts, advantages, Config(micro_tokens=10**9))
        gradients.append(gradient(policy))
    torch.set_num_threads(1)
    for other in gradients:
        assert torch.equal(gradients[0], other)


def batches_of(completions, advantages, micro_tokens=100):
    """The micro-batches of completions of one prompt, which has two tokens."""
    prompts = [(1, 2)] * len(completions)
    rewards = torch.tensor([advantages])
    rollouts = Rollouts(["?"], prompts, completions, [], rewards, 0.0)
    return rs_grpo.micro_batches(rollouts, rewards, micro_tokens)


def test_equal_completions_become_one_row_with_the_sum_of_their_advantages():
    ((prompts, completions, row_weights),) = batches_of([(5,), (6,), (5,)], [0.5, -1.0, 0.25])
    assert prompts == ((1, 2), (1, 2))
    assert dict(zip(completions, row_weights)) == {(5,): 0.75, (6,): -1.0}


def test_equal_completions_of_different_prompts_stay_apart():
    rollouts = Rollouts(["", ""], [(1,), (2,)], [(5,), (5,)], [], None, 0.0)
    ((prompts, _, row_weights),) = rs_grpo.micro_batches(rollouts, torch.eye(2)[:, :1], 100)
    assert (prompts, row_weights) == (((1,),), [1.0])


def test_what_has_no_advantage_in_sum_is_in_no_micro_batch():
    assert batches_of([(5,), (6,), (5,)], [0.5, 0.0, -0.5]) == []


def test_a_micro_batch_holds_like_lengths_and_at_most_so_many_tokens_or_one_row():
    completions = [tuple(range(length)) for length in (3, 1, 2, 8, 3, 1)]
    completions = [(i, *row) for i, row in enumerate(completions)]  # no two are equal
    parts = batches_of(completions, [1.0] * 6, micro_tokens=22)  # the longest row has 11 tokens
    lengths = [[len(row) for row in part] for _, part, _ in parts]
    assert lengths == [[2, 2], [3, 4], [4, 9]]
    parts = batches_of(completions, [1.0] * 6, micro_tokens=5)
    assert [len(part) for _, part, _ in parts] == [1] * 6


@each_kind
def test_learning_runs_each_prompt_once_for_its_group(policy):
    rollouts = draw(policy)
    shapes = []
    policy.model.base_model.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    rs_grpo.policy_gradient(policy, rollouts, torch.ones(3, 8), Config(micro_tokens=10**9))
    different = len(set(pairs(rollouts)))
    longest = max(map(len, rollouts.completions))
    assert shapes == [(3, max(map(len, rollouts.prompts))), (different, longest - 1)]


def test_the_log_probabilities_may_be_computed_by_another_function(policy):
    calls = []

    def twice(policy, prompts, completions, temperature):
        calls.append((len(prompts), temperature))
        return 2 * rs_grpo.completion_logprobs(policy, prompts, completions, temperature)

    rollouts = draw(policy)
    config = Config(temperature=0.9)
    rs_grpo.policy_gradient(policy, rollouts, MIXED, config)
    once = gradient(policy)
    rs_grpo.policy_gradient(policy, rollouts, MIXED, config, logprobs=twice)
    assert calls == [(3, 0.9)]
    torch.testing.assert_close(gradient(policy), 2 * once)


def step_of(policy, advantages, lr, step):
    """One step of plain gradient descent: the gradient's norm, and how far the weights moved."""
    before = weights(policy)
    optimizer = torch.optim.SGD(policy.model.parameters())
    norm = rs_grpo.update(policy, optimizer, draw(policy), advantages, Config(lr=lr), step)
    return norm, (weights(policy) - before).norm().item()


def test_a_gradient_is_clipped_to_norm_1(policy):
    norm, moved = step_of(policy, 1e3 * MIXED, lr=0.5, step=10)
    assert norm > 10
    assert moved == pytest.approx(0.5, rel=1e-3)


def test_a_small_gradient_is_not_scaled(policy):
    norm, moved = step_of(policy, 0.1 * MIXED, lr=0.5, step=10)
    assert 0.01 < norm < 0.5
    assert moved == pytest.approx(0.5 * norm, rel=1e-3)


@parametrize("step, share", [(1, 0.1), (5, 0.5), (10, 1), (99, 1)])
def test_the_learning_rate_is_warmed_up_over_ten_steps(policy, step, share):
    _, moved = step_of(policy, 1e3 * MIXED, lr=0.5, step=step)
    assert moved == pytest.approx(0.5 * share, rel=1e-3)


def test_a_step_follows_the_policy_gradient_and_forgets_it(policy):
    rollouts = draw(policy)
    rs_grpo.policy_gradient(policy, rollouts, MIXED, Config())
    descent = gradient(policy)
    before = weights(policy)
    optimizer = torch.optim.SGD(policy.model.parameters())
    rs_grpo.update(policy, optimizer, rollouts, MIXED, Config(lr=0.5), 10)
    moved = (weights(policy) - before).double()
    assert torch.cosine_similarity(moved, -descent, 0) > 0.999
    assert all(parameter.grad is None for parameter in policy.model.parameters())


@parametrize("bad", [math.inf, math.nan])
def test_an_update_that_is_not_finite_changes_no_weight_and_is_forgotten(policy, bad):
    before = weights(policy)
    optimizer = torch.optim.AdamW(policy.model.parameters())
    rs_grpo.policy_gradient(policy, draw(policy), MIXED, Config())
    next(policy.model.parameters()).grad[0, 0] = bad
    assert not math.isfinite(rs_grpo.apply_gradient(policy, optimizer, Config(), 10))
    assert torch.equal(weights(policy), before)
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def step_of_a_large_vocabulary():
    """Print the memory that a step took at most, in bytes, and the gradient's relative error."""
    from transformers import LlamaConfig, LlamaForCausalLM

    V, T = 150_000, 52
    sizes = SIZES | dict(vocab_size=V, tie_word_embeddings=True, num_hidden_layers=1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).to(DEVICE).eval()
    policy = rs_grpo.Policy(model, None, set(), "past_key_values", nullcontext)
    prompts = [tuple(row) for row in torch.randint(V, (2, 8)).tolist() for _ in range(10)]
    completions = [tuple(row) for row in torch.randint(V, (20, T)).tolist()]
    rollouts = Rollouts(["", ""], prompts, completions, [], torch.zeros(2, 10), 0.0)
    advantages = torch.randn(2, 10)
    before = peak_memory()
    rs_grpo.policy_gradient(policy, rollouts, advantages, Config(temperature=0.7))
    print(peak_memory() - before)
    assert_plain_gradient(policy, rollouts, advantages, 0.7)


def peak_memory():
    """Bytes that this process has had at once so far."""
    if DEVICE.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    kilobytes = re.search(r"VmHWM:\s+(\d+) kB", status)[1]
    return 1024 * int(kilobytes)


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is there only")
def test_with_a_vocabulary_of_150_000_the_gradient_is_right_but_all_logits_are_never_there():
    """All are 4·20·52·150,000 bytes = 624 MB, and twice that with their softmax."""
    done = python("-c", "import test_rs_grpo; test_rs_grpo.step_of_a_large_vocabulary()")
    assert done.returncode == 0, done.stderr
    assert 128e6 < int(done.stdout) < 800e6


# --- Precision, and where tensors lie -------------------------------------------------------------
PRECISIONS = {"float32": 1e-6, "float16": 5e-4, "bfloat16": 2e-3}
each_precision = parametrize("precision", PRECISIONS)


@pytest.fixture
def drawn(precision):
    """In a precision: policy, config, the logits (R, V) of each round, and 60 rollouts, one of a
    prompt, so that a round has a row for every sample that goes on."""
    policy, task, config = load("countdown-base", precision=precision)
    logits = []
    head = policy.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda head, args, output: logits.append(output))
    rollouts = rs_grpo.roll_out(policy, task, task.train[:60], 1, config, seeded())
    hook.remove()
    return policy, config, logits, rollouts


@each_precision
def test_weights_are_float32_and_products_have_the_precision(drawn, precision, capsys):
    policy, _, logits, _ = drawn
    assert {parameter.dtype for parameter in policy.model.parameters()} == {torch.float32}
    assert {part.dtype for part in logits} == {getattr(torch, precision)}


@each_precision
@torch.no_grad()
def test_sampler_and_learner_agree(drawn, precision):
    """Mean |Δ log π| of a token between sampler and learner is .004 in float16 and .029 in bfloat16
    on a pretrained model of 135 M parameters; on the embedded one some .0002 and .0007."""
    policy, _, logits, rollouts = drawn
    with policy.autocast():
        learned = rs_grpo.completion_logprobs(policy, *zip(*pairs(rollouts)), 1.0)  # (B, T)
    gaps = []
    for t, part in enumerate(logits):
        going = [i for i, row in enumerate(rollouts.completions) if len(row) > t]
        tokens = [rollouts.completions[i][t] for i in going]
        sampled = part.float().log_softmax(-1)[range(len(going)), tokens]
        gaps.append((sampled - learned[going, t]).abs())
    gaps = torch.cat(gaps)
    assert len(gaps) == rollouts.tokens
    assert gaps.mean() < PRECISIONS[precision]
    assert gaps.max() < 50 * PRECISIONS[precision]


@each_precision
def test_the_gradient_is_that_of_float32_also_where_that_of_a_mean_would_underflow(
    drawn, monkeypatch
):
    policy, config, _, rollouts = drawn
    monkeypatch.setattr(Rollouts, "tokens", 10**8)  # as if the batch were as large
    advantages = torch.randn(60, 1, generator=seeded(device="cpu"))
    rs_grpo.policy_gradient(policy, rollouts, advantages, config)
    plain, _, _ = load("countdown-base")
    rs_grpo.policy_gradient(plain, rollouts, advantages, config)
    assert torch.cosine_similarity(gradient(policy), gradient(plain), 0) > 0.999


class Elsewhere(torch.Tensor):
    """A tensor that says that it lies on another device, and carries one of the CPU."""

    def __new__(cls, inner):
        layout = dict(strides=inner.stride(), dtype=inner.dtype, device="meta")
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **layout)

    def __init__(self, inner):
        self.inner = inner.detach()

    def tolist(self):
        return self.inner.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        here = [x for x in tensors if not isinstance(x, Elsewhere)]
        there = len(here) < len(tensors)
        moves = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if there and not moves and any(x.dim() for x in here):  # a number may, as on CUDA
            raise RuntimeError(f"{func} mixes devices")
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type == "meta"
            kwargs = {**kwargs, "device": "cpu"}
        inner_args, inner_kwargs = tree_map_only(Elsewhere, lambda x: x.inner, (args, kwargs))
        out = func(*inner_args, **inner_kwargs)
        if not there:
            return out
        out = tree_map_only(torch.Tensor, Elsewhere, out)
        return return_and_correct_aliasing(func, args, kwargs, out)


class OtherDevice(TorchDispatchMode):
    """While it is there, `device="meta"` means the device of `Elsewhere`."""

    def __init__(self, patch):
        super().__init__()
        tensor, generator = torch.tensor, torch.Generator  # which wouldn't ask the mode

        def moved(data, dtype=None, device="cpu"):
            return tensor(data, dtype=dtype).to(device)

        patch.setattr(torch, "tensor", moved)
        patch.setattr(torch, "Generator", lambda device="cpu": generator())
        patch.setattr("torch.__future__.get_overwrite_module_params_on_conversion", lambda: True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return Elsewhere.__torch_dispatch__(func, types, args, kwargs)


def everything(policy, task, config):
    """What is sampled, learned and evaluated: completions, results, norms of two gradients."""
    task = task._replace(judge=lambda texts, answers: [float(len(text) > 9) for text in texts])
    rollouts = rs_grpo.roll_out(policy, task, task.train[:5], 4, config, seeded(device="cpu"))
    optimizer = torch.optim.AdamW(policy.model.parameters())
    advantages = risk_sensitive_advantage(rollouts.rewards, 2.0)
    norms = []
    for _ in range(2):
        norms.append(rs_grpo.update(policy, optimizer, rollouts, advantages, config, 9))
    return rollouts.completions, rs_grpo.evaluate(policy, task, config), norms


@on_a_cpu
def test_nothing_mixes_devices_in_sampling_learning_and_evaluating(tiny, monkeypatch):
    settings = dict(eval_problems=3, eval_samples=4, micro_tokens=100)
    completions, results, norms = everything(*load(tiny, **settings))
    policy, task, config = load(tiny, **settings)
    with OtherDevice(monkeypatch):
        policy.model._apply(Elsewhere)
        assert policy.model.device.type == "meta"
        there = everything(policy, task, config)
    assert there[:2] == (completions, results)
    assert there[2] == pytest.approx(norms, rel=1e-4)
    assert min(norms) > 0


@on_a_cpu
def test_the_emulated_device_computes_as_the_cpu_does(monkeypatch):
    with OtherDevice(monkeypatch):
        x = torch.nn.Parameter(torch.rand(3, 2).to("meta"))
        ones = torch.ones(3, 2, device="meta")
        y = (x + ones + torch.tensor(1.0)).sum()  # a number of the CPU may be there
        y.backward()
        assert (type(x.grad), x.device) == (Elsewhere, ones.device)
        assert y.item() == pytest.approx(x.detach().to("cpu").sum().item() + 12)


MIXES = {
    "adding": lambda there, here: there + here,
    "joining": lambda there, here: torch.cat([there, here]),
    "indexing": lambda there, here: there[here.long()],
}


@on_a_cpu
@parametrize("mixing", MIXES)
def test_the_emulated_device_notices_what_mixes(monkeypatch, mixing):
    with OtherDevice(monkeypatch):
        there = torch.ones(3, 2, device="meta")
        with pytest.raises(RuntimeError, match="mixes devices"):
            MIXES[mixing](there, torch.ones(3, 2))


# --- pass@k ---------------------------------------------------------------------------------------
@parametrize("n", range(1, 9))
def test_pass_at_k_is_the_share_of_subsets_with_a_success(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [1] * c + [0] * (n - c)
        best = [max(subset) for subset in itertools.combinations(samples, k)]
        assert rs_grpo.pass_at_k(n, c, k) == pytest.approx(sum(best) / len(best), abs=1e-15)


@parametrize("c", [0, 1, 2, 500, 1023, 1024])
def test_pass_at_k_is_exact_for_a_thousand_samples(c):
    for k in (1, 2, 512, 1024):
        wrong = Fraction(1)  # the chance that all k are, drawn one by one
        for i in range(k):
            wrong *= Fraction(1024 - c - i, 1024 - i)
        assert rs_grpo.pass_at_k(1024, c, k) == pytest.approx(float(1 - wrong), rel=1e-14)


@parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)])
def test_pass_at_k_refuses_other_counts(n, c, k):
    with pytest.raises(ValueError, match="needs 0 <= c <= n"):
        rs_grpo.pass_at_k(n, c, k)


def test_an_evaluation_counts_right_and_different_answers_of_every_problem(policy, monkeypatch):
    """Of 4, 3 or 1 or 0 are right: pass@1 is 3/4, 1/4, 0; pass@2 1, 1 − C(3,2)/C(4,2) = 1/2, 0."""
    answers = iter(["7+1", "7+1", "1+7", "(", ")", "8", ")", ")", "1", "1", "1", "1"])
    asked = []

    def draws(policy, prompts, samples, *rest):
        asked.append((len(prompts), samples))
        texts = [next(answers) for _ in range(len(prompts) * samples)]
        return policy.tokenizer(texts).input_ids, 0.0

    def judge(texts, answers):
        return [float("7" in text or "8" in text) for text in texts]

    monkeypatch.setattr(rs_grpo, "sample", draws)
    task = TASKS["countdown"](Config(eval_problems=3))._replace(judge=judge)
    result = rs_grpo.evaluate(policy, task, Config(prompts=5, samples=2, eval_samples=4))
    assert asked == [(2, 4), (1, 4)]  # at most 10 completions at once
    assert result["n"] == 4
    assert result["correct"] == [3, 1, 0]
    assert result["distinct"] == [2, 1, 0]
    assert result["pass_at_k"] == pytest.approx({1: 100 / 3, 2: 50, 4: 200 / 3})


@parametrize("prompts, at_once", [(1, 1), (4, 1), (9, 2)])
def test_an_evaluation_samples_as_many_at_once_as_a_step_or_a_problem_has(
    tiny, spy, prompts, at_once
):
    policy, task, config = load(tiny, eval_problems=4, eval_samples=16, samples=4, prompts=prompts)
    sizes = []
    spy("sample", lambda policy, rows, *rest: sizes.append(len(rows)))
    rs_grpo.evaluate(policy, task, config)
    assert sizes == [at_once] * (4 // at_once)


def test_a_partial_reward_is_no_solution(policy, tiny):
    _, task, config = load(tiny, eval_problems=3, eval_samples=4)
    task = task._replace(judge=lambda texts, answers: [0.9] * len(texts))
    assert rs_grpo.evaluate(policy, task, config)["correct"] == [0, 0, 0]


def test_the_embedded_model_is_peaked():
    """Far from hopeless at one try, and nowhere near certain at many."""
    policy, task, config = load("countdown-base", eval_problems=32, eval_samples=32, max_tokens=0)
    base = rs_grpo.evaluate(policy, task, config)
    assert 8 < base["pass_at_k"][1] < 30 < base["pass_at_k"][32] < 75


def test_an_evaluation_draws_the_same_random_numbers_again_and_others_with_another_seed(tiny):
    policy, task, config = load(tiny, eval_problems=4, eval_samples=64)
    task = task._replace(judge=lambda texts, answers: [float("7" in text) for text in texts])
    first, again, other = [
        rs_grpo.evaluate(policy, task, replace(config, seed=seed)) for seed in (0, 0, 1)
    ]
    assert first == again
    assert first != other


# --- Training -------------------------------------------------------------------------------------
# An estimator of one's own: a random model solves nothing, and this gives it a signal.
ADVANTAGES["graded"] = lambda r, config: torch.linspace(-1, 1, r.shape[1]).expand_as(r)


def settings_of(model, folder, **changes):
    """The settings of a run of some seconds."""
    settings = {
        "model": model,
        "out": str(folder),
        "advantage": "graded",
        "prompts": 4,
        "samples": 4,
        "steps": 6,
        "max_tokens": 6,
        "lr": 1e-2 if DEVICE == "cpu" else 1e-5,  # so that rounding isn't learned from elsewhere
        "eval_problems": 3,
        "eval_samples": 4,
        "save_every": 2,
        "device": DEVICE,
        "precision": "float32",
    }
    return Config(**{**settings, **changes})


@pytest.fixture
def small(tiny, tmp_path):
    return partial(settings_of, model=tiny, folder=tmp_path / "run")


def flags(config):
    return [f"--{name.replace('_', '-')}={value}" for name, value in asdict(config).items()]


def metrics(folder):
    """The lines of metrics.jsonl, without times."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
    for line in lines:
        del line["seconds"]
    return lines


def saved(folder):
    return torch.load(Path(folder) / "checkpoint.pt", map_location="cpu", weights_only=True)


def assert_same(folder, other, results=True):
    """The same metrics, weights, optimizer, random state and other state, and the same evaluations
    too: to the last bit on a CPU. A GPU adds in any order, so there numbers are only close."""
    tolerance = 0 if DEVICE == "cpu" else 1e-3
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    close(metrics(folder), metrics(other))
    ours, theirs = saved(folder), saved(other)
    for path, parts in ((folder, ours), (other, theirs)):
        written = json.loads((path / "eval.json").read_text())
        assert written == json.loads(json.dumps(parts["state"]["results"]))
    our_results = ours["state"].pop("results")
    assert our_results == theirs["state"].pop("results") or not results
    assert torch.equal(ours.pop("generator"), theirs.pop("generator"))
    close(ours, theirs)


@pytest.fixture(scope="session")
def whole(tiny, tmp_path_factory):
    """The folder of a run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    main(flags(settings_of(tiny, folder)))
    return folder


def test_a_run_leaves_a_folder_that_holds_everything(whole):
    names = "checkpoint.pt config.json eval.json metrics.jsonl model passk.png"
    assert sorted(path.name for path in whole.iterdir()) == names.split()
    assert (whole / "passk.png").read_bytes().startswith(b"\x89PNG")


def test_config_json_holds_the_settings(whole, tiny):
    assert json.loads((whole / "config.json").read_text()) == asdict(settings_of(tiny, whole))


def test_eval_json_holds_the_results_of_the_first_and_of_the_last_step(whole):
    results = json.loads((whole / "eval.json").read_text())
    assert list(results) == ["0", "6"]
    for result in results.values():
        assert list(result) == ["n", "correct", "distinct", "pass_at_k"]
        assert result["n"] == 4
        assert len(result["correct"]) == len(result["distinct"]) == 3
        assert list(result["pass_at_k"]) == ["1", "2", "4"]


def test_metrics_jsonl_has_a_line_for_each_step(whole):
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert list(line) == "step reward grad_norm signal entropy length seconds".split()


def test_the_trained_model_loads_in_transformers(whole, tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = AutoModelForCausalLM.from_pretrained(whole / "model").state_dict()
    expected = saved(whole)["model"]
    assert trained.keys() == expected.keys()
    assert all(torch.equal(trained[name], expected[name]) for name in trained)
    base = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    assert not torch.equal(trained["lm_head.weight"], base["lm_head.weight"])
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (tiny, whole / "model")]
    assert tokenizers[0]("1+1").input_ids == tokenizers[1]("1+1").input_ids


def test_main_and_train_return_results_by_step_and_by_k(small):
    config, results = main(flags(small(steps=1)))
    assert config == small(steps=1)
    assert list(results) == [0, 1]
    assert list(results[1]["pass_at_k"]) == [1, 2, 4]
    assert train(config, resume=True) == results


def test_0_steps_only_evaluate(small, capsys):
    _, results = main(flags(small(steps=0)))
    assert list(results) == [0]
    assert metrics(small().out) == []
    base, trained = re.search("pass@1 +([0-9.]+) +([0-9.]+)", capsys.readouterr().out).groups()
    assert base == trained


def test_the_folder_of_a_run_is_named_after_its_model_and_advantage():
    assert Config().run_folder == Path("runs/countdown-base-rs-2-seed0")
    assert Config(model="of/it", advantage="grpo", seed=3).run_folder == Path("runs/it-grpo-seed3")
    assert Config(out="there").run_folder == Path("there")


def test_a_run_prints_what_it_runs_on_and_pass_at_k_before_and_after(whole, tiny, spy, capsys):
    spy("evaluate", AssertionError("it was done"))
    main(["--resume", "--out", str(whole)])  # nothing is left to do
    first, title, *table, last = capsys.readouterr().out.splitlines()
    model = load(tiny)[0].model
    size = sum(parameter.numel() for parameter in model.parameters())
    assert first == f"{model.device}, torch.float32, {tiny} of {size:,} parameters"
    assert title == "3 held-out problems, 4 samples each, percent"
    cells = [line.split()[:3] for line in table]
    assert cells[0] == ["base", "trained"]
    results = json.loads((whole / "eval.json").read_text())
    for row, k in zip(cells[1:4], ("1", "2", "4")):
        percents = [results[step]["pass_at_k"][k] for step in ("0", "6")]
        assert row == [f"pass@{k}", *[f"{percent:.1f}" for percent in percents]]
    assert cells[4][0] == "distinct"
    assert last == f"everything is in {whole}/, the trained model in its folder model/"


def test_a_gradient_of_zero_changes_no_weight_as_nothing_decays(small, tiny):
    def without_gradient(policy, optimizer, rollouts, advantages, config, step):
        for parameter in policy.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return rs_grpo.apply_gradient(policy, optimizer, config, step)

    train(small(steps=1, lr=1.0), update=without_gradient)
    base = load(tiny)[0].model.state_dict()
    for name, weight in saved(small().out)["model"].items():
        assert torch.equal(weight, base[name].cpu())


@parametrize("prompts, steps", [(1, 35), (7, 5), (10, 3), (35, 1), (50, 1)])
def test_problems_come_once_an_epoch_in_an_order_set_by_the_seed(monkeypatch, prompts, steps):
    seen = []
    rollouts = SimpleNamespace(rewards=torch.zeros(min(prompts, 35), 2))
    monkeypatch.setattr(rs_grpo, "roll_out", lambda *args: seen.extend(args[2]) or rollouts)
    task = Task([("", i) for i in range(35)], [], None, None)

    def epoch(number, seed=0):
        seen.clear()
        for step in range(number * steps, (number + 1) * steps):
            config = Config(prompts=prompts, seed=seed)
            rs_grpo.collect(None, task, config, SimpleNamespace(step=step), None)
        assert len(set(seen)) == len(seen) == min(prompts, 35) * steps
        return list(seen)

    assert epoch(0) == epoch(0) != epoch(1)
    assert epoch(0) != epoch(0, seed=1)


def test_the_metrics_are_those_of_the_batch(small):
    """In step 1 two of four groups have rewards that differ, and in step 2 none."""
    rewards = torch.tensor([[1.0, 0, 0, 0], [1.0, 0.5, 0, 0], [0] * 4, [1.0] * 4])
    batches = []

    def collect(policy, task, config, state, generator):
        rollouts, _ = rs_grpo.collect(policy, task, config, state, generator)
        rollouts = rollouts._replace(rewards=rewards * (state.step == 0))
        batches.append(rollouts)
        return rollouts, risk_sensitive_advantage(rollouts.rewards, 2.0)

    train(small(steps=2), collect=collect)
    first, second = metrics(small().out)
    assert first["reward"] == 6.5 / 16
    assert first["signal"] == 2 / 4
    assert first["length"] == sum(map(len, batches[0].completions)) / 16
    assert first["entropy"] == batches[0].entropy
    assert first["grad_norm"] > 0
    assert second["reward"] == second["signal"] == second["grad_norm"] == 0


def test_samples_shown_leave_out_the_examples_before_their_prompt(models, small, spy, capsys):
    prompts = []
    spy("sample", lambda policy, rows, *rest: prompts.extend(policy.tokenizer.batch_decode(rows)))
    train(small(model=models["wordy"], steps=1, task="countdown-text"))
    questions = {question for question, _ in all_problems("countdown-text")}
    for prompt in prompts:
        assert prompt.startswith(rs_grpo.EXAMPLES)
        assert prompt.removeprefix(rs_grpo.EXAMPLES) in questions
    shown = capsys.readouterr().out
    assert re.search(r"reward 0.00  Numbers: \d+, \d+, \d+. Target: \d+. Answer: '", shown)
    assert "2 * 3 + 5" not in shown


def test_the_best_and_the_worst_sample_of_a_batch_are_shown(small, capsys):
    def collect(policy, task, config, state, generator):
        rollouts, advantages = rs_grpo.collect(policy, task, config, state, generator)
        rewards = torch.full((4, 4), 0.5)
        rewards[1, 2], rewards[3, 0] = 0.75, 0.25
        shown.extend(
            (rewards[i, j].item(), rollouts.questions[i], rollouts.texts[4 * i + j])
            for i, j in ((1, 2), (3, 0))
        )
        return rollouts._replace(rewards=rewards), advantages

    shown = []
    train(small(steps=1), collect=collect)
    printed = capsys.readouterr().out
    for reward, question, text in shown:
        assert f"reward {reward:.2f}  {question} {text!r}\n" in printed


def failing_at(*steps):
    """An update whose gradient isn't finite at these steps."""

    def update(policy, optimizer, rollouts, advantages, config, step):
        rs_grpo.policy_gradient(policy, rollouts, advantages, config)
        if step in steps:
            next(policy.model.parameters()).grad[0] = math.inf
        return rs_grpo.apply_gradient(policy, optimizer, config, step)

    return update


def test_two_updates_in_a_row_may_be_skipped(small):
    train(small(), update=failing_at(2, 3, 5, 6))
    finite = [math.isfinite(line["grad_norm"]) for line in metrics(small().out)]
    assert finite == [True, False, False, True, False, False]
    for weight in saved(small().out)["model"].values():
        assert weight.isfinite().all()


def test_three_updates_in_a_row_that_are_not_finite_end_a_run(small):
    with pytest.raises(BadInput, match="three updates in a row .* lower --lr"):
        train(small(), update=failing_at(2, 3, 4, 5))
    assert len(metrics(small().out)) == 3


# --- Going on -------------------------------------------------------------------------------------
MOMENTS = """evaluate 1,policy_gradient 1,apply_gradient 1,policy_gradient 2,policy_gradient 4
report 3,report 4,save_checkpoint 1,save_checkpoint 2,save_checkpoint 4,save_checkpoint 6,evaluate 2
save_checkpoint 7,show 1""".replace("\n", ",")


@parametrize("moment", MOMENTS.split(","))
def test_a_run_broken_off_anywhere_resumes_to_the_same_numbers(
    whole, small, spy, monkeypatch, moment
):
    spy(moment, RuntimeError("killed"))
    with pytest.raises(RuntimeError, match="killed"):
        main(flags(small()))
    monkeypatch.undo()
    if moment == "save_checkpoint 1":  # as after an error in the settings, nothing is there yet
        (small().run_folder / "config.json").unlink()
        (small().run_folder / "metrics.jsonl").unlink()
        main(flags(small()))
    else:
        main(["--resume", "--out", small().out])
    assert_same(small().run_folder, whole)


def test_a_run_broken_off_while_it_writes_a_checkpoint_resumes_to_the_same_numbers(
    whole, small, spy, monkeypatch
):
    def half(parts, path):
        path.write_bytes(b"half of a checkpoint")
        raise RuntimeError("killed")

    spy("save 4", half, torch)
    with pytest.raises(RuntimeError, match="killed"):
        main(flags(small()))
    monkeypatch.undo()
    main(["--resume", "--out", small().out])
    assert_same(small().run_folder, whole)


def test_a_run_killed_at_any_moment_resumes_to_the_same_numbers(whole, small):
    """By SIGKILL, which leaves no time for anything."""
    log = small().run_folder / "metrics.jsonl"
    command = [sys.executable, "-c", "from test_rs_grpo import main; main()"]
    arguments = flags(small())
    kills = 0
    for lines in (1, 4):  # kill when that many steps are done, and a moment later
        process = subprocess.Popen(
            [*command, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        done = 0
        while process.poll() is None and done < lines:
            time.sleep(0.002)
            done = log.read_text().count("\n") if log.exists() else 0
        time.sleep(random.uniform(0, 0.05))
        kills += process.poll() is None
        process.kill()
        process.wait()
        arguments = ["--resume", "--out", small().out]
    main(arguments)
    assert_same(small().run_folder, whole)
    assert kills


def test_resuming_with_more_steps_equals_a_longer_run(whole, small):
    train(small(steps=4))
    results = train(small(), resume=True)
    assert list(results) == [0, 4, 6]
    assert_same(small().run_folder, whole, results=False)


def test_steps_and_how_often_to_save_and_how_much_to_learn_at_once_may_change_on_resumption(small):
    train(small(steps=1))
    changes = {"steps": 2, "save_every": 1, "micro_tokens": 50}
    flags_of_changes = ["--steps", "2", "--save-every", "1", "--micro-tokens", "50"]
    config, results = main(["--resume", "--out", small().out, *flags_of_changes])
    assert config == small(**changes)
    assert list(results) == [0, 1, 2]
    assert json.loads((small().run_folder / "config.json").read_text()) == asdict(config)


@parametrize("changed", ["--beta 3", "--lr 1e-5", "--seed 1", "--eval-samples 8", "--model x"])
def test_another_setting_may_not_change_on_resumption(capsys, whole, changed):
    before = contents(whole)
    name, value = changed.split()
    message = complaint(capsys, "--resume", "--out", whole, name, value)
    assert f"omit {name}: it was" in message
    assert contents(whole) == before


@parametrize("max_tokens", [0, 6])
def test_a_setting_may_be_given_again_on_resumption_as_it_was(small, max_tokens):
    train(small(steps=0, max_tokens=max_tokens))
    again = ["--max-tokens", str(max_tokens), "--seed", "0"]
    config, _ = main(["--resume", "--out", small().out, *again])
    assert config == small(steps=0, max_tokens=max_tokens)


def test_what_a_collect_puts_into_the_state_is_there_after_resumption(small):
    def collect(policy, task, config, state, generator):
        state.seen = getattr(state, "seen", torch.zeros(2)) + 1
        return rs_grpo.collect(policy, task, config, state, generator)

    train(small(steps=2), collect=collect)
    train(small(steps=3), resume=True, collect=collect)
    assert saved(small().out)["state"]["seen"].tolist() == [3, 3]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.*")}


def test_an_existing_run_is_not_overwritten(capsys, whole, tiny):
    before = contents(whole)
    assert "go on with --resume" in complaint(capsys, "--model", tiny, "--out", whole)
    assert contents(whole) == before


@parametrize("path", ["config.json", "config.json/run"])
def test_a_file_is_no_run_folder(capsys, whole, tiny, path):
    complaint(capsys, "--model", tiny, "--out", whole / path)


DAMAGED = {
    "empty": lambda whole: b"",
    "half": lambda whole: whole[: len(whole) // 2],
    "another file": lambda whole: b"x" * 1000,
}


@parametrize("damage", DAMAGED)
def test_a_damaged_checkpoint_is_refused(small, damage):
    train(small(steps=0))
    checkpoint = small().run_folder / "checkpoint.pt"
    checkpoint.write_bytes(DAMAGED[damage](checkpoint.read_bytes()))
    with pytest.raises(BadInput, match="can't be resumed .* another --out"):
        train(small(steps=0), resume=True)


def test_a_run_that_had_not_saved_anything_is_refused(small):
    train(small(steps=0))
    (small().run_folder / "checkpoint.pt").unlink()
    with pytest.raises(BadInput, match="can't be resumed .* another --out"):
        train(small(steps=0), resume=True)


@parametrize("damage", ["", "{", '{"beta": 2.0'])
def test_a_damaged_configuration_is_refused(capsys, tmp_path, damage):
    (tmp_path / "config.json").write_text(damage)
    complaint(capsys, "--resume", "--out", tmp_path)


def test_a_run_of_a_script_with_other_settings_is_refused(capsys, small):
    train(small(steps=0))
    message = complaint(capsys, "--resume", "--out", small().out, config_class=Wider)
    assert "another script" in message or "other settings" in message


def test_ctrl_c_ends_with_status_130_and_says_how_to_go_on(whole, small, spy, monkeypatch, capsys):
    spy("policy_gradient 4", KeyboardInterrupt())
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "extensions.kl", "--beta", "3"])
    with pytest.raises(SystemExit, match="^130$"):
        main(flags(small()))
    printed = capsys.readouterr().err
    assert printed.endswith("\nstopped; go on: python -m extensions.kl --beta 3 --resume\n")
    monkeypatch.undo()
    main(["--resume", "--out", small().out])
    assert_same(small().run_folder, whole)


MEMORY_ERRORS = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to …")]
each_memory_error = parametrize("error", MEMORY_ERRORS, ids=["MemoryError", "OutOfMemoryError"])


def out_of_memory(capsys, *arguments):
    """Run the command line, expect exit status 1 and one sentence, which names flags that exist."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^1$"):
        main(list(arguments))
    (message,) = re.findall("rs_grpo.py: (out of memory.*\n)$", capsys.readouterr().err)
    named = set(re.findall("--[a-z-]+", message))
    assert {"--micro-tokens", "--prompts", "--samples", "--eval-samples"} <= named
    assert named <= {f"--{field.name.replace('_', '-')}" for field in fields(Config)} | {"--resume"}


@each_memory_error
@parametrize("moment, step", [("roll_out 4", 2), ("token_logprobs 3", 2), ("evaluate 2", 6)])
def test_a_run_out_of_memory_goes_on_from_its_last_checkpoint(
    whole, small, monkeypatch, spy, capsys, error, moment, step
):
    """In sampling, in learning, in evaluating."""
    spy(moment, error)
    out_of_memory(capsys, *flags(small()))
    monkeypatch.undo()
    assert saved(small().out)["state"]["step"] == step
    main(["--resume", "--out", small().out])
    assert_same(small().run_folder, whole)


@each_memory_error
@parametrize("moment", ["from_pretrained", "prefill"])  # of the model, and of the first prompt
def test_out_of_memory_in_loading_leaves_no_folder(small, monkeypatch, spy, capsys, error, moment):
    import transformers

    module = rs_grpo if moment == "prefill" else transformers.AutoModelForCausalLM
    spy(moment, error, module)
    out_of_memory(capsys, *flags(small()))
    assert not small().run_folder.exists()


@each_memory_error
def test_out_of_memory_in_resuming_is_no_damage(whole, spy, capsys, error):
    spy("load_state_dict", error, torch.optim.Optimizer)
    out_of_memory(capsys, "--resume", "--out", str(whole))


def test_the_error_of_a_cpu_without_memory_counts_too(small, spy, capsys):
    spy("token_logprobs", RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"))
    out_of_memory(capsys, *flags(small()))


def test_another_error_is_not_hidden(small, spy):
    spy("token_logprobs", RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="multiplied"):
        main(flags(small()))


# --- The command line -----------------------------------------------------------------------------
def complaint(capsys, *arguments, config_class=Config):
    """Run the command line, expect exit status 2 and one sentence; returns it."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^2$"):
        main([str(argument) for argument in arguments], config_class)
    printed = capsys.readouterr().err
    assert re.fullmatch("[a-z_]+.py: .{20,}\n", printed), printed
    return printed


BAD_FLAGS = """--samples 1;--samples 0;--prompts 0;--prompts -3;--steps -1;--max-tokens -1;--beta x
--eval-samples -1;--eval-samples 0;--eval-problems 0;--save-every 0;--eval-every 5;--micro-tokens 0
--beta nan;--beta inf;--beta -inf;--lr nan;--lr inf;--lr 0;--lr -1e-4;--temperature 0
--temperature nan;--temperature -1;--steps 1.5;--seed -1;--seed 18446744073709551615
--advantage chen;--task gsm8k;--task=;--device tpu9;--device cuda:99;--model ./nowhere;--model=
--no-such-flag 1;--resume;--precision int8""".replace("\n", ";")


@pytest.fixture
def without_graded(monkeypatch):
    """The advantages that the project has."""
    monkeypatch.delitem(ADVANTAGES, "graded")


@parametrize("bad", BAD_FLAGS.split(";"))
def test_bad_input_gets_one_sentence_and_exit_status_2_and_leaves_no_folder(
    capsys, tmp_path, without_graded, bad
):
    message = complaint(capsys, "--out", tmp_path / "run", *bad.split())
    name = bad.split()[0].strip("=")
    assert name in message or name == "--resume"
    assert not (tmp_path / "run").exists()


BOUNDS = [("--samples 1", "2"), ("--steps -1", "0"), ("--lr 0.0", "0"), ("--temperature -0.5", "0")]


@parametrize("bad, bound", BOUNDS)
def test_the_sentence_on_a_bad_number_names_flag_value_and_bound(capsys, bad, bound):
    name, value = bad.split()
    message = complaint(capsys, name, value)
    assert f"{name} is {value}, but must be" in message
    assert re.search(rf"(at least|above) {bound}\n", message)


CHOICES = {
    "advantage": "rs, grpo",
    "task": "countdown, countdown-text",
    "precision": "auto, float32",
}


@parametrize("name", CHOICES)
def test_the_sentence_on_a_bad_choice_names_the_known_ones(capsys, without_graded, name):
    message = complaint(capsys, f"--{name}", "chen")
    assert f"--{name} is chen" in message
    assert CHOICES[name] in message


@parametrize("damage", ["empty", "half"])
def test_a_folder_that_is_no_model_is_refused(capsys, tmp_path, tiny, damage):
    (tmp_path / "none").mkdir()
    if damage == "half":
        for file in Path(tiny).iterdir():
            (tmp_path / "none" / file.name).write_bytes(file.read_bytes()[:100])
    message = complaint(capsys, "--model", tmp_path / "none", "--out", tmp_path / "run")
    assert "can't be loaded" in message
    assert not (tmp_path / "run").exists()


MAMBA = {"state_size": 4, "num_hidden_layers": 1, "conv_kernel": 2, "expand": 1}
NOT_PLAIN = [
    ("mamba", MAMBA, "keys and values"),
    ("cohere", {"logit_scale": 0.5}, "changes its logits after the output layer"),
]


@parametrize("kind, sizes, reason", NOT_PLAIN)
def test_a_model_that_is_no_plain_transformer_is_refused(
    capsys, tmp_path, tiny, kind, sizes, reason
):
    model = save_model(tmp_path / kind, load(tiny)[0].tokenizer, kind, **sizes)
    message = complaint(capsys, "--model", model, "--out", tmp_path / "run", "--device", DEVICE)
    assert reason in message
    assert "give a plain transformer" in message
    assert not (tmp_path / "run").exists()


def test_the_embedded_model_cannot_read_words(capsys, tmp_path):
    message = complaint(capsys, "--task", "countdown-text", "--out", tmp_path / "run")
    assert "can't read the prompts of --task countdown-text" in message
    assert not (tmp_path / "run").exists()


def test_importing_is_cheap():
    imported = python("-c", "import sys, rs_grpo; print(*sys.modules)").stdout.split()
    assert "torch" in imported
    assert not {"transformers", "matplotlib", "extensions", "evidence"} & set(imported)


# --- Doors ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Wider(Config):
    """A Config with two more flags, as a script of extensions/ derives it."""

    twice: bool = flag(False, "learn from each batch two times")
    share: float = flag(0.5, "of what is there", above=0)

    def __post_init__(self):
        if self.twice and self.share > 1:
            raise BadInput(f"--share is {self.share}, but with --twice must be at most 1")


@parametrize("number", [0, 1, 0.5])
def test_a_number_without_a_bound_is_an_error_at_once(number):
    with pytest.raises(TypeError, match="needs a bound"):
        flag(number, "of what is there")


@parametrize("value", ["text", True, False])
def test_a_setting_that_is_no_number_needs_no_bound(value):
    assert flag(value, "whatever").default is value


@parametrize("config_class", [Config, Wider])
def test_help_names_every_setting_with_its_text_and_default(capsys, config_class):
    with pytest.raises(SystemExit, match="^0$"):
        main(["--help"], config_class)
    text = " ".join(capsys.readouterr().out.split())
    assert "--resume go on" in text
    for field in fields(config_class):
        name = f"--{field.name.replace('_', '-')}"
        if field.default is not False:
            name += f" {field.name.upper()}"
        assert f" {name} {field.metadata['help']} (default: {field.default!r})" in text


def test_a_script_can_add_flags(small):
    seen = []

    def collect(policy, task, config, state, generator):
        seen.append(config)
        return rs_grpo.collect(policy, task, config, state, generator)

    arguments = [*flags(small(steps=1)), "--twice", "--share", "0.25"]
    main(arguments, Wider, collect)
    main(["--resume", "--out", small().out, "--steps", "2"], Wider, collect)
    expected = Wider(**asdict(small(steps=1)), twice=True, share=0.25)
    assert seen == [expected, replace(expected, steps=2)]


@parametrize("bad", ["--share 0", "--share nan", "--share 2 --twice", "--share x"])
def test_a_script_can_bound_its_flags(capsys, bad):
    message = complaint(capsys, *bad.split(), config_class=Wider)
    assert message.startswith("test_rs_grpo.py: ")
    assert "--share" in message


def test_what_a_step_does_is_passed_in(small):
    calls = []

    def collect(*arguments):
        calls.append("collect")
        return rs_grpo.collect(*arguments)

    def update(policy, optimizer, rollouts, advantages, config, step):
        calls.append(step)
        return rs_grpo.update(policy, optimizer, rollouts, advantages, config, step)

    train(small(steps=2), collect=collect, update=update)
    assert calls == ["collect", 1, "collect", 2]
    main(["--resume", "--out", small().out, "--steps", "3"], collect=collect, update=update)
    assert calls[4:] == ["collect", 3]


def test_a_task_brings_its_own_prompts_judge_length_and_stop(small, monkeypatch, spy):
    """Each question is read as `=` only; an answer ends with 7 and earns a share of its length."""
    judged = []

    def judge(texts, answers):
        judged.extend(zip(texts, answers))
        return [min(1.0, len(text) / answer) for text, answer in zip(texts, answers)]

    task = Task(
        train=[("first", 5), ("second", 3)],
        held_out=[("third", 3)],
        encode=lambda tokenizer, questions: tokenizer(["="] * len(questions)).input_ids,
        judge=judge,
        max_tokens=9,
        stop="7",
    )
    monkeypatch.setitem(TASKS, "mine", lambda config: task)
    batches = []
    spy("policy_gradient", lambda policy, rollouts, *rest: batches.append((policy, rollouts)))
    results = train(small(steps=1, task="mine", prompts=2, samples=64, max_tokens=0))
    ((policy, rollouts),) = batches
    ((equals, seven),) = policy.tokenizer(["=7"]).input_ids
    assert policy.stop_ids == {policy.tokenizer.eos_token_id, seven}
    assert set(rollouts.prompts) == {(equals,)}
    assert max(map(len, rollouts.completions)) == 9
    for completion in rollouts.completions:
        assert seven not in completion[:-1]
    assert any(completion[-1] == seven for completion in rollouts.completions)
    assert sorted(rollouts.questions) == ["first", "second"]
    answers = [dict(task.train)[question] for question in rollouts.questions for _ in range(64)]
    batch = list(zip(rollouts.texts, answers))
    assert judged[4 : 4 + 128] == batch  # after 4 samples of the evaluation
    rewards = [min(1.0, len(text) / answer) for text, answer in batch]
    assert rollouts.rewards.flatten().tolist() == pytest.approx(rewards)
    assert list(results) == [0, 1]
    assert len(results[1]["correct"]) == 1


# --- The bandit -----------------------------------------------------------------------------------
PROBS = torch.tensor([0.01, 0.80, 0.19], dtype=torch.float64)  # settled for the second-best arm
PAYS = torch.tensor([1.0, 0.6, 0.0], dtype=torch.float64)


def exact_gradient(beta):
    """Theorem 1 for a softmax policy, π_j A_j, apart from the tested code; β isn't 0."""
    weights = torch.exp(beta * PAYS)
    return PROBS * (weights / (PROBS @ weights) - 1) / beta


def expected_update(beta, n):
    """The expectation of the estimator: every group of n pulls, weighted by its probability."""
    groups = list(itertools.product(range(3), repeat=n))
    arms = torch.tensor(groups)  # (3^n, n)
    weights = PROBS[arms].prod(1, keepdim=True)
    advantages = risk_sensitive_advantage(PAYS[arms], beta)
    flat = (weights * advantages / n).flatten()
    return arms.flatten().bincount(flat)


@parametrize("n", [2, 3, 8])
def test_with_beta_0_a_group_of_n_scales_the_gradient_by_1_minus_1_over_n(n):
    exact = PROBS * (PAYS - PROBS @ PAYS)
    torch.testing.assert_close(expected_update(0, n), (1 - 1 / n) * exact)


@parametrize("beta", [2, 8])
def test_the_larger_the_group_the_closer_its_expected_gradient_is_to_theorem_1(beta):
    exact = exact_gradient(beta)
    small, middle, large = [(expected_update(beta, n) - exact).norm() for n in (2, 4, 8)]
    assert small > middle > large


def test_arm_40_pays_most_and_the_policy_starts_around_arm_75():
    rewards, logits = bandit.landscape()
    assert rewards[[0, 40, 75]].tolist() == pytest.approx([0.1, 1.0, 0.6], abs=1e-5)
    assert logits.argmax() == 75
    assert round(1 / logits.softmax(0)[40].item()) == 225


@parametrize("beta", [-3.0, 0.0, 2.0, 64.0])
def test_an_update_of_the_bandit_is_a_step_along_the_gradient_that_autograd_finds(beta):
    rewards, start = bandit.landscape()
    uniforms = torch.linspace(0, 0.99, 16, dtype=torch.float64)
    logits = start[None].clone()
    probs = bandit.update(logits, rewards, beta, uniforms[None], lr=0.1)
    torch.testing.assert_close(probs[0], start.softmax(0))
    below = probs[0].cumsum(0) < uniforms[:, None]  # (N, K)
    arms = below.sum(1)  # the inverse of the distribution function, by counting
    advantages = risk_sensitive_advantage(rewards[arms][None], beta)
    theta = start.clone().requires_grad_()
    logprobs = theta.log_softmax(0)[arms]
    (advantages * logprobs).mean().backward()
    torch.testing.assert_close(logits[0], start + 0.1 * theta.grad)


@pytest.fixture(scope="module")
def curve():
    return bandit.run(bandit.Setup(betas=(0, 8), steps=5_000))  # (5001, 2, 10)


def test_the_risk_neutral_policy_settles_for_the_local_optimum(curve):
    assert ((curve[-1, 0] - 0.6).abs() < 0.01).all()


def test_the_risk_seeking_policy_leaves_when_the_docstring_says(curve):
    updates = bandit.updates_until_escape(curve[:, 1])
    middle = updates.quantile(0.5)
    row = f"10/10   {middle:,.0f} ({updates.min():,.0f} to {updates.max():,.0f})\n"
    assert row in bandit.__doc__


def test_a_run_of_the_bandit_does_not_depend_on_which_others_run_beside_it(curve):
    setup = bandit.Setup(betas=(8, 8), seeds=2, steps=300, seed=1)
    for few in bandit.run(setup).unbind(1):
        torch.testing.assert_close(few, curve[:301, 1, 1:3], rtol=1e-12, atol=0)


def test_every_seed_of_the_bandit_has_random_numbers_of_its_own(curve):
    assert len(curve[100, 1].unique()) == 10


def test_an_escape_is_the_first_update_at_which_the_expected_reward_is_high():
    curve = torch.tensor([[0.4, 0.4, 0.8], [0.8, 0.7, 0.1], [0.3, 0.7, 0.9]])
    assert bandit.updates_until_escape(curve).tolist() == [1, math.inf, 0]


def test_the_table_of_the_bandit_gives_means_deviations_and_medians(capsys):
    curve = torch.tensor([[[0.3, 0.3]], [[0.9, 0.3]]])  # (T+1, B, S)
    bandit.print_table(bandit.Setup(betas=(8,), seeds=2), curve)
    row = capsys.readouterr().out.splitlines()[1]
    assert row.split() == "8 0.600 ± 0.300 1/2 inf (1 to inf)".split()


BAD = """--steps 0;--steps 2.5;--steps 10000000000;--seeds 0;--seeds nan;--batch 1;--lr 0;--lr nan
--lr inf;--seed -1;--seed 1000000000000;--betas;--betas nan;--betas 2 inf;--betas two;--betas -1001
--animate --betas 8;--animate --steps 0;--bogus;extra;--out FILE;--out FILE/x""".replace("\n", ";")


@parametrize("bad", BAD.split(";"))
def test_a_bad_option_of_the_bandit_ends_in_one_sentence_and_status_2(bad, tmp_path, capsys):
    options = f"--out {tmp_path / 'new'} {bad}".replace("FILE", bandit.__file__)
    with pytest.raises(SystemExit, match="^2$"):
        bandit.main(options.split())
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch("bandit.py: .{20,}\n", err)
    assert not list(tmp_path.iterdir())


def test_the_bandit_prints_its_table_and_draws_its_picture_into_a_new_folder(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    bandit.main(f"--steps 40 --seeds 2 --betas 8 0 -1 --out {out}".split())
    printed = capsys.readouterr().out
    assert printed.count("0/2   never\n") == 3
    assert printed.endswith(f"drew {out / 'bandit.png'}\n")
    assert (out / "bandit.png").read_bytes().startswith(b"\x89PNG")


LAST = bandit.Setup(betas=(8,), seeds=1, steps=3)  # the right panel of the animation


@pytest.fixture(scope="module")
def animation(tmp_path_factory):
    """The file, and the right panel as the last frame shows it."""
    out = tmp_path_factory.mktemp("animation")
    bandit.main(f"--animate --steps 3 --seeds 2 --out {out}".split())
    return out / "bandit.gif", bandit.plt.gcf().axes[1]


def test_the_animation_is_a_small_gif_of_some_frames_that_loops_for_ever(animation):
    gif, _ = animation
    image = Image.open(gif)
    assert (image.format, image.width) == ("GIF", 800)
    assert image.n_frames == 4
    assert image.info["loop"] == 0  # for ever
    assert gif.stat().st_size < 1_000_000


def test_the_animation_says_how_many_pulls_were_made_and_what_they_pay(animation):
    _, panel = animation
    reward = bandit.run(LAST)[-1].item()
    assert panel.get_title() == f"β = 8 after 48 pulls\nexpected reward {reward:.2f}"


def test_each_bar_of_the_animation_is_the_probability_of_five_arms(animation):
    _, panel = animation
    bars = panel.patches[0].get_data().values
    *_, probs = bandit.learn(LAST)
    assert bars[8] == pytest.approx(probs[0, 38:43].sum().item())
    assert bars.sum() == pytest.approx(1)


def test_the_bandit_runs_without_a_display_and_without_transformers(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    code = "import sys; sys.modules['transformers'] = None; from bandit import main; main()"
    done = python("-c", code, "--steps", "3", "--seeds", "1", "--out", tmp_path)
    assert done.returncode == 0 and (tmp_path / "bandit.png").exists(), done.stderr
