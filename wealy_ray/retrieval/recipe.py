"""The recipe of an evaluation: what is compared, on which tracks, and where the numbers go."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from wealy_ray.config import Settings, StorageSettings


class AverageEmbedding(Settings):
    """Whisper-AvgEmb: the mean of a track's states, cosine."""

    kind: Literal["avg_embedding"]
    name: str = "Whisper-AvgEmb"
    positions: Literal["all", "text"] = "all"
    """`all` positions, as WEALY's authors; or only states that predict `text`."""
    standardise_by: str | None = None
    """Split by whose tracks each dimension is brought to mean 0 and variance 1; None: raw."""


class TranscriptBaseline(Settings):
    """Similarity of the stored transcripts."""

    kind: Literal["tfidf_words", "tfidf_characters", "more_like_this", "bm25"]
    name: str = ""
    """None given: the kind."""


class SentenceBaseline(Settings):
    """Cosine of a sentence encoder's vectors of the stored transcripts."""

    kind: Literal["sentence"]
    model: str
    """Name or folder, as sentence-transformers takes it."""
    name: str = ""


class Embeddings(Settings):
    """Vectors that `wealy embed` left in the store, or those of any system at a URI."""

    kind: Literal["embeddings"]
    name: str
    embedder_id: str | None = None
    """Which of the store's embeddings; None: the only ones."""
    uri: str | None = None
    """A Parquet file with `track_id`, `window` and `z`, a folder of them, or CLEWS's folder of `.pt` files; None: the
    vectors are the store's."""
    id_from_path: str | None = None
    """For `.pt` files: regular expression with one group that finds the track id in a path, or the URI of a `.json`
    file that gives the id of each path."""
    distance: Literal["cosine", "sqeuclidean"] = "cosine"
    reduction: str = Field(default="min", pattern=r"^(min|mean_min|bpwr-[1-9]\d*)$")
    """From the distances of all pairs of vectors to the one of two tracks."""

    @model_validator(mode="after")
    def _one_source(self) -> Embeddings:
        if self.uri is not None and self.embedder_id is not None:
            raise ValueError(
                f"'{self.name}' has both embedder_id and uri: name the store's vectors or others"
            )
        if self.uri is None and self.id_from_path is not None:
            raise ValueError(f"'{self.name}' has id_from_path, which goes with uri")
        return self


class DistanceMatrix(Settings):
    """Distances that were computed elsewhere: `.npy` [N, N], and its ids, one per line."""

    kind: Literal["matrix"]
    name: str
    uri: str
    ids: str


class Oracle(Settings):
    """The paper's ceiling: versions that both have a transcript are at distance 0, all else is random."""

    kind: Literal["oracle"]
    name: str = "oracle"


class Fusion(Settings):
    """Two systems as one: D = D_a + weight * D_b."""

    kind: Literal["fusion"]
    name: str
    of: tuple[str, str]
    """Names of two systems further up."""
    weight: float | Literal["tuned"] = 1.5
    """Of the second; 1.5 is the paper's, `tuned` takes the best of `weights` on `tuning_split`."""
    weights: tuple[float, ...] = Field(
        default=(0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0), min_length=1
    )
    """What is tried."""
    normalise: Literal["none", "z_score", "min_max", "rank", "learned"] = "none"
    """Per query, before the sum; `rank` is reciprocal rank fusion, `learned` a logistic regression fitted on
    `tuning_split`: both know no weight."""


SystemSettings = Annotated[
    AverageEmbedding | TranscriptBaseline | SentenceBaseline | Embeddings | DistanceMatrix | Oracle | Fusion,
    Field(discriminator="kind"),
]


class EvaluateResources(Settings):
    """How ranking is shared among Ray workers; none of it changes a number, `threads` excepted (last bits)."""

    threads: PositiveInt = 1
    """CPUs of one worker."""
    gpus: float = Field(default=0, ge=0)
    """GPUs of one worker; above 0 scores are computed there."""
    max_workers: PositiveInt | None = None
    """At most so many at a time; None: as many as the CPUs allow."""
    tiles_per_shard: PositiveInt = 8
    """Tiles of 256 queries that make one piece of work, and one file; what is lost with a worker."""
    held_gib: float = Field(default=4.0, ge=0)
    """GiB of one imported system's vectors that a worker may hold; more are written to `out`/vectors, and streamed."""


class EvaluateRecipe(Settings):
    """One evaluation: a manifest and a store (or vectors) in, numbers out."""

    manifest: str
    """Parquet manifest (any URI); its cliques and splits count, whatever they were at extraction."""
    out: str
    """Folder of the results (any URI)."""
    store: str | None = None
    """Store of states; None: only vectors and matrices from elsewhere are compared."""
    extractor_id: str | None = None
    """Which of the store's extractors; None: the only one."""
    index: PositiveInt | None = None
    """Which snapshot of the store; None: the latest."""
    split: str | None = None
    """Split whose tracks are queries and candidates; None: all tracks."""
    query_kinds: tuple[str, ...] | None = None
    """Kinds of versions that ask, e.g. `[cover]`; None: all."""
    candidate_kinds: tuple[str, ...] | None = None
    """Kinds of versions that may answer, e.g. `[original]`; None: all."""
    tuning_split: str | None = "val"
    """Split on which weights are chosen."""
    tune_on_test: bool = False
    """Must be set to choose weights on the evaluated split; the result says so."""
    languages: Literal["manifest", "detected"] = "manifest"
    """Languages of groups and views; `manifest` falls back to what Whisper detected where it names none."""
    without_states: Literal["drop", "rank_last"] = "drop"
    """Tracks that failed or were not extracted: left out, or ranked behind all others."""
    systems: tuple[SystemSettings, ...] = Field(min_length=1)
    """What is compared; rows for random and for the detected language alone always stand beside them."""
    seed: int = 0
    """Of the random row and the bootstrap."""
    storage: StorageSettings = StorageSettings()
    resources: EvaluateResources = EvaluateResources()
    progress_every_s: float = Field(default=30.0, gt=0)
    """Distance of two progress lines in a job log."""

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateRecipe:
        seen: set[str] = {"random"} if self.store is None else {"random", "same language"}
        fused: set[str] = set()
        for system in self.systems:
            name = name_of(system)
            if name in seen or name == "same language":
                raise ValueError(f"two systems are called '{name}'")
            if isinstance(system, Fusion):
                if system.normalise in ("rank", "learned") and "weight" in system.model_fields_set:
                    raise ValueError(
                        f"fusion '{name}' has a weight, which normalise: {system.normalise} knows nothing of"
                    )
                unknown = [part for part in system.of if part not in seen]
                if unknown:
                    raise ValueError(f"fusion '{name}': no system further up is called '{unknown[0]}'")
                of_fusion = [part for part in system.of if part in fused]
                if self.tuned(system) and of_fusion:
                    raise ValueError(f"fusion '{name}' cannot be tuned over another fusion, '{of_fusion[0]}'")
                fused.add(name)
                if self.tuned(system) and self.tuning_split is None:
                    raise ValueError(f"fusion '{name}' is tuned: tuning_split must be named")
                if self.tuned(system) and self._overlaps and not self.tune_on_test:
                    raise ValueError(
                        f"fusion '{name}' would be tuned on tracks that it is reported on; set split and "
                        "tuning_split to different splits, or tune_on_test: true"
                    )
            elif self.store is None and getattr(system, "uri", None) is None:
                raise ValueError(f"system '{name}' needs a store")
            seen.add(name)
        return self

    @property
    def _overlaps(self) -> bool:
        return self.split is None or self.split == self.tuning_split

    @property
    def tunes_on_test(self) -> bool:
        """Whether a fusion learns from tracks that it is reported on."""
        return self._overlaps and any(isinstance(s, Fusion) and self.tuned(s) for s in self.systems)

    @staticmethod
    def tuned(system: Fusion) -> bool:
        """Whether the fusion has something to learn."""
        return system.weight == "tuned" or system.normalise == "learned"


def name_of(system: SystemSettings) -> str:
    """What a system is called in tables."""
    return system.name or {"sentence": getattr(system, "model", "")}.get(system.kind, system.kind)
