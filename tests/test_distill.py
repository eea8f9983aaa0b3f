"""Distillation of a tiny FLUX pipeline: it learns, stops and goes on exactly, and gives the original back."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from diffusers import (
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from diffusers_linattn import (
    ClearProcessor,
    DistillConfig,
    GLAProcessor,
    LinearProcessor,
    choose_layers,
    distill,
    encode_images,
    evaluate,
    linearize,
    load_linear_attention,
    make_samples,
    original_attention,
    restore,
)
from diffusers_linattn.linearize import layers_of
from diffusers_linattn.samples import Samples
from diffusers_linattn.training.environment import SHARDED
from diffusers_linattn.training.loop import DivergedError
from diffusers_linattn.training.objective import Denoising, draw, objective_of, split_variance
from diffusers_linattn.training.optimizers import OTHER_PACKAGES
from diffusers_linattn.training.validation import Validation

import tiny
from model_cases import CASES


ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["a cat", "a dog", "the red cat"]
CALL: dict[str, Any] = {
    "num_samples": 10,
    "batch_size": 4,
    "resolutions": [(24, 32), (32, 16)],
    "num_inference_steps": 2,
    "call_arguments": {"max_sequence_length": 8},
}
QUICK: dict[str, Any] = {"transfer_steps": 6, "steps": 6, "batch_size": 3, "checkpointing_steps": 4}
WEIGHTS = "linear_attention.safetensors"
RESULT_FILES = ["linear_attention_config.json", WEIGHTS, "metrics.jsonl", "run.json"]


@pytest.fixture
def pipe() -> Any:
    return tiny.flux_pipeline(guidance_embeds=True)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    directory = tmp_path_factory.mktemp("samples") / "flux"
    return make_samples(tiny.flux_pipeline(guidance_embeds=True), PROMPTS, directory, **CALL)


def student(template: Any = None) -> Any:
    template = template or ClearProcessor(window=2, down_factor=2)
    return linearize(tiny.flux_pipeline(guidance_embeds=True), template)


def state_of(pipe: Any) -> dict[str, torch.Tensor]:
    return copy.deepcopy(pipe.transformer.state_dict())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize(
    "template", [ClearProcessor(window=2, down_factor=2), LinearProcessor(feature_map="hedgehog")], ids=repr
)
def test_it_learns_saves_and_restores(pipe: Any, samples: Samples, tmp_path: Path, template: Any) -> None:
    state = state_of(pipe)
    flags = {name: p.requires_grad for name, p in pipe.transformer.named_parameters()}
    random_state = torch.get_rng_state()
    linearize(pipe, template)
    config = DistillConfig(transfer_steps=40, steps=30, transfer_learning_rate=1e-2)
    curves = distill(pipe, samples, tmp_path / "student", config, learning_rate=3e-3, batch_size=3)
    assert torch.equal(torch.get_rng_state(), random_state)
    transfer = [row["loss"] for row in curves["transfer"]]
    assert sum(transfer[-5:]) < 0.8 * sum(transfer[:5])
    terms = {"loss", "diffusion", "prediction", "attention"}
    assert {"step", "stage", "learning_rate", *terms} == set(curves["end_to_end"][0])
    names = {layer.name for layer in layers_of(pipe)}
    assert set(curves["transfer"][0]) == {"step", "stage", "learning_rate", "loss", *names}
    lines = (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [row["loss"] for row in [*sum(curves.values(), [])]]
    assert sorted(path.name for path in (tmp_path / "student").iterdir()) == sorted(RESULT_FILES)
    after = pipe.transformer.state_dict()
    changed = {name for name in state if not torch.equal(after[name], state[name])}
    assert changed
    assert {name.split(".", 2)[2].rsplit(".", 1)[0] for name in changed} <= {
        f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")
    }
    saved = json.loads((tmp_path / "student" / "linear_attention_config.json").read_text())
    assert saved["recipe"]["steps"] == 30
    assert saved["recipe"]["learning_rate"] == 3e-3
    assert saved["recipe"]["num_samples"] == 10
    last = [row["prediction"] for row in curves["end_to_end"]]
    assert saved["metrics"]["end_to_end prediction loss"] == pytest.approx(sum(last) / len(last))
    other = load_linear_attention(tiny.flux_pipeline(guidance_embeds=True), tmp_path / "student")
    with torch.no_grad():
        inputs = {**tiny.flux_inputs(), "guidance": torch.ones(2)}
        assert torch.equal(other.transformer(**inputs)[0], pipe.transformer(**inputs)[0])
    restore(pipe)
    assert same(state, state_of(pipe))
    assert {name: p.requires_grad for name, p in pipe.transformer.named_parameters()} == flags


@pytest.mark.parametrize(
    ("how", "stop_at", "ema_decay"),
    [
        pytest.param(signal.SIGINT, 2, None, marks=pytest.mark.weekly),
        (signal.SIGINT, 18, 0.9),  # the very last step
        (signal.SIGTERM, 6, 0.9),  # the last step of a group
        pytest.param(signal.SIGTERM, 14, None, marks=pytest.mark.weekly),
        pytest.param("crash", 3, None, marks=pytest.mark.weekly),
        ("crash", 9, 0.9),
        pytest.param("crash", 17, None, marks=pytest.mark.weekly),
    ],
)
def test_a_stopped_run_ends_the_same(
    samples: Samples, tmp_path: Path, how: Any, stop_at: int, ema_decay: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signals leave a checkpoint after the step they come in; a crash goes back to the last regular one."""
    options = {**QUICK, "ema_decay": ema_decay, "layers_per_group": 3}
    distill(student(), samples, tmp_path / "whole", **options)
    batch, drawn = Samples.batch, []

    def stops(self: Samples, *args: Any) -> Any:
        drawn.append(1)
        if len(drawn) == stop_at:
            if how == "crash":
                raise RuntimeError("crash")
            signal.raise_signal(how)
        return batch(self, *args)

    monkeypatch.setattr(Samples, "batch", stops)
    pipe = student()
    before = state_of(pipe)
    expected = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit, "crash": RuntimeError}[how]
    with pytest.raises(expected):
        distill(pipe, samples, tmp_path / "broken", **options)
    assert same(before, state_of(pipe))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    done_before = len(drawn)
    distill(student(), samples, tmp_path / "broken", **options)
    repeated = len(drawn) - done_before + (stop_at - 1 if how == "crash" else stop_at) - 18
    assert repeated == ((stop_at - 1) % 4 if how == "crash" else 0)
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (tmp_path / "broken" / WEIGHTS).read_bytes()
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "broken")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", ["validation", "checkpoint"])
def test_a_signal_after_the_last_step_is_not_lost(
    samples: Samples, tmp_path: Path, at: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pictures of the last step take minutes at real sizes, and so may its checkpoint."""
    import diffusers_linattn.training.loop as loop

    owner, name = (Validation, "__call__") if at == "validation" else (loop, "write_checkpoint")
    original: Any = getattr(owner, name)

    def stops(*args: Any) -> Any:
        result = original(*args)
        signal.raise_signal(number)
        return result

    options = {
        "transfer_steps": 1,
        "steps": 1,
        "batch_size": 2,
        "validation_steps": 2,
        "validation_prompts": ["a cat"],
    }
    out = tmp_path / "student"
    pipe = student()
    before = state_of(pipe)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, stops)
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
            distill(pipe, samples, out, **options)
    assert same(before, state_of(pipe))
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert (out / "validation.jsonl").read_text().count("\n") == 1
    assert not (out / WEIGHTS).exists()
    monkeypatch.setattr(Samples, "batch", lambda *_: pytest.fail("a step was taken again"))
    distill(pipe, samples, out, **options)
    assert (out / WEIGHTS).exists()
    assert (out / "validation.jsonl").read_text().count("\n") == 1


def test_checkpoints_are_kept_as_many_as_asked_for(
    samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**QUICK, "checkpointing_steps": 2, "checkpoints_total_limit": 2}
    batch, drawn = Samples.batch, []

    def stops(self: Samples, *args: Any) -> Any:
        drawn.append(1)
        if len(drawn) == 10:
            raise RuntimeError("crash")
        return batch(self, *args)

    monkeypatch.setattr(Samples, "batch", stops)
    with pytest.raises(RuntimeError, match="crash"):
        distill(student(), samples, tmp_path / "run", **options)
    found = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert found == ["checkpoint-6", "checkpoint-8"]
    parameters = sum(p.numel() for p in student().transformer.parameters())
    size = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoint-8").iterdir())
    assert size < 0.9 * 4 * parameters  # the trained weights and their moments, not the model
    with pytest.raises(ValueError, match="holds checkpoint-8"):
        distill(student(), samples, tmp_path / "run", **options, resume_from_checkpoint=None)
    with pytest.raises(ValueError, match="has no checkpoint 'checkpoint-5'; there is checkpoint-6, checkpoint-8"):
        distill(student(), samples, tmp_path / "run", **options, resume_from_checkpoint="checkpoint-5")
    # From the older one, and stopped again: the newer one is of steps that are taken anew.
    drawn[:] = [1] * 7
    with pytest.raises(RuntimeError, match="crash"):
        distill(student(), samples, tmp_path / "run", **options, resume_from_checkpoint="checkpoint-6")
    distill(student(), samples, tmp_path / "run", **options)
    distill(student(), samples, tmp_path / "whole", **options)
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (tmp_path / "run" / WEIGHTS).read_bytes()


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
import tiny
from diffusers_linattn import LinearProcessor, distill, linearize
torch.set_num_threads(1)
pipe = linearize(tiny.flux_pipeline(guidance_embeds=True), LinearProcessor(feature_map="hedgehog"))
distill(pipe, {samples!r}, {output!r}, transfer_steps=3, steps=3, batch_size=2, transfer_learning_rate=1e-2,
        learning_rate=1e-3, validation_steps=6, validation_prompts=["a cat"])
# The processes are still connected.
distill(pipe, {samples!r}, {output!r} + "-again", transfer_steps=1, steps=0, batch_size=1)
"""


def test_two_runs_do_not_share_a_directory(samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, output = Samples.batch, tmp_path / "student"
    options = {"transfer_steps": 2, "steps": 0, "batch_size": 2}

    def starts_another(self: Samples, *arguments: Any) -> Any:
        monkeypatch.setattr(Samples, "batch", batch)
        with pytest.raises(ValueError, match="another run is training into it"):
            distill(student(), samples, output, **options)
        return batch(self, *arguments)

    monkeypatch.setattr(Samples, "batch", starts_another)
    curves = distill(student(), samples, output, **options)
    assert len(curves["transfer"]) == (output / "metrics.jsonl").read_text().count("\n") == 2
    assert sorted(path.name for path in output.iterdir()) == sorted(RESULT_FILES)


def test_validation_measures_what_is_asked_for(samples: Samples, tmp_path: Path) -> None:
    def brightness(images: torch.Tensor, prompts: Any) -> float:
        assert prompts == ["a cat"]
        return float(images.mean())

    settings = {"transfer_steps": 1, "steps": 0, "batch_size": 2, "validation_steps": 1}
    validation = {"validation_prompts": ["a cat"], "validation_metrics": [brightness]}
    distill(student(), samples, tmp_path / "student", **settings, **validation)
    row = json.loads((tmp_path / "student" / "validation.jsonl").read_text())
    assert 0 < row["brightness"] < 1
    with pytest.raises(ValueError, match="Unknown metric 'sharpness'"):
        distill(student(), samples, tmp_path / "new", **settings, validation_metrics=["sharpness"])
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(samples: Samples, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    output = tmp_path / "two"
    script.write_text(SCRIPT.format(tests=str(ROOT / "tests"), samples=str(samples.directory), output=str(output)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (output / "validation" / "step-000006.png").exists()
    assert json.loads((output / "validation.jsonl").read_text())["latent_mse"] > 0
    template = LinearProcessor(feature_map="hedgehog")
    same_settings = {"transfer_steps": 3, "steps": 3, "transfer_learning_rate": 1e-2, "learning_rate": 1e-3}
    distill(student(template), samples, tmp_path / "one", batch_size=4, **same_settings)
    parts = {"batch_size": 1, "gradient_accumulation_steps": 4}
    distill(student(template), samples, tmp_path / "parts", **parts, **same_settings)
    distill(student(template), samples, tmp_path / "half", batch_size=2, **same_settings)
    one, two, split, half = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two", "parts", "half"))
    assert json.loads((tmp_path / "two" / "run.json").read_text()) == json.loads(
        (tmp_path / "one" / "run.json").read_text()
    )

    def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return max(float((a[name] - b[name]).abs().max()) for name in a)

    assert distance(one, two) < 1e-4
    assert distance(one, split) < 1e-4
    assert distance(one, half) > 1e-3  # the batch matters


DIVIDED = """
import json, os, signal, sys, torch
sys.path.insert(0, {tests!r})
import tiny
from diffusers_linattn import LinearProcessor, distill, linearize
from diffusers_linattn.samples import Samples
from diffusers_linattn.training.zero import DividedOptimizer
torch.set_num_threads(1)
batch, step, drawn, held = Samples.batch, DividedOptimizer.step, [], []

def stops(self, *args):
    drawn.append(1)
    if len(drawn) in (3, 5):
        signal.raise_signal(signal.SIGTERM)
    return batch(self, *args)

def counted(self, *args, **kwargs):
    result = step(self, *args, **kwargs)
    sizes = [v.numel() for state in self.optim.state.values() for v in state.values() if v.numel() > 1]
    held.append([sum(sizes), 2 * sum(p.numel() for group in self.param_groups for p in group["params"])])
    return result

def train(name, **options):
    pipe = linearize(tiny.flux_pipeline(guidance_embeds=True), LinearProcessor(feature_map="hedgehog"))
    distill(pipe, {samples!r}, {output!r} + "/" + name, transfer_steps=2, steps=4, batch_size=2,
            transfer_learning_rate=1e-2, learning_rate=1e-3, ema_decay=0.9, **options)

train("whole")
DividedOptimizer.step = counted
train("divided", shard_optimizer=True)
Samples.batch = stops
for options in ({{"shard_optimizer": True}}, {{"shard_optimizer": True}}, {{}}):  # whole again at the end
    try:
        train("stopped", **options)
    except SystemExit:
        continue
assert len(drawn) == 6
with open({output!r} + "/held" + os.environ["RANK"] + ".json", "w") as file:
    json.dump(held, file)
"""


@pytest.mark.slow
def test_an_optimizer_divided_among_processes_does_the_same(samples: Samples, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(DIVIDED.format(tests=str(ROOT / "tests"), samples=str(samples.directory), output=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, divided, stopped = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "divided", "stopped"))
    for name, weight in whole.items():
        torch.testing.assert_close(divided[name], weight, atol=1e-6, rtol=0)
        torch.testing.assert_close(stopped[name], weight, atol=1e-6, rtol=0)
    for rank in range(2):
        for held, all_of_it in json.loads((tmp_path / f"held{rank}.json").read_text()):
            assert 0 < held < 0.7 * all_of_it


def test_an_optimizer_that_cannot_be_divided_is_refused(samples: Samples, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is only this one: leave it out"):
        distill(student(), samples, tmp_path / "student", **QUICK, shard_optimizer=True)
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(("name", "processes"), [("one_gpu", 1), ("two_gpus", 2), ("eight_gpus", 8)])
def test_the_configurations_for_accelerate_are_read_by_it(name: str, processes: int) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "examples" / "accelerate" / f"{name}.yaml"))
    assert config.num_processes == processes
    assert config.mixed_precision == "bf16"
    assert config.distributed_type == (DistributedType.NO if processes == 1 else DistributedType.MULTI_GPU)
    assert config.distributed_type not in SHARDED


def test_a_lora_is_trained_saved_small_and_beside_others(samples: Samples, tmp_path: Path) -> None:
    from peft import LoraConfig

    pipe = student(LinearProcessor())
    base = {name: p.clone() for name, p in pipe.transformer.named_parameters() if "processor" not in name}
    users = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    pipe.transformer.add_adapter(users, "users")
    with torch.no_grad(), original_attention(pipe):
        inputs = {**tiny.flux_inputs(), "guidance": torch.ones(2)}
        teacher = pipe.transformer(**inputs)[0]
    options = {**QUICK, "trainable": "lora", "rank": 3, "transfer_learning_rate": 1e-2}
    curves = distill(pipe, samples, tmp_path / "student", **{**options, "transfer_steps": 60})
    transfer = [row["loss"] for row in curves["transfer"]]
    assert sum(transfer[-5:]) < 0.9 * sum(transfer[:5])
    now = {name.replace(".base_layer", ""): p for name, p in pipe.transformer.named_parameters()}
    assert all(torch.equal(p, now[name]) for name, p in base.items())
    tensors = load_file(tmp_path / "student" / WEIGHTS)
    assert {name.split(".")[-2] for name in tensors} == {"lora_A", "lora_B", "conv"}
    with torch.no_grad(), original_attention(pipe):
        assert torch.equal(pipe.transformer(**inputs)[0], teacher)
    other = tiny.flux_pipeline(guidance_embeds=True)
    other.transformer.add_adapter(users, "users")
    other.transformer.load_state_dict(pipe.transformer.state_dict(), strict=False)
    load_linear_attention(other, tmp_path / "student")
    with torch.no_grad():
        torch.testing.assert_close(other.transformer(**inputs)[0], pipe.transformer(**inputs)[0])
    with pytest.raises(ValueError, match=r"have a LoRA of rank 3 already: give rank=3"):
        distill(pipe, samples, tmp_path / "more", **{**options, "rank": 5})


def test_a_lora_is_added_to_layers_that_are_converted_later(samples: Samples, tmp_path: Path) -> None:
    pipe = linearize(tiny.flux_pipeline(guidance_embeds=True), LinearProcessor(), layers="transformer_blocks.*")
    options = {**QUICK, "trainable": "lora", "rank": 3, "transfer_learning_rate": 1e-2}
    distill(pipe, samples, tmp_path / "first", **options)
    first = load_file(tmp_path / "first" / WEIGHTS)
    linearize(pipe, LinearProcessor(), layers="single_transformer_blocks.*")
    before = state_of(pipe)
    with pytest.raises(ValueError, match="fp16 cannot be trained on a CPU"):
        distill(pipe, samples, tmp_path / "second", **options, mixed_precision="fp16")
    assert same(before, state_of(pipe))
    # Layers that have matrices go on from those; as many steps as would change them visibly.
    distill(pipe, samples, tmp_path / "second", **{**options, "transfer_learning_rate": 1e-9, "learning_rate": 1e-9})
    second = load_file(tmp_path / "second" / WEIGHTS)
    low_rank = {name for name in second if "lora_" in name}
    assert {name.split(".attn.")[0] for name in low_rank} == {
        f"{kind}.{i}" for kind in ("transformer_blocks", "single_transformer_blocks") for i in range(2)
    }
    for name in first:
        torch.testing.assert_close(second[name], first[name], atol=1e-6, rtol=0)
    other = load_linear_attention(tiny.flux_pipeline(guidance_embeds=True), tmp_path / "second")
    with torch.no_grad():
        inputs = {**tiny.flux_inputs(), "guidance": torch.ones(2)}
        torch.testing.assert_close(other.transformer(**inputs)[0], pipe.transformer(**inputs)[0])
    restore(pipe)
    assert not any("lora_" in name for name in pipe.transformer.state_dict())
    assert not hasattr(pipe.transformer, "peft_config")


def test_a_mixed_model_trains_and_saves_like_any_other(pipe: Any, samples: Samples, tmp_path: Path) -> None:
    mapping = {
        "transformer_blocks.0.attn": ClearProcessor(window=2),
        "single_transformer_blocks.0.attn": LinearProcessor(),
        "single_transformer_blocks.1.attn": GLAProcessor(),
    }
    linearize(pipe, mapping)
    curves = distill(pipe, samples, tmp_path / "student", **QUICK)
    assert set(mapping) < set(curves["transfer"][0])
    assert "transformer_blocks.1.attn" not in curves["transfer"][0]
    other = load_linear_attention(tiny.flux_pipeline(guidance_embeds=True), tmp_path / "student")
    assert [type(layer.processor).__name__ for layer in layers_of(other)] == [
        "ClearProcessor",
        "NoneType",
        "LinearProcessor",
        "GLAProcessor",
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"mixed_precision": "bf16"},
        {"layers_per_group": 1},
        {"trainable": "processors"},
        {"optimizer": "sgd", "optimizer_arguments": {"momentum": 0.9}},
        {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2},
        {"lr_scheduler": "piecewise_constant", "lr_scheduler_arguments": {"step_rules": "1:2,0.1"}},
        {"timestep_sampling": "logit_normal"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_settings_of_training(samples: Samples, tmp_path: Path, options: Any) -> None:
    pipe = student(LinearProcessor(feature_map="hedgehog"))
    before = state_of(pipe)
    distill(pipe, samples, tmp_path / "student", **QUICK, **options)
    after = pipe.transformer.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("processor" in name for name in changed)
    assert any("to_q" in name for name in changed) == (options.get("trainable") != "processors")
    assert not pipe.transformer.is_gradient_checkpointing
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.float32}


def test_checkpointing_computes_the_same(samples: Samples, tmp_path: Path) -> None:
    for name, options in {"plain": {}, "checkpointed": {"gradient_checkpointing": True}}.items():
        distill(student(), samples, tmp_path / name, **QUICK, **options)  # type: ignore[arg-type]
    assert (tmp_path / "plain" / WEIGHTS).read_bytes() == (tmp_path / "checkpointed" / WEIGHTS).read_bytes()


def test_the_teacher_is_the_original_under_autocast(samples: Samples, tmp_path: Path) -> None:
    """Autocast keeps casts of weights by parameter: the teacher's must not be taken for the student's."""
    whole = distill(student(), samples, tmp_path / "fp32", **QUICK, transfer_learning_rate=1e-2)
    half = distill(student(), samples, tmp_path / "bf16", **QUICK, transfer_learning_rate=1e-2, mixed_precision="bf16")
    for a, b in zip(sum(whole.values(), []), sum(half.values(), []), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)


def test_a_bf16_pipeline_is_trained_in_fp32_and_stays_bf16(samples: Samples, tmp_path: Path) -> None:
    pipe = student(LinearProcessor()).to(torch.bfloat16)
    curves = distill(pipe, samples, tmp_path / "student", **QUICK)
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.bfloat16}
    assert all(torch.tensor(row["loss"]).isfinite() for rows in curves.values() for row in rows)


def test_a_loss_that_is_not_finite_stops_the_run(samples: Samples, tmp_path: Path) -> None:
    pipe = student(LinearProcessor())
    before = state_of(pipe)
    options = {**QUICK, "steps": 40, "checkpointing_steps": 2, "optimizer": "sgd", "max_grad_norm": None}
    with pytest.raises(DivergedError, match=r"not finite at step \d+\. The last good checkpoint is .*checkpoint-\d+"):
        distill(pipe, samples, tmp_path / "student", **options, learning_rate=1e4)
    assert same(before, state_of(pipe))
    assert not (tmp_path / "student" / WEIGHTS).exists()


def test_bad_requests_fail_before_the_work(pipe: Any, samples: Samples, tmp_path: Path) -> None:
    out = tmp_path / "student"
    with pytest.raises(ValueError, match="No attention layer is converted"):
        distill(pipe, samples, out, **QUICK)
    linearize(pipe, ClearProcessor(window=2))
    for options, match in [
        ({"trainable": "processors"}, "leaves nothing to train: ClearProcessor as configured adds no weights"),
        ({"batch_size": 11}, "holds 10 samples, too few for batches of 11"),
        ({"optimizer": "adamx"}, "Unknown optimizer 'adamx': expected one of"),
        ({"validation_prompts": ["a cat"]}, "validation_prompts are not used without validation_steps"),
        ({"validation_metrics": ["lpips"]}, "validation_metrics are not used without validation_steps"),
        ({"optimizer": "LBFGS"}, "LBFGS needs more for a step than gradients"),
        ({"optimizer": "sparseadam"}, "SparseAdam needs more for a step than gradients"),
        ({"optimizer": "Muon"}, r"Muon only supports 2D parameters .*\[32\]"),
        ({"optimizer_arguments": {"beta": 1}}, "AdamW does not take these arguments"),
        ({"lr_scheduler": "cosin"}, "Unknown lr_scheduler 'cosin'"),
        ({"lr_scheduler": "piecewise_constant"}, "needs lr_scheduler_arguments={'step_rules'"),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 3}, "'constant' has no warm-up"),
        ({"lr_scheduler_arguments": {"power": 2.0}}, "but lr_scheduler 'cosine' takes none"),
        (
            {"lr_scheduler": "piecewise_constant", "lr_scheduler_arguments": {"step_rules": "a:b"}},
            "'piecewise_constant' does not take {'step_rules': 'a:b'}",
        ),
        ({"learning_rates": 1}, r"no setting 'learning_rates'. Did you mean learning_rate\?"),
        ({"learning_rate": 0}, "learning_rate must be a number above 0, got 0"),
        ({"prompt_dropout": 1.5}, "prompt_dropout must be a number, at least 0 and at most 1"),
        ({"steps": 0, "transfer_steps": 0}, "both 0"),
        ({"resume_from_checkpoint": "checkpoint-9"}, "has no checkpoint 'checkpoint-9'; there is none"),
        ({"mixed_precision": "fp16"}, "fp16 cannot be trained on a CPU"),
        ({"report_to": ["wandb"]}, "report_to has wandb, which accelerate does not find"),
        ({"validation_steps": 1, "validation_prompts": [3]}, r"prompts\[0\] is 3"),
        ({"seed": "x"}, "seed must be an integer"),
    ]:
        with pytest.raises(ValueError, match=match):
            distill(pipe, samples, out, **{**QUICK, **options})
        assert not out.exists()
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="has fused projections"):
        distill(pipe, samples, out, **QUICK)
    pixart = linearize(tiny.pixart_pipeline(), ClearProcessor(window=2))
    with pytest.raises(ValueError, match="PixArtTransformer2DModel"):
        distill(pixart, samples, out, **QUICK)
    dit = linearize(tiny.dit_pipeline(), ClearProcessor(window=2))
    with pytest.raises(ValueError, match="DiTTransformer2DModel does not take LoRAs in diffusers"):
        distill(dit, samples, out, **QUICK, trainable="lora")


OTHER_OPTIMIZERS = {
    # Of weights as small as these it would keep whole moments.
    "adamw8bit": {"optimizer_arguments": {"min_8bit_size": 256}, "learning_rate": 1e-3},
    "prodigy": {"transfer_learning_rate": 1.0, "learning_rate": 1.0},
}


@pytest.mark.parametrize("name", OTHER_OPTIMIZERS)
def test_optimizers_of_other_packages_train_and_go_on(
    name: str, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, kind, package = OTHER_PACKAGES[name]
    assert hasattr(pytest.importorskip(module), kind), package
    options = {"transfer_steps": 2, "steps": 3, "batch_size": 2, "checkpointing_steps": 1, "optimizer": name}
    options |= OTHER_OPTIMIZERS[name]
    template = LinearProcessor(feature_map="hedgehog")
    pipe = student(template)
    before = state_of(pipe)
    curves = distill(pipe, samples, tmp_path / "whole", **options)
    assert len(curves["end_to_end"]) == 3
    assert not same(before, state_of(pipe))
    batch, drawn = Samples.batch, []

    def crashes(self: Samples, *args: Any) -> Any:
        drawn.append(1)
        if len(drawn) == 5:
            raise RuntimeError("crash")
        return batch(self, *args)

    monkeypatch.setattr(Samples, "batch", crashes)
    with pytest.raises(RuntimeError, match="crash"):
        distill(student(template), samples, tmp_path / "broken", **options)
    state = torch.load(tmp_path / "broken" / "checkpoint-4" / "optimizer.bin")["state"]
    dtypes = {x.dtype for x in tree_leaves(state) if isinstance(x, torch.Tensor)}
    assert (torch.uint8 in dtypes) == (name == "adamw8bit")
    distill(student(template), samples, tmp_path / "broken", **options)
    assert len(drawn) == 6
    whole, broken = (load_file(tmp_path / folder / WEIGHTS) for folder in ("whole", "broken"))
    assert same(whole, broken)


@pytest.mark.parametrize("name", OTHER_OPTIMIZERS)
def test_optimizers_of_packages_that_are_missing(
    name: str, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, package = OTHER_PACKAGES[name]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"needs {package}: pip install {package}"):
        distill(student(), samples, tmp_path / "student", **QUICK, optimizer=name)
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    "call",
    [
        lambda model, path: distill(model, path, path / "out"),
        lambda model, path: choose_layers(model, ClearProcessor(), path),
        lambda model, path: evaluate(model, ["a cat"]),
        lambda model, path: make_samples(model, ["a cat"], path / "out"),
        lambda model, path: encode_images(model, path, path / "out"),
    ],
)
def test_a_transformer_is_no_pipeline(call: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Got a FluxTransformer2DModel: give the pipeline, not its transformer"):
        call(linearize(tiny.flux(), ClearProcessor()), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_output_directory_with_something_else_is_left_alone(samples: Samples, tmp_path: Path) -> None:
    out = tmp_path / "student"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        distill(student(), samples, out, **QUICK)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    (out / "notes.txt").unlink()
    distill(student(), samples, out, **QUICK)
    with pytest.raises(ValueError, match="holds the finished result of this very run.*linattn push .*student REPO"):
        distill(student(), samples, out, **QUICK)
    with pytest.raises(ValueError, match="holds a run with other recipe: learning_rate"):
        distill(student(), samples, out, **QUICK, learning_rate=1e-5)
    with pytest.raises(ValueError, match="holds a run with other layers"):
        distill(student(ClearProcessor(window=3)), samples, out, **QUICK)


def test_a_save_that_fails_undoes_the_training(
    samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = student()
    before = state_of(pipe)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        # The package's attribute of this name is the function.
        patched.setattr(sys.modules["diffusers_linattn.distill"], "save_linear_attention", full)
        with pytest.raises(OSError, match="No space left"):
            distill(pipe, samples, tmp_path / "student", **QUICK)
    assert same(before, state_of(pipe))
    drawn: list[int] = []
    monkeypatch.setattr(Samples, "batch", lambda *_: drawn.append(1))
    distill(pipe, samples, tmp_path / "student", **QUICK)  # nothing is trained again
    assert not drawn
    assert (tmp_path / "student" / WEIGHTS).exists()


def test_the_state_of_the_process_and_model_is_left_alone(samples: Samples, tmp_path: Path) -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = [dict(state._shared_state) for state in (AcceleratorState, GradientState, PartialState)]
    pipe = student(LinearProcessor())
    block = pipe.transformer.transformer_blocks[0].train()
    distill(pipe, samples, tmp_path / "student", **QUICK, trainable="lora", rank=2)
    assert states == [dict(state._shared_state) for state in (AcceleratorState, GradientState, PartialState)]
    assert block.training
    assert not pipe.transformer.training
    assert not any(p.requires_grad for name, p in pipe.transformer.named_parameters() if "lora_" in name)


@pytest.mark.slow
def test_compiled_blocks_share_their_graphs(samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile_block(self, backend=counter, **options)
    )
    options = {"transfer_steps": 1, "steps": 2, "batch_size": 2}
    template = ClearProcessor(window=2)
    graphs = {}
    for layers in (2, 5):
        torch._dynamo.reset()
        counter.clear()
        pipe = linearize(tiny.flux_pipeline(guidance_embeds=True, num_layers=1, num_single_layers=layers), template)
        directory = tmp_path / f"samples{layers}"
        made = make_samples(pipe, PROMPTS, directory, **{**CALL, "num_samples": 2, "resolutions": [(32, 32)]})
        curves = distill(pipe, made, tmp_path / f"compiled{layers}", **options, compile=True)
        graphs[layers] = counter.frame_count
        assert all(block._compiled_call_impl is None for block in pipe.transformer.single_transformer_blocks)
    assert graphs[5] == graphs[2] > 0
    eager = distill(
        linearize(tiny.flux_pipeline(guidance_embeds=True, num_layers=1, num_single_layers=5), template),
        made,
        tmp_path / "eager",
        **options,  # type: ignore[arg-type]
    )
    for a, b in zip(curves["end_to_end"], eager["end_to_end"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_a_full_disk_is_noticed_first(samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    pipe = student()
    before = state_of(pipe)
    with pytest.raises(ValueError, match=r"0.0 GB free, its checkpoints need"):
        distill(pipe, samples, tmp_path / "student", **QUICK)
    assert same(before, state_of(pipe))
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    ("template", "options"),
    [(LinearProcessor(kernel_size=65), {}), (LinearProcessor(), {"trainable": "lora", "rank": 1025})],
    ids=repr,
)
def test_what_could_not_be_saved_is_not_trained(
    template: Any, options: dict[str, Any], samples: Samples, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"What would be saved: .* (at most 63|from 1 to 1024)"):
        distill(student(template), samples, tmp_path / "student", **QUICK | options)
    assert not (tmp_path / "student").exists()


def test_pipelines_with_several_transformers_are_refused(samples: Samples, tmp_path: Path) -> None:
    import diffusers

    make: Any = CASES["WanTransformer3DModel"].make
    parts = {"transformer": make(), "transformer_2": make(), "boundary_ratio": 0.9}
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe: Any = diffusers.WanPipeline(None, None, None, scheduler, **parts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="WanPipeline has 2 transformers"):
        distill(pipe, samples, tmp_path, **QUICK)


def objective(scheduler: Any) -> Any:
    return objective_of(SimpleNamespace(scheduler=scheduler))


def test_objectives_are_those_of_the_schedulers() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    level = torch.tensor([0.1, 0.5, 0.9])
    for kind in ("epsilon", "v_prediction", "sample"):
        scheduler = DDPMScheduler(prediction_type=kind)
        found = objective(scheduler)
        timesteps = found.timesteps(level)
        assert timesteps.tolist() == [100, 500, 900]
        noisy = scheduler.add_noise(latents, noise, timesteps)
        torch.testing.assert_close(found.noisy(latents, noise, timesteps), noisy)
        expected = {"epsilon": noise, "sample": latents}.get(kind)
        if expected is None:
            expected = scheduler.get_velocity(latents, noise, timesteps)
        torch.testing.assert_close(found.target(latents, noise, timesteps), expected)
    flow = FlowMatchEulerDiscreteScheduler(shift=1.0)
    found = objective(flow)
    timesteps = flow.timesteps[[900, 500, 100]]
    noisy = flow.scale_noise(latents, timesteps, noise)
    torch.testing.assert_close(found.noisy(latents, noise, timesteps), noisy, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.target(latents, noise, timesteps), noise - latents)
    backwards = objective(FlowMatchEulerDiscreteScheduler(invert_sigmas=True))  # from noise at 0 to latents at 1000
    assert torch.equal(backwards.noisy(latents, noise, torch.tensor([0.0, 0.0, 0.0])), noise)
    assert torch.equal(backwards.target(latents, noise, timesteps), latents - noise)
    assert isinstance(objective(EulerDiscreteScheduler()), Denoising)
    with pytest.raises(ValueError, match="has a LCMScheduler"):
        objective(LCMScheduler())
    wan = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    assert type(objective(wan)) is type(found)
    with pytest.raises(ValueError, match="predicts 'flow'"):
        objective(SimpleNamespace(config={"prediction_type": "flow"}))


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_draws_do_not_depend_on_how_a_batch_is_split(sampling: str) -> None:
    latents = torch.zeros(4, 2, 3)

    def parts(*sizes: int) -> tuple[torch.Tensor, torch.Tensor]:
        first, drawn = 0, []
        for size in sizes:
            generators = [torch.Generator().manual_seed(i) for i in range(first, first + size)]
            drawn.append(draw(latents[:size], generators, range(first, first + size), 4, sampling))
            first += size
        return torch.cat([d.noise for d in drawn]), torch.cat([d.level for d in drawn])

    (noise, level), (noise_split, level_split) = parts(4), parts(1, 3)
    assert torch.equal(noise, noise_split)
    assert torch.equal(level, level_split)
    assert ((level > 0) & (level < 1)).all()
    assert (level.diff() > 0).all()  # one in each quarter


def test_a_learned_variance_is_split_off() -> None:
    prediction, latents = torch.randn(2, 8, 3, 3), torch.zeros(2, 4, 3, 3)
    mean, variance = split_variance(prediction, latents)
    assert torch.equal(mean, prediction[:, :4])
    assert variance is not None
    assert torch.equal(variance, prediction[:, 4:])
    assert split_variance(latents, latents)[1] is None
    with pytest.raises(ValueError, match=r"predicts \(2, 8, 3, 3\) for latents of \(2, 3, 3, 3\)"):
        split_variance(prediction, latents[:, :3])
