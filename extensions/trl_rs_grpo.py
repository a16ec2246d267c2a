"""RS-GRPO on TRL: GRPOTrainer with `risk_sensitive_advantage`, for many GPUs and vLLM.

    pip install -r extensions/requirements.txt
    accelerate launch --num_processes 8 -m extensions.trl_rs_grpo --model Qwen/Qwen2.5-Math-1.5B \\
        --data train.jsonl

The data is a .jsonl file with `problem` and `answer`, or a name such as gsm8k; every option of
TRL's GRPOConfig is one here too. A script of your own needs only the class below, in place of
GRPOTrainer, with GRPOConfig(scale_rewards="none"). vLLM and sharding: extensions/README.md.
"""

import datasets
import torch
from transformers import HfArgumentParser
from trl import GRPOConfig, GRPOTrainer

from extensions.problems import BOXED, load_problems
from extensions.verifier import math_rewards
from rs_grpo import risk_sensitive_advantage


class RSGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with the risk-sensitive advantage; written for trl 1.16.0.

    `beta_risk` is the β of RS-GRPO; 0 is the mean baseline. GRPOConfig(beta=...) is the weight of
    TRL's KL penalty (0 by default, as in the paper). Raises ValueError unless args has
    scale_rewards="none" and multi_objective_aggregation="sum_then_normalize": only then does TRL
    hand out r − mean(r), whose advantage is that of r, since a constant cancels.
    """

    def __init__(self, model, reward_funcs, args, *rest, beta_risk=2.0, **more):
        needed = {"scale_rewards": "none", "multi_objective_aggregation": "sum_then_normalize"}
        for name, wanted in needed.items():
            value = getattr(args, name, None)
            if value != wanted:
                reason = f"{name} is {value!r}, but must be {wanted!r}"
                raise ValueError(f"{reason}: RS-GRPO needs unscaled rewards")
        risk_sensitive_advantage(torch.zeros(1, 1), beta_risk)  # refuses a β that isn't finite now
        super().__init__(model, reward_funcs, args, *rest, **more)
        self.beta_risk = beta_risk

    def _calculate_rewards(self, *args):
        # (B, reward functions), of all processes; NaN where one of them gave None
        rewards = super()._calculate_rewards(*args)
        self._scored = ~rewards.isnan().all(1).cpu()  # (B,)
        return rewards

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)  # not yet shuffled and split up
        mine = output["advantages"]  # (B / processes,): r − mean(r)
        rewards = self.accelerator.gather(mine).cpu()  # (B,): makes groups on two processes whole
        samples = self.num_generations if self.model.training else self.num_generations_eval
        advantages = regrouped_advantage(rewards, self._scored, samples, self.beta_risk)  # (B,)
        start = self.accelerator.process_index * len(mine)
        output["advantages"] = advantages[start : start + len(mine)].to(mine)
        log = self._logs["advantages"]  # for log_completions; it ends with TRL's advantages
        kept = list(log)[: -len(advantages)]
        log.clear()
        log.extend(kept + advantages.tolist())
        return output


def regrouped_advantage(rewards, scored, samples, beta):
    """`risk_sensitive_advantage` of a flat batch, of `samples` rows a group: (B,) to (B,).

    rewards: (B,), up to a constant in each group. scored: (B,), False for a completion that no
    reward function judged: it gets 0 and its group does without it, as in TRL.
    """
    advantages = torch.zeros_like(rewards)
    for rows in torch.arange(len(rewards)).view(-1, samples):  # (samples,)
        rows = rows[scored[rows]]
        if len(rows):
            advantages[rows] = risk_sensitive_advantage(rewards[None, rows], beta)[0]
    return advantages


def answer_reward(completions, answer, **unused):
    """`math_reward` of each completion, which is a list of one chat message."""
    return math_rewards([message["content"] for (message,) in completions], answer)


def main(arguments=None):
    parser = HfArgumentParser(GRPOConfig, description=__doc__.splitlines()[0])
    about = "hub id or folder of a model with a chat template"
    parser.add_argument("--model", required=True, help=about)
    about = ".jsonl file with problem and answer, or a set that extensions/problems.py names"
    parser.add_argument("--data", required=True, help=about)
    about = "risk sensitivity; --beta is TRL's KL weight"
    parser.add_argument("--beta_risk", type=float, default=2.0, help=about)
    # The paper's 16 samples; with 8 processes 64 prompts a step. TRL computes in bfloat16.
    parser.set_defaults(scale_rewards="none", num_generations=16, max_completion_length=2048)
    parser.set_defaults(per_device_train_batch_size=8, gradient_accumulation_steps=16)
    parser.set_defaults(max_steps=200, lr_scheduler_type="constant")
    config, given = parser.parse_args_into_dataclasses(arguments)
    try:
        problems = load_problems(given.data, evaluating=False)
    except ValueError as error:
        parser.error(str(error))
    rows = []
    for problem, answer in problems:
        turn = {"role": "user", "content": f"{problem}\n{BOXED}"}
        rows.append({"prompt": [turn], "answer": answer})
    rows = datasets.Dataset.from_list(rows)
    trainer = RSGRPOTrainer(
        given.model, answer_reward, config, train_dataset=rows, beta_risk=given.beta_risk
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
