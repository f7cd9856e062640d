"""`avrl.video`: the right pixels of every frame, or an error that names clip, frame and the decoder's words."""

from __future__ import annotations

import random
import subprocess
import sys
from itertools import pairwise

import av
import clips
import numpy as np
import pytest
import simplejpeg

from avrl import codec, video, zips
from avrl.episodes import View
from avrl.errors import DecodeError, IntegrityError
from avrl.sources import egodex

MATRIX = {  # Kr, Kb of ITU-R BT.601 and BT.709
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
}
HDR = "-colorspace bt709 -color_primaries bt2020 -color_trc smpte2084"


@pytest.fixture
def write(tmp_path):
    def written(data):
        path = tmp_path / "clip.mp4"
        path.write_bytes(data)
        return path

    return written


@pytest.fixture(scope="module")
def clip():
    """20 frames of 96 x 64 with B-frames, moov at the end."""
    return clips.encode(clips.ramps(20))


def decode(path, view, name="part1.zip:x.mp4"):
    return video.Clip(path, name).decode(view)


def decoded(path, size=32, name="part1.zip:x.mp4", **view):
    """All frames as RGB, made from JPEG's planes as a JPEG decoder does."""
    frames = list(decode(path, View(size, **view), name))
    assert all(one.shape == (3, size, size) and one.dtype == np.uint8 for one in frames)
    y, cb, cr = np.moveaxis(np.stack(frames).astype(np.float64), 1, 0)
    kr, kb = MATRIX["bt601"]
    r, b = y + 2 * (1 - kr) * (cr - 128), y + 2 * (1 - kb) * (cb - 128)
    return np.clip(np.stack([r, (y - kr * r - kb * b) / (1 - kr - kb), b], -1), 0, 255).round().astype(np.uint8)


def planes(path):
    """Y, U, V of every frame as float arrays, by PyAV."""
    with av.open(str(path)) as container:
        return [[_plane(one) for one in frame.planes] for frame in container.decode(video=0)]


def _plane(plane):
    data = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
    return data[:, : plane.width].astype(np.float64)


def rgb(y, u, v, matrix):
    """Full-range RGB of limited-range 4:2:0, in floats, rounded nowhere."""
    kr, kb = MATRIX[matrix]
    u, v = (np.kron(one, np.ones((2, 2)))[: y.shape[0], : y.shape[1]] for one in (u, v))
    y, pb, pr = (y - 16) / 219, (u - 128) / 224, (v - 128) / 224
    r, b = y + 2 * (1 - kr) * pr, y + 2 * (1 - kb) * pb
    g = (y - kr * r - kb * b) / (1 - kr - kb)
    return np.clip(np.stack([r, g, b], -1), 0, 1) * 255


def boxed(frame, size):
    """Mean over the blocks of the central square."""
    height, width, _ = frame.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = frame[top : top + side, left : left + side]
    return square.reshape(size, side // size, size, side // size, 3).mean((1, 3))


# Pixels.


@pytest.mark.parametrize(
    ("width", "height", "size"), [(96, 64, 32), (64, 96, 32), (128, 128, 32), (384, 224, 56), (1280, 720, 240)]
)
def test_frames_are_the_box_mean_of_the_central_square(write, width, height, size):
    path = write(clips.encode(clips.ramps(5, width, height)))
    want = np.stack([boxed(rgb(*one, "bt709"), size) for one in planes(path)])
    got = decoded(path, size)
    assert got.shape == (5, size, size, 3)
    assert got.dtype == np.uint8
    for a, b in zip(got, want, strict=True):
        assert clips.psnr(a, b) >= 38
    assert np.abs((got - want).mean((0, 1, 2))).max() <= 0.5


@pytest.mark.parametrize("crop", ["center", "none"])
@pytest.mark.parametrize(
    ("size", "options"),
    [((96, 64), ""), ((64, 96), ""), ((128, 128), "-bf 0"), ((96, 64), "-c:v libx265"), ((720, 1280), "")],
)
def test_pictures_are_those_of_ffmpeg(write, size, crop, options):
    """An oracle: another build of libav, by its command line."""
    path, view = write(clips.encode(clips.ramps(6, *size), options)), View(32, crop)
    matrix = "bt709"  # as `clips.encode` tags it
    chain = ",".join(
        f"{name}=" + ":".join([*places, *(f"{key}={value}" for key, value in more.items())]).replace(",", "\\,")
        for name, places, more in video._filters(matrix, "tv", view)
    )
    command = [clips.FFMPEG, "-v", "error", "-i", path, "-vf", chain, "-f", "rawvideo", "-pix_fmt", "yuv444p", "-"]
    said = subprocess.run(command, capture_output=True, check=True).stdout
    assert np.array_equal(list(decode(path, view)), np.frombuffer(said, np.uint8).reshape(6, 3, 32, 32))


@pytest.mark.parametrize("gop", [1, 2, 10, 250])
def test_every_frame_once_and_in_order(write, gop):
    got = decoded(write(clips.encode(clips.ramps(30), gop=gop)))
    blue = np.median(got[..., 2], (1, 2)).astype(int)
    assert len(got) == 30
    assert (np.diff(blue) >= 5).all()


def test_the_crop_is_the_centre(write):
    frames = np.zeros((3, 64, 128, 3), np.uint8)
    frames[:, :, 32:96] = 200  # the central square is bright, what is cut away is black
    got = decoded(write(clips.encode(frames)), 16)
    assert got[:, :, 1:-1].min() > 190
    frames = np.zeros((3, 64, 128, 3), np.uint8)
    frames[:, :, 64:] = 200
    got = decoded(write(clips.encode(frames)), 16)
    assert got[:, :, :7].max() < 10
    assert got[:, :, 9:].min() > 190


def test_without_a_crop_the_picture_is_squeezed(write):
    frames = np.zeros((3, 64, 128, 3), np.uint8)
    frames[:, :, 96:] = 200  # outside the central square
    got = decoded(write(clips.encode(frames)), 16, crop="none")
    assert got[:, :, :11].max() < 10
    assert got[:, :, 13:].min() > 190


@pytest.mark.parametrize(("fps", "stride"), [(0, 1), (30, 1), (15, 2), (10, 3), (3, 10), (1, 30)])
def test_a_lower_rate_keeps_the_first_frame_and_every_so_many_th(write, fps, stride):
    path = write(clips.encode(clips.ramps(20)))
    got, every = decoded(path, fps=fps), decoded(path)
    assert len(got) == -(-20 // stride)
    assert np.array_equal(got, every[::stride])


def test_a_lower_rate_still_counts_what_the_container_promises(write, clip):
    with pytest.raises(DecodeError, match="20 frames decode, the data set promises 21"):
        list(video.Clip(write(clip), "x.mp4").decode(View(32, fps=6), length=21, fps=30))


@pytest.mark.parametrize("size", [16, 32, 48])
def test_the_planes_become_a_jpeg_of_the_same_picture(write, clip, size):
    path = write(clip)
    jpegs = [codec.encode(one, 98) for one in decode(path, View(size))]
    assert all(simplejpeg.decode_jpeg_header(one)[:4] == (size, size, "YCbCr", "444") for one in jpegs)
    assert clips.psnr(np.stack([simplejpeg.decode_jpeg(one) for one in jpegs]), decoded(path, size)) > 40


@pytest.mark.parametrize(
    ("matrix", "tags", "height"),
    [
        ("bt709", clips.BT709, 96),
        ("bt709", clips.BT709, 720),
        ("bt601", "-colorspace smpte170m", 96),
        ("bt601", "-colorspace bt470bg", 720),
        ("bt2020", "-colorspace bt2020nc", 96),
        ("bt709", HDR, 96),  # gamma and primaries are left alone
        ("bt601", "", 96),
        ("bt709", "", 720),
    ],
)
def test_the_colour_matrix_is_the_tagged_one_or_that_of_the_size(write, matrix, tags, height):
    want = clips.patches(height, height)
    path = write(clips.encode(np.stack([want] * 2), matrix=matrix, tags=tags))
    got = decoded(path, 48)[0].reshape(48, 6, 8, 3)[:, :, 2:6]  # not the seams, where chroma is shared
    assert np.abs(got - want.reshape(height, 6, -1, 3)[:48, :, :4].astype(int)).max() <= 4


@pytest.mark.parametrize("full", [False, True])
def test_full_and_limited_range_are_told_apart(write, full):
    frames = np.full((3, 64, 64, 3), 30, np.uint8)
    frames[:, 32:] = 220
    got = decoded(write(clips.encode(frames, pix_fmt="yuvj420p" if full else "yuv420p")), 16)
    assert np.abs(got[:, :7].astype(int) - 30).max() <= 3
    assert np.abs(got[:, 9:].astype(int) - 220).max() <= 3


# Containers that are unusual and whole.


def test_variable_frame_rate_repeats_nothing(write):
    path = write(clips.encode(clips.ramps(20), "-vf select='not(eq(mod(n\\,4)\\,3))' -fps_mode vfr"))
    got = decoded(path)
    assert len(got) == 15
    assert all((a != b).any() for a, b in pairwise(got))


@pytest.mark.parametrize("crop", ["center", "none"])
@pytest.mark.parametrize("degrees", [90, 180, 270, -90])
def test_a_rotation_tag_turns_the_picture(write, clip, degrees, crop):
    """As ffmpeg's command line and every player do it; checked against ffmpeg, whose sign is not obvious."""
    upright = decoded(write(clip), crop=crop)
    path = write(clips.remux(clip, "", before=f"-display_rotation {degrees}"))
    got = decoded(path, crop=crop)
    assert clips.psnr(got, np.rot90(upright, degrees // 90, (1, 2))) > 40
    crops = "crop='min(iw,ih)':'min(iw,ih)'," * (crop == "center")
    command = f"{clips.FFMPEG} -v error -i {path} -vf {crops}scale=32:32:flags=area -f rawvideo -pix_fmt rgb24 -"
    said = subprocess.run(command.split(), capture_output=True, check=True).stdout
    assert clips.psnr(got, np.frombuffer(said, np.uint8).reshape(20, 32, 32, 3)) > 30


def test_a_skewed_picture_is_refused(write, clip):
    assert "turned by 45 degrees" in refused(write(clips.remux(clip, "", before="-display_rotation 45"))).words


def test_a_clip_whose_pictures_change_their_size_is_refused(write):
    """The filters would go on with whatever lies in memory, or stop with no word."""
    streams = []
    for size in ((96, 64), (128, 96)):
        path = write(clips.encode(clips.ramps(5, *size), "-bf 0"))
        command = [clips.FFMPEG, "-v", "error", "-i", path, "-c", "copy", "-f", "h264", "-"]
        streams.append(subprocess.run(command, capture_output=True, check=True).stdout)
    error = refused(write(clips.ffmpeg("-f h264 -i - -c copy {}", b"".join(streams))))
    assert error.frame == 5
    assert "another format (yuv420p 128x96" in error.words


@pytest.mark.parametrize(
    "movflags", ["+faststart", "frag_keyframe+empty_moov", "frag_keyframe+empty_moov+default_base_moof"]
)
def test_where_the_index_lies_does_not_matter(write, clip, movflags):
    want = decoded(write(clip))
    assert np.array_equal(decoded(write(clips.remux(clip, f"-movflags {movflags}"))), want)


@pytest.mark.parametrize(
    ("width", "height", "pix_fmt"),
    [(75, 53, "yuv444p"), (98, 66, "yuv420p"), (54, 102, "yuv420p"), (96, 64, "yuv420p10le"), (16, 16, "yuv420p")],
)
def test_odd_sizes_and_ten_bits(write, width, height, pix_fmt):
    frames = clips.ramps(6, width, height)
    got = decoded(write(clips.encode(frames, pix_fmt=pix_fmt)), 32)
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    for a, b in zip(got, frames[:, top : top + side, left : left + side], strict=True):
        assert np.abs(a.mean((0, 1)) - b.mean((0, 1))).max() < 4


def test_a_clip_coded_as_rgb(write):
    frames = clips.ramps(6, 96, 64)
    got = decoded(write(clips.encode(frames, "-c:v libx264rgb", pix_fmt="gbrp", tags="")), 32)
    assert clips.psnr(got, np.stack([boxed(one, 32) for one in frames])) > 38


def test_one_frame_is_a_clip(write):
    assert len(decoded(write(clips.encode(clips.ramps(1))))) == 1


def test_a_track_of_sound_beside_the_picture_is_ignored(write, clip, tmp_path):
    (tmp_path / "a.mp4").write_bytes(clips.sound())
    got = decoded(write(clips.remux(clip, "-map 0 -map 1", before=f"-i {tmp_path / 'a.mp4'}")))
    assert len(got) == 20


# Damage.


def refused(path, name="part1.zip:task/3.mp4"):
    with pytest.raises(DecodeError) as caught:
        list(decode(path, View(32), name))
    error = caught.value
    assert error.path == name
    assert error.words
    assert str(error) == (
        f"{name}: frame {error.frame} does not decode: {error.words}; "
        "fetch the file again, or list it as dropped with --on-error drop"
    )
    assert "0x" not in error.words  # the same damage, the same words: they are part of an artifact
    assert str(path) not in str(error)
    return error


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("front", [False, True])
def test_truncated_clips_are_refused(write, clip, share, front):
    whole = clips.remux(clip, "-movflags +faststart") if front else clip
    path = write(whole[: min(int(len(whole) * share), len(whole) - 1)])
    if share == 1 and not front:  # the last letter of the encoder's name is cut off, and nothing else
        assert np.array_equal(decoded(path), decoded(write(whole)))
        return
    error = refused(path)
    if front and share >= 0.5:
        assert 0 < error.frame <= 20
        assert "promises" not in error.words  # the decoder saw it; counting is only the second line of defence


def test_a_clip_that_promises_more_or_fewer_frames_than_it_has(write, clip):
    path = write(clip)
    for promised in (19, 21):
        with pytest.raises(DecodeError, match=f"20 frames decode, the data set promises {promised}") as caught:
            list(video.Clip(path, "x.mp4").decode(View(32), length=promised, fps=30))
        assert caught.value.frame == 20


def test_a_flipped_bit_is_refused_or_leaves_the_number_of_frames(write, clip):
    rng = random.Random(2)
    start, end = clips.payload(clip)
    refusals = 0
    for _ in range(40):
        path = write(clips.flipped(clip, rng.randrange(start, end), rng.randrange(8)))
        try:
            frames = list(decode(path, View(32)))
        except DecodeError:
            refusals += 1
        else:
            assert len(frames) == 20
    assert refusals >= 20


def test_in_a_zip_every_flipped_bit_is_refused(clip, tmp_path):
    raw = clips.egodex(tmp_path / "raw", {"task/0": (clip, clips.poses(20))})
    zipped = raw / "part1.zip"
    whole, rng = zipped.read_bytes(), random.Random(3)
    opened, frames = egodex.frames(raw, egodex.survey(raw)[0][0], View(32), tmp_path)
    assert len(list(frames)) == opened.length == 20
    for member, data in (("part1/task/0.mp4", clip), ("part1/task/0.hdf5", clips.poses(20))):
        for _ in range(40):
            clips.damage(zipped, member, rng.randrange(len(data)), rng.randrange(8))
            with pytest.raises(IntegrityError, match=rf"part1.zip:{member} is damaged \(Bad CRC-32"):
                egodex.frames(raw, egodex.survey(raw)[0][0], View(32), tmp_path)
            zipped.write_bytes(whole)
    assert zips.check(zipped)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "Invalid data"),
        (b"\0", "Invalid data"),
        (b"this is text, not a clip\n" * 50, "Invalid data"),
        (b"#EXTM3U\n#EXTINF:9,\nhttp://127.0.0.1:9/x.mp4\n#EXT-X-ENDLIST\n", "Invalid data"),
        (b"ffconcat version 1.0\nfile other.mp4\n", "Invalid data"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "Invalid data"),
    ],
)
def test_files_that_are_no_clip(write, data, words):
    error = refused(write(data))
    assert error.frame == 0
    assert words in error.words


def test_a_playlist_does_not_lead_to_another_file(write, clip, tmp_path):
    (tmp_path / "other.mp4").write_bytes(clip)
    refused(write(b"ffconcat version 1.0\nfile other.mp4\n"))


def test_sound_alone(write):
    assert refused(write(clips.sound())).words == "no video stream"


def test_foreign_letters_in_the_metadata_do_no_harm(write, clip):
    tagged = clips.remux(clip, "-metadata title=caf#").replace(b"caf#", b"caf\xe9")
    assert b"caf\xe9" in tagged
    assert len(decoded(write(tagged))) == 20


# Clips that episodes share.


@pytest.mark.parametrize("crop", ["center", "none"])
@pytest.mark.parametrize("size", [(96, 64), (64, 96), (128, 128)])
def test_a_part_is_what_the_whole_has_there(tmp_path, size, crop):
    path, view = tmp_path / "a.mp4", View(32, crop)
    path.write_bytes(clips.encode(clips.ramps(12, *size)))
    whole = list(decode(path, view))
    part = list(video.Clip(path, "a").decode(view, length=5, fps=30, start=0.1))
    assert np.array_equal(part, whole[3:8])


@pytest.mark.parametrize(
    ("length", "start", "words"),
    [
        (13, None, "frame 12 does not decode: 12 frames decode, the data set promises 13"),
        (11, None, "frame 12 does not decode: 12 frames decode, the data set promises 11"),
        (5, 0.3, "frame 3 does not decode: 3 frames decode, the data set promises 5"),
        (5, -0.2, "frame 0 does not decode"),
        (5, 99.0, "frame 0 does not decode"),
    ],
)
def test_a_part_that_is_not_there(tmp_path, length, start, words):
    path = tmp_path / "a.mp4"
    path.write_bytes(clips.encode(clips.ramps(12)))
    with pytest.raises(DecodeError, match=words):
        list(video.Clip(path, "a").decode(View(32), length=length, fps=30, start=start))


@pytest.mark.parametrize("options", ["-x264-params open-gop=1:scenecut=0", "-c:v libx265 -x265-params open-gop=1"])
def test_parts_of_open_groups_of_pictures(tmp_path, options):
    """Frames that come after a key frame and are shown before it need it, whosever it is."""
    path = tmp_path / "a.mp4"
    path.write_bytes(clips.encode(clips.ramps(40), f"{options} -bf 3"))
    with av.open(str(path)) as container:
        shown = [(packet.pts, packet.is_keyframe) for packet in container.demux(video=0) if packet.pts is not None]
    assert any(key and after < at for (at, key), (after, _) in pairwise(shown))  # it is open
    whole = list(video.Clip(path, "a").decode(View(32), length=40, fps=30))
    for first, length in ((0, 10), (7, 9), (9, 1), (10, 10), (16, 5), (19, 3), (21, 17), (28, 12)):
        part = list(video.Clip(path, "a").decode(View(32), length=length, fps=30, start=first / 30))
        assert np.array_equal(part, whole[first : first + length]), first


def test_the_last_frames_of_a_part_are_where_their_number_says_too(tmp_path):
    """Those that the decoder still holds at the end come without a packet, and once came without a time."""
    path = tmp_path / "a.mp4"
    path.write_bytes(clips.encode(clips.ramps(20), gop=8))
    with av.open(str(path)) as container:
        times = [one.time for one in video._frames(container, 0.0, 8, 30)]
    assert times == pytest.approx([n / 30 for n in range(8)])


@pytest.mark.parametrize("size", [32, 64])
def test_white_of_the_full_range_is_white(tmp_path, size):
    """Levels of grey stay what they are, scaled or not: bias was .5, and 255 came out as 254."""
    levels = np.array([0, 16, 64, 128, 200, 235, 250, 255])
    path, frames = tmp_path / "a.mp4", np.zeros((2, 64, 64, 3), np.uint8)
    frames[:] = levels.repeat(8)[:, None, None]
    path.write_bytes(clips.encode(frames, "-qp 0", pix_fmt="yuvj420p"))
    (got, _) = decode(path, View(size))
    assert (got[0] == levels.repeat(size // 8)[:, None]).all()


def test_frames_that_are_not_where_their_number_says(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(clips.encode(clips.ramps(12), "-vf setpts=N*1.1/30/TB -fps_mode passthrough"))
    with pytest.raises(DecodeError, match="frames late"):
        list(video.Clip(path, "a").decode(View(32), length=12, fps=30, start=0.0))


def test_a_clip_without_pictures_has_no_part(tmp_path):
    (tmp_path / "a.mp4").write_bytes(clips.sound())
    with pytest.raises(DecodeError, match="no video stream"):
        list(video.Clip(tmp_path / "a.mp4", "a").decode(View(32), length=12, fps=30))


def test_a_worker_loads_no_more_than_it_needs(clip, tmp_path):
    """As many of them run as there are cores, of which large machines have two hundred."""
    raw = clips.egodex(tmp_path / "raw", {"task/0": (clip, clips.poses(20))})
    code = (
        "import sys; from pathlib import Path; import avrl.frames; from avrl import codec, episodes; "
        "from avrl.sources import egodex; raw = Path(sys.argv[1]); one = egodex.survey(raw)[0][0]; "
        "print(sum(len(codec.encode(f, 90)) > 0 for f in egodex.frames(raw, one, episodes.View(32), raw)[1]), "
        "sorted({'torch', 'polars', 'pandas', 'scipy', 'timm', 'typer'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code, str(raw)], capture_output=True, text=True, check=True).stdout
    assert said == "20 []\n"


def test_the_manifest_can_say_what_made_the_pixels():
    assert video.chain().startswith("scale=area, colorspace; PyAV 1")
