"""What a server says about itself: the model's name and context length, and its tokenizer."""

import difflib
from typing import Any

from absl import logging

from gkdjax.data.chat_template import Chat
from gkdjax.teachers.server.transport.client import Transport
from gkdjax.types import ContextLimit
from gkdjax.utils.errors import TeacherRefused, TeacherUnreachable, UserError, WrongAnswer


def model_of(transport: Transport, api_model: str) -> tuple[str, ContextLimit | None]:
    """(the model's name, its context length by the server's list of models)."""
    try:
        listed = transport.get("/v1/models")
    except TeacherRefused:
        if api_model:
            return api_model, None  # not every host lists its models
        raise
    except WrongAnswer as error:
        raise UserError(
            f"{error}; is that a server of this API? See config.teacher.api_base"
        ) from None
    entries = {e["id"]: e for e in _entries(listed) if isinstance(e.get("id"), str)}
    if not api_model and len(entries) != 1:
        raise UserError(
            f"{transport.root} has the models {[*entries]}; name one in config.teacher.api_model"
        )
    name = api_model or next(iter(entries))
    if entries and name not in entries:
        near = difflib.get_close_matches(name, entries, n=1, cutoff=0.0)
        raise UserError(
            f"config.teacher.api_model = {name!r}: {transport.root} does not have it; did you mean"
            f" {near[0]!r}?"
        )
    known_by, limit, seen = name, None, set()
    while isinstance(known_by, str) and known_by in entries and known_by not in seen and not limit:
        seen.add(known_by)
        limit = _limit(entries[known_by], f"{known_by} in /v1/models")
        known_by = entries[known_by].get("parent")  # an adapter's entry may leave it to that one
    return name, limit


def compare_tokenizers(
    transport: Transport, model: str, chat: Chat, text: str
) -> tuple[str, ContextLimit | None]:
    """(how the tokenizers were compared, the context length by the same response)."""
    ours = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    for body in (
        {"model": model, "prompt": text, "add_special_tokens": False},
        {"content": text, "add_special": False},
    ):
        response = _optional(transport.post, "/tokenize", body, max_bytes=2**20)
        theirs = response.get("tokens") if isinstance(response, dict) else None
        # An empty list: the server does not read the text from this field.
        if not theirs or not isinstance(theirs, list) or not all(type(i) is int for i in theirs):
            continue
        if theirs != ours:
            pairs = enumerate(zip(ours, theirs, strict=False))
            shorter = min(len(ours), len(theirs))
            at = next((i for i, (our, their) in pairs if our != their), shorter)
            raise UserError(
                f"the tokenizer of {model} is not that of {chat.directory}: of one text the token"
                f" {at} is {theirs[at : at + 1]} there and {ours[at : at + 1]} here. Name the"
                " teacher's own in config.teacher.tokenizer; it has to be the student's as well,"
                " but for added tokens"
            )
        return f"the same {len(ours)} ids for a text", _limit(response, f"{model} in /tokenize")
    logging.warning(
        "%s has no /tokenize: its tokenizer is taken to be that of %s",
        *(transport.root, chat.directory),
    )
    return "not compared: the server has no /tokenize", None


def proxied(transport: Transport, model: str) -> ContextLimit | None:
    """The context length by LiteLLM's proxy; None where there is no such route."""
    entries = _entries(_optional(transport.get, "/model/info"))
    infos = [entry.get("model_info") for entry in entries if entry.get("model_name") == model]
    where = f"{model} in /model/info"
    limits = [_limit(info, where) for info in infos if isinstance(info, dict)]
    # Several servers of one name take turns.
    return min(filter(None, limits), key=lambda limit: limit.tokens, default=None)


def _optional(ask, *args, **kwargs) -> Any:
    """The response of a route that a server need not have, or None."""
    try:
        return ask(*args, once=True, **kwargs)
    except (TeacherRefused, TeacherUnreachable, WrongAnswer):
        return None


def _entries(response: Any) -> list[dict]:
    listed = response.get("data") if isinstance(response, dict) else None
    return [entry for entry in listed or () if isinstance(entry, dict)]


def _limit(entry: dict, where: str) -> ContextLimit | None:
    """By vLLM's field or LiteLLM's."""
    both = entry.get("max_model_len")
    if type(both) is int and both >= 2:  # one token is always written
        return ContextLimit(both - 1, f"max_model_len={both} of {where}", both)
    read = entry.get("max_input_tokens")
    if type(read) is int and read >= 1:
        return ContextLimit(read, f"max_input_tokens={read} of {where}")
    return None
