"""Array types, and the statistics libraries: imported when called, so that nothing else has to have them."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import numpy.typing as npt

from model.errors import ConfigError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def library(module: str) -> Any:
    """The module, such as ``scipy.stats``. Raises ``ConfigError`` where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{module} is needed for this: install the extra 'evaluate'") from error
