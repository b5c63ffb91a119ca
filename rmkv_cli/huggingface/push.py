"""Upload of exported folders to the Hugging Face hub."""

import re
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from rmkv_cli.errors import UserError
from rmkv_cli.huggingface.folder import require_exported


def push_folder(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder that `export_folder` wrote, in one commit, and return the commit's address.

    The repository is created if it does not exist; otherwise its other files stay. In the uploaded card, the name of
    the repository replaces that of the folder.

    Raises:
        UserError: the folder was not exported by rmkv, the repository's name is invalid, it is public and should be
            `private`, or the hub refuses or cannot be reached.
    """
    require_exported(folder)
    hub = constants.ENDPOINT
    if get_token() is None:
        raise UserError(f"no access token for {hub}; log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        if private and not api.model_info(repo).private:
            raise UserError(f"{repo} already exists and is public; make it private at {hub}/{repo}/settings")
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        sent = [
            CommitOperationAdd(name, _card(path, repo) if name == "README.md" else path)
            for name, path in files.items()
            if name.partition("/")[0] not in (".cache", ".git")
        ]
        return str(api.create_commit(repo, sent, commit_message="Upload by rmkv push").commit_url)
    except HFValidationError:
        raise UserError(f"'{repo}' is not a valid repository name; use OWNER/NAME") from None
    except ValueError as error:  # the hub rejects the card's metadata
        raise UserError(f"{folder / 'README.md'}: {' '.join(str(error).split())}") from None
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE is set, so the hub is not used; unset it to push") from None
    except HfHubHTTPError as error:
        raise UserError(_refusal(error, repo)) from None
    except (httpx2.HTTPError, ConnectionError, TimeoutError, RuntimeError) as error:
        what = error.__cause__ if isinstance(error, RuntimeError) else error  # raised for a large file
        raise UserError(
            f"the hub at {hub} cannot be reached ({' '.join(str(what).split())}); check the network connection"
        ) from None


def _card(path: Path, repo: str) -> bytes:
    """Return the card with the repository's name in place of the folder's, in the title and in the code."""
    card = path.read_text(encoding="utf-8", errors="surrogateescape")
    if code := re.search(r'from_pretrained\("([^"]+)"', card):
        card = card.replace(code[0], f'from_pretrained("{repo}"')
        card = card.replace(f"\n# {code[1]}\n", f"\n# {repo}\n", 1)
    return card.encode("utf-8", "surrogateescape")


def _refusal(error: HfHubHTTPError, repo: str) -> str:
    """Return the meaning of the hub's response in one line."""
    what, hub = str(error).strip().partition("\n")[0], constants.ENDPOINT
    match error.response.status_code:
        case 401:
            return f"{hub} rejects the token; log in again with `hf auth login`, or set HF_TOKEN"
        case 403:
            return f"the token has no write access to {repo} at {hub}; log in with one that has: `hf auth login`"
        case _:
            return f"{hub} rejected {repo}: {what}"
