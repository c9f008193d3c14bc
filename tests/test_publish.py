"""Publishing from a training run: the adapter folder alone, while it trains and at the end."""

import json
import logging
import shutil
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from clear_adapters import attach, store
from clear_adapters.backbones.bagel.tiny import build
from clear_adapters.config import LoraSettings
from clear_adapters.datasets.world import build as build_world
from clear_adapters.download import hide
from clear_adapters.errors import AdapterError, ClearValueError
from clear_adapters.training.publish import Publisher
from clear_adapters.training.recipe import HubSettings, load_recipe
from clear_adapters.training.run import train
from tests.hub_client import ANSWER, DEPRECATED, answer_elsewhere, turn_to
from tests.local_hub import local_hub

pytestmark = [pytest.mark.filterwarnings(DEPRECATED), pytest.mark.timeout(300)]

SMALL = [
    *("loop.steps=4", "loop.batch=2", "micro_batch=1", "log_every=1", "save_every=2", "workers=0"),
    *("max_new_tokens=12", "latent.steps=3", "hub.repo_id=user/mine"),
]
SFT = [*SMALL, "lora.groups={understanding: 2, generation: 2}"]
ADAPTER = {
    "clear_config.json",
    "lora/adapter_config.json",
    "lora/adapter_model.safetensors",
    "bridge.safetensors",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world") / "data", 8, workers=1, progress=False)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with local_hub() as served:
        turn_to(served, tmp_path / "hf", monkeypatch)
        yield served


def run(data, output, *overrides, model=None, **more):
    more = {"stage": "sft", **more}
    base = SFT if more["stage"] == "sft" else SMALL
    return train(
        *("tiny", data, output),
        model=build(0) if model is None else model,
        overrides=[*base, *overrides],
        device=None if model is None else "cpu",
        progress=False,
        **more,
    )


def messages(hub):
    return [message for _, message in hub.repo("user/mine").log]


def test_the_adapter_alone_is_pushed_while_it_trains_and_at_the_end(hub, data, tmp_path):
    output = run(data, tmp_path / "out", "hub.every=2", "hub.private=true", "hub.license=mit")
    assert messages(hub) == ["initial commit", "Upload CLEAR adapter at step 2", "Upload CLEAR adapter"]
    repo = hub.repo("user/mine")
    assert repo.private
    halfway, finished = (json.loads(repo.commits[sha]["clear_config.json"]) for sha, _ in repo.log[1:])
    assert [c["provenance"]["steps"] for c in (halfway, finished)] == [2, 4]
    assert all(c["stage"] == "sft" for c in (halfway, finished))
    for sha, _ in repo.log[1:]:
        assert set(repo.commits[sha]) == ADAPTER | {".gitattributes", "README.md"}
    assert all(repo.files()[n] == (output / n).read_bytes() for n in ADAPTER)
    assert "license: mit" in repo.files()["README.md"].decode()
    assert (tmp_path / "out.training" / "checkpoint-4").is_dir()  # which stays where it is
    # Where it is published decides nothing of the adapter, and the token is no setting.
    record = (tmp_path / "out.training" / "run.json").read_text()
    assert "user/mine" not in record
    assert "hub" not in halfway["provenance"]["recipe"]
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"hf_test" in p.read_bytes()]
    # The same command again: finished, and there already.
    run(data, tmp_path / "out", "hub.every=2", "hub.private=true", "hub.license=mit")
    assert len(repo.log) == 3


def test_a_stage_may_replace_the_one_that_it_went_on_from_and_nothing_else(hub, data, tmp_path):
    first = run(data, tmp_path / "sft")
    run(data, tmp_path / "bridge", "own_steps=3", stage="bridge", adapter=first)
    assert json.loads(hub.repo("user/mine").files()["clear_config.json"])["stage"] == "bridge"
    kept = hub.repo("user/mine").refs["main"]
    with pytest.raises(
        AdapterError, match=r"the adapter is finished, in .*but was not published.*another adapter"
    ):
        run(data, tmp_path / "other", "loop.seed=1")
    assert store.read_adapter(tmp_path / "other").config.stage == "sft"
    assert hub.repo("user/mine").refs["main"] == kept
    run(
        data, tmp_path / "other", "loop.seed=1", "hub.revision=seed-1"
    )  # finished: only the push is made up for
    assert messages(hub)[-1] == "Upload CLEAR adapter"
    assert json.loads(hub.repo("user/mine").files("seed-1")["clear_config.json"])["provenance"]["seed"] == 1
    run(data, tmp_path / "other", "loop.seed=1", "hub.overwrite=true")
    assert json.loads(hub.repo("user/mine").files()["clear_config.json"])["stage"] == "sft"


def test_a_push_that_fails_on_the_way_does_not_end_the_run(hub, data, tmp_path, caplog):
    hub.fail("POST .*/commit/", 403)
    caplog.set_level(logging.WARNING, "clear_adapters")
    run(data, tmp_path / "out", "hub.every=2")
    assert messages(hub) == ["initial commit", "Upload CLEAR adapter"]
    assert "step 2: the adapter was not pushed to 'user/mine'" in caplog.text
    assert "The run goes on" in caplog.text


def test_an_adapter_that_says_nothing_of_its_making_is_anyones(tmp_path):
    config = attach(build(0), lora=LoraSettings({"understanding": 2})).config
    publisher = Publisher(
        HubSettings(repo_id="user/mine"), {"data_hash": "x"}, {}, save=lambda folder: folder
    )
    assert config.provenance == {}
    assert not publisher._is_ours(config)


def test_a_disk_that_fills_up_on_the_way_does_not_end_the_run(tmp_path, caplog):
    def save(folder):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    publisher = Publisher(HubSettings(repo_id="user/mine", every=1), {}, None, save=save)
    with caplog.at_level(logging.WARNING):
        publisher.on_step_end(
            None, SimpleNamespace(global_step=1, max_steps=3, is_world_process_zero=True), None
        )
    assert "No space left" in caplog.text


@pytest.mark.parametrize("text", ["Bearer {}", "Illegal header value b'Bearer {}'", "said {} twice: {}"])
def test_a_token_of_the_login_is_hidden_as_well(monkeypatch, text):
    monkeypatch.setenv("HF_TOKEN", "s3cretsecret.of-the.login")
    assert "s3cret" not in hide(text.format("s3cretsecret.of-the.login", "x"), None)
    assert "secret" not in hide("Bearer hf_jwt_aaaa.bbbb-secret.cccc", None)


def test_a_closed_door_is_found_before_the_run(hub, data, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(
        AdapterError, match=r"hub\.repo_id='user/mine', but nothing can be pushed there.*hf auth login"
    ):
        run(data, tmp_path / "out")
    assert list(tmp_path.glob("out*")) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hub.repo_id=mine", "owner/name"),
        ("hub.repo_id=../x", "owner/name"),
        ("hub.every=-1", "every=-1"),
        ("hub.revision=../x", "revision="),
    ],
)
def test_settings_that_cannot_work(override, message):
    with pytest.raises(ClearValueError, match=message):
        load_recipe("tiny", [override])


@pytest.mark.slow
def test_trained_pushed_deleted_and_loaded_elsewhere_bit_for_bit(hub, data, tmp_path, capsys, monkeypatch):
    output = run(data, tmp_path / "out", model="builtin:bagel-tiny")
    monkeypatch.setattr("sys.argv", ["", json.dumps({"adapter": str(output)})])
    exec(compile(ANSWER, "answer", "exec"), {})
    local = json.loads(capsys.readouterr().out.splitlines()[-1])
    commit = hub.repo("user/mine").refs["main"]
    hub.repo("user/mine").commit("main", {"README.md": b"moved on"}, "by hand")
    for path in (output, tmp_path / "out.training", tmp_path / "hf"):
        shutil.rmtree(path, ignore_errors=True)
    elsewhere = {"adapter": "user/mine", "adapter_revision": commit}
    assert answer_elsewhere(hub, tmp_path / "new", elsewhere) == {**local, "commit": commit}


def test_a_run_from_an_adapter_of_the_hub_records_its_commit(hub, data, tmp_path):
    run(data, tmp_path / "sft")
    commit = hub.repo("user/mine").refs["main"]
    made = run(data, tmp_path / "bridge", "own_steps=3", stage="bridge", adapter="user/mine")
    began = store.read_adapter(made).config.provenance["adapter"]
    assert (began["name"], began["revision"]) == ("user/mine", commit)
    assert attach(build(0), made).config.stage == "bridge"
