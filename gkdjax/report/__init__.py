"""What a run looks like: report.png, and report.html, which opens without a network."""

from gkdjax.report.page import write_html
from gkdjax.report.picture import draw
from gkdjax.report.results import collect
from gkdjax.report.terminal import render

__all__ = ["collect", "draw", "render", "write_html"]
