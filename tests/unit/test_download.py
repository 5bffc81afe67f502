"""Downloads from a local server with the part of the hub's protocol that they need."""

import dataclasses
import errno
import socket
import time
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import (
    BIG,
    PIPELINE_JSON,
    SD_TURBO_NEEDED,
    WEIGHTS,
    Hub,
    dead_url,
    send,
)
from huggingface_hub import constants, hf_hub_download
from registries import replace_entry

from echodistill_core.errors import InputError, StorageError
from echodistill_core.models import download as downloads
from echodistill_core.models.download import PlannedFile, describe, download, plan
from echodistill_core.models.hub import BUNDLES, HUB, cached_folder, expand


@pytest.fixture(autouse=True)
def nothing_but_this_machine(monkeypatch, tmp_path):
    """The client with its defaults, online; a connection to another machine fails the test."""
    outside = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def check(host):
        if host != "127.0.0.1":
            outside.append(host)
            raise ConnectionRefusedError("tests stay on this machine")

    def guarded_connect(self, address):
        check(address[0])
        return connect(self, address)

    def guarded_look_up(host, *rest, **named):
        check(host)
        return look_up(host, *rest, **named)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_look_up)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # huggingface_hub reads the environment once, when it is first imported.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()
    assert not outside


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def test_names_resolve_to_repositories_once_each():
    assert expand(["sd-turbo"]) == ["sd-turbo"]
    assert expand(["sd-turbo-family"]) == ["sd2.1", "sd-turbo", "dino", "dinov2", "clip"]
    assert expand(["backbones", "sd-turbo-base-family", "dino"]) == ["dino", "dinov2", "clip", "sd2.1-base", "sd-turbo"]


def test_no_name_means_two_things_and_bundles_name_only_repositories():
    assert not BUNDLES.keys() & HUB.keys()
    for members in BUNDLES.values():
        assert set(members) <= HUB.keys()


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(InputError, match=r"'sd-trubo'.*did you mean sd-turbo\?"):
        expand(["sd-trubo"])
    with pytest.raises(InputError, match=r"did you mean backbones\?"):
        expand(["backbone"])
    with pytest.raises(InputError, match=r"did you mean dinov2\?"):
        cached_folder("dinov3")
    with pytest.raises(InputError, match="sd-turbo-family"):
        expand([])


def test_no_entry_can_take_a_pickle():
    for entry in HUB.values():
        for alternatives in entry.files:
            for pattern in alternatives.split("|"):
                assert pattern.endswith((".safetensors", ".json", ".txt"))


def test_plan_names_needed_files_with_the_sizes_served_and_fetches_nothing(hub, cache):
    planned = plan(["sd-turbo"], endpoint=hub.url, cache_dir=cache)
    served = hub.repos["stabilityai/sd-turbo", "main"]
    assert {f.file: f.size_bytes for f in planned} == {path: len(served[path]) for path in SD_TURBO_NEEDED}
    assert len(planned) == len(SD_TURBO_NEEDED)
    assert {(f.name, f.repo, f.cached) for f in planned} == {("sd-turbo", "stabilityai/sd-turbo", False)}
    assert {f.licence for f in planned} == {"Stability AI Community License"}
    assert [path for _, path, _ in hub.requests] == ["api/models/stabilityai/sd-turbo/revision/main"]
    assert not cache.exists()


def test_describe_states_size_licence_total_and_what_is_here():
    half = PlannedFile("sd-turbo", "stabilityai/sd-turbo", "unet/a.safetensors", 1_732_049_000, "Some Licence", False)
    rest = PlannedFile("sd-turbo", "stabilityai/sd-turbo", "unet/config.json", 1_870, "Some Licence", True)
    lines = describe([half, rest]).splitlines()
    assert lines[1].split() == ["1732.0", "stabilityai/sd-turbo/unet/a.safetensors", "Some", "Licence"]
    assert lines[2].split()[:2] == ["<0.1", "stabilityai/sd-turbo/unet/config.json"]
    assert lines[2].endswith("(already here)")
    assert lines[3] == "2 files, 1732.1 MB: <0.1 MB already here, 1732.0 MB to download."
    assert "derivative" in lines[4]


def test_downloaded_bytes_are_those_served_and_a_second_plan_finds_them(hub, cache):
    assert cached_folder("sd-turbo", cache) is None
    folders = download(plan(["sd-turbo"], hub.url, cache), hub.url, cache)
    folder = folders["sd-turbo"]
    got = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    served = hub.repos["stabilityai/sd-turbo", "main"]
    assert got == {path: served[path] for path in SD_TURBO_NEEDED}
    asked = len(hub.requests)
    assert cached_folder("sd-turbo", cache) == folder
    assert len(hub.requests) == asked

    hub.requests.clear()
    again = plan(["sd-turbo"], hub.url, cache)
    assert all(f.cached for f in again)
    assert download(again, hub.url, cache) == folders
    assert hub.transfers() == []


def test_weights_come_from_the_revision_that_has_them_as_safetensors(hub, cache):
    folder = download(plan(["dino"], hub.url, cache), hub.url, cache)["dino"]
    served = hub.repos["facebook/dino-vits16", "refs/pr/1"]
    assert (folder / "model.safetensors").read_bytes() == served["model.safetensors"]
    assert not (folder / "pytorch_model.bin").exists()
    assert cached_folder("dino", cache) == folder


def test_full_precision_is_taken_where_there_is_no_half_or_it_is_here_already(hub, cache):
    files = hub.repos["stabilityai/sd-turbo", "main"]
    half = {path: files.pop(path) for path in list(files) if ".fp16." in path}
    full = {f"{w}.safetensors" for w in WEIGHTS}
    planned = plan(["sd-turbo"], hub.url, cache)
    assert {f.file for f in planned} == {*PIPELINE_JSON, *full}
    folder = download(planned, hub.url, cache)["sd-turbo"]
    assert cached_folder("sd-turbo", cache) == folder

    files.update(half)  # A new commit adds half precision.
    assert {f.file for f in plan(["sd-turbo"], hub.url, cache)} == {*PIPELINE_JSON, *full}
    fresh = {f.file for f in plan(["sd-turbo"], hub.url, cache.with_name("other"))}
    assert fresh == SD_TURBO_NEEDED


def test_a_partial_snapshot_is_no_snapshot(hub, cache):
    planned = plan(["sd-turbo"], hub.url, cache)
    last = next(f for f in planned if f.file == "unet/diffusion_pytorch_model.fp16.safetensors")
    for f in planned:
        if f is not last:
            hf_hub_download(f.repo, f.file, endpoint=hub.url, cache_dir=cache)
    assert cached_folder("sd-turbo", cache) is None
    assert [f for f in plan(["sd-turbo"], hub.url, cache) if not f.cached] == [last]
    folder = download(plan(["sd-turbo"], hub.url, cache), hub.url, cache)["sd-turbo"]
    assert cached_folder("sd-turbo", cache) == folder
    (folder / last.file).resolve().unlink()  # Its link stays behind where the cache uses links.
    assert cached_folder("sd-turbo", cache) is None


def test_a_broken_transfer_resumes_where_it_stopped(hub, cache, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14)
    planned = plan(["hyper-sd15"], hub.url, cache)
    hub.requests.clear()
    hub.break_once.add(BIG)
    folder = download(planned, hub.url, cache)["hyper-sd15"]
    ranges = [r for method, _, r in hub.requests if method == "GET"]
    assert len(ranges) == 2
    assert ranges[0] is None
    resumed_at = int(ranges[1].removeprefix("bytes=").removesuffix("-"))
    assert 100_000 < resumed_at <= 150_000
    assert (folder / BIG).read_bytes() == hub.repos["ByteDance/Hyper-SD", "main"][BIG]


def test_a_repository_with_only_a_pickle_is_refused_with_a_way_out(hub, cache, monkeypatch):
    replace_entry(monkeypatch, HUB, "dino", dataclasses.replace(HUB["dino"], revision="main"))
    with pytest.raises(InputError, match=r"facebook/dino-vits16.*\(pytorch_model\.bin\)"):
        plan(["dino"], hub.url, cache)
    assert hub.transfers() == []


def test_a_missing_file_repository_or_revision_is_named(hub, cache, monkeypatch):
    del hub.repos["stabilityai/sd-turbo", "main"]["tokenizer/merges.txt"]
    with pytest.raises(InputError, match=r"stabilityai/sd-turbo.*tokenizer/merges\.txt"):
        plan(["sd-turbo"], hub.url, cache)
    with pytest.raises(InputError, match=r"127\.0\.0\.1.*no repository h94/IP-Adapter"):
        plan(["clip"], hub.url, cache)
    replace_entry(monkeypatch, HUB, "dino", dataclasses.replace(HUB["dino"], revision="refs/pr/77"))
    with pytest.raises(InputError, match=r"facebook/dino-vits16.* revision"):
        plan(["dino"], hub.url, cache)


def one_sentence(message):
    return "\n" not in message and message.endswith(".")


def test_a_dead_or_silent_host_is_reported(cache, monkeypatch):
    url = dead_url()
    with pytest.raises(InputError, match=r"sd-turbo.*HF_ENDPOINT or --endpoint") as caught:
        plan(["sd-turbo"], url, cache)
    assert url in str(caught.value)
    assert one_sentence(str(caught.value))
    monkeypatch.setattr(downloads, "TIMEOUT_S", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(InputError, match="stabilityai/sd-turbo"):
            plan(["sd-turbo"], f"http://127.0.0.1:{silent.getsockname()[1]}", cache)


def test_a_hub_that_fails_between_plan_and_download_is_reported(hub, cache, monkeypatch):
    planned = plan(["hyper-sd15"], hub.url, cache)
    hub.gone = True
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # The client's patience, some 20 s.
    with pytest.raises(InputError, match=r"ByteDance/Hyper-SD.*503") as caught:
        download(planned, hub.url, cache)
    assert one_sentence(str(caught.value))


def test_an_endpoint_that_is_no_url_and_one_that_is_no_hub_are_refused(hub, cache, monkeypatch):
    for wrong in ("hf-mirror.com", "ftp://hf-mirror.com", "https://", "http://[1"):
        with pytest.raises(InputError, match="endpoint"):
            plan(["sd-turbo"], wrong, cache)
    monkeypatch.setattr(hub, "answer", lambda request: send(request, 200, b"<html>log in to the wifi</html>"))
    with pytest.raises(InputError, match="stabilityai/sd-turbo"):
        plan(["sd-turbo"], hub.url, cache)


def test_offline_mode_is_named(hub, cache, monkeypatch):
    planned = plan(["hyper-sd15"], hub.url, cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        plan(["hyper-sd15"], hub.url, cache)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        download(planned, hub.url, cache)


def test_too_small_a_disk_is_found_before_the_first_byte(hub, cache):
    planned = plan(["hyper-sd15"], hub.url, cache)
    huge = [dataclasses.replace(f, size_bytes=10**18) for f in planned]
    with pytest.raises(StorageError, match=r"needs 1000000000000\.0 MB.*HF_HOME"):
        download(huge, hub.url, cache)
    assert hub.transfers() == []


def test_a_disk_that_fills_up_leaves_nothing_half_written(hub, cache, monkeypatch):
    planned = plan(["hyper-sd15"], hub.url, cache)

    def full(url, temp_file, **rest):
        temp_file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(StorageError, match=r"ByteDance/Hyper-SD.*No space left") as caught:
        download(planned, hub.url, cache)
    assert str(cache) in str(caught.value)
    assert one_sentence(str(caught.value))
    assert not [p for p in cache.rglob("*") if p.is_file() and p.read_bytes() == b"half"]
    assert cached_folder("hyper-sd15", cache) is None


def test_a_cache_that_cannot_be_written_is_a_storage_error(hub, tmp_path):
    blocked = tmp_path / "a-file"
    blocked.write_text("not a folder")
    planned = plan(["hyper-sd15"], hub.url, tmp_path / "cache")
    with pytest.raises(StorageError, match="a-file"):
        download(planned, hub.url, blocked)


def test_a_repository_that_changes_meanwhile_is_not_passed_off_as_complete(hub, cache, monkeypatch):
    planned = plan(["dino"], hub.url, cache)

    def fetch_then_change(*args, **kwargs):
        path = hf_hub_download(*args, **kwargs)
        hub.repos["facebook/dino-vits16", "refs/pr/1"]["README.md"] = Path(path).name.encode()
        return path

    monkeypatch.setattr(downloads, "hf_hub_download", fetch_then_change)
    with pytest.raises(InputError, match="facebook/dino-vits16"):
        download(planned, hub.url, cache)


def test_the_environments_mirror_is_used_where_no_endpoint_is_given(hub, cache, monkeypatch):
    # What HF_ENDPOINT sets when huggingface_hub is first imported.
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    folder = download(plan(["hyper-sd15"], cache_dir=cache), cache_dir=cache)["hyper-sd15"]
    assert (folder / BIG).read_bytes() == hub.repos["ByteDance/Hyper-SD", "main"][BIG]
