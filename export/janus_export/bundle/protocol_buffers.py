"""Reads protocol buffers (nested, numbered fields, as in ONNX files) without the protobuf package.

A reader follows the fields that it knows and skips the others. Data that is not a protocol buffer, or is
truncated, raises an IndexError.
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types


def fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the number and content of a message's length-delimited fields."""
    return ((number, content) for number, content in _parsed(message) if isinstance(content, memoryview))


def messages(message: memoryview, field_number: int) -> Iterator[memoryview]:
    """Yield the contents of the length-delimited fields with this number."""
    return (content for number, content in fields(message) if number == field_number)


def texts(message: memoryview, field_number: int) -> list[str]:
    """Return the contents of the fields with this number, as text."""
    return [str(content, "utf-8") for content in messages(message, field_number)]


def integers(message: memoryview, field_number: int) -> list[int]:
    """Return the integers in the fields with this number."""
    return [value for number, value in _parsed(message) if number == field_number and isinstance(value, int)]


def _parsed(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    offset = 0
    while offset < len(message):
        key, offset = _varint(message, offset)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, offset = _varint(message, offset)
            yield number, value
        elif wire == BYTES:
            length, offset = _varint(message, offset)
            if offset + length > len(message):
                raise IndexError
            yield number, message[offset : offset + length]
            offset += length
        elif wire in (FIXED64, FIXED32):
            offset += 8 if wire == FIXED64 else 4
        else:
            raise IndexError


def _varint(message: memoryview, offset: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset
        shift += 7
