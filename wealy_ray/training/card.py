"""What a model says of itself, for people: the README.md of its directory."""

from __future__ import annotations

import json
from typing import Any

from wealy_ray.model import ModelConfig

CARD = """# {title}

Embeds a recording by what is sung in it: {fed} in, one vector of {output_dim} numbers out;
recordings that share their lyrics are near by cosine (WEALY, arXiv 2510.08176). Trained with wealy-ray.

## Use

```python
import wealy_ray

model = wealy_ray.load_model("this folder")
model.check_extractor(extractor_id)  # of the states; others are refused
vectors = model.network(states, lengths)  # float [B, T, {input_dim}], int64 [B] -> [B, {output_dim}]
```

It is fed {kinds} only, at most {length} at a time. `wealy embed` embeds a whole store so.

## Data

| | |
|---|---|
{data}

## Result

| | |
|---|---|
{metrics}

## Network

{parameters:,} weights. {crop}

```json
{network}
```

## Extractor

`{extractor_id}`

```json
{extractor}
```
"""


def model_card(config: ModelConfig, extractor: dict[str, Any], parameters: int, title: str) -> str:
    """The card's text.

    Args:
        config: What the directory holds.
        extractor: The store's `extractor.json`.
        parameters: Numbers that were trained.
        title: Name of the model.
    """
    fed, kinds = "states of Whisper's decoder", "states of all kinds"
    if config.kinds:
        kinds = f"states that predict {', '.join(config.kinds)}"
    if config.sentences:
        fed, kinds = f"the sentences that Whisper hears as vectors of `{config.sentences}`", "sentences"
    return CARD.format(
        title=title,
        fed=fed,
        input_dim=config.input_dim,
        output_dim=config.model.output_dim,
        data=_rows(config.data),
        metrics=_rows(config.metrics),
        parameters=parameters,
        crop=f"It saw crops of {config.crop} {kinds}.",
        kinds=kinds,
        length=config.crop,
        network=config.model.model_dump_json(indent=1),
        extractor_id=config.extractor_id,
        extractor=json.dumps(extractor, indent=1),
    )


def _rows(facts: dict[str, Any]) -> str:
    return "\n".join(f"| {name.replace('_', ' ')} | {_words(value)} |" for name, value in facts.items())


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_words(v)} {k}" for k, v in value.items())
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
    )
