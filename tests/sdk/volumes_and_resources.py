"""hypeman's volumes and resources against a running server.

Usage: volumes_and_resources.py INSTANCE, which is stopped, with HYPEMAN_BASE_URL and
HYPEMAN_API_KEY in the environment.
"""

import io
import sys
import tarfile

import hypeman
from hypeman import Hypeman

INSTANCE = sys.argv[1]
client = Hypeman()


def check(found, expected):
    assert found == expected, f"{found!r} is not {expected!r}"


def refused(kind, attempt):
    try:
        attempt()
    except kind as error:
        print("refused:", error)
    else:
        raise AssertionError("it was not refused")


def archive(name):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        info = tarfile.TarInfo(name)
        info.size = 7
        tar.addfile(info, io.BytesIO(b"content"))
    return buffer.getvalue()


def volumes():
    made = client.volumes.create(name="sdk", size_gb=1, id="sdk-volume", tags={"a": "b"})
    check((made.id, made.name, made.size_gb, made.tags), ("sdk-volume", "sdk", 1, {"a": "b"}))
    check(client.volumes.get("sdk").id, made.id)
    check([volume.id for volume in client.volumes.list(tags={"a": "b"})], [made.id])
    check(client.volumes.list(tags={"a": "c"}), [])
    refused(
        hypeman.ConflictError,
        lambda: client.volumes.create(name="sdk", size_gb=1, id="sdk-volume"),
    )
    refused(hypeman.BadRequestError, lambda: client.volumes.create(name="sdk", size_gb=0))
    refused(hypeman.NotFoundError, lambda: client.volumes.get("nobody"))

    attached = client.instances.volumes.attach(
        made.id, id=INSTANCE, mount_path="/data", readonly=True
    )
    check((attached.volumes[0].volume_id, attached.volumes[0].readonly), (made.id, True))
    check(client.volumes.get(made.id).attachments[0].mount_path, "/data")
    refused(hypeman.ConflictError, lambda: client.volumes.delete(made.id))
    check(client.instances.volumes.detach(made.id, id=INSTANCE).volumes or [], [])
    client.volumes.delete(made.id)
    refused(hypeman.NotFoundError, lambda: client.volumes.get(made.id))


def archives():
    made = client.volumes.create_from_archive(archive("file"), name="full", size_gb=5)
    check((made.name, made.size_gb), ("full", 1))
    client.volumes.delete(made.id)
    refused(
        hypeman.BadRequestError,
        lambda: client.volumes.create_from_archive(archive("../file"), name="bad", size_gb=1),
    )
    check(client.volumes.list(), [])


def resources():
    found = client.resources.get()
    check((found.cpu.type, found.memory.type, found.disk.type), ("cpu", "memory", "disk"))
    assert found.memory.effective_limit >= found.memory.allocated
    check([allocation for allocation in found.allocations], [])


volumes()
print("volumes: ok")
archives()
print("archives: ok")
resources()
print("resources: ok")
