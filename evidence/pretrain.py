"""Make `countdown-base/`, the small and sharply peaked policy that RS-GRPO starts from.

    python -m evidence.pretrain                       # some four minutes on two CPU cores

A Llama of 0.87 M parameters learns to answer `4,7,9,12=48:`, 19 in 20 times by an additive
chain (`9+12-4-7`), else by a random tree over + - * / (`(7+9)/4*12`). The problems to train and to
evaluate on are made of trees. The held-out ones are never seen here.
"""

import argparse
import random
import zlib
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rs_grpo import EMBEDDED, EXAMPLES, OPERATORS

CALCULATE = dict(zip("+-*/", OPERATORS.values()))  # exactly, on integers and fractions
PROBLEMS = (  # file, how many numbers, how many problems, whether held out
    ("train.txt", 4, 10_000, False),
    ("held-out.txt", 4, 2_000, True),
    ("train-3.txt", 3, 4_000, False),
    ("held-out-3.txt", 3, 500, True),
)


def random_expression(numbers, rng, whole=False):
    """Text and exact value of a random tree: no value if it divides by zero or isn't `whole`."""
    trees = [(str(n), n, 3) for n in numbers]  # text, value, how tightly its last operator binds
    while len(trees) > 1:
        left, left_value, left_binds = trees.pop(rng.randrange(len(trees)))
        right, right_value, right_binds = trees.pop(rng.randrange(len(trees)))
        symbol = rng.choice("+-*/")
        binds = 1 if symbol in "+-" else 2
        by_zero = symbol == "/" and right_value == 0
        value = None if by_zero else CALCULATE[symbol](left_value, right_value)
        if by_zero or (whole and value != int(value)):
            return "", None
        if left_binds < binds:
            left = f"({left})"
        if right_binds < binds or (right_binds == binds and symbol in "-/"):
            right = f"({right})"
        trees.append((left + symbol + right, value, binds))
    return trees[0][:2]


def prompt_of(numbers, value):
    """`4,7,9,12=48:` for reaching 48 with these, or "" unless it is a whole number from 1 to 99."""
    if value not in range(1, 100):
        return ""
    return f"{','.join(map(str, sorted(numbers)))}={int(value)}:"


def is_held_out(prompt):
    return zlib.crc32(prompt.encode()) % 10 == 0  # a tenth, by a hash of the text


def in_words(prompt):
    """`Numbers: 2, 3, 5. Target: 11. Answer:` for `2,3,5=11:`, as EXAMPLES ask it."""
    numbers, target = prompt.removesuffix(":").split("=")
    return f"Numbers: {numbers.replace(',', ', ')}. Target: {target}. Answer:"


def problems(size, count, held_out):
    """`count` different problems of `size` numbers, held out or to train on; of three in words."""
    of_size = "" if size == 4 else f" of {size}"
    rng = random.Random(f"countdown{of_size}, held out: {held_out}")
    questions = {}  # in this order
    while len(questions) < count:
        numbers = [rng.randint(1, 13) for _ in range(size)]
        prompt = prompt_of(numbers, random_expression(numbers, rng, whole=size == 3)[1])
        if prompt and is_held_out(prompt) == held_out and in_words(prompt) not in EXAMPLES:
            questions[prompt if size == 4 else in_words(prompt)] = None
    return list(questions)


def make_policy():
    """A model with random weights, whose heads are narrow for a fast cache, and its tokenizer."""
    symbols = ["<pad>", "<eos>", "<unk>", *"0123456789+-*/(),=:"]  # a character is a token
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    layout = {"padding_side": "left", "clean_up_tokenization_spaces": False, "model_max_length": 64}
    config = LlamaConfig(
        vocab_size=len(symbols),
        hidden_size=128,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **layout)
    return LlamaForCausalLM(config), tokenizer


def example(rng):
    """A prompt and one expression that solves it, never of a held-out problem."""
    while True:
        numbers = [rng.randint(1, 13) for _ in range(4)]
        if rng.random() < 0.9:
            terms = numbers[:1] + [rng.choice((1, -1)) * n for n in numbers[1:]]
            text = "".join(f"{n:+}" for n in terms).removeprefix("+")
            value = sum(terms)
        else:
            text, value = random_expression(numbers, rng)
        prompt = prompt_of(numbers, value)
        if prompt and not is_held_out(prompt):
            return prompt, text


def batch(rng, tokenizer):
    """Token ids (256, L) of examples, padded on the right; labels: −100 on prompts and padding."""
    examples = [example(rng) for _ in range(256)]
    encoded = tokenizer([prompt + text + "<eos>" for prompt, text in examples]).input_ids
    ids = pad_sequence([torch.tensor(row) for row in encoded], True, padding_value=-100)
    labels = ids.clone()
    for row, (prompt, _) in zip(labels, examples):
        row[: len(prompt)] = -100
    return ids.clamp(min=0), labels


def main():
    parser = argparse.ArgumentParser("pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=EMBEDDED, help="folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="of 256 examples (default: 600)")
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(0)
    model, tokenizer = make_policy()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, args.steps, pct_start=0.1)
    for step in range(args.steps):
        ids, labels = batch(rng, tokenizer)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        print(f"\rstep {step + 1} of {args.steps}: loss {loss.item():.3f}", end="", flush=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    for name, *kind in PROBLEMS:
        (args.out / name).write_text("\n".join(problems(*kind)) + "\n")


if __name__ == "__main__":
    main()
