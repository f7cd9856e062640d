"""The pixel floor against a numpy reference."""

import numpy as np
import pytest
import torch
from contracts.encoder import EncoderContract, pictures

from avrl import encoders
from avrl.errors import ConfigError


class TestPixels8(EncoderContract):
    def make(self):
        return encoders.load("pixels-8")


class TestPixels16(EncoderContract):
    other_size = 100  # 16 does not divide it

    def make(self):
        return encoders.load("pixels-16")


@pytest.mark.parametrize("side", [8, 16])
def test_is_the_difference_of_block_means(side):
    frames = pictures(3, 2, 64)
    blocks = frames.numpy().astype(float).reshape(3, 2, side, 64 // side, side, 64 // side, 3).mean((3, 5)) / 255
    expected = (blocks[:, 1] - blocks[:, 0]).reshape(3, -1)
    z = encoders.load(f"pixels-{side}").encode(frames)["difference"]
    np.testing.assert_allclose(z, expected, atol=1e-6)


def test_areas_are_exact_where_the_side_does_not_divide():
    # Enlarged by pixel repetition to a size that divides, the block means are the fractional areas' means.
    frames = pictures(2, 2, 30)
    enlarged = frames.repeat_interleave(8, 2).repeat_interleave(8, 3)
    encoder = encoders.load("pixels-16")
    torch.testing.assert_close(
        encoder.encode(frames)["difference"], encoder.encode(enlarged)["difference"], atol=1e-5, rtol=0
    )


def test_stands_for_later_minus_earlier():
    black, white = torch.zeros(1, 1, 16, 16, 3).byte(), torch.full((1, 1, 16, 16, 3), 255).byte()
    z = encoders.load("pixels-8").encode(torch.cat([black, white], 1))["difference"]
    assert torch.equal(z, torch.ones(1, 192))


def test_has_no_random_twin():
    with pytest.raises(ConfigError, match="no weights"):
        encoders.load("pixels-8", init="random")
