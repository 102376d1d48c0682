"""Intervals over seeds, paired comparisons, and what may be said of them."""

from typing import NamedTuple

import numpy as np
import torch
from scipy import special, stats

RESAMPLES = 10_000  # of each bootstrap and sign-flip test

AT_ONCE = 2_000_000  # numbers that are resampled in one batch: memory does not grow with the seeds

LARGEST = 1e100  # of a result: beyond it the variance would overflow

DRIFT = 1e-9  # logits of two processors differ by less in these studies: 6e-10 was measured


class Summary(NamedTuple):
    """Mean, standard deviation, the mean's 95 % interval, n seeds: prints ``81.2 [80.1, 82.3]``."""

    mean: float
    sd: float
    low: float
    high: float
    n: int

    def __str__(self):
        return "{:.1f} [{:.1f}, {:.1f}]".format(*map(_even, (self.mean, self.low, self.high)))


def summarize(results):
    """Return mean, standard deviation, 95 % interval and n of each array in `results`.

    `results` has for each name one finite number for each seed, as `run_seeds` returns. The
    interval is the bootstrap's expanded percentile interval, from 10,000 resamples: the plain one
    is too narrow by sqrt((n - 1) / n) and by normal instead of t quantiles (Hesterberg 2015,
    section 5.3, doi:10.1080/00031305.2015.1089789). Below 10 seeds it is Student's t interval.
    """
    summaries = {}
    for name, values in _checked(results).items():
        low, high = _interval(values)
        mean, sd = _even(np.mean(values)), _even(np.std(values, ddof=1))
        summaries[name] = Summary(mean, sd, low, high, len(values))
    return summaries


def close_calls(margins, *, drift=DRIFT):
    """Say in how many seeds a decision was so close that another processor might turn it.

    `margins` are each seed's closest decision, a gap between two logits; counted are those below
    100 x `drift`, by which the logits of two processors were seen to differ.
    """
    if not 0 < drift < np.inf:
        raise ValueError(f"drift = {drift} must be a positive number")
    margins = _checked({"margin": margins}, least=1)["margin"]
    near = int((margins < 100 * drift).sum())
    return f"Seeds with a decision closer than {100 * drift:.0e} logits: {near} of {len(margins)}"


class Comparison(NamedTuple):
    """Paired difference a - b over seeds, and what may be said of it.

    Mean difference with its 95 % interval (low, high); p of the two-sided sign-flip test, adjusted
    by Holm where several pairs were compared; wins, P(a > b), where a tie counts half; detectable,
    the difference that one comparison of n seeds of this spread finds with 80 % power. Folds of
    cross-validation take the place of seeds where `unit` says so.
    """

    difference: float
    low: float
    high: float
    p: float
    wins: float
    detectable: float
    n: int
    unit: str = "seeds"

    @property
    def verdict(self):
        """Return the difference in words.

        "better" or "worse" needs an interval without 0, p < 0.05, and P(a > b), or its
        complement, of 0.75 (after Bouthillier et al. 2021, section 4, arXiv:2103.03098); without
        the last it is so "on average" only.
        """
        if not self.sign:
            return f"not told apart at {self.n} {self.unit}"
        word, wins = ("better", self.wins) if self.sign == "▲" else ("worse", 1 - self.wins)
        return word if wins >= 0.75 else f"{word} on average, P = {_even(wins):.2f}"

    @property
    def sign(self):
        """Return "▲" (a is better), "▼" (worse) or "" (not told apart), for tables."""
        if self.low <= 0 <= self.high or self.p >= 0.05:
            return ""
        return "▲" if self.difference > 0 else "▼"

    @property
    def numbers(self):
        """Return the difference with its interval, as ``+2.8 [+0.7, +5.1]``."""
        rounded = map(_even, (self.difference, self.low, self.high))
        return "{:+z.1f} [{:+z.1f}, {:+z.1f}]".format(*rounded)

    @property
    def marked(self):
        """Return the numbers with their sign, for tables."""
        return f"{self.numbers} {self.sign}".rstrip()

    def detectable_among(self, comparisons):
        """Return the difference found with 80 % power where Holm adjusts for several comparisons.

        The first of them to be found is tested at 0.05 / `comparisons`.
        """
        one, several, power = stats.t.ppf([0.975, 1 - 0.025 / comparisons, 0.8], self.n - 1)
        return float(self.detectable * (several + power) / (one + power))

    def __str__(self):
        return f"{self.numbers:>20s}  {self.verdict}"


def compare(a, b):
    """Compare two methods on the same seeds: entry i of both comes from the same seed.

    Differences are taken in float64 and rounded to 10 decimals, so that ties are ties.
    """
    return _compared(*_checked({"a": a, "b": b}, paired=True).values())


def compare_pairs(results, pairs):
    """Compare several pairs of one table; their p-values are adjusted for being several.

    `results` is as in `summarize`; each pair is of two names in it, for the difference a - b. The
    adjustment is Holm's (1979, A simple sequentially rejective multiple test procedure, Scand. J.
    Stat. 6).
    """
    if missing := [name for pair in pairs for name in pair if name not in results]:
        raise ValueError(f"there are no results for {missing[0]!r}, only for {list(results)}")
    used = _checked({name: results[name] for pair in pairs for name in pair}, paired=True)
    plain = {(a, b): _compared(used[a], used[b]) for a, b in pairs}
    by_p = sorted(plain, key=lambda pair: plain[pair].p)
    scaled = [plain[pair].p * (len(plain) - i) for i, pair in enumerate(by_p)]
    adjusted = dict(zip(by_p, np.minimum(np.maximum.accumulate(scaled), 1), strict=True))
    return {pair: c._replace(p=float(adjusted[pair])) for pair, c in plain.items()}


def compare_folds(a, b, *, folds, least=0.0, tail=0.025):
    """Compare two methods by cross-validation: entry i of both comes from the same fold.

    The corrected resampled t-test (Nadeau & Bengio 2003, doi:10.1023/A:1024068626366): training
    sets of folds overlap, so the variance of a mean of J scores is (1 / J + n_test / n_train) s^2,
    not s^2 / J, with J - 1 degrees of freedom; n_test / n_train is 1 / (folds - 1). `least` is the
    smallest standard error to believe: folds without any difference are no proof that there is
    none. The interval leaves out `tail` on each side: 0.025, or less where several pairs are
    compared, and p is scaled by as much.
    """
    d = np.subtract(*_checked({"a": a, "b": b}, paired=True, unit="fold").values()).round(10)
    mean, n, error = _even(d.mean()), len(d), _resampled_error(d, folds, least)
    reach = special.stdtrit(n - 1, 1 - tail) * error
    p = min(1.0, 2 * float(special.stdtr(n - 1, -abs(mean) / error)) * 0.025 / tail)
    wins = float(np.mean(d > 0) + np.mean(d == 0) / 2)
    detectable = float(special.stdtrit(n - 1, [0.975, 0.8]).sum() * error)
    ends = _even(mean - reach), _even(mean + reach)
    return Comparison(mean, *ends, p, wins, detectable, n, unit="folds")


def summarize_folds(results, *, folds, least=0.0):
    """Return the `Summary` of each array of scores in percent, one for each fold.

    Its interval is that of `compare_folds`, cut at 0 and 100.
    """
    summaries = {}
    for name, values in _checked(results, unit="fold").items():
        reach = special.stdtrit(len(values) - 1, 0.975) * _resampled_error(values, folds, least)
        mean, sd = _even(values.mean()), _even(values.std(ddof=1))
        ends = _even(max(mean - reach, 0)), _even(min(mean + reach, 100))
        summaries[name] = Summary(mean, sd, *ends, len(values))
    return summaries


def _resampled_error(values, folds, least):
    variance = (1 / len(values) + 1 / (folds - 1)) * np.var(values, ddof=1)
    return max(float(np.sqrt(variance)), least, 1e-300)


def cheapest(results, names, *, margin=2.0):
    """Recommend the first of `names`, cheapest first, that loses less than `margin` to the best.

    The best has the highest mean; the loss to it must be below the margin with its whole 95 %
    interval (non-inferiority), not only undetected. Returns the name and its `Comparison` to the
    best, None for the best itself.
    """
    best = max(names, key=lambda name: round(float(np.mean(results[name])), 9))
    for name in names:
        if name == best:
            return name, None
        if (against := compare(results[name], results[best])).low > -margin:
            return name, against


def _checked(results, *, least=2, paired=False, unit="seed"):
    """Return float64 arrays; refuse what no mean, interval or comparison can be taken of."""
    checked = {}
    for name, values in results.items():
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu()
            values = values.float().numpy() if values.dtype == torch.bfloat16 else values.numpy()
        if np.ma.is_masked(values):
            raise ValueError(
                f"{name!r} has masked entries: leave their {unit}s out of every result"
            )
        values = np.asarray(values)
        if values.dtype.kind not in "biuf":
            raise ValueError(f"{name!r} has dtype {values.dtype}: results must be real numbers")
        if values.ndim != 1:
            raise ValueError(f"{name!r} has shape {values.shape}: one number for each {unit}, (n,)")
        if len(values) < least:
            raise ValueError(
                f"{name!r} has {len(values)} {unit}s: it takes at least {least} {unit}s"
            )
        usable = np.abs(checked.setdefault(name, values.astype(np.float64))) < LARGEST  # NaN is not
        if not usable.all():
            i = int(np.argmin(usable))
            raise ValueError(
                f"{name!r} is {values[i]} at {unit} index {i}, {(~usable).sum()} of its results are"
                f" NaN, infinite or beyond {LARGEST:g}: leave such {unit}s out of every result"
            )
    lengths = {name: len(values) for name, values in checked.items()}
    if paired and len(set(lengths.values())) > 1:
        raise ValueError(f"results do not pair up, {unit}s of each: {lengths}")
    return checked


def _compared(a, b):
    d = (a - b).round(10)
    low, high = _interval(d)
    p = stats.permutation_test(  # exchanging a pair's members flips the sign of its difference
        (d, np.zeros_like(d)),
        lambda x, y, axis: np.mean(x - y, axis).round(10),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES - 1,
        batch=max(1, AT_ONCE // len(d)),
        rng=np.random.default_rng(0),
    ).pvalue
    detectable = stats.t.ppf([0.975, 0.8], len(d) - 1).sum() * stats.sem(d)
    wins = float(np.mean(d > 0) + np.mean(d == 0) / 2)
    return Comparison(_even(d.mean()), low, high, float(p), wins, float(detectable), len(d))


def _interval(values):
    n = len(values)
    if n < 10:  # too few values to resample
        low, high = stats.t.interval(0.95, n - 1, np.mean(values), stats.sem(values) or 1e-300)
        return _even(low), _even(high)
    tail = stats.norm.cdf(stats.t.ppf(0.025, n - 1) * np.sqrt(n / (n - 1)))
    interval = stats.bootstrap(
        (values,),
        np.mean,
        method="percentile",
        confidence_level=1 - 2 * tail,
        n_resamples=RESAMPLES,
        batch=max(1, AT_ONCE // n),
        rng=np.random.default_rng(0),
    ).confidence_interval
    return _even(interval.low), _even(interval.high)


def _even(x):
    """Round away the last bits, so that a sign or a tie between two digits falls the same way."""
    return round(float(x), 9) + 0.0
