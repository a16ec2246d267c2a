"""Decode with a static cache and the step captured in a CUDA graph, for small models on a GPU.

A decode step of a small model takes the GPU less time than Python needs to launch its hundreds of kernels. With fixed
shapes and fixed buffers the step can be recorded once and replayed as a single launch. `sample_static` is `rs_grpo.sample`
in that form: same arguments, same distribution, and without a graph (always so on a CPU) it runs the same steps one by one.

    python experiments/static_decoding.py --model FOLDER      # tokens a second of this, rs_grpo.sample and model.generate

    # train with it, with the flags of rs_grpo.py:
    python -c "import rs_grpo; from experiments.static_decoding import sample_static; rs_grpo.sample = sample_static; rs_grpo.main()" --device cuda

The graph has never run on a GPU: none was at hand. The tests record and replay the step on a CPU, which shows that the
recorded step depends on nothing but its buffers. The first lines that the benchmark prints compare it with the plain step.

What it costs: keys and values of B·(L + T) tokens from the first token on; rows that ended are computed until the last one
has; every call records anew, after three plain steps to warm up. Models with sliding windows are refused, and one that reads
a number back from the GPU in its step (RoPE of type "dynamic") can't be captured. With transformers 5.17, grouped-query
attention under a mask copies the whole cache for every query head at each step; 5.23 doesn't.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.more_tasks import countdown_in_words  # noqa: E402
from rs_grpo import BadInput, Config, Policy, Rollouts, cache_argument, countdown_problems, encode, load_policy, prefill, sample  # noqa: E402

CHECK_EVERY = 16  # tokens between two looks at whether a row is left; at each the host waits for the GPU


@torch.no_grad()
def sample_static(
    policy: Policy,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    samples: int,
    config: Config,
    generator: torch.Generator,
    graph: bool | None = None,
) -> Rollouts:
    """`rs_grpo.sample` with fixed shapes; `graph` says whether to capture the step, by default where the device is CUDA."""
    model, max_tokens = policy.sampler, config.max_tokens
    (P, L), device = prompt_ids.shape, prompt_ids.device
    head = model.get_output_embeddings()
    hidden, prefilled = prefill(model, prompt_ids, prompt_mask)
    logits = head(hidden).repeat_interleave(samples, 0)  # (B, V)
    cache = static_cache(model.config, prefilled, samples, L + max_tokens)
    del prefilled

    # What the step reads, changed in place only. The mask has its four dimensions and is added to the attention scores:
    # transformers takes such a mask as it is, where it would build a new one each time from a mask of two.
    token = torch.zeros(P * samples, 1, dtype=torch.long, device=device)  # (B, 1)
    positions = prompt_mask.sum(1, keepdim=True).repeat_interleave(samples, 0)  # (B, 1): the tokens before this one
    hide = torch.finfo(model.dtype).min
    mask = torch.full((P * samples, 1, 1, L + max_tokens), hide, dtype=model.dtype, device=device)
    mask[:, 0, 0, :L].masked_fill_(prompt_mask.bool().repeat_interleave(samples, 0), 0)

    def step() -> Tensor:  # (B, V); the cache itself counts where the next key goes
        past = {cache_argument(type(model.base_model)): cache}
        out = model.base_model(token, attention_mask=mask, position_ids=positions, **past)
        return head(out.last_hidden_state[:, -1])

    def rewind() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(L)

    forward = captured(step, rewind, device) if (device.type == "cuda" if graph is None else graph) else step
    ids = torch.zeros(P * samples, max_tokens, dtype=torch.long, device=device)  # (B, T)
    going = torch.ones(P * samples, dtype=torch.bool, device=device)  # (B,): which rows are still being written
    lengths = torch.zeros(P * samples, dtype=torch.long, device=device)  # (B,)
    entropy = torch.zeros((), dtype=torch.float64, device=device)
    for t in range(max_tokens):
        probs = torch.softmax(logits.float() / config.temperature, -1)  # (B, V)
        drawn = torch.multinomial(probs, 1, generator=generator)  # (B, 1)
        ids[:, t] = drawn[:, 0] * going
        lengths += going
        entropy += (torch.special.entr(probs).sum(1) * going).sum()
        going &= ~torch.isin(drawn[:, 0], policy.stop_ids)
        if t + 1 == max_tokens or ((t + 1) % CHECK_EVERY == 0 and not going.any()):
            break
        token.copy_(drawn)
        mask[..., L + t] = 0
        logits = forward()
        positions += 1
    ids = ids[:, : lengths.max()]
    completion_mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]  # (B, T)
    owner = torch.arange(P, device=device).repeat_interleave(samples)
    return Rollouts(prompt_ids, prompt_mask, owner, ids, completion_mask, (entropy / lengths.sum()).item())


def static_cache(config: Any, prefilled: Any, samples: int, length: int) -> Any:
    """A cache of fixed size, `length` tokens of B rows, that starts with the keys and values of each prompt N times."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    cache = StaticCache(config=config, max_cache_len=length)
    if any(type(layer) is not StaticLayer for layer in cache.layers):
        raise BadInput("static decoding needs full attention in every layer, which this model hasn't; use rs_grpo.sample")
    for i, layer in enumerate(prefilled.layers):
        cache.update(layer.keys.repeat_interleave(samples, 0), layer.values.repeat_interleave(samples, 0), i)
    return cache


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one for good: cuBLAS keeps a workspace for every stream that it has seen


def captured(step: Callable[[], Tensor], rewind: Callable[[], None], device: torch.device) -> Callable[[], Tensor]:
    """`step` as one CUDA graph, by PyTorch's pattern: warm up on a side stream, capture there, replay on the current one.

    Warming up lets libraries allocate what they may not while capturing; `rewind` takes back what it did to the cache.
    Capturing runs nothing. Each replay writes into the same output, so that is to be used before the next one.
    """
    stream = side_stream(device)
    with torch.cuda.device(device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
                rewind()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            output = step()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


# --- The benchmark ----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=Config().model, help="folder or hub id (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="(default: %(default)s)")
    parser.add_argument("--sequences", type=int, nargs="+", default=[128, 512], help="(default: %(default)s)")
    parser.add_argument("--samples", type=int, default=16, help="sequences of one prompt (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=256, help="tokens of each sequence, none shorter (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds after one to warm up (default: %(default)s)")
    args = parser.parse_args()
    try:
        config = Config(model=args.model, device=args.device, max_tokens=args.max_tokens)
        policy = load_policy(config)
    except BadInput as error:
        parser.exit(2, f"static_decoding.py: {error}\n")
    model, device, T, N = policy.sampler, policy.device, args.max_tokens, args.samples
    cuda = device.type == "cuda"
    print(f"{torch.cuda.get_device_name(device) if cuda else 'CPU, no graph'}, {model.dtype}, torch {torch.__version__}")

    endless = policy._replace(stop_ids=policy.stop_ids[:0])  # no stop: every sequence has T tokens, whoever draws it

    def by(sampler: Callable[..., Rollouts], **options: Any) -> Tensor:
        return sampler(endless, ids, mask, N, config, torch.Generator(device).manual_seed(0), **options).ids

    def generate(cache: str) -> Tensor:
        settings = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, cache_implementation=cache)
        inputs = ids.repeat_interleave(N, 0), mask.repeat_interleave(N, 0)
        out = model.generate(inputs[0], attention_mask=inputs[1], min_new_tokens=T, max_new_tokens=T, **settings)
        return out[:, ids.shape[1] :]

    def tokens_per_second(run: Callable[[], Tensor]) -> float:
        torch.cuda.synchronize(device) if cuda else None
        start, tokens = time.perf_counter(), run().numel()
        torch.cuda.synchronize(device) if cuda else None
        return tokens / (time.perf_counter() - start)

    contenders = {
        "rs_grpo.sample": lambda: by(sample),
        "sample_static without graph": lambda: by(sample_static, graph=False),
        **({"sample_static": lambda: by(sample_static)} if cuda else {}),
        "generate, dynamic cache": lambda: generate("dynamic"),
        "generate, static cache": lambda: generate("static"),  # which transformers compiles where it can
    }
    for sequences in args.sequences:
        prompts = [countdown_in_words(problem).prompt for problem in countdown_problems(sequences // N, held_out=True)]
        ids, mask = encode(policy, prompts)
        print(f"\n{len(prompts)} prompts of at most {ids.shape[1]} tokens x {N} samples, {T} tokens each")
        if cuda:
            share = (by(sample_static) == by(sample_static, graph=False)).double().mean().item()
            print(f"{share:10.1%} of the tokens are the same with the graph as without, from the same seed")
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(args.rounds + 1):  # they alternate, so that a noisy machine slows all of them
            for name, run in contenders.items():
                rates[name].append(tokens_per_second(run))
        for name, (_, *timed) in rates.items():
            print(f"{median(timed):10.0f} tokens/s  {name} ({min(timed):.0f} to {max(timed):.0f})")


if __name__ == "__main__":
    main()
