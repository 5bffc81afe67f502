"""Exports as a LoRA and a token file, against diffusers and numpy."""

import json
from dataclasses import replace

import pytest
import torch
from exports_by_hand import names_of, one_step, our_step, pipeline_of, singular_cut
from safetensors.torch import load_file

from echodistill_core.adapter.export import export_lora, low_rank, token_path
from echodistill_core.adapter.file import read_adapter
from echodistill_core.errors import InputError
from echodistill_core.models.layout import unet_names
from echodistill_core.sampling import draw_noise

# The approximation


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (1, 5)])
@pytest.mark.parametrize("rank", [1, 4, 32, 1000])
def test_low_rank_is_the_best_one_and_knows_its_error(shape, rank):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    matrix = low_rank(delta, rank)
    assert matrix.up.shape == (shape[0], min(rank, *shape))
    assert matrix.down.shape == (min(rank, *shape), shape[1])
    best, error = singular_cut(delta, rank)
    torch.testing.assert_close(matrix.up @ matrix.down, best, rtol=0, atol=1e-5)
    assert matrix.error == pytest.approx(error, abs=1e-6)
    measured = (delta - matrix.up @ matrix.down).norm() / delta.norm()
    assert matrix.error == pytest.approx(float(measured), abs=1e-5)


def test_a_matrix_of_zeros_has_no_error():
    matrix = low_rank(torch.zeros(4, 3), 2)
    assert matrix.error == 0
    assert torch.equal(matrix.up @ matrix.down, torch.zeros(4, 3))


# LoRA


@pytest.mark.parametrize("rank", [2, 8, 32, 500])
def test_lora_in_diffusers_draws_what_the_cut_adapter_draws(family, tiny_family, make_adapter, tmp_path, rank):
    adapter = make_adapter()
    errors = export_lora(tmp_path / "dog.safetensors", adapter, family.architecture, names_of(family), rank)
    cuts = {n: singular_cut(d, rank) for n, d in adapter.deltas.items()}
    original = unet_names(names_of(family), family.architecture)
    assert {original[n]: e for n, e in errors.items()} == {n: pytest.approx(e, abs=1e-6) for n, (_, e) in cuts.items()}

    noise = draw_noise(family, 1, 64, 64, seed=3)
    pipeline = pipeline_of(tiny_family())  # a family of its own: diffusers changes networks in place
    pipeline.load_lora_weights(tmp_path / "dog.safetensors")
    pipeline.load_textual_inversion(tmp_path / "dog_token.safetensors")
    found = one_step(pipeline, noise)
    cut = replace(adapter, deltas={n: d for n, (d, _) in cuts.items()})
    expected = our_step(family, cut, noise)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
    whole = our_step(family, adapter, noise)
    if rank >= 32:
        assert max(errors.values()) < 1e-6
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=2e-4)
    else:
        assert not torch.allclose(found, whole, rtol=1e-2, atol=1e-2)


def test_lora_file_has_the_names_that_tools_know_and_alpha_equal_to_rank(family, make_adapter, tmp_path):
    adapter = make_adapter()
    export_lora(tmp_path / "dog.safetensors", adapter, family.architecture, names_of(family), 4)
    tensors = load_file(tmp_path / "dog.safetensors")
    modules = [
        f"lora_unet_{block}_transformer_blocks_0_attn2_to_{x}"
        for block in (
            "down_blocks_0_attentions_0",
            "down_blocks_1_attentions_0",
            "mid_block_attentions_0",
            "up_blocks_1_attentions_0",
            "up_blocks_1_attentions_1",
            "up_blocks_2_attentions_0",
            "up_blocks_2_attentions_1",
        )
        for x in "kv"
    ]
    assert set(tensors) == {f"{m}.{part}" for m in modules for part in ("lora_up.weight", "lora_down.weight", "alpha")}
    for module in modules:
        assert tensors[f"{module}.alpha"].item() == tensors[f"{module}.lora_down.weight"].shape[0] == 4
    delta = adapter.deltas["middle_block.1.transformer_blocks.0.attn2.to_k.weight"]
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    product = tensors[f"{module}.lora_up.weight"] @ tensors[f"{module}.lora_down.weight"]
    torch.testing.assert_close(product, singular_cut(delta, 4)[0], rtol=0, atol=1e-5)


def test_token_file_holds_the_rows_under_the_placeholder(family, make_adapter, tmp_path):
    adapter = make_adapter(vectors=2)
    export_lora(tmp_path / "my.dog.safetensors", adapter, family.architecture, names_of(family), 4)
    assert token_path(tmp_path / "my.dog.safetensors") == tmp_path / "my.dog_token.safetensors"
    tensors = load_file(tmp_path / "my.dog_token.safetensors")
    assert list(tensors) == ["<new1>"]
    assert torch.equal(tensors["<new1>"], adapter.token_embeddings)


def test_exported_files_keep_the_notice_and_are_no_adapters(family, make_adapter, tmp_path):
    from safetensors import safe_open

    export_lora(tmp_path / "dog.safetensors", make_adapter(), family.architecture, names_of(family), 4)
    for name in ("dog", "dog_token"):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            facts = file.metadata()
        assert "photographs" in facts["notice"]
        assert "student" in json.loads(facts["base_licences"])
        assert str(tmp_path) not in json.dumps(facts)
        with pytest.raises(InputError, match="no EchoDistill adapter"):
            read_adapter(tmp_path / f"{name}.safetensors")


def test_a_low_rank_adapter_is_exported_without_loss_at_its_own_rank(family, make_adapter, tmp_path):
    generator = torch.Generator().manual_seed(8)
    name = "middle_block.1.transformer_blocks.0.attn1.to_out.0.weight"
    factors = {name: (torch.randn(64, 3, generator=generator), torch.randn(3, 64, generator=generator))}
    adapter = replace(make_adapter(), deltas={}, factors=factors)
    errors = export_lora(tmp_path / "a.safetensors", adapter, family.architecture, names_of(family), 3)
    assert list(errors) == ["mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.weight"]
    assert max(errors.values()) < 1e-6
    tensors = load_file(tmp_path / "a.safetensors")
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
    up, down = factors[name]
    torch.testing.assert_close(
        tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"], up @ down, rtol=1e-5, atol=1e-4
    )


def test_lora_refuses_what_it_cannot_hold(family, make_adapter, tmp_path):
    out, names = tmp_path / "a.safetensors", names_of(family)
    full = replace(make_adapter(), deltas={"input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3)})
    with pytest.raises(InputError, match=r"conv_in\.weight.*--to merged"):
        export_lora(out, full, family.architecture, names, 4)
    with pytest.raises(InputError, match="rank is 0"):
        export_lora(out, make_adapter(), family.architecture, names, 0)
    with pytest.raises(InputError, match=r"out .*\.safetensors"):
        export_lora(tmp_path / "a.pt", make_adapter(), family.architecture, names, 4)
    assert list(tmp_path.iterdir()) == []
