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


def test_processes_that_have_no_row_here_are_refused():
    with pytest.raises(ValueError, match="use_flow_sigmas is True"):
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
