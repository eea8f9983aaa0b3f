"""Give a pipeline linear attention and train it, in the manner of the training scripts of diffusers.

    accelerate launch examples/distill.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev \
        --prompts prompts.txt --processor clear --window 16 --mixed_precision bf16 --gradient_checkpointing \
        --train_batch_size 1 --gradient_accumulation_steps 32 --output_dir flux-clear-16

Makes samples with the pipeline, converts it, trains its attention layers, and compares the result with the original.
Stopped at any time and started again with the same arguments, it goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from diffusers_linattn import (
    ClearProcessor,
    DistillConfig,
    GLAProcessor,
    HybridProcessor,
    LinearProcessor,
    distill,
    evaluate,
    linearize,
    load_linear_attention,
    make_samples,
    push_linear_attention,
    status,
)
from diffusers_linattn.hub import check_can_push


# With the arguments that they take from here.
PROCESSORS = {
    "clear": (ClearProcessor, {"window": 16, "down_factor": 1}),
    "hybrid": (HybridProcessor, {"window": 16}),
    "linear": (LinearProcessor, {"feature_map": "hedgehog"}),
    "gla": (GLAProcessor, {}),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--revision")
    parser.add_argument("--variant")
    parser.add_argument("--output_dir", type=Path, default=Path("linear-attention"))
    parser.add_argument("--seed", type=int, default=0)
    # The samples.
    parser.add_argument("--prompts", type=Path, required=True, help="text file, one prompt or class label per line")
    parser.add_argument("--num_samples", type=int, default=10_000)
    parser.add_argument("--sample_batch_size", type=int, default=4)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--guidance_scale", type=float)
    parser.add_argument("--num_inference_steps", type=int)
    # The attention.
    parser.add_argument("--processor", choices=PROCESSORS, default="clear")
    parser.add_argument("--window", type=int, help="of clear and hybrid: radius in tokens (16)")
    parser.add_argument("--down_factor", type=int, help="of clear: above 1, pooled keys see everything (1)")
    parser.add_argument("--layers", nargs="*", help="patterns of layer names, such as 'transformer_blocks.*'")
    parser.add_argument("--rank", type=int, help="train a LoRA of this rank instead of the projections themselves")
    # The training.
    parser.add_argument("--train_batch_size", type=int, default=4)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--transfer_steps", type=int, default=1_000, help="each layer by itself, before all together")
    parser.add_argument("--max_train_steps", type=int, default=9_000, help="all layers together")
    parser.add_argument("--transfer_learning_rate", type=float, default=3e-4)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--lr_scheduler", default="cosine")
    parser.add_argument("--lr_warmup_steps", type=int, default=0)
    parser.add_argument("--lr_num_cycles", type=int, help="of cosine_with_restarts (1)")
    parser.add_argument("--lr_power", type=float, help="of polynomial (1)")
    parser.add_argument("--optimizer", default="AdamW")
    parser.add_argument("--use_8bit_adam", action="store_true", help="the same as --optimizer adamw8bit")
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--use_ema", action="store_true", help="save a moving average of the weights (decay 0.9999)")
    parser.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--checkpoints_total_limit", type=int, default=2)
    parser.add_argument("--resume_from_checkpoint", default="latest", help="latest, or the name of a checkpoint")
    parser.add_argument("--validation_prompt", nargs="*", default=[])
    parser.add_argument("--validation_steps", type=int)
    parser.add_argument("--report_to", nargs="*", default=[], help="tensorboard, wandb, trackio …")
    # The result.
    parser.add_argument("--num_images", type=int, default=16, help="pictures compared with the original; 0: none")
    parser.add_argument("--push_to_hub", action="store_true")
    parser.add_argument("--hub_model_id")
    args = parser.parse_args()
    if args.push_to_hub and not args.hub_model_id:
        parser.error("--push_to_hub needs --hub_model_id, such as me/flux-clear-16")
    if (args.height is None) != (args.width is None):
        parser.error("--height and --width go together")
    kind, arguments = PROCESSORS[args.processor]
    given = {name: getattr(args, name) for name in ("window", "down_factor") if getattr(args, name) is not None}
    for name in given.keys() - arguments.keys():
        parser.error(f"--{name} does not go with --processor {args.processor}")
    args.template = kind(**{**arguments, **given})
    return args


def main() -> None:
    args = parse_args()
    state = PartialState(cpu=not torch.accelerator.is_available())
    if args.push_to_hub and state.is_main_process:
        check_can_push(args.hub_model_id)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[args.mixed_precision]
    pipe = DiffusionPipeline.from_pretrained(
        args.pretrained_model_name_or_path, dtype=dtype, revision=args.revision, variant=args.variant
    ).to(state.device)

    schedule = {"num_cycles": args.lr_num_cycles, "power": args.lr_power}
    # What can be wrong with the settings is found before the samples are made.
    config = DistillConfig(
        trainable="lora" if args.rank else "attention",
        rank=args.rank or 64,
        batch_size=args.train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        transfer_steps=args.transfer_steps,
        steps=args.max_train_steps,
        transfer_learning_rate=args.transfer_learning_rate,
        learning_rate=args.learning_rate,
        lr_scheduler=args.lr_scheduler,
        lr_scheduler_arguments={name: value for name, value in schedule.items() if value is not None},
        lr_warmup_steps=args.lr_warmup_steps,
        optimizer="adamw8bit" if args.use_8bit_adam else args.optimizer,
        max_grad_norm=args.max_grad_norm,
        ema_decay=0.9999 if args.use_ema else None,
        mixed_precision=args.mixed_precision,
        gradient_checkpointing=args.gradient_checkpointing,
        checkpointing_steps=args.checkpointing_steps,
        checkpoints_total_limit=args.checkpoints_total_limit,
        resume_from_checkpoint=args.resume_from_checkpoint,
        validation_prompts=args.validation_prompt,
        validation_steps=args.validation_steps,
        report_to=args.report_to,
        seed=args.seed,
    )
    linearize(pipe, args.template, layers=args.layers)

    # The original attention makes them.
    samples = make_samples(
        pipe,
        args.prompts,
        args.output_dir / "samples",
        num_samples=args.num_samples,
        batch_size=args.sample_batch_size,
        resolutions=None if args.height is None else [(args.height, args.width)],
        guidance_scale=args.guidance_scale,
        num_inference_steps=args.num_inference_steps,
        seed=args.seed,
    )
    student = args.output_dir / "student"
    if (student / "linear_attention_config.json").exists():  # trained by an earlier run
        load_linear_attention(pipe, student)
    else:
        distill(pipe, samples, student, config)

    if not state.is_main_process:
        return
    print(status(pipe))
    if args.num_images:
        result = evaluate(pipe, samples=samples, num_images=args.num_images, output_dir=args.output_dir / "evaluation")
        print(result.to_markdown())
    if args.push_to_hub:
        print(push_linear_attention(pipe, args.hub_model_id).commit_url)


if __name__ == "__main__":
    main()
