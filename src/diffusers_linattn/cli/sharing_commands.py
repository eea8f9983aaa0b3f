"""`diffusers-linattn push|pull|info`: linear attention on the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusers_linattn.cli.arguments import Run
from diffusers_linattn.hub import download, push_folder
from diffusers_linattn.sharing.summary import summarize


def add_push(parser: argparse.ArgumentParser) -> Run:
    """Publish a folder of save_linear_attention or distill on the Hub, in one commit, with a model card."""
    parser.add_argument("directory", type=Path, help="the folder")
    parser.add_argument("repo", help="the repository, such as me/flux-clear-w16; made if it does not exist")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--message", help="the commit's message")
    parser.add_argument(
        "--image", action="append", default=[], metavar="PROMPT=FILE", help="a sample picture for the card; repeatable"
    )
    _add_common(parser)

    def run(options: argparse.Namespace) -> None:
        images = {}
        for item in options.image:
            prompt, found, path = item.rpartition("=")
            if not found:
                raise ValueError(f"--image needs PROMPT=FILE, got {item!r}.")
            images[prompt] = path
        commit = push_folder(
            options.directory,
            options.repo,
            variant=options.variant,
            private=options.private,
            token=options.token,
            revision=options.revision,
            create_pr=options.create_pr,
            commit_message=options.message,
            images=images,
        )
        print(commit.pr_url or commit.commit_url)

    return run


def add_pull(parser: argparse.ArgumentParser) -> Run:
    """Download linear attention, check its files, and print the folder they are in."""
    _add_place(parser)
    parser.add_argument("--output", type=Path, metavar="DIRECTORY", help="copy the files there; else the cache")

    def run(options: argparse.Namespace) -> None:
        _, folder = download(
            options.repo,
            options.output,
            variant=options.variant,
            weight_name=options.weight_name,
            revision=options.revision,
            subfolder=options.subfolder,
            token=options.token,
        )
        print(folder)

    return run


def add_info(parser: argparse.ArgumentParser) -> Run:
    """Say what linear attention converts, for which model and how large it is, without downloading the weights."""
    _add_place(parser)

    def run(options: argparse.Namespace) -> None:
        print(
            summarize(
                options.repo,
                variant=options.variant,
                weight_name=options.weight_name,
                revision=options.revision,
                subfolder=options.subfolder,
                token=options.token,
            )
        )

    return run


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repo", help="the repository, such as me/flux-clear-w16, or a folder")
    parser.add_argument("--subfolder", help="a folder inside")
    parser.add_argument("--weight-name", help="one file, such as clear_local_16.safetensors of Huage001/CLEAR")
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument("--variant", help="such as fp16")
    # A token on the command line is seen by every process of the machine: the usual places are better.
    parser.add_argument("--token", help="instead of HF_TOKEN and `hf auth login`, which do not show in process lists")
