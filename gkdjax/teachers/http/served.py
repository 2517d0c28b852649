"""What a server says that it serves: the model's name and context, and its tokenizer."""

import difflib

from absl import logging

from gkdjax.data.chat import Chat
from gkdjax.errors import TeacherRefused, TeacherUnreachable, UserError, WrongAnswer
from gkdjax.teachers.http.wire.transport import Transport


def model_of(transport: Transport, api_model: str) -> tuple[str, int | None]:
    """(the model's name, most tokens of a view, or None where it does not tell).

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
    length = next((e.get("max_model_len") for e in entries if e["id"] == name), None)
    # One token is always written, and has to find room.
    return name, length - 1 if type(length) is int else None


def compare_tokenizers(transport: Transport, model: str, chat: Chat, text: str) -> str:
    """How it was done, for people.

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
                " teacher's own in config.teacher.tokenizer; it has to be the student's as well"
            )
        return f"the same {len(ours)} ids for a text"
    logging.warning(
        "%s has no /tokenize: its tokenizer is taken to be that of %s",
        transport.root,
        chat.directory,
    )
    return "not compared: the server has no /tokenize"
