"""An adapter folder pushed to a model repository: one commit, nothing lost that was there."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clear_adapters.config import ClearConfig, is_hub_id
from clear_adapters.download import explain, git_oid, hide, is_transport, status_of
from clear_adapters.errors import AdapterError, ClearError, ClearValueError
from clear_adapters.hub.card import (
    BEGIN,
    EVAL_RESULTS,
    FIGURE,
    GENERATED,
    README,
    metadata_of,
    render_card,
    render_scores,
)
from clear_adapters.hub.facts import CardFacts, collect_facts
from clear_adapters.hub.figure import draw_figure
from clear_adapters.store import CONFIG, FILES

if TYPE_CHECKING:
    from huggingface_hub import HfApi


_WAITS = (1.0, 2.0, 4.0)
"""Seconds between the tries of a commit."""


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
    results: Sequence[str | Path] = (),
    license: str | None = None,
    replaces: Callable[[ClearConfig], bool] | None = None,
) -> Pushed:
    """Uploads an adapter folder to a model repository of the Hub, in one commit.

    The folder is read and checked first. Only the adapter's own files and its card go up, whatever else lies in the folder;
    files of an adapter that was there before and that this one has not are deleted, others stay. A README that is there keeps
    its own text; where there is none, that of the folder goes up with the card in it.

    Args:
        folder: of the adapter.
        repo_id: `owner/name`; the repository is made if there is none.
        private: whether a repository that is made is; None is the account's default.
        revision: branch; one that does not exist begins where the main branch is. None is the main branch.
        create_pr: propose the files in a pull request instead.
        token: None is the one of `hf auth login` or `HF_TOKEN`.
        commit_message: of the commit.
        overwrite: replace another adapter that is there, and take scores away that are there and not in `results`. A pull
            request overwrites nothing and needs it not.
        results: result files whose scores of this very adapter the card shows.
        license: of the adapter, as the Hub writes it (`apache-2.0`); None leaves it open.
        replaces: told what the adapter that is there says about itself, whether it may be replaced without `overwrite`.

    Raises:
        ClearValueError: no Hub id; a result file that did not measure this adapter; or a public repository where a private
            one is asked for.
        BrokenEntryError: there are scores, and matplotlib, which draws them, is not installed.
        AdapterError: the folder is no adapter, another adapter or scores are there, or the Hub does not take the files;
            nothing was changed then but that a repository or branch may have been made, as the message says.
    """
    if not is_hub_id(repo_id):
        raise ClearValueError(f"repo_id={repo_id!r}: a repository of the Hub is named 'owner/name'")
    if not commit_message.strip():
        raise ClearValueError("commit_message is empty: the Hub wants one")
    folder = Path(folder)
    branch = revision if revision not in (None, "main") and not create_pr else None
    facts = collect_facts(folder, repo_id, results=results, license=license, revision=branch)
    if not results and (folder / EVAL_RESULTS).is_file():
        raise ClearValueError(
            f"{folder} has a card with scores ({EVAL_RESULTS}): pass the result files again (results=, --results), so that "
            "they are checked against these weights, or delete that file"
        )
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    files |= drawn_files(facts)
    own = _text(folder / README) if (folder / README).is_file() else None
    settings = _Settings(revision, create_pr, private, overwrite, commit_message, token, replaces)
    made: list[str] = []
    try:
        return _push(repo_id, facts, files, own, made, settings)
    except ClearError:
        raise
    except Exception as cause:  # the client raises its own errors and those of its transport
        left = f" {' and '.join(made)} was made before, without this adapter." if made else ""
        refusal = AdapterError(
            f"the adapter was not pushed to {repo_id!r}: {explain(cause, repo_id, revision, token)}.{left}"
        )
        raise refusal from (cause if hide(str(cause), token) == str(cause) else None)


def drawn_files(facts: CardFacts) -> dict[str, bytes]:
    """What stands beside a card, by name: figure and scores, where there are scores.

    Raises:
        BrokenEntryError: matplotlib is not installed.
    """
    figure, scores = draw_figure(facts), render_scores(facts)
    return {
        **({} if figure is None else {FIGURE: figure}),
        **({} if scores is None else {EVAL_RESULTS: scores.encode()}),
    }


@dataclass(frozen=True)
class _Settings:
    revision: str | None
    create_pr: bool
    private: bool | None
    overwrite: bool
    commit_message: str
    token: str | None
    replaces: Callable[[ClearConfig], bool] | None


def _push(
    repo_id: str,
    facts: CardFacts,
    files: dict[str, bytes],
    own: str | None,
    made: list[str],
    settings: _Settings,
) -> Pushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, revision = HfApi(token=settings.token), settings.revision
    head = _prepare(api, repo_id, made, settings)
    there = _remote(api, repo_id, head)
    differing = [n for n in FILES if n in there and (n not in files or there[n] != _oid(files[n], there[n]))]
    # A branch of this push's own begins as a copy of the main one.
    is_free = settings.overwrite or settings.create_pr or bool(made)
    allowed = is_free or not differing
    if not allowed and settings.replaces is not None and CONFIG in there:
        config = ClearConfig.from_json(_fetched(api, repo_id, CONFIG, head), f"{repo_id}: {CONFIG}")
        allowed = settings.replaces(config)
    if not allowed:
        raise AdapterError(
            f"{repo_id!r}{f' at {revision!r}' if revision else ''} holds another adapter ({', '.join(differing)} differ): pass "
            "overwrite=True (--overwrite) to replace it, another revision to keep both, or create_pr=True (--create-pr) to "
            "propose it"
        )
    if README in there:
        own = _fetched(api, repo_id, README, head)
    card = render_card(facts, own)
    if not is_free:
        _keep_scores(repo_id, there, files, own if README in there else None, card)
    files = {**files, README: card.encode()}
    deleted = [name for name in there if name not in files]
    for wait in (*_WAITS, None):
        operations: list[Any] = [CommitOperationAdd(name, content) for name, content in files.items()]
        operations += [CommitOperationDelete(name) for name in deleted]
        try:
            commit = api.create_commit(
                repo_id,
                operations,
                commit_message=settings.commit_message,
                revision=revision,
                create_pr=settings.create_pr,
                parent_commit=head,
            )
            return Pushed(repo_id, commit.oid, str(commit.commit_url), commit.oid != head, commit.pr_url)
        except Exception as error:
            # The client sends a commit once. With its parent named it can be sent again: it is made once or refused.
            if settings.create_pr or not _may_pass(error):
                raise
            done = _made_already(api, repo_id, revision, head, files)
            if done is not None:
                return Pushed(repo_id, done, f"{api.endpoint}/{repo_id}/commit/{done}", True)
            if wait is None or status_of(error) == 412:
                raise
            time.sleep(wait)
    raise AssertionError("unreachable")


def _keep_scores(
    repo_id: str, there: dict[str, str], files: dict[str, bytes], readme: str | None, card: str
) -> None:
    """Refuses to take scores away that this push has not, or to write over some that no card of ours has."""
    drawn = [n for n in (EVAL_RESULTS, FIGURE) if n in there]
    lost = [n for n in drawn if n not in files]
    if "model-index" in metadata_of(readme or "") and "model-index" not in metadata_of(card):
        lost.append("model-index")
    if lost:
        raise AdapterError(
            f"{repo_id!r} has scores: pass results= again, or overwrite=True (--results, --overwrite) to take "
            f"{', '.join(lost)} away"
        )
    foreign = [n for n in drawn if there[n] != _oid(files[n], there[n])]
    if foreign and BEGIN not in (readme or ""):
        raise AdapterError(
            f"{repo_id!r} has {', '.join(foreign)} and no card that they are of: pass overwrite=True (--overwrite) to replace "
            "them"
        )


def _may_pass(error: Exception) -> bool:
    status = status_of(error)
    return is_transport(error) or status in (412, 429) or (status is not None and status >= 500)


def _made_already(
    api: HfApi, repo_id: str, revision: str | None, parent: str, files: dict[str, bytes]
) -> str | None:
    """The commit with these files that the answer to was lost."""
    try:
        head = str(api.repo_info(repo_id, revision=revision).sha)
        there = {} if head == parent else _remote(api, repo_id, head)
    except Exception as error:
        if _may_pass(error):
            return None  # the next try will tell
        raise
    return head if all(there.get(n) == _oid(c, there.get(n)) for n, c in files.items()) else None


def _prepare(api: HfApi, repo_id: str, made: list[str], settings: _Settings) -> str:
    """The commit that the files go on top of; makes repository and branch where there are none."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    private, revision, create_pr = settings.private, settings.revision, settings.create_pr
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


def _remote(api: HfApi, repo_id: str, commit: str) -> dict[str, str]:
    """Those of our files that the repository has: git's name of each, or the SHA-256 of a large one."""
    from huggingface_hub.hf_api import RepoFile

    found = api.get_paths_info(repo_id, [*FILES, *GENERATED], revision=commit)
    return {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in found if isinstance(f, RepoFile)}


def _fetched(api: HfApi, repo_id: str, name: str, commit: str) -> str:
    with tempfile.TemporaryDirectory() as temporary:
        return _text(Path(api.hf_hub_download(repo_id, name, revision=commit, local_dir=temporary)))


def _oid(content: bytes, like: str | None) -> str:
    """The same of a file here; `like` tells by its length which of the two."""
    if like is not None and len(like) == 64:
        return hashlib.sha256(content).hexdigest()
    return git_oid(content)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise AdapterError(f"the {path.name} that is there is not UTF-8 text: mend or remove it") from error
