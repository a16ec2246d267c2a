"""The specification of rs_grpo.py and bandit.py, as sentences: `python -m pytest -v` prints it.
`DEVICE=cuda python -m pytest -q test_rs_grpo.py` runs the models on a GPU."""

import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
import timeit
from collections import Counter, deque
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
from torch.nn.utils import parameters_to_vector
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

import bandit
import rs_grpo
from rs_grpo import ADVANTAGES, TASKS, Config, Rollouts, Task, main, risk_sensitive_advantage, train

ROOT = Path(__file__).resolve().parent
DEVICE = os.environ.get("DEVICE", "cpu")  # of every model
PROMPTS = ["1,2,3,4=5:", "10,11,12,13=48:", "1,10,11,12=9:"]  # of three lengths
parametrize = pytest.mark.parametrize
on_a_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="a claim about CPUs")
torch.set_num_threads(1)  # models this small gain nothing from a second thread
os.environ["OMP_NUM_THREADS"] = "1"  # nor do those of the processes started here


def seeded(seed=0, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


# --- Advantages -----------------------------------------------------------------------------------
BETAS = list(map(float, "-1e3 -8 -.5 -1e-8 -3e-9 0 1e-9 1e-8 1e-7 1e-5 1e-3 2 8 64 1e3".split()))
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


def estimate(name, rewards, beta=2.0):
    return ADVANTAGES[name](rewards, Config(beta=beta))


@parametrize("name, beta, cells", WORKED)
def test_an_advantage_has_the_values_worked_out_by_hand(name, beta, cells):
    for correct, cell in zip((1, 4, 8, 15), cells.split()):
        advantages = estimate(name, group(correct), beta)
        expected = [float(number) for number in cell.split("/")]
        assert advantages[0, [0, -1]].tolist() == pytest.approx(expected, abs=6e-4)


@parametrize("beta", BETAS)
def test_the_risk_sensitive_advantage_equals_its_definition_in_60_digits(beta):
    """Up to what float64 keeps: exp(βr) has 16 digits, and dividing by β makes their end larger."""
    getcontext().prec = 60
    getcontext().Emin, getcontext().Emax = -(10**9), 10**9
    rewards = [[0.0, 0.0, 1.0, 1.0], [0.37, -2.5, 0.1, 3.0], [1e-3, 0.0, 2e-3, 5.0]]
    ours = risk_sensitive_advantage(torch.tensor(rewards, dtype=torch.float64), beta)
    b = Decimal(beta) or Decimal("1e-25")  # β = 0 is the limit
    tolerance = max(1e-15, 1e-15 / abs(beta)) if abs(beta) >= 1e-8 else 1e-7
    for row, advantages in zip(rewards, ours.tolist()):
        weights = [(b * Decimal(r)).exp() for r in row]
        mean = sum(weights) / len(row)
        exact = [float((weight / mean - 1) / b) for weight in weights]
        assert advantages == pytest.approx(exact, rel=1e-12, abs=tolerance)


@parametrize("name, beta", [("grpo", 0), *[("rs", beta) for beta in BETAS]])
def test_a_group_of_equal_rewards_has_an_advantage_of_exactly_zero(name, beta):
    for samples in range(1, 65):
        for reward in (0.0, 1.0, 0.37, 1 / 3, -7.1):
            for dtype in (torch.float32, torch.float64):
                rewards = torch.full((2, samples), reward, dtype=dtype)
                assert not estimate(name, rewards, beta).any()


@each_advantage
def test_every_row_is_a_group_of_its_own(name):
    rewards = torch.rand(5, 8, generator=seeded())
    alone = [estimate(name, row[None]) for row in rewards]
    assert_close(estimate(name, rewards), torch.cat(alone))


@parametrize("beta", [-4.0, 0.5, 2.0, 8.0])
def test_theorem_1_is_the_gradient_of_the_objective(beta):
    """E[A ∇log π] against the derivative of J. A group that holds each outcome as often as its
    probability says makes the group's mean an exact expectation."""
    counts = torch.tensor([1, 80, 19, 40, 60])  # of 200
    outcomes = torch.arange(5).repeat_interleave(counts)
    rewards = torch.tensor([1.0, 0.6, 0.0, 0.3, -0.5], dtype=torch.float64)
    probs = counts.double() / 200
    theta = probs.log().requires_grad_()
    expectation = (theta.softmax(0) * (beta * rewards).exp()).sum()
    (expectation.log() / beta).backward()
    advantages = risk_sensitive_advantage(rewards[outcomes][None], beta)[0]  # (200,)
    grad_log_pi = torch.eye(5, dtype=torch.float64)[outcomes] - probs  # (200, 5)
    assert_close((advantages[:, None] * grad_log_pi).mean(0), theta.grad)


@each_advantage
@parametrize("dtype", [torch.float16, torch.float32, torch.int64])
def test_advantages_have_the_dtype_and_the_device_of_the_rewards(name, dtype):
    rewards = group(3).to(DEVICE, dtype)
    advantages = estimate(name, rewards)
    assert advantages.device == rewards.device
    assert advantages.dtype == (dtype if dtype.is_floating_point else torch.float32)


NOT_FINITE = [(group(1), math.inf), (group(1), math.nan), (group(1) / 0, 2)]


@parametrize("rewards, beta", [(torch.zeros(4), 2), (group(1, 2), torch.ones(2)), *NOT_FINITE])
def test_what_has_no_advantage_is_refused(rewards, beta):
    with pytest.raises(ValueError, match="must be"):
        risk_sensitive_advantage(rewards, beta)


# --- The task -------------------------------------------------------------------------------------
EXACT = {"+": add, "-": sub, "*": mul, "/": truediv}
BINDS = {"+": 1, "-": 1, "*": 2, "/": 2}
ANSWER = (4, 7, 9, 12), 48
IN_WORDS = "Numbers: {}, {}, {}. Target: {}. Answer:"


def reward_of(completion, numbers, target):
    (reward,) = rs_grpo.countdown_rewards([completion], [(numbers, target)])
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


@parametrize("numbers, target", [ANSWER, ((3, 3, 8, 8), 24)])
def test_value_and_reward_agree_with_the_enumeration_of_all_expressions(numbers, target):
    judged = list(expressions(numbers))
    assert len(judged) == 9216
    assert target in [value for _, value in judged]
    for text, value in judged:
        for shown in (text, f"  {text[1:-1]}\nNumbers: 1"):
            assert rs_grpo.countdown_value(shown, numbers) == value
            assert reward_of(shown, numbers, target) == float(value == target)


def judged_by_descent(text, numbers, target):
    """Recursive descent by how tightly operators bind, another route than Python's parser."""
    line = text.split("\n")[0].strip()
    tokens = deque(re.findall(r"[0-9]+|[^0-9 ]", line))
    used = [token for token in tokens if token.isdecimal()]

    def parse(least=1):
        token = tokens.popleft()
        value = parse() if token == "(" else Fraction(int(token))
        if token == "(" and tokens.popleft() != ")":
            raise ValueError
        while tokens and BINDS.get(tokens[0], 0) >= least:
            symbol = tokens.popleft()
            value = EXACT[symbol](value, parse(BINDS[symbol] + 1))
        return value

    try:
        value = parse()
    except (IndexError, ValueError, ZeroDivisionError):
        return 0.0
    asked = not tokens and len(line) <= 100 and set(line) <= set("0123456789+-*/() ")
    return float(asked and sorted(used) == sorted(map(str, numbers)) and value == target)


def test_ten_thousand_mutilated_answers_are_judged_as_an_independent_parser_would():
    rng = random.Random(0)
    dirt = [*"0123456789+-*/() .,=e_\n", "**", "//", "٣", "((", "))"]
    right = 0
    for i in range(10_000):
        if i % 100 == 0:
            numbers = [rng.randint(1, 13) for _ in range(3)]
            whole = [pair for pair in expressions(numbers) if pair[1] is not None]
        text, target = rng.choice(whole)
        for _ in range(rng.randint(0, 2)):
            place = rng.randrange(len(text) + 1)
            rest = text[place + rng.randint(0, 1) :]
            text = text[:place] + rng.choice(dirt) + rest
        expected = judged_by_descent(text, numbers, target)
        assert reward_of(text, numbers, target) == expected
        right += expected
    assert 3000 < right < 7000  # the oracle saw both sides


HOSTILE = """() ( ) 4 + 4,7,9,12=48: 4,7,9,12=48:(9-7)*(12+12) (12-4)*(9-7)*3 7**9 4//7
12*4*(9-7)/2 -4+7+9+12 +(4) --4 4-+7 ~4 4%7 9**9**9**9 1e9 0x4 4.0+7 4_0 04+7 ٤+٧ 4+７ ² 4×12
４*１２*(９-７)/2 4*(9-7)+12=20 48 =48 1/0 (7-7)/(9-9) 12/(4-4)+7+9 4+7;9+12 __import__('os') \x00
4\x0012 <eos>4 <pad>12*4 None nan inf (4)(12) 4(12) ()4*12 4*12) (4*12 9-7*( 12*4+0*(9-7) \ud800 🙂
(4+7-7)*12*9/9 4*12**(9-7) 4*12//(9-7) 7-9+12*4+2 eval('48')""".split()
HOSTILE += " |4- -7|4 7 9 12|4+7 9+12|4+7 or 9|12*4 = 48|4+7\n9+12|".split("|")
HOSTILE += [part * 10**6 for part in ("(", "9", "a", "4+", "\n", " ", "٤")]
HOSTILE += ["(" * 49 + "4" + ")" * 49, "1/" * 49 + "1", "-" * 98 + "4", "4" + "**9" * 33]


@parametrize("zeros, value", [(49, 4), (50, None)])
def test_a_line_has_at_most_100_characters(zeros, value):
    assert rs_grpo.countdown_value("4" + "+0" * zeros, [4] + [0] * zeros) == value


def test_a_hostile_completion_has_no_value_raises_nothing_and_costs_nothing():
    for text in HOSTILE:
        assert rs_grpo.countdown_value(text, ANSWER[0]) is None
        judge = partial(rs_grpo.countdown_value, text, re.findall("[0-9]+", text))
        assert min(timeit.repeat(judge, number=1)) < 5e-3


@parametrize("name, size, rest", [("countdown", 10_000, 2_000), ("countdown-text", 4_000, 500)])
def test_held_out_problems_are_never_trained_on(name, size, rest):
    task = TASKS[name](Config(eval_problems=10**6))
    assert len(task.train) == size
    assert len(task.held_out) == rest
    assert len({question for question, _ in task.train + task.held_out}) == size + rest


@parametrize("name, form, every", [("", "{},{},{},{}={}:", 900), ("-text", IN_WORDS, 9)])
def test_a_question_states_its_problem_which_has_a_solution(name, form, every):
    for question, (numbers, target) in TASKS["countdown" + name](Config()).train[::every]:
        assert question == form.format(*numbers, target)
        assert numbers == sorted(numbers)  # so that another order is no other problem
        assert target in [value for _, value in expressions(numbers)]


# --- Models of some thousand weights --------------------------------------------------------------
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, head_dim=8, initializer_range=0.15, bos_token_id=None)


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
    """It reads questions in words; Ċ in two of its tokens is a line break."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set(rs_grpo.EXAMPLES + "0123456789+-*/()=") - {" ", "\n"})
    tokens = ["<eos>", "Ċ", ")Ċ", "Ġ", *letters]
    ids = dict(zip(tokens, itertools.count()))
    words = Tokenizer(models.BPE(ids, [(")", "Ċ")]))
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
    return load(models[kind], "countdown-text" if kind == "wordy" else "countdown")[0]


each_kind = parametrize("policy", ["tiny", "absolute", "wordy"], indirect=True)


@pytest.fixture
def spy(monkeypatch):
    """At each call of a function, or at one as in "sample 2", note its arguments or raise."""

    def watch(moment, note, module=rs_grpo):
        name, _, call = moment.partition(" ")
        original = getattr(module, name)
        count = itertools.count(1)

        def watched(*args, **kwargs):
            if str(next(count)) == call or not call:
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
    drawn, entropy = rs_grpo.sample(policy, rows, samples, max_tokens, temperature, generator)
    owners = [row for row in rows for _ in range(samples)]
    return Rollouts(prompts, owners, drawn, [], torch.zeros(len(rows), samples), entropy)


def pairs(rollouts):
    """(prompt, completion) of every sample."""
    return list(zip(rollouts.prompts, rollouts.completions))


def shapes_run(policy):
    """A list to which each forward pass adds how many rows and tokens it runs."""
    shapes = []
    base = policy.model.base_model
    base.register_forward_hook(lambda model, args, output: shapes.append(output[0].shape[:2]))
    return shapes


def plain_logits(policy, tokens):
    """The logits after each token, (T, V), from one forward pass: no cache, padding or batch."""
    return policy.model(torch.tensor([tokens], device=policy.model.device)).logits[0]


def plain_logprobs(policy, prompt, completion, temperature):
    """log π of each completion token, (T,)."""
    logits = plain_logits(policy, prompt + completion)[len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)[range(len(completion)), completion]


# --- Sampling -------------------------------------------------------------------------------------
def plain_samples(policy, prompts, n, max_tokens, temperature, generator):
    """As `sample`, but samples are listed one by one, and rows are run whole, without a cache.
    Returns (index of the prompt, completion) of all samples, and how many rows each round runs."""
    going = [(i, ()) for i in range(len(prompts)) for _ in range(n)]
    ended, rounds = [], []
    while going:
        counts = Counter(going)  # samples of a prompt that are equal so far share a row
        rows = [prompts[i] + tokens for i, tokens in counts]
        rounds.append(len(rows))
        logits = torch.stack([plain_logits(policy, row)[-1] for row in rows])
        probs = (logits / temperature).softmax(-1)
        draws = probs.multinomial(max(counts.values()), True, generator=generator).tolist()
        going = []
        for (i, tokens), drawn in zip(counts, draws):
            for token in drawn[: counts[i, tokens]]:
                ends = token in policy.stop_ids or len(tokens) + 1 == max_tokens
                (ended if ends else going).append((i, (*tokens, token)))
    return ended, rounds


@each_kind
@parametrize("max_tokens, every", [(6, 20), (500, 4)])  # some are cut off; all come to an end
@torch.no_grad()
def test_samples_are_those_that_plain_forward_passes_draw(policy, max_tokens, every):
    policy = policy._replace(stop_ids=set(range(0, len(policy.tokenizer), every)))
    shapes = shapes_run(policy)
    rollouts = draw(policy, 8, max_tokens, 0.9, [*PROMPTS, PROMPTS[0]])  # equal ones stay apart
    prompts = rollouts.prompts[::8]
    plain, rounds = plain_samples(policy, prompts, 8, max_tokens, 0.9, seeded(device=DEVICE))
    ours = [(i // 8, completion) for i, completion in enumerate(rollouts.completions)]
    assert sorted(ours) == sorted(plain)
    assert shapes[0] == (4, max(map(len, prompts)))  # prompts are run once, then token by token
    assert shapes[1 : len(rounds)] == [(rows, 1) for rows in rounds[1:]]


def test_the_entropy_is_estimated_by_the_mean_surprise_of_the_drawn_tokens(tiny):
    policy, task, config = load(tiny, temperature=0.8)
    rollouts = rs_grpo.roll_out(policy, task, task.train[:3], 8, config, seeded(device=DEVICE))
    logprobs = [plain_logprobs(policy, *pair, 0.8) for pair in pairs(rollouts)]
    surprise = -torch.cat(logprobs).mean().item()
    assert rollouts.entropy == pytest.approx(surprise, rel=1e-4)


def test_every_eos_of_the_generation_config_ends_a_completion(tmp_path, policy):
    eos = policy.tokenizer.eos_token_id
    policy.model.generation_config.eos_token_id = [eos, 7]
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    assert load(str(tmp_path))[0].stop_ids == {eos, 7}


def test_infinite_logits_are_refused_with_advice(policy):
    policy.model.lm_head.weight.data[7].fill_(math.inf)
    with pytest.raises(rs_grpo.BadInput, match="infinite logits.* --lr"):
        draw(policy)


def test_the_reward_reads_a_line_without_eos_and_with_all_of_its_last_token(models, monkeypatch):
    policy, task, config = load(models["wordy"], "countdown-text")
    texts = [" 2 * (3 + 5)\n", "2*(3+5)", "2*(3+5", " 2 * 3 + 5\n"]
    rows = [tuple(row) for row in policy.tokenizer(texts).input_ids]
    assert policy.stop_ids == {0, 1, rows[0][-1]} == {0, 1, 2}  # EOS, a line break, one after `)`
    rows[1] += (policy.tokenizer.eos_token_id,)
    monkeypatch.setattr(rs_grpo, "sample", lambda *args: (rows, 0.0))
    problem = ("Numbers: 2, 3, 5. Target: 16. Answer:", ([2, 3, 5], 16))
    rollouts = rs_grpo.roll_out(policy, task, [problem], 4, config, None)
    assert rollouts.rewards.tolist() == [[1, 1, 0, 0]]


# --- Learning -------------------------------------------------------------------------------------
def weights_of(policy):
    return parameters_to_vector(policy.model.parameters()).detach()


def gradient(policy):
    """The gradient of all parameters, flat, which is then forgotten."""
    gradients = parameters_to_vector(weight.grad for weight in policy.model.parameters())
    policy.model.zero_grad()
    return gradients.cpu().double()


def assert_plain_gradient(policy, rollouts, advantages, temperature=1.0):
    """The gradient is that of the loss as it is defined, row by row: no prompt is shared, no group
    skipped, every token counted, an EOS and a line break too."""
    ours = gradient(policy)
    tokens = sum(map(len, rollouts.completions))
    for advantage, pair in zip(advantages.flatten().tolist(), pairs(rollouts)):
        loss = -advantage * plain_logprobs(policy, *pair, temperature).sum() / tokens
        loss.backward()
    reference = gradient(policy)
    assert (ours - reference).norm() < 1e-4 * reference.norm()


@each_kind
@parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_log_probabilities_equal_those_of_one_plain_forward_pass(policy, temperature):
    rollouts = draw(policy, temperature=temperature)
    longest = max(map(len, rollouts.completions))
    shapes = shapes_run(policy)
    ours = rs_grpo.completion_logprobs(policy, *rollouts[1:3], temperature)
    assert ours.shape == (24, longest)
    assert shapes == [(3, max(map(len, rollouts.prompts))), (24, longest - 1)]  # prompts once
    for line, (prompt, completion) in zip(ours, pairs(rollouts)):
        plain = plain_logprobs(policy, prompt, completion, temperature)
        assert_close(line[: len(completion)], plain, rtol=0, atol=1e-4)
        assert not line[len(completion) :].any()


@each_kind
@parametrize("micro_tokens", [300, 10**9])
def test_the_gradient_is_that_of_a_plain_loss_however_the_batch_is_cut(policy, micro_tokens):
    rollouts = draw(policy, temperature=0.7)
    rollouts.completions[:2] = [(3, policy.tokenizer.eos_token_id)] * 2  # equal, and ended by EOS
    advantages = torch.randn(3, 8, generator=seeded())
    advantages[1] = 0
    config = Config(micro_tokens=micro_tokens, temperature=0.7)
    rs_grpo.policy_gradient(policy, rollouts, advantages, config)
    assert_plain_gradient(policy, rollouts, advantages, 0.7)


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
    assert all(torch.equal(gradients[0], other) for other in gradients)


@parametrize("micro_tokens, size", [(33, 3), (22, 2), (5, 1)])
def test_a_micro_batch_holds_different_completions_of_like_lengths(micro_tokens, size):
    completions = [tuple(range(int(length))) for length in "312865344"]
    rollouts = Rollouts([], [(1, 2, 3)] * 9, completions, [], None, 0.0)  # at most 11 tokens
    advantages = torch.ones(1, 9)
    advantages[0, 8] = -1
    batches = rs_grpo.micro_batches(rollouts, advantages, micro_tokens)
    assert {len(weights) for _, _, weights in batches} == {size}
    lengths = [len(row) for _, part, _ in batches for row in part]
    assert lengths == [1, 2, 3, 5, 6, 8]  # those of 4 are equal, and their sum is 0


@parametrize("step", [1, 9, 99])
@parametrize("scale", [1000.0, 0.1])
def test_a_step_is_clipped_to_norm_1_and_warmed_up_over_ten(policy, step, scale):
    before = weights_of(policy)
    optimizer = torch.optim.SGD(policy.model.parameters())
    advantages = torch.full((3, 8), scale)
    norm = rs_grpo.update(policy, optimizer, draw(policy), advantages, Config(lr=0.5), step)
    moved = (weights_of(policy) - before).norm()
    assert (norm > 1) == (scale > 1)
    assert moved.item() == pytest.approx(0.5 * min(step / 10, 1) * min(norm, 1), rel=1e-3)


@parametrize("bad", [math.inf, math.nan])
def test_an_update_that_is_not_finite_changes_no_weight_and_is_forgotten(policy, bad):
    before = weights_of(policy)
    optimizer = torch.optim.AdamW(policy.model.parameters())
    rs_grpo.policy_gradient(policy, draw(policy), torch.ones(3, 8), Config())
    next(policy.model.parameters()).grad[0, 0] = bad
    assert not math.isfinite(rs_grpo.apply_gradient(policy, optimizer, Config(), 10))
    assert torch.equal(weights_of(policy), before)
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def test_of_a_large_vocabulary_a_part_of_the_logits_is_there_at_a_time(policy):
    policy = policy._replace(stop_ids=set())
    rollouts = draw(policy, 2, 50, prompts=PROMPTS[:1])
    policy.model.resize_token_embeddings(400_000, mean_resizing=False)
    parts = []
    hook = policy.model.lm_head.register_forward_hook(lambda *io: parts.append(len(io[2])))
    rs_grpo.policy_gradient(policy, rollouts, torch.ones(1, 2), Config())
    hook.remove()
    assert max(parts) * 400_000 <= 2**25
    assert sum(parts) == 2 * rollouts.tokens  # each is computed again in the backward pass
    assert_plain_gradient(policy, rollouts, torch.ones(1, 2))


# --- Precision, and where tensors lie -------------------------------------------------------------
PRECISIONS = {"float32": 5e-6, "float16": 5e-4, "bfloat16": 2e-3}  # bounds of the mean |Δ log π|
each_precision = parametrize("precision", PRECISIONS)


@each_precision
@torch.no_grad()
def test_sampler_and_learner_agree(precision):
    """Mean |Δ log π| of a token between sampler and learner is .004 in float16 and .029 in bfloat16
    on a pretrained model of 135 M parameters; on the embedded one some .0002 and .0007."""
    policy, task, config = load("countdown-base", precision=precision)
    parts = []  # logits (R, V) of each round: a row for every sample that goes on
    head = policy.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda model, args, output: parts.append(output))
    rollouts = rs_grpo.roll_out(policy, task, task.train[:30], 1, config, seeded(device=DEVICE))
    hook.remove()
    with policy.autocast():
        learned = rs_grpo.completion_logprobs(policy, *rollouts[1:3], 1.0)  # (B, T)
    gaps = []
    for t, logits in enumerate(parts):
        assert logits.dtype == getattr(torch, precision)
        going = [i for i, row in enumerate(rollouts.completions) if len(row) > t]
        tokens = [rollouts.completions[i][t] for i in going]
        sampled = logits.float().log_softmax(-1)[range(len(going)), tokens]
        gaps.append((sampled - learned[going, t]).abs())
    gaps = torch.cat(gaps)
    assert len(gaps) == rollouts.tokens
    assert gaps.mean() < PRECISIONS[precision]
    assert {weight.dtype for weight in policy.model.parameters()} == {torch.float32}


@parametrize("scale, precision", [(1, "float16"), (1e6, "bfloat16")])
def test_half_precision_is_float16_unless_its_logits_overflow(tiny, scale, precision):
    model = load(tiny)[0].model
    model.get_output_embeddings().weight.data *= scale
    assert rs_grpo.half_precision(model, torch.tensor([[1, 2]], device=DEVICE)) == precision


@each_precision
def test_the_gradient_is_that_of_float32_and_does_not_underflow(precision, monkeypatch):
    monkeypatch.setattr(Rollouts, "tokens", 10**8)  # as if the batch were as large
    plain, _, _ = load("countdown-base")
    policy, _, _ = load("countdown-base", precision=precision)
    rollouts = draw(plain)
    advantages = torch.randn(3, 8, generator=seeded())
    rs_grpo.policy_gradient(plain, rollouts, advantages, Config())
    rs_grpo.policy_gradient(policy, rollouts, advantages, Config())
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
    """What is sampled and evaluated, and the norms of two gradients."""
    task = task._replace(judge=lambda texts, answers: [len(text) > 9 for text in texts])
    rollouts = rs_grpo.roll_out(policy, task, task.train[:5], 4, config, seeded())
    advantages = risk_sensitive_advantage(rollouts.rewards, 2.0)
    optimizer = torch.optim.AdamW(policy.model.parameters())
    norms = [rs_grpo.update(policy, optimizer, rollouts, advantages, config, 9) for _ in "12"]
    return rollouts.completions, rs_grpo.evaluate(policy, task, config), norms


@on_a_cpu
def test_nothing_mixes_devices_in_sampling_learning_and_evaluating(tiny, monkeypatch):
    settings = dict(eval_problems=3, eval_samples=4, micro_tokens=100)
    completions, results, norms = everything(*load(tiny, **settings))
    policy, task, config = load(tiny, **settings)
    with OtherDevice(monkeypatch):
        policy.model._apply(Elsewhere)
        there = everything(policy, task, config)
        with pytest.raises(RuntimeError, match="mixes devices"):
            next(policy.model.parameters())[torch.arange(2)]
    assert there[:2] == (completions, results)
    assert there[2] == pytest.approx(norms, rel=1e-4)
    assert min(norms) > 0


# --- pass@k ---------------------------------------------------------------------------------------
@parametrize("n", range(1, 9))
def test_pass_at_k_is_the_share_of_subsets_with_a_success(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = itertools.combinations([1] * c + [0] * (n - c), k)
        best = [max(subset) for subset in subsets]
        assert rs_grpo.pass_at_k(n, c, k) == pytest.approx(sum(best) / len(best), abs=1e-15)


@parametrize("c", [0, 1, 2, 500, 1023, 1024])
def test_pass_at_k_is_exact_for_a_thousand_samples(c):
    for k in (1, 2, 512, 1024):
        wrong = Fraction(1)  # the chance that all k are, drawn one by one
        for i in range(k):
            wrong *= Fraction(1024 - c - i, 1024 - i)
        assert rs_grpo.pass_at_k(1024, c, k) == pytest.approx(float(1 - wrong), rel=1e-14)


@parametrize("counts", ["4 5 1", "4 -1 1", "4 2 0", "4 2 5", "0 0 1"])
def test_pass_at_k_refuses_other_counts(counts):
    with pytest.raises(ValueError, match="needs 0 <= c <= n"):
        rs_grpo.pass_at_k(*map(int, counts.split()))


def test_an_evaluation_counts_right_and_different_answers_of_each_problem(policy, monkeypatch):
    """Of 4, 3 or 1 or 0 are right: pass@1 is 3/4, 1/4, 0; pass@2 1, 1 − C(3,2)/C(4,2) = 1/2, 0."""
    texts = iter("7+1 7+1 1+7 ( ) 7 ) ) 1 1 1 1".split())
    sizes = []

    def draws(policy, prompts, samples, *rest):
        sizes.append(len(prompts))
        drawn = [next(texts) for _ in range(len(prompts) * samples)]
        return policy.tokenizer(drawn).input_ids, 0.0

    def judge(texts, answers):
        return [1.0 if "7" in text else 0.9 for text in texts]  # which is no solution

    monkeypatch.setattr(rs_grpo, "sample", draws)
    task = TASKS["countdown"](Config(eval_problems=3))._replace(judge=judge)
    result = rs_grpo.evaluate(policy, task, Config(prompts=5, samples=2, eval_samples=4))
    assert sizes == [2, 1]  # no more than the 10 completions of a step
    assert result.pop("pass_at_k") == pytest.approx({1: 100 / 3, 2: 50, 4: 200 / 3})
    assert result == {"n": 4, "correct": [3, 1, 0], "distinct": [2, 1, 0]}


def test_the_embedded_model_is_far_from_hopeless_at_one_try_and_from_certain_at_many():
    policy, task, config = load("countdown-base", eval_problems=32, eval_samples=32, max_tokens=0)
    base = rs_grpo.evaluate(policy, task, config)
    assert 8 < base["pass_at_k"][1] < 30 < base["pass_at_k"][32] < 75


# --- Training -------------------------------------------------------------------------------------
# An estimator of one's own: a random model solves nothing, and this gives it a signal.
ADVANTAGES["graded"] = lambda r, config: torch.linspace(-1, 1, r.shape[1]).expand_as(r)


def settings_of(model, folder, **changes):
    """The settings of a run of some seconds."""
    lr = 1e-2 if DEVICE == "cpu" else 1e-5  # elsewhere a large one would learn from rounding
    settings = dict(model=model, out=str(folder), prompts=4, samples=4, steps=6, max_tokens=6)
    settings |= dict(advantage="graded", lr=lr, eval_problems=3, eval_samples=4, save_every=2)
    return Config(**{**settings, "device": DEVICE, "precision": "float32", **changes})


@pytest.fixture
def small(tiny, tmp_path):
    return partial(settings_of, model=tiny, folder=tmp_path / "run")


def flags(config):
    return [f"--{name.replace('_', '-')}={value}" for name, value in asdict(config).items()]


def metrics(folder):
    """The lines of metrics.jsonl, without times."""
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").open())
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def saved(folder):
    return torch.load(Path(folder) / "checkpoint.pt", map_location="cpu", weights_only=True)


def assert_same(folder, other, results=True):
    """The same metrics, weights, states and results: bit for bit on a CPU, closely on a GPU."""
    tolerance = 0 if DEVICE == "cpu" else 1e-3
    close = partial(assert_close, rtol=tolerance, atol=tolerance)
    close(metrics(folder), metrics(other))
    ours, theirs = saved(folder), saved(other)
    assert ours["state"].pop("results") == theirs["state"].pop("results") or not results
    assert torch.equal(ours.pop("generator"), theirs.pop("generator"))
    close(ours, theirs)


@pytest.fixture(scope="session")
def whole(tiny, tmp_path_factory):
    """The folder of a run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    main(flags(settings_of(tiny, folder)))
    return folder


def written(folder, name):
    return json.loads((Path(folder) / name).read_text())


def test_a_run_leaves_a_folder_that_holds_its_settings_results_metrics_and_picture(whole, tiny):
    names = "checkpoint.pt config.json eval.json metrics.jsonl model passk.png"
    assert sorted(path.name for path in whole.iterdir()) == names.split()
    assert written(whole, "config.json") == asdict(settings_of(tiny, whole))
    results = written(whole, "eval.json")
    assert list(results) == ["0", "6"]
    assert list(results["6"]) == ["n", "correct", "distinct", "pass_at_k"]
    n, correct, distinct, percent = results["6"].values()
    assert list(percent) == ["1", "2", "4"]
    assert (n, len(correct), len(distinct)) == (4, 3, 3)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert list(line) == "step reward grad_norm signal entropy length seconds".split()


def test_the_trained_model_loads_in_transformers(whole):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = AutoModelForCausalLM.from_pretrained(whole / "model").state_dict()
    assert_close(trained, dict(saved(whole)["model"]), rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(whole / "model")("1+1").input_ids


def test_main_returns_settings_and_results_by_step_and_k_as_train_does(small):
    config, results = main(flags(small(steps=1)))
    assert config == small(steps=1)
    assert list(results) == [0, 1]
    assert list(results[1]["pass_at_k"]) == [1, 2, 4]
    assert train(config, resume=True) == results
    assert json.loads(json.dumps(results)) == written(config.out, "eval.json")


def test_the_folder_of_a_run_is_named_after_its_model_advantage_and_seed():
    assert Config().run_folder == Path("runs/countdown-base-rs-2-seed0")
    assert Config(model="of/it", advantage="grpo", seed=3).run_folder == Path("runs/it-grpo-seed3")


def test_a_run_prints_what_it_runs_on_and_pass_at_k_before_and_after(whole, tiny, spy, capsys):
    spy("evaluate", AssertionError("it was done"))
    main(["--resume", "--out", str(whole)])  # nothing is left to do
    first, _, _, *table, last = capsys.readouterr().out.splitlines()
    assert re.search(f"{DEVICE}.*float32.*{tiny}.* 20,000", first)
    percents = [result["pass_at_k"]["4"] for result in written(whole, "eval.json").values()]
    assert table[2].split() == ["pass@4", *[f"{percent:.1f}" for percent in percents]]
    assert str(whole) in last


def test_a_gradient_of_zero_changes_no_weight_as_none_decays(small, tiny):
    def without_gradient(policy, optimizer, rollouts, advantages, config, step):
        for parameter in policy.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return rs_grpo.apply_gradient(policy, optimizer, config, step)

    train(small(steps=1, lr=1.0), update=without_gradient)
    base = load(tiny)[0].model.to("cpu").state_dict()
    assert_close(saved(small().out)["model"], base, rtol=0, atol=0)


@parametrize("prompts", [1, 7, 10, 35, 50])
def test_problems_come_once_an_epoch_in_an_order_set_by_the_seed(monkeypatch, prompts):
    steps = max(1, 35 // prompts)  # an epoch
    seen = []
    rollouts = SimpleNamespace(rewards=torch.zeros(min(prompts, 35), 2))
    monkeypatch.setattr(rs_grpo, "roll_out", lambda *args: seen.extend(args[2]) or rollouts)
    task = Task([("", i) for i in range(35)], [], None, None)

    def epoch(number, seed=0):
        seen.clear()
        for step in range(number * steps, (number + 1) * steps):
            state = SimpleNamespace(step=step)
            rs_grpo.collect(None, task, Config(prompts=prompts, seed=seed), state, None)
        assert len(set(seen)) == len(seen) == min(prompts, 35) * steps
        return list(seen)

    assert epoch(0) == epoch(0) != epoch(1)
    assert epoch(0) != epoch(0, seed=1)


def test_the_metrics_are_those_of_the_batch(small):
    """In step 1 two of four groups have rewards that differ, and in step 2 none."""
    rewards = torch.cat([group(correct, 4) for correct in (0, 1, 2, 4)])
    batches = []

    def collect(policy, task, config, state, generator):
        rollouts, _ = rs_grpo.collect(policy, task, config, state, generator)
        batches.append(rollouts._replace(rewards=rewards * (state.step == 0)))
        return batches[-1], risk_sensitive_advantage(batches[-1].rewards, 2.0)

    train(small(steps=2), collect=collect)
    first, second = metrics(small().out)
    assert first["reward"] == 7 / 16
    assert first["signal"] == 2 / 4
    assert first["length"] == batches[0].tokens / 16
    assert first["entropy"] == batches[0].entropy
    assert first["grad_norm"] > 0
    assert second["reward"] == second["signal"] == second["grad_norm"] == 0


def test_samples_shown_leave_out_the_examples_before_their_prompt(models, small, spy, capsys):
    prompts = []
    spy("sample", lambda policy, rows, *rest: prompts.extend(policy.tokenizer.batch_decode(rows)))
    train(small(model=models["wordy"], steps=1, task="countdown-text"))
    assert all(prompt.startswith(rs_grpo.EXAMPLES + "Numbers: ") for prompt in prompts)
    shown = capsys.readouterr().out
    assert re.search(r"reward 0.00  Numbers: \d+, \d+, \d+. Target: \d+. Answer: '", shown)
    assert "2 * 3 + 5" not in shown


def failing_at(steps, policy, optimizer, rollouts, advantages, config, step):
    """An update whose gradient isn't finite at these steps."""
    rs_grpo.policy_gradient(policy, rollouts, advantages, config)
    if step in steps:
        next(policy.model.parameters()).grad[0] = math.inf
    return rs_grpo.apply_gradient(policy, optimizer, config, step)


def test_two_updates_in_a_row_may_fail_but_three_end_a_run(small):
    update = partial(failing_at, (2, 3, 5, 6, 7))
    with pytest.raises(rs_grpo.BadInput, match="three updates.* --lr"):
        train(small(steps=8), update=update)
    finite = [math.isfinite(line["grad_norm"]) for line in metrics(small().out)]
    assert finite == [True, False, False, True, False, False]


# --- Going on -------------------------------------------------------------------------------------
MOMENTS = "evaluate 1,policy_gradient 2,apply_gradient 4,report 3,save 4,save_checkpoint 5"
MOMENTS += ",evaluate 2,save_checkpoint 7,show 1"


def assert_resumes(small, whole):
    main(["--resume", "--out", small().out])
    assert_same(small().run_folder, whole)


@parametrize("moment", MOMENTS.split(","))
def test_a_run_broken_off_anywhere_resumes_to_the_same_numbers(whole, small, spy, moment):
    def kill(*arguments):
        if moment == "save 4":
            arguments[1].write_bytes(b"half of a checkpoint")
        raise RuntimeError("killed")

    spy(moment, kill, torch if moment == "save 4" else rs_grpo)
    with pytest.raises(RuntimeError, match="killed"):
        main(flags(small()))
    assert_resumes(small, whole)


def test_a_run_killed_at_any_moment_resumes_to_the_same_numbers(whole, small):
    """By SIGKILL, which leaves no time for anything."""
    log = small().run_folder / "metrics.jsonl"
    command = [sys.executable, "-c", "from test_rs_grpo import main; main()", *flags(small())]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.1))
    assert process.poll() is None
    process.kill()
    process.wait()
    assert_resumes(small, whole)


def test_resuming_with_more_steps_equals_a_longer_run(whole, small):
    train(small(steps=4))
    assert list(train(small(), resume=True)) == [0, 4, 6]
    assert_same(small().run_folder, whole, results=False)


def test_on_resumption_some_settings_may_change_and_others_be_given_as_they_were(small):
    train(small(steps=1, max_tokens=0))
    given = "--steps 2 --save-every 1 --micro-tokens 50 --max-tokens 0 --seed 0"
    config, _ = main(["--resume", "--out", small().out, *given.split()])
    assert config == small(steps=2, save_every=1, micro_tokens=50, max_tokens=0)
    assert written(small().out, "config.json") == asdict(config)


@parametrize("changed", ["--beta 3", "--lr 1e-6", "--seed 1", "--eval-samples 8", "--model x"])
def test_no_other_setting_may_change_on_resumption(capsys, whole, changed):
    before = contents(whole)
    message = complaint(capsys, "--resume", "--out", whole, *changed.split())
    assert changed.split()[0] in message
    assert contents(whole) == before


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.*")}


def test_an_existing_run_is_not_overwritten(capsys, whole, tiny):
    before = contents(whole)
    assert "--resume" in complaint(capsys, "--model", tiny, "--out", whole)
    complaint(capsys, "--model", tiny, "--out", whole / "config.json" / "run")
    assert contents(whole) == before


@parametrize("kept", [0, 5000])
def test_a_checkpoint_that_is_not_whole_is_refused(small, kept):
    train(small(steps=0))
    checkpoint = small().run_folder / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:kept])
    with pytest.raises(rs_grpo.BadInput, match="can't be resumed.* --out"):
        train(small(steps=0), resume=True)


@parametrize("damage", ["", "{", '{"beta": 2.0', '{"alpha": 2.0}'])  # the last is another script's
def test_a_damaged_or_a_different_configuration_is_refused(capsys, tmp_path, damage):
    (tmp_path / "config.json").write_text(damage)
    complaint(capsys, "--resume", "--out", tmp_path)


def test_ctrl_c_ends_with_status_130_and_says_how_to_go_on(whole, small, spy, monkeypatch, capsys):
    spy("policy_gradient 4", KeyboardInterrupt())
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "extensions.kl", "--beta", "3"])
    with pytest.raises(SystemExit, match="^130$"):
        main(flags(small()))
    printed = capsys.readouterr().err
    assert printed.endswith(" python -m extensions.kl --beta 3 --resume\n")
    monkeypatch.undo()
    assert_resumes(small, whole)


ON_CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
ON_A_CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
IN_A_STEP = [("roll_out 4", MemoryError(), 2), ("token_logprobs 3", ON_A_CPU, 2)]


def out_of_memory(capsys, *arguments):
    """Run the command line, expect exit status 1 and one sentence, which names what helps."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^1$"):
        main(list(arguments))
    (message,) = re.findall("rs_grpo.py: (out of memory.*\n)$", capsys.readouterr().err)
    for name in "--resume --micro-tokens --prompts --samples --max-tokens --eval-samples".split():
        assert name in message


@parametrize("moment, error, step", [*IN_A_STEP, ("evaluate 2", ON_CUDA, 6)])
def test_out_of_memory_a_run_ends_and_goes_on(whole, small, spy, capsys, moment, error, step):
    spy(moment, error)
    out_of_memory(capsys, *flags(small()))
    assert saved(small().out)["state"]["step"] == step
    assert_resumes(small, whole)


@parametrize("error", [MemoryError(), ON_CUDA])
def test_a_model_or_a_checkpoint_may_be_too_large_for_memory(small, spy, capsys, error, whole):
    from transformers import AutoModelForCausalLM

    spy("load_state_dict", error, torch.optim.Optimizer)
    out_of_memory(capsys, "--resume", "--out", str(whole))
    spy("from_pretrained", error, AutoModelForCausalLM)
    out_of_memory(capsys, *flags(small()))
    assert not small().run_folder.exists()


# --- The command line -----------------------------------------------------------------------------
def complaint(capsys, *arguments, config_class=Config):
    """Run the command line, expect exit status 2 and one sentence; returns it."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^2$"):
        main(list(map(str, arguments)), config_class)
    printed = capsys.readouterr().err
    assert re.fullmatch("(test_)?rs_grpo.py: .{20,}\n", printed), printed
    return printed


BAD_FLAGS = """--prompts -3;--max-tokens -1;--eval-samples 0;--eval-problems 0;--save-every 0
--micro-tokens 0;--beta nan;--beta inf;--beta -inf;--lr nan;--lr inf;--lr -1e-4;--seed -1
--temperature nan;--temperature 0;--steps 1.5;--beta x;--task=;--device tpu9;--device cuda:99
--model ./nowhere;--model=;--no-such-flag 1"""


@parametrize("bad", re.split("[;\n]", BAD_FLAGS))
def test_bad_input_gets_one_sentence_and_exit_status_2_and_leaves_no_folder(capsys, tmp_path, bad):
    message = complaint(capsys, "--out", tmp_path / "run", *bad.split())
    assert bad.split()[0].strip("=") in message
    assert not (tmp_path / "run").exists()


SENTENCES = {
    "--samples 1": "at least 2",
    "--steps -1": "at least 0",
    "--lr 0.0": "above 0",
    "--seed 4611686018427387904": "below 2**62",
    "--advantage cubed": "rs, grpo",
    "--task chess": "countdown, countdown-text",
    "--precision int8": "auto, float32, float16, bfloat16",
}


@parametrize("bad", SENTENCES)
def test_the_sentence_names_the_flag_its_value_and_what_it_must_be(capsys, bad):
    name, value = bad.split()
    message = complaint(capsys, name, value)
    assert f"{name} is {value}" in message
    assert SENTENCES[bad] in message


def test_a_folder_without_a_whole_model_is_refused(capsys, tmp_path, tiny):
    (tmp_path / "none").mkdir()
    for file in Path(tiny).iterdir():
        (tmp_path / "none" / file.name).write_bytes(file.read_bytes()[:100])
    message = complaint(capsys, "--model", tmp_path / "none", "--out", tmp_path / "run")
    assert "can't be loaded" in message


MAMBA = {"state_size": 4, "num_hidden_layers": 1, "conv_kernel": 2, "expand": 1}
NOT_PLAIN = [("mamba", MAMBA, "keys and values"), ("cohere", {"logit_scale": 0.5}, "logits")]


@parametrize("kind, sizes, reason", NOT_PLAIN)
def test_what_is_no_plain_transformer_is_refused(capsys, tmp_path, policy, kind, sizes, reason):
    model = save_model(tmp_path / kind, policy.tokenizer, kind, **sizes)
    message = complaint(capsys, "--model", model, "--out", tmp_path / "run", "--device", DEVICE)
    assert "plain transformer" in message
    assert reason in message
    assert not (tmp_path / "run").exists()


def test_the_embedded_model_cannot_read_words(capsys, tmp_path):
    message = complaint(capsys, "--task", "countdown-text", "--out", tmp_path / "run")
    assert "read the prompts of --task countdown-text" in message


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_importing_is_cheap():
    imported = python("-c", "import sys, rs_grpo; print(*sys.modules)").stdout.split()
    assert "torch" in imported
    assert not {"transformers", "matplotlib", "extensions", "evidence"} & set(imported)


# --- Doors ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Wider(Config):
    twice: bool = rs_grpo.flag(False, "learn from each batch two times")
    share: float = rs_grpo.flag(0.5, "of what is there", above=0)


def test_a_number_without_a_bound_is_an_error_at_once():
    with pytest.raises(TypeError, match="bound"):
        rs_grpo.flag(0.5, "of what is there")


@parametrize("config_class", [Config, Wider])
def test_help_names_every_setting_with_its_text_and_default(capsys, config_class):
    with pytest.raises(SystemExit, match="^0$"):
        main(["--help"], config_class)
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(config_class):
        name = f"--{field.name.replace('_', '-')}"
        about = f"{field.metadata['help']} (default: {field.default!r})"
        assert re.search(f" {name}( [A-Z_]+)? {re.escape(about)}", text)


def test_a_script_can_bound_its_flags(capsys):
    message = complaint(capsys, "--share", "0", config_class=Wider)
    assert message.startswith("test_rs_grpo.py: --share is 0.0")
    assert "above 0" in message


def test_a_script_can_add_flags_and_pass_in_what_a_step_does(small):
    calls = []

    def collect(policy, task, config, state, generator):
        calls.append(config)
        state.calls = getattr(state, "calls", torch.zeros(1)) + 1
        return rs_grpo.collect(policy, task, config, state, generator)

    def update(policy, optimizer, rollouts, advantages, config, step):
        calls.append(step)
        return rs_grpo.update(policy, optimizer, rollouts, advantages, config, step)

    main([*flags(small(steps=1)), "--twice", "--share", "0.25"], Wider, collect, update)
    main(["--resume", "--out", small().out, "--steps", "2"], Wider, collect, update)
    expected = Wider(**asdict(small(steps=1)), twice=True, share=0.25)
    assert calls == [expected, 1, replace(expected, steps=2), 2]
    assert saved(small().out)["state"]["calls"] == 2  # which went through a checkpoint


def test_a_task_brings_its_own_prompts_judge_length_and_stop(small, monkeypatch, spy):
    """Each question is read as `=`, and an answer ends with 7."""

    def encode(tokenizer, questions):
        return tokenizer(["="] * len(questions)).input_ids

    def judge(texts, answers):
        return [len(text) + answer for text, answer in zip(texts, answers)]

    problems = [("first", 50), ("second", 30)]
    task = Task(problems, [("third", 30)], encode, judge, max_tokens=9, stop="7")
    monkeypatch.setitem(TASKS, "mine", lambda config: task)
    learned = []
    spy("policy_gradient", lambda *args: learned.extend(args[:2]))
    train(small(steps=1, task="mine", prompts=2, samples=64, max_tokens=0))
    policy, rollouts = learned
    equals, seven = policy.tokenizer("=7").input_ids
    assert rollouts.prompts == [(equals,)] * 128
    ends = {row[-1] for row in rollouts.completions if len(row) < 9}
    assert ends == policy.stop_ids == {policy.tokenizer.eos_token_id, seven}
    assert max(map(len, rollouts.completions)) == 9
    answers = [dict(problems)[question] for question in rollouts.questions for _ in range(64)]
    assert rollouts.rewards.flatten().tolist() == judge(rollouts.texts, answers)


# --- The bandit -----------------------------------------------------------------------------------
PROBS = torch.tensor([0.01, 0.80, 0.19], dtype=torch.float64)  # settled for the second-best arm
PAYS = torch.tensor([1.0, 0.6, 0.0], dtype=torch.float64)


def expected_update(beta, n):
    """The expectation of the estimator: every group of n pulls, weighted by its probability."""
    groups = list(itertools.product(range(3), repeat=n))
    arms = torch.tensor(groups)  # (3^n, n)
    weights = PROBS[arms].prod(1, keepdim=True)
    advantages = risk_sensitive_advantage(PAYS[arms], beta)
    shares = weights * advantages / n
    return arms.flatten().bincount(shares.flatten())


@parametrize("n", [2, 3, 8])
def test_with_beta_0_a_group_of_n_scales_the_gradient_by_1_minus_1_over_n(n):
    exact = PROBS * (PAYS - PROBS @ PAYS)
    assert_close(expected_update(0, n), (1 - 1 / n) * exact)


@parametrize("beta", [2, 8])
def test_the_larger_the_group_the_closer_its_expected_gradient_is_to_theorem_1(beta):
    weights = torch.exp(beta * PAYS)
    exact = PROBS * (weights / (PROBS @ weights) - 1) / beta  # π_j A_j
    errors = [(expected_update(beta, n) - exact).norm() for n in (2, 4, 8)]
    assert errors == sorted(errors, reverse=True)


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
    assert_close(probs[0], start.softmax(0))
    below = probs[0].cumsum(0) < uniforms[:, None]  # (N, K)
    arms = below.sum(1)  # the inverse of the distribution function, by counting
    advantages = risk_sensitive_advantage(rewards[arms][None], beta)
    theta = start.clone().requires_grad_()
    logprobs = theta.log_softmax(0)[arms]
    (advantages * logprobs).mean().backward()
    assert_close(logits[0], start + 0.1 * theta.grad)


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


def test_a_run_of_the_bandit_depends_on_its_seed_and_not_on_which_others_run_beside_it(curve):
    setup = bandit.Setup(betas=(8, 8), seeds=2, steps=300, seed=1)
    for few in bandit.run(setup).unbind(1):
        assert_close(few, curve[:301, 1, 1:3], rtol=1e-12, atol=0)
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


def test_the_bandit_needs_no_display_and_no_transformers(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    code = "import sys; sys.modules['transformers'] = None; from bandit import main; main()"
    out = tmp_path / "new" / "folder"
    done = python("-c", code, *f"--steps 40 --seeds 2 --betas 8 0 -1 --out {out}".split())
    assert done.stdout.count("0/2   never\n") == 3
    assert done.stdout.endswith(f"drew {out / 'bandit.png'}\n")
    assert (out / "bandit.png").read_bytes().startswith(b"\x89PNG")


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


def test_the_animation_ends_with_the_policy_that_was_learned(animation):
    _, panel = animation
    setup = bandit.Setup(betas=(8,), seeds=1, steps=3)
    *_, probs = bandit.learn(setup)
    bars = panel.patches[0].get_data().values  # each of five arms
    assert bars[8] == pytest.approx(probs[0, 38:43].sum().item())
    assert bars.sum() == pytest.approx(1)
    reward = bandit.run(setup)[-1].item()
    assert panel.get_title() == f"β = 8 after 48 pulls\nexpected reward {reward:.2f}"
