"""Every code block of README and docs runs: a page's blocks in order, in one namespace and one empty folder, without a network.

What a page would download is a small local model of the same library class, read by the library's own from_pretrained.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import transformers
from sybil.document import Document
from sybil.example import Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from torchvision.transforms.functional import to_pil_image

from dtta_fast import denoisers, zoo
from dtta_fast.commands.cli import main

TINY = runpy.run_path(str(Path(__file__).with_name("tiny_pipelines.py")))
ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
# what takes a package there is left to tests/test_embed.py, which has one already
ELSEWHERE = {"docs/embedding.md"}
GUIDES = ("classification", "depth", "own_classifier", "profiling", "ray", "segmentation")
# these take most of the time
SLOW = {
    "docs/evaluation.md",
    "docs/reproducibility.md",
    *(f"docs/guide/{name}.md" for name in GUIDES),
}
LANGUAGES = {"python", "sh", "text"}
ALSO_ELSEWHERE = {"cpp", "cmake"}

FROM_HUB: dict[Any, tuple[str, ...]] = {
    transformers: ("CLIPModel", "CLIPProcessor", "AutoModelForSemanticSegmentation", "AutoModelForDepthEstimation", "AutoImageProcessor"),
    diffusers: ("AutoencoderKL",),
    denoisers: ("StableDiffusion", "StableDiffusionXL", "ControlNet", "ConcatUNet"),
}


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> dict[str, Path]:
    """A folder for each id of the hub that a page names."""
    made = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    diffusers.AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, **blocks).save_pretrained(made / "vae")
    unet = diffusers.UNet2DConditionModel.from_pretrained(zoo.folder("open_vocabulary") / "diffusion" / "unet")
    diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 32)).save_pretrained(made / "controlnet")
    TINY["stable_diffusion_xl"]().save_pretrained(made / "sdxl")
    return {
        "stabilityai/stable-diffusion-xl-base-1.0": made / "sdxl",
        "openai/clip-vit-base-patch32": zoo.folder("open_vocabulary") / "clip",
        "stable-diffusion-v1-5/stable-diffusion-v1-5": zoo.folder("open_vocabulary") / "diffusion",
        "stabilityai/sd-vae-ft-ema": made / "vae",
        "lllyasviel/control_v11p_sd15_seg": made / "controlnet",
        "nvidia/segformer-b0-finetuned-ade-512-512": zoo.folder("segmentation") / "model",
        "depth-anything/Depth-Anything-V2-Metric-Indoor-Small-hf": zoo.folder("depth") / "model",
        "my-depth-unet": zoo.folder("depth") / "denoiser",
    }


@pytest.fixture
def offline(local, monkeypatch, tmp_path, random_network) -> None:
    """Ids of the hub lead to local folders; so do timm's pretrained weights, and the checkpoint of the original DiT."""

    def redirected(load: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *names, **given: load(*(local.get(name, name) for name in names), **given)

    for library, names in FROM_HUB.items():
        for name in names:
            kind = getattr(library, name)
            monkeypatch.setattr(kind, "from_pretrained", redirected(kind.from_pretrained))
    create = timm.create_model

    def create_model(name: str, pretrained: bool = False, **given: Any) -> torch.nn.Module:
        return zoo.load("digits")[0] if pretrained and not name.startswith("local-dir:") else create(name, pretrained=pretrained, **given)

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(
        smp,
        "from_pretrained",
        lambda name: smp.Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8), classes=6),
    )
    network = random_network(learn_sigma=True, channels=4, input_size=8, patch_size=2, hidden_size=64, num_heads=16, num_classes=10)
    torch.save(network.state_dict(), tmp_path / "DiT-XL-2-256x256.pt")


@pytest.fixture
def own(tmp_path, process, random_network) -> None:
    """What README's reader has: a photograph, clean images, a classifier and a DiT in folders."""
    images, _ = zoo.example("digits")
    (tmp_path / "clean_images").mkdir()
    for i in range(8):
        to_pil_image(images[i]).save(tmp_path / "clean_images" / f"{i}.png")
    shutil.copy(tmp_path / "clean_images" / "0.png", tmp_path / "photo.png")
    shutil.copytree(zoo.folder("digits") / "classifier", tmp_path / "classifier")
    scheduler = diffusers.DDPMScheduler(1000, beta_schedule="linear")
    denoisers.DiT(random_network(num_classes=10), process).save_pretrained(tmp_path / "dit", scheduler)


def in_shell(example: Example) -> None:
    """Runs a block in bash. Blocks of plain dtta commands run in this process, which has imported everything, except the README's."""
    lines = example.parsed.replace("\\\n", " ").splitlines()
    if Path(example.path).name != "README.md" and all(re.fullmatch(r"dtta [^|&;<>$`*]*", line) for line in lines):
        for line in lines:
            main(shlex.split(line)[1:])
        return
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run(["bash", "-ec", example.parsed], capture_output=True, text=True, env=environment, check=False, timeout=600)
    assert run.returncode == 0, f"{example.path}, line {example.line}:\n{example.parsed}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"


@pytest.mark.parametrize("page", [pytest.param(page, marks=pytest.mark.slow) if page in SLOW else page for page in PAGES])
@pytest.mark.usefixtures("offline", "own")
def test_the_blocks_of(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    document = Document.parse(str(ROOT / page), PythonCodeBlockParser(), CodeBlockParser("sh", in_shell))
    for example in document.examples():
        if page not in ELSEWHERE or not re.search(r"\.pt2|dtta export", str(example.parsed)):
            example.evaluate()


@pytest.mark.parametrize("page", [page for page in PAGES if "```cpp" in (ROOT / page).read_text()])
def test_the_cpp_blocks_compile(page, tmp_path):
    """As the body of a function that has pixels, and whose caller handles an error."""
    around = """
#include <string>
int fail(const std::string&);
template <typename... Values> void use(const Values&...);
int host(const float* pixels) {
  %s
  return 0;
}
"""
    for block in re.findall(r"^```cpp\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S):
        includes = "".join(re.findall(r"^#include.*\n", block, re.M))
        source = tmp_path / "block.cpp"
        source.write_text(includes + around % re.sub(r"^#include.*\n", "", block, flags=re.M))
        command = ["c++", "-std=c++17", "-Wall", "-Werror", "-fsyntax-only", "-I", str(ROOT / "dtta_fast/embed/cpp"), str(source)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr


def test_the_cmake_of_the_page_is_that_of_the_example():
    block = re.search(r"^```cmake\n(.*?)^```", (ROOT / "docs/embedding.md").read_text(), re.M | re.S)
    example = (ROOT / "examples/cpp/CMakeLists.txt").read_text()
    assert block is not None
    assert all(line.strip() in example for line in block[1].splitlines())


def test_no_block_is_of_a_language_that_nothing_runs():
    found = {page: set(re.findall(r"^```(\S*)[^\n]*\n.*?^```$", (ROOT / page).read_text(), re.M | re.S)) for page in PAGES}
    assert sum(map(len, found.values())) > 20
    for page, languages in found.items():
        assert languages <= LANGUAGES | (ALSO_ELSEWHERE if page in ELSEWHERE else set()), page
