"""Write unicode_tables.cpp: what the `tokenizers` package knows of each character.

Its parts have Unicode of different years: Oniguruma's letters, Rust's lower case, a normalizer's
compositions. A library of the system would differ from each. So the package itself is asked, for
every character; only the names of grapheme classes come from the `regex` package, and those are
held against what the package does. Run it again where the tests say that a newer `tokenizers` gives
other ids: `python make_unicode_tables.py` prints engines/cpp/src/text/unicode_tables.cpp.
"""

from __future__ import annotations

import struct
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping

import regex  # type: ignore[import-untyped]
import tokenizers
from tokenizers import Regex, normalizers

CHARACTERS = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
HANGUL = range(0xAC00, 0xD7A4)
MARK, ZWJ, LETTER = "\u0301", "\u200d", "a"


def main() -> None:
    version = tokenizers.__version__
    print(f"// Written by tests/engines/cpp/make_unicode_tables.py from tokenizers {version}.")
    print("// clang-format off")
    print('#include "text/unicode_tables.hpp"\n\nnamespace fluxdeploy::unicode {\n')
    table("CharRange", "kLetters", ranges(remaining(r"[^\p{L}]")))
    table("CharRange", "kNumbers", ranges(remaining(r"[^\p{N}]")))
    table("CharRange", "kSpaces", ranges(remaining(r"[^\s]")))
    table("LowercaseRun", "kLowercase", lowercase_runs())
    decompositions = canonical_decompositions()
    table("Decomposition", "kDecompositions", decompositions)
    table("Composition", "kCompositions", compositions(decompositions))
    table("ClassRange", "kCombining", ranges_of(combining_classes()))
    table("ClassRange", "kGraphemes", ranges_of(grapheme_classes()))
    print("}  // namespace fluxdeploy::unicode")


def table(kind: str, name: str, rows: Iterable[tuple[int, ...]]) -> None:
    """A C++ array and its size, several rows a line."""
    texts = ["{" + ", ".join(shown(value) for value in row) + "}" for row in rows]
    print(f"const {kind} {name}[] = {{")
    line = "   "
    for text in texts:
        if len(line) + len(text) + 2 > 100:
            print(line)
            line = "   "
        line += f" {text},"
    print(f"{line}\n}};\nconst std::size_t {name}Size = {len(texts)};\n")


def shown(value: int) -> str:
    return f"0x{value:X}" if value > 9 else str(value)


def ranges(codes: Iterable[int]) -> Iterator[tuple[int, int]]:
    for first, last, _ in ranges_of(dict.fromkeys(codes, 0)):
        yield first, last


def ranges_of(values: Mapping[int, int]) -> Iterator[tuple[int, int, int]]:
    """(first, last, value) of neighbours with equal values."""
    run: tuple[int, int, int] | None = None
    for code in sorted(values):
        if run is not None and run[1] == code - 1 and run[2] == values[code]:
            run = (run[0], code, run[2])
            continue
        if run is not None:
            yield run
        run = (code, code, values[code])
    if run is not None:
        yield run


def remaining(pattern: str) -> set[int]:
    """The characters that are left when those of a pattern are removed."""
    remove = normalizers.Replace(Regex(pattern), "")
    texts = ("".join(map(chr, CHARACTERS[i : i + 4096])) for i in range(0, len(CHARACTERS), 4096))
    return {ord(left) for text in texts for left in remove.normalize_str(text)}


def lowercase_runs() -> Iterator[tuple[int, int, int, int]]:
    """(first, last, step, lower case of the first); step 0 where it is followed by U+0307."""
    lower = normalizers.Lowercase()
    changed = {code: lower.normalize_str(chr(code)) for code in CHARACTERS}
    pairs = [(code, text) for code, text in changed.items() if text != chr(code)]
    run: tuple[int, int, int, int] | None = None
    for code, text in pairs:
        target, gap = ord(text[0]), 0 if run is None else code - run[1]
        if run is not None and len(text) == 1 and gap in (1, 2) and run[2] in (0, gap):
            first, _, _, start = run
            if target - start == code - first:
                run = (first, code, gap, start)
                continue
        if run is not None:
            yield run[0], run[1], run[2] or 1, run[3]
        if len(text) == 1:
            run = (code, code, 0, target)
        else:
            assert text[1:] == "\u0307"
            yield code, code, 0, target
            run = None
    if run is not None:
        yield run[0], run[1], run[2] or 1, run[3]


def canonical_decompositions() -> list[tuple[int, int, int]]:
    """(character, first, second or 0), one level deep, without Hangul."""
    nfd = normalizers.NFD()
    found = []
    for code in CHARACTERS:
        full = nfd.normalize_str(chr(code))
        if full == chr(code) or code in HANGUL:
            continue
        parts = [int(part, 16) for part in unicodedata.decomposition(chr(code)).split()]
        assert nfd.normalize_str("".join(map(chr, parts))) == full
        found.append((code, parts[0], parts[1] if len(parts) > 1 else 0))
    return found


def compositions(decompositions: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """(first, second, whole), sorted."""
    nfc = normalizers.NFC()
    return sorted(
        (first, second, code)
        for code, first, second in decompositions
        if second and nfc.normalize_str(chr(first) + chr(second)) == chr(code)
    )


def combining_classes() -> dict[int, int]:
    """The classes that are not 0. Marks are sorted by them, which shows them."""
    nfd = normalizers.NFD()

    def moves(mark: str) -> bool:
        """Whether it is sorted after the least class, or before the largest."""
        texts = (LETTER + mark + "\u0334", LETTER + "\u0345" + mark)
        return any(nfd.normalize_str(text) != text for text in texts)

    known = [chr(code) for code in CHARACTERS if nfd.normalize_str(chr(code)) == chr(code)]
    known = [mark for mark in known if moves(mark)]
    examples = {unicodedata.combining(mark): mark for mark in reversed(known)}
    marks = "".join(examples[kind] for kind in sorted(examples))
    found = {}
    for mark in known:
        ordered = nfd.normalize_str(LETTER + marks + mark)
        found[ord(mark)] = unicodedata.combining(ordered[ordered.rindex(mark) - 1])
    for kind, mark in examples.items():
        found[ord(mark)] = kind
    return found


# As in unicode_tables.hpp.
GRAPHEMES = {
    "CR": 1, "LF": 2, "Control": 3, "Extend": 4, "ZWJ": 5, "Regional_Indicator": 6, "Prepend": 7,
    "SpacingMark": 8, "L": 9, "V": 10, "T": 11,
}  # fmt: skip
PICTOGRAPH, CONSONANT, LINKER = 14, 15, 16


def grapheme_classes() -> dict[int, int]:
    """What decides where a grapheme ends, by the package's own segmentation where that shows it.

    Hangul's syllables are left out: their numbers tell.
    """
    count = grapheme_counter()
    attached = {code for code in CHARACTERS[1:] if count(LETTER + chr(code)) == 1}
    found: dict[int, int] = {}
    for code in CHARACTERS:
        text = chr(code)
        kind = next((n for n in GRAPHEMES if regex.match(rf"\p{{GCB={n}}}", text)), "")
        if code in attached:
            assert kind in ("Extend", "SpacingMark", "ZWJ"), hex(code)
            linker = regex.match(r"\p{InCB=Linker}", text)
            found[code] = LINKER if linker else GRAPHEMES[kind]
        elif kind in ("Extend", "SpacingMark"):
            continue  # younger than the package
        elif kind == "Control":
            assert code == 0 or count(text + MARK * 2) == 2, hex(code)
            found[code] = GRAPHEMES[kind]
        elif kind == "Prepend":
            if count(text + LETTER) == 1 or len(text.encode()) > 4:
                found[code] = GRAPHEMES[kind]
        elif kind:
            found[code] = GRAPHEMES[kind]
        elif regex.match(r"\p{Extended_Pictographic}", text):
            found[code] = PICTOGRAPH
        elif regex.match(r"\p{InCB=Consonant}", text):
            found[code] = CONSONANT
    return found


def grapheme_counter() -> Callable[[str], int]:
    """Graphemes of a text, where each has less than 6 bytes and none is NUL.

    A map of characters in which each byte is a key: the package puts what it maps the first byte
    to in place of a whole grapheme of less than 6 bytes, and of each character of longer ones.
    """
    units = [0] * 1024
    root, leaves = 256, 512
    units[0] = root << 10
    for byte in range(1, 256):
        node, leaf = root ^ byte, leaves + byte
        units[node] = (node ^ leaf) << 10 | 1 << 8 | byte
        units[leaf] = 1 << 31
    trie = struct.pack(f"<{len(units)}I", *units)
    replace = normalizers.Precompiled(struct.pack("<I", len(trie)) + trie + b"Y\0")
    return lambda text: len(replace.normalize_str(text))


if __name__ == "__main__":
    main()
