"""An HTTP server that adapts each batch of requests: LitServe gathers the requests, one warm session adapts them.

    pip install "dtta-fast[serve,demo]"
    python examples/serve_litserve.py --port 8000
    curl -F image=@digit.png http://127.0.0.1:8000/predict

The answer is JSON: the class before and after, whether the answer was changed, evaluations.
"""

import argparse
import hashlib
import io
from typing import Any

import litserve
import torch
from fastapi import HTTPException, Request
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from dtta_fast import Adapter, presets, zoo

SIDE = 32
LARGEST = 2**20, 4096**2  # bytes of an upload, and pixels: a small file may decode to gigabytes
DEADLINE_MS = 2000.0


class Adaptation(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        model, denoiser = zoo.load("digits")
        self.adapter = Adapter(model.to(device), denoiser.to(device), presets.FAST)
        for size in (1, self.max_batch_size):
            self.adapter.warmup(torch.rand(size, 3, SIDE, SIDE, device=device))

    def decode_request(self, request: Request, **_: Any) -> tuple[Tensor, int]:
        """An uploaded image, and an id that the same image always has, so that it always gets the same answer."""
        content: bytes = request["image"].file.read(LARGEST[0] + 1)
        try:
            with Image.open(io.BytesIO(content)) as opened:
                if len(content) > LARGEST[0] or opened.width * opened.height > LARGEST[1]:
                    raise HTTPException(413, f"image has more than {LARGEST[0]} bytes or {LARGEST[1]} pixels")
                pixels = pil_to_tensor(opened.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)).float() / 255
        except (UnidentifiedImageError, OSError) as error:
            raise HTTPException(400, f"image cannot be read: {error}") from error
        return pixels, int.from_bytes(hashlib.sha256(content).digest()[:4], "big")

    def batch(self, inputs: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        return torch.stack([pixels for pixels, _ in inputs]), torch.tensor([image_id for _, image_id in inputs])

    def predict(self, inputs: tuple[Tensor, Tensor], **_: Any) -> list[dict[str, Any]]:
        images, ids = (x.to(self.device) for x in inputs)
        found = self.adapter.adapt(images, image_ids=ids, deadline_ms=DEADLINE_MS)
        columns = {
            "before": found.predictions_before.tolist(),
            "after": found.predictions.tolist(),
            "accepted": found.accepted.tolist(),
            "evaluations": found.evaluations.tolist(),
        }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any], **_: Any) -> dict[str, Any]:
        return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    api = Adaptation(max_batch_size=8, batch_timeout=0.02)
    litserve.LitServer(api, accelerator="auto", timeout=30).run(port=given.port, generate_client_file=False)


if __name__ == "__main__":
    main()
