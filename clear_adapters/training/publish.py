"""A run's adapter published on the Hub, while it trains and when it is finished."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import TrainerCallback

from clear_adapters.config import ClearConfig
from clear_adapters.download import explain, hide
from clear_adapters.errors import AdapterError, ClearError
from clear_adapters.hub.push import Pushed, push_folder
from clear_adapters.training.recipe import HubSettings

_LOG = logging.getLogger(__name__)


class Publisher(TrainerCallback):
    """Pushes the adapter folder alone: checkpoints, optimizer states and logs stay where they are."""

    def __init__(
        self,
        settings: HubSettings,
        facts: Mapping[str, Any],
        before: Mapping[str, Any] | None,
        save: Callable[[Path], Path],
    ) -> None:
        """Gets ready.

        Args:
            settings: where to.
            facts: what tells this run from others; an adapter with these in its provenance is replaced.
            before: provenance of the adapter that the run began with, which is replaced too.
            save: writes the adapter as it is now to a folder.
        """
        self._settings = settings
        self._facts = facts
        self._before = before
        self._save = save

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Every so many steps: a push that fails is told of, and the run goes on."""
        step, every = state.global_step, self._settings.every
        # The last step's adapter is pushed when it is finished.
        if not every or step % every or step == state.max_steps or not state.is_world_process_zero:
            return
        assert self._settings.repo_id is not None
        try:
            with tempfile.TemporaryDirectory() as temporary:
                self._push(self._save(Path(temporary) / "adapter"), f"Upload CLEAR adapter at step {step}")
        except (ClearError, OSError, SafetensorError) as error:
            _LOG.warning(
                "step %d: %s. The run goes on, and the next push brings what is missing", step, error
            )

    def finish(self, folder: Path) -> Pushed:
        """Pushes the finished adapter; does nothing where it is there already.

        Raises:
            AdapterError: the Hub does not take it; the adapter is finished and stands in its folder.
        """
        try:
            return self._push(folder, "Upload CLEAR adapter")
        except ClearError as error:
            raise AdapterError(
                f"the adapter is finished, in {folder}, but was not published: {error}. Give the same command again, or "
                f"`clear-adapters push {folder} {self._settings.repo_id}`"
            ) from error

    def _push(self, folder: Path, message: str) -> Pushed:
        own = self._settings
        assert own.repo_id is not None
        return push_folder(
            folder,
            own.repo_id,
            private=own.private,
            revision=own.revision,
            commit_message=message,
            overwrite=own.overwrite,
            license=own.license,
            replaces=self._is_ours,
        )

    def _is_ours(self, there: ClearConfig) -> bool:
        made = there.provenance
        return all(made.get(k) == v for k, v in self._facts.items()) or (
            # An adapter that says nothing of its making could be anyone's.
            bool(self._before) and dict(made) == dict(self._before or {})
        )


def check_access(settings: HubSettings) -> None:
    """Asks the Hub who the token is of, so that a run of hours does not end before a closed door.

    Raises:
        AdapterError: there is no token, or the Hub does not know it or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as cause:  # the client raises its own errors and those of its transport
        refusal = AdapterError(
            f"hub.repo_id={settings.repo_id!r}, but nothing can be pushed there: {explain(cause, str(settings.repo_id), None)}. "
            "Log in with `hf auth login`, or leave hub.repo_id out and push the finished folder"
        )
        raise refusal from (cause if hide(str(cause), None) == str(cause) else None)
