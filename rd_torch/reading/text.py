"""Files, pipes and standard input as text, unpacked and decoded by what is in them."""

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
"""Bytes that are looked at to tell what a file is."""

PARQUET: Final = b"PAR1"

BROKEN: Final = (lzma.LZMAError, EOFError, gzip.BadGzipFile, zlib.error, OSError, UnicodeError)
"""What unpacking and decoding raise for a file that is broken or cut off."""


def _unpack_zstd(packed: IO[bytes]) -> IO[bytes]:
    """The bytes in a zstd stream, of several frames too."""
    import pyarrow as pa  # loads only for such a file

    return cast(IO[bytes], pa.CompressedInputStream(pa.PythonFile(packed, mode="r"), "zstd"))


_PACKED: Final[tuple[tuple[bytes, Callable[[Any], Any]], ...]] = (
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
_BYTE_ORDER_MARKS: Final = (
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
)


class _Rejoined(io.RawIOBase):
    """A stream whose beginning was read already, and comes again."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """The next bytes, of the beginning first."""
        part = self._head[: len(buffer)] or self._rest.read(len(buffer))
        self._head = self._head[len(part) :]
        buffer[: len(part)] = part
        return len(part)


def is_read_once(source: str | Path) -> bool:
    """Whether a source is standard input or a pipe, which nobody can read a second time."""
    if str(source) == STANDARD_INPUT:
        return True
    mode = Path(source).stat().st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)


class Opened:
    """A source that is open: its bytes unpacked, and how far it has been read.

    Attributes:
        name: what it is called in messages.
        head: its first bytes, unpacked.
        body: all of its bytes, unpacked, the first ones too.
        is_packed: whether they were packed.
        records: how many records have been read of it, which its reader counts.
    """

    def __init__(self, name: str, raw: IO[bytes], stack: ExitStack) -> None:
        self.name = name
        self.is_packed = False
        self.records = 0
        self._raw = raw
        body: IO[bytes] = raw
        while True:
            self.head = body.read(HEAD)
            body = cast(IO[bytes], io.BufferedReader(_Rejoined(self.head, body)))
            unpack = next((unpack for mark, unpack in _PACKED if self.head.startswith(mark)), None)
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
        """Bytes of the packed source that have been read."""
        return self._raw.tell()

    @property
    def is_parquet(self) -> bool:
        """Whether it is a Parquet file."""
        return self.head.startswith(PARQUET)

    @property
    def encoding(self) -> str:
        """UTF-8, or what its byte order mark says."""
        return next((name for mark, name in _BYTE_ORDER_MARKS if self.head.startswith(mark)), "utf-8")

    def beginning(self) -> str:
        """The text of its first bytes."""
        return self.head.decode(self.encoding, errors="replace")

    def text(self, newline: str | None = None) -> IO[str]:
        """Its text. Bytes that are not UTF-8 come as surrogates, so that one of them ends nothing."""
        how = "surrogateescape" if self.encoding.startswith("utf-8") else "strict"
        return io.TextIOWrapper(cast(Any, self.body), encoding=self.encoding, errors=how, newline=newline)


@contextmanager
def opened(source: str | Path) -> Iterator[Opened]:
    """Opens a file, a pipe or `-` for standard input.

    Gzip, xz, bzip2 and zstd are told by their first bytes, not by the name, and one inside the other too.

    Raises:
        ValueError: for a file of a kind that holds no sequences, or one that is broken or cut off, then or
            while it is read.
    """
    name = "standard input" if str(source) == STANDARD_INPUT else str(source)
    with ExitStack() as stack:
        raw: IO[bytes] = (
            sys.stdin.buffer
            if str(source) == STANDARD_INPUT
            else stack.enter_context(Path(source).open("rb"))
        )
        file: Opened | None = None
        try:
            file = Opened(name, raw, stack)
            yield file
        except BROKEN as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # what the system says of the file itself
            count = file.records if file else 0
            raise ValueError(
                f"expected a file of sequences, got one that is broken or cut off behind record {count:,}: "
                f"{name}: {error}"
            ) from error


def as_latin_1(text: str) -> str:
    """A text in which bytes that are no UTF-8 are read as Latin-1: headers of old files are."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogateescape").decode("latin-1")
    return text
