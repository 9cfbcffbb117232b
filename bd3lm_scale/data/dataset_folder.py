"""The manifest of a dataset folder, wherever it lies: with the index beside it, or of an earlier version."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

from bd3lm_scale.config.schema import DataConfig
from bd3lm_scale.data.files import open_cache
from bd3lm_scale.data.index import convert, open_converted, open_index
from bd3lm_scale.data.shard_list import ShardList, plain_name
from bd3lm_scale.data.shards import MANIFEST, Manifest, manifest_from_json, sha256_of, whole
from bd3lm_scale.data.storage import DamagedError, is_remote, join, read_text, retrying, transfer

_PARSED_BYTES = 1 << 22
"""Manifests of version 1 that are longer are turned into an index, once per node."""
_VERSION_1 = re.compile(r'\{\s*"format"\s*:\s*"[^"]*"\s*,\s*"version"\s*:\s*1\b')


def inside(folder: str, name: str) -> str:
    """The address of `name` in a dataset folder, local or remote."""
    return join(folder, name) if is_remote(folder) else f"{folder.rstrip('/')}/{name}"


def read_manifest(config: DataConfig, path: str, split: str) -> Manifest:
    """The manifest of one split of a dataset folder, without what it says of its preparation.

    Raises:
        ValueError: there is none that can be used.
    """
    address = inside(path, f"{split}/{MANIFEST}")
    try:
        manifest = _read(config, address, path, split)
    except (OSError, UnicodeDecodeError, DamagedError) as problem:
        raise ValueError(
            f"data.path ({path}): cannot read {split}/{MANIFEST} ({problem}); give a folder written by "
            "tools/prepare_data.py (make demo-data builds data/demo)"
        ) from problem
    if manifest.split != split:
        raise ValueError(f"{address}: describes the split {manifest.split!r}; put the right manifest back")
    return replace(manifest, preparation={})


def _read(config: DataConfig, address: str, path: str, split: str) -> Manifest:
    if not is_remote(address) and Path(address).stat().st_size > _PARSED_BYTES and _is_old(_beginning(address)):
        return _converted(config, address, _file_digest(Path(address)))
    text = read_text(address, config.retries, config.timeout_seconds)
    if len(text) > _PARSED_BYTES and _is_old(text[:_PARSED_BYTES]):
        return _converted(config, address, hashlib.sha256(text.encode()).hexdigest(), text)

    def index(manifest: Manifest, raw: dict) -> ShardList:
        name = plain_name(raw["index"].get("file"))
        if not is_remote(path):
            return open_index(Path(inside(path, f"{split}/{name}")), manifest, raw)
        return _fetched(config, inside(path, f"{split}/{name}"), manifest, raw)

    return manifest_from_json(text, address, index)


def _is_old(text: str) -> bool:
    return bool(_VERSION_1.match(text))


def _beginning(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read(1 << 12)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _converted(config: DataConfig, address: str, digest: str, text: str | None = None) -> Manifest:
    """A long manifest of version 1 through the node's cache, under the SHA-256 of its content."""
    cache, key = open_cache(config), f"{digest[:40]}.index"

    def build(part: Path) -> None:
        manifest = manifest_from_json(text or Path(address).read_text(encoding="utf-8"), address)
        convert(manifest, digest, part)

    def action() -> Manifest:
        found = cache.get(key, len(text) if text else Path(address).stat().st_size, build)
        assert found is not None
        return open_converted(found, digest, address)

    return retrying(action, 1, lambda problem: cache.drop(key) is None)


def _fetched(config: DataConfig, address: str, manifest: Manifest, raw: dict) -> ShardList:
    """The index of a remote folder through the node's cache, under its digest."""
    cache, key = open_cache(config), f"{sha256_of(raw, 'rows_sha256')[:40]}.index"
    size = whole(raw["index"], "size", least=1)

    def fetch(part: Path) -> None:
        transfer(address, part, config.timeout_seconds, size)
        try:
            open_index(part, manifest, raw)
        except ValueError as problem:
            part.unlink()
            raise DamagedError(f"{address}: {problem}") from problem

    def action() -> ShardList:
        found = cache.get(key, size, fetch)
        assert found is not None
        try:
            return open_index(found, manifest, raw)
        except ValueError as problem:
            raise DamagedError(f"{found}: {problem}") from problem

    return retrying(action, config.retries, lambda problem: cache.drop(key) is None)
