"""A local HTTP server with the Hugging Face hub's API, for downloads without network."""

import hashlib
import json
import random
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

PIPELINE_JSON = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
)
WEIGHTS = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")
SD_TURBO_NEEDED = {*PIPELINE_JSON, *(f"{w}.fp16.safetensors" for w in WEIGHTS)}
SD_TURBO_UNNEEDED = {
    *(f"{w}.safetensors" for w in WEIGHTS),
    "sd_turbo.safetensors",
    "README.md",
    "LICENSE.md",
    "output_tile.jpg",
}
PICKLED = ("config.json", "preprocessor_config.json", "pytorch_model.bin")
BIG = "Hyper-SD15-1step-lora.safetensors"


def content(path, size):
    return random.Random(path).randbytes(size)


def tiny(paths, size=700):
    """Files of different, known sizes."""
    return {path: content(path, size + 13 * i) for i, path in enumerate(sorted(paths))}


class Hub:
    """Repositories by (name, revision), a log of requests, and a switch that breaks a transfer in its middle."""

    def __init__(self):
        self.repos = {
            ("stabilityai/sd-turbo", "main"): tiny(SD_TURBO_NEEDED | SD_TURBO_UNNEEDED),
            ("facebook/dino-vits16", "main"): tiny(PICKLED),
            ("facebook/dino-vits16", "refs/pr/1"): tiny({*PICKLED, "model.safetensors"}),
            ("ByteDance/Hyper-SD", "main"): {BIG: content(BIG, 300_000), "README.md": b"words"},
        }
        self.requests = []  # (method, path, Range header)
        self.break_once = set()  # files of which the next GET stops halfway
        self.gone = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_HEAD(self):
                hub.answer(self)

            def do_GET(self):
                hub.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def commit(self, repo, revision):
        listing = "".join(f"{path}{data!r}" for path, data in sorted(self.repos[repo, revision].items()))
        return hashlib.sha1(f"{repo}{revision}{listing}".encode()).hexdigest()

    def transfers(self):
        return [path for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]

    def answer(self, request):
        url = urlsplit(request.path)
        path = unquote(url.path).strip("/")
        self.requests.append((request.command, path, request.headers.get("Range")))
        if self.gone:
            return send(request, 503, b"down for the night")
        for (repo, revision), files in self.repos.items():
            if path == f"api/models/{repo}/revision/{revision}":
                blobs = "blobs" in url.query
                siblings = [{"rfilename": f, **({"size": len(d)} if blobs else {})} for f, d in files.items()]
                info = {"id": repo, "sha": self.commit(repo, revision), "siblings": siblings, "tags": []}
                return send(request, 200, json.dumps(info).encode(), {"Content-Type": "application/json"})
            file = path.removeprefix(f"{repo}/resolve/{revision}/")
            if file != path and file in files:
                return self.send_file(request, file, files[file], self.commit(repo, revision))
        known = any(repo in path for repo, _ in self.repos)
        return send(request, 404, b"", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})

    def send_file(self, request, file, data, commit):
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
        }
        status, part = 200, data
        if wanted := request.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            status, part = 206, data[start:]
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        broken = request.command == "GET" and file in self.break_once
        self.break_once.discard(file) if broken else None
        send(request, status, part, headers, stop_after=len(part) // 2 if broken else None)


def send(request, status, body, headers=None, stop_after=None):
    request.send_response(status)
    for key, value in {**(headers or {}), "Content-Length": len(body)}.items():
        request.send_header(key, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body[:stop_after])
    if stop_after is not None:
        request.close_connection = True


def dead_url():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"
