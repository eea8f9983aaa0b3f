"""A user's own captioned pictures as samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import PIPELINES, PipelineCase

from diffusers_linattn import make_samples
from diffusers_linattn.samples import Samples, encode_images
from diffusers_linattn.samples.shards import read_shard

import tiny


CALL: dict[str, Any] = {
    "resolutions": [(24, 32), (32, 16)],
    "batch_size": 2,
    "call_arguments": {"max_sequence_length": 8},
}
SIZES = [(40, 60), (64, 30), (24, 32), (33, 40), (60, 31)]
CAPTIONS = ["a cat", "a dog", "a cat", "the red cat", "a dog"]


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    """A smooth picture, so that resizing it by other means gives nearly the same."""
    small = np.random.default_rng(seed).integers(0, 255, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for i, (size, caption) in enumerate(zip(SIZES, CAPTIONS, strict=True)):
        picture(size, i).save(tmp_path / "pictures" / f"{i}.png")
        (tmp_path / "pictures" / f"{i}.txt").write_text(caption + "\n")
    return tmp_path / "pictures"


def shifted(pipe: Any) -> Any:
    """With a VAE whose numbers are scaled and shifted, as real ones are."""
    pipe.vae.register_to_config(scaling_factor=0.36, shift_factor=0.12)
    return pipe


def test_pictures_become_samples_that_decode_to_them(folder: Path, tmp_path: Path) -> None:
    pipe = shifted(tiny.flux_pipeline())
    samples = encode_images(pipe, folder, tmp_path / "samples", **CALL)
    assert [samples.prompt_of(i) for i in range(5)] == CAPTIONS
    assert [samples.resolution_of(i) for i in range(5)] == [(24, 32), (32, 16), (24, 32), (24, 32), (32, 16)]
    assert samples.groups == [(0, 2, 3), (1, 4)]
    assert samples.has_null
    record = read_shard(tmp_path / "samples" / "samples-00000.safetensors").record["samples"][1]
    size = (folder / "1.png").stat().st_size
    assert record == {"index": 1, "prompt": "a dog", "resolution": [32, 16], "picture": f"1.png ({size} bytes)"}
    # As FluxPipeline takes latents apart and gives them to its VAE.
    latents = pipe._unpack_latents(samples.batch([2]).latents, 24, 32, pipe.vae_scale_factor)
    latents = latents / 0.36 + 0.12
    pixels = torch.tensor(np.array(Image.open(folder / "2.png"))).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = pipe.vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-4)
    # The conditioning is that of the pipeline's own samples.
    own = make_samples(
        pipe, ["a cat"], tmp_path / "own", 1, 1, [(24, 32)], None, 1, call_arguments=CALL["call_arguments"]
    )
    for name, value in own.batch([0]).arguments.items():
        assert str(value) == str(samples.batch([0]).arguments[name])


def test_encoded_pictures_fit_a_transformer_of_any_weights(folder: Path, tmp_path: Path) -> None:
    samples = encode_images(tiny.flux_pipeline(), folder, tmp_path / "samples", **CALL)
    assert "weights" not in samples.manifest["settings"]["model"]
    pipe = tiny.flux_pipeline()
    with torch.no_grad():
        pipe.transformer.proj_out.weight.add_(0.1)
    samples.check_fits(pipe)
    assert encode_images(pipe, folder, tmp_path / "samples", **CALL).manifest == samples.manifest


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in ("HiDream", "Lumina2")])
def test_every_form_of_latents(folder: Path, tmp_path: Path, name: str) -> None:
    case: PipelineCase = PIPELINES[name]
    arguments = {**case.call, **({"num_frames": 1} if "num_frames" in case.call else {})}
    if name == "DiT":
        rows = [json.dumps({"file_name": f"{i}.png", "label": i}) for i in range(5)]
        (folder / "metadata.jsonl").write_text("\n".join(rows))
    samples = encode_images(
        case.make(), folder, tmp_path / "samples", resolutions=list(case.sizes) or None, call_arguments=arguments
    )
    assert len(samples) == 5
    batch = samples.batch(samples.groups[0][:2])
    timestep = torch.tensor([500.0] * 2)
    predicted = samples.call.predict(case.make().transformer, batch.latents, timestep, batch.arguments)
    assert predicted.isfinite().all()
    assert len({float(samples.batch([i]).latents.std()) for i in range(5)}) == 5


def test_wrong_scaling_is_noticed(folder: Path, tmp_path: Path) -> None:
    """A pipeline that decodes in a way of its own."""
    pipe = tiny.flux_pipeline()
    decode = type(pipe)._unpack_latents
    pipe._unpack_latents = lambda *args: 3 * decode(*args)
    with pytest.raises(ValueError, match="FluxPipeline decodes its latents in another way than by scale and shift"):
        encode_images(pipe, folder, tmp_path / "samples", **CALL)
    lumina = PIPELINES["Lumina2"]
    with pytest.raises(ValueError, match=r"its transformer latents of \(4, 4, 6\), the VAE's become \(4, 16, 24\)"):
        encode_images(lumina.make(), folder, tmp_path / "samples", resolutions=[(32, 48)], call_arguments=lumina.call)
    assert not (tmp_path / "samples").exists()


def test_encoding_goes_on_and_takes_no_other_pictures(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers_linattn.samples.plan.MAX_PER_SHARD", 2)
    pipe = tiny.flux_pipeline()
    directory = tmp_path / "samples"
    manifest = encode_images(pipe, folder, directory, **CALL).manifest
    for name in ("manifest.json", "samples-00001.safetensors"):
        (directory / name).unlink()
    assert encode_images(pipe, folder, directory, **CALL).manifest == manifest
    with pytest.raises(ValueError, match=r"other settings \(.*pictures.*\)"):
        make_samples(pipe, CAPTIONS, directory, 5, 2, CALL["resolutions"], call_arguments=CALL["call_arguments"])
    picture((50, 50), 9).save(folder / "0.png")
    with pytest.raises(ValueError, match=r"other settings \(pictures\)"):
        encode_images(pipe, folder, directory, **CALL)
    assert Samples(directory).manifest == manifest


def test_captions_in_one_file(folder: Path, tmp_path: Path) -> None:
    rows = [{"file_name": f"{i}.png", "title": f"{CAPTIONS[i]}"} for i in (3, 1)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    samples = encode_images(tiny.flux_pipeline(), folder, tmp_path / "samples", captions="title", **CALL)
    assert [samples.prompt_of(i) for i in range(2)] == ["a dog", "the red cat"]
    rows[0]["title"] = "a\u2028cat"
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "metadata.jsonl").write_bytes(f"\ufeff{lines}\r\n".encode())
    samples = encode_images(tiny.flux_pipeline(), folder, tmp_path / "marked", captions="title", **CALL)
    assert [samples.prompt_of(i) for i in range(2)] == ["a dog", "a\u2028cat"]
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 1 has no caption: expected one of text, caption"):
        encode_images(tiny.flux_pipeline(), folder, tmp_path / "other", **CALL)
    (folder / "metadata.jsonl").write_text('{"file_name": "9.png", "text": "a cat"}')
    with pytest.raises(ValueError, match=r"9.png does not exist"):
        encode_images(tiny.flux_pipeline(), folder, tmp_path / "other", **CALL)
    (folder / "metadata.jsonl").write_text("0.png a cat")
    with pytest.raises(ValueError, match="line 1: expected an object with file_name and text"):
        encode_images(tiny.flux_pipeline(), folder, tmp_path / "other", **CALL)


def test_a_dataset(folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [json.dumps({"file_name": f"{i}.png", "text": caption}) for i, caption in enumerate(CAPTIONS)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    splits = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    dataset = splits["train"]
    pipe = tiny.flux_pipeline()
    samples = encode_images(pipe, dataset, tmp_path / "dataset", **CALL)
    same = encode_images(pipe, folder, tmp_path / "folder", **CALL)
    for group in same.groups:
        assert torch.equal(samples.batch(group).latents, same.batch(group).latents)
    with pytest.raises(ValueError, match="columns are image, text; expected one of captions: title"):
        encode_images(pipe, dataset, tmp_path / "other", captions="title", **CALL)
    with pytest.raises(ValueError, match="holds several splits"):
        encode_images(pipe, splits, tmp_path / "other", **CALL)
    prompts = make_samples(pipe, dataset["text"], tmp_path / "prompts", 4, call_arguments=CALL["call_arguments"])
    assert [prompts.prompt_of(i) for i in range(4)] == ["a cat", "a dog", "the red cat", "a cat"]


def test_a_picture_turned_by_its_camera(folder: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.open(folder / "1.png").transpose(Image.Transpose.ROTATE_90)
    turned.save(folder / "1.png", exif=exif)
    samples = encode_images(tiny.flux_pipeline(), folder, tmp_path / "samples", **CALL)
    assert samples.resolution_of(1) == (32, 16)


def test_bad_pictures(folder: Path, tmp_path: Path) -> None:
    pipe, target = tiny.flux_pipeline(), tmp_path / "samples"

    def refused(match: str, images: Any = folder, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            encode_images(pipe, images, target, **{**CALL, **changes})
        assert not target.exists()

    refused("is no folder", folder / "none")
    refused("images is a int, expected a folder or a dataset", 5)
    refused("batch_size must be", batch_size=0)
    refused("FluxPipeline takes no width_", call_arguments={"width_": 3})
    (folder / "2.txt").write_text("  ")
    refused(r"The caption of picture 2.png \(\d+ bytes\) is '', expected a prompt")
    (folder / "2.txt").unlink()
    refused("2.png has no caption: expected 2.txt beside it")
    (folder / "2.txt").write_text("a cat")
    (folder / "2.png").write_bytes(b"no picture")
    refused(r"The picture 2.png \(10 bytes\) cannot be read")
    shutil.rmtree(folder)
    folder.mkdir()
    refused("holds no pictures")
    pipe.vae = None
    refused("FluxPipeline has no VAE")


def test_a_truncated_picture(folder: Path, tmp_path: Path) -> None:
    text = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"2.png.* cannot be read"):
        encode_images(tiny.flux_pipeline(), folder, tmp_path / "samples", **CALL)
