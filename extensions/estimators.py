"""rs_grpo.py with other estimators: --advantage chen, mahdavi, pkpo, pkpo_loo, maxrl or mean; --k.

    python -m extensions.estimators --advantage chen --k 4
    python -m extensions.estimators --advantage maxrl

The advantage of a correct / of a wrong sample, if c of 16 are correct, at k = 4:

                 c = 1          c = 4          c = 8         c = 15
    chen      1.732/−.115     .611/−.204     .200/−.200       0/0
    mahdavi   3.090/−.206    1.266/−.422     .250/−.250   .0001/−.0009
    pkpo       .250/.050      .250/.159      .250/.231     .250/.250
    pkpo_loo   .250/0         .121/0         .031/0           0/0
    maxrl        15/−1           3/−1           1/−1       .067/−1

mean is r − mean(r), also known as Dr. GRPO (arXiv 2503.20783): the risk-sensitive one with β = 0.
As in rs_grpo.py, rewards (P, N) become advantages (P, N) of the same dtype, float32 for integers.
N is the number of samples of a prompt, c the number of correct ones, and p = c/N.
"""

from dataclasses import dataclass
from math import comb, sqrt

import torch

import rs_grpo
from rs_grpo import ADVANTAGES, BadInput, flag, risk_sensitive_advantage


def chen_advantage(rewards, k):
    """Pass@k training (arXiv 2508.10751): standardise the reward "one of k samples is right".

        ρ = 1 − C(N−c,k)/C(N,k)        σ = √(ρ(1−ρ))
        Â⁺ = (1−ρ)/(σ+1e-6)            Â⁻ = (1−ρ − C(N−c−1,k−1)/C(N−1,k−1))/(σ+1e-6)

    Exactly 0 once fewer than k samples are wrong: any k of them then hold a correct one.
    Raises ValueError for rewards other than 0 and 1, or k outside 1 … N.
    """
    rewards = checked(rewards, k)
    n = rewards.shape[1]
    table = [chen_pair(n, c, k) for c in range(n + 1)]
    table = torch.tensor(table, dtype=torch.float64)  # (N + 1, 2)
    right, wrong = table[correct(rewards)].unbind(2)  # (P, 1) each
    return torch.where(rewards == 1, right, wrong).to(rewards)


def chen_pair(n, c, k):
    """Â⁺ and Â⁻ of a group of n samples of which c are correct."""
    all_wrong = comb(n - c, k) / comb(n, k)  # 1 − ρ
    others_wrong = binomial(n - c - 1, k - 1) / comb(n - 1, k - 1)
    scale = sqrt(all_wrong * (1 - all_wrong)) + 1e-6
    return all_wrong / scale, (all_wrong - others_wrong) / scale


def mahdavi_advantage(rewards, k):
    """The policy gradient of pass@k = 1 − (1−p)^k (Mahdavi et al., Beyond Accuracy, AI4Math 2025).

        Â_i = k (1−p)^{k−1} (r_i − p)

    Whether the authors also divide by the group's standard deviation isn't known; this function
    doesn't. Raises ValueError as `chen_advantage` does.
    """
    rewards = checked(rewards, k)
    p = correct(rewards).double() / rewards.shape[1]  # (P, 1)
    weight = k * (1 - p) ** (k - 1)
    return (weight * (rewards - p)).to(rewards)


def pkpo_advantage(rewards, k):
    """PKPO (arXiv 2505.15201), equation 19: the best reward of k samples, binary or continuous.

        s_i = (1/C(N,k)) Σ_{I∋i} max_{j∈I} r_j        over all subsets I of k samples

    With the rewards in ascending order, counted from 0, sample i is the best of C(i,k−1) of its
    subsets, and a better sample j is the best of C(j−1,k−2) of them. Never negative: only a
    group without a success has no signal. Raises ValueError for k outside 1 … N.
    """
    rewards = checked(rewards, k)
    r, order = rewards.double().sort(1)  # (P, N), upwards
    n = rewards.shape[1]
    own = binomials(range(n), k - 1) * r  # (P, N): what r_j adds to sample j
    others = binomials(range(-1, n - 1), k - 2) * r  # (P, N): and to each sample below it
    above = others.sum(1, keepdim=True) - others.cumsum(1)  # (P, N): the sum over j > i
    scores = (own + above) / float(comb(n, k))
    return scores.gather(1, order.argsort(1)).to(rewards)


def pkpo_loo_advantage(rewards, k):
    """PKPO with leave-one-out minus one, equation 33: what a sample adds to the best of the others.

        s_i = (1/C(N,k)) Σ_{I∋i} (max_{j∈I} r_j − max_{j∈I∖i} r_j)

    Sample i adds something where it is the best of its subset: r_i − r_j, with j the second best,
    in C(j,k−2) of them. Exactly 0 for a wrong sample, and for all if fewer than k − 1 are wrong.
    Raises ValueError for k outside 2 … N.
    """
    rewards = checked(rewards, k, least=2)
    r, order = rewards.double().sort(1)  # (P, N), upwards
    n = rewards.shape[1]
    gains = r.unsqueeze(2) - r.unsqueeze(1)  # (P, N, N): r_i − r_j
    gains = gains.tril(-1)  # j < i only
    sums = (gains * binomials(range(n), k - 2)).sum(2)
    scores = sums / float(comb(n, k))
    return scores.gather(1, order.argsort(1)).to(rewards)


def maxrl_advantage(rewards):
    """MaxRL (arXiv 2602.02710): Â_i = (r_i − p)/p, and 0 where p = 0.
    The gradient of log p, and the limit of β times the risk-sensitive advantage as β → ∞.
    Raises ValueError for rewards other than 0 and 1.
    """
    rewards = checked(rewards)
    p = correct(rewards).double() / rewards.shape[1]  # (P, 1)
    return torch.where(p > 0, (rewards - p) / p, 0.0).to(rewards)


def checked(rewards, k=1, least=1):
    """Rewards as floating-point (P, N). Raises ValueError for another shape or k."""
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be (P, N), a group a row; got {tuple(rewards.shape)}")
    n = rewards.shape[1]
    if not least <= k <= n:
        raise ValueError(f"k must be from {least} to the {n} samples; got {k}")
    return rewards if rewards.is_floating_point() else rewards.float()


def correct(rewards):
    """How many samples of each group are correct: (P, 1). Raises ValueError for other rewards."""
    right = rewards == 1
    wrong = rewards == 0
    if not (right | wrong).all():
        raise ValueError("chen, mahdavi and maxrl take no rewards other than 0 and 1")
    return right.sum(1, keepdim=True)


def binomial(top, size):
    """C(top, size), and 0 if either is negative."""
    return comb(top, size) if min(top, size) >= 0 else 0


def binomials(tops, size):
    """`binomial` of each of the tops: (N,), in float64."""
    counts = [float(binomial(top, size)) for top in tops]
    return torch.tensor(counts, dtype=torch.float64)


def with_k(advantage):
    return lambda rewards, config: advantage(rewards, config.k)


ADVANTAGES.update(
    mean=lambda rewards, config: risk_sensitive_advantage(rewards, 0.0),
    chen=with_k(chen_advantage),
    mahdavi=with_k(mahdavi_advantage),
    pkpo=with_k(pkpo_advantage),
    pkpo_loo=with_k(pkpo_loo_advantage),
    maxrl=lambda rewards, config: maxrl_advantage(rewards),
)
LEAST_K = {"chen": 1, "mahdavi": 1, "pkpo": 1, "pkpo_loo": 2}


@dataclass(frozen=True)
class Config(rs_grpo.Config):
    advantage: str = flag("rs", "rs, mean, grpo, chen, mahdavi, pkpo, pkpo_loo or maxrl")
    k: int = flag(4, "k of chen, mahdavi, pkpo and pkpo_loo; the paper compares at 4", least=1)

    def __post_init__(self):
        least = LEAST_K.get(self.advantage)
        if least and not least <= self.k <= self.samples:
            wanted = f"from {least} to --samples, {self.samples}, for --advantage {self.advantage}"
            raise BadInput(f"--k is {self.k}, but must be {wanted}")


if __name__ == "__main__":
    rs_grpo.main(config_class=Config)
