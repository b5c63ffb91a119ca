"""Reports on runs: an HTML page and its Markdown twin, from the files of one run or of several."""

from rmkv_cli.report.write import Written, write_report

__all__ = ["Written", "write_report"]
