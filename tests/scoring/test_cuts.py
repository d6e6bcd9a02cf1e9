"""Cuts: counted one by one and by arithmetic, they are the same; the limit takes no row too many."""

from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st

from qwen_vl_classifier.scoring.cuts import Cuts, TextScan


@given(
    files=st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=4),
    shard_size=st.integers(1, 8),
    limit=st.one_of(st.none(), st.integers(1, 30)),
    grouped=st.booleans(),
)
def test_counting_and_arithmetic_cut_alike(files, shard_size, limit, grouped):
    each, ranges = Cuts(shard_size, limit), Cuts(shard_size, limit)
    for index, pictures in enumerate(files):
        if each.full:
            assert ranges.full
            break
        before = each.rows
        taken: list[int] = []
        rows = ((taken.append(start), (start, start + 1, picture))[1] for start, picture in enumerate(pictures))
        each.add_each(index, rows, (lambda before, now: before[1] == now[1]) if grouped else None)
        ranges.add_range(
            index,
            len(pictures),
            (lambda position, pictures=pictures: pictures[position] == pictures[position - 1]) if grouped else None,
        )
        assert len(taken) == each.rows - before  # no row was looked at that was not added
    assert each.rows == ranges.rows
    assert [each.shard(index) for index in range(len(each))] == [ranges.shard(index) for index in range(len(ranges))]
    if limit is not None:
        assert each.rows == min(limit, sum(map(len, files)))


def test_no_line_is_taken_beyond_the_limit():
    scan = TextScan(io.BytesIO(b'{"a": 1}\n{"a": 2}\nrubbish\n'), "jsonl", "rows")
    cuts = Cuts(10, 2)
    cuts.add_each(0, scan.rows(), None)
    longer = TextScan(io.BytesIO(b'{"a": 1}\n{"a": 2}\n'), "jsonl", "rows")
    Cuts(10, 2).add_each(0, longer.rows(), None)
    assert (cuts.full, scan.digest()) == (True, longer.digest())


def test_a_scan_knows_where_rows_begin():
    content = b'\xef\xbb\xbftext,id\r\n\r\n"two\nlines",1\r\n"a",2'
    scan = TextScan(io.BytesIO(content), "csv", "rows")
    rows = list(scan.rows())
    assert rows == [(12, 2, ["two\nlines", "1"]), (29, 5, ["a", "2"])]
    assert scan.row(5, ["a", "2"]).values == {"text": "a", "id": "2"}


def test_a_billion_rows_are_a_matter_of_shards():
    cuts = Cuts(1000, None)
    cuts.add_range(0, 1_000_000_000, None)
    assert (len(cuts), cuts.rows) == (1_000_000, 1_000_000_000)
    assert cuts.shard(999_999) == (999_999_000, [(0, 999_999_000, 1000, 999_999_001)])
