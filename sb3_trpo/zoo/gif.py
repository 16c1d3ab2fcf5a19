"""An animated GIF from a video, small enough for a README."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from sb3_trpo.errors import UsageError


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run the command.

    :param argv: its arguments
    :raises UsageError: the video does not exist
    """
    from moviepy import VideoFileClip

    parser = argparse.ArgumentParser(prog="sb3_trpo gif", description="Turn a video into an animated GIF beside it.")
    parser.add_argument("video", type=Path, help="a video, for instance from record-video in the run's folder videos/")
    parser.add_argument("--fps", type=int, default=15, help="frames per second")
    parser.add_argument("--width", type=int, default=320, help="pixels")
    arguments = parser.parse_args(argv)
    if not arguments.video.is_file():
        raise UsageError(f"{arguments.video}: no such video")
    gif = arguments.video.with_suffix(".gif")
    with VideoFileClip(str(arguments.video)) as clip:
        clip.resized(width=arguments.width).write_gif(gif, fps=arguments.fps, logger=None)
    print(f"GIF: {gif}")
