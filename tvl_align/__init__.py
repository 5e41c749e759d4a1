"""Register tokens over frozen touch, vision and language encoders. Public names are imported on first use."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvl_align.features.store import FeatureStore
    from tvl_align.inference.registers import Embeddings, Registers, load
    from tvl_align.methods.base import Stage2Loss, TVLStage2
    from tvl_align.methods.registry import METHODS
    from tvl_align.system.console import UserError

__all__ = [
    "METHODS",
    "Embeddings",
    "FeatureStore",
    "Registers",
    "Stage2Loss",
    "TVLStage2",
    "UserError",
    "__version__",
    "load",
]

_MODULES = {
    "Embeddings": "tvl_align.inference.registers",
    "FeatureStore": "tvl_align.features.store",
    "METHODS": "tvl_align.methods.registry",
    "Registers": "tvl_align.inference.registers",
    "Stage2Loss": "tvl_align.methods.base",
    "TVLStage2": "tvl_align.methods.base",
    "UserError": "tvl_align.system.console",
    "load": "tvl_align.inference.registers",
}

try:
    __version__ = version("tvl-align")
except PackageNotFoundError:  # run from a checkout without installing
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
