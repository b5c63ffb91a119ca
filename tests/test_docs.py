"""The figures of docs/memory.md are those of the bench that it names."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_memory_s_tables_are_the_bench_s():
    command = [sys.executable, ROOT / "benchmarks/memory.py", "table", "text"]
    tables = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert "| slots and store |" in tables
    assert tables in (ROOT / "docs/memory.md").read_text(encoding="utf-8")
