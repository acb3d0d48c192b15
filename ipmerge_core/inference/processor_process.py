"""Use the tokenizer or processor of a model in a process of its own, with limits.

In: a model folder and messages. Out: input tensors and text. The app never renders an untrusted
chat template and never runs an untrusted tokenizer: each loaded model has a process, which a
request that exceeds its time or memory, a cancelled request, and the end of the app terminate. The
next request starts another one. `processor_server.py` runs in these processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from ipmerge_core.errors import ModelLoadError, RunCancelled, RunError
from ipmerge_core.inference.encoding import SpecialIds
from ipmerge_core.inference.processor_checks import checked_text, prompt_error
from ipmerge_core.inference.prompts import Message
from ipmerge_core.inference.thinking import ThinkingTokens
from ipmerge_core.inference.wire import pack_messages, receive, send, unpack_inputs

_POLL_SECONDS = 0.05
_START_SECONDS = 300.0  # for the libraries, on a machine that is busy
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SUBJECTS = {  # what may exceed a limit, by request
    "load": "The tokenizer or processor",
    "encode": "The chat template or processor",
    "encode_rows": "The chat template or processor",
}
_MODULE = "ipmerge_core.inference.processor_server"


class Limits(NamedTuple):
    """What one request may use: bytes beyond the libraries, seconds of CPU time.

    The elapsed time is limited to `patience` times the CPU time, for a process that waits.
    """

    memory: int = 3 << 30
    loading: float = 60.0
    encoding: float = 10.0
    patience: float = 10.0


class RemoteProcessor:
    """The tokenizer or processor of the model in `folder`, in a process of its own.

    Requests are executed one at a time. `stops` are events that cancel a request. After the first,
    `image_processor` is the class that resizes images and its library, None for a text model, and
    `thinking` are the tokens that mark a thinking part.

    All methods raise:
        ModelLoadError: the files cannot be used, or exceed a limit.
        RunCancelled: one of the events was set.
        RunError: the process cannot be started.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        takes_images: bool,
        server: ProcessorServer | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.folder = Path(folder).absolute()  # the server may have been started elsewhere
        self.takes_images = takes_images
        self._server, self._limits = server or default_server(), limits or Limits()
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self.image_processor: str | None = None
        self.thinking = ThinkingTokens()

    def load(self, stops: Sequence[threading.Event] = ()) -> SpecialIds:
        """Load the files and return the ids of the special tokens."""
        with self._alone(stops):
            return self._loaded(stops)[1]

    def encode(
        self, messages: Sequence[Message], stops: Sequence[threading.Event] = ()
    ) -> dict[str, Any]:
        """Render a conversation with the chat template and encode it: a batch of one."""
        plain, pixels = pack_messages(messages)
        reply, blob = self.ask({"call": "encode", "messages": plain}, stops, pixels)
        inputs = unpack_inputs(reply["plain"], blob)
        if too_long := prompt_error(self.folder.name, inputs):
            raise too_long
        return inputs

    def encode_text(self, text: str, stops: Sequence[threading.Event] = ()) -> list[int]:
        """Encode a text without special tokens, also where it spells one."""
        reply, _ = self.ask({"call": "encode_text", "text": text}, stops)
        ids: list[int] = reply["ids"]
        return ids

    def begins_twice(self, stops: Sequence[threading.Event] = ()) -> bool:
        """Whether the template writes the BOS token that encoding its text adds again."""
        return bool(self.ask({"call": "begins_twice"}, stops)[0]["begins_twice"])

    def decode(
        self,
        ids: Sequence[int] | int,
        *,
        skip_special_tokens: bool = True,
        stops: Sequence[threading.Event] = (),
    ) -> str:
        """Decode tokens to text."""
        ids = [ids] if isinstance(ids, int) else [int(number) for number in ids]
        request = {"call": "decode", "ids": ids, "skip_special_tokens": skip_special_tokens}
        return checked_text(self.folder.name, str(self.ask(request, stops)[0]["text"]), len(ids))

    def close(self) -> None:
        """End the process; the next request starts another one."""
        if self._process is not None:
            self._process.end()
            self._process = None

    @contextlib.contextmanager
    def _alone(self, stops: Sequence[threading.Event]) -> Any:  # noqa: ANN401
        while not self._lock.acquire(timeout=_POLL_SECONDS):
            _check(stops)
        try:
            yield
        finally:
            self._lock.release()

    def ask(
        self, request: Mapping[str, Any], stops: Sequence[threading.Event], data: bytes = b""
    ) -> tuple[dict[str, Any], bytes]:
        """Send a request to the process, and return its reply and binary data."""
        with self._alone(stops):
            process, _ = self._loaded(stops)
            return self._exchange(process, request, stops, self._limits.encoding, data)

    def _loaded(self, stops: Sequence[threading.Event]) -> tuple[_Process, SpecialIds]:
        """Return a process that has loaded the files; start one if there is none."""
        if self._process is None or not self._process.is_alive():
            self.close()
            self._process = self._server.start_process(self._limits.memory, stops)
            weakref.finalize(self, self._process.abandon)
            request = {
                "call": "load",
                "folder": str(self.folder),
                "takes_images": self.takes_images,
            }
            reply, _ = self._exchange(self._process, request, stops, self._limits.loading)
            self._process.special_ids = SpecialIds(**reply["special_ids"])
            self._keep_image_processor(reply["image_processor"])
            self.thinking = ThinkingTokens.of(reply["thinking"])
        ids = self._process.special_ids
        assert ids is not None
        return self._process, ids

    def _keep_image_processor(self, found: str | None) -> None:
        """Refuse another class than before: the answers of a conversation share one."""
        if self.image_processor not in (None, found):
            self.close()
            raise ModelLoadError(
                f"The image processor of '{self.folder.name}' was {self.image_processor} and is "
                f"now {found}: torchvision was installed or removed. Start the app again."
            )
        self.image_processor = found

    def _exchange(
        self,
        process: _Process,
        request: Mapping[str, Any],
        stops: Sequence[threading.Event],
        seconds: float,
        data: bytes = b"",
    ) -> tuple[dict[str, Any], bytes]:
        """Send a request and wait for the reply; after any failure the process is ended."""
        subject = f"{_SUBJECTS.get(request['call'], 'The tokenizer')} of '{self.folder.name}'"
        answered = False
        try:
            send(process.connection, {**request, "seconds": seconds}, data)
            self._wait(process, subject, stops, seconds)
            reply, blob = receive(process.connection)
            answered = "error" not in reply or not reply["ends"]
        except (EOFError, ConnectionError) as error:
            raise self._died(process, subject, seconds) from error
        except OSError as error:  # a message longer than the most that is received
            raise self._too_large(subject) from error
        finally:
            if not answered:
                self.close()
        if "error" in reply:
            raise ModelLoadError(reply["error"])
        return reply, blob

    def _wait(
        self,
        process: _Process,
        subject: str,
        stops: Sequence[threading.Event],
        seconds: float,
    ) -> None:
        """Wait until the process has replied or died, within the limits."""
        deadline = time.monotonic() + self._limits.patience * seconds
        while not process.connection.poll(_POLL_SECONDS):
            _check(stops)
            if time.monotonic() > deadline:
                raise self._too_slow(subject, self._limits.patience * seconds)
            if process.memory() > self._limits.memory:  # RLIMIT_AS has no effect on macOS
                raise self._too_large(subject)

    def _died(self, process: _Process, subject: str, seconds: float) -> ModelLoadError:
        code = process.exit_code()
        if code == -signal.SIGXCPU:
            return self._too_slow(subject, seconds, " of CPU time")
        if code in (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGKILL):
            return self._too_large(subject)  # libraries that are not Python abort
        return ModelLoadError(f"{subject} ended its process (exit code {code}). {_ADVICE}")

    def _too_slow(self, subject: str, seconds: float, what: str = "") -> ModelLoadError:
        return ModelLoadError(f"{subject} was stopped after {seconds:g} s{what}. {_ADVICE}")

    def _too_large(self, subject: str) -> ModelLoadError:
        size = self._limits.memory / 2**30
        return ModelLoadError(f"{subject} was stopped: it needs more than {size:g} GiB. {_ADVICE}")


_ADVICE = (
    "Check chat_template.jinja, tokenizer.json and the processor's files in the model folder, or "
    "use another model."
)


class _Process:
    """A forked process of the server."""

    def __init__(
        self, server: ProcessorServer, parent: int, pid: int, connection: Connection
    ) -> None:
        self.connection = connection
        self.special_ids: SpecialIds | None = None
        self._server, self._parent, self._pid = server, parent, pid
        self._shared = self._resident()  # the libraries
        self._code: int | None = None
        self._lock = threading.Lock()

    def is_alive(self) -> bool:
        """Whether the process waits for requests; it ends by itself when idle."""
        return self._code is None and not self.connection.closed and not self.connection.poll()

    def memory(self) -> int:
        """Return the resident bytes beyond those of the libraries."""
        return self._resident() - self._shared

    def exit_code(self) -> int:
        """Wait for the end of the process and return its exit code, or minus its signal."""
        with self._lock:
            if self._code is None:
                self._code = self._server.wait_for(self._pid, self._parent)
            return self._code

    def end(self) -> None:
        """Kill the process, if it has not ended."""
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            self.exit_code()
        self.connection.close()

    def abandon(self) -> None:
        """Let the process end by itself, as its connection is closed; for finalizers.

        The garbage collector can call them in a thread that holds any lock, so this takes none.
        """
        self.connection.close()
        if self._code is None:
            self._server.abandoned.append((self._parent, self._pid))

    def _resident(self) -> int:
        try:
            return int(psutil.Process(self._pid).memory_info().rss)
        except psutil.Error:
            return 0


class ProcessorServer:
    """The process that has imported the libraries and forks one process per model.

    It is started by the first use, and again if it has ended. `abandoned` are the processes whose
    exit codes have not been requested, with the process that has forked them.
    """

    def __init__(self) -> None:
        self.abandoned: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._finalizer: weakref.finalize[..., ProcessorServer] | None = None
        self._ready = False

    def start(self) -> None:
        """Start the process in the background, if it is not running."""
        with self._lock:
            self._start()

    def start_process(self, memory: int, stops: Sequence[threading.Event] = ()) -> _Process:
        """Fork a process that may use `memory` bytes. Raises: RunError, RunCancelled."""
        with self._lock:
            self._start()
            self._release_abandoned()
            ours, theirs = socket.socketpair()
            reply = self._request({"fork": memory}, [theirs.fileno()], lambda: _check(stops))
            theirs.close()
            assert self._child is not None
            return _Process(self, self._child.pid, int(reply["pid"]), Connection(ours.detach()))

    def wait_for(self, pid: int, parent: int) -> int:
        """Wait for a process and return its exit code; -SIGKILL if its parent has ended."""
        with self._lock:
            if self._child is None or self._child.pid != parent:
                return -signal.SIGKILL
            try:
                return int(self._request({"wait": pid}, [], lambda: None)["code"])
            except RunError:
                return -signal.SIGKILL

    def _release_abandoned(self) -> None:
        """Request the exit codes of abandoned processes; the system keeps each until then."""
        while self.abandoned:
            parent, pid = self.abandoned.popleft()
            if self._child is not None and self._child.pid == parent:
                self._request({"wait": pid}, [], lambda: None)

    def close(self) -> None:
        """End the process and all that it has forked."""
        with self._lock:
            self._end()

    def _start(self) -> None:
        if self._child is not None and self._child.poll() is None:
            return
        self._end()
        ours, theirs = socket.socketpair()
        paths = os.pathsep.join(path for path in sys.path if path)
        own = {name: value for name, value in os.environ.items() if name not in _SECRETS}
        quiet = {
            "TOKENIZERS_PARALLELISM": "false",  # threads do not survive a fork
            "OMP_NUM_THREADS": "1",
            "OBJC_DISABLE_INITIALIZE_FORK_SAFETY": "YES",  # macOS
            "HF_HUB_OFFLINE": "1",
        }
        self._child = subprocess.Popen(  # noqa: S603 (our own interpreter and code)
            [sys.executable, "-m", _MODULE, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**own, **quiet, "PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the client's to handle
        )
        theirs.close()
        self._control, self._ready = ours, False
        self._finalizer = weakref.finalize(self, _end, self._child, ours)

    def _request(
        self, content: Mapping[str, int], sockets: list[int], check: Callable[[], None]
    ) -> dict[str, Any]:
        try:
            if not self._ready:
                self._read_line(check)
                self._ready = True
            assert self._control is not None
            socket.send_fds(self._control, [json.dumps(content).encode()], sockets)
            return self._read_line(lambda: None)
        except OSError as error:
            self._end()
            raise RunError(
                "The process for chat templates and tokenizers has ended unexpectedly. Is there "
                "enough memory? Try again."
            ) from error

    def _read_line(self, check: Callable[[], None]) -> dict[str, Any]:
        assert self._control is not None
        self._control.settimeout(_POLL_SECONDS)
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                line = self._control.recv(1 << 16)
            except TimeoutError:
                check()
                if time.monotonic() > deadline:
                    raise
                continue
            if not line:
                raise ConnectionResetError
            found: dict[str, Any] = json.loads(line)
            return found

    def _end(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._child = self._control = self._finalizer = None


def _end(child: subprocess.Popen[bytes], control: socket.socket) -> None:
    """Close the socket, upon which the server ends what it has forked and itself."""
    control.close()
    try:
        child.wait(_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


@cache
def default_server() -> ProcessorServer:
    """Return the server of this Python process; it is not started yet."""
    return ProcessorServer()


def _check(stops: Sequence[threading.Event]) -> None:
    if any(event.is_set() for event in stops):
        raise RunCancelled("Stopped before the model answered.")
