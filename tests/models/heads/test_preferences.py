"""The loss of preferences, compared with the paper's own lines."""

import pytest
import torch
import torch.nn.functional as F

from forescale.models.heads.preferences import preference_losses, preference_numbers, rewards


def dpo_loss(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """Appendix B of Rafailov et al. 2023 (arXiv 2305.18290)."""
    pi_yw_logps, pi_yl_logps = pi_logps[yw_idxs], pi_logps[yl_idxs]
    ref_yw_logps, ref_yl_logps = ref_logps[yw_idxs], ref_logps[yl_idxs]
    pi_logratios = pi_yw_logps - pi_yl_logps
    ref_logratios = ref_yw_logps - ref_yl_logps
    losses = -F.logsigmoid(beta * (pi_logratios - ref_logratios))
    return losses, beta * (pi_logps - ref_logps).detach()


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_loss_rewards_and_gradient_are_the_papers(beta):
    torch.manual_seed(0)
    logps = (-30 * torch.rand(7, 2)).requires_grad_()
    reference = -30 * torch.rand(7, 2)
    flat, chosen, rejected = logps.flatten(), torch.arange(0, 14, 2), torch.arange(1, 14, 2)
    target, of_paper = dpo_loss(flat, reference.flatten(), chosen, rejected, beta)
    got = rewards(-logps, -reference, beta)
    losses = preference_losses(got)
    torch.testing.assert_close(losses, target, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.flatten(), of_paper, rtol=0, atol=1e-5)
    local, peer = (torch.autograd.grad(each.sum(), logps)[0] for each in (losses, target))
    torch.testing.assert_close(local, peer, rtol=0, atol=1e-6)
    numbers = preference_numbers(-logps.detach(), got.detach())
    margins = of_paper[chosen] - of_paper[rejected]
    torch.testing.assert_close(numbers["rewards/margins"], margins, rtol=0, atol=1e-5)
    assert torch.equal(numbers["rewards/accuracies"], (margins > 0).float())
    assert torch.equal(numbers["logps/rejected"], logps[:, 1].detach())
