"""Makes the embedded quickstart; run with `python -m`, see `__main__`."""
