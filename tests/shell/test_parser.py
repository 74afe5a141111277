"""Words: quoting and its inverse, options, files, and errors with their position."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvtcp.shell.parser import File, ParseError, Stdin, Word, quote, split_line, word_of_argument


def contents(line: str) -> list[object]:
    """What the words of a line stand for."""
    return [word.content() for word in split_line(line)]


@pytest.mark.parametrize(("line", "expected"), [
    ("", []),
    ("  \t ", []),
    ("get user:1", [b"get", b"user:1"]),
    ("  put\tk  v ", [b"put", b"k", b"v"]),
    ('put k "a b"', [b"put", b"k", b"a b"]),
    ('put k ""', [b"put", b"k", b""]),
    (r'put k "a\x00\xfF\n\t\r\"\\"', [b"put", b"k", b'a\x00\xff\n\t\r"\\']),
    ('put k "Zoë"', [b"put", b"k", "Zoë".encode()]),
    ("put k Zoë", [b"put", b"k", "Zoë".encode()]),
    (r"put k a\n", [b"put", b"k", rb"a\n"]),
    ('put k {"a":"b"}', [b"put", b"k", b'{"a":"b"}']),
    ("put k it's", [b"put", b"k", b"it's"]),
    ("put k b64:AAEC", [b"put", b"k", b"\x00\x01\x02"]),
    ("put k b64:", [b"put", b"k", b""]),
    ("put k @a/b", [b"put", b"k", File("a/b")]),
    ('put k @"a b"', [b"put", b"k", File("a b")]),
    ("put k -", [b"put", b"k", Stdin()]),
    ('put "-" "@x"', [b"put", b"-", b"@x"]),
    ("incr k -5", [b"incr", b"k", b"-5"]),
])  # fmt: skip
def test_words_of_a_line(line: str, expected: list[object]) -> None:
    """Each kind of word gives its bytes, or the mark of a file or of stdin."""
    assert contents(line) == expected


@pytest.mark.parametrize(("line", "message", "position"), [
    ('put k "abc', "the closing quote is missing", 6),
    ('put k "abc\\', "the closing quote is missing", 10),
    ('put k "a"b', "text follows the closing quote", 9),
    (r'put k "a\q"', r"unknown escape \q; known are \n \t \r \" \\ \xHH", 8),
    (r'put k "a\x0"', r"two hexadecimal digits must follow \x", 8),
    (r'put k "\xg0"', r"two hexadecimal digits must follow \x", 7),
    ("put k b64:A", "what follows b64: is not standard base64", 10),
    ("put k b64:Zoë", "what follows b64: is not standard base64", 10),
    ("put k @", 'a file name must follow "@"', 6),
    ('scan from="a', "the closing quote is missing", 10),
])  # fmt: skip
def test_errors_have_a_position(line: str, message: str, position: int) -> None:
    """A word that cannot be read raises with a sentence and the place of the mistake in the line."""
    with pytest.raises(ParseError) as caught:
        contents(line)
    assert message in caught.value.message
    assert caught.value.position == position
    assert f"(at character {position + 1})" in str(caught.value)


def test_options() -> None:
    """`name=value` is an option with a word as its value; a quoted word or other text never is."""
    words = split_line('scan from="a b" limit=5 prefix=b64:AA== "x=1" 1=2 =3 to=')
    assert [None if (o := w.option()) is None else (o[0], o[1].content()) for w in words] == [
        None, ("from", b"a b"), ("limit", b"5"), ("prefix", b"\x00"), None, None, None, ("to", b""),
    ]  # fmt: skip
    assert words[4].is_quoted and words[4].content() == b"x=1"


def test_an_option_in_the_place_of_a_value_stays_text() -> None:
    """Where a value stands, `a="b c"` is these characters, quotes included."""
    assert split_line('put k a="b c"')[2].content() == b'a="b c"'


def test_arguments_are_single_words() -> None:
    """An argument of the process is one word, spaces and all; bytes that are not UTF-8 come through."""
    assert word_of_argument("a b  c").content() == b"a b  c"
    assert word_of_argument("\udcff").content() == b"\xff"
    assert word_of_argument('"a\\x00"').content() == b"a\x00"
    assert word_of_argument("").content() == b""
    with pytest.raises(ParseError, match="text follows the closing quote"):
        word_of_argument('"a" and "b"').content()


def test_text_of_names_and_numbers() -> None:
    """`text` reads quotes and nothing else: a path may begin with @ or be a single -."""
    assert [Word(raw, 0).text() for raw in ('"a b"', "@a", "-", "b64:AA==")] == ["a b", "@a", "-", "b64:AA=="]


@given(st.binary(max_size=60))
@example(b"")
@example(b"-")
@example(b"@a")
@example(b"b64:AA==")
@example(b"limit=5")
@example(b'a"b')
@example("\u202e\x85Zoë".encode())
def test_quote_is_undone_by_reading(data: bytes) -> None:
    """Any bytes survive quote and reading, in a line and as an argument, and the word shows no control character."""
    word = quote(data)
    assert contents(f"put {word} x") == [b"put", data, b"x"]
    assert word_of_argument(word).content() == data
    assert word.isprintable() and Word(word, 0).option() is None


@given(st.text(max_size=60))
def test_reading_is_total(line: str) -> None:
    """Any line either gives words or raises ParseError with a position inside it."""
    try:
        words = split_line(line)
        for word in words:
            word.content()
    except ParseError as error:
        assert 0 <= error.position <= len(line)
    except UnicodeEncodeError:
        # a lone surrogate that stands for no byte cannot come from a terminal or from sys.argv
        assert any("\ud800" <= character <= "\udfff" for character in line)
