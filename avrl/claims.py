"""What a stranger's files claim, checked as it is read: JSON, parquet, counts, times, path templates."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

from avrl.errors import IntegrityError
from avrl.zips import fault_of_name

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import polars as pl

FIELD = re.compile(r"\{(\w+)(?::0?(\d{1,2})d)?\}")  # {episode_index:06d}; what else str.format does is not wanted
COUNTS = ("episode_index", "frame_index", "task_index", "length")  # whole numbers, whatever type they come in
AGAIN = "fetch the data set again"
MOST_ROWS = 2_000_000  # of a list of episodes or tasks; no data set has as many


def parquet(
    path: Path,
    columns: tuple[str, ...] = (),
    index: int | None = None,
    *,
    lacking: bool = False,
    most: int = MOST_ROWS,
) -> pl.DataFrame:
    """Columns of a parquet file of at most so many rows, of one episode if an index is given.

    Raises:
        IntegrityError: it is damaged or missing, claims more rows, or lacks a column and may not.
    """
    import polars as pl

    try:
        scan = pl.scan_parquet(path, glob=False)
        there = scan.collect_schema().names()
        claimed = scan.select(pl.len()).collect().item()
        if claimed > most:  # a few bytes of it can stand for gigabytes
            raise IntegrityError(f"{path} claims {claimed} rows, where {most} are many", AGAIN)
        missing = [one for one in columns if one not in there]
        if missing and not lacking:
            raise IntegrityError(f"{path} has no column {missing[0]!r}", AGAIN)
        if columns:
            there = [one for one in columns if one in there]
            scan = scan.select(pl.col(one).cast(pl.Int64) if one in COUNTS else one for one in there)
        return (scan if index is None else scan.filter(pl.col("episode_index") == index)).collect()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:  # some flipped bits: panic
        words = str(error).partition("\n")[0]
        raise IntegrityError(f"{path} is damaged or missing: {words:.200}", AGAIN) from error


def json_object(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        IntegrityError: it is something else, or no UTF-8.
    """
    try:
        found = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{name} is no JSON: {error}", AGAIN) from error
    if not isinstance(found, dict):
        raise IntegrityError(f"{name} is no JSON object", AGAIN)
    return found


def filled(template: Any, values: Mapping[str, Any], name: str) -> str:
    """A path below a folder by its template, whose fields are `values`.

    Raises:
        IntegrityError: the template is none, or the path leaves the folder.
    """

    def fill(match: re.Match[str]) -> str:
        value = values.get(match[1], "{}")
        return f"{value:0{int(match[2])}d}" if match[2] and isinstance(value, int) else str(value)

    path = FIELD.sub(fill, str(template))
    fault = "has fields that are not known" if "{" in path or not isinstance(template, str) else fault_of_name(path)
    if fault:
        raise IntegrityError(f"{name} {template!r:.200} {fault}", "do not use this data set")
    return path


def whole(value: Any, what: str, least: int = 0) -> int:
    """A whole number, at least so much and below a billion.

    Raises:
        IntegrityError: it is something else.
    """
    if type(value) is not int or not least <= value < 10**9:
        raise IntegrityError(f"{what} is {value!r:.60}, no number from {least} on", AGAIN)
    return value


def number(value: Any, what: str, least: float) -> float:
    """A finite number, at least so much.

    Raises:
        IntegrityError: it is something else.
    """
    if type(value) not in (int, float) or not least <= value < math.inf:
        raise IntegrityError(f"{what} is {value!r:.60}, no number from {least:g} on", AGAIN)
    return float(value)
