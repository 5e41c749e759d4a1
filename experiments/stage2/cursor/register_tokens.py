"""cursor_flux_talk_register_tokens v1. RegisterTokenModule; its code is tvl_align/methods/cursor.py."""

from tvl_align.methods.cursor import CursorConfig, RegisterTokenModule

__all__ = ["CursorConfig", "RegisterTokenModule"]
