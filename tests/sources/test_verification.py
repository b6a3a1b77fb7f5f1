from decimal import Decimal

import pytest

from research.sources import verification


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 42.", "42"),
        ("1,234,567.50 dollars", "1234567.5"),
        ("x = -3", "-3"),
        ("x = −3", "-3"),
        ("7-3", "3"),
        ("(2)-5", "5"),
        ("#### 70", "70"),
        ("3, 4 and 5,", "5"),
        ("12,34", "34"),
        ("6.02e23", "6.02e23"),
        ("2 eggs", "2"),
        ("$1,000", "1000"),
        ("5.0", "5"),
        ("none", None),
    ],
)
def test_last_number(text, number):
    assert verification.last_number(text) == (None if number is None else Decimal(number))
