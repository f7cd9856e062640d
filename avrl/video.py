"""Clips to frames by PyAV, strictly: as many as were promised, or an error that names clip and frame.

libav patches up what is damaged and goes on, unless told otherwise, and half a clip would be baked into the store.
Hence ``err_detect=explode``, a look at every packet, and a count. One thread, in the worker's own process: as many
decoders as cores beat threads within a decoder, and pictures that pass no pipe cost a tenth less.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from avrl.errors import DecodeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from avrl.episodes import View

# swscale's names of the colour matrices, by the number in the H.273 standard that the container carries.
MATRICES = {1: "bt709", 5: "bt601", 6: "bt601", 9: "bt2020"}
SPACES = {"bt709": "bt709", "bt601": "smpte170m", "bt2020": "bt2020nc"}  # the same in the filter ``colorspace``
FULL = 2  # libav's number of the range 0..255
HD_HEIGHT = 720  # untagged video of at least this height is BT.709 by convention, below it BT.601
CONTAINER = "mov"  # mp4's demuxer, by name: left to guess, libav takes a playlist for a clip and opens what it lists
SEEK_MARGIN = 1.0  # seconds
EXPLODE = {"err_detect": "explode"}


class Clip:
    """An mp4 that was opened, to be decoded once.

    Attributes:
        frames: How many its container promises.
        fps: Frames per second, or 0 where it does not say.
    """

    def __init__(self, path: Path, name: str) -> None:
        """Read the header.

        Args:
            path: A file that holds an episode alone, or many of them end to end (LeRobot's clips).
            name: What to call it in errors.

        Raises:
            DecodeError: no readable header, or no video stream.
        """
        import av

        self.name = name
        try:
            self._container = av.open(str(path), format=CONTAINER, metadata_errors="replace", options=EXPLODE)
            stream = self._container.streams.video[0]
            self.frames: int = stream.frames
            if not self.frames:  # a fragmented mp4 has no count in front
                self.frames = sum(packet.size > 0 for packet in self._container.demux(stream))
                self._container.seek(0)
        except IndexError:
            raise DecodeError(name, 0, "no video stream") from None
        except (av.error.FFmpegError, ValueError) as error:
            raise DecodeError(name, 0, getattr(error, "strerror", None) or str(error)) from error
        self.fps = float(stream.average_rate or stream.guessed_rate or 0)

    def decode(
        self, view: View, *, length: int = 0, fps: float = 0, start: float | None = None
    ) -> Iterator[np.ndarray]:
        """Frames of an episode, cropped, scaled by exact area averaging and thinned as the view says.

        Args:
            view: Crop, size and rate.
            length: Frames of the episode; 0: as many as the container promises.
            fps: Frames per second; 0: as the container says.
            start: Time of its first frame in the file, seconds; None if the file is the episode.

        Yields:
            uint8 (3, image_size, image_size), an even size: Y, Cb, Cr as JPEG has them, full range and BT.601; every
            frame that the view keeps.

        Raises:
            DecodeError: fewer frames than promised or, if the file is the episode, more; a frame that is damaged, or
                not where its number says, by half a frame's time.
        """
        import av

        promise, length, fps = "data set" if length else "container", length or self.frames, fps or self.fps
        stride, count = view.stride(fps, self.name), 0
        try:
            with self._container as container:
                scaled = _scaler(container.streams.video[0], view)
                for frame in _frames(container, start, length, fps):
                    late = 0.0 if start is None else ((frame.time or 0.0) - start) * fps - count
                    if frame.is_corrupt or frame.time is None:
                        raise DecodeError(self.name, count, "the decoder calls it corrupt")
                    if start is not None and not abs(late) < 0.5:
                        raise DecodeError(self.name, count, f"it comes {late:+.1f} frames late")
                    if count % stride == 0 and count < length:
                        yield scaled(frame)
                    count += 1
                    if start is not None and count == length:
                        break
        except (av.error.FFmpegError, ValueError, MemoryError) as error:
            raise DecodeError(self.name, count, getattr(error, "strerror", None) or str(error)) from error
        if count != length:
            raise DecodeError(self.name, count, f"{count} frames decode, the {promise} promises {length}")


def _frames(container: Any, start: float | None, length: int, fps: float) -> Iterator[Any]:
    """Decoded frames from ``start`` on, up to the key frame of what comes next."""
    import av

    stream = container.streams.video[0]
    stream.thread_type, stream.codec_context.thread_count = "NONE", 1
    stream.codec_context.options = EXPLODE
    if start is None:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise ValueError("the file ends within it")
            yield from packet.decode()
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
    """Crop, scale, convert and, where a tag says so, turn a decoded frame."""
    import av

    graph = av.filter.Graph()
    graph.threads = 1  # else every filter starts a thread a core, and spends more on them than on pixels
    chain = _filters(*_colours(stream.codec_context), view)
    graph.link_nodes(
        graph.add_buffer(template=stream),
        *(graph.add(one, ":".join([*places, *(f"{k}={v}" for k, v in more.items())])) for one, places, more in chain),
        graph.add("buffersink"),
    ).configure()
    begun = _layout(stream.codec_context)

    def scaled(frame: Any) -> np.ndarray:
        if _layout(frame) != begun or frame.rotation % 90:
            raise ValueError(f"it has another format ({_layout(frame)}, turned by {frame.rotation} degrees)")
        graph.push(frame)
        planes = np.stack([_array(one) for one in graph.pull().planes])
        return np.ascontiguousarray(np.rot90(planes, frame.rotation // 90, (1, 2)))

    return scaled


def _layout(picture: Any) -> str:
    """Format and size of a codec's pictures, or of one."""
    return f"{picture.format.name} {picture.width}x{picture.height}"


def _array(plane: Any) -> np.ndarray:
    """(H, W) uint8 view of a plane, without the bytes that align its rows."""
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]


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


def chain() -> str:
    """What makes the pixels, for a manifest: the filters, and whose build of them, since builds may round otherwise."""
    import av

    scaler = ".".join(str(one) for one in av.library_versions["libswscale"])
    return f"scale=area, colorspace; PyAV {av.__version__}, libswscale {scaler}"
