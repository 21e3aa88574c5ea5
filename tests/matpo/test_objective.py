"""Per-token losses and reports against numbers worked out by hand, and gradients against the written formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from matpo.config import Cispo, Clip, Decoupled, Dppo, Gspo, IcePop, M2po, Objective, Reinforce, Tis, Topr
from matpo.objective.chosen import token_loss
from matpo.objective.m2po import second_moment_mask
from matpo.objective.report import PolicyReport, policy_report
from matpo.objective.tokens import TokenLoss, Tokens
from matpo.objective.trajectories import trajectory_drift


def at(
    objective: Objective,
    *,
    pi: list[float],
    mu: list[float],
    advantage: list[float],
    old: list[float] | None = None,
    drift: list[float] | None = None,
    kept: list[bool] | None = None,
) -> tuple[list[float], list[float], list[bool]]:
    """Loss, d loss / d log π and mask of each token, from probabilities."""
    logp_T = torch.tensor(pi).log().requires_grad_()
    terms: TokenLoss = token_loss(
        objective,
        Tokens(
            logp_T,
            behaviour_T=torch.tensor(mu).log(),
            advantage_T=torch.tensor(advantage),
            old_logp_T=None if old is None else torch.tensor(old).log(),
            drift_T=None if drift is None else torch.tensor(drift),
            kept_T=None if kept is None else torch.tensor(kept),
        ),
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


def test_icepop_leaves_out_tokens_whose_ratio_is_outside_the_band() -> None:
    #                                         R = 0.25 (out), 0.6 (in), 3 (in), 6 (out)
    loss, slope, masked = at(
        IcePop(low=0.5, high=5.0), pi=[0.1, 0.24, 0.6, 0.6], mu=[0.4, 0.4, 0.2, 0.1], advantage=[1.0, 2.0, -1.0, -1.0]
    )
    assert slope == pytest.approx([0.0, -1.2, 3.0, 0.0])
    assert loss == pytest.approx([0.0, -1.2 * math.log(0.24), 3 * math.log(0.6), 0.0], abs=1e-6)
    assert masked == [True, False, False, True]


def test_cispo_bounds_the_weight_and_keeps_every_tokens_gradient() -> None:
    # The ratios are 0.25, 1.25 and 4.
    pi, mu, advantage = [0.1, 0.5, 0.8], [0.4, 0.4, 0.2], [1.0, 1.0, -2.0]
    _, slope, masked = at(Cispo(clip_high=0.5), pi=pi, mu=mu, advantage=advantage)
    assert slope == pytest.approx([-0.25, -1.25, 3.0])
    assert masked == [False, False, True]
    _, slope, masked = at(Cispo(clip_low=0.2, clip_high=0.5), pi=pi, mu=mu, advantage=advantage)
    assert slope == pytest.approx([-0.8, -1.25, 3.0])
    assert masked == [True, False, True]


def test_topr_trusts_successes_and_tapers_failures() -> None:
    #                                              R = 0.5 and 2 with A > 0, then with A < 0
    loss, slope, masked = at(Topr(), pi=[0.1, 0.4] * 2, mu=[0.2, 0.2] * 2, advantage=[1.0, 1.0, -1.0, -1.0])
    assert slope == pytest.approx([-1.0, -1.0, 0.5, 1.0])
    assert loss[2] == pytest.approx(0.5 * math.log(0.1))
    assert masked == [False, False, False, True]


def test_gspo_clips_by_the_mean_log_ratio_of_the_trajectory_whatever_the_tokens_own_is() -> None:
    drift = [math.log(1.5), math.log(1.1), math.log(0.5), math.log(1.5)]
    #                              s = 1.5 clipped for A>0, 1.1 inside, 0.5 clipped for A<0, 1.5 not for A<0
    loss, slope, masked = at(
        Gspo(clip_low=0.2, clip_high=0.2),
        pi=[0.1, 0.9, 0.5, 0.5],
        mu=[0.5, 0.1, 0.5, 0.5],
        advantage=[2.0, 2.0, -1.0, -1.0],
        drift=drift,
    )
    assert loss == pytest.approx([-2.4, -2.2, 0.8, 1.5])
    assert slope == pytest.approx([0.0, -2.2, 0.0, 1.5])
    assert masked == [True, False, True, False]


def test_gspo_over_a_trajectorys_tokens_has_the_gradient_of_its_mean_ratio() -> None:
    logp_T = torch.tensor([0.5, 0.3, 0.6], dtype=torch.float64).log().requires_grad_()
    behaviour_T, advantage_T = torch.tensor([0.48, 0.32, 0.6], dtype=torch.float64).log(), torch.full((3,), 1.5)
    drift_T = trajectory_drift(logp_T, behaviour_T, torch.zeros(3, dtype=torch.int64))
    terms = token_loss(Gspo(), Tokens(logp_T, behaviour_T, advantage_T, drift_T=drift_T))
    (found_T,) = torch.autograd.grad(terms.loss_T.mean(), logp_T)
    (expected_T,) = torch.autograd.grad(-1.5 * (logp_T - behaviour_T).mean().exp(), logp_T)
    assert not terms.masked_T.any()
    assert torch.allclose(found_T, expected_T)


def test_m2po_trains_the_tokens_that_stay_with_their_ratio() -> None:
    _, slope, masked = at(M2po(), pi=[0.4, 0.4], mu=[0.2, 0.2], advantage=[1.0, 1.0], kept=[True, False])
    assert slope == pytest.approx([-2.0, 0.0])
    assert masked == [False, True]


def test_the_second_moment_mask_lets_the_largest_go_until_the_mean_fits() -> None:
    log_ratio_N = torch.tensor([0.1, -3.0, 0.2, -0.1, 1.0])
    # squares 0.01, 9, 0.04, 0.01, 1: their means from the smallest on are 0.01, 0.01, 0.02, 0.265, 2.012
    assert second_moment_mask(log_ratio_N, 0.021).tolist() == [True, False, True, True, False]
    assert second_moment_mask(log_ratio_N, 0.3).tolist() == [True, False, True, True, True]
    assert second_moment_mask(log_ratio_N, 3.0).all()
    assert not second_moment_mask(log_ratio_N, 0.005).any()
    assert len(second_moment_mask(torch.empty(0), 0.1)) == 0


def test_of_equally_large_outliers_all_go() -> None:
    assert second_moment_mask(torch.tensor([0.0, 1.0, -1.0, 0.0]), 0.4).tolist() == [True, False, False, True]


def test_reinforce_takes_no_notice_of_who_sampled() -> None:
    loss, slope, masked = at(Reinforce(), pi=[0.9, 0.1], mu=[0.1, 0.9], advantage=[2.0, -1.0])
    assert slope == pytest.approx([-2.0, 1.0])
    assert loss == pytest.approx([-2 * math.log(0.9), math.log(0.1)])
    assert masked == [False, False]


EVERY: list[Objective] = [
    Dppo(tau=0.0), Clip(), Decoupled(), Tis(), IcePop(), Cispo(), Gspo(), Topr(), M2po(), Reinforce()
]  # fmt: skip


@pytest.mark.parametrize("objective", EVERY, ids=lambda o: o.name)
def test_every_objective_is_the_plain_policy_gradient_on_policy(objective: Objective) -> None:
    _, slope, masked = at(
        objective, pi=[0.1, 0.7], mu=[0.1, 0.7], advantage=[1.5, -0.5], drift=[0.0, 0.0], kept=[True, True]
    )
    assert slope == pytest.approx([-1.5, 0.5])
    assert masked == [False, False]


def written(name: str, pi: Tensor, mu: Tensor, old: Tensor, a: Tensor, s: Tensor, kept: Tensor) -> Tensor:
    """The formulas of docs/algorithm.md with their default options, once more, in probabilities instead of logarithms;
    `.detach()` is sg and `s` the trajectory's mean ratio."""
    r, rho, big = pi / old, old / mu, (pi / mu).detach()
    gradient = -a * pi.log()
    match name:
        case "dppo":
            out = ((a > 0) & (pi - mu > 0.2)) | ((a < 0) & (pi - mu < -0.2))
            return (~out) * big.clamp(max=2) * gradient + 1e-3 * (pi / mu).log() ** 2
        case "clip":
            plain = -torch.minimum(pi / mu * a, (pi / mu).clamp(0.8, 1.2) * a)
            return torch.where(a < 0, torch.minimum(plain, -3 * a), plain)
        case "decoupled":
            return -rho.clamp(max=2) * torch.minimum(r * a, r.clamp(0.8, 1.2) * a)
        case "tis":
            return big.clamp(max=2) * gradient
        case "icepop":
            return ((big >= 0.5) & (big <= 5)) * big * gradient
        case "cispo":
            return big.clamp(0, 1.2) * gradient
        case "gspo":
            token = s * pi / pi.detach()
            return -torch.minimum(token * a, token.clamp(0.99, 1.01) * a)
        case "topr":
            return torch.where(a < 0, big.clamp(0, 1), 1) * gradient
        case "m2po":
            return kept * big * gradient
    return gradient


@pytest.mark.parametrize("objective", [Dppo(), *EVERY[1:]], ids=lambda o: o.name)
def test_gradients_are_those_autograd_takes_of_the_written_formula(objective: Objective) -> None:
    torch.manual_seed(0)
    pi, mu, old = (torch.rand(4000, dtype=torch.float64) * 0.98 + 0.01 for _ in range(3))
    a, drift, kept = torch.randn(4000, dtype=torch.float64), torch.randn(4000).double() / 50, torch.rand(4000) < 0.7
    direct = pi.clone().requires_grad_()
    (expected,) = torch.autograd.grad(written(objective.name, direct, mu, old, a, drift.exp(), kept).sum(), direct)
    logp = pi.log().requires_grad_()
    terms = token_loss(objective, Tokens(logp, mu.log(), a, old_logp_T=old.log(), drift_T=drift, kept_T=kept))
    (found,) = torch.autograd.grad(terms.loss_T.sum(), logp)
    assert torch.allclose(found, expected * pi)  # d/d log π = π · d/dπ


def test_a_trajectorys_drift_is_the_mean_log_ratio_of_its_own_tokens() -> None:
    drift_T = trajectory_drift(
        torch.tensor([0.4, 0.5, 0.1, 0.5]).log(), torch.tensor([0.2, 0.5, 0.4, 0.5]).log(), torch.tensor([0, 1, 0, 1])
    )
    assert drift_T.tolist() == pytest.approx([-math.log(2) / 2, 0.0, -math.log(2) / 2, 0.0])
    assert len(trajectory_drift(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.int64))) == 0


def test_the_sequence_mask_drops_failures_that_the_policy_has_left_and_keeps_successes() -> None:
    loss, slope, masked = at(
        Reinforce(sequence_mask=0.5),
        pi=[0.5, 0.5, 0.5, 0.5],
        mu=[0.5, 0.5, 0.5, 0.5],
        advantage=[-1.0, 1.0, -1.0, -1.0],
        drift=[-0.6, -0.6, -0.4, 0.6],
    )
    assert masked == [True, False, False, False]
    assert slope == pytest.approx([0.0, -1.0, 1.0, 1.0])
    assert loss[0] == 0.0


def test_the_reference_term_is_k3_and_pulls_towards_the_reference() -> None:
    logp_T = torch.tensor([0.2, 0.5, 0.8]).log().requires_grad_()
    terms = token_loss(
        Tis(reference_kl=2.0),
        Tokens(
            logp_T,
            behaviour_T=logp_T.detach(),
            advantage_T=torch.zeros(3),
            reference_logp_T=torch.tensor([0.4, 0.5, 0.4]).log(),
        ),
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
        Tokens(logp_T, behaviour_T=logp_T, advantage_T=torch.ones(1), entropy_T=entropy_T),
    )
    assert terms.loss_T.tolist() == pytest.approx([math.log(2) - 0.07])
    (slope_T,) = torch.autograd.grad(terms.loss_T.sum(), entropy_T)
    assert slope_T.tolist() == pytest.approx([-0.1])


@pytest.mark.parametrize(
    ("objective", "match"),
    [
        (Tis(reference_kl=1.0), "reference model"),
        (Tis(entropy_bonus=1.0), "entropy"),
        (Tis(sequence_mask=1.0), "trajectory"),
        (Gspo(), "trajectory"),
        (M2po(), "outliers"),
    ],
    ids=["reference", "entropy", "mask", "gspo", "m2po"],
)
def test_what_is_needed_and_missing_is_refused(objective: Objective, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        at(objective, pi=[0.5], mu=[0.5], advantage=[1.0])


def test_objectives_say_what_they_need() -> None:
    assert [o.name for o in EVERY if o.needs.old_policy] == ["decoupled"]
    assert [o.name for o in EVERY if o.needs.trajectory] == ["gspo"]
    assert [o.name for o in EVERY if o.needs.whole_step] == ["m2po"]
    assert Tis(sequence_mask=0.1).needs.trajectory


def report(pi: list[float], mu: list[float], advantage: list[float]) -> PolicyReport:
    def logs(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).log()

    return policy_report(
        logp_T=logs(pi),
        behaviour_T=logs(mu),
        entropy_T=torch.tensor([0.5, 1.5]),
        masked_T=torch.tensor([True, False]),
        advantage_T=torch.tensor(advantage),
        slope_T=torch.tensor([0.25, -0.5]),
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
    assert found.gradient == 0.75


def test_report_on_policy_shows_no_mismatch() -> None:
    found = report(pi=[0.4, 0.1], mu=[0.4, 0.1], advantage=[1.0, -2.0])
    assert found.mismatch_kl == 0
    assert found.effective_samples == pytest.approx(1.0)
