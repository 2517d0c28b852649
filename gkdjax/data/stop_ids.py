"""Which tokens end a response."""

import pathlib
import re

from gkdjax.types import Message
from gkdjax.utils import files
from gkdjax.utils.errors import UserError, one_line

# In place of a message's content. Letters and digits only: no template trims, escapes or splits it.
PLACEHOLDER = re.compile(r"gkdjaxcontent(\d+)end")


def stop_ids(directory: str, tokenizer, template_kwargs: dict) -> tuple[int, ...]:
    """The template's end of turn first, then generation_config.json's and the tokenizer's own.

    Args:
      directory: of the model.
      tokenizer: transformers'.
      template_kwargs: for the chat template.

    Raises:
      UserError: the template fails, or ends no turn with a special token; generation_config.json
        is damaged, or names an id that the tokenizer lacks.
    """
    closing = _end_of_turn_id(directory, tokenizer, template_kwargs)
    others = [*_generation_config_stops(directory, tokenizer), tokenizer.eos_token_id]
    return tuple(dict.fromkeys(i for i in (closing, *others) if i is not None))


def _end_of_turn_id(directory: str, tokenizer, template_kwargs: dict) -> int:
    """The special token that a rendered conversation has right after the assistant's content."""
    asked = [Message("user", "gkdjaxcontent0end"), Message("assistant", "gkdjaxcontent1end")]
    try:
        text = tokenizer.apply_chat_template(
            [m.for_template() for m in asked], tokenize=False, **template_kwargs
        )
    except Exception as error:  # a template is a program
        raise UserError(
            f"{directory}: the chat template fails on a question: {one_line(error)}"
        ) from error
    after = PLACEHOLDER.split(text)[-1]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    tokens = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
    if after == text or not tokens or tokens[0] not in special:
        raise UserError(
            f"{directory}: the chat template must write an assistant's message as it is and end it"
            " with a special token, or nothing would tell the model to stop; it makes the end"
            f" {text[-40:]!r}. Take an instruction-tuned model, or give the directory's"
            " chat_template.jinja an end-of-turn token and tokenizer.json that token as special"
        )
    return tokens[0]


def _generation_config_stops(directory: str, tokenizer) -> list[int | None]:
    path = pathlib.Path(directory) / "generation_config.json"
    if not path.exists():
        return []
    stops = files.read_object(path).get("eos_token_id")
    stops = stops if isinstance(stops, list) else [stops]
    for stop in stops:
        if stop is not None and (type(stop) is not int or not 0 <= stop < len(tokenizer)):
            raise UserError(
                f"{path}: eos_token_id {stop!r} is no id of the tokenizer, which has"
                f" {len(tokenizer)} tokens"
            )
    return stops
