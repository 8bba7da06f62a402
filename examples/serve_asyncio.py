"""Requests that come one by one, adapted in batches by one warm session: an asyncio host without a server.

    python examples/serve_asyncio.py

Each request waits at most MOST_WAIT for others to come; an image's result does not depend on which ones do, since it is an adaptation of
its own. The event loop goes on while a batch is adapted, in a thread. A batch's deadline is what its oldest request has left.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from dtta_fast import Adapter, presets, zoo

MOST_WAIT = 0.02  # seconds
BATCH = 8
DEADLINE = 2.0  # seconds from a request to its answer


@dataclass
class Request:
    image: Tensor  # [3, H, W]
    image_id: int  # names its draws
    arrived: float
    answer: asyncio.Future[int]


class Server:
    """Gathers requests, adapts them together, and answers each."""

    def __init__(self, adapter: Adapter, example: Tensor) -> None:
        self._adapter = adapter
        self._queue: asyncio.Queue[Request] = asyncio.Queue()
        for size in (1, BATCH):  # the smallest and the largest batch: steps of both are timed
            adapter.warmup(example.expand(size, -1, -1, -1))

    async def classify(self, image: Tensor, image_id: int) -> int:
        request = Request(image, image_id, time.monotonic(), asyncio.get_running_loop().create_future())
        await self._queue.put(request)
        return await request.answer

    async def run(self) -> None:
        """For as long as the host lives."""
        while True:
            batch = [await self._queue.get()]
            end = time.monotonic() + MOST_WAIT
            while len(batch) < BATCH and (left := end - time.monotonic()) > 0:
                try:
                    batch.append(await asyncio.wait_for(self._queue.get(), left))
                except TimeoutError:
                    break
            try:
                answers = await asyncio.to_thread(self._adapt, batch)
            except Exception as error:  # these requests fail, and the server lives
                for request in batch:
                    request.answer.set_exception(error)
                continue
            for request, answer in zip(batch, answers, strict=True):
                request.answer.set_result(answer)

    def _adapt(self, batch: list[Request]) -> list[int]:
        images = torch.stack([request.image for request in batch])
        ids = torch.tensor([request.image_id for request in batch])
        left = max(0.001, batch[0].arrived + DEADLINE - time.monotonic())
        found = self._adapter.adapt(images, image_ids=ids, deadline_ms=1000 * left)
        return found.predictions.tolist()


async def main() -> None:
    from dtta_fast.data.corruptions import corrupt

    model, denoiser = zoo.load("digits")
    clean, labels = zoo.example("digits")
    images = corrupt(clean[:24], "gaussian_blur", 5)
    server = Server(Adapter(model, denoiser, presets.FAST), images[:1])
    worker = asyncio.create_task(server.run())

    async def client(i: int) -> tuple[int, float]:
        await asyncio.sleep(0.03 * i)  # they do not come at once
        start = time.monotonic()
        return await server.classify(images[i], i), time.monotonic() - start

    answers = await asyncio.gather(*(client(i) for i in range(len(images))))
    worker.cancel()
    right = sum(answer == int(label) for (answer, _), label in zip(answers, labels, strict=False))
    waits = sorted(wait for _, wait in answers)
    print(f"{right} of {len(images)} right; waited {1000 * waits[len(waits) // 2]:.0f} ms in the median, {1000 * waits[-1]:.0f} ms at most")


if __name__ == "__main__":
    asyncio.run(main())
