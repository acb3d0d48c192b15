"""Run the tokenizers, processors and chat templates of models, one process per model.

`python -m ipmerge_core.inference.processor_server SOCKET` imports the libraries once and then forks
one process per request, each with limits of memory and CPU time. A template that never ends, or
doubles a string until memory is full, ends its own process only. `processor_process.py` is the
client.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from ipmerge_core.errors import IPMergeError, ModelLoadError
from ipmerge_core.inference.batch_encoding import encode_batch
from ipmerge_core.inference.encoding import ModelProcessor
from ipmerge_core.inference.wire import (
    pack_inputs,
    pack_many,
    receive,
    send,
    unpack_conversations,
    unpack_messages,
)
from ipmerge_core.runtime.imports import find_torchvision

IDLE_SECONDS = 600.0  # after which a process without requests ends
_ENDING_SECONDS = 5.0  # for the system to release the memory of a process


def main() -> None:
    """Fork processes on request until the client closes the socket."""
    control = socket.socket(fileno=int(sys.argv[1]))
    _import_libraries()
    control.sendall(b'{"ready": true}\n')
    children: set[int] = set()
    while select.select([control], [], [], IDLE_SECONDS)[0] or _living(children):
        if not select.select([control], [], [], 0)[0]:
            continue
        data, sockets, *_ = socket.recv_fds(control, 1 << 16, 1)
        if not data:
            break
        request = json.loads(data)
        if "fork" in request:
            (connection,) = sockets
            pid = os.fork()
            if pid == 0:
                control.close()
                _run(connection, int(request["fork"]))
            os.close(connection)
            children.add(pid)
            answer = {"pid": pid}
        else:
            pid = int(request["wait"])
            children.discard(pid)
            answer = {"code": _exit_code(pid)}
        control.sendall(json.dumps(answer).encode() + b"\n")
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def serve(connection: Connection) -> None:
    """Answer requests for one model until the client is gone or a request exceeds the memory."""
    model: ModelProcessor | None = None
    while connection.poll(IDLE_SECONDS):
        request, data = receive(connection)
        _limit_cpu(float(request["seconds"]))
        try:
            if request["call"] == "load":
                model = ModelProcessor(request["folder"], takes_images=request["takes_images"])
                ids = dict(model.special_ids._asdict())
                reply = {
                    "special_ids": ids,
                    "image_processor": model.image_processor,
                    "thinking": model.thinking_ids,
                }
                blob = b""
            else:
                assert model is not None, "no model was loaded"
                reply, blob = _answer(model, request, data)
        except IPMergeError as error:
            ends = model is None or isinstance(error.__cause__, MemoryError)
            send(connection, {"error": str(error), "ends": ends})
            if ends:
                return
        else:
            send(connection, reply, blob)


def _answer(
    model: ModelProcessor, request: dict[str, Any], data: bytes
) -> tuple[dict[str, Any], bytes]:
    match request["call"]:
        case "encode":
            inputs = model.encode(unpack_messages(request["messages"], data))
            try:
                plain, blob = pack_inputs(inputs)
            except TypeError as error:
                raise _no_tensors(model, error) from error
            return {"plain": plain}, blob
        case "encode_rows":
            return _encode_rows(model, request["conversations"], data)
        case "decode_rows":
            return {"texts": [model.decode(ids) for ids in request["rows"]]}, b""
        case "begins_twice":
            return {"begins_twice": model.begins_twice}, b""
        case "encode_text":
            return {"ids": model.encode_text(request["text"])}, b""
        case _:
            skip = bool(request["skip_special_tokens"])
            return {"text": model.decode(request["ids"], skip_special_tokens=skip)}, b""


def _encode_rows(
    model: ModelProcessor, conversations: list[dict[str, Any]], data: bytes
) -> tuple[dict[str, Any], bytes]:
    """Encode conversations; an error of one does not affect the others."""
    found = encode_batch(model, unpack_conversations(conversations, data))
    errors = [str(each) if isinstance(each, ModelLoadError) else None for each in found]
    prompts = [{} if isinstance(each, ModelLoadError) else each for each in found]
    try:
        plain, blob = pack_many(prompts)
    except TypeError as error:
        raise _no_tensors(model, error) from error
    return {"rows": plain, "errors": errors}, blob


def _no_tensors(model: ModelProcessor, error: TypeError) -> ModelLoadError:
    return ModelLoadError(
        f"The processor of '{model.name}' returns inputs that are not tensors ({error}). This "
        f"model is not supported."
    )


def _import_libraries() -> None:
    """Import what every model needs, so that forked processes share it."""
    import torch

    find_torchvision()
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer  # noqa: F401 (side effect)

    torch.set_num_threads(1)


def _run(connection: int, memory: int) -> None:
    """Serve in a forked process, which never returns into the code of its parent."""
    code = 1
    try:
        _limit_memory(memory)
        serve(Connection(connection))
        code = 0
    except (EOFError, OSError):  # the client is gone
        code = 0
    finally:
        os._exit(code)


def _limit_memory(nbytes: int) -> None:
    """Limit the memory beyond that of the libraries, where the system supports it (Linux)."""
    import psutil

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):
        _lower(resource.RLIMIT_AS, int(psutil.Process().memory_info().vms) + nbytes)


def _limit_cpu(seconds: float) -> None:
    """Let the system end this process after more seconds of CPU time than a request may take."""
    _lower(resource.RLIMIT_CPU, int(time.process_time() + seconds) + 1)


def _exit_code(pid: int) -> int:
    """Wait for a process that is ending, and kill it if it does not."""
    deadline = time.monotonic() + _ENDING_SECONDS
    while not (found := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)
    return os.waitstatus_to_exitcode(found[1])


def _lower(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (limit, hard))


def _living(children: set[int]) -> bool:
    """Return whether a forked process is alive.

    The client requests the exit code of each, which `waitpid` reports only once.
    """
    import psutil

    zombie = psutil.STATUS_ZOMBIE
    return any(psutil.pid_exists(p) and psutil.Process(p).status() != zombie for p in children)


if __name__ == "__main__":
    main()
