"""Clips to frames with ffmpeg, strictly: the container's count, or an error that names clip and frame.

ffmpeg exits 0 on a truncated or bit-flipped mp4 unless told otherwise, and a pipe would then bake half a clip
into the store. Hence ``-xerror -err_detect explode``, and the count is compared with the container's anyway.
"""

from __future__ import annotations

import functools
import re
import shutil
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from avrl.errors import DecodeError, TemporaryError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from avrl.episodes import View

# swscale's names of the colour matrices, by the number in the H.273 standard that the container carries.
MATRICES = {1: "bt709", 5: "bt601", 6: "bt601", 9: "bt2020"}
SPACES = {"bt709": "bt709", "bt601": "smpte170m", "bt2020": "bt2020nc"}  # the same in the filter ``colorspace``
FULL = 2  # libav's number of the range 0..255
HD_HEIGHT = 720  # untagged video of at least this height is BT.709 by convention, below it BT.601
CONTAINER = "mov"  # mp4's demuxer, by name: left to guess, ffmpeg takes a playlist for a clip and opens what it lists
SEEK_MARGIN = 1.0  # seconds
STOPPED = (255, -signal.SIGINT, -signal.SIGKILL, -signal.SIGTERM)  # 255: ffmpeg caught a signal


@dataclass(frozen=True)
class Clip:
    """What a container says of its video stream: frame count, frames per second, colour matrix, range of levels."""

    frames: int
    fps: float
    matrix: str
    levels: str = "tv"  # 16..235; "pc" is 0..255


def probe(path: Path, name: str) -> Clip:
    """Read a clip's header.

    Args:
        path: The file.
        name: What to call it in errors.

    Raises:
        DecodeError: no readable header, or no video stream.
    """
    import av

    try:
        with av.open(str(path), format=CONTAINER, metadata_errors="replace") as container:
            stream = container.streams.video[0]
            frames = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            return Clip(frames, fps, *_colours(stream.codec_context))
    except IndexError:
        raise DecodeError(name, 0, "no video stream") from None
    except (av.error.FFmpegError, ValueError) as error:
        raise DecodeError(name, 0, getattr(error, "strerror", None) or str(error)) from error


def decode(path: Path, clip: Clip, view: View, name: str) -> Iterator[np.ndarray]:
    """Decode a clip, cropped, scaled by exact area averaging and thinned as the view says.

    One thread: as many decoders as cores beat threads within a decoder.

    Yields:
        uint8 (3, image_size, image_size), an even size: Y, Cb, Cr as JPEG has them, full range and BT.601.

    Raises:
        DecodeError: fewer or more frames than the container promises, or the decoder complained.
        TemporaryError: somebody stopped ffmpeg.
    """
    size, stride = view.image_size, view.stride(clip.fps, name)
    command = _command(path, clip, view, stride)
    bytes_a_frame = 3 * size * size
    count = 0
    with tempfile.TemporaryFile() as words:  # a pipe that nobody reads would block ffmpeg once it is full
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=words, bufsize=bytes_a_frame
        )
        try:
            while len(data := _read(process.stdout, bytes_a_frame)) == bytes_a_frame:
                count += 1
                yield np.frombuffer(data, np.uint8).reshape(3, size, size)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()
        words.seek(0)
        said = _plain(words.read(), path, name)
    if code in STOPPED and not said:  # by Ctrl-C, Slurm or the kernel short of memory: the clip may well be good
        raise TemporaryError(f"ffmpeg was stopped in {name}", "run the same command: it goes on")
    if code or said:
        raise DecodeError(name, count, said or f"ffmpeg ended with {code}")
    promised = -(-clip.frames // stride)
    if count != promised:
        raise DecodeError(name, count, f"{count} frames decode, the container promises {promised}")


def decode_part(
    path: Path, view: View, name: str, *, length: int, fps: float, start: float | None = None
) -> Iterator[np.ndarray]:
    """Decode an episode out of a file that holds it alone, or many of them end to end (LeRobot's clips).

    Args:
        path: The file; H.264 or AV1, whose decoders PyAV brings along, as not every ffmpeg does.
        view: Crop, size and rate.
        name: What to call it in errors.
        length: Frames of the episode.
        fps: Frames per second.
        start: Time of its first frame in the file, seconds; None if the file is the episode.

    Yields:
        uint8 (3, image_size, image_size), as `decode` does; every frame that the view keeps.

    Raises:
        DecodeError: fewer frames than `length` or, if the file is the episode, more; a frame that is damaged, or not
            where its number says, by half a frame's time.
    """
    import av

    stride, count = view.stride(fps, name), 0
    try:
        with av.open(str(path), format=CONTAINER, metadata_errors="replace") as container:
            scaled = _scaler(container.streams.video[0], view)
            for frame in _frames(container, start, length, fps):
                late = 0.0 if start is None else ((frame.time or 0.0) - start) * fps - count
                if frame.rotation:  # ffmpeg's command line turns it; the filters alone do not
                    raise DecodeError(name, count, f"it is to be turned by {frame.rotation} degrees")
                if frame.is_corrupt or frame.time is None:
                    raise DecodeError(name, count, "the decoder calls it corrupt")
                if count == length or not abs(late) < 0.5:
                    what = f"comes {late:+.1f} frames late" if count < length else f"is one more than {length}"
                    raise DecodeError(name, count, f"it {what}")
                if count % stride == 0:
                    yield scaled(frame)
                count += 1
                if start is not None and count == length:
                    break
    except IndexError:
        raise DecodeError(name, 0, "no video stream") from None
    except (av.error.FFmpegError, ValueError, MemoryError) as error:
        raise DecodeError(name, count, getattr(error, "strerror", None) or str(error)) from error
    if count != length:
        raise DecodeError(name, count, f"{count} frames decode, the data set promises {length}")


def _frames(container: Any, start: float | None, length: int, fps: float) -> Iterator[Any]:
    """Decoded frames from ``start`` on, up to the key frame of what comes next."""
    import av

    stream = container.streams.video[0]
    stream.thread_type, stream.codec_context.thread_count = "NONE", 1
    stream.codec_context.options = {"err_detect": "explode"}
    if start is None:
        yield from container.decode(stream)
        return
    # A demuxer may look for the key frame by its time of decoding, a few frames early, and land on one too late: hence
    # the margin, and only then, for what lies in it is another episode's, whose damage is not this one's.
    first, half = None, 0.5 / fps
    for margin in (0.0, SEEK_MARGIN):
        if start:
            at = start - margin + half / 2  # a quarter of a frame: times are rounded, and just before is too early
            container.seek(max(0, round(at / stream.time_base)), stream=stream)
        begin, end = start + half if start and not margin else float("inf"), start + length / fps - half
        decoded = _until(container, stream, begin, end)
        try:
            first = next((one for one in decoded if one.time is None or one.time > start - half), None)
        except av.error.FFmpegError:
            if margin or not start:
                raise
        if not start or (first and first.time is not None and first.time < start + half):
            break
    yield from [first] * (first is not None)
    yield from decoded


def _until(container: Any, stream: Any, begin: float, end: float) -> Iterator[Any]:
    """Decoded frames up to ``end``, or none if the key frame in front is after ``begin``.

    Decoders look ahead, into damage too: the first key frame after ``end`` is left out, unless what comes after it is
    shown before it (open groups of pictures). What is shown before the one in front needs what is not here.
    """
    front, last, held = None, None, list[Any]()
    for packet in container.demux(stream):
        if packet.pts is None or (last and packet.pts > last.pts):
            break
        front = packet.pts if front is None else front
        if front * stream.time_base >= begin:
            return
        held += [packet] if packet.pts >= front else []
        if not last and packet.is_keyframe and packet.pts * stream.time_base >= end:
            last = packet  # to be decoded once something needs it
            continue
        while held:
            yield from held.pop(0).decode()
    for frame in stream.codec_context.decode(None):
        frame.time_base = stream.time_base  # without a packet, nobody has told the decoder
        yield frame


def _scaler(stream: Any, view: View) -> Callable[[Any], np.ndarray]:
    """Crop, scale and convert a decoded frame by the filters that ffmpeg gets: the same picture to the bit."""
    import av

    graph = av.filter.Graph()
    chain = _filters(*_colours(stream.codec_context), view)
    graph.link_nodes(
        graph.add_buffer(template=stream),
        *(graph.add(one, ":".join([*places, *(f"{k}={v}" for k, v in more.items())])) for one, places, more in chain),
        graph.add("buffersink"),
    ).configure()

    def scaled(frame: Any) -> np.ndarray:
        graph.push(frame)
        return np.asarray(graph.pull().to_ndarray())

    return scaled


def _colours(context: Any) -> tuple[str, str]:
    """What swscale calls a stream's colour matrix, and its range: ``tv`` or ``pc``."""
    default = "bt709" if context.height >= HD_HEIGHT else "bt601"
    return MATRICES.get(int(context.colorspace), default), "pc" if context.color_range == FULL else "tv"


def _filters(matrix: str, levels: str, view: View) -> list[tuple[str, list[str], dict[str, str]]]:
    """Crop, scale and convert: name, positions and options of each filter.

    Scaling leaves the planes as they are, which swscale does in SIMD, and ``colorspace`` converts what is left, in
    SIMD too. Asked for RGB, swscale filters chroma pixel by pixel. Other flags than area alias, or blur. Full range
    stays at 8 bits: the shift to 10 makes 1020 of 255, where ``colorspace`` takes 1023 as white.
    """
    size = [str(view.image_size)] * 2
    same = {"in_color_matrix": matrix, "out_color_matrix": matrix, "in_range": levels, "out_range": levels}
    into = {"ispace": SPACES[matrix], "irange": levels, "space": "smpte170m", "range": "pc", "format": "yuv444p"}
    # Only matrix and range change: gamma and primaries stay what the camera wrote, whatever its tags say.
    into |= dict.fromkeys(("iprimaries", "itrc", "primaries", "trc"), "bt709")
    crop: list[tuple[str, list[str], dict[str, str]]] = [("crop", ["min(iw,ih)"] * 2, {})]
    return [
        *(crop if view.crop == "center" else []),
        ("scale", size, {"flags": "area", **same}),
        ("format", ["yuv444p" if levels == "pc" else "yuv444p10"], {}),
        ("colorspace", [], into),
    ]


def _read(pipe: IO[bytes] | None, size: int) -> bytes:
    return pipe.read(size) if pipe else b""


def _plain(words: bytes, path: Path, name: str) -> str:
    """What ffmpeg said first, without addresses and scratch names: the same for the same damage, wherever it runs."""
    line = words.decode(errors="replace").strip().partition("\n")[0]
    return re.sub(r"\[[^]]* @ 0x[0-9a-f]+\] ", "", line).replace(str(path), name)


def _command(path: Path, clip: Clip, view: View, stride: int) -> list[str]:
    """The ffmpeg command line, built by ffmpeg-python."""
    import ffmpeg

    stream = ffmpeg.input(str(path), format=CONTAINER, threads=1, err_detect="explode").video
    if stride > 1:
        stream = stream.filter("select", f"not(mod(n,{stride}))")
    for name, places, options in _filters(clip.matrix, clip.levels, view):
        stream = stream.filter(name, *places, **options)
    # Passthrough: with constant-rate output, ffmpeg repeats frames of variable-rate clips and poses lose step.
    stream = ffmpeg.output(stream, "pipe:", format="rawvideo", pix_fmt="yuv444p", fps_mode="passthrough")
    stream = stream.global_args("-nostdin", "-hide_banner", "-loglevel", "error", "-xerror")
    stream = stream.global_args("-filter_threads", "1")
    command: list[str] = ffmpeg.compile(stream, cmd=executable())
    return command


@functools.cache
def executable() -> str:
    """The system's ffmpeg, or the one that the imageio-ffmpeg wheel carries."""
    import imageio_ffmpeg

    return shutil.which("ffmpeg") or str(imageio_ffmpeg.get_ffmpeg_exe())


@functools.cache
def chain() -> str:
    """What makes the pixels, for a manifest: the filters, and whose build of them, since builds may round otherwise."""
    said = subprocess.run([executable(), "-version"], capture_output=True, text=True, check=True).stdout
    return f"scale=area, colorspace; {' '.join(said.split()[:3])}"
