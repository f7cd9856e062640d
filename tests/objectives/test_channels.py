import numpy as np
import pytest
import torch
from scipy import ndimage

from avrl.objectives.channels import magno, parvo, unit

PAIR = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_m_is_the_change_of_luma_and_colour():
    m = magno(PAIR[:, 0], PAIR[:, 1]).numpy()
    t, tk = PAIR[:, 0].numpy(), PAIR[:, 1].numpy()
    light = [0.2126 * x[:, 0] + 0.7152 * x[:, 1] + 0.0722 * x[:, 2] for x in (t, tk)]
    assert m.shape == (2, 4, 32, 32)
    np.testing.assert_allclose(m[:, 0], light[1] - light[0], atol=1e-6)
    np.testing.assert_allclose(m[:, 1:], tk - t, atol=1e-6)


def test_p_is_sobel_of_standardised_luma_and_the_picture():
    img = PAIR[:1, 0]
    p = parvo(img)[0].numpy()
    light = np.tensordot([0.2126, 0.7152, 0.0722], img[0].numpy(), 1)
    z = ((light - light.mean()) / light.std(ddof=1)).clip(-3, 3)
    padded = np.pad(z, 1, mode="edge")
    kernel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
    x, y = (windows * kernel).sum((2, 3)), (windows * kernel.T).sum((2, 3))
    largest = np.sqrt(x**2 + y**2).max()
    np.testing.assert_allclose(p[0], x / largest, atol=1e-4)
    np.testing.assert_allclose(p[1], y / largest, atol=1e-4)
    np.testing.assert_allclose(p[2:], img[0].numpy(), atol=1e-6)
    assert np.sqrt(p[0] ** 2 + p[1] ** 2).max() == pytest.approx(1, abs=1e-4)


def test_p_is_what_scipy_makes_of_it():
    """A second reference, of the whole of P for a batch: its Sobel, its borders."""
    for img, found in zip(PAIR[:, 0].double().numpy(), parvo(PAIR[:, 0]).numpy(), strict=True):
        light = np.einsum("c,chw->hw", [0.2126, 0.7152, 0.0722], img)
        z = ((light - light.mean()) / light.std(ddof=1)).clip(-3, 3)
        edges = np.stack([ndimage.sobel(z, axis=axis, mode="nearest") for axis in (1, 0)])
        np.testing.assert_allclose(found[:2], edges / np.hypot(*edges).max(), atol=1e-5)
        np.testing.assert_allclose(found[2:], img, atol=1e-6)


def test_p_is_the_same_under_autocast():
    smooth = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = parvo(smooth)
    assert found.dtype == torch.float32
    assert torch.equal(found, parvo(smooth))


def test_a_flat_picture_gives_no_edges_and_no_nan():
    p = parvo(torch.full((1, 3, 32, 32), 0.5))
    assert torch.isfinite(p).all()
    assert p[:, :2].abs().max() < 1e-3


def test_unit_scales_and_averages_areas_and_refuses_floats():
    frames = torch.randint(0, 256, (2, 2, 64, 64, 3), dtype=torch.uint8)
    small = unit(frames, 32)
    means = frames.float().view(2, 2, 32, 2, 32, 2, 3).mean((3, 5)).movedim(-1, 2) / 255
    assert small.shape == (2, 2, 3, 32, 32)
    torch.testing.assert_close(small, means)
    assert unit(frames, 64).max() <= 1
    with pytest.raises(TypeError, match="uint8"):
        unit(frames.float(), 32)
