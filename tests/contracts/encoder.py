"""What every encoder promises: bytes in, named float vectors out, the same whatever the company."""

import pytest
import torch


def pictures(n, T, size, seed=0):
    """Smooth pictures that differ, uint8 (n, T, size, size, 3): noise alone looks the same to a network."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n * T, 3, 7, 7, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)
    return (fine * 255).byte().permute(0, 2, 3, 1).reshape(n, T, size, size, 3).contiguous()


class EncoderContract:
    """Subclass as ``class TestMine(EncoderContract)`` with `make`."""

    other_size = 96  # px: an input that is not of the encoder's own size

    def make(self):
        """The encoder under test. Called once a class."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def encoder(cls):
        torch.set_num_threads(1)
        return cls().make()

    @pytest.fixture(scope="class")
    @classmethod
    def frames(cls, encoder):
        return pictures(4, 2 if encoder.paired else 1, encoder.image_size)

    @pytest.fixture(scope="class")
    @classmethod
    def encoded(cls, encoder, frames):
        return encoder.encode(frames)

    def test_gives_a_finite_float32_row_a_sample_for_each_readout(self, encoder, encoded):
        assert {name: tuple(z.shape) for name, z in encoded.items()} == {
            name: (4, dims) for name, dims in encoder.readouts.items()
        }
        for z in encoded.values():
            assert z.dtype == torch.float32
            assert torch.isfinite(z).all()

    def test_tells_pictures_apart(self, encoded):
        for name, z in encoded.items():
            assert (z[0] - z[1]).abs().max() > 1e-4 * z.abs().max(), name

    def test_is_the_same_alone_and_in_company(self, encoder, frames, encoded):
        for i, one in enumerate(frames.split(1)):
            for name, z in encoder.encode(one).items():
                torch.testing.assert_close(z[0], encoded[name][i], rtol=1e-5, atol=1e-5)

    def test_is_close_to_itself_in_bfloat16(self, encoder, frames, encoded):
        if isinstance(encoder, torch.nn.Module) and not any(True for _ in encoder.parameters()):
            pytest.skip("it has no weights: nobody runs it in another precision")
        with torch.autocast("cpu", torch.bfloat16):
            half = encoder.encode(frames)
        for name, z in encoded.items():
            assert half[name].dtype == torch.float32
            assert torch.nn.functional.cosine_similarity(half[name], z).min() > 0.99, name

    def test_is_the_same_twice(self, encoder, frames, encoded):
        for name, z in encoder.encode(frames).items():
            assert torch.equal(z, encoded[name])

    def test_carries_no_gradient(self, encoder, encoded):
        assert not any(z.requires_grad for z in encoded.values())
        if isinstance(encoder, torch.nn.Module):
            assert not encoder.training
            assert not any(parameter.requires_grad for parameter in encoder.parameters())

    def test_refuses_frames_that_are_not_bytes(self, encoder, frames):
        with pytest.raises(TypeError, match="uint8"):
            encoder.encode(frames.float() / 255)

    def test_refuses_another_number_of_frames(self, encoder, frames):
        with pytest.raises(ValueError, match="frames must be"):
            encoder.encode(torch.cat([frames, frames], 1))

    def test_takes_another_square_size(self, encoder):
        frames = pictures(1, 2 if encoder.paired else 1, self.other_size)
        for name, z in encoder.encode(frames).items():
            assert z.shape == (1, encoder.readouts[name])
            assert torch.isfinite(z).all()

    def test_leaves_the_frames_as_they_are(self, encoder, frames):
        before = frames.clone()
        encoder.encode(frames)
        assert torch.equal(frames, before)
