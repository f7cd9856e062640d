"""Pictures that lie one by one, as JPEG or PNG: strictly to a frame, or an error that names file and number."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from avrl.errors import DecodeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from avrl.episodes import View

MAX_PIXELS = 50_000_000  # a few hundred bytes may claim gigabytes
PNG = b"\x89PNG\r\n\x1a\n"


def decode(pictures: Iterable[bytes], view: View, name: str, stride: int = 1) -> Iterator[np.ndarray]:
    """Decode pictures, cropped and scaled by area averaging.

    Args:
        pictures: JPEG or PNG files, those that are kept.
        view: Size and crop.
        name: What to call them in errors.
        stride: Frames of the source from one of them to the next, for the frame number in an error.

    Yields:
        uint8 (image_size, image_size, 3) RGB.

    Raises:
        DecodeError: a picture is damaged.
    """
    for number, data in enumerate(pictures):
        yield fitted(picture(data, name, number * stride), view)


def picture(data: bytes, name: str, number: int) -> np.ndarray:
    """One picture as uint8 (height, width, 3) RGB.

    Raises:
        DecodeError: it is damaged, or neither JPEG nor PNG.
    """
    import simplejpeg
    from PIL import Image

    try:
        if data.startswith(PNG):  # checksummed; by name, as Pillow would try forty formats on what a stranger sent
            with Image.open(io.BytesIO(data), formats=["PNG"]) as opened:
                _require_size(*opened.size)
                return np.asarray(opened.convert("RGB"))
        _require_size(*simplejpeg.decode_jpeg_header(data)[:2])
        decoded: np.ndarray = simplejpeg.decode_jpeg(data, colorspace="RGB")
        return decoded
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError(name, number, str(error)) from error


def _require_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"it claims {width} x {height} pixels")


def fitted(picture_HWC: np.ndarray, view: View) -> np.ndarray:
    """A picture cropped as the view says and scaled by area averaging: uint8 (image_size, image_size, 3)."""
    from PIL import Image

    box = view.box(picture_HWC.shape[1], picture_HWC.shape[0])
    size = (view.image_size, view.image_size)
    return np.asarray(Image.fromarray(picture_HWC).resize(size, Image.Resampling.BOX, box))


def thumbnail(frame_HWC: np.ndarray, side: int) -> bytes:
    """A frame, uint8 (H, H, 3), as a small JPEG of `side` px."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(frame_HWC).resize((side, side), Image.Resampling.BOX).save(content, "JPEG", quality=75)
    return content.getvalue()
