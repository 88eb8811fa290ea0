"""The loss of preferences: Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290,
equation 7).

Invariant: pure functions of the rows' losses; softmax and sums are fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rewards(nats_B2: Tensor, reference_B2: Tensor, beta: float) -> Tensor:
    """Return the implicit rewards of the chosen and the rejected response of each preference,
    (B, 2) fp32: beta * (log p - log p of the reference).

    nats: minus the log-probability of each response, the sum over its tokens; reference: the same
    by the model that doesn't change.
    """
    return beta * (reference_B2.float() - nats_B2.float())


def preference_losses(rewards_B2: Tensor) -> Tensor:
    """Return -log sigmoid(reward of chosen - reward of rejected), (B,) in nats: log 2 where both
    have changed alike."""
    return -F.logsigmoid(rewards_B2[:, 0] - rewards_B2[:, 1])


def preference_numbers(nats_B2: Tensor, rewards_B2: Tensor) -> dict[str, Tensor]:
    """Return what is logged of preferences, each (B,) fp32, by the names of TRL's DPOTrainer."""
    chosen, rejected = rewards_B2.unbind(1)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).to(torch.float32),
        "rewards/margins": chosen - rejected,
        "logps/chosen": -nats_B2[:, 0].float(),
        "logps/rejected": -nats_B2[:, 1].float(),
    }
