"""The report of a curation: one HTML page of what came in, what went out, and why."""

from moebius.curate.report.page import write_report

__all__ = ["write_report"]
