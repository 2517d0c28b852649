"""The clock that a chat template sees: it stands still, so that a run goes on with the same text.

transformers gives templates `strftime_now`, which tells the time of the rendering. A macro of that
name before the template hides it.
"""

import datetime
import re

# Without white space of its own: the line break after it is a block's, which templates leave out.
_MACRO = (
    "{% macro strftime_now(format) %}"
    "{% set at = namespace(text=format | replace('%%', '\\x00')) %}"
    "{% for directive, said in gkdjax_clock.items() %}"
    "{% set at.text = at.text | replace(directive, said) %}{% endfor %}"
    "{{ at.text | replace('\\x00', '%') }}{% endmacro %}\n"
)
# As "%f" or "%10d", and other words that begin so, which strftime leaves as they are.
_WRITTEN = re.compile(r"%[-_0^#]*[0-9]*[EO]?[a-zA-Z]")
_DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnprRsStTuUVwWxXyYzZ"


def standing(template: str, clock: datetime.datetime | None) -> dict:
    """What `apply_chat_template` is given beside the rest, so that a template sees this time.

    Args:
      template: the text of a chat template.
      clock: local time; None: the time of the rendering.
    """
    if clock is None or "strftime_now" not in template:
        return {}
    directives = [f"%{flag}{letter}" for flag in ("", "-", "_", "0", "^") for letter in _DIRECTIVES]
    directives += [found for found in _WRITTEN.findall(template) if found not in directives]
    said = {directive: clock.strftime(directive) for directive in directives}
    return {"chat_template": _MACRO + template, "gkdjax_clock": said}
