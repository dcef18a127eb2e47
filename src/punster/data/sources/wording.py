"""Texts as people write them: tokens joined again, apostrophes and capitals restored, doubly encoded letters repaired."""

from __future__ import annotations

import re
from collections.abc import Sequence

from punster.data.sources.reading import MAX_TEXT, BadRecord

_ENDINGS = {"s", "t", "m", "re", "ve", "ll", "d"}
_AROUND = {("o", "clock"), ("y", "all"), ("ma", "am"), ("o", "er")}
_CLOSING = set(".,!?;:%)]…")
_OPENING = set("([$#£")
_DROPPED = {"em", "til", "tis", "twas", "cause", "n", "bout"}  # words that lost their beginning: 'em
# After these words "-" was a hyphen in the text ("short - tempered") unless one of them follows it: then it was a dash.
_AFTER_DASH = {"a", "an", "and", "because", "but", "he", "his", "her", "how", "i", "if", "it", "its", "just", "my", "no", "not", "or",
               "she", "so", "that", "the", "their", "then", "there", "they", "this", "we", "what", "when", "who", "you", "your"}  # fmt: skip


def clean(text: str) -> str:
    """One line of printable text with single spaces; BadRecord if nothing is left, or far too much."""
    if len(text) > MAX_TEXT:
        raise BadRecord(f"the text is longer than {MAX_TEXT} characters")
    text = unmangled(text)
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in text)
    text = " ".join(text.split())
    if not any(c.isalnum() for c in text):
        raise BadRecord("the text has no letters")
    return text


def unmangled(text: str) -> str:
    """UTF-8 that was once read as Latin-1 and written as UTF-8 again, repaired where that is certain."""
    if "Ã" in text or "â€" in text or "Â" in text:
        for encoding in ("cp1252", "latin-1"):
            try:
                return text.encode(encoding).decode("utf-8")
            except UnicodeError:
                continue
    return text


def detokenise(tokens: str | Sequence[str]) -> str:
    """Join tokens as a person would have written them: don ' t -> don't, ` ` and ' ' -> ", 5 . 95 -> 5.95, Wal - Mart -> Wal-Mart."""
    words = _with_quotes((tokens if isinstance(tokens, str) else " ".join(tokens)).split())
    text, glue, double, single = "", True, False, False
    for i, word in enumerate(words):
        before = words[i - 1] if i else ""
        after = words[i + 1] if i + 1 < len(words) else ""
        left = right = False  # join with the word before, with the word after
        if word == '"':
            left, right, double = double, not double, not double
        elif word == "'":
            if _inside_a_word(words, i):
                left = right = True
            elif after.lower() in _DROPPED and not single:
                right = True
            elif not single and before[-1:] in set("sSnN") and sum(_lone(words, k) for k in range(i + 1, len(words))) % 2 == 0:
                left = True  # no partner to the right: workers' , goin'
            else:
                left, right, single = single, not single, not single
        elif re.fullmatch(r"(n't|'(s|t|m|re|ve|ll|d))", word.lower()):
            left = True
        elif word == "-" and before and after:
            dash = after.lower() in _AFTER_DASH and words[i + 2 : i + 3] != ["-"]  # but: know - it - all
            left = right = before[-1].isalnum() and after[:1].isalnum() and not dash
        elif word == "/" and before and after:
            left = right = len(before) <= 3 and len(after) <= 3
        elif word in _OPENING:
            right = True
        elif word[0] in _CLOSING:
            left = True
            right = word in ".,:" and before[-1:].isdigit() and after[:1].isdigit()
        text += word if glue or left else f" {word}"
        glue = right
    return text.strip()


def _inside_a_word(words: list[str], i: int) -> bool:
    """Is the single quote at place i an apostrophe between the words around it?"""
    before = words[i - 1].lower() if i else ""
    after = words[i + 1].lower() if i + 1 < len(words) else ""
    return (before[-1:].isalnum() and after in _ENDINGS) or (before, after) in _AROUND


def _lone(words: list[str], i: int) -> bool:
    return words[i] == "'" and not _inside_a_word(words, i)


def _with_quotes(words: list[str]) -> list[str]:
    """Two single quotes, in one token or two, are one double quote; two hyphens are one dash."""
    joined: list[str] = []
    for word in words:
        if word in ("``", "''"):
            joined.append('"')
        elif word == "-" and joined and joined[-1] == "-":
            joined[-1] = "--"
        elif (word == "'" and joined and joined[-1] == "'") or (word == "`" and joined and joined[-1] == "`"):
            joined[-1] = '"'
        else:
            joined.append(word)
    return joined


def restored(text: str) -> str:
    """Lower-case text whose punctuation was taken out: apostrophes, "I", a capital and a full stop are put back."""
    text = re.sub(r"\b(\w+n) t\b", r"\1't", text)
    joined = r"\bi (m|d)\b|\b\w+ (ve|ll)\b|\b(you|we|they|there|who|what|where|how|why) re\b"
    text = re.sub(joined, lambda match: match[0].replace(" ", "'"), text)
    text = re.sub(r"\b(\w{2,}) s\b", r"\1's", text)
    text = re.sub(r"\bi\b", "I", text)
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def filled(cloze: str, word: str) -> str:
    """The sentence with its one blank filled, the article before it adapted, and a full stop at its end."""
    if cloze.count("___") != 1:
        raise BadRecord("the sentence does not have exactly one blank ___")

    def replace(match: re.Match[str]) -> str:
        article = match[1] or ""
        if article:
            article = article[0] + ("n " if word[:1].lower() in "aeiou" else " ")
        return article + (word[:1].upper() + word[1:] if match.start() == 0 and not article else word)

    text = re.sub(r"(?:(?<!\w)([Aa]n? ))?_{3,}", replace, cloze, count=1).strip()
    return text + ("" if text[-1:] in tuple(".!?\"'") else ".")


def swapped(tokens: Sequence[str], place: slice, word: str) -> str:
    """The detokenised text with the tokens at `place` replaced, their capital kept."""
    word = word[:1].upper() + word[1:] if tokens[place.start][:1].isupper() else word
    return detokenise([*tokens[: place.start], word, *tokens[place.stop :]])
