"""The specification of rs_grpo.py and bandit.py, as sentences: `pytest -v` prints it."""

import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, fields, replace
from decimal import Decimal, getcontext
from fractions import Fraction
from functools import partial
from operator import add, mul, sub, truediv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

import bandit
import rs_grpo
from rs_grpo import ADVANTAGES, TASKS, Config, Rollouts, Task, main, risk_sensitive_advantage, train

ROOT = Path(__file__).resolve().parent
PROMPTS = ["1,2,3,4=5:", "10,11,12,13=48:", "1,10,11,12=9:"]  # of three lengths
parametrize = pytest.mark.parametrize
torch.set_num_threads(1)  # models this small gain nothing from a second thread
os.environ["OMP_NUM_THREADS"] = "1"  # nor do those of the processes started here


# --- Advantages -----------------------------------------------------------------------------------
def group(correct, samples=16):
    """Binary rewards (1, N) of which the first `correct` are 1."""
    return (torch.arange(samples) < correct).double()[None]


BETAS = [-1e3, -8, -0.5, -1e-8, -3e-9, 0.0, 1e-9, 1e-8, 1e-3, 2, 8, 64, 1e3]
WORKED = [  # of a correct and of a wrong sample of 16, for 1, 4, 8 and 15 correct; by hand
    ("mean", 9, ".938/-.063 .750/-.250 .500/-.500 .063/-.938"),
    ("grpo", 9, "3.873/-.258 1.732/-.577 1/-1 .258/-3.873"),
    ("rs", 2, "2.140/-.143 .922/-.307 .381/-.381 .029/-.429"),
    ("rs", 4, "2.888/-.193 .698/-.233 .241/-.241 .016/-.245"),
    ("rs", 8, "1.865/-.124 .374/-.125 .125/-.125 .008/-.125"),
]


@parametrize("name, beta, cells", WORKED)
def test_an_advantage_has_the_values_worked_out_by_hand(name, beta, cells):
    for correct, cell in zip((1, 4, 8, 15), cells.split()):
        advantages = ADVANTAGES[name](group(correct), Config(beta=beta))[0, [0, -1]]
        assert advantages.tolist() == pytest.approx([*map(float, cell.split("/"))], abs=6e-4)


@parametrize("beta", BETAS)
def test_the_risk_sensitive_advantage_equals_its_definition_in_60_digits(beta):
    """Up to what float64 keeps: exp(βr) has 16 digits, and dividing by β makes their end larger."""
    getcontext().prec, getcontext().Emin, getcontext().Emax = 60, -(10**9), 10**9
    rewards = [[0.0, 0.0, 1.0, 1.0], [0.37, -2.5, 0.1, 3.0], [1e-3, 0.0, 2e-3, 5.0]]
    ours = risk_sensitive_advantage(torch.tensor(rewards, dtype=torch.float64), beta).tolist()
    b = Decimal(beta) or Decimal("1e-25")  # β = 0 is the limit
    tolerance = max(1e-15, 1e-15 / abs(beta)) if abs(beta) >= 1e-8 else 1e-7
    for row, advantages in zip(rewards, ours):
        weights = [(b * Decimal(r)).exp() for r in row]
        mean = sum(weights) / len(row)
        exact = [float((w / mean - 1) / b) for w in weights]
        assert advantages == pytest.approx(exact, rel=1e-12, abs=tolerance)


@parametrize("beta", BETAS)
def test_a_group_of_equal_rewards_has_an_advantage_of_exactly_zero(beta):
    for samples, reward in itertools.product(range(1, 65), (0.0, 1.0, 0.37, 1 / 3, -7.1)):
        for dtype in (torch.float32, torch.float64):
            rewards = torch.full((2, samples), reward, dtype=dtype)
            assert not risk_sensitive_advantage(rewards, beta).any()
            assert beta or not ADVANTAGES["grpo"](rewards, None).any()


def test_every_row_is_a_group_of_its_own_may_have_its_own_beta_and_sums_to_zero():
    rewards = torch.rand(len(BETAS), 9)
    for name in ("rs", "mean", "grpo"):
        together = ADVANTAGES[name](rewards, Config())
        alone = torch.cat([ADVANTAGES[name](row[None], Config()) for row in rewards])
        assert torch.allclose(together, alone, atol=1e-7), name
        assert together.sum(1).abs().max() < 1e-5, name
    together = risk_sensitive_advantage(rewards, torch.tensor(BETAS, dtype=torch.float64)[:, None])
    alone = [risk_sensitive_advantage(row[None], beta) for row, beta in zip(rewards, BETAS)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-7)


def test_constants_cancel_risk_aversion_mirrors_risk_seeking_and_the_limits_are_known():
    rewards = torch.rand(5, 8, dtype=torch.float64)
    for beta in (-3.0, 0.0, 2.0, 8.0):
        advantages = risk_sensitive_advantage(rewards, beta)
        assert torch.allclose(risk_sensitive_advantage(rewards + 11, beta), advantages)
        assert torch.allclose(risk_sensitive_advantage(-rewards, -beta), -advantages)
    rewards = torch.cat([group(correct) for correct in range(1, 17)])
    mean = rewards.mean(1, keepdim=True)
    small, large = (risk_sensitive_advantage(rewards, beta) for beta in (1e-7, 1e3))
    assert torch.allclose(small, rewards - mean, atol=1e-6)
    assert torch.allclose(1e3 * large, (rewards - mean) / mean, atol=1e-6)


def test_theorem_1_is_the_gradient_of_the_objective():
    """E[A ∇log π] against the derivative of J. A group that holds each outcome as often as its
    probability says makes the group's mean an exact expectation."""
    counts = torch.tensor([1, 80, 19, 40, 60])  # of 200
    rewards = torch.tensor([1.0, 0.6, 0.0, 0.3, -0.5], dtype=torch.float64)
    probs, outcomes = counts / 200, torch.repeat_interleave(torch.arange(5), counts)
    for beta in (-4.0, 0.5, 2.0, 8.0):
        theta = probs.double().log().requires_grad_()
        ((theta.softmax(0) * (beta * rewards).exp()).sum().log() / beta).backward()
        advantages = risk_sensitive_advantage(rewards[outcomes][None], beta)[0]  # (200,)
        grad_log_pi = torch.eye(5, dtype=torch.float64)[outcomes] - probs  # (200, 5)
        assert torch.allclose((advantages[:, None] * grad_log_pi).mean(0), theta.grad, atol=1e-8)


def test_advantages_keep_the_dtype_take_integers_and_refuse_what_is_undefined():
    for name in ("rs", "mean", "grpo"):
        function = partial(ADVANTAGES[name], config=Config())
        for dtype in (torch.float16, torch.float32, torch.float64):
            assert function(group(3).to(dtype)).dtype == dtype
        assert torch.equal(function(group(3).long()), function(group(3).float()))
    cases = [(torch.zeros(4), 2), (torch.zeros(2, 4), torch.ones(4)), (group(1), math.inf)]
    for rewards, beta in [*cases, (group(1), math.nan), (group(1) / 0, 2), (group(1) / 0, 0)]:
        with pytest.raises(ValueError, match="must be"):
            risk_sensitive_advantage(rewards, beta)


# --- The task -------------------------------------------------------------------------------------
EXACT = {"+": add, "-": sub, "*": mul, "/": truediv}
BINDS = {"+": 1, "-": 1, "*": 2, "/": 2}
ANSWER = (4, 7, 9, 12), 48


def expressions(numbers):
    """All (text, value) over numbers, or over such pairs, fully bracketed; value None after x/0."""
    items = [x if isinstance(x, tuple) else (str(x), Fraction(x)) for x in numbers]
    if len(items) == 1:
        yield items[0]
    for i, j in itertools.permutations(range(len(items)), 2):
        rest = [items[m] for m in range(len(items)) if m not in (i, j)]
        (left, x), (right, y) = items[i], items[j]
        for symbol, function in EXACT.items():
            bad = x is None or y is None or (symbol == "/" and y == 0)
            value = None if bad else function(x, y)
            yield from expressions([*rest, (f"({left}{symbol}{right})", value)])


@parametrize("numbers, target", [ANSWER, ((3, 3, 8, 8), 24), ((1, 1, 13, 13), 1)])
def test_the_reward_agrees_with_the_enumeration_of_all_expressions(numbers, target):
    judged = list(expressions(numbers))
    assert len(judged) == 9216 and target in {value for _, value in judged}
    for text, value in judged:
        for shown in (text, text[1:-1], f"  {text}\nNumbers: 1"):
            reward = rs_grpo.countdown_reward(shown, (numbers, target))
            assert reward == float(value == target), text


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
    rng, right = random.Random(0), 0
    for i in range(10_000):
        if i % 100 == 0:
            numbers = [rng.randint(1, 13) for _ in range(3)]
            whole = list(expressions(numbers))
        text, target = rng.choice(whole)
        for _ in range(rng.choice((0, 0, 1, 1, 2, 5))):
            place = rng.randrange(len(text) + 1)
            dirt = rng.choice([*"0123456789+-*/() .,=e_\n", "**", "//", "٣", "((", "))"])
            text = text[:place] + dirt + text[place + rng.randint(0, 1) :]
        expected = judged_by_descent(text, numbers, target)
        assert rs_grpo.countdown_reward(text, (numbers, target)) == expected, (text, numbers)
        right += expected
    assert 3000 < right < 7000  # the oracle saw both sides


HOSTILE = """() ( ) 4 + 4+7+9+12 4,7,9,12=48: 4,7,9,12=48:(9-7)*(12+12) (12-4)*(9-7)*3 7**9 4//7
12*4*(9-7)/2 -4+7+9+12 +(4) --4 4-+7 ~4 4%7 9**9**9**9 1e9 0x4 4.0+7 4_0 04+7 ٤+٧ 4+７ ² 4×12
４*１２*(９-７)/2 4*(9-7)+12=20 48 =48 1/0 (7-7)/(9-9) 12/(4-4)+7+9 4+7;9+12 __import__('os') \x00
4\x0012 <eos>4 <pad>12*4 None nan inf (4)(12) 4(12) ()4*12 4*12) (4*12 9-7*( 12*4+0*(9-7) \ud800 🙂
(4+7-7)*12*9/9 4*12**(9-7) 4*12//(9-7) 7-9+12*4+2 eval('48')""".split()
HOSTILE += ["", " ", "4- -7", "4 7 9 12", "4+7 9+12", "4+7 or 9", "12*4 = 48", "4+7\n9+12"]
HOSTILE += ["(" * 10**6, "9" * 10**6, "a" * 10**6, "4+" * 10**6, "\n" * 10**6, " " * 10**6 + "4"]
HOSTILE += ["(" * 49 + "4" + ")" * 49, "4+" * 49 + "4", "1/" * 49 + "1", "9" * 100, "٤" * 10**6]


def test_a_hostile_completion_earns_nothing_raises_nothing_and_costs_nothing():
    for text in HOSTILE:
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            assert rs_grpo.countdown_reward(text, ANSWER) == 0.0, text[:50]
            seconds.append(time.perf_counter() - started)
        assert min(seconds) < 5e-3, text[:50]
    sums = ("4" + "+0" * 49, 4, 1), ("4" + "+0" * 50, 4, 0)  # of 99 and of 101 characters
    for text, target, reward in (*sums, ("2**3", 8, 0), ("9//4", 2, 0), ("-2+3", 1, 0)):
        numbers = re.findall("[0-9]+", text)
        assert rs_grpo.countdown_reward(text, (numbers, target)) == reward


@parametrize("name, size, counts", [("", 4, (10_000, 2_000)), ("-text", 3, (4_000, 500))])
def test_problems_can_be_solved_and_those_held_out_are_never_trained_on(name, size, counts):
    task = TASKS[f"countdown{name}"](Config(eval_problems=10**6))
    problems, values = task.train + task.held_out, {}
    assert (len(task.train), len(task.held_out)) == counts
    assert len({prompt for prompt, _ in problems}) == sum(counts)  # each once
    form = r"(\d+,){3}\d+=\d+:|Numbers: \d+, \d+, \d+\. Target: \d+\. Answer:"
    for prompt, (numbers, target) in problems:
        assert re.fullmatch(form, prompt) and prompt not in task.examples
        assert re.findall("[0-9]+", prompt) == [*map(str, numbers), str(target)]
        assert len(numbers) == size and numbers == sorted(numbers)  # so that no order is another
        assert 1 <= numbers[0] <= numbers[-1] <= 13 and 1 <= target <= 99
    for _, (numbers, target) in problems if size == 3 else problems[::600]:
        if tuple(numbers) not in values:
            values[tuple(numbers)] = {value for _, value in expressions(numbers)}
        assert target in values[tuple(numbers)]
    assert TASKS[f"countdown{name}"](Config(eval_problems=7)).held_out == task.held_out[:7]
    shown = "Numbers: 2, 3, 5. Target: 11. Answer: 2 * 3 + 5\n"  # 6 + 5
    shown += "Numbers: 1, 4, 8. Target: 28. Answer: (8 - 1) * 4\n"  # 7 · 4
    assert task[3:] == ((shown, 14) if name else ("", 20))


# --- Sampling -------------------------------------------------------------------------------------
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


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of random models: tiny; one that looks positions up, where rotary ones forgive a
    shift; one that reads letters, two of whose tokens hold a line break."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    letters = sorted(set(rs_grpo.EXAMPLES + "0123456789+-*/()=") - {" ", "\n"})
    vocabulary = {token: i for i, token in enumerate(["<eos>", "Ċ", ")Ċ", "Ġ", *letters])}
    words = Tokenizer(models.BPE(vocabulary, [(")", "Ċ")]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    words = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    digits = AutoTokenizer.from_pretrained(rs_grpo.EMBEDDED)
    table = dict(n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
    return {
        "tiny": save_model(tmp_path_factory.mktemp("tiny"), digits, tie_word_embeddings=False),
        "absolute": save_model(tmp_path_factory.mktemp("absolute"), digits, "gpt2", **table),
        "wordy": save_model(tmp_path_factory.mktemp("wordy"), words),
    }


@pytest.fixture(scope="session")
def tiny(models):
    return models["tiny"]


def load(model, task="countdown", **changes):
    """(policy, task, config) of a run that would start with these settings."""
    config = Config(model=model, task=task, device="cpu", max_tokens=12, **changes)
    task = TASKS[task](config)
    return rs_grpo.load_policy(config, task), task, config


@pytest.fixture
def policy(request, models):
    """The policy of the folder tiny, or of each that `each_kind` names."""
    kind = getattr(request, "param", "tiny")
    return load(models[kind], "countdown-text" if kind == "wordy" else "countdown")[0]


each_kind = parametrize("policy", ["tiny", "absolute", "wordy"], indirect=True)


def draw(policy, samples=8, max_tokens=12, prompts=PROMPTS, temperature=1.0):
    """Rollouts without rewards."""
    prompts = [tuple(ids) for ids in policy.tokenizer(prompts).input_ids]
    config = Config(max_tokens=max_tokens, temperature=temperature)
    drawn = rs_grpo.sample(policy, prompts, samples, config, torch.Generator().manual_seed(0))
    return Rollouts(prompts, *drawn, [], [], torch.zeros(len(prompts), samples))


def pairs(rollouts):
    """(prompt, completion) of every sample."""
    samples = len(rollouts.completions) // len(rollouts.prompts)
    return [(rollouts.prompts[i // samples], row) for i, row in enumerate(rollouts.completions)]


def plain_logprobs(policy, prompt, completion, temperature):
    """log π of each completion token, (T,), from one forward pass: no cache, padding or batch."""
    logits = policy.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)[range(len(completion)), completion]


@each_kind
def test_a_completion_ends_with_its_first_eos_or_in_words_with_its_first_line_break(policy):
    rows, eos = draw(policy, samples=64).completions, policy.tokenizer.eos_token_id
    stops = {0, 1, 2} if eos == 0 else {eos}
    assert policy.eos_ids == {eos} and set(policy.stop_ids.tolist()) == stops
    assert all(not stops & set(row[:-1]) for row in rows)
    assert {row[-1] for row in rows if len(row) < 12} == stops  # which belong to it


@each_kind
def test_samples_equal_so_far_share_a_row_of_which_each_takes_its_own_draw(policy):
    """The reference runs every row whole, without a cache, on the same random numbers. It runs no
    row that has ended, which a fourth of all tokens do here, and stops with the last."""
    policy = policy._replace(stop_ids=torch.arange(0, len(policy.tokenizer), 4))
    shared, generator = [], torch.Generator().manual_seed(0)
    base, texts = policy.model.base_model, [(i // 16, ()) for i in range(48)]  # whose, and so far
    hook = base.register_forward_hook(lambda *io: shared.append(len(io[2][0])))
    rollouts, expected, going = draw(policy, 16, 500, temperature=0.9), [], list(range(48))
    hook.remove()
    while going:
        rows = sorted({texts[i] for i in going})
        ids = [torch.tensor([rollouts.prompts[owner] + text]) for owner, text in rows]
        with torch.no_grad():
            logits = torch.cat([policy.model(row).logits[:, -1] for row in ids])
        draws = (logits / 0.9).softmax(-1).multinomial(16, True, generator=generator).tolist()
        for i in going:
            owner, text = texts[i]
            texts[i] = owner, (*text, draws[rows.index(texts[i])][i % 16])
        expected.append(len(rows))
        going = [i for i in going if texts[i][1][-1] % 4]
    assert rollouts.completions == [text for _, text in texts]
    assert shared == expected and shared[0] == 3 < shared[1] < 48 and shared[-1] < 9


@parametrize("temperature", [1.0, 0.6])
def test_samples_are_distributed_as_the_models_softmax_at_the_temperature(policy, temperature):
    """Shares of the first token against the probabilities, within five standard errors."""
    rollouts = draw(policy, 8000, max_tokens=1, temperature=temperature)
    for i, prompt in enumerate(rollouts.prompts):
        drawn = torch.tensor(rollouts.completions[i * 8000 : (i + 1) * 8000])[:, 0]
        logits = policy.model(torch.tensor([prompt])).logits[0, -1].detach()
        probs = (logits / temperature).softmax(-1)
        share, error = drawn.bincount(minlength=len(probs)) / 8000, (probs / 8000).sqrt()
        assert ((share - probs).abs() < 5 * error).all()


def test_the_entropy_is_estimated_by_the_mean_surprise_of_the_drawn_tokens(policy):
    rollouts = draw(policy, temperature=0.8)
    logprobs = torch.cat([plain_logprobs(policy, *row, 0.8) for row in pairs(rollouts)])
    assert rollouts.entropy == pytest.approx(-logprobs.mean().item(), rel=1e-4)


# --- Learning -------------------------------------------------------------------------------------
MIXED = torch.tensor([[1.0, 0, 0, 1, 0, 0, 0, 0], [0] * 8, [0, 0, 0, 0, 0, 1, 0, 0]])


@pytest.fixture
def spy(monkeypatch):
    """At each call of a function, or at one as in "sample 2", note its arguments or raise."""

    def watch(moment, note, module=rs_grpo):
        name, _, call = moment.partition(" ")
        original, count = getattr(module, name), itertools.count(1)

        def update(*args):  # as a cache calls its own, where memory may run out
            if not call or next(count) == int(call):
                if isinstance(note, Exception):
                    raise note
                note(*args)
            return original(*args)

        monkeypatch.setattr(module, name, update)

    return watch


def gradient(policy):
    """The gradient of all parameters, flat and in float64, which is then forgotten."""
    flat = torch.cat([p.grad.flatten() for p in policy.model.parameters()]).double()
    policy.model.zero_grad()
    return flat


def assert_plain_gradient(policy, rollouts, advantages, temperature=1.0):
    """The gradient is that of the loss as it is defined, row by row: no prompt is shared, no group
    skipped, every token counted, an EOS and a line break too."""
    ours, tokens = gradient(policy), sum(map(len, rollouts.completions))
    for advantage, row in zip(advantages.flatten(), pairs(rollouts)):
        (-advantage * plain_logprobs(policy, *row, temperature).sum() / tokens).backward()
    reference = gradient(policy)
    assert (ours - reference).norm() < 1e-4 * reference.norm()


@each_kind
@parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_equal_those_of_one_plain_forward_pass(policy, temperature):
    rows = pairs(draw(policy, temperature=temperature))
    with torch.no_grad():
        ours = rs_grpo.completion_logprobs(policy, *zip(*rows), temperature)
        assert ours.shape == (24, max(len(completion) for _, completion in rows))
        for line, row in zip(ours, rows):
            plain = plain_logprobs(policy, *row, temperature)
            assert torch.allclose(line[: len(row[1])], plain, atol=1e-4)
            assert not line[len(row[1]) :].any()


@each_kind
@parametrize("micro_tokens", [1, 300, 10**9])
def test_the_gradient_is_that_of_a_plain_loss_however_the_batch_is_cut(policy, micro_tokens):
    rollouts, advantages = draw(policy, temperature=0.7), risk_sensitive_advantage(MIXED, 2.0)
    assert any(row[-1] in policy.stop_ids for row in rollouts.completions)
    config = Config(micro_tokens=micro_tokens, temperature=0.7)
    rs_grpo.policy_gradient(policy, rollouts, advantages, config)
    assert_plain_gradient(policy, rollouts, advantages, 0.7)


def test_the_gradient_is_the_same_bit_for_bit_on_several_threads(policy):
    rollouts = draw(policy, 1000, max_tokens=3, prompts=PROMPTS[:1], temperature=3.0)
    advantages = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(2)
    gradients = []
    for _ in range(5):
        rs_grpo.policy_gradient(policy, rollouts, advantages, Config(micro_tokens=10**9))
        gradients.append(gradient(policy))
    torch.set_num_threads(1)
    assert all(torch.equal(gradients[0], other) for other in gradients)


def test_equal_completions_are_computed_once_and_groups_without_a_signal_never(policy, spy):
    rollouts = draw(policy, 40, max_tokens=2, temperature=0.3, prompts=[*PROMPTS, PROMPTS[0]])
    advantages = torch.randn(4, 40, generator=torch.Generator().manual_seed(2))
    advantages[1], parts, config = 0, [], Config(temperature=0.3, micro_tokens=200)
    spy("completion_logprobs", lambda _, *rows: parts.append(list(zip(*rows[:2]))))
    rs_grpo.policy_gradient(policy, rollouts, advantages, config)
    different = {row for row in pairs(rollouts) if row[0] != rollouts.prompts[1]}
    assert sorted(sum(parts, [])) == sorted(different) and len(different) < 80 and len(parts) > 1
    for part in parts:  # padded, no more than the budget
        assert sum(max(map(len, column)) for column in zip(*part)) * len(part) <= 200
    assert_plain_gradient(policy, rollouts, advantages, 0.3)
    parts.clear()
    rs_grpo.policy_gradient(policy, rollouts, torch.zeros(4, 40), config)
    assert not parts


@each_kind
def test_each_prompt_is_computed_once_for_its_group_in_sampling_and_in_learning(policy):
    shapes = []
    policy.model.base_model.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    rollouts = draw(policy)
    prefill = (3, max(map(len, rollouts.prompts)))
    assert shapes[0] == prefill and {shape[1] for shape in shapes[1:]} == {1}
    shapes.clear()
    rs_grpo.policy_gradient(policy, rollouts, torch.ones(3, 8), Config(micro_tokens=10**9))
    different = len(set(pairs(rollouts)))
    assert shapes == [prefill, (different, max(map(len, rollouts.completions)) - 1)]


@parametrize("step, share", [(1, 0.1), (5, 0.5), (10, 1), (99, 1)])
def test_a_step_is_clipped_to_norm_1_and_warmed_up_over_ten_steps(policy, step, share):
    before = [p.detach().clone() for p in policy.model.parameters()]
    optimizer = torch.optim.SGD(policy.model.parameters())
    norm = rs_grpo.update(policy, optimizer, draw(policy), 1e3 * MIXED, Config(lr=0.5), step)
    moved = sum((a - b).square().sum() for a, b in zip(before, policy.model.parameters())).sqrt()
    assert norm > 1 and moved.item() == pytest.approx(0.5 * share, rel=1e-3)


STEP_OF_A_LARGE_VOCABULARY = """
import torch, rs_grpo
from transformers import LlamaConfig, LlamaForCausalLM
P, N, T, V = 2, 10, 52, 150_000
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=V, tie_word_embeddings=True, **sizes)).eval()
policy = rs_grpo.Policy(model, None, set(), None, None)
rows = lambda count, length: list(map(tuple, torch.randint(V, (count, length)).tolist()))
prompts, completions, advantages = rows(P, 8), rows(P * N, T), torch.randn(P, N)
rollouts = rs_grpo.Rollouts(prompts, completions, 0.0, [], [], None)
peak = lambda: 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
rs_grpo.policy_gradient(policy, rollouts, advantages, rs_grpo.Config(temperature=0.7))
print(peak() - before)
ours = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
for i, completion in enumerate(completions):
    logits = model(torch.tensor([prompts[i // N] + completion])).logits[0, 7:-1] / 0.7
    loss = -logits.log_softmax(-1)[range(T), completion].sum() / (P * N * T)
    (advantages.flatten()[i] * loss).backward()
print(max(((a - p.grad).norm() / p.grad.norm()).item() for a, p in zip(ours, model.parameters())))
"""


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is there only")
def test_with_a_vocabulary_of_150_000_the_gradient_is_right_but_all_logits_are_never_there():
    """All are 4·20·52·150,000 bytes = 624 MB, and three times that with softmax and gradient."""
    done = python("-c", STEP_OF_A_LARGE_VOCABULARY)
    assert done.returncode == 0, done.stderr
    memory, error = map(float, done.stdout.split())
    assert 128e6 < memory < 600e6 and error < 1e-4


# --- Precision, and where tensors lie -------------------------------------------------------------
@parametrize("precision, gap", [("float32", 1e-6), ("float16", 5e-4), ("bfloat16", 2e-3)])
def test_sampler_and_learner_agree_in_every_precision_and_so_do_gradients(precision, gap, capsys):
    """Mean |Δ log π| of a token between sampler and learner is .004 in float16 and .029 in bfloat16
    on a pretrained model of 135 M parameters; on the embedded one some .0002 and .0007."""
    policy, task, config = load("countdown-base", precision=precision)
    assert f"cpu (no GPU), torch.{precision}, countdown-base of 872" in capsys.readouterr().out
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    logits, dtype, generator = [], getattr(torch, precision), torch.Generator().manual_seed(0)
    policy.model.get_output_embeddings().register_forward_hook(lambda *io: logits.append(io[2]))
    rollouts = rs_grpo.roll_out(policy, task, task.train[:60], 1, config, generator)
    sampled, gaps = list(logits), []
    with policy.autocast(), torch.no_grad():
        learned = rs_grpo.completion_logprobs(policy, *zip(*pairs(rollouts)), 1.0)
    for t, step in enumerate(sampled):  # (R, V): a row for every sample that goes on
        going = [i for i, row in enumerate(rollouts.completions) if len(row) > t]
        drawn = [rollouts.completions[i][t] for i in going]
        logprobs = step.float().log_softmax(-1)[range(len(going)), drawn]
        gaps.append((logprobs - learned[going, t]).abs())
    assert gap / 20 < torch.cat(gaps).mean() < gap and torch.cat(gaps).max() < 50 * gap
    advantages = torch.randn(60, 1, generator=generator)
    long = rollouts._replace(  # one without a signal, for which the mean of all tokens is tiny
        prompts=[*rollouts.prompts, ()], completions=[*rollouts.completions, range(10**8)]
    )
    sgd = torch.optim.SGD(policy.model.parameters())
    before = torch.cat([p.detach().flatten() for p in policy.model.parameters()])
    weights = torch.cat([advantages, torch.zeros(1, 1)])
    rs_grpo.update(policy, sgd, long, weights, replace(config, lr=1e5), 10)
    moved = before - torch.cat([p.detach().flatten() for p in policy.model.parameters()])
    assert {part.dtype for part in logits} == {dtype}
    plain = load("countdown-base", precision="float32")[0]
    rs_grpo.policy_gradient(plain, rollouts, advantages, config)
    assert torch.cosine_similarity(moved.double(), gradient(plain), 0) > 0.999


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
        inner = tree_map_only(Elsewhere, lambda x: x.inner, (args, kwargs))
        out = func(*inner[0], **inner[1])
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


def test_nothing_mixes_devices_in_sampling_learning_and_evaluating(tiny, monkeypatch):
    config = dict(eval_problems=3, eval_samples=4, micro_tokens=100)

    def results(policy, task, config):
        task = task._replace(reward=lambda text, answer: float(len(text) > 9))
        generator = torch.Generator("cpu").manual_seed(0)
        rollouts = rs_grpo.roll_out(policy, task, task.train[:5], 4, config, generator)
        optimizer = torch.optim.AdamW(policy.model.parameters())
        advantages = risk_sensitive_advantage(rollouts.rewards, 2.0)
        norms = [rs_grpo.update(policy, optimizer, rollouts, advantages, config, 9) for _ in "12"]
        return rollouts.completions, rs_grpo.evaluate(policy, task, config), *norms

    here, (policy, *rest) = results(*load(tiny, **config)), load(tiny, **config)
    with OtherDevice(monkeypatch):
        policy = policy._replace(stop_ids=Elsewhere(policy.stop_ids))
        policy.model._apply(Elsewhere)
        assert policy.model.device.type == "meta"
        there = results(policy, *rest)
    assert there[:2] == here[:2] and there[2:] == pytest.approx(here[2:], rel=1e-4) != (0, 0)


def test_the_emulated_device_notices_what_mixes(monkeypatch):
    with OtherDevice(monkeypatch):
        x = torch.nn.Parameter(torch.rand(3, 2).to("meta"))
        ones = torch.ones(3, 2, device="meta")
        y = (x + ones + torch.tensor(1.0)).sum()  # a number of the CPU may
        y.backward()
        assert (type(x.grad), x.device) == (Elsewhere, ones.device)
        assert y.item() == pytest.approx(x.detach().to("cpu").sum().item() + 12)
        mixes = [lambda: x + torch.ones(3, 2), lambda: torch.cat([ones, torch.ones(1, 2)])]
        for mixing in [*mixes, lambda: ones[torch.arange(2)]]:
            with pytest.raises(RuntimeError, match="mixes devices"):
                mixing()


# --- pass@k ---------------------------------------------------------------------------------------
def test_pass_at_k_is_the_share_of_subsets_with_a_success_and_exact_for_a_thousand_samples():
    for n in range(1, 9):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            share = sum(map(max, subsets)) / len(subsets)
            assert rs_grpo.pass_at_k(n, c, k) == pytest.approx(share, abs=1e-15)
    for c, k in itertools.product((0, 1, 2, 500, 1023, 1024), (1, 2, 512, 1024)):
        wrong = math.prod((Fraction(1024 - c - i, 1024 - i) for i in range(k)), start=Fraction(1))
        assert rs_grpo.pass_at_k(1024, c, k) == pytest.approx(float(1 - wrong), rel=1e-14)
    for n, c, k in ((4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)):
        with pytest.raises(ValueError, match="needs 0 <= c <= n"):
            rs_grpo.pass_at_k(n, c, k)


def test_an_evaluation_counts_right_and_different_answers_of_every_problem(policy, monkeypatch):
    """Of 4, 3 or 1 or 0 are right: pass@1 is 3/4, 1/4, 0; pass@2 1, 1 − C(3,2)/C(4,2) = 1/2, 0."""
    answers = iter(["7+1", "7+1", "1+7", "("] + [")", "8", ")", ")"] + ["1"] * 4)

    def draws(policy, prompts, samples, config, generator):
        rows = policy.tokenizer([next(answers) for _ in range(len(prompts) * samples)]).input_ids
        return [(*row, policy.tokenizer.eos_token_id) for row in rows], 0.0

    monkeypatch.setattr(rs_grpo, "sample", draws)
    task = Task([], [(PROMPTS[0], "78")] * 3, lambda text, answer: float(bool({*text} & {*answer})))
    result = rs_grpo.evaluate(policy, task, Config(eval_samples=4, eval_rows=8))
    assert result["n"] == 4 and next(answers, None) is None
    assert result["correct"] == [3, 1, 0] and result["distinct"] == [2, 1, 0]
    assert result["pass_at_k"] == pytest.approx({"1": 100 / 3, "2": 50, "4": 200 / 3})


def test_the_embedded_model_is_peaked_and_judged_on_the_same_random_numbers_again():
    policy, task, config = load("countdown-base", eval_problems=32, eval_samples=32)
    base = rs_grpo.evaluate(policy, task, replace(config, max_tokens=20))
    assert 8 < base["pass_at_k"]["1"] < 30 < base["pass_at_k"]["32"] < 75
    few = task._replace(held_out=task.held_out[:4])
    results = [rs_grpo.evaluate(policy, few, replace(config, seed=seed)) for seed in (0, 0, 1)]
    assert results[0] == results[1] != results[2]


# --- Training -------------------------------------------------------------------------------------
# An estimator of one's own: a random model solves nothing, and this gives it a signal.
ADVANTAGES["graded"] = lambda r, config: torch.linspace(-1, 1, r.shape[1]).expand_as(r)


@pytest.fixture(autouse=True)
def ctrl_c_as_before():
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)
    rs_grpo.ctrl_c.clear()


def settings_of(model, folder, **changes):
    """The settings of a run of some seconds."""
    settings = dict(model=model, out=str(folder), prompts=4, samples=4, steps=6, max_tokens=6)
    settings |= dict(lr=1e-2, eval_problems=3, eval_samples=4, save_every=2, eval_every=3)
    return Config(**{**settings, "device": "cpu", "advantage": "graded", **changes})


@pytest.fixture
def small(tiny, tmp_path):
    return partial(settings_of, model=tiny, folder=tmp_path / "run")


def flags(config):
    return [f"--{name.replace('_', '-')}={value}" for name, value in asdict(config).items()]


def metrics(folder):
    """The lines of metrics.jsonl, without times."""
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").open())
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def saved(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def assert_same(folder, other, results=True):
    """The same metrics, weights and random state, and the same evaluations too."""
    assert metrics(folder) == metrics(other)
    ours, theirs = saved(folder), saved(other)
    parts = [{**part["model"], **part["state"], "g": part["generator"]} for part in (ours, theirs)]
    assert parts[0].pop("results") == parts[1].pop("results") or not results
    assert all(torch.equal(*map(torch.as_tensor, x)) for x in zip(*(p.values() for p in parts)))
    for part, at in ((ours, folder), (theirs, other)):
        assert json.loads((at / "eval.json").read_text()) == part["state"]["results"]


@pytest.fixture(scope="session")
def whole(tiny, tmp_path_factory):
    """The folder of a run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    main(flags(settings_of(tiny, folder)))
    return folder


def test_a_run_leaves_a_folder_that_holds_everything_and_loads_in_transformers(whole, tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = "checkpoint.pt config.json eval.json metrics.jsonl model passk.png"
    assert sorted(path.name for path in whole.iterdir()) == names.split()
    assert Config(model="of/it", advantage="grpo").run_folder == Path("runs/it-grpo-seed0")
    results = json.loads((whole / "eval.json").read_text())
    assert list(results) == ["0", "3", "6"]
    for n, correct, distinct, percent in map(dict.values, results.values()):
        assert (n, len(correct), len(distinct), list(percent)) == (4, 3, 3, ["1", "2", "4"])
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").open()]
    keys = "step reward grad_norm signal entropy length tokens_per_second solve_rate seconds"
    assert all(list(line) == keys.split() for line in lines)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert json.loads((whole / "config.json").read_text()) == asdict(settings_of(tiny, whole))
    assert AutoTokenizer.from_pretrained(whole / "model")("1+1") == load(tiny)[0].tokenizer("1+1")
    base = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(whole / "model").state_dict().items():
        assert torch.equal(saved(whole)["model"][name], weight)
    assert not torch.equal(base[name], weight)


def test_a_run_prints_what_it_runs_on_and_pass_at_k_before_and_after(whole, tiny, spy, capsys):
    spy("evaluate", AssertionError("it was done"))
    main(["--resume", "--out", str(whole)])  # nothing is left to do
    first, title, *table, last = capsys.readouterr().out.splitlines()
    size = sum(p.numel() for p in load(tiny)[0].model.parameters())
    assert first == f"cpu (no GPU), torch.float32, {tiny} of {size:,} parameters"
    assert title == "3 held-out problems, 4 samples each, percent"
    table = [line.split() for line in table]
    assert [row[0] for row in table] == ["base", "pass@1", "pass@2", "pass@4", "distinct"]
    assert table[0][1] == "trained" and {len(row) for row in table[1:4]} == {3}
    assert last == f"everything is in {whole}/, the trained model in its folder model/"


MOMENTS = "evaluate 1,update 1,update 2,update 4,report 3,report 4,save_checkpoint 2,evaluate 2"
MOMENTS += ",save_checkpoint 4,save_checkpoint 7,evaluate 3,save_checkpoint 9,show 1,save 4"


@parametrize("moment", MOMENTS.split(","))
def test_a_run_broken_off_anywhere_resumes_to_the_same_numbers(whole, small, spy, moment):
    def kill(*arguments):
        if moment == "save 4":
            arguments[1].write_bytes(b"half of a checkpoint")
        raise RuntimeError("killed")

    spy(moment, kill, {"save 4": torch}.get(moment, rs_grpo))
    with pytest.raises(RuntimeError, match="killed"):
        main(flags(small()))
    main(["--resume", "--out", small().out])
    assert_same(small().run_folder, whole)


def test_a_run_killed_at_any_moment_resumes_to_the_same_numbers(whole, small):
    """By SIGKILL, which leaves no time for anything: not to save, nor to unlock the folder."""
    log, kills, arguments = small().run_folder / "metrics.jsonl", 0, flags(small())
    command = [sys.executable, "-c", "from test_rs_grpo import main; main()"]
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for lines in (1, 4):  # kill when that many steps are done, and a moment later
        process = subprocess.Popen([*command, *arguments], cwd=ROOT, **silent)
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
    assert list(train(small(), resume=True)) == ["0", "3", "4", "6"]
    assert_same(small().run_folder, whole, results=False)


@parametrize("moment, step, lines", [("update 1", 1, 1), ("evaluate 2", 3, 3), ("update 3", 0, 2)])
def test_ctrl_c_ends_and_saves_the_step_but_breaks_off_an_evaluation_and_pressed_twice_a_step(
    whole, small, monkeypatch, spy, capfd, moment, step, lines
):
    run, presses = small().run_folder, 2 if moment == "update 3" else 1
    spy(moment, lambda *_: [os.kill(os.getpid(), signal.SIGINT) for _ in range(presses)])
    with pytest.raises(SystemExit, match="130"):
        main(flags(small(save_every=50)))
    printed = capfd.readouterr().err
    assert "\nsaving after this step; Ctrl-C again breaks off at once\n" in printed
    assert f"\nstopped; go on: python {sys.argv[0]} --resume --out {run}\n" in printed
    assert saved(run)["state"]["step"] == step and len(metrics(run)) == lines
    monkeypatch.undo()
    main(["--resume", "--out", str(run)])
    assert_same(run, whole)


def test_updates_not_finite_are_skipped_but_three_or_bad_logits_end_it(small, spy, monkeypatch):
    bad, step, original = [2, 3, 5, 6], itertools.count(1), rs_grpo.policy_gradient

    def sometimes_infinite(policy, *args):
        original(policy, *args)
        if next(step) in bad:
            next(policy.model.parameters()).grad[0] = math.inf

    monkeypatch.setattr(rs_grpo, "policy_gradient", sometimes_infinite)
    train(small())
    norms = [line["grad_norm"] for line in metrics(small().out)]
    assert [step + 1 for step in range(6) if not math.isfinite(norms[step])] == bad
    assert all(weight.isfinite().all() for weight in saved(small().out)["model"].values())
    bad, step = [2, 3, 4], itertools.count(1)
    with pytest.raises(rs_grpo.BadInput, match="three updates in a row .* lower --lr"):
        train(small(folder=small().out + "2"))
    assert next(step) == 5
    spy("sample 2", lambda policy, *_: policy.model.lm_head.weight.data[7].fill_(math.inf))
    with pytest.raises(rs_grpo.BadInput, match="infinite logits; .* lower --lr"):
        train(small(folder=small().out + "3"))


@parametrize("prompts, steps", [(1, 35), (7, 5), (10, 3), (35, 1), (50, 1)])
def test_problems_come_once_an_epoch_in_an_order_set_by_the_seed(monkeypatch, prompts, steps):
    seen, task = [], Task([("", i) for i in range(35)], [], None)
    rollouts = SimpleNamespace(rewards=torch.zeros(min(prompts, 35), 2))
    monkeypatch.setattr(rs_grpo, "roll_out", lambda *args: seen.extend(args[2]) or rollouts)

    def epoch(number, seed=0):
        seen.clear()
        for step in range(number * steps, (number + 1) * steps):
            state = SimpleNamespace(step=step, solved=torch.zeros(35) > 0)
            rs_grpo.collect(None, task, Config(prompts=prompts, seed=seed), state, None)
        assert len(set(seen)) == len(seen) == min(prompts, 35) * steps and not state.solved.any()
        return list(seen)

    assert epoch(0) == epoch(0) != epoch(1) and epoch(0) != epoch(0, seed=1)


def test_the_metrics_are_those_of_the_batch(small, monkeypatch, spy):
    """In step 1 two groups of four have a reward of 1, and in later ones none."""
    rewards, batches = [1.0, 0, 0, 0, 1.0, 0.5] + [0.0] * 10, []
    later = iter([0.0] * 12 + rewards + [0.0] * 1000)  # after the evaluation of the base
    task = TASKS["countdown"](small())
    task = task._replace(train=task.train[:8], reward=lambda text, answer: next(later))
    monkeypatch.setitem(TASKS, "mine", lambda config: task)
    spy("update", lambda *args: batches.append(args[2]))
    train(small(steps=3, eval_every=9, advantage="rs", task="mine"))
    first, second, third = metrics(small().out)
    assert first["reward"] == sum(rewards) / 16 and first["signal"] == 2 / 4
    assert first["length"] == sum(map(len, batches[0].completions)) / 16
    assert first["entropy"] == batches[0].entropy and third["solve_rate"] == 2 / 8
    assert second["reward"] == second["signal"] == second["grad_norm"] == 0


def test_samples_shown_leave_out_the_examples_before_their_prompt(models, small, spy, capsys):
    policy, task, _ = load(models["wordy"], "countdown-text")
    prompts, questions = [], {question for question, _ in task.train + task.held_out}
    spy("sample", lambda policy, rows, *rest: prompts.extend(policy.tokenizer.batch_decode(rows)))
    train(small(model=models["wordy"], steps=1, task="countdown-text", max_tokens=0))
    assert all(prompt.startswith(task.examples) for prompt in prompts)
    assert {prompt.removeprefix(task.examples) for prompt in prompts} < questions
    shown = capsys.readouterr().out
    assert re.search(r"reward 0.00  Numbers: \d+, \d+, \d+. Target: \d+. Answer: '", shown)
    assert not any(example in shown for example in task.examples.splitlines())
    assert '"max_tokens": 14' in (small().run_folder / "config.json").read_text()


def test_the_reward_reads_the_first_line_with_the_text_of_its_last_token(models, monkeypatch):
    policy, task, config = load(models["wordy"], "countdown-text")
    texts = [" 2 * (3 + 5)\n", "2*(3+5)", "2*(3+5", " 2 * 3 + 5\n"]
    rows = [tuple(row) for row in policy.tokenizer(texts).input_ids]
    assert policy.tokenizer.convert_ids_to_tokens(rows[0][-1]) == ")Ċ"
    rows[1] += (policy.tokenizer.eos_token_id,)  # which says nothing
    monkeypatch.setattr(rs_grpo, "sample", lambda *args: (rows, 0.0))
    problem = ("Numbers: 2, 3, 5. Target: 16. Answer:", ([2, 3, 5], 16))
    rollouts = rs_grpo.roll_out(policy, task, [problem], 4, config, None)
    assert rollouts.texts == texts and rollouts.rewards.tolist() == [[1, 1, 0, 0]]
    assert rollouts.completions == rows and rollouts.questions == (problem[0],)


# --- The command line -----------------------------------------------------------------------------
def complaint(capsys, *arguments):
    """Run the command line, expect exit status 2 and one sentence; returns it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, arguments)))
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and re.fullmatch("rs_grpo.py: .+\n", printed), printed
    return printed


BAD_FLAGS = """--samples 1;--samples 0;--prompts 0;--prompts -3;--steps -1;--max-tokens -1;--beta x
--eval-samples -1;--eval-samples 0;--eval-problems 0;--save-every 0;--eval-every -1;--eval-every 0
--beta nan;--beta inf;--lr nan;--lr inf;--lr 0;--lr -1e-4;--temperature 0;--temperature -1
--temperature nan;--steps 1.5;--seed -1;--seed 18446744073709551615;--micro-tokens 0;--eval-rows 0
--advantage chen;--task gsm8k;--task=;--device tpu9;--device cuda:99;--model ./nowhere;--model=
--no-such-flag 1;--resume;--task countdown-text;--precision int8""".replace("\n", ";").split(";")


@parametrize("bad", BAD_FLAGS)
def test_bad_input_gets_one_sentence_and_exit_status_2_and_leaves_no_folder(capsys, tmp_path, bad):
    with pytest.MonkeyPatch.context() as patch:  # without what other tests have registered
        patch.setattr(rs_grpo, "ADVANTAGES", {name: ADVANTAGES[name] for name in ("rs", "grpo")})
        message = complaint(capsys, "--out", tmp_path / "run", *bad.split())
    assert bad.split()[0].strip("=") in message or bad in ("--resume", "--task countdown-text")
    assert {"chen": "estimators.py", "gsm8k": "mathematics.py"}.get(bad.split()[-1], "") in message
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_none_or_no_plain_transformer_is_refused(capsys, tmp_path, tiny):
    tokenizer, out = load(tiny)[0].tokenizer, ("--out", tmp_path / "run")
    (tmp_path / "none").mkdir()
    complaint(capsys, "--model", tmp_path / "none", *out)
    for file in Path(tiny).iterdir():
        (tmp_path / "none" / file.name).write_bytes(file.read_bytes()[:100])
    complaint(capsys, "--model", tmp_path / "none", *out)
    mamba = dict(state_size=4, num_hidden_layers=1, conv_kernel=2, expand=1)
    complaint(capsys, "--model", save_model(tmp_path / "mamba", tokenizer, "mamba", **mamba), *out)
    scaled = save_model(tmp_path / "scaled", tokenizer, "cohere", logit_scale=0.5)
    message = complaint(capsys, "--model", scaled, *out)
    assert "changes its logits after the output layer" in message and "plain transformer" in message
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_not_overwritten_nor_resumed_with_other_settings(capsys, whole, tiny):
    file = whole / "config.json"
    before = {path: path.read_bytes() for path in whole.glob("*.*")}
    assert "go on with --resume" in complaint(capsys, "--model", tiny, "--out", whole)
    for bad in ("--beta 3", "--lr 1e-5", "--seed 1", "--eval-samples 8", "--model x"):
        message = complaint(capsys, "--resume", "--out", whole, *bad.split())
        assert f"omit {bad.split()[0]}: it was" in message
    complaint(capsys, "--model", tiny, "--out", file)
    complaint(capsys, "--model", tiny, "--out", file / "run")
    assert {path: path.read_bytes() for path in whole.glob("*.*")} == before


def test_a_damaged_checkpoint_or_configuration_is_refused(capsys, small):
    run, config = small().run_folder, small(steps=1)
    train(config)
    whole, text = (run / "checkpoint.pt").read_bytes(), (run / "config.json").read_text()
    for damage in (b"", whole[: len(whole) // 2], b"x" * 1000, None):
        (run / "checkpoint.pt").write_bytes(damage or b"")
        if damage is None:  # the run was killed before it had saved anything
            (run / "checkpoint.pt").unlink()
        with pytest.raises(rs_grpo.BadInput, match="can't be resumed .* another --out"):
            train(config, resume=True)
    for damage in ("", "{", text[: len(text) // 2], text.replace("beta", "k")):  # another script's
        (run / "config.json").write_text(damage)
        complaint(capsys, "--resume", "--out", run)


def test_a_folder_that_another_process_writes_is_refused(small):
    train(small(steps=1))
    with rs_grpo.open_run_folder(small(steps=1), True):
        with pytest.raises(rs_grpo.BadInput, match="another process is writing .* another --out"):
            train(small(steps=2), resume=True)
        assert '"steps": 1' in (small().run_folder / "config.json").read_text()
    train(small(steps=2), resume=True)


OUT_OF_MEMORY = [  # in step 3, or in the evaluation after it
    ("prefill 1", "loading the model", "--model", 0),
    ("sample 4", "sampling", "--prompts --samples --max-tokens", 2),
    ("completion_logprobs 3", "learning", "--micro-tokens", 2),
    ("sample 5", "evaluating", "--eval-rows --eval-samples", 3),
]


@parametrize("moment, phase, smaller, step", OUT_OF_MEMORY)
def test_out_of_memory_gets_a_sentence_and_the_run_goes_on_from_its_last_checkpoint(
    whole, small, monkeypatch, spy, capsys, moment, phase, smaller, step
):
    run = small().run_folder
    spy(moment, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    with pytest.raises(SystemExit, match="^1$"):
        main(flags(small()))
    (message,) = re.findall("rs_grpo.py: (out of memory.*\n)", capsys.readouterr().err)
    assert message.startswith(f"out of memory while {phase}; choose ")
    assert re.findall("--[a-z-]+", message) == smaller.split()
    monkeypatch.undo()
    assert run.exists() == (step > 0)
    if step:
        assert saved(run)["state"]["step"] == step
        main(["--resume", "--out", str(run)])
        assert_same(run, whole)


def test_importing_is_cheap_and_brings_in_nothing_of_experiments():
    imported = set(python("-c", "import sys, rs_grpo; print(*sys.modules)").stdout.split())
    assert "torch" in imported and not imported & {"transformers", "matplotlib", "experiments"}


@dataclass(frozen=True)
class Wider(Config):  # as a script of experiments/ derives it
    twice: bool = False  # learn from each batch two times
    share: float = 0.5  # of what is there


@parametrize("config_class", [Config, Wider])
def test_help_names_every_setting_with_its_comment(capsys, config_class):
    with pytest.raises(SystemExit, match="^0$"):
        main(["--help"], config_class)
    text = " ".join(capsys.readouterr().out.split())
    source = (ROOT / "rs_grpo.py").read_text() + Path(__file__).read_text()
    assert "--resume go on with --out, on a CPU to the same numbers, on CUDA " in text
    for field in fields(config_class):
        comment = re.findall(rf"^    {field.name}: \w+ = .*  # (.*)$", source, re.MULTILINE)[-1]
        flag = f"--{field.name.replace('_', '-')}"
        flag += "" if field.default is False else f" {field.name.upper()}"
        assert f" {flag} {comment} (default: {field.default!r})" in text


def test_a_script_can_add_flags_tasks_and_its_own_collect_and_update(small, monkeypatch, spy):
    seen = []
    spy("collect", lambda policy, task, config, *rest: seen.append(config))
    spy("update", lambda *args: seen.append(args[4]))
    letters = Task([(PROMPTS[0], 1)] * 4, [(PROMPTS[1], 1)], lambda text, answer: float(len(text)))
    monkeypatch.setitem(TASKS, "letters", lambda config: letters)
    config = small(steps=1, task="letters", advantage="rs")
    main([*flags(config), "--twice", "--share", "0.25"], Wider)
    main(["--resume", "--out", config.out, "--steps", "2"], Wider)
    expected = Wider(**vars(config), twice=True, share=0.25)
    assert seen == [expected] * 2 + [replace(expected, steps=2)] * 2


# --- The bandit -----------------------------------------------------------------------------------
POLICY, PAYS = [0.01, 0.80, 0.19], [1.0, 0.6, 0.0]  # an example, settled on the second-best arm


def exact_gradient(probs, rewards, beta):
    """Theorem 1 for a softmax policy, π_j A_j, in plain Python and apart from the code tested."""
    if beta == 0:
        average = sum(p * r for p, r in zip(probs, rewards))
        return [p * (r - average) for p, r in zip(probs, rewards)]
    mean = sum(p * math.exp(beta * r) for p, r in zip(probs, rewards))
    return [p * (math.exp(beta * r) / mean - 1) / beta for p, r in zip(probs, rewards)]


def expected_update(beta, n):
    """The estimator's expectation: every group of n pulls, weighted by its probability."""
    arms = torch.tensor(list(itertools.product(range(3), repeat=n)))  # (3^n, n)
    probs, rewards = torch.tensor([POLICY, PAYS], dtype=torch.float64)
    advantages = risk_sensitive_advantage(rewards[arms], beta)
    pulls = [(advantages * (arms == arm)).mean(1) for arm in range(3)]
    return torch.stack(pulls) @ probs[arms].prod(1)


@parametrize("beta", [-3.0, 0.0, 2.0, 64.0])
def test_an_update_is_a_step_along_the_gradient_that_autograd_finds(beta):
    rewards, start = bandit.landscape()
    assert rewards.shape == (100,) and rewards.argmax() == 40 and start.argmax() == 75
    assert rewards[[40, 75]].tolist() == pytest.approx([1.0, 0.6], abs=1e-5)
    uniforms = torch.rand(1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    logits, theta = start.repeat(1, 1), start.clone().requires_grad_()
    before = bandit.update(logits, rewards, beta, uniforms, lr=0.1)
    arms = (start.softmax(0).cumsum(0)[None] < uniforms.T).sum(1)  # the inverse, by counting
    advantages = risk_sensitive_advantage(rewards[arms][None], beta)[0]
    (advantages * theta.log_softmax(0)[arms]).mean().backward()
    torch.testing.assert_close(logits[0], start + 0.1 * theta.grad)
    assert before.item() == pytest.approx((start.softmax(0) * rewards).sum().item())


def test_a_finite_group_scales_the_gradient_at_beta_0_and_tends_to_theorem_1_at_others():
    for n in (2, 3, 8):
        expected = [(1 - 1 / n) * g for g in exact_gradient(POLICY, PAYS, 0)]
        assert expected_update(0, n).tolist() == pytest.approx(expected, rel=1e-10)
    for beta in (2, 8):
        exact = torch.tensor(exact_gradient(POLICY, PAYS, beta), dtype=torch.float64)
        errors = [(expected_update(beta, n) - exact).abs().max() for n in (2, 4, 8)]
        assert errors[0] > errors[1] > errors[2], errors


CHANGES = [(0, -4.77e-4), (4, -4.85e-5), (8, 3.58e-4), (16, 9.04e-4), (32, 5.17e-4)]


@parametrize("beta, change", CHANGES)
def test_the_worked_example_of_the_lemmas_holds_to_three_digits(beta, change):
    computed = bandit.one_step_change(*bandit.EXAMPLE, beta).item()
    assert f"{computed:.2e}" == f"{change:.2e}"
    gradient = exact_gradient(POLICY, PAYS, beta)  # and to all, by the derivative of the softmax
    exact = 0.01 * (gradient[0] - sum(p * g for p, g in zip(POLICY, gradient)))
    assert computed == pytest.approx(exact, rel=1e-9)


def test_the_lemmas_some_beta_raises_the_best_arm_of_1000_policies_and_then_as_1_over_beta():
    arms, rewards = bandit.random_bandits(1_000)
    probs = torch.stack([(arms == arm).double().mean(1) for arm in range(10)], 1)
    assert probs.min() == 1 / 200 and probs.amax(1).min() < 0.3 and probs.max() > 0.9
    best = torch.nn.functional.one_hot(rewards.argmax(1), 10).double()
    p = (probs * best).sum(1)
    limit = p * ((1 - p) ** 2 + (probs * (1 - best)).square().sum(1))
    assert 50 < (bandit.one_step_change(arms, rewards, 0) < 0).sum() < 500  # Lemma 2
    for beta in (1e4, 1e5, 1e6):
        assert (bandit.one_step_change(arms, rewards, beta) > 0).all()  # Lemma 3
    torch.testing.assert_close(1e6 * bandit.one_step_change(arms, rewards, 1e6), limit)  # Lemma 4


def test_the_risk_neutral_policy_stays_and_the_risk_seeking_one_leaves():
    curve = bandit.run([0, 8], seeds=5, steps=5_000, lr=0.1, batch=16)
    updates = bandit.updates_until_escape(curve)
    assert curve.shape == (5_001, 2, 5) and updates[0].isinf().all()
    assert ((curve[-1, 0] - 0.6).abs() < 0.01).all() and (curve[-1, 1] > 0.9).all()
    first = int(updates[1, 0])
    assert 2_000 < first < 4_000 and curve[first - 1, 1, 0] < 0.8 <= curve[first, 1, 0]
    few = bandit.run([8], seeds=2, steps=300, lr=0.1, batch=16, seed=1)  # the same beside others
    torch.testing.assert_close(few[:, 0], curve[:301, 1, 1:3], rtol=1e-12, atol=0)
    assert not torch.allclose(few[-1, 0, 0], few[-1, 0, 1], rtol=1e-6)  # but not with other seeds


BAD = """--steps 0;--steps 2.5;--steps 10000000000;--seeds 0;--seeds nan;--batch 1;--lr 0;--lr nan
--lr inf;--seed -1;--seed 1000000000000;--betas;--betas nan;--betas 2 inf;--betas two;--betas -1001
--lemmas --advantages;--bogus;extra;--out FILE;--out FILE/x""".replace("\n", ";").split(";")


@parametrize("bad", BAD)
def test_a_bad_option_of_the_bandit_ends_in_one_sentence_and_status_2(bad, tmp_path, capsys):
    (tmp_path / "bandit.png").write_text("kept")
    with pytest.raises(SystemExit, match="^2$"):
        bandit.main(["--out", str(tmp_path), *bad.replace("FILE", bandit.__file__).split()])
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("bandit.py: ") and err.count("\n") == 1 and len(err) > 30
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


COMMANDS = {  # and what they say, of which 1/(1+e^(β/2)) and the mean |Â| at 15 of 16
    "bandit --steps 40 --seeds 2 --betas 8 0 -1": ["8 0.37", "0/2 never"],
    "lemmas --lemmas --betas 0 16": ["0 -4.8e-04", "16 9.0e-04", "for 1,000 of the 1,000"],
    "advantages --advantages": ["pass@4 0.250 0.000", "β = 0 0.500 0.117 β = 2 0.269 0.054"],
}


@parametrize("command", COMMANDS)
def test_each_command_prints_its_table_and_draws_its_picture(command, tmp_path, capsys):
    name, *arguments = command.split()
    bandit.main([*arguments, "--out", str(tmp_path / "new" / "folder")])
    printed = " ".join(capsys.readouterr().out.split())
    assert all(words in printed for words in COMMANDS[command]), printed
    assert (tmp_path / "new" / "folder" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_bandit_runs_without_a_display_and_without_transformers(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    code = "import sys; sys.modules['transformers'] = None; from bandit import main; main()"
    done = python("-c", code, "--steps", "3", "--seeds", "1", "--out", tmp_path)
    assert done.returncode == 0 and (tmp_path / "bandit.png").exists(), done.stderr
