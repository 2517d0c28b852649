"""What a run found: the content of results.json, and its tables as text."""

from gkdjax.results.content import collect
from gkdjax.results.text import render

__all__ = ["collect", "render"]
