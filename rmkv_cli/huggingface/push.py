"""Hugging Face folders to the hub."""

import re
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from rmkv_cli.errors import UserError
from rmkv_cli.huggingface.folder import require_exported


def push_folder(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder that `export_folder` wrote, in one commit; return the address of what is there now.

    A repository that is absent is made; one that is there keeps its other files. The card that goes up names the
    repository where the folder's own names the folder.

    Raises:
        UserError: the folder is something else, the name is none, the repository is public and should be `private`, or
            the hub refuses or cannot be reached.
    """
    require_exported(folder)
    hub = constants.ENDPOINT
    if get_token() is None:
        raise UserError(f"no token for {hub}: log in by `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        if private and not api.model_info(repo).private:
            raise UserError(f"{repo} is there already, and public: make it private at {hub}/{repo}/settings")
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        sent = [
            CommitOperationAdd(name, _card(path, repo) if name == "README.md" else path)
            for name, path in files.items()
            if name.partition("/")[0] not in (".cache", ".git")
        ]
        return str(api.create_commit(repo, sent, commit_message="Upload by rmkv push").commit_url)
    except HFValidationError:
        raise UserError(f"'{repo}' is no name of a repository; wants OWNER/NAME") from None
    except ValueError as error:  # what the hub says of the card's metadata
        raise UserError(f"{folder / 'README.md'}: {' '.join(str(error).split())}") from None
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE is set, so the hub is not asked; unset it to push") from None
    except HfHubHTTPError as error:
        raise UserError(_refusal(error, repo)) from None
    except (httpx2.HTTPError, ConnectionError, TimeoutError, RuntimeError) as error:
        what = error.__cause__ if isinstance(error, RuntimeError) else error  # how a large file that failed is told
        raise UserError(
            f"the hub at {hub} cannot be reached ({' '.join(str(what).split())}); is there a network?"
        ) from None


def _card(path: Path, repo: str) -> bytes:
    """Return the card with the repository in the title and the code, where the exported folder is named."""
    card = path.read_text(encoding="utf-8", errors="surrogateescape")
    if code := re.search(r'from_pretrained\("([^"]+)"', card):
        card = card.replace(code[0], f'from_pretrained("{repo}"')
        card = card.replace(f"\n# {code[1]}\n", f"\n# {repo}\n", 1)
    return card.encode("utf-8", "surrogateescape")


def _refusal(error: HfHubHTTPError, repo: str) -> str:
    """Return what the hub's answer means, in one line."""
    what, hub = str(error).strip().partition("\n")[0], constants.ENDPOINT
    match error.response.status_code:
        case 401:
            return f"{hub} does not accept the token: log in again by `hf auth login`, or set HF_TOKEN"
        case 403:
            return f"the token has no right to write to {repo} at {hub}: log in by `hf auth login` with one that has"
        case _:
            return f"{hub} did not take {repo}: {what}"
