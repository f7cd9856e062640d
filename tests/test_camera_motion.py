"""`avrl.camera_motion`: known homographies are found and taken off; what moves by itself is what is left."""

import numpy as np
import pytest
from sklearn.datasets import load_sample_images

from avrl import flow_labels
from avrl.camera_motion import camera_motion

SIZE = 224
CAMERAS = [
    [[1, 0, 5.5], [0, 1, -3.25], [0, 0, 1]],  # pans
    [[1.05, 0.04, -8], [-0.04, 1.03, 6], [1e-4, -1e-4, 1]],  # rolls, comes nearer, tilts
]
OWN = (5, -4)
PATCH = 64, 128  # its rows and columns in the first frame: whole places of the grid


def field(matrix):
    """Where a homography takes each pixel, (H, W, 2)."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(float)
    there = np.einsum("ij,jhw->ihw", np.array(matrix), np.stack([x, y, np.ones_like(x)]))
    return np.stack([there[0] / there[2] - x, there[1] / there[2] - y], 2)


@pytest.mark.parametrize("matrix", CAMERAS)
def test_a_known_homography_is_found_exactly_beside_what_moves_by_itself(matrix):
    """In a third of the picture, and with noise of the teacher over all of it."""
    truth = field(matrix)
    moving = np.zeros((SIZE, SIZE, 1), bool)
    moving[40:170, 60:190] = True
    flow = truth + moving * np.array(OWN)
    camera, homography = camera_motion(flow[None])
    assert homography.tolist() == [True]
    assert np.linalg.norm(camera[0] - truth, axis=2).max() < 1e-3
    noisy = flow + np.random.default_rng(0).normal(0, 0.2, flow.shape)
    found = camera_motion(noisy[None])[0]
    assert np.linalg.norm(found[0] - truth, axis=2).max() < 0.2
    np.testing.assert_array_equal(camera_motion(noisy[None])[0], found)  # the same draws


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("matrix", CAMERAS)
def test_a_patch_on_a_photograph_that_the_camera_moves_has_its_own_motion_left(number, matrix):
    import cv2

    pictures = [np.ascontiguousarray(one[100 : 100 + SIZE, 200 : 200 + SIZE]) for one in load_sample_images().images]
    first, patch = pictures[number].copy(), pictures[1 - number][40:104, 40:104]
    second = cv2.warpPerspective(first, np.array(matrix, float), (SIZE, SIZE), borderMode=cv2.BORDER_REFLECT)
    inside, truth = slice(*PATCH), field(matrix)
    first[inside, inside] = patch
    shift = np.round(truth[96, 96] + OWN).astype(int)
    x, y = PATCH[0] + shift
    second[y : y + 64, x : x + 64] = patch
    flow = flow_labels.dis(first[None], second[None])
    camera, homography = camera_motion(flow)
    assert homography.all()
    found, real = (flow_labels.averaged(one)[0] for one in (flow - camera, truth[None]))
    places = np.s_[5:7, 5:7]  # the middle of the patch: 4 x 4 places of 16 px
    assert np.linalg.norm(found[places] - (shift - real[places]), axis=2).max() < 0.6
    still = np.ones((14, 14), bool)
    still[3:10, 3:10], still[[0, -1]], still[:, [0, -1]] = False, False, False
    error = np.linalg.norm(found, axis=2)[still]
    assert np.median(error) < 0.25
    assert (error > 1).mean() < 0.1  # not said to move by itself
    assert np.linalg.norm(real, axis=2)[still].mean() > 5
    by_median = np.linalg.norm(real - np.median(real, (0, 1)), axis=2)[still]
    assert matrix is CAMERAS[0] or by_median.mean() > 10 * error.mean()


def test_where_nothing_is_shared_the_camera_is_the_median():
    rng = np.random.default_rng(0)
    noise = rng.normal((3, -2), 8, (1, SIZE, SIZE, 2))
    x = np.arange(SIZE)[None, :, None]
    three = np.where(x < 70, [9.0, 0], np.where(x < 140, [0, 9.0], [-9.0, -9.0])) * np.ones((SIZE, 1, 1))
    for flow in (noise, three[None] + rng.normal(0, 0.5, (1, SIZE, SIZE, 2))):
        camera, homography = camera_motion(flow)
        assert not homography.any()
        np.testing.assert_array_equal(camera[0], np.broadcast_to(np.median(flow[0], (0, 1)), (SIZE, SIZE, 2)))


def test_a_picture_that_is_turned_inside_out_is_no_cameras():
    mirror = np.broadcast_to((SIZE - 1 - 2 * np.arange(SIZE))[None, :, None] * [1.0, 0], (SIZE, SIZE, 2))
    assert not camera_motion(mirror[None])[1].any()
    camera, homography = camera_motion(np.zeros((1, SIZE, SIZE, 2)))
    assert homography.all()
    assert np.abs(camera).max() < 1e-9
