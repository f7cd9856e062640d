"""`avrl.stills`: JPEG and PNG to the frame, or an error with file and number."""

from __future__ import annotations

import io
import struct
import zlib

import clips
import forms
import numpy as np
import pytest
from PIL import Image

from avrl import stills
from avrl.episodes import View
from avrl.errors import DecodeError


def test_a_png_comes_out_as_it_went_in_and_a_jpeg_nearly():
    (frame,) = clips.ramps(1)
    assert np.array_equal(stills.picture(forms.png(frame), "x", 0), frame)
    assert clips.psnr(stills.picture(clips.jpegs([frame])[0], "x", 0), frame) > 35


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "LA"])
def test_pngs_of_other_kinds_become_rgb(mode):
    buffer = io.BytesIO()
    Image.fromarray(clips.ramps(1)[0]).convert(mode).save(buffer, "png")
    assert stills.picture(buffer.getvalue(), "x", 0).shape == (64, 96, 3)


def claimed(width, height):
    """A PNG of a few bytes that claims so many pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, body, b"IEND")]
    return stills.PNG + b"".join(chunks)


def grown(jpeg):
    """The same JPEG, claiming 65,000 x 65,000 pixels."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", 65000, 65000) + jpeg[at + 4 :]


JPEG = clips.jpegs(clips.ramps(1))[0]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        JPEG[:-200],
        JPEG[:20],
        grown(JPEG),
        claimed(60000, 60000),
        claimed(9000, 9900),
        claimed(10, 10),
        forms.png(clips.ramps(1)[0])[:-30],
        clips.flipped(forms.png(clips.ramps(1)[0]), 60),
        b"GIF89a" + bytes(30),
        b"BM" + bytes(60),
    ],
    ids=range(11),
)
def test_what_is_damaged_or_claims_gigabytes_is_named(data):
    good = forms.png(clips.ramps(1)[0])
    found = stills.decode([good, data], View(16), "a.zip:images0", 3)
    assert next(found).shape == (16, 16, 3)
    with pytest.raises(DecodeError, match=r"a\.zip:images0: frame 3 does not decode") as caught:
        next(found)
    assert caught.value.frame == 3
