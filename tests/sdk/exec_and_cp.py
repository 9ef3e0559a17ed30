"""hypeman.lib against a running instance: exec and cp.

Usage: exec_and_cp.py INSTANCE STOPPED, the second of which is not running.
"""

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path

from hypeman.lib import CopyProtocolError
from websockets.exceptions import InvalidStatus

from suite import check, run

INSTANCE, STOPPED = sys.argv[1:]


async def sh(sdk, *command, **options):
    result = await sdk.lib("exec", INSTANCE, command, **options)
    return result.output.decode(), result.exit_code


async def commands(sdk):
    script = "echo hi; echo there >&2; exit 3"
    check(await sh(sdk, "sh", "-c", script), ("hi\nthere\n", 3))
    check(await sh(sdk, "sh", "-c", "echo $A; pwd", env={"A": "b"}, cwd="/bin"), ("b\n/bin\n", 0))
    check(await sh(sdk, "head", "-n", "2", stdin=b"one\ntwo\nthree\n"), ("one\ntwo\n", 0))
    parts = [b"par", b"ts\n"]
    check(await sh(sdk, "head", "-n", "1", stdin=parts, wait_for_agent=3), ("parts\n", 0))
    check(await sh(sdk, "sleep", "100", timeout=1), ("", 124))
    check((await sh(sdk, "sh", "-c", "kill -9 $$"))[1], 137)
    check(await sh(sdk, "nothing"), ("Error: nothing: not found\r\n", 127))
    output, code = await sh(sdk, "head", "-c", "5000000", "/dev/zero")
    check((len(output), code), (5_000_000, 0))


async def terminals(sdk):
    check(await sh(sdk, "stty", "size", tty=True), ("24 80\r\n", 0))
    check(await sh(sdk, "stty", "size", tty=True, rows=40, cols=120), ("40 120\r\n", 0))
    script = "while [ \"$(stty size)\" = '24 80' ]; do sleep 0.05; done; stty size"
    resized = await sh(sdk, "sh", "-c", script, tty=True, resize=[(50, 132)])
    check(resized, ("50 132\r\n", 0))


async def many_commands_at_once(sdk):
    if not sdk.is_async:
        return
    calls = (sdk.lib("exec", INSTANCE, ["echo", str(number)]) for number in range(8))
    check([int(result.output) for result in await asyncio.gather(*calls)], list(range(8)))


def tree(root):
    (root / "sub" / "empty").mkdir(parents=True)
    (root / "file").write_bytes(b"x" * 100_000)
    (root / "nothing").touch()
    (root / "sub" / "script").write_text("#!/bin/sh\necho ran\n")
    (root / "sub" / "script").chmod(0o755)
    (root / "sub" / "big").write_bytes(os.urandom(3_000_000))


def compare(ours, theirs):
    names = sorted(path.relative_to(ours) for path in ours.rglob("*"))
    check(sorted(path.relative_to(theirs) for path in theirs.rglob("*")), names)
    for name in names:
        check((theirs / name).stat().st_mode, (ours / name).stat().st_mode)
        if (ours / name).is_file():
            check((theirs / name).read_bytes(), (ours / name).read_bytes())


async def copies(sdk):
    there = f"/sdk-{sdk.name}"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        ours = folder / "ours"
        tree(ours)
        await sdk.lib("cp_to_instance", INSTANCE, ours, f"{there}/tree")
        check(await sh(sdk, f"{there}/tree/sub/script"), ("ran\n", 0))
        await sdk.lib("cp_from_instance", INSTANCE, f"{there}/tree", folder / "back")
        compare(ours, folder / "back" / "tree")

        mode = f"{there}/mode"
        await sdk.lib("cp_to_instance", INSTANCE, ours / "file", mode, mode=0o600, archive=True)
        check(await sh(sdk, "stat", "-c", "%a %u", mode), (f"600 {os.getuid()}\n", 0))

        links = f"{there}/links"
        script = f"mkdir {links}; cd {links}; echo a > f; ln -s f l"
        check((await sh(sdk, "sh", "-c", script))[1], 0)
        await sdk.lib("cp_from_instance", INSTANCE, links, folder / "back", archive=True)
        check(os.readlink(folder / "back" / "links" / "l"), "f")
        await sdk.lib(
            "cp_from_instance", INSTANCE, links, folder / "followed", follow_symlinks=True
        )
        check((folder / "followed" / "links" / "l").read_text(), "a\n")

        for attempt, words in (
            (sdk.lib("cp_from_instance", INSTANCE, "/nowhere", folder / "none"), "/nowhere"),
            (sdk.lib("cp_to_instance", INSTANCE, ours / "file", "/bin"), "is a directory"),
            (sdk.lib("cp_to_instance", INSTANCE, ours / "sub", "/bin/busybox"), "is a file"),
        ):
            try:
                await attempt
            except CopyProtocolError as error:
                assert words in str(error), error
            else:
                raise AssertionError("it was not refused")


async def refusals_before_the_upgrade(sdk):
    for instance, status, code in ((STOPPED, 409, "invalid_state"), ("nobody", 404, "not_found")):
        for attempt in (
            sdk.lib("exec", instance, ["true"]),
            sdk.lib("cp_from_instance", instance, "/", "/nowhere"),
        ):
            try:
                await attempt
            except InvalidStatus as error:
                check(error.response.status_code, status)
                check(json.loads(error.response.body)["code"], code)
            else:
                raise AssertionError("it was not refused")


run(commands, terminals, many_commands_at_once, copies, refusals_before_the_upgrade)
