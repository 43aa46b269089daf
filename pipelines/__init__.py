"""The recipes: one file is one product, read from top to bottom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from xicon_infer.errors import InvalidRequest

if TYPE_CHECKING:
    from pipelines.components import Components
    from pipelines.loading import LoadOptions
    from pipelines.scail import ScailPipeline
    from pipelines.steady_dancer import SteadyDancerPipeline
    from pipelines.wan_video import WanVideoPipeline

Pipeline: TypeAlias = "ScailPipeline | SteadyDancerPipeline | WanVideoPipeline"

TINY = "tiny"

NAMES = ("scail", "steady_dancer", "wan_i2v", "wan_t2v")


def build_pipeline(name: str, preset: str = TINY, options: LoadOptions | None = None) -> Pipeline:
    """Returns a pipeline with its components loaded.

    Args:
        name: "scail", "steady_dancer", "wan_i2v" or "wan_t2v".
        preset: "tiny" (small; trained for scail, random otherwise), or a preset of
            `weights_manifest.json`.
        options: device, precision, folders and LoRAs; float32 on the CPU if None.

    Raises:
        InvalidRequest: there is no such pipeline.
        WeightsError: a file is missing or does not fit.
    """
    if name not in NAMES:
        allowed = ", ".join(NAMES)
        raise InvalidRequest(f"'pipeline' must be one of {allowed}, got {name!r}", field="pipeline")
    from pipelines.loading import LoadOptions, load_preset, load_tiny

    options = options or LoadOptions()
    loaded = load_tiny(name, options) if preset == TINY else load_preset(name, preset, options)
    return recipe_for(name, loaded)


def recipe_for(name: str, components: Components[Any]) -> Pipeline:
    """Returns the recipe of a pipeline around components that are loaded."""
    if name == "scail":
        from pipelines.scail import ScailPipeline

        return ScailPipeline(components)
    if name == "steady_dancer":
        from pipelines.steady_dancer import SteadyDancerPipeline

        return SteadyDancerPipeline(components)
    from pipelines.wan_video import WanVideoPipeline

    return WanVideoPipeline(components)
