"""The frame store: one sharded Zarr v3 array, read straight from mapped shards; plain zarr-python reads it too.

Layout of a shard file (Zarr's ``sharding_indexed``, index at the end): the chunks of up to `SHARD` frames, each
a JPEG and its crc32c, then (offset, length) as little-endian uint64 for every slot, then the index's crc32c.
An empty slot has both words all ones. A frame that is not there is an error here, never a black picture.

Legend: N frames, H W pixels, C=3 RGB.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import simplejpeg

from avrl.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import polars as pl

SHARD = 4096  # frames a file: some 70 MB and 4,300 files for EgoDex part 1; 8,192 doubles the loss of a kill
EMPTY = 2**64 - 1
CRC_BYTES = 4
INDEX_BYTES = SHARD * 16 + CRC_BYTES  # of a shard, whatever it holds


def seal(jpeg: bytes) -> bytes:
    """A chunk as it lies in a shard: the JPEG and its crc32c."""
    return jpeg + struct.pack("<I", google_crc32c.value(jpeg))


def check_chunks(blob: bytes, lengths: list[int], path: Path) -> None:
    """Compare sealed chunks that lie end to end with their checksums.

    Raises:
        IntegrityError: they are not what was sealed (a power cut can leave a renamed file empty).
    """
    at, view = 0, np.frombuffer(blob, np.uint8)  # google_crc32c takes arrays, but no memoryview
    for length in lengths:
        body, crc = view[at : at + length - CRC_BYTES], view[at + length - CRC_BYTES : at + length]
        if len(crc) != CRC_BYTES or int(crc.view("<u4")[0]) != google_crc32c.value(body):
            raise IntegrityError(f"{path} is damaged", f"rm -r {path.parent.parent} and run the same command")
        at += length


def write_shard(path: Path, pieces: Iterable[tuple[bytes, list[int]]]) -> None:
    """Write a shard from pieces of sealed chunks: (bytes of some chunks end to end, length of each).

    One writer; the name shows nothing until the whole shard is there.
    """
    temporary = path.with_name(path.name + ".tmp")  # one name: what a kill leaves is overwritten, never published
    path.parent.mkdir(parents=True, exist_ok=True)
    index = np.full((SHARD, 2), EMPTY, dtype="<u8")
    row = position = 0
    with temporary.open("wb") as handle:
        for blob, lengths in pieces:
            handle.write(blob)
            for length in lengths:
                index[row] = position, length
                row, position = row + 1, position + length
        table = index.tobytes()
        handle.write(table + struct.pack("<I", google_crc32c.value(table)))
        handle.flush()
        os.fsync(handle.fileno())  # the chunks' other copy is unlinked as soon as the shard is recorded
    temporary.rename(path)


def create(root: Path, n_shards: int, image_size: int, quality: int) -> None:
    """Write the array's metadata, as zarr has it: ``frames`` (n_shards * SHARD, image_size, image_size, 3) uint8.

    Zarr writes into memory and the files are ours, so that a second call, after a kill, is the same as the first.
    """
    import zarr
    from zarr.codecs import Crc32cCodec

    from avrl.codec import ImagecodecsJpeg

    written: dict[str, Any] = {}
    zarr.create_array(
        store=zarr.storage.MemoryStore(written),
        name="frames",
        shape=(n_shards * SHARD, image_size, image_size, 3),
        chunks=(1, image_size, image_size, 3),
        shards=(SHARD, image_size, image_size, 3),
        dtype="uint8",
        serializer=ImagecodecsJpeg(level=quality),
        compressors=[Crc32cCodec()],
        fill_value=0,
        dimension_names=("frame", "height", "width", "channel"),
        write_data=False,
    )
    (root / "frames").mkdir(parents=True, exist_ok=True)
    for name, content in written.items():
        (root / name).write_bytes(content.to_bytes())


def shard_path(root: Path, shard: int) -> Path:
    """File of a shard below the Zarr root."""
    return root / "frames" / "c" / str(shard) / "0" / "0" / "0"


class FrameStore:
    """Random access to the frames of a finished ``frames`` artifact.

    Args:
        root: The artifact's directory, with ``frames.zarr`` and ``episodes.parquet``.
        threads: Decoder threads; libjpeg releases the GIL, so threads of the rank beat worker processes 2 to 1
            (`make bench`), and no batch is ever copied between processes.
    """

    def __init__(self, root: Path, threads: int = 2) -> None:
        import polars as pl

        self.root = root
        self.episodes: pl.DataFrame = pl.read_parquet(root / "episodes.parquet")
        metadata: dict[str, Any] = json.loads((root / "frames.zarr" / "frames" / "zarr.json").read_bytes())
        self.image_size: int = metadata["shape"][1]
        self._shard: int = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
        self._shards: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._threads = threads

    def __len__(self) -> int:
        return int(self.episodes["length"].sum())

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._threads)

    def read(self, rows_N: np.ndarray, out_NHWC: np.ndarray | None = None) -> np.ndarray:
        """Decode frames by row of the array.

        Args:
            rows_N: Rows, any order, repeats allowed.
            out_NHWC: Contiguous uint8 array to fill; made if not given.

        Returns:
            (N, H, W, 3) uint8 RGB.

        Raises:
            IntegrityError: a frame is missing or its checksum is wrong; the message names file and row.
        """
        size = self.image_size
        if out_NHWC is None:
            out_NHWC = np.empty((len(rows_N), size, size, 3), np.uint8)
        if self._threads <= 1 or len(rows_N) < 2 * self._threads:
            self._decode(rows_N, out_NHWC)
            return out_NHWC
        cuts = np.linspace(0, len(rows_N), self._threads + 1).astype(int)
        jobs = [self._pool.submit(self._decode, rows_N[a:b], out_NHWC[a:b]) for a, b in itertools.pairwise(cuts)]
        for job in jobs:
            job.result()
        return out_NHWC

    def _decode(self, rows_N: np.ndarray, out_NHWC: np.ndarray) -> None:
        for row, out in zip(rows_N.tolist(), out_NHWC, strict=True):
            simplejpeg.decode_jpeg(self.jpeg(row), colorspace="RGB", buffer=out)

    def jpeg(self, row: int) -> np.ndarray:
        """The JPEG of a frame as uint8 bytes, checked against their crc32c.

        Raises:
            IntegrityError: see `read`.
        """
        shard, slot = divmod(row, self._shard)
        data, index = self._shards.get(shard) or self._open(shard)
        offset, length = int(index[slot, 0]), int(index[slot, 1])
        if offset == EMPTY:
            raise IntegrityError(f"{shard_path(self.root / 'frames.zarr', shard)} has no frame in row {row}")
        body = data[offset : offset + length - CRC_BYTES]
        crc = data[offset + length - CRC_BYTES : offset + length]
        if google_crc32c.value(body) != int(crc.view("<u4")[0]):
            raise IntegrityError(
                f"{shard_path(self.root / 'frames.zarr', shard)}: the frame in row {row} is damaged (crc32c)",
                f"rm -r {self.root} and prep again",
            )
        return body

    def _open(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        path = shard_path(self.root / "frames.zarr", shard)
        table = self._shard * 16
        try:
            with path.open("rb") as handle:
                data = np.frombuffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except (OSError, ValueError) as error:
            raise IntegrityError(f"{path} cannot be read: {error}", f"rm -r {self.root} and prep again") from error
        tail = data[-table - CRC_BYTES :]
        whole = len(tail) == table + CRC_BYTES
        if not whole or google_crc32c.value(tail[:table]) != int(tail[table:].view("<u4")[0]):
            raise IntegrityError(f"{path}: its index is damaged (crc32c)", f"rm -r {self.root} and prep again")
        index = np.frombuffer(tail[:table], "<u8").reshape(self._shard, 2)
        used = index[index[:, 0] != EMPTY]
        if len(used) and int((used[:, 0] + used[:, 1]).max()) > len(data) - len(tail):
            raise IntegrityError(f"{path}: its index points outside", f"rm -r {self.root} and prep again")
        self._shards[shard] = data, index
        return self._shards[shard]
