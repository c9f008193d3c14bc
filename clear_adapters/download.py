"""Models and adapters of the Hub brought to this machine, and what its client says put into words."""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHORTEST = 6
"""Characters of a token; a shorter one keeps no secret, and would be found in every word."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def download(
    repo_id: str, patterns: Sequence[str], *, revision: str | None = None, token: str | None = None
) -> Path:
    """The folder in the Hub's cache with the files of a model repository that match; what is there is not asked for again.

    Args:
        repo_id: `owner/name`.
        patterns: of the names of files that are wanted; others stay where they are.
        revision: branch, tag, commit or pull request; None is the main branch.
        token: for private repositories; None is the one that the client was given by `hf auth login` or `HF_TOKEN`.

    Raises:
        Exception: what the client raises; `explain` puts it into words.
    """
    from huggingface_hub import snapshot_download

    def fetch(from_cache: bool = False) -> Path:
        found = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            allow_patterns=list(patterns),
            local_files_only=from_cache,
        )
        return Path(found)

    try:
        return fetch()
    except Exception as error:
        if not is_transport(error):
            raise
        # The client goes to its cache by itself after some failures of the connection, and after others not.
        try:
            return fetch(from_cache=True)
        except OSError:
            raise error from None


def commit_of(folder: Path) -> str | None:
    """The commit that a folder in the Hub's cache is of; None for other folders."""
    is_snapshot = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)
    return folder.name if is_snapshot else None


def listing_of(folder: Path) -> list[str]:
    """Names of all files of the repository that a folder in the Hub's cache is of, downloaded or not."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    commit = commit_of(folder)
    if commit is None:
        return []
    repo_id = folder.parents[1].name.removeprefix("models--").replace("--", "/")
    try:
        tree = get_cached_repo_tree(repo_id, revision=commit, cache_dir=folder.parents[2])
    except CachedRepoTreeNotFoundError:
        return []  # cached by a client that kept no listing
    return [f.path for f in tree]


def is_damaged(path: Path) -> bool:
    """Whether a file in the Hub's cache is not what the Hub said it is.

    The cache names contents by what the Hub calls them: large ones by their SHA-256, others as git does. Where it keeps no
    links to contents, nothing is known.
    """
    name = path.resolve().name
    if not path.is_symlink() or re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name) is None:
        return False
    if len(name) == 64:
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest() != name
    return git_oid(path.read_bytes()) != name


def git_oid(content: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def explain(error: BaseException, repo_id: str, revision: str | None, token: str | None = None) -> str:
    """What went wrong between this machine and the Hub, and what to do.

    Args:
        error: what the client raised.
        repo_id: `owner/name`.
        revision: that was asked for.
        token: that was passed; it is not repeated whatever the client says.
    """
    from huggingface_hub import errors

    cause = error
    wrappers = (errors.LocalEntryNotFoundError, RuntimeError)
    while (
        isinstance(cause, wrappers)
        and not isinstance(cause, errors.IncompleteSnapshotError)
        and cause.__cause__
    ):
        cause = cause.__cause__
    status = status_of(cause)
    where = f"{repo_id!r}{f' at revision {revision!r}' if revision else ''}"
    said = hide(f"{type(cause).__name__}: {' '.join(str(cause).split())}", token)
    if isinstance(cause, errors.OfflineModeIsEnabled):
        words = f"HF_HUB_OFFLINE is set, and the cache does not hold {where} whole: load it once with a connection, or unset it"
    elif isinstance(cause, errors.IncompleteSnapshotError):
        words = f"the cache holds a part of {where} only, and the Hub cannot be reached: load it once with a connection"
    elif isinstance(cause, errors.GatedRepoError):
        words = f"{where} is gated: ask for access on its page, and log in (`hf auth login`) with an account that has it"
    elif isinstance(cause, errors.RevisionNotFoundError):
        words = f"the Hub has {repo_id!r}, but no revision {revision!r}: check the branch, tag or commit"
    elif isinstance(cause, errors.RepositoryNotFoundError):
        words = (
            f"the Hub has no {where}, or it is private and the token does not see it: check the id 'owner/name', and log in "
            "(`hf auth login`) or pass a token of someone who may read it"
        )
    elif status == 401:
        words = (
            "the Hub does not know this token (401): log in again with `hf auth login`, or set HF_TOKEN anew"
        )
    elif status == 403:
        words = f"the token may not do this with {where} (403): it needs the right to, of an account that owns or may write it"
    elif status in (409, 412):
        words = (
            f"{where} was changed at the same time ({status}): nothing was written; look at it and try again"
        )
    elif status == 429:
        words = "the Hub has had too many requests (429), and went on refusing after several tries: wait some minutes"
    elif status is not None and status >= 500:
        words = f"the Hub has trouble of its own ({status}), and went on after several tries: try again later"
    elif isinstance(cause, OSError) and cause.errno in _FULL:
        words = "there is no room on this disk: make some, or set HF_HOME to another disk"
    elif is_transport(cause):
        words = f"the connection to the Hub for {where} failed, and went on failing after several tries: check the network"
    else:
        words = f"the Hub's client could not do it for {where}"
    return f"{words} ({said[:400]})"


def hide(text: str, token: str | None) -> str:
    """A text without the token, the one that the client is logged in with, and anything that has the form of one."""
    from huggingface_hub import get_token

    known = [t for t in (token, get_token()) if isinstance(t, str)]
    # Some errors quote it as Python writes strings.
    secrets = {form for t in known for form in (t, t.strip(), repr(t)[1:-1])}
    patterns = [re.escape(s) for s in sorted(secrets, key=len, reverse=True) if len(s) >= _SHORTEST]
    return re.sub("|".join([*patterns, r"(?<=Bearer )[^\s'\"]+", r"hf_[\w.-]+"]), "<token>", text)


def status_of(error: BaseException) -> int | None:
    """Of the answer that an error is about; None where there was none."""
    response: Any = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def is_transport(error: BaseException) -> bool:
    """Whether the connection failed, and not the Hub."""
    # The client has changed its transport before; these names stayed.
    names = {base.__name__ for base in type(error).__mro__}
    return bool(names & {"TransportError", "ConnectionError", "TimeoutError"})
