"""Inputs that go wrong: changes to valid ones, and odd texts, numbers and values.

All take the generator they draw from first.
"""

import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

_ODD_TEXTS = (
    ("", " ", "\0", "\n", "\r\n", "\t", "\x1b[31m", "\x7f", "\x85", "\u2028", "\ufeff", "\ufffe")
    + ("é", "e\u0301", "日本", "\u202eabc", "\U0001f600", "\udc80", "\ud800", "²", "٣", "½")
    + ("null", "~", "none", "true", "no", "off", "nan", "inf", "-inf", "1e400", "-0", "0x10", "0o7")
    + ("1_000", "1e5", "12:30:45", "2024-01-01", "..", ".", "/", "/dev/null", "a/../b", "C:\\x")
    + ("=1+1", "$\\frac{$", "{}", "[]", "%s", "{0}", "'", '"', "\\", "#", "&a", "*a", "<<", "!!x")
    + ("!!python/object/apply:os.getcwd []", "auto", "file:///etc/passwd", "https://[", "s3://")
)
_ODD_NUMBERS: tuple[Any, ...] = (
    (0, -0.0, 1, -1, 2, 255, 256, 2**31 - 1, 2**31, 2**32, -(2**31) - 1, 2**53 + 1)
    + (2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**30, -(10**30), 10**400)
    + (0.5, -0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf"))
)
_BYTES = (
    b"\0",
    b"\xff",
    b"\n",
    b"\r",
    b"\x1a",
    b"\x80",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"PK\x03\x04",
)


def odd_text(rng: random.Random) -> str:
    """A text that readers don't expect: an odd word, a few of them, or a long one."""
    chance = rng.random()
    if chance < 0.6:
        return rng.choice(_ODD_TEXTS)
    if chance < 0.8:
        return "".join(rng.choice(_ODD_TEXTS) for _ in range(rng.randrange(2, 6)))
    if chance < 0.9:
        return "".join(chr(rng.randrange(0x20, 0x250)) for _ in range(rng.randrange(1, 12)))
    if chance < 0.95:
        return rng.choice(("9", "a", "é", " ", "(", "[", "-", "/")) * rng.choice((50, 300, 5000))
    return str(odd_number(rng)) if chance < 0.99 else "9" * 10**5


def odd_number(rng: random.Random) -> int | float:
    """Small and huge whole numbers, and all kinds of floats."""
    return rng.choice(_ODD_NUMBERS) if rng.random() < 0.8 else rng.randrange(-1000, 1000)


def odd_value(rng: random.Random, depth: int = 3) -> Any:
    """A value of any type that JSON, YAML or a checkpoint may hold, nested up to ``depth``."""
    kind = rng.randrange(10 if depth else 6)
    if kind < 2:
        return odd_text(rng)
    if kind < 4:
        return odd_number(rng)
    if kind < 6:
        return rng.choice((None, True, False))
    if kind < 8:
        return [odd_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {odd_text(rng): odd_value(rng, depth - 1) for _ in range(rng.randrange(4))}


def changed(rng: random.Random, value: Any, odd: Callable[[random.Random], Any] = odd_value) -> Any:
    """A copy of nested lists and dictionaries in which one place is another value, or missing."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        rest = {k: v for k, v in value.items() if k != key}
        chance = rng.random()
        if chance < 0.1:
            return rest
        if chance < 0.2:
            return {**rest, odd_text(rng): value[key]}
        return {**value, key: changed(rng, value[key], odd)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        chance = rng.random()
        if chance < 0.1:
            return value[:place] + value[place + 1 :]
        if chance < 0.2:
            return value[:place] + [value[place]] * rng.choice((2, 3, 100)) + value[place + 1 :]
        return [*value[:place], changed(rng, value[place], odd), *value[place + 1 :]]
    return odd(rng)


def mutated(rng: random.Random, seeds: Sequence[bytes], most: int = 4) -> bytes:
    """One of the valid ``seeds`` after one to ``most`` changes; sometimes as it is."""
    content = rng.choice(seeds)
    for _ in range(rng.randrange(most + 1)):
        content = rng.choice(_BYTE_CHANGES)(rng, content, seeds)
    return content


def mutated_text(rng: random.Random, seeds: Sequence[str], most: int = 4) -> str:
    """As :func:`mutated`, of text, which stays Unicode (lone surrogates may come)."""
    text = rng.choice(seeds)
    for _ in range(rng.randrange(most + 1)):
        text = rng.choice(_TEXT_CHANGES)(rng, text, seeds)
    return text


def mutated_file(rng: random.Random, seeds: Sequence[str], share: float) -> bytes:
    """A changed text file; a ``share`` of them is changed as bytes."""
    if rng.random() < share:
        return mutated(rng, [text.encode() for text in seeds])
    return mutated_text(rng, seeds).encode("utf-8", "surrogatepass")


# --- changes to bytes -----------------------------------------------------------------------------


def _place(rng: random.Random, content: Sequence[Any]) -> int:
    # Headers are short and lie at either end.
    size = len(content)
    chance = rng.random()
    if chance < 0.4:
        return rng.randrange(min(size, 64) + 1)
    return size - rng.randrange(min(size, 128) + 1) if chance < 0.6 else rng.randrange(size + 1)


def _flip(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    if not content:
        return content
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 8))):
        found[min(_place(rng, found), len(found) - 1)] ^= 1 << rng.randrange(8)
    return bytes(found)


def _cut(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    place = _place(rng, content)
    return rng.choice((content[:place], content[place:]))


def _without(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    place = _place(rng, content)
    return content[:place] + content[place + rng.choice((1, 2, 4, 16, 512)) :]


def _spliced(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    other = rng.choice(seeds)
    return content[: _place(rng, content)] + other[_place(rng, other) :]


def _inserted(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    place = _place(rng, content)
    block = rng.choice((*_BYTES, rng.randbytes(rng.choice((1, 4, 64)))))
    return content[:place] + block * rng.choice((1, 1, 4, 300)) + content[place:]


def _repeated(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    place, size = _place(rng, content), rng.choice((1, 4, 30, 512))
    block = content[place : place + size]
    return content[:place] + block * rng.choice((2, 3, 100)) + content[place + size :]


def _number(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    """A size, count or offset that is another one."""
    code = rng.choice(("B", "<H", ">H", "<I", ">I", "<Q", ">Q"))
    most = 256 ** struct.calcsize(code) - 1
    value = rng.choice((0, 1, most, most // 2, most // 2 + 1, most - 1, rng.randrange(most + 1)))
    place = _place(rng, content)
    packed = struct.pack(code, value)
    return content[:place] + packed + content[place + len(packed) :]


_BYTE_CHANGES = (_flip, _cut, _without, _spliced, _inserted, _repeated, _number, _number)


# --- changes to text ------------------------------------------------------------------------------


def _cut_text(rng: random.Random, text: str, seeds: Sequence[str]) -> str:
    place = rng.randrange(len(text) + 1)
    return rng.choice((text[:place], text[place:]))


def _odd_inserted(rng: random.Random, text: str, seeds: Sequence[str]) -> str:
    place = rng.randrange(len(text) + 1)
    return text[:place] + odd_text(rng) + text[place:]


def _word_replaced(rng: random.Random, text: str, seeds: Sequence[str]) -> str:
    """What stands between two separators is another word."""
    begins = [0, *(i + 1 for i, char in enumerate(text) if char in " ,;\t\n:|/[]{}\"'")]
    begin = rng.choice(begins)
    end = next((i for i in range(begin, len(text)) if text[i] in " ,;\t\n:|/[]{}\"'"), len(text))
    return text[:begin] + odd_text(rng) + text[end:]


def _line_again(rng: random.Random, text: str, seeds: Sequence[str]) -> str:
    lines = text.split("\n")
    place = rng.randrange(len(lines))
    count = rng.choice((0, 2, 2, 50))
    return "\n".join([*lines[:place], *[lines[place]] * count, *lines[place + 1 :]])


def _line_of_another(rng: random.Random, text: str, seeds: Sequence[str]) -> str:
    lines, others = text.split("\n"), rng.choice(seeds).split("\n")
    lines.insert(rng.randrange(len(lines) + 1), rng.choice(others))
    return "\n".join(lines)


def _char_removed(rng: random.Random, text: str, seeds: Sequence[str]) -> str:
    place = rng.randrange(len(text) + 1)
    return text[:place] + text[place + 1 :]


_TEXT_CHANGES = (_cut_text, _odd_inserted, _word_replaced, _word_replaced, _line_again)
_TEXT_CHANGES += (_line_of_another, _char_removed)
