"""Images: every endpoint, with success and with an error.

Usage: images.py IMAGE, which its registry has.
"""

import asyncio
import sys

from suite import check, refused, run

IMAGE = sys.argv[1]
REGISTRY = IMAGE.split("/")[0]
COPY = "docker.io/library/sdk-copy:one"


async def ready(sdk, name):
    while True:
        image = await sdk.images.get(name)
        if image.status in ("ready", "failed"):
            check((image.status, image.error), ("ready", None))
            return image
        await asyncio.sleep(0.05)


async def create_and_get(sdk):
    created = await sdk.images.create(name=IMAGE)
    assert created.status in ("pending", "pulling", "converting", "ready"), created
    image = await ready(sdk, IMAGE)
    again = await sdk.images.create(name=IMAGE)

    check((image.name, image.platform), (IMAGE, "linux/amd64"))
    assert image.digest.startswith("sha256:") and image.size_bytes > 0, image
    check((again.digest, again.status), (image.digest, "ready"))
    by_digest = await sdk.images.get(f"{IMAGE.rsplit(':', 1)[0]}@{image.digest}")
    check(by_digest.digest, image.digest)

    await refused(sdk, sdk.images.create(name="A B"), 400, "invalid_name")
    await refused(sdk, sdk.images.create(name=f"{REGISTRY}/nothing:here"), 404, "not_found")
    await refused(
        sdk, sdk.images.create(name=IMAGE, platform="windows/amd64"), 400, "invalid_platform"
    )
    await refused(sdk, sdk.images.get("nothing"), 404, "not_found", "nothing")
    await refused(sdk, sdk.images.get("A B"), 400, "invalid_name")


async def names_in_paths(sdk):
    once = IMAGE.replace("/", "%2F")
    for name in (IMAGE, once, once.replace("%", "%25")):
        check((await sdk.raw(f"/images/{name}"))["name"], IMAGE)
    for name in ("no/such", "no%2Fsuch", "no%252Fsuch"):
        await refused(sdk, sdk.raw(f"/images/{name}"), 404, "not_found", "no/such")


async def lists_and_tags(sdk):
    tags = {"kind": "a:b/c", "suite": sdk.name}
    await sdk.images.create(name=IMAGE, tags=tags)

    names = [image.name for image in await sdk.images.list()]
    mine = await sdk.images.list(tags=tags)
    others = await sdk.images.list(tags={"suite": "another"})

    assert IMAGE in names, names
    check([image.name for image in mine], [IMAGE])
    check(mine[0].tags, tags)
    check(others, [])
    call = sdk.images.create(name=IMAGE, tags={"": "no key"})
    await refused(sdk, call, 400, "invalid_request")


async def tag_and_delete(sdk):
    source = await sdk.images.get(IMAGE)

    copy = await sdk.images.tag(IMAGE, target="sdk-copy:one")
    found = await sdk.images.get("sdk-copy:one")
    deleted = await sdk.images.delete("sdk-copy:one")

    check((copy.name, copy.digest, copy.status), (COPY, source.digest, "ready"))
    check((found.name, found.digest), (COPY, source.digest))
    check(deleted, None)
    await refused(sdk, sdk.images.get(COPY), 404, "not_found")
    await refused(sdk, sdk.images.delete(COPY), 404, "not_found")
    await refused(sdk, sdk.images.delete("A B"), 400, "invalid_name")
    await refused(sdk, sdk.images.tag("nothing", target="a"), 404, "not_found")
    await refused(sdk, sdk.images.tag(IMAGE, target=f"a@{source.digest}"), 400, "invalid_name")
    await refused(sdk, sdk.images.tag(IMAGE, target=""), 400, "invalid_name")


run(create_and_get, names_in_paths, lists_and_tags, tag_and_delete)
