import pytest
import torch
from contracts.objective import ObjectiveContract, PairEncoderContract, batch, network

from avrl import checkpoint
from avrl.objectives import modules
from avrl.objectives.channels import unit
from avrl.objectives.videomae import noise


class TestVideoMAE(ObjectiveContract):
    name, options, steps = "videomae", {"mask_ratio": 0.5}, 100  # half of the four patches at 32 px


class TestVideoMAEOf16Frames(ObjectiveContract):
    name, options, steps = "videomae", {"mask_ratio": 0.5, "num_frames": 16}, 150

    def batch(self, n=4):
        frames, gap, seed = batch(n)
        return torch.cat([frames] * 8, 1), gap, seed


class TestVideoMAEEncoder(PairEncoderContract):
    name = "videomae"


class TestVideoMAEOf16FramesEncoder(PairEncoderContract):
    name, options = "videomae", {"num_frames": 16}


def test_masks_depend_on_the_sample_alone_and_hide_the_share_asked_for():
    seeds = torch.arange(1000) * 104729
    order = noise(seeds, 49).argsort(dim=1, stable=True)
    alone = noise(seeds[500:501], 49).argsort(dim=1, stable=True)
    assert torch.equal(order[500], alone[0])
    hidden = torch.zeros(1000, 49).scatter_(1, order[:, :37], 1)
    assert (hidden.mean(0) - 37 / 49).abs().max() < 0.06
    assert len({tuple(row) for row in order.tolist()}) == 1000


@pytest.mark.parametrize("frames", [2, 16])
def test_hidden_pixels_do_not_reach_the_prediction(frames):
    """The same places are hidden at every time: a tube."""
    objective = checkpoint.build(network("videomae", mask_ratio=0.5, num_frames=frames))
    seed = batch()[2]
    picture = torch.rand(4, frames // 2, 6, 32, 32)
    order = noise(seed, 4).argsort(dim=1, stable=True)
    hidden, visible = order[:, :2], order[:, 2:]
    before = objective._reconstruct(picture, hidden, visible)
    changed = picture.clone()
    for b in range(4):
        for patch in hidden[b].tolist():
            row, column = divmod(patch, 2)
            changed[b, :, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 0
    assert torch.equal(before, objective._reconstruct(changed, hidden, visible))


def test_predicting_each_patchs_mean_has_skill_zero():
    objective = checkpoint.build(network("videomae", mask_ratio=0.5))
    torch.nn.init.zeros_(objective.head.weight)
    torch.nn.init.zeros_(objective.head.bias)
    parts = objective.loss(*batch())
    torch.testing.assert_close(parts["error"], parts["reference"])


def test_the_target_is_normalised_over_both_frames_and_each_colour_by_itself():
    objective = checkpoint.build(network("videomae", mask_ratio=0.5))
    frames, _, seed = batch()
    tinted = (frames.float() * torch.tensor([0.9, 0.5, 0.2])).to(torch.uint8)  # a filter before the lens
    _, truth = objective.predict(frames, seed)
    cubes = truth.unflatten(-1, (2, 3, -1))
    torch.testing.assert_close(cubes.mean((2, 4)), torch.zeros((*cubes.shape[:2], 3)), atol=1e-4, rtol=0)
    torch.testing.assert_close(cubes.var((2, 4)), torch.ones((*cubes.shape[:2], 3)), atol=1e-2, rtol=0)
    assert cubes.mean(4).std(2).max() > 0.01  # a change of light between the frames stays in the target
    assert (objective.predict(tinted, seed)[1] - truth).abs().mean() < 0.1


def test_each_moment_of_a_clip_reaches_the_prediction():
    objective = checkpoint.build(network("videomae", mask_ratio=0.5, num_frames=16))
    frames, _, seed = batch(T=16)
    before = objective.predict(frames, seed)[0]
    assert before.shape == (4, 8 * 2, 6 * 256)
    for time in range(16):
        changed = frames.clone()
        changed[:, time] = 255 - changed[:, time]
        assert (objective.predict(changed, seed)[0] - before).abs().max() > 1e-3


def test_a_pair_is_spread_over_the_clip_each_slot_the_nearer_frame():
    objective = checkpoint.build(network("videomae", num_frames=16)).eval()
    frames = batch()[0]
    clip = unit(frames, 32)[:, [0] * 8 + [1] * 8]
    tokens = objective._encoded(objective._patches(objective._tubelets(clip)).flatten(1, 2))
    found = objective.encoder().encode(frames)
    torch.testing.assert_close(found["cls"], tokens[:, 0])
    torch.testing.assert_close(found["patch-mean"], tokens[:, 1:].mean(1))


def test_the_positions_of_a_clip_are_all_different_and_a_pair_has_none_in_time():
    clip, pair = (checkpoint.build(network("videomae", num_frames=n)) for n in (16, 2))
    for where, when in ((clip.tokens.position, clip.time), (clip.position, clip.narrow_time)):
        distance = torch.cdist(*[(where + when).flatten(0, 1)] * 2) + torch.eye(32) * 9
        assert distance.min() > 0.1
    assert not pair.time.any()
    assert not pair.narrow_time.any()


def test_no_weight_of_the_encoder_is_left_out_of_the_checkpoint():
    names = modules(checkpoint.build(network("videomae"))).state_dict()
    assert "tokens.project.weight" in names
    assert not any("position" in name for name in names)  # fixed, made again


def test_a_reconstruction_keeps_what_was_seen_and_has_the_tint_of_what_was_not():
    frames, _, seed = batch()
    objective = checkpoint.build(network("videomae", mask_ratio=0.5))
    with torch.no_grad():
        seen, drawn, target = objective.panels(frames, seed).values()
    hidden = (seen == 0.5).all(1, keepdim=True).expand_as(seen)
    assert hidden.float().mean() == 0.5
    assert torch.equal(seen[~hidden], target[~hidden])
    assert torch.equal(drawn[~hidden], target[~hidden])
    tiles = [torch.nn.functional.avg_pool2d(one, 16) for one in (drawn, target, torch.full_like(drawn, 0.5))]
    assert (tiles[0] - tiles[1]).abs().mean() < 0.5 * (tiles[2] - tiles[1]).abs().mean()
