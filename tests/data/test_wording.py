"""Tokens become texts as people write them."""

from __future__ import annotations

import pytest

from punster.data.sources.reading import BadRecord
from punster.data.sources.wording import MAX_TEXT, clean, detokenise, filled, restored, swapped, unmangled


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ("It isn ' t the baker ' s bread , is it ?", "It isn't the baker's bread, is it?"),
        ("you 've said it did n't rise", "you've said it didn't rise"),
        ("he don 't care", "he don't care"),
        ("' ' I ' m out of flour , ' ' said Ann , kneading help .", '"I\'m out of flour," said Ann, kneading help.'),
        ("`` Go on , '' she said .", '"Go on," she said.'),
        ('She said " no " twice .', 'She said "no" twice.'),
        ("' Well , ' he said , ' that ' s bread . '", "'Well,' he said, 'that's bread.'"),
        ("The bakers ' strike ended .", "The bakers' strike ended."),
        ("They were goin ' home at six o ' clock .", "They were goin' home at six o'clock."),
        ("Mc - Bread is well - baked - it rises", "Mc-Bread is well-baked - it rises"),
        ("a merry - go - round", "a merry-go-round"),
        ("It costs $ 5 . 95 , or 3 , 000 for 20 % .", "It costs $5.95, or 3,000 for 20%."),
        ("Wait . . . what ? !", "Wait... what?!"),
        ("Go on ( y / n ) ?", "Go on (y/n)?"),
        ("The oven opened at 10 : 30 : too late .", "The oven opened at 10:30: too late."),
        ("A baker 's dozen , long dozen .", "A baker's dozen, long dozen."),
        ("", ""),
        ("'", "'"),
        ("- -", "--"),
        ("Guns - - be careful .", "Guns -- be careful."),
    ],
)  # fmt: skip
def test_detokenise(tokens: str, text: str) -> None:
    assert detokenise(tokens) == text
    assert detokenise(tokens.split()) == text


def test_a_text_of_people_stays_as_it_is() -> None:
    for text in ("I don't know, it's 5.95 (really).", "He said \"no\" - and left...", "Rock 'n' roll isn't dead."):  # fmt: skip
        assert detokenise(text) == text


def test_restored() -> None:
    assert (
        restored("i don t bake it s the oven s fault i m told we ll see")
        == "I don't bake it's the oven's fault I'm told we'll see."
    )
    assert restored("they were re made of clay and they re proud") == "They were re made of clay and they're proud."


def test_filled() -> None:
    assert filled("Every sailor wants a ___ with a view", "oar") == "Every sailor wants an oar with a view."
    assert filled("He ate an ___!", "pear") == "He ate a pear!"
    assert filled("___ comes first.", "dough") == "Dough comes first."
    for cloze in ("no blank", "two ___ of ___"):
        with pytest.raises(BadRecord, match="exactly one blank"):
            filled(cloze, "x")


def test_swapped_keeps_the_capital() -> None:
    assert swapped(["Dough", "isn", "'", "t", "all", "."], slice(0, 1), "money") == "Money isn't all."
    assert swapped(["He", "fell", "for", "her", "."], slice(1, 3), "loved") == "He loved her."


def test_clean() -> None:
    assert clean("  two\n\u2028 lines\x00 \ud800") == "two lines"
    assert unmangled("SamanÃ¡") == "Samaná" and unmangled("Â£5") == "£5" and unmangled("ÃŸ is Ã") == "ÃŸ is Ã"
    for text, reason in (("?!", "no letters"), ("a" * (MAX_TEXT + 1), "longer than")):
        with pytest.raises(BadRecord, match=reason):
            clean(text)
