"""Decoders, their families and their files."""

__all__ = ["load_pretrained"]


def __getattr__(name: str):
    if name != "load_pretrained":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gkdjax.models.hf.load import load_pretrained  # at its first use: it loads transformers

    return load_pretrained
