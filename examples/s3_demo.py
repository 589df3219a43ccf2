"""A real S3 server on this machine, a bucket of sample songs, and the two S3 lines of the README run as written.

Run from the repository's folder with `make s3-demo`. The server (SeaweedFS, from PyPI) and its data are gone
afterwards.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.s3_server import S3Server

ROOT = Path(__file__).parents[1]
NUM_SONGS = 6


def readme_lines() -> list[str]:
    """The commands of the README that name the example bucket."""
    text = (ROOT / "README.md").read_text()
    return re.findall(r"^\.venv/bin/wealy .*s3://my-bucket.*$", text, re.MULTILINE)


def main() -> None:
    """Starts the server, fills the bucket, runs the lines, and ends with the first exit code that is not 0."""
    server = S3Server().start()
    try:
        os.environ.update(server.env())  # credentials are found where they usually are
        storage = server.storage()
        bucket = server.bucket("my-bucket")
        for song in sorted((ROOT / "examples/songs/audio").iterdir())[:NUM_SONGS]:
            storage.write(f"{bucket}/audio/{song.name}", song.read_bytes())
        for line in readme_lines():
            print(f"\n$ {line}", flush=True)
            subprocess.run(line, shell=True, check=True, cwd=ROOT)
        print(f"\n$ .venv/bin/wealy status {bucket}/states", flush=True)
        command = [".venv/bin/wealy", "status", f"{bucket}/states"]
        subprocess.run(command, check=True, cwd=ROOT)
    except subprocess.CalledProcessError as e:
        sys.exit(e.returncode)
    finally:
        server.close()


if __name__ == "__main__":
    main()
