"""Makes the embedded quickstart from nothing; run with `python -m`, see `__main__`."""
