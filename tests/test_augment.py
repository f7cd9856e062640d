"""Augmentation: the same for the frames of a sample, another for each sample, a function of its seed alone."""

import numpy as np
import pytest
import torch

from avrl.augment import GREY, HUE, JITTER, SMALLEST, _change, _look, augment
from avrl.objectives.channels import magno, unit

SEEDS = torch.arange(1, 7) * 0x1234_5678_9ABC


@pytest.fixture(scope="module")
def frames():
    """(B, 2, H, W, 3) with two different frames each."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 2, 32, 32, 3), dtype=np.uint8))


def test_frames_keep_shape_type_and_range_and_do_change(frames):
    before = frames.clone()
    out = augment(frames, SEEDS)
    assert out.shape == frames.shape
    assert out.dtype == torch.uint8
    assert torch.equal(frames, before)
    assert all((one != other).float().mean() > 0.5 for one, other in zip(out, frames, strict=True))
    oblong = augment(frames[:, :, :24], SEEDS)
    assert oblong.shape == (6, 2, 24, 32, 3)


def test_a_still_pair_stays_still(frames):
    still = frames[:, :1].expand(-1, 2, -1, -1, -1)
    out = augment(still, SEEDS)
    assert torch.equal(out[:, 0], out[:, 1])
    assert not magno(*unit(out, 32).unbind(1)).any()


@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_frames_gets_what_a_pair_gets(frames, count):
    clip = torch.cat([frames, frames[:, :1]], 1)[:, :count]
    assert torch.equal(augment(clip, SEEDS)[:, 0], augment(frames, SEEDS)[:, 0])


def test_a_sample_depends_on_its_own_seed_and_not_on_its_neighbours(frames):
    whole = augment(frames, SEEDS)
    assert torch.equal(augment(frames, SEEDS), whole)
    for ranks in (2, 3, 6):
        shares = zip(frames.chunk(ranks), SEEDS.chunk(ranks), strict=True)
        assert torch.equal(torch.cat([augment(*one) for one in shares]), whole)
    same = frames[:1].expand(6, -1, -1, -1, -1)
    looks = augment(same, SEEDS).flatten(1)
    assert len(looks.unique(dim=0)) == 6


def test_crops_colours_and_flips_are_spread_as_said():
    look = _look(np.random.default_rng(1).integers(0, 2**63, 20_000))
    across, side, x, y, *colours, offset = look.T.astype(np.float64)
    assert np.array_equal(abs(across), side)
    assert np.mean(across < 0) == pytest.approx(0.5, abs=0.015)
    assert np.histogram(side, 10, (SMALLEST, 1))[0] / 2000 == pytest.approx(np.ones(10), abs=0.1)
    for centre in (x, y):
        assert (abs(centre) + side).max() <= 1 + 1e-6  # no crop leaves the frame
        assert np.histogram(centre / (1 - side), 10, (-1, 1))[0] / 2000 == pytest.approx(np.ones(10), abs=0.1)
    brightness = (offset + GREY * sum(colours)) / GREY  # mid-grey is moved by brightness alone
    contrast = sum(colours) / brightness
    about = sum(colour * np.exp(2j * np.pi * i / 3) for i, colour in enumerate(colours)) / sum(colours)
    for factor in (brightness, contrast, abs(about)):
        assert factor.min() == pytest.approx(1 - JITTER, abs=1e-3)
        assert factor.max() == pytest.approx(1 + JITTER, abs=1e-3)
        assert factor.mean() == pytest.approx(1, abs=0.01)
    assert np.angle(about).min() == pytest.approx(-HUE, abs=1e-3)
    assert np.angle(about).max() == pytest.approx(HUE, abs=1e-3)
    each = np.corrcoef([side, across < 0, x, y, brightness, contrast, abs(about), np.angle(about)])
    assert abs(each - np.eye(8)).max() < 0.05


def changed(frames, *place):
    """Frames cropped and mirrored as said, their colours left alone."""
    return _change(frames, torch.tensor([*place, 1.0, 0, 0, 0]).expand(len(frames), -1))


def test_geometry_is_a_mirrored_and_a_shifted_picture(frames):
    assert torch.equal(changed(frames, 1, 1, 0, 0), frames)
    assert torch.equal(changed(frames, -1, 1, 0, 0), frames.flip(3))
    smooth = (torch.arange(32) * 7).view(1, 1, 1, 32, 1).expand(6, 2, 32, 32, 3).byte()
    wanted = ((16 + (torch.arange(32) + 0.5) / 2 - 0.5) * 7).clamp(max=31 * 7)
    right = changed(smooth, 0.5, 0.5, 0.5, 0)[0, 0, 0, :, 0]
    lower = changed(smooth.transpose(2, 3), 0.5, 0.5, 0, 0.5)[0, 0, :, 0, 0]
    for half in (right, lower):
        assert (half - wanted).abs().max() <= 0.5


def test_colours_keep_grey_grey_and_hue_turns_red_towards_green_or_blue(frames):
    grey = frames[..., :1].expand(-1, -1, -1, -1, 3)
    out = augment(grey, SEEDS)
    assert (out.int().amax(-1) - out.int().amin(-1)).max() <= 1
    dull_red = torch.tensor([150, 90, 90], dtype=torch.uint8).expand(6, 2, 8, 8, 3)
    turned = augment(dull_red, SEEDS)[:, 0, 0, 0].int()
    assert (turned[:, 0] > turned[:, 1:].amax(1)).all()
    assert len(set(turned[:, 1].gt(turned[:, 2]).tolist())) == 2
