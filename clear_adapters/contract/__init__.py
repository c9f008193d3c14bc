"""What every backbone has to do, as checks that run on a family's tiny model; `clear-adapters validate` and the tests share them."""

from clear_adapters.contract.checks import CHECKS, ContractError
from clear_adapters.contract.run import Result, find_spec, validate

__all__ = ["CHECKS", "ContractError", "Result", "find_spec", "validate"]
