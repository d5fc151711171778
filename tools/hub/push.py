"""Uploading a folder to the Hugging Face hub."""

from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub
from huggingface_hub.utils import validate_repo_id

from errors import OptionError, first_line

_LOG_IN = "hf auth login, or set HF_TOKEN, with a token that may write"


def check(repository: str) -> None:
    """Raise OptionError for a name that the hub won't take, or where no token is known."""
    try:
        validate_repo_id(repository)
    except hub.HFValidationError as error:
        raise OptionError("push", f"{first_line(error)}; expected OWNER/NAME") from None
    if "/" not in repository:
        raise OptionError("push", f"{repository!r} names no owner: expected OWNER/NAME")
    if not huggingface_hub.get_token():
        raise OptionError("push", f"no token is known: {_LOG_IN}")


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload all files of ``folder``; the repository is made if need be. Returns its address.

    Raises OptionError where the hub refuses or can't be reached.
    """
    api = huggingface_hub.HfApi(library_name="timm")
    try:
        made = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload the trained model"
        )
    except hub.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        way = f": {_LOG_IN}" if status in (401, 403, 404) else ""
        raise OptionError("push", f"{repository} is refused ({_reason(error)}){way}") from None
    except ValueError as error:  # the front matter of the card, which the hub has looked at
        reason = " ".join(str(error).split())
        raise OptionError("push", f"{repository} is refused ({reason}): see --license") from None
    except (hub.HTTPError, OSError) as error:
        raise OptionError(
            "push",
            f"{repository} can't be reached ({_reason(error)}): {folder} is written, upload it "
            f"where there is a network: hf upload {repository} FOLDER",
        ) from None
    return str(made)


def _reason(error: Exception) -> str:
    """What the server said, or what went wrong before it was asked."""
    return getattr(error, "server_message", None) or first_line(error)
