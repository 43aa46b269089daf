"""`xicon-infer import-workflow`: what a user of ComfyUI sees."""

from __future__ import annotations

import json
import shlex

import pytest

from tests.workflow_graphs import LORA, NAMES, load, with_input, with_node
from xicon_infer.errors import InvalidRequest, MediaError
from xicon_infer.job import make_job
from xicon_infer.job_fields import FIELDS
from xicon_infer.job_flags import jobs_of, parse, run_parser
from xicon_infer.job_profiles import PRESETS
from xicon_infer.job_values import Lora
from xicon_infer.request_fields import OUTPUT_FIELDS, REQUEST_FIELDS
from xicon_infer.workflow import Imported, import_report
from xicon_infer.workflow_cli import main
from xicon_infer.workflow_cli_command import command, job_values
from xicon_infer.workflow_models import TRANSFORMERS, network_of, preset_of

TABLE = {option.name: option for option in FIELDS}


def job_of(line):
    """Returns the job of a printed command line, as the program itself would make it."""
    words = shlex.split(line)
    assert words[:2] == ["xicon-infer", "run"]
    (job,) = jobs_of(parse(run_parser(), words[2:]))
    return job


@pytest.fixture
def folder(tmp_path):
    """A folder with the graphs as files, and the media they name."""
    for name in NAMES:
        for kind in ("api", "ui"):
            graph = json.dumps(load(f"{name}_{kind}"))
            (tmp_path / f"{name}_{kind}.json").write_text(graph)
    for name in ("knight.png", "dance.mp4", "end.png"):
        (tmp_path / name).touch()
    return tmp_path


def run(folder, name, *words):
    return main([str(folder / f"{name}.json"), "--images-dir", str(folder), *words])


@pytest.mark.parametrize("kind", ["api", "ui"])
@pytest.mark.parametrize("name", NAMES)
def test_the_command_makes_the_same_job(name, kind, folder, capsys):
    assert run(folder, f"{name}_{kind}", "--command") == 0
    out, told = capsys.readouterr()
    warnings: list[str] = []
    wanted = make_job(job_values(import_report(load(f"{name}_api")), warnings))
    job = job_of(out)
    media = {"image", "end_image", "video"}
    for option in TABLE.keys() - media:
        assert getattr(job, option) == getattr(wanted, option), option
    assert {str(getattr(job, one).parent) for one in media if getattr(job, one)} <= {str(folder)}
    assert warnings == [line for line in warnings if line.split("warning: ")[-1] in told]


def test_a_command_says_what_the_graph_says(folder, capsys):
    run(folder, "scail_api", "--command")
    job = job_of(capsys.readouterr().out)
    assert (job.pipeline, job.preset, job.width, job.height) == ("scail", "fp8", 384, 704)
    assert (job.num_inference_steps, job.guidance_scale, job.shift) == (8, 1.5, 7.0)
    assert (job.scheduler, job.seed, job.fps, job.max_frames) == ("euler", 11, 20.0, 90)
    assert (job.pose_strength, job.pose_start, job.pose_end) == (1.1, 0.1, 0.6)
    assert (job.context_frames, job.context_overlap, job.freenoise) == (77, 20, False)
    assert (job.memory, job.blocks_to_swap, job.tile) == ("stream", 12, True)
    assert job.loras == (Lora("first.safetensors", 0.5), Lora(LORA, 1.0))
    assert (job.image_fit, job.draw_hands, job.pose_preview) == ("pad", False, True)
    assert (job.crf, job.audio, job.output.name) == (17, "source", "knight.mp4")
    assert job.clip_preprocess == "stretch"


def test_first_and_last_picture(folder, capsys):
    run(folder, "flf2v_ui", "--command")
    job = job_of(capsys.readouterr().out)
    assert job.preset == "flf2v-bf16"
    assert job.end_image == folder / "end.png"
    with pytest.raises(InvalidRequest, match="--command"):
        run(folder, "flf2v_ui", "--json")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "flf2v"])
def test_json_is_a_request(name, folder, capsys):
    assert run(folder, f"{name}_ui", "--json") == 0
    request = json.loads(capsys.readouterr().out)["input"]
    known = {field.name for field in REQUEST_FIELDS}
    assert request.keys() <= known
    assert request["output"].keys() <= {field.name for field in OUTPUT_FIELDS}
    assert request["mode"] == name
    for role in {"image", "video"} & request.keys():
        assert request[role]["path"].startswith(str(folder))


def test_a_graph_without_a_distilled_lora_asks_for_no_other(folder, capsys):
    graph = with_input(load("wan_t2v_api"), 55, "model", ["22", 0])
    (folder / "plain.json").write_text(json.dumps(graph))
    run(folder, "plain", "--json")
    request = json.loads(capsys.readouterr().out)["input"]
    assert (request["loras"], request["profile"]) == ([], "quality")
    run(folder, "plain", "--command")
    assert job_of(capsys.readouterr().out).loras == ()
    run(folder, "wan_t2v_api", "--json")
    assert "profile" not in json.loads(capsys.readouterr().out)["input"]


def test_the_summary_has_a_line_per_field(folder, capsys):
    assert run(folder, "scail_ui") == 0
    out, told = capsys.readouterr()
    assert out.startswith("mode: scail\n")
    assert "width: 384\n" in out
    assert "prompt: a knight dances\n" in out
    assert told.splitlines() == [
        "warning: 'pose_end' has no effect in 8 steps: they are the same as with 0.5",
        "warning: PreviewImage: only shows or saves something",
    ]


def test_warnings_go_to_standard_error(folder, capsys):
    graph = with_input(load("scail_api"), 41, "tiles", 4)
    graph = with_node(graph, 99, "MyNode")
    (folder / "told.json").write_text(json.dumps(graph))
    run(folder, "told", "--command")
    out, told = capsys.readouterr()
    assert "warning: node 41 WanVideoClipVisionEncode.tiles: 4 is not translated" in told
    assert "warning: node 99 MyNode: unknown, and not needed" in told
    job_of(out)


@pytest.mark.parametrize("around", ["input", "workflow", "prompt"])
def test_a_graph_inside_a_request_is_found(around, folder, capsys):
    inner = load("scail_ui") if around == "workflow" else load("scail_api")
    outer = {around: {"workflow": inner} if around == "input" else inner}
    (folder / "outer.json").write_text(json.dumps(outer))
    assert run(folder, "outer") == 0
    assert capsys.readouterr().out.startswith("mode: scail\n")


def test_missing_pictures_are_told(folder, capsys, tmp_path, monkeypatch):
    (folder / "knight.png").unlink()
    run(folder, "scail_api")
    assert f"knight.png is not in {folder}" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dance.mp4").unlink()
    main([str(folder / "scail_api.json")])
    assert "dance.mp4 is not here; name its folder with --images-dir" in capsys.readouterr().err


def test_urls_have_to_be_downloaded_for_a_command(folder, capsys):
    graph = with_input(load("scail_api"), 2, "video", "https://example.com/x/d.mp4?key=1")
    (folder / "url.json").write_text(json.dumps(graph))
    run(folder, "url", "--command")
    out, told = capsys.readouterr()
    assert job_of(out).video.name == "d.mp4"
    assert "download it as d.mp4" in told
    run(folder, "url", "--json")
    video = json.loads(capsys.readouterr().out)["input"]["video"]
    assert video == {"url": "https://example.com/x/d.mp4?key=1"}


def test_a_template_is_explained_but_is_no_command(folder, capsys):
    graph = with_input(load("scail_api"), 1, "image", "{{picture}}")
    (folder / "template.json").write_text(json.dumps(graph))
    assert run(folder, "template") == 0
    out, told = capsys.readouterr()
    assert "image: " not in out
    assert "LoadImage.image: {{picture}} is left out, fill it in" in told
    assert "Missing 'image'" in told
    with pytest.raises(InvalidRequest, match="Missing 'image'"):
        run(folder, "template", "--command")


def test_sizes_are_lowered_to_what_the_pipeline_needs():
    warnings: list[str] = []
    fields = {"mode": "scail", "width": 430, "height": 672, "image": "a", "video": "b"}
    values = job_values(Imported(fields), warnings)
    assert values["width"] == 416
    assert warnings == ["width 430 is lowered to 416: a multiple of 32 is needed"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [("sageattn", ["--attention=auto8"]), ("sdpa", []), ("flash_attn_2", [])],
)
def test_only_8_bit_attention_is_passed_on(kind, words):
    """The others give the same numbers, and the machine knows which of them is fastest."""
    loader = next(
        int(name)
        for name, node in load("scail_api").items()
        if node["class_type"] == "WanVideoModelLoader"
    )
    graph = with_input(load("scail_api"), loader, "attention_mode", kind)
    line = command(job_values(import_report(graph), []))
    assert [word for word in line.split() if word.startswith("--attention")] == words


def test_a_video_at_its_own_rate():
    graph = with_input(load("scail_api"), 2, "force_rate", 0)
    values = job_values(import_report(graph), [])
    assert job_of(command(values)).fps == "source"


@pytest.mark.parametrize("prompt", ["--help", "it's", 'a "b" $c `d`', "two\nlines", "ü", "a=b"])
def test_prompts_survive_the_shell(prompt):
    graph = with_input(load("wan_t2v_api"), 50, "positive_prompt", prompt)
    assert job_of(command(job_values(import_report(graph), []))).prompt == prompt


@pytest.mark.parametrize(
    ("node", "name", "value", "field"),
    [
        (55, "steps", 0, "num_inference_steps"),
        (55, "seed", -5, "seed"),
        (55, "scheduler", "flowmatch_pusa", "scheduler"),
        (40, "width", 9000, "width"),
        (40, "num_frames", 1000, "num_frames"),
        (23, "strength", 9, "loras.strength"),
    ],
)
def test_values_out_of_range_are_refused(node, name, value, field, folder):
    graph = with_input(load("wan_t2v_api"), node, name, value)
    (folder / "bad.json").write_text(json.dumps(graph))
    with pytest.raises(InvalidRequest) as caught:
        run(folder, "bad")
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("content", "code"),
    [
        *((b"{", "INVALID_JSON"), (b"\xff\xfe", "INVALID_JSON"), (b"\x89PNG", "INVALID_JSON")),
        *((b"{}", "WORKFLOW_FORMAT"), (b"[]", "WORKFLOW_FORMAT")),
    ],
)
def test_what_is_no_workflow(content, code, folder):
    (folder / "bad.json").write_bytes(content)
    with pytest.raises(InvalidRequest) as caught:
        run(folder, "bad")
    assert caught.value.code == code


def test_files_that_cannot_be_read(folder):
    with pytest.raises(MediaError) as caught:
        main([str(folder / "nowhere.json")])
    assert caught.value.code == "MEDIA_NOT_FOUND"
    with pytest.raises(MediaError):
        main([str(folder)])


@pytest.mark.parametrize(
    "words", [[], ["a", "b"], ["a", "--jsn"], ["a", "--json", "--command"], ["a", "--images-dir"]]
)
def test_wrong_words_are_refused(words):
    with pytest.raises(InvalidRequest):
        main(words)


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "--images-dir DIR" in capsys.readouterr().out


def test_nothing_reaches_the_terminal_raw(folder, capsys):
    graph = with_node(load("wan_t2v_api"), "\x1b[31m", "Evil\x07")
    graph = with_input(graph, 50, "positive_prompt", "\x1b]0;x\x07 \ud800")
    (folder / "raw.json").write_text(json.dumps(graph))
    with pytest.raises(InvalidRequest):
        run(folder, "raw")
    graph = with_input(graph, 50, "positive_prompt", "\x1b]0;x\x07")
    (folder / "raw.json").write_text(json.dumps(graph))
    run(folder, "raw")
    out, told = capsys.readouterr()
    assert (out + told).replace("\n", "").isprintable()


def test_presets_of_file_names_exist():
    files = {
        "scail": "SCAIL_fp8.safetensors",
        "steady_dancer": "SteadyDancer_fp16.gguf",
        "i2v": "i2v_480p_14B_fp8.safetensors",
        "i2v-720p": "i2v_720p_14B_bf16.safetensors",
        "flf2v": "flf2v_14B_fp8.safetensors",
        "t2v": "t2v_14B_fp16.safetensors",
        "t2v-1.3b": "t2v_1.3B_fp16.safetensors",
    }
    assert files.keys() == TRANSFORMERS.keys()
    for network, name in files.items():
        assert network_of(name) == network
        assert preset_of(name) in PRESETS[TRANSFORMERS[network]]
