"""Three hundred damaged checkpoints, seeded: each ends in one clear error and leaves no output."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Trio, write_trio
from safetensors.torch import load_file, save_file

import ipmerge_core as ipm
from ipmerge_core.errors import IPMergeError
from ipmerge_core.models.pairing import open_pair
from ipmerge_core.models.writer import run_folders

INDEX = "model.safetensors.index.json"
Header = dict[str, dict[str, object]]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    return write_trio(tmp_path_factory.mktemp("sound"), dtype=torch.bfloat16, shards=2)


def shard_of(folder: Path, chance: random.Random) -> Path:
    return chance.choice(sorted(folder.glob("*.safetensors")))


def split(file: Path) -> tuple[Header, bytes]:
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(file: Path, header: Header | str, data: bytes) -> None:
    text = header if isinstance(header, str) else json.dumps(header)
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + data)


def entry_of(header: Header, chance: random.Random) -> str:
    return chance.choice(sorted(name for name in header if name != "__metadata__"))


# --- damages: each changes a folder so that no sound merge can come of it ---


def truncated(folder: Path, chance: random.Random) -> None:
    file = shard_of(folder, chance)
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: chance.randrange(size)])


def longer(folder: Path, chance: random.Random) -> None:
    file = shard_of(folder, chance)
    file.write_bytes(file.read_bytes() + chance.randbytes(chance.randint(1, 99)))


def header_length_lies(folder: Path, chance: random.Random) -> None:
    file = shard_of(folder, chance)
    data = bytearray(file.read_bytes())
    true = struct.unpack("<Q", data[:8])[0]
    lie = chance.choice([0, 1, true - 1, true + 1, true * 2, 2**31, 2**63, 2**64 - 1])
    data[:8] = struct.pack("<Q", lie)
    file.write_bytes(data)


def header_is_noise(folder: Path, chance: random.Random) -> None:
    file = shard_of(folder, chance)
    data = bytearray(file.read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    data[8 : 8 + length] = chance.randbytes(length)
    file.write_bytes(data)


def nested_without_end(folder: Path, chance: random.Random) -> None:
    file = shard_of(folder, chance)
    join(file, chance.choice(["[" * 20000, '{"a":' * 20000, "null", "3", '"text"']), b"")


def offsets_overlap(folder: Path, chance: random.Random) -> None:
    file = shard_of(folder, chance)
    header, data = split(file)
    start, stop = header[name := entry_of(header, chance)]["data_offsets"]
    shift = chance.choice([-2, 2, 64, -64, 10**6])
    header[name]["data_offsets"] = [start + shift, stop + shift]
    join(file, header, data)


def duplicate_key(folder: Path, chance: random.Random) -> None:
    file = shard_of(folder, chance)
    header, data = split(file)
    name = entry_of(header, chance)
    twice = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
    join(file, twice, data)


def wrong_dtype(folder: Path, chance: random.Random) -> None:
    file = shard_of(folder, chance)
    header, data = split(file)
    header[entry_of(header, chance)]["dtype"] = chance.choice(["F32", "F64", "U8", "X9", None, 16])
    join(file, header, data)


def wrong_shape(folder: Path, chance: random.Random) -> None:
    file = shard_of(folder, chance)
    header, data = split(file)
    entry = header[entry_of(header, chance)]
    shapes = [[], [0], [-1, 4], [2**40, 2**40], "16", None, [1.5, 2], [True], [[4]], [10**30]]
    entry["shape"] = chance.choice(shapes)
    join(file, header, data)


def entry_incomplete(folder: Path, chance: random.Random) -> None:
    file = shard_of(folder, chance)
    header, data = split(file)
    name = entry_of(header, chance)
    whole = header[name]
    dropped = chance.choice(sorted(whole))
    partial = {key: value for key, value in whole.items() if key != dropped}
    header[name] = chance.choice([partial, {}, [], None, {**whole, "data_offsets": [1]}])
    join(file, header, data)


def not_a_number(folder: Path, chance: random.Random) -> None:
    while True:
        file = shard_of(folder, chance)
        weights = load_file(file)
        name = chance.choice(sorted(weights))
        if "_proj" in name and "vision" not in name:
            break
    flat = weights[name].view(-1)
    bad = [float("nan"), float("inf"), -float("inf")]
    flat[chance.randrange(flat.numel())] = chance.choice(bad)
    save_file(weights, file)


def index_outside(folder: Path, chance: random.Random) -> None:
    index = json.loads((folder / INDEX).read_text())
    places = ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 7, None, "x\\y"]
    index["weight_map"][chance.choice(sorted(index["weight_map"]))] = chance.choice(places)
    (folder / INDEX).write_text(json.dumps(index))


def index_of_another_model(folder: Path, chance: random.Random) -> None:
    index = json.loads((folder / INDEX).read_text())
    name = chance.choice(sorted(index["weight_map"]))
    if chance.random() < 0.5:
        index["weight_map"][name + ".other"] = index["weight_map"].pop(name)
    else:
        shards = sorted(set(index["weight_map"].values()))
        index["weight_map"][name] = shards[index["weight_map"][name] == shards[0]]
    (folder / INDEX).write_text(json.dumps(index))


def index_is_noise(folder: Path, chance: random.Random) -> None:
    noise = ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\x00", "{" * 9999]
    (folder / INDEX).write_text(chance.choice(noise))


def missing_shard(folder: Path, chance: random.Random) -> None:
    shard_of(folder, chance).unlink()


def symlinked(folder: Path, chance: random.Random) -> None:
    file = shard_of(folder, chance)
    file.unlink()
    file.symlink_to(chance.choice(["nowhere", str(folder), file.name, "/dev/zero", "config.json"]))


def config_is_noise(folder: Path, chance: random.Random) -> None:
    file = folder / "config.json"
    if chance.random() < 0.3:
        file.unlink()
    else:
        file.write_bytes(chance.choice([b"", b"[]", b"\xff\xfe", b"{", b"null", b"[" * 99999]))


def tensor_lost(folder: Path, chance: random.Random) -> None:
    """Both header and index agree, and a matrix of the decoder is not there."""
    index = json.loads((folder / INDEX).read_text())
    name = chance.choice([n for n in sorted(index["weight_map"]) if "mlp." in n and ".layers." in n
                          and "vision" not in n])  # fmt: skip
    file = folder / index["weight_map"].pop(name)
    weights = load_file(file)
    del weights[name]
    save_file(weights, file)
    (folder / INDEX).write_text(json.dumps(index))


DAMAGES: list[Callable[[Path, random.Random], None]] = [
    truncated, longer, header_length_lies, header_is_noise, nested_without_end, offsets_overlap,
    duplicate_key, wrong_dtype, wrong_shape, entry_incomplete, not_a_number, index_outside,
    index_of_another_model, index_is_noise, missing_shard, symlinked, config_is_noise, tensor_lost,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_models_end_in_one_clear_error_and_no_output(
    damage: Callable[[Path, random.Random], None], sound: Trio, tmp_path: Path
) -> None:
    for seed in range(17):  # 18 kinds of damage: 306 in all
        chance = random.Random(f"{damage.__name__} {seed}")
        role = chance.choice(["base", "mllm", "math"])
        folder = tmp_path / f"{seed}" / role
        shutil.copytree(getattr(sound, role), folder)
        damage(folder, chance)
        models = sound._replace(**{role: folder})
        out = tmp_path / f"{seed}" / "out"
        with pytest.raises(IPMergeError) as caught:
            ipm.merge(
                ipm.make_plan(
                    open_pair(models.mllm, models.math, models.base), method="task_arithmetic"
                ),
                out,
            )
        message = str(caught.value)
        assert "\n" not in message, (seed, message)
        assert message.endswith((".", ")", "?")), (seed, message)
        assert len(message) > 40, (seed, message)
        assert not out.exists(), seed
        assert not run_folders(out).run.exists(), seed


def test_the_sound_model_does_merge(sound: Trio, tmp_path: Path) -> None:
    pair = open_pair(sound.mllm, sound.math, sound.base)
    ipm.merge(ipm.make_plan(pair, method="task_arithmetic"), tmp_path / "out")
    assert (tmp_path / "out").exists()
