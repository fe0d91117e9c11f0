"""Promises of the grammar of names and references."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.errors import InvalidAdapterId
from adapters_store.ids import Reference, check_adapter_id, parse_reference

steady = settings(deadline=None, derandomize=True, max_examples=60)


DIGEST = "0123456789abcdef" * 4


@pytest.mark.parametrize("name", ["a", "9", "my-adapter_v1.2", "owner/name", "a" * 128, "A..b"])
def test_accepts_names_of_the_grammar(name):
    assert check_adapter_id(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "-a", "_a", "a/", "/a", "a/b/c", "a b", "a@1", "a\n", "ä", "a" * 129, "a\x00"],
)
def test_refuses_other_names_and_says_the_grammar(name):
    with pytest.raises(InvalidAdapterId, match="letters, digits"):
        check_adapter_id(name)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("name", Reference("name")),
        ("owner/name@3", Reference("owner/name", version=3)),
        (f"name@sha256:{DIGEST}", Reference("name", digest_prefix=DIGEST)),
        (f"name@sha256:{DIGEST[:12]}", Reference("name", digest_prefix=DIGEST[:12])),
    ],
)
def test_splits_references(text, reference):
    assert parse_reference(text) == reference


@pytest.mark.parametrize(
    "selector",
    ["", "0", "01", "-1", "1.0", "99999999999", "latest", "sha256:", f"sha256:{DIGEST[:11]}",
     f"sha256:{DIGEST}0", f"sha256:{DIGEST[:12].upper()}", "1@2", "*"],
)  # fmt: skip
def test_refuses_selectors_that_select_nothing(selector):
    with pytest.raises(InvalidAdapterId):
        parse_reference(f"name@{selector}")


@steady
@given(st.text())
def test_any_text_is_a_reference_or_refused(text):
    try:
        parsed = parse_reference(text)
    except InvalidAdapterId:
        return
    assert text.startswith(parsed.adapter_id)
