"""Files in the body of a form, multipart/form-data (RFC 7578)."""

import re
from collections.abc import Iterator

from tools.serve.images import RefusedError

MOST_FIELDS = 16  # beside the files; they are ignored
MOST_HEADERS = 8192  # bytes of a part's
BOUNDARY = 70  # characters at most (RFC 2046, section 5.1.1)

# A parameter's value: in quotes, where a backslash may precede any character, or a token.
_VALUE = r'"((?:[^"\\]|\\.)*)"|([^\s;"]+)'
_PARAMETER = r"(?:^|;)\s*{name}\s*=\s*(?:" + _VALUE + ")"


def files_of(body: bytes | bytearray, content_type: str, most: int) -> list[tuple[str, memoryview]]:
    """(name, content) of each file; a part is a file if it has a file name.

    Names are UTF-8, else Latin-1: what a client says of charsets is not used.

    Args:
        body: the whole of it; the contents are parts of its memory.
        content_type: the header, with the boundary.
        most: files that there may be.

    Raises:
        RefusedError: 400.
    """
    boundary = _parameter(content_type, "boundary")
    if boundary is None or not 0 < len(boundary) <= BOUNDARY:
        raise RefusedError(400, f"the form has no boundary of 1 to {BOUNDARY} characters")
    view = memoryview(body)
    found = []
    mark = b"--" + boundary.encode("latin-1", "replace")
    for number, (headers, start, end) in enumerate(_parts(body, mark)):
        name = _file_name(headers)
        if name is not None:
            found.append((name, view[start:end]))
        if len(found) > most or number - len(found) >= MOST_FIELDS:
            raise RefusedError(400, f"a form may hold {most} files and {MOST_FIELDS} other fields")
    return found


def _parts(body: bytes | bytearray, mark: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Headers, and first and last place of the content, of each part that ``mark`` begins."""
    place = 0 if body.startswith(mark) else body.find(b"\r\n" + mark) + 2
    if place == 1:
        raise RefusedError(400, "the form does not begin with its boundary")
    while True:
        place += len(mark)
        if body.startswith(b"--", place):
            return
        if not body.startswith(b"\r\n", place):
            raise RefusedError(400, "the form has a broken boundary")
        # From the end of the boundary's line: there may be no headers.
        head = body.find(b"\r\n\r\n", place, place + MOST_HEADERS)
        if head < 0:
            raise RefusedError(400, "the form has a part without an end of its headers")
        end = body.find(b"\r\n" + mark, head + 4)
        if end < 0:
            raise RefusedError(400, "the form ends early")
        yield bytes(body[place:head]), head + 4, end
        place = end + 2


def _file_name(headers: bytes) -> str | None:
    """As the header Content-Disposition gives it; None: the part is no file."""
    for line in headers.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-disposition":
            return _parameter(_text(value), "filename")
    return None


def _text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _parameter(header: str, name: str) -> str | None:
    """The value of a parameter ``; name=value`` of a header; None without one."""
    found = re.search(_PARAMETER.format(name=name), header, re.I | re.S)
    if found is None:
        return None
    quoted, token = found.groups()
    # Browsers write quotes as %22 (WHATWG HTML, multipart/form-data), curl with a backslash.
    return token if quoted is None else re.sub(r'\\(["\\])', r"\1", quoted).replace("%22", '"')
