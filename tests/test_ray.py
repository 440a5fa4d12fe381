"""Embedding on a local Ray of two workers gives the index that one process makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mmsearch.core.errors import UsageError
from mmsearch.indexing import check
from mmsearch.indexing.encoder import load_encoder
from mmsearch.indexing.index import Events, ImageIndex
from mmsearch.indexing.ray_embed import RayCluster

from .milvus_server import MilvusServer
from .test_index import make_pictures

pytest.importorskip("ray", reason="needs mmsearch[ray]")
# Ray leaves sockets and processes to the garbage collector and warns of its own changes to come.
pytestmark = pytest.mark.filterwarnings("ignore")

TWO = RayCluster("local", workers=2, device="cpu", precision="fp32")


@pytest.mark.server
def test_two_workers_make_the_same_index(
    tmp_path: Path,
    tiny_model_dir: Path,
    milvus_server: MilvusServer,
    monkeypatch: pytest.MonkeyPatch,
):
    import ray

    photos = tmp_path / "photos"
    make_pictures(photos, 30)
    (photos / "copy.png").write_bytes((photos / "0003.png").read_bytes())
    (photos / "broken.jpg").write_bytes(b"no picture")
    encoder = load_encoder(f"local-dir:{tiny_model_dir}", device="cpu", precision="fp32")
    with ImageIndex.create(tmp_path / "local", encoder.spec) as local:
        local.add([photos], encoder)
        ids, expected = local.pooled()
        patches = local.patches(ids.tolist()).values()

    monkeypatch.setenv("RAY_worker_niceness", "0")  # Ray would let all else go first
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "120")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        server = {"milvus_uri": milvus_server.uri, "milvus_token": milvus_server.token}
        with ImageIndex.create(tmp_path / "index", encoder.spec, **server) as index:
            failed: list[str] = []
            events = Events(failed=lambda path, reason: failed.append(Path(path).name))
            report = index.add([photos], encoder, cluster=TWO, batch_size=4, on_event=events)
            assert (report.added, report.failed, len(index)) == (31, 1, 31)
            assert failed == ["broken.jpg"]
            found, pooled = index.pooled()
            np.testing.assert_array_equal(found, ids)
            np.testing.assert_allclose(pooled, expected, atol=1e-5)
            ours = index.patches(ids.tolist()).values()
            np.testing.assert_allclose(ours, patches, atol=0.02 * float(patches.abs().max()))
            assert check.check(index) == []

            # Cut off after a batch, as if killed before Milvus heard of it: the next run mends it.
            make_pictures(photos, 12, 500)
            lost: list[int] = []
            upsert = index._vectors.upsert

            def fail(entries, vectors):
                if lost:
                    raise OSError("gone")
                lost.append(1)
                upsert(entries, vectors)

            index._vectors.upsert = fail
            with pytest.raises(OSError, match="gone"):
                index.add([photos], encoder, cluster=TWO, batch_size=4)
            index._vectors.upsert = upsert
            report = index.add([photos], encoder, cluster=TWO, batch_size=4)
            assert len(index) == 43
            assert 0 < report.added <= 12
            assert check.check(index) == []
    finally:
        ray.shutdown()


def test_an_address_without_ray_is_named(tmp_path: Path, tiny_model_dir: Path):
    make_pictures(tmp_path / "photos", 1)
    encoder = load_encoder(f"local-dir:{tiny_model_dir}", device="cpu", precision="fp32")
    with (
        ImageIndex.create(tmp_path / "index", encoder.spec) as index,
        pytest.raises(UsageError, match="cannot reach Ray"),
    ):
        index.add([tmp_path / "photos"], encoder, cluster=RayCluster("auto"))
