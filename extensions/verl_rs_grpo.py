"""RS-GRPO on verl: `risk_sensitive_advantage` as the estimator rs_grpo, for many GPUs and nodes.

Wherever verl is imported, it imports the modules that VERL_USE_EXTERNAL_MODULES names, so verl
isn't edited:

    export PYTHONPATH=$PWD VERL_USE_EXTERNAL_MODULES=extensions.verl_rs_grpo
    python -m verl.trainer.main_ppo algorithm.adv_estimator=rs_grpo +algorithm.rs_beta=2 \\
        actor_rollout_ref.model.path=Qwen/Qwen2.5-Math-1.5B actor_rollout_ref.actor.optim.lr=1e-6 \\
        data.train_files=train.parquet data.val_files=test.parquet data.train_batch_size=128 \\
        data.max_prompt_length=1024 data.max_response_length=2048 \\
        data.filter_overlong_prompts=True actor_rollout_ref.rollout.name=vllm \\
        actor_rollout_ref.rollout.n=16 actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True \\
        actor_rollout_ref.actor.use_dynamic_bsz=True \\
        actor_rollout_ref.actor.ppo_mini_batch_size=128 trainer.n_gpus_per_node=8 trainer.nnodes=1

The plus is needed because verl's configuration has no rs_beta of its own; left out, β is 2. The
.parquet files are what verl's examples/data_preprocess writes. On several nodes, export both
variables before each node's `ray start`. Written against verl 0.9.1.
"""

from collections import defaultdict

import numpy as np
import torch
from verl.trainer.ppo.core_algos import register_adv_est

from rs_grpo import risk_sensitive_advantage


@register_adv_est("rs_grpo")
def rs_grpo_advantage(token_level_rewards, response_mask, index, config=None, **unused):
    """verl's convention: rewards of tokens, (B, T), in; (advantages, returns), both (B, T), out.

    The reward of a completion is the sum over its tokens; response_mask, (B, T), is 1 on them.
    index, (B,), names the prompt of a row: groups come in any order and of any size. config is
    verl's `algorithm` section. Raises ValueError for a β that isn't finite.
    """
    beta = 2.0 if config is None else float(config.get("rs_beta", 2.0))
    rewards = token_level_rewards.sum(1)  # (B,)
    groups = defaultdict(list)
    for row, prompt in enumerate(np.asarray(index).tolist()):
        groups[prompt].append(row)
    advantages = torch.zeros_like(rewards)
    for rows in groups.values():
        advantages[rows] = risk_sensitive_advantage(rewards[None, rows], beta)[0]
    advantages = advantages[:, None] * response_mask  # (B, T): the same on every token
    return advantages, advantages
