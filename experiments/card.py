"""What to measure first on a new card: sampling, rounding and memory of one model.

    python experiments/card.py --model FOLDER                       # on the device that auto finds
    python experiments/card.py --model FOLDER --sequences 128 512 --max-tokens 256

- Tokens a second of `sample`, and of `model.generate` with its dynamic and its static cache, on the
  same prompts; the stop tokens are left out, so that every sequence has its full length.
- |Δ log π| of a sampled token between the sampler's one-token steps and the learner's whole rows,
  and the spread of its sum over a completion, for each precision.
- The peak memory of sampling and of learning, on CUDA.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rs_grpo import (  # noqa: E402
    TASKS,
    Config,
    Rollouts,
    completion_logprobs,
    hidden_states,
    load_policy,
    pad,
    policy_gradient,
    prefill,
    sample,
    scaled_logits,
)


def tokens_a_second(policy, prompts, samples, config, method):
    """Of one call after one to warm up; method is "sample", "dynamic" or "static"."""
    device, tokens = policy.model.device, len(prompts) * samples * config.max_tokens
    ids, mask = pad(policy, prompts, "left")
    generation = {"do_sample": True, "top_k": 0, "cache_implementation": method}
    generation |= {"num_return_sequences": samples, "eos_token_id": None, "pad_token_id": 0}
    for _ in range(2):
        started = time.perf_counter()
        with torch.no_grad(), policy.autocast():
            if method == "sample":
                generator = torch.Generator(device).manual_seed(0)
                endless = policy._replace(stop_ids=policy.stop_ids[:0])
                sample(endless, prompts, samples, config, generator)
            else:
                length = config.max_tokens
                limits = {"max_new_tokens": length, "min_new_tokens": length}
                policy.model.generate(ids, attention_mask=mask.long(), **generation, **limits)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return tokens / seconds


@torch.no_grad()
def sampler_logprobs(policy, prompts, completions, temperature):
    """log π as the sampler computes it, token by token through the cache: (B, T), 0 on padding."""
    ids, mask = pad(policy, completions, "right")
    hidden, seen, cache = prefill(policy, prompts)
    columns = []
    for t in range(ids.shape[1]):
        logprobs = scaled_logits(policy, hidden, temperature).log_softmax(-1)
        columns.append(logprobs.gather(1, ids[:, t : t + 1]))
        seen = F.pad(seen, (0, 1), value=True)
        hidden = hidden_states(policy, ids[:, t : t + 1], seen, cache)[:, 0]
    return torch.cat(columns, 1) * mask


def rounding(policy, prompts, samples, config):
    """Mean |Δ log π| of a token between sampler and learner, and the std of a completion's sum."""
    generator = torch.Generator(policy.model.device).manual_seed(0)
    with policy.autocast():
        completions, _ = sample(policy, prompts, samples, config, generator)
    prompts = [prompt for prompt in prompts for _ in range(samples)]
    with policy.autocast():
        sampler = sampler_logprobs(policy, prompts, completions, config.temperature)
    with torch.no_grad(), policy.autocast():
        learner = completion_logprobs(policy, prompts, completions, config.temperature)
    delta, tokens = learner - sampler, sum(map(len, completions))
    return (delta.abs().sum() / tokens).item(), delta.sum(1).std().item()


def peak_memory(policy, prompts, samples, config):
    """GiB at the peak of sampling and of learning, the weights included; on CUDA."""
    peaks, generator = [], torch.Generator("cuda").manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    with policy.autocast():
        completions, entropy = sample(policy, prompts, samples, config, generator)
    peaks.append(torch.cuda.max_memory_allocated() / 2**30)
    torch.cuda.reset_peak_memory_stats()
    advantages = torch.linspace(-1, 1, samples).expand(len(prompts), samples)
    rollouts = Rollouts(prompts, completions, entropy, [], [], advantages)
    with policy.autocast():
        policy_gradient(policy, rollouts, advantages, config)
    peaks.append(torch.cuda.max_memory_allocated() / 2**30)
    return peaks


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--device", default="auto", help="as in rs_grpo.py (%(default)s)")
    parser.add_argument("--sequences", type=int, nargs="+", default=[128, 512], help="(128 512)")
    parser.add_argument("--max-tokens", type=int, default=256, help="of each (%(default)s)")
    args = parser.parse_args()
    common = {"model": args.model, "task": "countdown-text", "device": args.device}
    config = Config(**common, max_tokens=args.max_tokens, samples=16)
    task = TASKS[config.task](config)
    policy = load_policy(config, task)
    texts = [task.examples + text for text, _ in task.train[: max(args.sequences) // 16]]
    prompts = [tuple(ids) for ids in policy.tokenizer(texts).input_ids]
    for sequences in args.sequences:
        some = prompts[: max(1, sequences // 16)]
        for method in ("sample", "dynamic", "static"):
            rate = tokens_a_second(policy, some, 16, config, method)
            print(f"{sequences} sequences of {args.max_tokens}: {method:>8} {rate:,.0f} tokens/s")
    for precision in ("float16", "bfloat16", "float32"):
        rounded = load_policy(Config(**common, precision=precision), task)
        token, total = rounding(rounded, prompts[:4], 16, config)
        print(f"{precision:>10}: mean |Δ log π| {token:.5f} a token, std {total:.4f} a completion")
    if policy.model.device.type == "cuda":
        sampling, learning = peak_memory(policy, prompts, 16, config)
        rows = f"{len(prompts) * 16} rows of {args.max_tokens}"
        print(f"peak memory, {rows}: sampling {sampling:.1f} GiB, learning {learning:.1f} GiB")


if __name__ == "__main__":
    main()
