"""Fault injection from outside: put this folder on PYTHONPATH and the decoder child obeys markers in its input.

Python imports `sitecustomize` at start. In every process but `python -m wealy_ray.audio.child` this one does
nothing (except running the sitecustomize that it hides, and `_KillEngine`). In the child it wraps `av.open`: a file
whose last bytes hold a marker of `chaos_markers` crashes, hangs or eats memory there, in place of the codec.
A file without a marker costs one more read of its end.

    monkeypatch.setenv("PYTHONPATH", str(chaos_folder))
    decoder.decode(BytesSource(poison(wav, CRASH)))
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys


class _KillEngine(importlib.abc.MetaPathFinder):
    """Kills the process that makes the log-mel of a track with exactly `num_samples` samples."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def find_spec(self, name, path, target=None):  # type: ignore[no-untyped-def]
        if name != "wealy_ray.audio.mel":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None
        real_exec = spec.loader.exec_module

        def exec_module(module):  # type: ignore[no-untyped-def]
            real_exec(module)
            real = module.log_mel_windows

            def log_mel_windows(samples, *args, **kwargs):  # type: ignore[no-untyped-def]
                if len(samples) == self.num_samples:
                    os.kill(os.getpid(), 9)
                return real(samples, *args, **kwargs)

            module.log_mel_windows = log_mel_windows

        spec.loader.exec_module = exec_module
        return spec


def _run_hidden() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    others = [path for path in sys.path if os.path.abspath(path or ".") != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def _install() -> None:
    import av
    import chaos_markers as markers

    actions = {
        markers.CRASH: _crash,
        markers.HANG: _hang,
        markers.MEMORY: _eat_memory,
        markers.MEMORY_CRASH: _eat_memory_and_crash,
        markers.GARBAGE: _write_garbage,
        markers.CHATTER: _chatter,
    }
    real_open = av.open

    def open_(file, *args, **kwargs):  # type: ignore[no-untyped-def]
        tail = file.read_at(max(0, file.size - markers.TAIL_BYTES), markers.TAIL_BYTES)
        for marker, action in actions.items():
            if marker in tail:
                action()
        return real_open(file, *args, **kwargs)

    av.open = open_


def _crash() -> None:
    import ctypes

    ctypes.string_at(0)


def _hang() -> None:
    import re
    import signal

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    re.match(r"(a+)+$", "a" * 200 + "b")  # 2^200 steps inside one C function that holds the GIL


def _eat_memory() -> None:
    hoard = []
    while True:
        hoard.append(bytearray(1 << 22))


def _eat_memory_and_crash() -> None:
    import ctypes
    import time

    malloc = ctypes.CDLL(None).malloc
    malloc.restype = ctypes.c_void_p
    malloc.argtypes = [ctypes.c_size_t]
    while malloc(1 << 20):
        pass
    time.sleep(0.3)  # the parent looks at the child's memory every 20 ms
    ctypes.string_at(0)


def _write_garbage() -> None:
    import stat
    import time

    for fd in range(3, 32):
        try:
            if stat.S_ISFIFO(os.fstat(fd).st_mode):
                os.write(fd, b"\xffno frame at all" * 8)
        except OSError:
            continue
    time.sleep(60)


def _chatter() -> None:
    os.write(1, b"o" * (1 << 20))
    os.write(2, b"e" * (1 << 20))


_run_hidden()
if "wealy_ray.audio.child" in sys.orig_argv:
    _install()
if "WEALY_TEST_KILL_ENGINE_AT_SAMPLES" in os.environ:
    sys.meta_path.insert(0, _KillEngine(int(os.environ["WEALY_TEST_KILL_ENGINE_AT_SAMPLES"])))
