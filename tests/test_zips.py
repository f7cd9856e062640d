"""`avrl.zips` against hostile names, bombs, cuts and flipped bits: refused by name, or exactly right."""

from __future__ import annotations

import contextlib
import random
import stat
import struct
import time
import warnings
import zipfile

import clips
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avrl.errors import IntegrityError
from avrl.zips import check, copy_member, read_member

CLIP = random.Random(1).randbytes(70_000)
POSES = b"".join(struct.pack("<d", index / 7) for index in range(3000))


def make(path, members, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # duplicate names
        with zipfile.ZipFile(path, "w", **options) as archive:
            for member, data in members:
                archive.writestr(member, data)
    return path


def good(path):
    members = [
        ("part1/", b""),
        ("part1/fold/0.mp4", CLIP),
        ("part1/fold/0.hdf5", POSES),
        ("part1/fold/a..b", b""),
    ]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            archive.writestr(name, data, zipfile.ZIP_DEFLATED if name.endswith("5") else zipfile.ZIP_STORED)
    return path


def test_a_good_zip_gives_its_members_and_their_bytes(tmp_path):
    path = good(tmp_path / "part1.zip")
    assert [one.filename for one in check(path)][1] == "part1/fold/0.mp4"
    copy_member(path, "part1/fold/0.mp4", tmp_path / "0.mp4")
    with zipfile.ZipFile(path) as archive:
        copy_member(archive, "part1/fold/0.hdf5", tmp_path / "0.hdf5")
    assert (tmp_path / "0.mp4").read_bytes() == CLIP
    assert (tmp_path / "0.hdf5").read_bytes() == POSES


def renamed(path, name):
    """Write a name that zipfile itself would repair, by patching a placeholder of the same length."""
    make(path, [("#" * len(name), b"x")])
    path.write_bytes(path.read_bytes().replace(b"#" * len(name), name))
    return path


@pytest.mark.parametrize(
    "name",
    [
        b"../x",
        b"a/../../x",
        b"a/..",
        b"..",
        b"/etc/passwd",
        b"//host/share",
        b"a//b",
        b"./a",
        b"a/./b",
        b"C:x",
        b"c:/x",
        b"a\\..\\x",
        b"\\\\host\\share",
        b"\\x",
        b"a\x00.mp4",
        b"a\nb",
        b"a\x1b[2J",
        b"/",
    ],
)
def test_hostile_names_are_refused_by_name(name, tmp_path):
    path = renamed(tmp_path / "evil.zip", name)
    with pytest.raises(IntegrityError) as caught:
        check(path)
    assert "evil.zip" in caught.value.cause
    assert repr(name.decode()) in caught.value.cause
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "names",
    [
        ("a/x", "a/x"),
        ("a/X.mp4", "A/x.mp4"),
        ("a", "a/"),
        ("caf\u00e9", "cafe\u0301"),
        ("stra\u00dfe", "STRASSE"),
    ],
)
def test_names_that_collide_on_some_disk_are_refused(names, tmp_path):
    path = make(tmp_path / "twice.zip", [(name, b"") for name in names])
    with pytest.raises(IntegrityError, match="collide"):
        check(path)


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_links_and_devices_are_refused(kind, tmp_path):
    member = zipfile.ZipInfo("part1/link")
    member.external_attr = (kind | 0o777) << 16
    path = make(tmp_path / "link.zip", [(member, b"/etc/passwd")])
    with pytest.raises(IntegrityError, match=r"'part1/link' is a link or a device"):
        check(path)


def test_a_deflate_bomb_is_refused(tmp_path):
    path = make(tmp_path / "bomb.zip", [("zeros", bytes(10**6))], compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(IntegrityError, match=r"'zeros' unpacks to more than 200 times"):
        check(path)


def patched(path, offset, packed):
    """Change a field of the first entry of the central directory."""
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02") + offset
    data[at : at + len(packed)] = packed
    path.write_bytes(data)
    return path


def test_members_that_share_bytes_are_refused(tmp_path):
    path = make(tmp_path / "overlap.zip", [("a", CLIP), ("b", CLIP)])
    data = path.read_bytes()
    second = data.rindex(b"PK\x01\x02")
    path.write_bytes(data[: second + 42] + struct.pack("<I", 0) + data[second + 46 :])
    with pytest.raises(IntegrityError, match="overlaps"):
        check(path)


def test_caps_on_count_and_size(tmp_path):
    path = make(tmp_path / "many.zip", [(str(index), b"xyz") for index in range(30)])
    assert len(check(path, max_members=30, max_bytes=90)) == 30
    for caps in ({"max_members": 29}, {"max_bytes": 89}):
        with pytest.raises(IntegrityError, match="claims 30 members of 90 B"):
            check(path, **caps)


def test_a_size_that_lies(tmp_path):
    path = patched(make(tmp_path / "lie.zip", [("a", CLIP)]), 24, struct.pack("<I", 10**6))
    with pytest.raises(IntegrityError, match="two different sizes"):
        check(path)


def test_encrypted_members_are_refused(tmp_path):
    path = patched(make(tmp_path / "locked.zip", [("a", CLIP)]), 8, struct.pack("<H", 1))
    with pytest.raises(IntegrityError, match="'a' is encrypted"):
        check(path)
    with pytest.raises(IntegrityError, match=r"locked.zip:a"):
        copy_member(path, "a", tmp_path / "a")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, 9])
def test_other_methods_are_refused(method, tmp_path):
    path = patched(make(tmp_path / "m.zip", [("a", CLIP)]), 10, struct.pack("<H", method))
    with pytest.raises(IntegrityError, match=f"method {method}"):
        check(path)


@pytest.mark.parametrize("size", [0, 1, 4, 30, 1000, 70_000, -1, -22, -23, -100])
def test_a_cut_zip_is_refused(size, tmp_path):
    path = good(tmp_path / "cut.zip")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(IntegrityError, match=r"cut.zip is (not a zip|cut short|damaged)"):
        check(path)


def test_a_web_page_is_not_a_zip(tmp_path):
    path = tmp_path / "page.zip"
    path.write_text("<html>log in</html>")
    with pytest.raises(IntegrityError, match="is not a zip"):
        check(path)


def test_a_directory_with_a_foreign_charset_is_refused_or_read(tmp_path):
    path = make(tmp_path / "utf.zip", [("caf\u00e9", b"x")])
    path.write_bytes(path.read_bytes().replace("caf\u00e9".encode(), b"caf\xff\xfe"))
    with pytest.raises(IntegrityError, match=r"utf.zip"):
        check(path)


def test_a_missing_zip_is_no_integrity_matter(tmp_path):
    with pytest.raises(FileNotFoundError):
        check(tmp_path / "none.zip")


def test_a_missing_member(tmp_path):
    with pytest.raises(IntegrityError, match=r"part1.zip:none is not there"):
        copy_member(good(tmp_path / "part1.zip"), "none", tmp_path / "x")
    assert not (tmp_path / "x").exists()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_is_an_error_by_name_or_changes_nothing(tmp_path_factory, data):
    """Whatever bit flips: a typed error, or the very members and bytes that were put in."""
    folder = tmp_path_factory.getbasetemp() / "flips"
    folder.mkdir(exist_ok=True)
    path = folder / "part1.zip"
    if not (folder / "good.zip").exists():
        make(folder / "good.zip", [("a/0.mp4", CLIP[:500]), ("a/0.hdf5", POSES[:800])], compression=8)
    raw = bytearray((folder / "good.zip").read_bytes())
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    with contextlib.suppress(IntegrityError):
        names = [one.filename for one in check(path)]
        for name in names:
            copy_member(path, name, folder / "out")
            if name in ("a/0.mp4", "a/0.hdf5"):
                want = CLIP[:500] if name == "a/0.mp4" else POSES[:800]
                assert (folder / "out").read_bytes() == want


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_with_a_zip_end_is_a_typed_error(tmp_path_factory, garbage):
    path = tmp_path_factory.getbasetemp() / "garbage.zip"
    path.write_bytes(b"PK\x03\x04" + garbage + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, 46, 4, 0))
    with pytest.raises(IntegrityError):
        check(path)


def test_a_directory_of_92_000_members_takes_seconds(tmp_path):
    path = make(tmp_path / "big.zip", [(f"part1/task{i % 194}/{i}.mp4", b"") for i in range(92_000)])
    started = time.process_time()
    assert len(check(path)) == 92_000
    assert time.process_time() - started < 10


def test_a_member_is_read_into_memory_whole_or_refused(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", b"x" * 100)
        archive.writestr("b", b"y" * 100)
    clips.damage(path, "b", at=50)
    with zipfile.ZipFile(path) as archive:
        assert read_member(archive, "a", 100) == b"x" * 100
        for name, limit, words in (("a", 99, "100 bytes, where 99"), ("b", 100, "CRC"), ("c", 9, "is not there")):
            with pytest.raises(IntegrityError, match=rf"a.zip:{name}.*{words}"):
                read_member(archive, name, limit)
