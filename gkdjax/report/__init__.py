"""What a run found and looks like: results.json, the terminal, report.png and report.html.

It reads files, and knows none of a run's objects.
"""

from gkdjax.report.page import write_html
from gkdjax.report.picture import draw
from gkdjax.report.results import collect
from gkdjax.report.terminal import render

__all__ = ["collect", "draw", "render", "write_html"]
