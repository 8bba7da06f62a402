"""Which classes, pairs and weights a loss is made of, and its gradients, against loops written here in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from torch.func import functional_call

from dtta_fast import AdaptConfig, Adapter, adapt, presets
from dtta_fast.core.calibrate import calibrate
from dtta_fast.core.differences import BINS
from dtta_fast.core.draws import Draws, cumulative_density
from dtta_fast.core.guard import GUARD_STEP
from dtta_fast.core.loss import Noised, accumulated_gradients, noise_mix, noise_mix_null
from dtta_fast.kernels import Pairs, add_noise, denoising_loss
from dtta_fast.kernels.philox import class_uniforms
from dtta_fast.session.engine import Engine
from dtta_fast.tasks.classification import Classification

CONFIG = AdaptConfig(steps=2, pairs=4, lr=1e-2, timesteps="stratified")


@pytest.fixture
def rows(denoiser, images):
    """Two images with five pairs each, and three candidate classes."""
    generator = torch.Generator().manual_seed(4)
    x0 = images[:2] * 2 - 1
    timesteps = torch.randint(1000, (2, 5), generator=generator)
    noise = torch.randn(2, 5, *x0.shape[1:], generator=generator, dtype=torch.float64)
    drawn = Pairs(x0, denoiser.process.table, timesteps, torch.arange(2), 0, torch.tensor(0), noise=noise)
    probabilities = torch.rand(2, 3, generator=generator, dtype=torch.float64).softmax(1).requires_grad_()
    conditions = denoiser.class_embeddings({})[torch.tensor([[0, 3, 5], [6, 1, 2]])]
    return drawn, probabilities, conditions


def noised(denoiser, drawn: Pairs) -> Tensor:
    a, s = denoiser.process.table.double()[drawn.timesteps, :2].view(2, 5, 2, 1, 1, 1).unbind(2)
    return a * drawn.x0[:, None] + s * drawn.noise


@pytest.mark.parametrize("chunk", [1, 2, 64])
@pytest.mark.parametrize("moving", [False, True])
def test_mixed_predictions_have_the_gradients_of_a_plain_loop(denoiser, rows, chunk, moving):
    drawn, probabilities, conditions = rows
    own = {name: p.detach() for name, p in denoiser.named_parameters() if name.startswith("network.blocks.0.")} if moving else {}
    heads = [probabilities, conditions]
    loss, to_heads, to_phi, scale = accumulated_gradients(noise_mix, denoiser, own, heads, drawn, chunk, False, per_image=False)
    x_t, leaves = noised(denoiser, drawn), {name: p.clone().requires_grad_() for name, p in own.items()}
    expected = []
    for i in range(2):
        total = 0.0
        for j in range(5):
            each = [
                functional_call(denoiser, leaves, (x_t[i, j : j + 1], drawn.timesteps[i, j : j + 1], conditions[i, k : k + 1]))
                for k in range(3)
            ]
            mixed = sum(probabilities[i, k] * each[k] for k in range(3))
            total = total + F.mse_loss(mixed[0], drawn.noise[i, j]) / 5
        expected.append(total)
    torch.testing.assert_close(loss, torch.stack(expected).detach(), rtol=1e-9, atol=0)
    wanted = torch.autograd.grad(torch.stack(expected).mean(), [probabilities, *leaves.values()])
    assert scale == 1
    assert len(to_heads) == 1  # the conditions are constants here
    for found, expected_gradient in zip([*to_heads, *to_phi], wanted, strict=True):
        torch.testing.assert_close(found, expected_gradient, rtol=1e-7, atol=1e-12)


def test_with_the_null_condition_the_denoiser_learns_from_that_alone(denoiser, rows):
    drawn, probabilities, conditions = rows
    own = {name: p.detach() for name, p in denoiser.named_parameters() if "pos_embed" not in name}
    _, to_heads, to_phi, _ = accumulated_gradients(noise_mix_null, denoiser, own, [probabilities, conditions], drawn, 2, False, False)
    _, same, _, _ = accumulated_gradients(noise_mix, denoiser, {}, [probabilities, conditions], drawn, 64, False, False)
    torch.testing.assert_close(to_heads[0], same[0], rtol=1e-9, atol=0)
    leaves = {name: p.clone().requires_grad_() for name, p in own.items()}
    null = leaves["network.y_embedder.embedding_table.weight"][-1].expand(10, -1)
    prediction = functional_call(denoiser, leaves, (noised(denoiser, drawn).flatten(0, 1), drawn.timesteps.flatten(), null))
    expected = torch.autograd.grad(F.mse_loss(prediction, drawn.noise.flatten(0, 1)), list(leaves.values()), materialize_grads=True)
    for found, gradient in zip(to_phi, expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-7, atol=1e-12)


def test_a_mixture_of_one_class_is_that_class(denoiser, rows):
    drawn, _, conditions = rows
    part = Noised(noised(denoiser, drawn).flatten(0, 1), drawn.timesteps.flatten(), 2, 5)
    certain = torch.tensor([[0.0, 1.0, 0.0]] * 2, dtype=torch.float64)
    (mixed,) = noise_mix(denoiser, {}, [certain, conditions], part)
    torch.testing.assert_close(mixed, part.denoised(denoiser, {}, conditions[:, 1:2])[:, 0])


@pytest.mark.parametrize("change", [{}, {"denoiser_parameters": "all"}, {"denoiser_parameters": "all", "null_condition": True}])
def test_noise_mixing_lowers_its_loss_and_counts_its_forwards(model, denoiser, images, change):
    config = CONFIG.replace(objective="noise_mix", top_k=3, drawn_classes=2, steps=6, common_draws=True, optimizer="sgd", lr=1e-3, **change)
    still = config.replace(drawn_classes=0)  # the same classes and pairs in every step
    losses = adapt(model, denoiser, images, config=still).loss
    assert (losses[:, -1] < losses[:, 0]).all()
    found = adapt(model, denoiser, images, config=config)
    assert found.evaluations.tolist() == [6 * 4 * (5 + config.null_condition)] * 4
    alone = adapt(model, denoiser, images[2:3], config=config, image_ids=torch.tensor([2]))
    torch.testing.assert_close(alone.outputs, found.outputs[2:3], rtol=1e-8, atol=1e-8)
    pieces = adapt(model, denoiser, images, config=config.replace(chunk=1))
    torch.testing.assert_close(pieces.outputs, found.outputs, rtol=1e-8, atol=1e-8)


def test_drawn_classes_are_drawn_without_replacement_by_their_probability():
    logits = torch.tensor([[4.0, 0.0, 1.0, -1.0, 2.0, 0.5]]).repeat(40000, 1)
    config = CONFIG.replace(top_k=1, drawn_classes=2)
    chosen = Classification().choose(logits, config, torch.arange(len(logits)), torch.tensor(3))
    assert chosen.shape == (len(logits), 3)
    assert (chosen[:, 0] == 0).all()
    assert (chosen.sort(1).values.diff(dim=1) > 0).all()
    others = logits[0, 1:].double().softmax(0)
    counts = torch.bincount(chosen[:, 1] - 1, minlength=5)
    assert stats.chisquare(counts.numpy(), (others * counts.sum()).numpy()).pvalue > 1e-3
    assert not torch.equal(chosen, Classification().choose(logits, config, torch.arange(len(logits)), torch.tensor(4)))


def test_class_uniforms_share_no_word_with_timesteps():
    ids, step = torch.arange(50), torch.tensor(1)
    uniforms = (class_uniforms(8, ids, 5, step) * 2**32).long()
    timesteps = Draws(5, 8, "uniform", 0, 2**31).timesteps(ids, step) * 2
    assert not (uniforms[:, :, None] // 4 == timesteps[:, None] // 4).any()


def test_a_drawn_mixture_is_that_of_its_classes(model, denoiser, images):
    config = CONFIG.replace(top_k=2, drawn_classes=2, logit_scale=3.0)
    task, outputs = Classification(), torch.randn(4, 7, dtype=torch.float64)
    chosen = task.choose(outputs, config, torch.arange(4), torch.tensor(0))
    found = task.condition(outputs, denoiser, {}, config, chosen)
    scaled = 3 * outputs / outputs.norm(dim=1, keepdim=True)
    shares = torch.full_like(scaled, -torch.inf).scatter(1, chosen, scaled.gather(1, chosen)).softmax(1)
    torch.testing.assert_close(found, shares @ denoiser.class_embeddings({}), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("antithetic", "share_noise"), [(True, False), (False, True), (True, True)])
def test_noise_that_pairs_share(antithetic, share_noise):
    draws = Draws(3, 6, "stratified", 0, 1000, antithetic=antithetic, share_noise=share_noise)
    ids, step, x0 = torch.tensor([4, 9]), torch.tensor(2), torch.zeros(2, 3, 5, 7)
    noise, timesteps = draws.noise(x0, ids, step), draws.timesteps(ids, step)
    assert noise.shape == (2, 6, 3, 5, 7)
    if antithetic:
        assert torch.equal(noise[:, ::2], -noise[:, 1::2])
        assert torch.equal(timesteps[:, ::2], timesteps[:, 1::2])
    if share_noise:
        assert torch.equal(noise[:, 0], noise[:, 2])
    else:
        assert not torch.isclose(noise[:, 0], noise[:, 2]).any()
    assert not torch.equal(noise[0], noise[1])
    # the same words as the ops': the first pair's noise is what they draw
    table = torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0]])
    drawn = add_noise(Pairs(x0, table, torch.zeros(2, 1, dtype=torch.int64), ids, 3, step))
    torch.testing.assert_close(noise[:, 0], drawn, rtol=0, atol=1e-5)


def test_common_draws_see_the_first_step_s_pairs(model, denoiser, images):
    config = CONFIG.replace(common_draws=True, lr=0.0, steps=3)
    assert torch.equal(*(adapt(model, denoiser, images, config=config).loss[:, k] for k in (0, 2)))
    fresh = adapt(model, denoiser, images, config=config.replace(common_draws=False))
    assert not torch.isclose(fresh.loss[:, 0], fresh.loss[:, 1]).any()


def test_antithetic_pairs_run_in_any_chunks(model, denoiser, images):
    config = CONFIG.replace(antithetic=True, share_noise=True)
    whole, pieces = (adapt(model, denoiser, images, config=config.replace(chunk=chunk)).outputs for chunk in ("auto", 1))
    torch.testing.assert_close(whole, pieces, rtol=1e-8, atol=1e-8)
    assert not torch.isclose(whole, adapt(model, denoiser, images, config=CONFIG).outputs).any()


def test_a_density_is_drawn_from():
    proposal = torch.rand(50, generator=torch.Generator().manual_seed(0))
    draws = Draws(0, 8, "calibrated", 10, 45, cumulative_density(proposal, 10, 45))
    timesteps = draws.timesteps(torch.arange(20000), torch.tensor(0))
    assert int(timesteps.min()) >= 10
    assert int(timesteps.max()) < 45
    counts = torch.bincount(timesteps.flatten(), minlength=50)[10:45].double()
    expected = proposal[10:45].double() / proposal[10:45].double().sum() * counts.sum()
    assert stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-3
    with pytest.raises(ValueError, match="calibrated density is 0"):
        cumulative_density(torch.eye(50)[0], 10, 45)


def test_calibrated_timesteps_take_a_calibration(model, denoiser, images):
    config = CONFIG.replace(timesteps="calibrated", guard=4)
    with pytest.warns(UserWarning, match="no calibration"):
        assert Adapter(model, denoiser, config).config.timesteps == "stratified"
    generator = torch.Generator().manual_seed(1)
    denoiser.calibration = calibrate(denoiser, torch.rand(9, 3, 16, 16, generator=generator))
    assert len(denoiser.calibration.signal) == BINS
    ramp = dataclasses.replace(denoiser.calibration, signal=(-1.0, *(1.0,) * (BINS - 1)), spread=tuple(range(1, BINS + 1)))
    denoiser.calibration = ramp
    problem = Engine(model, denoiser, Classification(), config).program.problem
    timesteps = problem.draws(400).timesteps(torch.arange(4), torch.tensor(0))
    assert int(timesteps.min()) >= 1000 // BINS  # a part without signal is left out
    first, last = (timesteps < 100).sum(), (timesteps >= 950).sum()
    assert first > 100 * last  # (1 / 2)^8 and (1 / 20)^8
    found = adapt(model, denoiser, images, config=config)
    assert found.outputs.isfinite().all()
    assert not torch.equal(found.outputs, adapt(model, denoiser, images, config=config.replace(timesteps="stratified")).outputs)


def losses_by_class(denoiser, images, pairs: int, stages: int) -> Tensor:
    """[B, K, stages · pairs] of plain loops on the held-out pairs."""
    x0, ids, table = images * 2 - 1, torch.arange(len(images)), denoiser.class_embeddings({})
    parts = []
    for stage in range(stages):
        step = torch.tensor(GUARD_STEP + stage)
        timesteps = Draws(0, pairs, "stratified", 0, 1000).timesteps(ids, step)
        shared = Pairs(x0, denoiser.process.table, timesteps, ids, 0, step)
        x_t = add_noise(shared, torch.float64)
        rows = [
            denoising_loss(denoiser(x_t, timesteps.flatten(), table[k].expand(len(x_t), -1)), shared).detach() for k in range(len(table))
        ]
        parts.append(torch.stack(rows, dim=1))
    return torch.cat(parts, dim=2)


def test_the_diffusion_classifier_is_a_plain_search(model, denoiser, images):
    config = CONFIG.replace(method="diffusion_classifier", steps=2, pairs=5)
    found = adapt(model, denoiser, images, config=config)
    losses = losses_by_class(denoiser, images, 5, 2).mean(2)
    assert torch.equal(found.predictions, losses.argmin(1))
    assert found.evaluations.tolist() == [7 * 10] * 4
    expected = -(losses - losses.amin(1, keepdim=True)) * images[0].numel()
    torch.testing.assert_close(found.outputs.double(), expected, rtol=1e-4, atol=1e-4)
    assert found.steps_run == 0


@pytest.mark.parametrize("top_k", [None, 3])
def test_the_posterior_is_prior_and_evidence(model, denoiser, images, top_k):
    config = CONFIG.replace(method="posterior", steps=1, pairs=8, top_k=top_k)
    found = adapt(model, denoiser, images, config=config)
    losses = losses_by_class(denoiser, images, 8, 1)
    for i in range(4):
        prior = found.outputs_before[i].double().log_softmax(0)
        tried = prior.argsort(descending=True)[:top_k].tolist()
        leader = min(tried, key=lambda k: float(losses[i, k].mean()))
        change = losses[i] - losses[i, leader]
        z = torch.stack([change[k].mean() / (change[k].std() / 8**0.5) if k != leader else torch.zeros(()).double() for k in range(7)])
        z = torch.stack([z[k] if k in tried else z[tried].max() for k in range(7)])
        torch.testing.assert_close(found.outputs[i].double(), prior - z / 2, rtol=1e-3, atol=1e-3)  # trust is 1 without a calibration
    assert found.evaluations.tolist() == [8 * (top_k or 7)] * 4
    with pytest.raises(ValueError, match="posterior' with 1 pair"):
        config.replace(pairs=1)


@pytest.mark.parametrize("method", ["diffusion_classifier", "posterior"])
def test_one_pair_drops_no_class(model, denoiser, images, method):
    config = CONFIG.replace(method=method, steps=2, pairs=1, guard_threshold=3.0)
    found = adapt(model, denoiser, images, config=config)
    assert found.evaluations.tolist() == [2 * 7] * 4
    torch.testing.assert_close(found.outputs, adapt(model, denoiser, images, config=config.replace(guard_threshold=0.0)).outputs)


def test_classes_that_are_surely_worse_fall_out(model, denoiser, images):
    config = CONFIG.replace(method="diffusion_classifier", steps=4, pairs=5, guard_threshold=3.0)
    whole = adapt(model, denoiser, images, config=config.replace(guard_threshold=0.0))
    pruned = adapt(model, denoiser, images, config=config)
    assert int(pruned.evaluations.sum()) < int(whole.evaluations.sum())
    losses = losses_by_class(denoiser, images, 5, 4)
    for i in range(4):
        alive, spent = list(range(7)), 0
        for stage in range(4):
            if stage and len(alive) == 1:
                break
            spent += 5 * len(alive)
            seen = losses[i, :, : 5 * (stage + 1)]
            leader = min(alive, key=lambda k: float(seen[k].mean()))
            change = seen - seen[leader]
            alive = [k for k in alive if k == leader or change[k].mean() <= 3 * change[k].std() / (5 * (stage + 1)) ** 0.5]
        assert int(pruned.evaluations[i]) == spent
        assert int(pruned.predictions[i]) == min(alive, key=lambda k: float(seen[k].mean()))


def test_only_the_model_s_first_classes_are_ranked_again(model, denoiser, images):
    config = CONFIG.replace(method="diffusion_classifier", steps=1, pairs=8, top_k=2)
    found = adapt(model, denoiser, images, config=config)
    losses, first = losses_by_class(denoiser, images, 8, 1).mean(2), found.outputs_before.topk(2, dim=1).indices
    assert torch.equal(found.predictions, first.gather(1, losses.gather(1, first).argmin(1, keepdim=True))[:, 0])
    assert found.evaluations.tolist() == [16] * 4
    assert (found.outputs.sort(1).values[:, :5] < -1e3).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"antithetic": True, "pairs": 3}, "antithetic with pairs 3"),
        ({"drawn_classes": 2}, "drawn_classes is 2 without top_k"),
        ({"null_condition": True}, "null_condition with objective 'embedding_mix'"),
        ({"objective": "noise_mix", "null_condition": True}, "denoiser_parameters 'frozen'"),
        ({"method": "posterior", "mode": "online"}, "nothing is carried on"),
        ({"antithetic": 1.5}, "antithetic is 1.5; allowed: True, False"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        CONFIG.replace(**change)


class Masked(nn.Module):
    """A model that masks all classes but the last two."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.pretrained_cfg = inner, inner.pretrained_cfg

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(7, dtype=x.dtype, device=x.device)
        mask[:5] = -torch.inf
        return self.inner(x) + mask


@pytest.mark.parametrize("top_k", [None, 3])
def test_a_class_that_the_model_masks_is_never_predicted(model, denoiser, images, top_k):
    config = AdaptConfig(method="diffusion_classifier", steps=1, pairs=2, top_k=top_k)
    found = adapt(Masked(model), denoiser, images, config=config)
    assert set(found.predictions.tolist()) <= {5, 6}
    assert found.evaluations.tolist() == [2 * 2] * len(images)


def test_drawn_classes_are_none_of_the_likeliest_even_if_the_rest_is_masked():
    outputs = torch.tensor([[2.0, 1.0, -torch.inf, -torch.inf, -torch.inf]])
    for step in range(20):
        chosen = Classification().choose(outputs, CONFIG.replace(top_k=2, drawn_classes=2), torch.tensor([0]), torch.tensor(step))
        assert len(set(chosen[0].tolist())) == 4


@pytest.mark.parametrize("objective", ["embedding_mix", "noise_mix"])
def test_gradients_of_a_model_in_float16_do_not_underflow(model, denoiser, images, objective):
    """With a loss that is a mean over thousands of elements, they would be below float16's least number."""
    config = CONFIG.replace(objective=objective, steps=1, optimizer="sgd", lr=1.0, momentum=0.0, precision="fp32")
    moved = {}
    for dtype in (torch.float16, torch.float32):
        session = Adapter(model.to(torch.float16).to(dtype), denoiser.float(), config.replace(mode="online"))
        session.adapt(images.float())
        theta = session.state_dict()["theta"]
        moved[dtype] = torch.cat([(theta[name] - p.detach().float()).flatten() for name, p in model.named_parameters()])
    a, b = moved.values()
    assert F.cosine_similarity(a, b, dim=0) > 0.99
    torch.testing.assert_close(a.norm(), b.norm(), rtol=0.05, atol=0)


def test_more_classes_than_there_are_means_all_of_them(model, denoiser, images):
    """So that presets which look at a few classes take models with fewer, such as a yes-or-no classifier."""
    mixing = CONFIG.replace(objective="noise_mix")
    for all_of_them, more in (
        (CONFIG.replace(top_k=7), CONFIG.replace(top_k=9)),
        (mixing.replace(top_k=5, drawn_classes=2), mixing.replace(top_k=5, drawn_classes=4)),
        (presets.RANK.replace(top_k=2), presets.RANK),
    ):
        task = Classification(subset=[5, 0]) if more == presets.RANK else Classification()
        found, expected = (adapt(model, denoiser, images, config=config, task=task) for config in (more, all_of_them))
        assert found.outputs.equal(expected.outputs)
        assert found.evaluations.equal(expected.evaluations)
    session = Adapter(model, denoiser, mixing.replace(top_k=9, drawn_classes=3))
    assert (session.config.top_k, session.config.drawn_classes) == (7, 0)


def test_a_method_without_steps_has_no_deadline(model, denoiser, images):
    adapter = Adapter(model, denoiser, CONFIG.replace(method="diffusion_classifier"))
    with pytest.raises(ValueError, match="deadline_ms is 50 with method 'diffusion_classifier'"):
        adapter.adapt(images, deadline_ms=50)


@pytest.mark.parametrize("name", ["timesteps", "noise"])
def test_a_method_that_draws_its_own_pairs_refuses_given_ones(model, denoiser, images, name):
    with pytest.raises(ValueError, match=f"{name} is given with method 'posterior'"):
        adapt(model, denoiser, images, config=CONFIG.replace(method="posterior"), **{name: torch.zeros(4, 1, 1, dtype=torch.int64)})
