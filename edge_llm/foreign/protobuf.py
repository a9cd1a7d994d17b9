"""Protocol Buffers' wire format, read strictly and without copying what nobody asks for.

Source: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator

from edge_llm.errors import IntegrityError

__all__ = ["Message", "Reader"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}

# A graph of 10,000 nodes has some 200,000 fields; a file of nothing but fields would take minutes.
MOST_FIELDS = 1_000_000
DEEPEST = 32


class Reader:
    """Reads messages of one file, and no more of them than a model can have.

    Args:
        label: What the errors call the file.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._fields = 0

    def message(self, data: memoryview, depth: int = 0) -> Message:
        """Read a message's own fields; those inside them are read when they are asked for.

        Raises:
            IntegrityError: It is no message, or one of too many or too deep ones.
        """
        if depth > DEEPEST:
            raise self.error(f"its messages are nested deeper than {DEEPEST}")
        fields: dict[int, list[tuple[int, int | memoryview]]] = {}
        position = 0
        while position < len(data):
            key, position = self._varint(data, position)
            number, wire = key >> 3, key & 7
            value: int | memoryview
            if wire == _VARINT:
                value, position = self._varint(data, position)
            elif wire == _BYTES:
                size, position = self._varint(data, position)
                value, position = data[position : position + size], position + size
            elif wire in _FIXED:
                size = _FIXED[wire]
                value, position = data[position : position + size], position + size
            else:
                raise self.error(f"wire type {wire}")
            if number == 0 or position > len(data):
                raise self.error("a field reaches beyond its end" if number else "field number 0")
            fields.setdefault(number, []).append((wire, value))
            self._fields += 1
            if self._fields > MOST_FIELDS:
                raise self.error(f"it has more than {MOST_FIELDS} fields")
        return Message(self, fields, depth)

    def error(self, what: str) -> IntegrityError:
        """The error that says what is wrong."""
        return IntegrityError(
            f"{self._label} is not an ONNX file: {what}.", "Download or export it again."
        )

    def _varint(self, data: memoryview, position: int) -> tuple[int, int]:
        """An unsigned integer and the position behind it."""
        try:
            if (value := data[position]) < 0x80:  # nearly all are this short
                return value, position + 1
            value = 0
            for shift in range(0, 70, 7):
                byte = data[position]
                position += 1
                value |= (byte & 0x7F) << shift
                if byte < 0x80:
                    return value, position
        except IndexError:
            raise self.error("it ends in the middle of a number") from None
        raise self.error("a number has more than 64 bits")


class Message:
    """A message's fields by number.

    Asking for a field of another type is an error, and so is one that is there twice where the
    schema has a single value: readers differ in which of the two they take.
    """

    __slots__ = ("_depth", "_fields", "_reader")

    def __init__(
        self, reader: Reader, fields: dict[int, list[tuple[int, int | memoryview]]], depth: int
    ) -> None:
        self._reader = reader
        self._fields = fields
        self._depth = depth

    def __contains__(self, number: int) -> bool:
        return number in self._fields

    def integer(self, number: int, default: int = 0) -> int:
        """A signed 64-bit integer."""
        values = self.integers(number)
        if len(values) > 1:
            raise self._reader.error(f"field {number} is there twice")
        return values[0] if values else default

    def integers(self, number: int) -> list[int]:
        """Signed 64-bit integers, packed or one by one."""
        values: list[int] = []
        for wire, value in self._fields.get(number, ()):
            if isinstance(value, int):
                values.append(_signed(value))
            elif wire == _BYTES:
                position = 0
                while position < len(value):
                    one, position = self._reader._varint(value, position)
                    values.append(_signed(one))
            else:
                raise self._wrong(number)
        return values

    def text(self, number: int) -> str:
        """A string; empty where there is none."""
        return next(iter(self.texts(number, most=1)), "")

    def texts(self, number: int, *, most: int | None = None) -> list[str]:
        """Strings."""
        try:
            return [str(data, "utf-8") for data in self._data(number, most)]
        except UnicodeDecodeError as error:
            raise self._reader.error(f"field {number} is not UTF-8") from error

    def message(self, number: int) -> Message | None:
        """A message inside this one."""
        return next(self.messages(number, most=1), None)

    def messages(self, number: int, *, most: int | None = None) -> Iterator[Message]:
        """Messages inside this one."""
        for data in self._data(number, most):
            yield self._reader.message(data, self._depth + 1)

    def size(self, number: int) -> int | None:
        """Bytes of a field of bytes; None where there is none."""
        return next((len(data) for data in self._data(number, 1)), None)

    def room(self, number: int, width: int) -> int:
        """Most values of ``width`` bytes (1: of varying width) that a repeated field can hold."""
        return sum(
            len(value) // width if isinstance(value, memoryview) else 1
            for _, value in self._fields.get(number, ())
        )

    def count(self, number: int) -> int:
        """How often a field is there."""
        return len(self._fields.get(number, ()))

    def error(self, what: str) -> IntegrityError:
        """The error that says what is wrong in this message."""
        return self._reader.error(what)

    def _data(self, number: int, most: int | None) -> Iterator[memoryview]:
        found = self._fields.get(number, ())
        if most is not None and len(found) > most:
            raise self._reader.error(f"field {number} is there twice")
        for wire, value in found:
            if wire != _BYTES or isinstance(value, int):
                raise self._wrong(number)
            yield value

    def _wrong(self, number: int) -> IntegrityError:
        return self._reader.error(f"field {number} is of another type")


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
