"""Make `countdown-base/`, the small and sharply peaked policy that RS-GRPO starts from.

    python -m evidence.pretrain                       # some four minutes on two CPU cores

A Llama of 0.87 M parameters reads `4,7,9,12=48:` and writes an expression. Of twenty that it learns
from nineteen are additive chains (`9+12-4-7`) and one is a random tree over + - * / (such as
`(7+9)/4*12`); reinforcement learning and evaluation draw their problems from the trees alone. So
the policy mostly tries a chain, which cannot solve two thirds of them: the exploration dilemma
that the risk-sensitive objective is made for.

No problem of the held-out tenth (`is_held_out`) is ever seen here. The problems to train and to be
judged on, prompts of random trees on either side of that line, are written beside the model: of
four numbers train.txt and held-out.txt; of three, in words and with whole intermediate results,
train-3.txt and held-out-3.txt, for a pretrained model and `rs_grpo.py --task countdown-text`.
"""

import argparse
import operator
import random
import re
import string
import zlib
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rs_grpo import EMBEDDED, EXAMPLES

# On integers and fractions, so that results are exact.
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": Fraction}
CHAIN_SHARE = 0.9
BATCH = 256
LEARNING_RATE = 3e-3
PROBLEMS = (  # file, how many numbers, how many problems, from which side
    ("train.txt", 4, 10_000, False),
    ("held-out.txt", 4, 2_000, True),
    ("train-3.txt", 3, 4_000, False),
    ("held-out-3.txt", 3, 500, True),
)


def random_expression(
    numbers: Iterable[int], rng: random.Random, whole: bool = False
) -> tuple[str, int | Fraction | None]:
    """A random binary tree over `numbers` and + - * /, with the fewest brackets: text, exact value.

    The value is None where it divides by zero or, if all has to be `whole`, where a result isn't.
    """
    trees = [(str(n), n, 3) for n in numbers]  # text, value, how tightly its last operator binds
    while len(trees) > 1:
        left, left_value, left_binds = trees.pop(rng.randrange(len(trees)))
        right, right_value, right_binds = trees.pop(rng.randrange(len(trees)))
        symbol = rng.choice("+-*/")
        binds = 1 if symbol in "+-" else 2
        if symbol == "/" and right_value == 0:
            return "", None
        value = OPERATORS[symbol](left_value, right_value)
        if whole and value != int(value):
            return "", None
        if left_binds < binds:
            left = f"({left})"
        if right_binds < binds or (right_binds == binds and symbol in "-/"):
            right = f"({right})"
        trees.append((left + symbol + right, value, binds))
    return trees[0][0], trees[0][1]


def prompt_of(numbers: Iterable[int], value: int | Fraction | None) -> str:
    """`4,7,9,12=48:` for reaching 48 with these, or "" unless it is a whole number from 1 to 99."""
    if value is None or value != int(value) or not 1 <= value <= 99:
        return ""
    return f"{','.join(map(str, sorted(numbers)))}={int(value)}:"


def is_held_out(text: str) -> bool:
    """Whether a problem belongs to the held-out tenth, as a hash of its text decides, not luck."""
    return zlib.crc32(text.encode()) % 10 == 0


def worked_examples() -> set[str]:
    """The prompts of the problems whose solutions rs_grpo.py shows to a pretrained model."""
    parsed = [re.findall("[0-9]+", line)[:4] for line in EXAMPLES.splitlines()]  # the target last
    return {prompt_of(map(int, numbers), int(target)) for *numbers, target in parsed}


def problems(size: int, count: int, held_out: bool) -> list[str]:
    """The prompts of `count` different problems of `size` numbers, held out or to train on."""
    of_size = "" if size == 4 else f" of {size}"
    rng = random.Random(f"countdown{of_size}, held out: {held_out}")
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        numbers = [rng.randint(1, 13) for _ in range(size)]
        prompt = prompt_of(numbers, random_expression(numbers, rng, whole=size == 3)[1])
        if prompt and is_held_out(prompt) == held_out and prompt not in worked_examples():
            prompts[prompt] = None
    return list(prompts)


def in_words(prompt: str) -> str:
    """`Numbers: 2, 3, 5. Target: 11. Answer:` for `2,3,5=11:`, as EXAMPLES ask it."""
    numbers, target = prompt.removesuffix(":").split("=")
    return f"Numbers: {numbers.replace(',', ', ')}. Target: {target}. Answer:"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; `<pad>` fills up and `<eos>` ends a completion."""
    symbols = ["<pad>", "<eos>", "<unk>", *string.digits, *"+-*/()", ",", "=", ":"]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Random weights: width 128, 4 layers of 4 narrow heads, as on a CPU the cache costs most."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def example(rng: random.Random) -> tuple[str, str]:
    """A prompt and one expression that solves it, never of a held-out problem."""
    while True:
        numbers = [rng.randint(1, 13) for _ in range(4)]
        if rng.random() < CHAIN_SHARE:
            signs = [1] + [rng.choice((1, -1)) for _ in numbers[1:]]
            value = sum(sign * n for sign, n in zip(signs, numbers))
            terms = [("+" if sign > 0 else "-") + str(n) for sign, n in zip(signs, numbers)]
            text = "".join(terms).removeprefix("+")
        else:
            text, value = random_expression(numbers, rng)
        prompt = prompt_of(numbers, value)
        if prompt and not is_held_out(prompt):
            return prompt, text


def batch(rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Token ids (B, L), padded on the right, and labels (B, L), −100 on prompt and padding."""
    rows, labels = [], []
    for prompt, text in (example(rng) for _ in range(BATCH)):
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        answer_ids = tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        rows.append(torch.tensor(prompt_ids + answer_ids))
        labels.append(torch.tensor([-100] * len(prompt_ids) + answer_ids))
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    return ids, pad_sequence(labels, batch_first=True, padding_value=-100)


def main() -> None:
    parser = argparse.ArgumentParser("pretrain", description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--out", type=Path, default=EMBEDDED, help="folder to write (default: countdown-base)")
    flag("--steps", type=int, default=600, help="of 256 examples each (default: 600)")
    flag("--seed", type=int, default=0, help="of examples and first weights (default: 0)")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    settings = {"lr": LEARNING_RATE, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    schedule = one_cycle(optimizer, LEARNING_RATE, total_steps=args.steps, pct_start=0.1)

    progress = trange(args.steps, desc="pre-training", unit="step")
    for _ in progress:
        ids, labels = batch(rng, tokenizer)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")

    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    for name, size, count, held_out in PROBLEMS:
        prompts = problems(size, count, held_out)
        lines = prompts if size == 4 else map(in_words, prompts)
        (args.out / name).write_text("\n".join(lines) + "\n")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {args.out}")


if __name__ == "__main__":
    main()
