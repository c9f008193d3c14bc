"""Training on codes: what each stage's loss is, and where its gradient goes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from clear_adapters import attach
from clear_adapters.backbones import get_backbone, list_backbones, resolve, writer
from clear_adapters.contract.paths import describe
from clear_adapters.datasets import read_examples
from clear_adapters.datasets.world import build as build_world
from clear_adapters.prompts import get_protocol
from clear_adapters.rewards import register_reward
from clear_adapters.rewards.registry import REWARDS
from clear_adapters.sampling import LatentSampling, TextSampling
from clear_adapters.training.bridge import BridgeObjective, BridgeSettings
from clear_adapters.training.build import decoder_layers
from clear_adapters.training.grpo import GrpoObjective, GrpoSettings
from clear_adapters.training.objective import Draw
from clear_adapters.training.sft import SftObjective, SftSettings
from clear_adapters.training.trainer import compile_layers
from tests.scripted import picture

FAMILIES = [n for n in list_backbones() if get_backbone(n).kind == "codes"]
TEXT = TextSampling(max_new_tokens=8, temperature=1.0)
LATENT = LatentSampling(guidance_text=1.0, guidance_image=1.0)
ALWAYS = replace(SftSettings().traces, restore_below=1000.0, explore=0.0, declined=0.0)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    found = read_examples(
        build_world(tmp_path_factory.mktemp("world") / "data", 24, workers=1, progress=False)
    )
    return [replace(e, psnr=1.0) for e in found if e.degradation is not None][:3]


@pytest.fixture(params=FAMILIES)
def attached(request):
    spec = get_backbone(request.param)
    made = attach(resolve(spec.tiny, spec)(0))
    made.config = replace(made.config, protocol=get_protocol("tiny"))
    for number, (_, parameter) in enumerate(made.named_parameters()):
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.data = parameter.detach() + 0.05 * drawn
        parameter.requires_grad_(True)
    yield made
    made.detach()


def draws(examples):
    return [Draw(e, 0, i) for i, e in enumerate(examples)]


def gradients(attached, loss, every=False):
    """Largest gradient by part of the adapter; of a whole loss every weight has one, for which DDP waits."""
    for _, parameter in attached.named_parameters():
        parameter.grad = None
    loss.backward()
    generation = attached.backbone.lora_names(["generation"])
    found = {"understanding": 0.0, "generation": 0.0, "bridge": 0.0}
    for name, parameter in attached.named_parameters():
        part = "bridge" if name.startswith("bridge.") else "understanding"
        part = "generation" if any(f".{g}.lora" in name for g in generation) else part
        assert parameter.grad is not None or not every, name
        if parameter.grad is not None:
            found[part] = max(found[part], float(parameter.grad.abs().max()))
    return found


def test_stage_1_is_cross_entropy_of_the_clean_picture_s_codes(attached, examples):
    """At one copy of them, which is seen by nothing; what follows reads them through the bridge."""
    own = SftObjective(
        attached.backbone, get_protocol("tiny"), SftSettings(noised_copies=3, traces=ALWAYS, vit_drop=0.5)
    )
    assert own.parts == ("ce", "code_ce")
    made = own.collate(draws(examples))
    clean = [attached.backbone.prepare(e.load_clean()) for e in examples]
    codes = torch.cat([r.tokens[0] for r in attached.backbone.encode_images(clean)])
    out = own.loss(attached.module, made, made["counts"])
    batch = attached.backbone.encode(made["batch"])
    assert torch.equal(batch.codes[batch.scored_at], codes)
    assert made["counts"][1] == len(codes)
    expected = F.cross_entropy(attached.module(batch).scored, codes)
    torch.testing.assert_close(out["code_ce"], expected)
    found = gradients(attached, out["code_ce"])
    assert found["generation"] > 0
    assert found["bridge"] == 0
    assert gradients(attached, own.loss(attached.module, made, made["counts"])["ce"])["bridge"] > 0


def test_a_batch_without_a_restoration_still_reaches_every_weight(attached, examples):
    own = SftObjective(
        attached.backbone, get_protocol("tiny"), SftSettings(traces=replace(ALWAYS, restore_below=0.0))
    )
    made = own.collate(draws(examples))
    assert len(made["batch"].scored_at) == 0
    out = own.loss(attached.module, made, made["counts"])
    assert float(out["code_ce"].detach()) == 0
    assert gradients(attached, out["loss"], every=True)["understanding"] > 0


@pytest.mark.parametrize("source", ["estimate", "own", "true"])
def test_stage_2_reads_true_codes_own_ones_and_estimates(attached, examples, source):
    """Through an estimate alone the answer's gradient reaches the generator, past the codes it would have taken."""
    settings = BridgeSettings(
        own=float(source == "own"),
        estimate=float(source == "estimate"),
        traces=ALWAYS,
        vit_drop=0.0,
        mse_weight=0.0,
        centred=True,
    )
    own = BridgeObjective(attached.backbone, get_protocol("tiny"), settings, LATENT)
    assert own.parts == ("ce", "distill", "code_ce")
    with torch.no_grad():
        (made,) = own.prepare([own.collate(draws(examples))])
    taught = source != "estimate"  # an estimate has no picture that its teacher could see
    assert made["counts"][1] == (len(examples) if taught else 0)
    out = own.loss(attached.module, made, made["counts"])
    assert (float(out["distill"].detach()) > 0) == taught
    gradients(attached, out["loss"], every=True)
    out = own.loss(attached.module, made, made["counts"])
    found = gradients(attached, out["ce"])
    assert found["bridge"] > 0
    batch = made["batch"]
    final = batch.latent_bridged
    if source == "true":
        clean = [attached.backbone.prepare(e.load_clean()) for e in examples]
        expected = torch.cat([r.tokens[0] for r in attached.backbone.encode_images(clean)])
        assert torch.equal(batch.codes[final], expected)
    # The head's weights take part in an estimate only.
    head = [p for n, p in attached.named_parameters() if "head" in n and "bridge" not in n]
    reached = max(0.0 if p.grad is None else float(p.grad.abs().max()) for p in head)
    if attached.backbone.spec.name == "janus":  # Emu3 has one head for text and codes
        assert (reached > 0) == (source == "estimate")
    if source == "estimate":
        with torch.no_grad():
            outputs = attached.module(batch)
            estimated = own._estimate(attached.module, batch, made["counts"])[0].latents[final]
            taken = attached.backbone.embed_codes(outputs.scored.argmax(-1))
        torch.testing.assert_close(estimated, taken.float())


def variety(prompts, completions, **columns):
    """A reward in which replies of an untrained toy differ."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def test_stage_3_scores_every_code_that_a_rollout_sampled(attached, examples, monkeypatch):
    """At the policy that sampled, ratios are 1; restorations bear their part of the loss."""
    engine = type(attached.engine)
    rollout = engine.rollout
    monkeypatch.setattr(engine, "rollout", lambda self, *a, **k: rollout(self, *a, restore="always", **k))
    register_reward("variety", variety)
    try:
        settings = GrpoSettings(
            group=2, rewards={"variety": 1.0, "latent_quality": 0.1}, image_weight=1.0, beta=0.1
        )
        reference = {n: p.detach() + 0.01 for n, p in attached.named_parameters()}
        # An adapter whose answers take the likeliest codes draws them in rollouts: of what was not drawn there is no policy.
        own = GrpoObjective(attached, settings, reference, TEXT, replace(LATENT, temperature=0.0))
    finally:
        REWARDS.unregister("variety")
    with torch.no_grad():
        (made,) = own.prepare([own.collate(draws(examples)[:2])])
    targets = made["targets"]
    first, second = targets.codes.split(targets.per_row)[:2]
    assert not torch.equal(first, second)
    assert sum(targets.per_row) == len(targets.codes) == len(made["batch"].scored_at) > 0
    out = own.loss(attached.module, made, made["counts"])
    assert float(out["ratio"]) < 1e-5
    text, codes = own._logprobs(attached.module(made["batch"]), made["batch"], targets)
    torch.testing.assert_close(codes, targets.recorded, atol=1e-4, rtol=0)
    assert len(text) == len(made["text_old"])
    assert float(out["flow_kl"].detach()) > 0
    assert gradients(attached, out["flow"])["generation"] > 0
    quality = own.facts()["reward/latent_quality"]
    assert quality[1] == 4
    assert 0 < quality[0] / quality[1] < 1


def test_recomputed_activations_change_no_gradient_and_are_undone(examples):
    spec = get_backbone("janus")
    backbone = resolve(spec.tiny, spec)(0)
    before = describe(backbone)
    found = []
    for checkpointing in (False, True):
        attached = attach(backbone)
        for number, (_, parameter) in enumerate(attached.named_parameters()):
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.data = parameter.detach() + 0.05 * drawn
        backbone.set_checkpointing(checkpointing)
        attached.module.train()
        own = SftObjective(backbone, get_protocol("tiny"), SftSettings(traces=ALWAYS))
        made = own.collate(draws(examples))
        own.loss(attached.module, made, made["counts"])["loss"].backward()
        found.append([p.grad.clone() for _, p in attached.named_parameters()])
        # Recomputing layers drop a cache of transformers; ours is read all the same.
        context = backbone.read_text(backbone.start(1, [0]), [backbone.encode_text("What?")])
        assert context.length == len(backbone.encode_text("What?")) + 3
        first = backbone.write_text(context, TEXT)[1][0]
        attached.module.eval()
        assert backbone.write_text(context, TEXT)[1][0].ids.tolist() == first.ids.tolist()
        attached.detach()
        assert describe(backbone) == before
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_codes_are_written_without_gradient_and_leave_the_room_they_took(attached):
    """A context that restored can go on in place: nothing is copied for what follows."""
    backbone = attached.backbone
    image = backbone.prepare(picture(0))
    context = backbone.read_image(backbone.start(2, [1, 2]), [image, image])
    storage = context.cache._storage
    after, found = backbone.restore(context, LATENT)
    assert not storage.data.requires_grad
    assert after.length == context.length
    assert storage.used <= context.length
    assert all(not r.codes.requires_grad for r in found)


# -- on a GPU

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(params=FAMILIES)
def on_gpu(request):
    spec = get_backbone(request.param)
    backbone = resolve(spec.tiny, spec)(0)
    backbone.model.to("cuda")
    made = attach(backbone)
    made.config = replace(made.config, protocol=get_protocol("tiny"))
    yield made
    made.detach()


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("guided", [False, True])
def test_captured_codes_equal_uncaptured_ones(on_gpu, guided, monkeypatch):
    backbone = on_gpu.backbone
    image = backbone.prepare(picture(0))
    context = backbone.read_image(backbone.start(2, [1, 2]), [image, image])
    latent = LatentSampling(temperature=0.0, **({} if guided else {"guidance_text": 1, "guidance_image": 1}))
    guidance = (context.fork(), None) if guided else ()
    graphs, capture = [], writer.Writer._captured
    monkeypatch.setattr(writer.Writer, "_captured", lambda self: graphs.append(capture(self)) or graphs[-1])
    found = backbone.restore(context.fork(), latent, guidance)[1]
    assert graphs
    assert None not in graphs
    monkeypatch.setattr(writer.Writer, "_captured", lambda self: None)
    plain = backbone.restore(context.fork(), latent, guidance)[1]
    assert [r.codes.tolist() for r in found] == [r.codes.tolist() for r in plain]


@pytest.mark.gpu
@GPU
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_layers_learn_what_plain_ones_do(on_gpu, examples):
    own = SftObjective(on_gpu.backbone, get_protocol("tiny"), SftSettings(traces=ALWAYS))
    made = {k: v.to("cuda") if hasattr(v, "to") else v for k, v in own.collate(draws(examples)).items()}
    losses = [float(own.loss(on_gpu.module, made, made["counts"])["loss"])]
    try:
        compile_layers(decoder_layers(on_gpu))
        losses.append(float(own.loss(on_gpu.module, made, made["counts"])["loss"]))
    finally:
        torch._dynamo.reset()
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
