"""What a binary COPY sends is parsed alike, however it is cut into pieces."""

import struct
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from qflare_server.storage.payload_store.database import COPY_HEADER, COPY_TRAILER, _CopyTarget


@given(
    st.lists(st.binary(max_size=40), max_size=6),
    st.lists(st.integers(0, 260), max_size=8),
    st.booleans(),
)
def test_the_values_come_out_however_the_copy_is_cut(
    values: list[bytes], cuts: list[int], by_row: bool
) -> None:
    rows = [struct.pack(">hi", 1, len(value)) + value for value in values]
    if by_row:  # as PostgreSQL sends it
        pieces = [COPY_HEADER, *rows, COPY_TRAILER]
    else:
        data = b"".join((COPY_HEADER, *rows, COPY_TRAILER))
        bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
        pieces = [data[start:end] for start, end in pairwise(bounds)]
    target = _CopyTarget()

    assert [target.write(piece) for piece in pieces] == [len(piece) for piece in pieces]

    assert target.values == values
