"""What goes wrong between here and the Hub: a retry that ends well or an error in words, and never half an adapter."""

import hashlib
import json
import resource
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from huggingface_hub import constants

from clear_adapters import attach, store
from clear_adapters.backbones.bagel.tiny import build
from clear_adapters.config import LoraSettings
from clear_adapters.errors import AdapterError
from clear_adapters.hub.push import push_folder
from clear_adapters.hub.write import write_card
from tests.hub_client import DEPRECATED, ROOT, environment, turn_to
from tests.local_hub import local_hub

pytestmark = pytest.mark.filterwarnings(DEPRECATED)

MINE = ROOT / "clear_adapters" / "builtin" / "clear-bagel-tiny"
OTHER = ROOT / "clear_adapters" / "builtin" / "clear-bagel-tiny-sft"
WEIGHTS = "lora/adapter_model.safetensors"
FOREVER = 10**6


@pytest.fixture
def hub(tmp_path, monkeypatch):
    sleep = time.sleep
    with local_hub() as served:
        turn_to(served, tmp_path / "hf", monkeypatch)
        # The client waits up to 23 seconds between its tries.
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
        yield served


def load(**more):
    return store.read_adapter(store.resolve("user/mine", "adapter", **more))


def is_whole(repo, folder):
    files = repo.files()
    return all(files[n] == (folder / n).read_bytes() for n in store.FILES if (folder / n).is_file())


# ------------------------------------------------------------------------------------------------------ uploading


@pytest.mark.parametrize(
    "failure",
    [
        {"pattern": "PUT /store/", "after": 5000},
        {"pattern": "PUT /store/", "status": 500},
        {"pattern": "PUT /store/", "done": True},
        {"pattern": "POST .*/commit/", "after": 10},
        {"pattern": "POST .*/commit/", "status": 429, "times": 3},
        {"pattern": "POST .*/commit/", "done": True},
        {"pattern": "POST .*/preupload/", "status": 503},
        {"pattern": "POST .*lfs/objects/batch"},
        {"pattern": "POST /verify", "status": 500, "times": 2},
    ],
    ids=str,
)
def test_a_push_that_is_disturbed_ends_well_in_one_commit(hub, failure):
    hub.add("user/mine", {"extra.safetensors": b"of before"})
    hub.fail(**failure)
    done = push_folder(MINE, "user/mine", overwrite=True)
    assert hub.failures[0].times == 0
    assert "extra.safetensors" not in hub.repo("user/mine").files()
    assert is_whole(hub.repo("user/mine"), MINE)
    assert [s for s, _ in hub.repo("user/mine").log][1:] == [done.commit]
    assert done.changed


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ({"pattern": "PUT /store/", "after": 5000}, "the connection to the Hub .* failed"),
        ({"pattern": "PUT /store/", "status": 500}, r"trouble of its own \(500\)"),
        ({"pattern": "PUT /store/", "status": 403}, r"may not do this .*\(403\)"),
        ({"pattern": "POST .*/commit/", "after": 10}, "the connection to the Hub"),
        (
            {"pattern": "POST .*/commit/", "status": 401},
            r"no 'user/mine', or it is private|does not know this token",
        ),
        ({"pattern": "POST .*/commit/", "status": 403}, r"may not do this .*\(403\)"),
        ({"pattern": "POST .*/commit/", "status": 404}, "could not do it|no 'user/mine'"),
        (
            {"pattern": "POST .*/commit/", "status": 409},
            r"changed at the same time \(409\): nothing was written",
        ),
        ({"pattern": "POST .*/commit/", "status": 429}, r"too many requests \(429\)"),
        ({"pattern": "POST .*/commit/", "status": 500}, r"trouble of its own \(500\)"),
        ({"pattern": "POST /api/validate-yaml", "status": 500}, r"trouble of its own \(500\)"),
        ({"pattern": "GET /api/models/user/mine", "status": 500}, r"trouble of its own \(500\)"),
    ],
    ids=str,
)
def test_a_push_that_fails_leaves_what_was_there(hub, failure, message):
    first = push_folder(OTHER, "user/mine")
    hub.fail(**failure, times=FOREVER)
    with pytest.raises(AdapterError, match=rf"was not pushed to 'user/mine': .*({message})"):
        push_folder(MINE, "user/mine", overwrite=True)
    assert hub.repo("user/mine").refs == {"main": first.commit}
    assert is_whole(hub.repo("user/mine"), OTHER)
    hub.failures.clear()
    assert load().config.stage == "sft"
    push_folder(MINE, "user/mine", overwrite=True)
    assert is_whole(hub.repo("user/mine"), MINE)


@pytest.mark.parametrize("status", [401, 403, 409, 429, 500])
def test_a_repository_that_cannot_be_made(hub, status):
    hub.fail("POST /api/repos/create", status, FOREVER)
    with pytest.raises(AdapterError, match=f"({status})"):
        push_folder(MINE, "user/mine")
    assert hub.repos == {}


def test_what_was_made_before_a_failure_is_told(hub):
    hub.fail("POST .*/commit/", 500, FOREVER)
    with pytest.raises(
        AdapterError, match="the repository 'user/mine' was made before, without this adapter"
    ):
        push_folder(MINE, "user/mine")
    with pytest.raises(AdapterError, match="the branch 'other' was made before, without this adapter"):
        push_folder(MINE, "user/mine", revision="other")
    hub.failures.clear()
    push_folder(MINE, "user/mine")


def test_who_may_not(hub):
    hub.tokens |= {"hf_reader": "user:read", "hf_guest": "guest"}
    push_folder(OTHER, "user/mine")
    for token in ("hf_reader", "hf_guest"):
        with pytest.raises(AdapterError, match=r"may not do this .*\(403\)"):
            push_folder(MINE, "user/mine", token=token, overwrite=True)
    with pytest.raises(AdapterError, match=r"does not know this token .*hf auth login"):
        push_folder(MINE, "user/mine", token="hf_wrong", overwrite=True)
    assert is_whole(hub.repo("user/mine"), OTHER)


def test_nobody_to_push_as(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(AdapterError, match="hf auth login"):
        push_folder(MINE, "user/mine")
    assert hub.repos == {}


# ----------------------------------------------------------------------------------------------------- downloading


@pytest.mark.parametrize(
    "failure",
    [
        {"pattern": "GET /store/", "after": 100_000},
        {"pattern": "GET /store/", "after": 100_000, "times": 3},
        {"pattern": "GET .*/resolve/.*json"},
        {"pattern": "HEAD .*/resolve/", "status": 500, "times": 2},
        {"pattern": "GET /store/", "status": 429},
    ],
    ids=str,
)
def test_a_download_that_is_disturbed_ends_well(hub, failure):
    push_folder(MINE, "user/mine")
    hub.fail(**failure)
    found = load()
    assert hub.failures[0].times == 0
    assert found.hashes == {n: hashlib.sha256((MINE / n).read_bytes()).hexdigest() for n in found.hashes}
    assert WEIGHTS in found.hashes


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ({"pattern": "GET /store/", "after": 100_000}, "connection to the Hub"),
        ({"pattern": "GET /store/", "status": 500}, r"trouble of its own \(500\)"),
        ({"pattern": "GET /store/", "status": 403}, r"\(403\)"),
        ({"pattern": "HEAD .*/resolve/", "status": 429}, r"\(429\)"),
        ({"pattern": "GET /api/models/user/mine", "status": 500}, r"trouble of its own \(500\)"),
        ({"pattern": "GET /api/models/user/mine"}, "connection to the Hub"),
        ({"pattern": "GET .*/tree/", "status": 429}, r"too many requests \(429\)"),
    ],
    ids=str,
)
def test_half_a_download_is_never_loaded(hub, monkeypatch, failure, message):
    push_folder(MINE, "user/mine")
    hub.fail(**failure, times=FOREVER)
    with pytest.raises(AdapterError, match=message):
        load()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterError, match=r"HF_HUB_OFFLINE is set|a part of|lacks "):
        load()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.failures.clear()
    assert load().config.stage == "grpo"


def test_who_may_not_read(hub):
    push_folder(MINE, "user/mine", private=True)
    with pytest.raises(AdapterError, match=r"or it is private and the token does not see it"):
        load(token=False)
    with pytest.raises(AdapterError, match="does not know this token"):
        load(token="hf_wrong")
    with pytest.raises(AdapterError, match=r"the Hub has no 'user/none'"):
        store.resolve("user/none", "adapter")
    hub.repo("user/mine").private, hub.repo("user/mine").gated = False, True
    with pytest.raises(AdapterError, match="is gated: ask for access"):
        load()


@pytest.mark.parametrize("failure", [{"status": 500}, {"status": 429}, {}], ids=str)
def test_what_is_cached_loads_while_the_hub_is_down(hub, failure):
    push_folder(MINE, "user/mine")
    first = load()
    hub.fail(".*", times=FOREVER, **failure)
    assert load().hashes == first.hashes


def test_contents_that_were_changed_on_the_way_are_refused(hub):
    push_folder(MINE, "user/mine")
    content = (MINE / WEIGHTS).read_bytes()
    oid = hashlib.sha256(content).hexdigest()
    hub.blobs[oid] = content[:-1] + bytes([content[-1] ^ 1])
    for _ in range(2):
        with pytest.raises(
            AdapterError, match=r"adapter_model\.safetensors of user/mine is not what the Hub says"
        ):
            load()


@contextmanager
def no_file_beyond(size):
    """As on a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_an_adapter_that_cannot_be_written_is_not_pushed(hub, tmp_path):
    attached = attach(build(0), lora=LoraSettings({"understanding": 64}))
    with no_file_beyond(20_000), pytest.raises(AdapterError, match=r"nothing was pushed: .*Make room"):
        attached.push_to_hub("user/mine")
    assert hub.requests == []
    attached.push_to_hub("user/mine")
    attached.detach()


def test_a_card_that_cannot_be_written_leaves_the_one_that_is_there(tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(MINE, folder)
    (folder / "README.md").write_text("mine")
    with no_file_beyond(100), pytest.raises(OSError, match="File too large"):
        write_card(folder)
    assert (folder / "README.md").read_text() == "mine"
    assert not [p for p in folder.iterdir() if p.name.startswith(".README")]


FULL = """
import json, resource, sys
from clear_adapters import attach, store
from clear_adapters.backbones.bagel.tiny import build
from clear_adapters.config import LoraSettings
from clear_adapters.errors import AdapterError
limit = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limit[1]))
told = []
for _ in range(2):
    try:
        store.read_adapter(store.resolve("user/mine", "adapter"))
    except AdapterError as error:
        told.append(str(error))
resource.setrlimit(resource.RLIMIT_FSIZE, limit)
print(json.dumps([told, store.read_adapter(store.resolve("user/mine", "adapter")).config.stage]))
"""


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_that_loads(hub, tmp_path):
    """No file of more than 200 kB can be written, which is less than the weights."""
    push_folder(MINE, "user/mine")
    done = subprocess.run(
        [sys.executable, "-c", FULL],
        env=environment(hub, tmp_path / "other"),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told, stage = json.loads(done.stdout.splitlines()[-1])
    assert len(told) == 2
    assert all("no room on this disk" in t for t in told), told
    assert stage == "grpo"
