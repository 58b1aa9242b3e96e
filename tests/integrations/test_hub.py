"""Push and pull through a local server that speaks the Hub's protocol. Clients run in child processes, because
huggingface_hub reads its endpoint when it is imported; the one that pulls never imports hfq."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import pytest


class Hub(ThreadingHTTPServer):
    """A hub of models in memory: ``files[repo_id][path]`` is the content, ``commits`` counts what was pushed."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[tuple[str, str]] = []
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def sha(self, repo: str) -> str:
        return hashlib.sha1(repr(sorted(self.files[repo].items())).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: object) -> None:
        """Silent."""

    def reply(self, status: int, content: object = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, files = unquote(urlparse(self.path).path), self.server.files
        if path == "/api/whoami-v2":
            return self.reply(200, {"name": "someone", "type": "user", "orgs": [], "auth": {}})
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            repo, name = match.groups()
            if repo not in files:
                return self.reply(404, {"error": "no repository"}, X_Error_Code="RepoNotFound")
            sha = self.server.sha(repo)
            if name not in files[repo]:
                return self.reply(404, {"error": "no file"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            etag = hashlib.sha256(files[repo][name]).hexdigest()
            return self.reply(200, files[repo][name], ETag=f'"{etag}"', X_Repo_Commit=sha)
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/.*)?)?", path)
        if not match or match[1] not in files:
            return self.reply(404, {"error": "no repository"}, X_Error_Code="RepoNotFound")
        held = files[match[1]]
        names = sorted(held)
        if match[2] == "tree":
            return self.reply(200, [{"type": "file", "path": n, "size": len(held[n]), "oid": "0"} for n in names])
        info = {"id": match[1], "sha": self.server.sha(match[1]), "siblings": [{"rfilename": n} for n in names],
                "private": False, "tags": [], "downloads": 0, "likes": 0}
        return self.reply(200, info)

    def do_POST(self) -> None:
        path, body = unquote(urlparse(self.path).path), self.body()
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            known = repo in self.server.files
            self.server.files.setdefault(repo, {})
            return self.reply(409 if known else 200, {"url": f"{self.server.endpoint}/{repo}", "id": repo})
        if path == "/api/validate-yaml":
            return self.reply(200, {"warnings": [], "errors": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", path):
            asked = json.loads(body)["files"]
            return self.reply(200, {"files": [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked
            ]})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            for line in lines:
                if line["key"] == "file":
                    self.server.files[match[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.server.commits.append((match[1], lines[0]["value"]["summary"]))
            url = f"{self.server.endpoint}/{match[1]}/commit/{self.server.sha(match[1])}"
            return self.reply(200, {"commitOid": self.server.sha(match[1]), "commitUrl": url, "success": True})
        return self.reply(404, {"error": f"no such route: {path}"})


@pytest.fixture(scope="module")
def hub():
    server = Hub()
    yield server
    server.shutdown()


@pytest.fixture
def client(hub, tmp_path):
    """Runs Python code in a child process that knows only the local hub; returns what it printed."""

    def run(code: str, *, fails: bool = False, **extra: str) -> str:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_anything", "HF_HOME": str(tmp_path / "home"),
                        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1", **extra}
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True,
                              text=True, cwd=tmp_path, check=False, timeout=300)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stderr if fails else done.stdout

    return run


MODEL = """
    import torch, hfq
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=0)).eval()
    hfq.quantize(model, hfq.RTNConfig(bits=4, group_size=32))
    ids = torch.arange(12)[None]
    print(model(ids).logits.double().sum().item())
"""
PULL = """
    import sys, torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("someone/{name}")
    print(model(torch.arange(12)[None]).logits.double().sum().item())
    print(type(model.model.layers[0].self_attn.q_proj).__name__, "hfq" in sys.modules)
"""


def pulled(client, name: str) -> str:
    total, kind = client(PULL.format(name=name)).strip().splitlines()[-2:]
    assert kind == "QLinear True"
    return total


def opened(content: bytes) -> tuple[dict, bytes]:
    """Header and tensors of a safetensors file; safetensors writes its metadata in no particular order."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def metadata(card: str) -> dict:
    import yaml

    return yaml.safe_load(card.split("---")[1])


def test_push_and_pull(hub, client):
    pushed = client(MODEL + """
    from hfq.integrations.results import Results
    results = Results(base_model="someone/base", license="mit", dataset="Some words", rows=[
        {"name": "float", "perplexity": 60.0}, {"name": "rtn", "perplexity": 63.25, "this": True}])
    print(hfq.push_to_hub(model, "rtn-model", results=results))
    """).strip().splitlines()
    assert pulled(client, "rtn-model") == pushed[0]
    files = hub.files["someone/rtn-model"]
    assert {"README.md", "config.json", "model.safetensors", "hfq_report.json", "hfq_results.json"} <= set(files)
    assert hub.commits.count(("someone/rtn-model", "Upload quantized model")) == 1
    assert pushed[1].startswith(hub.endpoint)
    card = files["README.md"].decode()
    data = metadata(card)
    assert data["base_model"] == "someone/base" and data["base_model_relation"] == "quantized"
    assert data["license"] == "mit" and data["library_name"] == "transformers"
    assert {"hfq", "quantized", "rtn", "4-bit", "llama"} <= set(data["tags"])
    result = data["model-index"][0]["results"][0]
    assert result["metrics"][0]["value"] == 63.25 and result["dataset"]["name"] == "Some words"
    assert 'from_pretrained("someone/rtn-model")' in card or 'from_pretrained("rtn-model")' in card
    assert "63.25" in card and "14 linear modules are packed" in card


def test_plain_push_has_the_card_too(hub, client):
    pushed = client(MODEL + """
    import copy
    assert copy.deepcopy(model).push_to_hub.model() is not model
    model.push_to_hub("plain-model")
    """).strip().splitlines()
    assert pulled(client, "plain-model") == pushed[0]
    data = metadata(hub.files["someone/plain-model"]["README.md"].decode())
    assert "hfq" in data["tags"] and "base_model" not in data and "model-index" not in data


def test_a_reloaded_model_pushes_the_same_tensors(hub, client):
    client(MODEL + """
    hfq.push_to_hub(model, "first")
    """)
    client("""
    import hfq
    from transformers import AutoModelForCausalLM
    hfq.push_to_hub(AutoModelForCausalLM.from_pretrained("someone/first"), "second")
    """)
    first, second = (opened(hub.files[f"someone/{name}"]["model.safetensors"]) for name in ("first", "second"))
    assert first == second
    assert hub.files["someone/first"]["hfq_report.json"] == hub.files["someone/second"]["hfq_report.json"]


def test_pulling_without_hfq_is_loud(hub, client):
    client(MODEL + """
    hfq.push_to_hub(model, "loud")
    """)
    error = client(PULL.format(name="loud"), fails=True, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert "shape" in error or "size mismatch" in error


def test_failures_are_one_clear_line(client):
    error = client(MODEL + """
    from hfq.integrations.hub import push_to_hub
    push_to_hub(torch.nn.Linear(2, 2), "x")
    """, fails=True)
    assert "is not packed by hfq" in error.strip().splitlines()[-1]
    error = client(MODEL + """
    hfq.push_to_hub(model, "x")
    """, fails=True, HF_ENDPOINT="http://127.0.0.1:9")
    assert "pushing to 'x' failed" in error.strip().splitlines()[-1]
