"""What a run looks like: report.png, and report.html, which opens without a network."""

from gkdjax.report.page import write_html
from gkdjax.report.picture import draw

__all__ = ["draw", "write_html"]
