"""One HTML page about runs, a study and its verification. Read `page.py`, then `figures.py`."""

from xllm_lab.report.page import write_report

__all__ = ["write_report"]
