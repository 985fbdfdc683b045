from __future__ import annotations

import pytest

from omninft.naming import did_you_mean, is_safe_name


@pytest.mark.parametrize(
    ("word", "found"),
    [("aplha", "Alpha"), (" ALPHA ", "Alpha"), ("bet", "beta"), ("zzz", None), ("", None)],
)
def test_the_nearest_name_is_asked_for(word: str, found: str | None) -> None:
    assert did_you_mean(word, ("Alpha", "beta")) == (f", did you mean {found!r}?" if found else "")


def test_no_known_names() -> None:
    assert did_you_mean("x", ()) == ""


@pytest.mark.parametrize("name", ["a", "-", "_x", "A.b-C_9", "x" * 100])
def test_safe_names(name: str) -> None:
    assert is_safe_name(name)


@pytest.mark.parametrize("name", ["", ".a", "a/b", "a b", "a\n", "\u00e9", "x" * 101, "\u0663"])
def test_names_that_are_not_safe(name: str) -> None:
    assert not is_safe_name(name)
