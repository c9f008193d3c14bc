"""Rewards of stage 3: functions with TRL's signature, found by name, and their weighted sum over groups of rollouts."""

from clear_adapters.rewards.compose import Rewards, Scores, Term, columns_of, read_terms
from clear_adapters.rewards.registry import (
    REWARDS,
    RewardFunction,
    list_rewards,
    make_reward,
    register_reward,
)

__all__ = [
    "REWARDS",
    "RewardFunction",
    "Rewards",
    "Scores",
    "Term",
    "columns_of",
    "list_rewards",
    "make_reward",
    "read_terms",
    "register_reward",
]
