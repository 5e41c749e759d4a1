"""cursor_flux_talk_register_tokens v1. RegisterTokenLoss; its code is tvl_align/methods/cursor.py."""

from tvl_align.methods.cursor import RegisterTokenLoss

__all__ = ["RegisterTokenLoss"]
