"""Volumes and resources: every endpoint, with success and with an error.

Usage: volumes_and_resources.py INSTANCE, which has stopped.
"""

import io
import sys
import tarfile

from suite import check, refused, run, settled

INSTANCE = sys.argv[1]


def archive(name):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        info = tarfile.TarInfo(name)
        info.size = 7
        tar.addfile(info, io.BytesIO(b"content"))
    return buffer.getvalue()


async def a_life(sdk):
    volumes = sdk.volumes
    made = await volumes.create(name="data", size_gb=1, id="chosen", tags={"a": "b"})

    check((made.id, made.name, made.size_gb, made.tags), ("chosen", "data", 1, {"a": "b"}))
    for key in ("chosen", "data"):
        check((await volumes.get(key)).id, made.id)
    check([volume.id for volume in await volumes.list(tags={"a": "b"})], [made.id])
    check(await volumes.list(tags={"a": "c"}), [])
    check((await volumes.get("data")).attachments, None)
    again = volumes.create(name="data", size_gb=1, id="chosen")
    await refused(sdk, again, 409, "already_exists", "chosen")
    for options, code, words in (
        ({"size_gb": 0}, "invalid_field", "size_gb"),
        ({"name": "a/b"}, "invalid_field", "name"),
        ({"id": "../up"}, "invalid_field", "id"),
    ):
        body = {"name": "never", "size_gb": 1, **options}
        await refused(sdk, volumes.create(**body), 400, code, words)

    await given_and_taken(sdk)
    await volumes.delete("data")
    await refused(sdk, volumes.get("chosen"), 404, "not_found")
    await refused(sdk, volumes.delete("chosen"), 404, "not_found")


async def given_and_taken(sdk):
    resource = sdk.client.instances.volumes

    async def attach(volume, path="/data", **options):
        call = resource.attach(volume, id=INSTANCE, mount_path=path, **options)
        return await settled(call)

    async def detach(volume):
        return await settled(resource.detach(volume, id=INSTANCE))

    with_it = await attach("data", readonly=True)
    check(with_it.volumes[0].volume_id, "chosen")
    check((with_it.volumes[0].readonly, with_it.volumes[0].mount_path), (True, "/data"))
    (attachment,) = (await sdk.volumes.get("chosen")).attachments
    check((attachment.mount_path, attachment.readonly), ("/data", True))
    await refused(sdk, sdk.volumes.delete("chosen"), 409, "conflict", attachment.instance_id)
    await refused(sdk, attach("chosen", "/elsewhere"), 409, "conflict", "already")
    await refused(sdk, attach("chosen", "/etc"), 400, "invalid_request", "mount_path")
    await refused(sdk, attach("nothing"), 404, "not_found", "nothing")
    check((await detach("chosen")).volumes or [], [])
    await refused(sdk, detach("chosen"), 404, "not_found")


async def of_an_archive(sdk):
    create = sdk.volumes.create_from_archive
    made = await create(archive("file"), name="full", size_gb=5)
    check((made.name, made.size_gb), ("full", 1))
    await sdk.volumes.delete(made.id)
    await refused(sdk, create(archive("../up"), name="bad", size_gb=1), 400, "invalid_source", "..")
    await refused(sdk, create(b"noise", name="bad", size_gb=1), 400, "invalid_source")
    check(await sdk.volumes.list(), [])


async def resources(sdk):
    found = await sdk.resources.get()
    kinds = (found.cpu, found.memory, found.disk, found.network)
    check([kind.type for kind in kinds], ["cpu", "memory", "disk", "network"])
    for kind in kinds:
        check(kind.available, max(kind.effective_limit - kind.allocated, 0))
    assert found.memory.capacity > 1 << 30, found
    check(found.allocations, [])


run(a_life, of_an_archive, resources)
