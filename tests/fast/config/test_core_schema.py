"""YAML 1.2 by its core schema: the examples of the specification, what is refused, and texts read back."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gapo_mega.config.core_schema import parse_document, parse_value, written

# Of chapter 10.3.2 of the specification, and what version 1.1 reads in another way.
SCALARS: list[tuple[str, Any]] = [
    *[(text, None) for text in ("", "~", "null", "Null", "NULL")],
    *[(text, True) for text in ("true", "True", "TRUE")],
    *[(text, False) for text in ("false", "False", "FALSE")],
    ("0", 0),
    ("-19", -19),
    ("+7", 7),
    ("010", 10),
    ("0o17", 15),
    ("0x1F", 31),
    ("0x3a", 58),
    ("1e-6", 1e-6),
    ("1E-6", 1e-6),
    (".5e-3", 5e-4),
    ("1.e3", 1000.0),
    ("+1e-6", 1e-6),
    ("-0.0", 0.0),
    ("12e03", 12000.0),
    ("-2E+05", -200000.0),
    ("1.", 1.0),
    (".5", 0.5),
    *[(text, text) for text in ("yes", "No", "on", "OFF", "y", "nULL", "tRue")],
    *[(text, text) for text in ("1:30", "190:20:30", "1_000", "1_000.5", "0b11", "0o8", "0xg", "-0x1f")],
    *[(text, text) for text in ("2026-01-01", "2026-01-01 10:00:00", "1e", "e3", ".", "+", "1e5x", "=")],
]
NOT_FINITE = [".inf", "-.INF", "+.Inf", ".nan", ".NaN"]


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars_of_files_and_of_overrides_are_those_of_the_core_schema(text: str, value: Any) -> None:
    for found in (
        parse_document(f"a: {text}")["a"],
        parse_document(f"[{text or 'null'}]")[0],
        parse_value(text),
    ):
        assert found == value and type(found) is type(value)


def test_quotes_keep_texts_texts() -> None:
    for text, _ in SCALARS:
        for quote in "'\"":
            quoted = f"{quote}{text}{quote}"
            assert parse_value(quoted) == text and parse_document(f"a: {quoted}") == {"a": text}
    assert parse_value("'  a '") == "  a " and parse_value('"a\\nb"') == "a\nb"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("runs/a #1", "runs/a #1"),
        ("#3", "#3"),
        ("  a b  ", "a b"),
        ("a=b", "a=b"),
        ("a: b", "a: b"),
        ("- a", "- a"),
        ("*.jsonl", "*.jsonl"),
        ("&x", "&x"),
        ("a\nb", "a\nb"),
        ("<<", "<<"),
        ("Say: no, [really] #1!", "Say: no, [really] #1!"),
        ("[1e-6, 0o17, yes, {a: 010}]", [1e-6, 15, "yes", {"a": 10}]),
        ("['a #1', b#2]", ["a #1", "b#2"]),
        ("{a: [b,\n c]}", {"a": ["b", "c"]}),
    ],
)
def test_an_override_is_a_plain_text_unless_it_begins_as_something_else(text: str, value: Any) -> None:
    assert parse_value(text) == value


@pytest.mark.parametrize(
    "text", ["[a #1]", "[a] #1", "'a' #1", "{a: 1 #b\n}", "'a' b", "[1", "{{ X }}", "[INST] x"]
)
def test_nothing_of_an_override_is_cut_off(text: str) -> None:
    with pytest.raises(ValueError, match=r"^line 1: [^\n]+$"):
        parse_value(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: key 'a' is given twice"),
        ("a: {b: 1, 'b': 2}", "line 1: key 'b' is given twice"),
        ("a: &x {b: 1}\nc: {<<: *x, b: 2, b: 3}", "line 2: key 'b' is given twice"),
        ("a: &x\n  b: 1\n  b: 2\nc:\n  <<: *x", "line 3: key 'b' is given twice"),
        ("<<: {a: 1}\n<<: {b: 2}", "line 2: key '<<' is given twice"),
        ("1: x", "line 1: key '1': found no text, accepted: '1' in quotes"),
        ("a: {true: x}", "line 1: key 'true': found no text"),
        ("null: x", "line 1: key 'null': found no text"),
        ("1e-6: x", "line 1: key '1e-6': found no text"),
        ("a:\n  b: {{ X }}", "line 2: found a mapping as key, accepted: a text"),
        ("? [a]\n: b", "line 1: found a sequence as key"),
        ("a:\n\t- b", r"line 2: found character '\\t'"),
        ("a: 1\n---\nb: 2", "line 2: expected a single document"),
        ("a: 1\n\nb: \x07", "line 3: found the character"),
        ("a: !!python/object/apply:os.system [x]", "line 1: found the tag !!python/object/apply:os.system"),
        ("a: !!python/name:os.system", "line 1: found the tag !!python/name"),
        ("a: !!timestamp 2026-01-01", "line 1: found the tag !!timestamp"),
        ("a: !!binary aGk=", "line 1: found the tag !!binary"),
        ("a: !mine x", "line 1: found the tag !mine"),
        ("a: !!int yes", "line 1: found 'yes' with the tag !!int"),
        ("a:\n  - *b", "line 2: found undefined alias"),
        ("a: &x\n  b: *x", r"line 2: found \*x within &x itself"),
        ("a: &x [[*x]]", r"line 1: found \*x within &x itself"),
        ("a: " + "9" * 5000, "line 1: found an integer of 5000 digits"),
        ("a: " + "[" * 5000, "found lists or mappings too deep"),
        (
            "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40)),
            "found anchors that stand for more than",
        ),
        ("a:\n  <<: [1]", "line 2: expected a mapping for merging"),
    ],
)
def test_faults_are_one_line_that_begins_with_the_line_of_the_file(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        parse_document(text)
    assert "\n" not in str(caught.value)


def test_sections_are_shared_by_anchors_and_merge_keys_and_stay_independent() -> None:
    text = "a: &x {b: 1, c: {d: 2}}\ne: &y {<<: *x, b: 3}\nf: {<<: [*y, *x], g: 4}\nh: *x\n"
    found = parse_document(text)
    # PyYAML's own loader of version 1.1, which wrote the merge key down.
    assert found == yaml.safe_load(text)
    assert found["e"] == {"b": 3, "c": {"d": 2}} and found["f"]["b"] == 3
    found["h"]["c"]["d"] = 5
    assert found["a"]["c"]["d"] == found["e"]["c"]["d"] == 2


def test_comments_a_byte_order_mark_and_an_empty_document() -> None:
    assert parse_document("\ufeffa: 1 # one\n# b: 2\nc: 'x # y'\nd: e#f") == {
        "a": 1,
        "c": "x # y",
        "d": "e#f",
    }
    assert parse_document("") is None and parse_document("# nothing\n") is None


@settings(deadline=None)
@example(data="1e-6")
@example(data="0o17")
@given(
    data=st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text()
        | st.sampled_from([text for text, _ in SCALARS] + NOT_FINITE),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=6,
    )
)
def test_what_is_written_is_read_back_by_both_versions(data: Any) -> None:
    text = written({"key": data})
    assert parse_document(text) == yaml.safe_load(text) == {"key": data}


@pytest.mark.parametrize("character", ["\x85", "\u2028", "\u2029"])
def test_what_ends_a_line_in_version_1_1_alone_is_part_of_a_text(character: str) -> None:
    """Web pages have them. Version 1.1 folds them with the spaces around, and ends a comment at them."""
    for text in (f"a{character}  b", f"a  {character}b", f"{character}"):
        assert parse_document(f'a: "{text}"') == {"a": text}
        assert parse_document(f"[x{text}y]") == [f"x{text}y"]
        assert parse_document(f"a: |-\n  x{text}\nb: 1") == {"a": f"x{text}", "b": 1}
    assert parse_document(f"a: 1 # b{character}b: 2\n") == {"a": 1}


@given(st.text(st.sampled_from("\x85\u2028\u2029\ue000\ue001\ue002\ue003ab \n"), max_size=8))
def test_private_characters_stay_beside_line_separators(text: str) -> None:
    """Whatever stands in for a separator while a text is read is no character of that text."""
    assert parse_document(written({"a": text})) == {"a": text}
    raw = text.replace("\n", "")
    assert parse_document(f'a: "{raw}"\nb: "\\uE000\\u2028"') == {"a": raw, "b": "\ue000\u2028"}


def test_json_spells_a_character_as_two_escapes() -> None:
    assert parse_document('{"a": "\\ud83d\\ude00", "\\ud83d\\ude00": 1}') == {
        "a": "\U0001f600",
        "\U0001f600": 1,
    }
    assert parse_value('"\\uD83D\\uDE00!"') == "\U0001f600!"
