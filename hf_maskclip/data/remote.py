"""Files on other machines: how long their servers are waited for, and connections that a forked process must not share."""

import gc
from collections.abc import Callable
from typing import Any

from fsspec.asyn import AsyncFileSystem

SILENT_SECONDS = 60  # after which a server that sends nothing has failed; a whole file may take as long as it needs
S3_TRIES = 5  # of s3fs, each of which waits for its share of that time


def storage_options(path: str) -> dict[str, Any]:
    """What fsspec has to know beside a path or an address to open it: nothing but how long the web and S3 are waited for."""
    protocols = {part.partition("://")[0] for part in path.split("::")}
    return {protocol: LIMITS[protocol]() for protocol in protocols & set(LIMITS)}


def _web_limits() -> dict[str, Any]:
    import aiohttp  # by which fsspec reads the web

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENT_SECONDS, sock_read=SILENT_SECONDS)
    return {"client_kwargs": {"timeout": timeout}}


def _s3_limits() -> dict[str, Any]:
    """botocore, which s3fs asks, would else try each of its tries several times more."""
    limits = dict.fromkeys(("connect_timeout", "read_timeout"), SILENT_SECONDS / S3_TRIES)
    return {"config_kwargs": limits | {"retries": {"max_attempts": 0}}}


LIMITS: dict[str, Callable[[], dict[str, Any]]] = {
    "http": _web_limits,
    "https": _web_limits,
    "s3": _s3_limits,
    "s3a": _s3_limits,
}


def close_connections() -> None:
    """Close what fsspec keeps open between two reads. Called before a process forks.

    A forked process drops its copies of them some time, and so takes them out of the event loop that it shares with its parent.
    The parent's next read would wait for an answer that its loop never sees.
    """
    kinds: list[type[AsyncFileSystem]] = [AsyncFileSystem]
    while kinds:
        kind = kinds.pop()
        kind.clear_instance_cache()
        kinds += kind.__subclasses__()
    gc.collect()  # for a file system, and so its connections, is in circles of references
