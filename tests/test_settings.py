"""Where a run's settings come from: presets, YAML, flags and the reference implementation's names."""

from __future__ import annotations

import json

import pytest

from dtta_fast import presets
from dtta_fast.commands.evaluate import Evaluate
from dtta_fast.runs.config import RunConfig, differences, with_settings


def test_yaml_then_names_then_flags(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "data: imagenet-c\nroot: /data\ncorruptions: [fog, snow]\nper_class: 3\nsteps: 7\nadapt: {guard: 9, lr: 1.0e-3}\nbatch: 5\n"
    )
    found, flags = Evaluate.start(
        ["evaluate", "out", "--settings", str(path), "tta.loss=l1", "--tta.gradient_descent.train_steps=4", "--batch", "6"]
    )
    run = found.run_config
    assert (run.data, run.root, run.corruptions, run.per_class, run.batch) == ("imagenet-c", "/data", ("fog", "snow"), 3, 5)
    assert run.adapt == presets.FAST.replace(steps=4, guard=9, lr=1e-3, loss="l1")
    assert flags == ["evaluate", "out", "--settings", str(path), "--batch", "6"]


@pytest.mark.parametrize(
    ("arguments", "preset", "protocol"),
    [
        ([], presets.FAST, "episodic"),
        (["--protocol", "online"], presets.ONLINE, "online"),
        (["--protocol=continual"], presets.ONLINE, "continual"),
        (["tta.online=true"], presets.ONLINE, "online"),
        (["--preset", "ONLINE"], presets.ONLINE, "online"),
        (["--preset", "DUSA", "--protocol", "continual"], presets.DUSA, "continual"),
        (["--task", "depth"], presets.DENSE, "episodic"),
        (["--preset", "PAPER", "--preset", "DUSA"], presets.DUSA, "online"),
        (["--preset", "PAPER"], presets.PAPER, "episodic"),
        (["tta.gradient_descent.base_learning_rate=5e-3"], presets.FAST.replace(lr=5e-3, denoiser_lr=5e-3), "episodic"),
    ],
)
def test_protocol_and_preset_go_together(arguments, preset, protocol):
    run = Evaluate.start(["evaluate", "out", *arguments])[0].run_config
    assert (run.adapt, run.protocol) == (preset, protocol)


@pytest.mark.parametrize("text", ["mode: online\n", "adapt: {mode: online}\n", "preset: ONLINE\nmode: online\n"])
def test_a_file_s_mode_sets_the_protocol(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    run = Evaluate.start(["evaluate", "out", "--settings", str(tmp_path / "run.yaml")])[0].run_config
    assert (run.protocol, run.adapt) == ("online", presets.ONLINE)
    (tmp_path / "run.yaml").write_text("protocol: continual\nmode: online\n")
    assert Evaluate.start(["evaluate", "out", "--settings", str(tmp_path / "run.yaml")])[0].run_config.protocol == "continual"


def test_a_mode_by_flag_names_the_protocol():
    with pytest.raises(
        ValueError, match=r"--mode is 'online' with protocol 'episodic', .* give --protocol online, or continual, and leave"
    ):
        Evaluate.start(["evaluate", "out", "--mode", "online"])
    assert Evaluate.start(["evaluate", "out", "--mode", "online", "--protocol", "online"])[0].run_config.protocol == "online"


@pytest.mark.parametrize(
    "run",
    [
        RunConfig(corruptions=("fog",), per_class=2, adapt=presets.FAST.replace(lr=1e-5, timestep_range=(3, 9))),
        RunConfig(data="folder", root="a: b", protocol="continual", adapt=presets.DUSA),
        RunConfig(data="nyuv2", root="/d", split="test", task="depth", calibration="c.json", adapt=presets.DENSE),
    ],
)
def test_a_run_s_config_holds_settings(tmp_path, run):
    (tmp_path / "config.json").write_text(json.dumps(run.described(), indent=2))
    assert Evaluate.start(["evaluate", "out", "--settings", str(tmp_path / "config.json")])[0].run_config == run


def test_a_preset_by_flag_comes_before_the_file_s(tmp_path):
    (tmp_path / "run.yaml").write_text("preset: PAPER\nlr: 1e-3\n")
    named = Evaluate.start(["evaluate", "out", "--settings", str(tmp_path / "run.yaml")])[0].run_config.adapt
    assert named == presets.PAPER.replace(lr=1e-3)
    flag = Evaluate.start(["evaluate", "out", "--settings", str(tmp_path / "run.yaml"), "--preset", "DENSE"])[0].run_config.adapt
    assert flag == presets.DENSE.replace(lr=1e-3)


def test_the_reference_s_recipe_by_its_own_names():
    """Its command for ImageNet-C with DiT: 12 batches of 15 pairs an update, 5 updates, SGD, both adapting."""
    settings = {
        "input": {
            "dataset_name": "ImageNetCDataset",
            "root_path": "/data",
            "batch_size": 15,
            "subsample": 3,
            "mean": [0.5] * 3,
            "sd_img_res": 256,
        },
        "model": {"use_dit": True, "class_arch": "resnet18", "adapt_only_classifier": False},
        "tta": {
            "online": False,
            "adapt_topk": -1,
            "loss": "mse",
            "use_same_noise_among_timesteps": True,
            "gradient_descent": {
                "train_steps": 5,
                "accum_iter": 12,
                "optimizer": "sgd",
                "base_learning_rate": 5e-3,
                "optimizer_momentum": 0.8,
            },
        },
        "gpu": -1,
        "seed": None,
        "preset": "PAPER",
    }
    run = with_settings(RunConfig(device="cpu"), settings)
    wanted = presets.PAPER.replace(chunk=15, share_noise=True, momentum=0.8)
    assert run == RunConfig(
        data="imagenet-c", root="/data", per_class=3, model="resnet18.tv_in1k", denoiser="facebook/DiT-XL-2-256", device="cpu", adapt=wanted
    )
    assert run.adapt.pairs == 180
    clip = with_settings(RunConfig(device="cpu"), {"model.sd_version": "2-1", "tta.adapt_topk": 5, "gpu": 1, "tta.loss": "l1", "steps": 2})
    assert (clip.denoiser, clip.adapt.top_k, clip.device, clip.adapt.loss) == ("stabilityai/stable-diffusion-2-1-base", 5, "cuda:1", "l1")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stepz": 3}, "stepz is not a setting of a run; there are"),
        ({"tta.stepz": 3}, "tta.stepz is not a name of the reference's config"),
        ({"input.dataset_name": "Mnist"}, "input.dataset_name is 'Mnist'; there are ImageNetDataset"),
        ({"steps": 0}, "steps is 0"),
        ({"preset": "SLOW"}, "preset is 'SLOW'"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        with_settings(RunConfig(), settings)


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "a: [", "3: 4", "\x00"])
def test_a_file_that_is_no_settings(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"run.yaml"):
        Evaluate.start(["evaluate", "out", "--settings", str(tmp_path / "run.yaml")])


def test_what_two_configs_differ_in():
    first, second = RunConfig().described(), RunConfig(per_class=2, adapt=presets.FAST.replace(lr=1.0)).described()
    assert list(differences(first, second)) == ["adapt.lr: 0.0005 / 1.0", "data.per_class: None / 2"]
    assert list(differences(first, {**first, "extra": 1})) == ["extra: None / 1"]
    assert not list(differences(first, RunConfig(workers=7).described()))  # which changes no result


def test_a_protocol_by_flag_decides_over_a_run_s_config(tmp_path):
    run = RunConfig(classes=("a 😀 b", "c"), adapt=presets.FAST.replace(precheck="off"))
    (tmp_path / "config.json").write_text(json.dumps(run.described(), indent=2))
    start = ["evaluate", "out", "--settings", str(tmp_path / "config.json")]
    assert Evaluate.start(start)[0].run_config.classes == run.classes
    online = Evaluate.start([*start, "--protocol", "online"])[0].run_config
    assert (online.protocol, online.adapt.mode) == ("online", "online")
