"""Names from files are text to a terminal, too."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subtuning_lab.utils.text import lines, without_colours


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cat\x1b[2J", "cat\\x1b[2J"),
        ("\x07\x9b31m", "\\x07\\x9b31m"),
        ("a\r\nb\tc", "a\\r\nb\\tc"),
        ("evil\u202egnp.exe", "evil\\u202egnp.exe"),
        ("\udcff", "\\xff"),
        ("Käfer 猫 🐈 نمی\u200cدانم", "Käfer 猫 🐈 نمی\u200cدانم"),
        (3, "3"),
    ],
)
def test_control_characters_are_written_out(text, shown):
    assert lines(text) == shown


@given(st.text())
def test_nothing_that_is_left_steers_a_terminal(text):
    shown = lines(text)
    assert "\x1b" not in shown and all(c == "\n" or ord(c) >= 32 for c in shown) and lines(shown) == shown
    shown.encode()


def test_colours_go_and_other_sequences_show():
    assert without_colours("\x1b[0;31mno\x1b[0m such\x1b]0;title\x07") == "no such\\x1b]0;title\\x07"
