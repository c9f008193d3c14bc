"""Cards: rendered from facts alone, the same every time, accepted by the Hub's client, and harmless."""

import io
import json
import re
import shutil
import sys
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image
from typer.testing import CliRunner

from clear_adapters import store
from clear_adapters.cli import main
from clear_adapters.datasets.hub import Source
from clear_adapters.errors import AdapterError, ClearValueError
from clear_adapters.hub.card import EVAL_RESULTS, limits, percent, plain, render_card, render_scores
from clear_adapters.hub.facts import CardFacts, collect_facts
from clear_adapters.hub.figure import FACTS_KEY, scores_hash
from clear_adapters.hub.push import push_folder
from clear_adapters.hub.scores import Interval, folder_digest, read_scores
from clear_adapters.hub.write import write_card
from clear_adapters.mmd_bench.build import build, find_inputs
from clear_adapters.mmd_bench.compare import gain, lines, read_results
from clear_adapters.mmd_bench.tasks import CORRUPTIONS, get_task
from clear_adapters.results import proportion_interval, read_result
from tests.bench_files import base_folder
from tests.hub_client import DEPRECATED, ROOT, turn_to
from tests.local_hub import local_hub, problems_of

sys.path.insert(0, str(ROOT / "benchmarks" / "degraded_world"))

import summary

pytestmark = pytest.mark.filterwarnings(DEPRECATED)

RESULTS = ROOT / "benchmarks" / "results" / "degraded_world.json"
CARDS = ROOT / "model_cards"
BUILTIN = ROOT / "clear_adapters" / "builtin"
MINE = BUILTIN / "clear-bagel-tiny"
SYSTEMS = {
    "clear-bagel-tiny": "clear",
    "clear-bagel-tiny-sft": "sft",
    "clear-bagel-tiny-bridge": "bridge",
    "clear-janus-tiny": "clear",
}


def results_of(name):
    return RESULTS.with_name("degraded_world_janus.json") if "janus" in name else RESULTS


@pytest.fixture(scope="module")
def facts():
    return collect_facts(MINE, "user/mine", results=[RESULTS], license="apache-2.0")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with local_hub() as served:
        turn_to(served, tmp_path / "hf", monkeypatch)
        yield served


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(MINE, tmp_path / "adapter")
    return tmp_path / "adapter"


def snippet(text):
    (found,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return found


# ------------------------------------------------------------------------------------------------ the cards that ship


def test_every_builtin_adapter_has_a_card():
    names = {n.removeprefix("builtin:") for n in store.builtin_names("adapter")}
    assert names == set(SYSTEMS) == {p.name for p in CARDS.iterdir() if p.is_dir()}


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_cards_that_ship_are_what_the_facts_render(name):
    held = CARDS / name
    found = collect_facts(BUILTIN / name, f"builtin:{name}", results=[results_of(name)], license="apache-2.0")
    again = "render it again: clear-adapters card, as docs/hub.md says"
    assert CardFacts.from_json((held / "facts.json").read_text()) == found, again
    assert (held / "facts.json").read_text() == found.to_json(), again
    assert (held / "README.md").read_text() == render_card(found), again
    assert (held / ".eval_results" / "clear-adapters.yaml").read_text() == render_scores(found), again
    with Image.open(held / "clear-scores.png") as figure:
        assert figure.text[FACTS_KEY] == scores_hash(found), again


@pytest.mark.parametrize(("name", "system"), SYSTEMS.items())
def test_the_numbers_are_those_of_the_benchmark(name, system):
    """By the benchmark's own way from cells to numbers."""
    text = (CARDS / name / "README.md").read_text()
    payload = read_result(results_of(name)).payload
    for condition in ("clean", "low", "mid", "high"):
        rows = [line for line in text.splitlines() if line.startswith(f"| {condition} |")]
        for title, of in (("the base alone", "base"), ("**this adapter**", system)):
            (row,) = [r for r in rows if f"| {title} |" in r]
            right = summary.share(summary.runs_of(payload, of, condition)[:1])
            assert f"| 1,000 | {percent(Interval(right.mean, right.low, right.high))} |" in row
        (row,) = [r for r in rows if "**this adapter**" in r]
        restored = summary.share(summary.runs_of(payload, system, condition, "restored")[:1])
        assert row.endswith(f"| {percent(Interval(restored.mean, restored.low, restored.high))} |")


def test_what_ships_says_what_it_cannot(facts):
    text = render_card(facts)
    assert "nothing about models of photographs" in text
    assert (
        "Worse, this adapter minus the base alone, right answers in points: clean -3.1 [-4.7, -1.6]" in text
    )
    for heading in ("How to use it", "Scores", "How it was made", "Limits", "Out of scope", "Citation"):
        assert f"\n## {heading}\n" in text


@pytest.mark.slow
def test_the_snippet_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").convert("RGB").save("photo.jpg")
    names = {}
    exec(compile(snippet((CARDS / "clear-bagel-tiny" / "README.md").read_text()), "card", "exec"), names)
    assert names["model"].origin.name == "builtin:clear-bagel-tiny"
    assert capsys.readouterr().out.strip().endswith(("True", "False"))


def test_the_snippet_of_a_pushed_card_runs(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").convert("RGB").save("photo.jpg")
    done = push_folder(MINE, "user/mine", revision="seed-0")
    names = {}
    text = hub.repo("user/mine").files("seed-0")["README.md"].decode()
    exec(compile(snippet(text), "card", "exec"), names)
    assert (names["model"].origin.name, names["model"].origin.commit) == ("user/mine", done.commit)


# --------------------------------------------------------------------------------------------------- the Hub's forms


def test_the_hubs_client_and_its_check_accept_the_metadata(hub, facts):
    based = replace(facts, base_model="user/base", base_revision="a" * 40)
    for one in (facts, based, replace(facts, scores=(), license=None)):
        card = ModelCard(render_card(one))
        card.validate()
        assert card.data.library_name == "clear-adapters"
        assert {"clear-adapters", "lora"} <= set(card.data.tags)
    assert hub.count("POST /api/validate-yaml") == 3
    card = ModelCard(render_card(based))
    assert (card.data.base_model, card.data.base_model_relation) == ("user/base", "adapter")
    assert ModelCard(render_card(facts)).data.base_model is None  # a built-in base is none of the Hub
    found = {(r.dataset_config, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found["high", "accuracy"] == 71.3
    assert found["high", "restore_rate"] == 69.0
    assert len(found) == 8


def test_the_check_of_this_hub_is_one():
    assert problems_of("---\nbase_model: builtin:x\nbase_model_relation: child\ntags: x\n---\n") != []
    assert problems_of("---\nmodel-index:\n- name: x\n  results: [{task: {}}]\n---\n") != []


def test_scores_in_the_hubs_present_form(facts):
    entries = parse_eval_result_entries(yaml.safe_load(render_scores(facts)))
    assert [(e.task_id, e.value) for e in entries] == [
        ("clean", 92.8),
        ("low", 91.0),
        ("mid", 85.6),
        ("high", 71.3),
    ]
    assert {e.dataset_id for e in entries} == {"clear-adapters/degraded-world"}
    assert "N=1000, 71.3 [68.4, 74.0]; restored 69.0 [66.1, 71.8] %" in entries[-1].notes


def test_a_push_brings_scores_and_figure_and_takes_those_of_before_away(hub):
    push_folder(MINE, "user/mine", results=[RESULTS])
    files = hub.repo("user/mine").files()
    assert Image.open(io.BytesIO(files["clear-scores.png"])).format == "PNG"
    assert yaml.safe_load(files[".eval_results/clear-adapters.yaml"])[3]["value"] == 71.3
    assert len(hub.repo("user/mine").log) == 2
    push_folder(BUILTIN / "clear-bagel-tiny-sft", "user/mine", overwrite=True)
    files = hub.repo("user/mine").files()
    assert not {"clear-scores.png", ".eval_results/clear-adapters.yaml"} & set(files)
    assert "model-index" not in files["README.md"].decode()
    assert "None were recorded" in files["README.md"].decode()


def test_scores_are_not_taken_away_unasked(hub):
    first = push_folder(MINE, "user/mine", results=[RESULTS])
    before = hub.repo("user/mine").files()
    with pytest.raises(AdapterError, match=r"has scores: pass results= again, or overwrite=True"):
        push_folder(MINE, "user/mine")
    with pytest.raises(AdapterError, match=r"has scores"):
        push_folder(BUILTIN / "clear-bagel-tiny-sft", "user/mine", replaces=lambda config: True)
    assert hub.repo("user/mine").refs == {"main": first.commit}
    push_folder(MINE, "user/mine", create_pr=True)
    push_folder(MINE, "user/mine", revision="other")
    assert hub.repo("user/mine").files() == before
    readme = {
        n: c for n, c in before.items() if n not in ("clear-scores.png", ".eval_results/clear-adapters.yaml")
    }
    hub.repo("user/mine").commit("main", readme, "by hand")
    with pytest.raises(AdapterError, match=r"has scores.* to take model-index away"):
        push_folder(MINE, "user/mine")
    push_folder(MINE, "user/mine", overwrite=True)
    assert "model-index" not in hub.repo("user/mine").files()["README.md"].decode()


def test_a_figure_of_somebody_else_is_not_replaced_unasked(hub):
    hub.add("user/mine", {"clear-scores.png": b"theirs"})
    with pytest.raises(AdapterError, match=r"has scores.*clear-scores\.png"):
        push_folder(MINE, "user/mine")
    with pytest.raises(AdapterError, match=r"has clear-scores\.png and no card"):
        push_folder(MINE, "user/mine", results=[RESULTS])
    assert hub.repo("user/mine").files() == {"clear-scores.png": b"theirs"}
    push_folder(MINE, "user/mine", results=[RESULTS], overwrite=True)
    push_folder(MINE, "user/mine", results=[RESULTS])


# ------------------------------------------------------------------------------------------------------ only facts


def test_scores_of_other_weights_are_refused(folder, hub):
    config = json.loads((folder / "clear_config.json").read_text())
    (folder / "clear_config.json").write_text(json.dumps({**config, "stage": "sft"}))
    with pytest.raises(ClearValueError, match=r"no score of this adapter.*clear0 \(e721676da6282650\)"):
        push_folder(folder, "user/mine", results=[RESULTS])
    assert hub.requests == []


@pytest.mark.parametrize(("name", "system"), SYSTEMS.items())
def test_digests_are_those_that_were_recorded(name, system):
    payload = read_result(results_of(name)).payload
    base = payload["model"]["name"].removeprefix("builtin:")
    assert folder_digest(BUILTIN / base) == payload["model"]["digest"]
    assert folder_digest(BUILTIN / name) == payload["cells"][f"{system}/clean/0"]["adapter"]["digest"]


def test_a_digest_is_of_the_adapters_own_files_whole(folder):
    before = store.adapter_digest(folder)
    assert before == folder_digest(folder)
    (folder / "facts.json").write_text("{}")
    (folder / "lora" / "notes.json").write_text("{}")
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "model.safetensors").write_bytes(b"x")
    assert store.adapter_digest(folder) == before
    weights = folder / "extra.safetensors"
    weights.write_bytes(bytes(2**22))
    large = store.adapter_digest(folder)
    with weights.open("r+b") as file:
        file.seek(2**21)
        file.write(b"x")
    assert len({before, large, store.adapter_digest(folder)}) == 3


def test_a_card_with_its_facts_in_the_adapters_own_folder_is_rendered_again(folder):
    write_card(folder, folder, results=[RESULTS])
    before = (folder / "README.md").read_text()
    assert (folder / "facts.json").is_file()
    write_card(folder, folder, results=[RESULTS])
    assert (folder / "README.md").read_text() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "reading"}, "kind 'reading'; cards show degraded_world, mmd_bench"),
        ({"payload": {}}, "damaged"),
        ({"payload": {"cells": {"x": 3}}}, "damaged"),
        ({"schema_version": 9}, "schema version 9"),
    ],
)
def test_result_files_that_cannot_be_shown(tmp_path, change, message):
    path = tmp_path / "result.json"
    path.write_text(json.dumps({**json.loads(RESULTS.read_text()), **change}))
    with pytest.raises(ClearValueError, match=message):
        read_scores(path, "e721676da6282650")


@pytest.fixture(scope="module")
def benched(toy, tmp_path_factory):
    """A folder with a tiny run of MMD-Bench: two benchmarks, one counted by rotations, and one distorted already."""
    folder = tmp_path_factory.mktemp("bench")
    base_folder(folder / "base", ["mmbench", "mmstar", "rbench"])
    inputs, _ = find_inputs([Source(folder / "base")], [get_task(n) for n in ("mmbench", "mmstar")])
    build(inputs, folder / "sets", conditions=["high"], workers=1, seed=5, progress=False)
    build(inputs[-1:], folder / "sets" / "types", conditions=CORRUPTIONS, workers=1, seed=5, progress=False)
    run = ["bench", "run", "--output", folder / "run", "--model", toy / "model", "--adapter", toy / "adapter"]
    run += [
        "--data",
        folder / "base",
        "--data",
        folder / "sets",
        "--data",
        folder / "sets" / "types",
        "--limit",
        2,
    ]
    run += [
        "--tasks",
        "mmbench,mmstar,rbench",
        "--protocol",
        "mixed,macro16",
        "--severity",
        "clean,high",
        "--skip-missing",
    ]
    run += [
        "--systems",
        "base,clear,always,never",
        "--batch-size",
        64,
        "--device",
        "cpu",
        "--max-new-tokens",
        4,
        "--steps",
        2,
    ]
    done = CliRunner().invoke(main, [str(a) for a in run])
    assert done.exit_code == 0, done.output
    shutil.copytree(toy / "adapter", folder / "adapter")
    return folder


def test_a_card_shows_what_mmd_bench_measured(benched, hub):
    result = benched / "run" / "result.json"
    done = CliRunner().invoke(
        main,
        ["push", str(benched / "adapter"), "user/mine", "--results", str(result)],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.output
    files = hub.repo("user/mine").files()
    text = files["README.md"].decode()
    payload = read_result(result).payload
    mixed = payload["protocols"]["mixed"]
    entries = {
        (e.dataset_id, e.task_id): e for e in parse_eval_result_entries(yaml.safe_load(files[EVAL_RESULTS]))
    }
    index = {(r.dataset_type, r.dataset_config, r.metric_type): r for r in ModelCard(text).data.eval_results}
    own = {("mmstar", c): mixed["clear"][c]["mmstar"] for c in ("clean", "high")}
    own |= {("mmbench", c): mixed["clear"][c]["mmbench"] for c in ("clean", "high")}
    own |= {("mean-mmbench-mmstar", c): mixed["clear"][c]["mean"] for c in ("clean", "high")}
    own["mmstar", "macro16"] = payload["protocols"]["macro16"]["clear"]["mmstar"]
    own["rbench", "real"] = mixed["clear"]["real"]["rbench"]
    assert set(entries) == {(f"clear-adapters/mmd-bench-{name}", c) for name, c in own}
    for (name, condition), entry in own.items():
        place = (f"clear-adapters/mmd-bench-{name}", condition)
        told = f"N={entry['n']}, {entry['value']:.1f} [{entry['low']:.1f}, {entry['high']:.1f}]"
        assert entries[place].value == index[*place, "accuracy"].metric_value == round(entry["value"], 2)
        assert told in entries[place].notes
        assert f"N={entry['n']}, 95 %" in index[*place, "accuracy"].metric_name
        assert index[*place, "restore_rate"].metric_value == round(entry["restored"] * 100, 2)
        shown = percent(Interval(*(entry[k] / 100 for k in ("value", "low", "high"))))
        assert f"| {condition} | **this adapter** | {entry['n']} | {shown} |" in text
    assert "| real | the base alone | 2 |" in text
    assert text.count("Scores are of one training run on one set") == 1
    with Image.open(io.BytesIO(files["clear-scores.png"])) as figure:
        assert figure.format == "PNG"


@pytest.fixture
def miniature(tmp_path):
    """The committed answers to the benchmark's built-in set, in the form of `bench run`."""
    data = json.loads((ROOT / "benchmarks" / "results" / "miniature.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps({**data, "kind": "mmd_bench"}))
    return tmp_path / "result.json"


def test_numbers_of_mmd_bench_have_their_intervals(miniature):
    (scores,) = read_scores(miniature, "e721676da6282650")
    assert scores.dataset_id == "clear-adapters/mmd-bench-miniature"
    high = {s.system: s for s in scores.scores if s.condition == "high"}
    assert percent(high["the base alone"].right) == "64.0 [57.5, 70.5]"
    assert percent(high["this adapter"].right) == "74.5 [68.5, 81.0]"
    rate = high["this adapter"].restored
    assert (rate.value, rate.low, rate.high) == (0.695, *proportion_interval(139, 200))
    of = {line.system: line for line in lines(read_results([miniature]))}
    for shown in scores.differences:
        paired = gain(of["clear"], of["base"], ["miniature"], shown.condition)
        assert (shown.first, shown.other) == ("this adapter", "the base alone")
        assert (shown.right.value, shown.right.low, shown.right.high) == pytest.approx(
            (paired.value / 100, paired.low / 100, paired.high / 100)
        )
    assert [d.condition for d in scores.differences] == ["clean", "high"]


def test_marks_of_a_judge_are_no_right_answers(miniature):
    data = json.loads(miniature.read_text())
    data["payload"]["judge"] = {"model": "<b>j", "prompt": "1"}
    for cell in data["payload"]["cells"].values():
        cell["metrics"] = {"score": cell["metrics"]["accuracy"]}
    miniature.write_text(json.dumps(data))
    facts = collect_facts(MINE, "user/mine", results=[miniature])
    text = render_card(facts)
    assert "; with marks of the judge &lt;b&gt;j. Score in % [95 % interval]" in text
    assert "| score, % |" in text
    assert {r.metric_type for r in ModelCard(text).data.eval_results} == {"score", "restore_rate"}
    assert "score in %, N=200" in render_scores(facts)
    assert CardFacts.from_json(facts.to_json()) == facts


@pytest.mark.parametrize("name", ["a](b)", "../x", "<!-- clear-adapters:end -->"])
def test_a_benchmark_of_another_name_is_not_shown(miniature, name):
    miniature.write_text(
        miniature.read_text().replace('"task": "miniature"', json.dumps({"task": name})[1:-1])
    )
    with pytest.raises(ClearValueError, match="none of MMD-Bench"):
        read_scores(miniature, "e721676da6282650")


def test_means_of_mmd_bench_count_every_benchmark_the_same(benched):
    found = read_scores(benched / "run" / "result.json", store.adapter_digest(benched / "adapter"))
    assert [s.dataset_id.removeprefix("clear-adapters/mmd-bench-") for s in found] == [
        "mean-mmbench-mmstar",
        "mmbench",
        "mmstar",
        "rbench",
    ]
    of = {line.system: line for line in lines(read_results([benched / "run"]))}
    for shown in found[0].differences:
        one, other = ("clear", "base") if shown.first == "this adapter" else ("always", "never")
        paired = gain(of[one], of[other], ["mmbench", "mmstar"], shown.condition)
        assert (shown.right.value, shown.right.low, shown.right.high) == pytest.approx(
            (paired.value / 100, paired.low / 100, paired.high / 100)
        )
    assert len(found[0].differences) == 4
    assert {s.condition for s in found[0].scores} == {
        "clean",
        "high",
    }  # one benchmark alone was asked at macro16


def test_scores_of_mmd_bench_are_of_the_adapter_that_was_measured(benched, tmp_path):
    result = benched / "run" / "result.json"
    with pytest.raises(ClearValueError, match=r"no score of this adapter.*it measured adapter \("):
        collect_facts(MINE, results=[result])
    data = json.loads(result.read_text())
    data["payload"]["adapter"] = None
    (tmp_path / "base.json").write_text(json.dumps(data))
    with pytest.raises(ClearValueError, match="it measured none"):
        collect_facts(benched / "adapter", results=[tmp_path / "base.json"])
    data = json.loads(result.read_text())
    del data["payload"]["protocols"]["mixed"]["clear"], data["payload"]["protocols"]["macro16"]["clear"]
    (tmp_path / "modes.json").write_text(json.dumps(data))
    with pytest.raises(ClearValueError, match="decide for itself"):
        collect_facts(benched / "adapter", results=[tmp_path / "modes.json"])


@pytest.mark.parametrize("license", ["Apache 2.0", "MIT\nx: y", "", "../x"])
def test_a_license_that_is_none(license):
    with pytest.raises(ClearValueError, match="license="):
        collect_facts(MINE, license=license)


def test_recorded_words_do_nothing_in_a_card(folder):
    """Provenance is data of anybody's."""
    evil = "x</details><script>alert(1)</script> | [a](javascript:b) ![i](http://t/x.png)\n# Title `code`"
    config = json.loads((folder / "clear_config.json").read_text())
    made = config["provenance"]
    made.pop("before")
    made |= {"device": evil, "date": evil, "commit": evil, "data_hash": evil, "adapter": {"name": evil}}
    made["recipe"] = {"stage": evil, "note": "```\n# Title\n<script>"}
    made["steps"], made["seconds"], made["final"] = "many", "long", {"loss": "low", evil: 1.0}
    config["protocol"]["name"] = evil
    config["lora"]["groups"] = config["lora"]["groups"]
    (folder / "clear_config.json").write_text(json.dumps(config))
    text = render_card(collect_facts(folder, "user/mine"))
    fenced = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for bad in ("<script", "</details><", "\n# Title", r"(?<!\\)\]\(javascript", r"!\[i"):
        assert not re.search(bad, fenced), bad
    assert text.count("```") % 2 == 0
    assert ModelCard(text).data.library_name == "clear-adapters"
    assert "| protocol | x&lt;/details&gt;" in text


END = "x <!-- clear-adapters:end --> <img src=x onerror=1> | [free](http://evil)"


def marked(value):
    """The same with a marker in each word."""
    if isinstance(value, dict):
        return {f"{k} {END}": marked(v) for k, v in value.items()}
    if isinstance(value, list):
        return [marked(v) for v in value]
    return END if isinstance(value, str) else value


@pytest.mark.parametrize("recorded", [True, False])
def test_a_marker_in_a_recorded_word_ends_nothing(folder, recorded):
    config = json.loads((folder / "clear_config.json").read_text())
    made = config["provenance"] if recorded else {}
    step = made
    while step:
        for key, value in step.items():
            if isinstance(value, str):
                step[key] = END
        step["recipe"] = {**marked(step["recipe"]), "stage": END}
        step["adapter"] = {"name": END, "hash": END, "revision": END}
        step["final"] = {END: 1.0}
        step["model"] = {"hash": END}
        step = step.get("before")
    config |= {"provenance": made, "stage": END, "library_version": END}
    config["protocol"]["name"] = END
    (folder / "clear_config.json").write_text(json.dumps(config))
    found = collect_facts(folder, f"```{END}", revision=END)
    once = render_card(found)
    assert render_card(found, once) == once
    assert "![" not in once
    fenced = re.sub(r"```.*?```", "", once, flags=re.DOTALL)
    assert "<img" not in fenced
    assert not re.search(r"(?<!\\)\]\(http://evil", fenced)
    compile(snippet(once), "card", "exec")


def test_provenance_that_is_no_chain(folder):
    config = json.loads((folder / "clear_config.json").read_text())
    made = config["provenance"] = {"steps": 1}
    for _ in range(40):
        made["before"] = {"steps": 1}
        made = made["before"]
    (folder / "clear_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="no chain of runs"):
        collect_facts(folder)


def test_nothing_recorded_is_said(folder):
    config = json.loads((folder / "clear_config.json").read_text())
    config |= {"provenance": {}, "stage": None, "base_model": None}
    (folder / "clear_config.json").write_text(json.dumps(config))
    found = collect_facts(folder)
    text = render_card(found)
    assert "Nothing is recorded about its training." in text
    assert "| stages | untrained |" in text
    assert 'attach(base, adapter="adapter")' in text
    assert "No score was taken with these weights: measure before you rely on them." in limits(found)
    compile(snippet(text), "card", "exec")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema_version": 9}', '{"schema_version": 1}'])
def test_facts_that_are_none(text):
    with pytest.raises(ClearValueError, match=r"facts\.json holds no facts"):
        CardFacts.from_json(text)


def test_words_on_one_line():
    assert plain("a\n|b<c>") == "a \\|b&lt;c&gt;"


# ------------------------------------------------------------------------------------------------------------ files


def test_the_command_writes_into_the_adapters_own_folder(folder, monkeypatch):
    run = CliRunner().invoke
    (folder / "README.md").write_text("# Mine\n\nMy words.\n")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "README.md"}
    done = run(main, ["card", str(folder), "--results", str(RESULTS), "--repo-id", "user/mine"])
    assert done.exit_code == 0, done.output
    text = (folder / "README.md").read_text()
    assert "# Mine\n\nMy words.\n" in text
    assert 'adapter="user/mine"' in text
    assert (folder / "clear-scores.png").is_file()
    assert {p: p.read_bytes() for p in before} == before
    assert store.read_adapter(folder).config.stage == "grpo"
    assert not (folder / "facts.json").exists()
    # Rendered again without scores: figure and scores of before are taken away, the words stay.
    assert run(main, ["card", str(folder)]).exit_code == 0
    assert "My words." in (folder / "README.md").read_text()
    assert not (folder / "clear-scores.png").exists()
    assert not (folder / ".eval_results" / "clear-adapters.yaml").exists()


def test_a_card_with_scores_is_not_pushed_without_them(folder, hub):
    write_card(folder, results=[RESULTS])
    with pytest.raises(ClearValueError, match=r"pass the result files again"):
        push_folder(folder, "user/mine")
    push_folder(folder, "user/mine", results=[RESULTS])


@pytest.mark.parametrize("name", ["facts.json", "clear-scores.png", ".eval_results/clear-adapters.yaml"])
@pytest.mark.parametrize("readme", [None, "# Theirs\n"])
def test_files_without_a_card_are_not_written_over(tmp_path, name, readme):
    target = tmp_path / "there"
    (target / name).parent.mkdir(parents=True)
    (target / name).write_text("theirs")
    if readme is not None:
        (target / "README.md").write_text(readme)
    with pytest.raises(AdapterError, match=rf"has {re.escape(name)} and no README\.md with a card"):
        write_card(MINE, target)
    assert (target / name).read_text() == "theirs"
    assert (target / "README.md").exists() == (readme is not None)


@pytest.mark.parametrize("adapter", ["builtin:clear-bagel-tiny", "user/mine"])
def test_a_card_of_what_is_not_ones_own_needs_a_place(adapter):
    with pytest.raises(ClearValueError, match="--output"):
        write_card(adapter)
