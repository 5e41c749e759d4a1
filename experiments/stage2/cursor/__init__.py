"""cursor_flux_talk_register_tokens v1. The documented design taken literally."""

from experiments.stage2.cursor.loss import RegisterTokenLoss
from experiments.stage2.cursor.register_tokens import RegisterTokenModule

__all__ = ["RegisterTokenLoss", "RegisterTokenModule"]
