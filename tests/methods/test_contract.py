"""Every method in METHODS passes every check of the contract."""

from collections.abc import Callable

import pytest

from tvl_align.contract import Method
from tvl_align.methods.registry import METHODS
from tvl_align.training.checks import CHECKS


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_contract(method: Method, check: Callable[[Method], None]) -> None:
    check(method)
