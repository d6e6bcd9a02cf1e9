"""Arrow to Python: the same values whatever else is installed, and no row lost for a column that it does not need."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from decimal import Decimal

import pyarrow
import pytest

from qwen_vl_classifier.data.arrow_values import python_rows

LATE = 1_700_000_000_123_456_789
UTC = datetime.UTC


def values(array, needed=()) -> list:
    return [row and row["a"] for row in python_rows(pyarrow.record_batch({"a": array}), needed)]


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pyarrow.array([LATE, None], pyarrow.timestamp("ns")), ["2023-11-14 22:13:20.123456789", None]),
        (pyarrow.array([0], pyarrow.timestamp("ns", "Europe/Berlin")), ["1970-01-01 00:00:00.000000000+0000"]),
        (pyarrow.array([0], pyarrow.timestamp("us", "Mars/Olympus")), [datetime.datetime(1970, 1, 1, tzinfo=UTC)]),
        (pyarrow.array([0], pyarrow.timestamp("s", "UTC")), [datetime.datetime(1970, 1, 1, tzinfo=UTC)]),
        (pyarrow.array([0], pyarrow.timestamp("ms")), [datetime.datetime(1970, 1, 1)]),
        (pyarrow.array([1], pyarrow.duration("ns")), ["1"]),
        (pyarrow.array([1], pyarrow.duration("us")), [datetime.timedelta(microseconds=1)]),
        (pyarrow.array([1], pyarrow.time64("ns")), ["00:00:00.000000001"]),
        (pyarrow.array([Decimal("1.50")], pyarrow.decimal128(9, 2)), [Decimal("1.50")]),
        (pyarrow.array([b"0" * 16, None], pyarrow.uuid()), ["30303030-3030-3030-3030-303030303030", None]),
        (pyarrow.array(['{"b": 1}', None], pyarrow.json_()), ['{"b": 1}', None]),
        (pyarrow.array([1, 0, None], pyarrow.bool8()), [True, False, None]),
        (pyarrow.array([b"x"], pyarrow.opaque(pyarrow.binary(), "point", "a database")), [b"x"]),
        (
            pyarrow.array([{"b": LATE}], pyarrow.struct([("b", pyarrow.timestamp("ns"))])),
            [{"b": "2023-11-14 22:13:20.123456789"}],
        ),
        (pyarrow.array([[LATE], []], pyarrow.list_(pyarrow.timestamp("ns"))), [["2023-11-14 22:13:20.123456789"], []]),
        (
            pyarrow.array([[("k", 0)]], pyarrow.map_(pyarrow.string(), pyarrow.time64("ns"))),
            [[("k", "00:00:00.000000000")]],
        ),
        (pyarrow.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pyarrow.array([LATE], pyarrow.timestamp("ns")).dictionary_encode(), ["2023-11-14 22:13:20.123456789"]),
        (pyarrow.array([{"bytes": b"x", "path": None}]), [{"bytes": b"x", "path": None}]),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_values_of_each_type(array, expected):
    assert values(array) == values(array, {"a"}) == expected


@pytest.mark.parametrize(
    ("array", "first"),
    [
        (pyarrow.array([0, 2**60], pyarrow.timestamp("us")), datetime.datetime(1970, 1, 1)),
        (
            pyarrow.array([0, 2**60], pyarrow.timestamp("us", "Europe/Berlin")),
            datetime.datetime(1970, 1, 1, tzinfo=UTC),
        ),
        (pyarrow.array([0, 2**30], pyarrow.date32()), datetime.date(1970, 1, 1)),
        (pyarrow.array([b"good", b"\xff"]).view("string"), "good"),
        (pyarrow.array([["good"], None, ["x"]]).slice(0, 1), ["good"]),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_what_python_cannot_hold_becomes_text_and_spoils_only_a_row_that_needs_it(array, first):
    free, needed = values(array), values(array, {"a"})
    assert free[0] == needed[0] == first
    assert all(isinstance(value, str) for value in free[1:])
    assert all(value is None for value in needed[1:])


def test_nested_values_that_cannot_be_read_spoil_no_row():
    broken = pyarrow.ListArray.from_arrays([0, 1, 2], pyarrow.array([b"good", b"\xff"]).view("string"))
    found = values(broken)
    assert found[0] == ["good"]
    assert isinstance(found[1], str)


def test_rows_without_columns():
    batch = pyarrow.RecordBatch.from_struct_array(pyarrow.array([{}, {}], pyarrow.struct([])))
    assert python_rows(batch) == [{}, {}]


def test_values_are_the_same_without_pandas_and_time_zones(tmp_path):
    """An installation with the plain dependencies has neither pandas nor, on some systems, a database of time zones."""
    script = tmp_path / "read.py"
    script.write_text(
        """import json, sys
blocked = {"pandas", "tzdata", "pytz", "zoneinfo", "dateutil"} if sys.argv[1] == "plain" else set()
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Block())
import pyarrow
from qwen_vl_classifier.data.arrow_values import python_rows
times = {
    f"{unit} {zone}": pyarrow.array([0, 1_700_000_000_123_456_789], pyarrow.timestamp(unit, zone))
    for unit in ("us", "ns") for zone in (None, "UTC", "Europe/Berlin", "+02:00")
}
times["long"] = pyarrow.array([1, 2**62], pyarrow.duration("ns"))
print(json.dumps(python_rows(pyarrow.record_batch(times)), default=repr))
"""
    )
    plain, full = (
        json.loads(subprocess.run([sys.executable, script, kind], check=True, capture_output=True).stdout)
        for kind in ("plain", "full")
    )
    assert plain == full
    assert plain[1]["ns None"] == "2023-11-14 22:13:20.123456789"
