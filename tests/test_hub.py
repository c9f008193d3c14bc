"""Adapters on the Hub: pushed by the real client to a server on this machine, and loaded from it."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError
from typer.testing import CliRunner

from clear_adapters import attach, store
from clear_adapters.cli import main
from clear_adapters.config import LoraSettings
from clear_adapters.errors import AdapterError, ClearValueError
from clear_adapters.hub.push import push_folder
from tests.hub_client import ANSWER, DEPRECATED, ROOT, answer_elsewhere, turn_to
from tests.local_hub import COMMIT, card_of, git_oid, local_hub, serve

pytestmark = pytest.mark.filterwarnings(DEPRECATED)

FILES = {
    "clear_config.json",
    "lora/adapter_config.json",
    "lora/adapter_model.safetensors",
    "bridge.safetensors",
}
BUILTIN = ROOT / "clear_adapters" / "builtin"
MINE = BUILTIN / "clear-bagel-tiny"
OTHER = BUILTIN / "clear-bagel-tiny-sft"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with local_hub() as served:
        turn_to(served, tmp_path / "hf", monkeypatch)
        yield served


@pytest.fixture(scope="module")
def model():
    return attach("builtin:bagel-tiny", "builtin:clear-bagel-tiny", device="cpu")


def same(files, folder):
    return all(files[n] == (folder / n).read_bytes() for n in FILES)


# ------------------------------------------------------------------------------------------------- there and back


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.long
def test_pushed_and_loaded_in_a_new_process(hub, model, tmp_path, capsys, monkeypatch):
    pushed = model.push_to_hub("user/mine", private=True)
    assert set(hub.repo("user/mine").files()) == FILES | {".gitattributes", "README.md"}
    assert [message for _, message in hub.repo("user/mine").log] == ["initial commit", "Upload CLEAR adapter"]
    monkeypatch.setattr("sys.argv", ["", json.dumps({"adapter": "builtin:clear-bagel-tiny"})])
    exec(compile(ANSWER, "answer", "exec"), {})
    local = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = answer_elsewhere(hub, tmp_path / "hf2", {"adapter": "user/mine", "token": "hf_test"})
    assert found == {**local, "commit": pushed.commit}
    # From the cache alone, with no server to ask.
    again = answer_elsewhere(
        "http://127.0.0.1:9", tmp_path / "hf2", {"adapter": "user/mine"}, HF_HUB_OFFLINE="1"
    )
    assert again == found


def test_a_second_load_downloads_nothing(hub):
    push_folder(MINE, "user/mine")
    first = store.read_adapter(store.resolve("user/mine", "adapter"))
    before = len(hub.requests)
    again = store.read_adapter(store.resolve("user/mine", "adapter"))
    assert again.hashes == first.hashes
    assert [r for r in hub.requests[before:] if "/resolve/" in r or "/store/" in r] == []
    assert hub.count(r"GET /user/mine/resolve/\w+/README.md") == 0  # what is not read is not fetched


def test_of_a_base_known_files_are_fetched_alone(hub):
    base = {p.name: p.read_bytes() for p in (BUILTIN / "bagel-tiny").iterdir()}
    hub.add("user/base", {**base, "pytorch_model.bin": b"x", "modeling.py": b"x", "a.pt": b"x"})
    folder = store.resolve("user/base", "model")
    assert {p.name for p in folder.iterdir()} == set(base)
    assert hub.count(r"/resolve/.*\.(bin|py|pt)$") == 0


def test_base_and_adapter_both_of_the_hub_and_their_commits_recorded(hub, tmp_path):
    base = {p.name: p.read_bytes() for p in (BUILTIN / "bagel-tiny").iterdir()}
    hub.add("user/base", base)
    fresh = attach("user/base", lora=LoraSettings({"understanding": 2}), device="cpu")
    commit = hub.repo("user/base").refs["main"]
    assert (fresh.config.base_model, fresh.config.base_revision) == ("user/base", commit)
    assert fresh.origin is None
    done = fresh.push_to_hub("user/small")
    hub.repo("user/base").commit("main", {"README.md": b"nothing left"}, "gone")
    loaded = attach(adapter="user/small", device="cpu")  # its own base, at its own commit
    assert loaded.config.base_revision == commit
    assert (loaded.origin.name, loaded.origin.commit) == ("user/small", done.commit)
    files = hub.repo("user/small").files()
    assert loaded.origin.hashes == {n: hashlib.sha256(files[n]).hexdigest() for n in FILES}
    card = card_of(files)
    assert (card["base_model"], card["base_model_relation"]) == ("user/base", "adapter")
    # The Hub's own search finds it under its base, and among all CLEAR adapters.
    for wanted in ("base_model:adapter:user/base", "clear-adapters"):
        assert [m.id for m in HfApi().list_models(filter=wanted)] == ["user/small"]


def test_each_revision_is_an_adapter_of_its_own(hub):
    one = push_folder(MINE, "user/mine")
    two = push_folder(OTHER, "user/mine", revision="sft")
    assert hub.repo("user/mine").refs["main"] == one.commit
    for revision, stage in ((None, "grpo"), ("sft", "sft"), (one.commit, "grpo"), (two.commit, "sft")):
        found = store.read_adapter(store.resolve("user/mine", "adapter", revision=revision))
        assert found.config.stage == stage
    assert 'adapter_revision="sft"' in hub.repo("user/mine").files("sft")["README.md"].decode()
    HfApi().create_tag("user/mine", tag="v1")
    tagged = attach(adapter="user/mine", adapter_revision="v1", device="cpu")
    assert tagged.origin.commit == one.commit
    with pytest.raises(AdapterError, match=r"no revision 'v2'"):
        store.resolve("user/mine", "adapter", revision="v2")


def test_stock_peft_loads_the_lora_of_the_repository(hub, model):
    """On the network inside, as PEFT itself does it."""
    from peft import PeftModel

    push_folder(MINE, "user/mine")
    plain = attach("builtin:bagel-tiny", lora=False, bridge=False, device="cpu").detach()
    stock = PeftModel.from_pretrained(plain.model, "user/mine", subfolder="lora")
    found = {n.replace(".default", ""): p for n, p in stock.named_parameters() if "lora_" in n}
    wanted = dict(model.lora.parameters())
    assert set(found) == set(wanted)
    assert all(torch.equal(found[n], p) for n, p in wanted.items())


# ----------------------------------------------------------------------------------------------------- one commit


def test_the_same_again_makes_no_commit(hub):
    first = push_folder(MINE, "user/mine")
    again = push_folder(MINE, "user/mine")
    assert (again.commit, again.changed, first.changed) == (first.commit, False, True)
    assert len(hub.repo("user/mine").log) == 2


def test_another_adapter_is_not_overwritten_unasked(hub):
    first = push_folder(MINE, "user/mine")
    with pytest.raises(
        AdapterError, match=r"holds another adapter \(clear_config.json.*overwrite=True.*--create-pr"
    ):
        push_folder(OTHER, "user/mine")
    assert hub.repo("user/mine").refs == {"main": first.commit}
    done = push_folder(OTHER, "user/mine", overwrite=True, commit_message="Go back")
    assert same(hub.repo("user/mine").files(), OTHER)
    assert hub.repo("user/mine").log[-1] == (done.commit, "Go back")
    assert len(hub.repo("user/mine").log) == 3


def test_what_the_new_adapter_has_not_is_deleted_and_the_rest_kept(hub, tmp_path):
    push_folder(MINE, "user/mine")
    repo = hub.repo("user/mine")
    mine = {**repo.files(), "extra.safetensors": b"of before", "notes.txt": b"mine", "a/picture.jpg": b"mine"}
    mine[".eval_results/clear-adapters.yaml"] = mine["clear-scores.png"] = b"of before"
    repo.commit("main", mine, "by hand")
    push_folder(MINE, "user/mine", overwrite=True)
    assert set(repo.files()) == FILES | {".gitattributes", "README.md", "notes.txt", "a/picture.jpg"}
    assert len(repo.log) == 4


def test_nothing_but_the_adapter_goes_up(hub, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(MINE, folder)
    (folder / "log.jsonl").write_text("{}")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hf_secret")
    (folder / "lora" / "notes.md").write_text("no")
    push_folder(folder, "user/mine")
    assert set(hub.repo("user/mine").files()) == FILES | {".gitattributes", "README.md"}


def test_a_pull_request_proposes_and_changes_nothing(hub):
    first = push_folder(MINE, "user/mine")
    done = push_folder(OTHER, "user/mine", create_pr=True)
    assert done.pull_request == f"{hub.url}/user/mine/discussions/1"
    assert hub.repo("user/mine").refs == {"main": first.commit, "refs/pr/1": done.commit}
    assert (
        store.read_adapter(store.resolve("user/mine", "adapter", revision="refs/pr/1")).config.stage == "sft"
    )
    # Anybody may propose to a repository of somebody else.
    hub.tokens["hf_guest"] = "guest"
    other = push_folder(OTHER, "user/mine", create_pr=True, token="hf_guest")
    assert hub.repo("user/mine").refs["refs/pr/2"] == other.commit
    with pytest.raises(AdapterError, match=r"no 'user/none'"):
        push_folder(OTHER, "user/none", create_pr=True)
    assert ("model", "user/none") not in hub.repos


def test_private_is_never_public_by_mistake(hub):
    push_folder(MINE, "user/secret", private=True)
    assert hub.repo("user/secret").private
    push_folder(MINE, "user/open", private=False)
    with pytest.raises(ClearValueError, match=r"private=True, but 'user/open' exists and is public"):
        push_folder(OTHER, "user/open", private=True, overwrite=True)
    assert same(hub.repo("user/open").files(), MINE)


def test_a_branch_that_moves_meanwhile_is_not_overwritten(hub, monkeypatch):
    push_folder(MINE, "user/mine")
    repo = hub.repo("user/mine")
    real = HfApi.create_commit

    def late(self, *args, **kwargs):
        repo.commit("main", {**repo.files(), "new.txt": b"theirs"}, "theirs")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", late)
    with pytest.raises(AdapterError, match=r"changed at the same time \(412\)"):
        push_folder(OTHER, "user/mine", overwrite=True)
    assert repo.log[-1][1] == "theirs"
    assert same(repo.files(), MINE)


@pytest.mark.parametrize("repo_id", ["mine", "a/b/c", "../x", "user/../x", "", "https://hf.co/user/x"])
def test_no_repository_of_that_name(hub, repo_id):
    with pytest.raises(ClearValueError, match="owner/name"):
        push_folder(MINE, repo_id)
    assert hub.requests == []


# -------------------------------------------------------------------------------------------------------- readme


def test_a_readme_keeps_its_own_text(hub):
    own = "---\nlicense: mit\ntags: [mine]\nextra_key: 3\n---\n\n# My adapter\n\nThanks to all.\n"
    hub.add("user/mine", {"README.md": own.encode()})
    push_folder(MINE, "user/mine", license="apache-2.0")
    first = hub.repo("user/mine").files()["README.md"].decode()
    assert "# My adapter\n\nThanks to all.\n" in first
    assert 'attach(adapter="user/mine")' in first
    card = card_of(hub.repo("user/mine").files())
    assert (card["license"], card["extra_key"], card["library_name"]) == ("mit", 3, "clear-adapters")
    assert card["tags"][:2] == ["mine", "clear-adapters"]
    # What the owner writes around the rendered part stays when it is rendered again.
    edited = first.replace("Thanks to all.", "Thanks to nobody.") + "\nAfter it.\n"
    hub.repo("user/mine").commit(
        "main", {**hub.repo("user/mine").files(), "README.md": edited.encode()}, "edit"
    )
    push_folder(OTHER, "user/mine", overwrite=True)
    again = hub.repo("user/mine").files()["README.md"].decode()
    assert "Thanks to nobody." in again
    assert again.rstrip().endswith("After it.")
    assert again.count("<!-- clear-adapters:begin -->") == 1
    assert "sft, then bridge" in first
    assert "sft, then bridge" not in again


def test_a_readme_without_a_card_keeps_its_metadata(hub):
    held = {
        "library_name": "transformers",
        "base_model": "somebody/base",
        "model-index": [
            {
                "name": "theirs",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"type": "some/set", "name": "set", "note": "unknown to the client"},
                        "metrics": [{"type": "accuracy", "value": 1.5}],
                    }
                ],
            }
        ],
    }
    hub.add("user/mine", {"README.md": f"---\n{yaml.safe_dump(held)}---\n# Theirs\n".encode()})
    push_folder(MINE, "user/mine")
    for _ in range(2):
        card = card_of(hub.repo("user/mine").files())
        assert {k: card[k] for k in held} == held
        assert "base_model_relation" not in card
        assert "clear-adapters" in card["tags"]
        assert not push_folder(MINE, "user/mine").changed
    push_folder(OTHER, "user/mine", overwrite=True)  # the marker is there, the keys are theirs still
    card = card_of(hub.repo("user/mine").files())
    assert {k: card[k] for k in held} == held


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"---\n[: no yaml\n---\n", "metadata that cannot be read"),
        (b"---\n- a\n- list\n---\n", "metadata that cannot be read"),
        (b"\xff\xfe", "not UTF-8"),
        (b"<!-- clear-adapters:begin --> only", "once each and in order"),
        (b"<!-- clear-adapters:end --><!-- clear-adapters:begin -->", "once each and in order"),
    ],
)
def test_a_readme_that_cannot_be_kept_is_not_replaced(hub, content, message):
    hub.add("user/mine", {"README.md": content})
    with pytest.raises(AdapterError, match=message):
        push_folder(MINE, "user/mine")
    assert hub.repo("user/mine").files() == {"README.md": content}


def test_metadata_that_the_hub_refuses_stops_the_push(hub):
    hub.add("user/mine", {"README.md": b"---\nlicense: [1]\n---\n"})
    with pytest.raises(AdapterError, match="license"):
        push_folder(MINE, "user/mine")
    assert set(hub.repo("user/mine").files()) == {"README.md"}


# ------------------------------------------------------------------------------------------------------ commands


def test_the_command(hub, tmp_path):
    run = CliRunner().invoke
    done = run(main, ["push", str(MINE), "user/mine", "--license", "apache-2.0"])
    assert done.exit_code == 0, done.output
    assert f"{hub.url}/user/mine/commit/{hub.repo('user/mine').refs['main']}" in done.output
    assert "nothing to do" in run(main, ["push", str(MINE), "user/mine"]).output
    refused = run(main, ["push", str(OTHER), "user/mine"])
    assert refused.exit_code == 2
    assert "--overwrite" in refused.output
    assert "discussions/1" in run(main, ["push", str(OTHER), "user/mine", "--create-pr"]).output
    assert run(main, ["push", str(OTHER), "user/mine", "--revision", "sft"]).exit_code == 0
    assert set(hub.repo("user/mine").refs) == {"main", "refs/pr/1", "sft"}


# -------------------------------------------------------------------------------------------------------- secrets


def test_the_token_is_written_nowhere(hub, tmp_path, monkeypatch, caplog, capsys):
    secret = "hf_" + "x" * 34
    hub.tokens[secret] = "user"
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.chdir(tmp_path)
    push_folder(MINE, "user/mine", token=secret, private=True)
    loaded = attach("builtin:bagel-tiny", "user/mine", token=secret, device="cpu")
    loaded.save_pretrained(tmp_path / "again")
    with pytest.raises(AdapterError) as denied:
        push_folder(MINE, "somebody/else", token=secret)
    hub.tokens.pop(secret)
    with pytest.raises(AdapterError) as unknown:
        store.resolve("user/none", "adapter", token=secret)
    # The client quotes a header that cannot be sent.
    with pytest.raises(AdapterError) as broken:
        push_folder(MINE, "user/mine", token=secret + "\nx")
    told = [caplog.text, *capsys.readouterr(), repr(loaded), repr(loaded.__dict__)]
    for caught in (denied, unknown, broken):
        error = caught.value
        while error is not None:
            told.append(str(error))
            error = error.__cause__
    assert not [t for t in told if secret in t]
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(written) > 8
    assert not [p for p in written if secret.encode() in p.read_bytes()]
    assert not any(secret.encode() in c for f in hub.repo("user/mine").commits.values() for c in f.values())


def test_a_dataset_repository_is_served_too(tmp_path, monkeypatch):
    with serve("someone/set", {"a/b.tsv": b"x", "big.parquet": b"y" * 100}, token="hf_test") as (
        url,
        requests,
    ):
        with local_hub() as other:
            turn_to(other, tmp_path / "hf", monkeypatch)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "ENDPOINT", url)
        for name, content in (("a/b.tsv", b"x"), ("big.parquet", b"y" * 100)):
            path = hf_hub_download("someone/set", name, repo_type="dataset", token="hf_test")
            assert Path(path).read_bytes() == content
            assert COMMIT in path
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("someone/set", "other", repo_type="dataset", token=False)
        assert requests[0] == "HEAD /datasets/someone/set/resolve/main/a/b.tsv"


def test_the_names_of_git_are_those_of_the_hub():
    assert git_oid(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
