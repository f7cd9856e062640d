"""The files the sample is made of: EgoDex's mp4 and HDF5, and TFDS shards of tf.Example (without TensorFlow).

Only `render.py` imports this. Nothing here knows of the simulator.
"""

import io
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import google_crc32c
import h5py
import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]
Features = dict[str, list[bytes] | Array]  # one tf.Example: bytes, or numbers of any shape, flattened


def joint_names() -> list[str]:
    """EgoDex's 68 joints."""
    names = ["hip", *(f"spine{i}" for i in range(1, 8)), *(f"neck{i}" for i in range(1, 5))]
    for side in ("left", "right"):
        names += [side + part for part in ("Shoulder", "Arm", "Forearm", "Hand")]
        for finger in ("Index", "Middle", "Ring", "Little", "Thumb"):
            bones = ("Metacarpal", "Knuckle", "IntermediateBase", "IntermediateTip", "Tip")
            stem, first = (finger, 1) if finger == "Thumb" else (f"{finger}Finger", 0)
            names += [side + stem + bone for bone in bones[first:]]
    return names


def encode(images: list[Array], path: Path, crf: int) -> bytes:
    """H.264 in mp4, tagged limited-range BT.709; one thread, because the bytes depend on their number."""
    height, width, _ = images[0].shape
    # On the frames: output options alone leave primaries and transfer "unknown".
    colour = "range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
    options = f"""-y -v error -f rawvideo -pix_fmt rgb24 -s {width}x{height} -r 30 -i -
        -vf scale=in_range=pc:out_range=tv:out_color_matrix=bt709,format=yuv420p,setparams={colour}
        -c:v libx264 -preset veryslow -crf {crf} -g 30 -threads 1
        -map_metadata -1 -fflags +bitexact -flags:v +bitexact"""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *options.split(), str(path)]
    subprocess.run(command, input=np.stack(images).tobytes(), check=True)
    return path.read_bytes()


def annotate(poses: dict[str, Array], size: tuple[int, int], attributes: dict[str, Any], confident: bool) -> bytes:
    """The HDF5 file of one episode in EgoDex's schema."""
    width, height = size
    focal = height / 2 / np.tan(np.deg2rad(45) / 2)  # mujoco's free camera: 45 degrees vertically
    seen = ("rightHand", "rightThumbTip", "rightIndexFingerTip")
    buffer = io.BytesIO()
    # Format v110: an older one spends 2 KB on the index of each of 137 data sets; a newer one few can read.
    with h5py.File(buffer, "w", libver=("v110", "v110")) as file:
        for group in ("camera", "transforms", "confidences")[: 3 if confident else 2]:
            file.create_group(group, track_times=False)  # else the bytes tell the hour
        file["camera/intrinsic"] = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], np.float32)
        for name, values in poses.items():
            packed = {"chunks": values.shape, "compression": "gzip", "shuffle": True}
            file.create_dataset(f"transforms/{name}", data=values, **packed)
            if confident and name != "camera":
                file[f"confidences/{name}"] = np.full(len(values), name in seen, np.float32)
        file.attrs.update(attributes)
    return buffer.getvalue()


def language(sentences: list[str], which: int) -> dict[str, Any]:
    """EgoDex's attributes about what is done: `sentences[which]`; the other one undoes it or is empty."""
    verb, thing = re.findall(r"^(.+?) the (\w+)", sentences[which])[0]
    return {
        "llm_description": sentences[0], "llm_description2": sentences[1],
        "which_llm_description": str(which + 1), "llm_type": "reversible" if sentences[1] else "reset",
        "llm_verbs": [verb.lower()], "llm_objects": [thing], "object": thing,
        "annotated": True, "annotator_version": "1", "extra": "", "type": "",
        "description": "", "description2": "",
    }  # fmt: skip


def jpeg(image: Array, quality: int) -> bytes:
    """4:2:0, Huffman-optimised."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "jpeg", quality=quality, subsampling=2, optimize=True, progressive=True)
    return buffer.getvalue()


def black_jpeg() -> bytes:
    """The dummy of an absent camera. Three a step: of a progressive file only the first scan (DC) is kept."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {
        "qtables": [[128] * 64],
        "subsampling": 2,
        "optimize": True,
        "progressive": True,
    }
    Image.new("RGB", (256, 256)).save(buffer, "jpeg", **options)
    data = buffer.getvalue()
    return data[: data.index(b"\xff\xc4", data.index(b"\xff\xda"))] + b"\xff\xd9"


def varint(value: int) -> bytes:
    """Protobuf's base-128 integer."""
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def field(number: int, payload: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def example(features: Features) -> bytes:
    """A serialised tf.Example; numbers packed, as TensorFlow writes them."""
    entries = b""
    for key, value in sorted(features.items()):
        if isinstance(value, list):
            kind, items = 1, b"".join(field(1, item) for item in value)
        elif value.dtype.kind == "f":
            kind, items = 2, field(1, value.astype("<f4").tobytes())
        else:
            kind, items = 3, field(1, b"".join(varint(int(v)) for v in value.ravel()))
        entries += field(1, field(1, key.encode()) + field(2, field(kind, items)))
    return field(1, entries)


def record(payload: bytes) -> bytes:
    """TFRecord framing: length, masked CRC-32C of the length, payload, masked CRC-32C of the payload."""

    def masked(data: bytes) -> bytes:
        crc = int(google_crc32c.value(data))
        return (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")

    length = len(payload).to_bytes(8, "little")
    return length + masked(length) + payload + masked(payload)


def bridge_record(images: list[bytes], states: Array, actions: Array, sentence: str, origin: tuple[int, str]) -> bytes:
    """One framed episode with Bridge's feature keys; `origin` is its number and where it comes from."""
    steps = len(images)
    # A fixed direction for each sentence, in place of a text encoder's.
    words = np.random.default_rng(list(sentence.encode()) or 0).standard_normal(512)
    first, last = np.eye(steps, dtype=int)[[0, -1]]
    features: Features = {
        "steps/observation/state": states, "steps/action": actions, "steps/observation/image_0": images,
        "steps/reward": last.astype(float), "steps/discount": np.ones(steps),
        "steps/is_first": first, "steps/is_last": last, "steps/is_terminal": last,
        "steps/language_instruction": [sentence.encode()] * steps,
        "steps/language_embedding": np.tile(words / np.linalg.norm(words), steps),
        "episode_metadata/file_path": [origin[1].encode()],
        "episode_metadata/episode_id": np.array([origin[0]]),
        "episode_metadata/has_language": np.array([int(bool(sentence))]),
    }  # fmt: skip
    for k in range(4):  # these flags are 0 in the real set, image or not
        features[f"episode_metadata/has_image_{k}"] = np.array([0])
    for k in range(1, 4):
        features[f"steps/observation/image_{k}"] = [black_jpeg()] * steps
    return record(example(features))


def feature_spec() -> dict[str, Any]:
    """The content of `features.json`: the feature tree of bridge_dataset 1.0.0."""

    def leaf(kind: str, **content: Any) -> dict[str, Any]:
        return {"pythonClassName": f"tensorflow_datasets.core.features.{kind}", **content}

    def tensor(dtype: str, *shape: int) -> dict[str, Any]:
        size = {"dimensions": [str(n) for n in shape]} if shape else {}
        content = {"shape": size, "dtype": dtype, "encoding": "none"}
        return leaf("tensor_feature.Tensor" if shape else "scalar.Scalar", tensor=content)

    def tree(**features: Any) -> dict[str, Any]:
        return leaf("features_dict.FeaturesDict", featuresDict={"features": features})

    shape = {"dimensions": ["256", "256", "3"]}
    image = leaf("image_feature.Image", image={"shape": shape, "dtype": "uint8", "encodingFormat": "jpeg"})
    text, flags = leaf("text_feature.Text", text={}), ("is_first", "is_last", "is_terminal")
    step = tree(
        observation=tree(state=tensor("float32", 7), **{f"image_{k}": image for k in range(4)}),
        action=tensor("float32", 7), reward=tensor("float32"), discount=tensor("float32"),
        **{name: tensor("bool") for name in flags},
        language_instruction=text, language_embedding=tensor("float32", 512),
    )  # fmt: skip
    has = {f"has_{name}": tensor("bool") for name in ("image_0", "image_1", "image_2", "image_3", "language")}
    return tree(
        steps=leaf("dataset_feature.Dataset", sequence={"feature": step, "length": "-1"}),
        episode_metadata=tree(file_path=text, episode_id=tensor("int32"), **has),
    )


def write_dataset(folder: Path, splits: dict[str, list[bytes]], shards: dict[str, int]) -> None:
    """Writes the shards of every split and, last, `features.json` and `dataset_info.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for split, records in splits.items():
        cuts = np.linspace(0, len(records), shards[split] + 1).astype(int)
        for k in range(shards[split]):
            name = f"{folder.parent.name}-{split}.tfrecord-{k:05d}-of-{shards[split]:05d}"
            part = folder / f"{name}.part"
            part.write_bytes(b"".join(records[cuts[k] : cuts[k + 1]]))
            part.replace(folder / name)
        listed.append({
            "name": split, "shardLengths": [str(n) for n in np.diff(cuts)],
            "numBytes": str(sum(len(r) - 16 for r in records)),  # payloads, without the framing
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        })  # fmt: skip
    info = {
        "name": folder.parent.name, "version": folder.name, "fileFormat": "tfrecord", "splits": listed,
        "description": "A small sample in the form of Bridge V2, rendered from Meta-World.",
        "releaseNotes": {folder.name: "Rendered by avrl/sample/render.py."},
    }  # fmt: skip
    for name, content in (("features.json", feature_spec()), ("dataset_info.json", info)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
