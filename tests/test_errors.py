"""What others raise and print, in one line."""

import pytest

from fasttune import errors


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n  first \nsecond"), "ValueError: first"),
        (RuntimeError(" \n"), "RuntimeError: RuntimeError"),
    ],
)
def test_an_error_in_one_line(error: Exception, line: str) -> None:
    assert errors.kind_and_line(error) == line and errors.first_line(error) == line.partition(": ")[2]
