import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wealy_ray.audio import BytesSource
from wealy_ray.audio.source import BLOCK_BYTES, NUM_CACHED_BLOCKS, SourceFile

DATA = np.random.default_rng(0).bytes(3 * BLOCK_BYTES + 123)


class LoggingSource(BytesSource):
    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.reads: list[tuple[int, int]] = []

    def read(self, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        return super().read(offset, length)


@given(
    moves=st.lists(
        st.one_of(
            st.tuples(st.just("read"), st.integers(0, 2 * BLOCK_BYTES)),
            st.tuples(st.just("seek"), st.integers(0, len(DATA) + 10)),
            st.tuples(st.just("back"), st.integers(0, len(DATA))),
        ),
        max_size=20,
    )
)
def test_it_reads_like_a_file(moves):
    file, expected = SourceFile(BytesSource(DATA)), io.BytesIO(DATA)
    for move, number in moves:
        if move == "read":
            got = file.read(number)
            assert len(got) <= number
            assert got == expected.read(len(got))
            assert got or number == 0 or file.tell() >= len(DATA)
        else:
            where = (number, io.SEEK_SET) if move == "seek" else (-number, io.SEEK_END)
            assert file.seek(*where) == expected.seek(*where)
        assert file.tell() == expected.tell()


def test_reads_are_whole_blocks_and_are_kept():
    source = LoggingSource(DATA)
    file = SourceFile(source)
    while file.read(32_768):
        pass
    file.seek(0)
    while file.read(32_768):
        pass
    assert source.reads == [(i * BLOCK_BYTES, BLOCK_BYTES) for i in range(3)] + [(3 * BLOCK_BYTES, 123)]


def test_the_cache_is_bounded():
    file = SourceFile(BytesSource(bytes((NUM_CACHED_BLOCKS + 4) * BLOCK_BYTES)))
    while file.read(BLOCK_BYTES):
        pass
    assert len(file._blocks) == NUM_CACHED_BLOCKS


def test_read_at_crosses_blocks_and_leaves_the_position():
    file = SourceFile(BytesSource(DATA))
    file.seek(7)
    assert file.read_at(BLOCK_BYTES - 5, BLOCK_BYTES + 10) == DATA[BLOCK_BYTES - 5 : 2 * BLOCK_BYTES + 5]
    assert file.read_at(len(DATA) - 3, 100) == DATA[-3:]
    assert file.tell() == 7


def test_the_first_error_stays():
    class Broken(BytesSource):
        def read(self, offset: int, length: int) -> bytes:  # noqa: ARG002
            raise ConnectionError(f"broken at {offset}")

    file = SourceFile(Broken(DATA))
    for _ in range(2):
        with pytest.raises(ConnectionError, match="broken at 0"):
            file.read(10)
        file.seek(2 * BLOCK_BYTES)
    assert str(file.error) == "broken at 0"
