"""Renders the bundled sample from Meta-World (MIT): an EgoDex-shaped zip and a Bridge-shaped TFDS folder.

A developer's script, never imported by avrl: `python avrl/sample/render.py --out DIR [--only egodex|bridge]`.
Needs metaworld, h5py, pillow, imageio-ffmpeg, google-crc32c and an off-screen GL (libegl1 or libosmesa6).
Seeds are fixed: the same package versions on the same GL driver give the same bytes.
Metres, seconds, radians; the cameras' azimuth and elevation in degrees.
"""

import argparse
import os
import zipfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from containers import annotate, bridge_record, encode, joint_names, jpeg, language, write_dataset
from numpy.typing import NDArray

os.environ.setdefault("MUJOCO_GL", "egl")  # read once, when mujoco is imported
# By name, so that the type checker asks for none of these development-only packages.
mujoco: Any = import_module("mujoco")
SCENES: Any = import_module("metaworld.env_dict").ALL_V3_ENVIRONMENTS
EXPERTS: Any = import_module("metaworld.policies").ENV_POLICY_MAP

Array = NDArray[Any]
CRF, QUALITY = 29, 52  # of the videos and of the JPEGs: chosen for 15 MB in all
# Meta-World's 80 Hz is no multiple of 30 fps; 5 physics steps of 1/450 s are, so both parts' timing is exact.
CONTROL_HZ = 90
DOWN = np.array([1, 0, 1, 0]) / 2**0.5  # the wrist attitude Meta-World commands, straight down (w, x, y, z)
WORKSPACE = np.array([[-0.3, 0.45, 0.08], [0.3, 0.85, 0.34]])

# folder: what is done and, where the task can be undone, what undoes it ("<verb> the <object> ...")
EGODEX_TASKS = {
    "assemble_ring": {"assembly": "Put the ring on the peg.", "disassemble": "Take the ring off the peg."},
    "hammer_nail": {"hammer": "Lift the hammer and drive the nail in."},
    "insert_peg": {"peg-insert-side": "Push the peg into the hole.", "peg-unplug-side": "Pull the peg out."},
    "open_close_door": {"door-open": "Open the door.", "door-close": "Close the door."},
    "open_close_drawer": {"drawer-open": "Open the drawer.", "drawer-close": "Close the drawer."},
    "open_close_window": {"window-open": "Open the window.", "window-close": "Close the window."},
    "pick_place_block": {"pick-place": "Pick up the block and hold it at the mark."},
    "press_pull_handle": {"handle-press": "Press the handle down.", "handle-pull": "Pull the handle up."},
    "push_block": {"push": "Push the block to the mark."},
    "slide_plate": {"plate-slide": "Slide the plate in.", "plate-slide-back": "Slide the plate out."},
    "sweep_block": {"sweep": "Sweep the block off the table."},
    "throw_basketball": {"basketball": "Drop the ball through the hoop."},
    "turn_dial": {"dial-turn": "Turn the dial."},
    "turn_faucet": {"faucet-open": "Turn the faucet on.", "faucet-close": "Turn the faucet off."},
}
BRIDGE_TASKS = {
    "bin-picking": "move the block to the other bin", "button-press": "press the button on the wall",
    "coffee-pull": "pull the mug away from the machine", "coffee-push": "put the mug under the machine",
    "door-lock": "lock the door", "hand-insert": "put the block into the hole in the table",
    "lever-pull": "pull the lever up", "pick-out-of-hole": "take the block out of the hole",
    "reach": "move the gripper to the mark", "shelf-place": "put the block on the shelf",
    "soccer": "push the ball into the goal", "sweep-into": "sweep the block into the hole",
}  # fmt: skip
BRIDGE_VAL_ONLY = {
    "box-close": "put the lid on the box", "push-wall": "push the block round the wall",
    "stick-pull": "pull the thermos with the stick",
}  # fmt: skip
# Azimuth, elevation: one side of the table. From the other side every motion has the opposite sign: not linear.
BRIDGE_CAMERAS = ((322.0, -36.0), (334.0, -30.0))


def ar1(value: Array, seconds: float, std: float | Array, rng: np.random.Generator) -> Array:
    """Next control step of a smooth random process with this correlation time and standard deviation."""
    keep = np.exp(-1 / (CONTROL_HZ * seconds))
    return keep * value + (1 - keep**2) ** 0.5 * std * rng.standard_normal(value.shape)


class Arm:
    """A Meta-World scene whose expert is slowed, disturbed and led astray, so that motion goes everywhere."""

    def __init__(self, name: str, size: tuple[int, int]) -> None:
        self.env = env = SCENES[f"{name}-v3"]()
        self.model, self.data, self.expert = env.model, env.data, EXPERTS[f"{name}-v3"]()
        # The expert needs the goal in its observation; starts are drawn, not a benchmark's; runs have no end.
        env._partially_observable = env._freeze_rand_vec = False
        env._set_task_called = env.seeded_rand_vec = True
        env.max_path_length, self.model.opt.timestep = 10**9, 1 / (5 * CONTROL_HZ)
        self.position_action, env.set_xyz_action = env.set_xyz_action, self.command
        self.wrist = np.zeros(3)
        # Wood and tiles at 30% contrast: they took half of the bytes and show no motion of the hand.
        for texels in np.split(self.model.tex_data.reshape(-1, 3), self.model.tex_adr[1:] // 3):
            texels[:] = (0.3 * texels + 0.7 * texels.mean(0)).astype(np.uint8)
        self.model.vis.quality.offsamples, self.model.vis.quality.shadowsize = 0, 64
        self.model.vis.global_.offwidth = self.model.vis.global_.offheight = max(size)
        self.renderer = mujoco.Renderer(self.model, size[1], size[0])
        dear = mujoco.mjtRndFlag  # both are slow where the renderer is software
        self.renderer.scene.flags[[int(dear.mjRND_SHADOW), int(dear.mjRND_REFLECTION)]] = 0
        self.camera = mujoco.MjvCamera()
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FREE
        self.paint = self.model.mat_rgba.copy()

    def command(self, action: Array) -> None:
        """Moves the hand's target. Meta-World holds the wrist still; here it turns with `self.wrist`."""
        self.position_action(action)
        quat = DOWN.copy()
        for axis in range(3):  # roll, then pitch, then yaw about the world's axes
            turn = np.zeros(4)
            mujoco.mju_axisAngle2Quat(turn, np.eye(3)[axis], self.wrist[axis])
            mujoco.mju_mulQuat(quat, turn, quat.copy())
        self.data.mocap_quat = quat[None]

    def reset(self, seed: int) -> None:
        """Starts a new run at a random phase of the task, with its own pace, habits and table colour."""
        self.rng = rng = np.random.default_rng(seed)
        np.random.seed(seed)  # some Meta-World resets draw from the global generator
        self.env.seed(seed)
        self.wrist, self.twist, self.noise = np.zeros(3), np.zeros(3), np.zeros(3)
        self.model.mat_rgba[:] = self.paint
        textured = self.model.mat_texid.max(-1, keepdims=True) >= 0  # table and floor
        self.model.mat_rgba[:, :3] *= np.where(textured, rng.uniform(0.9, 1.0, 3), 1.0)
        self.obs: Array = self.env.reset()[0]
        for _ in range(rng.integers(0, 140)):  # at full speed, unseen: some runs start with the thing in hand
            self.obs = self.env.step(self.expert.get_action(self.obs))[0]
        self.pace, self.obeys = rng.uniform(0.22, 0.38), rng.random() < 0.6
        self.astray, self.left, self.grip = rng.random() < 0.4, 0, 0.0
        for _ in range(20):  # settles from the fast run before the first frame
            self.step()

    def step(self) -> None:
        """One control step: expert or detour, slowed, plus smooth noise on position and wrist."""
        rng, hand = self.rng, self.obs[:3]
        if self.left <= 0:  # the next stretch, expert and detour by turns
            self.astray, self.left = not self.astray, int(rng.uniform(0.5, 1.3) * CONTROL_HZ)
            self.detour = np.clip(hand + rng.normal(0, (0.11, 0.11, 0.09)), *WORKSPACE)
            self.grip = rng.choice((-1.0, 1.0))
        self.left -= 1
        wish = np.clip(self.expert.get_action(self.obs), -1, 1)
        if self.astray:
            wish[:3] = np.clip(10 * (self.detour - hand), -1, 1)
        # A run that does not obey opens and closes at random: most experts hardly move the gripper.
        grip = self.grip if self.astray or not self.obeys else (wish[3] if wish[3] > 0 else -1.0)
        self.noise = ar1(self.noise, 0.35, 0.12, rng)
        self.twist = ar1(self.twist, 0.8, np.array([0.05, 0.03, 0.08]), rng)
        self.wrist = self.wrist + (self.twist - self.wrist) / (0.2 * CONTROL_HZ)
        self.obs = self.env.step(np.append(self.pace * wish[:3] + self.noise, grip))[0]
        self.closing = grip > 0

    def look(self, view: Array, aim: Array) -> None:
        """Points the camera at `aim` from `view`: azimuth, elevation (degrees), distance."""
        self.camera.azimuth, self.camera.elevation, self.camera.distance = view
        self.camera.lookat[:] = aim
        self.renderer.update_scene(self.data, self.camera)

    def clearest(self, seed: int, views: list[Array], aim: Array, seconds: float) -> int:
        """Rehearses the run just reset, names the (first) view that shows the fingertips most; resets."""
        seen = np.zeros(len(views))
        for _ in range(6):
            tips = (self.data.body("leftpad").xpos + self.data.body("rightpad").xpos) / 2
            for k, view in enumerate(views):
                self.look(view, aim)
                eye = self.camera_pose()[:3, 3]
                hit = mujoco.mj_ray(self.model, self.data, eye, tips - eye, None, 1, -1, np.zeros(1, "i4"))
                seen[k] += hit < 0 or hit > 0.88  # a share of the way: what is hit last is the finger itself
            for _ in range(int(seconds * CONTROL_HZ / 5)):
                self.step()
        self.reset(seed)
        return int(seen.argmax())

    def pose(self, body: str) -> Array:
        """(4, 4) pose of a body in the world (metres; z is up, unlike ARKit's y)."""
        out = np.eye(4)
        out[:3, :3], out[:3, 3] = self.data.body(body).xmat.reshape(3, 3), self.data.body(body).xpos
        return out

    def camera_pose(self) -> Array:
        """(4, 4) pose of the camera in the world, OpenCV axes (x right, y down, z forward)."""
        out, eyes = np.eye(4), self.renderer.scene.camera  # a stereo pair; the picture is from between
        forward, up = np.array(eyes[0].forward), np.array(eyes[0].up)
        out[:3, :3] = np.stack([np.cross(forward, up), -up, forward], axis=1)
        out[:3, 3] = (eyes[0].pos + eyes[1].pos) / 2
        return out

    def state(self) -> Array:
        """(7,) x, y, z, roll, pitch, yaw from straight down (absolute angles sit at gimbal lock), opening."""
        r = self.pose("hand")[:3, :3] @ np.array([[0, 0, -1], [0, 1, 0], [1, 0, 0]])  # the inverse of DOWN
        roll, yaw = np.arctan2([r[2, 1], r[1, 0]], [r[2, 2], r[0, 0]])
        pitch, opening = -np.arcsin(np.clip(r[2, 0], -1, 1)), np.clip((self.obs[3] - 0.3) / 0.65, 0, 1)
        return np.array([*self.data.body("hand").xpos, roll, pitch, yaw, opening])


# ---------------------------------------------------------------- EgoDex part
def sway(rng: np.random.Generator, amplitude: Array) -> Callable[[float], Array]:
    """A smooth random path: two slow sines per value, `amplitude` each for the slower one."""
    rate = rng.uniform((0.15, 0.5), (0.4, 0.9), (len(amplitude), 2))  # Hz
    phase = rng.uniform(0, 2 * np.pi, rate.shape)
    return lambda t: amplitude * (np.sin(2 * np.pi * rate * t + phase) * (1.0, 0.4)).sum(1)


def film(arm: Arm, seed: int, frames: int) -> tuple[list[Array], dict[str, Array]]:
    """Images and poses of one episode at 30 fps; the camera sways, circles and loosely follows the hand."""
    arm.reset(seed)
    rng = np.random.default_rng([seed, 1])
    aim = arm.pose("hand")[:3, 3] - (0, 0, 0.05)
    # Between 0 and 130 degrees the arm hides the hand; the Bridge part's views are left to the probe.
    azimuths = [a for a in range(135, 356) if min(abs(a - c) for c, _ in BRIDGE_CAMERAS) > 3]
    views = [np.array([rng.choice(azimuths), rng.uniform(-46, -18), rng.uniform(0.6, 0.8)]) for _ in range(6)]
    view = views[arm.clearest(seed, views, aim, frames / 30)]
    path, orbit = sway(rng, np.array([1.5, 1.0, 0.012, 0.012, 0.012, 0.008])), rng.uniform(-3, 3)
    moving = {"rightHand": "hand", "rightThumbTip": "leftpad", "rightIndexFingerTip": "rightpad"}
    poses: dict[str, list[Array]] = {name: [] for name in ("camera", *joint_names())}
    images = []
    for i in range(frames):
        for _ in range(CONTROL_HZ // 30 if i else 0):
            arm.step()
        offset = path(i / 30)
        aim += 0.04 * (arm.pose("hand")[:3, 3] - (0, 0, 0.05) - aim)
        arm.look(view + offset[:3] + (orbit * i / 30, 0, 0), aim + offset[3:])
        images.append(arm.renderer.render())
        poses["camera"].append(arm.camera_pose())
        for k, name in enumerate(joint_names()):
            # A robot has no hips or little fingers: such joints hang rigidly from its torso, confidence 0.
            pose = arm.pose(moving.get(name, "torso"))
            if name not in moving:
                pose[:3, 3] += (-0.2 if name.startswith("left") else 0.2, 0.0, -0.01 * k)
            poses[name].append(pose)
    return images, {name: np.array(values, np.float32) for name, values in poses.items()}


def make_egodex(out: Path, episodes: int = 6, size: tuple[int, int] = (384, 216)) -> None:
    """Writes `egodex/sample.zip`: sample/<task>/<n>.{mp4,hdf5}."""
    (out / "egodex").mkdir(parents=True, exist_ok=True)
    scratch = out / "egodex/episode.mp4"
    with zipfile.ZipFile(out / "egodex/sample.zip.part", "w") as archive:
        for t, (task, scenes) in enumerate(EGODEX_TASKS.items()):
            arms, sentences = [Arm(scene, size) for scene in scenes], [*scenes.values(), ""]
            for n in range(episodes):
                which = n % len(arms)  # do and undo by turns
                length = int(np.random.default_rng([t, n]).integers(50, 65))
                images, poses = film(arms[which], 1000 * t + n, length)
                about = language(sentences, which) | {"task": task, "session_name": f"sample_{task}"}
                about["environment"] = f"metaworld/{list(scenes)[which]}"
                # Real files lack the group here and there, and a reader must not take that for confidence 0.
                hdf5 = annotate(poses, size, about, confident=not (t % 3 == 0 and n == 4))
                for ending, data, method in (("mp4", encode(images, scratch, CRF), 0), ("hdf5", hdf5, 8)):
                    info = zipfile.ZipInfo(f"sample/{task}/{n}.{ending}", (2025, 1, 1, 0, 0, 0))
                    archive.writestr(info, data, compress_type=method, compresslevel=9)
            for arm in arms:
                arm.renderer.close()
    scratch.unlink()
    (out / "egodex/sample.zip.part").replace(out / "egodex/sample.zip")


# ---------------------------------------------------------------- Bridge part
def record(arm: Arm, seed: int, camera: int) -> tuple[list[Array], Array, Array, int]:
    """One run at 5 Hz from static `camera`, or one with a clearer view: images, states, commands, camera."""
    arm.reset(seed)
    aim = np.array([0.0, 0.6, 0.18])  # over the middle of the table
    # The other cameras in turn: the choice is free of the task's habits unless something hides the hand.
    views = [np.array([*c, 0.75]) for c in BRIDGE_CAMERAS[camera:] + BRIDGE_CAMERAS[:camera]]
    used = arm.clearest(seed, views, aim, 3)
    images, states, actions = [], [], []
    for i in range(int(np.random.default_rng([seed, 2]).integers(15, 17))):
        start = np.append(arm.data.mocap_pos[0], arm.wrist)
        for _ in range(CONTROL_HZ // 5 if i else 0):
            arm.step()
        moved = np.append(arm.data.mocap_pos[0], arm.wrist) - start
        actions += [np.append(moved, not arm.closing)] if i else []
        # Rendered twice too large: smooth edges look better and take fewer bytes.
        arm.look(views[used], aim)
        picture = arm.renderer.render().reshape(256, 2, 256, 2, 3).mean((1, 3))
        images.append(picture.round().astype(np.uint8))
        states.append(arm.state())
    # As in the real set: the last step has a null action, and the first action is zero though the arm moves.
    commands = np.array([np.zeros(7), *actions[1:], np.zeros(7)])
    return images, np.array(states), commands, (camera + used) % len(BRIDGE_CAMERAS)


def make_bridge(out: Path, episodes: int = 7) -> None:
    """Writes `bridge_dataset/1.0.0/`. Val holds other runs of the train tasks and three tasks of its own."""
    splits: dict[str, list[bytes]] = {"train": [], "val": []}
    for t, (scene, sentence) in enumerate((BRIDGE_TASKS | BRIDGE_VAL_ONLY).items()):
        arm = Arm(scene, (512, 512))
        alone = scene in BRIDGE_VAL_ONLY  # as many as make a third of val
        for n in range((3, 3, 2)[t % 3] if alone else episodes):
            split = "val" if alone or n == 6 or (n == 5 and t % 3 == 0) else "train"
            number = sum(map(len, splits.values()))
            said = "" if number % 17 == 3 and not alone else sentence  # "": as in some real episodes
            images, states, actions, camera = record(arm, 50_000 + 1000 * t + n, (t + n) % len(BRIDGE_CAMERAS))
            origin = f"metaworld/{scene}/camera{camera}/{n}"
            files = [jpeg(image, QUALITY) for image in images]
            splits[split].append(bridge_record(files, states, actions, said, (number, origin)))
        arm.renderer.close()
    for records in splits.values():  # shards mix the tasks
        np.random.default_rng(0).shuffle(records)
    write_dataset(out / "bridge_dataset/1.0.0", splits, {"train": 3, "val": 2})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: beside this file")
    parser.add_argument("--only", choices=("egodex", "bridge"), help="one part (default: both)")
    chosen = parser.parse_args()
    for part, make in (("egodex", make_egodex), ("bridge", make_bridge)):
        if chosen.only in (None, part):
            make(chosen.out)
