"""A page to try adaptation in a browser: an image, a corruption and its severity, and the answers before and after.

    pip install "dtta-fast[app]"
    python examples/gradio_app.py --port 7860

It runs the models that ship with the package: a classifier with a DiT or, if you type class names, CLIP with Stable Diffusion, both of 32
pixels. The page is served on this machine alone.
"""

from __future__ import annotations

import argparse
import functools
import os
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported

import gradio as gr
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image, to_tensor

from dtta_fast import Adapter, presets, zoo
from dtta_fast.data.corruptions import DIGITS_C, corrupt
from dtta_fast.data.digits import load_digits
from dtta_fast.tasks import ZeroShot

SIDE, SHOWN, NONE = 32, 256, "none"
CHOICES = ("FAST", "RANK")


@functools.cache
def digits() -> Tensor:
    """Returns the test images that can be chosen by number, [500, 3, 32, 32]."""
    return load_digits("test")[0]


@functools.lru_cache(maxsize=8)
def session(preset: str, names: tuple[str, ...]) -> Adapter:
    """Returns a session of the classifier, or of CLIP for these class names."""
    if not names:
        return Adapter(*zoo.load("digits"), presets.get(preset))
    config = presets.get(preset)
    if config.top_k is not None:
        config = config.replace(top_k=min(config.top_k, len(names)))
    return Adapter(*zoo.load("open_vocabulary"), config, ZeroShot(names, zoo.load_processor("open_vocabulary")))


def chosen(upload: Image.Image | None, number: int) -> Tensor:
    """Returns the uploaded image, or a test image by its number, [3, 32, 32] in [0, 1]."""
    if upload is None:
        return digits()[number]
    side = min(upload.size)
    left, top = (upload.width - side) // 2, (upload.height - side) // 2
    square = upload.convert("RGB").crop((left, top, left + side, top + side))
    return to_tensor(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def adapted(
    upload: Image.Image | None, number: float | None, corruption: str, severity: float, typed: str, preset: str
) -> tuple[Image.Image, dict[str, float], dict[str, float], str]:
    """Corrupts the image, adapts to it, and returns it with the probabilities before and after and what happened."""
    number = min(max(int(number or 0), 0), len(digits()) - 1)  # the field may be empty, or beyond the slider
    names = tuple(name.strip() for name in typed.split(",") if name.strip())
    image = chosen(upload, number)[None]
    if corruption != NONE:
        image = corrupt(image, corruption, int(severity), first_id=number)
    try:
        result = session(preset, names).adapt(image, image_ids=[number])
    except ValueError as error:
        raise gr.Error(str(error)) from error
    shown = names or zoo.DIGITS
    before, after = (dict(zip(shown, outputs[0].softmax(0).tolist(), strict=True)) for outputs in (result.outputs_before, result.outputs))
    losses = [loss for loss in result.loss[0].tolist() if loss == loss]
    told = f"{guard(result, presets.get(preset))} {int(result.evaluations[0])} evaluations, {sum(result.seconds.values()):.2f} s."
    if losses:
        told += f" Denoising loss by step: {', '.join(f'{loss:.4f}' for loss in losses)}."
    picture = to_pil_image(image[0].clamp(0, 1)).resize((SHOWN, SHOWN), Image.Resampling.NEAREST)
    return picture, before, after, told


def guard(result: Any, config: Any) -> str:
    """Says in a sentence what became of the image."""
    changed = bool(result.predictions[0] != result.predictions_before[0])
    if int(result.evaluations[0]) == 0:
        return "The pre-check left the image alone: matching does not change the answer, and the model is sure of it."
    if bool(result.accepted[0]):
        return f"The denoising loss favours the adapted answer{'' if changed else ', which is the same as before'}."
    if config.method == "posterior":
        return "The denoising losses of the likeliest classes did not change the answer."
    if int(result.evaluations[0]) > config.steps * config.pairs:
        return "The guard compared the answers and kept that of the unadapted model" + (" to the matched image." if changed else ".")
    return "The answer to the matched image stands." if changed else "Adaptation did not change the answer."


def page() -> gr.Blocks:
    with gr.Blocks(title="dtta_fast") as made:
        gr.Markdown("# Test-time adaptation by diffusion feedback\nChoose an image, corrupt it, and compare the answers.")
        with gr.Row():
            with gr.Column():
                upload = gr.Image(type="pil", label="An image of yours", height=180)
                number = gr.Slider(0, len(digits()) - 1, value=4, step=1, label="or a test image, by number", elem_id="number")
                corruption = gr.Dropdown([NONE, *DIGITS_C], value="gaussian_blur", label="Corruption", elem_id="corruption")
                severity = gr.Slider(1, 5, value=5, step=1, label="Severity", elem_id="severity")
                typed = gr.Textbox(label="Class names for CLIP, separated by commas (empty: the classifier)", elem_id="names")
                preset = gr.Radio(list(CHOICES), value=CHOICES[0], label="Preset")
                button = gr.Button("Adapt", variant="primary", elem_id="adapt")
            with gr.Column():
                picture = gr.Image(label="What the models see", elem_id="picture", height=280)
                with gr.Row():
                    before = gr.Label(num_top_classes=4, label="Before", elem_id="before")
                    after = gr.Label(num_top_classes=4, label="After", elem_id="after")
                told = gr.Textbox(label="What happened", lines=3, elem_id="told")
        button.click(adapted, [upload, number, corruption, severity, typed, preset], [picture, before, after, told])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=7860)
    torch.manual_seed(0)
    page().launch(server_name="127.0.0.1", server_port=parser.parse_args().port, share=False, footer_links=[])


if __name__ == "__main__":
    main()
