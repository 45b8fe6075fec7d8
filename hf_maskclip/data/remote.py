"""Files on other machines: how long their servers are waited for, and connections that a forked process must not share."""

import gc
from typing import Any

from fsspec.asyn import AsyncFileSystem

SILENT_SECONDS = 60  # after which a server that sends nothing has failed; a whole file may take as long as it needs


def storage_options(path: str) -> dict[str, Any]:
    """What fsspec has to know beside a path or an address to open it: nothing but how long the web is waited for."""
    protocols = {part.partition("://")[0] for part in path.split("::")} & {"http", "https"}
    if not protocols:
        return {}
    import aiohttp  # by which fsspec reads the web

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENT_SECONDS, sock_read=SILENT_SECONDS)
    return {protocol: {"client_kwargs": {"timeout": timeout}} for protocol in protocols}


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
