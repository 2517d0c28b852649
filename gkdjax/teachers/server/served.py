"""What a server says that it serves: the model's name and context, and its tokenizer."""

import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import logging

from gkdjax.data.chat_template import Chat
from gkdjax.teachers.server.transport.client import Transport
from gkdjax.utils.errors import TeacherRefused, TeacherUnreachable, UserError, WrongAnswer


class Window(NamedTuple):
    """How much a server reads."""

    tokens: int  # of a view, at most
    written: int | None  # with what it writes; None: that does not count
    source: str  # what says so, for people


def model_of(transport: Transport, api_model: str) -> tuple[str, Window | None]:
    """(the model's name, and what its list says that it reads, or None).

    Raises:
      UserError: there is no such model, or several and none is named; those there are, are told.
    """
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
    entries = listed.get("data") if isinstance(listed, dict) else None
    entries = [e for e in entries or () if isinstance(e, dict) and isinstance(e.get("id"), str)]
    names = [entry["id"] for entry in entries]
    if not api_model and len(names) != 1:
        raise UserError(
            f"{transport.root} has the models {names}; name one in config.teacher.api_model"
        )
    name = api_model or names[0]
    if names and name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        raise UserError(
            f"config.teacher.api_model = {name!r}: {transport.root} does not have it; did you mean"
            f" {near[0]!r}?"
        )
    return name, _listed(entries, name)


def compare_tokenizers(
    transport: Transport, model: str, chat: Chat, text: str
) -> tuple[str, Window | None]:
    """(how it was done, for people; and what the same answer says that the server reads, or None).

    Raises:
      UserError: the server writes other ids for the same text.
    """
    ours = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    for body in (
        {"model": model, "prompt": text, "add_special_tokens": False},
        {"content": text, "add_special": False},
    ):
        try:
            said = transport.post("/tokenize", body, max_bytes=2**20, once=True)
        except (TeacherRefused, TeacherUnreachable, WrongAnswer):
            continue
        theirs = said.get("tokens") if isinstance(said, dict) else None
        # An empty list: the text stood in a field that this server does not read.
        if not theirs or not isinstance(theirs, list) or not all(type(i) is int for i in theirs):
            continue
        if theirs != ours:
            at = next(
                (i for i, pair in enumerate(zip(ours, theirs, strict=False)) if len({*pair}) > 1),
                min(len(ours), len(theirs)),
            )
            raise UserError(
                f"the tokenizer of {model} is not that of {chat.directory}: of one text the token"
                f" {at} is {theirs[at : at + 1]} there and {ours[at : at + 1]} here. Name the"
                " teacher's own in config.teacher.tokenizer; it has to be the student's as well,"
                " but for added tokens"
            )
        window = _window(said.get("max_model_len"), f"{model} in /tokenize")
        return f"the same {len(ours)} ids for a text", window
    logging.warning(
        "%s has no /tokenize: its tokenizer is taken to be that of %s",
        transport.root,
        chat.directory,
    )
    return "not compared: the server has no /tokenize", None


def proxied(transport: Transport, model: str) -> Window | None:
    """What LiteLLM's proxy knows of the model behind it; None where there is no such route."""
    try:
        said = transport.get("/model/info", once=True)
    except (TeacherRefused, TeacherUnreachable, WrongAnswer):
        return None
    entries = said.get("data") if isinstance(said, dict) else None
    windows = [
        _input(info.get("max_input_tokens"), f"{model} in /model/info")
        for entry in entries or ()
        if isinstance(entry, dict) and entry.get("model_name") == model
        for info in [entry.get("model_info")]
        if isinstance(info, dict)
    ]
    # Several servers of one name take turns.
    found = [window for window in windows if window is not None]
    return min(found, key=lambda window: window.tokens, default=None)


def _listed(entries: Sequence[dict], name: str) -> Window | None:
    """From /v1/models; an adapter's entry may leave it to that of the model that it is for."""
    by_name = {entry["id"]: entry for entry in entries}
    seen: list[str] = []
    while isinstance(name, str) and name in by_name and name not in seen:
        seen.append(name)
        entry, where = by_name[name], f"{name} in /v1/models"
        window = _window(entry.get("max_model_len"), where)
        window = window or _input(entry.get("max_input_tokens"), where)  # LiteLLM's name
        if window is not None:
            return window
        name = by_name[name].get("parent")
    return None


def _window(max_model_len: Any, where: str) -> Window | None:
    """One token is always written, and has to find room."""
    if type(max_model_len) is not int or max_model_len < 2:
        return None
    return Window(max_model_len - 1, max_model_len, f"max_model_len={max_model_len} of {where}")


def _input(max_input_tokens: Any, where: str) -> Window | None:
    if type(max_input_tokens) is not int or max_input_tokens < 1:
        return None
    return Window(max_input_tokens, None, f"max_input_tokens={max_input_tokens} of {where}")
