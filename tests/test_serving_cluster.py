"""Several services on one cluster of three Ray nodes, each a process on loopback, of which one is killed under load."""

import asyncio
import socket
import subprocess
import sys

import pytest

pytest.importorskip("ray.serve", reason="Ray Serve, of the extra serve, is not installed")
aiohttp = pytest.importorskip("aiohttp")
psutil = pytest.importorskip("psutil")
from test_serving_app import load_test, served  # noqa: F401

from efft_kernels.serving import start

NODES = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster()
nodes = [cluster.add_node(num_cpus=1, include_dashboard=False, object_store_memory=80 * 2**20) for _ in range(3)]
print(cluster.address, *[node.all_processes["raylet"][0].process.pid for node in nodes], flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.mark.slow
def test_services_share_a_cluster_and_outlive_a_node(served, tmp_path, monkeypatch):  # noqa: F811
    settings, files, want = served
    token = {"AUTH_MODE": "token", "AUTH_TOKEN": "0123456789abcdef" * 4}
    for name, value in {**token, "USAGE_STATS_ENABLED": "0", "worker_niceness": "0"}.items():
        monkeypatch.setenv(f"RAY_{name}", value)
    monkeypatch.setattr(load_test, "PATIENCE", 120.0)
    port, services, killed = start.free_port("127.0.0.1", 0), [], []

    def serve(name, *more, replicas=1):
        made, more = settings.model_copy(update={"replicas": replicas}), (f"--address={address}", "--drain-s=0", *more)
        services.append(load_test.Server(made, port, tmp_path / name, *more))
        return services[-1]

    def kill_a_node(rng):
        """One with a replica of the first service, with all of its processes, as a machine that is lost."""
        for node in nodes[1:]:
            lost = [node, *node.children(recursive=True)]
            if not killed and any("ray::ServeReplica:efft" in " ".join(one.cmdline()) for one in lost):
                killed.extend(one.pid for one in lost if one.kill() is None)

    async def scenario():
        first = serve("first", replicas=2)
        first.kill = kill_a_node
        with socket.socket() as client:
            while client.connect_ex(("127.0.0.1", port)):
                assert first.process.poll() is None, first.log.read_text()
                await asyncio.sleep(0.1)
        birds, again = serve("birds", "--name=birds"), serve("again")
        birds.url += "birds"
        for service in (first, birds):
            await service.ready()
        assert await asyncio.to_thread(again.process.wait, 120) == 1
        assert "this cluster has a service named 'efft': choose another --name" in again.log.read_text()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
            loads = [load_test.Load(service, session, files, want) for service in (first, birds)]
            rng = load_test.random.Random(0)
            await asyncio.gather(loads[0].run(4.0, 10.0, 8, 1, rng), loads[1].run(4.0, 2.0, 2, 0, rng))
            first.process.kill()  # its replicas go on
            await loads[0].good(0, "adapter-0", False)
            first.process.wait()
            replacing = serve("replacing", "--replace")
            await replacing.ready()
            await loads[0].good(1, "adapter-1", True)
            assert await asyncio.to_thread(replacing.stop) == 0
            async with session.get(first.url) as answer:
                assert answer.status == 404
            await loads[1].good(2, "adapter-2", False)
        return [(load.counts, load.problems[:5]) for load in loads]

    with subprocess.Popen([sys.executable, "-c", NODES], stdin=-1, stdout=-1, text=True) as made:
        address, *pids = made.stdout.readline().split()
        nodes = [psutil.Process(int(pid)) for pid in pids]  # the head, and two others
        try:
            found = asyncio.run(scenario())
        finally:
            for service in services:
                service.stop(0)
    assert len(killed) > 2 and [counts["sent"] for counts, _ in found] == [58, 9]
    assert not any(counts[what] for counts, _ in found for what in ("lost", "wrong", "accepted")), found
