"""The report of a run, or a comparison of several, from what they wrote."""

from rmkv_cli.report.write import Written, write_report

__all__ = ["Written", "write_report"]
