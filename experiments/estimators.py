"""rs_grpo.py with five more estimators: --advantage chen, mahdavi, pkpo, pkpo_loo, maxrl, and --k.

Each seeks what the risk-sensitive advantage seeks, a better pass@k, by other means.

    python experiments/estimators.py --advantage chen --k 4
    python experiments/estimators.py --advantage maxrl

Of 16 samples, the advantage of a correct / of a wrong one, if c are correct, at k = 4:

                 c = 1          c = 4          c = 8         c = 15
    chen      1.732/−.115     .611/−.204     .200/−.200       0/0
    mahdavi   3.090/−.206    1.266/−.422     .250/−.250   .0001/−.0009
    pkpo       .250/.050      .250/.159      .250/.231     .250/.250
    pkpo_loo   .250/0         .121/0         .031/0           0/0
    maxrl        15/−1           3/−1           1/−1       .067/−1

As in rs_grpo.py, rewards (P, N) become advantages (P, N) of the same dtype, float32 for integers.
Of the N samples of a prompt c are correct, p = c/N. What each is worth: experiments/README.md.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rs_grpo  # noqa: E402


def chen_advantage(rewards, k):
    """Pass@k training (arXiv 2508.10751): standardise the reward "one of k samples is right".

        ρ = 1 − C(N−c,k)/C(N,k)        σ = √(ρ(1−ρ))
        Â⁺ = (1−ρ)/(σ+1e-6)            Â⁻ = (1−ρ − C(N−c−1,k−1)/C(N−1,k−1))/(σ+1e-6)

    Exactly 0 once fewer than k samples are wrong: then any k of them hold a right one.
    Raises ValueError for rewards other than 0 and 1, or k outside 1 … N.
    """
    rewards, c = groups(rewards, k)
    n = rewards.shape[1]
    # By c: the chances that k samples are wrong, and that k − 1 others beside a wrong one are.
    none = [math.comb(n - i, k) / math.comb(n, k) for i in range(n + 1)]
    beside = [math.comb(max(n - i - 1, 0), k - 1) / math.comb(n - 1, k - 1) for i in range(n + 1)]
    miss = torch.tensor(none, dtype=torch.float64)[c]  # (P, 1): 1 − ρ
    wrong = miss - torch.tensor(beside, dtype=torch.float64)[c]  # (P, 1)
    sigma = (miss * (1 - miss)).sqrt()  # (P, 1)
    return (torch.where(rewards == 1, miss, wrong) / (sigma + 1e-6)).to(rewards)


def mahdavi_advantage(rewards, k):
    """The policy gradient of pass@k = 1 − (1−p)^k (Mahdavi et al., Beyond Accuracy, AI4Math 2025).

        Â_i = k (1−p)^{k−1} (r_i − p)

    Whether the authors also divide by the group's standard deviation isn't known; here they don't.
    Raises ValueError as `chen_advantage` does.
    """
    rewards, c = groups(rewards, k)
    p = c.double() / rewards.shape[1]  # (P, 1)
    return (k * (1 - p) ** (k - 1) * (rewards - p)).to(rewards)


def pkpo_advantage(rewards, k):
    """PKPO (arXiv 2505.15201), equation 19: the best reward of k samples, binary or continuous.

        s_i = (1/C(N,k)) Σ_{I∋i} max_{j∈I} r_j        over all subsets I of k samples

    Sorted upwards and counted from 0, sample i is the best of C(i,k−1) of its subsets, and a better
    one, j, of C(j−1,k−2). Positive throughout: only a group without a success has no signal.
    Raises ValueError for k outside 1 … N.
    """
    rewards, _ = groups(rewards, k, binary=False)
    r, order = rewards.double().sort(1)  # (P, N), upwards
    n = r.shape[1]
    own = subsets(range(n), k - 1) * r  # (P, N): what r_j adds to sample j
    others = subsets(range(-1, n - 1), k - 2) * r  # (P, N): and to each sample below it
    above = others.sum(1, keepdim=True) - others.cumsum(1)  # (P, N): the sum over j > i
    scores = (own + above) / float(math.comb(n, k))
    return torch.empty_like(r).scatter_(1, order, scores).to(rewards)


def pkpo_loo_advantage(rewards, k):
    """PKPO with leave-one-out minus one, equation 33: what a sample adds to the best of the others.

        s_i = (1/C(N,k)) Σ_{I∋i} (max_{j∈I} r_j − max_{j∈I∖i} r_j)

    Sample i adds something where it is the best of its subset: r_i − r_j, with j the second best,
    in C(j,k−2) of them. Exactly 0 for a wrong sample, and for all if fewer than k − 1 are wrong.
    Raises ValueError for k outside 2 … N.
    """
    rewards, _ = groups(rewards, k, least=2, binary=False)
    r, order = rewards.double().sort(1)  # (P, N), upwards
    n = r.shape[1]
    gains = r[:, :, None] - r[:, None, :]  # (P, N, N): r_i − r_j
    scores = (gains * subsets(range(n), k - 2)).tril(-1).sum(2) / float(math.comb(n, k))
    return torch.empty_like(r).scatter_(1, order, scores).to(rewards)


def maxrl_advantage(rewards):
    """MaxRL (arXiv 2602.02710): Â_i = (r_i − p)/p, and 0 where p = 0.
    The gradient of log p, and the limit of β times the risk-sensitive advantage as β → ∞.
    Raises ValueError for rewards other than 0 and 1.
    """
    rewards, c = groups(rewards)
    p = c.double() / rewards.shape[1]  # (P, 1)
    return torch.where(c > 0, (rewards - p) / p, 0.0).to(rewards)


def groups(rewards, k=1, least=1, binary=True):
    """Rewards as floating-point (P, N), and how many are 1, (P, 1). Raises ValueError if unfit."""
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be (P, N), a group a row; got {tuple(rewards.shape)}")
    if binary and not ((rewards == 0) | (rewards == 1)).all():
        raise ValueError("only rs, mean, grpo and pkpo take rewards other than 0 and 1")
    if not least <= k <= rewards.shape[1]:
        raise ValueError(f"k must be from {least} to the {rewards.shape[1]} samples; got {k}")
    counts = (rewards == 1).sum(1, keepdim=True)
    return rewards if rewards.is_floating_point() else rewards.float(), counts


def subsets(tops, size):
    """C(top, size) for each of the tops, 0 for a negative one or size: (N,), as float64."""
    counts = [math.comb(top, size) if min(top, size) >= 0 else 0 for top in tops]
    return torch.tensor(list(map(float, counts)), dtype=torch.float64)


rs_grpo.ADVANTAGES.update(
    chen=lambda rewards, config: chen_advantage(rewards, config.k),
    mahdavi=lambda rewards, config: mahdavi_advantage(rewards, config.k),
    pkpo=lambda rewards, config: pkpo_advantage(rewards, config.k),
    pkpo_loo=lambda rewards, config: pkpo_loo_advantage(rewards, config.k),
    maxrl=lambda rewards, config: maxrl_advantage(rewards),
)


@dataclass(frozen=True)
class Config(rs_grpo.Config):
    advantage: str = "rs"  # rs, mean, grpo, chen, mahdavi, pkpo, pkpo_loo or maxrl
    k: int = 4  # the k of chen, mahdavi, pkpo and pkpo_loo; the paper compares at 4

    def __post_init__(self):
        least = {"chen": 1, "mahdavi": 1, "pkpo": 1, "pkpo_loo": 2}.get(self.advantage)
        if least and not least <= self.k <= self.samples:
            wanted = f"from {least} to --samples, {self.samples}, for --advantage {self.advantage}"
            raise rs_grpo.BadInput(f"--k is {self.k}, but must be {wanted}")


if __name__ == "__main__":
    rs_grpo.main(config_class=Config)
