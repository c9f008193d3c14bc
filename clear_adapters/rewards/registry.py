"""Rewards by name. A third party adds its own with `register_reward`, or by an entry point of the group below.

An entry is a function with TRL's signature, `reward(prompts, completions, <columns>, *, <settings>, **columns)`, which
gives a number for each rollout or None for one that it does not score; or a class whose instances are such functions,
for one that holds something, such as a connection.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from clear_adapters.errors import ClearValueError, unknown_name
from clear_adapters.registry import Registry

RewardFunction: TypeAlias = Callable[..., "list[float | None]"]

REWARDS: Registry[Callable[..., Any]] = Registry(
    "reward", instance_of="collections.abc:Callable", group="clear_adapters.rewards"
)
REWARDS.register("accuracy", "clear_adapters.rewards.accuracy:accuracy")
REWARDS.register("judge", "clear_adapters.rewards.judge:Judge")
REWARDS.register("format", "clear_adapters.rewards.format:format_binary")
REWARDS.register("format_graded", "clear_adapters.rewards.format:format_graded")
REWARDS.register("decision", "clear_adapters.rewards.decision:decision")
REWARDS.register("latent_quality", "clear_adapters.rewards.latent:latent_quality")


def list_rewards() -> list[str]:
    """The names of all known rewards, sorted; imports none of them."""
    return REWARDS.names()


def register_reward(name: str, reward: Callable[..., Any] | str) -> None:
    """Adds a reward.

    Args:
        name: what a recipe calls it.
        reward: the function or class, or its `"module:NAME"`.

    Raises:
        ClearValueError: the name is taken; the message names both origins.
        ClearTypeError: it cannot be called.
    """
    REWARDS.register(name, reward, stacklevel=2)


def make_reward(name: str, settings: Mapping[str, Any] | None = None) -> RewardFunction:
    """A reward function with its settings.

    Args:
        name: as registered.
        settings: values for the keyword-only parameters of a function, or arguments of a class.

    Returns:
        The function. One with settings has been called once, without rollouts, so that it could refuse them.

    Raises:
        UnknownNameError: no such reward, or no such setting.
        ClearValueError: a setting is missing or cannot work.
    """
    entry, settings = REWARDS.get(name), dict(settings or {})
    known = list(inspect.signature(entry).parameters) if isinstance(entry, type) else settings_of(entry)
    for setting in settings:
        if setting not in known:
            raise unknown_name(f"setting of reward {name!r}", setting, known)
    if isinstance(entry, type):
        try:
            inspect.signature(entry).bind(**settings)
        except TypeError as error:
            raise ClearValueError(f"reward {name!r}: {error} among its settings") from error
        return entry(**settings)
    if not settings:
        return entry
    reward = functools.partial(entry, **settings)
    required, optional = columns_named(reward)
    reward(prompts=[], completions=[], **{column: [] for column in required + optional})
    return reward


def settings_of(reward: Callable[..., Any]) -> list[str]:
    """The settings of a reward function: its keyword-only parameters."""
    parameters = inspect.signature(reward).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def columns_named(reward: Callable[..., Any]) -> tuple[list[str], list[str]]:
    """The columns that a reward function names, beside prompts and completions: required ones, and optional ones."""
    parameters = inspect.signature(reward).parameters.values()
    named = [
        p
        for p in parameters
        if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in ("prompts", "completions")
    ]
    return [p.name for p in named if p.default is p.empty], [
        p.name for p in named if p.default is not p.empty
    ]
