"""Models by their name on the Hugging Face hub, through its own cache.

HF_HOME, HF_HUB_OFFLINE and HF_TOKEN are huggingface_hub's to read. No message repeats what an
exception of it says, as headers and addresses can stand in there, and with them the token.
"""

import os
import pathlib

import huggingface_hub
from absl import logging
from huggingface_hub import errors

from gkdjax.models.hf.tensor_files import PICKLES, pickle_refusal
from gkdjax.utils.errors import UserError

_WEIGHTS = "*.safetensors"
# Everything small beside the weights that a model, a tokenizer or an adapter is loaded with.
_PATTERNS = ("*.json", "tokenizer.model", "merges.txt", "*.jinja")
# The terms that exports pass on; the hub's patterns know big and small letters apart.
_TERMS = ("*LICEN[CS]E*", "*icen[cs]e*", "*USE_POLICY*", "*se_[Pp]olicy*", "*NOTICE*", "*otice*")
_SUBFOLDERS = "*/*"  # other formats of the same weights


def local_directory(model: str, weights: bool = True, revision: str | None = None) -> pathlib.Path:
    """The directory of a model or adapter, fetched from the hub if it is not one already.

    Args:
      model: a directory, or a hub id, "name" or "org/name". What the cache holds whole is not
        fetched again.
      weights: False fetches what stands beside them only, for the tokenizer of a model that is
        run elsewhere.
      revision: a commit of the repository; None takes its main branch. The last part of the path
        that comes back is the commit.

    Raises:
      UserError: neither a directory nor an id, no such repository, one that is gated or holds
        pickle weights only, the network fails, or offline it is not in the cache.
    """
    if os.path.isdir(model):
        return pathlib.Path(model)
    try:
        fetched = huggingface_hub.snapshot_download(
            model,
            revision=revision,
            allow_patterns=[*_PATTERNS, _WEIGHTS] if weights else list(_PATTERNS),
            ignore_patterns=[_SUBFOLDERS],
        )
    except Exception as error:  # of several libraries, and of other ones with each release
        raise UserError(_advice(model, error)) from None
    if weights:
        _check_weights(model, pathlib.Path(fetched))
        _fetch_terms(model, pathlib.Path(fetched))
    return pathlib.Path(fetched)


def _fetch_terms(model: str, directory: pathlib.Path) -> None:
    """Fetches licence files; apart, as a cache that others filled is whole without them."""
    if any(any(directory.glob(pattern)) for pattern in _TERMS):
        return
    try:
        huggingface_hub.snapshot_download(
            model,
            revision=directory.name,
            allow_patterns=list(_TERMS),
            ignore_patterns=[_SUBFOLDERS],
        )
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
    except Exception:  # offline, say; then only what the cache has can be named
        files = [path.name for path in directory.iterdir()]
    pickles = sorted(file for file in files if _is_pickle(file))
    if pickles:
        raise UserError(pickle_refusal(f"the hub's {model!r}", pickles))
    raise UserError(
        f"the hub's {model!r} holds no *.safetensors file, or none that was fetched into"
        f" {directory}"
    )


def _is_pickle(file: str) -> bool:
    return any(pathlib.PurePath(file).match(kind) for kind in PICKLES)


def _advice(model: str, error: Exception) -> str:
    """What happened, in the words of what the user can do."""
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
    status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
    if status in (401, 403):
        return f"the hub refuses {model!r} (status {status}): is HF_TOKEN right, and still valid?"
    if status is not None:
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
