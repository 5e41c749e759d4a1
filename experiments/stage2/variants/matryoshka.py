"""stage2_matryoshka v1.1. Its code is tvl_align/methods/matryoshka.py."""

from tvl_align.methods.matryoshka import MATRYOSHKA, Matryoshka, MatryoshkaConfig, MatryoshkaLoss

__all__ = ["MATRYOSHKA", "Matryoshka", "MatryoshkaConfig", "MatryoshkaLoss"]
