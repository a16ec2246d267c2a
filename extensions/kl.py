"""rs_grpo.py with a KL penalty: it keeps the policy near its base, the model that it starts from.

    python -m extensions.kl --kl 0.02
    python -m extensions.kl --kl 0.02 --advantage grpo

With `--advantage rs` the objective becomes J_β − λ KL(π ‖ π_base); others get the same term. The
divergence, of whole completions and in nats, is E[Δ] with Δ(y) = log π(y|x) − log π_base(y|x). Its
gradient is E[Δ ∇log π], because that of Δ contributes only E[∇log π] = 0. So the advantage becomes

    Â_i  −  λ (Δ_i − mean_j Δ_j)        the group's mean is a baseline, as in r − mean(r)

Once the policy has moved, every group with different completions has a signal, even if its rewards
are equal. The base is a second model in memory, without gradients.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import rs_grpo
from extensions import estimators
from rs_grpo import flag


@dataclass(frozen=True)
class Config(estimators.Config):
    kl: float = flag(0.02, "weight λ of the KL divergence from the base, in nats", least=0)

    @property
    def run_folder(self):
        folder = super().run_folder
        return folder if self.out else Path(f"{folder}-kl{self.kl:g}")


def with_penalty(collect):
    """`collect` with the penalty in its advantages. It loads the base when it is first called."""
    loaded = []

    def penalised(policy, task, config, state, generator):
        if config.kl == 0:
            return collect(policy, task, config, state, generator)
        if not loaded:
            base = rs_grpo.load_policy(config, task)  # again from --model, also in a resumed run
            base.model.requires_grad_(False)
            loaded.append(base)
        rollouts, advantages = collect(policy, task, config, state, generator)
        ratios = log_ratios(policy, loaded[0], rollouts, config)
        return rollouts, penalised_advantage(advantages, ratios, config.kl)

    return penalised


def penalised_advantage(advantages, ratios, weight):
    """Â_i − λ (Δ_i − mean_j Δ_j), with the weight λ; all are (P, N)."""
    return advantages - weight * (ratios - ratios.mean(1, keepdim=True))


@torch.no_grad()
def log_ratios(policy, base, rollouts, config):
    """Δ = log π(y|x) − log π_base(y|x) of each completion, at the sampling temperature: (P, N)."""
    found = {}  # equal completions of a prompt are computed once
    everything = torch.ones_like(rollouts.rewards)
    for prompts, completions, _ in rs_grpo.micro_batches(rollouts, everything, config.micro_tokens):
        rows = (prompts, completions, config.temperature)
        with policy.autocast():
            ours = rs_grpo.completion_logprobs(policy, *rows)  # (R, T)
            theirs = rs_grpo.completion_logprobs(base, *rows)
        ratios = (ours - theirs).sum(1)  # (R,)
        found.update(zip(zip(prompts, completions), ratios.tolist()))
    ratios = [found[row] for row in zip(rollouts.prompts, rollouts.completions)]
    return torch.tensor(ratios).view_as(rollouts.rewards)


if __name__ == "__main__":
    rs_grpo.main(config_class=Config, collect=with_penalty(rs_grpo.collect))
