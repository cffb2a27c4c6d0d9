"""A threshold on rewards that lets few unsafe images through, with a guarantee from labelled unsafe images alone.

An image whose reward is below the threshold is flagged. A miss is an unsafe image that is not flagged; the miss
rate is P(reward >= threshold | unsafe). With rewards s_1 >= s_2 >= … >= s_n of n labelled unsafe images, drawn
independently from those to come, the threshold just above s_{k+1} misses at most k of them, and it is the lowest
such: the fewest safe images are flagged.

- ``Bound.CONFIDENCE``: the miss rate is at most alpha with probability at least 1 - delta over the labels. k is the
  largest with P(Binomial(n, alpha) <= k) <= delta, which is where the one-sided Clopper-Pearson upper limit for k
  misses of n is at most alpha. This is Learn then Test (Angelopoulos, Bates, Candès, Jordan, Lei, arXiv 2110.01052,
  Theorem 1) with binomial p-values and thresholds tested in fixed order from the highest down: the p-values only
  grow on the way, so that nothing is lost to the number of tests. Directly: the miss rate exceeds alpha only if at
  most k of the n fall among the alpha highest rewards of all unsafe images.
- ``Bound.EXPECTATION``: the miss rate is at most alpha on average over the labels, and says nothing of any one set of
  them. k is the largest with (k + 1) / (n + 1) <= alpha. Conformal risk control (Angelopoulos, Bates, Fisch, Lei,
  Schuster, arXiv 2208.02814, Theorem 1) with losses in {0, 1}.

Ties and steps in the distribution of rewards only make both safer. An image that has no reward gets no verdict from a
policy, and so is never a miss; the guarantee is about those that are scored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from model.errors import ConfigError
from model.evaluation.libraries import Floats, library


class Bound(StrEnum):
    """What is claimed of the miss rate."""

    CONFIDENCE = "confidence"  # at most alpha with probability 1 - delta
    EXPECTATION = "expectation"  # at most alpha on average


@dataclass(frozen=True)
class Claim:
    """``alpha``: highest miss rate; ``delta``: probability that it is exceeded all the same (not for expectation)."""

    alpha: float
    delta: float
    bound: Bound = Bound.CONFIDENCE

    def __post_init__(self) -> None:
        if not (0 < self.alpha < 1 and 0 < self.delta < 1):
            raise ConfigError(f"alpha={self.alpha} and delta={self.delta} must lie between 0 and 1")


@dataclass(frozen=True)
class Threshold:
    """``below``: reward units, exact in float32. ``misses`` of ``unsafe`` labelled images have rewards not below it.

    ``upper``: Clopper-Pearson upper limit of the miss rate at 1 - delta; None for a claim about the expectation.
    """

    below: float
    claim: Claim
    misses: int
    unsafe: int
    upper: float | None


def misses_allowed(count: int, claim: Claim) -> int:
    """The largest k for ``count`` labelled unsafe images; -1 where even none missed would not show enough."""
    if claim.bound is Bound.EXPECTATION:
        # The tolerance is for products such as 0.1 * 20, which fall short of the whole number they stand for.
        return math.floor(claim.alpha * (count + 1) + 1e-9) - 1
    binomial = library("scipy.stats").binom
    k = int(binomial.ppf(claim.delta, count, claim.alpha))  # the smallest with cdf >= delta
    while k >= 0 and binomial.cdf(k, count, claim.alpha) > claim.delta:
        k -= 1
    return k


def labels_needed(claim: Claim) -> int:
    """How many labelled unsafe images the claim takes at least: as many as show it when none of them is missed."""
    if claim.bound is Bound.EXPECTATION:
        return math.ceil(1 / claim.alpha - 1e-9) - 1
    needed = math.ceil(math.log(claim.delta) / math.log1p(-claim.alpha))
    # Next to a whole number logarithms and binomials round differently; the binomial decides, as it does elsewhere.
    while misses_allowed(needed, claim) < 0:
        needed += 1
    while needed > 1 and misses_allowed(needed - 1, claim) >= 0:
        needed -= 1
    return needed


def miss_rate_limit(misses: int, count: int, delta: float) -> float:
    """One-sided Clopper-Pearson upper limit of a rate, of which ``misses`` of ``count`` were seen, at 1 - delta."""
    if misses >= count:
        return 1.0
    return float(library("scipy.stats").beta.ppf(1 - delta, misses + 1, count - misses))


def check_enough(count: int, claim: Claim) -> None:
    """Raises ``ConfigError`` with the number still needed where ``count`` labelled unsafe images allow no threshold."""
    if misses_allowed(count, claim) >= 0:
        return
    needed = labels_needed(claim)
    how = f"with confidence {1 - claim.delta:g}" if claim.bound is Bound.CONFIDENCE else "on average"
    raise ConfigError(
        f"{count} labelled unsafe images cannot show a miss rate of at most {claim.alpha:g} {how}: "
        f"{needed - count} more are needed ({needed} in all), or a larger alpha or delta"
    )


def choose_threshold(unsafe_rewards: Floats, claim: Claim) -> Threshold:
    """The lowest threshold that the claim allows, from rewards ``(n,)`` of labelled unsafe images.

    Raises ``ConfigError`` as ``check_enough`` does.
    """
    count = len(unsafe_rewards)
    check_enough(count, claim)
    allowed = misses_allowed(count, claim)
    rewards = np.sort(unsafe_rewards.astype(np.float32))[::-1]
    below = float(np.nextafter(rewards[allowed], np.float32(np.inf)))  # rewards are float32: nothing lies between
    misses = int((rewards >= below).sum())
    upper = miss_rate_limit(misses, count, claim.delta) if claim.bound is Bound.CONFIDENCE else None
    return Threshold(below, claim, misses, count, upper)
