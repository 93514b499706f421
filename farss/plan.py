"""Survey -> Plan: ranks and directions. Never sees a model."""

from __future__ import annotations

import dataclasses

from farss.artifacts import Layer, Plan, Survey
from farss.config import REFERENCE, PlanConfig
from farss.errors import ConfigError, nearest
from farss.methods import METHODS, SURVEY, Method
from farss.methods.base import Context
from farss.methods.farss import choose_boundary, deep_rank
from farss.methods.uniform import check_rank, chosen_rank, uniform_parameters
from farss.search import candidates, shallow_end


def method_of(config: PlanConfig) -> Method:
    """The method that `plan.method` names.

    Raises:
        ConfigError: there is none of this name.
    """
    if config.method not in METHODS:
        raise ConfigError(f"plan.method={config.method!r} is not a method: {nearest(config.method, METHODS)}")
    return METHODS[config.method]


def make_plan(config: PlanConfig, survey: Survey) -> Plan:
    """Plan any method from a survey: the same survey answers every boundary, rank, budget and direction rule."""
    if survey.meta.get("svd") == "fast":
        check_exact(config, survey.blocks)
    method = method_of(config)
    made = method.plan(config, Context(survey.layers, survey.blocks, survey))
    needs = method.needs
    if needs is None or not needs.has_directions or not survey.examples:
        return made
    widest = max(min(layer.shape) if needs is SURVEY else layer.shape[1] for layer in survey.layers.values())  # others: of the inputs
    tokens = min(survey.tokens, survey.meta.get("knowledge_tokens", survey.tokens))
    if tokens >= widest:
        return made
    longer = " or give calibration.knowledge longer texts" if "knowledge" in needs.texts else ""
    note = (
        f"The survey saw {tokens:,} tokens, fewer than the {widest:,} directions of its widest layers: "
        f"raise calibration.examples{longer} for steadier statistics."
    )
    return dataclasses.replace(made, notes=[*made.notes, note])


def make_plan_without_survey(config: PlanConfig, layers: dict[str, Layer], blocks: int) -> Plan:
    """Plan a method that needs no statistics, from the target layers' names and shapes."""
    method = method_of(config)
    if method.needs is not None:
        raise ConfigError(f"plan.method={config.method!r} needs {method.needs_text}: run `farss plan`, which looks at it first")
    return method.plan(config, Context(layers, blocks))


def check_plan(config: PlanConfig, layers: dict[str, Layer], blocks: int, svd: str = "exact") -> None:
    """Find out before the survey what cannot be planned.

    Args:
        svd: how the survey will decompose, `calibration.svd`.

    Raises:
        ConfigError: the boundary or the rank is outside what the model allows, or see `check_exact`.
    """
    method = method_of(config)
    if method.boundary:
        choose_boundary(config, blocks)
    if method.name != REFERENCE:
        check_rank(config, layers)
        survey_cap(config, layers, blocks)  # a rank to be matched may have no layers
    if svd == "fast":
        check_exact(config, blocks)


def require_boundary(config: PlanConfig) -> None:
    """Refuse a method that treats all blocks alike.

    Raises:
        ConfigError: with the methods that do not.
    """
    if not method_of(config).boundary:
        others = ", ".join(method.name for method in METHODS.values() if method.boundary)
        raise ConfigError(f"plan.method={config.method!r} treats all blocks alike, so there is no boundary to find: choose of {others}")


def survey_cap(config: PlanConfig, layers: dict[str, Layer], blocks: int) -> int:
    """How many directions at each end a survey must keep for this plan, from the target layers' shapes; 1 where it keeps none."""
    needs = method_of(config).needs
    if needs and not needs.has_directions:
        return 1
    widest = max(config.rank, *config.shallow_budget)
    if config.match_params is not None:
        widest = max(2 * widest, _highest_rank(config, layers, blocks))
    return widest * (needs.reach if needs else 1)


def _highest_rank(config: PlanConfig, layers: dict[str, Layer], blocks: int) -> int:
    """A bound of the rank that `plan.match_params` solves for: that beside the most shallow layers, all of the smallest rank.

    Raises:
        ConfigError: every block is shallow.
    """
    if method_of(config).boundary:
        boundary = candidates(blocks)[-1] if config.boundary == "auto" else choose_boundary(config, blocks)
        return deep_rank(config, layers, {name: config.r_min for name, layer in layers.items() if layer.block < boundary}, [])
    rank = chosen_rank(config, layers, lambda r: uniform_parameters(layers, r), [])
    return rank + rank // 8  # a method whose small layers get less has more for the others


def check_exact(config: PlanConfig, blocks: int) -> None:
    """Refuse the least important directions of blocks that `calibration.svd: fast` decomposes in float32, where they are not exact.

    Raises:
        ConfigError: the plan takes some.
    """
    method, end = method_of(config), shallow_end(blocks)
    if method.needs is not SURVEY:
        return
    shallow = choose_boundary(config, blocks) if method.boundary and config.boundary != "auto" else min(end, blocks)
    least = [shallow] if method.boundary and config.shallow_directions == "least" else []
    least += [blocks] if method.name == "farss-init" or (method.boundary and config.deep_directions == "least") else []
    if max(least, default=0) > end:
        raise ConfigError(
            f"calibration.svd=fast decomposes the blocks from {end} on in float32, where the least important directions are not exact, and "
            f"this plan takes some of them up to block {max(least) - 1}: set calibration.svd=exact"
        )
