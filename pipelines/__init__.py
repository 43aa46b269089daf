"""The recipes: one file is one product, read from top to bottom."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xicon_infer.errors import InvalidRequest

if TYPE_CHECKING:
    from pipelines.components import LoadOptions
    from pipelines.scail import ScailPipeline

TINY = "tiny"


def build_pipeline(
    name: str, preset: str = TINY, options: LoadOptions | None = None
) -> ScailPipeline:
    """Returns a pipeline with its components loaded.

    Args:
        name: "scail".
        preset: "tiny" (generated weights), or a preset of `weights_manifest.json`.
        options: device, precision, folders and LoRAs; float32 on the CPU if None.

    Raises:
        InvalidRequest: there is no such pipeline.
        WeightsError: a file is missing or does not fit.
    """
    if name != "scail":
        raise InvalidRequest(f"'pipeline' must be 'scail', got {name!r}", field="pipeline")
    from pipelines.components import LoadOptions, load_preset, load_tiny
    from pipelines.scail import ScailPipeline

    options = options or LoadOptions()
    loaded = load_tiny(name, options) if preset == TINY else load_preset(name, preset, options)
    return ScailPipeline(loaded)
