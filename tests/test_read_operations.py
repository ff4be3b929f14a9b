"""The reading of the case study's samples: the operation that is written, and the number behind its `=`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_PATH = Path(__file__).parent.parent / "scripts" / "read_operations.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("read_operations", _PATH)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        (" 42 + 78 = 120 strawberries. The answer is 120.", 120.0, (True, True)),
        (" 31 - 14 = 15 inches. The answer is 15 inches.", 17.0, (True, False)),
        (" 31 inches / 14 inches = 2.21. The answer is 2.21.", 17.0, (False, True)),
        (" 6,525 liters + 5,165 = 11,690 liters.", 11690.0, (True, True)),
        (" 3 x $4 = $12.", 12.0, (False, False)),  # a sign between the two is not read
        (" 7 / 0 = 7.", 7.0, (False, False)),
        (" The answer is 12.", 12.0, (False, False)),
    ],
)
def test_first_expression_is_read(script, text, answer, expected):
    assert script.read(text, answer) == expected
