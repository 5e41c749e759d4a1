"""METHODS: what ships (tvl_align/methods/registry.py), and one line for every implementation that has a folder here."""

from tvl_align.contract import Method
from tvl_align.methods.registry import METHODS as SHIPPED

METHODS: dict[str, Method] = {
    **SHIPPED,
}
