"""Instances: every endpoint, with success and with an error.

Usage: instances.py IMAGE, which is on the host.
"""

import asyncio
import sys
from datetime import timedelta

from suite import check, items, refused, run, until

IMAGE = sys.argv[1]
SMALL = {"image": IMAGE, "size": "128MB", "vcpus": 1}


async def a_life(sdk):
    script = "trap 'echo bye; exit 3' TERM; echo one; echo '\"two\"'; while :; do sleep 0.1; done"
    name = f"life-{sdk.name}"
    tags = {"suite": sdk.name}
    created = await sdk.instances.create(
        name=name, cmd=["sh", "-c", script], env={"A": "b"}, tags=tags, **SMALL
    )
    running = await until("Running", sdk, name)

    assert created.state in ("Created", "Initializing"), created
    check((created.image, created.size, created.vcpus), (IMAGE, "128MB", 1))
    check((running.env, running.tags, running.expires_at), ({"A": "b"}, tags, None))
    check((running.health_status.status, running.has_snapshot), ("disabled", False))
    assert running.started_at > running.created_at, running
    check((running.stopped_at, running.exit_code), (None, None))
    check((running.platform, running.hypervisor), ("linux/amd64", "native"))
    assert running.overlay_size and running.hotplug_size, running

    for key in (created.id, name, created.id[:12]):
        check((await sdk.instances.get(key)).id, created.id)
    for found, expected in (
        (await sdk.instances.list(), [name]),
        (await sdk.instances.list(state="Running"), [name]),
        (await sdk.instances.list(state="Stopped"), []),
        (await sdk.instances.list(tags=tags), [name]),
        (await sdk.instances.list(tags={**tags, "more": "x"}), []),
    ):
        check([instance.name for instance in found], expected)

    await logs(sdk, name)
    await look(sdk, name)
    await used(sdk)
    await stop_and_start(sdk, name)
    await sdk.instances.delete(name)
    await refused(sdk, sdk.instances.get(created.id), 404, "not_found", "resource not found")


async def logs(sdk, name):
    both = ["one", '"two"']
    following = await sdk.instances.logs(name, follow=True, tail=1000)
    await items(following, lambda lines: lines[-2:] == both)
    check(await items(await sdk.instances.logs(name, tail=2)), both)
    for source in ("vmm", "hypeman"):
        assert isinstance(await items(await sdk.instances.logs(name, source=source)), list)
    await refused(sdk, sdk.instances.logs("nobody"), 404, "not_found")
    await refused(sdk, sdk.instances.logs(name, source="other"), 400, "Bad Request", "source")
    await refused(sdk, sdk.instances.logs(name, tail=-1), 400, "Bad Request", "tail")


async def look(sdk, name):
    stats = await sdk.instances.stats(name)
    check((stats.instance_name, stats.allocated_vcpus), (name, 1))
    check(stats.allocated_memory_bytes, 128 << 20)
    assert stats.cpu_seconds > 0 and stats.memory_rss_bytes > 0, stats
    assert 0 < stats.memory_utilization_ratio < 2, stats
    await refused(sdk, sdk.instances.stats("nobody"), 404, "not_found")

    file = await sdk.instances.stat(name, path="/bin/busybox")
    check((file.exists, file.is_file, file.is_dir, file.is_symlink), (True, True, False, False))
    assert file.size > 100_000 and file.mode & 0o111, file
    check((await sdk.instances.stat(name, path="/bin")).is_dir, True)
    link = await sdk.instances.stat(name, path="/proc/self/exe")
    followed = await sdk.instances.stat(name, path="/proc/self/exe", follow_links=True)
    check((link.is_symlink, followed.is_symlink, followed.is_file), (True, False, True))
    check((await sdk.instances.stat(name, path="/nowhere")).exists, False)
    await refused(sdk, sdk.instances.stat(name, path=""), 400, "Bad Request", "path")
    await refused(sdk, sdk.instances.stat("nobody", path="/"), 404, "not_found")

    waited = await sdk.instances.wait(name, state="Stopped", api_timeout="50ms")
    check((waited.state, waited.timed_out, waited.state_error), ("Running", True, None))
    await refused(sdk, sdk.instances.wait("nobody", state="Running"), 404, "not_found")
    await refused(sdk, sdk.instances.wait(name, state="Unknown"), 400, "invalid_state")
    for timeout in ("soon", "0s"):
        call = sdk.instances.wait(name, state="Running", api_timeout=timeout)
        await refused(sdk, call, 400, "invalid_timeout")


async def used(sdk):
    """An image that an instance uses, and a name that one has."""
    await refused(sdk, sdk.images.delete(IMAGE), 409, "conflict")
    name = f"life-{sdk.name}"
    await refused(sdk, sdk.instances.create(name=name, **SMALL), 409, "name_conflict", name)


async def stop_and_start(sdk, name):
    same = await sdk.instances.start(name)
    check(same.state, "Running")
    call = sdk.instances.start(name, cmd=["true"])
    await refused(sdk, call, 409, "invalid_state", "Running")

    stopped = await sdk.instances.stop(name)
    check((stopped.state, stopped.exit_code, stopped.exit_message), ("Stopped", 3, "exit code 3"))
    assert stopped.stopped_at > stopped.started_at, stopped
    check((await sdk.instances.stop(name)).state, "Stopped")
    waited = await sdk.instances.wait(name, state="Running")
    check((waited.state, waited.timed_out), ("Stopped", False))
    await refused(sdk, sdk.instances.stat(name, path="/"), 409, "invalid_state", "Stopped")
    check((await sdk.instances.stats(name)).memory_rss_bytes, 0)

    started = await sdk.instances.start(name, cmd=["sh", "-c", "exit 42"])
    check((started.exit_code, started.stopped_at), (None, None))
    check((await until("Stopped", sdk, name)).exit_code, 42)
    await refused(sdk, sdk.instances.stop("nobody"), 404, "not_found")
    await refused(sdk, sdk.instances.start("nobody"), 404, "not_found")


async def update(sdk):
    name = f"kept-{sdk.name}"
    await sdk.instances.create(name=name, cmd=["sleep", "1000"], **SMALL)
    await until("Running", sdk, name)

    policy = {"policy": "on_failure", "backoff": "90s", "max_attempts": 2}
    check_by = {"exec": {"command": ["true"]}, "interval": "1s", "timeout": "1s"}
    changed = await sdk.instances.update(
        name, restart_policy=policy, health_check=check_by, ttl="1h"
    )
    check((changed.restart_policy.policy, changed.restart_policy.backoff), ("on_failure", "1m30s"))
    check((changed.health_check.type, changed.health_check.interval), ("exec", "1s"))
    assert changed.expires_at - changed.created_at > timedelta(minutes=59), changed
    while (health := (await sdk.instances.get(name)).health_status).status != "healthy":
        check(health.status, "starting")
        await asyncio.sleep(0.05)
    bare = await sdk.instances.update(
        name, restart_policy={"policy": "never"}, health_check={"type": "none"}, ttl="0s"
    )
    check((bare.restart_policy, bare.health_check, bare.expires_at), (None, None, None))

    for options, code in (
        ({}, "invalid_request"),
        ({"env": {"A": "b"}}, "invalid_request"),
        ({"ttl": "soon"}, "invalid_ttl"),
        ({"ttl": "1h", "expires_at": "2999-01-01T00:00:00Z"}, "invalid_ttl"),
        ({"expires_at": "2001-01-01T00:00:00Z"}, "invalid_expires_at"),
        ({"restart_policy": {"backoff": "-1s"}}, "invalid_restart_policy"),
        ({"health_check": {"type": "exec"}}, "invalid_health_check"),
        ({"auto_standby": {"enabled": True}}, "invalid_auto_standby"),
        ({"restart_policy": {"policy": "often"}}, "Bad Request"),
    ):
        await refused(sdk, sdk.instances.update(name, **options), 400, code)
    await refused(sdk, sdk.instances.update("nobody", ttl="1h"), 404, "not_found")
    await refused(sdk, sdk.instances.delete("nobody"), 404, "not_found")
    await sdk.instances.delete(name, graceful_shutdown=False)


async def what_cannot_be_created(sdk):
    registry = IMAGE.split("/")[0]
    for options, status, code, words in (
        ({"name": "Upper"}, 400, "Bad Request", "name"),
        ({"vcpus": 0}, 400, "Bad Request", "vcpus"),
        ({"env": {"A": 1}}, 400, "Bad Request", "env.A"),
        ({"ttl": 1}, 400, "Bad Request", "ttl"),
        ({"health_check": {"exec": {"command": "true"}}}, 400, "Bad Request", "exec.command"),
        ({"size": "1.5GB"}, 400, "invalid_size", "size"),
        ({"overlay_size": "1Gb"}, 400, "invalid_overlay_size", "overlay_size"),
        ({"platform": "linux/arm64"}, 404, "platform_not_available", "arm64"),
        ({"expires_at": "2001-01-01T00:00:00Z"}, 400, "invalid_expires_at", "expires_at"),
        ({"tags": {"": "x"}}, 400, "invalid_request", "tags"),
        ({"hypervisor": "vz"}, 400, "invalid_request", "hypervisor"),
        ({"image": f"{registry}/nothing:here"}, 404, "not_found", "nothing"),
        ({"gpu": {"profile": "L40S-1Q"}}, 400, "invalid_request", "L40S-1Q"),
    ):
        body = {"name": "never", **SMALL, **options}
        await refused(sdk, sdk.instances.create(**body), status, code, words)
    check(await sdk.instances.list(), [])


run(a_life, update, what_cannot_be_created)
