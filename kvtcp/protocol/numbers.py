"""Texts of numbers: integers of 64 bits, and decimal numbers.

Pure. Values of counters, and arguments of clients of Redis, are such texts. A text is a number by the same rule
everywhere, so a coordinator refuses no argument that a node would take.

An integer has one spelling: no plus, no leading zero, no "-0". A decimal number may have a point and an exponent; it is
exact, up to the range of a double. Sums are exact too (`decimal`, 400 digits) and then rounded to 17 places, as Redis
prints its 80-bit floats: 0.1 + 0.2 is 0.3, on every machine.
"""

from __future__ import annotations

import re
from decimal import ROUND_HALF_EVEN, Context, Decimal
from typing import Final

from kvtcp.constants import INTEGER_MAX, INTEGER_MIN

INTEGER_TEXT_MAX: Final = 20  # bytes of "-9223372036854775808"
DECIMAL_BYTES_MAX: Final = 400
_DECIMAL: Final = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
_ARITHMETIC: Final = Context(prec=400, rounding=ROUND_HALF_EVEN, Emin=-9_999, Emax=9_999)
_PLACES: Final = Decimal("1e-17")
_DECIMAL_MAX: Final = Decimal("1e308")


def integer_of(text: bytes) -> int | None:
    """The number of a canonical integer text of 64 bits; None of anything else."""
    digits = text[1:] if text[:1] == b"-" else text
    if len(text) > INTEGER_TEXT_MAX or not digits.isdigit():
        return None
    number = int(text)
    return number if b"%d" % number == text and INTEGER_MIN <= number <= INTEGER_MAX else None


def decimal_of(text: bytes) -> Decimal | None:
    """The number of a decimal text; None of anything else, and beyond the range of a double."""
    if len(text) > DECIMAL_BYTES_MAX or not _DECIMAL.fullmatch(text):
        return None
    number = Decimal(text.decode("ascii"))
    return number if number.copy_abs() <= _DECIMAL_MAX else None  # abs() would round


def decimal_sum(number: Decimal, by: Decimal) -> bytes | None:
    """The text of a sum, without an exponent and without zeros behind; None beyond the range of a double."""
    total = _ARITHMETIC.quantize(_ARITHMETIC.add(number, by), _PLACES)
    if total.copy_abs() > _DECIMAL_MAX:
        return None
    text = format(total, "f").rstrip("0").rstrip(".").encode()
    return b"0" if text in (b"-0", b"") else text
