"""Adapters on models: LoadEchoAdapter against ComfyUI's own Load LoRA and embeddings, words, strengths, files."""

from __future__ import annotations

import json
import shutil

import graphs
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks import sample as benchmark
from echodistill_core.adapter.file import read_adapter

PROMPT = "photo of a <new1> mug on the beach"


@pytest.fixture(scope="module")
def saved(server, info, base):
    """The name of an adapter in output/loras, as the lists have it, after enough training to change pictures."""
    graph = graphs.training(info, iterations=30, preview_every=30)
    graph["save"] = graphs.save_adapter("mug", "both")
    outcome = server.run(graph)
    assert not outcome.error
    names = outcome.outputs["save"]["text"][0].split("\n")
    assert names == ["mug_00001_student.safetensors", "mug_00001_teacher.safetensors"]
    shutil.copy(base / "output" / "loras" / names[0], base / "models" / "embeddings" / "new1.safetensors")
    return names[0]


def loaded(info, name, **options):
    """A prompt with LoadEchoAdapter on a listed file, and a stock chain behind it."""
    adapter = graphs.load_adapter(info, ["models", 0], ["models", 2], adapter_name=name, **options)
    return {"models": graphs.MINIATURE, "adapter": adapter}


def sampled(server, info, base, graph, prompt, prefix, model="adapter", clip="adapter", clip_slot=1):
    chain = graphs.stock_chain([model, 0], [clip, clip_slot], prompt, 1, prefix=prefix, seed=4)
    outcome = server.run({**graph, **chain})
    assert not outcome.error
    return graphs.saved_latent(base, prefix)


def test_the_cost_of_applying_an_adapter_again_is_measured(server, saved, monkeypatch):
    """Every prompt runs Load Echo Adapter again; its time is part of the whole, not of One-Step Sample."""
    monkeypatch.setattr(benchmark, "REPEATS", 1)
    found = benchmark.comfyui_overhead(f"http://127.0.0.1:{server.port}", saved)
    assert 0 < found["node"] < found["whole"]


def test_it_equals_stock_load_lora_with_the_embedding(server, info, base, saved):
    """Every tensor of the file is mapped by Load LoRA, and `embedding:` reads the token from the same file."""
    mine = sampled(server, info, base, loaded(info, saved), PROMPT, "mine")
    graph = {
        "models": graphs.MINIATURE,
        "lora": graphs.node("LoraLoaderModelOnly", model=["models", 0], lora_name=saved, strength_model=1.0),
    }
    theirs = sampled(
        server, info, base, graph, "photo of a embedding:new1 mug on the beach", "theirs", "lora", "models", 2
    )
    plain = sampled(server, info, base, graph, "photo of a mug on the beach", "plain", "models", "models", 2)
    assert torch.equal(mine, theirs)
    assert float((mine - plain).abs().max()) > 0.5
    log = server.text()
    assert "lora key not loaded" not in log.replace("lora key not loaded: clip_h", "")
    weights = [name for name in load_file(base / "output" / "loras" / saved) if name != "clip_h"]
    assert len(weights) == 2 * 4  # keys and values of four cross-attentions


@pytest.mark.parametrize(
    ("prompt", "same_as"),
    [
        ("photo of a <new1>, mug", "photo of a embedding:new1 , mug"),
        ("a photo,<new1> mug", "a photo, embedding:new1 mug"),
        ("(<new1>:1.3) mug", "( embedding:new1:1.3) mug"),
        ("<NEW1> mug", " embedding:new1 mug"),
    ],
)
def test_the_placeholder_works_wherever_a_word_does(server, info, base, saved, prompt, same_as):
    """Reference: ComfyUI's own `embedding:` with the same embeddings."""
    mine = sampled(server, info, base, loaded(info, saved), prompt, "word")
    graph = loaded(info, saved)
    theirs = sampled(server, info, base, graph, same_as, "embedded", "adapter", "models", 2)
    assert torch.allclose(mine, theirs, atol=1e-4)


def test_strength_zero_is_the_model_as_it_was(server, info, base, saved):
    graph = loaded(info, saved, strength_model=0.0)
    off = sampled(server, info, base, graph, "photo of a mug", "off")
    plain = sampled(server, info, base, graph, "photo of a mug", "plain0", "models", "models", 2)
    assert torch.equal(off, plain)


def test_token_strength_zero_is_the_class_noun(server, info, base, saved):
    """The noun is a single token, so its mean embedding is that token's embedding."""
    graph = loaded(info, saved, strength_model=0.0, strength_token=0.0)
    noun = sampled(server, info, base, graph, "photo of a <new1>", "noun")
    plain = sampled(server, info, base, graph, "photo of a mug", "nounplain", "models", "models", 2)
    assert torch.allclose(noun, plain, atol=1e-5)


def test_several_adapters_in_a_row(server, info, base, saved):
    """The second keeps the first's word; its weights come on top of the first's."""
    graph = graphs.training(info, "cat", "cat", iterations=4, seed=2)
    graph["concept"]["inputs"]["placeholder"] = "<cat1>"
    first = loaded(info, saved)["adapter"]
    graph["adapter"] = first
    graph["second"] = graphs.load_adapter(info, ["adapter", 0], ["adapter", 1], from_training=["train", 1])
    both = sampled(server, info, base, graph, "a <new1> mug and a <cat1> cat", "both", "second", "second")
    one = sampled(server, info, base, graph, "a <new1> mug and a <cat1> cat", "one", "adapter", "adapter")
    assert not torch.equal(both, one)
    again = loaded(info, saved)
    again["second"] = graphs.load_adapter(info, ["adapter", 0], ["adapter", 1], adapter_name=saved)
    chain = graphs.stock_chain(["second", 0], ["second", 1], PROMPT, 1, prefix="twice")
    assert "placeholder <new1>" in server.run({**again, **chain}).error


def test_the_saved_file_is_the_adapter_and_a_counter_keeps_the_earlier_one(server, info, base, saved):
    first = read_adapter(base / "output" / "loras" / saved)
    assert (first.placeholder, first.class_noun, first.role) == ("<new1>", "mug", "student")
    graph = graphs.training(info, iterations=30, preview_every=30)
    graph["save"] = graphs.save_adapter("mug")
    outcome = server.run(graph)
    assert outcome.outputs["save"]["text"] == ["mug_00002_student.safetensors"]


def test_info_tells_what_is_in_a_file(server, info, saved):
    values = {**graphs.unset(info, "EchoAdapterInfo"), "adapter_name": saved}
    text = server.run({"info": graphs.node("EchoAdapterInfo", **values)}).outputs["info"]["text"][0]
    facts = dict(line.strip().split(None, 1) for line in text.splitlines() if len(line.split(None, 1)) == 2)
    assert facts["placeholder"] == "<new1>"
    assert facts["iterations"] == "30"
    assert json.loads(facts["seed"]) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"role": "teacher"}, "belongs to the teacher"),
        ({"base_fingerprint": "0" * 16}, "trained on another base model"),
        ({"text_fingerprint": "0" * 16}, "trained on another base model"),
    ],
)
def test_an_adapter_of_another_base_is_refused_and_named(server, info, base, saved, change, words):
    path = base / "output" / "loras" / saved
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), **change}
    name = f"other-{next(iter(change))}.safetensors"
    save_file(load_file(path), base / "output" / "loras" / name, metadata)
    graph = loaded(info, name)
    chain = graphs.stock_chain(["adapter", 0], ["adapter", 1], PROMPT, 1, prefix="no")
    error = server.run({**graph, **chain}).error
    if "role" in change:
        # The role in the file is not checked against the model; only the fingerprints are.
        assert not error
    else:
        assert words in error
        assert "any_base" in error
        graph["adapter"]["inputs"]["any_base"] = True
        assert not server.run({**graph, **chain}).error
