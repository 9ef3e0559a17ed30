"""hypeman.lib against a running instance: exec and cp, sync and async.

Usage: exec_and_cp.py INSTANCE, with HYPEMAN_BASE_URL and HYPEMAN_API_KEY in the environment.
"""

import asyncio
import os
import sys
import tempfile
from pathlib import Path

from hypeman import AsyncHypeman, Hypeman
from hypeman.lib import (
    CopyProtocolError,
    cp_from_instance,
    cp_from_instance_async,
    cp_to_instance,
    cp_to_instance_async,
    exec,
    exec_async,
)

INSTANCE = sys.argv[1]
client = Hypeman()


def run(*command, **options):
    result = exec(client, INSTANCE, command, **options)
    return result.output.decode(), result.exit_code


def check(found, expected):
    assert found == expected, f"{found!r} is not {expected!r}"


def exec_sync():
    check(run("sh", "-c", "echo hi; echo there >&2; exit 3"), ("hi\nthere\n", 3))
    check(run("sh", "-c", "echo $A; pwd", env={"A": "b"}, cwd="/bin"), ("b\n/bin\n", 0))
    check(run("head", "-n", "2", stdin=b"one\ntwo\nthree\n"), ("one\ntwo\n", 0))
    check(run("head", "-n", "1", stdin=[b"par", b"ts\n"], wait_for_agent=3), ("parts\n", 0))
    check(run("sleep", "100", timeout=1), ("", 124))
    check(run("sh", "-c", "kill -9 $$")[1], 137)
    check(run("stty", "size", tty=True), ("24 80\r\n", 0))
    check(run("stty", "size", tty=True, rows=40, cols=120), ("40 120\r\n", 0))
    resized = run("sh", "-c", "sleep 1; stty size", tty=True, resize=[(50, 132)])
    check(resized, ("50 132\r\n", 0))
    output, code = run("nothing")
    check((output, code), ("Error: nothing: not found\r\n", 127))
    output, code = run("head", "-c", "5000000", "/dev/zero")
    check((len(output), code), (5_000_000, 0))


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


def cp_sync(folder):
    ours = folder / "ours"
    tree(ours)
    cp_to_instance(client, INSTANCE, ours, "/sdk/tree")
    check(run("/sdk/tree/sub/script"), ("ran\n", 0))
    cp_from_instance(client, INSTANCE, "/sdk/tree", folder / "back")
    compare(ours, folder / "back" / "tree")

    cp_to_instance(client, INSTANCE, ours / "file", "/sdk/mode", mode=0o600, archive=True)
    check(run("stat", "-c", "%a %u", "/sdk/mode"), (f"600 {os.getuid()}\n", 0))

    check(run("sh", "-c", "mkdir /links; cd /links; echo a > f; ln -s f l")[1], 0)
    cp_from_instance(client, INSTANCE, "/links", folder / "back", archive=True)
    check(os.readlink(folder / "back" / "links" / "l"), "f")
    cp_from_instance(client, INSTANCE, "/links", folder / "followed", follow_symlinks=True)
    check((folder / "followed" / "links" / "l").read_text(), "a\n")

    for attempt in (
        lambda: cp_from_instance(client, INSTANCE, "/nowhere", folder / "none"),
        lambda: cp_to_instance(client, INSTANCE, ours / "file", "/bin"),
        lambda: cp_to_instance(client, INSTANCE, ours / "sub", "/bin/busybox"),
    ):
        try:
            attempt()
        except CopyProtocolError as error:
            print("refused:", error)
        else:
            raise AssertionError("it was not refused")


async def both_async(folder):
    async with AsyncHypeman() as client:
        result = await exec_async(client, INSTANCE, ["sh", "-c", "echo hi; exit 4"])
        check((result.output, result.exit_code), (b"hi\n", 4))
        results = await asyncio.gather(
            *(exec_async(client, INSTANCE, ["echo", str(number)]) for number in range(8))
        )
        check([int(result.output) for result in results], list(range(8)))
        ours = folder / "ours"
        await cp_to_instance_async(client, INSTANCE, ours, "/sdk/async")
        await cp_from_instance_async(client, INSTANCE, "/sdk/async", folder / "async")
        compare(ours, folder / "async" / "async")


with tempfile.TemporaryDirectory() as name:
    exec_sync()
    print("exec: ok")
    cp_sync(Path(name))
    print("cp: ok")
    asyncio.run(both_async(Path(name)))
    print("async: ok")
