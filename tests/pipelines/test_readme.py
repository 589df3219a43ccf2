"""The README's S3 example runs as written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from examples.s3_demo import readme_lines
from tests.pipelines.support import REPOSITORY, environment
from tests.s3_server import S3Server
from wealy_ray.store import StoreReader


def test_the_two_s3_lines(s3: S3Server, whisper_base: Path) -> None:
    assert whisper_base.name == "whisper-base"
    bucket, storage = s3.bucket("my-bucket"), s3.storage()
    for name in ("s2t002.m4a",):
        storage.write(f"{bucket}/audio/{name}", (REPOSITORY / "examples/songs/audio" / name).read_bytes())
    lines = readme_lines()
    assert len(lines) == 2
    for line in lines:
        # the environment may lie elsewhere than in .venv
        command = line.replace(".venv/bin/wealy", f"'{sys.executable}' -m wealy_ray")
        env = {**environment(**s3.env()), "PATH": os.environ["PATH"]}
        done = subprocess.run(
            command,
            shell=True,
            cwd=REPOSITORY,
            env=env,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    reader = StoreReader.open(storage, f"{bucket}/states")
    assert reader.index.counts() == {"ok": 1, "failed": 0}
    assert reader.states("s2t002.m4a").shape[1] == 512
