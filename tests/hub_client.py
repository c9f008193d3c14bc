"""The real client of the Hub, turned to a server on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, hf_api

from tests.local_hub import LocalHub

ROOT = Path(__file__).parents[1]
TOKEN = "hf_test"
# The client calls its own transport in a way that this one has moved on from.
DEPRECATED = "ignore:Use 'content=:DeprecationWarning"

ANSWER = """
import hashlib, json, sys
import torch
torch.set_num_threads(1)
from PIL import Image
from clear_adapters import attach
model = attach(device="cpu", **json.loads(sys.argv[1]))
picture = Image.linear_gradient("L").convert("RGB")
reply = model.answer(picture, "What is it?", restore="always", seed=3)
latent = next(s.restoration for s in reply.transcript.segments if getattr(s, "restoration", None) is not None).latent
print(json.dumps({
    "text": reply.text,
    "thoughts": reply.thoughts,
    "latent": hashlib.sha256(latent.numpy().tobytes()).hexdigest(),
    "commit": model.origin.commit,
    "base": model.config.base_model,
}))
"""


def turn_to(hub: LocalHub, home: Path, monkeypatch) -> None:
    """Sets what the client reads from the environment when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)  # behind the functions of the module
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    huggingface_hub.utils.disable_progress_bars()


def environment(hub: LocalHub | str, home: Path, **more: str) -> dict[str, str]:
    """For a process of its own, as a user sets it."""
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
        "HF_ENDPOINT": hub if isinstance(hub, str) else hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": str(ROOT),
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "COLUMNS": "200",
        **more,
    }


def answer_elsewhere(
    hub: LocalHub | str, home: Path, arguments: dict[str, str], **more: str
) -> dict[str, str]:
    """The answer of a new process, with what it read and from where."""
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, json.dumps(arguments)],
        env=environment(hub, home, **more),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
