"""The draws of timesteps and noise. They are defined in dtta_fast.core.draws."""

from dtta_fast.core.draws import Draws, cumulative_density

__all__ = ["Draws", "cumulative_density"]
