"""The camera's own motion in an optical flow: one homography for the whole picture, found robustly.

A camera that turns, or moves before a plane, moves the picture by a homography (Hartley & Zisserman 2004, 13 and 8.4),
found by RANSAC (Fischler & Bolles 1981) from what most of the picture does. What is left is how things move by
themselves, and the parallax of what stands out of the plane: no pair of frames alone tells those two apart.

Legend: B pairs, H W pixels, P points, last axis (right, down).
"""

from __future__ import annotations

import numpy as np

STEP = 8  # px between the points that are asked
OWN = 1.0  # px: what departs by more from the camera's motion moves by itself
SHARED = 0.5  # of the points: a motion that fewer share is not the camera's


def camera_motion(flow_BHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part of each flow that is the camera's.

    Args:
        flow_BHWC: (B, H, W, 2) in px.

    Returns:
        The same shape in px; and (B,) whether it is a homography's. Where none is shared by half of the picture, or it
        would turn a part of it inside out, the camera's is the median flow.
    """
    found = [_of_pair(flow_HWC) for flow_HWC in flow_BHWC]
    return np.stack([field for field, _ in found]), np.array([fitted for _, fitted in found])


def _of_pair(flow_HWC: np.ndarray) -> tuple[np.ndarray, bool]:
    import cv2

    H, W, _ = flow_HWC.shape
    y, x = np.mgrid[:H, :W].astype(np.float64)
    at_P2, flow_P2 = (
        one[STEP // 2 :: STEP, STEP // 2 :: STEP].reshape(-1, 2) for one in (np.stack([x, y], 2), flow_HWC)
    )
    cv2.setRNGSeed(0)  # the same flow, the same draws
    matrix, inliers = cv2.findHomography(at_P2, at_P2 + flow_P2, cv2.RANSAC, OWN)
    if matrix is not None and inliers.mean() >= SHARED:
        to_x, to_y, depth = (row[0] * x + row[1] * y + row[2] for row in matrix)
        if depth.min() > 0 and np.linalg.det(matrix) > 0:  # OpenCV scales the last number to 1
            return np.stack([to_x / depth - x, to_y / depth - y], 2), True
    return np.broadcast_to(np.median(flow_HWC, (0, 1)), flow_HWC.shape), False
