"""What a ComfyUI graph says about pictures, driving videos, poses and sizes."""

from __future__ import annotations

from typing import Any

from xicon_infer.workflow_find import (
    EMBEDS,
    Film,
    Reading,
    find_embeds,
    find_picture,
    find_video,
    image_chain,
    only_one,
)
from xicon_infer.workflow_graph import Link, Node, at, link_of, linked, refuse, source
from xicon_infer.workflow_models import network_of
from xicon_infer.workflow_nodes import DRAWERS, PICTURES, RESIZES, SUFFIXES, VIDEOS
from xicon_infer.workflow_options import named
from xicon_infer.workflow_translate import Found, raw_of, text_of, value_of
from xicon_infer.workflow_values import UNKNOWN

_REFERENCE = "WanVideoAddSCAILReferenceEmbeds"
_POSE = {"scail": "WanVideoAddSCAILPoseEmbeds", "steady_dancer": "WanVideoAddSteadyDancerEmbeds"}
_START = ("WanVideoImageToVideoEncode", "WanVideoImageClipEncode")
_ROUND = 8
"""VHS_LoadVideo gives sizes in multiples of 8 (formats AnimateDiff and Wan)."""

_SLOTS = {"width": 1, "height": 2}
"""Side -> the output that gives it, of all nodes that give sizes."""

_MOST_RESIZES = 16
"""Nodes in a row that take their size from another one."""

_KEEPS = ("crop", "resize", "pad", "stretch")


def read_media(reading: Reading, film: Film, found: Found) -> tuple[str, Node | None]:
    """Reads mode, pictures, videos, poses, size and length.

    Returns:
        The mode, and the node that loads the driving video or pose video.

    Raises:
        InvalidRequest: WORKFLOW_UNSUPPORTED, something is made by the graph that has to be loaded.
    """
    embeds = find_embeds(reading, film.sampler)
    reading.used |= {node.id for node in embeds.values()}
    mode = next((EMBEDS[name] for name in EMBEDS if name in embeds), "wan_t2v")
    found.put(mode=mode)
    resize = _read_pictures(reading, mode, embeds, found)
    video = None
    if mode in _POSE:
        video = _read_video(reading, mode, embeds, found)
    target = next(
        (embeds[name] for name in (*_START, "WanVideoEmptyEmbeds") if name in embeds), None
    )
    _read_size(reading, target, resize, found)
    if target is not None:
        _read_length(reading, target, found)
    return mode, video


def _read_pictures(
    reading: Reading, mode: str, embeds: dict[str, Node], found: Found
) -> Node | None:
    """Reads reference, start and end picture; returns the node that resizes the first."""
    if mode == "wan_t2v":
        return None
    owner = embeds.get(_REFERENCE) if mode == "scail" else None
    names: tuple[str, ...] = ("ref_image",)
    if mode != "scail":
        owner = next((embeds[name] for name in _START if name in embeds), None)
        names = ("start_image", "image")
    steps = find_picture(reading, owner, *names)
    picture = steps[-1][0] if steps else None
    if picture is None and (reading.sketch or mode == "scail"):
        picture = only_one(reading.of(*PICTURES))
    if picture is not None:
        found.put(image=_file(reading, picture, "image"))
    resize = next((node for node, _ in steps if node.type in RESIZES), None)
    if resize is None and not steps and picture is not None:
        resize = only_one(_resizers(reading, picture))
    if resize is not None:
        keep = text_of(reading, resize, "keep_proportion")
        found.put(image_resize=_keep(reading, resize, keep))
    end = find_picture(reading, owner, "end_image") if mode == "wan_i2v" else []
    if end:
        _read_end(reading, end[-1][0], found)
    return resize


def _resizers(reading: Reading, picture: Node) -> list[Node]:
    found = []
    for node in reading.of(*RESIZES):
        start = source(reading.graph, node, "image")
        if start is not None and start[0].id == picture.id:
            found.append(node)
    return found


def _keep(reading: Reading, resize: Node, keep: Any) -> Any:
    """Returns how the picture gets its size, in the words of a request."""
    if keep is None or keep in ("", False):
        return "stretch" if resize.type == "ImageResizeKJ" or keep is False else None
    if keep is True:
        return "resize"
    if isinstance(keep, str) and keep not in _KEEPS and keep.startswith("pad"):
        reading.warnings.append(f"{named(resize, 'keep_proportion')}: {keep} becomes pad")
        return "pad"
    if keep == "total_pixels":
        reading.warnings.append(f"{named(resize, 'keep_proportion')}: total_pixels becomes resize")
        return "resize"
    return keep


def _read_end(reading: Reading, picture: Node, found: Found) -> None:
    if reading.strict:
        raise refuse("Workflow has an 'end_image'; a request takes no picture for the end")
    found.options["end_image"] = _file(reading, picture, "image")


def _file(reading: Reading, node: Node, name: str) -> Any:
    """Returns the file that a loader reads, as written, without the word for ComfyUI's folder."""
    value = text_of(reading, node, name)
    if isinstance(value, str):
        for suffix in SUFFIXES:
            value = value.removesuffix(suffix)
    return value


def _read_video(reading: Reading, mode: str, embeds: dict[str, Node], found: Found) -> Node | None:
    """Reads the driving video or pose video, and how the pose acts."""
    pose = embeds.get(_POSE[mode])
    names = ("pose_images",) if mode == "scail" else ("pose_latents_positive",)
    video, drawer = find_video(reading, pose, *names)
    connected = pose is not None and linked(pose, names[0])
    if video is None:
        video = only_one(reading.of(*VIDEOS))
        drawer = drawer or only_one(reading.of(*DRAWERS))
    if drawer is not None:
        _read_drawing(reading, drawer, found)
    if video is not None:
        role = "pose_video" if connected and drawer is None else "video"
        found.put(**{role: _file(reading, video, "video")})
        _read_frames(reading, video, found)
    if pose is not None:
        _read_strength(reading, mode, pose, embeds.get(_REFERENCE), found)
    return video


def _read_frames(reading: Reading, video: Node, found: Found) -> None:
    rate = value_of(reading, video, "force_rate")
    found.put(
        fps="source" if rate == 0 else rate,
        max_frames=value_of(reading, video, "frame_load_cap"),
        skip_frames=value_of(reading, video, "skip_first_frames"),
        select_every_nth=value_of(reading, video, "select_every_nth"),
    )


def _read_drawing(reading: Reading, drawer: Node, found: Found) -> None:
    """Reads what is drawn of the pose; without 2-D poses there is no face, hand or fit."""
    reading.used.add(drawer.id)
    if drawer.type != "RenderNLFPoses":
        return
    whole = linked(drawer, "dw_poses") or not linked(drawer, "nlf_poses")
    for name in ("draw_face", "draw_hands"):
        value = value_of(reading, drawer, name)
        found.put(**{name: value if whole else False})
    if not linked(drawer, "ref_dw_pose") and linked(drawer, "nlf_poses"):
        found.options["align"] = "off"


def _read_strength(
    reading: Reading, mode: str, pose: Node, reference: Node | None, found: Found
) -> None:
    found.put(
        pose_start=value_of(reading, pose, "start_percent"),
        pose_end=value_of(reading, pose, "end_percent"),
    )
    if mode == "scail":
        found.put(pose_strength=value_of(reading, pose, "strength"))
        if reference is not None:
            found.put(ref_strength=value_of(reading, reference, "strength"))
            _read_reference_range(reading, reference, found)
        return
    parts = {
        name: value_of(reading, pose, name)
        for name in ("pose_strength_spatial", "pose_strength_temporal")
    }
    spatial, temporal = parts.values()
    if spatial == temporal:
        found.put(pose_strength=spatial)
    else:
        found.options |= {name: value for name, value in parts.items() if value is not None}
    if not linked(pose, "pose_latents_negative"):
        found.put(condition_guide_scale=0.0)


def _read_reference_range(reading: Reading, reference: Node, found: Found) -> None:
    usual = {"ref_start": ("start_percent", 0), "ref_end": ("end_percent", 1)}
    for option, (name, default) in usual.items():
        value = value_of(reading, reference, name)
        if value is not None and value != default:
            found.options[option] = value


def _read_size(reading: Reading, target: Node | None, resize: Node | None, found: Found) -> None:
    """Reads width and height of the film: of the target, else of the resized reference."""
    clip = target is not None and target.type == "WanVideoImageClipEncode"
    for side in _SLOTS:
        value: Any = None
        if target is not None:
            name = f"generation_{side}" if clip else side
            value = raw_of(reading, target, name)
            if value is UNKNOWN:
                link = link_of(target.inputs[name])
                value = _side(reading, link, side, 0) if link else None
                if value is None:
                    message = "follows a file, so it is left out; give"
                    reading.warnings.append(f"{named(target, name)}: {message} --{side}")
            else:
                value = value_of(reading, target, name)
        elif resize is not None:
            value = _resized(reading, resize, side, 0)
        found.put(**{side: value})


def _side(reading: Reading, link: Link, side: str, depth: int) -> Any:
    """Returns a side of the picture that a size output belongs to, None if a file decides."""
    if link.slot != _SLOTS[side] or depth > _MOST_RESIZES:
        return None
    for node, _ in image_chain(reading, (at(reading.graph, link), link)):
        if node.type in RESIZES:
            return _resized(reading, node, side, depth + 1)
        if node.type in VIDEOS:
            return _loaded(reading, node, side)
        if node.type in DRAWERS:
            return value_of(reading, node, side)
    return None


def _resized(reading: Reading, resize: Node, side: str, depth: int) -> Any:
    """Returns the width or height that a resize node gives; it floors to its own multiple."""
    value = raw_of(reading, resize, side)
    if value is UNKNOWN:
        link = link_of(resize.inputs[side])
        return _side(reading, link, side, depth) if link else None
    value = value_of(reading, resize, side)
    multiple = value_of(reading, resize, "divisible_by")
    whole = all(isinstance(one, int) and not isinstance(one, bool) for one in (value, multiple))
    if value == 0:
        return None
    return value - value % multiple if whole and multiple > 1 else value


def _loaded(reading: Reading, video: Node, side: str) -> Any:
    """Returns the width or height that a video loader gives, None if the file decides."""
    wanted = [value_of(reading, video, f"custom_{name}") for name in ("width", "height")]
    if not all(isinstance(value, int) and value > 0 for value in wanted):
        return None
    value = wanted[0] if side == "width" else wanted[1]
    return (value + _ROUND // 2) // _ROUND * _ROUND


def _read_length(reading: Reading, target: Node, found: Found) -> None:
    """Reads the number of frames; a number that comes from the loaded video is left out."""
    value = raw_of(reading, target, "num_frames")
    if value is not UNKNOWN:
        found.put(num_frames=value_of(reading, target, "num_frames"))
        return
    link = link_of(target.inputs["num_frames"])
    steps = image_chain(reading, (at(reading.graph, link), link)) if link else []
    if not steps or steps[-1][0].type not in (*VIDEOS, *DRAWERS):
        text_of(reading, target, "num_frames")


def shows_pose(reading: Reading, node: Node) -> bool:
    """Returns True if a writer is given the drawn pose and keeps it."""
    steps = image_chain(reading, source(reading.graph, node, "images"))
    drawn = bool(steps) and steps[-1][0].type in DRAWERS
    return drawn and raw_of(reading, node, "save_output") is True


def read_preview(reading: Reading, film: Film, found: Found) -> None:
    """Asks for the pose as a video if the graph writes one."""
    writers = reading.of("VHS_VideoCombine")[:64]
    others = [node for node in writers if film.combine is None or node.id != film.combine.id]
    if any(shows_pose(reading, node) for node in others):
        found.fields.setdefault("output", {})["return_pose_video"] = True


def read_views(reading: Reading, reached: set[str], mode: str, found: Found) -> None:
    """Reads options that only the command line has: CLIP's view, and the network for keypoints.

    Args:
        reading: the graph.
        reached: ids of the nodes that the film depends on.
        mode: what is made.
        found: gets the options.
    """
    for node in reading.of("WanVideoClipVisionEncode"):
        if mode != "wan_t2v" and node.id in reached:
            crop = text_of(reading, node, "crop")
            if crop in ("center", "disabled"):
                found.options["clip_preprocess"] = "center" if crop == "center" else "stretch"
    for node in reading.of("OnnxDetectionModelLoader"):
        name = raw_of(reading, node, "vitpose_model")
        if mode in _POSE and node.id in reached and isinstance(name, str):
            network = network_of(name)
            if network in ("vitpose-h", "vitpose-l"):
                found.options["keypoint_model"] = network
