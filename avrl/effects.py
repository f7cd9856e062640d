"""An effect with its interval, judged: which verdict it bears, and how many episodes would decide it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from avrl.intervals import FEWEST
from avrl.tables import NOT_MEASURED
from avrl.words import say

if TYPE_CHECKING:
    from avrl.intervals import Interval

PASS, FAIL, UNDECIDED, NOT_COMPARABLE = "pass", "fail", "undecided", "not comparable"
VERDICTS = (PASS, UNDECIDED, FAIL, NOT_COMPARABLE, NOT_MEASURED)
WORTH = 100  # times as many episodes; what needs more than that is no difference worth deciding


class Effect(NamedTuple):
    """What was found.

    Attributes:
        verdict: One of `VERDICTS`.
        measure: What the numbers are, in words; without a number, why there is none.
        ends: The value and its interval; None where there is none, as of a single episode.
        episodes: Test episodes behind it.
        sample: How much it was measured on, in words.
        decides: What to type or to add; nothing where it is decided.
        form: How the numbers are written.
    """

    verdict: str
    measure: str = ""
    ends: tuple[float, float | None, float | None] | None = None
    episodes: int | None = None
    sample: str = ""
    decides: str = ""
    form: str = "{:.3f}"

    def as_row(self) -> dict[str, Any]:
        """Numbers and the words that stand for them, by column."""
        value, low, high = self.ends or (None, None, None)
        shown = "" if value is None else self.form.format(value) + " "
        shown += f"[{self.form.format(low)}, {self.form.format(high)}] " if low is not None else ""
        found = {"verdict": self.verdict, "value": value, "low": low, "high": high, "effect": shown + self.measure}
        return {**found, "episodes": self.episodes, "sample": self.sample, "decides": self.decides}


def plain(found: Interval) -> tuple[float, float, float]:
    """An interval of one number, as plain numbers."""
    value, low, high = (float(one) for one in found)
    return value, low, high


def judged(
    measure: str,
    ends: tuple[float, float | None, float | None],
    episodes: int,
    wanted: float = 0.0,
    form: str = "{:+.3f}",
) -> Effect:
    """Pass above what is wanted, fail below; undecided says how many episodes would tell, if the value stays.

    Without an interval nothing is decided, whatever the value.

    The half-width of an interval shrinks as one over the root of the number of episodes.
    """
    value, low, high = ends
    sample = say("{episodes} test episodes", episodes=f"{episodes:,}")
    if episodes < FEWEST or low is None or high is None or math.isnan(low + high):
        decides = say("some {n} test episodes, if the effect stays", n=f"{FEWEST:,}")
        return Effect(UNDECIDED, measure, (value, None, None), episodes, sample, decides, form)
    verdict = PASS if low > wanted else FAIL if high < wanted else UNDECIDED
    decides, apart = "", abs(value - wanted)
    times = ((high - low) / 2 / apart) ** 2 if apart else math.inf
    if verdict == UNDECIDED and times < WORTH:
        decides = say("some {n} test episodes, if the effect stays", n=f"{_rounded(episodes * max(times, 1)):,}")
    elif verdict == UNDECIDED:
        decides = say("too small to decide: over 100 times the episodes")
    return Effect(verdict, measure, ends, episodes, sample, decides, form)


def _rounded(number: float) -> int:
    """Up, to two digits: more would be pretended."""
    scale = 10 ** max(0, math.floor(math.log10(number)) - 1)
    return int(math.ceil(number / scale) * scale)
