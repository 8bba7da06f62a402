"""The forward (noising) process of a diffusion model as one coefficient table."""

from __future__ import annotations

import copy
import inspect
from typing import Any, Literal

import torch
from torch import Tensor

SIGNAL, NOISE, TARGET_SIGNAL, TARGET_NOISE, WEIGHT = range(5)
INFORMATIVE = (-4.0, 0.0)  # log signal-to-noise ratios at which the losses of four denoisers tell classes apart best (docs/log.md)


def check_process(process: Any) -> None:
    """Raises TypeError if a denoiser's process is something else, such as a scheduler."""
    if not isinstance(process, NoiseProcess):
        raise TypeError(f"process is a {type(process).__name__}; give NoiseProcess.from_scheduler(scheduler)")


class NoiseProcess:
    """Table with one row per timestep: signal a, noise s, target_signal u, target_noise v, weight w.

        x_t = a·x0 + s·ε        target = u·x0 + v·ε        loss = w · mean((prediction − target)²)

    ε-, x0- and v-prediction (Salimans & Ho 2022, arXiv 2202.00512) and rectified flow (Liu et al. 2023,
    arXiv 2209.03003) are all rows of this table, so the engine has one code path for them.

    `scheduler` holds the class and the config of the diffusers scheduler that it was read from, or the name of the repository whose process
    it is (SiT, REPA); None for another process.

    Args:
        table: [T, 5] floating point, finite; kept as float32. Timesteps are 0-based indices of its rows,
            in order of rising noise.
        model_time: [T] the time value passed to the denoiser for each row; None passes the row index.

    Raises:
        ValueError: the table has another shape or is not finite, or model_time has another length.
    """

    def __init__(self, table: Tensor, model_time: Tensor | None = None) -> None:
        if table.ndim != 2 or table.shape[1] != 5 or len(table) == 0:
            raise ValueError(f"table has shape {tuple(table.shape)}; give [T, 5]: signal, noise, target_signal, target_noise, weight")
        if not torch.isfinite(table).all():
            raise ValueError("table holds NaN or infinity; every coefficient has to be finite")
        if model_time is None:
            model_time = torch.arange(len(table), dtype=torch.int64, device=table.device)
        if model_time.shape != table.shape[:1]:
            raise ValueError(f"model_time has shape {tuple(model_time.shape)}; give one value a timestep: [{len(table)}]")
        self.table = table.to(torch.float32)
        self.model_time = model_time.to(torch.float32)
        self.scheduler: tuple[Any, dict[str, Any]] | str | None = None

    def __len__(self) -> int:
        return len(self.table)

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseProcess:
        """Reads a diffusers scheduler: one with `alphas_cumprod` (DDPM, DDIM, PNDM, Euler, DPM-Solver, ...), a flow-matching one with
        only `sigmas`, a solver with flow sigmas (as Sana's), or one with EDM's preconditioning (Karras et al. 2022, arXiv 2206.00364,
        table 1).

        Raises:
            ValueError: the scheduler has neither, or its prediction type or an option is not supported.
        """
        process = cls._read(scheduler)
        if hasattr(scheduler, "save_pretrained"):
            process.scheduler = type(scheduler), dict(scheduler.config)  # a scheduler's tensors would be copied
        return process

    def scheduler_to_save(self, scheduler: Any = None) -> Any:
        """Returns the diffusers scheduler to save with a denoiser: `scheduler` if given, otherwise the one this process was read from.

        Raises:
            ValueError: there is none, or it describes another noise process.
        """
        if scheduler is None and isinstance(self.scheduler, tuple):
            kind, config = self.scheduler
            return kind.from_config(config)
        if scheduler is None:
            raise ValueError("scheduler is None, and the noise process was not read from one; give the diffusers scheduler of the training")
        other = NoiseProcess.from_scheduler(scheduler)
        if not self.equals(other):
            found = type(scheduler).__name__
            raise ValueError(f"scheduler is a {found} of another noise process than the denoiser's; give the one of its training")
        return scheduler

    def equals(self, other: NoiseProcess) -> bool:
        """Returns whether two processes have the same coefficients and times, up to rounding: to one part in 10,000."""
        pairs = ((self.table, other.table), (self.model_time, other.model_time))
        return all(a.shape == b.shape and torch.allclose(a.cpu(), b.cpu(), rtol=1e-4, atol=1e-5) for a, b in pairs)

    @classmethod
    def _read(cls, scheduler: Any) -> NoiseProcess:
        own = dict(getattr(scheduler, "config", {}))
        for field, ordinary in (("invert_sigmas", False), ("timestep_type", "discrete")):
            if own.get(field, ordinary) != ordinary:
                raise ValueError(f"scheduler.config.{field} is {own[field]!r}; supported: {ordinary!r}")
        if own.get("use_flow_sigmas") and "use_flow_sigmas" in inspect.signature(type(scheduler).__init__).parameters:
            return cls._flow_solver(scheduler)  # other schedulers keep the setting in their config, and ignore it
        alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
        if alphas_cumprod is not None:
            alphas_cumprod = torch.as_tensor(alphas_cumprod, dtype=torch.float64)
            a, s = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
            zero, one = torch.zeros_like(a), torch.ones_like(a)
            kinds = {"epsilon": (zero, one), "sample": (one, zero), "v_prediction": (-s, a)}
            prediction_type = getattr(scheduler.config, "prediction_type", "epsilon")
            if prediction_type not in kinds:
                raise ValueError(f"scheduler.config.prediction_type is {prediction_type!r}; supported: {', '.join(kinds)}")
            u, v = kinds[prediction_type]
            return cls(torch.stack([a, s, u, v, one], dim=1))
        if type(scheduler).__name__.startswith("FlowMatch"):
            # A fresh scheduler has all timesteps; set_timesteps() may have reduced them here. The trailing 0 for the sampler is cut off.
            scheduler = type(scheduler).from_config(scheduler.config)
            count = int(scheduler.config.num_train_timesteps)
            return cls._flow(scheduler.sigmas[:count], scheduler.timesteps[:count])
        if type(scheduler).__name__.startswith("EDM"):
            return cls._preconditioned(type(scheduler).from_config(scheduler.config))
        found = type(scheduler).__name__
        raise ValueError(f"scheduler is a {found}, which has no alphas_cumprod, and is neither a FlowMatch nor an EDM scheduler")

    @classmethod
    def _flow(cls, sigmas: Any, times: Any) -> NoiseProcess:
        """Returns the linear path at these noise levels and model times, whose target is its velocity ε - x0."""
        sigma, order = torch.as_tensor(sigmas, dtype=torch.float64).cpu().sort()
        one = torch.ones_like(sigma)
        return cls(torch.stack([1 - sigma, sigma, -one, one, one], dim=1), torch.as_tensor(times, dtype=torch.float64).cpu()[order])

    @classmethod
    def _flow_solver(cls, scheduler: Any) -> NoiseProcess:
        """Reads a DPM-Solver, DEIS or UniPC scheduler whose samples follow a linear path, with one row for each training timestep.

        Its times are whole numbers, as its pipeline gives them to the network, so some rows share one.
        """
        config = scheduler.config
        if config.prediction_type != "flow_prediction":
            raise ValueError(
                f"scheduler.config.prediction_type is {config.prediction_type!r} with use_flow_sigmas; supported there: 'flow_prediction'"
            )
        others = ("use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
        for name in others:
            if config.get(name):
                raise ValueError(f"scheduler.config.{name} is {config[name]!r} with use_flow_sigmas; supported there: False")
        count = int(config.num_train_timesteps)
        scheduler = type(scheduler).from_config(config)
        scheduler.set_timesteps(count)
        return cls._flow(scheduler.sigmas[:count], scheduler.timesteps[:count])

    @classmethod
    def _preconditioned(cls, scheduler: Any) -> NoiseProcess:
        """Reads a scheduler that scales the network's input by c_in and takes c_skip · x + c_out · output as the denoised image.

        The network's own target is what this sets equal to x0: (x0 - c_skip · (x0 + σ·ε)) / c_out.
        """
        config, count = scheduler.config, int(scheduler.config.num_train_timesteps)
        signs = {"epsilon": 1.0, "v_prediction": -1.0}
        if config.prediction_type not in signs:
            raise ValueError(f"scheduler.config.prediction_type is {config.prediction_type!r}; supported: {', '.join(signs)}")
        sigma = torch.as_tensor(scheduler.sigmas, dtype=torch.float64)[:count].sort().values  # without the trailing 0 for the sampler
        data = float(config.sigma_data)
        total = (sigma.square() + data**2).sqrt()
        c_in, c_skip, c_out = 1 / total, (data / total).square(), signs[config.prediction_type] * sigma * data / total
        table = torch.stack([c_in, c_in * sigma, (1 - c_skip) / c_out, -c_skip * sigma / c_out, torch.ones_like(sigma)], dim=1)
        return cls(table, sigma.log() / 4)

    @classmethod
    def linear_flow(cls, rows: int = 1000, *, time_of_data: Literal[0, 1]) -> NoiseProcess:
        """Returns the linear path x_t = (1 - σ)·x0 + σ·ε with its velocity as the target, in `rows` equal parts of σ from 0 to 1.

        Args:
            time_of_data: the time, from 0 to 1, that the denoiser is given for an image without noise. Its velocity points from there to
                the other end. 1 is SiT's convention (Ma et al. 2024, arXiv 2401.08740), 0 REPA's (Yu et al. 2025, arXiv 2410.06940).
        """
        sigma = (torch.arange(rows, dtype=torch.float64, device="cpu") + 0.5) / rows
        one = torch.ones_like(sigma)
        sign = one if time_of_data == 1 else -one
        return cls(torch.stack([1 - sigma, sigma, sign, -sign, one], dim=1), 1 - sigma if time_of_data == 1 else sigma)

    def informative_range(self) -> tuple[int, int]:
        """Returns the half-open range of the timesteps whose log signal-to-noise ratio, log(a² / s²), lies in INFORMATIVE.

        The whole process, if it has less than two such timesteps.
        """
        table = self.table.double().cpu()
        ratio = (table[:, SIGNAL].square() / table[:, NOISE].square()).log()
        low, high = INFORMATIVE
        inside = ((ratio >= low) & (ratio <= high)).nonzero()[:, 0].tolist()
        return (inside[0], inside[-1] + 1) if len(inside) > 1 else (0, len(self))

    def to(self, device: torch.device | str) -> NoiseProcess:
        """Returns the same process on another device."""
        moved = copy.copy(self)  # the constructor would repeat its checks, which make the host wait
        moved.table, moved.model_time = self.table.to(device), self.model_time.to(device)
        return moved
