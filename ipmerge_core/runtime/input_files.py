"""Read files from outside: bounded in size, strict JSON or YAML, validated against a type.

In: a path, bytes or text, and a type (a dataclass, a named tuple, or any annotation). Out: a value
of that type, or one error that names the file, the field, its value and what was expected. The
annotations of the type are the schema, so that fields are listed once. Rejected for every kind of
file: content over its size limit before it is parsed, invalid UTF-8 and lone surrogates, duplicate
keys, NaN and infinity, very long integers, excessive nesting, and values of another type. Files of
other programs (`foreign`) may repeat keys and contain NaN, as Python's json module accepts them.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Generic, TypeAlias, TypeVar

import yaml
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from ipmerge_core.errors import IPMergeError, RunError
from ipmerge_core.runtime.paths import expand_path

T = TypeVar("T")

MEGABYTE = 2**20
_GZIP = b"\x1f\x8b"
_LONGEST_INTEGER = 40  # characters; the schemas bound most integers to 64 bits
_LONGEST_KEY = 80

# `__pydantic_config__` of a dataclass in a file: unknown fields are errors.
CLOSED = ConfigDict(extra="forbid")

LARGEST_NUMBER = 1e100  # squares and products of such numbers are finite

Count: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]
Number: TypeAlias = Annotated[float, Field(ge=-LARGEST_NUMBER, le=LARGEST_NUMBER)]
Magnitude: TypeAlias = Annotated[float, Field(ge=0, le=LARGEST_NUMBER)]
Name: TypeAlias = Annotated[str, Field(max_length=1000, pattern=r"^[^\x00-\x1f]*$")]
Location: TypeAlias = Annotated[str, Field(min_length=1, max_length=5000, pattern=r"^[^\x00]+$")]


# The name of a file in a folder; an entry may be hidden, but is not the folder or its parent.
FileName: TypeAlias = Annotated[
    str, Field(max_length=255, pattern=r"^[^/\\\x00-\x1f.][^/\\\x00-\x1f]*$")
]
EntryName: TypeAlias = Annotated[
    str, Field(max_length=255, pattern=r"^\.?[^/\\\x00-\x1f.][^/\\\x00-\x1f]*$")
]


_JSON = TypeAdapter[Any](Any, config=ConfigDict(ser_json_inf_nan="constants"))


class InvalidContentError(ValueError):
    """Content that its schema rejects; the message names the field, its value and what is valid."""


class Schema(Generic[T]):
    """Validates JSON content against the annotations of a type, without conversions.

    >>> Schema(tuple[int, ...]).validate([1, 2])
    (1, 2)
    >>> Schema(dict[str, int]).validate({"a": "1"})
    Traceback (most recent call last):
    ipmerge_core.runtime.input_files.InvalidContentError: 'a' is '1'; expected a valid integer
    """

    def __init__(self, kind: Any) -> None:  # noqa: ANN401 (a type or an annotation)
        self._kind = kind

    @cached_property
    def _adapter(self) -> TypeAdapter[T]:
        return TypeAdapter(self._kind)

    def validate(self, content: Any) -> T:  # noqa: ANN401 (JSON values)
        """Return the content as the type. Raises: InvalidContentError."""
        try:
            return self._adapter.validate_json(_JSON.dump_json(content), strict=True)
        except ValidationError as error:
            raise InvalidContentError(_describe(error.errors()[0], content)) from error
        except ValueError as error:
            raise InvalidContentError(
                "its values are nested too deeply, or contain lone surrogates"
            ) from error


@dataclass(frozen=True)
class FileKind:
    """A kind of file from outside: its name in messages, its limits and its error.

    Attributes:
        name: with its article, such as "a plan".
        remedy: the sentence that ends its messages.
        error: the exception raised for it.
        largest: maximum size in bytes, on disk and decompressed.
        foreign: whether other programs write such files, which may repeat keys and contain NaN.
    """

    name: str
    remedy: str
    error: type[IPMergeError]
    largest: int = MEGABYTE
    foreign: bool = False

    def read(self, path: str | Path) -> bytes:
        """Read a file, decompressed if it is gzipped. Raises: the error of this kind."""
        try:
            return decompressed(read_bounded(path, self.largest), self.largest)
        except OSError as error:
            noun = self.name.split(" ", 1)[1]
            raise self.error(f"Cannot read the {noun} '{path}': {error.strerror}.") from error
        except InvalidContentError as error:
            raise self.refusal(path, error) from error

    def parse(self, data: bytes | bytearray | str, source: str | Path) -> Any:  # noqa: ANN401
        """Parse JSON of this kind. Raises: the error of this kind."""
        try:
            return parse_json(data, self.largest, foreign=self.foreign)
        except InvalidContentError as error:
            raise self.refusal(source, error) from error

    def content(self, path: str | Path) -> Any:  # noqa: ANN401 (JSON values)
        """Read and parse a JSON file. Raises: the error of this kind."""
        return self.parse(self.read(path), path)

    def validate(self, schema: Schema[T], content: Any, source: str | Path) -> T:  # noqa: ANN401
        """Validate parsed content. Raises: the error of this kind."""
        try:
            return schema.validate(content)
        except (InvalidContentError, IPMergeError) as error:
            raise self.refusal(source, error) from error

    def load(self, schema: Schema[T], path: str | Path) -> T:
        """Read, parse and validate a JSON file. Raises: the error of this kind."""
        return self.validate(schema, self.content(path), path)

    def refusal(self, source: str | Path, reason: Exception | str) -> IPMergeError:
        """Return the error for content from `source`."""
        what = str(reason).removesuffix(".")
        return self.error(f"'{source}' is not {self.name} of this version: {what}. {self.remedy}")


# --- reading ---------------------------------------------------------------------------------


def read_bounded(path: str | Path, largest: int) -> bytes:
    """Read a whole file of at most `largest` bytes; a pipe without a writer is empty.

    Raises: InvalidContentError if the file is larger; OSError.
    """
    try:
        descriptor = os.open(expand_path(path), os.O_RDONLY | os.O_NONBLOCK)
    except RunError as error:
        raise InvalidContentError(f"its path is invalid ({error})") from error
    os.set_blocking(descriptor, True)
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise InvalidContentError(f"it is larger than {_size(largest)}, the maximum")
    return data


def decompressed(data: bytes, largest: int) -> bytes:
    """Decompress gzipped data of at most `largest` bytes; return other data unchanged.

    Raises: InvalidContentError if the data is damaged or larger.
    """
    if not data.startswith(_GZIP):
        return data
    stream = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        found = stream.decompress(data, largest + 1)
    except zlib.error as error:
        raise InvalidContentError(f"its compressed data is damaged ({error})") from error
    if len(found) > largest:
        raise InvalidContentError(f"it is larger than {_size(largest)} decompressed, the maximum")
    if not stream.eof or stream.unused_data:
        raise InvalidContentError("its compressed data is incomplete or has additional data")
    return found


def parse_json(data: bytes | bytearray | str, largest: int, *, foreign: bool = False) -> Any:  # noqa: ANN401
    """Parse JSON of at most `largest` bytes; strictly, or as Python's json module does.

    Raises: InvalidContentError.

    >>> parse_json('{"a": [1, 2.5, null]}', 100)
    {'a': [1, 2.5, None]}
    """
    if len(data) > largest:
        raise InvalidContentError(f"it is larger than {_size(largest)}, the maximum")
    try:
        text = data if isinstance(data, str) else data.decode()
        return json.loads(
            text,
            object_pairs_hook=dict if foreign else _unique,
            parse_constant=float if foreign else _refuse_constant,
            parse_float=float if foreign else _finite,
            parse_int=_integer,
        )
    except InvalidContentError:
        raise
    except UnicodeDecodeError as error:
        raise InvalidContentError(f"byte {error.start} is not valid UTF-8") from error
    except RecursionError as error:
        raise InvalidContentError("its values are nested too deeply") from error
    except ValueError as error:
        raise InvalidContentError(f"it is not valid JSON ({error})") from error


def parse_yaml(data: bytes | str, largest: int) -> Any:  # noqa: ANN401 (JSON values)
    """Parse YAML without anchors, tags and duplicate keys as the JSON values that it stands for.

    Raises: InvalidContentError.
    """
    if len(data) > largest:
        raise InvalidContentError(f"it is larger than {_size(largest)}, the maximum")
    try:
        content = yaml.load(data, Loader=_PlainLoader)  # noqa: S506 (a SafeLoader)
        return parse_json(_JSON.dump_json(content), 8 * largest)
    except InvalidContentError:
        raise
    except RecursionError as error:
        raise InvalidContentError("its values are nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InvalidContentError(
            f"it is not valid YAML: {' '.join(str(error).split())}"
        ) from error


class _PlainLoader(yaml.SafeLoader):  # type: ignore[misc]
    """Loads YAML that is a tree: no aliases, which can grow exponentially, and unique keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:  # noqa: ANN401 (yaml's nodes)
        if self.check_event(yaml.AliasEvent):
            raise InvalidContentError("it uses YAML aliases, which are not supported")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:  # noqa: ANN401
        found: dict[Any, Any] = super().construct_mapping(node, deep=True)
        if len(found) != len(node.value):
            keys = [key.value for key, _ in node.value]
            raise InvalidContentError(f"it has the key {_duplicate(keys)} twice")
        return found


def _refuse_constant(name: str) -> float:
    raise InvalidContentError(f"it contains {name}; expected finite numbers")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise InvalidContentError(f"it contains {text[:30]}, which is not a finite number")
    return value


def _integer(text: str) -> int:
    if len(text) > _LONGEST_INTEGER:
        raise InvalidContentError(
            f"it contains an integer of {len(text)} digits; the maximum is {_LONGEST_INTEGER}"
        )
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InvalidContentError(f"it has the key {_duplicate([k for k, _ in pairs])} twice")
    return found


def _duplicate(keys: list[Any]) -> str:
    seen = set[Any]()
    twice = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return reprlib.repr(twice)


def _size(nbytes: int) -> str:
    return f"{nbytes // MEGABYTE} MiB" if nbytes >= MEGABYTE else f"{nbytes // 1024} KiB"


def versioned(content: Any, form: str, versions: Sequence[int]) -> tuple[int, dict[str, Any]]:  # noqa: ANN401
    """Split content into its version and its fields, without the mark of its format.

    Raises: InvalidContentError for another format or version.

    >>> versioned({"format": "ipmerge-plan", "version": 1, "name": "a"}, "ipmerge-plan", [1])
    (1, {'name': 'a'})
    """
    if not isinstance(content, dict):
        raise InvalidContentError(f"its content is {reprlib.repr(content)}; expected an object")
    found, version = content.get("format"), content.get("version")
    if found != form or type(version) is not int or version not in versions:
        expected = " or ".join(str(each) for each in versions)
        raise InvalidContentError(
            f"it has format {reprlib.repr(found)} and version {reprlib.repr(version)}; expected "
            f"'{form}' and {expected}"
        )
    return version, {k: v for k, v in content.items() if k not in ("format", "version")}


def requiring(*keys: str) -> AfterValidator:
    """Return the annotation of a mapping that has these keys."""

    def check(value: Mapping[str, Any]) -> Mapping[str, Any]:
        missing = [key for key in keys if key not in value]
        if missing:
            raise ValueError(f"it has no '{missing[0]}'")
        return value

    return AfterValidator(check)


# --- messages --------------------------------------------------------------------------------

_LONG_NUMBER = re.compile(r"[0-9]{20,}")
_SUBJECTS = {"missing": "is missing", "missing_argument": "is missing"}
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument", "unexpected_positional_argument")


def _describe(error: Any, content: Any) -> str:  # noqa: ANN401 (pydantic's, and JSON values)
    """Describe the first violation: the field, its value and what was expected."""
    kind, place = error["type"], _place(error["loc"], content, error["type"])
    if kind in _SUBJECTS:
        return f"{place} {_SUBJECTS[kind]}"
    if kind in _UNKNOWN:
        return f"{place} is not a known field"
    message = _LONG_NUMBER.sub(lambda found: f"{float(found[0]):g}", error["msg"])
    value = reprlib.repr(error["input"])
    if message.startswith("Input should be "):
        return f"{place} is {value}; expected {message.removeprefix('Input should be ')[:200]}"
    return f"{place} is {value}: {message.removeprefix('Value error, ')[:200]}"


def one_line(value: object) -> str:
    r"""Format a value of a file for a message: as it is if it is short and printable.

    >>> one_line("silu"), one_line(2), one_line("a\nb")
    ('silu', '2', "'a\\nb'")
    """
    text = str(value) if isinstance(value, str | int | float) else reprlib.repr(value)
    return text if text.isprintable() and len(text) <= _LONGEST_KEY else reprlib.repr(value)


def _place(location: tuple[int | str, ...], content: Any, kind: str) -> str:  # noqa: ANN401
    """Format the path to a value, without the names of the types on the way.

    >>> _place(("records", 0, "float", "rho"), {"records": [{"rho": 1}]}, "")
    "'records[0].rho'"
    """
    parts = list[str]()
    for number, part in enumerate(location):
        is_last = number == len(location) - 1
        items = dict(enumerate(content)) if isinstance(content, list) else content
        if isinstance(items, Mapping) and part in items:
            content = items[part]
        elif not (is_last and kind in _SUBJECTS):
            continue
        parts.append(f"[{part}]" if isinstance(part, int) else f".{one_line(part)}")
    return f"'{''.join(parts).removeprefix('.')}'" if parts else "its content"
