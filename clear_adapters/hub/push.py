"""An adapter folder pushed to a model repository: one commit, nothing lost that was there."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clear_adapters.config import is_hub_id
from clear_adapters.download import explain, hide
from clear_adapters.errors import AdapterError, ClearError, ClearValueError
from clear_adapters.store import CONFIG, FILES, read_adapter

if TYPE_CHECKING:
    from huggingface_hub import HfApi

README = "README.md"


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        repo_id: the repository.
        commit: the commit that has the files.
        url: its address.
        changed: whether a commit was made; False where everything was there already.
        pull_request: address of the pull request, if one was asked for.
    """

    repo_id: str
    commit: str
    url: str
    changed: bool
    pull_request: str | None = None


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str = "Upload CLEAR adapter",
    overwrite: bool = False,
) -> Pushed:
    """Uploads an adapter folder to a model repository of the Hub, in one commit.

    The folder is read and checked first. Only the adapter's own files go up, whatever else lies in the folder; files of an
    adapter that was there before and that this one has not are deleted, others stay.

    Args:
        folder: of the adapter.
        repo_id: `owner/name`; the repository is made if there is none.
        private: whether a repository that is made is; None is the account's default.
        revision: branch; one that does not exist begins where the main branch is. None is the main branch.
        create_pr: propose the files in a pull request instead.
        token: None is the one of `hf auth login` or `HF_TOKEN`.
        commit_message: of the commit.
        overwrite: replace another adapter that is there. A pull request overwrites nothing and needs it not.

    Raises:
        ClearValueError: no Hub id; or a public repository where a private one is asked for.
        AdapterError: the folder is no adapter, another adapter is there, or the Hub does not take the files; nothing was
            changed then but that a repository or branch may have been made, as the message says.
    """
    if not is_hub_id(repo_id):
        raise ClearValueError(f"repo_id={repo_id!r}: a repository of the Hub is named 'owner/name'")
    if not commit_message.strip():
        raise ClearValueError("commit_message is empty: the Hub wants one")
    read_adapter(folder)
    made: list[str] = []
    try:
        return _push(
            Path(folder), repo_id, made, private, revision, create_pr, token, commit_message, overwrite
        )
    except ClearError:
        raise
    except Exception as cause:  # the client raises its own errors and those of its transport
        left = f" {' and '.join(made)} was made before, and is empty." if made else ""
        refusal = AdapterError(
            f"the adapter was not pushed to {repo_id!r}: {explain(cause, repo_id, revision, token)}.{left}"
        )
        raise refusal from (cause if hide(str(cause), token) == str(cause) else None)


def _push(
    folder: Path,
    repo_id: str,
    made: list[str],
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    token: str | None,
    commit_message: str,
    overwrite: bool,
) -> Pushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=token)
    head = _prepare(api, repo_id, made, private, revision, create_pr)
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    there = _remote(api, repo_id, head, FILES)
    differing = [n for n in FILES if n in there and (n not in files or there[n] != _oid(n, files[n], there[n]))]
    if differing and not overwrite and not create_pr:
        raise AdapterError(
            f"{repo_id!r}{f' at {revision!r}' if revision else ''} holds another adapter ({', '.join(differing)} differ): pass "
            "overwrite=True (--overwrite) to replace it, another revision to keep both, or create_pr=True (--create-pr) to "
            "propose it"
        )
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in files.items()]
    operations += [CommitOperationDelete(name) for name in differing if name not in files]
    try:
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=head,
        )
    except HfHubHTTPError as error:
        # The answer to a commit that was made may be lost, and the client's next try then finds the branch moved on.
        if error.response.status_code != 412 or create_pr:
            raise
        head = str(api.repo_info(repo_id, revision=revision).sha)
        there = _remote(api, repo_id, head, FILES)
        if any(there.get(n) != _oid(n, c, there.get(n)) for n, c in files.items()):
            raise
        return Pushed(repo_id, head, f"{api.endpoint}/{repo_id}/commit/{head}", True)
    return Pushed(repo_id, commit.oid, str(commit.commit_url), commit.oid != head, commit.pr_url)


def _prepare(
    api: HfApi, repo_id: str, made: list[str], private: bool | None, revision: str | None, create_pr: bool
) -> str:
    """The commit that the files go on top of; makes repository and branch where there are none."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = api.repo_info(repo_id)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        if create_pr:
            raise
        api.create_repo(repo_id, private=private, exist_ok=False)
        made.append(f"the repository {repo_id!r}")
        info = api.repo_info(repo_id)
    else:
        if private and not info.private:
            raise ClearValueError(
                f"private=True, but {repo_id!r} exists and is public: everybody would see the adapter. Make it private on its "
                "settings page, or choose another repository"
            )
    if revision is None:
        return str(info.sha)
    try:
        return str(api.repo_info(repo_id, revision=revision).sha)
    except RevisionNotFoundError:
        if create_pr or revision.startswith("refs/"):
            raise
        api.create_branch(repo_id, branch=revision, exist_ok=True)
        made.append(f"the branch {revision!r}")
        return str(api.repo_info(repo_id, revision=revision).sha)


def _remote(api: HfApi, repo_id: str, commit: str, names: Sequence[str]) -> dict[str, str]:
    """Git's name, or of a large file the SHA-256, of those files that the repository has."""
    found = api.get_paths_info(repo_id, list(names), revision=commit)
    return {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in found if hasattr(f, "blob_id")}


def _oid(name: str, content: bytes, like: str | None) -> str:
    """The same of a file here; `like` tells which of the two."""
    if like is not None and len(like) == 64:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
