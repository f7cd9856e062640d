"""The frame store: one sharded Zarr v3 array, read straight from its shards; plain zarr-python reads it too.

Layout of a shard file (Zarr's ``sharding_indexed``, index at the end): the chunks of up to `SHARD` frames, each
a JPEG and its crc32c, then (offset, length) as little-endian uint64 for every slot, then the index's crc32c.
An empty slot has both words all ones. A frame that is not there is an error here, never a black picture.

Legend: N frames, H W pixels, C=3 RGB.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import simplejpeg

from avrl.errors import IntegrityError, TemporaryError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import polars as pl

SHARD = 4096  # frames a file: some 70 MB and 4,300 files for EgoDex part 1; 8,192 doubles the loss of a kill
EMPTY = 2**64 - 1
CRC = struct.Struct("<I")
ORIGIN = "origin.json"  # beside the tables of a store whose shards lie in a bucket
SLOT = struct.Struct("<QQ")  # offset and length of a chunk
INDEX_BYTES = SHARD * SLOT.size + CRC.size  # of a shard, whatever it holds


def seal(content: bytes) -> bytes:
    """A chunk, or an index, as it lies in a shard: with its crc32c at the end."""
    return content + CRC.pack(google_crc32c.value(content))


# A message with its own crc behind it has the same crc, whatever it says: nothing is cut off, and so nothing copied, to
# compare them.
RESIDUE = google_crc32c.value(seal(b""))


def intact(sealed: bytes) -> bool:
    """Whether the crc32c at the end is that of what stands before it."""
    return len(sealed) > CRC.size and google_crc32c.value(sealed) == RESIDUE


def check_chunks(blob: bytes, lengths: list[int], path: Path) -> None:
    """Compare sealed chunks that lie end to end with their checksums.

    Raises:
        IntegrityError: they are not what was sealed (a power cut can leave a renamed file empty).
    """
    at = 0
    for length in lengths:
        if not intact(blob[at : at + length]):
            raise IntegrityError(f"{path} is damaged", f"rm {path.with_suffix('')}.* and run the same command")
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
        handle.write(seal(index.tobytes()))
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


def opened(root: Path, threads: int = 2) -> FrameStore:
    """The frame store below a folder, whether its shards lie here or in a bucket (`avrl.remotestore`)."""
    if not (root / ORIGIN).exists():
        return FrameStore(root, threads)
    from avrl.remotestore import RemoteStore  # loads boto3

    return RemoteStore(root, threads)


def index_of(sealed: bytes, slots: int, end: int) -> np.ndarray:
    """A shard's index out of its last bytes: (offset, length) of every slot, uint64; chunks lie before `end`.

    Raises:
        ValueError: it is damaged.
    """
    if not intact(sealed):
        raise ValueError("is damaged: its index has another crc32c")
    table = np.frombuffer(sealed[: -CRC.size], "<u8").reshape(slots, 2)
    used = table[table[:, 0] != EMPTY]
    if len(used) and int((used[:, 0] + used[:, 1]).max()) > end:
        raise ValueError("is damaged: its index points outside")
    return table


class Shard:
    """An open shard whose index is whole.

    Read with ``pread``, not through a mapping: page faults are served while the GIL is held, so threads cannot
    wait for a cold disk side by side, and page tables over 296 GB of shards cost each process 0.6 GB.

    Args:
        descriptor: Of the file; closed with the last reference, for another thread may still be reading.
        slots: Chunks that the index has room for.

    Raises:
        ValueError: the index is damaged.
    """

    def __init__(self, descriptor: int, slots: int) -> None:
        self._descriptor = descriptor
        self._index = os.fstat(descriptor).st_size - slots * SLOT.size - CRC.size  # the chunks lie before it
        sealed = os.pread(descriptor, slots * SLOT.size + CRC.size, self._index) if self._index >= 0 else b""
        index_of(sealed, slots, self._index)

    def __del__(self) -> None:
        os.close(self._descriptor)

    def chunk(self, slot: int) -> bytes | None:
        """A sealed chunk, or None if the slot is empty. The index is in the page cache, once for all ranks."""
        offset, length = SLOT.unpack(os.pread(self._descriptor, SLOT.size, self._index + slot * SLOT.size))
        return None if offset == EMPTY else os.pread(self._descriptor, length, offset)


class FrameStore:
    """Random access to the frames of a finished ``frames`` artifact.

    It may be used from several threads, after a fork and, pickled, in a spawned process.

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
        self._slots: int = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
        self._shards: dict[int, Shard] = {}
        self._most = _descriptors(metadata["shape"][0] // self._slots)
        self.threads = threads
        self._pools: dict[int, ThreadPoolExecutor] = {}

    def __len__(self) -> int:
        return int(self.episodes["length"].sum())

    def __reduce__(self) -> tuple[type[FrameStore], tuple[Path, int]]:
        return type(self), (self.root, self.threads)

    def _pool(self) -> ThreadPoolExecutor:
        """This process's own: after a fork the parent's has no threads, and would wait for ever."""
        return self._pools.get(os.getpid()) or self._pools.setdefault(os.getpid(), ThreadPoolExecutor(self.threads))

    def read(self, rows_N: np.ndarray, out_NHWC: np.ndarray | None = None, *, threads: int | None = None) -> np.ndarray:
        """Decode frames by row of the array.

        Args:
            rows_N: Rows, any order, repeats allowed.
            out_NHWC: Contiguous uint8 array to fill; made if not given.
            threads: Decoders at a time; the store's own number if not given.

        Returns:
            (N, H, W, 3) uint8 RGB.

        Raises:
            IntegrityError: a frame is missing or its checksum is wrong; the message names file and row.
            TemporaryError: the file system failed.
        """
        size = self.image_size
        if out_NHWC is None:
            out_NHWC = np.empty((len(rows_N), size, size, 3), np.uint8)
        threads = threads or self.threads
        if threads <= 1 or len(rows_N) < 2 * threads:
            self._decode(rows_N, out_NHWC)
            return out_NHWC
        cuts, pool = np.linspace(0, len(rows_N), threads + 1).astype(int), self._pool()
        jobs = [pool.submit(self._decode, rows_N[a:b], out_NHWC[a:b]) for a, b in itertools.pairwise(cuts)]
        for job in jobs:
            job.result()
        return out_NHWC

    def _decode(self, rows_N: np.ndarray, out_NHWC: np.ndarray) -> None:
        for row, out in zip(rows_N.tolist(), out_NHWC, strict=True):
            simplejpeg.decode_jpeg(self.jpeg(row), colorspace="RGB", buffer=out)

    def jpeg(self, row: int) -> memoryview:
        """The JPEG of a frame, checked against its crc32c.

        Raises:
            IntegrityError: see `read`.
            TemporaryError: see `read`.
        """
        number, slot = divmod(row, self._slots)
        try:
            sealed = (self._shards.get(number) or self._open(number)).chunk(slot)
        except FileNotFoundError as error:
            raise self._error(number, "is missing") from error
        except ValueError as error:
            raise self._error(number, str(error)) from error
        except OSError as error:
            again = "run the same command: it goes on"
            raise TemporaryError(f"{self._path(number)} cannot be read: {error.strerror}", again) from error
        if sealed is None:
            raise self._error(number, f"has no frame in row {row}")
        if not intact(sealed):
            raise self._error(number, f"is damaged: the frame in row {row} has another crc32c")
        return memoryview(sealed)[: -CRC.size]

    def _open(self, number: int) -> Shard:
        """Open a shard for its first frame; of two threads that do so at once, one's stays."""
        if len(self._shards) >= self._most:
            self._shards.clear()
        return self._shards.setdefault(number, Shard(os.open(self._path(number), os.O_RDONLY), self._slots))

    def _path(self, number: int) -> Path:
        return shard_path(self.root / "frames.zarr", number)

    def _error(self, number: int, words: str) -> IntegrityError:
        return IntegrityError(f"{self._path(number)} {words}", f"rm -r {self.root} and prep again")


def _descriptors(wanted: int) -> int:
    """How many shards to keep open: half of what the process may open, and more is asked for if that is too few.

    ``ulimit -n`` is often 1,024, which a process may raise by itself to the hard limit; part 1 has 4,300 shards.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2 * wanted:
        soft = min(2 * wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft // 2
