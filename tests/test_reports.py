"""What public bug reports of other libraries describe, tried on this package (docs/log.md names each report)."""

from __future__ import annotations

import copy
import json
import shutil
import struct
import subprocess
import sys
import warnings

import numpy as np
import pytest
import timm
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image, TiffImagePlugin
from torch import nn
from torch.nn.utils import prune

from dtta_fast import AdaptConfig, Adapter, adapt, presets, zoo
from dtta_fast.commands.cli import main
from dtta_fast.core.calibrate import calibrate
from dtta_fast.data.folder import open_folder
from dtta_fast.data.maps import open_map_folder
from dtta_fast.denoisers import DiT
from dtta_fast.runs import content
from dtta_fast.runs.config import RunConfig, with_settings
from dtta_fast.runs.models import load_classifier
from dtta_fast.runtime.pictures import read_image
from dtta_fast.tasks import Classification, ZeroShot
from dtta_fast.tasks.zero_shot import load_clip

CONFIG = AdaptConfig(steps=1, pairs=2, guard=2, lr=1e-3)


@pytest.fixture(scope="module")
def digits():
    return zoo.load("digits")


@pytest.fixture(scope="module")
def vocabulary():
    return *zoo.load("open_vocabulary"), zoo.load_processor("open_vocabulary")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return zoo.example("digits")[0][:2]


def quiet(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call()


# --- dropout and autocast around what is computed once


def test_text_features_do_not_depend_on_the_mode(vocabulary, images):
    clip, denoiser, processor = vocabulary
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5)
    model = get_peft_model(copy.deepcopy(clip).eval(), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    task = ZeroShot(zoo.DIGITS, processor)
    expected = adapt(model.eval(), denoiser, images, config=CONFIG, task=task)
    modes = {name: part.training for name, part in model.train().named_modules()}
    found = adapt(model, denoiser, images, config=CONFIG, task=task)
    torch.testing.assert_close(found.outputs, expected.outputs)
    assert {name: part.training for name, part in model.named_modules()} == modes


def test_prompts_do_not_depend_on_the_mode(vocabulary):
    denoiser = copy.deepcopy(vocabulary[1])
    encoder = denoiser.text()[0]
    expected = denoiser.with_classes(zoo.DIGITS).class_embeddings({})
    for layer in encoder.text_model.encoder.layers if hasattr(encoder, "text_model") else encoder.encoder.layers:
        layer.self_attn.dropout = 0.5
    encoder.train()
    torch.testing.assert_close(denoiser.with_classes(zoo.DIGITS).class_embeddings({}), expected)
    assert encoder.training


def test_an_autocast_around_a_session_changes_nothing(vocabulary, digits, images):
    clip, denoiser, processor = vocabulary
    task = ZeroShot(zoo.DIGITS, processor)
    expected = adapt(clip, denoiser, images, config=CONFIG, task=task)
    clean = zoo.example("digits")[0][:8].clamp(0, 1)
    measured = calibrate(digits[1], clean)
    with torch.autocast("cpu", torch.bfloat16):
        session = Adapter(clip, denoiser, CONFIG, task)
        assert calibrate(digits[1], clean) == measured
    assert torch.equal(session.adapt(images).outputs, expected.outputs)


# --- preprocessing that gets lost


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@pytest.mark.parametrize("wrap", [Wrapper, lambda model: nn.Sequential(model, nn.Identity())])
def test_a_wrapper_that_hides_a_timm_config_is_told(digits, images, wrap):
    model, denoiser = digits
    wrapped = wrap(model)
    with pytest.warns(UserWarning, match=r"has no timm config, and its part (inner|0) has: it gets images in \[0, 1\] as they are"):
        Adapter(wrapped, denoiser, CONFIG)
    quiet(lambda: Adapter(wrapped, denoiser, CONFIG, Classification(normalise=lambda crop: crop)))
    wrapped.pretrained_cfg = model.pretrained_cfg
    found = quiet(lambda: adapt(wrapped, denoiser, images, config=CONFIG))
    torch.testing.assert_close(found.outputs_before, adapt(model, denoiser, images, config=CONFIG).outputs_before)


def test_probabilities_in_place_of_logits_are_told(digits, images):
    model, denoiser = digits
    softmax = nn.Sequential(model, nn.Softmax(1))
    softmax.pretrained_cfg = model.pretrained_cfg
    with pytest.warns(UserWarning, match=r"seems to return probabilities, and logits are expected; take the softmax out"):
        adapt(softmax, denoiser, images, config=CONFIG)


def test_images_that_are_nearly_black_are_told(digits, images):
    model, denoiser = digits
    for dark in ((images > 0.5).to(torch.uint8), images / 255):
        with pytest.warns(UserWarning, match=r"images are nearly black: their largest value is 0.0039 of 1"):
            adapt(model, denoiser, dark, config=CONFIG)
    for fine in (images, (images * 255).to(torch.uint8), torch.zeros_like(images)):
        quiet(lambda given=fine: adapt(model, denoiser, given, config=CONFIG))


# --- files


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "maps").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "0.png")
    Image.new("L", (8, 8), 1).save(tmp_path / "maps" / "0.png")
    (tmp_path / "classes.txt").write_text("floor\nwall\n", encoding="utf-8-sig")
    assert open_map_folder(tmp_path, 8).classes == ("floor", "wall")


def test_names_on_standard_input_may_begin_with_a_byte_order_mark(tmp_path):
    Image.new("RGB", (32, 32), (9, 9, 9)).save(tmp_path / "0.png")
    command = [sys.executable, "-m", "dtta_fast.commands.cli", "adapt", "-", "--guard", "0", "--guard-threshold", "0", "--steps", "1"]
    run = subprocess.run(command, input=f"\ufeff{tmp_path}/0.png\r\n".encode(), capture_output=True, check=False)
    assert run.returncode == 0, run.stderr.decode()


@pytest.mark.parametrize("names", [("train", "val"), ("Train", "Test"), ("train", "validation", "test")])
def test_splits_are_no_classes(tmp_path, names):
    for name in names:
        (tmp_path / name / "cat").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "cat" / "0.png")
    with pytest.raises(ValueError, match=r"holds the splits .*, not classes: give the folder of one split"):
        open_folder(tmp_path)


@pytest.mark.parametrize("kind", ["DiT", "timm", "transformers"])
def test_a_git_lfs_pointer_is_named(tmp_path, kind):
    source = zoo.folder("digits") / ("denoiser" if kind == "DiT" else "classifier")
    source = zoo.folder("open_vocabulary") / "clip" if kind == "transformers" else source
    shutil.copytree(source, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    load = {"DiT": DiT.from_pretrained, "timm": load_classifier, "transformers": load_clip}[kind]
    with pytest.raises(ValueError, match=r"model.safetensors is a pointer of git-lfs, not the weights: run git lfs pull"):
        load(str(tmp_path / "model"))


@pytest.mark.parametrize(("bits", "white_is_zero"), [(8, True), (16, True), (16, False)])
def test_a_tiff_in_which_white_is_zero(tmp_path, bits, white_is_zero):
    """Written byte by byte, since PIL saves no 16-bit TIFF of this kind."""
    values = np.array([[50_000, 10_000], [0, 65_535]], dtype="<u2") if bits == 16 else np.array([[195, 39], [0, 255]], dtype="<u1")
    data = values.tobytes()
    tags = [(256, 4, 2), (257, 4, 2), (258, 3, bits), (259, 3, 1), (262, 3, 0 if white_is_zero else 1), (273, 4, 8), (277, 3, 1),
            (278, 4, 2), (279, 4, len(data))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    (tmp_path / "a.tif").write_bytes(head + data + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0))
    expected = np.array([[195, 39], [0, 255]])
    found = (read_image(tmp_path / "a.tif")[0] * 255).round().numpy()
    assert np.array_equal(found, 255 - expected if white_is_zero else expected)
    assert TiffImagePlugin.PHOTOMETRIC_INTERPRETATION == 262


def test_arrays_of_another_byte_order(digits, images):
    array = images.movedim(1, -1).numpy().astype(">f4")
    expected = adapt(*digits, images, config=CONFIG)
    torch.testing.assert_close(adapt(*digits, array, config=CONFIG).outputs, expected.outputs)


# --- maps


def map_folder(folder, size=(12, 8), orientation=1, turned_map=False, values=(0, 1)):
    """A photograph with an EXIF orientation, and a map drawn on the stored or on the turned image."""
    for name in ("images", "maps"):
        (folder / name).mkdir()
    pixels = np.arange(size[0] * size[1], dtype=np.uint8).reshape(size)
    stored = Image.fromarray(np.stack([pixels] * 3, axis=-1))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(folder / "images" / "0.png", exif=exif)
    truth = Image.fromarray(np.where(pixels > 20, values[1], values[0]).astype(np.uint8))
    if turned_map:
        truth = truth.transpose({6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}[orientation])
    truth.save(folder / "maps" / "0.png")
    (folder / "classes.txt").write_text("dark\nlight\n")
    return open_map_folder(folder, 8)


@pytest.mark.parametrize("orientation", [6, 8])
@pytest.mark.parametrize("turned_map", [False, True])
def test_a_map_is_turned_with_its_image(tmp_path, orientation, turned_map):
    data = map_folder(tmp_path, orientation=orientation, turned_map=turned_map)
    image, truth, _ = quiet(lambda: data.pair(0))
    assert image.shape[1:] == truth.shape == (8, 12)
    assert torch.equal(truth, (image[0] > 20.5 / 255).long())


def test_digests_cover_the_whole_of_a_large_file(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "WHOLE", 2**12)
    monkeypatch.setattr(content, "PIECES", 16)
    (tmp_path / "model.safetensors").write_bytes(bytes(2**14))
    before = content.digest_of_files(tmp_path)
    for place in (0, 2**14 - 1):
        changed = bytearray(2**14)
        changed[place] = 1
        (tmp_path / "model.safetensors").write_bytes(changed)
        assert content.digest_of_files(tmp_path) != before
    folder = RunConfig(data="folder", root=".", model=f"local-dir:{tmp_path}", denoiser="zoo")
    assert set(content.weights_of(folder)) == {"model"}


@pytest.mark.parametrize(("size", "orientation"), [((8, 8), 6), ((12, 8), 3)])
def test_a_map_whose_size_cannot_tell_is_told_once(tmp_path, size, orientation):
    data = map_folder(tmp_path, size=size, orientation=orientation)
    with pytest.warns(UserWarning, match=r"is turned by its EXIF, and .* has none; such maps are taken as ones of the turned image"):
        data.pair(0)
    quiet(lambda: data.pair(0))


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_map_with_an_orientation_of_its_own_is_turned(tmp_path, orientation):
    data = map_folder(tmp_path, orientation=orientation)
    path = tmp_path / "maps" / "0.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(path) as stored:
        stored.copy().save(path, exif=exif)
    image, truth, _ = quiet(lambda: data.pair(0))
    assert torch.equal(truth, (image[0] > 20.5 / 255).long())


def test_masks_of_black_and_white_are_told(tmp_path):
    with pytest.warns(UserWarning, match=r"maps of 0 and 255 alone, and 255 means that a pixel has no label"):
        map_folder(tmp_path, values=(0, 255))


# --- tokens


def test_padding_on_the_left_changes_nothing(vocabulary):
    clip, denoiser, processor = vocabulary
    processor = copy.deepcopy(processor)
    expected = ZeroShot(zoo.DIGITS, processor).bind(clip, denoiser)
    own = copy.deepcopy(denoiser)
    processor.tokenizer.padding_side = own.text()[1].padding_side = "left"
    found = ZeroShot(zoo.DIGITS, processor).bind(clip, own)
    assert torch.equal(found[0].texts, expected[0].texts)
    assert torch.equal(found[1].class_embeddings({}), expected[1].class_embeddings({}))


def test_tokens_that_the_encoder_does_not_know_are_named(vocabulary):
    clip, denoiser, processor = vocabulary
    processor = copy.deepcopy(processor)
    processor.tokenizer.add_tokens(["<mine>"])
    with pytest.raises(ValueError, match=r"the tokenizer gives token \d+, and the text encoder knows \d+: tokens were added"):
        ZeroShot(["<mine>", "one"], processor).bind(clip, denoiser)


# --- models


def test_number_formats_that_do_not_fit_are_named(digits, images):
    model = copy.deepcopy(digits[0]).bfloat16()
    model.head.float()
    with pytest.raises(ValueError, match=r"model mixes number formats, and adapt\(\) runs without autocast .*model.float\(\)"):
        adapt(model, digits[1], images, config=CONFIG)


@pytest.mark.parametrize("which", ["pruned", "old weight_norm"])
def test_computed_weights_are_named(digits, which):
    model = copy.deepcopy(digits[0])
    if which == "pruned":
        prune.l1_unstructured(model.head.fc, "weight", 0.3)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated
            nn.utils.weight_norm(model.head.fc)
    with pytest.raises(TypeError, match=r"as pruning and the old weight_norm leave it: make it permanent by torch.nn.utils.prune.remove"):
        Adapter(model, digits[1], CONFIG)


def test_counters_among_the_parameters_are_left_alone(digits, images):
    model = copy.deepcopy(digits[0])
    expected = adapt(model, digits[1], images, config=CONFIG)
    model.steps = nn.Parameter(torch.tensor(3), requires_grad=False)
    assert torch.equal(adapt(model, digits[1], images, config=CONFIG).outputs, expected.outputs)


@pytest.mark.parametrize(
    ("made", "kind"), [(torch.zeros(3, dtype=torch.complex64), "torch.complex64"), (torch.eye(3).to_sparse(), "torch.sparse_coo")]
)
def test_parameters_of_other_kinds_are_named(digits, images, made, kind):
    model = copy.deepcopy(digits[0])
    model.filter = nn.Parameter(made)
    with pytest.raises(ValueError, match=rf"model parameter filter is {kind}, which is not adapted; choose parameters='head' or 'norm'"):
        Adapter(model, digits[1], CONFIG)
    adapt(model, digits[1], images, config=CONFIG.replace(parameters="head"))


def test_weights_that_are_not_there_are_named(digits, images):
    model = timm.create_model("resnet10t", num_classes=10).to("meta")
    with pytest.raises(ValueError, match=r"model is on the meta device: its weights are offloaded or were never loaded"):
        adapt(model, digits[1], images, config=CONFIG)


# --- runs


def test_off_in_yaml_is_off():
    changed = with_settings(RunConfig(data="folder", root="."), {"match": False, "precheck": False, "compile": False})
    assert (changed.adapt.match, changed.adapt.precheck, changed.adapt.compile) == ("off", "off", "off")
    with pytest.raises(ValueError, match=r"classes is \(True, False\); allowed: a list of text; YAML reads yes, no, on and off as"):
        with_settings(RunConfig(data="folder", root="."), {"classes": [True, False]})


def test_a_run_goes_on_with_the_same_weights_alone(tmp_path, capsys):
    shutil.copytree(zoo.folder("digits") / "classifier", tmp_path / "model")
    shutil.copytree(zoo.folder("digits") / "denoiser", tmp_path / "denoiser")
    (tmp_path / "data").mkdir()
    for i, image in enumerate(zoo.example("digits")[0][:3]):
        Image.fromarray((image.movedim(0, -1) * 255).byte().numpy()).save(tmp_path / "data" / f"{i}.png")
    own = ["--data", "folder", "--root", str(tmp_path / "data"), "--model", str(tmp_path / "model"), "--denoiser",
           str(tmp_path / "denoiser"), "--batch", "1", "--preset", "RANK"]  # fmt: skip
    main(["evaluate", str(tmp_path / "run"), *own])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert set(config["weights"]) == {"model", "denoiser"}
    records = tmp_path / "run" / "records.jsonl"
    first = records.read_text().splitlines()[:2]
    records.write_text("\n".join(first) + "\n")
    (tmp_path / "run" / "summary.json").unlink()
    weights = tmp_path / "model" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    last = bytes(changed[-4:])
    changed[-4:] = bytes(4)
    weights.write_bytes(bytes(changed))
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "run"), *own])
    assert "holds the records of another config: weights.model: " in capsys.readouterr().err
    for name in ("notes.txt", "optimizer.pt"):  # what has nothing to do with the weights
        (tmp_path / "model" / name).write_text("later")
    changed[-4:] = last
    weights.write_bytes(bytes(changed))
    main(["evaluate", str(tmp_path / "run"), *own])
    capsys.readouterr()
    records.write_text("\n".join(first) + "\n")
    (tmp_path / "run" / "summary.json").unlink()
    changed[-4:] = bytes(4)
    weights.write_bytes(bytes(changed))
    del config["weights"]  # a run of an older version goes on
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    main(["evaluate", str(tmp_path / "run"), *own])
    assert presets.RANK.method == "posterior"
