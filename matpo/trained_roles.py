"""Which roles are trained, and settings that contradict it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from matpo.lora_config import Lora


def trained(
    lora: Lora | None, factors: Mapping[str, float], *, roles: Collection[str], elsewhere: Collection[str]
) -> frozenset[str]:
    """The roles whose tokens are trained; the arguments are those of `contradiction`."""
    frozen = frozenset() if lora is None else lora.frozen
    return frozenset(role for role in roles if role not in {*frozen, *elsewhere} and factors.get(role, 1.0))


def contradiction(
    lora: Lora | None,
    factors: Mapping[str, float],
    *,
    roles: Collection[str],
    elsewhere: Collection[str],
    greedy: Collection[str],
) -> str | None:
    """Why these settings cannot be meant, with the remedy; None where they can.

    `factors` are `learner.role_factors`, `elsewhere` the roles that other models play, `greedy` those sampled at
    temperature 0.
    """
    if unknown := sorted(set(factors) - set(roles)):
        return f"learner.role_factors names {unknown}, not among {sorted(roles)}"
    if lora is not None and lora.roles and set(lora.roles) != set(roles):
        return f"model.lora.roles names {sorted(lora.roles)}; name each of {sorted(roles)}"
    frozen = frozenset() if lora is None else lora.frozen
    if both := sorted(frozen & set(factors)):
        return f"learner.role_factors of {both} have no effect: model.lora.roles freezes them"
    learning = trained(lora, factors, roles=roles, elsewhere=elsewhere)
    if not learning:
        return "no role is trained; see learner.role_factors, model.lora.roles and the roles' endpoints"
    if certain := sorted(learning & set(greedy)):
        return (
            f"the roles {certain} are sampled at temperature 0, where there is no choice to learn from; raise"
            " sampling.temperature or freeze them with learner.role_factors = 0"
        )
    return None
