"""Every method in METHODS passes every check of the contract."""

from collections.abc import Callable

import pytest

from tvl_align.contract import Method
from tvl_align.methods.registry import METHODS
from tvl_align.training.checks import CHECKS

# Two processes: in the documented command, which tests/test_documented_paths.py runs for every method.
HERE = {name: check for name, check in CHECKS.items() if name != "two_processes"}


@pytest.mark.parametrize("check", HERE.values(), ids=HERE)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_contract(method: Method, check: Callable[[Method], None]) -> None:
    check(method)
