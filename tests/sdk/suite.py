"""What the scripts beside this one stand on: cases are written once and run with both clients.

A case is a coroutine that gets an `Sdk`. What its calls come to is awaited; with the synchronous
client it has been there all along. HYPEMAN_BASE_URL and HYPEMAN_API_KEY say where and as whom.
"""

import asyncio
import inspect

import hypeman
from hypeman import APIStatusError, AsyncHypeman, DefaultAsyncHttpxClient, DefaultHttpxClient
from hypeman import Hypeman, lib


class Sdk:
    """A client of either kind. `sent` counts the requests that went out, repeated ones too."""

    def __init__(self, is_async, **options):
        self.name = "async" if is_async else "sync"
        self.is_async = is_async
        self.sent = 0
        # Plain HTTP: to read all authorities of the web for each client takes seconds here.
        if is_async:
            hooks = {"request": [self._count_async]}
            http = DefaultAsyncHttpxClient(event_hooks=hooks, verify=False)
            self.client = AsyncHypeman(http_client=http, **options)
        else:
            http = DefaultHttpxClient(event_hooks={"request": [self._count]}, verify=False)
            self.client = Hypeman(http_client=http, **options)
        for noun in ("instances", "images", "volumes", "resources", "health", "capabilities"):
            setattr(self, noun, Noun(getattr(self.client, noun)))

    def _count(self, _):
        self.sent += 1

    async def _count_async(self, _):
        self.sent += 1

    async def lib(self, name, *arguments, **options):
        """A function of `hypeman.lib`, which has one for each kind of client."""
        function = getattr(lib, f"{name}_async" if self.is_async else name)
        return await settled(function(self.client, *arguments, **options))

    async def raw(self, path):
        """What a GET of exactly this path answers."""
        return await settled(self.client.get(path, cast_to=object))

    async def close(self):
        await settled(self.client.close())


class Noun:
    """The methods of one resource, all of them to be awaited."""

    def __init__(self, resource):
        self.resource = resource

    def __getattr__(self, name):
        method = getattr(self.resource, name)

        async def call(*arguments, **options):
            return await settled(method(*arguments, **options))

        return call


async def settled(value):
    return await value if inspect.isawaitable(value) else value


async def items(stream, is_enough=lambda found: False):
    """What a stream brings until it ends, or until that is enough."""
    found = []
    end = object()
    while not is_enough(found):
        item = await anext(stream, end) if hasattr(stream, "__anext__") else next(stream, end)
        if item is end:
            break
        found.append(item)
    await settled(stream.close())
    return found


def check(found, expected):
    assert found == expected, f"{found!r} is not {expected!r}"


async def refused(sdk, call, status, code, words=""):
    """`call` is refused in this way, and is not tried again."""
    before = sdk.sent
    try:
        answer = await call
    except APIStatusError as error:
        check((error.status_code, error.body["code"]), (status, code))
        check(sorted(error.body), ["code", "message"])
        assert words in error.body["message"], error.body
        classes = {
            400: hypeman.BadRequestError,
            401: hypeman.AuthenticationError,
            403: hypeman.PermissionDeniedError,
            404: hypeman.NotFoundError,
            409: hypeman.ConflictError,
            501: hypeman.InternalServerError,
        }
        check(type(error), classes[status])
        check(error.response.headers["x-should-retry"], "false")
        check(sdk.sent - before, 1)
    else:
        raise AssertionError(f"it was not refused: {answer!r}")


async def until(state, sdk, name):
    """Waits for a state, however often the server has to be asked; the instance then."""
    while True:
        waited = await sdk.instances.wait(name, state=state, api_timeout="50s")
        if not waited.timed_out:
            check(waited.state, state)
            return await sdk.instances.get(name)


def run(*cases, **options):
    """Runs each case with both clients."""

    async def all_of_them():
        for is_async in (False, True):
            for case in cases:
                sdk = Sdk(is_async, **options)
                await case(sdk)
                await sdk.close()
                print(f"{case.__name__} ({sdk.name}): ok", flush=True)

    asyncio.run(all_of_them())
