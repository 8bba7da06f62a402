"""The engine against plain loops written here, its invariances, and what it leaves untouched."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from dtta_fast import AdaptConfig, Adapter, adapt
from dtta_fast.core.guard import GUARD_STEP
from dtta_fast.core.problem import Problem, Schedule
from dtta_fast.core.step import adaptation_step, initial_state
from dtta_fast.core.weights import select
from dtta_fast.kernels import Pairs, add_noise, denoising_loss
from dtta_fast.kernels.philox import normal
from dtta_fast.session.engine import Engine
from dtta_fast.tasks.classification import Classification

CONFIG = AdaptConfig(steps=5, pairs=6, timesteps="uniform", lr=1e-2, denoiser_lr=1e-3)
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])


def normalise(images: Tensor) -> Tensor:
    return (images - MEAN.to(images)[:, None, None]) / STD.to(images)[:, None, None]


def draws(count: int, config: AdaptConfig, dtype: torch.dtype = torch.float64, seed: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    timesteps = torch.randint(1000, (count, config.steps, config.pairs), generator=generator)
    return timesteps, torch.randn(count, config.steps, config.pairs, 3, 16, 16, generator=generator, dtype=dtype)


def plain_loss(model, denoiser, images, timesteps, noise, config) -> Tensor:
    """The paper's loss of one image, each formula written out: images [1, 3, H, W], timesteps [P], noise [P, C, H, W]."""
    alphas_cumprod = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float32).neg().add(1).cumprod(0).to(noise)
    a, s = alphas_cumprod[timesteps].sqrt()[:, None, None, None], (1 - alphas_cumprod[timesteps]).sqrt()[:, None, None, None]
    logits = model(normalise(images))
    if config.logit_scale is not None:
        logits = config.logit_scale * logits / logits.norm(dim=1, keepdim=True)
    embedding = logits.softmax(1) @ denoiser.network.y_embedder.embedding_table.weight[: logits.shape[1]]
    x_t = a * (2 * images - 1) + s * noise
    prediction = denoiser.network(x_t, timesteps.to(noise.dtype), embedding.expand(len(timesteps), -1))
    measure = F.l1_loss if config.loss == "l1" else F.mse_loss
    return measure(prediction, noise)


def problem_of(model, denoiser, config) -> Problem:
    lr, denoiser_lr = (torch.tensor(rate, dtype=torch.float64) for rate in (config.lr, config.denoiser_lr))
    return Problem(model, denoiser, Classification(), config, lr, denoiser_lr)


def plain_loop(model, denoiser, images, timesteps, noise, config) -> Tensor:
    """Adapts copies to one image by torch.optim, and returns the logits."""
    model, denoiser = copy.deepcopy(model).eval(), copy.deepcopy(denoiser)
    groups = [{"params": model.parameters(), "lr": config.lr}]
    if config.denoiser_parameters == "all":
        groups.append({"params": denoiser.network.parameters(), "lr": config.denoiser_lr})
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay)
    else:
        optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer](groups, weight_decay=config.weight_decay)
    for t, eps in zip(timesteps, noise, strict=True):
        optimizer.zero_grad()
        plain_loss(model, denoiser, images, t, eps, config).backward()
        optimizer.step()
    return model(normalise(images)).detach()


@pytest.mark.parametrize("denoiser_parameters", ["frozen", "all"])
@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "sgd", "momentum": 0.9},
        {"optimizer": "sgd", "momentum": 0.5, "weight_decay": 0.1, "loss": "l1"},
        {"optimizer": "adam", "weight_decay": 0.1},
        {"optimizer": "adamw", "weight_decay": 0.1, "logit_scale": 3.0},
    ],
)
def test_reproduces_a_plain_loop_over_five_steps(model, denoiser, images, change, denoiser_parameters):
    config = CONFIG.replace(denoiser_parameters=denoiser_parameters, chunk=4, **change)
    timesteps, noise = draws(len(images), config)
    result = adapt(model, denoiser, images, config=config, timesteps=timesteps, noise=noise)
    expected = torch.cat([plain_loop(model, denoiser, images[i : i + 1], timesteps[i], noise[i], config) for i in range(len(images))])
    torch.testing.assert_close(result.outputs, expected, rtol=1e-5, atol=1e-5)
    assert float((result.outputs - result.outputs_before).abs().max()) > 1e-3  # it did adapt


def test_reproduces_a_plain_loop_in_float32(model, denoiser):
    """As near to float64 as the plain loop in float32 is, twice at most: over six draws, since each alone is off by what sums round to."""
    config = CONFIG.replace(optimizer="sgd")
    single, squares = (model.float(), denoiser.float()), []
    for seed in range(6):
        images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        timesteps, noise = draws(len(images), config, torch.float32, seed)
        found = adapt(*single, images, config=config, timesteps=timesteps, noise=noise).outputs
        loops = []
        for dtype in (torch.float32, torch.float64):
            network, diffusion = (copy.deepcopy(part).to(dtype) for part in single)
            inputs, given = images.to(dtype), noise.to(dtype)
            each = [plain_loop(network, diffusion, inputs[i : i + 1], timesteps[i], given[i], config) for i in range(len(inputs))]
            loops.append(torch.cat(each))
        plain, exact = loops
        squares.append([float((outputs - exact).square().mean()) for outputs in (found, plain)])
    ours, theirs = torch.tensor(squares).mean(0).sqrt()
    assert ours <= 2 * theirs


@pytest.mark.quick
@pytest.mark.parametrize("chunk", ["auto", 1, 4, 6, 100])
@pytest.mark.parametrize("denoiser_parameters", ["frozen", "all"])
def test_gradient_equals_the_naive_loop_s(model, denoiser, images, chunk, denoiser_parameters):
    """One step of SGD with lr 1 and no momentum moves the weights by the gradient; the naive loop runs the classifier for every pair."""
    config = CONFIG.replace(chunk=chunk, denoiser_parameters=denoiser_parameters, optimizer="sgd", momentum=0.0, lr=1.0, denoiser_lr=1.0)
    timesteps, noise = draws(len(images), config)
    problem = problem_of(model.eval(), denoiser, config)
    theta = select(model, "all")
    phi = {name: p for name, p in denoiser.named_parameters() if denoiser_parameters == "all"}
    schedule = Schedule(chunk=64 if chunk == "auto" else chunk)
    state = initial_state(problem, theta, phi, model(normalise(images)).detach())
    ids = torch.arange(len(images))
    start = copy.deepcopy(state)
    loss = adaptation_step(problem, schedule, state, normalise(images), 2 * images - 1, ids, timesteps[:, 0], noise[:, 0])
    for i in range(len(images)):
        drawn = zip(timesteps[i, 0].split(1), noise[i, 0].split(1), strict=True)
        naive = torch.stack([plain_loss(model, denoiser, images[i : i + 1], t, eps, config) for t, eps in drawn]).mean()
        torch.testing.assert_close(loss[i], naive.detach())
        for own, moved, first in ((theta, state.theta, start.theta), (phi, state.phi, start.phi)):
            expected = torch.autograd.grad(naive, list(own.values()), retain_graph=True, materialize_grads=True) if own else ()
            for name, gradient in zip(own, expected, strict=True):
                error = (first[name][i] - moved[name][i] - gradient).norm()
                assert error <= 1e-5 * gradient.norm() + 1e-12, name


CHANGES = [{}, {"denoiser_parameters": "all"}, {"parameters": "norm"}, {"parameters": "logits"}, {"guard": 2, "top_k": 3}]


@pytest.mark.parametrize("change", CHANGES)
def test_an_image_s_result_is_its_own(model, denoiser, images, change):
    """Whatever the chunk, the batch's composition and its order."""
    config = CONFIG.replace(**change)
    ids = torch.tensor([10, 11, 12, 13])
    whole = adapt(model, denoiser, images, config=config, image_ids=ids)
    order = torch.tensor([2, 0, 3, 1])
    for chunk, rows in (("auto", order), (1, order[:2]), (4, order[3:]), (5, torch.tensor([1, 1, 0]))):
        part = adapt(model, denoiser, images[rows], config=config.replace(chunk=chunk), image_ids=ids[rows])
        torch.testing.assert_close(part.outputs, whole.outputs[rows], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(part.loss, whole.loss[rows], rtol=1e-8, atol=1e-8)
        assert torch.equal(part.accepted, whole.accepted[rows])
        assert torch.equal(part.evaluations, whole.evaluations[rows])


@pytest.mark.quick
def test_draws_are_the_documented_noise(model, denoiser, images):
    """The noise that the engine draws, handed over explicitly, gives the same result."""
    config = CONFIG.replace(seed=99)
    problem = problem_of(model, denoiser, config)
    ids, pairs = torch.tensor([3, 1, 4, 159]), torch.arange(config.pairs)
    steps = [torch.tensor(step) for step in range(config.steps)]
    timesteps = torch.stack([problem.draws(config.pairs).timesteps(ids, step) for step in steps], dim=1)
    noise = torch.stack([normal(3 * 16 * 16, pairs, ids, config.seed, step, torch.float64) for step in steps], dim=1).view(
        4, 5, 6, 3, 16, 16
    )
    drawn = adapt(model, denoiser, images, config=config, image_ids=ids)
    explicit = adapt(model, denoiser, images, config=config, timesteps=timesteps, noise=noise)
    torch.testing.assert_close(drawn.outputs, explicit.outputs)
    other = adapt(model, denoiser, images, config=config.replace(seed=98), image_ids=ids)
    assert float((other.outputs - drawn.outputs).abs().max()) > 1e-6


@pytest.mark.quick
@pytest.mark.parametrize("denoiser_parameters", ["frozen", "all"])
@pytest.mark.parametrize("mode", ["episodic", "online"])
def test_the_caller_s_modules_are_untouched(model, denoiser, images, untouched, mode, denoiser_parameters):
    model.train()  # flags too
    denoiser.eval()
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    random_state = torch.get_rng_state()
    with untouched(model, denoiser):
        adapt(model, denoiser, images, config=CONFIG.replace(mode=mode, denoiser_parameters=denoiser_parameters, guard=2))
    assert torch.equal(random_state, torch.get_rng_state())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("mode", ["episodic", "online"])
@pytest.mark.parametrize("call", [1, 4, 15])  # 5 steps of 3 chunks: the first, one in the middle, the last
def test_a_failing_denoiser_leaves_nothing_behind(model, denoiser, images, untouched, mode, error, call):
    calls = -1000

    def fail(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error("injected")

    denoiser.network.blocks[1].register_forward_pre_hook(fail)
    adapter = Adapter(model, denoiser, CONFIG.replace(mode=mode, chunk=2, denoiser_parameters="all"))
    adapter.adapt(images)
    before, calls = copy.deepcopy(adapter.state_dict()), 0
    with untouched(model, denoiser), pytest.raises(error, match="injected"):
        adapter.adapt(images)
    torch.testing.assert_close(adapter.state_dict(), before, rtol=0, atol=0)
    again, twin = adapter.adapt(images), Adapter(model, denoiser, adapter.config)
    twin.load_state_dict(before)
    assert torch.equal(again.outputs, twin.adapt(images).outputs)


@pytest.mark.quick
def test_online_goes_on_from_batch_to_batch(model, denoiser, images):
    config = CONFIG.replace(mode="online", steps=1, optimizer="adam")
    timesteps, noise = draws(4, config)
    adapter = Adapter(model, denoiser, config)
    found = [adapter.adapt(images[p], timesteps=timesteps[p], noise=noise[p]).outputs for p in (slice(0, 2), slice(2, 4))]
    moved = copy.deepcopy(model).eval()
    optimizer = torch.optim.Adam(moved.parameters(), lr=config.lr)
    for number, (first, last) in enumerate(((0, 2), (2, 4))):
        optimizer.zero_grad()
        parts = [plain_loss(moved, denoiser, images[i : i + 1], timesteps[i, 0], noise[i, 0], config) for i in range(first, last)]
        torch.stack(parts).mean().backward()
        optimizer.step()
        torch.testing.assert_close(found[number], moved(normalise(images[first:last])).detach(), rtol=1e-5, atol=1e-5)
    saved = adapter.state_dict()
    adapter.reset()
    assert adapter.state_dict() == {}
    assert torch.equal(adapter.adapt(images[:2]).outputs_before, Adapter(model, denoiser, config).adapt(images[:2]).outputs_before)
    adapter.load_state_dict(saved)
    torch.testing.assert_close(adapter.adapt(images[2:]).outputs_before, found[1])


def test_forward_is_a_drop_in(model, denoiser, images):
    adapter = Adapter(model, denoiser, CONFIG)
    assert torch.equal(adapter(images), adapter.adapt(images).outputs)


@pytest.mark.parametrize("which", ["head", "norm"])
def test_only_the_chosen_weights_move(model, denoiser, images, which):
    adapter = Adapter(model, denoiser, CONFIG.replace(parameters=which, mode="online"))
    adapter.adapt(images)
    kinds = {"head": nn.Linear, "norm": nn.LayerNorm}
    chosen = {f"{n}.{p}" for n, m in model.named_modules() if isinstance(m, kinds[which]) for p in ("weight", "bias")}
    if which == "head":
        chosen = {name for name in chosen if name.startswith("head.fc")}
    theta = adapter.state_dict()["theta"]
    assert set(theta) == chosen
    own = dict(model.named_parameters())
    assert not any(torch.equal(value, own[name]) for name, value in theta.items())


def test_free_logits_follow_the_gradient(model, denoiser, images):
    config = CONFIG.replace(parameters="logits", optimizer="sgd", steps=1, momentum=0.0, lr=0.5)
    timesteps, noise = draws(1, config)
    logits = model.eval()(normalise(images[:1])).detach().requires_grad_()
    loss = plain_loss(lambda _: logits, denoiser, images[:1], timesteps[0, 0], noise[0, 0], config)
    expected = logits - 0.5 * torch.autograd.grad(loss, logits)[0]
    found = adapt(model, denoiser, images[:1], config=config, timesteps=timesteps, noise=noise)
    torch.testing.assert_close(found.outputs, expected.detach())
    torch.testing.assert_close(found.outputs_before, logits.detach())


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_guard_keeps_the_answer_with_the_lower_loss(model, denoiser, images, threshold):
    """A step so long that answers change; the guard's own pairs say which of the two stands."""
    config = CONFIG.replace(steps=1, lr=0.5, guard=3, guard_threshold=threshold)
    free = adapt(model, denoiser, images, config=config.replace(guard=0))
    guarded = adapt(model, denoiser, images, config=config)
    changed = free.predictions != free.predictions_before
    assert changed.any()
    assert guarded.evaluations.tolist() == [6 + 6 * int(c) for c in changed]
    ids, step = torch.arange(4), torch.tensor(1 + 2**31)
    timesteps = problem_of(model, denoiser, config).draws(3).timesteps(ids, step)
    noise = normal(3 * 16 * 16, torch.arange(3), ids, config.seed, step).view(4, 3, 3, 16, 16).double()
    for i in range(4):
        losses = []
        for answer in (free.predictions_before[i], free.predictions[i]):
            one_hot = torch.full((1, 7), -1e9, dtype=torch.float64)
            one_hot[0, answer] = 0
            own = zip(timesteps[i].split(1), noise[i].split(1), strict=True)
            losses.append([plain_loss(lambda _, z=one_hot: z, denoiser, images[i : i + 1], t, eps, config).item() for t, eps in own])
        change = np.subtract(losses[1], losses[0])
        stands = bool(not changed[i] or change.mean() < -threshold * stats.sem(change))
        assert bool(guarded.accepted[i]) == stands
        assert torch.equal(guarded.outputs[i], free.outputs[i] if stands else free.outputs_before[i])


def test_an_adaptation_that_diverges_is_refused(model, denoiser, images):
    result = adapt(model, denoiser, images, config=CONFIG.replace(optimizer="sgd", lr=1e200))
    assert not result.accepted.any()
    assert torch.equal(result.outputs, result.outputs_before)


def test_callers_under_no_grad(model, denoiser, images, untouched):
    expected = adapt(model, denoiser, images, config=CONFIG).outputs
    with torch.no_grad(), untouched(model, denoiser):
        assert torch.equal(adapt(model, denoiser, images, config=CONFIG).outputs, expected)
        assert not torch.is_grad_enabled()
    with torch.inference_mode(), untouched(model, denoiser), pytest.raises(RuntimeError, match="inference_mode"):
        adapt(model, denoiser, images, config=CONFIG)
    with torch.inference_mode():
        made_there = images.clone()
    assert torch.equal(adapt(model, denoiser, made_there, config=CONFIG).outputs, expected)


def test_images_of_other_sizes_and_dtypes(model, denoiser):
    """timm's own evaluation transform is the oracle of size, crop and normalisation."""
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

    pixels = torch.randint(256, (2, 40, 33, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    inputs = torch.stack([transform(Image.fromarray(image.numpy())) for image in pixels]).double()
    result = adapt(model, denoiser, pixels.permute(0, 3, 1, 2), config=CONFIG)
    # PIL rounds to 8 bits between its passes; 1/255 in [0, 1] is what that can change
    seen = Classification()
    mine = seen.normalise(model, seen.crop(model, pixels.permute(0, 3, 1, 2).float() / 255))
    torch.testing.assert_close(mine.double(), inputs, rtol=0, atol=2 / 255 / 0.2)
    torch.testing.assert_close(result.outputs_before, model.eval()(mine.double()).detach())


def test_a_module_of_one_s_own_gets_the_images_as_they_are(denoiser, images):
    own = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 7)).double()
    torch.testing.assert_close(adapt(own, denoiser, images, config=CONFIG).outputs_before, own(images).detach())
    task = Classification(normalise=normalise)
    found = adapt(own, denoiser, images, config=CONFIG, task=task).outputs_before
    torch.testing.assert_close(found, own(normalise(images)).detach())


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_other_architectures(denoiser, images, name):
    import timm

    if name == "vit":
        sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
        net = timm.create_model("vit_tiny_patch16_224", num_classes=7, pretrained_cfg_overlay={"input_size": (3, 16, 16)}, **sizes)
    else:
        net = timm.create_model("test_resnet", num_classes=7)
    net = net.double()
    whole = adapt(net, denoiser, images, config=CONFIG)
    alone = adapt(net, denoiser, images[2:3], config=CONFIG, image_ids=torch.tensor([2]))
    torch.testing.assert_close(whole.outputs[2:3], alone.outputs, rtol=1e-8, atol=1e-8)


def test_the_guard_chooses_the_answer_with_the_lowest_held_out_loss(model, denoiser, images, process, guarded):
    """Of three answers, against losses computed here one by one; each distinct answer is paid for once."""
    config = AdaptConfig(guard=5, guard_threshold=0.5, pairs=4, timesteps="uniform")
    engine = Engine(model, denoiser, Classification(), config)
    x0, ids, at = denoiser.encode(images), torch.arange(4), torch.tensor(3)
    engine.program.plan(images, x0, 4)
    answers = torch.tensor([[0, 1, 2], [3, 3, 4], [5, 6, 6], [2, 2, 2]])  # original, adapted, matched; an image a row
    outputs = [F.one_hot(column, 7).double() for column in answers.T]
    found, accepted, evaluations = guarded(engine.program, outputs[0], outputs[1:], x0, ids, at)
    assert evaluations.tolist() == [15, 10, 10, 0]
    timesteps = engine.program.problem.draws(5).timesteps(ids, at + GUARD_STEP)
    draw = {"table": process.table, "x0": x0, "timesteps": timesteps, "image_ids": ids, "seed": 0, "step": at + GUARD_STEP}
    draw |= {"pair0": 0, "noise": None}
    x_t, table = add_noise(Pairs(**draw), torch.float64), denoiser.class_embeddings({})
    losses = []
    for column in answers.T:
        with torch.no_grad():
            prediction = denoiser(x_t, timesteps.flatten(), table[column].repeat_interleave(5, 0))
        losses.append(denoising_loss(prediction, Pairs(**draw)))
    for i, row in enumerate(answers):
        scores = [0.0]
        for k in (1, 0):
            change = losses[k][i] - losses[2][i]
            scores.append(float(change.mean() + 0.5 * change.std() / 5**0.5))
        best = int(torch.tensor(scores).argmin())
        assert found[i].argmax() == row[(2, 1, 0)[best]]
        assert accepted[i] == (best == 1 or (best == 0 and row[1] == row[2]))
