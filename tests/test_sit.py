"""SiT and REPA checkpoints: DiT's network on the linear path. The reference here is written from the papers, with timm's layers."""

from __future__ import annotations

import json

import pytest
import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from dtta_fast import AdaptConfig, adapt
from dtta_fast.denoisers import DiT
from dtta_fast.denoisers.dit_network import position_embedding, timestep_embedding
from dtta_fast.runs.models import load_denoiser

WIDTH, HEADS, DEPTH, SIDE, CLASSES = 32, 4, 2, 8, 10


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Reference(nn.Module):
    """A transformer of patches with adaptive layer norm, and for REPA the projectors of its alignment loss."""

    def __init__(self, channels: int, projectors: bool, qk_norm: bool = False) -> None:
        super().__init__()
        self.x_embedder = PatchEmbed(SIDE, 2, 4, WIDTH)
        self.t_embedder = nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(CLASSES + 1, WIDTH)
        self.pos_embed = nn.Parameter(position_embedding(SIDE // 2, WIDTH, torch.device("cpu"))[None], requires_grad=False)
        self.blocks = nn.ModuleList(self.block(qk_norm) for _ in range(DEPTH))
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(WIDTH, 4 * channels)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))
        if projectors:
            self.projectors = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, 16), nn.SiLU(), nn.Linear(16, 24))])

    @staticmethod
    def block(qk_norm: bool) -> nn.Module:
        block = nn.Module()
        block.attn = Attention(WIDTH, HEADS, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm)
        block.mlp = Mlp(WIDTH, 4 * WIDTH, act_layer=lambda: nn.GELU(approximate="tanh"))
        block.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        return block

    def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder.mlp(timestep_embedding(time)) + self.y_embedder.embedding_table(labels)
        for block in self.blocks:
            shift, scale, gate, shift2, scale2, gate2 = block.adaLN_modulation(c).chunk(6, dim=1)
            tokens = tokens + gate[:, None] * block.attn(modulated(tokens, shift, scale))
            tokens = tokens + gate2[:, None] * block.mlp(modulated(tokens, shift2, scale2))
        tokens = self.final_layer.linear(modulated(tokens, *self.final_layer.adaLN_modulation(c).chunk(2, dim=1)))
        grid = tokens.unflatten(1, (SIDE // 2, SIDE // 2)).unflatten(-1, (2, 2, -1))
        return torch.einsum("nhwpqc->nchpwq", grid).reshape(len(x), -1, SIDE, SIDE)


def reference(kind: str) -> Reference:
    torch.manual_seed(0)
    made = Reference(8 if kind == "SiT" else 4, kind == "REPA").eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1) if parameter.requires_grad else None
    return made


@pytest.mark.parametrize("kind", ["SiT", "REPA"])
def test_a_checkpoint_predicts_the_path_s_velocity(kind, tmp_path):
    theirs = reference(kind)
    torch.save({"ema": theirs.state_dict(), "opt": {}}, tmp_path / "last.pt")
    denoiser = DiT.from_original(tmp_path / "last.pt", num_heads=HEADS, process=kind).eval()
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 3, 4, SIDE, SIDE, generator=generator)
    rows, labels = torch.tensor([0, 400, 999]), torch.tensor([3, 0, 9])
    a, s, u, v, _ = (column.view(-1, 1, 1, 1) for column in denoiser.process.table[rows].unbind(1))
    time = denoiser.process.model_time[rows]
    # SiT goes from noise at 0 to data at 1, REPA the other way
    toward_data = time if kind == "SiT" else 1 - time
    torch.testing.assert_close(a.flatten(), toward_data)
    torch.testing.assert_close(u * x0 + v * noise, x0 - noise if kind == "SiT" else noise - x0)
    x_t = a * x0 + s * noise
    with torch.no_grad():
        found = denoiser(x_t, rows, denoiser.class_embeddings({})[labels])
        expected = theirs(x_t, time, labels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.shape[1] == (8 if kind == "SiT" else 4)  # SiT drops the second half of its output, as the loss does


@pytest.mark.parametrize("kind", ["SiT", "REPA"])
def test_a_folder_knows_its_process(kind, tmp_path):
    denoiser = DiT.from_original(reference(kind).state_dict(), num_heads=HEADS, process=kind)
    denoiser.save_pretrained(tmp_path)
    found = load_denoiser(str(tmp_path))
    assert torch.equal(found.process.table, denoiser.process.table)
    assert torch.equal(found.process.model_time, denoiser.process.model_time)
    latents = torch.randn(1, 4, SIDE, SIDE)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, CLASSES))
    config = AdaptConfig(steps=1, pairs=2, guard=2)
    adapted = [adapt(model, each, torch.full((1, 3, 8, 8), 0.5), config=config, latents=latents) for each in (denoiser, found)]
    assert torch.equal(adapted[0].outputs, adapted[1].outputs)


def test_what_cannot_be_read_is_named(tmp_path):
    state = Reference(4, True, qk_norm=True).state_dict()
    with pytest.raises(ValueError, match=r"normalises queries and keys \(qk_norm\)"):
        DiT.from_original(state, num_heads=HEADS, process="REPA")
    with pytest.raises(ValueError, match=r"process is 'Sit'; allowed: DiT, SiT, REPA"):
        DiT.from_original(reference("SiT").state_dict(), num_heads=HEADS, process="Sit")
    with pytest.raises(ValueError, match="process is None; allowed: DiT, SiT, REPA"):
        DiT.from_original(reference("SiT").state_dict(), num_heads=HEADS, process=None)
    denoiser = DiT.from_original(reference("SiT").state_dict(), num_heads=HEADS, process="SiT")
    with pytest.raises(ValueError, match="scheduler is 'REPA', and the denoiser's process is another one"):
        denoiser.save_pretrained(tmp_path / "c", "REPA")
    with pytest.raises(ValueError, match="process is 'REPAA'"):
        denoiser.save_pretrained(tmp_path / "a", "REPAA")
    assert not (tmp_path / "a").exists()
    denoiser.save_pretrained(tmp_path / "b", "SiT")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps({**config, "process": ["SiT"]}))
    with pytest.raises(ValueError, match=r"config.json: process is \['SiT'\]"):
        DiT.from_pretrained(tmp_path / "b")
