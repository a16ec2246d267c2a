"""RS-GRPO on TRL: GRPOTrainer with its advantages replaced by `risk_sensitive_advantage`, for many GPUs and vLLM.

    pip install -r experiments/requirements.txt math-verify      # and for the last two: "trl[vllm]==1.16.0" deepspeed
    accelerate launch --num_processes 8 experiments/trl_rs_grpo.py --model Qwen/Qwen2.5-Math-1.5B --data train.jsonl
    accelerate launch --num_processes 8 experiments/trl_rs_grpo.py --model Qwen/Qwen2.5-Math-1.5B --data train.jsonl \\
        --use_vllm                                               # sample with vLLM, on the same GPUs
    accelerate launch --num_processes 8 --use_deepspeed --zero_stage 3 experiments/trl_rs_grpo.py \\
        --model Qwen/Qwen2.5-7B --data train.jsonl --use_vllm  # training state too large for one GPU: sharded

The data is a .jsonl file with `problem` and `answer`, or a name such as gsm8k; every option of TRL's GRPOConfig is one
here too. A trainer of your own needs only the class below, for GRPOTrainer, with GRPOConfig(scale_rewards="none").
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import HfArgumentParser
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.math_tasks import load_problems, math_rewards  # noqa: E402
from rs_grpo import risk_sensitive_advantage  # noqa: E402

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


class RSGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with the risk-sensitive advantage; written for trl 1.16.0.

    `beta_risk` is the β of RS-GRPO, 0 the mean baseline. It isn't called beta because GRPOConfig(beta=...) is the
    weight of TRL's KL penalty, a different thing (0 by default, as in the paper).

    Raises ValueError unless args has scale_rewards="none" and multi_objective_aggregation="sum_then_normalize": only
    then does TRL hand out r − mean(r), and the advantage of that is the advantage of r, since a constant cancels.
    """

    def __init__(self, model: Any, reward_funcs: Any, args: GRPOConfig, *rest: Any, beta_risk: float = 2, **more: Any):
        for name, wanted in (("scale_rewards", "none"), ("multi_objective_aggregation", "sum_then_normalize")):
            value = getattr(args, name, None)
            if value != wanted:
                raise ValueError(f"{name} is {value!r}, but must be {wanted!r}: RS-GRPO needs unscaled rewards")
        risk_sensitive_advantage(torch.zeros(1, 1), beta_risk)  # refuses a β that isn't finite before the model loads
        super().__init__(model, reward_funcs, args, *rest, **more)
        self.beta_risk = beta_risk

    def _calculate_rewards(self, *args: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args)  # (B, reward functions), of all processes; NaN where one gave None
        self._scored = ~rewards.isnan().all(1)  # (B,)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)  # before TRL shuffles the rows and splits them up
        mine = output["advantages"]  # (B / processes,): r − mean(r)
        rewards = self.accelerator.gather(mine)  # (B,): process after process, which makes shared groups whole
        samples = self.num_generations if self.model.training else self.num_generations_eval
        advantages = regrouped_advantage(rewards.cpu(), self._scored.cpu(), samples, self.beta_risk)  # (B,)
        start = self.accelerator.process_index * len(mine)
        output["advantages"] = advantages[start : start + len(mine)].to(mine)
        log = self._logs["advantages"]  # a deque for log_completions, which ends with TRL's own advantages
        kept = list(log)[: -len(advantages)]
        log.clear()
        log.extend(kept + advantages.tolist())
        return output


def regrouped_advantage(rewards: Tensor, scored: Tensor, samples: int, beta: float) -> Tensor:
    """`risk_sensitive_advantage` of a flat batch in which each `samples` rows in turn are a group: (B,) to (B,).

    rewards: (B,), up to a constant in each group. scored: (B,), False for a completion that no reward function judged:
    it gets 0 and its group does without it, as in TRL, whose mean is that of the others.
    """
    advantages = torch.zeros_like(rewards)
    for rows in torch.arange(len(rewards)).view(-1, samples):  # (samples,)
        rows = rows[scored[rows]]
        if len(rows):
            advantages[rows] = risk_sensitive_advantage(rewards[None, rows], beta)[0]
    return advantages


def answer_reward(completions: list[list[dict]], answer: list[str], **unused: Any) -> list[float]:
    """`math_reward` of each completion, which is a list of one chat message."""
    return math_rewards([message["content"] for (message,) in completions], answer)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = HfArgumentParser(GRPOConfig, description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="hub id or folder of a model with a chat template")
    parser.add_argument("--data", required=True, help=".jsonl file with problem and answer, or a set of math_tasks.py")
    parser.add_argument("--beta_risk", type=float, default=2.0, help="risk sensitivity; --beta is TRL's KL weight")
    # The paper's 16 samples; with 8 processes 64 prompts a step. TRL keeps float32 weights and computes in bfloat16.
    parser.set_defaults(scale_rewards="none", num_generations=16, max_completion_length=2048, max_steps=200)
    parser.set_defaults(per_device_train_batch_size=8, gradient_accumulation_steps=16, lr_scheduler_type="constant")
    config, args = parser.parse_args_into_dataclasses(arguments)
    try:
        problems = load_problems(args.data, evaluating=False)
    except ValueError as error:
        parser.error(str(error))
    rows = [
        {"prompt": [{"role": "user", "content": f"{problem}\n{INSTRUCTION}"}], "answer": answer}
        for problem, answer in problems.items()
    ]
    data = datasets.Dataset.from_list(rows)
    trainer = RSGRPOTrainer(args.model, answer_reward, config, train_dataset=data, beta_risk=args.beta_risk)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
