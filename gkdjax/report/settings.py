"""A run's config as lines of text, key by key."""

import json
import zlib

from gkdjax import config as config_lib
from gkdjax.utils.text import visible

_LONGEST = 60


def flat(config: dict) -> dict[str, str]:
    """Dotted key -> its value in one short line; values that differ have lines that differ.

    Args:
      config: the content of config.json.
    """
    found = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            found |= {f"{name}.{key}": text for key, text in flat(value).items()}
        else:
            found[name] = _short(value)
    return found


def unlike_defaults(config: dict) -> dict[str, str]:
    """Of `flat`, what the config's author has chosen."""
    defaults = flat(config_lib.to_dict(config_lib.Config()))
    return {key: text for key, text in flat(config).items() if defaults.get(key) != text}


def _short(value) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    shown = visible(" ".join(text.split()))
    if len(shown) <= _LONGEST and shown == text:
        return shown
    what = f"a list of {len(value)}" if isinstance(value, list) else f"{shown[:40]}..."
    return f"{what} (crc32 {zlib.crc32(text.encode(errors='surrogatepass')):08x})"
