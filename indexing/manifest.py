"""What an index remembers about itself: ``manifest.json``, written last and atomically."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import BadIndex, StorageError, UsageError
from ..core.types import Grid
from .encoder import EncoderSpec
from .pooling import check_pool
from .shards import PATCH_CODES, RowFormat

SCHEMA_VERSION = 1
FILE_NAME = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """The choices an index was made with; they never change in its life."""

    encoder: EncoderSpec
    patch_codes: str = "int8"
    patch_pool: str = "1"
    metric: str = "cosine"
    milvus_uri: str | None = None  # None: Milvus Lite in the index folder
    collection: str = "images"
    index_type: str = "HNSW"
    index_params: dict[str, Any] | None = None  # None: good ones for the type
    partition_by: str = "none"  # or "folder"
    shards: str | None = None  # an fsspec URL or a folder; None: in the index folder
    schema_version: int = SCHEMA_VERSION

    @property
    def grid(self) -> Grid:
        """How an image's patches lie."""
        return self.encoder.grid

    @property
    def row_format(self) -> RowFormat:
        """The bytes of an image in the shards."""
        encoder = self.encoder
        widths = encoder.embed_dim, encoder.patch_dim
        return RowFormat(*widths, encoder.grid, self.patch_codes, self.patch_pool)

    def write(self, folder: Path) -> None:
        """Write the manifest so that a reader sees the old one or the new one, never a part.

        Raises:
            StorageError: the folder cannot be written to.
        """
        fields = {
            "schema_version": self.schema_version,
            "encoder": self.encoder.to_dict(),
            "patch_codes": self.patch_codes,
            "patch_pool": self.patch_pool,
            "metric": self.metric,
            "milvus_uri": self.milvus_uri,
            "collection": self.collection,
            "index_type": self.index_type,
            "index_params": self.index_params,
            "partition_by": self.partition_by,
            "shards": self.shards,
        }
        path = folder / FILE_NAME
        part = path.with_suffix(".part")
        try:
            with part.open("w", encoding="utf-8") as file:
                json.dump(fields, file, indent=2)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}") from error

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of an index.

        Raises:
            BadIndex: there is none, it is damaged, or a newer mmsearch wrote it.
        """
        path = folder / FILE_NAME
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BadIndex(
                f"there is no index in {folder}",
                "Make one with `mmsearch index PATH...`, or name another with --index DIR.",
            ) from error
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise _damaged(path, str(error)) from error
        try:
            version = fields["schema_version"]
            if version > SCHEMA_VERSION:
                raise BadIndex(
                    f"the index in {folder} has format {version}; this mmsearch knows formats "
                    f"up to {SCHEMA_VERSION}",
                    "Upgrade: pip install --upgrade mmsearch",
                )
            manifest = cls(
                encoder=EncoderSpec.from_dict(fields["encoder"]),
                patch_codes=fields["patch_codes"],
                patch_pool=fields.get("patch_pool", "1"),
                metric=fields["metric"],
                milvus_uri=fields["milvus_uri"],
                collection=fields["collection"],
                index_type=fields["index_type"],
                index_params=fields.get("index_params"),
                partition_by=fields.get("partition_by", "none"),
                shards=fields.get("shards"),
                schema_version=version,
            )
            check_pool(manifest.patch_pool, manifest.grid)
        except (KeyError, TypeError, AttributeError) as error:
            raise _damaged(path, f"{type(error).__name__} {error}") from error
        except UsageError as error:
            raise _damaged(path, f"unknown patch_pool {fields['patch_pool']!r}") from error
        if manifest.patch_codes not in PATCH_CODES:
            raise _damaged(path, f"unknown patch_codes {manifest.patch_codes!r}")
        return manifest


def _damaged(path: Path, reason: str) -> BadIndex:
    return BadIndex(
        f"{path} is damaged: {reason}",
        "Restore it from a backup, or rebuild: mmsearch index --rebuild PATH...",
    )
