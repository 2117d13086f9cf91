"""Pushes a finished folder to the Hugging Face hub; name and login are checked before the work that
makes the folder."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

from lsg_flax.hub.download import needed_files
from lsg_flax.hub.sentence_files import read_modules

_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


class PushError(OSError):
    """A folder could not be pushed to the hub; the folder is unchanged."""


def check_repository(name: str) -> None:
    """Raises ValueError unless the name is valid for a repository, such as "me/areas"."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"push_to_hub={name!r} is not a valid repository name on the hub: {error} Give "
            "USER/NAME, such as 'me/areas'."
        ) from error


def check_push(name: str) -> None:
    """Checks the repository's name and the login, before the work whose result will be pushed.

    Raises:
        ValueError: for an invalid name, and without a token with write access.
        PushError: if the hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import constants  # which huggingface_hub alone does not import

    check_repository(name)
    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"push_to_hub={name!r} needs the network, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE "
            "is set; unset it, or leave push_to_hub out."
        )
    if huggingface_hub.get_token() is None:
        raise ValueError(
            f"push_to_hub={name!r} needs a token for the hub, but there is none: {_LOGIN}."
        )
    with _explained(f"nothing was started: push_to_hub={name!r}", "run again, or leave it out"):
        user = huggingface_hub.HfApi().whoami()
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(
            f"push_to_hub={name!r} needs a token that may write, but that of {user['name']} may "
            f"only read: {_LOGIN}."
        )


def push_folder(folder: str | os.PathLike, name: str) -> str:
    """Uploads a checkpoint and its documents, but no other files of its folder, to a repository,
    which is created if needed.

    Returns:
        The repository's address.

    Raises:
        PushError: if it fails; the folder is unchanged.
    """
    import huggingface_hub

    place = pathlib.Path(folder)
    api = huggingface_hub.HfApi()
    again = f"{place} is complete; push it with `hf upload {name} {place}`, or run the same command"
    with _explained(f"{place} was not pushed to {name}", again):
        repository = api.create_repo(name, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=place,
            allow_patterns=_files_of(place),
            commit_message="Model by lsg_flax",
        )
    return str(repository)


def _files_of(folder: pathlib.Path) -> list[str]:
    modules = [place.relative_to(folder).as_posix() for _, place in read_modules(folder)]
    there = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    return needed_files(there, [place for place in modules if place != "."])


@contextlib.contextmanager
def _explained(what: str, remedy: str) -> Iterator[None]:
    """Turns every error into a PushError: its type depends on huggingface_hub's version, for
    failures of the network as well."""
    try:
        yield
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            remedy = f"{_LOGIN}; {remedy}"
        elif status is None:
            remedy = f"check the network; {remedy}"
        said = " ".join(str(error).split()).rstrip(".")
        raise PushError(f"{what}: {said}. What to do: {remedy}.") from error
