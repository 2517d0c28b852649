"""Makes the embedded quickstart from nothing: `python -m gkdjax.tools.make_quickstart --out=DIR`."""
