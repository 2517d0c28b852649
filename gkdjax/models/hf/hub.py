"""Models by their name on the Hugging Face hub, through its own cache.

huggingface_hub reads HF_HOME, HF_HUB_OFFLINE and HF_TOKEN. No message repeats the text of its
exceptions, which can hold headers and addresses, and with them the token.
"""

import os
import pathlib
from collections.abc import Sequence

import huggingface_hub
from absl import logging
from huggingface_hub import errors

from gkdjax.models.hf.tensor_files import PICKLES, pickle_refusal
from gkdjax.utils.errors import UserError

_WEIGHTS = "*.safetensors"
# Everything small beside the weights that a model, a tokenizer or an adapter is loaded with.
_PATTERNS = ("*.json", "tokenizer.model", "merges.txt", "*.jinja")
# Licences, which exports pass on; the hub's patterns distinguish big and small letters.
_TERMS = ("*LICEN[CS]E*", "*icen[cs]e*", "*USE_POLICY*", "*se_[Pp]olicy*", "*NOTICE*", "*otice*")


def local_directory(model: str, weights: bool = True, revision: str | None = None) -> pathlib.Path:
    """Finds the directory of a model or adapter, or fetches it from the hub into the cache.

    Args:
      model: a directory, or a hub id, "name" or "org/name".
      weights: False leaves them out, for the tokenizer of a model that runs elsewhere.
      revision: a commit, the last part of a fetched path; None takes the main branch.

    Raises:
      UserError: neither a directory nor an id, no such repository, one that is gated or holds
        pickle weights only, the network fails, or offline it is not in the cache.
    """
    if os.path.isdir(model):
        return pathlib.Path(model)
    try:
        directory = _fetch(model, revision, (*_PATTERNS, _WEIGHTS) if weights else _PATTERNS)
    except Exception as error:  # of several libraries, and of other ones with each release
        raise UserError(_advice(model, error)) from None
    if weights:
        _check_weights(model, directory)
        _fetch_terms(model, directory)
    return directory


def _fetch(model: str, revision: str | None, patterns: Sequence[str]) -> pathlib.Path:
    """Fetches the files at the top; subfolders hold other formats of the same weights."""
    options = {"revision": revision, "allow_patterns": list(patterns), "ignore_patterns": ["*/*"]}
    return pathlib.Path(huggingface_hub.snapshot_download(model, **options))


def _fetch_terms(model: str, directory: pathlib.Path) -> None:
    """Fetches licence files; a cache that others filled is complete without them."""
    if any(any(directory.glob(pattern)) for pattern in _TERMS):
        return
    try:
        _fetch(model, directory.name, _TERMS)
    except Exception as error:  # as above
        logging.warning(
            "the licence files of %r are not in the cache and could not be fetched (%s): exports"
            " of it will lack them",
            *(model, type(error).__name__),
        )


def _check_weights(model: str, directory: pathlib.Path) -> None:
    if any(directory.glob(_WEIGHTS)):
        return
    try:
        files = huggingface_hub.HfApi().list_repo_files(model)
    except Exception:  # offline, for example: only the cache's files can be named
        files = [path.name for path in directory.iterdir()]
    pickles = sorted(f for f in files if any(pathlib.PurePath(f).match(kind) for kind in PICKLES))
    if pickles:
        raise UserError(pickle_refusal(f"the hub's {model!r}", pickles))
    raise UserError(
        f"the hub's {model!r} holds no *.safetensors file, or none that was fetched into"
        f" {directory}"
    )


def _advice(model: str, error: Exception) -> str:
    """Says what happened and what the user can do."""
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    if isinstance(cause, errors.HFValidationError):
        return f'{model!r} is neither a directory here nor a hub id ("name" or "org/name")'
    if isinstance(cause, errors.GatedRepoError):
        return (
            f"{model!r} is gated: accept its licence on https://huggingface.co/{model} and set"
            " HF_TOKEN to a token of that account"
        )
    if isinstance(cause, errors.RepositoryNotFoundError):
        return (
            f"{model!r} is no directory here, and the hub knows no such model; if it is private,"
            " set HF_TOKEN"
        )
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        if status in (401, 403):
            return f"the hub refuses {model!r} (status {status}): is HF_TOKEN right, still valid?"
        return f"the hub answers {status} for {model!r}; try again, or give a directory"
    if isinstance(cause, errors.OfflineModeIsEnabled) or cause is None:
        return (
            f"{model!r} is no directory here and not, or not whole, in the hub cache, and"
            " HF_HUB_OFFLINE is set: unset it once to fetch the model"
        )
    return (
        f"{model!r} is no directory here and could not be fetched from the hub"
        f" ({type(cause).__name__}); check network, disk space and HF_TOKEN, or give a directory"
    )
