"""What is not about an image or an instance: health, capabilities, who may do what.

Usage: server.py TOKEN, whose only scope is instance:read.
"""

import sys

from suite import Sdk, check, refused, run

READER = sys.argv[1]


async def health(sdk):
    check((await sdk.health.check()).status, "ok")


async def capabilities(sdk):
    can = await sdk.capabilities.get()
    check(can.server.api_version, "0.3.0")
    check((can.host.os, can.host.arch), ("linux", "amd64"))
    check((can.default_runtime.name, can.default_runtime.available), ("native", True))
    names = [runtime.name for runtime in can.runtimes]
    check(names, sorted(names))
    assert {"instances", "images", "exec", "logs"} <= set(can.features), can.features
    assert can.images.default_platform in can.images.platforms, can.images


async def who_may_do_what(sdk):
    nobody = Sdk(sdk.is_async, api_key="no.such.token")
    check((await nobody.health.check()).status, "ok")
    message = "invalid token"
    await refused(nobody, nobody.instances.list(), 401, "Unauthorized", message)
    await refused(nobody, nobody.capabilities.get(), 401, "Unauthorized", message)
    await nobody.close()

    reader = Sdk(sdk.is_async, api_key=READER)
    assert isinstance(await reader.instances.list(), list)
    for call, scope in (
        (reader.capabilities.get(), "resource:read"),
        (reader.images.list(), "image:read"),
        (reader.images.create(name="a"), "image:write"),
        (reader.images.delete("a"), "image:delete"),
        (reader.instances.create(name="a", image="a"), "instance:write"),
        (reader.instances.stop("a"), "instance:write"),
        (reader.instances.delete("a"), "instance:delete"),
    ):
        await refused(reader, call, 403, "Forbidden", f"missing required scope: {scope}")
    await reader.close()


async def no_such_route(sdk):
    await refused(sdk, sdk.raw("/nowhere"), 404, "Not Found", "/nowhere")


run(health, capabilities, who_may_do_what, no_such_route)
