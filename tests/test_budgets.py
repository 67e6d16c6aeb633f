"""How large the package may be. The ceilings are what was reached: they only shrink.

`lines` are those of the files; `code_lines` are without blank lines, comments and docstrings.
"""

import ast
import io
import tokenize
from pathlib import Path

PACKAGE = Path("fasttune")
LONGEST_FILE = 400
# In reading order:
SPINE = [
    "core/train.py",
    "core/trainer.py",
    "data/batching.py",
    "data/tokenize.py",
    "core/model.py",
]
SPINE_LINES, SPINE_CODE_LINES = 1_300, 934
PACKAGE_LINES, PACKAGE_CODE_LINES = 22_928, 16_489
RUN_MODULES, RUN_LINES, RUN_CODE_LINES = 55, 10_470, 7_448  # of tests/test_train_command.py
KINDS = "COMMENT NL NEWLINE INDENT DEDENT ENDMARKER"
NOT_TEXT = {getattr(tokenize, kind) for kind in KINDS.split()}


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def code_lines(path: Path) -> int:
    """Lines with something of the program on them."""
    text = path.read_text()
    found = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in NOT_TEXT
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found -= set(range(first.lineno, (first.end_lineno or 0) + 1))
    return len(found)


def check(what: str, files: list[Path], most: int, most_code: int) -> None:
    """The sums of `files` are at most these."""
    whole, code = sum(map(lines, files)), sum(map(code_lines, files))
    assert whole <= most and code <= most_code, f"{what}: {whole:,} lines, {code:,} of them code"


def test_lines_are_counted_as_a_person_would(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text('"""A\nB."""\n\n# c\nx = """1\n2"""\n\n\ndef f() -> None:\n    """D."""\n    x  # y\n')
    assert (lines(path), code_lines(path)) == (11, 4)


def test_no_file_is_long() -> None:
    assert {str(path): lines(path) for path in PACKAGE.rglob("*.py") if lines(path) > LONGEST_FILE} == {}


def test_the_spine_is_read_in_one_sitting() -> None:
    check("the spine", [PACKAGE / name for name in SPINE], SPINE_LINES, SPINE_CODE_LINES)


def test_the_package_does_not_grow() -> None:
    check("the package", list(PACKAGE.rglob("*.py")), PACKAGE_LINES, PACKAGE_CODE_LINES)
