"""A hub of a few small files, in place of huggingface_hub's calls: it writes the real layout of the hub's cache."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Repositories of `files`; `gated` ones refuse, and after `budget` bytes the network is gone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path, files: dict[str, dict[str, bytes]]) -> None:
        self.cache, self.files = cache, files
        self.gated: set[str] = set()
        self.offline = False
        self.budget = 10**9
        self.sent: list[str] = []  # files that were sent to the end
        self.wrong: set[str] = set()  # names whose content arrives damaged
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(huggingface_hub, "model_info", self.model_info)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        monkeypatch.setattr("omninft.hub.http_get", self.http_get)
        # Their default is bound when the function is made.
        real = huggingface_hub.try_to_load_from_cache
        for module in ("huggingface_hub", "omninft.models.files", "omninft.scorers.weights"):
            monkeypatch.setattr(
                f"{module}.try_to_load_from_cache",
                lambda repo, name, revision=None: real(repo, name, cache_dir=str(cache), revision=revision),
            )

    def model_info(self, repo: str, **_: Any) -> SimpleNamespace:
        self._reach(repo)
        siblings = [
            SimpleNamespace(
                rfilename=name,
                size=len(content),
                lfs=SimpleNamespace(sha256=hashlib.sha256(content).hexdigest()) if "safetensors" in name else None,
            )
            for name, content in self.files[repo].items()
        ]
        return SimpleNamespace(sha=COMMIT, gated="manual" if repo in self.gated else False, siblings=siblings)

    def download(self, repo: str, name: str, revision: str | None = None, local_dir: str | None = None) -> str:
        self._reach(repo)
        if repo in self.gated:
            raise _error(errors.GatedRepoError, "403 Client Error.\nCannot access gated repo")
        home = self.cache / f"models--{repo.replace('/', '--')}"
        path = Path(local_dir) / name if local_dir else home / "snapshots" / COMMIT / name
        if path.exists():
            return str(path)
        content = self.files[repo][name]
        self._send(len(content))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"?" + content[1:] if name in self.wrong else content)
        (home / "refs").mkdir(parents=True, exist_ok=True)
        (home / "refs" / (revision or "main")).write_text(COMMIT)
        self.sent.append(f"{repo}/{name}")
        return str(path)

    def http_get(self, url: str, opened: Any, resume_size: int = 0) -> None:
        host, _, name = url.rpartition("/")
        content = self.files[f"{host}/"][name][resume_size:]
        part = content[: self.budget]
        opened.write(part)
        opened.flush()
        self._send(len(content))
        self.sent.append(f"{url} from {resume_size}")

    def _reach(self, repo: str) -> None:
        if self.offline:
            raise ConnectionError("Name or service not known")
        if repo not in self.files:
            raise _error(errors.RepositoryNotFoundError, "404 Client Error.")

    def _send(self, size: int) -> None:
        if size > self.budget:
            self.budget = 0
            raise ConnectionError("the connection was lost")
        self.budget -= size


def _error(kind: Any, text: str) -> Exception:
    response = SimpleNamespace(headers={}, request=None, status_code=403)
    made: Exception = kind(text, response=response)
    return made


def small_pipeline() -> dict[str, bytes]:
    """Files of an LTX2Pipeline's repository, and others that lie there too."""
    import json

    weighty = ("transformer", "connectors", "vae", "audio_vae", "vocoder")
    names = (*weighty, "text_encoder", "tokenizer", "scheduler")
    index: dict[str, Any] = {"_class_name": "LTX2Pipeline", "processor": [None, None]}
    index |= {name: ["diffusers", "Anything"] for name in names}
    files = {
        "model_index.json": json.dumps(index).encode(),
        "README.md": b"read me",
        "ltx-2-19b.safetensors": b"x" * 99,
    }
    for name in weighty:
        files[f"{name}/config.json"] = b"{}"
        files[f"{name}/diffusion_pytorch_model.safetensors"] = f"weights of {name}".encode()
    files["text_encoder/config.json"] = b"{}"
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    files["text_encoder/model.safetensors.index.json"] = json.dumps(
        {"weight_map": dict(zip("ab", shards, strict=True))}
    ).encode()
    files |= {f"text_encoder/{shard}": shard.encode() for shard in shards}
    files["text_encoder/model.fp16.safetensors"] = b"another precision"
    files["tokenizer/tokenizer.json"] = b"{}"
    files["scheduler/scheduler_config.json"] = b"{}"
    return files
