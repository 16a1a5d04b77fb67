"""Open files, pipes and standard input, and unpack and decode them by what is in them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Final, cast

STANDARD_INPUT: Final = "-"

HEAD: Final = 4096
"""Number of bytes that are read to tell what a file is."""

PARQUET: Final = b"PAR1"

BROKEN: Final = (lzma.LZMAError, EOFError, gzip.BadGzipFile, zlib.error, OSError, UnicodeError)
"""Errors that unpacking and decoding raise for a file that is broken or cut off."""


def _unpack_zstd(packed: IO[bytes]) -> IO[bytes]:
    """Unpack a zstd stream, also one of several frames."""
    import pyarrow as pa  # here, because it takes long to load and few files need it

    return cast(IO[bytes], pa.CompressedInputStream(pa.PythonFile(packed, mode="r"), "zstd"))


_UNPACKERS: Final[tuple[tuple[bytes, Callable[[Any], Any]], ...]] = (
    (b"\x1f\x8b", lambda packed: gzip.GzipFile(fileobj=packed)),
    (b"\xfd7zXZ\x00", lzma.LZMAFile),
    (b"BZh", bz2.BZ2File),
    (b"\x28\xb5\x2f\xfd", _unpack_zstd),
)
_REFUSED: Final = (
    (b"PK\x03\x04", "a ZIP archive or an Excel workbook: unpack it, or save the sheet as CSV"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file: rd-torch combine and open_store read embeddings"),
    (b"%PDF", "a PDF document"),
    (b"<!DOCTYPE", "an HTML page: what was downloaded is no sequence file"),
    (b"<html", "an HTML page: what was downloaded is no sequence file"),
    (b"&gt;", "FASTA as it stands in the source of a web page, with '&gt;' for '>'"),
)
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_BYTE_ORDER_MARKS: Final = (
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
)


class _Rejoined(io.RawIOBase):
    """A stream whose beginning, which was read already, is read once more.

    A pipe cannot be set back to its start.
    """

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with the next bytes, with those of the beginning first."""
        part = self._head[: len(buffer)] or self._rest.read(len(buffer))
        self._head = self._head[len(part) :]
        buffer[: len(part)] = part
        return len(part)


def is_read_once(source: str | Path) -> bool:
    """Tell whether a source is standard input or a pipe, which nobody can read a second time."""
    if str(source) == STANDARD_INPUT:
        return True
    mode = Path(source).stat().st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)


class OpenFile:
    """A file, pipe or standard input that is open and is unpacked as it is read.

    Attributes:
        name: name of the source in messages.
        head: the first bytes, unpacked.
        body: all bytes, unpacked, the first ones included.
        is_packed: whether the source was packed.
        records: number of records that have been read; whoever reads them counts.
    """

    def __init__(self, name: str, raw: IO[bytes], stack: ExitStack) -> None:
        self.name = name
        self.is_packed = False
        self.records = 0
        self._raw = raw
        body: IO[bytes] = raw
        while True:  # one pass for each way in which the source is packed
            self.head = body.read(HEAD)
            body = cast(IO[bytes], io.BufferedReader(_Rejoined(self.head, body)))
            unpack = next((unpack for mark, unpack in _UNPACKERS if self.head.startswith(mark)), None)
            if unpack is None:
                break
            body = stack.enter_context(unpack(body))
            self.is_packed = True
        self.body = body
        for mark, what in _REFUSED:
            if self.head.lstrip().lower().startswith(mark.lower()):
                raise ValueError(f"expected a file of sequences, got {what}: {name}")

    @property
    def position(self) -> int:
        """The number of bytes of the packed source that have been read."""
        return self._raw.tell()

    @property
    def is_parquet(self) -> bool:
        """Whether the source is a Parquet file."""
        return self.head.startswith(PARQUET)

    @property
    def encoding(self) -> str:
        """The encoding that the byte order mark says; without a mark, UTF-8."""
        return next((name for mark, name in _BYTE_ORDER_MARKS if self.head.startswith(mark)), "utf-8")

    def beginning(self) -> str:
        """Return the text of the first bytes."""
        return self.head.decode(self.encoding, errors="replace")

    def text(self, newline: str | None = None) -> IO[str]:
        """Return the text, to be read line by line.

        Bytes that are not UTF-8 become surrogates: one such byte, as in headers in Latin-1, is no reason to
        stop.

        Args:
            newline: which line breaks are translated, as for `open`.

        Returns:
            The text.
        """
        how = "surrogateescape" if self.encoding.startswith("utf-8") else "strict"
        return io.TextIOWrapper(cast(Any, self.body), encoding=self.encoding, errors=how, newline=newline)


@contextmanager
def open_source(source: str | Path) -> Iterator[OpenFile]:
    """Open a file or pipe, or standard input for `-`.

    Gzip, xz, bzip2 and zstd are told by their first bytes, not by the name, also where one is inside another.

    Args:
        source: the file or pipe, or `-`.

    Yields:
        The open file.

    Raises:
        ValueError: at once or while it is read, for a file that is broken or cut off, or of a kind that holds
            no sequences.
    """
    name = "standard input" if str(source) == STANDARD_INPUT else str(source)
    with ExitStack() as stack:
        raw: IO[bytes] = (
            sys.stdin.buffer
            if str(source) == STANDARD_INPUT
            else stack.enter_context(Path(source).open("rb"))
        )
        file: OpenFile | None = None
        try:
            file = OpenFile(name, raw, stack)
            yield file
        except BROKEN as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the system says what is wrong: a missing right, a disk that fails
            count = file.records if file else 0
            raise ValueError(
                f"expected a file of sequences, got one that is broken or cut off after record {count:,}: "
                f"{name}: {error}"
            ) from error


def as_latin_1(text: str) -> str:
    """Decode a text again as Latin-1, if it has bytes that are no UTF-8; headers of old files have them.

    Args:
        text: a text in which such bytes are surrogates.

    Returns:
        The text without surrogates.
    """
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogateescape").decode("latin-1")
    return text
