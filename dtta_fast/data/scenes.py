"""Generated scenes with exact ground truth: solids on a textured floor in front of a wall, ray-cast with perspective.

A class is a shape of any colour, and depth depends only on geometry, so neither can be inferred from colour. Floor and wall are textured
with photographs of brick, grass and gravel (from scikit-image) or with patterns. Sunlight and shadows come from a random direction.
"""

from __future__ import annotations

import functools
import zlib
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CLASSES = ("floor", "wall", "sphere", "box", "cylinder", "cone")
SIZE = 64  # side length in pixels
NEAREST, FARTHEST = 1.0, 12.0  # range of depth in metres, over all scenes
SAMPLES = 2  # rays per pixel along each axis
Array = NDArray[np.float32]


class Scenes(NamedTuple):
    """images [N, 3, 64, 64] in [0, 1], labels [N, 64, 64] int64 (indices into CLASSES), depth [N, 64, 64] in metres along the axis."""

    images: Tensor
    labels: Tensor
    depth: Tensor


def scenes(split: str, count: int, first_id: int = 0) -> Scenes:
    """Generates scenes first_id .. first_id + count - 1 of a split; each one is determined by its split and number alone.

    Raises:
        ValueError: the split is unknown, or count is below 1. ImportError: scikit-image is missing (extra `demo`).
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split is {split!r}; choose train, validation or test")
    if count < 1:
        raise ValueError(f"count is {count}; choose 1 or more")
    numbers = range(first_id, first_id + count)
    drawn = [_render(np.random.default_rng(zlib.crc32(f"{split}/{number}".encode()))) for number in numbers]
    images, labels, depth = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
    return Scenes(images.float() / 255, labels.long(), depth)


def _render(random: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Array]:
    side = SIZE * SAMPLES
    along, across = np.mgrid[0:side, 0:side].astype(np.float32)
    x, y = (across + 0.5) / side * 2 - 1, 1 - (along + 0.5) / side * 2
    width = np.tan(np.radians(random.uniform(24, 34)))
    pitch, roll = np.radians(random.uniform(6, 24)), np.radians(random.uniform(-5, 5))
    right, up = np.cos(roll) * x - np.sin(roll) * y, np.sin(roll) * x + np.cos(roll) * y
    rays = _unit(np.stack([width * right, width * up * np.cos(pitch) - np.sin(pitch), width * up * np.sin(pitch) + np.cos(pitch)], -1))
    eye = np.array([0, random.uniform(1.0, 1.8), 0], np.float32)
    yaw, distance = np.radians(random.uniform(-25, 25)), random.uniform(5, 9)
    facing = np.array([np.sin(yaw), 0, -np.cos(yaw)])
    solids: list[_Plane | _Body] = [_Plane(np.array([0.0, 1.0, 0.0]), 0.0, 0), _Plane(facing, -distance * np.cos(yaw), 1)]
    for _ in range(random.integers(2, 6)):
        depth, radius = random.uniform(2.0, distance - 1.0), random.uniform(0.3, 0.75)
        centre = np.array([random.uniform(-1, 1) * width * depth * 0.9, 0, depth])
        solids.append(_Body(int(random.integers(2, 6)), centre, radius, radius * random.uniform(0.8, 2.2), random.uniform(0, np.pi)))
    hits = np.full(rays.shape[:2], np.inf, np.float32)
    found, normals = np.zeros(hits.shape, np.int64), np.zeros_like(rays)
    for number, solid in enumerate(solids):
        far, normal = solid.meet(np.broadcast_to(eye, rays.shape), rays)
        nearer = far < hits
        hits, found, normals = np.where(nearer, far, hits), np.where(nearer, number, found), np.where(nearer[..., None], normal, normals)
    points = eye + hits[..., None] * rays
    sun = _unit(np.array([random.uniform(-1, 1), random.uniform(0.6, 1.5), random.uniform(-1, 0.4)], np.float32))
    lit = np.clip((normals * sun).sum(-1), 0, None)
    for solid in solids[2:]:
        towards, _ = solid.meet(points + 1e-3 * normals, np.broadcast_to(sun, rays.shape))
        lit = np.where(np.isfinite(towards), 0, lit)
    ambient = random.uniform(0.25, 0.5)
    albedo = np.zeros_like(rays)
    for number, solid in enumerate(solids):
        here = found == number
        albedo[here] = _surface(random, solid.coordinates(points[here]), plane=number < 2)
    pixels = np.clip(albedo * (ambient + (1 - ambient) * lit[..., None]) * random.uniform(0.8, 1.15), 0, 1)
    pixels = pixels.reshape(SIZE, SAMPLES, SIZE, SAMPLES, 3).mean((1, 3)) + 0.01 * random.standard_normal((SIZE, SIZE, 3))
    labels = np.array([solid.label for solid in solids], np.uint8)[found[::SAMPLES, ::SAMPLES]]
    depth = (hits * (rays[..., 1] * -np.sin(pitch) + rays[..., 2] * np.cos(pitch)))[::SAMPLES, ::SAMPLES]
    image = (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8).transpose(2, 0, 1)
    return image, labels, np.clip(depth, NEAREST, FARTHEST).astype(np.float32)


class _Plane(NamedTuple):
    """The plane of points p with normal · p = offset."""

    normal: NDArray[np.float64]
    offset: float
    label: int

    def meet(self, origins: Array, rays: Array) -> tuple[Array, Array]:
        """Returns distances [..] along the rays, inf where they miss, and normals [.., 3]."""
        with np.errstate(divide="ignore", invalid="ignore"):
            far = (self.offset - origins @ self.normal) / (rays @ self.normal)
        return np.where(far > 1e-3, far, np.inf).astype(np.float32), np.broadcast_to(self.normal, rays.shape)

    def coordinates(self, points: Array) -> Array:
        return np.stack([points[:, 0], points[:, 2 if self.normal[1] else 1]], -1)


class _Body(NamedTuple):
    """A solid on the floor.

    radius is half the side for a box, height is not used for a sphere, and turn is the rotation about the vertical axis.
    """

    label: int
    centre: NDArray[np.float64]
    radius: float
    height: float
    turn: float

    def meet(self, origins: Array, rays: Array) -> tuple[Array, Array]:
        """Returns the same as _Plane.meet; computed in the frame where the solid stands at the origin without rotation."""
        cos, sin = np.cos(self.turn), np.sin(self.turn)
        turning = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]], np.float32)
        o, d = (origins - self.centre.astype(np.float32)) @ turning.T, rays @ turning.T
        with np.errstate(divide="ignore", invalid="ignore"):
            far, normal = {"sphere": self._sphere, "box": self._box, "cylinder": self._round, "cone": self._round}[CLASSES[self.label]](
                o, d
            )
        far = np.where(np.isfinite(far) & (far > 1e-3), far, np.inf).astype(np.float32)
        return far, _unit(normal) @ turning

    def _sphere(self, o: Array, d: Array) -> tuple[Array, Array]:
        o = o - np.array([0, self.radius, 0], np.float32)
        half = (o * d).sum(-1)
        far = -half - np.sqrt(half**2 - (o * o).sum(-1) + self.radius**2)
        return far, o + far[..., None] * d

    def _box(self, o: Array, d: Array) -> tuple[Array, Array]:
        o = o - np.array([0, self.height / 2, 0], np.float32)
        half = np.array([self.radius, self.height / 2, self.radius], np.float32)
        near = -np.sign(d) * half
        enter, leave = (near - o) / d, (-near - o) / d
        axis = enter.argmax(-1)
        far = np.where(enter.max(-1) <= leave.min(-1), enter.max(-1), np.inf)
        return far, -np.sign(d) * (np.arange(3) == axis[..., None])

    def _round(self, o: Array, d: Array) -> tuple[Array, Array]:
        """Intersects rays with a cylinder, or with a cone whose tip is up.

        The side is x² + z² = (radius - slope · y)² between floor and height; a cylinder also has a lid.
        """
        slope = self.radius / self.height if CLASSES[self.label] == "cone" else 0.0
        wide = self.radius - slope * o[..., 1]
        a = d[..., 0] ** 2 + d[..., 2] ** 2 - (slope * d[..., 1]) ** 2
        b = o[..., 0] * d[..., 0] + o[..., 2] * d[..., 2] + slope * wide * d[..., 1]
        root = np.sqrt(b**2 - a * (o[..., 0] ** 2 + o[..., 2] ** 2 - wide**2))
        best, normal = np.full(a.shape, np.inf, np.float32), np.zeros_like(d)
        for far in ((-b - root) / a, (-b + root) / a):
            p = o + far[..., None] * d
            valid = (far > 1e-3) & (far < best) & (p[..., 1] >= 0) & (p[..., 1] <= self.height)
            outward = np.stack([p[..., 0], slope * (self.radius - slope * p[..., 1]), p[..., 2]], -1)
            best, normal = np.where(valid, far, best), np.where(valid[..., None], outward, normal)
        if not slope:
            far = (self.height - o[..., 1]) / d[..., 1]
            p = o + far[..., None] * d
            valid = (far > 1e-3) & (far < best) & (p[..., 0] ** 2 + p[..., 2] ** 2 <= self.radius**2)
            best = np.where(valid, far, best)
            normal = np.where(valid[..., None], np.array([0, 1, 0], np.float32), normal)
        return best, normal

    def coordinates(self, points: Array) -> Array:
        around = np.arctan2(points[:, 2] - self.centre[2], points[:, 0] - self.centre[0])
        return np.stack([around * self.radius, points[:, 1]], -1)


def _surface(random: np.random.Generator, where: Array, plane: bool) -> Array:
    """Returns colours [N, 3] at surface coordinates [N, 2] in metres: a pattern or a photograph's grey values, blending two colours."""
    kind = random.integers(0, 6 if plane else 4)
    turn, scale = random.uniform(0, np.pi), random.uniform(0.15, 0.6)
    u, v = (where @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])).T / scale
    first, second = random.uniform(0.05, 0.95, (2, 3))
    second = first + (second - first) * random.uniform(0.2, 0.8)
    if kind == 0:
        share = np.zeros_like(u)
    elif kind == 1:
        share = (np.floor(u) + np.floor(v)) % 2
    elif kind == 2:
        share = np.floor(u) % 2
    elif kind == 3:
        share = 0.5 + 0.5 * np.sin(2 * np.pi * u) * np.sin(2 * np.pi * v * random.uniform(0.3, 1))
    else:
        photograph = _photographs()[random.integers(0, 3)]
        rows, columns = ((axis * 160).astype(np.int64) % len(photograph) for axis in (u * scale, v * scale))
        share = photograph[rows, columns]
    return (first + (second - first) * share[:, None]).astype(np.float32)


@functools.cache
def _photographs() -> tuple[Array, ...]:
    try:
        from skimage import data
    except ImportError as error:
        raise ImportError("scenes need scikit-image's photographs: pip install 'dtta-fast[demo]'") from error
    return tuple(getattr(data, name)().astype(np.float32) / 255 for name in ("brick", "grass", "gravel"))


def _unit(vectors: Array) -> Array:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12).astype(np.float32)
