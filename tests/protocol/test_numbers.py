"""Texts of numbers: which ones are taken, and how sums are written."""

import pytest

from kvtcp.constants import INTEGER_MAX, INTEGER_MIN
from kvtcp.protocol.numbers import DECIMAL_BYTES_MAX, decimal_of, decimal_sum, integer_of


@pytest.mark.parametrize("number", [0, 1, -1, INTEGER_MAX, INTEGER_MIN])
def test_integers(number: int) -> None:
    """The whole range of 64 bits."""
    assert integer_of(b"%d" % number) == number


@pytest.mark.parametrize("text", [
    b"", b"-", b"+1", b" 1", b"1 ", b"01", b"-0", b"1.0", b"1e3", b"0x1", b"--1", b"9223372036854775808",
    b"-9223372036854775809", b"1" * 1000, "\u0661".encode(), b"\xb2",
])  # fmt: skip
def test_what_is_no_integer(text: bytes) -> None:
    """Only one spelling is taken."""
    assert integer_of(text) is None


@pytest.mark.parametrize(("text", "number"), [
    (b"0", "0"), (b"-0", "-0"), (b"+1", "1"), (b"1.", "1"), (b".5", "0.5"), (b"-.5e1", "-5"), (b"00", "0"),
    (b"1e308", "1e308"), (b"-1e308", "-1e308"), (b"1e-999", "1e-999"), (b"0e999", "0"),
    (b"1e309", None), (b"100000000000000000000000000001e280", None), (b"1e1000", None), (b"", None), (b".", None),
    (b"1 ", None), (b"1\n", None), (b"1_0", None), (b"nan", None), (b"inf", None), (b"0x10", None),
    ("١".encode(), None), (b"1e", None), (b"9" * 308, "9" * 308), (b"0" * (DECIMAL_BYTES_MAX + 1), None),
])  # fmt: skip
def test_decimal_texts(text: bytes, number: str | None) -> None:
    """Digits with a point and an exponent, up to the range of a double, exactly; nothing else that Python takes."""
    found = decimal_of(text)
    assert (found is None) == (number is None)
    assert number is None or found == type(found)(number)


@pytest.mark.parametrize(("number", "by", "text"), [
    (b"0.1", b"0.2", b"0.3"), (b"1", b"-1", b"0"), (b"-1e-18", b"0", b"0"), (b"1e2", b".5", b"100.5"),
    (b"1e308", b"1e308", None),
])  # fmt: skip
def test_sums(number: bytes, by: bytes, text: bytes | None) -> None:
    """Exact, rounded to 17 places, in the plainest spelling; None if it is too large."""
    one, other = decimal_of(number), decimal_of(by)
    assert one is not None and other is not None
    assert decimal_sum(one, other) == text
