"""Named ways to score faster than exactly. Standard library only.

The default, ``exact``, computes the reward in the dtype as it was published. Every other mode gives another reward,
so it is part of a scorer's identity, and ``assay precision`` says by how much for one checkpoint.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from model.errors import ConfigError

EXACT = "exact"
INT8 = "int8"  # projections of the language model in int8, on CPU and GPU
FP8 = "fp8"  # the same in float8 (e4m3), on GPUs of capability 8.9 and more
FEW_CROPS = "few_crops"  # phi3v: a quarter of the crops; exact arithmetic on a coarser picture
MODES = (EXACT, INT8, FP8, FEW_CROPS)
ROUNDED_MODES = (INT8, FP8)

_CROPS_DIVISOR = 4  # 16 crops, as published, become 4: a square picture takes 757 image tokens instead of 2509


class ModeSettings(Protocol):
    """A configuration that names a mode and what it must go with."""

    @property
    def mode(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def adapters(self) -> str: ...


Settings = TypeVar("Settings", bound=ModeSettings)


def check_mode(mode: str, dtype: str, adapters: str = "auto") -> str:
    """``mode`` itself; raises ``ConfigError`` if it is unknown, or does not go with ``dtype`` or ``adapters``.

    - adapters: as in ``model.scorer.load``. What is rounded is another weight with LoRA merged than without, so eight
      bits have one form only, or equal identities would give unequal rewards
    """
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r} is unknown, expected one of {list(MODES)}")
    if mode == FP8 and dtype != "bfloat16":
        raise ConfigError(f"mode='fp8' computes in bfloat16, not in {dtype}; set dtype=bfloat16 with it")
    if mode in ROUNDED_MODES and adapters == "low_rank":
        raise ConfigError(f"adapters='low_rank' does not go with mode={mode!r}, which rounds merged weights; use auto")
    return mode


def checked_settings(settings: Settings) -> Settings:
    """``settings`` themselves: ``check_mode`` as a validator of configurations, which may raise ``ValueError`` only."""
    try:
        check_mode(settings.mode, settings.dtype, settings.adapters)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return settings


def crops_of(mode: str, family: str, num_crops: int) -> int:
    """The most crops of a picture in this mode, at least 1.

    - family, num_crops: as in ``scorer.json``
    - raises: ``ConfigError`` where there are no crops to leave out
    """
    if mode != FEW_CROPS:
        return num_crops
    if family != "phi3v":
        raise ConfigError(f"mode='few_crops' is for phi3v alone, this checkpoint is of family {family!r}; use int8")
    if num_crops == 1:
        raise ConfigError("mode='few_crops': this checkpoint has num_crops=1 already; use mode=exact")
    return max(1, num_crops // _CROPS_DIVISOR)
