"""Every method of METHODS keeps the contract; each check is a test of its own."""

from collections.abc import Callable

import pytest

from experiments.stage2.methods import METHODS
from experiments.stage2.test_modules import CHECKS
from tvl_align.contract import Method


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_contract(method: Method, check: Callable[[Method], None]) -> None:
    check(method)
