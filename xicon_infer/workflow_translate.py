"""From a ComfyUI graph to the fields of a request: what each node says in this project's words.

Only what the graph says becomes a field. Values are passed on as they are; the validator of
requests checks types and ranges, so that a graph and a request are refused with the same words.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from xicon_infer.types import FEWEST_CACHED_STEPS
from xicon_infer.workflow_find import Film, Reading, alone, content, only_one
from xicon_infer.workflow_graph import Link, Node, chain, cut, refuse, source
from xicon_infer.workflow_models import TRANSFORMERS, network_of, preset_of
from xicon_infer.workflow_nodes import ATTENTION, CACHES, COMBINES, DEFAULTS, MODEL_STEPS
from xicon_infer.workflow_options import named
from xicon_infer.workflow_values import UNKNOWN, fold, number_of

PLACEHOLDER = re.compile(r"\{\{\w+\}\}")
"""A blank in a template that was not filled in."""

_DIGITS = 9
"""Decimals of a number that count: widgets store 5 as 5.000000000000001."""

_SCHEDULERS = ("WanVideoSchedulerv2", "WanVideoScheduler")
_LORAS = ("WanVideoLoraSelect", "WanVideoLoraSelectMulti", "WanVideoLoraSelectByName")
_TEXTS = ("WanVideoTextEncodeCached", "WanVideoTextEncode")
_MOST_LORAS = 16
"""Ends of chains of LoRA nodes; a request takes fewer LoRAs."""

_NO_LORA = ("", "none", "None")


@dataclass
class Found:
    """What was read: `fields` of a request, and `options` that the command line alone has."""

    fields: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def put(self, **values: Any) -> None:
        """Sets the fields that have a value."""
        self.fields |= {name: value for name, value in values.items() if value is not None}


def raw_of(reading: Reading, node: Node, name: str) -> Any:
    """Returns the constant of an input, the node's default, None for neither, or `UNKNOWN`."""
    reading.used.add(node.id)
    value = node.inputs.get(name)
    if value is None:
        value = DEFAULTS.get(node.type, {}).get(name)
    return fold(reading.graph, value, reading.memo)


def text_of(reading: Reading, node: Node, name: str) -> Any:
    """Returns the constant of an input; None with a warning where only running would tell it.

    Raises:
        InvalidRequest: WORKFLOW_UNSUPPORTED, the latter in a request.
    """
    value = raw_of(reading, node, name)
    if isinstance(value, str) and PLACEHOLDER.fullmatch(value):
        # A request with one was refused before; the command line leaves it to the user.
        reading.warnings.append(f"{named(node, name)}: {cut(value)} is left out, fill it in")
        return None
    if value is not UNKNOWN:
        return value
    if reading.strict:
        place = f"Workflow node '{cut(node.id)}' ({cut(node.type)})"
        raise refuse(f"{place}: '{cut(name)}' does not lead to a constant")
    reading.warnings.append(f"{named(node, name)}: computed by the graph, so it is left out")
    return None


def value_of(reading: Reading, node: Node, name: str) -> Any:
    """Returns the constant of an input, numbers read from text; None as `text_of`."""
    value = number_of(text_of(reading, node, name))
    if isinstance(value, float) and math.isfinite(value):
        return round(value, _DIGITS)
    return value


def read_sampling(reading: Reading, film: Film, found: Found) -> None:
    """Reads steps, guidance, seed, schedule, and the windows of long films."""
    sampler = film.sampler
    found.put(cfg=value_of(reading, sampler, "cfg"), seed=value_of(reading, sampler, "seed"))
    scheduler = _scheduler(reading, sampler)
    if scheduler is not None:
        found.put(
            scheduler=text_of(reading, scheduler, "scheduler"),
            steps=value_of(reading, scheduler, "steps"),
            shift=value_of(reading, scheduler, "shift"),
        )
    _read_windows(reading, sampler, found)
    _read_cache(reading, sampler, found)


def _scheduler(reading: Reading, sampler: Node) -> Node | None:
    """Returns the node that says steps and shift: a linked one wins over the sampler's own."""
    start = source(reading.graph, sampler, "scheduler")
    if start is not None and start[0].type in _SCHEDULERS:
        return start[0]
    if sampler.type != "WanVideoSamplerv2":
        return sampler
    return only_one(alone(reading, _SCHEDULERS)) if reading.sketch else None


def _sampler_input(reading: Reading, sampler: Node, name: str) -> tuple[Node, Link] | None:
    """Returns what leads to an input of the sampler, or to that of its extra arguments."""
    start = source(reading.graph, sampler, name)
    extra = source(reading.graph, sampler, "extra_args")
    if start is None and extra is not None:
        reading.used.add(extra[0].id)
        start = source(reading.graph, extra[0], name)
    return start


def _read_cache(reading: Reading, sampler: Node, found: Found) -> None:
    """Reads the step cache; a request has no field for it."""
    start = _sampler_input(reading, sampler, "cache_args")
    if start is None:
        return
    node, steps = start[0], found.fields.get("steps")
    steps = steps if isinstance(steps, int) else 0
    reading.used.add(node.id)
    enough = steps >= FEWEST_CACHED_STEPS
    if reading.strict or node.type not in CACHES or not enough:
        few = "" if enough else f", caches need {FEWEST_CACHED_STEPS} steps"
        told = f"{named(sampler, 'cache_args')}: connected is not translated"
        reading.warnings.append(f"{told}, every step is computed{few}")
        return
    method, threshold = CACHES[node.type]
    first, last = value_of(reading, node, "start_step"), value_of(reading, node, "end_step")
    if isinstance(last, int) and last >= steps - 1:
        last = -1
    if isinstance(first, int) and first >= steps:
        reading.warnings.append(f"{named(node, 'start_step')}: {first}, so that no step is skipped")
        return
    values = {"threshold": value_of(reading, node, threshold), "start": first, "end": last}
    options = {f"step_cache_{name}": value for name, value in values.items() if value is not None}
    found.options |= {"step_cache": method, **options}


def _read_windows(reading: Reading, sampler: Node, found: Found) -> None:
    start = _sampler_input(reading, sampler, "context_options")
    node = start[0] if start else None
    if node is None and reading.sketch:
        node = only_one(alone(reading, ["WanVideoContextOptions"]))
    if node is None or node.type != "WanVideoContextOptions":
        return
    numbers = ("context_frames", "context_stride", "context_overlap", "freenoise")
    found.put(**{name: value_of(reading, node, name) for name in numbers})
    words = ("context_schedule", "fuse_method")
    found.put(**{name: text_of(reading, node, name) for name in words})


def read_texts(reading: Reading, sampler: Node, found: Found) -> None:
    """Reads the two prompts.

    Raises:
        InvalidRequest: WORKFLOW_UNSUPPORTED, another node makes the text embeds.
    """
    start = source(reading.graph, sampler, "text_embeds")
    node = None
    for one, _ in chain(reading.graph, start, lambda node, _: _text_step(node)):
        node = one
        reading.used.add(one.id)
    if node is None and reading.sketch:
        node = only_one(alone(reading, _TEXTS))
    if node is None:
        return
    if node.type == "WanVideoTextEmbedBridge":
        names = {"positive": "prompt", "negative": "negative_prompt"}
        for name, target in names.items():
            text = source(reading.graph, node, name)
            if text is None:
                continue
            if text[0].type != "CLIPTextEncode":
                raise refuse(f"Workflow uses unsupported nodes: {cut(text[0].type)}")
            found.put(**{target: text_of(reading, text[0], "text")})
    elif node.type == "WanVideoTextEncodeSingle":
        found.put(prompt=text_of(reading, node, "prompt"))
    elif node.type in _TEXTS:
        found.put(
            prompt=text_of(reading, node, "positive_prompt"),
            negative_prompt=text_of(reading, node, "negative_prompt"),
        )
    else:
        raise refuse(f"Workflow uses unsupported nodes: {cut(node.type)}")
    _check_syntax(reading, node, found.fields.get("prompt"))


def _text_step(node: Node) -> str | None:
    return "original_text_embeds" if node.type == "WanVideoApplyNAG" else None


def _check_syntax(reading: Reading, node: Node, prompt: object) -> None:
    """Warns of a prompt in which the wrapper would see several prompts or weights."""
    if not isinstance(prompt, str):
        return
    where = named(node, "positive_prompt")
    if "|" in prompt or "[1]" in prompt:
        reading.warnings.append(
            f"{where}: one prompt here, several prompts in ComfyUI ('|', '[1]')"
        )
    if "(" in prompt and ":" in prompt[prompt.index("(") :]:
        reading.warnings.append(f"{where}: weights like (word:1.2) are read as plain text")


def read_model(reading: Reading, film: Film, mode: str, found: Found) -> None:
    """Reads the transformer and what is attached to it: LoRAs, swapped blocks, attention.

    Raises:
        InvalidRequest: WORKFLOW_UNSUPPORTED, a node on the way changes the model otherwise.
    """
    loras: list[Node] = []
    swaps: list[Node] = []
    loader = None
    start = source(reading.graph, film.sampler, "model")
    for node, _ in chain(reading.graph, start, lambda node, _: _model_step(node)):
        reading.used.add(node.id)
        loras += _attached(reading, node, "lora")
        swaps += _attached(reading, node, "block_swap_args")
        loader = node
    if loader is not None and loader.type != "WanVideoModelLoader":
        raise refuse(f"Workflow uses unsupported nodes: {cut(loader.type)}")
    if reading.sketch:
        loader = loader or only_one(alone(reading, ["WanVideoModelLoader"]))
        swaps = swaps or alone(reading, ["WanVideoBlockSwap"])
        loras = loras or sorted(alone(reading, _LORAS), key=content)
    if loras or loader is not None:
        found.put(loras=_loras(reading, loras))
    if swaps:
        found.put(blocks_to_swap=value_of(reading, swaps[0], "blocks_to_swap"))
    if loader is not None:
        reading.used.add(loader.id)
        _read_loader(reading, loader, mode, found)


def _model_step(node: Node) -> str | None:
    return "model" if node.type in MODEL_STEPS else None


def _attached(reading: Reading, node: Node, name: str) -> list[Node]:
    start = source(reading.graph, node, name)
    return [start[0]] if start else []


def _read_loader(reading: Reading, loader: Node, mode: str, found: Found) -> None:
    attention = text_of(reading, loader, "attention_mode")
    if isinstance(attention, str):
        found.put(attention_mode=ATTENTION.get(attention, attention))
    name = text_of(reading, loader, "model")
    if not isinstance(name, str):
        return
    network, preset = network_of(name), preset_of(name)
    if network is not None and TRANSFORMERS.get(network) != mode:
        message = f"{named(loader, 'model')}: {cut(name)} is not a model for {mode}"
        reading.warnings.append(f"{message}; the weights of {mode} are used")
    elif preset is not None:
        found.options["preset"] = preset


def _loras(reading: Reading, ends: list[Node]) -> list[dict[str, Any]]:
    """Returns the LoRAs that chains of select nodes end in, in the order of the chains."""
    loras: list[dict[str, Any]] = []
    ends = list({end.id: end for end in ends}.values())
    if len(ends) > _MOST_LORAS:
        raise refuse("Workflow has too many LoRA nodes")
    for end in ends:
        steps = chain(reading.graph, (end, Link(end.id, 0)), lambda node, _: "prev_lora")
        for node in reversed([node for node, _ in steps]):
            reading.used.add(node.id)
            if node.type not in _LORAS:
                raise refuse(f"Workflow uses unsupported nodes: {cut(node.type)}")
            loras += _selected(reading, node)
    return loras


def _selected(reading: Reading, node: Node) -> list[dict[str, Any]]:
    """Returns the LoRAs that one select node names; none and strength 0 are left out."""
    pairs = [("lora", "strength")]
    if node.type == "WanVideoLoraSelectByName":
        pairs = [("lora_name", "strength")]
    elif node.type == "WanVideoLoraSelectMulti":
        pairs = [(f"lora_{number}", f"strength_{number}") for number in range(5)]
    found = []
    for name, strength in pairs:
        if node.type == "WanVideoLoraSelectMulti" and name not in node.inputs:
            continue
        file = text_of(reading, node, name)
        if isinstance(file, str):
            file = file.replace("\\", "/").rpartition("/")[2]
        factor = value_of(reading, node, strength)
        factor = 1.0 if factor is None else factor
        if file is not None and file not in _NO_LORA and factor != 0:
            found.append({"name": file, "strength": factor})
    return found


def read_output(reading: Reading, film: Film, found: Found, video: Node | None) -> None:
    """Reads how the film is decoded and written."""
    if film.decode is not None:
        found.put(vae_tiling=value_of(reading, film.decode, "enable_vae_tiling"))
        _check_tiles(reading, film.decode, found)
    if film.between and not reading.strict:
        what = ", ".join(film.between)
        message = f"{what}: not translated, the film is written as it is decoded"
        reading.warnings.append(message)
    combine = film.combine
    if combine is None:
        return
    output: dict[str, Any] = {}
    if combine.type == "VHS_VideoCombine":
        output["crf"] = value_of(reading, combine, "crf")
        prefix = _prefix(text_of(reading, combine, "filename_prefix"))
        output["filename_prefix"] = prefix
    if video is not None:
        sound = source(reading.graph, combine, "audio")
        output["audio"] = "auto" if sound else None if reading.sketch else "none"
        if sound and sound[0].id != video.id:
            message = f"{named(combine, 'audio')}: the sound of the driving video is used"
            reading.warnings.append(message)
    found.put(output={name: value for name, value in output.items() if value is not None})
    _read_rate(reading, combine, found, video)


def _check_tiles(reading: Reading, decode: Node, found: Found) -> None:
    sizes = {"tile_x": 272, "tile_y": 272, "tile_stride_x": 144, "tile_stride_y": 128}
    for name, usual in sizes.items():
        value = value_of(reading, decode, name)
        if found.fields.get("vae_tiling") is True and value not in (None, usual):
            message = f"{named(decode, name)}: {value} is not translated, tiles have {usual}"
            reading.warnings.append(message)


def _prefix(text: object) -> str | None:
    """Returns the start of a file name as a request allows it; folders and dates are left out."""
    if not isinstance(text, str):
        return None
    last = text.replace("\\", "/").rpartition("/")[2].partition("%")[0]
    kept = "".join(c for c in last if c.isascii() and (c.isalnum() or c in "._-"))
    return kept[:64].strip(".") or None


def _read_rate(reading: Reading, combine: Node, found: Found, video: Node | None) -> None:
    """Takes the frame rate of the writer where nothing drives, else compares it."""
    rate = value_of(reading, combine, COMBINES[combine.type])
    if video is None:
        found.put(fps=rate)
        return
    fps, every = found.fields.get("fps"), found.fields.get("select_every_nth", 1)
    if rate is not None and (rate != fps or every != 1):
        where = named(combine, COMBINES[combine.type])
        message = f"{where}: {rate} is not used, the film plays as fast as the driving video"
        reading.warnings.append(message)
