"""How wide a 95 % bootstrap interval must be for few units."""

import math

from scipy import stats

# What a 95 % interval leaves out on either side.
TAIL = 0.025


def expanded_tail(units: int) -> float:
    r"""What the percentiles of a bootstrap leave out on either side, narrowed for few units.

    Percentiles of a bootstrap over :math:`n` units are too narrow for a small :math:`n`: they take
    a normal distribution for Student's and a variance over :math:`n` for one over :math:`n - 1`.
    Percentiles at

    .. math:: \Phi\left(\pm\sqrt{n / (n - 1)} \, t_{0.975, n - 1}\right)

    undo both. For many units they are the usual ones.

    Args:
      units: how many are resampled, at least 2.

    Returns:
      The lower tail, in (0, 0.025].

    References:
      Hesterberg, 2015, "What Teachers Should Know About the Bootstrap" (the expanded percentile
      interval), arXiv:1411.5279.
    """
    quantile = math.sqrt(units / (units - 1)) * stats.t.ppf(TAIL, units - 1)
    return float(stats.norm.cdf(quantile))
