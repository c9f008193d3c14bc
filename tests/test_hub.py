"""Adapters on the Hub: pushed by the real client to a server on this machine, and loaded from it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from clear_adapters.adapter import attach
from tests.local_hub import local_hub

# The client of the Hub calls its own transport in a way that this one has moved on from.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ROOT = Path(__file__).parents[1]
FILES = {
    "clear_config.json",
    "lora/adapter_config.json",
    "lora/adapter_model.safetensors",
    "bridge.safetensors",
}

ANSWER = """
import json, sys
import torch
torch.set_num_threads(1)
from PIL import Image
from clear_adapters import attach
model = attach(device="cpu", **json.loads(sys.argv[1]))
picture = Image.linear_gradient("L").convert("RGB")
reply = model.answer(picture, "What is it?", restore="always", seed=3)
latent = next(s.restoration for s in reply.transcript.segments if getattr(s, "restoration", None) is not None).latent
digest = __import__("hashlib").sha256(latent.numpy().tobytes()).hexdigest()
print(json.dumps({"text": reply.text, "thoughts": reply.thoughts, "latent": digest, "commit": model.origin.commit,
                  "base": model.config.base_model}))
"""


def environment(hub, home, **more):
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
        **more,
    }


def answer_elsewhere(hub, home, arguments, **more):
    """The answer of a new process."""
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, json.dumps(arguments)],
        env=environment(hub, home, **more),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub, and the client of this process turned to it."""
    with local_hub() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        huggingface_hub.utils.disable_progress_bars()
        yield served


@pytest.fixture(scope="module")
def model():
    return attach("builtin:bagel-tiny", "builtin:clear-bagel-tiny", device="cpu")


def test_pushed_and_loaded_in_a_new_process(hub, model, tmp_path):
    pushed = model.push_to_hub("user/mine")
    assert set(hub.repo("user/mine").files()) >= FILES
    assert len(hub.repo("user/mine").log) == 2  # the first one makes the repository
    local = answer_elsewhere(hub, tmp_path / "hf1", {"adapter": "builtin:clear-bagel-tiny"})
    found = answer_elsewhere(hub, tmp_path / "hf2", {"adapter": "user/mine"})
    assert found == {**local, "commit": pushed.commit}
