"""The Zarr v3 codec of the frame store: one JPEG a chunk, under the name and options that imagecodecs uses.

With avrl installed, plain zarr-python finds it by its entry point; where ``imagecodecs.zarr`` is installed
(Python >= 3.12), that reads the same stores without us.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejpeg
from zarr.abc.codec import ArrayBytesCodec

if TYPE_CHECKING:
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, NDBuffer


def encode(frame: np.ndarray, quality: int) -> bytes:
    """JPEG of a frame, 4:4:4: at 224 px the 4:2:0 of the source has full chroma left to keep.

    Args:
        frame: uint8, (H, W, 3) RGB or (3, H, W) with the planes Y, Cb, Cr as JPEG has them (full range, BT.601).
        quality: 1..100.
    """
    if frame.shape[-1] == 3:
        return bytes(simplejpeg.encode_jpeg(frame, quality=quality, colorspace="RGB", colorsubsampling="444"))
    return bytes(simplejpeg.encode_jpeg_yuv_planes(*frame, quality=quality))


@dataclass(frozen=True)
class ImagecodecsJpeg(ArrayBytesCodec):
    """A chunk of shape (1, H, W, 3) uint8 as one JPEG file."""

    level: int = 90
    subsampling: str = "444"
    is_fixed_size = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ImagecodecsJpeg:
        """Read the codec's entry in ``zarr.json``."""
        options = data.get("configuration", {})
        return cls(options.get("level", 90), options.get("subsampling", "444"))

    def to_dict(self) -> dict[str, Any]:
        """The codec's entry in ``zarr.json``."""
        return {
            "name": "imagecodecs_jpeg",
            "configuration": {"level": self.level, "subsampling": self.subsampling},
        }

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Not known beforehand: JPEG is of variable length."""
        raise NotImplementedError

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        frame = simplejpeg.decode_jpeg(chunk_bytes.to_bytes(), colorspace="RGB")
        return chunk_spec.prototype.nd_buffer.from_ndarray_like(frame.reshape(chunk_spec.shape))

    def _encode_sync(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        frame = np.ascontiguousarray(chunk_array.as_numpy_array()[0])
        return chunk_spec.prototype.buffer.from_bytes(encode(frame, self.level))

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        return self._decode_sync(chunk_bytes, chunk_spec)

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        return self._encode_sync(chunk_array, chunk_spec)
