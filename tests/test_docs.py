"""The figures of docs/memory.md are those of the bench that it names."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("study", ["recall", "copy", "needle", "facts", "text"])
def test_the_memory_s_tables_are_the_bench_s(study):
    command = [sys.executable, ROOT / "benchmarks/memory.py", "table", study]
    tables = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert "| slots and store |" in tables
    assert tables in (ROOT / "docs/memory.md").read_text(encoding="utf-8")
