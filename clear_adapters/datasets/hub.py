"""Files of data sets, from folders and from dataset repositories of the Hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from clear_adapters.config import is_hub_id
from clear_adapters.errors import ClearValueError


@dataclass(frozen=True)
class Found:
    """Where the files are that were looked for.

    Attributes:
        files: path by name; one of a repository is downloaded when it is asked for.
        missing: names that no source has.
        revisions: commit by repository that was asked.
    """

    files: Mapping[str, Path]
    missing: tuple[str, ...]
    revisions: dict[str, str]


class Source:
    """A folder, or a dataset repository of the Hub; its files are known by name wherever they lie below it.

    Attributes:
        name: as it was given.
        revision: the commit of a repository; None of a folder.
    """

    def __init__(self, name: str | Path, *, revision: str | None = None, token: str | None = None) -> None:
        """Lists the files; none is downloaded.

        Args:
            name: a folder or `owner/name`.
            revision: branch, tag or commit of a repository.
            token: for a private one; the client's own login by default.

        Raises:
            ClearValueError: neither a folder nor a repository that can be read, or two files of one name.
        """
        self.name = str(name)
        self.revision: str | None = None
        self._token = token
        folder = Path(self.name).expanduser()
        if folder.is_dir():
            paths = sorted(p for p in folder.rglob("*.tsv") if p.is_file())
            self._files = _by_name(self.name, [p.relative_to(folder).as_posix() for p in paths])
            self._folder: Path | None = folder
            return
        if isinstance(name, Path) or not is_hub_id(self.name):
            raise ClearValueError(
                f"{self.name!r} is neither a folder nor a dataset repository of the Hub: check the path, or write owner/name"
            )
        self._folder = None
        self._list(revision)

    def _list(self, revision: str | None) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            info = HfApi(token=self._token).dataset_info(self.name, revision=revision)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ClearValueError(
                f"{self.name!r} is no folder here, and the Hub gives no dataset repository of that name: {reason}"
            ) from error
        self.revision = info.sha
        self._listed = [s.rfilename for s in info.siblings or ()]
        self._files = _by_name(self.name, [n for n in self._listed if n.endswith(".tsv")])

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def path(self, name: str) -> Path:
        """The file of a name, downloaded into the client's cache if need be, with a `manifest.json` beside it.

        Raises:
            KeyError: the source has none.
            ClearValueError: the download failed.
        """
        place = self._files[name]
        if self._folder is not None:
            return self._folder / place
        manifest = str(PurePosixPath(place).with_name("manifest.json"))
        if manifest in self._listed:
            self._download(manifest)
        return self._download(place)

    def _download(self, place: str) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(
                hf_hub_download(
                    self.name, place, repo_type="dataset", revision=self.revision, token=self._token
                )
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ClearValueError(f"{place} of {self.name!r} could not be downloaded: {reason}") from error


def _by_name(source: str, paths: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in paths:
        name = PurePosixPath(path).name
        if name in found:
            raise ClearValueError(
                f"{source} holds {name} twice, as {found[name]} and as {path}: give the folder that is meant"
            )
        found[name] = path
    return found


class _Files(Mapping[str, Path]):
    """Files by name, each fetched when it is asked for, so that what is missing can be told before."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = sources

    def __getitem__(self, name: str) -> Path:
        return self._sources[name].path(name)

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def locate(sources: Iterable[Source], names: Iterable[str]) -> Found:
    """Looks files up by name; the first source that has one gives it. Nothing is downloaded yet.

    Args:
        sources: where to look, in order.
        names: what to look for.
    """
    sources = list(sources)
    chosen: dict[str, Source] = {}
    missing = []
    for name in dict.fromkeys(names):
        source = next((s for s in sources if name in s), None)
        if source is None:
            missing.append(name)
        else:
            chosen[name] = source
    return Found(
        _Files(chosen), tuple(missing), {s.name: s.revision for s in sources if s.revision is not None}
    )
