"""Make `countdown-base/`, the small and sharply peaked policy that RS-GRPO starts from.

    python experiments/pretrain.py                    # some four minutes on two CPU cores

A Llama of 0.87 M parameters reads `4,7,9,12=48:` and writes an expression. Nine in ten of the expressions it learns
from are additive chains (`9+12-4-7`), one in ten is a random tree over + - * / (`(7+9)/4*12`); reinforcement learning
and evaluation draw their problems from the trees alone. So the policy nearly always tries a chain, which cannot solve
half of them: the exploration dilemma that the risk-sensitive objective is made for.

No problem of the held-out tenth (`is_held_out`) is ever seen here. The problems to train and to be judged on, prompts of
random trees on either side of that line, are written beside the model: train.txt and held-out.txt.
"""

from __future__ import annotations

import argparse
import operator
import random
import re
import string
import sys
import zlib
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from rs_grpo import EXAMPLES  # noqa: E402

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": Fraction}  # on integers and fractions: exact
CHAIN_SHARE = 0.9
BATCH = 256
LEARNING_RATE = 3e-3
PROBLEMS = (  # file, how many numbers, how many problems, from which side
    ("train.txt", 4, 10_000, False),
    ("held-out.txt", 4, 2_000, True),
    ("train-3.txt", 3, 4_000, False),
    ("held-out-3.txt", 3, 500, True),
)


def random_expression(numbers: Iterable[int], rng: random.Random) -> tuple[str, int | Fraction | None]:
    """A random binary tree over `numbers` and + - * /, with the fewest brackets that it needs: its text and its exact value.

    The value is None where it divides by zero.
    """
    trees = [(str(n), n, 3) for n in numbers]  # (text, value, how tightly its outermost operator binds)
    while len(trees) > 1:
        left, left_value, left_binds = trees.pop(rng.randrange(len(trees)))
        right, right_value, right_binds = trees.pop(rng.randrange(len(trees)))
        symbol = rng.choice("+-*/")
        binds = 1 if symbol in "+-" else 2
        if symbol == "/" and right_value == 0:
            return "", None
        value = OPERATORS[symbol](left_value, right_value)
        if left_binds < binds:
            left = f"({left})"
        if right_binds < binds or (right_binds == binds and symbol in "-/"):
            right = f"({right})"
        trees.append((left + symbol + right, value, binds))
    return trees[0][0], trees[0][1]


def prompt_of(numbers: Iterable[int], value: int | Fraction | None) -> str:
    """The prompt of reaching `value` with `numbers`, such as `4,7,9,12=48:`, or "" unless it is a whole number from 1 to 99."""
    if value is None or value != int(value) or not 1 <= value <= 99:
        return ""
    return f"{','.join(map(str, sorted(numbers)))}={int(value)}:"


def is_held_out(text: str) -> bool:
    """Whether a problem belongs to the held-out tenth: decided by a hash of what it asks, so never by luck."""
    return zlib.crc32(text.encode()) % 10 == 0


def problems(size: int, count: int, held_out: bool) -> list[str]:
    """The prompts of `count` different problems of `size` numbers, of the training side or of the held-out one.

    Without the worked examples that rs_grpo.py shows to a pretrained model.
    """
    rng = random.Random(f"countdown, held out: {held_out}" if size == 4 else f"countdown of {size}, held out: {held_out}")
    shown = [re.findall("[0-9]+", line)[:4] for line in EXAMPLES.splitlines()]  # three numbers and the target
    shown = {prompt_of(map(int, numbers), int(target)) for *numbers, target in shown}
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        numbers = [rng.randint(1, 13) for _ in range(size)]
        prompt = prompt_of(numbers, random_expression(numbers, rng)[1])
        if prompt and is_held_out(prompt) == held_out and prompt not in shown:
            prompts[prompt] = None
    return list(prompts)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; `<pad>` fills up and `<eos>` ends a completion."""
    symbols = ["<pad>", "<eos>", "<unk>", *string.digits, *"+-*/()", ",", "=", ":"]
    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="<unk>"))
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
    """Width 128, 4 layers, 4 narrow heads (decoding on a CPU mostly moves the cache about), random weights."""
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
            text = "".join(("+" if sign > 0 else "-") + str(n) for sign, n in zip(signs, numbers))[1:]
        else:
            text, value = random_expression(numbers, rng)
        prompt = prompt_of(numbers, value)
        if prompt and not is_held_out(prompt):
            return prompt, text


def batch(rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, L), padded on the right, and labels (B, L): −100 on the prompt and the padding."""
    rows, labels = [], []
    for prompt, text in (example(rng) for _ in range(BATCH)):
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        answer_ids = tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        rows.append(torch.tensor(prompt_ids + answer_ids))
        labels.append(torch.tensor([-100] * len(prompt_ids) + answer_ids))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id), pad(labels, batch_first=True, padding_value=-100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "countdown-base", help="folder to write; rs_grpo.py reads its problems from countdown-base/ only (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of 256 examples (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the examples and the first weights (default: %(default)s)")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=args.steps, pct_start=0.1)

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
        (args.out / name).write_text("".join(f"{prompt}\n" for prompt in problems(size, count, held_out)))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {args.out}")


if __name__ == "__main__":
    main()
