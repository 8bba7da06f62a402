"""The coefficient table against the schedulers' own noising."""

from __future__ import annotations

import diffusers
import pytest
import torch

from dtta_fast.denoisers.noise_process import NoiseProcess

pytestmark = pytest.mark.quick

X0 = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def rows(process: NoiseProcess, timesteps: torch.Tensor) -> list[torch.Tensor]:
    return [column[:, None, None, None] for column in process.table[timesteps].unbind(1)]


SCHEDULERS = ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
def test_noising_is_ddpm_s(name, betas):
    scheduler = getattr(diffusers, name)(num_train_timesteps=1000, beta_schedule=betas)
    timesteps = torch.tensor([0, 1, 400, 998, 999])
    a, s, u, v, w = rows(NoiseProcess.from_scheduler(scheduler), timesteps)
    ddpm = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule=betas)
    torch.testing.assert_close(a * X0 + s * NOISE, ddpm.add_noise(X0, NOISE, timesteps))
    assert (u == 0).all()
    assert (v == 1).all()
    assert (w == 1).all()


def test_v_and_x0_prediction():
    timesteps = torch.tensor([0, 1, 400, 998, 999])
    scheduler = diffusers.DDPMScheduler(1000, prediction_type="v_prediction")
    _, _, u, v, _ = rows(NoiseProcess.from_scheduler(scheduler), timesteps)
    torch.testing.assert_close(u * X0 + v * NOISE, scheduler.get_velocity(X0, NOISE, timesteps))
    _, _, u, v, _ = rows(NoiseProcess.from_scheduler(diffusers.DDPMScheduler(1000, prediction_type="sample")), timesteps)
    torch.testing.assert_close(u * X0 + v * NOISE, X0)


def test_flow_matching():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    process = NoiseProcess.from_scheduler(scheduler)
    timesteps = torch.tensor([0, 1, 400, 998, 999])
    a, s, u, v, _ = rows(process, timesteps)
    assert (process.table[:, 1].diff() > 0).all()  # noise rises with the index
    torch.testing.assert_close(a * X0 + s * NOISE, scheduler.scale_noise(X0, process.model_time[timesteps], NOISE))
    # the velocity is what carries x_t to x0 in sigma
    torch.testing.assert_close((a * X0 + s * NOISE) - s * (u * X0 + v * NOISE), X0)


def test_a_used_flow_scheduler_gives_the_whole_process():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    expected = NoiseProcess.from_scheduler(scheduler).table
    scheduler.set_timesteps(50)
    assert torch.equal(NoiseProcess.from_scheduler(scheduler).table, expected)


SANA = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler"])
def test_solvers_with_flow_sigmas(kind):
    """The linear path, shifted: sigma = 3u / (1 + 2u) for u from 1/1000 to 1."""
    process = NoiseProcess.from_scheduler(getattr(diffusers, kind)(**SANA))
    a, s, u, v, _ = process.table.double().unbind(1)
    even = 1 - torch.linspace(1, 1 / 1000, 1001, dtype=torch.float64)[1:]
    torch.testing.assert_close(s, 3 * even / (1 + 2 * even), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a + s, torch.ones(1000, dtype=torch.float64))
    assert (u == -1).all()
    assert (v == 1).all()
    assert (process.model_time - 1000 * process.table[:, 1]).abs().max() < 1


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DDIMScheduler", "EDMEulerScheduler"])
def test_a_flow_model_s_solver_changed_for_another_kind_is_refused(kind):
    """from_config() keeps the settings that the other kind does not have."""
    other = getattr(diffusers, kind).from_config(diffusers.DPMSolverMultistepScheduler(**SANA).config)
    with pytest.raises(ValueError, match="prediction_type is 'flow_prediction'"):
        NoiseProcess.from_scheduler(other)


def test_flow_sigmas_of_another_spacing_are_refused():
    with pytest.raises(ValueError, match="use_karras_sigmas is True with use_flow_sigmas"):
        NoiseProcess.from_scheduler(diffusers.DPMSolverMultistepScheduler(**SANA, use_karras_sigmas=True))


def test_processes_that_have_no_row_here_are_refused():
    with pytest.raises(ValueError, match="prediction_type is 'epsilon' with use_flow_sigmas"):
        NoiseProcess.from_scheduler(diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True))
    with pytest.raises(ValueError, match="timestep_type is 'continuous'"):
        NoiseProcess.from_scheduler(diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"))


def test_bad_input_is_named():
    scheduler = diffusers.DDPMScheduler(10)
    scheduler.register_to_config(prediction_type="score")
    with pytest.raises(ValueError, match=r"prediction_type is 'score'"):
        NoiseProcess.from_scheduler(scheduler)
    with pytest.raises(ValueError, match="scheduler is a object"):
        NoiseProcess.from_scheduler(object())
    with pytest.raises(ValueError, match=r"table has shape \(3, 4\)"):
        NoiseProcess(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="NaN or infinity"):
        NoiseProcess(torch.full((3, 5), float("nan")))
    with pytest.raises(ValueError, match="model_time has shape"):
        NoiseProcess(torch.zeros(3, 5), torch.zeros(4))


@pytest.mark.parametrize("kind", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_edm_s_preconditioning_is_a_row(kind, prediction_type):
    """The network's target, put through the scheduler's own preconditioning, is the image."""
    scheduler = getattr(diffusers, kind)(prediction_type=prediction_type, sigma_data=0.5)
    process = NoiseProcess.from_scheduler(scheduler)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 64, dtype=torch.float64, generator=generator)
    sigmas = torch.as_tensor(scheduler.sigmas)[: len(process)].double().flip(0)
    assert len(process) == 1000
    assert bool((sigmas.diff() > 0).all())
    for row in (0, 300, 700, 999):
        a, s, u, v, w = process.table[row].double()
        noisy = x0 + sigmas[row] * noise
        torch.testing.assert_close(a * x0 + s * noise, scheduler.precondition_inputs(noisy, sigmas[row]), rtol=1e-5, atol=1e-6)
        denoised = scheduler.precondition_outputs(noisy, u * x0 + v * noise, sigmas[row])
        torch.testing.assert_close(denoised, x0, rtol=1e-4, atol=1e-4 * max(1.0, float(sigmas[row])) ** 0.5)
        torch.testing.assert_close(process.model_time[row], scheduler.precondition_noise(sigmas[row]).float())
        assert w == 1


@pytest.mark.parametrize("time_of_data", [0, 1])
def test_linear_flows_of_both_directions(time_of_data):
    """The target is the derivative of x_t by the time that the denoiser is given."""
    process = NoiseProcess.linear_flow(100, time_of_data=time_of_data)
    a, s, u, v, w = process.table.double().unbind(1)
    time = process.model_time.double()
    torch.testing.assert_close(a + s, torch.ones_like(a))
    assert bool((s.diff() > 0).all())
    torch.testing.assert_close(a.diff() / time.diff(), u[1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(s.diff() / time.diff(), v[1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(time, a if time_of_data == 1 else s)
    assert bool((w == 1).all())
