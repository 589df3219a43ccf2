"""A manifest from a folder or bucket prefix full of audio."""

from __future__ import annotations

import pyarrow as pa

from wealy_ray.errors import ManifestError
from wealy_ray.storage import Storage

AUDIO_SUFFIXES = (
    *(
        ".aac",
        ".aif",
        ".aiff",
        ".flac",
        ".m4a",
        ".m4b",
        ".mka",
        ".mkv",
        ".mov",
        ".mp2",
        ".mp3",
        ".mp4",
        ".oga",
    ),
    *(".ogg", ".opus", ".wav", ".webm", ".wma"),
)


def manifest_from_folder(storage: Storage, folder: str) -> pa.Table:
    """Lists the audio objects below `folder`, in order of their names.

    `track_id` is the path below the folder, suffix included (two formats of one song are two tracks).

    Raises:
        ManifestError: There is no audio below the folder.
    """
    base = storage.canonical(folder).rstrip("/") + "/"
    rows = [
        {"track_id": info.uri.removeprefix(base), "audio_uri": info.uri, "etag": info.etag, "size": info.size}
        for info in storage.list(folder)
        if info.uri.lower().endswith(AUDIO_SUFFIXES)
    ]
    for row in rows:
        try:
            str(row["audio_uri"]).encode()
        except UnicodeEncodeError as e:
            raise ManifestError(f"the file name {row['audio_uri']!r} is not UTF-8; rename the file") from e
    if not rows:
        raise ManifestError(f"no audio files below {folder} (looked for {' '.join(AUDIO_SUFFIXES)})")
    return pa.Table.from_pylist(rows)
