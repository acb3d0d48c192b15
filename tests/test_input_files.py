"""The door for files from outside: sizes, strictness, and messages that name file and field."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any, Literal, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipmerge_core.errors import PlanError
from ipmerge_core.runtime.input_files import (
    CLOSED,
    Count,
    FileKind,
    FileName,
    InvalidContentError,
    Location,
    Magnitude,
    Name,
    Schema,
    decompressed,
    parse_json,
    parse_yaml,
    read_bounded,
)


class Size(NamedTuple):
    rows: Count
    columns: Count


@dataclass(frozen=True)
class Entry:
    __pydantic_config__ = CLOSED

    name: Name
    size: Size
    norm: Magnitude
    kind: Literal["a", "b"] = "a"
    tags: tuple[str, ...] = ()


SCHEMA = Schema[dict[str, Entry]](dict[str, Entry])
SOUND = {"x": {"name": "n", "size": {"rows": 1, "columns": 2}, "norm": 3, "tags": ["t"]}}
KIND = FileKind("a list", "Make it again.", PlanError, largest=4096)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False,
    allow_infinity=False) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(
        exclude_categories=["Cs"])), inner),
    max_leaves=20,
)  # fmt: skip


def test_sound_content_becomes_the_type() -> None:
    found = SCHEMA.validate(SOUND)
    assert found == {"x": Entry("n", Size(1, 2), 3.0, "a", ("t",))}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": 5}, "'x.name' is 5; expected a valid string"),
        ({"name": "a\nb"}, "'x.name' is 'a"),
        ({"size": {"rows": 1}}, "'x.size.columns' is missing"),
        ({"size": {"rows": True, "columns": 1}}, "'x.size.rows' is True; expected a valid integer"),
        ({"size": {"rows": -1, "columns": 1}}, "is -1; expected greater than or equal to 0"),
        ({"size": [1, "2"]}, "'x.size[1]' is '2'; expected a valid integer"),
        ({"norm": "3"}, "'x.norm' is '3'; expected a valid number"),
        ({"norm": 1e300}, "expected less than or equal to 1e+100"),
        ({"kind": "c"}, "'x.kind' is 'c'; expected 'a' or 'b'"),
        ({"tags": "t"}, "'x.tags' is 't'; expected a valid array"),
        ({"other": 1}, "'x.other' is not a known field"),
    ],
)
def test_each_violation_names_the_field_its_value_and_what_is_valid(
    change: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidContentError) as caught:
        SCHEMA.validate({"x": SOUND["x"] | change})
    assert words in str(caught.value)


BAD = {
    b'{"a": 1, "a": 2}': "it has the key 'a' twice",
    b"[NaN]": "it contains NaN",
    b"[-Infinity]": "it contains -Infinity",
    b"[1e999]": "it contains 1e999",
    b"[" + b"9" * 100_000 + b"]": "an integer of 100000 digits",
    b"[" * 100_000: "nested too deeply",
    b'{"a":' * 100_000: "nested too deeply",
    b'["\xff"]': "byte 2 is not valid UTF-8",
    b'\xef\xbb\xbf{"a": 1}': "not valid JSON",
    b"": "not valid JSON",
    b"[1] [2]": "not valid JSON",
}


@pytest.mark.parametrize("data", BAD, ids=lambda data: repr(data[:12]))
def test_what_is_no_strict_json_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidContentError) as caught:
        parse_json(data, 10**6)
    assert BAD[data] in str(caught.value)


def test_values_that_no_text_can_hold_are_refused() -> None:
    anything = Schema[Any](Any)
    for data in ('["\\ud800"]', "[" * 300 + "]" * 300):
        with pytest.raises(InvalidContentError, match="nested too deeply, or contain lone"):
            anything.validate(parse_json(data, 10**6))


@given(json_values)
def test_any_json_comes_back_as_it_is(content: Any) -> None:
    text = json.dumps(content)
    assert parse_json(text, 10**9) == json.loads(text)
    assert parse_json(text, 10**9, foreign=True) == json.loads(text)


@given(json_values)
def test_any_other_content_is_refused_in_one_line(content: Any) -> None:
    if content == {}:
        return
    with pytest.raises(InvalidContentError) as caught:
        SCHEMA.validate(content)
    assert 10 < len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_files_of_other_programs_may_repeat_keys_and_hold_infinity() -> None:
    assert parse_json(b'{"a": [0.0, Infinity], "a": 2}', 100, foreign=True) == {"a": 2}
    assert Schema[Any](Any).validate(parse_json(b"[Infinity]", 100, foreign=True)) == [float("inf")]
    with pytest.raises(InvalidContentError, match="nested too deeply"):
        parse_json(b"[" * 100_000, 10**6, foreign=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &x [1]\nb: *x", "aliases"),
        ("a: 1\nb: 2\na: 3", "the key 'a' twice"),
        ("a: .inf", "Infinity"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("[" * 5000, "nested too deeply"),
        ("a: " + "9" * 10_000, "not valid YAML"),
        ("? [1]\n: 2", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("\x00", "not valid YAML"),
    ],
)
def test_yaml_is_a_tree_of_json_values(text: str, words: str) -> None:
    with pytest.raises(InvalidContentError, match=words):
        parse_yaml(text, 10**6)
    assert parse_yaml("a: [1, 2.5, x, null, true]", 100) == {"a": [1, 2.5, "x", None, True]}


def test_sizes_are_bounded_before_anything_is_parsed(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for data in (b" " * 4097, gzip.compress(bytes(10**8))):
        file.write_bytes(data)
        with pytest.raises(PlanError, match="is not a list of this version: it is larger than 4"):
            KIND.content(file)
    file.write_bytes(gzip.compress(b"[1]"))
    assert KIND.content(file) == [1]
    with pytest.raises(PlanError, match="larger than 4 KiB"):
        KIND.read("/dev/zero")
    for data in (gzip.compress(b"[1]")[:-3], gzip.compress(b"[1]") + b"x", b"\x1f\x8b" + b"x" * 9):
        with pytest.raises(InvalidContentError, match="compressed data"):
            decompressed(data, 4096)


def test_pipes_folders_missing_files_and_null_bytes_end(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert read_bounded(pipe, 10) == b""  # nobody writes: no waiting
    reading, writing = os.pipe()
    os.write(writing, b"[1]")
    os.close(writing)
    assert read_bounded(f"/dev/fd/{reading}", 10) == b"[1]"
    os.close(reading)
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(PlanError, match="Cannot read the list"):
            KIND.content(path)
    with pytest.raises(PlanError, match="its path is invalid"):
        KIND.content("a\0b")


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", ".hidden", "a\\b", "", "..", "a\0", 7])
def test_names_of_files_are_bare(name: object) -> None:
    with pytest.raises(InvalidContentError):
        Schema[FileName](FileName).validate(name)
    assert Schema[FileName](FileName).validate("model-00001.safetensors")


def test_locations_hold_no_null_byte_and_are_not_empty() -> None:
    for place in ("", "a\0b", "a" * 6000):
        with pytest.raises(InvalidContentError):
            Schema[Location](Location).validate(place)


def test_a_repeated_key_among_many_is_found_in_linear_time() -> None:
    def seconds(count: int) -> float:
        fields = ",".join(f'"key{number}":1' for number in range(count))
        started = process_time()
        with pytest.raises(InvalidContentError, match="'key7' twice"):
            parse_json('{"key7":0,' + fields + "}", 10**8)
        return process_time() - started

    least = min(seconds(20_000) for _ in range(3))
    assert min(seconds(160_000) for _ in range(3)) < 64 * least  # 8 when linear, quadratic 64
