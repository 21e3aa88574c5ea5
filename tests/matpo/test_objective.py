"""Per-token losses and reports against numbers worked out by hand, and gradients against the written formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from matpo.config import Clip, Decoupled, Dppo, Objective, Tis
from matpo.objective import PolicyReport, TokenLoss, needs_old_policy, policy_report, token_loss


def at(
    objective: Objective, *, pi: list[float], mu: list[float], advantage: list[float], old: list[float] | None = None
) -> tuple[list[float], list[float], list[bool]]:
    """Loss, d loss / d log π and mask of each token, from probabilities."""
    logp_T = torch.tensor(pi).log().requires_grad_()
    terms: TokenLoss = token_loss(
        objective,
        logp_T,
        old_logp_T=None if old is None else torch.tensor(old).log(),
        behaviour_T=torch.tensor(mu).log(),
        advantage_T=torch.tensor(advantage),
    )
    (slope_T,) = torch.autograd.grad(terms.loss_T.sum(), logp_T)
    return terms.loss_T.tolist(), slope_T.tolist(), terms.masked_T.tolist()


def test_dppo_weighs_by_the_capped_ratio_and_masks_what_already_moved() -> None:
    loss, slope, masked = at(
        Dppo(delta=0.2, tau=0.0, ratio_cap=2.0),
        #    on policy, ratio 3 capped, moved +0.3 for A>0, moved +0.3 for A<0, moved -0.3 for A<0
        pi=[0.5, 0.3, 0.8, 0.8, 0.2],
        mu=[0.5, 0.1, 0.5, 0.5, 0.5],
        advantage=[2.0, 1.0, 1.0, -1.0, -1.0],
    )
    assert slope == pytest.approx([-2.0, -2.0, 0.0, 1.6, 0.0])
    assert loss == pytest.approx([-2 * math.log(0.5), -2 * math.log(0.3), 0.0, 1.6 * math.log(0.8), 0.0])
    assert masked == [False, False, True, False, True]


def test_dppo_pulls_back_with_twice_tau_times_the_log_ratio_even_where_masked() -> None:
    loss, slope, masked = at(Dppo(tau=0.5), pi=[0.8], mu=[0.5], advantage=[1.0])
    assert masked == [True]
    assert loss == pytest.approx([0.5 * math.log(1.6) ** 2])
    assert slope == pytest.approx([math.log(1.6)])


def test_clip_is_the_pessimistic_surrogate() -> None:
    loss, slope, masked = at(
        Clip(clip_low=0.2, clip_high=0.3, dual_clip=3.0),
        #   R = 1, 1.5 (A>0: clipped), 0.5 (A>0: not), 0.5 (A<0: clipped), 1.5 (A<0: not), 4 (A<0: dual)
        pi=[0.2, 0.3, 0.1, 0.1, 0.3, 0.8],
        mu=[0.2, 0.2, 0.2, 0.2, 0.2, 0.2],
        advantage=[1.0, 1.0, 1.0, -1.0, -1.0, -2.0],
    )
    assert loss == pytest.approx([-1.0, -1.3, -0.5, 0.8, 1.5, 6.0])
    assert slope == pytest.approx([-1.0, 0.0, -0.5, 0.0, 1.5, 0.0])
    assert masked == [False, True, False, True, False, True]


def test_decoupled_clips_against_the_start_of_the_step_and_weighs_by_what_lies_before_it() -> None:
    loss, slope, masked = at(
        Decoupled(clip_low=0.2, clip_high=0.2, ratio_cap=2.0),
        #   ρ = 1.5, r = 1.1 | ρ = 4 → 2, r = 1.5 clipped | ρ = 0.5, r = 0.5 clipped for A<0
        pi=[0.33, 0.6, 0.05],
        old=[0.3, 0.4, 0.1],
        mu=[0.2, 0.1, 0.2],
        advantage=[1.0, 1.0, -1.0],
    )
    assert loss == pytest.approx([-1.5 * 1.1, -2 * 1.2, 0.5 * 0.8])
    assert slope == pytest.approx([-1.65, 0.0, 0.0], abs=1e-6)
    assert masked == [False, True, True]


def test_decoupled_at_the_first_optimizer_step_takes_the_current_policy_as_the_old_one() -> None:
    loss, slope, _ = at(Decoupled(), pi=[0.3], mu=[0.2], advantage=[2.0])
    assert loss == pytest.approx([-3.0])
    assert slope == pytest.approx([-3.0])


def test_tis_is_the_policy_gradient_with_a_capped_weight() -> None:
    loss, slope, masked = at(Tis(ratio_cap=2.0), pi=[0.3, 0.9], mu=[0.2, 0.3], advantage=[1.0, -1.0])
    assert slope == pytest.approx([-1.5, 2.0])
    assert loss == pytest.approx([-1.5 * math.log(0.3), 2 * math.log(0.9)])
    assert masked == [False, True]


@pytest.mark.parametrize("objective", [Dppo(tau=0.0), Clip(), Decoupled(), Tis()], ids=lambda o: o.name)
def test_every_objective_is_the_plain_policy_gradient_on_policy(objective: Objective) -> None:
    _, slope, masked = at(objective, pi=[0.1, 0.7], mu=[0.1, 0.7], advantage=[1.5, -0.5])
    assert slope == pytest.approx([-1.5, 0.5])
    assert masked == [False, False]


def test_the_reference_term_is_k3_and_pulls_towards_the_reference() -> None:
    logp_T = torch.tensor([0.2, 0.5, 0.8]).log().requires_grad_()
    terms = token_loss(
        Tis(reference_kl=2.0),
        logp_T,
        old_logp_T=None,
        behaviour_T=logp_T.detach(),
        advantage_T=torch.zeros(3),
        reference_logp_T=torch.tensor([0.4, 0.5, 0.4]).log(),
    )
    # ratio r = reference / π = 2, 1, ½; loss 2·(r − 1 − log r), slope in log π 2·(1 − r)
    assert terms.loss_T.tolist() == pytest.approx([2 * (1 - math.log(2)), 0.0, 2 * (math.log(2) - 0.5)])
    (slope_T,) = torch.autograd.grad(terms.loss_T.sum(), logp_T)
    assert slope_T.tolist() == pytest.approx([-2.0, 0.0, 1.0])
    assert not terms.masked_T.any()


def test_the_entropy_bonus_is_taken_off_the_loss_of_every_token() -> None:
    logp_T, entropy_T = torch.tensor([0.5]).log(), torch.tensor([0.7], requires_grad=True)
    terms = token_loss(
        Dppo(tau=0.0, entropy_bonus=0.1),
        logp_T,
        old_logp_T=None,
        behaviour_T=logp_T,
        advantage_T=torch.ones(1),
        entropy_T=entropy_T,
    )
    assert terms.loss_T.tolist() == pytest.approx([math.log(2) - 0.07])
    (slope_T,) = torch.autograd.grad(terms.loss_T.sum(), entropy_T)
    assert slope_T.tolist() == pytest.approx([-0.1])


def test_a_term_whose_input_is_missing_is_refused() -> None:
    for objective, match in ((Tis(reference_kl=1.0), "reference model"), (Tis(entropy_bonus=1.0), "entropy")):
        with pytest.raises(ValueError, match=match):
            at(objective, pi=[0.5], mu=[0.5], advantage=[1.0])


def test_only_the_decoupled_objective_needs_the_old_policy() -> None:
    assert [needs_old_policy(o) for o in (Dppo(), Clip(), Decoupled(), Tis())] == [False, False, True, False]


def report(pi: list[float], mu: list[float], advantage: list[float]) -> PolicyReport:
    def logs(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).log()

    return policy_report(
        logp_T=logs(pi),
        behaviour_T=logs(mu),
        entropy_T=torch.tensor([0.5, 1.5]),
        masked_T=torch.tensor([True, False]),
        advantage_T=torch.tensor(advantage),
    )


def test_report_of_two_tokens() -> None:
    found = report(pi=[0.4, 0.1], mu=[0.2, 0.2], advantage=[1.0, -2.0])
    # The ratios are 2 and a half.
    assert found.tokens == 2
    assert found.mismatch_kl == pytest.approx(((2 - 1 - math.log(2)) + (0.5 - 1 + math.log(2))) / 2)
    assert found.logp_difference == pytest.approx(math.log(2))
    assert found.logp_difference_max == pytest.approx(math.log(2))
    assert found.effective_samples == pytest.approx(2.5**2 / (2 * 4.25))
    assert found.masked_fraction == 0.5
    assert found.entropy == 1.0
    assert found.advantage_mean == -0.5
    assert found.advantage_variance == 2.25


def test_report_on_policy_shows_no_mismatch() -> None:
    found = report(pi=[0.4, 0.1], mu=[0.4, 0.1], advantage=[1.0, -2.0])
    assert found.mismatch_kl == 0
    assert found.effective_samples == pytest.approx(1.0)
