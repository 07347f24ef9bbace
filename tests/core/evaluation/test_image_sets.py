"""FID, KID, CLIP score and metrics of captions: by formulas written here, on features computed apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from janus_modular import Janus
from janus_modular.checkpoints import ModelAssembly, save
from janus_modular.cli.app import app
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import ConfigError, EvaluationError, MissingExtraError
from janus_modular.evaluation.published import published_results
from janus_modular.evaluation.run import read_data, run_evaluation
from janus_modular.evaluation.schema import EvalConfig
from janus_modular.processing.image_transforms import understanding_pixels

needs_torchmetrics = pytest.mark.usefixtures("torchmetrics")


@pytest.fixture
def torchmetrics() -> Any:
    return pytest.importorskip("torchmetrics")


@pytest.fixture(scope="module")
def janus() -> Janus:
    torch.manual_seed(0)
    return Janus.of(ModelAssembly.from_config(resolve(load("tiny"), ModelConfig)))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Forty noisy grey images, and thirty brighter ones."""
    rng = np.random.default_rng(0)
    made = []
    for name, count, light in (("real", 40, 60), ("drawn", 30, 120)):
        folder = tmp_path / name
        folder.mkdir()
        for i in range(count):
            pixels = np.clip(rng.normal(light, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:02}.png")
        made.append(folder)
    return made[0], made[1]


def features(janus: Janus, folder: Path) -> np.ndarray:
    """The mean features of an encoder's positions, (N, C), in float64."""
    path = janus.model.understanding
    pixels = [
        understanding_pixels(Image.open(file), path.encoder.pixels) for file in sorted(folder.iterdir())
    ]
    with torch.no_grad():
        x = path.encoder(path.normalize(torch.from_numpy(np.stack(pixels))))
    return x.mean(1).double().numpy()


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Dowson and Landau, 1982: the trace of the root from the eigenvalues of the product."""
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(cov_x @ cov_y).astype(complex)).real.sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * roots)


def kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased squared MMD with the kernel (x y / C + 1)^3."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    m, n = len(x), len(y)
    same_x, same_y = kernel(x, x), kernel(y, y)
    within = (same_x.sum() - np.trace(same_x)) / (m * (m - 1)) + (same_y.sum() - np.trace(same_y)) / (
        n * (n - 1)
    )
    return float(within - 2 * kernel(x, y).mean())


@needs_torchmetrics
def test_fid_and_kid_by_their_formulas(janus: Janus, folders: tuple[Path, Path], tmp_path: Path) -> None:
    real, drawn = folders
    for extra in sorted(real.iterdir())[30:]:
        extra.unlink()  # KID's subsets are then the whole sets
    config = EvalConfig("image-sets", str(real), images=str(drawn), batch_size=7)
    state = torch.get_rng_state()
    metrics = run_evaluation(janus, read_data(config), config, tmp_path / "out", {}).metrics["encoder model"]
    assert torch.equal(torch.get_rng_state(), state)
    x, y = features(janus, real), features(janus, drawn)
    assert metrics["images"] == 30
    # torchmetrics sums in float64; features of other batch sizes differ by float32's rounding.
    assert metrics["fid"] == pytest.approx(frechet(x, y), rel=1e-3)
    assert metrics["kid"] == pytest.approx(kernel_distance(x, y), rel=1e-3)
    assert metrics["kid_deviation"] == pytest.approx(0, abs=1e-5)


@needs_torchmetrics
def test_chosen_encoders_and_equal_sets(janus: Janus, folders: tuple[Path, Path], tmp_path: Path) -> None:
    raw = {
        "evaluate": "image-sets",
        "path": str(folders[0]),
        "images": str(folders[0]),
        "encoders": {
            name: {"name": "vit", "feature_dim": dim, "layers": 1, "pixels": {"height": 32, "width": 32}}
            for name, dim in (("small", 32), ("large", 64))
        },
    }
    config = resolve(load(raw), EvalConfig)
    metrics = run_evaluation(janus, read_data(config), config, tmp_path / "out", {}).metrics
    assert [(name, values["features"]) for name, values in metrics.items()] == [
        ("encoder small", 32),
        ("encoder large", 64),
    ]
    assert all(values["fid"] == pytest.approx(0, abs=1e-3) for values in metrics.values())


def test_clip_score_is_the_cosine_of_clips_own_embeddings(janus: Janus, tmp_path: Path) -> None:
    """With a tiny CLIP of random weights, saved by transformers, and read without the network."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    clip = tmp_path / "clip"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    text = {**sizes, "vocab_size": 8, "eos_token_id": 1, "bos_token_id": 0, "max_position_embeddings": 8}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    model.save_pretrained(clip)
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "a", "b"]
    clip.joinpath("vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    clip.joinpath("merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizerFast.from_pretrained(clip)
    tokenizer.save_pretrained(clip)
    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    images.save_pretrained(clip)
    lines = []
    for name, caption in (("red", "a"), ("blue", "b a")):
        Image.new("RGB", (12, 9), name).save(tmp_path / f"{name}.png")
        lines.append({"image": f"{name}.png", "caption": caption})
    path = tmp_path / "drawn.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))

    config = EvalConfig("clip-score", str(path), clip=str(clip), batch_size=2)
    score = run_evaluation(janus, read_data(config), config, tmp_path / "out", {}).metrics["all"][
        "clip_score"
    ]
    expected = []
    for line in lines:
        pixels = images(images=Image.open(tmp_path / line["image"]), return_tensors="pt")["pixel_values"]
        ids = tokenizer(line["caption"], return_tensors="pt")
        with torch.no_grad():
            output = model(pixel_values=pixels, **ids)
        expected.append(float(output.image_embeds @ output.text_embeds.T))  # unit vectors
    assert score == pytest.approx(max(0, 100 * np.mean(expected)), abs=1e-3)
    (clip / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(EvaluationError, match="Expected CLIP in transformers' form"):
        run_evaluation(janus, read_data(config), config, tmp_path / "out", {})


@needs_torchmetrics
def test_captions_by_hand(tmp_path: Path) -> None:
    """ROUGE-L of three of four words in order is 3/4; BLEU has the precisions 3/4, 1/3, 0, 0."""
    from janus_modular.evaluation.caption_metrics import caption_metrics
    from janus_modular.evaluation.questions import read_questions

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    path = tmp_path / "captions.jsonl"
    row = {"image": "a.png", "captions": ["A cat sat down", "one dog"]}
    path.write_text(
        json.dumps(row) + "\n" + json.dumps({"image": "a.png", "caption": "one two three four five"})
    )
    questions = read_questions("captions", path, tmp_path)
    assert [question.text for question in questions] == ["Describe this image."] * 2
    metrics = caption_metrics([(questions[0], "a cat lay down")])
    assert metrics["rouge_l"] == pytest.approx(0.75)
    assert metrics["bleu4"] == 0
    same = caption_metrics([(questions[1], "One two three four five")])
    assert (same["bleu4"], same["rouge_l"], same["chrf"]) == pytest.approx((1, 1, 1), abs=1e-6)


def test_settings_without_effect_and_missing_settings() -> None:
    for options, message in (
        ({"evaluate": "image-sets"}, r"images: not set"),
        ({"evaluate": "clip-score"}, r"clip: not set"),
        ({"evaluate": "pope", "clip": "a"}, r"clip: has no effect"),
        ({"evaluate": "image-sets", "images": "a", "prompt": "{question}"}, r"prompt: has no effect"),
        ({"evaluate": "clip-score", "clip": "a", "settings": {"seed": 1}}, r"settings: have no effect"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve(load({"path": "x", **options}), EvalConfig)


def test_bad_data_is_named_before_the_model_is_loaded(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    path = tmp_path / "captions.jsonl"
    for row, message in (
        ({"image": "no.png", "caption": "a"}, "no file"),
        ({"image": "real/00.png"}, "expected caption"),
        ({"image": "real/00.png", "caption": "a", "captions": ["b"]}, "expected caption"),
        ({"image": "real/00.png", "captions": []}, "expected caption"),
        ({"image": "real/00.png", "caption": "a", "A": "b"}, "unknown column"),
    ):
        path.write_text(json.dumps(row))
        for config in (EvalConfig("captions", str(path)), EvalConfig("clip-score", str(path), clip="a")):
            with pytest.raises(EvaluationError, match=message):
                read_data(config)
    with pytest.raises(EvaluationError, match="there is no file or folder"):
        read_data(EvalConfig("image-sets", str(folders[0]), images=str(tmp_path / "none")))


def test_without_torchmetrics_the_extra_is_named(
    janus: Janus, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from janus_modular import errors

    installed = errors._is_installed
    monkeypatch.setattr(errors, "_is_installed", lambda name: name != "torchmetrics" and installed(name))
    config = EvalConfig("image-sets", str(folders[0]), images=str(folders[1]))
    with pytest.raises(MissingExtraError, match=r"needs the extra 'metrics'"):
        run_evaluation(janus, read_data(config), config, tmp_path / "out", {})


def test_published_results_stand_beside_the_models(tmp_path: Path, janus: Janus) -> None:
    save(ModelAssembly(janus.model, janus.processor), tmp_path / "model")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    line = {"image": "a.png", "text": "Is there a cat?", "label": "no"}
    (tmp_path / "pope.jsonl").write_text(json.dumps(line))
    arguments = ["eval", str(tmp_path / "model"), "eval/pope", f"path={tmp_path / 'pope.jsonl'}"]
    arguments += [f"images={tmp_path}", "settings.max_tokens=2", "-o", str(tmp_path / "out"), "--quiet"]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "published: Janus-Pro-7B 87.4 (POPE, %; Janus-Pro, arXiv:2501.17811)" in result.stdout
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["model"] for row in written["published"]] == ["Janus 1.3B", "Janus-Pro-1B", "Janus-Pro-7B"]
    assert published_results("wise") == []
