"""Writes examples/digits.ipynb and runs it: python examples/write_notebook.py [PATH]. The outputs in the notebook are this run's."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

CELLS = [
    """# Digits under corruptions, before and after

A small timm ConvNeXt and a DiT that ship with the package, on the CPU and without a download. Needs the extras `demo` and `bench`
(matplotlib).""",
    """%matplotlib inline
import matplotlib.pyplot as plt

from dtta_fast import Adapter, adapt, presets, zoo
from dtta_fast.data.corruptions import corrupt

model, denoiser = zoo.load("digits")
clean, labels = zoo.example("digits")
images = corrupt(clean[:32], "gaussian_blur", 5)
labels = labels[:32]""",
    """FAST adapts each image on its own. Images to which the classifier gives one answer both ways are left alone, and an adapted answer
stands only where the denoising loss speaks for it.""",
    """result = adapt(model, denoiser, images, config=presets.FAST)
before = (result.predictions_before == labels).float().mean()
after = (result.predictions == labels).float().mean()
print(f"right before {before:.0%}, after {after:.0%}, at {result.evaluations.float().mean():.0f} evaluations an image")""",
    """figure, axes = plt.subplots(2, 8, figsize=(12, 3.6))
changed = (result.predictions != result.predictions_before).nonzero().flatten().tolist()
others = [i for i in range(len(images)) if i not in changed]
for axis, i in zip(axes.flat, changed + others, strict=False):
    axis.imshow(images[i].permute(1, 2, 0).clamp(0, 1))
    right = int(result.predictions[i]) == int(labels[i])
    axis.set_title(f"{int(result.predictions_before[i])} → {int(result.predictions[i])}", color="green" if right else "red", fontsize=10)
    axis.axis("off")
plt.show()""",
    """The loss before each update is that of a few random draws, so it need not fall from step to step; its mean over images does what
gradient descent makes it do.""",
    """long = adapt(model, denoiser, images[:4], config=presets.FAST.replace(steps=8, pairs=16, precheck="off", guard=0))
plt.figure(figsize=(5, 3))
plt.plot(range(1, 9), long.loss.mean(0))
plt.xlabel("update")
plt.ylabel("denoising loss, mean of 4 images")
plt.show()""",
    """A stream is adapted by one set of weights that goes on from batch to batch; `reset()` ends it. The caller's model is never
written to.""",
    """adapter = Adapter(model, denoiser, presets.ONLINE)
hits = [(adapter(part).argmax(1) == truth).float().mean().item() for part, truth in zip(images.split(8), labels.split(8), strict=True)]
print([f"{hit:.0%}" for hit in hits])
adapter.reset()""",
]

CODE = {1, 3, 4, 6, 8}  # the others are text


def written(path: Path) -> None:
    """The notebook, run from top to bottom in a kernel of its own."""
    cells = [nbformat.v4.new_code_cell(text) if i in CODE else nbformat.v4.new_markdown_cell(text) for i, text in enumerate(CELLS)]
    notebook = nbformat.v4.new_notebook(
        cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
    NotebookClient(notebook, timeout=300, kernel_name="python3", record_timing=False).execute()
    for cell in notebook.cells:  # warnings name folders of the machine
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, path)


if __name__ == "__main__":
    written(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_name("digits.ipynb"))
