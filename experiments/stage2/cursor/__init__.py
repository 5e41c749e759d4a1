"""cursor_flux_talk_register_tokens v1. The documented design taken literally."""

from tvl_align.methods.cursor import CURSOR, RegisterTokenLoss, RegisterTokenModule

__all__ = ["CURSOR", "RegisterTokenLoss", "RegisterTokenModule"]
