"""Adapter files that the reader refuses."""

import json
import struct

import pytest
import torch
from adapters_by_hand import KV, make_adapter, metadata
from safetensors.torch import save_file

from echodistill_core.adapter.file import read_adapter
from echodistill_core.errors import InputError

# What the reader refuses


def spoilt(family, path, change):
    """A good file's tensors and metadata, spoilt by `change` and written with safetensors' own writer."""
    adapter = make_adapter(family)
    tensors = {f"diffusion_model.{n.removesuffix('.weight')}.diff": d for n, d in adapter.deltas.items()}
    tensors["clip_h"] = adapter.token_embeddings
    facts = dict(adapter.metadata)
    change(tensors, facts)
    save_file(tensors, path, facts)
    return path


KEY = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k"


def put(name, tensor):
    return lambda tensors, facts: tensors.update({name: tensor})


def drop(name):
    return lambda tensors, facts: (tensors.pop(name, None), facts.pop(name, None))


def say(name, text):
    return lambda tensors, facts: facts.update({name: text})


def pair(*names, shapes=((64, 4), (4, 32))):
    def change(tensors, facts):
        del tensors[f"{KEY}.diff"]
        for name, shape in zip(names, shapes, strict=False):
            tensors[f"{KEY}.{name}.weight"] = torch.zeros(shape)

    return change


def nan(tensors, facts):
    tensors[f"{KEY}.diff"][3, 5] = float("nan")


def infinite(tensors, facts):
    tensors["clip_h"] = tensors["clip_h"].half()
    tensors["clip_h"][0, 0] = float("inf")


REFUSED = {
    "other format": (say("format", "kohya"), "no EchoDistill adapter"),
    "no metadata": (lambda tensors, facts: facts.clear(), "no EchoDistill adapter"),
    "other version": (say("format_version", "2"), "format version '2'"),
    "no placeholder": (drop("placeholder"), "lacks the metadata placeholder"),
    "no fingerprint": (drop("base_fingerprint"), "lacks the metadata base_fingerprint"),
    "no role": (drop("role"), "lacks the metadata role"),
    "unknown role": (say("role", "critic"), "'critic'; expected student or teacher"),
    "unknown name": (put("diffusion_model.middle_block.1.alpha", torch.zeros(1)), "middle_block.1.alpha"),
    "foreign name": (put("text_model.weight", torch.zeros(1)), "text_model.weight"),
    "integers": (put(f"{KEY}.diff", torch.zeros(64, 32, dtype=torch.int32)), f"{KEY}.diff is of type I32"),
    "doubles": (put("clip_h", torch.zeros(1, 32, dtype=torch.float64)), "clip_h is of type F64"),
    "NaN": (nan, f"{KEY}.diff"),
    "infinity": (infinite, "clip_h"),
    "flat token": (put("clip_h", torch.zeros(32)), "clip_h has shape (32,)"),
    "too many rows": (put("clip_h", torch.zeros(2, 32)), "clip_h has shape (2, 32)"),
    "no token": (drop("clip_h"), "0 token tensors"),
    "two tokens": (put("clip_l", torch.zeros(1, 32)), "2 token tensors"),
    "up alone": (pair("lora_up"), "to_k has no matching pair"),
    "down alone": (pair("lora_down", shapes=((4, 32),)), "to_k.lora_down.weight has no lora_up"),
    "unequal ranks": (pair("lora_up", "lora_down", shapes=((64, 4), (3, 32))), "to_k has no matching pair"),
    "changed twice": (
        lambda t, f: t.update(
            {f"{KEY}.lora_up.weight": torch.zeros(64, 4), f"{KEY}.lora_down.weight": torch.ones(4, 32)}
        ),
        "attn2.to_k.weight twice",
    ),
}


def check_refusal(path, reason):
    with pytest.raises(InputError) as caught:
        read_adapter(path)
    message = str(caught.value)
    assert str(path) in message
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize("case", REFUSED)
def test_reader_names_the_file_and_the_flaw(family, tmp_path, case):
    change, reason = REFUSED[case]
    check_refusal(spoilt(family, tmp_path / "bad.safetensors", change), reason)


def test_the_file_that_the_refusals_spoil_is_good(family, tmp_path):
    path = spoilt(family, tmp_path / "good.safetensors", lambda tensors, facts: None)
    assert set(read_adapter(path).deltas) == set(KV)


def test_reader_refuses_a_missing_file_and_a_folder(tmp_path):
    check_refusal(tmp_path / "none.safetensors", "does not exist")
    check_refusal(tmp_path, "expected a .safetensors file")


def test_reader_refuses_a_truncated_file_at_every_kind_of_place(family, tmp_path):
    whole = spoilt(family, tmp_path / "a.safetensors", lambda tensors, facts: None).read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    for length in (0, 5, 8, 8 + header // 2, 8 + header, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        check_refusal(tmp_path / "cut.safetensors", "expected")


def test_reader_refuses_headers_that_lie(family, tmp_path):
    entry = {"dtype": "F32", "shape": [1, 32], "data_offsets": [0, 128]}
    facts = metadata(family)
    attacks = {
        "overlap": json.dumps({"__metadata__": facts, "clip_h": entry, f"{KEY}.diff": entry}),
        "hole": json.dumps({"__metadata__": facts, "clip_h": {**entry, "data_offsets": [4, 132]}}),
        "offset": json.dumps({"__metadata__": facts, "clip_h": {**entry, "data_offsets": [0, 2**40]}}),
        "twice": '{"__metadata__": %s, "clip_h": %s, "clip_h": %s}' % ((json.dumps(facts),) + (json.dumps(entry),) * 2),
        "deep": '{"a":' * 5000 + "1" + "}" * 5000,
    }
    for name, header in attacks.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(132))
        check_refusal(path, "expected")
    path = tmp_path / "long.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    check_refusal(path, "expected")
