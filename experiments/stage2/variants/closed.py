"""stage2_closed v2. Its code is tvl_align/methods/closed.py."""

from tvl_align.methods.closed import CLOSED, Closed, ClosedConfig

__all__ = ["CLOSED", "Closed", "ClosedConfig"]
