"""Small real files in the layouts of EgoDex and Bridge V2, whole or wrong in one way: copied from the sample, or made.

Nothing here uses avrl's own readers or writers beyond the place of the sample, so that tests compare two minds.
"""

from __future__ import annotations

import io
import os
import struct
import subprocess
import tempfile
import zipfile
from pathlib import Path

import google_crc32c
import h5py
import imageio_ffmpeg
import numpy as np
from PIL import Image

from avrl.sources import SAMPLE

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
BRIDGE = "bridge_dataset/1.0.0"
BT709 = "-colorspace bt709 -color_primaries bt709 -color_trc bt709"


# Pictures.


def ramps(n, width=96, height=64, seed=0):
    """Red grows to the right, green downwards, blue with time; a bright bar wanders. uint8 (n, height, width, 3)."""
    frames = np.zeros((n, height, width, 3), np.uint8)
    frames[..., 0] = np.linspace(20, 230, width)
    frames[..., 1] = np.linspace(20, 230, height)[:, None]
    frames[..., 2] = np.linspace(10, 240, n)[:, None, None]
    for t in range(n):
        at = (seed * 17 + t * width // n) % width
        frames[t, :, at : at + max(2, width // 12)] = 235
    return frames


def patches(width, height):
    """Six saturated colours side by side: what a wrong colour matrix shifts by tens of levels."""
    colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [200, 200, 30], [30, 200, 200], [128, 128, 128]])
    return np.broadcast_to(colours.repeat(width // 6, 0), (height, width // 6 * 6, 3)).astype(np.uint8)


def rgb(frame):
    """A frame as RGB (H, W, 3), whichever of the two kinds that JPEG takes it is; by Pillow."""
    if frame.shape[-1] == 3:
        return frame
    return np.asarray(Image.merge("YCbCr", [Image.fromarray(plane) for plane in frame]).convert("RGB"))


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of 8-bit pictures."""
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


# Clips.


def ffmpeg(arguments, data=b""):
    """Run ffmpeg on a string of arguments; ``{}`` in it is a fresh mp4, whose bytes are returned."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out.mp4"
        command = [FFMPEG, "-y", "-v", "error", *(str(target) if one == "{}" else one for one in arguments.split())]
        subprocess.run(command, input=data, check=True, stderr=subprocess.DEVNULL)  # SVT-AV1 writes whatever -v says
        return target.read_bytes()


def encode(frames, options="", *, matrix="bt709", tags=BT709, pix_fmt="yuv420p", gop=10, fps=30):
    """H.264 in mp4 at 30 fps or another rate; `options` go to the output, a later one wins over the usual ones."""
    _, height, width, _ = frames.shape
    levels = "pc" if "yuvj" in pix_fmt else "tv"
    return ffmpeg(
        f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {fps} -i - "
        f"-vf scale=out_color_matrix={matrix}:out_range={levels}:flags=accurate_rnd+full_chroma_inp,format={pix_fmt} "
        f"-c:v libx264 -preset fast -crf 12 -g {gop} -threads 1 {tags} {options} {{}}",
        frames.tobytes(),
    )


def remux(clip, options, *, before=""):
    """The same stream in another container: ``-movflags +faststart``, a rotation tag."""
    with tempfile.NamedTemporaryFile(suffix=".mp4") as source:
        source.write(clip)
        source.flush()
        return ffmpeg(f"{before} -i {source.name} -c copy {options} {{}}")


def sound():
    """An mp4 with a tone and no picture."""
    return ffmpeg("-f lavfi -i sine=d=0.3 -c:a aac {}")


def flipped(data, at, bit=0):
    """The same bytes but for one bit."""
    changed = bytearray(data)
    changed[at] ^= 1 << bit
    return bytes(changed)


def payload(clip):
    """Bounds of an mp4's mdat, where the coded pictures lie."""
    at = 0
    while at < len(clip):
        size, kind = struct.unpack(">I4s", clip[at : at + 8])
        if kind == b"mdat":
            return at + 8, at + size
        at += size
    raise ValueError("no mdat")


def broken(path):
    """Zero 40 bytes in the first half of a clip's pictures, in place."""
    data = bytearray(path.read_bytes())
    start = payload(bytes(data))[0]
    data[start + 900 : start + 940] = bytes(40)
    path.write_bytes(data)


# EgoDex.


def poses(n, *, confidences=True, shape=None, **attributes):
    """An HDF5 file of `n` poses in EgoDex's schema, with two of its 68 joints."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name in ("camera", "leftHand", "rightHand"):
            file[f"transforms/{name}"] = np.broadcast_to(np.eye(4, dtype=np.float32), shape or (n, 4, 4))
            if confidences and name != "camera":
                file[f"confidences/{name}"] = np.ones(n, np.float32)
        file["camera/intrinsic"] = np.eye(3)
        file.attrs.update({"task": "ramp", "llm_description": "Do it.", "which_llm_description": "1", **attributes})
    return buffer.getvalue()


def episode(n, seed=0, **options):
    """A clip of ramps and its poses."""
    return encode(ramps(n, seed=seed), **options), poses(n)


def sample_egodex(n_tasks=2, n_episodes=3):
    """``<task>/<n>`` -> (clip, poses) of the first tasks of the bundled sample."""
    with zipfile.ZipFile(SAMPLE / "egodex" / "sample.zip") as archive:
        stems = sorted(name.removesuffix(".mp4") for name in archive.namelist() if name.endswith(".mp4"))
        tasks = sorted({stem.split("/")[1] for stem in stems})[:n_tasks]
        chosen = [stem for task in tasks for stem in [s for s in stems if s.split("/")[1] == task][:n_episodes]]
        return {s.partition("/")[2]: (archive.read(f"{s}.mp4"), archive.read(f"{s}.hdf5")) for s in chosen}


def egodex(folder, episodes, part="part1"):
    """Write ``<part>.zip`` of ``<task>/<n>`` -> (clip, poses), either None to leave it out; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
        for name, (clip, pose) in episodes.items():
            for suffix, data in ((".mp4", clip), (".hdf5", pose)):
                if data is not None:
                    archive.writestr(zipfile.ZipInfo(f"{part}/{name}{suffix}"), data)
    return folder


def damage(zipped, member, at=0, bit=0):
    """Flip a bit of a stored member inside its zip, which leaves the zip's checksum of it behind."""
    with zipfile.ZipFile(zipped) as archive:
        start = archive.getinfo(member).header_offset + 30 + len(member)
    replace(zipped, flipped(zipped.read_bytes(), start + at, bit))


def replace(path, data):
    """Put other bytes into a file as a failing disk does: its time stays."""
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# Bridge: an independent writer of TFRecord and tf.Example.


def varint(value):
    value &= 2**64 - 1  # a negative int64 takes ten bytes
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(features, *, packed=True):
    """tf.Example of name -> list of bytes, float array or int array."""
    entries = b""
    for name, value in features.items():
        if isinstance(value, list):
            kind, body = 1, b"".join(field(1, one) for one in value)
        elif np.asarray(value).dtype.kind == "f":
            words = [struct.pack("<f", one) for one in np.ravel(value)]
            kind, body = 2, field(1, b"".join(words)) if packed else b"".join(b"\x0d" + one for one in words)
        else:
            words = [varint(int(one)) for one in np.ravel(value)]
            kind, body = 3, field(1, b"".join(words)) if packed else b"".join(b"\x08" + one for one in words)
        entries += field(1, field(1, name.encode()) + field(2, field(kind, body)))
    return field(1, entries)


def framed(content):
    """A TFRecord: length, its checksum, content, its checksum."""

    def masked(data):
        crc = google_crc32c.value(data)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)

    length = struct.pack("<Q", len(content))
    return length + masked(length) + content + masked(content)


def jpegs(frames):
    """Each frame as a JPEG."""
    out = []
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "jpeg", quality=95, subsampling=0)
        out.append(buffer.getvalue())
    return out


def trajectory(states, actions, images=None, language="move it"):
    """The features of an episode under Bridge's names, as far as anything reads them."""
    states, actions = np.asarray(states, np.float32), np.asarray(actions, np.float32)
    return {
        "steps/observation/image_0": jpegs(ramps(len(states), 32, 32)) if images is None else images,
        "steps/observation/state": states.ravel(),
        "steps/action": actions.ravel(),
        "steps/language_instruction": [language.encode()] * len(states),
        "episode_metadata/file_path": [b"/somewhere"],
        "steps/is_first": np.arange(len(states)) == 0,
    }


def still(n):
    """A trajectory of `n` steps on which nothing moves."""
    return trajectory(np.zeros((n, 7)), np.zeros((n, 7)))


def sample_bridge(split, n):
    """The first framed records of the bundled sample, as they lie in its shards."""
    records = []
    for path in sorted((SAMPLE / BRIDGE).glob(f"*-{split}.tfrecord-*")):
        data, at = path.read_bytes(), 0
        while at < len(data) and len(records) < n:
            end = at + 16 + struct.unpack_from("<Q", data, at)[0]
            records.append(data[at:end])
            at = end
    return records


def bridge(folder, train, val=(), *, shards=1):
    """Write framed records as shards below ``bridge_dataset/1.0.0``; returns the folder."""
    place = folder / BRIDGE
    place.mkdir(parents=True, exist_ok=True)
    for split, records in (("train", train), ("val", val or train[:1])):
        cuts = np.linspace(0, len(records), shards + 1).astype(int)
        for k in range(shards):
            name = f"bridge_dataset-{split}.tfrecord-{k:05d}-of-{shards:05d}"
            (place / name).write_bytes(b"".join(records[cuts[k] : cuts[k + 1]]))
    return folder


# Processes.


def descendants(pid=None):
    """(pid, name) of the live processes below one, this one by default."""
    found, parents = [], {pid or os.getpid()}
    table = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        name, rest = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
        table.append((int(stat.parent.name), int(rest[1]), name))
    while True:
        more = [(child, name) for child, parent, name in table if parent in parents and child not in dict(found)]
        if not more:
            return found
        found += more
        parents |= {child for child, _ in more}
