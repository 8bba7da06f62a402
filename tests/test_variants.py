"""Weight files of a variant, such as fp16, where nothing else is there."""

from __future__ import annotations

import huggingface_hub
import pytest

from dtta_fast.denoisers.reading import download, only_variant


@pytest.mark.parametrize(
    ("names", "variant"),
    [
        (["diffusion_pytorch_model.fp16.safetensors"], "fp16"),
        (["model.bf16-00001-of-00002.safetensors", "model.bf16-00002-of-00002.safetensors"], "bf16"),
        (["model.fp16.safetensors", "model.safetensors"], None),
        (["model.fp16.safetensors", "model.bf16.safetensors"], "fp16"),
        (["model.fp16.safetensors", "model.non_ema.safetensors"], "fp16"),
        (["model.fp32.safetensors", "model.fp16.safetensors"], "fp32"),
        (["model.int8.safetensors", "model.bf16.safetensors"], None),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], None),
        (["embeddings.safetensors"], None),
        (["model.non_ema.safetensors"], None),
        (["model.fp16.safetensors", "pytorch_model.bin"], None),
        ([], None),
    ],
)
def test_the_only_variant_is_found(tmp_path, names, variant):
    for name in names:
        (tmp_path / name).touch()
    assert only_variant(tmp_path) == variant


@pytest.mark.parametrize(("there", "wanted"), [(["a.safetensors", "a.fp16.safetensors"], 1), (["a.fp16.safetensors"], 2), (["a.bin"], 3)])
def test_the_hub_is_asked_for_variants_where_it_has_no_others(tmp_path, monkeypatch, there, wanted):
    asked = []

    def snapshot(model_id, allow_patterns, ignore_patterns=None):
        asked.append((allow_patterns, ignore_patterns))
        for name in there:
            fits = any(name.endswith(pattern.lstrip("*")) for pattern in allow_patterns)
            if fits and not any(part.strip("*") in name for part in ignore_patterns or ()):
                (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    found = download("some/model", ["*.safetensors"], ["*.fp16.*"])
    assert found == tmp_path
    assert len(asked) == wanted
    assert {path.name for path in tmp_path.iterdir()} == set(there) - ({"a.fp16.safetensors"} if wanted == 1 else set())


def test_a_description_alone_fetches_no_weights(tmp_path, monkeypatch):
    asked = []

    def snapshot(model_id, allow_patterns, ignore_patterns=None):
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    download("some/model", ["model_index.json"])
    assert asked == [["model_index.json"]]
